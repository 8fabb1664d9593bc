// Division of a thread's scratch memory.
#pragma once

#include "kernels.h"

namespace mixfeat {
namespace {

// Hands out memory piece by piece, each on cache lines of its own. Without memory it only counts.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    char* piece = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += round_up(count * int64_t(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace
}  // namespace mixfeat
