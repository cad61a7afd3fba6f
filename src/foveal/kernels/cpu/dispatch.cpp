// What the library exports: plain C functions, each handing its call to the instruction set in use.
#include <cstring>

#include "attention_pages.h"
#include "kernels.h"
#include "threads.h"

namespace foveal {
namespace {

// Best last.
const Kernels* const all[] = {
#if defined(__x86_64__)
    &kernels_sse2,
    &kernels_avx2,
    &kernels_avx512,
#elif defined(__aarch64__)
    &kernels_neon,
#endif
};
constexpr int64_t kCount = sizeof all / sizeof *all;

const Kernels* best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const Kernels* found = all[0];
  for (const Kernels* kernels : all) {
    if (kernels->runs_here()) found = kernels;
  }
  return found;
}

const Kernels* in_use = best();

}  // namespace
}  // namespace foveal

#define FOVEAL_EXPORT extern "C" __attribute__((visibility("default")))

using namespace foveal;

// To be raised whenever a structure or a function here changes: the binding compares it with its
// own, so that a library from an older build is refused instead of called.
FOVEAL_EXPORT int64_t foveal_version() { return 7; }

// The name of the i-th instruction set that this processor can run, best last; null behind the last.
FOVEAL_EXPORT const char* foveal_isa_name(int64_t i) {
  for (int64_t j = 0; j < kCount; ++j) {
    if (all[j]->runs_here() && i-- == 0) return all[j]->isa;
  }
  return nullptr;
}

FOVEAL_EXPORT const char* foveal_isa() { return in_use->isa; }

// Whether the instruction set of this name is now in use; not while other calls are running.
FOVEAL_EXPORT bool foveal_use_isa(const char* name) {
  for (const Kernels* kernels : all) {
    if (kernels->runs_here() && std::strcmp(kernels->isa, name) == 0) {
      in_use = kernels;
      return true;
    }
  }
  return false;
}

FOVEAL_EXPORT bool foveal_has_threads() { return has_threads(); }

FOVEAL_EXPORT void foveal_evaluate(int64_t function, const float* x, float* y, int64_t count) {
  in_use->evaluate(static_cast<Function>(function), x, y, count);
}

FOVEAL_EXPORT void foveal_attention_forward(const AttentionForward* call) {
  in_use->attention_forward(*call);
}

// Whether there was enough memory.
FOVEAL_EXPORT bool foveal_attention_backward(const AttentionBackward* call) {
  return in_use->attention_backward(*call);
}

FOVEAL_EXPORT void foveal_attention_pages(const AttentionForward* call, const Pages* pages) {
  attend_pages(*call, *pages, in_use->attention_forward);
}

FOVEAL_EXPORT void foveal_linear(const Linear* linear, const float* x, int64_t rows, int64_t stride,
                                 float* y, int64_t num_threads) {
  in_use->linear(*linear, {x, rows, stride, y}, num_threads);
}

FOVEAL_EXPORT void foveal_rms_norm(const RmsNorm* call, int64_t num_threads) {
  in_use->rms_norm(*call, num_threads);
}

FOVEAL_EXPORT void foveal_rotate(const Rotate* call, int64_t num_threads) {
  in_use->rotate(*call, num_threads);
}
