#include "scratch.h"

#include <cstdlib>

namespace foveal {
namespace {

struct Room {
  void* start = nullptr;
  size_t size = 0;
  ~Room() { std::free(start); }
};

thread_local Room room;

}  // namespace

void* thread_scratch(size_t bytes) {
  if (bytes > room.size) {
    std::free(room.start);
    room.size = (bytes + 4095) / 4096 * 4096;
    room.start = std::aligned_alloc(4096, room.size);
  }
  return room.start;
}

}  // namespace foveal
