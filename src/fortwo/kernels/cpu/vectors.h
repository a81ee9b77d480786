/* Rows of bf16 by vectors of 32, for AVX-512. */
#pragma once
#include "common.h"

#ifdef AVX512
#include <immintrin.h>

/* `exponential` of sixteen numbers. */
static inline __m512 exponentials(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x); /* not-a-number stays not-a-number */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x), p = _mm512_set1_ps(1.9875691500e-4f);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

static inline __mmask16 mask16(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1; }
/* Sixteen numbers as bf16, and 32. */
#ifdef __AVX512BF16__
static inline __m256i half_as_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
static inline __m512i as_bf16(__m512 left, __m512 right) { return (__m512i)_mm512_cvtne2ps_pbh(right, left); }
#else
static inline __m256i half_as_bf16(__m512 x) {
    __m512i bits = _mm512_castps_si512(x), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, last), _mm512_set1_epi32(0x7fff)), 16));
}
static inline __m512i as_bf16(__m512 left, __m512 right) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(half_as_bf16(left)), half_as_bf16(right), 1);
}
#endif
static inline __m512 widened(__m256i all) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(all), 16)); }

static inline void as_floats(__m512i all, __m512 *left, __m512 *right) {
    *left = widened(_mm512_castsi512_si256(all));
    *right = widened(_mm512_extracti64x4_epi64(all, 1));
}

static inline void load_bf16(const bf16 *from, __m512 *left, __m512 *right) { as_floats(_mm512_loadu_si512(from), left, right); }
static inline void store_bf16(bf16 *to, __m512 left, __m512 right) { _mm512_storeu_si512(to, as_bf16(left, right)); }
static inline __mmask32 mask32(long n) { return n >= 32 ? ~0u : (1u << n) - 1; } /* the first n > 0 of 32 numbers */

/* Loads and stores 32 numbers of a row of which n are left. */
static inline void load_some(long n, const float *from, __m512 *left, __m512 *right) {
    *left = _mm512_maskz_loadu_ps(mask16(n), from);
    *right = _mm512_maskz_loadu_ps(mask16(n - 16), from + 16);
}

static inline void store_some(long n, float *to, __m512 left, __m512 right) {
    _mm512_mask_storeu_ps(to, mask16(n), left);
    _mm512_mask_storeu_ps(to + 16, mask16(n - 16), right);
}

static inline void load_some_bf16(long n, const bf16 *from, __m512 *left, __m512 *right) {
    as_floats(_mm512_maskz_loadu_epi16(mask32(n), from), left, right);
}

static inline void store_some_bf16(long n, bf16 *to, __m512 left, __m512 right) { _mm512_mask_storeu_epi16(to, mask32(n), as_bf16(left, right)); }

/* drop(x) of numbers first to last - 1, with the same hash as `dropout`, and the mask of those that are kept. */
static inline void draw_dropout(long first, long last, long seed, long kept, const bf16 *x, bf16 *out, uint32_t *mask) {
    words sixteen = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    __m512i most = _mm512_set1_epi32((int)(kept - 1));
    __m512 scale = _mm512_set1_ps(4294967296.0f / kept), left, right;
    for (long i = first; i < last; i += 32) {
        __mmask32 keeps = 0;
        for (int half = 0; half < 2; half++) {
            words h = hash_words(sixteen + (uint32_t)(i + 16 * half), (uint32_t)seed);
            keeps |= (__mmask32)_mm512_cmple_epu32_mask((__m512i)h, most) << 16 * half;
        }
        mask[i / 32] = keeps;
        as_floats(_mm512_maskz_loadu_epi16(keeps, x + i), &left, &right);
        store_bf16(out + i - first, _mm512_mul_ps(left, scale), _mm512_mul_ps(right, scale));
    }
}

/* drop(x) of 32 numbers by their mask; without dropout mask is null. */
static inline __m512i apply_dropout(const uint32_t *mask, __m512 scale, const bf16 *x) {
    __m512 left, right;
    if (!mask) return _mm512_loadu_si512(x);
    as_floats(_mm512_maskz_loadu_epi16(*mask, x), &left, &right);
    return as_bf16(_mm512_mul_ps(left, scale), _mm512_mul_ps(right, scale));
}
#endif
