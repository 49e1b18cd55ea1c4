// The inner loop of matrix products, for attention.cpp and products.cpp: a tile of sums that stays
// in the processor's registers. Numbers go in words of 32 bits: a float, or a pair of bf16, which
// the processor multiplies and adds at once. Left operands are read word by word, right ones as rows
// of words that lie side by side for 16 columns or more.

#pragma once

#include "native.h"

#ifdef __AVX512BF16__

#include <algorithm>

using word = uint32_t;

template <class X>
static constexpr i64 A_WORD = sizeof(word) / sizeof(X);  // numbers

// A left operand: the word of row m at step k is at[m * row + k * step].
struct Left {
  const word *at;
  i64 row, step;
};

static inline __m512 multiplied(__m512 sum, __m512i a, __m512i b, const bf16 *) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
static inline __m512 multiplied(__m512 sum, __m512i a, __m512i b, const float *) {
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

// C [M, N * LANES] = A B, or C += A B, over so many steps; `wide` words from a row of B to the next,
// `out` numbers from a row of C.
template <class X, int M, int N, bool ADDS>
static inline void tile(Left a, const word *b, i64 wide, float *c, i64 out, i64 steps) {
  __m512 sums[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sums[m][n] = _mm512_setzero_ps();
  for (i64 k = 0; k < steps; k++) {
    __m512i columns[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) columns[n] = _mm512_loadu_si512(b + k * wide + n * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      __m512i one = _mm512_set1_epi32(int(a.at[m * a.row + k * a.step]));
#pragma GCC unroll 4
      for (int n = 0; n < N; n++)
        sums[m][n] = multiplied(sums[m][n], one, columns[n], (const X *)nullptr);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      float *at = c + m * out + n * LANES;
      __m512 before = ADDS ? _mm512_loadu_ps(at) : _mm512_setzero_ps();
      _mm512_storeu_ps(at, _mm512_add_ps(before, sums[m][n]));
    }
}

// Two rows of bf16 as one of pairs.
static inline __m512i side_by_side(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// One row of words from a row of numbers, or from a pair of rows of which the second may be missing.
static inline __m512i row_of_words(const float *from, i64, bool, __mmask16 in) {
  return _mm512_maskz_loadu_epi32(in, from);
}
static inline __m512i row_of_words(const bf16 *from, i64 row, bool both, __mmask16 in) {
  return side_by_side(_mm256_maskz_loadu_epi16(in, from),
                      _mm256_maskz_loadu_epi16(both ? in : 0, from + row));
}

// The first `count` of 16 lanes, if there are as many.
static inline __mmask16 lanes_below(i64 count) {
  return count <= 0 ? 0 : count >= LANES ? 0xffff : __mmask16((1u << count) - 1);
}

static inline void transpose(__m512i r[LANES]) {
  __m512i t[LANES];
  for (int i = 0; i < LANES; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  for (int i = 0; i < 4; i++) {
    __m512i even = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    __m512i odd = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    __m512i even8 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    __m512i odd8 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(even, even8, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(even, even8, 0xdd);
    t[i + 4] = _mm512_shuffle_i32x4(odd, odd8, 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(odd, odd8, 0xdd);
  }
  std::copy_n(t, LANES, r);
}

// Rows of words -> columns: [wide, count] -> [count, columns], 0 beyond `wide`; columns a multiple
// of LANES.
static void turn(const word *from, i64 row, i64 wide, i64 count, word *into, i64 columns) {
  for (i64 n = 0; n < columns; n += LANES)
    for (i64 k = 0; k < count; k += LANES) {
      __m512i r[LANES];
      for (i64 i = 0; i < LANES; i++)
        r[i] = n + i < wide
                   ? _mm512_maskz_loadu_epi32(lanes_below(count - k), from + (n + i) * row + k)
                   : _mm512_setzero_si512();
      transpose(r);
      for (i64 i = 0; i < std::min(LANES, count - k); i++)
        _mm512_storeu_si512(into + (k + i) * columns + n, r[i]);
    }
}

#endif
