/* The commit protocol, sections [6] to [9] of netchan.h, under random schedules. One thread, no sockets, no TLS, no
 * clock: nodes live side by side in this process, a connection is two sessions and the bytes on their way between them,
 * and a generator that starts from a seed decides what happens next.
 *
 *     protocol [SEEDS] [SEED0]     runs seeds SEED0, SEED0 + 1, ...; what fails is told as `seed N: what`
 *     TRACE=1 protocol 1 N         replays seed N step by step
 *
 * Tasks take the place of threads: operations on the heap that are begun, expired and left exactly as netchan__run()
 * does it, but never waited for. */
#include "alloc.h"

#include <stdint.h>

static void broken(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
static uint64_t draw(void);

/* The order in which the cases of a select are tried comes from the seed, too: this renames the definition in netchan.h
 * and replaces the calls. */
#define netchan__random(parameters) RANDOM_##parameters
#define RANDOM_void random_by_clock(void)
#define RANDOM_ draw()

#define NETCHAN_ASSERT(x) ((x) ? (void)0 : broken("an assertion of netchan.h fails: %s", #x))
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"
#include "test.h"

#include <sys/mman.h>

enum {
    SEEDS = 60000,  /* by default */
    BLOCKS = 20,    /* tests, each in a process of its own */
    SEED_LIMIT = 60 /* seconds for one seed */
};

enum {
    MAX_NODES = 4,
    MAX_LINKS = 5,
    LOCALS = 2,                       /* channels of a node that lead nowhere */
    THREADS = 4,                      /* of a node; the last one only drains */
    MAX_THREADS = MAX_NODES * THREADS,
    MAX_CASES = 4,
    MAX_PLACES = MAX_NODES * (LOCALS + 2) + MAX_LINKS * 2,
    MAX_CONNS = 3 * MAX_LINKS,        /* also those that only one side has given up */
    MAX_PEERS = 1024,
    MAX_VALUES = 4096,
    MAX_MESSAGE = 110000              /* bytes */
};

typedef unsigned long long ull; /* for printf */

/* --- the world ---------------------------------------------------------------------------------------------------- */

typedef enum place_kind { LOCAL, WORK, MERGE, END_SEND, END_RECV } place_kind;
static const char *const kind_names[] = {"local", "work", "merge", "end_send", "end_recv"};

typedef struct place place;
typedef struct conn conn;

/* What netchan_dial() and a listener's acceptance make, seen from both sides. */
typedef struct wire {
    size_t dialler, home; /* nodes */
    place *send, *recv;   /* the dialler's ends */
    conn *conn;           /* the dialler's; NULL: it has none */
    uint64_t unknown;     /* values that the dialler's lost sessions counted */
    unsigned losses;
    size_t lanes;         /* lanes of this link at home */
} wire;

/* A channel, as one node knows it. */
struct place {
    netchan *ch;
    place_kind kind;
    size_t index, node, cap;
    wire *wire;       /* of an end */
    bool closed;      /* a task closed it */
    bool drained;     /* a receiver was told that all values are gone */
    size_t held;      /* sent with OK and not taken */
    unsigned losses;  /* of sessions that lead here */
    uint64_t unknown; /* WORK: values that lost sessions counted */
};

/* One of the two ends of a connection. */
typedef struct side {
    conn *conn;
    netchan__session *session; /* NULL: it has given the connection up */
    bool bound;                /* it was greeted */
    netchan__buf in;           /* bytes on their way to it */
} side;

struct conn {
    wire *wire;
    side sides[2]; /* dialler, home */
};

typedef enum fate { PENDING, SENT, NEVER, UNKNOWN } fate;

/* One value that a task tries to send. Its number is its index plus 1. */
typedef struct value {
    place *place;
    size_t thread;
    uint64_t op;
    fate fate;
    unsigned taken, again; /* again: of these, marked as redelivered */
    bool large, present;
    bool barred; /* the channel was closed before it could be sent */
} value;

typedef struct task {
    netchan__op op;
    netchan__waiter waiters[MAX_CASES];
    netchan_case cases[MAX_CASES];
    pthread_mutex_t *room[MAX_CASES];
    netchan__locks locks;
    place *places[MAX_CASES]; /* NULL: no channel */
    value *values[MAX_CASES];
    uint8_t *bytes[MAX_CASES];
    size_t thread;
    int timeout_ms;
    bool expired, told;
} task;

/* What may happen in this run, in percent where it is no number or bool. */
typedef struct plan {
    size_t nodes, links, threads, steps;
    size_t selects, finite, nowait, large, medium;
    size_t losses, closes, whole;
    bool no_redelivery, quiet_start, huge;
    size_t max_memory[MAX_NODES];
} plan;

static struct world {
    plan plan;
    uint8_t process[MAX_NODES][16];
    place places[MAX_PLACES];
    size_t place_count;
    place *work[MAX_NODES], *merge[MAX_NODES];
    wire wires[MAX_LINKS];
    conn conns[MAX_CONNS];
    task *tasks[MAX_THREADS];
    size_t value_count;
    struct {
        wire *wire;
        int which;
    } peers[MAX_PEERS];
    uint64_t last_peer;
    bool over; /* everybody hangs up */
    uint32_t last[MAX_PLACES][MAX_THREADS][MAX_THREADS];       /* the newest op of a thread whose value a thread took */
    uint32_t last_at[MAX_PLACES][MAX_THREADS][MAX_PLACES];     /* the same for a place; small values only */
} world;

static value values[MAX_VALUES];
static uint64_t seed, random_state;
static uint64_t *shared_seed; /* for the parent process, should this one die */
static bool tracing;

static void broken(const char *format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    printf("seed %llu: %s\n", (ull)seed, text);
    fflush(stdout);
    _exit(TEST_FAILED);
}

static void trace(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void trace(const char *format, ...) {
    va_list args;
    if (!tracing) return;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
    fflush(stdout);
}

static uint64_t draw(void) {
    return test_random(&random_state);
}

static size_t below(size_t n) {
    return (size_t)(draw() % n);
}

static bool chance(size_t percent) {
    return below(100) < percent;
}

static const char *describe(const place *p) {
    static char texts[4][48];
    static unsigned turn;
    char *text = texts[turn++ % 4];
    if (p->wire) snprintf(text, 48, "%s[%td] of node %zu", kind_names[p->kind], p->wire - world.wires, p->node);
    else snprintf(text, 48, "%s[%zu] of node %zu", kind_names[p->kind], p->index, p->node);
    return text;
}

/* From here on this process is that node. */
static void be(size_t node) {
    memcpy(netchan__net.process, world.process[node], sizeof netchan__net.process);
}

/* --- values ------------------------------------------------------------------------------------------------------- */

static uint64_t number_of(const value *v) {
    return (uint64_t)(v - values) + 1;
}

static size_t max_message(size_t node) {
    size_t half = world.plan.max_memory[node] / 2;
    return half < MAX_MESSAGE ? half : MAX_MESSAGE;
}

/* A size of bytes; sometimes such that the encoded value is just about one fragment. */
static size_t draw_size(bool large) {
    if (!large) return 9 + below(NETCHAN__FRAGMENT - 20);
    if (chance(20)) return NETCHAN__FRAGMENT - 8 + below(12);
    return world.plan.huge ? MAX_MESSAGE - 16 - below(60000) : 20000 + below(20000);
}

static netchan_value make_value(task *t, size_t i) {
    uint64_t number = number_of(t->values[i]);
    bool large = chance(world.plan.large);
    if (!large && !chance(world.plan.medium)) return netchan_uint(number);
    size_t size = draw_size(large);
    t->bytes[i] = (uint8_t *)malloc(size);
    CHECK(t->bytes[i] != NULL);
    memset(t->bytes[i], (int)(number & 0xff), size);
    netchan__store(t->bytes[i], number, 8);
    return netchan_bytes(t->bytes[i], size);
}

static value *identify(const netchan_value *v) {
    uint64_t number = netchan_as_uint(v, 0);
    size_t size = 0;
    const uint8_t *bytes = (const uint8_t *)netchan_as_block(v, NETCHAN_BYTES, &size);
    if (bytes && size >= 9) {
        number = netchan__load(bytes, 8);
        if (bytes[8] != (number & 0xff) || memcmp(bytes + 8, bytes + 9, size - 9) != 0)
            broken("a value of %zu bytes is damaged", size);
    }
    if (number < 1 || number > world.value_count) broken("a value that nobody sent, of type %d", v->type);
    return &values[number - 1];
}

static bool is_rendezvous(const value *v) {
    return v->place->cap == 0;
}

/* Can what is sent into `from` be received at `at`? */
static bool leads_to(const place *from, const place *at) {
    if (from->kind == LOCAL) return from == at;
    if (from->kind == WORK) return at->kind == END_RECV && at->wire->home == from->node;
    return at->kind == MERGE && at->node == from->wire->home;
}

typedef struct late_note {
    uint32_t *at, op;
} late_note;

static late_note late_notes[MAX_THREADS];
static size_t late_count;

static void check_order(const value *v, const task *t, const place *at) {
    if (v->place->losses) return;
    ull number = (ull)number_of(v);
    uint32_t op = (uint32_t)v->op, *last = &world.last[v->place->index][v->thread][t->thread];
    uint32_t *last_at = &world.last_at[v->place->index][v->thread][at->index];
    if (*last >= op) broken("value %llu of op %u was taken by the thread that took that of op %u", number, op, *last);
    *last = op;
    if (v->large) return;
    if (*last_at > op) broken("value %llu of op %u was taken after that of op %u", number, op, *last_at);
    late_notes[late_count].at = last_at;
    late_notes[late_count++].op = op; /* who takes in the same step takes at the same time */
}

static void check_taker(const value *v, const task *t, const place *at) {
    uint64_t peer = t->op.peer;
    if (at->kind == LOCAL ? peer != 0 : peer == 0 || peer > world.last_peer)
        broken("a value came from peer %llu", (ull)peer);
    if (at->kind == END_RECV && (world.peers[peer].wire != at->wire || world.peers[peer].which != 0))
        broken("a value came over another link");
    if (at->kind == MERGE && (world.peers[peer].wire != v->place->wire || world.peers[peer].which != 1))
        broken("a value came from another peer");
}

static void take(task *t, place *at) {
    value *v = identify(&t->op.value);
    place *from = v->place;
    uint64_t number = number_of(v);
    netchan_clear(&t->op.value);
    trace("    value %llu is taken by op %llu%s", (ull)number, (ull)t->op.id, t->op.redelivered ? " (again)" : "");
    if (!leads_to(from, at)) broken("value %llu was taken where it does not belong", (ull)number);
    if (v->fate == NEVER) broken("value %llu was taken, but its send did not happen", (ull)number);
    if (v->barred) broken("value %llu was taken, but its channel was closed before", (ull)number);
    if (v->op == t->op.id) broken("op %llu served itself", (ull)v->op);
    if (from->drained && !from->losses) broken("value %llu was taken after ECLOSED", (ull)number);
    if (t->op.redelivered && (from->kind != WORK || !from->cap || !from->losses || world.plan.no_redelivery))
        broken("value %llu is marked as redelivered", (ull)number);
    v->taken++;
    v->again += t->op.redelivered;
    if (v->taken - v->again > 1) broken("value %llu was taken twice", (ull)number);
    if (v->taken == 1 && v->fate == SENT) from->held--;
    check_taker(v, t, at);
    check_order(v, t, at);
}

/* --- how operations end ------------------------------------------------------------------------------------------- */

static void check_held(const place *p) {
    bool may_vanish = p->losses && (p->kind == END_SEND || world.plan.no_redelivery);
    if (p->cap && p->held > p->cap && !may_vanish) broken("%zu values are held by %s", p->held, describe(p));
}

static void sent(task *t, size_t i) {
    value *v = t->values[i];
    place *p = v->place;
    uint64_t peer = t->op.peer;
    v->fate = SENT;
    if (v->barred) broken("value %llu was sent, but its channel was closed before", (ull)number_of(v));
    if (is_rendezvous(v) && v->taken != 1)
        broken("value %llu was sent with OK and taken %u times", (ull)number_of(v), v->taken);
    if (!v->taken) p->held++;
    check_held(p);
    if (peer > world.last_peer || (peer == 0) != (p->kind == LOCAL || (p->kind == WORK && p->cap)))
        broken("a value went to peer %llu from %s", (ull)peer, describe(p));
    if (p->kind == END_SEND && world.peers[peer].wire != p->wire) broken("a value went over another link");
    if (p->kind == WORK && peer && world.peers[peer].wire->home != p->node)
        broken("a value went to a peer of another node");
}

static void end_send(task *t, size_t i, int result) {
    value *v = t->values[i];
    place *p = v->place;
    switch (result) {
    case NETCHAN_OK: sent(t, i); break;
    case NETCHAN_ECLOSED:
        v->fate = NEVER;
        if (!p->closed && !world.over) broken("a send on an open channel, %s, ended with ECLOSED", describe(p));
        break;
    case NETCHAN_ETOOBIG:
        v->fate = NEVER;
        if (p->kind == LOCAL || !v->large) broken("a send on %s ended with ETOOBIG", describe(p));
        break;
    case NETCHAN_ELOST:
        v->fate = NEVER;
        if (!p->losses || p->kind == LOCAL) broken("a send on %s ended with ELOST", describe(p));
        break;
    case NETCHAN_EUNKNOWN:
        v->fate = UNKNOWN;
        if ((!p->losses && !world.over) || p->kind == LOCAL) broken("a send on %s ended with EUNKNOWN", describe(p));
        break;
    default: broken("a send on %s ended with %d", describe(p), result);
    }
}

static void end_receive(task *t, place *p, int result) {
    place *source = p->kind == END_RECV ? world.work[p->wire->home] : p;
    switch (result) {
    case NETCHAN_OK: take(t, p); break;
    case NETCHAN_ECLOSED:
        if (world.over) break;
        if (!source->closed) broken("a receive on an open channel, %s, ended with ECLOSED", describe(p));
        if (source->ch->lane.count) broken("a receive on %s ended with ECLOSED, but there are values", describe(p));
        source->drained = true;
        break;
    case NETCHAN_ELOST:
        if (p->kind != END_RECV || !p->wire->losses) broken("a receive on %s ended with ELOST", describe(p));
        break;
    default: broken("a receive on %s ended with %d", describe(p), result);
    }
}

/* The operation of a task is over: was its result right? */
static void tell(task *t) {
    int index = t->op.index, result = t->op.result;
    t->told = true;
    trace("    op %llu ends: case %d, %s", (ull)t->op.id, index, netchan_strerror(result));
    if (index < -1 || index >= (int)t->op.count) broken("case %d of %zu happened", index, t->op.count);
    if (index < 0 && (result != NETCHAN_ETIMEDOUT || (t->timeout_ms && !t->expired)))
        broken("op %llu ended with %d without a case", (ull)t->op.id, result);
    if (index < 0 && t->timeout_ms == 0 && t->op.tries)
        broken("op %llu ended before all homes had answered", (ull)t->op.id);
    for (size_t i = 0; i < t->op.count; i++) {
        value *v = t->values[i];
        if (!v || (int)i == index) continue;
        v->fate = NEVER;
        if (v->taken) broken("value %llu was taken, but op %llu ended otherwise", (ull)number_of(v), (ull)t->op.id);
    }
    if (index < 0) return;
    if (t->values[index]) end_send(t, (size_t)index, result);
    else end_receive(t, t->places[index], result);
}

/* Looks at all operations that were ended by the last step; the receives first, as a sender's OK says that they are. */
static void observe(void) {
    for (int pass = 0; pass < 2; pass++)
        for (size_t i = 0; i < MAX_THREADS; i++) {
            task *t = world.tasks[i];
            if (!t || t->told || !t->op.finished) continue;
            if (pass == 0 && (t->op.index < 0 || t->values[t->op.index])) continue;
            tell(t);
        }
    for (; late_count; late_count--) {
        late_note *note = &late_notes[late_count - 1];
        if (*note->at < note->op) *note->at = note->op;
    }
}

/* --- tasks -------------------------------------------------------------------------------------------------------- */

static void leave(task *t) {
    for (size_t i = 0; i < t->op.count; i++) {
        const netchan__waiter *w = &t->waiters[i];
        if (w->queue || w->match || w->claim || w->id || w->peer)
            broken("op %llu is over, but case %zu is not", (ull)t->op.id, i);
    }
    pthread_cond_destroy(&t->op.cond);
    pthread_mutex_destroy(&t->op.mutex);
    for (size_t i = 0; i < t->op.count; i++) {
        netchan_clear(&t->waiters[i].value);
        free(t->bytes[i]);
    }
    world.tasks[t->thread] = NULL;
    free(t);
}

/* The thread of a finished operation wakes up. */
static void reap(task *t) {
    be(t->thread / THREADS);
    if (t->op.count > 1 || t->expired) {
        netchan__lock_all(&t->op, &t->locks);
        netchan__leave_queues(&t->op);
        netchan__unlock_all(&t->locks);
    }
    leave(t);
}

static void expire(task *t) {
    trace("op %llu: its time is up", (ull)t->op.id);
    be(t->thread / THREADS);
    t->expired = true;
    netchan__lock_all(&t->op, &t->locks);
    if (!t->op.finished) netchan__expire(&t->op);
    netchan__unlock_all(&t->locks);
}

/* As netchan__run() begins. */
static void launch(task *t) {
    netchan__lock_all(&t->op, &t->locks);
    netchan__begin(&t->op);
    if (t->timeout_ms == 0 && netchan__state(&t->op) == NETCHAN__OPEN && !t->op.tries) netchan__expire(&t->op);
    if (netchan__state(&t->op) == NETCHAN__DONE) netchan__leave_queues(&t->op);
    netchan__unlock_all(&t->locks);
}

static task *make_task(size_t thread, int timeout_ms) {
    task *t = (task *)calloc(1, sizeof *t);
    CHECK(t != NULL);
    t->thread = thread;
    t->timeout_ms = timeout_ms;
    t->locks.items = t->room;
    t->op.id = __atomic_add_fetch(&netchan__op_count, 1, __ATOMIC_RELAXED);
    t->op.waiters = t->waiters;
    world.tasks[thread] = t;
    return t;
}

static void add_case(task *t, place *p, bool is_send) {
    size_t i = t->op.count++;
    t->places[i] = p;
    t->cases[i] = netchan_case_recv(p ? p->ch : NULL, NULL);
    if (p && is_send) {
        value *v = &values[world.value_count++];
        memset(v, 0, sizeof *v);
        v->place = p;
        v->thread = t->thread;
        v->op = t->op.id;
        v->barred = p->closed;
        t->values[i] = v;
        t->cases[i] = netchan_case_send(p->ch, make_value(t, i));
    }
    trace("    %s %s, value %llu", is_send ? "send to" : "receive from", p ? describe(p) : "nil",
          (ull)(p && is_send ? number_of(t->values[i]) : 0));
}

/* As netchan__operate() begins. */
static void run_task(task *t) {
    for (size_t i = 0; i < t->op.count; i++) {
        netchan__waiter *w = &t->waiters[i];
        w->op = &t->op;
        w->op_id = t->op.id;
        w->index = i;
        w->multi = t->op.count > 1;
        w->firm = t->op.count == 1 && t->timeout_ms < 0;
        w->is_try = t->timeout_ms == 0;
        if (netchan__prepare(w, &t->cases[i]) != NETCHAN_OK) broken("a case cannot be prepared: %s", netchan_errmsg());
        if (t->values[i]) t->values[i]->large = w->size > NETCHAN__FRAGMENT;
    }
    pthread_mutex_init(&t->op.mutex, NULL);
    netchan__cond_init(&t->op.cond);
    be(t->thread / THREADS);
    launch(t);
}

static void start(size_t thread) {
    place *usable[MAX_PLACES];
    size_t count = 0, node = thread / THREADS;
    if (world.value_count + MAX_CASES > MAX_VALUES) return;
    for (size_t i = 0; i < world.place_count; i++)
        if (world.places[i].node == node) usable[count++] = &world.places[i];
    bool nowait = chance(world.plan.nowait), finite = chance(world.plan.finite);
    task *t = make_task(thread, nowait ? 0 : finite ? 1000 : NETCHAN_FOREVER);
    size_t cases = chance(world.plan.selects) ? 2 + below(MAX_CASES - 1) : 1;
    trace("node %zu, thread %zu: op %llu begins, %s", node, thread % THREADS, (ull)t->op.id,
          nowait ? "without waiting" : finite ? "for a time" : "for ever");
    for (size_t i = 0; i < cases; i++) {
        place *p = i && chance(3) ? NULL : usable[below(count)];
        add_case(t, p, p && p->ch->may_send && (!p->ch->may_receive || chance(50)));
    }
    run_task(t);
}

/* What has begun to be sent on a channel that is being closed may still happen; what only waits may not. */
static void bar_waiting(const place *p) {
    for (size_t i = 0; i < MAX_THREADS; i++) {
        task *t = world.tasks[i];
        for (size_t j = 0; t && !t->told && j < t->op.count; j++) {
            const netchan__waiter *w = &t->waiters[j];
            bool begun = w->match || w->id || t->op.engaged == w; /* a home may have claimed what it knows */
            if (t->places[j] == p && t->values[j] && !begun) t->values[j]->barred = true;
        }
    }
}

static void close_place(place *p) {
    trace("%s is closed", describe(p));
    be(p->node);
    bar_waiting(p);
    p->closed = true;
    if (netchan_close(p->ch) != NETCHAN_OK) broken("netchan_close: %s", netchan_errmsg());
    if (netchan_close(p->ch) != NETCHAN_ECLOSED) broken("a channel was closed twice");
}

/* --- connections -------------------------------------------------------------------------------------------------- */

static size_t node_of(const side *x) {
    return x == &x->conn->sides[0] ? x->conn->wire->dialler : x->conn->wire->home;
}

static side *other_side(side *x) {
    return &x->conn->sides[x == &x->conn->sides[0]];
}

static const char *frame_name(unsigned type) {
    static const char *const from_dialler[] = {"OFFER", "DEMAND", "WITHDRAW", "GRANT", "DECLINE", "TAKEN", "DATA",
        "CLOSE", "FRAGMENT"};
    static const char *const from_home[] = {"CLAIM", "COMMIT", "RELEASE", "ACCEPT", "WITHDRAWN", "CREDIT", "CLOSED"};
    if (type >= NETCHAN__OFFER && type <= NETCHAN__FRAGMENT_OF) return from_dialler[type - NETCHAN__OFFER];
    if (type >= NETCHAN__CLAIM && type <= NETCHAN__CLOSED) return from_home[type - NETCHAN__CLAIM];
    return "a frame";
}

static uint64_t traced_emit(netchan__peer *p, const netchan__frame *f) {
    const side *x = (const side *)netchan__session_of(p)->owner;
    trace("    link %td, %s: %s channel %llu entry %llu op %llu match %llu flags %llu number %llu size %llu",
          x->conn->wire - world.wires,
          x == &x->conn->sides[0] ? "dialler" : "home", frame_name(f->type), (ull)f->channel, (ull)f->entry,
          (ull)f->op, (ull)f->match, (ull)f->flags, (ull)f->number,
          (ull)f->size);
    return netchan__session_emit(p, f);
}

/* As netchan__bind_listener(). */
static void bind_home(side *x) {
    netchan__session *s = x->session;
    wire *link = x->conn->wire;
    netchan *merge = world.merge[link->home]->ch;
    netchan__lane *lane = (netchan__lane *)netchan__alloc(sizeof *lane);
    CHECK(lane != NULL);
    s->capacity = netchan__clamp(s->their_capacity);
    netchan__lane_init(lane, merge, (size_t)s->capacity);
    lane->peer = &s->peer;
    lane->peer_number = s->peer.number;
    lane->next = merge->lanes;
    if (lane->next) lane->next->prev = lane;
    merge->lanes = lane;
    link->lanes++;
    s->peer.lane = lane;
    s->peer.work = world.work[link->home]->ch;
    netchan__emit_hello(s);
    netchan__link_peer(&s->peer);
    netchan__lend(lane);
    if (s->peer.work->closed) netchan__emit_ids(&s->peer, NETCHAN__CLOSED, 1, 0, 0, 0, 0);
}

/* As netchan__bind_dialler(). */
static void bind_dialler(side *x) {
    netchan__session *s = x->session;
    wire *link = x->conn->wire;
    s->peer.send = link->send->ch;
    s->peer.recv = link->recv->ch;
    if (s->their_capacity < link->send->ch->lane.cap) broken("the capacity was %zu", link->send->ch->lane.cap);
    netchan__link_peer(&s->peer);
    netchan__end_up(&s->peer, link->send->ch);
    netchan__end_up(&s->peer, link->recv->ch);
}

static void on_hello(netchan__session *s) {
    side *x = (side *)s->owner;
    x->bound = true;
    if (x == &x->conn->sides[0]) bind_dialler(x);
    else bind_home(x);
}

static void on_drained(netchan__lane *lane) {
    world.peers[lane->peer_number].wire->lanes--;
}

static void lock_net(void) {
    pthread_mutex_lock(&netchan__net_lock);
}

static void unlock_net(void) {
    netchan__unlock_one(&netchan__net_lock);
}

/* As netchan__start_session(). */
static void open_side(conn *c, int which) {
    side *x = &c->sides[which];
    size_t node = which ? c->wire->home : c->wire->dialler;
    netchan__session *s = (netchan__session *)netchan__alloc(sizeof *s);
    CHECK(s != NULL);
    s->peer.emit = tracing ? traced_emit : netchan__session_emit;
    s->peer.number = ++world.last_peer;
    s->peer.max_ops = 1000;
    s->peer.max_message = max_message(node);
    s->peer.max_memory = world.plan.max_memory[node];
    s->peer.no_redelivery = world.plan.no_redelivery;
    s->owner = x;
    s->on_hello = on_hello;
    s->ping_ms = 5000;
    x->conn = c;
    x->session = s;
    x->bound = false;
    world.peers[world.last_peer].wire = c->wire;
    world.peers[world.last_peer].which = which;
    if (which) return;
    s->capacity = c->wire->send->cap;
    netchan__emit_hello(s);
}

static void dial(wire *link) {
    conn *c = NULL;
    for (size_t i = 0; i < MAX_CONNS; i++)
        if (!world.conns[i].sides[0].session && !world.conns[i].sides[1].session) c = &world.conns[i];
    if (!c || world.last_peer + 2 >= MAX_PEERS) return;
    trace("link %td: node %zu dials node %zu", link - world.wires, link->dialler, link->home);
    c->wire = link;
    link->conn = c;
    be(link->dialler);
    lock_net();
    open_side(c, 0);
    open_side(c, 1);
    unlock_net();
}

/* One record goes from the session to the link. Returns false when there was none. */
static bool pump(side *x) {
    const uint8_t *data;
    be(node_of(x));
    lock_net();
    size_t size = netchan__session_output(x->session, &data);
    if (size && other_side(x)->session) CHECK(netchan__buf_append(&other_side(x)->in, data, size));
    netchan__session_sent(x->session, size);
    unlock_net();
    if (size)
        trace("link %td, %s: %zu bytes leave", x->conn->wire - world.wires,
              x == &x->conn->sides[0] ? "dialler" : "home", size);
    return size > 0;
}

static void deliver(side *x, size_t size) {
    trace("link %td, %s: %zu of %zu bytes arrive", x->conn->wire - world.wires,
          x == &x->conn->sides[0] ? "dialler" : "home", size,
          netchan__buf_size(&x->in));
    be(node_of(x));
    lock_net();
    netchan__session_input(x->session, 0, x->in.data + x->in.start, size);
    unlock_net();
    netchan__buf_consume(&x->in, size);
    if (x->session->peer.breach) broken("a breach: %s", x->session->peer.breach);
}

/* This side finds its session lost. What it sent may still arrive, up to somewhere. */
static void lose(side *x) {
    wire *link = x->conn->wire;
    side *y = other_side(x);
    trace("link %td: the %s loses its session", link - world.wires, x == &x->conn->sides[0] ? "dialler" : "home");
    link->losses++;
    link->send->losses++;
    world.work[link->home]->losses++;
    be(node_of(x));
    lock_net();
    uint64_t unknown = netchan__session_lost(x->session);
    netchan__session_free(x->session);
    unlock_net();
    x->session = NULL;
    netchan__buf_free(&x->in);
    if (y->session && netchan__buf_size(&y->in)) y->in.end -= below(netchan__buf_size(&y->in) + 1);
    if (x == &x->conn->sides[0]) {
        link->unknown += unknown;
        link->conn = NULL;
    } else world.work[link->home]->unknown += unknown;
}

/* --- checks after every step -------------------------------------------------------------------------------------- */

/* Does this waiter wait and nothing else? Who is engaged elsewhere looks around again when it is released. */
static bool is_idle(const netchan__waiter *w) {
    return !w->op || netchan__state(w->op) == NETCHAN__OPEN;
}

static void check_lane(const netchan__lane *lane) {
    if (lane->count + lane->out + lane->reserved + lane->lent > lane->cap)
        broken("capacity %zu is exceeded", lane->cap);
    if (lane->pinned > lane->out || lane->out > lane->matching || lane->reserved > lane->matching)
        broken("a lane counts wrong");
    bool ready = lane->cap ? lane->count > 0 && !lane->pinned : lane->senders.head != NULL;
    if (lane->is_ready != ready && !lane->closing) broken("a lane is listed wrong");
}

/* A peer may have no memory for large values now, or never. */
static bool may_wait(const netchan__waiter *w, size_t size) {
    return !w->op && size > NETCHAN__FRAGMENT;
}

/* Invariant I2: nobody idle is left with somebody idle. */
static void check_pairs(const netchan__lane *lane) {
    for (const netchan__waiter *r = lane->ch->receivers.head; r; r = r->next) {
        bool ready = is_idle(r) && lane->cap && lane->count && !lane->pinned;
        if (ready && !may_wait(r, lane->slots[lane->first].size)) broken("a value and a receiver were left");
        for (const netchan__waiter *s = lane->senders.head; s && is_idle(r) && !lane->cap &&
             !lane->closing; s = s->next)
            if (is_idle(s) && !netchan__same_op(s, r) && netchan__has_room(s) && !may_wait(r, s->size))
                broken("a sender and a receiver were left");
    }
    for (const netchan__waiter *s = lane->senders.head; s && netchan__slot_free(lane) && !lane->closing; s = s->next)
        if (is_idle(s) && netchan__has_room(s)) broken("a sender and a free slot were left");
}

static void check_end(const netchan *ch) {
    if (!ch->home || !ch->credit || ch->backlog_count) return;
    for (const netchan__waiter *s = ch->lane.senders.head; s; s = s->next)
        if (is_idle(s) && !s->id) broken("a sender and credit were left");
}

static void check_step(void) {
    observe();
    for (size_t i = 0; i < world.place_count; i++) {
        const netchan *ch = world.places[i].ch;
        be(world.places[i].node);
        if (ch->is_end) check_end(ch);
        for (const netchan__lane *lane = ch->is_end ? NULL : ch->lanes; lane; lane = lane->next) {
            check_lane(lane);
            check_pairs(lane);
        }
    }
    if (netchan__net.released || netchan__net.declined || netchan__net.dirty || netchan__net.changed)
        broken("something is not settled");
}

/* --- checks at rest: all bytes delivered, all time up ------------------------------------------------------------- */

static bool is_up(const wire *link) {
    return link->conn && link->conn->sides[0].bound && link->conn->sides[1].bound && link->conn->sides[1].session;
}

static void check_waiting(const task *t, size_t i) {
    const place *p = t->places[i];
    const netchan__waiter *w = &t->waiters[i];
    ull op = (ull)t->op.id;
    if (!p) return;
    if (w->match || w->claim) broken("case %zu of op %llu is being negotiated for ever", i, op);
    if (w->is_send ? p->ch->closing : p->ch->closed) broken("op %llu waits on a closed channel, %s", op, describe(p));
    if (!w->queue) broken("case %zu of op %llu waits nowhere", i, op);
    if (!p->wire || !is_up(p->wire)) return;
    if (w->is_send && p->cap && !w->id) return; /* for credit */
    const netchan__peer *home = &p->wire->conn->sides[1].session->peer;
    const netchan__waiter *entry = (const netchan__waiter *)netchan__map_get(&home->waiters, w->id);
    if (!w->id || !entry || !entry->queue || entry->op_id != t->op.id)
        broken("op %llu waits, but its home does not know it", op);
}

static void check_tasks(void) {
    for (size_t i = 0; i < MAX_THREADS; i++) {
        const task *t = world.tasks[i];
        if (!t || t->told) continue;
        if (t->timeout_ms >= 0) broken("op %llu does not end, though its time is up", (ull)t->op.id);
        if (netchan__state(&t->op) != NETCHAN__OPEN)
            broken("op %llu is stuck in state %d", (ull)t->op.id, netchan__state(&t->op));
        for (size_t j = 0; j < t->op.count; j++) check_waiting(t, j);
    }
}

/* What a home remembers of a peer must be what the peer has. */
static void check_peers(const wire *link) {
    const netchan__peer *dialler = &link->conn->sides[0].session->peer, *home = &link->conn->sides[1].session->peer;
    size_t offered = 0;
    for (size_t i = 0; i < home->waiters.cap; i++) {
        const netchan__waiter *entry = (const netchan__waiter *)home->waiters.slots[i].item, *w;
        if (!home->waiters.slots[i].key) continue;
        w = (const netchan__waiter *)netchan__map_get(&netchan__net.waiters, entry->id);
        if (!w || w->peer != dialler) broken("a home remembers op %llu, which is over", (ull)entry->op_id);
        if (entry->here) offered += entry->size;
    }
    if (dialler->offered != offered || home->offered != offered)
        broken("%zu bytes are offered, and counted as %zu and %zu", offered, dialler->offered, home->offered);
    if (dialler->reserved || home->reserved)
        broken("%zu and %zu bytes stay reserved", dialler->reserved, home->reserved);
    if (home->lane && !home->lane->closing && home->lane->lent != link->send->ch->credit)
        broken("%zu slots are lent, but the credit is %zu", home->lane->lent, link->send->ch->credit);
    if (link->send->closed && home->lane && !home->lane->closing)
        broken("%s is closed, and its home does not know", describe(link->send));
    if (world.work[link->home]->ch->closed != link->recv->ch->closed)
        broken("CLOSED did not arrive at %s", describe(link->recv));
    if (home->shipping) broken("%zu bytes stay counted as being shipped", home->shipping);
    if (home->lane && home->lane->cap && !home->lane->closing && !home->lane->count &&
        link->send->ch->lane.senders.head)
        broken("a sender at %s waits for an empty buffer", describe(link->send));
}

static void check_channels(void) {
    if (netchan__net.matches.count) broken("%zu matches are left", netchan__net.matches.count);
    for (size_t i = 0; i < world.place_count; i++) {
        const place *p = &world.places[i];
        for (const netchan__lane *lane = p->ch->is_end ? NULL : p->ch->lanes; lane; lane = lane->next) {
            if (lane->out || lane->reserved || lane->pinned || lane->matching)
                broken("a lane of %s is not at rest", describe(p));
            if (p->kind == MERGE && lane->closing && !lane->count) broken("a lane that is closed and empty is left");
        }
        if (p->ch->is_end || !p->closed) continue;
        if (p->ch->closed != (p->ch->lane.count == 0))
            broken("%s is closed, and %zu values are left", describe(p), p->ch->lane.count);
    }
}

static void mark_present(const netchan_value *v, const place *at) {
    value *found = identify(v);
    ull number = (ull)number_of(found);
    if (found->place != at && !(at->kind == MERGE && leads_to(found->place, at)))
        broken("value %llu is in a wrong buffer", number);
    if (found->present) broken("value %llu is there twice", number);
    if (found->fate != SENT && (found->fate != UNKNOWN || !found->place->cap))
        broken("value %llu is in a buffer, and its fate is %d", number, (int)found->fate);
    found->present = true;
}

static void mark_backlog(const place *p) {
    netchan__reader r = {p->ch->backlog.data + p->ch->backlog.start, p->ch->backlog.data + p->ch->backlog.end, false};
    if (!netchan__buf_size(&p->ch->backlog)) return;
    while (netchan__left(&r)) {
        netchan_value v;
        size_t size = (size_t)netchan__read_varint(&r);
        CHECK_INT(netchan_decode(&v, netchan__read_bytes(&r, size), size, 0), NETCHAN_OK);
        mark_present(&v, p);
        netchan_clear(&v);
    }
}

/* Each value that was sent with OK is taken, or in a buffer, or counted as unknown. */
static void check_values(void) {
    size_t vanished[MAX_PLACES] = {0};
    for (size_t i = 0; i < world.value_count; i++) values[i].present = false;
    for (size_t i = 0; i < world.place_count; i++) {
        const place *p = &world.places[i];
        for (const netchan__lane *lane = p->ch->is_end ? NULL : p->ch->lanes; lane; lane = lane->next)
            for (size_t j = 0; j < lane->count; j++) {
                const netchan__slot *slot = &lane->slots[(lane->first + j) & (lane->room - 1)];
                mark_present(&slot->value, p);
                if (identify(&slot->value)->taken && !slot->redelivered)
                    broken("value %zu was taken and is still there", i);
            }
        if (p->ch->is_end) mark_backlog(p);
    }
    for (size_t i = 0; i < world.value_count; i++) {
        const value *v = &values[i];
        if (v->taken && v->fate != SENT && v->fate != UNKNOWN)
            broken("value %zu was taken, and its fate is %d", i + 1, (int)v->fate);
        if (v->fate == SENT && !v->taken && !v->present) vanished[v->place->index]++;
    }
    for (size_t i = 0; i < world.place_count; i++) {
        const place *p = &world.places[i];
        uint64_t unknown = p->kind == END_SEND ? p->wire->unknown : p->kind == WORK &&
            world.plan.no_redelivery ? p->unknown : 0;
        if (vanished[i] > unknown)
            broken("%zu values vanished from %s, %llu are counted", vanished[i], describe(p), (ull)unknown);
    }
}

/* Delivers everything. */
static void let_flow(void) {
    bool moved = true;
    for (size_t rounds = 0; moved; rounds++) {
        if (rounds > 100000) broken("it does not come to rest");
        moved = false;
        for (size_t i = 0; i < 2 * MAX_CONNS; i++) {
            side *x = &world.conns[i / 2].sides[i % 2];
            if (x->session && pump(x)) moved = true;
            if (!x->session || !netchan__buf_size(&x->in)) continue;
            deliver(x, netchan__buf_size(&x->in));
            moved = true;
            check_step();
        }
    }
}

static void expire_all(void) {
    for (size_t i = 0; i < MAX_THREADS; i++) {
        task *t = world.tasks[i];
        if (t && !t->told && t->timeout_ms > 0 && !t->expired) expire(t);
        observe();
    }
}

static void come_to_rest(void) {
    trace("everything comes to rest");
    for (size_t i = 0; i < MAX_CONNS; i++)
        for (int which = 0; which < 2; which++) {
            side *x = &world.conns[i].sides[which];
            if (x->session && !other_side(x)->session) lose(x);
            observe();
        }
    for (size_t i = 0; i < world.plan.links; i++)
        if (!world.wires[i].conn) dial(&world.wires[i]);
    let_flow();
    expire_all();
    let_flow();
    check_step();
}

static void check_rest(void) {
    check_channels();
    check_tasks();
    for (size_t i = 0; i < world.plan.links; i++)
        if (is_up(&world.wires[i])) check_peers(&world.wires[i]);
    check_values();
}

/* Takes one value if there is one. */
static bool drain_one(place *p) {
    task *t = make_task(p->node * THREADS + THREADS - 1, NETCHAN_NOWAIT);
    trace("op %llu drains", (ull)t->op.id);
    add_case(t, p, false);
    run_task(t);
    let_flow();
    check_step();
    if (!t->told) broken("a receive without waiting from %s waits", describe(p));
    bool got = t->op.result == NETCHAN_OK;
    reap(t);
    return got;
}

/* Takes whatever is left; then there must be nothing anywhere. */
static void drain(void) {
    for (bool more = true; more;) {
        more = false;
        for (size_t i = 0; i < world.place_count; i++)
            while (world.places[i].ch->may_receive && drain_one(&world.places[i])) more = true;
    }
    check_rest();
    for (size_t i = 0; i < world.value_count; i++) {
        const place *p = values[i].place;
        const netchan__lane *lane = &p->ch->lane;
        if (p->kind == WORK && lane->count &&
            lane->slots[lane->first].size > NETCHAN__FRAGMENT) continue; /* larger than its peers take */
        bool reachable = p->kind == LOCAL || (p->kind == END_SEND && is_up(p->wire));
        for (size_t j = 0; j < world.plan.links; j++) reachable |= p == world.work[world.wires[j].home] &&
            is_up(&world.wires[j]);
        if (values[i].present && reachable) broken("value %zu cannot be drained from %s", i + 1, describe(p));
    }
}

/* --- one run ------------------------------------------------------------------------------------------------------ */

static void draw_plan(plan *p) {
    static const size_t memories[] = {100000, 2 * MAX_MESSAGE, 2 << 20, 64 << 20};
    static const size_t percents[] = {0, 10, 50, 90};
    p->nodes = 2 + below(MAX_NODES - 1);
    p->links = 1 + below(MAX_LINKS);
    p->threads = 1 + below(THREADS - 1);
    p->steps = 20 + below(chance(20) ? 600 : 150);
    p->selects = percents[below(4)];
    p->finite = percents[below(4)];
    p->nowait = chance(50) ? 0 : 5 + below(30);
    p->large = chance(60) ? 0 : 2 + below(chance(30) ? 60 : 10);
    p->medium = chance(70) ? 0 : below(20);
    p->losses = chance(50) ? 0 : 1 + below(3);
    p->closes = chance(60) ? 0 : 1 + below(2);
    p->whole = percents[below(4)];
    p->no_redelivery = chance(30);
    p->quiet_start = chance(30);
    p->huge = chance(30);
    size_t memory = memories[1 + below(3)];
    for (size_t i = 0; i < MAX_NODES; i++) p->max_memory[i] = chance(90) ? memory : memories[below(4)];
}

static size_t draw_capacity(void) {
    static const size_t capacities[] = {0, 0, 0, 1, 1, 2, 5, 20};
    return capacities[below(8)];
}

static place *add_place(size_t node, place_kind kind, size_t cap, wire *link) {
    place *p = &world.places[world.place_count];
    p->index = world.place_count++;
    p->kind = kind;
    p->node = node;
    p->cap = cap;
    p->wire = link;
    p->ch = kind == LOCAL ? netchan_make(cap) : netchan__make_link_channel(cap, kind == WORK || kind == END_SEND);
    CHECK(p->ch != NULL);
    p->ch->is_end = kind == END_SEND || kind == END_RECV;
    p->ch->is_merge = kind == MERGE;
    if (kind == MERGE) p->ch->lanes = NULL;
    if (kind == END_RECV) p->ch->channel = 1;
    return p;
}

static void add_link(wire *link, bool first) {
    link->home = first || chance(60) ? 0 : below(world.plan.nodes);
    link->dialler = first ? 1 : below(world.plan.nodes);
    if (link->home == link->dialler && !chance(20)) link->dialler = (link->home + 1) % world.plan.nodes;
    size_t home = link->home;
    if (!world.work[home]) {
        world.work[home] = add_place(home, WORK, draw_capacity(), NULL);
        world.merge[home] = add_place(home, MERGE, 0, NULL);
    }
    link->send = add_place(link->dialler, END_SEND, draw_capacity(), link);
    link->recv = add_place(link->dialler, END_RECV, 0, link);
    if (!world.plan.quiet_start) dial(link);
}

static void build(void) {
    memset(&world, 0, sizeof world);
    draw_plan(&world.plan);
    netchan__op_count = 0;
    netchan__net.last_id = 0;
    netchan__net.on_drained = on_drained;
    for (size_t i = 0; i < MAX_NODES * 16; i++) world.process[i / 16][i % 16] = (uint8_t)draw();
    for (size_t i = 0; i < world.plan.nodes; i++)
        for (size_t j = below(LOCALS + 1); j > 0; j--) add_place(i, LOCAL, draw_capacity(), NULL);
    for (size_t i = 0; i < world.plan.links; i++) add_link(&world.wires[i], i == 0);
    for (size_t i = 0; i < world.place_count; i++) trace("%s, capacity %zu", describe(&world.places[i]),
                                                         world.places[i].cap);
}

/* A side of a connection that is not given up, or NULL. */
static side *draw_side(void) {
    side *alive[2 * MAX_CONNS];
    size_t count = 0;
    for (size_t i = 0; i < 2 * MAX_CONNS; i++)
        if (world.conns[i / 2].sides[i % 2].session) alive[count++] = &world.conns[i / 2].sides[i % 2];
    return count ? alive[below(count)] : NULL;
}

static void step_traffic(void) {
    side *x = draw_side();
    if (!x) return;
    size_t size = netchan__buf_size(&x->in);
    if (chance(50)) pump(x);
    else if (size) deliver(x, chance(world.plan.whole) ? size : 1 + below(chance(50) || size < 40 ? size : 40));
}

static void step_task(void) {
    size_t thread = below(world.plan.nodes) * THREADS + below(world.plan.threads);
    task *t = world.tasks[thread];
    bool usable = false;
    for (size_t i = 0; i < world.place_count; i++) usable |= world.places[i].node == thread / THREADS;
    if (!t && usable) start(thread);
    else if (t && t->told) reap(t);
    else if (t && t->timeout_ms > 0 && !t->expired && chance(15)) expire(t);
}

static void step_loss(void) {
    side *x = draw_side();
    if (!x) return;
    side *y = other_side(x);
    lose(x);
    observe();
    if (y->session && chance(50)) lose(y);
}

static void step(void) {
    place *p = &world.places[below(world.place_count)];
    wire *link = &world.wires[below(world.plan.links)];
    if (chance(world.plan.losses)) step_loss();
    else if (chance(world.plan.closes) && p->ch->may_send && !p->closed) close_place(p);
    else if (!link->conn && chance(20)) dial(link);
    else if (chance(50)) step_task();
    else step_traffic();
}

/* As netchan_hangup(). */
static void shut_links(void) {
    for (size_t i = 0; i < world.place_count; i++) {
        place *p = &world.places[i];
        if (p->kind == LOCAL) continue;
        be(p->node);
        lock_net();
        netchan__shut(p->ch);
        unlock_net();
        observe();
    }
}

static void shut_all(void) {
    trace("everybody hangs up");
    world.over = true;
    shut_links();
    for (size_t i = 0; i < 2 * MAX_CONNS; i++)
        if (world.conns[i / 2].sides[i % 2].session) {
            lose(&world.conns[i / 2].sides[i % 2]);
            observe();
        }
    shut_links();
    for (size_t i = 0; i < world.place_count; i++) {
        place *p = &world.places[i];
        if (p->kind == LOCAL && !p->closed) close_place(p);
        observe();
    }
}

static void tear_down(void) {
    shut_all();
    for (size_t i = 0; i < MAX_THREADS; i++) {
        if (!world.tasks[i]) continue;
        if (!world.tasks[i]->told) broken("op %llu survives the hangup", (ull)world.tasks[i]->op.id);
        reap(world.tasks[i]);
    }
    for (size_t i = 0; i < world.place_count; i++) {
        netchan *ch = world.places[i].ch;
        lock_net();
        while (ch->is_merge && ch->lanes) {
            netchan__lane_clear(ch->lanes);
            netchan__retire_lane(ch->lanes);
        }
        unlock_net();
    }
    for (size_t i = 0; i < world.place_count; i++) netchan_free(world.places[i].ch);
    for (size_t i = 0; i < world.plan.links; i++)
        if (world.wires[i].lanes) broken("%zu lanes are left", world.wires[i].lanes);
    if (netchan__net.waiters.count || netchan__net.matches.count) broken("waiters or matches are left");
    if (netchan__net.peers || netchan__pending) broken("sessions are left");
    netchan__map_free(&netchan__net.waiters);
    netchan__map_free(&netchan__net.matches);
}

static void run_seed(void) {
    long blocks = alloc_blocks();
    random_state = seed * 0x9E3779B97F4A7C15u ^ 0xD1B54A32D192ED03u;
    for (int i = 0; i < 8; i++) draw();
    build();
    for (size_t i = 0; i < world.plan.steps; i++) {
        step();
        check_step();
    }
    come_to_rest();
    check_rest();
    if (chance(50)) drain();
    tear_down();
    if (alloc_blocks() != blocks) broken("%ld blocks of memory were not freed", alloc_blocks() - blocks);
}

/* --- all seeds ---------------------------------------------------------------------------------------------------- */

static uint64_t block_first, block_size;

static void run_block(void) {
    (void)random_by_clock; /* compiled, and not wanted */
    for (uint64_t i = 0; i < block_size; i++) {
        seed = *shared_seed = block_first + i;
        alarm(SEED_LIMIT);
        run_seed();
    }
}

int main(int argc, char **argv) {
    uint64_t seeds = argc > 1 ? strtoull(argv[1], NULL, 10) : SEEDS, first = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    uint64_t blocks = seeds < BLOCKS ? seeds : BLOCKS;
    int passed = 0, failed = 0;
    const char *wish = getenv("TRACE");
    tracing = wish && *wish && strcmp(wish, "0") != 0;
    shared_seed = (uint64_t *)mmap(NULL, sizeof *shared_seed, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
                                   0);
    CHECK(shared_seed != MAP_FAILED);
    for (uint64_t i = 0; i < blocks; i++) {
        char name[64];
        test_entry entry = {name, run_block};
        block_first = first + seeds * i / blocks;
        block_size = first + seeds * (i + 1) / blocks - block_first;
        snprintf(name, sizeof name, "seeds %llu to %llu", (ull)block_first, (ull)(block_first + block_size - 1));
        if (test_run(&entry)) passed++;
        else {
            failed++;
            printf("%s: ended with seed %llu\n", name, (ull)*shared_seed);
        }
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
