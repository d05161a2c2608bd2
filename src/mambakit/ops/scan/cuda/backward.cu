// The gradients of the selective scan. With h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, gradients
// dy'_t = dy_t silu(gate_t) that arrive at C_t . h_t + D x_t, and G the gradient that arrives at
// h_{t-1} from later steps:
//
//     dh = C_t dy'_t + G                  dC_t = sum over channels of dy'_t h_t
//     G  = exp(dt_t A) dh                 dB_t = sum over channels of dh dt_t x_t
//     q  = G h_{t-1}                      dA   = sum over steps of q dt_t
//     dx_t  = dt_t (dh . B_t) + D dy'_t   ddt_t = x_t (dh . B_t) + q . A
//
// So states are needed from the first step to the last, gradients run from the last to the first.
// Forward saved the state before every CHECKPOINT_STEPS steps; what lies between is run again.
//
// scan_backward does both at once. A block owns WALKERS sets of a warp's channels. Its first
// WALKERS warps, the walkers, each take one set back through time, a tile of TILE steps in a
// period. The others, the runners, are ahead of them: they run states forward from checkpoints,
// SETS_PER_RUNNER sets each, and leave in shared memory dt, dt x and the state before each GROUP
// steps. A walker runs a group of steps again from there, keeps its states and decays in
// registers, and walks back. Runners also stage B and C and add up the walkers' parts of dB and
// dC, so that a walker, of which a multiprocessor holds few, does only what must be done in turn.
// There are half as many runners as walkers, or as many where they can give registers away that
// walkers need (HAND_OVER). With one state a channel all this is not needed: see one_state.cuh.
//
// Shared memory keeps two tiles of a checkpoint, or half of them if that is more, and one of the
// next. If a checkpoint has but two, runners make one in each period, and walkers take them from
// the last to the first:
//
//     period       -2     -1      0      1      2      3      4 ...
//     runners       0      1      0      1      0      1      0
//     walkers                     1      0      1      0      1
//
// Of more tiles runners take the first half twice (TWICE): through it to the second half, whose
// tiles they keep, and later again to keep them. With four:
//
//     period       -2      -1      0      1      2      3      4 ...
//     runners   0, 1*    2, 3      0      1   0, 1*   2, 3     0       (* passed through)
//     walkers                      3      2      1      0      3
//
// Time may also be cut into chunks of blocks of their own, in one of three ways:
//
//   handed on  A block waits for the gradient that the chunk after it sends back; that chunk's
//              blocks have lower indices. Blocks that are more than the GPU runs at once become
//              shorter, so that fewer are left for the end.
//   joined     For few channels: scan_carries finds what gradient each chunk sends back of
//              nothing, scan_join_back chains these, and scan_backward runs all chunks at once.
//   tail       If chunks take several rounds of blocks, the first chunks of time, as many as there
//              are rounds, are handed on and the others joined: each round works on one of the
//              tail, whose gradient the round before has sent, and scan_carries has less to do.
//
// In a pack a block takes a share of a list of spans, each a sequence or a chunk of one, and one
// after another; chunks are joined.
//
// scan_add adds the blocks' parts of gradients that are sums over channels, batch or chunks,
// always in the same order.
#include "common.cuh"

// -D gives also CHECKPOINT_STEPS, 32 or 64; TILE, steps of a tile: 16, or 8 or 4 where there is
// little shared memory; WALKERS; HAND_OVER, 1 if there are as many runners, whose registers to
// spare walkers take; STORED_BUFFERS, tiles of a walker's operands on their way or in use;
// SEVERAL_PASSES, 0 if `passes` is 1; ONE_STATE, 1 if one_state.cuh does scan_backward's work;
// CARRY_WARPS, warps of a block of scan_carries; BLOCKS and CARRY_BLOCKS, for how many blocks of
// the two a multiprocessor has registers.
constexpr int GROUP = 4; // steps whose states and decays a walker has in registers
constexpr int GROUPS = TILE / GROUP;
constexpr int TILES = CHECKPOINT_STEPS / TILE; // of a checkpoint
constexpr int CHECKPOINT_BITS = CHECKPOINT_STEPS == 64 ? 6 : 5;
static_assert(1 << CHECKPOINT_BITS == CHECKPOINT_STEPS, "32 or 64");
static_assert(TILES >= 2 && (TILES & (TILES - 1)) == 0, "periods are cut as above");
// Whether runners take some of them twice, and how many are kept at once.
constexpr bool TWICE = TILES > 2;
constexpr int KEPT = TWICE ? TILES / 2 : TILES;

constexpr int RUNNERS = HAND_OVER ? WALKERS : WALKERS < 2 ? 1 : WALKERS / 2;
// Registers of a thread; all together are what a multiprocessor has.
constexpr int WALKER_REGISTERS = 168, RUNNER_REGISTERS = 88;
constexpr int SETS_PER_RUNNER = WALKERS / RUNNERS;
constexpr int THREADS = ONE_STATE ? 32 : 32 * (WALKERS + RUNNERS);

// What Python passes; backward.py has the same list.
struct Arguments {
    Operands in;
    Rows dy;
    const real* checkpoints; // (b, l / CHECKPOINT_STEPS, d, n); see checkpoint_row for packs
    const real* dlast_state; // (b, d, n), or (sequences, d, n), or null
    Rows dx, ddt, dgate, dB, dC;
    real* dstate; // likewise
    // Each block's parts: of dB and dC per token (columns, b, l, SUMS), and of what is one number
    // per channel or state (b, chunks, ROW): dA, dD, ddt_bias, constant dB, constant dC. Of packs
    // `chunks` counts the blocks' shares.
    real *token_parts, *parts;
    // Of parts over b and chunks; the constants' are null where B, C are given by token.
    real *dA, *dD, *ddt_bias, *dB_constant, *dC_constant;
    real* carries; // (b, chunks, d, n): the gradient that reaches each chunk; for several chunks
    real* dt_sums; // (b, chunks, d); where chunks are joined
    int* flags;    // a 0 for each set of channels and chunk of the tail
    // The first chunk, which is worked on last, may have fewer steps than the others. The first
    // `tail` chunks, at least one, hand on; the others are joined.
    long long chunks, chunk_steps, first_steps, tail;
    // A block takes `passes` times WALKERS sets of channels, one after another; `columns` such
    // blocks lie side by side over the channels of a group.
    long long columns, passes;
    // For packs, where (b, chunks) of carries and dt_sums is one axis that Span::chunk counts.
    // scan_backward has all spans, and in `bins` which is the first of each share, and at last
    // their number. scan_carries has spans that follow others of their sequence; scan_join_back,
    // for each sequence that is cut, one that says which is its first chunk and, as `steps`, how
    // many they are.
    const Span* spans;
    long long listed; // spans
    const long long* bins;
};

// ---------------------------------------------------------------- lanes

// B and C lie in shared memory in COPIES orders of each lane's states, and a lane holds the states
// in the order that its pair's lowest bits say. As with the two channels (Lane::turned), sums
// over pairs then add one lane's register to another's without selecting.
constexpr int COPIES =
    PADDED_STATES >= 64 || sizeof(real) > 4 ? 1 : STATES_PER_LANE;

struct OrderedLane : Lane {
    int order;
    METHOD explicit OrderedLane(int lane) : Lane(lane), order(pair % COPIES) {}
    METHOD int state(int i) const { return part * STATES_PER_LANE + (i ^ order); }
};

// Where every state exists nobody need ask. The loop over spans has no registers for answers.
constexpr bool NO_PADDING = PACKED && STATES == PADDED_STATES;

// The states of a lane's channels, from or to an array (d, n) whose row of the set's first
// channel is `at`. Channels and states that do not exist are zeros.
template <class AnyLane>
DEVICE void get_states(const real* at, const AnyLane& lane, int count, real* to) {
#pragma unroll
    for (int k = 0; k < LANE_ELEMENTS; k++) {
        int channel = lane.channel(k / STATES_PER_LANE), state = lane.state(k % STATES_PER_LANE);
        bool exists = channel < count && (NO_PADDING || state < STATES);
        to[k] = exists ? at[(long long)channel * STATES + state] : real(0);
    }
}
template <class AnyLane>
DEVICE void put_states(real* at, const AnyLane& lane, int count, const real* from) {
#pragma unroll
    for (int k = 0; k < LANE_ELEMENTS; k++) {
        int channel = lane.channel(k / STATES_PER_LANE), state = lane.state(k % STATES_PER_LANE);
        if (channel < count && (NO_PADDING || state < STATES)) at[(long long)channel * STATES + state] = from[k];
    }
}
DEVICE void clear(real* values) {
#pragma unroll
    for (int k = 0; k < LANE_ELEMENTS; k++) values[k] = 0;
}

// ---------------------------------------------------------------- shared memory

constexpr int STATE_SLOTS = KEPT + 1;
// A step: two reals for each channel, and a pad that keeps 16 rows in different banks.
constexpr int PAIR_STRIDE = 2 * WARP_CHANNELS + 2;
constexpr int SUMS = COEFFICIENTS * PADDED_STATES; // of dB and dC at a step
// A group's sums take the place of the group's first states where there is room.
constexpr bool SUMS_OVER_STATES = GROUP * SUMS <= 32 * LANE_ELEMENTS;
constexpr int STORED_BYTES =
    TILE * WARP_CHANNELS * (sizeof(X_TYPE) > sizeof(DT_TYPE) ? sizeof(X_TYPE) : sizeof(DT_TYPE));
enum { X_OR_DX, GATE_OR_DDT, DY_OR_DGATE };
// Tensors whose rows a set reads and writes.
enum { X, GATES, DY, DX, DDT, DGATE, RUNNERS_X, RUNNERS_DT, TENSORS };

struct __align__(16) SetShared {
    real states[STATE_SLOTS][GROUPS][32 * LANE_ELEMENTS]; // before each group, lane by lane
    real steps[STATE_SLOTS][TILE * PAIR_STRIDE];          // dt, dt x
    real outputs[TILE * PAIR_STRIDE];                     // dy', and dgate for an output of 1
    // As they are in global memory: what comes in, and what goes out in the same place.
    __align__(16) unsigned char stored[STORED_BUFFERS][3][STORED_BYTES];
    real sums[SUMS_OVER_STATES ? 4 : TILE * SUMS];
    // Where in each tensor the set's channels lie at the chunk's first step. Kept here they cost
    // no registers.
    long long rows[TENSORS];
    long long first; // its first channel
    int channels;    // how many of its channels exist
    real D[WARP_CHANNELS];
};

// A copy begins in a bank where the lanes that read it together with others meet none of them.
constexpr int COPY_REALS = TILE * PADDED_STATES + (PADDED_STATES < 32 ? PADDED_STATES : 0);
// What is staged for a period: for walkers B and C of their tile, for runners B of up to two.
enum { WALKERS_B, WALKERS_C, RUNNERS_B, ROLES = RUNNERS_B + 1 + TWICE };

// Where a chunk begins. Of packs spans say it.
DEVICE long long begin_of(const Arguments& a, long long chunk) {
    return chunk > 0 ? a.first_steps + (chunk - 1) * a.chunk_steps : 0;
}

// What a block works on.
struct __align__(16) Place {
    long long column, group, chunk, batch, begin; // batch: the sequence, of a pack too
    int steps, periods; // of the chunk
    int pass;
#if PACKED
    bool is_first, is_last; // of its sequence
    bool adds; // to what the share's spans before it left
    bool is_over;
    int share, span; // the block's, and which of the list

    METHOD void find(const Arguments& a) {
        long long i = blockIdx.x;
        column = i % a.columns, i /= a.columns;
        group = i % a.in.g, i /= a.in.g;
        pass = 0, adds = false;
        share = (int)i, span = (int)a.bins[i];
        take(a);
    }
    METHOD void take(const Arguments& a) {
        const Span found = a.spans[span];
        batch = found.sequence, chunk = found.chunk, begin = found.begin, steps = found.steps;
        is_first = found.before == 0, is_last = found.after == 0;
        periods = (steps + CHECKPOINT_STEPS - 1) / CHECKPOINT_STEPS * TILES;
    }
    // Go on to the next pass or the next span.
    METHOD void next(const Arguments& a) {
        is_over = false;
        if (++pass < a.passes) return;
        pass = 0, adds = true;
        is_over = ++span == a.bins[share + 1];
        if (!is_over) take(a);
    }
    METHOD bool over(const Arguments&) const { return is_over; }
    METHOD bool starts() const { return is_first; }
    METHOD bool ends(const Arguments&) const { return is_last; }
    METHOD bool awaits(const Arguments&) const { return false; }
    METHOD bool hands_on(const Arguments&) const { return false; }
    METHOD long long chunk_row(const Arguments&) const { return chunk; }
    METHOD long long parts_row(const Arguments&) const { return share; }
    // The row of the batch among those of parts per token.
    METHOD long long token_row() const { return 0; }
#else
    METHOD void find(const Arguments& a) {
        // As many rounds of blocks, about alike, as the tail has chunks: in each one of these, so
        // that it is done when the next one begins, and beside it some of those that are joined.
        const long long chunk_blocks = a.columns * a.in.g * a.in.b, all = a.chunks * chunk_blocks;
        long long i = blockIdx.x;
        const long long round = ((i + 1) * a.tail - 1) / all, within = i - round * all / a.tail;
        if (within < chunk_blocks) {
            chunk = a.tail - 1 - round, i = within;
        } else {
            i -= (round + 1) * chunk_blocks; // among all that are joined
            chunk = a.chunks - 1 - i / chunk_blocks, i %= chunk_blocks;
        }
        column = i % a.columns, i /= a.columns;
        group = i % a.in.g, batch = i / a.in.g;
        pass = 0;
        begin = begin_of(a, chunk);
        steps = (int)min(a.in.l - begin, chunk ? a.chunk_steps : a.first_steps);
        periods = (steps + CHECKPOINT_STEPS - 1) / CHECKPOINT_STEPS * TILES;
    }
    METHOD void next(const Arguments&) { pass++; }
    METHOD bool over(const Arguments& a) const { return pass == a.passes; }
    METHOD bool starts() const { return chunk == 0; }
    METHOD bool ends(const Arguments& a) const { return chunk == a.chunks - 1; }
    METHOD bool awaits(const Arguments& a) const { return chunk + 1 < a.tail; }
    METHOD bool hands_on(const Arguments& a) const { return 0 < chunk && chunk < a.tail; }
    METHOD long long chunk_row(const Arguments& a) const { return batch * a.chunks + chunk; }
    METHOD long long parts_row(const Arguments& a) const { return chunk_row(a); }
    METHOD long long token_row() const { return batch; }
#endif
    // Tiles and steps are counted from the chunk's first.
    METHOD int tile_walked(int period) const { return periods - 1 - period; }
    // Runners are KEPT periods ahead of the walkers. Where they take tiles twice, they pass in
    // these, two tiles a period, through the first half of a checkpoint and keep the second; then,
    // one a period, the first.
    METHOD int checkpoint_run(int period) const {
        return periods / TILES - 1 - (period + KEPT) / TILES;
    }
    // The first or second tile that runners run in a period, or one before 0.
    METHOD int tile_run(int period, int i) const {
        const int phase = period & (TILES - 1);
        if (phase < KEPT && i) return -1;
        return checkpoint_run(period) * TILES + (phase < KEPT ? phase : 2 * (phase - KEPT) + i);
    }
};

struct __align__(16) BlockShared {
    SetShared sets[WALKERS];
    Place place; // here it costs no registers
    __align__(16) real coefficients[COEFFICIENTS ? 2 : 1][COEFFICIENTS ? ROLES : 1]
                     [COEFFICIENTS ? COPIES * COPY_REALS : 4];
};
static_assert(ONE_STATE || sizeof(BlockShared) == SHARED_BYTES, "backward.py counts otherwise");

// Which slot a tile's states and steps are kept in. In each period the tile walked, those that
// wait and those being made are in different ones. Of two tiles the first has one of two, in
// turns. Of more, tile j of the first half takes the place of tile TILES - j, which was walked in
// the period before, and tile 0 has one of its own.
DEVICE int slot_of(int tile, int checkpoint) {
    if (!TWICE) return tile ? 1 : checkpoint % 2 * 2;
    return tile == 0 ? KEPT : tile < KEPT ? KEPT - tile : tile - KEPT;
}
constexpr int FREE_SLOT = 0; // while runners pass through the first half, if they do

// A lane's registers to shared memory and back, in 16-byte pieces without bank conflicts.
constexpr int LANE_VECTOR = LANE_ELEMENTS * sizeof(real) < 16 ? LANE_ELEMENTS : 16 / sizeof(real);
DEVICE void put_lane(real* to, int lane, const real* from) {
#pragma unroll
    for (int k = 0; k < LANE_ELEMENTS; k += LANE_VECTOR)
        store_vector<real, LANE_VECTOR>(to + k * 32 + lane * LANE_VECTOR, from + k);
}
// `from` is where the lane's first vector is.
DEVICE void get_lane(const real* from, real* to) {
#pragma unroll
    for (int k = 0; k < LANE_ELEMENTS; k += LANE_VECTOR) {
        Vector<real, LANE_VECTOR> v = load_vector<real, LANE_VECTOR>(from + k * 32);
#pragma unroll
        for (int i = 0; i < LANE_VECTOR; i++) to[k + i] = v.at[i];
    }
}

// Two reals that belong to a step and channel: dt and dt x, or dy' and the gate's factor.
struct Two {
    real a, b;
    METHOD Two(const real* rows, int step, int channel)
        : Two(rows + step * PAIR_STRIDE + channel * 2) {}
    METHOD explicit Two(const real* from) {
        Vector<real, 2> v = load_vector<real, 2>(from);
        a = v.at[0], b = v.at[1];
    }
};

// ---------------------------------------------------------------- sets of channels

// A set as a lane sees it: its piece. TILE steps are TILE_PASSES times a warp's pieces, or less
// than one.
constexpr int TILE_PASSES = TILE > ROWS_PER_PASS ? TILE / ROWS_PER_PASS : 1;
struct Set {
    long long first; // channel of the set
    Piece piece;
    int count; // of the piece that exists
    METHOD Set(long long first, int channels, int lane) : first(first), piece(lane) {
        int left = channels - piece.channel;
        count = left < 0 || piece.row >= TILE ? 0 : left < PIECE ? left : PIECE;
    }
    METHOD Set(const SetShared& shared, int lane) : Set(shared.first, shared.channels, lane) {}
    METHOD int row(int pass) const { return pass * ROWS_PER_PASS + piece.row; }
    METHOD bool has_row() const { return ROWS_PER_PASS <= TILE || piece.row < TILE; }
    METHOD long long first_of_piece() const { return first + piece.channel; }
};

// Passes and spans are a loop, which must not hold on to what is made of a thread's place.
constexpr bool IN_TURN = SEVERAL_PASSES || PACKED;
DEVICE int thread_index() { return IN_TURN ? made_here(threadIdx.x) : threadIdx.x; }

// Write down which channels a block's set has in this pass.
DEVICE void begin_set(const Arguments& a, BlockShared& block, int index) {
    const Place& place = block.place;
    const long long column = place.column * a.passes + place.pass;
    const Channels channels(a.in, place.group, column * WALKERS + index);
    block.sets[index].first = channels.first, block.sets[index].channels = channels.count;
}

DEVICE long long offset_of(const Rows& rows, long long batch, long long step) {
    return batch * rows.batch + step * rows.time;
}
template <class T> DEVICE T* row_of(const Rows& rows, long long batch, long long step) {
    return (T*)rows.data + offset_of(rows, batch, step);
}
// The same from what SetShared::rows has: one multiplication, as strides in time fit an int.
template <class T> DEVICE T* row_at(const Rows& rows, long long first, int step) {
    return (T*)rows.data + (first + (long long)step * (int)rows.time);
}

// ---------------------------------------------------------------- B and C for all of a block

// B or C of a tile on their way, by one warp: UNITS lanes' states of a step.
constexpr int UNITS = TILE * LANES_PER_CHANNEL, UNIT_PASSES = UNITS < 32 ? 1 : UNITS / 32;
struct Units {
    Vector<COEFFICIENT_TYPE, STATES_PER_LANE> units[UNIT_PASSES];

    METHOD void load(const Rows& rows, const Place& place, int tile, int lane) {
        const int left = place.steps - tile * TILE;
        const long long first = place.batch * rows.batch + place.group * rows.group +
                                (place.begin + tile * TILE) * rows.time;
#pragma unroll
        for (int pass = 0; pass < UNIT_PASSES; pass++) {
            const int u = pass * 32 + lane, step = u / LANES_PER_CHANNEL;
            const int state = u % LANES_PER_CHANNEL * STATES_PER_LANE;
            const COEFFICIENT_TYPE* unit = row_at<COEFFICIENT_TYPE>(rows, first, step) + state;
            units[pass] = Vector<COEFFICIENT_TYPE, STATES_PER_LANE>{};
            if (step >= left) continue;
            if constexpr (ALIGNED_COEFFICIENTS) {
                units[pass] = load_vector<COEFFICIENT_TYPE, STATES_PER_LANE>(unit);
            } else {
#pragma unroll
                for (int i = 0; i < STATES_PER_LANE; i++)
                    if (state + i < STATES) units[pass].at[i] = unit[i];
            }
        }
    }

    // Into shared memory in all orders.
    METHOD void store(real* to, int lane) const {
#pragma unroll
        for (int pass = 0; pass < UNIT_PASSES; pass++) {
            const int u = pass * 32 + lane;
            if (UNITS < 32 && u >= UNITS) continue;
            real values[STATES_PER_LANE], turned[STATES_PER_LANE];
            widen_all<COEFFICIENT_TYPE, STATES_PER_LANE>(&units[pass], values);
#pragma unroll
            for (int order = 0; order < COPIES; order++) {
#pragma unroll
                for (int i = 0; i < STATES_PER_LANE; i++) turned[i] = values[i ^ order];
                store_vector<real, STATES_PER_LANE>(
                    to + order * COPY_REALS + u * STATES_PER_LANE, turned
                );
            }
        }
    }
};

// B or C of a step: of a token it is the same for both channels, a constant one is `own`.
template <bool CONSTANT>
DEVICE void read_coefficients(const real* from, const real* own, real* to) {
    if constexpr (CONSTANT) {
#pragma unroll
        for (int k = 0; k < LANE_ELEMENTS; k++) to[k] = own[k];
    } else {
        Vector<real, STATES_PER_LANE> v = load_vector<real, STATES_PER_LANE>(from);
#pragma unroll
        for (int k = 0; k < LANE_ELEMENTS; k++) to[k] = v.at[k % STATES_PER_LANE];
    }
}
// Where the lane's numbers of a tile's first step are.
DEVICE const real* own_coefficients(const real* staged, const OrderedLane& lane) {
    return staged + lane.order * COPY_REALS + lane.part * STATES_PER_LANE;
}

// ---------------------------------------------------------------- runners

// Pieces of x and dt of a tile on their way to a runner.
struct Stored {
    Vector<X_TYPE, PIECE> x[TILE_PASSES];
    Vector<DT_TYPE, PIECE> dt[TILE_PASSES];

    METHOD void load(
        const Operands& in, const SetShared& shared, const Set& set, int tile, int steps
    ) {
#pragma unroll
        for (int pass = 0; pass < TILE_PASSES; pass++) {
            const int step = tile * TILE + set.row(pass), count = step < steps ? set.count : 0;
            const X_TYPE* x_from =
                row_at<X_TYPE>(in.x, shared.rows[RUNNERS_X], step) + set.piece.channel;
            const DT_TYPE* dt_from =
                row_at<DT_TYPE>(in.dt, shared.rows[RUNNERS_DT], step) + set.piece.channel;
            x[pass] = Vector<X_TYPE, PIECE>{}, dt[pass] = Vector<DT_TYPE, PIECE>{};
            if constexpr (ALIGNED) {
                if (count > 0) {
                    x[pass] = load_vector<X_TYPE, PIECE>(x_from);
                    dt[pass] = load_vector<DT_TYPE, PIECE>(dt_from);
                }
            } else {
#pragma unroll
                for (int i = 0; i < PIECE; i++)
                    if (i < count) x[pass].at[i] = x_from[i], dt[pass].at[i] = dt_from[i];
            }
        }
    }
};
// Where they take few registers they are loaded a tile ahead.
constexpr bool AHEAD = SETS_PER_RUNNER * sizeof(Stored) <= 128;

// Turn x and dt into steps. Those from `left` on get dt = 0, which changes no state.
DEVICE void make_steps(
    real* steps, const Stored& stored, const Set& set, const real* dt_bias, int left
) {
    real bias[PIECE];
    if constexpr (ALIGNED) {
        Vector<real, PIECE> v{};
        if (dt_bias && set.count > 0) v = load_vector<real, PIECE>(dt_bias + set.first_of_piece());
#pragma unroll
        for (int i = 0; i < PIECE; i++) bias[i] = v.at[i];
    } else {
        load_per_channel(dt_bias ? dt_bias + set.first_of_piece() : nullptr, set.count, bias);
    }
#pragma unroll
    for (int pass = 0; pass < TILE_PASSES; pass++) {
        real x[PIECE], dt[PIECE];
        widen_all<X_TYPE, PIECE>(&stored.x[pass], x);
        widen_all<DT_TYPE, PIECE>(&stored.dt[pass], dt);
        real* to = steps + set.row(pass) * PAIR_STRIDE + set.piece.channel * 2;
#pragma unroll
        for (int i = 0; i < PIECE; i++) {
            real step = step_size(dt[i] + bias[i]);
            step = set.row(pass) < left ? step : real(0);
            real both[2] = {step, step * x[i]};
            if (set.has_row()) store_vector<real, 2>(to + 2 * i, both);
        }
    }
}

// Where the block's part of dB and dC at a tile is added up: once for all its walkers.
DEVICE void add_token_sums(
    const Arguments& a, const BlockShared& block, const Place& place, int tile, int thread,
    int threads
) {
    if constexpr (COEFFICIENTS > 0) {
        constexpr int COUNT = SUMS % 4 == 0 && sizeof(real) == 4 ? 4 : SUMS % 2 == 0 ? 2 : 1;
        const int left = place.steps - tile * TILE, slot = slot_of(tile % TILES, tile / TILES);
        const long long column = place.group * a.columns + place.column;
        real* to = a.token_parts +
                   ((column * a.in.b + place.token_row()) * a.in.l + place.begin + tile * TILE) * SUMS;
        for (int i = thread * COUNT; i < TILE * SUMS; i += threads * COUNT) {
            int step = i / SUMS;
            if (step >= left) break;
            real sum[COUNT];
#pragma unroll
            for (int j = 0; j < COUNT; j++) sum[j] = place.pass > 0 ? to[i + j] : real(0);
#pragma unroll
            for (int w = 0; w < WALKERS; w++) {
                const SetShared& set = block.sets[w];
                const real* from = SUMS_OVER_STATES
                    ? set.states[slot][step / GROUP] + i % (GROUP * SUMS)
                    : set.sums + i;
                Vector<real, COUNT> v = load_vector<real, COUNT>(from);
#pragma unroll
                for (int j = 0; j < COUNT; j++) sum[j] += v.at[j];
            }
            store_vector<real, COUNT>(to + i, sum);
        }
    }
}

// Groups of a runner without a branch between. exp of a double is a long function.
constexpr int UNROLLED = sizeof(real) == 4 ? 16 : 1;

// If a runner reads what a group needs before it puts its states down. The loop over spans has no
// registers for that.
constexpr bool READS_AHEAD = !PACKED;

DEVICE void run(const Arguments& a, BlockShared& block) {
    const Place& place = block.place;
    const Operands& in = a.in;
    const int thread = thread_index(), r = thread / 32 - WALKERS, lane_index = thread % 32;
    const OrderedLane lane(lane_index);
    const int sums_thread = THREADS - 1 - thread; // first the runners that do not stage

    real A[SETS_PER_RUNNER][LANE_ELEMENTS], B[SETS_PER_RUNNER][LANE_ELEMENTS];
    real h[SETS_PER_RUNNER][LANE_ELEMENTS], checkpoint[SETS_PER_RUNNER][LANE_ELEMENTS];
    Stored stored[SETS_PER_RUNNER];
    SetShared* const sets = block.sets + r * SETS_PER_RUNNER;
#pragma unroll
    for (int m = 0; m < SETS_PER_RUNNER; m++) {
        begin_set(a, block, r * SETS_PER_RUNNER + m);
        const Set set(sets[m], lane_index);
        sets[m].rows[RUNNERS_X] = offset_of(in.x, place.batch, place.begin) + set.first;
        sets[m].rows[RUNNERS_DT] = offset_of(in.dt, place.batch, place.begin) + set.first;
        const long long at = set.first * STATES;
        get_states(in.A + at, lane, sets[m].channels, A[m]);
#pragma unroll
        for (int k = 0; k < LANE_ELEMENTS; k++) A[m][k] = times_log2e(A[m][k]);
        if (CONSTANT_B) get_states(in.B_constant + at, lane, sets[m].channels, B[m]);
    }
    auto load_checkpoint = [&](int index) {
#pragma unroll
        for (int m = 0; m < SETS_PER_RUNNER; m++) {
            const long long row =
                checkpoint_row(in, place.batch, place.begin, CHECKPOINT_BITS) + index;
            const real* from = a.checkpoints + (row * in.d + sets[m].first) * STATES;
            get_states(from, lane, sets[m].channels, checkpoint[m]);
        }
    };
    auto load_stored = [&](int tile) {
#pragma unroll
        for (int m = 0; m < SETS_PER_RUNNER; m++)
            stored[m].load(in, sets[m], Set(sets[m], lane_index), tile, place.steps);
    };
    // Which tile's B or C a role is for in a period; before 0 if for none.
    auto tile_staged = [&](int role, int period) {
        if (role >= RUNNERS_B) return place.tile_run(period, role - RUNNERS_B);
        return period < 0 ? -1 : place.tile_walked(period);
    };
    // Staging begins before a runner runs its tiles and ends after, where registers allow.
    constexpr bool EARLY = RUNNERS >= ROLES && sizeof(Units) <= 32;
    Units units;
    auto begin_to_stage = [&](int role, int period) {
        const bool is_B = role != WALKERS_C;
        const int tile = tile_staged(role, period);
        if ((is_B ? TOKEN_B : TOKEN_C) && tile >= 0)
            units.load(is_B ? in.B : in.C, place, tile, lane_index);
    };
    auto end_staging = [&](int role, int period) {
        if ((role != WALKERS_C ? TOKEN_B : TOKEN_C) && tile_staged(role, period) >= 0)
            units.store(block.coefficients[period & 1][role], lane_index);
    };
    auto stage = [&](int period) {
        if constexpr (COEFFICIENTS > 0) {
#pragma unroll 1
            for (int role = r; role < ROLES; role += RUNNERS) {
                begin_to_stage(role, period);
                end_staging(role, period);
            }
        }
    };

    load_checkpoint(place.periods / TILES - 1);
    if (AHEAD) load_stored(place.periods - TILES);
    stage(-KEPT);
    __syncthreads();
#pragma unroll 1
    for (int period = -KEPT; period < place.periods; period++) {
        if constexpr (EARLY && COEFFICIENTS > 0)
            if (r < ROLES) begin_to_stage(r, period + 1);
        if constexpr (SUMS_OVER_STATES && COEFFICIENTS > 0) {
            if (period > 0) {
                add_token_sums(
                    a, block, place, place.tile_walked(period - 1), sums_thread, 32 * RUNNERS
                );
                barrier_of(32 * RUNNERS); // before any of them writes states there
            }
        }
        const int index = place.checkpoint_run(period), phase = period & (TILES - 1);
        if (index >= 0) {
            const bool keep = !TWICE || phase < KEPT || phase >= KEPT + KEPT / 2;
            if (phase == 0 || phase == KEPT) {
#pragma unroll
                for (int m = 0; m < SETS_PER_RUNNER; m++)
#pragma unroll
                    for (int k = 0; k < LANE_ELEMENTS; k++) h[m][k] = checkpoint[m][k];
            }
            if (phase == 0 && index > 0) load_checkpoint(index - 1);
#pragma unroll 1
            for (int i = 0; i < (phase < KEPT ? 1 : 2); i++) {
                const int tile = phase < KEPT ? phase : 2 * (phase - KEPT) + i;
                const int slot = keep ? slot_of(tile, index) : FREE_SLOT;
                const int at = index * TILES + tile;
                __syncwarp(); // all lanes have left what the slot held before
                if (!AHEAD) load_stored(at);
#pragma unroll
                for (int m = 0; m < SETS_PER_RUNNER; m++) {
                    const Set set(sets[m], lane_index);
                    make_steps(
                        sets[m].steps[slot], stored[m], set, in.dt_bias, place.steps - at * TILE
                    );
                }
                // of a checkpoint come all tiles and then, if they are run twice, the first half
                if (AHEAD) {
                    const int next = phase == KEPT - 1   ? (index - 1) * TILES
                                     : tile == TILES - 1 ? index * TILES
                                                         : at + 1;
                    if (next >= 0) load_stored(next);
                }
                __syncwarp();
                const real* staged = COEFFICIENTS
                    ? block.coefficients[period & 1][RUNNERS_B + i]
                    : nullptr;
#pragma unroll UNROLLED
                for (int group = 0; group < GROUPS; group++) {
                    real token[GROUP][LANE_ELEMENTS];
                    real nows[GROUP][SETS_PER_RUNNER][CHANNELS_PER_LANE][2];
                    auto read = [&](int j) {
                        const int step = group * GROUP + j;
                        if (TOKEN_B)
                            read_coefficients<false>(
                                own_coefficients(staged, lane) + step * PADDED_STATES, nullptr,
                                token[j]
                            );
#pragma unroll
                        for (int m = 0; m < SETS_PER_RUNNER; m++) {
#pragma unroll
                            for (int c = 0; c < CHANNELS_PER_LANE; c++) {
                                const Two now(sets[m].steps[slot], step, lane.channel(c));
                                nows[j][m][c][0] = now.a, nows[j][m][c][1] = now.b;
                            }
                        }
                    };
                    // before states are put there, which are ready late
                    if (READS_AHEAD) {
#pragma unroll
                        for (int j = 0; j < GROUP; j++) read(j);
                    }
                    if (keep) {
#pragma unroll
                        for (int m = 0; m < SETS_PER_RUNNER; m++)
                            put_lane(sets[m].states[slot][group], lane_index, h[m]);
                        // what the tiles that are kept end with nobody asks
                        if (group == GROUPS - 1 && tile % KEPT == KEPT - 1) break;
                    }
#pragma unroll
                    for (int j = 0; j < GROUP; j++) {
                        if (!READS_AHEAD) read(j);
#pragma unroll
                        for (int m = 0; m < SETS_PER_RUNNER; m++) {
#pragma unroll
                            for (int k = 0; k < LANE_ELEMENTS; k++) {
                                const real* now = nows[j][m][k / STATES_PER_LANE];
                                const real decay = decay_of(now[0], A[m][k]);
                                const real B_now = TOKEN_B ? token[j][k] : B[m][k];
                                h[m][k] = multiply_add(decay, h[m][k], now[1] * B_now);
                            }
                        }
                    }
                }
            }
        }
        if constexpr (!EARLY) stage(period + 1);
        else if (COEFFICIENTS > 0 && r < ROLES) end_staging(r, period + 1);
        __syncthreads();
        if constexpr (!SUMS_OVER_STATES) {
            if (period >= 0)
                add_token_sums(a, block, place, place.tile_walked(period), thread, THREADS);
            __syncthreads();
        }
    }
    if constexpr (SUMS_OVER_STATES && COEFFICIENTS > 0)
        add_token_sums(a, block, place, 0, sums_thread, 32 * RUNNERS);
}

// ---------------------------------------------------------------- sums between lanes

// Sums over a channel's lanes, of a group's steps. What a lane is left with is of its channel 0
// (with one lane to a channel: of both), at OWN_STEPS steps from own_step on.
constexpr int OWN_STEPS =
    LANES_PER_CHANNEL <= 2 ? GROUP : LANES_PER_CHANNEL == 4 ? GROUP / 2 : GROUP / 4;
constexpr int OWN_CHANNELS = LANES_PER_CHANNEL == 1 ? 2 : 1;

DEVICE int own_step(const Lane& lane) {
    int step = 0;
    if (LANES_PER_CHANNEL > 2 && (lane.part & 2)) step += GROUP / 2;
    if (LANES_PER_CHANNEL > 4 && (lane.part & 4)) step += GROUP / 4;
    return step;
}
// With more lanes than steps and channels, some end with the same sums: the first keeps them.
DEVICE bool owns(const Lane& lane) { return lane.part < 8; }

DEVICE void sum_over_states(real (*v)[CHANNELS_PER_LANE], const Lane& lane) {
    if constexpr (LANES_PER_CHANNEL > 1) {
#pragma unroll
        for (int j = 0; j < GROUP; j++) v[j][0] += shuffle_xor(v[j][1], 1);
        int kept = GROUP;
#pragma unroll
        for (int mask = 2; mask < LANES_PER_CHANNEL; mask *= 2) {
            if (kept > 1) {
                kept /= 2;
                const bool upper = lane.part & mask;
#pragma unroll
                for (int j = 0; j < kept; j++) {
                    real keep = upper ? v[j + kept][0] : v[j][0];
                    real give = upper ? v[j][0] : v[j + kept][0];
                    v[j][0] = keep + shuffle_xor(give, mask);
                }
            } else {
                v[0][0] += shuffle_xor(v[0][0], mask);
            }
        }
    }
}

// What a lane is left with of a step's sums over pairs: those of states so far apart, of dB and dC
// or of one of the two.
constexpr int LEFT_APART = PAIRS < STATES_PER_LANE ? PAIRS : STATES_PER_LANE;
constexpr bool LEFT_ONE = COEFFICIENTS == 2 && PAIRS > STATES_PER_LANE;
constexpr int LEFT = STATES_PER_LANE / LEFT_APART * (LEFT_ONE ? 1 : COEFFICIENTS);

// Where among the step's SUMS reals they begin.
DEVICE int own_sums(const OrderedLane& lane) {
    const bool is_C = LEFT_ONE && lane.pair & STATES_PER_LANE;
    return lane.part * STATES_PER_LANE + (lane.pair & (LEFT_APART - 1)) + (is_C ? PADDED_STATES : 0);
}
DEVICE void put_sums(const real* dB, const real* dC, real* to) {
#pragma unroll
    for (int i = 0; i < STATES_PER_LANE; i += LEFT_APART) {
        if (TOKEN_B || LEFT_ONE) to[i] = dB[i];
        if (TOKEN_C && !LEFT_ONE) to[i + (TOKEN_B ? PADDED_STATES : 0)] = dC[i];
    }
}

// Sum a step's dB and dC over the pairs of a warp's channels. At each level a lane keeps half of
// its states; when one is left, dB or dC, and has it as dB.
DEVICE void sum_over_channels(real* dB, real* dC, const OrderedLane& lane) {
    int kept = STATES_PER_LANE, level = 1;
    bool both = COEFFICIENTS == 2;
#pragma unroll
    for (int mask = LANES_PER_CHANNEL; mask < 32; mask *= 2, level *= 2) {
        const bool upper = lane.pair & level;
        if (kept > 1) {
            kept /= 2;
#pragma unroll
            for (int i = 0; i < STATES_PER_LANE; i += 2 * level) {
                if (level < COPIES) {
                    if (TOKEN_B) dB[i] += shuffle_xor(dB[i + level], mask);
                    if (TOKEN_C) dC[i] += shuffle_xor(dC[i + level], mask);
                } else {
                    real kept_B = upper ? dB[i + level] : dB[i];
                    real kept_C = upper ? dC[i + level] : dC[i];
                    real sent_B = upper ? dB[i] : dB[i + level];
                    real sent_C = upper ? dC[i] : dC[i + level];
                    if (TOKEN_B) dB[i] = kept_B + shuffle_xor(sent_B, mask);
                    if (TOKEN_C) dC[i] = kept_C + shuffle_xor(sent_C, mask);
                }
            }
        } else if (both) {
            both = false;
            real keep = upper ? dC[0] : dB[0], give = upper ? dB[0] : dC[0];
            dB[0] = dC[0] = keep + shuffle_xor(give, mask);
        } else {
            if (TOKEN_B) dB[0] += shuffle_xor(dB[0], mask);
            else dC[0] += shuffle_xor(dC[0], mask);
        }
    }
}

// ---------------------------------------------------------------- walkers

// The derivative of softplus, where it gave dt: sigmoid(v) = 1 - exp(-dt). For small dt, which are
// common, that would cancel, and the series is used.
DEVICE float slope_at(float dt) {
    float p = multiply_add(dt, 1.0f / 5040, -1.0f / 720);
    p = multiply_add(dt, p, 1.0f / 120);
    p = multiply_add(dt, p, -1.0f / 24);
    p = multiply_add(dt, p, 1.0f / 6);
    p = multiply_add(dt, p, -0.5f);
    p = multiply_add(dt, p, 1.0f);
    return dt < 0.5f ? dt * p : 1.0f - exp2_fast(-dt * (float)LOG2E);
}
DEVICE double slope_at(double dt) { return -expm1(-dt); }

// Write what exists of a piece of gradients from where it is kept.
template <class T>
DEVICE void put_piece(
    const SetShared& shared, int buffer, int which, int tensor, const Rows& rows, const Set& set,
    int step, int at
) {
    const T* from = (const T*)shared.stored[buffer][which] + at;
    T* to = row_at<T>(rows, shared.rows[tensor], step) + set.piece.channel;
    if constexpr (ALIGNED) {
        *(Vector<T, PIECE>*)to = *(const Vector<T, PIECE>*)from;
    } else {
#pragma unroll
        for (int i = 0; i < PIECE; i++)
            if (i < set.count) to[i] = from[i];
    }
}

// Leave a part of a sum, or add it to what is there.
DEVICE void put_part(bool adds, real& to, real value) { to = adds ? to + value : value; }
DEVICE void put_parts(bool adds, real* at, const OrderedLane& lane, int count, real* values) {
    if (adds) {
        real before[LANE_ELEMENTS];
        get_states(at, lane, count, before);
#pragma unroll
        for (int k = 0; k < LANE_ELEMENTS; k++) values[k] += before[k];
    }
    put_states(at, lane, count, values);
}

// Long sums lose more, so what a lane sums over time it leaves after so many steps.
constexpr int PART_TILES = 1024 / TILE;

// The flag of a walker's set at a chunk.
DEVICE int* flag_of(const Arguments& a, const Place& place, int walker, long long chunk) {
    const long long row = (chunk * a.in.b + place.batch) * a.in.g + place.group;
    return a.flags + ((row * a.columns + place.column) * a.passes + place.pass) * WALKERS + walker;
}

// Where in shared memory a lane finds and leaves what belongs to a group's first step; to the
// others it is a constant away. Made once for a tile and moved from group to group, these are few
// registers and no instructions in the loop over steps.
struct GroupPlaces {
    const real *steps[CHANNELS_PER_LANE], *outputs[CHANNELS_PER_LANE]; // of the lane's channels
    const real *states, *coefficients;
    real* sums;

    // Of the last group of the tile in a slot.
    METHOD GroupPlaces(SetShared& shared, const real* staged, int slot) {
        const int lane_index = thread_index() % 32;
        const OrderedLane lane(lane_index);
        constexpr int STEP = TILE - GROUP;
#pragma unroll
        for (int c = 0; c < CHANNELS_PER_LANE; c++) {
            const int at = STEP * PAIR_STRIDE + lane.channel(c) * 2;
            steps[c] = made_here(shared.steps[slot] + at);
            outputs[c] = made_here(shared.outputs + at);
        }
        real* const kept = shared.states[slot][GROUPS - 1];
        states = made_here(kept + lane_index * LANE_VECTOR);
        coefficients = made_here(own_coefficients(staged, lane) + STEP * PADDED_STATES);
        sums = made_here((SUMS_OVER_STATES ? kept : shared.sums + STEP * SUMS) + own_sums(lane));
    }
    METHOD void go_back() {
#pragma unroll
        for (int c = 0; c < CHANNELS_PER_LANE; c++)
            steps[c] -= GROUP * PAIR_STRIDE, outputs[c] -= GROUP * PAIR_STRIDE;
        states -= 32 * LANE_ELEMENTS, coefficients -= GROUP * PADDED_STATES;
        sums -= SUMS_OVER_STATES ? 32 * LANE_ELEMENTS : GROUP * SUMS;
    }
    METHOD const real* B(int j) const { return coefficients + j * PADDED_STATES; }
    METHOD const real* C(int j) const { return B(j) + WALKERS_C * COPIES * COPY_REALS; }
};

// A group's sums over channels are put into shared memory after its last step: what the next step
// reads would wait for a write before it, and that for shuffles. Where they take few registers.
constexpr bool PUT_LATE = COEFFICIENTS > 0 && GROUP * LEFT * sizeof(real) <= 64;

DEVICE void walk(const Arguments& a, BlockShared& block) {
    const Place& place = block.place;
    const Operands& in = a.in;
    const int thread = thread_index(), w = thread / 32, lane_index = thread % 32;
    const OrderedLane lane(lane_index);
    begin_set(a, block, w);
    SetShared& shared = block.sets[w];
    const Set set(shared, lane_index);
    const int count = shared.channels;

    real A[LANE_ELEMENTS], G[LANE_ELEMENTS], dA[LANE_ELEMENTS];
    real own_B[LANE_ELEMENTS], own_C[LANE_ELEMENTS], own_dB[LANE_ELEMENTS], own_dC[LANE_ELEMENTS];
    get_states(in.A + set.first * STATES, lane, count, A);
#pragma unroll
    for (int k = 0; k < LANE_ELEMENTS; k++) A[k] = times_log2e(A[k]);
    clear(dA), clear(own_dB), clear(own_dC);
    if (CONSTANT_B) get_states(in.B_constant + set.first * STATES, lane, count, own_B);
    if (CONSTANT_C) get_states(in.C_constant + set.first * STATES, lane, count, own_C);
    for (int c = lane_index; c < WARP_CHANNELS; c += 32)
        shared.D[c] = in.D && c < count ? in.D[set.first + c] : real(0);
    real dD[OWN_CHANNELS] = {}, ddt_bias[OWN_CHANNELS] = {};
    // A lane that sums several steps of a group sums these tile by tile, for the same reason.
    constexpr bool BY_TILES = OWN_STEPS > 1;
    real dD_of_tiles[OWN_CHANNELS] = {}, ddt_bias_of_tiles[OWN_CHANNELS] = {};

    auto keep_rows = [&](int tensor, const Rows& rows) {
        shared.rows[tensor] = offset_of(rows, place.batch, place.begin) + set.first;
    };
    keep_rows(X, in.x), keep_rows(DY, a.dy), keep_rows(DX, a.dx), keep_rows(DDT, a.ddt);
    if (GATE) keep_rows(GATES, in.gate), keep_rows(DGATE, a.dgate);

    auto fetch = [&](int buffer, int tile) {
        const int lane_index = thread_index() % 32;
        const Set set(shared, lane_index);
#pragma unroll
        for (int p = 0; p < TILE_PASSES; p++) {
            const int step = tile * TILE + set.row(p), at = (p * 32 + lane_index) * PIECE;
            const int exist = step < place.steps ? set.count : 0;
            if (!set.has_row()) continue;
            auto get = [&](int which, int tensor, const Rows& rows) {
                fetch_piece(
                    (X_TYPE*)shared.stored[buffer][which] + at,
                    row_at<X_TYPE>(rows, shared.rows[tensor], step) + set.piece.channel, exist
                );
            };
            get(X_OR_DX, X, in.x);
            if (GATE) get(GATE_OR_DDT, GATES, in.gate);
            get(DY_OR_DGATE, DY, a.dy);
        }
        copy_async_commit();
    };

    // What reaches the chunk comes from the caller, from a chunk after it or from scan_join_back.
    auto receive = [&] {
        const int own_thread = made_here(thread_index());
        const OrderedLane lane(own_thread % 32);
        const real* from = a.carries;
        long long row = place.chunk_row(a);
        if (place.ends(a)) from = a.dlast_state, row = place.batch;
        else if (place.awaits(a)) await(flag_of(a, place, own_thread / 32, place.chunk + 1));
        if (from)
            get_states(from + (row * in.d + shared.first) * STATES, lane, shared.channels, G);
        else clear(G);
    };
    // What is sent back goes to the caller or to the chunk before.
    auto send = [&] {
        const int own_thread = made_here(thread_index());
        const OrderedLane lane(own_thread % 32);
        real* to = nullptr;
        long long row = place.batch;
        if (place.starts()) to = a.dstate;
        else if (place.hands_on(a)) to = a.carries, row = place.chunk_row(a) - 1;
        if (to) put_states(to + (row * in.d + shared.first) * STATES, lane, shared.channels, G);
        if (place.hands_on(a)) publish(flag_of(a, place, own_thread / 32, place.chunk));
    };
    // Leave what is summed over time: the first parts, or to be added to those left before.
    auto leave_parts = [&](bool adds) {
        const OrderedLane lane(made_here(thread_index()) % 32);
#if PACKED
        adds |= place.adds;
#endif
        // One row of parts for each batch and chunk, or for each share of a pack, whose spans add
        // to it in turn: dA, dD, ddt_bias, constant dB, constant dC.
        const int exist = shared.channels;
        const long long states = in.d * STATES, at = shared.first * STATES;
        const long long width = states * (1 + CONSTANT_B + CONSTANT_C) + 2 * in.d;
        real* parts = a.parts + place.parts_row(a) * width;
        put_parts(adds, parts + at, lane, exist, dA);
        parts += states;
        // steps lie in different lanes of a channel
#pragma unroll
        for (int c = 0; c < OWN_CHANNELS; c++) {
            dD[c] += dD_of_tiles[c], ddt_bias[c] += ddt_bias_of_tiles[c];
#pragma unroll
            for (int mask = 2; mask < LANES_PER_CHANNEL; mask *= 2) {
                dD[c] += shuffle_xor(dD[c], mask);
                ddt_bias[c] += shuffle_xor(ddt_bias[c], mask);
            }
            const int channel = lane.channel(c);
            if (lane.part < 2 && channel < exist) {
                put_part(adds, parts[shared.first + channel], dD[c]);
                put_part(adds, parts[in.d + shared.first + channel], ddt_bias[c]);
            }
            dD[c] = ddt_bias[c] = dD_of_tiles[c] = ddt_bias_of_tiles[c] = 0;
        }
        parts += 2 * in.d;
        if (CONSTANT_B) put_parts(adds, parts + at, lane, exist, own_dB), parts += states;
        if (CONSTANT_C) put_parts(adds, parts + at, lane, exist, own_dC);
        clear(dA), clear(own_dB), clear(own_dC);
    };

    fetch(0, place.tile_walked(0));
    // runners get ahead, at last while this waits for the chunk after
    for (int i = 0; i < (SUMS_OVER_STATES ? 1 : 2) * KEPT; i++) __syncthreads();
    receive();
    __syncthreads();

#pragma unroll 1
    for (int period = 0; period < place.periods; period++) {
        const int tile = place.tile_walked(period), slot = slot_of(tile % TILES, tile / TILES);
        const int buffer = STORED_BUFFERS > 1 ? period & 1 : 0;
        const int thread = thread_index(), lane_index = thread % 32;
        const Set set(shared, lane_index);
        const real* steps = shared.steps[slot];
        const real(*staged)[COEFFICIENTS ? COPIES * COPY_REALS : 4] =
            block.coefficients[COEFFICIENTS ? period & 1 : 0];

        copy_async_wait<0>();
#pragma unroll
        for (int p = 0; p < TILE_PASSES; p++) {
            const int at = (p * 32 + lane_index) * PIECE;
            if (!set.has_row()) continue;
            real dy[PIECE], gate[PIECE];
            widen_all<X_TYPE, PIECE>((const X_TYPE*)shared.stored[buffer][DY_OR_DGATE] + at, dy);
            if (GATE)
                widen_all<X_TYPE, PIECE>(
                    (const X_TYPE*)shared.stored[buffer][GATE_OR_DDT] + at, gate
                );
            real* to = shared.outputs + set.row(p) * PAIR_STRIDE + set.piece.channel * 2;
#pragma unroll
            for (int i = 0; i < PIECE; i++) {
                real both[2] = {dy[i], real(0)};
                if (GATE) {
                    real s = sigmoid_of(gate[i]), silu = gate[i] * s;
                    both[0] = dy[i] * silu;
                    both[1] = dy[i] * multiply_add(silu, 1 - s, s);
                }
                store_vector<real, 2>(to + 2 * i, both);
            }
        }
        if constexpr (BY_TILES) {
#pragma unroll
            for (int c = 0; c < OWN_CHANNELS; c++) {
                dD_of_tiles[c] += dD[c], ddt_bias_of_tiles[c] += ddt_bias[c];
                dD[c] = ddt_bias[c] = 0;
            }
        }
        __syncwarp();
        if (STORED_BUFFERS > 1 && tile > 0) fetch(buffer ^ 1, tile - 1);

        GroupPlaces at(shared, staged[0], slot);
#pragma unroll 1
        for (int group = GROUPS - 1; group >= 0; group--) {
            const int lane_index = thread_index() % 32;
            const OrderedLane lane(lane_index);
            real h[GROUP + 1][LANE_ELEMENTS], decay[GROUP][LANE_ELEMENTS];
            real B[GROUP][LANE_ELEMENTS];
            get_lane(at.states, h[0]);
            __syncwarp(); // before sums are put there
#pragma unroll
            for (int j = 0; j < GROUP; j++) {
                read_coefficients<CONSTANT_B>(at.B(j), own_B, B[j]);
#pragma unroll
                for (int c = 0; c < CHANNELS_PER_LANE; c++) {
                    const Two now(at.steps[c] + j * PAIR_STRIDE);
#pragma unroll
                    for (int i = 0; i < STATES_PER_LANE; i++) {
                        const int k = c * STATES_PER_LANE + i;
                        decay[j][k] = decay_of(now.a, A[k]);
                        h[j + 1][k] = multiply_add(decay[j][k], h[j][k], now.b * B[j][k]);
                    }
                }
            }
            // C . h, dh . B and q . A of each step and channel
            real Ch[GROUP][CHANNELS_PER_LANE], dhB[GROUP][CHANNELS_PER_LANE];
            real qA[GROUP][CHANNELS_PER_LANE];
            real dBs[PUT_LATE ? GROUP : 1][LANE_ELEMENTS], dCs[PUT_LATE ? GROUP : 1][LANE_ELEMENTS];
            // with no write between, the compiler would hold on to all that was read above
            const real* again[CHANNELS_PER_LANE];
#pragma unroll
            for (int c = 0; c < CHANNELS_PER_LANE; c++)
                again[c] = PUT_LATE ? made_here(at.steps[c]) : at.steps[c];
#pragma unroll
            for (int j = GROUP - 1; j >= 0; j--) {
                real C[LANE_ELEMENTS];
                real *const dB = dBs[PUT_LATE ? j : 0], *const dC = dCs[PUT_LATE ? j : 0];
                read_coefficients<CONSTANT_C>(at.C(j), own_C, C);
#pragma unroll
                for (int c = 0; c < CHANNELS_PER_LANE; c++) {
                    const Two now(again[c] + j * PAIR_STRIDE);
                    const real dy = at.outputs[c][j * PAIR_STRIDE];
#pragma unroll
                    for (int i = 0; i < STATES_PER_LANE; i++) {
                        const int k = c * STATES_PER_LANE + i;
                        const real dh = multiply_add(C[k], dy, G[k]);
                        G[k] = dh * decay[j][k];
                        const real q = G[k] * h[j][k];
                        dA[k] = multiply_add(q, now.a, dA[k]);
                        const real after = h[j + 1][k];
                        if (GATE) Ch[j][c] = i ? multiply_add(C[k], after, Ch[j][c]) : C[k] * after;
                        dhB[j][c] = i ? multiply_add(dh, B[j][k], dhB[j][c]) : dh * B[j][k];
                        qA[j][c] = i ? multiply_add(q, A[k], qA[j][c]) : q * A[k];
                        if (CONSTANT_B) own_dB[k] = multiply_add(dh, now.b, own_dB[k]);
                        else dB[i] = c ? multiply_add(dh, now.b, dB[i]) : dh * now.b;
                        if (CONSTANT_C) own_dC[k] = multiply_add(dy, after, own_dC[k]);
                        else dC[i] = c ? multiply_add(dy, after, dC[i]) : dy * after;
                    }
                }
                if (COEFFICIENTS > 0) sum_over_channels(dB, dC, lane);
                if (COEFFICIENTS > 0 && !PUT_LATE) put_sums(dB, dC, at.sums + j * SUMS);
            }
            if constexpr (PUT_LATE) {
#pragma unroll
                for (int j = 0; j < GROUP; j++) put_sums(dBs[j], dCs[j], at.sums + j * SUMS);
            }
            if (GATE) sum_over_states(Ch, lane);
            sum_over_states(dhB, lane);
            sum_over_states(qA, lane);
            if (owns(lane)) {
#pragma unroll
                for (int j = 0; j < OWN_STEPS; j++) {
#pragma unroll
                    for (int c = 0; c < OWN_CHANNELS; c++) {
                        const int step = group * GROUP + own_step(lane) + j;
                        const int channel = lane.channel(c), at = step * WARP_CHANNELS + channel;
                        const Two now(steps, step, channel), out(shared.outputs, step, channel);
                        X_TYPE* x_or_dx = (X_TYPE*)shared.stored[buffer][X_OR_DX] + at;
                        const real x = widen(*x_or_dx), D = shared.D[channel];
                        real ddt = multiply_add(dhB[j][c], x, qA[j][c] * LN2);
                        // steps past the end have dt = 0, where softplus is level
                        if (SOFTPLUS) ddt *= slope_at(now.a);
                        else if (tile * TILE + step >= place.steps) ddt = 0;
                        ddt_bias[c] += ddt;
                        dD[c] = multiply_add(out.a, x, dD[c]);
                        *x_or_dx = narrow<X_TYPE>(multiply_add(dhB[j][c], now.a, D * out.a));
                        ((DT_TYPE*)shared.stored[buffer][GATE_OR_DDT])[at] = narrow<DT_TYPE>(ddt);
                        if (GATE)
                            ((X_TYPE*)shared.stored[buffer][DY_OR_DGATE])[at] =
                                narrow<X_TYPE>(out.b * multiply_add(D, x, Ch[j][c]));
                    }
                }
            }
            at.go_back();
        }
        __syncwarp();
        {
#if PACKED
            // made anew, these take no registers while the warp walks
            const int lane_index = thread_index() % 32;
            const Set set(shared, lane_index);
#endif
#pragma unroll
            for (int p = 0; p < TILE_PASSES; p++) {
                const int step = tile * TILE + set.row(p), at = (p * 32 + lane_index) * PIECE;
                if (step >= place.steps || set.count == 0) continue;
                put_piece<X_TYPE>(shared, buffer, X_OR_DX, DX, a.dx, set, step, at);
                put_piece<DT_TYPE>(shared, buffer, GATE_OR_DDT, DDT, a.ddt, set, step, at);
                if (GATE)
                    put_piece<X_TYPE>(shared, buffer, DY_OR_DGATE, DGATE, a.dgate, set, step, at);
            }
        }
        __syncwarp(); // before these places are fetched into
        if (STORED_BUFFERS == 1 && tile > 0) fetch(0, tile - 1);
        if (tile == 0) send();
        if (tile % PART_TILES == 0) leave_parts(tile + PART_TILES < place.periods);

        __syncthreads();
        if constexpr (!SUMS_OVER_STATES) {
            add_token_sums(a, block, place, tile, thread, THREADS);
            __syncthreads();
        }
    }
}

// Go on to the next pass over channels or the next span, if there is one.
DEVICE bool goes_on(const Arguments& a, BlockShared& block) {
    if (!IN_TURN) return false;
    __syncthreads();
    if (threadIdx.x == 0) block.place.next(a);
    __syncthreads();
    return !block.place.over(a);
}

#if ONE_STATE
#include "one_state.cuh"
static_assert(sizeof(OneShared) == SHARED_BYTES, "backward.py counts otherwise");

KERNEL(THREADS, BLOCKS) scan_backward(const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(memory);
    walk_one(a, *(OneShared*)memory);
}
#else
KERNEL(THREADS, BLOCKS) scan_backward(const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(memory);
    BlockShared& block = *(BlockShared*)memory;
    if (threadIdx.x == 0) block.place.find(a);
    __syncthreads();
    if ((int)threadIdx.x < 32 * WALKERS) {
        if constexpr (HAND_OVER) take_registers<WALKER_REGISTERS>();
#pragma unroll 1
        do walk(a, block);
        while (goes_on(a, block));
    } else {
        if constexpr (HAND_OVER) leave_registers<RUNNER_REGISTERS>();
#pragma unroll 1
        do run(a, block);
        while (goes_on(a, block));
    }
}
#endif

// ---------------------------------------------------------------- chunks of time

// Two tiles on their way or in use, as they are in global memory.
struct __align__(16) CarryShared {
    X_TYPE gate[2][TILE * WARP_CHANNELS], dy[2][TILE * WARP_CHANNELS];
    DT_TYPE dt[2][TILE * WARP_CHANNELS];
    real steps[TILE * PAIR_STRIDE]; // dt, dy'
};
struct __align__(16) CarryBlock {
    CarryShared sets[CARRY_WARPS];
    COEFFICIENT_TYPE C[2][TOKEN_C ? TILE * PADDED_STATES : 16];
};
static_assert(sizeof(CarryBlock) == CARRY_BYTES, "backward.py counts otherwise");

// Start bringing C of the `left` steps from `from` on into shared memory, by all threads.
DEVICE void fetch_C(COEFFICIENT_TYPE* to, const COEFFICIENT_TYPE* from, long long time, int left) {
    constexpr int UNITS = TILE * LANES_PER_CHANNEL;
    for (int u = threadIdx.x; u < UNITS; u += CARRY_WARPS * 32) {
        const int step = u / LANES_PER_CHANNEL, state = u % LANES_PER_CHANNEL * STATES_PER_LANE;
        const COEFFICIENT_TYPE* unit = from + step * time + state;
        COEFFICIENT_TYPE* at = to + u * STATES_PER_LANE;
        if constexpr (ALIGNED_COEFFICIENTS) {
            copy_async<STATES_PER_LANE * sizeof(COEFFICIENT_TYPE)>(at, unit, step < left);
        } else {
#pragma unroll
            for (int i = 0; i < STATES_PER_LANE; i++)
                at[i] = step < left && state + i < STATES ? unit[i] : COEFFICIENT_TYPE{};
        }
    }
}

// What gradient each chunk but the first sends back if none reaches it, and the sums of its dt.
KERNEL(CARRY_WARPS * 32, CARRY_BLOCKS) scan_carries(const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(memory);
    CarryBlock& block = *(CarryBlock*)memory;
    const Operands& in = a.in;
    const int w = threadIdx.x / 32, lane_index = threadIdx.x % 32;
    const Lane lane(lane_index);
    CarryShared& shared = block.sets[w];

    constexpr int BLOCK_CHANNELS = CARRY_WARPS * WARP_CHANNELS;
    const long long columns = (in.d / in.g + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS;
    long long i = blockIdx.x;
    const long long column = i % columns;
    i /= columns;
    const long long group = i % in.g;
    i /= in.g;
#if PACKED
    const Span span = a.spans[i];
    const long long chunk = span.chunk, batch = span.sequence;
    const long long begin = span.begin, end = begin + span.steps;
#else
    const long long chunk = a.tail + i % (a.chunks - a.tail), batch = i / (a.chunks - a.tail);
    const long long begin = begin_of(a, chunk), end = min(in.l, begin + a.chunk_steps);
#endif

    const Channels channels(in, group, column * CARRY_WARPS + w);
    const Set set(channels.first, channels.count, lane_index);
    const long long at_states = set.first * STATES;
    real A[LANE_ELEMENTS], own_C[LANE_ELEMENTS], G[LANE_ELEMENTS], bias[PIECE], sums[PIECE];
    get_states(in.A + at_states, lane, channels.count, A);
    if (CONSTANT_C) get_states(in.C_constant + at_states, lane, channels.count, own_C);
    load_per_channel(in.dt_bias ? in.dt_bias + set.first_of_piece() : nullptr, set.count, bias);
#pragma unroll
    for (int k = 0; k < LANE_ELEMENTS; k++) A[k] = times_log2e(A[k]), G[k] = 0;
#pragma unroll
    for (int k = 0; k < PIECE; k++) sums[k] = 0;

    auto fetch = [&](int stage, long long first) {
#pragma unroll
        for (int p = 0; p < TILE_PASSES; p++) {
            const long long step = first + set.row(p);
            const int exist = step < end ? set.count : 0, at = (p * 32 + lane_index) * PIECE;
            if (!set.has_row()) continue;
            const long long channel = set.first_of_piece();
            const DT_TYPE* dt = row_of<DT_TYPE>(in.dt, batch, step) + channel;
            const X_TYPE* dy = row_of<X_TYPE>(a.dy, batch, step) + channel;
            const X_TYPE* gate = row_of<X_TYPE>(in.gate, batch, step) + channel;
            fetch_piece(shared.dt[stage] + at, dt, exist);
            fetch_piece(shared.dy[stage] + at, dy, exist);
            if (GATE) fetch_piece(shared.gate[stage] + at, gate, exist);
        }
        if (TOKEN_C)
            fetch_C(
                block.C[stage], coefficient_row(in.C, batch, group) + first * in.C.time, in.C.time,
                (int)min(end - first, (long long)TILE)
            );
        copy_async_commit();
    };

    long long first = begin + (end - begin - 1) / TILE * TILE;
    fetch(0, first);
    int stage = 0;
#pragma unroll 1
    for (; first >= begin; first -= TILE, stage ^= 1) {
        copy_async_wait<0>();
#pragma unroll
        for (int p = 0; p < TILE_PASSES; p++) {
            const int row = set.row(p), at = (p * 32 + lane_index) * PIECE;
            if (!set.has_row()) continue;
            real dt[PIECE], dy[PIECE], gate[PIECE];
            widen_all<DT_TYPE, PIECE>(shared.dt[stage] + at, dt);
            widen_all<X_TYPE, PIECE>(shared.dy[stage] + at, dy);
            if (GATE) widen_all<X_TYPE, PIECE>(shared.gate[stage] + at, gate);
            real* to = shared.steps + row * PAIR_STRIDE + set.piece.channel * 2;
#pragma unroll
            for (int i = 0; i < PIECE; i++) {
                real step = step_size(dt[i] + bias[i]);
                step = first + row < end ? step : real(0);
                sums[i] += step;
                real both[2] = {step, GATE ? dy[i] * gate[i] * sigmoid_of(gate[i]) : dy[i]};
                store_vector<real, 2>(to + 2 * i, both);
            }
        }
        // C is there for all warps, and all have left the other stage.
        __syncthreads();
        if (first > begin) fetch(stage ^ 1, first - TILE);
#pragma unroll 4
        for (int t = TILE - 1; t >= 0; t--) {
            real C[STATES_PER_LANE];
            if (TOKEN_C)
                widen_all<COEFFICIENT_TYPE, STATES_PER_LANE>(
                    block.C[stage] + t * PADDED_STATES + lane.part * STATES_PER_LANE, C
                );
#pragma unroll
            for (int c = 0; c < CHANNELS_PER_LANE; c++) {
                const Two now(shared.steps, t, lane.channel(c));
#pragma unroll
                for (int i = 0; i < STATES_PER_LANE; i++) {
                    const int k = c * STATES_PER_LANE + i;
                    const real C_now = TOKEN_C ? C[i] : own_C[k];
                    G[k] = decay_of(now.a, A[k]) * multiply_add(C_now, now.b, G[k]);
                }
            }
        }
        __syncwarp();
    }

    const long long row = PACKED ? chunk : batch * a.chunks + chunk;
    put_states(a.carries + row * in.d * STATES + at_states, lane, channels.count, G);
    // lanes with the same piece of other rows
#pragma unroll
    for (int k = 0; k < PIECE; k++) {
#pragma unroll
        for (int mask = PIECES_PER_ROW; mask < 32; mask *= 2) sums[k] += shuffle_xor(sums[k], mask);
        if (set.piece.row == 0 && k < set.count)
            a.dt_sums[row * in.d + set.first_of_piece() + k] = sums[k];
    }
}

// Chain the chunks from the last to the first: a thread takes one state of one channel, and turns
// what each chunk sends back of nothing into the gradient that reaches the chunk.
KERNEL(256, 1) scan_join_back(const __grid_constant__ Arguments a) {
    const long long row = a.in.d * STATES, i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= (PACKED ? a.listed : a.in.b) * row) return;
    const long long batch = i / row, k = i % row;
    const real A = times_log2e(a.in.A[k]);
#if PACKED
    const Span of = a.spans[batch];
    const long long first = of.chunk, last = first + of.steps - 1;
    real G = a.dlast_state ? a.dlast_state[of.sequence * row + k] : real(0);
#else
    const long long first = batch * a.chunks + a.tail - 1, last = (batch + 1) * a.chunks - 1;
    real G = a.dlast_state ? a.dlast_state[i] : real(0);
#endif
    constexpr int AT_ONCE = 8; // so many chunks are read before they are chained
    for (long long from = last; from > first; from -= AT_ONCE) {
        real sent[AT_ONCE], dt_sum[AT_ONCE];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const long long at = max(from - j, first + 1);
            sent[j] = a.carries[at * row + k], dt_sum[j] = a.dt_sums[at * a.in.d + k / STATES];
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            if (from - j <= first) break;
            a.carries[(from - j) * row + k] = G;
            G = multiply_add(decay_of(dt_sum[j], A), G, sent[j]);
        }
    }
    a.carries[first * row + k] = G;
}

// ---------------------------------------------------------------- sums of the blocks' parts

// First threads each take some states of dB or dC at a step and group, the others one number
// each of what is summed over batch and chunks.
KERNEL(256, 1) scan_add(const __grid_constant__ Arguments a) {
    const Operands& in = a.in;
    long long i = blockIdx.x * 256ll + threadIdx.x;
    if constexpr (COEFFICIENTS > 0) {
        constexpr int COUNT = PADDED_STATES < 4 ? PADDED_STATES : 4;
        const long long rows = in.b * in.l * SUMS, items = rows / COUNT * in.g;
        if (i < items) {
            const long long group = i / (rows / COUNT), at = i % (rows / COUNT) * COUNT;
            const long long row = at / SUMS, batch = row / in.l, step = row % in.l;
            const int within = (int)(at % SUMS), first_state = within % PADDED_STATES;
            const bool is_B = TOKEN_B && within < PADDED_STATES;
            const Rows& to = is_B ? a.dB : a.dC;
            // where only the other of B and C has groups, this one's gradient is the sum of all
            const bool shared = to.group == 0;
            if (shared && group > 0) return;
            const real* from = a.token_parts + group * a.columns * rows + at;
            const long long columns = shared ? in.g * a.columns : a.columns;
            real sum[COUNT];
#pragma unroll
            for (int j = 0; j < COUNT; j++) sum[j] = 0;
#pragma unroll 8
            for (long long column = 0; column < columns; column++) {
                Vector<real, COUNT> v = load_vector<real, COUNT>(from + column * rows);
#pragma unroll
                for (int j = 0; j < COUNT; j++) sum[j] += v.at[j];
            }
            COEFFICIENT_TYPE* out = row_of<COEFFICIENT_TYPE>(to, batch, step) + group * to.group;
#pragma unroll
            for (int j = 0; j < COUNT; j++) {
                if (first_state + j < STATES)
                    out[first_state + j] = narrow<COEFFICIENT_TYPE>(sum[j]);
            }
            return;
        }
        i -= items;
    }
    const long long width = in.d * STATES * (1 + CONSTANT_B + CONSTANT_C) + 2 * in.d;
    if (i >= width) return;
    real sum = 0;
#pragma unroll 8
    for (long long row = 0; row < in.b * a.chunks; row++) sum += a.parts[row * width + i];
    // a row of parts is dA, dD, ddt_bias, then dB and dC where they are constant
    const long long matrix = in.d * STATES;
    if (i < matrix) {
        a.dA[i] = sum;
    } else if ((i -= matrix) < in.d) {
        a.dD[i] = sum;
    } else if ((i -= in.d) < in.d) {
        a.ddt_bias[i] = sum;
    } else if (i -= in.d; CONSTANT_B && i < matrix) {
        a.dB_constant[i] = sum;
    } else {
        a.dC_constant[CONSTANT_B ? i - matrix : i] = sum;
    }
}
