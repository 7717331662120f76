#include "parallel.h"

#include <dlfcn.h>
#include <sched.h>

#include <algorithm>

#include "helpers.h"

namespace disagg {

namespace {

// Part of libgomp's stable interface (what GCC emits for ``#pragma omp parallel``); LLVM's runtime has it too.
using GompParallel = void (*)(void (*body)(void*), void* context, unsigned num_threads, unsigned flags);
std::atomic<GompParallel> openmp{nullptr};

// Some 20 microseconds. Who has waited longer waits for a thread that another process keeps from its core, and had better
// let it have this one.
constexpr int kSpins = 1000;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

bool use_openmp(const std::string& path) {
  if (openmp.load() != nullptr) return true;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return false;
  // The handle is kept: the function must stay where it is for as long as the process lives.
  openmp.store(reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel")));
  return true;
}

namespace {

// The threads of this process, on cores of its own.
void run_own(TeamState& state, int num_threads, int team_size, void (*body)(void* context, Team& team), void* context) {
  if (num_threads == 1) {
    Team alone(state, team_size);
    return body(context, alone);
  }
  struct Shared {
    TeamState& state;
    int team_size;
    void (*body)(void*, Team&);
    void* context;
  } shared{state, team_size, body, context};
  // There may be fewer threads than were asked for: whoever comes takes items until none is left.
  openmp.load()(
      [](void* given) {
        const Shared& mine = *static_cast<const Shared*>(given);
        Team team(mine.state, mine.team_size);
        mine.body(mine.context, team);
      },
      &shared, static_cast<unsigned>(num_threads), 0);
}

}  // namespace

void run_team(int num_threads, Helpers* helpers, void (*body)(void* context, Team& team), void* context) {
  TeamState state;
  const int num_own = openmp.load() == nullptr ? 1 : std::max(num_threads, 1);
  const int num_helpers = helpers == nullptr ? 0 : helpers->number();
  const int team_size = num_own + num_helpers;
  if (num_helpers == 0) return run_own(state, num_own, team_size, body, context);
  helpers->open(state, team_size, body, context);
  run_own(state, num_own, team_size, body, context);
  helpers->close();
}

void relax(int spins) {
  if (spins < kSpins) {
    pause();
  } else {
    sched_yield();
  }
}

}  // namespace disagg
