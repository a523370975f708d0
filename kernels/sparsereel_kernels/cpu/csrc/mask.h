// The block lists of a call: checked, turned around for the gradients of keys, and what they visit at all.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "unit.h"

namespace sparsereel {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Mask {
  public:
    Mask(const SparsereelArgs& a, const Pool& pool) : a_(a) {
        if (!a.has_mask) return;
        query_blocks_ = ceil_div(a.q_len, a.block_q);
        key_blocks_ = ceil_div(a.kv_len, a.block_k);
        seen_.assign((size_t)(heads() * key_blocks_), 0);
        std::atomic<bool> bad{false};
        pool.run(heads(), [&](const Jobs& next) {
            for (int64_t i = next(); i >= 0; i = next())
                if (!check(i)) bad = true;
        });
        if (bad) throw Failure{SPARSEREEL_BAD_INDEX};
    }

    Lists by_query() const {
        return {a_.full_count, a_.full_index, a_.partial_count, a_.partial_index, a_.partial_tile,
                nullptr,       nullptr,       a_.max_full,      a_.max_partial,      nullptr,         nullptr};
    }

    // Number of the mask's head for a sample and a query head.
    int64_t head_of(int64_t batch, int64_t head) const {
        return (a_.mask_batch == 1 ? 0 : batch) * a_.mask_heads + (a_.mask_heads == 1 ? 0 : head);
    }
    int64_t query_cost(int64_t batch, int64_t head, int64_t block) const {
        int64_t row = head_of(batch, head) * query_blocks_ + block;
        return a_.full_count[row] + a_.partial_count[row];
    }
    bool key_seen(int64_t batch, int64_t head, int64_t block) const {
        return seen_[(size_t)(head_of(batch, head) * key_blocks_ + block)];
    }

    // The same lists by key block; call `turn` first.
    Lists by_key() const {
        return {full_.count.data(),    full_.index.data(),     partial_.count.data(), partial_.index.data(),
                partial_.tile.data(), full_.start.data(),      partial_.start.data(), 0, 0,
                full_.rank.data(),    partial_.rank.data()};
    }
    int64_t key_cost(int64_t batch, int64_t head, int64_t block) const {
        size_t row = (size_t)(head_of(batch, head) * key_blocks_ + block);
        return full_.count[row] + partial_.count[row];
    }
    void turn(const Pool& pool) {
        turn(pool, a_.full_count, a_.full_index, nullptr, a_.max_full, &full_);
        turn(pool, a_.partial_count, a_.partial_index, a_.partial_tile, a_.max_partial, &partial_);
    }

    // How often a query block was named by the key blocks before, for every entry of the turned lists.
    void rank(const Pool& pool) {
        full_.rank.resize(full_.index.size());
        partial_.rank.resize(partial_.index.size());
        pool.run(heads(), [&](const Jobs& next) {
            std::vector<int32_t> named((size_t)query_blocks_);
            for (int64_t i = next(); i >= 0; i = next()) {
                std::fill(named.begin(), named.end(), 0);
                for (int64_t row = i * key_blocks_; row < (i + 1) * key_blocks_; row++) {
                    for (Turned* lists : {&full_, &partial_})
                        for (int64_t e = lists->start[row]; e < lists->start[row + 1]; e++)
                            lists->rank[e] = named[(size_t)lists->index[e]];
                    for (Turned* lists : {&full_, &partial_})
                        for (int64_t e = lists->start[row]; e < lists->start[row + 1]; e++)
                            named[(size_t)lists->index[e]]++;
                }
            }
        });
    }

    // Bits with rows of a multiple of 8 bytes, so that four strips are read as one word.
    const uint8_t* query_bits(int64_t* row_bytes) {
        int64_t row = a_.block_k / 8;
        *row_bytes = ceil_div(row, 8) * 8;
        if (*row_bytes == row) return a_.partial_bits;
        query_bits_.assign((size_t)(a_.tiles * a_.block_q * *row_bytes), 0);
        for (int64_t r = 0; r < a_.tiles * a_.block_q; r++)
            std::memcpy(query_bits_.data() + r * *row_bytes, a_.partial_bits + r * row, (size_t)row);
        return query_bits_.data();
    }

    // The same tiles with keys as rows.
    const uint8_t* key_bits(int64_t* row_bytes, const Pool& pool) {
        *row_bytes = ceil_div(a_.block_q, 64) * 8;
        int64_t from_bytes = a_.block_q * (a_.block_k / 8), to_bytes = a_.block_k * *row_bytes;
        key_bits_.assign((size_t)(a_.tiles * to_bytes), 0);
        pool.run(a_.tiles, [&](const Jobs& next) {
            for (int64_t u = next(); u >= 0; u = next())
                turn_tile(a_.partial_bits + u * from_bytes, key_bits_.data() + u * to_bytes, *row_bytes);
        });
        return key_bits_.data();
    }

  private:
    struct Turned {
        std::vector<int32_t> count, index, tile, rank;
        std::vector<int64_t> start;
    };

    int64_t heads() const { return a_.mask_batch * a_.mask_heads; }

    bool check(int64_t head) {
        uint8_t* seen = seen_.data() + head * key_blocks_;
        for (int64_t row = head * query_blocks_; row < (head + 1) * query_blocks_; row++) {
            if (!check_row(seen, a_.full_count[row], a_.max_full, a_.full_index + row * a_.max_full)) return false;
            if (!check_row(seen, a_.partial_count[row], a_.max_partial, a_.partial_index + row * a_.max_partial))
                return false;
            const int32_t* tile = a_.partial_tile + row * a_.max_partial;
            for (int64_t e = 0; e < a_.partial_count[row]; e++)
                if (tile[e] < 0 || tile[e] >= a_.tiles) return false;
        }
        return true;
    }
    bool check_row(uint8_t* seen, int64_t count, int64_t most, const int32_t* index) const {
        if (count < 0 || count > most) return false;
        for (int64_t e = 0; e < count; e++) {
            if (index[e] < 0 || index[e] >= key_blocks_) return false;
            seen[index[e]] = 1;
        }
        return true;
    }

    void turn(const Pool& pool, const int32_t* count, const int32_t* index, const int32_t* tile, int64_t most,
              Turned* to) const {
        size_t rows = (size_t)(heads() * key_blocks_);
        to->count.assign(rows, 0);
        to->start.assign(rows + 1, 0);
        auto each = [&](int64_t head, auto&& visit) {
            for (int64_t q = 0; q < query_blocks_; q++) {
                int64_t row = head * query_blocks_ + q;
                for (int64_t e = 0; e < count[row]; e++)
                    visit(q, (size_t)(head * key_blocks_ + index[row * most + e]), row * most + e);
            }
        };
        auto all_heads = [&](auto&& work) {
            pool.run(heads(), [&](const Jobs& next) {
                for (int64_t i = next(); i >= 0; i = next()) work(i);
            });
        };
        all_heads([&](int64_t head) { each(head, [&](int64_t, size_t row, int64_t) { to->count[row]++; }); });
        for (size_t i = 0; i < rows; i++) to->start[i + 1] = to->start[i] + to->count[i];
        to->index.resize((size_t)to->start[rows]);
        to->tile.resize(tile ? to->index.size() : 0);
        std::vector<int64_t> at(to->start.begin(), to->start.end() - 1);
        all_heads([&](int64_t head) {
            each(head, [&](int64_t q, size_t row, int64_t entry) {
                size_t place = (size_t)at[row]++;
                to->index[place] = (int32_t)q;
                if (tile) to->tile[place] = tile[entry];
            });
        });
    }

    void turn_tile(const uint8_t* from, uint8_t* to, int64_t row_bytes) const {
        for (int64_t r = 0; r < a_.block_q; r++)
            for (int64_t c = 0; c < a_.block_k; c++)
                if (from[r * (a_.block_k / 8) + c / 8] >> (c % 8) & 1)
                    to[c * row_bytes + r / 8] = (uint8_t)(to[c * row_bytes + r / 8] | 1 << (r % 8));
    }

    const SparsereelArgs& a_;
    int64_t query_blocks_ = 0, key_blocks_ = 0;
    std::vector<uint8_t> seen_, query_bits_, key_bits_;
    Turned full_, partial_;
};

}  // namespace sparsereel
