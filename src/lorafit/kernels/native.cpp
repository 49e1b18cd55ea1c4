// The CPU's single passes: each function reads its rows once and writes them once, where torch would
// make a pass for every operation. The same arithmetic in plain torch stands in elementwise.py and
// softmax.py, which tests compare with this. Sums are float32 whatever the rows are stored in.
// Compiled by native.py on first use; knows nothing of torch, only of rows in memory.

#include "native.h"
#include "native16.h"

// y = w * (x / rms(x)), the quotient rounded to x's dtype first, as transformers' RMSNorm does.
template <class X, class Y>
static void rms_norm(const X *x, const X *weight, Y *y, float *rstd, i64 rows, i64 width, float eps) {
#pragma omp parallel for
  for (i64 t = 0; t < rows; t++) {
    const X *in = x + t * width;
    float squares = 0;
    i64 done = squares16(in, width, &squares);
#pragma omp simd reduction(+ : squares)
    for (i64 d = done; d < width; d++) squares += load(in, d) * load(in, d);
    float scale = 1.0f / std::sqrt(squares / float(width) + eps);
    rstd[t] = scale;
    Y *out = y + t * width;
    done = normed16(in, weight, out, width, scale);
#pragma omp simd
    for (i64 d = done; d < width; d++)
      store(out, d, rounded(load(weight, d) * rounded(load(in, d) * scale, in), in));
  }
}

// dx = residual + rstd * (w dy - xhat mean(w dy xhat)), xhat = x rstd
template <class X, class Y>
static void rms_norm_backward(const Y *dy, const X *x, const X *weight, const float *rstd,
                              const X *residual, X *dx, i64 rows, i64 width) {
#pragma omp parallel for
  for (i64 t = 0; t < rows; t++) {
    const X *in = x + t * width, *past = residual ? residual + t * width : nullptr;
    const Y *grad = dy + t * width;
    X *out = dx + t * width;
    float scale = rstd[t], dot = 0;
    i64 done = dot16(grad, in, weight, width, &dot);
#pragma omp simd reduction(+ : dot)
    for (i64 d = done; d < width; d++) dot += load(weight, d) * load(grad, d) * load(in, d);
    float along = dot * scale * scale * scale / float(width);
    done = norm_gradient16(grad, in, weight, past, out, width, scale, along);
    if (past) {
#pragma omp simd
      for (i64 d = done; d < width; d++)
        store(out, d, load(past, d) + scale * load(weight, d) * load(grad, d) - along * load(in, d));
    } else {
#pragma omp simd
      for (i64 d = done; d < width; d++)
        store(out, d, scale * load(weight, d) * load(grad, d) - along * load(in, d));
    }
  }
}

// Rotary embedding of `heads` heads in place; `row` elements from one token to the next.
template <class X>
static void rotate(X *x, const float *cosine, const float *sine, i64 tokens, i64 row, i64 heads,
                   i64 width, i64 inverse) {
  i64 half = width / 2;
  float sign = inverse ? -1.0f : 1.0f;
#pragma omp parallel for
  for (i64 t = 0; t < tokens; t++) {
    const float *c = cosine + t * width, *s = sine + t * width;
    for (i64 h = 0; h < heads; h++) {
      X *low = x + t * row + h * width, *high = low + half;
      i64 done = rotate16(low, high, c, s, half, sign);
#pragma omp simd
      for (i64 d = done; d < half; d++) {
        float a = load(low, d), b = load(high, d);
        store(low, d, a * c[d] - sign * b * s[d]);
        store(high, d, b * c[half + d] + sign * a * s[half + d]);
      }
    }
  }
}

// h = silu(gate) * up; gate and up lie side by side in a row, silu rounded as torch's is.
template <class X>
static void swiglu(const X *both, X *h, i64 rows, i64 width) {
#pragma omp parallel for
  for (i64 t = 0; t < rows; t++) {
    const X *gate = both + t * 2 * width, *up = gate + width;
    X *out = h + t * width;
    i64 done = swiglu16(gate, up, out, width);
#pragma omp simd
    for (i64 f = done; f < width; f++) {
      float g = load(gate, f);
      store(out, f, rounded(g / (1.0f + fast_exp(-g)), gate) * load(up, f));
    }
  }
}

// Writes h anew and turns (gate, up) into their gradients in place.
template <class X>
static void swiglu_backward(X *both, const X *dh, X *h, i64 rows, i64 width) {
#pragma omp parallel for
  for (i64 t = 0; t < rows; t++) {
    X *gate = both + t * 2 * width, *up = gate + width, *out = h + t * width;
    const X *grad = dh + t * width;
    i64 done = swiglu_backward16(gate, up, grad, out, width);
#pragma omp simd
    for (i64 f = done; f < width; f++) {
      float g = load(gate, f), u = load(up, f), d = load(grad, f);
      float sigmoid = 1.0f / (1.0f + fast_exp(-g));
      float silu = g * sigmoid;
      store(out, f, rounded(silu, gate) * u);
      store(gate, f, d * u * sigmoid * (1.0f + g - silu));
      store(up, f, d * silu);
    }
  }
}

// Which keys the query of a row sees: [from, to). Rows repeat the queries of a block head by head.
static inline void seen(i64 row, i64 queries, i64 first, i64 window, i64 keys, i64 *from, i64 *to) {
  i64 position = first + row % queries;
  *to = position + 1 < keys ? position + 1 : keys;
  *from = window > 0 && position + 1 > window ? position + 1 - window : 0;
}

// Scores -> probabilities in place, 0 where a key is not seen; log of the sum of exponentials.
template <class X>
static void softmax(X *scores, float *lse, i64 rows, i64 keys, i64 queries, i64 first, i64 window,
                    float scale) {
#pragma omp parallel for schedule(dynamic, 16)
  for (i64 r = 0; r < rows; r++) {
    X *row = scores + r * keys;
    i64 from, to;
    seen(r, queries, first, window, keys, &from, &to);
    float top = -std::numeric_limits<float>::infinity(), sum = 0;
#pragma omp simd reduction(max : top)
    for (i64 j = from; j < to; j++) top = load(row, j) > top ? load(row, j) : top;
    top *= scale;
#pragma omp simd reduction(+ : sum)
    for (i64 j = from; j < to; j++) sum += fast_exp(load(row, j) * scale - top);
    float log_sum = top + std::log(sum);
    lse[r] = log_sum;
    for (i64 j = 0; j < from; j++) store(row, j, 0.0f);
#pragma omp simd
    for (i64 j = from; j < to; j++) store(row, j, fast_exp(load(row, j) * scale - log_sum));
    for (i64 j = to; j < keys; j++) store(row, j, 0.0f);
  }
}

// Scores -> probabilities again, and their gradients -> the scores' gradients, both in place.
template <class X>
static void softmax_backward(X *scores, X *grads, const float *lse, i64 rows, i64 keys, i64 queries,
                             i64 first, i64 window, float scale) {
#pragma omp parallel for schedule(dynamic, 16)
  for (i64 r = 0; r < rows; r++) {
    X *row = scores + r * keys, *grad = grads + r * keys;
    i64 from, to;
    seen(r, queries, first, window, keys, &from, &to);
    float log_sum = lse[r], dot = 0;
    for (i64 j = 0; j < from; j++) store(row, j, 0.0f), store(grad, j, 0.0f);
#pragma omp simd reduction(+ : dot)
    for (i64 j = from; j < to; j++) {
      float p = fast_exp(load(row, j) * scale - log_sum);
      dot += p * load(grad, j);
      store(row, j, p);
    }
#pragma omp simd
    for (i64 j = from; j < to; j++) store(grad, j, load(row, j) * (load(grad, j) - dot) * scale);
    for (i64 j = to; j < keys; j++) store(row, j, 0.0f), store(grad, j, 0.0f);
  }
}

// Logits -> the gradient of each row's nats in place; nats (smoothed if asked).
template <class X>
static void cross_entropy(X *logits, const i64 *targets, float *nats, i64 rows, i64 vocabulary,
                          float smoothing, float softcap) {
#pragma omp parallel for schedule(dynamic, 4)
  for (i64 n = 0; n < rows; n++) {
    X *row = logits + n * vocabulary;
    float top = -std::numeric_limits<float>::infinity(), sum = 0, all = 0;
    if (softcap > 0)
      for (i64 v = 0; v < vocabulary; v++) store(row, v, softcap * std::tanh(load(row, v) / softcap));
    i64 done = highest16(row, vocabulary, &top);
#pragma omp simd reduction(max : top)
    for (i64 v = done; v < vocabulary; v++) top = load(row, v) > top ? load(row, v) : top;
    done = exponentials16(row, vocabulary, top, &sum, &all);
#pragma omp simd reduction(+ : sum, all)
    for (i64 v = done; v < vocabulary; v++) sum += fast_exp(load(row, v) - top), all += load(row, v);
    float log_sum = top + std::log(sum), target = load(row, targets[n]);
    float even = smoothing / float(vocabulary);
    nats[n] = log_sum - (1.0f - smoothing) * target - even * all;
    float hit = fast_exp(target - log_sum) - even - (1.0f - smoothing);
    if (softcap > 0) {
      float bent = 1.0f - (target / softcap) * (target / softcap);
      for (i64 v = 0; v < vocabulary; v++) {
        float capped = load(row, v), ratio = capped / softcap;
        store(row, v, (fast_exp(capped - log_sum) - even) * (1.0f - ratio * ratio));
      }
      store(row, targets[n], hit * bent);
    } else {
      done = probabilities16(row, vocabulary, log_sum, even);
#pragma omp simd
      for (i64 v = done; v < vocabulary; v++) store(row, v, fast_exp(load(row, v) - log_sum) - even);
      store(row, targets[n], hit);
    }
  }
}

// The mask of LoRA's dropout from counters: x kept and scaled by 1 / (1 - p), or 0. `keys` names the
// document, layer and module of each token; `places` its position there.
template <class X>
static void dropout(const X *x, X *y, const i64 *keys, const i64 *places, i64 rows, i64 width,
                    uint32_t threshold, float scale) {
#pragma omp parallel for
  for (i64 t = 0; t < rows; t++) {
    uint32_t key = uint32_t(keys[t]), start = uint32_t(places[t]) * uint32_t(width);
    const X *in = x + t * width;
    X *out = y + t * width;
#pragma omp simd
    for (i64 d = 0; d < width; d++) {
      uint32_t z = (start + uint32_t(d)) * 0x9e3779b9u ^ key;
      z = (z ^ (z >> 16)) * 0x7feb352du;
      z = (z ^ (z >> 15)) * 0x846ca68bu;
      z ^= z >> 16;
      store(out, d, z >= threshold ? load(in, d) * scale : 0.0f);
    }
  }
}

extern "C" {

#define ROWS(T, X)                                                                                  \
  void rms_norm_##T##_##T(const X *x, const X *w, X *y, float *s, i64 n, i64 d, float e) {          \
    rms_norm(x, w, y, s, n, d, e);                                                                  \
  }                                                                                                 \
  void rms_norm_backward_##T##_##T(const X *g, const X *x, const X *w, const float *s, const X *r,  \
                                   X *o, i64 n, i64 d) {                                            \
    rms_norm_backward(g, x, w, s, r, o, n, d);                                                      \
  }                                                                                                 \
  void rotate_##T(X *x, const float *c, const float *s, i64 n, i64 l, i64 h, i64 d, i64 inverse) {  \
    rotate(x, c, s, n, l, h, d, inverse);                                                           \
  }                                                                                                 \
  void swiglu_##T(const X *x, X *h, i64 n, i64 f) { swiglu(x, h, n, f); }                           \
  void swiglu_backward_##T(X *x, const X *g, X *h, i64 n, i64 f) { swiglu_backward(x, g, h, n, f); } \
  void softmax_##T(X *x, float *l, i64 n, i64 k, i64 q, i64 first, i64 window, float scale) {       \
    softmax(x, l, n, k, q, first, window, scale);                                                   \
  }                                                                                                 \
  void softmax_backward_##T(X *x, X *g, const float *l, i64 n, i64 k, i64 q, i64 first, i64 window, \
                            float scale) {                                                          \
    softmax_backward(x, g, l, n, k, q, first, window, scale);                                       \
  }                                                                                                 \
  void cross_entropy_##T(X *x, const i64 *t, float *o, i64 n, i64 v, float smoothing, float cap) {  \
    cross_entropy(x, t, o, n, v, smoothing, cap);                                                   \
  }                                                                                                 \
  void dropout_##T(const X *x, X *y, const i64 *k, const i64 *p, i64 n, i64 d, uint32_t threshold,  \
                   float scale) {                                                                   \
    dropout(x, y, k, p, n, d, threshold, scale);                                                    \
  }

ROWS(f32, float)
ROWS(bf16, bf16)

void rms_norm_f32_bf16(const float *x, const float *w, bf16 *y, float *s, i64 n, i64 d, float e) {
  rms_norm(x, w, y, s, n, d, e);
}
void rms_norm_backward_f32_bf16(const bf16 *g, const float *x, const float *w, const float *s,
                                const float *r, float *o, i64 n, i64 d) {
  rms_norm_backward(g, x, w, s, r, o, n, d);
}
}
