// Gradients of one task. With p = exp(s - lse), dp = grad_out v^T and delta = sum(grad_out * out) - grad_lse:
//
//   ds = p (dp - delta)      dq = scale ds k      dk = scale ds^T q      dv = p^T grad_out      dbias = sum of ds
//
// One task owns its rows: queries sum over the keys they see, keys over the queries that see them. So nothing is
// added up between threads, and the same input gives the same bits.
#pragma once

// Rows of a panel. Sums of queries are loaded and stored for every panel of keys, so there are more of them in one.
template <class Op>
constexpr int64_t BACK_ROWS = Op::PAIR == 1 ? 24 : PANEL_ROWS;

// Packed columns: [0] meets the rows' q or k, [1] their grad_out or v; [2] and [3] are summed up.
template <class Op>
struct Backward {
    typename Op::Elem *first, *second;  // rows: q and grad_out, or k and v
    typename Op::Elem *weights, *grads; // p and ds of a panel
    typename Op::Elem* keys;            // k as rows of whole strips, where the gradient of queries is summed up as well
    float *scores, *dots, *factors, *peak, *sums, *more_sums, *bias_sums;
    const float** ramps;
    Panel* panels;

    Backward(const Call& call, int64_t rows, char** scratch) {
        first = take_rows<Op>(scratch, rows, call.packed[0].padded);
        second = take_rows<Op>(scratch, rows, call.packed[1].padded);
        scores = take_floats(scratch, BACK_ROWS<Op> * SCORE_ROW);
        dots = take_floats(scratch, BACK_ROWS<Op> * SCORE_ROW);
        weights = take_weights<Op>(scratch, scores);
        grads = take_weights<Op>(scratch, dots);
        factors = call.frame_of_row ? take_floats(scratch, BACK_ROWS<Op> * SCORE_ROW) : nullptr;
        peak = take_floats(scratch, BACK_ROWS<Op> * STRIP);
        sums = take_sums(scratch, rows, call.packed[2].padded);
        more_sums = call.operands > 3 ? take_sums(scratch, rows, call.packed[3].padded) : nullptr;
        bias_sums = take_floats(scratch, rows);
        keys = call.query_sums ? take_rows<Op>(scratch, rows, call.packed[2].padded) : nullptr;
        ramps = (const float**)take(scratch, rows * (int64_t)sizeof(float*));
        panels = take_panels(scratch, rows);
    }
};

// lse and delta of two neighbouring strips, for one row.
struct Statistics {
    V lse[2], delta[2];
};

// Turns a row of scores and dot products into weights and their gradients. For queries as rows the statistics are the
// row's own; for keys as rows they are the columns'.
template <class Op>
INLINE float blend(const Call& call, const Backward<Op>& w, int64_t row, const Strip* strips, int64_t count,
                   const float* lse, const float* delta, bool by_column) {
    const V scale = set1(pending_scale(call));
    Statistics own = {{set1(*lse), set1(*lse)}, {set1(*delta), set1(*delta)}};
    V total = zero();
    for (int64_t i = 0; i < count; i += 2) {
        V p[2], ds[2];
        UNROLL for (int j = 0; j < 2; j++) {
            const int64_t at = row * SCORE_ROW + (i + j) * STRIP, column = strips[i + j].index * STRIP;
            V shift = by_column ? load(lse + column) : own.lse[j], mean = by_column ? load(delta + column) : own.delta[j];
            p[j] = exp2_of<Op::DEGREE>(sub(mul(load(w.scores + at), scale), shift));
            ds[j] = mul(p[j], sub(load(w.dots + at), mean));
            total = add(total, ds[j]);
            if (w.factors) ds[j] = mul(ds[j], load(w.factors + at));
        }
        Op::keep_two(w.weights + row * WEIGHT_ROW<Op> + i * STRIP, p[0], p[1]);
        Op::keep_two(w.grads + row * WEIGHT_ROW<Op> + i * STRIP, ds[0], ds[1]);
    }
    return hsum(total);
}

// One run of strips for one panel; lse and delta begin at the panel's first row, or at column 0. `turns` and query_sums
// are the query head's, or null.
template <class Op>
static void backward_panel(const Call& call, const View& view, const Backward<Op>& w, Panel* panel, const float* bias,
                           const float* lse, const float* delta, Strip* strips, int64_t count, Turns* turns,
                           float* query_sums) {
    int64_t padded = pad_strips(strips, count), first = panel->first;
    bool keys = call.pass == KEY_GRADIENT;
    Scoring<Op> scores = {w.first + first * call.packed[0].padded, 0, w.scores, w.peak, SCORE_ROW, w.ramps + first,
                          keys ? nullptr : bias, keys && bias ? bias + first : nullptr, w.factors};
    score_panel<Op>(call, view, scores, score_mode(call), panel->rows, strips, padded);
    Scoring<Op> dots = {w.second + first * call.packed[1].padded, 1, w.dots, w.peak, SCORE_ROW, w.ramps, nullptr,
                        nullptr, nullptr};
    score_panel<Op>(call, view, dots, RAW, panel->rows, strips, padded);
    for (int64_t r = 0; r < panel->rows; r++) {
        int64_t own = keys ? 0 : first + r;
        w.bias_sums[first + r] += blend<Op>(call, w, r, strips, padded, lse + own, delta + own, keys);
    }
    Weighing<Op> grads = {w.grads, WEIGHT_ROW<Op>, 2, w.sums + first * call.packed[2].padded, nullptr, panel->started};
    weigh_panel<Op>(call, view, grads, panel->rows, strips, count);
    if (keys) {
        Weighing<Op> weights = {w.weights, WEIGHT_ROW<Op>, 3, w.more_sums + first * call.packed[3].padded, nullptr,
                                panel->started};
        weigh_panel<Op>(call, view, weights, panel->rows, strips, count);
    }
    if constexpr (Op::PAIR == 1) {
        if (query_sums) {
            const int64_t padded_dim = call.packed[2].padded;
            reach(call, view, turns, panel->at.strip ? panel->at.block + 1 : panel->at.block);
            spread_panel(w.grads, WEIGHT_ROW<Op>, w.keys + first * padded_dim, padded_dim, panel->rows, strips, count,
                         query_sums);
        }
    }
    panel->started = true;
}

// All columns of one query head that the rows see.
template <class Op>
static void backward_head(const Call& call, const Task& task, const Backward<Op>& w, int64_t panels, int64_t query_head) {
    const SparsereelArgs& a = *call.args;
    bool keys = call.pass == KEY_GRADIENT;
    int64_t group = a.heads / a.kv_heads, block_positions = call.strips_per_block * STRIP;
    View view = view_of(call, task.batch, query_head, keys ? query_head : query_head / group, task.block);
    int64_t statistics = (task.batch * a.heads + query_head) * call.query_positions;
    const float* bias = call.bias ? call.bias + task.batch * call.bias_batch + query_head * call.bias_head : nullptr;
    if (keys) {
        if (bias) bias += task.block * ((call.row_block + STRIP - 1) / STRIP * STRIP) + task.row;
    } else {
        block_positions = (call.row_block + STRIP - 1) / STRIP * STRIP;
        statistics += task.block * block_positions + task.row;
    }
    Strip strips[RUN + COLUMNS];
    const int64_t run = run_length(call);
    Turns turns = turns_of(call, task, query_head);
    float* query_sums = call.query_sums ? query_sums_of(call, task.batch, query_head) : nullptr;
    for (int64_t i = 0; i < panels; i++) w.panels[i].at = {0, 0};
    for (bool more = true; more;) {
        more = false;
        int64_t least = view.end;  // entries that all panels are done with
        for (int64_t i = 0; i < panels; i++) {
            Panel* p = w.panels + i;
            int64_t n = next_strips(call, view, &p->at, task.row + p->first, p->rows, strips, run);
            least = Split::smaller(least, p->at.block);
            if (!n) continue;
            backward_panel<Op>(call, view, w, p, bias, call.lse + statistics, call.delta + statistics, strips, n, &turns,
                               query_sums);
            more = true;
        }
        if (!query_sums) continue;
        // Also of what was left out: its share is nothing, but those behind count it.
        if (!more) reach(call, view, &turns, view.end);
        pass_on(call, view, &turns, Split::smaller(least, turns.reached));
    }
}

template <class Op>
static void write_gradient(const SparsereelArgs& a, const SparsereelView& to, const Task& task, int64_t token,
                           int64_t features, const Backward<Op>& w, int64_t panels, const float* sums, int64_t padded,
                           float scale) {
    for (int64_t i = 0; i < panels; i++)
        for (int64_t r = w.panels[i].first; r < w.panels[i].first + w.panels[i].rows; r++)
            write_row(token_of(to, a.dtype, task.batch, task.head, token + r), a.dtype, features, sums + r * padded,
                      w.panels[i].started, scale);
}

template <class Op>
static void query_gradient(const Call& call, const Task& task, char* scratch) {
    const SparsereelArgs& a = *call.args;
    Backward<Op> w(call, task.rows, &scratch);
    int64_t token = task.block * call.row_block + task.row, panels = start_panels(w.panels, task.rows, 0, BACK_ROWS<Op>);
    copy_rows<Op>(a.q, a.dtype, task.batch, task.head, token, task.rows, a.head_dim, call.packed[0].padded, w.first);
    copy_rows<Op>(a.grad_out, a.dtype, task.batch, task.head, token, task.rows, a.v_dim, call.packed[1].padded, w.second);
    set_ramps(call, token, task.rows, w.ramps);
    for (int64_t r = 0; r < task.rows; r++) w.bias_sums[r] = 0.f;
    backward_head<Op>(call, task, w, panels, task.head);
    write_gradient<Op>(a, a.grad_q, task, token, a.head_dim, w, panels, w.sums, call.packed[2].padded, (float)a.scale);
}

template <class Op>
static void key_gradient(const Call& call, const Task& task, char* scratch) {
    const SparsereelArgs& a = *call.args;
    Backward<Op> w(call, task.rows, &scratch);
    int64_t token = task.block * call.row_block + task.row, group = a.heads / a.kv_heads;
    // Keys past the length have no gradient.
    int64_t limit = key_limit(a, task.batch) - token, live = limit < 0 ? 0 : limit < task.rows ? limit : task.rows;
    int64_t panels = start_panels(w.panels, live, 0, BACK_ROWS<Op>);
    copy_rows<Op>(a.k, a.dtype, task.batch, task.head, token, live, a.head_dim, call.packed[0].padded, w.first);
    copy_rows<Op>(a.v, a.dtype, task.batch, task.head, token, live, a.v_dim, call.packed[1].padded, w.second);
    if (w.keys) copy_rows<Op>(a.k, a.dtype, task.batch, task.head, token, live, a.head_dim, call.packed[2].padded, w.keys);
    set_ramps(call, token, live, w.ramps);
    for (int64_t h = task.head * group; h < (task.head + 1) * group; h++) {
        for (int64_t r = 0; r < task.rows; r++) w.bias_sums[r] = 0.f;
        backward_head<Op>(call, task, w, panels, h);
        if (!a.grad_bias) continue;
        float* to = a.grad_bias + (task.batch * a.heads + h) * a.kv_len + token;
        for (int64_t r = 0; r < task.rows; r++) to[r] = w.bias_sums[r];
    }
    write_gradient<Op>(a, a.grad_k, task, token, a.head_dim, w, panels, w.sums, call.packed[2].padded, (float)a.scale);
    write_gradient<Op>(a, a.grad_v, task, token, a.v_dim, w, panels, w.more_sums, call.packed[3].padded, 1.f);
    for (int64_t r = live; r < task.rows; r++) {
        write_row(token_of(a.grad_k, a.dtype, task.batch, task.head, token + r), a.dtype, a.head_dim, nullptr, false, 0.f);
        write_row(token_of(a.grad_v, a.dtype, task.batch, task.head, token + r), a.dtype, a.v_dim, nullptr, false, 0.f);
    }
}

static void finish(const Call& call, int64_t batch, int64_t head, int64_t block, int64_t place) {
    const SparsereelArgs& a = *call.args;
    const int64_t padded = call.packed[2].padded, first = block * call.column_block;
    const int64_t rows = Split::smaller(call.column_block, a.q_len - first);
    const float* sums = call.query_sums + place * call.strips_per_block * STRIP * padded;
    for (int64_t r = 0; r < rows; r++)
        write_row(token_of(a.grad_q, a.dtype, batch, head, first + r), a.dtype, a.head_dim, sums + r * padded, true,
                  (float)a.scale);
}

// lse and delta of the queries [first, last), by position.
static void measure(const Call& call, int64_t batch, int64_t head, int64_t first, int64_t last) {
    const SparsereelArgs& a = *call.args;
    constexpr float log2_e = 1.4426950408889634f;
    int64_t block = call.pass == KEY_GRADIENT ? call.column_block : call.row_block;
    int64_t positions = (block + STRIP - 1) / STRIP * STRIP, size = size_of(a.dtype);
    for (int64_t t = first; t < last; t++) {
        const char *grad = token_of(a.grad_out, a.dtype, batch, head, t), *out = token_of(a.out, a.dtype, batch, head, t);
        V sum = zero();
        for (int64_t i = 0; i < a.v_dim; i += STRIP) {
            int64_t n = a.v_dim - i < STRIP ? a.v_dim - i : STRIP;
            sum = fma(load_as(grad + i * size, a.dtype, n), load_as(out + i * size, a.dtype, n), sum);
        }
        int64_t row = (batch * a.heads + head) * a.q_len + t;
        int64_t at = (batch * a.heads + head) * call.query_positions + t / block * positions + t % block;
        // exp2(s - inf) is 0: queries without keys pass nothing on.
        call.lse[at] = a.lse[row] == NONE ? -NONE : a.lse[row] * log2_e;
        call.delta[at] = hsum(sum) - (a.grad_lse ? a.grad_lse[row] : 0.f);
    }
}
