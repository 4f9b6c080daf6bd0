/* What plain.c and quantized.c multiply with on ARM64. NEON is on every such processor; `dotprod` has dot products of four
   int8; `bf16` has those of two bfloat16, and `i8mm`, which comes with it, products of small matrices of int8. All this
   ran under an emulator only: how fast it is, is not known.

   As in the other variants, a row of W meets a row of x in the same order of operations whatever else is computed. */

#include "kernels.h"

#if ARM
#include <arm_neon.h>

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

/* How a function is compiled for instructions that not every processor has. A file that is compiled for them as a whole
   (on Apple's processors, or with -march) needs nothing. Clang before 16 knows their intrinsics in such files only. */
#if defined(__clang__) && defined(__ARM_FEATURE_QRDMX)
#define WITH(features) __attribute__((target(features))) /* adds to ARMv8.1 or what more the file is compiled for */
#else
#define WITH(features) __attribute__((target("arch=armv8.2-a" features)))
#endif
#if defined(__clang__)
#define KNOWN (__clang_major__ >= 16)
#elif defined(__ARM_FEATURE_QRDMX) || defined(__ARM_FEATURE_CRYPTO) /* GCC cannot add to an -march that was given */
#define KNOWN 0
#else
#define KNOWN (__GNUC__ >= 10)
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#define DOTPROD
#elif KNOWN
#define DOTPROD WITH("+dotprod")
#endif
#if defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && defined(__ARM_FEATURE_MATMUL_INT8)
#define BF16
#elif KNOWN
#define BF16 WITH("+dotprod+bf16+i8mm")
#endif

#if defined(DOTPROD)
enum { KNOWS_DOTPROD = 1 };
#else
enum { KNOWS_DOTPROD = 0 };
#endif
#if defined(BF16)
enum { KNOWS_BF16 = 1 };
#else
enum { KNOWS_BF16 = 0 };
#endif

/* ------------------------------------------------------------------------------------------------- the processor */

#if defined(__linux__)
enum { HAS_DOTPROD = 1 << 20, HAS_BF16 = 3 << 13 }; /* bits of AT_HWCAP and AT_HWCAP2, which old headers do not name */
static int has_dotprod(void) { return (getauxval(AT_HWCAP) & HAS_DOTPROD) != 0; }
static int has_bf16(void) { return (getauxval(AT_HWCAP2) & HAS_BF16) == HAS_BF16; }
#elif defined(__APPLE__)
static int has(const char *feature) {
    int there = 0;
    size_t size = sizeof there;
    return sysctlbyname(feature, &there, &size, 0, 0) == 0 && there;
}
static int has_dotprod(void) { return has("hw.optional.arm.FEAT_DotProd"); }
static int has_bf16(void) { return has("hw.optional.arm.FEAT_BF16") && has("hw.optional.arm.FEAT_I8MM"); }
#else
static int has_dotprod(void) { return 0; }
static int has_bf16(void) { return 0; }
#endif

/* The best variant that this processor has. */
int llama_arm_variant(void) {
    if (!KNOWS_DOTPROD || !has_dotprod()) return USES_NEON;
    return KNOWS_BF16 && has_bf16() ? USES_BF16 : USES_DOTPROD;
}

/* ------------------------------------------------------------------------------------- weights as they are stored */

enum { STREAMS = 4, TOGETHER = 4 }; /* rows of W, and rows of x, of which the sums fit the registers: see plain.c */
#define UNROLLED _Pragma("GCC unroll 16") /* early, or sums go through memory */
enum { STEP = 8, PAIRS_STEP = 16 }; /* inputs of two vectors of sums, as numbers and as pairs */

INLINE int bytes_of(int stored) { return stored == FLOAT32 ? 4 : 2; }

/* Eight numbers in float32. */
INLINE float32x4x2_t eight(const void *row, int stored, int64_t i) {
    float32x4x2_t all;
    if (stored == FLOAT32) {
        all.val[0] = vld1q_f32((const float *)row + i);
        all.val[1] = vld1q_f32((const float *)row + i + 4);
        return all;
    }
    uint16x8_t halves = vld1q_u16((const uint16_t *)row + i), zeros = vdupq_n_u16(0);
    if (stored == FLOAT16) {
        all.val[0] = vcvt_f32_f16(vget_low_f16(vreinterpretq_f16_u16(halves)));
        all.val[1] = vcvt_high_f32_f16(vreinterpretq_f16_u16(halves));
    } else { /* bfloat16 is the upper half of float32 */
        all.val[0] = vreinterpretq_f32_u16(vzip1q_u16(zeros, halves));
        all.val[1] = vreinterpretq_f32_u16(vzip2q_u16(zeros, halves));
    }
    return all;
}

/* STEP inputs of `streams` rows of W and `rows` rows of x. */
INLINE void step(
    const uint8_t *const *w, int streams, const void *x, int64_t stride, int64_t i, int rows, int stored,
    float32x4_t (*sum)[2]
) {
    float32x4x2_t weights[STREAMS];
    UNROLLED for (int s = 0; s < streams; s++) weights[s] = eight(w[s], stored, i);
    UNROLLED for (int r = 0; r < rows; r++) {
        float32x4x2_t numbers = eight((const float *)x + r * stride, FLOAT32, i);
        UNROLLED for (int s = 0; s < streams; s++)
            UNROLLED for (int half = 0; half < 2; half++)
                sum[s * rows + r][half] = vfmaq_f32(sum[s * rows + r][half], weights[s].val[half], numbers.val[half]);
    }
}

#if defined(BF16)
/* PAIRS_STEP inputs, where W and x are bfloat16. */
BF16 INLINE void pairs_step(
    const uint8_t *const *w, int streams, const void *x, int64_t stride, int64_t i, int rows, int stored,
    float32x4_t (*sum)[2]
) {
    (void)stored;
    UNROLLED for (int half = 0; half < 2; half++, i += PAIRS_STEP / 2) {
        bfloat16x8_t weights[STREAMS];
        UNROLLED for (int s = 0; s < streams; s++)
            weights[s] = vreinterpretq_bf16_u16(vld1q_u16((const uint16_t *)w[s] + i));
        UNROLLED for (int r = 0; r < rows; r++) {
            bfloat16x8_t numbers = vreinterpretq_bf16_u16(vld1q_u16((const uint16_t *)x + r * stride + i));
            UNROLLED for (int s = 0; s < streams; s++)
                sum[s * rows + r][half] = vbfdotq_f32(sum[s * rows + r][half], weights[s], numbers);
        }
    }
}
#endif

/* Whole rows, by steps of `width` inputs, and the last inputs by one more with zeros behind them. The sums of a stream are
   `apart` numbers from the next one's. */
#define ROWS_OF(target, name, step_of, width, Number) \
    target INLINE void name( \
        const uint8_t *const *w, int streams, const void *x, int64_t stride, int64_t inputs, int rows, int stored, int apart, \
        float *sums \
    ) { \
        float32x4_t sum[STREAMS * TOGETHER][2]; \
        UNROLLED for (int k = 0; k < streams * rows; k++) sum[k][0] = sum[k][1] = vdupq_n_f32(0); \
        int64_t i = 0; \
        for (; i + width <= inputs; i += width) step_of(w, streams, x, stride, i, rows, stored, sum); \
        if (i < inputs) { \
            uint8_t weights[STREAMS][width * sizeof(float)] = {{0}}; \
            const uint8_t *last[STREAMS]; \
            Number numbers[TOGETHER * width] = {0}; \
            for (int s = 0; s < streams; s++) \
                last[s] = memcpy(weights[s], w[s] + i * bytes_of(stored), (inputs - i) * bytes_of(stored)); \
            for (int r = 0; r < rows; r++) \
                memcpy(numbers + r * width, (const Number *)x + r * stride + i, (inputs - i) * sizeof(Number)); \
            step_of(last, streams, numbers, width, 0, rows, stored, sum); \
        } \
        UNROLLED for (int s = 0; s < streams; s++) \
            UNROLLED for (int r = 0; r < rows; r++) \
                sums[s * apart + r] = vaddvq_f32(vaddq_f32(sum[s * rows + r][0], sum[s * rows + r][1])); \
    }

/* Each number of rows and of streams is code of its own. */
#define ROWS_CASE(name, stored, rows, streams) \
    case rows + streams * 8: name(w, streams, x, stride, inputs, rows, stored, apart, sums); break;
#define ROWS_BY_SIZE(target, function, name, stored) \
    target static void function( \
        const uint8_t *const *w, int streams, const void *x, int64_t stride, int64_t inputs, int rows, int apart, float *sums \
    ) { \
        switch (rows + streams * 8) { \
            ROWS_CASE(name, stored, 1, 1) ROWS_CASE(name, stored, 2, 1) ROWS_CASE(name, stored, 3, 1) \
            ROWS_CASE(name, stored, 4, 1) ROWS_CASE(name, stored, 1, 2) ROWS_CASE(name, stored, 2, 2) \
            ROWS_CASE(name, stored, 3, 2) ROWS_CASE(name, stored, 4, 2) ROWS_CASE(name, stored, 1, 4) \
            ROWS_CASE(name, stored, 2, 4) \
        } \
    }

ROWS_OF(, number_rows, step, STEP, float)
ROWS_BY_SIZE(, float32_rows, number_rows, FLOAT32)
ROWS_BY_SIZE(, bfloat16_rows, number_rows, BFLOAT16)
ROWS_BY_SIZE(, float16_rows, number_rows, FLOAT16)
#if defined(BF16)
ROWS_OF(BF16, pairs_of_rows, pairs_step, PAIRS_STEP, uint16_t)
ROWS_BY_SIZE(BF16, pair_rows, pairs_of_rows, BFLOAT16)
#endif

/* sums (streams, rows): rows of W against rows of x, which are `stride` numbers apart, up to 8 of float32, or of bfloat16 where `pairs` says so; up to 4
   streams for 1 or 2 rows, 1 or 2 for more. */
void llama_arm_rows(
    const uint8_t *const *w, int streams, const void *x, int64_t stride, int64_t inputs, int rows, int stored, int pairs, float *sums
) {
    for (int begin = 0; begin < rows; begin += TOGETHER) {
        const uint8_t *own = (const uint8_t *)x + begin * stride * (pairs ? 2 : 4);
        int some = rows - begin < TOGETHER ? rows - begin : TOGETHER;
#if defined(BF16)
        if (pairs) pair_rows(w, streams, own, stride, inputs, some, rows, sums + begin);
        else
#endif
        if (stored == FLOAT32) float32_rows(w, streams, own, stride, inputs, some, rows, sums + begin);
        else if (stored == BFLOAT16) bfloat16_rows(w, streams, own, stride, inputs, some, rows, sums + begin);
        else float16_rows(w, streams, own, stride, inputs, some, rows, sums + begin);
    }
}

/* ------------------------------------------------------------------------------------------------- packed weights */

enum { LANES = 4, FOURS = GROUP / 4 }; /* rows of W in a vector; fours of inputs in a group */

/* A group of LANES rows of W, four inputs of each in a vector; int4 shifted by 8. */
INLINE void read_group(const uint8_t *w, int format, int8x16_t *weights) {
    for (int k = 0; k < group_bytes(format) / 64; k++) {
        uint8x16_t both = vld1q_u8(w + k * 64);
        weights[k] = vreinterpretq_s8_u8(format == INT8 ? both : vandq_u8(both, vdupq_n_u8(15)));
        if (format == INT4) weights[k + FOURS / 2] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
    }
}

/* Where a group's sums begin: int8 has no offset here. */
INLINE int32x4_t start_of(const Rows *x, int64_t at, int format) {
    return vdupq_n_s32(format == INT8 ? 0 : x->start[at]);
}

/* A group's sums of products, added to `dot`. Products of int8 fit 16 bits, and so do sums of two of them; of int4, sums
   of all eight. */
INLINE int32x4_t neon_dot(const int8x16_t *weights, const int8_t *q, int32x4_t dot, int format) {
    const int fit = format == INT8 ? 2 : FOURS;
    int32x4_t low = vdupq_n_s32(0), high = vdupq_n_s32(0);
    for (int k = 0; k < FOURS; k += fit) {
        int16x8_t products_low = vdupq_n_s16(0), products_high = vdupq_n_s16(0);
        for (int i = k; i < k + fit; i++) {
            int32_t four;
            memcpy(&four, q + i * 4, 4);
            int8x8_t numbers = vreinterpret_s8_s32(vdup_n_s32(four));
            products_low = vmlal_s8(products_low, vget_low_s8(weights[i]), numbers);
            products_high = vmlal_s8(products_high, vget_high_s8(weights[i]), numbers);
        }
        low = vpadalq_s16(low, products_low);
        high = vpadalq_s16(high, products_high);
    }
    return vaddq_s32(dot, vpaddq_s32(low, high));
}

#if defined(DOTPROD)
DOTPROD INLINE int32x4_t dotprod_dot(const int8x16_t *weights, const int8_t *q, int32x4_t dot, int format) {
    (void)format;
    for (int half = 0; half < 2; half++, weights += FOURS / 2) {
        int8x16_t numbers = vld1q_s8(q + half * 16);
        dot = vdotq_laneq_s32(dot, weights[0], numbers, 0);
        dot = vdotq_laneq_s32(dot, weights[1], numbers, 1);
        dot = vdotq_laneq_s32(dot, weights[2], numbers, 2);
        dot = vdotq_laneq_s32(dot, weights[3], numbers, 3);
    }
    return dot;
}
#endif

/* The first `vectors` · LANES rows of a block against `rows` rows of x. */
#define LANES_OF(target, name, dot_of) \
    target INLINE void name( \
        const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int vectors, int rows, int format, float *y \
    ) { \
        float32x4_t sum[BLOCK_ROWS / LANES][8]; \
        for (int v = 0; v < vectors; v++) \
            for (int n = 0; n < rows; n++) sum[v][n] = vdupq_n_f32(0); \
        for (int64_t group = 0; group < x->groups; group++, w += group_bytes(format), scales += BLOCK_ROWS) \
            for (int v = 0; v < vectors; v++) { \
                int8x16_t weights[FOURS]; \
                read_group(w + v * LANES * 4, format, weights); \
                float32x4_t scale = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(scales + v * LANES))); \
                for (int n = 0; n < rows; n++) { \
                    int64_t at = (row + n) * x->groups + group; \
                    int32x4_t dot = dot_of(weights, x->q + at * GROUP, start_of(x, at, format), format); \
                    sum[v][n] = vfmaq_f32(sum[v][n], vcvtq_f32_s32(dot), vmulq_n_f32(scale, x->scale[at])); \
                } \
            } \
        for (int v = 0; v < vectors; v++) \
            for (int n = 0; n < rows; n++) vst1q_f32(y + n * BLOCK_ROWS + v * LANES, sum[v][n]); \
    }

/* A block, by whole ones for up to 4 rows of x and by halves for more, so that the sums fit the registers. */
#define BLOCK_CASE(name, rows, vectors) \
    case rows * 2: name(w, scales, x, row, vectors, rows, INT8, y); break; \
    case rows * 2 + 1: name(w, scales, x, row, vectors, rows, INT4, y); break;
#define BLOCK_BY_SIZE(target, function, name) \
    target static void function( \
        const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int rows, int format, float *y \
    ) { \
        switch (rows * 2 + format) { \
            BLOCK_CASE(name, 1, 4) BLOCK_CASE(name, 2, 4) BLOCK_CASE(name, 3, 4) BLOCK_CASE(name, 4, 4) \
            BLOCK_CASE(name, 5, 2) BLOCK_CASE(name, 6, 2) BLOCK_CASE(name, 7, 2) BLOCK_CASE(name, 8, 2) \
        } \
    }

LANES_OF(, neon_lanes, neon_dot)
BLOCK_BY_SIZE(, neon_block, neon_lanes)
#if defined(DOTPROD)
LANES_OF(DOTPROD, dotprod_lanes, dotprod_dot)
BLOCK_BY_SIZE(DOTPROD, dotprod_block, dotprod_lanes)
#endif

#if defined(BF16)
/* The same by products of 2 × 8 integers with 8 × 2, for rows of x in pairs; one that is left over goes as it does alone.
   Integer sums are exact, and float32 sums are made in the same order, so a row's results are the same in either way. */
BF16 INLINE void pairs_of_lanes(
    const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int vectors, int rows, int format, float *y
) {
    const int pairs = rows / 2, alone = rows % 2;
    float32x4_t sum[BLOCK_ROWS / LANES][4][2], last[BLOCK_ROWS / LANES]; /* two rows of W by two of x; four by one */
    for (int v = 0; v < vectors; v++) {
        for (int pair = 0; pair < pairs; pair++) sum[v][pair][0] = sum[v][pair][1] = vdupq_n_f32(0);
        last[v] = vdupq_n_f32(0);
    }
    for (int64_t group = 0; group < x->groups; group++, w += group_bytes(format), scales += BLOCK_ROWS)
        for (int v = 0; v < vectors; v++) {
            int8x16_t weights[FOURS];
            read_group(w + v * LANES * 4, format, weights);
            float32x4_t scale = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(scales + v * LANES)));
            if (alone) {
                int64_t at = (row + rows - 1) * x->groups + group;
                int32x4_t dot = dotprod_dot(weights, x->q + at * GROUP, start_of(x, at, format), format);
                last[v] = vfmaq_f32(last[v], vcvtq_f32_s32(dot), vmulq_n_f32(scale, x->scale[at]));
            }
            int8x16_t eights[2][FOURS / 2]; /* eight inputs of two rows of W, and of the next two */
            for (int k = 0; k < FOURS / 2; k++) {
                int32x4_t a = vreinterpretq_s32_s8(weights[k * 2]), b = vreinterpretq_s32_s8(weights[k * 2 + 1]);
                eights[0][k] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
                eights[1][k] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
            }
            const float32x4_t wide[2] = {vzip1q_f32(scale, scale), vzip2q_f32(scale, scale)};
            for (int pair = 0; pair < pairs; pair++) {
                int64_t at = (row + pair * 2) * x->groups + group * 2; /* of both: see quantized.c */
                float32x2_t own = vld1_f32(x->scale + at);
                int32x2_t start = format == INT8 ? vdup_n_s32(0) : vld1_s32(x->start + at);
                int32x4_t dot[2] = {vcombine_s32(start, start), vcombine_s32(start, start)};
                for (int k = 0; k < FOURS / 2; k++) {
                    int8x16_t numbers = vld1q_s8(x->q + at * GROUP + k * 16);
                    for (int two = 0; two < 2; two++) dot[two] = vmmlaq_s32(dot[two], eights[two][k], numbers);
                }
                for (int two = 0; two < 2; two++)
                    sum[v][pair][two] = vfmaq_f32(sum[v][pair][two], vcvtq_f32_s32(dot[two]),
                                                  vmulq_f32(wide[two], vcombine_f32(own, own)));
            }
        }
    for (int v = 0; v < vectors; v++, y += LANES) {
        for (int pair = 0; pair < pairs; pair++) {
            vst1q_f32(y + pair * 2 * BLOCK_ROWS, vuzp1q_f32(sum[v][pair][0], sum[v][pair][1]));
            vst1q_f32(y + (pair * 2 + 1) * BLOCK_ROWS, vuzp2q_f32(sum[v][pair][0], sum[v][pair][1]));
        }
        if (alone) vst1q_f32(y + (rows - 1) * BLOCK_ROWS, last[v]);
    }
}
BLOCK_BY_SIZE(BF16, pairs_block, pairs_of_lanes)
#endif

/* y (rows, BLOCK_ROWS): a block of W of int8 or int4 against `rows` rows of x, 8 at most. */
void llama_arm_block(
    const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int rows, int format, int variant, float *y
) {
    for (int first = 0; first < BLOCK_ROWS; first += rows > 4 ? BLOCK_ROWS / 2 : BLOCK_ROWS)
#if defined(BF16)
        if (variant >= USES_BF16) pairs_block(w + first * 4, scales + first, x, row, rows, format, y + first);
        else
#endif
#if defined(DOTPROD)
        if (variant >= USES_DOTPROD) dotprod_block(w + first * 4, scales + first, x, row, rows, format, y + first);
        else
#endif
            neon_block(w + first * 4, scales + first, x, row, rows, format, y + first);
    (void)variant;
}
#endif
