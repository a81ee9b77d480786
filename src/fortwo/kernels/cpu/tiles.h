/* The micro-kernel of products in bf16: a block of 32 x 32 fp32 sums, to which 32 rows times one step of a panel are added. On AMX the sums lie in four
   of its tiles; with AVX-512 they lie in memory that stays in the first cache, and eight rows at a time are added to them. */
#pragma once
#include "vectors.h"

#ifdef TILED
#define PANEL 32               /* outputs of a panel, rows of a block */
#define STEP 32                /* inputs of a step */
#define TILE (16 * STEP)       /* numbers of a tile */
#define SQUARE (PANEL * STEP)

/* gcc 12 does not see that a tile, or its configuration, is read from memory, and may drop what was written there. */
static inline void written_for_tiles(const void *at) { __asm__ volatile("" ::"r"(at) : "memory"); }

#ifdef AMX
typedef struct { char none; } tile_sums; /* tiles 0 to 3 */

static inline void load_shape(const void *shape) {
    written_for_tiles(shape);
    _tile_loadconfig(shape);
}

static inline void tiles_begin(void) {
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    load_shape(&shape);
}

static inline void tiles_end(void) { _tile_release(); }

static inline void tiles_clear(tile_sums *c) {
    written_for_tiles(c);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static inline void tiles_loaded(tile_sums *c, const float *sums, long row) { /* (32, 32), with `row` numbers from row to row */
    (void)c, written_for_tiles(sums);
    _tile_loadd(0, sums, 4 * row);
    _tile_loadd(1, sums + 16, 4 * row);
    _tile_loadd(2, sums + 16 * row, 4 * row);
    _tile_loadd(3, sums + 16 * row + 16, 4 * row);
}

/* The first `rows` and `columns` of the sums, each 16 or 32. */
static inline __attribute__((always_inline)) void tiles_stored(const tile_sums *c, int rows, int columns, float *sums, long row) {
    (void)c;
    _tile_stored(0, sums, 4 * row);
    if (columns > 16) _tile_stored(1, sums + 16, 4 * row);
    if (rows > 16) _tile_stored(2, sums + 16 * row, 4 * row);
    if (rows > 16 && columns > 16) _tile_stored(3, sums + 16 * row + 16, 4 * row);
}

/* Adds `rows` rows of a times `columns` outputs of a step, each 16 or 32. */
static inline __attribute__((always_inline)) void tile_step(tile_sums *c, int rows, int columns, const bf16 *a, long a_row, const bf16 *b) {
    (void)c;
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 2 * a_row);
    _tile_dpbf16ps(0, 4, 6);
    if (columns > 16) {
        _tile_loadd(7, b + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
    }
    if (rows > 16) {
        _tile_loadd(5, a + 16 * a_row, 2 * a_row);
        _tile_dpbf16ps(2, 5, 6);
        if (columns > 16) _tile_dpbf16ps(3, 5, 7);
    }
}
#else
typedef struct { float at[PANEL * PANEL] __attribute__((aligned(64))); } tile_sums;

static inline void tiles_begin(void) {}
static inline void tiles_end(void) {}
static inline void tiles_clear(tile_sums *c) { memset(c->at, 0, sizeof c->at); }

static inline void tiles_loaded(tile_sums *c, const float *sums, long row) {
    for (long r = 0; r < PANEL; r++) memcpy(c->at + r * PANEL, sums + r * row, PANEL * sizeof(float));
}

static inline __attribute__((always_inline)) void tiles_stored(const tile_sums *c, int rows, int columns, float *sums, long row) {
    for (long r = 0; r < rows; r++) memcpy(sums + r * row, c->at + r * PANEL, columns * sizeof(float));
}

extern int pairs_are_faster __attribute__((visibility("hidden"))); /* than products in fp32, on this processor; see choose_product */

/* The odd numbers of pairs of bf16 as fp32, and the even ones. */
static inline __m512 odd_of(__m512i pairs) { return (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)); }
static inline __m512 even_of(__m512i pairs) { return (__m512)_mm512_slli_epi32(pairs, 16); }

/* Both ways to add eight rows of a times a step add the odd number of a pair first, as the instruction for pairs does. */
static inline __attribute__((always_inline)) void step_by_pairs(int columns, const bf16 *a, long a_row, const bf16 *b, __m512 *left, __m512 *right) {
#ifdef __AVX512BF16__
#pragma GCC unroll 1
    for (long pair = 0; pair < 16; pair++, b += STEP) {
        __m512bh low = (__m512bh)_mm512_loadu_si512(b), high = columns > 16 ? (__m512bh)_mm512_loadu_si512(b + TILE) : low;
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            int both;
            memcpy(&both, a + i * a_row + 2 * pair, sizeof both);
            __m512bh x = (__m512bh)_mm512_set1_epi32(both);
            left[i] = _mm512_dpbf16_ps(left[i], x, low);
            if (columns > 16) right[i] = _mm512_dpbf16_ps(right[i], x, high);
        }
    }
#endif
}

static inline __attribute__((always_inline)) void step_by_numbers(int columns, const bf16 *a, long a_row, const bf16 *b, __m512 *left, __m512 *right) {
    float x[2][8][16] __attribute__((aligned(64)));
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __m512i pairs = _mm512_loadu_si512(a + i * a_row);
        _mm512_store_ps(x[0][i], odd_of(pairs));
        _mm512_store_ps(x[1][i], even_of(pairs));
    }
#pragma GCC unroll 1
    for (long pair = 0; pair < 16; pair++, b += STEP) {
        __m512i low = _mm512_loadu_si512(b), high = columns > 16 ? _mm512_loadu_si512(b + TILE) : low;
#pragma GCC unroll 2
        for (int even = 0; even < 2; even++) {
            __m512 l = even ? even_of(low) : odd_of(low), h = even ? even_of(high) : odd_of(high);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                __m512 own = _mm512_set1_ps(x[even][i][pair]);
                left[i] = _mm512_fmadd_ps(own, l, left[i]);
                if (columns > 16) right[i] = _mm512_fmadd_ps(own, h, right[i]);
            }
        }
    }
}

/* Adds `rows` rows of a times `columns` outputs of a step, each 16 or 32. */
static inline __attribute__((always_inline)) void tile_step(tile_sums *c, int rows, int columns, const bf16 *a, long a_row, const bf16 *b) {
    for (int r = 0; r < rows; r += 8, a += 8 * a_row) {
        float *at = c->at + r * PANEL;
        __m512 left[8], right[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) left[i] = _mm512_load_ps(at + i * PANEL), right[i] = columns > 16 ? _mm512_load_ps(at + i * PANEL + 16) : left[i];
        if (pairs_are_faster) step_by_pairs(columns, a, a_row, b, left, right);
        else step_by_numbers(columns, a, a_row, b, left, right);
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            _mm512_store_ps(at + i * PANEL, left[i]);
            if (columns > 16) _mm512_store_ps(at + i * PANEL + 16, right[i]);
        }
    }
}
#endif

/* c (rows, columns), each 16 or 32, (+)= a times `count` steps of a panel. */
static inline __attribute__((always_inline)) void tile_gemm(int rows, int columns, long count, const bf16 *a, long a_row, const bf16 *panel, float *c, long c_row, int add) {
    tile_sums sums;
    written_for_tiles(a);
    if (add) tiles_loaded(&sums, c, c_row);
    else tiles_clear(&sums);
    for (long k = 0; k < count; k++) tile_step(&sums, rows, columns, a + k * STEP, a_row, panel + k * SQUARE);
    tiles_stored(&sums, rows, columns, c, c_row);
}
#endif
