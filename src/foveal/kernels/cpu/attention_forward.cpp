// The forward pass of attention: tiled online softmax (Milakov & Gimelshein 2018; Dao et al. 2022,
// 2023), float32 sums whatever the element, nothing of size [Lq, Lk] anywhere.
//
// A task takes some queries of all the heads that share one KV head, folded into rows, and walks
// over the tiles of keys that any of them sees. For each tile and each panel of kRows rows
//
//     s = q k^T                       m' = max(m, max s)   p = exp(s - m')
//     l = l exp(m - m') + sum p       o = o exp(m - m') + p v
//
// and in the end out = o / l, lse = m + log l. The scale is applied within the exponential, where it
// costs nothing and rounds nothing, unless something is added to the scores. With many rows keys and values are packed
// once for all panels (pack.h); with few they are read as they lie, and the keys of one row are
// divided among tasks (flash-decoding), whose results are merged by whoever finishes last.
//
// What a panel cannot see is clipped from both products; the rest of what is hidden gets s = -inf.
// That costs nothing to be exact: a weight of 0 adds nothing, so results do not depend on what else
// is in a tile. Only where values hold inf or NaN is 0 * v not 0: if a task's result is not finite,
// it is computed again, leaving out weights of 0.
#include "attention.h"

#include "attention_plan.h"
#include "exp.h"
#include "pages.h"
#include "scores.h"
#include "scratch.h"
#include "threads.h"
#include "visibility.h"

namespace foveal::FOVEAL_ISA {

namespace {

constexpr int64_t kChunkKeys = 32;  // values read as they lie: keys of one product, kept in cache

// o, m and l of a task's rows.
struct Sums {
  float* out;
  float* top;
  float* weight;
};

template <class Element>
class Attention : Scores {
 public:
  Attention(const AttentionForward& call, const Task& task)
      : Scores(call, task),
        out_stride_(round_up(call.value_dim, kAlign)),
        stride_(larger(q_stride_, out_stride_) + kLanes),
        direct_(few() && (!call.pages || in_place(call))) {
    reserve();
    locate_queries();
    load_queries<Element>();
  }

  void run(RowSet* row_sets) {
    if (task_.row_set < 0) {
      compute(sums_);
      for (int64_t r = 0; r < rows_; ++r) finish(r, sums_);
      return;
    }
    RowSet& set = row_sets[task_.row_set];
    compute(part_of(set, task_.part));
    if (__atomic_sub_fetch(&set.unfinished, 1, __ATOMIC_ACQ_REL) == 0) {
      merge(set);
      for (int64_t r = 0; r < rows_; ++r) finish(r, part_of(set, 0));
    }
  }

 private:
  // ---- setting out

  static bool in_place(const AttentionForward& call) {
    return PagedRows::in_place(*call.pages, call.pages->keys, call.head_dim) &&
           PagedRows::in_place(*call.pages, call.pages->values, call.value_dim);
  }

  PagedRows paged_keys() const {
    return {*call_.pages, call_.pages->keys, task_.sequence, task_.kv_head, call_.head_dim};
  }
  PagedRows paged_values() const {
    return {*call_.pages, call_.pages->values, task_.sequence, task_.kv_head, call_.value_dim};
  }

  void reserve() {
    const int64_t padded = round_up(rows_, kRows) + kLanes;
    const int64_t packed = direct_ ? 0 : kTileKeys, paged = call_.pages ? kTileKeys : 0;
    Scratch room(padded * (q_stride_ + out_stride_ + 2) + kRows * kTileKeys + 2 * kLanes +
                 packed * (q_stride_ + round_up(out_stride_, kPanel)) + paged * stride_ +
                 padded * (sizeof(Seen) + sizeof(int64_t)) / sizeof(float));
    seen_ = room.take<Seen>(padded);
    positions_ = room.take<int64_t>(padded);
    queries_ = room.take<float>(padded * q_stride_);
    sums_ = {room.take<float>(padded * out_stride_), room.take<float>(padded),
             room.take<float>(padded)};
    scores_ = room.take<float>(kRows * kTileKeys);
    keys_ = room.take<float>(packed * q_stride_);
    values_ = room.take<float>(packed * round_up(out_stride_, kPanel));
    rows_of_tile_ = room.take<float>(paged * stride_);
  }

  // ---- walking over the keys

  void compute(const Sums& sums) {
    careful_ = false;
    walk(sums);
    F32 poison = {};
    for (int64_t i = 0; i < rows_ * out_stride_; i += kLanes) poison += load(sums.out + i) * 0.0f;
    if (sum(poison) == 0) return;
    careful_ = true;
    walk(sums);
  }

  void walk(const Sums& sums) {
    for (int64_t i = 0; i < rows_ * out_stride_; i += kLanes) store(sums.out + i, F32{});
    for (int64_t r = 0; r < rows_; ++r) {
      sums.top[r] = kNone;
      sums.weight[r] = 0;
    }
    for (int64_t first = task_.kv_begin; first < task_.kv_end; first += kTileKeys) {
      Tile tile{first, smaller(kTileKeys, task_.kv_end - first), 0, 0, Sight::kPartial, false};
      int64_t low = first, high = first + tile.count;
      together_.clip(&low, &high);
      if (low == high) {  // on to the range behind the sinks, or to the end
        if (first >= together_.begin) break;
        first = together_.begin / kTileKeys * kTileKeys - kTileKeys;
        continue;
      }
      tile.low = low - first;
      tile.high = high - first;
      if (!ordered_) tile.sight = classify(call_, extent_, extent_of(tile));
      if (tile.sight != Sight::kHidden) visit(tile, sums);
    }
  }

  void visit(Tile& tile, const Sums& sums) {
    const int64_t panels = divide_up(rows_, kRows), step = divide_up(rows_, panels);
    for (int64_t row = 0; row < rows_; row += step) {
      visit_panel(tile, row, static_cast<int>(smaller(step, rows_ - row)), sums);
    }
  }

  void visit_panel(Tile& tile, int64_t row, int count, const Sums& sums) {
    int64_t low = tile.low, high = tile.high;
    if (ordered_) {
      Seen seen = seen_[row];
      for (int r = 1; r < count; ++r) seen.include(seen_[row + r]);
      low = tile.first;
      high = tile.first + tile.count;
      seen.clip(&low, &high);
      if (low == high) return;
      low -= tile.first;
      high -= tile.first;
    }
    if (call_.mask.data && !any_visible(tile, row, count, low, high)) return;
    if (!direct_ && !tile.packed) pack(tile);
    const int64_t begin = low / kLanes, end = divide_up(high, kLanes);
    score(tile, row, count, begin, end);
    for (int r = 0; r < count; ++r) adjust(tile, row + r, scores_ + r * kTileKeys, begin, end);
    float factor[kLanes + kRows];
    soften(row, count, begin, end, sums, factor);
    weigh(tile, row, count, begin * kLanes, smaller(end * kLanes, tile.count), sums.out, factor);
  }

  void pack(Tile& tile) {
    tile.packed = true;
    if (call_.pages) {
      paged_keys().widen_rows(tile.first, tile.count, rows_of_tile_, stride_);
      pack_keys(rows_of_tile_, stride_, tile.count, call_.head_dim, keys_);
      paged_values().widen_rows(tile.first, tile.count, rows_of_tile_, stride_);
      pack_values(rows_of_tile_, stride_, tile.count, call_.value_dim, kTileKeys, values_);
      return;
    }
    pack_keys(rows_of<Element>(call_.k, tile.first), call_.k.token, tile.count, call_.head_dim, keys_);
    pack_values(rows_of<Element>(call_.v, tile.first), call_.v.token, tile.count, call_.value_dim,
                kTileKeys, values_);
  }

  // ---- scores

  void score(const Tile& tile, int64_t row, int count, int64_t begin, int64_t end) {
    const float* q = queries_ + row * q_stride_;
    if (direct_) {
      const int64_t first = begin * kLanes;
      if (call_.pages) {
        paged_keys().score(q, q_stride_, count, tile.first + first,
                           tile.first + smaller(end * kLanes, tile.count), scores_ + first,
                           kTileKeys, rows_of_tile_);
        return;
      }
      dot(q, q_stride_, count, rows_of<Element>(call_.k, tile.first + first), call_.k.token,
          smaller(end * kLanes, tile.count) - first, scores_ + first, kTileKeys, call_.head_dim,
          kAheadRows * call_.k.token);
      return;
    }
    for (int64_t j = begin; j < end;) {
      const int64_t panel = j / kColumns, stop = smaller(end, (panel + 1) * kColumns);
      const float* keys = keys_ + panel * kPanel * call_.head_dim + (j - panel * kColumns) * kLanes;
      multiplier<float>(count, static_cast<int>(stop - j))(q, q_stride_, keys, kPanel,
                                                           scores_ + j * kLanes, kTileKeys,
                                                           nullptr, call_.head_dim);
      j = stop;
    }
  }

  // ---- softmax and values

  // Turns the scores into weights relative to the largest so far; factor[r] is for what was summed
  // relative to the largest before.
  void soften(int64_t row, int count, int64_t begin, int64_t end, const Sums& sums,
              float* factor) {
    const Power exp = exp_;  // a copy: stores could change the member, for all the compiler knows
    float top[kLanes + kRows];
    for (int r = 0; r < count; ++r) {
      const float* s = scores_ + r * kTileKeys;
      F32 found = load(s + begin * kLanes);
      for (int64_t j = begin + 1; j < end; ++j) found = max(load(s + j * kLanes), found);
      const float before = sums.top[row + r];
      const float now = largest(max(found, splat(before)));
      sums.top[row + r] = now;
      top[r] = now == kNone ? 0 : now;
      factor[r] = before - top[r];
    }
    for (int r = 0; r < count; r += kLanes) store(factor + r, exp(load(factor + r)));
    for (int r = 0; r < count; ++r) {
      float* s = scores_ + r * kTileKeys;
      F32 total = {};
      for (int64_t j = begin; j < end; ++j) {
        const F32 p = exp(load(s + j * kLanes) - top[r]);
        total += p;
        store(s + j * kLanes, p);
      }
      sums.weight[row + r] = sums.weight[row + r] * factor[r] + sum(total);
    }
  }

  void weigh(const Tile& tile, int64_t row, int count, int64_t begin, int64_t end, float* out,
             const float* factor) {
    static constexpr float kOnes[kRows] = {1, 1, 1, 1, 1, 1};
    out += row * out_stride_;
    if (call_.pages && direct_ && !careful_) {
      paged_values().weigh(scores_ + begin, kTileKeys, count, tile.first + begin, tile.first + end,
                           out, out_stride_, factor, rows_of_tile_);
      return;
    }
    const int64_t step = direct_ ? kChunkKeys : end - begin;
    for (int64_t j = begin; j < end; j += step) {
      const int64_t depth = smaller(step, end - j);
      const float* scale = j == begin ? factor : kOnes;
      for (int64_t d = 0; d < call_.value_dim; d += kPanel) {
        const int64_t left = divide_up(call_.value_dim - d, kLanes);
        const int columns = static_cast<int>(smaller(left, kColumns));
        const float* p = scores_ + j;
        if (careful_) {
          if (call_.pages) {
            paged_values().widen_rows(tile.first + j, depth, rows_of_tile_, stride_);
            weigh_carefully(rows_of_tile_, stride_, count, j, depth, d, out + d, scale);
          } else {
            weigh_carefully(rows_of<Element>(call_.v, tile.first + j), call_.v.token, count, j, depth, d,
                            out + d, scale);
          }
        } else if (direct_) {
          multiplier<Element, kAheadRows>(count, columns)(
              p, kTileKeys, rows_of<Element>(call_.v, tile.first + j) + d, call_.v.token, out + d,
              out_stride_, scale, depth);
        } else {
          multiplier<float>(count, columns)(p, kTileKeys, values_ + d * kTileKeys + j * kPanel,
                                            kPanel, out + d, out_stride_, scale, depth);
        }
      }
    }
  }

  // As `multiply` does it, for the channels of one panel, but a weight of 0 takes nothing.
  template <class Stored>
  void weigh_carefully(const Stored* values, ptrdiff_t stride, int count, int64_t first, int64_t depth, int64_t channel,
                       float* out, const float* factor) const {
    const int64_t channels = smaller(kPanel, call_.value_dim - channel);
    for (int r = 0; r < count; ++r, out += out_stride_) {
      const float* p = scores_ + r * kTileKeys + first;
      for (int64_t d = 0; d < channels; d += kLanes) {
        const int n = static_cast<int>(smaller(kLanes, channels - d));
        F32 total = {};
        for (int64_t j = 0; j < depth; ++j) {
          const Stored* v = values + j * stride + channel + d;
          if (p[j] != 0) total += splat(p[j]) * load_some(v, n);
        }
        store(out + d, load(out + d) * factor[r] + total);
      }
    }
  }

  // ---- results

  Sums part_of(const RowSet& set, int64_t part) const {
    float* out = set.partial + part * set.partial_size;
    return {out, out + rows_ * out_stride_, out + rows_ * (out_stride_ + 1)};
  }

  // All parts into the first.
  void merge(const RowSet& set) const {
    const Sums whole = part_of(set, 0);
    for (int64_t r = 0; r < rows_; ++r) {
      float top = kNone;
      for (int64_t i = 0; i < set.num_parts; ++i) {
        const float other = part_of(set, i).top[r];
        top = other > top ? other : top;
      }
      const float level = top == kNone ? 0 : top;
      for (int64_t i = 0; i < set.num_parts; ++i) {
        const Sums part = part_of(set, i);
        const float factor = exp_(splat(part.top[r] - level))[0];
        whole.weight[r] = (i ? whole.weight[r] : 0) + part.weight[r] * factor;
        for (int64_t d = r * out_stride_; d < (r + 1) * out_stride_; d += kLanes) {
          const F32 before = i ? load(whole.out + d) : F32{};
          const F32 mine = load(part.out + d) * factor;
          store(whole.out + d, factor == 0 ? before : before + mine);
        }
      }
      whole.top[r] = top;
    }
  }

  void finish(int64_t r, const Sums& sums) const {
    const bool nothing = sums.top[r] == kNone;
    const float weight = nothing ? 1 : sums.weight[r];
    Element* out = static_cast<Element*>(call_.out.data) + start(call_.out, sequence_.q_start) +
                   head(r) * call_.out.head + query(r) * call_.out.token;
    for (int64_t d = 0; d < call_.value_dim; d += kLanes) {
      const F32 x = load(sums.out + r * out_stride_ + d) / weight;
      const int64_t left = call_.value_dim - d;
      if (left >= kLanes) {
        store(out + d, x);
      } else {
        store_some(out + d, x, static_cast<int>(left));
      }
    }
    const double lse = static_cast<double>(sums.top[r]) * unit_ + __builtin_log(sums.weight[r]);
    const int64_t at = start(call_.lse, sequence_.q_start) + head(r) * call_.lse.head +
                       query(r) * call_.lse.token;
    static_cast<float*>(call_.lse.data)[at] = nothing ? kNone : static_cast<float>(lse);
    if (call_.tops) {
      call_.tops[at] = sums.top[r];
      call_.weights[at] = sums.weight[r];
    }
  }

  const int64_t out_stride_, stride_;  // the latter of rows_of_tile_
  const bool direct_;
  bool careful_ = false;
  Sums sums_;
  float* scores_;
  float* keys_;
  float* values_;
  float* rows_of_tile_;  // of pages, widened; or what their products leave
};

template <class Element>
void run(const AttentionForward& call, const Plan& plan, int64_t index) {
  Attention<Element>(call, plan.tasks[index]).run(plan.row_sets);
}

}  // namespace

void attention_forward(const AttentionForward& call) {
  Plan* plan = make_plan(call);
  auto work = [&](int64_t index) {
    switch (call.element) {
      case ElementType::kFloat32: return run<float>(call, *plan, index);
      case ElementType::kBFloat16: return run<BFloat16>(call, *plan, index);
      case ElementType::kFloat16: return run<Float16>(call, *plan, index);
    }
  };
  run_tasks(call.num_threads, plan->num_tasks, work);
  free_plan(plan);
}

}  // namespace foveal::FOVEAL_ISA
