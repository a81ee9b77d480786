/* Single rows of the small operations, for the kernels of whole layers. A function has one body, so that each of its callers gets the same bits. */
#pragma once
#include "common.h"

#define ROW_FUNCTIONS(type, name)                                                                                                                     \
    float add_norm_row_##name(long D, const float *x, const type *y, const float *weight, float eps, float *sum, type *out);                          \
    void add_norm_backward_row_##name(long D, const float *sum, float by, const float *weight, const type *grad, const float *along, float *grad_x,   \
                                      type *grad_y);                                                                                                  \
    void swiglu_line_##name(long n, const type *gate, const type *up, type *out);                                                                     \
    void swiglu_backward_line_##name(long n, const type *gate, const type *up, const type *grad, type *grad_gate, type *grad_up);                     \
    void rotate_row_##name(long N, long rotated, long E, const type *x, const float *cosine, const float *sine, float sign, type *out);
ROW_FUNCTIONS(float, float32)
ROW_FUNCTIONS(bf16, bfloat16)
