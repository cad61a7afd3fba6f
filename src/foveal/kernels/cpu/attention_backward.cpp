// The backward pass of attention from what the forward pass leaves (Dao et al. 2022, 2023): five
// products, float32 sums whatever the element, nothing of size [Lq, Lk] anywhere.
//
// A task takes a part of the keys of one KV head and walks over its tiles; for each tile it walks
// over the chunks of queries that see it, all heads of the group folded into rows. With the scores s
// and, of each row, the largest score m and the sum of weights l of the forward pass
//
//     p = exp(s - m) / l        ds = p (d_out v^T - delta)        delta = sum(d_out out) - d_lse
//     dv += p^T d_out           dk += ds^T q                      dq += ds k
//
// Scores are computed as the forward pass does it, to the bit, so that p is what it was.
//
// Keys are divided for the sake of the threads, into a few parts by their number alone; each part
// has a dq of its own, and these are added up in order at the end: threads change no bit.
//
// What a panel of kRows rows cannot see is clipped from all products; whatever else is hidden has
// p = ds = 0, which adds nothing unless what it multiplies is inf or NaN. Tiles of keys and chunks of
// queries that hold such are told when they are loaded, and their products leave out zeros.
#include <cstdlib>

#include "attention.h"
#include "attention_plan.h"
#include "scores.h"
#include "scratch.h"
#include "threads.h"

namespace foveal::FOVEAL_ISA {
namespace {

constexpr int64_t kChunkRows = 96;  // queries times heads of a group, at least one query
constexpr int64_t kSumRows = 32;    // of these, summed before they are added to dk and dv: rounds less
// Of weights: their columns are read too, which should not all fall into the same sets of a cache.
constexpr int64_t kScoreStride = kTileKeys + 16;
constexpr int64_t kKeyGroups = (kTileKeys + kRows - 1) / kRows;
constexpr float kOnes[kRows] = {1, 1, 1, 1, 1, 1};

// dq before its scale, in float32: [part of the keys][kv head][token][head of the group][channel].
struct PartialDq {
  const AttentionForward& call;
  const int64_t group, stride, tokens;
  float* sums;

  explicit PartialDq(const AttentionForward& call)
      : call(call),
        group(call.heads / call.kv_heads),
        stride(round_up(call.head_dim, kLanes)),
        tokens(call.q_bounds ? call.q_bounds[call.batch] : call.batch * call.q_len) {
    int64_t parts = 1;
    for (int64_t i = 0; i < call.batch; ++i) parts = larger(parts, num_parts(Sequence(call, i)));
    // Pages that no query's part touches are never brought in.
    sums = static_cast<float*>(
        std::calloc(parts * call.heads * tokens * stride + 1, sizeof(float)));
  }
  ~PartialDq() { std::free(sums); }
  PartialDq(const PartialDq&) = delete;

  static int64_t num_parts(const Sequence& sequence) {
    return larger(1, divide_up(sequence.kv_len, keys_of_part(sequence.kv_len)));
  }
  // The rows of one KV head from this query on.
  float* rows(int64_t part, int64_t kv_head, int64_t sequence, int64_t query) const {
    const int64_t first = call.q_bounds ? call.q_bounds[sequence] : sequence * call.q_len;
    const int64_t token = (part * call.kv_heads + kv_head) * tokens + first + query;
    return sums + token * group * stride;
  }
};

// A task's temporaries: of the tile of keys, and of the chunk of queries.
struct Room {
  const int64_t rows;         // at most
  const int64_t k_stride, v_stride;
  float *keys, *values;       // packed, to be multiplied by q and d_out
  float* key_rows;            // [kTileKeys][k_stride]
  float *dk, *dv;             // [kTileKeys][k_stride], [kTileKeys][v_stride]
  bool finite_keys;
  Seen* seen;
  int64_t* positions;
  float *queries, *d_out;     // [rows][k_stride], [rows][v_stride]
  float *top, *share, *delta; // [rows]; share is 1 / l
  float *p, *ds, *slope;      // [rows][kScoreStride]; slope is the softcap's

  explicit Room(const AttentionForward& call)
      : rows(step(call) * (call.heads / call.kv_heads) + kLanes),
        k_stride(round_up(call.head_dim, kLanes)),
        v_stride(round_up(call.value_dim, kLanes)) {
    Scratch room(kTileKeys * (3 * k_stride + 2 * v_stride) +
                 rows * (k_stride + v_stride + 3 + 3 * kScoreStride) +
                 rows * (sizeof(Seen) + sizeof(int64_t)) / sizeof(float));
    keys = room.take<float>(kTileKeys * k_stride);
    values = room.take<float>(kTileKeys * v_stride);
    key_rows = room.take<float>(kTileKeys * k_stride);
    dk = room.take<float>(kTileKeys * k_stride);
    dv = room.take<float>(kTileKeys * v_stride);
    seen = room.take<Seen>(rows);
    positions = room.take<int64_t>(rows);
    queries = room.take<float>(rows * k_stride);
    d_out = room.take<float>(rows * v_stride);
    top = room.take<float>(rows);
    share = room.take<float>(rows);
    delta = room.take<float>(rows);
    p = room.take<float>(rows * kScoreStride);
    ds = room.take<float>(rows * kScoreStride);
    slope = room.take<float>(call.softcap != 0 ? rows * kScoreStride : 0);
  }

  // Queries of a chunk.
  static int64_t step(const AttentionForward& call) {
    return larger(1, kChunkRows / (call.heads / call.kv_heads));
  }
};

inline void clear(float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(x + i, F32{});
}

inline bool all_finite(const float* x, int64_t count) {
  F32 poison = {};
  for (int64_t i = 0; i < count; i += kLanes) poison += load(x + i) * 0.0f;
  return sum(poison) == 0;
}

// The first `count` of a row times a factor, as elements.
template <class Element>
void narrow(const float* x, int64_t count, float factor, Element* to) {
  for (int64_t d = 0; d < count; d += kLanes) {
    const F32 scaled = load(x + d) * factor;
    if (count - d >= kLanes) {
      store(to + d, scaled);
    } else {
      store_some(to + d, scaled, static_cast<int>(count - d));
    }
  }
}

// C += A B as `multiply` does it, with A[r][d] at a[r * row + d * column], but zeros in A take
// nothing.
inline void add_carefully(const float* a, ptrdiff_t row, ptrdiff_t column, int64_t rows,
                          const float* b, ptrdiff_t stride, float* c, int64_t columns,
                          int64_t depth) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < columns * kLanes; j += kLanes) {
      F32 total = {};
      for (int64_t d = 0; d < depth; ++d) {
        const float x = a[r * row + d * column];
        if (x != 0) total += splat(x) * load(b + d * stride + j);
      }
      store(c + r * stride + j, load(c + r * stride + j) + total);
    }
  }
}

// Some rows of a chunk, and the vectors of the tile's keys that any of them sees: none if begin is
// end.
struct Panel {
  int64_t row;
  int count;
  int64_t begin, end;
};

template <class Element>
class Chunk : Scores {
 public:
  Chunk(const AttentionBackward& call, const Task& task, Room& room)
      : Scores(call.forward, task), backward_(call), room_(room) {
    seen_ = room.seen;
    positions_ = room.positions;
    queries_ = room.queries;
    locate_queries();
  }

  // Adds what these queries and the keys of the tile give to each other; dq has the queries' rows.
  void visit(Tile& tile, float* dq) {
    if (!ordered_) tile.sight = classify(call_, extent_, extent_of(tile));
    if (!ordered_ && tile.sight == Sight::kHidden) return;
    const int64_t panels = divide_up(rows_, kRows), step = divide_up(rows_, panels);
    bool any = false;
    num_panels_ = 0;
    for (int64_t row = 0; row < rows_; row += step) {
      const Panel panel = look(tile, row, static_cast<int>(smaller(step, rows_ - row)));
      panels_[num_panels_++] = panel;
      any |= panel.begin < panel.end;
      if (num_panels_ == kMostPanels) {
        if (any) differentiate(tile, dq);
        any = false;
        num_panels_ = 0;
      }
    }
    if (any) differentiate(tile, dq);
  }

 private:
  static constexpr int kMostPanels = kChunkRows / kRows + 1;

  Panel look(const Tile& tile, int64_t row, int count) const {
    int64_t low = tile.first, high = tile.first + tile.count;
    if (ordered_) {
      Seen seen = seen_[row];
      for (int r = 1; r < count; ++r) seen.include(seen_[row + r]);
      seen.clip(&low, &high);
    }
    low -= tile.first;
    high -= tile.first;
    if (low == high || (call_.mask.data && !any_visible(tile, row, count, low, high))) {
      return {row, count, 0, 0};
    }
    return {row, count, low / kLanes, divide_up(high, kLanes)};
  }

  void differentiate(Tile& tile, float* dq) {
    if (!tile.packed) pack(tile);
    load_rows();
    score(tile);
    for (int i = 0; i < num_panels_; ++i) {
      const Panel& panel = panels_[i];
      for (int r = 0; r < panel.count; ++r) soften(tile, panel.row + r, panel.begin, panel.end);
    }
    add_dq(tile, dq);
    find_rows_of_keys();
    add_of_keys(tile, room_.p, room_.d_out, room_.v_stride, room_.dv);
    add_of_keys(tile, room_.ds, queries_, room_.k_stride, room_.dk);
  }

  // ---- loading

  void pack(Tile& tile) {
    tile.packed = true;
    const Element* k = rows_of<Element>(call_.k, tile.first);
    pack_keys(k, call_.k.token, tile.count, call_.head_dim, room_.keys);
    pack_keys(rows_of<Element>(call_.v, tile.first), call_.v.token, tile.count, call_.value_dim,
              room_.values);
    for (int64_t j = 0; j < tile.count; ++j) {
      widen(k + j * call_.k.token, call_.head_dim, 1, q_stride_, room_.key_rows + j * q_stride_);
    }
    room_.finite_keys = all_finite(room_.key_rows, tile.count * q_stride_);
  }

  const Element* row_of(const Strided& x, int64_t r) const {
    return static_cast<const Element*>(x.data) + start(x, sequence_.q_start) + head(r) * x.head +
           query(r) * x.token;
  }
  float number_of(const void* data, const Strided& x, int64_t r) const {
    return static_cast<const float*>(data)[start(x, sequence_.q_start) + head(r) * x.head +
                                           query(r) * x.token];
  }

  // A row that sees nothing counts as zeros: whatever it holds stays there.
  void load_rows() {
    load_queries<Element>();
    for (int64_t r = 0; r < rows_; ++r) {
      float* d_out = room_.d_out + r * room_.v_stride;
      const float top = number_of(call_.tops, call_.lse, r);
      const float weight = number_of(call_.weights, call_.lse, r);
      if (weight == 0) {
        clear(queries_ + r * q_stride_, q_stride_);
        clear(d_out, room_.v_stride);
        room_.top[r] = room_.share[r] = room_.delta[r] = 0;
        continue;
      }
      room_.top[r] = top == kNone ? 0 : top;  // all scores were NaN
      room_.share[r] = 1 / weight;
      widen(row_of(backward_.d_out, r), call_.value_dim, 1, room_.v_stride, d_out);
      room_.delta[r] = product(d_out, row_of(call_.out, r)) -
                       number_of(backward_.d_lse.data, backward_.d_lse, r);
    }
    finite_rows_ = all_finite(queries_, rows_ * q_stride_) &&
                   all_finite(room_.d_out, rows_ * room_.v_stride);
  }

  float product(const float* d_out, const Element* out) const {
    F32 total = {};
    for (int64_t d = 0; d < call_.value_dim; d += kLanes) {
      const int64_t left = call_.value_dim - d;
      const F32 x = left >= kLanes ? load(out + d) : load_some(out + d, static_cast<int>(left));
      total += load(d_out + d) * x;
    }
    return sum(total);
  }

  // ---- weights and their gradients

  // Products with keys into `p`, and with values into `ds`.
  void score(const Tile& tile) {
    if (few()) {
      for (int i = 0; i < num_panels_; ++i) read_in_place(tile, panels_[i]);
    } else {
      multiply_panels(queries_, q_stride_, room_.keys, call_.head_dim, room_.p);
    }
    multiply_panels(room_.d_out, room_.v_stride, room_.values, call_.value_dim, room_.ds);
  }

  void read_in_place(const Tile& tile, const Panel& panel) {
    const int64_t first = panel.begin * kLanes;
    const int64_t last = smaller(panel.end * kLanes, tile.count);
    if (first >= last) return;
    dot<false>(queries_ + panel.row * q_stride_, q_stride_, panel.count,
               rows_of<Element>(call_.k, tile.first + first), call_.k.token, last - first,
               room_.p + panel.row * kScoreStride + first, kScoreStride, call_.head_dim, 0);
  }

  void multiply_panels(const float* rows, int64_t stride, const float* packed, int64_t depth,
                       float* to) {
    for (int64_t first = 0; first < kTileKeys / kLanes; first += kColumns) {
      for (int i = 0; i < num_panels_; ++i) {
        const Panel& panel = panels_[i];
        const int64_t j = larger(first, panel.begin), stop = smaller(first + kColumns, panel.end);
        if (j >= stop) continue;
        multiplier<float>(panel.count, static_cast<int>(stop - j))(
            rows + panel.row * stride, stride,
            packed + first * kLanes * depth + (j - first) * kLanes, kPanel,
            to + panel.row * kScoreStride + j * kLanes, kScoreStride, nullptr, depth);
      }
    }
  }

  // A row of products to p and ds; 0 outside of what its panel sees.
  void soften(const Tile& tile, int64_t row, int64_t begin, int64_t end) {
    float* p = room_.p + row * kScoreStride;
    float* ds = room_.ds + row * kScoreStride;
    float* slope = room_.slope + row * kScoreStride;
    clear(p, begin * kLanes);
    clear(ds, begin * kLanes);
    clear(p + end * kLanes, kTileKeys - end * kLanes);
    clear(ds + end * kLanes, kTileKeys - end * kLanes);
    if (call_.softcap != 0) find_slope(p, slope, begin, end);
    adjust(tile, row, p, begin, end);
    const Power exp = exp_;
    const float top = room_.top[row], share = room_.share[row], delta = room_.delta[row];
    for (int64_t j = begin * kLanes; j < end * kLanes; j += kLanes) {
      const F32 relative = exp(load(p + j) - top);
      const F32 weight = relative == 0.0f ? F32{} : relative * share;
      F32 change = weight * (load(ds + j) - delta);
      if (call_.softcap != 0) change *= load(slope + j);
      store(p + j, weight);
      store(ds + j, weight == 0.0f ? F32{} : change);
    }
  }

  // cap tanh'(x) = cap / cosh(x)^2, as 1 - tanh(x)^2 cancels near the cap.
  void find_slope(const float* products, float* slope, int64_t begin, int64_t end) const {
    const float cap = static_cast<float>(call_.softcap);
    for (int64_t j = begin * kLanes; j < end * kLanes; j += kLanes) {
      const F32 size = from_bits(bits(load(products + j)) & 0x7fffffff);
      const F32 t = exp(size * -2.0f);
      store(slope + j, t * (4 * cap) / ((1.0f + t) * (1.0f + t)));
    }
  }

  // ---- gradients

  void add_dq(const Tile& tile, float* dq) {
    for (int64_t d = 0; d < q_stride_; d += kPanel) {
      const int columns = static_cast<int>(smaller(q_stride_ - d, kPanel) / kLanes);
      for (int i = 0; i < num_panels_; ++i) {
        const Panel& panel = panels_[i];
        const int64_t first = panel.begin * kLanes;
        const int64_t depth = smaller(panel.end * kLanes, tile.count) - first;
        if (depth <= 0) continue;
        const float* a = room_.ds + panel.row * kScoreStride + first;
        const float* b = room_.key_rows + first * q_stride_ + d;
        float* c = dq + panel.row * q_stride_ + d;
        if (room_.finite_keys) {
          multiplier<float>(panel.count, columns)(a, kScoreStride, b, q_stride_, c, q_stride_,
                                                  kOnes, depth);
        } else {
          add_carefully(a, kScoreStride, 1, panel.count, b, q_stride_, c, columns, depth);
        }
      }
    }
  }

  // For each kRows keys of the tile, from which row to which they are seen.
  void find_rows_of_keys() {
    for (int64_t group = 0; group < kKeyGroups; ++group) {
      int64_t begin = 0, end = 0;
      for (int i = 0; i < num_panels_; ++i) {
        const Panel& panel = panels_[i];
        if (panel.begin * kLanes >= (group + 1) * kRows || panel.end * kLanes <= group * kRows) {
          continue;
        }
        if (end == 0) begin = panel.row;
        end = panel.row + panel.count;
      }
      row_begin_[group] = begin;
      row_end_[group] = end;
    }
  }

  // sums[key] += sum over rows of weights[row][key] rows[row].
  void add_of_keys(const Tile& tile, const float* weights, const float* rows, int64_t stride,
                   float* sums) {
    for (int64_t d = 0; d < stride; d += kPanel) {
      const int columns = static_cast<int>(smaller(stride - d, kPanel) / kLanes);
      for (int64_t group = 0; group * kRows < tile.count; ++group) {
        const int64_t key = group * kRows, end = row_end_[group];
        const int count = static_cast<int>(smaller(kRows, tile.count - key));
        float* c = sums + key * stride + d;
        for (int64_t row = row_begin_[group]; row < end; row += kSumRows) {
          const int64_t depth = smaller(kSumRows, end - row);
          const float* a = weights + row * kScoreStride + key;
          const float* b = rows + row * stride + d;
          if (finite_rows_) {
            multiplier<float, 0, true>(count, columns)(a, kScoreStride, b, stride, c, stride, kOnes,
                                                       depth);
          } else {
            add_carefully(a, 1, kScoreStride, count, b, stride, c, columns, depth);
          }
        }
      }
    }
  }

  const AttentionBackward& backward_;
  Room& room_;
  bool finite_rows_ = true;
  int num_panels_ = 0;
  Panel panels_[kMostPanels];
  int64_t row_begin_[kKeyGroups], row_end_[kKeyGroups];
};

// dk and dv of a part of the keys, and its part of dq.
template <class Element>
void differentiate_part(const AttentionBackward& call, const Task& part, const PartialDq& dq) {
  const AttentionForward& forward = call.forward;
  const Sequence sequence(forward, part.sequence);
  Room room(forward);
  const int64_t step = Room::step(forward);
  const auto write = [&](const float* sums, int64_t stride, int64_t dim, float factor,
                         const Strided& to, int64_t first, int64_t count) {
    Element* rows = static_cast<Element*>(to.data) + part.kv_head * to.head +
                    (forward.q_bounds ? 0 : part.sequence * to.batch) +
                    (sequence.kv_start + first) * to.token;
    for (int64_t j = 0; j < count; ++j) narrow(sums + j * stride, dim, factor, rows + j * to.token);
  };
  for (int64_t first = part.kv_begin; first < part.kv_end; first += kTileKeys) {
    const int64_t visible = smaller(part.kv_end, sequence.limit);
    Tile tile{first, smaller(kTileKeys, visible - first), 0, 0, Sight::kPartial, false};
    clear(room.dk, kTileKeys * room.k_stride);
    clear(room.dv, kTileKeys * room.v_stride);
    for (int64_t begin = 0; tile.count > 0 && begin < sequence.q_len; begin += step) {
      Task chunk = part;
      chunk.q_begin = begin;
      chunk.q_end = smaller(begin + step, sequence.q_len);
      int64_t low = first, high = first + tile.count;
      seen_by_all(forward, sequence, chunk.q_begin, chunk.q_end).clip(&low, &high);
      if (low == high) continue;
      Chunk<Element>(call, chunk, room)
          .visit(tile, dq.rows(part.part, part.kv_head, part.sequence, begin));
    }
    const int64_t count = smaller(kTileKeys, part.kv_end - first);
    write(room.dk, room.k_stride, forward.head_dim, unit_of(forward), call.dk, first, count);
    write(room.dv, room.v_stride, forward.value_dim, 1, call.dv, first, count);
  }
}

// Adds up the parts of dq for the heads of one KV head of one sequence.
template <class Element>
void finish_dq(const AttentionBackward& call, const PartialDq& dq, int64_t index) {
  const AttentionForward& forward = call.forward;
  const int64_t which = index / forward.kv_heads, kv_head = index % forward.kv_heads;
  const Sequence sequence(forward, which);
  const int64_t parts = PartialDq::num_parts(sequence);
  const float factor = unit_of(forward) * query_factor(forward);
  for (int64_t r = 0; r < sequence.q_len * dq.group; ++r) {
    float* sums = dq.rows(0, kv_head, which, 0) + r * dq.stride;
    for (int64_t part = 1; part < parts; ++part) {
      const float* other = dq.rows(part, kv_head, which, 0) + r * dq.stride;
      for (int64_t d = 0; d < dq.stride; d += kLanes) {
        store(sums + d, load(sums + d) + load(other + d));
      }
    }
    Element* to = static_cast<Element*>(call.dq.data) +
                  (forward.q_bounds ? 0 : which * call.dq.batch) +
                  (kv_head * dq.group + r % dq.group) * call.dq.head +
                  (sequence.q_start + r / dq.group) * call.dq.token;
    narrow(sums, forward.head_dim, factor, to);
  }
}

template <class Element>
void run(const AttentionBackward& call, const Plan& plan, const PartialDq& dq) {
  const AttentionForward& forward = call.forward;
  auto differentiate = [&](int64_t i) { differentiate_part<Element>(call, plan.tasks[i], dq); };
  run_tasks(forward.num_threads, plan.num_tasks, differentiate);
  auto finish = [&](int64_t i) { finish_dq<Element>(call, dq, i); };
  run_tasks(forward.num_threads, forward.batch * forward.kv_heads, finish);
}

}  // namespace

bool attention_backward(const AttentionBackward& call) {
  const PartialDq dq(call.forward);
  if (!dq.sums) return false;
  Plan* plan = plan_backward(call.forward);
  switch (call.forward.element) {
    case ElementType::kFloat32: run<float>(call, *plan, dq); break;
    case ElementType::kBFloat16: run<BFloat16>(call, *plan, dq); break;
    case ElementType::kFloat16: run<Float16>(call, *plan, dq); break;
  }
  free_plan(plan);
  return true;
}

}  // namespace foveal::FOVEAL_ISA
