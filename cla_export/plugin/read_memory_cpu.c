/* Reads memory as fast as a core can, for the floor under a decode step: see bandwidth.py. */

#include <stddef.h>

enum { LANES = 16, VECTORS = 8, AHEAD = 2048 /* numbers, fetched before they are used, to be used once */ };
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));

/* The sum of `count` numbers, so that no load can be left out; those behind the last whole stretch
 * of LANES * VECTORS are not read. */
__attribute__((visibility("default"))) float cla_read_memory(const float *data, size_t count) {
  vec sums[VECTORS] = {{0}};
  for (size_t i = 0; i + LANES * VECTORS <= count; i += LANES * VECTORS)
    for (int j = 0; j < VECTORS; j++) {
      const float *at = data + i + j * LANES;
      __builtin_prefetch(at + AHEAD, 0, 0);
      sums[j] += *(const vec *)at;
    }
  float sum = 0;
  for (int j = 0; j < VECTORS; j++)
    for (int lane = 0; lane < LANES; lane++) sum += sums[j][lane];
  return sum;
}
