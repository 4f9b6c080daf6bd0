/* A token for each row of logits: the best one, or one that is drawn as engine/sampling.py defines, without sorting the
   row. One pass over the row counts the tokens of at least some probability and sums their shares; a binary search over
   that probability finds the last token that is kept.

   Probabilities are added up as whole numbers, called shares. Sums of whole numbers are exact, so a draw is the same on
   every device and with every number of threads, in whatever order they add. Rounded sums would differ in their last
   digits, and a draw that falls between two tokens would then differ too. */

#include "kernels.h"

enum { NOISE_BITS = 24, BLOCK_TOKENS = 128, FEW = 256 };
static const float WHOLE = 0x1p38f; /* the share of probability 1; doubles hold all sums of shares exactly */

/* The first of the largest logits, and whether all are finite. */
INLINE void greedy_row(const float *logits, int64_t vocab, int64_t *token, uint8_t *finite) {
    float largest = -INFINITY, zero = 0;
#pragma omp simd reduction(max : largest) reduction(+ : zero)
    for (int64_t i = 0; i < vocab; i++) {
        largest = logits[i] > largest ? logits[i] : largest;
        zero += logits[i] * 0.0f; /* NaN and infinities times 0 are NaN */
    }
    int64_t at = 0;
    while (at < vocab - 1 && logits[at] != largest) at++;
    *token = at;
    *finite = zero == 0;
}

/* The share of a probability: p · WHOLE, rounded. A double of 2⁵² or more has no fraction, so adding 1.5 · 2⁵² rounds. */
INLINE double share(float p) { return ((double)p * WHOLE + 0x1.8p52) - 0x1.8p52; }

INLINE uint32_t bits_of(float p) {
    uint32_t bits;
    memcpy(&bits, &p, 4);
    return bits;
}

INLINE float prob_of(uint32_t bits) {
    float p;
    memcpy(&p, &bits, 4);
    return p;
}

typedef struct {
    float *probs;   /* (vocab,) */
    float *tops;    /* the largest of each BLOCK_TOKENS of them */
    uint64_t *keys; /* room for as many */
    int64_t vocab;
} Row;

INLINE int64_t end_of(const Row *row, int64_t first) {
    return first + BLOCK_TOKENS < row->vocab ? first + BLOCK_TOKENS : row->vocab;
}

/* softmax(logits / temperature); returns the largest. */
INLINE float softmax(const float *logits, float temperature, const Row *row) {
    float largest = -INFINITY, *probs = row->probs, *tops = row->tops;
    int64_t vocab = row->vocab;
    double total = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < vocab; i++) largest = logits[i] > largest ? logits[i] : largest;
    for (int64_t first = 0; first < vocab; first += BLOCK_TOKENS) {
        float sum = 0;
        int64_t end = end_of(row, first);
#pragma omp simd reduction(+ : sum)
        for (int64_t i = first; i < end; i++) {
            /* The largest is subtracted first: logits[i] / temperature may be infinite where temperature is tiny. */
            probs[i] = exponential((logits[i] - largest) / temperature);
            sum += probs[i];
        }
        total += sum;
    }
    float scale = (float)total;
    for (int64_t first = 0; first < vocab; first += BLOCK_TOKENS) {
        float top = 0;
        int64_t end = end_of(row, first);
#pragma omp simd reduction(max : top)
        for (int64_t i = first; i < end; i++) {
            probs[i] /= scale;
            top = probs[i] > top ? probs[i] : top;
        }
        tops[first / BLOCK_TOKENS] = top;
    }
    return 1.0f / scale;
}

typedef struct {
    int64_t count;
    double shares;
} Amount;

/* The number and the shares of tokens first … end − 1 with at least this probability. */
INLINE Amount amount_of(const float *probs, int64_t first, int64_t end, float least) {
    double shares = 0;
    int count = 0;
    uint32_t from = bits_of(least);
#pragma omp simd reduction(+ : count, shares)
    for (int64_t i = first; i < end; i++) {
        uint32_t own = bits_of(probs[i]), counts = own >= from; /* bits of floats ≥ 0 are ordered as the floats are */
        count += (int)counts;
        shares += share(prob_of(own & -counts));
    }
    return (Amount){count, shares};
}

INLINE Amount amount_from(const Row *row, float least) {
    Amount all = {0, 0};
    for (int64_t first = 0; first < row->vocab; first += BLOCK_TOKENS) {
        if (row->tops[first / BLOCK_TOKENS] < least) continue;
        Amount more = amount_of(row->probs, first, end_of(row, first), least);
        all.count += more.count;
        all.shares += more.shares;
    }
    return all;
}

/* The order in which tokens are kept: the more probable first, of equally probable ones the lower id first. */
INLINE uint64_t key_of(float p, int64_t token) { return (uint64_t)~bits_of(p) << 32 | (uint64_t)token; }

typedef struct {
    float p;       /* the probability of the last token that is kept */
    int64_t token; /* its id */
    double mass;   /* the shares of all that are kept, added up */
} Cut;

/* The last key before which come fewer than `limit` tokens, with shares of at most `bound` together. The tokens that
   `above` counts come before all keys. The first key is always kept. */
static Cut last_of_keys(uint64_t *keys, int64_t count, int64_t limit, float bound, Amount above) {
    int64_t first = 0, end = count; /* the last one is among first … end − 1 */
    double before = above.shares;
    while (end - first > 1) {
        uint64_t a = keys[first], b = keys[(first + end) / 2], c = keys[end - 1];
        uint64_t pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
        int64_t middle = first;
        double sum = 0;
        for (int64_t i = first; i < end; i++) {
            uint64_t key = keys[i];
            if (key >= pivot) continue;
            keys[i] = keys[middle];
            keys[middle++] = key;
            sum += share(prob_of(~(uint32_t)(key >> 32)));
        }
        for (int64_t i = first; middle == first; i++) /* nothing is less than the pivot: it goes in front */
            if (keys[i] == pivot)
                keys[i] = keys[first], keys[middle++] = pivot, sum = share(prob_of(~(uint32_t)(pivot >> 32)));
        if (above.count + middle < limit && (float)(before + sum) <= bound) first = middle, before += sum;
        else end = middle;
    }
    float p = prob_of(~(uint32_t)(keys[first] >> 32));
    return (Cut){p, (int64_t)(uint32_t)keys[first], before + share(p)};
}

/* The last token that is kept: it has at least the probability `floor`, and fewer than `limit` tokens come before it,
   with shares of at most `bound` together. */
INLINE Cut last_kept(const Row *row, float best, float floor, int64_t limit, float bound) {
    float high = 2 * best, low = best / 16; /* tokens of `high` or more are kept; the last one has `low` or more */
    Amount above = {0, 0}, more;
    for (;; high = low, above = more, low /= 16) {
        if (low < floor) low = floor;
        more = amount_from(row, low);
        if (more.count >= limit || (float)more.shares > bound) break;
        if (low == floor || !(low * WHOLE >= 0.5f)) /* less probable tokens have share 0 */
            return (Cut){low, row->vocab, more.shares};
    }
    while (more.count - above.count > FEW && bits_of(high) - bits_of(low) > 1) {
        float middle = prob_of(bits_of(low) + (bits_of(high) - bits_of(low)) / 2);
        Amount half = amount_from(row, middle);
        if (half.count < limit && (float)half.shares <= bound) high = middle, above = half;
        else low = middle, more = half;
    }
    int64_t n_keys = 0;
    uint32_t from = bits_of(low), wide = bits_of(high) - from;
    for (int64_t first = 0; first < row->vocab; first += BLOCK_TOKENS)
        for (int64_t i = first; i < end_of(row, first) && row->tops[first / BLOCK_TOKENS] >= low; i++)
            if (bits_of(row->probs[i]) - from < wide) row->keys[n_keys++] = key_of(row->probs[i], i);
    return last_of_keys(row->keys, n_keys, limit, bound, above);
}

/* The shares of the kept tokens among first … end − 1, which lie in one block. */
INLINE double shares_kept(const Row *row, int64_t first, int64_t end, Cut cut, float floor) {
    if (row->tops[first / BLOCK_TOKENS] < cut.p) return 0;
    int64_t middle = cut.token + 1 < first ? first : cut.token + 1 < end ? cut.token + 1 : end;
    float after = prob_of(bits_of(cut.p) + 1); /* a token behind the cut must be more probable than it */
    return amount_of(row->probs, first, middle, cut.p > floor ? cut.p : floor).shares +
           amount_of(row->probs, middle, end, after > floor ? after : floor).shares;
}

/* The kept token at which the running sum of shares, in the order of ids, passes noise · the sum of all. */
INLINE int64_t draw(const Row *row, Cut cut, float floor, float noise) {
    double sum = 0, total = 0, more = 0;
    for (int64_t i = 0; i < row->vocab; i += BLOCK_TOKENS) total += shares_kept(row, i, end_of(row, i), cut, floor);
    double target = (double)((int64_t)(noise * (1 << NOISE_BITS)) * (int64_t)total >> NOISE_BITS);
    int64_t first = 0;
    for (; first + BLOCK_TOKENS < row->vocab; first += BLOCK_TOKENS, sum += more) {
        more = shares_kept(row, first, first + BLOCK_TOKENS, cut, floor);
        if (sum + more > target) break;
    }
    int64_t token = first;
    while (token < row->vocab - 1 && sum + shares_kept(row, first, token + 1, cut, floor) <= target) token++;
    return token;
}

typedef struct {
    float temperature, top_p, min_p, noise;
    int64_t top_k;
} Choice;

INLINE int64_t sample_row(const float *logits, Choice how, const Row *row) {
    if (!(how.temperature > 0)) {
        int64_t best;
        uint8_t finite;
        greedy_row(logits, row->vocab, &best, &finite);
        return best;
    }
    float best = softmax(logits, how.temperature, row), floor = how.min_p * best, bound = how.top_p * WHOLE;
    if (!(best > 0)) return 0; /* logits that are not finite: the row is refused */
    Cut cut = {0, row->vocab, WHOLE};
    int64_t limit = how.top_k ? how.top_k : INT64_MAX;
    if (how.top_k) { /* top_p is of what top_k keeps */
        cut = last_kept(row, best, 0, limit, INFINITY);
        bound = how.top_p * (float)cut.mass;
    }
    if ((float)cut.mass > bound) cut = last_kept(row, best, floor, limit, bound);
    return draw(row, cut, floor, how.noise);
}

#define VARIANTS(target, suffix) \
    target static int64_t sample_##suffix(const float *logits, Choice how, const Row *row) { \
        return sample_row(logits, how, row); \
    } \
    target static void greedy_##suffix(const float *logits, int64_t vocab, int64_t *token, uint8_t *finite) { \
        greedy_row(logits, vocab, token, finite); \
    }

VARIANTS(, portable)
#if X86
VARIANTS(AVX2, avx2)
VARIANTS(AVX512, avx512)
#define CALL(name, ...) \
    (variant >= USES_AVX512 ? name##_avx512(__VA_ARGS__) \
     : variant == USES_AVX2 ? name##_avx2(__VA_ARGS__) \
                            : name##_portable(__VA_ARGS__))
#else
#define CALL(name, ...) name##_portable(__VA_ARGS__)
#endif

/* For each row of logits (n, vocab): the first of the largest, and whether all are finite. */
void llama_greedy(const float *logits, int64_t *tokens, uint8_t *finite, int64_t n, int64_t vocab, int variant) {
    for (int64_t row = 0; row < n; row++) CALL(greedy, logits + row * vocab, vocab, tokens + row, finite + row);
}

/* Bytes that one thread needs for rows of so many logits. */
int64_t llama_sample_workspace(int64_t vocab) { return (vocab + BLOCK_TOKENS) * (sizeof(uint64_t) + 2 * sizeof(float)); }

/* tokens (n,) of logits (n, vocab); `numbers` (4, n): temperature, top_p, min_p, noise; top_k (n,). */
void llama_sample(
    const float *logits, const float *numbers, const int64_t *top_k, int64_t *tokens, uint8_t *workspace, int64_t n,
    int64_t vocab, int variant, int threads
) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        uint64_t *keys = (uint64_t *)(workspace + thread * llama_sample_workspace(vocab));
        float *probs = (float *)(keys + vocab + BLOCK_TOKENS);
        const Row room = {probs, probs + vocab + BLOCK_TOKENS, keys, vocab};
        for (int64_t row = n * thread / threads; row < n * (thread + 1) / threads; row++) {
            Choice how = {numbers[row], numbers[n + row], numbers[2 * n + row], numbers[3 * n + row], top_k[row]};
            tokens[row] = CALL(sample, logits + row * vocab, how, &room);
        }
    }
}
