// The C interface: what Python fills in (binding.py mirrors this struct field by field) and the entry points.
//
// No torch header is needed anywhere in this folder, so the library builds in seconds and serves every torch version.
#pragma once

#include <stdint.h>

#define SPARSEREEL_API __attribute__((visibility("default")))

extern "C" {

// A [batch, head, token, feature] tensor: strides in elements, the feature stride is 1.
struct SparsereelView {
    void* data;
    int64_t batch, head, token;
};

enum SparsereelType { SPARSEREEL_FLOAT32 = 0, SPARSEREEL_BFLOAT16 = 1, SPARSEREEL_FLOAT16 = 2 };

enum SparsereelStatus {
    SPARSEREEL_OK = 0,
    SPARSEREEL_NO_MEMORY = 1,
    SPARSEREEL_BAD_INDEX = 2,  // a block list or a tile number points outside the sequence
    SPARSEREEL_NO_ISA = 3,
    SPARSEREEL_BAD_SIZE = 4,
};

struct SparsereelArgs {
    int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, v_dim;
    int64_t dtype;    // SparsereelType of q, k, v, out and the gradients
    int64_t threads;  // at most this many
    double scale;

    SparsereelView q, k, v, out;
    float* lse;  // [batch, heads, q_len], contiguous

    // Block lists as in BlockMask, contiguous. has_mask = 0 means that every query sees every key.
    int64_t has_mask, block_q, block_k, mask_batch, mask_heads, max_full, max_partial, tiles;
    const int32_t* full_count;     // [mask_batch, mask_heads, query blocks]
    const int32_t* full_index;     // [mask_batch, mask_heads, query blocks, max_full]
    const int32_t* partial_count;  // as full_count
    const int32_t* partial_index;  // [mask_batch, mask_heads, query blocks, max_partial]
    const int32_t* partial_tile;   // as partial_index: which tile of partial_bits
    const uint8_t* partial_bits;   // [tiles, block_q, block_k / 8]

    const int32_t* key_lengths;  // [batch] or null

    // FrameDecay: null, or frame numbers (-1 = exempt) and factors by distance.
    const int32_t* frame_of_q;
    const int32_t* frame_of_k;
    const float* decay;
    int64_t decay_size;

    // KeyBias: null, or [*, *, kv_len] with strides in elements (0 broadcasts).
    const float* bias;
    int64_t bias_batch, bias_head;

    // Backward only.
    SparsereelView grad_out, grad_q, grad_k, grad_v;
    const float* grad_lse;  // as lse, or null
    float* grad_bias;       // [batch, heads, kv_len] sums over queries, or null
};

// size = sizeof(SparsereelArgs) on the Python side; a mismatch means a stale library.
SPARSEREEL_API int64_t sparsereel_args_size();

// Comma-separated names of the instruction sets that this library holds and this processor runs, best first.
SPARSEREEL_API const char* sparsereel_isas();

// isa: one of sparsereel_isas(). parallel: address of GOMP_parallel in the process, or null to start plain threads.
SPARSEREEL_API int32_t sparsereel_forward(const SparsereelArgs* args, const char* isa, void* parallel);
SPARSEREEL_API int32_t sparsereel_backward(const SparsereelArgs* args, const char* isa, void* parallel);
}
