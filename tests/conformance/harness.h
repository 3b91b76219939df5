/* The four ways in which each conformance test runs, and how a test gets its channels. Included once, by conformance.c.
 *
 *   local   the channels of this process
 *   TLS     each channel has its home on one side of a link over 127.0.0.1, and at least one of its two handles is an
 *           end that crossed the link
 *   cut     the same, through a proxy that cuts the connection every few milliseconds
 *   sim     the same, over pipes of memory with a clock of their own: a generator that starts from a seed delivers in
 *           pieces, stands still, cuts at any byte and dials again; the operations are those of real threads
 *
 * Both sides of a link are in this process; what crosses it goes through all that two processes would have between
 * them. */
#ifndef NETCHAN_CONFORMANCE_HARNESS_H
#define NETCHAN_CONFORMANCE_HARNESS_H

enum { LOCAL, TLS, CUT, SIM, MEDIA };
static const char *const media[MEDIA] = {"local", "TLS", "cut", "sim"};
static int medium;

static uint64_t seed = 1; /* CONFORMANCE_SEED */

enum { DIALLER, LISTENER };

enum {
    CUT_EVERY = 1600,   /* bytes that the proxy lets through, on an average */
    SIM_CUT_EVERY = 500 /* likewise, the simulated network */
};

/* --- a test ------------------------------------------------------------------------------------------------------- */

typedef struct conformance {
    const char *source; /* where the rule comes from; the last word is the test's name */
    void (*run)(void);
    int form; /* for tests with the same function; NEEDS_LINK: nothing of it is within one process */
    const char *checks, *note;
} conformance;

enum { NEEDS_LINK = -1 };

static const conformance *current;

static int form(void) {
    return current->form;
}

/* One of the numbers, by the way: so many times a test does what it does often. */
static int64_t pick(const int *sizes) {
    int n = sizes[medium] / LESS;
    return n ? n : 1;
}

/* --- links -------------------------------------------------------------------------------------------------------- */

#include "sim.h"

/* The i-th link of this test, made when it is asked for first. */
static bond *bond_at(size_t i) {
    bond *b = &bonds[i];
    netchan_options o = options();
    o.buffer = 4; /* what carries ends does not wait for a thread at the other side */
    o.linger_ms = 4000;
    if (medium == SIM) o.ping_ms = 40;
    if (b->side[0]) return b;
    CHECK(medium != LOCAL && i == bond_count);
    if (medium == SIM) {
        sim_open(b, &o);
        return b;
    }
    b->side[LISTENER] = listen_with(&o);
    if (medium == CUT) proxy_start(&b->proxy, b->side[LISTENER]->address);
    b->side[DIALLER] = dial_with(medium == CUT ? b->proxy.address : b->side[LISTENER]->address, &o);
    if (medium == CUT) b->proxy.seed = seed;
    if (medium == CUT) proxy_cut_every(&b->proxy, CUT_EVERY);
    bond_count++;
    return b;
}

/* The link breaks within the next bytes, if it is one that does. */
static void disturb(bond *b) {
    if (medium == CUT) proxy_cut_after(&b->proxy, 60);
    if (medium == SIM) sim_disturb(b);
}

static void bond_hang_up(bond *b, int side) {
    if (b->side[side]) hang_up(b->side[side]);
    b->side[side] = NULL;
}

/* However often the link broke: the session is what it was. */
static void bond_close(bond *b) {
    netchan_stats stats = {0};
    for (int side = 0; side < 2; side++) {
        if (b->side[side]) CHECK_INT(netchan_get_stats(b->side[side], &stats), NETCHAN_OK);
        CHECK_INT(stats.lost, 0);
    }
    if (medium == CUT && !proxy_cuts(&b->proxy)) proxy_cut(&b->proxy); /* so that there was one */
    if (medium == CUT) proxy_cut_every(&b->proxy, 0);
    bond_hang_up(b, DIALLER);
    if (b->side[LISTENER]) wait_for_no_peers(b->side[LISTENER]);
    if (medium == CUT) proxy_stop(&b->proxy);
    bond_hang_up(b, LISTENER);
}

/* Blocks of memory in use, but for those of news that nobody has read. */
static long blocks_in_use(void) {
    for (size_t i = 0; i < 2 * bond_count; i++)
        while (netchan_recv(bonds[i / 2].side[i % 2]->events, NULL, NETCHAN_NOWAIT) == NETCHAN_OK) continue;
    return alloc_blocks();
}

/* --- channels ----------------------------------------------------------------------------------------------------- */

/* One channel: where it lives, and the handles by which a test sends and receives. */
typedef struct wire {
    netchan *home, *tx, *rx;
} wire;

static pthread_mutex_t carry_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t draw;    /* under carry_lock: where chance is */
static wire wires[1200]; /* likewise: those that are to be freed */
static size_t wire_count;

/* Sends a value from one side of a link to the other. */
static netchan_value carry(bond *b, int from, netchan_value v) {
    netchan_value arrived;
    CHECK_INT(netchan_send(b->side[from]->send, v, LONG), NETCHAN_OK);
    CHECK_INT(netchan_recv(b->side[!from]->recv, &arrived, LONG), NETCHAN_OK);
    return arrived;
}

static netchan *kept(const netchan_value *v, const char *key, netchan *otherwise) {
    netchan *ch = netchan_as_chan(netchan_get(v, key));
    return netchan_retain(ch ? ch : otherwise);
}

enum { TX = 1, RX = 2 }; /* which handles are ends that crossed the link */

static wire wire_make_as(size_t capacity, int home, int remote) {
    netchan_entry entries[2] = {{"tx", netchan_nil()}, {"rx", netchan_nil()}};
    netchan_value v = netchan_nil();
    wire w;
    w.home = netchan_make(capacity);
    CHECK(w.home);
    if (medium == LOCAL) remote = 0;
    if (remote & TX) entries[0].value = netchan_sender(w.home);
    if (remote & RX) entries[1].value = netchan_receiver(w.home);
    if (remote) v = carry(bond_at(0), home, netchan_map(entries, 2));
    w.tx = kept(&v, "tx", w.home);
    w.rx = kept(&v, "rx", w.home);
    netchan_clear(&v);
    CHECK((w.tx != w.home) == !!(remote & TX) && (w.rx != w.home) == !!(remote & RX));
    CHECK_INT(netchan_cap(w.tx), capacity);
    CHECK_INT(netchan_cap(w.rx), capacity);
    CHECK(wire_count < sizeof wires / sizeof *wires);
    return wires[wire_count++] = w;
}

/* Makes a channel as chance will have it: over a network it lives on either side, and the sending handle, the receiving
 * one or both are ends on the other. */
static wire wire_make(size_t capacity) {
    pthread_mutex_lock(&carry_lock);
    uint64_t n = test_random(&draw);
    wire w = wire_make_as(capacity, (int)(n / 3 % 2), (int)(n % 3) + 1);
    pthread_mutex_unlock(&carry_lock);
    return w;
}

/* Frees the channels that were made since the last time. */
static void wires_free(void) {
    for (; wire_count; wire_count--) {
        wire *w = &wires[wire_count - 1];
        netchan_free(w->tx);
        netchan_free(w->rx);
        netchan_free(w->home);
    }
}

/* How often a test repeats itself to have seen every kind of wire. */
static int turns(void) {
    return medium == LOCAL ? 1 : 12;
}

/* Waits until so many operations wait on the channel, as its home knows it: nothing public tells. */
static void wait_until_waiting(netchan *home, size_t count) {
    for (long long end = test_ms() + LONG;; sched_yield()) {
        size_t found = 0;
        pthread_mutex_t *lock = netchan__lock_channel(home);
        for (netchan__waiter *w = home->receivers.head; w; w = w->next) found++;
        for (netchan__waiter *w = home->lane.senders.head; w; w = w->next) found++;
        netchan__unlock_one(lock);
        if (found == count) return;
        if (test_ms() >= end) test_fail(__FILE__, __LINE__, "%zu operations wait, not %zu", found, count);
    }
}

/* --- operations --------------------------------------------------------------------------------------------------- */

/* For ever, or so long that it makes no difference: the two take different ways over a link. */
static int patience(void) {
    static unsigned calls;
    return __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED) % 2 ? LONG : NETCHAN_FOREVER;
}

static void put(netchan *ch, int64_t n) {
    CHECK_INT(netchan_send(ch, netchan_int(n), patience()), NETCHAN_OK);
}

/* The next value. Returns false when the channel is closed and empty. */
static bool take_next(netchan *ch, int64_t *n) {
    netchan_value v;
    int result = netchan_recv(ch, &v, patience());
    if (result == NETCHAN_ECLOSED) return false;
    CHECK_INT(result, NETCHAN_OK);
    CHECK_INT(v.type, NETCHAN_INT);
    *n = netchan_as_int(&v, 0);
    return true;
}

static int64_t take(netchan *ch) {
    int64_t n = 0;
    CHECK(take_next(ch, &n));
    return n;
}

static void check_closed(netchan *ch) {
    CHECK_INT(netchan_recv(ch, NULL, patience()), NETCHAN_ECLOSED);
}

/* A select that ends with a case that happened. Returns its index. */
static int choose(netchan_case *cases, size_t count) {
    int i = netchan_select(cases, count, patience());
    CHECK(i >= 0 && i < (int)count);
    CHECK_INT(cases[i].result, NETCHAN_OK);
    return i;
}

/* A try that Go would answer with no: none of the cases can happen now. */
static void must_not(netchan_case *cases, size_t count) {
    CHECK_INT(netchan_select(cases, count, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
}

/* Tries until it happens: somebody is about to come. Returns the index of the case. */
static int eventually(netchan_case *cases, size_t count) {
    for (long long end = test_ms() + LONG;; sched_yield()) {
        int i = netchan_select(cases, count, NETCHAN_NOWAIT);
        if (i != NETCHAN_ETIMEDOUT) return i;
        CHECK(test_ms() < end);
    }
}

/* A try that Go would answer with yes. Over a network the other side may be down, or not know yet what this one knows:
 * then it is asked again. */
static int must(netchan_case *cases, size_t count) {
    return medium == LOCAL ? netchan_select(cases, count, NETCHAN_NOWAIT) : eventually(cases, count);
}

static void must_put(netchan *ch, int64_t n) {
    netchan_case c = netchan_case_send(ch, netchan_int(n));
    CHECK_INT(must(&c, 1), 0);
    CHECK_INT(c.result, NETCHAN_OK);
}

static int64_t must_take(netchan *ch) {
    netchan_value v;
    netchan_case c = netchan_case_recv(ch, &v);
    CHECK_INT(must(&c, 1), 0);
    CHECK_INT(c.result, NETCHAN_OK);
    return netchan_as_int(&v, -1);
}

/* What a thread is given, and what it leaves. */
typedef struct job {
    netchan *in, *out, *sync, *more[4];
    netchan_value value;
    int64_t n, first, result;
    int64_t done; /* atomic: how often it sent or received */
    bool closes;
    pthread_t thread;
} job;

static void go(job *j, void *(*run)(void *)) {
    j->thread = test_start(run, j);
}

static void finish(job *jobs, size_t count) {
    for (size_t i = 0; i < count; i++) test_join(jobs[i].thread);
}

static int64_t done_by(job *j) {
    return __atomic_load_n(&j->done, __ATOMIC_ACQUIRE);
}

/* In a thread: sends so many numbers from the first on, and may close the channel. */
static void *put_numbers(void *arg) {
    job *j = (job *)arg;
    for (int64_t i = 0; i < j->n; i++) {
        put(j->out, j->first + i);
        __atomic_add_fetch(&j->done, 1, __ATOMIC_RELEASE);
    }
    if (j->closes) CHECK_INT(netchan_close(j->out), NETCHAN_OK);
    return NULL;
}

/* Receives so many numbers; each when it is told to, if there is somebody who tells. The result is the last. */
static void *take_numbers(void *arg) {
    job *j = (job *)arg;
    for (int64_t i = 0; i < j->n; i++) {
        if (j->sync) take(j->sync);
        __atomic_add_fetch(&j->done, 1, __ATOMIC_RELEASE);
        j->result = take(j->in);
    }
    return NULL;
}

/* --- a run ------------------------------------------------------------------------------------------------------ */

/* In a process of its own. */
static void run_current(void) {
    draw = seed;
    for (const char *c = current->source; *c; c++) draw = draw * 31 + (unsigned char)*c;
    if (!draw) draw = 1;
    current->run();
    if (medium == SIM) sim_calm();
    for (size_t i = 0; i < bond_count; i++) bond_close(&bonds[i]);
    CHECK_INT(alloc_blocks(), 0);
}

#endif
