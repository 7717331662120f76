// What the bindings call: plain structs and one table of functions per instruction set.
//
// A "unit" is the 32-bit word of the INTERLEAVED pool: one float32, two bfloat16 that a dot-product instruction
// multiplies together, or two float16 that are widened. With w elements per unit a KV head of a block holds K as [head_dim / w][block_size] units and
// V as [block_size / w][head_dim] units.
#pragma once

#include <cstdint>

namespace disagg {

enum ElementType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kNumElementTypes = 3 };
// What a gate goes through before it multiplies the other half.
enum Activation { kSilu = 0, kGeluTanh = 1, kNumActivations = 2 };

constexpr int kMaxHeadDim = 256;
constexpr int kMinBlockSize = 16;
constexpr int kMaxBlockSize = 128;
// Rows (new tokens times query heads) that one piece of work keeps in its hands.
constexpr int kTileRows = 48;
// Keys handled between two corrections of the running maximum; a multiple of every block size.
constexpr int kTileKeys = 128;
// A decode is cut into ranges of so many keys. Fixed, so that an answer depends neither on threads nor on the batch.
constexpr int kSplitKeys = 256;

struct AttentionArgs {
  const void* q;              // [T, num_kv_heads * group, head_dim]
  void* out;                  // as q
  const void* kv_layer;       // [num_blocks, 2, num_kv_heads, block_size * head_dim]
  const int32_t* block_tables;
  int64_t table_stride;
  int num_kv_heads;
  int group;                  // query heads per KV head
  int head_dim;
  int block_size;
  float scale;
  float softcap;              // scores become softcap * tanh(score / softcap); 0: they stay
  int window;                 // INT32_MAX: none
};

// One thread's piece of work, of one sequence: a tile of new tokens for one KV head with all keys it sees, or a decode
// for some KV heads with a range of its keys.
struct AttentionItem {
  int32_t sequence;
  int32_t kv_head;
  int32_t num_kv_heads;
  int32_t first_row;          // of the T rows
  int32_t num_tokens;
  int32_t first_position;
  int32_t key_begin;          // a multiple of the block size
  int32_t key_end;
  int32_t split_group;        // which decode of Step this is a range of; -1: the item is complete in itself
  int64_t partial;            // where its partial result goes, in floats
};

struct RopeArgs {
  const void* qkv;            // [T, (num_heads + 2 * num_kv_heads) * head_dim]
  void* q_out;                // [T, num_heads, head_dim]
  void* kv_layer;
  const float* cos_sin;       // [max position, rotary_dim]
  const void* q_norm;         // [head_dim], [num_heads * head_dim], where a row is normalised as one, or null
  const void* k_norm;         // the same with num_kv_heads
  bool norm_rows;             // which of them q_norm and k_norm are
  const int32_t* positions;   // [T]
  const int32_t* slots;       // [T], block * block_size + place in the block
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int rotary_dim;             // how much of a head's beginning turns
  int block_size;
  float eps;
};

// What a layer's part does with its result x [rows, width]: normalise it by ``x_norm``, add it times ``multiplier`` to
// ``residual``, and normalise that by ``norm`` into ``out``. Each norm, and the residual, may be null and is left out
// then: without a residual x itself is normalised, without a norm nothing is written to ``out``.
struct NormArgs {
  void* x;
  void* residual;
  const void* x_norm;
  const void* norm;
  void* out;
  int64_t width;
  float multiplier;
  float eps;
};

struct LinearArgs {
  const void* x;              // [rows, in_features]
  void* out;                  // [rows, out_features]
  const void* packed;         // panels of panel_width output features, see linear.h and linear_int8.h
  const float* scale;         // of int8 weights, padded to whole panels; null: the weights are the element type's
  const float* bias;          // padded to whole panels; null: none
  int64_t in_features;
  int64_t out_features;
};

// The blocks in which weights of GGUF files lie: bits of an integer, integers of a block, whether 256 of them share float16
// scales that integers of each block refine, and whether there are offsets.
enum BlockFormat {
  kBytes32 = 0,         // Q8_0, Q5_0
  kBytes32Offset,       // Q5_1
  kBytes32SubOffset,    // Q5_K
  kBytes16Sub,          // Q6_K
  kNibbles32Offset,     // Q4_0, Q4_1
  kNibbles32SubOffset,  // Q4_K
  kNumBlockFormats
};

// A matrix in blocks, before it is packed; offset, sub_scale and sub_offset are null where the format has none.
struct BlockArrays {
  const int8_t* values;       // [out_features, in_features]
  const uint16_t* scale;      // float16 [out_features, blocks, or super-blocks]
  const uint16_t* offset;     // as scale
  const int8_t* sub_scale;    // [out_features, blocks]
  const int8_t* sub_offset;   // as sub_scale
};

// Products with weights in blocks of one format; see linear_blocks.h.
struct BlockKernels {
  int64_t (*panel_bytes)(int64_t in_features);
  // 32-bit words that ``multiply`` needs besides, for so many rows.
  int64_t (*scratch)(int64_t rows, int64_t in_features);
  void (*pack)(const BlockArrays&, char* packed, int64_t out_features, int64_t in_features, int64_t panel_begin,
               int64_t panel_end);
  void (*multiply)(const LinearArgs&, uint32_t* scratch, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                   int64_t panel_end);
};

// Which experts each row of a step passes: the ``num_per_token`` highest logits, weighted by their softmax, over the
// chosen ones with ``normalize`` and over all without; the shared expert has the sigmoid of the last logit.
struct ExpertChoice {
  const void* logits;         // [T, num_experts + has_shared]
  int32_t* chosen;            // [T, num_per_token], the highest first
  float* weights;             // [T, num_per_token + 1], the shared expert's last
  int num_experts;
  int num_per_token;
  bool has_shared;
  bool normalize;
};
constexpr int kMostExperts = 1024;

// The weighted sum of what a row's experts gave.
struct ExpertSum {
  const void* products;       // [T * num_per_token, width], in the order of ``places``
  const void* shared;         // [T, width] or null
  const int32_t* places;      // [T, num_per_token]
  const float* weights;       // [T, num_per_token + 1]
  void* out;                  // [T, width]
  int64_t width;
  int num_per_token;
};

// Where the likely tokens of a row go: room for all that there may be, and for a vector more. Besides, what makes a
// log-probability of any other logit.
struct LikelyTokens {
  int32_t* tokens;
  float* logprobs;
  float* probabilities;
  float highest;
  float log_sum;
};
constexpr int kMostLanes = 16;

// Kernels of one instruction set and one element type. Row ranges are half open.
struct Kernels {
  void (*prefill)(const AttentionArgs&, const AttentionItem&);
  // ``partial`` is null, or takes the result over a range of keys: per query head its offset (base 2), its sum, then
  // head_dim weighted values. ``following`` are the two blocks that this thread will read next.
  void (*decode)(const AttentionArgs&, const AttentionItem&, float* partial, const int32_t* following);
  // Join ``num_partials`` results over consecutive ranges of keys into row ``first_row`` of the output.
  void (*merge)(const AttentionArgs&, const AttentionItem&, const float* partials, int num_partials);
  int panel_width;
  void (*pack_weight)(const void* weight, uint32_t* packed, int64_t out_features, int64_t in_features,
                      int64_t panel_begin, int64_t panel_end);
  // 32-bit words that ``multiply`` and ``multiply_int8`` need besides, for so many rows.
  int64_t (*scratch)(int64_t rows, int64_t in_features);
  void (*multiply)(const LinearArgs&, uint32_t* scratch, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                   int64_t panel_end);
  void (*pack_int8)(const int8_t* weight, int8_t* packed, int64_t out_features, int64_t in_features,
                    int64_t panel_begin, int64_t panel_end);
  void (*multiply_int8)(const LinearArgs&, uint32_t* scratch, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                        int64_t panel_end);
  BlockKernels blocks[kNumBlockFormats];
  void (*rope_and_write_kv)(const RopeArgs&, int64_t row_begin, int64_t row_end);
  void (*rms_norm)(const NormArgs&, int64_t row_begin, int64_t row_end);
  void (*gate[kNumActivations])(const void* gate_up, void* out, int64_t width, int64_t row_begin, int64_t row_end);
  // Multiply with ``scale``, then bound by cap * tanh(x / cap) where the cap is not 0.
  void (*scale_and_cap)(void* x, float scale, float cap, int64_t begin, int64_t end);
  void (*choose_experts)(const ExpertChoice&, int64_t row_begin, int64_t row_end);
  void (*combine_experts)(const ExpertSum&, int64_t row_begin, int64_t row_end);
  // Of one row of logits; see logits.h.
  int64_t (*find_largest)(const void* logits, int64_t width);
  int64_t (*find_likely)(const void* logits, int64_t width, float sharpness, float floor, LikelyTokens& out);
  float (*logprob_of)(const void* logits, int64_t token, float sharpness, const LikelyTokens& likely);
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  const Kernels* kernels;     // [kNumElementTypes]
};

}  // namespace disagg
