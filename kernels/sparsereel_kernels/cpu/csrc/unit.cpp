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
#if defined(__AMX_BF16__) || (defined(SPARSEREEL_HAS_PAIRS) && defined(SPARSEREEL_EMULATE_AMX))
#define SPARSEREEL_HAS_TILES
#endif

constexpr int64_t RUN = 32;  // strips a run at most: 512 keys for each softmax step
// Packed columns of a run at most; processors with AVX-512 have large caches, and their runs are always whole.
constexpr int64_t RUN_BYTES = COLUMNS == 1 ? int64_t(256) << 10 : int64_t(1) << 40;
// Register tiles of one strip: packed values lie as such tiles read them.
constexpr bool BLOCKED = COLUMNS == 1;

#include "tile.h"
#include "pack.h"
#include "lists.h"
#ifdef SPARSEREEL_HAS_TILES
#include "tiles_amx.h"
#endif
#if defined(__AVX512F__)
#include "score.h"
#include "weigh.h"
#else
#if defined(__AVX2__)
#include "products_avx2.h"
#else
#include "products_portable.h"
#endif
#include "narrow.h"
#endif
#include "forward.h"
#include "ordered.h"
#include "backward.h"

template <class Op>
static size_t scratch_for(const Call& call, int64_t rows) {
    char* end = nullptr;
    if (call.pass == FORWARD)
        Forward<Op>(call, rows, &end);
    else
        Backward<Op>(call, rows, &end);
    return (size_t)end;
}

template <class Op>
static void run_task(const Call& call, const Task& task, char* scratch) {
    if (call.pass == FORWARD)
        forward_task<Op>(call, task, scratch);
    else if (call.pass == QUERY_GRADIENT)
        query_gradient<Op>(call, task, scratch);
    else
        key_gradient<Op>(call, task, scratch);
}

#if defined(SPARSEREEL_HAS_TILES)
constexpr bool PAIRS = true;
constexpr int64_t DEPTH_STEP = 32;
typedef Tiles IfPairs;
#elif defined(SPARSEREEL_HAS_PAIRS)
constexpr bool PAIRS = true;
constexpr int64_t DEPTH_STEP = 2;
typedef Pairs IfPairs;
#else
constexpr bool PAIRS = false;
constexpr int64_t DEPTH_STEP = 1;
typedef F32 IfPairs;  // never asked for
#endif

static void pack(const Call& call, int64_t batch, int64_t head, int64_t block, int64_t place) {
    call.pairs ? pack_block<IfPairs>(call, batch, head, block, place) : pack_block<F32>(call, batch, head, block, place);
}

static size_t scratch_bytes(const Call& call, int64_t rows) {
    return call.pairs ? scratch_for<IfPairs>(call, rows) : scratch_for<F32>(call, rows);
}

static void run(const Call& call, const Task& task, char* scratch) {
    if (!call.pairs) return run_task<F32>(call, task, scratch);
#ifdef SPARSEREEL_HAS_TILES
    tiles_begin();
#endif
    run_task<IfPairs>(call, task, scratch);
#ifdef SPARSEREEL_HAS_TILES
    tiles_end();
#endif
}

extern const Unit unit;
const Unit unit = {SPARSEREEL_NAME(SPARSEREEL_UNIT), PAIRS, DEPTH_STEP, pack, finish, measure, scratch_bytes, run, merge};

}  // namespace SPARSEREEL_UNIT
}  // namespace sparsereel
