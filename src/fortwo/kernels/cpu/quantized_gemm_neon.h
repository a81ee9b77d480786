/* The micro-kernel of quantized_gemm.c for ARM's products of four signed bytes (sdot). Four outputs fill a register, and a quad of a row's bytes is one
   of the four in its register. Weights in 8 bits are made signed, so that their minimum of -128 scales is in them. */
#pragma once
#include "quantized_gemm.h"

#ifdef __ARM_FEATURE_DOTPROD
/* What block_by_dots computes, for up to four rows: eight outputs at a time, with high and low bytes apart. */
static inline __attribute__((always_inline)) void block_by_sdot(int bits, int rows, long G, const uint8_t *q, const uint16_t *scale,
                                                             const uint16_t *minimum, const int8_t *a, const float *x_scale,
                                                             const float *x_offset, const float *x_begins, float *y, long y_row, long wide) {
    int halves = bits == 6 ? 2 : 1;
    for (long first = 0; first < WIDTH; first += 2 * LANES) {
        lanes sums[4][2];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = (lanes){0};
        for (long g = 0; g < G; g++) {
            const uint8_t *own = q + g * bits * 4 * WIDTH + first * 4;
            const int8_t *high = a + g * 2 * rows * GROUP, *low = high + rows * GROUP;
            int32x4_t whole[4][2][2]; /* by row, four outputs, and byte */
            for (int i = 0; i < bits; i += first ? 8 : 1) __builtin_prefetch(own + i * 4 * WIDTH + PREFETCH_BYTES);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                int8x16_t x[4][2];
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    x[r][0] = vld1q_s8(high + r * GROUP + half * GROUP / 2), x[r][1] = vld1q_s8(low + r * GROUP + half * GROUP / 2);
                    if (half == 0 || halves == 2) whole[r][0][0] = whole[r][0][1] = whole[r][1][0] = whole[r][1][1] = vdupq_n_s32(0);
                }
#define ADD_QUAD(j)                                                                                                  \
    for (int n = 0; n < 2; n++) {                                                                                    \
        int8x16_t w = (int8x16_t)lane_codes(bits, own + n * 16, half * 4 + j);                                       \
        if (bits == 8) w = veorq_s8(w, vdupq_n_s8(-128));                                                            \
        for (int r = 0; r < rows; r++)                                                                               \
            for (int byte = 0; byte < 2; byte++) whole[r][n][byte] = vdotq_laneq_s32(whole[r][n][byte], w, x[r][byte], j); \
    }
                ADD_QUAD(0) ADD_QUAD(1) ADD_QUAD(2) ADD_QUAD(3)
#undef ADD_QUAD
                if (half == 0 && halves == 1) continue;
#pragma GCC unroll 2
                for (int n = 0; n < 2; n++) {
                    long o = first + n * LANES;
                    lanes d = load_lanes_fp16(scale + (bits == 6 ? 2 * g + half : g) * WIDTH + o);
                    lanes m = bits == 6 ? d * -32.0f : bits == 8 ? (lanes){0} : load_lanes_fp16(minimum + g * WIDTH + o);
#pragma GCC unroll 4
                    for (int r = 0; r < rows; r++) {
                        long at = g * rows + r;
                        float sum_of_x = halves == 1 ? x_offset[at] : half ? x_offset[at] - x_begins[at] : x_begins[at];
                        int32x4_t all = vaddq_s32(vshlq_n_s32(whole[r][n][0], 8), whole[r][n][1]);
                        sums[r][n] += (lanes)vcvtq_f32_s32(all) * (d * x_scale[at]);
                        if (bits != 8) sums[r][n] += m * sum_of_x;
                    }
                }
            }
        }
        long left = wide - first < 2 * LANES ? wide - first : 2 * LANES;
        for (int r = 0; r < rows && left > 0; r++) memcpy(y + r * y_row + first, sums[r], left * sizeof(float));
    }
}
#endif
