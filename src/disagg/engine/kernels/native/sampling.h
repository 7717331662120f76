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

int64_t draw_token(const Kernels& kernels, const void* logits, int64_t width, const Drawing& drawing);

}  // namespace disagg
