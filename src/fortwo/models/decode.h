/* Attention of one new token a row over what is cached; kernels.c includes this once. */

/* Row b brings qkv (H + 2K, E) and stands at positions[b] of row rows[b] of the cache. Its keys and values are written there, then its queries attend
   to everything up to there. k and v are (rows, K, length, E): a row begins every `row_step` floats, a head every `head_step`. E is a multiple of 16. */
void decode_attention(long B, long H, long K, long E, long row_step, long head_step, const long *rows, const long *positions, const float *qkv,
                      float *k, float *v, float *out) {
    long G = H / K, work = 0, longest = 0;
    for (long b = 0; b < B; b++) {
        work += (positions[b] + 1) * H * E;
        longest = positions[b] + 1 > longest ? positions[b] + 1 : longest;
    }
    float scaling = 1 / sqrtf((float)E), *room = malloc(B * K * G * longest * sizeof(float));
#pragma omp parallel for schedule(dynamic) if (work > SERIAL)
    for (long task = 0; task < B * K; task++) {
        long b = task / K, head = task % K, S = positions[b] + 1;
        const float *own = qkv + b * (H + 2 * K) * E, *q = own + head * G * E;
        float *keys = k + rows[b] * row_step + head * head_step, *values = v + rows[b] * row_step + head * head_step;
        float *scores = room + task * G * longest;
        memcpy(keys + (S - 1) * E, own + (H + head) * E, E * sizeof(float));
        memcpy(values + (S - 1) * E, own + (H + K + head) * E, E * sizeof(float));
        for (long s = 0; s < S; s++)
            for (long g = 0; g < G; g++) {
                float sum = 0;
                for (long e = 0; e < E; e++) sum += q[g * E + e] * keys[s * E + e];
                scores[g * longest + s] = sum * scaling;
            }
        for (long g = 0; g < G; g++) softmax(scores + g * longest, S, S);
        multiply(G, E, S, scores, longest, 1, values, E, out + (b * H + head * G) * E, E, 0);
    }
    free(room);
}
