// Who sees whom: the rules of foveal.attention.mask for positions, in integers.
//
// A key at position k is visible to a query at position q if
//     (k <= q or not causal) and (k < sinks or q - left <= k <= q + right and q, k in one chunk)
// and neither is a pad. Where keys are at their default positions 0, 1, 2 ..., what a query sees is
// the sinks and one range of key indices (Seen), and no key need be looked at.
//
// Everything here has internal linkage: it is compiled into each instruction set's kernels.
#pragma once

#include <cstdint>

#include "attention.h"

namespace foveal {
namespace {

constexpr int64_t kFar = int64_t{1} << 62;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
inline int64_t divide_down(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// Keys [0, sinks) and [begin, end), with sinks <= begin; nothing where both are empty.
struct Seen {
  int64_t sinks, begin, end;

  bool nothing() const { return sinks == 0 && begin >= end; }
  bool all_of(int64_t first, int64_t last) const {
    return last <= sinks || (first >= begin && last <= end);
  }
  // The bounding range of what is seen among keys [first, last); empty if nothing is.
  void clip(int64_t* first, int64_t* last) const {
    const bool some_sinks = *first < sinks, some_range = *first < end && *last > begin;
    const int64_t low = some_sinks ? *first : larger(*first, begin);
    const int64_t high = some_range ? smaller(*last, end) : smaller(*last, sinks);
    *first = low;
    *last = some_sinks || some_range ? larger(low, high) : low;
  }
  void include(const Seen& other) {
    if (other.nothing()) return;
    if (nothing()) {
      *this = other;
      return;
    }
    const bool mine = begin < end, theirs = other.begin < other.end;
    sinks = larger(sinks, other.sinks);
    if (theirs) {
      begin = mine ? smaller(begin, other.begin) : other.begin;
      end = mine ? larger(end, other.end) : other.end;
    }
    join();
  }
  void join() {
    if (begin < end && begin <= sinks) {
      begin = 0;
      end = larger(end, sinks);
      sinks = 0;
    }
  }
};

// One sequence of a call: its tokens, its lengths, its positions.
struct Sequence {
  int64_t q_start, q_len, kv_start, kv_len;
  int64_t limit;  // keys from here on are hidden
  const int64_t* q_positions;
  const int64_t* kv_positions;

  Sequence(const AttentionForward& call, int64_t index)
      : q_start(call.q_bounds ? call.q_bounds[index] : 0),
        q_len(call.q_bounds ? call.q_bounds[index + 1] - q_start : call.q_len),
        kv_start(call.kv_bounds ? call.kv_bounds[index] : 0),
        kv_len(call.kv_bounds ? call.kv_bounds[index + 1] - kv_start : call.kv_len),
        limit(call.kv_lengths ? smaller(kv_len, call.kv_lengths[index]) : kv_len),
        q_positions(of(call.q_positions, index, q_start)),
        kv_positions(call.in_order && call.in_order[index]
                         ? nullptr
                         : of(call.kv_positions, index, kv_start)) {}

  int64_t q_position(int64_t i) const { return q_positions ? q_positions[i] : i + kv_len - q_len; }
  bool is_pad(int64_t i) const { return q_positions && q_positions[i] < 0; }

 private:
  static const int64_t* of(const Positions& given, int64_t index, int64_t start) {
    return given.data ? given.data + index * given.batch + start : nullptr;
  }
};

// Positions in a tile, pads left out; low > high if none is left.
struct Extent {
  int64_t low = kFar, high = -kFar;
  bool padded = false;

  void include(int64_t position, bool is_pad) {
    if (is_pad) {
      padded = true;
    } else {
      low = smaller(low, position);
      high = larger(high, position);
    }
  }
};

inline bool sees(const AttentionForward& call, int64_t q, int64_t k) {
  if (k < 0 || (call.causal && k > q)) return false;
  if (k < call.sinks) return true;
  if (call.left >= 0 && k < q - call.left) return false;
  if (call.right >= 0 && k > q + call.right) return false;
  return !call.chunk || divide_down(q, call.chunk) == divide_down(k, call.chunk);
}

// What queries from position `low` to `high` see together, of keys at default positions.
inline Seen seen_by(const AttentionForward& call, int64_t low, int64_t high, int64_t limit) {
  Seen seen{0, 0, limit};
  if (call.left >= 0) seen.begin = larger(seen.begin, low - call.left);
  if (call.right >= 0) seen.end = smaller(seen.end, high + call.right + 1);
  if (call.chunk) {
    seen.begin = larger(seen.begin, divide_down(low, call.chunk) * call.chunk);
    seen.end = smaller(seen.end, (divide_down(high, call.chunk) + 1) * call.chunk);
  }
  const int64_t visible = call.causal ? smaller(limit, high + 1) : limit;
  seen.end = smaller(seen.end, visible);
  seen.sinks = larger(0, smaller(call.sinks, visible));
  if (seen.begin >= seen.end) seen.begin = seen.end = seen.sinks;
  seen.join();
  return seen;
}

// What queries [begin, end) of a sequence may see together.
inline Seen seen_by_all(const AttentionForward& call, const Sequence& sequence, int64_t begin,
                        int64_t end) {
  if (sequence.kv_positions) return {0, 0, sequence.limit};
  if (!sequence.q_positions) {
    return seen_by(call, sequence.q_position(begin), sequence.q_position(end - 1), sequence.limit);
  }
  Seen seen{0, 0, 0};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t q = sequence.q_position(i);
    if (!sequence.is_pad(i)) seen.include(seen_by(call, q, q, sequence.limit));
  }
  return seen;
}

enum class Sight { kHidden, kPartial, kFull };

// What the queries in `q` see of the keys in `k`, at whatever positions.
inline Sight classify(const AttentionForward& call, const Extent& q, const Extent& k) {
  if (q.low > q.high || k.low > k.high || (call.causal && k.low > q.high)) return Sight::kHidden;
  const int64_t left = call.left < 0 ? kFar : call.left;
  const int64_t right = call.causal ? 0 : call.right < 0 ? kFar : call.right;
  bool outside = k.high < q.low - left || k.low > q.high + right;
  bool inside = k.low >= q.high - left && k.high <= q.low + right;
  if (call.chunk) {
    const int64_t first_q = divide_down(q.low, call.chunk);
    const int64_t last_q = divide_down(q.high, call.chunk);
    const int64_t first_k = k.low / call.chunk, last_k = k.high / call.chunk;
    outside |= last_k < first_q || first_k > last_q;
    inside &= first_q == last_q && first_q == first_k && first_k == last_k;
  }
  if (outside && k.low >= call.sinks) return Sight::kHidden;
  const bool sinks = k.high < call.sinks && (!call.causal || k.high <= q.low);
  return (inside || sinks) && !q.padded && !k.padded ? Sight::kFull : Sight::kPartial;
}

}  // namespace
}  // namespace foveal
