/* Types, constants and small inline functions that all kernels use. */
#pragma once
#include "fortwo_kernels.h"
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define AVX512
#define TILED
#endif
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define AMX
#endif

#define SERIAL 16384 /* elements below which one thread is faster than several */
#define LINE 64      /* elements of a row that are computed while those of the next row are prefetched */
#define WIDTH 16
#define PAD(n) (((n) + WIDTH - 1) / WIDTH * WIDTH)

/* Numbers in fp32 of one of the processor's registers, and the registers of a row whose sums of four rows fit into all of them. Loops that keep many
   sums use these: gcc keeps a vector that is wider than a register in memory. */
#if defined(AVX512)
#define LANES 16
#define BESIDE 4
#elif defined(__AVX__)
#define LANES 8
#define BESIDE 2
#else
#define LANES 4
#define BESIDE 4
#endif

typedef float vector __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t lane_words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t integers __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH), aligned(4)));

static inline float from_bf16(bf16 x) {
    union { uint32_t bits; float value; } all = {(uint32_t)x << 16};
    return all.value;
}

static inline bf16 to_bf16(float x) { /* rounds to the nearest, ties to even */
    union { float value; uint32_t bits; } all = {x};
    return (all.bits + 0x7fff + (all.bits >> 16 & 1)) >> 16;
}

/* e^x to 2 units in the last place, without a branch, so that the compiler makes vectors of loops over it. */
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

/* A hash of an index, for one or for sixteen: the finaliser of MurmurHash3, applied twice. */
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

/* The largest of n > 0 numbers, lane by lane, so that the compiler makes a vector of the loop. */
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

/* The first n of `seen` scores become their softmax, the others zero. Returns the logarithm of the sum. */
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

/* Prefetches LINE elements that are soon read or written. Waiting for memory took a fourth of the time of kernels that only pass over it. */
#define FETCH(at, write)                                                                                                  \
    for (unsigned long b = 0; b < LINE * sizeof(*(at)); b += 64) __builtin_prefetch((const char *)(at) + b, write)
