// Which units the library holds and this processor runs.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "unit.h"

#if defined(SPARSEREEL_EMULATE_AMX)
#define SPARSEREEL_AMX_IS_EMULATED true
#else
#define SPARSEREEL_AMX_IS_EMULATED false
#endif

namespace sparsereel {
// The build says which units it holds: SPARSEREEL_WITH_<NAME>.
namespace portable {
extern const Unit unit;
}
namespace avx2 {
extern const Unit unit;
}
namespace avx512 {
extern const Unit unit;
}
namespace avx512_bf16 {
extern const Unit unit;
}
namespace amx {
extern const Unit unit;
}

#if defined(__x86_64__)
// What the processor offers and the system saves on a task switch.
struct Processor {
    bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false;

    Processor() {
        uint32_t a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return;  // OSXSAVE
        bool fma_f16c = (c >> 12 & 1) && (c >> 29 & 1);
        uint32_t low, high;
        __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        avx2 = fma_f16c && (b >> 5 & 1) && (low & 0x6) == 0x6;
        // F, DQ, BW and VL
        avx512 = avx2 && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1) && (low & 0xe6) == 0xe6;
        bool tiles = (d >> 22 & 1) && (d >> 24 & 1) && (low & 0x60000) == 0x60000;  // AMX-BF16, AMX-TILE
        if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avx512_bf16 = avx512 && (a >> 5 & 1);
        amx = avx512_bf16 && tiles && may_use_tiles();
    }

    // Linux gives a process the tile registers (8 KiB of state a thread) only when it asks for them.
    static bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
        constexpr long request = 0x1023, tile_data = 18;
        return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
        return false;
#endif
    }
};
#endif

// Best first.
inline const Unit* const* units() {
    static const Unit* found[8] = {};
    static const bool filled = [] {
        int n = 0;
#if defined(__x86_64__)
        Processor cpu;
#if defined(SPARSEREEL_WITH_AMX)
        if (cpu.amx || (SPARSEREEL_AMX_IS_EMULATED && cpu.avx512_bf16)) found[n++] = &amx::unit;
#endif
#if defined(SPARSEREEL_WITH_AVX512_BF16)
        if (cpu.avx512_bf16) found[n++] = &avx512_bf16::unit;
#endif
#if defined(SPARSEREEL_WITH_AVX512)
        if (cpu.avx512) found[n++] = &avx512::unit;
#endif
#if defined(SPARSEREEL_WITH_AVX2)
        if (cpu.avx2) found[n++] = &avx2::unit;
#endif
#endif
        found[n++] = &portable::unit;
        return true;
    }();
    (void)filled;
    return found;
}

inline const Unit* unit_named(const char* name) {
    for (const Unit* const* u = units(); *u; u++)
        if (!std::strcmp((*u)->name, name)) return *u;
    return nullptr;
}

inline std::string isa_names() {
    std::string names;
    for (const Unit* const* u = units(); *u; u++) names += (names.empty() ? "" : ",") + std::string((*u)->name);
    return names;
}

}  // namespace sparsereel
