/* Copying past the caches: what is written so is not kept in the caches of the core that writes it. */

#ifndef MPITRAIN_PAST_CACHE_H
#define MPITRAIN_PAST_CACHE_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

enum { STORE_BYTES = 16 };

static inline void copy_past_cache(char *target, const char *source, int64_t nbytes) {
#if defined(__x86_64__)
  int64_t done = -(uintptr_t)target & (STORE_BYTES - 1);
  if (done > nbytes) done = nbytes;
  memcpy(target, source, done);
  for (; done + STORE_BYTES <= nbytes; done += STORE_BYTES)
    _mm_stream_si128((__m128i *)(target + done), _mm_loadu_si128((const __m128i *)(source + done)));
  memcpy(target + done, source + done, nbytes - done);
#else
  memcpy(target, source, nbytes);
#endif
}

/* Such stores are not ordered by a release, nor by anything else that ranks tell each other next; they are by this. */
static inline void drain_past_cache(void) {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

#endif
