// A weight matrix packed for one instruction set, and how its products are spread over threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel_table.h"
#include "parallel.h"

namespace disagg {

// Owns neither the packed units nor the inputs; owns the bias.
class PackedLinear {
 public:
  // ``bias`` is empty or has one float32 per output feature. in_features must be a whole number of units.
  PackedLinear(const Kernels& kernels, int64_t out_features, int64_t in_features, const std::vector<float>& bias);

  // Units that ``pack`` fills, and where they are from then on.
  int64_t packed_units(int64_t features_per_unit) const;
  void pack(const void* weight, uint32_t* packed, int num_threads);

  // out [rows, out_features] = x [rows, in_features] times the transposed weight, plus the bias. For every thread of the
  // team to call.
  void multiply(Team& team, const void* x, void* out, int64_t rows) const;

 private:
  const Kernels& kernels_;
  int64_t out_features_;
  int64_t in_features_;
  int64_t num_panels_;
  const uint32_t* packed_ = nullptr;
  std::vector<float> bias_;
};

}  // namespace disagg
