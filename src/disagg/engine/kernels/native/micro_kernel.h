// The register-tiled product that all matrix arithmetic here is made of.
#pragma once

#include "simd.h"

namespace disagg {
namespace DISAGG_ISA {

template <int R, int C>
struct Tile {
  Floats sum[R][C];

  DISAGG_INLINE void clear() {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[r][c] = Floats{};
  }
};

// Add one step: for each row r and column vector c, sum[r][c] += a[r * ARow] (one unit) * b[c] (a vector of units).
template <class E, int ARow, int R, int C>
DISAGG_INLINE void add_step(Tile<R, C>& tile, const uint32_t* a, const typename E::Operand (&b)[C]) {
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
    const typename E::Factor factor = E::factor(a[r * ARow]);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) tile.sum[r][c] = E::multiply_add(tile.sum[r][c], factor, b[c]);
  }
}

// Add ``steps`` steps. ``a`` moves by AStep units per step, the column pointers ``b`` by ``b_step`` units. With Prefetch,
// what lies ``ahead`` units behind each vector is asked for: it will be wanted soon.
template <class E, int ARow, int AStep, bool Prefetch, int R, int C>
DISAGG_INLINE void add_steps(Tile<R, C>& tile, const uint32_t* a, const uint32_t* const (&b)[C], ptrdiff_t b_step,
                             int steps, ptrdiff_t ahead) {
  ptrdiff_t at = 0;
  for (int step = 0; step < steps; ++step, at += b_step, a += AStep) {
    typename E::Operand operands[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      operands[c] = E::operand(b[c] + at);
      E::keep(operands[c]);
    }
    if constexpr (Prefetch) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) prefetch(b[c] + at + ahead);
    }
    add_step<E, ARow>(tile, a, operands);
  }
}

}  // namespace DISAGG_ISA
}  // namespace disagg
