/* chat: what one says, all others hear. The host has a thread for each guest, as Go would have a goroutine: link->accept
 * gives it the channels that are this guest's alone, and what comes from there goes to all by netchan_broadcast().
 *
 *     cc examples/chat.c -o chat -I. -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 *
 *     export NETCHAN_KEY=$(openssl rand -hex 32)   # the same on all machines
 *     ./chat host :7000                            # until it is killed
 *     ./chat join server:7000 Ann                  # until the input ends
 */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUESTS = 64, BUFFER = 64, SLOW_MS = 100 };
static netchan_link *room;

static void fail(const char *why) {
    fprintf(stderr, "chat: %s\n", why);
    exit(1);
}

/* Who has a full buffer and does not listen misses it, and delays the speaker for a moment; the others have it by then. */
static void tell(uint64_t speaker, const netchan_value *name, const char *does, const netchan_value *text) {
    netchan_value line[] = {netchan_uint(speaker), *name, netchan_str(does), *text};
    int result = netchan_broadcast(room, netchan_array(line, 4), NULL, SLOW_MS);
    if (result != NETCHAN_OK) fprintf(stderr, "chat: not heard by all: %s\n", netchan_strerror(result));
}

/* One guest after the other. What a guest says first is the name; then ECLOSED is a farewell, and ELOST is none. */
static void *serve(void *arg) {
    netchan_value v, text, name = netchan_nil(), none = netchan_nil();
    for (; netchan_recv(room->accept, &v, NETCHAN_FOREVER) == NETCHAN_OK; netchan_clear(&name), netchan_clear(&v)) {
        netchan *from = netchan_as_chan(netchan_get(&v, "recv"));
        netchan_peer guest = {netchan_as_uint(netchan_get(&v, "peer"), 0)};
        int result = netchan_sendto(room, guest, netchan_uint(guest.id), SLOW_MS);
        if (result != NETCHAN_OK || netchan_recv(from, &name, NETCHAN_FOREVER) != NETCHAN_OK) continue;
        tell(0, &name, " is here\n", &none);
        for (; netchan_recv(from, &text, NETCHAN_FOREVER) == NETCHAN_OK; netchan_clear(&text))
            tell(guest.id, &name, ": ", &text);
        tell(0, &name, " has left\n", &none);
        netchan_close(netchan_as_chan(netchan_get(&v, "send")));
    }
    return arg;
}

static void *hear(void *arg) {
    netchan_value v;
    int result;
    for (uint64_t me = 0; (result = netchan_recv(room->recv, &v, NETCHAN_FOREVER)) == NETCHAN_OK; netchan_clear(&v)) {
        me = netchan_as_uint(&v, me); /* comes first: the number of our own lines */
        for (size_t i = 1; i < 4 && netchan_as_uint(netchan_at(&v, 0), me) != me; i++)
            fputs(netchan_as_str(netchan_at(&v, i), ""), stdout);
        fflush(stdout);
    }
    if (result != NETCHAN_ECLOSED) fail("the host is gone");
    return arg;
}

int main(int argc, char **argv) {
    bool hosts = argc == 3 && strcmp(argv[1], "host") == 0;
    if (!hosts && !(argc == 4 && strcmp(argv[1], "join") == 0))
        return fprintf(stderr, "usage: chat host ADDRESS | chat join ADDRESS NAME\n"), 2;
    netchan_options o = {.shared_key = getenv("NETCHAN_KEY"), .buffer = hosts ? BUFFER : 0, .resume_ms = 2000};
    room = hosts ? netchan_listen(argv[2], &o) : netchan_dial(argv[2], &o);
    if (!room) fail(netchan_errmsg());
    if (hosts) printf("listening on %s\n", room->address), fflush(stdout);
    pthread_t threads[GUESTS];
    for (int i = 0; i < (hosts ? GUESTS : 1); i++)
        if (pthread_create(&threads[i], NULL, hosts ? serve : hear, NULL) != 0) fail("cannot start a thread");
    for (char line[1000], *says = argv[3]; says; says = fgets(line, sizeof line, stdin)) /* NULL at the host */
        if (netchan_send(room->send, netchan_str(says), NETCHAN_FOREVER) != NETCHAN_OK) fail(netchan_errmsg());
    if (!hosts) netchan_close(room->send);
    for (int i = 0; i < (hosts ? GUESTS : 1); i++) pthread_join(threads[i], NULL);
    return netchan_hangup(room, NULL);
}
