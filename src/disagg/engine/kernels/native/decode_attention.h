// Attention of one new token over a range of its keys, for several KV heads at once.
//
// Decode waits for memory, so the order is memory's: block by block, K of all heads, then V of all heads, which is one
// run of bytes; and each vector that is read asks for its counterpart in what is read next.
#pragma once

#include "attention_rows.h"

namespace disagg {
namespace DISAGG_ISA {

template <class E>
class DecodeRange {
 public:
  // ``following`` are the first two blocks this thread will read after this range.
  DecodeRange(const AttentionArgs& args, const AttentionItem& item, const int32_t* following)
      : args_(args),
        item_(item),
        layout_(HeadLayout::of<E>(args)),
        table_(args.block_tables + item.sequence * args.table_stride),
        heads_(static_cast<const uint32_t*>(args.kv_layer) + item.kv_head * layout_.head_units),
        following_(following),
        num_rows_(item.num_kv_heads * args.group),
        queries_(reinterpret_cast<const uint32_t*>(static_cast<const Storage*>(args.q) + row_elements(0))) {
    if constexpr (E::kRowWords > 1) {
      widen_row<E>(static_cast<const Storage*>(args.q) + row_elements(0), int64_t{num_rows_} * args.head_dim, widened_);
      queries_ = widened_;
    }
    for (int row = 0; row < num_rows_; ++row) states_[row] = {Floats{}, kLowestOffset};
    __builtin_memset(values_, 0, num_rows_ * args_.head_dim * sizeof(float));
  }

  void run() {
    const int first = item_.key_begin / args_.block_size;
    const int last = (item_.key_end - 1) / args_.block_size;
    for (int block = first; block <= last; ++block) {
      const int32_t* next[2] = {block < last ? table_ + block + 1 : following_,
                                block + 1 < last ? table_ + block + 2 : following_ + (block == last)};
      attend_block(block * args_.block_size, table_[block], *next[0], *next[1]);
    }
  }

  void write_output() const {
    for (int row = 0; row < num_rows_; ++row)
      write_row<E>(static_cast<Storage*>(args_.out) + row_elements(row), values_ + row * args_.head_dim, sum_of_lanes(states_[row].sum),
                   args_.head_dim);
  }

  // Per row its offset, its sum, its values.
  void write_partial(float* partial) const {
    for (int row = 0; row < num_rows_; ++row, partial += args_.head_dim + 2) {
      partial[0] = states_[row].offset;
      partial[1] = sum_of_lanes(states_[row].sum);
      __builtin_memcpy(partial + 2, values_ + row * args_.head_dim, args_.head_dim * sizeof(float));
    }
  }

 private:
  using Storage = typename E::Storage;

  int64_t row_elements(int row) const {
    const int64_t first_head = int64_t{item_.first_row} * args_.num_kv_heads + item_.kv_head;
    return (first_head * args_.group + row) * args_.head_dim;
  }

  void attend_block(int key_begin, int32_t block, int32_t next, int32_t after_next) {
    const int keys_left = item_.key_end - key_begin;
    const int num_keys = keys_left < args_.block_size ? keys_left : args_.block_size;
    const int num_vectors = (num_keys + kLanes - 1) / kLanes;
    const int64_t to_next = (int64_t{next} - block) * layout_.block_units;
    const uint32_t* k = heads_ + block * layout_.block_units;
    const uint32_t* later = heads_ + after_next * layout_.block_units;
    for (int head = 0; head < item_.num_kv_heads; ++head) {
      touch(later + head * layout_.head_units);
      const uint32_t* k_vectors[kMaxBlockSize / kLanes];
      for (int vector = 0; vector < num_vectors; ++vector)
        k_vectors[vector] = k + head * layout_.head_units + vector * kLanes;
      for_row_groups(head * args_.group, (head + 1) * args_.group, [&](auto rows, int first) {
        score<E, rows.value>(queries_ + int64_t{first} * layout_.k_steps * E::kRowWords, k_vectors, num_vectors, layout_,
                                   AllAhead{ahead_of(head, to_next)}, scores_ + first * kScoreStride);
      });
    }
    const int position = item_.first_position - key_begin;
    const SeenKeys seen{position - args_.window + 1, num_keys};
    const auto apply = seen.first <= 0 && num_vectors * kLanes <= num_keys ? weigh<E, false> : weigh<E, true>;
    for (int row = 0; row < num_rows_; ++row) {
      float* scores = scores_ + row * kScoreStride;
      const float to_base_2 = cap_scores(args_, scores, num_vectors);
      corrections_[row] =
          apply(scores, weights_ + row * kWeightStride<E>, num_vectors, seen, to_base_2, states_[row]);
    }
    for (int head = 0; head < item_.num_kv_heads; ++head) {
      const uint32_t* v = k + layout_.v_units + head * layout_.head_units;
      touch(later + layout_.v_units + head * layout_.head_units);
      for_row_groups(head * args_.group, (head + 1) * args_.group, [&](auto rows, int first) {
        float corrections[rows.value];
        for (int r = 0; r < rows.value; ++r) corrections[r] = corrections_[first + r];
        add_values<E, rows.value>(weights_ + first * kWeightStride<E>, &v, num_keys, layout_,
                                        AllAhead{ahead_of(item_.num_kv_heads + head, to_next)}, corrections, values_ + first * args_.head_dim);
      });
    }
  }

  // Ask for a line of each page of a head two blocks ahead, so that its address is known when its bytes are asked for.
  void touch(const uint32_t* head) const {
    constexpr int kPageUnits = 1024;
    for (int64_t unit = 0; unit < layout_.head_units; unit += kPageUnits) prefetch(head + unit);
  }

  // From head ``head`` of K (V counted on) to the one that is read after it, maybe in the next block: 4 to 8 KiB, which
  // is what memory delivers in its latency. Farther ahead measured no better, a whole block ahead worse.
  int64_t ahead_of(int head, int64_t to_next) const {
    const int last = 2 * item_.num_kv_heads - 1;
    return head < last ? layout_.head_units : to_next - last * layout_.head_units;
  }

  const AttentionArgs& args_;
  const AttentionItem& item_;
  const HeadLayout layout_;
  const int32_t* table_;
  const uint32_t* heads_;
  const int32_t* following_;
  const int num_rows_;
  const uint32_t* queries_;  // one row behind the other
  alignas(64) uint32_t widened_[E::kRowWords > 1 ? kTileRows * kMaxHeadDim : 1];
  alignas(64) float values_[kTileRows * kMaxHeadDim];
  alignas(64) float scores_[kTileRows * kScoreStride];
  alignas(64) uint32_t weights_[kTileRows * kTileKeys];
  RowState states_[kTileRows];
  float corrections_[kTileRows];
};

// Join the partial results over consecutive ranges of one decode's keys.
template <class E>
void merge_ranges(const AttentionArgs& args, const AttentionItem& item, const float* partials, int num_partials) {
  const int64_t row_floats = args.head_dim + 2;
  const int num_rows = item.num_kv_heads * args.group;
  const int64_t stride = num_rows * row_floats;
  const int64_t first_head = (int64_t{item.first_row} * args.num_kv_heads + item.kv_head) * args.group;
  for (int row = 0; row < num_rows; ++row) {
    const float* first = partials + row * row_floats;
    float highest = kLowestOffset;
    for (int i = 0; i < num_partials; ++i) highest = first[i * stride] > highest ? first[i * stride] : highest;
    alignas(64) float values[kMaxHeadDim] = {};
    float sum = 0.0f;
    for (int i = 0; i < num_partials; ++i) {
      const float* part = first + i * stride;
      const float factor = exp2<5>(broadcast(part[0] - highest))[0];
      sum += part[1] * factor;
      for (int d = 0; d < args.head_dim; d += kLanes)
        store(values + d, load<Floats>(values + d) + load<Floats>(part + 2 + d) * factor);
    }
    write_row<E>(static_cast<typename E::Storage*>(args.out) + (first_head + row) * args.head_dim, values, sum,
                 args.head_dim);
  }
}

}  // namespace DISAGG_ISA
}  // namespace disagg
