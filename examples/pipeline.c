/* pipeline: three processes, as in `source | filter | sink`. Source and sink know only the filter. The sink gives it the end of
 * a channel; the filter gives the source one of its own, and passes on the sink's: so the source can also talk past it.
 *
 *     cc examples/pipeline.c -o pipeline -I. -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 *
 *     export NETCHAN_KEY=$(openssl rand -hex 32)   # the same on all machines
 *     ./pipeline filter :7000 WORD                 # lets lines pass that have the word
 *     ./pipeline sink filter:7000
 *     ./pipeline source filter:7000 <FILE
 */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(int result) {
    if (result == NETCHAN_OK) return;
    fprintf(stderr, "pipeline: %s\n", netchan_errmsg());
    exit(1);
}

static netchan *make(void) {
    netchan *ch = netchan_make(0);
    check(ch ? NETCHAN_OK : NETCHAN_ENOMEM);
    return ch;
}

static void source(netchan_link *link) {
    netchan_value ends;
    check(netchan_recv(link->recv, &ends, NETCHAN_FOREVER));
    netchan *filter = netchan_as_chan(netchan_get(&ends, "filter")), *sink = netchan_as_chan(netchan_get(&ends, "sink"));
    check(netchan_send(sink, netchan_str("(begin)\n"), NETCHAN_FOREVER)); /* past the filter */
    for (char line[4096]; fgets(line, sizeof line, stdin);)
        check(netchan_send(filter, netchan_str(line), NETCHAN_FOREVER));
    netchan_close(filter);
    netchan_clear(&ends);
}

/* A close travels on. That a source is lost is not its end, and is not passed on as one: the sink will see ELOST, too. */
static void filter(netchan_link *link, const char *word) {
    netchan_value sink, line;
    netchan *in = make();
    int result;
    check(netchan_recv(link->recv, &sink, NETCHAN_FOREVER));
    netchan_entry ends[] = {{"filter", netchan_sender(in)}, {"sink", sink}};
    check(netchan_send(link->send, netchan_map(ends, 2), NETCHAN_FOREVER)); /* whoever receives is the source */
    for (; (result = netchan_recv(in, &line, NETCHAN_FOREVER)) == NETCHAN_OK; netchan_clear(&line))
        if (strstr(netchan_as_str(&line, ""), word)) check(netchan_send(netchan_as_chan(&sink), line, NETCHAN_FOREVER));
    if (result != NETCHAN_ECLOSED) check(result);
    netchan_close(netchan_as_chan(&sink));
    netchan_clear(&sink), netchan_free(in);
}

static void sink(netchan_link *link) {
    netchan_value line;
    netchan *in = make();
    int result;
    check(netchan_send(link->send, netchan_sender(in), NETCHAN_FOREVER));
    for (; (result = netchan_recv(in, &line, NETCHAN_FOREVER)) == NETCHAN_OK; netchan_clear(&line))
        fputs(netchan_as_str(&line, ""), stdout);
    if (result != NETCHAN_ECLOSED) check(result);
    netchan_free(in);
}

int main(int argc, char **argv) {
    const char *role = argc > 2 ? argv[1] : "";
    bool filters = strcmp(role, "filter") == 0 && argc == 4, sinks = strcmp(role, "sink") == 0 && argc == 3;
    if (!filters && !sinks && !(strcmp(role, "source") == 0 && argc == 3))
        return fprintf(stderr, "usage: pipeline filter ADDRESS WORD | pipeline sink|source ADDRESS\n"), 2;
    netchan_options o = {.shared_key = getenv("NETCHAN_KEY"), .resume_ms = 2000};
    netchan_link *link = filters ? netchan_listen(argv[2], &o) : netchan_dial(argv[2], &o);
    check(link ? NETCHAN_OK : NETCHAN_ENET);
    if (filters) printf("listening on %s\n", link->address), fflush(stdout);
    filters ? filter(link, argv[3]) : sinks ? sink(link) : source(link);
    check(netchan_hangup(link, NULL));
    return 0;
}
