/* The layout of adapters in 8 bits, and products with them. A block holds sixteen rows of a matrix: the scale of each row in fp32, then pairs of
   numbers in 8 bits, (row / 2, 16, 2). The number of rows and their length are made even by zeros. */
#pragma once
#include "quantized_gemm_avx2.h"

#define SHARE(outputs) ((outputs) / WIDTH / 8 + 1) /* groups of sixteen outputs that a thread takes at once; they are neighbours, so that it prefetches its own */
#define MOST_SUMMED 16e6f /* the largest sum of magnitudes whose products with 127 stay below 2^31, rounding included */
#define BYTES_OF_ROWS(rows, row) (((rows) * (sizeof(float) + (row) * sizeof(int16_t)) + 63) / 64 * 64)
#define SCALES (WIDTH * (long)sizeof(float))
#define BLOCK_BYTES(row) (SCALES + (row) * WIDTH) /* bytes of a block of rows of `row` numbers */

/* Rows in 16 bits, and the scale of each. */
typedef struct {
    int16_t *x;
    float *scale;
} int16_rows;

#ifdef PAIRS
typedef struct { __m256i half[2]; } pairs_of_sixteen, sums_of_sixteen;

static inline __attribute__((always_inline)) pairs_of_sixteen block_pairs(const int8_t *from) {
    return (pairs_of_sixteen){{_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from)), _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)from + 1))}};
}

static inline __attribute__((always_inline)) sums_of_sixteen add_pairs(sums_of_sixteen sums, pairs_of_sixteen pairs, const int16_t *h) {
    return (sums_of_sixteen){{add_products(sums.half[0], pairs.half[0], h), add_products(sums.half[1], pairs.half[1], h)}};
}

static inline __attribute__((always_inline)) sums_of_sixteen added_sums(sums_of_sixteen a, sums_of_sixteen b) {
    return (sums_of_sixteen){{_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])}};
}

/* to (+)= sums * scale * by */
static inline __attribute__((always_inline)) void store_scaled(float *to, int add, sums_of_sixteen sums, const float *scale, float by) {
#pragma GCC unroll 2
    for (int n = 0; n < 2; n++) {
        __m256 own = _mm256_cvtepi32_ps(sums.half[n]) * (_mm256_loadu_ps(scale + 8 * n) * by);
        _mm256_storeu_ps(to + 8 * n, add ? (__m256)(_mm256_loadu_ps(to + 8 * n) + own) : own);
    }
}
#else
typedef words pairs_of_sixteen;
typedef integers sums_of_sixteen;

/* Sixteen pairs of a block, widened to 16 bits. */
static inline __attribute__((always_inline)) pairs_of_sixteen block_pairs(const int8_t *from) {
#ifdef __AVX512BW__
    return (words)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from));
#else
    words pairs;
    for (int n = 0; n < WIDTH; n++) pairs[n] = (uint16_t)from[2 * n] | (uint32_t)from[2 * n + 1] << 16;
    return pairs;
#endif
}

/* Returns sums + the products of sixteen pairs with the pair at h. */
static inline __attribute__((always_inline)) sums_of_sixteen add_pairs(sums_of_sixteen sums, pairs_of_sixteen pairs, const int16_t *h) {
#ifdef __AVX512VNNI__
    int32_t two;
    memcpy(&two, h, 4);
    return (integers)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)pairs, _mm512_set1_epi32(two));
#else
    integers both = (integers)pairs;
    return sums + (both << 16 >> 16) * h[0] + (both >> 16) * h[1];
#endif
}

static inline __attribute__((always_inline)) sums_of_sixteen added_sums(sums_of_sixteen a, sums_of_sixteen b) { return a + b; }

/* to (+)= sums * scale * by */
static inline __attribute__((always_inline)) void store_scaled(float *to, int add, sums_of_sixteen sums, const float *scale, float by) {
    vector own = __builtin_convertvector(sums, vector) * (*(const vector *)scale * by);
    *(vector *)to = add ? *(vector *)to + own : own;
}
#endif

/* Computes sixteen ranks of h = A x for four rows or for one. A is the block of these ranks. */
static inline __attribute__((always_inline)) void shrink_rows(int rows, const long *members, long I, const int8_t *A, const int16_rows *x, float *h,
                                                          long h_row) {
    sums_of_sixteen sums[4] = {}; /* one for each row, or for every fourth pair of a single row */
    int ways = 4 / rows;
    const int8_t *pairs = A + SCALES;
    for (long i = 0; i < I; i += 2 * ways) {
        for (int k = 0; k < ways; k += 2) __builtin_prefetch(pairs + (i + 2 * k) * WIDTH + PREFETCH_BYTES);
        for (int k = 0; k < 4; k++) {
            long own = i + (rows == 1 ? 2 * k : 0);
            sums[k] = add_pairs(sums[k], block_pairs(pairs + own * WIDTH), x->x + members[rows == 1 ? 0 : k] * I + own);
        }
    }
    if (rows == 1) sums[0] = added_sums(added_sums(sums[0], sums[1]), added_sums(sums[2], sums[3]));
    for (int k = 0; k < rows; k++) store_scaled(h + members[k] * h_row, 0, sums[k], (const float *)A, x->scale[members[k]]);
}

/* Adds sixteen outputs of B h to y. B is the block of these outputs, h begins at the part's first rank. */
static inline __attribute__((always_inline)) void expand_rows(int rows, const long *members, long pairs, const int8_t *B, const int16_t *h, long h_row,
                                                           const float *h_scale, float *y, long y_row) {
    sums_of_sixteen sums[4] = {};
    for (long j = 0; j < pairs; j++) {
        pairs_of_sixteen b = block_pairs(B + SCALES + 2 * j * WIDTH);
        for (int k = 0; k < rows; k++) sums[k] = add_pairs(sums[k], b, h + members[k] * h_row + 2 * j);
    }
    for (int k = 0; k < rows; k++) store_scaled(y + members[k] * y_row, 1, sums[k], (const float *)B, h_scale[members[k]]);
}

/* Does the same for any number of rows, and prefetches the next block. */
static inline void expand_all_rows(long first, long last, const long *members, long pairs, const int8_t *B, const int16_t *h, long h_row,
                                const float *h_scale, float *y, long y_row) {
    for (long b = 0; b < BLOCK_BYTES(2 * pairs); b += 64) __builtin_prefetch(B + BLOCK_BYTES(2 * pairs) + b);
    for (; first + 4 <= last; first += 4) expand_rows(4, members + first, pairs, B, h, h_row, h_scale, y, y_row);
    for (; first < last; first++) expand_rows(1, members + first, pairs, B, h, h_row, h_scale, y, y_row);
}

void quantize_int16(const int16_rows *to, long t, long row, long count, const float *x);
void shrink(long N, const adapter *adapters, const long *members, long index, long I, const int16_rows *x, float *h, long h_row);
void quantize_ranks(long N, const adapter *adapters, const long *members, long index, const float *h, long h_row, const int16_rows *to);
void expand(long N, const adapter *adapters, const long *members, long index, long o, const int16_rows *h, long h_row, float *y, long y_row);
long most_ranks(long N, const adapter *adapters, long from, long to);
int16_rows int16_rows_at(char **scratch, long rows, long row);
