#include "attention_plan.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "visibility.h"

namespace foveal {
namespace {

// Rows (queries times heads of a group) of a task at most. A task packs the keys and values that it
// reads: with fewer rows that is done more often, with more the cache holds less of the rest. Fewer
// where the threads would otherwise not find enough to share; no bit of a result depends on it.
int64_t choose_rows(const AttentionForward& call) {
  constexpr int64_t kLeast = 64, kTasksPerThread = 4;
  const int64_t group = call.heads / call.kv_heads;
  int64_t rows = call.head_dim > 128 || call.value_dim > 128 ? 256 : 512;
  for (; rows > kLeast; rows /= 2) {
    int64_t num_tasks = 0;
    for (int64_t i = 0; i < call.batch; ++i) {
      num_tasks += divide_up(Sequence(call, i).q_len * group, rows) * call.kv_heads;
    }
    if (num_tasks >= kTasksPerThread * call.num_threads) break;
  }
  return rows;
}

// With at most so many rows, keys are divided among tasks.
constexpr int64_t kFewRows = 64;

struct Cutter {
  const AttentionForward& call;
  int64_t rows;
  std::vector<Task> tasks;
  std::vector<RowSet> row_sets;

  void cut_sequence(int64_t index) {
    const Sequence sequence(call, index);
    const int64_t group = call.heads / call.kv_heads;
    const int64_t step = larger(1, rows / group);
    const bool few = sequence.q_len * group <= kFewRows;
    for (int64_t begin = 0; begin < sequence.q_len; begin += step) {
      const int64_t end = smaller(begin + step, sequence.q_len);
      cut_keys(sequence, Task{index, 0, begin, end, 0, sequence.limit, -1, 0, 0}, few);
    }
  }

  void cut_keys(const Sequence& sequence, Task task, bool few) {
    const Seen seen = seen_by_all(call, sequence, task.q_begin, task.q_end);
    const size_t first = tasks.size();
    const int64_t step = few ? kSplitKeys : larger(1, sequence.limit);
    for (int64_t begin = 0; begin < sequence.limit; begin += step) {
      task.kv_begin = begin;
      task.kv_end = smaller(begin + step, sequence.limit);
      int64_t low = task.kv_begin, high = task.kv_end;
      seen.clip(&low, &high);
      if (low == high) continue;
      task.part = static_cast<int64_t>(tasks.size() - first);
      task.cost = (task.q_end - task.q_begin) * (high - low);
      tasks.push_back(task);
    }
    if (tasks.size() == first) {  // nothing is visible, and somebody has to say so
      task.kv_begin = task.kv_end = 0;
      tasks.push_back(task);
    }
    repeat_for_heads(first, task);
  }

  // What was cut for the first KV head, for all.
  void repeat_for_heads(size_t first, const Task& task) {
    const int64_t parts = static_cast<int64_t>(tasks.size() - first);
    const int64_t rows = (task.q_end - task.q_begin) * (call.heads / call.kv_heads);
    const int64_t size = rows * (divide_up(call.value_dim, kAlign) * kAlign + 2);
    for (int64_t head = 0; head < call.kv_heads; ++head) {
      const int64_t row_set = parts > 1 ? static_cast<int64_t>(row_sets.size()) : -1;
      if (parts > 1) row_sets.push_back({nullptr, size, parts, parts});
      for (int64_t part = 0; part < parts; ++part) {
        if (head) tasks.push_back(tasks[first + part]);
        Task& mine = head ? tasks.back() : tasks[first + part];
        mine.kv_head = head;
        mine.row_set = row_set;
      }
    }
  }
};

template <class T>
T* copy(const std::vector<T>& from) {
  T* to = static_cast<T*>(std::malloc(from.size() * sizeof(T) + 1));
  std::copy(from.begin(), from.end(), to);
  return to;
}

void sort_by_cost(std::vector<Task>& tasks) {
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.cost > b.cost; });
}

// About how many pairs of queries and keys the backward pass of a task computes.
int64_t pairs_seen(const AttentionForward& call, const Sequence& sequence, const Task& task) {
  constexpr int64_t kStep = 96;
  int64_t pairs = 0;
  for (int64_t begin = 0; begin < sequence.q_len; begin += kStep) {
    const int64_t end = smaller(begin + kStep, sequence.q_len);
    int64_t low = task.kv_begin, high = task.kv_end;
    seen_by_all(call, sequence, begin, end).clip(&low, &high);
    pairs += (end - begin) * (high - low);
  }
  return pairs;
}

}  // namespace

Plan* make_plan(const AttentionForward& call) {
  Cutter cutter{call, choose_rows(call), {}, {}};
  for (int64_t i = 0; i < call.batch; ++i) cutter.cut_sequence(i);
  sort_by_cost(cutter.tasks);
  int64_t floats = 0;
  for (const RowSet& rows : cutter.row_sets) floats += rows.partial_size * rows.num_parts;
  // The partial results lie behind the list of those who share them.
  const size_t head = divide_up(cutter.row_sets.size() * sizeof(RowSet), 64) * 64;
  char* room = static_cast<char*>(std::malloc(head + floats * sizeof(float) + 1));
  float* partial = reinterpret_cast<float*>(room + head);
  for (RowSet& rows : cutter.row_sets) {
    rows.partial = partial;
    partial += rows.partial_size * rows.num_parts;
  }
  std::copy(cutter.row_sets.begin(), cutter.row_sets.end(), reinterpret_cast<RowSet*>(room));
  return new Plan{copy(cutter.tasks), static_cast<int64_t>(cutter.tasks.size()),
                  reinterpret_cast<RowSet*>(room)};
}

Plan* plan_backward(const AttentionForward& call) {
  std::vector<Task> tasks;
  for (int64_t i = 0; i < call.batch; ++i) {
    const Sequence sequence(call, i);
    Task task{i, 0, 0, sequence.q_len, 0, 0, -1, 0, 0};
    for (; task.kv_end < sequence.kv_len; ++task.part) {
      task.kv_begin = task.kv_end;
      task.kv_end = smaller(task.kv_begin + keys_of_part(sequence.kv_len), sequence.kv_len);
      task.cost = pairs_seen(call, sequence, task);
      for (task.kv_head = 0; task.kv_head < call.kv_heads; ++task.kv_head) tasks.push_back(task);
    }
  }
  sort_by_cost(tasks);
  return new Plan{copy(tasks), static_cast<int64_t>(tasks.size()), nullptr};
}

void free_plan(Plan* plan) {
  std::free(plan->tasks);
  std::free(plan->row_sets);
  delete plan;
}

}  // namespace foveal
