/* Products of few rows with weights as they are stored, in bfloat16, float16 or float32: their time is the time in which
   the weights are read.

   y (n, outputs) = x (n, inputs) · W (outputs, inputs)ᵀ, summed in float32. A row of W lies in one piece, so the lanes of a
   vector are inputs side by side, and are summed at the end. A thread reads its rows of W at several places at once:
   memory answers sooner than at one.

   A row of W meets a row of x in the same order of operations whatever else is computed beside it: results depend
   neither on the number of threads nor on the number of rows. */

#include "kernels.h"

enum { ROWS = 8, STREAMS = 4, FEW = 2 }; /* rows of x at a time; places where W is read, for up to FEW rows of x and more */
enum { AHEAD = 2048 };                    /* how far ahead W is fetched, in bytes */

/* What a thread multiplies: `x` in the form that the variant reads, bfloat16 or float32. */
typedef struct {
    const void *x;
    const uint8_t *w;
    void *y;
    int64_t inputs, outputs;
    int dtype, stored; /* of y, and of W */
} Plain;

INLINE int64_t bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE float weight(const uint8_t *row, int stored, int64_t i) {
    return stored == FLOAT16 ? from_float16(((const uint16_t *)row)[i]) : read_number(row, stored, i);
}

/* ------------------------------------------------------------------------------------------------- portable C */

enum { LANES = 16 };

INLINE void portable_row(const uint8_t *w, const Plain *p, int64_t row, int rows, int stored, float *sums) {
    const float *x = (const float *)p->x + row * p->inputs;
    float lanes[ROWS][LANES] = {{0}}, weights[LANES];
    int64_t i = 0;
    for (; i + LANES <= p->inputs; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) weights[lane] = weight(w, stored, i + lane);
        for (int r = 0; r < rows; r++)
            for (int lane = 0; lane < LANES; lane++) lanes[r][lane] += weights[lane] * x[r * p->inputs + i + lane];
    }
    for (int r = 0; r < rows; r++) {
        for (int64_t last = i; last < p->inputs; last++)
            lanes[r][last - i] += weight(w, stored, last) * x[r * p->inputs + last];
        for (int half = LANES / 2; half; half /= 2)
            for (int lane = 0; lane < half; lane++) lanes[r][lane] += lanes[r][lane + half];
        sums[r] = lanes[r][0];
    }
}

static void portable_rows(const uint8_t *const *w, int streams, const Plain *p, int64_t row, int rows, float *sums) {
    for (int s = 0; s < streams; s++, sums += rows) {
        if (p->stored == BFLOAT16) portable_row(w[s], p, row, rows, BFLOAT16, sums);
        else if (p->stored == FLOAT16) portable_row(w[s], p, row, rows, FLOAT16, sums);
        else portable_row(w[s], p, row, rows, FLOAT32, sums);
    }
}

#if X86
/* ------------------------------------------------------------------------------------------------- AVX2 */

AVX2 INLINE __m256 avx2_weights(const uint8_t *row, int stored, int64_t i) {
    if (stored == FLOAT32) return _mm256_loadu_ps((const float *)row + i);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + i));
    if (stored == FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* The sums of the lanes of four vectors. */
AVX2 INLINE __m128 avx2_four(const __m256 *v) {
    __m256 both = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    return _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
}

AVX2 INLINE void avx2_rows(
    const uint8_t *const *w, int streams, const Plain *p, int64_t row, int rows, int stored, float *sums
) {
    const float *x = (const float *)p->x + row * p->inputs;
    const int64_t inputs = p->inputs, whole = inputs / 8 * 8, size = bytes_of(stored);
    __m256 sum[STREAMS * ROWS + 3];
    for (int k = 0; k < streams * rows + 3; k++) sum[k] = _mm256_setzero_ps();
    for (int64_t i = 0; i < whole; i += 8) {
        __m256 weights[STREAMS];
        for (int s = 0; s < streams; s++) {
            _mm_prefetch((const char *)w[s] + i * size + AHEAD, _MM_HINT_T0);
            weights[s] = avx2_weights(w[s], stored, i);
        }
        for (int r = 0; r < rows; r++) {
            __m256 numbers = _mm256_loadu_ps(x + r * inputs + i);
            for (int s = 0; s < streams; s++)
                sum[s * rows + r] = _mm256_fmadd_ps(weights[s], numbers, sum[s * rows + r]);
        }
    }
    float last[STREAMS * ROWS + 3];
    for (int k = 0; k < streams * rows; k += 4) _mm_storeu_ps(last + k, avx2_four(sum + k));
    for (int s = 0; s < streams; s++)
        for (int r = 0; r < rows; r++) {
            for (int64_t i = whole; i < inputs; i++) last[s * rows + r] += weight(w[s], stored, i) * x[r * inputs + i];
            sums[s * rows + r] = last[s * rows + r];
        }
}

/* ------------------------------------------------------------------------------------------------- AVX512 */

enum { ALL = -1 }; /* the mask of a whole vector; a part of one is read at the end of a row only */

AVX512 INLINE __m512 avx512_weights(const uint8_t *row, int stored, int64_t i, int there) {
    if (stored == FLOAT32) return there == ALL ? _mm512_loadu_ps((const float *)row + i)
                                               : _mm512_maskz_loadu_ps((__mmask16)there, (const float *)row + i);
    const uint16_t *from = (const uint16_t *)row + i;
    __m256i half = there == ALL ? _mm256_loadu_si256((const __m256i *)from) : _mm256_maskz_loadu_epi16((__mmask16)there, from);
    if (stored == FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* The sums of the lanes of four vectors. */
AVX512 INLINE __m128 avx512_four(const __m512 *v) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

AVX512 INLINE void avx512_sums(const __m512 *sum, int count, float *sums) {
    float four[4];
    for (int k = 0; k < count; k += 4) {
        _mm_storeu_ps(four, avx512_four(sum + k));
        for (int i = 0; i < 4 && k + i < count; i++) sums[k + i] = four[i];
    }
}

AVX512 INLINE void avx512_step(
    const uint8_t *const *w, int streams, const float *x, int64_t inputs, int64_t i, int rows, int stored, int there, __m512 *sum
) {
    __m512 weights[STREAMS];
    for (int s = 0; s < streams; s++) {
        _mm_prefetch((const char *)w[s] + i * bytes_of(stored) + AHEAD, _MM_HINT_T0);
        weights[s] = avx512_weights(w[s], stored, i, there);
    }
    for (int r = 0; r < rows; r++) {
        __m512 numbers = avx512_weights((const uint8_t *)(x + r * inputs), FLOAT32, i, there);
        for (int s = 0; s < streams; s++) sum[s * rows + r] = _mm512_fmadd_ps(weights[s], numbers, sum[s * rows + r]);
    }
}

AVX512 INLINE void avx512_rows(
    const uint8_t *const *w, int streams, const Plain *p, int64_t row, int rows, int stored, float *sums
) {
    const float *x = (const float *)p->x + row * p->inputs;
    __m512 sum[STREAMS * ROWS + 3];
    for (int k = 0; k < streams * rows + 3; k++) sum[k] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 16 <= p->inputs; i += 16) avx512_step(w, streams, x, p->inputs, i, rows, stored, ALL, sum);
    if (i < p->inputs) avx512_step(w, streams, x, p->inputs, i, rows, stored, (1 << (p->inputs - i)) - 1, sum);
    avx512_sums(sum, streams * rows, sums);
}

/* The same for W and x of bfloat16, by instructions that multiply pairs. */
AVX512_BF16 INLINE __m512bh bfloat16_pairs(const uint16_t *from, int there) {
    return (__m512bh)(there == ALL ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((__mmask32)there, from));
}

AVX512_BF16 INLINE void bfloat16_step(
    const uint8_t *const *w, int streams, const uint16_t *x, int64_t inputs, int64_t i, int rows, int there, __m512 *sum
) {
    __m512bh weights[STREAMS];
    for (int s = 0; s < streams; s++) {
        _mm_prefetch((const char *)w[s] + i * 2 + AHEAD, _MM_HINT_T0);
        weights[s] = bfloat16_pairs((const uint16_t *)w[s] + i, there);
    }
    for (int r = 0; r < rows; r++) {
        __m512bh numbers = bfloat16_pairs(x + r * inputs + i, there);
        for (int s = 0; s < streams; s++) sum[s * rows + r] = _mm512_dpbf16_ps(sum[s * rows + r], weights[s], numbers);
    }
}

AVX512_BF16 INLINE void bfloat16_rows(
    const uint8_t *const *w, int streams, const Plain *p, int64_t row, int rows, float *sums
) {
    const uint16_t *x = (const uint16_t *)p->x + row * p->inputs;
    __m512 sum[STREAMS * ROWS + 3];
    for (int k = 0; k < streams * rows + 3; k++) sum[k] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 32 <= p->inputs; i += 32) bfloat16_step(w, streams, x, p->inputs, i, rows, ALL, sum);
    if (i < p->inputs) bfloat16_step(w, streams, x, p->inputs, i, rows, (int)((1u << (p->inputs - i)) - 1), sum);
    avx512_sums(sum, streams * rows, sums);
}

/* Each number of rows and of streams, and each way in which W is stored, is code of its own. */
#define FOR_STORED(name, streams, rows) \
    if (p->stored == BFLOAT16) name(w, streams, p, row, rows, BFLOAT16, sums); \
    else if (p->stored == FLOAT16) name(w, streams, p, row, rows, FLOAT16, sums); \
    else name(w, streams, p, row, rows, FLOAT32, sums);
#define FOR_BOTH(name, streams, rows) name(w, streams, p, row, rows, sums);
#define CASE(each, name, rows, streams) case rows + streams * 16: each(name, streams, rows) break;
#define CASES(each, name, rows) CASE(each, name, rows, 1) CASE(each, name, rows, 2)
#define BY_SIZE(target, function, each, name) \
    target static void function( \
        const uint8_t *const *w, int streams, const Plain *p, int64_t row, int rows, float *sums \
    ) { \
        switch (rows + streams * 16) { \
            CASES(each, name, 1) CASES(each, name, 2) CASES(each, name, 3) CASES(each, name, 4) CASES(each, name, 5) \
            CASES(each, name, 6) CASES(each, name, 7) CASES(each, name, 8) CASE(each, name, 1, 4) CASE(each, name, 2, 4) \
        } \
    }

BY_SIZE(AVX2, avx2, FOR_STORED, avx2_rows)
BY_SIZE(AVX512, avx512, FOR_STORED, avx512_rows)
BY_SIZE(AVX512_BF16, avx512_bf16, FOR_BOTH, bfloat16_rows)
#endif

/* ------------------------------------------------------------------------------------------------- what Python calls */

/* Whether x of bfloat16 is multiplied as it is. */
INLINE int as_it_is(int dtype, int stored, int variant) {
    return dtype == FLOAT32 || (variant >= (ARM ? USES_BF16 : USES_AVX512_BF16) && stored == BFLOAT16);
}

/* `streams` rows of W, the first ones of as many parts of W, against all n rows of x. */
static void some_rows(const Plain *p, int64_t first, int64_t apart, int streams, int64_t n, int variant) {
    const uint8_t *w[STREAMS];
    for (int s = 0; s < streams; s++) w[s] = p->w + (first + s * apart) * p->inputs * bytes_of(p->stored);
    int together = n > FEW && streams > 2 ? 2 : streams; /* so that sums are in registers */
    for (int begin = 0; begin < streams; begin += together)
        for (int64_t row = 0; row < n; row += ROWS) {
            int rows = n - row < ROWS ? (int)(n - row) : ROWS;
            float sums[STREAMS * ROWS];
#if X86
            if (p->dtype == BFLOAT16 && as_it_is(BFLOAT16, p->stored, variant))
                avx512_bf16(w + begin, together, p, row, rows, sums);
            else if (variant >= USES_AVX512) avx512(w + begin, together, p, row, rows, sums);
            else if (variant == USES_AVX2) avx2(w + begin, together, p, row, rows, sums);
            else
#elif ARM
            int pairs = p->dtype == BFLOAT16 && as_it_is(BFLOAT16, p->stored, variant);
            const uint8_t *own = (const uint8_t *)p->x + row * p->inputs * (pairs ? 2 : 4);
            if (variant >= USES_NEON) llama_arm_rows(w + begin, together, own, p->inputs, rows, p->stored, pairs, sums);
            else
#endif
                portable_rows(w + begin, together, p, row, rows, sums);
            for (int s = 0; s < together; s++)
                for (int r = 0; r < rows; r++)
                    write_number(p->y, p->dtype, (row + r) * p->outputs + first + (begin + s) * apart, sums[s * rows + r]);
        }
}

/* Bytes of the workspace that a product of n rows needs. */
int64_t llama_plain_workspace(int64_t n, int64_t inputs, int dtype, int stored, int variant) {
    return as_it_is(dtype, stored, variant) ? 0 : 64 + n * inputs * 4;
}

/* y (n, outputs) = x (n, inputs) · W (outputs, inputs)ᵀ, x and y of `dtype`, W `stored` as bfloat16, float16 or float32. */
void llama_plain_product(
    const void *x, const uint8_t *w, void *y, uint8_t *workspace, int64_t n, int64_t inputs, int64_t outputs, int dtype,
    int stored, int variant, int threads
) {
    Plain p = {x, w, y, inputs, outputs, dtype, stored};
    if (!as_it_is(dtype, stored, variant)) {
        float *wide = (float *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
        for (int64_t i = 0; i < n * inputs; i++) wide[i] = from_bfloat16(((const uint16_t *)x)[i]);
        p.x = wide;
    }
    int64_t share = (outputs + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int thread = 0; thread < threads; thread++) {
        int64_t begin = thread * share, end = begin + share < outputs ? begin + share : outputs;
        int64_t apart = end > begin ? (end - begin) / STREAMS : 0;
        for (int64_t row = begin; row < begin + apart; row++) some_rows(&p, row, apart, STREAMS, n, variant);
        for (int64_t row = begin + apart * STREAMS; row < end; row++) some_rows(&p, row, 0, 1, n, variant);
    }
}
