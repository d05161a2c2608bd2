// What the scan's kernels share: how a warp is laid over channels and states, how rows of time
// come into shared memory, and softplus and SiLU.
//
// A warp owns WARP_CHANNELS channels with all their states. A lane holds CHANNELS_PER_LANE = 2
// channels by STATES_PER_LANE states in registers, so LANES_PER_CHANNEL lanes share a channel and
// sum over states is a butterfly between them. For n = 16 that is 16 channels by 16 states, 4
// lanes to a channel. More states in a lane would be fewer warps and as many reads of B and C;
// fewer would be more butterflies.
//
// What is done once for a step and channel (softplus, the gate, conversions) would be done
// LANES_PER_CHANNEL times over in that layout. It is done in another: a lane takes a piece, PIECE
// neighbouring channels at one step, and the two layouts meet in shared memory of the warp.
//
// -D gives: STATES (n), X_TYPE (of x, gate, y), DT_TYPE, COEFFICIENT_TYPE (of B and C), each
// float, double, bf16 or fp16; and 0 or 1 for SOFTPLUS, GATE, CONSTANT_B, CONSTANT_C ((d, n)
// rather than per token), ALIGNED (pieces of x, dt, gate, y and their gradients start on
// multiples of their size, at most 16 bytes), ALIGNED_COEFFICIENTS (likewise for B and C). NARROW,
// 0 if not given, is for 4 <= n <= 16: 1 halves the states in a lane, and so the channels of a
// warp. That is twice the warps for a fifth more work. PACKED, 0 if not given, is 1 for a pack of
// sequences: then b is 1, l is the pack's, no tensor has a stride from sequence to sequence, and
// what there is one of for each sequence has as many rows as there are sequences.
#pragma once
#include "_cuda.cuh"
#include "_spans/span.cuh"

#define METHOD __device__ __forceinline__

#ifndef NARROW
#define NARROW 0
#endif
#ifndef PACKED
#define PACKED 0
#endif

typedef Wide<X_TYPE> real; // float, or double if x is

constexpr real LOG2E = 1.44269504088896340736;
// What rounding took from LOG2E: it would bend all decays the same way.
constexpr real LOG2E_REST = real(1.44269504088896340736 - double(LOG2E));
constexpr real LN2 = 0.693147180559945309417;

// ---------------------------------------------------------------- what Python passes

// A tensor (b, l, d) or (b, l, g, n) whose last axis is dense; strides count elements.
struct Rows {
    void* data; // null: there is no such tensor
    long long batch, time, group;
};

// The inputs of a scan; operands.py has the same list. Pointers without strides are to dense
// arrays of real, and may be null where the operand may be None.
struct Operands {
    long long b, l, d, n, g;
    Rows x, dt, gate, B, C;
    const real *A, *D, *dt_bias;           // (d, n), (d), (d)
    const real *B_constant, *C_constant;   // (d, n) in place of B, C
    const real* state;                     // (b, d, n), or (sequences, d, n)
};

// Which checkpoint is the state before a step, where one is saved every 2^bits steps: backward
// starts from these and runs the steps again. Those of a pack's sequences never overlap: a whole
// number of checkpoints lies between the step and the first one of its sequence.
DEVICE long long checkpoint_row(
    const Operands& in, long long sequence, long long step, int bits
) {
    const long long rows = (in.l + (1ll << bits) - 1) >> bits;
    return (PACKED ? sequence : sequence * rows) + (step >> bits);
}

// ---------------------------------------------------------------- a warp over channels and states

DEVICE constexpr int power_of_two_from(int n) {
    int p = 1;
    while (p < n) p *= 2;
    return p;
}

// States beyond n have A = B = C = 0 and stay 0.
constexpr int PADDED_STATES = power_of_two_from(STATES);
constexpr int STATES_PER_LANE = PADDED_STATES < 4     ? PADDED_STATES
                                : PADDED_STATES > 128 ? 8
                                : NARROW              ? 2
                                                      : 4;
constexpr int LANES_PER_CHANNEL = PADDED_STATES / STATES_PER_LANE;
constexpr int CHANNELS_PER_LANE = 2;
constexpr int LANE_ELEMENTS = CHANNELS_PER_LANE * STATES_PER_LANE;
// Pairs of channels in a warp: pair p is the channels p and p + PAIRS of the warp's.
constexpr int PAIRS = 32 / LANES_PER_CHANNEL;
constexpr int WARP_CHANNELS = CHANNELS_PER_LANE * PAIRS;

// With two channels and doubles a piece is one, for a tile of as many steps as there are rows in a
// pass must fit in shared memory with its rows of B and C.
constexpr int PIECE = WARP_CHANNELS == 2 && sizeof(real) == 8 ? 1
                      : WARP_CHANNELS < 8                     ? WARP_CHANNELS
                                                              : 8;
constexpr int PIECES_PER_ROW = WARP_CHANNELS / PIECE;
constexpr int ROWS_PER_PASS = 32 / PIECES_PER_ROW; // rows of time that a warp takes at once
// Steps that are brought, prepared and run together: at least a pass, and no more for few states,
// where rows are wide, than leave room in shared memory.
constexpr int TILE_STEPS = WARP_CHANNELS > 32 ? 8 : ROWS_PER_PASS > 16 ? ROWS_PER_PASS : 16;
constexpr int PASSES = TILE_STEPS / ROWS_PER_PASS;

// Where a lane is in the layout of the recurrence.
struct Lane {
    int pair, part; // part: which of the channel's lanes, and so which states
    // 1 if the lane holds its two channels in the other order. The first level of every butterfly
    // adds one lane's second channel to its neighbour's first; with the order turned in every
    // other lane that is the same register in all lanes, and nothing need be selected.
    int turned;
    METHOD explicit Lane(int lane)
        : pair(lane / LANES_PER_CHANNEL), part(lane % LANES_PER_CHANNEL),
          turned(lane % LANES_PER_CHANNEL & 1) {}
    // The channel, counted from the warp's first, that register c = 0, 1 holds.
    METHOD int channel(int c) const { return pair + PAIRS * (c ^ turned); }
    // The state that register i = 0 .. STATES_PER_LANE-1 holds.
    METHOD int state(int i) const { return part * STATES_PER_LANE + i; }
};

// Where a lane is in the layout of pieces.
struct Piece {
    int row, channel; // of the first pass; of the piece's first channel in the warp
    METHOD explicit Piece(int lane)
        : row(lane / PIECES_PER_ROW), channel(lane % PIECES_PER_ROW * PIECE) {}
};

// ---------------------------------------------------------------- which channels a warp has

// Channels are cut group by group, as B and C differ between groups: warps of a group's last
// block may have fewer than WARP_CHANNELS channels, or none. What is missing reads as zeros.
struct Channels {
    long long first; // of the warp
    int count;       // that exist, 0 .. WARP_CHANNELS
    long long group;
    // `slot` counts the warps of a group.
    METHOD Channels(const Operands& in, long long group, long long slot) : group(group) {
        long long size = in.d / in.g, within = slot * WARP_CHANNELS;
        first = group * size + within;
        long long left = size - within;
        count = left < 0 ? 0 : left < WARP_CHANNELS ? (int)left : WARP_CHANNELS;
    }
};

// ---------------------------------------------------------------- pieces and vectors

DEVICE constexpr int at_most_sixteen(int bytes) { return bytes < 16 ? bytes : 16; }
template <class T, int COUNT>
struct __align__(at_most_sixteen(sizeof(T) * COUNT)) Vector {
    T at[COUNT];
};
template <class T, int COUNT> DEVICE Vector<T, COUNT> load_vector(const void* from) {
    return *(const Vector<T, COUNT>*)from;
}
// CUDA's own types, as the compiler does not join the stores of a struct's members.
template <class T> struct Native;
template <> struct Native<float> {
    typedef float2 eight;
    typedef float4 sixteen;
    static METHOD float4 make(const float* v) { return make_float4(v[0], v[1], v[2], v[3]); }
    static METHOD float2 make_half(const float* v) { return make_float2(v[0], v[1]); }
};
template <> struct Native<unsigned int> {
    typedef uint2 eight;
    typedef uint4 sixteen;
    static METHOD uint4 make(const unsigned int* v) { return make_uint4(v[0], v[1], v[2], v[3]); }
    static METHOD uint2 make_half(const unsigned int* v) { return make_uint2(v[0], v[1]); }
};
template <> struct Native<double> {
    typedef double eight;
    typedef double2 sixteen;
    static METHOD double2 make(const double* v) { return make_double2(v[0], v[1]); }
    static METHOD double make_half(const double* v) { return v[0]; }
};
// Write COUNT neighbours; `to` is a multiple of their size, at most 16 bytes.
template <class T, int COUNT> DEVICE void store_vector(void* to, const T* values) {
    if constexpr (sizeof(T) * COUNT % 16 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 16 / sizeof(T))
            *(typename Native<T>::sixteen*)((T*)to + i) = Native<T>::make(values + i);
    } else if constexpr (sizeof(T) * COUNT % 8 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 8 / sizeof(T))
            *(typename Native<T>::eight*)((T*)to + i) = Native<T>::make_half(values + i);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) ((T*)to)[i] = values[i];
    }
}

template <class T, int COUNT> struct Convert {
    static METHOD void widen(const void* from, real* to) {
        Vector<T, COUNT> v = load_vector<T, COUNT>(from);
#pragma unroll
        for (int i = 0; i < COUNT; i++) to[i] = ::widen(v.at[i]);
    }
    static METHOD void narrow(const real* from, void* to) {
        store_vector<T, COUNT>(to, from); // T is real, or x would be wider
    }
};
// Two at a time in a word: one instruction for each number, half a one for each narrowed.
template <class T, int COUNT> struct ConvertWords {
    static METHOD void widen(const void* from, real* to) {
        Vector<unsigned int, COUNT / 2> v = load_vector<unsigned int, COUNT / 2>(from);
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) {
            float low, high;
            unpack(v.at[i], T{}, low, high);
            to[2 * i] = low, to[2 * i + 1] = high;
        }
    }
    static METHOD void narrow(const real* from, void* to) {
        unsigned int v[COUNT / 2];
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++)
            v[i] = pack((float)from[2 * i], (float)from[2 * i + 1], T{});
        store_vector<unsigned int, COUNT / 2>(to, v);
    }
};
template <int COUNT> struct Convert<bf16, COUNT> : ConvertWords<bf16, COUNT> {};
template <int COUNT> struct Convert<fp16, COUNT> : ConvertWords<fp16, COUNT> {};
template <> struct Convert<bf16, 1> {
    static METHOD void widen(const void* from, real* to) {
        to[0] = ::widen(*(const bf16*)from);
    }
};
template <> struct Convert<fp16, 1> {
    static METHOD void widen(const void* from, real* to) {
        to[0] = ::widen(*(const fp16*)from);
    }
};

// Widen COUNT neighbours of type T; `from` is a multiple of their size, at most 16 bytes.
template <class T, int COUNT> DEVICE void widen_all(const void* from, real* to) {
    Convert<T, COUNT>::widen(from, to);
}

// Bring a lane's piece of one row into shared memory: `count` elements of it exist, 0 for steps
// and channels that do not, and the others become 0. The lane itself may read it after
// copy_async_wait, other lanes after a barrier as well.
template <class T> DEVICE void fetch_piece(T* to, const T* from, int count) {
    if constexpr (ALIGNED) { // then a group's channels are whole pieces
        copy_async<sizeof(T) * PIECE>(to, from, count > 0);
    } else {
#pragma unroll
        for (int i = 0; i < PIECE; i++) to[i] = i < count ? from[i] : T{};
    }
}

// Write what exists of a piece.
template <class T> DEVICE void store_piece(T* to, const real* values, int count) {
    if constexpr (ALIGNED) {
        if (count > 0) Convert<T, PIECE>::narrow(values, to);
    } else {
#pragma unroll
        for (int i = 0; i < PIECE; i++)
            if (i < count) to[i] = narrow<T>(values[i]);
    }
}

// PIECE neighbouring reals of a (d) array, zeros where it is null or has no such channel.
DEVICE void load_per_channel(const real* from, int count, real* to) {
#pragma unroll
    for (int i = 0; i < PIECE; i++) to[i] = from && i < count ? from[i] : real(0);
}

// ---------------------------------------------------------------- rows of B and C

// A tile of B and C lies in shared memory as it was stored. What a lane reads at a step is a unit
// of each: its STATES_PER_LANE numbers. Units of 2-byte numbers of B and C take turns, so that
// both come in one 16-byte read; wider ones lie apart, so that lanes read without bank conflicts.
constexpr bool TOKEN_B = !CONSTANT_B, TOKEN_C = !CONSTANT_C;
constexpr int COEFFICIENTS = TOKEN_B + TOKEN_C; // per token
constexpr int UNIT_BYTES = STATES_PER_LANE * sizeof(COEFFICIENT_TYPE);
constexpr bool TURNS = COEFFICIENTS == 2 && UNIT_BYTES <= 8;
constexpr int COEFFICIENT_ROW_BYTES = COEFFICIENTS * LANES_PER_CHANNEL * UNIT_BYTES;
constexpr int COEFFICIENT_TILE_BYTES = TILE_STEPS * COEFFICIENT_ROW_BYTES;

// Byte in a row where the unit of lane `part` begins; which = 0 for B, 1 for C.
DEVICE int unit_offset(int which, int part) {
    int plane = COEFFICIENTS == 2 ? which : 0;
    if (TURNS) return (part * 2 + plane) * UNIT_BYTES;
    return (plane * LANES_PER_CHANNEL + part) * UNIT_BYTES;
}

// Where a group's B or C of one sequence begins.
DEVICE const COEFFICIENT_TYPE* coefficient_row(const Rows& rows, long long batch, long long group) {
    return (const COEFFICIENT_TYPE*)rows.data + batch * rows.batch + group * rows.group;
}

// Bring TILE_STEPS rows of B and C into shared memory, from where B and C point to, by THREADS
// threads of which this is `thread`. Rows from `left` on and states from n on become zeros.
template <int THREADS>
DEVICE void fetch_coefficients(
    unsigned char* tile, const COEFFICIENT_TYPE* B, const COEFFICIENT_TYPE* C, long long B_time,
    long long C_time, int left, int thread
) {
    if constexpr (COEFFICIENTS == 0) return;
    if constexpr (ALIGNED_COEFFICIENTS) { // then n is PADDED_STATES
        constexpr int UNITS = TILE_STEPS * LANES_PER_CHANNEL, ALL = COEFFICIENTS * UNITS;
        if constexpr (UNITS % THREADS == 0 && THREADS % LANES_PER_CHANNEL == 0) {
            // A thread's units are the same part of rows that lie APART steps apart.
            constexpr int APART = THREADS / LANES_PER_CHANNEL;
            const int step = thread / LANES_PER_CHANNEL, part = thread % LANES_PER_CHANNEL;
#pragma unroll
            for (int which = !TOKEN_B; which <= TOKEN_C; which++) {
                const long long time = which ? C_time : B_time;
                const COEFFICIENT_TYPE* from =
                    (which ? C : B) + step * time + part * STATES_PER_LANE;
                unsigned char* to = tile + step * COEFFICIENT_ROW_BYTES + unit_offset(which, part);
#pragma unroll
                for (int i = 0; i < TILE_STEPS; i += APART)
                    copy_async<UNIT_BYTES>(
                        to + i * COEFFICIENT_ROW_BYTES, from + i * time, step + i < left
                    );
            }
        } else {
#pragma unroll
            for (int first = 0; first < ALL; first += THREADS) {
                int u = first + thread;
                if (ALL % THREADS != 0 && u >= ALL) break;
                int which = COEFFICIENTS == 2 ? u / UNITS : TOKEN_C;
                int step = u % UNITS / LANES_PER_CHANNEL, part = u % LANES_PER_CHANNEL;
                const COEFFICIENT_TYPE* row = which ? C + step * C_time : B + step * B_time;
                copy_async<UNIT_BYTES>(
                    tile + step * COEFFICIENT_ROW_BYTES + unit_offset(which, part),
                    row + part * STATES_PER_LANE, step < left
                );
            }
        }
    } else {
        constexpr int ELEMENTS = TILE_STEPS * PADDED_STATES;
        for (int e = thread; e < COEFFICIENTS * ELEMENTS; e += THREADS) {
            int which = COEFFICIENTS == 2 ? e / ELEMENTS : TOKEN_C;
            int step = e % ELEMENTS / PADDED_STATES, state = e % PADDED_STATES;
            const COEFFICIENT_TYPE* row = which ? C + step * C_time : B + step * B_time;
            COEFFICIENT_TYPE* to = (COEFFICIENT_TYPE*)(tile + step * COEFFICIENT_ROW_BYTES +
                                                       unit_offset(which, state / STATES_PER_LANE));
            to[state % STATES_PER_LANE] =
                step < left && state < STATES ? row[state] : COEFFICIENT_TYPE{};
        }
    }
}

// ---------------------------------------------------------------- arithmetic, softplus and SiLU

DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
DEVICE float exp2_of(float x) { return exp2_fast(x); }
DEVICE double exp2_of(double x) { return exp2(x); }

// exp(dt A) from A times log2(e).
DEVICE float decay_of(float dt, float A) { return exp2_fast(fmaf(dt, A, EXP2_BIAS)); }
DEVICE double decay_of(double dt, double A) { return exp2(dt * A); }
// v log2(e), rounded once.
DEVICE real times_log2e(real v) { return multiply_add(v, LOG2E, v * LOG2E_REST); }

DEVICE double add_log1p(double u, double c) { return log1p(u) + c; }

// The step size, from dt with its bias: softplus(v) = max(v, 0) + log(1 + exp(-|v|)), which
// neither overflows nor cancels.
DEVICE real step_size(real v) {
    if constexpr (!SOFTPLUS) return v;
    return add_log1p(exp2_of(-fabs(v) * LOG2E), max(v, real(0)));
}

DEVICE float sigmoid_of(float z) { return reciprocal_fast(1.0f + exp2_fast(-z * (float)LOG2E)); }
DEVICE double sigmoid_of(double z) { return 1.0 / (1.0 + exp(-z)); }

template <class T> DEVICE real silu_for(real z, T) { return z * sigmoid_of(z); }
// For a bf16 output tanh to 2^-11 is enough, and it is one instruction.
DEVICE real silu_for(real z, bf16) {
    real half = real(0.5) * z;
    return multiply_add(half, real(tanh_fast((float)half)), half);
}
