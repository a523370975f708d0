// Products of rows with strips of columns: scores, and in backward the gradient of the weights.
#pragma once

constexpr float NONE = -__builtin_inff();

// RAW: nothing but the products. PLAIN: row maxima as well. MASKED: hidden pairs become -inf. MODIFIED: all of it.
enum ScoreMode { RAW, PLAIN, MASKED, MODIFIED };
constexpr bool PEAKS = true;  // score_panel leaves row maxima behind

INLINE ScoreMode score_mode(const Call& call) { return call.modified ? MODIFIED : PLAIN; }
// What scores have still to be multiplied by.
INLINE float pending_scale(const Call& call) { return call.modified ? 1.f : call.logit_scale; }

struct ScoreTile {
    const Strip* strips;  // COLUMNS of them
    const char* columns;  // strip 0 of the packed columns
    int64_t strip_bytes, depth;
    int64_t row;  // of the panel, for the strips' bits
    float *scores, *peak;
    int64_t score_row;
    bool first;  // first strips of the run: peak holds nothing yet
    // MODIFIED only
    const float* const* ramps;  // FrameDecay: factor of each row by frame of the column
    const float* column_bias;   // KeyBias of the keys as columns, by position, or null
    const float* row_bias;      // KeyBias of the keys as rows, or null
    float* factors;             // where to keep what FrameDecay multiplied by, or null
};

// Scales the raw products of one strip and applies FrameDecay or KeyBias.
template <int R, int N>
INLINE void modify(const Call& call, const ScoreTile& t, int j, V (&c)[R][N]) {
    const int64_t index = t.strips[j].index;
    const V scale = set1(call.logit_scale), one = set1(1.f);
    const V offset = t.column_bias ? load(t.column_bias + index * STRIP) : zero();
    const int32_t* frames = call.frame_of_column ? call.frame_of_column + index * STRIP : nullptr;
    const int kind = frames ? (int)call.frame_kind[index] : (int)FRAME_EXEMPT;
    V factor = one;
    UNROLL for (int r = 0; r < R; r++) {
        V x = mul(c[r][j], scale);
        if (kind == FRAME_UNIFORM)
            factor = set1(t.ramps[r][frames[0]]);
        else if (kind == FRAME_CONSECUTIVE)
            factor = load(t.ramps[r] + frames[0]);
        else if (kind == FRAME_MIXED && (r == 0 || t.ramps[r] != t.ramps[r - 1]))  // neighbours are mostly of one frame
            factor = lookup(t.ramps[r], frames);
        if (t.factors) store(t.factors + r * t.score_row + j * STRIP, where_positive(x, factor, one));
        if (kind != FRAME_EXEMPT) x = where_positive(x, mul(x, factor), x);
        c[r][j] = add(x, t.row_bias ? set1(t.row_bias[r]) : offset);
    }
}

template <class Op, int R, int MODE>
static void score(const Call& call, const typename Op::Elem* rows, const ScoreTile& t) {
    V c[R][COLUMNS];
    if (Op::TILES) {
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int j = 0; j < COLUMNS; j++) c[r][j] = load(t.scores + r * t.score_row + j * STRIP);
    } else {
        const typename Op::Elem* b[COLUMNS];
        UNROLL for (int j = 0; j < COLUMNS; j++)
            b[j] = (const typename Op::Elem*)(t.columns + t.strips[j].index * t.strip_bytes);
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < COLUMNS; j++) c[r][j] = zero();
        multiply<Op, R, COLUMNS>(c, rows, t.depth, b, STRIP * Op::PAIR, t.depth / Op::PAIR);
    }
    if (MODE == MASKED || MODE == MODIFIED) {
        const V none = set1(NONE);
        UNROLL for (int j = 0; j < COLUMNS; j++) {
            const Strip& s = t.strips[j];
            const uint8_t* bits = s.bits ? s.bits + t.row * call.bits_row : (const uint8_t*)&s.columns;
            int64_t step = s.bits ? call.bits_row : 0;
            if (MODE == MODIFIED) modify<R, COLUMNS>(call, t, j, c);
            UNROLL for (int r = 0; r < R; r++) {
                uint16_t word;
                __builtin_memcpy(&word, bits + r * step, 2);
                c[r][j] = keep(word & s.columns, c[r][j], none);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        V m = c[r][0];
        UNROLL for (int j = 0; j < COLUMNS; j++) store(t.scores + r * t.score_row + j * STRIP, c[r][j]);
        if (MODE == RAW) continue;
        UNROLL for (int j = 1; j < COLUMNS; j++) m = maximum(m, c[r][j]);
        if (!t.first) m = maximum(load(t.peak + r * STRIP), m);
        store(t.peak + r * STRIP, m);
    }
}

template <class Op, int R = ROWS>
INLINE void score_rows(int64_t count, ScoreMode mode, const Call& call, const typename Op::Elem* rows,
                       const ScoreTile& t) {
    if (count < R) {
        if constexpr (R > 1) score_rows<Op, R - 1>(count, mode, call, rows, t);
    } else if (mode == RAW) {
        score<Op, R, RAW>(call, rows, t);
    } else if (mode == PLAIN) {
        score<Op, R, PLAIN>(call, rows, t);
    } else if (mode == MASKED) {
        score<Op, R, MASKED>(call, rows, t);
    } else {
        score<Op, R, MODIFIED>(call, rows, t);
    }
}

// What all tiles of one panel and run share.
template <class Op>
struct Scoring {
    const typename Op::Elem* rows;  // the panel's first row
    int64_t operand;                // which packed columns
    float *scores, *peak;
    int64_t score_row;
    const float* const* ramps;
    const float *column_bias, *row_bias;
    float* factors;
};

// Scores of a panel of rows with a run of strips. `least` is the mode for strips that hide nothing.
template <class Op>
static void score_panel(const Call& call, const View& view, const Scoring<Op>& s, ScoreMode least, int64_t panel_rows,
                        const Strip* strips, int64_t count) {
    const Packed& packed = call.packed[s.operand];
    Split groups = Split::of(panel_rows, ROWS);
    for (int64_t i = 0; i < count; i += COLUMNS) {
        ScoreMode mode = least;
        for (int64_t j = 0; j < COLUMNS; j++)
            if (mode == PLAIN && (strips[i + j].bits || strips[i + j].columns != 0xffff)) mode = MASKED;
#ifdef SPARSEREEL_HAS_TILES
        if constexpr (Op::TILES) {
            for (int64_t j = i; j < i + COLUMNS; j += 2)
                tile_scores(s.rows, packed.padded, panel_rows > TILE_ROWS,
                            view.packed[s.operand] + strips[j].index * packed.bytes,
                            view.packed[s.operand] + strips[j + 1].index * packed.bytes, s.scores + j * STRIP,
                            s.score_row);
            if (mode == RAW) continue;
        }
#endif
        for (int64_t g = 0; g < groups.parts; g++) {
            int64_t row = Split::first_of(groups, g), rows = Split::first_of(groups, g + 1) - row;
            ScoreTile t = {strips + i, view.packed[s.operand], packed.bytes, packed.padded, row,
                           s.scores + row * s.score_row + i * STRIP, s.peak + row * STRIP, s.score_row, i == 0,
                           s.ramps + row, s.column_bias, s.row_bias ? s.row_bias + row : nullptr,
                           s.factors ? s.factors + row * s.score_row + i * STRIP : nullptr};
            score_rows<Op>(rows, mode, call, s.rows + row * packed.padded, t);
        }
    }
}
