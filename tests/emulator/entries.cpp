// The kernels of one .cu file as functions that Python can call.
//
// Built with -DKERNEL_SOURCE="the .cu file" and -DKERNEL_ENTRIES="ENTRY(first) ENTRY(second)".
#include "_cuda.cuh"
#include KERNEL_SOURCE

template <auto kernel> struct Caller;
template <class Arguments, void (*kernel)(Arguments)> struct Caller<kernel> {
    static constexpr size_t SIZE = sizeof(Arguments);
    static void call(const void* arguments) { kernel(*static_cast<const Arguments*>(arguments)); }
};

#define ENTRY(name)                                                                              \
    extern "C" size_t name##_arguments_size() { return Caller<&name>::SIZE; }                    \
    extern "C" const char* name##_run(                                                           \
        const unsigned int* grid, unsigned int threads, const void* arguments, size_t shared     \
    ) {                                                                                          \
        return emulator::run(Caller<&name>::call, grid, threads, arguments, shared);             \
    }
KERNEL_ENTRIES
