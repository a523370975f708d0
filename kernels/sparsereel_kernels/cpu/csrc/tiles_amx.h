// Register tiles of Intel AMX: 16 rows of 64 bytes. Eight of them: four sums, two operands each of rows and columns.
//
// Without the hardware the same instructions can be spelled out in plain code (SPARSEREEL_EMULATE_AMX); tests do that.
#pragma once

#ifdef SPARSEREEL_EMULATE_AMX

struct Tile {
    alignas(64) char row[16][64];
};
static thread_local Tile tiles[8];

static void tile_zero_at(int n) { memset(&tiles[n], 0, sizeof(Tile)); }
static void tile_load_at(int n, const void* from, int64_t stride) {
    for (int r = 0; r < 16; r++) memcpy(tiles[n].row[r], (const char*)from + r * stride, 64);
}
static void tile_store_at(int n, void* to, int64_t stride) {
    for (int r = 0; r < 16; r++) memcpy((char*)to + r * stride, tiles[n].row[r], 64);
}
static void tile_multiply_at(int c, int a, int b) {
    for (int r = 0; r < 16; r++) {
        __m512 sum = _mm512_loadu_ps(tiles[c].row[r]);
        for (int k = 0; k < 16; k++) {
            int32_t pair;
            memcpy(&pair, tiles[a].row[r] + 4 * k, 4);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_loadu_si512(tiles[b].row[k]));
        }
        _mm512_storeu_ps(tiles[c].row[r], sum);
    }
}
#define TILE_ZERO(n) tile_zero_at(n)
#define TILE_LOAD(n, from, stride) tile_load_at(n, from, stride)
#define TILE_STORE(n, to, stride) tile_store_at(n, to, stride)
#define TILE_MULTIPLY(c, a, b) tile_multiply_at(c, a, b)
static void tiles_begin() {}
static void tiles_end() {}

#else

#define TILE_ZERO(n) _tile_zero(n)
#define TILE_LOAD(n, from, stride) _tile_loadd(n, from, stride)
#define TILE_STORE(n, to, stride) _tile_stored(n, to, stride)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
static void tiles_begin() {
    alignas(64) struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {};
    shape.palette = 1;
    for (int i = 0; i < 8; i++) {
        shape.bytes[i] = 64;
        shape.rows[i] = 16;
    }
    _tile_loadconfig(&shape);
}
static void tiles_end() { _tile_release(); }

#endif

// Some compilers do not know that a tile load reads memory.
INLINE void settle_memory() { __asm__ volatile("" ::: "memory"); }

constexpr int64_t TILE_ROWS = 16;

struct Tiles : Pairs {
    static constexpr bool TILES = true;
};

// scores[32 or 16 rows, 2 strips] = rows * columns; rows past the panel's end give numbers nobody reads.
INLINE void tile_scores(const uint16_t* rows, int64_t depth, bool both, const char* first, const char* second, float* to,
                        int64_t to_row) {
    const int64_t row_bytes = depth * 2, to_bytes = to_row * 4;
    settle_memory();
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int64_t k = 0; k < depth; k += 32) {
        TILE_LOAD(4, rows + k, row_bytes);
        TILE_LOAD(6, first + k * 32, 64);
        TILE_LOAD(7, second + k * 32, 64);
        TILE_MULTIPLY(0, 4, 6);
        TILE_MULTIPLY(1, 4, 7);
        if (!both) continue;
        TILE_LOAD(5, rows + TILE_ROWS * depth + k, row_bytes);
        TILE_MULTIPLY(2, 5, 6);
        TILE_MULTIPLY(3, 5, 7);
    }
    TILE_STORE(0, to, to_bytes);
    TILE_STORE(1, to + STRIP, to_bytes);
    if (!both) return;
    TILE_STORE(2, to + TILE_ROWS * to_row, to_bytes);
    TILE_STORE(3, to + TILE_ROWS * to_row + STRIP, to_bytes);
}

// Two strips of 8 pairs each, one after the other: where they lie apart in memory they are copied together.
struct StripPair {
    const char* at;
    int64_t stride;
};
INLINE StripPair two_strips(const char* columns, const Packed& packed, const Strip* strips, bool one, int64_t column,
                            char* spare) {
    const int64_t stride = packed.padded * 4;
    const char* first = columns + strips[0].index * packed.bytes + column * 4;
    if (!one && strips[1].index == strips[0].index + 1) return {first, stride};
    const char* second = one ? nullptr : columns + strips[1].index * packed.bytes + column * 4;
    for (int64_t i = 0; i < 8; i++) {
        memcpy(spare + i * 64, first + i * stride, 64);
        one ? memset(spare + (8 + i) * 64, 0, 64) : memcpy(spare + (8 + i) * 64, second + i * stride, 64);
    }
    return {spare, 64};
}

// sums[32 or 16 rows, 32 or 16 features] += weights * columns over a run of strips
INLINE void tile_sums(const uint16_t* weights, int64_t weight_row, bool both, const char* columns, const Packed& packed,
                      const Strip* strips, int64_t count, int64_t column, bool wide, bool started, float* sums) {
    const int64_t sum_bytes = packed.padded * 4, weight_bytes = weight_row * 2;
    float* below = sums + TILE_ROWS * packed.padded;
    alignas(64) char spare[2][1024];
    settle_memory();
    if (started) {
        TILE_LOAD(0, sums, sum_bytes);
        if (wide) TILE_LOAD(1, sums + STRIP, sum_bytes);
        if (both) TILE_LOAD(2, below, sum_bytes);
        if (both && wide) TILE_LOAD(3, below + STRIP, sum_bytes);
    } else {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    }
    for (int64_t i = 0; i < count; i += 2) {
        StripPair left = two_strips(columns, packed, strips + i, i + 1 == count, column, spare[0]);
        StripPair right = left;
        if (wide) right = two_strips(columns, packed, strips + i, i + 1 == count, column + STRIP, spare[1]);
        settle_memory();
        TILE_LOAD(4, weights + i * STRIP, weight_bytes);
        TILE_LOAD(6, left.at, left.stride);
        TILE_MULTIPLY(0, 4, 6);
        if (wide) TILE_LOAD(7, right.at, right.stride);
        if (wide) TILE_MULTIPLY(1, 4, 7);
        if (!both) continue;
        TILE_LOAD(5, weights + TILE_ROWS * weight_row + i * STRIP, weight_bytes);
        TILE_MULTIPLY(2, 5, 6);
        if (wide) TILE_MULTIPLY(3, 5, 7);
    }
    TILE_STORE(0, sums, sum_bytes);
    if (wide) TILE_STORE(1, sums + STRIP, sum_bytes);
    if (both) TILE_STORE(2, below, sum_bytes);
    if (both && wide) TILE_STORE(3, below + STRIP, sum_bytes);
}
