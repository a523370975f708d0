// The inner loops: a few rows times a few strips of 16 columns, held in registers.
//
// Op says what an operand is: F32 multiplies floats; Pairs (AVX-512 BF16) multiplies two neighbouring bf16 at a time.
// Sizes of the register tile come from the unit: ROWS x COLUMNS strips.
#pragma once

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

struct F32 {
    typedef float Elem;
    static constexpr bool TILES = false;  // products come from matrix instructions (tiles_amx.h)
    static constexpr int64_t PAIR = 1;
    static constexpr int DEGREE = 5;
    INLINE V spread(const Elem* a) { return set1(*a); }
    INLINE V mac(V c, V a, const Elem* b) { return fma(a, load(b), c); }
    INLINE void keep_two(Elem* to, V a, V b) {
        store(to, a);
        store(to + STRIP, b);
    }
};

#ifdef SPARSEREEL_HAS_PAIRS
struct Pairs {
    typedef uint16_t Elem;
    static constexpr bool TILES = false;
    static constexpr int64_t PAIR = 2;
    static constexpr int DEGREE = 4;
    INLINE V spread(const Elem* a) {
        int32_t two;
        __builtin_memcpy(&two, a, 4);
        return {_mm512_castsi512_ps(_mm512_set1_epi32(two))};
    }
    INLINE V mac(V c, V a, const Elem* b) {
        return {_mm512_dpbf16_ps(c.v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_loadu_si512(b))};
    }
    INLINE void keep_two(Elem* to, V a, V b) { _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v)); }
};
#endif

// c[r][j] += sum over s of a[r * a_row + s * PAIR] * b[j][s * b_step ..]
template <class Op, int R, int N>
INLINE void multiply(V (&c)[R][N], const typename Op::Elem* a, int64_t a_row, const typename Op::Elem* const (&b)[N],
                     int64_t b_step, int64_t steps) {
    for (int64_t s = 0; s < steps; s++) {
        UNROLL for (int r = 0; r < R; r++) {
            V x = Op::spread(a + r * a_row + s * Op::PAIR);
            UNROLL for (int j = 0; j < N; j++) c[r][j] = Op::mac(c[r][j], x, b[j] + s * b_step);
        }
    }
}

// 2^x to a relative error of 1e-7 (degree 5) or 3e-6 (degree 4, for results that are rounded to bf16 anyway).
template <int DEGREE>
INLINE V exp2_of(V x) {
    x = maximum(set1(LEAST_POWER), x);  // -inf would turn into NaN below; so small a power is 0 all the same
    V n = nearest(x), f = sub(x, whole(n)), p;
    if (DEGREE == 5) {
        p = fma(set1(0.001326472731307149f), f, set1(0.009671512991189957f));
        p = fma(p, f, set1(0.05550733581185341f));
        p = fma(p, f, set1(0.24022242426872253f));
        p = fma(p, f, set1(0.6931470036506653f));
    } else {
        p = fma(set1(0.009582852944731712f), f, set1(0.055906426161527634f));
        p = fma(p, f, set1(0.24024099111557007f));
        p = fma(p, f, set1(0.6931241750717163f));
    }
    return ldexp2(fma(p, f, set1(1.f)), n);
}

INLINE float exp2_scalar(float x) {
    float lanes[STRIP];
    store(lanes, exp2_of<5>(set1(x)));
    return lanes[0];
}

// Rows [0, rows) are cut into groups of at most ROWS, as equal as possible, and these into panels of PANEL groups.
struct Split {
    int64_t rows, parts;
    INLINE Split of(int64_t rows, int64_t most) { return {rows, (rows + most - 1) / most}; }
    INLINE int64_t first_of(const Split& s, int64_t i) { return i * (s.rows / s.parts) + smaller(i, s.rows % s.parts); }
    INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
};
