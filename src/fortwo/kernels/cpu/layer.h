/* The layers of the decoder to train an adapter on, there and back; kernels.c includes this once, behind adapted.h. All threads go through them
   together and wait for each other at the end of each phase. */

#ifdef AMX
/* x: what goes in (T, D); memory: layers_bytes of it, which all layers may share that are computed again when their gradients are wanted. */
typedef struct {
    float *x;
    char *memory;
    const float *attention_norm, *mlp_norm;
    adapted qkv, o, gate_up, down;
} trained_layer;

static product_memory remember_product(arena *room, const training *t, const adapted *p) {
    product_memory m = {take(room, t->kept && p->R ? t->T * p->I / 8 : 0), 0};
    m.turned = take(room, filled(t->T) * (filled(p->R) + PANEL) * 2);
    return m;
}

static layer_memory remember(char *memory, const training *t, const trained_layer *l, long *bytes) {
    arena room = {memory, 0, 0};
    layer_memory m;
    long T = t->T, rows = filled(T) * 2; /* left operands have whole strips */
    m.middle = take(&room, T * t->D * 4), m.scale = take(&room, T * 4), m.middle_scale = take(&room, T * 4), m.lse = take(&room, T * t->H * 4);
    m.normed = take(&room, rows * t->D), m.qkv = take(&room, rows * l->qkv.O), m.mixed = take(&room, rows * l->o.I);
    m.middle_normed = take(&room, rows * t->D), m.gate_up = take(&room, rows * 2 * t->I), m.gated = take(&room, rows * t->I);
    m.of_qkv = remember_product(&room, t, &l->qkv), m.of_o = remember_product(&room, t, &l->o);
    m.of_gate_up = remember_product(&room, t, &l->gate_up), m.of_down = remember_product(&room, t, &l->down);
    if (bytes) *bytes = room.taken;
    return m;
}

/* Bytes of each layer's memory. */
void layers_bytes(const training *t, const trained_layer *layers, long *bytes) {
    for (long l = 0; l < t->L; l++) remember(0, t, layers + l, bytes + l);
}

static sides sides_of(arena *room, const adapted *p) {
    sides s = {take(room, filled(p->R) * p->I * 2), 0};
    s.B = take(room, filled(p->R) * p->O * 2);
    return s;
}

static workplace workplace_of(arena *room, const training *t, const trained_layer *l) {
    workplace w = {sides_of(room, &l->qkv), sides_of(room, &l->o), sides_of(room, &l->gate_up), sides_of(room, &l->down), 0, 0};
    long most = l->qkv.R;
    for (const adapted *p = &l->o; p <= &l->down; p++) most = p->R > most ? p->R : most;
    w.h = take(room, filled(t->T) * filled(most) * 2);
    w.turned = take(room, filled(t->T) * filled(most) * 2);
    return w;
}

static void lay_all_sides(const trained_layer *l, int back, const workplace *w) {
    lay_sides(&l->qkv, back, w->qkv);
    lay_sides(&l->o, back, w->o);
    lay_sides(&l->gate_up, back, w->gate_up);
    lay_sides(&l->down, back, w->down);
}

typedef struct {
    const trained_layer *own;
    const layer_memory *m;
    const workplace *w;
} passing;

static void norm_in(const training *t, const adapted *p, long s, const float *x, const float *weight, float *scale, bf16 *normed, sides own,
                    const workplace *w, const product_memory *to) {
    for (long r = s; r < s + tall_of(t->T, s); r++) scale[r] = add_norm_row_bfloat16(t->D, x + r * t->D, 0, weight, t->eps, 0, normed + r * t->D);
    dropped_in(t, p, s, tall_of(t->T, s), normed, own, w, to);
}

static void qkv_in(const training *t, const void *given, long s) {
    const passing *at = given;
    norm_in(t, &at->own->qkv, s, at->own->x, at->own->attention_norm, at->m->scale, at->m->normed, at->w->qkv, at->w, &at->m->of_qkv);
}

static void o_in(const training *t, const void *given, long s) {
    const passing *at = given;
    dropped_in(t, &at->own->o, s, tall_of(t->T, s), at->m->mixed, at->w->o, at->w, &at->m->of_o);
}

static void gate_up_in(const training *t, const void *given, long s) {
    const passing *at = given;
    norm_in(t, &at->own->gate_up, s, at->m->middle, at->own->mlp_norm, at->m->middle_scale, at->m->middle_normed, at->w->gate_up, at->w,
            &at->m->of_gate_up);
}

static void down_in(const training *t, const void *given, long s) {
    const passing *at = given;
    dropped_in(t, &at->own->down, s, tall_of(t->T, s), at->m->gated, at->w->down, at->w, &at->m->of_down);
}

/* A layer, by all threads: from its x to `out`, which is the x of the next one, whose sides are laid meanwhile (both may be absent). */
static void layer_there(const training *t, const trained_layer *l, const layer_memory *m, const workplace *w, float *out, const trained_layer *next,
                        const workplace *next_w) {
    passing at = {l, m, w};
    product_forward(TURNED, t, &l->qkv, qkv_in, &at, m->normed, w->qkv, w, m, 0, 0);
    attention_shared(t->P, t->R, t->starts, t->lengths, t->H, t->K, t->E, m->qkv, m->mixed, m->lse);
    if (next) lay_all_sides(next, 0, next_w);
#pragma omp barrier
    product_forward(SUMMED, t, &l->o, o_in, &at, m->mixed, w->o, w, m, l->x, m->middle);
    product_forward(SWISHED, t, &l->gate_up, gate_up_in, &at, m->middle_normed, w->gate_up, w, m, 0, 0);
    product_forward(SUMMED, t, &l->down, down_in, &at, m->gated, w->down, w, m, m->middle, out);
}

/* Workplaces, large enough for each layer, and what else a pass needs: bytes. */
static char *make_places(arena *room, const training *t, const trained_layer *layers, int count, long bytes, long *apart) {
    *apart = 0;
    for (long l = 0; l < t->L; l++) {
        arena one = {0};
        workplace_of(&one, t, layers + l);
        *apart = one.taken > *apart ? one.taken : *apart;
    }
    make_room(room, count * *apart + bytes);
    return take(room, count * *apart);
}

static workplace place_of(const training *t, const trained_layer *l, char *at) {
    arena one = {at, 0, 0};
    return workplace_of(&one, t, l);
}

/* x of the first layer through all of them to out (T, D). */
void layers_forward(const training *t, const trained_layer *layers, float *out) {
    static _Thread_local arena room;
    long apart;
    char *places = make_places(&room, t, layers, 2, 0, &apart);
#pragma omp parallel
    {
        tiles_begin();
        workplace w = place_of(t, layers, places);
        lay_all_sides(layers, 0, &w);
#pragma omp barrier
        for (long l = 0; l < t->L; l++) {
            const trained_layer *own = layers + l, *next = l + 1 < t->L ? own + 1 : 0;
            layer_memory m = remember(own->memory, t, own, 0);
            workplace next_w = next ? place_of(t, next, places + (l + 1) % 2 * apart) : w;
            layer_there(t, own, &m, &w, next ? next->x : out, next, &next_w);
            w = next_w;
        }
        _tile_release();
    }
}

/* The gradients of what lies between products. along: of what comes after the layer, then of what goes into it; sum: the same in bf16. */
typedef struct {
    float *along, *middle, *between;
    bf16 *sum, *gate_up, *normed, *o, *mixed, *rotated, *qkv;
} slopes;

static slopes slopes_of(arena *room, const training *t, const trained_layer *l) {
    slopes g;
    long T = t->T, D = t->D, rows = filled(T) * 2;
    g.along = take(room, T * D * 4), g.middle = take(room, T * D * 4), g.between = take(room, attention_between(t->P, t->R, t->K, t->E) * 4);
    g.sum = take(room, rows * D), g.gate_up = take(room, rows * 2 * t->I), g.normed = take(room, rows * D), g.o = take(room, rows * D);
    g.mixed = take(room, rows * l->o.I), g.rotated = take(room, rows * l->qkv.O), g.qkv = take(room, rows * l->qkv.O);
    return g;
}

/* The gradient of h of a strip, of that of y. */
static void back_in(const training *t, const adapted *p, long s, const bf16 *grad, sides own, const workplace *w) {
    if (p->R) strip_in(p, 1, tall_of(t->T, s), p->O, grad + s * p->O, own.B, w->h + s * filled(p->R), w->turned + s, filled(t->T));
}

/* A layer's gradients, by all threads, from that of h of its last product to that of x, and of h of the last product of the layer below it. */
static void layer_back(const training *t, const trained_layer *l, const layer_memory *m, const workplace *w, const slopes *g, long shift, float *grad_x,
                       const trained_layer *below, const workplace *below_w) {
    long T = t->T, D = t->D, E = t->E, N = t->H + 2 * t->K;
    product_backward(t, &l->down, g->sum, w->down, w, m->gated, &m->of_down, shift, 0, m->gate_up, g->gate_up);
#pragma omp for schedule(dynamic)
    for (long s = 0; s < T; s += PANEL) back_in(t, &l->gate_up, s, g->gate_up, w->gate_up, w);
    product_backward(t, &l->gate_up, g->gate_up, w->gate_up, w, m->middle_normed, &m->of_gate_up, shift, g->normed, 0, 0);
#pragma omp for schedule(dynamic)
    for (long s = 0; s < T; s += PANEL) {
        for (long r = s; r < s + tall_of(T, s); r++)
            add_norm_backward_row_bfloat16(D, m->middle + r * D, m->middle_scale[r], l->mlp_norm, g->normed + r * D, g->along + r * D,
                                           g->middle + r * D, g->o + r * D);
        back_in(t, &l->o, s, g->o, w->o, w);
    }
    product_backward(t, &l->o, g->o, w->o, w, m->mixed, &m->of_o, shift, g->mixed, 0, 0);
    if (below) lay_all_sides(below, 1, below_w);
    attention_backward_shared(t->P, t->R, t->starts, t->lengths, t->H, t->K, E, m->qkv, m->lse, g->mixed, g->between, g->rotated);
#pragma omp for schedule(dynamic)
    for (long s = 0; s < T; s += PANEL) {
        for (long r = s; r < s + tall_of(T, s); r++)
            rotate_row_bfloat16(N, t->H + t->K, E, g->rotated + r * N * E, t->cosine + r * E, t->sine + r * E, -1, g->qkv + r * N * E);
        back_in(t, &l->qkv, s, g->qkv, w->qkv, w);
    }
    product_backward(t, &l->qkv, g->qkv, w->qkv, w, m->normed, &m->of_qkv, shift, grad_x ? g->normed : 0, 0, 0);
    if (!grad_x) return;
#pragma omp for schedule(dynamic)
    for (long s = 0; s < T; s += PANEL) {
        for (long r = s; r < s + tall_of(T, s); r++)
            add_norm_backward_row_bfloat16(D, l->x + r * D, m->scale[r], l->attention_norm, g->normed + r * D, g->middle + r * D, grad_x + r * D,
                                           g->sum + r * D);
        if (below) back_in(t, &below->down, s, g->sum, below_w->down, below_w);
    }
}

/* From the gradient of out to that of x, which may be absent; those of A and the Bs are added `shift` bytes behind these. */
void layers_backward(const training *t, const trained_layer *layers, const float *grad, long shift, float *grad_x) {
    static _Thread_local arena room;
    arena rest = {0};
    slopes_of(&rest, t, layers);
    long apart, T = t->T, D = t->D, L = t->L;
    char *places = make_places(&room, t, layers, 3, rest.taken, &apart);
    slopes g = slopes_of(&room, t, layers);
#pragma omp parallel
    {
        tiles_begin();
        const trained_layer *top = layers + L - 1;
        workplace w = place_of(t, top, places + (L - 1) % 2 * apart);
        lay_all_sides(top, 1, &w);
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (long s = 0; s < T; s += PANEL) {
            memcpy(g.along + s * D, grad + s * D, tall_of(T, s) * D * sizeof(float));
            for (long i = s * D; i < (s + tall_of(T, s)) * D; i += 32) store_bf16(g.sum + i, _mm512_loadu_ps(grad + i), _mm512_loadu_ps(grad + i + 16));
            back_in(t, &top->down, s, g.sum, w.down, &w);
        }
        for (long l = L - 1; l >= 0; l--) {
            const trained_layer *own = layers + l, *below = l ? own - 1 : 0;
            layer_memory m = remember(own->memory, t, own, 0);
            if (t->again) {
                workplace again = place_of(t, own, places + 2 * apart);
                lay_all_sides(own, 0, &again);
#pragma omp barrier
                layer_there(t, own, &m, &again, g.middle, 0, 0);
            }
            workplace below_w = below ? place_of(t, below, places + (l + 1) % 2 * apart) : w;
            layer_back(t, own, &m, &w, &g, shift, below ? g.along : grad_x, below, &below_w);
            w = below_w;
        }
        _tile_release();
    }
}
#endif
