/* The small operations of a step, one call each: RMSNorm, RoPE with the write to the cache, attention of single queries,
   SwiGLU's product. In PyTorch they cost dozens of calls, not arithmetic. Results are rounded where PyTorch rounds them. */

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

/* One token: RoPE writes its query heads to q (H, D) and its keys to the cache; its values are copied to the cache. */
INLINE void rope_row(
    const void *heads, const float *freqs_cis, void *q, void *keys, void *values, int64_t row, int64_t place,
    int64_t stride, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int dtype
) {
    int64_t width = (n_heads + 2 * n_kv_heads) * head_dim;
    for (int64_t head = 0; head < n_heads + n_kv_heads; head++) {
        int64_t from = row * width + head * head_dim, kv = head - n_heads;
        void *to = kv < 0 ? q : keys;
        int64_t at = kv < 0 ? (row * n_heads + head) * head_dim : kv * stride + place * head_dim;
        for (int64_t i = 0; i < head_dim; i += 2) {
            float a = read_number(heads, dtype, from + i), b = read_number(heads, dtype, from + i + 1);
            float c = freqs_cis[i], s = freqs_cis[i + 1];
            write_number(to, dtype, at + i, a * c - b * s);
            write_number(to, dtype, at + i + 1, a * s + b * c);
        }
    }
    int64_t size = dtype == BFLOAT16 ? 2 : 4;
    for (int64_t kv = 0; kv < n_kv_heads; kv++)
        memcpy((char *)values + (kv * stride + place * head_dim) * size,
               (const char *)heads + (row * width + (n_heads + n_kv_heads + kv) * head_dim) * size, head_dim * size);
}

/* ------------------------------------------------------------------------------------------------- attention */

/* The query heads of one kv head of one token against the first `length` keys and values of its slot. `scores` has room
   for `length` numbers. */
INLINE void attend(
    const void *q, const void *keys, const void *values, void *out, int64_t first, int64_t slot, int64_t length,
    int64_t heads, int64_t head_dim, float *scores, int dtype
) {
    float query[MAX_HEAD_DIM], sum[MAX_HEAD_DIM];
    for (int64_t head = 0; head < heads; head++) {
        int64_t at = first + head * head_dim;
        float scale = 1.0f / sqrtf((float)head_dim), largest = -INFINITY, total = 0;
        for (int64_t i = 0; i < head_dim; i++) query[i] = read_number(q, dtype, at + i) * scale;
        for (int64_t p = 0; p < length; p++) {
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < head_dim; i++) dot += query[i] * read_number(keys, dtype, slot + p * head_dim + i);
            scores[p] = dot;
            largest = dot > largest ? dot : largest;
        }
#pragma omp simd reduction(+ : total)
        for (int64_t p = 0; p < length; p++) {
            scores[p] = exponential(scores[p] - largest);
            total += scores[p];
        }
        for (int64_t i = 0; i < head_dim; i++) sum[i] = 0;
        for (int64_t p = 0; p < length; p++) {
            float share = scores[p] / total;
#pragma omp simd
            for (int64_t i = 0; i < head_dim; i++) sum[i] += share * read_number(values, dtype, slot + p * head_dim + i);
        }
        for (int64_t i = 0; i < head_dim; i++) write_number(out, dtype, at + i, sum[i]);
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
                                     int64_t place, int64_t stride, int64_t h, int64_t kv, int64_t dim, int dt) { \
        PER_DTYPE(rope_row(heads, freqs_cis, q, k, v, row, place, stride, h, kv, dim, D), dt) \
    } \
    target static void attend_##suffix(const void *q, const void *k, const void *v, void *out, int64_t first, \
                                       int64_t slot, int64_t length, int64_t heads, int64_t dim, float *scores, int dt) { \
        if (dim == 64) { PER_DTYPE(attend(q, k, v, out, first, slot, length, heads, 64, scores, D), dt) } \
        else if (dim == 128) { PER_DTYPE(attend(q, k, v, out, first, slot, length, heads, 128, scores, D), dt) } \
        else { PER_DTYPE(attend(q, k, v, out, first, slot, length, heads, dim, scores, D), dt) } \
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

/* ------------------------------------------------------------------------------------------------- what Python calls */

/* y (n, dim) = x / √(mean x² + eps) · weight. */
void llama_rms_norm(const void *x, const void *weight, void *y, int64_t n, int64_t dim, float eps, int dtype, int variant,
                    int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && n >= threads * 4)
    for (int64_t row = 0; row < n; row++) CALL(norm, x, weight, y, row * dim, dim, eps, dtype);
}

/* heads (n, H + 2K, D), freqs_cis (n, D): cosine, sine, cosine, … → q (n, H, D); keys and values go to the token rows
   `places` of the cache (K, rows, D), whose heads are `stride` numbers apart. */
void llama_rope(
    const void *heads, const float *freqs_cis, void *q, void *keys, void *values, const int64_t *places, int64_t n,
    int64_t stride, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int dtype, int variant, int threads
) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && n >= threads * 4)
    for (int64_t row = 0; row < n; row++)
        CALL(rope, heads, freqs_cis + row * head_dim, q, keys, values, row, places[row], stride, n_heads, n_kv_heads,
             head_dim, dtype);
}

/* Single queries: row `rows[i]` of q and out (·, H, D) looks at the first lengths[i] positions that begin at token row
   starts[i] of the cache. `scores` has room for `longest` numbers for each thread. */
void llama_attend(
    const void *q, const void *keys, const void *values, void *out, const int64_t *rows, const int64_t *starts,
    const int64_t *lengths, float *scores, int64_t n, int64_t longest, int64_t stride, int64_t n_heads,
    int64_t n_kv_heads, int64_t head_dim, int dtype, int variant, int threads
) {
    int64_t per = n_heads / n_kv_heads, size = dtype == BFLOAT16 ? 2 : 4, tasks = n * n_kv_heads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++)
        for (int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; task++) {
            int64_t i = task / n_kv_heads, kv = task % n_kv_heads;
            int64_t slot = kv * stride + starts[i] * head_dim;
            CALL(attend, q, (const char *)keys + slot * size, (const char *)values + slot * size, out,
                 (rows[i] * n_heads + kv * per) * head_dim, 0, lengths[i], per, head_dim, scores + thread * longest, dtype);
        }
}

/* both (n, 2F) → silu(first half) · second half (n, F). */
void llama_silu_and_mul(const void *both, void *y, int64_t n, int64_t hidden, int dtype, int variant, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        int64_t total = n * hidden, begin = total * thread / threads, end = total * (thread + 1) / threads;
        for (int64_t row = begin / hidden; row * hidden < end; row++) {
            int64_t from = begin > row * hidden ? begin - row * hidden : 0;
            int64_t to = end - row * hidden < hidden ? end - row * hidden : hidden;
            CALL(silu_and_mul, both, y, row, from, to, hidden, dtype);
        }
    }
}
