/* workers: a pool of threads. Jobs go in by one channel, results come out by another, and closing is what ends both.
 *
 *     cc examples/workers.c -o workers -I. -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 *     ./workers [THREADS]
 */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { JOBS = 1000, MAX_THREADS = 256 };

static netchan *jobs, *results;
static int threads = 4;

static void fail(const char *why) {
    fprintf(stderr, "workers: %s\n", why);
    exit(1);
}

static pthread_t start(void *(*function)(void *)) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, function, NULL) != 0) fail("cannot start a thread");
    return thread;
}

/* for job := range jobs { results <- job * job } */
static void *work(void *arg) {
    netchan_value v;
    while (netchan_recv(jobs, &v, NETCHAN_FOREVER) == NETCHAN_OK) {
        int64_t n = netchan_as_int(&v, 0);
        netchan_clear(&v);
        if (netchan_send(results, netchan_int(n * n), NETCHAN_FOREVER) != NETCHAN_OK) fail(netchan_errmsg());
    }
    return arg;
}

/* Hands out the jobs. When the last worker is done there are no more results. */
static void *manage(void *arg) {
    pthread_t workers[MAX_THREADS];
    for (int i = 0; i < threads; i++) workers[i] = start(work);
    for (int n = 1; n <= JOBS; n++)
        if (netchan_send(jobs, netchan_int(n), NETCHAN_FOREVER) != NETCHAN_OK) fail(netchan_errmsg());
    netchan_close(jobs);
    for (int i = 0; i < threads; i++) pthread_join(workers[i], NULL);
    netchan_close(results);
    return arg;
}

int main(int argc, char **argv) {
    if (argc > 1) threads = atoi(argv[1]);
    if (argc > 2 || threads < 1 || threads > MAX_THREADS) {
        fprintf(stderr, "usage: workers [THREADS]\n");
        return 2;
    }
    jobs = netchan_make(0);
    results = netchan_make(16);
    if (!jobs || !results) fail(netchan_errmsg());

    pthread_t manager = start(manage);
    int64_t count = 0, sum = 0;
    netchan_value v;
    while (netchan_recv(results, &v, NETCHAN_FOREVER) == NETCHAN_OK) {
        count++;
        sum += netchan_as_int(&v, 0);
        netchan_clear(&v);
    }
    pthread_join(manager, NULL);
    printf("%d threads, %lld results, sum of squares %lld\n", threads, (long long)count, (long long)sum);
    netchan_free(jobs);
    netchan_free(results);
    return 0;
}
