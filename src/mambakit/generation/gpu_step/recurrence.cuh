// The scan's equation of one state, for the kernels that step it.
//
//     h' = exp(dt A) h + dt B u
#pragma once
#include "common.cuh"

DEVICE float softplus(float v) {
    return add_log1p(exp2_fast(-LOG2E * fabsf(v)), max(v, 0.0f));
}

// exp(dt A), of an A that was multiplied by log2(e).
DEVICE float decay(float dt, float A) { return exp2_fast(fmaf(dt, A, EXP2_BIAS)); }
