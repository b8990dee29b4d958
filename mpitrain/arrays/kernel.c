/* Random words: Philox4x32-10 of many counters at once.
 *
 * Optional: arrays/kernel.py loads it where it was compiled.  The words are those of `philox4x32` in arrays/random.py,
 * which names the source.
 */

#include <stdint.h>

#if defined(__x86_64__) && defined(__GLIBC__) && (!defined(__clang__) || __clang_major__ >= 14)
#define FOR_THIS_CPU __attribute__((target_clones("avx2", "default")))
#else
#define FOR_THIS_CPU
#endif

#define HIGH(A, B) ((uint32_t)((uint64_t)(A) * (B) >> 32))

enum { ABI = 1, LANES = 32, WORDS = 4, ROUNDS = 10 };

/* Words 4 * first to 4 * stop of each row; the last counters that are computed may be more than are written. */
FOR_THIS_CPU void mpitrain_philox(const uint64_t *rows, int64_t count, uint64_t first, uint64_t stop, uint32_t step,
                                  uint32_t key0, uint32_t key1, uint32_t *out) {
  for (int64_t row = 0; row < count; row++)
    for (uint64_t block = first; block < stop; block += LANES) {
      uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES], k0 = key0, k1 = key1;
      for (int i = 0; i < LANES; i++) {
        c0[i] = (uint32_t)block + i;
        c1[i] = (uint32_t)rows[row];
        c2[i] = (uint32_t)(rows[row] >> 32);
        c3[i] = step;
      }
      for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < LANES; i++) {
          const uint32_t high0 = HIGH(0xD2511F53, c0[i]), low0 = 0xD2511F53 * c0[i];
          const uint32_t high2 = HIGH(0xCD9E8D57, c2[i]), low2 = 0xCD9E8D57 * c2[i];
          c0[i] = high2 ^ c1[i] ^ k0;
          c1[i] = low2;
          c2[i] = high0 ^ c3[i] ^ k1;
          c3[i] = low0;
        }
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
      }
      const uint64_t left = stop - block, lanes = left < LANES ? left : LANES;
      for (uint64_t i = 0; i < lanes; i++, out += WORDS) out[0] = c0[i], out[1] = c1[i], out[2] = c2[i], out[3] = c3[i];
    }
}

int64_t mpitrain_arrays_abi(void) { return ABI; }
