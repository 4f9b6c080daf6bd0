/* Products of activations with int8 and int4 weights, for steps of few rows, which wait for the weights to be read.

   y (n, outputs) = x (n, inputs) · W (outputs, inputs)ᵀ. Each run of GROUP inputs of a row of W has a float16 scale; the
   activations get one of their own for each run (symmetric, int8), so that a run is one integer dot product:
   y = Σ over runs of scale_w · scale_x · Σ q_w q_x. Where an instruction wants unsigned weights they are shifted by
   `offset`, and offset · Σ q_x · scale_x, known once for each run of x, is taken off again with one fused multiply-add.

   One row of W meets a row of x in the same order of operations whatever else is computed beside it: results do not
   depend on the number of threads or of rows. Plain C: compiled once, the variant is chosen when it runs. */

#include "kernels.h"

#if X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { GROUP = 32, BLOCK = 64, TILE = 4, CHUNK = 16, AHEAD = 8 };
enum { INT8, INT4 };

/* Rows of x as the kernels read them. For AVX512, in blocks of two runs, `scale` has 16 floats a block, one a lane. */
typedef struct {
    int64_t inputs, blocks;
    int8_t *q;     /* (n, blocks · BLOCK), zeros at the end */
    float *scale;  /* (n, runs), or (n, blocks, 16) */
    float *shift;  /* (n, runs rounded up to 16): −offset · scale · Σ q */
} Rows;

/* ------------------------------------------------------------------------------------- the activations, as int8 */

/* One run: its integers, their sum, and its scale, which is NaN where a number is not finite. */
INLINE float quantize_run(const void *x, int dtype, int64_t first, int8_t *q, int32_t *sum) {
    float run[GROUP], largest = 0, zero = 0;
    int32_t total = 0, rounded[GROUP];
#pragma omp simd
    for (int i = 0; i < GROUP; i++) run[i] = read_number(x, dtype, first + i);
#pragma omp simd reduction(max : largest) reduction(+ : zero)
    for (int i = 0; i < GROUP; i++) {
        float size = fabsf(run[i]);
        largest = size > largest ? size : largest;
        zero += run[i] * 0.0f;
    }
    float inverse = largest > 1e-30f && zero == 0 ? 127.0f / largest : 0;
    if (!(zero == 0)) memset(run, 0, sizeof run); /* NaN and infinities times 0 are NaN */
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < GROUP; i++) {
        float scaled = run[i] * inverse;
        rounded[i] = (int32_t)(scaled + copysignf(0.5f, scaled));
        total += rounded[i];
    }
#pragma omp simd
    for (int i = 0; i < GROUP; i++) q[i] = (int8_t)rounded[i];
    *sum = total;
    return (largest > 1e-30f ? largest / 127.0f : 0) + zero;
}

/* Where a run's i-th number stands in a block: AVX512's int4 kernel has both runs' low halves first. */
INLINE void prepare_row(const void *x, int dtype, int64_t row, const Rows *to, int variant, int format) {
    int64_t runs = to->inputs / GROUP, padded = to->blocks * 2 + 15 & ~(int64_t)15;
    int8_t *q = to->q + row * to->blocks * BLOCK;
    float *shift = to->shift + row * padded;
    float offset = format == INT4 ? 8.0f : variant == USES_AVX512 ? 128.0f : 0.0f;
    memset(shift, 0, sizeof(float) * padded);
    if (runs % 2) memset(q + (to->blocks - 1) * BLOCK, 0, BLOCK);
    for (int64_t run = 0; run < runs; run++) {
        int8_t numbers[GROUP];
        int32_t sum;
        float scale = quantize_run(x, dtype, row * to->inputs + run * GROUP, numbers, &sum);
        shift[run] = -offset * scale * (float)sum;
        if (variant != USES_AVX512) {
            memcpy(q + run * GROUP, numbers, GROUP);
            to->scale[row * to->blocks * 2 + run] = scale;
            continue;
        }
        int8_t *block = q + run / 2 * BLOCK;
        float *lanes = to->scale + (row * to->blocks + run / 2) * 16;
        if (run % 2 == 0) memset(lanes, 0, sizeof(float) * 16);
        if (format == INT8) {
            memcpy(block + run % 2 * GROUP, numbers, GROUP);
            for (int lane = 0; lane < 8; lane++) lanes[run % 2 * 8 + lane] = scale;
        } else {
            memcpy(block + run % 2 * 16, numbers, 16);
            memcpy(block + 32 + run % 2 * 16, numbers + 16, 16);
            for (int lane = 0; lane < 4; lane++)
                lanes[run % 2 * 4 + lane] = lanes[8 + run % 2 * 4 + lane] = scale;
        }
    }
}

/* ------------------------------------------------------------------------------------------------- plain C */

INLINE int weight_at(const uint8_t *run, int format, int i) {
    if (format == INT8) return ((const int8_t *)run)[i];
    return i < 16 ? run[i] & 15 : run[i - 16] >> 4;
}

static void portable_row(const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int format, float *y) {
    int64_t runs = x->inputs / GROUP, stored = format == INT4 ? GROUP / 2 : GROUP;
    int64_t padded = x->blocks * 2 + 15 & ~(int64_t)15;
    float sum = 0;
    for (int64_t run = 0; run < runs; run++) {
        const int8_t *q = x->q + row * x->blocks * BLOCK + run * GROUP;
        int32_t dot = 0;
        for (int i = 0; i < GROUP; i++) dot += weight_at(w + run * stored, format, i) * q[i];
        float scale = from_float16(scales[run]);
        sum += scale * (x->scale[row * x->blocks * 2 + run] * (float)dot + x->shift[row * padded + run]);
    }
    *y = sum;
}

/* ------------------------------------------------------------------------------------------------- AVX2 */

#if X86
AVX2 INLINE float sum8(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

AVX2 INLINE void avx2_tile(
    const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int rows, int format, float *y
) {
    int64_t runs = x->inputs / GROUP, stored = format == INT4 ? GROUP / 2 : GROUP;
    int64_t padded = x->blocks * 2 + 15 & ~(int64_t)15;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256 sum[TILE];
    float shift[TILE];
    for (int n = 0; n < rows; n++) sum[n] = _mm256_setzero_ps(), shift[n] = 0;
    for (int64_t run = 0; run < runs; run++) {
        float scale = _cvtsh_ss(scales[run]);
        __m256i weights, sizes;
        if (format == INT8) {
            weights = _mm256_loadu_si256((const __m256i *)(w + run * stored));
            sizes = _mm256_abs_epi8(weights);
        } else {
            __m128i packed = _mm_loadu_si128((const __m128i *)(w + run * stored));
            weights = _mm256_set_m128i(_mm_srli_epi16(packed, 4), packed);
            sizes = _mm256_and_si256(weights, _mm256_set1_epi8(15));
        }
        for (int n = 0; n < rows; n++) {
            __m256i q = _mm256_loadu_si256((const __m256i *)(x->q + (row + n) * x->blocks * BLOCK + run * GROUP));
            if (format == INT8) q = _mm256_sign_epi8(q, weights);
            __m256i dot = _mm256_madd_epi16(_mm256_maddubs_epi16(sizes, q), ones);
            float both = scale * x->scale[(row + n) * x->blocks * 2 + run];
            sum[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(both), sum[n]);
            if (format == INT4) shift[n] += scale * x->shift[(row + n) * padded + run];
        }
    }
    for (int n = 0; n < rows; n++) y[n] = sum8(sum[n]) + shift[n];
}

AVX2 static void avx2_rows(
    const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int rows, int format, float *y
) {
    switch (rows * 2 + format) {
    case 2: avx2_tile(w, scales, x, row, 1, INT8, y); break;
    case 3: avx2_tile(w, scales, x, row, 1, INT4, y); break;
    case 4: avx2_tile(w, scales, x, row, 2, INT8, y); break;
    case 5: avx2_tile(w, scales, x, row, 2, INT4, y); break;
    case 6: avx2_tile(w, scales, x, row, 3, INT8, y); break;
    case 7: avx2_tile(w, scales, x, row, 3, INT4, y); break;
    case 8: avx2_tile(w, scales, x, row, 4, INT8, y); break;
    default: avx2_tile(w, scales, x, row, 4, INT4, y); break;
    }
}

/* ------------------------------------------------------------------------------------------------- AVX512-VNNI */

/* 64 weights as unsigned bytes: int8 shifted by 128, or both nibbles of 32 bytes; `half`: only the first run is there. */
AVX512 INLINE __m512i avx512_weights(const uint8_t *w, int format, int half) {
    if (format == INT8) {
        __m512i q = half ? _mm512_maskz_loadu_epi8(0xffffffffu, w) : _mm512_loadu_si512(w);
        return _mm512_xor_si512(q, _mm512_set1_epi8((char)0x80));
    }
    __m256i packed = half ? _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)w))
                          : _mm256_loadu_si256((const __m256i *)w);
    if (half) packed = _mm256_inserti128_si256(packed, _mm_setzero_si128(), 1);
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(packed), _mm256_srli_epi16(packed, 4), 1);
    return _mm512_and_si512(both, _mm512_set1_epi8(15));
}

/* `outs` rows of W against `rows` rows of x: each is read once for all of the others. */
AVX512 INLINE void avx512_tile(
    const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int outs, int rows, int format, float *y
) {
    int64_t runs = x->inputs / GROUP, padded = x->blocks * 2 + 15 & ~(int64_t)15;
    int64_t width = format == INT4 ? BLOCK / 2 : BLOCK, line = format == INT4 ? x->inputs / 2 : x->inputs;
    const __m512i lanes = format == INT8 ? _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0)
                                         : _mm512_set_epi32(1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0);
    __m512 sum[TILE][TILE];
    for (int r = 0; r < outs; r++)
        for (int n = 0; n < rows; n++) sum[r][n] = _mm512_setzero_ps();
    for (int64_t begin = 0; begin < x->blocks; begin += 8) { /* 8 blocks have the 16 scales of one vector */
        int64_t left = runs - begin * 2, end = begin + 8 < x->blocks ? begin + 8 : x->blocks;
        __mmask16 there = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
        __m512 sixteen[TILE];
        for (int r = 0; r < outs; r++) {
            sixteen[r] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, scales + r * runs + begin * 2));
            for (int n = 0; n < rows; n++) {
                __m512 shift = _mm512_loadu_ps(x->shift + (row + n) * padded + begin * 2);
                sum[r][n] = _mm512_fmadd_ps(sixteen[r], shift, sum[r][n]);
            }
        }
        __m512i pair = lanes;
        for (int64_t block = begin; block < end; block++) {
            int half = block * 2 + 1 == runs;
            __m512i weights[TILE];
            __m512 scale[TILE];
            for (int r = 0; r < outs; r++) {
                /* Rows are short: the processor's own prefetching, which follows one line of a page, loses its way. */
                _mm_prefetch((const char *)(w + (r + AHEAD) * line + block * width), _MM_HINT_T0);
                weights[r] = avx512_weights(w + r * line + block * width, format, half);
                scale[r] = _mm512_permutexvar_ps(pair, sixteen[r]);
            }
            for (int n = 0; n < rows; n++) {
                __m512i q = _mm512_loadu_si512(x->q + ((row + n) * x->blocks + block) * BLOCK);
                __m512 own = _mm512_loadu_ps(x->scale + ((row + n) * x->blocks + block) * 16);
                for (int r = 0; r < outs; r++) {
                    __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights[r], q);
                    sum[r][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(scale[r], own), sum[r][n]);
                }
            }
            pair = _mm512_add_epi32(pair, _mm512_set1_epi32(2));
        }
    }
    for (int r = 0; r < outs; r++)
        for (int n = 0; n < rows; n++) y[r * TILE + n] = _mm512_reduce_add_ps(sum[r][n]);
}

#define CASE(outs, rows, format) \
    case (outs == TILE) * 16 + rows * 2 + format: avx512_tile(w, scales, x, row, outs, rows, format, y); break;
#define CASES(rows) CASE(1, rows, INT8) CASE(1, rows, INT4) CASE(TILE, rows, INT8) CASE(TILE, rows, INT4)

AVX512 static void avx512_rows(
    const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int outs, int rows, int format, float *y
) {
    switch ((outs == TILE) * 16 + rows * 2 + format) { CASES(1) CASES(2) CASES(3) CASES(4) }
}

AVX2 static void avx2_prepare(const void *x, int dtype, int64_t row, const Rows *to, int format) {
    prepare_row(x, dtype, row, to, USES_AVX2, format);
}

AVX512 static void avx512_prepare(const void *x, int dtype, int64_t row, const Rows *to, int format) {
    prepare_row(x, dtype, row, to, USES_AVX512, format);
}
#endif

/* ------------------------------------------------------------------------------------------------- AMX */

#if X86
/* For 3 rows of x and more: one tile instruction multiplies a run of 16 rows of W with 16 rows of x, and what is left for
   vectors is the two scales. int8 weights go into a tile as they lie in memory; int4 ones are unpacked before. */

enum { COLUMNS = 16, RUN_TILE = 8 * 64 };

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* Tiles 0 and 1: sums, 16 rows of W × 16 rows of x; 2 and 3: a run of 16 rows of W; 4 and 5: of 16 rows of x, in fours. */
static void configure_tiles(void) {
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 6; tile++) {
        config.rows[tile] = tile < 4 ? 16 : 8;
        config.row_bytes[tile] = tile == 2 || tile == 3 ? GROUP : 64;
    }
    /* As assembly that reads `config`: a compiler may drop the stores to it where it knows only of an intrinsic. */
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

/* x as tiles reads it: for each 16 rows and run, 8 × 16 rows × 4 numbers, 16 scales, and 16 shifts. */
typedef struct {
    int8_t *q;
    float *scale, *shift;
} Tiles;

AVX512 static void amx_prepare(const uint16_t *x, int64_t n, int64_t inputs, int format, const Tiles *to, int64_t tile) {
    int64_t runs = inputs / GROUP;
    memset(to->q + tile * runs * RUN_TILE, 0, (size_t)(runs * RUN_TILE));
    memset(to->scale + tile * runs * COLUMNS, 0, (size_t)(runs * COLUMNS) * sizeof(float));
    memset(to->shift + tile * runs * COLUMNS, 0, (size_t)(runs * COLUMNS) * sizeof(float));
    for (int64_t column = 0; column < COLUMNS && tile * COLUMNS + column < n; column++)
        for (int64_t run = 0; run < runs; run++) {
            int8_t numbers[GROUP];
            int32_t sum;
            int64_t at = tile * runs + run;
            float scale =
                quantize_run(x, BFLOAT16, (tile * COLUMNS + column) * inputs + run * GROUP, numbers, &sum);
            to->scale[at * COLUMNS + column] = scale;
            to->shift[at * COLUMNS + column] = format == INT4 ? -8.0f * scale * (float)sum : 0;
            for (int four = 0; four < 8; four++)
                memcpy(to->q + at * RUN_TILE + four * 64 + column * 4, numbers + four * 4, 4);
        }
}

/* A run of `outs` rows of W as bytes, 32 apart, where it cannot be loaded as it lies. */
AVX512 INLINE void unpack(const uint8_t *w, int64_t line, int outs, int format, uint8_t *to) {
    const __m256i low = _mm256_set1_epi8(15);
    for (int r = 0; r < outs; r++) {
        __m256i numbers = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(w + r * line)));
        if (format == INT8) numbers = _mm256_loadu_si256((const __m256i *)(w + r * line));
        else numbers = _mm256_inserti128_si256(numbers, _mm_srli_epi16(_mm256_castsi256_si128(numbers), 4), 1);
        if (format == INT4) numbers = _mm256_and_si256(numbers, low);
        _mm256_store_si256((__m256i *)(to + r * GROUP), numbers);
    }
}

/* `outs` ≤ 16 rows of W against 16 rows of x: sums (16, 16). */
AMX INLINE void amx_tile(
    const uint8_t *w, const uint16_t *scales, const int8_t *q, const float *x_scales, const float *shifts, int64_t inputs,
    int outs, int format, float *sums
) {
    int64_t runs = inputs / GROUP, line = format == INT4 ? inputs / 2 : inputs;
    int64_t stored = format == INT4 ? GROUP / 2 : GROUP;
    uint8_t bytes[2][16 * GROUP] __attribute__((aligned(64)));
    int32_t dots[2][16 * COLUMNS] __attribute__((aligned(64)));
    float own[16][16];
    __m512 sum[16];
    memset(bytes, 0, sizeof bytes);
    memset(own, 0, sizeof own);
    for (int r = 0; r < 16; r++) sum[r] = _mm512_setzero_ps();
    const int direct = format == INT8 && outs == 16;
    if (!direct) unpack(w, line, outs, format, bytes[0]);
    /* What has just been stored is slow to load again, so each run is unpacked, multiplied and scaled in three turns. */
    for (int64_t run = 0; run <= runs; run++) {
        if (run < runs) {
            const uint8_t *from = direct ? w + run * stored : bytes[run % 2];
            if (run % 2 == 0) {
                _tile_zero(0);
                _tile_loadd(2, from, direct ? line : GROUP);
                _tile_loadd(4, q + run * RUN_TILE, 64);
                if (format == INT8) _tile_dpbssd(0, 2, 4);
                else _tile_dpbusd(0, 2, 4);
                _tile_stored(0, dots[0], 64);
            } else {
                _tile_zero(1);
                _tile_loadd(3, from, direct ? line : GROUP);
                _tile_loadd(5, q + run * RUN_TILE, 64);
                if (format == INT8) _tile_dpbssd(1, 3, 5);
                else _tile_dpbusd(1, 3, 5);
                _tile_stored(1, dots[1], 64);
            }
            if (run % (64 / stored) == 0)
                for (int r = 0; r < outs; r++)
                    _mm_prefetch((const char *)(w + (r + 16) * line + run * stored), _MM_HINT_T1);
            if (!direct && run + 1 < runs) unpack(w + (run + 1) * stored, line, outs, format, bytes[(run + 1) % 2]);
        }
        if (run == 0) continue;
        int64_t last = run - 1;
        if (last % 16 == 0)
            for (int r = 0; r < outs; r++) {
                int64_t left = runs - last;
                __mmask16 there = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
                _mm512_storeu_ps(own[r], _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, scales + r * runs + last)));
            }
        __m512 scale = _mm512_loadu_ps(x_scales + last * COLUMNS), shift = _mm512_loadu_ps(shifts + last * COLUMNS);
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) {
            __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(dots[last % 2] + r * COLUMNS));
            sum[r] = _mm512_fmadd_ps(_mm512_fmadd_ps(dot, scale, shift), _mm512_set1_ps(own[r][last % 16]), sum[r]);
        }
    }
    for (int r = 0; r < 16; r++) _mm512_storeu_ps(sums + r * COLUMNS, sum[r]);
}

AMX static void amx_outputs(
    const uint8_t *w, const uint16_t *scales, const Tiles *x, int64_t n, int64_t inputs, int64_t begin, int64_t end,
    int64_t outputs, int format, uint16_t *y
) {
    int64_t line = format == INT4 ? inputs / 2 : inputs, runs = inputs / GROUP;
    float sums[16 * COLUMNS];
    configure_tiles();
    for (int64_t out = begin; out < end; out += 16) {
        int outs = end - out < 16 ? (int)(end - out) : 16;
        const uint8_t *own = w + out * line;
        for (int64_t tile = 0; tile * COLUMNS < n; tile++) {
            const int8_t *q = x->q + tile * runs * RUN_TILE;
            const float *scale = x->scale + tile * runs * COLUMNS, *shift = x->shift + tile * runs * COLUMNS;
            if (format == INT8) amx_tile(own, scales + out * runs, q, scale, shift, inputs, outs, INT8, sums);
            else amx_tile(own, scales + out * runs, q, scale, shift, inputs, outs, INT4, sums);
            for (int64_t column = 0; column < COLUMNS && tile * COLUMNS + column < n; column++)
                for (int r = 0; r < outs; r++)
                    y[(tile * COLUMNS + column) * outputs + out + r] = to_bfloat16(sums[r * COLUMNS + column]);
        }
    }
    __asm__ volatile("tilerelease");
}

/* The compiler's own test knows AMX only from GCC 13 on: leaf 7, EDX bits 24 (tiles) and 25 (int8). */
static int has_amx(void) {
    unsigned a, b, c, d;
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "0"(7), "2"(0));
    return d >> 24 & 1 && d >> 25 & 1;
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
        int tiles = has_amx() && __builtin_cpu_supports("avx512bf16");
        return tiles && may_use_tiles() ? USES_AMX : USES_AVX512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return USES_AVX2;
#endif
    return PORTABLE;
}

static void prepare(const void *x, int dtype, int64_t row, const Rows *to, int variant, int format) {
#if X86
    if (variant == USES_AVX512) { avx512_prepare(x, dtype, row, to, format); return; }
    if (variant == USES_AVX2) { avx2_prepare(x, dtype, row, to, format); return; }
#endif
    prepare_row(x, dtype, row, to, PORTABLE, format);
}

/* `outs` rows of W, 1 or TILE, against `rows` rows of x, at most TILE, into y[r · TILE + n]. */
static void tile(
    const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int outs, int rows, int variant, int format,
    float *y
) {
#if X86
    if (variant == USES_AVX512) { avx512_rows(w, scales, x, row, outs, rows, format, y); return; }
#endif
    int64_t line = format == INT4 ? x->inputs / 2 : x->inputs;
    for (int r = 0; r < outs; r++) {
        const uint8_t *own = w + r * line;
        const uint16_t *own_scales = scales + r * (x->inputs / GROUP);
#if X86
        if (variant == USES_AVX2) { avx2_rows(own, own_scales, x, row, rows, format, y + r * TILE); continue; }
#endif
        for (int n = 0; n < rows; n++) portable_row(own, own_scales, x, row + n, format, y + r * TILE + n);
    }
}

/* Some rows of W against all of x: a few rows of W at a time, which stay in the cache while x goes by. */
static void some_outputs(
    const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t n, int64_t begin, int64_t end, int64_t outputs,
    int variant, int format, void *y, int dtype
) {
    int64_t line = format == INT4 ? x->inputs / 2 : x->inputs, runs = x->inputs / GROUP;
    for (int64_t chunk = begin; chunk < end; chunk += CHUNK) {
        int64_t stop = chunk + CHUNK < end ? chunk + CHUNK : end;
        for (int64_t row = 0; row < n; row += TILE) {
            int rows = n - row < TILE ? (int)(n - row) : TILE;
            for (int64_t out = chunk; out < stop;) {
                int outs = stop - out < TILE ? 1 : TILE;
                float results[TILE * TILE];
                tile(w + out * line, scales + out * runs, x, row, outs, rows, variant, format, results);
                for (int r = 0; r < outs; r++)
                    for (int i = 0; i < rows; i++)
                        write_number(y, dtype, (row + i) * outputs + out + r, results[r * TILE + i]);
                out += outs;
            }
        }
    }
}

/* Bytes of the workspace that a product of n rows needs. */
int64_t llama_workspace(int64_t n, int64_t inputs) {
    int64_t blocks = (inputs + BLOCK - 1) / BLOCK, padded = blocks * 2 + 15 & ~(int64_t)15;
    int64_t tiles = (n + 15) / 16 * (inputs / GROUP) * (8 * 64 + 2 * 16 * (int64_t)sizeof(float)); /* for AMX */
    int64_t rows = n * (blocks * BLOCK + (blocks * 16 + padded) * (int64_t)sizeof(float));
    return (tiles > rows ? tiles : rows) + 192;
}

/* The most rows of x for which a product is made here. */
int64_t llama_most_rows(int dtype, int variant) { return variant == USES_AMX && dtype == BFLOAT16 ? 256 : 8; }

#if X86
static void amx_product(
    const uint16_t *x, const uint8_t *w, const uint16_t *scales, uint16_t *y, uint8_t *workspace, int64_t n,
    int64_t inputs, int64_t outputs, int format, int threads
) {
    int64_t runs = inputs / GROUP, share = ((outputs + threads - 1) / threads + 15) / 16 * 16;
    int64_t tiles = (n + COLUMNS - 1) / COLUMNS;
    Tiles to = {(int8_t *)workspace, (float *)(workspace + tiles * runs * RUN_TILE), 0};
    to.shift = to.scale + tiles * runs * COLUMNS;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; tile++) amx_prepare(x, n, inputs, format, &to, tile);
#pragma omp for schedule(static, 1)
        for (int thread = 0; thread < threads; thread++) {
            int64_t begin = thread * share, end = begin + share < outputs ? begin + share : outputs;
            if (begin < end) amx_outputs(w, scales, &to, n, inputs, begin, end, outputs, format, y);
        }
    }
}
#endif

/* y (n, outputs) = x (n, inputs) · W (outputs, inputs)ᵀ; x and y of `dtype`, inputs a multiple of GROUP. */
void llama_product(
    const void *x, const uint8_t *w, const uint16_t *scales, void *y, uint8_t *workspace, int64_t n, int64_t inputs,
    int64_t outputs, int dtype, int format, int variant, int threads
) {
    uint8_t *at = (uint8_t *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
#if X86
    if (variant == USES_AMX && dtype == BFLOAT16 && n > 2) {
        amx_product(x, w, scales, y, at, n, inputs, outputs, format, threads);
        return;
    }
    if (variant == USES_AMX) variant = USES_AVX512;
#endif
    Rows rows = {inputs, (inputs + BLOCK - 1) / BLOCK, 0, 0, 0};
    rows.q = (int8_t *)at;
    rows.scale = (float *)(at += n * rows.blocks * BLOCK);
    rows.shift = (float *)(at + n * rows.blocks * 16 * sizeof(float));
    int64_t share = ((outputs + threads - 1) / threads + TILE - 1) / TILE * TILE;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < n; row++) prepare(x, dtype, row, &rows, variant, format);
#pragma omp for schedule(static, 1)
        for (int thread = 0; thread < threads; thread++) {
            int64_t begin = thread * share, end = begin + share < outputs ? begin + share : outputs;
            if (begin < end) some_outputs(w, scales, &rows, n, begin, end, outputs, variant, format, y, dtype);
        }
    }
}

INLINE void dequantize_row(const uint8_t *w, const uint16_t *scales, void *to, int64_t first, int64_t inputs, int dtype,
                           int format) {
    int64_t stored = format == INT4 ? GROUP / 2 : GROUP;
    for (int64_t run = 0; run < inputs / GROUP; run++) {
        float scale = from_float16(scales[run]), numbers[GROUP];
        for (int i = 0; i < GROUP; i++)
            numbers[i] = scale * (float)(weight_at(w + run * stored, format, i) - (format == INT4 ? 8 : 0));
        for (int i = 0; i < GROUP; i++) write_number(to, dtype, first + run * GROUP + i, numbers[i]);
    }
}

#if X86
AVX2 static void avx2_dequantize(const uint8_t *w, const uint16_t *s, void *to, int64_t first, int64_t inputs, int dtype,
                                 int format) {
    if (dtype == BFLOAT16 && format == INT8) dequantize_row(w, s, to, first, inputs, BFLOAT16, INT8);
    else if (dtype == BFLOAT16) dequantize_row(w, s, to, first, inputs, BFLOAT16, INT4);
    else dequantize_row(w, s, to, first, inputs, FLOAT32, format);
}

/* One run of a row as 32 bfloat16. */
AMX INLINE __m512bh bfloat16_run(const uint8_t *w, __m512 scale, int format) {
    __m512 low, high;
    if (format == INT8) {
        low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)));
        high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(w + 16))));
    } else { /* a look-up by the low four bits of each lane */
        const __m512 numbers = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
        __m512i packed = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)w));
        low = _mm512_permutexvar_ps(packed, numbers);
        high = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 4), numbers);
    }
    return _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scale), _mm512_mul_ps(low, scale));
}

AMX static void amx_dequantize(const uint8_t *w, const uint16_t *s, uint16_t *to, int64_t inputs, int format) {
    int64_t stored = format == INT4 ? GROUP / 2 : GROUP;
    for (int64_t run = 0; run < inputs / GROUP; run++) {
        __m512 scale = _mm512_set1_ps(_cvtsh_ss(s[run]));
        __m512bh numbers = format == INT8 ? bfloat16_run(w + run * stored, scale, INT8)
                                          : bfloat16_run(w + run * stored, scale, INT4);
        _mm512_storeu_si512(to + run * GROUP, (__m512i)numbers);
    }
}
#endif

/* Rows of W (outputs, inputs) as numbers of `dtype`. */
void llama_dequantize(
    const uint8_t *w, const uint16_t *scales, void *to, int64_t inputs, int64_t outputs, int dtype, int format,
    int variant, int threads
) {
    int64_t line = format == INT4 ? inputs / 2 : inputs, runs = inputs / GROUP;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < outputs; row++) {
        const uint8_t *own = w + row * line;
        const uint16_t *s = scales + row * runs;
#if X86
        if (variant == USES_AMX && dtype == BFLOAT16) {
            amx_dequantize(own, s, (uint16_t *)to + row * inputs, inputs, format);
            continue;
        }
        if (variant >= USES_AVX2) { avx2_dequantize(own, s, to, row * inputs, inputs, dtype, format); continue; }
#endif
        dequantize_row(own, s, to, row * inputs, inputs, dtype, format);
    }
}
