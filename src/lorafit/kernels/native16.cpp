// The passes of native.cpp over bf16 on processors that convert to it (AVX512-BF16): the same
// arithmetic, 16 numbers at a time. What is left of a row goes the plain way.
// Included by native.cpp; without the instructions nothing is left of it.

#ifdef __AVX512BF16__

template <>
void rms_norm(const bf16 *x, const bf16 *weight, bf16 *y, float *rstd, i64 rows, i64 width,
              float eps) {
#pragma omp parallel for
  for (i64 t = 0; t < rows; t++) {
    const bf16 *in = x + t * width;
    bf16 *out = y + t * width;
    __m512 sums = _mm512_setzero_ps();
    float squares = 0;
    i64 d = 0;
    for (; d + LANES <= width; d += LANES) {
      __m512 v = load16(in + d);
      sums = _mm512_fmadd_ps(v, v, sums);
    }
    for (; d < width; d++) squares += load(in, d) * load(in, d);
    float scale = 1.0f / std::sqrt((squares + _mm512_reduce_add_ps(sums)) / float(width) + eps);
    rstd[t] = scale;
    for (d = 0; d + LANES <= width; d += LANES) {
      __m512 hat = rounded16(_mm512_mul_ps(load16(in + d), _mm512_set1_ps(scale)));
      store16(out + d, _mm512_mul_ps(load16(weight + d), hat));
    }
    for (; d < width; d++) store(out, d, load(weight, d) * rounded(load(in, d) * scale, in));
  }
}

template <>
void rms_norm_backward(const bf16 *dy, const bf16 *x, const bf16 *weight, const float *rstd,
                       const bf16 *residual, bf16 *dx, i64 rows, i64 width) {
#pragma omp parallel for
  for (i64 t = 0; t < rows; t++) {
    const bf16 *in = x + t * width, *past = residual ? residual + t * width : nullptr;
    const bf16 *grad = dy + t * width;
    bf16 *out = dx + t * width;
    __m512 sums = _mm512_setzero_ps();
    float scale = rstd[t], dot = 0;
    i64 d = 0;
    for (; d + LANES <= width; d += LANES) {
      __m512 scaled = _mm512_mul_ps(load16(weight + d), load16(grad + d));
      sums = _mm512_fmadd_ps(scaled, load16(in + d), sums);
    }
    for (; d < width; d++) dot += load(weight, d) * load(grad, d) * load(in, d);
    dot += _mm512_reduce_add_ps(sums);
    float along = dot * scale * scale * scale / float(width);
    for (d = 0; d + LANES <= width; d += LANES) {
      __m512 scaled = _mm512_mul_ps(load16(weight + d), load16(grad + d));
      __m512 made = past ? load16(past + d) : _mm512_setzero_ps();
      made = _mm512_fmadd_ps(scaled, _mm512_set1_ps(scale), made);
      store16(out + d, _mm512_fnmadd_ps(load16(in + d), _mm512_set1_ps(along), made));
    }
    for (; d < width; d++)
      store(out, d, (past ? load(past, d) : 0) + scale * load(weight, d) * load(grad, d) -
                        along * load(in, d));
  }
}

static inline __m512 sigmoid16(__m512 x) {
  __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

template <>
void swiglu(const bf16 *both, bf16 *h, i64 rows, i64 width) {
#pragma omp parallel for
  for (i64 t = 0; t < rows; t++) {
    const bf16 *gate = both + t * 2 * width, *up = gate + width;
    bf16 *out = h + t * width;
    i64 f = 0;
    for (; f + LANES <= width; f += LANES) {
      __m512 g = load16(gate + f);
      __m512 silu = rounded16(_mm512_mul_ps(g, sigmoid16(g)));
      store16(out + f, _mm512_mul_ps(silu, load16(up + f)));
    }
    for (; f < width; f++) {
      float g = load(gate, f);
      store(out, f, rounded(g / (1.0f + fast_exp(-g)), gate) * load(up, f));
    }
  }
}

template <>
void swiglu_backward(bf16 *both, const bf16 *dh, bf16 *h, i64 rows, i64 width) {
#pragma omp parallel for
  for (i64 t = 0; t < rows; t++) {
    bf16 *gate = both + t * 2 * width, *up = gate + width, *out = h + t * width;
    const bf16 *grad = dh + t * width;
    i64 f = 0;
    for (; f + LANES <= width; f += LANES) {
      __m512 g = load16(gate + f), u = load16(up + f), d = load16(grad + f);
      __m512 sigmoid = sigmoid16(g), silu = _mm512_mul_ps(g, sigmoid);
      store16(out + f, _mm512_mul_ps(rounded16(silu), u));
      __m512 slope = _mm512_sub_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), g), silu);
      store16(gate + f, _mm512_mul_ps(_mm512_mul_ps(d, u), _mm512_mul_ps(sigmoid, slope)));
      store16(up + f, _mm512_mul_ps(d, silu));
    }
    for (; f < width; f++) {
      float g = load(gate, f), u = load(up, f), d = load(grad, f);
      float sigmoid = 1.0f / (1.0f + fast_exp(-g)), silu = g * sigmoid;
      store(out, f, rounded(silu, gate) * u);
      store(gate, f, d * u * sigmoid * (1.0f + g - silu));
      store(up, f, d * silu);
    }
  }
}

template <>
void rotate(bf16 *x, const float *cosine, const float *sine, i64 tokens, i64 row, i64 heads,
            i64 width, i64 inverse) {
  i64 half = width / 2;
  float sign = inverse ? -1.0f : 1.0f;
#pragma omp parallel for
  for (i64 t = 0; t < tokens; t++) {
    const float *c = cosine + t * width, *s = sine + t * width;
    for (i64 h = 0; h < heads; h++) {
      bf16 *low = x + t * row + h * width, *high = low + half;
      i64 d = 0;
      for (; d + LANES <= half; d += LANES) {
        __m512 a = load16(low + d), b = load16(high + d), turn = _mm512_set1_ps(sign);
        __m512 sine_low = _mm512_mul_ps(turn, _mm512_loadu_ps(s + d));
        __m512 sine_high = _mm512_mul_ps(turn, _mm512_loadu_ps(s + half + d));
        __m512 first = _mm512_mul_ps(a, _mm512_loadu_ps(c + d));
        __m512 second = _mm512_mul_ps(b, _mm512_loadu_ps(c + half + d));
        store16(low + d, _mm512_fnmadd_ps(b, sine_low, first));
        store16(high + d, _mm512_fmadd_ps(a, sine_high, second));
      }
      for (; d < half; d++) {
        float a = load(low, d), b = load(high, d);
        store(low, d, a * c[d] - sign * b * s[d]);
        store(high, d, b * c[half + d] + sign * a * s[half + d]);
      }
    }
  }
}

#endif
