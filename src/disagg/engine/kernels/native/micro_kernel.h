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

// The rows' side of a product, as RowOf has it: the unit of row r at step s is at first[r * row + s * step].
struct RowUnits {
  const uint32_t* first;
  ptrdiff_t row;
  ptrdiff_t step;
};

// What to ask memory for while the steps pass: the counterparts, ``units`` behind them, of those columns of a step whose
// bits are set in Columns.
template <int Columns>
struct Ahead {
  ptrdiff_t units;
  DISAGG_INLINE void operator()(int column, const uint32_t* vector) const {
    if (Columns >> column & 1) prefetch(vector + units);
  }
};
using AllAhead = Ahead<-1>;
using NothingAhead = Ahead<0>;

// Add one step: for each row r and column vector c, sum[r][c] += (one unit of row r) * b[c] (a vector of units).
template <class E, int R, int C>
DISAGG_INLINE void add_step(Tile<R, C>& tile, const RowUnits& a, const typename E::Operand (&b)[C]) {
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
    const typename E::Factor factor = E::factor(a.first + r * a.row);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) tile.sum[r][c] = E::multiply_add(tile.sum[r][c], factor, b[c]);
  }
}

// Add ``steps`` steps; the column pointers ``b`` move by ``b_step`` units per step.
template <class E, int R, int C, int Columns>
DISAGG_INLINE void add_steps(Tile<R, C>& tile, RowUnits a, const uint32_t* const (&b)[C], ptrdiff_t b_step, int steps,
                             Ahead<Columns> ahead) {
  ptrdiff_t at = 0;
  for (int step = 0; step < steps; ++step, at += b_step, a.first += a.step) {
    typename E::Operand operands[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      operands[c] = E::operand(b[c] + at);
      E::keep(operands[c]);
      ahead(c, b[c] + at);
    }
    add_step<E>(tile, a, operands);
  }
}

// Call ``body(Count<C>, first)`` over ``count`` column vectors, in portions of up to kMaxColumns. 5 go as 3 + 2 and 6 as
// 3 + 3: a single column would leave the multipliers waiting for loads.
template <int N>
struct Count {
  static constexpr int value = N;
};

template <class Body>
DISAGG_INLINE void for_column_groups(int first, int count, const Body& body) {
  if constexpr (kMaxColumns == 4) {
    for (; count > 6 || count == 4; count -= 4, first += 4) body(Count<4>{}, first);
    for (; count >= 3; count -= 3, first += 3) body(Count<3>{}, first);
  }
  for (; count >= 2; count -= 2, first += 2) body(Count<2>{}, first);
  if (count == 1) body(Count<1>{}, first);
}

// Call ``body(Count<R>, first row)`` for all rows, kMaxRows at a time, then for those left.
template <int R = kMaxRows, class Body>
DISAGG_INLINE void for_row_groups(int64_t row, int64_t end, const Body& body) {
  if constexpr (R > 0) {
    for (; end - row >= R; row += R) body(Count<R>{}, row);
    for_row_groups<R - 1>(row, end, body);
  }
}

}  // namespace DISAGG_ISA
}  // namespace disagg
