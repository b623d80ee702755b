// The threads of the emulator: own stacks, switched without the kernel of the operating system.
#pragma once

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifndef __x86_64__
#error "the emulator switches stacks by x86-64 code"
#endif

// saves the registers that a call must keep and the stack pointer, continues where `to` was saved
extern "C" void vmtc_emulator_switch(void** from, void* to);

namespace emulator {

// Memory that stays mapped; pages that no fiber has touched take no space.
class Stacks {
 public:
  static constexpr size_t BYTES = 256 * 1024;

  // the stack of a fiber, prepared so that a switch to the returned pointer calls entry
  void* prepare(size_t fiber, void (*entry)()) {
    while (fiber >= stacks_.size()) {
      void* memory = mmap(nullptr, BYTES, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) {
        std::fprintf(stderr, "emulator: no memory for the stack of a thread\n");
        std::abort();
      }
      // an overflow ends the process instead of spoiling another stack
      mprotect(memory, 4096, PROT_NONE);
      stacks_.push_back(static_cast<char*>(memory));
    }
#ifdef __SANITIZE_ADDRESS__
    // the frames of the fiber before, which never returned
    ASAN_UNPOISON_MEMORY_REGION(stacks_[fiber] + 4096, BYTES - 4096);
#endif
    void** top = reinterpret_cast<void**>(stacks_[fiber] + BYTES);
    // six registers, the address of entry, and the slot that aligns its frame
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    return top;
  }

 private:
  std::vector<char*> stacks_;
};

// A set of small integers from which the least, the greatest or a random one is taken.
class ReadySet {
 public:
  void resize(size_t size) {
    words_.assign((size + 63) / 64, 0);
    summary_.assign((words_.size() + 63) / 64, 0);
  }
  void insert(size_t i) {
    words_[i / 64] |= uint64_t(1) << i % 64;
    summary_[i / 4096] |= uint64_t(1) << i / 64 % 64;
  }
  void erase(size_t i) {
    words_[i / 64] &= ~(uint64_t(1) << i % 64);
    if (!words_[i / 64]) summary_[i / 4096] &= ~(uint64_t(1) << i / 64 % 64);
  }
  // -1 where the set is empty
  long least() const {
    for (size_t s = 0; s < summary_.size(); ++s)
      if (summary_[s]) {
        const size_t w = s * 64 + __builtin_ctzll(summary_[s]);
        return w * 64 + __builtin_ctzll(words_[w]);
      }
    return -1;
  }
  long greatest() const {
    for (size_t s = summary_.size(); s-- > 0;)
      if (summary_[s]) {
        const size_t w = s * 64 + 63 - __builtin_clzll(summary_[s]);
        return w * 64 + 63 - __builtin_clzll(words_[w]);
      }
    return -1;
  }
  // the first one at or after `start`, else the least
  long from(size_t start) const {
    const size_t first = start / 64;
    const uint64_t here = words_[first] & ~uint64_t(0) << start % 64;
    if (here) return first * 64 + __builtin_ctzll(here);
    for (size_t w = first + 1; w < words_.size(); ++w)
      if (words_[w]) return w * 64 + __builtin_ctzll(words_[w]);
    return least();
  }

 private:
  std::vector<uint64_t> words_, summary_;
};

}  // namespace emulator
