/* All layers of a decode step in one call: what a step of few rows costs beside reading the weights is mostly the calls.
   The operations are those of quantized.c and small.c, in the order in which model.py has them. */

#include "kernels.h"

enum { INT8, INT4, PLAIN };
enum { TILE = 4, AHEAD = 8 };

/* One layer, as Python lays it out: a table of pointers. */
typedef struct {
    const void *attention_norm, *wqkv, *wqkv_scales, *wo, *wo_scales;
    const void *ffn_norm, *w13, *w13_scales, *w2, *w2_scales;
    void *keys, *values;
} Layer;

typedef struct {
    int64_t n, longest, dim, hidden, n_heads, n_kv_heads, head_dim, stride;
    float eps;
    int dtype, format, variant, threads;
} Shape;

/* ------------------------------------------------------------------------------------------------- bfloat16 weights */

#if X86
/* `outs` rows of W against `rows` rows of x, both bfloat16, summed in float32. */
AMX INLINE void plain_tile(const uint16_t *w, const uint16_t *x, int64_t inputs, int outs, int rows, float *y) {
    __m512 sum[TILE][TILE];
    for (int r = 0; r < outs; r++)
        for (int n = 0; n < rows; n++) sum[r][n] = _mm512_setzero_ps();
    for (int64_t i = 0; i < inputs; i += 32) {
        __mmask32 there = inputs - i >= 32 ? 0xffffffffu : (1u << (inputs - i)) - 1;
        __m512bh numbers[TILE];
        for (int r = 0; r < outs; r++) {
            _mm_prefetch((const char *)(w + (r + AHEAD) * inputs + i), _MM_HINT_T0);
            numbers[r] = (__m512bh)_mm512_maskz_loadu_epi16(there, w + r * inputs + i);
        }
        for (int n = 0; n < rows; n++) {
            __m512bh own = (__m512bh)_mm512_maskz_loadu_epi16(there, x + n * inputs + i);
            for (int r = 0; r < outs; r++) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], numbers[r], own);
        }
    }
    for (int r = 0; r < outs; r++)
        for (int n = 0; n < rows; n++) y[r * TILE + n] = _mm512_reduce_add_ps(sum[r][n]);
}

#define CASES(rows) \
    case rows: plain_tile(w, x, inputs, 1, rows, y); break; \
    case 8 + rows: plain_tile(w, x, inputs, TILE, rows, y); break;

AMX static void plain_rows(const uint16_t *w, const uint16_t *x, int64_t inputs, int outs, int rows, float *y) {
    switch ((outs == TILE) * 8 + rows) { CASES(1) CASES(2) CASES(3) CASES(4) }
}

static void plain_outputs(
    const uint16_t *x, const uint16_t *w, uint16_t *y, int64_t n, int64_t inputs, int64_t begin, int64_t end,
    int64_t outputs
) {
    for (int64_t out = begin; out < end;) {
        int outs = end - out < TILE ? 1 : TILE;
        for (int64_t row = 0; row < n; row += TILE) {
            int rows = n - row < TILE ? (int)(n - row) : TILE;
            float results[TILE * TILE];
            plain_rows(w + out * inputs, x + row * inputs, inputs, outs, rows, results);
            for (int r = 0; r < outs; r++)
                for (int i = 0; i < rows; i++) y[(row + i) * outputs + out + r] = to_bfloat16(results[r * TILE + i]);
        }
        out += outs;
    }
}
#endif

/* y (n, outputs) = x (n, inputs) · W (outputs, inputs)ᵀ, all bfloat16; only where the variant is USES_AMX. */
void llama_plain_product(
    const uint16_t *x, const uint16_t *w, uint16_t *y, int64_t n, int64_t inputs, int64_t outputs, int threads
) {
#if X86
    int64_t share = ((outputs + threads - 1) / threads + TILE - 1) / TILE * TILE;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        int64_t begin = thread * share, end = begin + share < outputs ? begin + share : outputs;
        if (begin < end) plain_outputs(x, w, y, n, inputs, begin, end, outputs);
    }
#endif
}

/* ------------------------------------------------------------------------------------------------- a layer */

static void product(const Shape *s, const void *x, const void *w, const void *scales, void *y, int64_t inputs,
                    int64_t outputs, uint8_t *workspace) {
    if (s->format == PLAIN) llama_plain_product(x, w, y, s->n, inputs, outputs, s->threads);
    else
        llama_product(x, w, scales, y, workspace, s->n, inputs, outputs, s->dtype, s->format, s->variant, s->threads);
}

static void add(const Shape *s, void *x, const void *y) {
    for (int64_t i = 0; i < s->n * s->dim; i++)
        write_number(x, s->dtype, i, read_number(x, s->dtype, i) + read_number(y, s->dtype, i));
}

/* Where the parts of the workspace begin, in bytes: what a layer writes, rounded up to whole cache lines. */
typedef struct {
    int64_t normed, wide, q, attended, result, scores, product, end;
} Places;

static Places places_of(const Shape *s) {
    int64_t size = s->dtype == BFLOAT16 ? 2 : 4, heads = s->n_heads * s->head_dim;
    int64_t qkv = heads + 2 * s->n_kv_heads * s->head_dim;
    int64_t widest = 2 * s->hidden > qkv ? 2 * s->hidden : qkv, inputs = s->hidden > s->dim ? s->hidden : s->dim;
    int64_t lengths[7] = {s->n * (s->hidden > s->dim ? s->hidden : s->dim) * size, s->n * widest * size, s->n * heads * size,
                          s->n * heads * size, s->n * s->dim * size, s->threads * s->longest * 4,
                          llama_workspace(s->n, inputs > heads ? inputs : heads)};
    int64_t at[8] = {0};
    for (int i = 0; i < 7; i++) at[i + 1] = (at[i] + lengths[i] + 63) & ~(int64_t)63;
    return (Places){at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]};
}

int64_t llama_layers_workspace(const Shape *shape) { return places_of(shape).end + 64; }

/* x (n, dim) goes through all layers in place. Row i is the token at cache row places[i] of its slot, which begins at cache
   row starts[i]; with it the slot holds lengths[i] tokens. */
void llama_layers(
    const Layer *layers, int64_t n_layers, const Shape *s, void *x, const float *turns, const int64_t *rows,
    const int64_t *places, const int64_t *starts, const int64_t *lengths, uint8_t *workspace
) {
    Places at = places_of(s);
    uint8_t *base = (uint8_t *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    void *normed = base + at.normed, *wide = base + at.wide, *q = base + at.q, *attended = base + at.attended;
    void *result = base + at.result;
    int64_t heads = s->n_heads * s->head_dim, work = s->n * s->longest * heads;
    int few = s->n * s->dim > 1 << 14 ? s->threads : 1, attending = work > 1 << 14 ? s->threads : 1;
    for (int64_t i = 0; i < n_layers; i++) {
        const Layer *layer = layers + i;
        llama_rms_norm(x, layer->attention_norm, normed, s->n, s->dim, s->eps, s->dtype, s->variant, few);
        product(s, normed, layer->wqkv, layer->wqkv_scales, wide, s->dim, heads + 2 * s->n_kv_heads * s->head_dim,
                base + at.product);
        llama_turn(wide, turns, q, layer->keys, layer->values, places, s->n, s->stride, s->n_heads, s->n_kv_heads,
                   s->head_dim, s->dtype, s->variant, few);
        llama_attend(q, layer->keys, layer->values, attended, rows, starts, lengths, (float *)(base + at.scores), s->n,
                     s->longest, s->stride, s->n_heads, s->n_kv_heads, s->head_dim, s->dtype, s->variant, attending);
        product(s, attended, layer->wo, layer->wo_scales, result, heads, s->dim, base + at.product);
        add(s, x, result);
        llama_rms_norm(x, layer->ffn_norm, normed, s->n, s->dim, s->eps, s->dtype, s->variant, few);
        product(s, normed, layer->w13, layer->w13_scales, wide, s->dim, 2 * s->hidden, base + at.product);
        llama_gate(wide, normed, s->n, s->hidden, s->dtype, s->variant, few);
        product(s, normed, layer->w2, layer->w2_scales, result, s->hidden, s->dim, base + at.product);
        add(s, x, result);
    }
}
