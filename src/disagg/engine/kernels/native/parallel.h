// Threads, borrowed from the OpenMP runtime that PyTorch has loaded: a second pool would spin against the first.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace disagg {

// Take GOMP_parallel from an OpenMP runtime that this process has loaded already (libgomp, LLVM's or Intel's).
// Returns false when ``path`` is not loaded or has no such function; then everything runs on the calling thread.
bool use_openmp(const std::string& path);

// Run ``body(context)`` on ``num_threads`` threads, the calling one among them, and wait for all.
void run_parallel(void (*body)(void*), void* context, int num_threads);

// Call ``work(item, next)`` for every item, each on whichever thread is free; ``next`` is what the same thread will
// probably do afterwards, or at least ``num_items``. Exceptions must not leave ``work``.
template <class Work>
void for_each_item(int64_t num_items, int num_threads, Work work) {
  if (num_threads > num_items) num_threads = static_cast<int>(num_items);
  if (num_threads <= 1) {
    for (int64_t item = 0; item < num_items; ++item) work(item, item + 1);
    return;
  }
  struct Shared {
    Work& work;
    int64_t num_items;
    int num_threads;
    std::atomic<int64_t> next;
  } shared{work, num_items, num_threads, {0}};
  run_parallel(
      [](void* context) {
        Shared& mine = *static_cast<Shared*>(context);
        for (int64_t item; (item = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.num_items;)
          mine.work(item, item + mine.num_threads);
      },
      &shared, num_threads);
}

// Call ``work(begin, end)`` over equal parts of the rows. Few bytes are not worth waking a thread for.
template <class Work>
void for_each_range(int64_t num_rows, int64_t row_bytes, int num_threads, Work work) {
  constexpr int64_t kBytesPerThread = 128 << 10;
  const int64_t worth = 1 + num_rows * row_bytes / kBytesPerThread;
  const int64_t parts = worth < num_threads ? worth : num_threads;
  for_each_item(parts, num_threads,
                [&](int64_t part, int64_t) { work(num_rows * part / parts, num_rows * (part + 1) / parts); });
}

}  // namespace disagg
