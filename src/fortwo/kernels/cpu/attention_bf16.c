/* Attention over packed rows as in attention.c, in bf16. A task is one key/value head of one row: its queries, of all heads that share
   it, form one matrix. Scores, sums and gradients are fp32; probabilities and their gradients are rounded to bf16 for the products. */
#include "attention_bf16.h"

#ifdef TILED
#define CHUNK 256 /* queries whose probabilities are kept together in backward */

/* Packs rows (count, E) for products that are summed over E. The outputs are the rows; those beyond `count` are zero. */
void pack_rows(long count, long E, const bf16 **rows, long head, bf16 *to) {
    for (long s = 0; s < steps_of(count) * STEP; s += 16)
        for (long e = 0; e < E; e += STEP) {
            __m512i r[16];
            for (long i = 0; i < 16; i++) r[i] = s + i < count ? _mm512_loadu_si512(rows[s + i] + head + e) : _mm512_setzero_si512();
            transpose(r);
            bf16 *tile = to + s / PANEL * PANEL * E + e * PANEL + s % PANEL / 16 * TILE;
            for (long i = 0; i < 16; i++) _mm512_store_si512(tile + i * STEP, r[i]);
        }
}

/* Packs the same rows for products that are summed over the rows. The outputs are E. */
void pack_columns(long count, long E, const bf16 **rows, long head, bf16 *to) {
    __m512i low = _mm512_loadu_si512(interleave[0]), high = _mm512_loadu_si512(interleave[1]), none = _mm512_setzero_si512();
    long all = steps_of(count);
    for (long s = 0; s < all * STEP; s += 2)
        for (long e = 0; e < E; e += PANEL) {
            bf16 *row = to + e * all * STEP + s / STEP * SQUARE + s % STEP / 2 * STEP;
            __m512i even = s < count ? _mm512_loadu_si512(rows[s] + head + e) : none;
            __m512i odd = s + 1 < count ? _mm512_loadu_si512(rows[s + 1] + head + e) : none;
            _mm512_store_si512(row, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(row + TILE, _mm512_permutex2var_epi16(even, high, odd));
        }
}

/* Writes e^(scaling (score - highest)) of the first n scores as bf16, and zeros up to `seen` (a multiple of 32). Returns their sum; lse becomes the
   logarithm of the softmax's sum. */
static float unscaled_softmax(const float *scores, long n, long seen, float scaling, bf16 *out, float *lse) {
    __m512 highest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps(), by = _mm512_set1_ps(scaling);
    for (long s = 0; s < n; s += 16) highest = _mm512_mask_max_ps(highest, mask16(n - s), highest, _mm512_loadu_ps(scores + s));
    float top = _mm512_reduce_max_ps(highest);
    highest = _mm512_set1_ps(top);
    for (long s = 0; s < seen; s += 32) {
        __m512 left = _mm512_sub_ps(_mm512_loadu_ps(scores + s), highest), right = _mm512_sub_ps(_mm512_loadu_ps(scores + s + 16), highest);
        left = _mm512_maskz_mov_ps(mask16(n - s), exponentials(_mm512_mul_ps(left, by)));
        right = _mm512_maskz_mov_ps(mask16(n - s - 16), exponentials(_mm512_mul_ps(right, by)));
        sum = _mm512_add_ps(sum, _mm512_add_ps(left, right));
        store_bf16(out + s, left, right);
    }
    float all = _mm512_reduce_add_ps(sum);
    *lse = logf(all) + top * scaling;
    return all;
}

/* From a query's first n scores and the gradients of its probabilities: the probabilities, and the gradients of the scores, as bf16, with zeros up to
   `seen`. */
static void softmax_backward(float *scores, const float *slopes, long n, long seen, float scaling, float lse, bf16 *p, bf16 *slope) {
    __m512 delta = _mm512_setzero_ps(), by = _mm512_set1_ps(scaling), sum = _mm512_set1_ps(lse);
    for (long s = 0; s < seen; s += 16) {
        __m512 own = exponentials(_mm512_fmsub_ps(_mm512_loadu_ps(scores + s), by, sum));
        own = _mm512_maskz_mov_ps(mask16(n - s), own);
        delta = _mm512_mask3_fmadd_ps(own, _mm512_loadu_ps(slopes + s), delta, mask16(n - s));
        _mm512_storeu_ps(scores + s, own);
    }
    delta = _mm512_set1_ps(_mm512_reduce_add_ps(delta));
    for (long s = 0; s < seen; s += 32) {
        __m512 left = _mm512_loadu_ps(scores + s), right = _mm512_loadu_ps(scores + s + 16);
        store_bf16(p + s, left, right);
        left = _mm512_maskz_mul_ps(mask16(n - s), _mm512_sub_ps(_mm512_loadu_ps(slopes + s), delta), left);
        right = _mm512_maskz_mul_ps(mask16(n - s - 16), _mm512_sub_ps(_mm512_loadu_ps(slopes + s + 16), delta), right);
        store_bf16(slope + s, left, right);
    }
}

/* Loops over queries of a task, beginning with number `from`: query g of token i. */
#define EACH_QUERY(row, from, count) \
    for (long row = 0, i = (from) / G, g = (from) % G; row < (count); row++, i += ++g == G, g = g < G ? g : 0)

static inline void copy_row(long E, const bf16 *from, bf16 *to) {
    for (long e = 0; e < E; e += 32) _mm512_storeu_si512(to + e, _mm512_loadu_si512(from + e));
}

static packed_task packed_task_of(long task, long P, long R, const long *starts, const long *lengths, long H, long K) {
    long r = task / K, before = r < R ? P : 0, start = r < R ? starts[r] : 0, L = r < R ? lengths[r] : P, S = before + L, M = L * (H / K);
    return (packed_task){r, task % K, before, start, L, S, steps_of(S) * STEP, M, steps_of(M) * STEP};
}

static inline long keys_seen(const packed_task *t, long m, long G) { /* by the queries up to m, rounded up to whole steps */
    long last = m < t->M ? m : t->M - 1;
    return steps_of(t->before + last / G + 1) * STEP;
}

/* A task's queries attend to its packed keys and values. Scratch: q (Mp, E), scores and mass (32, Sp), mixed (32, E). lse may be null. */
void attend_with_tiles(const packed_task *t, long H, long G, long N, long E, const bf16 *qkv, const bf16 *keys, const bf16 *values, bf16 *q,
                         float *scores, bf16 *mass, float *mixed, bf16 *out, float *lse) {
    float scaling = 1 / sqrtf((float)E), sums[32], unused;
    for (long i = 0; i < t->L; i++) memcpy(q + i * G * E, qkv + ((t->start + i) * N + t->k * G) * E, G * E * sizeof(bf16));
    memset(q + t->M * E, 0, (t->Mp - t->M) * E * sizeof(bf16));
    for (long m = 0; m < t->M; m += 32) {
        long seen = keys_seen(t, m + 31, G), tall = t->M - m < 32 ? t->M - m : 32;
        for (long s = 0; s < seen; s += PANEL) tile_gemm(32, 32, E / STEP, q + m * E, E, keys + s * E, scores + s, t->Sp, 0);
        EACH_QUERY(row, m, tall) {
            float *at = lse ? lse + (t->start + i) * H + t->k * G + g : &unused;
            sums[row] = unscaled_softmax(scores + row * t->Sp, t->before + i + 1, seen, scaling, mass + row * t->Sp, at);
        }
        memset(mass + tall * t->Sp, 0, (32 - tall) * t->Sp * sizeof(bf16));
        for (long e = 0; e < E; e += PANEL) tile_gemm(32, 32, seen / STEP, mass, t->Sp, values + e * t->Sp, mixed + e, E, 0);
        EACH_QUERY(row, m, tall) {
            bf16 *to = out + ((t->start + i) * H + t->k * G + g) * E;
            __m512 by = _mm512_set1_ps(1 / sums[row]);
            const float *from = mixed + row * E;
            for (long e = 0; e < E; e += 32)
                store_bf16(to + e, _mm512_mul_ps(_mm512_loadu_ps(from + e), by), _mm512_mul_ps(_mm512_loadu_ps(from + e + 16), by));
        }
    }
}

/* Attention whose work the calling threads share; their tiles are configured, and they do not wait for each other at its end. */
void attention_shared(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const bf16 *qkv, bf16 *out, float *lse) {
    static _Thread_local scratch_arena scratch;
    long N = H + 2 * K, G = H / K, tasks = (R + (P > 0)) * K;
#pragma omp for schedule(dynamic) nowait
    for (long task = 0; task < tasks; task++) {
        packed_task t = packed_task_of(task, P, R, starts, lengths, H, K);
        reserve(&scratch, t.Sp * (8 + 4 * E + 32 * 6) + 32 * E * 4 + t.Mp * E * 2 + 1024);
        const bf16 **rows = take(&scratch, t.S * sizeof(bf16 *));
        bf16 *keys = take(&scratch, t.Sp * E * 2), *values = take(&scratch, t.Sp * E * 2), *q = take(&scratch, t.Mp * E * 2);
        float *scores = take(&scratch, 32 * t.Sp * 4), *mixed = take(&scratch, 32 * E * 4);
        bf16 *mass = take(&scratch, 32 * t.Sp * 2);
        for (long s = 0; s < t.S; s++) rows[s] = qkv + (s < t.before ? s : t.start + s - t.before) * N * E;
        pack_rows(t.S, E, rows, (H + t.k) * E, keys);
        pack_columns(t.S, E, rows, (H + K + t.k) * E, values);
        attend_with_tiles(&t, H, G, N, E, qkv, keys, values, q, scores, mass, mixed, out, lse);
    }
}

void attention_tiled(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const bf16 *qkv, bf16 *out, float *lse) {
#pragma omp parallel
    {
        tiles_begin();
        attention_shared(P, R, starts, lengths, H, K, E, qkv, out, lse);
        tiles_end();
    }
}

/* The backward pass, shared in the same way. between: scratch of attention_between numbers, for the prefix's keys and values. */
void attention_backward_shared(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const bf16 *qkv,
                                      const float *lse, const bf16 *grad, float *between, bf16 *grad_qkv) {
    static _Thread_local scratch_arena scratch;
    long N = H + 2 * K, G = H / K, tasks = (R + (P > 0)) * K;
    float scaling = 1 / sqrtf((float)E);
#pragma omp for schedule(dynamic)
    for (long task = 0; task < tasks; task++) {
        packed_task t = packed_task_of(task, P, R, starts, lengths, H, K);
        reserve(&scratch, t.Sp * (8 + 14 * E + 32 * 12 + CHUNK * 4) + 8 * CHUNK * E + 32 * E * 4 + 2048);
        const bf16 **rows = take(&scratch, t.S * sizeof(bf16 *)), *q_rows[CHUNK], *g_rows[CHUNK];
        bf16 *keys = take(&scratch, t.Sp * E * 2), *values = take(&scratch, t.Sp * E * 2), *key_columns = take(&scratch, t.Sp * E * 2);
        float *grad_k = take(&scratch, t.Sp * E * 4), *grad_v = take(&scratch, t.Sp * E * 4), *grad_q = take(&scratch, 32 * E * 4);
        float *scores = take(&scratch, 32 * t.Sp * 4), *slopes = take(&scratch, 32 * t.Sp * 4);
        bf16 *q = take(&scratch, CHUNK * E * 2), *of_out = take(&scratch, CHUNK * E * 2), *q_columns = take(&scratch, CHUNK * E * 2);
        bf16 *g_columns = take(&scratch, CHUNK * E * 2), *slope = take(&scratch, 32 * t.Sp * 2), *mass = take(&scratch, 32 * t.Sp * 2);
        bf16 *turned_p = take(&scratch, t.Sp * CHUNK * 2), *turned_slopes = take(&scratch, t.Sp * CHUNK * 2);
        for (long s = 0; s < t.S; s++) rows[s] = qkv + (s < t.before ? s : t.start + s - t.before) * N * E;
        pack_rows(t.S, E, rows, (H + t.k) * E, keys);
        pack_rows(t.S, E, rows, (H + K + t.k) * E, values);
        pack_columns(t.S, E, rows, (H + t.k) * E, key_columns);
        memset(grad_k, 0, t.Sp * E * sizeof(float));
        memset(grad_v, 0, t.Sp * E * sizeof(float));
        for (long from = 0; from < t.M; from += CHUNK) {
            long count = t.M - from < CHUNK ? t.M - from : CHUNK, blocks = steps_of(count), seen[CHUNK / 32];
            for (long m = 0; m < blocks * 32; m++) q_rows[m] = q + m * E, g_rows[m] = of_out + m * E;
            EACH_QUERY(m, from, count) {
                copy_row(E, qkv + ((t.start + i) * N + t.k * G + g) * E, q + m * E);
                copy_row(E, grad + ((t.start + i) * H + t.k * G + g) * E, of_out + m * E);
            }
            memset(q + count * E, 0, (blocks * 32 - count) * E * sizeof(bf16));
            memset(of_out + count * E, 0, (blocks * 32 - count) * E * sizeof(bf16));
            pack_columns(blocks * 32, E, q_rows, 0, q_columns);
            pack_columns(blocks * 32, E, g_rows, 0, g_columns);
            for (long b = 0; b < blocks; b++) {
                long m = 32 * b, all = seen[b] = keys_seen(&t, from + m + 31, G), tall = count - m < 32 ? count - m : 32;
                for (long s = 0; s < all; s += PANEL) tile_gemm(32, 32, E / STEP, q + m * E, E, keys + s * E, scores + s, t.Sp, 0);
                for (long s = 0; s < all; s += PANEL) tile_gemm(32, 32, E / STEP, of_out + m * E, E, values + s * E, slopes + s, t.Sp, 0);
                EACH_QUERY(row, from + m, tall) {
                    long at = row * t.Sp;
                    float sum = lse[(t.start + i) * H + t.k * G + g];
                    softmax_backward(scores + at, slopes + at, t.before + i + 1, all, scaling, sum, mass + at, slope + at);
                }
                memset(mass + tall * t.Sp, 0, (32 - tall) * t.Sp * sizeof(bf16));
                memset(slope + tall * t.Sp, 0, (32 - tall) * t.Sp * sizeof(bf16));
                transpose_rows(mass, t.Sp, all, turned_p + m, CHUNK);
                transpose_rows(slope, t.Sp, all, turned_slopes + m, CHUNK);
                for (long e = 0; e < E; e += PANEL) tile_gemm(32, 32, all / STEP, slope, t.Sp, key_columns + e * t.Sp, grad_q + e, E, 0);
                EACH_QUERY(row, from + m, tall) {
                    bf16 *to = grad_qkv + ((t.start + i) * N + t.k * G + g) * E;
                    const float *at = grad_q + row * E;
                    __m512 by = _mm512_set1_ps(scaling);
                    for (long e = 0; e < E; e += 32)
                        store_bf16(to + e, _mm512_mul_ps(_mm512_loadu_ps(at + e), by), _mm512_mul_ps(_mm512_loadu_ps(at + e + 16), by));
                }
            }
            for (long s = 0, b = 0; s < seen[blocks - 1]; s += 32) {
                while (seen[b] <= s) b++; /* queries before this block attend to none of these keys */
                for (long e = 0; e < E; e += PANEL) {
                    long at = e * blocks * STEP + b * SQUARE;
                    tile_gemm(32, 32, blocks - b, turned_slopes + s * CHUNK + 32 * b, CHUNK, q_columns + at, grad_k + s * E + e, E, 1);
                    tile_gemm(32, 32, blocks - b, turned_p + s * CHUNK + 32 * b, CHUNK, g_columns + at, grad_v + s * E + e, E, 1);
                }
            }
        }
        for (long s = 0; s < t.S; s++) {
            float *at_k = grad_k + s * E, *at_v = grad_v + s * E;
            for (long e = 0; e < E; e++) at_k[e] *= scaling;
            if (s < P) {
                float *to = between + ((t.r * K + t.k) * P + s) * 2 * E;
                memcpy(to, at_k, E * sizeof(float));
                memcpy(to + E, at_v, E * sizeof(float));
            } else {
                bf16 *to = grad_qkv + ((t.start + s - t.before) * N + H + t.k) * E;
                for (long e = 0; e < E; e += 32) {
                    store_bf16(to + e, _mm512_loadu_ps(at_k + e), _mm512_loadu_ps(at_k + e + 16));
                    store_bf16(to + K * E + e, _mm512_loadu_ps(at_v + e), _mm512_loadu_ps(at_v + e + 16));
                }
            }
        }
    }
#pragma omp for schedule(static)
    for (long s = 0; s < P * K; s++) {
        bf16 *to = grad_qkv + (s / K * N + H + s % K) * E;
        for (long e = 0; e < 2 * E; e += 32) {
            __m512 left = _mm512_setzero_ps(), right = left;
            for (long r = 0; r <= R; r++) {
                const float *at = between + ((r * K + s % K) * P + s / K) * 2 * E + e;
                left = _mm512_add_ps(left, _mm512_loadu_ps(at));
                right = _mm512_add_ps(right, _mm512_loadu_ps(at + 16));
            }
            store_bf16(to + (e < E ? e : (K - 1) * E + e), left, right);
        }
    }
}

long attention_between(long P, long R, long K, long E) { return 2 * (R + 1) * K * P * E; }

void attention_backward_tiled(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const bf16 *qkv, const float *lse,
                              const bf16 *grad, bf16 *grad_qkv) {
    float *between = malloc((attention_between(P, R, K, E) + 1) * sizeof(float));
#pragma omp parallel
    {
        tiles_begin();
        attention_backward_shared(P, R, starts, lengths, H, K, E, qkv, lse, grad, between, grad_qkv);
        tiles_end();
    }
    free(between);
}
#endif
