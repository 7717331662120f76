// What choosing a token needs of one row of logits, in passes over a row that the second-level cache holds.
#pragma once

#include "kernel_table.h"
#include "simd.h"

namespace disagg {
namespace DISAGG_ISA {

// Call ``body(k, i)`` for the vectors that start at i = begin, begin + kLanes, ... below ``end``. k goes round from 0 to
// 3: sums that are kept apart by it do not wait for each other. Returns where the rest of less than a vector begins.
template <class Body>
DISAGG_INLINE int64_t for_each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + 4 * kLanes <= end; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) body(k, i + k * kLanes);
  for (; i + kLanes <= end; i += kLanes) body(0, i);
  return i;
}

// The largest of ``width`` logits, or infinity where one is not a number.
template <class E>
float highest_logit(const typename E::Storage* row, int64_t width) {
  Floats highest[4];
  Ints faulty[4] = {};
  for (Floats& lanes : highest) lanes = broadcast(-__builtin_inff());
  int64_t i = for_each_vector(0, width, [&](int k, int64_t at) {
    const Floats x = E::load_floats(row + at);
    faulty[k] |= x != x;
    highest[k] = maximum(highest[k], x);
  });
  bool is_faulty = bits_of((faulty[0] | faulty[1]) | (faulty[2] | faulty[3])) != 0;
  float best = max_of_lanes(maximum(maximum(highest[0], highest[1]), maximum(highest[2], highest[3])));
  for (; i < width; ++i) {
    const float x = E::to_float(row[i]);
    is_faulty |= x != x;
    if (x > best) best = x;
  }
  return is_faulty ? __builtin_inff() : best;
}

DISAGG_INLINE bool is_finite(float x) { return x - x == 0.0f; }

// The first of the largest of ``width`` logits; -1 when that is not finite.
template <class E>
int64_t find_largest(const void* logits, int64_t width) {
  const auto* row = static_cast<const typename E::Storage*>(logits);
  const float best = highest_logit<E>(row, width);
  if (!is_finite(best)) return -1;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    if (bits_of(E::load_floats(row + i) == best) != 0) break;
  while (E::to_float(row[i]) != best) ++i;
  return i;
}

// Log-probabilities of a row at a temperature of 1 / sharpness.
template <class E>
struct RowProbabilities {
  const typename E::Storage* row;
  int64_t width;
  float sharpness;
  float highest;
  float log_sum;  // of exp((x - highest) * sharpness)

  DISAGG_INLINE Floats logprobs(int64_t i) const { return (E::load_floats(row + i) - highest) * sharpness - log_sum; }
  DISAGG_INLINE float logprob(int64_t i) const { return (E::to_float(row[i]) - highest) * sharpness - log_sum; }

  // ``log_sum`` is set. Sums of a few vectors are added in double precision: what the probabilities sum to is off by
  // less than 1e-6. Returns false when the largest logit is not finite.
  bool measure() {
    constexpr int64_t kAtOnce = 64 * kLanes;
    highest = highest_logit<E>(row, width);
    if (!is_finite(highest)) return false;
    const float to_base_2 = sharpness * kLog2E;
    double total = 0.0;
    for (int64_t begin = 0; begin < width; begin += kAtOnce) {
      const int64_t end = begin + kAtOnce < width ? begin + kAtOnce : width;
      Floats sums[4] = {};
      int64_t i = for_each_vector(begin, end, [&](int k, int64_t at) {
        sums[k] += exp2<5>((E::load_floats(row + at) - highest) * to_base_2);
      });
      total += sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
      for (; i < end; ++i) total += exp2<5>(broadcast((E::to_float(row[i]) - highest) * to_base_2))[0];
    }
    log_sum = static_cast<float>(__builtin_log(total));
    return true;
  }
};

// The tokens of a row whose log-probability, at a temperature of 1 / ``sharpness``, is above ``floor``, in their order,
// with it and their probability. Returns how many, at most e^-floor but for rounding; -1 when the largest logit is not
// finite. Whole vectors of probabilities are written.
template <class E>
int64_t find_likely(const void* logits, int64_t width, float sharpness, float floor, LikelyTokens& out) {
  RowProbabilities<E> row{static_cast<const typename E::Storage*>(logits), width, sharpness, 0.0f, 0.0f};
  if (!row.measure()) return -1;
  out.highest = row.highest;
  out.log_sum = row.log_sum;
  int64_t found = 0;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Floats of_lanes = row.logprobs(i);
    for (uint32_t likely = bits_of(of_lanes > floor); likely != 0; likely &= likely - 1) {
      const int lane = __builtin_ctz(likely);
      out.tokens[found] = static_cast<int32_t>(i + lane);
      out.logprobs[found++] = of_lanes[lane];
    }
  }
  for (; i < width; ++i) {
    if (!(row.logprob(i) > floor)) continue;
    out.tokens[found] = static_cast<int32_t>(i);
    out.logprobs[found++] = row.logprob(i);
  }
  for (i = 0; i < found; i += kLanes)
    store(out.probabilities + i, exp2<5>(load<Floats>(out.logprobs + i) * kLog2E));
  return found;
}

// The log-probability of one token of a row that ``find_likely`` was given.
template <class E>
float logprob_of(const void* logits, int64_t token, float sharpness, const LikelyTokens& likely) {
  const auto* row = static_cast<const typename E::Storage*>(logits);
  return RowProbabilities<E>{row, 0, sharpness, likely.highest, likely.log_sum}.logprob(token);
}

}  // namespace DISAGG_ISA
}  // namespace disagg
