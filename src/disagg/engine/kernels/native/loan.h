// One thread's time on a core that another instance lends.
#pragma once

#include <atomic>
#include <cstdint>
#include <ctime>

#include "core_board.h"

namespace disagg {

// From when the thread begins to compute there. It is over when the owner wants the core, or when other processes take so
// much of it that a team had better not wait for this thread.
class Loan {
 public:
  explicit Loan(const std::atomic<uint32_t>& state)
      : state_(state), began_ns_(now_ns(CLOCK_MONOTONIC)), began_cpu_ns_(now_ns(CLOCK_THREAD_CPUTIME_ID)) {}

  // To be asked before each piece of work, and while waiting. Nanoseconds, but for each 64th time.
  bool is_over() {
    if (state_.load(std::memory_order_relaxed) & CoreCell::kNeeded) return true;
    return ++num_asked_ % 64 == 0 && lost_ns() > kSlackNs + held_ns() / kLeastShare;
  }

  int64_t held_ns() const { return now_ns(CLOCK_MONOTONIC) - began_ns_; }
  // Of that, what others computed there.
  int64_t lost_ns() const { return held_ns() - (now_ns(CLOCK_THREAD_CPUTIME_ID) - began_cpu_ns_); }

 private:
  static constexpr int64_t kSlackNs = 1'000'000;
  static constexpr int64_t kLeastShare = 8;

  static int64_t now_ns(clockid_t clock) {
    timespec now;
    clock_gettime(clock, &now);
    return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
  }

  const std::atomic<uint32_t>& state_;
  const int64_t began_ns_;
  const int64_t began_cpu_ns_;
  uint32_t num_asked_ = 0;
};

}  // namespace disagg
