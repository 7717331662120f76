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
// The first counter of the arrivals, which count down from it; tokens use their ids.
constexpr uint64_t kArrivals = ~uint64_t{0};

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
};

Winner race(const Likely& likely, float floor, uint64_t key) {
  Winner winner;
  for (size_t i = 0; i < likely.count; ++i) {
    const double probability = likely.probabilities[i];
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

// The unlikely token whose first accepted arrival is before ``winner``'s time, or else that winner's token; see
// noise.py. ``logprob_of`` is that of a token.
template <class LogprobOf>
int64_t race_unlikely(const Winner& winner, int64_t width, const Drawing& drawing, const LogprobOf& logprob_of) {
  const double bound = std::exp(static_cast<double>(drawing.floor));
  const double rate = bound * static_cast<double>(width);
  double time = 0.0;
  // It ends: probabilities sum to 1, so that somebody wins, and soon.
  for (uint64_t counter = kArrivals;; counter -= 2) {
    time -= std::log(uniform(drawing.key, counter)) / rate;
    if (time >= winner.time) return winner.token;
    const uint64_t bits = mix(drawing.key + (counter - 1) * kGamma);
    const auto token = static_cast<int64_t>((bits >> 32) * static_cast<uint64_t>(width) >> 32);
    const double mark = (static_cast<double>(bits & 0xFFFFFFFFu) + 0.5) * 0x1p-32;
    const float logprob = logprob_of(token);
    if (logprob <= drawing.floor && mark * bound < std::exp(static_cast<double>(logprob))) return token;
  }
}

}  // namespace

uint64_t noise_key(uint64_t seed, uint64_t position) { return mix(mix(seed + kGamma) + position * kGamma); }

int64_t draw_token(const Kernels& kernels, const void* logits, int64_t width, const Drawing& drawing) {
  thread_local Likely likely;
  // Probabilities sum to 1 but for rounding, so that there are at most e^-floor of them above the floor.
  likely.reserve(kMostLanes + static_cast<size_t>(std::min<double>(width, std::ceil(1.001 * std::exp(-drawing.floor)))));
  const auto sharpness = static_cast<float>(1.0 / drawing.temperature);
  LikelyTokens out{likely.tokens.data(), likely.logprobs.data(), likely.probabilities.data(), 0.0f, 0.0f};
  const int64_t found = kernels.find_likely(logits, width, sharpness, drawing.floor, out);
  if (found < 0) return kNotFinite;
  likely.count = static_cast<size_t>(found);
  const std::optional<float> floor = truncate(likely, drawing);
  if (!floor) return kUndecided;
  const Winner winner = race(likely, *floor, drawing.key);
  if (*floor > -std::numeric_limits<float>::infinity()) return winner.token;  // the unlikely ones are cut off
  return race_unlikely(winner, width, drawing,
                       [&](int64_t token) { return kernels.logprob_of(logits, token, sharpness, out); });
}

}  // namespace disagg
