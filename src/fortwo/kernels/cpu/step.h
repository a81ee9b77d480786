/* A step of many sequences at once: one new token of each through all layers, with the adapters of each. Weights are held in 4 or 8 bits (quantised.h),
   adapters in 8 (laid.h). kernels.c includes this once.

   B rows, D hidden, H query heads, K key/value heads, E head size, I intermediate, r rank, made even. */

enum { QKV, O, GATE_UP, DOWN, GROUPS };
#define SHARE(outputs) ((outputs) / WIDTH / 8 + 1) /* sixteens that a thread takes at once: neighbours, so that what is fetched in advance is its own */
#define PARTS 3 /* projections of a fused product, at most */
#define MOST_SUMMED 16e6f /* sizes of numbers, whose products with 127 have a sum below 2^31, what rounding adds included */
#define BYTES_OF_ROWS(rows, row) (((rows) * (sizeof(float) + (row) * sizeof(int16_t)) + 63) / 64 * 64)

typedef struct { /* one fused product's update: where in the adapter A lies, a slab for sixteen ranks, and of each part B, a slab for sixteen outputs */
    long ranks, A, parts;
    struct { long first, width, from, pairs, B; } part[PARTS];
} update;

typedef struct {
    const float *attention_norm, *mlp_norm, *bias, *q_norm, *k_norm;
    held w[GROUPS];
} layer;

typedef struct { /* who answers for rows members[first] to members[last - 1]; updates: (layers, GROUPS) */
    const update *updates;
    const int8_t *weights;
    long first, last;
} adapter;

/* Rows in whole numbers of 16 bits, and what one of each row's is worth. */
typedef struct {
    int16_t *x;
    float *scale;
} whole_rows;

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

/* Row t of x, `count` numbers, a multiple of 16; so small that the sum of their products with 8 bits is a whole number of 32. */
static void round_pairs(const whole_rows *to, long t, long row, long count, const float *x) {
    float tops[WIDTH] = {0}, sums[WIDTH] = {0}, sum = 0;
    for (long i = 0; i < count; i += WIDTH)
        for (long lane = 0; lane < WIDTH; lane++) {
            float size = fabsf(x[i + lane]);
            tops[lane] = size > tops[lane] ? size : tops[lane];
            sums[lane] += size;
        }
    for (long lane = 0; lane < WIDTH; lane++) sum += sums[lane];
    float top = largest(tops, WIDTH), by = top > 0 ? INT16_MAX / top : 0;
    by = sum * by > MOST_SUMMED ? MOST_SUMMED / sum : by;
    for (long i = 0; i < count; i++) to->x[t * row + i] = (int16_t)rintf(x[i] * by);
    to->scale[t] = by > 0 ? 1 / by : 0;
}

/* Sixteen pairs of a slab in 16 bits. */
static inline __attribute__((always_inline)) words slab_pairs(const int8_t *from) {
#ifdef __AVX512BW__
    return (words)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)from));
#else
    words pairs;
    for (int n = 0; n < WIDTH; n++) pairs[n] = (uint16_t)from[2 * n] | (uint32_t)from[2 * n + 1] << 16;
    return pairs;
#endif
}

/* sums + the products of sixteen pairs with the pair at h. */
static inline __attribute__((always_inline)) integers add_pairs(integers sums, words pairs, const int16_t *h) {
#ifdef __AVX512VNNI__
    int32_t two;
    memcpy(&two, h, 4);
    return (integers)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)pairs, _mm512_set1_epi32(two));
#else
    integers both = (integers)pairs;
    return sums + (both << 16 >> 16) * h[0] + (both >> 16) * h[1];
#endif
}

/* Sixteen ranks of h = A x, for four rows or one; A: their slab. */
static inline __attribute__((always_inline)) void in_rows(int rows, const long *members, long I, const int8_t *A, const whole_rows *x, float *h,
                                                          long h_row) {
    integers sums[4] = {{0}}; /* of each row, or of every fourth pair of one row */
    int ways = 4 / rows;
    const int8_t *pairs = A + SCALES;
    for (long i = 0; i < I; i += 2 * ways) {
        for (int k = 0; k < ways; k += 2) __builtin_prefetch(pairs + (i + 2 * k) * WIDTH + AHEAD_OF_PRODUCT);
        for (int k = 0; k < 4; k++) {
            long own = i + (rows == 1 ? 2 * k : 0);
            sums[k] = add_pairs(sums[k], slab_pairs(pairs + own * WIDTH), x->x + members[rows == 1 ? 0 : k] * I + own);
        }
    }
    if (rows == 1) sums[0] += sums[1] + sums[2] + sums[3];
    for (int k = 0; k < rows; k++)
        *(vector *)(h + members[k] * h_row) = __builtin_convertvector(sums[k], vector) * (*(const vector *)A * x->scale[members[k]]);
}

/* h (rows, ranks) = A x for the rows of each adapter; shared among the threads that come here. */
static void go_in(long N, const adapter *adapters, const long *members, long index, long I, const whole_rows *x, float *h, long h_row) {
    long blocks = 0, tiles = h_row / WIDTH;
    for (long n = 0; n < N; n++) blocks = adapters[n].last - adapters[n].first > blocks ? adapters[n].last - adapters[n].first : blocks;
    blocks = (blocks + 3) / 4;
#pragma omp for schedule(dynamic)
    for (long task = 0; task < N * tiles * blocks; task++) {
        const adapter *one = adapters + task / blocks / tiles;
        const update *own = one->updates + index;
        long tile = task / blocks % tiles, m = one->first + task % blocks * 4;
        if (tile * WIDTH >= own->ranks) continue;
        const int8_t *A = one->weights + own->A + tile * SLAB(I);
        if (one->last - m >= 4) in_rows(4, members + m, I, A, x, h + tile * WIDTH, h_row);
        else
            for (; m < one->last; m++) in_rows(1, members + m, I, A, x, h + tile * WIDTH, h_row);
    }
}

/* h as whole numbers, by each thread for itself: they are few. */
static void round_ranks(long N, const adapter *adapters, const long *members, long index, const float *h, long h_row, const whole_rows *to) {
    for (const adapter *one = adapters; one < adapters + N; one++)
        for (long m = one->first; one->updates[index].ranks && m < one->last; m++)
            round_pairs(to, members[m], h_row, one->updates[index].ranks, h + members[m] * h_row);
}

/* Sixteen outputs of B h are added to y; B: their slab, h: the part's first rank. */
static inline __attribute__((always_inline)) void add_rows(int rows, const long *members, long pairs, const int8_t *B, const int16_t *h, long h_row,
                                                           const float *h_scale, float *y, long y_row) {
    integers sums[4] = {{0}};
    for (long j = 0; j < pairs; j++) {
        words b = slab_pairs(B + SCALES + 2 * j * WIDTH);
        for (int k = 0; k < rows; k++) sums[k] = add_pairs(sums[k], b, h + members[k] * h_row + 2 * j);
    }
    for (int k = 0; k < rows; k++)
        *(vector *)(y + members[k] * y_row) += __builtin_convertvector(sums[k], vector) * (*(const vector *)B * h_scale[members[k]]);
}

/* The same for some rows, with what follows fetched. */
static inline void add_all_rows(long first, long last, const long *members, long pairs, const int8_t *B, const int16_t *h, long h_row,
                                const float *h_scale, float *y, long y_row) {
    for (long b = 0; b < SLAB(2 * pairs); b += 64) __builtin_prefetch(B + SLAB(2 * pairs) + b);
    for (; first + 4 <= last; first += 4) add_rows(4, members + first, pairs, B, h, h_row, h_scale, y, y_row);
    for (; first < last; first++) add_rows(1, members + first, pairs, B, h, h_row, h_scale, y, y_row);
}

/* What the adapters add to outputs o to o + 15 of their rows of y. */
static void go_out(long N, const adapter *adapters, const long *members, long index, long o, const whole_rows *h, long h_row, float *y, long y_row) {
    for (const adapter *one = adapters; one < adapters + N; one++) {
        const update *own = one->updates + index;
        for (long p = 0; p < own->parts; p++) {
            long first = own->part[p].first, pairs = own->part[p].pairs;
            if (o < first || o >= first + own->part[p].width) continue;
            const int8_t *B = one->weights + own->part[p].B + (o - first) / WIDTH * SLAB(2 * pairs);
            add_all_rows(one->first, one->last, members, pairs, B, h->x + own->part[p].from, h_row, h->scale, y + o, y_row);
        }
    }
}

static long most_ranks(long N, const adapter *adapters, long from, long to) {
    long ranks = 0;
    for (const adapter *one = adapters; one < adapters + N; one++)
        for (long index = from; index < to; index++) ranks = one->updates[index].ranks > ranks ? one->updates[index].ranks : ranks;
    return ranks;
}

/* Memory for whole numbers of rows. */
static whole_rows whole_rows_at(char **room, long rows, long row) {
    whole_rows all = {(int16_t *)(*room + rows * sizeof(float)), (float *)*room};
    *room += BYTES_OF_ROWS(rows, row);
    return all;
}

/* y (rows, O) += what the adapters add to one fused product of x (rows, I); index: layer * GROUPS + product. */
void add_updates(long N, const adapter *adapters, const long *members, long index, long rows, long I, long O, const float *x, float *y) {
    long ranks = most_ranks(N, adapters, index, index + 1), threads = omp_get_max_threads();
    char *memory = aligned_alloc(64, BYTES_OF_ROWS(rows, I) + threads * BYTES_OF_ROWS(rows, ranks) + PAD(rows * ranks) * sizeof(float)), *room = memory;
    whole_rows given = whole_rows_at(&room, rows, I), own[threads];
    for (long i = 0; i < threads; i++) own[i] = whole_rows_at(&room, rows, ranks);
    float *h = (float *)room;
#pragma omp parallel
    {
        const whole_rows *mine = own + omp_get_thread_num();
#pragma omp for schedule(static)
        for (long t = 0; t < rows; t++) round_pairs(&given, t, I, I, x + t * I);
        go_in(N, adapters, members, index, I, &given, h, ranks);
        round_ranks(N, adapters, members, index, h, ranks, mine);
#pragma omp for schedule(dynamic, SHARE(O))
        for (long o = 0; o < O; o += WIDTH) go_out(N, adapters, members, index, o, mine, ranks, y, O);
    }
    free(memory);
}

/* y = x W' + what the adapters add to it; shared among the threads that come here. x and narrow: rows in whole numbers, for the weights and for the
   adapters; h: room for all threads, mine: for this one. */
static void whole_product(const held *w, const rounded *x, const whole_rows *narrow, long N, const adapter *adapters, const long *members, long index,
                          float *h, long h_row, const whole_rows *mine, float *y, uint8_t *room) {
    if (N) {
        go_in(N, adapters, members, index, w->I, narrow, h, h_row);
        round_ranks(N, adapters, members, index, h, h_row, mine);
    }
#pragma omp for schedule(dynamic, SHARE(w->O))
    for (long o = 0; o < w->O; o += WIDTH) {
        tile_product(w, x, o, y, w->O, room);
        if (N) go_out(N, adapters, members, index, o, mine, h_row, y, w->O);
    }
}

/* Row t of x as whole numbers, for the weights and, where there are some, for adapters. */
static void give(const rounded *whole, long t, const float *x, const whole_rows *narrow) {
    round_row(whole, t, x + t * whole->I);
    if (narrow) round_pairs(narrow, t, whole->I, whole->I, x + t * whole->I);
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
    long threads = omp_get_max_threads(), floats = PAD(B * (most + widest + ranks + K * G * longest + D + 2 * E));
    char *memory = aligned_alloc(64, floats * sizeof(float) + BYTES_OF_ROWS(B, widest) + threads * BYTES_OF_ROWS(B, ranks));
    char *room_of_rows = memory + floats * sizeof(float);
    float *x = (float *)memory, *cosine = x + B * D, *sine = cosine + B * E, *y = sine + B * E, *in = y + B * most, *scores = in + B * widest;
    float *h = scores + B * K * G * longest;
    whole_rows rows_in = whole_rows_at(&room_of_rows, B, widest), own_ranks[threads], *narrow = N ? &rows_in : 0;
    for (long i = 0; i < threads; i++) own_ranks[i] = whole_rows_at(&room_of_rows, B, ranks);
    rounded by_D = rounded_of(B, D), by_HE = rounded_of(B, H * E), by_I = rounded_of(B, I);
#pragma omp parallel
    {
        uint8_t *room = products_begin(&by_D, widest);
        const whole_rows *mine = own_ranks + omp_get_thread_num();
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
            whole_product(own->w + QKV, &by_D, narrow, N, adapters, members, l * GROUPS + QKV, h, ranks, mine, y, room);
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
            whole_product(own->w + O, &by_HE, narrow, N, adapters, members, l * GROUPS + O, h, ranks, mine, y, room);
#pragma omp for schedule(static)
            for (long b = 0; b < B; b++) {
                add_norm_row_float32(D, x + b * D, y + b * D, own->mlp_norm, eps, x + b * D, in + b * D);
                give(&by_D, b, in, narrow);
            }
            whole_product(own->w + GATE_UP, &by_D, narrow, N, adapters, members, l * GROUPS + GATE_UP, h, ranks, mine, y, room);
#pragma omp for schedule(static)
            for (long b = 0; b < B; b++) {
                const float *gate = y + 2 * b * I, *up = gate + I;
                for (long i = 0; i < I; i++) in[b * I + i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
                give(&by_I, b, in, narrow);
            }
            whole_product(own->w + DOWN, &by_I, narrow, N, adapters, members, l * GROUPS + DOWN, h, ranks, mine, y, room);
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
