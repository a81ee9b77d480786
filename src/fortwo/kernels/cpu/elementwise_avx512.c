/* The row functions of elementwise.c for bf16, by vectors of 32, for processors that round to bf16. The formulas are the same. */
#include "vectors.h"
#include "elementwise.h"

#ifdef AVX512

float add_norm_row_bfloat16(long D, const float *x, const bf16 *y, const float *weight, float eps, float *sum, bf16 *out) {
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

void add_norm_backward_row_bfloat16(long D, const float *sum, float by, const float *weight, const bf16 *grad, const float *along, float *grad_x,
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

void swiglu_line_bfloat16(long n, const bf16 *gate, const bf16 *up, bf16 *out) {
    __m512 x[2], y[2];
    for (long i = 0; i < n; i += 32) {
        load_some_bf16(n - i, gate + i, x, x + 1);
        load_some_bf16(n - i, up + i, y, y + 1);
        for (int half = 0; half < 2; half++) y[half] = _mm512_mul_ps(_mm512_mul_ps(x[half], sigmoids(x[half])), y[half]);
        store_some_bf16(n - i, out + i, y[0], y[1]);
    }
}

void swiglu_backward_line_bfloat16(long n, const bf16 *gate, const bf16 *up, const bf16 *grad, bf16 *grad_gate, bf16 *grad_up) {
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

void rotate_row_bfloat16(long N, long rotated, long E, const bf16 *x, const float *cosine, const float *sine, float sign, bf16 *out) {
    for (long n = 0; n < rotated; n++)
        for (long e = 0; e < E / 2; e += 16) {
            const bf16 *from = x + n * E + e;
            bf16 *to = out + n * E + e;
            __mmask16 own = mask16(E / 2 - e);
            __m512 c = _mm512_maskz_loadu_ps(own, cosine + e), s = _mm512_mul_ps(_mm512_maskz_loadu_ps(own, sine + e), _mm512_set1_ps(sign));
            __m512 left = widened(_mm256_maskz_loadu_epi16(own, from)), right = widened(_mm256_maskz_loadu_epi16(own, from + E / 2));
            __m512 turned_left = _mm512_fnmadd_ps(right, s, _mm512_mul_ps(left, c)), turned_right = _mm512_fmadd_ps(left, s, _mm512_mul_ps(right, c));
            _mm256_mask_storeu_epi16(to, own, half_as_bf16(turned_left));
            _mm256_mask_storeu_epi16(to + E / 2, own, half_as_bf16(turned_right));
        }
    memcpy(out + rotated * E, x + rotated * E, (N - rotated) * E * sizeof(bf16));
}

#endif
