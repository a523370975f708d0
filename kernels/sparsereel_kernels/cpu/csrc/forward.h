// Forward pass of one task: online softmax over runs of strips, panel of rows by panel of rows.
//
// Scores are kept in powers of two (scale * log2(e) is folded in), so that exp2 serves. The scores of a panel and a run
// fit the first-level cache; a run of packed keys and values fits the second and serves all panels.
#pragma once

#ifdef SPARSEREEL_HAS_TILES
constexpr int64_t PANEL_ROWS = 2 * TILE_ROWS;
constexpr int64_t SPARE_ROWS = PANEL_ROWS;  // the last tiles of a task write past its rows
#else
// Few rows: their scores fit the first-level cache, and the fewer they are the more strips of partial blocks are skipped
// (cells.py counts them).
constexpr int64_t PANEL_ROWS = 12;
constexpr int64_t SPARE_ROWS = 0;
#endif
// One spare vector a row keeps the rows of a panel out of one another's cache sets.
constexpr int64_t SCORE_ROW = RUN * STRIP + STRIP;
constexpr int64_t PAIR_ROW = RUN * STRIP + 2 * STRIP;

// Strips a run. The packed columns of a run serve panel after panel, so they have to stay in the second-level cache.
INLINE int64_t run_length(const Call& call) {
    int64_t bytes = 0;
    for (int64_t o = 0; o < call.operands; o++) bytes += call.packed[o].bytes;
    int64_t fits = RUN_BYTES / bytes / 4 * 4;
    return fits < 8 ? 8 : fits < RUN ? fits : RUN;
}

struct Panel {
    int64_t first, rows;  // rows of the task
    Cursor at;
    bool started;  // its sums hold something
};

INLINE char* take(char** scratch, int64_t bytes) {
    char* at = *scratch;
    *scratch += (bytes + 63) / 64 * 64;
    return at;
}

INLINE float* take_floats(char** scratch, int64_t n) { return (float*)take(scratch, n * 4); }

// Operands made from a panel of scores: floats overwrite them, pairs need a place of their own.
template <class Op>
INLINE typename Op::Elem* take_weights(char** scratch, float* scores) {
    if (Op::PAIR == 1) return (typename Op::Elem*)scores;
    return (typename Op::Elem*)take(scratch, PANEL_ROWS * PAIR_ROW * 2);
}
template <class Op>
constexpr int64_t WEIGHT_ROW = Op::PAIR == 1 ? SCORE_ROW : PAIR_ROW;

INLINE Panel* take_panels(char** scratch, int64_t rows) {
    return (Panel*)take(scratch, rows * (int64_t)sizeof(Panel));
}

template <class Op>
INLINE typename Op::Elem* take_rows(char** scratch, int64_t rows, int64_t padded) {
    return (typename Op::Elem*)take(scratch, (rows + SPARE_ROWS) * padded * (int64_t)sizeof(typename Op::Elem));
}

INLINE float* take_sums(char** scratch, int64_t rows, int64_t padded) {
    return take_floats(scratch, (rows + SPARE_ROWS) * padded);
}

static int64_t start_panels(Panel* panels, int64_t rows, int64_t entry, int64_t most = PANEL_ROWS) {
    Split split = Split::of(rows, most);
    for (int64_t i = 0; i < split.parts; i++) {
        // Panels of like size; with matrix tiles full ones and a rest, as only the last may write past its rows.
        int64_t first = SPARE_ROWS ? i * most : Split::first_of(split, i);
        int64_t end = SPARE_ROWS ? Split::smaller(rows, first + most) : Split::first_of(split, i + 1);
        panels[i] = {first, end - first, {entry, 0}, false};
    }
    return split.parts;
}

// FrameDecay: where each row finds its factor by frame of the column.
static void set_ramps(const Call& call, int64_t token, int64_t rows, const float** ramps) {
    if (!call.frame_of_row) return;
    for (int64_t r = 0; r < rows; r++) {
        int32_t frame = call.frame_of_row[token + r];
        ramps[r] = frame < 0 ? call.ones : call.ramp - frame;
    }
}

// What one task works on; all in the thread's scratch memory.
template <class Op>
struct Forward {
    typename Op::Elem *q, *weights;
    float *scores, *sums, *peak, *top, *total, *fade;
    const float** ramps;
    Panel* panels;

    Forward(const Call& call, int64_t rows, char** scratch) {
        q = take_rows<Op>(scratch, rows, call.packed[0].padded);
        scores = take_floats(scratch, PANEL_ROWS * SCORE_ROW);
        weights = take_weights<Op>(scratch, scores);
        sums = take_sums(scratch, rows, call.packed[1].padded);
        peak = take_floats(scratch, PANEL_ROWS * STRIP);
        fade = take_floats(scratch, PANEL_ROWS + STRIP);
        top = take_floats(scratch, rows + STRIP);  // read by whole vectors
        total = take_floats(scratch, rows);
        ramps = (const float**)take(scratch, rows * (int64_t)sizeof(float*));
        panels = take_panels(scratch, rows);
    }
};

// Turns a row of scores into weights exp2(scale * score - top), and keeps the row's statistics.
template <class Op>
INLINE void soften(const Forward<Op>& w, int64_t row, int64_t columns, float scale, float* top, float* total) {
    const float* s = w.scores + row * SCORE_ROW;
    float peak = hmax(load(w.peak + row * STRIP)) * scale;
    float before = *top, now = peak > before ? peak : before;
    float base = now == NONE ? 0.f : now;
    float fade = before == now ? 1.f : exp2_scalar(before - base);
    V factor = set1(scale), shift = set1(-base), sum0 = zero(), sum1 = zero();
    typename Op::Elem* p = w.weights + row * WEIGHT_ROW<Op>;
    for (int64_t i = 0; i < columns; i += 2 * STRIP) {
        V a = exp2_of<Op::DEGREE>(fma(load(s + i), factor, shift));
        V b = exp2_of<Op::DEGREE>(fma(load(s + i + STRIP), factor, shift));
        sum0 = add(sum0, a);
        sum1 = add(sum1, b);
        Op::keep_two(p + i, a, b);
    }
    *top = now;
    *total = *total * fade + hsum(add(sum0, sum1));
    w.fade[row] = fade;
}

// The same for all rows of a panel; what happens once a row is done for 16 at a time. peak: of STRIP numbers the rows'.
template <class Op>
static void soften_panel(const Forward<Op>& w, float* peak, int64_t rows, int64_t columns, float scale, float* top,
                         float* total) {
    static_assert(PEAKS || PANEL_ROWS <= STRIP, "one vector holds a number for each row");
    alignas(64) float base[STRIP];
    for (int64_t r = rows; r < STRIP; r++) peak[r] = NONE;
    const V before = load(top), now = maximum(mul(load(peak), set1(scale)), before);
    // Rows that have seen nothing yet: their scores of -inf must not meet a base of -inf.
    const V least = maximum(set1(-__FLT_MAX__), now);
    store(w.fade, exp2_of<5>(sub(before, least)));
    store(base, least);
    for (int64_t r = 0; r < rows; r++) {
        const float* s = w.scores + r * SCORE_ROW;
        typename Op::Elem* p = w.weights + r * WEIGHT_ROW<Op>;
        const V factor = set1(scale), shift = set1(-base[r]);
        V sum = zero();
        for (int64_t i = 0; i < columns; i += STRIP) {
            V x = exp2_of<Op::DEGREE>(fma(load(s + i), factor, shift));
            sum = add(sum, x);
            store(p + i, x);
        }
        total[r] = total[r] * w.fade[r] + hsum(sum);
    }
    alignas(64) float new_top[STRIP];
    store(new_top, now);
    for (int64_t r = 0; r < rows; r++) top[r] = new_top[r];
}

// One run of strips for one panel.
template <class Op>
static void forward_panel(const Call& call, const View& view, const Forward<Op>& w, Panel* panel, const float* bias,
                          Strip* strips, int64_t count) {
    int64_t padded = pad_strips(strips, count), first = panel->first;
    Scoring<Op> scoring = {w.q + first * call.packed[0].padded, 0, w.scores, w.peak, SCORE_ROW,
                           w.ramps + first, bias, nullptr, nullptr};
    if constexpr (PEAKS) {
        score_panel<Op>(call, view, scoring, score_mode(call), panel->rows, strips, padded);
        for (int64_t r = 0; r < panel->rows; r++)
            soften<Op>(w, r, padded * STRIP, pending_scale(call), w.top + first + r, w.total + first + r);
    } else {
        alignas(64) float peak[STRIP];
        score_and_find_peaks(call, view, scoring, panel->rows, strips, padded, peak);
        soften_panel<Op>(w, peak, panel->rows, padded * STRIP, pending_scale(call), w.top + first, w.total + first);
    }
    Weighing<Op> weighing = {w.weights, WEIGHT_ROW<Op>, 1, w.sums + first * call.packed[1].padded, w.fade,
                             panel->started};
    weigh_panel<Op>(call, view, weighing, panel->rows, strips, count);
    panel->started = true;
}

// Writes n features, each times `factor`; zeros where there is nothing to write.
static void write_row(char* to, int64_t dtype, int64_t n, const float* sums, bool any, float factor) {
    for (int64_t i = 0; i < n; i += STRIP) {
        V x = any ? mul(load(sums + i), set1(factor)) : zero();
        store_as(to + i * size_of(dtype), dtype, n - i < STRIP ? n - i : STRIP, x);
    }
}

// Output and lse of one row from the sum of its weighted values, the largest score and the sum of its weights.
static void finish_row(const Call& call, const Task& task, int64_t row, const float* sums, float top, float total) {
    const SparsereelArgs& a = *call.args;
    constexpr float ln2 = 0.6931471805599453f;
    int64_t token = task.block * call.row_block + task.row + row;
    // A row without keys has total 0; a NaN total passes through.
    bool any = total != 0.f;
    write_row(token_of(a.out, a.dtype, task.batch, task.head, token), a.dtype, a.v_dim, sums, any, 1.f / total);
    a.lse[(task.batch * a.heads + task.head) * a.q_len + token] = any ? (top + __builtin_log2f(total)) * ln2 : NONE;
}

// A piece of a row: sums, maximum, total.
INLINE float* piece_of(const Call& call, const Task& task, int64_t row) {
    return task.piece + row * (call.packed[1].padded + 2);
}

template <class Op>
static void keep_piece(const Call& call, const Task& task, const Forward<Op>& w, int64_t panels) {
    const int64_t width = call.packed[1].padded;
    for (int64_t i = 0; i < panels; i++)
        for (int64_t r = w.panels[i].first; r < w.panels[i].first + w.panels[i].rows; r++) {
            float* to = piece_of(call, task, r);
            for (int64_t c = 0; c < width; c++) to[c] = w.panels[i].started ? w.sums[r * width + c] : 0.f;
            to[width] = w.top[r];
            to[width + 1] = w.total[r];
        }
}

static void merge(const Call& call, const Task* pieces, int64_t count) {
    const int64_t width = call.packed[1].padded;
    alignas(64) float sums[MAX_DIM];
    for (int64_t r = 0; r < pieces->rows; r++) {
        float top = NONE, total = 0.f;
        for (int64_t i = 0; i < count; i++) {
            float other = piece_of(call, pieces[i], r)[width];
            top = other > top ? other : top;
        }
        for (int64_t c = 0; c < width; c++) sums[c] = 0.f;
        for (int64_t i = 0; i < count; i++) {
            const float* piece = piece_of(call, pieces[i], r);
            float fade = piece[width] == NONE ? 0.f : exp2_scalar(piece[width] - top);
            for (int64_t c = 0; c < width; c += STRIP)
                store(sums + c, fma(load(piece + c), set1(fade), load(sums + c)));
            total += piece[width + 1] * fade;
        }
        finish_row(call, *pieces, r, sums, top, total);
    }
}

template <class Op>
static void forward_task(const Call& call, const Task& task, char* scratch) {
    const SparsereelArgs& a = *call.args;
    Forward<Op> w(call, task.rows, &scratch);
    int64_t token = task.block * call.row_block + task.row;
    View view = view_of(call, task.batch, task.head, task.head / (a.heads / a.kv_heads), task.block);
    view.end = task.end;
    const float* bias = call.bias ? call.bias + task.batch * call.bias_batch + task.head * call.bias_head : nullptr;
    copy_rows<Op>(a.q, a.dtype, task.batch, task.head, token, task.rows, a.head_dim, call.packed[0].padded, w.q);
    set_ramps(call, token, task.rows, w.ramps);
    for (int64_t r = 0; r < task.rows; r++) {
        w.top[r] = NONE;
        w.total[r] = 0.f;
    }
    int64_t panels = start_panels(w.panels, task.rows, task.entry);
    Strip strips[RUN + COLUMNS];
    const int64_t run = run_length(call);
    for (bool more = true; more;) {
        more = false;
        for (int64_t i = 0; i < panels; i++) {
            Panel* p = w.panels + i;
            int64_t n = next_strips(call, view, &p->at, task.row + p->first, p->rows, strips, run);
            if (!n) continue;
            forward_panel<Op>(call, view, w, p, bias, strips, n);
            more = true;
        }
    }
    if (task.piece) return keep_piece<Op>(call, task, w, panels);
    for (int64_t r = 0; r < task.rows; r++)
        finish_row(call, task, r, w.sums + r * call.packed[1].padded, w.top[r], w.total[r]);
}
