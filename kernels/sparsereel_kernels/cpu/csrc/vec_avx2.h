// Sixteen floats in two AVX2 registers.
#pragma once

struct V {
    __m256 a, b;
};

static inline V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, V x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
static inline V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline V sub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
// The second operand wins where one is NaN, so pass the data second.
static inline V maximum(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }

static inline __m128 halves(__m256 x, bool top) { return top ? _mm256_extractf128_ps(x, 1) : _mm256_castps256_ps128(x); }
static inline float hmax(V x) {
    __m256 m = _mm256_max_ps(x.a, x.b);
    __m128 q = _mm_max_ps(halves(m, false), halves(m, true));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
static inline float hsum(V x) {
    __m256 m = _mm256_add_ps(x.a, x.b);
    __m128 q = _mm_add_ps(halves(m, false), halves(m, true));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}

static inline __m256 lanes(uint32_t bits) {
    __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), bit), bit));
}
// Lanes whose bit is set keep x, the others become fill.
static inline V keep(uint32_t bits, V x, V fill) {
    return {_mm256_blendv_ps(fill.a, x.a, lanes(bits)), _mm256_blendv_ps(fill.b, x.b, lanes(bits >> 8))};
}
static inline V where_positive(V x, V yes, V no) {
    const __m256 zeros = _mm256_setzero_ps();
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, zeros, _CMP_GT_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, zeros, _CMP_GT_OQ))};
}

// base[index[i]] where index[i] >= 0, 1 elsewhere.
static inline V lookup(const float* base, const int32_t* index) {
    float lanes[16];
    for (int i = 0; i < 16; i++) lanes[i] = index[i] < 0 ? 1.f : base[index[i]];
    return load(lanes);
}

static inline V nearest(V x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
static inline __m256 power(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
// a * 2^n for whole numbers n in -126..127; 0 below.
static inline V ldexp2(V x, V n) {
    __m256 low = _mm256_set1_ps(-126.f);
    return {_mm256_and_ps(_mm256_mul_ps(x.a, power(n.a)), _mm256_cmp_ps(n.a, low, _CMP_NLT_UQ)),
            _mm256_and_ps(_mm256_mul_ps(x.b, power(n.b)), _mm256_cmp_ps(n.b, low, _CMP_NLT_UQ))};
}

static inline __m256 widen_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
static inline __m128i narrow_bf16(__m256 f) {
    // Round to nearest even on the bits; NaN stays NaN.
    __m256i x = _mm256_castps_si256(f);
    __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

static inline V load_as(const void* p, int64_t dtype, int64_t n) {
    alignas(32) char buffer[64];
    if (n < 16) {
        memset(buffer, 0, sizeof buffer);
        memcpy(buffer, p, (size_t)n * (dtype == SPARSEREEL_FLOAT32 ? 4 : 2));
        p = buffer;
    }
    if (dtype == SPARSEREEL_FLOAT32) return load((const float*)p);
    __m128i a = _mm_loadu_si128((const __m128i*)p), b = _mm_loadu_si128((const __m128i*)p + 1);
    if (dtype == SPARSEREEL_BFLOAT16) return {widen_bf16(a), widen_bf16(b)};
    return {_mm256_cvtph_ps(a), _mm256_cvtph_ps(b)};
}
static inline void store_as(void* p, int64_t dtype, int64_t n, V x) {
    alignas(32) char buffer[64];
    char* to = n < 16 ? buffer : (char*)p;
    if (dtype == SPARSEREEL_FLOAT32) {
        store((float*)to, x);
    } else {
        bool bf16 = dtype == SPARSEREEL_BFLOAT16;
        __m128i a = bf16 ? narrow_bf16(x.a) : _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT);
        __m128i b = bf16 ? narrow_bf16(x.b) : _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128((__m128i*)to, a);
        _mm_storeu_si128((__m128i*)to + 1, b);
    }
    if (n < 16) memcpy(p, buffer, (size_t)n * (dtype == SPARSEREEL_FLOAT32 ? 4 : 2));
}
