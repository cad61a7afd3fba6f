#include "attention_pages.h"

#include <memory>
#include <vector>

#include "visibility.h"

namespace foveal {
namespace {

// The pages that hold anything visible, sequence by sequence. Sequences whose pages are in order and
// without a gap keep default positions, the others get one for each slot.
struct LaidOut {
  std::vector<int64_t> table, lengths;
  std::vector<uint8_t> in_order;
  std::unique_ptr<int64_t[]> positions;
  int64_t columns = 0;

  LaidOut(const Pages& pages, int64_t batch) : lengths(batch), in_order(batch) {
    std::vector<std::vector<int64_t>> used(batch);
    bool ordered = true;
    for (int64_t row = 0; row < batch; ++row) {
      used[row] = columns_in_use(pages, row);
      columns = larger(columns, static_cast<int64_t>(used[row].size()));
      in_order[row] = is_ordered(pages, row, used[row]);
      ordered &= in_order[row];
    }
    const int64_t slots = columns * pages.page_size;
    if (!ordered) positions.reset(new int64_t[batch * slots]);
    table.resize(batch * columns);
    for (int64_t row = 0; row < batch; ++row) {
      const int64_t count = static_cast<int64_t>(used[row].size());
      for (int64_t i = 0; i < count; ++i) {
        table[row * columns + i] = pages.table[row * pages.columns + used[row][i]];
      }
      lengths[row] = count * pages.page_size;
      if (in_order[row]) {
        lengths[row] = smaller(lengths[row], end_of(pages, row));
      } else {
        locate(pages, row, used[row], positions.get() + row * slots);
      }
    }
  }

 private:
  static int64_t end_of(const Pages& pages, int64_t row) {
    return smaller(pages.lengths[row], pages.last);
  }

  static std::vector<int64_t> columns_in_use(const Pages& pages, int64_t row) {
    std::vector<int64_t> used;
    for (int64_t i = 0; i < pages.columns; ++i) {
      const int64_t at = row * pages.columns + i;
      const int64_t start = pages.starts[at];
      const bool seen = start < end_of(pages, row) && start + pages.page_size > pages.first;
      if (pages.table[at] >= 0 && seen) used.push_back(i);
    }
    return used;
  }

  static bool is_ordered(const Pages& pages, int64_t row, const std::vector<int64_t>& used) {
    if (pages.first > 0) return false;
    int64_t expected = 0;
    for (const int64_t column : used) {
      if (pages.starts[row * pages.columns + column] != expected) return false;
      expected += pages.page_size;
    }
    return true;
  }

  static void locate(const Pages& pages, int64_t row, const std::vector<int64_t>& used,
                     int64_t* positions) {
    const int64_t end = end_of(pages, row);
    for (const int64_t column : used) {
      const int64_t start = pages.starts[row * pages.columns + column];
      for (int64_t i = 0; i < pages.page_size; ++i) {
        const int64_t at = start + i;
        *positions++ = at >= pages.first && at < end ? at : -1;
      }
    }
  }
};

}  // namespace

void attend_pages(const AttentionForward& call, const Pages& pages,
                  void (*forward)(const AttentionForward&)) {
  const LaidOut laid_out(pages, call.batch);
  Pages mine = pages;
  mine.table = laid_out.table.data();
  mine.columns = laid_out.columns;
  AttentionForward whole = call;
  whole.pages = &mine;
  whole.in_order = laid_out.in_order.data();
  whole.kv_len = laid_out.columns * pages.page_size;
  whole.kv_positions = {laid_out.positions.get(), whole.kv_len};
  whole.kv_lengths = laid_out.lengths.data();
  forward(whole);
}

}  // namespace foveal
