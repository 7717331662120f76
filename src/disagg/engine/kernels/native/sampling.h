// Drawing a row's next token, by the rules of sampler.py.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace disagg {

// How one row is sampled. ``floor`` is the log-probability above which a token is likely.
struct Drawing {
  double temperature;
  double top_p;
  double min_p;
  int32_t top_k;
  uint64_t key;
  float floor;
};

// What stands for a token where there is none: the row has no finite maximum, or more than its likely tokens must be
// looked at.
constexpr int64_t kNotFinite = -1;
constexpr int64_t kUndecided = -2;

// SplitMix64's key of one position of one sequence; see noise.py.
uint64_t noise_key(uint64_t seed, uint64_t position);

// Gives minus infinity to the logits of the tokens whose bits in ``allowed`` are not set.
template <class Storage>
void forbid_tokens(Storage* logits, int64_t width, const uint32_t* allowed, Storage minus_infinity) {
  for (int64_t begin = 0; begin < width; begin += 32, ++allowed) {
    const uint32_t bits = *allowed;
    if (bits == ~uint32_t{0}) continue;
    const int64_t count = width - begin < 32 ? width - begin : 32;
    for (int64_t i = 0; i < count; ++i)
      if (!(bits >> i & 1)) logits[begin + i] = minus_infinity;
  }
}

int64_t draw_token(const Kernels& kernels, const void* logits, int64_t width, const Drawing& drawing);

}  // namespace disagg
