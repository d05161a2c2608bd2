// A number for each of many tensors that tells what is in it, at the speed of memory.
//
//     sum_j (2 j + 1) word_j     modulo 2^64
//
// A factor that is odd becomes 0 by no difference of a word, and no two places among 2^31 have the
// same one, so that an exchange of two words shows too; after so many words, 8 GB, factors begin
// again. Words have four bytes, and two at the end of a tensor or all over one that does not lie
// on a border of 16 bytes. Sums of whole numbers are the same in any order. -D gives THREADS,
// whole warps.
#include "_cuda.cuh"

typedef unsigned long long Sum;

struct Tensor {
    const unsigned char* data;
    long long bytes; // even
};

struct Arguments {
    const Tensor* tensors; // one for each y of the grid
    Sum* parts;            // (tensors, x of the grid)
};

DEVICE Sum weighed(unsigned int word, unsigned int place) {
    return (Sum)word * (2 * place + 1);
}

KERNEL(THREADS, 1) sums(const __grid_constant__ Arguments a) {
    __shared__ Sum shares[THREADS];
    const Tensor tensor = a.tensors[blockIdx.y];
    const long long first = blockIdx.x * (long long)THREADS + threadIdx.x;
    const long long threads = gridDim.x * (long long)THREADS;
    const long long pieces = (unsigned long long)tensor.data % 16 ? 0 : tensor.bytes / 16;
    Sum sum = 0;
#pragma unroll 4
    for (long long i = first; i < pieces; i += threads) {
        const uint4 piece = ((const uint4*)tensor.data)[i];
        const unsigned int place = (unsigned int)(4 * i);
        sum += weighed(piece.x, place) + weighed(piece.y, place + 1);
        sum += weighed(piece.z, place + 2) + weighed(piece.w, place + 3);
    }
    for (long long i = 8 * pieces + first; i < tensor.bytes / 2; i += threads)
        sum += weighed(((const unsigned short*)tensor.data)[i], (unsigned int)i);

    shares[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shares[threadIdx.x] += shares[threadIdx.x + half];
    }
    if (threadIdx.x == 0) a.parts[blockIdx.y * (long long)gridDim.x + blockIdx.x] = shares[0];
}
