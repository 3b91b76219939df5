/* request: questions and answers. Who wants an answer puts a channel into the question, and the answer comes by that channel:
 * whoever asks, whoever answers, and in whatever order. If the one who should answer is gone, the channel says so.
 *
 *     cc examples/request.c -o request -I. -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 *
 *     export NETCHAN_KEY=$(openssl rand -hex 32)   # the same on all machines
 *     ./request serve :7000                        # until its input ends
 *     ./request ask server:7000 100 1000 10000     # how many primes are below? All at once
 */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SERVERS = 4, MAX_THREADS = 64 };
static netchan *questions; /* those that come to the server; those that go to it */

static void fail(const char *why) {
    fprintf(stderr, "request: %s\n", why);
    exit(1);
}

static int64_t primes_below(int64_t n) {
    int64_t primes = 0;
    for (int64_t i = 2, k; i < n; i++) {
        for (k = 2; k * k <= i && i % k != 0; k++) continue;
        primes += k * k > i;
    }
    return primes;
}

static void *serve(void *arg) {
    for (netchan_value q; netchan_recv(questions, &q, NETCHAN_FOREVER) == NETCHAN_OK; netchan_clear(&q)) {
        int64_t n = netchan_as_int(netchan_get(&q, "below"), 0);
        if (netchan_send(netchan_as_chan(netchan_get(&q, "reply")), netchan_int(primes_below(n)), 5000) != NETCHAN_OK)
            fprintf(stderr, "request: not answered: %s\n", netchan_errmsg());
    }
    return arg;
}

static void *ask(void *text) {
    netchan *reply = netchan_make(1); /* with room for the answer: the server does not wait for us */
    netchan_entry question[] = {{"below", netchan_int(atoll(text))}, {"reply", netchan_sender(reply)}};
    netchan_value answer = netchan_nil();
    int result = netchan_send(questions, netchan_map(question, 2), NETCHAN_FOREVER);
    if (result == NETCHAN_OK) fprintf(stderr, "%s: asked\n", (char *)text); /* a rendezvous: the server has it */
    if (result == NETCHAN_OK) result = netchan_recv(reply, &answer, NETCHAN_FOREVER);
    if (result == NETCHAN_OK) printf("%s: %lld\n", (char *)text, (long long)netchan_as_int(&answer, -1));
    else printf("%s: no answer: %s\n", (char *)text, netchan_strerror(result)); /* ELOST: the server is gone */
    netchan_clear(&answer), netchan_free(reply);
    return result == NETCHAN_OK ? text : NULL;
}

int main(int argc, char **argv) {
    bool serves = argc == 3 && strcmp(argv[1], "serve") == 0;
    if (!serves && !(argc > 3 && argc <= 3 + MAX_THREADS && strcmp(argv[1], "ask") == 0))
        return fprintf(stderr, "usage: request serve ADDRESS | request ask ADDRESS NUMBER...\n"), 2;
    netchan_options o = {.shared_key = getenv("NETCHAN_KEY"), .resume_ms = 2000};
    netchan_link *link = serves ? netchan_listen(argv[2], &o) : netchan_dial(argv[2], &o);
    if (!link) fail(netchan_errmsg());
    questions = netchan_retain(serves ? link->recv : link->send);
    if (serves) printf("listening on %s\n", link->address), fflush(stdout);

    pthread_t threads[MAX_THREADS];
    void *result = NULL;
    int count = serves ? SERVERS : argc - 3, good = 0;
    for (int i = 0; i < count; i++)
        if (pthread_create(&threads[i], NULL, serves ? serve : ask, serves ? link : (void *)argv[3 + i]) != 0)
            fail("cannot start a thread");
    while (serves && getchar() != EOF) continue;
    if (serves) netchan_hangup(link, NULL); /* who waits for a question gets ECLOSED */
    for (int i = 0; i < count; i++) pthread_join(threads[i], &result), good += result != NULL;
    netchan_free(questions);
    if (!serves) netchan_hangup(link, NULL);
    return good == count ? 0 : 1;
}
