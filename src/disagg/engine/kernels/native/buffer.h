// Activations of one step; kept from step to step, since fresh pages cost more than what is written to them.
#pragma once

#include <cstdint>
#include <vector>

namespace disagg {

class Buffer {
 public:
  void at_least(int64_t num_bytes) {
    const auto size = static_cast<size_t>(num_bytes) / sizeof(Line) + 1;
    if (lines_.size() < size) lines_.resize(size);
  }
  char* data() { return lines_.data()->bytes; }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> lines_;
};

}  // namespace disagg
