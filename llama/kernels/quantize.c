/* Weights as they are stored → int8 or int4 with a float16 scale for each group of inputs, as quantization/quantize.py
   defines it, at the speed at which the file can be read. A group's result does not depend on what else is quantised. */

#include "kernels.h"

static const float SMALLEST = 0x1p-24f, LARGEST = 65504; /* of the float16 numbers above 0 */
/* The parts of an int4 group's range that its scale may cover: see quantization/quantize.py. */
static const float STRETCHES[] = {1.0, 0.96, 0.92, 0.88, 0.84, 0.8};
enum { NOT_A_NUMBER = 0x7e00 };

/* To the nearest, ties to even; for 2⁻²⁴ ≤ |value| ≤ 65504. */
INLINE uint16_t to_float16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size < 0x38800000) return (uint16_t)(sign | (uint32_t)rintf(fabsf(value) * 0x1p24f)); /* below 2⁻¹⁴ */
    return (uint16_t)(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}

/* A scale as it is stored: never 0, nor beyond what float16 holds. */
INLINE uint16_t as_stored(float scale) {
    if (fabsf(scale) < SMALLEST) return 1;
    return to_float16(scale > LARGEST ? LARGEST : scale < -LARGEST ? -LARGEST : scale);
}

/* q: a group divided by its scale, rounded and limited to low … high. Returns the sum of squared errors. */
INLINE float round_group(const float *group, float scale, float low, float high, float *q) {
    float inverse = 1.0f / scale, error = 0;
#pragma omp simd reduction(+ : error)
    for (int i = 0; i < GROUP; i++) {
        float nearest = rintf(group[i] * inverse);
        nearest = nearest < low ? low : nearest > high ? high : nearest;
        float off = nearest * scale - group[i];
        q[i] = nearest;
        error += off * off;
    }
    return error;
}

/* The scale of an int4 group with the least error; the first of equals. */
INLINE uint16_t best_scale(const float *group, float largest) {
    float q[GROUP], least = INFINITY;
    uint16_t best = as_stored(largest / -8);
    for (int i = 0; i < (int)(sizeof STRETCHES / sizeof *STRETCHES); i++) {
        uint16_t scale = as_stored(largest * (-STRETCHES[i] / 8));
        float error = round_group(group, from_float16(scale), -8, 7, q);
        if (error < least) least = error, best = scale;
    }
    return best;
}

/* One group → GROUP integers as they are stored; returns its scale, NaN where a weight is not finite. */
INLINE uint16_t quantize_group(const void *from, int dtype, int64_t first, int format, uint8_t *to) {
    float group[GROUP], q[GROUP], high = 0, low = 0, zero = 0;
#pragma omp simd reduction(max : high) reduction(min : low) reduction(+ : zero)
    for (int i = 0; i < GROUP; i++) {
        group[i] = read_number(from, dtype, first + i);
        high = group[i] > high ? group[i] : high;
        low = group[i] < low ? group[i] : low;
        zero += group[i] * 0.0f; /* NaN and infinities times 0 are NaN */
    }
    if (!(zero == 0)) memset(group, 0, sizeof group);
    float largest = -low > high ? low : high;
    uint16_t scale = format == INT8 ? as_stored(fabsf(largest) / 127) : best_scale(group, largest);
    round_group(group, from_float16(scale), format == INT8 ? -127 : -8, format == INT8 ? 127 : 7, q);
    if (format == INT8)
        for (int i = 0; i < GROUP; i++) to[i] = (uint8_t)(int8_t)q[i];
    else
        for (int i = 0; i < GROUP / 2; i++) to[i] = (uint8_t)(((int)q[i] + 8) | ((int)q[i + GROUP / 2] + 8) << 4);
    return zero == 0 ? scale : NOT_A_NUMBER;
}

INLINE void some_groups(const void *from, uint8_t *q, uint16_t *scales, int64_t begin, int64_t end, int dtype, int format) {
    for (int64_t group = begin; group < end; group++)
        scales[group] =
            quantize_group(from, dtype, group * GROUP, format, q + group * (format == INT8 ? GROUP : GROUP / 2));
}

#define QUANTIZE(target, name) \
    target static void name(const void *from, uint8_t *q, uint16_t *scales, int64_t begin, int64_t end, int dtype, \
                            int format) { \
        if (format == INT8) some_groups(from, q, scales, begin, end, dtype, INT8); \
        else if (dtype == BFLOAT16) some_groups(from, q, scales, begin, end, BFLOAT16, INT4); \
        else some_groups(from, q, scales, begin, end, FLOAT32, INT4); \
    }

QUANTIZE(, portable)
#if X86
QUANTIZE(AVX2, avx2)
QUANTIZE(AVX512, avx512)
#endif

/* `groups` groups of numbers of `dtype` → their integers and scales. */
void llama_quantize(
    const void *from, uint8_t *q, uint16_t *scales, int64_t groups, int dtype, int format, int variant, int threads
) {
    enum { PART = 1024 };
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t begin = 0; begin < groups; begin += PART) {
        int64_t end = begin + PART < groups ? begin + PART : groups;
#if X86
        if (variant >= USES_AVX512) { avx512(from, q, scales, begin, end, dtype, format); continue; }
        if (variant == USES_AVX2) { avx2(from, q, scales, begin, end, dtype, format); continue; }
#endif
        portable(from, q, scales, begin, end, dtype, format);
    }
}
