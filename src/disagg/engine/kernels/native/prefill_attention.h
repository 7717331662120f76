// Attention of a tile of new tokens of one sequence: the query heads of one KV head times some consecutive tokens.
//
// Keys pass in tiles of kTileKeys that stay in the first-level cache while all groups of rows use them.
#pragma once

#include "attention_rows.h"

namespace disagg {
namespace DISAGG_ISA {

template <class E>
class PrefillTile {
 public:
  PrefillTile(const AttentionArgs& args, const AttentionItem& item)
      : args_(args),
        item_(item),
        layout_(HeadLayout::of<E>(args)),
        table_(args.block_tables + item.sequence * args.table_stride),
        head_(static_cast<const uint32_t*>(args.kv_layer) + item.kv_head * layout_.head_units),
        num_rows_(item.num_tokens * args.group) {
    const int64_t width = int64_t{args.group} * args.head_dim;
    for (int token = 0; token < item.num_tokens; ++token)
      widen_row<E>(static_cast<const Storage*>(args.q) + row_elements(token * args.group), width,
                   queries_ + token * width / E::kPerUnit * E::kRowWords);
    for (int row = 0; row < num_rows_; ++row) states_[row] = {Floats{}, kLowestOffset};
    __builtin_memset(values_, 0, num_rows_ * args_.head_dim * sizeof(float));
  }

  void run() {
    int end;
    for (int begin = item_.key_begin; begin < item_.key_end; begin = end) {
      end = begin - begin % kTileKeys + kTileKeys;
      if (end > item_.key_end) end = item_.key_end;
      point_at_keys(begin, end);
      for_row_groups(0, num_rows_, [&](auto rows, int first) { attend<rows.value>(first); });
    }
    for (int row = 0; row < num_rows_; ++row)
      write_row<E>(static_cast<Storage*>(args_.out) + row_elements(row), values_ + row * args_.head_dim, sum_of_lanes(states_[row].sum),
                   args_.head_dim);
  }

 private:
  using Storage = typename E::Storage;

  // Offset of a row in q and in the output.
  int64_t row_elements(int row) const {
    const int64_t token = item_.first_row + row / args_.group;
    const int64_t head = int64_t{item_.kv_head} * args_.group + row % args_.group;
    return (token * args_.num_kv_heads * args_.group + head) * args_.head_dim;
  }

  int position(int row) const { return item_.first_position + row / args_.group; }

  void point_at_keys(int begin, int end) {
    key_begin_ = begin;
    key_end_ = end;
    const int vectors_per_block = args_.block_size / kLanes;
    const int32_t* blocks = table_ + begin / args_.block_size;
    for (int index = 0; index * args_.block_size < end - begin; ++index) {
      const uint32_t* k = head_ + blocks[index] * layout_.block_units;
      v_blocks_[index] = k + layout_.v_units;
      for (int vector = 0; vector < vectors_per_block; ++vector)
        k_vectors_[index * vectors_per_block + vector] = k + vector * kLanes;
    }
  }

  // Let rows first .. first + R - 1 see the keys at hand.
  template <int R>
  void attend(int first) {
    const int last_position = position(first + R - 1);
    const int num_keys = (last_position + 1 < key_end_ ? last_position + 1 : key_end_) - key_begin_;
    if (num_keys <= 0) return;
    const int num_vectors = (num_keys + kLanes - 1) / kLanes;
    score<E, R>(queries_ + int64_t{first} * layout_.k_steps * E::kRowWords, k_vectors_, num_vectors, layout_,
                NothingAhead{}, scores_);
    float corrections[R];
    for (int r = 0; r < R; ++r) {
      const int place = position(first + r) - key_begin_;
      const SeenKeys seen{place - args_.window + 1, place + 1 < key_end_ - key_begin_ ? place + 1 : key_end_ - key_begin_};
      const auto apply = seen.first <= 0 && num_vectors * kLanes <= seen.end ? weigh<E, false> : weigh<E, true>;
      float* scores = scores_ + r * kScoreStride;
      const float to_base_2 = cap_scores(args_, scores, num_vectors);
      corrections[r] =
          apply(scores, weights_ + r * kWeightStride<E>, num_vectors, seen, to_base_2, states_[first + r]);
    }
    add_values<E, R>(weights_, v_blocks_, num_keys, layout_, NothingAhead{}, corrections, values_ + first * args_.head_dim);
  }

  const AttentionArgs& args_;
  const AttentionItem& item_;
  const HeadLayout layout_;
  const int32_t* table_;
  const uint32_t* head_;
  int num_rows_;
  alignas(64) uint32_t queries_[kTileRows * kMaxHeadDim];
  alignas(64) float values_[kTileRows * kMaxHeadDim];
  RowState states_[kTileRows];
  // The keys at hand, and the scores and weights of one group of rows.
  int key_begin_;
  int key_end_;
  const uint32_t* k_vectors_[kTileKeys / kLanes];
  const uint32_t* v_blocks_[kTileKeys / kMinBlockSize];
  alignas(64) float scores_[kMaxRows * kScoreStride];
  alignas(64) uint32_t weights_[kMaxRows * kTileKeys];
};

}  // namespace DISAGG_ISA
}  // namespace disagg
