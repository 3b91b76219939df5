/* Sessions that survive their links, over TLS on loopback: sections [13], [14] and [17] of netchan.h. What breaks is a
 * proxy's doing, or a process that is killed. With SURVIVAL_FULL=1 the long tests are as long as they may be. */
#include "alloc.h"

#define NETCHAN_IMPLEMENTATION
#include "netchan.h"
#include "test.h"
#include "task.h"
#include "net.h"

#include <sys/un.h>

static const char *program; /* this one */

/* --- what is told ------------------------------------------------------------------------------------------------- */

/* A number in an event; the largest when it is not there. */
static uint64_t number_of(const netchan_value *event, const char *key) {
    return netchan_as_uint(netchan_get(event, key), UINT64_MAX);
}

static netchan_stats stats_of(netchan_link *link) {
    netchan_stats stats;
    CHECK_INT(netchan_get_stats(link, &stats), NETCHAN_OK);
    return stats;
}

/* Waits until as many values are neither here nor known to have been taken there. */
static void wait_for_in_flight(netchan_link *link, size_t count) {
    for (long long end = test_ms() + LONG; stats_of(link).in_flight != count; sched_yield()) CHECK(test_ms() < end);
}

/* The event "resumed", of this peer. */
static void wait_resumed(netchan_link *link, uint64_t peer) {
    netchan_value v = wait_event(link, "resumed");
    CHECK_INT(number_of(&v, "peer"), peer);
    netchan_clear(&v);
}

/* Both sides have the session still that they began with, however often its link broke. */
static void check_survived(const shaky *s) {
    for (int i = 0; i < 2; i++) {
        netchan_stats stats = stats_of(i ? s->l : s->d);
        CHECK_INT(stats.lost, 0);
        CHECK_INT(stats.peers, 1);
    }
}

/* No link; both sides know. */
static void break_link(shaky *s) {
    proxy_break(&s->p);
    wait_peer(s->l, "down");
    wait_peer(s->d, "down");
}

static way shaky_way(const shaky *s, int direction) {
    pair q = {s->l, s->d};
    return way_of(&q, direction);
}

static void check_nothing_more(const shaky *s) {
    for (int i = 0; i < 2; i++) CHECK_INT(netchan_recv(i ? s->l->recv : s->d->recv, NULL, SHORT), NETCHAN_ETIMEDOUT);
}

/* --- what survives ------------------------------------------------------------------------------------------------ */

/* The link is cut anywhere in a rendezvous: before it is offered, claimed, granted, accepted. */
static void test_a_rendezvous_in_progress(void) {
    netchan_options o = options();
    shaky s;
    shaky_join(&s, &o, &o);
    for (int i = 0; i < 480 / LESS; i++) {
        way w = shaky_way(&s, i % 2);
        netchan_case c[2];
        task t;
        c[0] = netchan_case_send(w.send, netchan_int(i));
        c[1] = netchan_case_recv(NULL, NULL);
        proxy_cut_after(&s.p, i / 6 * 5);
        if (i % 3 == 0) start_send(&t, w.send, netchan_int(i), NETCHAN_FOREVER);
        else if (i % 3 == 1) start_send(&t, w.send, netchan_int(i), LONG);
        else start_select(&t, c, 2, LONG);
        CHECK_INT(recv_int(w.recv), i);
        CHECK_INT(end_task(&t), NETCHAN_OK);
        if (i % 3 == 2) CHECK_INT(c[0].result, NETCHAN_OK);
    }
    CHECK(proxy_cuts(&s.p) > 100 / LESS);
    check_nothing_more(&s);
    check_survived(&s);
    shaky_part(&s);
}

/* As many values as fit, and one more that waits. Receives go on as far as this side has the values. */
static void test_a_full_buffer(void) {
    enum { SIZE = 8 };
    for (int direction = 0; direction < 2; direction++) {
        netchan_options o = options();
        shaky s;
        task t;
        o.buffer = SIZE;
        shaky_join(&s, &o, &o);
        way w = shaky_way(&s, direction);
        for (int i = 0; i < SIZE; i++) send_int(w.send, i);
        start_send(&t, w.send, netchan_int(SIZE), LONG);
        if (!direction) wait_for_len(w.recv, SIZE);
        break_link(&s);
        CHECK_INT(netchan_send(w.send, netchan_int(-1), NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
        CHECK_INT(netchan_send(w.send, netchan_int(-1), SHORT), NETCHAN_ETIMEDOUT);
        int next = 0;
        while (!direction && next < 3) CHECK_INT(recv_int(w.recv), next++);
        CHECK(!is_done(&t));
        proxy_mend(&s.p);
        if (!direction) CHECK_INT(end_task(&t), NETCHAN_OK); /* there is room */
        while (next <= SIZE) CHECK_INT(recv_int(w.recv), next++);
        if (direction) CHECK_INT(end_task(&t), NETCHAN_OK);
        for (int i = 0; i < SIZE; i++) send_int(w.send, i); /* all the room is there again, and no more */
        CHECK_INT(netchan_send(w.send, netchan_int(-1), SHORT), NETCHAN_ETIMEDOUT);
        for (int i = 0; i < SIZE; i++) CHECK_INT(recv_int(w.recv), i);
        check_survived(&s);
        shaky_part(&s);
    }
}

/* A buffer with room takes values while there is no link. */
static void test_sending_while_the_link_is_down(void) {
    for (int direction = 0; direction < 2; direction++) {
        netchan_options o = options();
        shaky s;
        o.buffer = 20;
        shaky_join(&s, &o, &o);
        way w = shaky_way(&s, direction);
        for (int i = 0; i < 10; i++) send_int(w.send, i);
        break_link(&s);
        for (int i = 10; i < 20; i++) CHECK_INT(netchan_send(w.send, netchan_int(i), NETCHAN_NOWAIT), NETCHAN_OK);
        CHECK_INT(netchan_send(w.send, netchan_int(20), NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
        proxy_mend(&s.p);
        for (int i = 0; i < 20; i++) CHECK_INT(recv_int(w.recv), i);
        check_nothing_more(&s);
        check_survived(&s);
        shaky_part(&s);
    }
}

static void test_a_large_value_is_cut(void) {
    size_t size = (size_t)64 << 20;
    uint8_t *bytes = noise(size);
    for (int i = 0; i < 4 / (LESS == 1 ? 1 : 2); i++) {
        netchan_options o = options();
        netchan_value v;
        size_t got;
        shaky s;
        task t;
        o.buffer = (size_t)(i / 2);
        shaky_join(&s, &o, &o);
        way w = shaky_way(&s, i % 2);
        proxy_cut_every(&s.p, (long)size / 10);
        start_send(&t, w.send, netchan_bytes(bytes, size), i / 2 ? NETCHAN_FOREVER : 2 * LONG);
        CHECK_INT(netchan_recv(w.recv, &v, 2 * LONG), NETCHAN_OK);
        CHECK_INT(end_task(&t), NETCHAN_OK);
        const void *data = netchan_as_block(&v, NETCHAN_BYTES, &got);
        CHECK(data && got == size && memcmp(data, bytes, size) == 0);
        netchan_clear(&v);
        CHECK(proxy_cuts(&s.p) >= 3);
        proxy_cut_every(&s.p, 0);
        check_survived(&s);
        shaky_part(&s);
    }
    free(bytes);
}

/* Values, and then the end, over a link that is cut somewhere in between or is not there at all. */
static void test_close_in_flight(void) {
    enum { COUNT = 10 };
    for (int i = 0; i < 60 / LESS; i++) {
        netchan_options o = options();
        shaky s;
        o.buffer = COUNT;
        shaky_join(&s, &o, &o);
        bool listener = i % 2, down = i % 5 == 4;
        way w = shaky_way(&s, listener);
        proxy_cut_after(&s.p, down ? -1 : i * 7);
        if (down) break_link(&s);
        for (int n = 0; n < COUNT; n++) send_int(w.send, n);
        CHECK_INT(netchan_close(w.send), NETCHAN_OK);
        CHECK_INT(netchan_send(w.send, netchan_int(-1), LONG), NETCHAN_ECLOSED);
        if (down) proxy_mend(&s.p);
        for (int n = 0; n < COUNT; n++) CHECK_INT(recv_int(w.recv), n);
        if (listener) CHECK_INT(netchan_recv(w.recv, NULL, LONG), NETCHAN_ECLOSED);
        else {
            wait_peer(s.l, "closed");
            CHECK_INT(netchan_recv(w.recv, NULL, SHORT), NETCHAN_ETIMEDOUT);
            check_no_event(s.l, "closed");
        }
        exchange(shaky_way(&s, !listener).send, shaky_way(&s, !listener).recv, i); /* the way back is open */
        check_survived(&s);
        shaky_part(&s);
    }
}

/* A send that waits when the channel is closed, and a receive that waits, with no link between them. */
static void test_close_ends_who_waits(void) {
    for (int listener = 0; listener < 2; listener++) {
        netchan_options o = options();
        shaky s;
        task send, recv;
        shaky_join(&s, &o, &o);
        way w = shaky_way(&s, listener);
        start_send(&send, w.send, netchan_int(1), NETCHAN_FOREVER);
        wait_for_waiters(listener ? w.send : s.l->recv, 1);
        break_link(&s);
        CHECK_INT(netchan_close(w.send), NETCHAN_OK);
        start_recv(&recv, w.recv, listener ? NETCHAN_FOREVER : LONG / 10);
        if (listener) CHECK_INT(end_task(&send), NETCHAN_ECLOSED); /* it is at home */
        proxy_mend(&s.p);
        int result = listener ? NETCHAN_ECLOSED : end_task(&send), got = end_task(&recv);
        CHECK(listener ? got == NETCHAN_ECLOSED
                       : (result == NETCHAN_OK && got == NETCHAN_OK) ||
                             (result == NETCHAN_ECLOSED && got == NETCHAN_ETIMEDOUT));
        netchan_clear(&recv.value);
        check_survived(&s);
        shaky_part(&s);
    }
}

/* --- ten thousand cuts -------------------------------------------------------------------------------------------- */

static bool is_full(void) {
    const char *full = getenv("SURVIVAL_FULL");
    return full && *full == '1';
}

static void test_ten_thousand_cuts(void) {
    int64_t count = is_full() ? 1000000 : 120000 / FEWER;
    unsigned cuts = is_full() ? 10000 : 1200 / FEWER;
    netchan_options o = options();
    shaky s;
    flow f[2];
    o.buffer = 1000;
    if (is_full()) alarm(900);
    shaky_join(&s, &o, &o);
    proxy_cut_every(&s.p, 6000);
    for (int i = 0; i < 2; i++) flow_begin(&f[i], shaky_way(&s, i), &s.p, count, cuts);
    while (proxy_cuts(&s.p) < cuts) test_pause(1);
    proxy_cut_every(&s.p, 0);
    for (int i = 0; i < 2; i++) flow_end(&f[i]);
    if (is_full())
        printf("cuts %u, values %lld and %lld\n", proxy_cuts(&s.p), (long long)f[0].sent, (long long)f[1].sent);
    check_nothing_more(&s);
    check_survived(&s);
    CHECK(stats_of(s.d).resumes > 0);
    CHECK(stats_of(s.d).replays > 0);
    shaky_part(&s);
}

/* --- links that hang ---------------------------------------------------------------------------------------------- */

/* The connection stands, and nothing comes over it in one direction or both. The heartbeat finds it, on the side that
 * hears nothing; that one closes it, and what was under way goes on over the next. */
static void test_a_link_that_hangs(void) {
    for (int frozen = FROM_DIALLER; frozen <= (FROM_DIALLER | FROM_LISTENER); frozen++) {
        netchan_options o = options();
        shaky s;
        task t[4];
        o.ping_ms = 100;
        shaky_join(&s, &o, &o);
        uint64_t in = wait_peer(s.l, "up"), out = wait_peer(s.d, "up");
        start_recv(&t[0], s.d->recv, NETCHAN_FOREVER);
        wait_for_waiters(s.l->send, 1);
        proxy_freeze(&s.p, frozen);
        long long start = test_ms();
        start_send(&t[1], s.l->send, netchan_int(1), NETCHAN_FOREVER);
        start_send(&t[2], s.d->send, netchan_int(2), NETCHAN_FOREVER);
        start_recv(&t[3], s.l->recv, LONG);
        for (int side = 0; side < 2; side++) {
            bool finds = frozen & (side ? FROM_DIALLER : FROM_LISTENER);
            netchan_value v = wait_event(side ? s.l : s.d, "down");
            CHECK_INT(number_of(&v, "peer"), side ? in : out);
            if (finds) check_says(text_of(&v, "reason"), "nothing was heard from it for 300 ms");
            else CHECK(!strstr(text_of(&v, "reason"), "heard")); /* it is told, by the end of the connection */
            netchan_clear(&v);
        }
        CHECK(test_ms() - start >= 200);
        CHECK(test_ms() - start < LONG / 2);
        for (int i = 0; i < 4; i++) CHECK_INT(end_task(&t[i]), NETCHAN_OK);
        CHECK_INT(netchan_as_int(&t[0].value, -1), 1);
        CHECK_INT(netchan_as_int(&t[3].value, -1), 2);
        wait_resumed(s.l, in);
        wait_resumed(s.d, out);
        check_survived(&s);
        shaky_part(&s);
    }
}

/* The side that knows first gets a new link while the other still believes in the old one. */
static void test_a_new_link_takes_the_place_of_one_that_hangs(void) {
    netchan_options lo = options(), o = options();
    shaky s;
    o.ping_ms = 50;
    lo.ping_ms = LONG; /* it would not find out by itself */
    shaky_join(&s, &lo, &o);
    uint64_t in = wait_peer(s.l, "up");
    proxy_freeze(&s.p, FROM_DIALLER | FROM_LISTENER);
    task t;
    start_send(&t, s.l->send, netchan_int(1), NETCHAN_FOREVER);
    CHECK_INT(recv_int(s.d->recv), 1);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    wait_peer(s.d, "resumed");
    exchange(s.d->send, s.l->recv, 2);
    CHECK_INT(stats_of(s.l).peers, 1);
    check_no_event(s.l, "lost");
    check_survived(&s);
    hang_up(s.d);
    CHECK_INT(wait_peer(s.l, "drained"), in);
    proxy_stop(&s.p);
    hang_up(s.l);
    CHECK_INT(alloc_blocks(), 0);
}

/* --- other ways --------------------------------------------------------------------------------------------------- */

/* From where the dialler comes is of no importance. */
static void test_a_dialler_whose_address_changed(void) {
    enum { ELSEWHERE = 0x7f000002 }; /* 127.0.0.2 */
    netchan_options o = options();
    struct sockaddr_in a = loopback(0);
    shaky s;
    a.sin_addr.s_addr = htonl(ELSEWHERE);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    bool here = bind(fd, (struct sockaddr *)&a, sizeof a) == 0;
    close(fd);
    if (!here) {
        printf("a dialler whose address changed: not tested, as this machine has no 127.0.0.2\n");
        return;
    }
    o.buffer = 4;
    shaky_join(&s, &o, &o);
    netchan_value v = wait_event(s.l, "up");
    uint64_t in = number_of(&v, "peer"), out = wait_peer(s.d, "up");
    CHECK_INT(strncmp(text_of(&v, "address"), "127.0.0.1:", 10), 0);
    netchan_clear(&v);
    for (int i = 0; i < 4; i++) send_int(s.d->send, i);
    for (int i = 0; i < 4; i++) send_int(s.l->send, i);
    __atomic_store_n(&s.p.source, (uint32_t)ELSEWHERE, __ATOMIC_RELEASE);
    proxy_cut(&s.p);
    v = wait_event(s.l, "resumed");
    CHECK_INT(number_of(&v, "peer"), in);
    CHECK_INT(strncmp(text_of(&v, "address"), "127.0.0.2:", 10), 0);
    netchan_clear(&v);
    wait_resumed(s.d, out);
    for (int i = 0; i < 4; i++) CHECK_INT(recv_int(s.l->recv), i);
    for (int i = 0; i < 4; i++) CHECK_INT(recv_int(s.d->recv), i);
    netchan_case c = netchan_case_send(s.d->send, netchan_int(5)), r = netchan_case_recv(s.l->recv, NULL);
    CHECK_INT(netchan_select(&c, 1, LONG), 0);
    CHECK_INT(netchan_select(&r, 1, LONG), 0);
    CHECK_INT(c.peer.id, out);
    CHECK_INT(r.peer.id, in);
    proxy_cut(&s.p);
    v = wait_event(s.l, "down");
    CHECK_INT(strncmp(text_of(&v, "address"), "127.0.0.2:", 10), 0);
    netchan_clear(&v);
    check_survived(&s);
    shaky_part(&s);
}

/* Two ways to one process. The first breaks for good; later the second, and the first is there again. */
static void test_the_session_goes_on_over_another_path(void) {
    netchan_options o = options();
    proxy first, second;
    char list[80];
    o.buffer = 8;
    netchan_link *l = listen_with(&o);
    proxy_start(&first, l->address);
    proxy_start(&second, l->address);
    snprintf(list, sizeof list, "%s,%s", first.address, second.address);
    netchan_link *d = dial_with(list, &o);
    CHECK_STR(d->address, list);
    netchan_value v = wait_event(d, "up");
    uint64_t peer = number_of(&v, "peer");
    CHECK_STR(text_of(&v, "address"), first.address);
    netchan_clear(&v);
    for (int i = 0; i < 4; i++) send_int(d->send, i);
    uint16_t port = port_of(first.address);
    proxy_stop(&first);
    for (int i = 4; i < 8; i++) send_int(d->send, i);
    v = wait_event(d, "resumed");
    CHECK_INT(number_of(&v, "peer"), peer);
    CHECK_STR(text_of(&v, "address"), second.address);
    netchan_clear(&v);
    for (int i = 0; i < 8; i++) CHECK_INT(recv_int(l->recv), i);
    proxy_start_at(&first, l->address, port);
    proxy_stop(&second);
    v = wait_event(d, "resumed");
    CHECK_INT(number_of(&v, "peer"), peer);
    CHECK_STR(text_of(&v, "address"), first.address);
    netchan_clear(&v);
    exchange(l->send, d->recv, 9);
    CHECK_INT(stats_of(d).lost, 0);
    hang_up(d);
    wait_for_no_peers(l);
    proxy_stop(&first);
    hang_up(l);
    CHECK_INT(alloc_blocks(), 0);
}

/* A list that begins with nobody: the first call and each one after a break come to the second. */
static void test_a_list_that_begins_with_nobody(void) {
    netchan_options o = options();
    char list[80];
    shaky s;
    uint16_t nobody;
    int held = hold_port(&nobody);
    s.l = listen_with(&o);
    proxy_start(&s.p, s.l->address);
    snprintf(list, sizeof list, "127.0.0.1:%d,%s", nobody, s.p.address);
    long long start = test_ms();
    s.d = dial_with(list, &o);
    uint64_t peer = wait_peer(s.d, "up");
    for (int i = 0; i < 5; i++) {
        check_works(s.l, s.d);
        proxy_cut(&s.p);
        wait_resumed(s.d, peer);
    }
    CHECK(test_ms() - start < LONG / 2);
    check_survived(&s);
    shaky_part(&s);
    close(held);
}

/* --- listeners that die ------------------------------------------------------------------------------------------- */

/* A listener in a process of its own: is told where, says where; then is told how many to receive, and says what. */
static void run_taker(int in, int out) {
    char line[128];
    netchan_options o = options();
    CHECK(read_line(in, line, sizeof line));
    netchan_link *l = netchan_listen(line, &o);
    if (!l) test_fail(__FILE__, __LINE__, "%s", netchan_errmsg());
    write_line(out, l->address);
    while (read_line(in, line, sizeof line)) {
        for (int n = atoi(line); n; n--) {
            netchan_value v;
            if (netchan_recv(l->recv, &v, NETCHAN_FOREVER) != NETCHAN_OK) return;
            snprintf(line, sizeof line, "%lld", (long long)netchan_as_int(&v, -1));
            write_line(out, line);
        }
    }
    hang_up(l);
}

static void listen_from(child *c, const char *at, char *address, size_t size) {
    write_line(c->to, at);
    CHECK(read_line(c->from, address, size));
}

static void check_takes(child *c, int from, int to) {
    char line[32];
    snprintf(line, sizeof line, "%d", to - from);
    write_line(c->to, line);
    for (int n = from; n < to; n++) {
        CHECK(read_line(c->from, line, sizeof line));
        CHECK_INT(atoi(line), n);
    }
}

/* 10 values are sent, 4 are taken, 5 more are sent while nobody is there: the event says so, and the 5 are sent again.
 * Of those in the buffer of a process that is dead nobody knows. */
static void check_new_session(netchan_link *d, child *next, uint64_t peer) {
    netchan_value v = wait_event(d, "lost");
    CHECK_INT(number_of(&v, "peer"), peer);
    CHECK_INT(number_of(&v, "taken"), 4);
    CHECK_INT(number_of(&v, "returned"), 5);
    CHECK_INT(number_of(&v, "unknown"), 6);
    check_says(text_of(&v, "reason"), "know");
    netchan_clear(&v);
    v = wait_event(d, "up");
    CHECK(number_of(&v, "peer") != peer);
    netchan_clear(&v);
    check_takes(next, 10, 15);
    send_int(d->send, 15);
    check_takes(next, 15, 16);
    CHECK_INT(stats_of(d).lost, 1);
    netchan_report report;
    CHECK_INT(netchan_hangup(d, &report), NETCHAN_ETIMEDOUT);
    CHECK_INT(report.undelivered, 0);
    CHECK_INT(report.unknown, 6);
    CHECK_INT(report.unreceived, 0);
    kill_child(next);
    CHECK_INT(alloc_blocks(), 0);
}

static void test_the_listener_is_restarted_on_its_port(void) {
    child a = start_child(run_taker), b = start_child(run_taker);
    char address[64], again[64];
    netchan_options o = options();
    proxy p;
    o.buffer = 16; /* the listener tells when a quarter was taken */
    listen_from(&a, "127.0.0.1:0", address, sizeof address);
    proxy_start(&p, address);
    netchan_link *d = dial_with(p.address, &o);
    uint64_t peer = wait_peer(d, "up");
    for (int i = 0; i < 10; i++) send_int(d->send, i);
    check_takes(&a, 0, 4);
    wait_for_in_flight(d, 6);
    wait_until_shipped();
    proxy_break(&p);
    wait_peer(d, "down");
    for (int i = 10; i < 15; i++) send_int(d->send, i);
    kill_child(&a);
    listen_from(&b, address, again, sizeof again);
    CHECK_STR(again, address);
    proxy_mend(&p);
    check_new_session(d, &b, peer);
    proxy_stop(&p);
}

/* The same with another process at another address. */
static void test_another_process_takes_over(void) {
    child a = start_child(run_taker), b = start_child(run_taker);
    char first[64], second[64], list[200];
    netchan_options o = options();
    proxy p;
    o.buffer = 16; /* the listener tells when a quarter was taken */
    listen_from(&a, "127.0.0.1:0", first, sizeof first);
    listen_from(&b, "127.0.0.1:0", second, sizeof second);
    proxy_start(&p, first);
    snprintf(list, sizeof list, "%s,%s", p.address, second);
    netchan_link *d = dial_with(list, &o);
    netchan_value v = wait_event(d, "up");
    uint64_t peer = number_of(&v, "peer");
    CHECK_STR(text_of(&v, "address"), p.address);
    netchan_clear(&v);
    for (int i = 0; i < 10; i++) send_int(d->send, i);
    check_takes(&a, 0, 4);
    wait_for_in_flight(d, 6);
    wait_until_shipped();
    pthread_mutex_lock(&netchan__net_lock); /* the thread of the library waits: nothing leaves */
    kill_child(&a);
    proxy_break(&p);
    pthread_mutex_unlock(&netchan__net_lock);
    wait_peer(d, "down");
    for (int i = 10; i < 15; i++) send_int(d->send, i);
    proxy_stop(&p);
    check_new_session(d, &b, peer);
}

/* A listener that is killed and restarted again and again under load: each value is taken once at most, in order, and
 * none is missing that was not counted. */
static void test_listeners_are_killed_again_and_again(void) {
    enum { LISTENERS = 6, COUNT = 3000 };
    child c[LISTENERS];
    for (int i = 0; i < LISTENERS; i++) c[i] = start_child(run_taker);
    char address[64] = "127.0.0.1:0", line[64];
    netchan_options o = options();
    o.buffer = 32;
    listen_from(&c[0], address, address, sizeof address);
    netchan_link *d = dial_with(address, &o);
    stream s = {d->send, COUNT, 0};
    pthread_t thread = test_start(send_stream, &s);
    int last = -1, taken = 0;
    for (int i = 0; i < LISTENERS; i++) {
        if (i) listen_from(&c[i], address, line, sizeof line);
        snprintf(line, sizeof line, "%d", COUNT);
        write_line(c[i].to, line);
        for (int n = 0; i < LISTENERS - 1 ? n < COUNT / (LISTENERS + 2) : last < COUNT - 1; n++, taken++) {
            CHECK(read_line(c[i].from, line, sizeof line));
            CHECK(atoi(line) > last);
            last = atoi(line);
        }
        if (i == LISTENERS - 1) break;
        CHECK_INT(kill(c[i].pid, SIGKILL), 0);
        CHECK_INT(waitpid(c[i].pid, NULL, 0), c[i].pid);
        for (; read_line(c[i].from, line, sizeof line); taken++) {
            CHECK(atoi(line) > last);
            last = atoi(line);
        }
        close_child(&c[i]);
    }
    test_join(thread);
    netchan_report report;
    netchan_hangup(d, &report);
    CHECK_INT(report.undelivered, 0);
    CHECK(COUNT - taken <= (int)report.unknown + LISTENERS - 1); /* each may have died with one in hand */
    kill_child(&c[LISTENERS - 1]);
    CHECK_INT(alloc_blocks(), 0);
}

/* --- sessions that are lost --------------------------------------------------------------------------------------- */

/* No link comes within resume_ms: both sides say so, with counts, and so do the calls. Then a new session begins. */
static void test_no_link_comes_in_time(void) {
    netchan_options o = options();
    shaky s;
    task r, firm, held, mine;
    o.resume_ms = 200;
    shaky_join(&s, &o, &o);
    uint64_t in = wait_peer(s.l, "up"), out = wait_peer(s.d, "up");
    check_works(s.l, s.d);
    start_recv(&r, s.d->recv, NETCHAN_FOREVER);
    wait_for_waiters(s.l->send, 1);
    start_send(&firm, s.d->send, netchan_int(1), NETCHAN_FOREVER); /* its value goes to the listener at once */
    wait_for_waiters(s.l->recv, 1);
    start_send(&held, s.d->send, netchan_int(2), LONG); /* its value stays */
    wait_for_waiters(s.l->recv, 2);
    proxy_freeze(&s.p, FROM_DIALLER | FROM_LISTENER);
    start_send(&mine, s.l->send, netchan_int(3), NETCHAN_FOREVER); /* shipped to the receive that waits */
    wait_for_waiters(s.l->send, 0);
    wait_until_shipped();
    long long start = test_ms();
    break_link(&s);
    netchan_value v = wait_event(s.d, "lost");
    CHECK(test_ms() - start >= 150);
    CHECK(test_ms() - start < LONG / 2);
    CHECK_INT(number_of(&v, "peer"), out);
    check_says(text_of(&v, "reason"), "200 ms");
    CHECK_INT(number_of(&v, "taken"), 1);
    CHECK_INT(number_of(&v, "unknown"), 1);
    netchan_clear(&v);
    v = wait_event(s.l, "lost");
    CHECK_INT(number_of(&v, "peer"), in);
    check_says(text_of(&v, "reason"), "200 ms");
    CHECK_INT(number_of(&v, "taken"), 1);
    CHECK_INT(number_of(&v, "unknown"), 1);
    netchan_clear(&v);
    CHECK_INT(end_task(&r), NETCHAN_ELOST);
    CHECK_INT(end_task(&firm), NETCHAN_EUNKNOWN);
    CHECK_INT(end_task(&mine), NETCHAN_EUNKNOWN);
    CHECK(!is_done(&held));
    for (int i = 0; i < 2; i++) {
        netchan_stats stats = stats_of(i ? s.l : s.d);
        CHECK_INT(stats.lost, 1);
        CHECK_INT(stats.peers, 0);
    }
    proxy_mend(&s.p);
    CHECK(wait_peer(s.d, "up") != out);
    CHECK(wait_peer(s.l, "up") != in);
    CHECK_INT(recv_int(s.l->recv), 2); /* it goes to the next session */
    CHECK_INT(end_task(&held), NETCHAN_OK);
    check_works(s.l, s.d);
    check_nothing_more(&s);
    netchan_hangup(s.d, NULL);
    proxy_stop(&s.p);
    netchan_hangup(s.l, NULL);
    CHECK_INT(alloc_blocks(), 0);
}

/* The listener has lost the session, the dialler would still wait: it is told, and begins anew. */
static void test_one_side_is_less_patient(void) {
    for (int patient = 0; patient < 2; patient++) {
        netchan_options lo = options(), o = options();
        shaky s;
        lo.linger_ms = 100;
        lo.resume_ms = patient ? 100 : -1;
        o.resume_ms = patient ? -1 : 100;
        shaky_join(&s, &lo, &o);
        uint64_t in = wait_peer(s.l, "up"), out = wait_peer(s.d, "up");
        break_link(&s);
        if (patient) CHECK_INT(wait_peer(s.l, "lost"), in);
        else CHECK_INT(wait_peer(s.d, "lost"), out);
        test_pause(SHORT);
        check_no_event(patient ? s.d : s.l, "lost");
        proxy_mend(&s.p);
        CHECK(wait_peer(s.d, "up") != out);
        CHECK(wait_peer(s.l, "up") != in);
        CHECK_INT(stats_of(s.d).lost, 1);
        check_works(s.l, s.d);
        CHECK_INT(stats_of(s.l).peers, patient ? 1 : 2); /* it waits for ever for the one that does not come again */
        hang_up(s.d);
        if (patient) wait_for_no_peers(s.l);
        proxy_stop(&s.p);
        netchan_hangup(s.l, NULL);
        CHECK_INT(alloc_blocks(), 0);
    }
}

/* --- ends --------------------------------------------------------------------------------------------------------- */

typedef struct parting {
    netchan_link *link;
    netchan_report report;
    int result;
    long long took;
} parting;

static void *run_parting(void *arg) {
    parting *p = (parting *)arg;
    long long start = test_ms();
    memset(&p->report, 99, sizeof p->report);
    p->result = netchan_hangup(p->link, &p->report);
    p->took = test_ms() - start;
    return NULL;
}

static void check_report(const parting *p, size_t undelivered, size_t unknown, size_t unreceived) {
    CHECK_INT(p->report.undelivered, undelivered);
    CHECK_INT(p->report.unknown, unknown);
    CHECK_INT(p->report.unreceived, unreceived);
    CHECK_INT(p->result, undelivered || unknown ? NETCHAN_ETIMEDOUT : NETCHAN_OK);
}

/* The link is down when one side hangs up, and comes back before its patience ends: all arrives. */
static void test_hangup_waits_for_the_link(void) {
    for (int direction = 0; direction < 2; direction++) {
        netchan_options o = options();
        shaky s;
        o.buffer = 10;
        shaky_join(&s, &o, &o);
        way w = shaky_way(&s, direction);
        for (int i = 0; i < 5; i++) send_int(w.send, i);
        break_link(&s);
        for (int i = 5; i < 10; i++) send_int(w.send, i);
        parting p = {direction ? s.l : s.d, {0, 0, 0}, 0, 0};
        netchan_link *other = direction ? s.d : s.l;
        pthread_t thread = test_start(run_parting, &p);
        test_pause(SHORT);
        proxy_mend(&s.p);
        for (int i = 0; i < 10; i++) CHECK_INT(recv_int(w.recv), i);
        test_join(thread);
        check_report(&p, 0, 0, 0);
        CHECK(p.took >= SHORT - 2 && p.took < LONG / 2);
        netchan_value v = wait_event(other, "drained");
        check_says(text_of(&v, "reason"), "it hung up");
        CHECK_INT(number_of(&v, "unknown"), 0);
        netchan_clear(&v);
        proxy_stop(&s.p);
        hang_up(other);
        CHECK_INT(alloc_blocks(), 0);
    }
}

/* The link does not come back: the hangup ends in time, and counts what stayed here and what may be there. */
static void test_hangup_does_not_wait_for_ever(void) {
    for (int direction = 0; direction < 2; direction++) {
        netchan_options o = options();
        shaky s;
        o.buffer = 10;
        o.linger_ms = 150;
        o.resume_ms = 500;
        shaky_join(&s, &o, &o);
        way w = shaky_way(&s, direction);
        send_int(w.send, 0);
        CHECK_INT(recv_int(w.recv), 0);
        if (direction) wait_for_in_flight(s.l, 0); /* the listener knows that it was taken */
        if (!direction) { /* the listener has them, and the dialler cannot know what becomes of them */
            for (int i = 1; i < 4; i++) send_int(w.send, i);
            wait_for_len(w.recv, 3);
        }
        break_link(&s);
        for (int i = 4; i < 9; i++) send_int(w.send, i);
        parting p = {direction ? s.l : s.d, {0, 0, 0}, 0, 0};
        run_parting(&p);
        CHECK(p.took >= 148 && p.took < LONG / 2);
        check_says(netchan_errmsg(), "not delivered");
        CHECK_INT(p.report.undelivered, 5);
        if (direction) CHECK_INT(p.report.unknown, 0);
        else CHECK(p.report.unknown == 3 || p.report.unknown == 4); /* the first as well, if it was not told of that */
        CHECK_INT(p.report.unreceived, 0);
        proxy_stop(&s.p);
        p.link = direction ? s.d : s.l;
        wait_peer(p.link, "lost");
        run_parting(&p);
        check_report(&p, 0, 0, direction ? 0 : 3);
        CHECK_INT(alloc_blocks(), 0);
    }
}

/* What came, and nobody received it: it is counted when its sender is gone, and goes back when not. */
static void test_hangup_counts_what_nobody_received(void) {
    for (int gone = 0; gone < 2; gone++) {
        netchan_options o = options();
        o.linger_ms = 200;
        o.buffer = 10;
        pair q;
        q.l = listen_with(&o);
        q.d = dial_with(q.l->address, &o);
        for (int i = 0; i < 7; i++) send_int(q.d->send, i);
        wait_for_len(q.l->recv, 7);
        CHECK_INT(recv_int(q.l->recv), 0);
        CHECK_INT(recv_int(q.l->recv), 1);
        parting p = {gone ? q.d : q.l, {0, 0, 0}, 0, 0};
        run_parting(&p);
        check_report(&p, 0, 0, 0);
        CHECK(p.took < LONG / 2);
        if (gone) wait_for_no_peers(q.l);
        p.link = gone ? q.l : q.d;
        if (!gone) {
            netchan_value v = wait_event(q.d, "drained");
            CHECK_INT(number_of(&v, "taken"), 2);
            CHECK_INT(number_of(&v, "returned"), 5);
            CHECK_INT(number_of(&v, "unknown"), 0);
            netchan_clear(&v);
            CHECK_INT(stats_of(q.d).queued, 5);
        }
        run_parting(&p);
        if (gone) check_report(&p, 0, 0, 5);
        else check_report(&p, 5, 0, 0);
        CHECK_INT(alloc_blocks(), 0);
    }
}

/* A process says its last words over a link that is cut, and is gone. */
static void run_last_words(int in, int out) {
    char line[128];
    netchan_options o = options();
    CHECK(read_line(in, line, sizeof line));
    o.buffer = 50;
    netchan_link *d = dial_with(line, &o);
    for (int n = 0; n < 50; n++) CHECK_INT(netchan_send(d->send, netchan_int(n), LONG), NETCHAN_OK);
    hang_up(d);
    write_line(out, "gone");
    _exit(0);
}

static void test_the_last_words_arrive(void) {
    enum { CHILDREN = 8 };
    child c[CHILDREN];
    for (int i = 0; i < CHILDREN; i++) c[i] = start_child(run_last_words);
    for (int i = 0; i < CHILDREN; i++) {
        netchan_options o = options();
        netchan_link *l = listen_with(&o);
        proxy p;
        proxy_start(&p, l->address);
        proxy_cut_every(&p, i ? 2000 : 0);
        write_line(c[i].to, p.address);
        end_child(&c[i]);
        for (int n = 0; n < 50; n++) CHECK_INT(recv_int(l->recv), n);
        CHECK_INT(netchan_recv(l->recv, NULL, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
        proxy_stop(&p);
        o.linger_ms = 0;
        netchan_hangup(l, NULL); /* the last cut may have hidden from it that the other side is done */
        CHECK_INT(alloc_blocks(), 0);
    }
}

/* --- successors --------------------------------------------------------------------------------------------------- */

static uint8_t relay_bytes[40000];

/* Diallers that send numbers of their own, some of them large, while listener after listener hands over its socket. */
typedef struct relay {
    netchan_link *d;
    int number, count;
    pthread_t thread;
} relay;

static void *relay_sender(void *arg) {
    relay *r = (relay *)arg;
    for (int i = 0; i < r->count; i++) {
        netchan_value items[3];
        items[0] = netchan_int(r->number);
        items[1] = netchan_int(i);
        items[2] = netchan_bytes(relay_bytes, i % 50 == 49 ? sizeof relay_bytes : 10);
        CHECK_INT(netchan_send(r->d->send, netchan_array(items, 3), i % 3 ? NETCHAN_FOREVER : LONG), NETCHAN_OK);
    }
    return NULL;
}

enum { RELAYS = 4 };

typedef struct taking {
    netchan_link *l;
    int next[RELAYS]; /* of each dialler */
    int left;         /* values to be taken by this listener; negative: all that there are */
} taking;

static void take_one(taking *t, netchan_value *v) {
    int64_t who = netchan_as_int(netchan_at(v, 0), -1), n = netchan_as_int(netchan_at(v, 1), -1);
    CHECK(who >= 0 && who < RELAYS);
    CHECK_INT(n, t->next[who]);
    t->next[who]++;
    netchan_clear(v);
}

/* Receives, until told to stop or until the link is hung up. */
static void *run_taking(void *arg) {
    taking *t = (taking *)arg;
    for (netchan_value v; t->left; t->left--) {
        int result = netchan_recv(t->l->recv, &v, NETCHAN_FOREVER);
        if (result == NETCHAN_ECLOSED) break;
        CHECK_INT(result, NETCHAN_OK);
        take_one(t, &v);
    }
    return NULL;
}

/* The socket is passed on, as to a process of which one is the parent. */
static netchan_link *succeed(int fd, size_t buffer) {
    netchan_options o = options();
    o.listen_fd = fd;
    o.buffer = buffer;
    netchan_link *l = netchan_listen(NULL, &o);
    if (!l) test_fail(__FILE__, __LINE__, "%s", netchan_errmsg());
    return l;
}

/* No value is lost, none doubled, and the order of each dialler is kept, although each listener leaves in the middle
 * of the traffic; its successor is there already, or comes when it is gone. */
static void test_successors_on_one_port(void) {
    enum { LISTENERS = 8, EACH = 2000 / LESS };
    for (size_t buffer = 0; buffer < 101; buffer += 100) {
        netchan_options o = options();
        netchan_link *l = listen_with(&o);
        o.buffer = buffer;
        relay r[RELAYS];
        taking t;
        memset(&t, 0, sizeof t);
        for (int i = 0; i < RELAYS; i++) {
            r[i].d = dial_with(l->address, &o);
            r[i].number = i;
            r[i].count = EACH;
            r[i].thread = test_start(relay_sender, &r[i]);
        }
        for (int i = 0; i < LISTENERS; i++) {
            t.l = l;
            t.left = RELAYS * EACH / (2 * LISTENERS);
            run_taking(&t);
            int fd = dup(l->listen_fd);
            CHECK(fd >= 0);
            netchan_link *next = i % 2 ? succeed(fd, 0) : NULL;
            netchan *recv = netchan_retain(l->recv);
            parting p = {l, {0, 0, 0}, 0, 0};
            pthread_t thread = test_start(run_parting, &p);
            netchan_value v; /* what is received during the hangup counts, too */
            for (int result; (result = netchan_recv(recv, &v, NETCHAN_FOREVER)) != NETCHAN_ECLOSED; take_one(&t, &v))
                CHECK_INT(result, NETCHAN_OK);
            test_join(thread);
            netchan_free(recv);
            check_report(&p, 0, 0, 0);
            CHECK(p.took < LONG / 2);
            l = next ? next : succeed(fd, 0);
        }
        t.l = l;
        t.left = 0;
        for (int i = 0; i < RELAYS; i++) t.left += EACH - t.next[i];
        run_taking(&t);
        for (int i = 0; i < RELAYS; i++) {
            test_join(r[i].thread);
            CHECK_INT(t.next[i], EACH);
        }
        CHECK_INT(netchan_recv(l->recv, NULL, SHORT), NETCHAN_ETIMEDOUT);
        for (int i = 0; i < RELAYS; i++) {
            CHECK_INT(stats_of(r[i].d).lost, 0);
            hang_up(r[i].d);
        }
        hang_up(l);
        CHECK_INT(alloc_blocks(), 0);
    }
}

/* --- sockets that listen already ---------------------------------------------------------------------------------- */

/* A socket of this kind, bound to a free port of loopback; listens, perhaps. */
static int open_listener(int kind, bool listens) {
    struct sockaddr_in a = loopback(0);
    int fd = socket(AF_INET, kind, 0);
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&a, sizeof a) == 0);
    if (listens) CHECK_INT(listen(fd, 16), 0);
    return fd;
}

static void test_a_socket_that_listens(void) {
    int fd = open_listener(SOCK_STREAM, true);
    struct sockaddr_in a;
    socklen_t size = sizeof a;
    char address[32];
    CHECK_INT(getsockname(fd, (struct sockaddr *)&a, &size), 0);
    snprintf(address, sizeof address, "127.0.0.1:%d", ntohs(a.sin_port));
    netchan_options o = options();
    o.listen_fd = fd;
    pair q;
    q.l = netchan_listen(":0", &o); /* the address is of no importance then */
    CHECK(q.l);
    CHECK_INT(q.l->listen_fd, fd);
    CHECK_STR(q.l->address, address);
    o.listen_fd = 0;
    q.d = dial_with(address, &o);
    CHECK_INT(q.d->listen_fd, -1);
    check_works(q.l, q.d);
    CHECK(fcntl(fd, F_GETFD) >= 0);
    part(&q);
    CHECK(fcntl(fd, F_GETFD) < 0); /* it belonged to the link */
    q = join(0, 0);
    CHECK(q.l->listen_fd > 0);
    CHECK(fcntl(q.l->listen_fd, F_GETFD) & FD_CLOEXEC);
    part(&q);
}

/* As systemd starts a service: the socket is descriptor 3, LISTEN_FDS is 1. This program begins anew in its place. */
static int serve_inherited(void) {
    const char *fds = getenv("LISTEN_FDS"), *pid = getenv("LISTEN_PID");
    netchan_options o = options();
    if (!fds || strcmp(fds, "1") != 0 || !pid || atoi(pid) != (int)getpid()) return 2;
    o.listen_fd = 3;
    netchan_link *l = netchan_listen(NULL, &o);
    if (!l) test_fail(__FILE__, __LINE__, "%s", netchan_errmsg());
    CHECK_INT(recv_int(l->recv), 1);
    send_int(l->send, 2);
    hang_up(l);
    return 0;
}

static void test_a_socket_that_was_inherited(void) {
    int fd = open_listener(SOCK_STREAM, true), status = -1;
    struct sockaddr_in a;
    socklen_t size = sizeof a;
    char address[32], number[16];
    CHECK_INT(getsockname(fd, (struct sockaddr *)&a, &size), 0);
    snprintf(address, sizeof address, "127.0.0.1:%d", ntohs(a.sin_port));
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        snprintf(number, sizeof number, "%d", (int)getpid());
        if (dup2(fd, 3) != 3 || setenv("LISTEN_FDS", "1", 1) || setenv("LISTEN_PID", number, 1)) _exit(3);
        execl(program, program, "serve", (char *)NULL);
        _exit(4);
    }
    close(fd);
    netchan_options o = options();
    netchan_link *d = dial_with(address, &o);
    send_int(d->send, 1);
    CHECK_INT(recv_int(d->recv), 2);
    hang_up(d);
    CHECK_INT(waitpid(pid, &status, 0), pid);
    CHECK_INT(status, 0);
    CHECK_INT(alloc_blocks(), 0);
}

static void check_bad_fd(int fd, const char *word) {
    netchan_options o = options();
    char number[32];
    int before = fcntl(fd, F_GETFD), flags = fcntl(fd, F_GETFL);
    o.listen_fd = fd;
    check_fails(netchan_listen("127.0.0.1:0", &o), word);
    snprintf(number, sizeof number, "listen_fd is %d", fd);
    check_says(netchan_errmsg(), number);
    CHECK_INT(fcntl(fd, F_GETFD), before); /* as it was: open, or not, and ours */
    CHECK_INT(fcntl(fd, F_GETFL), flags);
    CHECK_INT(alloc_blocks(), 0);
}

static void test_sockets_that_do_not_serve(void) {
    int closed = open_listener(SOCK_STREAM, true), silent = open_listener(SOCK_STREAM, false);
    int datagrams = open_listener(SOCK_DGRAM, false), local = socket(AF_UNIX, SOCK_STREAM, 0), pair[2];
    char path[] = "/tmp/netchan-test-XXXXXX", name[] = "/tmp/netchan-test-XXXXXX";
    int file = mkstemp(path);
    CHECK(file >= 0 && mkdtemp(name) && pipe(pair) == 0);
    struct sockaddr_un a;
    memset(&a, 0, sizeof a);
    a.sun_family = AF_UNIX;
    snprintf(a.sun_path, sizeof a.sun_path, "%s/socket", name);
    CHECK(local >= 0 && bind(local, (struct sockaddr *)&a, sizeof a) == 0 && listen(local, 1) == 0);
    close(closed);
    check_bad_fd(closed, "no socket that listens");
    check_bad_fd(-5, "no socket that listens");
    check_bad_fd(file, "no socket that listens");
    check_bad_fd(pair[0], "no socket that listens");
    check_bad_fd(silent, "no socket that listens");
    check_bad_fd(datagrams, "no socket that listens");
    check_bad_fd(local, "no TCP socket");
    unlink(a.sun_path);
    rmdir(name);
    unlink(path);
    close(file);
    close(silent);
    close(datagrams);
    close(local);
    close(pair[0]);
    close(pair[1]);
}

/* --- events and statistics ---------------------------------------------------------------------------------------- */

static void check_event(netchan_link *link, const char *name, uint64_t peer, const char *address, const char *reason) {
    netchan_value v;
    CHECK_INT(netchan_recv(link->events, &v, LONG), NETCHAN_OK);
    CHECK_STR(text_of(&v, "event"), name);
    CHECK_INT(netchan_as_uint(netchan_get(&v, "peer"), 0), peer);
    if (address) check_says(text_of(&v, "address"), address);
    if (reason) check_says(text_of(&v, "reason"), reason);
    else CHECK(netchan_is_nil(netchan_get(&v, "reason")));
    bool over = strcmp(name, "lost") == 0 || strcmp(name, "drained") == 0;
    CHECK_INT(number_of(&v, "taken") != UINT64_MAX, over);
    CHECK_INT(number_of(&v, "returned") != UINT64_MAX, over);
    CHECK_INT(number_of(&v, "unknown") != UINT64_MAX, over);
    CHECK_INT(number_of(&v, "replayed") != UINT64_MAX, strcmp(name, "resumed") == 0);
    CHECK_INT(netchan_get(&v, "listening")->type == NETCHAN_BOOL, strcmp(name, "up") == 0);
    CHECK(netchan_is_nil(netchan_get(&v, "dropped")));
    netchan_clear(&v);
}

/* A value each way; the cases tell the peers. */
static void exchange_cases(const shaky *s, netchan_case *in, netchan_case *out) {
    task t;
    start_send(&t, s->d->send, netchan_int(1), LONG);
    CHECK_INT(netchan_select(in, 1, LONG), 0);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    start_send(&t, s->l->send, netchan_int(2), LONG);
    CHECK_INT(netchan_select(out, 1, LONG), 0);
    CHECK_INT(end_task(&t), NETCHAN_OK);
}

/* The life of a session, as both sides tell it. */
static void test_events_tell_the_whole_life(void) {
    netchan_options o = options(), wrong = options();
    shaky s;
    o.resume_ms = 300;
    wrong.shared_key = "0a9b8c7d6e5f4a3b2c1d0e9f8a7b6c5d4e3f2a1b0c9d8e7f6a5b4c3d2e1f0a9b";
    s.l = listen_with(&o);
    check_fails(netchan_dial(s.l->address, &wrong), "shared_key");
    check_event(s.l, "rejected", 0, "127.0.0.1:", "shared_key");
    proxy_start(&s.p, s.l->address);
    s.d = dial_with(s.p.address, &o);
    netchan_case c = netchan_case_recv(s.l->recv, NULL), e = netchan_case_recv(s.d->recv, NULL);
    exchange_cases(&s, &c, &e);
    uint64_t in = c.peer.id, out = e.peer.id;
    check_event(s.l, "up", in, "127.0.0.1:", NULL);
    check_event(s.d, "up", out, s.p.address, NULL);
    proxy_cut(&s.p);
    check_event(s.l, "down", in, "127.0.0.1:", "");
    check_event(s.d, "down", out, s.p.address, "");
    check_event(s.l, "resumed", in, "127.0.0.1:", NULL);
    check_event(s.d, "resumed", out, s.p.address, NULL);
    proxy_break(&s.p);
    check_event(s.l, "down", in, "127.0.0.1:", "");
    check_event(s.d, "down", out, s.p.address, "");
    check_event(s.l, "lost", in, "127.0.0.1:", "300 ms");
    check_event(s.d, "lost", out, s.p.address, "300 ms");
    proxy_mend(&s.p);
    exchange_cases(&s, &c, &e);
    check_event(s.d, "up", e.peer.id, s.p.address, NULL);
    CHECK_INT(netchan_close(s.d->send), NETCHAN_OK);
    netchan_value v = wait_event(s.l, "closed"); /* connections that were given up may have been told of as rejected */
    CHECK_INT(number_of(&v, "peer"), c.peer.id);
    netchan_clear(&v);
    hang_up(s.d);
    check_event(s.l, "drained", c.peer.id, "127.0.0.1:", "it hung up");
    proxy_stop(&s.p);
    hang_up(s.l);
    CHECK_INT(alloc_blocks(), 0);
}

/* Nobody reads the events of a link that is cut again and again: nothing waits, and none is missing. */
static void test_nobody_reads_the_events(void) {
    enum { ROUNDS = 100 / (LESS == 1 ? 1 : 2), KEPT = 64 };
    netchan_options o = options();
    shaky s;
    shaky_join(&s, &o, &o);
    for (int i = 0; i < ROUNDS; i++) {
        proxy_cut(&s.p);
        check_works(s.l, s.d);
    }
    for (int side = 0; side < 2; side++) {
        netchan_link *link = side ? s.l : s.d;
        int rounds = ROUNDS + side; /* the first side adds one to those of the other */
        check_works(s.l, s.d);
        CHECK_INT(stats_of(link).resumes, rounds);
        size_t dropped = 0, downs = 0, kept = netchan_len(link->events);
        netchan_value v;
        CHECK_INT(kept, KEPT);
        for (size_t i = 0; i < kept; i++) {
            CHECK_INT(netchan_recv(link->events, &v, NETCHAN_NOWAIT), NETCHAN_OK);
            dropped += (size_t)netchan_as_uint(netchan_get(&v, "dropped"), 0);
            downs += is_event(&v, "down");
            netchan_clear(&v);
        }
        proxy_cut(&s.p); /* the next event tells of the last that were dropped */
        v = wait_event(link, "down");
        dropped += (size_t)netchan_as_uint(netchan_get(&v, "dropped"), 0);
        netchan_clear(&v);
        CHECK_INT(downs, KEPT / 2);
        CHECK_INT(dropped + kept, 1 + 2 * rounds);
    }
    check_survived(&s);
    shaky_part(&s);
}

static void test_statistics(void) {
    enum { COUNT = 100 };
    netchan_options o = options();
    netchan_stats l, d;
    o.buffer = COUNT;
    pair q;
    q.l = listen_with(&o);
    CHECK_INT(netchan_get_stats(NULL, &l), NETCHAN_EINVAL);
    CHECK_INT(netchan_get_stats(q.l, NULL), NETCHAN_EINVAL);
    check_says(netchan_errmsg(), "netchan_get_stats");
    for (int i = 0; i < 5; i++) send_int(q.l->send, i); /* nobody is there */
    l = stats_of(q.l);
    CHECK_INT(l.peers + l.values_sent + l.bytes_sent + l.bytes_received + l.frames_sent + l.records_sent, 0);
    CHECK_INT(l.queued, 5);
    CHECK_INT(l.in_flight, 0);
    q.d = dial_with(q.l->address, &o);
    for (int i = 0; i < 5; i++) CHECK_INT(recv_int(q.d->recv), i);
    wait_for_in_flight(q.l, 0);
    for (int i = 0; i < COUNT; i++) send_int(q.d->send, i);
    wait_for_len(q.l->recv, COUNT);
    CHECK_INT(stats_of(q.d).in_flight, COUNT);
    CHECK_INT(stats_of(q.d).queued, 0);
    for (int i = 0; i < COUNT; i++) CHECK_INT(recv_int(q.l->recv), i);
    while (stats_of(q.d).in_flight > COUNT / 4) sched_yield(); /* the listener tells of a quarter at a time */
    do { /* until the last acknowledgement has arrived */
        d = stats_of(q.d);
        l = stats_of(q.l);
    } while (d.bytes_sent != l.bytes_received || l.bytes_sent != d.bytes_received || !d.round_trip_us ||
             !l.round_trip_us);
    CHECK_INT(d.values_sent, COUNT);
    CHECK_INT(l.values_received, COUNT);
    CHECK_INT(l.values_sent, 5);
    CHECK_INT(d.values_received, 5);
    CHECK_INT(d.frames_sent, l.frames_received);
    CHECK_INT(l.frames_sent, d.frames_received);
    CHECK_INT(d.records_sent, l.records_received);
    CHECK_INT(l.records_sent, d.records_received);
    CHECK(d.frames_sent >= COUNT && d.bytes_sent > 3 * COUNT && d.bytes_sent < 100 * COUNT);
    CHECK(d.records_sent >= 2 && d.records_sent <= d.frames_sent + 50);
    CHECK(d.round_trip_us < LONG * 1000 && l.round_trip_us < LONG * 1000);
    CHECK_INT(d.peers, 1);
    CHECK_INT(l.peers, 1);
    CHECK_INT(d.resumes + d.rollovers + d.replays + d.lost + d.queued, 0);
    CHECK_INT(l.resumes + l.rollovers + l.replays + l.lost + l.queued + l.in_flight, 0);
    part(&q);
}

/* What broken links add to them. */
static void test_statistics_of_broken_links(void) {
    enum { ROUNDS = 10, SIZE = 1000 };
    netchan_options o = options();
    netchan_stats stats;
    shaky s;
    o.buffer = 50;
    o.resume_ms = 300;
    shaky_join(&s, &o, &o);
    uint64_t peer = wait_peer(s.d, "up"), replayed = 0;
    for (int i = 0; i < ROUNDS; i++) {
        proxy_set_silent(&s.p, true); /* what leaves from here on does not arrive */
        for (int n = 0; n < 20; n++) send_int(s.d->send, n);
        wait_until_shipped();
        proxy_cut(&s.p);
        proxy_mend(&s.p);
        for (int n = 0; n < 20; n++) CHECK_INT(recv_int(s.l->recv), n);
        netchan_value v = wait_event(s.d, "resumed");
        CHECK(number_of(&v, "replayed") >= 20 && number_of(&v, "replayed") < 200);
        replayed += number_of(&v, "replayed");
        netchan_clear(&v);
    }
    stats = stats_of(s.d);
    CHECK_INT(stats.resumes, ROUNDS);
    CHECK_INT(stats.replays, replayed);
    CHECK_INT(stats.values_sent, 20 * ROUNDS); /* each once */
    CHECK_INT(stats_of(s.l).values_received, 20 * ROUNDS);
    CHECK_INT(stats_of(s.l).resumes, ROUNDS);
    break_link(&s);
    CHECK_INT(stats_of(s.d).peers, 1); /* it is down and not lost */
    for (int n = 0; n < 5; n++) send_int(s.d->send, n);
    CHECK_INT(wait_peer(s.d, "lost"), peer);
    stats = stats_of(s.d);
    CHECK_INT(stats.lost, 1);
    CHECK_INT(stats.peers, 0);
    CHECK_INT(stats.queued, 5);
    CHECK_INT(stats.values_sent, 20 * ROUNDS);
    proxy_mend(&s.p);
    for (int n = 0; n < 5; n++) CHECK_INT(recv_int(s.l->recv), n);
    CHECK_INT(stats_of(s.d).values_sent, 20 * ROUNDS + 5);
    netchan_hangup(s.d, NULL);
    proxy_stop(&s.p);
    netchan_hangup(s.l, NULL);
    CHECK_INT(alloc_blocks(), 0);
}
int main(int argc, char **argv) {
    static const test_entry tests[] = {
        TEST(a_rendezvous_in_progress),
        TEST(a_full_buffer),
        TEST(sending_while_the_link_is_down),
        TEST(a_large_value_is_cut),
        TEST(close_in_flight),
        TEST(close_ends_who_waits),
        TEST(ten_thousand_cuts),
        TEST(a_link_that_hangs),
        TEST(a_new_link_takes_the_place_of_one_that_hangs),
        TEST(a_dialler_whose_address_changed),
        TEST(the_session_goes_on_over_another_path),
        TEST(a_list_that_begins_with_nobody),
        TEST(the_listener_is_restarted_on_its_port),
        TEST(another_process_takes_over),
        TEST(listeners_are_killed_again_and_again),
        TEST(no_link_comes_in_time),
        TEST(one_side_is_less_patient),
        TEST(hangup_waits_for_the_link),
        TEST(hangup_does_not_wait_for_ever),
        TEST(hangup_counts_what_nobody_received),
        TEST(the_last_words_arrive),
        TEST(successors_on_one_port),
        TEST(a_socket_that_listens),
        TEST(a_socket_that_was_inherited),
        TEST(sockets_that_do_not_serve),
        TEST(events_tell_the_whole_life),
        TEST(nobody_reads_the_events),
        TEST(statistics),
        TEST(statistics_of_broken_links),
        TEST_END,
    };
    program = argv[0];
    if (argc == 2 && strcmp(argv[1], "serve") == 0) return serve_inherited();
    return test_main(argc, argv, tests);
}
