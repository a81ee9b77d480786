/* The small operations between the products, each in one pass over memory. It is compiled for fp32 and for bf16. */
#include "element.h"
#include "elementwise.h"

#if defined(ELEMENT_BFLOAT16) && defined(AVX512)
#define OWN_ROWS /* elementwise_avx512.c has them */
#endif

#ifndef OWN_ROWS
__attribute__((noinline)) float NAME(add_norm_row)(long D, const float *x, const element *y, const float *weight, float eps, float *sum, element *out) {
    if (y) {
        for (long d = 0; d < D; d++) sum[d] = x[d] + LOAD(y[d]);
        x = sum;
    }
    float squares = 0;
    for (long d = 0; d < D; d++) squares += x[d] * x[d];
    float by = 1 / sqrtf(squares / D + eps);
    for (long d = 0; d < D; d++) out[d] = STORE(x[d] * by * weight[d]);
    return by;
}
#endif

void NAME(add_norm)(long T, long D, const float *x, const element *y, const float *weight, float eps, float *sum, element *out, float *scale) {
#pragma omp parallel for schedule(static) if (T * D > SERIAL)
    for (long t = 0; t < T; t++)
        scale[t] = NAME(add_norm_row)(D, x + t * D, y ? y + t * D : 0, weight, eps, sum + t * D, out + t * D);
}

#ifndef OWN_ROWS
__attribute__((noinline)) void NAME(add_norm_backward_row)(long D, const float *sum, float by, const float *weight, const element *grad, const float *along,
                                        float *grad_x, element *grad_y) {
    float dot = 0;
    for (long d = 0; d < D; d++) dot += LOAD(grad[d]) * weight[d] * sum[d];
    dot *= by * by / D;
    if (along)
        for (long d = 0; d < D; d++) grad_x[d] = along[d] + by * (LOAD(grad[d]) * weight[d] - dot * sum[d]);
    else
        for (long d = 0; d < D; d++) grad_x[d] = by * (LOAD(grad[d]) * weight[d] - dot * sum[d]);
    if (grad_y)
        for (long d = 0; d < D; d++) grad_y[d] = STORE(grad_x[d]);
}
#endif

void NAME(add_norm_backward)(long T, long D, const float *sum, const float *scale, const float *weight, const element *grad,
                             const float *along, float *grad_x, element *grad_y) {
#pragma omp parallel for schedule(static) if (T * D > SERIAL)
    for (long t = 0; t < T * D; t += D)
        NAME(add_norm_backward_row)(D, sum + t, scale[t / D], weight, grad + t, along ? along + t : 0, grad_x + t, grad_y ? grad_y + t : 0);
}

#ifndef OWN_ROWS
__attribute__((noinline)) void NAME(swiglu_line)(long n, const element *gate, const element *up, element *out) {
    for (long i = 0; i < n; i++) {
        float g = LOAD(gate[i]);
        out[i] = STORE(g / (1 + exponential(-g)) * LOAD(up[i]));
    }
}

__attribute__((noinline)) void NAME(swiglu_backward_line)(long n, const element *gate, const element *up, const element *grad,
                                       element *grad_gate, element *grad_up) {
    for (long i = 0; i < n; i++) {
        float x = LOAD(gate[i]), s = 1 / (1 + exponential(-x)), above = LOAD(grad[i]);
        grad_gate[i] = STORE(above * LOAD(up[i]) * s * (1 + x * (1 - s)));
        grad_up[i] = STORE(above * x * s);
    }
}
#endif

void NAME(swiglu)(long T, long I, const element *gate_up, element *out) {
#pragma omp parallel for schedule(static) if (T * I > SERIAL)
    for (long t = 0; t < T; t++) {
        const element *gate = gate_up + 2 * t * I, *up = gate + I;
        element *to = out + t * I;
        for (long line = 0; line < I; line += LINE) {
            long end = line + LINE < I ? line + LINE : I;
            FETCH(gate + 2 * I + line, 0);
            FETCH(up + 2 * I + line, 0);
            FETCH(to + I + line, 1);
            NAME(swiglu_line)(end - line, gate + line, up + line, to + line);
        }
    }
}

void NAME(swiglu_backward)(long T, long I, const element *gate_up, const element *grad, element *grad_gate_up) {
#pragma omp parallel for schedule(static) if (T * I > SERIAL)
    for (long t = 0; t < T; t++) {
        const element *gate = gate_up + 2 * t * I, *up = gate + I, *g = grad + t * I;
        element *to_gate = grad_gate_up + 2 * t * I, *to_up = to_gate + I;
        for (long line = 0; line < I; line += LINE) {
            long end = line + LINE < I ? line + LINE : I;
            FETCH(gate + 2 * I + line, 0);
            FETCH(up + 2 * I + line, 0);
            FETCH(g + I + line, 0);
            FETCH(to_gate + 2 * I + line, 1);
            FETCH(to_up + 2 * I + line, 1);
            NAME(swiglu_backward_line)(end - line, gate + line, up + line, g + line, to_gate + line, to_up + line);
        }
    }
}

void NAME(dropout)(long size, long seed, long kept, const element *x, element *out) {
    float scale = 4294967296.0f / kept;
#pragma omp parallel for simd schedule(static) if (parallel : size > SERIAL)
    for (long i = 0; i < size; i++) out[i] = hash_uint32_t((uint32_t)i, (uint32_t)seed) <= (uint32_t)(kept - 1) ? STORE(LOAD(x[i]) * scale) : 0;
}

#ifndef OWN_ROWS
__attribute__((noinline)) void NAME(rotate_row)(long N, long rotated, long E, const element *x, const float *cosine, const float *sine, float sign, element *out) {
    for (long n = 0; n < rotated; n++) {
        const element *from = x + n * E;
        element *to = out + n * E;
        for (long e = 0; e < E / 2; e++) {
            float first = LOAD(from[e]), second = LOAD(from[E / 2 + e]);
            to[e] = STORE(first * cosine[e] - sign * second * sine[e]);
            to[E / 2 + e] = STORE(second * cosine[e] + sign * first * sine[e]);
        }
    }
    memcpy(out + rotated * E, x + rotated * E, (N - rotated) * E * sizeof(element));
}
#endif

void NAME(rotate)(long T, long N, long rotated, long E, const element *x, const float *cosine, const float *sine, float sign, element *out) {
#pragma omp parallel for schedule(static) if (T * N * E > SERIAL)
    for (long t = 0; t < T; t++)
        NAME(rotate_row)(N, rotated, E, x + t * N * E, cosine + t * E, sine + t * E, sign, out + t * N * E);
}
