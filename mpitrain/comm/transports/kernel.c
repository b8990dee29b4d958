/* The inner loops of the shared transport: waiting for the ranks of a node, and combining what lies in their memory.
 *
 * Optional: transports/kernel.py loads it where it was compiled, and the same protocol in NumPy stands beside it.
 *
 * Memory.  Each rank has a row, mapped by all.  It begins with a page of three counters, each in a line of its own with
 * what is posted behind the first and offers behind the second, which the row's rank alone writes, and two slots for small
 * arrays; the places for chunks follow.  Every counter only grows.
 *
 * Ordering.  A rank publishes by a store with release order: all that it read and wrote before is complete when the
 * number is seen.  The others look by loads with acquire order: nothing that follows is done before.  Each datum is
 * handed over by such a pair, so that this is right in the C11 memory model, on x86, Arm and POWER alike.  Stores past
 * the cache lie outside of that model: no release orders them.  Whoever makes one drains it before the next publication.
 *
 * Waiting never lasts: a function that waits returns 1 after some time, with its progress kept in its argument, and
 * wants to be called again.  In between the caller handles signals.  0: done.
 */

#define _POSIX_C_SOURCE 200809L

#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

#include "../../arrays/past_cache.h"
#include "../../arrays/slow_lines.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#define RELAX() _mm_pause()
#define CLAIM(LINE) __asm__ volatile("prefetchw %0" : : "m"(*(LINE))) /* on processors without it, it does nothing */
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield")
#else
#define RELAX() ((void)0)
#endif
#ifndef CLAIM
#define CLAIM(LINE) __builtin_prefetch(LINE, 1)
#endif

#if defined(__x86_64__) && defined(__GLIBC__) && (!defined(__clang__) || __clang_major__ >= 14)
#define FOR_THIS_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_THIS_CPU
#endif

enum { ABI = 5, BLOCK_BYTES = 8192, LINE_BYTES = 128, PLACES = 3, BRIEF_YIELDS = 32 };
enum { CLAIMED_BYTES = 1024, CLAIMED_AHEAD_BYTES = 2048 };
enum { TRADED_BYTES = 512, AHEAD_BYTES = 1024, OFFERS = 2 * PLACES };
static const int64_t POLITE_NS = 1000000; /* how long to yield before the caller is told to come again */

enum posted { KIND = 0, BLOCK = 1, OFFSET = 2, ELEMENTS = 3, POSTED = 4 }; /* the numbers of a post */
enum { OUTGROWS_BYTES = 1 << 20 }; /* a core's own cache does not hold more */
enum counter { FENCE = 0, COPIED = 1, REDUCED = 2 }; /* the lines of a row's page */

typedef struct {
  char *rows;          /* row 0; row r is r * row_bytes further */
  int64_t row_bytes;
  int64_t header_bytes; /* of a row: its counters and slots */
  int64_t place_bytes; /* of each of the places of a row: PLACES for what is handed in, as many for results */
  int64_t chunk_bytes; /* what is put there: all of it, or less */
  int64_t slot_bytes;  /* of each of the two slots at the end of the header */
  int64_t rank, ranks;
  int64_t spins; /* looks before yielding; 0 where ranks share a core */
  int64_t fence; /* number of the last one that this rank came to */
  int64_t exchanges, chunks; /* how often ranks posted, and how many chunks passed through the places */
  int64_t late;  /* how often the present wait has told the caller to come again; 0: what is called now begins */
  int64_t patience; /* how often it does so before it only looks, as the caller naps between calls */
  int64_t to_memory; /* what others read is written past the cache */
  int64_t slow, writes; /* how often in a row it was slow to write through the cache; how often past it */
  int64_t trading; /* whether two ranks trade chunks; the same on both */
  int64_t traded, timed; /* whether the chunk before was; how many might have been timed */
  struct laid_out *laid_out; /* reductions of arrays where they lie, that were performed before */
  int64_t laid_out_count, laid_out_next; /* the next is likely to follow the one before, as it did the last time */
  int64_t brief; /* wait for some microseconds only: the caller holds the interpreter's lock */
} team;

typedef struct {
  int64_t kind;    /* index into FOLDS */
  int64_t item_bytes;
  int64_t divisor; /* of the result, for a mean; 0: none */
} operation;

typedef struct { /* what one rank combines between two fences */
  operation *op;
  char **parts; /* of each rank whose values are combined, from the first byte on */
  int64_t part_count;
  char **results; /* where they go */
  int64_t result_count;
  int64_t nbytes;
  int64_t past_cache; /* a bit for each result: whether it is stored past the cache, where ranks write so for others */
} combination;

typedef struct { /* reduces arrays that all ranks map: one combination for each level of the node */
  team *ranks;
  combination *steps;
  int64_t count, done;
} shared_reduction;

typedef struct laid_out {
  const int64_t *posts; /* of all ranks: what it reduces */
  shared_reduction *reduction;
} laid_out;

typedef struct { /* reduces ordinary arrays, chunk by chunk through the places */
  team *ranks;
  operation *op;
  const char *from;
  char *into;   /* may be the same */
  char **parts; /* room for a pointer per rank */
  int64_t nbytes;
  int64_t past_cache;
  int64_t met, handed_in, reduced, taken; /* progress: all have posted; chunks handed in, reduced and taken */
  shared_reduction *where_it_lies;    /* what is performed instead */
  int64_t post[POSTED];               /* told to the others first: kind of call, block, offset, elements */
} stream;

/* ---- Waiting */

static _Atomic int64_t *counter_of(const team *t, int64_t rank, enum counter which) {
  return (_Atomic int64_t *)(t->rows + rank * t->row_bytes + which * LINE_BYTES);
}

static void publish(const team *t, enum counter which, int64_t number) {
  atomic_store_explicit(counter_of(t, t->rank, which), number, memory_order_release);
}

static int come(const _Atomic int64_t *counter, int64_t number) {
  return atomic_load_explicit((_Atomic int64_t *)counter, memory_order_acquire) >= number;
}

static int missing(const team *t, const _Atomic int64_t *counter, int64_t number) {
  if (t->late > t->patience) return !come(counter, number);
  for (int64_t left = t->late ? 0 : t->spins; left > 0; left--) {
    if (come(counter, number)) return 0;
    RELAX();
  }
  if (t->brief) {
    for (int looks = t->spins ? 0 : BRIEF_YIELDS; looks > 0 && !come(counter, number); looks--) sched_yield();
    return !come(counter, number);
  }
  for (const int64_t end = now_ns() + POLITE_NS; now_ns() < end;) {
    for (int looks = 0; looks < 16; looks++) {
      if (come(counter, number)) return 0;
      sched_yield();
    }
  }
  return 1;
}

/* Wait until a counter of every other rank has come to a number. */
static int late(team *t, enum counter which, int64_t number) {
  for (int64_t rank = 0; rank < t->ranks; rank++)
    if (rank != t->rank && missing(t, counter_of(t, rank, which), number)) {
      t->late++;
      return 1;
    }
  t->late = 0;
  return 0;
}

/* ---- Combining: out[i] = left[i] op right[i]; out may be left or right, and so may what takes the result, too */

typedef struct {
  void (*once)(void *out, const void *left, const void *right, int64_t n);
  void (*twice)(void *out, void *too, const void *left, const void *right, int64_t n);
  void (*trade)(void *out, void *theirs, const void *own, const void *left, const void *right, int64_t n);
} fold;

#define FOLD(NAME, T, EXPRESSION)                                                                                \
  FOR_THIS_CPU static void NAME##_once(void *out, const void *left, const void *right, int64_t n) {              \
    T *o = out;                                                                                                  \
    const T *l = left, *r = right;                                                                               \
    _Pragma("GCC ivdep") for (int64_t i = 0; i < n; i++) {                                                       \
      const T a = l[i], b = r[i];                                                                                \
      o[i] = (T)(EXPRESSION);                                                                                    \
    }                                                                                                            \
  }                                                                                                              \
  FOR_THIS_CPU static void NAME##_twice(void *out, void *too, const void *left, const void *right, int64_t n) { \
    T *o = out, *p = too;                                                                                        \
    const T *l = left, *r = right;                                                                               \
    _Pragma("GCC ivdep") for (int64_t i = 0; i < n; i++) {                                                       \
      const T a = l[i], b = r[i];                                                                                \
      o[i] = p[i] = (T)(EXPRESSION);                                                                             \
    }                                                                                                            \
  }                                                                                                              \
  FOR_THIS_CPU static void NAME##_trade(                                                                         \
      void *out, void *theirs, const void *own, const void *left, const void *right, int64_t n) {                \
    T *o = out, *t = theirs;                                                                                     \
    const T *l = left, *r = right, *w = own;                                                                     \
    _Pragma("GCC ivdep") for (int64_t i = 0; i < n; i++) {                                                       \
      const T a = l[i], b = r[i];                                                                                \
      t[i] = w[i];                                                                                               \
      o[i] = (T)(EXPRESSION);                                                                                    \
    }                                                                                                            \
  }

/* U: the unsigned type in which integers wrap around instead of overflowing */
#define INTEGER(NAME, T, U)                 \
  FOLD(sum_##NAME, T, (U)a + (U)b)          \
  FOLD(prod_##NAME, T, (U)a *(U)b)          \
  FOLD(min_##NAME, T, a < b ? a : b)        \
  FOLD(max_##NAME, T, a > b ? a : b)        \
  FOLD(and_##NAME, T, a &b)                 \
  FOLD(or_##NAME, T, a | b)

/* A NaN on either side stays one, as with NumPy. */
#define FLOAT(NAME, T)                                 \
  FOLD(sum_##NAME, T, a + b)                           \
  FOLD(prod_##NAME, T, a *b)                           \
  FOLD(min_##NAME, T, (a < b || a != a) ? a : b)       \
  FOLD(max_##NAME, T, (a > b || a != a) ? a : b)       \
  FOR_THIS_CPU static void divide_##NAME(void *values, int64_t n, int64_t divisor) { \
    T *v = values;                                     \
    for (int64_t i = 0; i < n; i++) v[i] /= (T)divisor; \
  }

INTEGER(i8, int8_t, uint32_t)
INTEGER(u8, uint8_t, uint32_t)
INTEGER(i16, int16_t, uint32_t)
INTEGER(u16, uint16_t, uint32_t)
INTEGER(i32, int32_t, uint32_t)
INTEGER(u32, uint32_t, uint32_t)
INTEGER(i64, int64_t, uint64_t)
INTEGER(u64, uint64_t, uint64_t)
FLOAT(f32, float)
FLOAT(f64, double)

#define FOLDS_OF(NAME) {NAME##_once, NAME##_twice, NAME##_trade}
#define FLOATS(NAME) FOLDS_OF(sum_##NAME), FOLDS_OF(prod_##NAME), FOLDS_OF(min_##NAME), FOLDS_OF(max_##NAME)
#define INTEGERS(NAME) FLOATS(NAME), FOLDS_OF(and_##NAME), FOLDS_OF(or_##NAME)
enum { F32 = 8, OPS = 6 };
static const fold FOLDS[][OPS] = {
    {INTEGERS(i8)},  {INTEGERS(u8)},  {INTEGERS(i16)}, {INTEGERS(u16)}, {INTEGERS(i32)},
    {INTEGERS(u32)}, {INTEGERS(i64)}, {INTEGERS(u64)}, {FLOATS(f32)},   {FLOATS(f64)},
};

static const fold *fold_of(const operation *op) { return &FOLDS[op->kind / OPS][op->kind % OPS]; }

static void divide(const operation *op, void *values, int64_t n) {
  if (op->divisor) (op->kind / OPS == F32 ? divide_f32 : divide_f64)(values, n, op->divisor);
}

static void copy(char *target, const char *source, int64_t nbytes, int64_t past_cache) {
  if (past_cache)
    copy_past_cache(target, source, nbytes);
  else
    memcpy(target, source, nbytes);
}

/* Copy by the core's own loads and stores.
 *
 * On lines that another core holds, the string instructions that memcpy takes for large pieces were a twentieth slower,
 * and GCC puts memcpy back for a loop that copies unless it is told not to. */
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("no-tree-loop-distribute-patterns")))
#endif
FOR_THIS_CPU static void copy_through(char *restrict target, const char *restrict source, int64_t nbytes) {
  for (int64_t i = 0; i < nbytes; i++) target[i] = source[i];
}

/* Take note of how long it took, since BEGIN, to have lines that another core holds. */
static void learn(team *t, int64_t nbytes, int64_t begin) {
  t->slow = slow_with(t->slow, nbytes, begin);
  t->to_memory = t->slow >= SLOW_IN_A_ROW;
}

/* Write what others read next.
 *
 * Where ranks share a cache it stays there.  Where they do not, to write to lines that another core has read takes
 * several times as long as to write past the cache, so that it is done so.  What goes past the cache is drained here: by
 * the time of the publication the rank may have found that it need not do so any more. */
static void write_for_others(team *t, char *to, const char *from, int64_t nbytes) {
  int64_t tried = nbytes;
  if (t->to_memory) tried = nbytes >= SAMPLE_BYTES && t->writes++ % SAMPLE_EVERY == 0 ? SAMPLE_BYTES : 0;
  const int64_t begin = tried >= SAMPLE_BYTES ? now_ns() : 0;
  copy_through(to, from, tried);
  if (tried >= SAMPLE_BYTES) learn(t, tried, begin);
  if (tried == nbytes) return;
  copy_past_cache(to + tried, from + tried, nbytes - tried);
  drain_past_cache();
}

/* Whether results are written past the cache: they are large, or it is slow to write through it. */
static int64_t is_past_cache(const stream *s) {
  return s->past_cache || (s->ranks->to_memory && s->nbytes >= OUTGROWS_BYTES);
}

static int stays(const combination *c, int64_t result) {
  return result >= 0 && !(c->past_cache >> result & 1);
}

/* Ask for lines as one who writes to them. */
static void claim(const char *lines, int64_t nbytes) {
  for (int64_t i = 0; i < nbytes; i += 64) CLAIM(lines + i);
}

static int is_two_in_place(const combination *c) {
  return c->part_count == 2 && c->result_count == 2 && c->results[0] == c->parts[0] && c->results[1] == c->parts[1];
}

/* Combine two arrays where they lie.
 *
 * Lines that another core has written to are asked for ahead, by one who writes.  Without it they came twice, first to be
 * read, and that took three times as long.  (Among more parts, which are copied block by block, it gained nothing.) */
static void combine_two_in_place(const combination *c) {
  const fold *const f = fold_of(c->op);
  char *const left = c->parts[0], *const right = c->parts[1];
  claim(left, CLAIMED_AHEAD_BYTES);
  claim(right, CLAIMED_AHEAD_BYTES);
  for (int64_t begin = 0; begin < c->nbytes; begin += CLAIMED_BYTES) {
    const int64_t rest = c->nbytes - begin, length = rest < CLAIMED_BYTES ? rest : CLAIMED_BYTES;
    const int64_t n = length / c->op->item_bytes;
    char *const l = left + begin, *const r = right + begin;
    claim(l + CLAIMED_AHEAD_BYTES, CLAIMED_BYTES);
    claim(r + CLAIMED_AHEAD_BYTES, CLAIMED_BYTES);
    f->twice(l, r, l, r, n);
    divide(c->op, l, n);
    divide(c->op, r, n);
  }
}

/* Ask for lines as one who reads them. */
static void prefetch(const char *lines, int64_t nbytes) {
  for (int64_t i = 0; i < nbytes; i += 64) __builtin_prefetch(lines + i);
}

static int is_two_into_one(const combination *c) {
  return c->part_count == 2 && c->result_count == 1 && !c->past_cache && c->nbytes >= OUTGROWS_BYTES;
}

/* Combine two arrays into a third, or into one of them, that do not fit into a core's own cache.
 *
 * Three streams are more than the processor foresees by itself: 8 and 16 MiB took a fifth less time so. */
static void combine_two_into_one(const combination *c) {
  const fold *const f = fold_of(c->op);
  for (int64_t begin = 0; begin < c->nbytes; begin += CLAIMED_BYTES) {
    const int64_t rest = c->nbytes - begin, length = rest < CLAIMED_BYTES ? rest : CLAIMED_BYTES;
    const int64_t n = length / c->op->item_bytes;
    char *const left = c->parts[0] + begin, *const right = c->parts[1] + begin, *const out = c->results[0] + begin;
    claim(out + CLAIMED_AHEAD_BYTES, CLAIMED_BYTES);
    prefetch(left + CLAIMED_AHEAD_BYTES, CLAIMED_BYTES);
    prefetch(right + CLAIMED_AHEAD_BYTES, CLAIMED_BYTES);
    f->once(out, left, right, n);
    divide(c->op, out, n);
  }
}

/* Combine in order, a block at a time, and store where it belongs; a result may be one of the parts.
 *
 * Two parts are combined straight into the last result, and the one before, where they stay in the cache: copies less. */
static void combine(const combination *c) {
  if (is_two_in_place(c)) {
    combine_two_in_place(c);
    return;
  }
  if (is_two_into_one(c)) {
    combine_two_into_one(c);
    return;
  }
  _Alignas(64) char block[BLOCK_BYTES];
  const fold *const f = fold_of(c->op);
  const int64_t last = c->result_count - 1, straight = c->part_count == 2 && stays(c, last);
  const int64_t twice = straight && !c->op->divisor && stays(c, last - 1), copies = c->result_count - straight - twice;
  for (int64_t begin = 0; begin < c->nbytes; begin += BLOCK_BYTES) {
    const int64_t left = c->nbytes - begin, length = left < BLOCK_BYTES ? left : BLOCK_BYTES;
    const int64_t n = length / c->op->item_bytes;
    char *const out = straight ? c->results[last] + begin : block;
    if (twice)
      f->twice(out, c->results[last - 1] + begin, c->parts[0] + begin, c->parts[1] + begin, n);
    else
      f->once(out, c->parts[0] + begin, c->parts[1] + begin, n);
    for (int64_t i = 2; i < c->part_count; i++) f->once(out, out, c->parts[i] + begin, n);
    divide(c->op, out, n);
    for (int64_t i = 0; i < copies; i++) copy(c->results[i] + begin, out, length, c->past_cache >> i & 1);
  }
  if (c->past_cache) drain_past_cache();
}

/* ---- What Python calls */

int64_t mpitrain_abi(void) { return ABI; }

int mpitrain_fence(team *t) {
  if (!t->late) publish(t, FENCE, ++t->fence);
  return late(t, FENCE, t->fence);
}

int mpitrain_reduce_shared(shared_reduction *r) {
  for (; r->done < r->count; r->done++) {
    if (mpitrain_fence(r->ranks)) return 1;
    combination step = r->steps[r->done];
    if (!r->ranks->to_memory) step.past_cache = 0; /* elsewhere it is the slower way, even for what no cache holds */
    combine(&step);
  }
  if (mpitrain_fence(r->ranks)) return 1;
  r->done = 0;
  return 0;
}

typedef struct {
  int64_t begin, end;
} range; /* bytes of a chunk */

static int64_t length_of(const stream *s, int64_t chunk) {
  const int64_t left = s->nbytes - chunk * s->ranks->chunk_bytes;
  return left < s->ranks->chunk_bytes ? left : s->ranks->chunk_bytes;
}

/* What a rank reduces of a chunk: whole cache lines. */
static range shard(const stream *s, int64_t chunk, int64_t rank) {
  const int64_t bytes = length_of(s, chunk), lines = (bytes + 63) / 64;
  const int64_t begin = lines * rank / s->ranks->ranks * 64, end = lines * (rank + 1) / s->ranks->ranks * 64;
  return (range){begin < bytes ? begin : bytes, end < bytes ? end : bytes};
}

/* The places of a rank for what it hands in (COPIED) and for its results (REDUCED) are used in turn. */
static char *place(const stream *s, int64_t chunk, int64_t rank, enum counter which) {
  const team *t = s->ranks;
  const int64_t number = (which == REDUCED ? PLACES : 0) + (t->chunks + chunk) % PLACES;
  return t->rows + rank * t->row_bytes + t->header_bytes + number * t->place_bytes;
}

/* Whether a rank would trade a chunk.  By the time it hands in the sixth chunk after it, all have taken that one. */
static int64_t *offer(const stream *s, int64_t chunk, int64_t rank) {
  const team *t = s->ranks;
  return (int64_t *)(t->rows + rank * t->row_bytes + COPIED * LINE_BYTES) + 1 + (t->chunks + chunk) % OFFERS;
}

static int trades(const stream *s, int64_t chunk) {
  return s->ranks->ranks == 2 && *offer(s, chunk, 0) && *offer(s, chunk, 1);
}

static void hand_in(stream *s) {
  team *t = s->ranks;
  const int64_t chunk = s->handed_in++, nbytes = length_of(s, chunk);
  const range own = shard(s, chunk, t->rank);
  const char *from = s->from + chunk * t->chunk_bytes;
  char *to = place(s, chunk, t->rank, COPIED);
  *offer(s, chunk, t->rank) = t->trading && !t->to_memory;
  if (t->traded) { /* the lines are at hand */
    copy_through(to, from, own.begin);
    copy_through(to + own.end, from + own.end, nbytes - own.end);
  } else {
    write_for_others(t, to, from, own.begin);
    write_for_others(t, to + own.end, from + own.end, nbytes - own.end);
  }
  publish(t, COPIED, t->chunks + s->handed_in);
}

/* Find out now and then how fast lines come. */
static void time_lines(team *t, const char *lines, int64_t nbytes) {
  if (nbytes < SAMPLE_BYTES || t->timed++ % SAMPLE_EVERY) return;
  const int64_t begin = now_ns();
  claim(lines, SAMPLE_BYTES);
  for (int64_t i = 0; i < SAMPLE_BYTES; i += 64) (void)*(const volatile char *)(lines + i);
  learn(t, SAMPLE_BYTES, begin);
}

/* Between two ranks the same lines carry values both ways.
 *
 * How fast lines pass between cores is what limits such a reduction.  A line that is handed over goes to the core that
 * reads it and comes back when the next values are written: two ways for each.  So the rank whose shard it is asks for the
 * lines that hold the other's values as if to write, reads them and leaves its own there; the other then has the answer,
 * and lines to write to: one way for each.  Both combine all values, in the order of the ranks and by one loop, so that
 * not even NaNs differ: the first leaves its own values there again, which nobody reads.
 *
 * Stores leave a core in their order.  One stream of them to lines that are elsewhere holds up every other, so that all
 * lines are asked for ahead, those of the result too, and a shard that is handed in is copied by itself.
 *
 * Where cores share no cache lines come slowly; if either rank finds that, chunks go past the caches as among more ranks. */
static void trade(const stream *s, int64_t chunk, int64_t whose) {
  team *t = s->ranks;
  const fold *const f = fold_of(s->op);
  const range part = shard(s, chunk, whose);
  const int64_t at = chunk * t->chunk_bytes;
  char *const lines = place(s, chunk, 1 - whose, COPIED);
  if (whose == t->rank) time_lines(t, lines + part.begin, part.end - part.begin);
  claim(lines + part.begin, AHEAD_BYTES);
  for (int64_t begin = part.begin; begin < part.end; begin += TRADED_BYTES) {
    const int64_t left = part.end - begin, length = left < TRADED_BYTES ? left : TRADED_BYTES;
    const int64_t n = length / s->op->item_bytes;
    const char *const own = s->from + at + begin;
    char *const theirs = lines + begin, *const out = s->into + at + begin;
    claim(theirs + AHEAD_BYTES, TRADED_BYTES);
    claim(out + AHEAD_BYTES, TRADED_BYTES);
    f->trade(out, theirs, own, t->rank ? theirs : own, t->rank ? own : theirs, n);
    divide(s->op, out, n);
  }
}

static void reduce_own(stream *s) {
  team *t = s->ranks;
  const int64_t chunk = s->reduced++;
  t->traded = trades(s, chunk);
  if (t->traded) {
    trade(s, chunk, t->rank);
  } else {
    const range own = shard(s, chunk, t->rank);
    const int64_t at = chunk * t->chunk_bytes + own.begin, length = own.end - own.begin;
    for (int64_t rank = 0; rank < t->ranks; rank++) s->parts[rank] = place(s, chunk, rank, COPIED) + own.begin;
    s->parts[t->rank] = (char *)s->from + at;
    char *results[] = {place(s, chunk, t->rank, REDUCED) + own.begin, s->into + at};
    combine(&(combination){s->op, s->parts, t->ranks, results, 2, length, t->to_memory | is_past_cache(s) << 1});
  }
  publish(t, REDUCED, t->chunks + s->reduced);
}

static void take(stream *s) {
  const team *t = s->ranks;
  const int64_t chunk = s->taken++;
  if (trades(s, chunk)) {
    trade(s, chunk, 1 - t->rank);
    return;
  }
  char *into = s->into + chunk * t->chunk_bytes;
  for (int64_t rank = 0; rank < t->ranks; rank++) {
    const range part = shard(s, chunk, rank);
    if (rank == t->rank) continue;
    const char *from = place(s, chunk, rank, REDUCED) + part.begin;
    (is_past_cache(s) ? copy_past_cache : copy_through)(into + part.begin, from, part.end - part.begin);
  }
}

/* Small arrays are handed over whole, in a slot, and every rank combines all: one fence.
 *
 * Two slots in turn: who writes to one again has passed a fence after all have read it. */
static int is_small(const stream *s) { return s->nbytes <= s->ranks->slot_bytes; }

static char *slot(const team *t, int64_t rank) {
  return t->rows + rank * t->row_bytes + t->header_bytes - (1 + t->exchanges % 2) * t->slot_bytes;
}

static void hand_over(stream *s) { memcpy(slot(s->ranks, s->ranks->rank), s->from, s->nbytes); }

static void combine_all(const stream *s) {
  const team *t = s->ranks;
  const operation *op = s->op;
  const fold *const f = fold_of(op);
  const int64_t n = s->nbytes / op->item_bytes;
  f->once(s->into, slot(t, 0), slot(t, 1), n);
  for (int64_t rank = 2; rank < t->ranks; rank++) f->once(s->into, s->into, slot(t, rank), n);
  divide(op, s->into, n);
}

static int reduce_small(stream *s) {
  team *t = s->ranks;
  if (!s->met) {
    if (!t->late) {
      t->exchanges++;
      hand_over(s);
    }
    if (mpitrain_fence(t)) return 1;
  }
  combine_all(s);
  s->met = 0;
  return 0;
}

/* In step k a rank hands in its chunk k + 1, reduces its shard of chunk k, and takes the other shards of chunk k - 1, so
 * that ranks wait for what the others have done a while before.
 *
 * Three places of each kind suffice without further waiting: a rank hands in chunk k + 1 after it has taken chunk k - 2,
 * hence after all have reduced that, and read what lay in the place before.  It reduces chunk k after all have handed it
 * in, hence taken chunk k - 3, whose results lay in the place before. */
int mpitrain_stream(stream *s) {
  if (is_small(s)) return reduce_small(s);
  team *t = s->ranks;
  const int64_t chunks = (s->nbytes + t->chunk_bytes - 1) / t->chunk_bytes;
  while (s->taken < chunks) {
    while (s->handed_in < chunks && s->handed_in < s->reduced + 2 && s->handed_in < s->taken + PLACES) hand_in(s);
    if (s->reduced < chunks && s->reduced < s->taken + 2) {
      if (late(t, COPIED, t->chunks + s->reduced + 1)) return 1;
      reduce_own(s);
    } else {
      if (late(t, REDUCED, t->chunks + s->taken + 1)) return 1;
      take(s);
    }
  }
  drain_past_cache();
  t->chunks += chunks;
  s->met = s->handed_in = s->reduced = s->taken = 0;
  return 0;
}

static int64_t *posted(const team *t, int64_t rank) {
  return (int64_t *)(t->rows + rank * t->row_bytes) + 1 + t->exchanges % 2 * POSTED;
}

static int is_posted(const team *t, const laid_out *l) {
  int64_t rank = 0;
  while (rank < t->ranks && !memcmp(posted(t, rank), l->posts + rank * POSTED, POSTED * sizeof(int64_t))) rank++;
  return rank == t->ranks;
}

static shared_reduction *find_laid_out(team *t) {
  for (int64_t tried = 0; tried < t->laid_out_count; tried++) {
    const laid_out *each = &t->laid_out[(t->laid_out_next + tried) % t->laid_out_count];
    if (!is_posted(t, each)) continue;
    t->laid_out_next = each - t->laid_out + 1;
    return each->reduction;
  }
  return 0;
}

/* Tell the others what this call is about.  Stream if all told the same, and that no array lies in shared memory; if
 * they told what was laid out before, perform that.  2: neither; what they told is in their lines, and nothing has been
 * reduced. */
int mpitrain_allreduce(stream *s) {
  team *t = s->ranks;
  if (!s->met) {
    if (!t->late) {
      t->exchanges++; /* two places in turn: who posts again in the same one has passed a fence after all have read it */
      if (is_small(s))
        hand_over(s);
      else if (s->post[BLOCK] < 0)
        hand_in(s);
      memcpy(posted(t, t->rank), s->post, sizeof s->post);
    }
    if (mpitrain_fence(t)) return 1;
    s->met = 1;
    int located = 0;
    for (int64_t rank = 0; rank < t->ranks; rank++) {
      const int64_t *other = posted(t, rank);
      if (other[KIND] != s->post[KIND] || other[ELEMENTS] != s->post[ELEMENTS]) return 2;
      located |= other[BLOCK] >= 0;
    }
    s->where_it_lies = located ? find_laid_out(t) : 0;
    if (located && !s->where_it_lies) return 2;
  }
  if (!s->where_it_lies) return mpitrain_stream(s);
  if (mpitrain_reduce_shared(s->where_it_lies)) return 1;
  s->where_it_lies = 0;
  s->met = 0;
  return 0;
}

/* Begin mpitrain_allreduce, and wait for the others only briefly, since the caller holds the interpreter's lock.  If it
 * returns 1, mpitrain_allreduce is to be called until the reduction is done. */
int mpitrain_begin_allreduce(
    stream *s, operation *op, const char *from, char *into, int64_t nbytes, int64_t past_cache, int64_t kind, int64_t block,
    int64_t offset) {
  s->op = op, s->from = from, s->into = into, s->nbytes = nbytes, s->past_cache = past_cache;
  s->post[KIND] = kind, s->post[BLOCK] = block, s->post[OFFSET] = offset, s->post[ELEMENTS] = nbytes / op->item_bytes;
  s->ranks->brief = 1;
  const int said = mpitrain_allreduce(s);
  s->ranks->brief = 0;
  return said;
}
