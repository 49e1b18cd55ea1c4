// The insides of native.cpp's loops over bf16 on processors that convert to it (AVX512-BF16),
// sixteen numbers at a time: compilers vectorise the rounding badly. Each does as many numbers of a
// row as make whole vectors and says how many; the plain loop does the rest, or all.

#pragma once

#include "native.h"

template <class... Any> static inline i64 squares16(Any...) { return 0; }
template <class... Any> static inline i64 normed16(Any...) { return 0; }
template <class... Any> static inline i64 dot16(Any...) { return 0; }
template <class... Any> static inline i64 norm_gradient16(Any...) { return 0; }
template <class... Any> static inline i64 rotate16(Any...) { return 0; }
template <class... Any> static inline i64 swiglu16(Any...) { return 0; }
template <class... Any> static inline i64 swiglu_backward16(Any...) { return 0; }
template <class... Any> static inline i64 highest16(Any...) { return 0; }
template <class... Any> static inline i64 exponentials16(Any...) { return 0; }
template <class... Any> static inline i64 probabilities16(Any...) { return 0; }

#ifdef __AVX512BF16__

static inline i64 whole(i64 width) { return width / LANES * LANES; }

static inline i64 squares16(const bf16 *in, i64 width, float *squares) {
  __m512 sums = _mm512_setzero_ps();
  for (i64 d = 0; d < whole(width); d += LANES) {
    __m512 v = load16(in + d);
    sums = _mm512_fmadd_ps(v, v, sums);
  }
  *squares = _mm512_reduce_add_ps(sums);
  return whole(width);
}

static inline i64 normed16(const bf16 *in, const bf16 *weight, bf16 *out, i64 width, float scale) {
  for (i64 d = 0; d < whole(width); d += LANES) {
    __m512 hat = rounded16(_mm512_mul_ps(load16(in + d), _mm512_set1_ps(scale)));
    store16(out + d, _mm512_mul_ps(load16(weight + d), hat));
  }
  return whole(width);
}

static inline i64 dot16(const bf16 *grad, const bf16 *in, const bf16 *weight, i64 width,
                        float *dot) {
  __m512 sums = _mm512_setzero_ps();
  for (i64 d = 0; d < whole(width); d += LANES) {
    __m512 scaled = _mm512_mul_ps(load16(weight + d), load16(grad + d));
    sums = _mm512_fmadd_ps(scaled, load16(in + d), sums);
  }
  *dot = _mm512_reduce_add_ps(sums);
  return whole(width);
}

static inline i64 norm_gradient16(const bf16 *grad, const bf16 *in, const bf16 *weight,
                                  const bf16 *past, bf16 *out, i64 width, float scale,
                                  float along) {
  for (i64 d = 0; d < whole(width); d += LANES) {
    __m512 scaled = _mm512_mul_ps(load16(weight + d), load16(grad + d));
    __m512 made = past ? load16(past + d) : _mm512_setzero_ps();
    made = _mm512_fmadd_ps(scaled, _mm512_set1_ps(scale), made);
    store16(out + d, _mm512_fnmadd_ps(load16(in + d), _mm512_set1_ps(along), made));
  }
  return whole(width);
}

static inline i64 rotate16(bf16 *low, bf16 *high, const float *c, const float *s, i64 half,
                           float sign) {
  __m512 turn = _mm512_set1_ps(sign);
  for (i64 d = 0; d < whole(half); d += LANES) {
    __m512 a = load16(low + d), b = load16(high + d);
    __m512 sine_low = _mm512_mul_ps(turn, _mm512_loadu_ps(s + d));
    __m512 sine_high = _mm512_mul_ps(turn, _mm512_loadu_ps(s + half + d));
    __m512 first = _mm512_mul_ps(a, _mm512_loadu_ps(c + d));
    __m512 second = _mm512_mul_ps(b, _mm512_loadu_ps(c + half + d));
    store16(low + d, _mm512_fnmadd_ps(b, sine_low, first));
    store16(high + d, _mm512_fmadd_ps(a, sine_high, second));
  }
  return whole(half);
}

static inline __m512 sigmoid16(__m512 x) {
  __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

static inline i64 swiglu16(const bf16 *gate, const bf16 *up, bf16 *out, i64 width) {
  for (i64 f = 0; f < whole(width); f += LANES) {
    __m512 g = load16(gate + f);
    __m512 silu = rounded16(_mm512_mul_ps(g, sigmoid16(g)));
    store16(out + f, _mm512_mul_ps(silu, load16(up + f)));
  }
  return whole(width);
}

static inline i64 swiglu_backward16(bf16 *gate, bf16 *up, const bf16 *grad, bf16 *out, i64 width) {
  for (i64 f = 0; f < whole(width); f += LANES) {
    __m512 g = load16(gate + f), u = load16(up + f), d = load16(grad + f);
    __m512 sigmoid = sigmoid16(g), silu = _mm512_mul_ps(g, sigmoid);
    store16(out + f, _mm512_mul_ps(rounded16(silu), u));
    __m512 slope = _mm512_sub_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), g), silu);
    store16(gate + f, _mm512_mul_ps(_mm512_mul_ps(d, u), _mm512_mul_ps(sigmoid, slope)));
    store16(up + f, _mm512_mul_ps(d, silu));
  }
  return whole(width);
}

static inline i64 highest16(const bf16 *row, i64 width, float *top) {
  __m512 tops = _mm512_set1_ps(*top);
  for (i64 v = 0; v < whole(width); v += LANES) tops = _mm512_max_ps(load16(row + v), tops);
  *top = _mm512_reduce_max_ps(tops);
  return whole(width);
}

static inline i64 exponentials16(const bf16 *row, i64 width, float top, float *sum, float *all) {
  __m512 sums = _mm512_setzero_ps(), alls = _mm512_setzero_ps();
  for (i64 v = 0; v < whole(width); v += LANES) {
    __m512 x = load16(row + v);
    sums = _mm512_add_ps(sums, exp16(_mm512_sub_ps(x, _mm512_set1_ps(top))));
    alls = _mm512_add_ps(alls, x);
  }
  *sum = _mm512_reduce_add_ps(sums);
  *all = _mm512_reduce_add_ps(alls);
  return whole(width);
}

static inline i64 probabilities16(bf16 *row, i64 width, float log_sum, float even) {
  for (i64 v = 0; v < whole(width); v += LANES) {
    __m512 p = exp16(_mm512_sub_ps(load16(row + v), _mm512_set1_ps(log_sum)));
    store16(row + v, _mm512_sub_ps(p, _mm512_set1_ps(even)));
  }
  return whole(width);
}

#endif
