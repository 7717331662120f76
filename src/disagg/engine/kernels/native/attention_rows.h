// What a group of R query rows does with some keys and values: the parts that prefill and decode are made of.
//
// Scores come as vectors over keys, so that no product ends in a horizontal sum; maxima and sums are kept per row while
// the keys pass (Milakov and Gimelshein 2018, as in FlashAttention).
#pragma once

#include "elementwise.h"
#include "kernel_table.h"
#include "micro_kernel.h"

namespace disagg {
namespace DISAGG_ISA {

// Far below any score, yet finite: differences of masked scores stay numbers.
constexpr float kMasked = -1e36f;
constexpr float kLowestOffset = -1e30f;

// How one KV head lies in the pool, in units.
struct HeadLayout {
  int k_steps;          // head_dim / w
  int head_dim;
  int block_size;
  int64_t head_units;   // K (or V) of one head of one block
  int64_t block_units;  // from one block to the next
  int64_t v_units;      // from K to V of the same head

  template <class E>
  static HeadLayout of(const AttentionArgs& args) {
    const int k_steps = args.head_dim / E::kPerUnit;
    const int64_t head_units = int64_t{args.block_size} * k_steps;
    return {k_steps,    args.head_dim, args.block_size, head_units, 2 * args.num_kv_heads * head_units,
            args.num_kv_heads * head_units};
  }
};

// Rows are kept apart by a constant, so that a register tile addresses them by displacement.
constexpr int kScoreStride = kTileKeys;
template <class E>
constexpr int kWeightStride = kTileKeys / E::kPerUnit * E::kRowWords;

template <class E, int R, int C, int Columns>
DISAGG_NOINLINE void score_columns(const uint32_t* queries, const uint32_t* const* k_vectors, const HeadLayout& layout,
                                 Ahead<Columns> ahead, float* scores) {
  Tile<R, C> tile;
  tile.clear();
  const uint32_t* columns[C];
  for (int c = 0; c < C; ++c) columns[c] = k_vectors[c];
  add_steps<E>(tile, {queries, layout.k_steps * E::kRowWords, E::kRowWords}, columns, layout.block_size, layout.k_steps,
               ahead);
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(scores + r * kScoreStride + c * kLanes, tile.sum[r][c]);
}

// Scores of R queries, one behind the other, with ``num_vectors`` vectors of kLanes keys.
template <class E, int R, int Columns>
void score(const uint32_t* queries, const uint32_t* const* k_vectors, int num_vectors, const HeadLayout& layout,
           Ahead<Columns> ahead, float* scores) {
  for_column_groups(0, num_vectors, [&](auto columns, int first) {
    score_columns<E, R, columns.value>(queries, k_vectors + first, layout, ahead, scores + first * kLanes);
  });
}

// Bound the scores of a row where the model bounds them. Returns what makes them logarithms base 2 of weights.
DISAGG_INLINE float cap_scores(const AttentionArgs& args, float* scores, int num_vectors) {
  if (args.softcap == 0.0f) return args.scale * kLog2E;
  for (int vector = 0; vector < num_vectors; ++vector) {
    float* at = scores + vector * kLanes;
    store(at, scaled_and_capped(load<Floats>(at), args.scale, args.softcap));
  }
  return kLog2E;
}

// What a row's weights are relative to, as a power of 2, and their sum so far, still per lane.
struct RowState {
  Floats sum;
  float offset;
};

// Weights may grow to 2^kSlack before the offset follows the maximum: after the first keys it hardly ever does, and a
// branch that nobody can predict costs more than all the arithmetic around it.
constexpr float kSlack = 8.0f;

// Keys that a row sees, counted from the first key at hand.
struct SeenKeys {
  int first;
  int end;
};

// Hide what a row does not see, return the maximum per lane.
template <bool Masked>
DISAGG_INLINE Floats mask_and_find_highest(float* scores, int num_vectors, SeenKeys seen) {
  Floats highest = broadcast(kMasked);
  for (int vector = 0; vector < num_vectors; ++vector) {
    Floats x = load<Floats>(scores + vector * kLanes);
    if constexpr (Masked) {
      const Ints key = lane_numbers(vector * kLanes);
      x = ((key >= seen.first) & (key < seen.end)) ? x : broadcast(kMasked);
      store(scores + vector * kLanes, x);
    }
    highest = maximum(highest, x);
  }
  return highest;
}

// Turn one row's scores into weights; return what the row's older values must be multiplied with.
template <class E, bool Masked>
DISAGG_INLINE float weigh(float* scores, uint32_t* weights, int num_vectors, SeenKeys seen, float to_base_2,
                          RowState& state) {
  const Floats highest = mask_and_find_highest<Masked>(scores, num_vectors, seen) * to_base_2;
  float correction = 1.0f;
  if (any_above(highest, state.offset + kSlack)) {
    const float newer = max_of_lanes(highest);
    correction = exp2<5>(broadcast(state.offset - newer))[0];
    state.sum *= correction;
    state.offset = newer;
  }
  Floats sum = Floats{};
  auto* row_weights = reinterpret_cast<typename RowOf<E>::Storage*>(weights);
  for (int vector = 0; vector < num_vectors; ++vector) {
    const Floats weight = exp2<E::kExpDegree>(load<Floats>(scores + vector * kLanes) * to_base_2 - state.offset);
    sum += weight;
    RowOf<E>::store_floats(row_weights + vector * kLanes, weight);
  }
  state.sum += sum;
  return correction;
}

// The last pair of keys may have one that nobody has written: its weight is 0, but its value may be NaN.
template <class E, int R, int C>
DISAGG_INLINE void add_half_step(Tile<R, C>& tile, const uint32_t* weights, const uint32_t* units) {
  typename E::Operand operands[C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) operands[c] = E::operand_of(load<Units>(units + c * kLanes) & 0x0000ffffu);
  add_step<E>(tile, {weights, kWeightStride<E>, E::kRowWords}, operands);
}

template <class E, int R, int C, int Columns>
DISAGG_NOINLINE void add_value_columns(const uint32_t* weights, const uint32_t* const* v_blocks, int num_keys,
                                     const HeadLayout& layout, Ahead<Columns> ahead, const float (&corrections)[R],
                                     float* values, int first_dim) {
  Tile<R, C> tile;
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
      tile.sum[r][c] = load<Floats>(values + r * layout.head_dim + first_dim + c * kLanes) * corrections[r];
  for (; num_keys > 0; num_keys -= layout.block_size, ++v_blocks) {
    const int keys = num_keys < layout.block_size ? num_keys : layout.block_size;
    const uint32_t* columns[C];
    for (int c = 0; c < C; ++c) columns[c] = *v_blocks + first_dim + c * kLanes;
    const int steps = keys / E::kPerUnit;
    add_steps<E>(tile, {weights, kWeightStride<E>, E::kRowWords}, columns, layout.head_dim, steps, ahead);
    if (keys % E::kPerUnit)
      add_half_step<E>(tile, weights + steps * E::kRowWords, columns[0] + int64_t{steps} * layout.head_dim);
    weights += steps * E::kRowWords;
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(values + r * layout.head_dim + first_dim + c * kLanes, tile.sum[r][c]);
}

// Add the weighted values of ``num_keys`` keys to R rows of ``values``, after multiplying these with ``corrections``.
template <class E, int R, int Columns>
void add_values(const uint32_t* weights, const uint32_t* const* v_blocks, int num_keys, const HeadLayout& layout,
                Ahead<Columns> ahead, const float (&corrections)[R], float* values) {
  for_column_groups(0, layout.head_dim / kLanes, [&](auto columns, int first) {
    add_value_columns<E, R, columns.value>(weights, v_blocks, num_keys, layout, ahead, corrections, values,
                                           first * kLanes);
  });
}

template <class E>
DISAGG_INLINE void write_row(void* out, const float* values, float sum, int head_dim) {
  const float inverse = 1.0f / sum;
  for (int d = 0; d < head_dim; d += kLanes)
    E::store_floats(static_cast<typename E::Storage*>(out) + d, load<Floats>(values + d) * inverse);
}

}  // namespace DISAGG_ISA
}  // namespace disagg
