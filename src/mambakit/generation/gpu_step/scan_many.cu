// A step of the scan for many sequences; scan.cu has the equations.
//
// The states, in and out, are nearly all that is moved, so that memory has to be kept busy from
// beginning to end. A warp has 16 channels and walks over the block's sequences, TOGETHER at once,
// so that one's arithmetic fills the other's waits. States lie in a ring in shared memory, SLOTS
// such steps ahead, and the first of them are on their way before the block waits for the kernels
// before, on which they do not depend. A lane copies the pieces that it will use itself, so nobody
// waits for a neighbour.
//
// dt_proj is a product on the tensor cores, for eight sequences at a time, its weights in shared memory
// from first to last; they are asked for before the states, or they would come after them.
// The vectors of x_proj come in two short numbers each, the rounded one and what is left, so that
// no digits are lost that the weights have.
//
// -D gives what common.cuh says, of short WEIGHT and FACTOR; STATES, n, a multiple of 16; RANK, r;
// SPANS, in how many parts the sums of x_proj come; SEQUENCES, the most that a block has; TOGETHER,
// 1 or 2; SLOTS; KEPT, whether the weights are kept, or read again for each group. Channels are a
// multiple of 16.
#include "recurrence.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int TILE = 16; // channels of a warp
constexpr int CHANNELS = WARPS * TILE;
constexpr int GROUP = 8; // sequences that are multiplied at once

// A lane has four states of a channel, from state 4 t on, and likewise of the channel 8 further.
constexpr int QUADS = STATES / 16; // of states of a channel in a lane
constexpr int COPIES = 2 * QUADS;  // pieces of 16 bytes of a lane for one sequence
constexpr int SLOT_BYTES = TOGETHER * WARPS * COPIES * 32 * 16;

constexpr int COLUMNS = (RANK + 15) / 16 * 16; // of dt_proj in memory
constexpr int PIECES = (RANK + 31) / 32;       // in a lane, of a row of dt_proj
constexpr int DEPTH = 32 * PIECES;
constexpr int COUNT = RANK + 2 * STATES;
// The sums of a sequence, with low's padding, are read by LANES lanes, each EACH pieces of WIDE; by
// half a warp if registers hold so many.
constexpr int WIDE = RANK % 4 == 0 ? 4 : 1;
constexpr int PADDED = DEPTH + 2 * STATES;
constexpr int LANES = SEQUENCES > WARPS && (!KEPT || SPANS * ((PADDED + 63) / 64) <= 18) ? 16 : 32;
constexpr int EACH = (PADDED + LANES * WIDE - 1) / (LANES * WIDE);

// Rows lie so that eight lanes that read 16 bytes each do not meet in a bank.
constexpr int LOW_PITCH = DEPTH / 8 % 8 == 4 ? DEPTH : DEPTH + 32;
constexpr int STEP_PITCH = TILE + 1;

constexpr int LOW_ROWS = (SEQUENCES + GROUP - 1) / GROUP * GROUP;
constexpr int RING = SLOTS * SLOT_BYTES;
constexpr int STEPS_BYTES = WARPS * GROUP * STEP_PITCH * 8;
constexpr int LOW_BYTES = LOW_ROWS * LOW_PITCH * 2;
constexpr int WEIGHT_BYTES = KEPT ? WARPS * 2 * PIECES * 32 * 16 : 0;
// In this order: the ring, steps, low twice, weights, B and C.
constexpr int LOW_AT = RING + STEPS_BYTES, WEIGHTS_AT = LOW_AT + 2 * LOW_BYTES;
constexpr int BC_AT = WEIGHTS_AT + WEIGHT_BYTES;

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
    float* BC;              // (LOW_ROWS, 2 n)

    METHOD Low(unsigned char* shared)
        : rounded((FACTOR*)(shared + LOW_AT)), rest((FACTOR*)(shared + LOW_AT + LOW_BYTES)),
          BC((float*)(shared + BC_AT)) {}

    // Add up the spans; then FalconMamba's norms.
    METHOD void gather(const Arguments& a, long long first, int rows) const {
        constexpr int AT_ONCE = THREADS / LANES;
        const int lane = threadIdx.x % LANES;
#pragma unroll 1
        for (int j = 0; j < rows; j += AT_ONCE) {
            const int own = j + threadIdx.x / LANES;
            // beyond the last sequence, the last one's again, for nobody
            const float* from = a.sums + (first + min(own, rows - 1)) * COUNT;
            float parts[SPANS][EACH * WIDE];
#pragma unroll
            for (int s = 0; s < SPANS; s++) {
#pragma unroll
                for (int i = 0; i < EACH; i++)
                    read(from, place(i, lane), parts[s] + i * WIDE);
                from += a.capacity * COUNT;
            }
            float sum[EACH * WIDE] = {};
#pragma unroll
            for (int s = 0; s < SPANS; s++)
#pragma unroll
                for (int i = 0; i < EACH * WIDE; i++) sum[i] += parts[s][i];
            if (a.selection_eps != 0) normalise(sum, lane, (float)a.selection_eps);
            if (own < rows) keep(own, lane, sum);
        }
        __syncthreads();
    }

private:
    // Where a lane's piece i begins in low, its padding, B and C.
    METHOD static int place(int i, int lane) { return (LANES * i + lane) * WIDE; }

    METHOD static void read(const float* from, int at, float* to) {
#pragma unroll
        for (int k = 0; k < WIDE; k++) to[k] = 0;
        if (at >= PADDED || at >= RANK && at < DEPTH) return;
        from += at < DEPTH ? at : at - DEPTH + RANK;
        if constexpr (WIDE == 4)
            Sixteen<float>::widen(load_shared_cache((const uint4*)from), to);
        else
            *to = received(from);
    }

    METHOD void keep(int j, int lane, const float* sum) const {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int at = place(i, lane);
            const float* from = sum + i * WIDE;
            if (at < DEPTH) {
                short_ones(from, j * LOW_PITCH + at);
            } else if (at < PADDED) {
                float* to = BC + j * 2 * STATES + at - DEPTH;
                if constexpr (WIDE == 4)
                    *(float4*)to = float4{from[0], from[1], from[2], from[3]};
                else
                    *to = *from;
            }
        }
    }
    METHOD void short_ones(const float* from, int at) const {
        if constexpr (WIDE == 4) {
#pragma unroll
            for (int k = 0; k < 4; k += 2) {
                const unsigned int near = pack(from[k], from[k + 1], FACTOR{});
                float low, high;
                unpack(near, FACTOR{}, low, high);
                *(unsigned int*)(rounded + at + k) = near;
                *(unsigned int*)(rest + at + k) =
                    pack(from[k] - low, from[k + 1] - high, FACTOR{});
            }
        } else {
            rounded[at] = narrow<FACTOR>(*from);
            rest[at] = narrow<FACTOR>(*from - widen(rounded[at]));
        }
    }
    METHOD static void normalise(float* sum, int lane, float eps) {
#pragma unroll
        for (int part = 0; part < 3; part++) {
            float squares = 0;
#pragma unroll
            for (int i = 0; i < EACH * WIDE; i++)
                if (part_of(i / WIDE, lane) == part) squares = fmaf(sum[i], sum[i], squares);
#pragma unroll
            for (int mask = LANES / 2; mask > 0; mask /= 2) squares += shuffle_xor(squares, mask);
            const float inverse = 1.0f / sqrtf(squares / (part == 0 ? RANK : STATES) + eps);
#pragma unroll
            for (int i = 0; i < EACH * WIDE; i++)
                if (part_of(i / WIDE, lane) == part) sum[i] *= inverse;
        }
    }
    METHOD static int part_of(int i, int lane) {
        const int at = place(i, lane);
        return at < DEPTH ? 0 : at < DEPTH + STATES ? 1 : 2;
    }
};

// dt_proj of a warp's channels, and what else there is of each; a lane has rows g and g + 8, and of
// each the pieces from column 8 t on. raw is the product with the vectors of a group.
struct Projection {
    const WEIGHT* from;
    uint4* kept; // pieces of 16 bytes, each for the lane that asked for it
    float bias[2];

    METHOD Projection(
        const Arguments& a, unsigned char* shared, long long base, int warp, int lane
    ) {
        from = a.matrix + (base + lane / 4) * COLUMNS + 8 * (lane % 4);
        kept = (uint4*)(shared + WEIGHTS_AT) + warp * 2 * PIECES * 32 + lane;
    }

    METHOD void load(const Arguments& a, long long base, int g, int t) {
#pragma unroll
        for (int i = 0; KEPT && i < 2 * PIECES; i++)
            copy_async_16(kept + 32 * i, from + column(i), is_there(i, t));
#pragma unroll
        for (int half = 0; half < 2; half++) bias[half] = a.bias[base + 8 * half + g];
    }

    METHOD void multiply(const Low& low, int first, int g, int t, float* raw) const {
        float rest[4] = {};
        const int row = (first + g) * LOW_PITCH + 8 * t;
#pragma unroll
        for (int k = 0; k < 4; k++) raw[k] = 0;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            const uint4 upper = piece(2 * i, t), lower = piece(2 * i + 1, t);
            add(raw, upper, lower, *(const uint4*)(low.rounded + row + 32 * i));
            add(rest, upper, lower, *(const uint4*)(low.rest + row + 32 * i));
        }
#pragma unroll
        for (int k = 0; k < 4; k++) raw[k] += rest[k];
    }

private:
    // Piece i of a lane: number i / 2 of row g or of row g + 8.
    METHOD static constexpr int column(int i) { return 32 * (i / 2) + i % 2 * 8 * COLUMNS; }
    METHOD static bool is_there(int i, int t) {
        return COLUMNS % 32 == 0 || 32 * (i / 2) + 8 * t < COLUMNS;
    }
    METHOD uint4 piece(int i, int t) const {
        if (KEPT) return kept[32 * i];
        return is_there(i, t) ? *(const uint4*)(from + column(i)) : make_uint4(0, 0, 0, 0);
    }
    METHOD static void add(float* sum, uint4 upper, uint4 lower, uint4 with) {
        const unsigned int first[4] = {upper.x, lower.x, upper.y, lower.y};
        const unsigned int second[4] = {upper.z, lower.z, upper.w, lower.w};
        multiply_tiles(sum, first, with.x, with.y, FACTOR{});
        multiply_tiles(sum, second, with.z, with.w, FACTOR{});
    }
};

DEVICE FACTOR received_bits(const FACTOR* from) {
    return FACTOR{load_shared_cache((const unsigned short*)from)};
}

// u of a lane's channels and sequences, in the order of the product's sums. It is widened when it
// is used: that is what waits for it.
struct Inputs {
    FACTOR u[4];

    METHOD void load(
        const Arguments& a, long long base, long long first, int group, int rows, int g, int t
    ) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            // beyond the last sequence, the last one's, for nobody
            const long long row = first + min(group + 2 * t + k, rows - 1);
            const FACTOR* from = a.u + row * a.stride + base + g;
            u[k] = received_bits(from);
            u[2 + k] = received_bits(from + 8);
        }
    }
};

// What becomes of a lane's sums: each is of one channel and, of the sequences that are stepped
// together, of one. The gate comes a step ahead.
struct End {
    const FACTOR* gate;
    FACTOR* y;
    long long gate_step, y_step;
    float D, gate_bias;
    FACTOR next;

    METHOD End(const Arguments& a, long long row, long long c)
        : gate(a.gate + row * a.gate_stride + c), y(a.y + row * a.stride + c),
          gate_step(TOGETHER * a.gate_stride), y_step(TOGETHER * a.stride), D(a.D[c]),
          gate_bias(a.gate_bias ? a.gate_bias[c] : 0) {}

    METHOD void ask(bool there) {
        if (there) next = received_bits(gate);
        gate += gate_step;
    }
    METHOD void finish(float sum, float u, bool there, bool more) {
        const float opened = silu(widen(next) + gate_bias);
        ask(more);
        if (there) *y = narrow<FACTOR>(fmaf(D, u, sum) * opened);
        y += y_step;
    }
};

// Piece i of a lane: of channel g or g + 8, from state 4 t + 16 q on.
DEVICE constexpr int offset(int i, int g, int t) {
    return (8 * (i / QUADS) + g) * STATES + 16 * (i % QUADS) + 4 * t;
}

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

    // What no kernel before has a part in, and dt_proj first: copies come in their order.
    Projection projection(a, shared, base, warp, lane);
    float4 A[COPIES];
    const int own = TOGETHER == 2 ? t / 2 : 0;
    if (there) {
        projection.load(a, base, g, t);
#pragma unroll
        for (int i = 0; i < COPIES; i++)
            A[i] = *(const float4*)(a.A + base * STATES + offset(i, g, t));
    }
    End end(a, first + own, there ? base + 8 * (t % 2) + g : 0);
    copy_async_commit();
    float4* const ring = (float4*)shared + warp * COPIES * 32 + lane;
    constexpr int NEXT_SEQUENCE = WARPS * COPIES * 32, NEXT_SLOT = TOGETHER * NEXT_SEQUENCE;
    const float* from = (old_states ? old_states + begins : a.A) + offset(0, g, t);
    int asked = 0;
    const auto ask = [&](int slot) {
#pragma unroll
        for (int s = 0; s < TOGETHER; s++) {
            if (there && asked + s < rows) {
#pragma unroll
                for (int i = 0; i < COPIES; i++)
                    copy_async_16(
                        ring + slot * NEXT_SLOT + s * NEXT_SEQUENCE + 32 * i,
                        from + offset(i, 0, 0), old_states
                    );
            }
            from += per_sequence;
        }
        asked += TOGETHER;
        copy_async_commit();
    };
#pragma unroll 1
    for (int j = 0; j < SLOTS - 1; j++) ask(j);
    release_kernels();
    await_kernels();
    if (rows == 0) return;

    // At the end of a step a lane has one sum: of the first channel or, if odd, the second; and of
    // the first sequence or, if two are stepped together and t is, the second.
    const bool odd = t % 2;
    Inputs inputs;
    if (there) {
        inputs.load(a, base, first, 0, rows, g, t);
        end.ask(own < rows);
    }
    const Low low(shared);
    low.gather(a, first, rows);
    ask(SLOTS - 1); // not before, or the sums of x_proj would come after it
    if (!there) return;

    // dt and u of a sequence of the group and a channel
    float2* const steps = (float2*)(shared + RING) + warp * GROUP * STEP_PITCH;
    float* to = new_states + begins + offset(0, g, t);
    int slot = 0;
    copy_async_wait<SLOTS>();
#pragma unroll 1
    for (int group = 0; group < rows; group += GROUP) {
        float raw[4];
        projection.multiply(low, group, g, t, raw);
        __syncwarp(); // the group before has been read
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int half = k / 2;
            steps[(2 * t + k % 2) * STEP_PITCH + 8 * half + g] = float2{
                softplus(raw[k] + projection.bias[half]), widen(inputs.u[k])
            };
        }
        __syncwarp();
        if (SEQUENCES > GROUP) inputs.load(a, base, first, group + GROUP, rows, g, t);

        const int count = min(rows - group, GROUP);
#pragma unroll 1
        for (int j = 0; j < count; j += TOGETHER) {
            copy_async_wait<SLOTS - 1>();
            float4 h[TOGETHER][COPIES];
#pragma unroll
            for (int s = 0; s < TOGETHER; s++)
#pragma unroll
                for (int i = 0; i < COPIES; i++)
                    h[s][i] = ring[slot * NEXT_SLOT + s * NEXT_SEQUENCE + 32 * i];
            ask(slot);
            slot = slot + 1 == SLOTS ? 0 : slot + 1;

            float sum[TOGETHER][2] = {};
#pragma unroll
            for (int s = 0; s < TOGETHER; s++) {
                const float* B = low.BC + (group + j + s) * 2 * STATES + 4 * t;
#pragma unroll
                for (int i = 0; i < COPIES; i++) {
                    const int half = i / QUADS, q = i % QUADS;
                    const float2 step = steps[(j + s) * STEP_PITCH + 8 * half + g];
                    const float dt = step.x, input = dt * step.y;
                    const float4 with = *(const float4*)(B + 16 * q);
                    const float4 out = *(const float4*)(B + STATES + 16 * q);
                    float4& v = h[s][i];
                    v.x = fmaf(decay(dt, A[i].x), v.x, with.x * input);
                    v.y = fmaf(decay(dt, A[i].y), v.y, with.y * input);
                    v.z = fmaf(decay(dt, A[i].z), v.z, with.z * input);
                    v.w = fmaf(decay(dt, A[i].w), v.w, with.w * input);
                    if (j + s < count) *(float4*)(to + offset(i, 0, 0)) = v;
                    float all = sum[s][half];
                    all = fmaf(out.y, v.y, fmaf(out.x, v.x, all));
                    sum[s][half] = fmaf(out.w, v.w, fmaf(out.z, v.z, all));
                }
                to += per_sequence;
            }
            float part[TOGETHER];
#pragma unroll
            for (int s = 0; s < TOGETHER; s++)
                part[s] = select(odd, sum[s][1], sum[s][0]) +
                          shuffle_xor(select(odd, sum[s][0], sum[s][1]), 1);
            const float total = select(own, part[TOGETHER - 1], part[0]) +
                                shuffle_xor(select(own, part[0], part[TOGETHER - 1]), 2);
            const float u = steps[(j + own) * STEP_PITCH + 8 * (t % 2) + g].y;
            const int row = group + j + own;
            // of one sequence two lanes have the same sum
            end.finish(total, u, row < rows && (TOGETHER == 2 || t < 2), row + TOGETHER < rows);
        }
    }
}
