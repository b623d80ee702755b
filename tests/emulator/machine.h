// The state of the emulated device, and how its threads wait for one another.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <random>

#include "emulator.h"
#include "fiber.h"

namespace emulator {

struct Copy {
  void* to;
  const void* from;
  unsigned size, bytes;
};

struct Block;

struct Fiber : Thread {
  uint3 thread, block;
  size_t index;
  void* stack;
  Block* home;
  unsigned warp;
  const char* waits_for;  // null while it can run
  Location where;
  bool exited;
  unsigned cluster_phase;
  bool in_cluster_barrier;
  std::deque<std::vector<Copy>> copies;  // the last group is not committed yet
};

struct Barrier {
  unsigned arrived = 0, phase = 0;
  int pending = 0, result = 0;
  Location where;
};

struct Block {
  size_t first, size;
  std::vector<unsigned char> memory;
  unsigned char* shared;
  Barrier barrier;
  std::vector<std::vector<Meeting*>> meetings;  // of each warp, not complete
};

enum class Order { forward, reverse, random };

struct Machine {
  std::mutex mutex;
  Stacks stacks;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  ReadySet ready;
  std::vector<std::unique_ptr<Meeting>> meetings;
  std::vector<Meeting*> unused;
  Barrier cluster;
  size_t running, shared_bytes;
  Launch launch;
  void* host;
  Order order;
  std::minstd_rand random;
};
extern Machine machine;

inline Fiber& self() { return *static_cast<Fiber*>(current); }

void describe(const Fiber& fiber);
void describe(Location where);
bool same(Location a, Location b);

// returns when another fiber has woken this one
void wait(const char* what, Location where);
void wake(Fiber& fiber);
// lets others go first where the order says so
void yield();

}  // namespace emulator
