// Packs keys and values into strips that the inner loops read in order.
#pragma once

constexpr int64_t AHEAD = STRIP;  // tokens

// Words of 32 bits (a float, or a bf16 pair): to[w * 16 + t] = from[t][w] for 16 tokens.
static void transpose_strip(const float* from, int64_t words, float* to) {
    int64_t w = 0;
#ifdef SPARSEREEL_FAST_TRANSPOSE
    for (; w + STRIP <= words; w += STRIP) transpose16(from + w, words, to + w * STRIP);
#endif
    for (; w < words; w++)
        for (int64_t t = 0; t < STRIP; t++) to[w * STRIP + t] = from[t * words + w];
}

// Copies n features of one token into `to` as the operand type; [n, padded) become 0.
template <class Op>
static void copy_token(const char* from, int64_t dtype, int64_t n, int64_t padded, typename Op::Elem* to) {
    if (Op::PAIR == 2) {
        __builtin_memcpy(to, from, (size_t)n * 2);
        for (int64_t i = n; i < padded; i++) to[i] = 0;
        return;
    }
    int64_t size = dtype == SPARSEREEL_FLOAT32 ? 4 : 2, i = 0;
    for (; i + STRIP <= n; i += STRIP) store((float*)to + i, load_as(from + i * size, dtype, STRIP));
    if (i < n) {
        float lanes[STRIP];
        store(lanes, load_as(from + i * size, dtype, n - i));
        for (int64_t j = i; j < n; j++) to[j] = (typename Op::Elem)lanes[j - i];
    }
    for (i = n; i < padded; i++) to[i] = 0;
}

INLINE const char* token_of(const SparsereelView& view, int64_t dtype, int64_t batch, int64_t head, int64_t token) {
    int64_t size = dtype == SPARSEREEL_FLOAT32 ? 4 : 2;
    return (const char*)view.data + (batch * view.batch + head * view.head + token * view.token) * size;
}

// Asks for a token's memory ahead of use: tokens are often a stride apart that the processor does not foresee.
INLINE void fetch_token(const SparsereelView& view, const SparsereelArgs& a, int64_t batch, int64_t head, int64_t token,
                        int64_t tokens, int64_t features) {
    if (token >= tokens) return;
    const char* at = token_of(view, a.dtype, batch, head, token);
    int64_t bytes = features * (a.dtype == SPARSEREEL_FLOAT32 ? 4 : 2);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

// One strip of keys: [depth / pair, 16, pair], tokens past `count` are 0.
template <class Op>
static void pack_keys(const Call& call, int64_t batch, int64_t head, int64_t token, int64_t count, char* to) {
    const SparsereelArgs& a = *call.args;
    alignas(64) typename Op::Elem rows[STRIP * MAX_DIM];
    for (int64_t t = 0; t < count; t++) {
        fetch_token(a.k, a, batch, head, token + t + AHEAD, a.kv_len, a.head_dim);
        copy_token<Op>(token_of(a.k, a.dtype, batch, head, token + t), a.dtype, a.head_dim, call.depth,
                       rows + t * call.depth);
    }
    for (int64_t i = count * call.depth; i < STRIP * call.depth; i++) rows[i] = 0;
    transpose_strip((const float*)rows, call.depth / Op::PAIR, (float*)to);
}

// One strip of values: [16 / pair, width, pair], tokens past `count` are 0.
template <class Op>
static void pack_values(const Call& call, int64_t batch, int64_t head, int64_t token, int64_t count, char* to) {
    const SparsereelArgs& a = *call.args;
    alignas(64) typename Op::Elem rows[Op::PAIR * MAX_DIM];
    for (int64_t t = 0; t < STRIP; t += Op::PAIR) {
        typename Op::Elem* out = (typename Op::Elem*)to + t * call.width;
        typename Op::Elem* row = Op::PAIR == 1 ? out : rows;
        for (int64_t u = 0; u < Op::PAIR; u++) {
            fetch_token(a.v, a, batch, head, token + t + u + AHEAD, a.kv_len, a.v_dim);
            if (t + u < count)
                copy_token<Op>(token_of(a.v, a.dtype, batch, head, token + t + u), a.dtype, a.v_dim, call.width,
                               row + u * call.width);
            else
                for (int64_t i = 0; i < call.width; i++) row[u * call.width + i] = 0;
        }
        if (Op::PAIR == 2)
            for (int64_t i = 0; i < call.width; i++)
                ((uint32_t*)out)[i] = (uint32_t)row[i] | (uint32_t)row[call.width + i] << 16;
    }
}

INLINE int64_t key_limit(const SparsereelArgs& a, int64_t batch) {
    int64_t limit = a.key_lengths ? a.key_lengths[batch] : a.kv_len;
    return limit < 0 ? 0 : limit < a.kv_len ? limit : a.kv_len;
}

// Every strip of one key block. Tokens past the key length count as 0, so that padding never reaches a result.
template <class Op>
static void pack_block(const Call& call, int64_t batch, int64_t head, int64_t block, char* k, char* v) {
    int64_t limit = key_limit(*call.args, batch);
    for (int64_t i = 0; i < call.strips_per_block; i++) {
        int64_t token = block * call.block_k + i * STRIP, end = (block + 1) * call.block_k;
        int64_t count = (end < limit ? end : limit) - token;
        count = count < 0 ? 0 : count < STRIP ? count : STRIP;
        pack_keys<Op>(call, batch, head, token, count, k + i * call.k_strip);
        pack_values<Op>(call, batch, head, token, count, v + i * call.v_strip);
    }
}
