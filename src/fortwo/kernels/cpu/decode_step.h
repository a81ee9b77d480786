/* HEAD */
#pragma once
#include "adapters_int8.h"
#include "decode_attention.h"

void rotary_angles(const decoder_shape *s, long position, float *cosine, float *sine);
void norm_and_rotate_head(long E, const float *norm, float eps, const float *cosine, const float *sine, float *x);
