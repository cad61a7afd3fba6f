// Exponential and hyperbolic tangent of vectors.
//
// 2^x = 2^n * 2^f with n the nearest integer and f in [-1/2, 1/2]: a polynomial for 2^f (minimax
// of relative error, degree 6), and n put into the exponent. NaN stays NaN.
#pragma once

#include "vec.h"

namespace foveal::FOVEAL_ISA {

inline constexpr float kLog2E = 1.44269504088896340736f;

// 2^(x * factor), for products up to 127. At most about 1 unit in the last place off, as the product
// is not rounded where there are fused multiply-adds; results below 2^-126 may be 0, and where the
// product is at most -127 they are.
struct Power {
  float factor;
  float floor;

  // `factor` is positive and not tiny, so that -127 / factor is finite.
  explicit Power(float factor) : factor(factor), floor(-127.0f / factor) {}

  F32 operator()(F32 x) const {
    // Added, this leaves round(x * factor) + 127 in the lowest bits.
    constexpr float kRound = 0x1.8p23f + 127.0f;
    x = x < floor ? splat(floor) : x;
    const F32 shifted = x * factor + kRound;
    const F32 f = x * factor - (shifted - kRound);
    F32 p = splat(0x1.470b52p-13f);
    p = p * f + 0x1.5f7278p-10f;
    p = p * f + 0x1.3b270ep-7f;
    p = p * f + 0x1.c6ae72p-5f;
    p = p * f + 0x1.ebfbe2p-3f;
    p = p * f + 0x1.62e432p-1f;
    p = p * f + 1.0f;
    return p * from_bits(bits(shifted) << 23);
  }
};

inline F32 exp2(F32 x) { return Power(1)(x); }
inline F32 exp(F32 x) { return Power(kLog2E)(x); }

// At most about 2 units in the last place off: an odd polynomial (Cephes, tanhf) near 0, where the
// quotient of exponentials would cancel.
inline F32 tanh(F32 x) {
  const F32 size = from_bits(bits(x) & 0x7fffffff);
  const F32 t = exp(size * -2.0f);
  const F32 far = (1.0f - t) / (1.0f + t);
  const F32 square = x * x;
  F32 p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const F32 near = p * square * x + x;
  return size < 0.625f ? near : from_bits(bits(far) | (bits(x) & 0x80000000));
}

}  // namespace foveal::FOVEAL_ISA
