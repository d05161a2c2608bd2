// Kernels that are right or wrong in one way each, to test the emulator with.
#include "_cuda.cuh"

struct Arguments {
    const float* x;
    float* y;
    long long n;
};

DEVICE float sum_of_block(float value) {
    __shared__ float parts[4];
    for (int mask = 16; mask; mask /= 2) value += shuffle_xor(value, mask);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    return parts[0] + parts[1] + parts[2] + parts[3];
}

// Each block sums 512 numbers, which other threads bring.
KERNEL(128, 1) sums(const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(memory);
    float* rows = (float*)memory;
    long long i = blockIdx.x * 512ll + 4 * threadIdx.x;
    copy_async_16(rows + 4 * threadIdx.x, a.x + i, i < a.n);
    copy_async_commit();
    copy_async_commit();
    copy_async_wait<EARLY>();
    __syncthreads();
    const float* mine = rows + 4 * (threadIdx.x ^ 64);
    float sum = sum_of_block(mine[0] + mine[1] + mine[2] + mine[3]);
    if (threadIdx.x == 0) a.y[blockIdx.x] = sum;
}

KERNEL(64, 1) neighbours(const __grid_constant__ Arguments a) {
    float value = a.x[threadIdx.x];
    a.y[threadIdx.x] = shuffle_up(value, 2);
    a.y[64 + threadIdx.x] = shuffle_down(value, 2);
    a.y[128 + threadIdx.x] = shuffle(value, 5);
}

KERNEL(64, 1) unwritten(const __grid_constant__ Arguments a) {
    __shared__ float numbers[64];
    if (threadIdx.x < 32) numbers[threadIdx.x] = 1.0f;
    __syncthreads();
    a.y[threadIdx.x] = numbers[threadIdx.x];
}

KERNEL(64, 1) races(const __grid_constant__ Arguments a) {
    __shared__ float numbers[64];
    numbers[threadIdx.x] = a.x[threadIdx.x];
    a.y[threadIdx.x] = numbers[63 - threadIdx.x];
}

KERNEL(64, 1) diverges(const __grid_constant__ Arguments a) {
    if (threadIdx.x < 40) __syncthreads();
    a.y[threadIdx.x] = 0;
}

KERNEL(64, 1) miscounts(const __grid_constant__ Arguments a) {
    barrier_of(96);
    a.y[threadIdx.x] = 0;
}

KERNEL(64, 1) shuffles_alone(const __grid_constant__ Arguments a) {
    if (threadIdx.x % 2) a.y[threadIdx.x] = shuffle_xor(a.x[threadIdx.x], 2);
}

KERNEL(64, 1) unaligned(const __grid_constant__ Arguments a) {
    float4 four = *(const float4*)(a.x + 1);
    a.y[threadIdx.x] = four.x;
}

KERNEL(64, 1) beyond(const __grid_constant__ Arguments a) {
    __shared__ float numbers[32];
    numbers[threadIdx.x] = 1.0f;
    a.y[threadIdx.x] = numbers[threadIdx.x];
}

KERNEL(64, 1) null(const __grid_constant__ Arguments a) {
    const float* nothing = a.n ? nullptr : a.x;
    a.y[threadIdx.x] = *nothing;
}

// Every 16-bit number widened, and x narrowed to both kinds.
KERNEL(64, 1) converts(const __grid_constant__ Arguments a) {
    for (int i = threadIdx.x; i < 65536; i += 64) {
        unsigned short bits = (unsigned short)i;
        a.y[i] = widen(bf16{bits});
        a.y[65536 + i] = widen(fp16{bits});
    }
    for (int i = threadIdx.x; i < a.n; i += 64) {
        a.y[131072 + i] = widen(narrow<bf16>(a.x[i]));
        a.y[131072 + a.n + i] = widen(narrow<fp16>(a.x[i]));
    }
}
