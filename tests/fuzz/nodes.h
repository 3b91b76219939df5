/* Nodes for fuzzers: processes in one, with the real channels, sessions and hubs of netchan.h, [6] to [14], without
 * sockets, TLS, threads and clock. An input is a program of steps of STEP bytes each; the mutator below knows that, and
 * any bytes are a program. Operations are begun, expired and left as netchan__run() does it, but nobody sleeps. */
#ifndef NETCHAN_FUZZ_NODES_H
#define NETCHAN_FUZZ_NODES_H

/* Limits that the input chooses. No header comes before that of netchan.h. */
static unsigned long window, key_records;
#define NETCHAN_WINDOW window
#define NETCHAN_KEY_RECORDS key_records
#include "fuzz.h"

enum {
    STEP = 12,  /* bytes */
    STEPS = 64, /* of one input that are run, after the first, which says how all is set up */
    MOST = STEP + STEPS * STEP, /* bytes */
    NODES = 3,
    PORTS = 4,
    CONNS = 6,
    PLACES = 40,
    TASKS = 24,
    CASES = 3,
    NAMES = 4,
    WANTED = 4,
    VALUES = 512,
    BIG = 20000, /* bytes of an encoded value that is cut into fragments */
    MS = 1000000 /* nanoseconds */
};

FUZZ_PLAIN_BEGIN

/* --- the world ---------------------------------------------------------------------------------------------------- */

typedef struct node {
    struct netchan__net_state net; /* while another node runs */
    memory memory;
} node;

/* What netchan_listen() or netchan_dial() returns, without its sockets. */
typedef struct port {
    netchan__hub hub;
    size_t node;
    bool open;
} port;

/* Bytes on their way. */
typedef struct pipeline {
    uint8_t *data;
    size_t start, end, room;
} pipeline;

/* A connection. An end without a port is the fuzzer itself. */
typedef struct conn {
    netchan__wire wire[2];
    port *port[2];
    bool open[2];
    bool cut; /* who closes its end is not noticed at the other */
    pipeline to[2];
} conn;

/* A channel, as one node knows it. */
typedef struct place {
    netchan *ch; /* NULL: there is none */
    size_t node;
    uint64_t to;  /* what is sent here is for this peer only */
    port *direct; /* of this hub */
    bool keep;    /* it belongs to a hub; or values in it may hold it */
    bool local;   /* made by netchan_make() */
} place;

/* A call that would block. */
typedef struct task {
    netchan__op op;
    netchan__waiter waiters[CASES];
    netchan_case cases[CASES];
    pthread_mutex_t *room[CASES];
    netchan__locks locks;
    netchan *held[CASES];
    netchan_value items[CASES][4]; /* of a value that is sent */
    netchan_entry entries[CASES][3];
    netchan *gifts[CASES][2]; /* in it */
    uint64_t numbers[CASES];
    size_t node;
    int timeout_ms;
    bool expired;
} task;

/* What is known of a value that was sent, by its number. */
typedef enum fate { NOT_SENT, PENDING, SENT, NEVER, UNKNOWN } fate;

static struct world {
    uint64_t now; /* nanoseconds */
    node nodes[NODES];
    size_t running;
    port ports[PORTS];
    conn conns[CONNS];
    place places[PLACES];
    task *tasks[TASKS];
    struct wanted {
        netchan__wanted wanted;
        port *port; /* NULL: free */
    } wanted[WANTED];
    fate fates[VALUES];
    uint8_t taken[VALUES];
    uint64_t values;
    size_t cursor;   /* in the big value, for fragments */
    size_t repeated; /* how often this frame was said before, with other entries */
    bool knows;      /* all values come from nodes, none from the fuzzer */
} world;

static uint8_t big[BIG];

static const char *const names[NAMES] = {"a", "b", "c", "name"};

/* From here on this process is that node. */
static inline void be(size_t n) {
    if (n == world.running) return;
    world.nodes[world.running].net = netchan__net;
    netchan__net = world.nodes[n].net;
    world.running = n;
    fuzz_memory = &world.nodes[n].memory;
}

static inline void lock(void) {
    pthread_mutex_lock(&netchan__net_lock);
}

static inline void unlock(void) {
    netchan__io_unlock();
}

static inline void make_big(void) {
    big[0] = 0x87; /* bytes */
    uint8_t *at = netchan__varint_put(big + 1, BIG - 4);
    while (at < big + BIG) *at++ = 7;
}

static inline void make_world(void) {
    if (!big[0]) make_big();
    memset(&world, 0, sizeof world);
    world.now = 1000 * (uint64_t)MS;
    fuzz_random_state = 1;
    fuzz_fail_in = 0;
    fuzz_failed = false;
    netchan__op_count = 0;
    memset(&netchan__net, 0, sizeof netchan__net);
    fuzz_memory = &world.nodes[0].memory;
    for (size_t i = NODES; i-- > 0;) {
        be(i);
        netchan__net.on_drained = netchan__lane_drained;
        memset(netchan__net.process, (int)i + 1, sizeof netchan__net.process);
    }
}

/* --- places ------------------------------------------------------------------------------------------------------- */

static inline place *add_place(netchan *ch, bool keep) {
    for (size_t i = 0; i < PLACES; i++) {
        place *p = &world.places[i];
        if (p->ch) continue;
        memset(p, 0, sizeof *p);
        p->ch = ch;
        p->node = world.running;
        p->keep = keep;
        return p;
    }
    return NULL;
}

static inline bool has_places(size_t count) {
    for (size_t i = 0; i < PLACES && count; i++) count -= !world.places[i].ch;
    return count == 0;
}

/* One of the channels of the node that runs, or NULL. */
static inline place *find_place(unsigned which) {
    place *found[PLACES];
    size_t count = 0;
    for (size_t i = 0; i < PLACES; i++)
        if (world.places[i].ch && world.places[i].node == world.running) found[count++] = &world.places[i];
    return count ? found[which % count] : NULL;
}

static inline bool is_known(const netchan *ch) {
    for (size_t i = 0; i < PLACES; i++)
        if (world.places[i].ch == ch) return true;
    return false;
}

/* --- values ------------------------------------------------------------------------------------------------------- */

static inline void check_value(const netchan_value *v, size_t depth) {
    size_t count = netchan_count(v);
    CHECK(depth <= NETCHAN_MAX_DEPTH && v->type <= NETCHAN_F64S);
    if (v->type == NETCHAN_STR) CHECK(((const char *)v->as.block.data)[count] == '\0');
    if (v->type == NETCHAN_SENDER) CHECK(v->as.chan && v->as.chan->may_send);
    if (v->type == NETCHAN_RECEIVER) CHECK(v->as.chan && v->as.chan->may_receive);
    for (size_t i = 0; v->type == NETCHAN_ARRAY && i < count; i++) check_value(netchan_at(v, i), depth + 1);
    for (size_t i = 0; v->type == NETCHAN_MAP && i < count; i++) {
        const netchan_entry *e = (const netchan_entry *)v->as.block.data + i;
        CHECK(netchan_get(v, e->key)->type != NETCHAN_NIL || strlen(e->key) < SIZE_MAX);
        check_value(&e->value, depth + 1);
    }
}

/* What was received is well formed: it encodes to bytes that decode to the same. */
static inline void check_received(const netchan_value *v) {
    size_t size = 0, again = 0;
    netchan_value back;
    check_value(v, 0);
    if (netchan__has_ends(v)) return;
    long fail_in = fuzz_fail_in;
    fuzz_fail_in = 0;
    CHECK(netchan_encode(v, NULL, 0, &size) == NETCHAN_ETOOBIG);
    uint8_t *bytes = (uint8_t *)malloc(2 * size);
    CHECK(bytes && netchan_encode(v, bytes, size, &again) == NETCHAN_OK && again == size);
    CHECK(netchan_decode(&back, bytes, size, (size_t)1 << 24) == NETCHAN_OK);
    CHECK(netchan_encode(&back, bytes + size, size, &again) == NETCHAN_OK && again == size);
    CHECK(memcmp(bytes, bytes + size, size) == 0);
    netchan_clear(&back);
    free(bytes);
    fuzz_fail_in = fail_in;
}

/* The number of a value of ours, or 0. */
static inline uint64_t number_of(const netchan_value *v) {
    const netchan_value *n = v->type == NETCHAN_ARRAY ? netchan_at(v, 0) : v;
    int64_t number = netchan_as_int(n, 0);
    return n->type == NETCHAN_INT && number > 0 && number < VALUES ? (uint64_t)number : 0;
}

/* Keeps the ends that came in a value. */
static inline void keep_ends(const netchan_value *v) {
    netchan *ch = netchan__is_chan(v) ? v->as.chan : NULL;
    place *p = ch && !is_known(ch) ? add_place(ch, !ch->is_end && ch->lane.cap) : NULL;
    if (p) {
        p->local = !ch->is_end;
        netchan_retain(ch);
    }
    for (size_t i = 0; v->type == NETCHAN_ARRAY && i < netchan_count(v) && i < 4; i++) keep_ends(netchan_at(v, i));
}

/* The end of a channel for a value, or a number if there is none. */
static inline netchan_value give(task *t, size_t i, size_t which, unsigned arg) {
    place *p = find_place(arg);
    if (!p || p->to || (!p->ch->may_send && !p->ch->may_receive)) return netchan_int(arg);
    bool receives = p->ch->may_receive && (!p->ch->may_send || arg >= 128);
    t->gifts[i][which] = netchan_retain(p->ch);
    if (p->local && p->ch->lane.cap) p->keep = true;
    return receives ? netchan_receiver(p->ch) : netchan_sender(p->ch);
}

/* What the i-th case of a task sends. It can be told by its number. */
static inline netchan_value make_value(task *t, size_t i, unsigned kind, unsigned arg) {
    netchan_value *items = t->items[i];
    netchan_entry *e = t->entries[i];
    uint64_t number = world.values + 1 < VALUES ? ++world.values : 0;
    t->numbers[i] = number;
    items[0] = netchan_int((int64_t)number);
    items[1] = netchan_bytes(big, kind % 8 == 2 ? arg * 8u : kind % 8 == 7 ? 16200 + arg : 16300 + arg * 14u);
    items[2] = kind % 8 >= 4 && kind % 8 <= 6 ? give(t, i, 0, arg) : netchan_nil();
    items[3] = kind % 8 == 5 ? give(t, i, 1, kind) : netchan_nil();
    e[0].key = "list";
    e[0].value = netchan_array(items, 1);
    e[1].key = "";
    e[1].value = netchan_f64s((const double *)(const void *)big, arg / 8);
    e[2].key = "text";
    e[2].value = netchan_str("text");
    switch (kind % 8) {
    case 0: case 1: return items[0];
    case 4: items[1] = netchan_map(e, 3); break;
    case 5: items[1] = netchan_float(0.5); break;
    default: break;
    }
    return netchan_array(items, 4);
}

/* --- tasks -------------------------------------------------------------------------------------------------------- */

static inline task *new_task(int timeout_ms) {
    for (size_t i = 0; i < TASKS; i++) {
        if (world.tasks[i]) continue;
        task *t = (task *)calloc(1, sizeof *t);
        CHECK(t);
        t->node = world.running;
        t->timeout_ms = timeout_ms;
        t->locks.items = t->room;
        t->op.id = ++netchan__op_count;
        t->op.waiters = t->waiters;
        return world.tasks[i] = t;
    }
    return NULL;
}

/* p NULL: the case of a nil channel. */
static inline void add_case(task *t, place *p, bool is_send, unsigned kind, unsigned arg) {
    size_t i = t->op.count++;
    t->cases[i] = netchan_case_recv(p ? p->ch : NULL, NULL);
    if (!p) return;
    t->held[i] = netchan_retain(p->ch);
    t->waiters[i].to = is_send ? p->to : 0;
    if (is_send) t->cases[i] = netchan_case_send(p->ch, make_value(t, i, kind, arg));
}

/* The call returns: its memory goes. */
static inline void free_task(task *t) {
    for (size_t i = 0; i < t->op.count; i++) {
        netchan__waiter *w = &t->waiters[i];
        CHECK(!w->queue && !w->match && !w->claim && !w->id && !w->peer);
        netchan_clear(&w->value);
        netchan_free(t->held[i]);
        for (int j = 0; j < 2; j++) netchan_free(t->gifts[i][j]);
    }
    for (size_t i = 0; i < TASKS; i++)
        if (world.tasks[i] == t) world.tasks[i] = NULL;
    free(t);
}

static inline void note_fate(uint64_t number, fate f) {
    if (number) world.fates[number] = f;
    if (world.knows && f == NEVER) CHECK(!world.taken[number]);
}

/* What the call returns is looked at. */
static inline void tell(task *t) {
    int index = t->op.index, result = t->op.result;
    CHECK(index >= -1 && index < (int)t->op.count);
    CHECK(index >= 0 || result == NETCHAN_ETIMEDOUT);
    for (int i = 0; i < (int)t->op.count; i++) {
        if (!t->cases[i].is_send) continue;
        bool sent = i == index && result == NETCHAN_OK, unknown = i == index && result == NETCHAN_EUNKNOWN;
        note_fate(t->numbers[i], sent ? SENT : unknown ? UNKNOWN : NEVER);
    }
    if (index < 0 || t->cases[index].is_send || result != NETCHAN_OK) return;
    netchan_value v = t->op.value;
    uint64_t number = number_of(&v);
    check_received(&v);
    if (world.knows && number) {
        CHECK(world.fates[number] != NEVER && world.fates[number] != NOT_SENT);
        CHECK(!world.taken[number] || t->op.redelivered);
        world.taken[number]++;
    }
    keep_ends(&v);
    netchan_clear(&v);
}

/* The threads of finished operations wake up. A receive is looked at before the send that it meets. */
static inline void reap_tasks(void) {
    for (int pass = 0; pass < 2; pass++)
        for (size_t i = 0; i < TASKS; i++) {
            task *t = world.tasks[i];
            if (!t || !netchan__is_finished(&t->op)) continue;
            bool takes = t->op.index >= 0 && !t->cases[t->op.index].is_send;
            if (!takes && pass == 0) continue;
            be(t->node);
            if (t->op.count > 1 || t->expired) {
                netchan__lock_all(&t->op, &t->locks);
                netchan__leave_queues(&t->op);
                netchan__unlock_all(&t->locks);
            }
            tell(t);
            free_task(t);
        }
}

/* As netchan__run() begins. */
static inline void launch(task *t) {
    netchan__op *op = &t->op;
    netchan__lock_all(op, &t->locks);
    netchan__begin(op);
    for (size_t i = 0; i < op->count && t->timeout_ms == 0 && op->net; i++) op->tries += t->waiters[i].match != NULL;
    if (t->timeout_ms == 0 && netchan__state(op) == NETCHAN__OPEN && !op->tries) netchan__expire(op);
    if (netchan__state(op) == NETCHAN__DONE) netchan__leave_queues(op);
    netchan__unlock_all(&t->locks);
}

/* As netchan__operate() begins. */
static inline void run_task(task *t) {
    int result = NETCHAN_OK;
    for (size_t i = 0; i < t->op.count && result == NETCHAN_OK; i++) {
        netchan__waiter *w = &t->waiters[i];
        w->op = &t->op;
        w->op_id = t->op.id;
        w->index = i;
        w->multi = t->op.count > 1;
        w->firm = t->op.count == 1 && t->timeout_ms < 0;
        w->is_try = t->timeout_ms == 0;
        result = netchan__prepare(w, &t->cases[i]);
    }
    for (size_t i = 0; i < t->op.count; i++)
        if (t->numbers[i]) world.fates[t->numbers[i]] = result == NETCHAN_OK ? PENDING : NEVER;
    if (result == NETCHAN_OK) launch(t);
    else free_task(t);
}

static inline void expire_task(task *t) {
    be(t->node);
    t->expired = true;
    netchan__lock_all(&t->op, &t->locks);
    if (!netchan__is_finished(&t->op)) netchan__expire(&t->op);
    netchan__unlock_all(&t->locks);
}

/* --- ports -------------------------------------------------------------------------------------------------------- */

/* As netchan_listen() and netchan_dial(). */
static inline port *open_port(size_t which, const netchan_options *o, bool dials) {
    port *p = &world.ports[which];
    memset(p, 0, sizeof *p);
    p->node = world.running;
    p->open = true;
    p->hub.link.address = "here";
    CHECK(netchan__hub_make(&p->hub, o, dials) == NETCHAN_OK);
    add_place(p->hub.link.send, true);
    add_place(p->hub.link.recv, true);
    return p;
}

static inline void forget_wanted(struct wanted *w) {
    if (!w->port) return;
    netchan__hub *h = &w->port->hub;
    be(w->port->node);
    lock();
    netchan__end_wanted(h, &w->wanted);
    unlock();
    netchan *end = w->wanted.end;
    if (end && (is_known(end) || !add_place(end, false))) netchan_free(end);
    w->port = NULL;
}

/* As netchan_import() begins. */
static inline void want(port *p, unsigned name, bool receives, bool is_try) {
    struct wanted *w = world.wanted;
    while (w < world.wanted + WANTED && w->port) w++;
    if (w == world.wanted + WANTED) return;
    memset(w, 0, sizeof *w);
    w->port = p;
    w->wanted.text = names[name % NAMES];
    w->wanted.receives = receives;
    w->wanted.is_try = is_try;
    w->wanted.result = NETCHAN_ETIMEDOUT;
    w->wanted.number = ++p->hub.last_wanted;
    lock();
    w->wanted.next = p->hub.wanted;
    p->hub.wanted = &w->wanted;
    for (netchan__session *s = p->hub.sessions; s; s = s->next)
        if (!(is_try && s->peer.down) && !s->peer.leaving) netchan__ask(s, &w->wanted);
    unlock();
}

static inline void end_imports(bool all) {
    for (size_t i = 0; i < WANTED; i++)
        if (all || world.wanted[i].wanted.over) forget_wanted(&world.wanted[i]);
}

/* Somebody takes a peer from link->accept. */
static inline void accept_peer(port *p) {
    netchan_value v;
    if (!p->hub.link.accept || !has_places(2)) return;
    if (netchan_recv(p->hub.link.accept, &v, NETCHAN_NOWAIT) != NETCHAN_OK) return;
    netchan *send = netchan_as_chan(netchan_get(&v, "send")), *recv = netchan_as_chan(netchan_get(&v, "recv"));
    CHECK(send && recv);
    add_place(netchan_retain(send), true);
    add_place(netchan_retain(recv), true);
    netchan_clear(&v);
}

static inline void read_events(port *p) {
    netchan_value v;
    while (netchan_recv(p->hub.link.events, &v, NETCHAN_NOWAIT) == NETCHAN_OK) {
        check_received(&v);
        netchan_clear(&v);
    }
}

/* --- what a step may do at the node that runs --------------------------------------------------------------------- */

static inline int draw_timeout(unsigned arg) {
    return arg % 4 == 0 ? NETCHAN_NOWAIT : arg % 4 == 1 ? 1000 : NETCHAN_FOREVER;
}

static inline void begin_one(input *in, bool is_send) {
    place *p = find_place(next_byte(in));
    task *t = p ? new_task(draw_timeout(next_byte(in))) : NULL;
    if (!t) return;
    unsigned kind = next_byte(in), arg = next_byte(in);
    add_case(t, p, is_send, kind, arg);
    run_task(t);
}

static inline void begin_select(input *in) {
    unsigned how = next_byte(in);
    task *t = new_task(draw_timeout(how));
    if (!t) return;
    for (size_t i = 0; i < 2 + how / 4 % 2; i++) {
        unsigned which = next_byte(in), kind = next_byte(in), arg = next_byte(in);
        place *p = which == 255 ? NULL : find_place(which);
        if (p && p->to) p = NULL;
        add_case(t, p, p && p->ch->may_send && (!p->ch->may_receive || kind >= 128), kind, arg);
    }
    run_task(t);
}

static inline void make_channel(size_t capacity) {
    netchan *ch = netchan_make(capacity);
    place *p = ch ? add_place(ch, false) : NULL;
    if (p) p->local = true;
    else netchan_free(ch);
}

/* A buffer may hold the channel itself, which nobody would free: that one is emptied at the end. */
static inline void drop_place(place *p) {
    if (!p || p->keep) return;
    netchan *ch = p->ch;
    p->ch = NULL;
    if (!p->to) netchan_free(ch);
}

static inline void add_direct(port *p) {
    if (!p->hub.sessions) return;
    place *at = add_place(p->hub.link.send, false);
    if (!at) return;
    at->to = p->hub.sessions->peer.number;
    at->direct = p;
}

static inline void name_place(port *p, unsigned name, place *at) {
    if (!at || at->to || at->ch == p->hub.link.send || at->ch == p->hub.link.recv) return;
    bool receives = at->ch->may_receive && (!at->ch->may_send || name >= 128);
    netchan_export(&p->hub.link, names[name % NAMES], at->ch, receives ? NETCHAN_RECEIVER : NETCHAN_SENDER);
    if (at->local && at->ch->lane.cap) at->keep = true;
}

static inline void hang_up(port *p) {
    end_imports(true);
    be(p->node);
    lock();
    p->hub.hanging_up = true;
    if (p->hub.dials) netchan__shut_link(&p->hub);
    unlock();
}

static inline void ask_about(port *p, place *at) {
    netchan_stats stats;
    CHECK(netchan_get_stats(&p->hub.link, &stats) == NETCHAN_OK);
    if (at) CHECK(netchan_len(at->ch) <= SIZE_MAX / 2 && netchan_cap(at->ch) <= SIZE_MAX / 2);
    read_events(p);
}

/* p: a port of the node that runs. */
static inline void act(port *p, unsigned what, input *in) {
    task *t;
    switch (what % 16) {
    case 0: case 1: begin_one(in, true); break;
    case 2: case 3: begin_one(in, false); break;
    case 4: case 5: begin_select(in); break;
    case 6: make_channel(next_byte(in) % 4); break;
    case 7:
        t = world.tasks[next_byte(in) % TASKS];
        if (t && t->timeout_ms > 0) expire_task(t); /* what has no end is firm */
        break;
    case 8: {
        place *at = find_place(next_byte(in));
        if (at && !at->to) netchan_close(at->ch);
        break;
    }
    case 9: drop_place(find_place(next_byte(in))); break;
    case 10: {
        unsigned name = next_byte(in);
        name_place(p, name, find_place(next_byte(in)));
        break;
    }
    case 11: netchan_unexport(&p->hub.link, names[next_byte(in) % NAMES]); break;
    case 12: {
        unsigned name = next_byte(in), how = next_byte(in);
        if (how == 255) end_imports(true);
        else want(p, name, how & 1, how & 2);
        break;
    }
    case 13: accept_peer(p); break;
    case 14: add_direct(p); break;
    case 15: {
        unsigned how = next_byte(in);
        if (how >= 240) hang_up(p);
        else ask_about(p, find_place(next_byte(in)));
        break;
    }
    }
}

/* --- invariants --------------------------------------------------------------------------------------------------- */

static inline void check_lane(const netchan__lane *lane) {
    CHECK(netchan__held(lane) + lane->out + lane->reserved + lane->lent <= lane->cap);
    CHECK(lane->pinned <= lane->out && lane->out <= lane->matching && lane->reserved <= lane->matching);
    CHECK(lane->closing || lane->is_direct ||
          lane->is_ready == (lane->cap ? netchan__held(lane) > 0 && !lane->pinned : lane->senders.head != NULL));
}

static inline void check_sessions(const netchan__hub *h) {
    size_t sessions = 0;
    for (const netchan__session *s = h->sessions; s; s = s->next, sessions++) {
        CHECK(s->peer.waiters.count <= s->peer.max_ops && s->peer.imports.count <= 2 * s->peer.max_ends + 2);
        for (size_t i = 0; i < s->peer.exports.cap; i++) {
            const netchan__export *x = (const netchan__export *)netchan__map_at(&s->peer.exports, i);
            CHECK(!x || (x->peer == &s->peer && x->named < UINT32_MAX));
        }
        CHECK(!s->wire || s->wire->session == s);
    }
    CHECK(sessions == h->peers);
}

/* Nothing waits that could be done (I2), and what is counted is there. */
static inline void check_nodes(void) {
    for (size_t i = 0; i < NODES; i++) {
        be(i);
        CHECK(!netchan__net.released && !netchan__net.declined && !netchan__net.dirty && !netchan__net.changed);
        CHECK(!netchan__net.urgent && !netchan__dead);
    }
    for (size_t i = 0; i < PLACES; i++) {
        const place *p = &world.places[i];
        for (netchan__lane *lane = p->ch && !p->ch->is_end ? p->ch->lanes : NULL; lane; lane = lane->next)
            check_lane(lane);
    }
    for (size_t i = 0; i < PORTS; i++)
        if (world.ports[i].open) check_sessions(&world.ports[i].hub);
}

/* --- connections -------------------------------------------------------------------------------------------------- */

static inline size_t pipe_size(const pipeline *p) {
    return p->end - p->start;
}

static inline void put_bytes(pipeline *p, const void *data, size_t size) {
    if (p->end + size > p->room) {
        p->room = 2 * (p->end + size);
        p->data = (uint8_t *)realloc(p->data, p->room);
        CHECK(p->data);
    }
    if (size) memcpy(p->data + p->end, data, size);
    p->end += size;
}

static inline void drop_bytes(pipeline *p) {
    free(p->data);
    memset(p, 0, sizeof *p);
}

/* Bytes can go, and no greeting was said yet. A port may be NULL. */
static inline conn *open_conn(port *a, port *b) {
    conn *c = world.conns;
    while (c < world.conns + CONNS && (c->open[0] || c->open[1])) c++;
    if (c == world.conns + CONNS) return NULL;
    memset(c, 0, sizeof *c);
    c->port[0] = a;
    c->port[1] = b;
    for (int i = 0; i < 2; i++) {
        netchan__wire *w = &c->wire[i];
        w->owner = c;
        memset(w->binding, 3, sizeof w->binding);
        memset(w->identity, 5 + i, sizeof w->identity);
        for (size_t j = 0; j < sizeof w->fresh; j++) w->fresh[j] = (uint8_t)fuzz_random();
        snprintf(w->address, sizeof w->address, "there");
        c->open[i] = c->port[i] != NULL;
        if (!c->open[i]) continue;
        be(c->port[i]->node);
        lock();
        netchan__wire_start(w, &c->port[i]->hub, world.now);
        unlock();
    }
    return c;
}

static inline void close_end(conn *c, int who, const char *reason) {
    char text[200];
    if (!c->open[who]) return;
    snprintf(text, sizeof text, "%s", reason);
    c->open[who] = false;
    drop_bytes(&c->to[who]);
    be(c->port[who]->node);
    lock();
    netchan__wire_down(&c->wire[who], world.now, text);
    unlock();
}

/* Both sides find that it is gone. */
static inline void cut_conn(conn *c) {
    close_end(c, 0, "cut");
    close_end(c, 1, "cut");
    drop_bytes(&c->to[0]);
    drop_bytes(&c->to[1]);
}

/* At most one record goes from an end. Returns its size. */
static inline size_t ship(conn *c, int who) {
    static uint8_t record[NETCHAN__FRAME_MAX];
    if (!c->open[who]) return 0;
    be(c->port[who]->node);
    lock();
    size_t size = netchan__wire_output(&c->wire[who], record, NULL);
    unlock();
    CHECK(size <= NETCHAN__FRAME_MAX);
    if (c->open[!who] || !c->port[!who]) put_bytes(&c->to[!who], record, size);
    return size;
}

/* Why no more is read at this end, as section [17] would not, or NULL. */
static inline bool is_deaf(const conn *c, int who) {
    return !c->open[who] || c->wire[who].paused || netchan__wire_over(&c->wire[who]);
}

/* So many bytes arrive, in a block of exactly their size, so that AddressSanitizer sees a step beyond it. */
static inline size_t arrive(conn *c, int who, size_t max) {
    pipeline *p = &c->to[who];
    size_t size = pipe_size(p) < max ? pipe_size(p) : max;
    if (size > NETCHAN__FRAME_MAX) size = NETCHAN__FRAME_MAX;
    if (!size || is_deaf(c, who)) return 0;
    uint8_t *copy = (uint8_t *)malloc(size);
    CHECK(copy);
    memcpy(copy, p->data + p->start, size);
    p->start += size;
    if (p->start == p->end) drop_bytes(p);
    be(c->port[who]->node);
    lock();
    netchan__wire_input(&c->wire[who], world.now, copy, size);
    unlock();
    free(copy);
    return size;
}

/* An end that has failed is closed, when its last words have left; the other end finds that when it has read all. */
static inline bool close_failed(void) {
    bool any = false;
    for (conn *c = world.conns; c < world.conns + CONNS; c++)
        for (int who = 0; who < 2; who++) {
            netchan__wire *w = &c->wire[who];
            bool fails = w->failure && (!w->flush || netchan__wire_idle(w));
            bool ends = c->port[!who] && !c->open[!who] && !c->cut && !pipe_size(&c->to[who]);
            if (!c->open[who] || (!fails && !ends)) continue;
            close_end(c, who, fails ? w->failure : "it closed the connection");
            any = true;
        }
    return any;
}

/* A session ends only when it may: it was in breach, its link is down, or a farewell was said. */
static inline void tick_port(port *p) {
    size_t stays = 0;
    be(p->node);
    lock();
    for (const netchan__session *s = p->hub.sessions; s; s = s->next)
        stays += s->wire && !s->peer.breach && !s->bye_received;
    netchan__hub_tick(&p->hub, world.now);
    if (p->hub.hanging_up) netchan__drained(&p->hub);
    size_t left = p->hub.peers;
    unlock();
    CHECK(left >= stays || fuzz_failed); /* one that ends may need memory at another */
}

static inline void tick_ports(void) {
    for (size_t i = 0; i < PORTS; i++)
        if (world.ports[i].open) tick_port(&world.ports[i]);
}

/* Time passes at all nodes. */
static inline void pass_time(uint64_t ms) {
    world.now += ms * MS;
    for (conn *c = world.conns; c < world.conns + CONNS; c++)
        for (int who = 0; who < 2; who++) {
            netchan__wire *w = &c->wire[who];
            if (!c->open[who] || !w->up || w->failure) continue;
            be(c->port[who]->node);
            lock();
            netchan__wire_tick(w, world.now);
            unlock();
        }
    for (size_t i = 0; i < NODES; i++) {
        be(i);
        lock();
        netchan__check_claims(world.now);
        unlock();
    }
    tick_ports();
}

/* --- frames that the fuzzer writes -------------------------------------------------------------------------------- */

typedef struct text {
    uint8_t data[NETCHAN__FRAME_MAX + 200];
    size_t size;
} text;

static inline void add_byte(text *t, unsigned byte) {
    t->data[t->size++] = (uint8_t)byte;
}

static inline void add_number(text *t, uint64_t n) {
    t->size = (size_t)(netchan__varint_put(t->data + t->size, n) - t->data);
}

static inline void add_bytes(text *t, const void *data, size_t size) {
    memcpy(t->data + t->size, data, size);
    t->size += size;
}

static inline void add_rest(text *t, input *in) {
    add_bytes(t, in->at, (size_t)(in->end - in->at));
    in->at = in->end;
}

/* Mostly a small number; or one of those that the node that runs has just given to a waiter or a match; or a large
 * one. */
static inline uint64_t next_number(input *in) {
    static const uint64_t large[] = {16256, 16384, BIG, 1 << 20, UINT32_MAX, INT64_MAX, UINT64_MAX - 1, UINT64_MAX};
    unsigned b = next_byte(in);
    if (b >= 0xf8) return large[b - 0xf8];
    return b >= 0xf0 ? netchan__net.last_id - (b - 0xf0) : b >= 0xe0 ? b : b % 16;
}

static inline void add_end(text *t, input *in) {
    unsigned flags = next_byte(in);
    add_byte(t, flags);
    for (int i = 0; i < 2; i++) {
        netchan__store(t->data + t->size, next_number(in), 8);
        t->size += 8;
    }
}

/* The payload of an array of which `count` values, each one byte, are meant to be there. */
static inline void add_array(text *t, uint64_t count, size_t size, unsigned byte) {
    add_byte(t, 0x88);
    add_number(t, netchan__varint_size(count) + size);
    add_number(t, count);
    memset(t->data + t->size, (int)byte, size);
    t->size += size;
}

static inline void add_deep(text *t, unsigned depth) {
    for (unsigned left = depth; left > 0; left--) {
        add_byte(t, 0x88);
        add_number(t, left == 1 ? 1 : 3 * (left - 1) + (left - 1 > 41 ? 2 * (left - 1 - 41) : 0) + 1);
        add_number(t, left > 1);
    }
}

/* An encoded value, or none, or nearly one. */
static inline void add_value(text *t, input *in) {
    unsigned kind = next_byte(in);
    switch (kind % 16) {
    case 0: break;
    case 1: case 2: add_byte(t, next_byte(in)); break;
    case 3: case 4:
        add_byte(t, 0x8a);
        add_byte(t, 17);
        add_end(t, in);
        break;
    case 5:
        add_byte(t, 0x88);
        add_number(t, 1 + 2 * 19);
        add_byte(t, 2);
        for (int i = 0; i < 2; i++) {
            add_byte(t, 0x8a);
            add_byte(t, 17);
            add_end(t, in);
        }
        break;
    case 6: case 7: {
        size_t size = kind % 16 == 6 ? next_byte(in) * 16u : 16240u + next_byte(in) % 20;
        add_byte(t, kind & 0x80 ? 0x86 : 0x87);
        add_number(t, size);
        add_bytes(t, big, size);
        break;
    }
    case 8: {
        size_t count = next_byte(in) * 16u;
        add_array(t, count + kind / 128, count, 0x80);
        break;
    }
    case 9: add_deep(t, next_byte(in) % 80); break;
    case 10:
        add_byte(t, 0x89); /* {"k": byte} */
        add_bytes(t, "\4\1\1k", 4);
        add_byte(t, next_byte(in));
        break;
    case 11:
        add_byte(t, 0x8b + kind / 16 % 5);
        add_number(t, 16);
        add_bytes(t, big, 16);
        break;
    default: add_rest(t, in); break;
    }
}

/* Bytes at the end of a frame: a name, an end, a part of the big value. */
static inline void add_tail(text *t, input *in) {
    unsigned kind = next_byte(in);
    size_t left = BIG - world.cursor, size = 0;
    switch (kind % 8) {
    case 0: size = NETCHAN__FRAGMENT; break;
    case 1: size = 1 + next_byte(in) * 64u; break;
    case 2: case 3: add_bytes(t, names[kind / 8 % NAMES], strlen(names[kind / 8 % NAMES])); break;
    case 4: add_end(t, in); break;
    case 5: add_value(t, in); break;
    case 6: add_rest(t, in); break;
    case 7: break;
    }
    if (size > left) size = left;
    if (size > NETCHAN__FRAGMENT) size = NETCHAN__FRAGMENT;
    add_bytes(t, big + world.cursor, size);
    world.cursor = (world.cursor + size) % BIG;
}

/* The fields of a frame, see netchan__frame_fields(). A size of 0 stands for the right one, and small flags of an OFFER
 * or DEMAND for those that say truly whether a value follows. */
static inline void add_fields(text *t, const char *fields, input *in) {
    uint64_t flags = 0, numbers[8] = {0};
    static text value;
    value.size = 0;
    for (size_t i = 0; fields[i]; i++) {
        if (fields[i] == 'v') add_value(&value, in);
        else if (fields[i] == 'b') add_tail(&value, in);
        else if (fields[i] != 'p' || flags & NETCHAN__RELAYED) numbers[i] = next_number(in);
        if (fields[i] == 'f') flags = numbers[i];
        if (fields[i] == 'e') numbers[i] += world.repeated;
    }
    const char *f = strstr(fields, "of");
    if (f && flags < 32) {
        uint64_t *to = &numbers[f + 1 - fields];
        *to = (flags & ~(uint64_t)NETCHAN__HERE) | netchan__flag(value.size, NETCHAN__HERE);
    }
    for (size_t i = 0; fields[i]; i++) {
        if (fields[i] == 'v' || fields[i] == 'b') add_bytes(t, value.data, value.size);
        else if (fields[i] == 's' && !numbers[i] && strchr(fields, 'v')) add_number(t, value.size ? value.size : 2);
        else if (fields[i] != 'p') add_number(t, numbers[i]);
        else if (flags & NETCHAN__RELAYED)
            for (int j = 0; j < 16; j++) add_byte(t, (unsigned)numbers[i]);
    }
}

/* A frame of any type that is numbered, with its length. */
static inline void add_frame(text *t, input *in) {
    static const uint8_t types[] = {0x02, 0x03, 0x04, 0x05, 0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19,
        0x1a, 0x1b, 0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27, 0x28, 0x29, 0x2a, 0x2b};
    unsigned b = next_byte(in), type = b < 0xf0 ? types[b % sizeof types] : next_byte(in);
    const char *fields = netchan__frame_fields(type);
    static text body;
    body.size = 0;
    add_byte(&body, type);
    if (fields) add_fields(&body, fields, in);
    else if (type == NETCHAN__PING || type == NETCHAN__PONG || type == NETCHAN__ACK) add_number(&body, next_number(in));
    else add_rest(&body, in);
    if (body.size > NETCHAN__FRAME_MAX - 3) body.size = NETCHAN__FRAME_MAX - 3;
    add_number(t, body.size);
    add_bytes(t, body.data, body.size);
}

/* --- the end ------------------------------------------------------------------------------------------------------ */

/* As netchan_hangup() ends. */
static inline void stop_ports(void) {
    for (size_t i = 0; i < PORTS; i++) {
        port *p = &world.ports[i];
        if (!p->open) continue;
        be(p->node);
        lock();
        p->hub.hanging_up = true;
        if (!p->hub.shut) netchan__shut_link(&p->hub);
        netchan__hub_stop(&p->hub);
        unlock();
    }
    for (conn *c = world.conns; c < world.conns + CONNS; c++) cut_conn(c);
    for (size_t i = 0; i < PORTS; i++) {
        port *p = &world.ports[i];
        if (!p->open) continue;
        be(p->node);
        lock();
        netchan__hub_stop(&p->hub);
        netchan__settle();
        netchan__hub_close(&p->hub);
        unlock();
        read_events(p);
    }
}

static inline void close_places(void) {
    for (size_t i = 0; i < PLACES; i++) {
        place *p = &world.places[i];
        if (!p->ch || p->to) continue;
        be(p->node);
        netchan_close(p->ch);
    }
    for (size_t i = 0; i < TASKS; i++)
        if (world.tasks[i]) expire_task(world.tasks[i]);
    reap_tasks();
    for (size_t i = 0; i < TASKS; i++) CHECK(!world.tasks[i]);
}

static inline void free_places(void) {
    for (size_t i = 0; i < PLACES; i++) { /* what lies in them may hold others */
        place *p = &world.places[i];
        if (!p->ch || p->to || !p->ch->may_receive || p->ch->is_end) continue;
        be(p->node);
        netchan_value v;
        while (netchan_recv(p->ch, &v, NETCHAN_NOWAIT) == NETCHAN_OK) netchan_clear(&v);
    }
    for (size_t i = 0; i < PLACES; i++) {
        place *p = &world.places[i];
        if (!p->ch || p->to) continue;
        be(p->node);
        netchan_free(p->ch);
    }
    memset(world.places, 0, sizeof world.places);
}

static inline void free_port(port *p) {
    for (size_t i = 0; i < PLACES; i++)
        if (world.places[i].ch == p->hub.link.send || world.places[i].ch == p->hub.link.recv) world.places[i].ch = NULL;
    be(p->node);
    netchan__hub_free(&p->hub);
}

/* Everybody hangs up; then nothing must be left. */
static inline void free_world(void) {
    fuzz_fail_in = 0;
    end_imports(true);
    stop_ports();
    reap_tasks();
    close_places();
    for (size_t i = 0; i < PORTS; i++)
        if (world.ports[i].open) free_port(&world.ports[i]);
    free_places();
    for (size_t i = 0; i < NODES; i++) {
        be(i);
        CHECK(!netchan__net.waiters.count && !netchan__net.matches.count && !netchan__net.relays.count);
        CHECK(!netchan__net.by_number.count && !netchan__net.peers && !netchan__net.pending && !netchan__dead);
        netchan__map_free(&netchan__net.waiters);
        netchan__map_free(&netchan__net.matches);
        netchan__map_free(&netchan__net.relays);
        netchan__map_free(&netchan__net.by_number);
        CHECK(world.nodes[i].memory.blocks == 0 && world.nodes[i].memory.bytes == 0);
    }
}

/* --- mutations ---------------------------------------------------------------------------------------------------- */

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);
size_t LLVMFuzzerCustomCrossOver(const uint8_t *a, size_t a_size, const uint8_t *b, size_t b_size, uint8_t *out,
                                 size_t max_size, unsigned seed);

/* Makes room for a step at `at`, which must not be beyond the end. */
static inline size_t insert_step(uint8_t *data, size_t size, size_t at, const uint8_t *step) {
    memmove(data + at + STEP, data + at, size - at);
    memcpy(data + at, step, STEP);
    return size + STEP;
}

/* Whole steps come, go, and change places; or the bytes of one are changed. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    uint64_t before = fuzz_random_state;
    uint8_t step[STEP];
    fuzz_random_state = seed;
    if (max_size > MOST) max_size = MOST;
    if (size > max_size) size = max_size;
    unsigned how = (unsigned)(fuzz_random() % 16);
    size_t steps = size / STEP, count = steps ? steps : 1;
    size_t a = fuzz_random() % count * STEP, b = fuzz_random() % count * STEP;
    bool room = steps && size + STEP <= max_size;
    if (how < 7 && steps) LLVMFuzzerMutate(data + a, STEP, STEP);
    else if (how < 9 && steps) data[a + fuzz_random() % 8] = (uint8_t)(fuzz_random() % (how == 8 ? 8 : 256));
    else if (how < 11 && room) {
        for (size_t i = 0; i < STEP; i++) step[i] = (uint8_t)(fuzz_random() >> fuzz_random() % 8);
        size = insert_step(data, size, a, step);
    } else if (how < 13 && room) {
        memcpy(step, data + a, STEP);
        size = insert_step(data, size, b, step);
    } else if (how == 13 && steps > 2) {
        memmove(data + a, data + a + STEP, size - a - STEP);
        size -= STEP;
    } else if (how == 14 && steps) {
        memcpy(step, data + a, STEP);
        memmove(data + a, data + b, STEP);
        memcpy(data + b, step, STEP);
    } else size = LLVMFuzzerMutate(data, size, max_size);
    fuzz_random_state = before;
    return size;
}

/* The first steps of one, the last of another. */
size_t LLVMFuzzerCustomCrossOver(const uint8_t *a, size_t a_size, const uint8_t *b, size_t b_size, uint8_t *out,
                                 size_t max_size, unsigned seed) {
    size_t first = a_size / STEP ? seed % (a_size / STEP + 1) * STEP : 0;
    size_t from = b_size / STEP ? seed / 7 % (b_size / STEP) * STEP : 0, rest = b_size - from;
    if (max_size > MOST) max_size = MOST;
    if (first > max_size) first = max_size;
    if (rest > max_size - first) rest = max_size - first;
    memcpy(out, a, first);
    memcpy(out + first, b + from, rest);
    return first + rest;
}

FUZZ_PLAIN_END

#endif
