/* cluster_bench: one listener sends numbers to clients that echo them. After the benchmark of the Go library matveynator/netchan.
 *
 *     cc -O2 examples/cluster_bench.c -o cluster_bench -I. -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 *     ./cluster_bench [CLIENTS] [SECONDS]
 */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static netchan_link *server;
static netchan_options options;
static long long sent, received, clients;

static void fail(const char *why) {
    fprintf(stderr, "cluster_bench: %s\n", why);
    exit(1);
}

/* Echoes until the server closes its channel. */
static void *client(void *arg) {
    netchan_link *link = netchan_dial(server->address, &options);
    if (!link) fail(netchan_errmsg());
    for (netchan_value v; netchan_recv(link->recv, &v, NETCHAN_FOREVER) == NETCHAN_OK; netchan_clear(&v))
        netchan_send(link->send, v, NETCHAN_FOREVER);
    netchan_hangup(link, NULL);
    return arg;
}

static int is(const netchan_value *event, const char *name) {
    return strcmp(netchan_as_str(netchan_get(event, "event"), ""), name) == 0;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* The server's next second; one without sending ends when all is back. */
static void serve(bool sending) {
    netchan_value event = netchan_nil();
    for (double end = now() + 1; now() < end && (sending || received < sent); netchan_clear(&event)) {
        netchan_case c[] = {netchan_case_send(sending ? server->send : NULL, netchan_int(sent)),
                            netchan_case_recv(server->recv, NULL), netchan_case_recv(server->events, &event)};
        int i = netchan_select(c, 3, 100);
        if (i < 0 && i != NETCHAN_ETIMEDOUT) fail(netchan_errmsg());
        if (i == 0) sent += c[0].result == NETCHAN_OK;
        if (i == 1) received += c[1].result == NETCHAN_OK;
        if (i == 2) clients += is(&event, "up") - is(&event, "drained") - is(&event, "lost");
    }
    printf("Sent: %lld, Received: %lld, Processed: %lld, Not received: %lld, Clients connected: %lld\n", sent, received,
           sent + received, sent - received, clients);
    fflush(stdout);
}

int main(int argc, char **argv) {
    int count = argc > 1 ? atoi(argv[1]) : 10, seconds = argc > 2 ? atoi(argv[2]) : 5;
    pthread_t threads[1000];
    if (argc > 3 || count < 1 || count > 1000 || seconds < 1)
        return fprintf(stderr, "usage: cluster_bench [CLIENTS] [SECONDS]\n"), 2;
    char key[NETCHAN_KEY_SIZE];
    if (netchan_keygen(key, sizeof key) != NETCHAN_OK) fail(netchan_errmsg());
    options.shared_key = key, options.buffer = 1024;
    server = netchan_listen("127.0.0.1:0", &options);
    if (!server) fail(netchan_errmsg());
    for (int i = 0; i < count; i++)
        if (pthread_create(&threads[i], NULL, client, NULL) != 0) fail("cannot start a thread");
    for (int i = 0; i < seconds; i++) serve(true);
    for (int i = 0; i < 5 && received < sent; i++) serve(false);
    netchan_close(server->send);
    for (int i = 0; i < count; i++) pthread_join(threads[i], NULL);
    netchan_hangup(server, NULL);
    return received == sent ? 0 : 1;
}
