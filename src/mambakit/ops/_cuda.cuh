// What the kernels take from CUDA, under names of our own.
//
// A kernel includes this header first and uses nothing else of CUDA but threadIdx, blockIdx,
// blockDim, gridDim, __shared__, __syncthreads, __syncwarp, the vector types, fmaf, min, max and the
// C functions of <math.h>. tests/emulator has a header of the same name that gives the same
// things their meaning on a processor, so that the kernels' own sources run where there is no GPU.
//
// Every kernel is KERNEL(threads, blocks) name(const __grid_constant__ Arguments a): one struct
// by value, mirrored field by field in Python: 8-byte pointers, long long sizes and strides.
#pragma once

#define DEVICE static __device__ __forceinline__
// For member functions.
#define METHOD __device__ __forceinline__
// At most `threads` a block; registers few enough for `blocks` of them on a multiprocessor.
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
// The launch's shared memory, as bytes; at most once in a kernel.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// The same number. What the compiler makes of it it makes after this place, not before a loop
// around it, where it would take registers all the way.
DEVICE int made_here(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The same address in shared memory, likewise. It takes one register, and what lies a constant away
// from it takes none.
template <class T> DEVICE T* made_here(T* shared) {
    unsigned int at = static_cast<unsigned int>(__cvta_generic_to_shared(shared));
    asm volatile("" : "+r"(at));
    return (T*)__cvta_shared_to_generic(at);
}

// A barrier for some warps of a block, of `threads` threads in all; the others take no part. All
// such barriers of a kernel are between the same warps.
DEVICE void barrier_of(int threads) { asm volatile("bar.sync 1, %0;" : : "r"(threads) : "memory"); }

// Registers of each thread from here on, for all of four neighbouring warps; of sm_90a alone.
template <int COUNT> DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(COUNT));
}
template <int COUNT> DEVICE void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(COUNT));
}

// All 32 lanes of the warp must call these together.
template <class T> DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
// From `distance` lanes below; the lowest lanes keep their own.
template <class T> DEVICE T shuffle_up(T value, int distance) {
    return __shfl_up_sync(0xffffffffu, value, distance);
}
template <class T> DEVICE T shuffle_down(T value, int distance) {
    return __shfl_down_sync(0xffffffffu, value, distance);
}
template <class T> DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

// condition ? a : b as one instruction. Where shuffles follow, a compiler left to itself may
// branch instead, and a shuffle in a branch is slow.
DEVICE float select(bool condition, float a, float b) {
    float y;
    asm("{ .reg .pred p; setp.ne.s32 p, %3, 0; selp.f32 %0, %1, %2, p; }"
        : "=f"(y)
        : "f"(a), "f"(b), "r"((int)condition));
    return y;
}
DEVICE double select(bool condition, double a, double b) { return condition ? a : b; }

// One instruction each, to about 2^-22 of the value, denormals flushed to zero.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// To about 2^-11 of the value only.
DEVICE float tanh_fast(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two 16-bit numbers in one word, the first in the low half; rounded to nearest even.
DEVICE unsigned int pack_bf16(float low, float high) {
    unsigned int y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
DEVICE unsigned int pack_fp16(float low, float high) {
    unsigned int y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
DEVICE float fp16_to_float(unsigned short bits) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
}

// Sixteen bytes from global to shared memory, past the registers; both addresses must be
// multiples of 16. If not `valid`, zeros arrive and `global` is not read.
DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
    unsigned int to = static_cast<unsigned int>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(to), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
// The same for BYTES = 4, 8 or a multiple of 16; both addresses must be multiples of that, or of
// 16 if it is more.
template <int BYTES> DEVICE void copy_async(void* shared, const void* global, bool valid) {
    if constexpr (BYTES >= 16) {
#pragma unroll
        for (int i = 0; i < BYTES; i += 16)
            copy_async_16((char*)shared + i, (const char*)global + i, valid);
    } else {
        unsigned int to = static_cast<unsigned int>(__cvta_generic_to_shared(shared));
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :
                     : "r"(to), "l"(global), "n"(BYTES), "r"(valid ? BYTES : 0)
                     : "memory");
    }
}
// Close this thread's group of copies.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most the PENDING groups closed last are still on their way. A barrier must
// follow before other threads read what this one copied.
template <int PENDING> DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

// Hand over to a later block what this warp's lanes wrote to global memory before: publish() sets
// a flag that was 0, await() returns once it is set, and the lanes of its warp may read from then
// on. Both are for whole warps. Blocks start in the order of their indices, so that a block may
// wait for one of a lower index, and for no other.
DEVICE void publish(int* flag) {
    __syncwarp();
    __threadfence();
    if (threadIdx.x % 32 == 0)
        asm volatile("st.release.gpu.global.s32 [%0], 1;" : : "l"(flag) : "memory");
}
DEVICE void await(const int* flag) {
    int set;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(set) : "l"(flag) : "memory");
    } while (!set);
    __syncwarp();
}

// Four bytes out of the eight of low and high; each half-byte of `order` names one, the first that
// of the lowest.
DEVICE unsigned int byte_permute(unsigned int low, unsigned int high, unsigned int order) {
    return __byte_perm(low, high, order);
}

// Ask for the 128 bytes around an address to be brought into the GPU's own cache.
DEVICE void prefetch(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" : : "l"(global));
}

// Read from the cache that all multiprocessors share, past a multiprocessor's own, which need not
// know yet what another kernel has just written: for 2, 4 or 16 bytes. Such reads stay behind
// await_kernels() and barriers, and may pass this thread's own writes, which they must not need.
DEVICE float load_shared_cache(const float* global) {
    float y;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(y) : "l"(global));
    return y;
}
DEVICE unsigned short load_shared_cache(const unsigned short* global) {
    unsigned short y;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(y) : "l"(global));
    return y;
}
DEVICE uint4 load_shared_cache(const uint4* global) {
    uint4 y;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(y.x), "=r"(y.y), "=r"(y.z), "=r"(y.w)
                 : "l"(global));
    return y;
}

// The same address, of which the compiler now knows that it is in global memory, as it knows of those
// that are a kernel's arguments.
template <class T> DEVICE T* in_global(T* address) {
    __builtin_assume(__isGlobal(address));
    return address;
}

// A kernel that was launched to overlap the one before it may start before that one has ended.
// await_kernels() returns when all earlier kernels have ended and what they wrote is there; every
// thread of such a kernel calls it, and reads before it only what no kernel near it writes. In
// other kernels it does nothing. release_kernels() lets the next kernel start, if that was
// launched so, when all blocks have called it or ended.
DEVICE void await_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void release_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#include "_scalars.cuh"

// c += a b on the tensor cores, by a warp together: c (16, 8) in float, a (16, 16) and b (16, 8) of
// 16-bit numbers, two to a word. Lane 4 g + t has
//   a: rows g, g + 8, g, g + 8; columns 2 t, 2 t + 1 in the first two words, 8 more in the others
//   b: column g; rows 2 t, 2 t + 1 in the first word, 8 more in the second
//   c: columns 2 t, 2 t + 1 of row g, then those of row g + 8.
DEVICE void multiply_tiles(float* c, const unsigned int* a, unsigned int b0, unsigned int b1, bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)
    );
}
DEVICE void multiply_tiles(float* c, const unsigned int* a, unsigned int b0, unsigned int b1, fp16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)
    );
}
