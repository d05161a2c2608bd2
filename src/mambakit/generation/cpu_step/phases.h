// The phases of one token on several threads: each begins when the one before it is complete.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mambakit {

// A cache line of its own for each counter: threads count on them at once.
struct alignas(64) Counter {
  std::atomic<int64_t> value{0};
};

// One thread's walk through the phases, which all threads walk in the same order.
//
// A phase is cut into chunks, and each thread has a share of neighbouring chunks, which it takes
// in their order, so that memory is read as a stream. Who has finished takes what is left of
// the others' shares. So a phase ends as soon as its chunks are done, whichever threads run:
// there may be fewer than were asked for, and one may come late or be held up.
class Phases {
 public:
  // `counters` hold counters_for(phases, shares) zeros and belong to all threads.
  Phases(Counter* counters, int shares, int own) : next_(counters), shares_(shares), own_(own) {}

  static int64_t counters_for(int64_t phases, int shares) { return phases * (shares + 1); }

  // Call chunk(i) for each i in [0, count), on whichever thread; meanwhile() once on each
  // thread that finds nothing more to take; and return when all chunks are done.
  template <typename Chunk, typename Meanwhile>
  void run(int64_t count, const Chunk& chunk, const Meanwhile& meanwhile) {
    Counter* const taken = next_;
    std::atomic<int64_t>& done = taken[shares_].value;
    next_ += shares_ + 1;
    int64_t mine = 0;
    for (int turn = 0; turn < shares_; ++turn) {
      const int share = (own_ + turn) % shares_;
      const int64_t begin = first(share, count), size = first(share + 1, count) - begin;
      std::atomic<int64_t>& next = taken[share].value;
      // Looked at before it is counted on: a finished share stays in every thread's cache.
      while (next.load(std::memory_order_relaxed) < size) {
        const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
        if (i >= size) break;
        chunk(begin + i);
        ++mine;
      }
    }
    if (mine > 0) done.fetch_add(mine, std::memory_order_release);
    if (done.load(std::memory_order_acquire) == count) return;
    meanwhile();
    for (int spins = 0; done.load(std::memory_order_acquire) != count; ++spins) {
      if (spins < patience) {
        pause();
      } else {
        std::this_thread::yield();  // who has the missing chunk may be waiting for this core
      }
    }
  }

  // The first chunk of a thread's own share of `count`.
  int64_t first_own(int64_t count) const { return first(own_, count); }

 private:
  static constexpr int patience = 20000;  // about a millisecond

  int64_t first(int share, int64_t count) const { return count * share / shares_; }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  Counter* next_;
  int shares_, own_;
};

}  // namespace mambakit
