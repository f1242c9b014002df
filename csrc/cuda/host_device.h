#pragma once

// What a kernel decides by arithmetic alone (places, layouts, decoding) is written once, in headers that also compile
// without nvcc: tests/host/ runs it for every lane on a machine without a GPU.
#ifdef __CUDACC__
#define HARLORA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HARLORA_HOST_DEVICE inline
#endif
