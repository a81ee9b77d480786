/* Attention over packed rows, forward and backward, for every level. It is compiled for fp32 and for bf16; scores and sums are fp32. */
#include "element.h"

#define BLOCK 16 /* queries of one head whose scores are computed together */

static inline float *allocate(long floats) { return calloc(floats, sizeof(float)); }

/* c[m][n] (+)= sum over k of a[m * a_row + k * a_column] * b[k * b_row + n], for `rows` x (`beside` registers) results that stay in registers. */
static inline __attribute__((always_inline)) void small_gemm_tile(int rows, int beside, long K, const float *a, long a_row, long a_column,
                                                       const float *b, long b_row, float *c, long c_row, int add) {
    lanes sums[4][BESIDE];
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < beside; n++) sums[m][n] = add ? *(lanes *)(c + m * c_row + n * LANES) : (lanes){0};
    for (long k = 0; k < K; k++)
        for (int n = 0; n < beside; n++) {
            lanes right = *(const lanes *)(b + k * b_row + n * LANES);
            for (int m = 0; m < rows; m++) sums[m][n] += a[m * a_row + k * a_column] * right;
        }
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < beside; n++) *(lanes *)(c + m * c_row + n * LANES) = sums[m][n];
}

/* A small product in fp32. N is a multiple of WIDTH. */
static void small_gemm(long M, long N, long K, const float *a, long a_row, long a_column, const float *b, long b_row, float *c, long c_row, int add) {
    for (long n = 0; n < N;) {
        int wide = N - n >= BESIDE * LANES;
        for (long m = 0; m < M;) {
            const float *left = a + m * a_row;
            float *to = c + m * c_row + n;
            if (M - m >= 4) {
                if (wide) small_gemm_tile(4, BESIDE, K, left, a_row, a_column, b + n, b_row, to, c_row, add);
                else small_gemm_tile(4, 1, K, left, a_row, a_column, b + n, b_row, to, c_row, add);
                m += 4;
            } else if (M - m == 3 && wide) {
                small_gemm_tile(3, BESIDE, K, left, a_row, a_column, b + n, b_row, to, c_row, add);
                m += 3;
            } else {
                if (wide) small_gemm_tile(1, BESIDE, K, left, a_row, a_column, b + n, b_row, to, c_row, add);
                else small_gemm_tile(1, 1, K, left, a_row, a_column, b + n, b_row, to, c_row, add);
                m++;
            }
        }
        n += wide ? BESIDE * LANES : LANES;
    }
}

void NAME(attention)(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const element *qkv, element *out, float *lse) {
    long N = H + 2 * K, G = H / K, tasks = (R + (P > 0)) * K, Ep = PAD(E);
    float scaling = 1 / sqrtf((float)E);
#pragma omp parallel for schedule(dynamic)
    for (long task = 0; task < tasks; task++) {
        long r = task / K, k = task % K, before = r < R ? P : 0, start = r < R ? starts[r] : 0, L = r < R ? lengths[r] : P;
        long S = before + L, Sp = PAD(S), M = BLOCK * G;
        float *scratch = allocate(2 * Ep * Sp + 2 * M * Ep + M * Sp);
        float *kT = scratch, *v = kT + Ep * Sp, *q = v + Sp * Ep, *mixed = q + M * Ep, *scores = mixed + M * Ep;
        for (long s = 0; s < S; s++) {
            const element *at = qkv + (s < before ? s : start + s - before) * N * E;
            for (long e = 0; e < E; e++) kT[e * Sp + s] = LOAD(at[(H + k) * E + e]);
            for (long e = 0; e < E; e++) v[s * Ep + e] = LOAD(at[(H + K + k) * E + e]);
        }
        for (long i = 0; i < L; i += BLOCK) {
            long block = L - i < BLOCK ? L - i : BLOCK, seen = before + i + block, m = block * G;
            for (long row = 0; row < m; row++) {
                const element *at = qkv + ((start + i + row / G) * N + k * G + row % G) * E;
                for (long e = 0; e < E; e++) q[row * Ep + e] = LOAD(at[e]) * scaling;
            }
            small_gemm(m, PAD(seen), E, q, Ep, 1, kT, Sp, scores, Sp, 0);
            for (long row = 0; row < m; row++) {
                long n = before + i + row / G + 1;
                lse[(start + i + row / G) * H + k * G + row % G] = softmax(scores + row * Sp, n, seen);
            }
            small_gemm(m, Ep, seen, scores, Sp, 1, v, Ep, mixed, Ep, 0);
            for (long row = 0; row < m; row++) {
                element *to = out + ((start + i + row / G) * H + k * G + row % G) * E;
                for (long e = 0; e < E; e++) to[e] = STORE(mixed[row * Ep + e]);
            }
        }
        free(scratch);
    }
}

/* Each row's share of the gradient of the prefix's keys and values is kept apart, and the shares are added in a fixed order. */
void NAME(attention_backward)(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const element *qkv,
                              const float *lse, const element *grad, element *grad_qkv) {
    long N = H + 2 * K, G = H / K, tasks = (R + (P > 0)) * K, Ep = PAD(E);
    float scaling = 1 / sqrtf((float)E), *shared = allocate(2 * (R + 1) * K * P * E + 1);
#pragma omp parallel for schedule(dynamic)
    for (long task = 0; task < tasks; task++) {
        long r = task / K, k = task % K, before = r < R ? P : 0, start = r < R ? starts[r] : 0, L = r < R ? lengths[r] : P;
        long S = before + L, Sp = PAD(S), M = BLOCK * G;
        float *scratch = allocate(5 * Ep * Sp + 3 * M * Ep + 2 * M * Sp);
        float *k_ = scratch, *kT = k_ + Sp * Ep, *vT = kT + Ep * Sp, *grad_k = vT + Ep * Sp, *grad_v = grad_k + Sp * Ep;
        float *q = grad_v + Sp * Ep, *g = q + M * Ep, *grad_q = g + M * Ep, *scores = grad_q + M * Ep, *slopes = scores + M * Sp;
        for (long s = 0; s < S; s++) {
            const element *at = qkv + (s < before ? s : start + s - before) * N * E;
            for (long e = 0; e < E; e++) kT[e * Sp + s] = k_[s * Ep + e] = LOAD(at[(H + k) * E + e]);
            for (long e = 0; e < E; e++) vT[e * Sp + s] = LOAD(at[(H + K + k) * E + e]);
        }
        for (long i = 0; i < L; i += BLOCK) {
            long block = L - i < BLOCK ? L - i : BLOCK, seen = before + i + block, m = block * G;
            for (long row = 0; row < m; row++) {
                const element *at = qkv + ((start + i + row / G) * N + k * G + row % G) * E;
                const element *from = grad + ((start + i + row / G) * H + k * G + row % G) * E;
                for (long e = 0; e < E; e++) q[row * Ep + e] = LOAD(at[e]) * scaling;
                for (long e = 0; e < E; e++) g[row * Ep + e] = LOAD(from[e]);
            }
            small_gemm(m, PAD(seen), E, q, Ep, 1, kT, Sp, scores, Sp, 0);
            small_gemm(m, PAD(seen), E, g, Ep, 1, vT, Sp, slopes, Sp, 0);
            for (long row = 0; row < m; row++) {
                long n = before + i + row / G + 1;
                float *p = scores + row * Sp, *slope = slopes + row * Sp, delta = 0;
                float sum = lse[(start + i + row / G) * H + k * G + row % G];
                for (long s = 0; s < n; s++) p[s] = exponential(p[s] - sum);
                for (long s = 0; s < n; s++) delta += p[s] * slope[s];
                for (long s = 0; s < n; s++) slope[s] = p[s] * (slope[s] - delta);
                for (long s = n; s < seen; s++) p[s] = slope[s] = 0;
            }
            small_gemm(m, Ep, seen, slopes, Sp, 1, k_, Ep, grad_q, Ep, 0);
            small_gemm(seen, Ep, m, slopes, 1, Sp, q, Ep, grad_k, Ep, 1);
            small_gemm(seen, Ep, m, scores, 1, Sp, g, Ep, grad_v, Ep, 1);
            for (long row = 0; row < m; row++) {
                element *to = grad_qkv + ((start + i + row / G) * N + k * G + row % G) * E;
                for (long e = 0; e < E; e++) to[e] = STORE(grad_q[row * Ep + e] * scaling);
            }
        }
        for (long s = 0; s < S; s++) {
            if (s < P) {
                float *to = shared + ((r * K + k) * P + s) * 2 * E;
                memcpy(to, grad_k + s * Ep, E * sizeof(float));
                memcpy(to + E, grad_v + s * Ep, E * sizeof(float));
            } else {
                element *to = grad_qkv + ((start + s - before) * N + H + k) * E;
                for (long e = 0; e < E; e++) to[e] = STORE(grad_k[s * Ep + e]);
                for (long e = 0; e < E; e++) to[K * E + e] = STORE(grad_v[s * Ep + e]);
            }
        }
        free(scratch);
    }
#pragma omp parallel for schedule(static)
    for (long s = 0; s < P * K; s++) {
        element *to = grad_qkv + (s / K * N + H + s % K) * E;
        for (long e = 0; e < 2 * E; e++) {
            float sum = 0;
            for (long r = 0; r <= R; r++) sum += shared[((r * K + s % K) * P + s / K) * 2 * E + e];
            to[e < E ? e : (K - 1) * E + e] = STORE(sum);
        }
    }
    free(shared);
}
