// Forward pass of one task: online softmax over runs of strips, panel of rows by panel of rows.
//
// Scores are kept in powers of two (scale * log2(e) is folded in), so that exp2 serves. The scores of a panel and a run
// fit the first-level cache; a run of packed keys and values fits the second and serves all panels.
#pragma once

constexpr int64_t GROUPS = 4;   // row groups a panel
constexpr int64_t RUN = 16;     // strips a run: 256 keys for each softmax step
constexpr float NONE = -__builtin_inff();

struct Panel {
    int64_t first, rows;  // rows of the task
    Cursor at;
    bool started;  // acc and the row statistics hold something
};

// What one task works on; all in the thread's scratch memory.
template <class Op>
struct Work {
    typename Op::Elem *q, *p;
    float *scores, *acc, *peak, *top, *total, *fade;
    const float** ramps;
    const float* bias;
    Panel* panels;
    int64_t score_row, p_row;
};

INLINE char* take(char** scratch, int64_t bytes) {
    char* at = *scratch;
    *scratch += (bytes + 63) / 64 * 64;
    return at;
}

template <class Op>
static Work<Op> carve(const Call& call, int64_t rows, char** scratch) {
    Work<Op> w;
    constexpr int64_t panel_rows = ROWS * GROUPS;
    // One spare vector a row keeps rows of a panel out of one another's cache sets.
    w.score_row = RUN * STRIP + STRIP;
    w.p_row = Op::PAIR == 1 ? w.score_row : RUN * STRIP + 2 * STRIP;
    w.q = (typename Op::Elem*)take(scratch, rows * call.depth * (int64_t)sizeof(typename Op::Elem));
    w.scores = (float*)take(scratch, panel_rows * w.score_row * 4);
    // Floats overwrite their scores.
    w.p = Op::PAIR == 1 ? (typename Op::Elem*)w.scores : (typename Op::Elem*)take(scratch, panel_rows * w.p_row * 2);
    w.acc = (float*)take(scratch, rows * call.width * 4);
    w.peak = (float*)take(scratch, panel_rows * STRIP * 4);
    w.fade = (float*)take(scratch, panel_rows * 4);
    w.top = (float*)take(scratch, rows * 4);
    w.total = (float*)take(scratch, rows * 4);
    w.ramps = (const float**)take(scratch, rows * (int64_t)sizeof(float*));
    w.bias = nullptr;
    w.panels = (Panel*)take(scratch, rows * (int64_t)sizeof(Panel));
    return w;
}

enum ScoreMode { PLAIN, MASKED, MODIFIED };

struct ScoreTile {
    const Strip* strips;  // COLUMNS of them
    int64_t row;          // of the panel, for the strips' bits
    float *scores, *peak;
    int64_t score_row;
    bool first;  // first strips of the run: peak holds nothing yet
    const float* const* ramps;  // factor of each row by key frame, under FrameDecay
    const float* bias;          // of this batch and head, or null
};

// Scales the raw products of one strip and applies FrameDecay or KeyBias.
template <int R, int N>
INLINE void modify(const Call& call, const ScoreTile& t, int j, V (&c)[R][N]) {
    const int64_t index = t.strips[j].index;
    const V scale = set1(call.logit_scale), offset = t.bias ? load(t.bias + index * STRIP) : zero();
    const int32_t* frames = call.frame_of_k ? call.frame_of_k + index * STRIP : nullptr;
    const int kind = frames ? call.frame_kind[index] : FRAME_EXEMPT;
    V factor = set1(1.f);
    UNROLL for (int r = 0; r < R; r++) {
        V x = mul(c[r][j], scale);
        if (kind == FRAME_UNIFORM)
            x = scale_positive(x, set1(t.ramps[r][frames[0]]));
        else if (kind == FRAME_CONSECUTIVE)
            x = scale_positive(x, load(t.ramps[r] + frames[0]));
        else if (kind == FRAME_MIXED) {
            // Neighbouring queries are mostly of one frame.
            if (r == 0 || t.ramps[r] != t.ramps[r - 1]) factor = lookup(t.ramps[r], frames);
            x = scale_positive(x, factor);
        }
        c[r][j] = add(x, offset);
    }
}

template <class Op, int R, int MODE>
static void score(const Call& call, const typename Op::Elem* q, const ScoreTile& t) {
    V c[R][COLUMNS];
    const typename Op::Elem* b[COLUMNS];
    UNROLL for (int j = 0; j < COLUMNS; j++) b[j] = (const typename Op::Elem*)t.strips[j].k;
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < COLUMNS; j++) c[r][j] = zero();
    multiply<Op, R, COLUMNS>(c, q, call.depth, b, STRIP * Op::PAIR, call.depth / Op::PAIR);
    if (MODE != PLAIN) {
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
        UNROLL for (int j = 1; j < COLUMNS; j++) m = maximum(m, c[r][j]);
        if (!t.first) m = maximum(load(t.peak + r * STRIP), m);
        store(t.peak + r * STRIP, m);
    }
}

template <class Op, int R = ROWS>
INLINE void score_rows(int64_t rows, ScoreMode mode, const Call& call, const typename Op::Elem* q, const ScoreTile& t) {
    if (rows < R) {
        if constexpr (R > 1) score_rows<Op, R - 1>(rows, mode, call, q, t);
    } else if (mode == PLAIN) {
        score<Op, R, PLAIN>(call, q, t);
    } else if (mode == MASKED) {
        score<Op, R, MASKED>(call, q, t);
    } else {
        score<Op, R, MODIFIED>(call, q, t);
    }
}

// acc[R][N strips] = fade * acc + p v over the run; without `started`, acc starts from 0.
template <class Op, int R, int N>
static void weigh(const Work<Op>& w, const Call& call, const Strip* strips, int64_t count, int64_t row, float* acc,
                  int64_t column, bool started) {
    V c[R][N];
    UNROLL for (int r = 0; r < R; r++) {
        V fade = set1(w.fade[row + r]);
        UNROLL for (int j = 0; j < N; j++)
            c[r][j] = started ? mul(load(acc + r * call.width + j * STRIP), fade) : zero();
    }
    const typename Op::Elem* p = w.p + row * w.p_row;
    for (int64_t i = 0; i < count; i++) {
        const typename Op::Elem* v = (const typename Op::Elem*)strips[i].v + column * Op::PAIR;
        const typename Op::Elem* b[N];
        UNROLL for (int j = 0; j < N; j++) b[j] = v + j * STRIP * Op::PAIR;
        multiply<Op, R, N>(c, p + i * STRIP, w.p_row, b, call.width * Op::PAIR, STRIP / Op::PAIR);
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int j = 0; j < N; j++) store(acc + r * call.width + j * STRIP, c[r][j]);
}

template <class Op, int R = ROWS, int N = COLUMNS>
INLINE void weigh_rows(int64_t rows, int64_t n, const Work<Op>& w, const Call& call, const Strip* strips, int64_t count,
                       int64_t row, float* acc, int64_t column, bool started) {
    if (rows < R) {
        if constexpr (R > 1) weigh_rows<Op, R - 1, N>(rows, n, w, call, strips, count, row, acc, column, started);
    } else if (n < N) {
        if constexpr (N > 1) weigh_rows<Op, R, N - 1>(rows, n, w, call, strips, count, row, acc, column, started);
    } else {
        weigh<Op, R, N>(w, call, strips, count, row, acc, column, started);
    }
}

// Turns a row of scores into weights exp2(scale * score - top), and keeps the row's statistics.
template <class Op>
INLINE void soften(const Work<Op>& w, int64_t row, int64_t columns, float scale, float* top, float* total) {
    float* s = w.scores + row * w.score_row;
    float peak = hmax(load(w.peak + row * STRIP)) * scale;
    float before = *top, now = peak > before ? peak : before;
    float base = now == NONE ? 0.f : now;
    float fade = before == now ? 1.f : exp2_scalar(before - base);
    V factor = set1(scale), shift = set1(-base), sum0 = zero(), sum1 = zero();
    typename Op::Elem* p = w.p + row * w.p_row;
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

// One run of strips for one panel.
template <class Op>
static void run_panel(const Call& call, const Work<Op>& w, Panel* panel, Strip* strips, int64_t count) {
    int64_t padded = (count + COLUMNS - 1) / COLUMNS * COLUMNS;
    if (padded % 2) padded++;
    for (int64_t i = count; i < padded; i++) {
        strips[i] = strips[count - 1];
        strips[i].bits = nullptr;
        strips[i].columns = 0;
    }
    Split groups = Split::of(panel->rows, ROWS);
    for (int64_t i = 0; i < padded; i += COLUMNS) {
        ScoreMode mode = call.modified ? MODIFIED : PLAIN;
        for (int64_t j = 0; j < COLUMNS; j++)
            if (mode == PLAIN && (strips[i + j].bits || strips[i + j].columns != 0xffff)) mode = MASKED;
        for (int64_t g = 0; g < groups.parts; g++) {
            int64_t row = Split::first_of(groups, g), rows = Split::first_of(groups, g + 1) - row;
            ScoreTile t = {strips + i, row, w.scores + row * w.score_row + i * STRIP, w.peak + row * STRIP, w.score_row,
                           i == 0, w.ramps + panel->first + row, w.bias};
            score_rows<Op>(rows, mode, call, w.q + (panel->first + row) * call.depth, t);
        }
    }
    float scale = call.modified ? 1.f : call.logit_scale;
    for (int64_t r = 0; r < panel->rows; r++)
        soften<Op>(w, r, padded * STRIP, scale, w.top + panel->first + r, w.total + panel->first + r);
    Split parts = Split::of(call.width / STRIP, COLUMNS);
    for (int64_t c = 0; c < parts.parts; c++) {
        int64_t column = Split::first_of(parts, c), n = Split::first_of(parts, c + 1) - column;
        for (int64_t g = 0; g < groups.parts; g++) {
            int64_t row = Split::first_of(groups, g), rows = Split::first_of(groups, g + 1) - row;
            float* acc = w.acc + (panel->first + row) * call.width + column * STRIP;
            weigh_rows<Op>(rows, n, w, call, strips, count, row, acc, column * STRIP, panel->started);
        }
    }
    panel->started = true;
}

static void write_row(const Call& call, const Task& task, int64_t row, const float* acc, float top, float total) {
    const SparsereelArgs& a = *call.args;
    int64_t token = task.block * call.block_q + task.row + row, size = a.dtype == SPARSEREEL_FLOAT32 ? 4 : 2;
    char* out = (char*)token_of(a.out, a.dtype, task.batch, task.head, token);
    // A row without keys has total 0: its output is 0. NaN totals pass through.
    V factor = set1(total == 0.f ? 0.f : 1.f / total);
    for (int64_t i = 0; i < a.v_dim; i += STRIP) {
        int64_t n = a.v_dim - i < STRIP ? a.v_dim - i : STRIP;
        store_as(out + i * size, a.dtype, n, total == 0.f ? zero() : mul(load(acc + i), factor));
    }
    constexpr float ln2 = 0.6931471805599453f;
    a.lse[(task.batch * a.heads + task.head) * a.q_len + token] =
        total == 0.f ? NONE : (top + __builtin_log2f(total)) * ln2;
}

template <class Op>
static void forward_task(const Call& call, const Task& task, char* scratch) {
    const SparsereelArgs& a = *call.args;
    Work<Op> w = carve<Op>(call, task.rows, &scratch);
    List list = list_of(call, task);
    if (call.bias) w.bias = call.bias + task.batch * call.bias_batch + task.head * call.bias_head;
    for (int64_t r = 0; r < task.rows; r++) {
        int64_t token = task.block * call.block_q + task.row + r;
        if (a.frame_of_q) w.ramps[r] = a.frame_of_q[token] < 0 ? call.ones : call.ramp - a.frame_of_q[token];
        fetch_token(a.q, a, task.batch, task.head, token + AHEAD, a.q_len, a.head_dim);
        copy_token<Op>(token_of(a.q, a.dtype, task.batch, task.head, token), a.dtype, a.head_dim, call.depth, w.q + r * call.depth);
        w.top[r] = NONE;
        w.total[r] = 0.f;
    }
    Split panels = Split::of(task.rows, ROWS * GROUPS);
    for (int64_t i = 0; i < panels.parts; i++) {
        int64_t first = Split::first_of(panels, i);
        w.panels[i] = {first, Split::first_of(panels, i + 1) - first, {0, 0}, false};
    }
    Strip strips[RUN + COLUMNS];
    for (bool more = true; more;) {
        more = false;
        for (int64_t i = 0; i < panels.parts; i++) {
            Panel* p = w.panels + i;
            int64_t n = next_strips(call, list, &p->at, task.row + p->first, p->rows, strips, RUN);
            if (!n) continue;
            run_panel<Op>(call, w, p, strips, n);
            more = true;
        }
    }
    for (int64_t r = 0; r < task.rows; r++) write_row(call, task, r, w.acc + r * call.width, w.top[r], w.total[r]);
}

template <class Op>
static size_t forward_bytes(const Call& call, int64_t rows) {
    char* end = nullptr;
    carve<Op>(call, rows, &end);
    return (size_t)end;
}
