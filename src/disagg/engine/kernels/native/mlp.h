// The MLP of a layer: one for all tokens, or a few of many experts for each.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "buffer.h"
#include "kernel_table.h"
#include "packed_linear.h"
#include "parallel.h"

namespace disagg {

// The rows that one expert has in a step: consecutive ones, in the order of experts, and its pieces of work.
struct ExpertRows {
  int32_t expert;
  int64_t first_row;
  int64_t num_rows;
  int64_t first_piece;
  int64_t num_pieces;
};

// What the MLPs of a step write down, used by one after the other.
struct MlpScratch {
  Buffer gate_up, activated;
  Buffer logits, gathered, products, shared;  // of a mixture of experts, as the rest
  std::vector<int32_t> chosen, places;        // [T, num_per_token]: the expert, and its row in ``gathered``
  std::vector<float> weights;                 // [T, num_per_token + 1]
  std::vector<ExpertRows> experts;            // those that some row chose
  int64_t num_pieces = 0;
};

// What a layer's MLP is run with: ``item_bytes`` of an element.
struct MlpRun {
  Team& team;
  const Kernels& kernels;
  int64_t item_bytes;
  MlpScratch& scratch;
};

class Mlp {
 public:
  virtual ~Mlp() = default;

  // Make room for so many rows; before the team starts.
  virtual void reserve(MlpScratch& scratch, int64_t rows, int64_t item_bytes) const = 0;

  // out [rows, hidden] from x [rows, hidden]; for every thread of the team to call.
  virtual void run(const MlpRun& run, const void* x, void* out, int64_t rows) const = 0;
};

// down(activation(gate(x)) * up(x)). Owns neither of its projections.
class DenseMlp final : public Mlp {
 public:
  DenseMlp(const PackedLinear* gate_up, const PackedLinear* down, Activation activation)
      : gate_up_(gate_up), down_(down), activation_(activation) {}

  const PackedLinear& gate_up() const { return *gate_up_; }
  const PackedLinear& down() const { return *down_; }
  int64_t intermediate() const { return down_->in_features(); }
  // The activated products of ``rows`` rows of gate and up.
  void activate(const MlpRun& run, int64_t rows) const;

  void reserve(MlpScratch& scratch, int64_t rows, int64_t item_bytes) const override;
  void run(const MlpRun& run, const void* x, void* out, int64_t rows) const override;

 private:
  const PackedLinear* gate_up_;
  const PackedLinear* down_;
  Activation activation_;
};

// A mixture of experts of one size. Of their matrices a step reads those that its rows chose, each once.
class SparseMlp final : public Mlp {
 public:
  // ``shared`` is empty, or what every row passes besides; the router then has one more row, its gate.
  SparseMlp(const PackedLinear* router, std::vector<DenseMlp> experts, std::optional<DenseMlp> shared,
            int num_per_token, bool normalize)
      : router_(router),
        experts_(std::move(experts)),
        shared_(shared),
        num_per_token_(num_per_token),
        normalize_(normalize) {}

  void reserve(MlpScratch& scratch, int64_t rows, int64_t item_bytes) const override;
  void run(const MlpRun& run, const void* x, void* out, int64_t rows) const override;

 private:
  void choose(const MlpRun& run, const void* x, int64_t rows) const;
  void group(MlpScratch& scratch, int64_t rows, int team_size) const;
  void gather(const MlpRun& run, const void* x, int64_t rows) const;
  void multiply_grouped(const MlpRun& run, bool down, char* x, char* out) const;

  const PackedLinear* router_;
  std::vector<DenseMlp> experts_;
  std::optional<DenseMlp> shared_;
  int num_per_token_;
  bool normalize_;
};

}  // namespace disagg
