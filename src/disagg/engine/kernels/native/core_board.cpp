#include "core_board.h"

#include <signal.h>
#include <unistd.h>

#include <cerrno>

#include "futex.h"

namespace disagg {

namespace {

// How long a dead process may keep others from a core.
constexpr int64_t kLookNs = 50'000'000;

bool is_dead(int32_t process) { return process != 0 && kill(process, 0) != 0 && errno == ESRCH; }

}  // namespace

void CoreBoard::take_back() {
  for (const int core : own_) cells_[core].state.fetch_or(CoreCell::kNeeded, std::memory_order_release);
}

void CoreBoard::lend() {
  for (const int core : own_) {
    CoreCell& cell = cells_[core];
    cell.owner.store(getpid(), std::memory_order_relaxed);
    cell.state.fetch_and(~CoreCell::kNeeded, std::memory_order_release);
    wake_all(cell.state);
  }
}

bool CoreBoard::borrow(int core) {
  CoreCell& cell = cells_[core];
  uint32_t free = 0;
  if (cell.owner.load(std::memory_order_relaxed) == 0 ||
      !cell.state.compare_exchange_strong(free, CoreCell::kBorrowed, std::memory_order_acquire))
    return false;
  cell.borrower.store(getpid(), std::memory_order_relaxed);
  return true;
}

void CoreBoard::give_back(int core) {
  CoreCell& cell = cells_[core];
  cell.state.fetch_and(~CoreCell::kBorrowed, std::memory_order_release);
  wake_all(cell.state);
}

void CoreBoard::wait(int core) {
  CoreCell& cell = cells_[core];
  uint32_t seen = cell.state.load(std::memory_order_acquire);
  if (seen == 0 && cell.owner.load(std::memory_order_relaxed) != 0) return;
  if (wait_while(cell.state, seen, kLookNs)) return;
  uint32_t left = seen;
  if ((seen & CoreCell::kNeeded) && is_dead(cell.owner.load(std::memory_order_relaxed))) left &= ~CoreCell::kNeeded;
  if ((seen & CoreCell::kBorrowed) && is_dead(cell.borrower.load(std::memory_order_relaxed)))
    left &= ~CoreCell::kBorrowed;
  cell.state.compare_exchange_strong(seen, left, std::memory_order_relaxed);
}

}  // namespace disagg
