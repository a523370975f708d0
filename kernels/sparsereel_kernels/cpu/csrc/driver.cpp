// Entry points: prepares a pass, packs what it visits, and hands tasks to the unit for this processor.
//
// Compiled for the base instruction set. Heads are worked through in waves, so that the packed copies stay small and
// warm whatever the number of heads.
#include <algorithm>
#include <new>
#include <string>
#include <vector>

#include "isa.h"
#include "prepare.h"

namespace sparsereel {
namespace {

constexpr int64_t TASK_ROWS = 192;  // larger blocks of rows are cut
// Packed operands at a time, unless one head needs more. Many threads need many tasks a wave.
constexpr int64_t WAVE_BYTES = int64_t(8) << 20, WAVE_BYTES_A_THREAD = int64_t(4) << 20;
// The same where one pass makes all gradients, at most, to give every thread a head.
constexpr int64_t FUSED_BYTES = int64_t(1) << 30;
constexpr int64_t MEASURED_ROWS = 256;
// A call of few tasks (few queries, many keys) is cut along the keys as well, to give every thread something to do. The
// rule looks at sizes only, never at the number of threads, so that results do not depend on it.
constexpr int64_t FEW_TASKS = 32, ENOUGH_TASKS = 64, PIECE_KEYS = 1024;

void check_sizes(const SparsereelArgs& a) {
    auto within = [](int64_t x, int64_t low, int64_t high) { return low <= x && x <= high; };
    bool good = a.batch >= 0 && a.heads >= 1 && a.kv_heads >= 1 && a.heads % a.kv_heads == 0 && a.q_len >= 0 &&
                a.kv_len >= 0 && within(a.head_dim, 1, MAX_DIM) && within(a.v_dim, 1, MAX_DIM) && within(a.dtype, 0, 2);
    if (a.has_mask) {
        good = good && a.block_q >= 1 && a.block_k >= 8 && a.block_k % 8 == 0;
        good = good && (a.mask_batch == 1 || a.mask_batch == a.batch) && (a.mask_heads == 1 || a.mask_heads == a.heads);
    }
    good = good && (!a.frame_of_q || a.decay_size >= 1);
    if (!good) throw Failure{SPARSEREEL_BAD_SIZE};
}

// One pass over all heads.
class Runner {
  public:
    Runner(Prepared& prepared, const Unit& unit, const Mask& mask, const Pool& pool)
        : prepared_(prepared), call_(prepared.call), a_(*prepared.call.args), unit_(unit), mask_(mask), pool_(pool),
          group_(a_.heads / a_.kv_heads) {}

    void run() {
        call_.part_rows = ceil_div(call_.row_block, ceil_div(call_.row_block, TASK_ROWS));
        int64_t heads = a_.batch * a_.kv_heads, packed = prepared_.keys_are_rows() ? group_ : 1;
        int64_t wave_bytes = std::max(WAVE_BYTES, a_.threads * WAVE_BYTES_A_THREAD);
        int64_t head_bytes = std::max<int64_t>(1, packed * prepared_.head_bytes());
        int64_t wave = std::max<int64_t>(1, std::min(heads, wave_bytes / head_bytes));
        if (prepared_.fused()) {
            // Tasks of one head wait for each other, so every thread should find a head of its own.
            int64_t own = std::min(a_.threads, std::max<int64_t>(1, FUSED_BYTES / head_bytes));
            wave = std::max(wave, std::min(heads, own));
        }
        Workspace space((size_t)(wave * head_bytes));
        prepared_.place(space.data(), wave * packed);
        size_t scratch_bytes = unit_.scratch_bytes(call_, std::min(call_.row_block, TASK_ROWS));
        for (int64_t first = 0; first < heads; first += wave) {
            int64_t last = std::min(heads, first + wave);
            call_.wave_first = first * packed;
            pack(first * packed, last * packed);
            std::vector<Task> whole = tasks(first, last);
            Pieces pieces = cut(whole);
            execute(pieces.count.empty() ? whole : pieces.tasks, scratch_bytes);
            merge(pieces);
            if (prepared_.fused()) finish(first * packed, last * packed);
        }
    }

  private:
    bool needed(int64_t batch, int64_t column_head, int64_t block) const {
        if (!a_.has_mask) return true;
        if (prepared_.keys_are_rows()) return mask_.query_cost(batch, column_head, block) > 0;
        for (int64_t h = column_head * group_; h < (column_head + 1) * group_; h++)
            if (mask_.key_seen(batch, h, block)) return true;
        return false;
    }

    void pack(int64_t first, int64_t last) const {
        pool_.run((last - first) * call_.column_blocks, [&](const Jobs& next) {
            for (int64_t i = next(); i >= 0; i = next()) {
                int64_t head = first + i / call_.column_blocks, block = i % call_.column_blocks;
                int64_t b = head / call_.column_heads, h = head % call_.column_heads;
                if (needed(b, h, block)) unit_.pack(call_, b, h, block, i);
                if (prepared_.fused()) prepared_.clear(i);
            }
        });
    }

    void finish(int64_t first, int64_t last) const {
        pool_.run((last - first) * call_.column_blocks, [&](const Jobs& next) {
            for (int64_t i = next(); i >= 0; i = next()) {
                int64_t head = first + i / call_.column_blocks;
                unit_.finish(call_, head / a_.heads, head % a_.heads, i % call_.column_blocks, i);
            }
        });
    }

    // Column blocks that a block of rows visits.
    int64_t cost(int64_t batch, int64_t head, int64_t block) const {
        if (!a_.has_mask) return call_.column_blocks;
        if (!prepared_.keys_are_rows()) return mask_.query_cost(batch, head, block);
        int64_t sum = 0;
        for (int64_t h = head * group_; h < (head + 1) * group_; h++) sum += mask_.key_cost(batch, h, block);
        return sum;
    }

    // Tasks of the kv heads [first, last), dear ones first. Tasks of like cost keep their order: neighbours share keys.
    // Tasks that add to shared sums come in the order in which they add.
    std::vector<Task> tasks(int64_t first, int64_t last) const {
        const int64_t part = call_.part_rows;
        int64_t heads = prepared_.keys_are_rows() ? 1 : group_, rows = (last - first) * heads;
        const bool fused = prepared_.fused();
        std::vector<std::pair<int, Task>> sorted;
        for (int64_t n = 0; n < rows * call_.row_blocks; n++) {
            // Block by block where tasks of one head wait for each other, so that threads find other heads.
            int64_t i = first * heads + (fused ? n % rows : n / call_.row_blocks);
            int64_t block = fused ? n / rows : n % call_.row_blocks;
            int64_t b = i / (a_.kv_heads * heads), h = i % (a_.kv_heads * heads);
            int level = 0;
            const int64_t entries = cost(b, h, block);
            for (int64_t rest = fused ? 0 : entries; rest; rest >>= 1) level++;
            int64_t end = std::min(call_.row_block, call_.row_len - block * call_.row_block);
            for (int64_t row = 0; row < end; row += part)
                sorted.push_back({-level, {(int32_t)b, (int32_t)h, block, row, std::min(part, end - row), 0, entries}});
        }
        std::stable_sort(sorted.begin(), sorted.end(), [](const auto& x, const auto& y) { return x.first < y.first; });
        std::vector<Task> result;
        result.reserve(sorted.size());
        for (const auto& entry : sorted) result.push_back(entry.second);
        return result;
    }

    // Tasks cut along the columns: pieces of one task are neighbours, count[i] of them for the i-th.
    struct Pieces {
        std::vector<Task> tasks;
        std::vector<int64_t> count;
        std::vector<float> memory;
    };

    Pieces cut(const std::vector<Task>& whole) const {
        Pieces pieces;
        int64_t all = a_.batch * a_.heads * call_.row_blocks, least = ceil_div(PIECE_KEYS, call_.column_block);
        if (call_.pass != FORWARD || all >= FEW_TASKS || whole.empty()) return pieces;
        int64_t floats = 0, width = call_.packed[1].padded + 2;
        for (const Task& task : whole) {
            int64_t entries = task.end - task.entry;
            int64_t count = std::max<int64_t>(1, std::min(entries / least, ceil_div(ENOUGH_TASKS, all)));
            pieces.count.push_back(count);
            for (int64_t i = 0; i < count; i++) {
                Task piece = task;
                piece.entry = entries * i / count;
                piece.end = entries * (i + 1) / count;
                pieces.tasks.push_back(piece);
                floats += task.rows * width;
            }
        }
        if (pieces.tasks.size() == whole.size()) return Pieces();
        pieces.memory.resize((size_t)floats);
        float* memory = pieces.memory.data();
        for (Task& piece : pieces.tasks) {
            piece.piece = memory;
            memory += piece.rows * width;
        }
        return pieces;
    }

    void merge(const Pieces& pieces) const {
        std::vector<int64_t> first;
        int64_t next_first = 0;
        for (int64_t count : pieces.count) {
            first.push_back(next_first);
            next_first += count;
        }
        pool_.run((int64_t)first.size(), [&](const Jobs& next) {
            for (int64_t i = next(); i >= 0; i = next())
                unit_.merge(call_, pieces.tasks.data() + first[(size_t)i], pieces.count[(size_t)i]);
        });
    }

    void execute(const std::vector<Task>& tasks, size_t scratch_bytes) const {
        std::atomic<bool> failed{false};
        pool_.run((int64_t)tasks.size(), [&](const Jobs& next) {
            try {
                Buffer scratch = allocate(scratch_bytes);
                for (int64_t i = next(); i >= 0; i = next()) unit_.run(call_, tasks[(size_t)i], scratch.get());
            } catch (const Failure&) {
                failed = true;
            }
        });
        if (failed) throw Failure{SPARSEREEL_NO_MEMORY};
    }

    Prepared& prepared_;
    Call& call_;
    const SparsereelArgs& a_;
    const Unit& unit_;
    const Mask& mask_;
    const Pool& pool_;
    int64_t group_;
};

void forward(const SparsereelArgs& a, const Unit& unit, const Pool& pool) {
    check_sizes(a);
    Mask mask(a, pool);
    Prepared prepared(a, unit, FORWARD, &mask, pool);
    Runner(prepared, unit, mask, pool).run();
}

void backward(const SparsereelArgs& a, const Unit& unit, const Pool& pool) {
    check_sizes(a);
    Mask mask(a, pool);
    if (a.has_mask) mask.turn(pool);
    // In pairs, sums of queries would need gradients turned around: they have a pass of their own.
    const bool one_pass = !uses_pairs(a, unit);
    if (a.has_mask && one_pass) mask.rank(pool);
    Prepared keys(a, unit, KEY_GRADIENT, &mask, pool);
    size_t positions = (size_t)(a.batch * a.heads * keys.call.query_positions);
    std::vector<float> lse(positions, __builtin_inff()), delta(positions, 0.f);
    keys.call.lse = lse.data();
    keys.call.delta = delta.data();
    int64_t chunks = ceil_div(a.q_len, MEASURED_ROWS);
    pool.run(a.batch * a.heads * chunks, [&](const Jobs& next) {
        for (int64_t i = next(); i >= 0; i = next()) {
            int64_t head = i / chunks, row = i % chunks * MEASURED_ROWS;
            unit.measure(keys.call, head / a.heads, head % a.heads, row, std::min(row + MEASURED_ROWS, a.q_len));
        }
    });
    if (one_pass) {
        keys.fuse();
    } else {
        Prepared queries(a, unit, QUERY_GRADIENT, &mask, pool);
        queries.call.lse = lse.data();
        queries.call.delta = delta.data();
        Runner(queries, unit, mask, pool).run();
    }
    Runner(keys, unit, mask, pool).run();
}

int32_t guarded(void (*entry)(const SparsereelArgs&, const Unit&, const Pool&), const SparsereelArgs* args,
                const char* isa, void* parallel) {
    const Unit* unit = unit_named(isa);
    if (!unit) return SPARSEREEL_NO_ISA;
    try {
        entry(*args, *unit, Pool(args->threads, parallel));
    } catch (const Failure& failure) {
        return failure.status;
    } catch (const std::bad_alloc&) {
        return SPARSEREEL_NO_MEMORY;
    }
    return SPARSEREEL_OK;
}

}  // namespace
}  // namespace sparsereel

extern "C" {

int64_t sparsereel_args_size() { return (int64_t)sizeof(SparsereelArgs); }

const char* sparsereel_isas() {
    static const std::string names = sparsereel::isa_names();
    return names.c_str();
}

int32_t sparsereel_forward(const SparsereelArgs* args, const char* isa, void* parallel) {
    return sparsereel::guarded(sparsereel::forward, args, isa, parallel);
}

int32_t sparsereel_backward(const SparsereelArgs* args, const char* isa, void* parallel) {
    return sparsereel::guarded(sparsereel::backward, args, isa, parallel);
}
}
