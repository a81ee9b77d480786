/* Products in bf16 with sums in fp32: packing, and the drivers. As many panels as fit into a core's cache are packed at once, then
   the rows of the left operand are multiplied by them, read in place. */
#include "gemm_bf16.h"

#ifdef TILED
#include <sys/syscall.h>
#include <unistd.h>

static inline __m512i nf4_values(const normal_floats *w, long at) { /* the 16 values of the block that contains number `at` */
    __m512 all = _mm512_mul_ps(_mm512_loadu_ps(w->levels), _mm512_set1_ps(nf4_largest(w, at / NF4_BLOCK)));
    return _mm512_castsi256_si512(half_as_bf16(all));
}

static inline __m512i nf4_step(const normal_floats *w, long at, __m512i values) { /* 32 numbers */
    return nf4_look_up(_mm_loadu_si128((const __m128i *)(w->codes + at / 2)), values);
}

/* `pack` for NF4. K and N are multiples of 64. */
static void pack_nf4(const gemm_operand *f, long first, long last, bf16 *to, long apart) {
    const normal_floats *w = f->nf4;
    if (f->b_k == 1) {
        for (long n = first * PANEL; n < last * PANEL; n += 16)
            for (long k = 0; k < f->K; k += NF4_BLOCK) {
                bf16 *tile = to + (n / PANEL - first) * apart + k * PANEL + n % PANEL / 16 * TILE;
                __m512i left[16], right[16];
                for (long i = 0; i < 16; i++) {
                    long at = w->from + (n + i) * f->b_n + k;
                    __m512i values = nf4_values(w, at);
                    __builtin_prefetch(w->codes + at / 2 + 256);
                    left[i] = nf4_step(w, at, values);
                    right[i] = nf4_step(w, at + STEP, values);
                }
                transpose(left);
                transpose(right);
                for (long i = 0; i < 16; i++) _mm512_store_si512(tile + i * STEP, left[i]);
                for (long i = 0; i < 16; i++) _mm512_store_si512(tile + 2 * TILE + i * STEP, right[i]);
            }
        return;
    }
    __m512i low = _mm512_loadu_si512(interleave[0]), high = _mm512_loadu_si512(interleave[1]), even_values = low, odd_values = low;
    for (long k = 0; k < f->K; k += 2)
        for (long p = first; p < last; p++) {
            bf16 *row = to + (p - first) * apart + k / STEP * 2 * TILE + k % STEP / 2 * STEP;
            long at = w->from + k * f->b_k + p * PANEL;
            if (p == first || at % NF4_BLOCK == 0) even_values = nf4_values(w, at), odd_values = nf4_values(w, at + f->b_k);
            __m512i even = nf4_step(w, at, even_values), odd = nf4_step(w, at + f->b_k, odd_values);
            _mm512_store_si512(row, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(row + TILE, _mm512_permutex2var_epi16(even, high, odd));
        }
}

/* `pack` from the panels of the transpose, whose inputs become outputs. */
void pack_transposed(const gemm_operand *f, long N, long first, long last, bf16 *to, long apart) {
    __m512i low = _mm512_loadu_si512(interleave[0]), high = _mm512_loadu_si512(interleave[1]), rows[16];
    for (long k = 0; k < steps_of(f->K); k++)
        for (long p = first; p < last; p++) {
            const bf16 *from = f->b + (k * steps_of(N) + p) * 2 * TILE;
            bf16 *tile = to + (p - first) * apart + k * 2 * TILE;
            if (last - first == 1)
                for (long i = 0; i < 2 * TILE; i += STEP) __builtin_prefetch(from + steps_of(N) * 4 * TILE + i);
            for (int half = 0; half < 2; half++) {
                for (long i = 0; i < 16; i++) rows[i] = _mm512_load_si512(from + half * TILE + i * STEP);
                transpose(rows);
                for (long i = 0; i < 16; i += 2) {
                    bf16 *row = tile + (half * 16 + i) / 2 * STEP;
                    _mm512_store_si512(row, _mm512_permutex2var_epi16(rows[i], low, rows[i + 1]));
                    _mm512_store_si512(row + TILE, _mm512_permutex2var_epi16(rows[i], high, rows[i + 1]));
                }
            }
        }
}

/* Packs panels first to last - 1 of an operand, `apart` numbers from one to the next. What is beyond N or K becomes zero. */
void pack(const gemm_operand *f, long N, long first, long last, bf16 *to, long apart) {
    if (f->nf4) {
        pack_nf4(f, first, last, to, apart);
        return;
    }
    if (f->b_k == -1) {
        pack_transposed(f, N, first, last, to, apart);
        return;
    }
    if (f->b_k == 1) {
        for (long n = first * PANEL; n < last * PANEL; n += 16)
            for (long k = 0; k < f->K; k += STEP) {
                bf16 *tile = to + (n / PANEL - first) * apart + k * PANEL + n % PANEL / 16 * TILE;
                __mmask32 mask = f->K - k < STEP ? (1u << (f->K - k)) - 1 : ~0u;
                __m512i rows[16];
                for (long i = 0; i < 16; i++) {
                    const bf16 *from = f->b + (n + i) * f->b_n + k;
                    __builtin_prefetch(from + AHEAD);
                    rows[i] = n + i < N ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_setzero_si512();
                }
                transpose(rows);
                for (long i = 0; i < 16; i++) _mm512_store_si512(tile + i * STEP, rows[i]);
            }
        return;
    }
    __m512i low = _mm512_loadu_si512(interleave[0]), high = _mm512_loadu_si512(interleave[1]);
    for (long k = 0; k < padded_to_steps(f->K); k += 2)
        for (long p = first; p < last; p++) {
            bf16 *row = to + (p - first) * apart + k / STEP * 2 * TILE + k % STEP / 2 * STEP;
            long wide = N - p * PANEL;
            __mmask32 mask = wide < PANEL ? (1u << wide) - 1 : ~0u;
            const bf16 *from = f->b + k * f->b_k + p * PANEL;
            __builtin_prefetch(from + ROWS_AHEAD * f->b_k);
            __builtin_prefetch(from + (ROWS_AHEAD + 1) * f->b_k);
            __m512i even = k < f->K ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_setzero_si512();
            __m512i odd = k + 1 < f->K ? _mm512_maskz_loadu_epi16(mask, from + f->b_k) : _mm512_setzero_si512();
            _mm512_store_si512(row, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(row + TILE, _mm512_permutex2var_epi16(even, high, odd));
        }
}

#ifdef AMX
int tiles_allowed(void) {
    static int allowed = -1;
    if (allowed < 0) allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return allowed;
}

long widening_rows(void) { return tiles_allowed() ? 24 : 0; }
#else
int pairs_are_faster;
static int pairs_are_much_faster; /* so that they gain over products of bytes, too */
#define MUCH 0.7

#ifdef __AVX512BF16__
/* Seconds of some steps by one of the two products: the least of a few runs, since other load can only make a run slower. */
static double step_seconds(int pairs) {
    bf16 a[SQUARE] __attribute__((aligned(64))) = {0}, b[SQUARE] __attribute__((aligned(64))) = {0};
    tile_sums held;
    double least = 1;
    pairs_are_faster = pairs;
    for (int run = 0; run < 9; run++) {
        double began = omp_get_wtime(), seconds;
        tiles_clear(&held);
        for (int i = 0; i < 20; i++) tile_step(&held, 32, 32, a, STEP, b);
        written_for_tiles(&held);
        seconds = omp_get_wtime() - began;
        least = seconds < least ? seconds : least;
    }
    return least;
}
#endif

/* Chooses the product by measuring it for some microseconds. On some processors pairs take twice as long as fp32, on others half
   as long. */
int tiles_allowed(void) {
    static int chosen;
    if (!chosen) {
#ifdef __AVX512BF16__
        double pairs = step_seconds(1), single = step_seconds(0);
        pairs_are_faster = pairs < single;
        pairs_are_much_faster = pairs < MUCH * single;
#endif
        chosen = 1;
    }
    return 1;
}

long widening_rows(void) {
    tiles_allowed();
    return pairs_are_much_faster ? 64 : 0;
}
#endif

/* Writes 32 rows of `count` numbers (a multiple of 32), `row` numbers apart, as columns of 32. */
void transpose_rows(const bf16 *rows, long row, long count, bf16 *to, long to_row) {
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

static inline int is_packed(const gemm_operand *f) { return f->b_n == 0 && f->b_k == 0; }

void pack_panels(long N, long K, const bf16 *b, long b_n, long b_k, bf16 *to) {
    gemm_operand f = {0, b, 0, b_n, b_k, K};
    long panels = (N + PANEL - 1) / PANEL, apart = steps_of(K) * 2 * TILE;
#pragma omp parallel for schedule(dynamic, 4)
    for (long p = 0; p < panels; p++) pack(&f, N, p, p + 1, to + p * apart, apart);
}

/* 32 rows of a. Whole steps are read in place; what does not fill 32 inputs, or 32 rows, is copied to `edge` and filled up with zeros. */
typedef struct {
    const bf16 *a, *edge;
    long a_row, edge_row, whole, all;
} strip;

static strip strip_of(const gemm_operand *f, long M, long m, bf16 *edge) {
    long tall = M - m < PANEL ? M - m : PANEL, all = steps_of(f->K), whole = tall < PANEL ? 0 : f->K / STEP, row = (all - whole) * STEP;
    const bf16 *a = f->a + m * f->a_row;
    if (whole < all) {
        memset(edge, 0, PANEL * row * sizeof(bf16));
        for (long r = 0; r < tall; r++) memcpy(edge + r * row, a + r * f->a_row + whole * STEP, (f->K - whole * STEP) * sizeof(bf16));
    }
    return (strip){a, edge, f->a_row, row, whole, all};
}

/* Multiplies a strip of each operand by one panel, with fp32 sums (32, 32). Meanwhile it prefetches the `tall` lines of memory, c_row bytes apart,
   that are written next: waiting for them took a fourth of a product. */
static void block(int count, const strip *s, const bf16 *const *panels, float *sums, const char *c, long c_row, long tall) {
    tile_sums held;
    long each = (PANEL + s->all - 1) / s->all, line = 0;
    tiles_clear(&held);
    for (int i = 0; i < count; i++, s++) {
        const bf16 *panel = panels[i];
        for (long k = 0; k < s->whole; k++, panel += 2 * TILE) {
            for (long end = line + each; line < tall && line < end; line++) __builtin_prefetch(c + line * c_row, 1);
            tile_step(&held, 32, 32, s->a + k * STEP, s->a_row, panel);
        }
        for (long k = s->whole; k < s->all; k++, panel += 2 * TILE) tile_step(&held, 32, 32, s->edge + (k - s->whole) * STEP, s->edge_row, panel);
    }
    tiles_stored(&held, 32, 32, sums, PANEL);
}

/* c (M, N) = the sum of a b' over two operands (K = 0: without the second). */
static void gemm_operands(long M, long N, const gemm_operand f[2], void *c, long c_row, long wide) {
    long K = f[0].K, K2 = f[1].K, count = 1 + (K2 > 0);
    long apart[2] = {steps_of(K) * 2 * TILE, steps_of(K2) * 2 * TILE}, panels = (N + PANEL - 1) / PANEL, blocks = (M + PANEL - 1) / PANEL;
    long fit = CACHE_BYTES / ((apart[0] + apart[1]) * (long)sizeof(bf16)), wanted = 2 * omp_get_max_threads();
    long across = fit < 1 ? panels : (panels + fit - 1) / fit;
    if (across < wanted) across = panels < wanted ? panels : wanted;
    long down = across < wanted ? (wanted + across - 1) / across : 1; /* with few outputs the rows are shared out too */
    down = down < blocks ? down : blocks;
#pragma omp parallel if (M * N * (K + K2) > 1 << 20)
    {
        static _Thread_local struct { bf16 *at; long size; } scratch;
        long most = (panels + across - 1) / across, size = 0, edges = (steps_of(K) + steps_of(K2)) * PANEL * STEP;
        for (int i = 0; i < count; i++) size += is_packed(&f[i]) ? 0 : most * apart[i];
        if (size + edges > scratch.size) {
            free(scratch.at);
            scratch.size = size + edges;
            scratch.at = aligned_alloc(64, scratch.size * sizeof(bf16));
        }
        bf16 *edge = scratch.at + size;
        float sums[PANEL * PANEL] __attribute__((aligned(64)));
        tiles_begin();
#pragma omp for schedule(dynamic) nowait
        for (long task = 0; task < across * down; task++) {
            long group = task / down, part = task % down, first = group * panels / across, last = (group + 1) * panels / across;
            const bf16 *packed[2];
            bf16 *to = scratch.at;
            for (int i = 0; i < count; i++)
                if (is_packed(&f[i])) packed[i] = f[i].b + first * apart[i];
                else {
                    pack(&f[i], N, first, last, to, apart[i]);
                    packed[i] = to;
                    to += most * apart[i];
                }
            for (long m = part * blocks / down * PANEL; m < M && m < (part + 1) * blocks / down * PANEL; m += PANEL) {
                strip strips[2] = {strip_of(&f[0], M, m, edge), strip_of(&f[1], M, m, edge + steps_of(K) * PANEL * STEP)};
                for (long p = first; p < last; p++) {
                    const bf16 *here[2] = {packed[0] + (p - first) * apart[0], count > 1 ? packed[1] + (p - first) * apart[1] : 0};
                    long n = p * PANEL, narrow = N - n < PANEL ? N - n : PANEL, tall = M - m < PANEL ? M - m : PANEL;
                    long size = wide ? 4 : 2;
                    block(count, strips, here, sums, (const char *)c + (m * c_row + n) * size, c_row * size, tall);
                    __mmask32 mask = narrow < PANEL ? (1u << narrow) - 1 : ~0u;
                    for (long r = 0; r < tall; r++) {
                        __m512 left = _mm512_load_ps(sums + r * PANEL), right = _mm512_load_ps(sums + r * PANEL + 16);
                        long at = (m + r) * c_row + n;
                        if (wide) {
                            _mm512_mask_storeu_ps((float *)c + at, (__mmask16)mask, left);
                            _mm512_mask_storeu_ps((float *)c + at + 16, mask >> 16, right);
                        } else _mm512_mask_storeu_epi16((bf16 *)c + at, mask, as_bf16(left, right));
                    }
                }
            }
        }
        tiles_end();
    }
}

void gemm_bf16(long M, long N, long K, const bf16 *a, long a_row, const bf16 *b, long b_n, long b_k, long K2, const bf16 *a2, long a2_row,
                    const bf16 *b2, long b2_n, long b2_k, void *c, long c_row, long wide) {
    gemm_operand f[2] = {{a, b, a_row, b_n, b_k, K}, {a2, b2, a2_row, b2_n, b2_k, K2}};
    gemm_operands(M, N, f, c, c_row, wide);
}

/* RUN steps are multiplied after one another, while all sums of a few panels are kept. */
void gemm_bf16_long_sum(long M, long N, long K, const bf16 *a, long a_row, const bf16 *packed, float *c) {
    long strips = steps_of(M), panels = steps_of(N), fit = CACHE_BYTES / 2 / (strips * SQUARE * (long)sizeof(float)), wanted = 2 * omp_get_max_threads();
    long groups = fit < 1 ? panels : (panels + fit - 1) / fit;
    if (groups < wanted) groups = panels < wanted ? panels : wanted;
    long most = (panels + groups - 1) / groups;
#pragma omp parallel
    {
        bf16 *to = aligned_alloc(64, most * RUN * SQUARE * sizeof(bf16)), *edge = aligned_alloc(64, RUN * SQUARE * sizeof(bf16));
        float *all = aligned_alloc(64, strips * most * SQUARE * sizeof(float));
        tiles_begin();
#pragma omp for schedule(dynamic) nowait
        for (long group = 0; group < groups; group++) {
            long first = group * panels / groups, last = (group + 1) * panels / groups, each = (PANEL + last - first - 1) / (last - first);
            for (long k = 0; k < steps_of(K); k += RUN) {
                long here = steps_of(K) - k < RUN ? steps_of(K) - k : RUN, whole = K - k * STEP < here * STEP ? K - k * STEP : here * STEP;
                gemm_operand f = {0, packed + k * panels * SQUARE, 0, -1, -1, here * STEP, 0};
                pack_transposed(&f, N, first, last, to, RUN * SQUARE);
                for (long m = 0; m < strips; m++) {
                    long tall = M - m * PANEL < PANEL ? M - m * PANEL : PANEL, row = a_row, line = 0;
                    const bf16 *at = a + m * PANEL * a_row + k * STEP, *next = at + PANEL * a_row;
                    if (tall < PANEL || whole < here * STEP) {
                        memset(edge, 0, RUN * SQUARE * sizeof(bf16));
                        for (long r = 0; r < tall; r++) memcpy(edge + r * RUN * STEP, at + r * a_row, whole * sizeof(bf16));
                        at = edge, row = RUN * STEP;
                    }
                    for (long n = first; n < last; n++) {
                        float *sums = all + (m * most + n - first) * SQUARE;
                        tile_sums held;
                        if (k) tiles_loaded(&held, sums, PANEL);
                        else tiles_clear(&held);
                        for (long i = 0; i < here; i++) {
                            for (long end = line + each; line < end; line++) __builtin_prefetch(next + line / RUN * a_row + line % RUN * STEP, 0, 2);
                            tile_step(&held, 32, 32, at + i * STEP, row, to + ((n - first) * RUN + i) * SQUARE);
                        }
                        tiles_stored(&held, 32, 32, sums, PANEL);
                        for (long r = 0; k + here == steps_of(K) && r < tall; r++)
                            memcpy(c + (m * PANEL + r) * N + n * PANEL, sums + r * PANEL, (N - n * PANEL < PANEL ? N - n * PANEL : PANEL) * sizeof(float));
                    }
                }
            }
        }
        tiles_end();
        free(to);
        free(edge);
        free(all);
    }
}

void gemm_nf4(long M, long N, long K, const bf16 *a, long a_row, const uint8_t *codes, const uint8_t *code, const float *map,
                 const float *scale, const float *offset, const float *levels, long from, long b_n, long b_k, void *c, long c_row, long wide) {
    normal_floats w = {codes, code, map, scale, offset, levels, from};
    gemm_operand f[2] = {{a, 0, a_row, b_n, b_k, K, &w}};
    gemm_operands(M, N, f, c, c_row, wide);
}
#endif
