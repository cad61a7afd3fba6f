#include "threads.h"

#include <dlfcn.h>

#include <atomic>

namespace foveal {
namespace {

using Parallel = void (*)(void (*body)(void*), void* data, unsigned num_threads, unsigned flags);

Parallel find_parallel() {
  if (void* found = dlsym(RTLD_DEFAULT, "GOMP_parallel")) return reinterpret_cast<Parallel>(found);
  void* runtime = dlopen("libgomp.so.1", RTLD_NOW | RTLD_NOLOAD);
  return runtime ? reinterpret_cast<Parallel>(dlsym(runtime, "GOMP_parallel")) : nullptr;
}

const Parallel parallel = find_parallel();

struct Queue {
  std::atomic<int64_t> next;
  int64_t count;
  Work work;
  void* context;
};

void drain(void* data) {
  Queue& queue = *static_cast<Queue*>(data);
  for (int64_t i; (i = queue.next.fetch_add(1, std::memory_order_relaxed)) < queue.count;) {
    queue.work(queue.context, i);
  }
}

}  // namespace

void run_tasks(int64_t num_threads, int64_t count, Work work, void* context) {
  Queue queue{{0}, count, work, context};
  const int64_t useful = num_threads < count ? num_threads : count;
  if (useful > 1 && parallel) {
    parallel(drain, &queue, static_cast<unsigned>(useful), 0);
  } else {
    drain(&queue);
  }
}

bool has_threads() { return parallel != nullptr; }

}  // namespace foveal
