/* An allocator for netchan.h that counts and can be told to fail, by a test, or with NETCHAN_TEST_FAIL_ALLOC=n in the
 * environment, which lets the n-th allocation of each test fail (see failures.sh). Include it before netchan.h. */
#ifndef NETCHAN_TEST_ALLOC_H
#define NETCHAN_TEST_ALLOC_H

#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1 /* as netchan.h does: with -std=c99, POSIX must be asked for before the first system header */
#endif
#ifndef _DARWIN_C_SOURCE
#define _DARWIN_C_SOURCE 1
#endif

#include <stdbool.h>
#include <stdlib.h>

/* Touched by all threads, only with __atomic functions. */
static long alloc_live;      /* blocks that were not freed yet */
static long alloc_calls;     /* allocations asked for, also those that failed */
static long alloc_fail_at;   /* the value of alloc_calls at which one allocation fails; 0: never */
static size_t alloc_largest; /* the largest size asked for since alloc_fail() */

static inline long alloc_blocks(void) {
    return __atomic_load_n(&alloc_live, __ATOMIC_SEQ_CST);
}

static inline long alloc_count(void) {
    return __atomic_load_n(&alloc_calls, __ATOMIC_SEQ_CST);
}

/* Lets the n-th allocation from now fail, once; 0 lets none fail. */
static inline void alloc_fail(long n) {
    __atomic_store_n(&alloc_largest, (size_t)0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&alloc_fail_at, n ? alloc_count() + n : 0, __ATOMIC_SEQ_CST);
}

/* Whether the allocation that was told to fail has been asked for. */
static inline bool alloc_failed(void) {
    long at = __atomic_load_n(&alloc_fail_at, __ATOMIC_SEQ_CST);
    return at && alloc_count() >= at;
}

__attribute__((constructor)) static void alloc_fail_as_asked(void) {
    const char *n = getenv("NETCHAN_TEST_FAIL_ALLOC");
    if (n) alloc_fail(atol(n));
}

static bool alloc_allowed(size_t size) {
    if (size > __atomic_load_n(&alloc_largest, __ATOMIC_SEQ_CST))
        __atomic_store_n(&alloc_largest, size, __ATOMIC_SEQ_CST);
    long call = __atomic_add_fetch(&alloc_calls, 1, __ATOMIC_SEQ_CST);
    return call != __atomic_load_n(&alloc_fail_at, __ATOMIC_SEQ_CST);
}

static inline void *alloc_malloc(size_t size) {
    void *p = alloc_allowed(size) ? malloc(size) : NULL;
    if (p) __atomic_add_fetch(&alloc_live, 1, __ATOMIC_SEQ_CST);
    return p;
}

static inline void *alloc_realloc(void *old, size_t size) {
    void *p = alloc_allowed(size) ? realloc(old, size) : NULL;
    if (p && !old) __atomic_add_fetch(&alloc_live, 1, __ATOMIC_SEQ_CST);
    return p;
}

static inline void alloc_free(void *p) {
    if (p) __atomic_sub_fetch(&alloc_live, 1, __ATOMIC_SEQ_CST);
    free(p);
}

#define NETCHAN_MALLOC(size) alloc_malloc(size)
#define NETCHAN_REALLOC(ptr, size) alloc_realloc(ptr, size)
#define NETCHAN_FREE(ptr) alloc_free(ptr)

#endif
