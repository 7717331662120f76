// The small operations of a mixture of experts: which experts a token passes, and the sum of what they give.
#pragma once

#include "elementwise.h"
#include "kernel_table.h"

namespace disagg {
namespace DISAGG_ISA {

DISAGG_INLINE Floats exponential(Floats x) {
  return exp2<5>(maximum(minimum(x * kLog2E, broadcast(127.0f)), broadcast(-127.0f)));
}

// The weight of one row's experts, and of the shared one where there is one: see ExpertChoice.
template <class E>
void choose_experts_of_row(const ExpertChoice& args, int64_t row) {
  const int num_logits = args.num_experts + args.has_shared;
  const auto* logits = static_cast<const typename E::Storage*>(args.logits) + row * num_logits;
  int32_t* chosen = args.chosen + row * args.num_per_token;
  float* weights = args.weights + row * (args.num_per_token + 1);
  float values[kMostExperts];
  for (int i = 0; i < args.num_experts; ++i) values[i] = E::to_float(logits[i]);
  bool taken[kMostExperts] = {};
  for (int rank = 0; rank < args.num_per_token; ++rank) {
    int best = -1;  // the first of the largest; some free one where there is a NaN
    for (int i = 0; i < args.num_experts; ++i)
      if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
    taken[best] = true;
    chosen[rank] = best;
  }
  const float largest = values[chosen[0]];
  float sum = 0;
  if (args.normalize) {
    for (int rank = 0; rank < args.num_per_token; ++rank)
      sum += exponential(broadcast(values[chosen[rank]] - largest))[0];
  } else {
    for (int i = 0; i < args.num_experts; ++i) sum += exponential(broadcast(values[i] - largest))[0];
  }
  for (int rank = 0; rank < args.num_per_token; ++rank)
    weights[rank] = exponential(broadcast(values[chosen[rank]] - largest))[0] / sum;
  if (args.has_shared)
    weights[args.num_per_token] = 1.0f / (1.0f + exponential(broadcast(-E::to_float(logits[args.num_experts])))[0]);
}

template <class E>
void choose_experts(const ExpertChoice& args, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) choose_experts_of_row<E>(args, row);
}

// Sums are float32 and rounded once, in the order of a row's choice: other rows change nothing.
template <class E>
void combine_experts(const ExpertSum& args, int64_t row_begin, int64_t row_end) {
  using Storage = typename E::Storage;
  const auto* products = static_cast<const Storage*>(args.products);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int32_t* places = args.places + row * args.num_per_token;
    const float* weights = args.weights + row * (args.num_per_token + 1);
    const Storage* shared = args.shared == nullptr ? nullptr : static_cast<const Storage*>(args.shared) + row * args.width;
    Storage* out = static_cast<Storage*>(args.out) + row * args.width;
    int64_t i = 0;
    for (; i + kLanes <= args.width; i += kLanes) {
      Floats sum{};
      for (int rank = 0; rank < args.num_per_token; ++rank)
        sum += weights[rank] * E::load_floats(products + places[rank] * args.width + i);
      if (shared != nullptr) sum += weights[args.num_per_token] * E::load_floats(shared + i);
      E::store_floats(out + i, sum);
    }
    for (; i < args.width; ++i) {
      float sum = 0;
      for (int rank = 0; rank < args.num_per_token; ++rank)
        sum += weights[rank] * E::to_float(products[places[rank] * args.width + i]);
      if (shared != nullptr) sum += weights[args.num_per_token] * E::to_float(shared[i]);
      out[i] = E::from_float(sum);
    }
  }
}

}  // namespace DISAGG_ISA
}  // namespace disagg
