// How a call is cut into tasks. Tiles and parts of the keys have fixed sizes, and whether keys are
// divided depends on a sequence's own shape, never on the number of threads or on its neighbours, so
// that neither changes a bit. How many queries share a task may depend on both: it changes none.
#pragma once

#include <cstdint>

#include "attention.h"
#include "visibility.h"

namespace foveal {

inline constexpr int64_t kTileKeys = 128;   // keys of a tile
inline constexpr int64_t kSplitKeys = 1024; // keys of a task, where there are few queries
inline constexpr int64_t kAlign = 16;       // floats to which rows of results are padded

// Some queries of one sequence, of all query heads of one KV head, and some keys.
struct Task {
  int64_t sequence, kv_head;
  int64_t q_begin, q_end;
  int64_t kv_begin, kv_end;
  int64_t row_set;  // of `Plan::row_sets` if other tasks have other keys of the same queries, or -1
  int64_t part;     // which of these this is
  int64_t cost;
};

// Queries whose keys are divided among several tasks. Each leaves [rows][padded value_dim] sums,
// then [rows] largest scores, then [rows] weights; whoever is last merges them, in order.
struct RowSet {
  float* partial;
  int64_t partial_size;  // floats of each part
  int64_t num_parts;
  int64_t unfinished;
};

struct Plan {
  Task* tasks;  // heaviest first
  int64_t num_tasks;
  RowSet* row_sets;
};

Plan* make_plan(const AttentionForward& call);
// Of the backward pass: every task has all queries, and a part of the keys.
Plan* plan_backward(const AttentionForward& call);
void free_plan(Plan* plan);

namespace {

// Keys of a part: there are at most four, as each has a dq of its own.
inline int64_t keys_of_part(int64_t kv_len) {
  constexpr int64_t kMostParts = 4;
  return larger(kSplitKeys, round_up(divide_up(kv_len, kMostParts), kTileKeys));
}

}  // namespace

}  // namespace foveal
