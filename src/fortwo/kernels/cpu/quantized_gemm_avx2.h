/* The micro-kernel of quantized_gemm.c for AVX2. Products of bytes would not fit into its 16 bits, so weights are widened, and multiplied by the
   rows' 16 bits in pairs: of the four inputs of a quad, the first and the third, then the second and the fourth. */
#pragma once
#include "quantized_gemm.h"

#if defined(__AVX2__) && !defined(AVX512)
#define PAIRS
#define QUARTER 4 /* rows whose sums the registers hold */

/* The place of number i of a row's group. */
static inline int pair_place(int i) { return i / 4 * 4 + (i % 2) * 2 + i % 4 / 2; }

/* Adds the products of eight pairs with the pair at x. */
static inline __attribute__((always_inline)) __m256i add_products(__m256i sums, __m256i w, const int16_t *x) {
    int32_t two;
    memcpy(&two, x, 4);
#ifdef __AVXVNNI__
    return _mm256_dpwssd_avx_epi32(sums, w, _mm256_set1_epi32(two));
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(w, _mm256_set1_epi32(two)));
#endif
}

/* What block_by_dots computes, for as many rows. */
static inline __attribute__((always_inline)) void block_by_pairs(int bits, int rows, long G, const uint8_t *q, const uint16_t *scale,
                                                              const uint16_t *minimum, const int16_t *x, const float *x_scale,
                                                              const float *x_offset, const float *x_begins, float *y, long y_row, long wide) {
    int halves = bits == 6 ? 2 : 1, quads = QUADS / halves;
    __m256 sums[QUARTER][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
    for (long g = 0; g < G; g++, q += bits * 4 * WIDTH) {
#pragma GCC unroll 8
        for (int i = 0; i < bits; i++) __builtin_prefetch(q + i * 4 * WIDTH + PREFETCH_BYTES);
#pragma GCC unroll 2
        for (int half = 0; half < halves; half++) {
            __m256i whole[QUARTER][2];
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) whole[r][0] = whole[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
            for (int i = half * quads; i < (half + 1) * quads; i++)
#pragma GCC unroll 2
                for (int n = 0; n < 2; n++) {
                    __m256i w = (__m256i)lane_codes(bits, q + n * 32, i);
                    __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
#pragma GCC unroll 4
                    for (int r = 0; r < rows; r++) {
                        const int16_t *own = x + (g * rows + r) * GROUP + 4 * i;
                        whole[r][n] = add_products(add_products(whole[r][n], even, own), odd, own + 2);
                        __asm__("" : "+x"(whole[r][n])); /* keeps gcc from adding in another order, which needs more registers than there are */
                    }
                }
#pragma GCC unroll 2
            for (int n = 0; n < 2; n++) {
                __m256 d = (__m256)load_lanes_fp16(scale + (bits == 6 ? 2 * g + half : g) * WIDTH + n * 8);
                __m256 m = bits == 4 || bits == 5 ? (__m256)load_lanes_fp16(minimum + g * WIDTH + n * 8) : (__m256)(d * (bits == 8 ? -128.0f : -32.0f));
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    long at = g * rows + r;
                    float sum_of_x = halves == 1 ? x_offset[at] : half ? x_offset[at] - x_begins[at] : x_begins[at];
                    sums[r][n] += _mm256_cvtepi32_ps(whole[r][n]) * (d * x_scale[at]);
                    sums[r][n] += m * sum_of_x;
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        if (wide == WIDTH) {
            _mm256_storeu_ps(y + r * y_row, sums[r][0]);
            _mm256_storeu_ps(y + r * y_row + 8, sums[r][1]);
        } else memcpy(y + r * y_row, sums[r], wide * sizeof(float));
    }
}
#endif
