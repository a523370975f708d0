// Which strips of keys a panel of rows visits.
#pragma once

struct Strip {
    const char *k, *v;
    const uint8_t* bits;  // this strip's two bytes in the row of the panel's first query, or null where all are set
    uint32_t columns;     // columns that exist: inside the sequence, the key length and the block
    int64_t index;        // number of the strip in its head
};

// The block list of one task, and what is needed to turn blocks into strips.
struct List {
    const int32_t *full, *partial, *tile;
    int64_t fulls, partials, limit;
    const char *k, *v;
};

static List list_of(const Call& call, const Task& task) {
    const SparsereelArgs& a = *call.args;
    List list = {};
    list.limit = key_limit(a, task.batch);
    int64_t group = a.heads / a.kv_heads, strips = call.key_blocks * call.strips_per_block;
    int64_t packed = task.batch * a.kv_heads + task.head / group - call.kv_first;
    list.k = call.k_packed + packed * strips * call.k_strip;
    list.v = call.v_packed + packed * strips * call.v_strip;
    if (!a.has_mask) {
        list.fulls = call.key_blocks;
        return list;
    }
    int64_t batch = a.mask_batch == 1 ? 0 : task.batch, head = a.mask_heads == 1 ? 0 : task.head;
    int64_t row = (batch * a.mask_heads + head) * call.query_blocks + task.block;
    list.full = a.full_index + row * a.max_full;
    list.fulls = a.full_count[row];
    list.partial = a.partial_index + row * a.max_partial;
    list.tile = a.partial_tile + row * a.max_partial;
    list.partials = a.partial_count[row];
    return list;
}

// Where a panel stands in its list: the next block (full ones first) and the next strip in that block.
struct Cursor {
    int64_t block, strip;
};

// Sets or clears a bit for each column of four strips: allowed by any of the rows, by all of them.
INLINE void summarize(const uint8_t* bits, int64_t row_bytes, int64_t rows, uint64_t* any, uint64_t* all) {
    uint64_t some = 0, every = ~0ull;
    for (int64_t r = 0; r < rows; r++) {
        uint64_t word;
        __builtin_memcpy(&word, bits + r * row_bytes, 8);
        some |= word;
        every &= word;
    }
    *any = some;
    *all = every;
}

// Collects up to `most` strips for the rows [row, row + rows) of the query block. A strip of a partial block that none
// of these rows may see is left out: windows that do not align with blocks save most of their waste here.
static int64_t next_strips(const Call& call, const List& list, Cursor* at, int64_t row, int64_t rows, Strip* out,
                           int64_t most) {
    int64_t n = 0;
    while (n < most && at->block < list.fulls + list.partials) {
        bool partial = at->block >= list.fulls;
        int64_t entry = partial ? at->block - list.fulls : at->block;
        int64_t block = partial ? list.partial[entry] : list.full ? list.full[entry] : entry;
        const uint8_t* bits = nullptr;
        if (partial) bits = call.bits + ((int64_t)list.tile[entry] * call.block_q + row) * call.bits_row;
        uint64_t any = ~0ull, all = ~0ull;
        int64_t summary = -1;
        for (; at->strip < call.strips_per_block && n < most; at->strip++) {
            int64_t i = at->strip, token = block * call.block_k + i * STRIP, end = (block + 1) * call.block_k;
            int64_t count = (end < list.limit ? end : list.limit) - token;
            if (count <= 0) continue;
            uint32_t columns = count >= STRIP ? 0xffff : (1u << count) - 1;
            if (partial && summary != i / 4) {
                summary = i / 4;
                summarize(bits + summary * 8, call.bits_row, rows, &any, &all);
            }
            uint32_t some = (uint32_t)(any >> (i % 4 * 16)) & columns, every = (uint32_t)(all >> (i % 4 * 16)) & columns;
            if (!some) continue;
            int64_t index = block * call.strips_per_block + i;
            out[n++] = {list.k + index * call.k_strip, list.v + index * call.v_strip,
                        every == columns ? nullptr : bits + 2 * i, columns, index};
        }
        if (at->strip == call.strips_per_block) *at = {at->block + 1, 0};
    }
    return n;
}
