// A pass with everything derived from the arguments; owns the small tables that the kernels read.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "mask.h"

namespace sparsereel {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int64_t MAX_FRAMES = int64_t(1) << 26;  // largest frame number that FrameDecay takes
constexpr int64_t DENSE_BLOCK_Q = 128, DENSE_BLOCK_K = 64;

inline bool uses_pairs(const SparsereelArgs& a, const Unit& unit) { return unit.pairs && a.dtype == SPARSEREEL_BFLOAT16; }

class Prepared {
  public:
    Call call{};

    Prepared(const SparsereelArgs& a, const Unit& unit, Pass pass, Mask* mask, const Pool& pool)
        : depth_step_(unit.depth_step) {
        call.args = &a;
        call.pass = pass;
        call.pairs = uses_pairs(a, unit);
        call.logit_scale = (float)(a.scale * (double)LOG2_E);
        call.modified = a.bias || a.frame_of_q || !(a.scale > 0);
        call.has_mask = a.has_mask;
        set_sizes();
        if (a.has_mask) set_mask(mask, pool);
        set_operands();
        if (a.bias) set_bias();
        if (a.frame_of_q) set_frames();
    }

    bool keys_are_rows() const { return call.pass == KEY_GRADIENT; }
    int64_t strips() const { return call.column_blocks * call.strips_per_block; }

    // Sums the gradient of queries up in the pass over keys, which comes alone then.
    void fuse() { fused_ = true; }
    bool fused() const { return fused_; }

    // Of one head of the column side.
    int64_t head_bytes() const {
        int64_t bytes = 0;
        for (int64_t o = 0; o < call.operands; o++) bytes += call.packed[o].bytes;
        return bytes * strips() + (fused_ ? sums_bytes() : 0);
    }

    // Points the operands, and the sums of queries, at memory for `heads` heads.
    void place(char* memory, int64_t heads) {
        for (int64_t o = 0; o < call.operands; o++) {
            call.packed[o].data = memory;
            memory += heads * strips() * call.packed[o].bytes;
        }
        if (!fused_) return;
        call.query_sums = (float*)memory;
        turns_.resize((size_t)(heads * call.column_blocks));
        call.turns = turns_.data();
    }

    // Nothing has been added to the sums of query block number `place` of the wave.
    void clear(int64_t place) {
        const int64_t bytes = sums_bytes() / call.column_blocks;
        std::memset((char*)call.query_sums + place * bytes, 0, (size_t)bytes);
        turns_[(size_t)place] = 0;
    }

  private:
    int64_t sums_bytes() const { return strips() * STRIP * call.packed[2].padded * 4; }

    void set_sizes() {
        const SparsereelArgs& a = *call.args;
        int64_t block_q = a.has_mask ? a.block_q : DENSE_BLOCK_Q, block_k = a.has_mask ? a.block_k : DENSE_BLOCK_K;
        bool keys = keys_are_rows();
        call.row_len = keys ? a.kv_len : a.q_len;
        call.row_block = keys ? block_k : block_q;
        call.column_len = keys ? a.q_len : a.kv_len;
        call.column_block = keys ? block_q : block_k;
        call.column_heads = keys ? a.heads : a.kv_heads;
        call.row_blocks = ceil_div(call.row_len, call.row_block);
        call.column_blocks = ceil_div(call.column_len, call.column_block);
        call.strips_per_block = ceil_div(call.column_block, STRIP);
        call.query_positions = ceil_div(a.q_len, block_q) * ceil_div(block_q, STRIP) * STRIP;
    }

    void set_mask(Mask* mask, const Pool& pool) {
        call.lists = keys_are_rows() ? mask->by_key() : mask->by_query();
        call.bits = keys_are_rows() ? mask->key_bits(&call.bits_row, pool) : mask->query_bits(&call.bits_row);
    }

    void add_operand(const SparsereelView& view, int64_t features, bool transposed) {
        int64_t size = call.pairs ? 2 : 4, step = !transposed ? STRIP : call.pairs ? depth_step_ : 1;
        int64_t padded = ceil_div(features, step) * step;
        call.packed[call.operands++] = {view, features, transposed, padded, padded * STRIP * size, nullptr};
    }

    void set_operands() {
        const SparsereelArgs& a = *call.args;
        if (call.pass == FORWARD) {
            add_operand(a.k, a.head_dim, true);
            add_operand(a.v, a.v_dim, false);
        } else if (call.pass == QUERY_GRADIENT) {
            add_operand(a.k, a.head_dim, true);
            add_operand(a.v, a.v_dim, true);
            add_operand(a.k, a.head_dim, false);
        } else {
            add_operand(a.q, a.head_dim, true);
            add_operand(a.grad_out, a.v_dim, true);
            add_operand(a.q, a.head_dim, false);
            add_operand(a.grad_out, a.v_dim, false);
        }
    }

    // Token at a column position, or -1 where the strip has no such column.
    int64_t column_token(int64_t position) const {
        int64_t width = call.strips_per_block * STRIP, inside = position % width;
        int64_t t = position / width * call.column_block + inside;
        return inside < call.column_block && t < call.column_len ? t : -1;
    }

    void set_bias() {
        const SparsereelArgs& a = *call.args;
        int64_t block = keys_are_rows() ? call.row_block : call.column_block;
        int64_t width = ceil_div(block, STRIP) * STRIP, positions = ceil_div(a.kv_len, block) * width;
        int64_t heads = a.bias_head ? a.heads : 1, batch = a.bias_batch ? a.batch : 1;
        bias_.assign((size_t)(batch * heads * positions), 0.f);
        for (int64_t b = 0; b < batch; b++)
            for (int64_t h = 0; h < heads; h++) {
                const float* from = a.bias + b * a.bias_batch + h * a.bias_head;
                float* to = bias_.data() + (b * heads + h) * positions;
                for (int64_t t = 0; t < a.kv_len; t++) to[t / block * width + t % block] = from[t] * LOG2_E;
            }
        call.bias = bias_.data();
        call.bias_head = heads > 1 ? positions : 0;
        call.bias_batch = batch > 1 ? heads * positions : 0;
    }

    // Factors by signed distance, one entry for each distance that may occur, so that the kernels need no bounds.
    void set_ramp(const int32_t* rows, const int32_t* columns) {
        const SparsereelArgs& a = *call.args;
        int64_t back = 0, ahead = 0;
        for (int64_t i = 0; i < call.row_len; i++) back = std::max<int64_t>(back, rows[i]);
        for (int64_t i = 0; i < call.column_len; i++) ahead = std::max<int64_t>(ahead, columns[i]);
        // A strip of consecutive frames is read to its end, also where the sequence ends inside it.
        ahead += STRIP;
        if (back + ahead > MAX_FRAMES) throw Failure{SPARSEREEL_BAD_SIZE};
        ramp_.resize((size_t)(back + ahead + 1));
        for (int64_t d = -back; d <= ahead; d++)
            ramp_[(size_t)(d + back)] = a.decay[std::min(std::abs(d), a.decay_size - 1)];
        call.damping = true;
        for (int64_t d = 0; d < a.decay_size; d++) call.damping = call.damping && a.decay[d] >= 0.f && a.decay[d] <= 1.f;
        ramp_ones_.assign(ramp_.size(), 0);
        int32_t run = 0;
        for (size_t i = ramp_.size(); i-- > 0;) {
            run = ramp_[i] == 1.f ? std::min<int32_t>(run + 1, STRIP) : 0;
            ramp_ones_[i] = run;
        }
        call.ramp_ones = ramp_ones_.data() + back;
        ones_.assign((size_t)(ahead + 1), 1.f);
        call.ramp = ramp_.data() + back;
        call.ones = ones_.data();
    }

    void set_frames() {
        const SparsereelArgs& a = *call.args;
        const int32_t* columns = keys_are_rows() ? a.frame_of_q : a.frame_of_k;
        call.frame_of_row = keys_are_rows() ? a.frame_of_k : a.frame_of_q;
        set_ramp(call.frame_of_row, columns);
        frames_.assign((size_t)(strips() * STRIP), -1);
        kinds_.assign((size_t)strips(), FRAME_EXEMPT);
        for (int64_t s = 0; s < strips(); s++) {
            int32_t* f = frames_.data() + s * STRIP;
            bool exempt = true, same = true, rising = true;
            // Columns that do not exist fit any pattern: they are masked in any case.
            for (int64_t c = 0; c < STRIP; c++) {
                int64_t t = column_token(s * STRIP + c);
                if (t < 0) continue;
                f[c] = std::max(columns[t], -1);
                exempt &= f[c] < 0;
                same &= f[c] == f[0];
                rising &= f[0] >= 0 && f[c] == f[0] + (int32_t)c;
            }
            kinds_[(size_t)s] = exempt ? FRAME_EXEMPT : same ? FRAME_UNIFORM : rising ? FRAME_CONSECUTIVE : FRAME_MIXED;
        }
        call.frame_of_column = frames_.data();
        call.frame_kind = kinds_.data();
    }

    int64_t depth_step_;
    std::vector<uint8_t> kinds_;
    std::vector<float> bias_, ramp_, ones_;
    std::vector<int32_t> ramp_ones_;
    std::vector<int32_t> frames_;
    bool fused_ = false;
    std::vector<int32_t> turns_;
};

}  // namespace sparsereel
