/* 4-bit NormalFloat with double quantization, in bitsandbytes' layout. A block has 64 values, two codes in a byte, the first in the high half: w =
   levels[code] * largest of the block. The largest values are in 8 bits: largest = map[code] * scale + offset, with one scale for SHARED blocks. */
#pragma once
#include "common.h"
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

#define NF4_BLOCK 64
#define SHARED 256

/* The codes of a weight and their tables. from: the number at which a product begins. */
typedef struct {
    const uint8_t *codes, *largest;
    const float *map, *scale, *offset, *levels;
    long from;
} normal_floats;

static inline float nf4_largest(const normal_floats *w, long b) { return w->map[w->largest[b]] * w->scale[b / SHARED] + *w->offset; }

#ifdef __AVX512BW__
static inline __m512i nf4_look_up(__m128i codes, __m512i values) { /* looks up 32 of 16 values in bf16 */
    __m512i bytes = _mm512_cvtepu8_epi32(codes), low = _mm512_slli_epi32(_mm512_and_si512(bytes, _mm512_set1_epi32(15)), 16);
    return _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi32(bytes, 4), low), values);
}
#endif
