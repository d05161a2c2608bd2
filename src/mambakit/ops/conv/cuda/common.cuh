// What the convolution's kernels share: who owns which part of the work, how rows are loaded,
// and the sum over a window.
//
// A lane owns CHANNELS neighbouring channels, a warp 32 lanes of them for a run of time, and the
// warps of a block runs that follow each other. A lane keeps the last WIDTH - 1 inputs in
// registers, so every row is read once, but for those by which runs overlap.
//
// -D gives: TYPE (the dtype of x), WIDTH, CHANNELS, SILU (0 or 1), ROWS (whose loads are under way
// together), WARPS, and BLOCKS that a multiprocessor should hold at once. PACKED, 0 if not given,
// is 1 for a pack of sequences: then b is 1, l is the pack's, and a block takes a span of a list.
#pragma once
#include "_cuda.cuh"
#include "_spans/span.cuh"

#ifndef PACKED
#define PACKED 0
#endif

typedef Wide<TYPE> real;

constexpr int PAST = WIDTH - 1;
constexpr int ROOM = PAST > 0 ? PAST : 1; // C++ has no empty arrays
constexpr int TILE = 32 * CHANNELS;

// ---------------------------------------------------------------- what Python passes

// A tensor (b, rows, d) whose channels are neighbours, or of states (sequences, rows, d) for a
// pack; strides count elements.
struct Rows {
    TYPE* data; // null: there is no such tensor
    long long batch, time;
};

struct Parameter {
    const void* data;
    long long channel, tap; // strides
    long long dtype;        // a Dtype
};
enum Dtype { FLOAT32, BFLOAT16, FLOAT16, FLOAT64 };

// Mirrored by _Arguments in launch.py, field by field.
struct Arguments {
    long long b, l, d;
    long long splits, steps; // blocks along time, and the steps of each of their warps; for a
                             // pack, how many spans there are
    Rows x, past;            // no past: zeros
    Parameter weight, bias;
    Rows y, last;
    Rows dy, dlast;          // no dlast: zeros
    Rows dx, dpast;          // no dpast: not wanted
    real* sums;              // (b * splits, WIDTH + 1, d): each block's part of dweight and dbias
    void *dweight, *dbias;   // dense, in the dtypes of the parameters
    const Span* spans;       // for a pack
};

// ---------------------------------------------------------------- memory

// CHANNELS numbers as they lie in memory, moved at once.
template <int BYTES> struct Packet {
    static_assert(BYTES == sizeof(TYPE), "a packet is one number, 8 bytes or 16");
    TYPE raw;
    METHOD void get(real* out) const { out[0] = widen(raw); }
    METHOD void set(const real* in) { raw = narrow<TYPE>(in[0]); }
};
template <> struct Packet<16> {
    uint4 raw;
    METHOD void get(real* out) const { Sixteen<TYPE>::widen(raw, out); }
    METHOD void set(const real* in) { raw = Sixteen<TYPE>::narrow(in); }
};
#if CHANNELS > 1
template <> struct Packet<8> {
    uint2 raw;
    METHOD void get(real* out) const {
        real both[Sixteen<TYPE>::COUNT];
        Sixteen<TYPE>::widen(make_uint4(raw.x, raw.y, 0, 0), both);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) out[i] = both[i];
    }
    METHOD void set(const real* in) {
        real both[Sixteen<TYPE>::COUNT] = {};
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) both[i] = in[i];
        uint4 four = Sixteen<TYPE>::narrow(both);
        raw = make_uint2(four.x, four.y);
    }
};
#endif
typedef Packet<CHANNELS * sizeof(TYPE)> Channels;

// One row of one sequence at this lane's channels; zeros if it is not valid.
DEVICE Channels load(const TYPE* at, bool valid) {
    Channels found;
    const real zeros[CHANNELS] = {};
    if (valid)
        found = *(const Channels*)at;
    else
        found.set(zeros);
    return found;
}
DEVICE void store(TYPE* at, const real* values) {
    Channels packed;
    packed.set(values);
    *(Channels*)at = packed;
}

// A channel's taps, loaded at once where they lie together: lanes are far apart in the weights, so
// a load costs as much for one number as for all.
template <class S, int TAPS> struct alignas(TAPS * sizeof(S)) Taps { S raw[TAPS]; };

template <class S, int TAPS>
DEVICE void read_as(const Parameter& p, long long c, real (*out)[CHANNELS]) {
    const S* data = (const S*)p.data + c * p.channel;
    constexpr int BYTES = TAPS * sizeof(S);
    if constexpr (BYTES == 4 || BYTES == 8 || BYTES == 16) {
        const long long starts = (long long)p.data | p.channel * (long long)sizeof(S);
        if (p.tap == 1 && starts % BYTES == 0) {
#pragma unroll
            for (int i = 0; i < CHANNELS; i++) {
                const Taps<S, TAPS> taps = *(const Taps<S, TAPS>*)(data + i * p.channel);
#pragma unroll
                for (int k = 0; k < TAPS; k++) out[k][i] = (real)widen(taps.raw[k]);
            }
            return;
        }
    }
#pragma unroll
    for (int k = 0; k < TAPS; k++)
#pragma unroll
        for (int i = 0; i < CHANNELS; i++)
            out[k][i] = (real)widen(data[i * p.channel + k * p.tap]);
}
// The parameter of channels c and on, by taps; zeros if there is none.
template <int TAPS> DEVICE void read(const Parameter& p, long long c, real (*out)[CHANNELS]) {
#pragma unroll
    for (int k = 0; k < TAPS; k++)
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) out[k][i] = real(0);
    if (!p.data) return;
    if (p.dtype == FLOAT32) read_as<float, TAPS>(p, c, out);
    if (p.dtype == BFLOAT16) read_as<bf16, TAPS>(p, c, out);
    if (p.dtype == FLOAT16) read_as<fp16, TAPS>(p, c, out);
    if (p.dtype == FLOAT64) read_as<double, TAPS>(p, c, out);
}

// ---------------------------------------------------------------- arithmetic

DEVICE float sigmoid(float v) {
    return reciprocal_fast(1.0f + exp2_fast(v * -1.4426950408889634f));
}
DEVICE double sigmoid(double v) { return 1.0 / (1.0 + exp(-v)); }

// A lane's window over time: its weights, and the inputs before the present one.
struct Window {
    real weight[WIDTH][CHANNELS], bias[1][CHANNELS], past[ROOM][CHANNELS];

    METHOD void convolve(const real* x, real* out) const {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            real sum = bias[0][i];
#pragma unroll
            for (int k = 0; k < PAST; k++) sum = fma(weight[k][i], past[k][i], sum);
            out[i] = fma(weight[PAST][i], x[i], sum);
        }
    }
};

// Forget the oldest row and take in a new one.
DEVICE void push(real (*rows)[CHANNELS], const real* row) {
    if (PAST == 0) return;
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
#pragma unroll
        for (int k = 0; k + 1 < PAST; k++) rows[k][i] = rows[k + 1][i];
        rows[ROOM - 1][i] = row[i];
    }
}

// Which part of the work is whose.
struct Run {
    int batch, split;
    long long c, from; // the first of this lane's channels, and the first step
    int steps;         // of the run; none if it begins after the sequence's end
    bool owns;         // whether this lane has channels
#if PACKED
    const Span* span; // what is in it is read when it is asked for, and takes no registers
#endif

    METHOD Run(const Arguments& a, int warp, int lane) {
        int tiles = (int)((a.d + TILE - 1) / TILE), row = (int)blockIdx.x / tiles;
        c = (long long)((int)blockIdx.x % tiles) * TILE + lane * CHANNELS;
        owns = c < a.d;
#if PACKED
        batch = 0, split = row, span = a.spans + row;
        const int all = span->steps, share = (all + WARPS - 1) / WARPS;
        const int skipped = min(all, warp * share);
        from = (long long)span->before + skipped;
        steps = min(share, all - skipped);
#else
        batch = row / (int)a.splits;
        split = row % (int)a.splits;
        from = min(a.l, ((long long)split * WARPS + warp) * a.steps);
        steps = (int)min(a.steps, a.l - from);
#endif
    }
    METHOD long long l(const Arguments& a) const {
#if PACKED
        return (long long)span->before + span->steps + span->after;
#else
        return a.l;
#endif
    }
    // Whether the last step is the sequence's.
    METHOD bool ends(const Arguments& a) const { return from + steps == l(a); }
    // Where the block's sums go among those of all.
    METHOD long long block(const Arguments& a) const {
        return batch * a.splits + split;
    }
};

// The sequence's first step, or its first row of state.
DEVICE TYPE* at(const Rows& rows, const Run& run, bool state = false) {
#if PACKED
    const Span& span = *run.span;
    if (!state) return rows.data + (span.begin - span.before) * rows.time + run.c;
    return rows.data + span.sequence * rows.batch + run.c;
#else
    return rows.data + run.batch * rows.batch + run.c;
#endif
}

// The inputs before the run's first, from x or from the sequence's past.
DEVICE void begin(const Arguments& a, const Run& run, real (*past)[CHANNELS]) {
#pragma unroll
    for (int k = 0; k < PAST; k++) {
        long long t = run.from - PAST + k;
        const Rows& rows = t < 0 ? a.past : a.x;
        load(at(rows, run, t < 0) + (t < 0 ? t + PAST : t) * rows.time, rows.data).get(past[k]);
    }
}
