/* A step of many sequences at once: one new token of each through all layers, with the adapters of each. Weights are held in 4 or 8 bits (quantised.h),
   adapters in bf16. kernels.c includes this once.

   B rows, D hidden, H query heads, K key/value heads, E head size, I intermediate, r rank, made even. */

enum { QKV, O, GATE_UP, DOWN, GROUPS };
#define SHARE(outputs) ((outputs) / WIDTH / 8 + 1) /* sixteens that a thread takes at once: neighbours, so that what is fetched in advance is its own */
#define PARTS 3 /* projections of a fused product, at most */

typedef struct { /* one fused product's update: where in the adapter A lies, as (ranks / 16, in / 2, 16, 2), and of each part B, as
                    (width / 16, r / 2, 16, 2) */
    long ranks, A, parts;
    struct { long first, width, from, pairs, B; } part[PARTS];
} update;

typedef struct {
    const float *attention_norm, *mlp_norm, *bias, *q_norm, *k_norm;
    held w[GROUPS];
} layer;

typedef struct { /* who answers for rows members[first] to members[last - 1]; updates: (layers, GROUPS) */
    const update *updates;
    const bf16 *weights;
    long first, last;
} adapter;

typedef struct { /* inverse: the E / 2 frequencies of the rotary embedding */
    long layers, D, H, K, E, I;
    double eps;
    const float *embedding, *norm, *inverse;
} shape;

typedef struct { /* the new token of a sequence, where it stands, and where the sequence's keys and values are */
    long token, position;
    place at;
} fresh;

/* cos and sin (E) of a position, each angle in both halves. */
static void angles(const shape *s, long position, float *cosine, float *sine) {
    for (long e = 0; e < s->E; e++) {
        float angle = position * s->inverse[e % (s->E / 2)];
        cosine[e] = cosf(angle);
        sine[e] = sinf(angle);
    }
}

/* A head of q or k: its norm, where there is one, and its rotation. */
static void rotate_head(long E, const float *norm, float eps, const float *cosine, const float *sine, float *x) {
    if (norm) add_norm_row_float32(E, x, 0, norm, eps, 0, x);
    for (long e = 0; e < E / 2; e++) {
        float first = x[e], second = x[E / 2 + e];
        x[e] = first * cosine[e] - second * sine[e];
        x[E / 2 + e] = second * cosine[E / 2 + e] + first * sine[E / 2 + e];
    }
}

/* sums + the products of sixteen pairs of bf16 numbers with the pair at h. */
static inline __attribute__((always_inline)) vector add_pairs(vector sums, words pairs, const bf16 *h) {
    uint32_t two;
    memcpy(&two, h, 4);
#ifdef __AVX512BF16__
    return (vector)_mm512_dpbf16_ps((__m512)sums, (__m512bh)(__m512i)pairs, (__m512bh)_mm512_set1_epi32(two));
#else
    return sums + (vector)(pairs << 16) * from_bf16(h[0]) + (vector)(pairs & 0xffff0000) * from_bf16(h[1]);
#endif
}

/* Sixteen ranks of h = A x, for four rows or one. */
static inline __attribute__((always_inline)) void in_rows(int rows, const long *members, long I, const bf16 *A, const bf16 *x, bf16 *h,
                                                          long h_row) {
    vector sums[4] = {{0}}; /* of each row, or of every fourth pair of one row */
    int ways = 4 / rows;
    for (long i = 0; i < I; i += 2 * ways) {
        __builtin_prefetch(A + (i + 128) * WIDTH);
        for (int k = 0; k < 4; k++)
            sums[k] = add_pairs(sums[k], *(const words *)(A + (i + (rows == 1 ? 2 * k : 0)) * WIDTH),
                                x + members[rows == 1 ? 0 : k] * I + i + (rows == 1 ? 2 * k : 0));
    }
    if (rows == 1) sums[0] += sums[1] + sums[2] + sums[3];
    for (int k = 0; k < rows; k++)
        for (int n = 0; n < WIDTH; n++) h[members[k] * h_row + n] = to_bf16(sums[k][n]);
}

/* h (rows, ranks) = A x for the rows of each adapter; shared among the threads that come here. */
static void go_in(long N, const adapter *adapters, const long *members, long index, long I, const bf16 *x, bf16 *h, long h_row) {
    long blocks = 0, tiles = h_row / WIDTH;
    for (long n = 0; n < N; n++) blocks = adapters[n].last - adapters[n].first > blocks ? adapters[n].last - adapters[n].first : blocks;
    blocks = (blocks + 3) / 4;
#pragma omp for schedule(dynamic)
    for (long task = 0; task < N * tiles * blocks; task++) {
        const adapter *one = adapters + task / blocks / tiles;
        const update *own = one->updates + index;
        long first = task / blocks % tiles * WIDTH, m = one->first + task % blocks * 4;
        if (first >= own->ranks) continue;
        const bf16 *A = one->weights + own->A + first * I;
        if (one->last - m >= 4) in_rows(4, members + m, I, A, x, h + first, h_row);
        else
            for (; m < one->last; m++) in_rows(1, members + m, I, A, x, h + first, h_row);
    }
}

static inline __attribute__((always_inline)) void add_rows(int rows, const long *members, long pairs, const bf16 *B, const bf16 *h,
                                                           long h_row, float *y, long y_row) {
    vector sums[4];
    for (int k = 0; k < rows; k++) sums[k] = *(vector *)(y + members[k] * y_row);
    for (long j = 0; j < pairs; j++) {
        words b = *(const words *)(B + 2 * j * WIDTH);
        for (int k = 0; k < rows; k++) sums[k] = add_pairs(sums[k], b, h + members[k] * h_row + 2 * j);
    }
    for (int k = 0; k < rows; k++) *(vector *)(y + members[k] * y_row) = sums[k];
}

/* What the adapters add to outputs o to o + 15 of their rows of y. */
static void go_out(long N, const adapter *adapters, const long *members, long index, long o, const bf16 *h, long h_row, float *y, long y_row) {
    for (const adapter *one = adapters; one < adapters + N; one++) {
        const update *own = one->updates + index;
        for (long p = 0; p < own->parts; p++) {
            long first = own->part[p].first, wide = own->part[p].width, pairs = own->part[p].pairs;
            if (o < first || o >= first + wide) continue;
            const bf16 *B = one->weights + own->part[p].B + (o - first) * 2 * pairs;
            for (long j = 0; j < pairs; j++) __builtin_prefetch(B + 2 * (pairs + j) * WIDTH);
            const bf16 *ranks = h + own->part[p].from;
            for (long m = one->first; m < one->last;)
                if (one->last - m >= 4) add_rows(4, members + m, pairs, B, ranks, h_row, y + o, y_row), m += 4;
                else add_rows(1, members + m, pairs, B, ranks, h_row, y + o, y_row), m++;
        }
    }
}

static long most_ranks(long N, const adapter *adapters, long from, long to) {
    long ranks = 0;
    for (const adapter *one = adapters; one < adapters + N; one++)
        for (long index = from; index < to; index++) ranks = one->updates[index].ranks > ranks ? one->updates[index].ranks : ranks;
    return ranks;
}

/* y (rows, O) += what the adapters add to one fused product of x (rows, I); index: layer * GROUPS + product. */
void add_updates(long N, const adapter *adapters, const long *members, long index, long rows, long I, long O, const bf16 *x, float *y) {
    long ranks = most_ranks(N, adapters, index, index + 1);
    bf16 *h = malloc(rows * ranks * sizeof(bf16));
#pragma omp parallel
    {
        go_in(N, adapters, members, index, I, x, h, ranks);
#pragma omp for schedule(dynamic, SHARE(O))
        for (long o = 0; o < O; o += WIDTH) go_out(N, adapters, members, index, o, h, ranks, y, O);
    }
    free(h);
}

/* y = x W' + what the adapters add to it; shared among the threads that come here. x: in whole numbers, narrow: in bf16, for the adapters. */
static void whole_product(const held *w, const rounded *x, const bf16 *narrow, long N, const adapter *adapters, const long *members, long index,
                          bf16 *h, long h_row, float *y, uint8_t *room) {
    if (N) go_in(N, adapters, members, index, w->I, narrow, h, h_row);
#pragma omp for schedule(dynamic, SHARE(w->O))
    for (long o = 0; o < w->O; o += WIDTH) {
        tile_product(w, x, o, y, w->O, room);
        if (N) go_out(N, adapters, members, index, o, h, h_row, y, w->O);
    }
}

/* Row t of x as whole numbers, and in bf16 where that is wanted. */
static void give(const rounded *whole, long t, const float *x, bf16 *narrow) {
    long I = whole->I;
    round_row(whole, t, x + t * I);
    if (narrow)
        for (long i = 0; i < I; i++) narrow[t * I + i] = to_bf16(x[t * I + i]);
}

/* out (B, D): hidden states of the rows after the final norm. Keys and values are in fp16. All outputs of fused products, and B's parts, are whole
   sixteens. */
void decode_layers(long B, const shape *s, const layer *layers, const fresh *rows, long N, const adapter *adapters, const long *members, float *out) {
    long D = s->D, H = s->H, K = s->K, E = s->E, I = s->I, L = s->layers, heads = H + 2 * K, G = H / K, longest = 0;
    float eps = s->eps;
    for (long b = 0; b < B; b++) longest = rows[b].position + 1 > longest ? rows[b].position + 1 : longest;
    longest = PAD(longest);
    long ranks = most_ranks(N, adapters, 0, L * GROUPS), widest = D > I ? D : I;
    widest = widest > H * E ? widest : H * E;
    long most = heads * E > 2 * I ? heads * E : 2 * I;
    most = most > D ? most : D;
    float *memory = aligned_alloc(64, (B * (most + 2 * widest + ranks + K * G * longest + D + 2 * E) * sizeof(float) + 63) / 64 * 64);
    float *x = memory, *cosine = x + B * D, *sine = cosine + B * E, *y = sine + B * E, *in = y + B * most, *scores = in + B * widest;
    bf16 *h = (bf16 *)(scores + B * K * G * longest), *narrow = N ? h + B * ranks : 0;
    rounded by_D = rounded_of(B, D), by_HE = rounded_of(B, H * E), by_I = rounded_of(B, I);
#pragma omp parallel
    {
        uint8_t *room = products_begin(&by_D, widest);
        for (long l = 0; l < L; l++) {
            const layer *own = layers + l;
#pragma omp for schedule(static)
            for (long b = 0; b < B; b++) {
                if (!l) {
                    memcpy(x + b * D, s->embedding + rows[b].token * D, D * sizeof(float));
                    angles(s, rows[b].position, cosine + b * E, sine + b * E);
                }
                add_norm_row_float32(D, x + b * D, l ? y + b * D : 0, own->attention_norm, eps, x + b * D, in + b * D);
                give(&by_D, b, in, narrow);
            }
            whole_product(own->w + QKV, &by_D, narrow, N, adapters, members, l * GROUPS + QKV, h, ranks, y, room);
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
                for (long g = 0; g < G; g++) rotate_head(E, own->q_norm, eps, c, n, q + g * E);
                rotate_head(E, own->k_norm, eps, c, n, key);
                attend(1, G, E, &rows[b].at, l, head, rows[b].position + 1, q, key, value, in + (b * H + head * G) * E, scores + task * G * longest);
            }
#pragma omp for schedule(static)
            for (long b = 0; b < B; b++) give(&by_HE, b, in, narrow);
            whole_product(own->w + O, &by_HE, narrow, N, adapters, members, l * GROUPS + O, h, ranks, y, room);
#pragma omp for schedule(static)
            for (long b = 0; b < B; b++) {
                add_norm_row_float32(D, x + b * D, y + b * D, own->mlp_norm, eps, x + b * D, in + b * D);
                give(&by_D, b, in, narrow);
            }
            whole_product(own->w + GATE_UP, &by_D, narrow, N, adapters, members, l * GROUPS + GATE_UP, h, ranks, y, room);
#pragma omp for schedule(static)
            for (long b = 0; b < B; b++) {
                const float *gate = y + 2 * b * I, *up = gate + I;
                for (long i = 0; i < I; i++) in[b * I + i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
                give(&by_I, b, in, narrow);
            }
            whole_product(own->w + DOWN, &by_I, narrow, N, adapters, members, l * GROUPS + DOWN, h, ranks, y, room);
        }
#pragma omp for schedule(static)
        for (long b = 0; b < B; b++) add_norm_row_float32(D, x + b * D, y + b * D, s->norm, eps, x + b * D, out + b * D);
        products_end(&by_D);
    }
    free(by_D.a);
    free(by_HE.a);
    free(by_I.a);
    free(memory);
}
