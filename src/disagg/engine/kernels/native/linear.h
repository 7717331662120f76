// Products with a weight matrix that was packed once.
//
// A panel is kLanes output features: [in_features / w][kLanes] units, so that a step of a register tile reads one vector
// per panel. Rows of the input are read as they are.
#pragma once

#include "kernel_table.h"
#include "micro_kernel.h"

namespace disagg {
namespace DISAGG_ISA {

constexpr int kPanelWidth = kLanes;

// Pack panels panel_begin .. panel_end - 1 of ``weight`` [out_features, in_features]; missing rows become zeros.
template <class E>
void pack_weight(const void* weight, uint32_t* packed, int64_t out_features, int64_t in_features, int64_t panel_begin,
                 int64_t panel_end) {
  const int64_t steps = in_features / E::kPerUnit;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel)
    for (int lane = 0; lane < kPanelWidth; ++lane) {
      const int64_t row = panel * kPanelWidth + lane;
      uint32_t* to = packed + panel * steps * kPanelWidth + lane;
      const uint32_t* from = static_cast<const uint32_t*>(weight) + row * steps;
      for (int64_t step = 0; step < steps; ++step) to[step * kPanelWidth] = row < out_features ? from[step] : 0;
    }
}

template <class E, int R, int C>
DISAGG_INLINE void multiply_tile(const LinearArgs& args, int64_t row, int64_t panel) {
  const int64_t steps = args.in_features / E::kPerUnit;
  Tile<R, C> tile;
  tile.clear();
  const uint32_t* panels[C];
  for (int c = 0; c < C; ++c) panels[c] = args.packed + (panel + c) * steps * kPanelWidth;
  const uint32_t* x = static_cast<const uint32_t*>(args.x) + row * steps;
  add_steps<E>(tile, {x, steps, 1}, panels, kPanelWidth, static_cast<int>(steps), NothingAhead{});
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    const int64_t feature = (panel + c) * kPanelWidth;
    const int64_t left = args.out_features - feature;
    const Floats bias = args.bias == nullptr ? Floats{} : load<Floats>(args.bias + feature);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      auto* out = static_cast<typename E::Storage*>(args.out) + (row + r) * args.out_features + feature;
      const Floats sum = tile.sum[r][c] + bias;
      if (left >= kPanelWidth) {
        E::store_floats(out, sum);
      } else {
        for (int lane = 0; lane < left; ++lane) out[lane] = E::from_float(sum[lane]);
      }
    }
  }
}

// Rows row_begin .. row_end - 1, panels panel_begin .. panel_end - 1: a few panels stay in the second-level cache while
// all rows pass.
template <class E>
void multiply(const LinearArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  for_column_groups(static_cast<int>(panel_begin), static_cast<int>(panel_end - panel_begin),
                    [&](auto columns, int panel) {
                      for_row_groups(row_begin, row_end, [&](auto rows, int64_t row) {
                        multiply_tile<E, rows.value, columns.value>(args, row, panel);
                      });
                    });
}

}  // namespace DISAGG_ISA
}  // namespace disagg
