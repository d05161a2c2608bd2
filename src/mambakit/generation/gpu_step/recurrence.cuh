// The scan's equation of one state, for the kernels that step it.
//
//     h' = exp(dt A) h + dt B u
#pragma once
#include "common.cuh"

// log1p of 0 <= u <= 1 over u, as the scan over time has it: to 2e-7 of the value.
DEVICE float log1p_over(float u) {
    float p = 0.005232693627476692f;
    p = fmaf(p, u, -0.02950523979961872f);
    p = fmaf(p, u, 0.07822596281766891f);
    p = fmaf(p, u, -0.13663247227668762f);
    p = fmaf(p, u, 0.19106008112430573f);
    p = fmaf(p, u, -0.2484298199415207f);
    p = fmaf(p, u, 0.3331909775733948f);
    p = fmaf(p, u, -0.4999949336051941f);
    return fmaf(p, u, 0.9999999403953552f);
}

DEVICE float softplus(float v) {
    const float u = exp2_fast(-LOG2E * fabsf(v));
    return fmaf(log1p_over(u), u, max(v, 0.0f));
}

// Against the bias of the hardware's 2^x, which is low on average: a state is a product of many.
constexpr float EXP2_BIAS = 2e-8f;
// exp(dt A), of an A that was multiplied by log2(e).
DEVICE float decay(float dt, float A) { return exp2_fast(fmaf(dt, A, EXP2_BIAS)); }
