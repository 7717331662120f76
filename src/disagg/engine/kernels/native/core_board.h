// Which cores of a host have a step to compute, in memory that its instances share.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace disagg {

// One core. Zeros at first: nobody lends it.
struct alignas(64) CoreCell {
  static constexpr uint32_t kNeeded = 1;    // its owner has a step
  static constexpr uint32_t kBorrowed = 2;  // another instance's thread computes on it

  std::atomic<uint32_t> state;
  std::atomic<int32_t> owner;     // process ids; 0: none
  std::atomic<int32_t> borrower;
};

// The cells of all cores by their numbers, and which of them are this process's own. A core is borrowed by one at a time,
// while its owner has no step; who borrows it looks at the cell before each piece of work. Words of processes that have
// died do not count.
class CoreBoard {
 public:
  // ``cells`` outlive the board.
  CoreBoard(CoreCell* cells, const std::vector<int>& own) : cells_(cells), own_(own) {}

  // The owner's side: its cores are wanted back, or free for others. Tens of nanoseconds.
  void take_back();
  void lend();

  // The borrower's side. ``borrow`` returns whether the core is now borrowed; ``wait`` returns when it may be to be had,
  // and from time to time.
  bool borrow(int core);
  void give_back(int core);
  void wait(int core);
  const std::atomic<uint32_t>& state(int core) const { return cells_[core].state; }

 private:
  CoreCell* const cells_;
  const std::vector<int> own_;
};

}  // namespace disagg
