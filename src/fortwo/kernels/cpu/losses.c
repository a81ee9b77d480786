/* The losses of the head. They are compiled for fp32 and for bf16. */
#include "element.h"

static inline float NAME(highest)(const element *row, long V) { /* lane by lane, so that the compiler makes a vector of the loop */
    float tops[WIDTH], top = LOAD(row[0]);
    for (long i = 0; i < WIDTH; i++) tops[i] = top;
    long v = 0;
    for (; v + WIDTH <= V; v += WIDTH)
        for (long i = 0; i < WIDTH; i++) tops[i] = LOAD(row[v + i]) > tops[i] ? LOAD(row[v + i]) : tops[i];
    for (; v < V; v++) top = LOAD(row[v]) > top ? LOAD(row[v]) : top;
    for (long i = 0; i < WIDTH; i++) top = tops[i] > top ? tops[i] : top;
    return top;
}

static inline float NAME(mass)(const element *row, long V, float top) {
    float sum = 0;
    for (long v = 0; v < V; v++) sum += exponential(LOAD(row[v]) - top);
    return sum;
}

void NAME(cross_entropy)(long N, long V, element *logits, const long *tokens, float *loss) {
#pragma omp parallel for schedule(static)
    for (long n = 0; n < N; n++) {
        element *row = logits + n * V;
        float top = NAME(highest)(row, V), sum = NAME(mass)(row, V, top), chosen = LOAD(row[tokens[n]]);
        loss[n] = logf(sum) + top - chosen;
        for (long v = 0; v < V; v++) row[v] = STORE(exponential(LOAD(row[v]) - top) / sum);
        row[tokens[n]] = STORE(exponential(chosen - top) / sum - 1);
    }
}

void NAME(kl_divergence)(long N, long V, element *logits, const element *wanted, float *loss) {
#pragma omp parallel for schedule(static)
    for (long n = 0; n < N; n++) {
        element *row = logits + n * V;
        const element *other = wanted + n * V;
        float top = NAME(highest)(row, V), sum = NAME(mass)(row, V, top);
        float other_top = NAME(highest)(other, V), other_sum = NAME(mass)(other, V, other_top);
        float shift = logf(sum) + top - logf(other_sum) - other_top, total = 0;
        for (long v = 0; v < V; v++) {
            float x = LOAD(row[v]), y = LOAD(other[v]), p = exponential(y - other_top) / other_sum;
            total += p * (y - x + shift);
            row[v] = STORE(exponential(x - top) / sum - p);
        }
        loss[n] = total;
    }
}
