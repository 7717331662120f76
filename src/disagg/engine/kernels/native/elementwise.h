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

}  // namespace DISAGG_ISA
}  // namespace disagg
