// Packs keys and values (in backward also queries and gradients) into strips that the inner loops read in order.
#pragma once

constexpr int64_t AHEAD = STRIP;  // tokens

INLINE int64_t size_of(int64_t dtype) { return dtype == SPARSEREEL_FLOAT32 ? 4 : 2; }

INLINE char* token_of(const SparsereelView& view, int64_t dtype, int64_t batch, int64_t head, int64_t token) {
    return (char*)view.data + (batch * view.batch + head * view.head + token * view.token) * size_of(dtype);
}

// Asks for a token's memory ahead of use: tokens are often a stride apart that the processor does not foresee.
INLINE void fetch(const char* token, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(token + i);
}

// Copies n features of one token into `to` as the operand type; [n, padded) become 0.
template <class Op>
static void copy_token(const char* from, int64_t dtype, int64_t n, int64_t padded, typename Op::Elem* to) {
    if (Op::PAIR == 2 || dtype == SPARSEREEL_FLOAT32) {
        __builtin_memcpy(to, from, (size_t)n * sizeof(*to));
    } else {
        int64_t i = 0;
        for (; i + STRIP <= n; i += STRIP) store((float*)to + i, load_as(from + i * 2, dtype, STRIP));
        if (i < n) {
            float lanes[STRIP];
            store(lanes, load_as(from + i * 2, dtype, n - i));
            __builtin_memcpy(to + i, lanes, (size_t)(n - i) * 4);
        }
    }
    for (int64_t i = n; i < padded; i++) to[i] = 0;
}

// Tokens [token, token + rows) as rows of `padded` operands.
template <class Op>
static void copy_rows(const SparsereelView& view, int64_t dtype, int64_t batch, int64_t head, int64_t token,
                      int64_t rows, int64_t features, int64_t padded, typename Op::Elem* to) {
    for (int64_t r = 0; r < rows; r++) {
        if (r + AHEAD < rows) fetch(token_of(view, dtype, batch, head, token + r + AHEAD), features * size_of(dtype));
        copy_token<Op>(token_of(view, dtype, batch, head, token + r), dtype, features, padded, to + r * padded);
    }
}

// Words of 32 bits (a float, or a bf16 pair): to[w * 16 + t] = word w of row t. Rows from `rows` on, and words past the
// first `bytes` bytes of a row, are 0.
static void transpose_strip(const char* from, int64_t row_bytes, int64_t rows, int64_t bytes, int64_t words, float* to) {
    int64_t done = 0;
#ifdef SPARSEREEL_FAST_TRANSPOSE
    for (; 4 * done < bytes; done += STRIP)
        transpose16(from + 4 * done, row_bytes, rows, bytes - 4 * done, to + done * STRIP);
    done = (bytes + 3) / 4;
#else
    for (; 4 * done + 4 <= bytes; done++)
        for (int64_t t = 0; t < STRIP; t++) {
            float word = 0.f;
            if (t < rows) __builtin_memcpy(&word, from + t * row_bytes + 4 * done, 4);
            to[done * STRIP + t] = word;
        }
#endif
    for (int64_t i = done * STRIP; i < words * STRIP; i++) to[i] = 0.f;
}

// One strip from `count` tokens, the first at `from`.
template <class Op>
static void pack_strip(const Packed& p, int64_t dtype, const char* from, int64_t token_bytes, int64_t count, char* to) {
    typedef typename Op::Elem Elem;
    constexpr int64_t size = (int64_t)sizeof(Elem);
    if (p.transposed) {
        alignas(64) Elem rows[STRIP * MAX_DIM];
        int64_t row_bytes = token_bytes;
        if (Op::PAIR == 1 && dtype != SPARSEREEL_FLOAT32) {
            for (int64_t t = 0; t < count; t++)
                copy_token<Op>(from + t * token_bytes, dtype, p.features, p.features, rows + t * p.features);
            from = (const char*)rows;
            row_bytes = p.features * size;
        }
        transpose_strip(from, row_bytes, count, p.features * size, p.padded / Op::PAIR, (float*)to);
    } else if (BLOCKED) {
        if (count < STRIP) __builtin_memset(to, 0, (size_t)p.bytes);
        for (int64_t t = 0; t < count; t++)
            for (int64_t i = 0; i < p.features; i += STRIP) {
                int64_t n = p.features - i < STRIP ? p.features - i : STRIP;
                store((float*)to + (i + t) * STRIP, load_as(from + t * token_bytes + i * size_of(dtype), dtype, n));
            }
    } else if (Op::PAIR == 1) {
        for (int64_t t = 0; t < count; t++)
            copy_token<Op>(from + t * token_bytes, dtype, p.features, p.padded, (Elem*)to + t * p.padded);
        __builtin_memset(to + count * p.padded * size, 0, (size_t)((STRIP - count) * p.padded * size));
    } else {
#ifdef SPARSEREEL_HAS_PAIRS
        for (int64_t t = 0; t < STRIP; t += 2)
            interleave(from + t * token_bytes, t + 1 < count ? from + (t + 1) * token_bytes : nullptr,
                       t < count ? p.features : 0, p.padded, (uint16_t*)to + t * p.padded);
#endif
    }
}

INLINE int64_t key_limit(const SparsereelArgs& a, int64_t batch) {
    int64_t limit = a.key_lengths ? a.key_lengths[batch] : a.kv_len;
    return limit < 0 ? 0 : limit < a.kv_len ? limit : a.kv_len;
}

INLINE int64_t column_limit(const Call& call, int64_t batch) {
    return call.pass == KEY_GRADIENT ? call.column_len : key_limit(*call.args, batch);
}

// Every strip of one block. Tokens past the key length count as 0, so that padding never reaches a result.
template <class Op>
static void pack_block(const Call& call, int64_t batch, int64_t head, int64_t block, int64_t place) {
    int64_t limit = column_limit(call, batch), dtype = call.args->dtype;
    for (int64_t i = 0; i < call.strips_per_block; i++) {
        int64_t token = block * call.column_block + i * STRIP, end = (block + 1) * call.column_block;
        int64_t count = (end < limit ? end : limit) - token;
        count = count < 0 ? 0 : count < STRIP ? count : STRIP;
        for (int64_t o = 0; o < call.operands; o++) {
            const Packed& p = call.packed[o];
            const char* from = token_of(p.view, dtype, batch, head, token);
            const int64_t token_bytes = p.view.token * size_of(dtype);
            for (int64_t t = STRIP; t < 2 * STRIP && token + t < limit; t++)
                fetch(from + t * token_bytes, p.features * size_of(dtype));
            pack_strip<Op>(p, dtype, from, token_bytes, count,
                           p.data + (place * call.strips_per_block + i) * p.bytes);
        }
    }
}
