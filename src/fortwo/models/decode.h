/* Attention of one new token a row over what is cached; kernels.c includes this once. */

/* The sums of sixteen vectors, in their order. */
static inline vector sums_of(const vector *v) {
    vector halves[8], quarters[4], eighths[2];
    const integers half[2] = {{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}, {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}};
    const integers quarter[2] = {{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}, {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31}};
    const integers eighth[2] = {{0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}, {2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31}};
    const integers one[2] = {{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}, {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31}};
#define FOLD(a, b, lanes) (__builtin_shuffle(a, b, lanes[0]) + __builtin_shuffle(a, b, lanes[1]))
    for (int i = 0; i < 8; i++) halves[i] = FOLD(v[2 * i], v[2 * i + 1], half);
    for (int i = 0; i < 4; i++) quarters[i] = FOLD(halves[2 * i], halves[2 * i + 1], quarter);
    for (int i = 0; i < 2; i++) eighths[i] = FOLD(quarters[2 * i], quarters[2 * i + 1], eighth);
    return FOLD(eighths[0], eighths[1], one);
#undef FOLD
}

/* Where keys and values are: of row `row` they are (K, length, E), a row begins every row_step floats, a head every head_step. */
typedef struct {
    float *k, *v;
    long row_step, head_step, row;
} place;

#define TOGETHER 4 /* queries that read a key, or a value, together */

/* Scores of `count` queries at q with the sixteen keys from s on, the last key where there are fewer. */
static inline __attribute__((always_inline)) void score_sixteen(int count, long E, long s, long seen, const float *q, const float *keys,
                                                                float scaling, float *scores, long row) {
    vector sums[TOGETHER][WIDTH];
    for (int n = 0; n < WIDTH; n++) {
        const float *k = keys + (s + n < seen ? s + n : seen - 1) * E;
        vector own[TOGETHER] = {{0}};
        for (long e = 0; e < E; e += WIDTH) {
            vector key = *(const vector *)(k + e);
            for (int g = 0; g < count; g++) own[g] += *(const vector *)(q + g * E + e) * key;
        }
        for (int g = 0; g < count; g++) sums[g][n] = own[g];
    }
    for (int g = 0; g < count; g++) *(vector *)(scores + g * row + s) = sums_of(sums[g]) * scaling;
}

static inline __attribute__((always_inline)) void attend_together(int count, long E, long seen, const float *q, const float *keys,
                                                                  const float *values, float scaling, float *out, float *scores, long row) {
    for (long s = 0; s < seen; s += WIDTH) {
        for (long b = 0; b < WIDTH * E; b += 16) __builtin_prefetch(values + s * E + b);
        score_sixteen(count, E, s, seen, q, keys, scaling, scores, row);
    }
    for (int g = 0; g < count; g++) softmax(scores + g * row, seen, seen);
    multiply(count, E, seen, scores, row, 1, values, E, out, E, 0);
}

/* One token's queries of one key/value head, G of them at q, with its key and value; `seen` tokens are there with it. out (G, E). Scores: G * PAD(seen). */
static void attend(long G, long E, const place *at, long head, long seen, const float *q, const float *key, const float *value, float *out,
                   float *scores) {
    float *keys = at->k + at->row * at->row_step + head * at->head_step, *values = at->v + at->row * at->row_step + head * at->head_step;
    float scaling = 1 / sqrtf((float)E);
    memcpy(keys + (seen - 1) * E, key, E * sizeof(float));
    memcpy(values + (seen - 1) * E, value, E * sizeof(float));
    long row = PAD(seen);
    for (long g = 0; g < G; g += TOGETHER) {
#define ATTEND(count) attend_together(count, E, seen, q + g * E, keys, values, scaling, out + g * E, scores + g * row, row)
        switch (G - g) {
        case 1: ATTEND(1); break;
        case 2: ATTEND(2); break;
        case 3: ATTEND(3); break;
        default: ATTEND(4);
        }
#undef ATTEND
    }
}

/* Row b brings qkv (H + 2K, E) and stands at positions[b] of row rows[b] of the cache. Its keys and values are written there, then its queries attend
   to everything up to there. E is a multiple of 16. */
void decode_attention(long B, long H, long K, long E, long row_step, long head_step, const long *rows, const long *positions, const float *qkv,
                      float *k, float *v, float *out) {
    long G = H / K, work = 0, longest = 0;
    for (long b = 0; b < B; b++) {
        work += (positions[b] + 1) * H * E;
        longest = positions[b] + 1 > longest ? positions[b] + 1 : longest;
    }
    longest = PAD(longest);
    float *room = malloc(B * K * G * longest * sizeof(float));
#pragma omp parallel for schedule(dynamic) if (work > SERIAL)
    for (long task = 0; task < B * K; task++) {
        long b = task / K, head = task % K;
        place at = {k, v, row_step, head_step, rows[b]};
        const float *own = qkv + b * (H + 2 * K) * E;
        attend(G, E, &at, head, positions[b] + 1, own + head * G * E, own + (H + head) * E, own + (H + K + head) * E,
               out + (b * H + head * G) * E, room + task * G * longest);
    }
    free(room);
}
