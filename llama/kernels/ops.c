/* The small operations of a step, one call each: RMSNorm, RoPE with the write to the cache, SwiGLU's
   product. In PyTorch they cost dozens of calls, not arithmetic. Results are rounded where PyTorch rounds them. */

#include "kernels.h"

INLINE float rounded(float value, int dtype) {
    return dtype == BFLOAT16 ? from_bfloat16(to_bfloat16(value)) : value;
}

/* ------------------------------------------------------------------------------------------------- RMSNorm */

INLINE void norm_row(const void *x, const void *weight, void *y, int64_t first, int64_t dim, float eps, int dtype) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; i++) {
        float value = read_number(x, dtype, first + i);
        sum += value * value;
    }
    float scale = 1.0f / sqrtf(sum / (float)dim + eps);
#pragma omp simd
    for (int64_t i = 0; i < dim; i++) {
        float value = rounded(read_number(x, dtype, first + i) * scale, dtype);
        write_number(y, dtype, first + i, value * read_number(weight, dtype, i));
    }
}

/* ------------------------------------------------------------------------------------------------- RoPE, cache */

/* To the nearest of float8 (e4m3), ties to even, and no further than its range; NaN stays NaN. */
INLINE uint8_t to_float8(float value) {
    uint32_t bits;
    float size = fabsf(value) > 448.0f ? 448.0f : fabsf(value);
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 24 & 0x80, small = (uint32_t)(int32_t)rintf(size * 512.0f); /* below 2⁻⁶ */
    memcpy(&bits, &size, 4);
    uint32_t normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    return (uint8_t)(sign | (value != value ? 0x7f : size < 0x1p-6f ? small : normal));
}

/* A number of `dtype` → a cache. */
INLINE void store_number(void *to, int stored, int dtype, int64_t i, float value) {
    if (stored == FLOAT8) ((uint8_t *)to)[i] = to_float8(rounded(value, dtype));
    else write_number(to, stored, i, value);
}

/* One token: RoPE writes its query heads to q (H, D) and its keys to the cache; its values are copied to the cache. */
INLINE void rope_row(
    const void *heads, const float *freqs_cis, void *q, void *keys, void *values, int64_t row, int64_t place,
    int64_t stride, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int dtype, int stored
) {
    int64_t width = (n_heads + 2 * n_kv_heads) * head_dim;
    for (int64_t head = 0; head < n_heads + n_kv_heads; head++) {
        int64_t from = row * width + head * head_dim, kv = head - n_heads;
        int64_t at = kv < 0 ? (row * n_heads + head) * head_dim : kv * stride + place * head_dim;
        for (int64_t i = 0; i < head_dim; i += 2) {
            float a = read_number(heads, dtype, from + i), b = read_number(heads, dtype, from + i + 1);
            float c = freqs_cis[i], s = freqs_cis[i + 1], first = a * c - b * s, second = a * s + b * c;
            if (kv < 0) write_number(q, dtype, at + i, first), write_number(q, dtype, at + i + 1, second);
            else store_number(keys, stored, dtype, at + i, first), store_number(keys, stored, dtype, at + i + 1, second);
        }
    }
    for (int64_t kv = 0; kv < n_kv_heads; kv++) {
        int64_t from = row * width + (n_heads + n_kv_heads + kv) * head_dim, at = kv * stride + place * head_dim;
        for (int64_t i = 0; i < head_dim; i++) store_number(values, stored, dtype, at + i, read_number(heads, dtype, from + i));
    }
}

/* ------------------------------------------------------------------------------------------------- SwiGLU */

INLINE void silu_and_mul_row(
    const void *both, void *y, int64_t row, int64_t begin, int64_t end, int64_t hidden, int dtype
) {
#pragma omp simd
    for (int64_t i = begin; i < end; i++) {
        float gate = read_number(both, dtype, row * 2 * hidden + i);
        float up = read_number(both, dtype, row * 2 * hidden + hidden + i);
        float silu = rounded(gate / (1.0f + exponential(-gate)), dtype);
        write_number(y, dtype, row * hidden + i, silu * up);
    }
}

/* ------------------------------------------------------------------------------------------------- variants */

/* Each operation compiled for bfloat16 and float32, and for the vectors that the processor has. */
#define PER_DTYPE(call, dtype) \
    if (dtype == BFLOAT16) { const int D = BFLOAT16; call; } else { const int D = FLOAT32; call; }

#define VARIANTS(target, suffix) \
    target static void norm_##suffix(const void *x, const void *w, void *y, int64_t at, int64_t dim, float eps, int dt) { \
        PER_DTYPE(norm_row(x, w, y, at, dim, eps, D), dt) \
    } \
    target static void rope_##suffix(const void *heads, const float *freqs_cis, void *q, void *k, void *v, int64_t row, \
                                     int64_t place, int64_t stride, int64_t h, int64_t kv, int64_t dim, int dt, int stored) { \
        if (stored == FLOAT8) { \
            PER_DTYPE(rope_row(heads, freqs_cis, q, k, v, row, place, stride, h, kv, dim, D, FLOAT8), dt) \
        } else { PER_DTYPE(rope_row(heads, freqs_cis, q, k, v, row, place, stride, h, kv, dim, D, D), dt) } \
    } \
    target static void silu_and_mul_##suffix(const void *both, void *y, int64_t row, int64_t begin, int64_t end, \
                                             int64_t hidden, int dt) { \
        PER_DTYPE(silu_and_mul_row(both, y, row, begin, end, hidden, D), dt) \
    }

VARIANTS(, portable)
#if X86
VARIANTS(AVX2, avx2)
VARIANTS(AVX512, avx512)
#define CALL(name, ...) \
    do { \
        if (variant >= USES_AVX512) name##_avx512(__VA_ARGS__); \
        else if (variant == USES_AVX2) name##_avx2(__VA_ARGS__); \
        else name##_portable(__VA_ARGS__); \
    } while (0)
#else
#define CALL(name, ...) name##_portable(__VA_ARGS__)
#endif

/* ------------------------------------------------------------------------------------------------- a thread's share */

void llama_norm_rows(
    const void *x, const void *weight, void *y, int64_t begin, int64_t end, int64_t dim, float eps, int dtype, int variant
) {
    for (int64_t row = begin; row < end; row++) CALL(norm, x, weight, y, row * dim, dim, eps, dtype);
}

void llama_rope_rows(const Rope *r, int64_t begin, int64_t end, int variant) {
    for (int64_t row = begin; row < end; row++)
        CALL(rope, r->heads, r->freqs_cis + row * r->head_dim, r->q, r->keys, r->values, row, r->places[row], r->stride,
             r->n_heads, r->n_kv_heads, r->head_dim, r->dtype, r->stored);
}

void llama_silu_and_mul_share(const void *both, void *y, int64_t n, int64_t hidden, int dtype, int variant, int thread,
                              int threads) {
    int64_t total = n * hidden, begin = total * thread / threads, end = total * (thread + 1) / threads;
    for (int64_t row = begin / hidden; row * hidden < end; row++) {
        int64_t from = begin > row * hidden ? begin - row * hidden : 0;
        int64_t to = end - row * hidden < hidden ? end - row * hidden : hidden;
        CALL(silu_and_mul, both, y, row, from, to, hidden, dtype);
    }
}

/* ------------------------------------------------------------------------------------------------- what Python calls */

void llama_rms_norm(const void *x, const void *weight, void *y, int64_t n, int64_t dim, float eps, int dtype, int variant,
                    int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && n >= threads * 4)
    for (int64_t row = 0; row < n; row++) llama_norm_rows(x, weight, y, row, row + 1, dim, eps, dtype, variant);
}

void llama_rope(
    const void *heads, const float *freqs_cis, void *q, void *keys, void *values, const int64_t *places, int64_t n,
    int64_t stride, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int dtype, int stored, int variant, int threads
) {
    const Rope rope = {heads, freqs_cis, q, keys, values, places, stride, n_heads, n_kv_heads, head_dim, dtype, stored};
#pragma omp parallel for num_threads(threads) if (threads > 1 && n >= threads * 4)
    for (int64_t row = 0; row < n; row++) llama_rope_rows(&rope, row, row + 1, variant);
}

void llama_silu_and_mul(const void *both, void *y, int64_t n, int64_t hidden, int dtype, int variant, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++)
        llama_silu_and_mul_share(both, y, n, hidden, dtype, variant, thread, threads);
}
