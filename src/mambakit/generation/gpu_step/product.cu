// A matrix times a few vectors, at the speed at which memory gives the matrix.
//
// A block has ROWS rows of the matrix and COLUMNS vectors. The matrix comes into shared memory by
// asynchronous copies, STAGES steps ahead, and every number of it is read from memory once. It
// does not depend on any kernel before, so its first steps are on their way before this block
// waits for those to end; the vectors come after that.
//
// In a step a warp takes a slice of a few rows, 64 bytes of each: a lane a piece of 16 bytes of
// row g and of row g + 8 (lane 4 g + t, piece t), and the same columns of the vectors. Which of
// its columns meet in which multiplication of the tensor cores does not matter to a sum, so a
// piece is used as it lies. Warps share a step by rows, vectors and slices; at the end the slices
// are added up in shared memory, in the order of the warps. Pieces of odd rows lie shifted in
// shared memory, so that two rows do not meet in a bank.
//
// Matrices of floats are multiplied without tensor cores, which would round them.
//
// -D gives what common.cuh says, and TENSORS, 1 unless FACTOR is float; ROWS, 16, 32 or 64;
// COLUMNS, a power of 2 from 8 to 128, without tensor cores to 16; STAGES, at least 2; END, what
// becomes of the sums:
//   SUMS       written for each span of the matrix's columns (blockIdx.z), to be added up later
//   LOGITS     written to the call's logits
//   CONVOLVED  u = silu(conv(...)) of the rows before `channels`, silu of the others; the window
//              of the convolution is WINDOW
#include "common.cuh"

#define SUMS 0
#define LOGITS 1
#define CONVOLVED 2

constexpr int WARPS = 8, THREADS = 32 * WARPS;

// How the warps share a step.
constexpr bool WIDE = COLUMNS == 128 && ROWS > 16;
constexpr int TILES = WIDE ? 2 : 1; // of 16 rows, in a warp
constexpr int COLUMN_WARPS = WIDE ? 2 : 1;
constexpr int ROW_WARPS = ROWS / (16 * TILES);
constexpr int SLICES = WARPS / (COLUMN_WARPS * ROW_WARPS);
constexpr int WARP_COLUMNS = COLUMNS / COLUMN_WARPS;

constexpr int PIECE = 16 / sizeof(WEIGHT);     // weights
constexpr int STEP = SLICES * 4 * PIECE;       // columns of the matrix
constexpr int ROW_PIECES = SLICES * 4;
constexpr int FACTORS = 16 / sizeof(FACTOR);   // numbers of a vector in 16 bytes
constexpr int LANE_PIECES = PIECE / FACTORS;   // of a vector, for one of weights
constexpr int VECTOR_PIECES = ROW_PIECES * LANE_PIECES;
constexpr int MATRIX_BYTES = ROWS * ROW_PIECES * 16;
constexpr int STAGE_BYTES = MATRIX_BYTES + COLUMNS * VECTOR_PIECES * 16;
constexpr int PITCH = ROWS + 4; // of sums in shared memory, so that lanes do not meet in a bank

// On a multiprocessor. Many sums take many registers, and int8 twice as many for a piece's weights.
constexpr int BLOCKS = WIDE || sizeof(WEIGHT) == 1 && COLUMNS > 32 ? 1 : 2;

static_assert(STAGES >= 2 && SLICES >= 2, "");
static_assert(sizeof(FACTOR) == (TENSORS ? 2 : 4), "");

struct Arguments {
    const Call* call;
    const WEIGHT* matrix; // (rows, columns)
    const float* scales;  // (rows), or null
    long long rows, columns;
    const FACTOR* vectors; // (capacity, columns)
    long long span;        // columns for a block, a multiple of STEP
    float* sums;           // (spans, capacity, rows)
    long long capacity;
    const float* bias; // (rows), or null
    const float* taps; // (WINDOW, channels)
    const float* tap_bias; // (channels), or null
    FACTOR* u;             // (capacity, u_columns)
    long long u_columns;
    float* gate; // (capacity, channels)
    long long channels, layer;
};

// A block's place.
struct Block {
    long long row, column, from, to, b;

    METHOD Block(const Arguments& a)
        : row((long long)blockIdx.x * ROWS), column((long long)blockIdx.y * COLUMNS),
          from((long long)blockIdx.z * a.span), to(min(from + a.span, a.columns)), b(a.call->b) {}
};

DEVICE int piece_offset(int row, int piece) {
    return (row * ROW_PIECES + (piece ^ 4 * (row & 1))) * 16;
}
DEVICE unsigned char* matrix_piece(unsigned char* stage, int row, int piece) {
    return stage + piece_offset(row, piece);
}
DEVICE unsigned char* vector_piece(unsigned char* stage, int column, int piece) {
    constexpr int SHIFT = LANE_PIECES == 1 ? 4 : 1;
    return stage + MATRIX_BYTES +
           (column * VECTOR_PIECES + (piece ^ SHIFT * (column & 1))) * 16;
}

// The pieces of the matrix that this thread copies in each step.
struct MatrixPieces {
    static constexpr int COUNT = ROWS * ROW_PIECES / THREADS;
    static_assert(ROWS * ROW_PIECES % THREADS == 0, "");

    const WEIGHT* from[COUNT];
    int to[COUNT], left[COUNT]; // place in a stage; columns up to the end of the span

    METHOD MatrixPieces(const Arguments& a, const Block& at) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int e = threadIdx.x + i * THREADS, row = e / ROW_PIECES, piece = e % ROW_PIECES;
            const bool there = at.row + row < a.rows;
            const long long column = at.from + piece * PIECE;
            from[i] = a.matrix + (there ? (at.row + row) * a.columns + column : 0);
            left[i] = there ? (int)(at.to - column) : 0;
            to[i] = piece_offset(row, piece);
        }
    }

    METHOD void copy(unsigned char* stage, int k) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            copy_async_16(stage + to[i], from[i] + k, k < left[i]);
    }
};

// A piece of a vector: where it goes, and where it comes from; null where there are zeros.
struct Place {
    unsigned char* to;
    const FACTOR* from;

    METHOD Place(const Arguments& a, const Block& at, unsigned char* stage, long long k, int e) {
        int j = e / VECTOR_PIECES, piece = e % VECTOR_PIECES;
        long long column = k + piece * FACTORS;
        bool there = at.column + j < at.b && column < at.to;
        from = there ? a.vectors + (at.column + j) * a.columns + column : nullptr;
        to = vector_piece(stage, j, piece);
    }
};
constexpr int STAGE_PIECES = COLUMNS * VECTOR_PIECES;

DEVICE void copy_vectors(const Arguments& a, const Block& at, unsigned char* stage, long long k) {
#pragma unroll 4
    for (int e = threadIdx.x; e < STAGE_PIECES; e += THREADS) {
        const Place place(a, at, stage, k, e);
        copy_async_16(place.to, place.from ? place.from : a.vectors, place.from);
    }
}

// The first steps' vectors come past the groups of copies: one that is waited for would be waited
// for with all the matrix's before it.
DEVICE void load_first_vectors(
    const Arguments& a, const Block& at, unsigned char* shared, int steps
) {
    constexpr int ALL = (STAGES - 1) * STAGE_PIECES;
    constexpr int BATCH = ALL > 4 * THREADS ? 8 : (ALL + THREADS - 1) / THREADS;
#pragma unroll 1
    for (int first = threadIdx.x; first < ALL; first += BATCH * THREADS) {
        uint4 piece[BATCH];
        unsigned char* to[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int e = first + i * THREADS, step = e / STAGE_PIECES;
            piece[i] = make_uint4(0, 0, 0, 0);
            to[i] = nullptr;
            if (e >= ALL || step >= steps) continue;
            const long long k = at.from + (long long)step * STEP;
            const Place place(a, at, shared + step * STAGE_BYTES, k, e % STAGE_PIECES);
            to[i] = place.to;
            if (place.from) piece[i] = load_shared_cache((const uint4*)place.from);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++)
            if (to[i]) *(uint4*)to[i] = piece[i];
    }
}

// ---------------------------------------------------------------- a warp's part of a step

struct Warp {
    int row, column, slice, g, t;

    METHOD Warp() {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        slice = warp % SLICES;
        row = warp / SLICES % ROW_WARPS * 16 * TILES;
        column = warp / (SLICES * ROW_WARPS) * WARP_COLUMNS;
        g = lane / 4;
        t = lane % 4;
    }
};

#if TENSORS
template <class W> DEVICE void pairs_of(uint4 piece, unsigned int* pairs, W) {
    pairs[0] = piece.x;
    pairs[1] = piece.y;
    pairs[2] = piece.z;
    pairs[3] = piece.w;
}
DEVICE unsigned int exact_pair(float low, float high, bf16) {
    return byte_permute(__float_as_uint(low), __float_as_uint(high), 0x7632u);
}
DEVICE unsigned int exact_pair(float low, float high, fp16) { return pack_fp16(low, high); }
// Whole numbers up to 127 are short numbers without a rounding.
DEVICE void pairs_of(uint4 piece, unsigned int* pairs, int8) {
    float wide[16];
    Piece<int8>::widen(piece, wide);
#pragma unroll
    for (int i = 0; i < 8; i++) pairs[i] = exact_pair(wide[2 * i], wide[2 * i + 1], FACTOR{});
}

struct Sums {
    static constexpr int COLUMN_TILES = WARP_COLUMNS / 8, PAIRS = PIECE / 2;
    float sum[TILES][COLUMN_TILES][4] = {};

    METHOD void add(const Warp& w, unsigned char* stage) {
        unsigned int matrix[TILES][2][PAIRS];
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = w.row + 16 * i + 8 * half + w.g;
                uint4 piece = *(const uint4*)matrix_piece(stage, row, 4 * w.slice + w.t);
                pairs_of(piece, matrix[i][half], WEIGHT{});
            }
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
            unsigned int vector[PAIRS];
#pragma unroll
            for (int q = 0; q < LANE_PIECES; q++) {
                int piece = (4 * w.slice + w.t) * LANE_PIECES + q;
                int column = w.column + 8 * n + w.g;
                pairs_of(
                    *(const uint4*)vector_piece(stage, column, piece), vector + 4 * q, FACTOR{}
                );
            }
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int j = 0; j < PAIRS; j += 2) {
                    unsigned int four[4] = {
                        matrix[i][0][j], matrix[i][1][j], matrix[i][0][j + 1], matrix[i][1][j + 1]
                    };
                    multiply_tiles(sum[i][n], four, vector[j], vector[j + 1], FACTOR{});
                }
        }
    }

    METHOD void store(const Warp& w, float* all) const {
        float* own = all + w.slice * COLUMNS * PITCH;
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    int row = w.row + 16 * i + 8 * (k / 2) + w.g;
                    int column = w.column + 8 * n + 2 * w.t + k % 2;
                    own[column * PITCH + row] = sum[i][n][k];
                }
    }
};

#else
struct Sums {
    float sum[2][COLUMNS] = {};

    METHOD void add(const Warp& w, unsigned char* stage) {
        float4 matrix[2];
#pragma unroll
        for (int half = 0; half < 2; half++)
            matrix[half] = *(const float4*)matrix_piece(
                stage, w.row + 8 * half + w.g, 4 * w.slice + w.t
            );
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
            float4 v = *(const float4*)vector_piece(stage, n, 4 * w.slice + w.t);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float4 m = matrix[half];
                float s = sum[half][n];
                sum[half][n] = fmaf(m.w, v.w, fmaf(m.z, v.z, fmaf(m.y, v.y, fmaf(m.x, v.x, s))));
            }
        }
    }

    METHOD void store(const Warp& w, float* all) {
        float* own = all + w.slice * COLUMNS * PITCH;
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float s = sum[half][n];
                s += shuffle_xor(s, 1);
                s += shuffle_xor(s, 2);
                if (w.t == n % 4) own[n * PITCH + w.row + 8 * half + w.g] = s;
            }
    }
};
#endif

// ---------------------------------------------------------------- what becomes of the sums

// Ask for the windows that the end of this block reads.
DEVICE void fetch_window(const Arguments& a, const Block& at) {
#if END == CONVOLVED
    if (at.row >= a.channels || !a.call->conv) return;
    const int columns = (int)min(at.b - at.column, (long long)COLUMNS);
    for (int e = threadIdx.x; e < columns * (WINDOW - 1); e += THREADS)
        prefetch(
            a.call->conv +
            ((a.layer * at.b + at.column) * (WINDOW - 1) + e) * a.channels + at.row
        );
#endif
}

// A thread's row of the block: what it needs beside the sums, and does with them.
struct End {
    static constexpr int APART = THREADS / ROWS; // columns from one of a thread's to its next
    static constexpr int BATCH = COLUMNS >= 4 * APART ? 4 : 1;

    long long row;
    float scale;
#if END == CONVOLVED
    static constexpr int PAST = WINDOW - 1;
    float bias, tap_bias, taps[WINDOW];
    const TYPE* old_window;
    TYPE* new_window;
#endif

    // Before other kernels are waited for: the parameters.
    METHOD End(const Arguments& a, const Block& at) : row(at.row + threadIdx.x % ROWS) {
        const bool there = row < a.rows;
        scale = there && a.scales ? a.scales[row] : 1;
#if END == CONVOLVED
        const bool convolved = row < a.channels;
        old_window = in_global(a.call->conv);
        new_window = in_global(a.call->new_conv);
        bias = there && a.bias ? a.bias[row] : 0;
        tap_bias = convolved && a.tap_bias ? a.tap_bias[row] : 0;
#pragma unroll
        for (int k = 0; k < WINDOW; k++) taps[k] = convolved ? a.taps[k * a.channels + row] : 0;
#endif
    }

    METHOD static float sum_of(const float* all, int column) {
        float sum = 0;
#pragma unroll
        for (int s = 0; s < SLICES; s++)
            sum += all[(s * COLUMNS + column) * PITCH + threadIdx.x % ROWS];
        return sum;
    }

    METHOD void finish(const Arguments& a, const Block& at, const float* all) const {
        if (row >= a.rows) return;
        const int columns = (int)min(at.b - at.column, (long long)COLUMNS);
        for (int j = threadIdx.x / ROWS; j < columns; j += BATCH * APART)
            several(a, at, all, j, columns);
    }

    METHOD void several(
        const Arguments& a, const Block& at, const float* all, int first, int columns
    ) const {
#if END == CONVOLVED
        // all reads of the windows before the first write, which no read may pass
        TYPE past[BATCH][PAST + 1];
        const bool convolved = row < a.channels;
#pragma unroll
        for (int i = 0; i < BATCH; i++)
#pragma unroll
            for (int k = 0; k < PAST; k++) {
                const int j = first + i * APART;
                const bool read = convolved && j < columns && old_window;
                past[i][k] =
                    read ? old_window[window(a, at, j, k)] : narrow<TYPE>(0.0f);
            }
#endif
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int j = first + i * APART;
            if (j >= columns) return;
            const long long column = at.column + j;
            float sum = sum_of(all, j) * scale;
#if END == SUMS
            a.sums[(blockIdx.z * a.capacity + column) * a.rows + row] = sum;
#elif END == LOGITS
            in_global(a.call->logits)[column * a.rows + row] = sum;
#else
            // as the model's own forward, and the window that it leaves behind, have it
            past[i][PAST] = narrow<TYPE>(sum + bias);
            const float v = widen(past[i][PAST]);
            if (!convolved) {
                a.gate[column * a.channels + row - a.channels] = silu(v);
                continue;
            }
            float y = tap_bias;
#pragma unroll
            for (int k = 0; k < WINDOW; k++) y = fmaf(taps[k], widen(past[i][k]), y);
            a.u[column * a.u_columns + row] = narrow<FACTOR>(silu(y));
#pragma unroll
            for (int k = 0; k < PAST; k++) new_window[window(a, at, j, k)] = past[i][k + 1];
#endif
        }
    }

#if END == CONVOLVED
    METHOD long long window(const Arguments& a, const Block& at, int j, int k) const {
        return ((a.layer * at.b + at.column + j) * PAST + k) * a.channels + row;
    }
#endif
};

KERNEL(THREADS, BLOCKS) product(const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(shared);
    const Block at(a);
    // whether a block has work is only asked where it may have none: the answer takes time
    const bool idle = blockIdx.y > 0 && at.column >= at.b;
    const int steps = (int)((at.to - at.from + STEP - 1) / STEP);
    const MatrixPieces pieces(a, at);
    if (!idle) {
#pragma unroll 1
        for (int i = 0; i < STAGES - 1; i++) {
            if (i < steps) pieces.copy(shared + i * STAGE_BYTES, i * STEP);
            copy_async_commit();
        }
        fetch_window(a, at);
    }
    const End end(a, at);
    release_kernels();
    await_kernels();
    if (idle) return;

    load_first_vectors(a, at, shared, steps);
    const Warp warp;
    Sums sums;
    int now = 0, free = STAGES - 1;
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        const int next = i + STAGES - 1;
        if (next < steps) {
            pieces.copy(shared + free * STAGE_BYTES, next * STEP);
            copy_vectors(a, at, shared + free * STAGE_BYTES, at.from + (long long)next * STEP);
        }
        copy_async_commit();
        sums.add(warp, shared + now * STAGE_BYTES);
        free = now;
        now = now + 1 == STAGES ? 0 : now + 1;
    }
    __syncthreads();
    float* all = (float*)shared;
    sums.store(warp, all);
    __syncthreads();

    end.finish(a, at, all);
}
