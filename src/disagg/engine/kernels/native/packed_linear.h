// A weight matrix packed for one instruction set, and how its products are spread over threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernel_table.h"
#include "parallel.h"

namespace disagg {

// Owns neither the packed weights nor the inputs; owns scale and bias.
class PackedLinear {
 public:
  // ``features_per_unit`` of the element type must divide in_features. ``scale`` is empty, or the weights are int8 and it
  // has one float32 per output feature; ``bias`` is empty or has one too. ``blocks`` are the kernels of the blocks in
  // which the weights are, or null.
  PackedLinear(const Kernels& kernels, int64_t out_features, int64_t in_features, int64_t features_per_unit,
               const std::vector<float>& scale, const std::vector<float>& bias, const BlockKernels* blocks = nullptr);

  // Bytes that ``pack`` fills, and where they are from then on.
  int64_t packed_bytes() const;
  void pack(const void* weight, void* packed, int num_threads);
  void pack_blocks(const BlockArrays& weight, void* packed, int num_threads);
  // The same, where ``pack`` has filled these bytes before: in another process, perhaps.
  void use_packed(const void* packed);

  // out [rows, out_features] = x [rows, in_features] times the transposed weight, plus the bias. For every thread of the
  // team to call.
  void multiply(Team& team, const void* x, void* out, int64_t rows) const;
  // One of ``parts`` pieces of the same, a range of output features, by the calling thread.
  void multiply_part(const void* x, void* out, int64_t rows, int64_t part, int64_t parts) const;
  // Where the output features of a part begin; those of part ``parts`` would begin at the end.
  int64_t part_begin(int64_t part, int64_t parts) const;
  // Into how many parts this can be cut, so that each is worth a thread's while.
  int64_t most_parts() const;

  int64_t in_features() const { return in_features_; }
  int64_t out_features() const { return out_features_; }

 private:
  LinearArgs args(const void* x, void* out) const;
  void multiply_panels(const LinearArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                       int64_t panel_end) const;
  int64_t panel_units() const { return kernels_.panel_width * (in_features_ / features_per_unit_); }

  const Kernels& kernels_;
  const BlockKernels* blocks_;
  int64_t out_features_;
  int64_t in_features_;
  int64_t features_per_unit_;
  int64_t num_panels_;
  const void* packed_ = nullptr;
  std::vector<float> scale_;
  std::vector<float> bias_;
};

}  // namespace disagg
