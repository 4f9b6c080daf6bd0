/* Packed weights: made from weights as they are stored, and turned back into numbers. How they are packed: see
   quantized.c. */

#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

/* Ask Linux for pages of 2 MB before any is touched: there are fewer of them to fill and to look up. */
void llama_use_huge_pages(void *memory, int64_t bytes) {
#if defined(__linux__)
    uintptr_t page = 4096, begin = ((uintptr_t)memory + page - 1) / page * page, end = ((uintptr_t)memory + bytes) / page * page;
    if (end > begin) madvise((void *)begin, end - begin, MADV_HUGEPAGE); /* where it is refused, pages are small */
#endif
}

enum { LINE = 16 }; /* numbers of four bytes in a line of the cache */

/* W (rows, groups, fours of four bytes) → blocks as the kernels read them; rows that are not there are zeros. Rows may lie so
   that their lines drive each other out of the cache: each line is copied once, and is at hand then. */
void llama_pack(const uint32_t *from, uint32_t *to, int64_t rows, int64_t groups, int64_t fours, int threads) {
    const int64_t length = groups * fours;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t block = 0; block < (rows + BLOCK_ROWS - 1) / BLOCK_ROWS; block++) {
        const uint32_t *own = from + block * BLOCK_ROWS * length;
        uint32_t *packed = to + block * BLOCK_ROWS * length;
        int64_t there = rows - block * BLOCK_ROWS < BLOCK_ROWS ? rows - block * BLOCK_ROWS : BLOCK_ROWS;
        uint32_t lines[BLOCK_ROWS][LINE] = {{0}};
        for (int64_t i = 0; i < length; i += LINE) {
            int64_t count = length - i < LINE ? length - i : LINE;
            for (int64_t lane = 0; lane < there; lane++) memcpy(lines[lane], own + lane * length + i, count * 4);
            for (int64_t k = 0; k < count; k++)
                for (int64_t lane = 0; lane < BLOCK_ROWS; lane++) packed[(i + k) * BLOCK_ROWS + lane] = lines[lane][k];
        }
    }
}

/* A block of W as rows of numbers of `dtype`, `outs` of which are there. */
INLINE void dequantize_block(
    const uint8_t *w, const uint16_t *scales, void *to, int64_t first, int64_t inputs, int64_t outs, int dtype, int format
) {
    for (int64_t group = 0; group < inputs / GROUP; group++, w += group_bytes(format), scales += BLOCK_ROWS)
        for (int64_t lane = 0; lane < outs; lane++) {
            float scale = from_float16(scales[lane]);
            int8_t q[GROUP];
            for (int i = 0; i < GROUP; i++) q[i] = (int8_t)weight_at(w, format, (int)lane, i);
#pragma omp simd
            for (int i = 0; i < GROUP; i++) {
                float number = scale * (float)(q[i] - (format == INT4 ? 8 : 0));
                write_number(to, dtype, first + lane * inputs + group * GROUP + i, number);
            }
        }
}

#define DEQUANTIZE(target, name) \
    target static void name(const uint8_t *w, const uint16_t *s, void *to, int64_t at, int64_t inputs, int64_t outs, \
                            int dtype, int format) { \
        if (dtype == BFLOAT16 && format == INT8) dequantize_block(w, s, to, at, inputs, outs, BFLOAT16, INT8); \
        else if (dtype == BFLOAT16) dequantize_block(w, s, to, at, inputs, outs, BFLOAT16, INT4); \
        else dequantize_block(w, s, to, at, inputs, outs, FLOAT32, format); \
    }

DEQUANTIZE(, dequantize_portable)
#if X86
DEQUANTIZE(AVX2, dequantize_avx2)
DEQUANTIZE(AVX512, dequantize_avx512)
#endif

/* Packed W (outputs, inputs) as rows of numbers of `dtype`. */
void llama_dequantize(
    const uint8_t *w, const uint16_t *scales, void *to, int64_t inputs, int64_t outputs, int dtype, int format,
    int variant, int threads
) {
    int64_t blocks = (outputs + BLOCK_ROWS - 1) / BLOCK_ROWS, groups = inputs / GROUP;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        const uint8_t *own = w + block * groups * group_bytes(format);
        const uint16_t *s = scales + block * groups * BLOCK_ROWS;
        int64_t first = block * BLOCK_ROWS, outs = outputs - first < BLOCK_ROWS ? outputs - first : BLOCK_ROWS;
#if X86
        if (variant >= USES_AVX512) { dequantize_avx512(own, s, to, first * inputs, inputs, outs, dtype, format); continue; }
        if (variant == USES_AVX2) { dequantize_avx2(own, s, to, first * inputs, inputs, outs, dtype, format); continue; }
#endif
        dequantize_portable(own, s, to, first * inputs, inputs, outs, dtype, format);
    }
}
