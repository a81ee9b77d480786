/* Rows of bf16 by vectors of 32, for processors that round to it; kernels.c includes this once, before kernels.h, whose formulas these are. */

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define VECTORS
#include <immintrin.h>

/* `exponential` of 16. */
static inline __m512 exponentials(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x); /* what is no number stays none */
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

static inline __mmask16 first(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1; }

static inline __m512i as_bf16(__m512 left, __m512 right) { return (__m512i)_mm512_cvtne2ps_pbh(right, left); } /* 32 numbers as bf16 */

static inline __m512 widened(__m256i all) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(all), 16)); }

static inline void as_floats(__m512i all, __m512 *left, __m512 *right) {
    *left = widened(_mm512_castsi512_si256(all));
    *right = widened(_mm512_extracti64x4_epi64(all, 1));
}

static inline void load_bf16(const bf16 *from, __m512 *left, __m512 *right) { as_floats(_mm512_loadu_si512(from), left, right); }

static inline void store_bf16(bf16 *to, __m512 left, __m512 right) { _mm512_storeu_si512(to, as_bf16(left, right)); }

static inline __mmask32 whole(long n) { return n >= 32 ? ~0u : (1u << n) - 1; } /* of 32 numbers, the first n > 0 */

/* 32 numbers of a row of which n are left. */
static inline void load_some(long n, const float *from, __m512 *left, __m512 *right) {
    *left = _mm512_maskz_loadu_ps(first(n), from);
    *right = _mm512_maskz_loadu_ps(first(n - 16), from + 16);
}

static inline void store_some(long n, float *to, __m512 left, __m512 right) {
    _mm512_mask_storeu_ps(to, first(n), left);
    _mm512_mask_storeu_ps(to + 16, first(n - 16), right);
}

static inline void load_some_bf16(long n, const bf16 *from, __m512 *left, __m512 *right) {
    as_floats(_mm512_maskz_loadu_epi16(whole(n), from), left, right);
}

static inline void store_some_bf16(long n, bf16 *to, __m512 left, __m512 right) { _mm512_mask_storeu_epi16(to, whole(n), as_bf16(left, right)); }

ONE_BODY float add_norm_row_bfloat16(long D, const float *x, const bf16 *y, const float *weight, float eps, float *sum, bf16 *out) {
    __m512 left, right, more, again, squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (long d = 0; d < D; d += 32) {
        load_some(D - d, x + d, &left, &right);
        if (y) {
            load_some_bf16(D - d, y + d, &more, &again);
            left = _mm512_add_ps(left, more), right = _mm512_add_ps(right, again);
            store_some(D - d, sum + d, left, right);
        }
        squares[0] = _mm512_fmadd_ps(left, left, squares[0]);
        squares[1] = _mm512_fmadd_ps(right, right, squares[1]);
    }
    if (y) x = sum;
    float by = 1 / sqrtf(_mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])) / D + eps);
    __m512 scale = _mm512_set1_ps(by);
    for (long d = 0; d < D; d += 32) {
        load_some(D - d, x + d, &left, &right);
        load_some(D - d, weight + d, &more, &again);
        store_some_bf16(D - d, out + d, _mm512_mul_ps(_mm512_mul_ps(left, scale), more), _mm512_mul_ps(_mm512_mul_ps(right, scale), again));
    }
    return by;
}

ONE_BODY void add_norm_backward_row_bfloat16(long D, const float *sum, float by, const float *weight, const bf16 *grad, const float *along, float *grad_x,
                                             bf16 *grad_y) {
    __m512 g[2], w[2], x[2], a[2], dots[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (long d = 0; d < D; d += 32) {
        load_some_bf16(D - d, grad + d, g, g + 1);
        load_some(D - d, weight + d, w, w + 1);
        load_some(D - d, sum + d, x, x + 1);
        for (int i = 0; i < 2; i++) dots[i] = _mm512_fmadd_ps(_mm512_mul_ps(g[i], w[i]), x[i], dots[i]);
    }
    float dot = _mm512_reduce_add_ps(_mm512_add_ps(dots[0], dots[1])) * by * by / D;
    __m512 scale = _mm512_set1_ps(by), back = _mm512_set1_ps(dot * by);
    for (long d = 0; d < D; d += 32) {
        load_some_bf16(D - d, grad + d, g, g + 1);
        load_some(D - d, weight + d, w, w + 1);
        load_some(D - d, sum + d, x, x + 1);
        for (int i = 0; i < 2; i++) g[i] = _mm512_fnmadd_ps(back, x[i], _mm512_mul_ps(_mm512_mul_ps(g[i], w[i]), scale));
        if (along) {
            load_some(D - d, along + d, a, a + 1);
            for (int i = 0; i < 2; i++) g[i] = _mm512_add_ps(g[i], a[i]);
        }
        store_some(D - d, grad_x + d, g[0], g[1]);
        if (grad_y) store_some_bf16(D - d, grad_y + d, g[0], g[1]);
    }
}

static inline __m512 sigmoids(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
    __m512 below = _mm512_add_ps(_mm512_set1_ps(1), exponentials(_mm512_sub_ps(_mm512_setzero_ps(), x))), s = _mm512_rcp14_ps(below);
    return _mm512_mul_ps(s, _mm512_fnmadd_ps(below, s, _mm512_set1_ps(2)));
}

ONE_BODY void swiglu_line_bfloat16(long n, const bf16 *gate, const bf16 *up, bf16 *out) {
    __m512 x[2], y[2];
    for (long i = 0; i < n; i += 32) {
        load_some_bf16(n - i, gate + i, x, x + 1);
        load_some_bf16(n - i, up + i, y, y + 1);
        for (int half = 0; half < 2; half++) y[half] = _mm512_mul_ps(_mm512_mul_ps(x[half], sigmoids(x[half])), y[half]);
        store_some_bf16(n - i, out + i, y[0], y[1]);
    }
}

ONE_BODY void swiglu_backward_line_bfloat16(long n, const bf16 *gate, const bf16 *up, const bf16 *grad, bf16 *grad_gate, bf16 *grad_up) {
    __m512 x[2], y[2], g[2], one = _mm512_set1_ps(1);
    for (long i = 0; i < n; i += 32) {
        load_some_bf16(n - i, gate + i, x, x + 1);
        load_some_bf16(n - i, up + i, y, y + 1);
        load_some_bf16(n - i, grad + i, g, g + 1);
        for (int half = 0; half < 2; half++) {
            __m512 s = sigmoids(x[half]), by = _mm512_mul_ps(g[half], s), rest = _mm512_sub_ps(one, s);
            g[half] = _mm512_mul_ps(_mm512_mul_ps(by, y[half]), _mm512_fmadd_ps(x[half], rest, one));
            y[half] = _mm512_mul_ps(by, x[half]);
        }
        store_some_bf16(n - i, grad_gate + i, g[0], g[1]);
        store_some_bf16(n - i, grad_up + i, y[0], y[1]);
    }
}

ONE_BODY void rotate_row_bfloat16(long N, long turned, long E, const bf16 *x, const float *cosine, const float *sine, float sign, bf16 *out) {
    for (long n = 0; n < turned; n++)
        for (long e = 0; e < E / 2; e += 16) {
            const bf16 *from = x + n * E + e;
            bf16 *to = out + n * E + e;
            __mmask16 own = first(E / 2 - e);
            __m512 c = _mm512_maskz_loadu_ps(own, cosine + e), s = _mm512_mul_ps(_mm512_maskz_loadu_ps(own, sine + e), _mm512_set1_ps(sign));
            __m512 left = widened(_mm256_maskz_loadu_epi16(own, from)), right = widened(_mm256_maskz_loadu_epi16(own, from + E / 2));
            __m512 turned_left = _mm512_fnmadd_ps(right, s, _mm512_mul_ps(left, c)), turned_right = _mm512_fmadd_ps(left, s, _mm512_mul_ps(right, c));
            _mm256_mask_storeu_epi16(to, own, (__m256i)_mm512_cvtneps_pbh(turned_left));
            _mm256_mask_storeu_epi16(to + E / 2, own, (__m256i)_mm512_cvtneps_pbh(turned_right));
        }
    memcpy(out + turned * E, x + turned * E, (N - turned) * E * sizeof(bf16));
}

/* drop(x) of numbers first to last - 1, and which of them it keeps; as kernels.h has it. */
static inline void draw(long first, long last, long seed, long kept, const bf16 *x, bf16 *out, uint32_t *mask) {
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

/* drop(x) of 32 numbers, by what was drawn; there may have been no dropout. */
static inline __m512i dropped(const uint32_t *mask, __m512 scale, const bf16 *x) {
    __m512 left, right;
    if (!mask) return _mm512_loadu_si512(x);
    as_floats(_mm512_maskz_loadu_epi16(*mask, x), &left, &right);
    return as_bf16(_mm512_mul_ps(left, scale), _mm512_mul_ps(right, scale));
}
#endif
