// Sharing rows among threads.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "vector.h"

namespace quietstar::cpu::QUIETSTAR_ISA {
namespace {

// Less work than this is finished before a second thread could be woken for it.
constexpr int64_t kWorkOfAThread = 1 << 15;

// How many threads to use for `rows` rows, given the work per row in units of about a nanosecond.
inline int useful_threads(int64_t rows, int64_t work_of_a_row, int threads) {
  const int64_t useful = rows * work_of_a_row / kWorkOfAThread + 1;
  const int64_t most = useful < rows ? useful : rows;
  return most < threads ? (most > 1 ? (int)most : 1) : threads;
}

// Calls body(row, thread) for all rows. Threads take further rows when they are done with theirs: on a busy machine,
// equal shares would wait for the slowest thread.
template <class Body>
void for_rows(int64_t rows, int threads, Body body) {
  [[maybe_unused]] int64_t share = rows / (threads * int64_t{16});
  if (share < 1) share = 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, share) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
#ifdef _OPENMP
    body(row, omp_get_thread_num());
#else
    body(row, 0);
#endif
  }
}

}  // namespace
}  // namespace quietstar::cpu::QUIETSTAR_ISA
