/* The micro-kernel of quantized_gemm.c on AMX's tiles for 8-bit numbers. */
#pragma once
#include "gemm_amx.h"
#include "quantized_gemm.h"

#ifdef AMX
#define FILLED 8 /* rows of a block from which on a tile is faster than sixteen sums */

#define RING 4 /* groups that are computed ahead: what a tile stores can only be read a while later */
#define LAG 2

static inline int uses_tiles(long rows) { return rows >= FILLED && amx_allowed(); }

static inline void tiles_begin(long rows) {
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 2; i++) shape.bytes[i] = 64, shape.rows[i] = 2 * rows;     /* results */
    for (int i = 2; i < 4; i++) shape.bytes[i] = GROUP, shape.rows[i] = 2 * rows;  /* x */
    for (int i = 4; i < 6; i++) shape.bytes[i] = 64, shape.rows[i] = QUADS;        /* weights */
    load_shape(&shape);
}

static inline void tiles_end(void) { _tile_release(); }

/* The numbers of a tile as bytes: q itself with 8 bits, else unpacked to `to`. */
static inline const uint8_t *tiles_unpacked(long bits, long G, const uint8_t *q, uint8_t *to) {
    __m512i low = _mm512_set1_epi8(15);
    for (long i = 0; bits == 8 && i < G * GROUP * WIDTH; i += 64) __builtin_prefetch(q + i + PREFETCH_BYTES);
    if (bits == 8) return q;
    for (long i = 0; i < G * QUADS / 2; i++) {
        __builtin_prefetch(q + i * 64 + PREFETCH_BYTES);
        __m512i found = _mm512_loadu_si512(q + i * 64);
        _mm512_store_si512(to + i * 128, _mm512_and_si512(found, low));
        _mm512_store_si512(to + i * 128 + 64, _mm512_and_si512(_mm512_srli_epi16(found, 4), low));
    }
    return to;
}

/* Computes what block_by_dots does, from bytes. */
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
        if (h >= 0) add_group(bits, rows, ring[h % RING], scale + h * WIDTH, minimum + h * WIDTH, x_scale + h * rows, x_offset + h * rows, sums);
    }
#undef MULTIPLY
    store_sums(rows, sums, y, y_row, wide);
}
#else /* without this micro-kernel block_by_dots multiplies every block */
static inline int uses_tiles(long rows) { return (void)rows, 0; }
static inline void tiles_begin(long rows) { (void)rows; }
static inline void tiles_end(void) {}
static inline const uint8_t *tiles_unpacked(long bits, long G, const uint8_t *q, uint8_t *to) { return (void)bits, (void)G, (void)to, q; }
#define block_by_tiles block_by_dots
#endif
