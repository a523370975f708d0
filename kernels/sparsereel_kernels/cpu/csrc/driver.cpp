// Entry points: prepares a call, packs what it visits, and hands tiles to the unit for this processor.
//
// Compiled for the base instruction set. Heads are worked through in waves, so that the packed copy of keys and values
// stays small whatever the number of heads.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include <sys/mman.h>

#include "isa.h"
#include "parallel.h"
#include "unit.h"

namespace sparsereel {
namespace {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int64_t TASK_ROWS = 192;                  // larger query blocks are cut
constexpr int64_t WAVE_BYTES = int64_t(8) << 20;    // packed keys and values at a time, unless one head needs more
constexpr int64_t WAVE_BYTES_A_THREAD = int64_t(4) << 20;  // many threads need many tasks a wave

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t MAX_FRAMES = int64_t(1) << 26;    // largest frame number that FrameDecay takes

struct Failure {
    int32_t status;
};

struct FreeAligned {
    void operator()(char* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, FreeAligned>;

Buffer allocate(size_t bytes) {
    void* p = nullptr;
    constexpr size_t huge = size_t(2) << 20;
    if (posix_memalign(&p, bytes < huge ? 4096 : huge, std::max<size_t>(bytes, 64))) throw Failure{SPARSEREEL_NO_MEMORY};
#if defined(MADV_HUGEPAGE)
    if (bytes >= huge) madvise(p, bytes, MADV_HUGEPAGE);  // only a wish: fewer page faults where granted
#endif
    return Buffer((char*)p);
}

// The packed copy is kept for the next call: fresh memory costs a page fault every 4 KiB, as much as packing itself.
class Workspace {
    static constexpr size_t KEPT_BYTES = size_t(256) << 20;

  public:
    explicit Workspace(size_t bytes) : lock_(mutex(), std::try_to_lock) {
        if (!lock_.owns_lock()) {
            own_ = allocate(bytes);
            data_ = own_.get();
            return;
        }
        if (size() < bytes) {
            kept().reset();
            size() = 0;
            kept() = allocate(bytes);
            size() = bytes;
        }
        data_ = kept().get();
    }
    ~Workspace() {
        if (lock_.owns_lock() && size() > KEPT_BYTES) {
            kept().reset();
            size() = 0;
        }
    }
    char* data() const { return data_; }

  private:
    static std::mutex& mutex() {
        static std::mutex* m = new std::mutex;
        return *m;
    }
    static Buffer& kept() {
        static Buffer* b = new Buffer;
        return *b;
    }
    static size_t& size() {
        static size_t bytes = 0;
        return bytes;
    }
    std::unique_lock<std::mutex> lock_;
    Buffer own_;
    char* data_ = nullptr;
};

// The block lists, checked, and which key blocks each (batch, head) of the mask visits at all.
class Visits {
  public:
    Visits(const Call& call, const Pool& pool) : call_(call), a_(*call.args) {
        if (!a_.has_mask) return;
        seen_.assign((size_t)(a_.mask_batch * a_.mask_heads * call.key_blocks), 0);
        std::atomic<bool> bad{false};
        pool.run(a_.mask_batch * a_.mask_heads, [&](const std::function<int64_t()>& next) {
            for (int64_t i = next(); i >= 0; i = next())
                if (!mark(i)) bad = true;
        });
        if (bad) throw Failure{SPARSEREEL_BAD_INDEX};
    }

    bool any(int64_t batch, int64_t kv_head, int64_t block) const {
        if (!a_.has_mask) return true;
        int64_t group = a_.heads / a_.kv_heads, mb = a_.mask_batch == 1 ? 0 : batch;
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++) {
            int64_t mh = a_.mask_heads == 1 ? 0 : h;
            if (seen_[(size_t)((mb * a_.mask_heads + mh) * call_.key_blocks + block)]) return true;
        }
        return false;
    }

  private:
    bool mark(int64_t i) {
        uint8_t* seen = seen_.data() + i * call_.key_blocks;
        for (int64_t row = i * call_.query_blocks; row < (i + 1) * call_.query_blocks; row++) {
            if (!mark_row(seen, a_.full_count[row], a_.max_full, a_.full_index + row * a_.max_full)) return false;
            if (!mark_row(seen, a_.partial_count[row], a_.max_partial, a_.partial_index + row * a_.max_partial))
                return false;
            const int32_t* tile = a_.partial_tile + row * a_.max_partial;
            for (int64_t e = 0; e < a_.partial_count[row]; e++)
                if (tile[e] < 0 || tile[e] >= a_.tiles) return false;
        }
        return true;
    }
    bool mark_row(uint8_t* seen, int64_t count, int64_t most, const int32_t* index) const {
        if (count < 0 || count > most) return false;
        for (int64_t e = 0; e < count; e++) {
            if (index[e] < 0 || index[e] >= call_.key_blocks) return false;
            seen[index[e]] = 1;
        }
        return true;
    }

    const Call& call_;
    const SparsereelArgs& a_;
    std::vector<uint8_t> seen_;
};

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

// A call with everything derived from its arguments; owns the small tables.
class Prepared {
  public:
    Call call{};

    Prepared(const SparsereelArgs& a, const Unit& unit) {
        call.args = &a;
        call.pairs = unit.pairs && a.dtype == SPARSEREEL_BFLOAT16;
        call.logit_scale = (float)(a.scale * (double)LOG2_E);
        call.modified = a.bias || a.frame_of_q || !(a.scale > 0);
        call.block_q = a.has_mask ? a.block_q : 128;
        call.block_k = a.has_mask ? a.block_k : 64;
        call.query_blocks = ceil_div(a.q_len, call.block_q);
        call.key_blocks = ceil_div(a.kv_len, call.block_k);
        call.strips_per_block = ceil_div(call.block_k, STRIP);
        int64_t pair = call.pairs ? 2 : 1, size = call.pairs ? 2 : 4;
        call.depth = ceil_div(a.head_dim, pair) * pair;
        call.width = ceil_div(a.v_dim, STRIP) * STRIP;
        call.k_strip = call.depth * STRIP * size;
        call.v_strip = call.width * STRIP * size;
        set_bits();
        if (a.bias) set_bias();
        if (a.frame_of_q) set_frames();
    }

    int64_t strips() const { return call.key_blocks * call.strips_per_block; }
    int64_t head_bytes() const { return strips() * (call.k_strip + call.v_strip); }

  private:
    // Token of column c of a strip, or -1 where the strip has no such column.
    int64_t token(int64_t strip, int64_t c) const {
        int64_t block = strip / call.strips_per_block, inside = strip % call.strips_per_block * STRIP + c;
        int64_t t = block * call.block_k + inside;
        return inside < call.block_k && t < call.args->kv_len ? t : -1;
    }

    // Rows of bits become multiples of 8 bytes, so that four strips are read as one word.
    void set_bits() {
        const SparsereelArgs& a = *call.args;
        int64_t row = a.block_k / 8;
        call.bits = a.partial_bits;
        call.bits_row = row;
        if (!a.has_mask || row % 8 == 0) return;
        call.bits_row = ceil_div(row, 8) * 8;
        bits_.assign((size_t)(a.tiles * a.block_q * call.bits_row), 0);
        for (int64_t r = 0; r < a.tiles * a.block_q; r++)
            std::memcpy(bits_.data() + r * call.bits_row, a.partial_bits + r * row, (size_t)row);
        call.bits = bits_.data();
    }

    void set_bias() {
        const SparsereelArgs& a = *call.args;
        int64_t columns = strips() * STRIP, heads = a.bias_head ? a.heads : 1, batch = a.bias_batch ? a.batch : 1;
        bias_.assign((size_t)(batch * heads * columns), 0.f);
        for (int64_t b = 0; b < batch; b++)
            for (int64_t h = 0; h < heads; h++) {
                const float* from = a.bias + b * a.bias_batch + h * a.bias_head;
                float* to = bias_.data() + (b * heads + h) * columns;
                for (int64_t i = 0; i < columns; i++)
                    if (int64_t t = token(i / STRIP, i % STRIP); t >= 0) to[i] = from[t] * LOG2_E;
            }
        call.bias = bias_.data();
        call.bias_head = heads > 1 ? columns : 0;
        call.bias_batch = batch > 1 ? heads * columns : 0;
    }

    // Factors by signed distance, one entry for each distance that may occur, so that the kernels need no bounds.
    void set_ramp(int64_t top_q, int64_t top_k) {
        const SparsereelArgs& a = *call.args;
        // A strip of consecutive frames reads up to 15 past its last frame where the sequence ends inside it.
        int64_t back = top_q, ahead = top_k + STRIP;
        if (back + ahead > MAX_FRAMES) throw Failure{SPARSEREEL_BAD_SIZE};
        ramp_.resize((size_t)(back + ahead + 1));
        for (int64_t d = -back; d <= ahead; d++)
            ramp_[(size_t)(d + back)] = a.decay[std::min(std::abs(d), a.decay_size - 1)];
        ones_.assign((size_t)(ahead + 1), 1.f);
        call.ramp = ramp_.data() + back;
        call.ones = ones_.data();
    }

    void set_frames() {
        const SparsereelArgs& a = *call.args;
        int32_t top_q = 0, top_k = 0;
        for (int64_t i = 0; i < a.q_len; i++) top_q = std::max(top_q, a.frame_of_q[i]);
        for (int64_t i = 0; i < a.kv_len; i++) top_k = std::max(top_k, a.frame_of_k[i]);
        set_ramp(top_q, top_k);
        frames_.assign((size_t)(strips() * STRIP), -1);
        kinds_.assign((size_t)strips(), FRAME_EXEMPT);
        for (int64_t s = 0; s < strips(); s++) {
            int32_t* f = frames_.data() + s * STRIP;
            bool exempt = true, same = true, rising = true;
            // Columns that do not exist fit any pattern: they are masked in any case.
            for (int64_t c = 0; c < STRIP; c++) {
                int64_t t = token(s, c);
                if (t < 0) continue;
                f[c] = std::max(a.frame_of_k[t], -1);
                exempt &= f[c] < 0;
                same &= f[c] == f[0];
                rising &= f[0] >= 0 && f[c] == f[0] + (int32_t)c;
            }
            kinds_[(size_t)s] = exempt ? FRAME_EXEMPT : same ? FRAME_UNIFORM : rising ? FRAME_CONSECUTIVE : FRAME_MIXED;
        }
        call.frame_of_k = frames_.data();
        call.frame_kind = kinds_.data();
    }

    std::vector<uint8_t> bits_, kinds_;
    std::vector<float> bias_, ramp_, ones_;
    std::vector<int32_t> frames_;
};

// Tasks of kv heads [first, last), dear ones first. Tasks of like cost keep their order: neighbours share keys.
std::vector<Task> tasks_of(const Call& call, int64_t first, int64_t last) {
    const SparsereelArgs& a = *call.args;
    int64_t group = a.heads / a.kv_heads;
    int64_t parts = ceil_div(call.block_q, TASK_ROWS), part_rows = ceil_div(call.block_q, parts);
    std::vector<std::pair<int, Task>> sorted;
    for (int64_t i = first; i < last; i++)
        for (int64_t h = i % a.kv_heads * group; h < (i % a.kv_heads + 1) * group; h++)
            for (int64_t block = 0; block < call.query_blocks; block++) {
                int64_t b = i / a.kv_heads, cost = call.key_blocks;
                if (a.has_mask) {
                    int64_t mb = a.mask_batch == 1 ? 0 : b, mh = a.mask_heads == 1 ? 0 : h;
                    int64_t row = (mb * a.mask_heads + mh) * call.query_blocks + block;
                    cost = a.full_count[row] + a.partial_count[row];
                }
                int level = 0;
                while (cost >> level) level++;
                int64_t end = std::min(call.block_q, a.q_len - block * call.block_q);
                for (int64_t row = 0; row < end; row += part_rows)
                    sorted.push_back({-level, {(int32_t)b, (int32_t)h, block, row, std::min(part_rows, end - row)}});
            }
    std::stable_sort(sorted.begin(), sorted.end(), [](const auto& x, const auto& y) { return x.first < y.first; });
    std::vector<Task> tasks;
    tasks.reserve(sorted.size());
    for (const auto& entry : sorted) tasks.push_back(entry.second);
    return tasks;
}

void pack_wave(const Call& call, const Unit& unit, const Visits& visits, const Pool& pool, int64_t first, int64_t last) {
    const SparsereelArgs& a = *call.args;
    int64_t spb = call.strips_per_block;
    pool.run((last - first) * call.key_blocks, [&](const std::function<int64_t()>& next) {
        for (int64_t i = next(); i >= 0; i = next()) {
            int64_t packed = i / call.key_blocks, block = i % call.key_blocks;
            int64_t b = (first + packed) / a.kv_heads, h = (first + packed) % a.kv_heads;
            if (visits.any(b, h, block))
                unit.pack(call, b, h, block, call.k_packed + i * spb * call.k_strip, call.v_packed + i * spb * call.v_strip);
        }
    });
}

void forward(const SparsereelArgs& a, const Unit& unit, const Pool& pool) {
    check_sizes(a);
    Prepared prepared(a, unit);
    Call& call = prepared.call;
    Visits visits(call, pool);
    int64_t heads = a.batch * a.kv_heads, head_bytes = prepared.head_bytes();
    int64_t wave_bytes = std::max(WAVE_BYTES, a.threads * WAVE_BYTES_A_THREAD);
    int64_t wave = std::min(heads, std::max<int64_t>(1, wave_bytes / std::max<int64_t>(1, head_bytes)));
    Workspace space((size_t)(wave * head_bytes));
    call.k_packed = space.data();
    call.v_packed = call.k_packed + wave * prepared.strips() * call.k_strip;
    size_t scratch_bytes = unit.forward_scratch(call, std::min(call.block_q, TASK_ROWS));
    std::atomic<bool> short_of_memory{false};
    for (int64_t first = 0; first < heads; first += wave) {
        int64_t last = std::min(heads, first + wave);
        call.kv_first = first;
        pack_wave(call, unit, visits, pool, first, last);
        std::vector<Task> tasks = tasks_of(call, first, last);
        pool.run((int64_t)tasks.size(), [&](const std::function<int64_t()>& next) {
            try {
                Buffer scratch = allocate(scratch_bytes);
                for (int64_t i = next(); i >= 0; i = next()) unit.forward(call, tasks[(size_t)i], scratch.get());
            } catch (const Failure&) {
                short_of_memory = true;
            }
        });
    }
    if (short_of_memory) throw Failure{SPARSEREEL_NO_MEMORY};
}

}  // namespace
}  // namespace sparsereel

extern "C" {

int64_t sparsereel_args_size() {
    sparsereel::Pool::home();
    return (int64_t)sizeof(SparsereelArgs);
}

const char* sparsereel_isas() {
    static const std::string names = sparsereel::isa_names();
    return names.c_str();
}

int32_t sparsereel_forward(const SparsereelArgs* args, const char* isa, void* parallel) {
    const sparsereel::Unit* unit = sparsereel::unit_named(isa);
    if (!unit) return SPARSEREEL_NO_ISA;
    try {
        sparsereel::forward(*args, *unit, sparsereel::Pool(args->threads, parallel));
    } catch (const sparsereel::Failure& failure) {
        return failure.status;
    } catch (const std::bad_alloc&) {
        return SPARSEREEL_NO_MEMORY;
    }
    return SPARSEREEL_OK;
}
}
