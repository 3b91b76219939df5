/* Sessions without TLS, sockets, threads and clocks: sections [13] and [14] of netchan.h. A dialling and a listening hub
 * are joined by cables, each of them two wires and two buffers, and a test decides which bytes arrive when, and when a
 * cable is cut. Operations are begun and left as netchan_send() and netchan_recv() do it, but nobody sleeps on them. */
#include "alloc.h"
#include <stddef.h>
#include <stdint.h>
static size_t window = (size_t)4 << 20; /* a test may make them small */
static uint64_t key_records = (uint64_t)1 << 23;
#define NETCHAN_WINDOW window
#define NETCHAN_KEY_RECORDS key_records
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

enum { DIALLER, LISTENER };
enum { FLOW_DIALS = 20 }; /* more new links than ever follow from one thing that happens */

/* Bytes on their way, in memory that never fails a test. */
typedef struct pipeline {
    uint8_t *data;
    size_t start, end;
} pipeline;

/* One link, from end to end. */
typedef struct cable {
    netchan__wire wire[2]; /* the dialler's end, the listener's */
    pipeline to[2];
    bool open[2];
    bool cut;   /* who closes its end is not noticed at the other */
    bool forged; /* its dialling end is the test */
    bool held;   /* nothing arrives for now */
    bool asked;  /* for a session that is not known */
} cable;

typedef struct side {
    netchan__hub h;
    int who;
} side;

typedef struct world {
    side d, l; /* who dials, who listens */
    cable cables[8];
    cable *newest;
    bool redials; /* the dialler makes a new cable when it wants one */
    int dials;    /* how often it still may before a test is given up */
    uint64_t now, seed;
} world;

static side *other(world *w, const side *x) {
    return x == &w->d ? &w->l : &w->d;
}

#define FOR_CABLES(w, c) for (cable *c = (w)->cables; c < (w)->cables + sizeof(w)->cables / sizeof *(w)->cables; c++)

static size_t pipe_size(const pipeline *p) {
    return p->end - p->start;
}

static size_t under_way(world *w, const side *x) {
    size_t size = 0;
    FOR_CABLES(w, c) size += pipe_size(&c->to[x->who]);
    return size;
}

static void send_bytes(pipeline *p, const void *data, size_t size) {
    p->data = (uint8_t *)realloc(p->data, p->end + size);
    CHECK(p->data);
    memcpy(p->data + p->end, data, size);
    p->end += size;
}

static void drop_bytes(pipeline *p) {
    free(p->data);
    memset(p, 0, sizeof *p);
}

static void lock(void) {
    pthread_mutex_lock(&netchan__net_lock);
}

static void unlock(void) {
    netchan__io_unlock();
}

/* The newest session of a side, or NULL. */
static netchan__session *session(const side *x) {
    return x->h.sessions;
}

static const char *breach(const side *x) {
    return session(x) ? session(x)->peer.breach : NULL;
}

/* The cable over which that session goes, or NULL. */
static cable *line(const side *x) {
    return session(x) && session(x)->wire ? (cable *)session(x)->wire->owner : NULL;
}

static void make_side(side *x, int who, const netchan_options *o) {
    memset(x, 0, sizeof *x);
    x->who = who;
    CHECK_INT(netchan__hub_make(&x->h, o, who == DIALLER), NETCHAN_OK);
    x->h.link.address = "here";
}

static void random_bytes(world *w, uint8_t *to, size_t size) {
    for (size_t i = 0; i < size; i++) to[i] = (uint8_t)test_random(&w->seed);
}

/* Bytes can go, and no greeting was said yet. */
static cable *lay_cable(world *w) {
    cable *c = w->cables;
    while (c->open[0] || c->open[1]) CHECK(++c < w->cables + sizeof w->cables / sizeof *w->cables);
    memset(c, 0, sizeof *c);
    random_bytes(w, c->wire[0].binding, sizeof c->wire[0].binding);
    memcpy(c->wire[1].binding, c->wire[0].binding, sizeof c->wire[0].binding);
    random_bytes(w, c->wire[1].fresh, sizeof c->wire[1].fresh);
    for (int i = 0; i < 2; i++) {
        c->wire[i].owner = c;
        memset(c->wire[i].identity, 5 + i, sizeof c->wire[i].identity);
        snprintf(c->wire[i].address, sizeof c->wire[i].address, "nowhere");
        c->open[i] = true;
    }
    w->newest = c;
    return c;
}

/* A new link, as after a TLS handshake. */
static cable *start(world *w) {
    cable *c = lay_cable(w);
    lock();
    netchan__wire_start(&c->wire[DIALLER], &w->d.h, w->now);
    netchan__wire_start(&c->wire[LISTENER], &w->l.h, w->now);
    unlock();
    return c;
}

/* A link whose dialling end is the test. */
static cable *knock(world *w) {
    cable *c = lay_cable(w);
    c->forged = true;
    lock();
    netchan__wire_start(&c->wire[LISTENER], &w->l.h, w->now);
    unlock();
    return c;
}

/* One side finds that the link is gone. */
static void drop_end(world *w, cable *c, int who, const char *reason) {
    char text[200];
    if (!c->open[who]) return;
    snprintf(text, sizeof text, "%s", reason);
    c->open[who] = false;
    drop_bytes(&c->to[who]);
    if (c->forged && who == DIALLER) return;
    lock();
    netchan__wire_down(&c->wire[who], w->now, text);
    unlock();
}

/* Both sides find it at once. */
static void cut(world *w, cable *c) {
    c->cut = true;
    drop_end(w, c, DIALLER, "cut");
    drop_end(w, c, LISTENER, "cut");
}

/* The sessions of a side end where they stand; what was on its way to it is gone. Returns how many values only the peer
 * knew. */
static uint64_t stop(world *w, side *x) {
    uint64_t unknown = x->h.unknown;
    FOR_CABLES(w, c) drop_end(w, c, x->who, "stopped");
    lock();
    netchan__hub_stop(&x->h);
    unlock();
    return x->h.unknown - unknown;
}

static void make_world_with(world *w, const netchan_options *d, const netchan_options *l) {
    memset(netchan__net.process, 7, sizeof netchan__net.process);
    netchan__net.on_drained = netchan__lane_drained;
    memset(w, 0, sizeof *w);
    w->now = 1000 * MS;
    w->seed = 11;
    w->redials = true;
    make_side(&w->d, DIALLER, d);
    make_side(&w->l, LISTENER, l);
    start(w);
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

static netchan_report free_side(world *w, side *x) {
    stop(w, x);
    lock();
    if (!x->h.shut) netchan__shut_link(&x->h);
    netchan__settle();
    netchan_report r = netchan__hub_close(&x->h);
    unlock();
    netchan__hub_free(&x->h);
    return r;
}

/* The listening process is gone, and another one listens in its place. */
static netchan_report replace_listener(world *w, size_t buffer) {
    netchan_options o = buffer_of(buffer);
    netchan_report r = free_side(w, &w->l);
    make_side(&w->l, LISTENER, &o);
    return r;
}

static void free_world(world *w) {
    free_side(w, &w->d);
    free_side(w, &w->l);
    CHECK_INT(netchan__net.waiters.count, 0);
    CHECK_INT(netchan__net.matches.count, 0);
    CHECK(!netchan__net.pending && !netchan__net.peers);
    netchan__map_free(&netchan__net.waiters);
    netchan__map_free(&netchan__net.matches);
    CHECK_INT(netchan__net.relays.count, 0);
    CHECK_INT(netchan__net.by_number.count, 0);
    CHECK(!netchan__dead);
    netchan__map_free(&netchan__net.relays);
    netchan__map_free(&netchan__net.by_number);
    CHECK_INT(alloc_blocks(), 0);
}

/* --- bytes -------------------------------------------------------------------------------------------------------- */

/* Puts what one end has to say, at most one record, on its way. Returns how many bytes. */
static size_t ship_from(cable *c, int who) {
    static uint8_t record[NETCHAN__FRAME_MAX];
    if (!c->open[who] || (c->forged && who == DIALLER)) return 0;
    lock();
    size_t size = netchan__wire_output(&c->wire[who], record, NULL);
    unlock();
    CHECK(size <= NETCHAN__FRAME_MAX);
    if (size && c->open[!who]) send_bytes(&c->to[!who], record, size);
    return size;
}

static size_t ship(world *w, side *x) {
    size_t size = 0;
    FOR_CABLES(w, c) size += ship_from(c, x->who);
    return size;
}

/* The next bytes arrive at an end, at most max and no more than a record. Returns how many. */
static size_t arrive_at(world *w, cable *c, int who, size_t max) {
    netchan__wire *x = &c->wire[who];
    pipeline *p = &c->to[who];
    size_t size = pipe_size(p);
    if (size > max) size = max;
    if (size > NETCHAN__FRAME_MAX) size = NETCHAN__FRAME_MAX;
    if (!size || c->held || !c->open[who] || (c->forged && who == DIALLER)) return 0;
    if (x->paused || netchan__wire_over(x)) return 0;
    uint8_t *copy = (uint8_t *)malloc(size); /* no byte too many, so that the sanitizer sees who reads on */
    CHECK(copy);
    memcpy(copy, p->data + p->start, size);
    lock();
    netchan__wire_input(x, w->now, copy, size);
    unlock();
    free(copy);
    p->start += size;
    if (p->start == p->end) drop_bytes(p);
    return size;
}

static size_t arrive(world *w, side *x, size_t max) {
    size_t size = 0;
    FOR_CABLES(w, c) size += arrive_at(w, c, x->who, max - size);
    return size;
}

static void check_no_breach(const side *x) {
    if (breach(x)) test_fail(__FILE__, __LINE__, "breach: %s", breach(x));
}

/* Sessions end and answer farewells, as often as the I/O thread looks at them. Returns when to look again. */
static uint64_t tick_hub(world *w, side *x) {
    lock();
    uint64_t next = netchan__hub_tick(&x->h, w->now);
    unlock();
    return next;
}

/* A link that has failed is closed, with its last words when they have left; the other end finds it. */
static bool close_ends(world *w) {
    bool any = false;
    FOR_CABLES(w, c) {
        for (int who = 0; who < 2; who++) {
            netchan__wire *x = &c->wire[who];
            bool fails = x->failure && (!x->flush || netchan__wire_idle(x));
            bool ends = !c->open[!who] && !c->cut && !pipe_size(&c->to[who]);
            if (!c->open[who] || (!fails && !ends)) continue;
            drop_end(w, c, who, fails ? x->failure : "it closed the connection");
            any = true;
        }
    }
    return any;
}

static bool redial(world *w) {
    if (!w->redials || !netchan__hub_wants_wire(&w->d.h)) return false;
    if (w->d.h.hanging_up && !session(&w->d)) return false; /* netchan_hangup() does not wait for that */
    if (w->l.h.hanging_up && !w->l.h.peers) return false;   /* nobody listens any more */
    FOR_CABLES(w, c) if (c->open[DIALLER] && !c->forged && !c->wire[DIALLER].up) return false;
    if (w->dials-- <= 0) test_fail(__FILE__, __LINE__, "it dials again and again");
    start(w);
    return true;
}

/* What the I/O thread does beside moving bytes. Returns whether anything came of it. */
static bool look_after(world *w) {
    size_t peers = w->d.h.peers + w->l.h.peers;
    tick_hub(w, &w->d);
    tick_hub(w, &w->l);
    bool closed = close_ends(w), dialled = redial(w);
    return closed || dialled || w->d.h.peers + w->l.h.peers != peers;
}

/* Goes to when the next acknowledgement is due. Returns whether there is one. */
static bool pass_time(world *w) {
    netchan__wire *due = NULL;
    FOR_CABLES(w, c) {
        for (int who = 0; who < 2; who++) {
            netchan__wire *x = &c->wire[who];
            if (!c->open[who] || !x->session || !x->ack_at || x->failure || x->paused) continue;
            if (!due || x->ack_at < due->ack_at) due = x;
        }
    }
    if (!due) return false;
    if (due->ack_at > w->now) w->now = due->ack_at;
    lock();
    netchan__wire_tick(due, w->now);
    unlock();
    return true;
}

/* Lets all arrive that is said, and what is said in answer. */
static void flow(world *w) {
    w->dials = FLOW_DIALS;
    do
        while (ship(w, &w->d) + ship(w, &w->l) + arrive(w, &w->d, SIZE_MAX) + arrive(w, &w->l, SIZE_MAX) +
               look_after(w))
            continue;
    while (pass_time(w));
}

/* The same in pieces of random sizes, in random order. */
static void trickle(world *w, uint64_t *seed, size_t largest) {
    w->dials = FLOW_DIALS;
    for (bool more = true; more;) {
        more = false;
        for (int i = 0; i < 8; i++) {
            side *x = test_random(seed) % 2 ? &w->d : &w->l;
            size_t n = test_random(seed) % 3 ? arrive(w, x, 1 + test_random(seed) % largest) : ship(w, x);
            more = more || n;
        }
        more = more || look_after(w) || ship(w, &w->d) || ship(w, &w->l) || under_way(w, &w->d) ||
               under_way(w, &w->l) || pass_time(w);
    }
    check_no_breach(&w->d);
    check_no_breach(&w->l);
}

/* --- what happened ------------------------------------------------------------------------------------------------ */

typedef struct happening {
    char event[16], reason[200];
    uint64_t taken, returned, unknown, replayed;
} happening;

static uint64_t event_number(const netchan_value *v, const char *key) {
    return netchan_as_uint(netchan_get(v, key), 0);
}

static bool next_event(side *x, happening *e) {
    netchan_value v;
    memset(e, 0, sizeof *e);
    if (netchan_recv(x->h.link.events, &v, NETCHAN_NOWAIT) != NETCHAN_OK) return false;
    snprintf(e->event, sizeof e->event, "%s", netchan_as_str(netchan_get(&v, "event"), "?"));
    snprintf(e->reason, sizeof e->reason, "%s", netchan_as_str(netchan_get(&v, "reason"), ""));
    e->taken = event_number(&v, "taken");
    e->returned = event_number(&v, "returned");
    e->unknown = event_number(&v, "unknown");
    e->replayed = event_number(&v, "replayed");
    netchan_clear(&v);
    return true;
}

/* All events so far are these, in this order. Returns the last. */
static happening check_events(side *x, const char *names) {
    happening e, last;
    char all[2000] = "";
    memset(&last, 0, sizeof last);
    while (next_event(x, &e)) {
        size_t length = strlen(all);
        if (length + sizeof e.event + 2 < sizeof all)
            snprintf(all + length, sizeof all - length, "%s%s", *all ? " " : "", e.event);
        last = e;
    }
    CHECK_STR(all, names);
    return last;
}

static void check_counts(const happening *e, uint64_t taken, uint64_t returned, uint64_t unknown) {
    CHECK_INT(e->taken, taken);
    CHECK_INT(e->returned, returned);
    CHECK_INT(e->unknown, unknown);
}

static netchan_stats stats(side *x) {
    lock();
    netchan_stats s = netchan__hub_stats(&x->h);
    unlock();
    return s;
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
            t->op.wake = NETCHAN__FINISHED;
            t->op.index = -1;
            t->op.count = 0;
            return;
        }
    }
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
    if (!netchan__is_finished(&t->op)) netchan__expire(&t->op);
    netchan__unlock_all(&t->locks);
}

/* Leaves an operation that is over. Returns its result; which case it was is in t->op.index. */
static int end(task *t) {
    CHECK(netchan__is_finished(&t->op));
    if (t->op.count) {
        netchan__lock_all(&t->op, &t->locks);
        netchan__leave_queues(&t->op);
        netchan__unlock_all(&t->locks);
        for (size_t i = 0; i < t->op.count; i++)
            if (t->waiters[i].ch && !t->waiters[i].ch->is_end) netchan_clear(&t->waiters[i].value);
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
    y.send = direction ? w->l.h.link.send : w->d.h.link.send;
    y.recv = direction ? w->d.h.link.recv : w->l.h.link.recv;
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
    cable *c = line(x) ? line(x) : w->newest;
    send_bytes(&c->to[x->who], t->data, t->size);
    while (arrive_at(w, c, x->who, SIZE_MAX)) continue;
}

/* A session on a wire, without hubs. */
typedef struct bare {
    netchan__session *s;
    netchan__wire wire;
    netchan__hub hub;
    uint8_t record[NETCHAN__FRAME_MAX];
} bare;

static void make_bare(bare *b) {
    memset(b, 0, sizeof *b);
    b->s = (netchan__session *)netchan__alloc(sizeof *b->s);
    CHECK(b->s);
    b->s->peer.emit = netchan__session_emit;
    b->s->peer.max_message = (size_t)1 << 20;
    b->s->peer.max_memory = (size_t)1 << 30;
    b->s->peer.stats = &b->hub.stats;
    b->wire.hub = &b->hub;
    b->s->wire = &b->wire;
    b->wire.session = b->s;
    b->wire.up = true;
}

/* What one side emits is what the other reads, for each type and for numbers of all sizes. */
static void test_frames_round_trip(void) {
    uint64_t seed = 3;
    for (int round = 0; round < 40000 / LESS; round++) {
        unsigned type = (unsigned)(test_random(&seed) % 0x30);
        const char *fields = netchan__frame_fields(type);
        if (!fields) continue;
        static bare b;
        make_bare(&b);
        netchan__session *s = b.s;
        netchan__frame f, back;
        uint8_t bytes[300];
        memset(&f, 0, sizeof f);
        memset(&back, 0, sizeof back);
        f.type = back.type = type;
        for (const char *c = fields; *c; c++) {
            uint64_t *field = netchan__frame_field(&f, *c);
            if (field) *field = test_random(&seed) >> test_random(&seed) % 48;
        }
        for (size_t i = 0; i < sizeof f.process; i++) f.process[i] = (uint8_t)test_random(&seed);
        if (strchr(fields, 's')) f.size = 0;
        if (strchr(fields, 'v')) {
            f.has_value = type == NETCHAN__DATA || test_random(&seed) % 2;
            f.value = netchan_bytes(bytes, test_random(&seed) % sizeof bytes);
            if (f.has_value) CHECK_INT(netchan_encode(&f.value, NULL, 0, &f.size), NETCHAN_ETOOBIG);
        }
        if (strchr(fields, 'b')) f.bytes = bytes, f.count = test_random(&seed) % sizeof bytes;
        for (size_t i = 0; i < sizeof bytes; i++) bytes[i] = (uint8_t)test_random(&seed);
        lock();
        CHECK_INT(s->peer.emit(&s->peer, &f), 1);
        size_t size = netchan__wire_output(&b.wire, b.record, NULL);
        netchan__reader r = {b.record, b.record + size, false};
        uint64_t length = netchan__read_varint(&r);
        CHECK_INT(length, netchan__left(&r));
        CHECK_INT(*r.p++, type);
        CHECK(netchan__read_frame(s, &back, &r));
        for (const char *c = fields; *c; c++)
            CHECK(!netchan__frame_field(&f, *c) ||
                  *netchan__frame_field(&f, *c) == *netchan__frame_field(&back, *c));
        if (strchr(fields, 'p') && f.flags & NETCHAN__RELAYED) CHECK(memcmp(f.process, back.process, 16) == 0);
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
        static bare b;
        make_bare(&b);
        netchan__session *s = b.s;
        size_t sizes[200], count = 1 + test_random(&seed) % 200, next = 0;
        uint64_t given = 0;
        lock();
        for (size_t i = 0; i < count; i++) {
            netchan__frame f;
            memset(&f, 0, sizeof f);
            f.type = NETCHAN__FRAGMENT_UP;
            f.match = test_random(&seed) % 2 ? i : UINT64_MAX;
            f.bytes = bytes;
            f.count = sizes[i] = test_random(&seed) % (test_random(&seed) % 4 ? 100 : sizeof bytes + 1);
            CHECK_INT(s->peer.emit(&s->peer, &f), i + 1); /* its number */
        }
        CHECK_INT(s->queued, count);
        for (size_t size; (size = netchan__wire_output(&b.wire, b.record, NULL)) > 0; given += size) {
            CHECK(size <= NETCHAN__FRAME_MAX);
            netchan__reader r = {b.record, b.record + size, false};
            while (netchan__left(&r)) {
                size_t length = (size_t)netchan__read_varint(&r);
                const uint8_t *body = netchan__read_bytes(&r, length);
                CHECK(body && *body == NETCHAN__FRAGMENT_UP && next < count);
                netchan__reader field = {body + 1, body + length, false};
                netchan__read_varint(&field);
                CHECK_INT(netchan__left(&field), sizes[next++]);
            }
            CHECK_INT(s->peer.sent, next);
        }
        CHECK_INT(next, count);
        CHECK_INT(given, netchan__buf_size(&s->out)); /* all is kept */
        CHECK_INT(s->given, given);
        CHECK(netchan__wire_idle(&b.wire));
        netchan__session_free(s);
        unlock();
    }
    CHECK_INT(alloc_blocks(), 0);
}

/* The types and first numbers of the frames in some bytes. */
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

/* How many frames of this type are on their way to that side over the newest cable. */
static size_t count_frames(world *w, const side *x, unsigned type) {
    unsigned types[64];
    uint64_t ids[64];
    const pipeline *p = &w->newest->to[x->who];
    size_t n = list_frames(p->data + p->start, pipe_size(p), types, ids, 64), found = 0;
    for (size_t i = 0; i < n; i++) found += types[i] == type;
    return found;
}

static void check_bytes(world *w, const side *x, const void *right, size_t size) {
    const pipeline *p = &w->newest->to[x->who];
    CHECK_INT(pipe_size(p), size);
    for (size_t i = 0; i < size; i++)
        if (p->data[p->start + i] != ((const uint8_t *)right)[i])
            test_fail(__FILE__, __LINE__, "byte %zu is %02x", i, p->data[p->start + i]);
}

/* The bytes that the WIRE section at the top of netchan.h promises. */
static void test_golden_greetings(void) {
    world w;
    netchan_options d = buffer_of(5), l = buffer_of(0);
    d.max_message = 300;
    d.max_memory = 20000;
    d.max_ops = 7;
    d.max_ends = 129;
    d.ping_ms = 1000;
    l.max_message = 301;
    l.max_memory = 1000;
    l.max_ops = 8;
    l.max_ends = 3;
    l.ping_ms = 2;
    make_world_with(&w, &d, &l);
    ship(&w, &w.d);
    uint8_t hello[] = {
        36,   0x01, 'n',  'e',  't',  'c', 'h',  'a',  'n', 1, /* LENGTH, type, magic, version */
        7,    7,    7,    7,    7,    7,   7,    7,            /* process id */
        7,    7,    7,    7,    7,    7,   7,    7,            /* */
        0xac, 0x02, 0xa0, 0x9c, 0x01, 7,                       /* max_message, max_memory, max_ops */
        0x81, 0x01, 0xe8, 0x07, 5,                             /* max_ends, ping_ms, capacity */
    };
    check_bytes(&w, &w.l, hello, sizeof hello);
    for (int i = 0; i < 16; i++) w.newest->wire[LISTENER].fresh[i] = (uint8_t)(0x41 + i);
    for (int i = 16; i < 48; i++) w.newest->wire[LISTENER].fresh[i] = (uint8_t)(0x80 + i);
    arrive(&w, &w.l, SIZE_MAX);
    text answer;
    answer.size = 0;
    put_bytes(&answer, hello, 26);
    answer.data[0] = 24 + 8 + 48 + 1;
    put_bytes(&answer, "\xad\x02\xe8\x07\x08\x03\x02\x05", 8); /* limits, ping_ms, capacity */
    for (unsigned i = 0; i < 16; i++) put_byte(&answer, 0x41 + i); /* session id */
    for (unsigned i = 16; i < 48; i++) put_byte(&answer, 0x80 + i); /* secret */
    answer.data[0] = (uint8_t)(answer.size - 1);
    put_bytes(&answer, "\4\x25\0\1\0", 5); /* CREDIT */
    ship(&w, &w.l);
    check_bytes(&w, &w.d, answer.data, answer.size);
    arrive(&w, &w.d, SIZE_MAX);
    CHECK(memcmp(session(&w.d)->id, answer.data + 34, 16) == 0 && memcmp(session(&w.l)->id, answer.data + 34, 16) == 0);
    CHECK(memcmp(session(&w.d)->secret, answer.data + 50, 32) == 0);
    flow(&w);
    free_world(&w);
}

static void test_golden_frames(void) {
    world w;
    task s, r;
    make_world(&w, 0, 0);
    flow(&w);
    netchan__net.last_id = 0x80;
    netchan__op_count = 8;
    begin_send(&s, w.d.h.link.send, netchan_str("hello"), NETCHAN_FOREVER);
    ship(&w, &w.d);
    static const uint8_t offer[] = {13, 0x10, 0, 0x81, 0x01, 9, 4 | 8, 6, 0x45, 'h', 'e', 'l', 'l', 'o'};
    check_bytes(&w, &w.l, offer, sizeof offer);
    begin_recv(&r, w.l.h.link.recv, LONG);
    arrive(&w, &w.l, SIZE_MAX);
    ship(&w, &w.l);
    static const uint8_t accept[] = {2, 0x05, 1, 4, 0x23, 0x81, 0x01, 0}; /* ACK 1, ACCEPT */
    check_bytes(&w, &w.d, accept, sizeof accept);
    flow(&w);
    CHECK_INT(end(&s), NETCHAN_OK);
    CHECK_INT(end(&r), NETCHAN_OK);
    CHECK_STR(netchan_as_str(&r.got, "?"), "hello");
    netchan_clear(&r.got);
    w.redials = false;
    lock();
    netchan__emit_number(&line(&w.d)->wire[DIALLER], NETCHAN__PING, 300);
    netchan__emit_bye(session(&w.d), false);
    unlock();
    ship(&w, &w.d);
    check_bytes(&w, &w.l, "\3\2\xac\2\2\4\0", 7); /* PING 300, BYE 0 */
    flow(&w);
    CHECK(!session(&w.l) && !session(&w.d));
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
    CHECK_INT(w.l.h.peers, 0);
    arrive(&w, &w.l, SIZE_MAX);
    CHECK_INT(w.l.h.peers, 1);
    CHECK(w.newest->wire[LISTENER].up && !w.newest->wire[DIALLER].up);
    flow(&w);
    CHECK_INT(w.d.h.peers, 1);
    CHECK(w.d.h.was_up && w.d.h.session == session(&w.d));
    CHECK_INT(session(&w.d)->peer.their_message, 2000);
    CHECK_INT(session(&w.l)->peer.their_message, 1000);
    CHECK_INT(netchan_cap(w.l.h.link.recv), 5);
    CHECK_INT(netchan_cap(w.d.h.link.send), 5);
    CHECK_INT(netchan_cap(w.l.h.link.send), 9);
    check_works(&w);
    check_events(&w.d, "up");
    check_events(&w.l, "up");
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
                if (sending && netchan__is_finished(&s.op)) {
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
        while (!session(from)->parcels || !session(from)->parcels->next)
            CHECK(ship(&w, &w.d) + ship(&w, &w.l) + arrive(&w, &w.d, 10) + arrive(&w, &w.l, 10));
        while (under_way(&w, other(&w, from))) arrive(&w, other(&w, from), SIZE_MAX); /* what came with the grants */
        unsigned types[64], fragments = 0, before_small = 0;
        uint64_t ids[64], last = 0;
        size_t first = netchan__unsent(session(from)) / NETCHAN__FRAGMENT; /* cut when there was only one */
        bool small_seen = false;
        begin_recv(&small_r, y.recv, NETCHAN_FOREVER);
        begin_send(&small_s, y.send, netchan_int(5), NETCHAN_FOREVER);
        for (size_t size; (size = ship(&w, from)) > 0;) {
            const pipeline *p = &w.newest->to[!from->who];
            size_t n = list_frames(p->data + p->end - size, size, types, ids, 64);
            for (size_t i = 0; i < n; i++) {
                if (types[i] == NETCHAN__ACK) continue;
                if (types[i] != (unsigned)(d ? NETCHAN__FRAGMENT_DOWN : NETCHAN__FRAGMENT_UP)) {
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
    begin_send(&s, w.d.h.link.send, netchan_bytes(bytes, SIZE), NETCHAN_FOREVER);
    begin_recv(&r, w.l.h.link.recv, LONG);
    while (!netchan__is_finished(&r.op)) {
        CHECK(ship(&w, &w.d) + ship(&w, &w.l) + arrive(&w, &w.d, SIZE_MAX) + arrive(&w, &w.l, SIZE_MAX));
        CHECK(netchan__unsent(session(&w.d)) <= NETCHAN__STREAM_LOW + NETCHAN__FRAME_MAX);
        CHECK(netchan__buf_size(&w.newest->wire[LISTENER].in) <= NETCHAN__FRAME_MAX);
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
    uint64_t next = netchan__wire_tick(&w->newest->wire[x->who], w->now);
    unlock();
    return next;
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
    flow(&w);
    tick(&w, &w.d); /* the first at once: it measures the round trip */
    ship(&w, &w.d);
    CHECK_INT(count_frames(&w, &w.l, NETCHAN__PING), 1);
    w.now += 7 * MS;
    flow(&w);
    CHECK_INT(stats(&w.d).round_trip_us, 7000);
    uint64_t begin_at = w.now;
    w.now += 99 * MS;
    uint64_t next = tick(&w, &w.d); /* the heartbeats of all links coincide, every sixteenth of the time */
    CHECK(next >= begin_at + 100 * MS && next < begin_at + 107 * MS);
    CHECK_INT(ship(&w, &w.d), 0);
    w.now = next;
    next = tick(&w, &w.d);
    CHECK(next >= w.now + 100 * MS && next < w.now + 107 * MS);
    CHECK(ship(&w, &w.d) > 0);
    CHECK_INT(count_frames(&w, &w.l, NETCHAN__PING), 1);
    tick(&w, &w.d); /* not once more */
    CHECK_INT(ship(&w, &w.d), 0);
    arrive(&w, &w.l, SIZE_MAX);
    CHECK(ship(&w, &w.l) > 0);
    CHECK_INT(count_frames(&w, &w.d, NETCHAN__PONG), 1);
    w.now += 5 * MS;
    flow(&w);
    CHECK_INT(stats(&w.d).round_trip_us, 5000);
    next = tick(&w, &w.d);
    CHECK(next >= w.now + 100 * MS && next < w.now + 107 * MS); /* it lives */
    for (int i = 0; i < 50; i++) {               /* an idle link stays */
        next = tick(&w, &w.d);
        uint64_t next_l = tick(&w, &w.l);
        flow(&w);
        CHECK(next > w.now && next_l > w.now);
        w.now = next < next_l ? next : next_l;
    }
    check_works(&w);
    check_events(&w.d, "up");
    free_world(&w);
}

/* The other side is silent. Called whenever it asks to be called, the wire finds out in time, and the session waits. */
static void test_silence_is_the_end_of_a_link(void) {
    world w;
    netchan_options o = ping_of(100);
    make_world_with(&w, &o, &o);
    flow(&w);
    uint64_t begin_at = w.now;
    netchan__wire *wire = &w.newest->wire[DIALLER];
    while (!wire->failure) {
        w.now = tick(&w, &w.d);
        CHECK(w.now <= begin_at + 400 * MS);
    }
    CHECK(strstr(wire->failure, "300 ms") != NULL);
    CHECK(!breach(&w.d));
    w.redials = false;
    close_ends(&w);
    CHECK(strstr(check_events(&w.d, "up down").reason, "300 ms") != NULL);
    free_world(&w);

    make_world_with(&w, &o, &o);
    flow(&w);
    task any;
    begin_recv(&any, w.d.h.link.recv, LONG);
    ship(&w, &w.d);
    wire = &w.newest->wire[LISTENER];
    for (int i = 1; i <= 598; i++) {
        w.now += 1 * MS;
        tick(&w, &w.l);
        CHECK(!wire->failure);
        if (i == 299) arrive(&w, &w.l, 1); /* a single byte is a sign of life */
    }
    w.now += 1 * MS;
    tick(&w, &w.l);
    CHECK(wire->failure != NULL);
    stop(&w, &w.d);
    CHECK_INT(end(&any), NETCHAN_ELOST);
    free_world(&w);
}

/* A process that was stopped reads first what came meanwhile. */
static void test_time_that_jumps_is_no_silence(void) {
    world w;
    netchan_options o = ping_of(100);
    make_world_with(&w, &o, &o);
    flow(&w);
    tick(&w, &w.d);
    w.now += 3600 * 1000 * MS;
    tick(&w, &w.d);
    CHECK(!w.newest->wire[DIALLER].failure);
    uint64_t begin_at = w.now;
    while (!w.newest->wire[DIALLER].failure) { /* but then it is */
        w.now = tick(&w, &w.d);
        CHECK(w.now <= begin_at + 400 * MS);
    }
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
#define FEW(...) sizeof((uint64_t[]){__VA_ARGS__}) / sizeof(uint64_t), {__VA_ARGS__}

/* What is wrong with what came over the newest link; why NULL: nothing. */
static void check_complaint(world *w, const side *x, const char *why, const char *name) {
    const char *is = netchan__wire_over(&w->newest->wire[x->who]);
    if (!why && is) test_fail(__FILE__, __LINE__, "%s: it complains: %s", name, is);
    if (why && (!is || !strstr(is, why)))
        test_fail(__FILE__, __LINE__, "%s: it complains: %s; not: %s", name, is ? is : "not at all", why);
}

/* Both sessions end where they stand, and a new one begins. */
static void restart(world *w) {
    stop(w, &w->d);
    stop(w, &w->l);
    start(w);
}

/* After a breach nothing more is read, the session is lost, and the other side is told. */
static void check_lost(world *w, side *x) {
    char why[120];
    happening e;
    snprintf(why, sizeof why, "%s", breach(x));
    send_bytes(&line(x)->to[x->who], "\2\2\5", 3);
    CHECK_INT(arrive(w, x, SIZE_MAX), 0);
    while (next_event(&w->d, &e) || next_event(&w->l, &e)) continue;
    FOR_CABLES(w, c) drop_bytes(&c->to[!x->who]); /* which may have answered to what was true */
    w->redials = false;
    flow(w);
    CHECK(!session(x) && !session(other(w, x)));
    e = check_events(x, "lost");
    CHECK_STR(e.reason, why);
    e = check_events(other(w, x), "lost");
    CHECK(strncmp(e.reason, "it said: ", 9) == 0);
    CHECK_STR(e.reason + 9, why);
    w->redials = true;
}

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
    check_complaint(&w, x, a->why, "");
    if (a->why) check_lost(&w, x);
    else restart(&w); /* it goes on; but the other side would not understand what its lie is answered */
    flow(&w);
    check_works(&w);
    free_world(&w);
}

static const char deep[] = "\x88\x02\x01"; /* an array of one, again and again */

static void test_lies_to_the_listener(void) {
    static const lie lies[] = {
        {"greeted twice", NETCHAN__HELLO, 0, {0}, "netchan\1................\1\1\1\1\1\1", 30},
        {"greeted twice", NETCHAN__RESUME, 0, {0}, "................\7\0................................", 50},
        {"greeted twice", NETCHAN__RESUMED, 0, {0}, "\0................................", 33},
        {"never sent", NETCHAN__ACK, FEW(1), NULL, 0},
        {"never sent", NETCHAN__ACK, FEW(UINT64_MAX), NULL, 0},
        {NULL, NETCHAN__ACK, FEW(0), NULL, 0},
        {CUT_OFF, NETCHAN__ACK, 0, {0}, NULL, 0},
        {CUT_OFF, NETCHAN__BYE, 0, {0}, NULL, 0},
        {CUT_OFF, NETCHAN__OFFER, FEW(0, 1), NULL, 0},
        {CUT_OFF, NETCHAN__OFFER, FEW(0, 1, 1, 16, 1), NULL, 0}, /* no process */
        {CUT_OFF, NETCHAN__DEMAND, FEW(1, 1, 1, 0), NULL, 0},
        {CUT_OFF, NETCHAN__PING, 0, {0}, NULL, 0},
        {CUT_OFF, NETCHAN__WITHDRAW, 0, {0}, NULL, 0},
        {CUT_OFF, NETCHAN__GRANT, FEW(1), "\x80", 1},
        {CUT_OFF, NETCHAN__DECLINE, FEW(1), NULL, 0},
        {CUT_OFF, NETCHAN__FRAGMENT_UP, 0, {0}, NULL, 0},
        {CUT_OFF, NETCHAN__FRAGMENT_DOWN, 0, {0}, NULL, 0},
        {CUT_OFF, NETCHAN__DROP, FEW(2, 1), NULL, 0},
        {CUT_OFF, NETCHAN__IMPORT, FEW(1), NULL, 0},
        {CUT_OFF, NETCHAN__IMPORTED, FEW(1), NULL, 0},
        {CUT_OFF, NETCHAN__FORGET, 0, {0}, NULL, 0},
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
        {TWICE, NETCHAN__DEMAND, FEW(0, 1, 1, 0, 0), NULL, 0},
        {TWICE, NETCHAN__DEMAND, FEW(1, 0, 1, 0, 0), NULL, 0},
        {TWICE, NETCHAN__DEMAND, FEW(2, 1, 1, 0, 0), NULL, 0},
        {NULL, NETCHAN__WITHDRAW, FEW(77), NULL, 0}, /* it may be over already */
        {"granted", NETCHAN__GRANT, FEW(77, 0), NULL, 0},
        {"declined", NETCHAN__DECLINE, FEW(77, 0), NULL, 0},
        {"took", NETCHAN__TAKEN, FEW(77), NULL, 0},
        {"fragment", NETCHAN__FRAGMENT_UP, FEW(77), "bytes", 5},
        {"fragment", NETCHAN__FRAGMENT_DOWN, FEW(77), "bytes", 5},
        {"credit", NETCHAN__DATA, FEW(0), "\5", 1},
        {"", NETCHAN__DATA, FEW(1), "\5", 1},
        {"closed", NETCHAN__CLOSE, FEW(1), NULL, 0},
        {"closed", NETCHAN__CLOSE, FEW(2), NULL, 0},
        {"dropped", NETCHAN__DROP, FEW(2, 1, 0), NULL, 0},
        {"dropped", NETCHAN__DROP, FEW(0, 1, 0), NULL, 0}, /* a channel of the link is no end of a value */
        {NULL, NETCHAN__CLAIM, FEW(1, 1, 1, 1), "\5", 1},   /* declined: it may be over already */
        {"committed", NETCHAN__COMMIT, FEW(1, 1, 1, 1), "\5", 1},
        {"released", NETCHAN__RELEASE, FEW(1, 1), NULL, 0},
        {NULL, NETCHAN__ACCEPT, FEW(1, 0), NULL, 0},
        {NULL, NETCHAN__WITHDRAWN, FEW(1), NULL, 0},
        {"capacity", NETCHAN__CREDIT, FEW(0, 1, 0), NULL, 0},
        {"closed", NETCHAN__CLOSED, FEW(1), NULL, 0},
        {NULL, NETCHAN__CLOSED, FEW(2), NULL, 0}, /* it may have been dropped already, as in the next two */
        {NULL, NETCHAN__CLOSING, FEW(2), NULL, 0},
        {NULL, NETCHAN__GONE, FEW(2), NULL, 0},
        {"returned", NETCHAN__RETURN, FEW(0, 1), "\5", 1},
        {"name", NETCHAN__IMPORT, FEW(1, 0), "", 0},
        {"name", NETCHAN__IMPORT, FEW(1, 0), "a\0b", 3},
        {NULL, NETCHAN__IMPORT, FEW(1, 0), "a name", 6},
        {NULL, NETCHAN__IMPORT, FEW(1, 2), "a name", 6},
        {NULL, NETCHAN__FORGET, FEW(77), NULL, 0},
        {NULL, NETCHAN__FORGET, FEW(0), NULL, 0},
        {NULL, NETCHAN__IMPORTED, FEW(77, 1), NULL, 0}, /* it may not be wanted any more */
        {"answered", NETCHAN__IMPORTED, FEW(77, 0), NULL, 0},
        {"answered", NETCHAN__IMPORTED, FEW(77, 3), NULL, 0},
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
        {TWICE, NETCHAN__OFFER, FEW(0, 1, 1, 0, 1), NULL, 0}, /* a link's channels have their home at the listener */
        {TWICE, NETCHAN__OFFER, FEW(1, 1, 1, 0, 1), NULL, 0},
        {TWICE, NETCHAN__DEMAND, FEW(1, 1, 1, 0, 0), NULL, 0},
        {TWICE, NETCHAN__DEMAND, FEW(2, 1, 1, 0, 0), NULL, 0},
        {NULL, NETCHAN__WITHDRAW, FEW(1), NULL, 0},
        {"granted", NETCHAN__GRANT, FEW(1, 0), NULL, 0},
        {"declined", NETCHAN__DECLINE, FEW(1, 0), NULL, 0},
        {"took", NETCHAN__TAKEN, FEW(1), NULL, 0},
        {"credit", NETCHAN__DATA, FEW(0), "\5", 1},
        {"closed", NETCHAN__CLOSE, FEW(0), NULL, 0},
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
        {"fragment", NETCHAN__FRAGMENT_DOWN, FEW(77), "bytes", 5},
        {"fragment", NETCHAN__FRAGMENT_UP, FEW(77), "bytes", 5},
        {CUT_OFF, NETCHAN__CLAIM, FEW(77, 1), NULL, 0},
        {"never sent", NETCHAN__ACK, FEW(1), NULL, 0},
        {"greeted twice", NETCHAN__RESUMED, 0, {0}, "\0................................", 33},
        {"returned", NETCHAN__RETURN, FEW(0, 1), "\5", 1}, /* nothing was sent that could come back */
        {CUT_OFF, NETCHAN__RETURN, FEW(0), NULL, 0},
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
        {"empty or too long", "\0", 1},
        {NULL, "\xfe\x7f", 2}, /* with its length of 2 bytes it is as long as allowed */
        {"empty or too long", "\xff\x7f", 2},
        {"empty or too long", "\x80\x80\x01", 3},
        {"empty or too long", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 10},
        {"empty or too long", "\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80", 10},
        {"empty or too long", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", 10},
    };
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        for (int piecewise = 0; piecewise < 2; piecewise++) {
            world w;
            make_world(&w, 0, 0);
            flow(&w);
            send_bytes(&w.newest->to[LISTENER], lies[i].bytes, lies[i].size);
            while (arrive(&w, &w.l, piecewise ? 1 : SIZE_MAX)) continue;
            check_complaint(&w, &w.l, lies[i].why, ""); /* NULL: the rest of it may come */
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
    CHECK_INT(count_frames(&w, &w.d, NETCHAN__PONG), 1);
    free_world(&w);
}

/* Frames that a later version may say, in their places among the others. */
static void test_unknown_frames_are_counted(void) {
    world w;
    make_world(&w, 3, 0);
    flow(&w);
    for (int i = 0; i < 2; i++) {
        side *x = i ? &w.l : &w.d;
        lock();
        CHECK(netchan__buf_append(&session(x)->out, "\4\176abc\2\37\5", 8));
        session(x)->queued += 2;
        unlock();
    }
    check_works(&w);
    for (int i = 0; i < 2; i++) {
        side *x = i ? &w.l : &w.d;
        CHECK(session(x)->acked > 2);
        CHECK_INT(session(x)->acked, session(x)->queued);
        CHECK_INT(session(x)->acked, session(other(&w, x))->received);
    }
    cut(&w, w.newest);
    check_works(&w);
    free_world(&w);
}

/* The first frame is a greeting, whole and of this version. What follows its fields is skipped. */
static void test_lies_in_the_greeting(void) {
    static const char good[] = "netchan\1................\x7f\x7f\x7f\x7f\x7f\0";
    for (int i = 0; i < 12; i++) {
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
        if (i == 7) put_frame(&t, NETCHAN__BYE, NULL, 0, "\0", 1), why = "greeting";
        if (i == 8) put_frame(&t, 0x7f, NULL, 0, NULL, 0), why = "greeting";
        if (i == 9) put_frame(&t, NETCHAN__ACK, NULL, 0, "\0", 1), why = "greeting";
        if (i == 10) put_frame(&t, NETCHAN__RESUMED, NULL, 0, "\0........", 9), why = "greeting";
        if (i == 11) put_frame(&t, NETCHAN__REFUSED, NULL, 0, "\1no", 3), why = "it said: no";
        put_frame(&t, NETCHAN__HELLO, NULL, 0, body, size);
        forge(&w, &w.l, &t);
        check_complaint(&w, &w.l, why, "case");
        CHECK_INT(w.l.h.peers, why == NULL);
        check_events(&w.l, why ? "" : "up");
        restart(&w);
        flow(&w);
        check_works(&w);
        free_world(&w);
    }
}

/* What the dialler must not believe before it was greeted. */
static void test_lies_to_who_waits_for_a_greeting(void) {
    static const char hello[] = "netchan\1................\x7f\x7f\x7f\x7f\x7f\0"
                                "................................................";
    for (int i = 0; i < 9; i++) {
        world w;
        text t;
        make_world(&w, 0, 0);
        if (i >= 5) { /* it asked to go on */
            flow(&w);
            cut(&w, w.newest);
            look_after(&w);
        }
        t.size = 0;
        const char *why = "";
        if (i == 0) put_frame(&t, NETCHAN__RESUME, NULL, 0, "................\1\0................................", 50);
        if (i == 1) put_frame(&t, NETCHAN__RESUMED, NULL, 0, "\0................................", 33), why = "go on";
        if (i == 2) put_frame(&t, NETCHAN__HELLO, NULL, 0, hello, sizeof hello - 2), why = "not whole";
        if (i == 3) put_frame(&t, NETCHAN__ACCEPT, (uint64_t[]){1, 0}, 2, NULL, 0), why = "greeting";
        if (i == 4) put_frame(&t, NETCHAN__REFUSED, NULL, 0, "\0go\n a\33[2Jway\377", 14), why = "it said: go? a?[2Jway?";
        if (i == 5) put_frame(&t, NETCHAN__HELLO, NULL, 0, hello, sizeof hello - 1), why = "version 1";
        if (i == 6) put_frame(&t, NETCHAN__RESUMED, NULL, 0, "\0................................", 33), why = "go on";
        if (i == 7) put_frame(&t, NETCHAN__RESUMED, NULL, 0, "\0", 1), why = "go on";
        if (i == 8) put_frame(&t, NETCHAN__CREDIT, (uint64_t[]){0, 1, 0}, 3, NULL, 0), why = "greeting";
        send_bytes(&w.newest->to[DIALLER], t.data, t.size);
        arrive_at(&w, w.newest, DIALLER, SIZE_MAX);
        check_complaint(&w, &w.d, why, "case");
        CHECK_INT(w.d.h.peers, i >= 5); /* its session, if it has one, is unharmed */
        flow(&w);
        check_works(&w);
        check_events(&w.d, i >= 5 ? "up down resumed" : "up");
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
        begin_recv(&t[0], at_dialler ? w.d.h.link.recv : w.l.h.link.recv, LONG);
        begin_send(&t[1], at_dialler ? w.d.h.link.send : w.l.h.link.send, netchan_int(1), LONG);
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
            put_frame(&lies, NETCHAN__FRAGMENT_DOWN, &receive, 1, bytes, 10000);
            put_frame(&lies, NETCHAN__FRAGMENT_DOWN, &receive, 1, bytes, 10001), why = "fragments";
        }
        uint64_t match = 0;
        if (!at_dialler) { /* the listener claims: a large OFFER makes a match */
            text offer;
            offer.size = 0;
            if (i < 15)
                put_frame(&offer, NETCHAN__OFFER, (uint64_t[]){0, 900, 900, 0, i == 14 ? 5 : 20000}, 5, NULL, 0);
            else put_frame(&offer, NETCHAN__DEMAND, (uint64_t[]){1, 900, 900, 1, 0}, 5, NULL, 0);
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
            for (int n = 0; n < 2; n++) put_frame(&lies, NETCHAN__FRAGMENT_UP, &match, 1, bytes, 10000);
            why = "decoded";
        }
        if (i == 13) {
            put_frame(&lies, NETCHAN__GRANT, (uint64_t[]){match, 20000}, 2, NULL, 0);
            put_frame(&lies, NETCHAN__FRAGMENT_UP, &match, 1, bytes, 10000);
            put_frame(&lies, NETCHAN__FRAGMENT_UP, &match, 1, bytes, 10001), why = "fragments";
        }
        if (i == 14) put_frame(&lies, NETCHAN__FRAGMENT_UP, &match, 1, bytes, 5), why = "fragment";
        if (i == 15) put_frame(&lies, NETCHAN__GRANT, (uint64_t[]){match, 1}, 2, "\5", 1), why = "granted";
        side *x = at_dialler ? &w.d : &w.l;
        char name[32];
        snprintf(name, sizeof name, "case %d", i);
        forge(&w, x, &lies);
        check_complaint(&w, x, why, name);
        restart(&w);
        flow(&w);
        for (int k = 0; k < 2; k++) { /* who waited waits still, or was told the truth */
            if (!netchan__is_finished(&t[k].op)) expire(&t[k]);
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
    for (int i = 0; i < 4; i++) begin_recv(&t[i], w.d.h.link.recv, LONG);
    while (ship(&w, &w.d) && arrive(&w, &w.l, SIZE_MAX)) continue;
    check_complaint(&w, &w.l, "max_ops", "");
    w.redials = false;
    flow(&w); /* the dialler is told */
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
        CHECK_INT(breach(&w.l) == NULL, depth <= 64);
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
            send_now(w.d.h.link.send, i);
        }
        if (shipped == 6) while (ship(&w, &w.d)) continue;
        CHECK_INT(netchan_len(w.d.h.link.send), 6);
        CHECK_INT(stop(&w, &w.d), shipped); /* of those only the listener may know, whom they did not reach */
        CHECK_INT(netchan_len(w.d.h.link.send), 6 - shipped);
        stop(&w, &w.l);
        task blocked;
        begin_send(&blocked, w.d.h.link.send, netchan_int(6), LONG);
        CHECK(!netchan__is_finished(&blocked.op));
        start(&w);
        flow(&w);
        for (int i = shipped; i < 7; i++) CHECK_INT(recv_now(&w, w.l.h.link.recv), i);
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
        for (int i = 0; i < 3; i++) send_now(w.d.h.link.send, i);
        stop(&w, &w.d);
        stop(&w, &w.l);
        begin_send(&large, w.d.h.link.send, netchan_bytes(bytes, size), NETCHAN_FOREVER);
        start(&w);
        flow(&w);
        for (int i = 0; i < 3; i++) CHECK_INT(recv_now(&w, w.l.h.link.recv), i);
        begin_recv(&r, w.l.h.link.recv, LONG);
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
    for (int i = 0; i < 3; i++) send_now(w.d.h.link.send, i);
    stop(&w, &w.d);
    stop(&w, &w.l);
    CHECK_INT(netchan_close(w.d.h.link.send), NETCHAN_OK);
    start(&w);
    flow(&w);
    for (int i = 0; i < 3; i++) CHECK_INT(recv_now(&w, w.l.h.link.recv), i);
    size_t closed = 0;
    for (netchan_value v; netchan_recv(w.l.h.link.events, &v, NETCHAN_NOWAIT) == NETCHAN_OK; netchan_clear(&v))
        closed += strcmp(netchan_as_str(netchan_get(&v, "event"), ""), "closed") == 0;
    CHECK_INT(closed, 1);
    free_world(&w);
}

static void say_bye(side *x, bool returns) {
    lock();
    netchan__emit_bye(session(x), returns);
    unlock();
}

/* A farewell is answered once nothing is negotiated any more; when both were said, and all frames have arrived, the
 * session is over. */
static void test_farewell(void) {
    for (int who = 0; who < 2; who++) {
        world w;
        make_world(&w, 4, 4);
        flow(&w);
        w.redials = false;
        side *x = who ? &w.l : &w.d, *y = other(&w, x);
        for (int i = 0; i < 3; i++) send_now(w.d.h.link.send, i);
        say_bye(x, false);
        say_bye(x, false);
        ship(&w, x);
        CHECK_INT(count_frames(&w, y, NETCHAN__BYE), 1);
        CHECK(!session(y)->bye_received);
        arrive(&w, y, SIZE_MAX);
        CHECK(session(y)->bye_received);
        tick_hub(&w, y);
        tick_hub(&w, y);
        ship(&w, y);
        CHECK_INT(count_frames(&w, x, NETCHAN__BYE), 1);
        CHECK(session(y)); /* it does not know that its own has arrived */
        arrive(&w, x, SIZE_MAX);
        tick_hub(&w, x);
        CHECK(who || !session(x)); /* the listener's values may still be on their way */
        flow(&w);
        CHECK(!session(x) && !session(y));
        happening e = check_events(&w.d, "up drained");
        check_counts(&e, 0, 0, 0); /* the listener had everything before it answered */
        check_events(&w.l, "up drained");
        CHECK_INT(stats(x).lost + stats(y).lost, 0);
        for (int i = 0; i < 3; i++) CHECK_INT(recv_now(&w, w.l.h.link.recv), i);
        free_world(&w);
    }
}

/* Who is being negotiated with is let finish, and nobody new may begin. */
static void test_farewell_waits_for_what_is_negotiated(void) {
    world w;
    task s, r, late;
    make_world(&w, 0, 0);
    flow(&w);
    w.redials = false;
    begin_select(&s, w.d.h.link.send, netchan_int(5), NULL, LONG);
    flow(&w);
    begin_select(&r, NULL, netchan_nil(), w.l.h.link.recv, LONG);
    ship(&w, &w.l); /* the claim is on its way */
    CHECK_INT(count_frames(&w, &w.d, NETCHAN__CLAIM), 1);
    say_bye(&w.d, false);
    ship(&w, &w.d);
    arrive(&w, &w.l, SIZE_MAX);
    begin_send(&late, w.l.h.link.send, netchan_int(6), LONG);
    tick_hub(&w, &w.l);
    CHECK(session(&w.l)->bye_received && !session(&w.l)->bye_sent);
    flow(&w);
    CHECK_INT(end(&s), NETCHAN_OK);
    CHECK_INT(got_int(&r), 5);
    CHECK(!session(&w.d) && !session(&w.l));
    expire(&late);
    CHECK_INT(end(&late), NETCHAN_ETIMEDOUT);
    free_world(&w);
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
            if (!k->s_over[d][i] && netchan__is_finished(&k->s[d][i].op)) {
                k->results[d][i] = end(&k->s[d][i]);
                if (k->results[d][i] == NETCHAN_ENOMEM || k->results[d][i] == NETCHAN_ELOST)
                    begin_scene_send(k, d, i), again = true;
                else k->s_over[d][i] = true;
            }
            if (k->r_over[d][i] || !netchan__is_finished(&k->r[d][i].op)) continue;
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
    for (bool more = true; more && arrived < cut && !(breach(&k.w.d) || breach(&k.w.l));) {
        size_t before = arrived, shipped = ship(&k.w, &k.w.d) + ship(&k.w, &k.w.l);
        if (arrived < cut) arrived += arrive(&k.w, &k.w.l, step);
        if (arrived < cut) arrived += arrive(&k.w, &k.w.d, step);
        more = shipped || arrived > before;
    }
    bool failed = alloc_failed(), happened = fail_at ? failed : arrived >= cut;
    alloc_fail(0);
    if (last) arrive(&k.w, last == 1 ? &k.w.l : &k.w.d, SIZE_MAX);
    for (int d = 0; d < 2; d++) k.unknown[d] = stop(&k.w, d ? &k.w.l : &k.w.d);
    start(&k.w);
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

/* --- a lost link is not a lost session ---------------------------------------------------------------------------- */

enum { PUMPED = 6 };

/* One thread that sends the values 0, 1, ... one after the other, and one that receives them. */
typedef struct pump {
    way y;
    task s, r;
    bool sending, receiving, closed;
    int sent, got, variant;
    size_t large;
    netchan_value items[PUMPED][2];
} pump;

static void begin_pumped_send(pump *p) {
    static uint8_t bytes[40000];
    int i = p->sent, kind = (i + p->variant) % 3;
    p->items[i][0] = netchan_int(i);
    p->items[i][1] = netchan_bytes(bytes, i % 2 ? p->large : 3);
    netchan_value v = netchan_array(p->items[i], 2);
    if (kind == 2) begin_select(&p->s, p->y.send, v, NULL, LONG);
    else begin_send(&p->s, p->y.send, v, kind ? LONG : NETCHAN_FOREVER);
    p->sending = true;
}

static void begin_pumped_recv(pump *p) {
    int kind = (p->got + p->variant / 3) % 3;
    if (kind == 2) begin_select(&p->r, NULL, netchan_nil(), p->y.recv, LONG);
    else begin_recv(&p->r, p->y.recv, kind ? LONG : NETCHAN_FOREVER);
    p->receiving = true;
}

/* The next value came, and it is the right one. */
static void check_pumped(pump *p) {
    CHECK_INT(p->r.op.redelivered, false);
    CHECK_INT(netchan_as_int(netchan_at(&p->r.got, 0), -1), p->got);
    CHECK_INT(netchan_count(netchan_at(&p->r.got, 1)), p->got % 2 ? p->large : 3);
    netchan_clear(&p->r.got);
    p->got++;
}

/* Takes a step of each of the two threads. Returns whether one could. */
static bool step_pump(pump *p, bool receives) {
    bool any = false;
    if (p->sending && netchan__is_finished(&p->s.op)) {
        CHECK_INT(end(&p->s), NETCHAN_OK);
        p->sending = false;
        p->sent++;
        any = true;
    }
    if (!p->sending && p->sent < PUMPED) begin_pumped_send(p), any = true;
    if (p->receiving && netchan__is_finished(&p->r.op)) {
        int result = end(&p->r);
        p->receiving = false;
        p->closed = result == NETCHAN_ECLOSED;
        if (!p->closed) CHECK_INT(result, NETCHAN_OK);
        if (!p->closed) check_pumped(p);
        any = true;
    }
    if (!p->receiving && !p->closed && receives) begin_pumped_recv(p), any = true;
    return any;
}

/* What is sent, where it breaks, and who finds it. */
typedef struct plan {
    size_t buffer[2], large, step;
    size_t cut, again; /* after so many bytes have arrived, and then always again after so many */
    int finder;        /* 0 both, 1 the dialler, 2 the listener: the other still reads what was under way */
    int variant;
    bool closes;       /* when all was sent */
} plan;

/* The links break. Who does not find it at once goes on reading. */
static void break_links(world *w, int finder) {
    FOR_CABLES(w, c) {
        if (!c->open[0] && !c->open[1]) continue;
        c->cut = finder != 2; /* the listener does not find that the dialler has closed: it waits for ever */
        if (finder != 2) drop_end(w, c, DIALLER, "cut");
        if (finder != 1) drop_end(w, c, LISTENER, "cut");
    }
}

/* Moves some bytes, and breaks links as planned. Returns whether anything moved. */
static bool move_as_planned(world *w, plan *p, size_t *arrived) {
    size_t shipped = ship(w, &w->d) + ship(w, &w->l), before = *arrived;
    for (int who = 1; who >= 0; who--) {
        if (*arrived >= p->cut) {
            break_links(w, p->finder);
            p->cut = p->again ? *arrived + p->again : SIZE_MAX;
        }
        *arrived += arrive(w, who ? &w->l : &w->d, p->step);
    }
    return look_after(w) || shipped || *arrived > before;
}

/* Both channels are used to their ends. Returns whether the link broke at least once. */
static bool transfer(plan p) {
    static pump pumps[2];
    world w;
    size_t arrived = 0;
    uint64_t cut_at = p.cut;
    make_world(&w, p.buffer[0], p.buffer[1]);
    memset(pumps, 0, sizeof pumps);
    for (int d = 0; d < 2; d++) {
        pumps[d].y = way_of(&w, d);
        pumps[d].variant = p.variant;
        pumps[d].large = p.large;
    }
    w.dials = 100000;
    for (bool more = true, closed = !p.closes; more || !closed;) {
        if (!more && !closed) {
            closed = true;
            CHECK_INT(netchan_close(w.d.h.link.send), NETCHAN_OK);
            CHECK_INT(netchan_close(w.l.h.link.send), NETCHAN_OK);
        }
        bool late = p.variant % 2 && pumps[0].sent < PUMPED && pumps[0].sent < (int)p.buffer[0]; /* a full buffer */
        more = move_as_planned(&w, &p, &arrived);
        for (int d = 0; d < 2; d++) more = step_pump(&pumps[d], d || !late) || more;
        more = more || pass_time(&w);
    }
    for (int d = 0; d < 2; d++) {
        CHECK_INT(pumps[d].sent, PUMPED);
        CHECK_INT(pumps[d].got, PUMPED);
        CHECK_INT(pumps[d].closed, p.closes && d == 1); /* what peers send to the listener goes on with the next */
        if (pumps[d].receiving) expire(&pumps[d].r);
    }
    CHECK_INT(stats(&w.d).lost, 0);
    flow(&w);
    CHECK_INT(session(&w.d)->acked, session(&w.d)->queued);
    for (int d = 0; d < 2; d++)
        if (pumps[d].receiving) CHECK_INT(end(&pumps[d].r), NETCHAN_ETIMEDOUT);
    free_world(&w);
    return arrived >= cut_at;
}

static void test_resume_after_a_cut_at_each_byte(void) {
    for (int i = 0; i < 24; i++) {
        plan p = {{i % 2 ? 3 : 0, i / 2 % 2 ? 3 : 0}, 10, 1, (size_t)(i % LESS), 0, i % 3, i, i % 5 == 0};
        while (transfer(p)) p.cut += LESS;
        CHECK(p.cut > 300);
    }
}

static void test_resume_in_the_midst_of_large_values(void) {
    for (int i = 0; i < 12; i++) {
        plan p = {{i % 2 ? 3 : 0, i / 2 % 2 ? 3 : 0}, 40000, 997, 0, 0, i % 3, i, false};
        for (; transfer(p); p.cut += 331 * LESS) continue;
        CHECK(p.cut > 200000);
    }
}

/* The link breaks again and again, also while it is greeted. */
static void test_resume_after_many_cuts(void) {
    for (int i = 0; i < 12; i++) {
        plan p = {{i % 2 ? 3 : 0, i / 2 % 2 ? 3 : 0}, i % 4 ? 10 : 20000, 1, 0, 0, i % 3, i, i % 2 == 0};
        if (p.large > 10) p.step = 499;
        for (size_t again = 170; again < 400; again += 7 * LESS) {
            p.again = p.large > 10 ? 60000 + again * 17 : again;
            CHECK(transfer(p));
        }
    }
}

/* Between them the link breaks in the greeting, at each of its bytes and twice in a row. */
static void test_cuts_in_the_greeting_of_a_new_link(void) {
    for (int finder = 0; finder < 3; finder++) {
        for (size_t first = 0; first < 110; first += 1 + LESS / 2) {
            world w;
            make_world(&w, 3, 0);
            flow(&w);
            send_now(w.d.h.link.send, 1);
            cut(&w, w.newest);
            for (int again = 0; again < 2; again++) {
                w.dials = 1;
                redial(&w);
                for (size_t arrived = 0; arrived < first;) {
                    size_t n = ship(&w, &w.d) + ship(&w, &w.l);
                    for (int who = 1; who >= 0 && arrived < first; who--) arrived += arrive(&w, who ? &w.l : &w.d, 1);
                    if (!n && !under_way(&w, &w.d) && !under_way(&w, &w.l)) break;
                }
                break_links(&w, finder);
                while (arrive(&w, &w.d, 1) + arrive(&w, &w.l, 1)) continue;
                if (finder == 2) close_ends(&w);
                if (finder == 1) FOR_CABLES(&w, c) drop_end(&w, c, DIALLER, "cut");
            }
            flow(&w);
            CHECK_INT(recv_now(&w, w.l.h.link.recv), 1);
            CHECK_INT(w.l.h.peers, 1);
            check_works(&w);
            CHECK_INT(stats(&w.d).lost, 0);
            free_world(&w);
        }
    }
}

/* The frames that the other side has are not said again. */
static void test_what_arrived_is_not_replayed(void) {
    for (int lost = 0; lost <= 5; lost++) {
        world w;
        happening e;
        make_world(&w, 5, 0);
        flow(&w);
        for (int i = 0; i < 5; i++) {
            send_now(w.d.h.link.send, i);
            if (i < 5 - lost) ship(&w, &w.d), arrive(&w, &w.l, SIZE_MAX);
            else if (i % 2) ship(&w, &w.d); /* given to the link, or not even that */
        }
        ship(&w, &w.d);
        cut(&w, w.newest);
        flow(&w);
        e = check_events(&w.d, "up down resumed");
        CHECK_INT(e.replayed, lost);
        CHECK_INT(stats(&w.d).replays, lost);
        CHECK_INT(stats(&w.d).resumes, 1);
        CHECK_INT(stats(&w.l).resumes, 1);
        CHECK_INT(check_events(&w.l, "up down resumed").replayed, 0);
        for (int i = 0; i < 5; i++) CHECK_INT(recv_now(&w, w.l.h.link.recv), i);
        CHECK_INT(stats(&w.l).values_received, 5);
        free_world(&w);
    }
}

/* What the other side says it has not got was never sent: when the session is lost before it is sent again, its fate is
 * known. */
static void test_what_did_not_arrive_was_never_sent(void) {
    for (int again = 0; again < 2; again++) {
        world w;
        task s;
        make_world(&w, 0, 0);
        flow(&w);
        begin_send(&s, w.d.h.link.send, netchan_int(5), NETCHAN_FOREVER);
        ship(&w, &w.d);
        cut(&w, w.newest);
        w.dials = 1;
        redial(&w);
        ship(&w, &w.d);
        arrive(&w, &w.l, SIZE_MAX);
        ship(&w, &w.l);
        arrive(&w, &w.d, SIZE_MAX);
        CHECK(line(&w.d) == w.newest);
        if (again) ship(&w, &w.d);
        stop(&w, &w.d);
        stop(&w, &w.l);
        if (again) CHECK_INT(end(&s), NETCHAN_EUNKNOWN);
        else {
            CHECK_INT(recv_now(&w, w.l.h.link.recv), 5); /* over the next session */
            CHECK_INT(end(&s), NETCHAN_OK);
        }
        check_works(&w);
        free_world(&w);
    }
}

/* A frame that came in part is dropped with the link, and comes again whole. */
static void test_the_new_link_is_found_before_the_break_of_the_old(void) {
    world w;
    make_world(&w, 3, 0);
    flow(&w);
    send_now(w.d.h.link.send, 1);
    ship(&w, &w.d);
    arrive(&w, &w.l, 2);
    cable *old = w.newest;
    old->cut = true;
    drop_end(&w, old, DIALLER, "cut");
    flow(&w); /* the listener knows of no break */
    CHECK(!old->open[LISTENER]);
    CHECK_INT(recv_now(&w, w.l.h.link.recv), 1);
    check_events(&w.d, "up down resumed");
    check_events(&w.l, "up"); /* to it the link was only replaced */
    CHECK_INT(stats(&w.l).rollovers, 1);
    check_works(&w);
    free_world(&w);
}

/* --- hanging up --------------------------------------------------------------------------------------------------- */

static void begin_hangup(side *x) {
    lock();
    x->h.hanging_up = true;
    if (x->h.dials) netchan__shut_link(&x->h);
    unlock();
}

/* As netchan_hangup() waits. Returns whether it may go on. */
static bool hung_up(side *x) {
    lock();
    bool done = netchan__drained(&x->h) || (x->h.dials && !session(x));
    unlock();
    return done;
}

/* Time passes for a side whose peer is gone, until its session is over. Returns how many milliseconds. */
static uint64_t wait_over(world *w, side *x) {
    uint64_t begin_at = w->now;
    while (session(x)) {
        uint64_t next = tick_hub(w, x);
        if (!session(x)) break;
        CHECK(next > w->now && next < UINT64_MAX);
        w->now = next;
    }
    return (w->now - begin_at) / MS;
}

/* The listener has these values, in order. */
static void take_rest(world *w, int64_t next, int64_t end_of_them, size_t large) {
    for (task r; next < end_of_them; next++) {
        begin_recv(&r, w->l.h.link.recv, NETCHAN_FOREVER);
        flow(w);
        CHECK_INT(end(&r), NETCHAN_OK);
        CHECK_INT(netchan_as_int(netchan_at(&r.got, 0), -1), next);
        CHECK_INT(netchan_count(netchan_at(&r.got, 1)), large);
        netchan_clear(&r.got);
    }
}

/* `sent` values were sent with OK, of which the listener received `next`. who: 1 the dialler hung up, 2 the listener, 3
 * both. */
static void check_after_hangup(world *w, int who, int64_t next, int64_t sent, size_t large) {
    if (who == 1) { /* the listener has them all */
        take_rest(w, next, sent, large);
        CHECK_INT(netchan_len(w->l.h.link.recv), 0);
        CHECK_INT(netchan_len(w->d.h.link.send), 0);
        return;
    }
    CHECK_INT((int64_t)w->d.h.link.send->detached, sent - next);
    CHECK_INT(w->d.h.link.send->in_flight, 0);
    CHECK_INT(replace_listener(w, 0).unreceived, 0);
    if (who == 2) { /* and they go to the next */
        w->redials = true;
        take_rest(w, next, sent, large);
        check_works(w);
    } else {
        CHECK_INT((int64_t)free_side(w, &w->d).undelivered, sent - next);
        make_side(&w->d, DIALLER, NULL);
    }
}

/* Hangs up while values are under way, and breaks the link after so many bytes. All that the dialler sent with OK was
 * received, is at the listener, or has come back, in order; what the listener sent was received. Returns whether the
 * link broke. */
static bool hang_up_in_flight(plan p, int who) {
    enum { SENT = 5 };
    static uint8_t bytes[20000];
    static task s[SENT], r;
    netchan_value items[SENT][2];
    world w;
    size_t arrived = 0, cut_at = p.cut;
    make_world(&w, SENT, p.buffer[1]);
    flow(&w);
    for (int i = 0; i < SENT; i++) {
        items[i][0] = netchan_int(i);
        items[i][1] = netchan_bytes(bytes, p.large);
        begin_send(&s[i], w.d.h.link.send, netchan_array(items[i], 2), NETCHAN_FOREVER);
        if (i % 2) flow(&w); /* a large one leaves when the listener takes it into its buffer */
    }
    begin_recv(&r, w.l.h.link.recv, NETCHAN_FOREVER);
    for (int x = 0; x < 2; x++)
        if (who & (1 << x)) begin_hangup(x ? &w.l : &w.d);
    w.dials = 100;
    for (bool more = true; more;) {
        more = move_as_planned(&w, &p, &arrived);
        if (w.l.h.hanging_up && !session(&w.d)) w.redials = false; /* it would be refused */
        for (int x = 0; x < 2; x++)
            if (who & (1 << x)) hung_up(x ? &w.l : &w.d);
        more = more || pass_time(&w);
    }
    CHECK(!session(&w.d) || !session(&w.l)); /* if the last ACK is lost, the other one waits for nothing */
    wait_over(&w, &w.d);
    wait_over(&w, &w.l);
    CHECK_INT(stats(&w.d).lost + stats(&w.l).lost, 0);
    int64_t next = 0;
    CHECK(netchan__is_finished(&r.op));
    if (end(&r) == NETCHAN_OK) {
        CHECK_INT(netchan_as_int(netchan_at(&r.got, 0), -1), next++);
        netchan_clear(&r.got);
    } else CHECK_INT(r.op.result, NETCHAN_ECLOSED);
    int64_t sent = 0;
    for (int i = 0; i < SENT; i++) {
        if (!netchan__is_finished(&s[i].op)) expire(&s[i]);
        int result = end(&s[i]);
        CHECK(result == NETCHAN_OK || result == NETCHAN_ECLOSED || result == NETCHAN_ETIMEDOUT);
        if (result == NETCHAN_OK) CHECK_INT(sent++, i);
    }
    CHECK(sent >= 2);
    check_after_hangup(&w, who, next, sent, p.large);
    free_world(&w);
    return arrived >= cut_at;
}

static void test_hangup_in_flight(void) {
    for (int who = 1; who < 4; who++) {
        for (int finder = 0; finder < 3; finder++) {
            plan p = {{0, 0}, 10, 1, (size_t)(finder % LESS), 0, finder, 0, false};
            while (hang_up_in_flight(p, who)) p.cut += LESS;
            CHECK(p.cut > 10);
            plan q = {{0, 0}, 20000, 499, 0, 0, finder, 0, false};
            while (hang_up_in_flight(q, who)) q.cut += 97 * LESS;
        }
    }
}

/* --- who may go on with a session --------------------------------------------------------------------------------- */

/* What a RESUME is made of. */
typedef struct claim {
    uint8_t id[16], secret[32], binding[32];
    uint64_t generation, received;
    char role;
} claim;

/* The true one, of the dialler, over this link. */
static claim true_claim(world *w, const cable *c) {
    claim m;
    netchan__session *s = session(&w->d);
    memcpy(m.id, s->id, sizeof m.id);
    memcpy(m.secret, s->secret, sizeof m.secret);
    memcpy(m.binding, c->wire[LISTENER].binding, sizeof m.binding);
    m.generation = s->generation + 1;
    m.received = s->received;
    m.role = 'D';
    return m;
}

static void put_little(text *t, uint64_t n) {
    for (int i = 0; i < 8; i++) put_byte(t, (unsigned)(n >> 8 * i) & 255);
}

/* As the WIRE section has it. */
static void put_proof(text *t, const claim *m) {
    text said;
    uint8_t proof[32];
    said.size = 0;
    put_byte(&said, (unsigned char)m->role);
    put_bytes(&said, m->binding, 32);
    put_little(&said, m->generation);
    put_little(&said, m->received);
    const mbedtls_md_info_t *sha = mbedtls_md_info_from_type(MBEDTLS_MD_SHA256);
    CHECK_INT(mbedtls_md_hmac(sha, m->secret, 32, said.data, said.size, proof), 0);
    put_bytes(t, proof, sizeof proof);
}

static text resume_frame(const claim *m) {
    text body, t;
    body.size = t.size = 0;
    put_bytes(&body, m->id, 16);
    put_number(&body, m->generation);
    put_number(&body, m->received);
    put_proof(&body, m);
    put_frame(&t, NETCHAN__RESUME, NULL, 0, body.data, body.size);
    return t;
}

/* A world in which both sides have said and heard something. */
static void make_used_world(world *w) {
    make_world(w, 3, 0);
    flow(w);
    check_works(w);
    check_works(w);
    CHECK(session(&w->d)->received > 1 && session(&w->l)->received > 1);
    check_events(&w->d, "up");
    check_events(&w->l, "up");
}

static void test_golden_resume(void) {
    world w;
    make_used_world(&w);
    for (int i = 1; i < 3; i++) {
        netchan__session *d = session(&w.d), *l = session(&w.l);
        cut(&w, w.newest);
        redial(&w);
        claim m = true_claim(&w, w.newest);
        m.generation = (uint64_t)i;
        text t = resume_frame(&m), answer, body;
        CHECK_INT(ship(&w, &w.d), t.size);
        check_bytes(&w, &w.l, t.data, t.size);
        arrive(&w, &w.l, SIZE_MAX);
        ship(&w, &w.l);
        m.role = 'L';
        m.received = l->received;
        answer.size = body.size = 0;
        put_number(&body, m.received);
        put_proof(&body, &m);
        put_frame(&answer, NETCHAN__RESUMED, NULL, 0, body.data, body.size);
        check_bytes(&w, &w.d, answer.data, answer.size);
        flow(&w);
        CHECK(session(&w.d) == d && session(&w.l) == l);
        check_works(&w);
    }
    check_events(&w.d, "down resumed down resumed");
    check_events(&w.l, "down resumed down resumed");
    free_world(&w);
}

#define UNKNOWN_SESSION "the session is not known; it was lost, or the listener was started anew"
#define ANOTHERS_SESSION "the session belongs to somebody else"
#define GONE_ELSEWHERE "the session went on elsewhere"

/* The listener's answer to the test; what comes before it is dropped. */
static void check_refused(world *w, cable *c, const char *why) {
    static const uint8_t zero;
    ship(w, &w->l);
    const pipeline *p = &c->to[DIALLER];
    const uint8_t *data = p->data ? p->data + p->start : &zero;
    CHECK_INT(pipe_size(p), strlen(why) + 3);
    CHECK_INT(data[0], strlen(why) + 2);
    CHECK_INT(data[1], NETCHAN__REFUSED);
    CHECK_INT(data[2], 0);
    CHECK(memcmp(data + 3, why, strlen(why)) == 0);
    drop_bytes(&c->to[DIALLER]);
    if (strcmp(why, UNKNOWN_SESSION) == 0 && !c->asked) { /* a HELLO may follow; another question may not */
        CHECK(!netchan__wire_over(&c->wire[LISTENER]));
        c->asked = true;
        send_bytes(&c->to[LISTENER], "\1\6", 2);
        arrive_at(w, c, LISTENER, SIZE_MAX);
        check_refused(w, c, why);
    } else {
        CHECK_STR(netchan__wire_over(&c->wire[LISTENER]), why);
        close_ends(w);
        CHECK(!c->open[LISTENER]);
    }
}

/* Makes the claim false in one respect. Returns what it is told; NULL when there are no more. */
static const char *falsify(world *w, claim *m, cable *c, int i) {
    netchan__session *l = session(&w->l);
    switch (i) {
    case 0: m->id[0] ^= 1; return UNKNOWN_SESSION;
    case 1: m->id[15] ^= 1; return UNKNOWN_SESSION; /* the first bytes are those of one that is known */
    case 2: memset(m->id, 0, sizeof m->id); return UNKNOWN_SESSION;
    case 3: m->secret[31] ^= 1; return ANOTHERS_SESSION;
    case 4: m->role = 'L'; return ANOTHERS_SESSION;
    case 5: m->binding[0] ^= 1; return ANOTHERS_SESSION;
    case 6: memset(c->wire[LISTENER].identity, 9, 32); return ANOTHERS_SESSION;
    case 7: m->generation = l->generation; return GONE_ELSEWHERE;
    case 8: m->generation = 0; return GONE_ELSEWHERE;
    case 9: m->received = l->peer.sent + 1; return GONE_ELSEWHERE;
    case 10: m->received = UINT64_MAX; return GONE_ELSEWHERE;
    case 11: m->received = l->acked - 1; return GONE_ELSEWHERE;
    default: return NULL;
    }
}

static void test_false_resumes(void) {
    for (int down = 0; down < 2; down++) {
        for (int i = 0;; i++) {
            world w;
            make_used_world(&w);
            cut(&w, w.newest); /* so that there is an older generation */
            check_works(&w);
            check_events(&w.d, "down resumed");
            check_events(&w.l, "down resumed");
            w.redials = false;
            if (down) cut(&w, w.newest);
            cable *running = line(&w.d), *c = knock(&w);
            claim m = true_claim(&w, c);
            const char *refusal = falsify(&w, &m, c, i);
            text t = resume_frame(&m);
            send_bytes(&c->to[LISTENER], t.data, t.size);
            arrive_at(&w, c, LISTENER, SIZE_MAX);
            if (!refusal) { /* with all of it true it is let in */
                CHECK(c->wire[LISTENER].up && line(&w.l) == c);
                free_world(&w);
                break;
            }
            check_refused(&w, c, refusal);
            CHECK(line(&w.d) == running && line(&w.l) == running);
            drop_end(&w, c, DIALLER, "closed");
            w.redials = true;
            check_works(&w);
            check_events(&w.d, down ? "down resumed" : "");
            check_events(&w.l, down ? "down resumed" : "");
            free_world(&w);
        }
    }
}

/* The same bytes over another link, or the same link once more, open nothing. */
static void test_replayed_resume(void) {
    world w;
    make_used_world(&w);
    cut(&w, w.newest);
    redial(&w);
    text stolen;
    ship(&w, &w.d);
    pipeline *p = &w.newest->to[LISTENER];
    stolen.size = pipe_size(p);
    memcpy(stolen.data, p->data + p->start, stolen.size);
    for (int used = 0; used < 2; used++) { /* before the true one was used, and after */
        cable *c = knock(&w);
        send_bytes(&c->to[LISTENER], stolen.data, stolen.size);
        arrive_at(&w, c, LISTENER, SIZE_MAX);
        check_refused(&w, c, ANOTHERS_SESSION);
        drop_end(&w, c, DIALLER, "closed");
        flow(&w);
        check_works(&w);
    }
    check_events(&w.d, "down resumed");
    free_world(&w);
}

/* Frames that are cut off, at each of their bytes. */
static void test_malformed_resumes(void) {
    world w;
    make_used_world(&w);
    cable *running = line(&w.d);
    for (size_t size = 0; size < 16 + 1 + 1 + 32; size++) {
        cable *c = knock(&w);
        claim m = true_claim(&w, c);
        text whole = resume_frame(&m), t;
        CHECK_INT(whole.size, 2 + 16 + 1 + 1 + 32);
        t.size = 0;
        put_frame(&t, NETCHAN__RESUME, NULL, 0, whole.data + 2, size);
        send_bytes(&c->to[LISTENER], t.data, t.size);
        arrive_at(&w, c, LISTENER, SIZE_MAX);
        check_refused(&w, c, UNKNOWN_SESSION);
        drop_end(&w, c, DIALLER, "closed");
        CHECK(line(&w.l) == running && line(&w.d) == running);
    }
    check_works(&w);
    check_events(&w.d, "");
    free_world(&w);
}

/* A link that was asked for earlier comes later: the session stays where it is. */
static void test_a_late_link_is_refused(void) {
    world w;
    make_used_world(&w);
    cut(&w, w.newest);
    redial(&w);
    ship(&w, &w.d);
    cable *slow = w.newest; /* its RESUME is under way for long */
    slow->cut = slow->held = true;
    drop_end(&w, slow, DIALLER, "cut");
    flow(&w);
    cable *running = line(&w.d);
    CHECK(running && running != slow && line(&w.l) == running);
    CHECK_INT(session(&w.l)->generation, 2);
    slow->held = false;
    arrive_at(&w, slow, LISTENER, SIZE_MAX);
    CHECK_STR(netchan__wire_over(&slow->wire[LISTENER]), GONE_ELSEWHERE);
    flow(&w);
    CHECK(line(&w.d) == running && line(&w.l) == running);
    check_works(&w);
    check_events(&w.d, "down resumed");
    check_events(&w.l, "down resumed");
    free_world(&w);
}

/* A listener that was started anew does not know the session, and the same link carries a new one. */
static void test_a_new_listener_takes_over(void) {
    world w;
    task waits, receive;
    happening e;
    make_used_world(&w);
    send_now(w.d.h.link.send, 0);
    CHECK_INT(recv_now(&w, w.l.h.link.recv), 0); /* taken, like two before */
    send_now(w.d.h.link.send, 1); /* in its buffer */
    flow(&w);
    begin_recv(&receive, w.d.h.link.recv, LONG);
    flow(&w);
    send_now(w.d.h.link.send, 2); /* these never left */
    send_now(w.d.h.link.send, 3);
    begin_send(&waits, w.d.h.link.send, netchan_int(4), LONG);
    CHECK(!netchan__is_finished(&waits.op));
    cut(&w, w.newest);
    CHECK_INT(replace_listener(&w, 0).unreceived, 1);
    check_events(&w.d, "down");
    w.dials = 1;
    redial(&w);
    cable *c = w.newest;
    flow(&w);
    CHECK(line(&w.d) == c && line(&w.l) == c);
    CHECK_INT(w.dials, FLOW_DIALS); /* the same link */
    CHECK(next_event(&w.d, &e));
    CHECK_STR(e.event, "lost");
    CHECK_STR(e.reason, "it said: " UNKNOWN_SESSION);
    check_counts(&e, 3, 2, 1);
    check_events(&w.d, "up");
    CHECK_INT(end(&receive), NETCHAN_ELOST);
    for (int i = 2; i < 5; i++) CHECK_INT(recv_now(&w, w.l.h.link.recv), i);
    CHECK_INT(end(&waits), NETCHAN_OK);
    CHECK_INT(stats(&w.d).lost, 1);
    check_works(&w);
    cut(&w, w.newest); /* and can be resumed like any other */
    check_works(&w);
    check_events(&w.d, "down resumed");
    check_events(&w.l, "up down resumed");
    free_world(&w);
}

/* One of several addresses leads to somebody else, another to who knows the session. */
static void test_a_refusal_at_one_of_several_addresses(void) {
    world w;
    side elsewhere;
    netchan_options o = buffer_of(0);
    make_used_world(&w);
    make_side(&elsewhere, LISTENER, &o);
    w.d.h.addresses = 2;
    cut(&w, w.newest);
    cable *c = lay_cable(&w);
    lock();
    netchan__wire_start(&c->wire[DIALLER], &w.d.h, w.now);
    netchan__wire_start(&c->wire[LISTENER], &elsewhere.h, w.now);
    unlock();
    w.redials = false;
    flow(&w);
    CHECK(session(&w.d) && session(&w.d)->refused && !session(&w.d)->wire);
    CHECK(!session(&elsewhere));
    check_events(&w.d, "down");
    start(&w);
    flow(&w);
    CHECK(!session(&w.d)->refused);
    check_works(&w);
    check_events(&w.d, "resumed");
    CHECK_INT(stats(&w.d).lost, 0);
    free_side(&w, &elsewhere);
    free_world(&w);
}

/* --- acknowledgement ---------------------------------------------------------------------------------------------- */

static void test_frames_are_kept_until_acknowledged(void) {
    world w;
    make_world(&w, 10, 0);
    flow(&w);
    netchan__session *d = session(&w.d);
    CHECK_INT(netchan__buf_size(&d->out), 0);
    for (int i = 0; i < 5; i++) send_now(w.d.h.link.send, i);
    size_t kept = netchan__buf_size(&d->out);
    CHECK(kept > 0);
    ship(&w, &w.d);
    CHECK_INT(netchan__buf_size(&d->out), kept);
    CHECK_INT(d->given, kept);
    arrive(&w, &w.l, SIZE_MAX);
    CHECK_INT(ship(&w, &w.l), 0); /* nothing is said at once */
    text t;
    t.size = 0;
    put_frame(&t, NETCHAN__ACK, (uint64_t[]){d->peer.sent - 2}, 1, NULL, 0);
    forge(&w, &w.d, &t);
    CHECK_INT(netchan__buf_size(&d->out), 2 * kept / 5);
    CHECK_INT(d->given, 2 * kept / 5);
    forge(&w, &w.d, &t); /* once more, and an older one: nothing */
    t.data[2]--;
    forge(&w, &w.d, &t);
    CHECK_INT(netchan__buf_size(&d->out), 2 * kept / 5);
    flow(&w);
    CHECK_INT(netchan__buf_size(&d->out), 0);
    CHECK_INT(d->acked, d->queued);
    free_world(&w);
}

/* After NETCHAN__ACK_MS, and not before; after NETCHAN__ACK_BYTES; and with frames that go anyway. */
static void test_acknowledgements_wait(void) {
    world w;
    static uint8_t bytes[10000];
    make_world(&w, 100, 0);
    flow(&w);
    tick(&w, &w.l);
    flow(&w);
    send_now(w.d.h.link.send, 1);
    ship(&w, &w.d);
    arrive(&w, &w.l, SIZE_MAX);
    uint64_t due = w.now + NETCHAN__ACK_MS * MS;
    CHECK_INT(tick(&w, &w.l), due);
    w.now = due - 1;
    CHECK_INT(tick(&w, &w.l), due);
    CHECK_INT(ship(&w, &w.l), 0);
    w.now = due;
    CHECK(tick(&w, &w.l) > due);
    CHECK_INT(ship(&w, &w.l), 3);
    CHECK_INT(count_frames(&w, &w.d, NETCHAN__ACK), 1);
    CHECK_INT(ship(&w, &w.l), 0);
    flow(&w);
    CHECK_INT(session(&w.d)->acked, session(&w.d)->queued);

    size_t sent = 0;
    while (!ship(&w, &w.l)) { /* time stands still */
        task s;
        begin_send(&s, w.d.h.link.send, netchan_bytes(bytes, sizeof bytes), LONG);
        CHECK_INT(end(&s), NETCHAN_OK);
        sent += ship(&w, &w.d);
        while (arrive(&w, &w.l, SIZE_MAX)) continue;
        CHECK(sent < NETCHAN__ACK_BYTES + 2 * sizeof bytes);
    }
    CHECK(sent >= NETCHAN__ACK_BYTES);
    CHECK_INT(count_frames(&w, &w.d, NETCHAN__ACK), 1);

    task r;
    send_now(w.d.h.link.send, 1);
    flow(&w);
    send_now(w.d.h.link.send, 1);
    begin_recv(&r, w.d.h.link.recv, LONG);
    ship(&w, &w.d);
    arrive(&w, &w.l, SIZE_MAX);
    CHECK_INT(ship(&w, &w.l), 0);
    task s;
    begin_send(&s, w.l.h.link.send, netchan_int(7), LONG);
    ship(&w, &w.l);
    CHECK_INT(count_frames(&w, &w.d, NETCHAN__ACK), 1);
    CHECK_INT(count_frames(&w, &w.d, NETCHAN__CLAIM), 1);
    flow(&w);
    CHECK_INT(got_int(&r), 7);
    CHECK_INT(end(&s), NETCHAN_OK);
    free_world(&w);
}

/* Who asks more than it listens gets no answers; but it is told what arrived. */
static void test_acknowledgement_among_many_pings(void) {
    world w;
    task s, r;
    make_world(&w, 4, 0);
    begin_recv(&r, w.d.h.link.recv, LONG);
    flow(&w);
    send_now(w.d.h.link.send, 1);
    ship(&w, &w.d);
    begin_send(&s, w.l.h.link.send, netchan_int(2), LONG); /* a frame that takes the acknowledgement with it */
    for (int i = 0; i < 1000; i++) send_bytes(&w.newest->to[LISTENER], "\2\2\5", 3);
    while (arrive(&w, &w.l, SIZE_MAX)) continue;
    CHECK(netchan__buf_size(&w.newest->wire[LISTENER].control) < 2000);
    ship(&w, &w.l);
    CHECK_INT(session(&w.l)->told, 2);
    arrive(&w, &w.d, SIZE_MAX);
    CHECK_INT(session(&w.d)->acked, 2);
    flow(&w);
    CHECK_INT(end(&s), NETCHAN_OK);
    CHECK_INT(got_int(&r), 2);
    CHECK_INT(recv_now(&w, w.l.h.link.recv), 1);
    check_works(&w);
    free_world(&w);
}

/* No more than the window is on its way; what is not numbered passes it. */
static void test_window(void) {
    world w;
    enum { COUNT = 20 };
    window = 64;
    make_world(&w, COUNT, 0);
    flow(&w);
    for (int i = 0; i < COUNT; i++) send_now(w.d.h.link.send, i);
    netchan__session *d = session(&w.d);
    size_t shipped = 0;
    for (size_t size; (size = ship(&w, &w.d)) > 0;) shipped += size;
    CHECK(shipped >= window && shipped < window + 8);
    CHECK_INT(d->given, shipped);
    CHECK(netchan__unsent(d) > 0 && !netchan__wire_idle(&w.newest->wire[DIALLER]));
    task any;
    begin_recv(&any, w.d.h.link.recv, LONG); /* a frame; it waits as well */
    CHECK_INT(ship(&w, &w.d), 0);

    w.now += 6000 * MS;
    tick(&w, &w.d); /* a heartbeat passes, an answer, and an acknowledgement */
    drop_bytes(&w.newest->to[LISTENER]);
    CHECK_INT(ship(&w, &w.d), netchan__varint_size(w.now) + 2);
    CHECK_INT(count_frames(&w, &w.l, NETCHAN__PING), 1);
    drop_bytes(&w.newest->to[LISTENER]);
    text t;
    t.size = 0;
    put_bytes(&t, "\2\2\7\2\x60\1", 6); /* PING 7, and a frame of a later version */
    forge(&w, &w.d, &t);
    ship(&w, &w.d);
    CHECK_INT(count_frames(&w, &w.l, NETCHAN__PONG), 1);
    CHECK_INT(count_frames(&w, &w.l, NETCHAN__ACK), 0);
    w.now += NETCHAN__ACK_MS * MS;
    tick(&w, &w.d);
    CHECK_INT(ship(&w, &w.d), 3);
    CHECK_INT(count_frames(&w, &w.l, NETCHAN__ACK), 1);

    t.size = 0; /* it opens as far as was acknowledged */
    put_frame(&t, NETCHAN__ACK, (uint64_t[]){d->acked + 2}, 1, NULL, 0);
    forge(&w, &w.d, &t);
    CHECK(d->given < window);
    size_t more = ship(&w, &w.d);
    CHECK(more > 0 && more < 16);
    CHECK_INT(ship(&w, &w.d), 0);

    t.size = 0; /* what waits was never sent */
    CHECK(d->queued > d->peer.sent);
    put_frame(&t, NETCHAN__ACK, (uint64_t[]){d->peer.sent + 1}, 1, NULL, 0);
    forge(&w, &w.d, &t);
    check_complaint(&w, &w.d, "never sent", "");
    stop(&w, &w.d);
    CHECK_INT(end(&any), NETCHAN_ELOST);
    free_world(&w);
}

/* A small window only slows things down. */
static void test_transfers_through_a_small_window(void) {
    static const size_t windows[] = {1, 20, 100, 1000, 20000};
    for (size_t i = 0; i < sizeof windows / sizeof *windows; i++) {
        window = windows[i];
        for (int k = 0; k < 4; k++) {
            plan p = {{k % 2 ? 3 : 0, k / 2 ? 3 : 0}, 40000, 997, SIZE_MAX, 0, 0, k, k % 2};
            transfer(p);
            for (p.cut = (size_t)k, p.step = 1, p.large = 10; transfer(p); p.cut += 11 * LESS) continue;
        }
    }
}

/* Who does not acknowledge is given no more than the window, and what waits for him is bounded by max_memory. */
static void test_who_never_acknowledges(void) {
    enum { COUNT = 40, SIZE = 15000 };
    static uint8_t bytes[SIZE];
    static task s[COUNT];
    world w;
    netchan_options d = buffer_of(0), l = buffer_of(0);
    l.max_message = 20000;
    l.max_memory = 200000;
    window = 50000;
    make_world_with(&w, &d, &l);
    flow(&w);
    netchan__session *x = session(&w.l);
    size_t given = 0, count = 0;
    for (; count < COUNT && !breach(&w.l); count++) { /* he asks for values all the time */
        text t;
        t.size = 0;
        put_frame(&t, NETCHAN__DEMAND, (uint64_t[]){1, count + 1, count + 1, 4, 0}, 5, NULL, 0);
        forge(&w, &w.l, &t);
        begin_send(&s[count], w.l.h.link.send, netchan_bytes(bytes, SIZE), NETCHAN_FOREVER);
        for (size_t size; (size = ship_from(w.newest, LISTENER)) > 0;) given += size;
        drop_bytes(&w.newest->to[DIALLER]);
        CHECK(given < window + NETCHAN__FRAME_MAX + 100);
        CHECK(netchan__buf_size(&x->out) < l.max_memory + 2 * window + 2 * NETCHAN__FRAME_MAX);
    }
    check_complaint(&w, &w.l, "does not read", "");
    CHECK(given >= window);
    stop(&w, &w.l);
    size_t unknown = 0;
    for (size_t i = 0; i < count; i++) { /* what did not leave waits for somebody else */
        if (!netchan__is_finished(&s[i].op)) expire(&s[i]);
        int result = end(&s[i]);
        unknown += result == NETCHAN_EUNKNOWN;
        CHECK(result == NETCHAN_EUNKNOWN || result == NETCHAN_ETIMEDOUT);
    }
    CHECK_INT(unknown, given / SIZE);
    free_world(&w);
}

/* --- fresh keys --------------------------------------------------------------------------------------------------- */

/* The dialler replaces a link that is worn, and nobody sees it. */
static void test_rollover(void) {
    for (int k = 0; k < 4; k++) {
        world w;
        key_records = 10;
        make_world(&w, k % 2 ? 3 : 0, k / 2 ? 3 : 0);
        flow(&w);
        for (int i = 0; i < 20; i++) check_works(&w);
        netchan_stats d = stats(&w.d), l = stats(&w.l);
        CHECK(d.rollovers > 4 && d.rollovers < 20);
        CHECK_INT(d.rollovers, l.rollovers);
        CHECK_INT(d.resumes + l.resumes + d.lost + l.lost, 0);
        check_events(&w.d, "up");
        check_events(&w.l, "up");
        CHECK(session(&w.d)->generation >= d.rollovers);
        FOR_CABLES(&w, c) CHECK(!c->open[0] == !(c == line(&w.d)) && c->open[0] == c->open[1]);
        free_world(&w);
    }
}

static void wear_out(world *w) {
    netchan__wire *x = &line(&w->d)->wire[DIALLER];
    CHECK(!netchan__wire_worn(x) && !netchan__hub_wants_wire(&w->d.h));
    x->records_in = key_records - 1;
    CHECK(!netchan__hub_wants_wire(&w->d.h));
    x->records_in = key_records;
    CHECK(netchan__wire_worn(x) && netchan__hub_wants_wire(&w->d.h));
}

/* Make before break, byte by byte. When the new link breaks in its greeting nobody knows whether the other side has
 * moved: the old one is given up as well, and nothing is lost. */
static void test_rollover_whose_new_link_breaks(void) {
    for (size_t bytes = 0; bytes < 120; bytes++) {
        world w;
        make_used_world(&w);
        wear_out(&w);
        cable *old = w.newest;
        send_now(w.d.h.link.send, 1);
        ship(&w, &w.d);
        arrive(&w, &w.l, 3); /* a part of it is there */
        cable *c = start(&w);
        CHECK(old->wire[DIALLER].paused);
        task s, r;
        begin_send(&s, w.l.h.link.send, netchan_int(2), NETCHAN_FOREVER);
        begin_recv(&r, w.d.h.link.recv, LONG);
        CHECK_INT(ship_from(old, DIALLER), 0);
        for (size_t arrived = 0; arrived < bytes;) {
            size_t n = ship_from(c, DIALLER) + ship_from(c, LISTENER);
            for (int who = 1; who >= 0 && arrived < bytes; who--) arrived += arrive_at(&w, c, who, 1);
            if (!n && !pipe_size(&c->to[0]) && !pipe_size(&c->to[1])) break;
        }
        CHECK(line(&w.l) == c || line(&w.d) == old);
        CHECK_INT(line(&w.l) == c, old->wire[LISTENER].failure != NULL);
        cut(&w, c);
        CHECK(old->wire[DIALLER].failure);
        flow(&w);
        check_events(&w.d, "down resumed");
        CHECK_INT(recv_now(&w, w.l.h.link.recv), 1);
        CHECK_INT(got_int(&r), 2);
        CHECK_INT(end(&s), NETCHAN_OK);
        check_works(&w);
        CHECK_INT(stats(&w.d).lost + stats(&w.l).lost, 0);
        free_world(&w);
    }
}

/* Where the new link leads to somebody else, the old one goes on. */
static void test_rollover_that_is_refused(void) {
    world w;
    side elsewhere;
    make_used_world(&w);
    make_side(&elsewhere, LISTENER, NULL);
    wear_out(&w);
    w.redials = false;
    cable *old = w.newest, *c = lay_cable(&w);
    lock();
    netchan__wire_start(&c->wire[DIALLER], &w.d.h, w.now);
    netchan__wire_start(&c->wire[LISTENER], &elsewhere.h, w.now);
    unlock();
    CHECK(old->wire[DIALLER].paused);
    flow(&w);
    CHECK_INT(stats(&w.d).lost, 0);
    w.redials = true;
    check_works(&w);
    check_works(&w);
    CHECK_INT(stats(&w.d).lost + stats(&w.l).lost, 0);
    CHECK_INT(elsewhere.h.peers, 0);
    free_side(&w, &elsewhere);
    free_world(&w);
}

/* No keys serve for more than twice the limit: rather nothing is said. */
static void test_output_stalls_at_twice_the_limit(void) {
    world w;
    key_records = 20;
    make_world(&w, 100, 0);
    flow(&w);
    w.redials = false;
    size_t records = stats(&w.d).records_sent;
    for (int i = 0; i < 100; i++) {
        send_now(w.d.h.link.send, i);
        records += ship(&w, &w.d) > 0;
    }
    CHECK_INT(records, 2 * key_records);
    flow(&w);
    CHECK_INT(stats(&w.d).records_sent, 2 * key_records);
    w.redials = true;
    for (int i = 0; i < 100; i++) CHECK_INT(recv_now(&w, w.l.h.link.recv), i);
    CHECK(stats(&w.d).rollovers > 0);
    check_events(&w.d, "up");
    free_world(&w);
}

/* Values of all kinds, while the links are replaced all the time, and break. */
static void test_rollovers_in_the_midst_of_everything(void) {
    for (int k = 0; k < 12; k++) {
        bool small = k % 3 == 0;
        key_records = small ? 150 + (uint64_t)k * 10 : 4 + (uint64_t)k; /* here a record is a byte */
        size_t large = small ? 10 : 40000, step = small ? 1 : 20000;
        plan p = {{k % 2 ? 3 : 0, k / 2 % 2 ? 3 : 0}, large, step, SIZE_MAX, 0, k % 3, k, k % 4 == 0};
        transfer(p);
        for (p.cut = 0; transfer(p); p.cut += (small ? 1u : 4999u) * LESS) continue;
    }
}

/* --- a link that does not come back ------------------------------------------------------------------------------- */

static void go_down(world *w) {
    w->redials = false;
    FOR_CABLES(w, c) if (c->open[0] || c->open[1]) cut(w, c);
}

/* The session of a side is lost after resume_ms, and its event says so. */
static happening lose(world *w, side *x, uint64_t ms) {
    char reason[100];
    CHECK_INT(wait_over(w, x), ms);
    happening e;
    do CHECK(next_event(x, &e));
    while (strcmp(e.event, "lost"));
    snprintf(reason, sizeof reason, "its link did not come back within %d ms", x->h.options.resume_ms);
    CHECK_STR(e.reason, reason);
    CHECK_INT(stats(x).lost, 1);
    CHECK_INT(stats(x).peers, 0);
    return e;
}

static void test_resume_ms(void) {
    static const int given[] = {0, 1000, 1, 7777};
    for (size_t i = 0; i < 4; i++) {
        world w;
        netchan_options o = buffer_of(2);
        o.resume_ms = given[i];
        make_world_with(&w, &o, &o);
        flow(&w);
        uint64_t ms = given[i] ? (uint64_t)given[i] : 30000;
        go_down(&w);
        uint64_t begin_at = w.now;
        happening e = lose(&w, &w.d, ms);
        check_counts(&e, 0, 0, 0);
        w.now = begin_at;
        e = lose(&w, &w.l, ms);
        check_counts(&e, 0, 0, 0);
        w.redials = true;
        check_works(&w);
        free_world(&w);
    }
}

static void test_resume_ms_for_ever(void) {
    world w;
    netchan_options o = buffer_of(2);
    o.resume_ms = -1;
    make_world_with(&w, &o, &o);
    flow(&w);
    go_down(&w);
    for (int i = 0; i < 100; i++) {
        w.now += 1000000 * MS;
        CHECK(tick_hub(&w, &w.d) == UINT64_MAX && tick_hub(&w, &w.l) == UINT64_MAX);
    }
    w.redials = true;
    check_works(&w);
    CHECK_INT(stats(&w.d).lost + stats(&w.l).lost, 0);
    free_world(&w);
}

/* Time in which this process did not run does not count: the others had no chance to come. */
static void test_a_stopped_process_loses_nothing_at_once(void) {
    world w;
    netchan_options o = buffer_of(2);
    o.resume_ms = 8000;
    make_world_with(&w, &o, &o);
    flow(&w);
    go_down(&w);
    for (int i = 0; i < 3; i++) {
        uint64_t next = tick_hub(&w, &w.l);
        CHECK(next <= w.now + 2000 * MS);
        w.now += 3600 * 1000 * MS; /* it is looked at an hour later */
        tick_hub(&w, &w.l);
        CHECK(session(&w.l) != NULL);
    }
    CHECK(wait_over(&w, &w.l) <= 8000);
    CHECK_INT(stats(&w.l).lost, 1);
    free_world(&w);
}

/* What the event "lost" of a dialler counts. */
static void test_counts_of_a_lost_dialler(void) {
    for (int i = 0; i < 5; i++) {
        world w;
        task s[3];
        happening e;
        size_t buffer = i < 3 ? 4 : 0;
        make_world(&w, buffer, 0);
        flow(&w);
        for (int n = 0; i < 3 && n < 4; n++) { /* i of them leave, of which one is known to be taken */
            send_now(w.d.h.link.send, n);
            if (n < i) ship(&w, &w.d), arrive(&w, &w.l, SIZE_MAX);
            if (n == 0 && i > 0) CHECK_INT(recv_now(&w, w.l.h.link.recv), 0);
        }
        for (int n = 0; i >= 3 && n < 3; n++) { /* offers that are there, that only left, that did not leave */
            begin_send(&s[n], w.d.h.link.send, netchan_int(n), i == 3 ? NETCHAN_FOREVER : LONG);
            if (n < 2) ship(&w, &w.d);
            if (n == 0) arrive(&w, &w.l, SIZE_MAX);
        }
        go_down(&w);
        e = lose(&w, &w.d, 30000);
        if (i < 3) check_counts(&e, i > 0, (uint64_t)(4 - i), i > 1);
        if (i == 3) check_counts(&e, 0, 0, 2);
        if (i == 4) check_counts(&e, 0, 0, 0); /* they were not asked for */
        CHECK_INT(w.d.h.unknown, e.unknown);
        CHECK_INT(stats(&w.d).queued, e.returned);
        for (int n = 0; i == 3 && n < 2; n++) CHECK_INT(end(&s[n]), NETCHAN_EUNKNOWN);
        stop(&w, &w.l);
        while (netchan_recv(w.l.h.link.recv, NULL, NETCHAN_NOWAIT) == NETCHAN_OK) continue; /* of the old session */
        w.redials = true;
        flow(&w);
        for (int n = i < 3 ? i : i == 3 ? 2 : 0; n < (i < 3 ? 4 : 3); n++) {
            CHECK_INT(recv_now(&w, w.l.h.link.recv), n);
            if (i >= 3) CHECK_INT(end(&s[n]), NETCHAN_OK);
        }
        free_world(&w);
    }
}

/* The same of a listener, for values on their way to a peer. */
static void test_counts_of_a_lost_listener(void) {
    for (int i = 0; i < 8; i++) {
        bool buffered = i & 1, left = i & 2, keeps = i & 4;
        world w;
        task s, r;
        netchan_options d = buffer_of(0), l = buffer_of(buffered ? 2 : 0);
        l.no_redelivery = !keeps;
        make_world_with(&w, &d, &l);
        flow(&w);
        begin_recv(&r, w.d.h.link.recv, LONG);
        flow(&w);
        begin_send(&s, w.l.h.link.send, netchan_int(1), LONG);
        if (left) ship(&w, &w.l); /* it ships a match */
        if (buffered) CHECK_INT(end(&s), NETCHAN_OK);
        CHECK_INT(stats(&w.l).in_flight, 1);
        go_down(&w);
        happening e = lose(&w, &w.l, 30000);
        bool again = buffered && (keeps || !left);
        check_counts(&e, 0, buffered && !left, left && !again);
        CHECK_INT(stats(&w.l).queued, again);
        CHECK_INT(stats(&w.l).in_flight, 0);
        if (!buffered) CHECK_INT(netchan__is_finished(&s.op), left);
        if (!buffered && left) CHECK_INT(end(&s), NETCHAN_EUNKNOWN);
        stop(&w, &w.d);
        CHECK_INT(end(&r), NETCHAN_ELOST);
        w.redials = true;
        begin_recv(&r, w.d.h.link.recv, LONG);
        flow(&w);
        bool comes = again || (!buffered && !left);
        CHECK_INT(netchan__is_finished(&r.op), comes);
        if (!comes) expire(&r);
        else CHECK_INT(r.op.redelivered, left);
        if (comes) CHECK_INT(got_int(&r), 1);
        else CHECK_INT(end(&r), NETCHAN_ETIMEDOUT);
        if (!buffered && !left) CHECK_INT(end(&s), NETCHAN_OK);
        CHECK_INT(free_side(&w, &w.l).unknown, e.unknown);
        netchan_options o = buffer_of(0);
        make_side(&w.l, LISTENER, &o);
        free_world(&w);
    }
}

/* --- calls while the link is down --------------------------------------------------------------------------------- */

static void test_tries_on_a_link_that_is_down(void) {
    world w;
    task s, r, wanted;
    make_world(&w, 0, 0);
    flow(&w);
    begin_recv(&wanted, w.l.h.link.recv, NETCHAN_FOREVER);
    go_down(&w);
    begin_send(&s, w.d.h.link.send, netchan_int(1), NETCHAN_NOWAIT);
    CHECK_INT(end(&s), NETCHAN_ETIMEDOUT);
    begin_recv(&r, w.d.h.link.recv, NETCHAN_NOWAIT);
    CHECK_INT(end(&r), NETCHAN_ETIMEDOUT);
    begin_select(&s, w.d.h.link.send, netchan_int(2), w.d.h.link.recv, NETCHAN_NOWAIT);
    CHECK_INT(end(&s), NETCHAN_ETIMEDOUT);
    w.redials = true;
    flow(&w);
    CHECK(!netchan__is_finished(&wanted.op)); /* none of them is tried later */
    begin_send(&s, w.d.h.link.send, netchan_int(3), NETCHAN_NOWAIT);
    flow(&w);
    CHECK_INT(end(&s), NETCHAN_OK);
    CHECK_INT(got_int(&wanted), 3);
    free_world(&w);
}

/* A try that was asked when the link broke: the answer is no, unless the value may have been taken. */
static void test_tries_in_flight_when_the_link_breaks(void) {
    for (int i = 0; i < 12; i++) {
        int kind = i % 3, stage = i / 3; /* 0 not shipped, 1 on its way, 2 there, 3 the answer is on its way */
        world w;
        task t, partner;
        make_world(&w, 0, 0);
        flow(&w);
        if (kind == 0) begin_recv(&partner, w.l.h.link.recv, NETCHAN_FOREVER);
        else if (kind == 1) begin_send(&partner, w.l.h.link.send, netchan_int(5), NETCHAN_FOREVER);
        else begin_recv(&partner, w.l.h.link.recv, NETCHAN_FOREVER);
        if (kind == 0) begin_send(&t, w.d.h.link.send, netchan_int(5), NETCHAN_NOWAIT);
        else if (kind == 1) begin_recv(&t, w.d.h.link.recv, NETCHAN_NOWAIT);
        else begin_select(&t, w.d.h.link.send, netchan_int(5), w.d.h.link.recv, NETCHAN_NOWAIT);
        CHECK(!netchan__is_finished(&t.op));
        if (stage > 0) ship(&w, &w.d);
        if (stage > 1) arrive(&w, &w.l, SIZE_MAX);
        if (stage > 2) ship(&w, &w.l);
        go_down(&w);
        bool early = netchan__is_finished(&t.op); /* it is not asked for by the listener, which has not got its value */
        CHECK_INT(early, kind > 0);
        if (early) CHECK_INT(end(&t), NETCHAN_ETIMEDOUT);
        w.redials = true;
        flow(&w);
        if (!early) CHECK_INT(end(&t), NETCHAN_OK); /* it was done: the value was with the question */
        CHECK_INT(netchan__is_finished(&partner.op), !early);
        if (!early) CHECK_INT(got_int(&partner), 5);
        else { /* who waits there waits for the next */
            task other_try;
            if (kind == 1) begin_recv(&other_try, w.d.h.link.recv, LONG);
            else begin_send(&other_try, w.d.h.link.send, netchan_int(5), LONG);
            flow(&w);
            CHECK_INT(end(kind == 1 ? &partner : &other_try), NETCHAN_OK);
            CHECK_INT(got_int(kind == 1 ? &other_try : &partner), 5);
        }
        check_works(&w);
        free_world(&w);
    }
}

/* Timeouts end in time although nobody can be asked, and nothing of them is left at the other side. */
static void test_timeouts_while_the_link_is_down(void) {
    for (int before = 0; before < 2; before++) {
        world w;
        task t[3];
        make_world(&w, 0, 0);
        flow(&w);
        if (!before) go_down(&w);
        begin_send(&t[0], w.d.h.link.send, netchan_int(1), LONG);
        begin_recv(&t[1], w.d.h.link.recv, LONG);
        begin_select(&t[2], w.d.h.link.send, netchan_int(2), w.d.h.link.recv, LONG);
        if (before) flow(&w);
        if (before) go_down(&w);
        for (int i = 0; i < 3; i++) {
            expire(&t[i]);
            CHECK_INT(end(&t[i]), NETCHAN_ETIMEDOUT);
        }
        w.redials = true;
        flow(&w);
        CHECK_INT(session(&w.l)->peer.waiters.count, 0);
        task s, r;
        begin_recv(&r, w.l.h.link.recv, NETCHAN_NOWAIT);
        CHECK_INT(end(&r), NETCHAN_ETIMEDOUT);
        begin_send(&s, w.l.h.link.send, netchan_int(3), NETCHAN_NOWAIT);
        CHECK_INT(end(&s), NETCHAN_ETIMEDOUT);
        check_works(&w);
        free_world(&w);
    }
}

/* Nobody at the listener is promised to a peer that cannot be asked. */
static void test_no_match_is_begun_with_who_is_down(void) {
    world w;
    task far_s, far_r, s, r, r2;
    make_world(&w, 0, 0);
    flow(&w);
    begin_send(&far_s, w.d.h.link.send, netchan_int(1), LONG);
    begin_recv(&far_r, w.d.h.link.recv, LONG);
    flow(&w);
    go_down(&w);
    begin_recv(&r, w.l.h.link.recv, LONG);
    begin_send(&s, w.l.h.link.send, netchan_int(2), LONG);
    CHECK_INT(netchan__net.matches.count, 0);
    expire(&r);
    expire(&s);
    CHECK_INT(end(&r), NETCHAN_ETIMEDOUT);
    CHECK_INT(end(&s), NETCHAN_ETIMEDOUT);
    begin_recv(&r2, w.l.h.link.recv, LONG);
    w.redials = true;
    flow(&w);
    CHECK_INT(got_int(&r2), 1);
    CHECK_INT(end(&far_s), NETCHAN_OK);
    begin_send(&s, w.l.h.link.send, netchan_int(3), LONG);
    flow(&w);
    CHECK_INT(got_int(&far_r), 3);
    CHECK_INT(end(&s), NETCHAN_OK);
    free_world(&w);
}

/* --- values that are handed back ---------------------------------------------------------------------------------- */

/* Small and large values that the listener did not receive go to the next one, before others and before the close. */
static void test_returned_values(void) {
    enum { COUNT = 6, LARGE = 40000 };
    static uint8_t bytes[LARGE];
    for (int closes = 0; closes < 2; closes++) {
        for (int taken = 0; taken <= COUNT; taken++) {
            world w;
            task s[COUNT], after, r;
            make_world(&w, COUNT, 0);
            flow(&w);
            for (int i = 0; i < COUNT; i++) {
                size_t size = (size_t)(i % 2 ? LARGE - i : i);
                begin_send(&s[i], w.d.h.link.send, netchan_bytes(bytes, size), LONG);
                flow(&w);
                CHECK_INT(end(&s[i]), NETCHAN_OK);
            }
            for (int i = 0; i < taken; i++) {
                begin_recv(&r, w.l.h.link.recv, LONG);
                CHECK_INT(end(&r), NETCHAN_OK);
                netchan_clear(&r.got);
            }
            w.redials = false;
            begin_hangup(&w.l);
            for (int i = 0; i < 3; i++) flow(&w), hung_up(&w.l);
            CHECK(!session(&w.l) && !session(&w.d));
            w.redials = true;
            happening e = check_events(&w.d, "up drained");
            check_counts(&e, (uint64_t)taken, (uint64_t)(COUNT - taken), 0);
            CHECK_INT((int)stats(&w.d).queued, COUNT - taken);
            CHECK_INT(stats(&w.d).values_sent, taken);
            CHECK_INT(stats(&w.d).in_flight, 0);
            begin_send(&after, w.d.h.link.send, netchan_bytes(bytes, 100), LONG);
            if (closes) expire(&after), CHECK_INT(netchan_close(w.d.h.link.send), NETCHAN_OK);
            CHECK_INT(replace_listener(&w, 0).unreceived, 0);
            for (int i = taken; i < COUNT; i++) {
                begin_recv(&r, w.l.h.link.recv, LONG);
                flow(&w);
                CHECK_INT(end(&r), NETCHAN_OK);
                CHECK_INT((int)netchan_count(&r.got), i % 2 ? LARGE - i : i);
                netchan_clear(&r.got);
            }
            flow(&w);
            if (closes) CHECK_INT(end(&after), NETCHAN_ETIMEDOUT);
            else {
                begin_recv(&r, w.l.h.link.recv, LONG);
                CHECK_INT(end(&r), NETCHAN_OK);
                CHECK_INT(netchan_count(&r.got), 100);
                netchan_clear(&r.got);
                CHECK_INT(end(&after), NETCHAN_OK);
            }
            check_events(&w.l, closes ? "up closed" : "up");
            free_world(&w);
        }
    }
}

/* Some came back, some never left, and then the session is lost: the next one gets them in the order of the sends. */
static void test_order_of_what_came_back_and_what_never_left(void) {
    world w;
    task after;
    happening e;
    make_world(&w, 5, 0);
    flow(&w);
    for (int i = 0; i < 2; i++) send_now(w.d.h.link.send, i);
    flow(&w);
    for (int i = 2; i < 4; i++) send_now(w.d.h.link.send, i);
    begin_hangup(&w.l);
    hung_up(&w.l);
    ship(&w, &w.l);
    arrive(&w, &w.d, SIZE_MAX);
    begin_send(&after, w.d.h.link.send, netchan_int(4), LONG);
    go_down(&w);
    CHECK_INT(wait_over(&w, &w.d), 30000);
    e = check_events(&w.d, "up down drained"); /* both farewells were said, though nobody heard ours */
    check_counts(&e, 0, 4, 0);
    replace_listener(&w, 0);
    w.redials = true;
    for (int i = 0; i < 5; i++) CHECK_INT(recv_now(&w, w.l.h.link.recv), i);
    CHECK_INT(end(&after), NETCHAN_OK);
    check_works(&w);
    free_world(&w);
}

/* A listener that hands back what was not sent, or not so. */
static void test_lies_about_returned_values(void) {
    static uint8_t bytes[20000];
    for (int i = 0; i < 9; i++) {
        world w;
        netchan_options d = buffer_of(3), l = buffer_of(0);
        d.max_message = l.max_message = 30000;
        d.max_memory = l.max_memory = 1 << 26;
        make_world_with(&w, &d, &l);
        flow(&w);
        task s;
        begin_send(&s, w.d.h.link.send, netchan_bytes(bytes + 5000, 15000), LONG);
        CHECK_INT(end(&s), NETCHAN_OK);
        send_now(w.d.h.link.send, 1);
        flow(&w);
        text t;
        const char *why = "not sent";
        t.size = 0;
#define RETURN(channel, size, tail, tail_size) \
    put_frame(&t, NETCHAN__RETURN, (uint64_t[]){channel, size}, 2, tail, tail_size)
        if (i == 0) RETURN(1, 1, "\5", 1);
        if (i == 1) RETURN(0, 30001, "\5", 1);
        if (i == 2) RETURN(0, 1, "\5\5", 2);
        if (i == 3) RETURN(0, UINT64_MAX, "\5", 1);
        if (i == 4) RETURN(0, 1, "\206", 1), why = "decoded";
        if (i == 5) RETURN(0, 2, "\5\5", 2), why = "decoded";
        if (i == 6) RETURN(0, 1, "\5", 1), RETURN(0, 1, "\6", 1), RETURN(0, 1, "\7", 1); /* more than were sent */
        if (i == 7) RETURN(0, 15000, bytes, 10000), RETURN(0, 15000, bytes, 10000); /* too many parts */
        if (i == 8) RETURN(0, 0, NULL, 0), why = "decoded";
        forge(&w, &w.d, &t);
        check_complaint(&w, &w.d, why, "case");
        check_lost(&w, &w.d);
        CHECK_INT(w.d.h.unknown, i == 6 ? 0 : 2);
        while (netchan_recv(w.l.h.link.recv, NULL, NETCHAN_NOWAIT) == NETCHAN_OK) continue;
        flow(&w);
        for (int n = 0; i == 6 && n < 2; n++) CHECK_INT(recv_now(&w, w.l.h.link.recv), 5 + n); /* it gave them */
        check_works(&w);
        free_world(&w);
    }
}

/* --- memory that runs out while a session resumes ----------------------------------------------------------------- */

/* The n-th allocation fails. Returns whether it was asked for. */
static bool resume_without_memory(size_t size, long n) {
    static uint8_t bytes[20000];
    enum { COUNT = 3 };
    world w;
    task s[COUNT], back, r;
    make_world(&w, COUNT, 0);
    flow(&w);
    begin_recv(&back, w.d.h.link.recv, LONG);
    for (int i = 0; i < COUNT; i++) {
        begin_send(&s[i], w.d.h.link.send, netchan_bytes(bytes, size + (size_t)i), LONG);
        if (i == 0) flow(&w);
        if (i == 1) ship(&w, &w.d);
    }
    cut(&w, w.newest);
    alloc_fail(n);
    flow(&w);
    bool failed = alloc_failed();
    alloc_fail(0);
    flow(&w);
    size_t came = 0, lost = 0, next = 0;
    for (bool any = true; any;) {
        begin_recv(&r, w.l.h.link.recv, NETCHAN_FOREVER);
        flow(&w);
        any = netchan__is_finished(&r.op);
        if (!any) expire(&r), CHECK_INT(end(&r), NETCHAN_ETIMEDOUT);
        else if (end(&r) == NETCHAN_OK) {
            size_t which = netchan_count(&r.got) - size;
            CHECK(which < COUNT && which >= next); /* in order, none twice */
            next = which + 1;
            came++;
            netchan_clear(&r.got);
        } else CHECK_INT(r.op.result, NETCHAN_ENOMEM);
    }
    for (int i = 0; i < COUNT; i++) {
        if (!netchan__is_finished(&s[i].op)) expire(&s[i]);
        lost += end(&s[i]) != NETCHAN_OK;
    }
    CHECK(came + lost + w.d.h.unknown + w.d.h.link.send->undelivered >= COUNT);
    CHECK(failed || came == COUNT);
    if (!netchan__is_finished(&back.op)) expire(&back);
    end(&back);
    flow(&w);
    check_works(&w);
    free_world(&w);
    return failed;
}

static void test_memory_runs_out_while_a_session_resumes(void) {
    for (size_t size = 10; size < 20000; size += 19000) {
        long n = 1;
        while (resume_without_memory(size, n)) n++;
        CHECK(n > 3);
    }
}

/* --- what is told ------------------------------------------------------------------------------------------------- */

static void test_events_in_order(void) {
    world w;
    make_world(&w, 2, 0);
    flow(&w);
    for (int i = 0; i < 3; i++) {
        cut(&w, w.newest);
        flow(&w);
    }
    go_down(&w);
    wait_over(&w, &w.d);
    wait_over(&w, &w.l);
    w.redials = true;
    flow(&w);
    begin_hangup(&w.d);
    for (int i = 0; i < 3; i++) flow(&w), hung_up(&w.d);
    static const char all[] = "up down resumed down resumed down resumed down lost up drained";
    check_events(&w.d, all);
    check_events(&w.l, all);
    CHECK_INT(stats(&w.d).resumes, 3);
    CHECK_INT(stats(&w.d).lost, 1);
    free_world(&w);
}

static void test_stats(void) {
    world w;
    make_world(&w, 4, 2);
    flow(&w);
    send_now(w.d.h.link.send, 1);
    send_now(w.d.h.link.send, 2);
    send_now(w.l.h.link.send, 3);
    CHECK_INT(stats(&w.l).queued, 1);
    CHECK_INT(stats(&w.d).in_flight, 2);
    flow(&w);
    CHECK_INT(recv_now(&w, w.l.h.link.recv), 1);
    CHECK_INT(recv_now(&w, w.d.h.link.recv), 3);
    netchan_stats d = stats(&w.d), l = stats(&w.l);
    CHECK_INT(d.values_sent, 2);
    CHECK_INT(l.values_received, 2);
    CHECK_INT(l.values_sent, 1);
    CHECK_INT(d.values_received, 1);
    CHECK_INT(d.in_flight, 1);
    CHECK_INT(l.queued, 0);
    CHECK_INT(d.bytes_sent, l.bytes_received);
    CHECK_INT(l.bytes_sent, d.bytes_received);
    CHECK_INT(d.records_sent, l.records_received);
    CHECK_INT(l.records_sent, d.records_received);
    CHECK_INT(d.frames_sent, l.frames_received);
    CHECK_INT(d.frames_sent, session(&w.d)->queued);
    CHECK_INT(l.frames_sent, d.frames_received);
    CHECK_INT(d.peers, 1);
    CHECK_INT(l.peers, 1);
    CHECK_INT(d.resumes + d.rollovers + d.replays + d.lost, 0);
    go_down(&w);
    CHECK_INT(stats(&w.d).peers, 1); /* also when its link is down */
    free_world(&w);
}

int main(int argc, char **argv) {
    static const test_entry tests[] = {
        TEST(frames_round_trip),
        TEST(output_is_cut_between_frames),
        TEST(golden_greetings),
        TEST(golden_frames),
        TEST(greeting),
        TEST(bytes_come_in_pieces),
        TEST(order_in_pieces),
        TEST(fragments_take_turns),
        TEST(fragments_are_cut_when_they_are_needed),
        TEST(heartbeats),
        TEST(silence_is_the_end_of_a_link),
        TEST(time_that_jumps_is_no_silence),
        TEST(lies_to_the_listener),
        TEST(lies_to_the_dialler),
        TEST(lengths),
        TEST(unknown_frames_are_counted),
        TEST(lies_in_the_greeting),
        TEST(lies_to_who_waits_for_a_greeting),
        TEST(lies_about_what_waits),
        TEST(more_operations_than_allowed),
        TEST(nested_too_deep),
        TEST(values_that_never_left_go_over_the_next_session),
        TEST(order_over_the_next_session),
        TEST(close_after_what_was_sent),
        TEST(farewell),
        TEST(farewell_waits_for_what_is_negotiated),
        TEST(cut_after_each_byte),
        TEST(memory_runs_out),
        TEST(resume_after_a_cut_at_each_byte),
        TEST(resume_in_the_midst_of_large_values),
        TEST(resume_after_many_cuts),
        TEST(cuts_in_the_greeting_of_a_new_link),
        TEST(what_arrived_is_not_replayed),
        TEST(what_did_not_arrive_was_never_sent),
        TEST(the_new_link_is_found_before_the_break_of_the_old),
        TEST(hangup_in_flight),
        TEST(golden_resume),
        TEST(false_resumes),
        TEST(replayed_resume),
        TEST(malformed_resumes),
        TEST(a_late_link_is_refused),
        TEST(a_new_listener_takes_over),
        TEST(a_refusal_at_one_of_several_addresses),
        TEST(frames_are_kept_until_acknowledged),
        TEST(acknowledgements_wait),
        TEST(acknowledgement_among_many_pings),
        TEST(window),
        TEST(transfers_through_a_small_window),
        TEST(who_never_acknowledges),
        TEST(rollover),
        TEST(rollover_whose_new_link_breaks),
        TEST(rollover_that_is_refused),
        TEST(output_stalls_at_twice_the_limit),
        TEST(rollovers_in_the_midst_of_everything),
        TEST(resume_ms),
        TEST(resume_ms_for_ever),
        TEST(a_stopped_process_loses_nothing_at_once),
        TEST(counts_of_a_lost_dialler),
        TEST(counts_of_a_lost_listener),
        TEST(tries_on_a_link_that_is_down),
        TEST(tries_in_flight_when_the_link_breaks),
        TEST(timeouts_while_the_link_is_down),
        TEST(no_match_is_begun_with_who_is_down),
        TEST(returned_values),
        TEST(order_of_what_came_back_and_what_never_left),
        TEST(lies_about_returned_values),
        TEST(memory_runs_out_while_a_session_resumes),
        TEST(events_in_order),
        TEST(stats),
        TEST_END,
    };
    return test_main(argc, argv, tests);
}
