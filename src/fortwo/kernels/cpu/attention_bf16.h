/* What attention in bf16 shares with the kernels of whole layers. */
#pragma once
#include "gemm_bf16.h"
#include <sys/mman.h>

#ifdef TILED
#define LARGE_PAGE (1 << 21)

/* A thread's own memory, in large pages where it is large. Parts are taken from it one after the other, each aligned to a line of the cache. */
typedef struct { char *at; long size, taken; } scratch_arena;

static inline void *take(scratch_arena *scratch, long bytes) {
    void *at = scratch->at + scratch->taken;
    scratch->taken += (bytes + 63) / 64 * 64;
    return at;
}

static inline void reserve(scratch_arena *scratch, long bytes) {
    if (bytes > scratch->size) {
        long page = bytes < LARGE_PAGE ? 64 : LARGE_PAGE;
        free(scratch->at);
        scratch->size = (bytes + page - 1) / page * page;
        scratch->at = aligned_alloc(page, scratch->size);
        if (page == LARGE_PAGE) madvise(scratch->at, scratch->size, MADV_HUGEPAGE);
    }
    scratch->taken = 0;
}

/* One task. Its queries attend to the keys of the prefix and of their own row, up to their own token. The queries of a token are neighbours. */
typedef struct {
    long r, k, before, start, L, S, Sp, M, Mp;
} packed_task;

void pack_rows(long count, long E, const bf16 **rows, long head, bf16 *to);
void pack_columns(long count, long E, const bf16 **rows, long head, bf16 *to);
void attend_with_tiles(const packed_task *t, long H, long G, long N, long E, const bf16 *qkv, const bf16 *keys, const bf16 *values, bf16 *q, float *scores, bf16 *mass, float *mixed, bf16 *out, float *lse);
void attention_shared(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const bf16 *qkv, bf16 *out, float *lse);
void attention_backward_shared(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const bf16 *qkv, const float *lse, const bf16 *grad, float *between, bf16 *grad_qkv);
long attention_between(long P, long R, long K, long E);
#endif
