// One step's sequences, checked once, cut into pieces of attention work once, then used by every layer.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernel_table.h"
#include "parallel.h"

namespace disagg {

struct StepShape {
  int64_t num_blocks;
  int num_kv_heads;
  int group;
  int head_dim;
  int block_size;
};

// What becomes of the products of queries and keys; see AttentionArgs.
struct AttentionScores {
  float scale;
  float softcap;
  int window;
};

// Where a StepBatch's tensors lie; layouts as in interface.py.
struct StepArrays {
  const int32_t* query_start;
  const int32_t* context_lens;
  const int32_t* block_tables;
  int64_t num_rows;
  int64_t num_sequences;
  int64_t table_width;
};

class Step {
 public:
  // Copies what it needs. Throws std::out_of_range when a length or block id does not fit the pool.
  Step(const StepShape& shape, const StepArrays& arrays);

  const StepShape& shape() const { return shape_; }
  int64_t num_rows() const { return static_cast<int64_t>(slots_.size()); }
  const int32_t* positions() const { return positions_.data(); }
  const int32_t* slots() const { return slots_.data(); }
  int32_t longest_context() const { return longest_context_; }

  // Plan the attention of layers with this window. To be called before ``attend``, by one thread.
  void prepare(int window);
  // For every thread of the team to call.
  void attend(Team& team, const Kernels& kernels, const void* q, void* out, const void* kv_layer,
              const AttentionScores& scores);

 private:
  // The ranges of keys of one decode.
  struct SplitGroup {
    int64_t first_partial;
    int32_t num_partials;
    std::unique_ptr<std::atomic<int32_t>> num_finished;
  };
  struct Plan {
    int window;
    std::vector<AttentionItem> items;
    std::vector<SplitGroup> split_groups;
    int64_t partial_floats;
  };

  void check_sequence(int64_t sequence) const;
  void find_slots(int64_t sequence);
  Plan* find_plan(int window);
  void plan_prefill(Plan& plan, int32_t sequence) const;
  void plan_decode(Plan& plan, int32_t sequence) const;
  void plan_ranges(Plan& plan, const AttentionItem& whole) const;
  int32_t first_key(int32_t position, int window) const;
  std::array<int32_t, 2> first_blocks(const AttentionItem& item) const;

  StepShape shape_;
  std::vector<int32_t> positions_;
  std::vector<int32_t> slots_;
  std::vector<int32_t> query_start_;
  std::vector<int32_t> context_lens_;
  std::vector<int32_t> tables_;
  int64_t table_width_;
  int32_t longest_context_ = 0;
  std::vector<Plan> plans_;  // one per sliding window that the layers use
  std::vector<float> partials_;
};

}  // namespace disagg
