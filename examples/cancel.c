/* cancel: work for another machine that can be called off. The request carries two channels: one that the answer comes by, and
 * one that says, when it is closed, that nobody wants the answer any more. Who works looks at it between two steps.
 *
 *     cc examples/cancel.c -o cancel -I. -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 *
 *     export NETCHAN_KEY=$(openssl rand -hex 32)   # the same on both machines
 *     ./cancel serve :7000                         # until its input ends
 *     ./cancel ask server:7000 1000000 5000        # the primes below a million? I wait for five seconds
 */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { STEP = 10000 };

static void fail(const char *why) {
    fprintf(stderr, "cancel: %s\n", why);
    exit(1);
}

static bool is_prime(int64_t n) {
    for (int64_t k = 2; k * k <= n; k++)
        if (n % k == 0) return false;
    return true;
}

/* ETIMEDOUT without waiting: not done yet. ECLOSED, ELOST: nobody wants the answer any more, or is there to want it. */
static void work(const netchan_value *request) {
    netchan *reply = netchan_as_chan(netchan_get(request, "reply")), *done = netchan_as_chan(netchan_get(request, "done"));
    int64_t end = netchan_as_int(netchan_get(request, "below"), 0), primes = 0;
    for (int64_t i = 2; i < end; primes += is_prime(i++))
        if (i % STEP == 0 && netchan_recv(done, NULL, NETCHAN_NOWAIT) != NETCHAN_ETIMEDOUT) {
            printf("%lld: stopped\n", (long long)end);
            return;
        }
    int result = netchan_send(reply, netchan_int(primes), 5000);
    printf("%lld: %s\n", (long long)end, result == NETCHAN_OK ? "answered" : netchan_strerror(result));
}

static void *serve(void *requests) {
    for (netchan_value v; netchan_recv(requests, &v, NETCHAN_FOREVER) == NETCHAN_OK; netchan_clear(&v))
        work(&v), fflush(stdout);
    netchan_free(requests);
    return NULL;
}

static int ask(netchan_link *link, int64_t below, int patience_ms) {
    netchan *reply = netchan_make(1), *done = netchan_make(0);
    netchan_entry request[] = {
        {"below", netchan_int(below)}, {"reply", netchan_sender(reply)}, {"done", netchan_receiver(done)}};
    if (netchan_send(link->send, netchan_map(request, 3), NETCHAN_FOREVER) != NETCHAN_OK) fail(netchan_errmsg());
    netchan_value answer;
    int result = netchan_recv(reply, &answer, patience_ms);
    netchan_close(done); /* whatever happened: in Go, defer close(done) */
    if (result == NETCHAN_OK) printf("%lld\n", (long long)netchan_as_int(&answer, -1));
    else printf("called off: %s\n", netchan_strerror(result));
    netchan_clear(&answer), netchan_free(reply), netchan_free(done);
    return netchan_hangup(link, NULL) == NETCHAN_OK && result == NETCHAN_OK ? 0 : 1;
}

int main(int argc, char **argv) {
    bool serves = argc == 3 && strcmp(argv[1], "serve") == 0;
    if (!serves && !(argc == 5 && strcmp(argv[1], "ask") == 0))
        return fprintf(stderr, "usage: cancel serve ADDRESS | cancel ask ADDRESS NUMBER MILLISECONDS\n"), 2;
    netchan_options o = {.shared_key = getenv("NETCHAN_KEY"), .resume_ms = 2000};
    netchan_link *link = serves ? netchan_listen(argv[2], &o) : netchan_dial(argv[2], &o);
    if (!link) fail(netchan_errmsg());
    if (!serves) return ask(link, atoll(argv[3]), atoi(argv[4]));
    printf("listening on %s\n", link->address), fflush(stdout);
    pthread_t thread;
    if (pthread_create(&thread, NULL, serve, netchan_retain(link->recv)) != 0) fail("cannot start a thread");
    while (getchar() != EOF) continue;
    netchan_hangup(link, NULL); /* who waits for a request gets ECLOSED */
    return pthread_join(thread, NULL);
}
