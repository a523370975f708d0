// What the driver hands to the per-instruction-set units, and what a unit offers.
//
// This header is compiled with different instruction sets into one library, so it holds plain structs only: an inline
// function here could be merged by the linker into the copy that was compiled for the better processor.
//
// Words. A pass works on blocks of *rows* that visit blocks of *columns*. Forward and the gradient of queries have
// queries as rows and keys as columns; the gradients of keys and values turn the picture around.
#pragma once

#include <stddef.h>

#include "args.h"

namespace sparsereel {

// Columns are handled in strips of 16: one AVX-512 vector of scores.
constexpr int64_t STRIP = 16;
constexpr int64_t MAX_DIM = 256;  // of head_dim and v_dim

enum Pass { FORWARD, QUERY_GRADIENT, KEY_GRADIENT };

// For each row block the column blocks it visits. Entries of row i begin at start[i], or at i * max without `start`.
struct Lists {
    const int32_t *full_count, *full_index;
    const int32_t *partial_count, *partial_index, *partial_tile;
    const int64_t *full_start, *partial_start;
    int64_t max_full, max_partial;
    // Lists of key blocks, by entry: in how many earlier entries other key blocks name the same query block.
    const int32_t *full_rank, *partial_rank;
};

// A tensor of the column side, packed for the heads of a wave, in strips of 16 tokens.
struct Packed {
    SparsereelView view;
    int64_t features;
    bool transposed;  // strips are [padded / pair, 16, pair]; else [16 / pair, padded, pair], or, where register tiles
                      // are one strip wide, [padded / 16, 16, 16]: what a tile reads lies in one piece
    int64_t padded;   // features, rounded up to the unit's depth_step (transposed) or strips
    int64_t bytes;    // of one strip
    char* data;
};

// How the frames of the 16 columns of a strip lie: all exempt, one frame, one column a frame in order, anything else.
enum FrameKind : uint8_t { FRAME_EXEMPT = 0, FRAME_UNIFORM = 1, FRAME_CONSECUTIVE = 2, FRAME_MIXED = 3 };

// Everything that is the same for all tasks of one pass.
struct Call {
    const SparsereelArgs* args;
    Pass pass;
    bool pairs;         // operands are bf16 pairs (dot-product instructions); else fp32
    bool modified;      // scores need more than the plain scale: a modifier, or a scale that is not positive
    float logit_scale;  // scale * log2(e): scores are kept in powers of two
    int64_t row_len, row_block, row_blocks;
    int64_t part_rows;  // of a task: larger blocks of rows are cut
    int64_t column_len, column_block, column_blocks, column_heads, strips_per_block;

    bool has_mask;
    Lists lists;          // by (batch, query head, row block)
    const uint8_t* bits;  // [tiles, row_block, bits_row]; bits_row is a multiple of 8
    int64_t bits_row;

    int64_t operands, wave_first;  // first (batch * column_heads + head) that is packed
    Packed packed[4];

    const float* bias;  // KeyBias in powers of two by position of the key, or null
    int64_t bias_batch, bias_head;
    const int32_t* frame_of_row;     // [row_len], FrameDecay only
    const int32_t* frame_of_column;  // by position
    const uint8_t* frame_kind;       // by strip
    const float* ramp;               // ramp[d] is the factor for column frame - row frame = d, for every d that occurs
    const float* ones;               // the same for exempt rows; indexed by the column's frame
    const int32_t* ramp_ones;        // by d: how many factors in a row from ramp[d] on are 1, counted to a strip's length
    bool damping;                    // every factor lies in [0, 1]

    // Backward: statistics of queries by position, [batch * heads, query_positions].
    int64_t query_positions;
    float* lse;    // in powers of two, +inf for queries without keys
    float* delta;  // sum(grad_out * out) - grad_lse

    // KEY_GRADIENT on fp32 operands sums up the gradient of queries as well (ordered.h), for the query heads of a wave;
    // else null.
    float* query_sums;  // [heads, query_positions, padded]
    int32_t* turns;     // [heads, query blocks]: shares added so far
};

// The position of token t is (t / block) * strips_per_block * 16 + t % block: strips never cross a block.
struct Task {
    int32_t batch, head;  // head of the row side
    int64_t block;
    int64_t row, rows;     // first row inside the block, number of rows
    int64_t entry, end;    // which entries of its list; all of them but where few rows see many columns
    float* piece = nullptr;  // such a piece leaves its sums, maxima and totals here: [rows, width + 2]
};

struct Unit {
    const char* name;
    bool pairs;          // can multiply bf16 pairs
    int64_t depth_step;  // head_dim of transposed pairs is rounded up to this
    // Packs one block of columns of one (batch, column head): `place` is its number in the packed buffers.
    void (*pack)(const Call& call, int64_t batch, int64_t head, int64_t block, int64_t place);
    // Writes the gradients of one block of queries from query_sums: `place` counts blocks from the wave's first head on.
    void (*finish)(const Call& call, int64_t batch, int64_t head, int64_t block, int64_t place);
    // Statistics of the queries [first, last) of one (batch, head).
    void (*measure)(const Call& call, int64_t batch, int64_t head, int64_t first, int64_t last);
    size_t (*scratch_bytes)(const Call& call, int64_t rows);
    void (*run)(const Call& call, const Task& task, char* scratch);
    // Forward: the result of a task from its `count` pieces.
    void (*merge)(const Call& call, const Task* pieces, int64_t count);
};

}  // namespace sparsereel
