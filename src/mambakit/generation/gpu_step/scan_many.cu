// A step of the scan for many sequences; scan.cu has the equations.
//
// The states, in and out, are nearly all that is moved, so that memory has to be kept busy from
// beginning to end. A warp has 16 channels and walks over the block's sequences: states lie in a
// ring in shared memory, SLOTS sequences ahead, and the first of them are on their way before the
// block waits for the kernels before, on which they do not depend. A lane copies the pieces that
// it will use itself, so nobody waits for a neighbour.
//
// dt_proj is a product on the tensor cores, for eight sequences at a time, its weights in
// registers from first to last. The vectors of x_proj come in two short numbers each, the rounded
// one and what is left, so that no digits are lost that the weights have.
//
// -D gives what common.cuh says, of short WEIGHT and FACTOR; STATES, n, a multiple of 16; RANK, r;
// SPANS, in how many parts the sums of x_proj come; SEQUENCES, the most that a block has; SLOTS.
// Channels are a multiple of 16.
#include "recurrence.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int TILE = 16; // channels of a warp
constexpr int CHANNELS = WARPS * TILE;
constexpr int GROUP = 8; // sequences that are multiplied at once

// A lane has four states of a channel, from state 4 t on, and likewise of the channel 8 further.
constexpr int QUADS = STATES / 16; // of states of a channel in a lane
constexpr int COPIES = 2 * QUADS;  // pieces of 16 bytes of a lane for one sequence
constexpr int SLOT_BYTES = WARPS * COPIES * 32 * 16;

constexpr int COLUMNS = (RANK + 15) / 16 * 16; // of dt_proj in memory
constexpr int PIECES = (RANK + 31) / 32;       // in a lane, of a row of dt_proj
constexpr int DEPTH = 32 * PIECES;
constexpr int COUNT = RANK + 2 * STATES;
constexpr int EACH = PIECES + STATES / 16; // sums of a sequence in a lane

// Rows lie so that eight lanes that read 16 bytes each do not meet in a bank.
constexpr int LOW_PITCH = DEPTH / 8 % 8 == 4 ? DEPTH : DEPTH + 32;
constexpr int STEP_PITCH = TILE + 1;

constexpr int LOW_ROWS = (SEQUENCES + GROUP - 1) / GROUP * GROUP;
constexpr int RING = SLOTS * SLOT_BYTES;
constexpr int STEPS_BYTES = WARPS * GROUP * STEP_PITCH * 16;
constexpr int LOW_BYTES = LOW_ROWS * LOW_PITCH * 2;

static_assert(STATES % 16 == 0 && sizeof(WEIGHT) == 2 && sizeof(FACTOR) == 2, "");

struct Arguments {
    const Call* call;
    const float* sums; // (SPANS, capacity, r + 2 n)
    long long capacity;
    double selection_eps; // 0: low, B and C are not normalised
    const WEIGHT* matrix; // (d, COLUMNS)
    const float *bias, *A, *D; // (d), (d, n) times log2(e), (d)
    const FACTOR* u;           // (capacity, stride)
    const FACTOR* gate;        // (capacity, gate_stride), before bias and SiLU
    long long gate_stride;
    const float* gate_bias; // (d), or null
    FACTOR* y;              // (capacity, stride)
    long long channels, stride, layer;
};

// What the kernels before have left for a block's sequences.
struct Low {
    FACTOR *rounded, *rest; // (LOW_ROWS, LOW_PITCH) each
    float* BC;              // (SEQUENCES, 2 n)

    METHOD Low(unsigned char* shared)
        : rounded((FACTOR*)(shared + RING + STEPS_BYTES)),
          rest((FACTOR*)(shared + RING + STEPS_BYTES + LOW_BYTES)),
          BC((float*)(shared + RING + STEPS_BYTES + 2 * LOW_BYTES)) {}

    // Add up the spans; then FalconMamba's norms. A warp has every eighth sequence, and asks for
    // BATCH of them at once, as registers beside dt_proj and A allow.
    METHOD void gather(const Arguments& a, long long first, int rows) const {
        constexpr bool FIT = PIECES <= 5 && SPANS * EACH * QUADS <= 24;
        constexpr int BATCH = SEQUENCES > WARPS && FIT ? 2 : 1;
        const int lane = threadIdx.x % 32;
#pragma unroll 1
        for (int j = threadIdx.x / 32; j < rows; j += BATCH * WARPS) {
            float parts[BATCH][SPANS][EACH];
#pragma unroll
            for (int k = 0; k < BATCH; k++)
#pragma unroll
                for (int s = 0; s < SPANS; s++) {
                    // beyond the last sequence, the last one's again
                    const long long row = first + min(j + k * WARPS, rows - 1);
                    const float* from = a.sums + (s * a.capacity + row) * COUNT;
#pragma unroll
                    for (int i = 0; i < EACH; i++)
                        parts[k][s][i] =
                            is_there(i, lane) ? received(from + column(i, lane)) : 0;
                }
#pragma unroll
            for (int k = 0; k < BATCH; k++)
                if (j + k * WARPS < rows) keep(a, j + k * WARPS, lane, parts[k]);
        }
        __syncthreads();
    }

private:
    METHOD void keep(
        const Arguments& a, int j, int lane, const float (&parts)[SPANS][EACH]
    ) const {
        float sum[EACH] = {};
#pragma unroll
        for (int s = 0; s < SPANS; s++)
#pragma unroll
            for (int i = 0; i < EACH; i++) sum[i] += parts[s][i];
        if (a.selection_eps != 0) normalise(sum, lane, (float)a.selection_eps);
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const FACTOR near = narrow<FACTOR>(sum[i]);
            rounded[j * LOW_PITCH + 32 * i + lane] = near;
            rest[j * LOW_PITCH + 32 * i + lane] = narrow<FACTOR>(sum[i] - widen(near));
        }
#pragma unroll
        for (int i = PIECES; i < EACH; i++)
            BC[j * 2 * STATES + 32 * (i - PIECES) + lane] = sum[i];
    }
    // Number i of a lane is one of low, or of low's padding, or after those one of B or C.
    METHOD static bool is_there(int i, int lane) { return i >= PIECES || 32 * i + lane < RANK; }
    METHOD static int column(int i, int lane) {
        return i < PIECES ? 32 * i + lane : RANK + 32 * (i - PIECES) + lane;
    }
    METHOD static void normalise(float* sum, int lane, float eps) {
#pragma unroll
        for (int part = 0; part < 3; part++) {
            float squares = 0;
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (part_of(i, lane) == part) squares = fmaf(sum[i], sum[i], squares);
#pragma unroll
            for (int mask = 16; mask > 0; mask /= 2) squares += shuffle_xor(squares, mask);
            const float inverse = 1.0f / sqrtf(squares / (part == 0 ? RANK : STATES) + eps);
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (part_of(i, lane) == part) sum[i] *= inverse;
        }
    }
    METHOD static int part_of(int i, int lane) {
        return i < PIECES ? 0 : 32 * (i - PIECES) + lane < STATES ? 1 : 2;
    }
};

// A lane's part of the product dt_proj low, as multiply_tiles has it: channels g and g + 8 of the
// warp, sequences 2 t and 2 t + 1 of the group.
struct Projection {
    uint4 weights[2][PIECES];
    float bias[2], D[2], gate_bias[2];

    METHOD void load(const Arguments& a, long long base, int g, int t) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const long long c = base + 8 * half + g;
            const WEIGHT* row = a.matrix + c * COLUMNS;
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                const int at = 32 * i + 8 * t;
                weights[half][i] =
                    at < COLUMNS ? *(const uint4*)(row + at) : make_uint4(0, 0, 0, 0);
            }
            bias[half] = a.bias[c];
            D[half] = a.D[c];
            gate_bias[half] = a.gate_bias ? a.gate_bias[c] : 0;
        }
    }

    METHOD void multiply(const Low& low, int first, int g, int t, float* raw) const {
        float rest[4] = {};
        const int row = (first + g) * LOW_PITCH + 8 * t;
#pragma unroll
        for (int k = 0; k < 4; k++) raw[k] = 0;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            add(raw, i, *(const uint4*)(low.rounded + row + 32 * i));
            add(rest, i, *(const uint4*)(low.rest + row + 32 * i));
        }
#pragma unroll
        for (int k = 0; k < 4; k++) raw[k] += rest[k];
    }

private:
    METHOD void add(float* sum, int i, uint4 with) const {
        const uint4 upper = weights[0][i], lower = weights[1][i];
        const unsigned int first[4] = {upper.x, lower.x, upper.y, lower.y};
        const unsigned int second[4] = {upper.z, lower.z, upper.w, lower.w};
        multiply_tiles(sum, first, with.x, with.y, FACTOR{});
        multiply_tiles(sum, second, with.z, with.w, FACTOR{});
    }
};

// u and the gate's argument of a lane's channels and sequences, in the order of the product's sums.
// They are widened when they are used: that is what waits for them.
struct Inputs {
    FACTOR u[4], gate[4];

    METHOD void load(
        const Arguments& a, long long base, long long first, int group, int rows, int g, int t
    ) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            // beyond the last sequence, the last one's, for nobody
            const long long row = first + min(group + 2 * t + k % 2, rows - 1);
            const long long c = base + 8 * (k / 2) + g;
            u[k] = bits(a.u + row * a.stride + c);
            gate[k] = bits(a.gate + row * a.gate_stride + c);
        }
    }

private:
    METHOD static FACTOR bits(const FACTOR* from) {
        return FACTOR{load_shared_cache((const unsigned short*)from)};
    }
};

KERNEL(THREADS, 2) scan(const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const long long base = (long long)blockIdx.x * CHANNELS + warp * TILE;
    const long long first = (long long)blockIdx.y * SEQUENCES, b = a.call->b;
    const int rows = (int)max(0ll, min(b - first, (long long)SEQUENCES));
    const bool there = base < a.channels; // the same for all of the warp
    const float* old_states = in_global(a.call->ssm);
    float* new_states = in_global(a.call->new_ssm);
    const long long begins = ((a.layer * b + first) * a.channels + base) * STATES;
    const long long per_sequence = a.channels * STATES;

    // Piece i of a lane: of channel g or g + 8, from state 4 t + 16 q on.
    const auto offset = [&](int i) {
        return (8 * (i / QUADS) + g) * STATES + 16 * (i % QUADS) + 4 * t;
    };
    const auto place = [&](int slot, int i) {
        return (float4*)(shared + slot * SLOT_BYTES + ((warp * COPIES + i) * 32 + lane) * 16);
    };
    const auto ask = [&](int slot, int j) {
        if (there && j < rows) {
#pragma unroll
            for (int i = 0; i < COPIES; i++) {
                const float* from = old_states ? old_states + begins + j * per_sequence : a.A;
                copy_async_16(place(slot, i), from + (old_states ? offset(i) : 0), old_states);
            }
        }
        copy_async_commit();
    };
#pragma unroll 1
    for (int j = 0; j < SLOTS; j++) ask(j, j);

    Projection projection;
    float4 A[COPIES];
    if (there) {
        projection.load(a, base, g, t);
#pragma unroll
        for (int i = 0; i < COPIES; i++)
            A[i] = *(const float4*)(a.A + base * STATES + offset(i));
    }
    release_kernels();
    await_kernels();
    if (rows == 0) return;

    Inputs inputs;
    if (there) inputs.load(a, base, first, 0, rows, g, t);
    const Low low(shared);
    low.gather(a, first, rows);
    if (!there) return;

    // dt, dt u, D u and the gate of a sequence of the group and a channel
    float4* const steps = (float4*)(shared + RING) + warp * GROUP * STEP_PITCH;
    const bool odd = t % 2;
    float* to = new_states + begins;
    FACTOR* y = a.y + first * a.stride + base + 8 * t + g;
    int slot = 0;
#pragma unroll 1
    for (int group = 0; group < rows; group += GROUP) {
        float raw[4];
        projection.multiply(low, group, g, t, raw);
        __syncwarp(); // the group before has been read
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int half = k / 2;
            const float dt = softplus(raw[k] + projection.bias[half]), u = widen(inputs.u[k]);
            steps[(2 * t + k % 2) * STEP_PITCH + 8 * half + g] = float4{
                dt, dt * u, projection.D[half] * u,
                silu(widen(inputs.gate[k]) + projection.gate_bias[half])
            };
        }
        __syncwarp();
        inputs.load(a, base, first, group + GROUP, rows, g, t);

        const int count = min(rows - group, GROUP);
#pragma unroll 1
        for (int j = 0; j < count; j++) {
            copy_async_wait<SLOTS - 1>();
            float4 h[COPIES];
#pragma unroll
            for (int i = 0; i < COPIES; i++) h[i] = *place(slot, i);
            ask(slot, group + j + SLOTS);
            slot = slot + 1 == SLOTS ? 0 : slot + 1;

            const float* B = low.BC + (group + j) * 2 * STATES + 4 * t;
            float sum[2] = {};
            float4 step[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                step[half] = steps[j * STEP_PITCH + 8 * half + g];
                const float dt = step[half].x, input = step[half].y;
#pragma unroll
                for (int q = 0; q < QUADS; q++) {
                    const int i = half * QUADS + q;
                    const float4 with = *(const float4*)(B + 16 * q);
                    const float4 out = *(const float4*)(B + STATES + 16 * q);
                    float4 s = h[i];
                    s.x = fmaf(decay(dt, A[i].x), s.x, with.x * input);
                    s.y = fmaf(decay(dt, A[i].y), s.y, with.y * input);
                    s.z = fmaf(decay(dt, A[i].z), s.z, with.z * input);
                    s.w = fmaf(decay(dt, A[i].w), s.w, with.w * input);
                    *(float4*)(to + offset(i)) = s;
                    float v = sum[half];
                    v = fmaf(out.y, s.y, fmaf(out.x, s.x, v));
                    sum[half] = fmaf(out.w, s.w, fmaf(out.z, s.z, v));
                }
            }
            // even lanes go on with the first channel, odd ones with the second
            float own = select(odd, sum[1], sum[0]) +
                        shuffle_xor(select(odd, sum[0], sum[1]), 1);
            own += shuffle_xor(own, 2);
            const float skip = select(odd, step[1].z, step[0].z);
            const float gate = select(odd, step[1].w, step[0].w);
            if (t < 2) *y = narrow<FACTOR>((own + skip) * gate);
            y += a.stride;
            to += per_sequence;
        }
    }
}
