/* A layer of the decoder to train an adapter on, there and back, in bf16 on AMX's tiles; kernels.c includes this once, behind attention.h.

   The same operations as kernels.h and matrix.h have, one after the other, with what backward needs of them in one piece of memory. */

#if defined(__AMX_BF16__) && defined(__linux__)
/* A target's B (outputs, rank), or its gradient, which answers for the columns from `column` on. */
typedef struct {
    float *B;
    long column, outputs, rank;
    double scale;
} target;

/* A frozen product y = x W' + drop(x) A' (scale B)' with W (O, I) as panels and the stacked A (R, I), the targets' ranks one after the other. */
typedef struct {
    const bf16 *laid;
    float *A;
    long O, I, R, seed;
    target targets[3];
} adapted;

/* kept: of 2^32 numbers, by dropout; 0 where there is none. */
typedef struct {
    long D, H, K, E, kept;
    double eps;
    const float *attention_norm, *mlp_norm;
    adapted qkv, o, gate_up, down;
} trained_layer;

/* What backward needs of a product: A and all B, scaled, as they were multiplied; what dropout kept; x A'. */
typedef struct {
    bf16 *A, *B, *h;
    uint32_t *mask;
} product_memory;

typedef struct {
    float *x, *scale, *middle_scale, *lse;
    bf16 *normed, *qkv, *mixed, *middle_normed, *gate_up, *gated;
    product_memory of_qkv, of_o, of_gate_up, of_down;
} layer_memory;

/* drop(x), and which numbers it keeps; as kernels.h has it. */
static void draw(long size, long seed, long kept, const bf16 *x, bf16 *out, uint32_t *mask) {
    words sixteen = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    __m512i most = _mm512_set1_epi32((int)(kept - 1));
    __m512 scale = _mm512_set1_ps(4294967296.0f / kept), left, right;
#pragma omp parallel for schedule(static) private(left, right) if (size > SERIAL)
    for (long i = 0; i < size; i += 32) {
        __mmask32 within = size - i < 32 ? (1u << (size - i)) - 1 : ~0u, keeps = 0;
        for (int half = 0; half < 2; half++) {
            words h = hash_words(sixteen + (uint32_t)(i + 16 * half), (uint32_t)seed);
            keeps |= (__mmask32)_mm512_cmple_epu32_mask((__m512i)h, most) << 16 * half;
        }
        mask[i / 32] = keeps &= within;
        as_floats(_mm512_maskz_loadu_epi16(keeps, x + i), &left, &right);
        _mm512_mask_storeu_epi16(out + i, within, as_bf16(_mm512_mul_ps(left, scale), _mm512_mul_ps(right, scale)));
    }
}

/* seen = drop(x) and sum += drop(u), by what was drawn. */
static void redraw(long size, long kept, const uint32_t *mask, const bf16 *x, const bf16 *u, bf16 *seen, bf16 *sum) {
    __m512 scale = _mm512_set1_ps(4294967296.0f / kept), left, right, more, again;
#pragma omp parallel for schedule(static) private(left, right, more, again) if (size > SERIAL)
    for (long i = 0; i < size; i += 32) {
        __mmask32 within = size - i < 32 ? (1u << (size - i)) - 1 : ~0u;
        as_floats(_mm512_maskz_loadu_epi16(mask[i / 32], x + i), &left, &right);
        _mm512_mask_storeu_epi16(seen + i, within, as_bf16(_mm512_mul_ps(left, scale), _mm512_mul_ps(right, scale)));
        if (!sum) continue;
        as_floats(_mm512_maskz_loadu_epi16(mask[i / 32], u + i), &left, &right);
        as_floats(as_bf16(_mm512_mul_ps(left, scale), _mm512_mul_ps(right, scale)), &left, &right);
        as_floats(_mm512_maskz_loadu_epi16(within, sum + i), &more, &again);
        _mm512_mask_storeu_epi16(sum + i, within, as_bf16(_mm512_add_ps(more, left), _mm512_add_ps(again, right)));
    }
}

/* matrix_product, where left operands have spare rows behind them, as all in this file have. */
static void spare_product(long M, long N, long K, const bf16 *a, long a_row, const bf16 *b, long b_n, long b_k, long K2, const bf16 *a2, long a2_row,
                          const bf16 *b2, long b2_n, long b2_k, void *c, long c_row, long wide) {
    factor f[2] = {{a, b, a_row, b_n, b_k, K, 0, 1}, {a2, b2, a2_row, b2_n, b2_k, K2, 0, 1}};
    multiply_factors(M, N, f, c, c_row, wide);
}

/* Numbers of T rows of `row` numbers, and of the spare ones. */
static inline long spared(long T, long row) { return (T + PANEL - 1) * row; }

static product_memory remember_product(arena *room, const adapted *p, long T, long kept) {
    product_memory m = {take(room, p->R * p->I * 2), take(room, p->O * p->R * 2), take(room, spared(T, p->R) * 2), 0};
    m.mask = take(room, kept && p->R ? (T * p->I + 31) / 32 * 4 : 0);
    return m;
}

static layer_memory remember(arena *room, const trained_layer *l, long T) {
    layer_memory m;
    m.x = take(room, T * l->D * 4), m.scale = take(room, T * 4), m.middle_scale = take(room, T * 4);
    m.lse = take(room, T * l->H * 4), m.normed = take(room, spared(T, l->D) * 2), m.qkv = take(room, T * l->qkv.O * 2);
    m.mixed = take(room, spared(T, l->o.I) * 2), m.middle_normed = take(room, spared(T, l->D) * 2), m.gate_up = take(room, T * l->gate_up.O * 2);
    m.gated = take(room, spared(T, l->down.I) * 2);
    m.of_qkv = remember_product(room, &l->qkv, T, l->kept), m.of_o = remember_product(room, &l->o, T, l->kept);
    m.of_gate_up = remember_product(room, &l->gate_up, T, l->kept), m.of_down = remember_product(room, &l->down, T, l->kept);
    return m;
}

/* Bytes that a layer remembers of T tokens. */
void layer_bytes(long T, const trained_layer *l, long *bytes) {
    arena none = {0};
    remember(&none, l, T);
    *bytes = none.taken;
}

static void product_forward(long T, const adapted *p, long kept, const bf16 *x, const product_memory *m, bf16 *seen, bf16 *y) {
    long I = p->I, O = p->O, R = p->R;
    if (R) {
#pragma omp parallel
        {
#pragma omp for schedule(static) nowait
            for (long i = 0; i < R * I; i++) m->A[i] = to_bf16(p->A[i]);
#pragma omp for schedule(static)
            for (long o = 0; o < O; o++) {
                bf16 *to = m->B + o * R;
                memset(to, 0, R * sizeof(bf16));
                for (const target *t = p->targets; t < p->targets + 3; to += t->rank, t++)
                    if (o >= t->column && o < t->column + t->outputs)
                        for (long r = 0; r < t->rank; r++) to[r] = to_bf16(t->B[(o - t->column) * t->rank + r] * (float)t->scale);
            }
        }
        if (kept) draw(T * I, p->seed, kept, x, seen, m->mask);
        spare_product(T, R, I, kept ? seen : x, I, m->A, I, 1, 0, 0, 0, 0, 0, 0, m->h, R, 0);
    }
    spare_product(T, O, I, x, I, p->laid, 0, 0, R, m->h, R, m->B, R, 1, y, O, 0);
}

/* from (M, N) as (N, M). */
static void turned(long M, long N, const bf16 *from, bf16 *to) {
    for (long m = 0; m < M; m++)
        for (long n = 0; n < N; n++) to[n * M + m] = from[m * N + n];
}

/* into (O, R) = scale times the transpose of from (R, O). */
static void scatter(long O, long R, const float *from, float scale, float *into) {
    __m512 by = _mm512_set1_ps(scale);
#pragma omp parallel for schedule(static) if (O * R > SERIAL)
    for (long o = 0; o < O; o += 16)
        for (long r = 0; r < R; r += 16) {
            __m512i block[16];
            for (long i = 0; i < 16; i++)
                block[i] = r + i < R ? (__m512i)_mm512_mul_ps(_mm512_maskz_loadu_ps(first(O - o), from + (r + i) * O + o), by) : _mm512_setzero_si512();
            transpose(block);
            for (long i = 0; i < 16 && o + i < O; i++) _mm512_mask_storeu_epi32(into + (o + i) * R + r, first(R - r), block[i]);
        }
}

/* The gradients of x (may be absent), and those of A and the Bs to where `to` says. */
static void product_backward(long T, const adapted *p, const adapted *to, long kept, const bf16 *x, const product_memory *m, const bf16 *grad,
                             bf16 *grad_x) {
    long I = p->I, O = p->O, R = p->R, row = 0;
    static _Thread_local arena room;
    make_room(&room, spared(T, 2 * R + 4 * I) + 2 * spared(R, 2 * T) + R * O * 4 + 512);
    bf16 *grad_h = take(&room, spared(T, R) * 2), *turned_grad = take(&room, spared(R, T) * 2), *turned_h = take(&room, spared(R, T) * 2);
    bf16 *seen = take(&room, T * I * 2), *update = take(&room, T * I * 2);
    float *grad_B = take(&room, R * O * 4);
    if (R) spare_product(T, R, O, grad, O, m->B, 1, R, 0, 0, 0, 0, 0, 0, grad_h, R, 0);
    if (grad_x) spare_product(T, I, O, grad, O, p->laid, -1, -1, kept ? 0 : R, grad_h, R, m->A, 1, I, grad_x, I, 0);
    if (!R) return;
    turned(T, R, grad_h, turned_grad);
    turned(T, R, m->h, turned_h);
    if (kept) {
        if (grad_x) spare_product(T, I, R, grad_h, R, m->A, 1, I, 0, 0, 0, 0, 0, 0, update, I, 0);
        redraw(T * I, kept, m->mask, x, update, seen, grad_x);
    }
    spare_product(R, I, T, turned_grad, T, kept ? seen : x, 1, I, 0, 0, 0, 0, 0, 0, to->A, I, 1);
    for (int i = 0; i < 3; row += p->targets[i++].rank) {
        target t = p->targets[i];
        if (!t.rank) continue;
        spare_product(t.rank, t.outputs, T, turned_h + row * T, T, grad + t.column, 1, O, 0, 0, 0, 0, 0, 0, grad_B, t.outputs, 1);
        scatter(t.outputs, t.rank, grad_B, t.scale, to->targets[i].B);
    }
}

/* x (T, D) fp32, and what is added to it first (may be absent), become middle (T, D) and what is added to that, sum (T, D) bf16. P, R, starts and
   lengths as `attention` has them; cos and sin (T, E). memory: layer_bytes of it. */
void layer_forward(long T, const trained_layer *l, char *memory, long P, long R, const long *starts, const long *lengths, const float *cosine,
                   const float *sine, const float *x, const bf16 *added, float *middle, bf16 *sum) {
    arena kept = {memory, 0, 0};
    layer_memory m = remember(&kept, l, T);
    static _Thread_local arena room;
    long D = l->D, N = l->H + 2 * l->K, widest = l->qkv.O > l->down.I ? l->qkv.O : l->down.I;
    make_room(&room, spared(T, 2 * (2 * widest + D)) + 256);
    bf16 *seen = take(&room, spared(T, widest) * 2), *between = take(&room, T * widest * 2), *out = take(&room, T * D * 2);
    if (!added) memcpy(m.x, x, T * D * sizeof(float));
    add_norm_bfloat16(T, D, x, added, l->attention_norm, l->eps, m.x, m.normed, m.scale);
    product_forward(T, &l->qkv, l->kept, m.normed, &m.of_qkv, seen, between);
    rotate_bfloat16(T, N, l->H + l->K, l->E, between, cosine, sine, 1, m.qkv);
    attention_tiles(P, R, starts, lengths, l->H, l->K, l->E, m.qkv, m.mixed, m.lse);
    product_forward(T, &l->o, l->kept, m.mixed, &m.of_o, seen, out);
    add_norm_bfloat16(T, D, m.x, out, l->mlp_norm, l->eps, middle, m.middle_normed, m.middle_scale);
    product_forward(T, &l->gate_up, l->kept, m.middle_normed, &m.of_gate_up, seen, m.gate_up);
    swiglu_bfloat16(T, l->down.I, m.gate_up, m.gated);
    product_forward(T, &l->down, l->kept, m.gated, &m.of_down, seen, sum);
}

/* Gradients: `along` what reaches middle, `grad` what reaches sum; grad_x and grad_added may be absent; those of the adapter where `to` says. */
void layer_backward(long T, const trained_layer *l, const trained_layer *to, char *memory, long P, long R, const long *starts, const long *lengths,
                    const float *cosine, const float *sine, const float *middle, const float *along, const bf16 *grad, float *grad_x, bf16 *grad_added) {
    arena kept = {memory, 0, 0};
    layer_memory m = remember(&kept, l, T);
    static _Thread_local arena room;
    long D = l->D, N = l->H + 2 * l->K, I = l->down.I;
    make_room(&room, spared(T, 6 * I + 4 * l->qkv.O + 10 * D + 2 * l->o.I) + 1024);
    bf16 *grad_gated = take(&room, T * I * 2), *grad_gate_up = take(&room, spared(T, 2 * I) * 2), *grad_normed = take(&room, T * D * 2);
    bf16 *grad_sum = take(&room, spared(T, D) * 2), *grad_o = take(&room, spared(T, D) * 2), *grad_mixed = take(&room, T * l->o.I * 2);
    bf16 *grad_turned = take(&room, T * l->qkv.O * 2), *grad_qkv = take(&room, spared(T, l->qkv.O) * 2);
    float *grad_middle = take(&room, T * D * 4);
    memcpy(grad_sum, grad, T * D * sizeof(bf16));
    product_backward(T, &l->down, &to->down, l->kept, m.gated, &m.of_down, grad_sum, grad_gated);
    swiglu_backward_bfloat16(T, I, m.gate_up, grad_gated, grad_gate_up);
    product_backward(T, &l->gate_up, &to->gate_up, l->kept, m.middle_normed, &m.of_gate_up, grad_gate_up, grad_normed);
    add_norm_backward_bfloat16(T, D, middle, m.middle_scale, l->mlp_norm, grad_normed, along, grad_middle, grad_o);
    product_backward(T, &l->o, &to->o, l->kept, m.mixed, &m.of_o, grad_o, grad_mixed);
    attention_tiles_backward(P, R, starts, lengths, l->H, l->K, l->E, m.qkv, m.lse, grad_mixed, grad_turned);
    rotate_bfloat16(T, N, l->H + l->K, l->E, grad_turned, cosine, sine, -1, grad_qkv);
    product_backward(T, &l->qkv, &to->qkv, l->kept, m.normed, &m.of_qkv, grad_qkv, grad_x ? grad_normed : 0);
    if (grad_x) add_norm_backward_bfloat16(T, D, m.x, m.scale, l->attention_norm, grad_normed, grad_middle, grad_x, grad_added);
}
#endif
