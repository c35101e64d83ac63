/* CUDA's vector types for the C files that hand pointers to them around. */
#pragma once
#if !defined(__cplusplus)
typedef struct uint2 uint2;
#elif defined(__CUDACC__)
#include <vector_types.h>
#else
#include "kernels/emulation/emulation.h"
#endif
