// What the kernels of a step share: the call, numbers as they lie in memory, activations.
//
// -D gives: TYPE, the model's dtype, of the embedding and of what the convolutions remember;
// WEIGHT, of the matrices: float, bf16, fp16, or int8 for whole numbers with a scale for each row;
// FACTOR, of vectors that a matrix multiplies: float for matrices of floats, and else one of the
// two short types that tensor cores multiply. All sums are in float.
#pragma once
#include "_cuda.cuh"

struct int8 {
    signed char value;
};

// What changes from token to token; the kernels are launched with the same arguments every time.
struct Call {
    long long b;       // sequences
    const TYPE* conv;  // (layers, b, w - 1, d), null for sequences that begin
    const float* ssm;  // (layers, b, d, n), likewise
    TYPE* new_conv;
    float* new_ssm;
    float* logits; // (b, v)
};

constexpr float LOG2E = 1.4426950408889634f;

// How many weights sixteen bytes hold, and those weights as floats.
template <class T> struct Piece : Sixteen<T> {};
template <> struct Piece<int8> {
    static constexpr int COUNT = 16;
    // Four bytes: each is made the last digits of 2^23 + 128 + byte, so that a subtraction makes
    // it a float. The hardware's own conversion is four times slower than that.
    static METHOD void widen(unsigned int bytes, float* out) {
        unsigned int raised = bytes ^ 0x80808080u;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned int digits = byte_permute(raised, 0x4b000000u, 0x7440u + (unsigned int)i);
            out[i] = __uint_as_float(digits) - 8388736.0f;
        }
    }
    static METHOD void widen(uint4 v, float* out) {
        widen(v.x, out);
        widen(v.y, out + 4);
        widen(v.z, out + 8);
        widen(v.w, out + 12);
    }
};

// What a kernel before this one in the same token has written.
DEVICE float received(const float* p) { return load_shared_cache(p); }
DEVICE float received(const bf16* p) {
    return widen(bf16{load_shared_cache((const unsigned short*)p)});
}
DEVICE float received(const fp16* p) {
    return widen(fp16{load_shared_cache((const unsigned short*)p)});
}

DEVICE float silu(float x) { return x * reciprocal_fast(1.0f + exp2_fast(-LOG2E * x)); }
