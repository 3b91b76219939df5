/* Links that are replaced before their keys are worn, thousands of times: sections [13] and [14] of netchan.h. */
#include "alloc.h"

#define NETCHAN_KEY_RECORDS 100
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"
#include "test.h"
#include "task.h"
#include "net.h"

enum { COUNT = 200000 / FEWER };

/* Nothing is told but how the session began. */
static void check_only_up(netchan_link *link) {
    netchan_value v;
    CHECK_INT(netchan_recv(link->events, &v, NETCHAN_NOWAIT), NETCHAN_OK);
    CHECK_STR(text_of(&v, "event"), "up");
    netchan_clear(&v);
    CHECK_INT(netchan_recv(link->events, &v, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
}

/* How many links there were before this one, as both sides count them. */
static uint64_t count_rollovers(const pair *p, uint64_t at_least) {
    netchan_stats l, d;
    do { /* the listener counts the newest first */
        CHECK_INT(netchan_get_stats(p->l, &l), NETCHAN_OK);
        CHECK_INT(netchan_get_stats(p->d, &d), NETCHAN_OK);
    } while (l.rollovers != d.rollovers);
    CHECK(l.rollovers >= at_least);
    CHECK_INT(l.resumes + l.lost + d.resumes + d.lost, 0);
    return l.rollovers;
}

static void test_numbers_both_ways(void) {
    netchan_options o = options();
    flow f[2];
    pair p;
    o.buffer = 1000;
    p.l = listen_with(&o);
    p.d = dial_with(p.l->address, &o);
    for (int i = 0; i < 2; i++) flow_begin(&f[i], way_of(&p, i), NULL, COUNT, 0);
    for (int i = 0; i < 2; i++) flow_end(&f[i]);
    count_rollovers(&p, COUNT / 100000 + 1);
    check_only_up(p.l);
    check_only_up(p.d);
    part(&p);
}

/* Records wear keys, however little is in them: also heartbeats do. */
static void test_rendezvous(void) {
    pair p = join(0, 0);
    for (int i = 0; i < 3000 / LESS; i++) check_works(p.l, p.d);
    count_rollovers(&p, 3000 / LESS / 100);
    check_only_up(p.l);
    check_only_up(p.d);
    part(&p);
}

/* A value that takes more records than a link may have is brought over by many. */
static void test_a_large_value(void) {
    size_t size = (size_t)32 << 20;
    uint8_t *bytes = noise(size);
    pair p = join(0, 0);
    for (int i = 0; i < 2; i++) {
        way w = way_of(&p, i);
        netchan_value v;
        size_t got;
        task t;
        start_send(&t, w.send, netchan_bytes(bytes, size), LONG);
        CHECK_INT(netchan_recv(w.recv, &v, LONG), NETCHAN_OK);
        CHECK_INT(end_task(&t), NETCHAN_OK);
        const void *data = netchan_as_block(&v, NETCHAN_BYTES, &got);
        CHECK(data && got == size && memcmp(data, bytes, size) == 0);
        netchan_clear(&v);
    }
    count_rollovers(&p, 2 * size / 16384 / 200);
    check_only_up(p.l);
    check_only_up(p.d);
    free(bytes);
    part(&p);
}

/* The link breaks while it is being replaced, or at any other time. */
static void test_rollovers_and_cuts(void) {
    netchan_options o = options();
    pthread_t threads[2];
    shaky s;
    stream out[2];
    shaky_join(&s, &o, &o);
    pair q = {s.l, s.d};
    proxy_cut_every(&s.p, 40000);
    for (int i = 0; i < 2; i++) {
        out[i].ch = way_of(&q, i).send;
        out[i].count = 10000 / LESS;
        threads[i] = test_start(send_stream, &out[i]);
    }
    for (int n = 0; n < 10000 / LESS; n++)
        for (int i = 0; i < 2; i++) CHECK_INT(recv_int(way_of(&q, i).recv), n);
    for (int i = 0; i < 2; i++) test_join(threads[i]);
    proxy_cut_every(&s.p, 0);
    netchan_stats stats;
    CHECK_INT(netchan_get_stats(s.d, &stats), NETCHAN_OK);
    CHECK(stats.rollovers > 0);
    CHECK(stats.resumes > 0);
    CHECK_INT(stats.lost, 0);
    shaky_part(&s);
}

int main(int argc, char **argv) {
    static const test_entry tests[] = {
        TEST(numbers_both_ways),
        TEST(rendezvous),
        TEST(a_large_value),
        TEST(rollovers_and_cuts),
        TEST_END,
    };
    return test_main(argc, argv, tests);
}
