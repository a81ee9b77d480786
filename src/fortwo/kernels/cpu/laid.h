/* Adapters as step.h reads them, in slabs; kernels.c includes this once, before it.

   A slab is sixteen rows of a matrix: what one of each row's whole numbers is worth, in fp32, then the rows' pairs of numbers in 8 bits, (row / 2, 16, 2).
   Its rows are even, and so is what is in them. */

#define SCALES (WIDTH * (long)sizeof(float))
#define SLAB(row) (SCALES + (row) * WIDTH) /* bytes; row: numbers of a row */

typedef struct { /* x (N, M), and where it goes: into the slabs that begin at `at`, from their row `first` on; an odd M is made even */
    const float *x;
    long N, M, at, first;
} matrix;

/* Each of the matrices times its scale into `to`, which is zero. */
void lay_slabs(long count, const matrix *matrices, const float *scales, int8_t *to) {
#pragma omp parallel for schedule(dynamic, 8)
    for (long i = 0; i < count; i++) {
        const matrix *one = matrices + i;
        long M = one->M, even = M + M % 2;
        for (long n = 0; n < one->N; n++) {
            long row = one->first + n;
            int8_t *slab = to + one->at + row / WIDTH * SLAB(even), *line = slab + SCALES + row % WIDTH * 2;
            const float *x = one->x + n * M;
            float top = 0;
            for (long m = 0; m < M; m++) top = fabsf(x[m]) > top ? fabsf(x[m]) : top;
            ((float *)slab)[row % WIDTH] = top / 127 * scales[i];
            for (long m = 0; m < M; m++) line[m / 2 * 2 * WIDTH + m % 2] = (int8_t)rintf(x[m] * (top > 0 ? 127 / top : 0));
        }
    }
}
