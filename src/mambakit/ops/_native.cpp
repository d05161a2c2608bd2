// What every CPU library offers beside its operations: its version, the instruction set that
// this machine can run, and the threads that the operations share.

#include "_threads.h"

#include <atomic>
#include <thread>
#include <vector>

namespace mambakit {
namespace {

std::atomic<OpenMPFork> openmp_fork{nullptr};

}  // namespace

void run_on_threads(int threads, void (*work)(void*), void* data) {
  if (threads <= 1) {
    work(data);
    return;
  }
  if (const OpenMPFork fork = openmp_fork.load(std::memory_order_acquire)) {
    fork(work, data, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(threads - 1);
  for (int i = 1; i < threads; ++i) others.emplace_back(work, data);
  work(data);
  for (std::thread& other : others) other.join();
}

}  // namespace mambakit

extern "C" {

// Raised whenever a function's arguments change: a stale library beside new Python is refused.
MK_EXPORT int mk_abi_version() { return 3; }

// The best library that this machine can run, as an index: 0 none, 1 baseline, 2 avx2, 3 avx512.
// Only ever asked of the baseline library, whose own instructions are the oldest.
MK_EXPORT int mk_supported_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("sse4.2")) return 0;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) {
    return 2;
  }
  return 3;
#else
  return 1;
#endif
}

// GNU OpenMP's entry point in the runtime that torch has loaded; null goes back to own threads.
MK_EXPORT void mk_use_openmp(void* fork) {
  mambakit::openmp_fork.store(reinterpret_cast<mambakit::OpenMPFork>(fork),
                              std::memory_order_release);
}

}  // extern "C"
