#include "packed_linear.h"

#include <algorithm>

namespace disagg {

namespace {

// A product with fewer multiplications than this is not worth waking a thread for.
constexpr int64_t kMultiplicationsPerThread = 64 << 10;
// Pieces per thread: more than one, so that a thread that is held up leaves its rest to the others.
constexpr int64_t kPiecesPerThread = 2;
// A piece has at least so many panels, or rows, if there are that many: what fills a register tile.
constexpr int64_t kPanelsPerPiece = 3;
constexpr int64_t kRowsPerPiece = 12;

// This thread's room for what a product writes down: widened rows, a widened panel. Kept, since fresh pages cost more
// than what is written there.
uint32_t* scratch(int64_t num_words) {
  thread_local std::vector<uint32_t> words;
  if (static_cast<int64_t>(words.size()) < num_words) words.resize(num_words);
  return words.data();
}

}  // namespace

PackedLinear::PackedLinear(const Kernels& kernels, int64_t out_features, int64_t in_features,
                           int64_t features_per_unit, const std::vector<float>& scale, const std::vector<float>& bias,
                           const BlockKernels* blocks)
    : kernels_(kernels),
      blocks_(blocks),
      out_features_(out_features),
      in_features_(in_features),
      features_per_unit_(features_per_unit),
      num_panels_((out_features + kernels.panel_width - 1) / kernels.panel_width),
      scale_(scale),
      bias_(bias) {
  for (std::vector<float>* per_feature : {&scale_, &bias_})
    if (!per_feature->empty()) per_feature->resize(num_panels_ * kernels.panel_width);
}

int64_t PackedLinear::packed_bytes() const {
  if (blocks_ != nullptr) return num_panels_ * blocks_->panel_bytes(in_features_);
  return num_panels_ * panel_units() * (scale_.empty() ? int64_t{sizeof(uint32_t)} : features_per_unit_);
}

void PackedLinear::use_packed(const void* packed) { packed_ = packed; }

void PackedLinear::pack(const void* weight, void* packed, int num_threads) {
  packed_ = packed;
  run_team(num_threads, [&](Team& team) {
    team.for_each_item(num_panels_, [&](int64_t panel, int64_t) {
      if (scale_.empty()) {
        kernels_.pack_weight(weight, static_cast<uint32_t*>(packed), out_features_, in_features_, panel, panel + 1);
      } else {
        kernels_.pack_int8(static_cast<const int8_t*>(weight), static_cast<int8_t*>(packed), out_features_,
                           in_features_, panel, panel + 1);
      }
    });
  });
}

void PackedLinear::pack_blocks(const BlockArrays& weight, void* packed, int num_threads) {
  packed_ = packed;
  run_team(num_threads, [&](Team& team) {
    team.for_each_item(num_panels_, [&](int64_t panel, int64_t) {
      blocks_->pack(weight, static_cast<char*>(packed), out_features_, in_features_, panel, panel + 1);
    });
  });
}

LinearArgs PackedLinear::args(const void* x, void* out) const {
  const auto data_of = [](const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); };
  return {x, out, packed_, data_of(scale_), data_of(bias_), in_features_, out_features_};
}

void PackedLinear::multiply(Team& team, const void* x, void* out, int64_t rows) const {
  const int64_t worth = 1 + rows * in_features_ * out_features_ / kMultiplicationsPerThread;
  const int64_t pieces = team.size() == 1 ? 1 : std::min(worth, kPiecesPerThread * team.size());
  const int64_t columns = std::min(most_parts(), pieces);
  const int64_t bands = std::clamp<int64_t>(rows / kRowsPerPiece, 1, (pieces + columns - 1) / columns);
  // Bounds of bands are whole groups of rows of a register tile, whichever of its heights the instruction set has.
  const auto row = [&](int64_t band) { return band == bands ? rows : rows * band / bands / kRowsPerPiece * kRowsPerPiece; };
  team.for_each_item(columns * bands, [&](int64_t item, int64_t) {
    const int64_t column = item / bands;
    const int64_t band = item % bands;
    multiply_panels(args(x, out), row(band), row(band + 1), num_panels_ * column / columns,
                    num_panels_ * (column + 1) / columns);
  });
}

void PackedLinear::multiply_part(const void* x, void* out, int64_t rows, int64_t part, int64_t parts) const {
  multiply_panels(args(x, out), 0, rows, num_panels_ * part / parts, num_panels_ * (part + 1) / parts);
}

int64_t PackedLinear::part_begin(int64_t part, int64_t parts) const {
  return std::min(out_features_, num_panels_ * part / parts * kernels_.panel_width);
}

int64_t PackedLinear::most_parts() const { return std::max<int64_t>(num_panels_ / kPanelsPerPiece, 1); }

void PackedLinear::multiply_panels(const LinearArgs& args, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                                   int64_t panel_end) const {
  if (blocks_ != nullptr) {
    uint32_t* words = scratch(blocks_->scratch(row_end - row_begin, in_features_));
    blocks_->multiply(args, words, row_begin, row_end, panel_begin, panel_end);
  } else {
    uint32_t* words = scratch(kernels_.scratch(row_end - row_begin, in_features_));
    const auto multiply = scale_.empty() ? kernels_.multiply : kernels_.multiply_int8;
    multiply(args, words, row_begin, row_end, panel_begin, panel_end);
  }
}

}  // namespace disagg
