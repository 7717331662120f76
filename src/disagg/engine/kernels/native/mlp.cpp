#include "mlp.h"

#include <algorithm>
#include <cstring>

namespace disagg {

namespace {

// Pieces of grouped products per thread: experts have unequal numbers of rows, and threads should end together.
constexpr int64_t kPiecesPerThread = 4;

}  // namespace

void DenseMlp::reserve(MlpScratch& scratch, int64_t rows, int64_t item_bytes) const {
  scratch.gate_up.at_least(rows * 2 * intermediate() * item_bytes);
  scratch.activated.at_least(rows * intermediate() * item_bytes);
}

void DenseMlp::activate(const MlpRun& run, int64_t rows) const {
  run.team.for_each_range(rows, 2 * intermediate() * run.item_bytes, [&](int64_t begin, int64_t end) {
    run.kernels.gate[activation_](run.scratch.gate_up.data(), run.scratch.activated.data(), intermediate(), begin, end);
  });
}

void DenseMlp::run(const MlpRun& run, const void* x, void* out, int64_t rows) const {
  gate_up_->multiply(run.team, x, run.scratch.gate_up.data(), rows);
  activate(run, rows);
  down_->multiply(run.team, run.scratch.activated.data(), out, rows);
}

void SparseMlp::reserve(MlpScratch& scratch, int64_t rows, int64_t item_bytes) const {
  const int64_t hidden = router_->in_features();
  const int64_t chosen = rows * num_per_token_;
  experts_.front().reserve(scratch, chosen, item_bytes);
  if (shared_) {
    shared_->reserve(scratch, rows, item_bytes);
    scratch.shared.at_least(rows * hidden * item_bytes);
  }
  scratch.logits.at_least(rows * router_->out_features() * item_bytes);
  scratch.gathered.at_least(chosen * hidden * item_bytes);
  scratch.products.at_least(chosen * hidden * item_bytes);
  const auto at_least = [](auto& values, int64_t size) {
    if (static_cast<int64_t>(values.size()) < size) values.resize(size);
  };
  at_least(scratch.chosen, chosen);
  at_least(scratch.places, chosen);
  at_least(scratch.weights, chosen + rows);
  scratch.experts.reserve(experts_.size());
}

void SparseMlp::run(const MlpRun& run, const void* x, void* out, int64_t rows) const {
  MlpScratch& scratch = run.scratch;
  const int64_t hidden = router_->in_features();
  choose(run, x, rows);
  gather(run, x, rows);
  multiply_grouped(run, false, scratch.gathered.data(), scratch.gate_up.data());
  experts_.front().activate(run, rows * num_per_token_);
  multiply_grouped(run, true, scratch.activated.data(), scratch.products.data());
  if (shared_) shared_->run(run, x, scratch.shared.data(), rows);
  const ExpertSum sum{scratch.products.data(), shared_ ? scratch.shared.data() : nullptr,
                      scratch.places.data(), scratch.weights.data(), out, hidden, num_per_token_};
  run.team.for_each_range(rows, (num_per_token_ + 1) * hidden * run.item_bytes,
                          [&](int64_t begin, int64_t end) { run.kernels.combine_experts(sum, begin, end); });
}

void SparseMlp::choose(const MlpRun& run, const void* x, int64_t rows) const {
  MlpScratch& scratch = run.scratch;
  router_->multiply(run.team, x, scratch.logits.data(), rows);
  const ExpertChoice choice{scratch.logits.data(), scratch.chosen.data(), scratch.weights.data(),
                            static_cast<int>(experts_.size()), num_per_token_, shared_.has_value(), normalize_};
  run.team.for_each_range(rows, 64 * router_->out_features(),
                          [&](int64_t begin, int64_t end) { run.kernels.choose_experts(choice, begin, end); });
  run.team.for_each_item(1, [&](int64_t, int64_t) { group(scratch, rows, run.team.size()); });
}

// Give each choice of each row its place, the rows of an expert one after the other, and cut the work into pieces.
void SparseMlp::group(MlpScratch& scratch, int64_t rows, int team_size) const {
  const int64_t chosen = rows * num_per_token_;
  const int64_t pieces = team_size == 1 ? 1 : kPiecesPerThread * team_size;
  std::vector<int64_t> next(experts_.size() + 1);
  for (int64_t i = 0; i < chosen; ++i) ++next[scratch.chosen[i] + 1];
  for (size_t expert = 0; expert < experts_.size(); ++expert) next[expert + 1] += next[expert];
  scratch.experts.clear();
  int64_t num_pieces = 0;  // a thread that lags behind must not see a 0 in between: it would skip a phase
  for (size_t expert = 0; expert < experts_.size(); ++expert) {
    const int64_t num_rows = next[expert + 1] - next[expert];
    if (num_rows == 0) continue;
    const int64_t own_pieces = (num_rows * pieces + chosen - 1) / chosen;
    scratch.experts.push_back({static_cast<int32_t>(expert), next[expert], num_rows, num_pieces, own_pieces});
    num_pieces += own_pieces;
  }
  scratch.num_pieces = num_pieces;
  for (int64_t i = 0; i < chosen; ++i) scratch.places[i] = static_cast<int32_t>(next[scratch.chosen[i]]++);
}

void SparseMlp::gather(const MlpRun& run, const void* x, int64_t rows) const {
  const int64_t row_bytes = router_->in_features() * run.item_bytes;
  run.team.for_each_range(rows, num_per_token_ * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * num_per_token_; i < end * num_per_token_; ++i)
      std::memcpy(run.scratch.gathered.data() + run.scratch.places[i] * row_bytes,
                  static_cast<const char*>(x) + i / num_per_token_ * row_bytes, row_bytes);
  });
}

// Each expert's rows of x times its gate and up, or its down projection.
void SparseMlp::multiply_grouped(const MlpRun& run, bool down, char* x, char* out) const {
  const std::vector<ExpertRows>& groups = run.scratch.experts;
  run.team.for_each_item(run.scratch.num_pieces, [&](int64_t piece, int64_t) {
    const auto after = std::upper_bound(groups.begin(), groups.end(), piece,
                                        [](int64_t at, const ExpertRows& rows) { return at < rows.first_piece; });
    const ExpertRows& rows = *(after - 1);
    const DenseMlp& expert = experts_[rows.expert];
    const PackedLinear& linear = down ? expert.down() : expert.gate_up();
    linear.multiply_part(x + rows.first_row * linear.in_features() * run.item_bytes,
                         out + rows.first_row * linear.out_features() * run.item_bytes, rows.num_rows,
                         piece - rows.first_piece, rows.num_pieces);
  });
}

}  // namespace disagg
