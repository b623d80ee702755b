#include "runtime.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace emulator {
namespace {

constexpr size_t KIBIBYTE = 1024, DEFAULT_SHARED = 48 * KIBIBYTE;

std::mutex mutex;
cudaError_t last_error = cudaSuccess;
// what cudaFuncSetAttribute allowed each kernel
std::map<const void*, size_t> shared_limits;
std::map<const void*, bool> large_clusters;

size_t most_shared() {
  switch (capability()) {
    case 75:
      return 64 * KIBIBYTE;
    case 80:
    case 87:
      return 163 * KIBIBYTE;
    case 86:
    case 89:
    case 120:
      return 99 * KIBIBYTE;
    default:
      return 227 * KIBIBYTE;
  }
}

}  // namespace

int capability() {
  const char* text = std::getenv("VMTC_EMULATOR_CAPABILITY");
  return text && *text ? std::atoi(text) : 90;
}

int code() {
  const char* text = std::getenv("VMTC_EMULATOR_CODE");
  return text && *text ? std::atoi(text) : capability();
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t check_launch(const cudaLaunchConfig_t& config, const Launch& launch, dim3* cluster) {
  const std::lock_guard lock(mutex);
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  const auto allowed = shared_limits.find(launch.kernel);
  if (config.dynamicSmemBytes > (allowed == shared_limits.end() ? DEFAULT_SHARED : allowed->second))
    return cudaErrorInvalidValue;
  if (launch.parameter_bytes > 4096) return cudaErrorInvalidValue;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto dimension = config.attrs[i].val.clusterDim;
    *cluster = dim3(dimension.x, dimension.y, dimension.z);
    const size_t blocks = size_t(dimension.x) * dimension.y * dimension.z;
    const size_t most = large_clusters[launch.kernel] ? 16 : 8;
    if (blocks == 0 || blocks > most || grid.x % dimension.x || grid.y % dimension.y ||
        grid.z % dimension.z)
      return cudaErrorInvalidClusterSize;
    if (capability() < 90) return cudaErrorNotSupported;
    if (code() < 90) fail("a kernel of clusters has no body in older code", Location::current());
    if (std::getenv("VMTC_EMULATOR_CROWDED")) return cudaErrorInvalidClusterSize;
  }
  return cudaSuccess;
}

}  // namespace emulator

using namespace emulator;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    case cudaErrorInvalidClusterSize:
      return "cudaErrorInvalidClusterSize";
  }
  return "unknown error";
}

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : remember(cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return remember(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = DEFAULT_SHARED;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 16;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability() / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability() % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = most_shared() == 64 * KIBIBYTE ? most_shared() : most_shared() + KIBIBYTE;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = most_shared();
      break;
    default:
      return remember(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

// every launch has ended when it returns
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  // what a kernel reads before it was written is NaN, or -1
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (!*memory) return remember(cudaErrorMemoryAllocation);
  std::memset(*memory, 0xff, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes) std::memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaMemset(void* memory, int byte, size_t bytes) {
  if (bytes) std::memset(memory, byte, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int byte, size_t bytes, cudaStream_t) {
  return cudaMemset(memory, byte, bytes);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = code();
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(mutex);
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || size_t(value) > most_shared()) return remember(cudaErrorInvalidValue);
      shared_limits[kernel] = value;
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      if (capability() < 90) return remember(cudaErrorNotSupported);
      large_clusters[kernel] = value;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}
