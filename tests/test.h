/* The test harness; include it after netchan.h. Each test runs in a process of its own, so that a crash, a hang or a
 * leak is the failure of one test, and no test sees what another left behind.
 *
 *     program [-v] [filter]     runs the tests whose names contain the filter; -v prints a line for each
 *
 * A test that does not end within 60 seconds fails; NETCHAN_TEST_ALARM is another number of seconds. */
#ifndef NETCHAN_TEST_H
#define NETCHAN_TEST_H

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef struct test_entry {
    const char *name;
    void (*run)(void);
} test_entry;

/* gcc tells with macros what clang tells with features. */
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#endif
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif

/* Rows of the table that is given to test_main(). */
#define TEST(name) {#name, test_##name}
#define TEST_END {NULL, NULL}

enum { TEST_FAILED = 99 }; /* exit code of a test that has said itself why it failed */

static const char *test_name = "";

/* Ends the test's process at once, from any thread. */
static void test_fail(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4), noreturn));
static void test_fail(const char *file, int line, const char *format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    printf("FAIL %s: %s:%d: %s\n", test_name, file, line, text);
    fflush(stdout);
    _exit(TEST_FAILED);
}

/* The first argument of the checks is what the test got, the second what is right. */
#define CHECK(condition) ((condition) ? (void)0 : test_fail(__FILE__, __LINE__, "not true: %s", #condition))
#define CHECK_INT(got, right) test_check_int(__FILE__, __LINE__, #got, (long long)(got), (long long)(right))
#define CHECK_STR(got, right) test_check_str(__FILE__, __LINE__, #got, got, right)

static inline void test_check_int(const char *file, int line, const char *what, long long got, long long right) {
    if (got == right) return;
    test_fail(file, line, "%s is %lld, not %lld (netchan_errmsg: \"%s\")", what, got, right, netchan_errmsg());
}

static inline void test_check_str(const char *file, int line, const char *what, const char *got, const char *right) {
    if (got && right && strcmp(got, right) == 0) return;
    test_fail(file, line, "%s is \"%s\", not \"%s\"", what, got ? got : "(NULL)", right ? right : "(NULL)");
}

static inline long long test_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (long long)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* Gives something wrong the time to happen. Never a way to wait for something right. */
static inline void test_pause(int ms) {
    struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000};
    while (nanosleep(&t, &t) != 0) {}
}

static inline pthread_t test_start(void *(*run)(void *), void *arg) {
    pthread_t thread;
    CHECK_INT(pthread_create(&thread, NULL, run, arg), 0);
    return thread;
}

static inline void test_join(pthread_t thread) {
    CHECK_INT(pthread_join(thread, NULL), 0);
}

/* A small generator (xorshift64*, Vigna 2016) whose numbers are the same on every machine. The seed must not be 0. */
static inline uint64_t test_random(uint64_t *seed) {
    *seed ^= *seed >> 12;
    *seed ^= *seed << 25;
    *seed ^= *seed >> 27;
    return (*seed * 0x2545F4914F6CDD1Du) >> 16;
}

static inline bool test_run(const test_entry *t) {
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        const char *seconds = getenv("NETCHAN_TEST_ALARM");
        test_name = t->name;
        alarm(seconds ? (unsigned)atoi(seconds) : 60);
        t->run();
        exit(0); /* not _exit(): the sanitizers look for leaks here */
    }
    int status = -1;
    while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR) {}
    if (child < 0) printf("FAIL %s: fork failed\n", t->name);
    else if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM) printf("FAIL %s: it did not end in time\n", t->name);
    else if (WIFSIGNALED(status)) printf("FAIL %s: %s\n", t->name, strsignal(WTERMSIG(status)));
    else if (WEXITSTATUS(status) != 0 && WEXITSTATUS(status) != TEST_FAILED)
        printf("FAIL %s: exit code %d\n", t->name, WEXITSTATUS(status));
    return child > 0 && status == 0;
}

static inline int test_main(int argc, char **argv, const test_entry *tests) {
    bool verbose = argc > 1 && strcmp(argv[1], "-v") == 0;
    const char *filter = argc > 1 + verbose ? argv[1 + verbose] : "";
    int passed = 0, failed = 0;
    for (const test_entry *t = tests; t->name; t++) {
        if (!strstr(t->name, filter)) continue;
        long long start = test_ms();
        bool good = test_run(t);
        if (good) passed++;
        else failed++;
        if (verbose && good) printf("ok   %s (%lld ms)\n", t->name, test_ms() - start);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}

#endif
