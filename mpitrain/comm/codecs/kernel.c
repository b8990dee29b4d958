/* The inner loops of codecs: each passes over its values once.
 *
 * Optional: codecs/kernel.py loads them where they were compiled.  Each value goes through the operations of int8.py,
 * halves.py and powersgd.py in the same order, each rounded to the array's type (no contraction, see hatch_build.py), so
 * that the bits are the same.
 */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && (!defined(__clang__) || __clang_major__ >= 14)
#define FOR_THIS_CPU __attribute__((target_clones("avx2", "default")))
#else
#define FOR_THIS_CPU
#endif

enum { ABI = 2, LARGEST_CODE = 127, TILE = 512 };

/* Bits and values. */
#define CAST(NAME, TO, FROM)       \
  static inline TO NAME(FROM x) {  \
    TO y;                          \
    memcpy(&y, &x, sizeof y);      \
    return y;                      \
  }
CAST(bits_f32, uint32_t, float)
CAST(value_f32, float, uint32_t)
CAST(bits_f64, uint64_t, double)
CAST(value_f64, double, uint64_t)

/* ---- int8: blocks of values as whole numbers of steps, rounded up with the probability that makes the mean right.
 * The sizes of floats are in the order of their bits, NaN above all.  Steps beyond float32 become its largest. */
#define QUANTISE(NAME, T, U, BITS, VALUE, FLOOR)                                                                      \
  FOR_THIS_CPU void NAME(const T *restrict values, const uint32_t *restrict words, const int64_t n,                   \
                         const int64_t block, int8_t *restrict codes, float *restrict steps) {                        \
    for (int64_t begin = 0; begin < n; begin += block, steps++) {                                                     \
      const int64_t end = n - begin < block ? n : begin + block;                                                      \
      U largest = 0;                                                                                                  \
      for (int64_t i = begin; i < end; i++) {                                                                         \
        const U size = BITS(values[i]) & (U)-1 >> 1;                                                                  \
        largest = size > largest ? size : largest;                                                                    \
      }                                                                                                               \
      const T exact = VALUE(largest) / LARGEST_CODE;                                                                  \
      *steps = exact > (T)FLT_MAX && exact < (T)INFINITY ? FLT_MAX : (float)exact;                                    \
      const T step = *steps == 0 ? 1 : *steps;                                                                        \
      for (int64_t i = begin; i < end; i++) {                                                                         \
        const T x = FLOOR(values[i] / step + (T)((float)(words[i] >> 8) * 0x1p-24f));                                 \
        const T least = x < -LARGEST_CODE ? -LARGEST_CODE : x, code = least > LARGEST_CODE ? LARGEST_CODE : least;    \
        codes[i] = (int8_t)(int32_t)(code == code ? code : 0);                                                        \
      }                                                                                                               \
    }                                                                                                                 \
  }

QUANTISE(mpitrain_quantise_f32, float, uint32_t, bits_f32, value_f32, floorf)
QUANTISE(mpitrain_quantise_f64, double, uint64_t, bits_f64, value_f64, floor)

#define DEQUANTISE(NAME, T)                                                                                     \
  FOR_THIS_CPU void NAME(const int8_t *restrict codes, const float *restrict steps, const int64_t n,            \
                         const int64_t block, T *restrict values) {                                             \
    for (int64_t begin = 0; begin < n; begin += block, steps++) {                                               \
      const int64_t end = n - begin < block ? n : begin + block;                                                \
      for (int64_t i = begin; i < end; i++) values[i] = (T)codes[i] * (T)*steps;                                \
    }                                                                                                           \
  }

DEQUANTISE(mpitrain_dequantise_f32, float)
DEQUANTISE(mpitrain_dequantise_f64, double)

/* ---- 16-bit floats, rounded to nearest with ties to even; what is finite and too large becomes the largest. */

enum { INFINITE = 0x7F800000, SIGN_SHIFT = 16 };

/* Where float16 has no more normal numbers, adding 0.5 leaves as many bits as it keeps, rounded by the addition. */
FOR_THIS_CPU void mpitrain_to_fp16(const float *restrict values, const int64_t n, uint16_t *restrict words) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = bits_f32(values[i]), sign = bits >> 31 << 15, size = bits & 0x7FFFFFFF;
    const uint32_t largest = 0x477FE000; /* 65504 */
    const uint32_t kept = size > largest && size < INFINITE ? largest : size;
    const uint32_t subnormal = bits_f32(value_f32(kept) + 0.5f) - 0x3F000000;
    const uint32_t normal = (kept - (112u << 23) + 0xFFF + (kept >> 13 & 1)) >> 13;
    const uint32_t finite = kept < 113u << 23 ? subnormal : normal;
    const uint32_t infinite = kept == INFINITE ? 0x7C00 : 0x7E00;
    words[i] = (uint16_t)(sign | (kept < INFINITE ? finite : infinite));
  }
}

FOR_THIS_CPU void mpitrain_from_fp16(const uint16_t *restrict words, const int64_t n, float *restrict values) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t sign = (uint32_t)(words[i] >> 15) << 31, shifted = (uint32_t)(words[i] & 0x7FFF) << 13;
    const uint32_t rebased = shifted + (112u << 23);
    const uint32_t subnormal = bits_f32(value_f32(rebased + (1u << 23)) - value_f32(113u << 23));
    const uint32_t finite = shifted < 1u << 23 ? subnormal : rebased;
    values[i] = value_f32(sign | (shifted < 0x7C00u << 13 ? finite : shifted | INFINITE));
  }
}

FOR_THIS_CPU void mpitrain_to_bf16(const float *restrict values, const int64_t n, uint16_t *restrict words) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t bits = bits_f32(values[i]), sign = bits & 0x80000000, size = bits & 0x7FFFFFFF;
    const uint32_t largest = 0x7F7F0000;
    const uint32_t kept = size > largest && size < INFINITE ? largest : size;
    const uint32_t rounded = (sign | kept) + 0x7FFF + (kept >> 16 & 1);
    words[i] = (uint16_t)(kept > INFINITE ? 0x7FC0 : rounded >> 16);
  }
}

FOR_THIS_CPU void mpitrain_from_bf16(const uint16_t *restrict words, const int64_t n, float *restrict values) {
  for (int64_t i = 0; i < n; i++) values[i] = value_f32((uint32_t)words[i] << 16);
}

/* ---- A product of thin matrices, term by term: out = left . terms, or taken away from out.
 * left: rows x rank; terms: rank x columns; out: rows x columns. */
#define PRODUCT(NAME, T)                                                                                              \
  FOR_THIS_CPU void NAME(const T *restrict left, const T *restrict terms, const int64_t rows, const int64_t rank,     \
                         const int64_t columns, const int64_t takes_away, T *restrict out) {                          \
    T sum[TILE];                                                                                                      \
    for (int64_t row = 0; row < rows; row++, left += rank, out += columns)                                            \
      for (int64_t begin = 0; begin < columns; begin += TILE) {                                                       \
        const int64_t length = columns - begin < TILE ? columns - begin : TILE;                                       \
        const T *term = terms + begin;                                                                                \
        int64_t k = 0;                                                                                                \
        for (int64_t i = 0; i < length; i++) sum[i] = (T)-0.0; /* to which any sum may be added */                    \
        for (; k + 4 <= rank; k += 4, term += 4 * columns) {                                                          \
          const T *b = term + columns, *c = b + columns, *d = c + columns;                                            \
          for (int64_t i = 0; i < length; i++)                                                                        \
            sum[i] = sum[i] + left[k] * term[i] + left[k + 1] * b[i] + left[k + 2] * c[i] + left[k + 3] * d[i];       \
        }                                                                                                             \
        for (; k < rank; k++, term += columns)                                                                        \
          for (int64_t i = 0; i < length; i++) sum[i] += left[k] * term[i];                                           \
        if (takes_away)                                                                                               \
          for (int64_t i = 0; i < length; i++) out[begin + i] -= sum[i];                                              \
        else                                                                                                          \
          for (int64_t i = 0; i < length; i++) out[begin + i] = sum[i];                                               \
      }                                                                                                               \
  }

PRODUCT(mpitrain_product_f32, float)
PRODUCT(mpitrain_product_f64, double)

int64_t mpitrain_codecs_abi(void) { return ABI; }
