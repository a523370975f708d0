// The two products in AVX2: R rows times one strip of 16 columns, sums in 2 R of the sixteen registers.
//
// In assembly, because compilers mix the steps of an unrolled loop, run out of registers and put sums on the stack.
// ymm0 and ymm1 hold a row of 16 columns, ymm2 a number of one row, ymm4 and up the sums. Rows are found by three
// multiples of their distance from two pointers. Six rows take 12 multiply-adds and 8 loads a step: the multiply-adds
// decide. Offsets inside a turn of a loop are part of the instructions. A step reads one line of a strip and asks for the
// same line of the next strip, so strips[count] must be an address, too; nothing is read there.
#pragma once

#define SPARSEREEL_MAC(row, low, high) \
    "vbroadcastss \\i*4(" row "), %%ymm2\n\t" \
    "vfmadd231ps %%ymm0, %%ymm2, %%ymm" #low "\n\t" \
    "vfmadd231ps %%ymm1, %%ymm2, %%ymm" #high "\n\t"
#define SPARSEREEL_MAC1 SPARSEREEL_MAC("%[a]", 4, 5)
#define SPARSEREEL_MAC2 SPARSEREEL_MAC1 SPARSEREEL_MAC("%[a],%[step]", 6, 7)
#define SPARSEREEL_MAC3 SPARSEREEL_MAC2 SPARSEREEL_MAC("%[a],%[step],2", 8, 9)
#define SPARSEREEL_MAC4 SPARSEREEL_MAC3 SPARSEREEL_MAC("%[a3]", 10, 11)
#define SPARSEREEL_MAC5 SPARSEREEL_MAC4 SPARSEREEL_MAC("%[a3],%[step]", 12, 13)
#define SPARSEREEL_MAC6 SPARSEREEL_MAC5 SPARSEREEL_MAC("%[a3],%[step],2", 14, 15)

// Moves sums to (VMOVUPS from, to) or from the rows at c.
#define SPARSEREEL_SAVE(row, low, high) \
    "vmovups %%ymm" #low ", (" row ")\n\tvmovups %%ymm" #high ", 32(" row ")\n\t"
#define SPARSEREEL_LOAD(row, low, high) \
    "vmovups (" row "), %%ymm" #low "\n\tvmovups 32(" row "), %%ymm" #high "\n\t"
#define SPARSEREEL_EACH1(DO) DO("%[c]", 4, 5)
#define SPARSEREEL_EACH2(DO) SPARSEREEL_EACH1(DO) DO("%[c],%[c_step]", 6, 7)
#define SPARSEREEL_EACH3(DO) SPARSEREEL_EACH2(DO) DO("%[c],%[c_step],2", 8, 9)
#define SPARSEREEL_EACH4(DO) SPARSEREEL_EACH3(DO) DO("%[c3]", 10, 11)
#define SPARSEREEL_EACH5(DO) SPARSEREEL_EACH4(DO) DO("%[c3],%[c_step]", 12, 13)
#define SPARSEREEL_EACH6(DO) SPARSEREEL_EACH5(DO) DO("%[c3],%[c_step],2", 14, 15)

#define SPARSEREEL_STEPS(which, R) \
    ".irp i, " which "\n\t" \
    "prefetcht0 \\i*64(%[next])\n\t" \
    "vmovups \\i*64(%[b]), %%ymm0\n\t" \
    "vmovups \\i*64+32(%[b]), %%ymm1\n\t" SPARSEREEL_MAC##R ".endr\n\t"

#define SPARSEREEL_CLOBBERS \
    "cc", "memory", "ymm0", "ymm1", "ymm2", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", \
        "ymm13", "ymm14", "ymm15"

// scores[R, count strips] = rows[R, depth] * strips; strides in floats.
template <int R>
static void multiply_strips(const float* rows, int64_t row, int64_t depth, const float* const* strips, int64_t count,
                            float* scores, int64_t score_row);

// sums[R, 16] += weights[R, count * 16] * strips[count][16, 16]
template <int R>
static void add_strips(const float* weights, int64_t weight_row, const float* const* strips, int64_t count, float* sums,
                       int64_t sum_row);

#define SPARSEREEL_PRODUCTS(R) \
    template <> \
    void multiply_strips<R>(const float* rows, int64_t row, int64_t depth, const float* const* strips, int64_t count, \
                            float* scores, int64_t score_row) { \
        const int64_t step = row * 4, c_step = score_row * 4, eights = depth / 8, rest = depth % 8; \
        float* c3 = scores + 3 * score_row; \
        for (int64_t i = 0; i < count; i++) { \
            const float *a = rows, *a3 = rows + 3 * row, *b = strips[i], *next = strips[i + 1]; \
            int64_t n = eights, m = rest; \
            __asm__ volatile( \
                ".irp j, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15\n\t" \
                "vxorps %%xmm\\j, %%xmm\\j, %%xmm\\j\n\t" \
                ".endr\n\t" \
                "test %[n], %[n]\n\t" \
                "jz 2f\n\t" \
                ".p2align 5\n" \
                "1:\n\t" SPARSEREEL_STEPS("0, 1, 2, 3, 4, 5, 6, 7", R) \
                "add $32, %[a]\n\t" \
                "add $32, %[a3]\n\t" \
                "add $512, %[b]\n\t" \
                "add $512, %[next]\n\t" \
                "dec %[n]\n\t" \
                "jnz 1b\n" \
                "2:\n\t" \
                "test %[m], %[m]\n\t" \
                "jz 4f\n" \
                "3:\n\t" SPARSEREEL_STEPS("0", R) \
                "add $4, %[a]\n\t" \
                "add $4, %[a3]\n\t" \
                "add $64, %[b]\n\t" \
                "add $64, %[next]\n\t" \
                "dec %[m]\n\t" \
                "jnz 3b\n" \
                "4:\n\t" SPARSEREEL_EACH##R(SPARSEREEL_SAVE) \
                : [a] "+r"(a), [a3] "+r"(a3), [b] "+r"(b), [next] "+r"(next), [n] "+r"(n), [m] "+r"(m) \
                : [step] "r"(step), [c] "r"(scores + i * STRIP), [c3] "r"(c3 + i * STRIP), [c_step] "r"(c_step) \
                : SPARSEREEL_CLOBBERS); \
        } \
    } \
    template <> \
    void add_strips<R>(const float* weights, int64_t weight_row, const float* const* strips, int64_t count, float* sums, \
                       int64_t sum_row) { \
        const int64_t step = weight_row * 4, c_step = sum_row * 4; \
        const float *a = weights, *a3 = weights + 3 * weight_row, *b, *next; \
        float* c3 = sums + 3 * sum_row; \
        __asm__ volatile( \
            SPARSEREEL_EACH##R(SPARSEREEL_LOAD) \
            ".p2align 5\n" \
            "1:\n\t" \
            "mov (%[strips]), %[b]\n\t" \
            "mov 8(%[strips]), %[next]\n\t" SPARSEREEL_STEPS("0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15", R) \
            "add $64, %[a]\n\t" \
            "add $64, %[a3]\n\t" \
            "add $8, %[strips]\n\t" \
            "dec %[n]\n\t" \
            "jnz 1b\n\t" SPARSEREEL_EACH##R(SPARSEREEL_SAVE) \
            : [a] "+r"(a), [a3] "+r"(a3), [b] "=&r"(b), [next] "=&r"(next), [n] "+r"(count), [strips] "+r"(strips) \
            : [step] "r"(step), [c] "r"(sums), [c3] "r"(c3), [c_step] "r"(c_step) \
            : SPARSEREEL_CLOBBERS); \
    }

// One step of the transposed product: a row of 16 features times one weight for each of the R columns.
#define SPARSEREEL_TAKE(at, low, high) \
    "vbroadcastss " #at "(%[a]), %%ymm2\n\t" \
    "vfmadd231ps %%ymm0, %%ymm2, %%ymm" #low "\n\t" \
    "vfmadd231ps %%ymm1, %%ymm2, %%ymm" #high "\n\t"
#define SPARSEREEL_TAKE1 SPARSEREEL_TAKE(0, 4, 5)
#define SPARSEREEL_TAKE2 SPARSEREEL_TAKE1 SPARSEREEL_TAKE(4, 6, 7)
#define SPARSEREEL_TAKE3 SPARSEREEL_TAKE2 SPARSEREEL_TAKE(8, 8, 9)
#define SPARSEREEL_TAKE4 SPARSEREEL_TAKE3 SPARSEREEL_TAKE(12, 10, 11)
#define SPARSEREEL_TAKE5 SPARSEREEL_TAKE4 SPARSEREEL_TAKE(16, 12, 13)
#define SPARSEREEL_TAKE6 SPARSEREEL_TAKE5 SPARSEREEL_TAKE(20, 14, 15)

// sums[R, 16] += the sum over depth of weights[d, R] (transposed) * rows[d, 16]; depth is at least 1.
template <int R>
static void spread_strip(const float* weights, int64_t weight_row, const float* rows, int64_t row, int64_t depth,
                         float* sums, int64_t sum_row);

#define SPARSEREEL_SPREAD(R) \
    template <> \
    void spread_strip<R>(const float* weights, int64_t weight_row, const float* rows, int64_t row, int64_t depth, \
                         float* sums, int64_t sum_row) { \
        const int64_t step = weight_row * 4, row_step = row * 4, c_step = sum_row * 4; \
        const float *a = weights, *b = rows; \
        float* c3 = sums + 3 * sum_row; \
        __asm__ volatile( \
            SPARSEREEL_EACH##R(SPARSEREEL_LOAD) \
            ".p2align 5\n" \
            "1:\n\t" \
            "vmovups (%[b]), %%ymm0\n\t" \
            "vmovups 32(%[b]), %%ymm1\n\t" SPARSEREEL_TAKE##R \
            "add %[step], %[a]\n\t" \
            "add %[row_step], %[b]\n\t" \
            "dec %[n]\n\t" \
            "jnz 1b\n\t" SPARSEREEL_EACH##R(SPARSEREEL_SAVE) \
            : [a] "+r"(a), [b] "+r"(b), [n] "+r"(depth) \
            : [step] "r"(step), [row_step] "r"(row_step), [c] "r"(sums), [c3] "r"(c3), [c_step] "r"(c_step) \
            : SPARSEREEL_CLOBBERS); \
    }

SPARSEREEL_SPREAD(1)
SPARSEREEL_SPREAD(2)
SPARSEREEL_SPREAD(3)
SPARSEREEL_SPREAD(4)
SPARSEREEL_SPREAD(5)
SPARSEREEL_SPREAD(6)
SPARSEREEL_PRODUCTS(1)
SPARSEREEL_PRODUCTS(2)
SPARSEREEL_PRODUCTS(3)
SPARSEREEL_PRODUCTS(4)
SPARSEREEL_PRODUCTS(5)
SPARSEREEL_PRODUCTS(6)
