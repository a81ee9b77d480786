/* The micro-kernel of products in bf16 on AMX's tiles, and the layout that it reads. The right operand is packed in panels of 32 outputs, a panel in
   steps of 32 inputs, a step in two tiles of 16 outputs; a tile holds 16 pairs of inputs, each with the two numbers of all outputs side by side. */
#pragma once
#include "vectors.h"
#include "nf4.h"

#ifdef AMX
#define PANEL 32               /* outputs of a panel, rows of a block */
#define STEP 32                /* inputs of a step */
#define TILE (16 * STEP)       /* numbers of a tile */
#define SQUARE (PANEL * STEP)
#define RUN 16                 /* steps of a panel that are multiplied before their sums are stored; they fit into the first cache */
#define AHEAD (8 * STEP)       /* numbers of a row that are prefetched */
#define ROWS_AHEAD 16          /* rows that are prefetched where a few numbers of each are read */
#define CACHE_BYTES (1100 * 1024) /* bytes of panels that stay in a core's cache while the left operand is read */

/* a (M, K) with a_row numbers from row to row, and b (N, K) with steps b_n and b_k. One of these is 1; both are 0 for packed panels, and -1 for the
   packed panels of the transpose (K outputs, N inputs). nf4: b consists of codes (nf4.h) instead, and the step that is not 1 is a multiple of 64. */
typedef struct {
    const bf16 *a, *b;
    long a_row, b_n, b_k, K;
    const normal_floats *nf4;
} gemm_operand;

static inline long steps_of(long K) { return (K + STEP - 1) / STEP; }
static inline long padded_to_steps(long K) { return steps_of(K) * STEP; }

/* Transposes 16 outputs x 16 pairs of 32 bits: rows of pairs become columns of pairs. */
static inline void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

static const uint16_t interleave[2][32] = {
    {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
    {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};

/* gcc 12 does not see that a tile, or its configuration, is read from memory, and may drop what was written there. */
static inline void written_for_tiles(const void *at) { __asm__ volatile("" ::"r"(at) : "memory"); }

static inline void load_shape(const void *shape) {
    written_for_tiles(shape);
    _tile_loadconfig(shape);
}

static inline void amx_begin_bf16(void) {
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    load_shape(&shape);
}

static inline void tile_step(const bf16 *a, long a_row, const bf16 *b) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 2 * a_row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * a_row, 2 * a_row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

static inline void tiles_clear(void) {
    written_for_tiles(0);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static inline void tiles_loaded(const float *sums, long row) { /* (32, 32), with `row` numbers from row to row */
    written_for_tiles(sums);
    _tile_loadd(0, sums, 4 * row);
    _tile_loadd(1, sums + 16, 4 * row);
    _tile_loadd(2, sums + 16 * row, 4 * row);
    _tile_loadd(3, sums + 16 * row + 16, 4 * row);
}

static inline void tiles_stored(float *sums, long row) {
    _tile_stored(0, sums, 4 * row);
    _tile_stored(1, sums + 16, 4 * row);
    _tile_stored(2, sums + 16 * row, 4 * row);
    _tile_stored(3, sums + 16 * row + 16, 4 * row);
}

/* c (32, 32) (+)= a times `count` steps of a panel. */
static inline void tile_gemm_32x32(long count, const bf16 *a, long a_row, const bf16 *panel, float *c, long c_row, int add) {
    if (add) tiles_loaded(c, c_row);
    else tiles_clear();
    for (long k = 0; k < count; k++) tile_step(a + k * STEP, a_row, panel + k * SQUARE);
    tiles_stored(c, c_row);
}

/* c (32, 16) = a times half a panel, its first tiles or its second; c has rows of 32. */
static inline void tile_gemm_32x16(long count, const bf16 *a, long a_row, const bf16 *panel, float *c) {
    written_for_tiles(a);
    _tile_zero(0);
    _tile_zero(2);
    for (long k = 0; k < count; k++) {
        _tile_loadd(6, panel + k * SQUARE, 64);
        _tile_loadd(4, a + k * STEP, 2 * a_row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a + k * STEP + 16 * a_row, 2 * a_row);
        _tile_dpbf16ps(2, 5, 6);
    }
    _tile_stored(0, c, 4 * PANEL);
    _tile_stored(2, c + 16 * PANEL, 4 * PANEL);
}

/* c (16, 32) = 16 rows of a times a panel. */
static inline void tile_gemm_16x32(long count, const bf16 *a, long a_row, const bf16 *panel, float *c) {
    written_for_tiles(a);
    _tile_zero(0);
    _tile_zero(1);
    for (long k = 0; k < count; k++) {
        _tile_loadd(4, a + k * STEP, 2 * a_row);
        _tile_loadd(6, panel + k * SQUARE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + k * SQUARE + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, c, 4 * PANEL);
    _tile_stored(1, c + 16, 4 * PANEL);
}

void pack(const gemm_operand *f, long N, long first, long last, bf16 *to, long apart);
void pack_transposed(const gemm_operand *f, long N, long first, long last, bf16 *to, long apart);
void transpose_rows(const bf16 *rows, long row, long count, bf16 *to, long to_row);
#endif
