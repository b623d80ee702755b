// The emulator against kernels whose results are known. An argument names one wrong kernel, which
// must end the process.
#include <map>
#include <string>
#include <vector>

#include "cuda/common.cuh"
#include "cuda/mma.cuh"

namespace vmtc::cuda {
namespace {

int failures = 0;

void check(bool truth, const char* what) {
  if (truth) return;
  std::printf("wrong: %s\n", what);
  ++failures;
}

// out[i] = sum of the block's x and the sum over its warp
__global__ void sums(const float* x, float* out) {
  float* partial = shared_memory<float>();
  const int t = threadIdx.x;
  const float mine = x[t], warp = warp_sum(mine);
  if (t % WARP == 0) partial[t / WARP] = warp;
  __syncthreads();
  float total = 0;
  for (unsigned w = 0; w < blockDim.x / WARP; ++w) total += partial[w];
  out[2 * t] = total;
  out[2 * t + 1] = warp;
}

// each block adds what its neighbour in the cluster holds
__global__ void neighbours(int* out) {
  int* mine = shared_memory<int>();
  if (threadIdx.x == 0) *mine = 10 * blockIdx.x;
  cluster_sync();
  const unsigned other = (cluster_rank() + 1) % cluster_size();
  const int theirs = *map_shared(mine, other);
  cluster_sync();
  if (threadIdx.x == 0) out[blockIdx.x] = *mine + theirs;
}

// c [16, 8] = a [16, 16] b [16, 8] with operands that ldmatrix takes from shared memory
template <typename T>
__global__ void product(const T* a, const T* b, float* c) {
  T* shared = shared_memory<T>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 32; i += WARP) cp_async<16>(shared + 8 * i, a + 8 * i);
  cp_async<16>(shared + 256 + 8 * (lane % 16), b + 8 * (lane % 16));
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t left[4], right[2];
  ldmatrix<4>(left, shared + (lane % 16) * 16 + lane / 16 * 8);
  ldmatrix<2, true>(right, shared + 256 + (lane % 16) * 8);
  float sum[4] = {};
  mma<T>(sum, left, right);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

// the barrier between writing and reading is missing
__global__ void racy(int* out) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// a thread that does not come to the barrier
__global__ void absent(float*) {
  if (threadIdx.x > 0) __syncthreads();
}

__global__ void divergent(float*) {
  if (threadIdx.x > 40)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void lanes(float* memory) {
  if (threadIdx.x % 2)
    memory[threadIdx.x] = __shfl_sync(ALL_LANES, 1.f, 0);
  else
    memory[threadIdx.x] = __shfl_sync(ALL_LANES, 2.f, 0);
}

__global__ void bounds(float*) { shared_memory<float>()[blockDim.x + 3] = 1; }

__global__ void alignment(float* memory) { memory[0] = load_pack(memory + 1).value[0]; }

const std::map<std::string, void (*)(float*)> WRONG = {
    {"absent", absent}, {"divergent", divergent}, {"lanes", lanes},
    {"bounds", bounds}, {"alignment", alignment},
};

cudaLaunchConfig_t config(int blocks, int threads, size_t shared) {
  cudaLaunchConfig_t c{};
  c.gridDim = blocks;
  c.blockDim = threads;
  c.dynamicSmemBytes = shared;
  return c;
}

template <typename T>
void test_product() {
  T *a, *b;
  float* c;
  cudaMalloc(&a, 256 * sizeof(T));
  cudaMalloc(&b, 128 * sizeof(T));
  cudaMalloc(&c, 128 * sizeof(float));
  check(c[0] != c[0], "fresh memory is NaN");
  for (int i = 0; i < 256; ++i) a[i] = T(float(i * 7 % 13 - 6));
  for (int i = 0; i < 128; ++i) b[i] = T(float(i * 5 % 11 - 5));
  check(launch(product<T>, {1, 32, 384 * sizeof(T), nullptr}, a, b, c) == cudaSuccess, "launch");
  bool right = true;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += float(a[i * 16 + k]) * float(b[k * 8 + j]);
      right = right && c[i * 8 + j] == sum;
    }
  check(right, "mma");
  cudaFree(a), cudaFree(b), cudaFree(c);
}

void test_sums() {
  std::vector<float> x(256), out(512);
  float total = 0;
  for (int i = 0; i < 256; ++i) total += x[i] = i % 17;
  check(launch(sums, {1, 256, 8 * sizeof(float), nullptr}, x.data(), out.data()) == 0, "launch");
  for (int i = 0; i < 256; ++i) {
    float warp = 0;
    for (int j = 0; j < 32; ++j) warp += x[i / 32 * 32 + j];
    check(out[2 * i] == total && out[2 * i + 1] == warp, "sums");
  }
}

void test_clusters() {
  std::vector<int> out(12);
  const cudaError_t error = launch(neighbours, {12, 64, sizeof(int), nullptr, 4}, out.data());
  if (emulator::capability() < 90) {
    check(error == cudaErrorNotSupported, "clusters need compute capability 9.0");
    return;
  }
  for (int b = 0; b < 12; ++b) check(out[b] == 10 * b + 10 * (b / 4 * 4 + (b + 1) % 4), "clusters");
}

void test_race() {
  std::vector<int> out(64, -7);
  launch(racy, {1, 64, 64 * sizeof(int), nullptr}, out.data());
  bool right = true;
  for (int i = 0; i < 64; ++i) right = right && out[i] == 63 - i;
  check(!right, "a missing barrier is not seen");
}

void test_limits() {
  const auto run = [](int threads, size_t shared) {
    cudaLaunchConfig_t c = config(1, threads, shared);
    std::vector<int> out(2048);
    return cudaLaunchKernelEx(&c, racy, out.data());
  };
  check(run(1025, 8192) == cudaErrorInvalidConfiguration, "threads of a block");
  check(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess,
        "the last error");
  check(run(64, 49 * 1024) == cudaErrorInvalidValue, "shared memory without asking");
  const int most = most_shared_memory();
  check(cudaFuncSetAttribute(racy, cudaFuncAttributeMaxDynamicSharedMemorySize, most + 1) != 0,
        "too much shared memory");
  check(cudaFuncSetAttribute(racy, cudaFuncAttributeMaxDynamicSharedMemorySize, most) == 0 &&
            run(64, most) == cudaSuccess,
        "all the shared memory there is");
}

void test_halves() {
  for (unsigned bits = 0; bits < 0x7c00; ++bits) {
    const float low = float(__ushort_as_half(bits));
    const float high = float(__ushort_as_half(bits + 1));
    check(__half(low).bits == bits, "half");
    if (bits + 1 < 0x7c00)
      check(__half((low + high) / 2).bits == bits + bits % 2, "half: ties go to even");
  }
  for (unsigned bits = 0; bits < 0x7f7f; ++bits) {
    const double low = float(__ushort_as_bfloat16(bits)),
                 high = float(__ushort_as_bfloat16(bits + 1));
    check(__nv_bfloat16(float(low)).bits == bits, "bfloat16");
    check(__nv_bfloat16(float((low + high) / 2)).bits == bits + bits % 2, "bfloat16: ties to even");
  }
  check(std::isnan(float(__nv_bfloat16(NAN))) && std::isnan(float(__half(NAN))), "NaN");
}

}  // namespace
}  // namespace vmtc::cuda

int main(int count, char** arguments) {
  using namespace vmtc::cuda;
  if (count > 1) {
    std::vector<float> memory(96);
    launch(WRONG.at(arguments[1]), {1, 96, 96 * sizeof(float), nullptr}, memory.data());
    return 0;
  }
  test_sums();
  test_clusters();
  test_product<half>();
  test_product<bfloat16>();
  test_race();
  test_limits();
  test_halves();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
