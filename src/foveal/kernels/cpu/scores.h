// The scores of some queries against tiles of keys: which queries, what stands between a product and
// its score, and what hides it. The forward and the backward pass share every operation on a score,
// in its order: where scores are large so is their rounding, and exp(s - lse) bears no other.
#pragma once

#include "attention.h"
#include "attention_plan.h"
#include "exp.h"
#include "pack.h"
#include "visibility.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr float kNone = -__builtin_inff();
constexpr int64_t kDirectRows = 8;  // with at most so many rows keys are read as they lie

inline F32 indices() {
  F32 x;
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(i);
  return x;
}

// Whether scores are nothing but products: then the scale is applied within the exponential.
inline bool is_bare(const AttentionForward& call) {
  return call.softcap == 0 && !call.alibi && !call.bias.data;
}
// What scores, and the largest of a row, are multiplied by in the exponential.
inline float unit_of(const AttentionForward& call) {
  const double size = __builtin_fabs(call.scale);
  return is_bare(call) && size > 1e-20 ? static_cast<float>(size) : 1;
}
// What queries are multiplied by.
inline float query_factor(const AttentionForward& call) {
  const double scale = call.scale / unit_of(call);
  return static_cast<float>(call.softcap != 0 ? scale / call.softcap : scale);
}

struct Tile {
  int64_t first, count;
  int64_t low, high;  // the keys, counted from `first`, that any row may see
  Sight sight;        // where keys have given positions
  bool packed;
};

// The queries of a task, folded with the heads of their group into rows.
class Scores {
 protected:
  Scores(const AttentionForward& call, const Task& task)
      : call_(call),
        task_(task),
        sequence_(call, task.sequence),
        group_(call.heads / call.kv_heads),
        rows_((task.q_end - task.q_begin) * group_),
        q_stride_(round_up(call.head_dim, kLanes)),
        ordered_(!sequence_.kv_positions),
        bare_(is_bare(call)),
        unit_(unit_of(call)),
        factor_(query_factor(call)),
        exp_(unit_ * kLog2E) {}

  // Whether keys of contiguous rows are multiplied as they lie, by `dot`.
  bool few() const {
    return sequence_.q_len * group_ <= kDirectRows && call_.head_dim % kLanes == 0 &&
           call_.value_dim % kLanes == 0;
  }

  void locate_queries() {
    together_ = {0, 0, 0};
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t i = query(r);
      positions_[r] = sequence_.q_position(i);
      seen_[r] = Seen{0, 0, 0};
      extent_.include(positions_[r], sequence_.is_pad(i));
      if (sequence_.is_pad(i)) continue;
      seen_[r] = ordered_ ? seen_by(call_, positions_[r], positions_[r], sequence_.limit)
                          : Seen{0, 0, sequence_.limit};
      together_.include(seen_[r]);
    }
  }

  template <class Element>
  void load_queries() {
    const Element* q = static_cast<const Element*>(call_.q.data) + start(call_.q, sequence_.q_start);
    for (int64_t r = 0; r < rows_; ++r) {
      widen(q + head(r) * call_.q.head + query(r) * call_.q.token, call_.head_dim,
            factor_, q_stride_, queries_ + r * q_stride_);
    }
  }

  int64_t query(int64_t r) const { return task_.q_begin + r / group_; }
  int64_t head(int64_t r) const { return task_.kv_head * group_ + r % group_; }
  int64_t start(const Strided& x, int64_t first) const {
    return (call_.q_bounds ? 0 : task_.sequence * x.batch) + first * x.token;
  }
  template <class Element>
  const Element* rows_of(const Strided& x, int64_t key) const {
    return static_cast<const Element*>(x.data) + start(x, sequence_.kv_start) +
           task_.kv_head * x.head + key * x.token;
  }

  Extent extent_of(const Tile& tile) const {
    Extent extent;
    for (int64_t j = tile.first; j < tile.first + tile.count; ++j) {
      extent.include(sequence_.kv_positions[j], sequence_.kv_positions[j] < 0);
    }
    return extent;
  }

  // What stands between a product and its score, and what hides it.
  void adjust(const Tile& tile, int64_t row, float* s, int64_t begin, int64_t end) {
    if (!bare_) add_terms(tile, row, s, begin, end);
    if (call_.mask.data) hide_by_mask(tile, row, s, begin, end);
    if (ordered_ || tile.sight == Sight::kFull) {
      hide_outside(tile, seen_[row], s, begin, end);
    } else {
      hide_by_position(tile, row, s, begin, end);
    }
  }

  void add_terms(const Tile& tile, int64_t row, float* s, int64_t begin, int64_t end) {
    if (call_.softcap != 0) {
      const float cap = static_cast<float>(call_.softcap);
      for (int64_t j = begin; j < end; ++j) {
        store(s + j * kLanes, tanh(load(s + j * kLanes)) * cap);
      }
    }
    if (call_.alibi) {
      const float slope = call_.alibi[head(row)];
      if (ordered_) {
        const F32 first = indices() + static_cast<float>(tile.first - positions_[row]);
        for (int64_t j = begin; j < end; ++j) {
          const F32 distance = first + static_cast<float>(j * kLanes);
          store(s + j * kLanes, load(s + j * kLanes) + distance * slope);
        }
      } else {
        for (int64_t j = begin * kLanes; j < smaller(end * kLanes, tile.count); ++j) {
          const int64_t position = sequence_.kv_positions[tile.first + j];
          s[j] += static_cast<float>(position - positions_[row]) * slope;
        }
      }
    }
    if (call_.bias.data) {
      const float* bias = static_cast<const float*>(call_.bias.data) + pair(call_.bias, tile, row);
      const int64_t step = call_.bias.key;
      for (int64_t j = begin * kLanes; j < smaller(end * kLanes, tile.count); ++j) {
        s[j] = bias[j * step] == kNone ? kNone : s[j] + bias[j * step];
      }
    }
  }

  int64_t pair(const Pairs& x, const Tile& tile, int64_t row) const {
    return task_.sequence * x.batch + head(row) * x.head + query(row) * x.query +
           tile.first * x.key;
  }

  bool any_visible(const Tile& tile, int64_t row, int count, int64_t low, int64_t high) const {
    for (int r = 0; r < count; ++r) {
      const uint8_t* mask =
          static_cast<const uint8_t*>(call_.mask.data) + pair(call_.mask, tile, row + r);
      uint8_t any = 0;
      for (int64_t j = low; j < high; ++j) any |= mask[j * call_.mask.key];
      if (any) return true;
    }
    return false;
  }

  void hide_by_mask(const Tile& tile, int64_t row, float* s, int64_t begin, int64_t end) const {
    const uint8_t* mask =
        static_cast<const uint8_t*>(call_.mask.data) + pair(call_.mask, tile, row);
    const int64_t last = smaller(end * kLanes, tile.count);
    if (call_.mask.key == 1) {
      for (int64_t j = begin * kLanes; j < last; ++j) s[j] = mask[j] ? s[j] : kNone;
    } else {
      for (int64_t j = begin * kLanes; j < last; ++j) {
        s[j] = mask[j * call_.mask.key] ? s[j] : kNone;
      }
    }
  }

  void hide_outside(const Tile& tile, const Seen& seen, float* s, int64_t begin,
                    int64_t end) const {
    if (seen.all_of(tile.first + begin * kLanes, tile.first + end * kLanes)) return;
    const F32 sinks = splat(inside(seen.sinks - tile.first));
    const F32 low = splat(inside(seen.begin - tile.first));
    const F32 high = splat(inside(seen.end - tile.first));
    F32 j = indices() + static_cast<float>(begin * kLanes);
    for (int64_t i = begin; i < end; ++i) {
      const I32 seen_here = (j < sinks) | ((j >= low) & (j < high));
      store(s + i * kLanes, seen_here ? load(s + i * kLanes) : splat(kNone));
      j += static_cast<float>(kLanes);
    }
  }
  static float inside(int64_t j) {
    return static_cast<float>(larger(0, smaller(j, kTileKeys)));
  }

  void hide_by_position(const Tile& tile, int64_t row, float* s, int64_t begin, int64_t end) {
    const bool pad = sequence_.is_pad(query(row));
    for (int64_t j = begin * kLanes; j < end * kLanes; ++j) {
      const bool seen = !pad && j < tile.count &&
                        sees(call_, positions_[row], sequence_.kv_positions[tile.first + j]);
      s[j] = seen ? s[j] : kNone;
    }
  }

  const AttentionForward& call_;
  const Task& task_;
  const Sequence sequence_;
  const int64_t group_, rows_, q_stride_;
  const bool ordered_, bare_;
  const float unit_;    // of scores and of `top`: what they are multiplied by in the exponential
  const float factor_;  // of queries
  const Power exp_;
  Seen together_;     // by all rows
  Extent extent_;     // of all rows
  Seen* seen_;        // by each row
  int64_t* positions_;
  float* queries_;    // multiplied by factor_
};

}  // namespace
}  // namespace foveal::FOVEAL_ISA
