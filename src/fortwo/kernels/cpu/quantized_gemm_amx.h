/* The micro-kernel of quantized_gemm.c on AMX's tiles for 8-bit numbers. */
#pragma once
#include "gemm_bf16.h"
#include "quantized_gemm.h"

#ifdef AMX
#define FILLED 8 /* rows of a block from which on a tile is faster than sixteen sums */

#define RING 4 /* groups that are computed ahead: what a tile stores can only be read a while later */
#define LAG 2

static inline int uses_tiles(long rows) { return rows >= FILLED && tiles_allowed(); }

static inline void byte_tiles_begin(long rows) {
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 2; i++) shape.bytes[i] = 64, shape.rows[i] = 2 * rows;     /* results */
    for (int i = 2; i < 4; i++) shape.bytes[i] = GROUP, shape.rows[i] = 2 * rows;  /* x */
    for (int i = 4; i < 6; i++) shape.bytes[i] = 64, shape.rows[i] = QUADS;        /* weights */
    load_shape(&shape);
}

static inline void byte_tiles_end(void) { _tile_release(); }

/* The numbers of a tile as bytes: q itself with 8 bits, else unpacked to `to`. */
static inline __attribute__((always_inline)) const uint8_t *unpacked_groups(int bits, long G, const uint8_t *q, uint8_t *to) {
    for (long g = 0; g < G; g++, q += bits * 4 * WIDTH) {
#pragma GCC unroll 8
        for (int i = 0; i < bits; i++) __builtin_prefetch(q + i * 4 * WIDTH + PREFETCH_BYTES);
#pragma GCC unroll 8
        for (int i = 0; bits < 8 && i < QUADS; i++) *(words *)(to + (g * QUADS + i) * 4 * WIDTH) = group_codes(bits, q, i);
    }
    return to;
}

static inline const uint8_t *tiles_unpacked(long bits, long G, const uint8_t *q, uint8_t *to) {
    if (bits == 4) return unpacked_groups(4, G, q, to);
    if (bits == 5) return unpacked_groups(5, G, q, to);
    unpacked_groups(8, G, q, to);
    return q;
}

/* Computes what block_by_dots does, from bytes; not with 6 bits, whose groups have two scales. */
static inline __attribute__((always_inline)) void block_by_tiles(int bits, int rows, long G, const uint8_t *q, const uint16_t *scale,
                                                              const uint16_t *minimum, const int8_t *a, const float *x_scale,
                                                              const float *x_offset, float *y, long y_row, long wide) {
    vector sums[8];
    integers ring[RING][16] __attribute__((aligned(64)));
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) sums[r] = (vector){0};
#define MULTIPLY(sum, left, right)                   \
    _tile_loadd(right, q + g * GROUP * WIDTH, 64);   \
    _tile_loadd(left, a + g * 2 * rows * GROUP, GROUP); \
    _tile_zero(sum);                                 \
    _tile_dpbsud(sum, left, right);                  \
    _tile_stored(sum, ring[g % RING], 64);
    for (long g = 0, h = -LAG; h < G; g++, h++) {
        if (g < G && g % 2) { MULTIPLY(1, 3, 5) }
        else if (g < G) { MULTIPLY(0, 2, 4) }
        if (h < 0) continue;
        vector d, m;
        group_scales(bits, h, 0, scale, minimum, &d, &m);
        add_group(rows, ring[h % RING], d, m, x_scale + h * rows, x_offset + h * rows, sums);
    }
#undef MULTIPLY
    store_sums(rows, sums, y, y_row, wide);
}
#else /* without this micro-kernel block_by_dots multiplies every block */
static inline int uses_tiles(long rows) { return (void)rows, 0; }
static inline void byte_tiles_begin(long rows) { (void)rows; }
static inline void byte_tiles_end(void) {}
static inline const uint8_t *tiles_unpacked(long bits, long G, const uint8_t *q, uint8_t *to) { return (void)bits, (void)G, (void)to, q; }
#define block_by_tiles(...) (void)0
#endif
