// The walk back of scan_backward where a channel has one state, B and C are given by token, and
// all rows are pairs of 16-bit numbers.
//
// Nothing is then summed over states, and all that a channel needs fits in a lane. So a lane takes
// two neighbouring channels, and a block is one warp, which waits for nobody: for each checkpoint
// it runs states forward, leaves in shared memory dt and the state before every SPAN steps, then
// takes the spans from the last to the first, runs each again in registers and walks it back.
#pragma once

constexpr int SPAN = 8, SPANS = CHECKPOINT_STEPS / SPAN;

typedef Vector<real, 2> Pair; // of a lane's channels

struct __align__(16) OneShared {
    Pair dt[CHECKPOINT_STEPS][32], before[SPANS][32];
};

// Two channels' numbers of type T, from a place in a row of them and back.
template <class T> struct Word {
    unsigned int bits;
    METHOD Pair wide() const {
        Pair v;
        unpack(bits, T{}, v.at[0], v.at[1]);
        return v;
    }
    METHOD void set(Pair v) { bits = pack(v.at[0], v.at[1], T{}); }
};

// Rows of a tensor where a lane's numbers lie in them.
template <class T> struct Lines {
    char* at;
    int apart; // bytes
    METHOD T* operator[](int step) const { return (T*)(at + (long long)step * apart); }
    METHOD void move(int steps) { at += (long long)steps * apart; }
    // What is there, and go on to the next row, or stay.
    METHOD T take(bool go_on) {
        const T found = *(const T*)at;
        at += go_on ? apart : 0;
        return found;
    }
};
// From a chunk's first step on.
template <class T>
DEVICE Lines<Word<T>> lines_of(const Rows& rows, const Place& place, long long channel) {
    T* const first = row_of<T>(rows, place.batch, place.begin) + channel;
    return {(char*)first, (int)rows.time * (int)sizeof(T)};
}
DEVICE Lines<COEFFICIENT_TYPE> lines_of_tokens(const Rows& rows, const Place& place) {
    const COEFFICIENT_TYPE* first =
        coefficient_row(rows, place.batch, place.group) + place.begin * rows.time;
    return {(char*)first, (int)rows.time * (int)sizeof(COEFFICIENT_TYPE)};
}

// Sum COUNT numbers over a warp. A lane is left with one, number lane * COUNT / 32.
template <int COUNT, int MASK = 16> DEVICE real sum_over_warp(real* v, int lane) {
    if constexpr (MASK == 0) {
        return v[0];
    } else if constexpr (COUNT == 1) {
        v[0] += shuffle_xor(v[0], MASK);
        return sum_over_warp<1, MASK / 2>(v, lane);
    } else {
        const bool upper = lane & MASK;
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) {
            const real keep = select(upper, v[i + COUNT / 2], v[i]);
            v[i] = keep + shuffle_xor(select(upper, v[i], v[i + COUNT / 2]), MASK);
        }
        return sum_over_warp<COUNT / 2, MASK / 2>(v, lane);
    }
}

DEVICE void walk_one(const Arguments& a, OneShared& shared) {
    const Operands& in = a.in;
    const int lane = threadIdx.x;
    Place place;
    place.find(a);
    const int steps = place.steps;
    const Channels channels(in, place.group, place.column);
    // a lane without channels writes nothing, and has no steps of the first one's
    const bool exists = 2 * lane < channels.count;
    const int left = exists ? steps : 0;
    const long long channel = channels.first + (exists ? 2 * lane : 0);
    auto of_channels = [&](const real* from) {
        return from && exists ? load_vector<real, 2>(from + channel) : Pair{};
    };
    const Pair bias = of_channels(in.dt_bias), D = of_channels(in.D);
    Pair A = of_channels(in.A);
#pragma unroll
    for (int c = 0; c < 2; c++) A.at[c] = times_log2e(A.at[c]);
    const real* G_from = a.carries;
    long long row = place.chunk_row(a);
    if (place.ends(a)) G_from = a.dlast_state, row = place.batch;
    else if (place.awaits(a)) await(flag_of(a, place, 0, place.chunk + 1));
    Pair G = of_channels(G_from ? G_from + row * in.d : nullptr);
    Pair dA{}, dD{}, ddt_bias{};

    auto x_at = lines_of<X_TYPE>(in.x, place, channel);
    auto dt_at = lines_of<DT_TYPE>(in.dt, place, channel);
    auto gate_at = lines_of<X_TYPE>(in.gate, place, channel);
    auto dy_at = lines_of<X_TYPE>(a.dy, place, channel);
    auto dx_at = lines_of<X_TYPE>(a.dx, place, channel);
    auto ddt_at = lines_of<DT_TYPE>(a.ddt, place, channel);
    auto dgate_at = lines_of<X_TYPE>(a.dgate, place, channel);
    auto B_at = lines_of_tokens(in.B, place), C_at = lines_of_tokens(in.C, place);
    real* const sums_to = a.token_parts +
        (((place.group * a.columns + place.column) * in.b + place.batch) * in.l + place.begin) * SUMS;
    const real* const checkpoints =
        a.checkpoints + checkpoint_row(in, place.batch, place.begin, CHECKPOINT_BITS) * in.d;

    // Lines go along with the spans: those of the way back alone begin where steps end.
    const int last = (steps - 1) / CHECKPOINT_STEPS * CHECKPOINT_STEPS;
    int spans = (steps - last + SPAN - 1) / SPAN; // of the checkpoint
    const int ends = last + spans * SPAN;
    x_at.move(last), dt_at.move(last), B_at.move(last);
    dy_at.move(ends), gate_at.move(ends), C_at.move(ends);
    dx_at.move(ends), ddt_at.move(ends), dgate_at.move(ends);
#pragma unroll 1
    for (int index = last / CHECKPOINT_STEPS; index >= 0; index--, spans = SPANS) {
        Pair h = of_channels(checkpoints + index * in.d);
#pragma unroll 1
        for (int span = 0; span < spans; span++) {
            const int first = index * CHECKPOINT_STEPS + span * SPAN;
            auto x_from = x_at;
            auto dt_from = dt_at;
            auto B_from = B_at;
            Word<X_TYPE> x_words[SPAN];
            Word<DT_TYPE> dt_words[SPAN];
            real B[SPAN];
            shared.before[span][lane] = h;
#pragma unroll
            for (int j = 0; j < SPAN; j++) {
                const bool more = first + j + 1 < steps;
                dt_words[j] = dt_from.take(more), x_words[j] = x_from.take(more);
                B[j] = widen(B_from.take(more));
            }
#pragma unroll
            for (int j = 0; j < SPAN; j++) {
                const Pair x = x_words[j].wide();
                Pair dt = dt_words[j].wide();
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    dt.at[c] = step_size(dt.at[c] + bias.at[c]);
                    // past the end, where rows are those of the last step, no state changes
                    if (first + j >= left) dt.at[c] = 0;
                    h.at[c] = multiply_add(
                        decay_of(dt.at[c], A.at[c]), h.at[c], dt.at[c] * x.at[c] * B[j]
                    );
                }
                shared.dt[span * SPAN + j][lane] = dt;
            }
            x_at.move(SPAN), dt_at.move(SPAN), B_at.move(SPAN);
        }
#pragma unroll 1
        for (int span = spans - 1; span >= 0; span--) {
            const int first = index * CHECKPOINT_STEPS + span * SPAN;
            x_at.move(-SPAN), dy_at.move(-SPAN), gate_at.move(-SPAN), B_at.move(-SPAN);
            C_at.move(-SPAN), dx_at.move(-SPAN), ddt_at.move(-SPAN), dgate_at.move(-SPAN);
            auto x_from = x_at, dy_from = dy_at, gate_from = gate_at;
            auto B_from = B_at, C_from = C_at;
            Word<X_TYPE> x_words[SPAN], dy_words[SPAN], gate_words[SPAN];
            real B[SPAN], C[SPAN];
#pragma unroll
            for (int j = 0; j < SPAN; j++) {
                const bool more = first + j + 1 < steps;
                x_words[j] = x_from.take(more), dy_words[j] = dy_from.take(more);
                if (GATE) gate_words[j] = gate_from.take(more);
                B[j] = widen(B_from.take(more)), C[j] = widen(C_from.take(more));
                if (first + j >= left) dy_words[j] = {};
            }
            Pair decay[SPAN], states[SPAN + 1];
            const Pair* const dts = &shared.dt[span * SPAN][lane];
            const Pair* const dts_again = made_here(dts); // read anew they take no registers
            states[0] = shared.before[span][lane];
#pragma unroll
            for (int j = 0; j < SPAN; j++) {
                const Pair x = x_words[j].wide();
                const Pair dt = dts[j * 32];
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    decay[j].at[c] = decay_of(dt.at[c], A.at[c]);
                    states[j + 1].at[c] = multiply_add(
                        decay[j].at[c], states[j].at[c], dt.at[c] * x.at[c] * B[j]
                    );
                }
            }
            Pair span_dA{}, span_dD{}, span_ddt_bias{}; // long sums lose more
            real sums[SUMS * SPAN];
#pragma unroll
            for (int j = SPAN - 1; j >= 0; j--) {
                const Pair x = x_words[j].wide(), dys = dy_words[j].wide(), dt = dts_again[j * 32];
                const Pair gate = GATE ? gate_words[j].wide() : Pair{};
                Pair dx, ddt, dgate;
                real dB = 0, dC = 0;
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const real now = dt.at[c], after = states[j + 1].at[c];
                    real dy = dys.at[c], of_gate = 0;
                    if (GATE) {
                        const real s = sigmoid_of(gate.at[c]), silu = gate.at[c] * s;
                        of_gate = dy * multiply_add(silu, 1 - s, s);
                        dy *= silu;
                    }
                    const real dh = multiply_add(C[j], dy, G.at[c]), dhB = dh * B[j];
                    G.at[c] = dh * decay[j].at[c];
                    const real q = G.at[c] * states[j].at[c];
                    span_dA.at[c] = multiply_add(q, now, span_dA.at[c]);
                    dB += dh * (now * x.at[c]), dC += dy * after;
                    real slope = multiply_add(dhB, x.at[c], q * A.at[c] * LN2);
                    if (SOFTPLUS) slope *= slope_at(now);
                    else if (first + j >= steps) slope = 0;
                    ddt.at[c] = slope;
                    span_ddt_bias.at[c] += slope;
                    span_dD.at[c] = multiply_add(dy, x.at[c], span_dD.at[c]);
                    dx.at[c] = multiply_add(dhB, now, D.at[c] * dy);
                    dgate.at[c] = of_gate * multiply_add(D.at[c], x.at[c], C[j] * after);
                }
                if (first + j < left) {
                    dx_at[j]->set(dx), ddt_at[j]->set(ddt);
                    if (GATE) dgate_at[j]->set(dgate);
                }
                sums[j * SUMS] = dB, sums[j * SUMS + 1] = dC;
            }
#pragma unroll
            for (int c = 0; c < 2; c++) {
                dA.at[c] += span_dA.at[c], dD.at[c] += span_dD.at[c];
                ddt_bias.at[c] += span_ddt_bias.at[c];
            }
            const real sum = sum_over_warp<SUMS * SPAN>(sums, lane);
            if (lane % 2 == 0 && first + lane / 4 < steps) sums_to[first * SUMS + lane / 2] = sum;
        }
        x_at.move(-CHECKPOINT_STEPS), B_at.move(-CHECKPOINT_STEPS);
        dt_at.move(-CHECKPOINT_STEPS - spans * SPAN);
    }

    real* const parts = a.parts + place.parts_row(a) * 3 * in.d + channel;
    if (exists) {
        *(Pair*)parts = dA, *(Pair*)(parts + in.d) = dD, *(Pair*)(parts + 2 * in.d) = ddt_bias;
        // What is sent back goes to the caller or to the chunk before.
        if (place.starts() && a.dstate) *(Pair*)(a.dstate + place.batch * in.d + channel) = G;
        if (place.hands_on(a)) *(Pair*)(a.carries + (place.chunk_row(a) - 1) * in.d + channel) = G;
    }
    if (place.hands_on(a)) publish(flag_of(a, place, 0, place.chunk));
}
