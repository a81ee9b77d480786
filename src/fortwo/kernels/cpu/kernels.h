/* The kernels for one type of element: kernels.c includes this once for float and once for bf16.

   Tensors are contiguous, rows first; sums, scales and probabilities are float whatever the element. T tokens, D hidden, I intermediate, N heads of
   all kinds, H query heads, K key/value heads, E head size, V vocabulary. Each kernel is held to the plain formula by tests/test_operations.py. */

/* sum = x + y (y may be absent: then sum is x and not written); out = sum * scale * weight with scale = 1 / sqrt(mean(sum^2) + eps). */
#ifndef OWN_ROWS
ONE_BODY float NAME(add_norm_row)(long D, const float *x, const element *y, const float *weight, float eps, float *sum, element *out) {
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

void NAME(add_norm)(long T, long D, const float *x, const element *y, const float *weight, float eps, float *sum, element *out,
                    float *scale) {
#pragma omp parallel for schedule(static) if (T * D > SERIAL)
    for (long t = 0; t < T; t++)
        scale[t] = NAME(add_norm_row)(D, x + t * D, y ? y + t * D : 0, weight, eps, sum + t * D, out + t * D);
}

/* grad_x of add_norm; along is what reaches sum by other ways (may be absent). grad_y is the same as an element (may be absent). */
#ifndef OWN_ROWS
ONE_BODY void NAME(add_norm_backward_row)(long D, const float *sum, float by, const float *weight, const element *grad, const float *along,
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
ONE_BODY void NAME(swiglu_line)(long n, const element *restrict gate, const element *restrict up, element *restrict out) {
    for (long i = 0; i < n; i++) {
        float g = LOAD(gate[i]);
        out[i] = STORE(g / (1 + exponential(-g)) * LOAD(up[i]));
    }
}

ONE_BODY void NAME(swiglu_backward_line)(long n, const element *restrict gate, const element *restrict up, const element *restrict grad,
                                       element *restrict grad_gate, element *restrict grad_up) {
    for (long i = 0; i < n; i++) {
        float x = LOAD(gate[i]), s = 1 / (1 + exponential(-x)), above = LOAD(grad[i]);
        grad_gate[i] = STORE(above * LOAD(up[i]) * s * (1 + x * (1 - s)));
        grad_up[i] = STORE(above * x * s);
    }
}
#endif

/* out = silu(gate) * up; gate and up lie side by side in a row of 2 I. */
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

/* Each element is kept, divided by the share that is kept, where a hash of the seed and its place falls below `kept` (of 2^32); else zero. */
void NAME(dropout)(long size, long seed, long kept, const element *x, element *out) {
    float scale = 4294967296.0f / kept;
#pragma omp parallel for simd schedule(static) if (parallel : size > SERIAL)
    for (long i = 0; i < size; i++) out[i] = hash_uint32_t((uint32_t)i, (uint32_t)seed) <= (uint32_t)(kept - 1) ? STORE(LOAD(x[i]) * scale) : 0;
}

#ifndef OWN_ROWS
ONE_BODY void NAME(rotate_row)(long N, long turned, long E, const element *x, const float *cosine, const float *sine, float sign, element *out) {
    for (long n = 0; n < turned; n++) {
        const element *from = x + n * E;
        element *to = out + n * E;
        for (long e = 0; e < E / 2; e++) {
            float first = LOAD(from[e]), second = LOAD(from[E / 2 + e]);
            to[e] = STORE(first * cosine[e] - sign * second * sine[e]);
            to[E / 2 + e] = STORE(second * cosine[e] + sign * first * sine[e]);
        }
    }
    memcpy(out + turned * E, x + turned * E, (N - turned) * E * sizeof(element));
}
#endif

/* The first `turned` of N heads are rotated by cos and sin (T, E), each angle in both halves; the others are copied. sign -1 turns back. */
void NAME(rotate)(long T, long N, long turned, long E, const element *x, const float *cosine, const float *sine, float sign,
                  element *out) {
#pragma omp parallel for schedule(static) if (T * N * E > SERIAL)
    for (long t = 0; t < T; t++)
        NAME(rotate_row)(N, turned, E, x + t * N * E, cosine + t * E, sine + t * E, sign, out + t * N * E);
}

/* Attention over rows laid end to end behind a shared prefix of P tokens: [P | rest of row 0 | rest of row 1 | ...]; a token looks at the prefix and
   at its own row up to itself. qkv is (T, H + 2K, E). lse (T, H) is the logarithm of each softmax's sum, for backward. */
void NAME(attention)(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const element *qkv,
                     element *out, float *lse) {
    long N = H + 2 * K, G = H / K, tasks = (R + (P > 0)) * K, Ep = PAD(E);
    float scaling = 1 / sqrtf((float)E);
#pragma omp parallel for schedule(dynamic)
    for (long task = 0; task < tasks; task++) {
        long r = task / K, k = task % K, before = r < R ? P : 0, start = r < R ? starts[r] : 0, L = r < R ? lengths[r] : P;
        long S = before + L, Sp = PAD(S), M = BLOCK * G;
        float *room = allocate(2 * Ep * Sp + 2 * M * Ep + M * Sp);
        float *kT = room, *v = kT + Ep * Sp, *q = v + Sp * Ep, *mixed = q + M * Ep, *scores = mixed + M * Ep;
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
            multiply(m, PAD(seen), E, q, Ep, 1, kT, Sp, scores, Sp, 0);
            for (long row = 0; row < m; row++) {
                long n = before + i + row / G + 1;
                lse[(start + i + row / G) * H + k * G + row % G] = softmax(scores + row * Sp, n, seen);
            }
            multiply(m, Ep, seen, scores, Sp, 1, v, Ep, mixed, Ep, 0);
            for (long row = 0; row < m; row++) {
                element *to = out + ((start + i + row / G) * H + k * G + row % G) * E;
                for (long e = 0; e < E; e++) to[e] = STORE(mixed[row * Ep + e]);
            }
        }
        free(room);
    }
}

/* grad_qkv (T, H + 2K, E) of attention. Each row's share in the prefix's keys and values is kept apart and added in a fixed order. */
void NAME(attention_backward)(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const element *qkv,
                              const float *lse, const element *grad, element *grad_qkv) {
    long N = H + 2 * K, G = H / K, tasks = (R + (P > 0)) * K, Ep = PAD(E);
    float scaling = 1 / sqrtf((float)E), *shared = allocate(2 * (R + 1) * K * P * E + 1);
#pragma omp parallel for schedule(dynamic)
    for (long task = 0; task < tasks; task++) {
        long r = task / K, k = task % K, before = r < R ? P : 0, start = r < R ? starts[r] : 0, L = r < R ? lengths[r] : P;
        long S = before + L, Sp = PAD(S), M = BLOCK * G;
        float *room = allocate(5 * Ep * Sp + 3 * M * Ep + 2 * M * Sp);
        float *k_ = room, *kT = k_ + Sp * Ep, *vT = kT + Ep * Sp, *grad_k = vT + Ep * Sp, *grad_v = grad_k + Sp * Ep;
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
            multiply(m, PAD(seen), E, q, Ep, 1, kT, Sp, scores, Sp, 0);
            multiply(m, PAD(seen), E, g, Ep, 1, vT, Sp, slopes, Sp, 0);
            for (long row = 0; row < m; row++) {
                long n = before + i + row / G + 1;
                float *p = scores + row * Sp, *slope = slopes + row * Sp, delta = 0;
                float sum = lse[(start + i + row / G) * H + k * G + row % G];
                for (long s = 0; s < n; s++) p[s] = exponential(p[s] - sum);
                for (long s = 0; s < n; s++) delta += p[s] * slope[s];
                for (long s = 0; s < n; s++) slope[s] = p[s] * (slope[s] - delta);
                for (long s = n; s < seen; s++) p[s] = slope[s] = 0;
            }
            multiply(m, Ep, seen, slopes, Sp, 1, k_, Ep, grad_q, Ep, 0);
            multiply(seen, Ep, m, slopes, 1, Sp, q, Ep, grad_k, Ep, 1);
            multiply(seen, Ep, m, scores, 1, Sp, g, Ep, grad_v, Ep, 1);
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
        free(room);
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

/* Cross-entropy of each row of logits (N, V) against a token; the logits become the gradient of its sum. */
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

/* KL(p || q) of the softmaxes of each row of wanted (p) and logits (q), both (N, V); the logits become the gradient of its sum. */
void NAME(divergence)(long N, long V, element *logits, const element *wanted, float *loss) {
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
