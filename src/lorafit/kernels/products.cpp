// Products of rows with frozen weights, on processors that multiply pairs of bf16 (AVX512-BF16), in
// bf16 and in float32. Weights are read as they lie: a few columns at a time are put side by side in
// the cache while the next are fetched, and what an adapter, a bias and the residual rows add joins
// the sums before they are rounded, once. Each number's sum runs in one order, whatever rows lie
// beside it and however many threads there are.
// Compiled by native.py; without the instructions nothing is left of it.

#include "native.h"
#include "tile.h"

#ifdef __AVX512BF16__

#include <omp.h>

#include <algorithm>
#include <vector>

static const i64 ROWS = 8, VECTORS = 3, COLUMNS = VECTORS * LANES;  // 24 sums of 16 in registers
static const i64 PANELS = 4, CHUNK = PANELS * COLUMNS;  // columns that are put side by side at once
static const i64 STEPS = 384, LOW_STEPS = 64;           // words deep: 336 KiB of a core's own cache
static const i64 BAND = 64, MOST = 1024;                // rows dealt out, rows of sums at a time
static const i64 LINE = 64;

static inline i64 parts(i64 count, i64 each) { return (count + each - 1) / each; }

// left [rows, depth], and right: [columns, depth] if TURNED, else [depth, columns].
template <class X>
struct Factors {
  const X *left, *right;
  i64 depth, row;  // elements from one row of right to the next

  i64 steps() const { return parts(depth, A_WORD<X>); }
};

// ---- right operands, side by side ----------------------------------------------------------------

// A part of right: its columns from n0 to n1 and its words from k0 on, `count` deep.
template <class X, bool TURNED>
struct Slice {
  Factors<X> of;
  i64 n0, n1, k0, count;

  const X *begin(i64 n) const {
    i64 k = k0 * A_WORD<X>;
    return TURNED ? of.right + n * of.row + k : of.right + k * of.row + n;
  }

  // Panels of COLUMNS each, one behind the other.
  void pack(word *into) const {
    if (TURNED) {
      for (i64 n = n0; n < n1; n += COLUMNS, into += COLUMNS * count)
        turn((const word *)begin(n), of.row / A_WORD<X>, std::min(COLUMNS, n1 - n), count,
             into, COLUMNS);
      return;
    }
    for (i64 k = 0; k < count; k++) {
      const X *row = begin(n0) + k * A_WORD<X> * of.row;
      bool both = (k0 + k) * A_WORD<X> + 1 < of.depth;
      word *panel = into + k * COLUMNS;
      for (i64 n = 0; n < n1 - n0; n += COLUMNS, panel += COLUMNS * count)
        for (i64 v = 0; v < COLUMNS; v += LANES)
          _mm512_storeu_si512(panel + v, row_of_words(row + n + v, of.row, both,
                                                      lanes_below(n1 - n0 - n - v)));
    }
  }

  // Ask for the part-th of so many parts of it, which come while others are multiplied.
  void fetch(i64 part, i64 all) const {
    i64 rows = TURNED ? n1 - n0 : std::min(count * A_WORD<X>, of.depth - k0 * A_WORD<X>);
    i64 bytes = TURNED ? count * sizeof(word) : (n1 - n0) * sizeof(X);
    for (i64 r = rows * part / all; r < rows * (part + 1) / all; r++)
      for (i64 at = 0; at < bytes; at += LINE)
        _mm_prefetch((const char *)(begin(n0) + r * of.row) + at, _MM_HINT_T1);
  }
};

// ---- products ------------------------------------------------------------------------------------

template <class X, bool ADDS, int M = ROWS>
static inline void tiles(i64 rows, Left a, const word *panel, float *c, i64 steps) {
  if (rows == M) return tile<X, M, VECTORS, ADDS>(a, panel, COLUMNS, c, CHUNK, steps);
  if constexpr (M > 1) tiles<X, ADDS, M - 1>(rows, a, panel, c, steps);
}

static inline __m512 load16(const float *p, __mmask16 in) { return _mm512_maskz_loadu_ps(in, p); }
static inline __m512 load16(const bf16 *p, __mmask16 in) {
  return wide16(_mm256_maskz_loadu_epi16(in, p));
}
static inline void store16(float *p, __mmask16 in, __m512 x) { _mm512_mask_storeu_ps(p, in, x); }
static inline void store16(bf16 *p, __mmask16 in, __m512 x) {
  _mm256_mask_storeu_epi16(p, in, narrow16(x));
}

// into [rows, columns] = the sum of two products + bias + residual; the last three may be missing.
template <class X, class Y, bool TURNED>
struct Product {
  Factors<X> main, low;  // low.steps() <= LOW_STEPS
  const X *bias, *residual;
  Y *into;
  i64 rows, columns;

  // Chunks of columns in bands of rows: each thread takes as many, one behind the other.
  void run() const {
    i64 panels = std::max<i64>(1, parts(columns, COLUMNS));
    i64 each = parts(panels, omp_get_max_threads());
    i64 wide = parts(each, parts(each, PANELS)) * COLUMNS;
    i64 bands = parts(rows, BAND), tasks = parts(columns, wide) * bands;
#pragma omp parallel
    {
      i64 from = tasks * omp_get_thread_num() / omp_get_num_threads();
      i64 to = tasks * (omp_get_thread_num() + 1) / omp_get_num_threads();
      while (from < to) {
        i64 band = from % bands, n0 = from / bands * wide;
        i64 next = std::min({to, from - band + bands, from + MOST / BAND});
        bool turns = next < to && next % bands == 0;  // to other columns
        chunk(band * BAND, std::min(rows, (band + next - from) * BAND), n0,
              std::min(columns, n0 + wide), turns ? n0 + wide : n0);
        from = next;
      }
    }
  }

 private:
  // Rows r0 to r1 of columns n0 to n1; after them come those from `next` on.
  void chunk(i64 r0, i64 r1, i64 n0, i64 n1, i64 next) const {
    static thread_local std::vector<word> packed(CHUNK * (STEPS + LOW_STEPS));
    static thread_local std::vector<float> sums;
    i64 blocks = std::max<i64>(1, parts(main.steps(), STEPS));
    i64 each = parts(main.steps(), blocks);
    i64 kept = blocks > 1 ? r1 - r0 : ROWS, tiled = parts(r1 - r0, ROWS);
    i64 panels = parts(n1 - n0, COLUMNS);
    if (i64(sums.size()) < kept * CHUNK) sums.resize(kept * CHUNK);
    auto slice = [&](i64 n, i64 number) -> Slice<X, TURNED> {
      i64 k0 = number * each, wide = n1 - n0;
      return {main, n, std::min(columns, n + wide), k0, std::min(each, main.steps() - k0)};
    };
    for (i64 b = 0; b < blocks; b++) {
      bool last = b + 1 == blocks;
      Slice<X, TURNED> now = slice(n0, b), then = last ? slice(next, 0) : slice(n0, b + 1);
      word *beside = packed.data() + CHUNK * now.count;
      now.pack(packed.data());
      if (last) Slice<X, TURNED>{low, n0, n1, 0, low.steps()}.pack(beside);
      for (i64 t = 0; t < tiled; t++) {
        i64 r = r0 + t * ROWS, m = std::min(ROWS, r1 - r);
        float *c = sums.data() + (blocks > 1 ? r - r0 : 0) * CHUNK;
        if (last) fetch_result(r, m, n0, n1);
        Left a = left(main, r, now.k0);
        for (i64 p = 0; p < panels; p++) {
          if (!last || next != n0) then.fetch(t * panels + p, tiled * panels);
          multiply(m, a, packed.data() + p * COLUMNS * now.count, c + p * COLUMNS, now.count, b > 0);
        }
        if (!last) continue;
        for (i64 p = 0; low.depth && p < panels; p++)
          multiply(m, left(low, r, 0), beside + p * COLUMNS * low.steps(), c + p * COLUMNS,
                   low.steps(), true);
        for (i64 i = 0; i < m; i++) finish(c + i * CHUNK, r + i, n0, n1);
      }
    }
  }

  static Left left(Factors<X> f, i64 r, i64 k0) {
    return {(const word *)f.left + r * f.steps() + k0, f.steps(), 1};
  }

  static void multiply(i64 m, Left a, const word *panel, float *c, i64 steps, bool adds) {
    adds ? tiles<X, true>(m, a, panel, c, steps) : tiles<X, false>(m, a, panel, c, steps);
  }

  void fetch_result(i64 r, i64 m, i64 n0, i64 n1) const {
    for (i64 i = r; i < r + m; i++)
      for (i64 n = n0; n < n1; n += LINE / i64(sizeof(Y)))
        __builtin_prefetch(into + i * columns + n, 1);
  }

  void finish(const float *sums, i64 r, i64 n0, i64 n1) const {
    for (i64 n = n0; n < n1; n += LANES) {
      __mmask16 in = lanes_below(n1 - n);
      __m512 x = _mm512_loadu_ps(sums + n - n0);
      if (bias) x = _mm512_add_ps(x, load16(bias + n, in));
      if (residual) x = _mm512_add_ps(x, load16(residual + r * columns + n, in));
      store16(into + r * columns + n, in, x);
    }
  }
};

extern "C" {

#define PRODUCTS(T, X)                                                                              \
  void linear_##T(const X *x, const X *w, const X *xa, const X *b, const X *bias,                   \
                  const X *residual, X *y, i64 rows, i64 columns, i64 depth, i64 ranks) {           \
    Product<X, X, true>{{x, w, depth, depth}, {xa, b, ranks, ranks}, bias, residual, y, rows,       \
                        columns}                                                                    \
        .run();                                                                                     \
  }                                                                                                 \
  void linear_backward_##T(const X *dy, const X *w, const X *dxa, const X *a, X *dx, i64 rows,      \
                           i64 columns, i64 depth, i64 ranks) {                                     \
    Product<X, X, false>{{dy, w, depth, columns}, {dxa, a, ranks, columns}, nullptr, nullptr, dx,   \
                         rows, columns}                                                             \
        .run();                                                                                     \
  }                                                                                                 \
  void over_rows_##T(const X *left, const X *right, float *sums, i64 rows, i64 columns, i64 depth,  \
                     i64 row) {                                                                     \
    Product<X, float, false>{{left, right, depth, row}, {}, nullptr, nullptr, sums, rows, columns}  \
        .run();                                                                                     \
  }

PRODUCTS(f32, float)
PRODUCTS(bf16, bf16)
}

#endif
