/* Attention of a single token over cached keys and values, inlined into decode_attention, decode_step and prefill. */
#pragma once
#include "quantized_gemm.h"

/* The sums of as many registers as one has numbers, in their order. */
#define FOLD(a, b, places) (__builtin_shuffle(a, b, places[0]) + __builtin_shuffle(a, b, places[1]))
#if LANES == 16
static inline lanes sums_of(const lanes *v) {
    lanes halves[8], quarters[4], eighths[2];
    const integers half[2] = {{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}};
    const integers quarter[2] = {{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}, {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31}};
    const integers eighth[2] = {{0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}, {2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31}};
    const integers one[2] = {{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31}};
    for (int i = 0; i < 8; i++) halves[i] = FOLD(v[2 * i], v[2 * i + 1], half);
    for (int i = 0; i < 4; i++) quarters[i] = FOLD(halves[2 * i], halves[2 * i + 1], quarter);
    for (int i = 0; i < 2; i++) eighths[i] = FOLD(quarters[2 * i], quarters[2 * i + 1], eighth);
    return FOLD(eighths[0], eighths[1], one);
}
#elif LANES == 8
static inline lanes sums_of(const lanes *v) {
    typedef int32_t places __attribute__((vector_size(32)));
    lanes halves[4], quarters[2];
    const places half[2] = {{0, 1, 2, 3, 8, 9, 10, 11}, {4, 5, 6, 7, 12, 13, 14, 15}};
    const places quarter[2] = {{0, 1, 4, 5, 8, 9, 12, 13}, {2, 3, 6, 7, 10, 11, 14, 15}}, one[2] = {{0, 2, 4, 6, 8, 10, 12, 14}, {1, 3, 5, 7, 9, 11, 13, 15}};
    for (int i = 0; i < 4; i++) halves[i] = FOLD(v[2 * i], v[2 * i + 1], half);
    for (int i = 0; i < 2; i++) quarters[i] = FOLD(halves[2 * i], halves[2 * i + 1], quarter);
    return FOLD(quarters[0], quarters[1], one);
}
#else
static inline lanes sums_of(const lanes *v) {
    typedef int32_t places __attribute__((vector_size(16)));
    const places half[2] = {{0, 1, 4, 5}, {2, 3, 6, 7}}, one[2] = {{0, 2, 4, 6}, {1, 3, 5, 7}};
    lanes halves[2] = {FOLD(v[0], v[1], half), FOLD(v[2], v[3], half)};
    return FOLD(halves[0], halves[1], one);
}
#endif
#undef FOLD

#define TOGETHER 4 /* queries that read a key or a value together */

/* A register of numbers in fp16 or fp32. */
static inline __attribute__((always_inline)) lanes load_lanes(int half, const void *from, long at) {
    return half ? load_lanes_fp16((const uint16_t *)from + at) : *(const lanes *)((const float *)from + at);
}

static inline void store_vector(int half, void *to, long at, const float *from) {
    if (half) store_fp16((uint16_t *)to + at, *(const vector *)from);
    else *(vector *)((float *)to + at) = *(const vector *)from;
}

/* The scores of `count` queries at q with a register of keys from number s on; the last key is repeated where there are fewer. */
static inline __attribute__((always_inline)) void score_keys(int half, int count, long E, long s, long seen, const float *q, const void *keys,
                                                             long first, float scaling, float *scores, long row) {
    lanes sums[TOGETHER][LANES];
    for (int n = 0; n < LANES; n++) {
        long k = first + (s + n < seen ? s + n : seen - 1) * E;
        lanes own[TOGETHER] = {{0}};
        for (long e = 0; e < E; e += LANES) {
            lanes key = load_lanes(half, keys, k + e);
            for (int g = 0; g < count; g++) own[g] += *(const lanes *)(q + g * E + e) * key;
        }
        for (int g = 0; g < count; g++) sums[g][n] = own[g];
    }
    for (int g = 0; g < count; g++) *(lanes *)(scores + g * row + s) = sums_of(sums[g]) * scaling;
}

/* `beside` registers of out (count, E) from e on: the sum of the values, each multiplied by its probability. */
static inline __attribute__((always_inline)) void mix_values(int half, int count, int beside, long E, long e, long seen, const float *p, long row,
                                                             const void *values, long first, float *out) {
    lanes sums[TOGETHER][BESIDE] = {{{0}}};
    for (long s = 0; s < seen; s++)
        for (int n = 0; n < beside; n++) {
            lanes value = load_lanes(half, values, first + s * E + e + n * LANES);
            for (int g = 0; g < count; g++) sums[g][n] += p[g * row + s] * value;
        }
    for (int g = 0; g < count; g++)
        for (int n = 0; n < beside; n++) *(lanes *)(out + g * E + e + n * LANES) = sums[g][n];
}

static inline __attribute__((always_inline)) void attend_together(int half, int count, long E, long seen, const float *q, const void *keys,
                                                                  const void *values, long first, float *out, float *scores) {
    long row = PAD(seen), size = half ? sizeof(uint16_t) : sizeof(float), e = 0;
    float scaling = 1 / sqrtf((float)E);
    for (long s = 0; s < seen; s += LANES) {
        for (long b = 0; b < LANES * E * size; b += 64) __builtin_prefetch((const char *)values + (first + s * E) * size + b);
        score_keys(half, count, E, s, seen, q, keys, first, scaling, scores, row);
    }
    for (int g = 0; g < count; g++) softmax(scores + g * row, seen, seen);
    for (; e + BESIDE * LANES <= E; e += BESIDE * LANES) mix_values(half, count, BESIDE, E, e, seen, scores, row, values, first, out);
    for (; e < E; e += LANES) mix_values(half, count, 1, E, e, seen, scores, row, values, first, out);
}

/* G queries at q, of one token and one key/value head, attend to `seen` keys and values, which begin at number `first`. out (G, E); scores has room
   for G * PAD(seen). half: keys and values are fp16, else fp32. */
static inline __attribute__((always_inline)) void attend_cached(int half, long G, long E, const cache_place *at, long first, long seen, const float *q, float *out,
                                                       float *scores) {
    long row = PAD(seen);
    for (long g = 0; g < G; g += TOGETHER) {
#define ATTEND(count) attend_together(half, count, E, seen, q + g * E, at->k, at->v, first, out + g * E, scores + g * row)
        switch (G - g) {
        case 1: ATTEND(1); break;
        case 2: ATTEND(2); break;
        case 3: ATTEND(3); break;
        default: ATTEND(4);
        }
#undef ATTEND
    }
}

/* Does the same after it has appended the last key and value. */
static inline __attribute__((always_inline)) void append_and_attend(int half, long G, long E, const cache_place *at, long layer, long head, long seen, const float *q,
                                                         const float *key, const float *value, float *out, float *scores) {
    long first = layer * at->layer_step + head * at->head_step;
    for (long e = 0; e < E; e += WIDTH) {
        store_vector(half, at->k, first + (seen - 1) * E + e, key + e);
        store_vector(half, at->v, first + (seen - 1) * E + e, value + e);
    }
    attend_cached(half, G, E, at, first, seen, q, out, scores);
}

void rotary_angles(const decoder_shape *s, long position, float *cosine, float *sine);
void norm_and_rotate_head(long E, const float *norm, float eps, const float *cosine, const float *sine, float *x); /* both in decode_step.c */
