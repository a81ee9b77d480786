/* A frozen product with a LoRA update, forward and backward, in bf16 on AMX's tiles; kernels.c includes this once, behind attention.h.

   y = x W' + drop(x) A' (scale B)' over T rows, with x (T, I), W (O, I) as panels and R ranks. The stacked A (R, I) has the ranks of up to three
   targets one after the other; each target's B (outputs, rank) answers for its own columns of y. A16 and B16 (O, R), scaled and zero outside of
   those columns, are what is multiplied with; a mask has a bit for each number of x that dropout keeps. */

#if defined(__AMX_BF16__) && defined(__linux__)
typedef struct { long column, outputs, rank; float *B; float scale; } target;

/* drop(x), and which numbers it keeps; as kernels.h has it. */
static void draw(long size, long seed, long kept, const bf16 *x, bf16 *out, uint32_t *mask) {
    __m512i most = _mm512_set1_epi32((int)(kept - 1));
    __m512 scale = _mm512_set1_ps(4294967296.0f / kept), left, right;
#pragma omp parallel for schedule(static) private(left, right) if (size > SERIAL)
    for (long i = 0; i < size; i += 32) {
        words place[2];
        for (int n = 0; n < 32; n++) place[n / 16][n % 16] = (uint32_t)(i + n);
        __mmask32 within = size - i < 32 ? (1u << (size - i)) - 1 : ~0u, keeps = 0;
        for (int half = 0; half < 2; half++) {
            words h = place[half] * 0x9e3779b9u + (uint32_t)seed;
            for (int round = 0; round < 2; round++) {
                h = (h ^ h >> 16) * 0x85ebca6bu;
                h = (h ^ h >> 13) * 0xc2b2ae35u;
                h = (h ^ h >> 16) + (uint32_t)seed;
            }
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

/* from (M, N), `row` numbers from row to row, turned: to (N, M). */
static void turn_bf16(long M, long N, const bf16 *from, bf16 *to) {
    for (long n = 0; n < N; n++)
        for (long m = 0; m < M; m++) to[n * M + m] = from[m * N + n];
}

/* seed and kept as dropout's, kept 0: no dropout, and no mask nor seen (T, I). h (T, R). */
void lora_product(long T, long I, long O, long R, const bf16 *x, const bf16 *laid, const float *A, float *B1, long c1, long n1, long r1, float s1,
                  float *B2, long c2, long n2, long r2, float s2, float *B3, long c3, long n3, long r3, float s3, long seed, long kept,
                  uint32_t *mask, bf16 *seen, bf16 *A16, bf16 *B16, bf16 *h, bf16 *y) {
    target targets[3] = {{c1, n1, r1, B1, s1}, {c2, n2, r2, B2, s2}, {c3, n3, r3, B3, s3}};
#pragma omp parallel
    {
#pragma omp for schedule(static) nowait
        for (long i = 0; i < R * I; i++) A16[i] = to_bf16(A[i]);
#pragma omp for schedule(static)
        for (long o = 0; o < O; o++) {
            bf16 *to = B16 + o * R;
            memset(to, 0, R * sizeof(bf16));
            for (const target *t = targets; t < targets + 3; to += t->rank, t++)
                if (o >= t->column && o < t->column + t->outputs)
                    for (long r = 0; r < t->rank; r++) to[r] = to_bf16(t->B[(o - t->column) * t->rank + r] * t->scale);
        }
    }
    if (kept) draw(T * I, seed, kept, x, seen, mask);
    matrix_product(T, R, I, kept ? seen : x, I, A16, I, 1, 0, 0, 0, 0, 0, 0, h, R, 0);
    matrix_product(T, O, I, x, I, laid, 0, 0, R, h, R, B16, R, 1, y, O, 0);
}

/* Gradients of x (may be absent), A and the Bs. */
void lora_product_backward(long T, long I, long O, long R, const bf16 *grad, const bf16 *x, const bf16 *laid, const bf16 *A16, const bf16 *B16,
                           const bf16 *h, const uint32_t *mask, long kept, float *B1, long c1, long n1, long r1, float s1, float *B2, long c2, long n2,
                           long r2, float s2, float *B3, long c3, long n3, long r3, float s3, float *grad_A, bf16 *grad_x) {
    target targets[3] = {{c1, n1, r1, B1, s1}, {c2, n2, r2, B2, s2}, {c3, n3, r3, B3, s3}};
    static _Thread_local arena room;
    make_room(&room, T * (6 * R + 4 * I) + R * O * 4 + 512);
    bf16 *grad_h = take(&room, T * R * 2), *turned = take(&room, T * R * 2), *turned_h = take(&room, T * R * 2);
    bf16 *seen = take(&room, T * I * 2), *update = take(&room, T * I * 2);
    float *grad_B = take(&room, R * O * 4);
    matrix_product(T, R, O, grad, O, B16, 1, R, 0, 0, 0, 0, 0, 0, grad_h, R, 0);
    turn_bf16(T, R, grad_h, turned);
    turn_bf16(T, R, h, turned_h);
    if (grad_x) {
        matrix_product(T, I, O, grad, O, laid, -1, -1, kept ? 0 : R, grad_h, R, A16, 1, I, grad_x, I, 0);
        if (kept) matrix_product(T, I, R, grad_h, R, A16, 1, I, 0, 0, 0, 0, 0, 0, update, I, 0);
    }
    if (kept) redraw(T * I, kept, mask, x, update, seen, grad_x);
    matrix_product(R, I, T, turned, T, kept ? seen : x, 1, I, 0, 0, 0, 0, 0, 0, grad_A, I, 1);
    long row = 0;
    for (const target *t = targets; t < targets + 3; row += t->rank, t++) {
        if (!t->rank) continue;
        matrix_product(t->rank, t->outputs, T, turned_h + row * T, T, grad + t->column, 1, O, 0, 0, 0, 0, 0, 0, grad_B, t->outputs, 1);
#pragma omp parallel for schedule(static) if (t->outputs * t->rank > SERIAL)
        for (long o = 0; o < t->outputs; o++)
            for (long r = 0; r < t->rank; r++) t->B[o * t->rank + r] = grad_B[r * t->outputs + o] * t->scale;
    }
}
#endif
