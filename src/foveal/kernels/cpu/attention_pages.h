// Keys and values in pages: what a call says of them, and how its tables are put in order before the
// kernels read them. The binding (paged.py) fills `Pages` field by field.
#pragma once

#include <cstdint>

#include "attention.h"

namespace foveal {

// As foveal.kv.formats stores elements.
enum class Storage : int64_t { kFloat32, kBFloat16, kFloat16, kInt8, kInt4 };

// Codes [kv_heads][pages][page_size] rows; float32 scales and lows [kv_heads][pages] of each token or
// channel, side by side.
struct Paged {
  const void* codes;
  int64_t head, page, token;  // bytes
  const float* scale;         // null for floats
  const float* low;           // of int4
  int64_t scale_head, scale_page;
  int64_t per_channel;
  Storage storage;
};

struct Pages {
  Paged keys, values;
  const int64_t* table;    // [batch][columns] page numbers, -1 for none
  const int64_t* starts;   // [batch][columns] the position in a page's first slot
  const int64_t* lengths;  // [batch] there is nothing at positions from here on
  int64_t columns, page_size;
  int64_t first, last;  // keys at other positions are hidden
};

// Computes a call whose keys and values are these pages; its own k, v, positions and lengths of keys
// do not matter.
void attend_pages(const AttentionForward& call, const Pages& pages,
                  void (*forward)(const AttentionForward&));

}  // namespace foveal
