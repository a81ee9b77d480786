/* What torch does in several passes over memory, in one: the small operations between the matrix products, forward and backward.
   Plain C with GCC's vector types; compiled for the machine it runs on (__init__.py). */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SERIAL 16384 /* elements below which one thread is faster than two */
#define LINE 64      /* numbers of a row that are worked on while those of the next row are fetched */
#define BLOCK 16     /* queries of one head whose scores are there together */
#define WIDTH 16
#define PART 16384   /* numbers that are summed up in fp32 */
#define STATES 256   /* numbers of 8 bits that share a unit */
#define PAD(n) (((n) + WIDTH - 1) / WIDTH * WIDTH)

typedef float vector __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t integers __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint16_t bf16;

static inline float from_bf16(bf16 x) {
    union { uint32_t bits; float value; } all = {(uint32_t)x << 16};
    return all.value;
}

static inline bf16 to_bf16(float x) { /* to the nearest, ties to even */
    union { float value; uint32_t bits; } all = {x};
    return (all.bits + 0x7fff + (all.bits >> 16 & 1)) >> 16;
}

/* e^x to 2 units in the last place, without a branch, so that loops over it become vectors. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return p * power.value;
}

/* 32 bits without a pattern for each place (the finaliser of MurmurHash3, twice), for one or for sixteen. */
#define HASH(number)                                                  \
    static inline number hash_##number(number place, uint32_t seed) { \
        number h = place * 0x9e3779b9u + seed;                        \
        for (int round = 0; round < 2; round++) {                     \
            h = (h ^ h >> 16) * 0x85ebca6bu;                          \
            h = (h ^ h >> 13) * 0xc2b2ae35u;                          \
            h = (h ^ h >> 16) + seed;                                 \
        }                                                             \
        return h;                                                     \
    }
HASH(uint32_t)
HASH(words)

/* Of n > 0 numbers, lane by lane: a loop that is a vector. */
static inline float largest(const float *x, long n) {
    float tops[WIDTH], top = x[0];
    long i = 0;
    for (long lane = 0; lane < WIDTH; lane++) tops[lane] = top;
    for (; i + WIDTH <= n; i += WIDTH)
        for (long lane = 0; lane < WIDTH; lane++) tops[lane] = x[i + lane] > tops[lane] ? x[i + lane] : tops[lane];
    for (long lane = 0; i < n; i++, lane++) tops[lane] = x[i] > tops[lane] ? x[i] : tops[lane];
    for (long lane = 0; lane < WIDTH; lane++) top = tops[lane] > top ? tops[lane] : top;
    return top;
}

/* The first n of `seen` scores become their softmax, the rest zero. Returns the logarithm of the sum. */
static inline float softmax(float *scores, long n, long seen) {
    float top = largest(scores, n), sum = 0;
    for (long s = 0; s < n; s++) {
        scores[s] = exponential(scores[s] - top);
        sum += scores[s];
    }
    for (long s = 0; s < n; s++) scores[s] *= 1 / sum;
    for (long s = n; s < seen; s++) scores[s] = 0;
    return logf(sum) + top;
}

/* Of a function whose every caller is to get the same bits: compiled once. */
#define ONE_BODY static __attribute__((noinline, unused))

/* LINE elements come into the cache, to be read or written soon: waiting for them took a fourth of what only passes over memory. */
#define FETCH(at, write)                                                                                                  \
    for (unsigned long b = 0; b < LINE * sizeof(*(at)); b += 64) __builtin_prefetch((const char *)(at) + b, write)

static inline float *allocate(long floats) { return calloc(floats, sizeof(float)); }

/* c[m][n] (+)= sum over k of a[m * a_row + k * a_column] * b[k * b_row + n], for `rows` x `vectors` of the result at once. */
static inline __attribute__((always_inline)) void tile(int rows, int vectors, long K, const float *a, long a_row, long a_column,
                                                       const float *b, long b_row, float *c, long c_row, int add) {
    vector sums[4][4];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < vectors; n++) sums[m][n] = add ? *(vector *)(c + m * c_row + n * WIDTH) : (vector){0};
    for (long k = 0; k < K; k++)
        for (int n = 0; n < vectors; n++) {
            vector right = *(const vector *)(b + k * b_row + n * WIDTH);
            for (int m = 0; m < rows; m++) sums[m][n] += a[m * a_row + k * a_column] * right;
        }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < vectors; n++) *(vector *)(c + m * c_row + n * WIDTH) = sums[m][n];
}

/* A small product; N is a multiple of WIDTH. */
static void multiply(long M, long N, long K, const float *a, long a_row, long a_column, const float *b, long b_row, float *c,
                     long c_row, int add) {
    for (long n = 0; n < N;) {
        int wide = N - n >= 4 * WIDTH;
        for (long m = 0; m < M;) {
            const float *left = a + m * a_row;
            float *to = c + m * c_row + n;
            if (M - m >= 4) {
                if (wide) tile(4, 4, K, left, a_row, a_column, b + n, b_row, to, c_row, add);
                else tile(4, 1, K, left, a_row, a_column, b + n, b_row, to, c_row, add);
                m += 4;
            } else if (M - m == 3 && wide) {
                tile(3, 4, K, left, a_row, a_column, b + n, b_row, to, c_row, add);
                m += 3;
            } else {
                if (wide) tile(1, 4, K, left, a_row, a_column, b + n, b_row, to, c_row, add);
                else tile(1, 1, K, left, a_row, a_column, b + n, b_row, to, c_row, add);
                m++;
            }
        }
        n += wide ? 4 * WIDTH : WIDTH;
    }
}

#define ROW_SUMS                                                                                                         \
    static inline float NAME(highest)(const element *row, long V) { /* of WIDTH places each: a loop that is a vector */  \
        float tops[WIDTH], top = LOAD(row[0]);                                                                           \
        for (long i = 0; i < WIDTH; i++) tops[i] = top;                                                                  \
        long v = 0;                                                                                                      \
        for (; v + WIDTH <= V; v += WIDTH)                                                                               \
            for (long i = 0; i < WIDTH; i++) tops[i] = LOAD(row[v + i]) > tops[i] ? LOAD(row[v + i]) : tops[i];          \
        for (; v < V; v++) top = LOAD(row[v]) > top ? LOAD(row[v]) : top;                                                \
        for (long i = 0; i < WIDTH; i++) top = tops[i] > top ? tops[i] : top;                                            \
        return top;                                                                                                      \
    }                                                                                                                    \
    static inline float NAME(mass)(const element *row, long V, float top) {                                              \
        float sum = 0;                                                                                                   \
        for (long v = 0; v < V; v++) sum += exponential(LOAD(row[v]) - top);                                             \
        return sum;                                                                                                      \
    }

/* The sum of squares, the same with any number of threads. */
void square_sum(long N, const float *x, double *sum) {
    long parts = (N + PART - 1) / PART;
    double *sums = malloc(parts * sizeof(double) + 1);
#pragma omp parallel for schedule(static)
    for (long part = 0; part < parts; part++) {
        long last = (part + 1) * PART < N ? (part + 1) * PART : N;
        float here = 0;
        for (long i = part * PART; i < last; i++) here += x[i] * x[i];
        sums[part] = here;
    }
    *sum = 0;
    for (long part = 0; part < parts; part++) *sum += sums[part];
    free(sums);
}

/* A step of AdamW in one pass; the gradient is scaled before it counts, and zero behind. rate: over the first moment's bias; by: of the root of the
   second moment, for its bias; shrink: what decay leaves of x. */
void adamw(long N, long step, float *x, float *grad, float *first, float *second, float scale, float beta1, float beta2, float rate, float by,
           float eps, float shrink) {
    (void)step;
#pragma omp parallel for simd schedule(static)
    for (long i = 0; i < N; i++) {
        float g = grad[i] * scale;
        first[i] += (1 - beta1) * (g - first[i]);
        second[i] += (1 - beta2) * (g * g - second[i]);
        x[i] = x[i] * shrink - rate * first[i] / (sqrtf(second[i]) * by + eps);
        grad[i] = 0;
    }
}

static inline int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float of_bits(int32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline int32_t within(int32_t code, int32_t most) { return code < 0 ? 0 : code > most ? most : code; }

/* Likewise with moments of 8 bits, in units of their block's largest (train/adamw.py). */
void adamw_8bit(long N, long step, float *x, float *grad, uint8_t *first, float *first_unit, uint8_t *root, float *root_unit, float scale,
                float beta1, float beta2, float rate, float by, float eps, float shrink) {
    const int32_t first_lowest = (127 << 3) - 127, root_lowest = (127 << 4) - 255;
#pragma omp parallel for schedule(static)
    for (long start = 0; start < N; start += STATES) {
        long count = N - start < STATES ? N - start : STATES, block = start / STATES;
        float *xs = x + start, *grads = grad + start, m[STATES], s[STATES], m_was = first_unit[block], s_was = root_unit[block];
        uint8_t *firsts = first + start, *roots = root + start;
        int32_t m_top = 0, s_top = 0;
        for (long i = 0; i < count; i++) {
            int32_t code = firsts[i], size = code & 127;
            float g = grads[i] * scale, was = of_bits(size ? ((size + first_lowest) << 20) | (code >> 7) << 31 : 0) * m_was;
            float r = of_bits((roots[i] + root_lowest) << 19) * s_was;
            m[i] = was + (1 - beta1) * (g - was);
            s[i] = sqrtf(r * r * beta2 + (1 - beta2) * (g * g));
            xs[i] = xs[i] * shrink - rate * m[i] / (s[i] * by + eps);
            grads[i] = 0;
            int32_t m_bits = bits_of(m[i]) & 0x7fffffff, s_bits = bits_of(s[i]);
            m_top = m_bits > m_top ? m_bits : m_top;
            s_top = s_bits > s_top ? s_bits : s_top;
        }
        first_unit[block] = of_bits(m_top);
        root_unit[block] = of_bits(s_top);
        float m_by = m_top ? 1 / of_bits(m_top) : 0, s_by = s_top ? 1 / of_bits(s_top) : 0;
        for (long i = 0; i < count; i++) {
            uint32_t random = hash_uint32_t((uint32_t)(start + i), (uint32_t)step);
            int32_t m_bits = bits_of(m[i] * m_by), s_bits = bits_of(s[i] * s_by);
            int32_t size = within((((m_bits & 0x7fffffff) + (int32_t)(random >> 12)) >> 20) - first_lowest, 127);
            firsts[i] = size | (m_bits < 0) << 7;
            roots[i] = within(((s_bits + (int32_t)(random & 0x7ffff)) >> 19) - root_lowest, 255);
        }
    }
}

#define element float
#define NAME(kernel) kernel##_float32
#define LOAD(x) (x)
#define STORE(x) (x)
ROW_SUMS
#include "kernels.h"
#undef element
#undef NAME
#undef LOAD
#undef STORE

#define element bf16
#define NAME(kernel) kernel##_bfloat16
#define LOAD from_bf16
#define STORE to_bf16
ROW_SUMS
#include "vectors.h"
#ifdef VECTORS
#define OWN_ROWS /* vectors.h has them */
#endif
#include "kernels.h"

#include "nf4.h"
#include "matrix.h"
#include "attention.h"
#include "adapted.h"
#include "layer.h"
#include "losses.h"
#include "quantised.h"
#include "decode.h"
#include "laid.h"
#include "step.h"
#include "prefill.h"
