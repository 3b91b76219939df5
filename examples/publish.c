/* publish: news for whoever listens. A slow subscriber holds up nobody: each has a buffer, and what finds no room in it for
 * a moment, this one misses. The publisher is told how many it reached, and the numbers show a subscriber what it missed.
 *
 *     cc examples/publish.c -o publish -I. -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 *
 *     export NETCHAN_KEY=$(openssl rand -hex 32)   # the same on all machines
 *     ./publish news :7000                         # lines "TOPIC TEXT", until the input ends
 *     ./publish read server:7000 TOPIC...          # all topics without one
 */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BUFFER = 8, MOMENT_MS = 20 };

static void fail(const char *why) {
    fprintf(stderr, "publish: %s\n", why);
    exit(1);
}

static void publish(netchan_link *link) {
    char line[1000];
    for (int64_t number = 1; fgets(line, sizeof line, stdin); number++) {
        char *text = line + strcspn(line, " \n");
        netchan_entry news[] = {{"number", netchan_int(number)},
                                {"topic", netchan_strn(line, (size_t)(text - line))},
                                {"text", netchan_strn(text, strcspn(text, "\n"))}};
        size_t reached;
        int result = netchan_broadcast(link, netchan_map(news, 3), &reached, MOMENT_MS);
        printf("%lld: reached %zu%s\n", (long long)number, reached, result == NETCHAN_OK ? "" : ", but not all");
        fflush(stdout);
    }
    netchan_close(link->send); /* after all that was for one subscriber alone: the end of the news */
}

static bool wanted(const char *topic, char **topics) {
    bool all = !*topics;
    for (; *topics; topics++) all = all || strcmp(topic, *topics) == 0;
    return all;
}

static void subscribe(netchan_link *link, char **topics) {
    netchan_value v;
    int result;
    for (int64_t last = 0; (result = netchan_recv(link->recv, &v, NETCHAN_FOREVER)) == NETCHAN_OK; netchan_clear(&v)) {
        int64_t number = netchan_as_int(netchan_get(&v, "number"), 0);
        const char *topic = netchan_as_str(netchan_get(&v, "topic"), "");
        if (last && number > last + 1) printf("(%lld missed)\n", (long long)(number - last - 1));
        if (wanted(topic, topics)) printf("%s%s\n", topic, netchan_as_str(netchan_get(&v, "text"), ""));
        fflush(stdout);
        last = number;
    }
    if (result != NETCHAN_ECLOSED) fail("the publisher is gone");
}

int main(int argc, char **argv) {
    bool publishes = argc == 3 && strcmp(argv[1], "news") == 0;
    if (!publishes && !(argc >= 3 && strcmp(argv[1], "read") == 0))
        return fprintf(stderr, "usage: publish news ADDRESS | publish read ADDRESS TOPIC...\n"), 2;
    netchan_options o = {.shared_key = getenv("NETCHAN_KEY"), .buffer = publishes ? BUFFER : 0, .resume_ms = 5000};
    netchan_link *link = publishes ? netchan_listen(argv[2], &o) : netchan_dial(argv[2], &o);
    if (!link) fail(netchan_errmsg());
    if (publishes) printf("listening on %s\n", link->address), fflush(stdout);
    if (publishes) publish(link);
    else subscribe(link, argv + 3);
    netchan_hangup(link, NULL); /* waits for a slow subscriber, but not for ever */
    return 0;
}
