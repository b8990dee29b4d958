/* Whether it is slow to write to lines that another core has read, which depends on whether cores share a cache.
 *
 * It cannot be asked for, and may change while a virtual machine runs; but it shows in how long a piece takes to write, so
 * that each rank finds out for itself, and looks again now and then.  Who includes this defines _POSIX_C_SOURCE. */

#ifndef MPITRAIN_SLOW_LINES_H
#define MPITRAIN_SLOW_LINES_H

#include <stdint.h>
#include <time.h>

enum { SAMPLE_BYTES = 4096, SAMPLE_EVERY = 16, SLOW_BYTES_PER_NS = 4, SLOW_IN_A_ROW = 3 };

static inline int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000 + t.tv_nsec;
}

/* How many pieces in a row were slow to write, of which NBYTES since BEGIN, in ns, are the last. */
static inline int64_t slow_with(int64_t before, int64_t nbytes, int64_t begin) {
  return (now_ns() - begin) * SLOW_BYTES_PER_NS > nbytes ? before + 1 : 0;
}

#endif
