// The header src/mambakit/ops/_cuda.cuh, on a processor: the same names with the same meaning.
//
// The threads of a block are fibers that take turns; a barrier or a shuffle ends a turn. Where
// hardware leaves open what happens, this header takes the worst that may: shared memory starts
// as NaN, what copy_async brings is NaN until it has been waited for, lanes take turns in a
// shifting order, and fast functions are as coarse as the instructions that they stand for.
#pragma once
#include <math.h>
#include <string.h>

#include <algorithm>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ __attribute__((section("emulated_shared"))) static
#define DEVICE static inline
#define METHOD __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" void
#define DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared

struct dim3 {
    unsigned int x, y, z;
};
struct uint2 {
    unsigned int x, y;
} __align__(8);
struct uint4 {
    unsigned int x, y, z, w;
} __align__(16);
struct float2 {
    float x, y;
} __align__(8);
struct float4 {
    float x, y, z, w;
} __align__(16);
struct double2 {
    double x, y;
} __align__(16);
static inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
static inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) {
    return {x, y, z, w};
}
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }

namespace emulator {

enum Turn { RUNS, WARP_BARRIER, SHUFFLE, PART_BARRIER, BLOCK_BARRIER, DONE };

struct Copy {
    void* to;
    unsigned char bytes[16];
    int size;
    long group;
};

struct Thread {
    Turn turn;
    int parity;  // which of the warp's two sets of slots the next shuffle uses
    long groups; // of asynchronous copies that were closed
    std::vector<Copy> copies;
};

extern Thread* current;
extern unsigned char (*slots)[2][32][16]; // what the lanes of each warp hand to each other
extern unsigned char* dynamic_shared;
void wait(Turn); // until all threads that share the barrier have come to it
void fail(const char* sentence);
const char* run(
    void (*kernel)(const void*), const unsigned int* grid, unsigned int threads,
    const void* arguments, size_t shared_bytes
);
extern unsigned int part; // how many threads the PART_BARRIER waits for

} // namespace emulator

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

static inline void __syncthreads() { emulator::wait(emulator::BLOCK_BARRIER); }
template <class T> static inline T made_here(T x) { return x; }
template <int COUNT> static inline void take_registers() {}
template <int COUNT> static inline void leave_registers() {}
static inline void barrier_of(int threads) {
    emulator::part = (unsigned int)threads;
    emulator::wait(emulator::PART_BARRIER);
}
static inline void __syncwarp() { emulator::wait(emulator::WARP_BARRIER); }
// Blocks run one after another here, so what a block waits for has to be there.
static inline void publish(int* flag) {
    __syncwarp();
    *flag = 1;
}
static inline void await(const int* flag) {
    __syncwarp();
    if (!*flag) emulator::fail("a block waits for one that comes after it");
}

template <class T> static inline T exchange(T value, int from) {
    static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes");
    int lane = (int)threadIdx.x % 32;
    auto& set = emulator::slots[threadIdx.x / 32][emulator::current->parity ^= 1];
    memcpy(set[lane], &value, sizeof(T));
    emulator::wait(emulator::SHUFFLE);
    memcpy(&value, set[from], sizeof(T));
    return value;
}
template <class T> static inline T shuffle_xor(T value, int mask) {
    return exchange(value, ((int)threadIdx.x % 32) ^ mask);
}
template <class T> static inline T shuffle_up(T value, int distance) {
    int lane = (int)threadIdx.x % 32;
    return exchange(value, lane < distance ? lane : lane - distance);
}
template <class T> static inline T shuffle_down(T value, int distance) {
    int lane = (int)threadIdx.x % 32;
    return exchange(value, lane + distance > 31 ? lane : lane + distance);
}
template <class T> static inline T shuffle(T value, int lane) { return exchange(value, lane & 31); }

static inline float select(bool condition, float a, float b) { return condition ? a : b; }
static inline double select(bool condition, double a, double b) { return condition ? a : b; }

template <class To, class From> static inline To same_bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To y;
    memcpy(&y, &x, sizeof(To));
    return y;
}
static inline float __uint_as_float(unsigned int x) { return same_bits<float>(x); }
static inline unsigned int __float_as_uint(float x) { return same_bits<unsigned int>(x); }
static inline double __longlong_as_double(long long x) { return same_bits<double>(x); }
static inline long long __double_as_longlong(double x) { return same_bits<long long>(x); }

template <class A, class B> static inline auto min(A a, B b) -> decltype(a + b) {
    return b < a ? b : a;
}
template <class A, class B> static inline auto max(A a, B b) -> decltype(a + b) {
    return a < b ? b : a;
}
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }

// Keep `bits` of the fraction, and no denormals.
static inline float coarse(float x, int bits) {
    if (!isfinite(x)) return x;
    if (fabsf(x) < 1.17549435e-38f) return copysignf(0.0f, x);
    unsigned int unit = 1u << (23 - bits);
    return __uint_as_float((__float_as_uint(x) + unit / 2) & ~(unit - 1));
}
static inline float exp2_fast(float x) { return coarse(exp2f(x), 22); }
static inline float log2_fast(float x) { return coarse(log2f(x), 22); }
static inline float reciprocal_fast(float x) { return coarse(1.0f / coarse(x, 23), 22); }
static inline float tanh_fast(float x) { return coarse(tanhf(x), 10); }

static inline unsigned int bf16_bits(float x) {
    unsigned int u = __float_as_uint(x);
    if (x != x) return 0x7fffu;
    return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}
static inline unsigned int fp16_bits(float x) {
    unsigned int sign = (__float_as_uint(x) >> 16) & 0x8000u;
    float a = fabsf(x);
    if (x != x) return 0x7fffu;
    if (a >= 65520.0f) return sign | 0x7c00u;
    // below the smallest normal number the unit is 2^-24; above, the fraction keeps ten bits
    if (a < 6.103515625e-5f) return sign | (unsigned int)nearbyintf(a * 16777216.0f);
    unsigned int u = __float_as_uint(a);
    return sign | ((u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13);
}
static inline unsigned int pack_bf16(float low, float high) {
    return bf16_bits(low) | bf16_bits(high) << 16;
}
static inline unsigned int pack_fp16(float low, float high) {
    return fp16_bits(low) | fp16_bits(high) << 16;
}
static inline float fp16_to_float(unsigned short bits) {
    unsigned int exponent = (bits >> 10) & 31u, fraction = bits & 0x3ffu;
    float a = exponent == 31 ? (fraction ? NAN : INFINITY)
            : exponent == 0  ? (float)fraction * 5.9604644775390625e-8f
                             : __uint_as_float(((exponent + 112u) << 23) | (fraction << 13));
    return bits & 0x8000u ? -a : a;
}

template <int BYTES> static inline void copy_async(void* shared, const void* global, bool valid) {
    constexpr int UNIT = BYTES < 16 ? BYTES : 16;
    if ((size_t)shared % UNIT || (valid && (size_t)global % UNIT))
        emulator::fail("copy_async: an address is no multiple of the size");
    emulator::Thread& t = *emulator::current;
    for (int i = 0; i < BYTES; i += UNIT) {
        emulator::Copy copy{(char*)shared + i, {}, UNIT, t.groups};
        if (valid) memcpy(copy.bytes, (const char*)global + i, UNIT);
        memset(copy.to, 0xff, UNIT);
        t.copies.push_back(copy);
    }
}
static inline void copy_async_16(void* shared, const void* global, bool valid) {
    copy_async<16>(shared, global, valid);
}
static inline void copy_async_commit() { emulator::current->groups++; }
template <int PENDING> static inline void copy_async_wait() {
    emulator::Thread& t = *emulator::current;
    auto arrived = [&](const emulator::Copy& c) { return c.group < t.groups - PENDING; };
    for (const auto& c : t.copies)
        if (arrived(c)) memcpy(c.to, c.bytes, c.size);
    t.copies.erase(std::remove_if(t.copies.begin(), t.copies.end(), arrived), t.copies.end());
}

static inline unsigned int byte_permute(unsigned int low, unsigned int high, unsigned int order) {
    unsigned long long all = (unsigned long long)high << 32 | low;
    unsigned int y = 0;
    for (int i = 0; i < 4; i++) y |= (unsigned int)(all >> 8 * (order >> 4 * i & 7) & 255) << 8 * i;
    return y;
}
static inline void prefetch(const void*) {}
template <class T> static inline T* in_global(T* address) { return address; }
template <class T> static inline T load_shared_cache(const T* global) { return *global; }
// One kernel runs after another here.
static inline void await_kernels() {}
static inline void release_kernels() {}

#include "_scalars.cuh"

template <class T>
static inline void multiply_tiles(
    float* c, const unsigned int* a, unsigned int b0, unsigned int b1, T
) {
    struct A {
        unsigned int word[4];
    } mine = {{a[0], a[1], a[2], a[3]}};
    struct B {
        unsigned int word[2];
    } other = {{b0, b1}};
    int g = (int)threadIdx.x % 32 / 4, t = (int)threadIdx.x % 4;
    float row[2][16], column[2][16];
    for (int from = 0; from < 4; from++) {
        A theirs = exchange(mine, 4 * g + from);
        for (int i = 0; i < 4; i++) {
            float* at = row[i % 2] + 2 * from + 8 * (i / 2);
            unpack(theirs.word[i], T{}, at[0], at[1]);
        }
        for (int j = 0; j < 2; j++) {
            B part = exchange(other, 4 * (2 * t + j) + from);
            for (int i = 0; i < 2; i++) {
                float* at = column[j] + 2 * from + 8 * i;
                unpack(part.word[i], T{}, at[0], at[1]);
            }
        }
    }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++)
            for (int k = 0; k < 16; k++) c[2 * i + j] += row[i][k] * column[j][k];
}
