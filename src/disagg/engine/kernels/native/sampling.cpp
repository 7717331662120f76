#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <vector>

namespace disagg {

namespace {

constexpr uint64_t kGamma = 0x9E3779B97F4A7C15u;
// Counters of the noise that the tail of a row shares, and of the draw within it; tokens use their ids.
constexpr uint64_t kTail = ~uint64_t{0};
constexpr uint64_t kWithinTail = kTail - 1;
// More than the rounding of a row's probabilities, summed.
constexpr double kMassError = 1e-5;

uint64_t mix(uint64_t bits) {
  bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9u;
  bits = (bits ^ bits >> 27) * 0x94D049BB133111EBu;
  return bits ^ bits >> 31;
}

// Strictly between 0 and 1.
double uniform(uint64_t key, uint64_t counter) {
  return (static_cast<double>(mix(key + counter * kGamma) >> 11) + 0.5) * 0x1p-53;
}

// The likely tokens of a row; kept from row to row, since fresh pages cost more than what is written to them.
struct Likely {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  std::vector<float> probabilities;
  std::vector<float> sorted;
  size_t count = 0;

  void reserve(size_t size) {
    if (tokens.size() >= size) return;
    tokens.resize(size);
    logprobs.resize(size);
    probabilities.resize(size);
  }
};

// A row, and what stands between it and a token.
struct Row {
  const Kernels& kernels;
  const void* logits;
  int64_t width;
  const Drawing& drawing;

  float sharpness() const { return static_cast<float>(1.0 / drawing.temperature); }
};

// The log-probability below which truncation drops a token; none when the likely ones alone do not tell.
std::optional<float> truncate(Likely& likely, const Drawing& drawing) {
  float floor = -std::numeric_limits<float>::infinity();
  if (drawing.top_p >= 1.0 && drawing.top_k == 0 && drawing.min_p == 0.0) return floor;
  if (likely.count == 0) return std::nullopt;
  std::vector<float>& values = likely.sorted;
  values.assign(likely.logprobs.begin(), likely.logprobs.begin() + likely.count);
  std::sort(values.begin(), values.end(), std::greater<>());
  bool is_complete = false;
  if (drawing.min_p > 0.0) {
    floor = static_cast<float>(values.front() + std::log(drawing.min_p));
    if (floor < drawing.floor) return std::nullopt;
    values.erase(std::upper_bound(values.begin(), values.end(), floor, std::greater<>()), values.end());
    is_complete = true;
  }
  const auto top_k = static_cast<size_t>(drawing.top_k);
  if (top_k > 0 && top_k <= values.size()) {
    floor = values[top_k - 1];
    values.resize(top_k);
    is_complete = true;
  } else if (top_k > 0 && !is_complete) {
    return std::nullopt;
  }
  if (drawing.top_p < 1.0) {
    double whole = is_complete ? 0.0 : 1.0;
    if (is_complete)
      for (const float value : values) whole += std::exp(value);
    double mass = 0.0;
    size_t last = 0;
    for (; last < values.size(); ++last)
      if ((mass += std::exp(values[last])) >= drawing.top_p * whole) break;
    if (last == values.size() && !is_complete) return std::nullopt;
    floor = std::max(floor, values[std::min(last, values.size() - 1)]);
  }
  return floor;
}

// The winner of a race among the likely tokens: E is exponentially distributed, so log p - log E is log p plus Gumbel
// noise, and the token with the least E / p wins.
struct Winner {
  int64_t token = kUndecided;
  double time = std::numeric_limits<double>::infinity();
  double likely_mass = 0.0;
};

Winner race(const Likely& likely, float floor, uint64_t key) {
  Winner winner;
  for (size_t i = 0; i < likely.count; ++i) {
    const double probability = likely.probabilities[i];
    winner.likely_mass += probability;
    if (likely.logprobs[i] < floor) continue;
    const double number = uniform(key, static_cast<uint64_t>(likely.tokens[i]));
    // -log(u) >= 1 - u: most tokens lose without a logarithm.
    if (1.0 - number >= winner.time * probability) continue;
    const double time = -std::log(number) / probability;
    if (time < winner.time) {
      winner.time = time;
      winner.token = likely.tokens[i];
    }
  }
  return winner;
}

// A token of the row's tail if that, as a whole, wins against the likely tokens' winner; else the winner.
int64_t draw_from_tail(const Row& row, const Winner& winner, double tail_time) {
  thread_local std::vector<float> probabilities;
  probabilities.resize(row.width);
  row.kernels.find_unlikely(row.logits, row.width, row.sharpness(), row.drawing.floor, probabilities.data());
  double mass = 0.0;
  for (const float probability : probabilities) mass += probability;
  if (mass == 0.0 || tail_time >= winner.time * mass) return winner.token;
  const double point = uniform(row.drawing.key, kWithinTail) * mass;
  double before = 0.0;
  int64_t last = kUndecided;
  for (int64_t token = 0; token < row.width; ++token) {
    if (probabilities[token] == 0.0f) continue;
    last = token;
    if ((before += probabilities[token]) > point) break;
  }
  return last;
}

}  // namespace

uint64_t noise_key(uint64_t seed, uint64_t position) { return mix(mix(seed + kGamma) + position * kGamma); }

int64_t draw_token(const Kernels& kernels, const void* logits, int64_t width, const Drawing& drawing) {
  thread_local Likely likely;
  const Row row{kernels, logits, width, drawing};
  // Probabilities sum to 1 but for rounding, so that there are at most e^-floor of them above the floor.
  likely.reserve(kMostLanes + static_cast<size_t>(std::min<double>(width, std::ceil(1.001 * std::exp(-drawing.floor)))));
  const int64_t found =
      kernels.find_likely(logits, width, row.sharpness(), drawing.floor,
                          {likely.tokens.data(), likely.logprobs.data(), likely.probabilities.data()});
  if (found < 0) return kNotFinite;
  likely.count = static_cast<size_t>(found);
  const std::optional<float> floor = truncate(likely, drawing);
  if (!floor) return kUndecided;
  const Winner winner = race(likely, *floor, drawing.key);
  if (*floor > drawing.floor) return winner.token;
  // Nothing is cut off. An upper bound of the tail's mass first: to weigh it costs a pass over the row.
  const double tail_time = -std::log(uniform(drawing.key, kTail));
  const double most = std::max(1.0 - winner.likely_mass, 0.0) + kMassError;
  return tail_time >= winner.time * most ? winner.token : draw_from_tail(row, winner, tail_time);
}

}  // namespace disagg
