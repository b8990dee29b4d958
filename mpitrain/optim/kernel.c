/* The inner loops of optimizers: Adam's update in one pass over memory instead of a dozen, and sums of gradients.
 *
 * Optional: optim/kernel.py loads it where it was compiled.  Each value goes through the operations of optim/terms.py
 * and optim/adam.py in the same order, each rounded to the array's type (no contraction, see hatch_build.py), so that the
 * bits are the same.
 *
 * Gradients come as terms, which are summed and divided on the way, and may lie in memory of other ranks.  Caches decide
 * what that costs.  To write to a line that another core's cache has, too, takes many times as long as to any other where
 * cores share no cache; there parameters that others read are stored past the caches, and terms of others are flushed once
 * they are read, so that their owners find them nowhere when they write the next.  To flush a line takes long, and so does
 * to fetch one from another core; both go on beside arithmetic, so they are begun strip by strip while others are updated.
 * None of this changes a value.
 */

#define _POSIX_C_SOURCE 200809L

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "../arrays/past_cache.h"
#include "../arrays/slow_lines.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__x86_64__) && defined(__GLIBC__) && (!defined(__clang__) || __clang_major__ >= 14)
#define FOR_THIS_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_THIS_CPU
#endif

enum { OUTGROWS_BYTES = 2 << 20 }; /* with moments and parameters, what is read by then leaves caches by itself */
enum { ABI = 3, BLOCK_BYTES = SAMPLE_BYTES, LINE_BYTES = 64, STRIP_BYTES = 256 };

typedef struct {
  double penalty;          /* of an L2 penalty: added to the gradient, times the parameter; 0: none */
  double shrink;           /* what parameters are multiplied by first; 1: nothing */
  double follow_m, keep_v; /* 1 - beta1, beta2 */
  double follow_v;         /* 1 - beta2 */
  double eps, rate;        /* corrected for the moments' zero start */
  double count;            /* what the sum of the terms is divided by */
} settings;

typedef struct {
  const char *const *terms; /* in the order of summation */
  int64_t term_count;
  int64_t own;           /* which of them is this rank's */
  int64_t parameters_are_read; /* by other ranks, where they lie */
} sources;

/* ---- Lines that others have, too */

/* How many blocks of parameters in a row were slow to write through the caches, and how many long updates others read.  All
 * threads of a process find the same, sooner or later; until one has looked, it is taken for slow. */
static _Atomic int64_t slow = SLOW_IN_A_ROW, updates;

/* Whether the lines are to be spared: whether it is slow to write to those that another core has. */
int64_t mpitrain_optim_spares_lines(void) { return atomic_load_explicit(&slow, memory_order_relaxed) >= SLOW_IN_A_ROW; }

/* Write a block through the caches, to learn how long that takes. */
static void write_sample(char *to, const char *from) {
  const int64_t begin = now_ns();
  memcpy(to, from, BLOCK_BYTES);
  const int64_t before = atomic_load_explicit(&slow, memory_order_relaxed);
  atomic_store_explicit(&slow, slow_with(before, BLOCK_BYTES, begin), memory_order_relaxed);
}

/* Where to write a sample among the parameters: in the middle, now and then; -1: nowhere. */
static int64_t sample_at(int64_t nbytes) {
  if (nbytes < 2 * BLOCK_BYTES || atomic_fetch_add_explicit(&updates, 1, memory_order_relaxed) % SAMPLE_EVERY) return -1;
  return nbytes / 2 / BLOCK_BYTES * BLOCK_BYTES;
}

#if defined(__x86_64__)
static int can_flush(void) {
  static int known = -1; /* every thread finds the same */
  if (known < 0) {
    unsigned a, b = 0, c, d;
    known = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_CLFLUSHOPT) != 0;
  }
  return known;
}

static inline void flush_line(const char *line) { __asm__ volatile("clflushopt %0" : : "m"(*line)); }
#else
static int can_flush(void) { return 0; }

static inline void flush_line(const char *line) { (void)line; }
#endif

/* Of others' terms, fetch the strip that is wanted a block after the one at HERE.  A macro, for compilers drop calls of a
 * function that does nothing but that. */
#define FETCH_OTHERS(from, here, nbytes)                                              \
  for (int64_t k = 0; (here) + BLOCK_BYTES < (nbytes) && k < (from)->term_count; k++) \
    for (int64_t i = 0; k != (from)->own && i < STRIP_BYTES; i += LINE_BYTES)         \
      __builtin_prefetch((from)->terms[k] + (here) + BLOCK_BYTES + i);

/* Flush their strip at ``here``, which was read. */
static inline void flush_others(const sources *from, int64_t here) {
  for (int64_t k = 0; k < from->term_count; k++)
    for (int64_t i = 0; k != from->own && i < STRIP_BYTES; i += LINE_BYTES) flush_line(from->terms[k] + here + i);
}

/* Write the sum of a stretch of the terms, in their order. */
#define ADD_TERMS(T)                                                                                                \
  static inline void add_terms_##T(T *restrict g, const sources *from, const int64_t begin, const int64_t length) { \
    const T *first = (const T *)from->terms[0] + begin;                                                             \
    for (int64_t i = 0; i < length; i++) g[i] = first[i];                                                           \
    for (int64_t k = 1; k < from->term_count; k++) {                                                                \
      const T *term = (const T *)from->terms[k] + begin;                                                            \
      for (int64_t i = 0; i < length; i++) g[i] += term[i];                                                         \
    }                                                                                                               \
  }

ADD_TERMS(float)
ADD_TERMS(double)

/* ---- Adam */

/* By a power of two to divide is to multiply, with the same bits, and several times as fast. */
static int is_power_of_two(double x) {
  int exponent;
  return frexp(x, &exponent) == 0.5;
}

/* Update the elements from FIRST to LAST of a block. */
#define MOVE(T, ROOT, FIRST, LAST)                                          \
  for (int64_t i = FIRST; i < LAST; i++) {                                  \
    const T before = shrunk ? here[i] * shrink : here[i];                   \
    const T slope = penalised ? g[i] + before * penalty : g[i];             \
    const T first = first_moment[i] + (slope - first_moment[i]) * follow_m; \
    const T second = second_moment[i] * keep_v + slope * slope * follow_v;  \
    first_moment[i] = first;                                                \
    second_moment[i] = second;                                              \
    updated[i] = before - first / (ROOT(second) + eps) * rate;              \
  }

#define ADAM(NAME, T, ROOT)                                                                                   \
  FOR_THIS_CPU void NAME(T *restrict p, const sources *from, T *restrict m, T *restrict v, const int64_t n,   \
                         const settings *s) {                                                                 \
    const T penalty = (T)s->penalty, shrink = (T)s->shrink, follow_m = (T)s->follow_m, keep_v = (T)s->keep_v; \
    const T follow_v = (T)s->follow_v, eps = (T)s->eps, rate = (T)s->rate, count = (T)s->count;               \
    const int penalised = penalty != 0, shrunk = shrink != 1, spares = mpitrain_optim_spares_lines() != 0;    \
    const int exact = is_power_of_two(s->count);                                                              \
    const T share = (T)(1 / s->count);                                                                        \
    const int64_t nbytes = n * (int64_t)sizeof(T);                                                            \
    const int64_t sample = from->parameters_are_read ? sample_at(nbytes) : -1;                                \
    const int past = from->parameters_are_read && spares, relayed = from->term_count > 1;                     \
    const int flushed = spares && nbytes < OUTGROWS_BYTES && can_flush();                                     \
    enum { BLOCK = BLOCK_BYTES / sizeof(T), STRIP = STRIP_BYTES / sizeof(T) };                                \
    _Alignas(LINE_BYTES) T g[BLOCK], updated[BLOCK];                                                          \
    for (int64_t begin = 0; begin < n; begin += BLOCK) {                                                      \
      const int64_t length = n - begin < BLOCK ? n - begin : BLOCK;                                           \
      add_terms_##T(g, from, begin, length);                                                                  \
      if (exact)                                                                                              \
        for (int64_t i = 0; i < length; i++) g[i] *= share;                                                   \
      else                                                                                                    \
        for (int64_t i = 0; i < length; i++) g[i] /= count;                                                   \
      T *here = p + begin, *first_moment = m + begin, *second_moment = v + begin;                             \
      int64_t done = 0;                                                                                       \
      for (; relayed && done + STRIP <= length; done += STRIP) {                                              \
        const int64_t offset = (begin + done) * (int64_t)sizeof(T);                                           \
        FETCH_OTHERS(from, offset, nbytes)                                                                    \
        MOVE(T, ROOT, done, done + STRIP)                                                                     \
        if (flushed) flush_others(from, offset);                                                              \
      }                                                                                                       \
      MOVE(T, ROOT, done, length)                                                                             \
      if (begin * (int64_t)sizeof(T) == sample)                                                               \
        write_sample((char *)here, (const char *)updated);                                                    \
      else if (past)                                                                                          \
        copy_past_cache((char *)here, (const char *)updated, length * (int64_t)sizeof(T));                    \
      else                                                                                                    \
        memcpy(here, updated, length * sizeof(T));                                                            \
    }                                                                                                         \
    if (past) drain_past_cache();                                                                             \
  }

ADAM(mpitrain_adam_f32, float, sqrtf)
ADAM(mpitrain_adam_f64, double, sqrt)

/* ---- Sums that are kept */

#define ADD(NAME, T)                                                              \
  FOR_THIS_CPU void NAME(T *restrict sum, const sources *from, const int64_t n) { \
    const int64_t nbytes = n * (int64_t)sizeof(T);                                \
    const int flushed = mpitrain_optim_spares_lines() && can_flush();             \
    enum { BLOCK = BLOCK_BYTES / sizeof(T), STRIP = STRIP_BYTES / sizeof(T) };    \
    _Alignas(LINE_BYTES) T g[BLOCK];                                              \
    for (int64_t begin = 0; begin < n; begin += BLOCK) {                          \
      const int64_t length = n - begin < BLOCK ? n - begin : BLOCK;               \
      add_terms_##T(g, from, begin, length);                                      \
      int64_t done = 0;                                                           \
      for (; done + STRIP <= length; done += STRIP) {                             \
        const int64_t offset = (begin + done) * (int64_t)sizeof(T);               \
        FETCH_OTHERS(from, offset, nbytes)                                        \
        for (int64_t i = done; i < done + STRIP; i++) sum[begin + i] += g[i];     \
        if (flushed) flush_others(from, offset);                                  \
      }                                                                           \
      for (; done < length; done++) sum[begin + done] += g[done];                 \
    }                                                                             \
  }

ADD(mpitrain_add_f32, float)
ADD(mpitrain_add_f64, double)

int64_t mpitrain_optim_abi(void) { return ABI; }
