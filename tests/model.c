/* Models of what processes say to each other, and a checker that tries everything that can happen in them. They are
 * written anew from the rules of netchan.h and share no code with it; small, so that all of their states can be
 * visited.
 *
 *     model                    the tests: each scenario holds, each deliberate mistake is caught
 *     model -v                 also tells of each how many states and moves it has
 *     model NAME [MISTAKE]     one scenario; what goes wrong is told from the beginning, by a shortest way
 *
 * The commit protocol is modelled as sections [9] to [11] of netchan.h have it: homes and ends on two to four nodes,
 * operations with their timeouts, tries, values in fragments, work queues, closing, relays (of ends that were given
 * on), and sessions that are lost. Frames travel in lines, one each way between two nodes. What may happen, happens at
 * any moment: an operation begins, a frame arrives, a fragment is put into its line, a time is up, a channel is
 * closed, a session is lost, a node learns of that. Inside a node all is deterministic, and what an event sets free is
 * worked off at once. Two small models follow: values within credit, and the release of ends that travel in values.
 *
 * In every state: each value is taken at most once (or again, marked as redelivered); OK is the truth on both sides,
 * and so is what did not happen; EUNKNOWN comes only of a value that left; values of one sender keep their order; no
 * frame comes that its receiver would call a breach. At rest, when nothing but timeouts, closes and losses could
 * still happen: who waits is registered all the way and has no partner; no entry, match or reference is left over.
 * And no way leads back to a state that was before: nothing can go on for ever.
 *
 * Not modelled: memory and its limits, patience, farewells (BYE) and hanging up, several lanes of one channel, links
 * that break and resume (a slow line: nothing here depends on time), a new session after a loss (but for credit),
 * credit and DATA in the commit protocol (a sender of another node enters a buffer by OFFER). netchan.h has no
 * prefetch, so neither this nor its lease is here. */
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint8_t u8;

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { LIMIT = 300000 };
#else
enum { LIMIT = 8000000 }; /* states of one scenario; those that are not visited are told by -v */
#endif

/* --- the checker --- */

enum { WORDS = 200, MOVES = 200, WAY = 400 }; /* 8-byte words of a state; moves from one state; moves of a way */
enum { OPTIONAL = 0x8000 }; /* in the code of a move: it may never happen. With no other a state is at rest */

/* What can be explored: a state of plain bytes, in which all that is not used is 0. */
typedef struct model {
    void *state;
    size_t size;             /* whole words are packed: its last bytes are padding */
    bool (*start)(int root); /* makes a first state; false: there is none of this number */
    void (*moves)(void);     /* calls can() for each move that is possible */
    void (*make)(unsigned code);
    void (*check)(bool at_rest);
    void (*tell)(unsigned code, char *text, size_t room);
} model;

static char failure[200]; /* what is wrong with the state, or with the move to it */
static unsigned possible[MOVES];
static int possible_count;

static void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void fail(const char *format, ...) {
    va_list args;
    if (failure[0]) return;
    va_start(args, format);
    vsnprintf(failure, sizeof failure, format, args);
    va_end(args);
}

static void can(unsigned code) {
    if (possible_count < MOVES) possible[possible_count++] = code;
    else fail("the model: too many moves");
}

typedef struct packed {
    u8 *data;
    size_t size, room;
} packed;

/* One exploration. A state is kept packed until its successors are known, then only as a number, the hash of its packed
 * bytes, and the way to it. */
static struct {
    uint64_t *hash;
    uint32_t *parent, *first_edge, *edges, *table;
    uint16_t *move;
    size_t count, room, edge_count, edge_room;
    packed level, next; /* states, all as far from the start */
} graph;

static void *resize(void *p, size_t count, size_t size) {
    p = realloc(p, count * size);
    if (p) return p;
    puts("out of memory");
    exit(2);
}

static void graph_room(void) {
    if (graph.count < graph.room) return;
    graph.room = graph.room ? 2 * graph.room : 1 << 12;
    graph.hash = (uint64_t *)resize(graph.hash, graph.room, sizeof *graph.hash);
    graph.parent = (uint32_t *)resize(graph.parent, graph.room, sizeof *graph.parent);
    graph.first_edge = (uint32_t *)resize(graph.first_edge, graph.room + 1, sizeof *graph.first_edge);
    graph.move = (uint16_t *)resize(graph.move, graph.room, sizeof *graph.move);
    graph.table = (uint32_t *)resize(graph.table, 2 * graph.room, sizeof *graph.table);
    memset(graph.table, 0, 2 * graph.room * sizeof *graph.table);
    for (size_t i = 0, at; i < graph.count; i++) {
        for (at = graph.hash[i] & (2 * graph.room - 1); graph.table[at]; at = (at + 1) & (2 * graph.room - 1)) continue;
        graph.table[at] = (uint32_t)i + 1;
    }
}

static void graph_free(void) {
    free(graph.hash), free(graph.parent), free(graph.first_edge), free(graph.move), free(graph.table);
    free(graph.edges), free(graph.level.data), free(graph.next.data);
    memset(&graph, 0, sizeof graph);
}

/* Words that are 0 are counted, each other one is a mask and those of its bytes that are not 0. */
static size_t pack(u8 *out, const u8 *state, size_t words) {
    u8 *at = out;
    for (size_t i = 0; i < words;) {
        u8 run = 0;
        for (uint64_t word; i < words && run < 255; i++, run++) {
            memcpy(&word, state + 8 * i, 8);
            if (word) break;
        }
        if (run) {
            *at++ = 0, *at++ = run;
            continue;
        }
        u8 *mask = at++;
        *mask = 0;
        for (unsigned b = 0; b < 8; b++) {
            if (!state[8 * i + b]) continue;
            *mask = (u8)(*mask | 1u << b);
            *at++ = state[8 * i + b];
        }
        i++;
    }
    return (size_t)(at - out);
}

static size_t unpack(u8 *state, const u8 *in, size_t words) {
    const u8 *start = in;
    memset(state, 0, words * 8);
    for (size_t i = 0; i < words;) {
        u8 mask = *in++;
        if (!mask) {
            i += *in++;
            continue;
        }
        for (unsigned b = 0; b < 8; b++)
            if (mask >> b & 1) state[8 * i + b] = *in++;
        i++;
    }
    return (size_t)(in - start);
}

/* Multiply and fold, with the constants of MurmurHash3. Of 8 million states two share a hash in one run of 600,000. */
static uint64_t hash_of(const u8 *data, size_t size) {
    uint64_t h = 0x9E3779B97F4A7C15u ^ size;
    for (size_t at = 0; at < size; at += 8) {
        uint64_t word = 0;
        memcpy(&word, data + at, size - at < 8 ? size - at : 8);
        h = (h ^ word) * 0xff51afd7ed558ccdu;
        h = (h ^ h >> 29) * 0xc4ceb9fe1a85ec53u;
        h ^= h >> 32;
    }
    return h;
}

/* Enters the state of the model, unless it is known. Returns its number. */
static uint32_t enter(const model *m, uint32_t parent, unsigned code) {
    u8 bytes[WORDS * 9];
    size_t size = pack(bytes, (const u8 *)m->state, m->size / 8), at;
    uint64_t hash = hash_of(bytes, size);
    graph_room();
    for (at = hash & (2 * graph.room - 1); graph.table[at]; at = (at + 1) & (2 * graph.room - 1))
        if (graph.hash[graph.table[at] - 1] == hash) return graph.table[at] - 1;
    uint32_t number = (uint32_t)graph.count++;
    graph.table[at] = number + 1;
    graph.hash[number] = hash;
    graph.parent[number] = parent;
    graph.move[number] = (uint16_t)code;
    if (graph.next.size + size > graph.next.room) {
        graph.next.room = 2 * (graph.next.room + size);
        graph.next.data = (u8 *)resize(graph.next.data, graph.next.room, 1);
    }
    memcpy(graph.next.data + graph.next.size, bytes, size);
    graph.next.size += size;
    return number;
}

static void add_edge(uint32_t to) {
    if (graph.edge_count == graph.edge_room) {
        graph.edge_room = graph.edge_room ? 2 * graph.edge_room : 1 << 14;
        graph.edges = (uint32_t *)resize(graph.edges, graph.edge_room, sizeof *graph.edges);
    }
    graph.edges[graph.edge_count++] = to;
}

typedef struct finding {
    char what[sizeof failure]; /* "": nothing is wrong */
    unsigned way[WAY];         /* the number of the start, then moves */
    int length;
    size_t states, moves;
    bool bounded;              /* there are more states */
} finding;

/* What is wrong with a state, or with a move from it (-1: none). */
static void note(finding *f, uint32_t state, long code) {
    int at = code >= 0;
    for (uint32_t s = state; graph.parent[s] != UINT32_MAX; s = graph.parent[s]) at++;
    f->length = at + 1 < WAY ? at + 1 : WAY;
    if (code >= 0 && at < WAY) f->way[at] = (unsigned)code;
    for (at -= code >= 0; at >= 0; at--, state = graph.parent[state])
        if (at < WAY) f->way[at] = graph.move[state];
    memcpy(f->what, failure, sizeof failure);
}

/* Depth-first over the edges, looking for a way back. */
static void find_cycle(finding *f) {
    u8 *colour = (u8 *)resize(NULL, graph.count, 1);
    uint32_t *stack = (uint32_t *)resize(NULL, graph.count, sizeof *stack);
    uint32_t *at = (uint32_t *)resize(NULL, graph.count, sizeof *at);
    memset(colour, 0, graph.count);
    for (uint32_t root = 0; root < graph.count && graph.parent[root] == UINT32_MAX; root++) {
        size_t depth = 0;
        if (!colour[root]) colour[root] = 1, stack[0] = root, at[0] = graph.first_edge[root], depth = 1;
        while (depth && !f->what[0]) {
            uint32_t s = stack[depth - 1];
            if (at[depth - 1] == graph.first_edge[s + 1]) {
                colour[s] = 2;
                depth--;
                continue;
            }
            uint32_t to = graph.edges[at[depth - 1]++];
            if (colour[to] == 1) {
                size_t round = 1;
                while (stack[depth - round] != to) round++;
                fail("it can go on for ever: %zu moves lead back to this state", round);
                note(f, to, -1);
            } else if (!colour[to]) colour[to] = 1, stack[depth] = to, at[depth++] = graph.first_edge[to];
        }
    }
    free(colour), free(stack), free(at);
}

/* Visits the states of one level. What is wrong with one of them is a shorter way than what is wrong with a move from
 * one: after a bad move states are only looked at. */
static void explore_level(const model *m, uint32_t number, finding *f) {
    static uint64_t saved[WORDS];
    for (size_t at = 0; at < graph.level.size; number++) {
        at += unpack((u8 *)m->state, graph.level.data + at, m->size / 8);
        memcpy(saved, m->state, m->size);
        failure[0] = 0;
        possible_count = 0;
        m->moves();
        bool at_rest = true;
        for (int i = 0; i < possible_count; i++) at_rest = at_rest && possible[i] & OPTIONAL;
        m->check(at_rest);
        if (failure[0]) {
            note(f, number, -1);
            return;
        }
        graph.first_edge[number] = (uint32_t)graph.edge_count;
        for (int i = 0; i < possible_count && !f->what[0]; i++, f->moves++) {
            memcpy(m->state, saved, m->size);
            m->make(possible[i]);
            if (failure[0]) note(f, number, (long)possible[i]);
            else add_edge(enter(m, number, possible[i]));
        }
        graph.first_edge[number + 1] = (uint32_t)graph.edge_count;
    }
}

static void explore(const model *m, finding *f) {
    memset(f, 0, sizeof *f);
    for (int root = 0; memset(m->state, 0, m->size), m->start(root); root++) enter(m, UINT32_MAX, (unsigned)root);
    for (uint32_t first = 0; !f->what[0] && graph.next.size && !f->bounded;) {
        packed level = graph.level;
        uint32_t end = (uint32_t)graph.count;
        graph.level = graph.next;
        graph.next = level;
        graph.next.size = 0;
        explore_level(m, first, f);
        first = end;
        f->bounded = graph.count > LIMIT;
    }
    f->states = graph.count;
    if (!f->what[0] && !f->bounded) find_cycle(f);
    graph_free();
}

static void print_way(const model *m, const finding *f) {
    char text[200];
    failure[0] = 0;
    memset(m->state, 0, m->size);
    m->start((int)f->way[0]);
    for (int i = 1; i < f->length; i++) {
        m->tell(f->way[i], text, sizeof text);
        printf("    %3d  %s\n", i, text);
        m->make(f->way[i]);
    }
    printf("         %s\n", f->what);
}

/* --- lists of small numbers, which end with 0 or where their room ends --- */

static int list_length(const u8 *list, int room) {
    int n = 0;
    while (n < room && list[n]) n++;
    return n;
}

static void list_add(u8 *list, int room, int item, bool at_front) {
    int n = list_length(list, room);
    if (n == room) {
        fail("the model: a list is full");
        return;
    }
    if (at_front) memmove(list + 1, list, (size_t)n);
    list[at_front ? 0 : n] = (u8)item;
}

static int list_find(const u8 *list, int room, int item) {
    for (int i = 0; i < room; i++)
        if (list[i] == item) return i;
    return -1;
}

static void list_remove(u8 *list, int room, int item) {
    int at = list_find(list, room, item);
    if (at < 0) return;
    memmove(list + at, list + at + 1, (size_t)(room - at - 1));
    list[room - 1] = 0;
}

static int list_pop(u8 *list, int room) {
    int item = list[0];
    list_remove(list, room, item);
    return item;
}

/* --- deliberate mistakes --- */

enum mistake {
    NONE, LOCK_RECEIVER_FIRST, LOCK_SENDER_FIRST, BUSY_ANSWER, ABANDON, FORGET_WITHDRAW, DECLINE_LOSES, RELEASE_BLIND,
    TRY_EARLY, NO_PIN, MATCH_ITSELF, OK_BEFORE_TAKEN, RELEASE_COMMITTED, REDELIVER_RENDEZVOUS, REDELIVER_UNMARKED,
    CLOSING_LATE, CLOSED_EARLY, FRAGMENTS_FIRST, RELAY_FORGETS, RELAY_NOT_TAKEN, RELAY_OWN_IDS, RELAY_DROPS_WITHDRAW,
    RELAY_ENDS_SHIPPED, RELAY_CUTS_FRAGMENTS, RELAY_HIDES_UNKNOWN, RELAY_WANTS_TAKEN, RELEASE_MISSES_GONE, CREDIT_KEPT,
    UNSENT_UNKNOWN, UNSENT_LAST, DROP_COUNTS_ONE, FIRST_DROP, COPY_KNOWS_NOTHING, RELAY_LETS_GO, LOSS_WITH_LAST
};
static enum mistake mistake;

/* --- the commit protocol: scenarios --- */

enum { NODES = 4, CHANNELS = 3, OPS = 6, CASES = 3, KEYS = 12, CLOSES = 2 };
enum { LIST = 6, LINE = 14, MATCHES = 5, LOADS = 4, BUFFER = 2, SLOT = 15, FRAGMENTS = 2 };
enum { FOREVER, TIMED, TRY };

typedef struct scene {
    const char *name;
    const model *model;
    const char *channels, *ops, *events; /* of the commit protocol */
} scene;

/* A scenario, read from its texts. Cases are numbered from 1 over all operations. This number, the key, also names what
 * the case sends, and its entry at its home and at relays. A match has the keys of its two cases; SLOT instead of the
 * receive is a slot of the buffer. */
static struct {
    int nodes, channels, ops, keys, closes;
    int home[CHANNELS], cap[CHANNELS];
    int node[OPS], thread[OPS], mode[OPS], first[OPS], cases[OPS];
    int op[KEYS + 1], ch[KEYS + 1], owner[KEYS + 1], base[KEYS + 1]; /* base: the home */
    int up[KEYS + 1][NODES], down[KEYS + 1][NODES]; /* the next node on the way to the home, and to the owner */
    int relay[KEYS + 1][NODES];                     /* that node is the first or second relay on the way, or none */
    bool send[KEYS + 1], large[KEYS + 1], local[KEYS + 1];
    int close_ch[CLOSES], close_node[CLOSES];
    bool lose[NODES][NODES], down_link[NODES][NODES];
} sc;

static int node_of(char c) {
    int n = c - 'A';
    if (n + 1 > sc.nodes) sc.nodes = n + 1;
    return n;
}

/* "A0 B2": channel a has its home at A and capacity 0, b at B and 2. */
static void read_channels(const char *p) {
    for (; *p; p += p[2] ? 3 : 2) {
        sc.home[sc.channels] = node_of(p[0]);
        sc.cap[sc.channels++] = p[1] - '0';
    }
}

/* "/BC": the end came from B, which had it from C, which had it from the home. */
static const char *read_way(int k, const char *p) {
    int at = sc.owner[k], count = 0;
    sc.local[k] = *p != '/' && at == sc.base[k];
    for (p += *p == '/'; *p >= 'A' && *p <= 'D'; p++, at = sc.up[k][at]) {
        int relay = node_of(*p);
        sc.up[k][at] = relay;
        sc.down[k][relay] = at;
        sc.relay[k][relay] = ++count;
    }
    sc.up[k][at] = sc.base[k];
    sc.down[k][sc.base[k]] = at;
    return p;
}

/* "A a!; B~ a?b!*; C1% c?/B": at A a send on a that waits for ever, at B a select with a timeout of a receive on a and
 * a send of a large value on b, in thread 1 of C a try to receive from an end of c that came from B. */
static void read_ops(const char *p) {
    for (; *p; p += strspn(p, "; ")) {
        int o = sc.ops++;
        sc.node[o] = node_of(*p++);
        sc.thread[o] = *p >= '0' && *p <= '9' ? 10 * sc.node[o] + *p++ - '0' : 100 + o;
        if (*p == '~' || *p == '%') sc.mode[o] = *p++ == '~' ? TIMED : TRY;
        sc.first[o] = sc.keys + 1;
        for (p += *p == ' '; *p && *p != ';'; sc.cases[o]++) {
            int k = ++sc.keys;
            sc.op[k] = o;
            sc.ch[k] = *p++ - 'a';
            sc.owner[k] = sc.node[o];
            sc.base[k] = sc.home[sc.ch[k]];
            sc.send[k] = *p++ == '!';
            sc.large[k] = *p == '*';
            p = read_way(k, p + (*p == '*'));
        }
    }
}

/* "close aA": at A; "lose AB"; "down AB": the link is broken, as A sees it, for a while. Each may happen once. */
static void read_events(const char *p) {
    for (; *p; p += *p == ' ') {
        int at = *p == 'c' ? 6 : 5, a = p[at], b = node_of(p[at + 1]);
        if (*p == 'c') sc.close_ch[sc.closes] = a - 'a', sc.close_node[sc.closes++] = b;
        else (*p == 'l' ? sc.lose : sc.down_link)[node_of((char)a)][b] = true;
        p += at + 2;
    }
}

static void read_scene(const scene *s) {
    memset(&sc, 0, sizeof sc);
    read_channels(s->channels);
    read_ops(s->ops);
    read_events(s->events);
}

/* --- the commit protocol: the state --- */

enum { NEW, OPEN, ENGAGED, COMMITTED, DONE };
enum { OK = 1, TIMEDOUT, ECLOSED, ELOST, EUNKNOWN };
static const char *const result_names[] = {"", "OK", "ETIMEDOUT", "ECLOSED", "ELOST", "EUNKNOWN"};

enum {
    OFFER = 1, DEMAND, WITHDRAW, GRANT, DECLINE, TAKEN, FRAGMENT, CLAIM, COMMIT, RELEASE, ACCEPT, WITHDRAWN, BUSY,
    CLOSE, CLOSING, CLOSED, GONE /* of a channel, not of an entry */
};
static const char *const frame_names[] = {"", "OFFER", "DEMAND", "WITHDRAW", "GRANT", "DECLINE", "TAKEN", "FRAGMENT",
    "CLAIM", "COMMIT", "RELEASE", "ACCEPT", "WITHDRAWN", "BUSY", "CLOSE", "CLOSING", "CLOSED", "GONE"};

enum { FINAL = 1, WHOLE = 2, AGAIN = 4, UNKNOWN = 8 }; /* WHOLE: with this a value is complete; AGAIN: redelivered */
typedef struct frame {
    u8 type, key, other, bits; /* other: the other case of the match; of ACCEPT the result */
} frame;

typedef struct line {
    u8 count;
    frame at[LINE];
} line;

typedef struct oper {
    u8 state, engaged, result, key, got, tries; /* engaged: with which case; key: which one happened; got: the value */
    u8 claims[CASES];                           /* cases with claims that wait until it is open */
    bool expired, again;                        /* again: got was marked as redelivered */
} oper;

enum { NO_ENTRY, IDLE, CLAIMED, GRANTED, SHIPPED };

/* An entry at a relay. It has the step and the match of its home's claim, until that is over. */
typedef struct relay {
    u8 step, match, gathered; /* match: the other case; gathered: fragments that came, and 1 */
    bool carried, again;      /* the claim has the value; that is marked as redelivered */
    bool orphan, headless;    /* the session to the owner is lost; to the home */
    bool gone;                /* the end is lost, for good */
} relay;

/* A case, as those know it who have to do with it. */
typedef struct waiter {
    bool registered, lost, closing, closed, gone; /* at its owner, with what is known of the end */
    bool claim_final, claim_carried, claim_again;
    u8 claim, incoming;                           /* the other case of the match; fragments that came, and 1 */
    bool present, withdrawn, dead;                /* at home, of another node; dead: its session is lost */
    relay relay[2];
} waiter;

enum { OUT = 1, PINNED = 2 /* and AGAIN */ }; /* a value that is out on a claim; on one that can be declined */
typedef struct channel {
    u8 senders[LIST], receivers[LIST]; /* idle, or engaged elsewhere; in order */
    u8 values[BUFFER], value_bits[BUFFER];
    bool closing, closed;
} channel;

enum { FROM_BUFFER = 1, TO_BUFFER = 2, RECEIVER_FIRST = 4, CARRIED = 8, SENDER_GONE = 16, RECEIVER_GONE = 32 };
typedef struct match {
    u8 s, r, step, bits, incoming; /* s 0: there is none. step: 0, 1: that lock is asked for, 2: both are, 3: shipped */
} match;

typedef struct load {
    u8 from, to, key, other, left; /* fragments of a large value that are not in the line yet */
} load;

static struct state {
    oper op[OPS];
    waiter w[KEYS + 1];
    channel ch[CHANNELS];
    match m[MATCHES];
    load load[LOADS];
    line line[NODES][NODES];
    uint16_t unsent[NODES][NODES];               /* entries whose value stood in a line that was lost, and never left */
    bool lost[NODES][NODES], knows[NODES][NODES]; /* the session is lost; the first node knows */
    uint16_t left;                               /* values that have left a node */
    u8 rank[OPS], closes, padding[8];            /* rank: the order of operations with several cases */
} S;

/* Within one move: matches that have fallen through, operations that are to be open again. */
static match *declined[MATCHES];
static int released[OPS], declined_count, released_count;

static int value_of(int k, int other) { return sc.send[k] ? k : other; }
static bool is_multi(int k) { return sc.cases[sc.op[k]] > 1; }
static bool is_relayed(int k) { return sc.down[k][sc.base[k]] != sc.owner[k]; }
static bool is_firm(int k) { return !is_multi(k) && sc.mode[sc.op[k]] == FOREVER && !is_relayed(k); }
static int last_key(int o) { return sc.first[o] + sc.cases[o] - 1; }
static relay *relay_of(int k, int n) { return sc.relay[k][n] ? &S.w[k].relay[sc.relay[k][n] - 1] : NULL; }

/* The value comes with the OFFER and is the home's to match. */
static bool is_here(int k) {
    return sc.send[k] && !sc.local[k] && !is_relayed(k) && !is_multi(k) && sc.mode[sc.op[k]] != TIMED && !sc.large[k] &&
           !sc.cap[sc.ch[k]];
}

static u8 *queue_of(int k) { return sc.send[k] ? S.ch[sc.ch[k]].senders : S.ch[sc.ch[k]].receivers; }
static void enqueue(int k, bool at_front) { list_add(queue_of(k), LIST, k, at_front); }
static void dequeue(int k) { list_remove(queue_of(k), LIST, k); }

/* --- sessions: lines of frames, which can be lost --- */

static void emit(int from, int to, int type, int k, int other, int bits) {
    line *l = &S.line[from][to];
    frame f = {(u8)type, (u8)k, (u8)other, (u8)bits};
    if (S.knows[from][to]) return;
    if (S.lost[from][to]) { /* not known here: it is kept and never leaves */
        if (bits & WHOLE) S.unsent[from][to] = (uint16_t)(S.unsent[from][to] | 1u << k);
    } else if (l->count == LINE) fail("the model: a line is full");
    else l->at[l->count++] = f;
}

/* A frame with a value, which is shipped after it if it is large; other frames may come between. */
static void emit_value(int from, int to, int type, int k, int other, int bits) {
    load fragments = {(u8)from, (u8)to, (u8)k, (u8)other, FRAGMENTS}, *l = S.load;
    bool large = sc.large[value_of(k, other)];
    emit(from, to, type, k, other, bits | (large ? 0 : WHOLE));
    if (!large || S.knows[from][to]) return;
    while (l < S.load + LOADS && l->left) l++;
    if (l < S.load + LOADS) *l = fragments;
    else fail("the model: too many large values");
}

/* The session is lost: had all of the value v left, which was sent to or from entry k? */
static bool had_left(int from, int to, int k, int v) {
    if (mistake == FRAGMENTS_FIRST && sc.large[v]) return true;
    for (const load *l = S.load; l < S.load + LOADS; l++)
        if (l->left && l->from == from && l->to == to && l->key == k) return false;
    return !(S.unsent[from][to] >> k & 1);
}

/* Is a session between the case and its home lost? */
static bool way_is_lost(int k) {
    for (int n = sc.owner[k], next; !sc.local[k]; n = next) {
        next = sc.up[k][n];
        if (S.lost[n][next]) return true;
        if (next == sc.base[k]) break;
    }
    return false;
}

/* --- operations --- */

/* Fails if the frame is one that may not come. Returns whether it is. */
static bool breach(bool wrong, int n, const frame *f) {
    if (wrong) fail("%c calls it a breach: %s for entry %d, %d", 'A' + n, frame_names[f->type], f->key, f->other);
    return wrong;
}

static int party(const match *m, int step) {
    if (((m->bits & RECEIVER_FIRST) != 0) == (step == 0)) return m->bits & (TO_BUFFER | RECEIVER_GONE) ? 0 : m->r;
    return m->bits & (FROM_BUFFER | SENDER_GONE) ? 0 : m->s;
}

static match *match_of(int k) {
    for (match *m = S.m; m < S.m + MATCHES; m++)
        if (m->s && (party(m, 0) == k || party(m, 1) == k)) return m;
    return NULL;
}

static void unclaim(waiter *w) {
    w->claim_final = w->claim_carried = w->claim_again = false;
    w->claim = w->incoming = 0;
}

static void unregister(int k) {
    S.w[k].registered = S.w[k].lost = false;
    unclaim(&S.w[k]);
}

/* The operation is done with all its cases but k. */
static void withdraw_others(int o, int k) {
    int n = sc.node[o];
    for (int j = sc.first[o]; j <= last_key(o); j++) {
        waiter *w = &S.w[j];
        match *m = sc.local[j] ? match_of(j) : NULL;
        if (j == k) continue;
        if (sc.local[j]) dequeue(j);
        if (m) {
            if (party(m, m->step) == j) declined[declined_count++] = m; /* else the other is asked, and answers */
            m->bits = (u8)(m->bits | (sc.send[j] ? SENDER_GONE : RECEIVER_GONE));
        } else if (w->registered) emit(n, sc.up[j][n], w->claim ? DECLINE : WITHDRAW, j, w->claim, 0);
        unregister(j);
    }
    memset(S.op[o].claims, 0, sizeof S.op[o].claims);
    for (int i = 0; i < released_count; i++)
        if (released[i] == o) released[i] = released[--released_count];
}

static void finish(int o, int k, int result) {
    oper *p = &S.op[o];
    if (p->state == DONE) fail("operation %d ends twice", o + 1);
    p->state = DONE;
    p->result = (u8)result;
    p->key = (u8)k;
    p->engaged = p->tries = 0;
    p->expired = false;
    withdraw_others(o, k);
    if (k && sc.local[k]) dequeue(k);
    if (k) unregister(k);
}

static bool seize(int k) {
    oper *p = &S.op[sc.op[k]];
    if (p->state != OPEN) return false;
    p->state = ENGAGED;
    return true;
}

static int takes(int v) {
    int count = 0;
    for (int o = 0; o < sc.ops; o++) count += S.op[o].got == v;
    return count;
}

/* The receive of case k gets the value. */
static void take(int k, int v, bool again) {
    const oper *sender = &S.op[sc.op[v]];
    if (takes(v) && !sc.cap[sc.ch[v]]) fail("value %d of a rendezvous is taken twice", v);
    if (sender->state == DONE && sender->result != OK && sender->result != EUNKNOWN)
        fail("value %d is taken, whose send has ended with %s", v, result_names[sender->result]);
    if (S.ch[sc.ch[k]].closed && !way_is_lost(k)) fail("value %d is taken after receivers were told of the close", v);
    for (int o = 0; o < sc.ops && !again; o++) {
        int got = S.op[o].got;
        if (got == v && !S.op[o].again) fail("value %d is taken twice, and was not marked as redelivered", v);
        if (got && o < sc.op[k] && sc.thread[o] == sc.thread[sc.op[k]] && sc.ch[got] == sc.ch[v] &&
            sc.thread[sc.op[got]] == sc.thread[sc.op[v]] && sc.op[got] > sc.op[v])
            fail("value %d is taken after value %d, which was sent later", v, got);
    }
    S.op[sc.op[k]].got = (u8)v;
    S.op[sc.op[k]].again = again;
    finish(sc.op[k], k, OK);
}

/* --- the home --- */

static void forget(int k) {
    dequeue(k);
    S.w[k].present = S.w[k].withdrawn = S.w[k].dead = false;
}

static void emit_to_owner(int k, int type, int other, int bits) {
    emit(sc.base[k], sc.down[k][sc.base[k]], type, k, other, bits);
}

static void finish_sender(int k, int result) {
    if (sc.local[k]) finish(sc.op[k], k, result);
    else {
        if (!S.w[k].dead) emit_to_owner(k, ACCEPT, result, 0);
        forget(k);
    }
}

static bool can_lock(int k) { return k == 0 || (sc.local[k] ? S.op[sc.op[k]].state == OPEN : is_here(k)); }
static bool is_claimable(int k) { return k && (sc.local[k] ? is_multi(k) : !is_here(k)); }

/* Whose operation the home takes an entry for. */
static int identity(int k) { return mistake == RELAY_OWN_IDS && is_relayed(k) ? OPS + k : sc.op[k]; }
static int rank(int k) { return identity(k) < OPS ? S.rank[identity(k)] : identity(k); }
static bool same_op(int a, int b) { return mistake != MATCH_ITSELF && identity(a) == identity(b); }

/* What is known of a value in the buffer. */
static u8 *value_bits(int v) {
    channel *ch = &S.ch[sc.ch[v]];
    return &ch->value_bits[list_find(ch->values, BUFFER, v)];
}

static void buffer_remove(int v) {
    channel *ch = &S.ch[sc.ch[v]];
    int at = list_find(ch->values, BUFFER, v);
    memmove(ch->value_bits + at, ch->value_bits + at + 1, (size_t)(BUFFER - at - 1));
    ch->value_bits[BUFFER - 1] = 0;
    list_remove(ch->values, BUFFER, v);
}

/* The value that is next to leave, or 0. While one is out that may come back, none is. */
static int buffer_head(const channel *c) {
    int head = 0;
    for (int i = BUFFER - 1; i >= 0; i--) {
        if (c->value_bits[i] & PINNED && mistake != NO_PIN) return 0;
        if (!(c->value_bits[i] & OUT) && c->values[i]) head = c->values[i];
    }
    return head;
}

static int free_slots(int c) {
    int count = sc.cap[c] - list_length(S.ch[c].values, BUFFER);
    for (int i = 0; i < MATCHES; i++) count -= S.m[i].s && S.m[i].bits & TO_BUFFER && sc.ch[S.m[i].s] == c;
    return count;
}

/* Both parties can be locked here and now. s 0: v comes from the buffer; r 0: it goes there. */
static void pass(int s, int r, int v) {
    bool again = !s && *value_bits(v) & AGAIN;
    if (s) dequeue(s);
    if (s && sc.local[s]) seize(s);
    if (r) dequeue(r), seize(r);
    if (!s) buffer_remove(v);
    if (r) take(r, v, again);
    else list_add(S.ch[sc.ch[v]].values, BUFFER, v, false);
    if (s) finish_sender(s, OK);
}

/* Those in the queue that are in no match learn that the channel is closing, or closed. Who is engaged elsewhere looks
 * at that when it is released. */
static void turn_away(u8 *queue) {
    for (int i = 0; i < LIST && queue[i];) {
        int k = queue[i++];
        if (sc.local[k] && !seize(k)) continue;
        dequeue(k);
        if (sc.local[k]) finish(sc.op[k], k, ECLOSED);
        else if (is_here(k)) finish_sender(k, ECLOSED);
        else forget(k); /* its owner learns it from CLOSING or CLOSED */
        i = 0;
    }
}

static void wait_again(int k) {
    waiter *w = &S.w[k];
    if (w->withdrawn && !w->dead && sc.mode[sc.op[k]] == TRY) emit_to_owner(k, WITHDRAWN, 0, 0);
    if (w->withdrawn || w->dead) forget(k);
    else enqueue(k, true);
    if (sc.send[k] && S.ch[sc.ch[k]].closing && mistake != CLOSING_LATE) turn_away(queue_of(k));
}

/* Undoes a lock, or a wish for one. A sender of another node whose lock was the last has committed, and cannot wait
 * again. */
static void unlock(const match *m, int k, bool locked) {
    bool remote = k && !sc.local[k], final = k == m->s && m->bits & RECEIVER_FIRST;
    if (!k) return;
    if (remote && locked && !is_here(k) && final && mistake != RELEASE_COMMITTED) {
        finish_sender(k, ELOST);
        return;
    }
    if (remote && locked && !is_here(k) && !S.w[k].dead) emit_to_owner(k, RELEASE, k == m->s ? m->r : m->s, 0);
    if (!remote && locked) released[released_count++] = sc.op[k];
    wait_again(k);
}

static match remove_match(match *m) {
    match was = *m;
    memset(m, 0, sizeof *m);
    return was;
}

static void settle_buffer(const match *m, bool back, bool again) {
    if (!(m->bits & FROM_BUFFER)) return;
    if (!back) buffer_remove(m->s);
    else if (again && mistake != REDELIVER_UNMARKED) *value_bits(m->s) = AGAIN;
    else *value_bits(m->s) &= AGAIN;
}

/* The party of this step is over or gone: the other one, which may be locked, waits again. */
static void fall_through(match *m, bool locked) {
    int asked = party(m, m->step == 0 ? 0 : 1), other = party(m, m->step == 0 ? 1 : 0);
    match was = remove_match(m);
    if (asked) forget(asked);
    settle_buffer(&was, !(mistake == DECLINE_LOSES && was.bits & CARRIED), false);
    unlock(&was, other, locked);
}

static void end_match(match *m, int result) {
    match was = remove_match(m);
    settle_buffer(&was, false, false);
    if (!(was.bits & (TO_BUFFER | RECEIVER_GONE)) && !sc.local[was.r]) forget(was.r);
    if (!(was.bits & (FROM_BUFFER | SENDER_GONE))) finish_sender(was.s, result);
}

/* The receiver was locked, and has not got the value. */
static void match_untaken(match *m) {
    m->step = m->bits & RECEIVER_FIRST ? 0 : 1; /* as if it had declined */
    fall_through(m, true);
}

/* The value was shipped, and only the receiver knew whether it has it. */
static void match_unknown(match *m) {
    if (!(m->bits & FROM_BUFFER) && mistake != REDELIVER_RENDEZVOUS) {
        end_match(m, EUNKNOWN);
        return;
    }
    match was = remove_match(m);
    forget(was.r);
    settle_buffer(&was, true, true);
    if (!(was.bits & (FROM_BUFFER | SENDER_GONE))) unlock(&was, was.s, true);
}

static bool is_again(const match *m) { return m->bits & FROM_BUFFER && *value_bits(m->s) & AGAIN; }

enum { LOCKED, ASKED, GONE_ALREADY };

/* Takes the lock of this step, or asks for it. */
static int lock_party(match *m, int step) {
    int k = party(m, step), is_receiver = ((m->bits & RECEIVER_FIRST) != 0) == (step == 0);
    if (m->bits & (is_receiver ? RECEIVER_GONE : SENDER_GONE)) return GONE_ALREADY;
    if (k && sc.local[k]) {
        if (seize(k)) {
            S.op[sc.op[k]].engaged = (u8)k;
            return LOCKED;
        }
        list_add(S.op[sc.op[k]].claims, CASES, k, false);
        return ASKED;
    }
    if (k && S.w[k].dead) return GONE_ALREADY;
    if (!k || is_here(k)) return LOCKED;
    bool carried = step == 1 && !sc.send[k] && !sc.large[m->s];
    if (carried) m->bits |= CARRIED;
    emit_to_owner(k, CLAIM, k == m->s ? m->r : m->s,
                  (step == 1 ? FINAL : 0) | (carried ? WHOLE : 0) | (is_again(m) ? AGAIN : 0));
    return ASKED;
}

/* Both parties are locked. */
static void commit(match *m) {
    int r = m->bits & TO_BUFFER ? 0 : m->r;
    if (!r) {
        list_add(S.ch[sc.ch[m->s]].values, BUFFER, m->s, false);
        end_match(m, OK);
    } else if (sc.local[r]) {
        m->bits |= RECEIVER_GONE;
        take(r, m->s, is_again(m));
        end_match(m, OK);
    } else if (m->bits & CARRIED) end_match(m, OK);
    else if (S.w[r].dead) match_untaken(m);
    else {
        m->step = 3;
        emit_value(sc.base[r], sc.down[r][sc.base[r]], COMMIT, r, m->s, is_again(m) ? AGAIN : 0);
        if (mistake == OK_BEFORE_TAKEN) end_match(m, OK);
    }
}

static void progress(match *m) {
    for (; m->step < 2; m->step++) {
        int answer = lock_party(m, m->step);
        if (answer == ASKED) return;
        if (answer == GONE_ALREADY) {
            fall_through(m, m->step == 1);
            return;
        }
    }
    commit(m);
}

static void locked(match *m) {
    m->step++;
    progress(m);
}

/* s 0: v comes from the buffer; r 0: it goes there. */
static void bring_together(int s, int r, int v) {
    bool cs = is_claimable(s), cr = is_claimable(r), receiver_first = cs;
    match *m = S.m;
    if (can_lock(s) && can_lock(r)) {
        pass(s, r, v);
        return;
    }
    while (m < S.m + MATCHES && m->s) m++;
    if (m == S.m + MATCHES) {
        fail("the model: too many matches");
        return;
    }
    m->s = (u8)v;
    m->r = (u8)(r ? r : SLOT);
    m->bits = s ? 0 : FROM_BUFFER;
    if (!s) *value_bits(v) = (u8)(*value_bits(v) | OUT | (is_firm(r) ? 0 : PINNED));
    if (!r) m->bits |= TO_BUFFER;
    if (s) dequeue(s);
    if (r) dequeue(r);
    if (cs && cr) receiver_first = is_multi(s) && is_multi(r) && rank(r) < rank(s);
    if (cs && cr && mistake == LOCK_RECEIVER_FIRST) receiver_first = true;
    if (cs && cr && mistake == LOCK_SENDER_FIRST) receiver_first = false;
    if (receiver_first) m->bits |= RECEIVER_FIRST;
    progress(m);
}

/* Brings one receiver together with what the channel has. Returns whether there was such a pair. */
static bool serve(int c) {
    channel *ch = &S.ch[c];
    for (int i = 0; i < LIST && ch->receivers[i]; i++) {
        int r = ch->receivers[i], v = sc.cap[c] ? buffer_head(ch) : 0;
        for (int j = 0; j < LIST && !sc.cap[c] && !ch->closing && !v; j++)
            if (ch->senders[j] && !same_op(ch->senders[j], r)) v = ch->senders[j];
        if (v) bring_together(sc.cap[c] ? 0 : v, r, v);
        if (v) return true;
    }
    return false;
}

/* Moves one sender into a free slot. */
static bool fill(int c) {
    int s = S.ch[c].senders[0];
    if (!sc.cap[c] || S.ch[c].closing || !s || free_slots(c) <= 0) return false;
    bring_together(s, 0, s);
    return true;
}

/* Tells the ends that this node has given away: as their home (up -1), or as a relay of those that it has from up. */
static void tell_ends(int n, int up, int c, int type) {
    unsigned told = 0;
    for (int k = 1; k <= sc.keys; k++) {
        bool given = up < 0 ? sc.base[k] == n && !sc.local[k] : sc.relay[k][n] && sc.up[k][n] == up;
        int to = sc.down[k][n];
        if (sc.ch[k] != c || !given || told >> to & 1) continue;
        if (type != GONE && sc.send[k] != (type == CLOSING)) continue;
        emit(n, to, type, c, 0, 0);
        told |= 1u << to;
    }
}

/* A channel that is closing and has nothing left: receivers learn it. */
static void finish_close(int c) {
    channel *ch = &S.ch[c];
    bool idle = !ch->values[0];
    for (int i = 0; i < MATCHES; i++) idle = idle && !(S.m[i].s && sc.ch[S.m[i].s] == c);
    if (!idle && mistake != CLOSED_EARLY) return;
    ch->closed = true;
    if (mistake == CLOSING_LATE) tell_ends(sc.home[c], -1, c, CLOSING), turn_away(ch->senders);
    tell_ends(sc.home[c], -1, c, CLOSED);
    turn_away(ch->receivers);
}

static bool pair(int c) {
    bool any = false;
    if (S.ch[c].closed) return false;
    while (!failure[0] && (serve(c) || fill(c))) any = true;
    if (S.ch[c].closing) finish_close(c);
    return any;
}

static void close_home(int c) {
    if (S.ch[c].closing) return;
    S.ch[c].closing = true;
    if (mistake != CLOSING_LATE) tell_ends(sc.home[c], -1, c, CLOSING), turn_away(S.ch[c].senders);
    pair(c);
}

/* --- what an owner hears of its entries --- */

static void grant(int k) {
    oper *p = &S.op[sc.op[k]];
    waiter *w = &S.w[k];
    int n = sc.owner[k];
    p->engaged = (u8)k;
    p->state = w->claim_final ? COMMITTED : ENGAGED;
    if (sc.send[k]) emit_value(n, sc.up[k][n], GRANT, k, w->claim, 0);
    else emit(n, sc.up[k][n], GRANT, k, w->claim, 0);
    if (w->claim_final) withdraw_others(sc.op[k], k);
    if (w->claim_carried) take(k, w->claim, w->claim_again);
}

static void on_claim(int from, int n, const frame *f) {
    int k = f->key;
    waiter *w = &S.w[k];
    oper *p = &S.op[sc.op[k]];
    bool over = !w->registered || p->state >= COMMITTED;
    if (over || (p->state == ENGAGED && mistake == BUSY_ANSWER)) {
        emit(n, from, over ? DECLINE : BUSY, k, f->other, 0);
        return;
    }
    if (breach(w->claim || (f->bits & WHOLE && (sc.send[k] || !(f->bits & FINAL))), n, f)) return;
    w->claim = f->other;
    w->claim_final = f->bits & FINAL;
    w->claim_carried = f->bits & WHOLE;
    w->claim_again = f->bits & AGAIN;
    if (p->state == OPEN) grant(k);
    else list_add(p->claims, CASES, k, false);
}

static bool is_engaged(const frame *f) {
    const oper *p = &S.op[sc.op[f->key]];
    return S.w[f->key].registered && p->engaged == f->key && S.w[f->key].claim == f->other;
}

static void on_commit(int from, int n, const frame *f) {
    int k = f->key;
    waiter *w = &S.w[k];
    if (f->type == COMMIT) {
        if (breach(!is_engaged(f) || sc.send[k] || w->incoming, n, f)) return;
        S.op[sc.op[k]].state = COMMITTED;
        withdraw_others(sc.op[k], k);
        w->claim_again = f->bits & AGAIN;
    } else if (breach(!is_engaged(f) || !w->incoming, n, f)) return;
    w->incoming++;
    if (!(f->bits & WHOLE)) return;
    if (w->incoming != (sc.large[f->other] ? FRAGMENTS + 1 : 1)) fail("a fragment is missing");
    emit(n, from, TAKEN, k, f->other, 0);
    take(k, f->other, w->claim_again);
}

static void on_release(int n, const frame *f) {
    if (breach(!is_engaged(f) || S.op[sc.op[f->key]].state != ENGAGED, n, f)) return;
    unclaim(&S.w[f->key]);
    released[released_count++] = sc.op[f->key];
}

/* Other results than OK end any entry: a receive, and one that nobody has claimed, too. */
static void on_accept(int n, const frame *f) {
    int k = f->key;
    oper *p = &S.op[sc.op[k]];
    if (!S.w[k].registered) return;
    if (breach(f->other == OK && !(sc.send[k] && (p->engaged == k || is_here(k))), n, f)) return;
    if (p->engaged == k || seize(k)) finish(sc.op[k], k, f->other);
    else if (!breach(S.w[k].claim, n, f)) unregister(k), S.w[k].lost = true; /* looked at on release */
}

static void try_failed(int k) {
    oper *p = &S.op[sc.op[k]];
    unregister(k);
    if (p->tries && --p->tries == 0 && p->state == OPEN) finish(sc.op[k], 0, TIMEDOUT);
}

/* What this node has from node up is closing, closed or gone: its own operations, then the ends that it has given away.
 * Who is engaged there learns more; who is engaged elsewhere looks at this when it is released. */
static void on_fact(int n, int up, int c, int type) {
    for (int k = 1; k <= sc.keys; k++) {
        waiter *w = &S.w[k];
        relay *r = relay_of(k, n);
        const oper *p = &S.op[sc.op[k]];
        if (sc.ch[k] != c || sc.local[k] || sc.up[k][n] != up) continue;
        if (r && type == GONE) r->gone = true;
        if (r && type == GONE && r->step == IDLE) r->step = NO_ENTRY; /* its OFFER or DEMAND has crossed this */
        if (sc.owner[k] != n || (type != GONE && sc.send[k] != (type == CLOSING))) continue;
        *(type == GONE ? &w->gone : type == CLOSING ? &w->closing : &w->closed) = true;
        if ((type != GONE && is_here(k)) || p->engaged == k || !seize(k)) continue;
        if (w->registered && type != GONE) emit(n, up, WITHDRAW, k, 0, 0);
        finish(sc.op[k], k, type == GONE ? ELOST : ECLOSED);
    }
    tell_ends(n, up, c, type);
}

/* CLOSE on its way home, from the end of another node or of this one (from -1). */
static void close_end(int n, int c, int from) {
    for (int k = 1; k <= sc.keys; k++) {
        bool here = from < 0 ? sc.owner[k] == n : sc.relay[k][n] && sc.down[k][n] == from;
        if (sc.ch[k] != c || sc.local[k] || !sc.send[k] || !here) continue;
        if (from < 0) on_fact(n, sc.up[k][n], c, CLOSING);
        emit(n, sc.up[k][n], CLOSE, c, 0, 0);
        return;
    }
}

static bool case_lost(int k) { return S.w[k].lost || S.w[k].gone; }

static bool case_closed(int k) {
    const channel *c = &S.ch[sc.ch[k]];
    if (sc.local[k]) return sc.send[k] ? c->closing : c->closed;
    return sc.send[k] ? S.w[k].closing : S.w[k].closed;
}

/* An operation that was engaged is open again: first its time and its cases, then the claims that wait. */
static void reopen(int o) {
    oper *p = &S.op[o];
    p->engaged = 0;
    if (p->expired || (p->tries == 0 && sc.mode[o] == TRY)) {
        finish(o, 0, TIMEDOUT);
        return;
    }
    for (int k = sc.first[o]; k <= last_key(o) && mistake != RELEASE_BLIND; k++) {
        bool lost = mistake == RELEASE_MISSES_GONE ? S.w[k].lost : case_lost(k);
        bool negotiated = S.w[k].claim || (sc.local[k] && match_of(k));
        if (negotiated || !(case_closed(k) || lost)) continue; /* what is being negotiated is finished first */
        if (S.w[k].registered && !lost) emit(sc.node[o], sc.up[k][sc.node[o]], WITHDRAW, k, 0, 0);
        finish(o, k, case_closed(k) ? ECLOSED : ELOST);
        return;
    }
    p->state = OPEN;
    if (!p->claims[0]) return;
    int k = list_pop(p->claims, CASES);
    if (!sc.local[k]) grant(k);
    else {
        seize(k);
        p->engaged = (u8)k;
        locked(match_of(k));
    }
}

/* Works off what the last steps set free. */
static void settle(int n) {
    for (bool again = true; again && !failure[0];) {
        again = declined_count || released_count;
        if (declined_count) {
            match *m = declined[--declined_count];
            fall_through(m, m->step == 1);
        } else if (released_count) reopen(released[--released_count]);
        for (int c = 0; c < sc.channels && !again; c++) again = sc.home[c] == n && pair(c);
        again = again || declined_count || released_count;
    }
}

/* --- what a home hears of its entries --- */

static void on_waiter(int k) {
    waiter *w = &S.w[k];
    const channel *ch = &S.ch[sc.ch[k]];
    w->present = true;
    if (sc.send[k] ? ch->closing && mistake != CLOSING_LATE : ch->closed) {
        if (is_here(k)) finish_sender(k, ECLOSED);
        else forget(k);
        return;
    }
    enqueue(k, false);
    pair(sc.ch[k]);
    if (!w->present || sc.mode[sc.op[k]] != TRY) return;
    w->withdrawn = true; /* if it is in a match: when that falls through */
    if (match_of(k)) {
        if (mistake == TRY_EARLY) emit_to_owner(k, WITHDRAWN, 0, 0);
        return;
    }
    dequeue(k);
    wait_again(k);
}

static void on_withdraw(int k) {
    if (S.w[k].present && !match_of(k)) forget(k);
    else if (S.w[k].present && mistake != FORGET_WITHDRAW) S.w[k].withdrawn = true;
}

/* The match whose claim, or COMMIT, this entry answers, or NULL. */
static match *answered(const frame *f, bool shipped) {
    int s = value_of(f->key, f->other), r = sc.send[f->key] ? f->other : f->key;
    for (match *m = S.m; m < S.m + MATCHES; m++) {
        if (m->s != s || m->r != r || S.w[f->key].dead) continue;
        if (m->step == 3 ? shipped && r == f->key : party(m, m->step) == f->key) return m;
    }
    return NULL;
}

static void on_grant(int n, const frame *f) {
    match *m = answered(f, false);
    if (breach(!m || (f->type == GRANT) != !m->incoming, n, f)) return;
    m->incoming++;
    if (sc.send[f->key] && !(f->bits & WHOLE)) return;
    if (sc.send[f->key] && m->incoming != (sc.large[f->key] ? FRAGMENTS + 1 : 1)) fail("a fragment is missing");
    m->incoming = 0;
    locked(m);
}

static void on_decline(int n, const frame *f) {
    match *m = answered(f, true);
    bool shipped = m && (m->step == 3 || (f->key == m->r && m->bits & CARRIED));
    if (breach(!m || (f->bits & UNKNOWN && !shipped), n, f)) return;
    if (f->bits & UNKNOWN) match_unknown(m);
    else if (m->step == 3) match_untaken(m);
    else fall_through(m, m->step == 1);
}

/* What the protocol does not have: both wait again. */
static void on_busy(int n, const frame *f) {
    match *m = answered(f, false);
    if (breach(!m, n, f)) return;
    int other = party(m, 1 - m->step);
    match was = remove_match(m);
    settle_buffer(&was, true, false);
    unlock(&was, other, was.step == 1);
    wait_again(f->key);
}

static void on_taken(int n, const frame *f) {
    match *m = answered(f, true);
    if (mistake == OK_BEFORE_TAKEN || breach(!m || m->step != 3, n, f)) return;
    end_match(m, OK);
}

/* --- a relay, between owner and home --- */

static void relay_forget(relay *r) {
    bool gone = r->gone;
    memset(r, 0, sizeof *r);
    r->gone = gone;
}

/* The owner has granted, and its value is here. */
static void relay_granted(int n, int k, relay *r) {
    r->gathered = 0;
    if (r->headless) {
        if (!r->carried) emit(n, sc.down[k][n], ACCEPT, k, ELOST, 0);
        relay_forget(r);
        return;
    }
    if (sc.send[k]) emit_value(n, sc.up[k][n], GRANT, k, r->match, 0);
    else emit(n, sc.up[k][n], GRANT, k, r->match, 0);
    r->step = GRANTED;
    if (r->carried) relay_forget(r); /* it has the value */
}

/* The home has committed, and its value is here. */
static void relay_committed(int n, int k, relay *r) {
    r->gathered = 0;
    r->step = SHIPPED;
    if (!r->orphan) emit_value(n, sc.down[k][n], COMMIT, k, r->match, r->again ? AGAIN : 0);
    else {
        emit(n, sc.up[k][n], DECLINE, k, r->match, 0);
        relay_forget(r);
    }
}

static void relay_owner_says(int n, const frame *f) {
    int k = f->key, up = sc.up[k][n];
    relay *r = relay_of(k, n);
    bool right = r->match == f->other && (f->type == TAKEN ? r->step == SHIPPED : r->step == CLAIMED);
    switch (f->type) {
    case OFFER: case DEMAND:
        if (r->gone) return; /* GONE is on its way */
        r->step = IDLE;
        emit(n, up, f->type, k, 0, 0);
        return;
    case WITHDRAW:
        if (r->step == CLAIMED && mistake == RELAY_DROPS_WITHDRAW) relay_forget(r);
        if (r->step != IDLE) return; /* the owner will decline the claim; or it was forgotten here */
        break;
    case GRANT: case FRAGMENT:
        if (breach(!right || (f->type == GRANT) != !r->gathered, n, f)) return;
        r->gathered++;
        if (!sc.send[k] || f->bits & WHOLE || (r->headless && mistake == RELAY_CUTS_FRAGMENTS)) relay_granted(n, k, r);
        return;
    case DECLINE: /* after a COMMIT, of another relay */
        right = right || (r->step == SHIPPED && r->match == f->other && mistake != RELAY_WANTS_TAKEN);
        if (breach(!right, n, f)) return;
        break;
    default:
        if (breach(f->type != TAKEN || !right, n, f)) return;
    }
    emit(n, up, f->type, k, f->other, f->bits);
    relay_forget(r);
}

static void relay_home_says(int n, const frame *f) {
    int k = f->key, owner = sc.down[k][n];
    relay *r = relay_of(k, n);
    bool granted = r->step == GRANTED && r->match == f->other;
    switch (f->type) {
    case CLAIM:
        if (!r->step) {
            emit(n, sc.up[k][n], DECLINE, k, f->other, 0);
            return;
        }
        if (breach(r->step != IDLE, n, f)) return;
        r->step = CLAIMED;
        r->match = f->other;
        r->carried = f->bits & WHOLE;
        emit(n, owner, CLAIM, k, f->other, f->bits);
        return;
    case COMMIT: case FRAGMENT:
        if (breach(!granted || sc.send[k] || (f->type == COMMIT) != !r->gathered, n, f)) return;
        if (f->type == COMMIT) r->again = f->bits & AGAIN;
        r->gathered++;
        if (f->bits & WHOLE) relay_committed(n, k, r);
        return;
    case RELEASE:
        if (breach(!granted || r->gathered, n, f)) return;
        emit(n, r->orphan ? sc.up[k][n] : owner, r->orphan ? WITHDRAW : RELEASE, k, r->orphan ? 0 : f->other, 0);
        r->step = IDLE;
        r->match = 0;
        if (r->orphan) relay_forget(r);
        return;
    default: /* ACCEPT, WITHDRAWN */
        if (!r->step) return;
        if (f->type == WITHDRAWN && breach(r->step != IDLE, n, f)) return;
        if (f->type != WITHDRAWN && breach(f->type != ACCEPT, n, f)) return;
        if (f->type == ACCEPT && breach(r->step == CLAIMED || r->step == SHIPPED, n, f)) return;
        if (f->type == ACCEPT && f->other == OK && breach(r->step != GRANTED || !sc.send[k], n, f)) return;
        if (!r->orphan) emit(n, owner, f->type, k, f->other, 0);
        relay_forget(r);
    }
}

static void relay_lost_owner(int n, int k, relay *r) {
    bool shipped = r->step == SHIPPED || (r->step == CLAIMED && r->carried), forgets = mistake == RELAY_FORGETS;
    bool unknown = shipped && had_left(n, sc.down[k][n], k, value_of(k, r->match)) && mistake != RELAY_NOT_TAKEN;
    if (r->step == GRANTED && !forgets) {
        r->orphan = true; /* until the home decides */
        return;
    }
    if (r->step == IDLE) emit(n, sc.up[k][n], WITHDRAW, k, 0, 0);
    else if (r->step != GRANTED) emit(n, sc.up[k][n], DECLINE, k, r->match, unknown ? UNKNOWN : 0);
    relay_forget(r);
}

static void relay_lost_home(int n, int k, relay *r) {
    bool unknown = r->step == GRANTED && sc.send[k] && had_left(n, sc.up[k][n], k, k) && mistake != RELAY_HIDES_UNKNOWN;
    if (r->step == CLAIMED || (r->step == SHIPPED && mistake != RELAY_ENDS_SHIPPED)) {
        r->headless = true; /* until the owner answers */
        return;
    }
    for (load *l = S.load; l < S.load + LOADS; l++)
        if (r->step == SHIPPED && l->from == n && l->to == sc.down[k][n] && l->key == k) memset(l, 0, sizeof *l);
    if (!r->orphan) emit(n, sc.down[k][n], ACCEPT, k, unknown ? EUNKNOWN : ELOST, 0);
    relay_forget(r);
}

/* --- a session is lost --- */

static void waiter_lost(int n, int p, int k) {
    oper *o = &S.op[sc.op[k]];
    bool engaged = o->engaged == k, left = sc.send[k] && (engaged || is_here(k)) && had_left(n, p, k, k);
    if (!engaged) list_remove(o->claims, CASES, k);
    unregister(k);
    if (engaged || seize(k)) finish(sc.op[k], k, left ? EUNKNOWN : ELOST);
    else S.w[k].lost = true; /* it is engaged elsewhere */
}

static void match_lost(match *m, int n, int p) {
    int asked = m->step == 3 ? m->r : party(m, m->step), other = m->step == 3 ? 0 : party(m, 1 - m->step);
    bool other_lost = other && !sc.local[other] && sc.down[other][n] == p;
    if (!asked || sc.local[asked] || sc.down[asked][n] != p) { /* the one that is asked lives, and will answer */
        if (mistake != ABANDON || !other_lost || !asked || sc.local[asked]) return;
        match was = remove_match(m);
        unlock(&was, asked, true);
        return;
    }
    bool shipped = asked == m->r && (m->step == 3 || m->bits & CARRIED);
    if (shipped && had_left(n, p, m->r, m->s)) match_unknown(m);
    else if (m->step == 3) match_untaken(m);
    else fall_through(m, m->step == 1);
}

static void home_lost(int n, int p) {
    bool mine[KEYS + 1] = {false};
    for (int k = 1; k <= sc.keys; k++) {
        mine[k] = sc.base[k] == n && !sc.local[k] && sc.down[k][n] == p && S.w[k].present;
        if (mine[k]) S.w[k].dead = true;
    }
    for (match *m = S.m; m < S.m + MATCHES; m++)
        if (m->s && sc.home[sc.ch[m->s]] == n) match_lost(m, n, p);
    for (int k = 1; k <= sc.keys; k++)
        if (mine[k] && !match_of(k)) forget(k);
}

static void learn_of_loss(int n, int p) {
    for (int k = 1; k <= sc.keys; k++) {
        int state = S.op[sc.op[k]].state;
        relay *r = relay_of(k, n);
        if (r && r->step && sc.down[k][n] == p) relay_lost_owner(n, k, r);
        if (r && r->step && sc.up[k][n] == p) relay_lost_home(n, k, r);
        if (sc.owner[k] == n && !sc.local[k] && sc.up[k][n] == p && state != NEW && state != DONE) waiter_lost(n, p, k);
    }
    for (int c = 0; c < sc.channels; c++) on_fact(n, p, c, GONE);
    home_lost(n, p);
    S.knows[n][p] = true;
    S.unsent[n][p] = 0;
    memset(&S.line[p][n], 0, sizeof S.line[p][n]);
    for (load *l = S.load; l < S.load + LOADS; l++)
        if (l->from == n && l->to == p) memset(l, 0, sizeof *l);
}

static int values_in(const line *l) {
    int count = 0;
    for (int i = 0; i < l->count; i++) count += (l->at[i].bits & WHOLE) != 0;
    return count;
}

/* Frames that had left may still arrive, until the other node knows of the loss; those from the cut on never leave.
 * Where it is matters only for values: the line is cut before its value of this number, or not at all. */
static void cut_line(int from, int to, int cut) {
    line *l = &S.line[from][to];
    for (int i = 0, values = 0, end = l->count; i < end; i++) {
        const frame *f = &l->at[i];
        if (!(f->bits & WHOLE)) continue;
        if (values < cut) S.left = (uint16_t)(S.left | 1u << value_of(f->key, f->other));
        else S.unsent[from][to] = (uint16_t)(S.unsent[from][to] | 1u << f->key);
        if (values++ == cut) l->count = (u8)i;
    }
    memset(l->at + l->count, 0, (size_t)(LINE - l->count) * sizeof *l->at);
}

/* --- moves --- */

enum { BEGIN, DELIVER, SHIP, LEARN, EXPIRE, CLOSE_NOW, LOSE, DOWN };
static void can_do(int kind, int a, int b) {
    can((unsigned)(kind >= EXPIRE ? OPTIONAL : 0) | (unsigned)kind << 12 | (unsigned)a << 8 | (unsigned)b);
}

/* An operation begins: the cases at home in the order in which they are tried, then those at ends. */
static void begin(int o, int order) {
    static const u8 orders[6][CASES] = {{0, 1, 2}, {1, 0, 2}, {2, 1, 0}, {0, 2, 1}, {1, 2, 0}, {2, 0, 1}};
    oper *p = &S.op[o];
    int k[CASES], n = sc.node[o];
    p->state = OPEN;
    for (int i = 0; i < sc.cases[o]; i++) {
        k[i] = sc.first[o] + orders[order][i];
        if (sc.local[k[i]]) enqueue(k[i], false);
    }
    for (int i = 0; i < sc.cases[o] && p->state == OPEN; i++) {
        bool closed = case_closed(k[i]);
        if (closed || case_lost(k[i])) finish(o, k[i], closed ? ECLOSED : ELOST);
        else if (sc.local[k[i]]) pair(sc.ch[k[i]]);
    }
    for (int i = 0; i < sc.cases[o] && p->state < COMMITTED; i++) {
        if (sc.local[k[i]] || case_closed(k[i]) || case_lost(k[i])) continue;
        S.w[k[i]].registered = true;
        p->tries = (u8)(p->tries + (sc.mode[o] == TRY));
        emit(n, sc.up[k[i]][n], sc.send[k[i]] ? OFFER : DEMAND, k[i], 0, is_here(k[i]) ? WHOLE : 0);
    }
    settle(n);
    if (sc.mode[o] == TRY && p->state == OPEN && !p->tries) finish(o, 0, TIMEDOUT);
}

static void handle(int from, int n, const frame *f) {
    int k = f->key;
    if (f->type >= CLOSE) {
        if (f->type != CLOSE) on_fact(n, from, k, f->type);
        else if (sc.home[k] == n) close_home(k);
        else close_end(n, k, from);
        return;
    }
    if (sc.relay[k][n]) {
        if (from == sc.down[k][n]) relay_owner_says(n, f);
        else relay_home_says(n, f);
        return;
    }
    switch (f->type) {
    case OFFER: case DEMAND: on_waiter(k); break;
    case WITHDRAW: on_withdraw(k); break;
    case GRANT: on_grant(n, f); break;
    case DECLINE: on_decline(n, f); break;
    case BUSY: on_busy(n, f); break;
    case TAKEN: on_taken(n, f); break;
    case CLAIM: on_claim(from, n, f); break;
    case COMMIT: on_commit(from, n, f); break;
    case RELEASE: on_release(n, f); break;
    case ACCEPT: on_accept(n, f); break;
    case WITHDRAWN: if (S.w[k].registered && !S.w[k].claim) try_failed(k); break;
    default: /* FRAGMENT */
        if (n == sc.base[k] && from == sc.down[k][n]) on_grant(n, f);
        else on_commit(from, n, f);
    }
}

static void deliver(int from, int n) {
    line *l = &S.line[from][n];
    frame f = l->at[0];
    memmove(l->at, l->at + 1, (LINE - 1) * sizeof f);
    memset(&l->at[--l->count], 0, sizeof f);
    if (f.bits & WHOLE) S.left = (uint16_t)(S.left | 1u << value_of(f.key, f.other));
    handle(from, n, &f);
}

static void ship(load *l) {
    load was = *l;
    if (--l->left == 0) memset(l, 0, sizeof *l);
    emit(was.from, was.to, FRAGMENT, was.key, was.other, was.left == 1 ? WHOLE : 0);
}

/* The link is broken: tries do not wait for the next. */
static bool is_open_try(int k, int n, int p) {
    return sc.owner[k] == n && sc.mode[sc.op[k]] == TRY && S.w[k].registered && !is_here(k) && !S.w[k].claim &&
           sc.up[k][n] == p;
}

static void link_down(int n, int p) {
    for (int k = 1; k <= sc.keys; k++) {
        if (!is_open_try(k, n, p)) continue;
        emit(n, p, WITHDRAW, k, 0, 0);
        try_failed(k);
    }
}

static void close_now(int i) {
    int n = sc.close_node[i], c = sc.close_ch[i];
    S.closes = (u8)(S.closes | 1u << i);
    if (sc.home[c] == n) close_home(c);
    else close_end(n, c, -1);
}

/* Things whose order means nothing are put in order. */
static void sort(void *items, size_t count, size_t size) {
    u8 *base = (u8 *)items, swap[16];
    for (size_t i = 1; i < count; i++)
        for (u8 *at = base + i * size; at > base && memcmp(at - size, at, size) < 0; at -= size) {
            memcpy(swap, at, size);
            memcpy(at, at - size, size);
            memcpy(at - size, swap, size);
        }
}

static void commit_make(unsigned code) {
    int a = (int)(code >> 8 & 15), b = (int)(code & 255), n = a;
    declined_count = released_count = 0;
    switch (code >> 12 & 7) {
    case BEGIN: begin(a, b); n = sc.node[a]; break;
    case DELIVER: deliver(a, b); n = b; break;
    case SHIP: ship(&S.load[a]); break;
    case LEARN: learn_of_loss(a, b); break;
    case EXPIRE:
        n = sc.node[a];
        if (S.op[a].state == OPEN) finish(a, 0, TIMEDOUT);
        else S.op[a].expired = true;
        break;
    case CLOSE_NOW: close_now(a); n = sc.close_node[a]; break;
    case LOSE:
        S.lost[a >> 2][a & 3] = S.lost[a & 3][a >> 2] = true;
        cut_line(a >> 2, a & 3, b >> 4);
        cut_line(a & 3, a >> 2, b & 15);
        break;
    default: link_down(a, b);
    }
    settle(n);
    sort(S.m, MATCHES, sizeof *S.m);
    sort(S.load, LOADS, sizeof *S.load);
}

static void moves_between(int a, int b) {
    bool tries = false;
    if (S.line[a][b].count && !S.knows[b][a]) can_do(DELIVER, a, b);
    if (S.lost[a][b] && !S.knows[a][b]) can_do(LEARN, a, b);
    for (int i = 0; sc.lose[a][b] && !S.lost[a][b] && i <= values_in(&S.line[a][b]); i++)
        for (int j = 0; j <= values_in(&S.line[b][a]); j++) can_do(LOSE, a << 2 | b, i << 4 | j);
    for (int k = 1; k <= sc.keys; k++) tries = tries || is_open_try(k, a, b);
    if (sc.down_link[a][b] && tries) can_do(DOWN, a, b);
}

static void commit_moves(void) {
    static const u8 order_counts[CASES + 1] = {1, 1, 2, 6};
    for (int o = 0; o < sc.ops; o++) {
        bool may_begin = S.op[o].state == NEW, waits = S.op[o].state == OPEN || S.op[o].state == ENGAGED;
        for (int i = 0; i < o; i++)
            if (sc.thread[i] == sc.thread[o] && S.op[i].state != DONE) may_begin = false;
        for (int i = 0; i < order_counts[sc.cases[o]] && may_begin; i++) can_do(BEGIN, o, i);
        if (sc.mode[o] == TIMED && waits && !S.op[o].expired) can_do(EXPIRE, o, 0);
    }
    for (int i = 0; i < LOADS; i++)
        if (S.load[i].left && !S.lost[S.load[i].from][S.load[i].to]) can_do(SHIP, i, 0);
    for (int i = 0; i < sc.closes; i++)
        if (!(S.closes >> i & 1)) can_do(CLOSE_NOW, i, 0);
    for (int a = 0; a < sc.nodes; a++)
        for (int b = 0; b < sc.nodes; b++) moves_between(a, b);
}

/* One start for each order of the operations with several cases: their ids are random. */
static bool commit_start(int root) {
    int unranked[OPS], left = 0;
    for (int o = 0; o < sc.ops; o++)
        if (sc.cases[o] > 1) unranked[left++] = o;
    for (; left > 0; root /= left--) {
        int pick = root % left;
        S.rank[unranked[pick]] = (u8)left;
        unranked[pick] = unranked[left - 1];
    }
    return root == 0;
}

/* --- what must be true --- */

static void check_send(int k) {
    const oper *p = &S.op[sc.op[k]];
    int o = sc.op[k] + 1, taken = takes(k), result = p->state == DONE ? p->result : 0;
    bool happened = result && p->key == k;
    if (taken && result && result != OK && result != EUNKNOWN)
        fail("operation %d ended with %s, but its value is taken", o, result_names[result]);
    if (taken && result && !happened) fail("operation %d ended with another case than the one that happened", o);
    if (taken && !result && p->engaged != k && !is_here(k)) fail("operation %d is free, its value is taken", o);
    if (happened && result == OK && !taken && list_find(S.ch[sc.ch[k]].values, BUFFER, k) < 0)
        fail("operation %d: OK, but nobody has the value", o);
    if (happened && result == EUNKNOWN && !(S.left >> k & 1)) fail("operation %d: EUNKNOWN, nothing left", o);
}

static void check_receive(int o) {
    const oper *p = &S.op[o];
    bool happened = p->state == DONE && p->key && !sc.send[p->key];
    if ((happened && p->result == OK) != (p->got != 0)) fail("operation %d: OK and no value, or the reverse", o + 1);
    if (happened && p->result == EUNKNOWN) fail("operation %d: a receive ends with EUNKNOWN", o + 1);
}

/* At rest, of an operation that is open. */
static void check_waiting(int k) {
    int o = sc.op[k] + 1;
    const channel *ch = &S.ch[sc.ch[k]];
    if (case_closed(k) || (sc.send[k] ? ch->closing : ch->closed)) fail("operation %d waits on a closed channel", o);
    if (case_lost(k)) fail("operation %d waits on a lost end", o);
    if (!sc.local[k] && !S.w[k].registered) fail("operation %d waits and is not registered", o);
    if (list_find(queue_of(k), LIST, k) < 0) fail("operation %d waits and is not in the queue at home", o);
    for (int n = 0; n < sc.nodes; n++) {
        const relay *r = relay_of(k, n);
        if (r && (r->step != IDLE || r->orphan || r->headless))
            fail("operation %d waits, and its entry at a relay does not", o);
    }
}

static void check_op_at_rest(int o) {
    const oper *p = &S.op[o];
    if (p->state == ENGAGED || p->state == COMMITTED) fail("deadlock: operation %d stays engaged", o + 1);
    if (p->claims[0]) fail("deadlock: a claim on operation %d is not answered", o + 1);
    if (p->state == OPEN && sc.mode[o] == TRY) fail("operation %d is a try that is not answered", o + 1);
    for (int k = sc.first[o]; k <= last_key(o); k++) {
        const waiter *w = &S.w[k];
        if (p->state == OPEN) check_waiting(k);
        else if (w->present || w->relay[0].step || w->relay[1].step || list_find(queue_of(k), LIST, k) >= 0)
            fail("operation %d is over, and its entry stays", o + 1);
    }
}

static void commit_check(bool at_rest) {
    for (int k = 1; k <= sc.keys; k++)
        if (sc.send[k]) check_send(k);
    for (int o = 0; o < sc.ops; o++) check_receive(o);
    for (int c = 0; c < sc.channels; c++)
        if (free_slots(c) < 0) fail("%c has more values than its capacity", 'a' + c);
    for (int o = 0; o < sc.ops && at_rest; o++) check_op_at_rest(o);
    for (int i = 0; i < MATCHES && at_rest; i++)
        if (S.m[i].s) fail("deadlock: the match of %d and %d stays", S.m[i].s, S.m[i].r);
    for (int c = 0; c < sc.channels && at_rest; c++) {
        const channel *ch = &S.ch[c];
        if (ch->closing && !ch->closed && !ch->values[0]) fail("receivers are never told of the close of %c", 'a' + c);
        if (ch->senders[0] && free_slots(c) > 0) fail("a send waits, and a slot of %c is free", 'a' + c);
        if (ch->values[0] && ch->receivers[0]) fail("a value is in the buffer of %c, and a receive waits", 'a' + c);
        for (int i = 0; i < LIST && ch->senders[i]; i++)
            for (int j = 0; j < LIST && ch->receivers[j]; j++)
                if (sc.op[ch->senders[i]] != sc.op[ch->receivers[j]]) fail("two wait for each other on %c", 'a' + c);
    }
}

static void tell_frame(const frame *f, char *text, size_t room) {
    int k = f->key, n = snprintf(text, room, "%s ", frame_names[f->type]);
    text += n, room -= (size_t)n;
    if (f->type >= CLOSE) snprintf(text, room, "%c", 'a' + k);
    else if (f->type == ACCEPT) snprintf(text, room, "%d, %s", k, result_names[f->other]);
    else if (!f->other) snprintf(text, room, "%d%s", k, f->bits & WHOLE ? " with the value" : "");
    else snprintf(text, room, "%d of match %d-%d%s%s%s%s", k, value_of(k, f->other), sc.send[k] ? f->other : k,
                  f->bits & FINAL ? ", final" : "", f->bits & WHOLE ? ", the value is whole" : "",
                  f->bits & AGAIN ? ", redelivered" : "", f->bits & UNKNOWN ? ", unknown" : "");
}

static void commit_tell(unsigned code, char *text, size_t room) {
    int a = (int)(code >> 8 & 15), b = (int)(code & 255), n = 0;
    switch (code >> 12 & 7) {
    case BEGIN:
        n = snprintf(text, room, "%c begins operation %d, entries:", 'A' + sc.node[a], a + 1);
        for (int k = sc.first[a]; k <= last_key(a); k++, n += 5)
            snprintf(text + n, room - (size_t)n, " %2d%c%c", k, 'a' + sc.ch[k], sc.send[k] ? '!' : '?');
        break;
    case DELIVER:
        n = snprintf(text, room, "%c -> %c ", 'A' + a, 'A' + b);
        tell_frame(&S.line[a][b].at[0], text + n, room - (size_t)n);
        break;
    case SHIP: snprintf(text, room, "%c ships a fragment to %c", 'A' + S.load[a].from, 'A' + S.load[a].to); break;
    case LEARN: snprintf(text, room, "%c learns that its session with %c is lost", 'A' + a, 'A' + b); break;
    case EXPIRE: snprintf(text, room, "the time of operation %d is up", a + 1); break;
    case CLOSE_NOW: snprintf(text, room, "%c closes %c", 'A' + sc.close_node[a], 'a' + sc.close_ch[a]); break;
    case LOSE:
        snprintf(text, room, "the session of %c and %c is lost; of the values in its lines %d and %d had left",
                 'A' + (a >> 2), 'A' + (a & 3), b >> 4, b & 15);
        break;
    default: snprintf(text, room, "the link of %c to %c is down", 'A' + a, 'A' + b);
    }
}

static const model commit_model = {&S, sizeof S, commit_start, commit_moves, commit_make, commit_check, commit_tell};

/* --- values within credit --- */

enum { VALUES = 4, CAPACITY = 2, LANE = CAPACITY + VALUES, CREDITS = 3 * VALUES, LOSSES = 2 };

/* A dialler sends 1, 2, ... into a channel with a capacity at its listener. Its session is lost; a new one begins when
 * both sides know of that. */
static struct credit {
    u8 next, credit, in_flight, unknown, told; /* the dialler; told: values known to have left the buffer */
    u8 back[VALUES], unsent[VALUES];           /* that came back, and go first; that are about to, as they never left */
    u8 up[VALUES], down[CREDITS], left_too[CREDITS]; /* values in the line; CREDIT on its way: 1 + its n, its left */
    u8 lane[LANE], old[VALUES], lent, left;          /* the listener; old: what is in the buffers of former sessions */
    bool lost, dialler_knows, listener_knows;
    u8 taken, vanished, losses, padding[8];          /* the truth: values, as bits; vanished: with a line */
} C;

enum { PUT, DATA_COMES, CREDIT_COMES, LEND, TAKE, TAKE_OLD, DIALLER_LEARNS, LISTENER_LEARNS, JOIN, LOSE_SESSION };

static void credit_comes(void) {
    int n = C.down[0] - 1, left = C.left_too[0];
    list_pop(C.down, CREDITS);
    memmove(C.left_too, C.left_too + 1, CREDITS - 1);
    C.left_too[CREDITS - 1] = 0;
    if (left > C.in_flight || n > CAPACITY - C.credit) fail("a breach: more is lent than the capacity");
    C.credit = (u8)(C.credit + n);
    C.in_flight = (u8)(C.in_flight - left);
    C.told = (u8)(C.told + left);
}

static void lend(void) {
    int n = CAPACITY - list_length(C.lane, LANE) - C.lent;
    if (!C.lost) C.left_too[list_length(C.down, CREDITS)] = C.left, list_add(C.down, CREDITS, 1 + n, false);
    C.lent = (u8)(C.lent + n);
    C.left = 0;
}

static void data_comes(void) {
    int v = list_pop(C.up, VALUES), count = list_length(C.lane, LANE);
    if (!C.lent) fail("a breach: value %d comes without credit", v);
    if (count && C.lane[count - 1] > v) fail("value %d has passed value %d", C.lane[count - 1], v);
    C.lent = (u8)(C.lent - (C.lent > 0));
    list_add(C.lane, LANE, v, false);
}

static void take_out(u8 *list, int room) {
    int v = list_pop(list, room);
    if (C.taken >> v & 1) fail("value %d is taken twice", v);
    C.taken = (u8)(C.taken | 1u << v);
}

/* What never left comes back; of the rest only the listener knows. */
static void dialler_learns(void) {
    int unsent = list_length(C.unsent, VALUES);
    C.dialler_knows = true;
    C.unknown = (u8)(C.unknown + C.in_flight - (mistake == UNSENT_UNKNOWN ? 0 : unsent));
    C.in_flight = 0;
    if (mistake != CREDIT_KEPT) C.credit = 0;
    for (int i = 0; i < unsent; i++)
        list_add(C.back, VALUES, C.unsent[mistake == UNSENT_LAST ? i : unsent - 1 - i], mistake != UNSENT_LAST);
    memset(C.unsent, 0, sizeof C.unsent);
    memset(C.down, 0, sizeof C.down);
    memset(C.left_too, 0, sizeof C.left_too);
}

static void listener_learns(void) {
    C.listener_knows = true;
    while (C.up[0]) C.vanished = (u8)(C.vanished | 1u << list_pop(C.up, VALUES));
    while (C.lane[0]) list_add(C.old, VALUES, list_pop(C.lane, LANE), false);
    C.lent = C.left = 0;
}

static void credit_make(unsigned code) {
    switch (code >> 8 & 15) {
    case PUT:
        list_add(C.lost ? C.unsent : C.up, VALUES, C.back[0] ? list_pop(C.back, VALUES) : ++C.next, false);
        C.credit--;
        C.in_flight++;
        break;
    case DATA_COMES: data_comes(); break;
    case CREDIT_COMES: credit_comes(); break;
    case LEND: lend(); break;
    case TAKE: take_out(C.lane, LANE), C.left++; break;
    case TAKE_OLD: take_out(C.old, VALUES); break;
    case DIALLER_LEARNS: dialler_learns(); break;
    case LISTENER_LEARNS: listener_learns(); break;
    case JOIN: C.lost = C.dialler_knows = C.listener_knows = false; break;
    default: /* the first values in the line had left */
        C.lost = true;
        C.losses++;
        memcpy(C.unsent, C.up + (code & 255), VALUES - (code & 255));
        memset(C.up + (code & 255), 0, VALUES - (code & 255));
    }
}

static void credit_moves(void) {
    bool lends = list_length(C.lane, LANE) + C.lent < CAPACITY || C.left;
    if (C.credit && !C.dialler_knows && (C.back[0] || C.next < VALUES)) can(PUT << 8);
    if (C.up[0] && !C.listener_knows) can(DATA_COMES << 8);
    if (C.down[0] && !C.dialler_knows) can(CREDIT_COMES << 8);
    if (lends && !C.listener_knows) can(LEND << 8);
    if (C.lane[0]) can(TAKE << 8);
    if (C.old[0]) can(TAKE_OLD << 8);
    if (C.lost && !C.dialler_knows) can(DIALLER_LEARNS << 8);
    if (C.lost && !C.listener_knows) can(LISTENER_LEARNS << 8);
    if (C.dialler_knows && C.listener_knows) can(JOIN << 8);
    for (int i = 0; i <= list_length(C.up, VALUES) && !C.lost && C.losses < LOSSES; i++)
        can(OPTIONAL | LOSE_SESSION << 8 | (unsigned)i);
}

static void credit_check(bool at_rest) {
    if (list_length(C.lane, LANE) + C.lent > CAPACITY) fail("the buffer and the credit are more than the capacity");
    if (C.taken & C.vanished) fail("a value is taken that was lost");
    if (!at_rest) return;
    if (C.next < VALUES || C.back[0]) fail("a value is never sent");
    if ((C.taken | C.vanished) != (1 << (VALUES + 1)) - 2) fail("a value is nowhere");
    if (C.told + C.unknown != VALUES) fail("%d values left and %d are unknown, of %d", C.told, C.unknown, VALUES);
}

static void credit_tell(unsigned code, char *text, size_t room) {
    static const char *const names[] = {"a value is sent", "DATA comes", "CREDIT comes", "CREDIT is sent",
        "a value is taken", "a value of a former session is taken", "the dialler learns of the loss",
        "the listener learns of the loss", "a new session", "the session is lost; of the values in the line had left:"};
    snprintf(text, room, code & OPTIONAL ? "%s %u" : "%s", names[code >> 8 & 15], code & 255);
}

static bool credit_start(int root) { return root == 0; }

static const model credit_model = {&C, sizeof C, credit_start, credit_moves, credit_make, credit_check, credit_tell};

/* --- ends that travel in values, and their release --- */

enum { HOPS = 2, FRAMES = 8, PUTS = 2 };
enum { COPY = 1, DROP, BACK, USE, IS_CLOSED, IS_GONE }; /* COPY, BACK: a value with an end, from and to the exporter */
enum { KNOWS_CLOSED = 1, KNOWS_GONE = 2, SAYS_LOST = 16 /* in DROP: others had it, and were lost */ };

/* A has a channel and exports its end to B (hop 0), which exports its own to C (hop 1). Each copy of a value that holds
 * the end is a holder. */
typedef struct hop {
    u8 sent;                              /* how often it was exported, less what was dropped; 0: it is not exported */
    u8 received, knows, holders;          /* at the importer; received 0: it has no end */
    u8 down[FRAMES], down_too[FRAMES];    /* frames to the importer, and what they say */
    u8 up[FRAMES], up_too[FRAMES];
    u8 puts;
    bool lost, exporter_knows, importer_knows; /* the session is lost */
    bool any_lost; /* the exporter knows that some end of it was lost, and has exported none anew since */
} hop;

static struct ends {
    hop hop[HOPS];
    bool held, closed, any_lost; /* somebody at A holds the channel; it is closed; any_lost: the truth */
    u8 uses, backs, padding[8];
} E;

enum {
    DOWN_COMES, UP_COMES, EXPORTER_LEARNS, IMPORTER_LEARNS, PUT_END, GIVE_BACK, LET_GO, USE_END, CLOSE_A, LET_GO_A,
    LOSE_HOP
};

static void send_down(int i, int type, int too) {
    hop *h = &E.hop[i];
    if (h->lost) return;
    h->down_too[list_length(h->down, FRAMES)] = (u8)too;
    list_add(h->down, FRAMES, type, false);
}

static void send_up(int i, int type, int too) {
    hop *h = &E.hop[i];
    if (h->lost) return;
    h->up_too[list_length(h->up, FRAMES)] = (u8)too;
    list_add(h->up, FRAMES, type, false);
}

/* One reference less: with the last one the importer lets its end go, and says how often it had received it, and
 * whether one that it gave away was lost. */
static void let_go(int i) {
    hop *h = &E.hop[i];
    bool exported = i + 1 < HOPS && E.hop[i + 1].sent && mistake != RELAY_LETS_GO;
    if (!h->received || h->holders || exported) return;
    bool any_lost = h->knows & KNOWS_GONE || (i + 1 < HOPS && E.hop[i + 1].any_lost);
    send_up(i, DROP, (mistake == DROP_COUNTS_ONE ? 1 : h->received) | (any_lost ? SAYS_LOST : 0));
    h->received = h->knows = 0;
    if (i + 1 < HOPS) E.hop[i + 1].any_lost = false;
}

static void learn(int i, int what) {
    hop *h = &E.hop[i];
    if (!h->received) return;
    h->knows = (u8)(h->knows | what);
    if (i + 1 < HOPS && E.hop[i + 1].sent) send_down(i + 1, what == KNOWS_GONE ? IS_GONE : IS_CLOSED, 0);
}

static void down_comes(int i) {
    hop *h = &E.hop[i];
    int type = list_pop(h->down, FRAMES), too = h->down_too[0];
    memmove(h->down_too, h->down_too + 1, FRAMES - 1);
    h->down_too[FRAMES - 1] = 0;
    if (type != COPY) {
        learn(i, type == IS_GONE ? KNOWS_GONE : KNOWS_CLOSED);
        return;
    }
    h->received++;
    h->holders++;
    if (mistake != COPY_KNOWS_NOTHING) h->knows = (u8)(h->knows | too); /* an end that is made anew */
}

static void up_comes(int i) {
    hop *h = &E.hop[i];
    int type = list_pop(h->up, FRAMES), too = h->up_too[0];
    memmove(h->up_too, h->up_too + 1, FRAMES - 1);
    h->up_too[FRAMES - 1] = 0;
    int count = too & ~SAYS_LOST;
    if (!h->sent || (type == DROP && count > h->sent)) {
        fail("a breach: a frame of an end that is not exported");
        return;
    }
    if (type == DROP) h->sent = (u8)(mistake == FIRST_DROP ? 0 : h->sent - count);
    if (type == DROP && too & SAYS_LOST && (!h->sent || mistake != LOSS_WITH_LAST)) h->any_lost = true;
    if (type == DROP && i > 0 && !h->sent) let_go(i - 1);
    if (type == BACK && i > 0) E.hop[i - 1].holders++;
    if (type == BACK && i == 0) E.held = true;
    if (type == USE && i > 0) send_up(i - 1, USE, 0);
}

static void ends_make(unsigned code) {
    int i = (int)(code & 15);
    hop *h = &E.hop[i];
    switch (code >> 4 & 15) {
    case DOWN_COMES: down_comes(i); break;
    case UP_COMES: up_comes(i); break;
    case EXPORTER_LEARNS:
        h->exporter_knows = true;
        if (h->sent) h->any_lost = E.any_lost = true;
        h->sent = 0;
        memset(h->up, 0, sizeof h->up + sizeof h->up_too);
        if (i > 0) let_go(i - 1);
        break;
    case IMPORTER_LEARNS:
        h->importer_knows = true;
        memset(h->down, 0, sizeof h->down + sizeof h->down_too);
        learn(i, KNOWS_GONE);
        break;
    case PUT_END:
        h->puts++;
        if (!h->sent) h->any_lost = E.any_lost = false;
        h->sent++;
        send_down(i, COPY, i > 0 ? E.hop[i - 1].knows : E.closed ? KNOWS_CLOSED : 0);
        break;
    case GIVE_BACK: E.backs++; send_up(i, BACK, 0); break;
    case LET_GO: h->holders--; let_go(i); break;
    case USE_END: E.uses++; send_up(i, USE, 0); break;
    case CLOSE_A:
        E.closed = true;
        if (E.hop[0].sent) send_down(0, IS_CLOSED, 0);
        break;
    case LET_GO_A: E.held = false; break;
    default: h->lost = true;
    }
}

static void ends_moves(void) {
    for (unsigned i = 0; i < HOPS; i++) {
        const hop *h = &E.hop[i];
        bool has = i > 0 ? E.hop[i - 1].holders > 0 : E.held;
        if (h->down[0] && !h->importer_knows) can(DOWN_COMES << 4 | i);
        if (h->up[0] && !h->exporter_knows) can(UP_COMES << 4 | i);
        if (h->lost && !h->exporter_knows) can(EXPORTER_LEARNS << 4 | i);
        if (h->lost && !h->importer_knows) can(IMPORTER_LEARNS << 4 | i);
        if (has && h->puts < PUTS && !h->exporter_knows) can(OPTIONAL | PUT_END << 4 | i);
        if (h->holders) can(OPTIONAL | LET_GO << 4 | i);
        if (h->holders && !E.backs && !h->importer_knows) can(OPTIONAL | GIVE_BACK << 4 | i);
        if (h->holders && !E.uses && !h->importer_knows) can(OPTIONAL | USE_END << 4 | i);
        if (!h->lost) can(OPTIONAL | LOSE_HOP << 4 | i);
    }
    if (E.held && !E.closed) can(OPTIONAL | CLOSE_A << 4);
    if (E.held) can(OPTIONAL | LET_GO_A << 4);
}

static void check_hop(int i, bool at_rest) {
    const hop *h = &E.hop[i];
    int knows = i > 0 ? E.hop[i - 1].knows : E.closed ? KNOWS_CLOSED : 0, count = h->received;
    for (int j = 0; j < FRAMES; j++) count += (h->down[j] == COPY) + (h->up[j] == DROP ? h->up_too[j] & ~SAYS_LOST : 0);
    if (!h->lost && h->received && !h->sent) fail("there is an end at %c, and %c does not export it", 'B' + i, 'A' + i);
    if (!h->lost && h->sent != count) fail("%c counts %d exports, and there are %d", 'A' + i, h->sent, count);
    if (i > 0 && h->sent && !E.hop[i - 1].received) fail("%c exports an end that it does not have", 'A' + i);
    if (h->holders && !h->received) fail("%c holds an end that it does not have", 'B' + i);
    if (!at_rest) return;
    bool held = h->holders || (i + 1 < HOPS && E.hop[i + 1].sent);
    if (h->sent && (h->lost || !h->received)) fail("%c exports an end that %c does not have", 'A' + i, 'B' + i);
    if (h->received && !held) fail("%c has an end that nobody holds", 'B' + i);
    if (h->received && h->lost && !(h->knows & KNOWS_GONE)) fail("%c does not know that its end is lost", 'B' + i);
    if (h->received && !h->lost && knows & ~h->knows) fail("%c does not know that its end is closed or lost", 'B' + i);
}

static void ends_check(bool at_rest) {
    for (int i = 0; i < HOPS; i++) check_hop(i, at_rest);
    if (at_rest && !E.hop[0].sent && E.any_lost && !E.hop[0].any_lost) fail("A does not know that an end was lost");
}

static void ends_tell(unsigned code, char *text, size_t room) {
    static const char *const frames[] = {"", "a value with the end", "DROP", "a value with the end, back", "a use",
        "CLOSED", "GONE"};
    static const char *const names[] = {"", "", "learns that it has lost", "learns that it has lost",
        "puts the end in a value for", "gives the end back to", "lets a copy go that it had from", "uses its end, of",
        "closes the channel", "lets the channel go", "loses its session with"};
    unsigned i = code & 15, kind = code >> 4 & 15;
    bool up = kind == UP_COMES || kind == IMPORTER_LEARNS || (kind >= GIVE_BACK && kind <= USE_END);
    char from = (char)('A' + i + up), to = (char)('A' + i + !up);
    if (kind <= UP_COMES) snprintf(text, room, "%c -> %c %s", from, to, frames[up ? E.hop[i].up[0] : E.hop[i].down[0]]);
    else if (kind == CLOSE_A || kind == LET_GO_A) snprintf(text, room, "A %s", names[kind]);
    else snprintf(text, room, "%c %s %c", from, names[kind], to);
}

static bool ends_start(int root) {
    E.held = true;
    return root == 0;
}

static const model ends_model = {&E, sizeof E, ends_start, ends_moves, ends_make, ends_check, ends_tell};

/* --- scenarios and mistakes --- */

static const scene scenes[] = {
    /* No loss: plain operations, and cycles of selects that offer to each other */
    {"here", &commit_model, "B0", "A1 a!; A1 a!; B1~ a?; B1~ a?", ""},
    {"held", &commit_model, "B0", "A1~ a!; A1~ a!; B1~ a?; B1~ a?", ""},
    {"remote-receive", &commit_model, "A0", "A1~ a!; A1~ a!; B1~ a?; B1~ a?", ""},
    {"third-home", &commit_model, "B0", "A1 a!; A1~ a!; C1~ a?; C1~ a?", ""},
    {"many-senders", &commit_model, "B0", "A a!; C~ a!; B~ a?; B~ a?", ""},
    {"many-receivers", &commit_model, "B0", "B1~ a!; B1~ a!; A~ a?; C~ a?", ""},
    {"cycle-own", &commit_model, "A0 B0", "A~ a!b?; B~ b!a?", ""},
    {"cycle-far", &commit_model, "B0 A0", "A~ a!b?; B~ b!a?", ""},
    {"cycle-third", &commit_model, "C0 C0", "A~ a!b?; B~ b!a?", ""},
    {"cycle-mixed", &commit_model, "C0 A0", "A~ a!b?; B~ b!a?", ""},
    {"ring-own", &commit_model, "A0 B0 C0", "A~ a!c?; B~ b!a?; C~ c!b?", ""},
    {"ring-shifted", &commit_model, "B0 C0 A0", "A~ a!c?; B~ b!a?; C~ c!b?", ""},
    {"ring-opposite", &commit_model, "C0 A0 B0", "A~ a!c?; B~ b!a?; C~ c!b?", ""},
    {"ring-forever", &commit_model, "C0 A0 B0", "A a!c?; B b!a?; C c!b?", ""},
    {"both-ways", &commit_model, "B0", "A~ a!a?; C~ a!a?; B~ a?", ""},
    {"fork", &commit_model, "B0 C0", "A~ a!b!; B~ a?; C~ b?", ""},
    {"join", &commit_model, "B0 C0", "A~ a?b?; B~ a!; C~ b!", ""},
    {"select-and-plain", &commit_model, "A0 B0", "A~ a!b?; B~ b!a?; B~ a?; A b!", ""},
    {"selects", &commit_model, "A0 C0", "A~ a!b?; B~ b!a?; C b!a?", ""},
    {"selects-far", &commit_model, "A0 B0", "A~ a!b?; B~ b!a?; A~ a!b?", ""},
    {"three-cases", &commit_model, "A0 B0 A0", "A~ a!b?c!; B~ b!a?c?", ""},
    {"sequence", &commit_model, "A0 B0", "A1~ a!b?; A1~ a!b?; B1~ b!a?; B1~ b!a?", ""},
    {"held-and-select", &commit_model, "B0 A0", "A~ a!; C~ a?b!; B~ b?a!", ""},
    /* Tries */
    {"try-send", &commit_model, "B0", "A% a!; C~ a?; B~ a?", ""},
    {"try-receive", &commit_model, "B0", "A% a?; C~ a!; B~ a!", ""},
    {"try-select", &commit_model, "B0 C0", "A% a!b?; B~ a?b!; C~ b!a?", "down AB down AC"},
    {"tries-meet", &commit_model, "C0", "A% a!; B% a?; C~ a!a?", ""},
    {"tries-lost", &commit_model, "C0 B0", "A% a!b?; B~ a?b!", "lose AC down AB"},
    /* Large values */
    {"large", &commit_model, "B0", "A~ a!*; B~ a?; C~ a?", ""},
    {"large-select", &commit_model, "B0 A0", "A~ a!*b?; C~ a?b!*; B~ a?", ""},
    {"large-lost", &commit_model, "B0", "A~ a!*; C~ a?; B~ a?", "lose AB lose BC"},
    {"large-firm-lost", &commit_model, "A0", "A a!*; B a?; C~ a?", "lose AB"},
    /* Close */
    {"close", &commit_model, "B0", "A a!; A~ a!; B~ a?; C~ a?", "close aB"},
    {"close-cycle", &commit_model, "C0 C0", "A~ a!b?; B~ b!a?", "close aC close bC"},
    {"close-ring", &commit_model, "C0 A0 B0", "A a!c?; B b!a?; C c!b?", "close aC"},
    {"close-remote", &commit_model, "C0", "A1 a!; A1 a!; B~ a!; B~ a?; C~ a?", "close aA"},
    {"close-buffer", &commit_model, "B2", "B1 a!; B1 a!; B1 a!; A1 a?; A1 a?; A1 a?", "close aB"},
    {"close-lost", &commit_model, "C0 C0", "A~ a!b?; B~ b!a?", "close aC lose AC"},
    /* Buffers, and the work queue, whose values go to another peer marked as redelivered */
    {"buffer", &commit_model, "B1", "A~ a!*; B a!; C~ a?; B~ a?", ""},
    {"buffer-select", &commit_model, "A1 B1", "A~ b!a?; B~ a!b?; A~ b?", ""},
    {"queue", &commit_model, "B2", "B1 a!; B1 a!; A1~ a?; A1 a?; C~ a?", ""},
    {"queue-lost", &commit_model, "B2", "B1 a!; B1 a!; A1~ a?; A1 a?; C~ a?", "lose AB"},
    {"queue-large-lost", &commit_model, "B1", "B a!*; A a?; C~ a?", "lose AB lose BC"},
    /* A session is lost */
    {"plain-lost", &commit_model, "B0", "A1 a!; A1 a!; B1 a?; B1~ a?", "lose AB"},
    {"held-lost", &commit_model, "B0", "A1~ a!; A1~ a!; B1~ a?; C~ a?", "lose AB"},
    {"receive-lost", &commit_model, "A0", "A1~ a!; A1~ a!; B1~ a?; C~ a?", "lose AB lose AC"},
    {"cycle-lost", &commit_model, "C0 C0", "A~ a!b?; B~ b!a?", "lose AC lose BC"},
    {"cycle-far-lost", &commit_model, "B0 A0", "A~ a!b?; B~ b!a?", "lose AB"},
    {"ring-lost", &commit_model, "A0 B0 C0", "A~ a!c?; B~ b!a?; C~ c!b?", "lose AB"},
    {"ring-opposite-lost", &commit_model, "C0 A0 B0", "A~ a!c?; B~ b!a?; C~ c!b?", "lose AC"},
    {"mixed-lost", &commit_model, "C0 A0", "A~ a!b?; B~ b!a?; C~ a?", "lose BC"},
    /* Relays */
    {"relay", &commit_model, "A0", "A~ a!; C~ a?/B; B~ a?", ""},
    {"relay-sends", &commit_model, "A0", "A~ a?; C~ a!/B; B~ a!", ""},
    {"relay-select", &commit_model, "A0 A0", "A~ a!b?; C~ b!/Ba?/B; B~ a?", ""},
    {"relay-ring", &commit_model, "A0 B0 C0", "A~ a!c?/B; B~ b!a?/C; C~ c!b?/A", ""},
    {"relay-both-ways", &commit_model, "A0", "C~ a!/Ba?/B; C~ a!/Ba?/B", ""},
    {"relay-two-ways", &commit_model, "A0", "C~ a!/Ba?; A~ a!a?; C~ a?/B", ""},
    {"relay-order", &commit_model, "A0", "A1~ a!; A1~ a!; C1~ a?/B; C1~ a?/B; B~ a?", ""},
    {"relay-try", &commit_model, "A0 A0", "A~ a!b?; C% a?/Bb!/B; B~ a?", "down CB"},
    {"relay-large", &commit_model, "A0", "C~ a!*/B; A~ a?; C~ a?/B", ""},
    {"relay-close", &commit_model, "A0", "A~ a!; C~ a?/Ba!/B; B~ a!", "close aC"},
    {"relay-queue", &commit_model, "A2", "A1 a!; A1 a!; C1 a?/B; C1~ a?/B; B~ a?", ""},
    {"relay-lost", &commit_model, "A0", "A~ a!; C~ a?/B; A~ a?", "lose AB lose BC"},
    {"relay-sends-lost", &commit_model, "A0", "A~ a?; C~ a!/B; B~ a!", "lose AB lose BC"},
    {"relay-large-lost", &commit_model, "A0", "C~ a!*/B; A~ a?; C~ a?/B", "lose AB lose BC"},
    {"relay-select-lost", &commit_model, "A0 A0", "A~ a!b?; C~ b!/Ba?/B", "lose AB lose BC"},
    {"relay-select-large-lost", &commit_model, "A0 A0", "A~ a!*b?; C~ b!*/Ba?/B", "lose AB lose BC"},
    {"relay-direct-lost", &commit_model, "A0 A0", "A~ a!b?; C~ b!a?/B", "lose AB lose BC lose AC"},
    {"relay-home-lost", &commit_model, "A0 C0", "A~ a!b?; C~ b!a?/B; B~ a?", "lose AB lose BC"},
    {"relay-own-lost", &commit_model, "A0 B0", "A~ a!b?/C; C~ b!a?/B; B~ a?", "lose AB lose BC"},
    {"relay-ring-lost", &commit_model, "A0 B0 C0", "A a!c?/B; B b!a?/C; C~ c!b?/A", "lose AB lose BC"},
    {"relay-both-ways-lost", &commit_model, "A0", "A~ a!a?; B~ a!a?; C~ a!/Ba?/B", "lose BC"},
    {"relay-four-lost", &commit_model, "A0", "A~ a!; C~ a?/B; C~ a!/B; A~ a?", "lose AB lose BC"},
    {"relay-close-lost", &commit_model, "A0", "A~ a!; C~ a?/Ba!/B; B~ a!", "close aA lose AB lose BC"},
    {"relay-try-lost", &commit_model, "A0 A0", "A~ a!; B b!; C% a?/Bb?", "lose AB lose BC down CB"},
    {"relay-queue-lost", &commit_model, "A1", "A1 a!; A1 a!*; C1 a?/B; C1 a?/B; B~ a?", "lose AB lose BC"},
    /* Two relays; an end that went round and came back to the process of its home */
    {"chain", &commit_model, "A0 D0", "A~ a?b!/BC; D~ a!/CBb?", ""},
    {"chain-lost", &commit_model, "A0 D0", "A~ a?b!/BC; D~ a!/CBb?", "lose BC lose CD"},
    {"chain-own-lost", &commit_model, "A0 D0", "A~ a?b!/BC; D~ a!/CBb?; B~ a!", "lose BC"},
    {"chain-large-lost", &commit_model, "A0", "A~ a!*; D~ a?/CB", "lose AB lose BC lose CD"},
    {"chain-large-sends-lost", &commit_model, "A0", "A~ a?; D~ a!*/CB", "lose AB lose BC lose CD"},
    {"chain-queue-lost", &commit_model, "A1", "A a!*; A~ a?; D a?/CB", "lose AB lose BC lose CD"},
    {"loop", &commit_model, "A0", "A~ a!/CBa?; A~ a!a?/CB", ""},
    {"loop-lost", &commit_model, "A0", "A~ a!/CB; A~ a?/CB", "lose AB lose BC lose AC"},
    /* The small models */
    {"credit", &credit_model, "", "", ""},
    {"ends", &ends_model, "", "", ""},
};

/* Each mistake, and a scenario that catches it. */
static const struct {
    const char *name;
    enum mistake mistake;
    const char *scene, *what;
} mistakes[] = {
    {"lock-receiver-first", LOCK_RECEIVER_FIRST, "cycle-own",
     "the receiver is always locked first"},
    {"lock-sender-first", LOCK_SENDER_FIRST, "cycle-own",
     "the sender is always locked first, also when both have several cases"},
    {"busy", BUSY_ANSWER, "cycle-third",
     "who is engaged answers that, and does not queue the claim"},
    {"abandon", ABANDON, "cycle-lost",
     "a match is given up while a claim is outstanding, as its other party is lost"},
    {"forget-withdraw", FORGET_WITHDRAW, "cycle-far",
     "a WITHDRAW of an entry in a match is not remembered"},
    {"decline-loses", DECLINE_LOSES, "buffer",
     "the value of a claim that was declined does not come back to the buffer"},
    {"release-blind", RELEASE_BLIND, "close-cycle",
     "who is released does not look at its closed and lost cases"},
    {"try-early", TRY_EARLY, "try-send",
     "a try is answered while it is in a match"},
    {"no-pin", NO_PIN, "queue",
     "later values leave while one is out that may come back"},
    {"match-itself", MATCH_ITSELF, "both-ways",
     "two cases of one operation are matched"},
    {"ok-before-taken", OK_BEFORE_TAKEN, "large-firm-lost",
     "a send is OK when its value is shipped"},
    {"release-committed", RELEASE_COMMITTED, "cycle-lost",
     "a sender that has committed is released when its receiver is lost"},
    {"redeliver-rendezvous", REDELIVER_RENDEZVOUS, "receive-lost",
     "a value of unknown fate goes to another receiver in a rendezvous"},
    {"redeliver-unmarked", REDELIVER_UNMARKED, "queue-lost",
     "it does so on the work queue, without the mark"},
    {"closing-late", CLOSING_LATE, "close",
     "senders are told of the close when the buffer is empty"},
    {"closed-early", CLOSED_EARLY, "close-buffer",
     "receivers are told of the close at once"},
    {"fragments-first", FRAGMENTS_FIRST, "large-lost",
     "a large value counts as shipped with its first fragment"},
    {"relay-forgets", RELAY_FORGETS, "relay-select-lost",
     "a relay forgets a granted entry when its owner is lost"},
    {"relay-not-taken", RELAY_NOT_TAKEN, "relay-lost",
     "it says then that a value was not taken which had left"},
    {"relay-own-ids", RELAY_OWN_IDS, "relay-both-ways",
     "it offers the operations of others as its own"},
    {"relay-drops-withdraw", RELAY_DROPS_WITHDRAW, "relay",
     "it forgets a claimed entry on WITHDRAW, and the DECLINE comes for nothing"},
    {"relay-ends-shipped", RELAY_ENDS_SHIPPED, "relay-select-lost",
     "it ends an entry that it has sent a value when the home is lost, and TAKEN comes for nothing"},
    {"relay-cuts-fragments", RELAY_CUTS_FRAGMENTS, "relay-large-lost",
     "it answers a GRANT for a lost home before the fragments have come"},
    {"relay-hides-unknown", RELAY_HIDES_UNKNOWN, "relay-sends-lost",
     "it says ELOST of a value that went to the home that is lost"},
    {"relay-wants-taken", RELAY_WANTS_TAKEN, "chain-large-lost",
     "it takes no DECLINE after a COMMIT, though the next one may be a relay as well"},
    {"release-misses-gone", RELEASE_MISSES_GONE, "relay-home-lost",
     "who is released overlooks an end that was lost before its case was registered"},
    {"credit-kept", CREDIT_KEPT, "credit",
     "credit outlives its session"},
    {"unsent-unknown", UNSENT_UNKNOWN, "credit",
     "a value that never left counts as unknown, and comes back"},
    {"unsent-last", UNSENT_LAST, "credit",
     "what comes back is sent after what came back before"},
    {"drop-counts-one", DROP_COUNTS_ONE, "ends",
     "DROP stands for one copy"},
    {"first-drop", FIRST_DROP, "ends",
     "the first DROP ends the export"},
    {"copy-knows-nothing", COPY_KNOWS_NOTHING, "ends",
     "a copy does not say what is known of its end"},
    {"relay-lets-go", RELAY_LETS_GO, "ends",
     "an end is let go that was exported to another"},
    {"loss-with-last", LOSS_WITH_LAST, "ends",
     "that an end was lost is heard only in the DROP of the last copy"},
};

enum { SCENES = sizeof scenes / sizeof *scenes, MISTAKES = sizeof mistakes / sizeof *mistakes };

static const scene *find_scene(const char *name) {
    for (int i = 0; i < SCENES; i++)
        if (strcmp(scenes[i].name, name) == 0) return &scenes[i];
    return NULL;
}

/* Explores the scenario with this mistake, or none. Returns what was found, until the next call. */
static const finding *run(const scene *s, enum mistake m) {
    static finding f;
    mistake = m;
    if (s->model == &commit_model) read_scene(s);
    explore(s->model, &f);
    return &f;
}

static void describe(const scene *s, const finding *f) {
    printf("%-24s %8zu states %9zu moves%s", s->name, f->states, f->moves, f->bounded ? ", not all visited" : "");
    printf(s->ops[0] ? "    %s | %s | %s\n" : "\n", s->channels, s->ops, s->events);
}

static bool test_scene(const scene *s, bool verbose) {
    const finding *f = run(s, NONE);
    if (verbose) describe(s, f);
    if (!f->what[0]) return true;
    printf("FAIL %s: %s | %s | %s\n", s->name, s->channels, s->ops, s->events);
    print_way(s->model, f);
    return false;
}

static bool test_mistake(int i, bool verbose) {
    const scene *s = find_scene(mistakes[i].scene);
    const finding *f = s ? run(s, mistakes[i].mistake) : NULL;
    bool caught = f && f->what[0];
    if (!caught) printf("FAIL %s: %s does not catch that %s\n", mistakes[i].name, mistakes[i].scene, mistakes[i].what);
    if (caught && verbose)
        printf("%-24s caught by %s after %d moves: %s\n", mistakes[i].name, s->name, f->length - 1, f->what);
    return caught;
}

static int test_all(bool verbose) {
    int passed = 0, failed = 0;
    for (int i = 0; i < SCENES; i++) test_scene(&scenes[i], verbose) ? passed++ : failed++;
    for (int i = 0; i < MISTAKES; i++) test_mistake(i, verbose) ? passed++ : failed++;
    printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}

int main(int argc, char **argv) {
    bool verbose = argc > 1 && strcmp(argv[1], "-v") == 0;
    if (argc == 1 || verbose) return test_all(verbose);
    const scene *s = find_scene(argv[1]);
    enum mistake m = NONE;
    for (int i = 0; i < MISTAKES && argc > 2; i++)
        if (strcmp(mistakes[i].name, argv[2]) == 0) m = mistakes[i].mistake;
    if (!s || (argc > 2 && m == NONE)) {
        puts("usage: model [-v | SCENARIO [MISTAKE]], with names that model -v tells");
        return 2;
    }
    const finding *f = run(s, m);
    describe(s, f);
    if (f->what[0]) print_way(s->model, f);
    return f->what[0] ? 1 : 0;
}
