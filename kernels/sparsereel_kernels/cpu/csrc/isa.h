// Which units the library holds and this processor runs.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "unit.h"

namespace sparsereel {
namespace portable {
extern const Unit unit;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Unit unit;
}
namespace avx512 {
extern const Unit unit;
}
#if defined(SPARSEREEL_WITH_AVX512_BF16)
namespace avx512_bf16 {
extern const Unit unit;
}
#endif

// What the processor offers and the system saves on a task switch.
struct Processor {
    bool avx2 = false, avx512 = false, avx512_bf16 = false;

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
        if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avx512_bf16 = avx512 && (a >> 5 & 1);
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
#if defined(SPARSEREEL_WITH_AVX512_BF16)
        if (cpu.avx512_bf16) found[n++] = &avx512_bf16::unit;
#endif
        if (cpu.avx512) found[n++] = &avx512::unit;
        if (cpu.avx2) found[n++] = &avx2::unit;
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
