/* A frozen product with its LoRA matrices, forward and backward, in bf16. The numbers are those of elementwise.c and gemm_bf16.c, one
   operation after the other. Rows are taken in strips of 32: the input of a product is made strip by strip together with its share in A, and each block
   of results goes on at once to the operation that follows. */
#include "lora_bf16.h"
#include "elementwise.h"

#ifdef TILED
#define LOW 4 /* strips up to which all sums of a panel are kept together */

/* Writes n numbers, multiplied by scale, as bf16. */
static inline void scale_to_bf16(long n, const float *from, float scale, bf16 *to) {
    __m512 by = _mm512_set1_ps(scale);
    for (long i = 0; i < n; i += 16) {
        __m512 all = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask16(n - i), from + i), by);
        _mm256_mask_storeu_epi16(to + i, mask16(n - i), half_as_bf16(all));
    }
}

/* Forward packs A as panels of ranks, and B, scaled, as panels of outputs; backward packs A as panels of inputs, and B as panels of ranks. */
void pack_lora(const lora_product *p, int back, packed_lora to) {
    long R = p->R, wide = steps_of(R) * 2 * TILE;
    if (!R) return;
    bf16 part[PANEL * R];
#pragma omp for schedule(static) nowait
    for (long i = 0; i < p->I; i += PANEL) {
        for (long r = 0; r < R; r++) {
            FETCH(p->A + r * p->I + i + PANEL, 0);
            scale_to_bf16(PANEL, p->A + r * p->I + i, 1, part + r * PANEL);
        }
        gemm_operand f = {0, part, 0, back ? 1 : PANEL, back ? PANEL : 1, back ? R : PANEL};
        if (back) pack(&f, PANEL, 0, 1, to.A + i / PANEL * wide, 0);
        else pack(&f, R, 0, steps_of(R), to.A + i * PANEL, p->I * PANEL);
    }
#pragma omp for schedule(static) nowait
    for (long o = 0; o < p->O; o += PANEL) {
        memset(part, 0, sizeof part);
        bf16 *at = part;
        for (const lora_target *t = p->targets; t < p->targets + 3; at += t->rank, t++)
            for (long c = 0; c < PANEL; c++)
                if (o + c >= t->column && o + c < t->column + t->outputs) scale_to_bf16(t->rank, t->B + (o + c - t->column) * t->rank, t->scale, at + c * R);
        gemm_operand f = {0, part, 0, back ? 1 : R, back ? R : 1, back ? PANEL : R};
        if (back) pack(&f, R, 0, steps_of(R), to.B + o * PANEL, p->O * PANEL);
        else pack(&f, PANEL, 0, 1, to.B + o / PANEL * wide, 0);
    }
}

/* The steps of y that depend on 16 ranks from `rank` on. */
static void output_steps_of(const lora_product *p, long rank, long *first, long *last) {
    long from = 0;
    *first = p->O / STEP, *last = 0;
    for (const lora_target *t = p->targets; t < p->targets + 3; from += t->rank, t++)
        if (t->rank && from < rank + 16 && from + t->rank > rank) {
            if (t->column / STEP < *first) *first = t->column / STEP;
            if (steps_of(t->column + t->outputs) > *last) *last = steps_of(t->column + t->outputs);
        }
}

/* h of a strip: a (32, K) times panels of ranks, in rows of whole steps; transposed: the same as columns of Tp numbers, zero beyond `tall`. back: a
   is the gradient of y, and a rank reads its own target's outputs alone. */
void lora_shrink(const lora_product *p, int back, long tall, long K, const bf16 *a, const bf16 *panels, bf16 *h, bf16 *transposed, long Tp) {
    for (long rank = 0; rank < p->R; rank += PANEL, panels += K * PANEL) {
        float sums[SQUARE] __attribute__((aligned(64))) = {0};
        for (long half = 0; half < 2 && rank + half * 16 < p->R; half++) {
            long first = 0, last = K / STEP;
            if (back) output_steps_of(p, rank + half * 16, &first, &last);
            tile_gemm(32, 16, last - first, a + first * STEP, K, panels + first * SQUARE + half * TILE, sums + half * 16, PANEL, 0);
        }
        memset(sums + tall * PANEL, 0, (PANEL - tall) * PANEL * sizeof(float));
        for (long r = 0; r < PANEL; r++) store_bf16(h + r * padded_to_steps(p->R) + rank, _mm512_load_ps(sums + r * PANEL), _mm512_load_ps(sums + r * PANEL + 16));
        transpose_rows(h + rank, padded_to_steps(p->R), PANEL, transposed + rank * Tp, Tp);
    }
}

/* Does the same for drop(x), rows m to m + tall - 1. */
void lora_shrink_dropped(const training_pass *t, const lora_product *p, long m, long tall, const bf16 *x, packed_lora own, const workspace *w, const product_memory *to) {
    static _Thread_local scratch_arena scratch;
    if (!p->R) return;
    const bf16 *seen = x + m * p->I;
    if (t->kept) {
        reserve(&scratch, PANEL * p->I * 2);
        bf16 *kept = take(&scratch, PANEL * p->I * 2);
        draw_dropout(m * p->I, (m + tall) * p->I, p->seed, t->kept, x, kept, to->mask);
        seen = kept;
    }
    lora_shrink(p, 0, tall, p->I, seen, own.A, w->h + m * padded_to_steps(p->R), to->transposed + m, padded_to_steps(t->T));
}

/* 32 lines of memory, `row` bytes apart. */
typedef struct {
    const char *at;
    long row;
} lines;

/* Rows a (32, 32 count) and a panel of `count` steps. */
typedef struct {
    long count;
    const bf16 *a;
    long a_row;
    const bf16 *panel;
} span;

/* Multiplies two spans, with sums (32, 32). Meanwhile it prefetches lines that are read or written next, and at each step `more` lines of the next
   strip at `ahead`: waiting for them took a third of a product. */
static void multiply_spans(const span *s, float *sums, int add, int fetched, lines *l, long more, const char **ahead) {
    tile_sums held;
    long each = (PANEL + s->count - 1) / s->count, line = 0;
    if (add) tiles_loaded(&held, sums, PANEL);
    else tiles_clear(&held);
    for (long k = 0; k < s->count; k++) {
        for (long end = line + each; line < PANEL && line < end; line++)
            for (int i = 0; i < fetched; i++, l[i - 1].at += l[i - 1].row) __builtin_prefetch(l[i].at, 1);
        for (long i = 0; i < more; i++, *ahead += 64) __builtin_prefetch(*ahead, 0, 2);
        tile_step(&held, 32, 32, s->a + k * STEP, s->a_row, s->panel + k * SQUARE);
    }
    s++;
    for (long k = 0; k < s->count; k++) tile_step(&held, 32, 32, s->a + k * STEP, s->a_row, s->panel + k * SQUARE);
    tiles_stored(&held, 32, 32, sums, PANEL);
}

/* The number of groups for some units of work, of `bytes` of panels each; at least `wanted`. */
static long groups_of(long units, long bytes, long wanted) {
    long fit = CACHE_BYTES / bytes, across = fit < 1 ? units : (units + fit - 1) / fit;
    return across >= wanted ? across : units < wanted ? units : wanted;
}

static void apply_forward_epilogue(forward_epilogue what, const training_pass *t, const layer_memory *m, long at, long n, long tall, const float *sums, const float *from, float *to) {
    long E = t->E, N = t->H + 2 * t->K, D = t->D, I = t->I;
    for (long r = 0; r < tall; r++, sums += PANEL) {
        if (what == ADD) {
            long here = (at + r) * D + n * PANEL;
            __m512 left, right;
            as_floats(as_bf16(_mm512_load_ps(sums), _mm512_load_ps(sums + 16)), &left, &right);
            _mm512_storeu_ps(to + here, _mm512_add_ps(_mm512_loadu_ps(from + here), left));
            _mm512_storeu_ps(to + here + 16, _mm512_add_ps(_mm512_loadu_ps(from + here + 16), right));
        } else if (what == ROTATE) {
            bf16 head[E];
            for (long e = 0; e < E; e += PANEL) store_bf16(head + e, _mm512_load_ps(sums + e * PANEL), _mm512_load_ps(sums + e * PANEL + 16));
            long number = n * PANEL / E;
            rotate_row_bfloat16(1, number < t->H + t->K, E, head, t->cosine + (at + r) * E, t->sine + (at + r) * E, 1, m->qkv + ((at + r) * N + number) * E);
        } else {
            bf16 *gate = m->gate_up + (at + r) * 2 * I + n * PANEL;
            store_bf16(gate, _mm512_load_ps(sums), _mm512_load_ps(sums + 16));
            store_bf16(gate + I, _mm512_load_ps(sums + SQUARE), _mm512_load_ps(sums + SQUARE + 16));
        }
    }
}

/* The lines that apply_forward_epilogue reads and writes for panel n. */
static int prefetch_lines(forward_epilogue what, const training_pass *t, const layer_memory *m, long at, long n, const float *from, const float *to, lines *l) {
    long D = t->D, O = what == ROTATE ? (t->H + 2 * t->K) * t->E : 2 * t->I;
    if (what == ADD) {
        for (int half = 0; half < 2; half++) {
            long here = at * D + n * PANEL + half * 16;
            l[2 * half] = (lines){(const char *)(from + here), D * 4}, l[2 * half + 1] = (lines){(const char *)(to + here), D * 4};
        }
        return 4;
    }
    l[0] = (lines){(const char *)((what == ROTATE ? m->qkv : m->gate_up) + at * O + n * PANEL), O * 2};
    return 1;
}

/* The steps of h that panel n of the outputs depends on. */
static void rank_steps_of(const lora_product *p, long n, long *first, long *last) {
    long rank = 0;
    *first = *last = 0;
    for (const lora_target *t = p->targets; t < p->targets + 3; rank += t->rank, t++)
        if (t->rank && n * PANEL < t->column + t->outputs && (n + 1) * PANEL > t->column) {
            if (*last == 0) *first = rank / STEP;
            *last = steps_of(rank + t->rank);
        }
}

void product_forward(forward_epilogue what, const training_pass *t, const lora_product *p, entry in, const void *given, const bf16 *x, packed_lora own, const workspace *w,
                            const layer_memory *m, const float *from, float *to) {
    long I = p->I, apart = I * PANEL, ranks = steps_of(p->R), strips = steps_of(t->T), panels = p->O / PANEL;
    long count = what == ROTATE ? t->E / PANEL : what == SWIGLU ? 2 : 1, units = panels / count;
    int low = strips <= LOW; /* then a task has all strips; else it has one, and as many panels as stay in a cache while the strips are read */
    long threads = omp_get_num_threads(), wanted = low ? 8 * threads : (8 * threads + strips - 1) / strips, first, last;
    long across = groups_of(units, count * apart * sizeof(bf16), wanted), tasks = low ? across : across * strips;
    int at_once = !low && across == 1; /* a strip's input is made and used while it is in the cache */
    if (!at_once) {
#pragma omp for schedule(dynamic)
        for (long s = 0; s < t->T; s += PANEL) in(t, given, s);
    }
#pragma omp for schedule(dynamic)
    for (long task = 0; task < tasks; task++) {
        float sums[count * SQUARE] __attribute__((aligned(64)));
        long group = low ? task : task / strips, begin = group * units / across, end = (group + 1) * units / across;
        long more = low ? 0 : (PANEL + count * (end - begin) - 1) / (count * (end - begin));
        for (long s = low ? 0 : task % strips; s < (low ? strips : task % strips + 1); s++) {
            long tall = tall_of(t->T, s * PANEL);
            const char *ahead = (const char *)(x + (s + threads) * PANEL * I);
            if (at_once) in(t, given, s * PANEL);
            for (long unit = begin; unit < end; unit++) {
                for (long i = 0; i < count; i++) {
                    long n = what == SWIGLU ? unit + i * units : unit * count + i;
                    lines l[4];
                    int fetched = prefetch_lines(what, t, m, s * PANEL, n, from, to, l);
                    rank_steps_of(p, n, &first, &last);
                    const bf16 *h = w->h + s * PANEL * padded_to_steps(p->R) + first * STEP;
                    span spans[2] = {{I / STEP, x + s * PANEL * I, I, p->packed + n * apart},
                                     {last - first, h, padded_to_steps(p->R), own.B + (n * ranks + first) * SQUARE}};
                    multiply_spans(spans, sums + i * SQUARE, 0, fetched, l, more, &ahead);
                }
                apply_forward_epilogue(what, t, m, s * PANEL, what == SWIGLU ? unit : unit * count, tall, sums, from, to);
            }
            for (long r = s * PANEL; what == SWIGLU && r < s * PANEL + tall; r++) {
                const bf16 *gate = m->gate_up + r * 2 * t->I + begin * PANEL;
                swiglu_line_bfloat16((end - begin) * PANEL, gate, gate + t->I, m->gated + r * t->I + begin * PANEL);
            }
        }
    }
}

/* Writes the gradient of x, panel n of a strip, from sums (32, 32) and, with dropout, the share of the adapter; `row` numbers from row to row. */
static void apply_backward_epilogue(const training_pass *t, const lora_product *p, long s, long n, float *sums, packed_lora own, const workspace *w, const product_memory *m,
                             bf16 *to, long row) {
    long I = p->I, R = padded_to_steps(p->R);
    float share[SQUARE] __attribute__((aligned(64)));
    int drops = R && t->kept;
    __m512 scale = _mm512_set1_ps(drops ? 4294967296.0f / t->kept : 1), left, right, more, again;
    if (drops) tile_gemm(32, 32, R / STEP, w->h + s * PANEL * R, R, own.A + n * R * PANEL, share, PANEL, 0);
    for (long r = 0; r < tall_of(t->T, s * PANEL); r++) {
        __m512i found = as_bf16(_mm512_load_ps(sums + r * PANEL), _mm512_load_ps(sums + r * PANEL + 16));
        if (drops) {
            bf16 update[PANEL];
            store_bf16(update, _mm512_load_ps(share + r * PANEL), _mm512_load_ps(share + r * PANEL + 16));
            as_floats(apply_dropout(m->mask + (s * PANEL + r) * I / 32 + n, scale, update), &left, &right);
            as_floats(found, &more, &again);
            found = as_bf16(_mm512_add_ps(more, left), _mm512_add_ps(again, right));
        }
        _mm512_storeu_si512(to + r * row, found);
    }
}

static void add_block(long tall, const float *sums, float *to, long row) {
    for (long r = 0; r < tall; r++)
        for (long i = 0; i < PANEL; i++) to[r * row + i] += sums[r * PANEL + i];
}

/* Adds to 32 columns of the gradient of A: the columns of the gradient of h times drop(x). */
static void add_to_A(const training_pass *t, const lora_product *p, long n, const bf16 *x, const uint32_t *mask, const bf16 *transposed, long shift, bf16 *panel) {
    long T = t->T, I = p->I, Tp = padded_to_steps(T), words = I / 32;
    float sums[SQUARE] __attribute__((aligned(64))), *to = (float *)((char *)p->A + shift) + n * PANEL;
    __m512i low = _mm512_loadu_si512(interleave[0]), high = _mm512_loadu_si512(interleave[1]), none = _mm512_setzero_si512();
    __m512 scale = _mm512_set1_ps(mask ? 4294967296.0f / t->kept : 1);
    for (long s = 0; s < Tp; s += 2) {
        const uint32_t *at = mask ? mask + s * words + n : 0;
        __builtin_prefetch(x + (s + ROWS_AHEAD) * I + n * PANEL);
        __builtin_prefetch(x + (s + ROWS_AHEAD + 1) * I + n * PANEL);
        __m512i even = s < T ? apply_dropout(at, scale, x + s * I + n * PANEL) : none;
        __m512i odd = s + 1 < T ? apply_dropout(at ? at + words : 0, scale, x + (s + 1) * I + n * PANEL) : none;
        bf16 *row = panel + s / STEP * SQUARE + s % STEP / 2 * STEP;
        _mm512_store_si512(row, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_store_si512(row + TILE, _mm512_permutex2var_epi16(even, high, odd));
    }
    for (long r = 0; r < p->R; r += PANEL) {
        if (p->R - r > 16) tile_gemm(32, 32, Tp / STEP, transposed + r * Tp, Tp, panel, sums, PANEL, 0);
        else tile_gemm(16, 32, Tp / STEP, transposed + r * Tp, Tp, panel, sums, PANEL, 0);
        add_block(p->R - r < PANEL ? p->R - r : PANEL, sums, to + r * I, I);
    }
}

/* to (columns, row) += scale times the transpose of sums (32, 32), for columns `from` to end - 1 and the first `ranks` rows. */
static void add_turned(const float *sums, long from, long end, long ranks, long row, float *to, float scale) {
    __m512 by = _mm512_set1_ps(scale);
    for (long c = 0; c < PANEL; c += 16)
        for (long r = 0; r < PANEL && r < ranks; r += 16) {
            __m512i block[16];
            for (long i = 0; i < 16; i++) block[i] = _mm512_load_si512(sums + (r + i) * PANEL + c);
            transpose(block);
            for (long i = 0; i < 16; i++)
                if (c + i >= from && c + i < end) {
                    float *at = to + (c + i) * row + r;
                    __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask16(ranks - r), at), _mm512_mul_ps((__m512)block[i], by));
                    _mm512_mask_storeu_ps(at, mask16(ranks - r), sum);
                }
        }
}

/* Adds to 32 outputs of the gradients of the Bs: the columns of h times the gradient of y. */
static void add_to_B(const training_pass *t, const lora_product *p, long n, const bf16 *grad, const bf16 *transposed, long shift, bf16 *panel) {
    long Tp = padded_to_steps(t->T), rank = 0, o = n * PANEL;
    float sums[SQUARE] __attribute__((aligned(64)));
    gemm_operand f = {0, grad + o, 0, 1, p->O, t->T};
    int packed = 0;
    for (const lora_target *one = p->targets; one < p->targets + 3; rank += one->rank, one++) {
        long from = one->column > o ? one->column : o, end = one->column + one->outputs < o + PANEL ? one->column + one->outputs : o + PANEL;
        if (!one->rank || from >= end) continue;
        if (!packed++) pack(&f, PANEL, 0, 1, panel, 0);
        for (long r = 0; r < one->rank; r += PANEL) {
            if (one->rank - r > 16) tile_gemm(32, 32, Tp / STEP, transposed + (rank + r) * Tp, Tp, panel, sums, PANEL, 0);
            else tile_gemm(16, 32, Tp / STEP, transposed + (rank + r) * Tp, Tp, panel, sums, PANEL, 0);
            add_turned(sums, from - o, end - o, one->rank - r, one->rank, (float *)((char *)one->B + shift) + (o - one->column) * one->rank + r, one->scale);
        }
    }
}

/* From grad (T, O) through W and A to grad_x, or through SwiGLU to grad_gate_up, or to neither; and to the gradients of A and of the Bs, `shift`
   bytes behind these. */
void product_backward(const training_pass *t, const lora_product *p, const bf16 *grad, packed_lora own, const workspace *w, const bf16 *x, const product_memory *m,
                             long shift, bf16 *grad_x, const bf16 *gate_up, bf16 *grad_gate_up) {
    static _Thread_local scratch_arena scratch;
    long I = p->I, O = p->O, R = padded_to_steps(p->R), strips = steps_of(t->T), panels = I / PANEL, low = strips <= LOW;
    long across = low ? panels : groups_of(panels, O * PANEL * sizeof(bf16), 2 * omp_get_num_threads());
    long part = low ? RUN : O / STEP, most = (panels + across - 1) / across;
    reserve(&scratch, (most * (part + 1) * SQUARE + padded_to_steps(t->T) * PANEL) * sizeof(bf16) + 256);
    bf16 *to = take(&scratch, most * part * SQUARE * sizeof(bf16)), *panel = take(&scratch, padded_to_steps(t->T) * PANEL * sizeof(bf16));
    bf16 *gated = take(&scratch, most * SQUARE * sizeof(bf16));
    const uint32_t *mask = t->kept ? m->mask : 0;
#pragma omp for schedule(dynamic) nowait
    for (long task = 0; task < across; task++) {
        float sums[LOW * SQUARE] __attribute__((aligned(64)));
        long first = task * panels / across, last = (task + 1) * panels / across, more = low ? 0 : (PANEL + last - first - 1) / (last - first);
        for (long k = 0; (grad_x || gate_up) && k < O / STEP; k += part) {
            long here = O / STEP - k < part ? O / STEP - k : part;
            gemm_operand f = {0, p->packed + k * panels * SQUARE, 0, -1, -1, here * STEP};
            pack_transposed(&f, I, first, last, to, part * SQUARE);
            for (long s = 0; s < strips; s++) {
                int end = k + here == O / STEP;
                const char *ahead = (const char *)(grad + (s + 1) * PANEL * O);
                for (long n = first; n < last; n++) {
                    float *own_sums = sums + (low ? s : 0) * SQUARE;
                    long at = s * PANEL * I + n * PANEL, gate = at + s * PANEL * I;
                    lines l[4] = {{(const char *)(grad_x + at), I * 2}, {(const char *)(mask + at / 32), I / 8}};
                    for (int half = 0; gate_up && half < 2; half++) {
                        l[2 * half] = (lines){(const char *)(gate_up + gate + half * I), I * 4};
                        l[2 * half + 1] = (lines){(const char *)(grad_gate_up + gate + half * I), I * 4};
                    }
                    span spans[2] = {{here, grad + s * PANEL * O + k * STEP, O, to + (n - first) * part * SQUARE},
                                     {end && !mask ? R / STEP : 0, w->h + s * PANEL * R, R, own.A + n * R * PANEL}};
                    multiply_spans(spans, own_sums, k > 0, !end ? 0 : gate_up ? 4 : mask ? 2 : 1, l, more, &ahead);
                    bf16 *found = gate_up ? gated + (n - first) * PANEL : grad_x + at;
                    if (end) apply_backward_epilogue(t, p, s, n, own_sums, own, w, m, found, gate_up ? most * PANEL : I);
                }
                for (long r = 0; gate_up && end && r < tall_of(t->T, s * PANEL); r++) {
                    long at = (s * PANEL + r) * 2 * I + first * PANEL;
                    swiglu_backward_line_bfloat16((last - first) * PANEL, gate_up + at, gate_up + at + I, gated + r * most * PANEL, grad_gate_up + at,
                                                  grad_gate_up + at + I);
                }
            }
        }
    }
#pragma omp for schedule(dynamic, 2)
    for (long n = 0; n < (p->R ? panels + O / PANEL : 0); n++)
        if (n < panels) add_to_A(t, p, n, x, mask, w->transposed, shift, panel);
        else add_to_B(t, p, n - panels, grad, m->transposed, shift, panel);
}
#endif
