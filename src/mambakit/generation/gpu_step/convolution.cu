// A step of the convolution, of many sequences whose in_proj is there already.
//
//     u = silu(sum over k of taps[k] window[k] + bias)
//
// The window is what the convolution remembers and the new number, which joins it. A thread has
// EACH neighbouring channels of one sequence, in pieces of 16 bytes; all that depends on no kernel
// of this token is asked for before the block waits for those. Channels are a multiple of EACH.
// Sequences are along x, of which alone a grid may have any number.
//
// -D gives what common.cuh says, of short FACTOR; WINDOW, the numbers in a window.
#include "common.cuh"

constexpr int THREADS = 128;
constexpr int EACH = Sixteen<FACTOR>::COUNT;
constexpr int PAST = WINDOW - 1;

struct Arguments {
    const Call* call;
    const FACTOR* projected; // (capacity, width): the channels first
    long long width;
    const float* bias;     // of in_proj, (width), or null
    const float* taps;     // (WINDOW, channels)
    const float* tap_bias; // (channels), or null
    FACTOR* u;             // (capacity, u_columns)
    long long u_columns, channels, layer;
};

// The numbers of a thread, from memory and to it.
template <class T> struct Pieces {
    static constexpr int COUNT = EACH / Sixteen<T>::COUNT;
    uint4 piece[COUNT];

    METHOD static Pieces load(const T* from) {
        Pieces all;
#pragma unroll
        for (int i = 0; i < COUNT; i++) all.piece[i] = ((const uint4*)from)[i];
        return all;
    }
    METHOD static Pieces zeros() {
        Pieces all;
#pragma unroll
        for (int i = 0; i < COUNT; i++) all.piece[i] = make_uint4(0, 0, 0, 0);
        return all;
    }
    METHOD static Pieces narrow(const float* wide) {
        Pieces all;
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            all.piece[i] = Sixteen<T>::narrow(wide + i * Sixteen<T>::COUNT);
        return all;
    }
    METHOD void widen(float* wide) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            Sixteen<T>::widen(piece[i], wide + i * Sixteen<T>::COUNT);
    }
    METHOD void store(T* to) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) ((uint4*)to)[i] = piece[i];
    }
};

DEVICE void add_all(float* to, const float* from) {
    float with[EACH];
    Pieces<float>::load(from).widen(with);
#pragma unroll
    for (int i = 0; i < EACH; i++) to[i] += with[i];
}

KERNEL(THREADS, 4) convolve(const __grid_constant__ Arguments a) {
    const long long c = ((long long)blockIdx.y * THREADS + threadIdx.x) * EACH;
    const long long row = blockIdx.x, b = a.call->b;
    const bool there = c < a.channels && row < b;
    const long long window = (a.layer * b + row) * PAST * a.channels + c;
    const TYPE* old_window = in_global(a.call->conv);
    TYPE* new_window = in_global(a.call->new_conv);

    Pieces<TYPE> past[PAST + 1];
    float y[EACH] = {}, bias[EACH] = {}, taps[WINDOW][EACH];
    if (there) {
#pragma unroll
        for (int k = 0; k < PAST; k++)
            past[k] = old_window ? Pieces<TYPE>::load(old_window + window + k * a.channels)
                                 : Pieces<TYPE>::zeros();
#pragma unroll
        for (int k = 0; k < WINDOW; k++)
            Pieces<float>::load(a.taps + k * a.channels + c).widen(taps[k]);
        if (a.tap_bias) add_all(y, a.tap_bias + c);
        if (a.bias) add_all(bias, a.bias + c);
    }
    release_kernels();
    await_kernels();
    if (!there) return;

    float v[EACH];
    Sixteen<FACTOR>::widen(
        load_shared_cache((const uint4*)(a.projected + row * a.width + c)), v
    );
#pragma unroll
    for (int i = 0; i < EACH; i++) v[i] += bias[i];
    // as the model's own forward, and the window that it leaves behind, have it
    past[PAST] = Pieces<TYPE>::narrow(v);
#pragma unroll
    for (int k = 0; k < WINDOW; k++) {
        past[k].widen(v);
#pragma unroll
        for (int i = 0; i < EACH; i++) y[i] = fmaf(taps[k][i], v[i], y[i]);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) y[i] = silu(y[i]);
    Pieces<FACTOR>::narrow(y).store(a.u + row * a.u_columns + c);
#pragma unroll
    for (int k = 0; k < PAST; k++) past[k + 1].store(new_window + window + k * a.channels);
}
