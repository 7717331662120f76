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

}  // namespace

PackedLinear::PackedLinear(const Kernels& kernels, int64_t out_features, int64_t in_features,
                           const std::vector<float>& bias)
    : kernels_(kernels),
      out_features_(out_features),
      in_features_(in_features),
      num_panels_((out_features + kernels.panel_width - 1) / kernels.panel_width),
      bias_(bias) {
  if (!bias_.empty()) bias_.resize(num_panels_ * kernels.panel_width);
}

int64_t PackedLinear::packed_units(int64_t features_per_unit) const {
  return num_panels_ * kernels_.panel_width * (in_features_ / features_per_unit);
}

void PackedLinear::pack(const void* weight, uint32_t* packed, int num_threads) {
  packed_ = packed;
  run_team(num_threads, [&](Team& team) {
    team.for_each_item(num_panels_, [&](int64_t panel, int64_t) {
      kernels_.pack_weight(weight, packed, out_features_, in_features_, panel, panel + 1);
    });
  });
}

void PackedLinear::multiply(Team& team, const void* x, void* out, int64_t rows) const {
  const LinearArgs args{x, out, packed_, bias_.empty() ? nullptr : bias_.data(), in_features_, out_features_};
  const int64_t worth = 1 + rows * in_features_ * out_features_ / kMultiplicationsPerThread;
  const int64_t pieces = team.size() == 1 ? 1 : std::min(worth, kPiecesPerThread * team.size());
  const int64_t columns = std::clamp<int64_t>(num_panels_ / kPanelsPerPiece, 1, pieces);
  const int64_t bands = std::clamp<int64_t>(rows / kRowsPerPiece, 1, (pieces + columns - 1) / columns);
  // Bounds of bands are whole groups of rows of a register tile, whichever of its heights the instruction set has.
  const auto row = [&](int64_t band) { return band == bands ? rows : rows * band / bands / kRowsPerPiece * kRowsPerPiece; };
  team.for_each_item(columns * bands, [&](int64_t item, int64_t) {
    const int64_t column = item / bands;
    const int64_t band = item % bands;
    kernels_.multiply(args, row(band), row(band + 1), num_panels_ * column / columns,
                      num_panels_ * (column + 1) / columns);
  });
}

}  // namespace disagg
