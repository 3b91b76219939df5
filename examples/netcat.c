/* netcat: standard input of one machine is standard output of another. Both exit with 0 only if every byte arrived: a send
 * returns OK when the other side has taken the value, and that side takes the next one only after it wrote the last.
 *
 *     cc examples/netcat.c -o netcat -I. -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 *
 *     export NETCHAN_KEY=$(openssl rand -hex 32)   # the same on both machines
 *     ./netcat listen :7000 >copy
 *     ./netcat dial server:7000 <file
 */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void fail(const char *why) {
    fprintf(stderr, "netcat: %s\n", why);
    exit(1);
}

/* Lets the case happen. A link may break and come back. But the rest of a file is no use to somebody else. */
static void step(netchan_link *link, netchan_case what) {
    static uint64_t peer;
    netchan_value event;
    netchan_case c[] = {what, netchan_case_recv(link->events, &event)};
    for (int i; (i = netchan_select(c, 2, NETCHAN_FOREVER)) != 0; netchan_clear(&event)) {
        if (i < 0) fail(netchan_errmsg());
        if (strcmp(netchan_as_str(netchan_get(&event, "event"), ""), "lost") == 0) fail("the other side is gone");
    }
    if (c[0].result != NETCHAN_OK) fail(netchan_strerror(c[0].result));
    if (peer && c[0].peer.id != peer) fail("the other side is gone");
    peer = c[0].peer.id;
}

static void listening(netchan_link *link) {
    for (;;) {
        netchan_value v;
        step(link, netchan_case_recv(link->recv, &v));
        if (netchan_is_nil(&v)) return; /* the end mark */
        size_t size;
        const void *data = netchan_as_block(&v, NETCHAN_BYTES, &size);
        if (!data) fail("the other side is no netcat");
        if (fwrite(data, 1, size, stdout) != size || fflush(stdout) != 0) fail("cannot write");
        netchan_clear(&v);
    }
}

static void dialling(netchan_link *link) {
    static char data[65536];
    ssize_t size;
    while ((size = read(STDIN_FILENO, data, sizeof data)) > 0)
        step(link, netchan_case_send(link->send, netchan_bytes(data, (size_t)size)));
    if (size < 0) fail("cannot read");
    step(link, netchan_case_send(link->send, netchan_nil()));
}

int main(int argc, char **argv) {
    bool listens = argc == 3 && strcmp(argv[1], "listen") == 0;
    if (!listens && !(argc == 3 && strcmp(argv[1], "dial") == 0)) {
        fprintf(stderr, "usage: netcat listen ADDRESS | netcat dial ADDRESS\n");
        return 2;
    }
    netchan_options o = {0};
    o.shared_key = getenv("NETCHAN_KEY");
    o.max_peers = 1;
    o.resume_ms = 5000; /* nobody wants to wait longer when the other netcat was killed */
    netchan_link *link = listens ? netchan_listen(argv[2], &o) : netchan_dial(argv[2], &o);
    if (!link) fail(netchan_errmsg());

    if (listens) fprintf(stderr, "listening on %s\n", link->address);
    if (listens) listening(link);
    else dialling(link);
    netchan_hangup(link, NULL);
    return 0;
}
