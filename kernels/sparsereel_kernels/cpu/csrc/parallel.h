// Runs numbered jobs on several threads; which thread takes which job never changes a result.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <system_error>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace sparsereel {

// Tiny numbers count as 0 while this lives: they cost some processors a hundred cycles each and change no result.
class FlushTiny {
#if defined(__SSE2__)
    unsigned before_ = _mm_getcsr();

  public:
    FlushTiny() { _mm_setcsr(before_ | 0x8040); }
    ~FlushTiny() { _mm_setcsr(before_); }
#else
  public:
    FlushTiny() {}
#endif
    FlushTiny(const FlushTiny&) = delete;
    FlushTiny& operator=(const FlushTiny&) = delete;
};

// Gives the next job number to work on, or -1.
using Jobs = std::function<int64_t()>;

// torch's own OpenMP pool serves, entered through GOMP_parallel (libgomp and libomp both have it): a second pool beside
// it would fight for the cores. Without that function (null) plain threads are started.
class Pool {
  public:
    Pool(int64_t threads, void* gomp) : threads_(threads < 1 ? 1 : threads), gomp_((Gomp)gomp) {}

    // work(next) takes job numbers until there are no more. It must not throw.
    void run(int64_t jobs, const std::function<void(const Jobs&)>& work) const {
        std::atomic<int64_t> taken{0};
        Jobs next = [&]() -> int64_t {
            int64_t job = taken.fetch_add(1, std::memory_order_relaxed);
            return job < jobs ? job : -1;
        };
        std::function<void()> body = [&] {
            FlushTiny flush;
            work(next);
        };
        int64_t team = threads_ < jobs ? threads_ : jobs;
        if (team <= 1) return body();
        if (gomp_) return gomp_(&Pool::enter, &body, (unsigned)team, 0);
        std::vector<std::thread> others;
        try {
            for (int64_t i = 1; i < team; i++) others.emplace_back(body);
        } catch (const std::system_error&) {
            // Fewer threads than wished for do the same work.
        }
        body();
        for (std::thread& t : others) t.join();
    }

  private:
    typedef void (*Gomp)(void (*)(void*), void*, unsigned, unsigned);
    static void enter(void* body) { (*(std::function<void()>*)body)(); }

    int64_t threads_;
    Gomp gomp_;
};

}  // namespace sparsereel
