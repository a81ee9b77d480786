/* The binary interface of the kernels. The sources in this folder are compiled against this header, and Python's cffi reads the same declarations
   (cpu/__init__.py), so no type is written twice. Lines that begin with # are for the C compiler alone.

   Tensors are contiguous, rows first, and on the CPU; a pointer marked "may be null" is optional. Letters: T tokens, B rows of a decode step, D hidden
   size, H query heads, K key/value heads, E head size, I intermediate size or inputs, O outputs, V vocabulary, R rank, or rows of a pack.

   The sources are compiled once for each instruction level. Functions whose names contain `tiled`, the gemm_* functions, pack_panels, prefill and
   train_layers_* exist where the processor multiplies bf16: at the levels amx and avx512. Elsewhere plain operations
   take their place.

   What a new level has to provide: for 8-bit products the micro-kernel `block_by_dots` of quantized_gemm.c, or one beside it as quantized_gemm_amx.h
   has it (configure, multiply a block of rounded rows by a tile of 16 outputs); for bf16 products the micro-kernel of tiles.h (`tile_step` with
   `tiles_clear`, `tiles_loaded` and `tiles_stored`: a block of 32 x 32 sums plus 32 rows times one step of a panel), and `pack` of gemm_bf16.c, which
   writes the panels that it reads. The drivers (shares of threads, blocking for the cache, epilogues) call nothing else. Row functions
   (elementwise.h) may be replaced as elementwise_avx512.c does. Then the level is named in isa.py. */
#pragma once
#include <stdint.h>
#pragma GCC visibility push(default)

typedef uint16_t bf16;
typedef uint16_t fp16;

/* ---- Small operations, elementwise.c. Each exists for fp32 and for bf16; sums, scales and norms are fp32. */
/* sum = x + y, or x itself where y is null (then sum is not written); out = sum * scale * weight with scale = 1 / sqrt(mean(sum^2) + eps) of each row. */
void add_norm_float32(long T, long D, const float *x, const float *y, const float *weight, float eps, float *sum, float *out, float *scale);
void add_norm_bfloat16(long T, long D, const float *x, const bf16 *y, const float *weight, float eps, float *sum, bf16 *out, float *scale);
/* The gradient of x. along: the gradient that reaches sum by other ways (may be null). grad_y is the same in y's type (may be null). */
void add_norm_backward_float32(long T, long D, const float *sum, const float *scale, const float *weight, const float *grad, const float *along,
                               float *grad_x, float *grad_y);
void add_norm_backward_bfloat16(long T, long D, const float *sum, const float *scale, const float *weight, const bf16 *grad, const float *along,
                                float *grad_x, bf16 *grad_y);
/* out = silu(gate) * up; gate and up lie side by side in a row of 2 I. */
void swiglu_float32(long T, long I, const float *gate_up, float *out);
void swiglu_bfloat16(long T, long I, const bf16 *gate_up, bf16 *out);
void swiglu_backward_float32(long T, long I, const float *gate_up, const float *grad, float *grad_gate_up);
void swiglu_backward_bfloat16(long T, long I, const bf16 *gate_up, const bf16 *grad, bf16 *grad_gate_up);
/* An element is kept, and divided by the share that is kept, where a hash of the seed and its index falls below `kept` (of 2^32); else it becomes 0. */
void dropout_float32(long size, long seed, long kept, const float *x, float *out);
void dropout_bfloat16(long size, long seed, long kept, const bf16 *x, bf16 *out);
/* The first `rotated` of N heads are rotated by cosine and sine (T, E), each angle in both halves; the others are copied. sign -1 rotates back. */
void rotate_float32(long T, long N, long rotated, long E, const float *x, const float *cosine, const float *sine, float sign, float *out);
void rotate_bfloat16(long T, long N, long rotated, long E, const bf16 *x, const float *cosine, const float *sine, float sign, bf16 *out);

/* ---- Attention and losses; fp32 and bf16. The tiled variants take bf16, E and V multiples of 32. */
/* Attention over R rows laid end to end behind a shared prefix of P tokens: [P | rest of row 0 | rest of row 1 | ...]. A token attends to the prefix and
   to its own row up to itself. qkv (T, H + 2K, E); lse (T, H): the logarithm of each softmax's sum, which backward reads. */
void attention_float32(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const float *qkv, float *out, float *lse);
void attention_bfloat16(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const bf16 *qkv, bf16 *out, float *lse);
void attention_tiled(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const bf16 *qkv, bf16 *out, float *lse);
void attention_backward_float32(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const float *qkv, const float *lse,
                                const float *grad, float *grad_qkv);
void attention_backward_bfloat16(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const bf16 *qkv, const float *lse,
                                 const bf16 *grad, bf16 *grad_qkv);
void attention_backward_tiled(long P, long R, const long *starts, const long *lengths, long H, long K, long E, const bf16 *qkv, const float *lse,
                            const bf16 *grad, bf16 *grad_qkv);
/* Row b of qkv (B, H + 2K, E) is at positions[b] of row rows[b] of the cache, in fp16 (half = 1) or fp32 (half = 0). Its keys and values are written
   there, then its queries attend to everything up to there. E is a multiple of 16. */
void decode_attention(long B, long H, long K, long E, long row_step, long head_step, const long *rows, const long *positions, const float *qkv,
                      void *k, void *v, float *out, long half);
/* The cross-entropy of each row of logits (N, V) with a token; the logits become the gradient of the losses' sum. */
void cross_entropy_float32(long N, long V, float *logits, const long *tokens, float *loss);
void cross_entropy_bfloat16(long N, long V, bf16 *logits, const long *tokens, float *loss);
void cross_entropy_tiled(long N, long V, bf16 *logits, const long *tokens, float *loss);
/* KL(p || q) of the softmaxes of each row of wanted (p) and of logits (q), both (N, V); the logits become the gradient of the losses' sum. */
void kl_divergence_float32(long N, long V, float *logits, const float *wanted, float *loss);
void kl_divergence_bfloat16(long N, long V, bf16 *logits, const bf16 *wanted, float *loss);
void kl_divergence_tiled(long N, long V, bf16 *logits, const bf16 *wanted, float *loss);

/* ---- Optimizer, adamw.c */
/* The sum of squares, the same with any number of threads. */
void sum_of_squares(long N, const float *x, double *sum);
/* One step of AdamW in one pass. The gradient is multiplied by `scale` first, and is zero afterwards. rate: divided by the bias of the first moment;
   by: 1 / the root of the bias of the second; shrink: what weight decay leaves of x. The 8-bit variant is described in train/adamw.py. */
void adamw(long N, long step, float *x, float *grad, float *first, float *second, float scale, float beta1, float beta2, float rate, float by,
           float eps, float shrink);
void adamw_8bit(long N, long step, float *x, float *grad, uint8_t *first, float *first_unit, uint8_t *root, float *root_unit, float scale,
                float beta1, float beta2, float rate, float by, float eps, float shrink);

/* ---- Weights in 4, 5, 6 or 8 bits, quantized_gemm.c, whose head describes the layout */
typedef struct { /* one or several parts below each other, each with bits of its own, in outputs from `first` on, which is a multiple of 16. bits: 4, 5, 6,
                    8, or 16 for the bf16 panels of pack_panels, at q, as the only part; minimum: with 4 and 5 bits */
    long O, I, parts;
    struct { long first, bits; const uint8_t *q; const fp16 *scale, *minimum; } part[3];
} quantized_weight;

/* Packs a weight (O, I) in 4 or 8 bits whose scales and minima (O, I / 32) are given; q must be zero. */
void quantize(long bits, long O, long I, const float *weight, const float *scale, const float *minimum, uint8_t *q);
/* y (T, O) = x (T, I) W', with x rounded to 16 bits. The tiled variant rounds both to bf16, and O and I are multiples of 16 and 32. */
void quantized_gemm(const quantized_weight *w, long T, const float *x, float *y);
void quantized_gemm_tiled(const quantized_weight *w, long T, const float *x, float *y);

/* ---- Weights in NF4, nf4.c */
/* The codes and the largest magnitudes of blocks of 64 numbers. between (15): the middles of neighbouring levels. */
void nf4_quantize(long blocks, const float *weight, const float *between, uint8_t *codes, float *largest);
/* Blocks `first` to first + blocks - 1 as numbers. */
void nf4_dense_float32(long first, long blocks, const uint8_t *codes, const uint8_t *largest, const float *map, const float *scale, const float *offset,
                       const float *levels, float *out);
void nf4_dense_bfloat16(long first, long blocks, const uint8_t *codes, const uint8_t *largest, const float *map, const float *scale, const float *offset,
                        const float *levels, bf16 *out);

/* ---- Products in bf16 with sums in fp32, gemm_bf16.c */
/* Whether the products by blocks can be used: not where the operating system keeps this process from AMX's tiles. */
int tiles_allowed(void);
/* From how many rows on weights in 4 to 8 bits are multiplied faster once they are made bf16: on AMX, and where AVX-512 has fast products of pairs. 0: they
   never are. */
long widening_rows(void);
/* All panels of b (N, K), whose steps b_n from row to row and b_k from column to column are given; one of them is 1. */
void pack_panels(long N, long K, const bf16 *b, long b_n, long b_k, bf16 *to);
/* c (M, N) = a b' + a2 b2' (K2 = 0: without the second); c is bf16, or fp32 where `wide`, with c_row numbers from row to row. Steps of b that are both 0
   mean that its panels are packed already; both -1, that those of its transpose are. */
void gemm_bf16(long M, long N, long K, const bf16 *a, long a_row, const bf16 *b, long b_n, long b_k, long K2, const bf16 *a2, long a2_row,
               const bf16 *b2, long b2_n, long b2_k, void *c, long c_row, long wide);
/* c (M, N) = a (M, K) b, where the panels of b's transpose (K outputs, N inputs) are packed, and K is so long that no panel of b fits into a cache. */
void gemm_bf16_long_sum(long M, long N, long K, const bf16 *a, long a_row, const bf16 *packed, float *c);
/* gemm_bf16 of one product with b (N, K) in NF4; from: the index of its first number. */
void gemm_nf4(long M, long N, long K, const bf16 *a, long a_row, const uint8_t *codes, const uint8_t *largest, const float *map, const float *scale,
              const float *offset, const float *levels, long from, long b_n, long b_k, void *c, long c_row, long wide);

/* ---- Adapters in 8 bits, adapters_int8.c, whose head describes the layout */
enum { QKV_PROJ, O_PROJ, GATE_UP_PROJ, DOWN_PROJ, PRODUCTS };

typedef struct { /* x (N, M), which goes to the blocks at byte `at`, from their row `first` on, multiplied by `scale`; an odd M is made even by a zero */
    const float *x;
    long N, M, at, first;
    float scale;
} adapter_matrix;

typedef struct { /* one fused product's update: where in the adapter A lies, in blocks of sixteen ranks, and each part's B, in blocks of sixteen outputs;
                    scale: what the updated outputs are multiplied by (DoRA), a multiple of 32 numbers, or null */
    long ranks, A, parts;
    struct { long first, width, rank, pairs, B; } part[3];
    const float *scale;
} adapter_product;

typedef struct { /* applies to rows members[first] to members[last - 1]; products: (layers, PRODUCTS) */
    const adapter_product *products;
    const int8_t *weights;
    long first, last;
} adapter;

/* Writes the matrices into `to`, which is zero. */
void pack_adapter(long count, const adapter_matrix *matrices, int8_t *to);
/* Changes y (rows, O), one fused product of x (rows, I), as N adapters do. index: layer * PRODUCTS + product. */
void add_adapters(long N, const adapter *adapters, const long *members, long index, long rows, long I, long O, const float *x, float *y);

/* ---- The whole decoder, for serving: decode_step.c and prefill.c */
typedef struct { /* null where the family has no bias, or no norms of heads */
    const float *attention_norm, *mlp_norm, *bias, *q_norm, *k_norm;
    quantized_weight w[PRODUCTS];
} decoder_layer;

typedef struct { /* inverse_frequency: (E / 2) of the rotary embedding */
    long layers, D, H, K, E, I;
    double eps;
    const float *embedding, *norm, *inverse_frequency;
} decoder_shape;

typedef struct { /* a row's keys and values: (length, E) for each layer and head, with so many numbers from layer to layer and from head to head */
    void *k, *v;
    long layer_step, head_step;
} cache_place;

typedef struct { /* the new token of a sequence, its position, and where the sequence's keys and values are */
    long token, position;
    cache_place at;
} new_token;

/* out (B, D): hidden states after the final norm, of one new token of each sequence. Weights are in 4 to 8 bits, keys and values in fp16. The outputs of
   fused products, and of an adapter's parts, are multiples of 16. */
void decode_step(long B, const decoder_shape *s, const decoder_layer *layers, const new_token *rows, long N, const adapter *adapters,
                 const long *members, float *out);

typedef struct { /* tokens start to start + length - 1, after `before` tokens that the cache holds: a part of one prompt, or what several prompts begin
                    with. Their keys and values go to `copies` places from `first` on; those of the tokens before them are in each. */
    long first, copies, before, start, length;
} prompt_piece;

/* out (T, D): hidden states after the final norm. Each token is in one of R pieces. D, H * E and I are multiples of 32; products are in bf16. */
void prefill(long T, long R, const decoder_shape *s, const decoder_layer *layers, const long *tokens, const prompt_piece *pieces,
             const cache_place *places, long N, const adapter *adapters, const long *members, float *out);

/* ---- The whole decoder, for training: train_layers.c */
typedef struct { /* a target's B (outputs, rank), which is added to the columns from `column` on */
    float *B;
    long column, outputs, rank;
    double scale;
} lora_target;

typedef struct { /* y = x W' + drop(x) A' (scale B)' with the frozen W (O, I) as panels, and the stacked A (R, I), the targets' ranks one after the other */
    const bf16 *packed;
    float *A;
    long O, I, R, seed;
    lora_target targets[3];
} lora_product;

typedef struct { /* x: the input (T, D); memory: as many bytes as train_layers_bytes says, which all layers may share where t->again */
    float *x;
    char *memory;
    const float *attention_norm, *mlp_norm;
    lora_product qkv, o, gate_up, down;
} train_layer;

typedef struct { /* kept: of 2^32 numbers, by dropout, 0 without dropout; again: layers are computed once more in backward. P, R, starts and lengths as
                    attention has them; cosine and sine (T, E). D, I and E are multiples of 32. */
    long L, T, D, H, K, E, I, kept, again;
    double eps;
    long P, R;
    const long *starts, *lengths;
    const float *cosine, *sine;
} training_pass;

/* Bytes (L) of each layer's memory. */
void train_layers_bytes(const training_pass *t, const train_layer *layers, long *bytes);
/* The first layer's x through all layers to out (T, D). */
void train_layers_forward(const training_pass *t, const train_layer *layers, float *out);
/* From the gradient of out to that of x (may be null). The gradients of A and of the Bs are added `shift` bytes behind these. */
void train_layers_backward(const training_pass *t, const train_layer *layers, const float *grad, long shift, float *grad_x);

#pragma GCC visibility pop
