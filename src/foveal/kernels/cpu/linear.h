// Linear layers with narrow weights: what the library is told about one of them.
//
//   y[m, n] = bias[n] + sum over k of x[m, k] * w[n, k]       x, y, sums: float32
//
// Weights lie in panels of kWeightPanel output channels, so that one order serves a single row (decode)
// and many (prefill); channels behind the last are zeros. In a panel, k comes first:
//
//   float32, bfloat16, float16, int8   element [k][channel]; of bfloat16 the channels c and
//                                      c + kWeightPanel / 2 share a word, the former the lower half
//   int4                               byte [k][c]: channel c in the lower four bits,
//                                      c + kWeightPanel / 2 in the upper
//   scale, low                         bfloat16 [k / group][channel], paired as bfloat16 weights
//
// A weight is its element, code * scale (int8) or code * scale + low (int4). Scales have 8
// significant bits, so the products are exact in float32, and the weights the same everywhere.
#pragma once

#include <cstdint>

namespace foveal {

struct BFloat16;

inline constexpr int64_t kWeightPanel = 32;

enum class WeightFormat : int64_t { kFloat32, kBFloat16, kFloat16, kInt8, kInt4 };

struct Linear {
  WeightFormat format;
  int64_t outputs, inputs;
  int64_t group;          // inputs that share a scale
  const void* codes;      // [panels, inputs, kWeightPanel]
  const BFloat16* scale;  // [panels, ceil(inputs / group), kWeightPanel]; null for floats
  const BFloat16* low;    // as scale, of int4 only
  const float* bias;      // [outputs] or null
};

// Rows of x are stride floats apart; y is [rows, outputs].
struct Activations {
  const float* x;
  int64_t rows, stride;
  float* y;
};

}  // namespace foveal
