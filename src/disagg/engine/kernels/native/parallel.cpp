#include "parallel.h"

#include <dlfcn.h>
#include <sched.h>

namespace disagg {

namespace {

// Part of libgomp's stable interface (what GCC emits for ``#pragma omp parallel``); LLVM's runtime has it too.
using GompParallel = void (*)(void (*body)(void*), void* context, unsigned num_threads, unsigned flags);
using NumThreads = int (*)();

struct OpenMp {
  GompParallel parallel;
  NumThreads num_threads;
};
OpenMp openmp_functions{};
std::atomic<const OpenMp*> openmp{nullptr};

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
  // The handle is kept: the functions must stay where they are for as long as the process lives.
  openmp_functions.parallel = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
  openmp_functions.num_threads = reinterpret_cast<NumThreads>(dlsym(library, "omp_get_num_threads"));
  if (openmp_functions.parallel == nullptr || openmp_functions.num_threads == nullptr) return false;
  openmp.store(&openmp_functions);
  return true;
}

void run_team(int num_threads, void (*body)(void* context, Team& team), void* context) {
  const OpenMp* runtime = openmp.load();
  TeamState state;
  if (runtime == nullptr || num_threads <= 1) {
    Team alone(state, 1);
    return body(context, alone);
  }
  struct Shared {
    TeamState& state;
    NumThreads num_threads;
    void (*body)(void*, Team&);
    void* context;
  } shared{state, runtime->num_threads, body, context};
  runtime->parallel(
      [](void* given) {
        const Shared& mine = *static_cast<const Shared*>(given);
        // There may be fewer threads than were asked for. The runtime says so inside, the same to all of them.
        Team team(mine.state, mine.num_threads());
        mine.body(mine.context, team);
      },
      &shared, static_cast<unsigned>(num_threads), 0);
}

void Team::relax(int spins) {
  if (spins < kSpins) {
    pause();
  } else {
    sched_yield();
  }
}

}  // namespace disagg
