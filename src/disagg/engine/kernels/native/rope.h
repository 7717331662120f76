// Rotary position embedding of Q and K, and the way of K and V into the pool.
#pragma once

#include "elementwise.h"
#include "kernel_table.h"

namespace disagg {
namespace DISAGG_ISA {

// Normalise one head (where there is a norm, with what makes its elements' mean square 1), then rotate the first half of
// what turns with its second by the position's angles.
template <class E>
DISAGG_INLINE void rotate_head(const typename E::Storage* head, const typename E::Storage* norm, float factor,
                               const float* cos_sin, const RopeArgs& args, typename E::Storage* out) {
  alignas(64) float x[kMaxHeadDim];
  const int half = args.rotary_dim / 2;
  if (norm != nullptr) {
    scale_by<E>(head, factor, norm, out, args.head_dim);
    head = out;
  }
  for (int i = 0; i < args.head_dim; i += kLanes) store(x + i, E::load_floats(head + i));
  for (int i = 0; i < half; ++i) {
    const float left = x[i];
    const float right = x[i + half];
    x[i] = left * cos_sin[i] - right * cos_sin[i + half];
    x[i + half] = right * cos_sin[i] + left * cos_sin[i + half];
  }
  for (int i = 0; i < args.head_dim; i += kLanes) E::store_floats(out + i, load<Floats>(x + i));
}

// K of one token: its units lie block_size units apart.
template <class E>
DISAGG_INLINE void write_k(const typename E::Storage* k, uint32_t* to, int head_dim, int block_size) {
  for (int step = 0; step < head_dim / E::kPerUnit; ++step)
    __builtin_memcpy(to + step * block_size, k + step * E::kPerUnit, sizeof(uint32_t));
}

// V of one token; ``partner``, unless null, is V of the token that shares its units and is written along with it.
template <class E>
DISAGG_INLINE void write_v(const typename E::Storage* v, const typename E::Storage* partner, typename E::Storage* to,
                           int head_dim) {
  if constexpr (E::kPerUnit == 1) {
    __builtin_memcpy(to, v, head_dim * sizeof(*v));
  } else if (partner == nullptr) {
    for (int d = 0; d < head_dim; ++d) to[2 * d] = v[d];
  } else {
    for (int d = 0; d < head_dim; d += kLanes) {
      const Units low = __builtin_convertvector(load<Halves>(v + d), Units);
      const Units high = __builtin_convertvector(load<Halves>(partner + d), Units);
      store(to + 2 * d, low | high << 16);
    }
  }
}

template <class E>
struct Rope {
  using Storage = typename E::Storage;

  const RopeArgs& args;
  const int64_t row_elements = int64_t{args.num_heads + 2 * args.num_kv_heads} * args.head_dim;
  const int64_t head_elements = int64_t{args.block_size} * args.head_dim;

  const Storage* head_of(int64_t row, int64_t head) const {
    return static_cast<const Storage*>(args.qkv) + row * row_elements + head * args.head_dim;
  }

  Storage* block_of(int64_t row) const {
    const int64_t block = args.slots[row] / args.block_size;
    return static_cast<Storage*>(args.kv_layer) + block * 2 * args.num_kv_heads * head_elements;
  }

  // Turn the heads first_head .. first_head + count - 1 of a row, one after the other; ``write`` takes each one turned.
  template <class Write>
  void rotate(int64_t row, int first_head, int count, const void* norm, const Write& write) const {
    const float* cos_sin = args.cos_sin + int64_t{args.positions[row]} * args.rotary_dim;
    const Storage* head = head_of(row, first_head);
    const auto* weight = static_cast<const Storage*>(norm);
    const bool whole_row = norm != nullptr && args.norm_rows;
    float factor = whole_row ? inverse_rms<E>(head, int64_t{count} * args.head_dim, args.eps) : 1.0f;
    for (int index = 0; index < count; ++index, head += args.head_dim) {
      if (norm != nullptr && !whole_row) factor = inverse_rms<E>(head, args.head_dim, args.eps);
      write(index, [&](Storage* out) { rotate_head<E>(head, weight, factor, cos_sin, args, out); });
      if (whole_row) weight += args.head_dim;
    }
  }

  void rotate_q(int64_t row) const {
    Storage* out = static_cast<Storage*>(args.q_out) + row * args.num_heads * args.head_dim;
    rotate(row, 0, args.num_heads, args.q_norm,
           [&](int head, const auto& turn_into) { turn_into(out + head * args.head_dim); });
  }

  void write_rotated_k(int64_t row) const {
    alignas(64) Storage turned[kMaxHeadDim];
    Storage* to = block_of(row) + args.slots[row] % args.block_size * E::kPerUnit;
    rotate(row, args.num_heads, args.num_kv_heads, args.k_norm, [&](int head, const auto& turn_into) {
      turn_into(turned);
      write_k<E>(turned, reinterpret_cast<uint32_t*>(to + head * head_elements), args.head_dim, args.block_size);
    });
  }

  // Write V of ``row``, and of the next one if it may be written along. Returns how many rows that were.
  int write_values(int64_t row, int64_t row_end) const {
    const int place = args.slots[row] % args.block_size;
    const bool both = E::kPerUnit == 2 && place % 2 == 0 && row + 1 < row_end && args.slots[row + 1] == args.slots[row] + 1;
    Storage* to = block_of(row) + args.num_kv_heads * head_elements + place / E::kPerUnit * E::kPerUnit * args.head_dim +
                  place % E::kPerUnit;
    for (int head = 0; head < args.num_kv_heads; ++head, to += head_elements) {
      const int64_t source = args.num_heads + args.num_kv_heads + head;
      write_v<E>(head_of(row, source), both ? head_of(row + 1, source) : nullptr, to, args.head_dim);
    }
    return both ? 2 : 1;
  }
};

template <class E>
void rope_and_write_kv(const RopeArgs& args, int64_t row_begin, int64_t row_end) {
  const Rope<E> rope{args};
  for (int64_t row = row_begin; row < row_end; ++row) {
    rope.rotate_q(row);
    rope.write_rotated_k(row);
  }
  for (int64_t row = row_begin; row < row_end;) row += rope.write_values(row, row_end);
}

}  // namespace DISAGG_ISA
}  // namespace disagg
