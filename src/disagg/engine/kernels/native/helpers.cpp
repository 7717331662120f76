#include "helpers.h"

#include <sched.h>

#include <algorithm>
#include <chrono>

#include "futex.h"
#include "loan.h"

namespace disagg {

namespace {

constexpr int64_t kLongNs = 3'600'000'000'000;
// Times what other processes took of a core: how long it is then left to them.
constexpr int64_t kRest = 16;
constexpr int64_t kLongestRestNs = 200'000'000;

void pin_to(int core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(core, &cores);
  sched_setaffinity(0, sizeof(cores), &cores);  // of this thread; elsewhere it would help less
}

}  // namespace

Helpers::Helpers(CoreBoard& board, const std::vector<int>& cores) : board_(board) {
  for (size_t index = 0; index < cores.size(); ++index)
    threads_.emplace_back(&Helpers::serve, this, static_cast<int>(index), cores[index]);
}

Helpers::~Helpers() {
  is_ending_ = true;
  step_ += 2;  // stays even: no step, but news
  wake_all(step_);
  for (std::thread& thread : threads_) thread.join();
}

void Helpers::allow(int number) { allowed_ = std::clamp(number, 0, static_cast<int>(threads_.size())); }

double Helpers::take_seconds() { return 1e-9 * static_cast<double>(helped_ns_.exchange(0)); }

void Helpers::open(TeamState& state, int team_size, Body body, void* context) {
  job_ = {&state, team_size, body, context};
  ++step_;
  wake_all(step_);
}

void Helpers::close() {
  ++step_;
  for (int spins = 0; num_inside_.load() != 0; ++spins) relax(spins);
}

void Helpers::serve(int index, int core) {
  pin_to(core);
  uint32_t finished = 0;
  while (!is_ending_) {
    const uint32_t step = step_.load();
    if (step % 2 == 0 || step == finished || index >= allowed_) {
      wait_while(step_, step, kLongNs);
    } else if (!board_.borrow(core)) {
      board_.wait(core);
    } else {
      const int64_t rest_ns = help(core, step);
      board_.give_back(core);
      if (rest_ns < 0) finished = step;
      if (rest_ns > 0) std::this_thread::sleep_for(std::chrono::nanoseconds(rest_ns));
    }
  }
}

// Take part in a step. Returns -1 when nothing is left to do in it, else how long to stay away from the core.
int64_t Helpers::help(int core, uint32_t step) {
  ++num_inside_;
  if (step_.load() != step) {  // closed, and what it used may be gone
    --num_inside_;
    return -1;
  }
  Loan loan(board_.state(core));
  bool is_done = true;
  try {
    Team team(*job_.state, job_.team_size, &loan);
    job_.body(job_.context, team);
  } catch (const LoanOver&) {
    is_done = false;
  }
  helped_ns_ += loan.held_ns();
  --num_inside_;
  return is_done ? -1 : std::clamp<int64_t>(kRest * loan.lost_ns(), 0, kLongestRestNs);
}

}  // namespace disagg
