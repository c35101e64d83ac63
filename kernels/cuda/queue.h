/* What host and device code of the CUDA backend share. */
#pragma once
#include <stdbool.h>

#if defined(__CUDACC__)
#define CUDA_BOTH static __host__ __device__ __forceinline__
#else
#define CUDA_BOTH static inline
#endif

/* Where launches go: a stream, and whether the device knows programmatic dependent launch. */
struct cuda_queue {
    void *stream;
    bool overlaps;
};
