/* Prompts, and steps of many rows, through all layers, with the adapters of each, in bf16. Sums, and what goes from layer to layer,
   are fp32. Rows are taken in strips of 32. */
#include "attention_bf16.h"
#include "adapters_int8.h"
#include "decode_attention.h"
#include "elementwise.h"

#ifdef TILED
#define QUERIES 64 /* tokens whose queries form one task of attention */

#define FEW 8 /* rows of a strip up to which an adapter is multiplied without tiles */

/* The adapters of strip m are of[first[m]] to of[first[m + 1] - 1]. Each such pair of strip and adapter has `many` rows (32) of the strip. h (pairs,
   32, h_row) is A x: with few rows in 16 bits with scale (pairs, 32); else in bf16, with the ranks of each part filled up to 32 by zeros, and zero for
   the rows of others. */
typedef struct {
    const adapter *adapters;
    long *first, *of, *many, *rows, h_row;
    int16_t *h;
    float *scale;
} strip_adapters;

static strip_adapters strip_adapters_of(long T, long N, const adapter *adapters, const long *members, long indices) {
    long strips = (T + PANEL - 1) / PANEL, most = T + 1, *own = malloc(T * sizeof(long));
    strip_adapters all = {adapters, calloc(strips + 1, sizeof(long)), malloc(most * sizeof(long)), calloc(most, sizeof(long)), malloc(most * PANEL * sizeof(long))};
    for (long t = 0; t < T; t++) own[t] = -1;
    for (long n = 0; n < N; n++)
        for (long m = adapters[n].first; m < adapters[n].last; m++) own[members[m]] = n;
    for (long m = 0, pairs = 0; m < strips; m++) {
        for (long t = m * PANEL; t < T && t < (m + 1) * PANEL; t++) {
            if (own[t] < 0) continue;
            long pair = all.first[m];
            while (pair < pairs && all.of[pair] != own[t]) pair++;
            if (pair == pairs) all.of[pairs++] = own[t];
            all.rows[pair * PANEL + all.many[pair]++] = t % PANEL;
        }
        all.first[m + 1] = pairs;
    }
    free(own);
    for (const adapter *one = adapters; one < adapters + N; one++)
        for (long index = 0; index < indices; index++) {
            long wide = 0;
            for (long p = 0; p < one->products[index].parts; p++) wide += padded_to_steps(2 * one->products[index].part[p].pairs);
            all.h_row = wide > all.h_row ? wide : all.h_row;
        }
    all.h = aligned_alloc(64, all.first[strips] * PANEL * all.h_row * sizeof(int16_t) + 64);
    all.scale = malloc(all.first[strips] * PANEL * sizeof(float) + 1);
    return all;
}

static void free_strip_adapters(strip_adapters *all) {
    free(all->first);
    free(all->of);
    free(all->many);
    free(all->rows);
    free(all->h);
    free(all->scale);
}

/* Sixteen pairs of a block, multiplied by their scales, as bf16. */
static inline __attribute__((always_inline)) void block_bf16(const int8_t *from, vector low, vector high, bf16 *to) {
    vector left = (vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
    vector right = (vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from + WIDTH))));
    store_bf16(to, (__m512)(left * low), (__m512)(right * high));
}

/* h = A x of one strip for an adapter that has few of its rows. */
static void shrink_few(const strip_adapters *all, long pair, long index, long K, const bf16 *a) {
    const adapter *one = all->adapters + all->of[pair];
    const adapter_product *own = one->products + index;
    const long *rows = all->rows + pair * PANEL, many = all->many[pair];
    static _Thread_local scratch_arena space;
    reserve(&space, K * sizeof(float) + PANEL * K * sizeof(int16_t) + PANEL * own->ranks * sizeof(float) + 256);
    float scale[PANEL], *x = take(&space, K * sizeof(float)), *h = take(&space, PANEL * own->ranks * sizeof(float));
    int16_rows given = {take(&space, PANEL * K * sizeof(int16_t)), scale};
    int16_rows to = {all->h + pair * PANEL * all->h_row, all->scale + pair * PANEL};
    for (long i = 0; i < many; i++) {
        for (long k = 0; k < K; k++) x[k] = from_bf16(a[rows[i] * K + k]);
        quantize_int16(&given, rows[i], K, K, x);
    }
    for (long tile = 0; tile * WIDTH < own->ranks; tile++) {
        const int8_t *A = one->weights + own->A + tile * BLOCK_BYTES(K);
        long r = 0;
        for (; r + 4 <= many; r += 4) shrink_rows(4, rows + r, K, A, &given, h + tile * WIDTH, own->ranks);
        for (; r < many; r++) shrink_rows(1, rows + r, K, A, &given, h + tile * WIDTH, own->ranks);
    }
    for (long i = 0; i < many; i++) quantize_int16(&to, rows[i], all->h_row, own->ranks, h + rows[i] * own->ranks);
}

/* h = A x of one strip (32, K) and one adapter. */
static void shrink_strip(const strip_adapters *all, long pair, long index, long K, const bf16 *a) {
    const adapter *one = all->adapters + all->of[pair];
    const adapter_product *own = one->products + index;
    const long *rows = all->rows + pair * PANEL, many = all->many[pair];
    if (!own->ranks) return;
    if (many <= FEW) {
        shrink_few(all, pair, index, K, a);
        return;
    }
    bf16 *h = (bf16 *)all->h + pair * PANEL * all->h_row, tile[TILE] __attribute__((aligned(64)));
    float sums[PANEL * own->ranks] __attribute__((aligned(64)));
    vector once = (vector){0} + 1;
    tile_sums held;
    for (long first = 0; first < own->ranks; first += WIDTH) {
        const int8_t *A = one->weights + own->A + first / WIDTH * BLOCK_BYTES(K);
        tiles_clear(&held);
        for (long k = 0; k < K / STEP; k++) {
            for (long i = 0; i < 16; i++) block_bf16(A + SCALES + (k * 16 + i) * 2 * WIDTH, once, once, tile + i * STEP);
            written_for_tiles(tile);
            tile_step(&held, 32, 16, a + k * STEP, K, tile);
        }
        tiles_stored(&held, 32, 16, sums + first, own->ranks);
        for (long r = 0; r < PANEL; r++) *(vector *)(sums + r * own->ranks + first) *= *(const vector *)A;
    }
    memset(h, 0, PANEL * all->h_row * sizeof(bf16));
    for (long i = 0; i < many; i++) {
        bf16 *to = h + rows[i] * all->h_row;
        for (long p = 0; p < own->parts; p++) {
            const float *from = sums + rows[i] * own->ranks + own->part[p].rank;
            for (long rank = 0; rank < 2 * own->part[p].pairs; rank++) to[rank] = to_bf16(from[rank]);
            to += padded_to_steps(2 * own->part[p].pairs);
        }
    }
}

/* Decodes group g of sixteen outputs to a tile of a panel. */
static inline __attribute__((always_inline)) void dequantize_group(int bits, long g, const quantized_tile *from, bf16 *tile) {
    __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const uint8_t *q = from->q + g * bits * 4 * WIDTH;
    vector d[2], m[2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) group_scales(bits, g, half, from->scale, from->minimum, d + half, m + half);
#pragma GCC unroll 8
    for (int i = 0; i < bits; i++) __builtin_prefetch(q + i * 4 * WIDTH + PREFETCH_BYTES);
#pragma GCC unroll 8
    for (int i = 0; i < QUADS; i++) {
        words found = group_codes(bits, q, i);
        __m512 four[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) four[j] = (__m512)(__builtin_convertvector((integers)(found >> 8 * j & 255), vector) * d[i / 4] + m[i / 4]);
#pragma GCC unroll 2
        for (int j = 0; j < 4; j += 2) {
            __m512i both = as_bf16(four[j], four[j + 1]);
            _mm512_storeu_si512(tile + (i * 2 + j / 2) * STEP, _mm512_permutexvar_epi16(pairs, both));
        }
    }
}

/* Decodes panel p of such a weight. */
static void dequantize_panel(const quantized_weight *w, long p, bf16 *to) {
    long G = w->I / GROUP;
    for (long o = p * PANEL; o < (p + 1) * PANEL; o += WIDTH) {
        quantized_tile from = {0};
        if (o < w->O) from = tile_of(w, o);
        for (long g = 0; g < G; g++) {
            bf16 *tile = to + g * 2 * TILE + o % PANEL / WIDTH * TILE;
            switch (from.bits) {
            case 4: dequantize_group(4, g, &from, tile); break;
            case 5: dequantize_group(5, g, &from, tile); break;
            case 6: dequantize_group(6, g, &from, tile); break;
            case 8: dequantize_group(8, g, &from, tile); break;
            default: memset(tile, 0, TILE * sizeof(bf16)); /* O may end in the middle of a panel */
            }
        }
    }
}

/* Adds what a pair of few rows changes in outputs o to o + 31. */
static void expand_few(const strip_adapters *all, long pair, long index, long o, float *sums) {
    const adapter *one = all->adapters + all->of[pair];
    const adapter_product *own = one->products + index;
    const int16_t *h = all->h + pair * PANEL * all->h_row;
    for (long p = 0; p < own->parts; p++) {
        long first = own->part[p].first, pairs = own->part[p].pairs;
        if (o < first || o >= first + own->part[p].width) continue;
        const int8_t *B = one->weights + own->part[p].B + (o - first) / WIDTH * BLOCK_BYTES(2 * pairs);
        for (long half = 0; half < PANEL; half += WIDTH, B += BLOCK_BYTES(2 * pairs))
            expand_all_rows(0, all->many[pair], all->rows + pair * PANEL, pairs, B, h + own->part[p].rank, all->h_row, all->scale + pair * PANEL, sums + half,
                         PANEL);
    }
}

/* Multiplies outputs o to o + 31 of a pair's rows by the adapter's scale. */
static void scale_pair(const strip_adapters *all, long pair, long index, long o, float *sums) {
    const float *scale = all->adapters[all->of[pair]].products[index].scale;
    for (long i = 0; scale && i < all->many[pair]; i++) {
        vector *row = (vector *)(sums + all->rows[pair * PANEL + i] * PANEL);
        row[0] *= *(const vector *)(scale + o);
        row[1] *= *(const vector *)(scale + o + WIDTH);
    }
}

/* Packs sixteen outputs of a part's B, from rank pair `from` on, as a tile. */
static void pack_outputs(const int8_t *B, long from, bf16 *tile) {
    __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0), scale = _mm512_loadu_si512(B);
    vector low = (vector)_mm512_permutexvar_epi32(twice, scale), high = (vector)_mm512_permutexvar_epi32(_mm512_add_epi32(twice, _mm512_set1_epi32(8)), scale);
    for (long i = 0; i < 16; i++) block_bf16(B + SCALES + (from + i) * 2 * WIDTH, low, high, tile + i * STEP);
}

/* Multiplies a strip of x by a panel of outputs o to o + 31, and adds what adapters change, with sums (32, 32). ahead: prefetch the panels that
   follow. */
static void panel_gemm_block(const strip_adapters *all, long m, long index, long o, long K, const bf16 *a, const bf16 *panel, int ahead, float *sums) {
    tile_sums held;
    tiles_clear(&held);
    for (long k = 0; k < K / STEP; k++, panel += 2 * TILE) {
        if (ahead)
            for (long i = 0; i < 2 * TILE; i += 32) __builtin_prefetch(panel + 16 * TILE + i, 0, 2);
        tile_step(&held, 32, 32, a + k * STEP, K, panel);
    }
    for (long pair = all->first[m]; pair < all->first[m + 1]; pair++) {
        if (all->many[pair] <= FEW) continue;
        const adapter *one = all->adapters + all->of[pair];
        const adapter_product *own = one->products + index;
        const bf16 *h = (const bf16 *)all->h + pair * PANEL * all->h_row;
        for (long p = 0; p < own->parts; p++) {
            long first = own->part[p].first, ranks = 2 * own->part[p].pairs;
            const int8_t *B = one->weights + own->part[p].B + (o - first) / WIDTH * BLOCK_BYTES(ranks);
            if (o >= first && o < first + own->part[p].width)
                for (long k = 0; k < steps_of(ranks); k++) {
                    /* a tile of fewer than 32 ranks reads beyond them, where h is zero */
                    bf16 tiles[2][TILE] __attribute__((aligned(64)));
                    pack_outputs(B, k * 16, tiles[0]);
                    pack_outputs(B + BLOCK_BYTES(ranks), k * 16, tiles[1]);
                    written_for_tiles(tiles[0]);
                    tile_step(&held, 32, 32, h + k * STEP, all->h_row, tiles[0]);
                }
            h += padded_to_steps(ranks);
        }
    }
    tiles_stored(&held, 32, 32, sums, PANEL);
    for (long pair = all->first[m]; pair < all->first[m + 1]; pair++) {
        if (all->many[pair] <= FEW) expand_few(all, pair, index, o, sums);
        scale_pair(all, pair, index, o, sums);
    }
}

/* What follows x W' (T, N): it is stored in bf16; or added to `sum`; or stored in `sum`; or its left half gates its right half, stored in bf16. */
typedef enum { STORE_BF16, ADD_TO_SUM, STORE_FP32, APPLY_SWIGLU } gemm_epilogue;

static void apply_epilogue(gemm_epilogue what, long tall, long wide, const float *sums, const float *up, bf16 *c, float *sum, long row) {
    for (long r = 0; r < tall; r++) {
        __m512 left = _mm512_load_ps(sums + r * PANEL), right = _mm512_load_ps(sums + r * PANEL + 16);
        if (what == ADD_TO_SUM) {
            float *to = sum + r * row;
            _mm512_storeu_ps(to, _mm512_add_ps(left, _mm512_loadu_ps(to)));
            _mm512_storeu_ps(to + 16, _mm512_add_ps(right, _mm512_loadu_ps(to + 16)));
            continue;
        }
        if (what == STORE_FP32) {
            _mm512_mask_storeu_ps(sum + r * row, mask16(wide), left);
            _mm512_mask_storeu_ps(sum + r * row + 16, mask16(wide - 16), right);
            continue;
        }
        if (what == APPLY_SWIGLU) {
            __m512 one = _mm512_set1_ps(1), none = _mm512_setzero_ps();
            __m512 l = _mm512_add_ps(one, exponentials(_mm512_sub_ps(none, left))), h = _mm512_add_ps(one, exponentials(_mm512_sub_ps(none, right)));
            left = _mm512_mul_ps(_mm512_div_ps(left, l), _mm512_load_ps(up + r * PANEL));
            right = _mm512_mul_ps(_mm512_div_ps(right, h), _mm512_load_ps(up + r * PANEL + 16));
        }
        store_bf16(c + r * row, left, right);
    }
}

/* One fused product of all rows; the calling threads share the work. a has whole strips; row: numbers of a row of c or of sum. Weights in 4 to 8 bits
   are decoded a few panels at a time, which stay in a core's cache while the strips are read. */
static void panel_gemm(gemm_epilogue what, const strip_adapters *all, long index, long T, const quantized_weight *w, const bf16 *a, bf16 *c, float *sum, long row) {
    static _Thread_local scratch_arena scratch;
    long K = w->I, strips = (T + PANEL - 1) / PANEL, apart = K * PANEL, panels = (w->O + PANEL - 1) / PANEL, twice = what == APPLY_SWIGLU;
    if (all->first[strips]) {
#pragma omp for schedule(dynamic)
        for (long pair = 0; pair < all->first[strips]; pair++) {
            long m = 0;
            while (all->first[m + 1] <= pair) m++;
            shrink_strip(all, pair, index, K, a + m * PANEL * K);
        }
    }
    if (twice) panels /= 2;
    long fit = CACHE_BYTES / (apart * (1 + twice) * (long)sizeof(bf16)), wanted = 8 * omp_get_num_threads();
    long across = fit < 1 ? panels : (panels + fit - 1) / fit;
    if (across < wanted) across = panels < wanted ? panels : wanted;
    int packed = w->part[0].bits == 16;
    reserve(&scratch, packed ? 0 : (panels / across + 1) * (1 + twice) * apart * sizeof(bf16));
    bf16 *made = (bf16 *)scratch.at;
#pragma omp for schedule(dynamic)
    for (long task = 0; task < across; task++) {
        float sums[2 * PANEL * PANEL] __attribute__((aligned(64)));
        long first = task * panels / across;
        for (long m = 0; m < strips; m++)
            for (long p = first; p < (task + 1) * panels / across; p++) {
                long at = m * PANEL * row + p * PANEL, tall = T - m * PANEL < PANEL ? T - m * PANEL : PANEL;
                for (long half = 0; half <= twice; half++) {
                    long own = half * panels + p, ahead = m == 0 && packed;
                    bf16 *panel = packed ? (bf16 *)w->part[0].q + own * apart : made + (strips > 1 ? (p - first) * (1 + twice) + half : 0) * apart;
                    if (m == 0 && !packed) dequantize_panel(w, own, panel);
                    panel_gemm_block(all, m, index, own * PANEL, K, a + m * PANEL * K, panel, ahead, sums + half * PANEL * PANEL);
                }
                apply_epilogue(what, tall, w->O - p * PANEL, sums, sums + PANEL * PANEL, c + at, sum + at, row);
            }
    }
}

/* Finishes a token's heads (bias, norms, rotation) and writes keys and values to `copies` places of the cache, at index `number`. */
static void write_to_cache(long l, const decoder_shape *s, const decoder_layer *own, const float *cosine, const float *sine, const cache_place *places, long copies,
                       long number, bf16 *heads) {
    long H = s->H, K = s->K, E = s->E;
    for (long n = 0; n < H + 2 * K; n++) {
        float x[E];
        for (long e = 0; e < E; e++) x[e] = from_bf16(heads[n * E + e]) + (own->bias ? own->bias[n * E + e] : 0);
        if (n < H + K) norm_and_rotate_head(E, n < H ? own->q_norm : own->k_norm, s->eps, cosine, sine, x);
        if (n < H)
            for (long e = 0; e < E; e++) heads[n * E + e] = to_bf16(x[e]);
        else for (const cache_place *one = places; one < places + copies; one++) {
                uint16_t *to = n < H + K ? one->k : one->v;
                to += l * one->layer_step + (n - H) % K * one->head_step + number * E;
                for (long e = 0; e < E; e += WIDTH) store_fp16(to + e, *(vector *)(x + e));
            }
    }
}

typedef struct { const prompt_piece *own; long head, from, to; } query_range;

/* Lists the tasks of attention: some queries of a piece and of a head. Returns how many there are. */
static long attention_tasks_of(long R, const prompt_piece *pieces, long K, query_range *to) {
    long count = 0;
    for (const prompt_piece *one = pieces; one < pieces + R; one++)
        for (long from = 0; from < one->length; from += QUERIES)
            for (long head = 0; head < K; head++, count++)
                if (to) to[count] = (query_range){one, head, from, from + QUERIES < one->length ? from + QUERIES : one->length};
    return count;
}

static void load_fp16_rows(long count, long E, const uint16_t *from, const bf16 **rows, bf16 *scratch) {
    for (long s = 0; s < count; s++) {
        rows[s] = scratch + s * E;
        for (long e = 0; e < E; e += 32) store_bf16(scratch + s * E + e, (__m512)load_fp16(from + s * E + e), (__m512)load_fp16(from + s * E + e + 16));
    }
}

/* The queries of one token, as in a decode step, which are too few for tiles. */
static void attend_one_query(long l, long G, long E, const cache_place *at, long head, long seen, const bf16 *q, bf16 *out) {
    static _Thread_local scratch_arena scratch;
    reserve(&scratch, (2 * G * E + G * PAD(seen)) * sizeof(float) + 256);
    float *own = take(&scratch, G * E * sizeof(float)), *mixed = take(&scratch, G * E * sizeof(float)), *scores = take(&scratch, G * PAD(seen) * sizeof(float));
    for (long i = 0; i < G * E; i++) own[i] = from_bf16(q[i]);
    attend_cached(1, G, E, at, l * at->layer_step + head * at->head_step, seen, own, mixed, scores);
    for (long i = 0; i < G * E; i++) out[i] = to_bf16(mixed[i]);
}

static void attend_task(long l, const decoder_shape *s, const cache_place *places, const query_range *task, const bf16 *qkv, bf16 *out) {
    static _Thread_local scratch_arena scratch;
    long H = s->H, K = s->K, E = s->E, N = H + 2 * K, G = H / K, L = task->to - task->from;
    long before = task->own->before + task->from, start = task->own->start + task->from, S = before + L;
    const cache_place *held = places + task->own->first;
    if (L == 1) {
        attend_one_query(l, G, E, held, task->head, S, qkv + (start * N + task->head * G) * E, out + (start * H + task->head * G) * E);
        return;
    }
    packed_task t = {0, task->head, before, start, L, S, padded_to_steps(S), L * G, padded_to_steps(L * G)};
    reserve(&scratch, t.Sp * (8 + 6 * E + 32 * 6) + 32 * E * 4 + t.Mp * E * 2 + 1024);
    const bf16 **rows = take(&scratch, S * sizeof(bf16 *));
    bf16 *plain = take(&scratch, S * E * 2), *keys = take(&scratch, t.Sp * E * 2), *values = take(&scratch, t.Sp * E * 2), *q = take(&scratch, t.Mp * E * 2);
    float *scores = take(&scratch, 32 * t.Sp * 4), *mixed = take(&scratch, 32 * E * 4);
    bf16 *mass = take(&scratch, 32 * t.Sp * 2);
    long at = l * held->layer_step + task->head * held->head_step;
    load_fp16_rows(S, E, (const uint16_t *)held->k + at, rows, plain);
    pack_rows(S, E, rows, 0, keys);
    load_fp16_rows(S, E, (const uint16_t *)held->v + at, rows, plain);
    pack_columns(S, E, rows, 0, values);
    attend_with_tiles(&t, H, G, N, E, qkv, keys, values, q, scores, mass, mixed, out, 0);
}

void prefill(long T, long R, const decoder_shape *s, const decoder_layer *layers, const long *tokens, const prompt_piece *pieces, const cache_place *places, long N,
                    const adapter *adapters, const long *members, float *out) {
    long D = s->D, H = s->H, K = s->K, E = s->E, I = s->I, L = s->layers, heads = H + 2 * K, strips = (T + PANEL - 1) / PANEL;
    strip_adapters all = strip_adapters_of(T, N, adapters, members, L * PRODUCTS);
    long count = attention_tasks_of(R, pieces, K, 0), widest = D > H * E ? D : H * E;
    query_range *tasks = malloc(count * sizeof(query_range));
    attention_tasks_of(R, pieces, K, tasks);
    const prompt_piece **piece_of = malloc(T * sizeof(prompt_piece *));
    for (const prompt_piece *one = pieces; one < pieces + R; one++)
        for (long i = 0; i < one->length; i++) piece_of[one->start + i] = one;
    bf16 *memory = aligned_alloc(64, strips * PANEL * (heads * E + widest + I) * sizeof(bf16));
    bf16 *qkv = memory, *in = qkv + strips * PANEL * heads * E, *gated = in + strips * PANEL * widest;
    memset(memory, 0, strips * PANEL * (heads * E + widest + I) * sizeof(bf16)); /* rows beyond T are read too */
    float *x = aligned_alloc(64, (T * (D + 2 * E) * sizeof(float) + 63) / 64 * 64), *cosine = x + T * D, *sine = cosine + T * E;
#pragma omp parallel
    {
        tiles_begin();
#pragma omp for schedule(static)
        for (long t = 0; t < T; t++) {
            memcpy(x + t * D, s->embedding + tokens[t] * D, D * sizeof(float));
            rotary_angles(s, piece_of[t]->before + t - piece_of[t]->start, cosine + t * E, sine + t * E);
        }
        for (long l = 0; l < L; l++) {
            const decoder_layer *own = layers + l;
#pragma omp for schedule(static)
            for (long t = 0; t < T; t++) add_norm_row_bfloat16(D, x + t * D, 0, own->attention_norm, s->eps, 0, in + t * D);
            panel_gemm(STORE_BF16, &all, l * PRODUCTS + QKV_PROJ, T, own->w + QKV_PROJ, in, qkv, 0, heads * E);
#pragma omp for schedule(static)
            for (long t = 0; t < T; t++) {
                const prompt_piece *its = piece_of[t];
                write_to_cache(l, s, own, cosine + t * E, sine + t * E, places + its->first, its->copies, its->before + t - its->start, qkv + t * heads * E);
            }
#pragma omp for schedule(dynamic)
            for (long task = count - 1; task >= 0; task--) attend_task(l, s, places, tasks + task, qkv, in);
            panel_gemm(ADD_TO_SUM, &all, l * PRODUCTS + O_PROJ, T, own->w + O_PROJ, in, 0, x, D);
#pragma omp for schedule(static)
            for (long t = 0; t < T; t++) add_norm_row_bfloat16(D, x + t * D, 0, own->mlp_norm, s->eps, 0, in + t * D);
            panel_gemm(APPLY_SWIGLU, &all, l * PRODUCTS + GATE_UP_PROJ, T, own->w + GATE_UP_PROJ, in, gated, 0, I);
            panel_gemm(ADD_TO_SUM, &all, l * PRODUCTS + DOWN_PROJ, T, own->w + DOWN_PROJ, gated, 0, x, D);
        }
#pragma omp for schedule(static)
        for (long t = 0; t < T; t++) add_norm_row_float32(D, x + t * D, 0, s->norm, s->eps, 0, out + t * D);
        tiles_end();
    }
    free(memory);
    free(x);
    free(piece_of);
    free(tasks);
    free_strip_adapters(&all);
}

void quantized_gemm_tiled(const quantized_weight *w, long T, const float *x, float *y) {
    long I = w->I;
    long strips = (T + PANEL - 1) / PANEL;
    strip_adapters none = strip_adapters_of(T, 0, 0, 0, 0);
    bf16 *a = aligned_alloc(64, strips * PANEL * I * sizeof(bf16));
    memset(a + T * I, 0, (strips * PANEL - T) * I * sizeof(bf16));
#pragma omp parallel
    {
        tiles_begin();
#pragma omp for schedule(static)
        for (long i = 0; i < T * I; i += 32) store_bf16(a + i, _mm512_loadu_ps(x + i), _mm512_loadu_ps(x + i + 16));
        panel_gemm(STORE_FP32, &none, 0, T, w, a, 0, y, w->O);
        tiles_end();
    }
    free(a);
    free_strip_adapters(&none);
}
#endif
