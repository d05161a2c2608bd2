/* How fast this machine multiplies and adds: independent chains of fused multiply-adds that
   never leave the registers. The rate bounds every kernel from above. */
#include <stdint.h>

#ifndef LANES
#define LANES 16
#endif

typedef float lanes __attribute__((vector_size(4 * LANES)));

enum { CHAINS = 12 };

/* Run `steps` multiply-adds in each of CHAINS chains: steps * CHAINS vector instructions. */
float fma_chains(int64_t steps)
{
    lanes chain[CHAINS];
    for (int i = 0; i < CHAINS; i++)
        for (int j = 0; j < LANES; j++)
            chain[i][j] = 0.5f + 0.01f * (float)i;
    lanes factor, term;
    for (int j = 0; j < LANES; j++) {
        factor[j] = 0.75f;
        term[j] = 0.25f;
    }
    for (int64_t step = 0; step < steps; step++) {
        for (int i = 0; i < CHAINS; i++)
            chain[i] = chain[i] * factor + term;
        /* The values stay in registers, but the compiler must not fold the steps. */
        __asm__ volatile("" : "+r"(steps));
    }
    lanes sum = chain[0];
    for (int i = 1; i < CHAINS; i++)
        sum += chain[i];
    float total = 0;
    for (int j = 0; j < LANES; j++)
        total += sum[j];
    return total;
}
