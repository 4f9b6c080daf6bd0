/* Products with weights as they are stored, in bfloat16, float16 or float32.

   y (n, outputs) = x (n, inputs) · W (outputs, inputs)ᵀ, summed in float32. A row of W lies in one piece, so the lanes of a
   vector are inputs side by side, and are summed at the end. The time of a few rows of x is that in which W is read: a
   thread reads it at several places at once, as memory answers sooner so than at one. Many rows take time to compute: a
   part of W that stays in the cache meets all of them, a tile of rows of both at a time, whose sums are in registers.

   A row of W meets a row of x in the same order of operations whatever else is computed beside it: results depend
   neither on the number of threads nor on the number of rows. */

#include "kernels.h"

enum { ROWS = 8, STREAMS = 4 };                        /* the most rows of x, and of W, at a time */
enum { FEW = 2, MOST_FEW = 16 };                       /* rows of x that are read as they lie; for which W is read at places */
enum { TALL = 6, AVX2_STREAMS = 3, AVX2_TALL = 4 };    /* a tile's rows of x, and of W and x where there are 16 registers */
enum { NEAR = 1 << 19, PIECE = 1 << 18 };              /* bytes of W that stay in the cache for all rows of x; of a piece */
enum { MOST_TIMES = 16, LINE = STREAMS * MOST_TIMES }; /* of a strip, and the most sums of it for a row of x */
enum { AHEAD = 3072, AHEAD_NEAR = 8192 };              /* how far ahead W is fetched, in bytes: at several places, at one */

/* Rows of W that are multiplied one time after the other, some at each time: the s-th of time t begins at byte
   t · step + s · apart of `w`. There are LINE sums for each row of x, those of time t from t · streams on. */
typedef struct {
    const uint8_t *w;
    int64_t apart, step, ahead;
    int times;
} Strip;

INLINE int64_t bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE float weight(const uint8_t *row, int stored, int64_t i) {
    return stored == FLOAT16 ? from_float16(((const uint16_t *)row)[i]) : read_number(row, stored, i);
}

/* ------------------------------------------------------------------------------------------------- portable C */

enum { LANES = 16 };

INLINE void portable_row(const uint8_t *w, const Plain *p, int64_t row, int rows, int stored, float *sums) {
    const float *x = (const float *)p->x + row * p->stride;
    float lanes[ROWS][LANES] = {{0}}, weights[LANES];
    int64_t i = 0;
    for (; i + LANES <= p->inputs; i += LANES) {
        for (int lane = 0; lane < LANES; lane++) weights[lane] = weight(w, stored, i + lane);
        for (int r = 0; r < rows; r++)
            for (int lane = 0; lane < LANES; lane++) lanes[r][lane] += weights[lane] * x[r * p->stride + i + lane];
    }
    for (int r = 0; r < rows; r++) {
        for (int64_t last = i; last < p->inputs; last++)
            lanes[r][last - i] += weight(w, stored, last) * x[r * p->stride + last];
        for (int half = LANES / 2; half; half /= 2)
            for (int lane = 0; lane < half; lane++) lanes[r][lane] += lanes[r][lane + half];
        sums[r] = lanes[r][0];
    }
}

static void portable_rows(const Plain *p, const Strip *strip, int streams, int64_t row, int rows, float *sums) {
    float own[ROWS];
    for (int t = 0; t < strip->times; t++, sums += streams)
        for (int s = 0; s < streams; s++) {
            const uint8_t *w = strip->w + t * strip->step + s * strip->apart;
            if (p->stored == BFLOAT16) portable_row(w, p, row, rows, BFLOAT16, own);
            else if (p->stored == FLOAT16) portable_row(w, p, row, rows, FLOAT16, own);
            else portable_row(w, p, row, rows, FLOAT32, own);
            for (int r = 0; r < rows; r++) sums[r * LINE + s] = own[r];
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
    const Plain *p, const Strip *strip, int streams, int64_t row, int rows, int stored, float *sums
) {
    const float *x = (const float *)p->x + row * p->stride;
    const int64_t inputs = p->inputs, whole = inputs / 8 * 8, size = bytes_of(stored), stride = p->stride;
    const uint8_t *w = strip->w;
    for (int t = 0; t < strip->times; t++, w += strip->step, sums += streams) {
        __m256 sum[STREAMS * ROWS + 3];
#pragma GCC unroll 35
        for (int k = 0; k < streams * rows + 3; k++) sum[k] = _mm256_setzero_ps();
        for (int64_t i = 0; i < whole; i += 8) {
            __m256 weights[STREAMS];
            for (int s = 0; s < streams; s++) {
                FETCH(w + s * strip->apart + i * size + strip->ahead);
                weights[s] = avx2_weights(w + s * strip->apart, stored, i);
            }
            for (int r = 0; r < rows; r++) {
                __m256 numbers = _mm256_loadu_ps(x + r * stride + i);
                for (int s = 0; s < streams; s++)
                    sum[r * streams + s] = _mm256_fmadd_ps(weights[s], numbers, sum[r * streams + s]);
            }
        }
        float last[STREAMS * ROWS + 3];
#pragma GCC unroll 8
        for (int k = 0; k < streams * rows; k += 4) _mm_storeu_ps(last + k, avx2_four(sum + k));
        for (int r = 0; r < rows; r++)
            for (int s = 0; s < streams; s++) {
                for (int64_t i = whole; i < inputs; i++)
                    last[r * streams + s] += weight(w + s * strip->apart, stored, i) * x[r * stride + i];
                sums[r * LINE + s] = last[r * streams + s];
            }
    }
}

/* ------------------------------------------------------------------------------------------------- AVX512 */

enum { ALL = 0 };
#define WHOLE(there) (__builtin_constant_p(there) && (there) == ALL)

/* `there` masks the numbers of a vector that belong to the row, which are ALL but in its last one. */
AVX512 INLINE __m512 avx512_weights(const uint8_t *row, int stored, int64_t i, int there) {
    if (stored == FLOAT32) return WHOLE(there) ? _mm512_loadu_ps((const float *)row + i)
                                               : _mm512_maskz_loadu_ps((__mmask16)there, (const float *)row + i);
    const uint16_t *from = (const uint16_t *)row + i;
    __m256i half = WHOLE(there) ? _mm256_loadu_si256((const __m256i *)from) : _mm256_maskz_loadu_epi16((__mmask16)there, from);
    if (stored == FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* The mask of `left` numbers of a vector, at least 1. */
INLINE int mask_of(int64_t left) { return (int)(UINT32_MAX >> (32 - left)); }

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

/* Sum k is of stream k % streams and row k / streams. */
AVX512 INLINE void avx512_sums(const __m512 *sum, int streams, int rows, float *sums) {
#pragma GCC unroll 8
    for (int k = 0; k < streams * rows; k += 4) {
        float four[4];
        _mm_storeu_ps(streams == 4 ? sums + k / 4 * LINE : four, avx512_four(sum + k));
        for (int i = 0; i < 4 && streams != 4 && k + i < streams * rows; i++)
            sums[(k + i) / streams * LINE + (k + i) % streams] = four[i];
    }
}

AVX512 INLINE void avx512_step(
    const uint8_t *w, int64_t apart, int64_t ahead, int streams, const float *x, int64_t stride, int64_t i, int rows,
    int stored, int there, __m512 *sum
) {
    __m512 weights[STREAMS];
    for (int s = 0; s < streams; s++) {
        if (streams != STREAMS || rows != TALL) FETCH(w + s * apart + i * bytes_of(stored) + ahead);
        weights[s] = avx512_weights(w + s * apart, stored, i, there);
    }
    for (int r = 0; r < rows; r++) {
        __m512 numbers = avx512_weights((const uint8_t *)(x + r * stride), FLOAT32, i, there);
        for (int s = 0; s < streams; s++) sum[r * streams + s] = _mm512_fmadd_ps(weights[s], numbers, sum[r * streams + s]);
    }
}

/* The same for W and x of bfloat16, by instructions that multiply pairs. */
AVX512_BF16 INLINE __m512bh bfloat16_pairs(const uint16_t *from, int there) {
    return (__m512bh)(WHOLE(there) ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((__mmask32)there, from));
}

AVX512_BF16 INLINE void bfloat16_step(
    const uint8_t *w, int64_t apart, int64_t ahead, int streams, const uint16_t *x, int64_t stride, int64_t i, int rows,
    int stored, int there, __m512 *sum
) {
    (void)stored;
    __m512bh weights[STREAMS];
    for (int s = 0; s < streams; s++) {
        if (streams != STREAMS || rows != TALL) FETCH(w + s * apart + i * 2 + ahead);
        weights[s] = bfloat16_pairs((const uint16_t *)(w + s * apart) + i, there);
    }
    for (int r = 0; r < rows; r++) {
        __m512bh numbers = bfloat16_pairs(x + r * stride + i, there);
        for (int s = 0; s < streams; s++) sum[r * streams + s] = _mm512_dpbf16_ps(sum[r * streams + s], weights[s], numbers);
    }
}

/* Whole rows, `width` inputs at a step. The last step is masked also where it is whole: a branch would move sums to memory. */
#define ROWS_OF(target, name, Number, width, step_of) \
    target INLINE void name( \
        const Plain *p, const Strip *strip, int streams, int64_t row, int rows, int stored, float *sums \
    ) { \
        const Number *x = (const Number *)p->x + row * p->stride; \
        const int64_t apart = strip->apart, ahead = strip->ahead, stride = p->stride; \
        const uint8_t *w = strip->w; \
        for (int t = 0; t < strip->times; t++, w += strip->step, sums += streams) { \
            __m512 sum[STREAMS * ROWS + 3]; \
            int64_t i = 0; \
            _Pragma("GCC unroll 35") for (int k = 0; k < streams * rows + 3; k++) sum[k] = _mm512_setzero_ps(); \
            for (; i < p->inputs - width; i += width) \
                step_of(w, apart, ahead, streams, x, stride, i, rows, stored, ALL, sum); \
            step_of(w, apart, ahead, streams, x, stride, i, rows, stored, mask_of(p->inputs - i), sum); \
            avx512_sums(sum, streams, rows, sums); \
        } \
    }
ROWS_OF(AVX512, avx512_rows, float, 16, avx512_step)
ROWS_OF(AVX512_BF16, bfloat16_rows, uint16_t, 32, bfloat16_step)

/* Each number of rows and of streams, and each way in which W is stored, is code of its own. */
#define FOR_STORED(name, streams, rows) \
    if (p->stored == BFLOAT16) name(p, strip, streams, row, rows, BFLOAT16, sums); \
    else if (p->stored == FLOAT16) name(p, strip, streams, row, rows, FLOAT16, sums); \
    else name(p, strip, streams, row, rows, FLOAT32, sums);
#define FOR_PAIRS(name, streams, rows) name(p, strip, streams, row, rows, BFLOAT16, sums);
#define CASE(each, name, rows, streams) case rows + streams * 16: each(name, streams, rows) break;
#define CASES(each, name, rows) CASE(each, name, rows, 1)
#define BY_SIZE(target, function, each, name, MORE) \
    target static void function( \
        const Plain *p, const Strip *strip, int streams, int64_t row, int rows, float *sums \
    ) { \
        switch (rows + streams * 16) { \
            CASES(each, name, 1) CASES(each, name, 2) CASES(each, name, 3) CASES(each, name, 4) CASES(each, name, 5) \
            CASES(each, name, 6) CASES(each, name, 7) CASES(each, name, 8) CASE(each, name, 1, 4) CASE(each, name, 2, 4) \
            MORE(each, name) \
        } \
    }

#define MORE_OF_3(each, name) CASE(each, name, 1, 3) CASE(each, name, 2, 3) CASE(each, name, 3, 3) CASE(each, name, 4, 3)
#define MORE_OF_4(each, name) \
    MORE_OF_3(each, name) CASE(each, name, 5, 3) CASE(each, name, 6, 3) CASE(each, name, 7, 3) CASE(each, name, 8, 3) \
    CASE(each, name, 3, 4) CASE(each, name, 4, 4) CASE(each, name, 5, 4) CASE(each, name, 6, 4)
BY_SIZE(AVX2, avx2, FOR_STORED, avx2_rows, MORE_OF_3)
BY_SIZE(AVX512, avx512, FOR_STORED, avx512_rows, MORE_OF_4)
BY_SIZE(AVX512_BF16, avx512_bf16, FOR_PAIRS, bfloat16_rows, MORE_OF_4)
#endif

/* ------------------------------------------------------------------------------------------------- what Python calls */

/* Whether x of bfloat16 is multiplied as it is, two numbers at once. */
int llama_multiplies_pairs(int stored, int variant) {
    return variant >= (ARM ? USES_BF16 : USES_AVX512_BF16) && stored == BFLOAT16;
}

/* Whether x is multiplied as it is. */
static int as_it_is(int dtype, int stored, int variant) {
    return dtype == FLOAT32 || llama_multiplies_pairs(stored, variant);
}

/* A row of x in the form that the variant reads. */
static void copy_row(const void *x, uint8_t *copy, int64_t row, const Plain *p, int as_is) {
    int64_t size = bytes_of(p->dtype);
    if (as_is) memcpy(copy + row * p->stride * size, (const uint8_t *)x + row * p->inputs * size, p->inputs * size);
    else
        for (int64_t i = 0; i < p->inputs; i++)
            ((float *)copy)[row * p->stride + i] = from_bfloat16(((const uint16_t *)x)[row * p->inputs + i]);
}

/* `times` times `streams` rows of W, the first of which is `first`: those of a time are `apart` rows from each other, and
   `step` from the next time's. */
typedef struct {
    int64_t first, apart, step;
    int times, streams;
} Place;

/* The sums of a strip → their places in y. */
INLINE void write_sums(const Plain *p, const Place *at, int64_t row, int rows, const float *sums, int dtype) {
    const int streams = at->streams, count = at->times * streams;
    for (int r = 0; r < rows; r++) {
        const float *line = sums + r * LINE;
        int64_t to = (row + r) * p->outputs + at->first;
        if (at->apart == 1 || streams == 1)
#pragma omp simd
            for (int i = 0; i < count; i++) write_number(p->y, dtype, to + i, line[i]);
        else
            for (int i = 0; i < count; i++)
                write_number(p->y, dtype, to + i / streams * at->step + i % streams * at->apart, line[i]);
    }
}

#define WRITE(target, name) \
    target static void name(const Plain *p, const Place *at, int64_t row, int rows, const float *sums) { \
        if (p->dtype == BFLOAT16) write_sums(p, at, row, rows, sums, BFLOAT16); \
        else write_sums(p, at, row, rows, sums, FLOAT32); \
    }
WRITE(, write_portable)
#if X86
WRITE(AVX2, write_avx2)
WRITE(AVX512, write_avx512)
#endif

#if ARM
static void arm_strip(const Plain *p, const Strip *strip, int streams, int64_t row, int rows, float *sums) {
    const uint8_t *x = (const uint8_t *)p->x + row * p->stride * (p->pairs ? 2 : 4), *w[STREAMS];
    float own[STREAMS * ROWS];
    for (int t = 0; t < strip->times; t++, sums += streams) {
        for (int s = 0; s < streams; s++) w[s] = strip->w + t * strip->step + s * strip->apart;
        llama_arm_rows(w, streams, x, p->stride, p->inputs, rows, p->stored, p->pairs, own);
        for (int s = 0; s < streams; s++)
            for (int r = 0; r < rows; r++) sums[r * LINE + s] = own[s * rows + r];
    }
}
#endif

/* The sums of a strip against rows row … row + rows − 1 of x. */
static void strip_sums(const Plain *p, const Place *at, int64_t row, int rows, int variant, float *sums) {
    int64_t bytes = p->inputs * bytes_of(p->stored);
    int64_t ahead = at->apart == 1 ? AHEAD_NEAR : AHEAD;
    const Strip own = {p->w + at->first * bytes, at->apart * bytes, at->step * bytes, ahead, at->times};
#if X86
    if (variant >= USES_AVX512) {
        if (p->pairs) avx512_bf16(p, &own, at->streams, row, rows, sums);
        else avx512(p, &own, at->streams, row, rows, sums);
        return;
    }
    if (variant == USES_AVX2) {
        avx2(p, &own, at->streams, row, rows, sums);
        return;
    }
#endif
#if ARM
    if (variant >= USES_NEON) arm_strip(p, &own, at->streams, row, rows, sums);
    else
#endif
        portable_rows(p, &own, at->streams, row, rows, sums);
}

static void write_strip(const Plain *p, const Place *at, int64_t row, int rows, int variant, const float *sums) {
#if X86
    if (variant >= USES_AVX512) write_avx512(p, at, row, rows, sums);
    else if (variant == USES_AVX2) write_avx2(p, at, row, rows, sums);
    else
#endif
        write_portable(p, at, row, rows, sums);
}

INLINE int at_most(int64_t number, int most) { return number < most ? (int)number : most; }

/* Rows of W side by side that many rows of x meet at a time, and a number of them that stays near. */
static int near_streams(int64_t n, int variant) { return n == 1 ? 1 : variant == USES_AVX2 ? AVX2_STREAMS : ARM ? 2 : STREAMS; }

static int64_t near_rows(const Plain *p, int64_t n, int variant) {
    int streams = near_streams(n, variant);
    return NEAR / (p->inputs * bytes_of(p->stored)) / streams * streams + streams;
}

/* Rows begin … end of W against many rows of x: what of W is near meets all of x, TALL rows at a time, which stay nearer. */
void llama_multiply_near(const Plain *p, int64_t begin, int64_t end, int64_t n, int variant) {
    const int streams = near_streams(n, variant);
    const int64_t most = near_rows(p, n, variant);
    int tall = variant == USES_AVX2 ? AVX2_TALL : TALL;
    float sums[ROWS * LINE];
    for (int64_t first = begin; first < end; first += most) {
        int64_t stop = end - first < most ? end : first + most;
        for (int64_t row = 0; row < n; row += tall) {
            int rows = at_most(n - row, tall);
            Place at = {first, 1, streams, 0, streams};
            for (; at.first + streams <= stop; at.first += at.times * streams) {
                at.times = at_most((stop - at.first) / streams, MOST_TIMES);
                strip_sums(p, &at, row, rows, variant, sums);
                write_strip(p, &at, row, rows, variant, sums);
            }
            const Place last = {at.first, 0, 1, (int)(stop - at.first), 1};
            if (last.times) {
                strip_sums(p, &last, row, rows, variant, sums);
                write_strip(p, &last, row, rows, variant, sums);
            }
        }
    }
}

/* Numbers from one row of a copy of x to the next: an odd number of cache lines, so that the same inputs of many rows are
   not in the same places of the cache. */
static int64_t copied_stride(int64_t inputs, int64_t size) {
    int64_t per_line = 64 / size;
    return ((inputs + per_line - 1) / per_line | 1) * per_line;
}

/* Bytes of the workspace that a product of n rows needs: for a copy of x, unless a row or two are multiplied as they are. */
int64_t llama_plain_workspace(int64_t n, int64_t inputs, int dtype, int stored, int variant) {
    int as_is = as_it_is(dtype, stored, variant);
    int64_t size = as_is ? bytes_of(dtype) : 4;
    return as_is && n <= FEW ? 0 : 64 + n * copied_stride(inputs, size) * size;
}

/* How a thread's share of a part of W is read for few rows of x, as from memory: at several places, whose rows are `apart` from
   each other, and in pieces of so many times, each of which goes on where the one before it ended. */
typedef struct {
    int streams, times;
} Reading;

static Reading reading_of(const Plain *p, int64_t n, int variant) {
    int streams = n <= FEW || (n <= ROWS / 2 && variant != USES_AVX2 && !ARM) ? STREAMS : ARM ? 2 : 3; /* as registers allow */
    return (Reading){streams, at_most(PIECE / (streams * p->inputs * bytes_of(p->stored)) + 1, MOST_TIMES)};
}

/* Rows of W in a piece: few rows of x meet as much as is read in one go, many what stays near. */
static int64_t piece_rows(const Plain *p, int64_t n, int variant) {
    if (n > MOST_FEW) return near_rows(p, n, variant);
    const Reading reading = reading_of(p, n, variant);
    return reading.streams * reading.times;
}

/* Pieces of each thread's share of so many rows of W, at least one. */
static int64_t pieces_of(int64_t rows, int64_t in_a_piece, int threads) {
    int64_t share = (rows + threads - 1) / threads;
    return share < in_a_piece ? 1 : (share + in_a_piece - 1) / in_a_piece;
}

/* The sums of a piece of a share, rows begin … end of W, are computed, and written if nobody else has done so. */
static void few_rows(const Plain *p, int64_t begin, int64_t end, int64_t index, int is_last, int64_t n, int variant,
                     Team *team, int64_t piece, int64_t per) {
    const Reading reading = reading_of(p, n, variant);
    const int most = variant == USES_AVX2 ? AVX2_TALL : ROWS;
    const int64_t apart = (end - begin) / reading.streams, from = index * reading.times, left = begin + apart * reading.streams;
    const Place places[2] = {{begin + from, apart, 1, from < apart ? at_most(apart - from, reading.times) : 0, reading.streams},
                             {left, 0, 1, is_last ? (int)(end - left) : 0, 1}};
    float sums[2][MOST_FEW * LINE];
    for (int i = 0; i < 2; i++)
        for (int64_t row = 0; row < n && places[i].times; row += most)
            strip_sums(p, places + i, row, at_most(n - row, most), variant, sums[i] + row * LINE);
    if (!llama_keep(team, piece)) return;
    for (int i = 0; i < 2; i++)
        for (int64_t row = 0; row < n && places[i].times; row += most)
            write_strip(p, places + i, row, at_most(n - row, most), variant, sums[i] + row * LINE);
    llama_done(team, per);
}

/* What a thread does of a product with W in parts, each stored in the one way that `format` says. */
void llama_multiply_plain(const Product *product, Team *team) {
    const int64_t n = product->n, inputs = product->inputs;
    const int dtype = product->dtype, stored = product->format - AS_STORED, variant = product->variant;
    const int as_is = as_it_is(dtype, stored, variant), copied = !as_is || n > FEW;
    const int64_t size = as_is ? bytes_of(dtype) : 4, stride = copied ? copied_stride(inputs, size) : inputs;
    uint8_t *copy = (uint8_t *)(((uintptr_t)product->workspace + 63) & ~(uintptr_t)63);
    Plain p = {copied ? copy : product->x, 0, 0, inputs, product->outputs, stride, dtype, stored, as_is && dtype == BFLOAT16};
    if (copied) {
        KEPT_PIECES(share, team, 1) {
            for (int64_t row = n * share / team->threads; row < n * (share + 1) / team->threads; row++)
                copy_row(product->x, copy, row, &p, as_is);
        }
    }
    const int64_t in_a_piece = piece_rows(&p, n, variant);
    int64_t per = 0, done = 0;
    for (const Part *part = product->w; done < product->outputs; done += part++->rows)
        per += pieces_of(part->rows, in_a_piece, team->threads);
    PIECES(piece, team, per) {
        const Part *part = product->w;
        int64_t share = piece / per, index = piece % per, pieces, before = 0;
        for (; index >= (pieces = pieces_of(part->rows, in_a_piece, team->threads)); before += part++->rows) index -= pieces;
        int64_t begin = part->rows * share / team->threads, end = part->rows * (share + 1) / team->threads;
        p.w = part->w;
        p.y = (uint8_t *)product->y + before * bytes_of(dtype);
        if (n <= MOST_FEW) few_rows(&p, begin, end, index, index == pieces - 1, n, variant, team, piece, per);
        else if (llama_keep(team, piece)) {
            int64_t first = begin + index * in_a_piece;
            if (first < end) llama_multiply_near(&p, first, first + in_a_piece < end ? first + in_a_piece : end, n, variant);
            llama_done(team, per);
        }
    }
}
