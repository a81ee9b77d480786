/* Attention of one new token of each row over the cache. */
#include "decode_attention.h"

void decode_attention(long B, long H, long K, long E, long row_step, long head_step, const long *rows, const long *positions, const float *qkv,
                      void *k, void *v, float *out, long half) {
    long G = H / K, work = 0, longest = 0, size = half ? sizeof(uint16_t) : sizeof(float);
    for (long b = 0; b < B; b++) {
        work += (positions[b] + 1) * H * E;
        longest = positions[b] + 1 > longest ? positions[b] + 1 : longest;
    }
    longest = PAD(longest);
    float *scratch = malloc(B * K * G * longest * sizeof(float));
#pragma omp parallel for schedule(dynamic) if (work > SERIAL)
    for (long task = 0; task < B * K; task++) {
        long b = task / K, head = task % K, row = rows[b] * row_step * size;
        cache_place at = {(char *)k + row, (char *)v + row, 0, head_step};
        const float *own = qkv + b * (H + 2 * K) * E, *q = own + head * G * E, *key = own + (H + head) * E, *value = key + K * E;
        float *to = out + (b * H + head * G) * E, *scores = scratch + task * G * longest;
        if (half) append_and_attend(1, G, E, &at, 0, head, positions[b] + 1, q, key, value, to, scores);
        else append_and_attend(0, G, E, &at, 0, head, positions[b] + 1, q, key, value, to, scores);
    }
    free(scratch);
}
