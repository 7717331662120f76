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

// x * factor * weight; ``out`` may be x.
template <class E>
DISAGG_INLINE void scale_by(const typename E::Storage* x, float factor, const typename E::Storage* weight,
                            typename E::Storage* out, int64_t width) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    E::store_floats(out + i, E::load_floats(x + i) * factor * E::load_floats(weight + i));
  for (; i < width; ++i) out[i] = E::from_float(E::to_float(x[i]) * factor * E::to_float(weight[i]));
}

template <class E>
DISAGG_INLINE void normalise(const typename E::Storage* x, const void* weight, typename E::Storage* out, int64_t width,
                             float eps) {
  scale_by<E>(x, inverse_rms<E>(x, width, eps), static_cast<const typename E::Storage*>(weight), out, width);
}

template <class E>
DISAGG_INLINE void add_to(typename E::Storage* sum, const typename E::Storage* x, float multiplier, int64_t width) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    E::store_floats(sum + i, E::load_floats(sum + i) + E::load_floats(x + i) * multiplier);
  for (; i < width; ++i) sum[i] = E::from_float(E::to_float(sum[i]) + E::to_float(x[i]) * multiplier);
}

template <class E>
void rms_norm(const NormArgs& args, int64_t row_begin, int64_t row_end) {
  using Storage = typename E::Storage;
  for (int64_t row = row_begin; row < row_end; ++row) {
    Storage* source = static_cast<Storage*>(args.x) + row * args.width;
    if (args.x_norm != nullptr) normalise<E>(source, args.x_norm, source, args.width, args.eps);
    if (args.residual != nullptr) {
      Storage* sum = static_cast<Storage*>(args.residual) + row * args.width;
      add_to<E>(sum, source, args.multiplier, args.width);
      source = sum;
    }
    if (args.norm != nullptr)
      normalise<E>(source, args.norm, static_cast<Storage*>(args.out) + row * args.width, args.width, args.eps);
  }
}

DISAGG_INLINE Floats logistic(Floats x) { return 1.0f / (1.0f + exp2<5>(minimum(x * -kLog2E, broadcast(127.0f)))); }

DISAGG_INLINE Floats tanh(Floats x) { return 2.0f * logistic(2.0f * x) - 1.0f; }

struct Silu {
  static DISAGG_INLINE Floats of(Floats x) { return x / (1.0f + exp2<5>(minimum(x * -kLog2E, broadcast(127.0f)))); }
};

// The tanh approximation of GELU (Hendrycks and Gimpel 2016): x/2 (1 + tanh(z)) is x times the logistic function of 2z.
struct GeluTanh {
  static DISAGG_INLINE Floats of(Floats x) {
    const float sqrt_8_over_pi = 1.5957691216057308f;
    return x * logistic(sqrt_8_over_pi * x * (1.0f + 0.044715f * x * x));
  }
};

template <class E, class Activation>
void gate(const void* gate_up, void* out, int64_t width, int64_t row_begin, int64_t row_end) {
  using Storage = typename E::Storage;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const Storage* gate = static_cast<const Storage*>(gate_up) + row * 2 * width;
    const Storage* up = gate + width;
    Storage* to = static_cast<Storage*>(out) + row * width;
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes)
      E::store_floats(to + i, Activation::of(E::load_floats(gate + i)) * E::load_floats(up + i));
    for (; i < width; ++i)
      to[i] = E::from_float(Activation::of(broadcast(E::to_float(gate[i])))[0] * E::to_float(up[i]));
  }
}

DISAGG_INLINE Floats scaled_and_capped(Floats x, float scale, float cap) {
  return cap == 0.0f ? x * scale : cap * tanh(x * (scale / cap));
}

template <class E>
void scale_and_cap(void* x, float scale, float cap, int64_t begin, int64_t end) {
  auto* values = static_cast<typename E::Storage*>(x);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes)
    E::store_floats(values + i, scaled_and_capped(E::load_floats(values + i), scale, cap));
  for (; i < end; ++i) values[i] = E::from_float(scaled_and_capped(broadcast(E::to_float(values[i])), scale, cap)[0]);
}

}  // namespace DISAGG_ISA
}  // namespace disagg
