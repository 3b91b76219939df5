/* Conformance: what Go's own tests of channels check, and those of Go's first netchan, written anew. Each test runs in
 * four ways, see harness.h.
 *
 *     conformance [-v] [filter]    the tests, by the names `way/test`
 *     conformance table [filter]   the same, and tells the results as the table in README.md
 *
 * CONFORMANCE_SEED is another number from which chance starts: where links are cut, and how tests take their turns. */
#include "alloc.h"

#define NETCHAN_IMPLEMENTATION
#include "netchan.h"
#include "test.h"
#include "task.h"
#include "net.h"

#include "harness.h"

#include "go_chan.c"
#include "go_runtime.c"
#include "pike.c"

/* The notes below the table in README.md: why a rule does not hold over a network at once, or as it stands. */
#define ASKED "1"
#define GIVEN "2"
#define APART "3"
#define TURNS "4"
#define GONE "5"

#define GO "test/"
#define RUNTIME "chan_test.go "
#define PIKE "netchan_test.go "

static const conformance tests[] = {
    {GO "chan/fifo.go", test_fifo, 0, "values come in the order of their sends, buffered or not", ""},
    {GO "chan/nonblock.go", test_nonblock, 0, "a try finds who waits, and never what is not there", ASKED},
    {GO "chan/select.go", test_select, 0, "a select with default sends while there is room, and no more", ASKED},
    {GO "chan/select2.go", test_select2, 0, "many selects keep no memory", ""},
    {GO "chan/select3.go", test_select3, 0, "what blocks and what does not: nil, empty, full, closed", ASKED},
    {GO "chan/select6.go", test_select6, 0, "a select that leaves the end of a queue does it no harm", ""},
    {GO "chan/select7.go", test_select7, 0, "values dropped; three kinds of receive, three of send", ""},
    {GO "chan/doubleselect.go", test_doubleselect, 0, "of the cases of a select exactly one happens", ""},
    {GO "chan/sieve1.go", test_sieve1, 0, "primes by a growing row of filters, which then flows off", ""},
    {GO "chan/goroutines.go", test_goroutines, 0, "a value goes through 1,000 threads and channels", ""},
    {GO "chan/zerosize.go", test_zerosize, 0, "values that are nothing: nil, empty strings, arrays, maps", ""},
    {GO "closedchan.go", test_closedchan, 0, "after a close: receives end, sends and closes fail", ASKED},
    {RUNTIME "TestChan", test_chan, 0, "empty and full channels block; close; order; each value once; len, cap", ""},
    {RUNTIME "TestNonblockRecvRace", test_nonblock_recv_race, 0, "a try finds the value or the close", GIVEN},
    {RUNTIME "TestNonblockSelectRace", test_nonblock_select_race, 0, "a select looks at one moment", APART},
    {RUNTIME "TestNonblockSelectRace2", test_nonblock_select_race, 1, "the same with a close", APART},
    {RUNTIME "TestSelfSelect", test_self_select, 0, "send and receive of one select never meet", ""},
    {RUNTIME "TestSelectStress", test_select_stress, 0, "ten threads send, receive and select over four channels", ""},
    {RUNTIME "TestSelectFairness", test_select_fairness, 0, "of two ready cases each has half", TURNS},
    {RUNTIME "TestPseudoRandomSend", test_pseudo_random_send, 0, "of two sends on one channel either happens", ""},
    {RUNTIME "TestMultiConsumer", test_multi_consumer, 0, "23 workers: each value once, then the end", ""},
    {RUNTIME "TestSelectDuplicateChannel", test_select_duplicate_channel, 0,
     "a select that waits twice in a queue leaves it whole", ""},
    {PIKE "TestExportSendImportReceive", test_pass_values, FROM_EXPORTER,
     "the exporter sends, the importer receives", ""},
    {PIKE "TestExportReceiveImportSend", test_pass_values, 0, "the importer sends, the exporter receives", ""},
    {PIKE "TestClosingExportSendImportReceive", test_pass_values, FROM_EXPORTER | TO_THE_END,
     "the exporter's close comes after its values", ""},
    {PIKE "TestClosingImportSendExportReceive", test_pass_values, TO_THE_END,
     "the importer's close comes after its values", ""},
    {PIKE "TestErrorForIllegalChannel", test_error_for_illegal_channel, NEEDS_LINK,
     "to import what is not exported, or the wrong way, is an error", ""},
    {PIKE "TestExportDrain", test_export_drain, 0, "what the exporter has sent ahead is taken", ""},
    {PIKE "TestImportDrain", test_import_drain, 0, "what the importer sent arrives, though it hangs up at once", ""},
    {PIKE "TestExportSync", test_export_sync, 0, "a send that has returned was taken", ""},
    {PIKE "TestExportHangup", test_export_hangup, NEEDS_LINK, "a name withdrawn ends what was imported by it", GONE},
    {PIKE "TestImportHangup", test_import_hangup, 0, "an importer that closes ends the exporter's receive", ""},
    {PIKE "TestIndependentSends", test_independent_sends, 0, "who waits on one channel keeps nobody from another", ""},
    {PIKE "TestCrossConnect", test_cross_connect, 0, "selects with cases on two links agree on what happened", ""},
    {PIKE "TestExportFlowControl", test_flow_control, FROM_EXPORTER, "the exporter is ahead by capacity at most", ""},
    {PIKE "TestImportFlowControl", test_flow_control, 0, "the importer is ahead by capacity at most", ""},
};

static int passed, failed;

/* Returns what stands in the table. */
static const char *run_in(const conformance *c, int way, const char *filter, bool verbose) {
    char name[128];
    const char *word = c->source + strlen(c->source);
    while (word > c->source && word[-1] != '/' && word[-1] != ' ') word--;
    snprintf(name, sizeof name, "%s/%s", media[way], word);
    if (!strstr(name, filter) || (way == LOCAL && c->form == NEEDS_LINK)) return "-";
    if (way >= CUT) snprintf(name, sizeof name, "%s/%s (seed %llu)", media[way], word, (unsigned long long)seed);
    long long start = test_ms();
    test_entry entry = {name, run_current};
    current = c;
    medium = way;
    bool good = test_run(&entry);
    *(good ? &passed : &failed) += 1;
    if (good && verbose) printf("ok   %s (%lld ms)\n", name, test_ms() - start);
    return good ? "ok" : "FAIL";
}

int main(int argc, char **argv) {
    bool table = argc > 1 && strcmp(argv[1], "table") == 0, verbose = argc > 1 && strcmp(argv[1], "-v") == 0;
    const char *filter = argc > 1 + (table || verbose) ? argv[1 + (table || verbose)] : "";
    const char *number = getenv("CONFORMANCE_SEED");
    if (number && strtoull(number, NULL, 10)) seed = strtoull(number, NULL, 10);
    if (table) puts("| Test | What it checks | local | TLS | cut | sim | Note |\n|--|--|--|--|--|--|--|");
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        const conformance *c = &tests[i];
        const char *r[MEDIA];
        for (int way = 0; way < MEDIA; way++) r[way] = run_in(c, way, filter, verbose);
        if (table)
            printf("| %s | %s | %s | %s | %s | %s | %s |\n", c->source, c->checks, r[LOCAL], r[TLS], r[CUT], r[SIM],
                   c->note);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
