/* hello: one value travels from one process to another. When the dialling side's send returns OK, the listening side has it.
 *
 *     cc examples/hello.c -o hello -I. -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 *
 *     export NETCHAN_KEY=$(openssl rand -hex 32)   # the same on both machines
 *     ./hello listen :7000                         # prints hello
 *     ./hello dial server:7000
 */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(void) {
    fprintf(stderr, "hello: %s\n", netchan_errmsg());
    return 1;
}

static int listening(const char *address, const netchan_options *o) {
    netchan_link *link = netchan_listen(address, o);
    if (!link) return fail();
    printf("listening on %s\n", link->address);
    fflush(stdout);

    netchan_value v;
    if (netchan_recv(link->recv, &v, NETCHAN_FOREVER) != NETCHAN_OK) return fail();
    printf("%s\n", netchan_as_str(&v, "(not a string)"));
    netchan_clear(&v);
    netchan_hangup(link, NULL);
    return 0;
}

static int dialling(const char *address, const netchan_options *o) {
    netchan_link *link = netchan_dial(address, o);
    if (!link) return fail();

    if (netchan_send(link->send, netchan_str("hello"), 10000) != NETCHAN_OK) return fail();
    netchan_hangup(link, NULL);
    return 0;
}

int main(int argc, char **argv) {
    netchan_options o = {0};
    o.shared_key = getenv("NETCHAN_KEY");

    if (argc == 3 && strcmp(argv[1], "listen") == 0) return listening(argv[2], &o);
    if (argc == 3 && strcmp(argv[1], "dial") == 0) return dialling(argv[2], &o);
    fprintf(stderr, "usage: hello listen ADDRESS | hello dial ADDRESS\n");
    return 2;
}
