/* Rounded rows, and the products of them with tiles of a weight. */
#pragma once
#include "common.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef __ARM_NEON
#include <arm_neon.h>
#endif

#define GROUP 32
#define QUADS (GROUP / 4)
#define LARGEST 32639 /* 127 * 256 + 127 */
#if defined(__ARM_NEON) || (defined(__AVX2__) && !defined(AVX512))
#define MOST_ROWS 4 /* that are multiplied at once: as many as the registers hold */
#else
#define MOST_ROWS 8
#endif
#define PREFETCH_BYTES 4096 /* bytes of the weight that are prefetched */

static inline float from_fp16(uint16_t x) {
    union { uint32_t bits; float value; } all = {(uint32_t)(x & 0x7fff) << 13};
    all.value *= 0x1p112f;
    all.bits |= (uint32_t)(x & 0x8000) << 16;
    return all.value;
}

/* Sixteen fp16 numbers. */
static inline vector load_fp16(const uint16_t *from) {
#ifdef __AVX512F__
    return (vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__ARM_NEON)
    vector to;
    for (int n = 0; n < WIDTH; n++) to[n] = ((const __fp16 *)from)[n];
    return to;
#elif defined(__F16C__)
    union { __m256 half[2]; vector all; } to;
    for (int n = 0; n < 2; n++) to.half[n] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from + n));
    return to.all;
#else
    vector to;
    for (int n = 0; n < WIDTH; n++) to[n] = from_fp16(from[n]);
    return to;
#endif
}

/* A register of fp16 numbers. */
static inline __attribute__((always_inline)) lanes load_lanes_fp16(const uint16_t *from) {
#if LANES == 16
    return load_fp16(from);
#elif defined(__F16C__)
    return (lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#elif defined(__ARM_NEON)
    return (lanes)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
    lanes to;
    for (int n = 0; n < LANES; n++) to[n] = from_fp16(from[n]);
    return to;
#endif
}

static inline void store_fp16(uint16_t *to, vector from) {
#ifdef __AVX512F__
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)from, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON)
    for (int n = 0; n < WIDTH; n++) ((__fp16 *)to)[n] = from[n];
#elif defined(__F16C__)
    union { vector all; __m256 half[2]; } own = {from};
    for (int n = 0; n < 2; n++) _mm_storeu_si128((__m128i *)to + n, _mm256_cvtps_ph(own.half[n], _MM_FROUND_TO_NEAREST_INT));
#else
    for (int n = 0; n < WIDTH; n++) {
        union { float value; uint32_t bits; } x = {from[n]}, small;
        uint32_t sign = x.bits >> 16 & 0x8000, size = x.bits & 0x7fffffff, half;
        x.bits = size;
        if (size >= 0x47800000) half = size > 0x7f800000 ? 0x7e00 : 0x7c00; /* not a number, or too large for fp16 */
        else if (size < 0x38800000) { /* the last place of 1/2 is that of the smallest fp16 numbers */
            small.value = x.value + 0.5f;
            half = small.bits - 0x3f000000;
        } else half = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
        to[n] = sign | half;
    }
#endif
}

/* T rows of I inputs in 16 bits: x = scale * (256 * high + low) in each group; offset is the sum of the rounded x, begins that of a group's first half.
   They lie in blocks of `rows` rows, and the last block begins early enough to be whole. For each group a block has the high bytes of its rows, then the
   low bytes. */
typedef struct {
    long T, I, rows, blocks;
    int8_t *a;
    float *scale, *offset, *begins;
} quantized_rows;

static inline long block_start(const quantized_rows *x, long b) { return b * x->rows < x->T - x->rows ? b * x->rows : x->T - x->rows; }

/* Outputs o to o + 15 of a weight, o a multiple of 16. */
typedef struct {
    long bits;
    const uint8_t *q;
    const uint16_t *scale, *minimum;
} quantized_tile;

static inline quantized_tile tile_of(const quantized_weight *w, long o) {
    long p = 0, G = w->I / GROUP;
    while (p + 1 < w->parts && w->part[p + 1].first <= o) p++;
    long bits = w->part[p].bits, inner = o - w->part[p].first;
    const uint16_t *minimum = w->part[p].minimum;
    return (quantized_tile){bits, w->part[p].q + inner * w->I * bits / 8, w->part[p].scale + inner * G * (bits == 6 ? 2 : 1), minimum ? minimum + inner * G : 0};
}

/* A group's outputs of quad i, as bytes: all sixteen, or as many as a register has, from those at q on. */
#define GROUP_CODES(type, name)                                                                                    \
    static inline __attribute__((always_inline)) type name(int bits, const uint8_t *q, int i) {                    \
        if (bits == 8) return *(const type *)(q + i * 4 * WIDTH);                                                  \
        type low = *(const type *)(q + i / 2 * 4 * WIDTH), high;                                                   \
        low = (i % 2 ? low >> 4 : low) & 0x0f0f0f0f;                                                               \
        if (bits == 4) return low;                                                                                 \
        if (bits == 5) {                                                                                           \
            high = *(const type *)(q + QUADS / 2 * 4 * WIDTH);                                                     \
            return low | ((i < 4 ? high << (4 - i) : high >> (i - 4)) & 0x10101010);                               \
        }                                                                                                          \
        high = *(const type *)(q + (QUADS / 2 + i / 4) * 4 * WIDTH);                                               \
        return low | ((i % 4 < 2 ? high << (4 - i % 4 * 2) : high >> (i % 4 * 2 - 4)) & 0x30303030);               \
    }
GROUP_CODES(words, group_codes)
GROUP_CODES(lane_words, lane_codes)

/* Scales of the sixteen outputs of group g, and what is added to scale * q: with 6 bits those of one half, else of the whole group. */
static inline __attribute__((always_inline)) void group_scales(int bits, long g, int half, const uint16_t *scale, const uint16_t *minimum, vector *d, vector *m) {
    *d = load_fp16(scale + (bits == 6 ? 2 * g + half : g) * WIDTH);
    *m = bits == 8 ? *d * -128.0f : bits == 6 ? *d * -32.0f : load_fp16(minimum + g * WIDTH);
}

/* Adds one group's whole numbers, of sixteen outputs and `rows` rows, to the sums. */
static inline __attribute__((always_inline)) void add_group(int rows, const integers *whole, vector d, vector m, const float *x_scale, const float *x_offset,
                                                            vector *sums) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        sums[r] += __builtin_convertvector((whole[r] << 8) + whole[rows + r], vector) * (x_scale[r] * d);
        sums[r] += m * x_offset[r];
    }
}

static inline __attribute__((always_inline)) void store_sums(int rows, const vector *sums, float *y, long y_row, long wide) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        if (wide == WIDTH) *(vector *)(y + r * y_row) = sums[r];
        else memcpy(y + r * y_row, &sums[r], wide * sizeof(float));
    }
}

quantized_rows quantized_rows_of(long T, long I);
uint8_t *quantized_gemm_begin(const quantized_rows *x, long widest);
void quantized_gemm_end(const quantized_rows *x);
void quantized_gemm_tile(const quantized_weight *w, const quantized_rows *x, long o, float *y, long y_row, uint8_t *scratch);
void quantize_row(const quantized_rows *x, long t, const float *row);
