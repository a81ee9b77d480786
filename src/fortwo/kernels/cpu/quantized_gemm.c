/* Products of a few rows with weights in 4, 5, 6 or 8 bits, which can hold the numbers of GGUF's types. A weight (O, I) lies in tiles of 16 outputs, a
   tile in groups of 32 inputs: w = scale * q + minimum, with a scale and a minimum in fp16 for each output of a group, as in Q4_1 and Q5_1. With 8 bits
   the minimum is -128 scales and is not stored (Q8_0). With 6 bits it is -32 scales, and each half of a group has a scale of its own (Q6_K). Four inputs
   of sixteen outputs (a quad) are 64 bytes of q; a group has eight. With fewer bits the low halves of 64 bytes are the quad 2i, the high halves 2i + 1.
   With 5 bits 64 bytes with the fifth ones follow, a bit of each byte for each quad; with 6 bits twice 64 bytes, two bits of each byte for each of four
   quads. The rows of x are rounded to 16 bits in the same groups, as two bytes that are multiplied one after the other, so the dot products of a group
   are exact whole numbers. One byte, as llama.cpp uses, is faster from 8 rows on, but changes what the model says. */
#include "quantized_gemm.h"
#include "quantized_gemm_amx.h"
#include "quantized_gemm_avx2.h"
#include "quantized_gemm_neon.h"

quantized_rows quantized_rows_of(long T, long I) { /* the caller frees x.a */
    long rows = T >= MOST_ROWS ? MOST_ROWS : T >= 4 ? 4 : T >= 2 ? 2 : 1, blocks = (T + rows - 1) / rows, all = blocks * rows;
    long groups = all * (I / GROUP);
    int8_t *a = aligned_alloc(64, (all * 2 * I + groups * 3 * sizeof(float) + 63) / 64 * 64);
    float *scale = (float *)(a + 2 * all * I);
    return (quantized_rows){T, I, rows, blocks, a, scale, scale + groups, scale + 2 * groups};
}

/* Rounds row t, into every block that contains it. */
void quantize_row(const quantized_rows *x, long t, const float *row) {
    long G = x->I / GROUP;
    for (long g = 0; g < G; g++) {
        const float *from = row + g * GROUP;
        float size[GROUP];
        for (int i = 0; i < GROUP; i++) size[i] = fabsf(from[i]);
        float top = largest(size, GROUP), by = top > 0 ? LARGEST / top : 0;
        int32_t begin = 0, sum = 0, whole[GROUP];
        for (int i = 0; i < GROUP; i++) whole[i] = (int32_t)rintf(from[i] * by);
        for (int i = 0; i < GROUP / 2; i++) begin += whole[i], sum += whole[i] + whole[GROUP / 2 + i];
        for (long b = t / x->rows; b < x->blocks; b++) {
            long r = t - block_start(x, b), at = b * G + g;
            if (r < 0 || r >= x->rows) continue;
#ifdef PAIRS
            int16_t *pairs = (int16_t *)x->a + (at * x->rows + r) * GROUP;
            for (int i = 0; i < GROUP; i++) pairs[pair_place(i)] = (int16_t)whole[i];
#else
            int8_t *high = x->a + (at * 2 * x->rows + r) * GROUP, *low = high + x->rows * GROUP;
            for (int i = 0; i < GROUP; i++) high[i] = (int8_t)((whole[i] + 128) >> 8);
            for (int i = 0; i < GROUP; i++) low[i] = (int8_t)whole[i];
#endif
            x->scale[at * x->rows + r] = top / LARGEST;
            x->offset[at * x->rows + r] = top / LARGEST * sum;
            x->begins[at * x->rows + r] = top / LARGEST * begin;
        }
    }
}

#if !defined(PAIRS) && !defined(__ARM_FEATURE_DOTPROD)
/* Returns sums + the dot products of the four unsigned bytes of each w[n] with the four signed bytes at a. */
#if defined(__AVX512VNNI__)
static inline __attribute__((always_inline)) integers dot4(int bits, integers sums, words w, const int8_t *a) {
    int32_t four;
    memcpy(&four, a, 4);
    return (void)bits, (integers)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(four));
}
#elif defined(__ARM_NEON)
static inline __attribute__((always_inline)) integers dot4(int bits, integers sums, words w, const int8_t *a) {
    union { words all; uint8x16_t part[4]; } from = {w};
    union { integers all; int32x4_t part[4]; } to = {sums};
    int32_t four;
    memcpy(&four, a, 4);
    int8x16_t by = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) { /* Both sides are signed. Weights in 8 bits give up 128, which comes back with the sum of the four. */
        int8x16_t own = vreinterpretq_s8_u8(bits == 8 ? veorq_u8(from.part[p], vdupq_n_u8(128)) : from.part[p]);
        if (bits == 8) to.part[p] = vaddq_s32(to.part[p], vdupq_n_s32((a[0] + a[1] + a[2] + a[3]) * 128));
        int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(own), vget_low_s8(by))), high = vpaddlq_s16(vmull_high_s8(own, by));
        to.part[p] = vaddq_s32(to.part[p], vpaddq_s32(low, high));
    }
    return to.all;
}
#else /* Inlined, it would take the compiler minutes. */
static __attribute__((noinline)) integers dot4(int bits, integers sums, words w, const int8_t *a) {
    for (int i = 0; i < 4; i++) sums += (integers)(w >> 8 * i & 255) * a[i];
    return (void)bits, sums;
}
#endif

/* The micro-kernel for every level: one block of rows times one tile. a and its scales and offsets are the block's; q, scale and minimum are the
   tile's. */
static inline __attribute__((always_inline)) void block_by_dots(int bits, int rows, long G, const uint8_t *q, const uint16_t *scale,
                                                             const uint16_t *minimum, const int8_t *a, const float *x_scale,
                                                             const float *x_offset, const float *x_begins, float *y, long y_row, long wide) {
    int halves = bits == 6 ? 2 : 1, quads = QUADS / halves;
    vector sums[8];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) sums[r] = (vector){0};
    for (long g = 0; g < G; g++, q += bits * 4 * WIDTH) {
        words w[QUADS];
        integers whole[16];
#pragma GCC unroll 8
        for (int i = 0; i < bits; i++) __builtin_prefetch(q + i * 4 * WIDTH + PREFETCH_BYTES);
#pragma GCC unroll 8
        for (int i = 0; i < QUADS; i++) w[i] = group_codes(bits, q, i);
#pragma GCC unroll 2
        for (int half = 0; half < halves; half++) {
            vector d, m;
            float sum_of_x[8];
#pragma GCC unroll 16
            for (int r = 0; r < 2 * rows; r++) {
                integers other = {0}; /* two independent sums */
                whole[r] = (integers){0};
#pragma GCC unroll 4
                for (int i = half * quads; i < (half + 1) * quads; i += 2) {
                    whole[r] = dot4(bits, whole[r], w[i], a + (g * 2 * rows + r) * GROUP + 4 * i);
                    other = dot4(bits, other, w[i + 1], a + (g * 2 * rows + r) * GROUP + 4 * i + 4);
                }
                whole[r] += other;
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                long at = g * rows + r;
                sum_of_x[r] = halves == 1 ? x_offset[at] : half ? x_offset[at] - x_begins[at] : x_begins[at];
            }
            group_scales(bits, g, half, scale, minimum, &d, &m);
            add_group(rows, whole, d, m, x_scale + g * rows, sum_of_x, sums);
        }
    }
    store_sums(rows, sums, y, y_row, wide);
}
#endif

/* Prepares a thread for products with rounded rows, until quantized_gemm_end. Returns scratch for one tile of a weight with up to `widest` inputs. */
uint8_t *quantized_gemm_begin(const quantized_rows *x, long widest) {
    static _Thread_local struct { uint8_t *at; long size; } scratch;
    if (WIDTH * widest > scratch.size) {
        free(scratch.at);
        scratch.size = WIDTH * widest;
        scratch.at = aligned_alloc(64, scratch.size);
    }
    if (uses_tiles(x->rows)) byte_tiles_begin(x->rows);
    return scratch.at;
}

void quantized_gemm_end(const quantized_rows *x) {
    if (uses_tiles(x->rows)) byte_tiles_end();
}

/* Computes outputs o to o + 15 of all rows. y points to row 0, output 0. */
void quantized_gemm_tile(const quantized_weight *w, const quantized_rows *x, long o, float *y, long y_row, uint8_t *scratch) {
    long G = w->I / GROUP, wide = w->O - o < WIDTH ? w->O - o : WIDTH;
    quantized_tile tile = tile_of(w, o);
    int tiles = uses_tiles(x->rows) && tile.bits != 6;
    if (tiles) tile.q = tiles_unpacked(tile.bits, G, tile.q, scratch);
    for (long b = 0; b < x->blocks; b++) {
        const int8_t *a = x->a + b * 2 * x->rows * x->I;
        long at = b * x->rows * G;
        const float *x_scale = x->scale + at, *offset = x->offset + at, *begins = x->begins + at;
        float *to = y + block_start(x, b) * y_row + o;
#ifdef PAIRS
#define DOTS(bits, rows) \
    block_by_pairs(bits, rows, G, tile.q, tile.scale, tile.minimum, (const int16_t *)a, x_scale, offset, begins, to, y_row, wide)
#elif defined(__ARM_FEATURE_DOTPROD)
#define DOTS(bits, rows) block_by_sdot(bits, rows, G, tile.q, tile.scale, tile.minimum, a, x_scale, offset, begins, to, y_row, wide)
#else
#define DOTS(bits, rows) block_by_dots(bits, rows, G, tile.q, tile.scale, tile.minimum, a, x_scale, offset, begins, to, y_row, wide)
#endif
#define TILES(bits, rows) block_by_tiles(bits, rows, G, tile.q, tile.scale, tile.minimum, a, x_scale, offset, to, y_row, wide)
#define BLOCKS_OF(bits)                               \
    case bits * 16 + 1: DOTS(bits, 1); break;         \
    case bits * 16 + 2: DOTS(bits, 2); break;         \
    case bits * 16 + 4: DOTS(bits, 4); break;         \
    case bits * 16 + 8:                               \
        if (tiles) TILES(bits, 8);                    \
        else if (MOST_ROWS == 8) DOTS(bits, 8);       \
        break;
        switch (tile.bits * 16 + x->rows) { BLOCKS_OF(4) BLOCKS_OF(5) BLOCKS_OF(6) BLOCKS_OF(8) }
    }
}

void quantized_gemm(const quantized_weight *w, long T, const float *x, float *y) {
    quantized_rows a = quantized_rows_of(T, w->I);
#pragma omp parallel
    {
        uint8_t *scratch = quantized_gemm_begin(&a, w->I);
#pragma omp for schedule(static)
        for (long t = 0; t < T; t++) quantize_row(&a, t, x + t * w->I);
#pragma omp for schedule(static)
        for (long o = 0; o < w->O; o += WIDTH) quantized_gemm_tile(w, &a, o, y, w->O, scratch);
        quantized_gemm_end(&a);
    }
    free(a.a);
}

void quantize(long bits, long O, long I, const float *weight, const float *scale, const float *minimum, uint8_t *q) {
    long G = I / GROUP, bytes = WIDTH * GROUP * bits / 8;
    for (long o = 0; o < O; o++)
        for (long g = 0; g < G; g++) {
            const float *from = weight + o * I + g * GROUP;
            uint8_t *to = q + (o / WIDTH * G + g) * bytes + o % WIDTH * 4, whole[GROUP];
            float d = scale[o * G + g], m = minimum[o * G + g], by = d > 0 ? 1 / d : 0, top = bits == 8 ? 255 : 15;
            for (int i = 0; i < GROUP; i++) {
                float x = rintf((from[i] - m) * by);
                whole[i] = (uint8_t)(x < 0 ? 0 : x > top ? top : x);
            }
            for (int i = 0; i < QUADS; i++)
                for (int j = 0; j < 4; j++) {
                    if (bits == 8) to[i * 4 * WIDTH + j] = whole[4 * i + j];
                    else to[i / 2 * 4 * WIDTH + j] |= whole[4 * i + j] << (i % 2 ? 4 : 0);
                }
        }
}
