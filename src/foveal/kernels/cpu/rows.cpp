// RMSNorm and rotary positions (rows.h), for one instruction set. A row depends on nothing beside
// it: sums over it are taken in an order that its size alone gives.
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "threads.h"
#include "vec.h"

namespace foveal {
namespace FOVEAL_ISA {

namespace {

// Elements worth a task of their own.
constexpr int64_t kTask = 1 << 14;

// Calls work(i) for every i below count, of which each touches `size` elements.
template <class Row>
void for_rows(int64_t num_threads, int64_t count, int64_t size, const Row& row) {
  const int64_t together = std::max<int64_t>(1, kTask / std::max<int64_t>(1, size));
  auto work = [&](int64_t task) {
    const int64_t end = std::min(count, (task + 1) * together);
    for (int64_t i = task * together; i < end; ++i) row(i);
  };
  run_tasks(num_threads, (count + together - 1) / together, work);
}

// Calls part(d, load, store) for every vector of elements d < size; the last may be incomplete.
template <class Part>
void for_vectors(int64_t size, const Part& part) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) {
    part(
        d, [](const float* p) { return load(p); }, [](float* p, F32 x) { store(p, x); });
  }
  if (const int left = static_cast<int>(size - d)) {
    part(
        d, [left](const float* p) { return load_some(p, left); },
        [left](float* p, F32 x) { store_some(p, x, left); });
  }
}

}  // namespace

void rms_norm(const RmsNorm& call, int64_t num_threads) {
  for_rows(num_threads, call.rows, call.size, [&](int64_t row) {
    const float* x = call.x + row * call.size;
    float* y = call.y + row * call.size;
    F32 sums[4] = {};
    for_vectors(call.size, [&](int64_t d, auto get, auto) {
      const F32 part = get(x + d);
      sums[d / kLanes % 4] += part * part;
    });
    const float square = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    const float mean = square / static_cast<float>(call.size);
    const float factor = 1.0f / std::sqrt(mean + static_cast<float>(call.eps));
    const F32 offset = splat(static_cast<float>(call.offset));
    for_vectors(call.size, [&](int64_t d, auto get, auto put) {
      put(y + d, get(x + d) * factor * (get(call.weight + d) + offset));
    });
  });
}

void rotate(const Rotate& call, int64_t num_threads) {
  const int64_t count = call.batch * call.heads * call.tokens;
  for_rows(num_threads, count, call.dim, [&](int64_t row) {
    const int64_t token = row % call.tokens, head = row / call.tokens % call.heads;
    const int64_t sequence = row / call.tokens / call.heads;
    const float* x = call.x + sequence * call.batch_stride + head * call.head_stride +
                     token * call.token_stride;
    const int64_t turn = sequence * call.turn_stride + token * call.half;
    float* y = call.y + row * call.dim;
    for_vectors(call.half, [&](int64_t d, auto get, auto put) {
      const F32 first = get(x + d), second = get(x + d + call.half);
      const F32 cos = get(call.cos + turn + d), sin = get(call.sin + turn + d);
      put(y + d, first * cos - second * sin);
      put(y + d + call.half, second * cos + first * sin);
    });
    const int64_t rest = 2 * call.half;
    std::memcpy(y + rest, x + rest, (call.dim - rest) * sizeof(float));
  });
}

}  // namespace FOVEAL_ISA
}  // namespace foveal
