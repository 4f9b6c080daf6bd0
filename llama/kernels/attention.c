/* Attention over the KV cache: the queries of some tokens against the keys and values of their slots.

   The query heads that share a kv head, of some tokens of one slot side by side, are rows that read its keys and values
   once. Their scores are a product of plain.c, keys being its W; softmax takes two passes over them; then each value is
   added to the rows' sums, one position after the other. So a row comes out the same to the bit whatever is beside it.

   float8 (e4m3, without infinities: https://arxiv.org/abs/2209.05433) is widened to bfloat16, CHUNK positions at a time. */

#include "kernels.h"

enum { TOGETHER = 24, CHUNK = 128 }; /* rows, and positions, that share what is read */
enum { AHEAD = 2048 };               /* how far ahead values are fetched, in bytes */
enum { TILE = 6, WIDE = 4 };         /* rows, and vectors of each, whose sums are in registers */

/* Query heads head … head + heads − 1 of tokens first … first + tokens − 1, which all have the kv head. */
typedef struct {
    int64_t first, head;
    int tokens, heads;
} Group;

/* What a thread works in. */
typedef struct {
    float *scores, *sums;     /* (TOGETHER, longest), (TOGETHER, head_dim) */
    void *queries;            /* (TOGETHER, head_dim) */
    uint16_t *chunk;          /* (CHUNK, head_dim) */
} Room;

/* ------------------------------------------------------------------------------------------------- a row's softmax */

/* eˢ of each scaled score, relative to the largest; returns their sum. */
INLINE float soften(float *scores, int64_t length, float scale) {
    float largest = -INFINITY, total = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t p = 0; p < length; p++) largest = scores[p] > largest ? scores[p] : largest;
#pragma omp simd reduction(+ : total)
    for (int64_t p = 0; p < length; p++) {
        scores[p] = exponential((scores[p] - largest) * scale);
        total += scores[p];
    }
    return total;
}

/* ------------------------------------------------------------------------------------------------- sums of values */

typedef float Lanes __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(64), aligned(2)));
enum { LANES = 16 };

/* 2 · LANES numbers of bfloat16 from `from` on: those at even places, then those at odd ones, which takes no shuffles. */
INLINE void read_pairs(const uint16_t *from, Lanes *even, Lanes *odd) {
    const Bits both = *(const Bits *)from, first = both << 16, second = both & 0xffff0000u;
    memcpy(even, &first, sizeof first);
    memcpy(odd, &second, sizeof second);
}

/* Add positions begin … end of `values` (·, dim), each times its score, to the sums of `rows` rows, from number `d` on and
   as far as `wide` vectors go into `dim`. Returns where it stopped. Sums of bfloat16 lie as `read_pairs` reads. */
INLINE int64_t add_values(
    const float *scores, int64_t apart, int rows, int wide, const void *values, int stored, int64_t begin, int64_t end,
    int64_t d, int64_t dim, float *sums
) {
    for (; d + wide * LANES <= dim; d += wide * LANES) {
        Lanes sum[TILE * WIDE];
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < wide; k++) sum[r * wide + k] = *(const Lanes *)(sums + r * dim + d + k * LANES);
        for (int64_t p = begin; p < end; p++) {
            Lanes value[2 * WIDE];
            const char *ahead = (const char *)values + (p * dim + d) * (stored == BFLOAT16 ? 2 : 4) + AHEAD;
            for (int line = 0; line < wide && rows <= TILE / 2; line += stored == BFLOAT16 ? 2 : 1)
                __builtin_prefetch(ahead + line * LANES * (stored == BFLOAT16 ? 2 : 4));
            for (int k = 0; k < wide; k += 2)
                if (stored == BFLOAT16) read_pairs((const uint16_t *)values + p * dim + d + k * LANES, value + k, value + k + 1);
            for (int k = 0; k < wide; k++)
                if (stored == FLOAT32) value[k] = *(const Lanes *)((const float *)values + p * dim + d + k * LANES);
            for (int r = 0; r < rows; r++)
                for (int k = 0; k < wide; k++) sum[r * wide + k] += value[k] * scores[r * apart + p];
        }
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < wide; k++) *(Lanes *)(sums + r * dim + d + k * LANES) = sum[r * wide + k];
    }
    return d;
}

/* The same for all of `dim`. `most` is the number of vectors that go with TILE rows. */
INLINE void add_all_values(
    const float *scores, int64_t apart, int rows, int most, const void *values, int stored, int64_t begin, int64_t end,
    int64_t dim, float *sums
) {
    int64_t d = 0;
    if (rows <= TILE / 2) d = add_values(scores, apart, rows, 2 * most, values, stored, begin, end, d, dim, sums);
    d = add_values(scores, apart, rows, most, values, stored, begin, end, d, dim, sums);
    if (most > 2) d = add_values(scores, apart, rows, 2, values, stored, begin, end, d, dim, sums);
    for (; d < dim; d++)
        for (int r = 0; r < rows; r++)
            for (int64_t p = begin; p < end; p++)
                sums[r * dim + d] += scores[r * apart + p] * read_number(values, stored, p * dim + d);
}

/* Sums of bfloat16 in the order of their numbers. */
static void in_order(float *sums, int64_t dim) {
    float pairs[2 * LANES];
    for (int64_t d = 0; d + 2 * LANES <= dim; d += 2 * LANES) {
        for (int i = 0; i < LANES; i++) pairs[2 * i] = sums[d + i], pairs[2 * i + 1] = sums[d + LANES + i];
        memcpy(sums + d, pairs, sizeof pairs);
    }
}

/* ------------------------------------------------------------------------------------------------- float8 */

/* Bits of float8 (4 of the exponent with a bias of 7, 3 of the fraction) → bits of bfloat16 (8 with 127, 7). */
INLINE void widen(const uint8_t *from, uint16_t *to, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        uint16_t size = from[i] & 0x7f, sign = (uint16_t)((from[i] & 0x80) << 8);
        uint16_t wide = (uint16_t)((size << 4) + ((127 - 7) << 7));
        wide = size < 8 ? (uint16_t)(0x3c00 + (size - 4) * 32) : wide; /* below 2⁻⁶ there is no leading 1 */
        wide = size < 4 ? (uint16_t)(0x3b80 + (size - 2) * 64) : wide;
        wide = size < 2 ? (uint16_t)(size * 0x3b00) : wide;
        to[i] = sign | (size == 0x7f ? 0x7fc0 : wide);
    }
}

/* ------------------------------------------------------------------------------------------------- variants */

#if X86
/* The same, 32 numbers at a time. */
AVX512 static void widen_avx512(const uint8_t *from, uint16_t *to, int64_t count) {
    static const uint16_t small[32] = {0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60};
    const __m512i table = _mm512_loadu_si512(small), nan = _mm512_set1_epi16(0x7fc0), bias = _mm512_set1_epi16((127 - 7) << 7);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        __m512i bits = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(from + i)));
        __m512i size = _mm512_and_si512(bits, _mm512_set1_epi16(0x7f)), wide = _mm512_add_epi16(_mm512_slli_epi16(size, 4), bias);
        wide = _mm512_mask_permutexvar_epi16(wide, _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(8)), size, table);
        wide = _mm512_mask_mov_epi16(wide, _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x7f)), nan);
        __m512i sign = _mm512_slli_epi16(_mm512_and_si512(bits, _mm512_set1_epi16(0x80)), 8);
        _mm512_storeu_si512(to + i, _mm512_or_si512(wide, sign));
    }
    widen(from + i, to + i, count - i);
}
#endif

#define TILE_OF(rows) \
    case rows: add_all_values(scores, apart, rows, most, values, stored, begin, end, dim, sums); break;
#define VARIANT(target, suffix, most_vectors) \
    target static float soften_##suffix(float *scores, int64_t length, float scale) { return soften(scores, length, scale); } \
    target INLINE void tile_##suffix(const float *scores, int64_t apart, int rows, const void *values, int stored, \
                                     int64_t begin, int64_t end, int64_t dim, float *sums) { \
        const int most = most_vectors; \
        switch (rows) { TILE_OF(1) TILE_OF(2) TILE_OF(3) TILE_OF(4) TILE_OF(5) TILE_OF(6) } \
    } \
    target static void add_##suffix(const float *scores, int64_t apart, int rows, const void *values, int stored, \
                                    int64_t begin, int64_t end, int64_t dim, float *sums) { \
        if (stored == BFLOAT16) tile_##suffix(scores, apart, rows, values, BFLOAT16, begin, end, dim, sums); \
        else tile_##suffix(scores, apart, rows, values, FLOAT32, begin, end, dim, sums); \
    }

static void widen_portable(const uint8_t *from, uint16_t *to, int64_t count) { widen(from, to, count); }
VARIANT(, portable, 2)
#if X86
AVX2 static void widen_avx2(const uint8_t *from, uint16_t *to, int64_t count) { widen(from, to, count); }
VARIANT(AVX2, avx2, 2)
VARIANT(AVX512, avx512, WIDE)
#define CALL(name, variant, ...) \
    ((variant) >= USES_AVX512 ? name##_avx512(__VA_ARGS__) \
     : (variant) == USES_AVX2 ? name##_avx2(__VA_ARGS__) : name##_portable(__VA_ARGS__))
#else
#define CALL(name, variant, ...) name##_portable(__VA_ARGS__)
#endif

/* ------------------------------------------------------------------------------------------------- a group */

/* Positions from … of a slot's keys or values as numbers that products read. */
static const void *chunk_of(const Attention *a, const void *all, int64_t slot, int64_t from, int64_t count, uint16_t *room) {
    int64_t first = slot + from * a->head_dim;
    if (a->stored != FLOAT8) return (const char *)all + first * (a->stored == FLOAT32 ? 4 : 2);
    CALL(widen, a->variant, (const uint8_t *)all + first, room, count * a->head_dim);
    return room;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Add a chunk of values, which begins at position `from`, to the sums of a tile of rows. Each row looks no further than its
   length; the first looks least far. */
static void add_chunk(const Attention *a, const Group *g, const Room *room, int first, int rows, const void *values,
                      int stored, int64_t from, int64_t count) {
    const float *scores = room->scores + first * a->longest + from;
    float *sums = room->sums + first * a->head_dim;
    const int64_t *lengths = a->lengths + g->first;
    int64_t common = least(lengths[first / g->heads] - from, count);
    if (common > 0) CALL(add, a->variant, scores, a->longest, rows, values, stored, 0, common, a->head_dim, sums);
    for (int r = 0; r < rows; r++) {
        int64_t own = least(lengths[(first + r) / g->heads] - from, count), begin = common > 0 ? common : 0;
        if (own > begin)
            CALL(add, a->variant, scores + r * a->longest, a->longest, 1, values, stored, begin, own, a->head_dim,
                 sums + r * a->head_dim);
    }
}

static void attend(const Attention *a, const Group *g, int64_t kv, const Room *room) {
    const int64_t dim = a->head_dim, length = a->lengths[g->first + g->tokens - 1], step = a->stored == FLOAT8 ? CHUNK : length;
    const int64_t slot = kv * a->stride + a->starts[g->first] * dim;
    const int rows = g->tokens * g->heads, stored = a->stored == FLOAT32 ? FLOAT32 : BFLOAT16;
    const int pairs = a->dtype == BFLOAT16 && llama_multiplies_pairs(stored, a->variant);
    for (int r = 0; r < rows; r++) {
        int64_t at = (a->rows[g->first + r / g->heads] * a->n_heads + g->head + r % g->heads) * dim;
        if (pairs) memcpy((uint16_t *)room->queries + r * dim, (const uint16_t *)a->q + at, dim * 2);
        else
            for (int64_t i = 0; i < dim; i++) ((float *)room->queries)[r * dim + i] = read_number(a->q, a->dtype, at + i);
    }
    for (int64_t from = 0; from < length; from += step) {
        int64_t count = least(step, length - from);
        const void *keys = chunk_of(a, a->keys, slot, from, count, room->chunk);
        const Plain p = {room->queries, keys, room->scores + from, dim, a->longest, dim, FLOAT32, stored, pairs};
        llama_multiply_near(&p, 0, count, rows, a->variant);
    }
    float totals[TOGETHER], scale = 1.0f / sqrtf((float)dim);
    for (int r = 0; r < rows; r++)
        totals[r] = CALL(soften, a->variant, room->scores + r * a->longest, a->lengths[g->first + r / g->heads], scale);
    const int tile = a->variant >= USES_AVX512 ? TILE : TILE / 2; /* there are 32 registers, or 16 */
    memset(room->sums, 0, sizeof(float) * rows * dim);
    for (int64_t from = 0; from < length; from += CHUNK) {
        int64_t count = least(CHUNK, length - from);
        const void *values = chunk_of(a, a->values, slot, from, count, room->chunk);
        for (int r = 0; r < rows; r += tile) add_chunk(a, g, room, r, (int)least(rows - r, tile), values, stored, from, count);
    }
    for (int r = 0; r < rows; r++) {
        int64_t at = (a->rows[g->first + r / g->heads] * a->n_heads + g->head + r % g->heads) * dim;
        if (stored == BFLOAT16) in_order(room->sums + r * dim, dim);
        for (int64_t i = 0; i < dim; i++) write_number(a->out, a->dtype, at + i, room->sums[r * dim + i] / totals[r]);
    }
}

/* ------------------------------------------------------------------------------------------------- all groups */

static uint8_t *take(uint8_t **at, int64_t bytes) {
    uint8_t *part = *at;
    *at += (bytes + 63) & ~(int64_t)63;
    return part;
}

static Room room_of(int64_t longest, int64_t head_dim, uint8_t **at) {
    Room room;
    room.scores = (float *)take(at, TOGETHER * longest * 4);
    room.sums = (float *)take(at, TOGETHER * head_dim * 4);
    room.queries = take(at, TOGETHER * head_dim * 4);
    room.chunk = (uint16_t *)take(at, CHUNK * head_dim * 2);
    return room;
}

/* Bytes of the workspace that attention needs which sees at most `longest` positions. */
int64_t llama_attend_workspace(int64_t longest, int64_t head_dim, int threads) {
    uint8_t *at = 0;
    room_of(longest, head_dim, &at);
    return (int64_t)(uintptr_t)at * threads + 64;
}

/* How many tokens from i on are of one slot and at positions one after the other, up to `most`. */
static int tokens_together(const Attention *a, int64_t i, int64_t most) {
    int64_t end = i + 1;
    while (end < a->n && end - i < most && a->starts[end] == a->starts[i] && a->lengths[end] == a->lengths[end - 1] + 1) end++;
    return (int)(end - i);
}

/* What a thread does of attention. Each finds the same groups: those of the first tokens, one for each part of a kv head's
   query heads, then those of the next tokens. */
void llama_attend_together(const Attention *a, uint8_t *workspace, Team *team) {
    const int64_t heads = a->n_heads / a->n_kv_heads, most = heads < TOGETHER ? TOGETHER / heads : 1;
    const int64_t size = least(heads, TOGETHER), parts = (heads + size - 1) / size, each = a->n_kv_heads * parts;
    uint8_t *at = (uint8_t *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    Room room;
    for (int thread = 0; thread <= team->thread; thread++) room = room_of(a->longest, a->head_dim, &at);
    int64_t groups = 0;
    for (int64_t first = 0; first < a->n; first += tokens_together(a, first, most)) groups += each;
    const int64_t per = (groups + team->threads - 1) / team->threads;
    KEPT_PIECES(piece, team, per) {
        int64_t first = 0, group = piece, head;
        for (; group >= each && first < a->n; group -= each) first += tokens_together(a, first, most);
        if (first < a->n) {
            head = group % parts * size;
            const Group g = {first, group / parts * heads + head, tokens_together(a, first, most), (int)least(size, heads - head)};
            attend(a, &g, group / parts, &room);
        }
    }
}

/* The whole of attention, by `threads` threads. */
void llama_attend(
    const void *q, const void *keys, const void *values, void *out, const int64_t *rows, const int64_t *starts,
    const int64_t *lengths, uint8_t *workspace, int64_t n, int64_t longest, int64_t stride, int64_t n_heads,
    int64_t n_kv_heads, int64_t head_dim, int dtype, int stored, int variant, int threads
) {
    const Attention a = {q, keys, values, out, rows, starts, lengths, n, longest, stride, n_heads, n_kv_heads, head_dim, dtype,
                         stored, variant};
    Share shares[threads];
    Work work = llama_work(shares, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Team team = llama_team(&work);
        llama_attend_together(&a, workspace, &team);
    }
}
