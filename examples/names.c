/* names: channels that have names, as in Go's first netchan. One side exports two of them, others import them by their names,
 * compete for the jobs in the one and put results into the other. Closing ends it all, as in one process (workers.c).
 *
 *     cc examples/names.c -o names -I. -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 *
 *     export NETCHAN_KEY=$(openssl rand -hex 32)   # the same on all machines
 *     ./names export :7000 1000                    # the sum of the first 1000 squares
 *     ./names import server:7000                   # on as many as there are
 */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static netchan *jobs, *results;
static long long count;

static void check(int result) {
    if (result == NETCHAN_OK) return;
    fprintf(stderr, "names: %s\n", netchan_errmsg());
    exit(1);
}

static void *hand_out(void *arg) {
    for (long long n = 1; n <= count; n++) check(netchan_send(jobs, netchan_int(n), NETCHAN_FOREVER));
    check(netchan_close(jobs));
    return arg;
}

static void exporter(netchan_link *link) {
    pthread_t thread;
    jobs = netchan_make(0), results = netchan_make(0);
    if (!jobs || !results || pthread_create(&thread, NULL, hand_out, NULL) != 0) check(NETCHAN_ENOMEM);
    check(netchan_export(link, "jobs", jobs, NETCHAN_RECEIVER));     /* who imports it receives */
    check(netchan_export(link, "results", results, NETCHAN_SENDER)); /* who imports it sends */
    printf("listening on %s\n", link->address), fflush(stdout);

    long long sum = 0;
    netchan_value v;
    for (long long i = 0; i < count; i++) {
        check(netchan_recv(results, &v, NETCHAN_FOREVER));
        sum += netchan_as_int(&v, 0);
        netchan_clear(&v);
    }
    pthread_join(thread, NULL);
    printf("%lld results, sum %lld\n", count, sum);
}

/* for job := range jobs { results <- job * job } */
static void importer(netchan_link *link) {
    check(netchan_import(link, "jobs", NETCHAN_RECEIVER, &jobs, NETCHAN_FOREVER));
    check(netchan_import(link, "results", NETCHAN_SENDER, &results, NETCHAN_FOREVER));
    int result;
    netchan_value v;
    for (; (result = netchan_recv(jobs, &v, NETCHAN_FOREVER)) == NETCHAN_OK; netchan_clear(&v), count++)
        check(netchan_send(results, netchan_int(netchan_as_int(&v, 0) * netchan_as_int(&v, 0)), NETCHAN_FOREVER));
    if (result != NETCHAN_ECLOSED) check(result); /* ELOST: the exporter is gone */
    printf("%lld jobs done\n", count);
}

int main(int argc, char **argv) {
    bool exports = argc == 4 && strcmp(argv[1], "export") == 0 && (count = atoll(argv[3])) > 0;
    if (!exports && !(argc == 3 && strcmp(argv[1], "import") == 0))
        return fprintf(stderr, "usage: names export ADDRESS NUMBER | names import ADDRESS\n"), 2;
    netchan_options o = {.shared_key = getenv("NETCHAN_KEY"), .resume_ms = 2000};
    netchan_link *link = exports ? netchan_listen(argv[2], &o) : netchan_dial(argv[2], &o);
    check(link ? NETCHAN_OK : NETCHAN_ENET);
    exports ? exporter(link) : importer(link);
    check(netchan_hangup(link, NULL));
    netchan_free(jobs), netchan_free(results);
    return 0;
}
