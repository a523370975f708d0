// The two products of a register tile that is one strip wide, in plain vectors. See products_avx2.h for what is fast.
#pragma once

// scores[R, count strips] = rows[R, depth] * strips; strides in floats.
template <int R>
static void multiply_strips(const float* rows, int64_t row, int64_t depth, const float* const* strips, int64_t count,
                            float* scores, int64_t score_row) {
    for (int64_t i = 0; i < count; i++) {
        V c[R][1];
        UNROLL for (int r = 0; r < R; r++) c[r][0] = zero();
        multiply<F32, R, 1>(c, rows, row, {strips[i]}, STRIP, depth);
        UNROLL for (int r = 0; r < R; r++) store(scores + r * score_row + i * STRIP, c[r][0]);
    }
}

// sums[R, 16] += weights[R, count * 16] * strips[count][16, 16]
template <int R>
static void add_strips(const float* weights, int64_t weight_row, const float* const* strips, int64_t count, float* sums,
                       int64_t sum_row) {
    V c[R][1];
    UNROLL for (int r = 0; r < R; r++) c[r][0] = load(sums + r * sum_row);
    for (int64_t i = 0; i < count; i++) multiply<F32, R, 1>(c, weights + i * STRIP, weight_row, {strips[i]}, STRIP, STRIP);
    UNROLL for (int r = 0; r < R; r++) store(sums + r * sum_row, c[r][0]);
}

// sums[R, 16] += the sum over depth of weights[d, R] (transposed) * rows[d, 16]
template <int R>
static void spread_strip(const float* weights, int64_t weight_row, const float* rows, int64_t row, int64_t depth,
                         float* sums, int64_t sum_row) {
    V c[R];
    UNROLL for (int r = 0; r < R; r++) c[r] = load(sums + r * sum_row);
    for (int64_t d = 0; d < depth; d++) {
        const V x = load(rows + d * row);
        UNROLL for (int r = 0; r < R; r++) c[r] = fma(set1(weights[d * weight_row + r]), x, c[r]);
    }
    UNROLL for (int r = 0; r < R; r++) store(sums + r * sum_row, c[r]);
}
