// A GPU in software: every thread of a block is a fiber, and so are those of all blocks of a
// cluster. Only one runs at a time, until it has to wait for others; which one goes on then is
// chosen to bring out missing barriers (VMTC_EMULATOR_ORDER): the runnable thread of lowest index
// (forward, the default) or of highest (reverse), or one at random (an integer, the seed).
//
// Whatever is undefined on the device ends the process with a message: threads of one block that
// wait at different barriers or for one that has exited, lanes of a warp that do not meet, writes
// beyond the shared memory that the launch asked for, misaligned vectors. Shared memory and
// cudaMalloc'd memory hold NaN (bytes of 0xff) at first.
#pragma once

#include <source_location>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda_runtime_api.h"

// of the thread that runs
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

using Location = std::source_location;

// what else a kernel may ask about its thread
struct Thread {
  unsigned lane, cluster_rank, cluster_size;
};
extern Thread* current;

// 10 * major + minor of the emulated device, from VMTC_EMULATOR_CAPABILITY
int capability();
// that of the code which runs on it, from VMTC_EMULATOR_CODE: older where a driver compiled PTX.
// With VMTC_EMULATOR_CROWDED no cluster finds its multiprocessors
int code();

[[noreturn]] void fail(const char* what, Location where);

void* shared_memory();
// the address of the same shared variable in another block of the cluster
void* map_shared(void* address, unsigned rank, Location where);

enum class Reduction { none, count, all, any };
int block_barrier(Reduction reduction, int value, Location where);
void cluster_arrive(Location where);
void cluster_wait(Location where);

// lanes of one warp that execute one collective operation together
struct Meeting {
  static constexpr size_t MOST_BYTES = 64;
  unsigned mask, arrived;
  int readers;
  const char* what;
  Location where;
  alignas(16) unsigned char value[32][MOST_BYTES];
};
Meeting* meet(unsigned mask, const char* what, const void* value, size_t bytes, Location where);
void part(Meeting* meeting);

// of(lane) gives the value that each lane of the mask brought; see(of) is computed by every lane
template <typename T, typename See>
auto together(unsigned mask, const char* what, const T& value, Location where, const See& see) {
  static_assert(sizeof(T) <= Meeting::MOST_BYTES && std::is_trivially_copyable_v<T>);
  Meeting* meeting = meet(mask, what, &value, sizeof(T), where);
  const auto result = see([&](unsigned lane) -> const T& {
    if (!(mask >> lane & 1)) fail("reads a lane that is not in the mask", where);
    return *reinterpret_cast<const T*>(meeting->value[lane]);
  });
  part(meeting);
  return result;
}

// copies that cp.async may do as late as the wait for them; bytes beyond `bytes` are zeros
void copy_later(void* to, const void* from, unsigned size, unsigned bytes, Location where);
void commit_copies();
void wait_copies(int groups_left);

inline void check_aligned(const void* address, size_t bytes, Location where = Location::current()) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("misaligned address", where);
}

// the address is not in the shared memory of a block
void check_global(const void* address, Location where = Location::current());

struct Launch {
  void (*run)(void* closure);
  void* closure;
  const void* kernel;
  size_t parameter_bytes;
};
cudaError_t launch(const cudaLaunchConfig_t& config, const Launch& launch);

}  // namespace emulator

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... arguments) {
  struct Closure {
    void (*kernel)(P...);
    std::tuple<P...> parameters;
  } closure{kernel, {std::forward<A>(arguments)...}};
  const auto run = [](void* memory) {
    const auto* closure = static_cast<const Closure*>(memory);
    std::apply(closure->kernel, closure->parameters);
  };
  return emulator::launch(
      *config, {run, &closure, reinterpret_cast<const void*>(kernel), sizeof(closure.parameters)});
}
