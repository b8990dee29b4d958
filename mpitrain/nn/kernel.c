/* The inner loops of layers, each in one pass over memory where NumPy takes several.
 *
 * Optional: nn/kernel.py loads it where it was compiled.  Pooling and ReLU have the bits of their NumPy paths, but for the
 * sign of a maximum among zeros of both signs, which NumPy leaves to the processor.  What has an exponential or a sum in it
 * differs from NumPy's by rounding; it has the same bits on every processor, and for every place of a row in its array, as
 * no operations are contracted (hatch_build.py) and sums over rows have lanes of their own.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && (!defined(__clang__) || __clang_major__ >= 14)
#define FOR_THIS_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_THIS_CPU
#endif

enum { ABI = 3, LANES = 64, SUMS = 16, BLOCK_ROWS = 32 };

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

/* The patches of images, one for each output pixel of a convolution, and a border of zeros around each image, which is
 * nowhere in memory.  A line of a patch lies together in both. */
typedef struct {
  int64_t images, rows, columns;   /* of patches */
  int64_t lines, width, channels;  /* of a patch */
  int64_t image_rows, image_width; /* of an image */
  int64_t down, across;            /* pixels from patch to patch */
  int64_t top, left;               /* pixels of the border */
} patching;

static inline int64_t clipped(int64_t place, int64_t size) { return place < 0 ? 0 : place > size ? size : place; }

/* For each line of each patch: INSIDE for each element that is in the image, OUTSIDE(FIRST, LAST) for those that are in
 * the border. */
#define FOR_LINES(INSIDE, OUTSIDE)                                                                                     \
  for (int64_t image = 0; image < p->images; image++)                                                                  \
    for (int64_t row = 0; row < p->rows; row++)                                                                        \
      for (int64_t column = 0; column < p->columns; column++) {                                                        \
        const int64_t x = column * p->across - p->left, run = p->width * p->channels;                                  \
        const int64_t inner = clipped(-x, p->width) * p->channels;                                                     \
        const int64_t outer = clipped(p->image_width - x, p->width) * p->channels;                                     \
        for (int64_t line = 0; line < p->lines; line++, patches += run) {                                              \
          const int64_t y = row * p->down - p->top + line, outside = y < 0 || y >= p->image_rows;                      \
          const int64_t at = ((image * p->image_rows + y) * p->image_width + x) * p->channels;                         \
          const int64_t begin = outside ? run : inner, end = outside ? run : outer;                                    \
          OUTSIDE(0, begin)                                                                                            \
          for (int64_t i = begin; i < end; i++) INSIDE;                                                                \
          OUTSIDE(end, run)                                                                                            \
        }                                                                                                              \
      }

#define ZERO(FIRST, LAST) \
  for (int64_t i = FIRST; i < LAST; i++) patches[i] = 0;
#define PASS_OVER(FIRST, LAST)

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
  /* Either may be the other. */                                                                                       \
  FOR_THIS_CPU void mpitrain_relu_##KIND(const TYPE *x, TYPE *y, int64_t count) {                                      \
    _Pragma("GCC ivdep")                                                                                               \
    for (int64_t i = 0; i < count; i++) y[i] = x[i] < 0 ? 0 : x[i]; /* a NaN stays */                                  \
  }                                                                                                                    \
                                                                                                                       \
  /* DX may be DY. */                                                                                                  \
  FOR_THIS_CPU void mpitrain_relu_gradient_##KIND(const TYPE *y, const TYPE *dy, TYPE *dx, int64_t count) {            \
    _Pragma("GCC ivdep")                                                                                               \
    for (int64_t i = 0; i < count; i++) dx[i] = (y[i] > 0) * dy[i];                                                    \
  }                                                                                                                    \
                                                                                                                       \
  FOR_THIS_CPU void mpitrain_take_patches_##KIND(const TYPE *restrict images, TYPE *restrict patches,                  \
                                                 const patching *p) {                                                  \
    FOR_LINES(patches[i] = images[at + i], ZERO)                                                                       \
  }                                                                                                                    \
                                                                                                                       \
  FOR_THIS_CPU void mpitrain_add_patches_##KIND(const TYPE *restrict patches, TYPE *restrict images,                   \
                                                const patching *p) {                                                   \
    FOR_LINES(images[at + i] += patches[i], PASS_OVER)                                                                 \
  }

LOOPS(float, f32)
LOOPS(double, f64)

/* ---- Exponentials: e^x within 2 units in the last place, from 2^-126 to 2^127, and what is beyond as these.
 *
 * x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts of which n times the first is exact (Cody, Waite, "Software manual
 * for the elementary functions", 1980, chapter 6); e^r = 1 + r + r^2 q(r), where q interpolates at five Chebyshev nodes.
 */

/* Compiled with -fno-thread-jumps: else GCC computes what follows a bound twice, once with the bound as a constant, and
 * discards numbers so small that each takes a hundred cycles. */
static inline float exponential(float x) {
  const float to_integer = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded to an integer, in its low bits */
  x = x < -87.336544f ? -87.336544f : x;
  x = x > 88.029691f ? 88.029691f : x; /* a NaN stays */
  const float shifted = x * 1.44269504f + to_integer, n = shifted - to_integer;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float q = 0.00139261759f;
  q = q * r + 0.00836317334f;
  q = q * r + 0.0416665561f;
  q = q * r + 0.166665778f;
  q = q * r + 0.5f;
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + (127u << 23);
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return (q * r * r + r + 1.0f) * scale;
}

/* ---- GELU in its tanh form: x s(u), where s(u) = 1 / (1 + e^-u) = (1 + tanh(u/2)) / 2, u = 2 sqrt(2/pi) (x + 0.044715 x^3). */

#define GELU_SLOPE 1.5957691216057308f /* 2 sqrt(2/pi) */
#define GELU_CUBIC 0.0713548162726f    /* 0.044715 of it */
#define GELU_MOST 400.0f               /* of x^2: beyond, s is 0 or 1, and no power of x overflows */

static inline float bounded_square(float x) { return x * x > GELU_MOST ? GELU_MOST : x * x; }

FOR_THIS_CPU void mpitrain_gelu_f32(const float *restrict x, float *restrict y, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const float u = x[i] * (GELU_SLOPE + GELU_CUBIC * bounded_square(x[i]));
    y[i] = x[i] / (1.0f + exponential(-u));
  }
}

/* dy (s + s (1 - s) x du/dx). */
FOR_THIS_CPU void mpitrain_gelu_gradient_f32(const float *restrict x, const float *restrict dy, float *restrict dx,
                                             int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const float square = bounded_square(x[i]), decay = exponential(-(x[i] * (GELU_SLOPE + GELU_CUBIC * square)));
    const float s = 1.0f / (1.0f + decay), slope = x[i] * (GELU_SLOPE + 3.0f * GELU_CUBIC * square);
    dx[i] = dy[i] * (s + s * (s * decay) * slope);
  }
}

/* ---- Over a row: element i goes to lane i % SUMS, and lanes come together in pairs. */

static inline float total(float *lanes) {
  for (int width = SUMS / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

static inline float sum(const float *x, int64_t n) {
  float lanes[SUMS] = {0};
  int64_t first = 0;
  for (; first + SUMS <= n; first += SUMS)
    for (int i = 0; i < SUMS; i++) lanes[i] += x[first + i];
  for (int i = 0; first + i < n; i++) lanes[i] += x[first + i];
  return total(lanes);
}

static inline float sum_of_products(const float *x, const float *y, int64_t n) {
  float lanes[SUMS] = {0};
  int64_t first = 0;
  for (; first + SUMS <= n; first += SUMS)
    for (int i = 0; i < SUMS; i++) lanes[i] += x[first + i] * y[first + i];
  for (int i = 0; first + i < n; i++) lanes[i] += x[first + i] * y[first + i];
  return total(lanes);
}

static inline float larger(float a, float b) { return b > a ? b : a; }

static inline float largest(const float *x, int64_t n) { /* of at least one */
  float lanes[SUMS];
  for (int i = 0; i < SUMS; i++) lanes[i] = x[0];
  int64_t first = 0;
  for (; first + SUMS <= n; first += SUMS)
    for (int i = 0; i < SUMS; i++) lanes[i] = larger(lanes[i], x[first + i]);
  for (int i = 0; first + i < n; i++) lanes[i] = larger(lanes[i], x[first + i]);
  for (int width = SUMS / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] = larger(lanes[i], lanes[i + width]);
  return lanes[0];
}

/* ---- Layer normalisation of rows: nn/layernorm.py says what each is. */

FOR_THIS_CPU void mpitrain_layer_norm_f32(const float *restrict x, const float *restrict gamma, const float *restrict beta,
                                          float *restrict normal, float *restrict inverse, float *restrict y,
                                          int64_t rows, int64_t n, double eps) {
  for (int64_t row = 0; row < rows; row++, x += n, normal += n, y += n) {
    const float mean = sum(x, n) / (float)n;
    for (int64_t i = 0; i < n; i++) normal[i] = x[i] - mean;
    const float scale = 1.0f / sqrtf(sum_of_products(normal, normal, n) / (float)n + (float)eps);
    inverse[row] = scale;
    for (int64_t i = 0; i < n; i++) {
      normal[i] *= scale;
      y[i] = normal[i] * gamma[i] + beta[i];
    }
  }
}

FOR_THIS_CPU void mpitrain_layer_norm_input_f32(const float *restrict normal, const float *restrict inverse,
                                                const float *restrict gamma, const float *restrict dy, float *restrict dx,
                                                int64_t rows, int64_t n) {
  for (int64_t row = 0; row < rows; row++, normal += n, dy += n, dx += n) {
    for (int64_t i = 0; i < n; i++) dx[i] = dy[i] * gamma[i];
    const float mean = sum(dx, n) / (float)n, along = sum_of_products(dx, normal, n) / (float)n;
    for (int64_t i = 0; i < n; i++) dx[i] = (dx[i] - mean - normal[i] * along) * inverse[row];
  }
}

/* Add the gradients of gamma and beta; rows are summed in blocks, so that rounding grows slowly. */
FOR_THIS_CPU void mpitrain_layer_norm_weight_f32(const float *restrict normal, const float *restrict dy,
                                                 float *restrict dgamma, float *restrict dbeta, int64_t rows, int64_t n) {
  for (int64_t first = 0; first < n; first += LANES) {
    const int64_t lanes = n - first < LANES ? n - first : LANES;
    float gamma[LANES] = {0}, beta[LANES] = {0};
    for (int64_t block = 0; block < rows; block += BLOCK_ROWS) {
      float g[LANES] = {0}, b[LANES] = {0};
      for (int64_t row = block; row < rows && row < block + BLOCK_ROWS; row++)
        for (int64_t i = 0; i < lanes; i++) {
          g[i] += dy[row * n + first + i] * normal[row * n + first + i];
          b[i] += dy[row * n + first + i];
        }
      for (int64_t i = 0; i < lanes; i++) gamma[i] += g[i], beta[i] += b[i];
    }
    for (int64_t i = 0; i < lanes; i++) dgamma[first + i] += gamma[i], dbeta[first + i] += beta[i];
  }
}

/* ---- Causal attention: nn/attention.py says what each is. */

/* A block of queries of each head, over the keys up to the block's last query; totals and means are of all `length`
 * queries. */
FOR_THIS_CPU void mpitrain_causal_exponentials_f32(float *restrict scores, float *restrict totals, int64_t heads,
                                                   int64_t queries, int64_t keys, int64_t length, double scale) {
  for (int64_t head = 0; head < heads; head++)
    for (int64_t query = 0; query < queries; query++, scores += keys) {
      const int64_t seen = keys - queries + query + 1, vectors = (seen + SUMS - 1) / SUMS * SUMS;
      const int computed = (int)(vectors < keys ? vectors : keys); /* what is left over from vectors takes longer */
      const float most = largest(scores, seen), factor = (float)scale;
      for (int i = 0; i < computed; i++) {
        const float found = exponential((scores[i] - most) * factor);
        scores[i] = i < (int)seen ? found : 0.0f;
      }
      memset(scores + computed, 0, (size_t)(keys - computed) * sizeof *scores);
      totals[head * length + keys - queries + query] = sum(scores, computed);
    }
}

/* From the gradient of what the weights were divided to be, and its mean under them, to that of the scores. */
FOR_THIS_CPU void mpitrain_causal_slopes_f32(float *restrict slopes, const float *restrict weights,
                                             const float *restrict means, int64_t heads, int64_t queries, int64_t keys,
                                             int64_t length, double scale) {
  for (int64_t head = 0; head < heads; head++)
    for (int64_t query = 0; query < queries; query++, slopes += keys, weights += keys) {
      const float mean = means[head * length + keys - queries + query], factor = (float)scale;
      for (int64_t i = 0; i < keys; i++) slopes[i] = (slopes[i] - mean) * weights[i] * factor;
    }
}

/* Rows of all heads lie beside each other in outputs and their gradients, and head after head in all else. */
#define FOR_HEADS(BODY)                                                                                                \
  for (int64_t sample = 0; sample < samples; sample++)                                                                 \
    for (int64_t place = 0; place < length; place++)                                                                   \
      for (int64_t head = 0; head < heads; head++) {                                                                   \
        const int64_t beside = ((sample * length + place) * heads + head) * size;                                      \
        const int64_t after = (sample * heads + head) * length + place;                                                \
        BODY                                                                                                           \
      }

FOR_THIS_CPU void mpitrain_divide_heads_f32(float *restrict outputs, const float *restrict totals, int64_t samples,
                                            int64_t length, int64_t heads, int64_t size) {
  FOR_HEADS(for (int64_t i = 0; i < size; i++) outputs[beside + i] /= totals[after];)
}

FOR_THIS_CPU void mpitrain_divided_heads_f32(const float *restrict dy, const float *restrict outputs,
                                             const float *restrict totals, float *restrict gradient,
                                             float *restrict means, int64_t samples, int64_t length, int64_t heads,
                                             int64_t size) {
  FOR_HEADS(float *row = gradient + after * size;
            for (int64_t i = 0; i < size; i++) row[i] = dy[beside + i] / totals[after];
            means[after] = sum_of_products(row, outputs + beside, size);)
}

int64_t mpitrain_nn_abi(void) { return ABI; }
