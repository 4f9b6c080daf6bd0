/* What the kernels share: targets, variants, and numbers of 16 bits. */

#ifndef LLAMA_KERNELS_H
#define LLAMA_KERNELS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")))
#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")))
#define AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")))
/* Into the second level of the cache: on their way to the first, lines from memory would keep out those of x. */
#define FETCH(from) _mm_prefetch((const char *)(from), _MM_HINT_T1)
#else
#define X86 0
#endif
#if defined(__aarch64__)
#define ARM 1
#else
#define ARM 0
#endif
#define INLINE static inline __attribute__((always_inline))

/* The variants of this machine, from the least to the best; library.py has their names. Those of the other machine have
   numbers that no variant has here, so that what is compiled for both may ask for either. */
#if ARM
enum { PORTABLE, USES_NEON, USES_DOTPROD, USES_BF16, ELSEWHERE = 100, USES_AVX2, USES_AVX512, USES_AVX512_BF16, USES_AMX };
#else
enum { PORTABLE, USES_AVX2, USES_AVX512, USES_AVX512_BF16, USES_AMX, ELSEWHERE = 100, USES_NEON, USES_DOTPROD, USES_BF16 };
#endif
enum { FLOAT32, BFLOAT16, FLOAT16, FLOAT8 }; /* FLOAT8: of a cache only */
enum { INT8, INT4, PLAIN, AS_STORED }; /* PLAIN: packed numbers of bfloat16; AS_STORED + a dtype: see plain.c */
enum { GROUP = 32, BLOCK_ROWS = 16 }; /* inputs that share a scale; rows of a block of packed weights: see quantized.c */

#if defined(_OPENMP)
#include <omp.h>
#endif

/* ------------------------------------------------------------------------------------------------- threads */

/* What the other threads of a team see of one of them; see team.c. */
typedef struct {
    _Alignas(64) uint64_t taken; /* pieces of its share that somebody took; turn << 32 | number */
    uint64_t held;               /* the piece of which nobody has begun to write what it computes; turn << 32 | number + 1 */
} Share;

/* What a team works on, turn by turn. */
typedef struct {
    _Alignas(64) uint32_t turn;
    int32_t asleep; /* threads that wait for the next turn */
    _Alignas(64) int64_t done; /* pieces */
    Share *shares;
} Work;

/* A thread of a team, the turn in which it is, and who holds the piece that it does. */
typedef struct {
    Work *work;
    int thread, threads, holder;
    uint32_t turn;
} Team;

/* The work of at most `threads` threads, before its first turn. */
INLINE Work llama_work(Share *shares, int threads) {
    memset(shares, 0, sizeof *shares * threads);
    return (Work){.shares = shares};
}

/* This thread among those of the parallel region. */
INLINE Team llama_team(Work *work) {
#if defined(_OPENMP)
    return (Team){.work = work, .thread = omp_get_thread_num(), .threads = omp_get_num_threads()};
#else
    return (Team){.work = work, .threads = 1};
#endif
}

int64_t llama_piece(Team *team, int64_t per);
int llama_keep(Team *team, int64_t piece);
void llama_done(Team *team, int64_t per);

/* For each piece that this thread gets, of a turn that has `per` in each thread's share. */
#define PIECES(piece, team, per) for (int64_t piece; (piece = llama_piece(team, per)) >= 0;)

/* The same where a piece cannot be computed beside its place: it is this thread's to write from the beginning. */
INLINE int64_t llama_kept_piece(Team *team, int64_t per) {
    int64_t piece = llama_piece(team, per);
    while (piece >= 0 && !llama_keep(team, piece)) piece = llama_piece(team, per);
    return piece;
}
#define KEPT_PIECES(piece, team, per) \
    for (int64_t piece; (piece = llama_kept_piece(team, per)) >= 0; llama_done(team, per))

/* ------------------------------------------------------------------------------------------------- numbers */

INLINE float from_bfloat16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* ties to even */
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest); /* NaN stays NaN */
}

INLINE float from_float16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023, bits;
    float value;
    if (exponent == 0) {
        value = (float)fraction * 0x1p-24f;
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE float read_number(const void *from, int dtype, int64_t i) {
    return dtype == BFLOAT16 ? from_bfloat16(((const uint16_t *)from)[i]) : ((const float *)from)[i];
}

INLINE void write_number(void *to, int dtype, int64_t i, float value) {
    if (dtype == BFLOAT16) ((uint16_t *)to)[i] = to_bfloat16(value);
    else ((float *)to)[i] = value;
}

/* eˣ within 2 · 10⁻⁷ of itself, as 2ⁿ · eʳ with |r| ≤ ln 2 / 2; NaN stays NaN. Unlike expf it can be done for 16 at once. */
INLINE float exponential(float x) {
    float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float shifted = bounded * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f; /* n in the low bits of the sum */
    float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    float power;
    memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* Bytes of a group of a block. */
INLINE int group_bytes(int format) {
    return format == INT4 ? GROUP * BLOCK_ROWS / 2 : format == INT8 ? GROUP * BLOCK_ROWS : GROUP * BLOCK_ROWS * 2;
}

/* Integer i of a lane's group; int4 shifted by 8. */
INLINE int weight_at(const uint8_t *group, int format, int lane, int i) {
    if (format == INT8) return ((const int8_t *)group)[i / 4 * 64 + lane * 4 + i % 4];
    uint8_t both = group[i % 16 / 4 * 64 + lane * 4 + i % 4];
    return i < 16 ? both & 15 : both >> 4;
}

/* Rows of x as the products with packed weights read them: see quantized.c. */
typedef struct {
    int64_t inputs, groups;
    const uint16_t *plain; /* (n, inputs), where W is bfloat16 */
    int8_t *q;             /* (n, inputs) */
    float *scale;          /* (n, groups) */
    int32_t *start;        /* (n, groups): −offset · Σ q */
    int64_t paired;        /* so many rows lie in pairs: of a group, eight inputs of one beside eight of the other */
} Rows;

/* ------------------------------------------------------------------------------------------------- the operations */

int llama_variant(void);
int64_t llama_most_rows(int dtype, int variant);
int64_t llama_workspace(int64_t n, int64_t inputs, int dtype, int format, int variant, int threads);

/* Some rows of W as they are stored. W is a table of such parts, one below the other, until all its rows are there. */
typedef struct {
    const uint8_t *w;
    int64_t rows;
} Part;

/* y (n, outputs) = x (n, inputs) · W (outputs, inputs)ᵀ, x and y of `dtype`. `w`: packed weights, with inputs a multiple of
   GROUP, or a table of parts where `format` is AS_STORED + a dtype. */
typedef struct {
    const void *x, *w;
    const uint16_t *scales;
    void *y;
    uint8_t *workspace;
    int64_t n, inputs, outputs;
    int dtype, format, variant;
} Product;

/* What a thread does of a product, until all of y is there. */
void llama_multiply(const Product *p, Team *team);
void llama_multiply_plain(const Product *p, Team *team);
void llama_multiply_tiles(const Product *p, Team *team);
int64_t llama_plain_workspace(int64_t n, int64_t inputs, int dtype, int stored, int variant);

/* A product of plain.c: x in the form that the variant reads, bfloat16 (`pairs`) or float32, its rows `stride` numbers apart;
   y of `dtype`, its rows `outputs` numbers apart; W `stored` in its own way. */
typedef struct {
    const void *x;
    const uint8_t *w;
    void *y;
    int64_t inputs, outputs, stride;
    int dtype, stored, pairs;
} Plain;

int llama_multiplies_pairs(int stored, int variant);
void llama_multiply_near(const Plain *p, int64_t begin, int64_t end, int64_t n, int variant);
int64_t llama_tiles_workspace(int64_t n, int64_t inputs, int threads);
int llama_arm_variant(void);
void llama_arm_rows(
    const uint8_t *const *w, int streams, const void *x, int64_t stride, int64_t inputs, int rows, int stored, int pairs,
    float *sums
);
void llama_arm_block(
    const uint8_t *w, const uint16_t *scales, const Rows *x, int64_t row, int rows, int format, int variant, float *y
);

/* Rows begin … end of y (n, dim) = x / √(mean x² + eps) · weight. */
void llama_norm_rows(
    const void *x, const void *weight, void *y, int64_t begin, int64_t end, int64_t dim, float eps, int dtype, int variant
);

/* heads (n, H + 2K, D), freqs_cis (n, D): cosine, sine, cosine, … → q (n, H, D); keys and values go to the token rows
   `places` of the cache (K, rows, D), whose heads are `stride` numbers apart, and whose numbers are of `dtype` or FLOAT8. */
typedef struct {
    const void *heads;
    const float *freqs_cis;
    void *q, *keys, *values;
    const int64_t *places;
    int64_t stride, n_heads, n_kv_heads, head_dim;
    int dtype, stored;
} Rope;
void llama_rope_rows(const Rope *r, int64_t begin, int64_t end, int variant);

/* Query i, row `rows[i]` of q and out (·, H, D), looks at the first lengths[i] ≤ `longest` positions that begin at token row
   starts[i] of the cache, whose heads are `stride` numbers apart. */
typedef struct {
    const void *q, *keys, *values;
    void *out;
    const int64_t *rows, *starts, *lengths;
    int64_t n, longest, stride, n_heads, n_kv_heads, head_dim;
    int dtype, stored, variant; /* of q and out; of keys and values */
} Attention;
int64_t llama_attend_workspace(int64_t longest, int64_t head_dim, int threads);
void llama_attend_together(const Attention *a, uint8_t *workspace, Team *team);

/* A thread's share of both (n, 2F) → silu(first half) · second half (n, F). */
void llama_silu_and_mul_share(const void *both, void *y, int64_t n, int64_t hidden, int dtype, int variant, int thread,
                              int threads);

#endif
