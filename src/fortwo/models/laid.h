/* Adapters laid out as step.h reads them. kernels.c includes this once. */

typedef struct { /* x (N, M), and where it goes: into its (.., M / 2, 16, 2) that begins at `at`, from row `first` on; an odd M is made even */
    const float *x;
    long N, M, at, first;
} matrix;

/* Each of the matrices times its scale into `to`, which is zero. */
void lay_pairs(long count, const matrix *matrices, const float *scales, bf16 *to) {
#pragma omp parallel for schedule(dynamic, 8)
    for (long i = 0; i < count; i++) {
        const matrix *one = matrices + i;
        long M = one->M, pairs = (M + 1) / 2;
        float scale = scales[i];
        for (long n = 0; n < one->N; n++) {
            long row = one->first + n;
            const float *x = one->x + n * M;
            bf16 *line = to + one->at + (row / WIDTH * pairs * WIDTH + row % WIDTH) * 2;
            for (long m = 0; m + 1 < M; m += 2) {
                bf16 pair[2] = {to_bf16(x[m] * scale), to_bf16(x[m + 1] * scale)};
                memcpy(line + m * WIDTH, pair, sizeof pair);
            }
            if (M % 2) line[(M - 1) * WIDTH] = to_bf16(x[M - 1] * scale);
        }
    }
}
