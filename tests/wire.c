/* What comes in from strangers and liars, and that the WIRE section at the top of netchan.h is complete: raw sockets
 * and raw TLS, with an encoder that was written from that text alone, against a listener and a dialler. A good peer of
 * the same listener must not notice. */
#include "alloc.h"
#define NETCHAN_WINDOW 100000
#define NETCHAN_EARLY_MS 250 /* a busy machine is to come in time */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"
#include "test.h"

#ifdef __SANITIZE_THREAD__
enum { LESS = 4 }; /* so many times less of what a test does often */
#else
enum { LESS = 1 };
#endif

enum {
    LONG = 20000, /* ms: a wait that a right implementation ends much sooner; it fails the test instead of hanging it */
    SHORT = 30,   /* ms: time for something wrong to happen */
    RESUME_MS = 300,
    WINDOW = NETCHAN_WINDOW
};

static const char KEY[] = "8f1c6d0b53a94e7720c1b7fd4a6e985f3d20e1b4c75a69887716253f4e0dac9b";
static const char OTHER_KEY[] = "0a9b8c7d6e5f4a3b2c1d0e9f8a7b6c5d4e3f2a1b0c9d8e7f6a5b4c3d2e1f0a9b";

#include "raw.h"

/* --- the listener and its good peer ------------------------------------------------------------------------------- */

typedef struct room {
    netchan_link *l, *good;
} room;

static netchan_options options(void) {
    netchan_options o;
    memset(&o, 0, sizeof o);
    o.shared_key = KEY;
    o.connect_ms = o.linger_ms = LONG;
    o.resume_ms = RESUME_MS;
    return o;
}

static room open_room_with(const netchan_options *o) {
    netchan_options mine = options();
    room m;
    m.l = netchan_listen("127.0.0.1:0", o);
    CHECK(m.l);
    m.good = netchan_dial(m.l->address, &mine);
    if (!m.good) test_fail(__FILE__, __LINE__, "%s", netchan_errmsg());
    return m;
}

static room open_room(void) {
    netchan_options o = options();
    return open_room_with(&o);
}

typedef struct task {
    netchan_case c[2];
    netchan_value got;
    size_t count;
    int timeout_ms, result;
    bool done; /* atomic */
    pthread_t thread;
} task;

static void *run_task(void *arg) {
    task *t = (task *)arg;
    t->result = netchan_select(t->c, t->count, t->timeout_ms);
    if (t->result >= 0) t->result = t->c[t->result].result;
    __atomic_store_n(&t->done, true, __ATOMIC_RELEASE);
    return NULL;
}

static void start_send(task *t, netchan *ch, netchan_value v, size_t cases, int timeout_ms) {
    memset(t, 0, sizeof *t);
    t->c[0] = netchan_case_send(ch, v);
    t->c[1] = netchan_case_recv(NULL, NULL);
    t->count = cases;
    t->timeout_ms = timeout_ms;
    t->thread = test_start(run_task, t);
}

static void start_recv(task *t, netchan *ch, size_t cases, int timeout_ms) {
    memset(t, 0, sizeof *t);
    t->c[0] = netchan_case_recv(ch, &t->got);
    t->c[1] = netchan_case_recv(NULL, NULL);
    t->count = cases;
    t->timeout_ms = timeout_ms;
    t->thread = test_start(run_task, t);
}

static int end_task(task *t) {
    test_join(t->thread);
    return t->result;
}

static void exchange(netchan *send, netchan *recv, int64_t n) {
    task t;
    start_recv(&t, recv, 1, LONG);
    CHECK_INT(netchan_send(send, netchan_int(n), LONG), NETCHAN_OK);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    CHECK_INT(netchan_as_int(&t.got, -1), n);
}

/* The good peer noticed nothing. */
static void check_good(room *m) {
    static int64_t n;
    exchange(m->good->send, m->l->recv, ++n);
    exchange(m->l->send, m->good->recv, ++n);
    for (netchan_value v; netchan_recv(m->good->events, &v, NETCHAN_NOWAIT) == NETCHAN_OK; netchan_clear(&v))
        CHECK_STR(netchan_as_str(netchan_get(&v, "event"), "?"), "up");
}

static void close_room(room *m) {
    CHECK_INT(netchan_hangup(m->good, NULL), NETCHAN_OK);
    CHECK_INT(netchan_hangup(m->l, NULL), NETCHAN_OK);
    CHECK_INT(alloc_blocks(), 0);
}

/* Waits for the next event of this name, whose reason has the word in it. */
static void wait_event(netchan_link *link, const char *name, const char *word) {
    for (bool found = false; !found;) {
        netchan_value v;
        CHECK_INT(netchan_recv(link->events, &v, LONG), NETCHAN_OK);
        found = strcmp(netchan_as_str(netchan_get(&v, "event"), ""), name) == 0;
        const char *reason = netchan_as_str(netchan_get(&v, "reason"), ""), *gone = "did not come back";
        if (strstr(reason, gone) && !strstr(gone, word)) found = false; /* somebody before */
        if (found && !strstr(reason, word)) test_fail(__FILE__, __LINE__, "no \"%s\" in \"%s\"", word, reason);
        netchan_clear(&v);
    }
}

static netchan__endpoint *endpoint_of(netchan_link *l) {
    return (netchan__endpoint *)(void *)l;
}

/* Looks inside: how many strangers are at the door. */
static size_t strangers(netchan_link *l) {
    pthread_mutex_lock(&netchan__net_lock);
    size_t count = endpoint_of(l)->strangers;
    pthread_mutex_unlock(&netchan__net_lock);
    return count;
}

static void wait_for_strangers(netchan_link *l, size_t count) {
    for (long long end = test_ms() + LONG; strangers(l) != count; sched_yield()) CHECK(test_ms() < end);
}

/* --- before TLS, and TLS itself ----------------------------------------------------------------------------------- */

static void test_no_tls_at_all(void) {
#define WORDS(text) {text, sizeof text - 1}
    static const struct {
        const char *text;
        size_t size;
    } words[] = {
        WORDS("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        WORDS("SSH-2.0-OpenSSH_9.9\r\n"),
        WORDS("\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        WORDS("\377\377\377\377\377\377\377\377\377\377\377\377"),
        WORDS("\26\3\1\377\377aaaaaaaaaaaaaaaaaaaaaaaaaaa"), /* a record of 65,535 bytes */
        WORDS("\26\3\1\0\0"),                                /* an empty one */
        WORDS("\26\3\1\0\4\1\377\377\377"),                 /* a ClientHello of 16 MiB */
        WORDS("\25\3\1\0\2\2\50"),                           /* an alert */
        WORDS("\27\3\3\0\5aaaaa"),                            /* application data */
        WORDS("\42\1netchan\1................\1\1\1\1\1"),  /* our own greeting, not encrypted */
    };
    room m = open_room();
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        raw *r = raw_connect(m.l->address);
        CHECK(raw_send(r, words[i].text, words[i].size));
        shutdown(r->fd, SHUT_WR); /* it may be waiting for the rest */
        raw_wait_closed(r);
        raw_close(r);
        wait_event(m.l, "rejected", "");
        check_good(&m);
    }
    close_room(&m);
}

static void test_noise(void) {
    room m = open_room();
    uint64_t seed = 9;
    for (int i = 0; i < 60 / LESS; i++) {
        raw *r = raw_connect(m.l->address);
        uint8_t noise[3000];
        size_t size = 1 + test_random(&seed) % sizeof noise;
        for (size_t k = 0; k < size; k++) noise[k] = (uint8_t)test_random(&seed);
        if (i % 2) memcpy(noise, "\26\3\1", size < 3 ? size : 3); /* looks like a handshake */
        raw_send(r, noise, size);
        shutdown(r->fd, SHUT_WR);
        raw_wait_closed(r);
        raw_close(r);
        wait_event(m.l, "rejected", "");
    }
    check_good(&m);
    close_room(&m);
}

static void test_connect_and_close(void) {
    room m = open_room();
    for (int i = 0; i < 100; i++) close(connect_to(m.l->address));
    for (int i = 0; i < 10; i++) { /* with a reset */
        struct linger now = {1, 0};
        int fd = connect_to(m.l->address);
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
        close(fd);
    }
    check_good(&m);
    wait_event(m.l, "rejected", "");
    wait_for_strangers(m.l, 0);
    check_good(&m);
    close_room(&m);
}

static void test_half_a_handshake(void) {
    room m = open_room();
    static const badge right;
    for (int i = 0; i < 3; i++) {
        raw *r = raw_connect(m.l->address);
        set_up_tls(r, &right, false);
        pthread_mutex_lock(&netchan__tls_lock);
        CHECK_INT(mbedtls_ssl_handshake(&r->ssl), MBEDTLS_ERR_SSL_WANT_READ); /* the ClientHello has left */
        pthread_mutex_unlock(&netchan__tls_lock);
        if (i) CHECK(wait_for_fd(r->fd, POLLIN)); /* it was answered */
        raw_close(r);
        wait_event(m.l, "rejected", "");
    }
    check_good(&m);
    close_room(&m);
}

static void test_the_silent_are_few_and_not_for_long(void) {
    enum { SILENT = 270, MOST = 128 };
    room m = open_room();
    static int fds[SILENT];
    for (int i = 0; i < SILENT; i++) fds[i] = connect_to(m.l->address);
    wait_event(m.l, "rejected", "in time"); /* who was silent longest gives way */
    wait_for_strangers(m.l, MOST);
    check_good(&m);
    netchan_options o = options();
    netchan_link *d = netchan_dial(m.l->address, &o);
    CHECK(d);
    for (int i = 0; i < SILENT / 2; i++) close(fds[i]);
    exchange(d->send, m.l->recv, 1);
    CHECK_INT(netchan_hangup(d, NULL), NETCHAN_OK);
    pthread_mutex_lock(&netchan__net_lock);
    for (netchan__conn *c = netchan__io.conns; c; c = c->next) /* their time is up: the test has not got it */
        if (c->state == NETCHAN__HANDSHAKING) {
            CHECK(c->deadline > netchan__now_ns() && c->deadline < netchan__now_ns() + 60000000000u);
            CHECK(c->alarm.at == c->deadline);
            c->deadline = 0;
            netchan__alarm_set(&c->alarm, 0);
        }
    netchan__net.wake = true;
    netchan__unlock_one(&netchan__net_lock);
    wait_for_strangers(m.l, 0);
    for (int i = SILENT / 2; i < SILENT; i++) {
        char byte;
        CHECK(wait_for_fd(fds[i], POLLIN));
        CHECK(recv(fds[i], &byte, 1, 0) <= 0);
        close(fds[i]);
    }
    for (size_t told = 1; told < SILENT;) { /* one event may tell of many */
        netchan_value v;
        CHECK_INT(netchan_recv(m.l->events, &v, LONG), NETCHAN_OK);
        if (strcmp(netchan_as_str(netchan_get(&v, "event"), ""), "rejected") == 0)
            told += (size_t)netchan_as_uint(netchan_get(&v, "count"), 1);
        netchan_clear(&v);
    }
    check_good(&m);
    close_room(&m);
}

static void test_max_peers(void) {
    netchan_options o = options(), mine = options();
    o.max_peers = 2;
    room m = open_room_with(&o);
    netchan_link *second = netchan_dial(m.l->address, &mine);
    CHECK(second);
    mine.connect_ms = 200;
    CHECK(!netchan_dial(m.l->address, &mine));
    wait_event(m.l, "rejected", "max_peers");
    check_good(&m);
    exchange(second->send, m.l->recv, 3);
    CHECK_INT(netchan_hangup(second, NULL), NETCHAN_OK);
    close_room(&m);
}

static void test_wrong_badges(void) {
    static const struct {
        badge b;
        const char *reason;
    } strangers_of[] = {
        {{OTHER_KEY, NULL, NULL, false, false}, "shared_key"},
        {{"", NULL, NULL, false, false}, "shared_key"},
        {{NULL, "somebody", NULL, false, false}, ""},
        {{NULL, NULL, NULL, false, true}, "shared_key"}, /* wants a certificate from us */
        {{NULL, NULL, "", false, false}, "netchan/1"},
        {{NULL, NULL, "http/1.1", false, false}, "netchan/1"},
        {{NULL, NULL, NULL, true, true}, "TLS 1.3"},
        {{NULL, NULL, NULL, true, false}, "TLS 1.3"},
    };
    room m = open_room();
    for (size_t i = 0; i < sizeof strangers_of / sizeof *strangers_of; i++) {
        raw *r = raw_connect(m.l->address);
        set_up_tls(r, &strangers_of[i].b, false);
        if (shake_hands(r) == 0) raw_wait_closed(r);
        raw_close(r);
        wait_event(m.l, "rejected", strangers_of[i].reason);
        check_good(&m);
    }
    close_room(&m);
}

/* --- right, and then lies ----------------------------------------------------------------------------------------- */

/* Says all of b after the greeting, or without one, and is thrown out for this reason. */
static void attack(room *m, bool greet, uint64_t capacity, const bytes *b, const char *event, const char *reason) {
    raw *r = greet ? raw_join(m->l->address, capacity) : raw_enter(m->l->address);
    raw_send(r, b->data, b->size);
    raw_wait_closed(r);
    raw_close(r);
    wait_event(m->l, event, reason);
    check_good(m);
}

static void test_lies_instead_of_a_greeting(void) {
    room m = open_room();
    for (int i = 0; i < 10; i++) {
        bytes b;
        greeting g = good_greeting();
        const char *reason = "greeting";
        b.size = 0;
        if (i == 0) PUT(&b, PING, 5);
        if (i == 1) PUT(&b, DEMAND, 1, 1, 1, FIRM, 0);
        if (i == 2) PUT(&b, BYE, 0);
        if (i == 3) PUT(&b, 0x70, 1, 2, 3);
        if (i == 4) g.magic = "metchan", put_greeting(&b, &g), reason = "version 1";
        if (i == 5) g.version = 2, put_greeting(&b, &g), reason = "version 1";
        if (i == 6) put_frame(&b, HELLO, NULL, 0, "netchan\1", 8), reason = "not whole";
        if (i == 7) PUT_TEXT(&b, "\0"), reason = "empty or too long";
        if (i == 8) PUT_TEXT(&b, "GET / HTTP/1.1\r\nUser-Agent: somebody who knows the key, but not what for\r\n\r\n");
        if (i == 9) PUT_TEXT(&b, "\377\377\377\377\377\377\377\377\377\377\377"), reason = "empty or too long";
        attack(&m, false, 0, &b, "rejected", reason);
    }
    close_room(&m);
}

static void test_lies_after_the_greeting(void) {
    room m = open_room();
    bytes b;
    greeting g = good_greeting();
#define ATTACK(reason) (attack(&m, true, 0, &b, "lost", reason), b.size = 0)
    b.size = 0;
    put_greeting(&b, &g), ATTACK("greeted twice");
    put_frame(&b, RESUME, NULL, 0, "................\7\0................................", 50), ATTACK("greeted twice");
    PUT(&b, ACK, 1), ATTACK("never sent");
    PUT(&b, ACK, UINT64_MAX), ATTACK("never sent");
    put_frame(&b, ACK, NULL, 0, NULL, 0), ATTACK("cut off");
    put_frame(&b, BYE, NULL, 0, NULL, 0), ATTACK("cut off");
    PUT_VALUE(&b, RETURN, "\5", 0, 1), ATTACK("returned");
    put_byte(&b, 0), ATTACK("empty or too long");
    PUT_TEXT(&b, "\200\200\1\377"), ATTACK("empty or too long");
    PUT_TEXT(&b, "\377\377\377\377\377\377\377\377\377\1\377"), ATTACK("empty or too long");
    PUT_TEXT(&b, "\200\200\200\200\200\200\200\200\200\200\200\200"), ATTACK("empty or too long");
    PUT(&b, OFFER, 0, 1), ATTACK("cut off");
    PUT(&b, GRANT, 5), ATTACK("cut off");
    put_frame(&b, DEMAND, NULL, 0, "\1\200\200", 3), ATTACK("cut off");
    PUT_VALUE(&b, DATA, "\5", 0), ATTACK("credit");
    PUT_VALUE(&b, DATA, "\5", 7), ATTACK("");
    PUT(&b, OFFER, 1, 1, 1, 0, 1), ATTACK("does not exist");
    PUT(&b, OFFER, 9, 1, 1, 0, 1), ATTACK("does not exist");
    PUT(&b, DEMAND, 0, 1, 1, 0, 0), ATTACK("does not exist");
    PUT(&b, DEMAND, 1, 1, 1, AHEAD, 0), ATTACK("ahead of receives");
    for (uint64_t i = 1; i <= 17; i++) PUT(&b, DEMAND, 1, i, i, FIRM | AHEAD, 0);
    ATTACK("ahead of receives");
    PUT(&b, OFFER, 0, 1, 1, 0, 1), PUT(&b, OFFER, 0, 1, 2, 0, 1), ATTACK("twice");
    PUT(&b, DEMAND, 1, 1, 1, MULTI, 0), PUT(&b, OFFER, 0, 1, 1, MULTI, 1), ATTACK("twice");
    PUT(&b, OFFER, 0, 1, 1, 0, UINT64_MAX), ATTACK("max_message");
    PUT_VALUE(&b, OFFER, "\5", 0, 1, 1, HERE, 5), ATTACK("malformed");
    PUT_VALUE(&b, OFFER, "\5\5", 0, 1, 1, HERE, 2), ATTACK("malformed");
    PUT_VALUE(&b, OFFER, "\206\11ab", 0, 1, 1, HERE, 4), ATTACK("malformed");
    PUT_VALUE(&b, OFFER, "\210\3\377\377\377", 0, 1, 1, HERE, 5), ATTACK("malformed");
    PUT_VALUE(&b, OFFER, "\211\6\1\3a\0b\5", 0, 1, 1, HERE, 8), ATTACK("malformed");  /* a NUL in a key */
    PUT_VALUE(&b, OFFER, "\213\3abc", 0, 1, 1, HERE, 5), ATTACK("malformed");        /* half an i32 */
    PUT(&b, GRANT, 77, 0), ATTACK("granted");
    PUT_VALUE(&b, GRANT, "\5", 77, 1), ATTACK("granted");
    PUT(&b, DECLINE, 77, 0), ATTACK("declined");
    PUT(&b, TAKEN, 77), ATTACK("took");
    PUT_VALUE(&b, FRAGMENT_UP, "bytes", 77), ATTACK("fragment");
    PUT_VALUE(&b, FRAGMENT_DOWN, "bytes", 77), ATTACK("fragment");
    PUT(&b, CLOSE, 1), ATTACK("closed");
    PUT(&b, CLOSE, 0), PUT(&b, CLOSE, 0), ATTACK("closed");
    PUT(&b, CREDIT, 0, 5, 0), ATTACK("capacity");
    PUT_VALUE(&b, COMMIT, "\5", 1, 1, 1, 1), ATTACK("committed");
    PUT(&b, RELEASE, 1, 1), ATTACK("released");
    PUT(&b, CLOSED, 1), ATTACK("closed");
    close_room(&m);
}

/* An array that holds an array that holds ... a 5. Returns its size. */
static size_t nest(uint8_t *out, size_t most, int depth) {
    uint8_t *end = out + most, *p = end;
    *--p = 5;
    for (int i = 0; i < depth; i++) {
        bytes head;
        head.size = 0;
        put_byte(&head, 0x88);
        put_number(&head, (uint64_t)(end - p) + 1);
        put_number(&head, 1);
        p -= head.size;
        memcpy(p, head.data, head.size);
    }
    memmove(out, p, (size_t)(end - p));
    return (size_t)(end - p);
}

static void test_nested_too_deep(void) {
    static const int depths[] = {65, 66, 1000, 3900};
    room m = open_room();
    uint8_t value[16000];
    static bytes b;
    for (size_t i = 0; i < sizeof depths / sizeof *depths; i++) {
        b.size = 0;
        size_t size = nest(value, sizeof value, depths[i]);
        put_frame(&b, OFFER, (uint64_t[]){0, 1, 1, HERE | FIRM, size}, 5, value, size);
        attack(&m, true, 0, &b, "lost", "malformed");
    }
    raw *r = raw_join(m.l->address, 0);
    frame f;
    b.size = 0;
    size_t size = nest(value, sizeof value, 64); /* as deep as allowed */
    put_frame(&b, OFFER, (uint64_t[]){0, 1, 1, HERE | FIRM, size}, 5, value, size);
    raw_say(r, &b);
    netchan_value v;
    CHECK_INT(netchan_recv(m.l->recv, &v, LONG), NETCHAN_OK);
    const netchan_value *inner = &v;
    for (int i = 0; i < 64; i++) inner = netchan_at(inner, 0);
    CHECK_INT(netchan_as_int(inner, -1), 5);
    netchan_clear(&v);
    EXPECT(r, &f, ACCEPT, 1, 0);
    raw_close(r);
    check_good(&m);
    close_room(&m);
}

/* Frames that end in the middle: with the connection, or inside TLS. */
static void test_frames_that_never_end(void) {
    room m = open_room();
    for (int i = 0; i < 4; i++) {
        raw *r = raw_join(m.l->address, 0);
        bytes b;
        b.size = 0;
        PUT_VALUE(&b, OFFER, "\105hello", 0, 1, 1, HERE | FIRM, 6);
        b.size -= (size_t)i + 1;
        CHECK(raw_send(r, b.data, b.size));
        if (i == 3) { /* half a record */
            r->tls = false;
            CHECK(raw_send(r, "\27\3\3\0\100aaaa", 9));
            r->tls = true;
        }
        raw_close(r);
        wait_event(m.l, "down", ""); /* closed, or reset */
        CHECK_INT(netchan_recv(m.l->recv, NULL, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
        check_good(&m);
    }
    raw *r = raw_join(m.l->address, 0); /* a record that was tampered with */
    r->tls = false;
    CHECK(raw_send(r, "\27\3\3\0\40aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", 37));
    r->tls = true;
    raw_wait_closed(r);
    raw_close(r);
    wait_event(m.l, "down", "");
    check_good(&m);
    close_room(&m);
}

/* What this version does not know is skipped, and the session goes on. */
static void test_the_unknown_is_skipped(void) {
    static const unsigned types[] = {0x00, 0x09, 0x0f, 0x1c, 0x1f, 0x2c, 0x2f, 0x40, 0x7f, 0x80, 0xff};
    room m = open_room();
    raw *r = raw_enter(m.l->address);
    greeting g = good_greeting();
    bytes b;
    b.size = 0;
    put_greeting(&b, &g);
    b.data[0] = (uint8_t)(b.data[0] + 4);
    PUT_TEXT(&b, "more"); /* fields of a later version */
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        PUT(&b, types[i], 1, 2, 3);
        put_frame(&b, types[i], NULL, 0, NULL, 0);
    }
    PUT(&b, PING, 5, 6, 7);  /* fields of a later version */
    PUT(&b, WITHDRAW, 5);    /* which may be over already */
    raw_say(r, &b);
    frame f;
    next_frame(r, &f, HELLO);
    CHECK_INT(f.type, HELLO);
    EXPECT(r, &f, PONG, 5);
    wait_acked(r, 2 * (sizeof types / sizeof *types) + 1); /* they are counted like others */
    check_quiet(r);
    raw_close(r);
    check_good(&m);
    close_room(&m);
}

/* What is written again would be shorter than was announced to others, who would get bytes that nobody wrote. */
static void test_long_forms(void) {
    static const struct {
        const char *text;
        size_t size;
    } values[] = {{"\206\0", 2},         {"\203\12", 2},          {"\210\2\0\0", 3},        {"\217\2\11\11", 4},
                  {"\204\200\0", 3},    {"\210\200\0", 3},      {"\207\201\0a", 4},      {"\210\7\2\217\3abc\5", 9},
                  {"\211\4\1\200\0\0", 6}};
    room m = open_room();
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        raw *r = raw_join(m.l->address, 0);
        bytes b;
        b.size = 0;
        const uint64_t offer[] = {0, 1, 1, HERE | FIRM, values[i].size};
        put_frame(&b, OFFER, offer, 5, values[i].text, values[i].size);
        raw_say(r, &b);
        wait_event(m.l, "lost", "value");
        raw_wait_closed(r);
        raw_close(r);
        check_good(&m);
    }
    close_room(&m);
}

/* A greeting full of large numbers makes nothing large here. */
static void test_a_boaster(void) {
    room m = open_room();
    greeting g = good_greeting();
    g.max_message = g.max_memory = g.max_ops = g.max_ends = g.ping_ms = g.capacity = UINT64_MAX;
    raw *r = raw_enter(m.l->address);
    CHECK(raw_greet(r, &g) > 0);
    check_good(&m);
    frame f;
    EXPECT(r, &f, CREDIT, 0);
    CHECK(get_number(&f) <= 10000);
    raw_close(r);
    wait_event(m.l, "down", "");
    check_good(&m);
    close_room(&m);
}

/* --- what a peer can make this process hold ----------------------------------------------------------------------- */

/* Sends values within credit until no more comes. Returns how many. */
static size_t flood(raw *r, const void *value, size_t size) {
    size_t credit = 0, sent = 0;
    static bytes b;
    for (;;) {
        frame f;
        for (int i = 0; i < 2; i++) { /* all that was said before has been worked off */
            uint64_t question = raw_ask(r);
            do {
                CHECK(raw_frame(r, &f));
                if (f.type == CREDIT) get_number(&f), credit += (size_t)get_number(&f);
            } while (f.type != PONG || get_number(&f) != question);
        }
        if (!credit) return sent;
        for (; credit; credit--, sent++) {
            b.size = 0;
            put_frame(&b, DATA, (uint64_t[]){0}, 1, value, size);
            raw_say(r, &b);
        }
        CHECK(sent < 100000);
    }
}

/* A peer may wish for any buffer; what it holds here stays within max_memory, also when the values swell in memory. */
static void test_a_buffer_is_bounded_in_bytes(void) {
    enum { SIZE = 16000, MEMORY = 8 << 20 };
    netchan_options o = options();
    o.max_message = 100000;
    o.max_memory = MEMORY;
    room m = open_room_with(&o);
    for (int nils = 0; nils < 2; nils++) {
        greeting g = good_greeting();
        g.capacity = 1000000;
        bytes value;
        value.size = 0;
        put_byte(&value, nils ? 0x88 : 0x87); /* an array of nils, or bytes */
        put_number(&value, SIZE + (nils ? 2 : 0));
        if (nils) put_number(&value, SIZE);
        for (int i = 0; i < SIZE; i++) put_byte(&value, 0x80);
        raw *r = raw_enter(m.l->address);
        CHECK_INT(raw_greet(r, &g), 1000000);
        /* What swells stays in its bytes until somebody receives it. */
        size_t sent = flood(r, value.data, value.size);
        CHECK(sent > 1);
        if (sent * SIZE > MEMORY) test_fail(__FILE__, __LINE__, "%zu values, which are %zu bytes", sent, sent * SIZE);
        exchange(m.l->send, m.good->recv, 5);
        netchan_value v; /* when they are taken, there is room for more */
        for (size_t i = 0; i < sent; i++) {
            CHECK_INT(netchan_recv(m.l->recv, &v, LONG), NETCHAN_OK);
            CHECK_INT(netchan_count(&v), SIZE);
            netchan_clear(&v);
        }
        CHECK(flood(r, value.data, value.size) > 1);
        raw_close(r);
        while (netchan_recv(m.l->recv, &v, SHORT) == NETCHAN_OK) netchan_clear(&v);
        check_good(&m);
    }
    close_room(&m);
}

static void test_operations_are_bounded(void) {
    netchan_options o = options();
    o.max_ops = 5;
    room m = open_room_with(&o);
    bytes b;
    b.size = 0;
    for (uint64_t i = 1; i <= 6; i++) PUT(&b, DEMAND, 1, i, i, MULTI, 0);
    attack(&m, true, 0, &b, "lost", "max_ops");
    close_room(&m);
}

static void test_large_values_are_bounded(void) {
    netchan_options o = options();
    o.max_message = 100000;
    room m = open_room_with(&o);
    bytes b;
    b.size = 0;
    PUT(&b, OFFER, 0, 1, 1, 0, 100001);
    attack(&m, true, 0, &b, "lost", "max_message");
    b.size = 0;
    /* A value that comes within credit is within max_message, too. */
    netchan_options small = options();
    small.max_message = 1000;
    netchan_link *l = netchan_listen("127.0.0.1:0", &small);
    CHECK(l);
    raw *r = raw_join(l->address, 4);
    static uint8_t value[2003] = {0x87, 0xd0, 0x0f};
    put_frame(&b, DATA, (uint64_t[]){0}, 1, value, sizeof value);
    raw_say(r, &b);
    raw_wait_closed(r);
    raw_close(r);
    wait_event(l, "lost", "max_message");
    CHECK_INT(netchan_recv(l->recv, NULL, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    CHECK_INT(netchan_hangup(l, NULL), NETCHAN_OK);
    check_good(&m);
    close_room(&m);
}

/* Values that were offered, and never come: who waits to receive does not wait for them for ever, nor do the others. */
static void test_an_offer_that_is_not_kept(void) {
    netchan_options o = options();
    o.ping_ms = 200;
    room m = open_room_with(&o);
    raw *r = raw_join(m.l->address, 0);
    bytes b;
    frame f;
    task t;
    b.size = 0;
    PUT(&b, OFFER, 0, 1, 1, 0, 3);
    raw_say(r, &b);
    start_recv(&t, m.l->recv, 1, LONG);
    EXPECT(r, &f, CLAIM, 1);
    long long end = test_ms() + LONG;
    do { /* it lives, it answers, but not that */
        CHECK(test_ms() < end);
        b.size = 0;
        PUT(&b, PONG, 1);
    } while (raw_send(r, b.data, b.size) && raw_frame(r, &f));
    raw_close(r);
    wait_event(m.l, "lost", "does not answer");
    CHECK_INT(netchan_send(m.good->send, netchan_int(5), LONG), NETCHAN_OK);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    CHECK_INT(netchan_as_int(&t.got, -1), 5);
    check_good(&m);
    close_room(&m);
}

/* --- the WIRE section, from its text alone ------------------------------------------------------------------------ */

/* The first two frames, byte by byte. */
static void test_golden_bytes(void) {
    static const uint8_t hello[] = {
        0x26, 0x01,                                     /* LENGTH 38, HELLO */
        'n',  'e',  't',  'c',  'h',  'a',  'n',  0x01, /* version 1 */
        0xa0, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0xa9, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf, /* process id */
        0x80, 0x80, 0x40,                               /* max_message 1 MiB */
        0x80, 0x80, 0x80, 0x01,                         /* max_memory 2 MiB */
        0x64,                                           /* max_ops 100 */
        0x90, 0x4e,                                     /* max_ends 10000 */
        0x88, 0x27,                                     /* ping_ms 5000 */
        0x00,                                           /* capacity 0 */
    };
    static const uint8_t offer[] = {
        0x14, 0x10,       /* LENGTH 20, OFFER */
        0x00,             /* channel 0 */
        0xac, 0x02,       /* entry 300 */
        0x07,             /* op 7 */
        0x0c,             /* flags: firm, and the value is here */
        0x0d,             /* size 13 */
        0x89, 0x0b, 0x02, /* a map, LEN 11, of 2 entries */
        0x02, 'i', 'd',   /* "id": */
        0x83, 0xd7, 0x04, /* -300 */
        0x02, 'o', 'k',   /* "ok": */
        0x82,             /* true */
    };
    static const uint8_t accept[] = {0xac, 0x02, 0x00}; /* entry 300, OK */
    room m = open_room();
    for (int piecewise = 0; piecewise < 2; piecewise++) {
        raw *r = raw_enter(m.l->address);
        frame f;
        uint8_t all[sizeof hello + sizeof offer];
        memcpy(all, hello, sizeof hello);
        memcpy(all + sizeof hello, offer, sizeof offer);
        size_t step = piecewise ? 1 : sizeof all;
        for (size_t i = 0; i < sizeof all; i += step) CHECK(raw_send(r, all + i, step));
        netchan_value v;
        CHECK_INT(netchan_recv(m.l->recv, &v, LONG), NETCHAN_OK);
        CHECK_INT(netchan_count(&v), 2);
        CHECK_INT(netchan_as_int(netchan_get(&v, "id"), 0), -300);
        CHECK(netchan_as_bool(netchan_get(&v, "ok"), false));
        netchan_clear(&v);
        next_frame(r, &f, HELLO);
        CHECK_INT(f.type, HELLO);
        next_frame(r, &f, ACCEPT);
        CHECK_INT(f.type, ACCEPT);
        check_rest(&f, accept, sizeof accept);
        raw_close(r);
        wait_event(m.l, "down", "");
    }
    close_room(&m);
}

/* A raw peer whose operations come before all of ours: its process id is the smallest. */
static raw *raw_join_first(const char *address) {
    greeting g = good_greeting();
    g.process = 0;
    raw *r = raw_enter(address);
    CHECK_INT(raw_greet(r, &g), 0);
    return r;
}

static void check_hello(task *t) {
    CHECK_INT(end_task(t), NETCHAN_OK);
    CHECK_STR(netchan_as_str(&t->got, "?"), "hello");
    netchan_clear(&t->got);
}

static void test_offers(void) {
    room m = open_room();
    raw *r = raw_join_first(m.l->address);
    bytes b;
    frame f;
    task t;
    b.size = 0;

    PUT_VALUE(&b, OFFER, "\105hello", 0, 1, 1, TRY | HERE, 6); /* nobody is there */
    PUT(&b, OFFER, 0, 2, 2, TRY | MULTI, 6);
    raw_say(r, &b);
    EXPECT(r, &f, WITHDRAWN, 1);
    EXPECT(r, &f, WITHDRAWN, 2);

    PUT_VALUE(&b, OFFER, "\105hello", 0, 3, 3, FIRM | HERE, 6); /* the value is over there and waits */
    raw_say(r, &b);
    check_quiet(r);
    start_recv(&t, m.l->recv, 1, LONG);
    check_hello(&t);
    EXPECT(r, &f, ACCEPT, 3, 0);

    PUT(&b, OFFER, 0, 4, 4, 0, 6); /* it stays here until it is claimed */
    raw_say(r, &b);
    check_quiet(r);
    start_recv(&t, m.l->recv, 1, LONG);
    EXPECT(r, &f, CLAIM, 4);
    uint64_t match = get_number(&f);
    CHECK_INT(get_number(&f), FINAL);
    PUT_VALUE(&b, GRANT, "\105hello", match, 6);
    raw_say(r, &b);
    check_hello(&t);
    EXPECT(r, &f, ACCEPT, 4, 0);

    PUT(&b, OFFER, 0, 5, 5, 0, 6); /* claimed too late: who asked waits on, and is served by another */
    raw_say(r, &b);
    start_recv(&t, m.l->recv, 1, LONG);
    EXPECT(r, &f, CLAIM, 5);
    match = get_number(&f);
    PUT(&b, DECLINE, match, 0);
    raw_say(r, &b);
    CHECK_INT(netchan_send(m.good->send, netchan_str("hello"), LONG), NETCHAN_OK);
    check_hello(&t);

    PUT(&b, OFFER, 0, 6, 6, 0, 6); /* withdrawn while nobody wants it */
    PUT(&b, WITHDRAW, 6);
    raw_say(r, &b);
    check_quiet(r);
    CHECK_INT(netchan_recv(m.l->recv, NULL, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);

    PUT(&b, OFFER, 0, 7, 7, MULTI, 6); /* a select here and there: we are asked first, and released if that is over */
    raw_say(r, &b);
    start_recv(&t, m.l->recv, 2, SHORT);
    CHECK_INT(end_task(&t), NETCHAN_ETIMEDOUT);
    EXPECT(r, &f, CLAIM, 7);
    match = get_number(&f);
    CHECK_INT(get_number(&f), 0);
    PUT_VALUE(&b, GRANT, "\105hello", match, 6);
    raw_say(r, &b);
    EXPECT(r, &f, RELEASE, 7, match);
    start_recv(&t, m.l->recv, 2, LONG); /* it waits again */
    EXPECT(r, &f, CLAIM, 7);
    CHECK(get_number(&f) != match);
    f.at = 1;
    match = get_number(&f);
    PUT_VALUE(&b, GRANT, "\105hello", match, 6);
    raw_say(r, &b);
    check_hello(&t);
    EXPECT(r, &f, ACCEPT, 7, 0);

    check_quiet(r);
    raw_close(r);
    close_room(&m);
}

static void test_demands(void) {
    room m = open_room();
    raw *r = raw_join_first(m.l->address);
    bytes b;
    frame f;
    task t, other;
    b.size = 0;

    PUT(&b, DEMAND, 1, 1, 1, TRY, 0); /* nobody is there */
    raw_say(r, &b);
    EXPECT(r, &f, WITHDRAWN, 1);

    for (uint64_t i = 2; i < 6; i++) { /* one case here or there: the value comes with the claim */
        PUT(&b, DEMAND, 1, i, i, i % 2 ? FIRM : 0, 0);
        raw_say(r, &b);
        start_send(&t, m.l->send, netchan_str("hello"), 1 + i / 4, i < 3 ? LONG : NETCHAN_FOREVER);
        EXPECT(r, &f, CLAIM, i);
        uint64_t match = get_number(&f);
        CHECK_INT(get_number(&f), FINAL);
        CHECK_INT(get_number(&f), 6);
        check_rest(&f, "\105hello", 6);
        PUT(&b, GRANT, match, 0);
        raw_say(r, &b);
        CHECK_INT(end_task(&t), NETCHAN_OK);
    }

    PUT(&b, DEMAND, 1, 6, 6, MULTI, 0); /* a select here and there: ours is locked first, then the value is committed */
    raw_say(r, &b);
    start_send(&t, m.l->send, netchan_str("hello"), 2, LONG);
    EXPECT(r, &f, CLAIM, 6);
    uint64_t match = get_number(&f);
    CHECK_INT(get_number(&f), 0);
    CHECK_INT(get_number(&f), 6); /* of the value that we would get */
    CHECK_INT(f.at, f.size);
    PUT(&b, GRANT, match, 0);
    raw_say(r, &b);
    EXPECT(r, &f, COMMIT, 6, match, 0, 6);
    check_rest(&f, "\105hello", 6);
    PUT(&b, TAKEN, match);
    raw_say(r, &b);
    CHECK_INT(end_task(&t), NETCHAN_OK);

    PUT(&b, DEMAND, 1, 7, 7, MULTI, 0); /* the other select is over when ours is locked */
    raw_say(r, &b);
    check_quiet(r);
    start_send(&t, m.l->send, netchan_str("hello"), 2, SHORT);
    CHECK_INT(end_task(&t), NETCHAN_ETIMEDOUT);
    EXPECT(r, &f, CLAIM, 7);
    match = get_number(&f);
    PUT(&b, GRANT, match, 0);
    raw_say(r, &b);
    EXPECT(r, &f, RELEASE, 7, match);
    PUT(&b, WITHDRAW, 7);
    raw_say(r, &b);
    check_quiet(r);

    PUT(&b, DEMAND, 1, 8, 8, 0, 0); /* withdrawn when the claim is on its way: somebody else gets it */
    raw_say(r, &b);
    check_quiet(r);
    start_send(&t, m.l->send, netchan_str("hello"), 1, LONG);
    EXPECT(r, &f, CLAIM, 8);
    match = get_number(&f);
    start_recv(&other, m.good->recv, 1, LONG);
    PUT(&b, WITHDRAW, 8);
    PUT(&b, DECLINE, match, 0);
    raw_say(r, &b);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    check_hello(&other);

    PUT(&b, DEMAND, 1, 9, 9, FIRM, 0);
    raw_say(r, &b);
    check_quiet(r);
    CHECK_INT(netchan_close(m.l->send), NETCHAN_OK);
    EXPECT(r, &f, CLOSED, 1);
    check_quiet(r);
    raw_close(r);
    close_room(&m);
}

/* A claim that carries a number. Returns the match. */
static uint64_t expect_number(raw *r, uint64_t entry, int number) {
    frame f;
    EXPECT(r, &f, CLAIM, entry);
    uint64_t match = get_number(&f);
    CHECK_INT(get_number(&f) & FINAL, FINAL);
    CHECK_INT(get_number(&f), 1);
    uint8_t value = (uint8_t)number;
    check_rest(&f, &value, 1);
    return match;
}

/* Asks for so many values ahead of receives: entries 1, 2, ... */
static void ask_ahead(raw *r, uint64_t count) {
    bytes b;
    b.size = 0;
    for (uint64_t i = 1; i <= count; i++) PUT(&b, DEMAND, 1, i, i, FIRM | AHEAD, 0);
    raw_say(r, &b);
    check_quiet(r);
}

/* A listener's side of values that come before their receives: receives are served first; only what lies in a buffer,
 * is small and holds no ends comes early; and what is given back comes again, in its old place. */
static void test_values_ahead_of_receives(void) {
    netchan_options o = options();
    o.buffer = 8;
    room m = open_room_with(&o);
    raw *r = raw_join_first(m.l->address);
    bytes b;
    frame f;
    b.size = 0;
    ask_ahead(r, 3);
    PUT(&b, DEMAND, 1, 4, 4, FIRM, 0);
    raw_say(r, &b);
    check_quiet(r);
    for (int i = 1; i <= 5; i++) CHECK_INT(netchan_send(m.l->send, netchan_int(i), LONG), NETCHAN_OK);
    uint64_t receive = expect_number(r, 4, 1), m2 = expect_number(r, 1, 2), m3 = expect_number(r, 2, 3);
    uint64_t m4 = expect_number(r, 3, 4);
    check_quiet(r);
    CHECK_INT(netchan_len(m.l->send), 5); /* none is taken */
    PUT(&b, GRANT, receive, 0);
    PUT(&b, GRANT, m2, 1); /* and another, please */
    raw_say(r, &b);
    uint64_t m5 = expect_number(r, 1, 5);
    CHECK_INT(netchan_len(m.l->send), 3);

    PUT(&b, DECLINE, m4, 0); /* back to its place, and to the receive that comes */
    PUT(&b, DECLINE, m3, 0);
    PUT(&b, DEMAND, 1, 5, 5, FIRM, 0);
    raw_say(r, &b);
    receive = expect_number(r, 5, 3);
    PUT(&b, GRANT, receive, 0);
    PUT(&b, GRANT, m5, 0); /* no other */
    PUT(&b, DEMAND, 1, 6, 6, FIRM | AHEAD, 0);
    raw_say(r, &b);
    m4 = expect_number(r, 6, 4);
    PUT(&b, DEMAND, 1, 9, 9, FIRM | AHEAD, 0); /* given up, which is answered */
    PUT(&b, WITHDRAW, 9);
    raw_say(r, &b);
    EXPECT(r, &f, WITHDRAWN, 9);
    PUT(&b, GRANT, m4, 1);
    raw_say(r, &b);

    uint8_t large[2000] = {0};
    CHECK_INT(netchan_send(m.l->send, netchan_bytes(large, sizeof large), LONG), NETCHAN_OK);
    CHECK_INT(netchan_send(m.l->send, netchan_int(6), LONG), NETCHAN_OK);
    check_quiet(r);
    PUT(&b, DEMAND, 1, 7, 7, FIRM, 0);
    raw_say(r, &b);
    EXPECT(r, &f, CLAIM, 7);
    PUT(&b, GRANT, get_number(&f), 0);
    raw_say(r, &b);
    PUT(&b, GRANT, expect_number(r, 6, 6), 1);
    raw_say(r, &b);
    netchan *end = netchan_make(0);
    CHECK_INT(netchan_send(m.l->send, netchan_sender(end), LONG), NETCHAN_OK);
    check_quiet(r);
    PUT(&b, DEMAND, 1, 8, 8, FIRM, 0);
    raw_say(r, &b);
    EXPECT(r, &f, CLAIM, 8);
    PUT(&b, GRANT, get_number(&f), 0);
    raw_say(r, &b);
    netchan_free(end);
    CHECK_INT(netchan_close(m.l->send), NETCHAN_OK);
    EXPECT(r, &f, CLOSED, 1);
    check_quiet(r);
    raw_close(r);
    close_room(&m);

    static const uint64_t flags[] = {FIRM, FIRM | AHEAD};
    for (int ahead = 0; ahead < 2; ahead++) { /* only who waits ahead may wait again so */
        m = open_room_with(&o);
        r = raw_join_first(m.l->address);
        PUT(&b, DEMAND, 1, 1, 1, flags[ahead], 0);
        raw_say(r, &b);
        CHECK_INT(netchan_send(m.l->send, netchan_int(1), LONG), NETCHAN_OK);
        PUT(&b, GRANT, expect_number(r, 1, 1), 1);
        raw_say(r, &b);
        if (ahead) check_quiet(r);
        else raw_wait_closed(r);
        raw_close(r);
        if (!ahead) wait_event(m.l, "lost", "granted what was not claimed");
        netchan_value v;
        if (!ahead) CHECK_INT(netchan_recv(m.good->recv, &v, LONG), NETCHAN_OK); /* nobody knows whether it was taken */
        close_room(&m);
    }

    o.no_redelivery = true; /* nothing comes early: of what a peer had when it died nobody would know the fate */
    m = open_room_with(&o);
    r = raw_join_first(m.l->address);
    ask_ahead(r, 1);
    CHECK_INT(netchan_send(m.l->send, netchan_int(1), LONG), NETCHAN_OK);
    check_quiet(r);
    PUT(&b, DEMAND, 1, 2, 2, FIRM, 0);
    raw_say(r, &b);
    PUT(&b, GRANT, expect_number(r, 2, 1), 0);
    raw_say(r, &b);
    check_quiet(r);
    raw_close(r);
    close_room(&m);
}

/* What was given up and not answered yet is no operation of the peer: it may have as many as always. */
static void test_rooms_that_were_given_up(void) {
    enum { MOST = 16 };
    netchan_options o = options();
    o.buffer = MOST;
    o.max_ops = 1;
    room m = open_room_with(&o);
    raw *r = raw_join_first(m.l->address);
    bytes b;
    frame f;
    b.size = 0;
    ask_ahead(r, MOST);
    for (int i = 1; i <= MOST; i++) CHECK_INT(netchan_send(m.l->send, netchan_int(i), LONG), NETCHAN_OK);
    uint64_t match[MOST];
    for (int i = 0; i < MOST; i++) match[i] = expect_number(r, (uint64_t)i + 1, i + 1);
    for (uint64_t i = 1; i <= MOST; i++) PUT(&b, WITHDRAW, i);
    for (uint64_t i = 1; i <= MOST; i++) PUT(&b, DEMAND, 1, 100 + i, i, FIRM | AHEAD, 0);
    PUT(&b, DEMAND, 1, 99, 99, FIRM, 0);
    raw_say(r, &b);
    for (uint64_t i = 1; i <= MOST; i++) EXPECT(r, &f, WITHDRAWN, i);
    PUT(&b, DECLINE, match[0], 0);
    raw_say(r, &b);
    match[0] = expect_number(r, 99, 1);
    for (int i = 0; i < MOST; i++) PUT(&b, GRANT, match[i], 0);
    raw_say(r, &b);
    check_quiet(r);
    raw_close(r);
    close_room(&m);
}

/* Whom the next event is about. */
static netchan_peer next_peer(netchan_link *l) {
    netchan_value v;
    netchan_peer peer;
    CHECK_INT(netchan_recv(l->events, &v, LONG), NETCHAN_OK);
    peer.id = netchan_as_uint(netchan_get(&v, "peer"), 0);
    netchan_clear(&v);
    return peer;
}

/* A receive that may end without a value holds up those behind its own until it is granted. What became free with the
 * same record goes early before it; and what is for this peer alone goes before what is for anybody. */
static void test_early_values_before_a_receive(void) {
    netchan_options o = options();
    o.buffer = 8;
    netchan_link *l = netchan_listen("127.0.0.1:0", &o);
    CHECK(l);
    raw *r = raw_join_first(l->address);
    bytes b;
    b.size = 0;
    netchan_peer peer = next_peer(l);
    ask_ahead(r, 1);
    for (int i = 1; i <= 3; i++) CHECK_INT(netchan_send(l->send, netchan_int(i), LONG), NETCHAN_OK);
    PUT(&b, GRANT, expect_number(r, 1, 1), 1);
    PUT(&b, DEMAND, 1, 2, 2, 0, 0);
    raw_say(r, &b);
    uint64_t early = expect_number(r, 1, 2);
    PUT(&b, GRANT, expect_number(r, 2, 3), 0);
    raw_say(r, &b);
    CHECK_INT(netchan_send(l->send, netchan_int(4), LONG), NETCHAN_OK);
    CHECK_INT(netchan_sendto(l, peer, netchan_int(9), LONG), NETCHAN_OK);
    check_quiet(r);
    PUT(&b, GRANT, early, 1);
    PUT(&b, DEMAND, 1, 3, 3, 0, 0);
    raw_say(r, &b);
    PUT(&b, GRANT, expect_number(r, 1, 9), 0);
    PUT(&b, GRANT, expect_number(r, 3, 4), 0);
    raw_say(r, &b);
    check_quiet(r);
    raw_close(r);
    CHECK_INT(netchan_hangup(l, NULL), NETCHAN_OK);
    CHECK_INT(alloc_blocks(), 0);
}

/* Values for one peer alone come early before those for anybody, and are accounted for when it is lost. */
static void test_early_values_for_one_peer(void) {
    enum { COUNT = 5 };
    netchan_options o = options();
    o.buffer = COUNT;
    netchan_link *l = netchan_listen("127.0.0.1:0", &o);
    CHECK(l);
    raw *r = raw_join_first(l->address);
    bytes b;
    netchan_report report;
    b.size = 0;
    netchan_peer peer = next_peer(l);
    PUT(&b, DEMAND, 1, 99, 99, FIRM | AHEAD, 0);
    raw_say(r, &b);
    for (int i = 1; i <= 2; i++) CHECK_INT(netchan_send(l->send, netchan_int(i), LONG), NETCHAN_OK);
    uint64_t match = expect_number(r, 99, 1);
    CHECK_INT(netchan_sendto(l, peer, netchan_int(9), LONG), NETCHAN_OK);
    PUT(&b, GRANT, match, 1);
    raw_say(r, &b);
    PUT(&b, GRANT, expect_number(r, 99, 9), 1); /* before what is for anybody */
    raw_say(r, &b);
    PUT(&b, GRANT, expect_number(r, 99, 2), 0);
    raw_say(r, &b);
    ask_ahead(r, COUNT - 1);
    for (int i = 1; i <= COUNT; i++) CHECK_INT(netchan_sendto(l, peer, netchan_int(i), LONG), NETCHAN_OK);
    for (uint64_t i = 1; i < COUNT; i++) {
        frame f;
        next_frame(r, &f, CLAIM);
        CHECK_INT(f.type, CLAIM);
    }
    PUT(&b, TAKEN, 77); /* which is not true */
    raw_say(r, &b);
    raw_wait_closed(r);
    raw_close(r);
    wait_event(l, "lost", "took");
    CHECK_INT(netchan_hangup(l, &report), NETCHAN_ETIMEDOUT);
    CHECK_INT(report.unknown, COUNT - 1);
    CHECK_INT(report.undelivered, 1);
    CHECK_INT(alloc_blocks(), 0);
}

static void test_large_values(void) {
    enum { SIZE = 40000 };
    static uint8_t value[SIZE + 4] = {0x87, 0xc0, 0xb8, 0x02}; /* bytes, LEN 40,000 */
    static bytes b;
    static uint8_t gathered[SIZE + 4];
    room m = open_room();
    raw *r = raw_join_first(m.l->address);
    frame f;
    task t;
    for (size_t i = 4; i < sizeof value; i++) value[i] = (uint8_t)(i * 7);
    for (uint64_t i = 1; i < 4; i++) {
        b.size = 0;
        PUT(&b, OFFER, 0, i, i, i == 2 ? MULTI : i == 3 ? FIRM : 0, sizeof value);
        raw_say(r, &b);
        start_recv(&t, m.l->recv, i == 2 ? 2 : 1, LONG);
        EXPECT(r, &f, CLAIM, i);
        uint64_t match = get_number(&f);
        PUT(&b, GRANT, match, sizeof value);
        for (size_t at = 0; at < sizeof value; at += PIECE)
            put_frame(&b, FRAGMENT_UP, &match, 1, value + at, sizeof value - at < PIECE ? sizeof value - at : PIECE);
        raw_say(r, &b);
        CHECK_INT(end_task(&t), NETCHAN_OK);
        CHECK_INT(netchan_count(&t.got), SIZE);
        CHECK(memcmp(netchan_as_block(&t.got, NETCHAN_BYTES, NULL), value + 4, SIZE) == 0);
        netchan_clear(&t.got);
        EXPECT(r, &f, ACCEPT, i, 0);
    }
    for (uint64_t i = 4; i < 6; i++) {
        PUT(&b, DEMAND, 1, i, i, i == 4 ? FIRM : MULTI, 0);
        raw_say(r, &b);
        start_send(&t, m.l->send, netchan_bytes(value + 4, SIZE), i == 4 ? 1 : 2, LONG);
        EXPECT(r, &f, CLAIM, i);
        uint64_t match = get_number(&f);
        get_number(&f);
        CHECK_INT(get_number(&f), sizeof value);
        CHECK_INT(f.at, f.size); /* never here */
        PUT(&b, GRANT, match, 0);
        raw_say(r, &b);
        EXPECT(r, &f, COMMIT, i, match, 0, sizeof value);
        CHECK_INT(f.at, f.size);
        for (size_t at = 0, size; at < sizeof value; at += size) {
            EXPECT(r, &f, FRAGMENT_DOWN, i);
            size = f.size - f.at;
            CHECK(size <= sizeof value - at);
            memcpy(gathered + at, f.body + f.at, size);
        }
        CHECK(memcmp(gathered, value, sizeof value) == 0);
        PUT(&b, TAKEN, match);
        raw_say(r, &b);
        CHECK_INT(end_task(&t), NETCHAN_OK);
    }
    check_quiet(r);
    raw_close(r);
    check_good(&m);
    close_room(&m);
}

/* A value of an accepted peer that it may have taken before it was lost counts as one of which nobody knows. */
static void test_a_value_for_a_peer_that_is_lost(void) {
    netchan_options o = options();
    o.buffer = 4;
    o.resume_ms = 100;
    netchan_link *l = netchan_listen("127.0.0.1:0", &o);
    CHECK(l);
    raw *r = raw_join_first(l->address);
    bytes b;
    frame f;
    netchan_value v;
    netchan_report report;
    b.size = 0;
    CHECK_INT(netchan_recv(l->accept, &v, LONG), NETCHAN_OK);
    netchan *send = netchan_retain(netchan_as_chan(netchan_get(&v, "send")));
    netchan_clear(&v);
    PUT(&b, DEMAND, 1, 1, 1, FIRM, 0);
    raw_say(r, &b);
    check_quiet(r);
    for (int i = 0; i < 2; i++) CHECK_INT(netchan_send(send, netchan_int(i), LONG), NETCHAN_OK);
    EXPECT(r, &f, CLAIM, 1); /* its value is here */
    raw_close(r);
    do { /* down, lost */
        netchan_clear(&v);
        CHECK_INT(netchan_recv(l->events, &v, LONG), NETCHAN_OK);
    } while (strcmp(netchan_as_str(netchan_get(&v, "event"), ""), "lost") != 0);
    CHECK_INT(netchan_as_uint(netchan_get(&v, "unknown"), 9), 1);
    CHECK_INT(netchan_as_uint(netchan_get(&v, "undelivered"), 9), 1);
    netchan_clear(&v);
    netchan_free(send);
    CHECK_INT(netchan_hangup(l, &report), NETCHAN_ETIMEDOUT);
    CHECK_INT(report.unknown, 1);
    CHECK_INT(report.undelivered, 1);
    CHECK_INT(alloc_blocks(), 0);
}

/* Capacity, credit, close and farewell. */
static void test_buffered_values(void) {
    room m = open_room();
    raw *r = raw_join(m.l->address, 3);
    bytes b;
    frame f;
    b.size = 0;
    EXPECT(r, &f, CREDIT, 0, 3, 0);
    for (int round = 0; round < 5; round++) {
        PUT_VALUE(&b, DATA, "\105first", 0);
        PUT_VALUE(&b, DATA, "\2", 0);
        PUT_VALUE(&b, DATA, "\3", 0);
        raw_say(r, &b);
        check_quiet(r); /* it is full */
        netchan_value v;
        CHECK_INT(netchan_recv(m.l->recv, &v, LONG), NETCHAN_OK);
        CHECK_STR(netchan_as_str(&v, "?"), "first");
        netchan_clear(&v);
        for (int i = 2; i < 4; i++) {
            CHECK_INT(netchan_recv(m.l->recv, &v, LONG), NETCHAN_OK);
            CHECK_INT(netchan_as_int(&v, -1), i);
        }
        uint64_t credit = 0, left = 0;
        while (credit < 3) {
            EXPECT(r, &f, CREDIT, 0);
            credit += get_number(&f);
            left += get_number(&f);
        }
        CHECK_INT(credit, 3);
        CHECK(left <= 3 * ((uint64_t)round + 1));
    }
    PUT_VALUE(&b, DATA, "\4", 0);
    PUT(&b, CLOSE, 0);
    PUT(&b, BYE, 0);
    raw_say(r, &b);
    EXPECT(r, &f, BYE, 0);
    wait_acked(r, 5 * 3 + 3); /* all that was said */
    raw_ack(r);
    raw_wait_closed(r);
    raw_close(r);
    wait_event(m.l, "drained", "hung up");
    netchan_value v;
    CHECK_INT(netchan_recv(m.l->recv, &v, LONG), NETCHAN_OK); /* it was said before the farewell */
    CHECK_INT(netchan_as_int(&v, -1), 4);
    wait_event(m.l, "closed", "");
    check_good(&m);
    close_room(&m);
}

static void *hang_up(void *arg) {
    CHECK_INT(netchan_hangup((netchan_link *)arg, NULL), NETCHAN_OK);
    return NULL;
}

static void test_the_listener_says_farewell(void) {
    netchan_options o = options();
    netchan_link *l = netchan_listen("127.0.0.1:0", &o);
    CHECK(l);
    raw *r = raw_join(l->address, 0);
    bytes b;
    frame f;
    b.size = 0;
    pthread_t thread = test_start(hang_up, l);
    EXPECT(r, &f, BYE, 1);
    PUT(&b, BYE, 0);
    raw_say(r, &b);
    raw_ack(r);
    raw_wait_closed(r);
    test_join(thread);
    raw_close(r);
    CHECK_INT(alloc_blocks(), 0);
}

/* The session moves to a new connection, which replaces one that is gone, or (even generations) one that serves. */
static raw *raw_move(const char *address, raw *old, uint64_t generation, uint64_t sent) {
    uint64_t arrived;
    CHECK(raw_send(old, "\3\26\0", 3)); /* a part of a frame goes with its connection */
    if (generation % 2) raw_drop(old);
    raw *r = raw_resume(address, old, generation, &arrived);
    CHECK_INT(arrived, sent);
    if (generation % 2 == 0) raw_wait_closed(old), raw_drop(old);
    free(old);
    return r;
}

/* What we have said and what was said to us goes on where it was; what got lost is said again. */
static void test_resume(void) {
    netchan_options o = options();
    o.resume_ms = LONG;
    room m = open_room_with(&o);
    raw *r = raw_join(m.l->address, 3);
    bytes b;
    frame f;
    task t;
    b.size = 0;
    EXPECT(r, &f, CREDIT, 0, 3, 0);
    PUT(&b, DEMAND, 1, 9, 9, FIRM, 0);
    PUT_VALUE(&b, DATA, "\1", 0);
    raw_say(r, &b);
    wait_acked(r, 2);
    start_send(&t, m.l->send, netchan_str("hello"), 1, LONG);
    EXPECT(r, &f, CLAIM, 9); /* we have not got it, for all the listener knows */
    r->received--;
    r = raw_move(m.l->address, r, 1, 2);
    EXPECT(r, &f, CLAIM, 9); /* again */
    uint64_t match = get_number(&f);
    CHECK_INT(get_number(&f), FINAL);
    CHECK_INT(get_number(&f), 6);
    check_rest(&f, "\105hello", 6);
    PUT(&b, GRANT, match, 0);
    raw_say(r, &b);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    wait_acked(r, 3);
    for (uint64_t generation = 2; generation < 5; generation++) {
        r = raw_move(m.l->address, r, generation, 3);
        check_quiet(r);
    }
    PUT_VALUE(&b, DATA, "\2", 0);
    raw_say(r, &b);
    for (int i = 1; i < 3; i++) {
        netchan_value v;
        CHECK_INT(netchan_recv(m.l->recv, &v, LONG), NETCHAN_OK);
        CHECK_INT(netchan_as_int(&v, -1), i);
    }
    netchan_stats stats;
    CHECK_INT(netchan_get_stats(m.l, &stats), NETCHAN_OK);
    CHECK_INT(stats.resumes + stats.rollovers, 4);
    CHECK_INT(stats.replays, 1);
    CHECK_INT(stats.lost, 0);
    check_good(&m);
    PUT(&b, BYE, 0);
    raw_say(r, &b);
    do next_frame(r, &f, BYE);
    while (f.type == CREDIT);
    CHECK_INT(f.type, BYE);
    raw_ack(r);
    raw_wait_closed(r);
    raw_close(r);
    close_room(&m);
}

/* Says RESUME, and is told this. */
static void check_refusal(raw *r, const claim *m, const char *word) {
    bytes b;
    frame f;
    b.size = 0;
    put_resume(&b, m);
    raw_say(r, &b);
    CHECK(raw_frame(r, &f));
    CHECK_INT(f.type, REFUSED);
    f.body[f.size] = '\0';
    CHECK_INT(get_number(&f), 0); /* to ask for another session is of use */
    const char *text = (char *)f.body + f.at;
    if (!strstr(text, word)) test_fail(__FILE__, __LINE__, "no \"%s\" in \"%s\"", word, text);
}

/* Somebody who has the key of the listener comes for the sessions of others. */
static void test_stolen_sessions(void) {
    room m = open_room();
    raw *owner = raw_join(m.l->address, 0);
    bytes b;
    frame f;
    b.size = 0;
    for (int i = 0; i < 8; i++) {
        raw *thief = raw_enter(m.l->address);
        claim c = claim_of(owner, thief, 1);
        const char *word = "somebody else";
        if (i == 0) memset(c.secret, 0, sizeof c.secret); /* the id alone */
        if (i == 1) memcpy(c.binding, owner->binding, sizeof c.binding); /* what was said on another connection */
        if (i == 2) memset(c.binding, 0, sizeof c.binding);
        if (i == 3) c.generation = 0, word = "elsewhere"; /* from here on he even has the secret */
        if (i == 4) c.received += 1000, word = "elsewhere";
        if (i == 5) c.id[0] ^= 2, word = "not known";
        if (i == 6) c.id[15] ^= 2, word = "not known";
        if (i == 7) { /* the good peer's id, which strangers never see */
            pthread_mutex_lock(&netchan__net_lock);
            memcpy(c.id, endpoint_of(m.good)->hub.session->id, sizeof c.id);
            pthread_mutex_unlock(&netchan__net_lock);
        }
        check_refusal(thief, &c, word);
        if (i == 5 || i == 6) { /* this may be a mistake; but not a second time */
            check_refusal(thief, &c, word);
        }
        raw_wait_closed(thief);
        raw_close(thief);
        wait_event(m.l, "rejected", word);
        check_quiet(owner);
    }
    task t;
    PUT(&b, DEMAND, 1, 1, 1, FIRM, 0);
    raw_say(owner, &b);
    wait_acked(owner, 1);
    start_send(&t, m.l->send, netchan_str("hello"), 1, LONG);
    EXPECT(owner, &f, CLAIM, 1);
    PUT(&b, GRANT, get_number(&f), 0);
    raw_say(owner, &b);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    check_good(&m);
    raw_close(owner);
    close_room(&m);
}

/* The very bytes that the owner said, on another connection, before and after they were used. */
static void test_replayed_resume(void) {
    room m = open_room();
    raw *old = raw_join(m.l->address, 0), *owner = raw_enter(m.l->address);
    claim c = claim_of(old, owner, 1);
    bytes stolen;
    frame f;
    stolen.size = 0;
    put_resume(&stolen, &c);
    for (int used = 0; used < 2; used++) {
        raw *thief = raw_enter(m.l->address);
        CHECK(raw_send(thief, stolen.data, stolen.size));
        EXPECT(thief, &f, REFUSED, 0, 't'); /* "the session belongs to somebody else" */
        raw_wait_closed(thief);
        raw_close(thief);
        wait_event(m.l, "rejected", "somebody else");
        if (used) break;
        check_quiet(old);
        CHECK(raw_send(owner, stolen.data, stolen.size));
        EXPECT(owner, &f, RESUMED, 0);
        raw_wait_closed(old);
    }
    check_quiet(owner);
    CHECK(raw_send(owner, stolen.data, stolen.size)); /* nor once more on the same one: it greets twice */
    raw_wait_closed(owner);
    wait_event(m.l, "lost", "greeted twice");
    check_good(&m);
    raw_close(old);
    raw_close(owner);
    close_room(&m);
}

/* A new session over the connection on which the old one was refused. */
static void test_hello_after_a_refusal(void) {
    netchan_options o = options();
    o.resume_ms = 2000;
    room m = open_room_with(&o);
    raw *r = raw_enter(m.l->address);
    claim c = claim_of(r, r, 1);
    memset(c.id, 0x11, sizeof c.id);
    check_refusal(r, &c, "not known");
    greeting g = good_greeting();
    CHECK_INT(raw_greet(r, &g), 0);
    check_quiet(r);
    wait_event(m.l, "up", "");
    uint64_t arrived;
    raw_drop(r);
    raw *next = raw_resume(m.l->address, r, 1, &arrived); /* and goes on like any other */
    check_quiet(next);
    free(r);
    raw_close(next);
    check_good(&m);
    close_room(&m);
}

/* Many who ask for sessions that are not there. */
static void test_a_flood_of_resumes(void) {
    enum { COUNT = 100 / LESS };
    room m = open_room();
    raw *all[COUNT];
    uint64_t seed = 5;
    bytes b;
    for (int i = 0; i < COUNT; i++) {
        all[i] = raw_enter(m.l->address);
        b.size = 0;
        for (int k = 0; k < 1 + i % 3; k++) {
            claim c = claim_of(all[i], all[i], test_random(&seed));
            for (size_t n = 0; n < sizeof c.id; n++) c.id[n] = (uint8_t)test_random(&seed);
            put_resume(&b, &c);
        }
        raw_send(all[i], b.data, b.size);
        if (i % 10 == 0) check_good(&m);
    }
    for (int i = 0; i < COUNT; i++) {
        if (i % 3) raw_wait_closed(all[i]);
        raw_close(all[i]);
    }
    for (int i = 0; i < 20 / LESS; i++) wait_event(m.l, "rejected", "");
    wait_for_strangers(m.l, 0);
    netchan_stats stats;
    CHECK_INT(netchan_get_stats(m.l, &stats), NETCHAN_OK);
    CHECK_INT(stats.peers, 1);
    check_good(&m);
    close_room(&m);
}

/* Every receive that waited at this channel has met a send. */
static void wait_for_no_receivers(netchan *ch) {
    for (bool more = true; more; sched_yield()) {
        pthread_mutex_lock(&netchan__net_lock);
        more = ch->receivers.head != NULL;
        pthread_mutex_unlock(&netchan__net_lock);
    }
}

/* Who takes values and never says ACK is given the window; others are not hurt, and an ACK sets all in motion again. */
static void test_who_never_acknowledges(void) {
    enum { SIZE = 15000, COUNT = 20 };
    static uint8_t value[SIZE];
    static task t[COUNT];
    room m = open_room();
    raw *r = raw_join(m.l->address, 0);
    bytes b;
    frame f;
    size_t got = 0, arrived = 0;
    b.size = 0;
    for (uint64_t i = 1; i <= COUNT; i++) PUT(&b, DEMAND, 1, i, i, FIRM, 0);
    raw_say(r, &b);
    wait_acked(r, COUNT);
    for (int i = 0; i < COUNT; i++) start_send(&t[i], m.l->send, netchan_bytes(value, SIZE), 1, LONG);
    wait_for_no_receivers(m.l->send);
    while (got < WINDOW / SIZE + 1) { /* what is more than the window stays there */
        next_frame(r, &f, CLAIM);
        CHECK_INT(f.type, CLAIM);
        arrived += f.size;
        got++;
        get_number(&f);
        PUT(&b, GRANT, get_number(&f), 0);
        raw_say(r, &b);
    }
    check_quiet(r); /* answers pass */
    CHECK(arrived < WINDOW + 16384);
    check_good(&m);
    for (; got < COUNT; got++) {
        raw_ack(r);
        next_frame(r, &f, CLAIM);
        CHECK_INT(f.type, CLAIM);
        get_number(&f);
        PUT(&b, GRANT, get_number(&f), 0);
        raw_say(r, &b);
    }
    for (int i = 0; i < COUNT; i++) CHECK_INT(end_task(&t[i]), NETCHAN_OK);
    check_good(&m);
    raw_close(r);
    close_room(&m);
}

/* The same with no end: what waits for him is bounded by max_memory. */
static void test_what_waits_for_a_peer_is_bounded(void) {
    enum { SIZE = 15000, COUNT = 60 };
    static uint8_t value[SIZE];
    netchan_options o = options();
    o.max_message = 100000;
    o.max_memory = 200000;
    room m = open_room_with(&o);
    raw *r = raw_join(m.l->address, 0);
    netchan_value v = netchan_bytes(value, SIZE);
    bytes b;
    frame f;
    b.size = 0;
    for (uint64_t i = 1; i <= COUNT; i++) PUT(&b, DEMAND, 1, i, i, 0, 0);
    raw_say(r, &b);
    wait_acked(r, COUNT);
    size_t unknown = 0;
    task t[COUNT];
    for (int i = 0; i < COUNT; i++) {
        start_send(&t[i], m.l->send, v, 1, LONG);
        if (i == 0) next_frame(r, &f, CLAIM); /* one has left */
    }
    wait_event(m.l, "lost", "does not read");
    raw_wait_closed(r);
    raw_close(r);
    for (int i = 0; i < COUNT;) { /* the good peer takes the rest */
        netchan_value got;
        if (__atomic_load_n(&t[i].done, __ATOMIC_ACQUIRE)) i++;
        else if (netchan_recv(m.good->recv, &got, SHORT) == NETCHAN_OK) netchan_clear(&got);
    }
    for (int i = 0; i < COUNT; i++) {
        int result = end_task(&t[i]);
        CHECK(result == NETCHAN_OK || result == NETCHAN_EUNKNOWN);
        unknown += result == NETCHAN_EUNKNOWN;
    }
    CHECK(unknown > 0 && unknown <= WINDOW / SIZE + 1);
    check_good(&m);
    netchan_report report;
    CHECK_INT(netchan_hangup(m.good, NULL), NETCHAN_OK);
    CHECK_INT(netchan_hangup(m.l, &report), NETCHAN_ETIMEDOUT);
    CHECK_INT(report.unknown, unknown);
    CHECK_INT(report.undelivered, 0);
    CHECK_INT(alloc_blocks(), 0);
}

/* --- the other way round: a dialler meets a raw listener ---------------------------------------------------------- */

typedef struct call {
    const char *address;
    netchan_options o;
    netchan_link *link;
    char message[512];
    bool done; /* atomic */
    pthread_t thread;
} call;

/* The dialler hangs up, nobody is at the door any more, and all memory is free. */
static void end_call(call *c, const door *d) {
    netchan_hangup(c->link, NULL);
    close(d->fd);
    CHECK_INT(alloc_blocks(), 0);
}

static void *run_call(void *arg) {
    call *c = (call *)arg;
    c->link = netchan_dial(c->address, &c->o);
    snprintf(c->message, sizeof c->message, "%s", netchan_errmsg());
    __atomic_store_n(&c->done, true, __ATOMIC_RELEASE);
    return NULL;
}

static void start_call(call *c, const door *d, size_t buffer, int connect_ms) {
    memset(c, 0, sizeof *c);
    c->address = d->address;
    c->o = options();
    c->o.buffer = buffer;
    c->o.connect_ms = connect_ms;
    c->o.linger_ms = 100;
    c->o.resume_ms = LONG;
    c->thread = test_start(run_call, c);
}

static void check_call_fails(call *c, const char *word) {
    test_join(c->thread);
    CHECK(!c->link);
    if (!strstr(c->message, word)) test_fail(__FILE__, __LINE__, "no \"%s\" in \"%s\"", word, c->message);
}

static void test_dialling_something_else(void) {
    static const badge wrong[] = {{OTHER_KEY, NULL, NULL, false, false},
                                  {NULL, NULL, "", false, false},
                                  {NULL, NULL, "h2", false, false},
                                  {NULL, NULL, NULL, true, false}};
    static const char *const words[] = {"shared_key", "netchan/1", "", ""};
    door d = open_door();
    call c;
    start_call(&c, &d, 0, 500);
    raw *r = raw_accept(&d);
    raw_send(r, "HTTP/1.1 400 Bad Request\r\n\r\n", 28);
    raw_wait_closed(r);
    raw_close(r);
    while (!__atomic_load_n(&c.done, __ATOMIC_ACQUIRE)) { /* it tries again, until its time is up */
        struct pollfd p = {d.fd, POLLIN, 0};
        if (poll(&p, 1, SHORT) != 1) continue;
        r = raw_accept(&d);
        raw_send(r, "HTTP/1.1 400 Bad Request\r\n\r\n", 28);
        raw_wait_closed(r);
        raw_close(r);
    }
    check_call_fails(&c, "does not speak TLS");
    empty_door(&d);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        start_call(&c, &d, 0, LONG);
        long long start = test_ms();
        r = raw_accept(&d);
        set_up_tls(r, &wrong[i], true);
        if (shake_hands(r) == 0) raw_wait_closed(r);
        raw_close(r);
        check_call_fails(&c, words[i]);
        CHECK(test_ms() - start < LONG / 2); /* at once */
    }
    close(d.fd);
    CHECK_INT(alloc_blocks(), 0);
}

/* Says what no listener may say; the dialler hangs up on it, and dials again. */
static void test_a_lying_listener(void) {
    static const struct {
        const char *reason;
        unsigned type;
        uint64_t numbers[5];
        size_t count;
        const char *tail;
        size_t size;
    } lies[] = {
        {"greeted twice", HELLO, {0}, 0, "netchan\1................\1\1\1\1\1\1", 30},
        {"greeted twice", RESUMED, {0}, 0, "\0................................", 33},
        {"never sent", ACK, {1000}, 1, NULL, 0},
        {"not sent", RETURN, {0, 1}, 2, "\5", 1},
        {"capacity", CREDIT, {0, 4, 0}, 3, NULL, 0},
        {"capacity", CREDIT, {1, 1, 0}, 3, NULL, 0},
        {"", CREDIT, {0, 0, 1}, 3, NULL, 0},
        {"committed", COMMIT, {5, 5, 1, 1}, 4, "\5", 1},
        {"released", RELEASE, {5, 5}, 2, NULL, 0},
        {"fragment", FRAGMENT_DOWN, {5}, 1, "aaa", 3},
        {"fragment", FRAGMENT_UP, {5}, 1, "aaa", 3},
        {"closed", CLOSED, {0}, 1, NULL, 0},
        {"does not exist", OFFER, {0, 1, 1, 0, 1}, 5, NULL, 0},
        {"credit", DATA, {0}, 1, "\1", 1},
        {"granted", GRANT, {5, 0}, 2, NULL, 0},
        {"cut off", CLAIM, {5}, 1, NULL, 0},
        {"malformed", CLAIM, {5, 5, 1, 3}, 4, "\206\7a", 3},
    };
    door d = open_door();
    call c;
    start_call(&c, &d, 3, LONG);
    raw *r = raw_admit(&d, 3);
    test_join(c.thread);
    CHECK(c.link);
    CHECK_INT(netchan_cap(c.link->send), 3);
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        task t, s;
        bytes b;
        frame f;
        b.size = 0;
        start_recv(&t, c.link->recv, 1, NETCHAN_FOREVER);
        next_frame(r, &f, DEMAND);
        CHECK_INT(f.type, DEMAND);
        start_send(&s, c.link->send, netchan_int(5), 1, LONG); /* there is no credit: it stays here */
        put_frame(&b, lies[i].type, lies[i].numbers, lies[i].count, lies[i].tail, lies[i].size);
        raw_send(r, b.data, b.size);
        b.size = 0;
        raw_wait_closed(r);
        raw_close(r);
        wait_event(c.link, "lost", lies[i].reason);
        CHECK_INT(end_task(&t), NETCHAN_ELOST);
        r = raw_admit(&d, 3);
        PUT(&b, CREDIT, 0, 1, 0);
        raw_say(r, &b);
        EXPECT(r, &f, DATA, 0);
        check_rest(&f, "\5", 1);
        CHECK_INT(end_task(&s), NETCHAN_OK);
        PUT(&b, CREDIT, 0, 0, 1); /* it was taken, so it is not unknown when the session ends */
        raw_say(r, &b);
        check_quiet(r);
    }
    raw_close(r);
    end_call(&c, &d);
}

/* A listener that grants less than was asked for. */
static void test_less_capacity_than_asked_for(void) {
    door d = open_door();
    call c;
    frame f;
    bytes b;
    start_call(&c, &d, 5, LONG);
    raw *r = raw_admit(&d, 2);
    test_join(c.thread);
    CHECK(c.link);
    CHECK_INT(netchan_cap(c.link->send), 2);
    b.size = 0;
    PUT(&b, CREDIT, 0, 2, 0);
    raw_say(r, &b);
    for (int i = 0; i < 2; i++) CHECK_INT(netchan_send(c.link->send, netchan_int(i), LONG), NETCHAN_OK);
    CHECK_INT(netchan_send(c.link->send, netchan_int(2), SHORT), NETCHAN_ETIMEDOUT);
    for (unsigned i = 0; i < 2; i++) {
        uint8_t value = (uint8_t)i;
        EXPECT(r, &f, DATA, 0);
        check_rest(&f, &value, 1);
    }
    PUT(&b, CREDIT, 0, 0, 2);
    raw_say(r, &b);
    check_quiet(r);
    raw_close(r);
    end_call(&c, &d);
}

/* A select is promised to a listener that takes its time. Meanwhile a link of the other case is hung up, on which
 * somebody waits for that very select: nobody hangs, and the select learns it as soon as it is free. */
static void test_hangup_while_a_select_is_promised(void) {
    for (int committed = 0; committed < 2; committed++) {
        netchan_options o = options();
        o.linger_ms = 100;
        netchan_link *l = netchan_listen("127.0.0.1:0", &o), *sender = netchan_dial(l->address, &o);
        CHECK(l && sender);
        door d = open_door();
        call c;
        task t, s;
        bytes b;
        frame f;
        netchan *recv = netchan_retain(l->recv);
        start_call(&c, &d, 0, LONG);
        raw *r = raw_admit(&d, 0);
        test_join(c.thread);
        CHECK(c.link);
        memset(&t, 0, sizeof t);
        t.c[0] = netchan_case_recv(c.link->recv, &t.got);
        t.c[1] = netchan_case_recv(recv, &t.got);
        t.count = 2;
        t.timeout_ms = LONG;
        t.thread = test_start(run_task, &t);
        EXPECT(r, &f, DEMAND, 1);
        uint64_t entry = get_number(&f);
        b.size = 0;
        PUT(&b, CLAIM, entry, 55, 0, 0);
        raw_say(r, &b);
        EXPECT(r, &f, GRANT, 55);
        start_send(&s, sender->send, netchan_int(5), 1, LONG); /* wants the select as well, and waits for it */
        while (true) {
            pthread_mutex_lock(&netchan__net_lock);
            bool waits = netchan__net.matches.count > 0;
            pthread_mutex_unlock(&netchan__net_lock);
            if (waits) break;
            sched_yield();
        }
        netchan_hangup(l, NULL);
        if (committed) PUT_VALUE(&b, COMMIT, "\105hello", entry, 55, 0, 6);
        else PUT(&b, RELEASE, entry, 55);
        raw_say(r, &b);
        int result = end_task(&t);
        netchan_hangup(sender, NULL);
        int sent = end_task(&s);
        if (committed) {
            CHECK_INT(result, NETCHAN_OK);
            CHECK_STR(netchan_as_str(&t.got, "?"), "hello");
            netchan_clear(&t.got);
            CHECK(sent != NETCHAN_OK);
        } else if (result == NETCHAN_OK) { /* the value was here, and only the answer got lost */
            CHECK_INT(netchan_as_int(&t.got, -1), 5);
            CHECK_INT(sent, NETCHAN_EUNKNOWN);
        } else {
            CHECK_INT(result, NETCHAN_ECLOSED);
            CHECK(sent != NETCHAN_OK);
        }
        netchan_free(recv);
        raw_close(r);
        end_call(&c, &d);
    }
}

/* What a dialler asks for ahead of its receives. */
typedef struct rooms {
    uint64_t entries[16];
    size_t count;
    uint64_t match; /* the last */
} rooms;

/* The next frame but what is asked for ahead; it is of this type. */
static void skip_ahead(raw *r, rooms *q, frame *f, unsigned type) {
    for (;;) {
        next_frame(r, f, type);
        if (f->type != DEMAND) break;
        CHECK_INT(get_number(f), 1);
        uint64_t entry = get_number(f);
        get_number(f);
        if (get_number(f) != (FIRM | AHEAD)) break;
        CHECK(q->count < 4);
        q->entries[q->count++] = entry;
    }
    CHECK_INT(f->type, type);
    f->at = 0;
}

/* A receive begins. Returns its entry. */
static uint64_t demand(raw *r, rooms *q, task *t, netchan *recv) {
    frame f;
    start_recv(t, recv, 1, NETCHAN_FOREVER);
    skip_ahead(r, q, &f, DEMAND);
    CHECK_INT(get_number(&f), 1);
    return get_number(&f);
}

static void claim_with(raw *r, rooms *q, uint64_t entry, int number) {
    bytes b;
    uint8_t value = (uint8_t)number;
    b.size = 0;
    put_frame(&b, CLAIM, (uint64_t[]){entry, ++q->match, FINAL, 1}, 4, &value, 1);
    raw_say(r, &b);
}

/* Claims this entry, for which the receive gets the number. */
static void serve(raw *r, rooms *q, task *t, uint64_t entry, int number) {
    frame f;
    claim_with(r, q, entry, number);
    skip_ahead(r, q, &f, GRANT);
    CHECK_INT(get_number(&f), q->match);
    CHECK_INT(end_task(t), NETCHAN_OK);
    CHECK_INT(netchan_as_int(&t->got, -1), number);
}

/* Serves receives until values are asked for ahead of them. */
static void serve_until_ahead(raw *r, rooms *q, netchan *recv) {
    q->count = 0;
    while (q->count < 2) {
        task t;
        uint64_t entry = demand(r, q, &t, recv);
        serve(r, q, &t, entry, 5);
    }
}

/* A dialler's link to a home with a buffer, whose receives have been quick: it asks for values ahead of them. */
static raw *call_early(call *c, const door *d, rooms *q) {
    start_call(c, d, 4, LONG);
    raw *r = raw_admit(d, 4);
    test_join(c->thread);
    CHECK(c->link);
    q->match = 100;
    serve_until_ahead(r, q, c->link->recv);
    return r;
}

/* A dialler's side of values that come before their receives: they go back when nobody receives, and nothing is
 * demanded until it is certain that no more of them are on the way; an entry whose receive got another value is kept
 * for the next, and given up when there is none. */
static void test_early_values_of_a_dialler(void) {
    enum { SIZE = 40000 };
    static uint8_t large[SIZE + 4] = {0x87, 0xc0, 0xb8, 0x02}; /* bytes, LEN 40,000 */
    static bytes b;
    door d = open_door();
    call c;
    frame f;
    task t;
    rooms q;
    b.size = 0;
    raw *r = call_early(&c, &d, &q);
    claim_with(r, &q, q.entries[0], 7);
    for (size_t i = 1; i < q.count; i++) EXPECT(r, &f, WITHDRAW, q.entries[i]);
    EXPECT(r, &f, DECLINE, q.match, 0);
    claim_with(r, &q, q.entries[1], 8); /* it was on the way */
    EXPECT(r, &f, DECLINE, q.match, 0);
    start_recv(&t, c.link->recv, 1, NETCHAN_NOWAIT); /* it asks, though later */
    check_quiet(r);
    for (size_t i = 1; i < q.count; i++) PUT(&b, WITHDRAWN, q.entries[i]);
    raw_say(r, &b);
    EXPECT(r, &f, DEMAND, 1);
    serve(r, &q, &t, get_number(&f), 9);

    serve_until_ahead(r, &q, c.link->recv);
    uint64_t first = demand(r, &q, &t, c.link->recv);
    serve(r, &q, &t, q.entries[0], 1); /* that was not yet known */
    uint64_t second = demand(r, &q, &t, c.link->recv);
    serve(r, &q, &t, first, 2);
    uint64_t third = demand(r, &q, &t, c.link->recv);
    PUT(&b, CLAIM, second, 55, FINAL, sizeof large);
    raw_say(r, &b);
    skip_ahead(r, &q, &f, GRANT);
    CHECK_INT(get_number(&f), 55);
    PUT(&b, COMMIT, second, 55, 0, sizeof large);
    for (size_t at = 0; at < sizeof large; at += PIECE)
        put_frame(&b, FRAGMENT_DOWN, &second, 1, large + at, sizeof large - at < PIECE ? sizeof large - at : PIECE);
    raw_say(r, &b);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    CHECK_INT(netchan_count(&t.got), SIZE);
    netchan_clear(&t.got);
    skip_ahead(r, &q, &f, TAKEN);
    uint64_t fourth = demand(r, &q, &t, c.link->recv);
    serve(r, &q, &t, third, 3);
    uint64_t fifth = demand(r, &q, &t, c.link->recv);
    serve(r, &q, &t, fourth, 4);
    bool gone = false; /* nobody receives: home is not to serve that as if somebody did */
    while (!gone) {
        next_frame(r, &f, WITHDRAW);
        CHECK_INT(f.type, WITHDRAW);
        gone = get_number(&f) == fifth;
    }
    raw_close(r);
    end_call(&c, &d);
}

/* A select of two homes is engaged with one of them, when the other's values come: the older one early, the newer one
 * for the select. It gets the older one. */
static void test_early_values_and_an_engaged_select(void) {
    door a = open_door(), other = open_door();
    call c, o;
    frame f;
    task t;
    rooms q;
    bytes b;
    b.size = 0;
    q.match = 100;
    start_call(&c, &a, 4, LONG);
    raw *ra = raw_admit(&a, 4);
    test_join(c.thread);
    start_call(&o, &other, 0, LONG);
    raw *rb = raw_admit(&other, 0);
    test_join(o.thread);
    CHECK(c.link && o.link);
    serve_until_ahead(ra, &q, c.link->recv);
    memset(&t, 0, sizeof t);
    t.c[0] = netchan_case_recv(c.link->recv, &t.got);
    t.c[1] = netchan_case_recv(o.link->recv, &t.got);
    t.count = 2;
    t.timeout_ms = LONG;
    t.thread = test_start(run_task, &t);
    skip_ahead(ra, &q, &f, DEMAND);
    CHECK_INT(get_number(&f), 1);
    uint64_t entry = get_number(&f);
    EXPECT(rb, &f, DEMAND, 1);
    uint64_t elsewhere = get_number(&f);
    PUT(&b, CLAIM, elsewhere, 55, 0, 0);
    raw_say(rb, &b);
    EXPECT(rb, &f, GRANT, 55);
    claim_with(ra, &q, q.entries[0], 2);
    claim_with(ra, &q, entry, 4);
    do next_frame(ra, &f, DECLINE); /* of the newer one in any case; of the older one, too, when this was slow */
    while (f.type != DECLINE || get_number(&f) != q.match);
    for (size_t i = 0; i < q.count; i++) PUT(&b, WITHDRAWN, q.entries[i]);
    raw_say(ra, &b);
    PUT(&b, RELEASE, elsewhere, 55);
    raw_say(rb, &b);
    do next_frame(ra, &f, GRANT);
    while (f.type != GRANT && f.type != DEMAND);
    if (f.type == DEMAND) { /* it was slow: home has both, and serves them in their order */
        get_number(&f);
        claim_with(ra, &q, get_number(&f), 2);
    }
    CHECK_INT(end_task(&t), NETCHAN_OK);
    CHECK_INT(netchan_as_int(&t.got, -1), 2);
    raw_close(rb);
    close(other.fd);
    netchan_hangup(o.link, NULL);
    raw_close(ra);
    end_call(&c, &a);
}

/* A home that has closed its channel has ended all entries, and does not answer when they are withdrawn. */
static void test_early_values_and_a_close(void) {
    door d = open_door();
    call c;
    rooms q;
    bytes b;
    b.size = 0;
    raw *r = call_early(&c, &d, &q);
    PUT(&b, CLOSED, 1);
    raw_say(r, &b);
    CHECK_INT(netchan_recv(c.link->recv, NULL, LONG), NETCHAN_ECLOSED);
    pthread_mutex_lock(&netchan__net_lock);
    CHECK_INT(c.link->recv->given_up, 0); /* or it would wait for that, and end the session at last */
    pthread_mutex_unlock(&netchan__net_lock);
    raw_close(r);
    end_call(&c, &d);
}

/* A home that does not say that it knows what was given back holds up every receive. */
static void test_who_does_not_answer_a_withdraw(void) {
    door d = open_door();
    call c;
    frame f;
    task t;
    rooms q;
    bytes b;
    q.match = 100;
    memset(&c, 0, sizeof c);
    c.address = d.address;
    c.o = options();
    c.o.buffer = 4;
    c.o.connect_ms = LONG;
    c.o.ping_ms = LESS > 1 ? 500 : 200; /* this side is to be heard in time */
    c.o.resume_ms = c.o.linger_ms = 100;
    c.thread = test_start(run_call, &c);
    raw *r = raw_admit(&d, 4);
    test_join(c.thread);
    CHECK(c.link);
    serve_until_ahead(r, &q, c.link->recv);
    claim_with(r, &q, q.entries[0], 7);
    for (size_t i = 1; i < q.count; i++) EXPECT(r, &f, WITHDRAW, q.entries[i]);
    start_recv(&t, c.link->recv, 1, NETCHAN_NOWAIT);
    b.size = 0;
    put_frame(&b, PING, (uint64_t[]){1}, 1, NULL, 0); /* it lives */
    for (long long end = test_ms() + LONG; raw_send(r, b.data, b.size) && raw_frame(r, &f); test_pause(20))
        CHECK(test_ms() < end);
    wait_event(c.link, "lost", "does not answer");
    CHECK(end_task(&t) != NETCHAN_OK);
    raw_close(r);
    end_call(&c, &d);
}

/* A dialler goes on with its session, as the text says, and believes nobody who does not prove that he knows it. */
static void test_a_dialler_resumes(void) {
    door d = open_door();
    call c;
    frame f;
    bytes b;
    task t;
    start_call(&c, &d, 3, LONG);
    raw *r = raw_admit(&d, 3);
    test_join(c.thread);
    CHECK(c.link);
    b.size = 0;
    PUT(&b, CREDIT, 0, 3, 0);
    raw_say(r, &b);
    start_recv(&t, c.link->recv, 1, LONG);
    EXPECT(r, &f, DEMAND, 1);
    uint64_t entry = get_number(&f);
    for (int i = 0; i < 2; i++) CHECK_INT(netchan_send(c.link->send, netchan_int(i + 5), LONG), NETCHAN_OK);
    EXPECT(r, &f, DATA, 0);
    check_rest(&f, "\5", 1);
    uint64_t received = r->received; /* of the second we say nothing */
    for (uint64_t generation = 1; generation < 7; generation++) {
        raw_close(r);
        r = raw_accept(&d);
        claim m = read_resume(r);
        CHECK_INT(m.generation, generation);
        CHECK_INT(m.received, 1); /* CREDIT */
        m.received = received;
        if (generation == 1) m.secret[0] = 0;
        if (generation == 2) m.binding[0] ^= 1;
        if (generation == 3) m.generation--;
        if (generation == 4) m.received += 1000;
        put_resumed(&b, &m, generation == 5 ? 'D' : 'L');
        raw_say(r, &b);
        if (generation < 6) raw_wait_closed(r);
    }
    r->received = received;
    EXPECT(r, &f, DATA, 0); /* again, with its place among the frames */
    check_rest(&f, "\6", 1);
    PUT(&b, CREDIT, 0, 0, 2);
    PUT_VALUE(&b, CLAIM, "\105hello", entry, 55, FINAL, 6);
    raw_say(r, &b);
    check_hello(&t);
    EXPECT(r, &f, GRANT, 55);
    wait_event(c.link, "up", "");
    wait_event(c.link, "down", "");
    wait_event(c.link, "resumed", "");
    raw_close(r);
    end_call(&c, &d);
}

/* What a listener says when it says no is shown to people: it is cleaned, and cut. */
static void test_what_a_refusal_says_is_cleaned(void) {
    static const badge right;
    door d = open_door();
    call c;
    frame f;
    bytes b;
    start_call(&c, &d, 0, 1000);
    while (!__atomic_load_n(&c.done, __ATOMIC_ACQUIRE)) {
        struct pollfd p = {d.fd, POLLIN, 0};
        if (poll(&p, 1, SHORT) != 1) continue;
        raw *r = raw_accept(&d);
        set_up_tls(r, &right, true);
        b.size = 0;
        put_frame(&b, REFUSED, NULL, 0, "\0go\r\n\33[2J away\0 \377\200%s%n", 23);
        if (shake_hands(r) == 0 && raw_frame(r, &f) && raw_send(r, b.data, b.size)) raw_wait_closed(r);
        raw_close(r);
    }
    empty_door(&d);
    check_call_fails(&c, "it said: go???[2J away? ??%s%n");
    for (const char *p = c.message; *p; p++) CHECK(*p >= ' ' && *p < 127);

    start_call(&c, &d, 0, LONG); /* the end of a session that runs */
    raw *r = raw_admit(&d, 0);
    test_join(c.thread);
    CHECK(c.link);
    uint8_t text[10000];
    memset(text, '\7', sizeof text);
    memcpy(text, "\0enough\n", 8);
    b.size = 0;
    put_frame(&b, REFUSED, NULL, 0, text, sizeof text);
    raw_say(r, &b);
    wait_event(c.link, "lost", "it said: enough????");
    raw_wait_closed(r);
    raw_close(r);
    close(d.fd);
    netchan_hangup(c.link, NULL);
    CHECK_INT(alloc_blocks(), 0);
}

/* A listener hangs up: what it has not received goes back, in order, in parts if it is large. */
static void test_values_that_come_back(void) {
    enum { SIZE = 40000 };
    static uint8_t value[SIZE + 4] = {0x87, 0xc0, 0xb8, 0x02}, gathered[SIZE + 4]; /* bytes, LEN 40,000 */
    static bytes b;
    netchan_options o = options();
    netchan_link *l = netchan_listen("127.0.0.1:0", &o);
    CHECK(l);
    for (size_t i = 4; i < sizeof value; i++) value[i] = (uint8_t)(i * 7);
    raw *r = raw_join(l->address, 3);
    frame f;
    EXPECT(r, &f, CREDIT, 0, 3, 0);
    b.size = 0;
    PUT(&b, OFFER, 0, 1, 1, FIRM, sizeof value);
    raw_say(r, &b);
    EXPECT(r, &f, CLAIM, 1);
    uint64_t match = get_number(&f);
    PUT(&b, GRANT, match, sizeof value);
    for (size_t at = 0; at < sizeof value; at += PIECE)
        put_frame(&b, FRAGMENT_UP, &match, 1, value + at, sizeof value - at < PIECE ? sizeof value - at : PIECE);
    PUT_VALUE(&b, DATA, "\105hello", 0);
    raw_say(r, &b);
    EXPECT(r, &f, ACCEPT, 1, 0);
    wait_acked(r, r->acked > 6 ? r->acked : 6);
    pthread_t thread = test_start(hang_up, l);
    size_t at = 0;
    bool bye = false, small = false;
    while (!bye || !small) { /* where the farewell stands among them is not said */
        next_frame(r, &f, RETURN);
        if (f.type == BYE) {
            CHECK_INT(get_number(&f), 1);
            bye = true;
            continue;
        }
        if (f.type == CREDIT) continue;
        CHECK_INT(f.type, RETURN);
        CHECK_INT(get_number(&f), 0);
        small = at == sizeof value;
        CHECK_INT(get_number(&f), small ? 6 : sizeof value);
        if (small) check_rest(&f, "\105hello", 6);
        else {
            size_t size = f.size - f.at;
            CHECK(size <= sizeof value - at);
            memcpy(gathered + at, f.body + f.at, size);
            at += size;
        }
    }
    CHECK(memcmp(gathered, value, sizeof value) == 0);
    PUT(&b, BYE, 0);
    raw_say(r, &b);
    raw_ack(r);
    raw_wait_closed(r);
    test_join(thread);
    raw_close(r);
    CHECK_INT(alloc_blocks(), 0);
}

/* The other way round: a dialler sends them to the next one, before others. */
static void test_a_dialler_gets_values_back(void) {
    door d = open_door();
    call c;
    frame f;
    bytes b;
    b.size = 0;
    start_call(&c, &d, 4, LONG);
    raw *r = raw_admit(&d, 4);
    test_join(c.thread);
    CHECK(c.link);
    PUT(&b, CREDIT, 0, 4, 0);
    raw_say(r, &b);
    for (int i = 1; i < 5; i++) CHECK_INT(netchan_send(c.link->send, netchan_int(i), LONG), NETCHAN_OK);
    for (int i = 1; i < 5; i++) EXPECT(r, &f, DATA, 0);
    PUT(&b, CREDIT, 0, 0, 1); /* the first is received, the others are not */
    PUT(&b, BYE, 1);
    PUT_VALUE(&b, RETURN, "\2", 0, 1);
    PUT_VALUE(&b, RETURN, "\3", 0, 1);
    PUT_VALUE(&b, RETURN, "\4", 0, 1);
    PUT(&b, ACK, r->received);
    raw_say(r, &b);
    EXPECT(r, &f, BYE, 0);
    raw_ack(r);
    raw_wait_closed(r);
    wait_acked(r, 6);
    raw_close(r);
    netchan_value v;
    CHECK_INT(netchan_recv(c.link->events, &v, LONG), NETCHAN_OK);
    netchan_clear(&v);
    CHECK_INT(netchan_recv(c.link->events, &v, LONG), NETCHAN_OK);
    CHECK_STR(netchan_as_str(netchan_get(&v, "event"), "?"), "drained");
    CHECK_INT(netchan_as_uint(netchan_get(&v, "taken"), 99), 1);
    CHECK_INT(netchan_as_uint(netchan_get(&v, "returned"), 99), 3);
    CHECK_INT(netchan_as_uint(netchan_get(&v, "unknown"), 99), 0);
    netchan_clear(&v);
    task t;
    start_send(&t, c.link->send, netchan_int(5), 1, LONG); /* behind them */
    r = raw_admit(&d, 4);
    PUT(&b, CREDIT, 0, 4, 0);
    raw_say(r, &b);
    for (uint8_t i = 2; i < 6; i++) {
        EXPECT(r, &f, DATA, 0);
        check_rest(&f, &i, 1);
    }
    CHECK_INT(end_task(&t), NETCHAN_OK);
    PUT(&b, CREDIT, 0, 0, 4);
    raw_say(r, &b);
    check_quiet(r);
    raw_close(r);
    end_call(&c, &d);
}

/* --- channel ends in values --------------------------------------------------------------------------------------- */

/* A number for an operation of the raw side. */
static uint64_t next_entry(void) {
    static uint64_t entry = 5000;
    return ++entry;
}

/* The listener receives this value. */
static netchan_value raw_give(room *m, raw *r, const bytes *value) {
    static bytes b;
    frame f;
    netchan_value got;
    uint64_t entry = next_entry();
    b.size = 0;
    put_frame(&b, OFFER, (uint64_t[]){0, entry, entry, FIRM | HERE, value->size}, 5, value->data, value->size);
    raw_say(r, &b);
    CHECK_INT(netchan_recv(m->l->recv, &got, LONG), NETCHAN_OK);
    EXPECT(r, &f, ACCEPT, entry, 0);
    return got;
}

/* The listener gets an end of a channel of the raw side. */
static netchan *raw_give_end(room *m, raw *r, unsigned flags, uint64_t id, uint64_t capacity) {
    bytes value;
    value.size = 0;
    put_end(&value, flags, id, capacity);
    netchan_value v = raw_give(m, r, &value);
    CHECK_INT(v.type, flags & RECEIVES ? NETCHAN_RECEIVER : NETCHAN_SENDER);
    netchan *ch = netchan_retain(netchan_as_chan(&v));
    netchan_clear(&v);
    return ch;
}

/* The raw side gets this value of the listener, which is in f from there on. */
static void raw_get(room *m, raw *r, frame *f, netchan_value v) {
    static bytes b;
    task t;
    uint64_t entry = next_entry();
    b.size = 0;
    PUT(&b, DEMAND, 1, entry, entry, FIRM, 0);
    raw_say(r, &b);
    check_quiet(r);
    start_send(&t, m->l->send, v, 1, LONG);
    EXPECT(r, f, CLAIM, entry);
    uint64_t match = get_number(f);
    CHECK_INT(get_number(f), FINAL);
    uint64_t size = get_number(f);
    CHECK_INT(size, f->size - f->at);
    PUT(&b, GRANT, match, 0);
    raw_say(r, &b);
    CHECK_INT(end_task(&t), NETCHAN_OK);
}

static end raw_get_end(room *m, raw *r, netchan_value v) {
    frame f;
    raw_get(m, r, &f, v);
    end e = get_end(&f);
    CHECK_INT(f.at, f.size);
    return e;
}

/* So many exports and imports has the listener with its newest peer. */
static void check_ends(room *m, size_t exports, size_t imports) {
    pthread_mutex_lock(&netchan__net_lock);
    const netchan__peer *p = &endpoint_of(m->l)->hub.sessions->peer;
    CHECK_INT(p->exports.count, exports);
    CHECK_INT(p->imports.count, imports);
    pthread_mutex_unlock(&netchan__net_lock);
}

/* Ends of channels that have their home at a foreign implementation. */
static void test_a_foreign_home(void) {
    room m = open_room();
    raw *r = raw_join(m.l->address, 0);
    bytes b;
    frame f;
    task t;
    netchan_value v;
    b.size = 0;
    netchan *send = raw_give_end(&m, r, 0, 7, 3), *recv = raw_give_end(&m, r, RECEIVES, 8, 0);
    CHECK_INT(netchan_cap(send), 3);
    CHECK_INT(netchan_cap(recv), 0);
    CHECK_INT(netchan_recv(send, NULL, LONG), NETCHAN_EINVAL);
    CHECK_INT(netchan_send(recv, netchan_int(1), LONG), NETCHAN_EINVAL);
    check_ends(&m, 0, 2);

    start_send(&t, send, netchan_str("hello"), 1, NETCHAN_FOREVER); /* the value goes with the offer */
    EXPECT(r, &f, OFFER, 7);
    uint64_t entry = get_number(&f);
    get_number(&f);
    CHECK_INT(get_number(&f), FIRM | HERE);
    CHECK_INT(get_number(&f), 6);
    check_rest(&f, "\105hello", 6);
    PUT(&b, ACCEPT, entry, 0);
    raw_say(r, &b);
    CHECK_INT(end_task(&t), NETCHAN_OK);

    start_send(&t, send, netchan_str("hello"), 2, LONG); /* a select keeps it until it is asked */
    EXPECT(r, &f, OFFER, 7);
    entry = get_number(&f);
    get_number(&f);
    CHECK_INT(get_number(&f), MULTI);
    CHECK_INT(get_number(&f), 6);
    CHECK_INT(f.at, f.size);
    PUT(&b, CLAIM, entry, 91, FINAL, 0);
    raw_say(r, &b);
    EXPECT(r, &f, GRANT, 91, 6);
    check_rest(&f, "\105hello", 6);
    PUT(&b, ACCEPT, entry, 0);
    raw_say(r, &b);
    CHECK_INT(end_task(&t), NETCHAN_OK);

    start_send(&t, send, netchan_int(5), 2, LONG); /* it may be released, and asked again */
    EXPECT(r, &f, OFFER, 7);
    entry = get_number(&f);
    PUT(&b, CLAIM, entry, 92, 0, 0);
    raw_say(r, &b);
    EXPECT(r, &f, GRANT, 92, 1);
    PUT(&b, RELEASE, entry, 92);
    PUT(&b, CLAIM, entry, 93, FINAL, 0);
    raw_say(r, &b);
    EXPECT(r, &f, GRANT, 93, 1);
    PUT(&b, CLAIM, 77777, 94, FINAL, 0); /* somebody who is gone */
    raw_say(r, &b);
    EXPECT(r, &f, DECLINE, 94, 0);
    PUT(&b, ACCEPT, entry, 0);
    raw_say(r, &b);
    CHECK_INT(end_task(&t), NETCHAN_OK);

    start_recv(&t, recv, 1, LONG); /* the value comes with the claim */
    EXPECT(r, &f, DEMAND, 8);
    entry = get_number(&f);
    get_number(&f);
    CHECK_INT(get_number(&f), 0);
    get_number(&f); /* size */
    CHECK_INT(f.at, f.size);
    PUT_VALUE(&b, CLAIM, "\105hello", entry, 95, FINAL, 6);
    raw_say(r, &b);
    EXPECT(r, &f, GRANT, 95, 0);
    check_hello(&t);

    start_recv(&t, recv, 2, LONG); /* or with COMMIT */
    EXPECT(r, &f, DEMAND, 8);
    entry = get_number(&f);
    PUT(&b, CLAIM, entry, 96, 0, 6);
    raw_say(r, &b);
    EXPECT(r, &f, GRANT, 96, 0);
    PUT_VALUE(&b, COMMIT, "\105hello", entry, 96, REDELIVERED, 6);
    raw_say(r, &b);
    EXPECT(r, &f, TAKEN, 96);
    check_hello(&t);
    CHECK(t.c[0].redelivered);

    CHECK_INT(netchan_recv(recv, &v, SHORT), NETCHAN_ETIMEDOUT);
    EXPECT(r, &f, DEMAND, 8);
    entry = get_number(&f);
    EXPECT(r, &f, WITHDRAW, entry);
    start_recv(&t, recv, 1, 0); /* a try */
    EXPECT(r, &f, DEMAND, 8);
    entry = get_number(&f);
    get_number(&f);
    CHECK_INT(get_number(&f), TRY);
    PUT(&b, WITHDRAWN, entry);
    raw_say(r, &b);
    CHECK_INT(end_task(&t), NETCHAN_ETIMEDOUT);

    start_recv(&t, recv, 1, LONG); /* those who could send are lost: that concerns this call only */
    EXPECT(r, &f, DEMAND, 8);
    PUT(&b, ACCEPT, get_number(&f), 12);
    raw_say(r, &b);
    CHECK_INT(end_task(&t), NETCHAN_ELOST);
    start_send(&t, send, netchan_int(1), 1, NETCHAN_FOREVER);
    EXPECT(r, &f, OFFER, 7);
    PUT(&b, ACCEPT, get_number(&f), 10);
    raw_say(r, &b);
    CHECK_INT(end_task(&t), NETCHAN_ETOOBIG);

    v = netchan_sender(send); /* what comes home is named as the other side's */
    raw_get(&m, r, &f, v);
    end e = get_end(&f);
    CHECK_INT(e.flags, YOURS);
    CHECK_INT(e.id, 7);

    netchan *again = raw_give_end(&m, r, 0, 7, 3); /* the same number is the same end */
    CHECK(again == send);
    netchan_free(again);
    check_quiet(r);
    netchan_free(send);
    EXPECT(r, &f, DROP, 7, 2, 0);
    netchan_free(recv);
    EXPECT(r, &f, DROP, 8, 1, 0);
    check_ends(&m, 0, 0);
    again = raw_give_end(&m, r, RECEIVES, 7, 0); /* and then it is free for another */
    netchan_free(again);
    EXPECT(r, &f, DROP, 7, 1, 0);
    check_quiet(r);
    raw_close(r);
    check_good(&m);
    close_room(&m);
}

/* What a foreign home says of its channels. */
static void test_a_foreign_home_closes(void) {
    static const struct {
        unsigned flags, type;
        int result;
        bool sends;
    } ends[] = {
        {0, CLOSING, NETCHAN_ECLOSED, true},
        {RECEIVES, CLOSED, NETCHAN_ECLOSED, false},
        {0, GONE, NETCHAN_ELOST, true},
        {RECEIVES, GONE, NETCHAN_ELOST, false},
        {IS_CLOSING, 0, NETCHAN_ECLOSED, true}, /* or says with the name */
        {RECEIVES | IS_CLOSING | IS_CLOSED, 0, NETCHAN_ECLOSED, false},
        {IS_GONE, 0, NETCHAN_ELOST, true},
        {RECEIVES | IS_GONE, 0, NETCHAN_ELOST, false},
    };
    room m = open_room();
    raw *r = raw_join(m.l->address, 0);
    frame f;
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        bytes b;
        task t;
        bool sends = ends[i].sends;
        netchan *ch = raw_give_end(&m, r, ends[i].flags, 20 + i, 0);
        b.size = 0;
        if (ends[i].type) {
            if (sends) start_send(&t, ch, netchan_int(1), 1, LONG);
            else start_recv(&t, ch, 1, LONG);
            EXPECT(r, &f, sends ? OFFER : DEMAND, 20 + i);
            uint64_t entry = get_number(&f);
            put_frame(&b, ends[i].type, (uint64_t[]){20 + i}, 1, NULL, 0);
            raw_say(r, &b);
            CHECK_INT(end_task(&t), ends[i].result);
            EXPECT(r, &f, WITHDRAW, entry);
        }
        for (int n = 0; n < 2; n++) { /* from now on, without asking */
            int timeout = n ? LONG : NETCHAN_NOWAIT;
            int result = sends ? netchan_send(ch, netchan_int(1), timeout) : netchan_recv(ch, NULL, timeout);
            CHECK_INT(result, ends[i].result);
        }
        if (sends) CHECK_INT(netchan_close(ch), ends[i].result == NETCHAN_ECLOSED ? NETCHAN_ECLOSED : NETCHAN_OK);
        if (sends && ends[i].result == NETCHAN_ELOST) EXPECT(r, &f, CLOSE, 20 + i);
        netchan_free(ch);
        EXPECT(r, &f, DROP, 20 + i, 1);
        if (ends[i].type) put_frame(&b, ends[i].type, (uint64_t[]){20 + i}, 1, NULL, 0); /* too late: no harm */
        raw_say(r, &b);
        check_quiet(r);
    }
    netchan *ch = raw_give_end(&m, r, 0, 40, 0); /* this side closes it */
    CHECK_INT(netchan_close(ch), NETCHAN_OK);
    CHECK_INT(netchan_close(ch), NETCHAN_ECLOSED);
    EXPECT(r, &f, CLOSE, 40);
    netchan_free(ch);
    EXPECT(r, &f, DROP, 40, 1, 0);
    raw_close(r);
    check_good(&m);
    close_room(&m);
}

/* A foreign implementation has ends of channels of this process. */
static void test_foreign_ends(void) {
    room m = open_room();
    raw *r = raw_join(m.l->address, 0);
    bytes b, value;
    frame f;
    task t;
    netchan_value v;
    netchan *ch = netchan_make(2);
    b.size = 0;
    end s = raw_get_end(&m, r, netchan_sender(ch)), e = raw_get_end(&m, r, netchan_receiver(ch));
    CHECK_INT(s.flags, 0);
    CHECK_INT(e.flags, RECEIVES);
    CHECK_INT(s.capacity, 2);
    CHECK(s.id >= 2 && e.id >= 2 && s.id != e.id);
    check_ends(&m, 2, 0);

    PUT_VALUE(&b, OFFER, "\105hello", s.id, 1, 1, FIRM | HERE, 6); /* into the buffer */
    raw_say(r, &b);
    EXPECT(r, &f, ACCEPT, 1, 0);
    CHECK_INT(netchan_len(ch), 1);
    PUT(&b, DEMAND, e.id, 2, 2, 0, 0); /* and out of it */
    raw_say(r, &b);
    EXPECT(r, &f, CLAIM, 2);
    uint64_t match = get_number(&f);
    CHECK_INT(get_number(&f), FINAL | UNHURRIED); /* its send is over */
    CHECK_INT(get_number(&f), 6);
    check_rest(&f, "\105hello", 6);
    PUT(&b, GRANT, match, 0);
    PUT(&b, OFFER, s.id, 3, 3, MULTI, 6); /* asked for */
    raw_say(r, &b);
    EXPECT(r, &f, CLAIM, 3);
    match = get_number(&f);
    CHECK_INT(get_number(&f), FINAL);
    PUT_VALUE(&b, GRANT, "\105hello", match, 6);
    raw_say(r, &b);
    EXPECT(r, &f, ACCEPT, 3, 0);
    start_recv(&t, ch, 1, LONG);
    check_hello(&t);
    netchan_peer from;
    PUT_VALUE(&b, OFFER, "\5", s.id, 4, 4, FIRM | HERE, 1);
    raw_say(r, &b);
    EXPECT(r, &f, ACCEPT, 4, 0);
    CHECK_INT(netchan_recvfrom(ch, &v, &from, LONG), NETCHAN_OK);
    CHECK_INT(netchan_as_int(&v, 0), 5);
    CHECK(from.id != 0);

    PUT(&b, DEMAND, e.id, 5, 5, 0, 3); /* it takes no value over 3 bytes */
    raw_say(r, &b);
    CHECK_INT(netchan_send(ch, netchan_str("hello"), LONG), NETCHAN_OK);
    check_quiet(r);
    start_recv(&t, ch, 1, LONG);
    check_hello(&t);
    CHECK_INT(netchan_send(ch, netchan_int(6), LONG), NETCHAN_OK);
    EXPECT(r, &f, CLAIM, 5);
    PUT(&b, GRANT, get_number(&f), 0);
    raw_say(r, &b);

    value.size = 0; /* it comes home: the channel again, without having been asked for */
    put_end(&value, YOURS, s.id, 0);
    v = raw_give(&m, r, &value);
    CHECK_INT(v.type, NETCHAN_SENDER);
    CHECK(netchan_as_chan(&v) == ch);
    netchan_clear(&v);

    PUT(&b, DEMAND, e.id, 6, 6, FIRM, 0);
    PUT(&b, CLOSE, s.id);
    raw_say(r, &b);
    EXPECT(r, &f, CLOSING, s.id);
    EXPECT(r, &f, CLOSED, e.id);
    CHECK_INT(netchan_close(ch), NETCHAN_ECLOSED);
    CHECK_INT(netchan_recv(ch, NULL, LONG), NETCHAN_ECLOSED);
    PUT(&b, CLOSE, s.id); /* twice is no breach: somebody else may have been quicker */
    PUT(&b, OFFER, s.id, 7, 7, 0, 1); /* who had not heard yet */
    PUT_VALUE(&b, OFFER, "\5", s.id, 8, 8, FIRM | HERE, 1);
    raw_say(r, &b);
    do next_frame(r, &f, ACCEPT);
    while (f.type == ACCEPT && get_number(&f) == 7); /* may be told */
    CHECK_INT(f.type, ACCEPT);
    CHECK_INT(get_number(&f), 1); /* ECLOSED */
    netchan_free(ch);
    check_ends(&m, 2, 0);
    PUT(&b, DROP, s.id, 1, 0);
    PUT(&b, DROP, e.id, 1, 0);
    raw_say(r, &b);
    check_quiet(r);
    check_ends(&m, 0, 0);
    raw_close(r);
    check_good(&m);
    close_room(&m);
}

/* An end that was named again while it was dropped is still there. */
static void test_drops(void) {
    room m = open_room();
    raw *r = raw_join(m.l->address, 0);
    bytes b;
    frame f;
    task t;
    netchan *ch = netchan_make(0), *lost = netchan_make(0);
    b.size = 0;
    end e = raw_get_end(&m, r, netchan_sender(ch));
    end again = raw_get_end(&m, r, netchan_sender(ch));
    CHECK_INT(e.id, again.id);
    PUT(&b, DROP, e.id, 1, 0); /* only the first was read when this was said */
    raw_say(r, &b);
    check_quiet(r);
    check_ends(&m, 1, 0);
    PUT_VALUE(&b, OFFER, "\5", e.id, 1, 1, FIRM | HERE, 1);
    raw_say(r, &b);
    CHECK_INT(netchan_recv(ch, NULL, LONG), NETCHAN_OK);
    EXPECT(r, &f, ACCEPT, 1, 0);
    PUT(&b, DROP, e.id, 1, 0);
    raw_say(r, &b);
    check_quiet(r);
    check_ends(&m, 0, 0);
    CHECK_INT(netchan_recv(ch, NULL, SHORT), NETCHAN_ETIMEDOUT); /* it lost nobody */
    again = raw_get_end(&m, r, netchan_sender(ch));
    CHECK(again.id != e.id);

    e = raw_get_end(&m, r, netchan_sender(lost)); /* others had it and were lost */
    start_recv(&t, lost, 1, LONG);
    PUT(&b, DROP, e.id, 1, 1);
    raw_say(r, &b);
    CHECK_INT(end_task(&t), NETCHAN_ELOST);

    netchan_value two[2] = {netchan_receiver(lost), netchan_receiver(lost)}; /* twice in one value */
    raw_get(&m, r, &f, netchan_array(two, 2));
    check_ends(&m, 2, 0);
    f.at += 3; /* an array of two */
    e = get_end(&f);
    CHECK_INT(get_end(&f).id, e.id);
    PUT(&b, DROP, e.id, 2, 0);
    raw_say(r, &b);
    check_quiet(r);
    check_ends(&m, 1, 0);
    raw_close(r);
    netchan_free(ch);
    netchan_free(lost);
    check_good(&m);
    close_room(&m);
}

/* Says all of b, and the session is over for this reason. */
static void check_breach(room *m, raw *r, bytes *b, const char *reason) {
    raw_send(r, b->data, b->size);
    b->size = 0;
    raw_wait_closed(r);
    raw_close(r);
    wait_event(m->l, "lost", reason);
    check_good(m);
}

/* An OFFER of a value with this in it. */
static void put_offer(bytes *b, const bytes *value) {
    uint64_t entry = next_entry();
    put_frame(b, OFFER, (uint64_t[]){0, entry, entry, FIRM | HERE, value->size}, 5, value->data, value->size);
}

static void test_lies_about_ends(void) {
    netchan_options o = options();
    o.max_ends = 5;
    room m = open_room_with(&o);
    netchan *ch = netchan_make(0);
    for (int i = 0; i < 21; i++) {
        raw *r = raw_join(m.l->address, 0);
        bytes b, value;
        const char *reason = "";
        b.size = value.size = 0;
        end e = {0, 0, 0};
        if (i < 6) e = raw_get_end(&m, r, netchan_sender(ch));
        if (i == 0) PUT(&b, DROP, e.id, 2, 0), reason = "dropped";
        if (i == 1) PUT(&b, DROP, e.id, 0, 0), reason = "dropped";
        if (i == 2) PUT(&b, DROP, e.id + 1, 1, 0), reason = "dropped";
        if (i == 3) put_end(&value, YOURS, e.id + 1, 0), reason = "does not have"; /* never given */
        if (i == 4) put_end(&value, YOURS | RECEIVES, e.id, 0), reason = "does not have"; /* not that way */
        if (i == 5) { /* dropped, and then used */
            PUT(&b, DROP, e.id, 1, 0);
            put_end(&value, YOURS, e.id, 0), reason = "does not have";
        }
        if (i == 6) put_end(&value, YOURS, 0, 0), reason = "does not have";
        if (i == 7) put_end(&value, 0, 0, 0);
        if (i == 8) put_end(&value, 0, 1, 0);
        if (i == 9) put_end(&value, 0, 9, (uint64_t)1 << 63);
        if (i == 10) put_end(&value, 0, 9, UINT64_MAX);
        if (i == 11 || i == 12) { /* a name of another size */
            put_byte(&value, 0x8a);
            put_number(&value, i == 11 ? 16 : 18);
            for (int k = 0; k < (i == 11 ? 16 : 18); k++) put_byte(&value, k == 1 ? 9 : 0);
            reason = "malformed";
        }
        if (i == 13) put_byte(&value, 0x8a), put_number(&value, NAME), put_byte(&value, 0), reason = "malformed";
        if (i == 14) { /* the same number, turned round */
            put_byte(&value, 0x88), put_number(&value, 1 + 2 * (2 + NAME)), put_number(&value, 2);
            put_end(&value, 0, 9, 0);
            put_end(&value, RECEIVES, 9, 0);
            reason = "turned";
        }
        if (i == 15) { /* more than twice max_ends, in one value */
            put_byte(&value, 0x88), put_number(&value, 1 + 11 * (2 + NAME)), put_number(&value, 11);
            for (unsigned k = 0; k < 11; k++) put_end(&value, 0, 9 + k, 0);
            reason = "max_ends";
        }
        if (i == 16) { /* or one by one, which nobody receives */
            for (unsigned k = 0; k < 11; k++) {
                value.size = 0;
                put_end(&value, k % 2 ? RECEIVES : 0, 9 + k, 0);
                if (k < 10) put_offer(&b, &value);
            }
            reason = "max_ends";
        }
        if (i == 17) PUT(&b, OFFER, 2, 1, 1, 0, 1), reason = "does not exist"; /* what nobody gave it */
        if (i == 18) PUT(&b, DEMAND, 2, 1, 1, 0, 0), reason = "does not exist";
        if (i == 19) PUT(&b, CLOSE, 2), reason = "closed";
        if (i == 20) { /* an offer within a value that is not wanted any more: the ends are freed */
            put_end(&value, 0, 9, 0);
            put_offer(&b, &value);
            value.size = 0;
            PUT(&b, GRANT, 77, 0), reason = "granted";
        }
        if (value.size) put_offer(&b, &value);
        check_breach(&m, r, &b, reason);
    }
    netchan_free(ch);
    close_room(&m);
}

/* Values that wait on a channel of this process, and whose taker may have been lost behind who relays. */
static void test_declined_by_a_relay(void) {
    room m = open_room();
    raw *r = raw_join_first(m.l->address);
    bytes b;
    frame f;
    task t;
    netchan *ch = netchan_make(0), *buffered = netchan_make(1);
    b.size = 0;
    end e = raw_get_end(&m, r, netchan_receiver(ch)), e2 = raw_get_end(&m, r, netchan_receiver(buffered));
    for (uint64_t unknown = 0; unknown < 2; unknown++) {
        uint64_t entry = 10 + 10 * unknown;
        PUT(&b, DEMAND, e.id, entry, 1, 0, 0); /* a claim that carries the value */
        raw_say(r, &b);
        start_send(&t, ch, netchan_str("hello"), 1, LONG);
        EXPECT(r, &f, CLAIM, entry);
        uint64_t match = get_number(&f);
        CHECK_INT(get_number(&f), FINAL);
        PUT(&b, DECLINE, match, unknown);
        if (!unknown) PUT(&b, DEMAND, e.id, entry + 1, 2, FIRM, 0);
        raw_say(r, &b);
        if (!unknown) { /* it has certainly not got it: the next gets it */
            EXPECT(r, &f, CLAIM, entry + 1);
            PUT(&b, GRANT, get_number(&f), 0);
            raw_say(r, &b);
        }
        CHECK_INT(end_task(&t), unknown ? NETCHAN_EUNKNOWN : NETCHAN_OK);

        PUT(&b, DEMAND, e.id, entry + 2, 3, MULTI, 0); /* a value that was committed */
        raw_say(r, &b);
        start_send(&t, ch, netchan_str("hello"), 2, LONG);
        EXPECT(r, &f, CLAIM, entry + 2);
        match = get_number(&f);
        CHECK_INT(get_number(&f), 0);
        PUT(&b, GRANT, match, 0);
        raw_say(r, &b);
        EXPECT(r, &f, COMMIT, entry + 2, match);
        PUT(&b, DECLINE, match, unknown);
        if (!unknown) PUT(&b, DEMAND, e.id, entry + 3, 4, FIRM, 0);
        raw_say(r, &b);
        if (!unknown) {
            EXPECT(r, &f, CLAIM, entry + 3);
            PUT(&b, GRANT, get_number(&f), 0);
            raw_say(r, &b);
        }
        CHECK_INT(end_task(&t), unknown ? NETCHAN_EUNKNOWN : NETCHAN_OK);

        CHECK_INT(netchan_send(buffered, netchan_str("hello"), LONG), NETCHAN_OK); /* from a buffer */
        PUT(&b, DEMAND, e2.id, entry + 4, 5, 0, 0);
        raw_say(r, &b);
        EXPECT(r, &f, CLAIM, entry + 4);
        PUT(&b, DECLINE, get_number(&f), unknown);
        raw_say(r, &b);
        start_recv(&t, buffered, 1, LONG);
        check_hello(&t);
        CHECK_INT(t.c[0].redelivered, unknown);
    }
    check_quiet(r);
    raw_close(r);
    netchan_free(ch);
    netchan_free(buffered);
    check_good(&m);
    netchan_report report;
    CHECK_INT(netchan_hangup(m.good, NULL), NETCHAN_OK);
    CHECK_INT(netchan_hangup(m.l, &report), NETCHAN_ETIMEDOUT);
    CHECK_INT(report.unknown, 2); /* those whose sends said so */
    CHECK_INT(alloc_blocks(), 0);
}

/* A frame with flags that say who it is from. */
static void put_relayed(bytes *b, unsigned type, uint64_t channel, uint64_t entry, uint64_t op, unsigned process) {
    bytes body;
    body.size = 0;
    put_number(&body, channel);
    put_number(&body, entry);
    put_number(&body, op);
    put_number(&body, RELAYED_FLAG | MULTI);
    for (int i = 0; i < 16; i++) put_byte(&body, process);
    put_number(&body, type == OFFER ? 1 : 0);
    put_frame(b, type, NULL, 0, body.data, body.size);
}

/* Operations are told apart by their process, not by who relays them: two cases of one never serve each other. */
static void test_relayed_operations(void) {
    room m = open_room();
    raw *r = raw_join(m.l->address, 0);
    bytes b;
    frame f;
    netchan *ch = netchan_make(0);
    b.size = 0;
    end s = raw_get_end(&m, r, netchan_sender(ch)), e = raw_get_end(&m, r, netchan_receiver(ch));
    put_relayed(&b, OFFER, s.id, 1, 7, 0x55);
    put_relayed(&b, DEMAND, e.id, 2, 7, 0x55);
    raw_say(r, &b);
    check_quiet(r);
    put_relayed(&b, DEMAND, e.id, 3, 7, 0x44); /* smaller, so it is asked first */
    raw_say(r, &b);
    EXPECT(r, &f, CLAIM, 3);
    uint64_t match = get_number(&f);
    CHECK_INT(get_number(&f), 0);
    PUT(&b, GRANT, match, 0);
    raw_say(r, &b);
    EXPECT(r, &f, CLAIM, 1, match, FINAL);
    PUT_VALUE(&b, GRANT, "\5", match, 1);
    raw_say(r, &b);
    EXPECT(r, &f, COMMIT, 3, match, 0, 1);
    check_rest(&f, "\5", 1);
    PUT(&b, TAKEN, match);
    raw_say(r, &b);
    EXPECT(r, &f, ACCEPT, 1, 0);
    put_relayed(&b, OFFER, s.id, 4, 7, 0x66); /* larger than the one that waits still */
    raw_say(r, &b);
    EXPECT(r, &f, CLAIM, 2);
    PUT(&b, DECLINE, get_number(&f), 0);
    raw_say(r, &b);
    check_quiet(r);
    put_frame(&b, OFFER, (uint64_t[]){s.id, 9, 9, RELAYED_FLAG}, 4, "123456789012345", 15);
    check_breach(&m, r, &b, "cut off");
    netchan_free(ch);
    close_room(&m);
}

/* One raw side has a channel, another an end of it, and this process is between them. */
static void test_a_relay_between_foreigners(void) {
    room m = open_room();
    raw *home = raw_join(m.l->address, 0), *user;
    bytes b;
    frame f;
    task t;
    b.size = 0;
    netchan *send = raw_give_end(&m, home, 0, 7, 0), *recv = raw_give_end(&m, home, RECEIVES, 8, 0);
    user = raw_join(m.l->address, 0);
    end s = raw_get_end(&m, user, netchan_sender(send)), e = raw_get_end(&m, user, netchan_receiver(recv));
    CHECK_INT(s.flags, FAR);
    CHECK_INT(e.flags, FAR | RECEIVES);

    PUT(&b, OFFER, s.id, 1, 17, 0, 6); /* a send: claimed, granted, accepted */
    raw_say(user, &b);
    EXPECT(home, &f, OFFER, 7);
    uint64_t entry = get_number(&f);
    CHECK_INT(get_number(&f), 17);
    CHECK_INT(get_number(&f), RELAYED_FLAG);
    for (int i = 0; i < 16; i++) CHECK_INT(f.body[f.at++], 0xee);
    CHECK_INT(get_number(&f), 6);
    CHECK_INT(f.at, f.size);
    PUT(&b, CLAIM, entry, 33, FINAL, 0);
    raw_say(home, &b);
    EXPECT(user, &f, CLAIM, 1);
    PUT_VALUE(&b, GRANT, "\105hello", get_number(&f), 6);
    raw_say(user, &b);
    EXPECT(home, &f, GRANT, 33, 6);
    check_rest(&f, "\105hello", 6);
    PUT(&b, ACCEPT, entry, 0);
    raw_say(home, &b);
    EXPECT(user, &f, ACCEPT, 1, 0);

    put_relayed(&b, DEMAND, e.id, 2, 18, 0x12); /* a receive, of somebody behind it */
    raw_say(user, &b);
    EXPECT(home, &f, DEMAND, 8);
    entry = get_number(&f);
    CHECK_INT(get_number(&f), 18);
    CHECK_INT(get_number(&f), RELAYED_FLAG | MULTI);
    for (int i = 0; i < 16; i++) CHECK_INT(f.body[f.at++], 0x12);
    PUT(&b, CLAIM, entry, 34, 0, 6);
    raw_say(home, &b);
    EXPECT(user, &f, CLAIM, 2);
    uint64_t match = get_number(&f);
    CHECK_INT(get_number(&f), 0);
    CHECK_INT(get_number(&f), 6);
    PUT(&b, GRANT, match, 0);
    raw_say(user, &b);
    EXPECT(home, &f, GRANT, 34, 0);
    PUT(&b, RELEASE, entry, 34);
    PUT(&b, CLAIM, entry, 35, 0, 6);
    raw_say(home, &b);
    EXPECT(user, &f, RELEASE, 2, match);
    EXPECT(user, &f, CLAIM, 2);
    match = get_number(&f);
    PUT(&b, GRANT, match, 0);
    raw_say(user, &b);
    EXPECT(home, &f, GRANT, 35, 0);
    PUT_VALUE(&b, COMMIT, "\105hello", entry, 35, REDELIVERED, 6);
    raw_say(home, &b);
    EXPECT(user, &f, COMMIT, 2, match, REDELIVERED, 6);
    check_rest(&f, "\105hello", 6);
    PUT(&b, TAKEN, match);
    raw_say(user, &b);
    EXPECT(home, &f, TAKEN, 35);

    PUT(&b, DEMAND, e.id, 3, 19, TRY, 0); /* what comes to nothing */
    PUT(&b, DEMAND, e.id, 4, 20, 0, 0);
    PUT(&b, WITHDRAW, 4);
    raw_say(user, &b);
    EXPECT(home, &f, DEMAND, 8);
    entry = get_number(&f);
    EXPECT(home, &f, DEMAND, 8);
    uint64_t other = get_number(&f);
    EXPECT(home, &f, WITHDRAW, other);
    PUT(&b, WITHDRAWN, entry);
    raw_say(home, &b);
    EXPECT(user, &f, WITHDRAWN, 3);

    PUT(&b, DEMAND, e.id, 5, 21, 0, 0); /* claimed, and over */
    raw_say(user, &b);
    EXPECT(home, &f, DEMAND, 8);
    PUT_VALUE(&b, CLAIM, "\5", get_number(&f), 36, FINAL, 1);
    raw_say(home, &b);
    EXPECT(user, &f, CLAIM, 5);
    PUT(&b, DECLINE, get_number(&f), 0);
    raw_say(user, &b);
    EXPECT(home, &f, DECLINE, 36, 0);

    start_send(&t, send, netchan_int(1), 1, NETCHAN_FOREVER); /* our own go as ever */
    EXPECT(home, &f, OFFER, 7);
    entry = get_number(&f);
    get_number(&f);
    CHECK_INT(get_number(&f), FIRM | HERE);
    PUT(&b, ACCEPT, entry, 0);
    raw_say(home, &b);
    CHECK_INT(end_task(&t), NETCHAN_OK);

    PUT(&b, CLOSE, s.id); /* closed from the far end */
    raw_say(user, &b);
    EXPECT(home, &f, CLOSE, 7);
    EXPECT(user, &f, CLOSING, s.id);
    PUT(&b, DEMAND, e.id, 6, 22, FIRM, 0);
    raw_say(user, &b);
    EXPECT(home, &f, DEMAND, 8);
    entry = get_number(&f);
    PUT_VALUE(&b, CLAIM, "\5", entry, 37, FINAL, 1); /* who has it when the user is lost? */
    raw_say(home, &b);
    EXPECT(user, &f, CLAIM, 6);
    raw_close(user);
    wait_event(m.l, "lost", "did not come back");
    EXPECT(home, &f, DECLINE, 37, 1);
    check_quiet(home);

    user = raw_join(m.l->address, 0);
    e = raw_get_end(&m, user, netchan_receiver(recv));
    PUT(&b, DEMAND, e.id, 1, 1, FIRM, 0);
    raw_say(user, &b);
    EXPECT(home, &f, DEMAND, 8);
    netchan_free(send);
    EXPECT(home, &f, DROP, 7, 1, 1); /* the user had it, and was lost */
    raw_close(home);
    EXPECT(user, &f, ACCEPT, 1, 12); /* ELOST */
    EXPECT(user, &f, GONE, e.id);
    netchan_free(recv);
    PUT_VALUE(&b, OFFER, "\5", s.id, 9, 9, FIRM | HERE, 1);
    check_breach(&m, user, &b, "does not exist");
    close_room(&m);
}

/* The receiving end of a link is passed on while values come early. Those that are on their way are received here,
 * before newer ones. */
static void test_early_values_and_a_relay(void) {
    door d = open_door();
    room m = open_room();
    call c;
    frame f;
    task t;
    rooms q;
    bytes b;
    b.size = 0;
    raw *r = call_early(&c, &d, &q);
    raw *third = raw_join(m.l->address, 0);
    end e = raw_get_end(&m, third, netchan_receiver(c.link->recv));
    uint64_t entry = demand(r, &q, &t, c.link->recv);
    PUT(&b, DEMAND, e.id, 7, 7, 0, 0);
    raw_say(third, &b);
    check_quiet(third);
    claim_with(r, &q, q.entries[0], 1);
    claim_with(r, &q, entry, 2);
    do next_frame(r, &f, GRANT);
    while (f.type != GRANT);
    CHECK_INT(get_number(&f), q.match - 1);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    CHECK_INT(netchan_as_int(&t.got, -1), 1);
    raw_close(third);
    raw_close(r);
    netchan_hangup(c.link, NULL);
    close(d.fd);
    close_room(&m);
}

/* Early values went back, and home has not said yet that it knows: a try of who got the end is answered when there is
 * no link, and no session any more. */
static void test_a_relayed_try_after_early_values(void) {
    for (int over = 0; over < 2; over++) {
        door d = open_door();
        room m = open_room();
        call c;
        frame f;
        rooms q;
        bytes b;
        b.size = 0;
        raw *r = call_early(&c, &d, &q);
        raw *third = raw_join(m.l->address, 0);
        claim_with(r, &q, q.entries[0], 7);
        for (size_t i = 1; i < q.count; i++) EXPECT(r, &f, WITHDRAW, q.entries[i]);
        EXPECT(r, &f, DECLINE, q.match, 0);
        end e = raw_get_end(&m, third, netchan_receiver(c.link->recv));
        if (!over) {
            raw_close(r);
            wait_event(c.link, "down", "");
        }
        PUT(&b, DEMAND, e.id, 7, 7, TRY, 0);
        raw_say(third, &b);
        if (over) {
            check_quiet(third);
            put_frame(&b, REFUSED, (uint64_t[]){0}, 1, (const uint8_t *)"over", 4);
            raw_say(r, &b);
            close(d.fd); /* there is no other session */
            wait_event(c.link, "lost", "over");
        }
        EXPECT(third, &f, WITHDRAWN, 7);
        if (over) raw_close(r);
        else close(d.fd);
        raw_close(third);
        netchan_hangup(c.link, NULL);
        close_room(&m);
    }
}

/* Who relays is sent no value with an offer; and takes none. */
static void test_values_and_relays(void) {
    room m = open_room();
    raw *home = raw_join(m.l->address, 0), *user;
    bytes b;
    frame f;
    task t;
    b.size = 0;
    netchan *send = raw_give_end(&m, home, FAR, 7, 0);
    start_send(&t, send, netchan_str("hello"), 1, NETCHAN_FOREVER);
    EXPECT(home, &f, OFFER, 7);
    uint64_t entry = get_number(&f);
    get_number(&f);
    CHECK_INT(get_number(&f), FIRM);
    CHECK_INT(get_number(&f), 6);
    CHECK_INT(f.at, f.size);
    PUT(&b, CLAIM, entry, 5, FINAL, 0);
    raw_say(home, &b);
    EXPECT(home, &f, GRANT, 5, 6);
    check_rest(&f, "\105hello", 6);
    PUT(&b, ACCEPT, entry, 0);
    raw_say(home, &b);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    user = raw_join(m.l->address, 0);
    end s = raw_get_end(&m, user, netchan_sender(send));
    CHECK_INT(s.flags, FAR);
    PUT_VALUE(&b, OFFER, "\5", s.id, 9, 9, FIRM | HERE, 1);
    check_breach(&m, user, &b, "does not exist");
    check_quiet(home);
    netchan_free(send);
    raw_close(home);
    close_room(&m);
}

/* A question for a name, and the answer. */
static void put_import(bytes *b, uint64_t number, unsigned flags, const char *name, size_t size) {
    put_frame(b, IMPORT, (uint64_t[]){number, flags}, 2, name, size);
}

static void test_names_that_are_asked_for(void) {
    static char longest[256];
    room m = open_room();
    raw *r = raw_join(m.l->address, 0);
    bytes b;
    frame f;
    netchan *ch = netchan_make(4);
    memset(longest, 'x', 255);
    b.size = 0;
    CHECK_INT(netchan_export(m.l, "jobs", ch, NETCHAN_SENDER), NETCHAN_OK);
    put_import(&b, 1, 0, "jobs", 4);
    raw_say(r, &b);
    EXPECT(r, &f, IMPORTED, 1, 0);
    end e = get_name(&f);
    CHECK_INT(f.at, f.size);
    CHECK_INT(e.flags, 0);
    CHECK_INT(e.capacity, 4);
    PUT_VALUE(&b, OFFER, "\5", e.id, 1, 1, FIRM | HERE, 1);
    raw_say(r, &b);
    EXPECT(r, &f, ACCEPT, 1, 0);
    put_import(&b, 2, RECEIVES, "jobs", 4); /* not that way */
    put_import(&b, 3, TRY, "job", 3);       /* no such name */
    put_import(&b, 4, TRY, "jobss", 5);
    put_import(&b, 5, TRY, "jobs", 4); /* the same end */
    raw_say(r, &b);
    EXPECT(r, &f, IMPORTED, 2, 2);
    CHECK_INT(f.at, f.size);
    EXPECT(r, &f, IMPORTED, 3, 1);
    EXPECT(r, &f, IMPORTED, 4, 1);
    EXPECT(r, &f, IMPORTED, 5, 0);
    CHECK_INT(get_name(&f).id, e.id);
    put_import(&b, 6, RECEIVES, longest, 255); /* they wait; one gives up */
    put_import(&b, 7, RECEIVES, "later", 5);
    put_import(&b, 8, RECEIVES, "later", 5);
    PUT(&b, FORGET, 7);
    PUT(&b, FORGET, 99);
    raw_say(r, &b);
    check_quiet(r);
    CHECK_INT(netchan_export(m.l, "later", ch, NETCHAN_RECEIVER), NETCHAN_OK);
    EXPECT(r, &f, IMPORTED, 8, 0);
    end later = get_name(&f);
    CHECK_INT(later.flags, RECEIVES);
    CHECK_INT(netchan_export(m.l, longest, ch, NETCHAN_SENDER), NETCHAN_OK);
    EXPECT(r, &f, IMPORTED, 6, 2);
    check_quiet(r);

    CHECK_INT(netchan_unexport(m.l, "jobs"), NETCHAN_OK); /* taken back */
    EXPECT(r, &f, GONE, e.id);
    PUT_VALUE(&b, OFFER, "\5", e.id, 2, 2, FIRM | HERE, 1); /* who had not heard yet */
    put_import(&b, 9, TRY, "jobs", 4);
    PUT(&b, CLOSE, e.id);
    raw_say(r, &b);
    EXPECT(r, &f, ACCEPT, 2, 12); /* ELOST */
    EXPECT(r, &f, IMPORTED, 9, 1);
    check_quiet(r);
    CHECK_INT(netchan_len(ch), 1);
    CHECK_INT(netchan_send(ch, netchan_int(1), NETCHAN_NOWAIT), NETCHAN_OK); /* it is not closed */
    PUT(&b, DROP, e.id, 2, 0);
    raw_say(r, &b);
    CHECK_INT(netchan_export(m.l, "jobs", ch, NETCHAN_SENDER), NETCHAN_OK);
    put_import(&b, 10, 0, "jobs", 4);
    raw_say(r, &b);
    EXPECT(r, &f, IMPORTED, 10, 0);
    CHECK(get_name(&f).id != e.id);
    for (int i = 0; i < 3; i++) {
        const char *reason = "name";
        if (i == 0) put_import(&b, 11, 0, "", 0);
        if (i == 1) put_import(&b, 12, 0, longest, 256); /* with its NUL */
        if (i == 2) put_import(&b, 13, 0, "a\0b", 3);
        if (i) r = raw_join(m.l->address, 0);
        check_breach(&m, r, &b, reason);
    }
    netchan_free(ch);
    close_room(&m);
}

typedef struct asking {
    netchan_link *link;
    const char *name;
    enum netchan_type type;
    int timeout_ms, result;
    netchan *ch;
} asking;

static void *run_asking(void *arg) {
    asking *a = (asking *)arg;
    a->result = netchan_import(a->link, a->name, a->type, &a->ch, a->timeout_ms);
    return NULL;
}

static pthread_t start_asking(asking *a, netchan_link *link, const char *name, enum netchan_type type, int timeout_ms) {
    asking all = {link, name, type, timeout_ms, 99, NULL};
    *a = all;
    return test_start(run_asking, a);
}

static void put_imported(bytes *b, uint64_t number, unsigned answer, unsigned flags, uint64_t id) {
    bytes name;
    name.size = 0;
    if (answer == 0) put_name(&name, flags, id, 0);
    put_frame(b, IMPORTED, (uint64_t[]){number, answer}, 2, name.data, name.size);
}

/* This process asks a foreign implementation. */
static void test_names_that_we_ask_for(void) {
    door d = open_door();
    call c;
    frame f;
    bytes b;
    asking a;
    b.size = 0;
    start_call(&c, &d, 0, LONG);
    raw *r = raw_admit(&d, 0);
    test_join(c.thread);
    CHECK(c.link);
    for (int i = 0; i < 7; i++) {
        bool receives = i % 2, is_try = i == 2 || i == 3;
        enum netchan_type type = receives ? NETCHAN_RECEIVER : NETCHAN_SENDER;
        pthread_t thread = start_asking(&a, c.link, "jobs", type, is_try ? 0 : i == 5 ? SHORT : LONG);
        next_frame(r, &f, IMPORT);
        CHECK_INT(f.type, IMPORT);
        uint64_t number = get_number(&f);
        CHECK(number != 0);
        CHECK_INT(get_number(&f), (receives ? RECEIVES : 0u) | (is_try ? TRY : 0u));
        check_rest(&f, "jobs", 4);
        if (i == 4) put_imported(&b, number + 1000, 0, 0, 50); /* what nobody has asked for is let go of */
        if (i < 2 || i == 4) put_imported(&b, number, 0, receives, 20 + (uint64_t)i);
        if (i == 2) put_imported(&b, number, 1, 0, 0);
        if (i == 3 || i == 6) put_imported(&b, number, 2, 0, 0);
        raw_say(r, &b);
        test_join(thread);
        if (i < 2 || i == 4) {
            CHECK_INT(a.result, NETCHAN_OK);
            if (i == 4) EXPECT(r, &f, DROP, 50, 1, 0);
            netchan_free(a.ch);
            do next_frame(r, &f, DROP);
            while (f.type == FORGET); /* may be said of what was answered, too */
            CHECK_INT(f.type, DROP);
            CHECK_INT(get_number(&f), 20 + (uint64_t)i);
        } else CHECK(!a.ch);
        if (i == 2) CHECK_INT(a.result, NETCHAN_ETIMEDOUT);
        if (i == 3 || i == 6) CHECK_INT(a.result, NETCHAN_ETYPE);
        if (i != 5) continue;
        CHECK_INT(a.result, NETCHAN_ETIMEDOUT);
        EXPECT(r, &f, FORGET, number);
        put_imported(&b, number, 0, RECEIVES, 60); /* it was on its way */
        raw_say(r, &b);
        EXPECT(r, &f, DROP, 60, 1, 0);
    }
    check_quiet(r);
    static const struct {
        unsigned answer, flags;
        bool named;
    } lies[] = {{0, 0, false}, {1, 0, true}, {3, 0, false}, {0, YOURS, true}};
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        bytes name;
        name.size = 0;
        if (lies[i].named) put_name(&name, lies[i].flags, 9, 0);
        put_frame(&b, IMPORTED, (uint64_t[]){77, lies[i].answer}, 2, name.data, name.size);
        raw_say(r, &b);
        raw_wait_closed(r);
        raw_close(r);
        wait_event(c.link, "lost", "name");
        r = raw_admit(&d, 0);
        check_quiet(r);
    }
    raw_close(r);
    end_call(&c, &d);
}

/* A peer that takes few ends is not given more. */
static void test_few_ends(void) {
    room m = open_room();
    greeting g = good_greeting();
    g.max_ends = 1;
    raw *r = raw_enter(m.l->address);
    raw_greet(r, &g);
    bytes b;
    frame f;
    task t;
    netchan *ch = netchan_make(0), *other = netchan_make(0);
    netchan_value two[2] = {netchan_sender(ch), netchan_sender(other)};
    b.size = 0;
    end e = raw_get_end(&m, r, netchan_sender(ch));
    uint64_t entry = next_entry();
    PUT(&b, DEMAND, 1, entry, entry, FIRM, 0);
    raw_say(r, &b);
    check_quiet(r);
    start_send(&t, m.l->send, netchan_sender(other), 1, LONG); /* it waits until there is room */
    check_quiet(r);
    PUT(&b, DROP, e.id, 1, 0);
    raw_say(r, &b);
    EXPECT(r, &f, CLAIM, entry);
    PUT(&b, GRANT, get_number(&f), 0);
    raw_say(r, &b);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    CHECK_INT(netchan_send(m.l->send, netchan_array(two, 2), SHORT), NETCHAN_ETIMEDOUT); /* the good peer could */
    netchan *end_there = raw_give_end(&m, r, 0, 9, 0);
    CHECK_INT(netchan_send(end_there, netchan_array(two, 2), LONG), NETCHAN_ETOOBIG);
    netchan_free(end_there);
    EXPECT(r, &f, DROP, 9, 1, 0);
    check_quiet(r);
    raw_close(r);
    netchan_free(ch);
    netchan_free(other);
    close_room(&m);
}

int main(int argc, char **argv) {
    static const test_entry tests[] = {
        TEST(no_tls_at_all),
        TEST(noise),
        TEST(connect_and_close),
        TEST(half_a_handshake),
        TEST(the_silent_are_few_and_not_for_long),
        TEST(max_peers),
        TEST(wrong_badges),
        TEST(lies_instead_of_a_greeting),
        TEST(lies_after_the_greeting),
        TEST(nested_too_deep),
        TEST(frames_that_never_end),
        TEST(the_unknown_is_skipped),
        TEST(long_forms),
        TEST(a_boaster),
        TEST(a_buffer_is_bounded_in_bytes),
        TEST(operations_are_bounded),
        TEST(large_values_are_bounded),
        TEST(an_offer_that_is_not_kept),
        TEST(golden_bytes),
        TEST(offers),
        TEST(demands),
        TEST(values_ahead_of_receives),
        TEST(rooms_that_were_given_up),
        TEST(early_values_before_a_receive),
        TEST(early_values_for_one_peer),
        TEST(large_values),
        TEST(a_value_for_a_peer_that_is_lost),
        TEST(buffered_values),
        TEST(the_listener_says_farewell),
        TEST(resume),
        TEST(stolen_sessions),
        TEST(replayed_resume),
        TEST(hello_after_a_refusal),
        TEST(a_flood_of_resumes),
        TEST(who_never_acknowledges),
        TEST(what_waits_for_a_peer_is_bounded),
        TEST(dialling_something_else),
        TEST(a_lying_listener),
        TEST(less_capacity_than_asked_for),
        TEST(hangup_while_a_select_is_promised),
        TEST(early_values_of_a_dialler),
        TEST(early_values_and_a_relay),
        TEST(a_relayed_try_after_early_values),
        TEST(early_values_and_a_close),
        TEST(who_does_not_answer_a_withdraw),
        TEST(early_values_and_an_engaged_select),
        TEST(a_dialler_resumes),
        TEST(what_a_refusal_says_is_cleaned),
        TEST(values_that_come_back),
        TEST(a_dialler_gets_values_back),
        TEST(a_foreign_home),
        TEST(a_foreign_home_closes),
        TEST(foreign_ends),
        TEST(drops),
        TEST(lies_about_ends),
        TEST(declined_by_a_relay),
        TEST(relayed_operations),
        TEST(a_relay_between_foreigners),
        TEST(values_and_relays),
        TEST(names_that_are_asked_for),
        TEST(names_that_we_ask_for),
        TEST(few_ends),
        TEST_END,
    };
    return test_main(argc, argv, tests);
}
