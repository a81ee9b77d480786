/* Products of many rows in bf16, sums in fp32, by AMX's tiles; kernels.c includes this once. Processors without them do not get these functions.

   The right operand is laid out in panels of 32 outputs, a panel in steps of 32 inputs, a step in two tiles of 16 outputs; a tile holds 16 pairs of
   inputs, of each the two numbers of all outputs side by side. As many panels as stay in a core's cache are laid at once, then the left operand passes
   by, read in place. */

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PANEL 32               /* outputs of a panel, rows of a block */
#define STEP 32                /* inputs of a step */
#define TILE (16 * STEP)       /* numbers of a tile */
#define AHEAD (8 * STEP)       /* numbers of a row that are fetched in advance */
#define RESIDENT (1000 * 1024) /* bytes of panels that stay in a core's cache while the left operand passes */

/* a (M, K) with a_row numbers from row to row; b (N, K) with steps b_n and b_k, of which one is 1, or both 0 for panels that are laid already. */
typedef struct {
    const bf16 *a, *b;
    long a_row, b_n, b_k, K;
} factor;

static inline long steps(long K) { return (K + STEP - 1) / STEP; }

/* 16 outputs x 16 pairs, each pair 32 bits, from rows of pairs to columns of pairs. */
static inline void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

/* Panels first..last-1 of a factor, `apart` numbers from one to the next; what lies beyond N or K is zero. */
static void lay(const factor *f, long N, long first, long last, bf16 *to, long apart) {
    static const uint16_t zip[2][32] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
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
    __m512i low = _mm512_loadu_si512(zip[0]), high = _mm512_loadu_si512(zip[1]);
    for (long k = 0; k < steps(f->K) * STEP; k += 2)
        for (long p = first; p < last; p++) {
            bf16 *row = to + (p - first) * apart + k / STEP * 2 * TILE + k % STEP / 2 * STEP;
            long wide = N - p * PANEL;
            __mmask32 mask = wide < PANEL ? (1u << wide) - 1 : ~0u;
            const bf16 *from = f->b + k * f->b_k + p * PANEL;
            __m512i even = k < f->K ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_setzero_si512();
            __m512i odd = k + 1 < f->K ? _mm512_maskz_loadu_epi16(mask, from + f->b_k) : _mm512_setzero_si512();
            _mm512_store_si512(row, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(row + TILE, _mm512_permutex2var_epi16(even, high, odd));
        }
}

/* Whether the system lets this process use tiles. */
int tiles_allowed(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

static void tiles_begin(void) {
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    _tile_loadconfig(&shape);
}

static inline void tile_step(const bf16 *a, long a_row, const bf16 *b) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 2 * a_row);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * a_row, 2 * a_row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

static inline int is_laid(const factor *f) { return f->b_n == 0 && f->b_k == 0; }

/* All panels of b (N, K). */
void lay_panels(long N, long K, const bf16 *b, long b_n, long b_k, bf16 *to) {
    factor f = {0, b, 0, b_n, b_k, K};
    long panels = (N + PANEL - 1) / PANEL, apart = steps(K) * 2 * TILE;
#pragma omp parallel for schedule(dynamic, 4)
    for (long p = 0; p < panels; p++) lay(&f, N, p, p + 1, to + p * apart, apart);
}

/* Rows m..m+31 of c times one panel of each factor, as fp32 into sums (32, 32). `edge` has room for 32 rows of the longest K, in whole steps. */
static void block(int count, const factor *f, const bf16 *const *panels, long M, long m, bf16 *edge, float *sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int i = 0; i < count; i++, f++) {
        long tall = M - m < PANEL ? M - m : PANEL, all = steps(f->K), whole = tall < PANEL ? 0 : f->K / STEP, row = (all - whole) * STEP;
        const bf16 *a = f->a + m * f->a_row, *panel = panels[i];
        for (long k = 0; k < whole; k++, panel += 2 * TILE) tile_step(a + k * STEP, f->a_row, panel);
        if (whole == all) continue;
        memset(edge, 0, PANEL * row * sizeof(bf16)); /* what does not fill 32 rows and 32 inputs is copied, with zeros around */
        for (long r = 0; r < tall; r++) memcpy(edge + r * row, a + r * f->a_row + whole * STEP, (f->K - whole * STEP) * sizeof(bf16));
        for (long k = whole; k < all; k++, panel += 2 * TILE) tile_step(edge + (k - whole) * STEP, row, panel);
    }
    _tile_stored(0, sums, 4 * PANEL);
    _tile_stored(1, sums + 16, 4 * PANEL);
    _tile_stored(2, sums + 16 * PANEL, 4 * PANEL);
    _tile_stored(3, sums + 16 * PANEL + 16, 4 * PANEL);
}

/* c (M, N) = a b' + a2 b2' (K2 = 0: without the second); c is bf16, or fp32 where `wide`, with c_row numbers from row to row. */
void matrix_product(long M, long N, long K, const bf16 *a, long a_row, const bf16 *b, long b_n, long b_k, long K2, const bf16 *a2, long a2_row,
                    const bf16 *b2, long b2_n, long b2_k, void *c, long c_row, long wide) {
    factor f[2] = {{a, b, a_row, b_n, b_k, K}, {a2, b2, a2_row, b2_n, b2_k, K2}};
    int count = 1 + (K2 > 0);
    long apart[2] = {steps(K) * 2 * TILE, steps(K2) * 2 * TILE}, panels = (N + PANEL - 1) / PANEL, blocks = (M + PANEL - 1) / PANEL;
    long fit = RESIDENT / ((apart[0] + apart[1]) * (long)sizeof(bf16)), wanted = 2 * omp_get_max_threads();
    long across = fit < 1 ? panels : (panels + fit - 1) / fit;
    if (across < wanted) across = panels < wanted ? panels : wanted;
    long down = across < wanted ? (wanted + across - 1) / across : 1; /* few outputs: rows are shared out too */
    down = down < blocks ? down : blocks;
#pragma omp parallel if (M * N * (K + K2) > 1 << 20)
    {
        static _Thread_local struct { bf16 *at; long size; } room;
        long most = (panels + across - 1) / across, size = 0, longest = steps(K) > steps(K2) ? steps(K) : steps(K2);
        for (int i = 0; i < count; i++) size += is_laid(&f[i]) ? 0 : most * apart[i];
        if (size + longest * PANEL * STEP > room.size) {
            free(room.at);
            room.size = size + longest * PANEL * STEP;
            room.at = aligned_alloc(64, room.size * sizeof(bf16));
        }
        bf16 *edge = room.at + size;
        float sums[PANEL * PANEL] __attribute__((aligned(64)));
        tiles_begin();
#pragma omp for schedule(dynamic) nowait
        for (long task = 0; task < across * down; task++) {
            long group = task / down, part = task % down, first = group * panels / across, last = (group + 1) * panels / across;
            const bf16 *laid[2];
            bf16 *to = room.at;
            for (int i = 0; i < count; i++)
                if (is_laid(&f[i])) laid[i] = f[i].b + first * apart[i];
                else {
                    lay(&f[i], N, first, last, to, apart[i]);
                    laid[i] = to;
                    to += most * apart[i];
                }
            for (long m = part * blocks / down * PANEL; m < M && m < (part + 1) * blocks / down * PANEL; m += PANEL)
                for (long p = first; p < last; p++) {
                    const bf16 *here[2] = {laid[0] + (p - first) * apart[0], count > 1 ? laid[1] + (p - first) * apart[1] : 0};
                    long n = p * PANEL, narrow = N - n < PANEL ? N - n : PANEL, tall = M - m < PANEL ? M - m : PANEL;
                    block(count, f, here, M, m, edge, sums);
                    __mmask32 mask = narrow < PANEL ? (1u << narrow) - 1 : ~0u;
                    for (long r = 0; r < tall; r++) {
                        __m512 left = _mm512_load_ps(sums + r * PANEL), right = _mm512_load_ps(sums + r * PANEL + 16);
                        long at = (m + r) * c_row + n;
                        if (wide) {
                            _mm512_mask_storeu_ps((float *)c + at, (__mmask16)mask, left);
                            _mm512_mask_storeu_ps((float *)c + at + 16, mask >> 16, right);
                        } else
                            _mm512_mask_storeu_epi16((bf16 *)c + at, mask, (__m512i)_mm512_cvtne2ps_pbh(right, left));
                    }
                }
        }
        _tile_release();
    }
}
#endif
