// Aligned memory, and the workspace that is kept from call to call.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <mutex>

#include "args.h"

namespace sparsereel {

struct Failure {
    int32_t status;
};

struct FreeAligned {
    void operator()(char* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, FreeAligned>;

inline Buffer allocate(size_t bytes) {
    constexpr size_t page = 4096, huge = size_t(2) << 20;
    void* p = nullptr;
    if (posix_memalign(&p, bytes < huge ? page : huge, bytes < 64 ? 64 : bytes)) throw Failure{SPARSEREEL_NO_MEMORY};
#if defined(MADV_HUGEPAGE)
    if (bytes >= huge) madvise(p, bytes, MADV_HUGEPAGE);  // only a wish: fewer page faults where it is granted
#endif
    return Buffer((char*)p);
}

// Packed operands. The memory is kept for the next call: fresh memory costs a page fault every 4 KiB, as much as
// packing itself. A call that finds it in use (another thread is inside) takes memory of its own.
class Workspace {
  public:
    explicit Workspace(size_t bytes) : lock_(shared().mutex, std::try_to_lock) {
        if (!lock_.owns_lock()) {
            own_ = allocate(bytes);
            data_ = own_.get();
            return;
        }
        Shared& s = shared();
        if (s.size < bytes) {
            s.size = 0;
            s.kept.reset();
            s.kept = allocate(bytes);
            s.size = bytes;
        }
        data_ = s.kept.get();
    }

    ~Workspace() {
        if (!lock_.owns_lock() || shared().size <= MOST_KEPT) return;
        shared().size = 0;
        shared().kept.reset();
    }

    char* data() const { return data_; }

  private:
    static constexpr size_t MOST_KEPT = size_t(256) << 20;

    struct Shared {
        std::mutex mutex;
        Buffer kept;
        size_t size = 0;
    };
    // Never destroyed: a thread may be inside a call while the process ends.
    static Shared& shared() {
        static Shared* s = new Shared;
        return *s;
    }

    std::unique_lock<std::mutex> lock_;
    Buffer own_;
    char* data_ = nullptr;
};

}  // namespace sparsereel
