/* The losses of losses.c for bf16, by vectors; each exponential is computed once. They are used where products are in bf16. */
#include "gemm_bf16.h"

#ifdef TILED
/* Writes e^(x - highest) of a row, and returns the sum. */
static float exponentials_of_row(const bf16 *row, long V, float *highest, float *mass) {
    __m512 left, right, top = _mm512_set1_ps(-INFINITY), sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (long v = 0; v < V; v += 32) {
        load_bf16(row + v, &left, &right);
        top = _mm512_max_ps(top, _mm512_max_ps(left, right));
    }
    *highest = _mm512_reduce_max_ps(top);
    top = _mm512_set1_ps(*highest);
    for (long v = 0; v < V; v += 32) {
        load_bf16(row + v, &left, &right);
        left = exponentials(_mm512_sub_ps(left, top));
        right = exponentials(_mm512_sub_ps(right, top));
        sums[0] = _mm512_add_ps(sums[0], left);
        sums[1] = _mm512_add_ps(sums[1], right);
        _mm512_store_ps(mass + v, left);
        _mm512_store_ps(mass + v + 16, right);
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

void cross_entropy_tiled(long N, long V, bf16 *logits, const long *tokens, float *loss) {
#pragma omp parallel
    {
        float *mass = aligned_alloc(64, V * sizeof(float));
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
            bf16 *row = logits + n * V;
            float top, sum = exponentials_of_row(row, V, &top, mass), chosen = from_bf16(row[tokens[n]]);
            loss[n] = logf(sum) + top - chosen;
            __m512 by = _mm512_set1_ps(1 / sum);
            for (long v = 0; v < V; v += 32)
                store_bf16(row + v, _mm512_mul_ps(_mm512_load_ps(mass + v), by), _mm512_mul_ps(_mm512_load_ps(mass + v + 16), by));
            row[tokens[n]] = to_bf16(mass[tokens[n]] / sum - 1);
        }
        free(mass);
    }
}

void kl_divergence_tiled(long N, long V, bf16 *logits, const bf16 *wanted, float *loss) {
#pragma omp parallel
    {
        float *mass = aligned_alloc(64, 2 * V * sizeof(float)), *other_mass = mass + V;
#pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
            bf16 *row = logits + n * V;
            const bf16 *other = wanted + n * V;
            float top, other_top, sum = exponentials_of_row(row, V, &top, mass), other_sum = exponentials_of_row(other, V, &other_top, other_mass);
            __m512 shift = _mm512_set1_ps(logf(sum) + top - logf(other_sum) - other_top), total = _mm512_setzero_ps();
            __m512 by = _mm512_set1_ps(1 / sum), other_by = _mm512_set1_ps(1 / other_sum);
            for (long v = 0; v < V; v += 32) {
                __m512 x[2], y[2], slope[2];
                load_bf16(row + v, x, x + 1);
                load_bf16(other + v, y, y + 1);
                for (int i = 0; i < 2; i++) {
                    __m512 p = _mm512_mul_ps(_mm512_load_ps(other_mass + v + 16 * i), other_by);
                    total = _mm512_fmadd_ps(p, _mm512_add_ps(_mm512_sub_ps(y[i], x[i]), shift), total);
                    slope[i] = _mm512_fmsub_ps(_mm512_load_ps(mass + v + 16 * i), by, p);
                }
                store_bf16(row + v, slope[0], slope[1]);
            }
            loss[n] = _mm512_reduce_add_ps(total);
        }
        free(mass);
    }
}
#endif
