// The matrix products of a tile, as register-blocked micro-kernels.
//
// multiply: C[R][columns] = C * factor + A[R][depth] B[depth][columns]. R rows by up to kColumns
// vectors of C stay in registers while the depth is walked: one load of B serves R products, one
// broadcast of A serves kColumns. With 32 registers 6 x 4 products need 24 + 4 + 1 of them, with 16
// 6 x 2 need 12 + 2 + 1. Each sum is taken in the order of the depth, whatever R is, and added to C
// as a whole: over many tiles that rounds less than one long sum.
//
// dot: the same product where B lies transposed, row by row, as keys do: S[r][j] = q_r . k_j. For
// few queries, as each key is then read once and nothing is rewritten.
#pragma once

#include "vec.h"

namespace foveal::FOVEAL_ISA {

inline constexpr int kRows = 6;
inline constexpr int kColumns = kRegisters == 32 ? 4 : 2;
inline constexpr int kPanel = kColumns * kLanes;
inline constexpr int kAheadRows = 32;  // of keys or values read as they lie

// With kTransposed, A lies column by column. With kAhead, rows of B that many further on are asked
// for: into the second level of cache, which can wait for more of them at a time than the first (10
// against 18 GB/s of one core, Zen 4).
template <int R, int C, int kAhead, class Element, bool kTransposed>
void multiply(const float* a, ptrdiff_t a_stride, const Element* b, ptrdiff_t b_stride, float* c,
              ptrdiff_t c_stride, const float* factor, int64_t depth) {
  F32 sums[R][C] = {};
#pragma GCC unroll 2
  for (int64_t d = 0; d < depth; ++d) {
    F32 row[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      const Element* from = b + d * b_stride + j * kLanes;
      row[j] = load(from);
      if constexpr (kAhead) __builtin_prefetch(from + kAhead * b_stride, 0, 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32 x = splat(kTransposed ? a[d * a_stride + r] : a[r * a_stride + d]);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) sums[r][j] += x * row[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      float* to = c + r * c_stride + j * kLanes;
      store(to, factor ? load(to) * factor[r] + sums[r][j] : sums[r][j]);
    }
  }
}

template <class Element>
using Multiply = void (*)(const float*, ptrdiff_t, const Element*, ptrdiff_t, float*, ptrdiff_t,
                          const float*, int64_t);

// The micro-kernel for so many rows and vectors of columns.
template <class Element, int kAhead = 0, bool kTransposed = false>
Multiply<Element> multiplier(int rows, int columns) {
  constexpr int kThird = kColumns == 4 ? 3 : 1, kFourth = kColumns == 4 ? 4 : 1;
  static constexpr Multiply<Element> table[kRows][4] = {
#define FOVEAL_ROW(R)                                                                        \
  {multiply<R, 1, kAhead, Element, kTransposed>, multiply<R, 2, kAhead, Element, kTransposed>, \
   multiply<R, kThird, kAhead, Element, kTransposed>,                                          \
   multiply<R, kFourth, kAhead, Element, kTransposed>}
      FOVEAL_ROW(1), FOVEAL_ROW(2), FOVEAL_ROW(3), FOVEAL_ROW(4), FOVEAL_ROW(5), FOVEAL_ROW(6),
#undef FOVEAL_ROW
  };
  return table[rows - 1][columns - 1];
}

// R queries with K neighbouring keys, of which `count` exist; depth is a multiple of kLanes. Writes
// K scores for each query, those of missing keys without meaning. Asks for what lies `ahead` elements
// further on, if kAhead.
template <int R, int K, bool kAhead, class Element>
void dot_block(const float* q, ptrdiff_t q_stride, const Element* k, ptrdiff_t k_stride,
               int64_t count, float* s, ptrdiff_t s_stride, int64_t depth, ptrdiff_t ahead) {
  static_assert(R * K % kLanes == 0 && kLanes % K == 0);
  F32 sums[R * K] = {};
  const Element* keys[K];
#pragma GCC unroll 16
  for (int j = 0; j < K; ++j) keys[j] = k + (j < count ? j : count - 1) * k_stride;
  for (int64_t d = 0; d < depth; d += kLanes) {
    F32 x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = load(q + r * q_stride + d);
#pragma GCC unroll 16
    for (int j = 0; j < K; ++j) {
      const F32 y = load(keys[j] + d);
      if constexpr (kAhead) __builtin_prefetch(keys[j] + d + ahead, 0, 2);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r * K + j] += x[r] * y;
    }
  }
#pragma GCC unroll 16
  for (int first = 0; first < R * K; first += kLanes) {
    F32 group[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) group[i] = sums[first + i];
    float found[kLanes];
    store(found, sum_each(group));
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i += K) {
      __builtin_memcpy(s + (first + i) / K * s_stride, found + i, K * sizeof(float));
    }
  }
}

// S[rows][count] of queries padded with zeros to a multiple of kLanes, and keys as they lie. S has
// room for `count` rounded up to a multiple of kLanes. `ahead` as above.
template <bool kAhead = true, class Element>
void dot(const float* q, ptrdiff_t q_stride, int rows, const Element* k, ptrdiff_t k_stride,
         int64_t count, float* s, ptrdiff_t s_stride, int64_t depth, ptrdiff_t ahead) {
  constexpr int kSums = kRegisters == 32 ? 16 : 8;
  constexpr int kFew = kSums / 4 < kLanes ? kSums / 4 : kLanes;
  constexpr int kSome = kSums / 2 < kLanes ? kSums / 2 : kLanes;
  constexpr int kMany = kSums < kLanes ? kSums : kLanes;
  for (int64_t j = 0; j < count;) {
    const Element* keys = k + j * k_stride;
    const int64_t left = count - j;
    for (int r = 0; r < rows;) {
      const float* x = q + r * q_stride;
      float* y = s + r * s_stride + j;
      if (rows - r >= 4) {
        for (int i = 0; i < kMany && i < left; i += kFew) {
          dot_block<4, kFew, kAhead>(x, q_stride, keys + i * k_stride, k_stride, left - i, y + i, s_stride,
                             depth, r ? 0 : ahead);
        }
        r += 4;
      } else if (rows - r >= 2) {
        for (int i = 0; i < kMany && i < left; i += kSome) {
          dot_block<2, kSome, kAhead>(x, q_stride, keys + i * k_stride, k_stride, left - i, y + i,
                              s_stride, depth, r ? 0 : ahead);
        }
        r += 2;
      } else {
        dot_block<1, kMany, kAhead>(x, q_stride, keys, k_stride, left, y, s_stride, depth,
                            r ? 0 : ahead);
        r += 1;
      }
    }
    j += kMany;
  }
}

}  // namespace foveal::FOVEAL_ISA
