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

// Words of 32 bits (a float, or a bf16 pair): to[w * 16 + t] = from[t * words + w] for 16 tokens.
static void transpose_strip(const float* from, int64_t words, float* to) {
    int64_t w = 0;
#ifdef SPARSEREEL_FAST_TRANSPOSE
    for (; w + STRIP <= words; w += STRIP) transpose16(from + w, words, to + w * STRIP);
#endif
    for (; w < words; w++)
        for (int64_t t = 0; t < STRIP; t++) to[w * STRIP + t] = from[t * words + w];
}

// to[i] = (a[i], b[i])
static void interleave(const uint16_t* a, const uint16_t* b, int64_t n, uint16_t* to) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t both = (uint32_t)a[i] | (uint32_t)b[i] << 16;
        __builtin_memcpy(to + 2 * i, &both, 4);
    }
}

// One strip from 16 rows of `padded` operands.
template <class Op>
static void pack_strip(const Packed& p, const typename Op::Elem* rows, typename Op::Elem* to) {
    if (p.transposed) {
        transpose_strip((const float*)rows, p.padded / Op::PAIR, (float*)to);
    } else if (Op::PAIR == 1) {
        __builtin_memcpy(to, rows, (size_t)(STRIP * p.padded) * sizeof(*to));
    } else {
        for (int64_t t = 0; t < STRIP; t += 2)
            interleave((const uint16_t*)rows + t * p.padded, (const uint16_t*)rows + (t + 1) * p.padded, p.padded,
                       (uint16_t*)to + t * p.padded);
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
    alignas(64) typename Op::Elem rows[STRIP * MAX_DIM];
    int64_t limit = column_limit(call, batch), dtype = call.args->dtype;
    for (int64_t i = 0; i < call.strips_per_block; i++) {
        int64_t token = block * call.column_block + i * STRIP, end = (block + 1) * call.column_block;
        int64_t count = (end < limit ? end : limit) - token;
        count = count < 0 ? 0 : count < STRIP ? count : STRIP;
        for (int64_t o = 0; o < call.operands; o++) {
            const Packed& p = call.packed[o];
            copy_rows<Op>(p.view, dtype, batch, head, token, count, p.features, p.padded, rows);
            for (int64_t e = count * p.padded; e < STRIP * p.padded; e++) rows[e] = 0;
            char* to = p.data + (place * call.strips_per_block + i) * p.bytes;
            pack_strip<Op>(p, rows, (typename Op::Elem*)to);
        }
    }
}
