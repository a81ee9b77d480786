/* Quantization to NF4 and back, part by part. */
#include "nf4.h"

void nf4_quantize(long blocks, const float *weight, const float *between, uint8_t *codes, float *largest) {
#pragma omp parallel for schedule(static)
    for (long b = 0; b < blocks; b++) {
        const float *from = weight + b * NF4_BLOCK;
        uint8_t *to = codes + b * NF4_BLOCK / 2;
        float top = 0;
        int32_t level[NF4_BLOCK] = {0};
        for (int i = 0; i < NF4_BLOCK; i++) top = fabsf(from[i]) > top ? fabsf(from[i]) : top;
        float by = top > 0 ? top : 1; /* zeros have a level of their own */
        for (int n = 0; n < 15; n++)
            for (int i = 0; i < NF4_BLOCK; i++) level[i] += from[i] > between[n] * by;
        for (int i = 0; i < NF4_BLOCK / 2; i++) to[i] = (uint8_t)(level[2 * i] << 4 | level[2 * i + 1]);
        largest[b] = top;
    }
}

/* Decodes one block. */
static inline void nf4_float32(const uint8_t *codes, const float *value, float *to) {
#ifdef __AVX512BW__
    __m512 table = _mm512_loadu_ps(value);
    for (int i = 0; i < NF4_BLOCK / 2; i += 8) {
        __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(codes + i)));
        __m512i low = _mm512_slli_epi64(_mm512_and_si512(bytes, _mm512_set1_epi64(15)), 32);
        _mm512_storeu_ps(to + 2 * i, _mm512_permutexvar_ps(_mm512_or_si512(_mm512_srli_epi64(bytes, 4), low), table));
    }
#else
    for (int i = 0; i < NF4_BLOCK; i++) to[i] = value[codes[i / 2] >> (i % 2 ? 0 : 4) & 15];
#endif
}

static inline void nf4_bfloat16(const uint8_t *codes, const bf16 *value, bf16 *to) {
#ifdef __AVX512BW__
    __m512i table = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)value));
    for (int i = 0; i < NF4_BLOCK / 2; i += 16)
        _mm512_storeu_si512(to + 2 * i, nf4_look_up(_mm_loadu_si128((const __m128i *)(codes + i)), table));
#else
    for (int i = 0; i < NF4_BLOCK; i++) to[i] = value[codes[i / 2] >> (i % 2 ? 0 : 4) & 15];
#endif
}

/* Decodes blocks `first` to first + blocks - 1 to one type of element. */
#define NF4_DENSE(name, type, from_float)                                                                                        \
    void nf4_dense_##name(long first, long blocks, const uint8_t *codes, const uint8_t *largest, const float *map,               \
                          const float *scale, const float *offset, const float *levels, type *out) {                             \
        normal_floats w = {codes, largest, map, scale, offset, levels, 0};                                                       \
        _Pragma("omp parallel for schedule(static) if (blocks * NF4_BLOCK > SERIAL)")                                            \
        for (long b = first; b < first + blocks; b++) {                                                                          \
            float by = nf4_largest(&w, b);                                                                                       \
            type value[16];                                                                                                      \
            for (int n = 0; n < 16; n++) value[n] = from_float(levels[n] * by);                                                  \
            nf4_##name(codes + b * NF4_BLOCK / 2, value, out + (b - first) * NF4_BLOCK);                                         \
        }                                                                                                                        \
    }

NF4_DENSE(float32, float, )
NF4_DENSE(bfloat16, bf16, to_bf16)
