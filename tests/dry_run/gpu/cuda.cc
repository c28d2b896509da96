// The functions of CUDA's libraries whose answers matter to MindSpore. All others answer 0, success (build.py).
#include <cstdint>
#include <cstring>

#include "../calls.h"

extern "C" {

// Device, streams, events

int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaSetDevice(int) { return 0; }
int cudaGetDeviceProperties(char *p, int) {  // cudaDeviceProp of CUDA 11, of a card with 8 GiB
  memset(p, 0, 712);
  auto whole = [p](int at, int value) { memcpy(p + at, &value, sizeof value); };
  auto size = [p](int at, size_t value) { memcpy(p + at, &value, sizeof value); };
  strcpy(p, "NVIDIA dry run");
  size(288, size_t(8) << 30);  // totalGlobalMem
  size(296, 49152);            // sharedMemPerBlock
  whole(304, 65536);           // regsPerBlock
  whole(308, 32);              // warpSize
  size(312, 2147483647);       // memPitch
  whole(320, 1024);            // maxThreadsPerBlock
  const int limits[] = {1024, 1024, 64, 2147483647, 65535, 65535, 1980000};  // maxThreadsDim, maxGridSize, clockRate
  memcpy(p + 324, limits, sizeof limits);
  size(352, 65536);  // totalConstMem
  whole(360, 8);     // major: sm_80
  whole(364, 0);     // minor
  whole(388, 108);   // multiProcessorCount
  return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int) {
  const int WARP = 10, PROCESSORS = 16, MAJOR = 75, MINOR = 76;
  *value = attribute == MAJOR ? 8 : attribute == MINOR ? 0 : attribute == PROCESSORS ? 108 : attribute == WARP ? 32 : 1024;
  return 0;
}
int cudaStreamCreate(void **s) { *s = handle(); return 0; }
int cudaStreamCreateWithFlags(void **s, unsigned) { *s = handle(); return 0; }
int cudaStreamCreateWithPriority(void **s, unsigned, int) { *s = handle(); return 0; }
int cudaEventCreate(void **e) { *e = handle(); return 0; }
int cudaEventCreateWithFlags(void **e, unsigned) { *e = handle(); return 0; }
int cudaEventElapsedTime(float *ms, void *, void *) { *ms = 0.01f; return 0; }
const char *cudaGetErrorString(int) { return "dry run"; }
const char *cudaGetErrorName(int) { return "dry run"; }
int cuGetErrorName(int, const char **name) { *name = "dry run"; return 0; }

// Memory

static size_t used = 0;
int cudaMalloc(void **p, size_t n) {
  used += n;
  return (*p = device_memory(n)) ? 0 : 2;
}
int cudaMemGetInfo(size_t *available, size_t *total) {
  *total = size_t(8) << 30;
  *available = *total > used ? *total - used : 0;
  return 0;
}
int cudaHostAlloc(void **p, size_t n, unsigned) { *p = malloc(n); return 0; }
int cudaFreeHost(void *p) { free(p); return 0; }
int cudaMemcpy(void *to, const void *from, size_t n, int kind) { copy(to, from, n, kind); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *) { copy(to, from, n, kind); return 0; }
int cudaMemset(void *p, int value, size_t n) { note("memset"); memset(p, value, n); return 0; }
int cudaMemsetAsync(void *p, int value, size_t n, void *) { note("memset"); memset(p, value, n); return 0; }

// cuBLAS, cuSOLVER, cuSPARSE, cuDNN: handles and descriptors. A descriptor of a tensor holds its size in bytes

#define CREATE(name) \
  int name(void **p) { *p = handle(); return 0; }
CREATE(cublasCreate_v2)
CREATE(cusolverDnCreate)
CREATE(cusparseCreate)
CREATE(cudnnCreate)
CREATE(cudnnCreateActivationDescriptor)
CREATE(cudnnCreateConvolutionDescriptor)
CREATE(cudnnCreateDropoutDescriptor)
CREATE(cudnnCreateFilterDescriptor)
CREATE(cudnnCreateLRNDescriptor)
CREATE(cudnnCreateOpTensorDescriptor)
CREATE(cudnnCreatePoolingDescriptor)
CREATE(cudnnCreateRNNDescriptor)
CREATE(cudnnCreateReduceTensorDescriptor)
CREATE(cudnnCreateTensorDescriptor)
int cublasGetMathMode(void *, int *mode) { *mode = 0; return 0; }
const char *cudnnGetErrorString(int) { return "dry run"; }

static size_t bytes_of(int type, int n, const int *shape) {
  size_t bytes = type == 1 ? 8 : type == 2 ? 2 : 4;  // double, half, float
  for (int i = 0; i < n; i++) bytes *= shape[i];
  return bytes;
}
int cudnnSetTensorNdDescriptorEx(size_t *d, int, int type, int n, const int *shape) { *d = bytes_of(type, n, shape); return 0; }
int cudnnSetTensorNdDescriptor(size_t *d, int type, int n, const int *shape, const int *) {
  *d = bytes_of(type, n, shape);
  return 0;
}
int cudnnSetFilterNdDescriptor(size_t *d, int type, int, int n, const int *shape) { *d = bytes_of(type, n, shape); return 0; }
int cudnnSetTensor4dDescriptor(size_t *d, int, int type, int n, int c, int h, int w) {
  const int shape[] = {n, c, h, w};
  *d = bytes_of(type, 4, shape);
  return 0;
}
int cudnnSetFilter4dDescriptor(size_t *d, int type, int, int k, int c, int h, int w) {
  const int shape[] = {k, c, h, w};
  *d = bytes_of(type, 4, shape);
  return 0;
}
int cudnnGetTensorSizeInBytes(size_t *d, size_t *bytes) { *bytes = *d; return 0; }
int cudnnGetFilterSizeInBytes(size_t *d, size_t *bytes) { *bytes = *d; return 0; }
int cudnnGetReductionIndicesSize(void *, void *, void *, void *, size_t *bytes) { *bytes = 0; return 0; }
int cudnnGetReductionWorkspaceSize(void *, void *, void *, void *, size_t *bytes) { *bytes = 0; return 0; }

struct Algorithm {  // cudnnConvolutionFwdAlgoPerf_t
  int algorithm, status;
  float time;
  size_t memory;
  int deterministic, math, reserved[3];
};
#define ALGORITHM(name)                                                                             \
  int name(void *, void *, void *, void *, void *, int, int *found, Algorithm *algorithm) {         \
    *found = 1;                                                                                     \
    *algorithm = {1, 0, 0, 0, 0, 0, {}};                                                            \
    return 0;                                                                                       \
  }
ALGORITHM(cudnnGetConvolutionForwardAlgorithm_v7)
ALGORITHM(cudnnGetConvolutionBackwardDataAlgorithm_v7)
ALGORITHM(cudnnGetConvolutionBackwardFilterAlgorithm_v7)
ALGORITHM(cudnnFindConvolutionForwardAlgorithm)
ALGORITHM(cudnnFindConvolutionBackwardDataAlgorithm)
ALGORITHM(cudnnFindConvolutionBackwardFilterAlgorithm)
#define WORKSPACE(name) \
  int name(void *, void *, void *, void *, void *, int, size_t *bytes) { *bytes = 0; return 0; }
WORKSPACE(cudnnGetConvolutionForwardWorkspaceSize)
WORKSPACE(cudnnGetConvolutionBackwardDataWorkspaceSize)
WORKSPACE(cudnnGetConvolutionBackwardFilterWorkspaceSize)
}
