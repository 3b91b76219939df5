/* One listener and its many peers, over TLS on loopback: accept, sendto, broadcast, and named channels. Sections [11],
 * [14] and [18] of netchan.h. */
#include "alloc.h"

#define NETCHAN_IMPLEMENTATION
#include "netchan.h"
#include "test.h"
#include "task.h"
#include "net.h"


enum { MIB = 1 << 20, SOON_LOST = 150 /* ms without a link */ };

static netchan_options options_for(size_t buffer, int resume_ms) {
    netchan_options o = options();
    o.buffer = buffer;
    o.resume_ms = resume_ms;
    return o;
}

/* --- peers -------------------------------------------------------------------------------------------------------- */

/* A listener and some who dialled it, one after the other. */
enum { PARTY_MOST = 200 };

typedef struct party {
    netchan_link *l, *d[PARTY_MOST];
    netchan_peer peer[PARTY_MOST]; /* as the listener numbers them */
    size_t count;
} party;

static void invite(party *p, size_t count, size_t buffer) {
    netchan_options o = options_for(buffer, 0);
    for (; count; count--) {
        p->d[p->count] = dial_with(p->l->address, &o);
        p->peer[p->count++].id = wait_peer(p->l, "up");
    }
}

static party make_party(size_t count, size_t listen_buffer, size_t dial_buffer) {
    netchan_options o = options_for(listen_buffer, 0);
    party p;
    memset(&p, 0, sizeof p);
    p.l = listen_with(&o);
    invite(&p, count, dial_buffer);
    return p;
}

static void end_party(party *p) {
    for (size_t i = 0; i < p->count; i++)
        if (p->d[i]) hang_up(p->d[i]);
    hang_up(p->l);
    CHECK_INT(alloc_blocks(), 0);
}

/* A peer that was received from link->accept. */
typedef struct guest {
    netchan_value shown;
    netchan_peer peer;
    netchan *send, *recv; /* borrowed from what was shown */
} guest;

static guest guest_of(netchan_value shown) {
    guest g;
    CHECK_INT(shown.type, NETCHAN_MAP);
    CHECK_INT(netchan_count(&shown), 6);
    CHECK_INT(netchan_get(&shown, "name")->type, NETCHAN_STR);
    CHECK_INT(netchan_get(&shown, "peer")->type, NETCHAN_UINT);
    CHECK_INT(netchan_get(&shown, "send")->type, NETCHAN_SENDER);
    CHECK_INT(netchan_get(&shown, "recv")->type, NETCHAN_RECEIVER);
    CHECK_INT(strncmp(text_of(&shown, "address"), "127.0.0.1:", 10), 0);
    g.shown = shown;
    g.peer.id = netchan_as_uint(netchan_get(&shown, "peer"), 0);
    g.send = netchan_as_chan(netchan_get(&shown, "send"));
    g.recv = netchan_as_chan(netchan_get(&shown, "recv"));
    return g;
}

static guest accept_guest(netchan_link *l) {
    netchan_value v;
    CHECK_INT(netchan_recv(l->accept, &v, LONG), NETCHAN_OK);
    return guest_of(v);
}

static void leave(guest *g) {
    netchan_clear(&g->shown);
}

static void check_nobody_new(netchan_link *l) {
    CHECK_INT(netchan_recv(l->accept, NULL, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
}

static void check_nothing(netchan *ch) {
    CHECK_INT(netchan_recv(ch, NULL, SHORT), NETCHAN_ETIMEDOUT);
}

static void check_ints(netchan *ch, int from, int to) {
    for (int i = from; i < to; i++) CHECK_INT(recv_int(ch), i);
}

static uint64_t number_of(const netchan_value *event, const char *key) {
    return netchan_as_uint(netchan_get(event, key), UINT64_MAX);
}

/* --- accept ------------------------------------------------------------------------------------------------------- */

/* Each peer once, in the order in which they came, with its own pair of channels, which lead to it alone. */
static void test_accept_shows_each_peer_once(void) {
    enum { COUNT = 5 };
    party p = make_party(3, 0, 0);
    guest g[COUNT];
    char id[NETCHAN_KEY_ID_SIZE];
    CHECK_INT(netchan_key_id(KEY, id, sizeof id), NETCHAN_OK);
    g[0] = accept_guest(p.l);
    invite(&p, COUNT - 3, 0); /* more come in between */
    long long start = test_ms();
    for (size_t i = 1; i < COUNT; i++) g[i] = accept_guest(p.l);
    CHECK(test_ms() - start < LONG / 10); /* they are there */
    check_nobody_new(p.l);
    for (size_t i = 0; i < COUNT; i++) {
        CHECK_INT(g[i].peer.id, p.peer[i].id);
        CHECK_STR(text_of(&g[i].shown, "identity"), id);
        CHECK(!p.d[i]->accept);
        for (size_t n = 0; n < i; n++) CHECK(g[n].send != g[i].send && g[n].recv != g[i].recv);
    }
    task t[COUNT];
    for (size_t i = 0; i < COUNT; i++) start_recv(&t[i], p.d[i]->recv, LONG);
    for (size_t i = 0; i < COUNT; i++) wait_for_waiters(g[i].send, 1);
    for (size_t i = COUNT; i-- > 0;) send_int(g[i].send, (int64_t)i);
    for (size_t i = 0; i < COUNT; i++) {
        CHECK_INT(end_task(&t[i]), NETCHAN_OK);
        CHECK_INT(netchan_as_int(&t[i].value, -1), i);
        exchange(p.d[i]->send, g[i].recv, (int64_t)i);
    }
    for (size_t i = 0; i < COUNT; i++) leave(&g[i]);
    end_party(&p);
}

/* What a peer sent before it was accepted comes from its own channel, in order: what lies in its buffer, and what
 * waits. That of others stays. */
static void test_values_from_before_accept(void) {
    enum { BUFFER = 4 };
    for (int buffered = 0; buffered < 2; buffered++) {
        party p = make_party(2, 0, buffered ? BUFFER : 0);
        task t[2];
        for (int i = 0; i < BUFFER && buffered; i++)
            for (int who = 0; who < 2; who++) send_int(p.d[who]->send, 100 * who + i);
        int next = buffered ? BUFFER : 0;
        for (int who = 0; who < 2; who++)
            start_send(&t[who], p.d[who]->send, netchan_int(100 * who + next), who ? NETCHAN_FOREVER : LONG);
        if (buffered) wait_for_len(p.l->recv, 2 * BUFFER);
        else wait_for_waiters(p.l->recv, 2);
        guest g = accept_guest(p.l);
        CHECK_INT(netchan_len(p.l->recv), buffered ? BUFFER : 0);
        CHECK_INT(netchan_len(g.recv), buffered ? BUFFER : 0);
        check_ints(g.recv, 0, next + 1);
        CHECK_INT(end_task(&t[0]), NETCHAN_OK);
        check_ints(p.l->recv, 100, 100 + next + 1);
        CHECK_INT(end_task(&t[1]), NETCHAN_OK);
        task r;
        start_recv(&r, p.l->recv, 3 * SHORT); /* from now on as well */
        exchange(p.d[0]->send, g.recv, 7);
        CHECK_INT(end_task(&r), NETCHAN_ETIMEDOUT);
        exchange(p.d[1]->send, p.l->recv, 8);
        check_nothing(g.recv);
        leave(&g);
        end_party(&p);
    }
}

/* The work queue is for those who were not accepted. */
static void test_the_work_queue_is_not_for_an_accepted_peer(void) {
    party p = make_party(2, 4, 0);
    guest g = accept_guest(p.l);
    task t;
    start_recv(&t, p.d[0]->recv, LONG);
    wait_for_waiters(g.send, 1);
    for (int i = 0; i < 3; i++) send_int(p.l->send, i);
    test_pause(SHORT);
    CHECK(!is_done(&t));
    CHECK_INT(netchan_len(p.l->send), 3);
    check_ints(p.d[1]->recv, 0, 3);
    CHECK(!is_done(&t));
    send_int(g.send, 9);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    CHECK_INT(netchan_as_int(&t.value, -1), 9);
    leave(&g);
    end_party(&p);
}

/* Receives that wait already when their process is accepted wait for its own channel. */
static void test_waiting_receives_move(void) {
    for (int k = 0; k < 3; k++) {
        party p = make_party(1, 0, 0);
        netchan_value v = netchan_nil();
        netchan_case c[2];
        task t;
        c[0] = netchan_case_recv(p.d[0]->recv, &v);
        c[1] = netchan_case_recv(NULL, NULL);
        start_select(&t, c, k == 2 ? 2 : 1, k ? LONG : NETCHAN_FOREVER);
        wait_for_waiters(p.l->send, 1);
        guest g = accept_guest(p.l);
        CHECK_INT(waiters_of(p.l->send), 0);
        CHECK_INT(waiters_of(g.send), 1);
        CHECK_INT(netchan_send(p.l->send, netchan_int(1), NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
        CHECK_INT(netchan_send(p.l->send, netchan_int(1), SHORT), NETCHAN_ETIMEDOUT);
        CHECK_INT(netchan_send(g.send, netchan_int(2), NETCHAN_NOWAIT), NETCHAN_OK);
        CHECK_INT(end_task(&t), 0);
        CHECK_INT(netchan_as_int(&v, -1), 2);
        leave(&g);
        end_party(&p);
    }
}

/* A send on the work queue is being negotiated with a peer just when that is accepted: it happens once, to whomever. */
static void test_accept_while_values_flow(void) {
    enum { COUNT = 200 / LESS };
    for (int buffered = 0; buffered < 2; buffered++) {
        party p = make_party(1, buffered ? 8 : 0, buffered ? 8 : 0);
        for (size_t i = 0; i < COUNT / 10; i++) {
            stream up = {p.d[i]->send, 50, 0};
            task t;
            pthread_t thread = test_start(send_stream, &up);
            netchan_value v, w = netchan_nil();
            netchan_case c[2];
            c[0] = netchan_case_recv(p.d[i]->recv, &w);
            c[1] = netchan_case_recv(NULL, NULL);
            start_select(&t, c, 2, LONG); /* it is asked, and engaged, or not yet */
            int next = 0;
            for (; next < (int)(i % 20); next++) {
                CHECK_INT(netchan_recv(p.l->recv, &v, LONG), NETCHAN_OK);
                CHECK_INT(netchan_as_int(&v, -1), next);
            }
            task s;
            start_send(&s, p.l->send, netchan_int(77), SHORT);
            guest g = accept_guest(p.l);
            check_ints(g.recv, next, 50);
            task own;
            start_send(&own, g.send, netchan_int(78), LONG);
            int result = end_task(&s);
            CHECK_INT(end_task(&t), 0);
            if (netchan_as_int(&w, -1) == 77) { /* before it was accepted, or its match had begun */
                CHECK_INT(result, NETCHAN_OK);
                CHECK_INT(recv_int(p.d[i]->recv), 78);
            } else {
                CHECK_INT(netchan_as_int(&w, -1), 78);
                CHECK_INT(result, buffered ? NETCHAN_OK : NETCHAN_ETIMEDOUT);
                CHECK_INT(netchan_len(p.l->send), buffered);
            }
            CHECK_INT(end_task(&own), NETCHAN_OK);
            test_join(thread);
            leave(&g);
            hang_up(p.d[i]);
            p.d[i] = NULL;
            invite(&p, 1, buffered ? 8 : 0);
            if (netchan_as_int(&w, -1) == 78 && buffered) /* the next has the other */
                CHECK_INT(recv_int(p.d[i + 1]->recv), 77);
        }
        end_party(&p);
    }
}

/* Who left before it was accepted is not shown. What it had sent is there, from link->recv. */
static void test_a_peer_that_is_gone_before_it_was_accepted(void) {
    enum { COUNT = 3 };
    for (int first = 0; first < 3; first++) { /* the one that is shown already, and those that wait behind it */
        party p = make_party(COUNT, 0, 4);
        for (int i = 0; i < 3; i++) send_int(p.d[first]->send, i);
        hang_up(p.d[first]);
        p.d[first] = NULL;
        wait_peer(p.l, "drained");
        for (int i = 0; i < COUNT; i++) {
            if (i == first) continue;
            guest g = accept_guest(p.l);
            CHECK_INT(g.peer.id, p.peer[i].id);
            leave(&g);
        }
        check_nobody_new(p.l);
        check_ints(p.l->recv, 0, 3);
        end_party(&p);
    }
}

/* A new peer is one case of several. */
static void test_accept_in_a_select(void) {
    party p = make_party(0, 0, 0);
    netchan *local = netchan_make(0);
    guest g;
    for (int i = 0; i < 6; i++) {
        netchan_value who = netchan_nil(), v = netchan_nil();
        netchan_case c[3];
        task t;
        c[0] = netchan_case_recv(p.l->accept, &who);
        c[1] = netchan_case_recv(p.l->recv, &v);
        c[2] = netchan_case_recv(local, &v);
        CHECK_INT(netchan_select(c, 3, i % 2 ? NETCHAN_NOWAIT : SHORT), NETCHAN_ETIMEDOUT);
        start_select(&t, c, 3, LONG);
        if (i % 3 == 0) { /* the one before was not accepted by its select, and is in the way */
            invite(&p, 1, 0);
            CHECK_INT(end_task(&t), 0);
            g = guest_of(who);
            CHECK_INT(g.peer.id, p.peer[p.count - 1].id);
            exchange(p.d[p.count - 1]->send, g.recv, i);
            leave(&g);
        } else if (i % 3 == 1) {
            invite(&p, 1, 0);
            CHECK_INT(end_task(&t), 0);
            netchan_clear(&who);
        } else {
            send_int(local, 5);
            CHECK_INT(end_task(&t), 2);
            CHECK_INT(netchan_as_int(&v, -1), 5);
        }
    }
    netchan_free(local);
    end_party(&p);
}

/* Who does not keep its channels hears nothing of the peer, and disturbs nobody. */
static void test_the_own_channels_are_dropped(void) {
    party p = make_party(2, 0, 2);
    guest g = accept_guest(p.l), other = accept_guest(p.l);
    send_int(p.d[0]->send, 1);
    leave(&g);
    CHECK_INT(netchan_sendto(p.l, p.peer[0], netchan_int(3), SHORT), NETCHAN_ETIMEDOUT);
    task t;
    start_recv(&t, p.d[0]->recv, LONG);
    CHECK_INT(netchan_sendto(p.l, p.peer[0], netchan_int(4), LONG), NETCHAN_OK); /* it is there still */
    CHECK_INT(end_task(&t), NETCHAN_OK);
    exchange(p.d[1]->send, other.recv, 2);
    leave(&other);
    netchan_hangup(p.d[0], NULL); /* what it has sent is where nobody can receive it */
    hang_up(p.d[1]);
    netchan_report r;
    CHECK_INT(netchan_hangup(p.l, &r), NETCHAN_OK);
    CHECK_INT(alloc_blocks(), 0);
}

/* Cuts change nothing of who it is: the number, the identity, the channels. */
static void test_accepted_peers_resume(void) {
    netchan_options o = options_for(4, 0);
    shaky s;
    shaky_join(&s, &o, &o);
    guest g = accept_guest(s.l);
    for (int i = 0; i < 20; i++) {
        netchan_peer from = {0};
        netchan_value v;
        task t;
        proxy_cut(&s.p);
        start_send(&t, s.d->send, netchan_int(i), LONG);
        CHECK_INT(netchan_recvfrom(g.recv, &v, &from, LONG), NETCHAN_OK);
        CHECK_INT(end_task(&t), NETCHAN_OK);
        CHECK_INT(netchan_as_int(&v, -1), i);
        CHECK_INT(from.id, g.peer.id);
        CHECK_INT(netchan_sendto(s.l, g.peer, netchan_int(i), LONG), NETCHAN_OK);
        CHECK_INT(recv_int(s.d->recv), i);
        exchange(g.send, s.d->recv, i);
        v = wait_event(s.l, "resumed");
        CHECK_INT(number_of(&v, "peer"), g.peer.id);
        netchan_clear(&v);
    }
    check_nobody_new(s.l);
    leave(&g);
    shaky_part(&s);
}

/* It hangs up, or is lost: its values come first, then the end. What lay in its own buffer is counted. */
static void own_channels_end(bool lost) {
    netchan_options o = options_for(3, SOON_LOST);
    for (int k = 0; k < 2; k++) { /* what waits then, and what comes later */
        shaky s;
        task t[2];
        shaky_join(&s, &o, &o);
        guest g = accept_guest(s.l);
        for (int i = 0; i < 3; i++) send_int(s.d->send, i);
        wait_for_len(g.recv, 3);
        for (int i = 0; i < 3; i++) send_int(g.send, i); /* nobody receives them */
        if (k) {
            check_ints(g.recv, 0, 3);
            start_recv(&t[0], g.recv, NETCHAN_FOREVER);
            start_send(&t[1], g.send, netchan_int(3), LONG);
            wait_for_waiters(g.recv, 1);
            wait_for_waiters(g.send, 1);
        }
        if (lost) proxy_break(&s.p);
        else hang_up(s.d);
        netchan_value v = wait_event(s.l, lost ? "lost" : "drained");
        CHECK_INT(number_of(&v, "peer"), g.peer.id);
        CHECK_INT(number_of(&v, "undelivered"), 3);
        CHECK_INT(number_of(&v, "unknown"), 0);
        netchan_clear(&v);
        int right = lost ? NETCHAN_ELOST : NETCHAN_ECLOSED;
        for (int i = 0; i < 2 && k; i++) CHECK_INT(end_task(&t[i]), right);
        if (!k) check_ints(g.recv, 0, 3);
        for (int timeout_ms = -1; timeout_ms < 2; timeout_ms++) {
            CHECK_INT(netchan_recv(g.recv, NULL, timeout_ms), right);
            CHECK_INT(netchan_send(g.send, netchan_int(1), timeout_ms), right);
        }
        CHECK_INT(netchan_sendto(s.l, g.peer, netchan_int(1), LONG), NETCHAN_ENOPEER);
        leave(&g);
        netchan_report r;
        CHECK_INT(netchan_hangup(s.l, &r), NETCHAN_ETIMEDOUT);
        CHECK_INT(r.undelivered, 3);
        CHECK_INT(r.unknown, 0);
        proxy_stop(&s.p);
        if (lost) netchan_hangup(s.d, NULL);
        CHECK_INT(alloc_blocks(), 0);
    }
}

static void test_an_accepted_peer_hangs_up(void) {
    own_channels_end(false);
}

static void test_an_accepted_peer_is_lost(void) {
    own_channels_end(true);
}

/* It closes its sending channel: its own recv ends, and the other direction goes on. */
static void test_an_accepted_peer_closes(void) {
    party p = make_party(1, 0, 4);
    guest g = accept_guest(p.l);
    for (int i = 0; i < 3; i++) send_int(p.d[0]->send, i);
    CHECK_INT(netchan_close(p.d[0]->send), NETCHAN_OK);
    check_ints(g.recv, 0, 3);
    CHECK_INT(netchan_recv(g.recv, NULL, LONG), NETCHAN_ECLOSED);
    wait_peer(p.l, "closed");
    exchange(g.send, p.d[0]->recv, 5);
    CHECK_INT(netchan_close(g.send), NETCHAN_OK); /* and this direction, by the listener */
    CHECK_INT(netchan_recv(p.d[0]->recv, NULL, LONG), NETCHAN_ECLOSED);
    leave(&g);
    end_party(&p);
}

static void *run_accepting(void *arg) {
    netchan *accept = (netchan *)arg;
    netchan_value v;
    intptr_t count = 0;
    int result;
    for (; (result = netchan_recv(accept, &v, NETCHAN_FOREVER)) == NETCHAN_OK; netchan_clear(&v)) count++;
    CHECK_INT(result, NETCHAN_ECLOSED);
    netchan_free(accept);
    return (void *)count;
}

/* A loop that accepts ends when its link is hung up. */
static void test_an_accept_loop_ends(void) {
    for (int idle = 0; idle < 2; idle++) {
        party p = make_party(0, 0, 0);
        void *count;
        pthread_t thread = test_start(run_accepting, netchan_retain(p.l->accept));
        if (!idle) invite(&p, 3, 0);
        for (long long end = test_ms() + LONG; waiters_of(p.l->accept) != 1 || netchan_len(p.l->accept); sched_yield())
            CHECK(test_ms() < end);
        for (size_t i = 0; i < p.count; i++) hang_up(p.d[i]);
        hang_up(p.l);
        CHECK_INT(pthread_join(thread, &count), 0);
        CHECK_INT((intptr_t)count, idle ? 0 : 3);
        CHECK_INT(alloc_blocks(), 0);
    }
}

/* The channels outlive the link when they are retained. */
static void test_own_channels_after_the_listener_hung_up(void) {
    party p = make_party(1, 2, 2);
    guest g = accept_guest(p.l);
    task t;
    for (int i = 0; i < 2; i++) send_int(p.d[0]->send, i);
    wait_for_len(g.recv, 2);
    check_ints(g.recv, 0, 2);
    start_recv(&t, g.recv, LONG);
    wait_for_waiters(g.recv, 1);
    hang_up(p.l);
    CHECK_INT(end_task(&t), NETCHAN_ECLOSED);
    CHECK_INT(netchan_recv(g.recv, NULL, LONG), NETCHAN_ECLOSED);
    CHECK_INT(netchan_send(g.send, netchan_int(1), LONG), NETCHAN_ECLOSED);
    leave(&g);
    hang_up(p.d[0]);
    CHECK_INT(alloc_blocks(), 0);
}

/* With pins the identity is the fingerprint of what the peer has shown, also after the link was replaced. */
static void test_the_identity_of_a_pinned_peer(void) {
    static identity a, b;
    netchan_options lo = options(), o = options();
    shaky s;
    make_identity(&a);
    make_identity(&b);
    lo.shared_key = o.shared_key = NULL;
    lo.cert = a.cert, lo.cert_key = a.key, lo.pin = b.pin;
    o.cert = b.cert, o.cert_key = b.key, o.pin = a.pin;
    shaky_join(&s, &lo, &o);
    netchan_value v = wait_event(s.l, "up");
    CHECK_STR(text_of(&v, "identity"), b.pin);
    netchan_clear(&v);
    v = wait_event(s.d, "up");
    CHECK_STR(text_of(&v, "identity"), a.pin);
    netchan_clear(&v);
    proxy_cut(&s.p);
    wait_peer(s.l, "resumed");
    guest g = accept_guest(s.l);
    CHECK_STR(text_of(&g.shown, "identity"), b.pin);
    exchange(s.d->send, g.recv, 1);
    leave(&g);
    shaky_part(&s);
}

/* --- values that come early --------------------------------------------------------------------------------------- */

enum { EARLY_BUFFER = 64, QUICK = 8 }; /* so many quick receives, and values come before them */

/* How many values were here before they were received. Nothing public tells. */
static uint64_t early_of(const netchan *ch) {
    pthread_mutex_lock(&netchan__net_lock);
    uint64_t count = ch->early_taken;
    pthread_mutex_unlock(&netchan__net_lock);
    return count;
}

/* Who receives quickly does not wait a round trip for each value, though each receive could end without one. */
static void test_values_come_early(void) {
    enum { ROUNDS = 20 };
    party p = make_party(1, EARLY_BUFFER, EARLY_BUFFER);
    int next = 0;
    for (long long end = test_ms() + LONG;;) { /* again, when the machine was too busy to be quick */
        uint64_t before = early_of(p.d[0]->recv);
        for (int round = 0; round < ROUNDS; round++, next += EARLY_BUFFER) {
            for (int i = 0; i < EARLY_BUFFER; i++) send_int(p.l->send, next + i);
            check_ints(p.d[0]->recv, next, next + EARLY_BUFFER);
            wait_for_len(p.l->send, 0);
        }
        if (early_of(p.d[0]->recv) - before > ROUNDS * EARLY_BUFFER / 4) break;
        CHECK(test_ms() < end);
    }
    end_party(&p);
}

static void *send_many(void *arg) {
    task *t = (task *)arg;
    for (int64_t i = 0; i < netchan_as_int(&t->value, 0); i++) send_int(t->ch, i);
    return NULL;
}

/* Receives once, in one of several ways, and says nothing when there was nothing. Returns the number, or -1. */
static int64_t recv_somehow(netchan *ch, uint64_t *seed) {
    netchan_value v;
    netchan_case c[2];
    c[0] = netchan_case_recv(ch, &v);
    c[1] = netchan_case_recv(NULL, NULL);
    uint64_t way = test_random(seed) % 6;
    int timeout_ms = way == 0 ? NETCHAN_NOWAIT : way == 1 ? 1 : way == 2 ? LONG : NETCHAN_FOREVER;
    int result = netchan_select(c, way == 3 ? 2 : 1, timeout_ms);
    if (result == NETCHAN_ETIMEDOUT) return -1;
    CHECK(result == 0 && c[0].result == NETCHAN_OK && !c[0].redelivered);
    return netchan_as_int(&v, -1);
}

/* One receiver gets them in their order, whether it is quick or slow, and however it waits. */
static void test_early_values_keep_their_order(void) {
    enum { COUNT = 6000 / LESS };
    party p = make_party(1, EARLY_BUFFER, EARLY_BUFFER);
    uint64_t seed = 7;
    task t;
    t.ch = p.l->send;
    t.value = netchan_int(COUNT);
    t.thread = test_start(send_many, &t);
    for (int64_t next = 0; next < COUNT;) {
        int64_t got = recv_somehow(p.d[0]->recv, &seed);
        if (got >= 0) CHECK_INT(got, next);
        next += got >= 0;
        if (test_random(&seed) % 64 == 0) test_pause((int)(test_random(&seed) % 12)); /* they go back meanwhile */
    }
    test_join(t.thread);
    end_party(&p);
}

/* Who gets the receiving end afterwards gets the rest in their order, though some were here already. */
static void test_early_values_and_who_gets_the_end(void) {
    enum { ROUNDS = 3, BUFFER = 64, MANY = 200, ALL = MANY + BUFFER };
    party p = make_party(1, BUFFER, BUFFER);
    netchan_options o = options_for(1, 0);
    netchan_link *l = listen_with(&o), *d = dial_with(l->address, &o);
    for (int i = 0; i < ROUNDS; i++) {
        task t;
        netchan_value v;
        t.ch = p.l->send;
        t.value = netchan_int(ALL);
        t.thread = test_start(send_many, &t);
        for (int n = 0; n < MANY; n++) CHECK_INT(netchan_recv(p.d[0]->recv, NULL, NETCHAN_FOREVER), NETCHAN_OK);
        CHECK_INT(netchan_send(l->send, netchan_receiver(p.d[0]->recv), LONG), NETCHAN_OK);
        CHECK_INT(netchan_recv(d->recv, &v, LONG), NETCHAN_OK);
        netchan *end = netchan_retain(netchan_as_chan(&v));
        netchan_clear(&v);
        check_ints(end, MANY, ALL);
        test_join(t.thread);
        netchan_free(end);
    }
    hang_up(d);
    hang_up(l);
    end_party(&p);
}

/* A listener with two peers, of which the first has received some values quickly. *next: the first that it has not. */
static party make_early_party(int *next) {
    party p = make_party(2, EARLY_BUFFER, EARLY_BUFFER);
    for (int i = 0; i < EARLY_BUFFER; i++) send_int(p.l->send, i);
    check_ints(p.d[0]->recv, 0, QUICK);
    *next = QUICK;
    return p;
}

/* The rest, each once, in whatever order. */
static void check_rest_of(netchan *ch, int from, int to) {
    bool seen[EARLY_BUFFER] = {false};
    for (int i = from; i < to; i++) {
        netchan_value v;
        netchan_case c = netchan_case_recv(ch, &v);
        CHECK_INT(netchan_select(&c, 1, LONG), 0);
        CHECK_INT(c.result, NETCHAN_OK);
        int64_t n = netchan_as_int(&v, -1);
        CHECK(n >= from && n < to && !seen[n] && !c.redelivered);
        seen[n] = true;
    }
}

/* Who does not receive any more keeps nothing from others. */
static void test_early_values_go_back(void) {
    for (int round = 0; round < 20; round++) {
        int next;
        party p = make_early_party(&next);
        check_rest_of(p.d[1]->recv, next, EARLY_BUFFER);
        check_nothing(p.d[0]->recv);
        send_int(p.l->send, 100); /* it may receive again */
        CHECK_INT(recv_int(p.d[0]->recv), 100);
        end_party(&p);
    }
}

/* Who hangs up has not taken them: they go to others, and their fate is known. */
static void test_early_values_and_hangup(void) {
    for (int round = 0; round < 20; round++) {
        int next;
        party p = make_early_party(&next);
        hang_up(p.d[0]);
        p.d[0] = NULL;
        check_rest_of(p.d[1]->recv, next, EARLY_BUFFER);
        end_party(&p);
    }
}

/* Who is accepted may have received some of them, or they go to others; its own channel is in order. */
static void test_early_values_and_accept(void) {
    enum { OWN = 1000, OWN_COUNT = 40 };
    for (int round = 0; round < 20; round++) {
        int next, left, own = OWN;
        party p = make_early_party(&next);
        guest g = accept_guest(p.l);
        CHECK_INT(g.peer.id, p.peer[0].id);
        for (int i = 0; i < OWN_COUNT; i++) send_int(g.send, OWN + i);
        for (left = EARLY_BUFFER - next; own < OWN + OWN_COUNT;) {
            int64_t n = recv_int(p.d[0]->recv);
            if (n >= OWN) CHECK_INT(n, own++);
            else left--;
        }
        for (; left; left--) CHECK(recv_int(p.d[1]->recv) < EARLY_BUFFER);
        check_nothing(p.d[1]->recv);
        leave(&g);
        end_party(&p);
    }
}

/* --- to one peer -------------------------------------------------------------------------------------------------- */

static void test_sendto_reaches_one_peer(void) {
    enum { COUNT = 3 };
    party p = make_party(COUNT, 0, 0);
    guest g = accept_guest(p.l); /* the first one; the others share the work queue */
    for (int round = 0; round < 3 * COUNT; round++) {
        size_t to = (size_t)round % COUNT;
        task t[COUNT];
        for (size_t i = 0; i < COUNT; i++) start_recv(&t[i], p.d[i]->recv, LONG);
        wait_for_waiters(p.l->send, COUNT - 1);
        wait_for_waiters(g.send, 1);
        int timeout_ms = round < COUNT ? NETCHAN_NOWAIT : round < 2 * COUNT ? LONG : NETCHAN_FOREVER;
        CHECK_INT(netchan_sendto(p.l, p.peer[to], netchan_int(round), timeout_ms), NETCHAN_OK);
        CHECK_INT(end_task(&t[to]), NETCHAN_OK);
        CHECK_INT(netchan_as_int(&t[to].value, -1), round);
        for (size_t i = 0; i < COUNT; i++) {
            if (i == to) continue;
            CHECK(!is_done(&t[i]));
            CHECK_INT(netchan_sendto(p.l, p.peer[i], netchan_int(-1), LONG), NETCHAN_OK);
            CHECK_INT(end_task(&t[i]), NETCHAN_OK);
            CHECK_INT(netchan_as_int(&t[i].value, 0), -1);
        }
    }
    for (size_t i = 0; i < COUNT; i++) { /* nobody receives there */
        CHECK_INT(netchan_sendto(p.l, p.peer[i], netchan_int(1), NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
        long long start = test_ms();
        CHECK_INT(netchan_sendto(p.l, p.peer[i], netchan_int(1), SHORT), NETCHAN_ETIMEDOUT);
        CHECK(test_ms() - start >= SHORT - 1);
        check_nothing(p.d[i]->recv); /* and it does not come later */
    }
    leave(&g);
    end_party(&p);
}

/* What is for one peer alone goes before what link->send, or its own channel, has for it. */
static void test_sendto_goes_first(void) {
    for (int accepted = 0; accepted < 2; accepted++) {
        party p = make_party(1, 4, 0);
        guest g;
        if (accepted) g = accept_guest(p.l);
        for (int i = 2; i < 4; i++) send_int(accepted ? g.send : p.l->send, i);
        for (int i = 0; i < 2; i++) CHECK_INT(netchan_sendto(p.l, p.peer[0], netchan_int(i), LONG), NETCHAN_OK);
        check_ints(p.d[0]->recv, 0, 4);
        if (accepted) leave(&g);
        end_party(&p);
    }
}

/* What was for it before it is accepted stays for it. */
static void test_sendto_before_accept(void) {
    party p = make_party(2, 3, 0);
    task t;
    for (int i = 0; i < 3; i++) CHECK_INT(netchan_sendto(p.l, p.peer[0], netchan_int(i), LONG), NETCHAN_OK);
    start_send(&t, p.l->send, netchan_int(50), LONG);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    guest g = accept_guest(p.l);
    send_int(g.send, 3);
    check_ints(p.d[0]->recv, 0, 4);
    check_nothing(p.d[0]->recv);
    CHECK_INT(recv_int(p.d[1]->recv), 50);
    leave(&g);
    end_party(&p);
}

static void test_sendto_nobody(void) {
    party p = make_party(2, 4, 0), q = make_party(1, 0, 0);
    netchan_peer bad[3] = {{0}, {UINT64_MAX}, {0}};
    bad[2] = q.peer[0]; /* of another link */
    for (int i = 0; i < 3; i++)
        for (int timeout_ms = -1; timeout_ms < 2; timeout_ms++) {
            CHECK_INT(netchan_sendto(p.l, bad[i], netchan_int(1), timeout_ms), NETCHAN_ENOPEER);
            check_says(netchan_errmsg(), "netchan_sendto");
        }
    CHECK_INT(netchan_sendto(NULL, p.peer[0], netchan_int(1), LONG), NETCHAN_EINVAL);
    hang_up(p.d[0]);
    p.d[0] = NULL;
    CHECK_INT(wait_peer(p.l, "drained"), p.peer[0].id);
    CHECK_INT(netchan_sendto(p.l, p.peer[0], netchan_int(1), NETCHAN_FOREVER), NETCHAN_ENOPEER);
    invite(&p, 1, 0);
    CHECK(p.peer[2].id != p.peer[0].id); /* numbers are never used again */
    CHECK_INT(netchan_sendto(p.l, p.peer[0], netchan_int(1), NETCHAN_NOWAIT), NETCHAN_ENOPEER);
    CHECK_INT(netchan_sendto(p.l, p.peer[2], netchan_int(1), NETCHAN_NOWAIT), NETCHAN_OK);
    CHECK_INT(recv_int(p.d[2]->recv), 1);
    hang_up(q.d[0]);
    hang_up(q.l);
    end_party(&p);
}

typedef struct sending {
    netchan_link *link;
    netchan_peer peer;
    int timeout_ms, result;
    bool done; /* atomic */
    pthread_t thread;
} sending;

static void *run_sendto(void *arg) {
    sending *s = (sending *)arg;
    s->result = netchan_sendto(s->link, s->peer, netchan_int(7), s->timeout_ms);
    __atomic_store_n(&s->done, true, __ATOMIC_RELEASE);
    return NULL;
}

static void start_sendto(sending *s, netchan_link *link, netchan_peer peer, int timeout_ms) {
    memset(s, 0, sizeof *s);
    s->link = link;
    s->peer = peer;
    s->timeout_ms = timeout_ms;
    s->thread = test_start(run_sendto, s);
}

/* A peer is lost, or leaves, while a call waits for it: before it was accepted and after. What lies in its buffer is
 * counted. */
static void test_sendto_a_peer_that_goes(void) {
    for (int k = 0; k < 8; k++) {
        bool lost = k & 1, accepted = k & 2, buffered = k & 4;
        netchan_options o = options_for(buffered ? 2 : 0, SOON_LOST);
        shaky s;
        sending wait[2];
        shaky_join(&s, &o, &o);
        netchan_peer peer = {wait_peer(s.l, "up")};
        netchan *work = s.l->send;
        guest g;
        if (accepted) {
            g = accept_guest(s.l);
            work = g.send;
        }
        for (int i = 0; i < 2 && buffered; i++)
            CHECK_INT(netchan_sendto(s.l, peer, netchan_int(1), NETCHAN_NOWAIT), NETCHAN_OK);
        start_sendto(&wait[0], s.l, peer, NETCHAN_FOREVER);
        start_sendto(&wait[1], s.l, peer, LONG);
        for (long long end = test_ms() + LONG; waiters_of(work) != 2; sched_yield()) {
            CHECK(test_ms() < end);
            pthread_mutex_lock(&netchan__net_lock); /* they wait in a lane of their own */
            size_t found = 0;
            for (netchan__lane *lane = work->lanes; lane; lane = lane->next)
                for (netchan__waiter *w = lane->senders.head; w; w = w->next) found++;
            pthread_mutex_unlock(&netchan__net_lock);
            if (found == 2) break;
        }
        if (lost) proxy_break(&s.p);
        else hang_up(s.d);
        for (int i = 0; i < 2; i++) {
            test_join(wait[i].thread);
            CHECK_INT(wait[i].result, NETCHAN_ELOST);
        }
        netchan_value v = wait_event(s.l, lost ? "lost" : "drained");
        CHECK_INT(number_of(&v, "undelivered"), buffered ? 2 : 0);
        netchan_clear(&v);
        CHECK_INT(netchan_sendto(s.l, peer, netchan_int(1), NETCHAN_FOREVER), NETCHAN_ENOPEER);
        if (accepted) leave(&g);
        netchan_report r;
        CHECK_INT(netchan_hangup(s.l, &r), buffered ? NETCHAN_ETIMEDOUT : NETCHAN_OK);
        CHECK_INT(r.undelivered, buffered ? 2 : 0);
        proxy_stop(&s.p);
        if (lost) netchan_hangup(s.d, NULL);
        CHECK_INT(alloc_blocks(), 0);
    }
}

/* As many values wait for each as for the work queue, and no more. */
static void test_a_buffer_for_each_peer(void) {
    enum { BUFFER = 3 };
    party p = make_party(2, BUFFER, 0);
    for (int who = 0; who < 2; who++) {
        for (int i = 0; i < BUFFER; i++)
            CHECK_INT(netchan_sendto(p.l, p.peer[who], netchan_int(10 * who + i), NETCHAN_NOWAIT), NETCHAN_OK);
        CHECK_INT(netchan_sendto(p.l, p.peer[who], netchan_int(-1), NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
        CHECK_INT(netchan_sendto(p.l, p.peer[who], netchan_int(-1), SHORT), NETCHAN_ETIMEDOUT);
    }
    for (int i = 0; i < BUFFER; i++)
        CHECK_INT(netchan_send(p.l->send, netchan_int(50 + i), NETCHAN_NOWAIT), NETCHAN_OK);
    CHECK_INT(netchan_cap(p.l->send), BUFFER);
    check_ints(p.d[1]->recv, 10, 10 + BUFFER);
    check_ints(p.d[0]->recv, 0, BUFFER);
    check_ints(p.d[0]->recv, 50, 50 + BUFFER);
    check_nothing(p.d[1]->recv);
    for (int i = 0; i < 20; i++) { /* and again, in order, as far as there is room */
        sending s;
        start_sendto(&s, p.l, p.peer[0], LONG);
        CHECK_INT(recv_int(p.d[0]->recv), 7);
        test_join(s.thread);
        CHECK_INT(s.result, NETCHAN_OK);
    }
    end_party(&p);
}

static void test_sendto_from_a_dialler(void) {
    for (size_t buffer = 0; buffer < 3; buffer += 2) {
        pair p = join(buffer, buffer);
        netchan_peer listener = {wait_peer(p.d, "up")}, bad = {listener.id + 1000};
        sending s;
        start_sendto(&s, p.d, listener, LONG);
        CHECK_INT(recv_int(p.l->recv), 7);
        test_join(s.thread);
        CHECK_INT(s.result, NETCHAN_OK);
        CHECK_INT(netchan_sendto(p.d, bad, netchan_int(1), LONG), NETCHAN_ENOPEER);
        if (!buffer) CHECK_INT(netchan_sendto(p.d, listener, netchan_int(1), NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
        size_t reached = 99;
        task t;
        start_recv(&t, p.l->recv, LONG);
        CHECK_INT(netchan_broadcast(p.d, netchan_int(3), &reached, LONG), NETCHAN_OK);
        CHECK_INT(reached, 1);
        CHECK_INT(end_task(&t), NETCHAN_OK);
        part(&p);
    }
}

/* Sends one value and receives it, and says who it is from. */
static uint64_t sender_of(netchan *tx, netchan *rx) {
    netchan_peer from = {99999};
    netchan_value v;
    task t;
    start_send(&t, tx, netchan_int(1), LONG);
    CHECK_INT(netchan_recvfrom(rx, &v, &from, LONG), NETCHAN_OK);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    CHECK_INT(netchan_as_int(&v, -1), 1);
    return from.id;
}

static void test_recvfrom_tells_who_sent(void) {
    for (size_t cap = 0; cap < 3; cap += 2) {
        party p = make_party(3, cap, cap);
        guest g = accept_guest(p.l);
        netchan *ch = netchan_make(cap);
        for (int round = 0; round < 2; round++)
            for (size_t i = 0; i < 3; i++) {
                uint64_t number = p.peer[i].id, home;
                netchan *rx = i ? p.l->recv : g.recv, *tx = i ? p.l->send : g.send;
                CHECK_INT(sender_of(p.d[i]->send, rx), number);
                way there = {tx, p.d[i]->recv}, back = {p.d[i]->send, rx};
                netchan *end = pass_end(there, netchan_sender(ch));
                CHECK_INT(sender_of(end, ch), number); /* from afar into a channel of this process */
                netchan_free(end);
                end = pass_end(there, netchan_receiver(ch));
                home = sender_of(ch, end); /* at an end: whose it is */
                netchan_free(end);
                netchan *theirs = netchan_make(cap);
                end = pass_end(back, netchan_sender(theirs));
                CHECK_INT(sender_of(end, theirs), home); /* the listener, as this dialler numbers it */
                netchan_free(end);
                netchan_free(theirs);
                CHECK_INT(sender_of(ch, ch), 0);
                CHECK(home != number);
            }
        CHECK_INT(netchan_recvfrom(ch, NULL, NULL, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
        netchan_free(ch);
        leave(&g);
        end_party(&p);
    }
}

/* --- to all ------------------------------------------------------------------------------------------------------- */

typedef struct casting {
    netchan_link *link;
    netchan_value value;
    int timeout_ms, result;
    size_t reached;
    bool done; /* atomic */
    pthread_t thread;
} casting;

static void *run_broadcast(void *arg) {
    casting *c = (casting *)arg;
    c->result = netchan_broadcast(c->link, c->value, &c->reached, c->timeout_ms);
    __atomic_store_n(&c->done, true, __ATOMIC_RELEASE);
    return NULL;
}

static void start_broadcast(casting *c, netchan_link *link, netchan_value v, int timeout_ms) {
    memset(c, 0, sizeof *c);
    c->link = link;
    c->value = v;
    c->timeout_ms = timeout_ms;
    c->reached = 99999;
    c->thread = test_start(run_broadcast, c);
}

static bool is_cast(casting *c) {
    return __atomic_load_n(&c->done, __ATOMIC_ACQUIRE);
}

static void check_cast(casting *c, int result, size_t reached) {
    test_join(c->thread);
    CHECK_INT(c->result, result);
    CHECK_INT(c->reached, reached);
}

static void test_broadcast_reaches_each_peer_once(void) {
    enum { COUNT = 5 };
    for (size_t cap = 0; cap < 3; cap += 2) {
        party p = make_party(COUNT, cap, 0);
        guest g[2] = {accept_guest(p.l), accept_guest(p.l)};
        for (int round = 0; round < 4; round++) {
            casting c;
            start_broadcast(&c, p.l, netchan_int(round), round % 2 ? LONG : NETCHAN_FOREVER);
            for (int i = 0; i < COUNT; i++) CHECK_INT(recv_int(p.d[i]->recv), round);
            check_cast(&c, NETCHAN_OK, COUNT);
        }
        for (int i = 0; i < COUNT; i++) CHECK_INT(netchan_recv(p.d[i]->recv, NULL, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
        check_nothing(p.d[0]->recv);
        for (int i = 0; i < 2; i++) leave(&g[i]);
        exchange(p.l->send, p.d[COUNT - 1]->recv, 9); /* the work queue goes on */
        end_party(&p);
    }
}

/* NOWAIT, before the call above: who receives then has it. */
static void test_broadcast_that_does_not_wait(void) {
    enum { COUNT = 4 };
    party p = make_party(COUNT, 0, 0);
    task t[2];
    size_t reached = 99;
    for (int i = 0; i < 2; i++) start_recv(&t[i], p.d[i]->recv, LONG);
    wait_for_waiters(p.l->send, 2);
    CHECK_INT(netchan_broadcast(p.l, netchan_int(1), &reached, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    CHECK_INT(reached, 2);
    for (int i = 0; i < 2; i++) CHECK_INT(end_task(&t[i]), NETCHAN_OK);
    CHECK_INT(netchan_broadcast(p.l, netchan_int(1), NULL, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    for (int i = 0; i < COUNT; i++) check_nothing(p.d[i]->recv);
    end_party(&p);
}

/* One peer does not receive: the others have it while the call still waits for that. It gets it late, or, when the time
 * is up, never. */
static void test_a_slow_peer_holds_up_nobody(void) {
    enum { COUNT = 3 };
    for (int late = 0; late < 2; late++) {
        party p = make_party(COUNT, 0, 0);
        guest g = accept_guest(p.l);
        for (int slow = 0; slow < COUNT; slow++) {
            casting c;
            start_broadcast(&c, p.l, netchan_int(slow), late ? LONG : 3 * SHORT);
            for (int i = 0; i < COUNT; i++)
                if (i != slow) CHECK_INT(recv_int(p.d[i]->recv), slow);
            CHECK(!is_cast(&c));
            if (late) CHECK_INT(recv_int(p.d[slow]->recv), slow);
            check_cast(&c, late ? NETCHAN_OK : NETCHAN_ETIMEDOUT, late ? COUNT : COUNT - 1);
            check_nothing(p.d[slow]->recv);
        }
        leave(&g);
        end_party(&p);
    }
}

/* With a buffer each has room of its own: one that is full does not keep the others from it. */
static void test_broadcast_and_buffers(void) {
    enum { COUNT = 3, BUFFER = 2 };
    party p = make_party(COUNT, BUFFER, 0);
    size_t reached;
    for (int n = 0; n < BUFFER; n++) {
        CHECK_INT(netchan_broadcast(p.l, netchan_int(n), &reached, NETCHAN_NOWAIT), NETCHAN_OK);
        CHECK_INT(reached, COUNT);
    }
    check_ints(p.d[0]->recv, 0, BUFFER);
    check_ints(p.d[1]->recv, 0, BUFFER);
    netchan_stats stats;
    do CHECK_INT(netchan_get_stats(p.l, &stats), NETCHAN_OK);
    while (stats.in_flight || stats.queued != BUFFER); /* the listener knows that they were taken */
    wait_until_shipped();
    for (int n = BUFFER; n < 2 * BUFFER; n++) {
        CHECK_INT(netchan_broadcast(p.l, netchan_int(n), &reached, SHORT), NETCHAN_ETIMEDOUT);
        CHECK_INT(reached, COUNT - 1); /* the third had none of those taken */
    }
    check_ints(p.d[0]->recv, BUFFER, 2 * BUFFER);
    check_ints(p.d[1]->recv, BUFFER, 2 * BUFFER);
    check_ints(p.d[2]->recv, 0, BUFFER);
    check_nothing(p.d[2]->recv);
    end_party(&p);
}

static void test_broadcast_to_nobody(void) {
    party p = make_party(0, 0, 0);
    size_t reached = 99;
    CHECK_INT(netchan_broadcast(p.l, netchan_int(1), &reached, NETCHAN_FOREVER), NETCHAN_OK);
    CHECK_INT(reached, 0);
    CHECK_INT(netchan_broadcast(p.l, netchan_int(1), NULL, NETCHAN_NOWAIT), NETCHAN_OK);
    CHECK_INT(netchan_broadcast(NULL, netchan_int(1), &reached, LONG), NETCHAN_EINVAL);
    invite(&p, 2, 0);
    netchan_entry bad[1] = {{NULL, netchan_int(1)}};
    reached = 99;
    CHECK_INT(netchan_broadcast(p.l, netchan_map(bad, 1), &reached, LONG), NETCHAN_EINVAL);
    CHECK_INT(reached, 0);
    for (int i = 0; i < 2; i++) CHECK_INT(netchan_recv(p.d[i]->recv, NULL, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    hang_up(p.d[0]);
    hang_up(p.d[1]);
    p.d[0] = p.d[1] = NULL;
    wait_for_no_peers(p.l);
    CHECK_INT(netchan_broadcast(p.l, netchan_int(1), &reached, NETCHAN_FOREVER), NETCHAN_OK);
    CHECK_INT(reached, 0);
    end_party(&p);
}

static void test_broadcast_of_a_large_value(void) {
    enum { COUNT = 4 };
    uint8_t *bytes = noise(MIB);
    party p = make_party(COUNT, 0, 0);
    netchan *ch = netchan_make(COUNT);
    netchan_value items[2] = {netchan_bytes(bytes, MIB), netchan_sender(ch)}; /* and an end for each */
    casting c;
    task t[COUNT];
    for (int i = 0; i < COUNT; i++) start_recv(&t[i], p.d[i]->recv, LONG);
    start_broadcast(&c, p.l, netchan_array(items, 2), LONG);
    for (int i = 0; i < COUNT; i++) {
        size_t size;
        CHECK_INT(end_task(&t[i]), NETCHAN_OK);
        const void *got = netchan_as_block(netchan_at(&t[i].value, 0), NETCHAN_BYTES, &size);
        CHECK(got && size == MIB && memcmp(got, bytes, MIB) == 0);
        send_int(netchan_as_chan(netchan_at(&t[i].value, 1)), i);
        netchan_clear(&t[i].value);
    }
    check_cast(&c, NETCHAN_OK, COUNT);
    check_ints(ch, 0, COUNT);
    netchan_free(ch);
    free(bytes);
    end_party(&p);
}

static void test_broadcast_to_two_hundred(void) {
    size_t count = PARTY_MOST / LESS;
    party p = make_party(count, 1, 0);
    size_t reached;
    for (int n = 0; n < 3; n++) {
        casting c;
        start_broadcast(&c, p.l, netchan_int(n), LONG);
        for (size_t i = 0; i < count; i++) CHECK_INT(recv_int(p.d[(i + (size_t)n) % count]->recv), n);
        check_cast(&c, NETCHAN_OK, count);
    }
    CHECK_INT(netchan_broadcast(p.l, netchan_int(3), &reached, LONG), NETCHAN_OK); /* into their buffers */
    CHECK_INT(reached, count);
    for (size_t i = 0; i < count; i++) CHECK_INT(recv_int(p.d[i]->recv), 3);
    end_party(&p);
}

typedef struct fickle {
    const char *address;
    bool stop; /* atomic */
    int visits;
} fickle;

static void *run_fickle(void *arg) {
    fickle *f = (fickle *)arg;
    netchan_options o = options();
    for (; !__atomic_load_n(&f->stop, __ATOMIC_ACQUIRE); f->visits++) {
        netchan_link *d = dial_with(f->address, &o);
        if (f->visits % 2) netchan_recv(d->recv, NULL, 2);
        netchan_hangup(d, NULL);
    }
    return NULL;
}

typedef struct listening {
    netchan *recv;
    int count;
} listening;

static void *run_listening(void *arg) {
    listening *l = (listening *)arg;
    check_ints(l->recv, 0, l->count);
    return NULL;
}

/* Peers come and go meanwhile: the others get each value once, in order, and no call waits for who has left. */
static void test_broadcast_while_peers_come_and_go(void) {
    enum { STEADY = 2, ROUNDS = 100 / (LESS == 1 ? 1 : 2) };
    party p = make_party(STEADY, 0, 0);
    fickle f[2];
    listening s[STEADY];
    pthread_t threads[2 + STEADY];
    for (int i = 0; i < 2; i++) {
        f[i].address = p.l->address;
        f[i].stop = false;
        f[i].visits = 0;
        threads[i] = test_start(run_fickle, &f[i]);
    }
    for (int i = 0; i < STEADY; i++) {
        s[i].recv = p.d[i]->recv;
        s[i].count = ROUNDS;
        threads[2 + i] = test_start(run_listening, &s[i]);
    }
    for (int n = 0; n < ROUNDS; n++) {
        size_t reached;
        int result = netchan_broadcast(p.l, netchan_int(n), &reached, LONG);
        CHECK(result == NETCHAN_OK || result == NETCHAN_ELOST || result == NETCHAN_EUNKNOWN);
        CHECK(reached >= STEADY && reached <= STEADY + 2);
    }
    for (int i = 0; i < STEADY; i++) test_join(threads[2 + i]);
    for (int i = 0; i < 2; i++) {
        __atomic_store_n(&f[i].stop, true, __ATOMIC_RELEASE);
        test_join(threads[i]);
        CHECK(f[i].visits > 2);
    }
    for (size_t i = 0; i < p.count; i++) hang_up(p.d[i]);
    netchan_hangup(p.l, NULL);
    CHECK_INT(alloc_blocks(), 0);
}

/* Each loses its peer while the call waits: it is told, with how many have it. */
static void test_broadcast_to_a_peer_that_is_lost(void) {
    netchan_options o = options_for(0, SOON_LOST);
    shaky s;
    casting c;
    shaky_join(&s, &o, &o);
    netchan_link *d = dial_with(s.l->address, &o);
    start_broadcast(&c, s.l, netchan_int(5), NETCHAN_FOREVER);
    CHECK_INT(recv_int(d->recv), 5);
    CHECK(!is_cast(&c));
    proxy_break(&s.p);
    check_cast(&c, NETCHAN_ELOST, 1);
    hang_up(d);
    proxy_stop(&s.p);
    netchan_hangup(s.d, NULL);
    netchan_hangup(s.l, NULL);
    CHECK_INT(alloc_blocks(), 0);
}

/* --- a process between two links ---------------------------------------------------------------------------------- */

typedef struct forwarding {
    netchan *from, *to;
} forwarding;

static void *run_forwarding(void *arg) {
    forwarding *f = (forwarding *)arg;
    netchan_value v;
    while (netchan_recv(f->from, &v, LONG) == NETCHAN_OK) {
        bool last = netchan_is_nil(&v);
        CHECK_INT(netchan_send(f->to, v, LONG), NETCHAN_OK);
        netchan_clear(&v);
        if (last) break;
    }
    return NULL;
}

/* Each request is a number and where the answer goes; nil is the end. */
static void *run_doubling(void *arg) {
    netchan *requests = (netchan *)arg;
    netchan_value v;
    while (netchan_recv(requests, &v, LONG) == NETCHAN_OK && !netchan_is_nil(&v)) {
        int64_t n = netchan_as_int(netchan_at(&v, 0), -1);
        CHECK_INT(netchan_send(netchan_as_chan(netchan_at(&v, 1)), netchan_int(2 * n), LONG), NETCHAN_OK);
        netchan_clear(&v);
    }
    return NULL;
}

/* It dials one and listens to another. Values that it passes on hold reply channels, and the answers come over it
 * without its doing; and a name that it has imported it exports again. */
static void test_a_process_between_two_links(void) {
    for (int direction = 0; direction < 2; direction++) {
        pair near = join(2, 2), far = join(0, 0); /* near.d and far.l are the process in the middle, or the other two */
        way in = {near.d->send, near.l->recv}, out = {far.l->send, far.d->recv};
        if (direction) {
            way turned[2] = {{near.l->send, near.d->recv}, {far.d->send, far.l->recv}};
            in = turned[0];
            out = turned[1];
        }
        forwarding f = {in.recv, out.send};
        pthread_t middle = test_start(run_forwarding, &f), server = test_start(run_doubling, out.recv);
        netchan *reply = netchan_make(1);
        for (int i = 0; i < 100; i++) {
            netchan_value items[2] = {netchan_int(i), netchan_sender(reply)};
            CHECK_INT(netchan_send(in.send, netchan_array(items, 2), LONG), NETCHAN_OK);
            CHECK_INT(recv_int(reply), 2 * i);
        }
        CHECK_INT(netchan_send(in.send, netchan_nil(), LONG), NETCHAN_OK);
        test_join(middle);
        test_join(server);
        netchan_free(reply);
        netchan *jobs = netchan_make(0), *here, *there;
        netchan_link *a = direction ? near.l : near.d, *b = direction ? near.d : near.l;
        netchan_link *c = direction ? far.d : far.l, *d = direction ? far.l : far.d;
        CHECK_INT(netchan_export(a, "jobs", jobs, NETCHAN_RECEIVER), NETCHAN_OK);
        CHECK_INT(netchan_import(b, "jobs", NETCHAN_RECEIVER, &here, LONG), NETCHAN_OK);
        CHECK_INT(netchan_export(c, "work", here, NETCHAN_RECEIVER), NETCHAN_OK);
        CHECK_INT(netchan_export(c, "wrong", here, NETCHAN_SENDER), NETCHAN_EINVAL);
        CHECK_INT(netchan_import(d, "work", NETCHAN_RECEIVER, &there, LONG), NETCHAN_OK);
        netchan_free(here);
        for (int i = 0; i < 20; i++) exchange(jobs, there, i);
        task t;
        start_recv(&t, there, NETCHAN_FOREVER);
        wait_for_waiters(jobs, 1);
        CHECK_INT(netchan_unexport(a, "jobs"), NETCHAN_OK); /* who imported it from who had imported it */
        CHECK_INT(end_task(&t), NETCHAN_ELOST);
        CHECK_INT(netchan_recv(there, NULL, LONG), NETCHAN_ELOST);
        netchan_free(there);
        netchan_free(jobs);
        hang_up(near.d);
        hang_up(near.l);
        part(&far);
    }
}

/* --- names -------------------------------------------------------------------------------------------------------- */

typedef struct importing {
    netchan_link *link;
    const char *name;
    enum netchan_type end;
    int timeout_ms, result;
    netchan *ch;
    bool done; /* atomic */
    pthread_t thread;
} importing;

static void *run_import(void *arg) {
    importing *i = (importing *)arg;
    i->result = netchan_import(i->link, i->name, i->end, &i->ch, i->timeout_ms);
    __atomic_store_n(&i->done, true, __ATOMIC_RELEASE);
    return NULL;
}

static void start_import(importing *i, netchan_link *link, const char *name, enum netchan_type end, int timeout_ms) {
    memset(i, 0, sizeof *i);
    i->link = link;
    i->name = name;
    i->end = end;
    i->timeout_ms = timeout_ms;
    i->thread = test_start(run_import, i);
}

static bool is_imported(importing *i) {
    return __atomic_load_n(&i->done, __ATOMIC_ACQUIRE);
}

static netchan *end_import(importing *i) {
    test_join(i->thread);
    CHECK_INT(i->result, NETCHAN_OK);
    CHECK(i->ch);
    return i->ch;
}

static netchan *import(netchan_link *link, const char *name, enum netchan_type end) {
    netchan *ch;
    CHECK_INT(netchan_import(link, name, end, &ch, LONG), NETCHAN_OK);
    return ch;
}

static void check_import(netchan_link *link, const char *name, enum netchan_type end, int timeout_ms, int result) {
    netchan *ch = (netchan *)(void *)&ch;
    CHECK_INT(netchan_import(link, name, end, &ch, timeout_ms), result);
    CHECK(!ch);
}

/* Waits until the other side has asked so many names that do not stand yet. */
static void wait_for_questions(netchan_link *link, size_t count) {
    for (long long end = test_ms() + LONG;; sched_yield()) {
        size_t found = 0;
        pthread_mutex_lock(&netchan__net_lock);
        for (netchan__asked *a = ((netchan__hub *)(void *)link)->asked; a; a = a->next) found++;
        pthread_mutex_unlock(&netchan__net_lock);
        if (found == count) return;
        CHECK(test_ms() < end);
    }
}

/* Exported before it is imported, or after; by either side; for either direction. */
static void test_export_and_import(void) {
    pair p = join(0, 0);
    for (int k = 0; k < 16; k++) {
        netchan_link *a = k & 1 ? p.l : p.d, *b = k & 1 ? p.d : p.l;
        enum netchan_type end = k & 2 ? NETCHAN_SENDER : NETCHAN_RECEIVER;
        bool before = k & 4;
        size_t cap = k & 8 ? 2 : 0;
        netchan *ch = netchan_make(cap);
        importing i;
        if (before) CHECK_INT(netchan_export(a, "name", ch, end), NETCHAN_OK);
        start_import(&i, b, "name", end, k & 8 ? LONG : NETCHAN_FOREVER);
        if (!before) {
            wait_for_questions(a, 1);
            CHECK(!is_imported(&i));
            CHECK_INT(netchan_export(a, "name", ch, end), NETCHAN_OK);
        }
        netchan *imported = end_import(&i);
        wait_for_questions(a, 0);
        CHECK(imported != ch);
        CHECK_INT(netchan_cap(imported), cap);
        for (int n = 0; n < 10; n++) exchange(k & 2 ? imported : ch, k & 2 ? ch : imported, n);
        netchan_free(imported);
        imported = import(b, "name", end); /* and again */
        exchange(k & 2 ? imported : ch, k & 2 ? ch : imported, 99);
        netchan_free(imported);
        CHECK_INT(netchan_unexport(a, "name"), NETCHAN_OK);
        check_import(b, "name", end, NETCHAN_NOWAIT, NETCHAN_ETIMEDOUT);
        netchan_free(ch);
    }
    part(&p);
}

/* The name holds the channel, whoever else lets go of it. */
static void test_a_name_holds_its_channel(void) {
    for (int k = 0; k < 2; k++) {
        pair p = join(0, 0);
        netchan_link *a = k ? p.l : p.d, *b = k ? p.d : p.l;
        netchan *ch = netchan_make(2), *inner = netchan_make(0);
        CHECK_INT(netchan_send(ch, netchan_sender(inner), LONG), NETCHAN_OK);
        CHECK_INT(netchan_export(a, "held", ch, NETCHAN_RECEIVER), NETCHAN_OK);
        netchan_free(ch);
        netchan *got = import(b, "held", NETCHAN_RECEIVER), *end = recv_end(got);
        exchange(end, inner, 1);
        netchan_free(end);
        netchan_free(got);
        netchan_free(inner);
        part(&p); /* the name goes with its link */
    }
}

typedef struct taking {
    netchan *ch;
    uint8_t *seen; /* atomic */
    int count;
    pthread_t thread;
} taking;

static void *run_taking(void *arg) {
    taking *t = (taking *)arg;
    netchan_value v;
    int64_t last = -1;
    int result;
    for (; (result = netchan_recv(t->ch, &v, LONG)) == NETCHAN_OK; t->count++) {
        int64_t n = netchan_as_int(&v, -1);
        CHECK(n > last);
        CHECK_INT(__atomic_add_fetch(&t->seen[n], 1, __ATOMIC_RELAXED), 1);
        last = n;
    }
    CHECK_INT(result, NETCHAN_ECLOSED);
    return NULL;
}

/* Several import a receiver, one of them twice: each value goes to one of them. */
static void test_importers_compete(void) {
    enum { PEERS = 3, TAKERS = PEERS + 2, COUNT = 3000 / LESS };
    static uint8_t seen[COUNT];
    for (size_t cap = 0; cap < 9; cap += 8) {
        party p = make_party(PEERS, 0, 0);
        netchan *ch = netchan_make(cap);
        taking t[TAKERS];
        memset(seen, 0, sizeof seen);
        memset(t, 0, sizeof t);
        CHECK_INT(netchan_export(p.l, "jobs", ch, NETCHAN_RECEIVER), NETCHAN_OK);
        for (int i = 0; i < TAKERS - 1; i++) t[i].ch = import(p.d[i % PEERS], "jobs", NETCHAN_RECEIVER);
        CHECK(t[0].ch == t[PEERS].ch); /* the same end */
        t[TAKERS - 1].ch = netchan_retain(ch); /* and one of this process */
        for (int i = 0; i < TAKERS; i++) {
            t[i].seen = seen;
            t[i].thread = test_start(run_taking, &t[i]);
        }
        for (int n = 0; n < COUNT; n++) send_int(ch, n);
        CHECK_INT(netchan_close(ch), NETCHAN_OK);
        for (int i = 0; i < TAKERS; i++) {
            test_join(t[i].thread);
            netchan_free(t[i].ch);
            if (LESS == 1) CHECK(t[i].count > 0);
        }
        for (int n = 0; n < COUNT; n++) CHECK_INT(seen[n], 1);
        netchan_free(ch);
        end_party(&p);
    }
}

static void test_the_wrong_direction(void) {
    pair p = join(0, 0);
    for (int k = 0; k < 4; k++) {
        netchan_link *a = k & 1 ? p.l : p.d, *b = k & 1 ? p.d : p.l;
        enum netchan_type end = k & 2 ? NETCHAN_SENDER : NETCHAN_RECEIVER;
        enum netchan_type other = k & 2 ? NETCHAN_RECEIVER : NETCHAN_SENDER;
        netchan *ch = netchan_make(0);
        importing i;
        start_import(&i, b, "one way", other, LONG);
        wait_for_questions(a, 1);
        CHECK_INT(netchan_export(a, "one way", ch, end), NETCHAN_OK);
        test_join(i.thread);
        CHECK_INT(i.result, NETCHAN_ETYPE);
        CHECK(!i.ch);
        check_import(b, "one way", other, LONG, NETCHAN_ETYPE);
        check_says(netchan_errmsg(), "one way");
        check_import(b, "one way", other, NETCHAN_NOWAIT, NETCHAN_ETYPE);
        netchan_free(import(b, "one way", end));
        CHECK_INT(netchan_unexport(a, "one way"), NETCHAN_OK);
        netchan_free(ch);
    }
    part(&p);
}

static void test_a_name_that_nobody_exports(void) {
    pair p = join(0, 0);
    for (int k = 0; k < 2; k++) {
        netchan_link *a = k ? p.l : p.d, *b = k ? p.d : p.l;
        netchan *ch = netchan_make(0);
        long long start = test_ms();
        check_import(b, "none", NETCHAN_SENDER, NETCHAN_NOWAIT, NETCHAN_ETIMEDOUT);
        CHECK(test_ms() - start < LONG / 2);
        check_says(netchan_errmsg(), "none");
        start = test_ms();
        check_import(b, "none", NETCHAN_SENDER, SHORT, NETCHAN_ETIMEDOUT);
        CHECK(test_ms() - start >= SHORT - 1 && test_ms() - start < LONG / 2);
        CHECK_INT(netchan_export(a, "nonesuch", ch, NETCHAN_SENDER), NETCHAN_OK); /* another one */
        CHECK_INT(netchan_export(a, "non", ch, NETCHAN_SENDER), NETCHAN_OK);
        check_import(b, "none", NETCHAN_SENDER, NETCHAN_NOWAIT, NETCHAN_ETIMEDOUT);
        check_import(a, "nonesuch", NETCHAN_SENDER, NETCHAN_NOWAIT, NETCHAN_ETIMEDOUT); /* not its own names */
        wait_for_questions(a, 0); /* who gave up is forgotten */
        CHECK_INT(netchan_unexport(a, "nonesuch"), NETCHAN_OK);
        CHECK_INT(netchan_unexport(a, "non"), NETCHAN_OK);
        netchan_free(ch);
    }
    part(&p);
}

/* A name is taken back: those who imported by it are cut off, and nobody else. */
static void test_unexport(void) {
    pair p = join(0, 0);
    for (int k = 0; k < 8; k++) {
        netchan_link *a = k & 1 ? p.l : p.d, *b = k & 1 ? p.d : p.l;
        enum netchan_type type = k & 2 ? NETCHAN_SENDER : NETCHAN_RECEIVER;
        netchan *ch = netchan_make(k & 4 ? 1 : 0);
        netchan_value end = k & 2 ? netchan_sender(ch) : netchan_receiver(ch);
        CHECK_INT(netchan_export(a, "first", ch, type), NETCHAN_OK);
        CHECK_INT(netchan_export(a, "second", ch, type), NETCHAN_OK);
        netchan *first = import(b, "first", type), *second = import(b, "second", type);
        netchan *given = pass_end(way_of(&p, k & 1), end);
        CHECK(first != second && given != first && given != second);
        task t[3];
        int full = k & 2 && k & 4;
        if (full) send_int(ch, 0);
        for (int i = 0; i < 3; i++) {
            netchan *each = i == 0 ? first : i == 1 ? second : given;
            if (k & 2) start_send(&t[i], each, netchan_int(i + 1), i ? LONG : NETCHAN_FOREVER);
            else start_recv(&t[i], each, i ? LONG : NETCHAN_FOREVER);
            wait_for_waiters(ch, (size_t)i + 1);
        }
        CHECK_INT(netchan_unexport(a, "first"), NETCHAN_OK);
        CHECK_INT(end_task(&t[0]), NETCHAN_ELOST);
        CHECK_INT(k & 2 ? netchan_send(first, netchan_int(1), LONG) : netchan_recv(first, NULL, LONG), NETCHAN_ELOST);
        for (int i = 1; i < 3; i++) CHECK(!is_done(&t[i]));
        if (full) CHECK_INT(recv_int(ch), 0);
        for (int i = 1; i < 3; i++) {
            if (k & 2) CHECK_INT(recv_int(ch), i + 1);
            else send_int(ch, i);
        }
        for (int i = 1; i < 3; i++) CHECK_INT(end_task(&t[i]), NETCHAN_OK);
        check_import(b, "first", type, NETCHAN_NOWAIT, NETCHAN_ETIMEDOUT);
        CHECK_INT(netchan_unexport(a, "first"), NETCHAN_EINVAL);
        CHECK_INT(netchan_export(a, "first", ch, type), NETCHAN_OK); /* anew: old ends stay lost */
        netchan *again = import(b, "first", type);
        exchange(k & 2 ? again : ch, k & 2 ? ch : again, 5);
        CHECK_INT(k & 2 ? netchan_send(first, netchan_int(1), LONG) : netchan_recv(first, NULL, LONG), NETCHAN_ELOST);
        netchan_free(first);
        netchan_free(second);
        netchan_free(given);
        netchan_free(again);
        CHECK_INT(netchan_unexport(a, "first"), NETCHAN_OK);
        CHECK_INT(netchan_unexport(a, "second"), NETCHAN_OK);
        netchan_free(ch);
    }
    part(&p);
}

static void test_bad_names(void) {
    pair p = join(0, 0);
    char longest[256], too_long[257];
    netchan *ch = netchan_make(0), *got = ch;
    memset(longest, 'n', sizeof longest);
    memset(too_long, 'n', sizeof too_long);
    longest[255] = too_long[256] = '\0';
    const char *bad[3] = {NULL, "", too_long};
    for (int i = 0; i < 3; i++) {
        CHECK_INT(netchan_export(p.l, bad[i], ch, NETCHAN_SENDER), NETCHAN_EINVAL);
        check_says(netchan_errmsg(), "name");
        check_import(p.l, bad[i], NETCHAN_SENDER, LONG, NETCHAN_EINVAL);
        CHECK_INT(netchan_unexport(p.l, bad[i]), NETCHAN_EINVAL);
    }
    CHECK_INT(netchan_export(NULL, "a", ch, NETCHAN_SENDER), NETCHAN_EINVAL);
    CHECK_INT(netchan_export(p.l, "a", NULL, NETCHAN_SENDER), NETCHAN_EINVAL);
    CHECK_INT(netchan_export(p.l, "a", ch, NETCHAN_INT), NETCHAN_EINVAL);
    CHECK_INT(netchan_import(NULL, "a", NETCHAN_SENDER, &got, LONG), NETCHAN_EINVAL);
    CHECK(!got);
    CHECK_INT(netchan_import(p.l, "a", NETCHAN_SENDER, NULL, LONG), NETCHAN_EINVAL);
    check_import(p.l, "a", NETCHAN_NIL, LONG, NETCHAN_EINVAL);
    CHECK_INT(netchan_unexport(NULL, "a"), NETCHAN_EINVAL);
    CHECK_INT(netchan_unexport(p.l, "a"), NETCHAN_EINVAL);
    CHECK_INT(netchan_export(p.l, longest, ch, NETCHAN_SENDER), NETCHAN_OK);
    CHECK_INT(netchan_export(p.l, longest, ch, NETCHAN_SENDER), NETCHAN_EINVAL); /* it is taken, in either direction */
    CHECK_INT(netchan_export(p.l, longest, ch, NETCHAN_RECEIVER), NETCHAN_EINVAL);
    check_says(netchan_errmsg(), "taken");
    CHECK_INT(netchan_export(p.d, longest, ch, NETCHAN_RECEIVER), NETCHAN_OK); /* the other side has names of its own */
    netchan *end = import(p.d, longest, NETCHAN_SENDER);
    CHECK_INT(netchan_export(p.l, "turned", end, NETCHAN_RECEIVER), NETCHAN_EINVAL); /* an end has one direction */
    exchange(end, ch, 1);
    netchan_free(end);
    netchan_free(ch);
    part(&p);
}

static void test_a_thousand_names(void) {
    enum { COUNT = 1000 / LESS };
    pair p = join(0, 0);
    static netchan *ch[COUNT], *end[COUNT];
    char name[32];
    for (int side = 0; side < 2; side++) {
        netchan_link *a = side ? p.l : p.d, *b = side ? p.d : p.l;
        for (int i = 0; i < COUNT; i++) {
            snprintf(name, sizeof name, "channel %d", i);
            ch[i] = netchan_make(1);
            CHECK_INT(netchan_export(a, name, ch[i], i % 2 ? NETCHAN_SENDER : NETCHAN_RECEIVER), NETCHAN_OK);
        }
        for (int i = COUNT; i-- > 0;) {
            snprintf(name, sizeof name, "channel %d", i);
            end[i] = import(b, name, i % 2 ? NETCHAN_SENDER : NETCHAN_RECEIVER);
        }
        for (int i = 0; i < COUNT; i++) exchange(i % 2 ? end[i] : ch[i], i % 2 ? ch[i] : end[i], i);
        for (int i = 0; i < COUNT; i++) {
            snprintf(name, sizeof name, "channel %d", i);
            if (i % 3) CHECK_INT(netchan_unexport(a, name), NETCHAN_OK);
            netchan_free(end[i]);
            netchan_free(ch[i]);
        }
    }
    part(&p);
}

/* Imports wait through cuts; and what they got works through cuts, too. */
static void test_imports_wait_across_cuts(void) {
    for (int k = 0; k < 20 / (LESS == 1 ? 1 : 4); k++) {
        netchan_options o = options();
        shaky s;
        importing i;
        netchan *ch = netchan_make(0);
        shaky_join(&s, &o, &o);
        netchan_link *a = k & 1 ? s.l : s.d, *b = k & 1 ? s.d : s.l;
        proxy_cut_after(&s.p, k * 4);
        start_import(&i, b, "late", NETCHAN_SENDER, LONG);
        if (k % 4 < 2) wait_for_questions(a, 1);
        for (int n = 0; n < k % 3; n++) {
            proxy_cut(&s.p);
            check_works(s.l, s.d);
        }
        CHECK(!is_imported(&i));
        if (k & 2) proxy_cut_after(&s.p, k * 3);
        CHECK_INT(netchan_export(a, "late", ch, NETCHAN_SENDER), NETCHAN_OK);
        netchan *end = end_import(&i);
        proxy_cut(&s.p);
        for (int n = 0; n < 10; n++) exchange(end, ch, n);
        proxy_cut(&s.p);
        task t;
        start_send(&t, end, netchan_int(1), LONG);
        wait_for_waiters(ch, 1);
        CHECK_INT(netchan_unexport(a, "late"), NETCHAN_OK);
        proxy_cut(&s.p);
        CHECK_INT(end_task(&t), NETCHAN_ELOST);
        netchan_free(end);
        netchan_free(ch);
        shaky_part(&s);
    }
}

/* While the link is down NOWAIT knows nothing, and waits for nothing. */
static void test_imports_while_the_link_is_down(void) {
    netchan_options o = options();
    shaky s;
    netchan *ch = netchan_make(0);
    shaky_join(&s, &o, &o);
    CHECK_INT(netchan_export(s.l, "there", ch, NETCHAN_RECEIVER), NETCHAN_OK);
    CHECK_INT(netchan_export(s.d, "there", ch, NETCHAN_RECEIVER), NETCHAN_OK);
    proxy_break(&s.p);
    wait_peer(s.l, "down");
    wait_peer(s.d, "down");
    importing i[2];
    for (int k = 0; k < 2; k++) {
        netchan_link *b = k ? s.d : s.l;
        check_import(b, "there", NETCHAN_RECEIVER, NETCHAN_NOWAIT, NETCHAN_ETIMEDOUT);
        check_import(b, "there", NETCHAN_RECEIVER, SHORT, NETCHAN_ETIMEDOUT);
        start_import(&i[k], b, "there", NETCHAN_RECEIVER, LONG);
    }
    test_pause(SHORT);
    proxy_mend(&s.p);
    for (int k = 0; k < 2; k++) {
        netchan *end = end_import(&i[k]);
        exchange(ch, end, k);
        netchan_free(end);
    }
    netchan_free(ch);
    shaky_part(&s);
}

/* The session is lost, and who waits for a name gets it in the next. What was imported before stays lost. */
static void test_imports_in_the_next_session(void) {
    for (int k = 0; k < 2; k++) {
        netchan_options o = options_for(0, SOON_LOST);
        shaky s;
        importing i;
        netchan *ch = netchan_make(0), *old;
        shaky_join(&s, &o, &o);
        netchan_link *a = k ? s.l : s.d, *b = k ? s.d : s.l;
        CHECK_INT(netchan_export(a, "early", ch, NETCHAN_SENDER), NETCHAN_OK);
        old = import(b, "early", NETCHAN_SENDER);
        start_import(&i, b, "late", NETCHAN_SENDER, LONG);
        wait_for_questions(a, 1);
        proxy_break(&s.p);
        wait_peer(s.l, "lost");
        wait_peer(s.d, "lost");
        wait_for_questions(a, 0);
        CHECK_INT(netchan_send(old, netchan_int(1), LONG), NETCHAN_ELOST);
        CHECK(!is_imported(&i));
        proxy_mend(&s.p);
        wait_for_questions(a, 1);
        CHECK_INT(netchan_export(a, "late", ch, NETCHAN_SENDER), NETCHAN_OK);
        netchan *end = end_import(&i), *again = import(b, "early", NETCHAN_SENDER); /* names are the link's */
        exchange(end, ch, 1);
        exchange(again, ch, 2);
        CHECK_INT(netchan_send(old, netchan_int(1), NETCHAN_NOWAIT), NETCHAN_ELOST);
        netchan_free(end);
        netchan_free(again);
        netchan_free(old);
        netchan_free(ch);
        netchan_hangup(s.d, NULL);
        proxy_stop(&s.p);
        netchan_hangup(s.l, NULL);
        CHECK_INT(alloc_blocks(), 0);
    }
}

static void test_hangup_ends_imports(void) {
    enum { ROUNDS = 40, IMPORTERS = 16 }; /* not all of them leave before the call that hangs up has seen the end of all else */
    for (int k = 0; k < ROUNDS; k++) {
        pair p = join(0, 0);
        netchan_link *a = k & 1 ? p.l : p.d, *b = k & 1 ? p.d : p.l;
        importing i[IMPORTERS];
        for (int n = 0; n < IMPORTERS; n++)
            start_import(&i[n], b, "never", NETCHAN_RECEIVER, k & 2 ? LONG : NETCHAN_FOREVER);
        wait_for_questions(a, IMPORTERS);
        hang_up(b);
        for (int n = 0; n < IMPORTERS; n++) {
            test_join(i[n].thread);
            CHECK_INT(i[n].result, NETCHAN_ECLOSED);
            CHECK(!i[n].ch);
        }
        hang_up(a);
        CHECK_INT(alloc_blocks(), 0);
    }
}

/* The other side hangs up: names are still awaited, from who comes next; imported ends are at their end. */
static void test_the_exporter_hangs_up(void) {
    party p = make_party(1, 0, 0);
    netchan *ch = netchan_make(0);
    importing i;
    CHECK_INT(netchan_export(p.d[0], "first", ch, NETCHAN_RECEIVER), NETCHAN_OK);
    netchan *end = import(p.l, "first", NETCHAN_RECEIVER);
    task t;
    start_recv(&t, end, NETCHAN_FOREVER);
    wait_for_waiters(ch, 1);
    start_import(&i, p.l, "second", NETCHAN_RECEIVER, LONG);
    wait_for_questions(p.d[0], 1);
    hang_up(p.d[0]);
    p.d[0] = NULL;
    CHECK_INT(end_task(&t), NETCHAN_ELOST);
    CHECK_INT(netchan_recv(end, NULL, LONG), NETCHAN_ELOST);
    netchan_free(end);
    CHECK(!is_imported(&i));
    invite(&p, 1, 0);
    CHECK_INT(netchan_export(p.d[1], "second", ch, NETCHAN_RECEIVER), NETCHAN_OK);
    end = end_import(&i);
    exchange(ch, end, 4);
    netchan_free(end);
    netchan_free(ch);
    end_party(&p);
}

/* Listens where it is told, and gives out numbers by the name "numbers". */
static void run_exporter(int in, int out) {
    char text[128];
    netchan_options o = options();
    CHECK(read_line(in, text, sizeof text));
    netchan_link *l = netchan_listen(text, &o);
    if (!l) test_fail(__FILE__, __LINE__, "%s", netchan_errmsg());
    netchan *ch = netchan_make(0);
    CHECK_INT(netchan_export(l, "numbers", ch, NETCHAN_RECEIVER), NETCHAN_OK);
    write_line(out, l->address);
    for (int i = 0;; i++)
        if (netchan_send(ch, netchan_int(i), NETCHAN_FOREVER) != NETCHAN_OK) return;
}

/* The process that exports is killed, and another takes its place: what was imported is lost, and can be imported
 * again. */
static void test_the_exporter_is_killed(void) {
    child a = start_child(run_exporter), b = start_child(run_exporter);
    char address[64], again[64];
    netchan_options o = options_for(0, SOON_LOST);
    write_line(a.to, "127.0.0.1:0");
    CHECK(read_line(a.from, address, sizeof address));
    netchan_link *d = dial_with(address, &o);
    netchan *first = import(d, "numbers", NETCHAN_RECEIVER);
    importing i;
    task t;
    check_ints(first, 0, 50);
    start_import(&i, d, "unheard of", NETCHAN_RECEIVER, LONG);
    kill_child(&a);
    start_recv(&t, first, NETCHAN_FOREVER);
    CHECK_INT(end_task(&t), NETCHAN_ELOST);
    CHECK_INT(netchan_recv(first, NULL, LONG), NETCHAN_ELOST);
    write_line(b.to, address);
    CHECK(read_line(b.from, again, sizeof again));
    netchan *second = import(d, "numbers", NETCHAN_RECEIVER);
    CHECK(second != first);
    check_ints(second, 0, 50);
    CHECK_INT(netchan_recv(first, NULL, NETCHAN_NOWAIT), NETCHAN_ELOST);
    CHECK(!is_imported(&i));
    netchan_free(first);
    netchan_free(second);
    netchan_hangup(d, NULL);
    test_join(i.thread);
    CHECK_INT(i.result, NETCHAN_ECLOSED);
    kill_child(&b);
    CHECK_INT(alloc_blocks(), 0);
}

/* A listener asks all its peers: whoever has it first gives it. */
static void test_importing_from_whichever_peer_has_it(void) {
    enum { COUNT = 3 };
    party p = make_party(COUNT, 0, 0);
    netchan *ch = netchan_make(0), *other = netchan_make(0), *end;
    importing i;
    check_import(p.l, "it", NETCHAN_SENDER, NETCHAN_NOWAIT, NETCHAN_ETIMEDOUT);
    start_import(&i, p.l, "it", NETCHAN_SENDER, LONG);
    for (int k = 0; k < COUNT; k++) wait_for_questions(p.d[k], 1);
    CHECK_INT(netchan_export(p.d[0], "it", ch, NETCHAN_RECEIVER), NETCHAN_OK); /* that is not it */
    wait_for_questions(p.d[0], 0);
    test_pause(SHORT);
    CHECK(!is_imported(&i));
    CHECK_INT(netchan_export(p.d[2], "it", other, NETCHAN_SENDER), NETCHAN_OK);
    end = end_import(&i);
    exchange(end, other, 1);
    netchan_free(end);
    for (int k = 0; k < COUNT; k++) wait_for_questions(p.d[k], 0);
    end = NULL;
    CHECK_INT(netchan_import(p.l, "it", NETCHAN_SENDER, &end, NETCHAN_NOWAIT), NETCHAN_OK); /* one of them says yes */
    exchange(end, other, 2);
    netchan_free(end);
    start_import(&i, p.l, "later", NETCHAN_RECEIVER, LONG); /* one who comes later is asked as well */
    wait_for_questions(p.d[1], 1);
    invite(&p, 1, 0);
    CHECK_INT(netchan_export(p.d[COUNT], "later", ch, NETCHAN_RECEIVER), NETCHAN_OK);
    end = end_import(&i);
    exchange(ch, end, 3);
    netchan_free(end);
    netchan_free(ch);
    netchan_free(other);
    end_party(&p);
}

/* Many calls of both sides wait for the same names. */
static void test_many_import_at_the_same_time(void) {
    enum { COUNT = 16 };
    pair p = join(0, 0);
    importing i[COUNT];
    netchan *ch = netchan_make(0);
    for (int k = 0; k < COUNT; k++)
        start_import(&i[k], k % 4 == 3 ? p.l : p.d, k % 2 ? "odd" : "even", NETCHAN_SENDER,
                     k % 3 ? LONG : NETCHAN_FOREVER);
    wait_for_questions(p.l, COUNT / 4 * 3);
    wait_for_questions(p.d, COUNT / 4);
    CHECK_INT(netchan_export(p.l, "odd", ch, NETCHAN_SENDER), NETCHAN_OK);
    CHECK_INT(netchan_export(p.d, "odd", ch, NETCHAN_SENDER), NETCHAN_OK);
    CHECK_INT(netchan_export(p.l, "even", ch, NETCHAN_SENDER), NETCHAN_OK);
    for (int k = 0; k < COUNT; k++) {
        netchan *end = end_import(&i[k]);
        exchange(end, ch, k);
        netchan_free(end);
    }
    netchan_free(ch);
    part(&p);
}

static void test_many_imports_leave_memory_flat(void) {
    enum { ROUNDS = 10000 / LESS };
    pair p = join(0, 0);
    netchan *ch = netchan_make(1);
    long before = 0;
    CHECK_INT(netchan_export(p.l, "one", ch, NETCHAN_SENDER), NETCHAN_OK);
    CHECK_INT(netchan_export(p.d, "one", ch, NETCHAN_RECEIVER), NETCHAN_OK);
    for (int i = 0; i < ROUNDS; i++) {
        netchan *end = import(i % 2 ? p.l : p.d, "one", i % 2 ? NETCHAN_RECEIVER : NETCHAN_SENDER);
        if (i % 2) CHECK_INT(recv_int(end), i - 1);
        else send_int(end, i);
        netchan_free(end);
        if (i % 500 == 5) check_import(p.d, "none", NETCHAN_SENDER, NETCHAN_NOWAIT, NETCHAN_ETIMEDOUT);
        if (i == ROUNDS / 10) before = alloc_blocks();
        if (i > ROUNDS / 10) CHECK(alloc_blocks() < before + 50);
    }
    printf("%d imports: %ld blocks after a tenth of them, %ld at the end\n", ROUNDS, before, alloc_blocks());
    netchan_free(ch);
    part(&p);
}

int main(int argc, char **argv) {
    static const test_entry tests[] = {
        TEST(accept_shows_each_peer_once),
        TEST(values_from_before_accept),
        TEST(the_work_queue_is_not_for_an_accepted_peer),
        TEST(waiting_receives_move),
        TEST(accept_while_values_flow),
        TEST(a_peer_that_is_gone_before_it_was_accepted),
        TEST(accept_in_a_select),
        TEST(the_own_channels_are_dropped),
        TEST(accepted_peers_resume),
        TEST(an_accepted_peer_hangs_up),
        TEST(an_accepted_peer_is_lost),
        TEST(an_accepted_peer_closes),
        TEST(an_accept_loop_ends),
        TEST(own_channels_after_the_listener_hung_up),
        TEST(the_identity_of_a_pinned_peer),
        TEST(values_come_early),
        TEST(early_values_keep_their_order),
        TEST(early_values_and_who_gets_the_end),
        TEST(early_values_go_back),
        TEST(early_values_and_hangup),
        TEST(early_values_and_accept),
        TEST(sendto_reaches_one_peer),
        TEST(sendto_goes_first),
        TEST(sendto_before_accept),
        TEST(sendto_nobody),
        TEST(sendto_a_peer_that_goes),
        TEST(a_buffer_for_each_peer),
        TEST(sendto_from_a_dialler),
        TEST(recvfrom_tells_who_sent),
        TEST(broadcast_reaches_each_peer_once),
        TEST(broadcast_that_does_not_wait),
        TEST(a_slow_peer_holds_up_nobody),
        TEST(broadcast_and_buffers),
        TEST(broadcast_to_nobody),
        TEST(broadcast_of_a_large_value),
        TEST(broadcast_to_two_hundred),
        TEST(broadcast_while_peers_come_and_go),
        TEST(broadcast_to_a_peer_that_is_lost),
        TEST(a_process_between_two_links),
        TEST(export_and_import),
        TEST(a_name_holds_its_channel),
        TEST(importers_compete),
        TEST(the_wrong_direction),
        TEST(a_name_that_nobody_exports),
        TEST(unexport),
        TEST(bad_names),
        TEST(a_thousand_names),
        TEST(imports_wait_across_cuts),
        TEST(imports_while_the_link_is_down),
        TEST(imports_in_the_next_session),
        TEST(hangup_ends_imports),
        TEST(the_exporter_hangs_up),
        TEST(the_exporter_is_killed),
        TEST(importing_from_whichever_peer_has_it),
        TEST(many_import_at_the_same_time),
        TEST(many_imports_leave_memory_flat),
        TEST_END,
    };
    return test_main(argc, argv, tests);
}
