/* Every variant of the kernels that this processor has, against plain arithmetic in doubles: random shapes, odd sizes,
   extremes. A row must come out the same, to the bit, alone and in company, on one thread and on several.

   Buffers are as large as they must be and no larger, so that a sanitizer sees what is read or written beyond them. */

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "decode_step.c" /* for its structures; the other files are linked */

void llama_quantize(
    const void *from, uint8_t *q, uint16_t *scales, int64_t groups, int dtype, int format, int variant, int threads
);
void llama_pack(const uint32_t *from, uint32_t *to, int64_t rows, int64_t groups, int64_t fours, int threads);
void llama_dequantize(
    const uint8_t *w, const uint16_t *scales, void *to, int64_t inputs, int64_t outputs, int dtype, int format,
    int variant, int threads
);
void llama_product(
    const void *x, const void *w, const uint16_t *scales, void *y, uint8_t *workspace, int64_t n, int64_t inputs,
    int64_t outputs, int dtype, int format, int variant, int threads
);
void llama_rms_norm(const void *x, const void *weight, void *y, int64_t n, int64_t dim, float eps, int dtype, int variant,
                    int threads);
void llama_rope(
    const void *heads, const float *freqs_cis, void *q, void *keys, void *values, const int64_t *places, int64_t n,
    int64_t stride, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int dtype, int stored, int variant, int threads
);
void llama_attend(
    const void *q, const void *keys, const void *values, void *out, const int64_t *rows, const int64_t *starts,
    const int64_t *lengths, uint8_t *workspace, int64_t n, int64_t longest, int64_t stride, int64_t n_heads,
    int64_t n_kv_heads, int64_t head_dim, int dtype, int stored, int variant, int threads
);
void llama_silu_and_mul(const void *both, void *y, int64_t n, int64_t hidden, int dtype, int variant, int threads);
void llama_greedy(const float *logits, int64_t *tokens, uint8_t *finite, int64_t n, int64_t vocab, int variant);
int64_t llama_sample_workspace(int64_t vocab);
void llama_sample(
    const float *logits, const float *numbers, const int64_t *top_k, int64_t *tokens, uint8_t *workspace, int64_t n,
    int64_t vocab, int variant, int threads
);

enum { SEVERAL = 3 }; /* threads */
static const char *const DTYPES[] = {"float32", "bfloat16", "float16"};
static const char *const FORMATS[] = {"int8", "int4", "packed bfloat16", "float32", "bfloat16", "float16"};
static int failures, checks;

#define CHECK(right, ...) \
    do { \
        checks++; \
        if (!(right)) { \
            failures++; \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #right); \
            printf(__VA_ARGS__); \
            printf("\n"); \
        } \
    } while (0)

/* ------------------------------------------------------------------------------------------------- numbers, buffers */

static uint64_t state = 1;

/* A whole number below `limit`, from a generator by Marsaglia. */
static int64_t below(int64_t limit) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (int64_t)((state >> 11) % (uint64_t)limit);
}

/* −1 … 1. */
static float number(void) { return (float)below(1 << 24) * 0x1p-23f - 1; }

static void *buffer(int64_t bytes) {
    void *memory = malloc((size_t)bytes);
    if (!memory && bytes) exit(2);
    return memory;
}

static int64_t size_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

static double get(const void *from, int dtype, int64_t i) {
    return dtype == FLOAT16 ? from_float16(((const uint16_t *)from)[i]) : read_number(from, dtype, i);
}

/* Float16 by dropping bits: exact where the number has few. */
static void put(void *to, int dtype, int64_t i, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (dtype != FLOAT16) write_number(to, dtype, i, value);
    else if (isnan(value)) ((uint16_t *)to)[i] = 0x7e00;
    else if (fabsf(value) < 0x1p-14f) ((uint16_t *)to)[i] = (uint16_t)(bits >> 16 & 0x8000);
    else ((uint16_t *)to)[i] = (uint16_t)((bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - 0x38000000) >> 13);
}

static void *random_numbers(int64_t count, int dtype, float size) {
    void *all = buffer(count * size_of(dtype));
    for (int64_t i = 0; i < count; i++) put(all, dtype, i, number() * size);
    return all;
}

static void *copy_of(const void *from, int64_t bytes) { return memcpy(buffer(bytes), from, (size_t)bytes); }

static int same(const void *a, const void *b, int64_t bytes) { return !memcmp(a, b, (size_t)bytes); }

/* ------------------------------------------------------------------------------------------------- products */

/* y (n, outputs) = x (n, inputs) · W (outputs, inputs)ᵀ in one variant, and W in doubles. */
typedef struct {
    int variant, dtype, format;
    int64_t n, inputs, outputs;
    uint8_t *w;
    uint16_t *scales; /* of packed weights */
    double *exact;    /* (outputs, inputs) */
} Case;

static void *multiplied(const Case *p, const void *x, int64_t n, int threads) {
    int64_t bytes = llama_workspace(n, p->inputs, p->dtype, p->format, p->variant, threads);
    uint8_t *workspace = buffer(bytes);
    void *y = buffer(n * p->outputs * size_of(p->dtype));
    memset(workspace, 0xff, (size_t)bytes); /* what an earlier product left */
    /* As stored, W is in three parts, one of which may be empty. */
    int64_t first = p->outputs / 3, second = p->outputs / 2 - first, row = p->inputs * size_of(p->format - AS_STORED);
    const Part parts[] = {
        {p->w, first}, {p->w + first * row, second}, {p->w + (first + second) * row, p->outputs - first - second}
    };
    const void *w = p->format >= AS_STORED ? (const void *)parts : p->w;
    llama_product(x, w, p->scales, y, workspace, n, p->inputs, p->outputs, p->dtype, p->format, p->variant, threads);
    free(workspace);
    return y;
}

static int64_t padded(int64_t outputs) { return (outputs + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS; }

static int64_t scale_place(const Case *p, int64_t out, int64_t in) {
    return (out / BLOCK_ROWS * (p->inputs / GROUP) + in / GROUP) * BLOCK_ROWS + out % BLOCK_ROWS;
}

/* Integers of all values, also −128, which we write nowhere; scales of both signs. */
static void make_quantised(Case *p) {
    int64_t groups = p->inputs / GROUP, per = p->format == INT8 ? GROUP : GROUP / 2, fours = per / 4;
    uint8_t *q = buffer(p->outputs * groups * per);
    for (int64_t i = 0; i < p->outputs * groups * per; i++) q[i] = (uint8_t)(below(8) ? below(256) : 0x80);
    p->w = buffer(padded(p->outputs) * groups * per);
    llama_pack((const uint32_t *)q, (uint32_t *)p->w, p->outputs, groups, fours, 1);
    p->scales = buffer(padded(p->outputs) * groups * 2);
    for (int64_t i = 0; i < padded(p->outputs) * groups; i++) put(p->scales, FLOAT16, i, number());
    for (int64_t out = 0; out < p->outputs; out++)
        for (int64_t i = 0; i < p->inputs; i++) {
            const uint8_t *own = q + (out * groups + i / GROUP) * per;
            int64_t at = i % GROUP, half = GROUP / 2;
            int integer = p->format == INT8 ? (int8_t)own[at] : (at < half ? own[at] & 15 : own[at - half] >> 4) - 8;
            p->exact[out * p->inputs + i] = get(p->scales, FLOAT16, scale_place(p, out, i)) * integer;
        }
    free(q);
}

static void make_weights(Case *p, float size) {
    p->scales = 0;
    p->exact = buffer(p->outputs * p->inputs * 8);
    if (p->format < PLAIN) {
        make_quantised(p);
        return;
    }
    int stored = p->format == PLAIN ? BFLOAT16 : p->format - AS_STORED;
    uint8_t *w = random_numbers(p->outputs * p->inputs, stored, size);
    for (int64_t i = 0; i < p->outputs * p->inputs; i++) p->exact[i] = get(w, stored, i);
    p->w = w;
    if (p->format != PLAIN) return;
    p->w = buffer(padded(p->outputs) * p->inputs * 2);
    llama_pack((const uint32_t *)w, (uint32_t *)p->w, p->outputs, p->inputs / GROUP, GROUP / 2, 1);
    free(w);
}

/* How far a result may be from the exact one: float32 sums, a result in 16 bits, and int8 activations. */
static double bound(const Case *p, const void *x, int64_t row, int64_t out) {
    double size = 0, off = 0;
    for (int64_t first = 0; first < p->inputs; first += GROUP) {
        double largest = 0, weights = 0;
        for (int64_t i = first; i < first + GROUP && i < p->inputs; i++) {
            double number = fabs(get(x, p->dtype, row * p->inputs + i)), weight = fabs(p->exact[out * p->inputs + i]);
            largest = number > largest ? number : largest;
            weights += weight;
            size += number * weight;
        }
        off += weights * (largest / 127 * 0.5001 + 1e-30);
    }
    return size * (p->dtype == BFLOAT16 ? 0x1p-8 : 1e-5) + (p->format < PLAIN ? off * 1.01 : 0) + 1e-37;
}

static void check_against_doubles(const Case *p, const void *x, const void *y) {
    for (int64_t row = 0; row < p->n; row++)
        for (int64_t out = 0; out < p->outputs; out++) {
            double exact = 0, found = get(y, p->dtype, row * p->outputs + out);
            for (int64_t i = 0; i < p->inputs; i++)
                exact += get(x, p->dtype, row * p->inputs + i) * p->exact[out * p->inputs + i];
            CHECK(fabs(found - exact) <= bound(p, x, row, out),
                  "variant %d, %s × %s, row %d of %d, output %d of %d, %d inputs: %g, not %g", p->variant, DTYPES[p->dtype],
                  FORMATS[p->format], (int)row, (int)p->n, (int)out, (int)p->outputs, (int)p->inputs, found, exact);
        }
}

/* One number of x, or of W, that is not finite, reaches its own results and no others. */
static void check_poison(const Case *p, const void *x, const void *y) {
    static const float BAD[] = {NAN, INFINITY, -INFINITY};
    int64_t row = below(p->n), out = below(p->outputs), size = size_of(p->dtype), in = below(2) ? p->inputs - 1 : 0;
    int stored = p->format - AS_STORED;
    void *poisoned = copy_of(x, p->n * p->inputs * size);
    float bad = BAD[below(3)];
    put(poisoned, p->dtype, row * p->inputs + in, bad);
    if (p->format < PLAIN)
        p->scales[scale_place(p, out, in)] = 0x7e00;
    else if (p->format >= AS_STORED) put(p->w, stored, out * p->inputs + in, stored == FLOAT16 ? NAN : bad);
    else out = -1; /* where a packed weight lies is not said again here */
    void *found = multiplied(p, poisoned, p->n, 1);
    for (int64_t r = 0; r < p->n; r++)
        for (int64_t o = 0; o < p->outputs; o++) {
            int64_t at = r * p->outputs + o;
            int bad_one = r == row || o == out, right = isfinite(get(found, p->dtype, at)) ? !bad_one : bad_one;
            if (!bad_one) right = right && same((char *)found + at * size, (const char *)y + at * size, size);
            CHECK(right, "variant %d, %s × %s, %d inputs: %g in row %d or output %d made row %d, output %d %g", p->variant,
                  DTYPES[p->dtype], FORMATS[p->format], (int)p->inputs, bad, (int)row, (int)out, (int)r, (int)o,
                  get(found, p->dtype, at));
        }
    free(found);
    free(poisoned);
}

static void check_product(int variant, int dtype, int format, int64_t n, int64_t inputs, int64_t outputs, float size) {
    Case p = {.variant = variant, .dtype = dtype, .format = format, .n = n, .inputs = inputs, .outputs = outputs};
    make_weights(&p, format < PLAIN || size < 1 ? 1 : 1e-3f);
    void *x = random_numbers(n * inputs, dtype, size), *y = multiplied(&p, x, n, 1);
    void *by_several = multiplied(&p, x, n, SEVERAL);
    int64_t row_bytes = outputs * size_of(dtype), rows;
    check_against_doubles(&p, x, y);
    CHECK(same(y, by_several, n * row_bytes), "variant %d, %s × %s, n %d: threads change bits", variant, DTYPES[dtype],
          FORMATS[format], (int)n);
    int64_t least = format == PLAIN && n > 2 ? 3 : 1; /* tiles, which multiply those, are another order than vectors */
    for (int64_t begin = 0; begin < n; begin += rows) { /* alone, or with few others */
        rows = least + below(4);
        if (rows > n) rows = n;
        if (begin + rows > n) begin = n - rows;
        void *own = copy_of((char *)x + begin * inputs * size_of(dtype), rows * inputs * size_of(dtype));
        void *alone = multiplied(&p, own, rows, 1);
        CHECK(same(alone, (char *)y + begin * row_bytes, rows * row_bytes),
              "variant %d, %s × %s, rows %d to %d of %d, %d inputs: company changes bits", variant, DTYPES[dtype],
              FORMATS[format], (int)begin, (int)(begin + rows - 1), (int)n, (int)inputs);
        free(own);
        free(alone);
    }
    check_poison(&p, x, y);
    free(x), free(y), free(by_several), free(p.w), free(p.scales), free(p.exact);
}

/* Zeros give zeros. */
static void check_zeros(int variant, int dtype, int format) {
    Case p = {.variant = variant, .dtype = dtype, .format = format, .n = 3, .inputs = 96, .outputs = 17};
    make_weights(&p, 1);
    void *x = random_numbers(p.n * p.inputs, dtype, 0), *y = multiplied(&p, x, p.n, 1);
    for (int64_t i = 0; i < p.n * p.outputs; i++)
        CHECK(get(y, dtype, i) == 0, "variant %d, %s × %s: 0 · W gave %g", variant, DTYPES[dtype], FORMATS[format],
              get(y, dtype, i));
    free(x), free(y), free(p.w), free(p.scales), free(p.exact);
}

static int is_offered(int variant, int dtype, int format) {
    if (format == PLAIN) return X86 && variant == USES_AMX && dtype == BFLOAT16;
    return dtype == FLOAT32 || format <= PLAIN || format == AS_STORED + BFLOAT16;
}

static void check_products(int variant) {
    static const int OUTPUTS[] = {1, 2, 3, 5, 16, 17, 31, 67}, INPUTS[] = {1, 7, 8, 9, 15, 16, 17, 33, 64, 101};
    static const int ROWS_OF_X[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 23, 40};
    static const float SIZES[] = {1, 1, 1, 1e30f, 1e-20f};
    for (int dtype = FLOAT32; dtype <= BFLOAT16; dtype++)
        for (int format = INT8; format <= AS_STORED + FLOAT16; format++) {
            if (!is_offered(variant, dtype, format)) continue;
            check_zeros(variant, dtype, format);
            int counts = variant == USES_AMX && format < AS_STORED ? 16 : 19; /* AMX's tiles sum in another order */
            for (int k = 0; k < counts; k++)
                for (int again = 0; again < 2; again++) {
                    int n = ROWS_OF_X[k];
                    int64_t inputs = format < AS_STORED ? GROUP * (1 + below(5)) : INPUTS[below(10)];
                    int64_t outputs = OUTPUTS[below(8)];
                    check_product(variant, dtype, format, n, inputs, outputs, SIZES[below(5)]);
                }
        }
}

/* ------------------------------------------------------------------------------------------------- quantising */

/* Integers times scales are what dequantising gives; they are near the weights; a group that is not finite says so. */
static void check_quantising(int variant, int dtype, int format) {
    enum { OUTPUTS = 19, GROUPS = 5 };
    int64_t count = OUTPUTS * GROUPS * GROUP, per = format == INT8 ? GROUP : GROUP / 2;
    double off = 0, all = 0;
    Case p = {.inputs = GROUPS * GROUP};
    void *from = random_numbers(count, dtype, 1), *back = buffer(count * size_of(dtype));
    uint8_t *q = buffer(count / GROUP * per);
    uint16_t *scales = buffer(OUTPUTS * GROUPS * 2);
    llama_quantize(from, q, scales, OUTPUTS * GROUPS, dtype, format, variant, SEVERAL);
    p.w = buffer(padded(OUTPUTS) * GROUPS * per), p.scales = buffer(padded(OUTPUTS) * GROUPS * 2);
    llama_pack((const uint32_t *)q, (uint32_t *)p.w, OUTPUTS, GROUPS, per / 4, SEVERAL);
    for (int64_t out = 0; out < padded(OUTPUTS); out++)
        for (int64_t group = 0; group < GROUPS; group++)
            p.scales[scale_place(&p, out, group * GROUP)] = out < OUTPUTS ? scales[out * GROUPS + group] : 0;
    llama_dequantize(p.w, p.scales, back, p.inputs, OUTPUTS, dtype, format, variant, SEVERAL);
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *own = q + i / GROUP * per;
        int64_t at = i % GROUP, half = GROUP / 2;
        int integer = format == INT8 ? (int8_t)own[at] : (at < half ? own[at] & 15 : own[at - half] >> 4) - 8;
        double exact = get(scales, FLOAT16, i / GROUP) * integer, found = get(back, dtype, i);
        CHECK(fabs(found - exact) <= fabs(exact) * 0x1p-8, "variant %d, %s → %s: %g, not %g", variant, DTYPES[dtype],
              FORMATS[format], found, exact);
        off += pow(found - get(from, dtype, i), 2), all += pow(get(from, dtype, i), 2);
    }
    CHECK(sqrt(off / all) < (format == INT8 ? 0.01 : 0.1), "variant %d, %s → %s: off by %g", variant, DTYPES[dtype],
          FORMATS[format], sqrt(off / all));
    put(from, dtype, GROUP, NAN);
    llama_quantize(from, q, scales, OUTPUTS * GROUPS, dtype, format, variant, 1);
    CHECK(isnan(get(scales, FLOAT16, 1)) && isfinite(get(scales, FLOAT16, 0)) && isfinite(get(scales, FLOAT16, 2)),
          "variant %d, %s → %s: NaN is lost, or spreads", variant, DTYPES[dtype], FORMATS[format]);
    free(from), free(back), free(q), free(scales), free(p.w), free(p.scales);
}

/* ------------------------------------------------------------------------------------------------- small operations */

static double tolerance(int dtype) { return dtype == BFLOAT16 ? 0x1p-7 : 1e-5; }

static void check_norm(int variant, int dtype, int64_t n, int64_t dim) {
    int64_t size = size_of(dtype);
    void *x = random_numbers(n * dim, dtype, 3), *weight = random_numbers(dim, dtype, 1), *y = buffer(n * dim * size);
    void *alone = buffer(dim * size);
    llama_rms_norm(x, weight, y, n, dim, 1e-5f, dtype, variant, SEVERAL);
    for (int64_t row = 0; row < n; row++) {
        double sum = 0;
        for (int64_t i = 0; i < dim; i++) sum += pow(get(x, dtype, row * dim + i), 2);
        for (int64_t i = 0; i < dim; i++) {
            double exact = get(x, dtype, row * dim + i) / sqrt(sum / (double)dim + 1e-5) * get(weight, dtype, i);
            CHECK(fabs(get(y, dtype, row * dim + i) - exact) <= fabs(exact) * tolerance(dtype),
                  "RMSNorm, variant %d, %s, dim %d", variant, DTYPES[dtype], (int)dim);
        }
        llama_rms_norm((char *)x + row * dim * size, weight, alone, 1, dim, 1e-5f, dtype, variant, 1);
        CHECK(same(alone, (char *)y + row * dim * size, dim * size), "RMSNorm, variant %d: company changes bits", variant);
    }
    free(x), free(weight), free(y), free(alone);
}

static void check_silu_and_mul(int variant, int dtype, int64_t n, int64_t hidden) {
    int64_t size = size_of(dtype);
    void *both = random_numbers(n * 2 * hidden, dtype, 9);
    void *y = buffer(n * hidden * size), *again = buffer(n * hidden * size);
    llama_silu_and_mul(both, y, n, hidden, dtype, variant, 1);
    llama_silu_and_mul(both, again, n, hidden, dtype, variant, SEVERAL);
    CHECK(same(y, again, n * hidden * size), "SwiGLU, variant %d, %s: threads change bits", variant, DTYPES[dtype]);
    for (int64_t i = 0; i < n * hidden; i++) {
        int64_t at = i / hidden * 2 * hidden + i % hidden;
        double gate = get(both, dtype, at), exact = gate / (1 + exp(-gate)) * get(both, dtype, at + hidden);
        CHECK(fabs(get(y, dtype, i) - exact) <= fabs(exact) * tolerance(dtype), "SwiGLU, variant %d, %s: %g, not %g",
              variant, DTYPES[dtype], get(y, dtype, i), exact);
    }
    free(both), free(y), free(again);
}

/* A number of a cache. */
static double cached(const void *from, int stored, int64_t i) {
    if (stored != FLOAT8) return get(from, stored, i);
    int bits = ((const uint8_t *)from)[i], exponent = bits >> 3 & 15, fraction = bits & 7;
    double size = exponent ? ldexp(8 + fraction, exponent - 10) : ldexp(fraction, -9);
    return (bits & 0x7f) == 0x7f ? NAN : bits & 0x80 ? -size : size;
}

/* RoPE writes a token's keys and values where it belongs, and queries find what lies there: one of its slot, and a span of
   them. */
static void check_rope_and_attention(int variant, int dtype, int stored, int64_t head_dim) {
    enum { N = 40, LONE = 5, HEADS = 6, KV_HEADS = 2, ROOM = 80 };
    int64_t width = (HEADS + 2 * KV_HEADS) * head_dim, size = size_of(dtype), stride = ROOM * head_dim;
    int64_t places[N], rows[N], starts[N] = {0, 5, 0, 31, 10}, lengths[N] = {32, 1, 17, 1, 9};
    int64_t bytes = stored == FLOAT8 ? 1 : size, all = KV_HEADS * stride * bytes;
    for (int64_t i = 0; i < N; i++) places[i] = i * 7 % ROOM, rows[i] = i * 3 % N;
    for (int64_t i = LONE; i < N; i++) starts[i] = 3, lengths[i] = i + 30;
    void *heads = random_numbers(N * width, dtype, 1), *q = buffer(N * HEADS * head_dim * size);
    void *keys = memset(buffer(all), 0, (size_t)all), *values = memset(buffer(all), 0, (size_t)all);
    void *out = buffer(N * HEADS * head_dim * size), *alone = copy_of(q, N * HEADS * head_dim * size);
    float *angles = random_numbers(N * head_dim, FLOAT32, 1);
    uint8_t *workspace = buffer(llama_attend_workspace(ROOM, head_dim, SEVERAL));
    llama_rope(heads, angles, q, keys, values, places, N, stride, HEADS, KV_HEADS, head_dim, dtype, stored, variant, SEVERAL);
    for (int64_t token = 0; token < N; token++)
        for (int64_t head = 0; head < HEADS + KV_HEADS; head++)
            for (int64_t i = 0; i < head_dim; i++) {
                int64_t from = token * width + head * head_dim, pair = i / 2 * 2;
                double a = get(heads, dtype, from + pair), b = get(heads, dtype, from + pair + 1);
                double c = angles[token * head_dim + pair], s = angles[token * head_dim + pair + 1];
                double exact = i % 2 ? a * s + b * c : a * c - b * s;
                int64_t own = (token * HEADS + head) * head_dim;
                int64_t place = (head - HEADS) * stride + places[token] * head_dim;
                double found = head < HEADS ? get(q, dtype, own + i) : cached(keys, stored, place + i);
                double allowed = head < HEADS || stored != FLOAT8 ? 2 * tolerance(dtype) : fabs(exact) / 14 + 0x1p-10;
                CHECK(fabs(found - exact) <= allowed, "RoPE, variant %d, %s, head %d", variant, DTYPES[dtype], (int)head);
            }
    llama_attend(q, keys, values, out, rows, starts, lengths, workspace, N, ROOM, stride, HEADS, KV_HEADS, head_dim, dtype,
                 stored, variant, SEVERAL);
    for (int64_t i = 0; i < N; i++) {
        llama_attend(q, keys, values, alone, rows + i, starts + i, lengths + i, workspace, 1, ROOM, stride, HEADS, KV_HEADS,
                     head_dim, dtype, stored, variant, 1);
        CHECK(same((char *)alone + rows[i] * HEADS * head_dim * size, (char *)out + rows[i] * HEADS * head_dim * size,
                   HEADS * head_dim * size), "attention, variant %d, %s: company changes bits", variant, DTYPES[dtype]);
        for (int64_t head = 0; head < HEADS; head++) {
            int64_t own = (rows[i] * HEADS + head) * head_dim;
            int64_t slot = head / (HEADS / KV_HEADS) * stride + starts[i] * head_dim;
            double shares[ROOM], total = 0;
            for (int64_t position = 0; position < lengths[i]; position++) {
                double dot = 0;
                for (int64_t d = 0; d < head_dim; d++)
                    dot += get(q, dtype, own + d) * cached(keys, stored, slot + position * head_dim + d);
                total += shares[position] = exp(dot / sqrt((double)head_dim));
            }
            for (int64_t d = 0; d < head_dim; d++) {
                double exact = 0;
                for (int64_t position = 0; position < lengths[i]; position++)
                    exact += shares[position] / total * cached(values, stored, slot + position * head_dim + d);
                CHECK(fabs(get(out, dtype, own + d) - exact) <= tolerance(dtype), "attention, variant %d, %s: %g, not %g",
                      variant, DTYPES[dtype], get(out, dtype, own + d), exact);
            }
        }
    }
    free(heads), free(q), free(keys), free(values), free(out), free(alone), free(angles), free(workspace);
}

/* ------------------------------------------------------------------------------------------------- sampling */

static void check_sampling(int variant, int64_t vocab) {
    enum { N = 4 };
    static const float NUMBERS[4 * N] = {1, 1, 0.5f, 0, 1, 1, 0.5f, 1, 0, 0, 0.1f, 0, 0.3f, 0.9f, 0.999f, 0};
    static const int64_t TOP_K[N] = {0, 1, 7, 0};
    float *logits = random_numbers(N * vocab, FLOAT32, 4);
    int64_t best[N], tokens[N], again[N];
    uint8_t finite[N], *workspace = buffer(SEVERAL * llama_sample_workspace(vocab));
    logits[2 * vocab + vocab - 1] = logits[2 * vocab + vocab / 2] = 9; /* of equal ones the first is the best */
    llama_greedy(logits, best, finite, N, vocab, variant);
    for (int row = 0; row < N; row++) {
        int64_t first = 0;
        for (int64_t i = 0; i < vocab; i++)
            if (logits[row * vocab + i] > logits[row * vocab + first]) first = i;
        CHECK(best[row] == first && finite[row], "the best of %d, variant %d: %d, not %d", (int)vocab, variant,
              (int)best[row], (int)first);
    }
    llama_sample(logits, NUMBERS, TOP_K, tokens, workspace, N, vocab, variant, SEVERAL);
    llama_sample(logits, NUMBERS, TOP_K, again, workspace, N, vocab, variant, 1);
    CHECK(same(tokens, again, sizeof tokens), "sampling, variant %d: threads change tokens", variant);
    CHECK(tokens[1] == best[1] && tokens[3] == best[3], "top_k 1, or temperature 0, variant %d: not the best", variant);
    double before = 0, total = 0; /* row 0 keeps all tokens: its token is where the running sum passes the noise */
    for (int64_t i = 0; i < vocab; i++) total += exp(logits[i]);
    for (int64_t i = 0; i < tokens[0]; i++) before += exp(logits[i]);
    CHECK(before / total <= 0.3 + 1e-4 && (before + exp(logits[tokens[0]])) / total >= 0.3 - 1e-4,
          "sampling %d, variant %d: token %d", (int)vocab, variant, (int)tokens[0]);
    logits[vocab / 3] = NAN;
    llama_greedy(logits, best, finite, N, vocab, variant);
    CHECK(!finite[0] && finite[1], "NaN among logits, variant %d", variant);
    free(logits), free(workspace);
}

/* ------------------------------------------------------------------------------------------------- a whole step */

enum { DIM = 32, HIDDEN = 64, VOCAB = 37, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 8, POSITIONS = 8, SLOTS = 2, LAYERS = 2 };

static const void *numbers(int dtype, int64_t count) { return random_numbers(count, dtype, 0.3f); }

/* In one part, whose rows lie behind it. */
static const void *matrix(int dtype, int64_t outputs, int64_t inputs) {
    int64_t bytes = outputs * inputs * size_of(dtype);
    uint8_t *rows = random_numbers(outputs * inputs, dtype, 0.3f);
    Part *part = buffer((int64_t)sizeof *part + bytes);
    *part = (Part){memcpy(part + 1, rows, (size_t)bytes), outputs};
    free(rows);
    return part;
}

static float *stepped(
    const Layer *layers, const Ends *ends, Shape *s, int64_t n, const int64_t *tokens, const int64_t *slots,
    const int64_t *positions, int threads
) {
    s->n = n, s->threads = threads;
    float *logits = buffer(n * VOCAB * 4);
    uint8_t *workspace = buffer(llama_step_workspace(s, POSITIONS));
    llama_step(layers, LAYERS, ends, s, tokens, slots, positions, POSITIONS, logits, workspace);
    free(workspace);
    return logits;
}

/* Tokens of two sequences in one step on several threads, or one a step: the same logits and the same cache, to the bit.
   Returns the logits. */
static float *check_step(int variant, int dtype) {
    enum { N = 6 };
    static const int64_t TOKENS[N] = {5, 0, 36, 7, 7, 1}, TO[N] = {0, 0, 1, 0, 1, 1}, AT[N] = {0, 1, 0, 2, 1, 2};
    int64_t size = size_of(dtype), cache = KV_HEADS * SLOTS * POSITIONS * HEAD_DIM * size;
    Layer layers[LAYERS], apart[LAYERS];
    Shape s = {
        .dim = DIM, .hidden = HIDDEN, .vocab = VOCAB, .n_heads = HEADS, .n_kv_heads = KV_HEADS, .head_dim = HEAD_DIM,
        .max_seq_len = POSITIONS, .slots = SLOTS, .eps = 1e-5f, .dtype = dtype, .stored = dtype, .format = AS_STORED + dtype,
        .output_format = AS_STORED + dtype, .variant = variant,
    };
    state = 7; /* so that every variant gets the same model */
    for (int i = 0; i < LAYERS; i++) {
        layers[i] = (Layer){
            .attention_norm = numbers(dtype, DIM), .wqkv = matrix(dtype, (HEADS + 2 * KV_HEADS) * HEAD_DIM, DIM),
            .wo = matrix(dtype, DIM, HEADS * HEAD_DIM), .ffn_norm = numbers(dtype, DIM),
            .w13 = matrix(dtype, 2 * HIDDEN, DIM), .w2 = matrix(dtype, DIM, HIDDEN), .keys = buffer(cache),
            .values = buffer(cache),
        };
        apart[i] = layers[i];
        apart[i].keys = memset(buffer(cache), 0, (size_t)cache), apart[i].values = memset(buffer(cache), 0, (size_t)cache);
        memset(layers[i].keys, 0, (size_t)cache), memset(layers[i].values, 0, (size_t)cache);
    }
    Ends ends = {
        .embeddings = numbers(dtype, VOCAB * DIM), .norm = numbers(dtype, DIM), .output = matrix(dtype, VOCAB, DIM),
        .freqs_cis = random_numbers(POSITIONS * HEAD_DIM, FLOAT32, 1),
    };
    float *logits = stepped(layers, &ends, &s, N, TOKENS, TO, AT, SEVERAL);
    for (int i = 0; i < N; i++) {
        float *alone = stepped(apart, &ends, &s, 1, TOKENS + i, TO + i, AT + i, 1);
        CHECK(same(alone, logits + i * VOCAB, VOCAB * 4), "a step, variant %d, %s: company changes bits of token %d",
              variant, DTYPES[dtype], i);
        free(alone);
    }
    for (int i = 0; i < LAYERS; i++) {
        CHECK(same(layers[i].keys, apart[i].keys, cache) && same(layers[i].values, apart[i].values, cache),
              "a step, variant %d, %s: company changes the cache", variant, DTYPES[dtype]);
        free(layers[i].keys), free(layers[i].values), free(apart[i].keys), free(apart[i].values);
        const Layer *own = layers + i;
        const void *all[] = {own->attention_norm, own->wqkv, own->wo, own->ffn_norm, own->w13, own->w2};
        for (int k = 0; k < 6; k++) free((void *)all[k]);
    }
    free((void *)ends.embeddings), free((void *)ends.norm), free((void *)ends.output), free((void *)ends.freqs_cis);
    return logits;
}

static void check_steps(int variant) {
    for (int dtype = FLOAT32; dtype <= BFLOAT16; dtype++) {
        float *expected = check_step(PORTABLE, FLOAT32), *logits = check_step(variant, dtype);
        double off = 0, all = 0;
        for (int i = 0; i < 6 * VOCAB; i++) off += pow(logits[i] - expected[i], 2), all += pow(expected[i], 2);
        CHECK(all > 0 && sqrt(off / all) < (dtype == BFLOAT16 ? 0.05 : 1e-4), "a step, variant %d, %s: off by %g", variant,
              DTYPES[dtype], sqrt(off / all));
        free(expected), free(logits);
    }
}

/* ------------------------------------------------------------------------------------------------- a team */

enum { TURNS = 400, PER = 4 };

/* Each piece of each turn is kept once, by one thread, and all are before the next turn, though threads stop now and then
   while they hold a piece, as if another program had their processor. */
static void check_team(void) {
    static int kept[TURNS][PER * SEVERAL];
    int64_t early = 0, lost = 0, takers = 0;
    Share shares[SEVERAL];
    Work work = llama_work(shares, SEVERAL);
#pragma omp parallel num_threads(SEVERAL) reduction(+ : early, lost)
    {
        Team team = llama_team(&work);
        const struct timespec long_time = {.tv_nsec = 2000000};
        for (int turn = 0; turn < TURNS; turn++) {
            PIECES(piece, &team, 0) early++; /* which is no turn */
            PIECES(piece, &team, PER) {
                if ((turn + piece) % 97 == team.thread) nanosleep(&long_time, 0);
                if (!llama_keep(&team, piece)) {
                    lost++;
                    continue;
                }
                __atomic_add_fetch(&kept[turn][piece], 1, __ATOMIC_RELAXED);
                llama_done(&team, PER);
            }
            for (int piece = 0; piece < PER * team.threads; piece++) early += kept[turn][piece] != 1;
        }
#pragma omp single
        takers = team.threads;
    }
    CHECK(!early, "a team: %d times a piece was not done once before the next turn", (int)early);
    CHECK(lost || takers == 1, "a team: no piece of %d was taken from a thread that stopped", TURNS * PER * SEVERAL);
}

/* ------------------------------------------------------------------------------------------------- all of them */

int main(void) {
    int best = llama_variant();
    check_team();
    for (int variant = PORTABLE; variant <= best; variant++) {
        state = 1;
        check_products(variant);
        for (int dtype = FLOAT32; dtype <= BFLOAT16; dtype++) {
            check_quantising(variant, dtype, INT8);
            check_quantising(variant, dtype, INT4);
            for (int64_t dim = 1; dim < 100; dim += 17) check_norm(variant, dtype, 13, dim);
            check_silu_and_mul(variant, dtype, 5, 1);
            check_silu_and_mul(variant, dtype, 3, 77);
            check_rope_and_attention(variant, dtype, dtype, 6);
            check_rope_and_attention(variant, dtype, dtype, 64);
            check_rope_and_attention(variant, dtype, FLOAT8, 128);
            check_rope_and_attention(variant, dtype, FLOAT8, 6);
            check_rope_and_attention(variant, dtype, dtype, 128);
        }
        check_sampling(variant, 50);
        check_sampling(variant, 1003);
        check_steps(variant);
    }
    printf("%d of %d checks failed; variants 0 to %d\n", failures, checks, best);
    return failures > 0;
}
