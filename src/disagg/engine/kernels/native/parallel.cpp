#include "parallel.h"

#include <dlfcn.h>

namespace disagg {

namespace {

// Part of libgomp's stable interface (what GCC emits for ``#pragma omp parallel``); LLVM's runtime has it too.
using GompParallel = void (*)(void (*body)(void*), void* context, unsigned num_threads, unsigned flags);
std::atomic<GompParallel> gomp_parallel{nullptr};

}  // namespace

bool use_openmp(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return false;
  // The handle is kept: the function must stay where it is for as long as the process lives.
  gomp_parallel = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
  return gomp_parallel.load() != nullptr;
}

void run_parallel(void (*body)(void*), void* context, int num_threads) {
  const GompParallel parallel = gomp_parallel.load(std::memory_order_relaxed);
  if (parallel == nullptr || num_threads <= 1) {
    body(context);
  } else {
    parallel(body, context, static_cast<unsigned>(num_threads), 0);
  }
}

}  // namespace disagg
