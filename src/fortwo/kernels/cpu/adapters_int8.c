/* Adapters in 8 bits: their layout, and the products that add what several adapters change in their rows. The names follow Punica's kernels: shrink
   computes h = A x, expand adds B h. */
#include "adapters_int8.h"

void pack_adapter(long count, const adapter_matrix *matrices, int8_t *to) {
#pragma omp parallel for schedule(dynamic, 8)
    for (long i = 0; i < count; i++) {
        const adapter_matrix *one = matrices + i;
        long M = one->M, even = M + M % 2;
        for (long n = 0; n < one->N; n++) {
            long row = one->first + n;
            int8_t *block = to + one->at + row / WIDTH * BLOCK_BYTES(even), *line = block + SCALES + row % WIDTH * 2;
            const float *x = one->x + n * M;
            float top = 0;
            for (long m = 0; m < M; m++) top = fabsf(x[m]) > top ? fabsf(x[m]) : top;
            ((float *)block)[row % WIDTH] = top / 127 * one->scale;
            for (long m = 0; m < M; m++) line[m / 2 * 2 * WIDTH + m % 2] = (int8_t)rintf(x[m] * (top > 0 ? 127 / top : 0));
        }
    }
}

/* Rounds row t of x, `count` numbers (a multiple of 16), to 16 bits, with a scale so small that the sum of their products with 8-bit numbers fits
   into 32 bits. */
void quantize_int16(const int16_rows *to, long t, long row, long count, const float *x) {
    float tops[WIDTH] = {0}, sums[WIDTH] = {0}, sum = 0;
    for (long i = 0; i < count; i += WIDTH)
        for (long lane = 0; lane < WIDTH; lane++) {
            float size = fabsf(x[i + lane]);
            tops[lane] = size > tops[lane] ? size : tops[lane];
            sums[lane] += size;
        }
    for (long lane = 0; lane < WIDTH; lane++) sum += sums[lane];
    float top = largest(tops, WIDTH), by = top > 0 ? INT16_MAX / top : 0;
    by = sum * by > MOST_SUMMED ? MOST_SUMMED / sum : by;
    for (long i = 0; i < count; i++) to->x[t * row + i] = (int16_t)rintf(x[i] * by);
    to->scale[t] = by > 0 ? 1 / by : 0;
}

/* h (rows, ranks) = A x for the rows of each adapter. The calling threads share the work. */
void shrink(long N, const adapter *adapters, const long *members, long index, long I, const int16_rows *x, float *h, long h_row) {
    long blocks = 0, tiles = h_row / WIDTH;
    for (long n = 0; n < N; n++) blocks = adapters[n].last - adapters[n].first > blocks ? adapters[n].last - adapters[n].first : blocks;
    blocks = (blocks + 3) / 4;
#pragma omp for schedule(dynamic)
    for (long task = 0; task < N * tiles * blocks; task++) {
        const adapter *one = adapters + task / blocks / tiles;
        const adapter_product *own = one->products + index;
        long tile = task / blocks % tiles, m = one->first + task % blocks * 4;
        if (tile * WIDTH >= own->ranks) continue;
        const int8_t *A = one->weights + own->A + tile * BLOCK_BYTES(I);
        if (one->last - m >= 4) shrink_rows(4, members + m, I, A, x, h + tile * WIDTH, h_row);
        else for (; m < one->last; m++) shrink_rows(1, members + m, I, A, x, h + tile * WIDTH, h_row);
    }
}

/* Rounds h to 16 bits. Each thread does this for itself, because the numbers are few. */
void quantize_ranks(long N, const adapter *adapters, const long *members, long index, const float *h, long h_row, const int16_rows *to) {
    for (const adapter *one = adapters; one < adapters + N; one++)
        for (long m = one->first; one->products[index].ranks && m < one->last; m++)
            quantize_int16(to, members[m], h_row, one->products[index].ranks, h + members[m] * h_row);
}

/* Applies what the adapters change in outputs o to o + 15 of their rows of y. */
void expand(long N, const adapter *adapters, const long *members, long index, long o, const int16_rows *h, long h_row, float *y, long y_row) {
    for (const adapter *one = adapters; one < adapters + N; one++) {
        const adapter_product *own = one->products + index;
        for (long p = 0; p < own->parts; p++) {
            long first = own->part[p].first, pairs = own->part[p].pairs;
            if (o < first || o >= first + own->part[p].width) continue;
            const int8_t *B = one->weights + own->part[p].B + (o - first) / WIDTH * BLOCK_BYTES(2 * pairs);
            expand_all_rows(one->first, one->last, members, pairs, B, h->x + own->part[p].rank, h_row, h->scale, y + o, y_row);
        }
        if (!own->scale) continue;
        for (long m = one->first; m < one->last; m++) *(vector *)(y + members[m] * y_row + o) *= *(const vector *)(own->scale + o);
    }
}

long most_ranks(long N, const adapter *adapters, long from, long to) {
    long ranks = 0;
    for (const adapter *one = adapters; one < adapters + N; one++)
        for (long index = from; index < to; index++) ranks = one->products[index].ranks > ranks ? one->products[index].ranks : ranks;
    return ranks;
}

/* Takes memory for rounded rows. */
int16_rows int16_rows_at(char **scratch, long rows, long row) {
    int16_rows all = {(int16_t *)(*scratch + rows * sizeof(float)), (float *)*scratch};
    *scratch += BYTES_OF_ROWS(rows, row);
    return all;
}

void add_adapters(long N, const adapter *adapters, const long *members, long index, long rows, long I, long O, const float *x, float *y) {
    long ranks = most_ranks(N, adapters, index, index + 1), threads = omp_get_max_threads();
    char *memory = aligned_alloc(64, BYTES_OF_ROWS(rows, I) + threads * BYTES_OF_ROWS(rows, ranks) + PAD(rows * ranks) * sizeof(float)), *scratch = memory;
    int16_rows given = int16_rows_at(&scratch, rows, I), own[threads];
    for (long i = 0; i < threads; i++) own[i] = int16_rows_at(&scratch, rows, ranks);
    float *h = (float *)scratch;
#pragma omp parallel
    {
        const int16_rows *mine = own + omp_get_thread_num();
#pragma omp for schedule(static)
        for (long t = 0; t < rows; t++) quantize_int16(&given, t, I, I, x + t * I);
        shrink(N, adapters, members, index, I, &given, h, ranks);
        quantize_ranks(N, adapters, members, index, h, ranks, mine);
#pragma omp for schedule(dynamic, SHARE(O))
        for (long o = 0; o < O; o += WIDTH) expand(N, adapters, members, index, o, mine, ranks, y, O);
    }
    free(memory);
}
