// Sums of packed rows, weighted by a panel of probabilities or their gradients.
#pragma once

template <class Op>
struct Weighing {
    const typename Op::Elem* weights;  // the panel's first row
    int64_t weight_row;
    int64_t operand;    // which packed columns, not transposed
    float* sums;        // [rows, padded]
    const float* fade;  // factor for what a row's sums hold already, or null for 1
    bool started;       // sums hold something
};

// sums[R][N strips] = fade * sums + weights * columns over the run
template <class Op, int R, int N>
static void weigh(const Weighing<Op>& w, const char* columns, const Packed& packed, const Strip* strips, int64_t count,
                  int64_t row, int64_t column) {
    V c[R][N];
    float* sums = w.sums + row * packed.padded + column;
    UNROLL for (int r = 0; r < R; r++) {
        V fade = set1(w.fade ? w.fade[row + r] : 1.f);
        UNROLL for (int j = 0; j < N; j++)
            c[r][j] = w.started ? mul(load(sums + r * packed.padded + j * STRIP), fade) : zero();
    }
    const typename Op::Elem* weights = w.weights + row * w.weight_row;
    for (int64_t i = 0; i < count; i++) {
        const typename Op::Elem* strip = (const typename Op::Elem*)(columns + strips[i].index * packed.bytes);
        const typename Op::Elem* b[N];
        UNROLL for (int j = 0; j < N; j++) b[j] = strip + (column + j * STRIP) * Op::PAIR;
        multiply<Op, R, N>(c, weights + i * STRIP, w.weight_row, b, packed.padded * Op::PAIR, STRIP / Op::PAIR);
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int j = 0; j < N; j++) store(sums + r * packed.padded + j * STRIP, c[r][j]);
}

template <class Op, int R = ROWS, int N = COLUMNS>
INLINE void weigh_rows(int64_t rows, int64_t n, const Weighing<Op>& w, const char* columns, const Packed& packed,
                       const Strip* strips, int64_t count, int64_t row, int64_t column) {
    if (rows < R) {
        if constexpr (R > 1) weigh_rows<Op, R - 1, N>(rows, n, w, columns, packed, strips, count, row, column);
    } else if (n < N) {
        if constexpr (N > 1) weigh_rows<Op, R, N - 1>(rows, n, w, columns, packed, strips, count, row, column);
    } else {
        weigh<Op, R, N>(w, columns, packed, strips, count, row, column);
    }
}

#ifdef SPARSEREEL_HAS_TILES
// The same with matrix instructions: what the sums hold is faded beforehand.
static void weigh_tiles(const Weighing<Tiles>& w, const char* columns, const Packed& packed, int64_t panel_rows,
                        const Strip* strips, int64_t count) {
    for (int64_t r = 0; w.started && w.fade && r < panel_rows; r++) {
        float* sums = w.sums + r * packed.padded;
        if (w.fade[r] == 1.f) continue;
        for (int64_t i = 0; i < packed.padded; i += STRIP) store(sums + i, mul(load(sums + i), set1(w.fade[r])));
    }
    for (int64_t c = 0; c < packed.padded; c += 2 * STRIP)
        tile_sums(w.weights, w.weight_row, panel_rows > TILE_ROWS, columns, packed, strips, count, c,
                  c + STRIP < packed.padded, w.started, w.sums + c);
}
#endif

// A panel of rows and a run of strips.
template <class Op>
static void weigh_panel(const Call& call, const View& view, const Weighing<Op>& w, int64_t panel_rows,
                        const Strip* strips, int64_t count) {
    const Packed& packed = call.packed[w.operand];
#ifdef SPARSEREEL_HAS_TILES
    if constexpr (Op::TILES) return weigh_tiles(w, view.packed[w.operand], packed, panel_rows, strips, count);
#endif
    Split groups = Split::of(panel_rows, ROWS), parts = Split::of(packed.padded / STRIP, COLUMNS);
    for (int64_t c = 0; c < parts.parts; c++) {
        int64_t column = Split::first_of(parts, c), n = Split::first_of(parts, c + 1) - column;
        for (int64_t g = 0; g < groups.parts; g++) {
            int64_t row = Split::first_of(groups, g), rows = Split::first_of(groups, g + 1) - row;
            weigh_rows<Op>(rows, n, w, view.packed[w.operand], packed, strips, count, row, column * STRIP);
        }
    }
}
