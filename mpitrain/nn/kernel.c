/* The inner loops of layers: maximum pooling, its gradient, and ReLU's, each in one pass over memory instead of several.
 *
 * Optional: nn/kernel.py loads it where it was compiled.  Each value goes through the operations of nn/pooling.py and
 * nn/activations.py, so that the bits are the same, but for the sign of a maximum among zeros of both signs, which NumPy
 * leaves to the processor.
 */

#include <stdint.h>

#if defined(__x86_64__) && defined(__GLIBC__) && (!defined(__clang__) || __clang_major__ >= 14)
#define FOR_THIS_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_THIS_CPU
#endif

enum { ABI = 1, LANES = 64 };

/* How windows tile images, which are channels-last; rows are counted through all images. */
typedef struct {
  int64_t rows, columns, channels; /* of windows, and of what they become */
  int64_t height, width;           /* of a window */
} tiling;

/* Where the upper left pixel of a window lies among those of the images. */
static inline int64_t corner(const tiling *t, int64_t window) {
  return (window / t->columns * t->height * t->columns + window % t->columns) * t->width * t->channels;
}

/* Where a pixel of a window lies from there. */
static inline int64_t place(const tiling *t, int64_t row, int64_t column) {
  return (row * t->columns * t->width + column) * t->channels;
}

#define LOOPS(TYPE, KIND)                                                                                              \
  FOR_THIS_CPU void mpitrain_max_pool_##KIND(const TYPE *restrict x, TYPE *restrict y, const tiling *t) {              \
    for (int64_t window = 0; window < t->rows * t->columns; window++) {                                                \
      const TYPE *pixels = x + corner(t, window);                                                                      \
      TYPE *most = y + window * t->channels;                                                                           \
      for (int64_t i = 0; i < t->channels; i++) most[i] = pixels[i];                                                   \
      for (int64_t row = 0; row < t->height; row++)                                                                    \
        for (int64_t column = 0; column < t->width; column++) {                                                        \
          const TYPE *pixel = pixels + place(t, row, column);                                                          \
          for (int64_t i = 0; i < t->channels; i++) /* a NaN stays */                                                  \
            most[i] = most[i] >= pixel[i] || most[i] != most[i] ? most[i] : pixel[i];                                  \
        }                                                                                                              \
    }                                                                                                                  \
  }                                                                                                                    \
                                                                                                                       \
  /* A window's first maximum gets its gradient. */                                                                    \
  FOR_THIS_CPU void mpitrain_max_pool_gradient_##KIND(const TYPE *restrict x, const TYPE *restrict y,                  \
                                                      const TYPE *restrict dy, TYPE *restrict dx, const tiling *t) {   \
    for (int64_t window = 0; window < t->rows * t->columns; window++)                                                  \
      for (int64_t first = 0; first < t->channels; first += LANES) {                                                   \
        const int64_t lanes = t->channels - first < LANES ? t->channels - first : LANES;                               \
        const int64_t from = corner(t, window) + first, to = window * t->channels + first;                             \
        TYPE free[LANES]; /* 1 until the maximum is found, then 0 */                                                   \
        for (int64_t i = 0; i < lanes; i++) free[i] = 1;                                                               \
        for (int64_t row = 0; row < t->height; row++)                                                                  \
          for (int64_t column = 0; column < t->width; column++) {                                                      \
            const int64_t pixel = from + place(t, row, column);                                                        \
            for (int64_t i = 0; i < lanes; i++) {                                                                      \
              const TYPE hit = x[pixel + i] == y[to + i] ? free[i] : 0;                                                \
              free[i] -= hit;                                                                                          \
              dx[pixel + i] = dy[to + i] * hit;                                                                        \
            }                                                                                                          \
          }                                                                                                            \
      }                                                                                                                \
  }                                                                                                                    \
                                                                                                                       \
  FOR_THIS_CPU void mpitrain_relu_gradient_##KIND(const TYPE *restrict y, const TYPE *restrict dy, TYPE *restrict dx,  \
                                                  int64_t count) {                                                     \
    for (int64_t i = 0; i < count; i++) dx[i] = (y[i] > 0) * dy[i];                                                    \
  }

LOOPS(float, f32)
LOOPS(double, f64)

int64_t mpitrain_nn_abi(void) { return ABI; }
