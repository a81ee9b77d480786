/* The optimizer's step, and the norm of its gradient. */
#include "common.h"

#define PART 16384 /* numbers that are summed in fp32 */
#define STATES 256 /* numbers in 8 bits that share a unit */

void sum_of_squares(long N, const float *x, double *sum) {
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
