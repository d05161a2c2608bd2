// The selective scan forward:
//
//     h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t ;   y_t = (C_t . h_t + D x_t) silu(gate_t)
//
// Two ways through time, chosen by forward.py. Both read x, dt and gate once, write y once, keep
// h in registers and take time in tiles of TILE_STEPS.
//
//   scan_forward  A warp walks its channels' whole sequence. Least work; needs many channels.
//   scan_wide     WIDE warps of a block share one set of channels and take tiles in turn,
//                 all at once: each runs its tile from a state of zeros and keeps the decays in
//                 registers, learns the state that its tile starts from (the product of decays
//                 over a tile is exp(A sum dt)), and runs the tile again with it, without a
//                 second exponential. A third more work, WIDE times as many warps.
//
// For either, time may also be cut into chunks of blocks of their own, in one of two ways:
//
//   handed on  A block waits for the last state of the chunk before, whose blocks all have lower
//              indices. Blocks that are more than the GPU runs at once become shorter, so that
//              fewer are left for the end.
//   joined     For few channels: scan_states finds what each chunk does to a state of zeros,
//              scan_join chains these into the chunks' first states, and scan_forward runs all
//              chunks at once. Not for scan_wide, which has warps enough.
//
// In a pack a block takes a span of a list, a chunk of one sequence or all of it, and the same
// two ways join the chunks of a sequence.
//
// Beside what common.cuh is given, -D gives WIDE (warps side by side in time; 0: the kernels that
// walk), BLOCKS (that are meant to share a multiprocessor) and SHARED_BYTES (of a block).
#include "common.cuh"

// Warps side by side over channels, in a block that walks. They wait for each other at every
// tile, so few is better; they share rows of B and C, which are long for many states.
constexpr int CHANNEL_WARPS = STATES > 16 ? 4 : 2;
constexpr int STAGES = 2; // tiles on their way or in use
constexpr int GROUP = 4;  // steps whose sums over states are made together

// What Python passes; forward.py has the same list.
struct Arguments {
    Operands in;
    Rows y;
    real* last_state;  // (b, d, n)
    real* checkpoints; // (b, l / 2^checkpoint_bits, d, n) or null; see checkpoint_row for packs
    real* starts;      // (b, chunks, d, n): each chunk's first state; not used for one chunk
    real* sums;        // (b, chunks, d): of dt; where chunks are joined
    int* flags;        // one 0 for each warp with states of its own, or null: chunks are joined
    long long chunks, chunk_steps;
    long long blocks; // of channels in a group
    long long checkpoint_bits;
    // For packs, where (b, chunks) is one axis that Span::chunk counts. scan_states has spans that
    // others of their sequence follow; scan_join, for each sequence that is cut, one that says
    // which is its first chunk and, as `steps`, how many they are.
    const Span* spans;
    long long listed; // spans
};

// ---------------------------------------------------------------- shared memory of a warp

// A step and a pair of channels take four reals: dt and dt x of one, of the other. The second
// copy has the two channels turned, for the lanes that hold them so. The paddings keep pieces of
// 16 rows, and both copies, in different banks.
constexpr int COPY = 4 * PAIRS + 8;
constexpr int STEP_STRIDE = LANES_PER_CHANNEL > 1 ? 2 * COPY - 4 : COPY - 4;
constexpr int Y_STRIDE = WARP_CHANNELS + (WARP_CHANNELS == 8 ? 4 : 8);

// A tile's rows as they were stored, piece by piece in the order of the lanes that take them.
struct __align__(16) Stage {
    X_TYPE x[TILE_STEPS * WARP_CHANNELS];
    DT_TYPE dt[TILE_STEPS * WARP_CHANNELS];
    X_TYPE gate[GATE ? TILE_STEPS * WARP_CHANNELS : 8];
};

struct __align__(16) WarpShared {
    Stage stages[STAGES];
    real steps[TILE_STEPS * STEP_STRIDE];
    real y[TILE_STEPS * Y_STRIDE];
};

struct __align__(16) CoefficientShared {
    unsigned char tile[STAGES][COEFFICIENTS ? COEFFICIENT_TILE_BYTES : 16];
};

struct __align__(16) WalkShared {
    WarpShared warps[CHANNEL_WARPS];
    CoefficientShared coefficients;
};

#if WIDE
struct __align__(16) WideShared {
    WarpShared warps[WIDE];
    CoefficientShared coefficients[WIDE];
    // What each warp's tile does to a state: decay, then the state that zeros become.
    real decays[2][WIDE][32 * LANE_ELEMENTS], ends[2][WIDE][32 * LANE_ELEMENTS];
    real carry[2][32 * LANE_ELEMENTS]; // the state before the block's next tiles
};
static_assert(sizeof(WideShared) == SHARED_BYTES, "forward.py counts otherwise");
#else
static_assert(sizeof(WalkShared) == SHARED_BYTES, "forward.py counts otherwise");
#endif

// ---------------------------------------------------------------- states in registers

// The states of a lane's channels, from or to an array (d, n) whose row of the warp's first
// channel is `at`. Channels and states that do not exist are zeros.
DEVICE void load_states(const real* at, const Lane& lane, int count, real* to) {
#pragma unroll
    for (int c = 0; c < CHANNELS_PER_LANE; c++) {
        int channel = lane.channel(c);
        const real* row = at + (long long)channel * STATES + lane.state(0);
        if constexpr (STATES == PADDED_STATES) {
            Vector<real, STATES_PER_LANE> v{};
            if (channel < count) v = load_vector<real, STATES_PER_LANE>(row);
#pragma unroll
            for (int i = 0; i < STATES_PER_LANE; i++) to[c * STATES_PER_LANE + i] = v.at[i];
        } else {
#pragma unroll
            for (int i = 0; i < STATES_PER_LANE; i++)
                to[c * STATES_PER_LANE + i] =
                    channel < count && lane.state(i) < STATES ? row[i] : real(0);
        }
    }
}
DEVICE void store_states(real* at, const Lane& lane, int count, const real* from) {
#pragma unroll
    for (int c = 0; c < CHANNELS_PER_LANE; c++) {
        int channel = lane.channel(c);
        real* row = at + (long long)channel * STATES + lane.state(0);
        if (channel >= count) continue;
        if constexpr (STATES == PADDED_STATES) {
            store_vector<real, STATES_PER_LANE>(row, from + c * STATES_PER_LANE);
        } else {
#pragma unroll
            for (int i = 0; i < STATES_PER_LANE; i++)
                if (lane.state(i) < STATES) row[i] = from[c * STATES_PER_LANE + i];
        }
    }
}

// ---------------------------------------------------------------- one warp

// What a warp knows all the way. Pointers are to this lane's piece of the next tile to bring.
struct Warp {
    Lane lane;
    Piece piece;
    Channels channels;
    int count;                               // of the lane's piece that exists
    real A[LANE_ELEMENTS];                   // times log2 e
    real B[LANE_ELEMENTS], C[LANE_ELEMENTS]; // where they are constant
    real bias[PIECE], D[PIECE];
    const X_TYPE *x, *gate;
    const DT_TYPE* dt;
    const COEFFICIENT_TYPE *token_B, *token_C; // their rows

    METHOD Warp(
        const Operands& in, long long batch, long long group, long long slot, long long first_step
    )
        : lane(threadIdx.x % 32), piece(threadIdx.x % 32), channels(in, group, slot) {
        int left = channels.count - piece.channel;
        count = left < 0 ? 0 : left < PIECE ? left : PIECE;
        load_states(in.A + channels.first * STATES, lane, channels.count, A);
#pragma unroll
        for (int k = 0; k < LANE_ELEMENTS; k++) A[k] = times_log2e(A[k]);
        if constexpr (CONSTANT_B)
            load_states(in.B_constant + channels.first * STATES, lane, channels.count, B);
        if constexpr (CONSTANT_C)
            load_states(in.C_constant + channels.first * STATES, lane, channels.count, C);
        load_per_channel(in.dt_bias ? in.dt_bias + first_channel() : nullptr, count, bias);
        load_per_channel(in.D ? in.D + first_channel() : nullptr, count, D);
        long long row = first_step + piece.row;
        x = (const X_TYPE*)in.x.data + batch * in.x.batch + row * in.x.time + first_channel();
        dt = (const DT_TYPE*)in.dt.data + batch * in.dt.batch + row * in.dt.time + first_channel();
        if (GATE)
            gate = (const X_TYPE*)in.gate.data + batch * in.gate.batch + row * in.gate.time +
                   first_channel();
        if (TOKEN_B) token_B = coefficient_row(in.B, batch, group) + first_step * in.B.time;
        if (TOKEN_C) token_C = coefficient_row(in.C, batch, group) + first_step * in.C.time;
    }
    // The piece's first channel among all.
    METHOD long long first_channel() const { return channels.first + piece.channel; }
    METHOD void advance(const Operands& in, int steps) {
        x += steps * in.x.time, dt += steps * in.dt.time;
        if (GATE) gate += steps * in.gate.time;
        if (TOKEN_B) token_B += steps * in.B.time;
        if (TOKEN_C) token_C += steps * in.C.time;
    }
};

// Where a lane's piece of pass `pass` begins in a stage's arrays.
DEVICE int piece_start(int pass) { return (pass * 32 + (int)threadIdx.x % 32) * PIECE; }

// Start bringing a tile, of which `left` steps exist; the others become zeros.
template <bool OUTPUT>
DEVICE void fetch_tile(Stage& stage, const Operands& in, const Warp& warp, int left) {
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        int count = pass * ROWS_PER_PASS + warp.piece.row < left ? warp.count : 0;
        int at = piece_start(pass);
        fetch_piece(&stage.x[at], warp.x + pass * ROWS_PER_PASS * in.x.time, count);
        fetch_piece(&stage.dt[at], warp.dt + pass * ROWS_PER_PASS * in.dt.time, count);
        if (OUTPUT && GATE)
            fetch_piece(&stage.gate[at], warp.gate + pass * ROWS_PER_PASS * in.gate.time, count);
    }
}

// A bias with which a dt of zero becomes a step of zero.
constexpr real NO_STEP = SOFTPLUS ? -1e30 : 0;

// Turn a tile's dt and x into steps: dt and dt x, laid out for the recurrence. Steps that do not
// exist (from `left` on) get dt = 0, which changes no state. With `sums`, dt is added to those of
// the piece.
DEVICE void make_steps(
    WarpShared& shared, Warp& warp, const Stage& stage, int left, real* sums
) {
    if (left < TILE_STEPS && PASSES == 1) { // the chunk's last tile
#pragma unroll
        for (int i = 0; i < PIECE; i++)
            if (warp.piece.row >= left) warp.bias[i] = NO_STEP;
    }
    // Which of the two channels of its pair the piece's first is; a piece of all channels has both.
    const int second = PIECE <= PAIRS ? warp.piece.channel / PAIRS : 0;
    const int pair = PIECE <= PAIRS ? warp.piece.channel % PAIRS : 0;
    real* to = shared.steps + warp.piece.row * STEP_STRIDE + pair * 4 + second * 2;
    real* turned = to + COPY + 2 - second * 4;
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        real x[PIECE], dt[PIECE];
        widen_all<X_TYPE, PIECE>(&stage.x[piece_start(pass)], x);
        widen_all<DT_TYPE, PIECE>(&stage.dt[piece_start(pass)], dt);
        bool exists = pass * ROWS_PER_PASS + warp.piece.row < left;
#pragma unroll
        for (int i = 0; i < PIECE; i++) {
            real bias = PASSES == 1 || exists ? warp.bias[i] : NO_STEP;
            dt[i] = step_size(dt[i] + bias);
            if (sums) sums[i] += dt[i];
        }
        constexpr int BOTH = PIECE > PAIRS ? PAIRS : 0; // from a channel to the second of its pair
#pragma unroll
        for (int i = 0; i < (BOTH ? PAIRS : PIECE); i++) {
            const int at = pass * ROWS_PER_PASS * STEP_STRIDE + i * 4, j = i + BOTH;
            real first[4] = {dt[i], dt[i] * x[i], dt[j], dt[j] * x[j]};
            store_vector<real, BOTH ? 4 : 2>(to + at, first);
            real other[4] = {first[2], first[3], first[0], first[1]};
            if (LANES_PER_CHANNEL > 1)
                store_vector<real, BOTH ? 4 : 2>((BOTH ? to + COPY : turned) + at, other);
        }
    }
}

// B or C of a step for this lane: constant ones per channel, those of a token shared by both.
struct Coefficients {
    real at[LANE_ELEMENTS];
    METHOD Coefficients(
        const unsigned char* row, const real* constant, int which, const Lane& lane
    ) {
        if (which ? CONSTANT_C : CONSTANT_B) {
#pragma unroll
            for (int k = 0; k < LANE_ELEMENTS; k++) at[k] = constant[k];
        } else {
            widen_all<COEFFICIENT_TYPE, STATES_PER_LANE>(row + unit_offset(which, lane.part), at);
#pragma unroll
            for (int i = 0; i < STATES_PER_LANE; i++) at[STATES_PER_LANE + i] = at[i];
        }
    }
};

// What a lane reads of a step: dt and dt x of its channels 0 and 1.
struct Step {
    Vector<real, 4> v;
    METHOD Step(const WarpShared& shared, const Lane& lane, int t)
        : v(load_vector<real, 4>(
              shared.steps + t * STEP_STRIDE +
              (LANES_PER_CHANNEL > 1 ? lane.turned * COPY : 0) + lane.pair * 4
          )) {}
    METHOD real dt(int c) const { return v.at[2 * c]; }
    METHOD real dt_x(int c) const { return v.at[2 * c + 1]; }
};

// C . h over this lane's states, for its two channels.
DEVICE void read_states(const real* h, const Coefficients& C, real* y) {
#pragma unroll
    for (int c = 0; c < CHANNELS_PER_LANE; c++) {
        y[c] = C.at[c * STATES_PER_LANE] * h[c * STATES_PER_LANE];
#pragma unroll
        for (int i = 1; i < STATES_PER_LANE; i++)
            y[c] = multiply_add(C.at[c * STATES_PER_LANE + i], h[c * STATES_PER_LANE + i], y[c]);
    }
}

// Which of GROUP steps a lane is left with: its own half at each level.
DEVICE int first_kept_step(const Lane& lane) {
    int step = 0;
#pragma unroll
    for (int mask = 2, kept = GROUP / 2; mask < LANES_PER_CHANNEL && kept > 0; mask *= 2, kept /= 2)
        step += lane.part & mask ? kept : 0;
    return step;
}

// Sum C . h over the lanes of each channel, for GROUP steps, into rows of shared.y from `to` on.
// The first level adds the two channels of neighbouring lanes across; then half the lanes keep
// the sums of some steps and half of the others, as long as a lane has more than one.
DEVICE void sum_over_states(real* to, const Lane& lane, const real (*y)[2]) {
    if constexpr (LANES_PER_CHANNEL == 1) {
#pragma unroll
        for (int j = 0; j < GROUP; j++)
#pragma unroll
            for (int c = 0; c < CHANNELS_PER_LANE; c++)
                to[j * Y_STRIDE + lane.channel(c)] = y[j][c];
    } else {
        real sum[GROUP];
#pragma unroll
        for (int j = 0; j < GROUP; j++) sum[j] = y[j][0] + shuffle_xor(y[j][1], 1);
        int kept = GROUP;
#pragma unroll
        for (int mask = 2; mask < LANES_PER_CHANNEL; mask *= 2) {
            if (kept > 1) {
                kept /= 2;
                bool upper = lane.part & mask;
#pragma unroll
                for (int j = 0; j < kept; j++) {
                    real keep = select(upper, sum[j + kept], sum[j]);
                    real give = select(upper, sum[j], sum[j + kept]);
                    sum[j] = keep + shuffle_xor(give, mask);
                }
            } else {
                sum[0] += shuffle_xor(sum[0], mask);
            }
        }
        to += first_kept_step(lane) * Y_STRIDE + lane.channel(0);
#pragma unroll
        for (int j = 0; j < kept; j++) to[j * Y_STRIDE] = sum[j];
    }
}

// Finish a tile's outputs, piece by piece: the direct path, the gate, y's dtype. `y` is where
// the lane's piece goes.
DEVICE void write_outputs(
    const WarpShared& shared, const Warp& warp, const Stage& stage, X_TYPE* y, long long y_time,
    int left
) {
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        int row = pass * ROWS_PER_PASS + warp.piece.row;
        real x[PIECE], out[PIECE];
        widen_all<X_TYPE, PIECE>(&stage.x[piece_start(pass)], x);
        Vector<real, PIECE> sum =
            load_vector<real, PIECE>(shared.y + row * Y_STRIDE + warp.piece.channel);
#pragma unroll
        for (int i = 0; i < PIECE; i++) out[i] = multiply_add(warp.D[i], x[i], sum.at[i]);
        if constexpr (GATE) {
            real gate[PIECE];
            widen_all<X_TYPE, PIECE>(&stage.gate[piece_start(pass)], gate);
#pragma unroll
            for (int i = 0; i < PIECE; i++) out[i] *= silu_for(gate[i], X_TYPE{});
        }
        store_piece(y + pass * ROWS_PER_PASS * y_time, out, row < left ? warp.count : 0);
    }
}

// Where a block is: blocks of channels fastest, so that those in flight share rows of B and C,
// and chunks slowest.
struct Task {
    long long slot, group;
#if PACKED
    const Span* span; // what is in it is read when it is asked for, and takes no registers
    METHOD explicit Task(const Arguments& a) {
        long long i = blockIdx.x;
        slot = i % a.blocks, i /= a.blocks;
        group = i % a.in.g, span = a.spans + i / a.in.g;
    }
    METHOD long long sequence() const { return span->sequence; }
    METHOD long long begin(const Arguments&) const { return span->begin; }
    METHOD int steps(const Arguments&, long long) const { return span->steps; }
    METHOD bool starts() const { return span->before == 0; }
    METHOD bool ends(const Arguments&) const { return span->after == 0; }
    METHOD long long chunk_row(const Arguments&, int later) const { return span->chunk + later; }
    METHOD long long flag(const Arguments& a, int chunks_before) const {
        return ((span->chunk - chunks_before) * a.in.g + group) * a.blocks + slot;
    }
#else
    long long batch, chunk;
    METHOD explicit Task(const Arguments& a) {
        long long i = blockIdx.x;
        slot = i % a.blocks, i /= a.blocks;
        group = i % a.in.g, i /= a.in.g;
        batch = i % a.in.b, chunk = i / a.in.b;
    }
    METHOD long long sequence() const { return batch; }
    METHOD long long begin(const Arguments& a) const { return chunk * a.chunk_steps; }
    METHOD int steps(const Arguments& a, long long begin) const {
        return (int)min(a.in.l - begin, a.chunk_steps);
    }
    // Whether it is the first or the last chunk of its sequence.
    METHOD bool starts() const { return chunk == 0; }
    METHOD bool ends(const Arguments& a) const { return chunk == a.chunks - 1; }
    // Where it is among the rows of `starts` and `sums`, or the one that comes so much later.
    METHOD long long chunk_row(const Arguments& a, int later) const {
        return batch * a.chunks + (chunk + later);
    }
    // Which flag, of all blocks', is its own or that of the chunk before.
    METHOD long long flag(const Arguments& a, int chunks_before) const {
        return blockIdx.x - chunks_before * a.blocks * a.in.g * a.in.b;
    }
#endif
};

// The flag of this warp's states in a block.
DEVICE int* flag_of(const Arguments& a, long long block) {
    return a.flags + (WIDE ? block : block * CHANNEL_WARPS + threadIdx.x / 32);
}

// The row of the warp's first channel in an array (rows, d, n).
DEVICE long long state_row(const Arguments& a, const Warp& warp, long long row) {
    return (row * a.in.d + warp.channels.first) * STATES;
}

// h comes in as zeros.
DEVICE void load_first_state(const Arguments& a, const Warp& warp, const Task& task, real* h) {
    const real* from;
    if (task.starts()) {
        if (!a.in.state) return;
        from = a.in.state + state_row(a, warp, task.sequence());
    } else {
        if (a.flags) await(flag_of(a, task.flag(a, 1)));
        from = a.starts + state_row(a, warp, task.chunk_row(a, 0));
    }
    load_states(from, warp.lane, warp.channels.count, h);
}

// The state after the task's steps goes to the caller or to the next chunk.
DEVICE void leave_state(const Arguments& a, const Warp& warp, const Task& task, const real* h) {
    if (task.ends(a)) {
        real* to = a.last_state + state_row(a, warp, task.sequence());
        store_states(to, warp.lane, warp.channels.count, h);
        if (PACKED && a.checkpoints) {
            // The room of a sequence is known before its length, and may be one more than it needs;
            // nobody should find there what was in memory before.
            const long long begin = task.begin(a);
            const int steps = task.steps(a, begin), bits = (int)a.checkpoint_bits;
            const long long first = checkpoint_row(a.in, task.sequence(), begin, bits);
            const long long needed = first + ((steps - 1) >> bits);
            const long long room = checkpoint_row(a.in, task.sequence(), begin + steps, bits);
            to = a.checkpoints + state_row(a, warp, room);
            if (needed < room) store_states(to, warp.lane, warp.channels.count, h);
        }
    } else if (a.flags) {
        real* to = a.starts + state_row(a, warp, task.chunk_row(a, 1));
        store_states(to, warp.lane, warp.channels.count, h);
        publish(flag_of(a, task.flag(a, 0)));
    }
}

// Where the lane's piece of step `first` goes.
DEVICE X_TYPE* first_output(
    const Arguments& a, const Warp& warp, const Task& task, long long first
) {
    return (X_TYPE*)a.y.data + task.sequence() * a.y.batch + (first + warp.piece.row) * a.y.time +
           warp.first_channel();
}

// Save the state before a step, number `first` of the task's, if it is one to be saved.
DEVICE void save_checkpoint(
    const Arguments& a, const Warp& warp, const Task& task, long long step, int first,
    const real* h
) {
    if (PACKED) step = task.begin(a) + first; // asked anew, it takes no registers
    const int bits = (int)a.checkpoint_bits, between = (1 << bits) - 1;
    if (!a.checkpoints || ((int)(PACKED ? first : step) & between) != 0) return;
    const long long row = checkpoint_row(a.in, task.sequence(), step, bits);
    store_states(a.checkpoints + state_row(a, warp, row), warp.lane, warp.channels.count, h);
}

// ---------------------------------------------------------------- warps that walk through time

#if !WIDE
// Groups in a row without a branch. exp of a double is a long function.
constexpr int UNROLLED = sizeof(real) == 4 ? 4 : 1;

// OUTPUT: y, the last state and checkpoints, from each chunk's first state. Otherwise only what
// the chunk makes of zeros, into starts, and sums of dt.
template <bool OUTPUT> DEVICE void walk(const Arguments& a, WalkShared& block) {
    const Operands& in = a.in;
    const Task task(a);
    const long long begin = task.begin(a);
    const int steps = task.steps(a, begin);
    const int w = threadIdx.x / 32;
    Warp warp(in, task.sequence(), task.group, task.slot * CHANNEL_WARPS + w, begin);
    WarpShared& shared = block.warps[w];

    real sums[PIECE] = {}, h[LANE_ELEMENTS] = {};
    X_TYPE* y = first_output(a, warp, task, begin);

    auto fetch = [&](int stage, int left) {
        fetch_tile<OUTPUT>(shared.stages[stage], in, warp, left);
        fetch_coefficients<CHANNEL_WARPS * 32>(
            block.coefficients.tile[stage], warp.token_B, warp.token_C, in.B.time, in.C.time, left,
            threadIdx.x
        );
        copy_async_commit();
        warp.advance(in, TILE_STEPS);
    };
    fetch(0, steps);
    if (OUTPUT) load_first_state(a, warp, task, h);
    int stage = 0;
#pragma unroll 1
    for (int first = 0; first < steps; first += TILE_STEPS, stage ^= 1) {
        const int left = steps - first;
        copy_async_wait<0>();
        make_steps(shared, warp, shared.stages[stage], left, OUTPUT ? nullptr : sums);
        if (OUTPUT) save_checkpoint(a, warp, task, begin + first, first, h);
        // B and C are there for all warps, and all have left the other stage.
        __syncthreads();
        fetch(stage ^ 1, left - TILE_STEPS);
        const unsigned char* rows = block.coefficients.tile[stage];
#pragma unroll UNROLLED
        for (int t = 0; t < TILE_STEPS; t += GROUP) {
            real y_part[GROUP][2];
#pragma unroll
            for (int j = 0; j < GROUP; j++) {
                const Step step(shared, warp.lane, t + j);
                const unsigned char* row = rows + (t + j) * COEFFICIENT_ROW_BYTES;
                const Coefficients B(row, warp.B, 0, warp.lane);
#pragma unroll
                for (int k = 0; k < LANE_ELEMENTS; k++) {
                    int c = k / STATES_PER_LANE;
                    real decay = decay_of(step.dt(c), warp.A[k]);
                    h[k] = multiply_add(decay, h[k], step.dt_x(c) * B.at[k]);
                }
                if (OUTPUT) read_states(h, Coefficients(row, warp.C, 1, warp.lane), y_part[j]);
            }
            if (OUTPUT) sum_over_states(shared.y + t * Y_STRIDE, warp.lane, y_part);
        }
        __syncwarp();
        if (OUTPUT) {
            write_outputs(shared, warp, shared.stages[stage], y, a.y.time, left);
            y += TILE_STEPS * a.y.time;
        }
    }
    copy_async_wait<0>();
    if (!OUTPUT) {
        store_states(
            a.starts + state_row(a, warp, task.chunk_row(a, 0)), warp.lane,
            warp.channels.count, h
        );
        real* to = a.sums + task.chunk_row(a, 0) * in.d + warp.first_channel();
#pragma unroll
        for (int i = 0; i < PIECE; i++) {
            // over the lanes that have the same piece of other rows
#pragma unroll
            for (int mask = PIECES_PER_ROW; mask < 32; mask *= 2)
                sums[i] += shuffle_xor(sums[i], mask);
            if (warp.piece.row == 0 && i < warp.count) to[i] = sums[i];
        }
    } else {
        leave_state(a, warp, task, h);
    }
}

KERNEL(CHANNEL_WARPS * 32, BLOCKS) scan_forward(const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(memory);
    walk<true>(a, *(WalkShared*)memory);
}

KERNEL(CHANNEL_WARPS * 32, BLOCKS) scan_states(const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(memory);
    walk<false>(a, *(WalkShared*)memory);
}

// Chain the chunks: a thread takes one state of one channel through all of them, and turns what
// each chunk makes of zeros into the state that it starts from.
KERNEL(256, 1) scan_join(const __grid_constant__ Arguments a) {
    const long long row = a.in.d * STATES, i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= (PACKED ? a.listed : a.in.b) * row) return;
    const long long batch = i / row, k = i % row;
    const real A = times_log2e(a.in.A[k]);
#if PACKED
    const Span of = a.spans[batch];
    real h = a.in.state ? a.in.state[of.sequence * row + k] : real(0);
    for (long long at = of.chunk; at < of.chunk + of.steps; at++) {
#else
    real h = a.in.state ? a.in.state[i] : real(0);
    for (long long chunk = 0; chunk < a.chunks; chunk++) {
        const long long at = batch * a.chunks + chunk;
#endif
        const real end = a.starts[at * row + k];
        a.starts[at * row + k] = h;
        h = multiply_add(decay_of(a.sums[at * a.in.d + k / STATES], A), h, end);
    }
}

#else
// ---------------------------------------------------------------- warps side by side in time

constexpr int CHUNK_REALS = LANE_ELEMENTS < 4 ? LANE_ELEMENTS : 4; // a lane's, side by side

// A lane's elements to or from an array of the whole warp's.
DEVICE void store_lane(real* to, const real* from) {
    to += threadIdx.x % 32 * CHUNK_REALS;
#pragma unroll
    for (int k = 0; k < LANE_ELEMENTS; k += CHUNK_REALS)
        store_vector<real, CHUNK_REALS>(to + k * 32, from + k);
}
DEVICE void load_lane(const real* from, real* to) {
    from += threadIdx.x % 32 * CHUNK_REALS;
#pragma unroll
    for (int k = 0; k < LANE_ELEMENTS; k += CHUNK_REALS) {
        Vector<real, CHUNK_REALS> v = load_vector<real, CHUNK_REALS>(from + k * 32);
#pragma unroll
        for (int i = 0; i < CHUNK_REALS; i++) to[k + i] = v.at[i];
    }
}

KERNEL(WIDE * 32, BLOCKS) scan_wide(const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(memory);
    WideShared& block = *(WideShared*)memory;
    constexpr int ROUND = WIDE * TILE_STEPS;
    const Operands& in = a.in;
    const Task task(a);
    const long long begin = task.begin(a);
    const int steps = task.steps(a, begin);
    const int w = threadIdx.x / 32;
    const int own = w * TILE_STEPS; // the warp's first step in a round
    Warp warp(in, task.sequence(), task.group, task.slot, begin + own);
    WarpShared& shared = block.warps[w];
    auto& tiles = block.coefficients[w].tile;

    X_TYPE* y = first_output(a, warp, task, begin + own);

    auto fetch = [&](int stage, int left) {
        fetch_tile<true>(shared.stages[stage], in, warp, left);
        fetch_coefficients<32>(
            tiles[stage], warp.token_B, warp.token_C, in.B.time, in.C.time, left, threadIdx.x % 32
        );
        copy_async_commit();
        warp.advance(in, ROUND);
    };
    fetch(0, steps - own);
    if (w == 0) {
        real h[LANE_ELEMENTS] = {};
        load_first_state(a, warp, task, h);
        store_lane(block.carry[0], h);
    }
    int stage = 0;
#pragma unroll 1
    for (int round = 0; round < steps; round += ROUND, stage ^= 1) {
        const int left = steps - round - own;
        copy_async_wait<0>();
        make_steps(shared, warp, shared.stages[stage], left, nullptr);
        __syncwarp(); // steps, B and C are there for all lanes, and all have left the other stage
        fetch(stage ^ 1, left - ROUND);

        const unsigned char* rows = tiles[stage];
        real decay[TILE_STEPS][LANE_ELEMENTS], sum[CHANNELS_PER_LANE] = {};
        real h[LANE_ELEMENTS] = {}; // what the tile makes of zeros
#pragma unroll
        for (int t = 0; t < TILE_STEPS; t++) {
            const Step step(shared, warp.lane, t);
            const Coefficients B(rows + t * COEFFICIENT_ROW_BYTES, warp.B, 0, warp.lane);
#pragma unroll
            for (int c = 0; c < CHANNELS_PER_LANE; c++) sum[c] += step.dt(c);
#pragma unroll
            for (int k = 0; k < LANE_ELEMENTS; k++) {
                int c = k / STATES_PER_LANE;
                decay[t][k] = decay_of(step.dt(c), warp.A[k]);
                h[k] = multiply_add(decay[t][k], h[k], step.dt_x(c) * B.at[k]);
            }
        }
        real whole[LANE_ELEMENTS];
#pragma unroll
        for (int k = 0; k < LANE_ELEMENTS; k++)
            whole[k] = decay_of(sum[k / STATES_PER_LANE], warp.A[k]);
        store_lane(block.decays[stage][w], whole);
        store_lane(block.ends[stage][w], h);
        // One barrier a round is enough: what is written for the next round lies in the other
        // half, which all have left who came here.
        __syncthreads();

        real start[LANE_ELEMENTS];
        load_lane(block.carry[stage], start);
#pragma unroll 1
        for (int before = 0; before < w; before++) {
            real decays[LANE_ELEMENTS], ends[LANE_ELEMENTS];
            load_lane(block.decays[stage][before], decays);
            load_lane(block.ends[stage][before], ends);
#pragma unroll
            for (int k = 0; k < LANE_ELEMENTS; k++)
                start[k] = multiply_add(decays[k], start[k], ends[k]);
        }
        if (w == WIDE - 1) {
#pragma unroll
            for (int k = 0; k < LANE_ELEMENTS; k++) h[k] = multiply_add(whole[k], start[k], h[k]);
            store_lane(block.carry[stage ^ 1], h);
            if (round + ROUND >= steps) leave_state(a, warp, task, h);
        }
        if (left > 0) save_checkpoint(a, warp, task, begin + round + own, round + own, start);

#pragma unroll
        for (int t = 0; t < TILE_STEPS; t += GROUP) {
            real y_part[GROUP][2];
#pragma unroll
            for (int j = 0; j < GROUP; j++) {
                const Step step(shared, warp.lane, t + j);
                const unsigned char* row = rows + (t + j) * COEFFICIENT_ROW_BYTES;
                const Coefficients B(row, warp.B, 0, warp.lane);
#pragma unroll
                for (int k = 0; k < LANE_ELEMENTS; k++)
                    start[k] = multiply_add(
                        decay[t + j][k], start[k], step.dt_x(k / STATES_PER_LANE) * B.at[k]
                    );
                read_states(start, Coefficients(row, warp.C, 1, warp.lane), y_part[j]);
            }
            sum_over_states(shared.y + t * Y_STRIDE, warp.lane, y_part);
        }
        __syncwarp();
        write_outputs(shared, warp, shared.stages[stage], y, a.y.time, left);
        y += ROUND * a.y.time;
    }
    copy_async_wait<0>();
}
#endif
