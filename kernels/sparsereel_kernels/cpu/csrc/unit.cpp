// The kernels for one instruction set. Compiled once for each, with -DSPARSEREEL_UNIT=<name>.
//
// Everything below sits in the unit's own namespace and uses no inline function of the standard library: the linker
// keeps one copy of such a function for the whole library, and it could be one that this processor cannot run.
#include "unit.h"

#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SPARSEREEL_STRING(x) #x
#define SPARSEREEL_NAME(x) SPARSEREEL_STRING(x)

namespace sparsereel {
namespace SPARSEREEL_UNIT {

#if defined(__AVX512F__)
#include "vec_avx512.h"
constexpr int ROWS = 6, COLUMNS = 4;
#elif defined(__AVX2__)
#include "vec_avx2.h"
constexpr int ROWS = 6, COLUMNS = 1;
#else
#include "vec_portable.h"
// Four registers a strip: two rows fill the sixteen of SSE2, six the thirty-two of NEON.
#if defined(__aarch64__)
constexpr int ROWS = 6, COLUMNS = 1;
#else
constexpr int ROWS = 2, COLUMNS = 1;
#endif
#endif
#if defined(__AVX512BF16__)
#define SPARSEREEL_HAS_PAIRS
#endif

#include "tile.h"
#include "pack.h"
#include "lists.h"
#include "forward.h"

static void pack(const Call& call, int64_t batch, int64_t head, int64_t block, char* k, char* v) {
#ifdef SPARSEREEL_HAS_PAIRS
    if (call.pairs) return pack_block<Pairs>(call, batch, head, block, k, v);
#endif
    pack_block<F32>(call, batch, head, block, k, v);
}

static size_t forward_scratch(const Call& call, int64_t rows) {
#ifdef SPARSEREEL_HAS_PAIRS
    if (call.pairs) return forward_bytes<Pairs>(call, rows);
#endif
    return forward_bytes<F32>(call, rows);
}

static void forward(const Call& call, const Task& task, char* scratch) {
#ifdef SPARSEREEL_HAS_PAIRS
    if (call.pairs) return forward_task<Pairs>(call, task, scratch);
#endif
    forward_task<F32>(call, task, scratch);
}

#ifdef SPARSEREEL_HAS_PAIRS
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

extern const Unit unit;
const Unit unit = {SPARSEREEL_NAME(SPARSEREEL_UNIT), PAIRS, pack, forward_scratch, forward};

}  // namespace SPARSEREEL_UNIT
}  // namespace sparsereel
