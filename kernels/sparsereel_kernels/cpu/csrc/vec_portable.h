// Sixteen floats as four GCC/Clang vectors of four: SSE2, NEON or whatever the base instruction set offers.
#pragma once

typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

struct V {
    f4 p[4];
};

#define EACH(expression) \
    V r; \
    for (int i = 0; i < 4; i++) r.p[i] = (expression); \
    return r

static inline V set1(float x) { EACH((f4{x, x, x, x})); }
static inline V zero() { return set1(0.f); }
static inline V load(const float* from) {
    V r;
    memcpy(&r, from, sizeof r);
    return r;
}
static inline void store(float* to, V x) { memcpy(to, &x, sizeof x); }
static inline V add(V x, V y) { EACH(x.p[i] + y.p[i]); }
static inline V sub(V x, V y) { EACH(x.p[i] - y.p[i]); }
static inline V mul(V x, V y) { EACH(x.p[i] * y.p[i]); }
static inline V fma(V x, V y, V z) { EACH(x.p[i] * y.p[i] + z.p[i]); }
static inline f4 choose(i4 mask, f4 yes, f4 no) { return (f4)((mask & (i4)yes) | (~mask & (i4)no)); }
// The second operand wins where one is NaN, so pass the data second.
static inline V minimum(V x, V y) { EACH(choose(x.p[i] < y.p[i], x.p[i], y.p[i])); }
static inline V maximum(V x, V y) { EACH(choose(x.p[i] > y.p[i], x.p[i], y.p[i])); }

static inline float lane(V x, int i) { return x.p[i / 4][i % 4]; }
static inline float hmax(V x) {
    float m = lane(x, 0);
    for (int i = 1; i < 16; i++) m = lane(x, i) > m ? lane(x, i) : m;
    return m;
}
static inline float hsum(V x) {
    f4 s = (x.p[0] + x.p[1]) + (x.p[2] + x.p[3]);
    return (s[0] + s[1]) + (s[2] + s[3]);
}

// Lanes whose bit is set keep x, the others become fill.
static inline V keep(uint32_t bits, V x, V fill) {
    const i4 bit = {1, 2, 4, 8};
    EACH(choose((((int32_t)(bits >> (4 * i)) & bit) == bit), x.p[i], fill.p[i]));
}
static inline V where_positive(V x, V yes, V no) { EACH(choose(x.p[i] > 0.f, yes.p[i], no.p[i])); }

// base[index[i]] where index[i] >= 0, 1 elsewhere.
static inline V lookup(const float* base, const int32_t* index) {
    float lanes[16];
    for (int i = 0; i < 16; i++) lanes[i] = index[i] < 0 ? 1.f : base[index[i]];
    return load(lanes);
}

constexpr float LEAST_POWER = -200.f;
static inline V whole(V n) { return n; }
// Adding and taking away 1.5 * 2^23 rounds |x| < 2^22 to the nearest whole number.
static inline V nearest(V x) {
    const float magic = 12582912.f;
    V r;
    for (int i = 0; i < 4; i++) {
        f4 shifted = x.p[i] + magic;
        __asm__("" : "+m"(shifted));  // keeps the compiler from cancelling the two
        r.p[i] = shifted - magic;
    }
    return r;
}
// a * 2^n for whole numbers n in -126..127; 0 below.
static inline V ldexp2(V x, V n) {
    const f4 magic = {12582912.f, 12582912.f, 12582912.f, 12582912.f};
    V r;
    for (int i = 0; i < 4; i++) {
        i4 whole = (i4)(n.p[i] + magic) - (i4)magic;
        f4 scaled = x.p[i] * (f4)((whole + 127) << 23);
        r.p[i] = choose(n.p[i] < -126.f, f4{0, 0, 0, 0}, scaled);
    }
    return r;
}

static inline float widen(uint16_t h, int64_t dtype) {
    uint32_t x = (uint32_t)h << 16;
    if (dtype != SPARSEREEL_BFLOAT16) {
        uint32_t sign = x & 0x80000000, magnitude = h & 0x7fff;
        // Subnormal halves go through an integer: as floats they would count as tiny and be flushed.
        if (magnitude < 0x400) {
            float small = (float)(int32_t)magnitude * 0x1p-24f;
            return sign ? -small : small;
        }
        x = sign | (magnitude >= 0x7c00 ? 0x7f800000 | magnitude << 13 : (magnitude << 13) + 0x38000000);
    }
    float f;
    memcpy(&f, &x, 4);
    return f;
}
static inline uint16_t narrow(float f, int64_t dtype) {
    uint32_t x;
    memcpy(&x, &f, 4);
    if (dtype == SPARSEREEL_BFLOAT16) {
        if (f != f) return 0x7fc0;
        return (uint16_t)((x + 0x7fff + ((x >> 16) & 1)) >> 16);
    }
    uint32_t sign = (x >> 16) & 0x8000, magnitude = x & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        // Subnormal half: adding 0.5 leaves the wanted bits, correctly rounded, at the bottom of the sum.
        float small;
        memcpy(&small, &magnitude, 4);
        small += 0.5f;
        memcpy(&magnitude, &small, 4);
        return (uint16_t)(sign | (magnitude - 0x3f000000));
    }
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

static inline V load_as(const void* from, int64_t dtype, int64_t n) {
    V r = zero();
    if (dtype == SPARSEREEL_FLOAT32) {
        memcpy(&r, from, 4 * (size_t)n);
        return r;
    }
    float wide[16] = {};
    for (int64_t i = 0; i < n; i++) wide[i] = widen(((const uint16_t*)from)[i], dtype);
    return load(wide);
}
static inline void store_as(void* to, int64_t dtype, int64_t n, V x) {
    if (dtype == SPARSEREEL_FLOAT32) {
        memcpy(to, &x, 4 * (size_t)n);
        return;
    }
    float wide[16];
    store(wide, x);
    for (int64_t i = 0; i < n; i++) ((uint16_t*)to)[i] = narrow(wide[i], dtype);
}
#undef EACH
