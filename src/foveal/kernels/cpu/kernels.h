// The kernels of one instruction set, and the table of them that the dispatcher picks from.
#pragma once

#include <cstdint>

#include "attention.h"
#include "linear.h"
#include "rows.h"

namespace foveal {

// Functions of one element, to be tested against higher precision.
enum class Function : int64_t { kExp2, kExp, kTanh, kToBFloat16AndBack, kToFloat16AndBack };

struct Kernels {
  const char* isa;
  bool (*runs_here)();
  void (*evaluate)(Function function, const float* x, float* y, int64_t count);
  void (*attention_forward)(const AttentionForward& call);
  bool (*attention_backward)(const AttentionBackward& call);
  void (*linear)(const Linear& linear, const Activations& in, int64_t num_threads);
  void (*rms_norm)(const RmsNorm& call, int64_t num_threads);
  void (*rotate)(const Rotate& call, int64_t num_threads);
};

#if defined(__x86_64__)
extern const Kernels kernels_sse2, kernels_avx2, kernels_avx512;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

}  // namespace foveal
