/* ClaAttention, ClaAppend and ClaLinear on a CPU, in float32, as custom operators of ONNX Runtime.
 *
 * ClaAttention reads each key and value of a cache once per block of query rows, and in decode that
 * is once per key/value head: the query heads that share it are the rows. Work is split by row of the
 * batch, key/value head, block of rows and range of keys, so one long row keeps all threads busy; a
 * row's ranges depend on its own lengths alone, so its bits do not depend on its neighbours or on
 * the number of threads. The last range of a block to finish merges them (flash decoding).
 *
 * Two inner loops make scores, both of them as fast as the processor multiplies:
 *   lanes  row r of a tile is lane r of a vector: every key element times a vector of queries
 *   dots   few rows: a vector along the head dim for each key and row, then a transposing sum
 *
 * What a loop reads from memory it fetches itself, a little ahead, evenly and in the order of memory:
 * a line between some multiplications, since a burst of fetches holds up the loads behind it, and
 * one stream, since a processor that sees several follows each of them less far.
 *
 * A cache may be int8, with a scale for each key/value head and channel. The queries take the keys'
 * scales and the output the values', so that its numbers are only made float, where they are loaded
 * into vectors; keys for the lanes, which load them one by one, are so before, block by block.
 * ClaAppend rounds to it.
 *
 * ClaLinear reads a weight as the checkpoint has it, so weights are in memory once, and shared with
 * the file. A few tokens are multiplied along the columns, as dots are; more of them are lanes.
 *
 * Compiled for the machine it runs on, with GCC's vector extensions: any architecture will do.
 */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "onnxruntime_abi.h"

#if defined(__AVX512F__)
enum { LANES = 16, PANEL_ROWS = 8, PANELS = 3 };
#define EACH_PAIR(x) x, x, x, x, x, x, x, x
#define EACH_STRIDE(f, T) f(1, T) f(2, T) f(4, T) f(8, T)
#elif defined(__AVX2__)
enum { LANES = 8, PANEL_ROWS = 4, PANELS = 2 };
#define EACH_PAIR(x) x, x, x, x
#define EACH_STRIDE(f, T) f(1, T) f(2, T) f(4, T)
#else
enum { LANES = 4, PANEL_ROWS = 4, PANELS = 2 };
#define EACH_PAIR(x) x, x
#define EACH_STRIDE(f, T) f(1, T) f(2, T)
#endif
enum {
  BLOCK = 128,     /* keys that are scored, then weighted, at a time: they stay in L1 and L2 */
  AHEAD = 2048,    /* numbers of keys, of values or of a weight, fetched before they are used */
  FAR_AHEAD = 8192, /* the same, of keys and values whose rows are lanes */
  LINE = 16,       /* floats that are fetched at a time */
  KEYS = 8,        /* keys in flight in the loop of lanes */
  TILES = 4,       /* tiles of LANES rows that share a block of keys */
  RANGES = 16,     /* most ranges of keys that a block of rows is split into */
  MAX_DIM = 512,
  FEW = 4,         /* tokens of a product that are not lanes */
  PAIR_ROWS = 4,   /* of a weight at a time, where tokens are pairs of lanes */
  COLUMNS = 2048,  /* of a weight at a time, where tokens are many: a few panels' stay in L2 */
  TASK_PANELS = 6, /* of a task */
};

typedef float vec __attribute__((vector_size(LANES * 4), aligned(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(LANES * 4)));
#define INLINE static inline __attribute__((always_inline))
#define ALIGNED __attribute__((aligned(64)))
#define EMPTY (-1e30f) /* maximum of no scores: finite, so that differences are too */

INLINE vec load(const float *p) { return *(const loose *)p; }
INLINE void store(float *p, vec v) { *(loose *)p = v; }
INLINE vec load_int8(const int8_t *p) { /* compilers spell a conversion of vectors out, lane by lane */
#if defined(__AVX512F__)
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
  return (vec){p[0], p[1], p[2], p[3]};
#endif
}
#define LOAD(p) _Generic((p), const float *: load, const int8_t *: load_int8)(p)
INLINE void fetch(const void *p) { __builtin_prefetch(p, 0, 3); }
INLINE void fetch_once(const void *p) { __builtin_prefetch(p, 0, 0); } /* caches need not keep it */
INLINE vec splat(float x) { return (vec){0} + x; }
INLINE vec pick(ints which, vec a, vec b) { return (vec)((which & (ints)a) | (~which & (ints)b)); }
INLINE vec larger(vec a, vec b) { return pick(a > b, a, b); }

/* e^x within 2 units in the last place; exactly 0 where x is below -87. NaN stays NaN. */
INLINE vec exponential(vec x) {
  vec z = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: leaves the rounded integer in low bits */
  ints n = (ints)z << 23;
  vec whole = z - 12582912.0f;
  vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return pick(x < -87.0f, splat(0.0f), (vec)((ints)p + n));
}

INLINE vec soft_cap(vec s, float cap) {
  vec x = s * (2.0f / cap);
  x = pick(x > 80.0f, splat(80.0f), x); /* tanh is 1 long before */
  return cap - 2.0f * cap / (exponential(x) + 1.0f);
}

/* ---- scores --------------------------------------------------------------------------------- */

/* scores[t][lane] of `keys` keys; queries [D][LANES], scaled. */
static void score_lanes(const float *restrict k, const float *restrict queries,
                        float *restrict scores, int keys, int dim) {
  int t = 0;
  for (; t + KEYS <= keys; t += KEYS) {
    const float *row = k + (size_t)t * dim;
    vec sum[KEYS];
    for (int j = 0; j < KEYS; j++) sum[j] = splat(0.0f);
    for (int d = 0; d < dim; d++) {
      vec q = load(queries + d * LANES);
      if (d * KEYS % LINE == 0) fetch(row + FAR_AHEAD + d * KEYS);
      for (int j = 0; j < KEYS; j++) sum[j] += row[(size_t)j * dim + d] * q;
    }
    for (int j = 0; j < KEYS; j++) store(scores + (t + j) * LANES, sum[j]);
  }
  for (; t < keys; t++) {
    vec sum = splat(0.0f);
    for (int d = 0; d < dim; d++) sum += k[(size_t)t * dim + d] * load(queries + d * LANES);
    store(scores + t * LANES, sum);
  }
}

/* Two vectors as one of sums: lanes without `width` in their number from v, the others from w. */
#define LOW(i, width) ((i) & (width) ? ((i) & ~(width)) + LANES : (i) & ~(width))
#define HIGH(i, width) (LOW(i, width) + (width))
#define LANES_4(f, i, width) f(i, width), f(i + 1, width), f(i + 2, width), f(i + 3, width)
#define LANES_8(f, i, width) LANES_4(f, i, width), LANES_4(f, i + 4, width)
#define LANES_16(f, i, width) LANES_8(f, i, width), LANES_8(f, i + 8, width)
#if defined(__AVX512F__)
#define EACH(f, width) LANES_16(f, 0, width)
#elif defined(__AVX2__)
#define EACH(f, width) LANES_8(f, 0, width)
#else
#define EACH(f, width) LANES_4(f, 0, width)
#endif
#if defined(__clang__)
#define CHOOSE(v, w, f, width) __builtin_shufflevector(v, w, EACH(f, width))
#else
#define CHOOSE(v, w, f, width) __builtin_shuffle(v, w, (ints){EACH(f, width)})
#endif
#define HALVE(v, width)                                                                            \
  for (int i = 0; i < width; i++)                                                                  \
    v[i] = CHOOSE(v[i], v[i + width], LOW, width) + CHOOSE(v[i], v[i + width], HIGH, width);

/* Lane i becomes the sum of v[i]'s lanes. */
INLINE vec sum_each(vec v[LANES]) {
#if defined(__AVX512F__)
  HALVE(v, 8)
#endif
#if defined(__AVX2__)
  HALVE(v, 4)
#endif
  HALVE(v, 2)
  HALVE(v, 1)
  return v[0];
}

/* scores[t][stride] of `keys` keys for up to `stride` rows, stride a power of two below LANES;
 * queries [columns / LANES][stride][LANES], scaled, zero where columns overlap. */
#define SCORE_DOTS(STRIDE, T)                                                                      \
  static void score_dots_##STRIDE##_##T(const T *restrict k, const float *restrict queries,        \
                                        float *restrict scores, int keys, int dim) {               \
    enum { AT_ONCE = LANES / STRIDE };                                                             \
    for (int t = 0; t < keys; t += AT_ONCE) {                                                      \
      vec sum[LANES], x[AT_ONCE];                                                                  \
      const T *row[AT_ONCE];                                                                       \
      for (int j = 0; j < AT_ONCE; j++)                                                            \
        row[j] = k + (size_t)(t + j < keys ? t + j : keys - 1) * dim;                              \
      for (int i = 0; i < LANES; i++) sum[i] = splat(0.0f);                                        \
      const float *q = queries;                                                                    \
      for (int c = 0; c < dim; c += LANES, q += STRIDE * LANES) {                                  \
        int column = c + LANES <= dim ? c : dim - LANES;                                           \
        for (int j = 0; j < AT_ONCE; j++) {                                                        \
          x[j] = LOAD(row[j] + column);                                                            \
          fetch(k + (size_t)t * dim + c * AT_ONCE + j * LANES + AHEAD);                            \
        }                                                                                          \
        for (int r = 0; r < STRIDE; r++) {                                                         \
          vec y = load(q + r * LANES);                                                             \
          for (int j = 0; j < AT_ONCE; j++) sum[j * STRIDE + r] += x[j] * y;                       \
        }                                                                                          \
      }                                                                                            \
      store(scores + t * STRIDE, sum_each(sum));                                                   \
    }                                                                                              \
  }
#define SCORE_IF(STRIDE, T)                                                                        \
  if (stride == STRIDE) score_dots_##STRIDE##_##T(k, queries, scores, keys, dim);
#define SCORE_FEW(T)                                                                               \
  EACH_STRIDE(SCORE_DOTS, T)                                                                       \
  static void score_few_##T(const T *k, const float *queries, float *scores, int keys, int dim,    \
                            int stride) {                                                          \
    EACH_STRIDE(SCORE_IF, T)                                                                       \
  }
SCORE_FEW(float)
SCORE_FEW(int8_t)

/* ---- weighted values ------------------------------------------------------------------------ */

/* Where vector `c` of a row starts: the last one overlaps where the head dim is no multiple. */
INLINE int column_of(int c, int dim) { return (c + 1) * LANES <= dim ? c * LANES : dim - LANES; }

/* Rows, and vectors of each, that are summed at once: as many as there are registers for. */
#if defined(__AVX512F__)
enum { MOST_ROWS = 12, MOST_COLUMNS = 8 };
#define EACH_ROWS(f, T) f(12, 2, T) f(6, 4, T) f(4, 4, T) f(3, 8, T) f(2, 8, T) f(1, 8, T)
#else
enum { MOST_ROWS = 3, MOST_COLUMNS = 4 };
#define EACH_ROWS(f, T) f(3, 4, T) f(2, 4, T) f(1, 4, T)
#endif

/* out[row][column] += sum over t of weights[t][row] * v[t][column], R rows by C vectors from
 * number `first`. */
#define WEIGH_BLOCK(T)                                                                             \
  INLINE void weigh_block_##T(const T *restrict v, const float *restrict weights,                  \
                              float *restrict out, int keys, int dim, int stride, int width,       \
                              int first, const int R, const int C) {                               \
    vec sum[MOST_ROWS][MOST_COLUMNS], x[MOST_COLUMNS];                                             \
    int column[MOST_COLUMNS];                                                                      \
    out += first * LANES;                                                                          \
    for (int c = 0; c < C; c++) column[c] = column_of(first + c, dim);                             \
    int ahead = stride == LANES ? FAR_AHEAD : AHEAD;                                               \
    for (int r = 0; r < R; r++)                                                                    \
      for (int c = 0; c < C; c++) sum[r][c] = load(out + r * width + c * LANES);                   \
    for (int t = 0; t < keys; t++, v += dim, weights += stride) {                                  \
      for (int c = 0; c < C; c++) {                                                                \
        x[c] = LOAD(v + column[c]);                                                                \
        fetch(v + column[c] + ahead);                                                              \
      }                                                                                            \
      for (int r = 0; r < R; r++)                                                                  \
        for (int c = 0; c < C; c++) sum[r][c] += weights[r] * x[c];                                \
    }                                                                                              \
    for (int r = 0; r < R; r++)                                                                    \
      for (int c = 0; c < C; c++) store(out + r * width + c * LANES, sum[r][c]);                   \
  }

/* R rows: C vectors at a time, then halves of that. */
#define WEIGH(R, C, T)                                                                             \
  static void weigh_##R##_##T(const T *v, const float *weights, float *out, int keys, int dim,     \
                              int stride, int width) {                                             \
    int c = 0, vectors = width / LANES;                                                            \
    for (; c + C <= vectors; c += C)                                                               \
      weigh_block_##T(v, weights, out, keys, dim, stride, width, c, R, C);                         \
    if (C > 4 && c + 4 <= vectors)                                                                 \
      weigh_block_##T(v, weights, out, keys, dim, stride, width, c, R, 4), c += 4;                 \
    if (C > 2 && c + 2 <= vectors)                                                                 \
      weigh_block_##T(v, weights, out, keys, dim, stride, width, c, R, 2), c += 2;                 \
    if (c < vectors) weigh_block_##T(v, weights, out, keys, dim, stride, width, c, R, 1);          \
  }

/* The rows of a tile, as many at a time as there is code for. */
#define WHILE_LEFT(R, C, T)                                                                        \
  for (; rows >= R; rows -= R, weights += R, out += (size_t)R * width)                             \
    weigh_##R##_##T(v, weights, out, keys, dim, stride, width);
#define WEIGH_ALL(T)                                                                               \
  WEIGH_BLOCK(T)                                                                                   \
  EACH_ROWS(WEIGH, T)                                                                              \
  static void weigh_##T(const T *v, const float *weights, float *out, int rows, int keys, int dim, \
                        int stride, int width) {                                                   \
    EACH_ROWS(WHILE_LEFT, T)                                                                       \
  }
WEIGH_ALL(float)
WEIGH_ALL(int8_t)

/* ---- one call ------------------------------------------------------------------------------- */

typedef struct {
  const OrtApi *api;
  float scale, softcap;
  int64_t window;
  int narrow; /* the cache is int8 */
} Kernel;

typedef struct {
  const float *q;
  const void *keys, *values; /* float, or int8 where there are scales */
  const float *key_scales, *value_scales; /* [kv_heads][dim], or NULL */
  const int32_t *lengths;
  float *y;
  int batch, q_heads, kv_heads, queries, capacity, dim;
  int64_t q_head, q_token; /* elements from one head, and one token, to the next */
  float scale, softcap;
  int64_t window;
  int group, rows, block_rows, blocks, ranges; /* of a key/value head; ranges at most */
  int stride, width;                           /* rows of a tile; floats of an output row */
  float *partial;                              /* [batch * kv_heads * blocks][ranges] */
  int *finished;                               /* [batch * kv_heads * blocks] */
} Call;

/* Maximum, sum and weighted values of a block of rows over a range of keys. */
typedef struct {
  float *maximum, *sum, *out; /* [block_rows], [block_rows], [block_rows][width] */
} State;

static size_t state_floats(const Call *c) {
  return (size_t)(c->block_rows + LANES) * 2 + (size_t)c->block_rows * c->width;
}

static State state_at(const Call *c, float *memory) {
  int padded = c->block_rows + LANES;
  return (State){memory, memory + padded, memory + 2 * padded};
}

INLINE int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

/* The keys that a row of a block sees: [first, last). */
INLINE int64_t first_key(const Call *c, int64_t length, int row) {
  int64_t position = length - c->queries + row / c->group;
  return c->window > 0 ? larger_of(0, position - c->window + 1) : 0;
}
INLINE int64_t last_key(const Call *c, int64_t length, int row) {
  return larger_of(0, length - c->queries + row / c->group + 1);
}

/* Queries of a tile, scaled: [D][LANES] for the loop of lanes, else [vectors][stride][LANES]. */
static void pack(const Call *c, const float *q, const float *scales, int first, int rows,
                 float *packed) {
  int dim = c->dim;
  float scaled[MAX_DIM];
  for (int r = 0; r < rows; r++) {
    int row = first + r;
    const float *from = q + row / c->group * c->q_token + row % c->group * c->q_head;
    if (scales) {
      for (int d = 0; d < dim; d++) scaled[d] = from[d] * scales[d];
      from = scaled;
    }
    if (c->stride == LANES) {
      for (int d = 0; d < dim; d++) packed[d * LANES + r] = from[d] * c->scale;
      continue;
    }
    for (int v = 0; v < c->width / LANES; v++)
      for (int i = 0; i < LANES; i++) {
        int d = column_of(v, dim) + i; /* columns that an earlier vector has count for nothing */
        packed[(v * c->stride + r) * LANES + i] = d >= v * LANES ? from[d] * c->scale : 0.0f;
      }
  }
}

/* Lane i takes the value of all lanes of its row, by `of` two at a time. */
INLINE vec fold(vec v, int stride, vec (*of)(vec, vec)) {
  for (int width = LANES / 2; width >= stride; width /= 2) {
    vec other;
    for (int i = 0; i < LANES; i++) other[i] = v[i ^ width];
    v = of(v, other);
  }
  return v;
}
INLINE vec plus(vec a, vec b) { return a + b; }

/* Add the keys [from, to) of a block, k and v of them, to the state of one tile. */
static void add_block(const Call *c, int64_t length, int first, int rows, const void *k,
                      const void *v, int64_t from, int64_t to, const float *queries,
                      float *scores, State s) {
  int narrow = c->key_scales != NULL;
  int keys = (int)(to - from), vectors = (keys * c->stride + LANES - 1) / LANES;
  if (c->stride == LANES)
    score_lanes(k, queries, scores, keys, c->dim);
  else if (narrow)
    score_few_int8_t(k, queries, scores, keys, c->dim, c->stride);
  else
    score_few_float(k, queries, scores, keys, c->dim, c->stride);
  if (c->softcap > 0)
    for (int i = 0; i < vectors; i++)
      store(scores + i * LANES, soft_cap(load(scores + i * LANES), c->softcap));
  for (int i = keys * c->stride; i < vectors * LANES; i++) scores[i] = -INFINITY;
  if (last_key(c, length, first) < to || first_key(c, length, first + rows - 1) > from) {
    ints low = {0}, high = {0}; /* only where rows are lanes: others see the same keys */
    for (int r = 0; r < rows; r++) {
      low[r] = (int)larger_of(first_key(c, length, first + r) - from, 0);
      high[r] = (int)larger_of(last_key(c, length, first + r) - from, 0);
    }
    for (int t = 0; t < keys; t++) {
      ints seen = (t >= low) & (t < high);
      store(scores + t * LANES, pick(seen, load(scores + t * LANES), splat(-INFINITY)));
    }
  }
  vec before = load(s.maximum), most = before;
  for (int i = 0; i < vectors; i++) most = larger(load(scores + i * LANES), most);
  most = fold(most, c->stride, larger);
  vec shrink = exponential(before - most), sum = load(s.sum) * shrink;
  for (int i = 0; i < vectors; i++) {
    vec e = exponential(load(scores + i * LANES) - most);
    sum += e;
    store(scores + i * LANES, e);
  }
  store(s.maximum, most);
  store(s.sum, sum);
  for (int r = 0; r < rows; r++) {
    float *out = s.out + (size_t)r * c->width, factor = shrink[r];
    if (factor != 1.0f)
      for (int i = 0; i < c->width; i += LANES) store(out + i, load(out + i) * factor);
  }
  if (narrow)
    weigh_int8_t(v, scores, s.out, rows, keys, c->dim, c->stride, c->width);
  else
    weigh_float(v, scores, s.out, rows, keys, c->dim, c->stride, c->width);
}

static void write_rows(const Call *c, int b, int h, int first, int rows, State s) {
  for (int r = 0; r < rows; r++) {
    int row = first + r, head = h * c->group + row % c->group;
    float *y = c->y + (int64_t)b * c->q_heads * c->queries * c->dim + head * c->q_head +
               row / c->group * c->q_token;
    float factor = s.sum[r] > 0 ? 1 / s.sum[r] : s.sum[r] == 0 ? 0 : NAN;
    const float *out = s.out + (size_t)r * c->width, *scales = c->value_scales;
    for (int v = 0; v < c->width / LANES; v++) {
      int column = column_of(v, c->dim);
      vec scale = scales ? load(scales + h * c->dim + column) * factor : splat(factor);
      store(y + column, load(out + v * LANES) * scale);
    }
  }
}

/* int8 numbers as floats. */
static void widen(const int8_t *restrict from, float *restrict to, size_t count) {
  size_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    fetch(from + i + FAR_AHEAD);
    store(to + i, load_int8(from + i));
  }
  for (; i < count; i++) to[i] = from[i];
}

/* The states of a block's ranges as one, in the first. */
static State merge(const Call *c, float *memory, int ranges, int rows) {
  State all = state_at(c, memory);
  for (int i = 1; i < ranges; i++) {
    State s = state_at(c, memory + i * state_floats(c));
    for (int r = 0; r < rows; r++) {
      float most = fmaxf(all.maximum[r], s.maximum[r]);
      vec a = exponential(splat(all.maximum[r] - most)), b = exponential(splat(s.maximum[r] - most));
      float *to = all.out + (size_t)r * c->width, *from = s.out + (size_t)r * c->width;
      all.maximum[r] = most;
      all.sum[r] = all.sum[r] * a[0] + s.sum[r] * b[0];
      for (int d = 0; d < c->width; d += LANES) store(to + d, load(to + d) * a + load(from + d) * b);
    }
  }
  return all;
}

/* Task `index`: a range of keys of a block of rows of a key/value head of a row of the batch. */
static void attend(void *data, size_t index) {
  const Call *c = data;
  size_t unit = index / c->ranges;
  int range = (int)(index % c->ranges), block = (int)(unit % c->blocks);
  int h = (int)(unit / c->blocks % c->kv_heads), b = (int)(unit / c->blocks / c->kv_heads);
  int first = block * c->block_rows, rows = (int)smaller_of(c->block_rows, c->rows - first);
  int64_t length = c->lengths[b];
  int64_t start = first_key(c, length, first), stop = last_key(c, length, first + rows - 1);
  int64_t some = larger_of(2 * BLOCK, (stop - start + c->ranges - 1) / c->ranges);
  some = (some + BLOCK - 1) / BLOCK * BLOCK;
  int used = (int)larger_of(1, (stop - start + some - 1) / some); /* ranges of this block */
  if (range >= used) return;
  start += range * some;
  stop = smaller_of(stop, start + some);

  size_t head = ((size_t)b * c->kv_heads + h) * c->capacity * c->dim;
  size_t element = c->key_scales ? sizeof(int8_t) : sizeof(float);
  int widened = c->key_scales && c->stride == LANES;
  size_t block_floats = widened ? (size_t)BLOCK * c->dim : 0;
  const float *q = c->q + (int64_t)b * c->q_heads * c->queries * c->dim + h * c->group * c->q_head;
  int tile_rows = c->stride, tiles = (rows + tile_rows - 1) / tile_rows;
  size_t tile_queries = (size_t)c->width * c->stride;
  size_t floats = block_floats + tiles * tile_queries + BLOCK * LANES;
  if (used == 1) floats += state_floats(c);
  float *memory = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
  if (!memory) abort();
  float *wide = memory, *scores = memory + block_floats;
  float *queries = scores + BLOCK * LANES, *own = queries + tiles * tile_queries;
  float *shared = c->partial + unit * c->ranges * state_floats(c);
  State s = state_at(c, used == 1 ? own : shared + range * state_floats(c));
  for (int r = 0; r < c->block_rows + LANES; r++) s.maximum[r] = EMPTY, s.sum[r] = 0;
  memset(s.out, 0, (size_t)c->block_rows * c->width * sizeof(float));
  memset(queries, 0, tiles * tile_queries * sizeof(float));
  for (int i = 0; i < tiles; i++)
    pack(c, q, c->key_scales ? c->key_scales + h * c->dim : NULL, first + i * tile_rows,
         (int)smaller_of(tile_rows, rows - i * tile_rows), queries + i * tile_queries);

  for (int64_t from = start; from < stop; from += BLOCK) {
    size_t at = (head + from * c->dim) * element;
    const char *k = (const char *)c->keys + at, *v = (const char *)c->values + at;
    if (widened) {
      widen((const int8_t *)k, wide, smaller_of(BLOCK, stop - from) * c->dim);
      k = (const char *)wide;
    }
    for (int i = 0; i < tiles; i++) {
      int r = i * tile_rows, some_rows = (int)smaller_of(tile_rows, rows - r);
      int64_t low = larger_of(from, first_key(c, length, first + r));
      int64_t high = smaller_of(smaller_of(from + BLOCK, stop),
                                last_key(c, length, first + r + some_rows - 1));
      if (low >= high) continue;
      State part = {s.maximum + r, s.sum + r, s.out + (size_t)r * c->width};
      size_t skip = (low - from) * c->dim;
      add_block(c, length, first + r, some_rows, k + skip * (widened ? sizeof(float) : element),
                v + skip * element, low, high, queries + i * tile_queries, scores, part);
    }
  }
  for (int i = 0; i < tiles; i++) store(s.sum + i * tile_rows, fold(load(s.sum + i * tile_rows), c->stride, plus));
  if (used == 1)
    write_rows(c, b, h, first, rows, s);
  else if (__atomic_add_fetch(&c->finished[unit], 1, __ATOMIC_ACQ_REL) == used)
    write_rows(c, b, h, first, rows, merge(c, shared, used, rows));
  free(memory);
}

/* ---- ONNX Runtime --------------------------------------------------------------------------- */

enum { MAX_RANK = 4 };
typedef struct {
  void *data;
  int64_t dims[MAX_RANK];
  size_t rank;
} Tensor;

#define TRY(call)                       \
  do {                                  \
    OrtStatus *status = (call);         \
    if (status) return status;          \
  } while (0)

static OrtStatus *input(const OrtApi *api, OrtContext *context, size_t index, Tensor *out) {
  const OrtValue *value;
  OrtTensorInfo *info;
  TRY(api->KernelContext_GetInput(context, index, &value));
  TRY(api->GetTensorMutableData((OrtValue *)value, &out->data));
  TRY(api->GetTensorTypeAndShape(value, &info));
  OrtStatus *status = api->GetDimensionsCount(info, &out->rank);
  if (!status && out->rank <= MAX_RANK) status = api->GetDimensions(info, out->dims, out->rank);
  api->ReleaseTensorInfo(info);
  return status;
}

static OrtStatus *output(const OrtApi *api, OrtContext *context, size_t index, const Tensor *like,
                         void **data) {
  OrtValue *value;
  TRY(api->KernelContext_GetOutput(context, index, like->dims, like->rank, &value));
  return api->GetTensorMutableData(value, data);
}

/* Scales [1, Hkv, 1, D] of an int8 cache. */
static OrtStatus *input_scales(const OrtApi *api, OrtContext *context, size_t index,
                               const Tensor *cache, const float **out) {
  Tensor scales;
  TRY(input(api, context, index, &scales));
  *out = scales.data;
  if (scales.rank == 4 && scales.dims[0] == 1 && scales.dims[1] == cache->dims[1] &&
      scales.dims[2] == 1 && scales.dims[3] == cache->dims[3])
    return NULL;
  return api->CreateStatus(STATUS_INVALID_ARGUMENT, "scales of an int8 cache must be [1, Hkv, 1, D]");
}

static OrtStatus *wrong(const OrtApi *api, const char *message) {
  return api->CreateStatus(STATUS_INVALID_ARGUMENT, message);
}

static OrtStatus *compute_attention(void *state, OrtContext *context) {
  const Kernel *kernel = state;
  const OrtApi *api = kernel->api;
  Tensor q, k, v, n;
  TRY(input(api, context, 0, &q));
  TRY(input(api, context, 1, &k));
  TRY(input(api, context, 2, &v));
  TRY(input(api, context, 3, &n));
  if (k.rank != 4 || v.rank != 4 || memcmp(k.dims, v.dims, sizeof k.dims))
    return wrong(api, "ClaAttention: key_cache and value_cache must both be [B, Hkv, C, D]");
  if ((q.rank != 3 && q.rank != 4) || q.dims[0] != k.dims[0] || n.rank != 1 ||
      n.dims[0] != k.dims[0])
    return wrong(api, "ClaAttention: q must be [B, S, Hq * D] or [B, Hq, S, D], kv_lengths [B]");
  int64_t dim = k.dims[3], kv_heads = k.dims[1];
  int64_t q_heads = q.rank == 3 ? q.dims[2] / dim : q.dims[1];
  int64_t queries = q.rank == 3 ? q.dims[1] : q.dims[2];
  if (dim < LANES || dim > MAX_DIM || q_heads % kv_heads ||
      (q.rank == 3 ? q.dims[2] % dim : q.dims[3] - dim))
    return wrong(api, "ClaAttention: head dims 16 to 512, and q heads that divide among kv heads");
  Call c = {
      .q = q.data, .keys = k.data, .values = v.data, .lengths = n.data,
      .batch = (int)k.dims[0], .q_heads = (int)q_heads, .kv_heads = (int)kv_heads,
      .queries = (int)queries, .capacity = (int)k.dims[2], .dim = (int)dim,
      .q_head = q.rank == 3 ? dim : queries * dim, .q_token = q.rank == 3 ? q_heads * dim : dim,
      .scale = kernel->scale, .softcap = kernel->softcap, .window = kernel->window,
      .group = (int)(q_heads / kv_heads),
  };
  if (kernel->narrow) {
    TRY(input_scales(api, context, 4, &k, &c.key_scales));
    TRY(input_scales(api, context, 5, &v, &c.value_scales));
  }
  TRY(output(api, context, 0, &q, (void **)&c.y));
  for (int b = 0; b < c.batch; b++)
    if (c.lengths[b] < 0 || c.lengths[b] > c.capacity)
      return wrong(api, "ClaAttention: kv_lengths must be within 0 and the cache's capacity");
  if (!c.batch || !c.queries) return NULL;
  c.rows = c.group * c.queries;
  c.stride = LANES;
  if (c.queries == 1 && c.group <= LANES / 2)
    for (c.stride = 1; c.stride < c.group;) c.stride *= 2;
  c.width = (c.dim + LANES - 1) / LANES * LANES;
  c.block_rows = (int)smaller_of(TILES * LANES, (c.rows + c.stride - 1) / c.stride * c.stride);
  c.blocks = (c.rows + c.block_rows - 1) / c.block_rows;
  c.ranges = (int)larger_of(1, RANGES / (c.blocks * c.kv_heads));
  size_t units = (size_t)c.batch * c.kv_heads * c.blocks;
  void *memory = NULL;
  if (c.ranges > 1) {
    size_t bytes = units * c.ranges * state_floats(&c) * sizeof(float);
    memory = malloc(bytes + units * sizeof(int));
    if (!memory) return api->CreateStatus(STATUS_FAIL, "ClaAttention: out of memory");
    c.partial = memory;
    c.finished = (int *)((char *)memory + bytes);
    memset(c.finished, 0, units * sizeof(int));
  }
  OrtStatus *status =
      api->KernelContext_ParallelFor(context, attend, units * c.ranges, 0, &c);
  free(memory);
  return status;
}

/* ---- linear --------------------------------------------------------------------------------- */

typedef struct {
  const float *w, *x; /* [n, k], [tokens, k] */
  float *y;           /* [tokens, n] */
  int tokens, n, k;
  int task_rows, token_tasks; /* rows of a task; tasks of the same rows */
  float *panels;              /* x, where tokens are lanes: [panel][k][LANES] */
} Product;

/* A few tokens, at most FEW: y[t][row + j] for LANES / S rows by S tokens, a vector along the
 * columns for each. Rows and tokens beyond those there are repeat the last. Each row is read to its
 * end before the next: processors fetch one long stream ahead far better than many short ones. */
INLINE void tile(const Product *p, int row, int rows, const int S) {
  const int R = LANES / S;
  const float *w[LANES], *x[FEW];
  for (int j = 0; j < R; j++) w[j] = p->w + (size_t)(row + (j < rows ? j : rows - 1)) * p->k;
  for (int t = 0; t < S; t++) x[t] = p->x + (size_t)(t < p->tokens ? t : p->tokens - 1) * p->k;
  vec sum[LANES];
  int d = p->k / LANES * LANES;
  for (int j = 0; j < R; j++) {
    vec part[FEW];
    for (int t = 0; t < S; t++) part[t] = splat(0.0f);
    for (int c = 0; c < d; c += LANES) {
      vec weights = load(w[j] + c);
      fetch_once(w[j] + c + AHEAD);
      for (int t = 0; t < S; t++) part[t] += weights * load(x[t] + c);
    }
    for (int t = 0; t < S; t++) sum[j * S + t] = part[t];
  }
  float all[LANES] ALIGNED;
  store(all, sum_each(sum));
  for (int j = 0; j < rows; j++)
    for (int t = 0; t < S && t < p->tokens; t++) {
      float more = all[j * S + t];
      for (int i = d; i < p->k; i++) more += w[j][i] * x[t][i];
      p->y[(size_t)t * p->n + row + j] = more;
    }
}

#define MULTIPLY_FEW(S)                                                                            \
  static void multiply_##S(void *data, size_t index) {                                             \
    const Product *p = data;                                                                       \
    int row = (int)index * p->task_rows, last = (int)smaller_of(p->n, row + p->task_rows);         \
    for (; row < last; row += LANES / S) tile(p, row, (int)smaller_of(LANES / S, last - row), S);  \
  }
MULTIPLY_FEW(1)
MULTIPLY_FEW(2)
MULTIPLY_FEW(4)

/* Many tokens are lanes: R rows of w by C panels, from panel number `c` on; columns [from, to).
 * What is fetched are the rows behind these, in one stream however many rows are read at a time. */
INLINE void cross(const Product *p, int row, int c, int from, int to, const int R, const int C) {
  const float *w = p->w + (size_t)row * p->k, *x = p->panels + (size_t)c * p->k * LANES;
  size_t panel = (size_t)p->k * LANES;
  vec sum[PANEL_ROWS][PANELS], y[PANELS];
  for (int j = 0; j < R; j++)
    for (int i = 0; i < C; i++) sum[j][i] = splat(0.0f);
  for (int d = from; d < to; d++) {
    if (d * R % LINE == 0) fetch(w + R * p->k + AHEAD + d * R);
    for (int i = 0; i < C; i++) y[i] = load(x + i * panel + (size_t)d * LANES);
    for (int j = 0; j < R; j++)
      for (int i = 0; i < C; i++) sum[j][i] += w[(size_t)j * p->k + d] * y[i];
  }
  float all[PANEL_ROWS][LANES] ALIGNED;
  for (int i = 0; i < C; i++, c++) {
    for (int j = 0; j < R; j++) store(all[j], sum[j][i]);
    for (int t = 0; t < LANES && c * LANES + t < p->tokens; t++) {
      float *out = p->y + (size_t)(c * LANES + t) * p->n + row;
      for (int j = 0; j < R; j++) out[j] = from ? out[j] + all[j][t] : all[j][t];
    }
  }
}

/* Half as many tokens as there are lanes have two lanes each, for columns in turn:
 * `panels` is [k / 2][LANES / 2][2]. */
typedef double pairs __attribute__((vector_size(LANES * 4), aligned(LANES * 4)));
INLINE vec pair(const float *p) { /* p[0] and p[1] in turn */
  double both;
  memcpy(&both, p, sizeof both);
  return (vec)(pairs){EACH_PAIR(both)};
}

INLINE void cross_pairs(const Product *p, int row, const int R) {
  const float *w = p->w + (size_t)row * p->k, *x = p->panels;
  vec sum[PAIR_ROWS][2];
  for (int j = 0; j < R; j++) sum[j][0] = sum[j][1] = splat(0.0f);
  int d = 0;
  for (; d + 4 <= p->k; d += 4) {
    if (d * R % LINE == 0) fetch_once(w + R * p->k + AHEAD + d * R);
    for (int i = 0; i < 2; i++) {
      vec y = load(x + (size_t)(d / 2 + i) * LANES);
      for (int j = 0; j < R; j++) sum[j][i] += pair(w + (size_t)j * p->k + d + 2 * i) * y;
    }
  }
  float all[LANES] ALIGNED;
  for (int j = 0; j < R; j++) {
    store(all, sum[j][0] + sum[j][1]);
    for (int t = 0; t < p->tokens; t++) {
      float more = all[2 * t] + all[2 * t + 1];
      for (int i = d; i < p->k; i++) more += w[(size_t)j * p->k + i] * p->x[(size_t)t * p->k + i];
      p->y[(size_t)t * p->n + row + j] = more;
    }
  }
}

static void multiply_pairs(void *data, size_t index) {
  const Product *p = data;
  int row = (int)index * p->task_rows, last = (int)smaller_of(p->n, row + p->task_rows);
  for (; row + PAIR_ROWS <= last; row += PAIR_ROWS) cross_pairs(p, row, PAIR_ROWS);
  for (; row < last; row++) cross_pairs(p, row, 1);
}

static void multiply_many(void *data, size_t index) {
  const Product *p = data;
  int first = (int)(index / p->token_tasks) * p->task_rows;
  int last = (int)smaller_of(p->n, first + p->task_rows);
  int start = (int)(index % p->token_tasks) * TASK_PANELS;
  int stop = (int)smaller_of((p->tokens + LANES - 1) / LANES, start + TASK_PANELS);
  for (int from = 0; from < p->k; from += COLUMNS) {
    int row = first, to = (int)smaller_of(p->k, from + COLUMNS);
    for (; row + PANEL_ROWS <= last; row += PANEL_ROWS) {
      int c = start;
      for (; c + PANELS <= stop; c += PANELS) cross(p, row, c, from, to, PANEL_ROWS, PANELS);
      for (; c + 2 <= stop; c += 2) cross(p, row, c, from, to, PANEL_ROWS, 2);
      for (; c < stop; c++) cross(p, row, c, from, to, PANEL_ROWS, 1);
    }
    for (; row < last; row++)
      for (int c = start; c < stop; c++) cross(p, row, c, from, to, 1, 1);
  }
}

/* Panel `index`: the next tokens as lanes, `each` lanes for one; those beyond the last are zero. */
INLINE void pack_columns(const float *x, float *to, int columns, const int each) {
  for (int d = 0; d < columns; d++) to[d / each * LANES + d % each] = x[d];
}
INLINE void pack_tokens(const Product *p, size_t index, const int each) {
  int first = (int)index * LANES, tokens = (int)smaller_of(LANES / each, p->tokens - first);
  float *panel = p->panels + index * p->k * LANES;
  if (tokens * each < LANES || p->k % LANES)
    memset(panel, 0, (size_t)(p->k + each - 1) / each * LANES * sizeof(float));
  for (int d = 0; d < p->k; d += LANES) /* of one token after the other, so that lines stay in L1 */
    for (int t = 0; t < tokens; t++) {
      const float *x = p->x + (size_t)(first + t) * p->k + d;
      float *to = panel + (size_t)(d / each) * LANES + t * each;
      if (d + LANES <= p->k)
        pack_columns(x, to, LANES, each);
      else
        pack_columns(x, to, p->k - d, each);
    }
}
static void pack_panel(void *data, size_t index) { pack_tokens(data, index, 1); }

/* y [..., N] = x [..., K] w [N, K] transposed. */
static OrtStatus *compute_linear(void *state, OrtContext *context) {
  const OrtApi *api = ((const Kernel *)state)->api;
  Tensor x, w;
  TRY(input(api, context, 0, &x));
  TRY(input(api, context, 1, &w));
  if (x.rank < 1 || x.rank > MAX_RANK || w.rank != 2 || x.dims[x.rank - 1] != w.dims[1])
    return wrong(api, "ClaLinear: expected x [..., K] and a weight [N, K]");
  Product p = {.w = w.data, .n = (int)w.dims[0], .k = (int)w.dims[1], .x = x.data, .tokens = 1};
  for (size_t i = 0; i + 1 < x.rank; i++) p.tokens *= (int)x.dims[i];
  x.dims[x.rank - 1] = p.n;
  TRY(output(api, context, 0, &x, (void **)&p.y));
  if (!p.tokens || !p.n) return NULL;
  p.task_rows = (int)smaller_of(128, larger_of(16, p.n / 32 / 16 * 16));
  size_t tasks = (p.n + p.task_rows - 1) / p.task_rows;
  if (p.tokens <= FEW) {
    void (*few)(void *, size_t) = p.tokens == 1 ? multiply_1 : p.tokens == 2 ? multiply_2 : multiply_4;
    return api->KernelContext_ParallelFor(context, few, tasks, 0, &p);
  }
  int panels = (p.tokens + LANES - 1) / LANES;
  p.panels = aligned_alloc(64, ((size_t)panels * p.k * LANES * sizeof(float) + 63) / 64 * 64);
  if (!p.panels) return api->CreateStatus(STATUS_FAIL, "ClaLinear: out of memory");
  OrtStatus *status = NULL;
  if (p.tokens <= LANES / 2) {
    pack_tokens(&p, 0, 2);
    status = api->KernelContext_ParallelFor(context, multiply_pairs, tasks, 0, &p);
  } else {
    p.token_tasks = (panels + TASK_PANELS - 1) / TASK_PANELS;
    if (panels == 1)
      pack_panel(&p, 0);
    else
      status = api->KernelContext_ParallelFor(context, pack_panel, panels, 0, &p);
    if (!status)
      status = api->KernelContext_ParallelFor(context, multiply_many, tasks * p.token_tasks, 0, &p);
  }
  free(p.panels);
  return status;
}

/* ---- append --------------------------------------------------------------------------------- */

/* A token's head as an int8 cache holds it: to the nearest, half to even, and to the last beyond it. */
static void narrow_to(int8_t *restrict to, const float *restrict from, const float *restrict scales,
                      int64_t dim) {
  for (int64_t d = 0; d < dim; d++) {
    float x = rintf(from[d] / scales[d]);
    to[d] = (int8_t)(x > 127 ? 127 : x > -128 ? x : -128);
  }
}

/* present = past with each row's new tokens [B, S, Hkv * D] put at write_indices[b]: nothing else is
 * copied where past and present are the same memory. */
static OrtStatus *compute_append(void *state, OrtContext *context) {
  const Kernel *kernel = state;
  const OrtApi *api = kernel->api;
  Tensor past[2], fresh[2], at;
  for (int i = 0; i < 2; i++) TRY(input(api, context, i, &past[i]));
  for (int i = 0; i < 2; i++) TRY(input(api, context, 2 + i, &fresh[i]));
  TRY(input(api, context, 4, &at));
  int64_t batch = past[0].dims[0], heads = past[0].dims[1], capacity = past[0].dims[2];
  int64_t dim = past[0].dims[3], tokens = fresh[0].dims[1];
  if (past[0].rank != 4 || memcmp(past[0].dims, past[1].dims, sizeof past[0].dims) ||
      fresh[0].rank != 3 || memcmp(fresh[0].dims, fresh[1].dims, 3 * sizeof(int64_t)) ||
      fresh[0].dims[0] != batch || fresh[0].dims[2] != heads * dim || at.rank != 1 ||
      at.dims[0] != batch)
    return wrong(api, "ClaAppend: expected caches [B, Hkv, C, D], tokens [B, S, Hkv * D], starts [B]");
  const int64_t *starts = at.data;
  for (int64_t b = 0; b < batch; b++)
    if (starts[b] < 0 || starts[b] + tokens > capacity)
      return wrong(api, "ClaAppend: new tokens do not fit into the cache");
  for (int i = 0; i < 2; i++) {
    size_t size = kernel->narrow ? 1 : sizeof(float);
    const float *from = fresh[i].data, *scales = NULL;
    char *to;
    if (kernel->narrow) TRY(input_scales(api, context, 5 + i, &past[i], &scales));
    TRY(output(api, context, i, &past[i], (void **)&to));
    if (to != past[i].data)
      memcpy(to, past[i].data, (size_t)(batch * heads * capacity * dim) * size);
    for (int64_t b = 0; b < batch; b++)
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++, from += dim) {
          char *place = to + ((b * heads + h) * capacity + starts[b] + t) * dim * size;
          if (kernel->narrow)
            narrow_to((int8_t *)place, from, scales + h * dim, dim);
          else
            memcpy(place, from, dim * size);
        }
  }
  return NULL;
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info,
                         void **out);

static const char *name_attention(const OrtCustomOp *op) { return (void)op, "ClaAttention"; }
static const char *name_linear(const OrtCustomOp *op) { return (void)op, "ClaLinear"; }
static const char *name_append(const OrtCustomOp *op) { return (void)op, "ClaAppend"; }
static const char *provider(const OrtCustomOp *op) { return (void)op, "CPUExecutionProvider"; }
static int attention_input(const OrtCustomOp *op, size_t i) {
  return (void)op, i == 3 ? ELEMENT_INT32 : ELEMENT_FLOAT;
}
static int append_input(const OrtCustomOp *op, size_t i) {
  return (void)op, i == 4 ? ELEMENT_INT64 : ELEMENT_FLOAT;
}
static int narrow_attention_input(const OrtCustomOp *op, size_t i) {
  return i == 1 || i == 2 ? ELEMENT_INT8 : attention_input(op, i);
}
static int narrow_append_input(const OrtCustomOp *op, size_t i) {
  return i < 2 ? ELEMENT_INT8 : append_input(op, i);
}
static int linear_input(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ELEMENT_FLOAT; }
static int float_output(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ELEMENT_FLOAT; }
static int narrow_output(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ELEMENT_INT8; }
static size_t one(const OrtCustomOp *op) { return (void)op, 1; }
static size_t two(const OrtCustomOp *op) { return (void)op, 2; }
static size_t four(const OrtCustomOp *op) { return (void)op, 4; }
static size_t five(const OrtCustomOp *op) { return (void)op, 5; }
static size_t six(const OrtCustomOp *op) { return (void)op, 6; }
static size_t seven(const OrtCustomOp *op) { return (void)op, 7; }
static int required(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, REQUIRED; }
static int memory_default(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, MEMORY_DEFAULT; }
static int version_one(const OrtCustomOp *op) { return (void)op, 1; }
static void destroy(void *kernel) { free(kernel); }
static size_t nothing_in_place(int **from, int **to) { return *from = *to = NULL, 0; }
static void nothing_to_release(int *from, int *to) { (void)from, (void)to; }

#define OPERATOR(name, inputs, outputs, input_type, output_type, compute)                          \
  {                                                                                                \
      .version = API_VERSION, .GetName = name, .GetExecutionProviderType = provider,               \
      .GetInputType = input_type, .GetInputTypeCount = inputs, .GetOutputType = output_type,       \
      .GetOutputTypeCount = outputs, .KernelDestroy = destroy,                                     \
      .GetInputCharacteristic = required, .GetOutputCharacteristic = required,                     \
      .GetInputMemoryType = memory_default, .CreateKernelV2 = create, .KernelComputeV2 = compute,  \
      .GetStartVersion = version_one, .GetEndVersion = version_one,                                \
      .GetMayInplace = nothing_in_place, .ReleaseMayInplace = nothing_to_release,                  \
      .GetAliasMap = nothing_in_place, .ReleaseAliasMap = nothing_to_release,                      \
  }
static const OrtCustomOp attention =
    OPERATOR(name_attention, four, one, attention_input, float_output, compute_attention);
static const OrtCustomOp append =
    OPERATOR(name_append, five, two, append_input, float_output, compute_append);
static const OrtCustomOp linear =
    OPERATOR(name_linear, two, one, linear_input, float_output, compute_linear);
static const OrtCustomOp narrow_attention =
    OPERATOR(name_attention, six, one, narrow_attention_input, float_output, compute_attention);
static const OrtCustomOp narrow_append =
    OPERATOR(name_append, seven, two, narrow_append_input, narrow_output, compute_append);

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info,
                         void **out) {
  Kernel kernel = {.api = api, .narrow = op == &narrow_attention || op == &narrow_append};
  if (op == &attention || op == &narrow_attention) {
    TRY(api->KernelInfoGetAttribute_float(info, "scale", &kernel.scale));
    TRY(api->KernelInfoGetAttribute_float(info, "softcap", &kernel.softcap));
    TRY(api->KernelInfoGetAttribute_int64(info, "window", &kernel.window));
  }
  Kernel *made = malloc(sizeof kernel);
  if (!made) return api->CreateStatus(STATUS_FAIL, "out of memory");
  *made = kernel;
  *out = made;
  return NULL;
}

/* What ONNX Runtime calls when it loads this library. */
__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtOptions *options,
                                                                     const OrtApiBase *base) {
  const OrtApi *api = base->GetApi(API_VERSION);
  OrtDomain *domain, *narrow;
  if (!api) return NULL; /* older than 1.18: the session then says that it has no ClaAttention */
  TRY(api->CreateCustomOpDomain("cla", &domain));
  TRY(api->CustomOpDomain_Add(domain, &attention));
  TRY(api->CustomOpDomain_Add(domain, &append));
  TRY(api->CustomOpDomain_Add(domain, &linear));
  TRY(api->AddCustomOpDomain(options, domain));
  TRY(api->CreateCustomOpDomain("cla.int8", &narrow));
  TRY(api->CustomOpDomain_Add(narrow, &narrow_attention));
  TRY(api->CustomOpDomain_Add(narrow, &narrow_append));
  return api->AddCustomOpDomain(options, narrow);
}
