// The kernels of one instruction set: compiled once for each.
#include "kernels.h"

#include "exp.h"

namespace foveal {
namespace FOVEAL_ISA {

void attention_forward(const AttentionForward& call);
bool attention_backward(const AttentionBackward& call);
void linear(const Linear& linear, const Activations& in, int64_t num_threads);
void rms_norm(const RmsNorm& call, int64_t num_threads);
void rotate(const Rotate& call, int64_t num_threads);

namespace {

template <class Element>
F32 there_and_back(F32 x) {
  Element narrow[kLanes];
  store(narrow, x);
  return load(narrow);
}

F32 apply(Function function, F32 x) {
  switch (function) {
    case Function::kExp2: return exp2(x);
    case Function::kExp: return exp(x);
    case Function::kTanh: return tanh(x);
    case Function::kToBFloat16AndBack: return there_and_back<BFloat16>(x);
    case Function::kToFloat16AndBack: return there_and_back<Float16>(x);
  }
  return x;
}

void evaluate(Function function, const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    store_some(y + i, apply(function, load_some(x + i, n)), n);
  }
}

bool runs_here() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
  // Every processor with AVX2 has F16C, which GCC 11 cannot ask for.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

}  // namespace
}  // namespace FOVEAL_ISA

#define FOVEAL_JOIN(a, b) a##b
#define FOVEAL_TABLE(isa) FOVEAL_JOIN(kernels_, isa)
#define FOVEAL_TEXT(isa) #isa
#define FOVEAL_NAME(isa) FOVEAL_TEXT(isa)

extern const Kernels FOVEAL_TABLE(FOVEAL_ISA);
const Kernels FOVEAL_TABLE(FOVEAL_ISA) = {
    FOVEAL_NAME(FOVEAL_ISA),
    FOVEAL_ISA::runs_here,
    FOVEAL_ISA::evaluate,
    FOVEAL_ISA::attention_forward,
    FOVEAL_ISA::attention_backward,
    FOVEAL_ISA::linear,
    FOVEAL_ISA::rms_norm,
    FOVEAL_ISA::rotate,
};

}  // namespace foveal
