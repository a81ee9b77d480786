/* A step of several sequences: one new token of each goes through all layers, with its adapter, in one call. */
#include "adapters_int8.h"
#include "decode_attention.h"
#include "elementwise.h"

/* cos and sin (E) of a position, each angle in both halves. */
void rotary_angles(const decoder_shape *s, long position, float *cosine, float *sine) {
    for (long e = 0; e < s->E; e++) {
        float angle = position * s->inverse_frequency[e % (s->E / 2)];
        cosine[e] = cosf(angle);
        sine[e] = sinf(angle);
    }
}

/* Normalises a head of q or k, where the family does so, and rotates it. */
void norm_and_rotate_head(long E, const float *norm, float eps, const float *cosine, const float *sine, float *x) {
    if (norm) add_norm_row_float32(E, x, 0, norm, eps, 0, x);
    for (long e = 0; e < E / 2; e++) {
        float first = x[e], second = x[E / 2 + e];
        x[e] = first * cosine[e] - second * sine[e];
        x[E / 2 + e] = second * cosine[E / 2 + e] + first * sine[E / 2 + e];
    }
}

/* y = x W' + what the adapters add to it; the calling threads share the work. x and narrow are the rounded rows for the weights and for the adapters,
   h is scratch of all threads, mine is this thread's. */
static void adapted_gemm(const quantized_weight *w, const quantized_rows *x, const int16_rows *narrow, long N, const adapter *adapters, const long *members, long index,
                          float *h, long h_row, const int16_rows *mine, float *y, uint8_t *scratch) {
    if (N) {
        shrink(N, adapters, members, index, w->I, narrow, h, h_row);
        quantize_ranks(N, adapters, members, index, h, h_row, mine);
    }
#pragma omp for schedule(dynamic, SHARE(w->O))
    for (long o = 0; o < w->O; o += WIDTH) {
        quantized_gemm_tile(w, x, o, y, w->O, scratch);
        if (N) expand(N, adapters, members, index, o, mine, h_row, y, w->O);
    }
}

/* Rounds row t of x for the weights and, where there are some, for the adapters. */
static void quantize_inputs(const quantized_rows *whole, long t, const float *x, const int16_rows *narrow) {
    quantize_row(whole, t, x + t * whole->I);
    if (narrow) quantize_int16(narrow, t, whole->I, whole->I, x + t * whole->I);
}

void decode_step(long B, const decoder_shape *s, const decoder_layer *layers, const new_token *rows, long N, const adapter *adapters, const long *members, float *out) {
    long D = s->D, H = s->H, K = s->K, E = s->E, I = s->I, L = s->layers, heads = H + 2 * K, G = H / K, longest = 0;
    float eps = s->eps;
    for (long b = 0; b < B; b++) longest = rows[b].position + 1 > longest ? rows[b].position + 1 : longest;
    longest = PAD(longest);
    long ranks = most_ranks(N, adapters, 0, L * PRODUCTS), widest = D > I ? D : I;
    widest = widest > H * E ? widest : H * E;
    long most = heads * E > 2 * I ? heads * E : 2 * I;
    most = most > D ? most : D;
    long threads = omp_get_max_threads(), floats = PAD(B * (most + widest + ranks + K * G * longest + D + 2 * E));
    char *memory = aligned_alloc(64, floats * sizeof(float) + BYTES_OF_ROWS(B, widest) + threads * BYTES_OF_ROWS(B, ranks));
    char *scratch_of_rows = memory + floats * sizeof(float);
    float *x = (float *)memory, *cosine = x + B * D, *sine = cosine + B * E, *y = sine + B * E, *in = y + B * most, *scores = in + B * widest;
    float *h = scores + B * K * G * longest;
    int16_rows rows_in = int16_rows_at(&scratch_of_rows, B, widest), own_ranks[threads], *narrow = N ? &rows_in : 0;
    for (long i = 0; i < threads; i++) own_ranks[i] = int16_rows_at(&scratch_of_rows, B, ranks);
    quantized_rows by_D = quantized_rows_of(B, D), by_HE = quantized_rows_of(B, H * E), by_I = quantized_rows_of(B, I);
#pragma omp parallel
    {
        uint8_t *scratch = quantized_gemm_begin(&by_D, widest);
        const int16_rows *mine = own_ranks + omp_get_thread_num();
        for (long l = 0; l < L; l++) {
            const decoder_layer *own = layers + l;
#pragma omp for schedule(static)
            for (long b = 0; b < B; b++) {
                if (!l) {
                    memcpy(x + b * D, s->embedding + rows[b].token * D, D * sizeof(float));
                    rotary_angles(s, rows[b].position, cosine + b * E, sine + b * E);
                }
                add_norm_row_float32(D, x + b * D, l ? y + b * D : 0, own->attention_norm, eps, x + b * D, in + b * D);
                quantize_inputs(&by_D, b, in, narrow);
            }
            adapted_gemm(own->w + QKV_PROJ, &by_D, narrow, N, adapters, members, l * PRODUCTS + QKV_PROJ, h, ranks, mine, y, scratch);
#pragma omp for schedule(dynamic)
            for (long task = 0; task < B * K; task++) {
                long b = task / K, head = task % K;
                float *q = y + b * heads * E, *key = q + (H + head) * E, *value = key + K * E;
                const float *c = cosine + b * E, *n = sine + b * E;
                q += head * G * E;
                if (own->bias) {
                    for (long e = 0; e < G * E; e++) q[e] += own->bias[head * G * E + e];
                    for (long e = 0; e < E; e++) key[e] += own->bias[(H + head) * E + e], value[e] += own->bias[(H + K + head) * E + e];
                }
                for (long g = 0; g < G; g++) norm_and_rotate_head(E, own->q_norm, eps, c, n, q + g * E);
                norm_and_rotate_head(E, own->k_norm, eps, c, n, key);
                append_and_attend(1, G, E, &rows[b].at, l, head, rows[b].position + 1, q, key, value, in + (b * H + head * G) * E, scores + task * G * longest);
            }
#pragma omp for schedule(static)
            for (long b = 0; b < B; b++) quantize_inputs(&by_HE, b, in, narrow);
            adapted_gemm(own->w + O_PROJ, &by_HE, narrow, N, adapters, members, l * PRODUCTS + O_PROJ, h, ranks, mine, y, scratch);
#pragma omp for schedule(static)
            for (long b = 0; b < B; b++) {
                add_norm_row_float32(D, x + b * D, y + b * D, own->mlp_norm, eps, x + b * D, in + b * D);
                quantize_inputs(&by_D, b, in, narrow);
            }
            adapted_gemm(own->w + GATE_UP_PROJ, &by_D, narrow, N, adapters, members, l * PRODUCTS + GATE_UP_PROJ, h, ranks, mine, y, scratch);
#pragma omp for schedule(static)
            for (long b = 0; b < B; b++) {
                const float *gate = y + 2 * b * I, *up = gate + I;
                for (long i = 0; i < I; i++) in[b * I + i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
                quantize_inputs(&by_I, b, in, narrow);
            }
            adapted_gemm(own->w + DOWN_PROJ, &by_I, narrow, N, adapters, members, l * PRODUCTS + DOWN_PROJ, h, ranks, mine, y, scratch);
        }
#pragma omp for schedule(static)
        for (long b = 0; b < B; b++) add_norm_row_float32(D, x + b * D, y + b * D, s->norm, eps, x + b * D, out + b * D);
        quantized_gemm_end(&by_D);
    }
    free(by_D.a);
    free(by_HE.a);
    free(by_I.a);
    free(memory);
}
