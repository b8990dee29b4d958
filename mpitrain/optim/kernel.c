/* The inner loop of Adam's update: one pass over parameters, gradients and moments instead of a dozen.
 *
 * Optional: optim/kernel.py loads it where it was compiled.  Each value goes through the operations of optim/adam.py in
 * the same order, each rounded to the array's type (no contraction, see hatch_build.py), so that the bits are the same.
 */

#include <math.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GLIBC__) && (!defined(__clang__) || __clang_major__ >= 14)
#define FOR_THIS_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_THIS_CPU
#endif

enum { ABI = 1 };

typedef struct {
  double penalty;          /* of an L2 penalty: added to the gradient, times the parameter; 0: none */
  double shrink;           /* what parameters are multiplied by first; 1: nothing */
  double follow_m, keep_v; /* 1 - beta1, beta2 */
  double follow_v;         /* 1 - beta2 */
  double eps, rate;        /* corrected for the moments' zero start */
} settings;

#define ADAM(NAME, T, ROOT)                                                                                     \
  FOR_THIS_CPU void NAME(T *restrict p, const T *restrict g, T *restrict m, T *restrict v, const int64_t n,     \
                         const settings *s) {                                                                   \
    const T penalty = (T)s->penalty, shrink = (T)s->shrink, follow_m = (T)s->follow_m, keep_v = (T)s->keep_v;   \
    const T follow_v = (T)s->follow_v, eps = (T)s->eps, rate = (T)s->rate;                                      \
    const int penalised = penalty != 0, shrunk = shrink != 1;                                                   \
    for (int64_t i = 0; i < n; i++) {                                                                           \
      const T before = shrunk ? p[i] * shrink : p[i];                                                           \
      const T slope = penalised ? g[i] + before * penalty : g[i];                                               \
      const T first = m[i] + (slope - m[i]) * follow_m;                                                         \
      const T second = v[i] * keep_v + slope * slope * follow_v;                                                \
      m[i] = first;                                                                                             \
      v[i] = second;                                                                                            \
      p[i] = before - first / (ROOT(second) + eps) * rate;                                                      \
    }                                                                                                           \
  }

ADAM(mpitrain_adam_f32, float, sqrtf)
ADAM(mpitrain_adam_f64, double, sqrt)

int64_t mpitrain_optim_abi(void) { return ABI; }
