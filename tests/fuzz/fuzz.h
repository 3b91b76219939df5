/* What all fuzzers share: checks, an allocator that counts, and netchan.h with its implementation. */
#ifndef NETCHAN_FUZZ_H
#define NETCHAN_FUZZ_H

#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1 /* as netchan.h does: with -std=c99, POSIX must be asked for before the first system header */
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* abort() is what libFuzzer sees; the text says why. */
static inline bool fuzz_broken(const char *file, int line, const char *what) {
    fprintf(stderr, "%s:%d: not true: %s\n", file, line, what);
    abort();
}

#define CHECK(x) ((x) ? (void)0 : (void)fuzz_broken(__FILE__, __LINE__, #x))

/* What netchan.h holds at the moment: of the node that runs, if a fuzzer has several (see nodes.h). */
typedef struct memory {
    long blocks;
    size_t bytes;
} memory;

static memory fuzz_first_memory;
static memory *fuzz_memory = &fuzz_first_memory;
static long fuzz_fail_in; /* so many allocations from now one fails; 0: none */
static bool fuzz_failed;  /* one has */

/* The size of a block stands before it. */
enum { FUZZ_HEAD = 16 };

static inline void *fuzz_alloc(size_t size) {
    if (fuzz_fail_in && --fuzz_fail_in == 0) {
        fuzz_failed = true;
        return NULL;
    }
    uint8_t *block = (uint8_t *)malloc(FUZZ_HEAD + size);
    CHECK(block);
    *(size_t *)(void *)block = size;
    fuzz_memory->blocks++;
    fuzz_memory->bytes += size;
    return block + FUZZ_HEAD;
}

static inline void fuzz_free(void *p) {
    if (!p) return;
    uint8_t *block = (uint8_t *)p - FUZZ_HEAD;
    fuzz_memory->blocks--;
    fuzz_memory->bytes -= *(size_t *)(void *)block;
    free(block);
}

#define NETCHAN_MALLOC(size) fuzz_alloc(size)
#define NETCHAN_FREE(ptr) fuzz_free(ptr)

/* The order in which the cases of a select are tried comes from the input: this renames the definition in netchan.h and
 * replaces the calls. */
static uint64_t fuzz_random_state = 1;
static inline uint64_t fuzz_random(void) {
    fuzz_random_state = fuzz_random_state * 6364136223846793005u + 1442695040888963407u;
    return fuzz_random_state >> 16;
}

#define netchan__random(parameters) RANDOM_##parameters
#define RANDOM_void fuzz_random_by_clock(void)
#define RANDOM_ fuzz_random()
#define NETCHAN_ASSERT(x) CHECK(x)
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

/* What stands between these two is not what is fuzzed: its branches are no coverage, and cost no time to count. */
#ifdef __clang__
#define FUZZ_PLAIN_BEGIN                                                                                               \
    _Pragma("clang attribute push(__attribute__((no_sanitize(\"coverage\"))), apply_to = function)")
#define FUZZ_PLAIN_END _Pragma("clang attribute pop")
#else
#define FUZZ_PLAIN_BEGIN
#define FUZZ_PLAIN_END
#endif

/* The input, read from its beginning; after its end come zeros. */
typedef struct input {
    const uint8_t *at, *end;
} input;

static inline input fuzz_input(const uint8_t *data, size_t size) {
    input in = {data, data + size};
    return in;
}

static inline unsigned next_byte(input *in) {
    return in->at < in->end ? *in->at++ : 0;
}

#endif
