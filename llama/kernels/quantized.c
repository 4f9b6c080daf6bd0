/* Products of activations with int8, int4 and bfloat16 weights, for steps of few rows: their time is the time in which
   the weights are read.

   y (n, outputs) = x (n, inputs) · W (outputs, inputs)ᵀ. Each GROUP of inputs of a row of W has a float16 scale. The
   activations are rounded to int8 with a scale of their own for each group (symmetric), so that a group is one integer
   dot product: y = Σ over groups of scale_w · scale_x · Σ q_w q_x. Some instructions want unsigned weights: an offset is
   added to the weights then, and the sum of integers starts at −offset · Σ q_x, which takes it off again.

   W is packed: BLOCK_ROWS rows form a block. Of each group of a block, four inputs of all rows lie side by side in 64
   bytes. int4 has inputs 4 k … 4 k + 3 in the low and 4 k + 16 … in the high halves of these bytes; bfloat16 has two
   inputs in 64 bytes, not four. So each lane of a vector is one row, no sum goes across lanes, and a thread reads its
   blocks from memory in one go. The last block may be padded.

   A row of W meets a row of x in the same order of operations whatever else is computed beside it: results depend
   neither on the number of threads nor on the number of rows. All variants are compiled; the processor's own is chosen
   when the program runs. */

#include "kernels.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { ROWS = 8, BLOCKS = 4 };                 /* rows of x, and blocks of W for few of them, at a time */
enum { AHEAD = 2048, AHEAD_INT8 = 4 * AHEAD }; /* how far ahead W is fetched, in bytes: the fastest by measurement */
enum { FEW = 16, FEW_PLAIN = 2 };              /* rows of x up to which vectors are faster than tiles */
enum { PIECE = 1 << 18, MOST_BLOCKS = 16 };    /* bytes of a piece, as a rule, and its most blocks */

/* ------------------------------------------------------------------------------------- the activations, as int8 */

/* One group: its integers, their sum, and its scale, which is NaN where a number is not finite. */
INLINE float quantize_group(const void *x, int dtype, int64_t first, int8_t *q, int32_t *sum) {
    float group[GROUP], largest = 0, zero = 0;
    int32_t total = 0, rounded[GROUP];
#pragma omp simd
    for (int i = 0; i < GROUP; i++) group[i] = read_number(x, dtype, first + i);
#pragma omp simd reduction(max : largest) reduction(+ : zero)
    for (int i = 0; i < GROUP; i++) {
        float size = fabsf(group[i]);
        largest = size > largest ? size : largest;
        zero += group[i] * 0.0f;
    }
    float inverse = largest > 1e-30f && zero == 0 ? 127.0f / largest : 0;
    if (!(zero == 0)) memset(group, 0, sizeof group); /* NaN and infinities times 0 are NaN */
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < GROUP; i++) {
        float scaled = group[i] * inverse;
        rounded[i] = (int32_t)(scaled + copysignf(0.5f, scaled));
        total += rounded[i];
    }
#pragma omp simd
    for (int i = 0; i < GROUP; i++) q[i] = (int8_t)rounded[i];
    *sum = total;
    return (largest > 1e-30f ? largest / 127.0f : 0) + zero;
}

INLINE void prepare_row(const void *x, int dtype, int64_t row, const Rows *to, int offset) {
    for (int64_t group = 0; group < to->groups; group++) {
        int32_t sum;
        int8_t own[GROUP];
        int64_t from = row * to->inputs + group * GROUP, at = row * to->groups + group, other = row % 2;
        if (ARM && row < to->paired) {
            at += group - other * (to->groups - 1); /* beside the other row's */
            to->scale[at] = quantize_group(x, dtype, from, own, &sum);
            for (int i = 0; i < GROUP; i += 8) memcpy(to->q + (at - other) * GROUP + i * 2 + other * 8, own + i, 8);
        } else to->scale[at] = quantize_group(x, dtype, from, to->q + at * GROUP, &sum);
        to->start[at] = -offset * sum;
    }
}

/* ------------------------------------------------------------------------------------------------- plain C */

/* A block of W against one row of x. */
static void portable_block(const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int format, float *y) {
    float sum[BLOCK_ROWS] = {0};
    for (int64_t group = 0; group < x->groups; group++, w += group_bytes(format), scales += BLOCK_ROWS) {
        const int8_t *q = x->q + (row * x->groups + group) * GROUP;
        float scale = x->scale[row * x->groups + group];
        int32_t dot[BLOCK_ROWS];
        for (int lane = 0; lane < BLOCK_ROWS; lane++) dot[lane] = x->start[row * x->groups + group];
        for (int i = 0; i < GROUP; i++)
            for (int lane = 0; lane < BLOCK_ROWS; lane++) dot[lane] += weight_at(w, format, lane, i) * q[i];
        for (int lane = 0; lane < BLOCK_ROWS; lane++) sum[lane] += from_float16(scales[lane]) * scale * (float)dot[lane];
    }
    memcpy(y, sum, sizeof sum);
}

/* ------------------------------------------------------------------------------------------------- AVX2 */

#if X86
/* Half a block, 8 rows of W, against `rows` rows of x. */
AVX2 INLINE void avx2_half(
    const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int rows, int format, float *y
) {
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
    __m256 sum[2];
    for (int n = 0; n < rows; n++) sum[n] = _mm256_setzero_ps();
    for (int64_t group = 0; group < x->groups; group++, w += group_bytes(format), scales += BLOCK_ROWS) {
        __m256i dot[2];
        FETCH(w + 2 * AHEAD);
        for (int n = 0; n < rows; n++) dot[n] = _mm256_setzero_si256();
        for (int k = 0; k < group_bytes(format) / 64; k++) {
            __m256i weights = _mm256_loadu_si256((const __m256i *)(w + k * 64));
            __m256i high = _mm256_and_si256(_mm256_srli_epi16(weights, 4), low);
            for (int n = 0; n < rows; n++) {
                const int32_t *q = (const int32_t *)(x->q + ((row + n) * x->groups + group) * GROUP) + k;
                if (format == INT8) {
                    __m256i signs = _mm256_sign_epi8(_mm256_set1_epi32(*q), weights);
                    __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), signs);
                    dot[n] = _mm256_add_epi32(dot[n], _mm256_madd_epi16(products, ones));
                } else { /* sums of 8 products of two fit 16 bits */
                    __m256i products = _mm256_maddubs_epi16(_mm256_and_si256(weights, low), _mm256_set1_epi32(q[0]));
                    products = _mm256_add_epi16(products, _mm256_maddubs_epi16(high, _mm256_set1_epi32(q[4])));
                    dot[n] = _mm256_add_epi16(dot[n], products);
                }
            }
        }
        __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)scales));
        for (int n = 0; n < rows; n++) {
            int64_t at = (row + n) * x->groups + group;
            if (format == INT4) dot[n] = _mm256_madd_epi16(dot[n], ones);
            __m256i whole = _mm256_add_epi32(dot[n], _mm256_set1_epi32(x->start[at]));
            __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x->scale[at]));
            sum[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), both, sum[n]);
        }
    }
    for (int n = 0; n < rows; n++) _mm256_storeu_ps(y + n * BLOCK_ROWS, sum[n]);
}

AVX2 static void avx2_block(
    const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int rows, int format, float *y
) {
    for (int n = 0; n < rows; n += 2)
        for (int half = 0; half < 2; half++) {
            const uint8_t *own = w + half * 32;
            const uint16_t *own_scales = scales + half * 8;
            float *to = y + n * BLOCK_ROWS + half * 8;
            if (rows - n > 1 && format == INT8) avx2_half(own, own_scales, x, row + n, 2, INT8, to);
            else if (rows - n > 1) avx2_half(own, own_scales, x, row + n, 2, INT4, to);
            else if (format == INT8) avx2_half(own, own_scales, x, row + n, 1, INT8, to);
            else avx2_half(own, own_scales, x, row + n, 1, INT4, to);
        }
}

/* ------------------------------------------------------------------------------------------------- AVX512-VNNI */

/* BLOCKS blocks of W, or one, against `rows` rows of x: memory is read faster at several places than at one. */
AVX512 INLINE void avx512_rows(
    const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int blocks, int rows, int format, float *y
) {
    const __m512i low = _mm512_set1_epi8(15), flip = _mm512_set1_epi8((char)0x80);
    const int8_t *q = x->q + row * x->inputs;
    const float *own = x->scale + row * x->groups;
    const int32_t *start = x->start + row * x->groups;
    const int64_t bytes = x->groups * group_bytes(format), ahead = format == INT8 ? AHEAD_INT8 : AHEAD;
    __m512 sum[BLOCKS][ROWS];
    for (int b = 0; b < blocks; b++)
        for (int n = 0; n < rows; n++) sum[b][n] = _mm512_setzero_ps();
    for (int64_t group = 0; group < x->groups; group++, w += group_bytes(format), scales += BLOCK_ROWS, q += GROUP)
#pragma GCC unroll 4
        for (int b = 0; b < blocks; b++) {
            const uint8_t *at = w + b * bytes;
            __m512i weights[8];
#pragma GCC unroll 8
            for (int k = 0; k < 8; k++) {
                if (format == INT8) {
                    FETCH(at + ahead + k * 64);
                    weights[k] = _mm512_xor_si512(_mm512_loadu_si512(at + k * 64), flip);
                } else if (k < 4) {
                    _mm_prefetch((const char *)at + ahead + k * 64, _MM_HINT_T0);
                    __m512i both = _mm512_loadu_si512(at + k * 64);
                    weights[k] = _mm512_and_si512(both, low);
                    weights[k + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
                }
            }
            __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(scales + b * x->groups * BLOCK_ROWS)));
            for (int n = 0; n < rows; n++) {
                __m512i dot = _mm512_set1_epi32(start[n * x->groups + group]);
                const int32_t *fours = (const int32_t *)(q + n * x->inputs);
#pragma GCC unroll 8
                for (int k = 0; k < 8; k++) dot = _mm512_dpbusd_epi32(dot, weights[k], _mm512_set1_epi32(fours[k]));
                __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(own[n * x->groups + group]));
                sum[b][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both, sum[b][n]);
            }
        }
    for (int b = 0; b < blocks; b++)
        for (int n = 0; n < rows; n++) _mm512_storeu_ps(y + (b * ROWS + n) * BLOCK_ROWS, sum[b][n]);
}

#define CASE(rows) \
    case rows * 2: avx512_rows(w, scales, x, row, 1, rows, INT8, y); break; \
    case rows * 2 + 1: avx512_rows(w, scales, x, row, 1, rows, INT4, y); break; \
    case 64 + rows * 2: avx512_rows(w, scales, x, row, BLOCKS, rows, INT8, y); break; \
    case 64 + rows * 2 + 1: avx512_rows(w, scales, x, row, BLOCKS, rows, INT4, y); break;

AVX512 static void avx512_blocks(
    const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int blocks, int rows, int format, float *y
) {
    switch ((blocks > 1) * 64 + rows * 2 + format) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
}

/* The same for bfloat16 weights, with x as it is. */
AMX INLINE void plain_rows(const uint8_t *w, const uint16_t *x, int64_t inputs, int blocks, int rows, float *y) {
    const int64_t bytes = inputs / GROUP * group_bytes(PLAIN);
    __m512 sum[BLOCKS][ROWS];
    for (int b = 0; b < blocks; b++)
        for (int n = 0; n < rows; n++) sum[b][n] = _mm512_setzero_ps();
    for (int64_t group = 0; group < inputs / GROUP; group++, w += group_bytes(PLAIN), x += GROUP)
#pragma GCC unroll 16
        for (int k = 0; k < 16; k++)
            for (int b = 0; b < blocks; b++) {
                _mm_prefetch((const char *)w + b * bytes + AHEAD + k * 64, _MM_HINT_T0);
                __m512bh weights = (__m512bh)_mm512_loadu_si512(w + b * bytes + k * 64);
                for (int n = 0; n < rows; n++) {
                    int32_t pair;
                    memcpy(&pair, x + n * inputs + k * 2, 4);
                    sum[b][n] = _mm512_dpbf16_ps(sum[b][n], weights, (__m512bh)_mm512_set1_epi32(pair));
                }
            }
    for (int b = 0; b < blocks; b++)
        for (int n = 0; n < rows; n++) _mm512_storeu_ps(y + (b * ROWS + n) * BLOCK_ROWS, sum[b][n]);
}

#define PLAIN_CASE(rows) \
    case rows: plain_rows(w, x, inputs, 1, rows, y); break; \
    case 32 + rows: plain_rows(w, x, inputs, BLOCKS, rows, y); break;

AMX static void plain_blocks(const uint8_t *w, const uint16_t *x, int64_t inputs, int blocks, int rows, float *y) {
    switch ((blocks > 1) * 32 + rows) {
        PLAIN_CASE(1) PLAIN_CASE(2) PLAIN_CASE(3) PLAIN_CASE(4) PLAIN_CASE(5) PLAIN_CASE(6) PLAIN_CASE(7) PLAIN_CASE(8)
    }
}

AVX2 static void avx2_prepare(const void *x, int dtype, int64_t row, const Rows *to, int offset) {
    if (dtype == BFLOAT16) prepare_row(x, BFLOAT16, row, to, offset);
    else prepare_row(x, FLOAT32, row, to, offset);
}

AVX512 static void avx512_prepare(const void *x, int dtype, int64_t row, const Rows *to, int offset) {
    if (dtype == BFLOAT16) prepare_row(x, BFLOAT16, row, to, offset);
    else prepare_row(x, FLOAT32, row, to, offset);
}

/* The compiler's own test knows AMX only from GCC 13 on: leaf 7, EDX bits 22 (bfloat16), 24 (tiles) and 25 (int8). */
static int has_amx(void) {
    unsigned a, b, c, d;
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "0"(7), "2"(0));
    return d >> 22 & 1 && d >> 24 & 1;
}

/* Linux lends the tiles to a process that asks for them. */
static int may_use_tiles(void) {
#if defined(__linux__)
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
    return 0;
#endif
}
#endif

/* ------------------------------------------------------------------------------------------------- what Python calls */

/* The best variant that this processor has. */
int llama_variant(void) {
#if X86
    __builtin_cpu_init();
    int vectors = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (vectors && __builtin_cpu_supports("avx512vnni")) {
        if (!__builtin_cpu_supports("avx512bf16")) return USES_AVX512;
        return has_amx() && may_use_tiles() ? USES_AMX : USES_AVX512_BF16;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return USES_AVX2;
#elif ARM
    return llama_arm_variant();
#endif
    return PORTABLE;
}

static void prepare(const void *x, int dtype, int64_t row, const Rows *to, int variant, int format) {
    int offset = format == INT4 ? 8 : variant == USES_AVX512 ? 128 : 0;
#if X86
    if (variant == USES_AVX512) { avx512_prepare(x, dtype, row, to, offset); return; }
    if (variant == USES_AVX2) { avx2_prepare(x, dtype, row, to, offset); return; }
#endif
    if (dtype == BFLOAT16) prepare_row(x, BFLOAT16, row, to, offset);
    else prepare_row(x, FLOAT32, row, to, offset);
}

/* The results of some blocks of W against some rows of x. */
static void block_results(
    const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int blocks, int rows, int variant, int format,
    float *results
) {
#if X86
    if (format == PLAIN) plain_blocks(w, x->plain + row * x->inputs, x->inputs, blocks, rows, results);
    else if (variant == USES_AVX512) avx512_blocks(w, scales, x, row, blocks, rows, format, results);
    else if (variant == USES_AVX2) avx2_block(w, scales, x, row, rows, format, results);
    else
#elif ARM
    if (variant >= USES_NEON) llama_arm_block(w, scales, x, row, rows, format, variant, results);
    else
#endif
        for (int i = 0; i < rows; i++) portable_block(w, scales, x, row + i, format, results + i * BLOCK_ROWS);
}

/* Results of a block → their places in y. */
static void write_block(const Product *p, int64_t block, int64_t row, int rows, const float *results) {
    int64_t first = block * BLOCK_ROWS, outs = p->outputs - first < BLOCK_ROWS ? p->outputs - first : BLOCK_ROWS;
    for (int i = 0; i < rows; i++)
        for (int64_t out = 0; out < outs; out++)
            write_number(p->y, p->dtype, (row + i) * p->outputs + first + out, results[i * BLOCK_ROWS + out]);
}

/* A piece, blocks begin … end of W, against all of x. Results of few rows are computed, and written if nobody else
   has done so. Many rows are too many for that; what of a block is read once stays in the cache for the next of them. */
static void some_blocks(const Product *p, const Rows *x, int64_t begin, int64_t end, int variant, Team *team, int64_t piece,
                        int64_t per) {
    const int most = variant == USES_AVX512 && p->n <= FEW_PLAIN ? BLOCKS : 1; /* where they wait for memory, not for vectors */
    const int few = p->n <= ROWS;
    float results[MOST_BLOCKS * ROWS * BLOCK_ROWS];
    if (!few && !llama_keep(team, piece)) return;
    for (int64_t block = begin; block < end;) {
        const uint8_t *w = (const uint8_t *)p->w + block * x->groups * group_bytes(p->format);
        const int blocks = end - block < most ? 1 : most;
        float *own = results + (few ? block - begin : 0) * ROWS * BLOCK_ROWS;
        for (int64_t row = 0; row < p->n; row += ROWS) {
            int rows = p->n - row < ROWS ? (int)(p->n - row) : ROWS;
            block_results(w, p->scales + block * x->groups * BLOCK_ROWS, x, row, blocks, rows, variant, p->format, own);
            if (!few) write_block(p, block, row, rows, own);
        }
        block += blocks;
    }
    if (few && !llama_keep(team, piece)) return;
    for (int64_t block = begin; few && block < end; block++)
        write_block(p, block, 0, (int)p->n, results + (block - begin) * ROWS * BLOCK_ROWS);
    llama_done(team, per);
}

/* Whether a product goes to tiles.c. */
static int uses_tiles(int64_t n, int dtype, int format, int variant) {
    return variant == USES_AMX && dtype == BFLOAT16 && n > (format == PLAIN ? FEW_PLAIN : FEW);
}

/* The most rows of x for which a product is made here: for more, PyTorch's on dequantised weights is faster. */
int64_t llama_most_rows(int dtype, int variant) {
    if (variant >= USES_AVX512) return INT64_MAX;
    if (variant == PORTABLE) return 8;
    return dtype == BFLOAT16 ? INT64_MAX : 128; /* on ARM too, where nothing was measured */
}

/* Bytes of the workspace that a product of n rows needs. */
int64_t llama_workspace(int64_t n, int64_t inputs, int dtype, int format, int variant, int threads) {
    if (format >= AS_STORED) return llama_plain_workspace(n, inputs, dtype, format - AS_STORED, variant);
    if (uses_tiles(n, dtype, format, variant)) return llama_tiles_workspace(n, inputs, threads);
    return n * (inputs + inputs / GROUP * (int64_t)(sizeof(float) + sizeof(int32_t))) + 64;
}

/* What a thread does of a product. Packed bfloat16 weights are for USES_AMX only, with x of bfloat16. */
void llama_multiply(const Product *p, Team *team) {
    if (p->format >= AS_STORED) {
        llama_multiply_plain(p, team);
        return;
    }
    if (uses_tiles(p->n, p->dtype, p->format, p->variant)) {
        llama_multiply_tiles(p, team);
        return;
    }
    const int64_t n = p->n, inputs = p->inputs, groups = inputs / GROUP, blocks = (p->outputs + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int variant = p->variant > USES_AVX512 && !ARM ? USES_AVX512 : p->variant;
    uint8_t *at = (uint8_t *)(((uintptr_t)p->workspace + 63) & ~(uintptr_t)63);
    const Rows rows = {inputs, groups, p->x, (int8_t *)at, (float *)(at + n * inputs),
                       (int32_t *)(at + n * (inputs + groups * 4)), variant == USES_BF16 ? n / 2 * 2 : 0};
    if (p->format != PLAIN) {
        KEPT_PIECES(share, team, 1) {
            for (int64_t row = n * share / team->threads; row < n * (share + 1) / team->threads; row++)
                prepare(p->x, p->dtype, row, &rows, variant, p->format);
        }
    }
    const int64_t size = PIECE / (groups * group_bytes(p->format)) / BLOCKS * BLOCKS + BLOCKS;
    const int64_t in_a_piece = size < MOST_BLOCKS ? size : MOST_BLOCKS, share = (blocks + team->threads - 1) / team->threads;
    const int64_t per = (share + in_a_piece - 1) / in_a_piece;
    PIECES(piece, team, per) {
        int64_t begin = blocks * (piece / per) / team->threads + piece % per * in_a_piece;
        int64_t end = blocks * (piece / per + 1) / team->threads;
        some_blocks(p, &rows, begin, begin + in_a_piece < end ? begin + in_a_piece : end, variant, team, piece, per);
    }
}

/* The whole of a product, by `threads` threads. */
void llama_product(
    const void *x, const void *w, const uint16_t *scales, void *y, uint8_t *workspace, int64_t n, int64_t inputs,
    int64_t outputs, int dtype, int format, int variant, int threads
) {
    const Product product = {x, w, scales, y, workspace, n, inputs, outputs, dtype, format, variant};
    Share shares[threads];
    Work work = llama_work(shares, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Team team = llama_team(&work);
        llama_multiply(&product, &team);
    }
}
