/* Products of a few rows with a frozen weight held in 4 or 8 bits; kernels.c includes this once.

   A weight (O, I) lies in tiles of 16 outputs, a tile in groups of 32 inputs; w = scale * q + minimum, with one scale and one minimum (fp16) for each
   output of a group, as in GGUF's Q4_1. With 8 bits the minimum is -128 scales and is not stored (GGUF's Q8_0). q lies so that four inputs of sixteen
   outputs are 64 bytes; with 4 bits the low halves of 64 bytes are inputs 4i..4i+3, the high halves the four that follow. The rows of x are
   rounded to 16 bits in the same groups, as two bytes that are multiplied one after the other; a group's dot products are whole numbers and
   exact. One byte, as llama.cpp has it, is faster from 8 rows on, and shows in what the model says. */

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

#define GROUP 32
#define QUADS (GROUP / 4)
#define LARGEST 32639 /* 127 * 256 + 127 */

/* Sixteen fp16 numbers. */
static inline vector halves(const uint16_t *from) {
#ifdef __AVX512F__
    return (vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#else
    vector to;
    for (int n = 0; n < WIDTH; n++) {
        union { uint32_t bits; float value; } all = {(uint32_t)(from[n] & 0x7fff) << 13};
        all.value *= 0x1p112f;
        all.bits |= (uint32_t)(from[n] & 0x8000) << 16;
        to[n] = all.value;
    }
    return to;
#endif
}

/* sums[n] += the dot product of the four unsigned bytes of w[n] with the four signed bytes at a. */
static inline __attribute__((always_inline)) integers dot(integers sums, words w, const int8_t *a) {
#ifdef __AVX512VNNI__
    int32_t four;
    memcpy(&four, a, 4);
    return (integers)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(four));
#else
    for (int i = 0; i < 4; i++) sums += (integers)(w >> 8 * i & 255) * a[i];
    return sums;
#endif
}

/* A row of x in whole numbers of 16 bits, x = scale * (256 * a[i] + a[I + i]) in each group; offset is the sum of x as rounded. */
static inline void round_row(long I, const float *x, int8_t *a, float *scale, float *offset) {
    for (long g = 0; g < I / GROUP; g++) {
        const float *from = x + g * GROUP;
        float top = 0;
        for (int i = 0; i < GROUP; i++) top = fabsf(from[i]) > top ? fabsf(from[i]) : top;
        float by = top > 0 ? LARGEST / top : 0;
        int32_t sum = 0, rounded[GROUP];
        for (int i = 0; i < GROUP; i++) rounded[i] = (int32_t)rintf(from[i] * by);
        for (int i = 0; i < GROUP; i++) sum += rounded[i];
        for (int i = 0; i < GROUP; i++) a[g * GROUP + i] = (int8_t)((rounded[i] + 128) >> 8);
        for (int i = 0; i < GROUP; i++) a[I + g * GROUP + i] = (int8_t)rounded[i];
        scale[g] = top / LARGEST;
        offset[g] = scale[g] * sum;
    }
}

/* `rows` rows times one tile; y is where the tile's first output of the first row belongs, `wide` outputs of it are wanted. */
static inline __attribute__((always_inline)) void row_tile(int bits, int rows, long I, long O, const uint8_t *q, const uint16_t *scale,
                                                           const uint16_t *minimum, const int8_t *a, const float *a_scale,
                                                           const float *a_offset, float *y, long wide) {
    long G = I / GROUP;
    vector sums[8];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) sums[r] = (vector){0};
    for (long g = 0; g < G; g++) {
        words w[QUADS];
#pragma GCC unroll 8
        for (int i = 0; i < QUADS; i++) {
            words found = *(const words *)(q + (bits == 8 ? g * QUADS + i : g * QUADS / 2 + i / 2) * 4 * WIDTH);
            if (bits == 8 || i % 2 == 0) __builtin_prefetch((const char *)(q + (bits == 8 ? g * QUADS + i : g * QUADS / 2 + i / 2) * 4 * WIDTH) + 32768);
            w[i] = bits == 8 ? found : (i % 2 ? found >> 4 : found) & 0x0f0f0f0f;
        }
        vector d = halves(scale + g * WIDTH), m = bits == 8 ? d * -128.0f : halves(minimum + g * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            integers whole = {0};
#pragma GCC unroll 8
            for (int i = 0; i < QUADS; i++) whole = dot(whole, w[i], a + 2 * r * I + g * GROUP + 4 * i);
            whole <<= 8;
#pragma GCC unroll 8
            for (int i = 0; i < QUADS; i++) whole = dot(whole, w[i], a + (2 * r + 1) * I + g * GROUP + 4 * i);
            sums[r] += __builtin_convertvector(whole, vector) * a_scale[r * G + g] * d + m * a_offset[r * G + g];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        if (wide == WIDTH) *(vector *)(y + r * O) = sums[r];
        else memcpy(y + r * O, &sums[r], wide * sizeof(float));
    }
}

static inline __attribute__((always_inline)) void grouped(int bits, long T, long I, long O, const float *x, const uint8_t *q,
                                                          const uint16_t *scale, const uint16_t *minimum, float *y) {
    long G = I / GROUP, bytes = WIDTH * I * bits / 8;
    int8_t *a = malloc(2 * T * I + 2 * T * G * sizeof(float));
    float *a_scale = (float *)(a + 2 * T * I), *a_offset = a_scale + T * G;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (long t = 0; t < T; t++) round_row(I, x + t * I, a + 2 * t * I, a_scale + t * G, a_offset + t * G);
#pragma omp for schedule(static)
        for (long o = 0; o < O; o += WIDTH) {
            const uint8_t *tile = q + o / WIDTH * bytes;
            const uint16_t *d = scale + o * G, *m = bits == 8 ? scale : minimum + o * G;
            long wide = O - o < WIDTH ? O - o : WIDTH;
            for (long t = 0; t < T;) {
                const int8_t *row = a + 2 * t * I;
                const float *row_scale = a_scale + t * G, *row_offset = a_offset + t * G;
                float *to = y + t * O + o;
                if (T - t >= 8) {
                    row_tile(bits, 8, I, O, tile, d, m, row, row_scale, row_offset, to, wide);
                    t += 8;
                } else if (T - t >= 4) {
                    row_tile(bits, 4, I, O, tile, d, m, row, row_scale, row_offset, to, wide);
                    t += 4;
                } else if (T - t >= 2) {
                    row_tile(bits, 2, I, O, tile, d, m, row, row_scale, row_offset, to, wide);
                    t += 2;
                } else {
                    row_tile(bits, 1, I, O, tile, d, m, row, row_scale, row_offset, to, wide);
                    t++;
                }
            }
        }
    }
    free(a);
}

/* y (T, O) = x (T, I) W', W in 4 bits. */
void product_int4(long T, long I, long O, const float *x, const uint8_t *q, const uint16_t *scale, const uint16_t *minimum, float *y) {
    grouped(4, T, I, O, x, q, scale, minimum, y);
}

/* The same with W in 8 bits; minimum is not looked at. */
void product_int8(long T, long I, long O, const float *x, const uint8_t *q, const uint16_t *scale, const uint16_t *minimum, float *y) {
    grouped(8, T, I, O, x, q, scale, minimum, y);
}

/* Lay out a weight (O, I) whose scales and minima (O, G), in floats, are given; q is zero where O is no multiple of 16. */
void quantise(long bits, long O, long I, const float *weight, const float *scale, const float *minimum, uint8_t *q) {
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
