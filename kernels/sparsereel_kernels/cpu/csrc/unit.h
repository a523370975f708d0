// What the driver hands to the per-instruction-set units, and what a unit offers.
//
// This header is compiled with different instruction sets into one library, so it holds plain structs only: an inline
// function here could be merged by the linker into the copy that was compiled for the better processor.
#pragma once

#include <stddef.h>

#include "args.h"

namespace sparsereel {

// Keys are handled in strips of 16: one AVX-512 vector of scores.
constexpr int64_t STRIP = 16;
constexpr int64_t MAX_DIM = 256;  // of head_dim and v_dim

// Everything that is the same for all tiles of one call.
struct Call {
    const SparsereelArgs* args;
    bool pairs;           // operands are bf16 pairs (dot-product instructions); else fp32
    bool modified;        // scores need more than the plain scale: a modifier, or a scale that is not positive
    float logit_scale;    // scale * log2(e): scores are kept in powers of two
    int64_t block_q, block_k, query_blocks, key_blocks, strips_per_block;
    int64_t depth;        // head_dim, rounded up to pairs
    int64_t width;        // v_dim, rounded up to strips
    int64_t k_strip, v_strip;  // bytes of one packed strip
    int64_t kv_first;     // number (batch * kv_heads + kv_head) of the first packed head
    char* k_packed;       // [packed heads, key_blocks * strips_per_block] strips of [depth / pair, 16, pair]
    char* v_packed;       // the same of [16 / pair, width, pair]
    const uint8_t* bits;  // [tiles, block_q, bits_row]; bits_row is a multiple of 8
    int64_t bits_row;
    const float* bias;    // in powers of two, [.., .., strips * 16], or null
    int64_t bias_batch, bias_head;
    const int32_t* frame_of_k;   // [strips * 16] or null
    const uint8_t* frame_kind;   // [strips] FrameKind
    const float* ramp;           // ramp[d] is the factor for frame_of_k - frame_of_q = d, for every d that occurs
    const float* ones;           // the same for queries that are exempt; indexed by frame_of_k
};

// How the frames of the 16 keys of a strip lie: all exempt, one frame, one key a frame in order, anything else.
enum FrameKind : uint8_t { FRAME_EXEMPT = 0, FRAME_UNIFORM = 1, FRAME_CONSECUTIVE = 2, FRAME_MIXED = 3 };

// Rows of one query block (or a part of it, where blocks are large).
struct Task {
    int32_t batch, head;
    int64_t block;     // query block
    int64_t row, rows; // first row inside the block, number of rows
};

struct Unit {
    const char* name;
    bool pairs;  // can multiply bf16 pairs
    void (*pack)(const Call& call, int64_t batch, int64_t kv_head, int64_t block, char* k, char* v);
    size_t (*forward_scratch)(const Call& call, int64_t rows);
    void (*forward)(const Call& call, const Task& task, char* scratch);
};

}  // namespace sparsereel
