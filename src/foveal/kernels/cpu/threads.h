// Threads: those of the OpenMP runtime that PyTorch has brought into the process.
//
// A second pool would fight PyTorch's for the cores, for the threads of both spin while they wait.
// The runtime is found at run time by its one entry point that every OpenMP runtime on Linux
// shares, GOMP_parallel; nothing is linked, so there is never a second one. Without one, everything
// runs on the caller's thread.
#pragma once

#include <cstdint>

namespace foveal {

using Work = void (*)(void* context, int64_t index);

// Calls work(context, i) once for each i below count, on up to num_threads threads, lower i first.
// Which thread takes which i is open: results must not depend on it.
void run_tasks(int64_t num_threads, int64_t count, Work work, void* context);

// Whether there is a runtime; if not, run_tasks uses one thread.
bool has_threads();

template <class Callable>
void run_tasks(int64_t num_threads, int64_t count, Callable& work) {
  run_tasks(
      num_threads, count, [](void* context, int64_t i) { (*static_cast<Callable*>(context))(i); },
      &work);
}

}  // namespace foveal
