// Run the tasks of an operation on several threads.

#pragma once

#include <atomic>
#include <cstdint>

#define MK_EXPORT __attribute__((visibility("default")))

namespace mambakit {

// void GOMP_parallel(void (*fn)(void*), void* data, unsigned threads, unsigned flags)
using OpenMPFork = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Call work(data) once on each of `threads` threads and wait for all of them.
//
// The threads are those of the OpenMP runtime that torch itself uses, if it has one: they are
// awake already when an operation follows one of torch's, whereas a pool of our own would have
// to take the cores from torch's threads, which keep spinning for a while after their work.
void run_on_threads(int threads, void (*work)(void*), void* data);

// Call task(i) for each i in [0, count), on at most `threads` threads, in any order.
//
// A task must not depend on which thread runs it: results are then the same for every schedule.
template <typename Task>
void for_each_task(int64_t count, int threads, const Task& task) {
  struct Shared {
    const Task& task;
    std::atomic<int64_t> next;
    int64_t count;
  } shared{task, {0}, count};
  run_on_threads(
      static_cast<int>(count < threads ? count : threads),
      [](void* data) {
        Shared& s = *static_cast<Shared*>(data);
        for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) {
          s.task(i);
        }
      },
      &shared);
}

}  // namespace mambakit
