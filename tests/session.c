/* Sessions without TLS, sockets, threads and clocks: section [9] of netchan.h. Two of them are joined by two buffers,
 * and a test decides which bytes arrive when. Operations are begun and left as netchan_send() and netchan_recv() do
 * it, but nobody sleeps on them. */
#include "alloc.h"
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"
#include "test.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { LESS = 10 }; /* so many times less of what a test does thousands of times */
#else
enum { LESS = 1 };
#endif

enum { LONG = 1000000 }; /* ms: a timeout that only expire() ends */
static const uint64_t MS = 1000000;

/* --- two sides ---------------------------------------------------------------------------------------------------- */

/* Bytes on their way, in memory that never fails a test. */
typedef struct pipeline {
    uint8_t *data;
    size_t start, end;
} pipeline;

typedef struct side {
    netchan__endpoint e; /* its channels and options; no sockets */
    netchan__conn c;     /* stands between endpoint and session; no socket */
    netchan__session *s; /* NULL: there is none */
    pipeline in;         /* to this side */
} side;

typedef struct world {
    side d, l; /* who dials, who listens */
    uint64_t now;
} world;

static side *other(world *w, const side *x) {
    return x == &w->d ? &w->l : &w->d;
}

static size_t under_way(const side *x) {
    return x->in.end - x->in.start;
}

static void send_bytes(side *x, const void *data, size_t size) {
    x->in.data = (uint8_t *)realloc(x->in.data, x->in.end + size);
    CHECK(x->in.data);
    memcpy(x->in.data + x->in.end, data, size);
    x->in.end += size;
}

static void drop_bytes(side *x) {
    free(x->in.data);
    memset(&x->in, 0, sizeof x->in);
}

static void lock(void) {
    pthread_mutex_lock(&netchan__net_lock);
}

static void unlock(void) {
    netchan__io_unlock();
}

static void make_side(side *x, bool dials, const netchan_options *o) {
    memset(x, 0, sizeof *x);
    x->e.fd = -1;
    x->e.dials = dials;
    x->e.options = *o;
    netchan__cond_init(&x->e.changed);
    CHECK_INT(netchan__fill_options(&x->e.options), NETCHAN_OK);
    CHECK_INT(netchan__make_channels(&x->e), NETCHAN_OK);
    x->c.endpoint = &x->e;
    snprintf(x->c.address, sizeof x->c.address, "nowhere");
}

/* A session on one side, as after a TLS handshake. */
static void start(world *w, side *x) {
    lock();
    x->c.session = NULL;
    x->c.ended = false;
    x->e.strangers++;
    CHECK(netchan__start_session(&x->c));
    x->s = x->c.session;
    x->s->last_input = x->s->last_ping = x->s->last_tick = w->now;
    unlock();
}

/* The session ends where it stands; what was on its way to this side is gone. Returns how many values only the peer
 * knew. */
static uint64_t stop(side *x) {
    if (!x->s) return 0;
    lock();
    uint64_t unknown = netchan__session_lost(x->s);
    if (x->c.state == NETCHAN__UP) x->e.peers--;
    else x->e.strangers--;
    netchan__session_free(x->s);
    x->s = NULL;
    x->e.session = NULL;
    unlock();
    drop_bytes(x);
    return unknown;
}

static void make_world_with(world *w, const netchan_options *d, const netchan_options *l) {
    memset(netchan__net.process, 7, sizeof netchan__net.process);
    netchan__net.on_drained = netchan__lane_drained;
    w->now = 1000 * MS;
    make_side(&w->d, true, d);
    make_side(&w->l, false, l);
    start(w, &w->d);
    start(w, &w->l);
}

static netchan_options buffer_of(size_t buffer) {
    netchan_options o;
    memset(&o, 0, sizeof o);
    o.buffer = buffer;
    return o;
}

static void make_world(world *w, size_t dial_buffer, size_t listen_buffer) {
    netchan_options d = buffer_of(dial_buffer), l = buffer_of(listen_buffer);
    make_world_with(w, &d, &l);
}

static void free_side(side *x) {
    stop(x);
    lock();
    netchan__shut(x->e.link.send);
    netchan__shut(x->e.link.recv);
    netchan__shut(x->e.link.events);
    while (x->e.link.recv->is_merge && x->e.link.recv->lanes) {
        netchan__lane_clear(x->e.link.recv->lanes);
        netchan__retire_lane(x->e.link.recv->lanes);
    }
    unlock();
    netchan_free(x->e.link.send);
    netchan_free(x->e.link.recv);
    netchan_free(x->e.link.events);
    pthread_cond_destroy(&x->e.changed);
}

static void free_world(world *w) {
    free_side(&w->d);
    free_side(&w->l);
    CHECK_INT(netchan__net.waiters.count, 0);
    CHECK_INT(netchan__net.matches.count, 0);
    CHECK(!netchan__pending && !netchan__net.peers);
    netchan__map_free(&netchan__net.waiters);
    netchan__map_free(&netchan__net.matches);
    CHECK_INT(alloc_blocks(), 0);
}

/* --- bytes -------------------------------------------------------------------------------------------------------- */

/* Puts what one side has to say, at most one record, on its way. Returns how many bytes. */
static size_t ship(world *w, side *x) {
    const uint8_t *data = NULL;
    if (!x->s || x->s->peer.breach) return 0;
    lock();
    size_t size = netchan__session_output(x->s, &data);
    CHECK(size <= NETCHAN__FRAME_MAX);
    if (size && other(w, x)->s) send_bytes(other(w, x), data, size);
    netchan__session_sent(x->s, size);
    unlock();
    return size;
}

/* The next bytes arrive, at most max. Returns how many. */
static size_t arrive(world *w, side *x, size_t max) {
    size_t size = under_way(x);
    if (size > max) size = max;
    if (!size || !x->s || x->s->peer.breach || x->c.ended) return 0;
    uint8_t *copy = (uint8_t *)malloc(size); /* no byte too many, so that the sanitizer sees who reads on */
    CHECK(copy);
    memcpy(copy, x->in.data + x->in.start, size);
    lock();
    netchan__session_input(x->s, w->now, copy, size);
    unlock();
    free(copy);
    x->in.start += size;
    if (x->in.start == x->in.end) drop_bytes(x);
    return size;
}

static void check_no_breach(const side *x) {
    if (x->s && x->s->peer.breach) test_fail(__FILE__, __LINE__, "breach: %s", x->s->peer.breach);
}

/* Lets all arrive that is said, and what is said in answer. */
static void flow(world *w) {
    while (ship(w, &w->d) + ship(w, &w->l) + arrive(w, &w->d, SIZE_MAX) + arrive(w, &w->l, SIZE_MAX)) continue;
    check_no_breach(&w->d);
    check_no_breach(&w->l);
}

/* The same in pieces of random sizes, in random order. */
static void trickle(world *w, uint64_t *seed, size_t largest) {
    for (bool more = true; more;) {
        more = false;
        for (int i = 0; i < 8; i++) {
            side *x = test_random(seed) % 2 ? &w->d : &w->l;
            size_t n = test_random(seed) % 3 ? arrive(w, x, 1 + test_random(seed) % largest) : ship(w, x);
            more = more || n;
        }
        more = more || ship(w, &w->d) || ship(w, &w->l) || under_way(&w->d) || under_way(&w->l);
    }
    check_no_breach(&w->d);
    check_no_breach(&w->l);
}

/* --- operations --------------------------------------------------------------------------------------------------- */

typedef struct task {
    netchan__op op;
    netchan__waiter waiters[2];
    pthread_mutex_t *room[2];
    netchan__locks locks;
    netchan_case cases[2];
    netchan_value got;
} task;

/* As netchan__operate() and netchan__run() begin. */
static void begin(task *t, size_t count, int timeout_ms) {
    memset(&t->op, 0, sizeof t->op);
    memset(t->waiters, 0, sizeof t->waiters);
    t->locks.items = t->room;
    t->op.count = count;
    t->op.waiters = t->waiters;
    t->op.id = ++netchan__op_count;
    for (size_t i = 0; i < count; i++) {
        netchan__waiter *w = &t->waiters[i];
        w->op = &t->op;
        w->op_id = t->op.id;
        w->index = i;
        w->multi = count > 1;
        w->firm = count == 1 && timeout_ms < 0;
        w->is_try = timeout_ms == 0;
        t->cases[i].result = NETCHAN_ETIMEDOUT;
        t->op.result = netchan__prepare(w, &t->cases[i]);
        if (t->op.result != NETCHAN_OK) { /* it never began */
            t->op.finished = true;
            t->op.index = -1;
            t->op.count = 0;
            return;
        }
    }
    pthread_mutex_init(&t->op.mutex, NULL);
    netchan__cond_init(&t->op.cond);
    netchan__lock_all(&t->op, &t->locks);
    netchan__begin(&t->op);
    if (timeout_ms == 0 && netchan__state(&t->op) == NETCHAN__OPEN && !t->op.tries) netchan__expire(&t->op);
    netchan__unlock_all(&t->locks);
}

static void begin_send(task *t, netchan *ch, netchan_value v, int timeout_ms) {
    t->cases[0] = netchan_case_send(ch, v);
    begin(t, 1, timeout_ms);
}

static void begin_recv(task *t, netchan *ch, int timeout_ms) {
    t->got = netchan_nil();
    t->cases[0] = netchan_case_recv(ch, &t->got);
    begin(t, 1, timeout_ms);
}

static void begin_select(task *t, netchan *send, netchan_value v, netchan *recv, int timeout_ms) {
    t->got = netchan_nil();
    t->cases[0] = netchan_case_send(send, v);
    t->cases[1] = netchan_case_recv(recv, &t->got);
    begin(t, 2, timeout_ms);
}

static void expire(task *t) {
    netchan__lock_all(&t->op, &t->locks);
    if (!t->op.finished) netchan__expire(&t->op);
    netchan__unlock_all(&t->locks);
}

/* Leaves an operation that is over. Returns its result; which case it was is in t->op.index. */
static int end(task *t) {
    CHECK(t->op.finished);
    if (t->op.count) {
        netchan__lock_all(&t->op, &t->locks);
        netchan__leave_queues(&t->op);
        netchan__unlock_all(&t->locks);
        for (size_t i = 0; i < t->op.count; i++)
            if (t->waiters[i].ch && !t->waiters[i].ch->is_end) netchan_clear(&t->waiters[i].value);
        pthread_cond_destroy(&t->op.cond);
        pthread_mutex_destroy(&t->op.mutex);
    }
    t->got = t->op.value;
    return t->op.result;
}

static int64_t got_int(task *t) {
    CHECK_INT(end(t), NETCHAN_OK);
    CHECK_INT(t->got.type, NETCHAN_INT);
    return netchan_as_int(&t->got, -1);
}

/* The channels of one direction. */
typedef struct way {
    netchan *send, *recv;
} way;

static way way_of(world *w, int direction) {
    way y;
    y.send = direction ? w->l.e.link.send : w->d.e.link.send;
    y.recv = direction ? w->d.e.link.recv : w->l.e.link.recv;
    return y;
}

/* A value passes, so the world is in order. */
static void check_works(world *w) {
    for (int i = 0; i < 2; i++) {
        task s, r;
        begin_send(&s, way_of(w, i).send, netchan_int(i + 5), NETCHAN_FOREVER);
        begin_recv(&r, way_of(w, i).recv, NETCHAN_FOREVER);
        flow(w);
        CHECK_INT(end(&s), NETCHAN_OK);
        CHECK_INT(got_int(&r), i + 5);
    }
}

/* --- frames ------------------------------------------------------------------------------------------------------- */

/* Bytes that a test writes itself. */
typedef struct text {
    uint8_t data[40000];
    size_t size;
} text;

static void put_byte(text *t, unsigned byte) {
    t->data[t->size++] = (uint8_t)byte;
}

static void put_number(text *t, uint64_t n) {
    t->size = (size_t)(netchan__varint_put(t->data + t->size, n) - t->data);
}

static void put_bytes(text *t, const void *data, size_t size) {
    memcpy(t->data + t->size, data, size);
    t->size += size;
}

/* A frame: its type, `count` numbers, then `tail`. */
static void put_frame(text *t, unsigned type, const uint64_t *numbers, size_t count, const void *tail,
                      size_t tail_size) {
    text body;
    body.size = 0;
    put_byte(&body, type);
    for (size_t i = 0; i < count; i++) put_number(&body, numbers[i]);
    put_number(t, body.size + tail_size);
    put_bytes(t, body.data, body.size);
    if (tail_size) put_bytes(t, tail, tail_size);
}

/* Bytes arrive that the other side did not send. */
static void forge(world *w, side *x, const text *t) {
    send_bytes(x, t->data, t->size);
    arrive(w, x, SIZE_MAX);
}

static netchan__session *bare_session(void) {
    netchan__session *s = (netchan__session *)netchan__alloc(sizeof *s);
    CHECK(s);
    s->peer.emit = netchan__session_emit;
    s->peer.max_message = (size_t)1 << 20;
    s->peer.max_memory = (size_t)1 << 30;
    return s;
}

/* What one side emits is what the other reads, for each type and for numbers of all sizes. */
static void test_frames_round_trip(void) {
    uint64_t seed = 3;
    for (int round = 0; round < 40000 / LESS; round++) {
        unsigned type = (unsigned)(test_random(&seed) % 0x28);
        const char *fields = netchan__frame_fields(type);
        if (!fields) continue;
        netchan__session *s = bare_session();
        netchan__frame f, back;
        uint8_t bytes[300];
        memset(&f, 0, sizeof f);
        memset(&back, 0, sizeof back);
        f.type = back.type = type;
        for (const char *c = fields; *c; c++) {
            uint64_t *field = netchan__frame_field(&f, *c);
            if (field) *field = test_random(&seed) >> test_random(&seed) % 48;
        }
        if (strchr(fields, 's')) f.size = 0;
        if (strchr(fields, 'v')) {
            f.has_value = type == NETCHAN__DATA || test_random(&seed) % 2;
            f.value = netchan_bytes(bytes, test_random(&seed) % sizeof bytes);
            if (f.has_value) CHECK_INT(netchan_encode(&f.value, NULL, 0, &f.size), NETCHAN_ETOOBIG);
        }
        if (strchr(fields, 'b')) f.bytes = bytes, f.count = test_random(&seed) % sizeof bytes;
        for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (uint8_t)test_random(&seed);
        lock();
        uint64_t end_of_frame = s->peer.emit(&s->peer, &f);
        const uint8_t *data;
        size_t size = netchan__session_output(s, &data);
        CHECK_INT(end_of_frame, size);
        netchan__reader r = {data, data + size, false};
        uint64_t length = netchan__read_varint(&r);
        CHECK_INT(length, netchan__left(&r));
        CHECK_INT(*r.p++, type);
        CHECK(netchan__read_frame(s, &back, &r));
        for (const char *c = fields; *c && netchan__frame_field(&f, *c); c++)
            CHECK(*netchan__frame_field(&f, *c) == *netchan__frame_field(&back, *c));
        CHECK_INT(back.has_value, f.has_value);
        if (f.has_value) {
            CHECK_INT(netchan_count(&back.value), netchan_count(&f.value));
            CHECK(memcmp(netchan_as_block(&back.value, NETCHAN_BYTES, NULL), bytes, netchan_count(&f.value)) == 0);
        }
        if (f.bytes) {
            CHECK_INT(back.count, f.count);
            CHECK(memcmp(back.bytes, bytes, f.count) == 0);
        }
        netchan_clear(&back.value);
        netchan__session_free(s);
        unlock();
    }
    CHECK_INT(alloc_blocks(), 0);
}

/* The link is given whole frames, at most one record of them, and the frames are those that were emitted, in order. */
static void test_output_is_cut_between_frames(void) {
    uint64_t seed = 4;
    static uint8_t bytes[NETCHAN__FRAGMENT];
    for (int round = 0; round < 200 / LESS; round++) {
        netchan__session *s = bare_session();
        size_t sizes[200], count = 1 + test_random(&seed) % 200, next = 0;
        uint64_t position = 0, given = 0;
        lock();
        for (size_t i = 0; i < count; i++) {
            netchan__frame f;
            memset(&f, 0, sizeof f);
            f.type = NETCHAN__FRAGMENT_OF;
            f.match = test_random(&seed) % 2 ? i : UINT64_MAX;
            f.bytes = bytes;
            f.count = sizes[i] = test_random(&seed) % (test_random(&seed) % 4 ? 100 : sizeof bytes + 1);
            uint64_t before = position;
            position = s->peer.emit(&s->peer, &f);
            CHECK(position > before + f.count);
        }
        CHECK_INT(s->queued, position);
        const uint8_t *data;
        for (size_t size; (size = netchan__session_output(s, &data)) > 0; given += size) {
            CHECK(size <= NETCHAN__FRAME_MAX);
            netchan__reader r = {data, data + size, false};
            while (netchan__left(&r)) {
                size_t length = (size_t)netchan__read_varint(&r);
                const uint8_t *body = netchan__read_bytes(&r, length);
                CHECK(body && *body == NETCHAN__FRAGMENT_OF && next < count);
                netchan__reader field = {body + 1, body + length, false};
                netchan__read_varint(&field);
                CHECK_INT(netchan__left(&field), sizes[next++]);
            }
            netchan__session_sent(s, size);
        }
        CHECK_INT(next, count);
        CHECK_INT(given, position);
        CHECK_INT(s->peer.sent, position);
        CHECK(netchan__session_idle(s));
        netchan__session_free(s);
        unlock();
    }
    CHECK_INT(alloc_blocks(), 0);
}

/* The bytes that the WIRE section at the top of netchan.h promises. */
static void test_golden_bytes(void) {
    world w;
    netchan_options d = buffer_of(5), l = buffer_of(0);
    d.max_message = 300;
    d.max_memory = 20000;
    d.max_ops = 7;
    d.ping_ms = 1000;
    make_world_with(&w, &d, &l);
    ship(&w, &w.d);
    static const uint8_t hello[] = {
        34,   0x01, 'n',  'e',  't',  'c', 'h',  'a',  'n', 1,          /* LENGTH, type, magic, version */
        7,    7,    7,    7,    7,    7,   7,    7,                     /* process id */
        7,    7,    7,    7,    7,    7,   7,    7,                     /* */
        0xac, 0x02, 0xa0, 0x9c, 0x01, 7,   0xe8, 0x07, 5,               /* limits, ping_ms, capacity */
    };
    CHECK_INT(under_way(&w.l), sizeof hello);
    CHECK(memcmp(w.l.in.data + w.l.in.start, hello, sizeof hello) == 0);
    flow(&w);
    free_world(&w);

    make_world(&w, 0, 0);
    flow(&w);
    task s, r;
    netchan__net.last_id = 0x80;
    netchan__op_count = 8;
    begin_send(&s, w.d.e.link.send, netchan_str("hello"), NETCHAN_FOREVER);
    ship(&w, &w.d);
    static const uint8_t offer[] = {13, 0x10, 0, 0x81, 0x01, 9, 4 | 8, 6, 0x45, 'h', 'e', 'l', 'l', 'o'};
    CHECK_INT(under_way(&w.l), sizeof offer);
    CHECK(memcmp(w.l.in.data + w.l.in.start, offer, sizeof offer) == 0);
    begin_recv(&r, w.l.e.link.recv, LONG);
    arrive(&w, &w.l, SIZE_MAX);
    ship(&w, &w.l);
    static const uint8_t accept[] = {4, 0x23, 0x81, 0x01, 0};
    CHECK_INT(under_way(&w.d), sizeof accept);
    CHECK(memcmp(w.d.in.data + w.d.in.start, accept, sizeof accept) == 0);
    flow(&w);
    CHECK_INT(end(&s), NETCHAN_OK);
    CHECK_INT(end(&r), NETCHAN_OK);
    CHECK_STR(netchan_as_str(&r.got, "?"), "hello");
    netchan_clear(&r.got);
    free_world(&w);
}

/* --- greetings ---------------------------------------------------------------------------------------------------- */

static void test_greeting(void) {
    world w;
    netchan_options d = buffer_of(5), l = buffer_of(9);
    d.max_message = 1000;
    l.max_message = 2000;
    make_world_with(&w, &d, &l);
    CHECK_INT(ship(&w, &w.l), 0); /* the listener waits for the dialler's word */
    CHECK(ship(&w, &w.d) > 0);
    CHECK(!w.l.s->hello_received);
    CHECK_INT(w.l.e.peers, 0);
    arrive(&w, &w.l, SIZE_MAX);
    CHECK_INT(w.l.e.peers, 1);
    CHECK_INT(w.l.c.state, NETCHAN__UP);
    flow(&w);
    CHECK_INT(w.d.e.peers, 1);
    CHECK_INT(w.d.s->peer.their_message, 2000);
    CHECK_INT(w.l.s->peer.their_message, 1000);
    CHECK_INT(netchan_cap(w.l.e.link.recv), 5);
    CHECK_INT(netchan_cap(w.d.e.link.send), 5);
    CHECK_INT(netchan_cap(w.l.e.link.send), 9);
    check_works(&w);
    free_world(&w);
}

/* --- traffic in pieces -------------------------------------------------------------------------------------------- */

/* Some of everything both ways, with bytes that come in pieces. */
static void exchange_in_pieces(uint64_t seed, size_t largest, size_t buffer, size_t value_size) {
    enum { COUNT = 12 };
    world w;
    task s[2][COUNT], r[2][COUNT];
    uint8_t *bytes = (uint8_t *)malloc(value_size + COUNT);
    CHECK(bytes);
    for (size_t i = 0; i < value_size + COUNT; i++) bytes[i] = (uint8_t)(i * 7 + i / 251);
    make_world(&w, buffer, buffer);
    for (int d = 0; d < 2; d++) {
        for (size_t i = 0; i < COUNT; i++) {
            static const int timeouts[] = {NETCHAN_FOREVER, LONG};
            netchan_value v = netchan_bytes(bytes + i, i % 3 ? i : value_size);
            if (i % 4 == 3) begin_select(&s[d][i], way_of(&w, d).send, v, NULL, LONG);
            else begin_send(&s[d][i], way_of(&w, d).send, v, timeouts[i % 2]);
            if (i % 4 == 2) begin_select(&r[d][i], NULL, netchan_nil(), way_of(&w, d).recv, LONG);
            else begin_recv(&r[d][i], way_of(&w, d).recv, timeouts[i / 2 % 2]);
            if (test_random(&seed) % 2) trickle(&w, &seed, largest);
        }
    }
    trickle(&w, &seed, largest);
    bool seen[2][COUNT];
    memset(seen, 0, sizeof seen);
    for (int d = 0; d < 2; d++) {
        for (size_t i = 0; i < COUNT; i++) {
            size_t size;
            CHECK_INT(end(&s[d][i]), NETCHAN_OK);
            CHECK_INT(end(&r[d][i]), NETCHAN_OK);
            const uint8_t *got = (const uint8_t *)netchan_as_block(&r[d][i].got, NETCHAN_BYTES, &size);
            size_t which = COUNT;
            for (size_t n = 0; n < COUNT; n++)
                if (!seen[d][n] && size == (n % 3 ? n : value_size) && memcmp(got, bytes + n, size) == 0) which = n;
            CHECK(which < COUNT); /* each of them, once */
            seen[d][which] = true;
            netchan_clear(&r[d][i].got);
        }
    }
    free_world(&w);
    free(bytes);
}

static void test_bytes_come_in_pieces(void) {
    static const size_t largest[] = {1, 2, 7, 100, 20000};
    for (size_t i = 0; i < sizeof largest / sizeof *largest; i++) {
        for (uint64_t seed = 1; seed <= 40 / LESS; seed++) {
            exchange_in_pieces(seed, largest[i], seed % 4, 10);
            exchange_in_pieces(seed, largest[i], seed % 3, 16250 + seed);
        }
        exchange_in_pieces(9, largest[i], 0, 70000);
        exchange_in_pieces(9, largest[i], 3, 70000);
    }
}

/* The order of values from one sender, in pieces. */
static void test_order_in_pieces(void) {
    for (uint64_t seed = 1; seed <= 40; seed++) {
        world w;
        uint64_t random = seed;
        size_t buffer = seed % 5;
        make_world(&w, buffer, buffer);
        for (int d = 0; d < 2; d++) {
            way y = way_of(&w, d);
            int64_t in = 0, out = 0;
            task s, r;
            bool sending = false;
            while (out < 100) {
                if (sending && s.op.finished) {
                    CHECK_INT(end(&s), NETCHAN_OK);
                    sending = false;
                    in++;
                }
                if (!sending && in < 100) {
                    begin_send(&s, y.send, netchan_int(in), test_random(&random) % 2 ? LONG : NETCHAN_FOREVER);
                    sending = true;
                }
                if (test_random(&random) % 3) {
                    trickle(&w, &random, 5);
                    continue;
                }
                begin_recv(&r, y.recv, NETCHAN_FOREVER);
                trickle(&w, &random, 50);
                CHECK_INT(got_int(&r), out++);
            }
            if (sending) CHECK_INT(end(&s), NETCHAN_OK);
        }
        free_world(&w);
    }
}

/* --- large values ------------------------------------------------------------------------------------------------- */

/* The types and ids of the frames in a record. */
static size_t list_frames(const uint8_t *data, size_t size, unsigned *types, uint64_t *ids, size_t max) {
    netchan__reader r = {data, data + size, false};
    size_t count = 0;
    while (netchan__left(&r) && count < max) {
        size_t length = (size_t)netchan__read_varint(&r);
        netchan__reader body = {netchan__read_bytes(&r, length), NULL, false};
        CHECK(body.p);
        body.end = body.p + length;
        types[count] = *body.p++;
        ids[count++] = netchan__read_varint(&body);
    }
    return count;
}

/* Two large values take turns, and small frames go before the rest of them. */
static void test_fragments_take_turns(void) {
    enum { SIZE = 40 * NETCHAN__FRAGMENT };
    static uint8_t bytes[SIZE];
    for (int d = 0; d < 2; d++) {
        world w;
        task s[2], r[2], small_s, small_r;
        make_world(&w, 0, 0);
        flow(&w);
        side *from = d ? &w.l : &w.d;
        way y = way_of(&w, d);
        for (int i = 0; i < 2; i++) {
            begin_recv(&r[i], y.recv, NETCHAN_FOREVER);
            flow(&w);
        }
        for (int i = 0; i < 2; i++) begin_send(&s[i], y.send, netchan_bytes(bytes + i, SIZE - 1), NETCHAN_FOREVER);
        while (!from->s->parcels || !from->s->parcels->next)
            CHECK(ship(&w, &w.d) + ship(&w, &w.l) + arrive(&w, &w.d, 10) + arrive(&w, &w.l, 10));
        while (under_way(other(&w, from))) arrive(&w, other(&w, from), SIZE_MAX); /* what came with the grants */
        unsigned types[64], fragments = 0, before_small = 0;
        uint64_t ids[64], last = 0;
        size_t first = netchan__buf_size(&from->s->out) / NETCHAN__FRAGMENT; /* cut when there was only one */
        bool small_seen = false;
        begin_recv(&small_r, y.recv, NETCHAN_FOREVER);
        begin_send(&small_s, y.send, netchan_int(5), NETCHAN_FOREVER);
        for (size_t size; (size = ship(&w, from)) > 0;) {
            side *to = other(&w, from);
            size_t n = list_frames(to->in.data + to->in.end - size, size, types, ids, 64);
            for (size_t i = 0; i < n; i++) {
                if (types[i] != NETCHAN__FRAGMENT_OF) {
                    small_seen = true;
                    continue;
                }
                if (fragments > first && fragments < 70) CHECK(ids[i] != last); /* in turn, until one is at its end */
                last = ids[i];
                fragments++;
                if (!small_seen) before_small++;
            }
        }
        CHECK(fragments >= 70);
        CHECK(small_seen);
        CHECK(before_small <= NETCHAN__STREAM_LOW / NETCHAN__FRAGMENT + 1);
        flow(&w);
        for (int i = 0; i < 2; i++) {
            CHECK_INT(end(&s[i]), NETCHAN_OK);
            CHECK_INT(end(&r[i]), NETCHAN_OK);
            CHECK_INT(netchan_count(&r[i].got), SIZE - 1);
            netchan_clear(&r[i].got);
        }
        CHECK_INT(end(&small_s), NETCHAN_OK);
        CHECK_INT(got_int(&small_r), 5);
        free_world(&w);
    }
}

/* What waits for the link is not the whole of a large value. */
static void test_fragments_are_cut_when_they_are_needed(void) {
    enum { SIZE = 4000000 };
    uint8_t *bytes = (uint8_t *)calloc(1, SIZE);
    world w;
    task s, r;
    CHECK(bytes);
    make_world(&w, 0, 0);
    flow(&w);
    begin_send(&s, w.d.e.link.send, netchan_bytes(bytes, SIZE), NETCHAN_FOREVER);
    begin_recv(&r, w.l.e.link.recv, LONG);
    while (!r.op.finished) {
        CHECK(ship(&w, &w.d) + ship(&w, &w.l) + arrive(&w, &w.d, SIZE_MAX) + arrive(&w, &w.l, SIZE_MAX));
        CHECK(netchan__buf_size(&w.d.s->out) <= NETCHAN__STREAM_LOW + NETCHAN__FRAME_MAX);
        CHECK(netchan__buf_size(&w.l.s->in) <= NETCHAN__FRAME_MAX);
    }
    flow(&w);
    CHECK_INT(end(&s), NETCHAN_OK);
    CHECK_INT(end(&r), NETCHAN_OK);
    netchan_clear(&r.got);
    free(bytes);
    free_world(&w);
}

/* --- time --------------------------------------------------------------------------------------------------------- */

static uint64_t tick(world *w, side *x) {
    lock();
    uint64_t next = netchan__session_tick(x->s, w->now);
    unlock();
    return next;
}

static size_t count_frames(const side *x, unsigned type) {
    unsigned types[64];
    uint64_t ids[64];
    size_t n = list_frames(x->in.data + x->in.start, under_way(x), types, ids, 64), found = 0;
    for (size_t i = 0; i < n; i++) found += types[i] == type;
    return found;
}

static netchan_options ping_of(int ms) {
    netchan_options o = buffer_of(0);
    o.ping_ms = ms;
    return o;
}

static void test_heartbeats(void) {
    world w;
    netchan_options d = ping_of(100), l = ping_of(1000);
    make_world_with(&w, &d, &l);
    tick(&w, &w.d); /* nothing before the greeting: a deadline of the connection's holds there */
    flow(&w);
    uint64_t begin_at = w.now;
    w.now += 99 * MS;
    CHECK_INT(tick(&w, &w.d), begin_at + 100 * MS);
    CHECK_INT(ship(&w, &w.d), 0);
    w.now += 1 * MS;
    CHECK_INT(tick(&w, &w.d), begin_at + 200 * MS);
    CHECK(ship(&w, &w.d) > 0);
    CHECK_INT(count_frames(&w.l, NETCHAN__PING), 1);
    tick(&w, &w.d); /* not once more */
    CHECK_INT(ship(&w, &w.d), 0);
    arrive(&w, &w.l, SIZE_MAX);
    CHECK(ship(&w, &w.l) > 0);
    CHECK_INT(count_frames(&w.d, NETCHAN__PONG), 1);
    w.now += 5 * MS;
    flow(&w);
    CHECK_INT(tick(&w, &w.d), w.now + 100 * MS); /* it lives */
    for (int i = 0; i < 50; i++) {           /* an idle link stays */
        uint64_t next = tick(&w, &w.d), next_l = tick(&w, &w.l);
        flow(&w);
        CHECK(next > w.now && next_l > w.now);
        w.now = next < next_l ? next : next_l;
    }
    check_works(&w);
    free_world(&w);
}

/* The other side is silent. Called whenever it asks to be called, the session finds out in time. */
static void test_silence_is_a_breach(void) {
    world w;
    netchan_options o = ping_of(100);
    make_world_with(&w, &o, &o);
    flow(&w);
    uint64_t begin_at = w.now;
    while (!w.d.s->peer.breach) {
        w.now = tick(&w, &w.d);
        CHECK(w.now <= begin_at + 400 * MS);
    }
    CHECK(strstr(w.d.s->peer.breach, "300 ms") != NULL);
    free_world(&w);
    make_world_with(&w, &o, &o);
    flow(&w);
    task any;
    begin_recv(&any, w.d.e.link.recv, LONG);
    ship(&w, &w.d);
    for (int i = 1; i <= 598; i++) {
        w.now += 1 * MS;
        tick(&w, &w.l);
        check_no_breach(&w.l);
        if (i == 299) arrive(&w, &w.l, 1); /* a single byte is a sign of life */
    }
    w.now += 1 * MS;
    tick(&w, &w.l);
    CHECK(w.l.s->peer.breach != NULL);
    stop(&w.d);
    CHECK_INT(end(&any), NETCHAN_ELOST);
    free_world(&w);
}

/* --- lies --------------------------------------------------------------------------------------------------------- */

typedef struct lie {
    const char *why; /* what the breach says; NULL: it is none */
    unsigned type;
    size_t count;
    uint64_t numbers[6];
    const char *tail;
    size_t tail_size;
} lie;

#define CUT_OFF "cut off"
#define TWICE "does not exist, or twice"
#define DIRECTION "only the other side"
#define FEW(...) sizeof((uint64_t[]){__VA_ARGS__}) / sizeof(uint64_t), {__VA_ARGS__}

/* Bytes that one side must not believe, in a session that is up. Afterwards nothing more is read, and a new session
 * works. */
static void check_lie(const lie *a, bool to_listener, size_t buffer) {
    world w;
    netchan_options d = buffer_of(buffer), l = buffer_of(0);
    d.max_message = l.max_message = 50000;
    l.max_ops = 3;
    make_world_with(&w, &d, &l);
    flow(&w);
    side *x = to_listener ? &w.l : &w.d;
    text t;
    t.size = 0;
    put_frame(&t, a->type, a->numbers, a->count, a->tail, a->tail_size);
    forge(&w, x, &t);
    if (!a->why) check_no_breach(x);
    else if (!x->s->peer.breach) test_fail(__FILE__, __LINE__, "no breach, but it should be: %s", a->why);
    else if (!strstr(x->s->peer.breach, a->why))
        test_fail(__FILE__, __LINE__, "breach: %s; not: %s", x->s->peer.breach, a->why);
    if (a->why) CHECK_INT(arrive(&w, x, SIZE_MAX), 0);
    else if (to_listener) flow(&w); /* it goes on; but the listener would not understand what its lie is answered */
    stop(&w.d);
    stop(&w.l);
    start(&w, &w.d);
    start(&w, &w.l);
    flow(&w);
    check_works(&w);
    free_world(&w);
}

static const char deep[] = "\x88\x02\x01"; /* an array of one, again and again */

static void test_lies_to_the_listener(void) {
    static const lie lies[] = {
        {"version 1", NETCHAN__HELLO, 0, {0}, "netchan\1................\1\1\1\1\1", 29},
        {CUT_OFF, NETCHAN__OFFER, FEW(0, 1), NULL, 0},
        {CUT_OFF, NETCHAN__DEMAND, FEW(1, 1, 1), NULL, 0},
        {CUT_OFF, NETCHAN__PING, 0, {0}, NULL, 0},
        {CUT_OFF, NETCHAN__WITHDRAW, 0, {0}, NULL, 0},
        {CUT_OFF, NETCHAN__GRANT, FEW(1), "\x80", 1},
        {CUT_OFF, NETCHAN__FRAGMENT_OF, 0, {0}, NULL, 0},
        {TWICE, NETCHAN__OFFER, FEW(1, 1, 1, 0, 1), NULL, 0},             /* on the channel that leads the other way */
        {TWICE, NETCHAN__OFFER, FEW(2, 1, 1, 0, 1), NULL, 0},             /* on no channel */
        {TWICE, NETCHAN__OFFER, FEW(0, 0, 1, 0, 1), NULL, 0},             /* entry 0 */
        {TWICE, NETCHAN__OFFER, FEW(0, 1, 1, 8, 1), NULL, 0},             /* the value that is here is not */
        {TWICE, NETCHAN__OFFER, FEW(0, 1, 1, 0, 1), "\5", 1},             /* a value that should not be here */
        {"malformed", NETCHAN__OFFER, FEW(0, 1, 1, 8, 2), "\5", 1},       /* another size than it says */
        {"malformed", NETCHAN__OFFER, FEW(0, 1, 1, 8, 1), "\x86", 1},     /* no value */
        {"malformed", NETCHAN__OFFER, FEW(0, 1, 1, 8, 2), "\5\5", 2},     /* more than a value */
        {"max_message", NETCHAN__OFFER, FEW(0, 1, 1, 0, 50001), NULL, 0},
        {"max_message", NETCHAN__OFFER, FEW(0, 1, 1, 0, UINT64_MAX), NULL, 0},
        {TWICE, NETCHAN__DEMAND, FEW(0, 1, 1, 0), NULL, 0},
        {TWICE, NETCHAN__DEMAND, FEW(1, 0, 1, 0), NULL, 0},
        {NULL, NETCHAN__WITHDRAW, FEW(77), NULL, 0}, /* it may be over already */
        {"granted", NETCHAN__GRANT, FEW(77, 0), NULL, 0},
        {"declined", NETCHAN__DECLINE, FEW(77), NULL, 0},
        {"took", NETCHAN__TAKEN, FEW(77), NULL, 0},
        {"fragment", NETCHAN__FRAGMENT_OF, FEW(77), "bytes", 5},
        {"credit", NETCHAN__DATA, FEW(0), "\5", 1},
        {"", NETCHAN__DATA, FEW(1), "\5", 1},
        {"closed", NETCHAN__CLOSE, FEW(1), NULL, 0},
        {DIRECTION, NETCHAN__CLAIM, FEW(1, 1, 1, 1), "\5", 1},
        {DIRECTION, NETCHAN__COMMIT, FEW(1, 1, 1, 1), "\5", 1},
        {DIRECTION, NETCHAN__RELEASE, FEW(1, 1), NULL, 0},
        {DIRECTION, NETCHAN__ACCEPT, FEW(1, 0), NULL, 0},
        {DIRECTION, NETCHAN__WITHDRAWN, FEW(1), NULL, 0},
        {DIRECTION, NETCHAN__CREDIT, FEW(0, 1, 0), NULL, 0},
        {DIRECTION, NETCHAN__CLOSED, FEW(1), NULL, 0},
        {NULL, 0x7f, FEW(1, 2, 3), "what a later version may say", 28},
        {NULL, 0x00, 0, {0}, NULL, 0},
        {NULL, 0xff, 0, {0}, NULL, 0},
        {NULL, NETCHAN__PING, FEW(5), "and more", 8}, /* what follows the fields is skipped */
    };
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) check_lie(&lies[i], true, 0);
    static const lie buffered[] = {
        {"", NETCHAN__DATA, FEW(0), NULL, 0},
        {"malformed", NETCHAN__DATA, FEW(0), "\x87\5", 2},
    };
    for (size_t i = 0; i < sizeof buffered / sizeof *buffered; i++) check_lie(&buffered[i], true, 2);
}

static void test_lies_to_the_dialler(void) {
    static const lie lies[] = {
        {DIRECTION, NETCHAN__OFFER, FEW(0, 1, 1, 0, 1), NULL, 0},
        {DIRECTION, NETCHAN__DEMAND, FEW(1, 1, 1, 0), NULL, 0},
        {DIRECTION, NETCHAN__WITHDRAW, FEW(1), NULL, 0},
        {DIRECTION, NETCHAN__GRANT, FEW(1, 0), NULL, 0},
        {DIRECTION, NETCHAN__DECLINE, FEW(1), NULL, 0},
        {DIRECTION, NETCHAN__TAKEN, FEW(1), NULL, 0},
        {DIRECTION, NETCHAN__DATA, FEW(0), "\5", 1},
        {DIRECTION, NETCHAN__CLOSE, FEW(0), NULL, 0},
        {NULL, NETCHAN__CLAIM, FEW(77, 1, 1, 1), "\5", 1}, /* declined: it may be over already */
        {"committed", NETCHAN__COMMIT, FEW(77, 1, 1, 1), "\5", 1},
        {"released", NETCHAN__RELEASE, FEW(77, 1), NULL, 0},
        {NULL, NETCHAN__ACCEPT, FEW(77, 0), NULL, 0},
        {NULL, NETCHAN__WITHDRAWN, FEW(77), NULL, 0},
        {"capacity", NETCHAN__CREDIT, FEW(1, 1, 0), NULL, 0},
        {"capacity", NETCHAN__CREDIT, FEW(0, 4, 0), NULL, 0},
        {"capacity", NETCHAN__CREDIT, FEW(0, UINT64_MAX, 0), NULL, 0},
        {"", NETCHAN__CREDIT, FEW(0, 0, 1), NULL, 0}, /* nothing was sent that could have left the buffer */
        {"closed", NETCHAN__CLOSED, FEW(0), NULL, 0},
        {"fragment", NETCHAN__FRAGMENT_OF, FEW(77), "bytes", 5},
        {CUT_OFF, NETCHAN__CLAIM, FEW(77, 1), NULL, 0},
        {NULL, 0x60, FEW(1), "later", 5},
    };
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) check_lie(&lies[i], false, 3);
}

/* Bytes that are no frames. */
static void test_lengths(void) {
    static const struct {
        const char *why, *bytes;
        size_t size;
    } lies[] = {
        {"frame of 0 bytes", "\0", 1},
        {NULL, "\xfe\x7f", 2}, /* with its length of 2 bytes it is as long as allowed */
        {"frame of 16383 bytes", "\xff\x7f", 2},
        {"frame of 16384 bytes", "\x80\x80\x01", 3},
        {"frame of", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 10},
        {"frame of", "\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80", 10},
        {"frame of", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", 10},
    };
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        for (int piecewise = 0; piecewise < 2; piecewise++) {
            world w;
            make_world(&w, 0, 0);
            flow(&w);
            send_bytes(&w.l, lies[i].bytes, lies[i].size);
            while (arrive(&w, &w.l, piecewise ? 1 : SIZE_MAX)) continue;
            if (!lies[i].why) check_no_breach(&w.l); /* the rest of it may come */
            else if (!w.l.s->peer.breach || !strstr(w.l.s->peer.breach, lies[i].why))
                test_fail(__FILE__, __LINE__, "breach: %s; not: %s", w.l.s->peer.breach ? w.l.s->peer.breach : "none",
                          lies[i].why);
            free_world(&w);
        }
    }
    world w; /* the longest frame, of an unknown type, and a length that is longer than it need be */
    make_world(&w, 0, 0);
    flow(&w);
    text t;
    t.size = 0;
    put_number(&t, NETCHAN__FRAME_MAX - 2);
    put_byte(&t, 0x7e);
    memset(t.data + t.size, 0x55, NETCHAN__FRAME_MAX - 3);
    t.size = NETCHAN__FRAME_MAX;
    forge(&w, &w.l, &t);
    check_no_breach(&w.l);
    t.size = 0;
    put_bytes(&t, "\x82\x80\0\2\5", 5); /* PING 5 */
    forge(&w, &w.l, &t);
    check_no_breach(&w.l);
    CHECK(ship(&w, &w.l) > 0);
    CHECK_INT(count_frames(&w.d, NETCHAN__PONG), 1);
    flow(&w);
    check_works(&w);
    free_world(&w);
}

/* The first frame is a greeting, whole and of this version. What follows its fields is skipped. */
static void test_lies_in_the_greeting(void) {
    static const char good[] = "netchan\1................\x7f\x7f\x7f\x7f\0";
    for (int i = 0; i < 10; i++) {
        world w;
        make_world(&w, 0, 0);
        text t;
        t.size = 0;
        uint8_t body[64];
        size_t size = sizeof good - 1;
        memcpy(body, good, size);
        const char *why = NULL;
        if (i == 0) body[0] = 'N', why = "protocol";
        if (i == 1) body[7] = 2, why = "version";
        if (i == 2) size = 5, why = "protocol";
        if (i == 3) size = 10, why = "not whole";
        if (i == 4) size -= 1, why = "not whole";
        if (i == 5) memcpy(body + size, "more", 4), size += 4;
        if (i == 6) put_frame(&t, NETCHAN__PING, NULL, 0, "\5", 1), why = "greeting";
        if (i == 7) put_frame(&t, NETCHAN__BYE, NULL, 0, NULL, 0), why = "greeting";
        if (i == 8) put_frame(&t, 0x7f, NULL, 0, NULL, 0), why = "greeting";
        put_frame(&t, NETCHAN__HELLO, NULL, 0, body, size);
        forge(&w, &w.l, &t);
        if (!why) check_no_breach(&w.l);
        else if (!w.l.s->peer.breach || !strstr(w.l.s->peer.breach, why))
            test_fail(__FILE__, __LINE__, "case %d: breach: %s", i, w.l.s->peer.breach ? w.l.s->peer.breach : "none");
        CHECK_INT(w.l.e.peers, why == NULL);
        stop(&w.d);
        stop(&w.l);
        start(&w, &w.d);
        start(&w, &w.l);
        flow(&w);
        check_works(&w);
        free_world(&w);
    }
}

/* Lies about operations that do exist. */
static void test_lies_about_what_waits(void) {
    for (int i = 0; i < 16; i++) {
        world w;
        task t[2];
        text lies;
        netchan_options o = buffer_of(0);
        o.max_message = 50000;
        make_world_with(&w, &o, &o);
        flow(&w);
        lies.size = 0;
        bool at_dialler = i < 10;
        const char *why = "";
        begin_recv(&t[0], at_dialler ? w.d.e.link.recv : w.l.e.link.recv, LONG);
        begin_send(&t[1], at_dialler ? w.d.e.link.send : w.l.e.link.send, netchan_int(1), LONG);
        flow(&w);
        uint64_t receive = t[0].waiters[0].id, send = t[1].waiters[0].id;
        if (i == 0) put_frame(&lies, NETCHAN__ACCEPT, (uint64_t[]){send, 0}, 2, NULL, 0), why = "accepted";
        if (i == 1) put_frame(&lies, NETCHAN__ACCEPT, (uint64_t[]){receive, 0}, 2, NULL, 0), why = "accepted";
        if (i == 2) put_frame(&lies, NETCHAN__COMMIT, (uint64_t[]){receive, 5, 0, 1}, 4, "\5", 1), why = "committed";
        if (i == 3) put_frame(&lies, NETCHAN__RELEASE, (uint64_t[]){send, 5}, 2, NULL, 0), why = "released";
        if (i == 4) put_frame(&lies, NETCHAN__CLAIM, (uint64_t[]){send, 5, 1, 1}, 4, "\5", 1), why = "value";
        if (i == 5) put_frame(&lies, NETCHAN__CLAIM, (uint64_t[]){receive, 5, 0, 1}, 4, "\5", 1), why = "value";
        if (i == 6)
            put_frame(&lies, NETCHAN__CLAIM, (uint64_t[]){receive, 5, 1, 50001}, 4, NULL, 0), why = "max_message";
        if (i == 7) {
            put_frame(&lies, NETCHAN__CLAIM, (uint64_t[]){send, 5, 0, 0}, 4, NULL, 0);
            put_frame(&lies, NETCHAN__CLAIM, (uint64_t[]){send, 6, 0, 0}, 4, NULL, 0), why = "claimed already";
        }
        if (i == 8) put_frame(&lies, NETCHAN__CLAIM, (uint64_t[]){send, 0, 0, 0}, 4, NULL, 0);
        if (i == 9) { /* more fragments than it said, after a right beginning */
            put_frame(&lies, NETCHAN__CLAIM, (uint64_t[]){receive, 5, 1, 20000}, 4, NULL, 0);
            put_frame(&lies, NETCHAN__COMMIT, (uint64_t[]){receive, 5, 1, 20000}, 4, NULL, 0);
            static const uint8_t bytes[10001];
            put_frame(&lies, NETCHAN__FRAGMENT_OF, &receive, 1, bytes, 10000);
            put_frame(&lies, NETCHAN__FRAGMENT_OF, &receive, 1, bytes, 10001), why = "fragments";
        }
        uint64_t match = 0;
        if (!at_dialler) { /* the listener claims: a large OFFER makes a match */
            text offer;
            offer.size = 0;
            if (i < 15)
                put_frame(&offer, NETCHAN__OFFER, (uint64_t[]){0, 900, 900, 0, i == 14 ? 5 : 20000}, 5, NULL, 0);
            else put_frame(&offer, NETCHAN__DEMAND, (uint64_t[]){1, 900, 900, 1}, 4, NULL, 0);
            forge(&w, &w.l, &offer);
            check_no_breach(&w.l);
            match = netchan__net.last_id;
            CHECK(netchan__map_get(&netchan__net.matches, match));
        }
        static const uint8_t bytes[10001];
        if (i == 10) put_frame(&lies, NETCHAN__TAKEN, &match, 1, NULL, 0), why = "took";
        if (i == 11) put_frame(&lies, NETCHAN__GRANT, (uint64_t[]){match, 19999}, 2, NULL, 0), why = "granted";
        if (i == 12) { /* as many bytes as announced, which are no value */
            put_frame(&lies, NETCHAN__GRANT, (uint64_t[]){match, 20000}, 2, NULL, 0);
            for (int n = 0; n < 2; n++) put_frame(&lies, NETCHAN__FRAGMENT_OF, &match, 1, bytes, 10000);
            why = "decoded";
        }
        if (i == 13) {
            put_frame(&lies, NETCHAN__GRANT, (uint64_t[]){match, 20000}, 2, NULL, 0);
            put_frame(&lies, NETCHAN__FRAGMENT_OF, &match, 1, bytes, 10000);
            put_frame(&lies, NETCHAN__FRAGMENT_OF, &match, 1, bytes, 10001), why = "fragments";
        }
        if (i == 14) put_frame(&lies, NETCHAN__FRAGMENT_OF, &match, 1, bytes, 5), why = "fragment";
        if (i == 15) put_frame(&lies, NETCHAN__GRANT, (uint64_t[]){match, 1}, 2, "\5", 1), why = "granted";
        side *x = at_dialler ? &w.d : &w.l;
        forge(&w, x, &lies);
        if (!x->s->peer.breach || !strstr(x->s->peer.breach, why))
            test_fail(__FILE__, __LINE__, "case %d: breach: %s; not: %s", i,
                      x->s->peer.breach ? x->s->peer.breach : "none", why);
        stop(&w.d);
        stop(&w.l);
        start(&w, &w.d);
        start(&w, &w.l);
        flow(&w);
        for (int k = 0; k < 2; k++) { /* who waited waits still, or was told the truth */
            if (!t[k].op.finished) expire(&t[k]);
            int result = end(&t[k]);
            CHECK(result == NETCHAN_ETIMEDOUT || result == NETCHAN_ELOST || (k == 1 && result == NETCHAN_EUNKNOWN));
        }
        flow(&w);
        check_works(&w);
        free_world(&w);
    }
}

static void test_more_operations_than_allowed(void) {
    world w;
    netchan_options d = buffer_of(0), l = buffer_of(0);
    l.max_ops = 3;
    make_world_with(&w, &d, &l);
    flow(&w);
    task t[4];
    for (int i = 0; i < 4; i++) begin_recv(&t[i], w.d.e.link.recv, LONG);
    while (ship(&w, &w.d) && arrive(&w, &w.l, SIZE_MAX)) continue;
    CHECK(w.l.s->peer.breach && strstr(w.l.s->peer.breach, "max_ops"));
    stop(&w.d);
    for (int i = 0; i < 4; i++) CHECK_INT(end(&t[i]), NETCHAN_ELOST);
    free_world(&w);
}

/* Nesting that the other side could not follow: refused, without a deep recursion here. */
static void test_nested_too_deep(void) {
    for (int depth = 60; depth < 70; depth++) {
        world w;
        text value, t;
        value.size = t.size = 0;
        for (int i = 0; i < depth; i++) { /* each array holds what follows: LEN, count 1 */
            size_t inside = 1;
            for (int k = i + 1; k < depth; k++) inside += 1 + netchan__varint_size(inside + 1) + 1;
            put_byte(&value, (unsigned char)deep[0]);
            put_number(&value, inside + 1);
            put_number(&value, 1);
        }
        put_byte(&value, 5);
        make_world(&w, 0, 0);
        flow(&w);
        put_frame(&t, NETCHAN__OFFER, (uint64_t[]){0, 1, 1, 8, value.size}, 5, value.data, value.size);
        forge(&w, &w.l, &t);
        CHECK_INT(w.l.s->peer.breach == NULL, depth <= 64);
        free_world(&w);
    }
}

/* --- sessions that end -------------------------------------------------------------------------------------------- */

static void send_now(netchan *ch, int64_t n) {
    task t;
    begin_send(&t, ch, netchan_int(n), LONG);
    CHECK_INT(end(&t), NETCHAN_OK);
}

static int64_t recv_now(world *w, netchan *ch) {
    task t;
    begin_recv(&t, ch, NETCHAN_FOREVER);
    flow(w);
    return got_int(&t);
}

static void test_values_that_never_left_go_over_the_next_session(void) {
    for (int shipped = 0; shipped <= 6; shipped++) {
        world w;
        make_world(&w, 6, 0);
        flow(&w);
        for (int i = 0; i < 6; i++) {
            if (i == shipped) while (ship(&w, &w.d)) continue;
            send_now(w.d.e.link.send, i);
        }
        if (shipped == 6) while (ship(&w, &w.d)) continue;
        CHECK_INT(netchan_len(w.d.e.link.send), 6);
        CHECK_INT(stop(&w.d), shipped); /* of those only the listener may know, whom they did not reach */
        CHECK_INT(netchan_len(w.d.e.link.send), 6 - shipped);
        stop(&w.l);
        task blocked;
        begin_send(&blocked, w.d.e.link.send, netchan_int(6), LONG);
        CHECK(!blocked.op.finished);
        start(&w, &w.d);
        start(&w, &w.l);
        flow(&w);
        for (int i = shipped; i < 7; i++) CHECK_INT(recv_now(&w, w.l.e.link.recv), i);
        CHECK_INT(end(&blocked), NETCHAN_OK);
        check_works(&w);
        free_world(&w);
    }
}

/* A value that waits through the end of a session does not overtake those that were sent before it. */
static void test_order_over_the_next_session(void) {
    static uint8_t bytes[20000];
    for (size_t size = 10; size <= sizeof bytes; size += sizeof bytes - 10) {
        world w;
        task large, r;
        make_world(&w, 6, 0);
        flow(&w);
        for (int i = 0; i < 3; i++) send_now(w.d.e.link.send, i);
        stop(&w.d);
        stop(&w.l);
        begin_send(&large, w.d.e.link.send, netchan_bytes(bytes, size), NETCHAN_FOREVER);
        start(&w, &w.d);
        start(&w, &w.l);
        flow(&w);
        for (int i = 0; i < 3; i++) CHECK_INT(recv_now(&w, w.l.e.link.recv), i);
        begin_recv(&r, w.l.e.link.recv, LONG);
        flow(&w);
        CHECK_INT(end(&r), NETCHAN_OK);
        CHECK_INT(netchan_count(&r.got), size);
        netchan_clear(&r.got);
        CHECK_INT(end(&large), NETCHAN_OK);
        free_world(&w);
    }
}

static void test_close_after_what_was_sent(void) {
    world w;
    make_world(&w, 4, 0);
    flow(&w);
    for (int i = 0; i < 3; i++) send_now(w.d.e.link.send, i);
    stop(&w.d);
    stop(&w.l);
    CHECK_INT(netchan_close(w.d.e.link.send), NETCHAN_OK);
    start(&w, &w.d);
    start(&w, &w.l);
    flow(&w);
    for (int i = 0; i < 3; i++) CHECK_INT(recv_now(&w, w.l.e.link.recv), i);
    size_t closed = 0;
    for (netchan_value v; netchan_recv(w.l.e.link.events, &v, NETCHAN_NOWAIT) == NETCHAN_OK; netchan_clear(&v))
        closed += strcmp(netchan_as_str(netchan_get(&v, "event"), ""), "closed") == 0;
    CHECK_INT(closed, 1);
    free_world(&w);
}

/* A farewell is answered once nothing is negotiated any more, and all that was said before it has arrived. */
static void test_farewell(void) {
    for (int who = 0; who < 2; who++) {
        world w;
        make_world(&w, 4, 4);
        flow(&w);
        side *x = who ? &w.l : &w.d, *y = other(&w, x);
        for (int i = 0; i < 3; i++) send_now(w.d.e.link.send, i);
        lock();
        netchan__emit_bye(x->s);
        netchan__emit_bye(x->s);
        unlock();
        ship(&w, x);
        CHECK_INT(count_frames(y, NETCHAN__BYE), 1);
        CHECK(!y->s->bye_received);
        arrive(&w, y, SIZE_MAX);
        CHECK(y->s->bye_received);
        lock();
        netchan__answer_bye(&y->c);
        netchan__answer_bye(&y->c);
        unlock();
        ship(&w, y);
        CHECK_INT(count_frames(x, NETCHAN__BYE), 1);
        arrive(&w, x, SIZE_MAX);
        CHECK(x->s->bye_received);
        CHECK(x->s->peer.has_all);
        uint64_t unknown = stop(&w.d);
        if (!who) CHECK_INT(unknown, 0); /* the listener had everything before it answered */
        stop(&w.l);
        if (!who)
            for (int i = 0; i < 3; i++) CHECK_INT(recv_now(&w, w.l.e.link.recv), i);
        free_world(&w);
    }
}

/* --- cuts anywhere, and memory that runs out ---------------------------------------------------------------------- */

enum { VALUES = 4 };

/* A few sends and receives each way. What becomes of the senders is in results, what came in received. */
typedef struct scene {
    world w;
    size_t buffer[2];
    netchan_value values[2][VALUES];
    task s[2][VALUES], r[2][VALUES];
    bool s_over[2][VALUES], r_over[2][VALUES];
    int results[2][VALUES], received[2][VALUES], fresh[2][VALUES];
    uint64_t unknown[2];
} scene;

static void begin_scene_send(scene *k, int d, int i) {
    static const int timeouts[] = {NETCHAN_FOREVER, LONG};
    netchan *ch = way_of(&k->w, d).send;
    if (i == 2) begin_select(&k->s[d][i], ch, k->values[d][i], NULL, LONG);
    else begin_send(&k->s[d][i], ch, k->values[d][i], timeouts[i % 2]);
}

static void begin_scene_recv(scene *k, int d, int i) {
    static const int timeouts[] = {LONG, NETCHAN_FOREVER};
    netchan *ch = way_of(&k->w, d).recv;
    if (i == 2) begin_select(&k->r[d][i], NULL, netchan_nil(), ch, LONG);
    else begin_recv(&k->r[d][i], ch, timeouts[i % 2]);
}

/* Writes down what is over; receives and sends that were refused for a reason that passes begin again. Returns whether
 * any did. */
static bool look_at_scene(scene *k) {
    bool again = false;
    for (int d = 0; d < 2; d++) {
        for (int i = 0; i < VALUES; i++) {
            if (!k->s_over[d][i] && k->s[d][i].op.finished) {
                k->results[d][i] = end(&k->s[d][i]);
                if (k->results[d][i] == NETCHAN_ENOMEM || k->results[d][i] == NETCHAN_ELOST)
                    begin_scene_send(k, d, i), again = true;
                else k->s_over[d][i] = true;
            }
            if (k->r_over[d][i] || !k->r[d][i].op.finished) continue;
            int result = end(&k->r[d][i]);
            if (result == NETCHAN_OK) {
                int64_t id = netchan_as_int(netchan_at(&k->r[d][i].got, 0), -1);
                CHECK(id >= 0 && id < VALUES);
                k->received[d][id]++;
                k->fresh[d][id] += !k->r[d][i].op.redelivered;
                netchan_clear(&k->r[d][i].got);
                k->r_over[d][i] = true;
            } else {
                CHECK(result == NETCHAN_ELOST || result == NETCHAN_ENOMEM);
                begin_scene_recv(k, d, i);
                again = true;
            }
        }
    }
    return again;
}

static void check_scene(scene *k) {
    for (int d = 0; d < 2; d++) {
        size_t missing = 0;
        for (int i = 0; i < VALUES; i++) {
            int result = k->results[d][i];
            bool work_queue = d == 1 && k->buffer[1] > 0;
            CHECK(k->s_over[d][i]);
            CHECK(k->fresh[d][i] <= 1);
            CHECK(work_queue || k->received[d][i] <= 1);
            CHECK(result == NETCHAN_OK || result == NETCHAN_EUNKNOWN);
            if (result == NETCHAN_OK && !k->received[d][i]) missing++;
        }
        if (d == 0 && k->buffer[0]) CHECK(missing <= k->unknown[0]);
        else CHECK_INT(missing, 0);
    }
}

/* The scene, whose connection breaks after so many bytes have arrived, or when memory runs out at the n-th allocation.
 * last: who still gets what is under way then, 1 the listener, 2 the dialler. Returns whether it broke. */
static bool play(size_t dial_buffer, size_t listen_buffer, size_t value_size, size_t cut, int last, long fail_at) {
    static uint8_t bytes[20000];
    static scene k;
    memset(&k, 0, sizeof k);
    k.buffer[0] = dial_buffer;
    k.buffer[1] = listen_buffer;
    make_world(&k.w, dial_buffer, listen_buffer);
    netchan_value items[2 * VALUES][2];
    alloc_fail(fail_at);
    for (int d = 0; d < 2; d++) {
        for (int i = 0; i < VALUES; i++) {
            netchan_value *item = items[d * VALUES + i];
            item[0] = netchan_int(i);
            item[1] = netchan_bytes(bytes, i % 2 ? value_size : 3);
            k.values[d][i] = netchan_array(item, 2);
        }
    }
    size_t arrived = 0;
    for (int phase = 0; phase < 2; phase++) { /* who is there first differs */
        for (int i = phase; i < VALUES; i += 2) {
            begin_scene_send(&k, 0, i);
            begin_scene_recv(&k, 1, i);
        }
        for (int i = phase; i < VALUES; i += 2) {
            begin_scene_send(&k, 1, i);
            begin_scene_recv(&k, 0, i);
        }
    }
    size_t step = value_size > 1000 ? 997 : 1;
    for (bool more = true; more && arrived < cut && !(k.w.d.s->peer.breach || k.w.l.s->peer.breach);) {
        size_t before = arrived, shipped = ship(&k.w, &k.w.d) + ship(&k.w, &k.w.l);
        if (arrived < cut) arrived += arrive(&k.w, &k.w.l, step);
        if (arrived < cut) arrived += arrive(&k.w, &k.w.d, step);
        more = shipped || arrived > before;
    }
    bool failed = alloc_failed(), happened = fail_at ? failed : arrived >= cut;
    alloc_fail(0);
    if (last) arrive(&k.w, last == 1 ? &k.w.l : &k.w.d, SIZE_MAX);
    for (int d = 0; d < 2; d++) k.unknown[d] = stop(d ? &k.w.l : &k.w.d);
    start(&k.w, &k.w.d);
    start(&k.w, &k.w.l);
    do flow(&k.w);
    while (look_at_scene(&k));
    /* Receives whose value only the peer knew are left; and what is delivered twice may still be there. */
    for (int d = 0; d < 2; d++) {
        for (int i = 0; i < VALUES; i++) {
            if (k.r_over[d][i]) continue;
            expire(&k.r[d][i]);
            flow(&k.w);
            CHECK_INT(end(&k.r[d][i]), NETCHAN_ETIMEDOUT);
            k.r_over[d][i] = true;
        }
        while (netchan_len(way_of(&k.w, d).send) && d == 1) {
            k.r_over[d][0] = false;
            begin_scene_recv(&k, d, 0);
            flow(&k.w);
            look_at_scene(&k);
        }
    }
    check_scene(&k);
    check_works(&k.w);
    free_world(&k.w);
    return happened;
}

static void test_cut_after_each_byte(void) {
    for (int i = 0; i < 12; i++) {
        size_t dial_buffer = i % 2 ? 3 : 0, listen_buffer = i / 2 % 2 ? 3 : 0, cut = 0;
        while (play(dial_buffer, listen_buffer, 10, cut, i / 4, 0)) cut += LESS;
        CHECK(cut > 100);
        for (cut = 0; play(dial_buffer, listen_buffer, 20000, cut, i / 4, 0);) cut += 331 * LESS;
        CHECK(cut > 60000);
    }
}

static void test_memory_runs_out(void) {
    for (int i = 0; i < 4; i++) {
        size_t dial_buffer = i % 2 ? 3 : 0, listen_buffer = i / 2 ? 3 : 0;
        for (size_t size = 10; size <= 20000; size += 19990) {
            long n = 1;
            while (play(dial_buffer, listen_buffer, size, SIZE_MAX, 0, n)) n++;
            CHECK(n > 10);
        }
    }
}

int main(int argc, char **argv) {
    static const test_entry tests[] = {
        TEST(frames_round_trip),
        TEST(output_is_cut_between_frames),
        TEST(golden_bytes),
        TEST(greeting),
        TEST(bytes_come_in_pieces),
        TEST(order_in_pieces),
        TEST(fragments_take_turns),
        TEST(fragments_are_cut_when_they_are_needed),
        TEST(heartbeats),
        TEST(silence_is_a_breach),
        TEST(lies_to_the_listener),
        TEST(lies_to_the_dialler),
        TEST(lengths),
        TEST(lies_in_the_greeting),
        TEST(lies_about_what_waits),
        TEST(more_operations_than_allowed),
        TEST(nested_too_deep),
        TEST(values_that_never_left_go_over_the_next_session),
        TEST(order_over_the_next_session),
        TEST(close_after_what_was_sent),
        TEST(farewell),
        TEST(cut_after_each_byte),
        TEST(memory_runs_out),
        TEST_END,
    };
    return test_main(argc, argv, tests);
}
