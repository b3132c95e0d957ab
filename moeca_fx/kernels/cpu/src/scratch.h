// Memory that a thread keeps between calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moeca {

// `take` gives at least that many floats.
class Scratch {
 public:
  float* take(int slot, int64_t floats) {
    if (slots_.size() <= static_cast<size_t>(slot)) slots_.resize(slot + 1);
    auto& room = slots_[slot];
    if (room.size() < static_cast<size_t>(floats)) room.resize(floats);
    return room.data();
  }

 private:
  std::vector<std::vector<float>> slots_;
};

// The calling thread's own; a kernel numbers its slots from 1, slot 0 is for widened weights.
inline Scratch& scratch_of_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace moeca
