// Vectors for the CPU kernels: one width for each instruction set, in GCC and Clang's vector
// extensions. Intrinsics appear in this file alone, where the extensions have no word.
//
// Kernels compute in a scalar S (float, or double when the input is double) and read and write
// storage types T (float, double, BFloat16, Float16). A Vec<S> has lanes<S> lanes.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define MAMBAKIT_INLINE static inline __attribute__((always_inline))

namespace mambakit {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <typename S>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(S));

template <typename E, int bytes>
struct VectorOf {
  typedef E type __attribute__((vector_size(bytes)));
};

template <typename S>
using Vec = typename VectorOf<S, vector_bytes>::type;

// The integers of the same width as S, for work on its bits.
template <typename S>
using Bits = std::conditional_t<sizeof(S) == 8, uint64_t, uint32_t>;

// Half as many bytes: one half-precision number for each lane of a Vec<float>.
using Halves = VectorOf<uint16_t, vector_bytes / 2>::type;

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The scalar that a kernel computes in when its input is stored as T.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename S>
MAMBAKIT_INLINE Vec<S> splat(S value) {
  return value - Vec<S>{};  // not 0 + value, which would lose the sign of -0
}

template <typename To, typename From>
MAMBAKIT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename S>
MAMBAKIT_INLINE Vec<Bits<S>> bits_of(Vec<S> v) {
  return (Vec<Bits<S>>)v;
}

#if defined(__AVX512F__)
// GCC's unmasked intrinsics name an uninitialised operand and warn of it; under a full mask the
// masked ones compile to the same instructions.
constexpr __mmask16 all_lanes = 0xffff;
#endif

// ---------------------------------------------------------------- half precision, by bits

MAMBAKIT_INLINE Vec<float> widen_bfloat16(Halves h) {
  return (Vec<float>)(__builtin_convertvector(h, Vec<uint32_t>) << 16);
}

// Rounds to nearest even. A NaN is not rounded, which could carry into its sign: its upper half
// is a NaN already, as arithmetic makes only quiet ones.
MAMBAKIT_INLINE Halves narrow_bfloat16(Vec<float> v) {
  const Vec<uint32_t> u = bits_of<float>(v);
  const Vec<uint32_t> up = 0x7fffu + ((u >> 16) & 1u);
  const Vec<uint32_t> rounded = u + (v == v ? up : Vec<uint32_t>{});
  return __builtin_convertvector(rounded >> 16, Halves);
}

#if defined(__AVX512F__)

MAMBAKIT_INLINE Vec<float> widen_float16(Halves h) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(all_lanes, (__m256i)h);
}
MAMBAKIT_INLINE Halves narrow_float16(Vec<float> v) {
  return (Halves)_mm512_maskz_cvtps_ph(all_lanes, (__m512)v,
                                       _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(__F16C__)

MAMBAKIT_INLINE Vec<float> widen_float16(Halves h) {
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
}
MAMBAKIT_INLINE Halves narrow_float16(Vec<float> v) {
  return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#elif defined(__aarch64__)

MAMBAKIT_INLINE Vec<float> widen_float16(Halves h) {
  return (Vec<float>)vcvt_f32_f16((float16x4_t)h);
}
MAMBAKIT_INLINE Halves narrow_float16(Vec<float> v) {
  return (Halves)vcvt_f16_f32((float32x4_t)v);
}

#else

// Subnormal halves become normal floats by a subtraction of two normal ones, which stays exact
// when the processor flushes denormals.
MAMBAKIT_INLINE Vec<float> widen_float16(Halves h) {
  Vec<uint32_t> u = __builtin_convertvector(h, Vec<uint32_t>);
  Vec<uint32_t> sign = (u & 0x8000u) << 16, body = (u & 0x7fffu) << 13;
  Vec<uint32_t> exponent = body & 0x0f800000u;
  Vec<uint32_t> normal = body + 0x38000000u;
  Vec<uint32_t> special = body + 0x70000000u;
  Vec<float> tiny = (Vec<float>)(body + 0x38800000u) - (Vec<float>)splat<uint32_t>(0x38800000u);
  Vec<uint32_t> out = exponent == 0x0f800000u ? special : normal;
  out = exponent == 0u ? bits_of<float>(tiny) : out;
  return (Vec<float>)(out | sign);
}

// Rounds to nearest even; subnormal halves are rounded by adding 0.5, whose last mantissa bit
// has the weight of the smallest half.
MAMBAKIT_INLINE Halves narrow_float16(Vec<float> v) {
  Vec<uint32_t> u = bits_of<float>(v);
  Vec<uint32_t> sign = u & 0x80000000u, body = u ^ sign;
  Vec<uint32_t> tiny = bits_of<float>((Vec<float>)body + 0.5f) - 0x3f000000u;
  Vec<uint32_t> normal = (body - 0x38000000u + 0xfffu + ((body >> 13) & 1u)) >> 13;
  Vec<uint32_t> out = body < 0x38800000u ? tiny : normal;
  out = body >= 0x477ff000u ? splat<uint32_t>(0x7c00u) : out;
  out = body > 0x7f800000u ? splat<uint32_t>(0x7e00u) : out;
  return __builtin_convertvector(out | (sign >> 16), Halves);
}

#endif

// ---------------------------------------------------------------- load and store

template <typename V, typename T>
MAMBAKIT_INLINE V read(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

MAMBAKIT_INLINE Vec<float> load(const float* p) { return read<Vec<float>>(p); }
MAMBAKIT_INLINE Vec<double> load(const double* p) { return read<Vec<double>>(p); }
MAMBAKIT_INLINE Vec<float> load(const BFloat16* p) { return widen_bfloat16(read<Halves>(p)); }
MAMBAKIT_INLINE Vec<float> load(const Float16* p) { return widen_float16(read<Halves>(p)); }

MAMBAKIT_INLINE void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof(v)); }
MAMBAKIT_INLINE void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof(v)); }
MAMBAKIT_INLINE void store(BFloat16* p, Vec<float> v) {
  const Halves h = narrow_bfloat16(v);
  std::memcpy(p, &h, sizeof(h));
}
MAMBAKIT_INLINE void store(Float16* p, Vec<float> v) {
  const Halves h = narrow_float16(v);
  std::memcpy(p, &h, sizeof(h));
}

// A store that fills a whole cache line (64 bytes, aligned) past the caches, without reading the
// line first: half the traffic for what will not be read again at once. Only where a vector of T
// is a line; elsewhere stream() is store(). Other threads see the stores after finish_streams().
template <typename T>
MAMBAKIT_INLINE void stream(T* p, Vec<Compute<T>> v) { store(p, v); }
#if defined(__AVX512F__)
template <typename T>
constexpr bool fills_line = std::is_same_v<T, float> || std::is_same_v<T, double>;
MAMBAKIT_INLINE void stream(float* p, Vec<float> v) { _mm512_stream_ps(p, (__m512)v); }
MAMBAKIT_INLINE void stream(double* p, Vec<double> v) { _mm512_stream_pd(p, (__m512d)v); }
MAMBAKIT_INLINE void finish_streams() { _mm_sfence(); }
#else
template <typename T>
constexpr bool fills_line = false;
MAMBAKIT_INLINE void finish_streams() {}
#endif

// The first `count` lanes only: what lies beyond them in memory is neither read nor written,
// and reads as zero.
template <typename T>
MAMBAKIT_INLINE Vec<Compute<T>> load_part(const T* p, int count) {
  T buffer[lanes<Compute<T>>] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}

template <typename T>
MAMBAKIT_INLINE void store_part(T* p, Vec<Compute<T>> v, int count) {
  T buffer[lanes<Compute<T>>];
  store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(T));
}

// One number.
MAMBAKIT_INLINE float to_scalar(float v) { return v; }
MAMBAKIT_INLINE double to_scalar(double v) { return v; }
MAMBAKIT_INLINE float to_scalar(BFloat16 v) { return load_part(&v, 1)[0]; }
MAMBAKIT_INLINE float to_scalar(Float16 v) { return load_part(&v, 1)[0]; }

// ---------------------------------------------------------------- functions

// The larger of v and `least`; a NaN in v stays one. Compilers make two or three instructions of
// the comparison.
MAMBAKIT_INLINE Vec<float> at_least(Vec<float> v, float least) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_max_ps(all_lanes, (__m512)splat(least), (__m512)v);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps((__m256)splat(least), (__m256)v);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_max_ps((__m128)splat(least), (__m128)v);
#else
  return splat(least) > v ? splat(least) : v;
#endif
}
MAMBAKIT_INLINE Vec<double> at_least(Vec<double> v, double least) {
  return splat(least) > v ? splat(least) : v;
}

// 2^(a b) for a b <= 127 (1023 for double), and 0 where that is below the smallest normal number
// (while denormals are flushed). 2^0 is exactly 1.
//
// States are multiplied by thousands of such numbers, most of them a little below 1. So the
// polynomials are not the closest on average: their error is weighted by 1 / (1 - 2^y), the
// number of steps for which a decay is felt.
#if defined(__AVX512DQ__)

// With y = a b + 1/2, reduce() leaves y - floor(y) and scalef() multiplies by 2^floor(y): no
// clamp is needed, and -inf gives 0. Adding 1/2 in the product costs nothing and makes floor()
// round to nearest, so that the polynomial, here in r + 1/2, is exact where a b is near 0.
MAMBAKIT_INLINE Vec<float> exp2_product(Vec<float> a, Vec<float> b) {
  const Vec<float> y = a * b + 0.5f;
  const Vec<float> r =
      (Vec<float>)_mm512_maskz_reduce_ps(all_lanes, (__m512)y, _MM_FROUND_TO_NEG_INF);
  Vec<float> p = splat(0.0013203438138589263f);
  p = p * r + 0.006367117166519165f;
  p = p * r + 0.03947390988469124f;
  p = p * r + 0.16981126368045807f;
  p = p * r + 0.490134060382843f;
  p = p * r + 0.7071067094802856f;
  return (Vec<float>)_mm512_maskz_scalef_ps(all_lanes, (__m512)p, (__m512)y);
}

#else

// Adding 1.5 * 2^23 rounds to a whole number, left in the low bits of the sum; a shift carries
// it into the exponent. At the clamp, -127, the sum of the exponents is 0: the number 0.
MAMBAKIT_INLINE Vec<float> exp2_product(Vec<float> a, Vec<float> b) {
  const float magic = 12582912.0f;
  const Vec<float> y = at_least(a * b, -127.0f);
  const Vec<float> t = y + magic;
  const Vec<float> r = y - (t - magic);
  Vec<float> p = splat(0.001320348702303442f);
  p = p * r + 0.00966800656169653f;
  p = p * r + 0.05550907552242279f;
  p = p * r + 0.24022319912910461f;
  p = p * r + 0.6931468844413757f;
  p = p * r + 1.0f;
  return (Vec<float>)(bits_of<float>(p) + (bits_of<float>(t) << 23));
}

#endif

// The Taylor series of 2^r to degree 13 is exact to the last bit or two for |r| <= 1/2.
MAMBAKIT_INLINE Vec<double> exp2_product(Vec<double> a, Vec<double> b) {
  const double magic = 6755399441055744.0;
  const Vec<double> y = at_least(a * b, -1023.0);
  const Vec<double> t = y + magic;
  const Vec<double> z = (y - (t - magic)) * 0.693147180559945309417;
  Vec<double> p = splat(1.0 / 6227020800);
  p = p * z + 1.0 / 479001600;
  p = p * z + 1.0 / 39916800;
  p = p * z + 1.0 / 3628800;
  p = p * z + 1.0 / 362880;
  p = p * z + 1.0 / 40320;
  p = p * z + 1.0 / 5040;
  p = p * z + 1.0 / 720;
  p = p * z + 1.0 / 120;
  p = p * z + 1.0 / 24;
  p = p * z + 1.0 / 6;
  p = p * z + 0.5;
  p = p * z + 1.0;
  p = p * z + 1.0;
  return (Vec<double>)(bits_of<double>(p) + (bits_of<double>(t) << 52));
}

// 1 / v for positive, finite v. A division holds its port for 16 cycles a 512-bit vector, so
// there an estimate and one Newton step do instead.
MAMBAKIT_INLINE Vec<float> reciprocal(Vec<float> v) {
#if defined(__AVX512F__)
  const Vec<float> r = (Vec<float>)_mm512_maskz_rcp14_ps(all_lanes, (__m512)v);
  return r * (2.0f - v * r);
#else
  return 1.0f / v;
#endif
}
MAMBAKIT_INLINE Vec<double> reciprocal(Vec<double> v) { return 1.0 / v; }

// 1 / (1 + exp(-v)), 0 where that is below the smallest normal number (while denormals are
// flushed): v stops where exp(-v) is still finite and its reciprocal is a denormal.
template <typename S>
MAMBAKIT_INLINE Vec<S> sigmoid(Vec<S> v) {
  const S log2e = S(1.44269504088896340736);
  const S least = sizeof(S) == 8 ? S(-709.0) : S(-88.0);
  return reciprocal(S(1) + exp2_product(at_least(v, least), splat(-log2e)));
}

// ---------------------------------------------------------------- denormals

// Treats denormals as zero while it lives: one operation on them costs a hundred others.
class FlushDenormals {
 public:
#if defined(__x86_64__) || defined(_M_X64)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t{1} << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#else
  FlushDenormals() {}
#endif
};

}  // namespace mambakit
