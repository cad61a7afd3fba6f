// What a call of attention hands to the kernels. The binding (attention.py) fills the same
// structure field by field: change both, and raise the version in dispatch.cpp and library.py.
#pragma once

#include <cstdint>

namespace foveal {

// A tensor [batch, heads, tokens, channels] with contiguous channels; strides in elements.
struct Strided {
  void* data;
  int64_t batch, head, token;
};

// A tensor broadcast to [batch, heads, queries, keys]; strides in elements, 0 where it is broadcast.
struct Pairs {
  const void* data;
  int64_t batch, head, query, key;
};

// [batch, tokens], tokens contiguous; a batch stride of 0 shares one row, null means the default.
struct Positions {
  const int64_t* data;
  int64_t batch;
};

struct Pages;  // attention_pages.h

enum class ElementType : int64_t { kFloat32, kBFloat16, kFloat16 };

struct AttentionForward {
  Strided q, k, v, out;
  Strided lse;  // float32 [batch, heads, tokens]
  Pairs mask;   // bytes, 0 is hidden; null for none
  Pairs bias;   // float32, -inf hides; null for none
  Positions q_positions, kv_positions;
  const int64_t* kv_lengths;  // [batch] or null
  // Packed sequences: [batch + 1] first tokens of each; then q_len and kv_len are unused, the batch
  // strides too, and there are no lengths, mask and bias. Null for a batch of equal lengths.
  const int64_t* q_bounds;
  const int64_t* kv_bounds;
  const float* alibi;  // [heads] or null
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim;
  ElementType element;
  double scale;
  double softcap;  // 0 for none
  int64_t causal;
  int64_t left, right;  // -1 for unbounded
  int64_t chunk;        // 0 for none
  int64_t sinks;
  int64_t num_threads;
  // Set by attend_pages: pages in place of k and v, and [batch] whether a sequence has its keys at
  // default positions.
  const Pages* pages;
  const uint8_t* in_order;
  // For the backward pass, laid out as lse, or null: each row's largest score, in the kernel's own
  // unit, and the sum of the weights relative to it; -inf and 0 where nothing is visible.
  float* tops;
  float* weights;
};

// What the backward pass takes beside a call of the forward pass with its results, and what it gives.
struct AttentionBackward {
  AttentionForward forward;  // with tops and weights, laid out as lse, and no pages
  Strided d_out;
  Strided d_lse;  // float32
  Strided dq, dk, dv;
};

}  // namespace foveal
