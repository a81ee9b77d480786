/* The decoder's layers for training an adapter, forward and backward. All threads go through the layers together and wait for each other at the end
   of each phase. */
#include "lora_bf16.h"
#include "elementwise.h"

#ifdef TILED
static product_memory product_memory_of(scratch_arena *scratch, const training_pass *t, const lora_product *p) {
    product_memory m = {take(scratch, t->kept && p->R ? t->T * p->I / 8 : 0), 0};
    m.transposed = take(scratch, padded_to_steps(t->T) * (padded_to_steps(p->R) + PANEL) * 2);
    return m;
}

static layer_memory layer_memory_of(char *memory, const training_pass *t, const train_layer *l, long *bytes) {
    scratch_arena scratch = {memory, 0, 0};
    layer_memory m;
    long T = t->T, rows = padded_to_steps(T) * 2; /* left operands have whole strips */
    m.middle = take(&scratch, T * t->D * 4), m.scale = take(&scratch, T * 4), m.middle_scale = take(&scratch, T * 4), m.lse = take(&scratch, T * t->H * 4);
    m.normed = take(&scratch, rows * t->D), m.qkv = take(&scratch, rows * l->qkv.O), m.mixed = take(&scratch, rows * l->o.I);
    m.middle_normed = take(&scratch, rows * t->D), m.gate_up = take(&scratch, rows * 2 * t->I), m.gated = take(&scratch, rows * t->I);
    m.of_qkv = product_memory_of(&scratch, t, &l->qkv), m.of_o = product_memory_of(&scratch, t, &l->o);
    m.of_gate_up = product_memory_of(&scratch, t, &l->gate_up), m.of_down = product_memory_of(&scratch, t, &l->down);
    if (bytes) *bytes = scratch.taken;
    return m;
}

void train_layers_bytes(const training_pass *t, const train_layer *layers, long *bytes) {
    for (long l = 0; l < t->L; l++) layer_memory_of(0, t, layers + l, bytes + l);
}

static packed_lora packed_lora_of(scratch_arena *scratch, const lora_product *p) {
    packed_lora s = {take(scratch, padded_to_steps(p->R) * p->I * 2), 0};
    s.B = take(scratch, padded_to_steps(p->R) * p->O * 2);
    return s;
}

static workspace workspace_of(scratch_arena *scratch, const training_pass *t, const train_layer *l) {
    workspace w = {packed_lora_of(scratch, &l->qkv), packed_lora_of(scratch, &l->o), packed_lora_of(scratch, &l->gate_up), packed_lora_of(scratch, &l->down), 0, 0};
    long most = l->qkv.R;
    for (const lora_product *p = &l->o; p <= &l->down; p++) most = p->R > most ? p->R : most;
    w.h = take(scratch, padded_to_steps(t->T) * padded_to_steps(most) * 2);
    w.transposed = take(scratch, padded_to_steps(t->T) * padded_to_steps(most) * 2);
    return w;
}

static void pack_layer_loras(const train_layer *l, int back, const workspace *w) {
    pack_lora(&l->qkv, back, w->qkv);
    pack_lora(&l->o, back, w->o);
    pack_lora(&l->gate_up, back, w->gate_up);
    pack_lora(&l->down, back, w->down);
}

typedef struct {
    const train_layer *own;
    const layer_memory *m;
    const workspace *w;
} layer_pass;

static void norm_in(const training_pass *t, const lora_product *p, long s, const float *x, const float *weight, float *scale, bf16 *normed, packed_lora own,
                    const workspace *w, const product_memory *to) {
    for (long r = s; r < s + tall_of(t->T, s); r++) scale[r] = add_norm_row_bfloat16(t->D, x + r * t->D, 0, weight, t->eps, 0, normed + r * t->D);
    lora_shrink_dropped(t, p, s, tall_of(t->T, s), normed, own, w, to);
}

static void qkv_in(const training_pass *t, const void *given, long s) {
    const layer_pass *at = given;
    norm_in(t, &at->own->qkv, s, at->own->x, at->own->attention_norm, at->m->scale, at->m->normed, at->w->qkv, at->w, &at->m->of_qkv);
}

static void o_in(const training_pass *t, const void *given, long s) {
    const layer_pass *at = given;
    lora_shrink_dropped(t, &at->own->o, s, tall_of(t->T, s), at->m->mixed, at->w->o, at->w, &at->m->of_o);
}

static void gate_up_in(const training_pass *t, const void *given, long s) {
    const layer_pass *at = given;
    norm_in(t, &at->own->gate_up, s, at->m->middle, at->own->mlp_norm, at->m->middle_scale, at->m->middle_normed, at->w->gate_up, at->w,
            &at->m->of_gate_up);
}

static void down_in(const training_pass *t, const void *given, long s) {
    const layer_pass *at = given;
    lora_shrink_dropped(t, &at->own->down, s, tall_of(t->T, s), at->m->gated, at->w->down, at->w, &at->m->of_down);
}

/* One layer, by all threads: from its x to `out`, the x of the next layer, whose A and B are packed meanwhile (both may be null). */
static void layer_forward(const training_pass *t, const train_layer *l, const layer_memory *m, const workspace *w, float *out, const train_layer *next,
                        const workspace *next_w) {
    layer_pass at = {l, m, w};
    product_forward(ROTATE, t, &l->qkv, qkv_in, &at, m->normed, w->qkv, w, m, 0, 0);
    attention_shared(t->P, t->R, t->starts, t->lengths, t->H, t->K, t->E, m->qkv, m->mixed, m->lse);
    if (next) pack_layer_loras(next, 0, next_w);
#pragma omp barrier
    product_forward(ADD, t, &l->o, o_in, &at, m->mixed, w->o, w, m, l->x, m->middle);
    product_forward(SWIGLU, t, &l->gate_up, gate_up_in, &at, m->middle_normed, w->gate_up, w, m, 0, 0);
    product_forward(ADD, t, &l->down, down_in, &at, m->gated, w->down, w, m, m->middle, out);
}

/* Reserves `count` workspaces that are large enough for every layer, and `bytes` beside them. */
static char *reserve_workspaces(scratch_arena *scratch, const training_pass *t, const train_layer *layers, int count, long bytes, long *apart) {
    *apart = 0;
    for (long l = 0; l < t->L; l++) {
        scratch_arena one = {0};
        workspace_of(&one, t, layers + l);
        *apart = one.taken > *apart ? one.taken : *apart;
    }
    reserve(scratch, count * *apart + bytes);
    return take(scratch, count * *apart);
}

static workspace workspace_at(const training_pass *t, const train_layer *l, char *at) {
    scratch_arena one = {at, 0, 0};
    return workspace_of(&one, t, l);
}

void train_layers_forward(const training_pass *t, const train_layer *layers, float *out) {
    static _Thread_local scratch_arena scratch;
    long apart;
    char *places = reserve_workspaces(&scratch, t, layers, 2, 0, &apart);
#pragma omp parallel
    {
        tiles_begin();
        workspace w = workspace_at(t, layers, places);
        pack_layer_loras(layers, 0, &w);
#pragma omp barrier
        for (long l = 0; l < t->L; l++) {
            const train_layer *own = layers + l, *next = l + 1 < t->L ? own + 1 : 0;
            layer_memory m = layer_memory_of(own->memory, t, own, 0);
            workspace next_w = next ? workspace_at(t, next, places + (l + 1) % 2 * apart) : w;
            layer_forward(t, own, &m, &w, next ? next->x : out, next, &next_w);
            w = next_w;
        }
        tiles_end();
    }
}

/* The gradients of what is between products. along: of the layer's output, then of its input; sum: the same in bf16. */
typedef struct {
    float *along, *middle, *between;
    bf16 *sum, *gate_up, *normed, *o, *mixed, *rotated, *qkv;
} gradients;

static gradients gradients_of(scratch_arena *scratch, const training_pass *t, const train_layer *l) {
    gradients g;
    long T = t->T, D = t->D, rows = padded_to_steps(T) * 2;
    g.along = take(scratch, T * D * 4), g.middle = take(scratch, T * D * 4), g.between = take(scratch, attention_between(t->P, t->R, t->K, t->E) * 4);
    g.sum = take(scratch, rows * D), g.gate_up = take(scratch, rows * 2 * t->I), g.normed = take(scratch, rows * D), g.o = take(scratch, rows * D);
    g.mixed = take(scratch, rows * l->o.I), g.rotated = take(scratch, rows * l->qkv.O), g.qkv = take(scratch, rows * l->qkv.O);
    return g;
}

/* The gradient of h of a strip, from that of y. */
static void lora_shrink_gradient(const training_pass *t, const lora_product *p, long s, const bf16 *grad, packed_lora own, const workspace *w) {
    if (p->R) lora_shrink(p, 1, tall_of(t->T, s), p->O, grad + s * p->O, own.B, w->h + s * padded_to_steps(p->R), w->transposed + s, padded_to_steps(t->T));
}

/* The gradients of a layer, by all threads: from that of h of its last product to that of x, and to that of h of the last product of the layer below.
   */
static void layer_backward(const training_pass *t, const train_layer *l, const layer_memory *m, const workspace *w, const gradients *g, long shift, float *grad_x,
                       const train_layer *below, const workspace *below_w) {
    long T = t->T, D = t->D, E = t->E, N = t->H + 2 * t->K;
    product_backward(t, &l->down, g->sum, w->down, w, m->gated, &m->of_down, shift, 0, m->gate_up, g->gate_up);
#pragma omp for schedule(dynamic)
    for (long s = 0; s < T; s += PANEL) lora_shrink_gradient(t, &l->gate_up, s, g->gate_up, w->gate_up, w);
    product_backward(t, &l->gate_up, g->gate_up, w->gate_up, w, m->middle_normed, &m->of_gate_up, shift, g->normed, 0, 0);
#pragma omp for schedule(dynamic)
    for (long s = 0; s < T; s += PANEL) {
        for (long r = s; r < s + tall_of(T, s); r++)
            add_norm_backward_row_bfloat16(D, m->middle + r * D, m->middle_scale[r], l->mlp_norm, g->normed + r * D, g->along + r * D,
                                           g->middle + r * D, g->o + r * D);
        lora_shrink_gradient(t, &l->o, s, g->o, w->o, w);
    }
    product_backward(t, &l->o, g->o, w->o, w, m->mixed, &m->of_o, shift, g->mixed, 0, 0);
    if (below) pack_layer_loras(below, 1, below_w);
    attention_backward_shared(t->P, t->R, t->starts, t->lengths, t->H, t->K, E, m->qkv, m->lse, g->mixed, g->between, g->rotated);
#pragma omp for schedule(dynamic)
    for (long s = 0; s < T; s += PANEL) {
        for (long r = s; r < s + tall_of(T, s); r++)
            rotate_row_bfloat16(N, t->H + t->K, E, g->rotated + r * N * E, t->cosine + r * E, t->sine + r * E, -1, g->qkv + r * N * E);
        lora_shrink_gradient(t, &l->qkv, s, g->qkv, w->qkv, w);
    }
    product_backward(t, &l->qkv, g->qkv, w->qkv, w, m->normed, &m->of_qkv, shift, grad_x ? g->normed : 0, 0, 0);
    if (!grad_x) return;
#pragma omp for schedule(dynamic)
    for (long s = 0; s < T; s += PANEL) {
        for (long r = s; r < s + tall_of(T, s); r++)
            add_norm_backward_row_bfloat16(D, l->x + r * D, m->scale[r], l->attention_norm, g->normed + r * D, g->middle + r * D, grad_x + r * D,
                                           g->sum + r * D);
        if (below) lora_shrink_gradient(t, &below->down, s, g->sum, below_w->down, below_w);
    }
}

void train_layers_backward(const training_pass *t, const train_layer *layers, const float *grad, long shift, float *grad_x) {
    static _Thread_local scratch_arena scratch;
    scratch_arena rest = {0};
    gradients_of(&rest, t, layers);
    long apart, T = t->T, D = t->D, L = t->L;
    char *places = reserve_workspaces(&scratch, t, layers, 3, rest.taken, &apart);
    gradients g = gradients_of(&scratch, t, layers);
#pragma omp parallel
    {
        tiles_begin();
        const train_layer *top = layers + L - 1;
        workspace w = workspace_at(t, top, places + (L - 1) % 2 * apart);
        pack_layer_loras(top, 1, &w);
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (long s = 0; s < T; s += PANEL) {
            memcpy(g.along + s * D, grad + s * D, tall_of(T, s) * D * sizeof(float));
            for (long i = s * D; i < (s + tall_of(T, s)) * D; i += 32) store_bf16(g.sum + i, _mm512_loadu_ps(grad + i), _mm512_loadu_ps(grad + i + 16));
            lora_shrink_gradient(t, &top->down, s, g.sum, w.down, &w);
        }
        for (long l = L - 1; l >= 0; l--) {
            const train_layer *own = layers + l, *below = l ? own - 1 : 0;
            layer_memory m = layer_memory_of(own->memory, t, own, 0);
            if (t->again) {
                workspace again = workspace_at(t, own, places + 2 * apart);
                pack_layer_loras(own, 0, &again);
#pragma omp barrier
                layer_forward(t, own, &m, &again, g.middle, 0, 0);
            }
            workspace below_w = below ? workspace_at(t, below, places + (l + 1) % 2 * apart) : w;
            layer_backward(t, own, &m, &w, &g, shift, below ? g.along : grad_x, below, &below_w);
            w = below_w;
        }
        tiles_end();
    }
}
#endif
