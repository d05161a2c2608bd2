// RMSNorm, of x or of x + addend: each is read once and each result is written once.
//
//     sum = x + addend                           as PyTorch adds: in float32, rounded to SUM
//     y   = gain sum / sqrt(mean(sum^2) + eps)   in float32, rounded to GAIN
//
// A row has WARPS warps, a block ROWS rows. A thread has every 32 WARPS-th packet of VECTOR
// neighbouring numbers, PACKETS of them in registers between the two uses; rows that are LONG are
// taken piece by piece and read again.
//
// -D gives: STREAM, ADDEND, SUM, GAIN (dtypes; that of SUM is what the first two promote to, that
// of GAIN is also that of y), ADDS (1 if there is an addend, 0 if sum is x and is not written),
// VECTOR (1, or more if every row starts on a multiple of 16 bytes and ends on one of VECTOR
// numbers), PACKETS, WARPS, ROWS, LONG (0 or 1), and BLOCKS for a multiprocessor.
#include "_cuda.cuh"

constexpr int OWNERS = 32 * WARPS;                     // threads of a row
constexpr long long PIECE = PACKETS * OWNERS * VECTOR; // numbers that they hold at once
constexpr bool EARLY = !LONG && PACKETS * VECTOR <= 8; // registers hold the gain beside them

// Mirrored by _Arguments in cuda.py, field by field. Strides count elements.
struct Arguments {
    long long rows, width;
    const STREAM* x;
    long long x_row;
    const ADDEND* addend;
    long long addend_row;
    const GAIN* gain;
    SUM* sum; // (rows, width), dense, as y
    GAIN* y;
    double eps;
};

// VECTOR numbers as they lie in memory, moved by as few instructions as there are 16 bytes.
template <class T> constexpr int BYTES = VECTOR * sizeof(T) < 16 ? VECTOR * sizeof(T) : 16;
template <class T> struct alignas(BYTES<T>) Packet {
    T raw[VECTOR];

    METHOD void load(const T* at, bool valid) {
        if (valid) {
            *this = *(const Packet*)at;
        } else {
#pragma unroll
            for (int i = 0; i < VECTOR; i++) raw[i] = narrow<T>(0.0f);
        }
    }
    METHOD void store(T* at) const { *(Packet*)at = *this; }
};

// Where a thread's packets of a row lie: at `first`, and at constant distances from there.
struct Share {
    long long first, left; // numbers of the row from the first on, none if there is no such row

    METHOD Share(const Arguments& a, bool exists, long long piece) {
        first = piece + (int)threadIdx.x % OWNERS * VECTOR;
        left = exists ? a.width - first : 0;
    }
    METHOD bool has(int p) const { return p * OWNERS * VECTOR < left; }
};

typedef float Numbers[PACKETS][VECTOR];

template <class T> DEVICE void read(const T* row, const Share& share, Numbers v) {
    Packet<T> found[PACKETS];
#pragma unroll
    for (int p = 0; p < PACKETS; p++)
        found[p].load(row + share.first + p * OWNERS * VECTOR, share.has(p));
#pragma unroll
    for (int p = 0; p < PACKETS; p++)
#pragma unroll
        for (int i = 0; i < VECTOR; i++) v[p][i] = widen(found[p].raw[i]);
}
template <class T> DEVICE void write(T* row, const Share& share, const Numbers v) {
#pragma unroll
    for (int p = 0; p < PACKETS; p++) {
        Packet<T> packet;
#pragma unroll
        for (int i = 0; i < VECTOR; i++) packet.raw[i] = narrow<T>(v[p][i]);
        if (share.has(p)) packet.store(row + share.first + p * OWNERS * VECTOR);
    }
}

// The sum over all threads of a row.
DEVICE float add_up(float part) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) part += shuffle_xor(part, mask);
    if (WARPS == 1) return part;
    __shared__ float parts[ROWS * WARPS];
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) parts[warp] = part;
    __syncthreads();
    part = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) part += parts[warp / WARPS * WARPS + i];
    return part;
}

KERNEL(OWNERS * ROWS, BLOCKS) rms_norm(const __grid_constant__ Arguments a) {
    const long long row = (long long)blockIdx.x * ROWS + (int)threadIdx.x / OWNERS;
    const bool exists = row < a.rows;
    const STREAM* x = a.x + row * a.x_row;
    SUM* sum = a.sum + row * a.width;

    Numbers v, gain;
    float squares = 0;
    long long piece = 0;
    do {
        const Share share(a, exists, piece);
        read(x, share, v);
        if (EARLY) read(a.gain, share, gain);
        if (ADDS) {
            Numbers more;
            read(a.addend + row * a.addend_row, share, more);
#pragma unroll
            for (int p = 0; p < PACKETS; p++)
#pragma unroll
                for (int i = 0; i < VECTOR; i++) v[p][i] = widen(narrow<SUM>(v[p][i] + more[p][i]));
            write(sum, share, v);
        }
#pragma unroll
        for (int p = 0; p < PACKETS; p++)
#pragma unroll
            for (int i = 0; i < VECTOR; i++) squares = fmaf(v[p][i], v[p][i], squares);
        piece += PIECE;
    } while (LONG && piece < a.width);

    const float inverse = 1.0f / sqrtf(add_up(squares) / (float)a.width + (float)a.eps);
    piece = 0;
    do {
        const Share share(a, exists, piece);
        if (!EARLY) read(a.gain, share, gain);
        if (LONG && ADDS) read((const SUM*)sum, share, v);
        if (LONG && !ADDS) read(x, share, v);
#pragma unroll
        for (int p = 0; p < PACKETS; p++)
#pragma unroll
            for (int i = 0; i < VECTOR; i++) v[p][i] = v[p][i] * inverse * gain[p][i];
        write(a.y + row * a.width, share, v);
        piece += PIECE;
    } while (LONG && piece < a.width);
}
