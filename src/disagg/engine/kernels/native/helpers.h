// Threads on cores that other instances lend while they have no step.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "core_board.h"
#include "parallel.h"

namespace disagg {

// One thread for each of some cores, asleep but for steps. In a step each computes while it can borrow its core: it comes
// to a team late, leaves it before its next item when the core's owner wants it back or other processes need it, and comes again. A team never waits
// for helpers beyond the items that they have in hand.
class Helpers {
 public:
  using Body = void (*)(void* context, Team& team);

  // ``board`` outlives the helpers.
  Helpers(CoreBoard& board, const std::vector<int>& cores);
  ~Helpers();
  Helpers(const Helpers&) = delete;
  Helpers& operator=(const Helpers&) = delete;

  // How many may help in steps from now on.
  void allow(int number);
  // Seconds that helpers computed since this was asked last, all of them together.
  double take_seconds();

  // For the thread that leads a team: how many may come to it, ``state`` and what ``body`` uses to stay until ``close``.
  int number() const { return allowed_.load(); }
  void open(TeamState& state, int team_size, Body body, void* context);
  void close();

 private:
  struct Job {
    TeamState* state;
    int team_size;
    Body body;
    void* context;
  };

  void serve(int index, int core);
  int64_t help(int core, uint32_t step);

  CoreBoard& board_;
  Job job_{};
  std::atomic<int> allowed_{0};
  std::atomic<uint32_t> step_{0};  // odd while a team is at work
  std::atomic<int> num_inside_{0};
  std::atomic<int64_t> helped_ns_{0};
  std::atomic<bool> is_ending_{false};
  std::vector<std::thread> threads_;
};

}  // namespace disagg
