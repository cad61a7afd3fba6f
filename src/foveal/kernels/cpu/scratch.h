// Room for a task's temporaries: one block of memory per thread, kept between calls.
#pragma once

#include <cstddef>
#include <cstdint>

namespace foveal {

// At least so many bytes, aligned to a cache line; what was there before is lost.
void* thread_scratch(size_t bytes);

namespace {

// Cuts a thread's room into arrays, each aligned to a cache line.
class Scratch {
 public:
  // Room for arrays of `floats` floats in all; `arrays` of them may be rounded up to a line.
  explicit Scratch(size_t floats, size_t arrays = 16)
      : next_(static_cast<char*>(thread_scratch(floats * sizeof(float) + arrays * kLine))) {}

  template <class T>
  T* take(size_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + kLine - 1) / kLine * kLine;
    return taken;
  }

 private:
  static constexpr size_t kLine = 64;
  char* next_;
};

}  // namespace

}  // namespace foveal
