/* Products of many rows with packed weights on AMX: y (n, outputs) = x (n, inputs) · W (outputs, inputs)ᵀ in bfloat16,
   summed in float32. How weights are packed: see quantized.c.

   One instruction multiplies a tile of 16 rows of x by STEP inputs with a tile of 16 rows of W, and adds to 16 × 16 sums.
   All else serves to have the next tiles ready. x is laid out tile after tile once. Packed bfloat16 weights are tiles as
   they are. Other weights are dequantised into tiles panel by panel: two blocks, and some inputs at a time. A panel stays
   in the cache while all rows of x are multiplied with it; the sums wait in memory for the next inputs. While tiles are
   multiplied, the next panel is fetched from memory. */

#include "kernels.h"

#if X86
enum { STEP = GROUP, TILE = 16 * STEP, PANELS = 8, MOST_ROWS = 512 }; /* so many panels share their sums' memory */
/* Steps in a panel. For up to SHORT rows of x, long reads of W are fastest; for more, a panel must fit the L1 cache. */
enum { DEEP = 64, SHALLOW = 8, SHORT = 64 };

typedef struct {
    const uint8_t *w;
    const uint16_t *scales;
    int64_t inputs, outputs;
    int format;
} Weights;

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* All tiles are 16 rows of 64 bytes. 0 to 3: sums; 4 and 5: x; 6 and 7: W. */
static void configure_tiles(void) {
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) config.rows[tile] = 16, config.row_bytes[tile] = 64;
    /* As assembly that reads `config`: a compiler may drop the stores to it where it knows only of an intrinsic. */
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

/* 16 rows of x, of which `rows` are there, as tiles of STEP inputs. */
AMX static void lay_out_rows(const uint16_t *x, int64_t rows, int64_t inputs, uint16_t *to) {
    for (int64_t i = 0; i < inputs; i += STEP, to += TILE)
        for (int64_t row = 0; row < 16; row++) {
            __m512i numbers = row < rows ? _mm512_loadu_si512(x + row * inputs + i) : _mm512_setzero_si512();
            _mm512_store_si512(to + row * STEP, numbers);
        }
}

/* A group of a packed block as a tile: row r holds the r-th pair of inputs of its 16 rows. */
AMX INLINE void dequantize_tile(const uint8_t *group, __m512 scale, int format, uint16_t *to) {
    const __m512 numbers = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8); /* by four bits */
    const __m512i side_by_side = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                                  21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        __m512 four[4];
        if (format == INT8) {
            __m512i q = _mm512_loadu_si512(group + k * 64);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                four[j] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(q, 24 - 8 * j), 24));
        } else {
            __m512i q = _mm512_srli_epi32(_mm512_loadu_si512(group + k % 4 * 64), k < 4 ? 0 : 4);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) four[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 8 * j), numbers);
        }
        for (int j = 0; j < 4; j++) four[j] = _mm512_mul_ps(four[j], scale);
        __m512i low = (__m512i)_mm512_cvtne2ps_pbh(four[1], four[0]), high = (__m512i)_mm512_cvtne2ps_pbh(four[3], four[2]);
        _mm512_store_si512(to + k * 2 * STEP, _mm512_permutexvar_epi16(side_by_side, low));
        _mm512_store_si512(to + (k * 2 + 1) * STEP, _mm512_permutexvar_epi16(side_by_side, high));
    }
}

/* A panel's tiles: those of its two blocks, one a step, `stride` numbers apart. */
typedef struct {
    const uint16_t *left, *right;
    int64_t stride;
} Panel;

/* A panel: blocks `first` and the next of W, `steps` steps from step `from` on; laid out in `to` where they are
   not tiles already. */
AMX static Panel lay_out_panel(const Weights *w, int64_t first, int64_t from, int64_t steps, uint16_t *to) {
    int64_t groups = w->inputs / GROUP, blocks = (w->outputs + BLOCK_ROWS - 1) / BLOCK_ROWS;
    if (w->format == PLAIN) {
        const uint16_t *left = (const uint16_t *)w->w + (first * groups + from) * TILE;
        return (Panel){left, first + 1 < blocks ? left + groups * TILE : left, TILE};
    }
    for (int64_t half = 0; half < 2; half++)
        for (int64_t step = 0; step < steps; step++) {
            uint16_t *tile = to + (step * 2 + half) * TILE;
            if (first + half == blocks) {
                memset(tile, 0, TILE * sizeof *tile);
                continue;
            }
            int64_t at = (first + half) * groups + from + step;
            __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w->scales + at * BLOCK_ROWS)));
            if (w->format == INT8) dequantize_tile(w->w + at * group_bytes(INT8), scale, INT8, tile);
            else dequantize_tile(w->w + at * group_bytes(INT4), scale, INT4, tile);
        }
    return (Panel){to, to + TILE, 2 * TILE};
}

/* What is to be fetched while tiles are multiplied: `lines` stretches of `width` bytes, one each `stride` bytes. */
typedef struct {
    const uint8_t *at;
    int64_t stride, width, column, lines;
} Ahead;

static Ahead panel_ahead(const Weights *w, int64_t first, int64_t from, int64_t steps, int64_t end) {
    int64_t groups = w->inputs / GROUP, bytes = group_bytes(w->format), left = groups - from;
    int64_t lines = end - first < 2 ? end - first : 2;
    return (Ahead){w->w + (first * groups + from) * bytes, groups * bytes, (left < steps ? left : steps) * bytes, 0,
                   lines > 0 ? lines : 0};
}

INLINE void fetch(Ahead *ahead, int64_t count) {
    for (; count > 0 && ahead->lines > 0; count--) {
        _mm_prefetch((const char *)ahead->at + ahead->column, _MM_HINT_T1);
        ahead->column += 64;
        if (ahead->column >= ahead->width) ahead->column = 0, ahead->at += ahead->stride, ahead->lines--;
    }
}

/* 32 (or, without `second`, 16) rows of x against a panel: sums in four tiles, [rows / 16][blocks of the panel]. */
AMX INLINE void multiply(
    const uint16_t *x, const uint16_t *second, Panel panel, int64_t steps, float *sums, int first, Ahead *ahead, int64_t count
) {
    __asm__ volatile("" : : : "memory"); /* tile loads do not say what they read */
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        if (second) { _tile_zero(2); _tile_zero(3); }
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        if (second) { _tile_loadd(2, sums + 512, 64); _tile_loadd(3, sums + 768, 64); }
    }
    for (int64_t step = 0; step < steps; step++) {
        _tile_loadd(4, x + step * TILE, 64);
        _tile_loadd(6, panel.left + step * panel.stride, 64);
        _tile_loadd(7, panel.right + step * panel.stride, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (second) {
            _tile_loadd(5, second + step * TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        fetch(ahead, count);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if (second) { _tile_stored(2, sums + 512, 64); _tile_stored(3, sums + 768, 64); }
}

/* Sums of 16 rows of x and a panel's 32 rows of W → y. */
AMX static void write_sums(const float *sums, int64_t rows, int64_t outs, uint16_t *y, int64_t outputs) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t half = 0; half < 2; half++) {
            int64_t left = outs - half * 16;
            __mmask16 there = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
            __m256bh numbers = _mm512_cvtneps_pbh(_mm512_load_ps(sums + half * 256 + row * 16));
            _mm256_mask_storeu_epi16(y + row * outputs + half * 16, there, (__m256i)numbers);
        }
}

/* Blocks begin … end of W for n ≤ MOST_ROWS rows of x; `scratch`: see scratch_bytes. */
AMX static void some_blocks(
    const uint16_t *x, const Weights *w, uint16_t *y, int64_t n, int64_t begin, int64_t end, uint8_t *scratch
) {
    int64_t steps = w->inputs / STEP, tall = (n + 15) / 16, pairs = (tall + 1) / 2, most = n <= SHORT ? DEEP : SHALLOW;
    float *sums = (float *)(scratch + DEEP * 2 * TILE * 2);
    configure_tiles();
    for (int64_t first_block = begin; first_block < end; first_block += PANELS * 2)
        for (int64_t from = 0; from < steps; from += most) {
            int64_t deep = steps - from < most ? steps - from : most;
            int64_t stop = end - first_block < PANELS * 2 ? end : first_block + PANELS * 2;
            for (int64_t block = first_block; block < stop; block += 2) {
                float *own = sums + (block - first_block) / 2 * pairs * 1024;
                int beside = block + 2 < stop, below = from + deep < steps; /* where the next panel is */
                Ahead ahead = panel_ahead(w, beside ? block + 2 : below ? first_block : stop,
                                          beside ? from : below ? from + deep : 0, most, end);
                int64_t lines = (ahead.width + 63) / 64 * ahead.lines, count = (lines + pairs * deep - 1) / (pairs * deep);
                Panel panel = lay_out_panel(w, block, from, deep, (uint16_t *)scratch);
                for (int64_t pair = 0; pair < pairs; pair++) {
                    const uint16_t *tiles = x + (pair * 2 * steps + from) * TILE;
                    const uint16_t *second = pair * 2 + 1 < tall ? tiles + steps * TILE : 0;
                    float *four = own + pair * 1024;
                    if (second) multiply(tiles, second, panel, deep, four, from == 0, &ahead, count);
                    else multiply(tiles, 0, panel, deep, four, from == 0, &ahead, count);
                    if (below) continue;
                    for (int64_t row = pair * 32; row < n && row < pair * 32 + 32; row += 16)
                        write_sums(four + row % 32 * 32, n - row < 16 ? n - row : 16, w->outputs - block * BLOCK_ROWS,
                                   y + row * w->outputs + block * BLOCK_ROWS, w->outputs);
                }
            }
        }
    __asm__ volatile("tilerelease");
}
#endif

/* Room for a panel, and for the sums of PANELS panels. */
static int64_t scratch_bytes(void) {
#if X86
    return DEEP * 2 * TILE * 2 + PANELS * (MOST_ROWS / 32) * 4096;
#else
    return 0;
#endif
}

/* Bytes of the workspace that a product of n rows needs. */
int64_t llama_tiles_workspace(int64_t n, int64_t inputs, int threads) {
    return 64 + (n + 15) / 16 * 16 * inputs * 2 + threads * scratch_bytes();
}

/* What a thread does of a product, x and y bfloat16. Only where the variant is USES_AMX. */
void llama_multiply_tiles(const Product *p, Team *team) {
#if X86
    const int64_t n = p->n, inputs = p->inputs, tall = (n + 15) / 16, blocks = (p->outputs + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t each = ((blocks + team->threads - 1) / team->threads + 1) / 2 * 2;
    const Weights weights = {p->w, p->scales, inputs, p->outputs, p->format};
    const uint16_t *x = p->x;
    uint16_t *tiles = (uint16_t *)(((uintptr_t)p->workspace + 63) & ~(uintptr_t)63), *y = p->y;
    uint8_t *scratch = (uint8_t *)(tiles + tall * 16 * inputs) + team->thread * scratch_bytes();
    KEPT_PIECES(share, team, 1) {
        for (int64_t high = tall * share / team->threads; high < tall * (share + 1) / team->threads; high++)
            lay_out_rows(x + high * 16 * inputs, n - high * 16, inputs, tiles + high * 16 * inputs);
    }
    KEPT_PIECES(share, team, 1) {
        int64_t begin = share * each, end = begin + each < blocks ? begin + each : blocks;
        for (int64_t row = 0; begin < end && row < n; row += MOST_ROWS)
            some_blocks(tiles + row * inputs, &weights, y + row * p->outputs, n - row < MOST_ROWS ? n - row : MOST_ROWS, begin,
                        end, scratch);
    }
#else
    (void)p, (void)team;
#endif
}
