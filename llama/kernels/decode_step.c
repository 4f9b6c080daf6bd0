/* A whole decode step in one call. Beside reading the weights, a step of few rows mostly costs its calls from Python. The
   operations are those of quantized.c and ops.c, in the order in which model/transformer.py has them. */

#include "kernels.h"

/* One layer: the pointers that decode_step.py passes; of matrices, those that llama_product takes. */
typedef struct {
    const void *attention_norm, *wqkv, *wqkv_scales, *wo, *wo_scales;
    const void *ffn_norm, *w13, *w13_scales, *w2, *w2_scales;
    void *keys, *values;
} Layer;

/* What is before the layers and after them. `freqs_cis`: (positions, head_dim), see ops.c. */
typedef struct {
    const void *embeddings, *norm, *output, *output_scales;
    const float *freqs_cis;
} Ends;

typedef struct {
    int64_t n, dim, hidden, vocab, n_heads, n_kv_heads, head_dim, max_seq_len, slots;
    float eps;
    int dtype, stored, format, output_format, variant, threads; /* stored: of the cache */
} Shape;

/* ------------------------------------------------------------------------------------------------- a layer */

static void multiply(const Shape *s, int format, const void *x, const void *w, const void *scales, void *y, int64_t inputs,
                     int64_t outputs, uint8_t *workspace, Team *team) {
    const Product p = {x, w, scales, y, workspace, s->n, inputs, outputs, s->dtype, format, s->variant};
    llama_multiply(&p, team);
}

/* The parts of the workspace, each on whole cache lines. */
typedef struct {
    void *x, *normed, *wide, *q, *attended, *result;
    float *freqs_cis;
    int64_t *rows, *starts, *lengths, *places;
    uint8_t *attention, *product, *end;
} Parts;

static uint8_t *take(uint8_t **at, int64_t bytes) {
    uint8_t *part = *at;
    *at += (bytes + 63) & ~(int64_t)63;
    return part;
}

static Parts parts_of(const Shape *s, int64_t longest, uint8_t *workspace) {
    int64_t size = s->dtype == BFLOAT16 ? 2 : 4, heads = s->n_heads * s->head_dim, n = s->n;
    int64_t wide = heads + 2 * s->n_kv_heads * s->head_dim, inputs = s->hidden > s->dim ? s->hidden : s->dim;
    if (wide < 2 * s->hidden) wide = 2 * s->hidden;
    if (wide < s->vocab) wide = s->vocab;
    if (inputs < heads) inputs = heads;
    uint8_t *at = (uint8_t *)(((uintptr_t)workspace + 63) & ~(uintptr_t)63);
    Parts p;
    p.x = take(&at, n * s->dim * size);
    p.normed = take(&at, n * inputs * size);
    p.wide = take(&at, n * wide * size);
    p.q = take(&at, n * heads * size);
    p.attended = take(&at, n * heads * size);
    p.result = take(&at, n * s->dim * size);
    p.freqs_cis = (float *)take(&at, n * s->head_dim * 4);
    p.rows = (int64_t *)take(&at, n * 8);
    p.starts = (int64_t *)take(&at, n * 8);
    p.lengths = (int64_t *)take(&at, n * 8);
    p.places = (int64_t *)take(&at, n * 8);
    int64_t product = llama_workspace(n, inputs, s->dtype, s->format, s->variant, s->threads);
    int64_t last = llama_workspace(n, s->dim, s->dtype, s->output_format, s->variant, s->threads);
    p.product = take(&at, product > last ? product : last);
    p.attention = take(&at, llama_attend_workspace(longest, s->head_dim, s->threads));
    p.end = at;
    return p;
}

/* Bytes of the workspace that a step needs whose longest sequence is `longest` tokens. */
int64_t llama_step_workspace(const Shape *shape, int64_t longest) {
    return (int64_t)(uintptr_t)parts_of(shape, longest, 0).end + 64;
}

/* The rows of a share. */
static int64_t first_row(const Shape *s, const Team *team, int64_t share) { return s->n * share / team->threads; }

/* x + y → x, where there is a y, then its RMSNorm. */
static void add_and_norm(const Shape *s, const void *y, const void *weight, const Parts *p, Team *team) {
    KEPT_PIECES(share, team, 1) {
        int64_t begin = first_row(s, team, share), end = first_row(s, team, share + 1);
        for (int64_t i = begin * s->dim; y && i < end * s->dim; i++)
            write_number(p->x, s->dtype, i, read_number(p->x, s->dtype, i) + read_number(y, s->dtype, i));
        llama_norm_rows(p->x, weight, p->normed, begin, end, s->dim, s->eps, s->dtype, s->variant);
    }
}

/* What a thread does of a layer. Its norm is done already; at its end comes that of the next one, with the weight `next`. */
static void run_layer(const Shape *s, const Layer *layer, const void *next, int64_t longest, const Parts *p, Team *team) {
    const int64_t heads = s->n_heads * s->head_dim, stride = s->slots * s->max_seq_len * s->head_dim;
    const Rope rope = {p->wide, p->freqs_cis, p->q, layer->keys, layer->values, p->places, stride, s->n_heads, s->n_kv_heads,
                       s->head_dim, s->dtype, s->stored};
    const Attention attention = {p->q, layer->keys, layer->values, p->attended, p->rows, p->starts, p->lengths, s->n, longest,
                                 stride, s->n_heads, s->n_kv_heads, s->head_dim, s->dtype, s->stored, s->variant};
    multiply(s, s->format, p->normed, layer->wqkv, layer->wqkv_scales, p->wide, s->dim,
             heads + 2 * s->n_kv_heads * s->head_dim, p->product, team);
    KEPT_PIECES(share, team, 1) {
        llama_rope_rows(&rope, first_row(s, team, share), first_row(s, team, share + 1), s->variant);
    }
    llama_attend_together(&attention, p->attention, team);
    multiply(s, s->format, p->attended, layer->wo, layer->wo_scales, p->result, heads, s->dim, p->product, team);
    add_and_norm(s, p->result, layer->ffn_norm, p, team);
    multiply(s, s->format, p->normed, layer->w13, layer->w13_scales, p->wide, s->dim, 2 * s->hidden, p->product, team);
    KEPT_PIECES(share, team, 1) {
        llama_silu_and_mul_share(p->wide, p->normed, s->n, s->hidden, s->dtype, s->variant, (int)share, team->threads);
    }
    multiply(s, s->format, p->normed, layer->w2, layer->w2_scales, p->result, s->hidden, s->dim, p->product, team);
    add_and_norm(s, p->result, next, p, team);
}

/* tokens[i] at positions[i] of slot slots[i] → logits (n, vocab). Tokens of one slot, at positions one after the other,
   see each other as a prompt's do: in each layer the keys and values of all are written before any query looks. */
void llama_step(
    const Layer *layers, int64_t n_layers, const Ends *ends, const Shape *s, const int64_t *tokens, const int64_t *slots,
    const int64_t *positions, int64_t longest, float *logits, uint8_t *workspace
) {
    const Parts p = parts_of(s, longest, workspace);
    const int64_t row_bytes = s->dim * (s->dtype == BFLOAT16 ? 2 : 4), numbers = s->n * s->vocab;
    for (int64_t i = 0; i < s->n; i++) {
        memcpy((char *)p.x + i * row_bytes, (const char *)ends->embeddings + tokens[i] * row_bytes, row_bytes);
        memcpy(p.freqs_cis + i * s->head_dim, ends->freqs_cis + positions[i] * s->head_dim, s->head_dim * sizeof(float));
        p.rows[i] = i;
        p.starts[i] = slots[i] * s->max_seq_len;
        p.places[i] = p.starts[i] + positions[i];
        p.lengths[i] = positions[i] + 1;
    }
    Share shares[s->threads];
    Work work = llama_work(shares, s->threads);
#pragma omp parallel num_threads(s->threads) if (s->threads > 1)
    {
        Team team = llama_team(&work);
        add_and_norm(s, 0, n_layers ? layers[0].attention_norm : ends->norm, &p, &team);
        for (int64_t i = 0; i < n_layers; i++)
            run_layer(s, layers + i, i + 1 < n_layers ? layers[i + 1].attention_norm : ends->norm, longest, &p, &team);
        multiply(s, s->output_format, p.normed, ends->output, ends->output_scales, p.wide, s->dim, s->vocab, p.product, &team);
        KEPT_PIECES(share, &team, 1) {
            for (int64_t i = numbers * share / team.threads; i < numbers * (share + 1) / team.threads; i++)
                logits[i] = read_number(p.wide, s->dtype, i);
        }
    }
}
