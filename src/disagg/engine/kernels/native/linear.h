// Products with a weight matrix that was packed once.
//
// A panel is kPanelVectors * kLanes output features: [in_features / w][kPanelVectors][kLanes] units. A step of a register
// tile reads one run of bytes, and a product with few rows, which waits for memory, reads the matrix from end to end.
// Rows of the input are read as they are, or widened for all panels at once: for_row_bands.
#pragma once

#include "kernel_table.h"
#include "micro_kernel.h"

namespace disagg {
namespace DISAGG_ISA {

#if defined(__AVX512F__)
constexpr int kPanelVectors = 3;  // 8 x 3 accumulators, 3 operands, 1 broadcast of 32 registers
constexpr int kPanelRows = 8;
#else
constexpr int kPanelVectors = 2;
constexpr int kPanelRows = 4;
#endif
// Rows that are widened at once, where they are; a multiple of the heights of register tiles.
constexpr int64_t kBandRows = 96;
// How far ahead of a product with few rows memory is asked: some 12 KiB.
constexpr int kStepsAhead = 64;
constexpr int kPanelWidth = kPanelVectors * kLanes;

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

// Write the sums of a tile: scaled where the weight has scales, plus the bias.
template <class E, int R>
DISAGG_INLINE void store_tile(const Tile<R, kPanelVectors>& tile, const LinearArgs& args, int64_t row, int64_t panel) {
#pragma GCC unroll 8
  for (int c = 0; c < kPanelVectors; ++c) {
    const int64_t feature = panel * kPanelWidth + c * kLanes;
    const int64_t left = args.out_features - feature;
    const Floats scale = args.scale == nullptr ? broadcast(1.0f) : load<Floats>(args.scale + feature);
    const Floats bias = args.bias == nullptr ? Floats{} : load<Floats>(args.bias + feature);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      auto* out = static_cast<typename E::Storage*>(args.out) + (row + r) * args.out_features + feature;
      const Floats sum = tile.sum[r][c] * scale + bias;
      if (left >= kLanes) {
        E::store_floats(out, sum);
      } else {
        for (int lane = 0; lane < left; ++lane) out[lane] = E::from_float(sum[lane]);
      }
    }
  }
}

// The rows of the input from ``row`` on.
template <class E>
DISAGG_INLINE RowUnits rows_of(const LinearArgs& args, int64_t row) {
  const int64_t words = args.in_features / E::kPerUnit * E::kRowWords;
  return {static_cast<const uint32_t*>(args.x) + row * words, words, E::kRowWords};
}

// (With the panel's address as an argument, GCC 12 makes this a third slower.)
template <class E, int R, int Columns>
DISAGG_NOINLINE void multiply_tile(const LinearArgs& args, int64_t row, int64_t panel, Ahead<Columns> ahead) {
  const int64_t steps = args.in_features / E::kPerUnit;
  Tile<R, kPanelVectors> tile;
  tile.clear();
  const uint32_t* columns[kPanelVectors];
  for (int c = 0; c < kPanelVectors; ++c)
    columns[c] = static_cast<const uint32_t*>(args.packed) + panel * steps * kPanelWidth + c * kLanes;
  add_steps<E>(tile, rows_of<E>(args, row), columns, kPanelWidth, static_cast<int>(steps), ahead);
  store_tile<E>(tile, args, row, panel);
}

// Whole groups of rows times a panel. A panel passes from memory to the second-level cache while the last groups of the
// panel before it are multiplied, a column at a time, so that the multipliers do not wait for it.
template <class E>
void multiply_groups(const LinearArgs& args, int64_t row, int64_t num_groups, int64_t panel) {
  const ptrdiff_t next = args.in_features / E::kPerUnit * kPanelWidth;
  for (int64_t left = num_groups; left > 0; --left, row += kPanelRows) {
    if (num_groups == 1) {
      multiply_tile<E, kPanelRows>(args, row, panel, AllAhead{next});
    } else if (left == 1) {
      multiply_tile<E, kPanelRows>(args, row, panel, Ahead<4>{next});
    } else if (left == 2 && num_groups == 2) {
      multiply_tile<E, kPanelRows>(args, row, panel, Ahead<3>{next});
    } else if (left == 2) {
      multiply_tile<E, kPanelRows>(args, row, panel, Ahead<2>{next});
    } else if (left == 3) {
      multiply_tile<E, kPanelRows>(args, row, panel, Ahead<1>{next});
    } else {
      multiply_tile<E, kPanelRows>(args, row, panel, NothingAhead{});
    }
  }
}

// Words of the rows that for_row_bands widens at once.
template <class E>
int64_t band_words(int64_t rows, int64_t in_features) {
  return E::kRowWords == 1 ? 0 : (rows < kBandRows ? rows : kBandRows) * in_features;
}

// Call ``multiply(args, row_begin, row_end)`` where these are rows as RowOf has them. ``words`` has room for band_words.
template <class E, class Multiply>
DISAGG_INLINE void for_row_bands(LinearArgs args, uint32_t* words, int64_t row_begin, int64_t row_end,
                                 const Multiply& multiply) {
  if constexpr (E::kRowWords == 1) {
    multiply(args, row_begin, row_end);
  } else {
    const auto* x = static_cast<const typename E::Storage*>(args.x);
    for (int64_t begin = row_begin; begin < row_end; begin += kBandRows) {
      const int64_t end = begin + kBandRows < row_end ? begin + kBandRows : row_end;
      widen_row<E>(x + begin * args.in_features, (end - begin) * args.in_features, words);
      args.x = words - begin * args.in_features;
      multiply(args, begin, end);
    }
  }
}

template <class E>
int64_t linear_scratch(int64_t rows, int64_t in_features) {
  return band_words<E>(rows, in_features) + in_features / E::kPerUnit * kPanelWidth;
}

// As multiply, of rows as RowOf has them.
template <class E>
void multiply_band(const LinearArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end) {
  const int64_t num_rows = row_end - row_begin;
  if (num_rows <= kPanelRows) {
    for (int64_t panel = panel_begin; panel < panel_end; ++panel)
      for_row_groups<kPanelRows>(row_begin, row_end, [&](auto rows, int64_t row) {
        multiply_tile<E, rows.value>(args, row, panel, AllAhead{kStepsAhead * kPanelWidth});
      });
    return;
  }
  const int64_t num_groups = num_rows / kPanelRows;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    multiply_groups<E>(args, row_begin, num_groups, panel);
    for_row_groups<kPanelRows - 1>(row_begin + num_groups * kPanelRows, row_end, [&](auto rows, int64_t row) {
      multiply_tile<E, rows.value>(args, row, panel, NothingAhead{});
    });
  }
}

// Rows row_begin .. row_end - 1, panels panel_begin .. panel_end - 1: a panel stays in the second-level cache while all
// rows pass.
template <class E>
void multiply(const LinearArgs& args, uint32_t* scratch, int64_t row_begin, int64_t row_end, int64_t panel_begin,
              int64_t panel_end) {
  for_row_bands<E>(args, scratch, row_begin, row_end, [&](const LinearArgs& band, int64_t begin, int64_t end) {
    multiply_band<E>(band, begin, end, panel_begin, panel_end);
  });
}

}  // namespace DISAGG_ISA
}  // namespace disagg
