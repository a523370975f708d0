// Scores and weighted sums for units whose register tile is one strip wide (the others: score.h and weigh.h).
//
// A group of rows runs through all strips of a run before the next group begins: its rows stay in the first-level cache,
// and the strips come from the second as fast as they are multiplied. What changes scores is done to those strips that
// need it once the products are there, and row maxima are left to the softmax pass. Operands are floats.
#pragma once

constexpr float NONE = -__builtin_inff();
constexpr bool PEAKS = false;  // score_panel leaves no row maxima behind

// RAW: nothing but the products. PLAIN: hidden pairs become -inf. DECAYED: positive scores times FrameDecay's factors.
// MODIFIED: scaled, with FrameDecay or KeyBias.
enum ScoreMode { RAW, PLAIN, DECAYED, MODIFIED };

// Factors of FrameDecay leave the sign alone, so the scale can wait for the exponential, which takes it for nothing.
INLINE ScoreMode score_mode(const Call& call) {
    if (!call.modified) return PLAIN;
    return !call.bias && call.logit_scale > 0 ? DECAYED : MODIFIED;
}
INLINE float pending_scale(const Call& call) { return score_mode(call) == MODIFIED ? 1.f : call.logit_scale; }

// What all strips of one panel and run share.
template <class Op>
struct Scoring {
    const typename Op::Elem* rows;  // the panel's first row
    int64_t operand;                // which packed columns
    float *scores, *peak;
    int64_t score_row;
    const float* const* ramps;  // FrameDecay: factor of each row by frame of the column
    const float* column_bias;   // KeyBias of the keys as columns, by position, or null
    const float* row_bias;      // KeyBias of the keys as rows, or null
    float* factors;             // where to keep what FrameDecay multiplied by, or null
};

// Where a panel's strips of one operand lie; one more, which is asked for ahead and not read.
INLINE void locate(const View& view, const Packed& packed, int64_t operand, const Strip* strips, int64_t count,
                   const float** at) {
    for (int64_t i = 0; i < count; i++) at[i] = (const float*)(view.packed[operand] + strips[i].index * packed.bytes);
    at[count] = at[0];
}

template <int R = ROWS>
INLINE void multiply_rows(int64_t rows, const float* a, int64_t a_row, int64_t depth, const float* const* at,
                          int64_t count, float* scores, int64_t score_row) {
    if (rows == R)
        multiply_strips<R>(a, a_row, depth, at, count, scores, score_row);
    else if constexpr (R > 1)
        multiply_rows<R - 1>(rows, a, a_row, depth, at, count, scores, score_row);
}

template <int R = ROWS>
INLINE void add_rows(int64_t rows, const float* weights, int64_t weight_row, const float* const* at, int64_t count,
                     float* sums, int64_t sum_row) {
    if (rows == R)
        add_strips<R>(weights, weight_row, at, count, sums, sum_row);
    else if constexpr (R > 1)
        add_rows<R - 1>(rows, weights, weight_row, at, count, sums, sum_row);
}

// Whether a strip stays as it is for all rows: within the window that FrameDecay leaves alone most do.
INLINE bool is_unchanged(const Call& call, const float* const* ramps, int64_t rows, int32_t frame, int kind) {
    if (kind != FRAME_UNIFORM && kind != FRAME_CONSECUTIVE) return false;
    const int32_t needed = kind == FRAME_UNIFORM ? 1 : STRIP;
    for (int64_t r = 0; r < rows; r++)
        if (ramps[r] != call.ones && call.ramp_ones[ramps[r] + frame - call.ramp] < needed) return false;
    return true;
}

// FrameDecay on one strip of all rows: positive scores times the factor of their row and column. DAMPING: no factor
// exceeds 1, so that of a score and its product the smaller is the answer whatever the sign.
template <bool DAMPING>
static void decay(const Call& call, const float* const* ramps, int64_t strip, int64_t rows, float* scores,
                  float* factors, int64_t score_row) {
    const int32_t* frames = call.frame_of_column + strip * STRIP;
    const int kind = (int)call.frame_kind[strip];
    const V one = set1(1.f);
    V factor = one;
    if (kind == FRAME_EXEMPT && !factors) return;
    if (!factors && is_unchanged(call, ramps, rows, frames[0], kind)) return;
    for (int64_t r = 0; r < rows; r++) {
        if (kind == FRAME_UNIFORM)
            factor = set1(ramps[r][frames[0]]);
        else if (kind == FRAME_CONSECUTIVE)
            factor = load(ramps[r] + frames[0]);
        else if (kind == FRAME_MIXED && (r == 0 || ramps[r] != ramps[r - 1]))  // neighbours are mostly of one frame
            factor = lookup(ramps[r], frames);
        const V x = load(scores + r * score_row);
        if (factors) store(factors + r * score_row, where_positive(x, factor, one));
        const V product = mul(x, factor);
        if (kind != FRAME_EXEMPT) store(scores + r * score_row, DAMPING ? minimum(product, x) : where_positive(x, product, x));
    }
}

// The scale and KeyBias on one strip of all rows. (A call has KeyBias or FrameDecay, not both.)
template <class Op>
static void shift(const Call& call, const Scoring<Op>& s, int64_t strip, int64_t rows, float* scores) {
    const V scale = set1(call.logit_scale), offset = s.column_bias ? load(s.column_bias + strip * STRIP) : zero();
    for (int64_t r = 0; r < rows; r++) {
        float* at = scores + r * s.score_row;
        const V x = mul(load(at), scale);
        store(at, call.bias ? add(x, s.row_bias ? set1(s.row_bias[r]) : offset) : x);
    }
}

// Hidden pairs of one strip of all rows become -inf.
static void hide(const Call& call, const Strip& strip, int64_t rows, float* scores, int64_t score_row) {
    const V none = set1(NONE);
    const uint8_t* bits = strip.bits ? strip.bits : (const uint8_t*)&strip.columns;
    const int64_t step = strip.bits ? call.bits_row : 0;
    for (int64_t r = 0; r < rows; r++) {
        uint16_t word;
        __builtin_memcpy(&word, bits + r * step, 2);
        store(scores + r * score_row, keep(word & strip.columns, load(scores + r * score_row), none));
    }
}

// The largest score of every row.
static void find_peaks(const float* scores, int64_t score_row, int64_t rows, int64_t columns, float* peak) {
    for (int64_t r = 0; r < rows; r++) {
        const float* s = scores + r * score_row;
        V most = load(s);
        for (int64_t i = STRIP; i < columns; i += STRIP) most = maximum(most, load(s + i));
        peak[r] = hmax(most);
    }
}

// The same after FrameDecay, which is done on the way, row by row: the scores are read once. They may be hidden already,
// since -inf is not positive.
template <bool DAMPING>
static void decay_and_find_peaks(const Call& call, const float* const* ramps, const Strip* strips, int64_t count,
                                 float* scores, int64_t score_row, int64_t rows, float* peak) {
    int32_t first[RUN + COLUMNS];
    uint8_t kind[RUN + COLUMNS];
    for (int64_t i = 0; i < count; i++) {
        first[i] = call.frame_of_column[strips[i].index * STRIP];
        kind[i] = call.frame_kind[strips[i].index];
    }
    for (int64_t r = 0; r < rows; r++) {
        const float* ramp = ramps[r];
        const int32_t* ones = call.ramp_ones + (ramp - call.ramp);
        const bool exempt = ramp == call.ones;
        float* s = scores + r * score_row;
        V most = set1(NONE);
        for (int64_t i = 0; i < count; i++) {
            V x = load(s + i * STRIP);
            if (!exempt && kind[i] != FRAME_EXEMPT) {
                const float* at = ramp + first[i];
                const bool mixed = kind[i] == FRAME_MIXED, uniform = kind[i] == FRAME_UNIFORM;
                if (mixed || (uniform ? *at != 1.f : ones[first[i]] < STRIP)) {
                    const V factor = mixed ? lookup(ramp, call.frame_of_column + strips[i].index * STRIP)
                                     : uniform ? set1(*at) : load(at);
                    const V product = mul(x, factor);
                    x = DAMPING ? minimum(product, x) : where_positive(x, product, x);
                    store(s + i * STRIP, x);
                }
            }
            most = maximum(most, x);
        }
        peak[r] = hmax(most);
    }
}

// Scores of a panel of rows with a run of strips. In mode PLAIN FrameDecay is left to whoever comes next.
template <class Op>
static void score_panel(const Call& call, const View& view, const Scoring<Op>& s, ScoreMode mode, int64_t panel_rows,
                        const Strip* strips, int64_t count) {
    const Packed& packed = call.packed[s.operand];
    const float* at[RUN + 1];
    locate(view, packed, s.operand, strips, count, at);
    Split groups = Split::of(panel_rows, ROWS);
    for (int64_t g = 0; g < groups.parts; g++) {
        int64_t row = Split::first_of(groups, g), rows = Split::first_of(groups, g + 1) - row;
        multiply_rows(rows, s.rows + row * packed.padded, packed.padded, packed.padded, at, count,
                      s.scores + row * s.score_row, s.score_row);
    }
    if (mode == RAW) return;
    for (int64_t i = 0; i < count; i++) {
        float* scores = s.scores + i * STRIP;
        if (mode == MODIFIED) shift(call, s, strips[i].index, panel_rows, scores);
        if (mode != PLAIN && call.frame_of_column)
            (call.damping ? decay<true> : decay<false>)(call, s.ramps, strips[i].index, panel_rows, scores,
                                                        s.factors ? s.factors + i * STRIP : nullptr, s.score_row);
        if (strips[i].bits || strips[i].columns != 0xffff) hide(call, strips[i], panel_rows, scores, s.score_row);
    }
}

// The same, and the largest score of every row, [STRIP].
template <class Op>
static void score_and_find_peaks(const Call& call, const View& view, const Scoring<Op>& s, int64_t panel_rows,
                                 const Strip* strips, int64_t count, float* peak) {
    const ScoreMode mode = score_mode(call);
    if (mode == DECAYED) {
        score_panel<Op>(call, view, s, PLAIN, panel_rows, strips, count);
        (call.damping ? decay_and_find_peaks<true> : decay_and_find_peaks<false>)(call, s.ramps, strips, count, s.scores,
                                                                                 s.score_row, panel_rows, peak);
    } else {
        score_panel<Op>(call, view, s, mode, panel_rows, strips, count);
        find_peaks(s.scores, s.score_row, panel_rows, count * STRIP, peak);
    }
}

template <class Op>
struct Weighing {
    const typename Op::Elem* weights;  // the panel's first row
    int64_t weight_row;
    int64_t operand;    // which packed columns, not transposed
    float* sums;        // [rows, padded]
    const float* fade;  // factor for what a row's sums hold already, or null for 1
    bool started;       // sums hold something
};

// sums = fade * sums + weights * columns for a panel of rows and a run of strips.
template <class Op>
static void weigh_panel(const Call& call, const View& view, const Weighing<Op>& w, int64_t panel_rows,
                        const Strip* strips, int64_t count) {
    const Packed& packed = call.packed[w.operand];
    const float* at[RUN + 1];
    locate(view, packed, w.operand, strips, count, at);
    for (int64_t r = 0; r < panel_rows; r++) {
        float* sums = w.sums + r * packed.padded;
        if (w.started && (!w.fade || w.fade[r] == 1.f)) continue;
        const V fade = set1(w.fade ? w.fade[r] : 1.f);
        for (int64_t i = 0; i < packed.padded; i += STRIP) store(sums + i, w.started ? mul(load(sums + i), fade) : zero());
    }
    Split groups = Split::of(panel_rows, ROWS);
    for (int64_t column = 0; column < packed.padded; column += STRIP) {
        for (int64_t g = 0; g < groups.parts; g++) {
            int64_t row = Split::first_of(groups, g), rows = Split::first_of(groups, g + 1) - row;
            add_rows(rows, w.weights + row * w.weight_row, w.weight_row, at, count,
                     w.sums + row * packed.padded + column, packed.padded);
        }
        for (int64_t i = 0; i <= count; i++) at[i] += STRIP * STRIP;
    }
}
