// A whole decoder as one call: what its operations need is known beforehand, and Python is asked once a step.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "buffer.h"
#include "helpers.h"
#include "kernel_table.h"
#include "mlp.h"
#include "packed_linear.h"
#include "parallel.h"
#include "step.h"

namespace disagg {

// One layer's weights, owned by others. Norms are null where the model has none; see NormArgs and RopeArgs.
struct LayerWeights {
  const void* attention_norm;
  const PackedLinear* qkv;
  const void* q_norm;
  const void* k_norm;
  const PackedLinear* attention_output;
  const void* attention_output_norm;
  const void* mlp_norm;
  const Mlp* mlp;
  const void* mlp_output_norm;
  const float* cos_sin;
  int window;
};

// What surrounds the layers, and what all of them share.
struct StackSettings {
  int64_t hidden;
  int64_t vocab_size;
  const void* embeddings;  // [vocab_size, hidden]
  const void* norm;
  const PackedLinear* head;
  int64_t num_positions;
  int rotary_dim;
  bool norm_rows;
  float eps;
  float scale;
  float attention_softcap;
  float residual_multiplier;
  float logit_scale;
  float logit_softcap;
};

// Rows whose logits are wanted, and where these go: [num_rows, vocab_size]. ``largest`` [num_rows] is null, or takes the
// first of the largest of each row, as ``find_largest`` says.
struct WantedRows {
  const int64_t* rows;
  int64_t num_rows;
  void* logits;
  int64_t* largest;
};

// Where a step says how many layers of its keys and values are in the pool, for who reads them meanwhile: it adds one for
// each. ``word`` may be null.
class Progress {
 public:
  explicit Progress(uint64_t* word) : word_(word) {}
  // For every thread of the team to call; the layer has been written by all of them.
  void add_layer(Team& team) const {
    if (word_ == nullptr) return;
    team.for_each_item(1, [&](int64_t, int64_t) { __atomic_fetch_add(word_, 1, __ATOMIC_RELEASE); });
  }

 private:
  uint64_t* word_;
};

class DecoderStack {
 public:
  DecoderStack(const Kernels& kernels, int64_t item_bytes, const StackSettings& settings)
      : kernels_(kernels), item_bytes_(item_bytes), settings_(settings) {}

  void add(const LayerWeights& layer) { layers_.push_back(layer); }
  size_t num_layers() const { return layers_.size(); }

  // From the ids of a step's tokens to logits. ``kv_layers`` has one pool per layer, ``steps`` the step over the blocks
  // that the layer is in: one and the same but for those. ``helpers`` may be null.
  void run(const std::vector<Step*>& steps, const int64_t* token_ids, const std::vector<void*>& kv_layers,
           const WantedRows& wanted, const Progress& progress, int num_threads, Helpers* helpers);

 private:
  struct Scratch {
    Buffer residual, wanted_residual, normed, projected, qkv, q, attended;
    Buffer best_logits, best_tokens;  // of each row in each part of the vocabulary
    MlpScratch mlp;
  };

  void check(const Step& step, const int64_t* token_ids, const WantedRows& wanted) const;
  void reserve(const StepShape& shape, int64_t rows);
  void embed(Team& team, const int64_t* token_ids, int64_t rows);
  void run_attention(Team& team, Step& step, const LayerWeights& layer, const void* x, void* kv_layer);
  void run_mlp(Team& team, const LayerWeights& layer, void* attended, void* residual, int64_t rows);
  // Add what a layer's part has projected to the residual; returns where the next part reads.
  const void* join(Team& team, void* residual, const void* projected_norm, const void* norm, int64_t rows);
  const void* normalise(Team& team, const NormArgs& args, int64_t rows);
  int64_t num_head_parts(int64_t rows, int num_threads) const;
  void run_head(Team& team, const void* x, const WantedRows& wanted, int64_t parts);
  void finish_logits(void* logits, int64_t rows, int64_t begin, int64_t end) const;
  void find_largest_of_part(const WantedRows& wanted, int64_t part, int64_t parts);
  void find_largest_of_all(const WantedRows& wanted, int64_t parts);
  void keep_wanted(Team& team, const WantedRows& wanted, int64_t attended_width);

  const Kernels& kernels_;
  const int64_t item_bytes_;
  const StackSettings settings_;
  std::vector<LayerWeights> layers_;
  Scratch scratch_;
};

// Rotate Q and K, write K and V into the pool; for every thread of the team to call.
void rope_and_write_kv(Team& team, const Kernels& kernels, const Step& step, RopeArgs args, int64_t item_bytes);

// Throws std::out_of_range when ``step`` reaches farther than ``num_positions``.
void check_positions(const Step& step, int64_t num_positions);

}  // namespace disagg
