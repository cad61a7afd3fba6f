// Linear layers with narrow weights (linear.h), for one instruction set.
//
// One loop does all: it holds the sums of some rows and channels in registers and adds
// x[k] * w[k] for k = 0, 1, 2 ... Every sum is taken in this order, from the bias on, whatever the
// number of rows, their neighbours or the threads: a row alone equals the row in a batch.
//
// Few rows read the weights as they are stored, once: the limit is the memory. For many, each
// thread widens some panels to float32 in its own scratch, small enough for its second-level cache,
// and multiplies all rows by them: the limit is the multipliers (Goto and van de Geijn 2008).
#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "kernels.h"
#include "panels.h"
#include "scratch.h"
#include "threads.h"

namespace foveal {
namespace FOVEAL_ISA {

namespace {

// Rows of a slab: as many as have their sums in registers beside two vectors of weights.
constexpr int kSlab = kRegisters == 32 ? 12 : 6;
// Rows computed at once: their packed copy is read from a cache for every few panels.
constexpr int64_t kChunk = 64 * kSlab;
// Inputs and panels that are widened at once: 256 KiB.
constexpr int64_t kDepth = 512, kWidth = 4;
// Rows from which on widening pays.
constexpr int64_t kMany = 2 * kSlab + 1;
// Weights worth a task of their own.
constexpr int64_t kTask = 1 << 14;

// Sums of some rows and channels: where they begin and where they go.
struct Tile {
  const float* start;  // null: from zero
  int64_t start_stride;
  float* y;
  int64_t y_stride;
  int64_t rows, channels;  // that exist, counted from the first row and the first panel
};

// One vector of sums; `left` of its channels exist.
F32 load_sums(const float* p, int64_t left) {
  return left >= kLanes ? load(p) : left > 0 ? load_some(p, static_cast<int>(left)) : F32{};
}
void store_sums(float* p, F32 x, int64_t left) {
  if (left >= kLanes) {
    store(p, x);
  } else if (left > 0) {
    store_some(p, x, static_cast<int>(left));
  }
}

template <class Reader, int... kAt>
auto read_pairs(const Linear& weights, int64_t pair, std::integer_sequence<int, kAt...>) {
  return std::array<Reader, sizeof...(kAt)>{Reader(weights, pair + kAt)...};
}

// kRows rows, of which x[k * kRows + row] is an input, by the kWide pairs from `pair` on.
template <class Reader, int kRows, int kWide>
void multiply(const Linear& weights, int64_t pair, const float* x, const Tile& tile) {
  F32 sums[kRows][kWide][2];
  const auto each = [&](auto visit) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t at = (pair + j) / kPairs * kWeightPanel + (pair + j) % kPairs * kLanes +
                           half * kHalf;
#pragma GCC unroll 12
        for (int row = 0; row < kRows; ++row) {
          if (row < tile.rows) visit(row, sums[row][j][half], at, tile.channels - at);
        }
      }
    }
  };
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) sums[row][j][0] = sums[row][j][1] = F32{};
  }
  if (tile.start) {
    each([&](int row, F32& sum, int64_t at, int64_t left) {
      sum = load_sums(tile.start + row * tile.start_stride + at, left);
    });
  }
  auto readers = read_pairs<Reader>(weights, pair, std::make_integer_sequence<int, kWide>());
  for (int64_t k = 0; k < weights.inputs;) {
    const int64_t group = k / weights.group;
    const int64_t end = std::min(weights.inputs, (group + 1) * weights.group);
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) readers[j].enter(group);
    for (; k < end; ++k) {
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) {
        const Pair w = readers[j](k);
#pragma GCC unroll 12
        for (int row = 0; row < kRows; ++row) {
          const F32 input = splat(x[k * kRows + row]);
          sums[row][j][0] += w.first * input;
          sums[row][j][1] += w.second * input;
        }
      }
    }
  }
  each([&](int row, F32& sum, int64_t at, int64_t left) {
    store_sums(tile.y + row * tile.y_stride + at, sum, left);
  });
}

// Pairs from `pair` up to `end`, as many at once as there are registers for.
template <class Reader, int kRows, int kWide = std::clamp(kRegisters / 4 / kRows, 1, 4)>
void sweep(const Linear& weights, int64_t pair, int64_t end, const float* x, const Tile& tile) {
  for (; pair + kWide <= end; pair += kWide) multiply<Reader, kRows, kWide>(weights, pair, x, tile);
  if constexpr (kWide > 1) sweep<Reader, kRows, kWide / 2>(weights, pair, end, x, tile);
}

// The rows for which there is a loop: at least those of the slab.
int padded(int64_t rows) {
  for (int size : {1, 2, 4, 8}) {
    if (rows <= size && size < kSlab) return size;
  }
  return kSlab;
}

// Packed rows, kSlab at a time: [slab][input][row of the slab], the last slab with fewer.
struct Rows {
  const float* packed;
  int64_t count, inputs;
};

template <class Reader>
void sweep_slab(const Linear& weights, int64_t pair, int64_t end, int rows, const float* x,
                const Tile& tile) {
  switch (padded(rows)) {
    case 1: return sweep<Reader, 1>(weights, pair, end, x, tile);
    case 2: return sweep<Reader, 2>(weights, pair, end, x, tile);
    case 4: return sweep<Reader, 4>(weights, pair, end, x, tile);
    case 8: return sweep<Reader, kSlab < 8 ? 4 : 8>(weights, pair, end, x, tile);
    default: return sweep<Reader, kSlab>(weights, pair, end, x, tile);
  }
}

// All rows by `panels` panels of weights, which hold the inputs from `first` on.
template <class Reader>
void sweep_rows(const Linear& weights, int64_t panel, int64_t panels, const Rows& rows,
                int64_t first, Tile tile) {
  for (int64_t row = 0; row < rows.count; row += kSlab) {
    tile.rows = std::min<int64_t>(kSlab, rows.count - row);
    const int size = padded(tile.rows);
    const float* x = rows.packed + row * rows.inputs + first * size;
    sweep_slab<Reader>(weights, panel * kPairs, (panel + panels) * kPairs, size, x, tile);
    tile.y += kSlab * tile.y_stride;
    if (tile.start) tile.start += kSlab * tile.start_stride;
  }
}

// Inputs first up to last of a panel, as float32.
template <class Reader>
void widen(const Linear& linear, int64_t panel, int64_t first, int64_t last, float* wide) {
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    Reader reader(linear, panel * kPairs + pair);
    float* to = wide + pair * kLanes;
    for (int64_t k = first; k < last;) {
      const int64_t end = std::min(last, (k / linear.group + 1) * linear.group);
      reader.enter(k / linear.group);
      for (; k < end; ++k, to += kWeightPanel) {
        const Pair w = reader(k);
        store(to, w.first);
        store(to + kHalf, w.second);
      }
    }
  }
}

// All rows by a few panels, which are widened first.
template <class Reader>
void multiply_many(const Linear& linear, int64_t panel, int64_t panels, const Rows& rows,
                   Tile tile) {
  const int64_t channel = panel * kWeightPanel;
  if (tile.start) tile.start += channel;
  tile.y += channel;
  tile.channels -= channel;
  Scratch scratch(kDepth * kWidth * kWeightPanel);
  float* wide = scratch.take<float>(kDepth * kWidth * kWeightPanel);
  for (int64_t first = 0; first < linear.inputs; first += kDepth) {
    const int64_t depth = std::min(kDepth, linear.inputs - first);
    for (int64_t i = 0; i < panels; ++i) {
      widen<Reader>(linear, panel + i, first, first + depth, wide + i * depth * kWeightPanel);
    }
    const Linear part{WeightFormat::kFloat32, panels * kWeightPanel, depth, depth, wide,
                      nullptr,                nullptr,               nullptr};
    if (first) tile.start = tile.y, tile.start_stride = tile.y_stride;
    sweep_rows<Float32Reader>(part, 0, panels, rows, first, tile);
  }
}

// Rows of x side by side, as many as the loop takes; zeros for those that do not exist.
void pack(const Activations& in, int64_t first, int64_t inputs, float* packed) {
  const int64_t rows = std::min<int64_t>(kSlab, in.rows - first);
  const int size = padded(rows);
  for (int row = 0; row < size; ++row) {
    const float* from = in.x + (first + row) * in.stride;
    for (int64_t k = 0; k < inputs; ++k) packed[k * size + row] = row < rows ? from[k] : 0.0f;
  }
}

// At most kChunk rows.
template <class Reader>
void multiply_rows(const Linear& linear, const Activations& in, const float* packed,
                   int64_t num_threads) {
  const int64_t panels = (linear.outputs + kWeightPanel - 1) / kWeightPanel;
  const bool many = in.rows >= kMany;
  const int64_t useful = panels * kWeightPanel * linear.inputs / kTask * in.rows + 1;
  int64_t tasks = std::min({panels, useful, 4 * num_threads});
  if (many) {
    tasks = (panels + kWidth - 1) / kWidth;
    tasks = std::min(panels, (tasks + num_threads - 1) / num_threads * num_threads);
  }
  const Rows rows{packed, in.rows, linear.inputs};
  auto work = [&](int64_t task) {
    const int64_t panel = task * panels / tasks, end = (task + 1) * panels / tasks;
    const Tile tile{linear.bias, 0, in.y, linear.outputs, 0, linear.outputs};
    if (many) {
      multiply_many<Reader>(linear, panel, end - panel, rows, tile);
    } else {
      sweep_rows<Reader>(linear, panel, end - panel, rows, 0, tile);
    }
  };
  run_tasks(num_threads, tasks, work);
}

template <class Reader>
void multiply_all(const Linear& linear, const Activations& in, int64_t num_threads) {
  if (in.rows == 1) return multiply_rows<Reader>(linear, in, in.x, num_threads);
  const int64_t slabs = (std::min(in.rows, kChunk) + kSlab - 1) / kSlab;
  const std::unique_ptr<float[]> packed(new float[slabs * kSlab * linear.inputs]);
  for (int64_t row = 0; row < in.rows; row += kChunk) {
    const Activations part{in.x + row * in.stride, std::min(kChunk, in.rows - row), in.stride,
                           in.y + row * linear.outputs};
    auto work = [&](int64_t slab) {
      pack(part, slab * kSlab, linear.inputs, packed.get() + slab * kSlab * linear.inputs);
    };
    run_tasks(num_threads, (part.rows + kSlab - 1) / kSlab, work);
    multiply_rows<Reader>(linear, part, packed.get(), num_threads);
  }
}

}  // namespace

void linear(const Linear& linear, const Activations& in, int64_t num_threads) {
  switch (linear.format) {
    case WeightFormat::kFloat32: return multiply_all<Float32Reader>(linear, in, num_threads);
    case WeightFormat::kBFloat16: return multiply_all<BFloat16Reader>(linear, in, num_threads);
    case WeightFormat::kFloat16: return multiply_all<Float16Reader>(linear, in, num_threads);
    case WeightFormat::kInt8: return multiply_all<Int8Reader>(linear, in, num_threads);
    case WeightFormat::kInt4: return multiply_all<Int4Reader>(linear, in, num_threads);
  }
}

}  // namespace FOVEAL_ISA
}  // namespace foveal
