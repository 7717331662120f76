#include "decoder_stack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace disagg {

namespace {

// Of the logits of a part of the vocabulary: they stay in the second-level cache beside the weights.
constexpr int64_t kHeadPartBytes = 128 << 10;

}  // namespace

void check_positions(const Step& step, int64_t num_positions) {
  if (step.longest_context() > num_positions)
    throw std::out_of_range("a context of " + std::to_string(step.longest_context()) + " tokens, angles for " +
                            std::to_string(num_positions));
}

void rope_and_write_kv(Team& team, const Kernels& kernels, const Step& step, RopeArgs args, int64_t item_bytes) {
  const StepShape& shape = step.shape();
  args.positions = step.positions();
  args.slots = step.slots();
  args.num_heads = shape.num_kv_heads * shape.group;
  args.num_kv_heads = shape.num_kv_heads;
  args.head_dim = shape.head_dim;
  args.block_size = shape.block_size;
  const int64_t row_bytes = int64_t{args.num_heads + 2 * args.num_kv_heads} * args.head_dim * item_bytes;
  team.for_each_range(step.num_rows(), row_bytes,
                      [&](int64_t begin, int64_t end) { kernels.rope_and_write_kv(args, begin, end); });
}

void DecoderStack::check(const Step& step, const int64_t* token_ids, const WantedRows& wanted) const {
  check_positions(step, settings_.num_positions);
  const int64_t rows = step.num_rows();
  for (int64_t row = 0; row < rows; ++row)
    if (token_ids[row] < 0 || token_ids[row] >= settings_.vocab_size)
      throw std::out_of_range("token id " + std::to_string(token_ids[row]) + " of a vocabulary of " +
                              std::to_string(settings_.vocab_size));
  for (int64_t i = 0; i < wanted.num_rows; ++i)
    if (wanted.rows[i] < 0 || wanted.rows[i] >= rows)
      throw std::out_of_range("wanted row " + std::to_string(wanted.rows[i]) + " of " + std::to_string(rows));
}

void DecoderStack::run(const std::vector<Step*>& steps, const int64_t* token_ids, const std::vector<void*>& kv_layers,
                       const WantedRows& wanted, const Progress& progress, int num_threads, Helpers* helpers) {
  const Step& step = *steps[0];
  check(step, token_ids, wanted);
  const int64_t rows = step.num_rows();
  reserve(step.shape(), std::max(rows, wanted.num_rows));
  const int64_t head_parts = num_head_parts(wanted.num_rows, num_threads);
  scratch_.best_logits.at_least(wanted.num_rows * head_parts * item_bytes_);
  scratch_.best_tokens.at_least(wanted.num_rows * head_parts * int64_t{sizeof(int64_t)});
  for (size_t index = 0; index < layers_.size(); ++index) {
    if (steps[index]->num_rows() != rows) throw std::invalid_argument("the steps of the layers differ in their rows");
    steps[index]->prepare(layers_[index].window);
  }
  Scratch& scratch = scratch_;
  const int64_t attended_width = int64_t{step.shape().num_kv_heads} * step.shape().group * step.shape().head_dim;
  const auto compute = [&](Team& team) {
    embed(team, token_ids, rows);
    const void* x = normalise(team, {scratch.residual.data(), nullptr, nullptr, layers_[0].attention_norm}, rows);
    for (size_t index = 0; index < layers_.size(); ++index) {
      const LayerWeights& layer = layers_[index];
      run_attention(team, *steps[index], layer, x, kv_layers[index]);
      progress.add_layer(team);
      if (index + 1 < layers_.size()) {
        run_mlp(team, layer, scratch.attended.data(), scratch.residual.data(), rows);
        x = join(team, scratch.residual.data(), layer.mlp_output_norm, layers_[index + 1].attention_norm, rows);
      } else {
        // What follows mixes no rows, and only the wanted ones are read.
        keep_wanted(team, wanted, attended_width);
        run_mlp(team, layer, scratch.q.data(), scratch.wanted_residual.data(), wanted.num_rows);
        x = join(team, scratch.wanted_residual.data(), layer.mlp_output_norm, settings_.norm, wanted.num_rows);
      }
    }
    run_head(team, x, wanted, head_parts);
  };
  run_team(num_threads, compute, helpers);
}

void DecoderStack::reserve(const StepShape& shape, int64_t rows) {
  const auto at_least = [&](Buffer& buffer, int64_t width) { buffer.at_least(rows * width * item_bytes_); };
  const int64_t kv_width = int64_t{shape.num_kv_heads} * shape.head_dim;
  at_least(scratch_.residual, settings_.hidden);
  at_least(scratch_.wanted_residual, settings_.hidden);
  at_least(scratch_.normed, settings_.hidden);
  at_least(scratch_.projected, settings_.hidden);
  at_least(scratch_.qkv, (shape.group + 2) * kv_width);
  at_least(scratch_.q, shape.group * kv_width);
  at_least(scratch_.attended, shape.group * kv_width);
  for (const LayerWeights& layer : layers_) layer.mlp->reserve(scratch_.mlp, rows, item_bytes_);
}

void DecoderStack::embed(Team& team, const int64_t* token_ids, int64_t rows) {
  const int64_t row_bytes = settings_.hidden * item_bytes_;
  team.for_each_range(rows, row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      std::memcpy(scratch_.residual.data() + row * row_bytes,
                  static_cast<const char*>(settings_.embeddings) + token_ids[row] * row_bytes, row_bytes);
  });
}

void DecoderStack::run_attention(Team& team, Step& step, const LayerWeights& layer, const void* x, void* kv_layer) {
  layer.qkv->multiply(team, x, scratch_.qkv.data(), step.num_rows());
  RopeArgs rope{};
  rope.qkv = scratch_.qkv.data();
  rope.q_out = scratch_.q.data();
  rope.kv_layer = kv_layer;
  rope.cos_sin = layer.cos_sin;
  rope.rotary_dim = settings_.rotary_dim;
  rope.q_norm = layer.q_norm;
  rope.k_norm = layer.k_norm;
  rope.norm_rows = settings_.norm_rows;
  rope.eps = settings_.eps;
  rope_and_write_kv(team, kernels_, step, rope, item_bytes_);
  step.attend(team, kernels_, scratch_.q.data(), scratch_.attended.data(), kv_layer,
              {settings_.scale, settings_.attention_softcap, layer.window});
}

void DecoderStack::run_mlp(Team& team, const LayerWeights& layer, void* attended, void* residual, int64_t rows) {
  layer.attention_output->multiply(team, attended, scratch_.projected.data(), rows);
  const void* x = join(team, residual, layer.attention_output_norm, layer.mlp_norm, rows);
  layer.mlp->run({team, kernels_, item_bytes_, scratch_.mlp}, x, scratch_.projected.data(), rows);
}

const void* DecoderStack::join(Team& team, void* residual, const void* projected_norm, const void* norm,
                               int64_t rows) {
  return normalise(team, {scratch_.projected.data(), residual, projected_norm, norm}, rows);
}

const void* DecoderStack::normalise(Team& team, const NormArgs& parts, int64_t rows) {
  NormArgs args = parts;
  args.out = scratch_.normed.data();
  args.width = settings_.hidden;
  args.multiplier = settings_.residual_multiplier;
  args.eps = settings_.eps;
  team.for_each_range(rows, settings_.hidden * item_bytes_,
                      [&](int64_t begin, int64_t end) { kernels_.rms_norm(args, begin, end); });
  if (args.norm != nullptr) return args.out;
  return args.residual != nullptr ? args.residual : args.x;
}

// A part of the vocabulary at a time, for all rows: what follows the product reads it from a cache.
void DecoderStack::run_head(Team& team, const void* x, const WantedRows& wanted, int64_t parts) {
  team.for_each_item(parts, [&](int64_t part, int64_t) {
    settings_.head->multiply_part(x, wanted.logits, wanted.num_rows, part, parts);
    finish_logits(wanted.logits, wanted.num_rows, settings_.head->part_begin(part, parts),
                  settings_.head->part_begin(part + 1, parts));
    if (wanted.largest != nullptr) find_largest_of_part(wanted, part, parts);
  });
  if (wanted.largest == nullptr) return;
  team.for_each_item(1, [&](int64_t, int64_t) { find_largest_of_all(wanted, parts); });
}

int64_t DecoderStack::num_head_parts(int64_t rows, int num_threads) const {
  const int64_t parts = rows * settings_.vocab_size * item_bytes_ / kHeadPartBytes;
  return std::clamp<int64_t>(parts, std::min<int64_t>(2 * num_threads, settings_.head->most_parts()),
                             settings_.head->most_parts());
}

void DecoderStack::finish_logits(void* logits, int64_t rows, int64_t begin, int64_t end) const {
  if (settings_.logit_scale == 1.0f && settings_.logit_softcap == 0.0f) return;
  for (int64_t row = 0; row < rows; ++row)
    kernels_.scale_and_cap(logits, settings_.logit_scale, settings_.logit_softcap, row * settings_.vocab_size + begin,
                           row * settings_.vocab_size + end);
}

void DecoderStack::find_largest_of_part(const WantedRows& wanted, int64_t part, int64_t parts) {
  const int64_t begin = settings_.head->part_begin(part, parts);
  const int64_t width = settings_.head->part_begin(part + 1, parts) - begin;
  for (int64_t row = 0; row < wanted.num_rows; ++row) {
    const char* logits = static_cast<const char*>(wanted.logits) + (row * settings_.vocab_size + begin) * item_bytes_;
    const int64_t best = kernels_.find_largest(logits, width);
    const int64_t place = row * parts + part;
    reinterpret_cast<int64_t*>(scratch_.best_tokens.data())[place] = best < 0 ? best : begin + best;
    std::memcpy(scratch_.best_logits.data() + place * item_bytes_, logits + std::max<int64_t>(best, 0) * item_bytes_,
                item_bytes_);
  }
}

void DecoderStack::find_largest_of_all(const WantedRows& wanted, int64_t parts) {
  for (int64_t row = 0; row < wanted.num_rows; ++row) {
    const auto* tokens = reinterpret_cast<const int64_t*>(scratch_.best_tokens.data()) + row * parts;
    if (*std::min_element(tokens, tokens + parts) < 0) {
      // Rare: a part without a finite maximum says nothing of the row.
      const char* logits = static_cast<const char*>(wanted.logits) + row * settings_.vocab_size * item_bytes_;
      wanted.largest[row] = kernels_.find_largest(logits, settings_.vocab_size);
    } else {
      wanted.largest[row] = tokens[kernels_.find_largest(scratch_.best_logits.data() + row * parts * item_bytes_, parts)];
    }
  }
}

// Gather the wanted rows of the residual, and those of the attention where Q was.
void DecoderStack::keep_wanted(Team& team, const WantedRows& wanted, int64_t attended_width) {
  const int64_t residual_bytes = settings_.hidden * item_bytes_;
  const int64_t attended_bytes = attended_width * item_bytes_;
  team.for_each_item(1, [&](int64_t, int64_t) {
    for (int64_t i = 0; i < wanted.num_rows; ++i) {
      std::memcpy(scratch_.wanted_residual.data() + i * residual_bytes,
                  scratch_.residual.data() + wanted.rows[i] * residual_bytes, residual_bytes);
      std::memcpy(scratch_.q.data() + i * attended_bytes,
                  scratch_.attended.data() + wanted.rows[i] * attended_bytes, attended_bytes);
    }
  });
}

}  // namespace disagg
