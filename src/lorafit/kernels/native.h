// What native.cpp and attention.cpp share: numbers in memory, rounded as torch rounds them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

using i64 = int64_t;

struct bf16 {  // rounds to nearest even, as torch does; NaN stays NaN
  uint16_t bits;
};

static inline float load(const float *p, i64 i) { return p[i]; }
static inline float load(const bf16 *p, i64 i) {
  uint32_t wide = uint32_t(p[i].bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
static inline void store(float *p, i64 i, float value) { p[i] = value; }
static inline void store(bf16 *p, i64 i, float value) {
  uint32_t wide;
  memcpy(&wide, &value, 4);
  uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  uint32_t quiet = (wide >> 16) | 0x40u;
  p[i].bits = uint16_t((wide & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}
static inline float rounded(float value, const float *) { return value; }
static inline float rounded(float value, const bf16 *like) {
  bf16 kept;
  store(&kept, 0, value);
  (void)like;
  return load(&kept, 0);
}

// exp to 2 ulp of float32 (Cephes' polynomial), written so that compilers vectorise it.
// Below -87 it is 0; NaN stays NaN.
static inline float fast_exp(float x) {
  float clipped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  float n = __builtin_floorf(clipped * 1.44269504088896341f + 0.5f);
  float r = clipped - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t power = (int32_t(n) + 127) << 23;
  float scale;
  memcpy(&scale, &power, 4);
  float value = p * scale;
  value = x < -87.0f ? 0.0f : value;
  value = x > 88.0f ? std::numeric_limits<float>::infinity() : value;
  return x != x ? x : value;
}

#ifdef __AVX512BF16__

#include <immintrin.h>
#include <initializer_list>

static const i64 LANES = 16;

static inline __m256i narrow16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
static inline __m512 wide16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
static inline __m512 rounded16(__m512 x) { return wide16(narrow16(x)); }

static inline __m512 load16(const bf16 *p) { return wide16(_mm256_loadu_si256((const __m256i *)p)); }
static inline void store16(float *p, __m512 x) { _mm512_storeu_ps(p, x); }
static inline void store16(bf16 *p, __m512 x) { _mm256_storeu_si256((__m256i *)p, narrow16(x)); }

// exp of 16 numbers to 2 ulp (Cephes' polynomial); 0 and infinity where they belong, NaN stays NaN.
static inline __m512 exp16(__m512 x) {
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

#endif
