// Threads, borrowed from the OpenMP runtime that PyTorch has loaded: a second pool would spin against the first.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "loan.h"

namespace disagg {

// Take what is needed from an OpenMP runtime that this process has loaded already (libgomp, LLVM's or Intel's).
// Returns false when ``path`` is not loaded or lacks it; then everything runs on the calling thread.
bool use_openmp(const std::string& path);

// What the threads of one ``run_team`` share: which phase they are in, and how much of it is taken and done.
struct TeamState {
  alignas(64) std::atomic<uint64_t> phase_and_item{0};
  alignas(64) std::atomic<int64_t> num_done{0};
};

// Thrown in a thread that computes on another's core, between two items, when it has to go.
struct LoanOver {};

// Wait a moment; who has waited for long lets others have the core.
void relax(int spins);

// One thread's membership of a team. All threads execute the same code, and share the work where that code says so: a
// whole step needs the OpenMP runtime once, not once for each of its matrix products.
//
// A phase ends when its items are done, not when all threads have come: one that another process keeps from its core
// holds nobody up beyond the item it has in hand, and skips what was done without it.
class Team {
 public:
  // ``size`` is the number of threads that the work is cut for. A thread on a borrowed core gives its loan.
  Team(TeamState& state, int size, Loan* loan = nullptr) : state_(state), size_(size), loan_(loan) {}

  int size() const { return size_; }

  // Every thread calls this with the same number of items. ``work(item, next)`` is then called once for each, on
  // whichever thread is free; ``next`` is what the same thread will probably do afterwards, or at least ``num_items``.
  // Returns when all items are done. Exceptions must not leave ``work``.
  template <class Work>
  void for_each_item(int64_t num_items, Work work) {
    if (size_ == 1) {
      for (int64_t item = 0; item < num_items; ++item) work(item, item + 1);
      return;
    }
    if (num_items == 0) return;
    for (int64_t item; (item = take(num_items)) < num_items;) {
      work(item, item + size_);
      if (state_.num_done.fetch_add(1, std::memory_order_acq_rel) + 1 == num_items) end_phase();
    }
    wait_for_end();
    ++phase_;
  }

  // The same over equal parts of the rows, ``work(begin, end)``. Few bytes are not worth a second thread's attention.
  template <class Work>
  void for_each_range(int64_t num_rows, int64_t row_bytes, Work work) {
    constexpr int64_t kBytesPerThread = 64 << 10;
    const int64_t worth = 1 + num_rows * row_bytes / kBytesPerThread;
    const int64_t parts = worth < size_ ? worth : size_;
    for_each_item(parts, [&](int64_t part, int64_t) { work(num_rows * part / parts, num_rows * (part + 1) / parts); });
  }

 private:
  static constexpr int kItemBits = 32;

  // An item of this phase that nobody else has, or ``num_items`` when there is none left.
  int64_t take(int64_t num_items) {
    leave_when_due();
    uint64_t now = state_.phase_and_item.load(std::memory_order_acquire);
    for (;;) {
      const auto item = static_cast<int64_t>(now & ((uint64_t{1} << kItemBits) - 1));
      if (now >> kItemBits != phase_ || item >= num_items) return num_items;
      if (state_.phase_and_item.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) return item;
    }
  }

  void end_phase() {
    state_.num_done.store(0, std::memory_order_relaxed);
    state_.phase_and_item.store((phase_ + 1) << kItemBits, std::memory_order_release);
  }

  void wait_for_end() const {
    for (int spins = 0; state_.phase_and_item.load(std::memory_order_acquire) >> kItemBits == phase_; ++spins) {
      leave_when_due();
      relax(spins);
    }
  }

  void leave_when_due() const {
    if (loan_ != nullptr && loan_->is_over()) throw LoanOver{};
  }

  TeamState& state_;
  const int size_;
  Loan* const loan_;
  uint64_t phase_ = 0;
};

class Helpers;

// Call ``body(team)`` on at most ``num_threads`` threads, the calling one among them, and wait for all. Exceptions must
// not leave ``body``, but for LoanOver. ``helpers``, if any, may come and go, and begin ``body`` several times.
void run_team(int num_threads, Helpers* helpers, void (*body)(void* context, Team& team), void* context);

template <class Body>
void run_team(int num_threads, Body body, Helpers* helpers = nullptr) {
  run_team(
      num_threads, helpers, [](void* context, Team& team) { (*static_cast<Body*>(context))(team); }, &body);
}

}  // namespace disagg
