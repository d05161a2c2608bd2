// The gradients of the causal convolution. With u_t the sum before the activation, s_t its
// gradient and P = WIDTH - 1,
//
//   dx_t = sum_k weight_k s_{t+P-k},   dweight_k = sum_t s_t x_{t-P+k},   dbias = sum_t s_t.
//
// x and dy are read once, dx is written once. A run walks P steps beyond its own, for the s_t
// that its last dx need. The parameters' gradients are summed in registers over a run, in shared
// memory over a block, and by conv_reduce over blocks, always in the same order.
#include "conv/cuda/common.cuh"

KERNEL(32 * WARPS, BLOCKS) conv_backward(const __grid_constant__ Arguments a) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Run run(a, warp, lane);
    real sums[WIDTH + 1][CHANNELS] = {};

    if (run.owns && run.steps) {
        Window window;
        read<WIDTH>(a.weight, run.c, window.weight);
        read<1>(a.bias, run.c, window.bias);
        begin(a, run, window.past);
        real slopes[ROOM][CHANNELS] = {}; // s_t of the PAST steps before the present one

        const bool begins = run.from == 0;
        const int walk = run.steps + PAST;
        const int there = (int)min((long long)walk, run.l(a) - run.from); // after them s_t is zero
        // from this step on dx_t takes the gradient of the last state too
        const int late = a.dlast.data ? (int)min((long long)walk, run.l(a) - PAST - run.from) : walk;
        const TYPE* x = at(a.x, run) + run.from * a.x.time;
        const TYPE* dy = at(a.dy, run) + run.from * a.dy.time;
        TYPE* dx = at(a.dx, run) + (run.from - PAST) * a.dx.time;
#pragma unroll 1
        for (int t = 0; t < walk; t += ROWS) {
            Channels xs[ROWS], dys[ROWS];
#pragma unroll
            for (int j = 0; j < ROWS; j++, x += a.x.time, dy += a.dy.time) {
                xs[j] = load(x, t + j < there);
                dys[j] = load(dy, t + j < there);
            }
#pragma unroll
            for (int j = 0; j < ROWS; j++, dx += a.dx.time) {
                if (t + j >= walk) break;
                real row[CHANNELS], slope[CHANNELS], out[CHANNELS];
                xs[j].get(row);
                dys[j].get(slope);
                if (SILU) {
                    window.convolve(row, out);
#pragma unroll
                    for (int i = 0; i < CHANNELS; i++) {
                        real part = sigmoid(out[i]);
                        real factor = part * fma(out[i], real(1) - part, real(1));
                        // zero, whatever the window made of rows that are not there
                        slope[i] = t + j < there ? slope[i] * factor : real(0);
                    }
                }
                if (t + j < run.steps) {
#pragma unroll
                    for (int i = 0; i < CHANNELS; i++) {
#pragma unroll
                        for (int k = 0; k < PAST; k++)
                            sums[k][i] = fma(slope[i], window.past[k][i], sums[k][i]);
                        sums[PAST][i] = fma(slope[i], row[i], sums[PAST][i]);
                        sums[WIDTH][i] += slope[i];
                    }
                }
                // of the step PAST before this one, which may lie in the sequence's past
                const int step = t + j - PAST;
                if (step >= 0 || (begins && a.dpast.data)) {
#pragma unroll
                    for (int i = 0; i < CHANNELS; i++) {
                        real sum = window.weight[0][i] * slope[i];
#pragma unroll
                        for (int k = 0; k < PAST; k++)
                            sum = fma(window.weight[PAST - k][i], slopes[k][i], sum);
                        out[i] = sum;
                    }
                    if (step >= late) {
                        real arriving[CHANNELS];
                        const long long row = run.from + step - run.l(a) + PAST;
                        load(at(a.dlast, run, true) + row * a.dlast.time, true).get(arriving);
#pragma unroll
                        for (int i = 0; i < CHANNELS; i++) out[i] += arriving[i];
                    }
                    if (step >= 0)
                        store(dx, out);
                    else
                        store(at(a.dpast, run, true) + (step + PAST) * a.dpast.time, out);
                }
                push(window.past, row);
                push(slopes, slope);
            }
        }
    }

    __shared__ real parts[WARPS][TILE];
#pragma unroll
    for (int k = 0; k <= WIDTH; k++) { // unrolled, or the sums would not be in registers
        __syncthreads();
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) parts[warp][lane * CHANNELS + i] = sums[k][i];
        __syncthreads();
        for (int i = threadIdx.x; i < TILE; i += 32 * WARPS) {
            const long long c = run.c - lane * CHANNELS + i;
            if (c >= a.d) continue;
            real sum = parts[0][i];
#pragma unroll
            for (int w = 1; w < WARPS; w++) sum += parts[w][i];
            a.sums[(run.block(a) * (WIDTH + 1) + k) * a.d + c] = sum;
        }
    }
}

DEVICE void write(void* to, long long dtype, long long index, real value) {
    if (dtype == FLOAT32) ((float*)to)[index] = (float)value;
    if (dtype == BFLOAT16) ((bf16*)to)[index] = narrow<bf16>((float)value);
    if (dtype == FLOAT16) ((fp16*)to)[index] = narrow<fp16>((float)value);
    if (dtype == FLOAT64) ((double*)to)[index] = (double)value;
}

// A sum that does not lose what each addition rounds away (Kahan's), for there may be as many
// terms as the batch has rows.
struct Sum {
    real total, lost;

    METHOD void add(real value) {
        const real more = value - lost, now = total + more;
        lost = (now - total) - more;
        total = now;
    }
};

constexpr int TOGETHER = 8; // loads that are under way at once

// Add the blocks' sums: a lane has one channel of one tap, a warp every WARPS-th block.
KERNEL(32 * WARPS, 1) conv_reduce(const __grid_constant__ Arguments a) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long columns = (WIDTH + 1) * a.d, column = blockIdx.x * 32ll + lane;
    Sum sum = {};
    if (column < columns) {
        const long long blocks = a.b * a.splits;
        for (long long block = warp; block < blocks; block += WARPS * TOGETHER) {
            real parts[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                const long long one = block + i * WARPS;
                parts[i] = one < blocks ? a.sums[one * columns + column] : real(0);
            }
#pragma unroll
            for (int half = TOGETHER / 2; half; half /= 2)
#pragma unroll
                for (int i = 0; i < half; i++) parts[i] += parts[i + half];
            sum.add(parts[0]);
        }
    }
    __shared__ real parts[WARPS][32];
    parts[warp][lane] = sum.total;
    __syncthreads();
    if (warp || column >= columns) return;
#pragma unroll
    for (int w = 1; w < WARPS; w++) sum.add(parts[w][lane]);
    const long long k = column / a.d, c = column % a.d;
    if (k < WIDTH)
        write(a.dweight, a.weight.dtype, c * WIDTH + k, sum.total);
    else if (a.dbias)
        write(a.dbias, a.bias.dtype, c, sum.total);
}
