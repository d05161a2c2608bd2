// The stream of vectors through the layers: embedding, sums of what the layers add, RMSNorm.
//
//     x = embedding[token]         begin
//     x = x + sums + bias          add
//     h = gain x / rms(x)          both
//
// A block has one sequence, a thread every THREADS-th number of it, in registers. There is little
// to read and nothing to overlap it with, so all reads are on their way before the first is used.
// -D gives what common.cuh says; WIDTH, the width of the stream; THREADS, whole warps; SPANS, in
// how many parts the sums come.
#include "common.cuh"

constexpr int WARPS = THREADS / 32;
constexpr int EACH = (WIDTH + THREADS - 1) / THREADS; // numbers of a thread
constexpr bool EARLY = EACH <= 8;                     // registers hold the gain beside them

DEVICE int index_of(int k) { return k * THREADS + (int)threadIdx.x; }
DEVICE bool is_there(int k) { return WIDTH % THREADS == 0 || index_of(k) < WIDTH; }

struct Norm {
    float* x;          // (capacity, m)
    const float* gain; // (m)
    double eps;
    FACTOR* h; // (capacity, columns): m numbers in each row, and zeros that stay
    long long columns;
};

struct Gain {
    float value[EACH];

    METHOD void load(const Norm& n) {
#pragma unroll
        for (int k = 0; k < EACH; k++) value[k] = is_there(k) ? n.gain[index_of(k)] : 0;
    }
};

// Write x and h; numbers beyond the width are zero.
DEVICE void normalise(const Norm& n, long long row, const float* v, Gain& gain) {
    __shared__ float parts[WARPS];
    float squares = 0;
#pragma unroll
    for (int k = 0; k < EACH; k++) squares = fmaf(v[k], v[k], squares);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) squares += shuffle_xor(squares, mask);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
    if (!EARLY) gain.load(n);
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += parts[i];
    const float inverse = 1.0f / sqrtf(sum / WIDTH + (float)n.eps);
    FACTOR* h = n.h + row * n.columns;
    float* x = n.x + row * WIDTH;
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        if (!is_there(k)) continue;
        h[index_of(k)] = narrow<FACTOR>(v[k] * inverse * gain.value[k]);
        x[index_of(k)] = v[k];
    }
}

struct BeginArguments {
    Call call;
    Call* to; // where the kernels after this one look the call up
    const void* tokens;
    long long wide; // 1: tokens have 8 bytes, 0: 4
    const TYPE* embedding;
    long long vocabulary;
    Norm norm;
};

// A token that the vocabulary does not have makes its own row's numbers NaN.
KERNEL(THREADS, 1) begin(const __grid_constant__ BeginArguments a) {
    const long long row = blockIdx.x;
    Gain gain;
    if (EARLY) gain.load(a.norm);
    const long long token =
        a.wide ? ((const long long*)a.tokens)[row] : (long long)((const int*)a.tokens)[row];
    const bool known = token >= 0 && token < a.vocabulary;
    const TYPE* from = a.embedding + (known ? token : 0) * WIDTH;
    float v[EACH];
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        v[k] = is_there(k) ? widen(from[index_of(k)]) : 0;
        if (!known) v[k] = __uint_as_float(0x7fffffffu);
    }
    if (row == 0 && threadIdx.x == 0) *a.to = a.call;
    normalise(a.norm, row, v, gain);
}

struct AddArguments {
    const Call* call;
    const float* sums; // (SPANS, capacity, m)
    long long capacity;
    const float* bias; // (m), or null
    Norm norm;
};

KERNEL(THREADS, 1) add(const __grid_constant__ AddArguments a) {
    const long long row = blockIdx.x;
    Gain gain;
    if (EARLY) gain.load(a.norm);
    float v[EACH];
#pragma unroll
    for (int k = 0; k < EACH; k++) v[k] = is_there(k) && a.bias ? a.bias[index_of(k)] : 0;
    release_kernels();
    await_kernels();
    if (row >= a.call->b) return;
    const float* x = a.norm.x + row * WIDTH;
#pragma unroll
    for (int k = 0; k < EACH; k++) v[k] += is_there(k) ? received(x + index_of(k)) : 0;
#pragma unroll
    for (int s = 0; s < SPANS; s++) {
        const float* sums = a.sums + (s * a.capacity + row) * WIDTH;
#pragma unroll
        for (int k = 0; k < EACH; k++) v[k] += is_there(k) ? received(sums + index_of(k)) : 0;
    }
    normalise(a.norm, row, v, gain);
}
