// How the weights of each format are read, two vectors at a time.
//
// A *pair* is two vectors of channels of one panel: kLanes of its first half and those kWeightPanel / 2
// further on. Pairs are counted through all panels. Each reader below stands at one pair and gives
// its weights at input k; `enter` tells it that a new group of inputs begins.
#pragma once

#include "linear.h"
#include "vec.h"

namespace foveal::FOVEAL_ISA {

inline constexpr int64_t kHalf = kWeightPanel / 2;
inline constexpr int64_t kPairs = kHalf / kLanes;  // in a panel

struct Pair {
  F32 first, second;
};

// The pair of bfloat16 elements that begins at `p`.
inline Pair load_pair(const BFloat16* p) {
  const U32 words = load_bits<U32>(p);
  return {from_bits(words << 16), from_bits(words & 0xffff0000)};
}

struct Float32Reader {
  const float* at;
  Float32Reader(const Linear& linear, int64_t pair)
      : Float32Reader(static_cast<const float*>(linear.codes), linear.inputs, pair) {}
  Float32Reader(const float* panels, int64_t inputs, int64_t pair)
      : at(panels + pair / kPairs * inputs * kWeightPanel + pair % kPairs * kLanes) {}
  void enter(int64_t) {}
  Pair operator()(int64_t k) const {
    return {load(at + k * kWeightPanel), load(at + k * kWeightPanel + kHalf)};
  }
};

struct BFloat16Reader {
  const BFloat16* at;
  BFloat16Reader(const Linear& linear, int64_t pair)
      : at(static_cast<const BFloat16*>(linear.codes) + pair / kPairs * linear.inputs * kWeightPanel +
           pair % kPairs * 2 * kLanes) {}
  void enter(int64_t) {}
  Pair operator()(int64_t k) const { return load_pair(at + k * kWeightPanel); }
};

struct Float16Reader {
  const Float16* at;
  Float16Reader(const Linear& linear, int64_t pair)
      : at(static_cast<const Float16*>(linear.codes) + pair / kPairs * linear.inputs * kWeightPanel +
           pair % kPairs * kLanes) {}
  void enter(int64_t) {}
  Pair operator()(int64_t k) const {
    return {load(at + k * kWeightPanel), load(at + k * kWeightPanel + kHalf)};
  }
};

// Where the scales of a pair begin.
inline int64_t scales_of(const Linear& linear, int64_t pair) {
  const int64_t groups = (linear.inputs + linear.group - 1) / linear.group;
  return pair / kPairs * groups * kWeightPanel + pair % kPairs * 2 * kLanes;
}

struct Int8Reader {
  const int8_t* at;
  const BFloat16* scales;
  Pair scale;
  Int8Reader(const Linear& linear, int64_t pair)
      : at(static_cast<const int8_t*>(linear.codes) + pair / kPairs * linear.inputs * kWeightPanel +
           pair % kPairs * kLanes),
        scales(linear.scale + scales_of(linear, pair)),
        scale{} {}
  void enter(int64_t group) { scale = load_pair(scales + group * kWeightPanel); }
  Pair operator()(int64_t k) const {
    return {to_float(widen_bytes(at + k * kWeightPanel)) * scale.first,
            to_float(widen_bytes(at + k * kWeightPanel + kHalf)) * scale.second};
  }
};

struct Int4Reader {
  const uint8_t* at;
  const BFloat16 *scales, *lows;
  Pair scale, low;
  Int4Reader(const Linear& linear, int64_t pair)
      : at(static_cast<const uint8_t*>(linear.codes) + pair / kPairs * linear.inputs * kHalf +
           pair % kPairs * kLanes),
        scales(linear.scale + scales_of(linear, pair)),
        lows(linear.low + scales_of(linear, pair)),
        scale{},
        low{} {}
  void enter(int64_t group) {
    scale = load_pair(scales + group * kWeightPanel);
    low = load_pair(lows + group * kWeightPanel);
  }
  Pair operator()(int64_t k) const {
    const I32 both = widen_bytes(at + k * kHalf);
    return {to_float(both & 15) * scale.first + low.first,
            to_float(both >> 4) * scale.second + low.second};
  }
};

}  // namespace foveal::FOVEAL_ISA
