#include "emulator.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string_view>

#include "machine.h"
#include "runtime.h"

asm(R"(
.text
.globl vmtc_emulator_switch
.type vmtc_emulator_switch, @function
vmtc_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vmtc_emulator_switch, .-vmtc_emulator_switch
)");

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Thread* current = nullptr;
Machine machine;

void describe(const Fiber& f) {
  std::fprintf(stderr, "thread (%u,%u,%u) of block (%u,%u,%u)", f.thread.x, f.thread.y, f.thread.z,
               f.block.x, f.block.y, f.block.z);
}

void describe(Location where) {
  std::fprintf(stderr, "%s:%u", where.file_name(), unsigned(where.line()));
}

bool same(Location a, Location b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

namespace {

// bytes around the shared memory of a block that must stay as they are
constexpr size_t CANARY = 1024;
constexpr unsigned char POISON = 0xff, CANARY_BYTE = 0xfb;

// nobody can run and somebody has not ended
[[noreturn]] void fail_deadlock() {
  size_t exited = 0;
  for (const Fiber& f : machine.fibers) exited += f.exited;
  std::fprintf(stderr, "emulator: deadlock, %zu threads have exited and these wait:\n", exited);
  int shown = 0;
  const Fiber* former = nullptr;
  for (const Fiber& f : machine.fibers) {
    if (f.exited) continue;
    if (former && former->home == f.home && former->warp == f.warp &&
        std::strcmp(former->waits_for, f.waits_for) == 0 && same(former->where, f.where))
      continue;
    former = &f;
    if (++shown > 20) break;
    std::fprintf(stderr, "  ");
    describe(f);
    std::fprintf(stderr, " and its neighbours in %s at ", f.waits_for);
    describe(f.where);
    std::fprintf(stderr, "\n");
  }
  std::abort();
}

// the fiber that runs next, by the order of the environment
void* next() {
  long index;
  if (machine.order == Order::reverse)
    index = machine.ready.greatest();
  else if (machine.order == Order::forward)
    index = machine.ready.least();
  else
    index = machine.ready.from(machine.random() % machine.fibers.size());
  if (index < 0) {
    if (machine.running) fail_deadlock();
    current = nullptr;
    return machine.host;
  }
  Fiber& fiber = machine.fibers[index];
  current = &fiber;
  threadIdx = fiber.thread;
  blockIdx = fiber.block;
  return fiber.stack;
}

}  // namespace

void wake(Fiber& fiber) {
  fiber.waits_for = nullptr;
  machine.ready.insert(fiber.index);
}

void wait(const char* what, Location where) {
  Fiber& me = self();
  me.waits_for = what;
  me.where = where;
  machine.ready.erase(me.index);
  vmtc_emulator_switch(&me.stack, next());
}

void yield() {
  Fiber& me = self();
  void* to = next();
  if (current != &me) vmtc_emulator_switch(&me.stack, to);
}

namespace {

void enter() {
  machine.launch.run(machine.launch.closure);
  Fiber& me = self();
  me.exited = true;
  machine.ready.erase(me.index);
  --machine.running;
  void* discarded;
  vmtc_emulator_switch(&discarded, next());
  __builtin_unreachable();
}

void check_canary(const Block& block) {
  const auto intact = [](const unsigned char* from, size_t bytes) {
    return std::all_of(from, from + bytes, [](unsigned char c) { return c == CANARY_BYTE; });
  };
  if (intact(block.shared - CANARY, CANARY) && intact(block.shared + machine.shared_bytes, CANARY))
    return;
  std::fprintf(stderr, "emulator: ");
  describe(machine.fibers[block.first]);
  std::fprintf(stderr, " or a neighbour wrote beyond its %zu bytes of shared memory\n",
               machine.shared_bytes);
  std::abort();
}

// all blocks of one cluster, to their ends
void run_cluster(const cudaLaunchConfig_t& config, dim3 cluster, dim3 at) {
  const dim3 threads = config.blockDim;
  const size_t block_threads = size_t(threads.x) * threads.y * threads.z;
  const size_t blocks = size_t(cluster.x) * cluster.y * cluster.z;
  machine.fibers.resize(blocks * block_threads);
  machine.blocks.resize(blocks);
  machine.ready.resize(machine.fibers.size());
  machine.cluster = {};
  machine.running = machine.fibers.size();
  for (size_t b = 0; b < blocks; ++b) {
    Block& block = machine.blocks[b];
    block.first = b * block_threads;
    block.size = block_threads;
    block.barrier = {};
    block.meetings.assign((block_threads + 31) / 32, {});
    // one more alignment than the device promises anybody
    block.memory.resize(machine.shared_bytes + 2 * CANARY + 1024);
    const auto start = reinterpret_cast<uintptr_t>(block.memory.data()) + CANARY;
    block.shared = reinterpret_cast<unsigned char*>((start + 1023) / 1024 * 1024);
    std::memset(block.shared - CANARY, CANARY_BYTE, CANARY);
    std::memset(block.shared, POISON, machine.shared_bytes);
    std::memset(block.shared + machine.shared_bytes, CANARY_BYTE, CANARY);
    const unsigned bx = b % cluster.x, by = b / cluster.x % cluster.y,
                   bz = b / cluster.x / cluster.y;
    for (size_t t = 0; t < block_threads; ++t) {
      Fiber& f = machine.fibers[block.first + t];
      f.thread = {unsigned(t % threads.x), unsigned(t / threads.x % threads.y),
                  unsigned(t / threads.x / threads.y)};
      f.block = {at.x + bx, at.y + by, at.z + bz};
      f.lane = t % 32;
      f.warp = t / 32;
      f.cluster_rank = b;
      f.cluster_size = blocks;
      f.index = block.first + t;
      f.home = &block;
      f.waits_for = nullptr;
      f.exited = false;
      f.cluster_phase = 0;
      f.in_cluster_barrier = false;
      f.copies.clear();
      f.stack = machine.stacks.prepare(f.index, enter);
      machine.ready.insert(f.index);
    }
  }
  vmtc_emulator_switch(&machine.host, next());
  for (const Block& block : machine.blocks) check_canary(block);
}

}  // namespace

[[noreturn]] void fail(const char* what, Location where) {
  std::fprintf(stderr, "emulator: ");
  if (current) describe(self());
  std::fprintf(stderr, " at ");
  describe(where);
  std::fprintf(stderr, ": %s\n", what);
  std::abort();
}

cudaError_t launch(const cudaLaunchConfig_t& config, const Launch& launch) {
  dim3 cluster(1, 1, 1);
  const cudaError_t error = check_launch(config, launch, &cluster);
  if (error != cudaSuccess) return remember(error);
  const std::lock_guard lock(machine.mutex);
  const char* text = std::getenv("VMTC_EMULATOR_ORDER");
  const std::string_view order = text && *text ? text : "forward";
  machine.order = order == "forward"   ? Order::forward
                  : order == "reverse" ? Order::reverse
                                       : Order::random;
  if (machine.order == Order::random) {
    if (order.find_first_not_of("0123456789") != order.npos)
      fail("VMTC_EMULATOR_ORDER must be forward, reverse or a number", Location::current());
    machine.random.seed(std::strtoul(text, nullptr, 10) + 1);
  }
  machine.launch = launch;
  machine.shared_bytes = config.dynamicSmemBytes;
  const dim3 grid = gridDim = config.gridDim;
  blockDim = config.blockDim;
  const uint64_t nx = grid.x / cluster.x, ny = grid.y / cluster.y, nz = grid.z / cluster.z;
  const uint64_t count = nx * ny * nz;
  // blocks start, start + step, ... modulo their number: each once where the two have no divisor
  uint64_t step = 1, start = 0;
  if (machine.order == Order::reverse) {
    step = count - 1;
    start = count - 1;
  } else if (machine.order == Order::random) {
    start = machine.random() % count;
    do step = machine.random() % count + 1;
    while (std::gcd(step, count) != 1);
  }
  for (uint64_t n = 0; n < count; ++n) {
    const uint64_t c = (start + n * step) % count;
    run_cluster(config, cluster,
                dim3(c % nx * cluster.x, c / nx % ny * cluster.y, c / nx / ny * cluster.z));
  }
  return cudaSuccess;
}

}  // namespace emulator
