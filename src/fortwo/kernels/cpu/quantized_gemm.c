/* Products of a few rows with weights in 4 or 8 bits. A weight (O, I) lies in tiles of 16 outputs, a tile in groups of 32 inputs: w = scale * q +
   minimum, with a scale and a minimum in fp16 for each output of a group, as in GGUF's Q4_1. With 8 bits the minimum is -128 scales and is not stored
   (GGUF's Q8_0). Four inputs of sixteen outputs are 64 bytes of q; with 4 bits the low halves of 64 bytes are inputs 4i to 4i + 3, the high halves the
   four that follow. The rows of x are rounded to 16 bits in the same groups, as two bytes that are multiplied one after the other, so the dot products
   of a group are exact whole numbers. One byte, as llama.cpp uses, is faster from 8 rows on, but changes what the model says. */
#include "quantized_gemm.h"
#include "quantized_gemm_amx.h"

/* Returns sums + the dot products of the four unsigned bytes of each w[n] with the four signed bytes at a. */
static inline __attribute__((always_inline)) integers dot4(integers sums, words w, const int8_t *a) {
#ifdef __AVX512VNNI__
    int32_t four;
    memcpy(&four, a, 4);
    return (integers)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(four));
#else
    for (int i = 0; i < 4; i++) sums += (integers)(w >> 8 * i & 255) * a[i];
    return sums;
#endif
}

quantized_rows quantized_rows_of(long T, long I) { /* the caller frees x.a */
    long rows = T >= 8 ? 8 : T >= 4 ? 4 : T >= 2 ? 2 : 1, blocks = (T + rows - 1) / rows, all = blocks * rows;
    int8_t *a = aligned_alloc(64, (all * (2 * I + I / GROUP * 2 * sizeof(float)) + 63) / 64 * 64);
    float *scale = (float *)(a + 2 * all * I);
    return (quantized_rows){T, I, rows, blocks, a, scale, scale + all * (I / GROUP)};
}

/* Rounds row t, into every block that contains it. */
void quantize_row(const quantized_rows *x, long t, const float *row) {
    long G = x->I / GROUP;
    for (long g = 0; g < G; g++) {
        const float *from = row + g * GROUP;
        float size[GROUP];
        for (int i = 0; i < GROUP; i++) size[i] = fabsf(from[i]);
        float top = largest(size, GROUP), by = top > 0 ? LARGEST / top : 0;
        int32_t sum = 0, whole[GROUP];
        for (int i = 0; i < GROUP; i++) whole[i] = (int32_t)rintf(from[i] * by);
        for (int i = 0; i < GROUP; i++) sum += whole[i];
        for (long b = t / x->rows; b < x->blocks; b++) {
            long r = t - block_start(x, b), at = b * G + g;
            if (r < 0 || r >= x->rows) continue;
            int8_t *high = x->a + (at * 2 * x->rows + r) * GROUP, *low = high + x->rows * GROUP;
            for (int i = 0; i < GROUP; i++) high[i] = (int8_t)((whole[i] + 128) >> 8);
            for (int i = 0; i < GROUP; i++) low[i] = (int8_t)whole[i];
            x->scale[at * x->rows + r] = top / LARGEST;
            x->offset[at * x->rows + r] = top / LARGEST * sum;
        }
    }
}

/* The micro-kernel for every level: one block of rows times one tile. a and its scales and offsets are the block's; q, scale and minimum are the
   tile's. */
static inline __attribute__((always_inline)) void block_by_dots(int bits, int rows, long G, const uint8_t *q, const uint16_t *scale,
                                                             const uint16_t *minimum, const int8_t *a, const float *x_scale,
                                                             const float *x_offset, float *y, long y_row, long wide) {
    vector sums[8];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) sums[r] = (vector){0};
    for (long g = 0; g < G; g++) {
        words w[QUADS];
        integers whole[16];
#pragma GCC unroll 8
        for (int i = 0; i < QUADS; i++) {
            const uint8_t *from = q + (bits == 8 ? g * QUADS + i : g * QUADS / 2 + i / 2) * 4 * WIDTH;
            words found = *(const words *)from;
            if (bits == 8 || i % 2 == 0) __builtin_prefetch(from + PREFETCH_BYTES);
            w[i] = bits == 8 ? found : (i % 2 ? found >> 4 : found) & 0x0f0f0f0f;
        }
#pragma GCC unroll 16
        for (int r = 0; r < 2 * rows; r++) {
            integers other = {0}; /* two independent sums */
            whole[r] = (integers){0};
#pragma GCC unroll 4
            for (int i = 0; i < QUADS; i += 2) {
                whole[r] = dot4(whole[r], w[i], a + (g * 2 * rows + r) * GROUP + 4 * i);
                other = dot4(other, w[i + 1], a + (g * 2 * rows + r) * GROUP + 4 * i + 4);
            }
            whole[r] += other;
        }
        add_group(bits, rows, whole, scale + g * WIDTH, minimum + g * WIDTH, x_scale + g * rows, x_offset + g * rows, sums);
    }
    store_sums(rows, sums, y, y_row, wide);
}

/* Prepares a thread for products with rounded rows, until quantized_gemm_end. Returns scratch for one tile of a weight with up to `widest` inputs. */
uint8_t *quantized_gemm_begin(const quantized_rows *x, long widest) {
    static _Thread_local struct { uint8_t *at; long size; } scratch;
    if (WIDTH * widest > scratch.size) {
        free(scratch.at);
        scratch.size = WIDTH * widest;
        scratch.at = aligned_alloc(64, scratch.size);
    }
    if (uses_tiles(x->rows)) tiles_begin(x->rows);
    return scratch.at;
}

void quantized_gemm_end(const quantized_rows *x) {
    if (uses_tiles(x->rows)) tiles_end();
}

/* Computes outputs o to o + 15 of all rows. y points to row 0, output 0. */
void quantized_gemm_tile(const quantized_weight *w, const quantized_rows *x, long o, float *y, long y_row, uint8_t *scratch) {
    long G = w->I / GROUP, wide = w->O - o < WIDTH ? w->O - o : WIDTH;
    const uint8_t *q = w->q + o * w->I * w->bits / 8;
    const uint16_t *d = w->scale + o * G, *m = w->bits == 8 ? d : w->minimum + o * G;
    int tiles = uses_tiles(x->rows);
    if (tiles) q = tiles_unpacked(w->bits, G, q, scratch);
    for (long b = 0; b < x->blocks; b++) {
        const int8_t *a = x->a + b * 2 * x->rows * x->I;
        const float *x_scale = x->scale + b * x->rows * G, *x_offset = x->offset + b * x->rows * G;
        float *to = y + block_start(x, b) * y_row + o;
#define BLOCK_OF(bits, rows)                                                                  \
    if (tiles) block_by_tiles(bits, rows, G, q, d, m, a, x_scale, x_offset, to, y_row, wide); \
    else block_by_dots(bits, rows, G, q, d, m, a, x_scale, x_offset, to, y_row, wide);        \
    break;
        switch (w->bits * 8 + x->rows) {
        case 4 * 8 + 1: BLOCK_OF(4, 1)
        case 4 * 8 + 2: BLOCK_OF(4, 2)
        case 4 * 8 + 4: BLOCK_OF(4, 4)
        case 4 * 8 + 8: BLOCK_OF(4, 8)
        case 8 * 8 + 1: BLOCK_OF(8, 1)
        case 8 * 8 + 2: BLOCK_OF(8, 2)
        case 8 * 8 + 4: BLOCK_OF(8, 4)
        case 8 * 8 + 8: BLOCK_OF(8, 8)
        }
#undef BLOCK_OF
    }
}

void quantized_gemm(long bits, long T, long I, long O, const float *x, const uint8_t *q, const uint16_t *scale, const uint16_t *minimum, float *y) {
    quantized_weight w = {bits, O, I, q, scale, minimum};
    quantized_rows a = quantized_rows_of(T, I);
#pragma omp parallel
    {
        uint8_t *scratch = quantized_gemm_begin(&a, I);
#pragma omp for schedule(static)
        for (long t = 0; t < T; t++) quantize_row(&a, t, x + t * I);
#pragma omp for schedule(static)
        for (long o = 0; o < O; o += WIDTH) quantized_gemm_tile(&w, &a, o, y, O, scratch);
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
