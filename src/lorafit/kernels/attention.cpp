// Causal attention of documents, in bf16 and in float32, for processors that multiply pairs of bf16
// (AVX512-BF16). What attention.py does in batched products, with the scores of a few queries at a
// time: they stay in float32 and in the cache, and those of keys that a query does not see are
// hardly made. Each document is computed by itself, so that nothing depends on what lies beside it.
// Compiled by native.py; without the instructions nothing is left of it.

#include "native.h"
#include "tile.h"

#ifdef __AVX512BF16__

#include <omp.h>

#include <algorithm>
#include <vector>

static const i64 QUERIES = 32;  // of a block: even, as words run along queries too
static const i64 ROWS = 4;

static inline i64 upto(i64 count, i64 step) { return (count + step - 1) / step * step; }

// ---- products ------------------------------------------------------------------------------------

// C [rows, columns] = A B, or C += A B; rows a multiple of ROWS, columns of LANES.
template <class X, bool ADDS>
static void product(Left a, const word *b, i64 wide, float *c, i64 out, i64 rows, i64 columns,
                    i64 steps) {
  for (i64 n = 0; n < columns; n += 4 * LANES)
    for (i64 m = 0; m < rows; m += ROWS) {
      Left from = {a.at + m * a.row, a.row, a.step};
      float *into = c + m * out + n;
      switch (std::min<i64>(4, (columns - n) / LANES)) {
        case 1: tile<X, ROWS, 1, ADDS>(from, b + n, wide, into, out, steps); break;
        case 2: tile<X, ROWS, 2, ADDS>(from, b + n, wide, into, out, steps); break;
        case 3: tile<X, ROWS, 3, ADDS>(from, b + n, wide, into, out, steps); break;
        default: tile<X, ROWS, 4, ADDS>(from, b + n, wide, into, out, steps);
      }
    }
}

// ---- how numbers lie -----------------------------------------------------------------------------

// Rows of a tensor: `row` elements from one to the next.
template <class X>
struct Matrix {
  const X *at;
  i64 row;
};

// From row `first` on, the columns of a head.
template <class X>
static inline Matrix<X> part(Matrix<X> x, i64 first, i64 head, i64 width) {
  return {x.at + first * x.row + head * width, x.row};
}

// [count, width] -> [width, wide] in words: 0 beyond `count`.
template <class X>
static void turned(Matrix<X> x, i64 count, i64 width, word *into, i64 wide) {
  turn((const word *)x.at, x.row / A_WORD<X>, count, width / A_WORD<X>, into, wide);
}

// A row of words from sums that are still to be rounded.
template <class X>
static inline __m512i rounded_words(const float *row, i64 next) {
  if constexpr (A_WORD<X> == 1) return _mm512_loadu_si512(row);
  return side_by_side(narrow16(_mm512_loadu_ps(row)), narrow16(_mm512_loadu_ps(row + next)));
}

// [count, width] -> [padded, width], rows in words: 0 beyond `count`.
template <class X>
static void interleaved(Matrix<X> x, i64 count, i64 width, word *into, i64 padded) {
  for (i64 r = 0; r < padded; r += A_WORD<X>, into += width)
    for (i64 e = 0; e < width; e += LANES) {
      const X *row = x.at + r * x.row + e;
      __mmask16 in = r < count ? 0xffff : 0;
      __m512i words = row_of_words(row, x.row, r + 1 < count, in);
      _mm512_storeu_si512(into + e, words);
    }
}

// [count, width] -> the same, end to end; 0 beyond `count`.
template <class X>
static void gathered(Matrix<X> x, i64 count, i64 width, word *into, i64 padded) {
  X *to = (X *)into;
  for (i64 r = 0; r < count; r++) memcpy(to + r * width, x.at + r * x.row, width * sizeof(X));
  memset((void *)(to + count * width), 0, (padded - count) * width * sizeof(X));
}

template <class X>
static void rounded_rows(const float *x, i64 wide, i64 rows, i64 width, X *into, i64 row) {
  for (i64 r = 0; r < rows; r++)
    for (i64 e = 0; e < width; e += LANES)
      store16(into + r * row + e, _mm512_loadu_ps(x + r * wide + e));
}

// ---- attention -----------------------------------------------------------------------------------

struct Sizes {
  i64 documents, heads, groups, width, window;
  float scale;
};

// Heads of one document that share a key head: all of them, or each by itself where that would be
// too few tasks for the threads. The sums are the same: each head's own, added in their order.
struct Task {
  i64 start, length, group, head, heads;

  Task(i64 number, i64 parts, const int32_t *starts, Sizes how) {
    i64 document = number / parts / how.groups, each = how.heads / how.groups;
    start = starts[document];
    length = starts[document + 1] - start;
    group = number / parts % how.groups;
    heads = each / parts;
    head = group * each + number % parts * heads;
  }
};

static i64 parts_of_a_group(Sizes how) {
  bool few = how.documents * how.groups < 2 * omp_get_max_threads();
  return few ? how.heads / how.groups : 1;
}

// A block of a document's queries.
struct Block {
  i64 first, queries, keys, from;  // keys that any query sees: [from, keys), padded to LANES

  Block(i64 first, i64 length, i64 window)
      : first(first),
        queries(std::min(QUERIES, length - first)),
        keys(upto(first + queries, LANES)),
        from(window > 0 ? std::max<i64>(0, first + 1 - window) / LANES * LANES : 0) {}

  i64 wide() const { return keys - from; }
  i64 rows() const { return upto(queries, ROWS); }
};

// Room that a thread keeps: a few MB, and the next document takes as much.
template <class X>
static X *room(std::vector<X> &kept, i64 count) {
  if (i64(kept.size()) < count + LANES) kept.resize(count + LANES);
  return kept.data();
}

// The keys that a query sees, as columns of its block: [from, to).
struct Seen {
  i64 from, to;

  Seen(Block b, i64 r, i64 window)
      : from(window > 0 ? std::max<i64>(0, b.first + r + 1 - b.from - window) : 0),
        to(b.first + r + 1 - b.from) {}

  __mmask16 lanes(i64 j) const { return lanes_below(to - j) & ~lanes_below(from - j); }
};

// Scores of a row -> probabilities; returns the log of their sum of exponentials.
template <class X>
static float softmax(float *row, Seen seen, i64 wide, float scale, X *into) {
  const float none = -std::numeric_limits<float>::infinity();
  __m512 highest = _mm512_set1_ps(none), sums = _mm512_setzero_ps(), scales = _mm512_set1_ps(scale);
  for (i64 j = 0; j < wide; j += LANES)
    highest = _mm512_mask_max_ps(highest, seen.lanes(j), highest, _mm512_loadu_ps(row + j));
  float top = _mm512_reduce_max_ps(highest) * scale;
  for (i64 j = 0; j < wide; j += LANES) {
    __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(row + j), scales, _mm512_set1_ps(top));
    x = _mm512_maskz_mov_ps(seen.lanes(j), exp16(x));
    sums = _mm512_add_ps(sums, x);
    _mm512_storeu_ps(row + j, x);
  }
  float sum = _mm512_reduce_add_ps(sums);
  for (i64 j = 0; j < wide; j += LANES)
    store16(into + j, _mm512_mul_ps(_mm512_loadu_ps(row + j), _mm512_set1_ps(1 / sum)));
  return top + std::log(sum);
}

// Scores of a row -> probabilities again, and their gradients -> the scores'.
static void softmax_backward(float *row, float *grad, Seen seen, i64 wide, float scale,
                             float log_sum) {
  __m512 along = _mm512_setzero_ps(), scales = _mm512_set1_ps(scale);
  for (i64 j = 0; j < wide; j += LANES) {
    __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(row + j), scales, _mm512_set1_ps(log_sum));
    x = _mm512_maskz_mov_ps(seen.lanes(j), exp16(x));
    along = _mm512_mask3_fmadd_ps(x, _mm512_loadu_ps(grad + j), along, seen.lanes(j));
    _mm512_storeu_ps(row + j, x);
  }
  __m512 dot = _mm512_set1_ps(_mm512_reduce_add_ps(along));
  for (i64 j = 0; j < wide; j += LANES) {
    __m512 x = _mm512_mul_ps(_mm512_loadu_ps(row + j), scales);
    x = _mm512_maskz_mul_ps(seen.lanes(j), x, _mm512_sub_ps(_mm512_loadu_ps(grad + j), dot));
    _mm512_storeu_ps(grad + j, x);
  }
}

template <class X>
static void forward_heads(Task task, Matrix<X> q, Matrix<X> k, Matrix<X> v, X *out, float *lse,
                          Sizes how) {
  static thread_local std::vector<word> kept_k, kept_v, kept_q, kept_p;
  static thread_local std::vector<float> kept_s, kept_o;
  i64 length = task.length, width = how.width, padded = upto(length, LANES);
  i64 deep = width / A_WORD<X>;
  word *keys = room(kept_k, deep * padded), *values = room(kept_v, deep * padded);
  word *queries = room(kept_q, QUERIES * deep), *p = room(kept_p, QUERIES * padded);
  float *scores = room(kept_s, QUERIES * padded), *sums = room(kept_o, QUERIES * width);
  turned(part(k, task.start, task.group, width), length, width, keys, padded);
  interleaved(part(v, task.start, task.group, width), length, width, values, padded);
  for (i64 h = task.head; h < task.head + task.heads; h++)
    for (i64 first = 0; first < length; first += QUERIES) {
      Block b(first, length, how.window);
      i64 wide = b.wide(), row_out = how.heads * width;
      gathered(part(q, task.start + first, h, width), b.queries, width, queries, b.rows());
      product<X, false>({queries, deep, 1}, keys + b.from, padded, scores, wide, b.rows(), wide,
                        deep);
      float *logs = lse + task.start * how.heads + h * length + first;
      for (i64 r = 0; r < b.queries; r++) {
        Seen seen(b, r, how.window);
        logs[r] = softmax(scores + r * wide, seen, wide, how.scale, (X *)p + r * wide);
      }
      i64 seen = wide / A_WORD<X>;
      std::fill(p + b.queries * seen, p + b.rows() * seen, 0);
      product<X, false>({p, seen, 1}, values + b.from * deep, width, sums, width, b.rows(), width,
                        seen);
      X *into = out + (task.start + first) * row_out + h * width;
      rounded_rows(sums, width, b.queries, width, into, row_out);
    }
}

// Where gradients go.
template <class X>
struct Grad {
  X *at;
  i64 row;
};

struct Sums {
  float *keys, *values;  // [L, width], rows up to the next multiple of LANES
};

// Keys and values of a document as the products of a head read them.
struct Packed {
  const word *keys, *values, *rows;
};

// One head's gradients: of q, and of the keys and values as sums.
template <class X>
static void backward_head(Task task, i64 h, Matrix<X> all_q, Matrix<X> all_dout, const float *lse,
                          Packed kv, Grad<X> grad_q, Sums into, Sizes how) {
  static thread_local std::vector<word> kept_q, kept_do, kept_q2, kept_do2;
  static thread_local std::vector<word> kept_p, kept_ds, kept_row;
  static thread_local std::vector<float> kept_s, kept_g, kept_dq;
  i64 length = task.length, width = how.width, padded = upto(length, LANES);
  i64 deep = width / A_WORD<X>;
  word *q = room(kept_q, QUERIES * deep), *dout = room(kept_do, QUERIES * deep);
  word *q_columns = room(kept_q2, QUERIES * deep);
  word *do_columns = room(kept_do2, QUERIES * deep);
  word *p = room(kept_p, QUERIES * padded), *ds = room(kept_ds, QUERIES * padded);
  word *ds_rows = room(kept_row, QUERIES * padded);
  float *scores = room(kept_s, QUERIES * padded), *grads = room(kept_g, QUERIES * padded);
  float *dq = room(kept_dq, QUERIES * width);
  std::fill(into.keys, into.keys + padded * width, 0.0f);
  std::fill(into.values, into.values + padded * width, 0.0f);
  for (i64 first = 0; first < length; first += QUERIES) {
    Block b(first, length, how.window);
    i64 wide = b.wide();
    Matrix<X> q_rows = part(all_q, task.start + first, h, width);
    Matrix<X> do_rows = part(all_dout, task.start + first, h, width);
    gathered(q_rows, b.queries, width, q, b.rows());
    gathered(do_rows, b.queries, width, dout, b.rows());
    interleaved(q_rows, b.queries, width, q_columns, b.rows());
    interleaved(do_rows, b.queries, width, do_columns, b.rows());
    product<X, false>({q, deep, 1}, kv.keys + b.from, padded, scores, wide, b.rows(), wide, deep);
    product<X, false>({dout, deep, 1}, kv.values + b.from, padded, grads, wide, b.rows(), wide,
                      deep);
    const float *logs = lse + task.start * how.heads + h * length + first;
    for (i64 r = 0; r < b.queries; r++) {
      Seen seen(b, r, how.window);
      softmax_backward(scores + r * wide, grads + r * wide, seen, wide, how.scale, logs[r]);
    }
    std::fill(scores + b.queries * wide, scores + b.rows() * wide, 0.0f);
    std::fill(grads + b.queries * wide, grads + b.rows() * wide, 0.0f);
    rounded_rows(grads, wide, b.rows(), wide, (X *)ds_rows, wide);
    for (i64 r = 0; r < b.rows(); r += A_WORD<X>)
      for (i64 j = 0; j < wide; j += LANES) {
        i64 from = r * wide + j, to = r / A_WORD<X> * wide + j;
        _mm512_storeu_si512(p + to, rounded_words<X>(scores + from, wide));
        _mm512_storeu_si512(ds + to, rounded_words<X>(grads + from, wide));
      }
    i64 skipped = b.from * width, steps = b.rows() / A_WORD<X>, seen = wide / A_WORD<X>;
    product<X, true>({p, 1, wide}, do_columns, width, into.values + skipped, width, wide, width,
                     steps);
    product<X, true>({ds, 1, wide}, q_columns, width, into.keys + skipped, width, wide, width,
                     steps);
    product<X, false>({ds_rows, seen, 1}, kv.rows + b.from * deep, width, dq, width, b.rows(),
                      width, seen);
    X *to = grad_q.at + (task.start + first) * grad_q.row + h * width;
    rounded_rows(dq, width, b.queries, width, to, grad_q.row);
  }
}

static void add(Sums all, Sums one, i64 count) {
#pragma omp simd
  for (i64 i = 0; i < count; i++) all.keys[i] += one.keys[i], all.values[i] += one.values[i];
}

// The sums of a task's heads, in room that is the thread's.
template <class X>
static Sums backward_heads(Task task, Matrix<X> q, Matrix<X> k, Matrix<X> v, Matrix<X> dout,
                           const float *lse, Grad<X> dq, Sizes how) {
  static thread_local std::vector<word> kept_k, kept_v, kept_rows;
  static thread_local std::vector<float> kept_dk, kept_dv, kept_dk1, kept_dv1;
  i64 length = task.length, width = how.width, padded = upto(length, LANES);
  i64 deep = width / A_WORD<X>;
  word *keys = room(kept_k, deep * padded), *values = room(kept_v, deep * padded);
  word *rows = room(kept_rows, deep * padded);
  turned(part(k, task.start, task.group, width), length, width, keys, padded);
  turned(part(v, task.start, task.group, width), length, width, values, padded);
  interleaved(part(k, task.start, task.group, width), length, width, rows, padded);
  Sums all = {room(kept_dk, padded * width), room(kept_dv, padded * width)};
  Sums one = {room(kept_dk1, padded * width), room(kept_dv1, padded * width)};
  for (i64 h = task.head; h < task.head + task.heads; h++) {
    Sums into = h == task.head ? all : one;
    backward_head(task, h, q, dout, lse, {keys, values, rows}, dq, into, how);
    if (h > task.head) add(all, one, length * width);
  }
  return all;
}

template <class X>
static void write(Sums sums, Task task, Grad<X> dk, Grad<X> dv, i64 width) {
  i64 column = task.group * width;
  rounded_rows(sums.keys, width, task.length, width, dk.at + task.start * dk.row + column, dk.row);
  rounded_rows(sums.values, width, task.length, width, dv.at + task.start * dv.row + column,
               dv.row);
}

// q, k, v: rows of `row_*` elements whose heads lie side by side; out [T, H, E]; lse: for each
// document in turn [H, L]. starts: int32 [documents + 1].
template <class X>
static void attention(Matrix<X> q, Matrix<X> k, Matrix<X> v, X *out, float *lse,
                      const int32_t *starts, Sizes how) {
  i64 parts = parts_of_a_group(how);
#pragma omp parallel for schedule(dynamic, 1)
  for (i64 number = 0; number < how.documents * how.groups * parts; number++)
    forward_heads(Task(number, parts, starts, how), q, k, v, out, lse, how);
}

// The gradients of q, k and v.
template <class X>
static void attention_backward(Matrix<X> dout, Matrix<X> q, Matrix<X> k, Matrix<X> v,
                               const float *lse, Grad<X> dq, Grad<X> dk, Grad<X> dv,
                               const int32_t *starts, Sizes how) {
  i64 parts = parts_of_a_group(how), half = starts[how.documents] * how.heads * how.width;
  std::vector<float> apart(parts > 1 ? 2 * half : 0);
  auto place = [&](Task task, i64 head) -> Sums {
    float *keys = apart.data() + (task.start * how.heads + head * task.length) * how.width;
    return {keys, keys + half};
  };
#pragma omp parallel for schedule(dynamic, 1)
  for (i64 number = 0; number < how.documents * how.groups * parts; number++) {
    Task task(number, parts, starts, how);
    Sums sums = backward_heads(task, q, k, v, dout, lse, dq, how);
    if (parts == 1) {
      write(sums, task, dk, dv, how.width);
    } else {
      Sums kept = place(task, task.head);
      std::copy_n(sums.keys, task.length * how.width, kept.keys);
      std::copy_n(sums.values, task.length * how.width, kept.values);
    }
  }
  if (parts == 1) return;
#pragma omp parallel for schedule(dynamic, 1)
  for (i64 number = 0; number < how.documents * how.groups; number++) {
    Task task(number, 1, starts, how);
    Sums all = place(task, task.head);
    for (i64 h = task.head + 1; h < task.head + task.heads; h++)
      add(all, place(task, h), task.length * how.width);
    write(all, task, dk, dv, how.width);
  }
}

extern "C" {

#define ATTENTION(T, X)                                                                             \
  void attention_##T(const X *q, const X *k, const X *v, X *out, float *lse, const int32_t *starts, \
                     i64 row_q, i64 row_k, i64 row_v, i64 documents, i64 heads, i64 groups,         \
                     i64 width, i64 window, float scale) {                                          \
    Sizes how = {documents, heads, groups, width, window, scale};                                   \
    attention<X>({q, row_q}, {k, row_k}, {v, row_v}, out, lse, starts, how);                        \
  }                                                                                                 \
  void attention_backward_##T(                                                                      \
      const X *dout, const X *q, const X *k, const X *v, const float *lse, X *dq, X *dk, X *dv,     \
      const int32_t *starts, i64 row_q, i64 row_k, i64 row_v, i64 row_dq, i64 row_dk, i64 row_dv,   \
      i64 documents, i64 heads, i64 groups, i64 width, i64 window, float scale) {                   \
    Sizes how = {documents, heads, groups, width, window, scale};                                   \
    attention_backward<X>({dout, heads * width}, {q, row_q}, {k, row_k}, {v, row_v}, lse,           \
                          {dq, row_dq}, {dk, row_dk}, {dv, row_dv}, starts, how);                   \
  }

ATTENTION(f32, float)
ATTENTION(bf16, bf16)
}

#endif
