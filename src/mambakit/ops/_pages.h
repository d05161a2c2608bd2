// Ask for memory in large pages.

#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mambakit {

// Asks the system for large pages below a big output. Its memory is usually fresh, and to be
// handed it in pages of 4 KB takes as long as a third of a scan's arithmetic, and longer than a
// convolution's. The ends reach into large pages that neighbours share, for whom the advice is as
// good. A system that will not is no error.
inline void prefer_large_pages([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t large = uintptr_t{1} << 21;
  if (bytes < large) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(data) / large * large;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes + large - 1) / large * large;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace mambakit
