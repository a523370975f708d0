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
// Of two numbers the smaller, y where either is NaN.
static inline V minimum(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
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

// Lanes whose bit is set keep x, the others become fill: each lane shifts its bit to the sign, which is what blends look at.
static inline V keep(uint32_t bits, V x, V fill) {
    const __m256i all = _mm256_set1_epi32((int)bits);
    const __m256i a = _mm256_sllv_epi32(all, _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24));
    const __m256i b = _mm256_sllv_epi32(all, _mm256_setr_epi32(23, 22, 21, 20, 19, 18, 17, 16));
    return {_mm256_blendv_ps(fill.a, x.a, _mm256_castsi256_ps(a)), _mm256_blendv_ps(fill.b, x.b, _mm256_castsi256_ps(b))};
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

// Adding 1.5 * 2^23 + 127 rounds |x| <= 127 to the nearest whole number n and leaves n + 127, the exponent of 2^n, in the
// lowest bits. `nearest` gives that sum, `whole` n itself, and `ldexp2` a * 2^n, which is 0 for n = -127.
constexpr float LEAST_POWER = -127.f, TO_EXPONENT = 12583039.f;
static inline V whole(V n) { return sub(n, set1(TO_EXPONENT)); }
static inline V nearest(V x) { return add(x, set1(TO_EXPONENT)); }
static inline __m256 power(__m256 n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(n), 23)); }
static inline V ldexp2(V x, V n) { return {_mm256_mul_ps(x.a, power(n.a)), _mm256_mul_ps(x.b, power(n.b))}; }

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

// to[w * 16 + t] = word w of row t, for 16 rows (those from `rows` on count as 0) of at most 16 words, of which the
// first `bytes` / 4 exist. Eight rows and eight words at a time.
#define SPARSEREEL_FAST_TRANSPOSE
static inline void transpose16(const char* from, int64_t row_bytes, int64_t rows, int64_t bytes, float* to) {
    for (int64_t word = 0; word < 16 && 4 * word < bytes; word += 8) {
        const __m256i valid = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(bytes / 4 - word < 8 ? bytes / 4 - word : 8)),
                                                 _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        for (int64_t row = 0; row < 16; row += 8) {
            __m256 a[8], b[8];
#pragma GCC unroll 8
            for (int64_t i = 0; i < 8; i++)
                a[i] = row + i < rows ? _mm256_maskload_ps((const float*)(from + (row + i) * row_bytes) + word, valid)
                                      : _mm256_setzero_ps();
#pragma GCC unroll 4
            for (int i = 0; i < 8; i += 2) {
                b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
                b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
            }
#pragma GCC unroll 2
            for (int i = 0; i < 8; i += 4) {
                a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
                a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
                a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
                a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
            }
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                b[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
                b[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
            }
#pragma GCC unroll 8
            for (int64_t i = 0; i < 8; i++)
                if (4 * (word + i) < bytes) _mm256_storeu_ps(to + (word + i) * 16 + row, b[i]);
        }
    }
}
