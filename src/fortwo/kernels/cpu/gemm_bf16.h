/* Products in bf16, and the layout of their right operand, which the micro-kernel (tiles.h) reads. The right operand is packed in panels of 32 outputs, a panel in
   steps of 32 inputs, a step in two tiles of 16 outputs; a tile holds 16 pairs of inputs, each with the two numbers of all outputs side by side. */
#pragma once
#include "tiles.h"
#include "nf4.h"

#ifdef TILED
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

void pack(const gemm_operand *f, long N, long first, long last, bf16 *to, long apart);
void pack_transposed(const gemm_operand *f, long N, long first, long last, bf16 *to, long apart);
void transpose_rows(const bf16 *rows, long row, long count, bf16 *to, long to_row);
#endif
