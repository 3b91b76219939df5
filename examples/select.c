/* select: wait for several channels at once, as in Go's tour: for a send or a receive, whichever can happen first; not at all; or
 * not for longer than a while.
 *
 *     cc examples/select.c -o select -I. -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

static netchan *numbers, *quit;

static void fail(void) {
    fprintf(stderr, "select: %s\n", netchan_errmsg());
    exit(1);
}

/* Takes ten numbers and then has enough. */
static void *reader(void *arg) {
    for (int i = 0; i < 10; i++) {
        netchan_value v;
        if (netchan_recv(numbers, &v, NETCHAN_FOREVER) != NETCHAN_OK) fail();
        printf("%lld\n", (long long)netchan_as_int(&v, -1));
        netchan_clear(&v);
    }
    netchan_close(quit);
    return arg;
}

/* select { case numbers <- x: ...  case <-quit: ... } */
static void fibonacci(void) {
    for (int64_t x = 0, y = 1;;) {
        netchan_case c[] = {netchan_case_send(numbers, netchan_int(x)), netchan_case_recv(quit, NULL)};
        switch (netchan_select(c, 2, NETCHAN_FOREVER)) {
        case 0: y += x, x = y - x; break;
        case 1: printf("quit\n"); return;
        default: fail();
        }
    }
}

int main(void) {
    numbers = netchan_make(0);
    quit = netchan_make(0);
    if (!numbers || !quit) fail();

    pthread_t thread;
    if (pthread_create(&thread, NULL, reader, NULL) != 0) return 1;
    fibonacci();
    pthread_join(thread, NULL);

    /* Nobody reads numbers any more, and nobody will ever send to `silent`. */
    netchan *silent = netchan_make(0);
    netchan_case c[] = {netchan_case_send(numbers, netchan_int(55)), netchan_case_recv(silent, NULL)};
    if (netchan_select(c, 2, NETCHAN_NOWAIT) == NETCHAN_ETIMEDOUT) printf("default: nobody is ready\n");
    if (netchan_select(c, 2, 100) == NETCHAN_ETIMEDOUT) printf("timeout: nobody came for 100 ms\n");

    netchan_free(silent);
    netchan_free(quit);
    netchan_free(numbers);
    return 0;
}
