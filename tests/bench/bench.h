/* What the benchmark programs share. Each is run as `PROGRAM NAME`, measures the figure of that name, and prints it as
 * one number; when that cannot be done, it says why on stderr and exits with 1. Include this before any other header.
 *
 * BENCH_SECONDS is how long a rate is measured [1], BENCH_LIMIT how many seconds a program may take at all [600]. */
#ifndef NETCHAN_BENCH_H
#define NETCHAN_BENCH_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1 /* for sched_setaffinity() */
#endif
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *bench_program = "bench", *bench_name = "";
static bool bench_over; /* the figure is there; atomic */

/* Ends the process with a sentence, from any thread. Threads that find their other side gone because all is over say
 * nothing. */
static inline void bench_fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
static inline void bench_fail(const char *format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    while (__atomic_load_n(&bench_over, __ATOMIC_ACQUIRE)) pause();
    fprintf(stderr, "%s %s: %s\n", bench_program, bench_name, text);
    _exit(1);
}

/* ---- Numbers from the environment, and the clock. ---- */

static inline double bench_env(const char *name, double fallback) {
    const char *text = getenv(name);
    double number = text && *text ? atof(text) : fallback;
    if (number <= 0) bench_fail("%s must be a number above 0, and is \"%s\"", name, text);
    return number;
}

/* Nanoseconds. */
static inline uint64_t bench_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Counts what is done in BENCH_SECONDS, after a while in which all warms up and that does not count. */
typedef struct bench_meter {
    uint64_t from, until, count;
    unsigned calls, mask;
    bool warm;
} bench_meter;

/* every: a power of 2; the clock is looked at once in so many calls, as it costs as much as a fast channel. */
static inline bench_meter bench_meter_start(unsigned every) {
    bench_meter m = {0};
    m.mask = every - 1;
    m.from = bench_now() + 200 * 1000000u;
    m.until = m.from + (uint64_t)(bench_env("BENCH_SECONDS", 1) * 1e9);
    return m;
}

/* Returns false when the time is up. */
static inline bool bench_meter_add(bench_meter *m, uint64_t count) {
    m->count += count;
    if (++m->calls & m->mask) return true;
    uint64_t now = bench_now();
    if (!m->warm && now >= m->from) {
        uint64_t length = m->until - m->from;
        m->from = now, m->until = now + length;
        m->count = 0;
        m->warm = true;
    }
    if (!m->warm || now < m->until) return true;
    m->until = now;
    return false;
}

/* A second. */
static inline double bench_meter_rate(const bench_meter *m) {
    return (double)m->count / ((double)(m->until - m->from) / 1e9);
}

/* The rate of what others count; atomic. */
static inline double bench_rate_of(const uint64_t *counter) {
    bench_meter m = bench_meter_start(1);
    for (uint64_t seen = 0, count = 0; bench_meter_add(&m, count - seen);) {
        seen = count;
        usleep(1000);
        count = __atomic_load_n(counter, __ATOMIC_RELAXED);
    }
    return bench_meter_rate(&m);
}

/* ---- Times of single operations. ---- */

enum { BENCH_SAMPLES = 1 << 20 };

static int bench_compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts the samples. percent 50 is the median. */
static inline double bench_percentile(double *samples, size_t count, double percent) {
    if (!count) bench_fail("nothing was measured");
    qsort(samples, count, sizeof *samples, bench_compare);
    return samples[(size_t)((double)(count - 1) * percent / 100)];
}

/* Repeats one operation for BENCH_SECONDS. Returns the median of its microseconds. */
static inline double bench_median(void (*operation)(void *arg), void *arg) {
    static double samples[BENCH_SAMPLES];
    size_t count = 0;
    bench_meter m = bench_meter_start(1);
    for (bool more = true; more && count < BENCH_SAMPLES;) {
        uint64_t start = bench_now();
        operation(arg);
        double us = (double)(bench_now() - start) / 1e3;
        more = bench_meter_add(&m, 1);
        if (m.warm) samples[count++] = us;
    }
    return bench_percentile(samples, count, 50);
}

/* ---- Processors. ---- */

/* Pins this process, which has no other thread yet, to the first (0) or the second (1) processor it may use. */
static inline void bench_pin(int which) {
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) bench_fail("sched_getaffinity: %s", strerror(errno));
    CPU_ZERO(&one);
    for (int cpu = 0, left = which; cpu < CPU_SETSIZE && !CPU_COUNT(&one); cpu++)
        if (CPU_ISSET(cpu, &allowed) && left-- == 0) CPU_SET(cpu, &one);
    if (!CPU_COUNT(&one)) bench_fail("%d processors are needed, and there are %d", which + 1, CPU_COUNT(&allowed));
    if (sched_setaffinity(0, sizeof one, &one)) bench_fail("sched_setaffinity: %s", strerror(errno));
}

/* ---- Processes. The one that was started measures; it forks the other sides before it has a thread. ---- */

enum { BENCH_SIDES = 4 };

static pid_t bench_sides[BENCH_SIDES];
static size_t bench_side_count;

/* A pipe, over which who listens tells its port. */
typedef struct bench_line {
    int fd[2];
} bench_line;

static inline void bench_say(const char *text) {
    ssize_t n = write(2, text, strlen(text));
    (void)n; /* there is nobody else to tell */
}

static void bench_on_signal(int signal) {
    bench_say(bench_program);
    bench_say(signal == SIGALRM ? ": it takes longer than BENCH_LIMIT\n" : ": the other side has ended early\n");
    _exit(1);
}

static inline bench_line bench_pipe(void) {
    bench_line line;
    if (pipe(line.fd)) bench_fail("pipe: %s", strerror(errno));
    return line;
}

/* Runs side(line) in a process of its own, which ends when this one does. */
static inline void bench_fork(void (*side)(bench_line line), bench_line line) {
    signal(SIGCHLD, bench_on_signal);
    pid_t parent = getpid(), child = fork();
    if (child < 0) bench_fail("fork: %s", strerror(errno));
    if (child > 0) {
        bench_sides[bench_side_count++] = child;
        return;
    }
    signal(SIGCHLD, SIG_DFL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1); /* it died before we asked */
    side(line);
    for (;;) pause(); /* what has connected stays so until the figure is there */
}

static inline void bench_tell(bench_line line, int number) {
    if (write(line.fd[1], &number, sizeof number) != (ssize_t)sizeof number)
        bench_fail("the other side cannot be told: %s", strerror(errno));
}

/* Waits for it. */
static inline int bench_hear(bench_line line) {
    int number;
    if (read(line.fd[0], &number, sizeof number) != (ssize_t)sizeof number)
        bench_fail("the other side tells nothing: %s", strerror(errno));
    return number;
}

/* Prints the figure and ends all at once: what hanging up takes is not measured here. */
static inline void bench_finish(double figure) __attribute__((noreturn));
static inline void bench_finish(double figure) {
    __atomic_store_n(&bench_over, true, __ATOMIC_RELEASE);
    signal(SIGCHLD, SIG_DFL);
    printf("%.2f\n", figure);
    fflush(stdout);
    for (size_t i = 0; i < bench_side_count; i++) kill(bench_sides[i], SIGKILL);
    for (size_t i = 0; i < bench_side_count; i++) waitpid(bench_sides[i], NULL, 0);
    _exit(0);
}

/* ---- What many connections need. ---- */

/* Lets this process and its sides have so many connections each. Returns as many, or fewer where the hard limit on
 * descriptors is too low. */
static inline int bench_connections(int count) {
    enum { OTHERS = 100 };
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit)) bench_fail("getrlimit: %s", strerror(errno));
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit)) bench_fail("setrlimit: %s", strerror(errno));
    if (limit.rlim_cur >= (rlim_t)count + OTHERS) return count;
    if (limit.rlim_cur <= 2 * OTHERS) bench_fail("%d descriptors are too few", (int)limit.rlim_cur);
    int fewer = (int)limit.rlim_cur - OTHERS;
    fprintf(stderr, "%s %s: %d descriptors are allowed here, so there are %d connections instead of %d\n",
            bench_program, bench_name, (int)limit.rlim_cur, fewer, count);
    return fewer;
}

/* How many peers are idle: BENCH_PEERS, or the program's own number. */
static inline int bench_peers(int fallback) { return bench_connections((int)bench_env("BENCH_PEERS", fallback)); }

/* KiB of this process that are in memory. */
static inline double bench_resident(void) {
    char line[256];
    long kib = -1;
    FILE *f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "VmRSS: %ld", &kib) == 1) break;
    if (f) fclose(f);
    if (kib < 0) bench_fail("/proc/self/status does not tell VmRSS");
    return (double)kib;
}

/* The same, once it stays as it is. */
static inline double bench_resident_idle(void) {
    double last = -1, now = bench_resident();
    for (int i = 0; i < 20 && now != last; i++) {
        usleep(250000);
        last = now, now = bench_resident();
    }
    return now;
}

/* ---- Secrets, and main(). ---- */

enum { BENCH_SECRET = 32 };

/* Both sides have it, as it is made before they part. */
static inline void bench_secret(uint8_t secret[BENCH_SECRET]) {
    int fd = open("/dev/urandom", O_RDONLY);
    if (fd < 0 || read(fd, secret, BENCH_SECRET) != BENCH_SECRET) bench_fail("/dev/urandom: %s", strerror(errno));
    close(fd);
}

typedef struct bench_entry {
    const char *name;
    void (*run)(void); /* ends with bench_finish() */
} bench_entry;

static inline void bench_usage(const bench_entry *table) {
    fprintf(stderr, "usage: %s NAME, which is one of", bench_program);
    for (const bench_entry *e = table; e->name; e++) fprintf(stderr, " %s", e->name);
    fprintf(stderr, "\n");
}

/* table ends with a NULL name. */
static inline int bench_main(int argc, char **argv, const bench_entry *table) {
    bench_program = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    signal(SIGPIPE, SIG_IGN);
    signal(SIGALRM, bench_on_signal);
    alarm((unsigned)bench_env("BENCH_LIMIT", 600));
    for (const bench_entry *e = table; argc == 2 && e->name; e++) {
        if (strcmp(e->name, argv[1]) != 0) continue;
        bench_name = e->name;
        e->run();
        return 0;
    }
    bench_usage(table);
    return 1;
}

#endif
