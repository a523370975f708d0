// Scores that need more than the plain scale: FrameDecay, KeyBias, or a scale that is not positive.
#pragma once

// Factors of frame distance for one strip, seen from a query of frame `frame`.
INLINE V decay_of(const Call& call, int64_t strip, int32_t frame) {
    if (frame < 0) return set1(1.f);
    const int32_t* keys = call.frame_of_k + strip * STRIP;
    int64_t reach = call.args->decay_size + STRIP - 1;
    if (call.frame_kind[strip] != FRAME_MIXED) {
        if (keys[0] < 0) return set1(1.f);
        int64_t d = (int64_t)keys[0] - frame;
        if (call.frame_kind[strip] == FRAME_CONSECUTIVE) {
            d = d < -reach ? -reach : d > call.args->decay_size ? call.args->decay_size : d;
            return load(call.ramp + d);
        }
        return set1(call.ramp[d < -reach ? -reach : d > reach ? reach : d]);
    }
    float lanes[STRIP];
    for (int64_t i = 0; i < STRIP; i++) {
        int64_t d = (int64_t)keys[i] - frame;
        lanes[i] = keys[i] < 0 ? 1.f : call.ramp[d < -reach ? -reach : d > reach ? reach : d];
    }
    return load(lanes);
}

// Rescales a tile of raw products in place and takes the row maxima. `row` counts from the task's first row.
static void modify(const Call& call, const Task& task, int64_t row, int64_t rows, const ScoreTile& t) {
    const SparsereelArgs& a = *call.args;
    const V scale = set1(call.logit_scale), none = set1(NONE);
    const float* bias = call.bias;
    if (bias) bias += task.batch * call.bias_batch + task.head * call.bias_head;
    for (int j = 0; j < COLUMNS; j++) {
        const Strip& s = t.strips[j];
        const uint8_t* bits = s.bits ? s.bits + t.row * t.bits_row : (const uint8_t*)&s.columns;
        int64_t step = s.bits ? t.bits_row : 0;
        int32_t frame = -2;
        V factor = set1(1.f), offset = bias ? load(bias + s.index * STRIP) : zero();
        for (int64_t r = 0; r < rows; r++) {
            float* at = t.scores + r * t.score_row + j * STRIP;
            V x = mul(load(at), scale);
            if (a.frame_of_q) {
                int32_t mine = a.frame_of_q[task.block * call.block_q + task.row + row + r];
                if (mine != frame) factor = decay_of(call, s.index, frame = mine);
                x = scale_positive(x, factor);
            }
            uint16_t word;
            __builtin_memcpy(&word, bits + r * step, 2);
            x = keep(word & s.columns, add(x, offset), none);
            store(at, x);
            float* peak = t.peak + r * STRIP;
            store(peak, j == 0 && t.first ? x : maximum(load(peak), x));
        }
    }
}
