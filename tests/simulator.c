/* The simulator: nodes with the real channels, sessions and hubs of netchan.h, [6] to [14], whose links are pipes of
 * memory. One thread, no sockets, no TLS, no clock: time is a number, and a generator that starts from a seed decides
 * what happens next. A seed replays exactly.
 *
 *     simulator                      the tests: some thousand seeds
 *     simulator sim [SEEDS [SEED0]]  seeds SEED0, SEED0 + 1, ... on all cores; what fails is told as `seed N: what`
 *     simulator trace SEED           replays one and tells each step
 *
 * A node is a process: it has its own copy of what netchan.h keeps for the process, its own memory, and it may die at
 * any moment without a word. Threads of it are tasks: operations on the heap that are begun, expired and left exactly
 * as netchan__run() does it, but never waited for. Links break at any byte, on both sides or for one side only, stand
 * still, and are dialled again as section [17] does it.
 *
 * The world knows of each value who sent it and who took it. So after each step and at rest it can say whether what the
 * nodes tell is true: what was sent with OK is taken once and in order, or is in a buffer, or is counted as lost. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1
#endif
#ifndef _DARWIN_C_SOURCE
#define _DARWIN_C_SOURCE 1
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static void broken(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
static uint64_t draw(void);
static void *node_alloc(size_t size);
static void node_free(void *p);

/* Limits that a run draws for itself. */
static size_t window, key_records;

#define NETCHAN_WINDOW window
#define NETCHAN_KEY_RECORDS key_records
#define NETCHAN_MALLOC(size) node_alloc(size)
#define NETCHAN_FREE(ptr) node_free(ptr)

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

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SEEDS = 2000 }; /* by default */
#else
enum { SEEDS = 20000 };
#endif

enum {
    BLOCKS = 20,     /* tests, each in a process of its own */
    FEWEST = 1000,   /* seeds that the tests run however slow the machine is, ... */
    SECONDS = 20,    /* ... and then for so long at most */
    SEED_LIMIT = 60, /* seconds for one seed */
    MAX_CORES = 64
};

enum {
    MAX_NODES = 5,
    MAX_LINKS = 5,
    MAX_SITES = 3,
    LOCALS = 2,      /* channels of a node that lead nowhere */
    THREADS = 4,     /* of a node; the last one only drains */
    MAX_THREADS = MAX_NODES * THREADS,
    MAX_CASES = 4,
    MAX_PORTS = 40,
    MAX_ENDS = 2,    /* in one value */
    MAX_PLACES = 2 * MAX_PORTS + 160,
    MAX_CONNS = 32,
    MAX_PEERS = 512, /* sessions of a node */
    MAX_VALUES = 4096,
    MAX_WAYS = 8192, /* 2^13, see find_way() */
    MAX_MESSAGE = 110000 /* bytes */
};

typedef unsigned long long ull; /* for printf */

enum { MS = 1000000 }; /* nanoseconds */

/* --- the world ---------------------------------------------------------------------------------------------------- */

/* OWN_SEND, OWN_RECV: of a peer that was accepted; DIRECT: what is sent with netchan_sendto(). */
typedef enum place_kind { LOCAL, WORK, MERGE, END_SEND, END_RECV, IMPORT, OWN_SEND, OWN_RECV, DIRECT } place_kind;
static const char *const kind_names[] = {"local", "work", "merge", "end_send", "end_recv", "end", "own_send",
    "own_recv", "direct"};

typedef struct place place;
typedef struct port port;
typedef struct conn conn;

/* Memory of a node. */
typedef struct block block;
struct block {
    block *prev, *next;
    size_t size, unused; /* a multiple of 16 bytes in all */
};

typedef struct node {
    bool alive, touched;          /* touched: since its state was checked */
    struct netchan__net_state net; /* while another node runs */
    block blocks;                 /* the head of a ring */
    port *peers[MAX_PEERS];       /* whom its sessions lead to, by netchan_peer.id */
    uint64_t down[MAX_PEERS], generation[MAX_PEERS]; /* the newest id of a match when this link of theirs broke, or 0 */
    uint64_t next_check;          /* of claims; nanoseconds */
} node;

/* An address at which processes listen, one after the other. */
typedef struct site {
    size_t node;
    port *port; /* who accepts there, or NULL */
} site;

/* What one netchan_dial() is about; it may be made anew. */
typedef struct route {
    size_t node, addresses, sites[2];
    port *port; /* or NULL */
} route;

/* What netchan_listen() or netchan_dial() returns: a hub, and what section [17] adds to it. */
struct port {
    netchan__hub hub;
    size_t index, node, site; /* site: of a listener */
    route *route;             /* of a dialler */
    bool open, died;          /* died: with its node */
    place *send, *recv;
    struct side *trial;
    size_t which, tried;
    uint64_t next_dial, linger;
    unsigned failures;
    bool stopping, reported;
    netchan_report report;
    /* The sums of its "lost" and "drained" events. */
    uint64_t taken, unknown;
    uint64_t arrived;       /* values that a drained session had sent and that were in the other side's buffer; */
    bool arrives;           /* they are to be counted */
    unsigned losses, ends;  /* sessions that were lost; that ended */
    uint64_t resumes;       /* sessions that went on */
    netchan__wanted *wanted; /* an import that waits, or NULL */
    char wanted_name[16];
    place *wanted_root;
    bool blind;             /* an event was dropped */
};

/* A channel, as one node knows it. */
struct place {
    netchan *ch; /* NULL: it is gone */
    place_kind kind;
    size_t index, node, cap;
    port *port;     /* of all but LOCAL and IMPORT */
    port *peer;     /* OWN_SEND, OWN_RECV, DIRECT: the dialler */
    uint64_t to;    /* DIRECT: as a number */
    place *root;    /* IMPORT: the LOCAL channel that it is an end of, or an end of an end */
    bool dropped;   /* IMPORT: only tasks that have begun use it yet */
    bool given;     /* LOCAL: an end of it was sent in a value */
    bool shut;      /* LOCAL: a task closed it or one of its ends */
    bool closed;    /* a task closed it */
    bool drained;   /* a receiver was told that all values are gone */
    uint64_t sent, unknown, taken; /* sends that ended with OK, with EUNKNOWN; values of them that were taken */
    uint64_t held;                 /* sent with OK and not taken */
    uint64_t received;             /* values that were taken here */
};

/* One of the two ends of a connection. */
typedef struct side {
    conn *conn;
    port *port;
    bool open;
    netchan__wire wire;
    bool stranger, closing;
    bool writes;        /* there may be something to send */
    uint64_t deadline, stalled; /* stalled: nothing arrives before */
    char reason[200];
    /* What is on its way to it: records, each after its size in 4 bytes. */
    uint8_t *in;
    size_t in_begin, in_end, in_cap;
    size_t record;      /* what is left of the record that is being delivered */
    bool cut;           /* no more comes; unless `eof`, nobody says so */
    bool eof;
} side;

struct conn {
    side sides[2]; /* dialler, listener */
};

typedef enum fate { PENDING, SENT, NEVER, UNKNOWN } fate;

/* One value that a task tries to send. Its number is its index plus 1. */
typedef struct value {
    place *place;
    size_t thread;
    uint64_t op;
    fate fate;
    unsigned taken, again; /* again: of these, marked as redelivered */
    struct value *answers; /* it is the reply to this one */
    unsigned answered;
    bool large, present;
    unsigned ends; /* that are in it */
    place *roots[MAX_ENDS];
    bool receives[MAX_ENDS];
    bool home;   /* the last who took it did so where its channel was made */
    bool left;   /* a link was given it */
    bool barred; /* the channel was closed before it could be sent */
} value;

typedef struct task {
    netchan__op op;
    netchan__waiter waiters[MAX_CASES];
    netchan_case cases[MAX_CASES];
    pthread_mutex_t *room[MAX_CASES];
    netchan__locks locks;
    place *places[MAX_CASES]; /* NULL: no channel */
    netchan *held[MAX_CASES];
    value *values[MAX_CASES];
    uint8_t *bytes[MAX_CASES];
    netchan_value items[MAX_CASES][1 + MAX_ENDS]; /* of a value with ends */
    size_t thread;
    int timeout_ms;
    bool expired, told;
} task;

/* What the threads do: whatever comes; one stream each way; a work queue; requests that are answered; values that wait
 * in the buffer of a listener, which has successors; whatever comes, with ends of channels in values, and through
 * them. */
typedef enum shape { MIXED, STREAMS, WORKERS, REQUESTS, SUCCESSION, ENDS } shape;
static const char *const shape_names[] = {"mixed", "streams", "workers", "requests", "succession", "ends"};

/* What may happen in this run; in percent, or in thousandths of all steps, where it is no number or bool. */
typedef struct plan {
    shape shape;
    size_t nodes, links, sites, threads, steps;
    size_t selects, finite, nowait, large, medium;
    size_t cuts, stalls, jumps, closes, deaths, hangups, memory, forgeries; /* thousandths */
    size_t whole, pace, full;       /* pace: microseconds that a step takes; full: bytes that fit into a pipe */
    bool strict;                    /* links break, and users hang up with patience: nothing may be lost */
    bool successors;                /* a successor listens while the old one still says farewell */
    bool no_redelivery, quiet_start, huge;
    bool buffered;                  /* all links have room for some values */
    size_t ends;                    /* percent of the values that have ends in them */
    size_t early;                   /* percent of the receives that want values to come early */
    size_t drops, accepts, names, losses; /* thousandths */
    bool link_ends;                 /* so are the channels of links */
    size_t max_ends;
    int ping_ms, resume_ms;
    size_t max_memory[MAX_NODES];
} plan;

static struct world {
    plan plan;
    uint64_t now; /* nanoseconds */
    node nodes[MAX_NODES];
    site sites[MAX_SITES];
    route links[MAX_LINKS];
    port ports[MAX_PORTS];
    size_t port_count;
    place places[MAX_PLACES];
    size_t place_count;
    conn conns[MAX_CONNS];
    task *tasks[MAX_THREADS];
    value *owed[MAX_THREADS]; /* the request that this thread has to answer */
    size_t value_count;
    bool over;      /* everybody hangs up */
    bool no_memory; /* an allocation has failed */
    bool parted;    /* a dialler has hung up */
    bool revoked;   /* a name was taken back */
    bool links_given; /* ends of a link's channels were given away */
    bool hung_up;   /* somebody has, or a node died */
    bool forced;    /* somebody who hung up had to stop waiting: what is lost then is no longer forbidden */
    uint32_t last[MAX_PLACES][MAX_THREADS][MAX_THREADS];   /* the newest op of a thread whose value a thread took */
    uint32_t last_at[MAX_PLACES][MAX_THREADS][MAX_PLACES]; /* the same for a place; small values only */
    struct way {
        uint64_t key;
        uint32_t op;
    } ways[MAX_WAYS]; /* see find_way() */
    size_t way_count;
} world;

static value values[MAX_VALUES];
static uint64_t seed, random_state;
static bool tracing;

/* For the parent process, should this one die. */
static struct shared {
    uint64_t seed[MAX_CORES];
    uint64_t seeds, values, cuts, ends, relayed; /* relayed: operations */
} *shared;
static size_t slot; /* of shared->seed */

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

static void add_up(uint64_t *sum, uint64_t n) {
    __atomic_add_fetch(sum, n, __ATOMIC_RELAXED);
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

/* Must all arrive, once and in order? */
static bool is_strict(void) {
    return world.plan.strict && !world.forced && !world.over;
}

static bool rarely(size_t thousandths) {
    return thousandths && below(1000) < thousandths;
}

static const char *describe(const place *p) {
    static char texts[4][48];
    static unsigned turn;
    char *text = texts[turn++ % 4];
    snprintf(text, 48, "%s[%zu] of node %zu", kind_names[p->kind], p->index, p->node);
    if (p->root)
        snprintf(text, 48, "end[%zu] of %s[%zu] at node %zu", p->index, kind_names[p->root->kind], p->root->index,
                 p->node);
    return text;
}

/* --- nodes: memory and state -------------------------------------------------------------------------------------- */

static size_t running = MAX_NODES; /* the node that this process is now, or MAX_NODES */
static long fail_in;               /* so many allocations from now one fails; 0: none */

static bool may_alloc(void) {
    if (fail_in == 0 || --fail_in) return true;
    trace("    an allocation fails");
    world.no_memory = true;
    return false;
}

static void *node_alloc(size_t size) {
    block *b = may_alloc() ? (block *)malloc(sizeof *b + size) : NULL;
    if (!b) return NULL;
    CHECK(running < MAX_NODES);
    block *head = &world.nodes[running].blocks;
    b->size = size;
    b->prev = head;
    b->next = head->next;
    b->next->prev = head->next = b;
    return b + 1;
}

static void node_free(void *p) {
    if (!p) return;
    block *b = (block *)p - 1;
    b->prev->next = b->next;
    b->next->prev = b->prev;
    free(b);
}

/* From here on this process is that node. */
static void be(size_t n) {
    node *next = &world.nodes[n];
    next->touched = true;
    if (n == running) return;
    if (running < MAX_NODES) world.nodes[running].net = netchan__net;
    netchan__net = next->net;
    running = n;
}

static void lock_net(void) {
    pthread_mutex_lock(&netchan__net_lock);
}

static void unlock_net(void) {
    netchan__unlock_one(&netchan__net_lock);
}

/* --- values ------------------------------------------------------------------------------------------------------- */

static uint64_t number_of(const value *v) {
    return (uint64_t)(v - values) + 1;
}

static size_t max_message(size_t n) {
    size_t half = world.plan.max_memory[n] / 2;
    return half < MAX_MESSAGE ? half : MAX_MESSAGE;
}

/* A size of bytes; sometimes such that the encoded value is just about one fragment. */
static size_t draw_size(bool large) {
    if (!large) return 9 + below(chance(50) ? 500 : NETCHAN__FRAGMENT - 20);
    if (chance(20)) return NETCHAN__FRAGMENT - 8 + below(12);
    return world.plan.huge ? MAX_MESSAGE - 16 - below(60000) : 20000 + below(20000);
}

static netchan_value make_content(task *t, size_t i) {
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

/* The channel of which all ends are one: what is sent into any of them comes out at any other. */
static place *home_of(const place *p) {
    return p->root ? p->root : (place *)p;
}

/* A channel that a node has made, or an end of one; else one of a link, or an end of that. */
static bool is_family(const place *p) {
    return home_of(p)->kind == LOCAL;
}

/* Can processes use it that are not at the other side of its link? */
static bool is_shared(const place *p) {
    return is_family(p) || home_of(p)->given;
}

/* A listener's, of one peer. */
static bool is_aside(const place *p) {
    return p->kind >= OWN_SEND;
}

static bool is_live(const place *p, size_t n) {
    return p->ch && p->node == n && !p->dropped;
}

static bool is_gift(const place *p) {
    if (p->kind == LOCAL || p->kind == IMPORT) return true;
    return world.plan.link_ends && p->kind != DIRECT && !p->port->hub.hanging_up;
}

/* A channel whose end this node may give away, or NULL. */
static place *draw_gift(size_t n) {
    place *found[MAX_PLACES];
    size_t count = 0, ends = 0; /* those that are passed on stand first */
    for (int pass = 0; pass < 2; pass++) {
        for (size_t i = 0; i < world.place_count; i++) {
            place *p = &world.places[i];
            if ((p->kind == IMPORT) == (pass == 0) && is_gift(p) && is_live(p, n) && !p->ch->gone) found[count++] = p;
        }
        if (!pass) ends = count;
    }
    return count ? found[below(ends && chance(50) ? ends : count)] : NULL;
}

/* From now on others may have ends of it. */
static void give(place *p) {
    p->given = true;
    if (p->kind != LOCAL) world.links_given = true;
}

/* With some ends, or none. */
static netchan_value make_value(task *t, size_t i) {
    value *v = t->values[i];
    netchan_value *items = t->items[i];
    items[0] = make_content(t, i);
    if (!world.plan.ends || !chance(world.plan.ends)) return items[0];
    for (size_t most = 1 + below(MAX_ENDS); v->ends < most; v->ends++) {
        place *p = draw_gift(t->thread / THREADS);
        if (!p) break;
        bool receives = p->ch->may_receive && (!p->ch->may_send || chance(50));
        netchan *ch = netchan_retain(p->ch);
        items[1 + v->ends] = receives ? netchan_receiver(ch) : netchan_sender(ch);
        v->roots[v->ends] = home_of(p);
        v->receives[v->ends] = receives;
        give(home_of(p));
        trace("    with a %s end of %s", receives ? "receiver" : "sender", describe(p));
    }
    return v->ends ? netchan_array(items, 1 + v->ends) : items[0];
}

static value *identify(const netchan_value *whole) {
    const netchan_value *v = whole->type == NETCHAN_ARRAY ? netchan_at(whole, 0) : whole;
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
    return home_of(v->place)->cap == 0;
}

static bool dials(const port *p, size_t at) {
    for (size_t i = 0; i < p->route->addresses; i++)
        if (p->route->sites[i] == at) return true;
    return false;
}

/* Can what is sent into `from` be received at `at`? */
static bool leads_to(const place *from, const place *at) {
    from = home_of(from);
    at = home_of(at);
    if (from->kind == LOCAL || at->kind == LOCAL) return from == at;
    if (from->kind == WORK) return at->kind == END_RECV && dials(at->port, from->port->site);
    if (is_aside(from)) return at->kind == END_RECV && at->port == from->peer;
    if (at->kind == OWN_RECV) return from->kind == END_SEND && from->port == at->peer;
    return from->kind == END_SEND && at->kind == MERGE && dials(from->port, at->port->site);
}

/* Has any session ended, or begun to, or was a name taken back? */
static bool any_loss(void) {
    for (size_t i = 0; i < world.port_count; i++)
        if (world.ports[i].ends || world.ports[i].blind || world.ports[i].died) return true;
    return world.hung_up || world.revoked || world.over;
}

/* Whether a session was lost that this channel needs. */
static unsigned losses_of(const place *p) {
    if (is_shared(p)) return home_of(p)->given && any_loss();
    return p->port ? p->port->losses : 0;
}

typedef struct late_note {
    uint32_t *at, op;
} late_note;

static late_note late_notes[MAX_THREADS];
static size_t late_count;

/* The newest op whose value came this way: from a thread through a channel or an end, to a thread through another. */
static uint32_t *find_way(const value *v, const task *t, const place *at) {
    uint64_t key = ((v->place->index * MAX_THREADS + v->thread) * MAX_PLACES + at->index) * MAX_THREADS + t->thread + 1;
    size_t i = (size_t)(key * 0x9E3779B97F4A7C15u >> 51);
    for (; world.ways[i].key && world.ways[i].key != key; i = (i + 1) % MAX_WAYS)
        if (world.way_count + 1 >= MAX_WAYS) return NULL;
    if (!world.ways[i].key) world.way_count++;
    world.ways[i].key = key;
    return &world.ways[i].op;
}

/* May a value come late, as one of several peers had it early and gave it back? */
static bool may_be_late(const value *v) {
    return home_of(v->place)->kind == WORK && world.plan.early && world.plan.links > 1;
}

static void check_order_of_ends(const value *v, const task *t, const place *at) {
    uint32_t op = (uint32_t)v->op, *last = any_loss() || may_be_late(v) ? NULL : find_way(v, t, at);
    if (last && *last >= op)
        broken("value %llu of op %u was taken through %s after that of op %u", (ull)number_of(v), op, describe(at),
               *last);
    if (last) *last = op;
}

static void check_order(const value *v, const task *t, const place *at) {
    if (is_shared(at) || is_shared(v->place)) {
        check_order_of_ends(v, t, at);
        return;
    }
    bool parted = v->place->kind == WORK && world.parted && world.plan.links > 1;
    if (losses_of(v->place) || parted || may_be_late(v)) return; /* what a peer that goes gave back comes later */
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
    const node *n = &world.nodes[at->node];
    bool local = at->kind == LOCAL && v->place == at;
    if (local ? peer != 0 : peer == 0 || peer >= MAX_PEERS || !n->peers[peer])
        broken("a value came from peer %llu", (ull)peer);
    const place *from = home_of(v->place);
    if (at->kind == LOCAL || at->kind == IMPORT) return;
    if (is_aside(from) ? n->peers[peer] != from->port : n->peers[peer]->send != from)
        broken("a value came from another peer");
}

/* A reply names a request that was taken, and there is one for each. */
static void check_answer(value *v) {
    value *request = v->answers;
    if (!request) return;
    if (!request->taken) broken("the reply to value %llu came before it was taken", (ull)number_of(request));
    if (++request->answered > 1 && !request->again)
        broken("value %llu was answered twice", (ull)number_of(request));
}

static place *add_place(size_t n, place_kind kind, size_t cap, port *p, netchan *ch);
static bool has_places(void);

/* The channel is an end of that one, at this node; mostly it is kept. */
static void keep_end(size_t n, place *root, netchan *ch) {
    place *at = NULL;
    for (size_t i = 0; i < world.place_count; i++)
        if (world.places[i].ch == ch && world.places[i].node == n && world.places[i].kind != DIRECT)
            at = &world.places[i];
    if (at && home_of(at) != root) broken("an end of %s came as one of %s", describe(root), describe(at));
    if (!at && root->kind != LOCAL && (!ch->is_end || ch->credited)) return; /* its link was hung up */
    if (!at && !ch->is_end) broken("an end of %s came as a channel", describe(root));
    if (at && at->dropped) {
        netchan_retain(ch);
        at->dropped = false;
    }
    if (at || !has_places() || !chance(80)) return;
    if (netchan_cap(ch) != root->cap && root->kind == LOCAL)
        broken("an end of %s has capacity %zu", describe(root), netchan_cap(ch));
    at = add_place(n, IMPORT, root->cap, NULL, netchan_retain(ch));
    at->root = root;
    add_up(&shared->ends, 1);
    trace("    which is %s", describe(at));
}

static void take_ends(const value *v, const netchan_value *got, size_t n) {
    size_t count = got->type == NETCHAN_ARRAY ? netchan_count(got) - 1 : 0;
    if (count != v->ends) broken("value %llu came with %zu ends", (ull)number_of(v), count);
    for (size_t i = 0; i < count; i++) {
        const netchan_value *item = netchan_at(got, 1 + i);
        if (item->type != (v->receives[i] ? NETCHAN_RECEIVER : NETCHAN_SENDER))
            broken("value %llu came with an end of type %d", (ull)number_of(v), item->type);
        netchan *ch = netchan_as_chan(item);
        if (v->receives[i] ? !ch->may_receive : !ch->may_send) broken("an end came in the other direction");
        keep_end(n, v->roots[i], ch);
    }
}

static void take(task *t, place *at) {
    value *v = identify(&t->op.value);
    place *from = v->place;
    ull number = (ull)number_of(v);
    be(at->node);
    take_ends(v, &t->op.value, at->node);
    netchan_clear(&t->op.value);
    trace("    value %llu is taken by op %llu%s", number, (ull)t->op.id, t->op.redelivered ? " (again)" : "");
    if (!leads_to(from, at)) broken("value %llu was taken where it does not belong", number);
    if (v->fate == NEVER) broken("value %llu was taken, but its send did not happen", number);
    if (v->barred) broken("value %llu was taken, but its channel was closed before", number);
    if (v->op == t->op.id) broken("op %llu served itself", (ull)v->op);
    from = home_of(from);
    if (from->drained && !losses_of(from)) broken("value %llu was taken after ECLOSED", number);
    bool again = from->kind == WORK || is_shared(from) || is_aside(from) || world.links_given;
    if (t->op.redelivered && (!again || !from->cap || !any_loss() || world.plan.no_redelivery))
        broken("value %llu is marked as redelivered", number);
    if (t->op.redelivered && !v->large && !v->left) broken("value %llu never left, and is marked", number);
    v->home = at->kind == LOCAL;
    v->taken++;
    v->again += t->op.redelivered;
    at->received++;
    if (v->taken - v->again > 1) broken("value %llu was taken twice", number);
    if (v->taken == 1) from->taken++;
    if (v->taken == 1 && v->fate == SENT) from->held--;
    check_taker(v, t, at);
    check_order(v, t, at);
    check_answer(v);
    if (world.plan.shape == REQUESTS && at->kind == END_RECV) world.owed[t->thread] = v;
}

/* --- how operations end ------------------------------------------------------------------------------------------- */

static void check_held(const place *p) {
    bool lost = is_shared(p) ? losses_of(p) : p->port && (p->port->losses || p->port->unknown || world.no_memory);
    bool may_vanish = lost && (p->kind == END_SEND || world.plan.no_redelivery);
    if (world.links_given && any_loss()) return; /* somebody may have taken them away */
    if (is_shared(p) && !p->ch) return; /* they went with its node */
    if (p->cap && p->held > p->cap && !may_vanish) broken("%llu values are held by %s", (ull)p->held, describe(p));
}

static void sent(task *t, size_t i) {
    value *v = t->values[i];
    place *p = v->place, *home = home_of(p);
    uint64_t peer = t->op.peer;
    const port *to = peer < MAX_PEERS ? world.nodes[p->node].peers[peer] : NULL;
    v->fate = SENT;
    home->sent++;
    if (v->barred) broken("value %llu was sent, but its channel was closed before", (ull)number_of(v));
    if (is_rendezvous(v) && v->taken != 1)
        broken("value %llu was sent with OK and taken %u times", (ull)number_of(v), v->taken);
    if (!v->taken) home->held++;
    check_held(home);
    if (v->answers) world.owed[t->thread] = NULL;
    if (p->kind == LOCAL || p->kind == IMPORT) {
        if (peer ? !to : p->kind == IMPORT || (!p->cap && !v->home)) broken("a value went to peer %llu", (ull)peer);
        return;
    }
    if ((peer == 0) != (p->kind == LOCAL || ((p->kind == WORK || is_aside(p)) && p->cap)))
        broken("a value went to peer %llu from %s", (ull)peer, describe(p));
    if (peer && (!to || !leads_to(p, to->recv))) broken("a value went over another link");
}

/* Sessions of this place's port have ended: some operations on it may have ended as well. */
static bool had_ends(const place *p) {
    bool far = p->kind == END_SEND && world.links_given; /* who takes its values may be a third process, and be lost */
    if (is_shared(p) || is_aside(p) || far) return any_loss();
    return p->port && (p->port->ends || p->port->hub.hanging_up);
}

static void check_lost(const place *p, const char *result, bool may) {
    bool forbidden = is_shared(p) ? !home_of(p)->given || (is_strict() && !world.hung_up && !world.revoked)
                                  : is_strict() && !p->port->hub.hanging_up && p->ch->may_send &&
                                        !(is_aside(p) && (world.hung_up || p->port->losses));
    if (!may || forbidden) broken("an operation on %s ended with %s", describe(p), result);
}

/* May a send to one peer alone find that it is closed, though nobody has closed this channel? */
static bool is_shut_aside(const place *p) {
    p = home_of(p);
    if (!is_aside(p)) return false;
    for (size_t i = 0; i < world.place_count; i++) {
        const place *own = &world.places[i];
        if (own->kind == OWN_SEND && own->peer == p->peer && own->port == p->port && own->shut) return true;
    }
    return any_loss() || p->port->send->shut;
}

static void end_send(task *t, size_t i, int result) {
    value *v = t->values[i];
    place *p = v->place;
    const port *x = home_of(p)->port;
    bool shut = world.over || (x && x->hub.hanging_up);
    v->fate = NEVER;
    switch (result) {
    case NETCHAN_OK: sent(t, i); break;
    case NETCHAN_ECLOSED:
        if (!p->closed && !shut && !home_of(p)->shut && !is_shut_aside(p))
            broken("a send on an open channel, %s, ended with ECLOSED", describe(p));
        break;
    case NETCHAN_ETOOBIG:
        if ((p->kind == LOCAL && !p->given) || (!v->large && !(v->ends && world.plan.max_ends)))
            broken("a send on %s ended with ETOOBIG", describe(p));
        break;
    case NETCHAN_ELOST: check_lost(p, "ELOST", had_ends(p)); break;
    case NETCHAN_EUNKNOWN:
        v->fate = UNKNOWN;
        home_of(p)->unknown++;
        if (v->answers) world.owed[t->thread] = NULL;
        if (!v->large && !v->left) broken("value %llu never left, and its send ended with EUNKNOWN", (ull)number_of(v));
        check_lost(p, "EUNKNOWN", shut || losses_of(p) || (world.links_given && any_loss()));
        break;
    case NETCHAN_ENOMEM:
        if (!world.no_memory) broken("a send on %s ended with ENOMEM", describe(p));
        break;
    case NETCHAN_ENOPEER:
        if (p->kind != DIRECT || !any_loss()) broken("a send on %s ended with ENOPEER", describe(p));
        break;
    default: broken("a send on %s ended with %d", describe(p), result);
    }
    if (result != NETCHAN_OK && result != NETCHAN_EUNKNOWN && v->taken)
        broken("value %llu was taken, but its send ended with %d", (ull)number_of(v), result);
}

/* The channel that this listener has for that dialler alone, or NULL. */
static const place *aside_of(const port *dialler, const port *listener) {
    for (size_t i = 0; i < world.place_count; i++) {
        const place *p = &world.places[i];
        if (p->kind == OWN_SEND && p->peer == dialler && p->port == listener) return p;
    }
    return NULL;
}

/* Do the values from there come here, in a session that is the first of this port? */
static bool is_source(const place *from, const place *at) {
    if (from->kind == LOCAL) return true;
    const netchan__session *s = at->kind == IMPORT ? NULL : at->port->hub.session;
    if (from->kind == IMPORT || is_shared(from) || aside_of(at->port, from->port)) return false;
    return s && !at->port->ends && world.nodes[at->node].peers[s->peer.number]->send == from;
}

/* A receive ended with ECLOSED: a channel that leads here was closed, and nothing is left in it. */
static void check_closed(place *at) {
    bool found = false;
    if (world.over || (at->port && at->port->hub.hanging_up)) return;
    if ((is_aside(at) || is_shared(at)) && any_loss()) return;
    if (is_family(at)) {
        place *home = home_of(at);
        if (!home->shut) broken("a receive on an open channel, %s, ended with ECLOSED", describe(at));
        if (home->held && home->cap && home->ch && !losses_of(home))
            broken("a receive on %s ended with ECLOSED, but there are values", describe(at));
        home->drained = true;
        return;
    }
    for (size_t i = 0; i < world.place_count; i++) {
        place *from = &world.places[i];
        if ((!from->closed && !from->shut) || !leads_to(from, at)) continue;
        found = true;
        if (!from->ch || !is_source(from, at)) continue;
        if (from->held && from->cap && !losses_of(from))
            broken("a receive on %s ended with ECLOSED, but there are values", describe(at));
        from->drained = true;
    }
    if (!found) broken("a receive on an open channel, %s, ended with ECLOSED", describe(at));
}

static void end_receive(task *t, place *p, int result) {
    switch (result) {
    case NETCHAN_OK: take(t, p); break;
    case NETCHAN_ECLOSED: check_closed(p); break;
    case NETCHAN_ETOOBIG: /* what would have to pass a process twice, or has more ends than somebody on the way takes */
        if (!is_shared(p) || !(world.plan.large || world.plan.max_ends))
            broken("a receive on %s ended with ETOOBIG", describe(p));
        break;
    case NETCHAN_ELOST:
        check_lost(p, "ELOST", (p->kind == END_RECV || is_shared(p) || is_aside(p)) && had_ends(p));
        break;
    case NETCHAN_ENOMEM:
        if (!world.no_memory) broken("a receive on %s ended with ENOMEM", describe(p));
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

/* Looks at all operations that were ended by the last step; the receives of values first, as a sender's OK, or the end
 * of a channel, says that they are. */
static void observe(void) {
    for (int pass = 0; pass < 2; pass++)
        for (size_t i = 0; i < MAX_THREADS; i++) {
            task *t = world.tasks[i];
            if (!t || t->told || !netchan__is_finished(&t->op)) continue;
            bool takes = t->op.index >= 0 && !t->values[t->op.index] && t->op.result == NETCHAN_OK;
            if (takes || pass) tell(t);
        }
    for (; late_count; late_count--) {
        late_note *note = &late_notes[late_count - 1];
        if (*note->at < note->op) *note->at = note->op;
    }
}

/* --- tasks -------------------------------------------------------------------------------------------------------- */

static void free_task(task *t) {
    for (size_t i = 0; i < t->op.count; i++) free(t->bytes[i]);
    world.tasks[t->thread] = NULL;
    free(t);
}

static bool is_in_use(const place *p) {
    for (size_t i = 0; i < MAX_THREADS; i++)
        for (size_t j = 0; world.tasks[i] && j < world.tasks[i]->op.count; j++)
            if (world.tasks[i]->places[j] == p) return true;
    return false;
}

/* An end that was dropped is gone with the last task that used it. */
static void forget_place(place *p) {
    if (p->dropped && !is_in_use(p)) p->ch = NULL;
}

static void leave(task *t) {
    for (size_t i = 0; i < t->op.count; i++) {
        netchan__waiter *w = &t->waiters[i];
        if (w->queue || w->match || w->claim || w->id || w->peer)
            broken("op %llu is over, but case %zu is not", (ull)t->op.id, i);
        netchan_clear(&w->value);
        netchan_free(t->held[i]);
        for (size_t j = 0; t->values[i] && j < t->values[i]->ends; j++) netchan_free(t->items[i][1 + j].as.chan);
    }
    place *places[MAX_CASES];
    size_t count = t->op.count;
    memcpy(places, t->places, sizeof places);
    free_task(t);
    for (size_t i = 0; i < count; i++)
        if (places[i]) forget_place(places[i]);
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
    if (!netchan__is_finished(&t->op)) netchan__expire(&t->op);
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
    t->held[i] = p ? netchan_retain(p->ch) : NULL;
    t->cases[i] = netchan_case_recv(p ? p->ch : NULL, NULL);
    t->waiters[i].to = p ? p->to : 0;
    if (p && is_send) {
        value *v = &values[world.value_count++];
        memset(v, 0, sizeof *v);
        v->place = p;
        v->thread = t->thread;
        v->op = t->op.id;
        v->barred = p->closed || (is_shared(p) && p->ch->closing);
        t->values[i] = v;
        t->cases[i] = netchan_case_send(p->ch, make_value(t, i));
    }
    trace("    %s %s, value %llu", is_send ? "send to" : "receive from", p ? describe(p) : "nil",
          (ull)(p && is_send ? number_of(t->values[i]) : 0));
}

/* As netchan__operate() begins. */
static void run_task(task *t) {
    int result = NETCHAN_OK;
    be(t->thread / THREADS);
    for (size_t i = 0; i < t->op.count && result == NETCHAN_OK; i++) {
        netchan__waiter *w = &t->waiters[i];
        w->op = &t->op;
        w->op_id = t->op.id;
        w->index = i;
        w->multi = t->op.count > 1;
        w->firm = t->op.count == 1 && t->timeout_ms < 0;
        w->is_try = t->timeout_ms == 0;
        result = netchan__prepare(w, &t->cases[i]);
        if (t->values[i]) t->values[i]->large = w->size > NETCHAN__FRAGMENT;
    }
    if (result == NETCHAN_OK) {
        launch(t);
        return;
    }
    if (result != NETCHAN_ENOMEM || !world.no_memory) broken("a case cannot be prepared: %s", netchan_errmsg());
    for (size_t i = 0; i < t->op.count; i++)
        if (t->values[i]) t->values[i]->fate = NEVER;
    leave(t);
}

/* Does this thread use this channel, by what the threads of this run do? */
static bool is_used(const place *p, size_t thread) {
    bool even = thread % 2 == 0, owes = world.owed[thread] != NULL;
    switch (world.plan.shape) {
    case MIXED: case ENDS: break;
    case STREAMS: return p->kind != LOCAL && p->ch->may_send == even;
    case WORKERS: return p->kind == WORK || p->kind == END_RECV;
    case SUCCESSION: return p->kind == MERGE || p->kind == END_SEND;
    case REQUESTS:
        if (p->kind == WORK) return even && !owes;
        if (p->kind == MERGE) return !even;
        return p->kind == (owes ? END_SEND : END_RECV);
    }
    return true;
}

/* The channels of its node that a thread may use. Returns how many. */
static size_t find_usable(size_t thread, place **usable) {
    size_t count = 0;
    for (size_t i = 0; i < world.place_count; i++) {
        place *p = &world.places[i];
        if (!is_live(p, thread / THREADS) || (p->port && p->port->stopping)) continue;
        if (is_used(p, thread)) usable[count++] = p;
    }
    return count;
}

/* One of these by which somebody who waits can be reached; NULL: by chance there is none. */
static place *draw_partner(place **usable, size_t count, bool *is_send) {
    const task *t = world.tasks[below(MAX_THREADS)];
    if (!t || t->told || !t->op.count) return NULL;
    size_t i = below(t->op.count);
    place *at = t->places[i];
    *is_send = !t->values[i];
    for (size_t tries = 0; at && tries < 2 * count; tries++) {
        place *p = usable[below(count)];
        if (*is_send ? p->ch->may_send && leads_to(p, at) : p->ch->may_receive && leads_to(at, p)) return p;
    }
    return NULL;
}

/* One of these, mostly one of those that lead somewhere. */
static place *draw_place(place **usable, size_t count, bool *is_send) {
    place *p = NULL;
    for (int i = 0; i < 5 && !p && chance(80); i++) p = draw_partner(usable, count, is_send);
    if (p) return p;
    p = usable[below(count)];
    for (int i = 0; i < 4 && ((p->kind == LOCAL && !p->given) || p->ch->gone); i++) p = usable[below(count)];
    for (int i = 0; i < 2 && p->kind != IMPORT; i++) p = usable[below(count)];
    *is_send = p->ch->may_send && (!p->ch->may_receive || chance(50));
    return p;
}

static void start(size_t thread) {
    place *usable[MAX_PLACES];
    size_t count = find_usable(thread, usable);
    if (!count || world.value_count + MAX_CASES > MAX_VALUES) return;
    bool nowait = chance(world.plan.nowait), finite = chance(world.plan.finite);
    task *t = make_task(thread, nowait ? 0 : finite ? 1000 : NETCHAN_FOREVER);
    size_t cases = chance(world.plan.selects) ? 2 + below(MAX_CASES - 1) : 1;
    trace("node %zu, thread %zu: op %llu begins, %s", thread / THREADS, thread % THREADS, (ull)t->op.id,
          nowait ? "without waiting" : finite ? "for a time" : "for ever");
    for (size_t i = 0; i < cases; i++) {
        place *p = i && chance(3) ? NULL : usable[below(count)];
        bool is_send = p && p->ch->may_send && (!p->ch->may_receive || chance(50));
        if (p && world.plan.ends) p = draw_place(usable, count, &is_send);
        if (p && p->kind == DIRECT && cases > 1) p = p->port->send;
        if (p && p->kind == END_RECV && world.plan.early)
            p->ch->wanted = chance(world.plan.early) ? 1 + below(NETCHAN__EARLY_MOST) : 0;
        add_case(t, p, is_send);
        if (p && p->kind == END_SEND && t->op.count == 1 && cases == 1) t->values[0]->answers = world.owed[thread];
    }
    run_task(t);
}

/* What has begun to be sent on a channel that is being closed may still happen; what only waits may not. */
static void bar_waiting(const place *p) {
    for (size_t i = 0; i < MAX_THREADS; i++) {
        task *t = world.tasks[i];
        for (size_t j = 0; t && !t->told && j < t->op.count; j++) {
            const netchan__waiter *w = &t->waiters[j];
            bool over = netchan__state(&t->op) >= NETCHAN__COMMITTED; /* its thread is not told yet */
            bool begun = w->match || w->id || t->op.engaged == w || over; /* a home may have claimed what it knows */
            if (t->places[j] == p && t->values[j] && !begun) t->values[j]->barred = true;
        }
    }
}

static void close_place(place *p) {
    trace("%s is closed", describe(p));
    be(p->node);
    bar_waiting(p);
    p->closed = home_of(p)->shut = true;
    bool others = is_shared(p) || is_aside(p); /* may have closed it */
    int result = others && p->ch->closing ? NETCHAN_ECLOSED : NETCHAN_OK;
    if (netchan_close(p->ch) != result) broken("netchan_close: %s", netchan_errmsg());
    if (netchan_close(p->ch) != NETCHAN_ECLOSED) broken("a channel was closed twice");
}

/* --- links: pipes of memory --------------------------------------------------------------------------------------- */

static side *other_side(side *x) {
    return &x->conn->sides[x == &x->conn->sides[0]];
}

static const char *name_of(const side *x) {
    static char texts[4][48];
    static unsigned turn;
    char *text = texts[turn++ % 4];
    snprintf(text, 48, "link %td, %s (node %zu)", x->conn - world.conns,
             x == &x->conn->sides[0] ? "dialler" : "listener", x->port->node);
    return text;
}

static size_t waiting(const side *x) {
    return x->in_end - x->in_begin;
}

/* A record begins its way to this side. */
static void put_record(side *x, const uint8_t *data, size_t size) {
    if (!x->open || x->cut) return;
    if (x->in_begin == x->in_end) x->in_begin = x->in_end = 0;
    while (x->in_cap - x->in_end < size + 4) {
        x->in_cap = x->in_cap ? 2 * x->in_cap : 1024;
        x->in = (uint8_t *)realloc(x->in, x->in_cap);
        CHECK(x->in != NULL);
    }
    netchan__store(x->in + x->in_end, size, 4);
    memcpy(x->in + x->in_end + 4, data, size);
    x->in_end += size + 4;
}

/* Some of the bytes that are on their way to this side are lost, and all that would come later. */
static void cut(side *x, bool eof) {
    if (!x->open || x->cut) return;
    if (waiting(x) && chance(70)) x->in_end -= below(waiting(x) + 1);
    x->cut = true;
    x->eof = eof;
}

static const char *frame_name(unsigned type) {
    static const char *const first[] = {"HELLO", "PING", "PONG", "BYE", "ACK", "RESUME", "RESUMED", "REFUSED"};
    static const char *const to_home[] = {"OFFER", "DEMAND", "WITHDRAW", "GRANT", "DECLINE", "TAKEN", "DATA",
        "CLOSE", "FRAGMENT", "DROP", "IMPORT", "FORGET"};
    static const char *const from_home[] = {"CLAIM", "COMMIT", "RELEASE", "ACCEPT", "WITHDRAWN", "CREDIT", "CLOSED",
        "RETURN", "FRAGMENT", "CLOSING", "GONE", "IMPORTED"};
    if (type >= NETCHAN__HELLO && type <= NETCHAN__REFUSED) return first[type - NETCHAN__HELLO];
    if (type >= NETCHAN__OFFER && type <= NETCHAN__FORGET) return to_home[type - NETCHAN__OFFER];
    if (type >= NETCHAN__CLAIM && type <= NETCHAN__IMPORTED) return from_home[type - NETCHAN__CLAIM];
    return "a frame";
}

/* The value that begins with these encoded bytes. */
static value *peek(netchan__reader r) {
    const uint8_t *tag = netchan__read_bytes(&r, 1);
    if (tag && *tag == 0x88) { /* with ends */
        netchan__read_varint(&r);
        netchan__read_varint(&r);
        tag = netchan__read_bytes(&r, 1);
    }
    uint64_t number = tag && *tag < 0x40 ? *tag : netchan__read_varint(&r); /* a small number, a number, or a size */
    if (tag && *tag == 0x87 && netchan__left(&r) >= 8) number = netchan__load(r.p, 8);
    if (r.bad || number < 1 || number > world.value_count) broken("a record with a value that nobody sent");
    return &values[number - 1];
}

/* The values in this record leave their node. */
static void note_left(const uint8_t *data, size_t size) {
    netchan__reader r = {data, data + size, false};
    while (netchan__left(&r)) {
        uint64_t length = netchan__read_varint(&r), ignored;
        netchan__reader body = {r.p + 1, r.p + length, false};
        const char *fields = netchan__frame_fields(*r.p);
        r.p += length;
        uint64_t flags = 0;
        for (; fields && *fields && *fields != 'v' && *fields != 'b'; fields++) {
            if (*fields == 'p' && flags & NETCHAN__RELAYED) {
                netchan__read_bytes(&body, 16);
                add_up(&shared->relayed, 1);
            }
            if (*fields == 'p') continue;
            ignored = netchan__read_varint(&body);
            if (*fields == 'f') flags = ignored;
        }
        if (fields && *fields == 'v' && netchan__left(&body)) peek(body)->left = true;
    }
}

static void trace_record(const side *x, const uint8_t *data, size_t size) {
    netchan__reader r = {data, data + size, false};
    while (tracing && netchan__left(&r) && !r.bad) {
        uint64_t length = netchan__read_varint(&r);
        netchan__reader body = {r.p + 1, r.p + length, false};
        char text[200];
        int n = snprintf(text, sizeof text, "    %s: %s", name_of(x), frame_name(*r.p));
        const char *fields = netchan__frame_fields(*r.p);
        if (!fields && *r.p >= NETCHAN__PING && *r.p <= NETCHAN__RESUMED) fields = *r.p == NETCHAN__RESUME ? "fn" : "n";
        if (*r.p == NETCHAN__RESUME) netchan__read_bytes(&body, 16);
        uint64_t flags = 0;
        for (; fields && *fields && *fields != 'v' && *fields != 'b'; fields++) {
            if (*fields == 'p' && flags & NETCHAN__RELAYED) netchan__read_bytes(&body, 16);
            if (*fields == 'p') continue;
            uint64_t number = netchan__read_varint(&body);
            if (*fields == 'f') flags = number;
            n += snprintf(text + n, sizeof text - (size_t)n, " %c %llu", *fields, (ull)number);
        }
        if (netchan__left(&body)) snprintf(text + n, sizeof text - (size_t)n, ", %zu bytes", netchan__left(&body));
        trace("%s", text);
        r.p += length;
    }
}

/* One record goes from the wire to the link. Returns false when there was none, or no room for it. */
static bool pump(side *x) {
    static uint8_t record[NETCHAN__FRAME_MAX];
    side *y = other_side(x);
    if (!x->open || !x->writes || (!y->cut && waiting(y) >= world.plan.full)) return false;
    be(x->port->node);
    lock_net();
    size_t size = netchan__wire_output(&x->wire, record, NULL);
    unlock_net();
    if (!size) x->writes = false;
    if (!size) return false;
    trace_record(x, record, size);
    note_left(record, size);
    put_record(y, record, size);
    return true;
}

/* The sessions that begin in this step lead to the other side's port. */
static void note_peers(side *x, uint64_t before) {
    node *n = &world.nodes[x->port->node];
    for (uint64_t i = before + 1; i <= netchan__net.last_peer && i < MAX_PEERS; i++) n->peers[i] = other_side(x)->port;
}

/* The greeting may be over, see netchan__note_up(). */
static void note_up(side *x) {
    if (!x->stranger || !x->wire.up) return;
    x->stranger = false;
    if (x->port->trial != x) return;
    x->port->trial = NULL;
    x->port->failures = 0;
    x->port->tried = 0;
}

/* So many bytes arrive, each time at most the rest of a record. */
static void deliver(side *x, size_t size) {
    be(x->port->node);
    trace("%s: %zu of %zu bytes arrive", name_of(x), size < waiting(x) ? size : waiting(x), waiting(x));
    lock_net();
    while (size && !netchan__wire_over(&x->wire)) {
        uint64_t peers = netchan__net.last_peer;
        if (!x->record && waiting(x) <= 4) break; /* the rest was cut off */
        if (!x->record) {
            x->record = (size_t)netchan__load(x->in + x->in_begin, 4);
            x->in_begin += 4;
        } else x->wire.records_in--; /* records are counted, not pieces of them */
        size_t piece = size < x->record ? size : x->record;
        if (piece > waiting(x)) piece = waiting(x);
        if (!piece) break;
        netchan__wire_input(&x->wire, world.now, x->in + x->in_begin, piece);
        x->in_begin += piece;
        x->record -= piece;
        size -= piece;
        note_peers(x, peers);
        note_up(x);
    }
    unlock_net();
}

/* --- connections: what section [17] does -------------------------------------------------------------------------- */

/* As netchan__schedule_dial(). */
static void schedule_dial(port *p) {
    netchan__hub *h = &p->hub;
    if (++p->tried >= h->addresses && h->session && h->session->refused && !h->session->wire)
        netchan__end_session(h->session, "no address leads to who knows the session");
    if (++p->which < h->addresses) return;
    p->which = 0;
    uint64_t wait = (uint64_t)NETCHAN__BACKOFF_MIN_MS << (p->failures < 7 ? p->failures : 7);
    uint64_t most = h->session && h->options.resume_ms > 0 ? (uint64_t)h->options.resume_ms / 16 : UINT64_MAX;
    if (most > NETCHAN__BACKOFF_MAX_MS) most = NETCHAN__BACKOFF_MAX_MS;
    if (wait > most) wait = most;
    p->failures++;
    p->next_dial = world.now + (wait / 2 + below((size_t)wait + 1)) * MS;
}

/* As netchan__close_conn(). Caller holds netchan__net_lock, as this side's node. */
static void close_side(side *x, const char *reason) {
    port *p = x->port;
    netchan__hub *h = &p->hub;
    bool serves = x->wire.session != NULL, lost = x->wire.up && !serves && h->dials && !h->session;
    trace("%s closes: %s", name_of(x), reason);
    netchan__wire_down(&x->wire, world.now, reason);
    if (x->stranger && p->trial == x) {
        p->trial = NULL;
        schedule_dial(p);
    } else if (lost) schedule_dial(p);
    else if (serves && h->dials) {
        p->tried = 0;
        p->next_dial = x->wire.moved ? world.now : world.now + below(NETCHAN__BACKOFF_MIN_MS * MS);
    }
    x->open = false;
    free(x->in);
    x->in = NULL;
    cut(other_side(x), true);
}

/* As netchan__close_failed(). */
static bool close_failed(side *x) {
    netchan__wire *w = &x->wire;
    if (!w->failure) return false;
    if (!x->closing) {
        x->closing = true;
        x->deadline = world.now + (uint64_t)NETCHAN__FLUSH_MS * MS;
        snprintf(x->reason, sizeof x->reason, "%s", w->failure);
    }
    if (w->flush && !netchan__wire_idle(w) && world.now < x->deadline) return false;
    close_side(x, x->reason);
    return true;
}

/* As netchan__conn_ready(): up to `size` bytes are read, and up to `records` written. Returns whether anything
 * happened. */
static bool serve_side(side *x, size_t size, size_t records) {
    bool moved = false, alive = true;
    bool reads = !x->wire.paused || chance(30); /* what comes for a paused link must do no harm */
    if (!x->closing && reads && world.now >= x->stalled) {
        if (size && waiting(x)) {
            size_t had = waiting(x);
            deliver(x, size);
            moved = x->writes = waiting(x) != had;
        }
        bool end = !x->wire.paused && waiting(x) <= (x->record ? 0 : 4);
        if (end && x->eof) alive = false;
    }
    be(x->port->node);
    lock_net();
    netchan__session *s = x->wire.session;
    if (s && s->peer.breach) netchan__end_session(s, s->peer.breach);
    else if (s) netchan__check_farewell(s);
    unlock_net();
    while (alive && records-- && pump(x)) moved = true;
    lock_net();
    if (!close_failed(x) && !alive) close_side(x, "it closed the connection");
    unlock_net();
    return moved || !x->open;
}

/* The sessions that have something new to send tell their links, as netchan__send_pending(). */
static void note_pending(void) {
    while (netchan__net.pending) {
        netchan__session *s = netchan__net.pending;
        netchan__net.pending = s->next_pending;
        s->is_pending = false;
        if (s->wire && !s->wire->paused) ((side *)s->wire->owner)->writes = true;
    }
    netchan__net.wake = false;
}

static void open_side(conn *c, int which, port *p) {
    side *x = &c->sides[which];
    memset(x, 0, sizeof *x);
    x->conn = c;
    x->port = p;
    x->open = x->stranger = x->writes = true;
    x->deadline = world.now + (uint64_t)NETCHAN__HANDSHAKE_MS * MS;
    x->wire.owner = x;
    snprintf(x->wire.address, sizeof x->wire.address, "node %zu", p->node);
}

/* Whether somebody accepts connections at this port, see netchan__accepts(). */
static bool accepts(const port *p) {
    return p->open && !p->hub.dials && !p->stopping && (!p->hub.hanging_up || p->hub.peers);
}

/* Who accepts at an address: if several listen there, as one hangs up and has a successor, one of them by chance. */
static port *find_listener(size_t at) {
    port *found[MAX_PORTS];
    size_t n = 0;
    for (size_t i = 0; i < world.port_count; i++)
        if (!world.ports[i].hub.dials && world.ports[i].site == at && accepts(&world.ports[i]))
            found[n++] = &world.ports[i];
    return n ? found[below(n)] : NULL;
}

static conn *find_conn(void) {
    for (size_t i = 0; i < MAX_CONNS; i++)
        if (!world.conns[i].sides[0].open && !world.conns[i].sides[1].open) return &world.conns[i];
    return NULL;
}

static void start_wire(side *x) {
    be(x->port->node);
    lock_net();
    netchan__wire_start(&x->wire, &x->port->hub, world.now);
    unlock_net();
}

/* As netchan__dial_now(), with TLS done at once. */
static void dial_now(port *p) {
    port *to = find_listener(p->route->sites[p->which % p->route->addresses]);
    conn *c = find_conn();
    bool full = netchan__net.last_peer + 2 >= MAX_PEERS;
    if (!to || !c || full || world.nodes[to->node].net.last_peer + 2 >= MAX_PEERS) {
        lock_net();
        schedule_dial(p);
        unlock_net();
        return;
    }
    trace("node %zu dials node %zu: link %td", p->node, to->node, c - world.conns);
    open_side(c, 0, p);
    open_side(c, 1, to);
    for (size_t i = 0; i < 32; i++) c->sides[0].wire.binding[i] = c->sides[1].wire.binding[i] = (uint8_t)draw();
    for (size_t i = 0; i < 48; i++) c->sides[1].wire.fresh[i] = (uint8_t)draw();
    memset(c->sides[0].wire.identity, (int)to->site + 1, 32); /* the key of a site, of a link */
    memset(c->sides[1].wire.identity, (int)(p->route - world.links) + 101, 32);
    p->trial = &c->sides[0];
    start_wire(&c->sides[1]);
    start_wire(&c->sides[0]);
}

/* --- ports: links as their users see them ------------------------------------------------------------------------- */

static size_t draw_capacity(void) {
    static const size_t capacities[] = {0, 0, 0, 1, 1, 2, 5, 20};
    return capacities[below(8)];
}

static place *add_place(size_t n, place_kind kind, size_t cap, port *p, netchan *ch) {
    place *at = &world.places[world.place_count];
    CHECK(world.place_count < MAX_PLACES && ch != NULL);
    at->index = world.place_count++;
    at->kind = kind;
    at->node = n;
    at->cap = cap;
    at->port = p;
    at->ch = ch;
    trace("%s, capacity %zu", describe(at), cap);
    return at;
}

/* As netchan_listen(), for which l is NULL, and netchan_dial(). */
static port *open_port(size_t n, route *l, size_t at) {
    port *p = &world.ports[world.port_count];
    netchan_options o;
    if (world.port_count >= MAX_PORTS) return NULL;
    memset(&o, 0, sizeof o);
    o.buffer = world.plan.buffered ? 1 + below(20) : draw_capacity();
    o.max_message = max_message(n);
    o.max_memory = world.plan.max_memory[n];
    o.max_ops = 1000;
    o.max_ends = world.plan.max_ends;
    o.ping_ms = world.plan.ping_ms;
    o.resume_ms = world.plan.resume_ms;
    o.no_redelivery = world.plan.no_redelivery;
    fail_in = 0;
    be(n);
    p->index = world.port_count++;
    p->node = n;
    p->site = at;
    p->route = l;
    p->open = true;
    p->hub.link.address = "sim";
    CHECK_INT(netchan__hub_make(&p->hub, &o, l != NULL), NETCHAN_OK);
    if (l) p->hub.addresses = l->addresses;
    trace("node %zu %s: port %zu", n, l ? "dials" : "listens", p->index);
    p->send = add_place(n, l ? END_SEND : WORK, o.buffer, p, p->hub.link.send);
    p->recv = add_place(n, l ? END_RECV : MERGE, 0, p, p->hub.link.recv);
    if (l) l->port = p;
    else world.sites[at].port = p;
    return p;
}

static void open_route(route *l) {
    if (!l->port && world.nodes[l->node].alive) open_port(l->node, l, 0);
}

static void open_site(size_t i) {
    if (!world.sites[i].port && world.nodes[world.sites[i].node].alive) open_port(world.sites[i].node, NULL, i);
}

/* Why a session may be lost. Anything else says that somebody broke the protocol. */
static void check_reason(const char *reason) {
    static const char *const always[] = {"hung up", "did not come back", "is not known", "no address leads",
        "is hanging up", "the simulator says so"};
    for (size_t i = 0; i < sizeof always / sizeof *always; i++)
        if (strstr(reason, always[i])) return;
    if (world.no_memory && strstr(reason, "memory")) return;
    if (!world.plan.strict && strstr(reason, "does not answer")) return; /* a select that is engaged elsewhere */
    broken("a session was lost: %s", reason);
}

/* A session has ended. */
static void note_end(port *p, const netchan_value *event, const char *reason, bool drained) {
    p->taken += netchan_as_uint(netchan_get(event, "taken"), 0);
    p->unknown += netchan_as_uint(netchan_get(event, "unknown"), 0);
    if (is_strict() && netchan_as_uint(netchan_get(event, "unknown"), 0))
        broken("a value is unknown, though links only broke");
    p->ends++;
    p->losses += !drained;
    p->arrives = drained && p->hub.dials && p->hub.hanging_up;
    /* Its dialler never got the answer to its HELLO, or got it when all was over. */
    bool ghost = (!p->hub.dials || p->stopping) && strstr(reason, "hung up");
    if (is_strict() && !drained && !ghost) broken("a session was lost though links only broke");
}

static void read_events(port *p) {
    while (p->open && netchan__held(&p->hub.link.events->lane)) {
        netchan_value event;
        be(p->node);
        CHECK_INT(netchan_recv(p->hub.link.events, &event, NETCHAN_NOWAIT), NETCHAN_OK);
        const char *name = netchan_as_str(netchan_get(&event, "event"), "");
        const char *reason = netchan_as_str(netchan_get(&event, "reason"), "");
        trace("    port %zu: %s %llu: %s; taken %llu, returned %llu, unknown %llu", p->index, name,
              (ull)netchan_as_uint(netchan_get(&event, "peer"), 0), reason,
              (ull)netchan_as_uint(netchan_get(&event, "taken"), 0),
              (ull)netchan_as_uint(netchan_get(&event, "returned"), 0),
              (ull)netchan_as_uint(netchan_get(&event, "unknown"), 0));
        bool lost = strcmp(name, "lost") == 0, drained = strcmp(name, "drained") == 0;
        if (lost && !world.over) check_reason(reason);
        p->resumes += strcmp(name, "resumed") == 0;
        if (netchan_get(&event, "dropped")->type != NETCHAN_NIL) p->blind = true;
        if (lost || drained) note_end(p, &event, reason, drained);
        netchan_clear(&event);
    }
    if (!p->open || !p->hub.events_dropped) return;
    p->blind = true;
    p->ends++;
    p->losses = (unsigned)p->hub.stats.lost;
}

static void read_all_events(void) {
    for (size_t i = 0; i < world.port_count; i++) read_events(&world.ports[i]);
}

static bool has_sides(const port *p) {
    for (size_t i = 0; i < 2 * MAX_CONNS; i++) {
        const side *x = &world.conns[i / 2].sides[i % 2];
        if (x->open && x->port == p) return true;
    }
    return false;
}

/* As the end of netchan_hangup(). */
static void close_port(port *p) {
    be(p->node);
    lock_net();
    p->report = netchan__hub_close(&p->hub);
    p->reported = true;
    p->open = false;
    unlock_net();
    trace("port %zu is closed: undelivered %zu, unknown %zu, unreceived %zu", p->index, p->report.undelivered,
          p->report.unknown, p->report.unreceived);
    read_all_events();
    observe();
    netchan__hub_free(&p->hub);
    for (size_t i = 0; i < world.place_count; i++)
        if (world.places[i].port == p && world.places[i].kind == DIRECT) world.places[i].ch = NULL;
    p->send->ch = p->recv->ch = NULL;
    if (p->route) p->route->port = NULL;
    else if (world.sites[p->site].port == p) world.sites[p->site].port = NULL;
}

/* As netchan_hangup() begins. linger: nanoseconds. */
static void end_import(port *p);

static void hang_up(port *p, uint64_t linger) {
    if (p->hub.hanging_up) return;
    if (p->wanted) end_import(p);
    trace("port %zu hangs up", p->index);
    world.hung_up = true;
    be(p->node);
    lock_net();
    p->hub.hanging_up = true;
    p->linger = linger;
    if (p->hub.dials) world.parted = true;
    if (p->hub.dials) netchan__shut_link(&p->hub);
    unlock_net();
    note_pending();
}

/* As netchan__drain() and netchan__stop_endpoint(). */
static void go_on_hanging_up(port *p) {
    netchan__hub *h = &p->hub;
    be(p->node);
    if (!p->stopping) {
        lock_net();
        bool done = netchan__drained(h) || world.now >= p->linger;
        if (done && !h->shut) netchan__shut_link(h);
        unlock_net();
        note_pending();
        if (!done) return;
        lock_net();
        p->stopping = true;
        netchan__hub_stop(h);
        unlock_net();
        note_pending();
        read_all_events();
        observe();
    }
    if (!has_sides(p)) close_port(p);
}

/* --- time --------------------------------------------------------------------------------------------------------- */

/* As netchan__tick_conn(). Caller holds netchan__net_lock. */
static void tick_side(side *x) {
    netchan__wire *w = &x->wire;
    if (w->failure && w->flush && !netchan__wire_idle(w)) {
        x->writes = true;
        unlock_net();
        serve_side(x, 0, 1);
        lock_net();
        return;
    }
    if (close_failed(x) || x->closing) return;
    if (!x->stranger) {
        netchan__wire_tick(w, world.now);
        close_failed(x);
    } else if (x->port->stopping) close_side(x, "this side hung up");
    else if (world.now >= x->deadline) close_side(x, "it did not finish the handshake in time");
}

/* As netchan__tick(). A select that is engaged elsewhere does not answer claims, however long that takes: in a strict
 * run nobody loses patience with it. */
static void tick_node(size_t n) {
    be(n);
    lock_net();
    netchan__net.breached = false;
    if (world.now >= world.nodes[n].next_check && !world.plan.strict) {
        netchan__check_claims(world.now);
        world.nodes[n].next_check = world.now + (uint64_t)NETCHAN__CHECK_MS * MS;
    }
    for (size_t i = 0; i < 2 * MAX_CONNS; i++) { /* before a dial, which pauses a link only when TLS is done */
        side *x = &world.conns[i / 2].sides[i % 2];
        if (x->open && x->port->node == n) tick_side(x);
    }
    for (size_t i = 0; i < world.port_count; i++) {
        port *p = &world.ports[i];
        if (!p->open || p->node != n) continue;
        netchan__hub_tick(&p->hub, world.now);
        if (p->stopping) netchan__hub_stop(&p->hub);
        if (!netchan__hub_wants_wire(&p->hub) || p->stopping || p->trial || world.now < p->next_dial) continue;
        unlock_net();
        dial_now(p);
        be(n);
        lock_net();
    }
    unlock_net();
    note_pending();
    for (size_t i = 0; i < world.port_count; i++) {
        port *p = &world.ports[i];
        if (p->open && p->node == n && p->hub.hanging_up) go_on_hanging_up(p);
    }
}

/* --- what goes wrong ---------------------------------------------------------------------------------------------- */

/* A side whose connection is open, or NULL. */
static side *draw_side(void) {
    side *open[2 * MAX_CONNS];
    size_t n = 0;
    for (size_t i = 0; i < 2 * MAX_CONNS; i++)
        if (world.conns[i / 2].sides[i % 2].open) open[n++] = &world.conns[i / 2].sides[i % 2];
    return n ? open[below(n)] : NULL;
}

/* A link breaks: both sides learn it when they have read what came before; or one learns it at once; or it is half
 * open, in one direction or in both, and only silence tells. */
static void break_link(void) {
    side *x = draw_side();
    if (!x) return;
    size_t how = below(4);
    trace("%s: the link breaks, %zu", name_of(x), how);
    add_up(&shared->cuts, 1);
    if (how < 3) cut(x, how == 0);
    if (how < 2) cut(other_side(x), how == 0);
    if (how < 3) return;
    be(x->port->node);
    lock_net();
    close_side(x, "the connection broke");
    unlock_net();
}

/* The process ends; nobody there says anything any more. */
static void kill_node(size_t n) {
    trace("node %zu dies", n);
    world.hung_up = true;
    be(n);
    for (size_t i = 0; i < 2 * MAX_CONNS; i++) {
        side *x = &world.conns[i / 2].sides[i % 2];
        if (!x->open || x->port->node != n) continue;
        x->open = false;
        x->wire.session = NULL;
        free(x->in);
        x->in = NULL;
        cut(other_side(x), chance(70));
    }
    for (size_t i = n * THREADS; i < (n + 1) * THREADS; i++) {
        task *t = world.tasks[i];
        for (size_t j = 0; t && !t->told && j < t->op.count; j++)
            if (t->values[j]) t->values[j]->fate = UNKNOWN;
        if (t) free_task(t);
        world.owed[i] = NULL;
    }
    for (size_t i = 0; i < world.place_count; i++)
        if (world.places[i].node == n) world.places[i].ch = NULL;
    for (size_t i = 0; i < world.port_count; i++) {
        port *p = &world.ports[i];
        if (!p->open || p->node != n) continue;
        p->open = false;
        p->died = true;
        free(p->wanted);
        p->wanted = NULL;
        if (p->route) p->route->port = NULL;
        else if (world.sites[p->site].port == p) world.sites[p->site].port = NULL;
    }
    block *head = &world.nodes[n].blocks;
    while (head->next != head) node_free(head->next + 1);
    memset(&netchan__net, 0, sizeof netchan__net);
    world.nodes[n].alive = false;
}

/* Is there room for another place, beside those of all ports to come? */
static bool has_places(void) {
    return world.place_count + 2 * (MAX_PORTS - world.port_count) < MAX_PLACES;
}

static void start_node(size_t n) {
    node *x = &world.nodes[n];
    fail_in = 0;
    trace("node %zu starts", n);
    if (!x->blocks.next) x->blocks.prev = x->blocks.next = &x->blocks;
    memset(x->peers, 0, sizeof x->peers);
    memset(x->down, 0, sizeof x->down);
    x->alive = true;
    be(n);
    memset(&netchan__net, 0, sizeof netchan__net);
    netchan__net.on_drained = netchan__lane_drained;
    for (size_t i = 0; i < 16; i++) netchan__net.process[i] = (uint8_t)draw();
    for (size_t i = below(LOCALS + 1); i > 0; i--) {
        if (!has_places()) break;
        size_t cap = draw_capacity();
        add_place(n, LOCAL, cap, NULL, netchan_make(cap));
    }
}

/* The ways to ask for a session that must be refused. */
typedef enum forgery { USED_GENERATION, NEVER_SENT, OTHER_SECRET, OTHER_ID, OTHER_KEY, OTHER_LINK, FORGERIES } forgery;

/* Writes a RESUME for the session that is right but for one thing, and makes the wire over which it comes. Returns its
 * size. */
static size_t forge_resume(netchan__wire *w, const netchan__session *s, forgery how, uint8_t *out) {
    static netchan__hub dialler = {.dials = true};
    netchan__session copy = *s;
    netchan__wire asker = *w;
    asker.hub = &dialler;
    asker.generation = s->generation + (how != USED_GENERATION);
    copy.received = s->peer.sent + (how == NEVER_SENT);
    if (how == OTHER_SECRET) copy.secret[below(32)] ^= 1;
    if (how == OTHER_ID) copy.id[below(16)] ^= 1;
    if (how == OTHER_KEY) w->identity[below(32)] ^= 1;
    netchan__emit_resume(&asker, &copy);
    if (how == OTHER_LINK) w->binding[below(32)] ^= 1;
    size_t size = netchan__buf_size(&asker.control);
    memcpy(out, asker.control.data + asker.control.start, size);
    netchan__buf_free(&asker.control);
    return size;
}

/* Somebody asks to go on with a session that is not his, or no longer: he is refused, and it does not notice. */
static void forge_question(void) {
    port *p = &world.ports[below(world.port_count)];
    netchan__session *s = p->open && !p->hub.dials ? p->hub.sessions : NULL;
    if (!s) return;
    static uint8_t record[NETCHAN__FRAME_MAX];
    netchan__session before = *s;
    netchan__wire w;
    uint8_t frame[128];
    forgery how = (forgery)below(FORGERIES);
    trace("somebody forges a RESUME for a session of port %zu, %d", p->index, (int)how);
    memset(&w, 0, sizeof w);
    for (size_t i = 0; i < 32; i++) w.binding[i] = (uint8_t)draw();
    memcpy(w.identity, s->identity, 32);
    be(p->node);
    lock_net();
    netchan__wire_start(&w, &p->hub, world.now);
    size_t size = forge_resume(&w, s, how, frame);
    netchan__wire_input(&w, world.now, frame, size);
    bool refused = (netchan__wire_output(&w, record, NULL) > 2 && record[1] == NETCHAN__REFUSED) || w.failure;
    if (!refused || w.session || w.up) broken("a forged RESUME, %d, was not refused", (int)how);
    if (memcmp(&before, s, sizeof before) != 0) broken("a forged RESUME, %d, changed the session", (int)how);
    netchan__wire_down(&w, world.now, "forged");
    unlock_net();
}

/* Somebody answers in place of the listener: the dialler goes on with its session elsewhere. */
static void forge_answer(void) {
    side *x = draw_side();
    uint8_t frame[36] = {35, NETCHAN__RESUMED, 0};
    if (!x || !x->port->hub.dials || !x->wire.resumes || x->wire.up || x->cut || waiting(x) || x->record) return;
    trace("%s: somebody forges a RESUMED", name_of(x));
    frame[2] = (uint8_t)below(100);
    for (size_t i = 3; i < sizeof frame; i++) frame[i] = (uint8_t)draw();
    put_record(x, frame, sizeof frame);
    x->cut = x->eof = true;
}

/* --- checks after every step -------------------------------------------------------------------------------------- */

/* Does this waiter wait and nothing else? Who is engaged elsewhere looks around again when it is released. */
static bool is_idle(const netchan__waiter *w) {
    return !w->op || netchan__state(w->op) == NETCHAN__OPEN;
}

static void check_lane(const netchan__lane *lane) {
    if (netchan__held(lane) + lane->out + lane->reserved + lane->lent > lane->cap)
        broken("capacity %zu is exceeded", lane->cap);
    if (lane->pinned > lane->out || lane->out > lane->matching || lane->reserved > lane->matching)
        broken("a lane counts wrong");
    bool ready = lane->cap ? netchan__held(lane) > 0 && !lane->pinned : lane->senders.head != NULL;
    if (lane->is_direct) ready = false;
    if (lane->is_ready != ready && !lane->closing) broken("a lane is listed wrong");
}

/* A peer may have no memory for large values now, or never, or for more ends. */
static bool may_wait(const netchan__waiter *w, const netchan_value *v, size_t size) {
    return !w->op && (size > NETCHAN__FRAGMENT || netchan__too_many_ends(w->peer, v));
}

/* Invariant I2: nobody idle is left with somebody idle, unless a link is down. */
static void check_pairs(const netchan__lane *lane) {
    for (const netchan__waiter *r = lane->ch->receivers.head; r; r = r->next) {
        bool idle = is_idle(r) && (r->op || !r->peer->down) && !(lane->is_direct && r->peer != lane->only);
        const netchan__slot *first = netchan__front(lane);
        if (idle && lane->cap && netchan__held(lane) && !lane->pinned && !may_wait(r, &first->value, first->size))
            broken("a value and a receiver were left");
        for (const netchan__waiter *s = lane->senders.head; s && idle && !lane->cap && !lane->closing; s = s->next)
            if (is_idle(s) && !netchan__same_op(s, r) && netchan__can_ask(s) && !may_wait(r, &s->value, s->size))
                broken("a sender and a receiver were left");
    }
    for (const netchan__waiter *s = lane->senders.head; s && netchan__slot_free(lane) && !lane->closing; s = s->next)
        if (is_idle(s) && netchan__can_ask(s) && netchan__may_store((netchan__waiter *)s))
            broken("a sender and a free slot were left");
}

static void check_end(const netchan *ch) {
    const netchan__peer *p = ch->home;
    if (!p || p->leaving || p->breach || !ch->credit || ch->returned.head) return;
    const netchan__waiter *s = netchan__next_sender(ch);
    if (s && !p->down) broken("a sender and credit were left");
}

/* What a dialler says of the values that were sent with OK, or whose fate it does not know, must be all of them; and
 * what it says was taken was. */
static void check_dialler(port *p) {
    const netchan *ch = p->hub.link.send;
    const netchan__session *s = p->hub.session;
    uint64_t taken = p->taken + (s ? s->peer.taken : 0), all = p->send->sent + p->send->unknown;
    uint64_t told = taken + p->unknown + p->arrived + ch->in_flight + ch->detached + ch->undelivered;
    if (p->arrives && all > told) p->arrived += all - told, told = all;
    p->arrives = false;
    if (all != told)
        broken("%s: %llu values were sent, and %llu are counted: %llu taken, %llu unknown, %llu arrived, "
               "%zu in flight, %zu come back", describe(p->send), (ull)all, (ull)told, (ull)taken, (ull)p->unknown,
               (ull)p->arrived, ch->in_flight, ch->detached);
    if (p->hub.stats.values_received != p->recv->received)
        broken("%s: %llu values were taken, and %llu are counted", describe(p->recv), (ull)p->recv->received,
               (ull)p->hub.stats.values_received);
    if (taken > p->send->taken)
        broken("%llu values of %s count as taken, and %llu are", (ull)taken, describe(p->send), (ull)p->send->taken);
    if (!p->losses && !ch->undelivered && p->hub.stats.values_sent + ch->detached != p->send->sent)
        broken("%s: %llu values were sent, and the statistics say %llu", describe(p->send), (ull)p->send->sent,
               (ull)p->hub.stats.values_sent);
}

/* The same for a listener. Values of its buffer whose fate is unknown are sent again, unless it may not. */
static void check_listener(const port *p) {
    const netchan__lane *lane = &p->hub.link.send->lane;
    uint64_t taken = p->taken;
    size_t orphans = 0;
    for (const netchan__session *s = p->hub.sessions; s; s = s->next) taken += s->peer.taken;
    for (const netchan__lane *l = p->hub.link.recv->lanes; l; l = l->next) orphans += l->orphaned;
    if (orphans != p->hub.orphans)
        broken("%zu lanes of lost peers are counted, there are %zu", p->hub.orphans, orphans);
    uint64_t all = p->send->sent + p->send->unknown, told = taken + netchan__held(lane) + lane->out + p->unknown;
    if (all != told)
        broken("%s: %llu values were sent, and %llu are counted: %llu taken, %llu unknown, %zu in the buffer",
               describe(p->send), (ull)all, (ull)told, (ull)taken, (ull)p->unknown, netchan__held(lane) + lane->out);
    if (taken > p->send->taken)
        broken("%llu values of %s count as taken, and %llu are", (ull)taken, describe(p->send), (ull)p->send->taken);
    if (p->hub.stats.values_sent != taken)
        broken("%s: %llu values were taken, and the statistics say %llu", describe(p->send), (ull)taken,
               (ull)p->hub.stats.values_sent);
}

static void check_port(port *p) {
    size_t sessions = 0;
    for (const netchan__session *s = p->hub.sessions; s; s = s->next) sessions++;
    if (p->hub.peers != sessions) broken("%zu peers are counted, there are %zu", p->hub.peers, sessions);
    if (p->blind || world.plan.ends) return; /* what passes through ends is counted as well */
    if (p->hub.unknown != p->unknown) broken("%llu unknown values are counted", (ull)p->hub.unknown);
    if (p->hub.stats.lost != p->losses) broken("%llu sessions count as lost", (ull)p->hub.stats.lost);
    if (p->hub.stats.resumes != p->resumes) broken("%llu sessions count as resumed", (ull)p->hub.stats.resumes);
    if (p->hub.dials) check_dialler(p);
    else check_listener(p);
}

static bool is_remote(const netchan__waiter *w) {
    return w && !w->op && !w->here && !w->lost && w->peer && w->peer->number < MAX_PEERS;
}

/* Nobody is matched with whose link is down, unless his value is here. */
static void check_matches(node *n) {
    for (const netchan__peer *p = netchan__net.peers; p; p = p->next_peer) {
        const netchan__session *session = netchan__session_of((netchan__peer *)p);
        uint64_t i = p->number;
        uint64_t generation = p->send ? session->hub->stats.resumes : session->generation; /* a dialler asks first */
        if (i >= MAX_PEERS) continue;
        if (!p->down) n->down[i] = 0;
        else if (!n->down[i] || n->generation[i] != generation) n->down[i] = netchan__net.last_id + 1;
        n->generation[i] = generation;
    }
    for (size_t i = 0; i < netchan__net.matches.cap; i++) {
        const netchan__match *m = (const netchan__match *)netchan__net.matches.slots[i].item;
        if (!netchan__net.matches.slots[i].key) continue;
        const netchan__waiter *parties[2] = {m->sender, m->receiver};
        for (int j = 0; j < 2; j++) {
            uint64_t down = is_remote(parties[j]) ? n->down[parties[j]->peer->number] : 0;
            if (down && m->id > down) broken("a match began with a peer whose link is down");
        }
    }
}

static void check_node(size_t n) {
    be(n);
    check_matches(&world.nodes[n]);
    world.nodes[n].touched = false;
    for (size_t i = 0; i < world.place_count; i++) {
        const place *p = &world.places[i];
        if (p->node != n || !p->ch || p->kind == DIRECT) continue;
        if (p->ch->is_end) check_end(p->ch);
        for (const netchan__lane *lane = p->ch->is_end ? NULL : p->ch->lanes; lane; lane = lane->next) {
            check_lane(lane);
            if ((!p->port || !p->port->hub.shut) && !(lane->is_direct && !lane->only)) check_pairs(lane);
        }
    }
    for (size_t i = 0; i < world.port_count; i++)
        if (world.ports[i].open && world.ports[i].node == n) check_port(&world.ports[i]);
    if (netchan__net.released || netchan__net.declined || netchan__net.dirty || netchan__net.changed ||
        netchan__net.urgent || netchan__dead)
        broken("something is not settled");
}

/* A1: no value that came early lies beside a receive that could take it. */
static void check_early(const place *p) {
    const netchan *ch = p->ch;
    if (p->kind != END_RECV || !ch || !ch->early.head || ch->home->down) return;
    for (const netchan__waiter *r = ch->receivers.head; r; r = r->next)
        if (netchan__state(r->op) == NETCHAN__OPEN) broken("op %llu waits beside an early value", (ull)r->op->id);
    if (ch->rooms > NETCHAN__EARLY_MOST) broken("%zu values may come early", ch->rooms);
}

static void check_step(void) {
    for (size_t i = 0; i < world.place_count; i++) check_early(&world.places[i]);
    fail_in = 0;
    if (running < MAX_NODES) note_pending();
    read_all_events();
    observe();
    for (size_t i = 0; i < world.plan.nodes; i++)
        if (world.nodes[i].alive && world.nodes[i].touched) check_node(i);
}

/* --- checks at rest: all bytes delivered, all time up ------------------------------------------------------------- */

/* The session at the other side of the link over which this one goes; NULL: it has none. */
static netchan__session *other_session(const netchan__session *s) {
    side *x = s && s->wire ? (side *)s->wire->owner : NULL;
    return x ? other_side(x)->wire.session : NULL;
}

/* The home knows of this waiter, and all on the way do. */
static void check_entry(const task *t, const netchan__session *s, uint64_t id) {
    const netchan__waiter *entry = id ? (const netchan__waiter *)netchan__map_get(&s->peer.waiters, id) : NULL;
    if (!entry || !entry->queue || entry->op_id != t->op.id)
        broken("op %llu waits, but its home does not know it", (ull)t->op.id);
    if (!entry->ch->is_end) return;
    const netchan *ch = entry->ch;
    if (!ch->home || (ch->credited && entry->is_send && ch->lane.cap && !ch->credit)) return;
    const netchan__remote *r = netchan__remote_of((netchan__waiter *)entry);
    if (!r->up || r->step != NETCHAN__IDLE || r->down || entry->claim)
        broken("op %llu is relayed to nobody, or is being negotiated for ever", (ull)t->op.id);
    s = other_session(netchan__session_of(r->up));
    if (s) check_entry(t, s, r->up_id);
}

static void check_waiting(const task *t, size_t i) {
    const place *p = t->places[i];
    const netchan__waiter *w = &t->waiters[i];
    ull op = (ull)t->op.id;
    if (!p) return;
    if (!p->ch) broken("op %llu waits on a link that was hung up, %s", op, describe(p));
    if (w->match || w->claim) broken("case %zu of op %llu is being negotiated for ever", i, op);
    const netchan *ch = p->kind == DIRECT && w->lane ? w->lane->ch : p->ch; /* it may have been taken aside */
    if (w->is_send ? ch->closing : ch->closed) broken("op %llu waits on a closed channel, %s", op, describe(p));
    if (!w->queue) broken("case %zu of op %llu waits nowhere", i, op);
    if (p->kind == IMPORT && p->ch->gone) broken("op %llu waits at a lost end, %s", op, describe(p));
    const netchan__session *s = NULL;
    if (p->port && p->port->hub.dials) s = p->port->hub.session;
    if (p->kind == IMPORT) s = netchan__session_of(p->ch->home);
    s = other_session(s);
    if (!s) return;
    if (p->kind != IMPORT && w->is_send && (p->cap || p->ch->detached) && !w->id) return; /* for credit, or its turn */
    check_entry(t, s, w->id);
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

/* What two sides think of their stream of frames. */
static void check_stream(const netchan__session *s, const netchan__session *other) {
    if (netchan__buf_size(&s->out) || s->parcels || s->given)
        broken("%zu bytes are left to be acknowledged", netchan__buf_size(&s->out));
    if (s->queued != other->received || s->acked != s->queued || s->peer.sent != s->queued)
        broken("%llu frames were queued, %llu sent, %llu received, %llu acknowledged", (ull)s->queued,
               (ull)s->peer.sent, (ull)other->received, (ull)s->acked);
    if (s->peer.breach) broken("a breach: %s", s->peer.breach);
}

/* What this side remembers of the waiters of the other must be what the other has. */
static void check_entries(const netchan__session *s, const netchan__session *other) {
    size_t offered = 0;
    be(((side *)other->wire->owner)->port->node);
    for (size_t i = 0; i < s->peer.waiters.cap; i++) {
        const netchan__waiter *entry = (const netchan__waiter *)s->peer.waiters.slots[i].item, *w;
        if (!s->peer.waiters.slots[i].key) continue;
        w = (const netchan__waiter *)netchan__map_get(&netchan__net.waiters, entry->id);
        if (!w || (w->op ? w->peer : netchan__remote_of((netchan__waiter *)w)->up) != &other->peer)
            broken("op %llu is remembered, which is over", (ull)entry->op_id);
        if (entry->here) offered += entry->size;
    }
    if (s->peer.offered != offered || other->peer.offering != offered)
        broken("%zu bytes are offered, and counted as %zu and %zu", offered, s->peer.offered, other->peer.offering);
}

/* Does the name stand that this was exported by? */
static bool stands(const netchan__hub *h, const netchan__export *x) {
    for (size_t i = 0; i < h->names.cap; i++) {
        const netchan__name *name = (const netchan__name *)netchan__map_at(&h->names, i);
        for (; name; name = name->next)
            if (((uint64_t)(uintptr_t)name | name->receives) == x->key) return true;
    }
    return false;
}

/* What this side has given to the other is what the other has. */
static void check_exports(const netchan__session *s, const netchan__session *other) {
    size_t revoked = 0;
    for (size_t i = 0; i < s->peer.exports.cap; i++) {
        const netchan__export *x = (const netchan__export *)s->peer.exports.slots[i].item;
        if (!s->peer.exports.slots[i].key) continue;
        const netchan *ch = (const netchan *)netchan__map_get(&other->peer.imports, x->id);
        if (!ch) broken("an end was given away, and nobody has it");
        if (ch->named != x->named) broken("an end was named %llu times, and heard %llu", (ull)x->named, (ull)ch->named);
        if (ch->may_receive != x->receives || ch->home != &other->peer) broken("an end is another");
        if (!ch->refs) broken("an end is held by nobody");
        bool closed = x->receives ? ch->closed : ch->closing, right = x->receives ? x->ch->closed : x->ch->closing;
        bool may = world.plan.large; /* a name in a large value may be older than what was said of its end meanwhile */
        if (closed != right && !(may && right) && !x->revoked) broken("an end is %sclosed", closed ? "" : "not ");
        bool gone = x->revoked || x->ch->gone;
        if (ch->gone != gone && !(may && gone)) broken("an end is %sgone", ch->gone ? "" : "not ");
        revoked += x->revoked;
        if (x->by_name && !x->revoked && !stands(s->hub, x)) broken("an end outlives its name");
    }
    if (s->peer.exports.count != other->peer.imports.count)
        broken("%zu ends were given away, and %zu are there", s->peer.exports.count, other->peer.imports.count);
    if (s->peer.exported.count + revoked != s->peer.exports.count) broken("exports are listed wrong");
}

/* A name is waited for only as long as the other side wants it. */
static void check_asked(const netchan__session *s, const netchan__session *other) {
    size_t count = 0;
    for (const netchan__asked *a = s->hub->asked; a; a = a->next) {
        const netchan__wanted *w = other->hub->wanted;
        if (a->session != s) continue;
        while (w && w->number != a->number) w = w->next;
        if (!w) broken("a question for %s is not forgotten", a->text);
        if (netchan__find_name(s->hub, a->text, strlen(a->text))) broken("%s is there, and was not answered", a->text);
        count++;
    }
    if (count != s->asked.count) broken("%zu questions are counted, there are %zu", s->asked.count, count);
}

/* What a home remembers of a peer must be what the peer has. */
static void check_peers(const port *p) {
    const netchan__session *s = p->hub.session, *other = other_session(s);
    const netchan__peer *dialler = &s->peer, *home = &other->peer;
    const netchan *ch = p->send->ch;
    const netchan__lane *lane = home->lane && !home->lane->closing ? home->lane : NULL;
    check_stream(s, other);
    check_stream(other, s);
    check_exports(s, other);
    check_exports(other, s);
    check_asked(s, other);
    check_asked(other, s);
    check_entries(s, other);
    check_entries(other, s);
    be(p->node);
    if (dialler->reserved || home->reserved)
        broken("%zu and %zu bytes stay reserved", dialler->reserved, home->reserved);
    if (lane && lane->lent != ch->credit)
        broken("%zu slots are lent, but the credit is %zu", lane->lent, ch->credit);
    if (p->send->closed && lane && !ch->detached)
        broken("%s is closed, and its home does not know", describe(p->send));
    if (home->work->closed && !p->recv->ch->closed) broken("CLOSED did not arrive at %s", describe(p->recv));
    if (home->shipping || dialler->shipping)
        broken("%zu and %zu bytes stay counted as being shipped", home->shipping, dialler->shipping);
    if (lane && lane->cap && !netchan__held(lane) && ch->lane.senders.head)
        broken("a sender at %s waits for an empty buffer", describe(p->send));
}

static void check_channels(void) {
    for (size_t i = 0; i < world.plan.nodes; i++) {
        be(i);
        if (netchan__net.matches.count) broken("%zu matches are left", netchan__net.matches.count);
        if (netchan__net.relays.count) broken("%zu relayed matches are left", netchan__net.relays.count);
    }
    for (size_t i = 0; i < world.place_count; i++) {
        const place *p = &world.places[i];
        for (const netchan__lane *lane = !p->ch || p->ch->is_end ? NULL : p->ch->lanes; lane; lane = lane->next) {
            if (lane->out || lane->reserved || lane->pinned || lane->matching)
                broken("a lane of %s is not at rest", describe(p));
            if ((p->kind == MERGE || p->kind == OWN_RECV) && lane->closing && !netchan__held(lane))
                broken("a lane that is closed and empty is left");
        }
        if (!p->ch || p->ch->is_end || !p->ch->closing || p->ch->gone || p->kind == DIRECT) continue;
        if (p->ch->closed != netchan__is_empty(p->ch))
            broken("%s is closed, and %zu values are left", describe(p), netchan__held(&p->ch->lane));
    }
}

static void mark_present(const netchan_value *v, const place *at, bool redelivered) {
    value *found = identify(v);
    ull number = (ull)number_of(found);
    bool direct = found->place->kind == DIRECT && at->port == found->place->port;
    bool merged = (at->kind == MERGE || at->kind == OWN_RECV) && leads_to(found->place, at);
    if (home_of(found->place) != at && !merged && !direct)
        broken("value %llu is in a wrong buffer", number);
    if (found->present) broken("value %llu is there twice", number);
    if (found->fate != SENT && (found->fate != UNKNOWN || !home_of(found->place)->cap))
        broken("value %llu is in a buffer, and its fate is %d", number, (int)found->fate);
    if (found->taken && !redelivered) broken("value %llu was taken and is still there", number);
    found->present = true;
}

/* Values that came back to this end. */
static void mark_detached(const place *p) {
    const netchan__queue *queues[2] = {&p->ch->lane.senders, &p->ch->returned};
    size_t n = 0;
    for (int i = 0; i < 2; i++)
        for (const netchan__waiter *w = queues[i]->head; w; w = w->next) {
            if (!w->op || !w->op->detached) continue;
            if (w != (i ? p->ch->returned.head : p->ch->lane.senders.head) && !w->prev->op->detached)
                broken("a value that came back to %s is not the first", describe(p));
            mark_present(&w->value, p, false);
            n++;
        }
    if (n != p->ch->detached)
        broken("%zu values came back to %s, and %zu are counted", n, describe(p), p->ch->detached);
}

static void mark_all(void) {
    for (size_t i = 0; i < world.value_count; i++) values[i].present = false;
    for (size_t i = 0; i < world.place_count; i++) {
        const place *p = &world.places[i];
        if (!p->ch || p->kind == DIRECT) continue;
        be(p->node);
        if (p->ch->is_end) mark_detached(p);
        for (const netchan__lane *lane = p->ch->is_end ? NULL : p->ch->lanes; lane; lane = lane->next)
            for (size_t j = 0; j < netchan__held(lane); j++) {
                const netchan__slot *at = netchan__slot_at(lane, lane->first + j);
                mark_present(&at->value, p, at->redelivered);
            }
    }
}

/* How many of the values that were sent here with OK may be neither taken nor anywhere. */
static uint64_t may_vanish(const place *p) {
    const port *x = p->port;
    uint64_t n = 0;
    if (x && world.links_given && any_loss()) return UINT64_MAX;
    if (!x) return p->ch && !(p->given && world.plan.no_redelivery && any_loss()) ? 0 : UINT64_MAX;
    if (x->died || x->blind) return UINT64_MAX;
    if (is_aside(p)) return any_loss() ? UINT64_MAX : 0;
    if (p->kind == WORK) n = world.plan.no_redelivery ? x->unknown : 0;
    else n = x->unknown;
    if (x->reported) n = x->report.undelivered + x->report.unknown;
    else n += p->ch->undelivered;
    for (size_t i = 0; p->kind == END_SEND && i < world.port_count; i++) {
        const port *home = &world.ports[i]; /* what had arrived there went with it */
        if (home->route || !dials(x, home->site)) continue;
        if (home->died) return UINT64_MAX;
        if (home->reported) n += home->report.unreceived;
    }
    return n;
}

/* So many values that were sent here with OK have vanished; of them so many never left their node. */
static void check_vanished(const place *p, uint64_t vanished, uint64_t unsent) {
    const port *x = p->port;
    uint64_t most = may_vanish(p), given_up = 0;
    if (vanished > most)
        broken("%llu values vanished from %s, %llu are counted", (ull)vanished, describe(p), (ull)most);
    if (x && x->reported) given_up = x->report.undelivered;
    else if (p->ch) given_up = p->ch->undelivered;
    if (unsent > given_up && most != UINT64_MAX)
        broken("%llu values never left %s, and vanished", (ull)unsent, describe(p));
    if (x && x->reported && !x->blind && p == x->send && world.plan.shape != ENDS && vanished < given_up)
        broken("%llu values of %s were reported as undelivered, and only %llu are", (ull)given_up, describe(p),
               (ull)vanished);
}

/* Each value that was sent with OK is taken, or in a buffer, or counted as unknown or undelivered. */
static void check_values(void) {
    uint64_t vanished[MAX_PLACES] = {0}, unsent[MAX_PLACES] = {0};
    mark_all();
    for (size_t i = 0; i < world.value_count; i++) {
        const value *v = &values[i];
        if (v->taken && v->fate != SENT && v->fate != UNKNOWN)
            broken("value %zu was taken, and its fate is %d", i + 1, (int)v->fate);
        if (v->fate != SENT || v->taken || v->present) continue;
        vanished[home_of(v->place)->index]++;
        unsent[home_of(v->place)->index] += !v->left && !v->large;
    }
    for (size_t i = 0; i < world.place_count; i++) check_vanished(&world.places[i], vanished[i], unsent[i]);
}

/* --- coming to rest ----------------------------------------------------------------------------------------------- */

/* Delivers everything. */
static void let_flow(void) {
    bool moved = true;
    check_step();
    for (size_t rounds = 0; moved; rounds++) {
        if (rounds > 20000) broken("it does not come to rest");
        moved = false;
        for (size_t i = 0; i < 2 * MAX_CONNS; i++) {
            side *x = &world.conns[i / 2].sides[i % 2];
            if (!x->open) continue;
            x->stalled = 0;
            if (serve_side(x, SIZE_MAX, 100)) moved = true;
            check_step();
        }
    }
}

/* The dialler of a listener's session; NULL: it is gone, or it never got the answer to its HELLO. */
static const port *find_dialler(const netchan__session *s) {
    for (size_t i = 0; i < world.port_count; i++) {
        const port *p = &world.ports[i];
        if (p->open && p->hub.session && memcmp(p->hub.session->id, s->id, sizeof s->id) == 0) return p;
    }
    return NULL;
}

/* Does this dialler's session go on over one link, on both sides, with nothing on the way? */
static bool is_settled(const port *p) {
    const netchan__session *s = p->hub.session, *other = other_session(s);
    if (p->hub.hanging_up) return false;
    if (!p->hub.dials) {
        for (s = p->hub.sessions; s; s = s->next)
            if (!other_session(s) && (world.plan.resume_ms >= 0 || find_dialler(s))) return false;
        return true;
    }
    if (!s && !find_listener(p->route->sites[0]) && !find_listener(p->route->sites[1])) return !p->trial;
    return s && other && !p->trial && !netchan__buf_size(&s->out) && !netchan__buf_size(&other->out) &&
           !netchan__hub_wants_wire(&p->hub) && !p->hub.link.recv->early.head;
}

/* Who has not come to rest, or NULL. */
static const char *find_unsettled(void) {
    static char text[80];
    for (size_t i = 0; i < world.port_count; i++) {
        const port *p = &world.ports[i];
        snprintf(text, sizeof text, "port %zu of node %zu, which %s", i, p->node,
                 p->hub.hanging_up ? "hangs up" : p->hub.dials ? "dials" : "listens");
        if (p->open && !is_settled(p)) return text;
    }
    for (size_t i = 0; i < 2 * MAX_CONNS; i++) {
        const side *x = &world.conns[i / 2].sides[i % 2];
        bool rests = x->wire.session && !x->cut && !waiting(x) && netchan__wire_idle(&x->wire);
        if (x->open && !rests) return name_of(x);
    }
    return NULL;
}

static void expire_all(void) {
    for (size_t i = 0; i < MAX_THREADS; i++) {
        task *t = world.tasks[i];
        if (t && !t->told && t->timeout_ms > 0 && !t->expired) expire(t);
        observe();
    }
}

/* In a strict run whoever hangs up has patience, also with values that nobody receives. */
static void end_patience(void) {
    for (size_t i = 0; i < world.port_count; i++) {
        port *p = &world.ports[i];
        if (!p->open || !p->hub.hanging_up) continue;
        p->linger = 0;
        for (const netchan__session *s = p->hub.sessions; s; s = s->next)
            if (find_dialler(s) && !(s->bye_sent && s->bye_received)) world.forced = true;
    }
}

/* Who waits for ever for a dialler that is gone, or that never got the answer to its HELLO, gives up. */
static bool end_ghosts(void) {
    bool ended = false;
    for (size_t i = 0; i < world.port_count; i++) {
        port *p = &world.ports[i];
        netchan__session *next;
        if (!p->open || p->hub.dials || world.plan.resume_ms >= 0) continue;
        be(p->node);
        lock_net();
        for (netchan__session *s = p->hub.sessions; s; s = next) {
            next = s->next;
            if (s->wire || find_dialler(s)) continue;
            netchan__end_session(s, "its dialler hung up");
            world.hung_up = ended = true;
        }
        unlock_net();
    }
    return ended;
}

static void pass_time(uint64_t time) {
    world.now += time;
    for (size_t i = 0; i < world.plan.nodes; i++) {
        if (world.nodes[i].alive) tick_node(i);
        check_step();
    }
    let_flow();
}

/* What was closed or died comes back, mostly. */
static void restore(void) {
    for (size_t i = 0; i < world.plan.nodes; i++)
        if (!world.nodes[i].alive && chance(70)) start_node(i);
    for (size_t i = 0; i < world.plan.sites; i++)
        if (world.plan.strict || chance(80)) open_site(i);
    for (size_t i = 0; i < world.plan.links; i++)
        if (world.plan.strict || chance(80)) open_route(&world.links[i]);
}

/* Nothing breaks any more: all links come back, and all that can flow flows. */
static void come_to_rest(void) {
    uint64_t half = (uint64_t)world.plan.ping_ms * MS / 2;
    trace("everything comes to rest");
    for (size_t rounds = 0;; rounds++) {
        if (rounds > 3000) broken("it does not come to rest: %s", find_unsettled());
        pass_time(rounds % 8 ? 25 * MS : half);
        expire_all();
        let_flow();
        if (world.plan.strict) {
            for (size_t i = 0; i < world.plan.sites; i++) open_site(i);
            if (rounds == 600) end_patience(); /* all that could come back has */
        }
        if (rounds > 3 && !find_unsettled() && !end_ghosts()) break;
    }
    check_step();
}

static void check_rest(void) {
    check_channels();
    check_tasks();
    for (size_t i = 0; i < world.port_count; i++)
        if (world.ports[i].open && world.ports[i].hub.session) check_peers(&world.ports[i]);
    check_values();
}

/* Takes one value if there is one. */
static bool drain_one(place *p) {
    if (!p->ch) return false;
    task *t = make_task(p->node * THREADS + THREADS - 1, NETCHAN_NOWAIT);
    trace("op %llu drains", (ull)t->op.id);
    add_case(t, p, false);
    run_task(t);
    let_flow();
    for (size_t i = 0; i < 50 && !t->told; i++) pass_time(25 * MS); /* until the window is open */
    if (!t->told) broken("a receive without waiting from %s waits", describe(p));
    bool got = t->op.result == NETCHAN_OK;
    reap(t);
    return got;
}

/* Can somebody receive what lies here? */
static bool is_reachable(const place *p) {
    const netchan__lane *lane = &p->ch->lane;
    if (p->kind == LOCAL) return true;
    if (world.plan.max_ends && p->kind == DIRECT) return false;
    if (world.plan.max_ends && netchan__held(lane) && netchan__has_ends(&netchan__front(lane)->value)) return false;
    if (p->kind == END_SEND) return p->port->hub.session != NULL;
    if (netchan__held(lane) && netchan__front(lane)->size > NETCHAN__FRAGMENT)
        return false; /* larger than its peers take */
    for (const netchan__session *s = p->port->hub.sessions; s; s = s->next) {
        const netchan__session *other = other_session(s);
        if (p->kind == DIRECT ? s->peer.number != p->to : s->peer.work != p->ch) continue;
        if (other && other->peer.recv && !other->peer.recv->closed) return true;
    }
    return false;
}

/* Takes whatever is left; then there must be nothing anywhere. */
static void drain(void) {
    for (size_t empty = 0; empty < 2; empty++) { /* once more after the last, as links may have been replaced */
        for (size_t i = 0; i < world.place_count; i++)
            while (world.places[i].ch && !world.places[i].dropped && world.places[i].ch->may_receive &&
                   drain_one(&world.places[i])) empty = 0;
        come_to_rest();
    }
    check_rest();
    for (size_t i = 0; i < world.value_count; i++) {
        const place *p = home_of(values[i].place);
        if (values[i].present && p->ch && is_reachable(p))
            broken("value %zu cannot be drained from %s", i + 1, describe(p));
        if (values[i].present && !p->ch) broken("value %zu cannot be drained", i + 1);
    }
}

/* --- one run ------------------------------------------------------------------------------------------------------ */

/* Channels in values. */
static void draw_ends(plan *p) {
    if (p->shape != ENDS) return;
    p->nodes = 3 + below(MAX_NODES - 2);
    p->ends = chance(50) ? 20 : 60;
    p->drops = chance(30) ? 0 : below(40);
    p->accepts = chance(50) ? 0 : 2 + below(20);
    p->names = chance(50) ? 0 : 2 + below(20);
    p->link_ends = chance(40);
    p->losses = p->strict || chance(50) ? 0 : 1 + below(6);
    p->max_ends = chance(15) ? 1 + below(6) : 0;
    p->steps = 200 + below(chance(10) ? 10000 : chance(60) ? 4000 : 1000);
    p->threads = THREADS - 1;
    p->finite = chance(30) ? 100 : 60 + below(40);
    p->selects = chance(20) ? 10 : 40 + below(60);
    p->links = 1 + below(MAX_LINKS);
    p->medium = chance(70) ? p->medium : 50;
    p->whole = chance(70) ? 95 : p->whole;
    p->nowait = chance(50) ? 0 : 10;
    p->pace = 200;
    p->quiet_start = false;
    if (chance(40)) p->cuts = p->hangups = p->deaths = p->memory = 0;
    else if (!p->strict) p->deaths = p->hangups = 1; /* the world is large enough to be lost in parts */
}

static void draw_dangers(plan *p) {
    p->strict = chance(45);
    p->cuts = chance(15) ? 0 : 2 + below(chance(30) ? 60 : 15);
    p->stalls = chance(50) ? 0 : below(20);
    p->jumps = chance(60) ? 0 : below(15);
    p->closes = chance(60) ? 0 : 3 + below(10);
    p->hangups = chance(50) ? 0 : 2 + below(15);
    p->forgeries = chance(60) ? 0 : below(20);
    p->deaths = p->strict || chance(50) ? 0 : 2 + below(8);
    p->memory = p->strict || chance(50) ? 0 : 2 + below(50);
    p->successors = !p->strict && chance(50);
    p->ping_ms = chance(30) ? 100 : chance(50) ? 1000 : 5000;
    p->resume_ms = p->strict ? -1 : p->ping_ms * (int)(2 + below(10));
    p->no_redelivery = chance(30);
}

static void draw_plan(plan *p) {
    static const size_t memories[] = {100000, 2 * MAX_MESSAGE, 2 << 20, 64 << 20};
    static const size_t percents[] = {0, 10, 50, 90};
    static const size_t windows[] = {1, 300, 20000, 65536, 4u << 20};
    p->shape = chance(30) ? ENDS : chance(50) ? MIXED : (shape)below(5);
    p->nodes = 2 + below(MAX_NODES - 1);
    p->links = 1 + below(MAX_LINKS);
    p->sites = 1 + (chance(40) ? below(MAX_SITES) : 0);
    p->threads = 1 + below(THREADS - 1);
    p->steps = 40 + below(chance(3) ? 20000 : chance(15) ? 3000 : 400);
    p->selects = p->shape == MIXED || p->shape == ENDS ? percents[below(4)] : 0;
    p->finite = percents[below(4)];
    p->nowait = chance(50) ? 0 : 5 + below(30);
    p->large = chance(60) ? 0 : 2 + below(chance(30) ? 60 : 10);
    p->medium = chance(70) ? 0 : below(20);
    p->whole = percents[below(4)];
    p->pace = chance(50) ? 200 : chance(50) ? 5000 : 50000;
    p->full = chance(70) ? 200000 : 1 + below(40000);
    p->quiet_start = chance(30);
    p->huge = chance(30);
    if (p->shape == STREAMS || p->shape == REQUESTS) p->threads = 2;
    if (p->shape == STREAMS || (p->shape == WORKERS && chance(50))) p->links = 1;
    draw_dangers(p);
    draw_ends(p);
    if (p->shape == SUCCESSION || (p->shape == WORKERS && chance(50))) p->hangups = 5 + below(15);
    p->early = chance(50) ? 0 : chance(50) ? 100 : below(100);
    p->buffered = p->shape == SUCCESSION || p->shape == WORKERS || chance(30);
    size_t memory = memories[1 + below(3)];
    for (size_t i = 0; i < MAX_NODES; i++) p->max_memory[i] = chance(90) ? memory : memories[below(4)];
    window = windows[below(5)];
    key_records = chance(50) ? 1u << 23 : 8 + below(chance(50) ? 20 : 200);
    trace("%s: %zu nodes, %zu links, %zu sites, window %zu, %zu records for a key, ping %d ms, resume %d ms%s",
          shape_names[p->shape], p->nodes, p->links, p->sites, window, key_records, p->ping_ms, p->resume_ms,
          p->strict ? ", strict" : "");
}

static void build(void) {
    size_t used = world.place_count;
    if (world.way_count) memset(world.ways, 0, sizeof world.ways);
    world.way_count = 0;
    memset(world.last, 0, used * sizeof world.last[0]);
    memset(world.last_at, 0, used * sizeof world.last_at[0]);
    memset(&world, 0, offsetof(struct world, last));
    memset(&netchan__net, 0, sizeof netchan__net);
    running = MAX_NODES;
    fail_in = 0;
    world.now = 1 + below(1000000) * (uint64_t)MS;
    draw_plan(&world.plan);
    netchan__op_count = 0;
    for (size_t i = 0; i < world.plan.nodes; i++) start_node(i);
    for (size_t i = 0; i < world.plan.sites; i++) world.sites[i].node = i ? below(world.plan.nodes) : 0;
    for (size_t i = 0; i < world.plan.links; i++) {
        route *l = &world.links[i];
        l->addresses = chance(20) ? 2 : 1;
        for (size_t j = 0; j < 2; j++) l->sites[j] = i ? below(world.plan.sites) : 0;
        if (l->addresses == 1 || world.plan.strict) l->sites[1] = l->sites[0]; /* another process would not know it */
        l->node = i ? below(world.plan.nodes) : 1;
        if (l->node == world.sites[l->sites[0]].node && !chance(20)) l->node = (l->node + 1) % world.plan.nodes;
    }
    for (size_t i = 0; i < world.plan.sites && !world.plan.quiet_start; i++) open_site(i);
    for (size_t i = 0; i < world.plan.links && !world.plan.quiet_start; i++) open_route(&world.links[i]);
}

static void step_traffic(void) {
    side *x = draw_side();
    if (!x) return;
    size_t size = waiting(x);
    if (!chance(world.plan.whole)) size = chance(50) ? 1 : 1 + below(chance(50) || size < 40 ? size + 1 : 40);
    serve_side(x, chance(70) ? size : 0, below(4));
}

static void step_task(void) {
    size_t thread = below(world.plan.nodes) * THREADS + below(world.plan.threads);
    task *t = world.tasks[thread];
    if (!world.nodes[thread / THREADS].alive) return;
    if (!t) start(thread);
    else if (t->told) reap(t);
    else if (t->timeout_ms > 0 && !t->expired && chance(world.plan.shape == ENDS ? 6 : 15)) expire(t);
}

/* Enough for all to come back in the end. */
static bool has_ports(void) {
    return world.port_count + MAX_LINKS + 2 * MAX_SITES < MAX_PORTS;
}

static void step_hangup(void) {
    port *p = &world.ports[below(world.port_count + (world.port_count == 0))];
    if (!p->open || p->hub.hanging_up || !has_ports()) return;
    if (p->route ? world.plan.shape == SUCCESSION && chance(70) : world.plan.shape == WORKERS && chance(70)) return;
    uint64_t linger = world.plan.strict ? UINT64_MAX : world.now + below(10000) * (uint64_t)MS;
    hang_up(p, linger);
    if (p->route) return;
    world.sites[p->site].node = below(world.plan.nodes);
    if (!world.plan.successors) return;
    world.sites[p->site].port = NULL;
    open_site(p->site);
}

/* What was closed or died comes back. */
static void step_return(void) {
    size_t i = below(world.plan.nodes), j = below(world.plan.links), k = below(world.plan.sites);
    if (!world.nodes[i].alive) start_node(i);
    else if (!has_ports()) return;
    else if (chance(50)) open_route(&world.links[j]);
    else open_site(k);
}

static void drop_end(place *p) {
    trace("%s is dropped", describe(p));
    be(p->node);
    p->dropped = true;
    netchan_free(p->ch);
    forget_place(p);
}

/* Mostly one that leads nowhere any more. */
static void step_drop(void) {
    place *p = &world.places[below(world.place_count)];
    bool many = world.place_count + 20 > MAX_PLACES - 2 * (MAX_PORTS - world.port_count);
    if (p->kind == IMPORT && p->ch && !p->dropped && (p->ch->gone || many || chance(50))) drop_end(p);
}

/* A listener takes a peer aside. */
static void step_accept(void) {
    port *p = &world.ports[below(world.port_count)];
    netchan_value v;
    if (!p->open || p->hub.dials || p->hub.hanging_up || !has_places()) return;
    be(p->node);
    if (netchan_recv(p->hub.link.accept, &v, NETCHAN_NOWAIT) != NETCHAN_OK) return;
    uint64_t number = netchan_as_uint(netchan_get(&v, "peer"), 0);
    netchan *send = netchan_as_chan(netchan_get(&v, "send")), *recv = netchan_as_chan(netchan_get(&v, "recv"));
    trace("port %zu accepts peer %llu", p->index, (ull)number);
    if (!number || number >= MAX_PEERS || !world.nodes[p->node].peers[number])
        broken("peer %llu was accepted", (ull)number);
    if (!send || !recv || !send->may_send || !recv->may_receive) broken("a peer was accepted without channels");
    place *pair[2] = {add_place(p->node, OWN_SEND, p->hub.options.buffer, p, netchan_retain(send)),
                      add_place(p->node, OWN_RECV, 0, p, netchan_retain(recv))};
    for (int i = 0; i < 2; i++) pair[i]->peer = world.nodes[p->node].peers[number];
    netchan_clear(&v);
}

/* Somebody wants to send to one peer only. */
static void step_direct(void) {
    port *p = &world.ports[below(world.port_count)];
    const netchan__session *s = p->open && !p->hub.dials ? p->hub.sessions : NULL;
    if (!s || !has_places() || p->hub.hanging_up) return;
    for (size_t i = 0; i < world.place_count; i++)
        if (world.places[i].port == p && world.places[i].to == s->peer.number) return;
    be(p->node);
    place *at = add_place(p->node, DIRECT, p->hub.options.buffer, p, p->hub.link.send);
    at->to = s->peer.number;
    at->peer = world.nodes[p->node].peers[at->to];
}

/* Each channel has a name for each direction. */
static void name_place(char *text, const place *root, bool receives) {
    snprintf(text, 16, "%c%zu", receives ? 'r' : 's', root->index);
}

static void step_export(port *p) {
    place *at = draw_gift(p->node);
    char name[16];
    if (!at || (at->port && at->port == p)) return;
    bool receives = at->ch->may_receive && (!at->ch->may_send || chance(50));
    name_place(name, home_of(at), receives);
    be(p->node);
    int result = netchan_export(&p->hub.link, name, at->ch, receives ? NETCHAN_RECEIVER : NETCHAN_SENDER);
    trace("port %zu exports %s as %s: %d", p->index, describe(at), name, result);
    if (result == NETCHAN_OK) give(home_of(at));
    else if (!netchan__find_name(&p->hub, name, strlen(name))) broken("netchan_export: %s", netchan_errmsg());
}

static void step_unexport(port *p) {
    be(p->node);
    char name[16];
    if (!p->hub.names.count) return;
    size_t i = 0;
    while (!netchan__map_at(&p->hub.names, i)) i++;
    snprintf(name, sizeof name, "%s", ((netchan__name *)netchan__map_at(&p->hub.names, i))->text);
    trace("port %zu takes %s back", p->index, name);
    world.revoked = true;
    CHECK_INT(netchan_unexport(&p->hub.link, name), NETCHAN_OK);
}

/* As netchan__await_import() ends. */
static void end_import(port *p) {
    netchan__wanted *w = p->wanted;
    be(p->node);
    lock_net();
    netchan__end_wanted(&p->hub, w);
    unlock_net();
    trace("port %zu has asked for %s: %s", p->index, w->text, w->end ? "it is here" : netchan_strerror(w->result));
    if (w->result == NETCHAN_ETYPE) broken("a name is exported in the other direction");
    if (w->end) {
        keep_end(p->node, p->wanted_root, w->end);
        netchan_free(w->end);
    }
    free(w);
    p->wanted = NULL;
}

/* As netchan__await_import() begins. */
static void step_import(port *p) {
    place *root = &world.places[below(world.place_count)];
    if (p->wanted && (p->wanted->over || chance(20))) end_import(p);
    if (p->wanted || root->kind == IMPORT || root->kind == DIRECT) return;
    netchan__wanted *w = p->wanted = (netchan__wanted *)calloc(1, sizeof *w);
    CHECK(w != NULL);
    w->receives = chance(50);
    w->is_try = chance(50);
    w->result = NETCHAN_ETIMEDOUT;
    w->text = p->wanted_name;
    name_place(p->wanted_name, root, w->receives);
    p->wanted_root = root;
    trace("port %zu asks for %s", p->index, w->text);
    be(p->node);
    lock_net();
    w->number = ++p->hub.last_wanted;
    w->next = p->hub.wanted;
    p->hub.wanted = w;
    for (netchan__session *s = p->hub.sessions; s; s = s->next)
        if (!(w->is_try && s->peer.down) && !s->peer.leaving) netchan__ask(s, w);
    unlock_net();
}

/* A session is lost though its link is well, at any moment of what is negotiated over it. */
static void step_loss(void) {
    port *p = &world.ports[below(world.port_count)];
    netchan__session *s = p->open ? p->hub.sessions : NULL;
    while (s && s->next && chance(50)) s = s->next;
    if (!s) return;
    trace("port %zu gives session %llu up", p->index, (ull)s->peer.number);
    world.hung_up = true;
    be(p->node);
    lock_net();
    netchan__breach(&s->peer, "the simulator says so");
    netchan__hub_tick(&p->hub, world.now);
    unlock_net();
}

static void step_name(void) {
    port *p = &world.ports[below(world.port_count)];
    if (!p->open || p->hub.hanging_up || !has_places()) return;
    if (chance(40)) step_export(p);
    else if (chance(20)) step_unexport(p);
    else step_import(p);
}

static void step_trouble(void) {
    const plan *p = &world.plan;
    size_t n = below(p->nodes);
    for (size_t i = 0; i < p->nodes; i++) /* one more could not be told from the others */
        if ((i == running ? netchan__net.last_peer : world.nodes[i].net.last_peer) > MAX_PEERS - 100) return;
    side *x = rarely(p->stalls) ? draw_side() : NULL;
    if (x) x->stalled = world.now + below((size_t)p->ping_ms * 4) * (uint64_t)MS;
    if (rarely(p->jumps)) world.now += chance(70) ? below((size_t)p->ping_ms) * (uint64_t)MS
                                                  : below(5000000) * (uint64_t)MS;
    if (rarely(p->cuts)) break_link();
    if (rarely(p->forgeries) && world.port_count) forge_question();
    if (rarely(p->forgeries)) forge_answer();
    if (rarely(p->deaths) && world.nodes[n].alive) kill_node(n);
    if (rarely(p->hangups)) step_hangup();
    if (p->drops && world.place_count && rarely(p->drops)) step_drop();
    if (rarely(p->accepts) && world.port_count) step_accept();
    if (rarely(p->accepts) && world.port_count) step_direct();
    if (rarely(p->names) && world.port_count) step_name();
    if (rarely(p->losses) && world.port_count) step_loss();
    place *at = world.place_count ? &world.places[below(world.place_count)] : NULL;
    if (at && rarely(p->closes) && at->ch && !at->dropped && at->kind != DIRECT && at->ch->may_send && !at->closed &&
        !(at->port && at->port->hub.hanging_up)) close_place(at);
}

static void step(void) {
    world.now += below(world.plan.pace * 2000);
    step_trouble();
    check_step();
    if (rarely(world.plan.memory)) fail_in = 1 + (long)below(chance(50) ? 3 : 30);
    size_t n = below(world.plan.nodes);
    if (chance(15) && world.nodes[n].alive) tick_node(n);
    else if (chance(5)) step_return();
    else if (chance(world.plan.shape == ENDS ? 35 : 50)) step_task();
    else
        for (size_t i = world.plan.shape == ENDS ? 1 + below(4) : 1; i; i--) step_traffic();
    fail_in = 0;
}

static void empty_place(place *p) {
    be(p->node);
    for (netchan_value v; netchan_recv(p->ch, &v, NETCHAN_NOWAIT) == NETCHAN_OK; netchan_clear(&v)) continue;
}

static void tear_down(void) {
    trace("everybody hangs up");
    world.over = true;
    for (size_t i = 0; i < world.port_count; i++)
        if (world.ports[i].open) hang_up(&world.ports[i], 0);
    for (size_t i = 0; i < world.port_count; i++)
        if (world.ports[i].open) go_on_hanging_up(&world.ports[i]);
    for (size_t i = 0; i < 2 * MAX_CONNS; i++) {
        side *x = &world.conns[i / 2].sides[i % 2];
        if (!x->open) continue;
        be(x->port->node);
        lock_net();
        close_side(x, "this side hung up");
        unlock_net();
    }
    for (size_t i = 0; i < world.port_count; i++)
        if (world.ports[i].open) go_on_hanging_up(&world.ports[i]);
    for (size_t i = 0; i < world.place_count; i++) {
        place *p = &world.places[i];
        if (p->ch && !p->closed && !p->dropped && p->ch->may_send) close_place(p);
        observe();
    }
    check_values();
    for (size_t i = 0; i < MAX_THREADS; i++) {
        if (!world.tasks[i]) continue;
        if (!world.tasks[i]->told) broken("op %llu survives the hangup", (ull)world.tasks[i]->op.id);
        reap(world.tasks[i]);
    }
    for (size_t i = 0; i < world.place_count; i++) /* which may hold each other */
        if (world.places[i].ch && (world.places[i].kind == LOCAL || world.places[i].kind == OWN_RECV))
            empty_place(&world.places[i]);
    for (size_t i = 0; i < world.place_count; i++)
        if (world.places[i].ch && world.places[i].kind != DIRECT)
            be(world.places[i].node), netchan_free(world.places[i].ch);
    for (size_t i = 0; i < world.plan.nodes; i++) {
        block *head = &world.nodes[i].blocks;
        be(i);
        if (netchan__net.waiters.count || netchan__net.matches.count) broken("waiters or matches are left");
        if (netchan__net.peers || netchan__net.pending) broken("sessions are left");
        netchan__map_free(&netchan__net.waiters);
        netchan__map_free(&netchan__net.matches);
        if (netchan__net.relays.count || netchan__net.by_number.count) broken("relays or peers are left");
        netchan__map_free(&netchan__net.relays);
        netchan__map_free(&netchan__net.by_number);
        if (netchan__dead) broken("a channel was not buried");
        if (head->next != head) broken("a block of %zu bytes was not freed", head->next->size);
    }
}

static void run_seed(void) {
    random_state = seed * 0x9E3779B97F4A7C15u ^ 0xD1B54A32D192ED03u;
    for (int i = 0; i < 8; i++) draw();
    build();
    for (size_t i = 0; i < world.plan.steps; i++) {
        step();
        check_step();
    }
    restore();
    come_to_rest();
    check_rest();
    if (chance(50)) drain();
    tear_down();
    add_up(&shared->seeds, 1);
    add_up(&shared->values, world.value_count);
}

/* --- all seeds ---------------------------------------------------------------------------------------------------- */

static uint64_t block_first, block_size;
static long long deadline; /* of the tests, in milliseconds; 0: none */

static void run_block(void) {
    (void)random_by_clock; /* compiled, and not wanted */
    for (uint64_t i = 0; i < block_size; i++) {
        if (deadline && i >= FEWEST / BLOCKS && test_ms() > deadline) break;
        static char name[32];
        seed = shared->seed[slot] = block_first + i;
        snprintf(name, sizeof name, "seed %llu", (ull)seed);
        test_name = name;
        alarm(SEED_LIMIT);
        run_seed();
    }
}

/* The tests: blocks of seeds, which share the time there is. */
static int run_tests(void) {
    int passed = 0, failed = 0;
    long long begin = test_ms();
    for (uint64_t i = 0; i < BLOCKS; i++) {
        char name[64];
        test_entry entry = {name, run_block};
        block_first = 1 + SEEDS * i / BLOCKS;
        block_size = SEEDS / BLOCKS;
        deadline = begin + SECONDS * 1000LL * (long long)(i + 1) / BLOCKS;
        snprintf(name, sizeof name, "seeds %llu to %llu", (ull)block_first, (ull)(block_first + block_size - 1));
        if (test_run(&entry)) passed++;
        else {
            failed++;
            printf("%s: ended with seed %llu\n", name, (ull)shared->seed[slot]);
        }
    }
    printf("%llu seeds, %llu values, %llu cuts, %llu ends, %llu relayed operations\n", (ull)shared->seeds,
           (ull)shared->values, (ull)shared->cuts, (ull)shared->ends, (ull)shared->relayed);
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}

/* One process of a simulation, and the seeds that are left for it. */
typedef struct worker {
    pid_t pid;
    uint64_t next, end;
} worker;

static void start_worker(worker *workers, size_t i) {
    fflush(stdout);
    workers[i].pid = fork();
    CHECK(workers[i].pid >= 0);
    if (workers[i].pid) return;
    slot = i;
    block_first = workers[i].next;
    block_size = workers[i].end - workers[i].next;
    run_block();
    exit(0);
}

/* All cores take their share; after a violation the rest goes on. */
static int simulate(uint64_t seeds, uint64_t first) {
    worker workers[MAX_CORES];
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    size_t n = cores < 1 ? 1 : cores > MAX_CORES ? MAX_CORES : (size_t)cores, alive;
    uint64_t violations = 0;
    if (n > seeds) n = (size_t)seeds;
    for (size_t i = 0; i < n; i++) {
        workers[i].next = first + seeds * i / n;
        workers[i].end = first + seeds * (i + 1) / n;
        start_worker(workers, i);
    }
    for (alive = n; alive;) {
        int status = 0;
        pid_t pid = wait(&status);
        size_t i = 0;
        while (i < n && workers[i].pid != pid) i++;
        if (pid < 0 || i == n) continue;
        alive--;
        if (status == 0) continue;
        violations++;
        if (WIFSIGNALED(status)) printf("seed %llu: %s\n", (ull)shared->seed[i], strsignal(WTERMSIG(status)));
        else if (WEXITSTATUS(status) != TEST_FAILED)
            printf("seed %llu: exit code %d\n", (ull)shared->seed[i], WEXITSTATUS(status));
        workers[i].next = shared->seed[i] + 1;
        if (workers[i].next >= workers[i].end) continue;
        start_worker(workers, i);
        alive++;
    }
    printf("sim: seeds=%llu values=%llu cuts=%llu ends=%llu relayed=%llu violations=%llu\n", (ull)seeds,
           (ull)shared->values, (ull)shared->cuts, (ull)shared->ends, (ull)shared->relayed, (ull)violations);
    return violations ? 1 : 0;
}

static uint64_t argument(int argc, char **argv, int i, uint64_t otherwise) {
    return argc > i ? strtoull(argv[i], NULL, 10) : otherwise;
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    shared = (struct shared *)mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED);
    if (strcmp(what, "sim") == 0) return simulate(argument(argc, argv, 2, 10000), argument(argc, argv, 3, 1));
    if (strcmp(what, "trace") != 0) return run_tests();
    tracing = true;
    block_first = argument(argc, argv, 2, 1);
    block_size = 1;
    run_block();
    printf("seed %llu: no violation\n", (ull)seed);
    return 0;
}
