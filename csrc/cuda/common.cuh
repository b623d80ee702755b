// What the kernels share: access to memory, warps, tensor cores, clusters, launches. Whatever is
// not plain C++ stands here, once for the device and once for the emulator of tests/emulator.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <utility>

#include "types.h"

#if !defined(VMTC_EMULATOR) && defined(__CUDA_ARCH__)
#define VMTC_DEVICE_CODE __CUDA_ARCH__
#else
#define VMTC_DEVICE_CODE 0
#endif

namespace vmtc::cuda {

using bfloat16 = __nv_bfloat16;

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;

template <typename T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// the dynamic shared memory of the block; there is no other
template <typename T>
__device__ __forceinline__ T* shared_memory() {
#ifdef VMTC_EMULATOR
  return static_cast<T*>(emulator::shared_memory());
#else
  extern __shared__ __align__(128) unsigned char vmtc_shared_memory[];
  return reinterpret_cast<T*>(vmtc_shared_memory);
#endif
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ half from_float<half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// 16 bytes of elements, moved by one instruction
template <typename T>
struct alignas(16) Pack {
  static constexpr int SIZE = 16 / sizeof(T);
  T value[SIZE];
};

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* address) {
#ifdef VMTC_EMULATOR
  emulator::check_aligned(address, 16);
  Pack<T> pack;
  std::memcpy(&pack, address, 16);
  return pack;
#else
  const uint4 bits = *reinterpret_cast<const uint4*>(address);
  Pack<T> pack;
  memcpy(&pack, &bits, 16);
  return pack;
#endif
}

template <typename T>
__device__ __forceinline__ void store_pack(T* address, const Pack<T>& pack) {
#ifdef VMTC_EMULATOR
  emulator::check_aligned(address, 16);
  std::memcpy(address, &pack, 16);
#else
  uint4 bits;
  memcpy(&bits, &pack, 16);
  *reinterpret_cast<uint4*>(address) = bits;
#endif
}

// To global memory in one instruction: left to the compiler, it is at times done in four.
template <typename T>
__device__ __forceinline__ void store_global(T* address, const Pack<T>& pack) {
#ifdef VMTC_EMULATOR
  emulator::check_global(address);
  store_pack(address, pack);
#elif VMTC_DEVICE_CODE
  uint32_t word[4];
  memcpy(word, &pack, 16);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)),
               "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
               : "memory");
#endif
}

// sums and extremes over the lanes of a warp, the same bits in every lane
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int bits = WARP / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(ALL_LANES, x, bits);
  return x;
}

template <typename T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int bits = WARP / 2; bits > 0; bits /= 2) {
    const T other = __shfl_xor_sync(ALL_LANES, x, bits);
    x = other > x ? other : x;
  }
  return x;
}

// to about 2^-22 of the result and 2^-24 of x; 0 where that is below the normal numbers
__device__ __forceinline__ float exp_fast(float x) {
#ifdef VMTC_EMULATOR
  const float result = __expf(x);
  return result < std::numeric_limits<float>::min() ? 0.f : result;
#elif VMTC_DEVICE_CODE
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
  return result;
#else
  return x;
#endif
}

#if !defined(VMTC_EMULATOR)
__device__ __forceinline__ unsigned shared_address(const void* address) {
  return static_cast<unsigned>(__cvta_generic_to_shared(address));
}
#endif

// Copies SIZE (4, 8 or 16) bytes from global to shared memory, complete after cp_async_wait and a
// barrier; from `bytes` on they are zeros, and nothing is read where bytes is 0.
template <int SIZE>
__device__ __forceinline__ void cp_async(void* to, const void* from, int bytes = SIZE) {
  static_assert(SIZE == 4 || SIZE == 8 || SIZE == 16);
#ifdef VMTC_EMULATOR
  emulator::copy_later(to, from, SIZE, bytes, emulator::Location::current());
#elif VMTC_DEVICE_CODE >= 800
  if constexpr (SIZE == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(from), "n"(SIZE), "r"(bytes)
                 : "memory");
#else
  using Word =
      std::conditional_t<SIZE == 16, uint4, std::conditional_t<SIZE == 8, uint2, unsigned> >;
  Word word{};
  if (bytes == SIZE) {
    word = *static_cast<const Word*>(from);
  } else {
    for (int i = 0; i < bytes; ++i)
      reinterpret_cast<char*>(&word)[i] = static_cast<const char*>(from)[i];
  }
  *static_cast<Word*>(to) = word;
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef VMTC_EMULATOR
  emulator::commit_copies();
#elif VMTC_DEVICE_CODE >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// until at most `GROUPS_LEFT` of the youngest committed groups of this thread are under way
template <int GROUPS_LEFT>
__device__ __forceinline__ void cp_async_wait() {
#ifdef VMTC_EMULATOR
  emulator::wait_copies(GROUPS_LEFT);
#elif VMTC_DEVICE_CODE >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
#endif
}

// The blocks of a cluster, on compute capability 9.0 and above; elsewhere a block is alone.
__device__ __forceinline__ unsigned cluster_rank() {
#ifdef VMTC_EMULATOR
  return emulator::current->cluster_rank;
#elif VMTC_DEVICE_CODE >= 900
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ __forceinline__ unsigned cluster_size() {
#ifdef VMTC_EMULATOR
  return emulator::current->cluster_size;
#elif VMTC_DEVICE_CODE >= 900
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// every thread of every block of the cluster calls both, in this order
__device__ __forceinline__ void cluster_arrive() {
#ifdef VMTC_EMULATOR
  emulator::cluster_arrive(emulator::Location::current());
#elif VMTC_DEVICE_CODE >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#ifdef VMTC_EMULATOR
  emulator::cluster_wait(emulator::Location::current());
#elif VMTC_DEVICE_CODE >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#elif VMTC_DEVICE_CODE
  __syncthreads();
#endif
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// where the shared variable at `address` lies in another block of the cluster
template <typename T>
__device__ __forceinline__ T* map_shared(T* address, unsigned rank) {
#ifdef VMTC_EMULATOR
  return static_cast<T*>(emulator::map_shared(address, rank, emulator::Location::current()));
#elif VMTC_DEVICE_CODE >= 900
  T* mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(address), "r"(rank));
  return mapped;
#else
  return address;
#endif
}

// the same error, told to the caller alone: the next launch of anybody would seem to have failed
inline cudaError_t reported(cudaError_t error) {
  if (error) (void)cudaGetLastError();
  return error;
}

inline cudaError_t device_attribute(cudaDeviceAttr attribute, int* value) {
  int device;
  if (const cudaError_t error = reported(cudaGetDevice(&device))) return error;
  return reported(cudaDeviceGetAttribute(value, attribute, device));
}

// 10 * major + minor of the current device, 0 where there is none
inline int compute_capability() {
  int major = 0, minor = 0;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, &major)) return 0;
  if (device_attribute(cudaDevAttrComputeCapabilityMinor, &minor)) return 0;
  return 10 * major + minor;
}

// that of the code which the current device runs: PTX for an older one may be all there is, and
// what only newer code has is not in it. 0 where there is none
template <typename... P>
int code_capability(void (*kernel)(P...)) {
  cudaFuncAttributes found{};
  if (reported(cudaFuncGetAttributes(&found, kernel))) return 0;
  return std::min(compute_capability(), found.ptxVersion);
}

// where a kernel has no body for this code, so that nothing is taken for its result
__device__ __forceinline__ void no_such_code() {
#if VMTC_DEVICE_CODE
  __trap();
#endif
}

// the most dynamic shared memory that one block can have
inline size_t most_shared_memory() {
  int bytes = 0;
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &bytes) ? 0 : bytes;
}

// a grid of `jobs` blocks or a few more, of any number: block_index() >= jobs has nothing to do
inline dim3 grid_of(int64_t jobs) {
  const int64_t x = jobs < (1 << 30) ? jobs : 1 << 30;
  return dim3(unsigned(x), unsigned(ceil_div(jobs, x)));
}

__device__ __forceinline__ int64_t block_index() {
  return blockIdx.x + int64_t(gridDim.x) * blockIdx.y;
}

// whether rows of D elements can be moved in packs of 16 bytes
inline bool in_packs(const Rows& x, int64_t D) {
  const int64_t pack = 16 / size_of(x.dtype);
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && D % pack == 0 &&
         x.image_stride % pack == 0 && x.row_stride % pack == 0;
}

struct Shape {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
  int cluster = 1;  // neighbours along grid.x
};

template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), const Shape& shape, A&&... arguments) {
  if (shape.shared_bytes > 48 * 1024) {
    // the limit is the kernel's: another thread may launch it with more or less at the same time
    const size_t most = most_shared_memory();
    if (shape.shared_bytes > most) return cudaErrorInvalidValue;
    const cudaError_t error = reported(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(most)));
    if (error) return error;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(shape.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1;
  return reported(cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...));
}

// f(T{}) with the C++ type of dtype
template <typename F>
cudaError_t with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32:
      return f(float{});
    case Dtype::float16:
      return f(half{});
    case Dtype::bfloat16:
      return f(bfloat16{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace vmtc::cuda
