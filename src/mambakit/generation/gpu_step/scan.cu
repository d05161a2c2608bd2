// A step of the scan, with what is before and after it.
//
//     dt = softplus(weights low + bias)
//     h' = exp(dt A) h + dt B u,     y = (C . h' + D u) gate
//
// (low, B, C) are the sums of x_proj over its spans. Four lanes share a channel: each has a
// quarter of the channel's row of weights and of its states, four at a time. A block has CHANNELS
// channels of GROUP sequences, so that weights and A are read once for all of them. Weights and
// states, which are nearly all that is read, do not depend on the kernels before in this token, so
// they are on their way before the block waits for those.
//
// -D gives what common.cuh says, and STATES, n; RANK, r; GROUP; ALIGNED, 1 if n is a multiple of 4;
// SPANS, in how many parts the sums come.
#include "recurrence.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int LANES = 4; // to a channel
constexpr int CHANNELS = THREADS / LANES;

constexpr int QUADS = (STATES + 4 * LANES - 1) / (4 * LANES); // of states in a lane
constexpr int PADDED_STATES = QUADS * 4 * LANES;
constexpr int PIECE = Piece<WEIGHT>::COUNT;
constexpr int COLUMNS = (RANK + 15) / 16 * 16; // of the matrix in memory
constexpr int PIECES = (COLUMNS + LANES * PIECE - 1) / (LANES * PIECE); // in a lane
constexpr int PADDED_RANK = PIECES * LANES * PIECE;
constexpr int LOW = PADDED_RANK + 2 * PADDED_STATES;
// Where they would not fit the registers beside the states, they are read when they are used.
constexpr bool EARLY = 4 * (PIECES + GROUP * QUADS) < 48;

constexpr int BLOCKS = QUADS > 8 ? 1 : 2;

struct Arguments {
    const Call* call;
    const float* sums; // (SPANS, capacity, r + 2 n)
    long long capacity;
    double selection_eps; // 0: low, B and C are not normalised
    const WEIGHT* matrix; // (d, COLUMNS)
    const float* scales;  // (d), or null
    const float *bias, *A, *D; // (d), (d, n) times log2(e), (d)
    const FACTOR* u;           // (capacity, stride)
    const float* gate;         // (capacity, d)
    FACTOR* y;                 // (capacity, stride)
    long long channels, stride, layer;
};

// Up to four states of one channel, from `state` on; those that there are not are zero.
DEVICE float4 load_states(const float* row, int state) {
    if (ALIGNED)
        return state < STATES ? *(const float4*)(row + state) : float4{0, 0, 0, 0};
    float4 v{0, 0, 0, 0};
    if (state < STATES) v.x = row[state];
    if (state + 1 < STATES) v.y = row[state + 1];
    if (state + 2 < STATES) v.z = row[state + 2];
    if (state + 3 < STATES) v.w = row[state + 3];
    return v;
}
DEVICE void store_states(float* row, int state, float4 v) {
    if (ALIGNED) {
        if (state < STATES) *(float4*)(row + state) = v;
        return;
    }
    if (state < STATES) row[state] = v.x;
    if (state + 1 < STATES) row[state + 1] = v.y;
    if (state + 2 < STATES) row[state + 2] = v.z;
    if (state + 3 < STATES) row[state + 3] = v.w;
}

// Where the parts of a sequence's (low, B, C) lie in shared memory.
DEVICE int place_of(int e) {
    if (e < RANK) return e;
    e -= RANK;
    return e < STATES ? PADDED_RANK + e : PADDED_RANK + PADDED_STATES + e - STATES;
}

// Add up the spans; then FalconMamba's norms, each by a warp.
DEVICE void gather(const Arguments& a, long long first, int rows, float* low) {
    constexpr int COUNT = RANK + 2 * STATES;
#pragma unroll 4
    for (int e = threadIdx.x; e < rows * COUNT; e += THREADS) {
        int j = e / COUNT, i = e % COUNT;
        const float* from = a.sums + (first + j) * COUNT + i;
        float parts[SPANS], sum = 0;
#pragma unroll
        for (int s = 0; s < SPANS; s++) parts[s] = received(from + s * a.capacity * COUNT);
#pragma unroll
        for (int s = 0; s < SPANS; s++) sum += parts[s];
        low[j * LOW + place_of(i)] = sum;
    }
    __syncthreads();
    if (a.selection_eps == 0) return;
    for (int part = threadIdx.x / 32; part < rows * 3; part += WARPS) {
        int which = part % 3, count = which == 0 ? RANK : STATES;
        float* of = low + part / 3 * LOW + place_of(which == 0 ? 0 : RANK + (which - 1) * STATES);
        float squares = 0;
        for (int i = threadIdx.x % 32; i < count; i += 32) squares = fmaf(of[i], of[i], squares);
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) squares += shuffle_xor(squares, mask);
        float inverse = 1.0f / sqrtf(squares / count + (float)a.selection_eps);
        for (int i = threadIdx.x % 32; i < count; i += 32) of[i] *= inverse;
    }
    __syncthreads();
}

KERNEL(THREADS, BLOCKS) scan(const __grid_constant__ Arguments a) {
    __shared__ __align__(16) float low[GROUP * LOW];
    const int t = threadIdx.x % LANES;
    const long long c = (long long)blockIdx.x * CHANNELS + threadIdx.x / LANES;
    const long long first = (long long)blockIdx.y * GROUP, b = a.call->b;
    const int rows = (int)max(0ll, min(b - first, (long long)GROUP));
    const bool there = c < a.channels;
    const WEIGHT* row_of_matrix = a.matrix + (there ? c : 0) * COLUMNS;
    const auto piece = [&](int i) {
        int column = (i * LANES + t) * PIECE;
        return column < COLUMNS ? *(const uint4*)(row_of_matrix + column) : make_uint4(0, 0, 0, 0);
    };

    const float* old_states = in_global(a.call->ssm);
    float* new_states = in_global(a.call->new_ssm);
    uint4 early[EARLY ? PIECES : 1];
    float4 A[QUADS], h[GROUP][QUADS];
    const long long state_rows = (a.layer * b + first) * a.channels + c;
    if (EARLY) {
#pragma unroll
        for (int i = 0; i < PIECES; i++) early[i] = piece(i);
    }
#pragma unroll
    for (int j = 0; j < GROUP; j++)
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const float* from = old_states + (state_rows + j * a.channels) * STATES;
            h[j][q] = there && j < rows && old_states
                ? load_states(from, 4 * (q * LANES + t))
                : float4{0, 0, 0, 0};
        }
#pragma unroll
    for (int q = 0; q < QUADS; q++)
        A[q] = load_states(a.A + (there ? c : 0) * STATES, 4 * (q * LANES + t));
    for (int e = threadIdx.x; e < GROUP * LOW; e += THREADS) low[e] = 0;
    const float bias = there ? a.bias[c] : 0, D = there ? a.D[c] : 0;
    const float scale = there && a.scales ? a.scales[c] : 1;
    release_kernels();
    await_kernels();
    if (rows == 0) return;

    float u[GROUP], gate[GROUP];
#pragma unroll
    for (int j = 0; j < GROUP; j++) {
        bool read = there && j < rows;
        u[j] = read ? received(a.u + (first + j) * a.stride + c) : 0;
        gate[j] = read ? received(a.gate + (first + j) * a.channels + c) : 0;
    }
    __syncthreads();
    gather(a, first, rows, low);

    float raw[GROUP] = {};
#pragma unroll(EARLY ? PIECES : 1)
    for (int i = 0; i < PIECES; i++) {
        float weights[PIECE];
        Piece<WEIGHT>::widen(EARLY ? early[EARLY ? i : 0] : piece(i), weights);
#pragma unroll
        for (int j = 0; j < GROUP; j++) {
            const float4* with = (const float4*)(low + j * LOW + (i * LANES + t) * PIECE);
#pragma unroll
            for (int k = 0; k < PIECE / 4; k++) {
                float4 v = with[k];
                raw[j] = fmaf(weights[4 * k], v.x, raw[j]);
                raw[j] = fmaf(weights[4 * k + 1], v.y, raw[j]);
                raw[j] = fmaf(weights[4 * k + 2], v.z, raw[j]);
                raw[j] = fmaf(weights[4 * k + 3], v.w, raw[j]);
            }
        }
    }

#pragma unroll
    for (int j = 0; j < GROUP; j++) {
        raw[j] += shuffle_xor(raw[j], 1);
        raw[j] += shuffle_xor(raw[j], 2);
        const float dt = softplus(fmaf(raw[j], scale, bias)), input = dt * u[j];
        const float* B = low + j * LOW + PADDED_RANK;
        const float* C = B + PADDED_STATES;
        float* to = new_states + (state_rows + j * a.channels) * STATES;
        float y = 0;
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const int state = 4 * (q * LANES + t);
            const float4 with = *(const float4*)(B + state), out = *(const float4*)(C + state);
            float4 s = h[j][q];
            s.x = fmaf(decay(dt, A[q].x), s.x, with.x * input);
            s.y = fmaf(decay(dt, A[q].y), s.y, with.y * input);
            s.z = fmaf(decay(dt, A[q].z), s.z, with.z * input);
            s.w = fmaf(decay(dt, A[q].w), s.w, with.w * input);
            if (there && j < rows) store_states(to, state, s);
            y = fmaf(out.w, s.w, fmaf(out.z, s.z, fmaf(out.y, s.y, fmaf(out.x, s.x, y))));
        }
        y += shuffle_xor(y, 1);
        y += shuffle_xor(y, 2);
        if (there && j < rows && t == j % LANES)
            a.y[(first + j) * a.stride + c] = narrow<FACTOR>(fmaf(D, u[j], y) * gate[j]);
    }
}
