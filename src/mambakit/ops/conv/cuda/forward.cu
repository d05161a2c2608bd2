// The causal convolution: x is read once, y written once.
#include "conv/cuda/common.cuh"

KERNEL(32 * WARPS, BLOCKS) conv_forward(const __grid_constant__ Arguments a) {
    const Run run(a, threadIdx.x / 32, threadIdx.x % 32);
    if (!run.owns || !run.steps) return;
    Window window;
    read<WIDTH>(a.weight, run.c, window.weight);
    read<1>(a.bias, run.c, window.bias);
    begin(a, run, window.past);

    const TYPE* x = at(a.x, run) + run.from * a.x.time;
    TYPE* y = at(a.y, run) + run.from * a.y.time;
#pragma unroll 1
    for (int t = 0; t < run.steps; t += ROWS) {
        Channels rows[ROWS];
#pragma unroll
        for (int j = 0; j < ROWS; j++, x += a.x.time) rows[j] = load(x, t + j < run.steps);
#pragma unroll
        for (int j = 0; j < ROWS; j++, y += a.y.time) {
            if (t + j >= run.steps) break;
            real row[CHANNELS], out[CHANNELS];
            rows[j].get(row);
            window.convolve(row, out);
            if (SILU) {
#pragma unroll
                for (int i = 0; i < CHANNELS; i++) out[i] *= sigmoid(out[i]);
            }
            store(y, out);
            push(window.past, row);
        }
    }
    if (!run.ends(a)) return;
    TYPE* last = at(a.last, run, true);
#pragma unroll
    for (int k = 0; k < PAST; k++) store(last + k * a.last.time, window.past[k]);
}
