// Memory that is read soon, fetched line by line between computations: the processor waits for neither.
#pragma once

#include <cstdint>

namespace moeca {

// Two ranges, one after the other; empty ones fetch nothing.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* first, int64_t first_bytes, const void* second, int64_t second_bytes)
      : at_(static_cast<const char*>(first)),
        end_(at_ + first_bytes),
        second_(static_cast<const char*>(second)),
        second_end_(second_ + second_bytes) {}

  void fetch() {
    if (at_ >= end_) return;
    __builtin_prefetch(at_, 0, 2);
    at_ += kLineBytes;
    if (at_ >= end_) {
      at_ = second_;
      end_ = second_end_;
      second_ = second_end_;
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;

  const char *at_ = nullptr, *end_ = nullptr, *second_ = nullptr, *second_end_ = nullptr;
};

}  // namespace moeca
