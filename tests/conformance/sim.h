/* A simulated network: links whose connections are pipes of memory. One thread moves the bytes as section [17] of
 * netchan.h does it for sockets, on a clock of its own, and a generator that starts from a seed decides what breaks: it
 * delivers in pieces, stands still, cuts at any byte, now and then without a word, and dials again. Operations are
 * those of real threads, which play by the real clock. Part of harness.h. */
#ifndef NETCHAN_CONFORMANCE_SIM_H
#define NETCHAN_CONFORMANCE_SIM_H

typedef struct sim_end {
    netchan__wire wire;
    bool open, eof;      /* eof: when what is on its way has arrived, the connection is over */
    uint64_t still;      /* nothing arrives before; nanoseconds */
    uint64_t deadline;   /* of the greeting */
    uint8_t *data;       /* on its way to this end */
    size_t begin, end, room;
} sim_end;

typedef struct sim_conn {
    sim_end ends[2];
    long budget; /* bytes that arrive before it is cut; negative: no end */
} sim_conn;

/* A link, both sides of it; of any kind. */
typedef struct bond {
    netchan_link *side[2];
    proxy proxy; /* cut */
    netchan__endpoint *endpoint[2]; /* sim: what is a link there, though no socket belongs to it; all else is net */
    sim_conn conns[4];
    uint64_t next_dial;
} bond;

enum { BONDS = 8 };
static bond bonds[BONDS];
static size_t bond_count;

/* The simulated network, one for all its links. Net. */
static struct sim {
    uint64_t now, next_tick; /* nanoseconds */
    uint64_t seed;
    unsigned cuts;
    bool quiet; /* nothing breaks any more */
} sim;

static uint64_t below(uint64_t n) {
    return test_random(&sim.seed) % n;
}

/* --- connections -------------------------------------------------------------------------------------------------- */

static void sim_close(bond *b, sim_conn *c, int side, const char *reason) {
    sim_end *x = &c->ends[side];
    bool moved = x->wire.moved;
    if (!x->open) return;
    netchan__wire_down(&x->wire, sim.now, reason);
    x->open = false;
    free(x->data);
    x->data = NULL;
    x->begin = x->end = x->room = 0;
    c->ends[!side].eof = true;
    if (side == DIALLER) b->next_dial = sim.now + (moved ? 0 : below(5000000));
}

/* Some of what is under way is lost, with all that would come after it; one side or both learn it, or only silence
 * tells. */
static void sim_cut(bond *b, sim_conn *c) {
    uint64_t kind = below(16);
    sim.cuts++;
    c->budget = -1;
    for (int side = 0; side < 2; side++) {
        sim_end *x = &c->ends[side];
        if (x->end > x->begin) x->end -= below(x->end - x->begin + 1);
        x->eof = kind > 0;
        if (!kind) x->still = UINT64_MAX;
        if (kind == (unsigned)side + 1) sim_close(b, c, side, "the connection broke");
    }
}

static void sim_dial(bond *b) {
    sim_conn *c = b->conns;
    while (c->ends[0].open || c->ends[1].open)
        if (++c == b->conns + 4) return; /* the other side has not noticed yet that older ones are gone */
    memset(c, 0, sizeof *c);
    c->budget = sim.quiet ? -1 : (long)(SIM_CUT_EVERY / 2 + below(SIM_CUT_EVERY));
    if (!sim.quiet && below(16) == 0) c->budget = (long)below(200); /* in the greeting */
    for (int i = 0; i < 32; i++) c->ends[0].wire.binding[i] = c->ends[1].wire.binding[i] = (uint8_t)below(256);
    for (int i = 0; i < 48; i++) c->ends[LISTENER].wire.fresh[i] = (uint8_t)below(256);
    for (int side = 1; side >= 0; side--) {
        sim_end *x = &c->ends[side];
        x->open = true;
        x->deadline = sim.now + 50000000;
        x->wire.owner = x;
        memset(x->wire.identity, 5 + side, sizeof x->wire.identity);
        snprintf(x->wire.address, sizeof x->wire.address, "nowhere");
        netchan__wire_start(&x->wire, &b->endpoint[side]->hub, sim.now);
    }
}

/* What one end has to say begins its way, as far as there is room. */
static bool sim_ship(sim_conn *c, int side) {
    static uint8_t record[NETCHAN__FRAME_MAX];
    sim_end *y = &c->ends[!side];
    bool any = false;
    while (y->end - y->begin < 4 * NETCHAN__FRAME_MAX) {
        size_t size = netchan__wire_output(&c->ends[side].wire, record, NULL);
        if (!size) break;
        any = true;
        if (!y->open || y->eof) continue;
        if (y->begin == y->end) y->begin = y->end = 0;
        if (y->end + size > y->room) y->data = (uint8_t *)realloc(y->data, y->room = 2 * (y->end + size));
        CHECK(y->data);
        memcpy(y->data + y->end, record, size);
        y->end += size;
    }
    return any;
}

/* A piece of what is on its way arrives. Returns false when there was none. */
static bool sim_deliver(bond *b, sim_conn *c, int side) {
    sim_end *x = &c->ends[side];
    size_t size = x->end - x->begin, most = NETCHAN__FRAME_MAX;
    if (!size || sim.now < x->still || x->wire.paused || netchan__wire_over(&x->wire)) return false;
    if (!sim.quiet && below(4) == 0) most = 1 + below(40);
    if (!sim.quiet && below(32) == 0) x->still = sim.now + below(3000000);
    if (size > most) size = most;
    bool cut = c->budget >= 0 && (size_t)c->budget <= size;
    if (cut) size = (size_t)c->budget;
    if (size) netchan__wire_input(&x->wire, sim.now, x->data + x->begin, size);
    x->begin += size;
    if (cut) sim_cut(b, c);
    else if (c->budget > 0) c->budget -= (long)size;
    return true;
}

/* As the I/O thread does when a connection is ready. Returns whether anything moved. */
static bool sim_serve(bond *b, sim_conn *c, int side) {
    sim_end *x = &c->ends[side];
    if (!x->open) return false;
    bool moved = sim_deliver(b, c, side);
    if (!x->open) return true;
    netchan__session *s = x->wire.session;
    if (s && s->peer.breach) netchan__end_session(s, s->peer.breach);
    else if (s) netchan__check_farewell(s);
    moved = sim_ship(c, side) || moved;
    const char *failure = x->wire.failure;
    bool ends = x->eof && x->begin == x->end && !x->wire.paused;
    if (failure && (!x->wire.flush || netchan__wire_idle(&x->wire))) sim_close(b, c, side, failure);
    else if (ends) sim_close(b, c, side, "it closed the connection");
    return moved || !x->open;
}

/* --- the thread --------------------------------------------------------------------------------------------------- */

/* As netchan__tick(). */
static void sim_tick(bond *b) {
    for (int side = 0; side < 2; side++) {
        netchan__endpoint *e = b->endpoint[side];
        bool open = false;
        if (!e) continue;
        if (e->stopping) netchan__hub_stop(&e->hub);
        netchan__hub_tick(&e->hub, sim.now);
        for (sim_conn *c = b->conns; c < b->conns + 4; c++) {
            sim_end *x = &c->ends[side];
            if (x->open && x->wire.up) netchan__wire_tick(&x->wire, sim.now);
            else if (x->open && (e->stopping || sim.now >= x->deadline)) sim_close(b, c, side, "it was not greeted");
            open = open || x->open;
        }
        e->gone = e->stopping && !open;
        if (e->gone) b->endpoint[side] = NULL;
        pthread_cond_broadcast(&e->changed);
    }
    if (!b->endpoint[DIALLER] || !b->endpoint[LISTENER] || sim.now < b->next_dial) return;
    for (sim_conn *c = b->conns; c < b->conns + 4; c++)
        if (c->ends[DIALLER].open && !c->ends[DIALLER].wire.up) return;
    if (netchan__hub_wants_wire(&b->endpoint[DIALLER]->hub)) sim_dial(b);
}

/* Everything that can be done now. Returns whether anything was. */
static bool sim_step(void) {
    bool moved = false;
    for (size_t i = 0; i < bond_count; i++) {
        bond *b = &bonds[i];
        if (sim.now >= sim.next_tick) sim_tick(b);
        for (int end = 0; end < 8; end++) moved = sim_serve(b, &b->conns[end / 2], end % 2) || moved;
    }
    if (sim.now >= sim.next_tick) {
        netchan__check_claims(sim.now);
        netchan__net.breached = false;
        sim.next_tick = sim.now + 1000000;
    }
    netchan__settle();
    for (netchan__session *s; (s = netchan__net.pending); moved = true) {
        netchan__net.pending = s->next_pending;
        s->is_pending = false;
    }
    return moved;
}

/* When nothing can be done, time flies: a millisecond is five. */
static void *sim_main(void *arg) {
    pthread_mutex_lock(&netchan__net_lock);
    while (!netchan__io.stop) {
        bool moved = sim_step();
        sim.now += moved ? 20000 + below(100000) : 5000000;
        netchan__net.polling = !moved;
        netchan__io_unlock();
        struct pollfd p = {netchan__io.wake_read, POLLIN, 0};
        char bytes[64];
        if (!moved && poll(&p, 1, 1) > 0) CHECK(read(netchan__io.wake_read, bytes, sizeof bytes) > 0);
        pthread_mutex_lock(&netchan__net_lock);
        netchan__net.polling = false;
    }
    netchan__io_unlock();
    return arg;
}

/* As netchan_listen() and netchan_dial(), but for the sockets, and with another thread. netchan_hangup() ends it. */
static void sim_open(bond *b, const netchan_options *o) {
    int fds[2];
    bool first = bond_count == 0;
    if (first) CHECK(pipe(fds) == 0);
    pthread_mutex_lock(&netchan__net_lock);
    for (int side = 0; side < 2; side++) {
        netchan__endpoint *e = b->endpoint[side] = (netchan__endpoint *)netchan__alloc(sizeof *e);
        CHECK(e);
        netchan__cond_init(&e->changed);
        CHECK_INT(netchan__hub_make(&e->hub, o, side == DIALLER), NETCHAN_OK);
        e->fd = -1;
        e->hub.link.address = "nowhere";
        b->side[side] = &e->hub.link;
        netchan__io.links++;
    }
    if (first) {
        sim.now = 1000000000;
        sim.seed = seed;
        netchan__io.wake_read = fds[0];
        netchan__net.wake_fd = fds[1];
        netchan__net.on_drained = netchan__lane_drained;
        memset(netchan__net.process, 7, sizeof netchan__net.process);
        netchan__io.thread = test_start(sim_main, NULL);
    }
    bond_count++;
    netchan__unlock_one(&netchan__net_lock);
}

/* The link breaks within the next bytes. */
static void sim_disturb(bond *b) {
    pthread_mutex_lock(&netchan__net_lock);
    for (int i = 0; i < 4; i++) b->conns[i].budget = (long)below(100);
    netchan__unlock_one(&netchan__net_lock);
}

/* Nothing breaks any more. */
static void sim_calm(void) {
    pthread_mutex_lock(&netchan__net_lock);
    sim.quiet = true;
    for (size_t i = 0; i < 4 * bond_count; i++) bonds[i / 4].conns[i % 4].budget = -1;
    netchan__unlock_one(&netchan__net_lock);
}

#endif
