// How kernels learn of a pack: sequences of different lengths, end to end along time.
//
// Python, which knows all lengths, lists the spans of time that blocks take, in the order in which
// they should start, so that there is no block without work (__init__.py).
#pragma once

// Steps of one sequence. Blocks find theirs in a list.
struct Span {
    long long begin;   // the first one's place in the pack
    int steps;
    int sequence;
    int before, after; // steps of the sequence on either side; of very many only that they are many
    int chunk;         // counts the spans of sequences that have several
    int unused;
};
