// Products with a weight matrix in the blocks of a GGUF file: integers of 4 or 8 bits, and for each block of 16 or 32 of
// them along a row a scale, perhaps an offset. A weight is scale * integer - offset.
//
// Panels are those of linear.h. For each super-block of a panel come its scales and offsets as float16, then for each
// block its own small integers that these are multiplied with (K-quants), then the values: bytes as in linear_int8.h, or
// eight 4-bit values along a row in each 32-bit lane. The integers are exact in bfloat16. A block's products are added
// up, then scaled: what a row gives depends neither on other rows nor on whether a panel was widened for many of them.
#pragma once

#include "linear.h"

namespace disagg {
namespace DISAGG_ISA {

constexpr int kSuperBlock = 256;
constexpr int kNibbleFeatures = 8;  // 4-bit values in a lane

template <int Bits, int Features, bool SubScales, bool Offsets>
struct Blocks {
  static constexpr int kBits = Bits;
  static constexpr int kFeatures = Features;
  static constexpr bool kSubScales = SubScales;
  static constexpr bool kOffsets = Offsets;
  // Blocks that share float16 scales.
  static constexpr int kPerSuper = SubScales ? kSuperBlock / Features : 1;
  static constexpr int64_t kSuperBytes = int64_t{kPanelWidth} * 2 * (1 + Offsets);
  static constexpr int64_t kSubBytes = SubScales ? int64_t{kPanelWidth} * (1 + Offsets) : 0;
  static constexpr int64_t kValueBytes = int64_t{kPanelWidth} * Features * Bits / 8;
  static constexpr int64_t panel_bytes(int64_t in_features) {
    const int64_t blocks = in_features / Features;
    return blocks / kPerSuper * kSuperBytes + blocks * (kSubBytes + kValueBytes);
  }
};

#if defined(__AVX512F__)
constexpr int kBlockRows = 4;  // sums of a block and of all: twice the accumulators of linear.h
#else
constexpr int kBlockRows = 2;
#endif
// Rows up to which the integers are unpacked anew for each group of rows; for more they are written down.
constexpr int kUnpackingRows = 4;
constexpr int kBlockBytesAhead = 4 << 10;

// Numbers per panel and block of a widened panel, in front of its units: scales and offsets.
constexpr int64_t kWidenedScales = 2 * kPanelWidth;

// Exact, and without floats that are subnormal: arithmetic with these takes a hundred cycles, and small scales of float16
// are subnormal.
DISAGG_INLINE Floats floats_of_halves(const void* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(load<__m256i>(from));
#else
  const Units halves = __builtin_convertvector(load<Halves>(from), Units);
  const Units magnitude = halves & 0x7fffu;
  const Floats normal = (Floats)((magnitude << 13) + (112u << 23));
  const Floats subnormal = __builtin_convertvector((Ints)magnitude, Floats) * 0x1p-24f;
  return (Floats)((Units)(magnitude < 0x400u ? subnormal : normal) | (halves & 0x8000u) << 16);
#endif
}

DISAGG_INLINE Floats floats_of_bytes(const void* from) {
  return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Ints), Floats);
}

// One panel's blocks, one after the other, as they are stored.
template <class E, class Format>
struct PackedBlocks {
  const char* at;
  int left = 0;  // blocks of this super-block
  Floats super_scale[kPanelVectors];
  Floats super_offset[kPanelVectors];

  DISAGG_INLINE void begin_block(Floats (&scale)[kPanelVectors], Floats (&offset)[kPanelVectors]) {
    if (left == 0) {
      left = Format::kPerSuper;
#pragma GCC unroll 8
      for (int c = 0; c < kPanelVectors; ++c) {
        super_scale[c] = floats_of_halves(at + c * kLanes * 2);
        if (Format::kOffsets) super_offset[c] = floats_of_halves(at + (kPanelWidth + c * kLanes) * 2);
      }
      at += Format::kSuperBytes;
    }
    --left;
#pragma GCC unroll 8
    for (int c = 0; c < kPanelVectors; ++c) {
      scale[c] = super_scale[c];
      if (Format::kOffsets) offset[c] = super_offset[c];
      if (Format::kSubScales) {
        scale[c] *= floats_of_bytes(at + c * kLanes);
        if (Format::kOffsets) offset[c] *= floats_of_bytes(at + kPanelWidth + c * kLanes);
      }
    }
    at += Format::kSubBytes;
  }

  // ``body(operands)`` for each step of the block.
  template <class Body>
  DISAGG_INLINE void for_each_step(const Body& body) {
    typename E::Operand operands[kPanelVectors];
    if constexpr (Format::kBits == 8) {
      for (int step = 0; step < Format::kFeatures / E::kPerUnit; ++step) {
#pragma GCC unroll 8
        for (int c = 0; c < kPanelVectors; ++c) {
          operands[c] = E::operand_of_int8(reinterpret_cast<const int8_t*>(at) + c * kLanes * E::kPerUnit);
          E::keep(operands[c]);
        }
        prefetch(at + kBlockBytesAhead);
        prefetch(at + kBlockBytesAhead + kPanelWidth * E::kPerUnit - 1);
        at += kPanelWidth * E::kPerUnit;
        body(operands);
      }
    } else {
      for (int group = 0; group < Format::kFeatures / kNibbleFeatures; ++group) {
        Units packed[kPanelVectors];
#pragma GCC unroll 8
        for (int c = 0; c < kPanelVectors; ++c) {
          packed[c] = load<Units>(at + c * kVectorBytes);
          prefetch(at + kBlockBytesAhead + c * kVectorBytes);
        }
        at += kPanelVectors * kVectorBytes;
#pragma GCC unroll 8
        for (int step = 0; step < kNibbleFeatures / E::kPerUnit; ++step) {
#pragma GCC unroll 8
          for (int c = 0; c < kPanelVectors; ++c) {
            operands[c] = E::operand_of_nibbles(packed[c], step);
            E::keep(operands[c]);
          }
          body(operands);
        }
      }
    }
  }
};

// The same out of a widened panel.
template <class E, class Format>
struct WidenedBlocks {
  const uint32_t* at;

  DISAGG_INLINE void begin_block(Floats (&scale)[kPanelVectors], Floats (&offset)[kPanelVectors]) {
#pragma GCC unroll 8
    for (int c = 0; c < kPanelVectors; ++c) {
      scale[c] = load<Floats>(at + c * kLanes);
      if (Format::kOffsets) offset[c] = load<Floats>(at + kPanelWidth + c * kLanes);
    }
    at += kWidenedScales;
  }

  template <class Body>
  DISAGG_INLINE void for_each_step(const Body& body) {
    typename E::Operand operands[kPanelVectors];
    for (int step = 0; step < Format::kFeatures / E::kPerUnit; ++step, at += kPanelWidth) {
#pragma GCC unroll 8
      for (int c = 0; c < kPanelVectors; ++c) {
        operands[c] = E::operand(at + c * kLanes);
        E::keep(operands[c]);
      }
      body(operands);
    }
  }
};

// ``sums`` are those of the blocks of the first row's input, see sum_blocks.
template <class E, class Format, int R, class Source>
DISAGG_NOINLINE void multiply_blocks_tile(const LinearArgs& args, Source blocks, const float* sums, int64_t row,
                                          int64_t panel) {
  const int64_t num_blocks = args.in_features / Format::kFeatures;
  RowUnits x = rows_of<E>(args, row);
  Tile<R, kPanelVectors> total;
  total.clear();
  for (int64_t block = 0; block < num_blocks; ++block) {
    Floats scale[kPanelVectors], offset[kPanelVectors];
    blocks.begin_block(scale, offset);
    Tile<R, kPanelVectors> tile;
    tile.clear();
    blocks.for_each_step([&](const typename E::Operand(&operands)[kPanelVectors]) {
      add_step<E>(tile, x, operands);
      x.first += x.step;
    });
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kPanelVectors; ++c) {
        total.sum[r][c] += tile.sum[r][c] * scale[c];
        if (Format::kOffsets) total.sum[r][c] -= offset[c] * sums[r * num_blocks + block];
      }
  }
  store_tile<E>(total, args, row, panel);
}

// The sum of each block of a row of x, which offsets are multiplied with: [rows, blocks].
template <class E, class Format>
void sum_blocks(const LinearArgs& args, float* sums, int64_t row_begin, int64_t row_end) {
  const auto* x = static_cast<const typename RowOf<E>::Storage*>(args.x) + row_begin * args.in_features;
  const int64_t count = (row_end - row_begin) * (args.in_features / Format::kFeatures);
  for (int64_t block = 0; block < count; ++block, x += Format::kFeatures) {
    Floats sum = RowOf<E>::load_floats(x);
    for (int i = kLanes; i < Format::kFeatures; i += kLanes) sum += RowOf<E>::load_floats(x + i);
    sums[block] = sum_of_lanes(sum);
  }
}

template <class E, class Format>
void widen_blocks(PackedBlocks<E, Format> blocks, int64_t num_blocks, uint32_t* to) {
  for (int64_t block = 0; block < num_blocks; ++block) {
    Floats scale[kPanelVectors], offset[kPanelVectors];
    blocks.begin_block(scale, offset);
    for (int c = 0; c < kPanelVectors; ++c) {
      store(to + c * kLanes, scale[c]);
      if (Format::kOffsets) store(to + kPanelWidth + c * kLanes, offset[c]);
    }
    to += kWidenedScales;
    blocks.for_each_step([&](const typename E::Operand(&operands)[kPanelVectors]) {
      for (int c = 0; c < kPanelVectors; ++c) store(to + c * kLanes, E::units_of(operands[c]));
      to += kPanelWidth;
    });
  }
}

// As multiply_band. ``scratch`` has room for the sums of the rows' blocks, then for a widened panel.
template <class E, class Format>
void multiply_blocks_band(const LinearArgs& args, uint32_t* scratch, int64_t row_begin, int64_t row_end,
                          int64_t panel_begin, int64_t panel_end) {
  const int64_t num_blocks = args.in_features / Format::kFeatures;
  auto* sums = reinterpret_cast<float*>(scratch);
  uint32_t* widened = scratch + (row_end - row_begin) * num_blocks;
  if (Format::kOffsets) sum_blocks<E, Format>(args, sums, row_begin, row_end);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const PackedBlocks<E, Format> packed{static_cast<const char*>(args.packed) +
                                         panel * Format::panel_bytes(args.in_features)};
    const bool widens = row_end - row_begin > kUnpackingRows;
    if (widens) widen_blocks<E, Format>(packed, num_blocks, widened);
    for_row_groups<kBlockRows>(row_begin, row_end, [&](auto rows, int64_t row) {
      const float* row_sums = sums + (row - row_begin) * num_blocks;
      if (widens) {
        multiply_blocks_tile<E, Format, rows.value>(args, WidenedBlocks<E, Format>{widened}, row_sums, row, panel);
      } else {
        multiply_blocks_tile<E, Format, rows.value>(args, packed, row_sums, row, panel);
      }
    });
  }
}

// As multiply; ``scratch`` as block_scratch says.
template <class E, class Format>
void multiply_blocks(const LinearArgs& args, uint32_t* scratch, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                     int64_t panel_end) {
  uint32_t* rest = scratch + band_words<E>(row_end - row_begin, args.in_features);
  for_row_bands<E>(args, scratch, row_begin, row_end, [&](const LinearArgs& band, int64_t begin, int64_t end) {
    multiply_blocks_band<E, Format>(band, rest, begin, end, panel_begin, panel_end);
  });
}

template <class E, class Format>
int64_t block_scratch(int64_t rows, int64_t in_features) {
  const int64_t num_blocks = in_features / Format::kFeatures;
  return rows * num_blocks + num_blocks * kWidenedScales + linear_scratch<E>(rows, in_features);
}

template <class Format>
int64_t block_panel_bytes(int64_t in_features) {
  return Format::panel_bytes(in_features);
}

// Where the value of a feature of a block lies in a panel's bytes of that block, for one lane's output feature.
template <class E, class Format>
DISAGG_INLINE void put_value(char* values, int lane, int feature, int value) {
  if constexpr (Format::kBits == 8) {
    const int step = feature / E::kPerUnit, part = feature % E::kPerUnit;
    values[(step * kPanelWidth + lane) * E::kPerUnit + part] = static_cast<char>(value);
  } else {
    const int group = feature / kNibbleFeatures, place = feature % kNibbleFeatures;
    const int nibble = place % E::kPerUnit * (kNibbleFeatures / E::kPerUnit) + place / E::kPerUnit;
    values[(group * kPanelWidth + lane) * 4 + nibble / 2] |= static_cast<char>((value & 15) << nibble % 2 * 4);
  }
}

// Pack panels panel_begin .. panel_end - 1; missing rows become zeros.
template <class E, class Format>
void pack_blocks(const BlockArrays& from, char* packed, int64_t out_features, int64_t in_features, int64_t panel_begin,
                 int64_t panel_end) {
  const int64_t num_blocks = in_features / Format::kFeatures;
  const int64_t num_supers = num_blocks / Format::kPerSuper;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    char* to = packed + panel * Format::panel_bytes(in_features);
    __builtin_memset(to, 0, Format::panel_bytes(in_features));
    const int64_t first = panel * kPanelWidth;
    const int lanes = static_cast<int>(out_features - first < kPanelWidth ? out_features - first : kPanelWidth);
    for (int64_t block = 0; block < num_blocks; ++block) {
      if (block % Format::kPerSuper == 0) {
        for (int lane = 0; lane < lanes; ++lane) {
          const int64_t at = (first + lane) * num_supers + block / Format::kPerSuper;
          __builtin_memcpy(to + lane * 2, from.scale + at, 2);
          if (Format::kOffsets) __builtin_memcpy(to + (kPanelWidth + lane) * 2, from.offset + at, 2);
        }
        to += Format::kSuperBytes;
      }
      for (int lane = 0; lane < lanes && Format::kSubScales; ++lane) {
        const int64_t at = (first + lane) * num_blocks + block;
        to[lane] = static_cast<char>(from.sub_scale[at]);
        if (Format::kOffsets) to[kPanelWidth + lane] = static_cast<char>(from.sub_offset[at]);
      }
      to += Format::kSubBytes;
      for (int lane = 0; lane < lanes; ++lane) {
        const int8_t* values = from.values + (first + lane) * in_features + block * Format::kFeatures;
        for (int feature = 0; feature < Format::kFeatures; ++feature) put_value<E, Format>(to, lane, feature, values[feature]);
      }
      to += Format::kValueBytes;
    }
  }
}

template <class E, class Format>
constexpr BlockKernels block_kernels_for() {
  return {block_panel_bytes<Format>, block_scratch<E, Format>, pack_blocks<E, Format>, multiply_blocks<E, Format>};
}

}  // namespace DISAGG_ISA
}  // namespace disagg
