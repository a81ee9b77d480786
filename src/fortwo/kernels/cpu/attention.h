/* Attention over packed rows, as in kernels.h, in bf16 on AMX's tiles; kernels.c includes this once, behind matrix.h. E is a multiple of 32.

   A task is one key/value head of one row: its queries, of all heads that share it, are one matrix. Scores, sums and gradients are float;
   probabilities and their slopes are rounded to bf16 for the products. */

#if defined(__AMX_BF16__) && defined(__linux__)
#define CHUNK 256 /* queries whose probabilities are there together, backward */

/* c (32, 32) (+)= a times a panel of `count` steps. */
static void patch(long count, const bf16 *a, long a_row, const bf16 *panel, float *c, long c_row, int add) {
    if (add) tiles_loaded(c, c_row);
    else tiles_clear();
    for (long k = 0; k < count; k++) tile_step(a + k * STEP, a_row, panel + k * SQUARE);
    tiles_stored(c, c_row);
}

/* c (32, 16) = a times half a panel, its first tiles or its second; c has rows of 32. */
static void narrow_patch(long count, const bf16 *a, long a_row, const bf16 *panel, float *c) {
    written_for_tiles(a);
    _tile_zero(0);
    _tile_zero(2);
    for (long k = 0; k < count; k++) {
        _tile_loadd(6, panel + k * SQUARE, 64);
        _tile_loadd(4, a + k * STEP, 2 * a_row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a + k * STEP + 16 * a_row, 2 * a_row);
        _tile_dpbf16ps(2, 5, 6);
    }
    _tile_stored(0, c, 4 * PANEL);
    _tile_stored(2, c + 16 * PANEL, 4 * PANEL);
}

/* c (16, 32) = 16 rows of a times a panel. */
static void flat_patch(long count, const bf16 *a, long a_row, const bf16 *panel, float *c) {
    written_for_tiles(a);
    _tile_zero(0);
    _tile_zero(1);
    for (long k = 0; k < count; k++) {
        _tile_loadd(4, a + k * STEP, 2 * a_row);
        _tile_loadd(6, panel + k * SQUARE, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + k * SQUARE + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, c, 4 * PANEL);
    _tile_stored(1, c + 16, 4 * PANEL);
}

/* Panels of rows (count, E) whose products are summed over E: outputs are rows, zero beyond `count`. */
static void lay_rows(long count, long E, const bf16 **rows, long head, bf16 *to) {
    for (long s = 0; s < steps(count) * STEP; s += 16)
        for (long e = 0; e < E; e += STEP) {
            __m512i r[16];
            for (long i = 0; i < 16; i++) r[i] = s + i < count ? _mm512_loadu_si512(rows[s + i] + head + e) : _mm512_setzero_si512();
            transpose(r);
            bf16 *tile = to + s / PANEL * PANEL * E + e * PANEL + s % PANEL / 16 * TILE;
            for (long i = 0; i < 16; i++) _mm512_store_si512(tile + i * STEP, r[i]);
        }
}

/* The same for sums over rows: outputs are E. */
static void lay_columns(long count, long E, const bf16 **rows, long head, bf16 *to) {
    __m512i low = _mm512_loadu_si512(zip[0]), high = _mm512_loadu_si512(zip[1]), none = _mm512_setzero_si512();
    long all = steps(count);
    for (long s = 0; s < all * STEP; s += 2)
        for (long e = 0; e < E; e += PANEL) {
            bf16 *row = to + e * all * STEP + s / STEP * SQUARE + s % STEP / 2 * STEP;
            __m512i even = s < count ? _mm512_loadu_si512(rows[s] + head + e) : none;
            __m512i odd = s + 1 < count ? _mm512_loadu_si512(rows[s + 1] + head + e) : none;
            _mm512_store_si512(row, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(row + TILE, _mm512_permutex2var_epi16(even, high, odd));
        }
}

/* e^(scaling (score - highest)) of the first n scores as bf16, zero up to `seen` (a multiple of 32). Returns their sum; lse: the logarithm of the
   softmax's. */
static float unscaled_softmax(const float *scores, long n, long seen, float scaling, bf16 *out, float *lse) {
    __m512 highest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps(), by = _mm512_set1_ps(scaling);
    for (long s = 0; s < n; s += 16) highest = _mm512_mask_max_ps(highest, first(n - s), highest, _mm512_loadu_ps(scores + s));
    float top = _mm512_reduce_max_ps(highest);
    highest = _mm512_set1_ps(top);
    for (long s = 0; s < seen; s += 32) {
        __m512 left = _mm512_sub_ps(_mm512_loadu_ps(scores + s), highest), right = _mm512_sub_ps(_mm512_loadu_ps(scores + s + 16), highest);
        left = _mm512_maskz_mov_ps(first(n - s), exponentials(_mm512_mul_ps(left, by)));
        right = _mm512_maskz_mov_ps(first(n - s - 16), exponentials(_mm512_mul_ps(right, by)));
        sum = _mm512_add_ps(sum, _mm512_add_ps(left, right));
        store_bf16(out + s, left, right);
    }
    float all = _mm512_reduce_add_ps(sum);
    *lse = logf(all) + top * scaling;
    return all;
}

/* Of the first n scores of a query the probabilities, and of their slopes those before the softmax, as bf16, zero up to `seen`. */
static void softmax_backward(float *scores, const float *slopes, long n, long seen, float scaling, float lse, bf16 *p, bf16 *slope) {
    __m512 delta = _mm512_setzero_ps(), by = _mm512_set1_ps(scaling), sum = _mm512_set1_ps(lse);
    for (long s = 0; s < seen; s += 16) {
        __m512 own = exponentials(_mm512_fmsub_ps(_mm512_loadu_ps(scores + s), by, sum));
        own = _mm512_maskz_mov_ps(first(n - s), own);
        delta = _mm512_mask3_fmadd_ps(own, _mm512_loadu_ps(slopes + s), delta, first(n - s));
        _mm512_storeu_ps(scores + s, own);
    }
    delta = _mm512_set1_ps(_mm512_reduce_add_ps(delta));
    for (long s = 0; s < seen; s += 32) {
        __m512 left = _mm512_loadu_ps(scores + s), right = _mm512_loadu_ps(scores + s + 16);
        store_bf16(p + s, left, right);
        left = _mm512_maskz_mul_ps(first(n - s), _mm512_sub_ps(_mm512_loadu_ps(slopes + s), delta), left);
        right = _mm512_maskz_mul_ps(first(n - s - 16), _mm512_sub_ps(_mm512_loadu_ps(slopes + s + 16), delta), right);
        store_bf16(slope + s, left, right);
    }
}

/* 32 rows of `count` numbers (a multiple of 32), `row` from one to the next, as columns of 32. */
static void turn(const bf16 *rows, long row, long count, bf16 *to, long to_row) {
    for (long s = 0; s < count; s += 32) {
        __m512i even[16], odd[16];
        for (long i = 0; i < 16; i++) even[i] = _mm512_loadu_si512(rows + 2 * i * row + s), odd[i] = _mm512_loadu_si512(rows + (2 * i + 1) * row + s);
        transpose(even);
        transpose(odd);
        for (long i = 0; i < 16; i++) {
            bf16 *at = to + (s + 2 * i) * to_row;
            _mm512_storeu_si512(at, _mm512_mask_blend_epi16(0xaaaaaaaa, even[i], _mm512_slli_epi32(odd[i], 16)));
            _mm512_storeu_si512(at + to_row, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even[i], 16), odd[i]));
        }
    }
}

/* Some queries, from number `from` of a task on: query g of token i. */
#define EACH_QUERY(row, from, count) \
    for (long row = 0, i = (from) / G, g = (from) % G; row < (count); row++, i += ++g == G, g = g < G ? g : 0)

static inline void copy_row(long E, const bf16 *from, bf16 *to) {
    for (long e = 0; e < E; e += 32) _mm512_storeu_si512(to + e, _mm512_loadu_si512(from + e));
}

/* One task: the keys that its queries see are the prefix's and the row's own, up to each query's place. The queries of a token lie together. */
typedef struct {
    long r, k, before, start, L, S, Sp, M, Mp;
} packed_task;

static packed_task packed_task_of(long task, long P, long R, const long *starts, const long *lengths, long H, long K) {
    long r = task / K, before = r < R ? P : 0, start = r < R ? starts[r] : 0, L = r < R ? lengths[r] : P, S = before + L, M = L * (H / K);
    return (packed_task){r, task % K, before, start, L, S, steps(S) * STEP, M, steps(M) * STEP};
}

static inline long keys_seen(const packed_task *t, long m, long G) { /* by the queries up to m, rounded up to whole steps */
    long last = m < t->M ? m : t->M - 1;
    return steps(t->before + last / G + 1) * STEP;
}

#define LARGE_PAGE (1 << 21)

/* Room of a thread's own, in large pages where it fills one, of which parts are taken one after the other; each begins at a line of the cache. */
typedef struct { char *at; long size, taken; } arena;

static void *take(arena *room, long bytes) {
    void *at = room->at + room->taken;
    room->taken += (bytes + 63) / 64 * 64;
    return at;
}

static void make_room(arena *room, long bytes) {
    if (bytes > room->size) {
        long page = bytes < LARGE_PAGE ? 64 : LARGE_PAGE;
        free(room->at);
        room->size = (bytes + page - 1) / page * page;
        room->at = aligned_alloc(page, room->size);
        if (page == LARGE_PAGE) madvise(room->at, room->size, MADV_HUGEPAGE);
    }
    room->taken = 0;
}

/* A task's queries over its keys and values, which are laid. Room: q (Mp, E), scores and mass (32, Sp), mixed (32, E). lse may be absent. */
static void attend_tiles(const packed_task *t, long H, long G, long N, long E, const bf16 *qkv, const bf16 *keys, const bf16 *values, bf16 *q,
                         float *scores, bf16 *mass, float *mixed, bf16 *out, float *lse) {
    float scaling = 1 / sqrtf((float)E), sums[32], unused;
    for (long i = 0; i < t->L; i++) memcpy(q + i * G * E, qkv + ((t->start + i) * N + t->k * G) * E, G * E * sizeof(bf16));
    memset(q + t->M * E, 0, (t->Mp - t->M) * E * sizeof(bf16));
    for (long m = 0; m < t->M; m += 32) {
        long seen = keys_seen(t, m + 31, G), tall = t->M - m < 32 ? t->M - m : 32;
        for (long s = 0; s < seen; s += PANEL) patch(E / STEP, q + m * E, E, keys + s * E, scores + s, t->Sp, 0);
        EACH_QUERY(row, m, tall) {
            float *at = lse ? lse + (t->start + i) * H + t->k * G + g : &unused;
            sums[row] = unscaled_softmax(scores + row * t->Sp, t->before + i + 1, seen, scaling, mass + row * t->Sp, at);
        }
        memset(mass + tall * t->Sp, 0, (32 - tall) * t->Sp * sizeof(bf16));
        for (long e = 0; e < E; e += PANEL) patch(seen / STEP, mass, t->Sp, values + e * t->Sp, mixed + e, E, 0);
        EACH_QUERY(row, m, tall) {
            bf16 *to = out + ((t->start + i) * H + t->k * G + g) * E;
            __m512 by = _mm512_set1_ps(1 / sums[row]);
            const float *from = mixed + row * E;
            for (long e = 0; e < E; e += 32)
                store_bf16(to + e, _mm512_mul_ps(_mm512_loadu_ps(from + e), by), _mm512_mul_ps(_mm512_loadu_ps(from + e + 16), by));
        }
    }
}

/* `attention`, shared among the threads that come here with tiles; they do not wait for each other at its end. */
static void attention_shared(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const bf16 *qkv, bf16 *out, float *lse) {
    static _Thread_local arena room;
    long N = H + 2 * K, G = H / K, tasks = (R + (P > 0)) * K;
#pragma omp for schedule(dynamic) nowait
    for (long task = 0; task < tasks; task++) {
        packed_task t = packed_task_of(task, P, R, starts, lengths, H, K);
        make_room(&room, t.Sp * (8 + 4 * E + 32 * 6) + 32 * E * 4 + t.Mp * E * 2 + 1024);
        const bf16 **rows = take(&room, t.S * sizeof(bf16 *));
        bf16 *keys = take(&room, t.Sp * E * 2), *values = take(&room, t.Sp * E * 2), *q = take(&room, t.Mp * E * 2);
        float *scores = take(&room, 32 * t.Sp * 4), *mixed = take(&room, 32 * E * 4);
        bf16 *mass = take(&room, 32 * t.Sp * 2);
        for (long s = 0; s < t.S; s++) rows[s] = qkv + (s < t.before ? s : t.start + s - t.before) * N * E;
        lay_rows(t.S, E, rows, (H + t.k) * E, keys);
        lay_columns(t.S, E, rows, (H + K + t.k) * E, values);
        attend_tiles(&t, H, G, N, E, qkv, keys, values, q, scores, mass, mixed, out, lse);
    }
}

void attention_tiles(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const bf16 *qkv, bf16 *out, float *lse) {
#pragma omp parallel
    {
        tiles_begin();
        attention_shared(P, R, starts, lengths, H, K, E, qkv, out, lse);
        _tile_release();
    }
}

/* `attention_backward`, shared likewise. between: of keys and values of the prefix, attention_between of them. */
static void attention_backward_shared(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const bf16 *qkv,
                                      const float *lse, const bf16 *grad, float *between, bf16 *grad_qkv) {
    static _Thread_local arena room;
    long N = H + 2 * K, G = H / K, tasks = (R + (P > 0)) * K;
    float scaling = 1 / sqrtf((float)E);
#pragma omp for schedule(dynamic)
    for (long task = 0; task < tasks; task++) {
        packed_task t = packed_task_of(task, P, R, starts, lengths, H, K);
        make_room(&room, t.Sp * (8 + 14 * E + 32 * 12 + CHUNK * 4) + 8 * CHUNK * E + 32 * E * 4 + 2048);
        const bf16 **rows = take(&room, t.S * sizeof(bf16 *)), *q_rows[CHUNK], *g_rows[CHUNK];
        bf16 *keys = take(&room, t.Sp * E * 2), *values = take(&room, t.Sp * E * 2), *key_columns = take(&room, t.Sp * E * 2);
        float *grad_k = take(&room, t.Sp * E * 4), *grad_v = take(&room, t.Sp * E * 4), *grad_q = take(&room, 32 * E * 4);
        float *scores = take(&room, 32 * t.Sp * 4), *slopes = take(&room, 32 * t.Sp * 4);
        bf16 *q = take(&room, CHUNK * E * 2), *of_out = take(&room, CHUNK * E * 2), *q_columns = take(&room, CHUNK * E * 2);
        bf16 *g_columns = take(&room, CHUNK * E * 2), *slope = take(&room, 32 * t.Sp * 2), *mass = take(&room, 32 * t.Sp * 2);
        bf16 *turned_p = take(&room, t.Sp * CHUNK * 2), *turned_slopes = take(&room, t.Sp * CHUNK * 2);
        for (long s = 0; s < t.S; s++) rows[s] = qkv + (s < t.before ? s : t.start + s - t.before) * N * E;
        lay_rows(t.S, E, rows, (H + t.k) * E, keys);
        lay_rows(t.S, E, rows, (H + K + t.k) * E, values);
        lay_columns(t.S, E, rows, (H + t.k) * E, key_columns);
        memset(grad_k, 0, t.Sp * E * sizeof(float));
        memset(grad_v, 0, t.Sp * E * sizeof(float));
        for (long from = 0; from < t.M; from += CHUNK) {
            long count = t.M - from < CHUNK ? t.M - from : CHUNK, blocks = steps(count), seen[CHUNK / 32];
            for (long m = 0; m < blocks * 32; m++) q_rows[m] = q + m * E, g_rows[m] = of_out + m * E;
            EACH_QUERY(m, from, count) {
                copy_row(E, qkv + ((t.start + i) * N + t.k * G + g) * E, q + m * E);
                copy_row(E, grad + ((t.start + i) * H + t.k * G + g) * E, of_out + m * E);
            }
            memset(q + count * E, 0, (blocks * 32 - count) * E * sizeof(bf16));
            memset(of_out + count * E, 0, (blocks * 32 - count) * E * sizeof(bf16));
            lay_columns(blocks * 32, E, q_rows, 0, q_columns);
            lay_columns(blocks * 32, E, g_rows, 0, g_columns);
            for (long b = 0; b < blocks; b++) {
                long m = 32 * b, all = seen[b] = keys_seen(&t, from + m + 31, G), tall = count - m < 32 ? count - m : 32;
                for (long s = 0; s < all; s += PANEL) patch(E / STEP, q + m * E, E, keys + s * E, scores + s, t.Sp, 0);
                for (long s = 0; s < all; s += PANEL) patch(E / STEP, of_out + m * E, E, values + s * E, slopes + s, t.Sp, 0);
                EACH_QUERY(row, from + m, tall) {
                    long at = row * t.Sp;
                    float sum = lse[(t.start + i) * H + t.k * G + g];
                    softmax_backward(scores + at, slopes + at, t.before + i + 1, all, scaling, sum, mass + at, slope + at);
                }
                memset(mass + tall * t.Sp, 0, (32 - tall) * t.Sp * sizeof(bf16));
                memset(slope + tall * t.Sp, 0, (32 - tall) * t.Sp * sizeof(bf16));
                turn(mass, t.Sp, all, turned_p + m, CHUNK);
                turn(slope, t.Sp, all, turned_slopes + m, CHUNK);
                for (long e = 0; e < E; e += PANEL) patch(all / STEP, slope, t.Sp, key_columns + e * t.Sp, grad_q + e, E, 0);
                EACH_QUERY(row, from + m, tall) {
                    bf16 *to = grad_qkv + ((t.start + i) * N + t.k * G + g) * E;
                    const float *at = grad_q + row * E;
                    __m512 by = _mm512_set1_ps(scaling);
                    for (long e = 0; e < E; e += 32)
                        store_bf16(to + e, _mm512_mul_ps(_mm512_loadu_ps(at + e), by), _mm512_mul_ps(_mm512_loadu_ps(at + e + 16), by));
                }
            }
            for (long s = 0, b = 0; s < seen[blocks - 1]; s += 32) {
                while (seen[b] <= s) b++; /* queries before this block see none of these keys */
                for (long e = 0; e < E; e += PANEL) {
                    long at = e * blocks * STEP + b * SQUARE;
                    patch(blocks - b, turned_slopes + s * CHUNK + 32 * b, CHUNK, q_columns + at, grad_k + s * E + e, E, 1);
                    patch(blocks - b, turned_p + s * CHUNK + 32 * b, CHUNK, g_columns + at, grad_v + s * E + e, E, 1);
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

static long attention_between(long P, long R, long K, long E) { return 2 * (R + 1) * K * P * E; }

void attention_tiles_backward(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const bf16 *qkv, const float *lse,
                              const bf16 *grad, bf16 *grad_qkv) {
    float *between = malloc((attention_between(P, R, K, E) + 1) * sizeof(float));
#pragma omp parallel
    {
        tiles_begin();
        attention_backward_shared(P, R, starts, lengths, H, K, E, qkv, lse, grad, between, grad_qkv);
        _tile_release();
    }
    free(between);
}
#endif
