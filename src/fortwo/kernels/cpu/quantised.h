/* Products of a few rows with a frozen weight held in 4 or 8 bits; kernels.c includes this once.

   A weight (O, I) lies in tiles of 16 outputs, a tile in groups of 32 inputs; w = scale * q + minimum, with one scale and one minimum (fp16) for each
   output of a group, as in GGUF's Q4_1. With 8 bits the minimum is -128 scales and is not stored (GGUF's Q8_0). q lies so that four inputs of sixteen
   outputs are 64 bytes; with 4 bits the low halves of 64 bytes are inputs 4i..4i+3, the high halves the four that follow. The rows of x are
   rounded to 16 bits in the same groups, as two bytes that are multiplied one after the other; a group's dot products are whole numbers and
   exact. One byte, as llama.cpp has it, is faster from 8 rows on, and shows in what the model says. */

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

#define GROUP 32
#define QUADS (GROUP / 4)
#define LARGEST 32639 /* 127 * 256 + 127 */
#define AHEAD_OF_PRODUCT 4096 /* bytes of the weight that are fetched in advance */

/* Sixteen fp16 numbers. */
static inline vector halves(const uint16_t *from) {
#ifdef __AVX512F__
    return (vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#else
    vector to;
    for (int n = 0; n < WIDTH; n++) {
        union { uint32_t bits; float value; } all = {(uint32_t)(from[n] & 0x7fff) << 13};
        all.value *= 0x1p112f;
        all.bits |= (uint32_t)(from[n] & 0x8000) << 16;
        to[n] = all.value;
    }
    return to;
#endif
}

static inline void store_halves(uint16_t *to, vector from) {
#ifdef __AVX512F__
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)from, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int n = 0; n < WIDTH; n++) {
        union { float value; uint32_t bits; } x = {from[n]}, small;
        uint32_t sign = x.bits >> 16 & 0x8000, size = x.bits & 0x7fffffff, half;
        x.bits = size;
        if (size >= 0x47800000) half = size > 0x7f800000 ? 0x7e00 : 0x7c00; /* no number, or too large for one */
        else if (size < 0x38800000) { /* the last place of 1/2 is that of the smallest halves */
            small.value = x.value + 0.5f;
            half = small.bits - 0x3f000000;
        } else half = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
        to[n] = sign | half;
    }
#endif
}

/* sums[n] += the dot product of the four unsigned bytes of w[n] with the four signed bytes at a. */
static inline __attribute__((always_inline)) integers dot(integers sums, words w, const int8_t *a) {
#ifdef __AVX512VNNI__
    int32_t four;
    memcpy(&four, a, 4);
    return (integers)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(four));
#else
    for (int i = 0; i < 4; i++) sums += (integers)(w >> 8 * i & 255) * a[i];
    return sums;
#endif
}

/* A weight in tiles. minimum: with 4 bits. */
typedef struct {
    long bits, O, I;
    const uint8_t *q;
    const uint16_t *scale, *minimum;
} held;

/* T rows of I inputs in whole numbers of 16 bits: x = scale * (256 * high + low) in each group; offset is the sum of x as rounded. They lie in blocks
   of `rows` rows, the last of which begins early enough to be whole: in a block, for each group, the high bytes of its rows, then the low ones. */
typedef struct {
    long T, I, rows, blocks;
    int8_t *a;
    float *scale, *offset;
} rounded;

static rounded rounded_of(long T, long I) { /* to be given back by free(x.a) */
    long rows = T >= 8 ? 8 : T >= 4 ? 4 : T >= 2 ? 2 : 1, blocks = (T + rows - 1) / rows, all = blocks * rows;
    int8_t *a = aligned_alloc(64, (all * (2 * I + I / GROUP * 2 * sizeof(float)) + 63) / 64 * 64);
    float *scale = (float *)(a + 2 * all * I);
    return (rounded){T, I, rows, blocks, a, scale, scale + all * (I / GROUP)};
}

static inline long block_start(const rounded *x, long b) { return b * x->rows < x->T - x->rows ? b * x->rows : x->T - x->rows; }

/* Row t, into every block that it is in. */
static inline void round_row(const rounded *x, long t, const float *row) {
    long G = x->I / GROUP;
    for (long g = 0; g < G; g++) {
        const float *from = row + g * GROUP;
        float size[GROUP];
        for (int i = 0; i < GROUP; i++) size[i] = fabsf(from[i]);
        float top = largest(size, GROUP), by = top > 0 ? LARGEST / top : 0;
        int32_t sum = 0, whole[GROUP];
        for (int i = 0; i < GROUP; i++) whole[i] = (int32_t)rintf(from[i] * by);
        for (int i = 0; i < GROUP; i++) sum += whole[i];
        for (long b = t / x->rows; b < x->blocks; b++) {
            long r = t - block_start(x, b), at = b * G + g;
            if (r < 0 || r >= x->rows) continue;
            int8_t *high = x->a + (at * 2 * x->rows + r) * GROUP, *low = high + x->rows * GROUP;
            for (int i = 0; i < GROUP; i++) high[i] = (int8_t)((whole[i] + 128) >> 8);
            for (int i = 0; i < GROUP; i++) low[i] = (int8_t)whole[i];
            x->scale[at * x->rows + r] = top / LARGEST;
            x->offset[at * x->rows + r] = top / LARGEST * sum;
        }
    }
}

/* Sixteen outputs of a group for `rows` rows: what their whole numbers add to the sums. */
static inline __attribute__((always_inline)) void add_group(int bits, int rows, const integers *whole, const uint16_t *scale,
                                                            const uint16_t *minimum, const float *x_scale, const float *x_offset, vector *sums) {
    vector d = halves(scale), m = bits == 8 ? d * -128.0f : halves(minimum);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        sums[r] += __builtin_convertvector((whole[r] << 8) + whole[rows + r], vector) * (x_scale[r] * d);
        sums[r] += m * x_offset[r];
    }
}

static inline __attribute__((always_inline)) void store_sums(int rows, const vector *sums, float *y, long y_row, long wide) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        if (wide == WIDTH) *(vector *)(y + r * y_row) = sums[r];
        else memcpy(y + r * y_row, &sums[r], wide * sizeof(float));
    }
}

/* One block times one tile. a, scales and offsets are the block's, q, scale and minimum the tile's. */
static inline __attribute__((always_inline)) void block_dots(int bits, int rows, long G, const uint8_t *q, const uint16_t *scale,
                                                             const uint16_t *minimum, const int8_t *a, const float *x_scale,
                                                             const float *x_offset, float *y, long y_row, long wide) {
    vector sums[8];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) sums[r] = (vector){0};
    for (long g = 0; g < G; g++) {
        words w[QUADS];
        integers whole[16];
#pragma GCC unroll 8
        for (int i = 0; i < QUADS; i++) {
            const uint8_t *from = q + (bits == 8 ? g * QUADS + i : g * QUADS / 2 + i / 2) * 4 * WIDTH;
            words found = *(const words *)from;
            if (bits == 8 || i % 2 == 0) __builtin_prefetch(from + AHEAD_OF_PRODUCT);
            w[i] = bits == 8 ? found : (i % 2 ? found >> 4 : found) & 0x0f0f0f0f;
        }
#pragma GCC unroll 16
        for (int r = 0; r < 2 * rows; r++) {
            integers other = {0}; /* two sums, neither of which waits for the other */
            whole[r] = (integers){0};
#pragma GCC unroll 4
            for (int i = 0; i < QUADS; i += 2) {
                whole[r] = dot(whole[r], w[i], a + (g * 2 * rows + r) * GROUP + 4 * i);
                other = dot(other, w[i + 1], a + (g * 2 * rows + r) * GROUP + 4 * i + 4);
            }
            whole[r] += other;
        }
        add_group(bits, rows, whole, scale + g * WIDTH, minimum + g * WIDTH, x_scale + g * rows, x_offset + g * rows, sums);
    }
    store_sums(rows, sums, y, y_row, wide);
}

static int whole_tiles = 1;

void use_whole_tiles(long use) { whole_tiles = use; } /* for tests, which compare */

#ifdef AMX
#define FILLED 8 /* rows of a block from which on a tile is faster than sixteen sums */

static inline int uses_tiles(long rows) { return whole_tiles && rows >= FILLED && tiles_allowed(); }

#define RING 4 /* whole numbers of as many groups are on their way at once: what a tile stores can be read only a while later */
#define LAG 2

static void whole_tiles_begin(long rows) {
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 2; i++) shape.bytes[i] = 64, shape.rows[i] = 2 * rows;     /* results */
    for (int i = 2; i < 4; i++) shape.bytes[i] = GROUP, shape.rows[i] = 2 * rows;  /* x */
    for (int i = 4; i < 6; i++) shape.bytes[i] = 64, shape.rows[i] = QUADS;        /* weights */
    load_shape(&shape);
}

/* The 4 bits of a tile as bytes. */
static inline void widen(long G, const uint8_t *q, uint8_t *to) {
    __m512i low = _mm512_set1_epi8(15);
    for (long i = 0; i < G * QUADS / 2; i++) {
        __builtin_prefetch(q + i * 64 + AHEAD_OF_PRODUCT);
        __m512i found = _mm512_loadu_si512(q + i * 64);
        _mm512_store_si512(to + i * 128, _mm512_and_si512(found, low));
        _mm512_store_si512(to + i * 128 + 64, _mm512_and_si512(_mm512_srli_epi16(found, 4), low));
    }
}

/* The same as block_dots; q in bytes. */
static inline __attribute__((always_inline)) void block_tiles(int bits, int rows, long G, const uint8_t *q, const uint16_t *scale,
                                                              const uint16_t *minimum, const int8_t *a, const float *x_scale,
                                                              const float *x_offset, float *y, long y_row, long wide) {
    vector sums[8];
    integers ring[RING][16] __attribute__((aligned(64)));
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) sums[r] = (vector){0};
#define MULTIPLY(sum, left, right)                   \
    _tile_loadd(right, q + g * GROUP * WIDTH, 64);   \
    _tile_loadd(left, a + g * 2 * rows * GROUP, GROUP); \
    _tile_zero(sum);                                 \
    _tile_dpbsud(sum, left, right);                  \
    _tile_stored(sum, ring[g % RING], 64);
    for (long g = 0, h = -LAG; h < G; g++, h++) {
        if (g < G && g % 2) { MULTIPLY(1, 3, 5) }
        else if (g < G) { MULTIPLY(0, 2, 4) }
        if (h >= 0) add_group(bits, rows, ring[h % RING], scale + h * WIDTH, minimum + h * WIDTH, x_scale + h * rows, x_offset + h * rows, sums);
    }
#undef MULTIPLY
    store_sums(rows, sums, y, y_row, wide);
}
#endif

/* What a thread needs for the products of rounded rows, between two of these. Returns memory for one tile of any of these widths. */
static uint8_t *products_begin(const rounded *x, long widest) {
    static _Thread_local struct { uint8_t *at; long size; } room;
    if (WIDTH * widest > room.size) {
        free(room.at);
        room.size = WIDTH * widest;
        room.at = aligned_alloc(64, room.size);
    }
#ifdef AMX
    if (uses_tiles(x->rows)) whole_tiles_begin(x->rows);
#endif
    return room.at;
}

static void products_end(const rounded *x) {
    (void)x;
#ifdef AMX
    if (uses_tiles(x->rows)) _tile_release();
#endif
}

/* Outputs o to o + 15 of all rows; y is row 0, output 0. */
static void tile_product(const held *w, const rounded *x, long o, float *y, long y_row, uint8_t *room) {
    long G = w->I / GROUP, wide = w->O - o < WIDTH ? w->O - o : WIDTH;
    const uint8_t *q = w->q + o * w->I * w->bits / 8;
    const uint16_t *d = w->scale + o * G, *m = w->bits == 8 ? d : w->minimum + o * G;
    int tiles = 0;
    (void)room;
#ifdef AMX
    tiles = uses_tiles(x->rows);
    if (tiles && w->bits == 4) {
        widen(G, q, room);
        q = room;
    } else if (tiles)
        for (long i = 0; i < G * GROUP * WIDTH; i += 64) __builtin_prefetch(q + i + AHEAD_OF_PRODUCT);
#endif
    for (long b = 0; b < x->blocks; b++) {
        const int8_t *a = x->a + b * 2 * x->rows * x->I;
        const float *x_scale = x->scale + b * x->rows * G, *x_offset = x->offset + b * x->rows * G;
        float *to = y + block_start(x, b) * y_row + o;
#ifdef AMX
#define BLOCK_OF(bits, rows) \
    if (tiles) block_tiles(bits, rows, G, q, d, m, a, x_scale, x_offset, to, y_row, wide);              \
    else block_dots(bits, rows, G, q, d, m, a, x_scale, x_offset, to, y_row, wide);                     \
    break;
#else
#define BLOCK_OF(bits, rows) block_dots(bits, rows, G, q, d, m, a, x_scale, x_offset, to, y_row, wide); break;
#endif
        switch (w->bits * 8 + x->rows) {
        case 4 * 8 + 1: BLOCK_OF(4, 1)
        case 4 * 8 + 2: BLOCK_OF(4, 2)
        case 4 * 8 + 4: BLOCK_OF(4, 4)
        case 4 * 8 + 8: BLOCK_OF(4, 8)
        case 8 * 8 + 1: BLOCK_OF(8, 1)
        case 8 * 8 + 2: BLOCK_OF(8, 2)
        case 8 * 8 + 4: BLOCK_OF(8, 4)
        case 8 * 8 + 8: BLOCK_OF(8, 8)
        }
#undef BLOCK_OF
    }
}

/* y (T, O) = x (T, I) W', W in 4 or 8 bits. */
void grouped_product(long bits, long T, long I, long O, const float *x, const uint8_t *q, const uint16_t *scale, const uint16_t *minimum, float *y) {
    held w = {bits, O, I, q, scale, minimum};
    rounded a = rounded_of(T, I);
#pragma omp parallel
    {
        uint8_t *room = products_begin(&a, I);
#pragma omp for schedule(static)
        for (long t = 0; t < T; t++) round_row(&a, t, x + t * I);
#pragma omp for schedule(static)
        for (long o = 0; o < O; o += WIDTH) tile_product(&w, &a, o, y, O, room);
        products_end(&a);
    }
    free(a.a);
}

/* Lay out a weight (O, I) whose scales and minima (O, G), in floats, are given; q is zero where O is no multiple of 16. */
void quantise(long bits, long O, long I, const float *weight, const float *scale, const float *minimum, uint8_t *q) {
    long G = I / GROUP, bytes = WIDTH * GROUP * bits / 8;
    for (long o = 0; o < O; o++)
        for (long g = 0; g < G; g++) {
            const float *from = weight + o * I + g * GROUP;
            uint8_t *to = q + (o / WIDTH * G + g) * bytes + o % WIDTH * 4, whole[GROUP];
            float d = scale[o * G + g], m = minimum[o * G + g], by = d > 0 ? 1 / d : 0, top = bits == 8 ? 255 : 15;
            for (int i = 0; i < GROUP; i++) {
                float x = rintf((from[i] - m) * by);
                whole[i] = (uint8_t)(x < 0 ? 0 : x > top ? top : x);
            }
            for (int i = 0; i < QUADS; i++)
                for (int j = 0; j < 4; j++) {
                    if (bits == 8) to[i * 4 * WIDTH + j] = whole[4 * i + j];
                    else to[i / 2 * 4 * WIDTH + j] |= whole[4 * i + j] << (i % 2 ? 4 : 0);
                }
        }
}
