// Products with a weight matrix of int8 values and one scale per output feature.
//
// Panels are those of linear.h with a byte for every element. Integers up to 127 are exact in bfloat16, so a product of
// few rows widens each byte as it comes, and one of many rows widens a panel once; both give the same sums.
#pragma once

#include "linear.h"

namespace disagg {
namespace DISAGG_ISA {

// Rows up to which widening the bytes anew for each group of rows costs less than writing them down (measured: 64 on
// Zen 5).
constexpr int kWideningRows = 8 * kPanelRows;
// How far ahead memory is asked: some 6 KiB.
constexpr int kInt8StepsAhead = 64;

template <class E>
constexpr int64_t kInt8StepBytes = int64_t{kPanelWidth} * E::kPerUnit;

// As pack_weight, from int8 [out_features, in_features].
template <class E>
void pack_int8(const int8_t* weight, int8_t* packed, int64_t out_features, int64_t in_features, int64_t panel_begin,
               int64_t panel_end) {
  const int64_t steps = in_features / E::kPerUnit;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel)
    for (int lane = 0; lane < kPanelWidth; ++lane) {
      const int64_t row = panel * kPanelWidth + lane;
      int8_t* to = packed + panel * steps * kInt8StepBytes<E> + lane * E::kPerUnit;
      const int8_t* from = weight + row * in_features;
      for (int64_t step = 0; step < steps; ++step)
        for (int part = 0; part < E::kPerUnit; ++part)
          to[step * kInt8StepBytes<E> + part] = row < out_features ? from[step * E::kPerUnit + part] : 0;
    }
}

template <class E, int R>
DISAGG_NOINLINE void multiply_int8_tile(const LinearArgs& args, int64_t row, int64_t panel) {
  const int64_t steps = args.in_features / E::kPerUnit;
  const int8_t* bytes = static_cast<const int8_t*>(args.packed) + panel * steps * kInt8StepBytes<E>;
  RowUnits x = rows_of<E>(args, row);
  Tile<R, kPanelVectors> tile;
  tile.clear();
  for (int64_t step = 0; step < steps; ++step, bytes += kInt8StepBytes<E>, x.first += x.step) {
    typename E::Operand operands[kPanelVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kPanelVectors; ++c) {
      operands[c] = E::operand_of_int8(bytes + c * kLanes * E::kPerUnit);
      E::keep(operands[c]);
    }
    prefetch(bytes + kInt8StepsAhead * kInt8StepBytes<E>);
    prefetch(bytes + (kInt8StepsAhead + 1) * kInt8StepBytes<E> - 1);
    add_step<E>(tile, x, operands);
  }
  store_tile<E>(tile, args, row, panel);
}

// Write the units of a panel, as linear.h wants them.
template <class E>
void widen_panel(const LinearArgs& args, int64_t panel, uint32_t* units) {
  const int64_t num_vectors = args.in_features / E::kPerUnit * kPanelVectors;
  const int8_t* bytes = static_cast<const int8_t*>(args.packed) + panel * num_vectors * kLanes * E::kPerUnit;
  for (int64_t vector = 0; vector < num_vectors; ++vector)
    store(units + vector * kLanes, E::units_of(E::operand_of_int8(bytes + vector * kLanes * E::kPerUnit)));
}

// As multiply_band; ``units`` has room for one widened panel.
template <class E>
void multiply_int8_band(const LinearArgs& args, uint32_t* units, int64_t row_begin, int64_t row_end,
                        int64_t panel_begin, int64_t panel_end) {
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    if (row_end - row_begin <= kWideningRows) {
      for_row_groups<kPanelRows>(row_begin, row_end, [&](auto rows, int64_t row) {
        multiply_int8_tile<E, rows.value>(args, row, panel);
      });
    } else {
      widen_panel<E>(args, panel, units);
      LinearArgs widened = args;
      widened.packed = units - panel * (args.in_features / E::kPerUnit) * kPanelWidth;
      for_row_groups<kPanelRows>(row_begin, row_end, [&](auto rows, int64_t row) {
        multiply_tile<E, rows.value>(widened, row, panel, NothingAhead{});
      });
    }
  }
}

// As multiply.
template <class E>
void multiply_int8(const LinearArgs& args, uint32_t* scratch, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                   int64_t panel_end) {
  uint32_t* units = scratch + band_words<E>(row_end - row_begin, args.in_features);
  for_row_bands<E>(args, scratch, row_begin, row_end, [&](const LinearArgs& band, int64_t begin, int64_t end) {
    multiply_int8_band<E>(band, units, begin, end, panel_begin, panel_end);
  });
}

}  // namespace DISAGG_ISA
}  // namespace disagg
