// Keys and values in pages, read as they are stored: no tile of them is gathered or widened as a
// whole where the queries are few, and only into the tile that is packed where they are many.
//
// Codes are widened in registers, and scales never meet them. The scale of a token is applied to its
// score (keys) or to its weight (values), that of a channel to the queries or to the sum:
//
//     q . (c s + b 1) = s (q . c) + b sum(q)        q . (s * c + b) = (q * s) . c + q . b
//
// A row of int4 holds element i and element i + D/2 in one byte; it is read as two rows, of its lower
// and of its upper bits.
#pragma once

#include <initializer_list>

#include "attention_pages.h"
#include "attention_plan.h"
#include "pack.h"
#include "visibility.h"

namespace foveal::FOVEAL_ISA {

// The products with rows of one kind; strides in elements.
struct RowKernels {
  void (*widen)(const void* x, int64_t count, float* wide);
  void (*dot)(const float* q, ptrdiff_t q_stride, int rows, const void* k, ptrdiff_t k_stride,
              int64_t count, float* s, ptrdiff_t s_stride, int64_t depth, ptrdiff_t ahead);
  void (*multiply)(int rows, int columns, const float* p, ptrdiff_t p_stride, const void* v,
                   ptrdiff_t v_stride, float* out, ptrdiff_t out_stride, const float* factor,
                   int64_t depth);
  int64_t bytes;  // of an element
};

template <class Stored>
inline constexpr RowKernels kRowKernels = {
    [](const void* x, int64_t count, float* wide) {
      widen(static_cast<const Stored*>(x), count, 1, round_up(count, kLanes), wide);
    },
    [](const float* q, ptrdiff_t q_stride, int rows, const void* k, ptrdiff_t k_stride,
       int64_t count, float* s, ptrdiff_t s_stride, int64_t depth, ptrdiff_t ahead) {
      dot<(sizeof(Stored) > 1)>(q, q_stride, rows, static_cast<const Stored*>(k), k_stride, count, s,
                                s_stride, depth, ahead);
    },
    [](int rows, int columns, const float* p, ptrdiff_t p_stride, const void* v,
       ptrdiff_t v_stride, float* out, ptrdiff_t out_stride, const float* factor, int64_t depth) {
      multiplier<Stored>(rows, columns)(
          p, p_stride, static_cast<const Stored*>(v), v_stride, out, out_stride, factor, depth);
    },
    sizeof(Stored),
};

// The keys, or the values, of one sequence and KV head.
class PagedRows {
 public:
  PagedRows(const Pages& pages, const Paged& x, int64_t sequence, int64_t head, int64_t dim)
      : x_(x),
        table_(pages.table + sequence * pages.columns),
        page_size_(pages.page_size),
        num_rows_(pages.columns * pages.page_size),
        dim_(dim),
        codes_(static_cast<const char*>(x.codes) + head * x.head),
        scale_(x.scale ? x.scale + head * x.scale_head : nullptr),
        low_(x.low ? x.low + head * x.scale_head : nullptr) {
    switch (x.storage) {
      case Storage::kFloat32: halves_[0] = &kRowKernels<float>; break;
      case Storage::kBFloat16: halves_[0] = &kRowKernels<BFloat16>; break;
      case Storage::kFloat16: halves_[0] = &kRowKernels<Float16>; break;
      case Storage::kInt8: halves_[0] = &kRowKernels<Int8>; break;
      case Storage::kInt4:
        halves_[0] = &kRowKernels<LowBits>;
        halves_[1] = &kRowKernels<HighBits>;
        num_halves_ = 2;
    }
  }

  // Whether the products can read rows where they lie.
  static bool in_place(const Pages& pages, const Paged& x, int64_t dim) {
    const int64_t part = x.storage == Storage::kInt4 ? dim / 2 : dim;
    return part % kLanes == 0 && pages.page_size % kLanes == 0;
  }

  // Rows [first, first + count) in float32, each with room for a whole number of vectors and, of
  // int4, one more.
  void widen_rows(int64_t first, int64_t count, float* to, ptrdiff_t stride) const {
    for (const Run& run : Runs(*this, first, first + count)) {
      for (int64_t j = 0; j < run.count; ++j, to += stride) {
        for (int h = 0; h < num_halves_; ++h) {
          halves_[h]->widen(run.codes + j * x_.token, half(), to + h * half());
        }
        if (!x_.scale) continue;
        for (int64_t d = 0; d < dim_; ++d) {
          const int64_t at = x_.per_channel ? d : j;
          to[d] = to[d] * run.scale[at] + (low_ ? run.low[at] : 0);
        }
      }
    }
  }

  // S[rows][first .. last), in place. `room` is for rows * (q_stride + kTileKeys) floats.
  void score(const float* q, ptrdiff_t q_stride, int rows, int64_t first, int64_t last, float* s,
             ptrdiff_t s_stride, float* room) const {
    float whole[kRows] = {};
    if (low_ && !x_.per_channel) {
      for (int r = 0; r < rows; ++r) whole[r] = sum_of(q + r * q_stride, nullptr);
    }
    float* second = room + rows * q_stride;
    for (const Run& run : Runs(*this, first, last)) {
      float* to = s + run.first - first;
      const float* x = x_.per_channel ? fold(q, q_stride, rows, run, room, whole) : q;
      if (halves_[0]->bytes == 1) ask_ahead(run, 0, x_.token);
      dot(0, x, q_stride, rows, run, to, s_stride);
      if (num_halves_ == 2) {
        dot(1, x + half(), q_stride, rows, run, second, kTileKeys);
        add(rows, run.count, second, kTileKeys, to, s_stride);
      }
      if (x_.scale) apply(rows, run, whole, to, s_stride);
    }
  }

  // OUT[rows][dim] = OUT * factor + P[rows][first .. last) rows, in place; P is overwritten.
  // `room` is for rows * (out_stride + 1) floats.
  void weigh(float* p, ptrdiff_t p_stride, int rows, int64_t first, int64_t last, float* out,
             ptrdiff_t out_stride, const float* factor, float* room) const {
    static constexpr float kOnes[kRows] = {1, 1, 1, 1, 1, 1};
    float whole[kRows] = {};
    for (const Run& run : Runs(*this, first, last)) {
      float* weights = p + run.first - first;
      if (x_.per_channel) {
        multiply(weights, p_stride, rows, run, room, out_stride, nullptr);
        unfold(weights, p_stride, rows, run, room, out, out_stride, factor);
      } else {
        if (x_.scale) absorb(weights, p_stride, rows, run, whole);
        multiply(weights, p_stride, rows, run, out, out_stride, factor);
      }
      factor = kOnes;
    }
    if (low_ && !x_.per_channel) {
      for (int r = 0; r < rows; ++r) {
        float* to = out + r * out_stride;
        for (int64_t d = 0; d < dim_; d += kLanes) store(to + d, load(to + d) + whole[r]);
      }
    }
  }

 private:
  // Neighbouring rows of one page, not more than what is asked for ahead.
  struct Run {
    int64_t first, count;
    const char* codes;
    const float *scale, *low;
    const char* ahead;  // rows that are read a little later
  };

  // Asks for as many rows of what comes later: `bytes` of each from `first` on.
  void ask_ahead(const Run& run, int64_t first, int64_t bytes) const {
    for (int64_t j = 0; j < run.count; ++j) {
      const char* row = run.ahead + j * x_.token + first;
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
    }
  }

  class Runs {
   public:
    Runs(const PagedRows& rows, int64_t first, int64_t last)
        : rows_(rows), first_(first), last_(last) {}
    struct Iterator {
      const PagedRows& rows;
      int64_t first, last;
      Run operator*() const { return rows.run(first, last); }
      void operator++() {
        first += rows.count_of(first, last);
      }
      bool operator!=(const Iterator& other) const { return first != other.first; }
    };
    Iterator begin() const { return {rows_, first_, last_}; }
    Iterator end() const { return {rows_, last_, last_}; }

   private:
    const PagedRows& rows_;
    const int64_t first_, last_;
  };

  int64_t half() const { return dim_ / num_halves_; }

  const char* row(int64_t index) const {
    return codes_ + table_[index / page_size_] * x_.page + index % page_size_ * x_.token;
  }

  int64_t count_of(int64_t first, int64_t last) const {
    const int64_t left = smaller(last - first, page_size_ - first % page_size_);
    return smaller(left, kAheadRows - first % page_size_ % kAheadRows);
  }

  // Where the scales begin that rows from here on have.
  int64_t scales_of(int64_t index) const {
    return table_[index / page_size_] * x_.scale_page +
           (x_.per_channel ? 0 : index % page_size_);
  }

  Run run(int64_t first, int64_t last) const {
    const int64_t count = count_of(first, last);
    const int64_t later = smaller(first + kAheadRows, num_rows_ - 1);
    if (!x_.scale) return {first, count, row(first), nullptr, nullptr, row(later)};
    const int64_t scales = scales_of(first), size = x_.per_channel ? dim_ : count;
    for (const float* list : {scale_, low_}) {
      const char* next = reinterpret_cast<const char*>(list + (list ? scales_of(later) : 0));
      for (int64_t i = 0; list && i < size * 4; i += 64) __builtin_prefetch(next + i, 0, 2);
    }
    return {first, count, row(first), scale_ + scales, low_ ? low_ + scales : nullptr, row(later)};
  }

  void dot(int which, const float* q, ptrdiff_t q_stride, int rows, const Run& run, float* s,
           ptrdiff_t s_stride) const {
    const RowKernels& kernels = *halves_[which];
    kernels.dot(q, q_stride, rows, run.codes, x_.token / kernels.bytes, run.count, s, s_stride,
                half(), (run.ahead - run.codes) / kernels.bytes);
  }

  static void add(int rows, int64_t count, const float* x, ptrdiff_t x_stride, float* to,
                  ptrdiff_t stride) {
    for (int r = 0; r < rows; ++r, x += x_stride, to += stride) {
      for (int64_t j = 0; j < count; j += kLanes) store(to + j, load(to + j) + load(x + j));
    }
  }

  float sum_of(const float* x, const float* factor) const {
    F32 total = {};
    for (int64_t d = 0; d < dim_; d += kLanes) {
      total += factor ? load(x + d) * load(factor + d) : load(x + d);
    }
    return sum(total);
  }

  // The queries times the scales of the run's channels, and their products with the lows.
  const float* fold(const float* q, ptrdiff_t q_stride, int rows, const Run& run, float* folded,
                    float* whole) const {
    for (int r = 0; r < rows; ++r) {
      const float* x = q + r * q_stride;
      for (int64_t d = 0; d < dim_; d += kLanes) {
        store(folded + r * q_stride + d, load(x + d) * load(run.scale + d));
      }
      if (low_) whole[r] = sum_of(x, run.low);
    }
    return folded;
  }

  // From products with codes to scores.
  void apply(int rows, const Run& run, const float* whole, float* s, ptrdiff_t stride) const {
    for (int r = 0; r < rows; ++r, s += stride) {
      for (int64_t j = 0; j < run.count; j += kLanes) {
        F32 x = load(s + j);
        if (x_.per_channel) {
          x += whole[r];
        } else {
          x *= load(run.scale + j);
          if (low_) x += load(run.low + j) * whole[r];
        }
        store(s + j, x);
      }
    }
  }

  // Weights times the scales of their tokens; the weighted sum of the lows is added to `whole`.
  void absorb(float* p, ptrdiff_t stride, int rows, const Run& run, float* whole) const {
    for (int r = 0; r < rows; ++r, p += stride) {
      F32 total = {};
      int64_t j = 0;
      for (; j + kLanes <= run.count; j += kLanes) {
        if (low_) total += load(p + j) * load(run.low + j);
        store(p + j, load(p + j) * load(run.scale + j));
      }
      for (; j < run.count; ++j) {
        if (low_) total[0] += p[j] * run.low[j];
        p[j] *= run.scale[j];
      }
      if (low_) whole[r] += sum(total);
    }
  }

  void multiply(const float* p, ptrdiff_t p_stride, int rows, const Run& run, float* out,
                ptrdiff_t out_stride, const float* factor) const {
    for (int h = 0; h < num_halves_; ++h) {
      const RowKernels& kernels = *halves_[h];
      for (int64_t d = 0; d < half(); d += kPanel) {
        const int columns = static_cast<int>(smaller(kColumns, (half() - d) / kLanes));
        if (h == 0) ask_ahead(run, d * kernels.bytes, columns * kLanes * kernels.bytes);
        kernels.multiply(rows, columns, p, p_stride, run.codes + d * kernels.bytes,
                         x_.token / kernels.bytes, out + h * half() + d, out_stride, factor,
                         run.count);
      }
    }
  }

  void unfold(const float* p, ptrdiff_t p_stride, int rows, const Run& run, const float* sums,
              float* out, ptrdiff_t stride, const float* factor) const {
    for (int r = 0; r < rows; ++r, p += p_stride, out += stride, sums += stride) {
      float weight = 0;
      if (low_) {
        for (int64_t j = 0; j < run.count; ++j) weight += p[j];
      }
      for (int64_t d = 0; d < dim_; d += kLanes) {
        const F32 mine = load(sums + d) * load(run.scale + d);
        const F32 more = low_ ? mine + load(run.low + d) * weight : mine;
        store(out + d, load(out + d) * factor[r] + more);
      }
    }
  }

  const Paged& x_;
  const int64_t* table_;
  const int64_t page_size_, num_rows_, dim_;
  const char* codes_;
  const float *scale_, *low_;
  const RowKernels* halves_[2] = {};
  int num_halves_ = 1;
};

}  // namespace foveal::FOVEAL_ISA
