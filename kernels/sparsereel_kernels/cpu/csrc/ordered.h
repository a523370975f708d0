// The gradient of queries, summed up on the way while the keys' tasks run: scores are made once for all three gradients.
//
// Every task adds its share, ds^T k, to sums that all tasks of a head have in common. Shares are added to a block of
// queries in the order of the keys, whichever threads the tasks run on, so the same input gives the same bits. A task
// waits before it adds until the tasks before it are done with that block; tasks are handed out in the same order, so
// the first that is not done never waits.
#pragma once

#include <sched.h>

// How far one task has come in the list of one query head.
struct Turns {
    int32_t* turns;  // the head's, by query block
    int64_t key_block, parts, part;
    int64_t reached, passed;  // entries that it may add to, entries that it is done with
};

INLINE float* query_sums_of(const Call& call, int64_t batch, int64_t head) {
    const int64_t place = batch * call.args->heads + head - call.wave_first;
    return call.query_sums + place * call.query_positions * call.packed[2].padded;
}

INLINE Turns turns_of(const Call& call, const Task& task, int64_t query_head) {
    if (!call.turns) return {};
    const int64_t place = task.batch * call.args->heads + query_head - call.wave_first;
    const int64_t parts = (call.row_block + call.part_rows - 1) / call.part_rows;
    return {call.turns + place * call.column_blocks, task.block, parts, task.row / call.part_rows, 0, 0};
}

INLINE int32_t* turn_at(const Call& call, const View& view, const Turns& t, int64_t entry) {
    if (!call.has_mask) return t.turns + entry;
    return t.turns + (entry < view.fulls ? view.full[entry] : view.partial[entry - view.fulls]);
}

// Waits until the entries before `end` may be added to.
static void reach(const Call& call, const View& view, Turns* t, int64_t end) {
    for (; t->reached < end; t->reached++) {
        const int64_t entry = t->reached;
        int64_t before = t->key_block;
        if (call.has_mask)
            before = entry < view.fulls ? view.full_rank[entry] : view.partial_rank[entry - view.fulls];
        const int64_t needed = before * t->parts + t->part;
        for (int64_t spins = 0; __atomic_load_n(turn_at(call, view, *t, entry), __ATOMIC_ACQUIRE) < needed; spins++)
            if (spins > 64) sched_yield();
    }
}

// Lets others add to the entries before `end`.
static void pass_on(const Call& call, const View& view, Turns* t, int64_t end) {
    for (; t->passed < end; t->passed++) __atomic_fetch_add(turn_at(call, view, *t, t->passed), 1, __ATOMIC_RELEASE);
}

#if defined(__AVX512F__)
// sums[R columns, N strips of features] += the sum over depth of weights[d, R] (transposed) * rows[d, N strips].
template <int R, int N>
static void spread(const float* weights, int64_t weight_row, const float* rows, int64_t row, int64_t depth, float* sums,
                   int64_t sum_row) {
    V c[R][N];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < N; j++) c[r][j] = load(sums + r * sum_row + j * STRIP);
    for (int64_t d = 0; d < depth; d++) {
        V b[N];
        UNROLL for (int j = 0; j < N; j++) b[j] = load(rows + d * row + j * STRIP);
        UNROLL for (int r = 0; r < R; r++) {
            const V x = set1(weights[d * weight_row + r]);
            UNROLL for (int j = 0; j < N; j++) c[r][j] = fma(x, b[j], c[r][j]);
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < N; j++) store(sums + r * sum_row + j * STRIP, c[r][j]);
}
#else
template <int R, int N>
INLINE void spread(const float* weights, int64_t weight_row, const float* rows, int64_t row, int64_t depth, float* sums,
                   int64_t sum_row) {
    static_assert(N == 1, "register tiles are one strip wide");
    spread_strip<R>(weights, weight_row, rows, row, depth, sums, sum_row);
}
#endif

template <int R = ROWS, int N = COLUMNS>
INLINE void spread_rows(int64_t columns, int64_t strips, const float* weights, int64_t weight_row, const float* rows,
                        int64_t row, int64_t depth, float* sums, int64_t sum_row) {
    if (columns < R) {
        if constexpr (R > 1) spread_rows<R - 1, N>(columns, strips, weights, weight_row, rows, row, depth, sums, sum_row);
    } else if (strips < N) {
        if constexpr (N > 1) spread_rows<R, N - 1>(columns, strips, weights, weight_row, rows, row, depth, sums, sum_row);
    } else {
        spread<R, N>(weights, weight_row, rows, row, depth, sums, sum_row);
    }
}

// sums[column of a strip] += weights[row, column] * rows[row], for a panel of rows and a run of strips.
static void spread_panel(const float* weights, int64_t weight_row, const float* rows, int64_t padded, int64_t panel_rows,
                         const Strip* strips, int64_t count, float* sums) {
    const Split groups = Split::of(STRIP, ROWS), parts = Split::of(padded / STRIP, COLUMNS);
    for (int64_t i = 0; i < count; i++) {
        float* to = sums + strips[i].index * STRIP * padded;
        for (int64_t p = 0; p < parts.parts; p++) {
            const int64_t first = Split::first_of(parts, p), width = Split::first_of(parts, p + 1) - first;
            const int64_t feature = first * STRIP;
            for (int64_t g = 0; g < groups.parts; g++) {
                const int64_t c = Split::first_of(groups, g), columns = Split::first_of(groups, g + 1) - c;
                spread_rows(columns, width, weights + i * STRIP + c, weight_row, rows + feature, padded, panel_rows,
                            to + c * padded + feature, padded);
            }
        }
    }
}
