// Small things that are done to every row of activations between two matrices. Float32; PyTorch
// takes several passes and calls for each, which at one row cost more than the work.
#pragma once

#include <cstdint>

namespace foveal {

// y = x / sqrt(mean(x^2) + eps) * (offset + weight); x and y [rows, size], contiguous.
struct RmsNorm {
  const float* x;
  const float* weight;
  float* y;
  int64_t rows, size;
  double eps, offset;
};

// Heads [batch, heads, tokens, dim] turned by their position, the pairs (i, i + half) for i below
// half; the rest is copied. y is contiguous; cos and sin are [batch or 1, tokens, half].
struct Rotate {
  const float* x;
  int64_t batch_stride, head_stride, token_stride;
  const float* cos;
  const float* sin;
  int64_t turn_stride;  // between sequences, of cos and sin; 0 where all share one
  float* y;
  int64_t batch, heads, tokens, dim, half;
};

}  // namespace foveal
