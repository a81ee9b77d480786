/* The element type of a source that is compiled once for each type (build.py): fp32, or bf16 where ELEMENT_BFLOAT16 is defined. */
#pragma once
#include "common.h"

#ifdef ELEMENT_BFLOAT16
#define element bf16
#define NAME(kernel) kernel##_bfloat16
#define LOAD from_bf16
#define STORE to_bf16
#else
#define element float
#define NAME(kernel) kernel##_float32
#define LOAD(x) (x)
#define STORE(x) (x)
#endif
