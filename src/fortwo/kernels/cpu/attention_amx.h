/* HEAD */
#pragma once
#include "gemm_amx.h"
#include "scratch.h"

#ifdef AMX
/* One task: the keys that its queries see are the prefix's and the row's own, up to each query's place. The queries of a token lie together. */
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
