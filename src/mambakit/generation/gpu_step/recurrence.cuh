// The scan's equation of one state, for the kernels that step it.
//
//     h' = exp(dt A) h + dt B u
#pragma once
#include "common.cuh"

DEVICE float softplus(float v) { return max(v, 0.0f) + log1pf(expf(-fabsf(v))); }

// Against the bias of the hardware's 2^x, which is low on average: a state is a product of many.
constexpr float EXP2_BIAS = 2e-8f;
// exp(dt A), of an A that was multiplied by log2(e).
DEVICE float decay(float dt, float A) { return exp2_fast(fmaf(dt, A, EXP2_BIAS)); }
