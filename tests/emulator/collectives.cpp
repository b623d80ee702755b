// What threads do together: barriers, operations of a warp, copies, shared memory.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace emulator {

void* shared_memory() { return self().home->shared; }

void* map_shared(void* address, unsigned rank, Location where) {
  const ptrdiff_t offset = static_cast<unsigned char*>(address) - self().home->shared;
  if (offset < 0 || size_t(offset) >= machine.shared_bytes)
    fail("maps an address that is not in its shared memory", where);
  if (rank >= machine.blocks.size()) fail("maps to a block that the cluster has not", where);
  return machine.blocks[rank].shared + offset;
}

void check_global(const void* address, Location where) {
  for (const Block& block : machine.blocks) {
    const ptrdiff_t offset = static_cast<const unsigned char*>(address) - block.shared;
    if (offset >= 0 && size_t(offset) < machine.shared_bytes)
      fail("expects global memory, got shared memory", where);
  }
}

int block_barrier(Reduction reduction, int value, Location where) {
  Fiber& me = self();
  Block& block = *me.home;
  Barrier& barrier = block.barrier;
  if (barrier.arrived == 0) {
    barrier.where = where;
    barrier.pending = reduction == Reduction::all;
  } else if (!same(barrier.where, where)) {
    std::fprintf(stderr, "emulator: others of its block are at the barrier of ");
    describe(barrier.where);
    std::fprintf(stderr, "\n");
    fail("waits at another barrier", where);
  }
  const int truth = value != 0;
  if (reduction == Reduction::count) barrier.pending += truth;
  if (reduction == Reduction::all) barrier.pending &= truth;
  if (reduction == Reduction::any) barrier.pending |= truth;
  if (++barrier.arrived == block.size) {
    barrier.arrived = 0;
    barrier.result = barrier.pending;
    for (size_t i = 0; i < block.size; ++i) wake(machine.fibers[block.first + i]);
    yield();
  } else {
    wait("__syncthreads", where);
  }
  return barrier.result;
}

namespace {

constexpr char CLUSTER[] = "the barrier of the cluster";

}  // namespace

void cluster_arrive(Location where) {
  Fiber& me = self();
  if (me.in_cluster_barrier) fail("arrives twice at the barrier of the cluster", where);
  me.in_cluster_barrier = true;
  me.cluster_phase = machine.cluster.phase;
  if (++machine.cluster.arrived < machine.fibers.size()) return;
  machine.cluster.arrived = 0;
  ++machine.cluster.phase;
  for (Fiber& f : machine.fibers)
    if (f.waits_for == CLUSTER) wake(f);
}

void cluster_wait(Location where) {
  Fiber& me = self();
  if (!me.in_cluster_barrier) fail("waits at the barrier of the cluster before arriving", where);
  me.in_cluster_barrier = false;
  if (me.cluster_phase == machine.cluster.phase)
    wait(CLUSTER, where);
  else
    yield();
}

Meeting* meet(unsigned mask, const char* what, const void* value, size_t bytes, Location where) {
  Fiber& me = self();
  const unsigned bit = 1u << me.lane;
  const size_t first = me.home->first + me.warp * 32;
  const size_t lanes = std::min<size_t>(32, me.home->first + me.home->size - first);
  if (!(mask & bit)) fail("is not in the mask that it gives", where);
  if (lanes < 32 && mask >> lanes) fail("names lanes that the block has not", where);
  auto& open = me.home->meetings[me.warp];
  // lanes that never meet end in a deadlock, which tells where each of them is
  const auto found = std::find_if(open.begin(), open.end(), [&](const Meeting* other) {
    return other->mask == mask && same(other->where, where);
  });
  Meeting* meeting = found == open.end() ? nullptr : *found;
  if (!meeting) {
    if (machine.unused.empty()) {
      machine.meetings.push_back(std::make_unique<Meeting>());
      machine.unused.push_back(machine.meetings.back().get());
    }
    meeting = machine.unused.back();
    machine.unused.pop_back();
    meeting->mask = mask;
    meeting->arrived = 0;
    meeting->what = what;
    meeting->where = where;
    open.push_back(meeting);
  }
  std::memcpy(meeting->value[me.lane], value, bytes);
  meeting->arrived |= bit;
  if (meeting->arrived == mask) {
    open.erase(std::find(open.begin(), open.end(), meeting));
    meeting->readers = __builtin_popcount(mask);
    for (unsigned rest = mask; rest; rest &= rest - 1)
      wake(machine.fibers[first + __builtin_ctz(rest)]);
    yield();
  } else {
    wait(what, where);
  }
  return meeting;
}

void part(Meeting* meeting) {
  if (--meeting->readers == 0) machine.unused.push_back(meeting);
}

void copy_later(void* to, const void* from, unsigned size, unsigned bytes, Location where) {
  check_aligned(to, size, where);
  if (bytes) check_aligned(from, size, where);
  auto& copies = self().copies;
  if (copies.empty()) copies.emplace_back();
  copies.back().push_back({to, from, size, bytes});
}

void commit_copies() {
  auto& copies = self().copies;
  if (copies.empty()) copies.emplace_back();
  copies.emplace_back();
}

void wait_copies(int groups_left) {
  auto& copies = self().copies;
  while (copies.size() > size_t(groups_left) + 1) {
    for (const Copy& copy : copies.front()) {
      if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.size - copy.bytes);
    }
    copies.pop_front();
  }
}

}  // namespace emulator
