// A matrix times a few vectors, at the speed at which memory gives the matrix.
//
// Rows of the matrix lie one after another as in the model's own parameters: lanes run along a
// row, and each row's sum is folded at its end. Every product is summed in the same order
// whatever the number of vectors: a vector's result does not depend on its neighbours.

#pragma once

#include <cstdint>
#include <utility>

#include "../../ops/_simd.h"

namespace mambakit {

// Rows (rows, columns) of weights, each times its scale where there are scales.
template <typename T>
struct Matrix {
  const T* weights;
  const float* scales;
  int64_t rows, columns;
};

constexpr int cache_line = 64;

// Lines are asked for this far ahead of their use: memory takes as long to answer as a core
// takes to compute with some kilobytes. Measured: 4 KB are too few, 8 and 16 KB hardly differ.
constexpr int64_t prefetch_distance = 16384;

// Weights as floats. The extensions have words for this too, of which compilers make several
// instructions where one would do; so with intrinsics.
template <typename T>
MAMBAKIT_INLINE Vec<float> widen(const T* p) {
  return load(p);
}

#if defined(__AVX512F__)
MAMBAKIT_INLINE Vec<float> widen(const BFloat16* p) {
  const __m256i bits = (__m256i)read<Halves>(p);
  return (Vec<float>)((Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(all_lanes, bits) << 16);
}
#endif

MAMBAKIT_INLINE Vec<float> widen(const int8_t* p) {
  const auto bytes = read<VectorOf<int8_t, lanes<float>>::type>(p);
#if defined(__AVX512F__)
  const auto whole = (Vec<int32_t>)_mm512_maskz_cvtepi8_epi32(all_lanes, (__m128i)bytes);
#elif defined(__AVX2__)
  const auto whole =
      (Vec<int32_t>)_mm256_cvtepi8_epi32(_mm_set_epi64x(0, bit_cast<int64_t>(bytes)));
#elif defined(__SSE4_1__)
  const auto whole =
      (Vec<int32_t>)_mm_cvtepi8_epi32(_mm_cvtsi32_si128(bit_cast<int32_t>(bytes)));
#elif defined(__aarch64__)
  const int8x8_t low = vreinterpret_s8_s32(vdup_n_s32(bit_cast<int32_t>(bytes)));
  const auto whole = (Vec<int32_t>)vmovl_s16(vget_low_s16(vmovl_s8(low)));
#else
  const auto whole = __builtin_convertvector(bytes, Vec<int32_t>);
#endif
  return __builtin_convertvector(whole, Vec<float>);
}

// The first `count` of them; the other lanes are zero.
template <typename T>
MAMBAKIT_INLINE Vec<float> widen_first(const T* p, int64_t count) {
  T buffer[lanes<float>] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return widen(buffer);
}

// sum + a b, rounded once if the processor can. Left to compilers the sum is fused in some of the
// forms that a loop is compiled in and not in others (GCC 13 does so where it expects a chain of
// sums to wait), and what a vector gives would depend on how many are multiplied beside it.
MAMBAKIT_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> sum) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
  return (Vec<float>)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
  return sum + a * b;
#endif
}

// ---------------------------------------------------------------- sums over lanes

// Which lane of the pair (a, b) lane `lane` of the other summand comes from: its partner in a
// block of 2 half lanes, out of a for the lower half of the block and out of b for the upper.
template <int half>
constexpr int partner(int lane) {
  return lane % (2 * half) < half ? lane + half : lanes<float> + lane - half;
}

template <int half>
constexpr int own(int lane) {
  return lane % (2 * half) < half ? lane : lanes<float> + lane;
}

template <int half, int... lane>
MAMBAKIT_INLINE Vec<float> fold_pair(Vec<float> a, Vec<float> b,
                                     std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, own<half>(lane)...) +
         __builtin_shufflevector(a, b, partner<half>(lane)...);
#else
  return __builtin_shuffle(a, b, Vec<int32_t>{own<half>(lane)...}) +
         __builtin_shuffle(a, b, Vec<int32_t>{partner<half>(lane)...});
#endif
}

template <int half, int count>
MAMBAKIT_INLINE void fold(Vec<float>* v) {
  constexpr int left = count > 1 ? count / 2 : 1;
  for (int i = 0; i < left; ++i) {
    v[i] = fold_pair<half>(v[i], v[count > 1 ? i + left : i],
                           std::make_integer_sequence<int, lanes<float>>{});
  }
  if constexpr (half > 1) fold<half / 2, left>(v);
}

// Write the sum of the lanes of each of `count` vectors, a power of 2, which are used up.
template <int count>
MAMBAKIT_INLINE void sum_lanes(Vec<float>* v, float* sums) {
  if constexpr (count > lanes<float>) {
    sum_lanes<count / 2>(v, sums);
    sum_lanes<count / 2>(v + count / 2, sums + count / 2);
  } else {
    fold<lanes<float> / 2, count>(v);
    // Sum i lies in lane i lanes / count, and in those up to the next sum's.
    for (int i = 0; i < count; ++i) sums[i] = v[0][i * (lanes<float> / count)];
  }
}

// Write the sums of all count_rows count_x vectors.
template <int count_rows, int count_x>
MAMBAKIT_INLINE void sum_all(Vec<float>* v, float* sums) {
  constexpr int together = count_rows % 2 == 0 ? count_rows * count_x : count_x;
  for (int i = 0; i < count_rows * count_x; i += together) sum_lanes<together>(v + i, sums + i);
}

// Ask for what lies prefetch_distance behind a line of each row.
template <int count_rows, typename T>
MAMBAKIT_INLINE void ask_ahead(const T* line, int64_t columns) {
  for (int i = 0; i < count_rows; ++i) {
    __builtin_prefetch(reinterpret_cast<const char*>(line + i * columns) + prefetch_distance);
  }
}

// ---------------------------------------------------------------- products

// The vectors that a matrix is multiplied by, `stride` floats apart.
struct FloatVectors {
  const float* data;
  int64_t stride;

  // More than that do not fit the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr int most = 8;
#else
  static constexpr int most = 4;
#endif

  // How many rows `count` vectors are multiplied by at once: as many sums as there are registers
  // for, or as it takes to keep the multipliers busy.
  template <int count>
  static constexpr int rows_at_once = count == 8 ? 3 : vector_bytes == 32 && count == 4 ? 2 : 4;

  // sums[i count_x + j] = row i times vector first + j, for `count_rows` neighbouring rows.
  template <int count_rows, int count_x, typename T>
  inline __attribute__((always_inline)) void times(const T* rows, int64_t columns, int64_t first, float* sums) const {
    constexpr int width = lanes<float>;
    constexpr int64_t line = cache_line / static_cast<int>(sizeof(T));
    const float* x = data + first * stride;
    Vec<float> sum[count_rows * count_x] = {};

    int64_t k = 0;
    for (; k + line <= columns; k += line) {
      ask_ahead<count_rows>(rows + k, columns);
#pragma GCC unroll 16
      for (int64_t step = 0; step < line; step += width) {
        Vec<float> w[count_rows];
        for (int i = 0; i < count_rows; ++i) w[i] = widen(rows + i * columns + k + step);
        for (int j = 0; j < count_x; ++j) {
          const Vec<float> v = load(x + j * stride + k + step);
          for (int i = 0; i < count_rows; ++i) {
            sum[i * count_x + j] = multiply_add(w[i], v, sum[i * count_x + j]);
          }
        }
      }
    }
    for (; k < columns; k += width) {
      const int64_t count = columns - k < width ? columns - k : width;
      Vec<float> w[count_rows];
      for (int i = 0; i < count_rows; ++i) w[i] = widen_first(rows + i * columns + k, count);
      for (int j = 0; j < count_x; ++j) {
        const Vec<float> v = widen_first(x + j * stride + k, count);
        for (int i = 0; i < count_rows; ++i) {
          sum[i * count_x + j] = multiply_add(w[i], v, sum[i * count_x + j]);
        }
      }
    }
    sum_all<count_rows, count_x>(sum, sums);
  }
};

// The product, rounded. Fused with a later addition it would be another number, and compilers
// fuse in some of the places that this is inlined in, and not in others.
MAMBAKIT_INLINE float scaled(float sum, float scale) {
  float product = sum * scale;
#if defined(__x86_64__)
  asm("" : "+x"(product));
#elif defined(__aarch64__)
  asm("" : "+w"(product));
#else
  asm("" : "+m"(product));
#endif
  return product;
}

// Rows [begin, end) times the vectors [first, first + count_x).
template <int count_x, typename T, typename Vectors, typename Out>
MAMBAKIT_INLINE void multiply_group(const Matrix<T>& matrix, int64_t begin, int64_t end,
                                    const Vectors& x, int64_t first, const Out& out) {
  constexpr int most = Vectors::template rows_at_once<count_x>;
  const auto put = [&](int64_t row, int count, const float* sums) {
    for (int i = 0; i < count; ++i) {
      const float scale = matrix.scales ? matrix.scales[row + i] : 1.0f;
      for (int j = 0; j < count_x; ++j) {
        out(first + j, row + i, scaled(sums[i * count_x + j], scale));
      }
    }
  };
  float sums[most * count_x];
  int64_t row = begin;
  for (; row + most <= end; row += most) {
    x.template times<most, count_x>(matrix.weights + row * matrix.columns, matrix.columns, first,
                                    sums);
    put(row, most, sums);
  }
  for (; row < end; ++row) {
    x.template times<1, count_x>(matrix.weights + row * matrix.columns, matrix.columns, first,
                                 sums);
    put(row, 1, sums);
  }
}

// out(j, row, matrix[row] . x_j) for each row in [begin, end) and each of `b` vectors.
template <typename T, typename Vectors, typename Out>
void multiply(const Matrix<T>& matrix, int64_t begin, int64_t end, const Vectors& x, int64_t b,
              const Out& out) {
  constexpr int64_t group = 12;  // rows that stay in the cache for all vectors
  for (int64_t row = begin; row < end; row += group) {
    const int64_t last = row + group < end ? row + group : end;
    int64_t j = 0;
    if constexpr (Vectors::most == 8) {
      for (; j + 8 <= b; j += 8) multiply_group<8>(matrix, row, last, x, j, out);
    }
    for (; j + 4 <= b; j += 4) multiply_group<4>(matrix, row, last, x, j, out);
    if (j + 2 <= b) {
      multiply_group<2>(matrix, row, last, x, j, out);
      j += 2;
    }
    if (j < b) multiply_group<1>(matrix, row, last, x, j, out);
  }
}

}  // namespace mambakit
