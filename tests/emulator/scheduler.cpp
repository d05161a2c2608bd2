// Run a kernel over its grid: blocks one after another, a block's threads as fibers.
//
// Built once; entries.cpp with the kernels of one .cu file is linked to it.
#include "_cuda.cuh"

#include <setjmp.h>
#include <stdio.h>
#include <ucontext.h>

#include <memory>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

Thread* current;
unsigned char (*slots)[2][32][16];
unsigned char* dynamic_shared;
unsigned int part;

namespace {

constexpr size_t STACK = 256 * 1024;

struct Fiber {
    Thread thread;
    std::unique_ptr<unsigned char[]> stack;
    ucontext_t start;
    jmp_buf place;
    bool started;

    Fiber();
};

std::vector<std::unique_ptr<Fiber>> fibers;
ucontext_t beginning;
jmp_buf scheduler;
void (*body)(const void*);
const void* arguments;
char failure[400];

// A fiber lives on from block to block: starting one takes system calls.
void enter() {
    for (;;) {
        body(arguments);
        wait(DONE);
    }
}

Fiber::Fiber() : stack(new unsigned char[STACK]), started(false) {
    getcontext(&start);
    start.uc_stack.ss_sp = stack.get();
    start.uc_stack.ss_size = STACK;
    start.uc_link = nullptr;
    makecontext(&start, enter, 0);
}

// Let one thread run until it waits, ends or fails.
void resume(unsigned int index) {
    Fiber& fiber = *fibers[index];
    current = &fiber.thread;
    threadIdx = {index, 0, 0};
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    // ucontext gives a fiber its stack; from then on jumps are quicker
    fiber.started = true;
    swapcontext(&beginning, &fiber.start);
}

const char* name_of(Turn turn) {
    static const char* const names[] = {
        "runs", "waits at __syncwarp", "waits at a shuffle", "waits at barrier_of",
        "waits at __syncthreads", "has returned"
    };
    return names[turn];
}

// If every thread from `first` on waits at the same barrier, open it.
bool open(unsigned int first, unsigned int count, Turn barrier) {
    for (unsigned int i = 0; i < count; i++)
        if (fibers[first + i]->thread.turn != barrier) return false;
    for (unsigned int i = 0; i < count; i++) fibers[first + i]->thread.turn = RUNS;
    return true;
}

// If as many threads wait at the barrier of some warps as it is for, open it.
bool open_part(unsigned int threads) {
    unsigned int waiting = 0;
    for (unsigned int i = 0; i < threads; i++) waiting += fibers[i]->thread.turn == PART_BARRIER;
    if (waiting == 0 || waiting != part) return false;
    for (unsigned int i = 0; i < threads; i++)
        if (fibers[i]->thread.turn == PART_BARRIER) fibers[i]->thread.turn = RUNS;
    return true;
}

void fail_stuck(unsigned int threads) {
    snprintf(
        failure, sizeof failure, "every thread %s, which is for another number of threads",
        name_of(fibers[0]->thread.turn)
    );
    for (unsigned int i = 1; i < threads; i++) {
        Turn a = fibers[i - 1]->thread.turn, b = fibers[i]->thread.turn;
        if (a == b) continue;
        snprintf(
            failure, sizeof failure,
            "a barrier that some threads never reach: in block (%u, %u, %u) thread %u %s and "
            "thread %u %s",
            blockIdx.x, blockIdx.y, blockIdx.z, i - 1, name_of(a), i, name_of(b)
        );
        return;
    }
}

// The linker names the ends of a section; a kernel without static shared memory has none.
extern "C" {
extern unsigned char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));
}
void poison_static_shared() {
    memset(
        __start_emulated_shared, 0xff, (size_t)(__stop_emulated_shared - __start_emulated_shared)
    );
}

void run_block(unsigned int threads) {
    for (unsigned int i = 0; i < threads; i++) fibers[i]->thread = Thread{RUNS, 0, 0, {}};
    unsigned int warps = threads / 32, done = 0;
    for (unsigned int turn = 0; done < warps; turn++) {
        bool moved = false;
        done = 0;
        for (unsigned int j = 0; j < warps; j++) {
            // another warp first and another order of its lanes at each turn
            unsigned int first = (j + turn) % warps * 32, start = turn * 7, step = 2 * turn + 1;
            for (unsigned int i = 0; i < 32; i++) {
                unsigned int index = first + (start + i * step) % 32;
                if (fibers[index]->thread.turn != RUNS) continue;
                resume(index);
                moved = true;
                if (failure[0]) return;
            }
            moved |= open(first, 32, WARP_BARRIER) || open(first, 32, SHUFFLE);
        }
        for (unsigned int i = 0; i < threads; i += 32) {
            unsigned int ended = 0;
            for (unsigned int k = 0; k < 32; k++) ended += fibers[i + k]->thread.turn == DONE;
            done += ended == 32;
        }
        moved |= open_part(threads);
        moved |= open(0, threads, BLOCK_BARRIER);
        if (!moved && done < warps) return fail_stuck(threads);
    }
}

} // namespace

void wait(Turn barrier) {
    Thread* self = current;
    Fiber* fiber = reinterpret_cast<Fiber*>(self);
    self->turn = barrier;
    if (!_setjmp(fiber->place)) _longjmp(scheduler, 1);
}

void fail(const char* sentence) {
    snprintf(
        failure, sizeof failure, "%s, in block (%u, %u, %u), thread %u", sentence, blockIdx.x,
        blockIdx.y, blockIdx.z, threadIdx.x
    );
    _longjmp(scheduler, 1);
}

// Return "" or what went wrong.
const char* run(
    void (*kernel)(const void*), const unsigned int* grid, unsigned int threads, const void* given,
    size_t shared_bytes
) {
    body = kernel;
    arguments = given;
    if (failure[0]) fibers.clear(); // they were left where the last kernel failed
    while (fibers.size() < threads) fibers.emplace_back(new Fiber());
    std::unique_ptr<unsigned char[][2][32][16]> room(new unsigned char[threads / 32][2][32][16]);
    slots = room.get();
    std::unique_ptr<unsigned char[]> bytes(new unsigned char[shared_bytes + 128]);
    dynamic_shared = bytes.get() + (128 - reinterpret_cast<size_t>(bytes.get()) % 128);
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    failure[0] = 0;
    for (unsigned int z = 0; z < grid[2]; z++)
        for (unsigned int y = 0; y < grid[1]; y++)
            for (unsigned int x = 0; x < grid[0]; x++) {
                blockIdx = {x, y, z};
                memset(dynamic_shared, 0xff, shared_bytes);
                poison_static_shared();
                run_block(threads);
                if (failure[0]) return failure;
            }
    return failure;
}

} // namespace emulator

// What the compiler calls where it finds an address or an index to be wrong (-fsanitize=...).
struct Place {
    const char* file;
    unsigned int line, column;
};
static void fail_at(const char* what, const Place* place) {
    char sentence[300];
    snprintf(sentence, sizeof sentence, "%s at %s:%u", what, place->file, place->line);
    emulator::fail(sentence);
}
extern "C" void __ubsan_handle_type_mismatch_v1(Place* place, size_t address) {
    fail_at(address ? "an address that is no multiple of what it must be" : "a null pointer", place);
}
extern "C" void __ubsan_handle_out_of_bounds(Place* place, size_t) {
    fail_at("an index beyond its array", place);
}
