/* What the product with LoRA shares with the layers. */
#pragma once
#include "attention_bf16.h"

#ifdef TILED
/* What backward needs of a product: the mask of dropout, and x A' as columns. */
typedef struct {
    uint32_t *mask;
    bf16 *transposed;
} product_memory;

typedef struct {
    float *middle, *scale, *middle_scale, *lse;
    bf16 *normed, *qkv, *mixed, *middle_normed, *gate_up, *gated;
    product_memory of_qkv, of_o, of_gate_up, of_down;
} layer_memory;

/* A and B as panels, for one direction. */
typedef struct { bf16 *A, *B; } packed_lora;

/* What the threads share for a layer: the packed A and B of its products, and x A', or its gradient, by rows and by columns. */
typedef struct {
    packed_lora qkv, o, gate_up, down;
    bf16 *h, *transposed;
} workspace;

static inline long tall_of(long T, long s) { return T - s < PANEL ? T - s : PANEL; } /* rows of the strip that begins at s */

/* What follows a product: its heads are rotated; or it is added to `from`; or its left half gates its right half. */
typedef enum { ROTATE, ADD, SWIGLU } forward_epilogue;

/* Makes the input of a product, the strip from row s on, together with its share in A. */
typedef void (*entry)(const training_pass *t, const void *given, long s);

void pack_lora(const lora_product *p, int back, packed_lora to);
void lora_shrink(const lora_product *p, int back, long tall, long K, const bf16 *a, const bf16 *panels, bf16 *h, bf16 *transposed, long Tp);
void lora_shrink_dropped(const training_pass *t, const lora_product *p, long m, long tall, const bf16 *x, packed_lora own, const workspace *w, const product_memory *to);
void product_forward(forward_epilogue what, const training_pass *t, const lora_product *p, entry in, const void *given, const bf16 *x, packed_lora own, const workspace *w, const layer_memory *m, const float *from, float *to);
void product_backward(const training_pass *t, const lora_product *p, const bf16 *grad, packed_lora own, const workspace *w, const bf16 *x, const product_memory *m, long shift, bf16 *grad_x, const bf16 *gate_up, bf16 *grad_gate_up);
#endif
