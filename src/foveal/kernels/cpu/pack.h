// Keys and values of a tile, widened to float32 and laid out for the micro-kernels: panels of
// kPanel columns, [columns / kPanel][depth][kPanel], so that a product reads memory in order.
#pragma once

#include "products.h"

namespace foveal::FOVEAL_ISA {

// Rows further on that are asked for: those of the next tile, which is packed when this one is done.
inline constexpr int64_t kPackAhead = 128;

// Keys [count][dim] transposed: the columns of the panels are keys, the depth is their channels.
// The last panel is filled up with zeros to a whole vector.
template <class Element>
void pack_keys(const Element* k, ptrdiff_t stride, int64_t count, int64_t dim, float* packed) {
  for (int64_t j = 0; j < count; j += kLanes) {
    float* column = packed + j / kPanel * kPanel * dim + j % kPanel;
    const int64_t keys = count - j < kLanes ? count - j : kLanes;
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t channels = dim - d < kLanes ? dim - d : kLanes;
      F32 square[kLanes];
      if (channels == kLanes && keys == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const Element* from = k + (j + i) * stride + d;
          square[i] = load(from);
          __builtin_prefetch(from + kPackAhead * stride, 0, 2);
        }
      } else {
        for (int i = 0; i < kLanes; ++i) {
          square[i] = i < keys ? load_some(k + (j + i) * stride + d, channels) : F32{};
        }
      }
      transpose(square);
      if (channels == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(column + (d + i) * kPanel, square[i]);
      } else {
        for (int i = 0; i < channels; ++i) store(column + (d + i) * kPanel, square[i]);
      }
    }
  }
}

// Values [count][dim]: the columns of the panels are their channels, the depth is the keys. `depth`
// keys have room; the last vector of channels is filled up with zeros.
template <class Element>
void pack_values(const Element* v, ptrdiff_t stride, int64_t count, int64_t dim, int64_t depth,
                 float* packed) {
  for (int64_t j = 0; j < count; ++j) {
    const Element* row = v + j * stride;
    for (int64_t d = 0; d < dim; d += kLanes) {
      float* to = packed + d / kPanel * kPanel * depth + j * kPanel + d % kPanel;
      store(to, dim - d < kLanes ? load_some(row + d, dim - d) : load(row + d));
      __builtin_prefetch(row + kPackAhead * stride + d, 0, 2);
    }
  }
}

// A row of `count` elements widened, multiplied, and filled up with zeros to `room`.
template <class Element>
void widen(const Element* x, int64_t count, float factor, int64_t room, float* wide) {
  for (int64_t d = 0; d < room; d += kLanes) {
    const int64_t left = count - d;
    store(wide + d, (left >= kLanes ? load(x + d) : load_some(x + d, left < 0 ? 0 : left)) * factor);
  }
}

}  // namespace foveal::FOVEAL_ISA
