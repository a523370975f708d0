// Sixteen floats in one AVX-512 register.
#pragma once

struct V {
    __m512 v;
};

static inline V zero() { return {_mm512_setzero_ps()}; }
static inline V set1(float x) { return {_mm512_set1_ps(x)}; }
static inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
static inline V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand wins where one is NaN, so pass the data second.
static inline V maximum(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline float hmax(V a) { return _mm512_reduce_max_ps(a.v); }
static inline float hsum(V a) { return _mm512_reduce_add_ps(a.v); }

// Lanes whose bit is set keep a, the others become fill.
static inline V keep(uint32_t bits, V a, V fill) { return {_mm512_mask_mov_ps(fill.v, (__mmask16)bits, a.v)}; }
static inline V where_positive(V a, V yes, V no) {
    return {_mm512_mask_mov_ps(no.v, _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_GT_OQ), yes.v)};
}

// base[index[i]] where index[i] >= 0, 1 elsewhere.
static inline V lookup(const float* base, const int32_t* index) {
    __m512i i = _mm512_loadu_si512(index);
    return {_mm512_mask_i32gather_ps(_mm512_set1_ps(1.f), _mm512_cmpge_epi32_mask(i, _mm512_setzero_si512()), i, base, 4)};
}

constexpr float LEAST_POWER = -200.f;
static inline V whole(V n) { return n; }
static inline V nearest(V a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for whole numbers n
static inline V ldexp2(V a, V n) { return {_mm512_scalef_ps(a.v, n.v)}; }

static inline V widen_bf16(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }

static inline __m256i narrow_bf16(V a) {
    // Round to nearest even on the bits; NaN stays NaN.
    __m512i x = _mm512_castps_si512(a.v);
    __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

// The first n (1..16) elements; the other lanes are 0 and their memory is not touched.
static inline V load_as(const void* p, int64_t dtype, int64_t n) {
    __mmask16 m = (__mmask16)((1u << n) - 1);
    if (dtype == SPARSEREEL_FLOAT32) return {_mm512_maskz_loadu_ps(m, p)};
    __m256i h = _mm256_maskz_loadu_epi16(m, p);
    return dtype == SPARSEREEL_BFLOAT16 ? widen_bf16(h) : V{_mm512_cvtph_ps(h)};
}
static inline void store_as(void* p, int64_t dtype, int64_t n, V a) {
    __mmask16 m = (__mmask16)((1u << n) - 1);
    if (dtype == SPARSEREEL_FLOAT32) {
        _mm512_mask_storeu_ps(p, m, a.v);
        return;
    }
    __m256i h = dtype == SPARSEREEL_BFLOAT16 ? narrow_bf16(a) : _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
    _mm256_mask_storeu_epi16(p, m, h);
}

// to[w * 16 + t] = word w of row t, for 16 rows (those from `rows` on count as 0) of at most 16 words, of which the
// first `bytes` bytes exist. Four rounds of pairing rows and halves.
#define SPARSEREEL_FAST_TRANSPOSE
static inline void transpose16(const char* from, int64_t row_bytes, int64_t rows, int64_t bytes, float* to) {
    __m512 a[16], b[16];
    const __mmask64 valid = bytes >= 64 ? ~0ull : (1ull << bytes) - 1;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        a[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(i < rows ? valid : 0, from + i * row_bytes));
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    // a[4 g + c] now holds column 4 lane + c of rows 4 g .. 4 g + 3 in each 128-bit lane.
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        __m512 x = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), y = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
        __m512 z = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd), w = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
        a[c] = _mm512_shuffle_f32x4(x, y, 0x88);
        a[4 + c] = _mm512_shuffle_f32x4(z, w, 0x88);
        a[8 + c] = _mm512_shuffle_f32x4(x, y, 0xdd);
        a[12 + c] = _mm512_shuffle_f32x4(z, w, 0xdd);
    }
#pragma GCC unroll 16
    for (int w = 0; w < 16; w++)
        if (4 * w < bytes) _mm512_storeu_ps(to + w * 16, a[w]);
}

// to[i] = (a[i], b[i]) for the n first of `padded` 16-bit numbers, a multiple of 16; the rest are 0. b may be null for 0.
static inline void interleave(const void* a, const void* b, int64_t n, int64_t padded, uint16_t* to) {
    for (int64_t i = 0; i < padded; i += 16) {
        __mmask16 valid = n - i >= 16 ? 0xffff : n > i ? (__mmask16)((1u << (n - i)) - 1) : 0;
        __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, (const uint16_t*)a + i));
        __m512i high = low;
        if (b) high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, (const uint16_t*)b + i));
        high = b ? _mm512_slli_epi32(high, 16) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + 2 * i, _mm512_or_si512(low, high));
    }
}
