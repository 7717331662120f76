// The small operations of a decoder layer. Sums are float32; every result is rounded once.
#pragma once

#include "kernel_table.h"
#include "simd.h"

namespace disagg {
namespace DISAGG_ISA {

template <class E>
DISAGG_INLINE float inverse_rms(const typename E::Storage* x, int64_t width, float eps) {
  Floats sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const Floats part = E::load_floats(x + i + k * kLanes);
      sums[k] += part * part;
    }
  for (; i + kLanes <= width; i += kLanes) {
    const Floats part = E::load_floats(x + i);
    sums[0] += part * part;
  }
  float sum = sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < width; ++i) sum += E::to_float(x[i]) * E::to_float(x[i]);
  return 1.0f / __builtin_sqrtf(sum / static_cast<float>(width) + eps);
}

template <class E>
DISAGG_INLINE void normalise(const typename E::Storage* x, const typename E::Storage* weight, typename E::Storage* out,
                             int64_t width, float eps) {
  const float factor = inverse_rms<E>(x, width, eps);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    E::store_floats(out + i, E::load_floats(x + i) * factor * E::load_floats(weight + i));
  for (; i < width; ++i) out[i] = E::from_float(E::to_float(x[i]) * factor * E::to_float(weight[i]));
}

template <class E>
DISAGG_INLINE void add_to(typename E::Storage* sum, const typename E::Storage* x, int64_t width) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) E::store_floats(sum + i, E::load_floats(sum + i) + E::load_floats(x + i));
  for (; i < width; ++i) sum[i] = E::from_float(E::to_float(sum[i]) + E::to_float(x[i]));
}

template <class E>
void rms_norm(const void* x, void* residual, const void* weight, void* out, int64_t width, float eps,
              int64_t row_begin, int64_t row_end) {
  using Storage = typename E::Storage;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const Storage* source = static_cast<const Storage*>(x) + row * width;
    if (residual != nullptr) {
      Storage* sum = static_cast<Storage*>(residual) + row * width;
      add_to<E>(sum, source, width);
      source = sum;
    }
    normalise<E>(source, static_cast<const Storage*>(weight), static_cast<Storage*>(out) + row * width, width, eps);
  }
}

DISAGG_INLINE Floats silu(Floats x) { return x / (1.0f + exp2<5>(minimum(x * -kLog2E, broadcast(127.0f)))); }

template <class E>
void silu_and_mul(const void* gate_up, void* out, int64_t width, int64_t row_begin, int64_t row_end) {
  using Storage = typename E::Storage;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const Storage* gate = static_cast<const Storage*>(gate_up) + row * 2 * width;
    const Storage* up = gate + width;
    Storage* to = static_cast<Storage*>(out) + row * width;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes)
      E::store_floats(to + i, silu(E::load_floats(gate + i)) * E::load_floats(up + i));
    for (; i < width; ++i)
      to[i] = E::from_float(silu(broadcast(E::to_float(gate[i])))[0] * E::to_float(up[i]));
  }
}

// The first of the largest; a NaN is never chosen.
template <class E>
void argmax(const void* logits, int64_t* out, int64_t width, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const typename E::Storage* x = static_cast<const typename E::Storage*>(logits) + row * width;
    Floats highest = broadcast(-__builtin_inff());
    Ints where = Ints{};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      const Floats part = E::load_floats(x + i);
      const Ints better = part > highest;
      where = better ? Ints{} + static_cast<int32_t>(i) : where;
      highest = better ? part : highest;
    }
    const float best = max_of_lanes(highest);
    float found = best;
    int64_t index = width;
    for (int lane = 0; lane < kLanes; ++lane)
      if (highest[lane] == best && where[lane] + lane < index) index = where[lane] + lane;
    for (; i < width; ++i)
      if (E::to_float(x[i]) > found) {
        found = E::to_float(x[i]);
        index = i;
      }
    out[row] = index < width ? index : 0;
  }
}

// Rotate one head by its position's angles (first half of the head with the second), after its norm, into floats.
template <class E>
DISAGG_INLINE void rotate_head(const typename E::Storage* head, const typename E::Storage* norm, const float* cos_sin,
                               int head_dim, float eps, float* out) {
  const int half = head_dim / 2;
  const float factor = norm == nullptr ? 1.0f : inverse_rms<E>(head, head_dim, eps);
  if (norm == nullptr) {
    for (int i = 0; i < head_dim; ++i) out[i] = E::to_float(head[i]);
  } else {
    // Rounded in between, as every other norm's result is.
    for (int i = 0; i < head_dim; ++i)
      out[i] = E::to_float(E::from_float(E::to_float(head[i]) * factor * E::to_float(norm[i])));
  }
  for (int i = 0; i < half; ++i) {
    const float left = out[i];
    const float right = out[i + half];
    out[i] = left * cos_sin[i] - right * cos_sin[i + half];
    out[i + half] = right * cos_sin[i] + left * cos_sin[i + half];
  }
}

template <class E>
void rope_and_write_kv(const RopeArgs& args, int64_t row_begin, int64_t row_end) {
  using Storage = typename E::Storage;
  constexpr int w = E::kPerUnit;
  const int head_dim = args.head_dim;
  const int64_t num_heads = args.num_heads;
  const int64_t num_kv_heads = args.num_kv_heads;
  const int64_t head_elements = int64_t{args.block_size} * head_dim;
  alignas(64) float turned[kMaxHeadDim];
  for (int64_t row = row_begin; row < row_end; ++row) {
    const Storage* heads = static_cast<const Storage*>(args.qkv) + row * (num_heads + 2 * num_kv_heads) * head_dim;
    const float* cos_sin = args.cos_sin + int64_t{args.positions[row]} * head_dim;
    Storage* q_out = static_cast<Storage*>(args.q_out) + row * num_heads * head_dim;
    for (int64_t head = 0; head < num_heads; ++head) {
      rotate_head<E>(heads + head * head_dim, static_cast<const Storage*>(args.q_norm), cos_sin, head_dim, args.eps,
                     turned);
      for (int d = 0; d < head_dim; ++d) q_out[head * head_dim + d] = E::from_float(turned[d]);
    }
    const int64_t block = args.slots[row] / args.block_size;
    const int place = args.slots[row] % args.block_size;
    Storage* block_start = static_cast<Storage*>(args.kv_layer) + block * 2 * num_kv_heads * head_elements;
    for (int64_t head = 0; head < num_kv_heads; ++head) {
      rotate_head<E>(heads + (num_heads + head) * head_dim, static_cast<const Storage*>(args.k_norm), cos_sin,
                     head_dim, args.eps, turned);
      Storage* k = block_start + head * head_elements + place * w;
      for (int d = 0; d < head_dim; ++d) k[d / w * args.block_size * w + d % w] = E::from_float(turned[d]);
      const Storage* value = heads + (num_heads + num_kv_heads + head) * head_dim;
      Storage* v = block_start + (num_kv_heads + head) * head_elements + place / w * w * head_dim + place % w;
      for (int d = 0; d < head_dim; ++d) v[d * w] = value[d];
    }
  }
}

}  // namespace DISAGG_ISA
}  // namespace disagg
