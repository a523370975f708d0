// Which strips of columns a panel of rows visits.
#pragma once

struct Strip {
    const uint8_t* bits;  // this strip's two bytes in the row of the panel's first row, or null where all are set
    uint32_t columns;     // columns that exist: inside the sequence, the key length and the block
    int64_t index;        // number of the strip in its head
};

// What the rows of one block see of one head of the column side.
struct View {
    const int32_t *full, *partial, *tile, *full_rank, *partial_rank;
    int64_t fulls, partials, limit;
    int64_t end;  // entries of both lists that count: all of them, or a piece's
    const char* packed[4];  // strip 0 of the head, for each operand
};

static View view_of(const Call& call, int64_t batch, int64_t query_head, int64_t column_head, int64_t block) {
    const SparsereelArgs& a = *call.args;
    View view = {};
    view.limit = column_limit(call, batch);
    int64_t place = (batch * call.column_heads + column_head - call.wave_first) * call.column_blocks;
    for (int64_t o = 0; o < call.operands; o++)
        view.packed[o] = call.packed[o].data + place * call.strips_per_block * call.packed[o].bytes;
    view.fulls = view.end = call.column_blocks;
    if (!call.has_mask) return view;
    const Lists& lists = call.lists;
    int64_t mask_batch = a.mask_batch == 1 ? 0 : batch, mask_head = a.mask_heads == 1 ? 0 : query_head;
    int64_t row = (mask_batch * a.mask_heads + mask_head) * call.row_blocks + block;
    int64_t full = lists.full_start ? lists.full_start[row] : row * lists.max_full;
    int64_t partial = lists.partial_start ? lists.partial_start[row] : row * lists.max_partial;
    view.full = lists.full_index + full;
    view.fulls = lists.full_count[row];
    view.partial = lists.partial_index + partial;
    view.tile = lists.partial_tile + partial;
    view.partials = lists.partial_count[row];
    if (call.turns) {
        view.full_rank = lists.full_rank + full;
        view.partial_rank = lists.partial_rank + partial;
    }
    view.end = view.fulls + view.partials;
    return view;
}

// Where a panel stands in its list: the next block (full ones first) and the next strip in that block.
struct Cursor {
    int64_t block, strip;
};

// For each column of four strips a bit: allowed for any of the rows, for all of them.
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

// Collects up to `most` strips for the rows [row, row + rows) of the block. A strip of a partial block that none of
// these rows may see is left out: windows that do not align with blocks save most of their waste here.
static int64_t next_strips(const Call& call, const View& view, Cursor* at, int64_t row, int64_t rows, Strip* out,
                           int64_t most) {
    int64_t n = 0;
    while (n < most && at->block < view.end) {
        bool partial = at->block >= view.fulls;
        int64_t entry = partial ? at->block - view.fulls : at->block;
        int64_t block = partial ? view.partial[entry] : call.has_mask ? view.full[entry] : entry;
        const uint8_t* bits = nullptr;
        if (partial) bits = call.bits + ((int64_t)view.tile[entry] * call.row_block + row) * call.bits_row;
        uint64_t any = ~0ull, all = ~0ull;
        int64_t summary = -1;
        for (; at->strip < call.strips_per_block && n < most; at->strip++) {
            int64_t i = at->strip, token = block * call.column_block + i * STRIP, end = (block + 1) * call.column_block;
            int64_t count = (end < view.limit ? end : view.limit) - token;
            if (count <= 0) continue;
            uint32_t columns = count >= STRIP ? 0xffff : (1u << count) - 1;
            if (partial && summary != i / 4) {
                summary = i / 4;
                summarize(bits + summary * 8, call.bits_row, rows, &any, &all);
            }
            uint32_t some = (uint32_t)(any >> (i % 4 * 16)) & columns, every = (uint32_t)(all >> (i % 4 * 16)) & columns;
            if (!some) continue;
            out[n++] = {every == columns ? nullptr : bits + 2 * i, columns, block * call.strips_per_block + i};
        }
        if (at->strip == call.strips_per_block) *at = {at->block + 1, 0};
    }
    return n;
}

// Fills the last register tile with strips that count for nothing; even, because exponentials come two by two.
static int64_t pad_strips(Strip* strips, int64_t count) {
    int64_t padded = (count + COLUMNS - 1) / COLUMNS * COLUMNS;
    padded += padded % 2;
    for (int64_t i = count; i < padded; i++) strips[i] = {nullptr, 0, strips[count - 1].index};
    return padded;
}
