// Products of int8 weights by the processor's own int8 instructions, to float32's accuracy.
//
// A vector x is written in whole numbers of 24 bits times one scale, and those in three digits to
// the base 256:
//
//     x_k = scale (65536 d2_k + 256 d1_k + d0_k),         -128 <= d <= 127
//
// so that w . x is three sums of products of int8 numbers, which are exact. The instruction
// multiplies 64 pairs at once, where the way over floats takes 12 instructions to widen and
// multiply as many weights.

#pragma once

#include <type_traits>
#include <utility>

#include "product.h"

namespace mambakit {

#if defined(__AVX512BW__)

MAMBAKIT_INLINE bool has_int8_products() { return __builtin_cpu_supports("avx512vnni"); }

using Bytes = VectorOf<uint8_t, 64>::type;

// sum + a . b within each four bytes, a unsigned and b signed. Written as assembly, for the
// build is for processors that may lack the instruction: who has none never comes here.
MAMBAKIT_INLINE Vec<int32_t> add_products(Vec<int32_t> sum, Bytes a, const int8_t* b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "m"(*reinterpret_cast<const Bytes*>(b)));
  return sum;
}

// body(0), ..., body(count - 1), each with a constant: compilers keep an array in registers only
// where no index is computed, and do not unroll loops around assembly by themselves.
template <typename Body, int... i>
inline __attribute__((always_inline)) void repeat(const Body& body,
                                                  std::integer_sequence<int, i...>) {
  (body(std::integral_constant<int, i>{}), ...);
}
template <int count, typename Body>
inline __attribute__((always_inline)) void repeat(const Body& body) {
  repeat(body, std::make_integer_sequence<int, count>{});
}

// Vectors in digits. Each takes `bytes_for(columns)`: three vectors that sums start from, the
// scale, and then for each 64 numbers their first digits, their second and their third, with zeros
// up to a whole vector.
struct DigitVectors {
  int8_t* data;
  int64_t stride, row;

  static constexpr int64_t head = 4 * 64;
  static constexpr int64_t row_of(int64_t columns) { return (columns + 63) / 64 * 64; }
  static constexpr int64_t bytes_for(int64_t columns) { return head + 3 * row_of(columns) + 64; }

  DigitVectors(int8_t* data, int64_t columns)
      : data(data), stride(bytes_for(columns)), row(row_of(columns)) {}

  static constexpr int most = 4;
  template <int count>
  static constexpr int rows_at_once = count == 4 ? 2 : 4;

  // Write vector j.
  void set(int64_t j, const float* x, int64_t columns) const {
    int8_t* const to = data + j * stride;
    Vec<float> largest{}, differences{};
    for (int64_t k = 0; k < columns; k += 16) {
      const Vec<float> v = columns - k < 16 ? widen_first(x + k, columns - k) : load(x + k);
      const Vec<float> size = (Vec<float>)(bits_of<float>(v) & 0x7fffffffu);
      largest = size > largest ? size : largest;
      differences += v - v;  // 0, or NaN
    }
    float top = 0, nan = 0;
    for (int i = 0; i < 16; ++i) {
      top = largest[i] > top ? largest[i] : top;
      nan += differences[i];
    }
    // Some way below 2^23 - 2^15 - 2^7, from where on a fourth digit were needed.
    constexpr float limit = 127 * 65536;
    // Numbers so small are as good as 0: their products vanish beside the smallest normal one.
    const bool some = top > 1e-30f && nan == 0;
    const float inverse = some ? limit / top : 0.0f, scale = some ? top / limit : nan;
    std::memcpy(to + 3 * 64, &scale, sizeof(scale));

    int8_t* const digits = to + head;
    for (int64_t k = 0; k < row; k += 16) {
      Vec<float> v = k + 16 <= columns ? load(x + k)
                     : k < columns     ? widen_first(x + k, columns - k)
                                       : Vec<float>{};
      v = some ? v * inverse : Vec<float>{};
      const auto whole = (Vec<int32_t>)_mm512_maskz_cvtps_epi32(all_lanes, (__m512)v);
      const Vec<int32_t> rest = whole + 128, upper = (rest >> 8) + 128;
      const auto put = [&](int digit, Vec<int32_t> value) {
        const __m128i bytes = _mm512_maskz_cvtepi32_epi8(all_lanes, (__m512i)value);
        std::memcpy(digits + k / 64 * 192 + digit * 64 + k % 64, &bytes, sizeof(bytes));
      };
      put(0, whole);
      put(1, rest >> 8);
      put(2, upper >> 8);
    }
    // Weights are made unsigned by adding 128, which adds 128 times the sum of the digits: sums
    // start from as much below zero.
    for (int digit = 0; digit < 3; ++digit) {
      Vec<int32_t> sum{};
      const Bytes bias = Bytes{} + 128;
      for (int64_t k = 0; k < row; k += 64) {
        sum = add_products(sum, bias, digits + 3 * k + digit * 64);
      }
      sum = -sum;
      std::memcpy(to + digit * 64, &sum, sizeof(sum));
    }
  }

  template <int count_rows, int count_x>
  inline __attribute__((always_inline)) void times(const int8_t* rows, int64_t columns,
                                                   int64_t first, float* sums) const {
    // One array of sums, by row, vector and digit.
    constexpr int count = count_rows * count_x * 3;
    const int8_t* const x = data + first * stride;
    Vec<int32_t> sum[count];
    repeat<count>([&](auto c) {
      constexpr int j = c / 3 % count_x, digit = c % 3;
      sum[c] = read<Vec<int32_t>>(x + j * stride + digit * 64);
    });
    const auto add = [&](const Bytes(&w)[count_rows], int64_t k)
                         __attribute__((always_inline)) {
      repeat<count_x>([&](auto j) {
        const int8_t* const digits = x + j * stride + head + 3 * k;
        repeat<3 * count_rows>([&](auto c) {
          constexpr int i = c % count_rows, digit = c / count_rows;
          Vec<int32_t>& s = sum[(i * count_x + j) * 3 + digit];
          s = add_products(s, w[i], digits + digit * 64);
        });
      });
    };
    int64_t k = 0;
    for (; k + 64 <= columns; k += 64) {
      ask_ahead<count_rows>(rows + k, columns);
      Bytes w[count_rows];
      for (int i = 0; i < count_rows; ++i) w[i] = read<Bytes>(rows + i * columns + k) ^ 128;
      add(w, k);
    }
    if (k < columns) {
      Bytes w[count_rows] = {};
      for (int i = 0; i < count_rows; ++i) {
        std::memcpy(&w[i], rows + i * columns + k, columns - k);
        w[i] ^= 128;
      }
      add(w, k);
    }
    // Lanes hold whole numbers of less than 25 bits up to some 8000 columns, and above that they
    // are rounded as any float is.
    Vec<float> joined[count_rows * count_x];
    repeat<count_rows * count_x>([&](auto i) {
      const auto d0 = __builtin_convertvector(sum[3 * i], Vec<float>);
      const auto d1 = __builtin_convertvector(sum[3 * i + 1], Vec<float>);
      const auto d2 = __builtin_convertvector(sum[3 * i + 2], Vec<float>);
      joined[i] = d2 * 65536.0f + (d1 * 256.0f + d0);
    });
    sum_all<count_rows, count_x>(joined, sums);
    for (int j = 0; j < count_x; ++j) {
      float scale;
      std::memcpy(&scale, x + j * stride + 3 * 64, sizeof(scale));
      for (int i = 0; i < count_rows; ++i) sums[i * count_x + j] *= scale;
    }
  }
};

#else

MAMBAKIT_INLINE bool has_int8_products() { return false; }

#endif

}  // namespace mambakit
