/* Nothing costs more because there is more of something else: values in a queue, peers, channels, names, waiters,
 * cases. Each test prints a table and checks that a cost does not grow by more than a few times where that grows a
 * thousandfold. Caches are allowed for, and walks are not. Measured is the processor time of the whole process, both
 * sides of a link and the library's thread included, and the least of several runs counts: other programs only add. */
#include "alloc.h"
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"
#include "test.h"
#include "task.h"
#include "net.h"

#include <dirent.h>
#include <sys/resource.h>

#ifdef __SANITIZE_THREAD__
enum { MOST_CASES = 60 }; /* ThreadSanitizer follows 64 locks of one thread and gives up at more */
#else
enum { MOST_CASES = 1000 };
#endif

enum {
    RUNS = 3,
    ENOUGH_NS = 200000000,
    FACTOR = 5, /* by which a cost may grow */
    COLUMNS = 7,
    MOST_QUEUED = 1000000 / LESS / FEWER,
    CAPACITY = MOST_QUEUED + 1000, /* a full buffer would be another thing: each send would wait for room */
    MOST_CHANNELS = 10000 / LESS,
    MOST_THREADS = 1000 / LESS,
    MOST_PEERS = 1000 / LESS,
    IDLE_LINKS = 250 / LESS
};

/* --- what is measured --------------------------------------------------------------------------------------------- */

/* Nanoseconds of a processor, of all threads together. */
static double cpu_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* The cost of one of so many operations, which run() does all at once. What takes long need not be done again. */
static double cost_of_one(void (*run)(void *arg, size_t count), void *arg, size_t count) {
    double least = 0, sum = 0;
    for (int i = 0; i < RUNS && sum < ENOUGH_NS; i++) {
        double start = cpu_ns();
        run(arg, count);
        double ns = cpu_ns() - start;
        sum += ns;
        if (i == 0 || ns < least) least = ns;
    }
    return least / (double)count;
}

/* A table of costs by the number of something. */
typedef struct table {
    const char *const *columns;
    size_t from; /* the cost of this many, or the next that there is, is what more may cost only FACTOR times */
    size_t width, worst_count;
    double base[COLUMNS], worst;
} table;

static table begin_table(size_t from, const char *what, const char *const *columns) {
    table t;
    memset(&t, 0, sizeof t);
    t.columns = columns;
    t.from = from;
    printf("\n| %-10s |", what);
    for (; columns[t.width]; t.width++) printf(" %s |", columns[t.width]);
    printf("\n");
    return t;
}

/* A column in brackets is shown and not checked. */
static bool is_for_show(const char *column) { return column[0] == '('; }

static void add_row(table *t, size_t count, const double *ns) {
    printf("| %10zu |", count);
    for (size_t i = 0; i < t->width; i++) {
        printf(" %*.0f |", (int)strlen(t->columns[i]), ns[i]);
        if (count < t->from || is_for_show(t->columns[i])) continue;
        if (t->base[i] == 0) t->base[i] = ns[i];
        if (ns[i] / t->base[i] <= t->worst) continue;
        t->worst = ns[i] / t->base[i];
        t->worst_count = count;
    }
    printf("\n");
    fflush(stdout);
}

static bool is_too_much(const table *t, const double *ns) {
    for (size_t i = 0; i < t->width; i++)
        if (t->base[i] > 0 && !is_for_show(t->columns[i]) && ns[i] > FACTOR * t->base[i]) return true;
    return false;
}

static int compare_costs(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Of what others are compared with, the most of several counts: a few threads may meet without a sleep, by luck.
 * Of what seems to cost too much it is the least: the machine may have been busy. */
static void measure(const table *t, size_t count, void (*cost)(size_t count, double *ns), double *ns) {
    double all[COLUMNS][RUNS];
    bool is_base = count >= t->from && t->base[0] == 0;
    for (int run = 0; run < RUNS && (run == 0 || is_base || is_too_much(t, ns)); run++) {
        double now[COLUMNS];
        cost(count, now);
        for (size_t c = 0; c < t->width; c++) {
            all[c][run] = now[c];
            qsort(all[c], (size_t)run + 1, sizeof all[c][0], compare_costs);
            ns[c] = all[c][is_base ? run : 0];
        }
    }
}

/* Measures with 1, 10, 100, ... up to the most, and checks. cost() writes one number for each column. */
static void check_growth(const char *what, size_t from, size_t most, const char *const *columns,
                         void (*cost)(size_t count, double *ns)) {
    table t = begin_table(from, what, columns);
    for (size_t count = 1;; count = count * 10 < most ? count * 10 : most) {
        double ns[COLUMNS];
        measure(&t, count, cost, ns);
        add_row(&t, count, ns);
        if (count >= most) break;
    }
    if (t.worst > FACTOR)
        test_fail(__FILE__, __LINE__, "%zu cost %.1f times as much as %zu", t.worst_count, t.worst, t.from);
}

/* Waits without using a processor, as its time is what is measured. */
static void settle(long most_blocks) {
    for (long long end = test_ms() + LONG; alloc_blocks() > most_blocks; test_pause(1))
        if (test_ms() > end) test_fail(__FILE__, __LINE__, "%ld blocks are held, not %ld", alloc_blocks(), most_blocks);
}

static netchan *make(size_t capacity) {
    netchan *ch = netchan_make(capacity);
    CHECK(ch);
    return ch;
}

/* --- values in a queue -------------------------------------------------------------------------------------------- */

/* A queue by its two ends. */
typedef struct queue {
    netchan *in, *out;
    size_t depth;
} queue;

static void fill(const queue *q, size_t count) {
    for (size_t i = 0; i < count; i++) send_int(q->in, (int64_t)i);
}

static void empty(const queue *q, size_t count) {
    for (size_t i = 0; i < count; i++) recv_int(q->out);
}

static void fill_and_empty(void *arg, size_t count) {
    const queue *q = (const queue *)arg;
    for (size_t done = 0; done < count; done += q->depth) {
        fill(q, q->depth);
        empty(q, q->depth);
    }
}

/* As many stay in the queue as there are. */
static void in_and_out(void *arg, size_t count) {
    const queue *q = (const queue *)arg;
    for (size_t i = 0; i < count; i++) {
        send_int(q->in, (int64_t)i);
        recv_int(q->out);
    }
}

static size_t at_least(size_t count, size_t least) {
    return count > least ? count : least;
}

enum { LOCAL_VALUES = 50000 / LESS / FEWER, LINK_VALUES = 10000 / LESS / FEWER, END_VALUES = 500 / LESS };

/* Leaves the queue filled. */
static void queue_costs(queue *q, size_t depth, size_t values, double *ns) {
    q->depth = depth;
    ns[0] = cost_of_one(fill_and_empty, q, at_least(values / depth, 1) * depth);
    fill(q, depth);
    wait_for_len(q->out, depth);
    ns[1] = cost_of_one(in_and_out, q, values);
}

static void local_queue(size_t depth, double *ns) {
    queue q;
    q.in = q.out = make(CAPACITY);
    queue_costs(&q, depth, LOCAL_VALUES, ns);
    double start = cpu_ns();
    netchan_free(q.in);
    ns[2] = (cpu_ns() - start) / (double)depth;
    CHECK_INT(alloc_blocks(), 0);
}

static void test_queued_in_a_channel(void) {
    static const char *const columns[] = {"ns per value, filled and emptied", "as many stay", "freed with them", NULL};
    check_growth("queued", 1000, MOST_QUEUED, columns, local_queue);
}

static void link_queue(size_t depth, double *ns) {
    pair p = join(0, CAPACITY);
    queue q;
    q.in = p.d->send;
    q.out = p.l->recv;
    queue_costs(&q, depth, LINK_VALUES, ns);
    empty(&q, depth);
    part(&p);
}

static void test_queued_over_a_link(void) {
    static const char *const columns[] = {"ns per value, filled and emptied", "as many stay", NULL};
    check_growth("queued", 1000, MOST_QUEUED, columns, link_queue);
}

/* One side has a buffer, and does not wait for it to be emptied when it hangs up. */
static pair join_in_haste(size_t listen_buffer, size_t dial_buffer) {
    netchan_options o = options();
    pair p;
    o.buffer = listen_buffer;
    o.linger_ms = listen_buffer ? 1 : LONG;
    p.l = listen_with(&o);
    o.buffer = dial_buffer;
    o.linger_ms = dial_buffer ? 1 : LONG;
    p.d = dial_with(p.l->address, &o);
    return p;
}

static void hang_up_with(netchan_link *link, size_t undelivered) {
    netchan_report report;
    CHECK_INT(netchan_hangup(link, &report), undelivered ? NETCHAN_ETIMEDOUT : NETCHAN_OK);
    CHECK_INT(report.undelivered, undelivered);
}

/* A listener that hangs up gives back what nobody has received. */
static void handed_back(size_t depth, double *ns) {
    pair p = join_in_haste(0, CAPACITY);
    for (size_t i = 0; i < depth; i++) send_int(p.d->send, (int64_t)i);
    wait_for_len(p.l->recv, depth);
    double start = cpu_ns();
    hang_up_with(p.l, 0);
    hang_up_with(p.d, depth);
    ns[0] = (cpu_ns() - start) / (double)depth;
    CHECK_INT(alloc_blocks(), 0);
}

static void test_handed_back_at_the_end(void) {
    static const char *const columns[] = {"ns per value", NULL};
    check_growth("queued", 1000, MOST_QUEUED / 10, columns, handed_back);
}

typedef struct directed {
    queue q;
    netchan_link *link;
    netchan_peer peer;
} directed;

static void send_to(void *arg, size_t count) {
    const directed *d = (const directed *)arg;
    for (size_t i = 0; i < count; i++)
        CHECK_INT(netchan_sendto(d->link, d->peer, netchan_int(1), LONG), NETCHAN_OK);
}

static void send_to_and_empty(void *arg, size_t count) {
    const directed *d = (const directed *)arg;
    for (size_t i = 0; i < count; i++) {
        send_to(arg, 1);
        recv_int(d->q.out);
    }
}

static void queue_for_peers(size_t depth, double *ns) {
    pair p = join_in_haste(CAPACITY, 0);
    directed d;
    d.q.in = p.l->send;
    d.q.out = p.d->recv;
    d.link = p.l;
    d.peer.id = wait_peer(p.l, "up");
    fill(&d.q, depth);
    ns[0] = cost_of_one(in_and_out, &d.q, END_VALUES);
    send_to(&d, depth);
    ns[1] = cost_of_one(send_to_and_empty, &d, END_VALUES);
    hang_up_with(p.d, 0);
    hang_up_with(p.l, 2 * depth);
    CHECK_INT(alloc_blocks(), 0);
}

static void test_queued_for_peers(void) {
    static const char *const columns[] = {"ns per value, for any", "for one", NULL};
    check_growth("queued", 1000, MOST_QUEUED, columns, queue_for_peers);
}

static netchan *import(netchan_link *link, const char *name, enum netchan_type end) {
    netchan *ch;
    CHECK_INT(netchan_import(link, name, end, &ch, LONG), NETCHAN_OK);
    return ch;
}

static void exported_queue(size_t depth, double *ns) {
    pair p = join(0, 0);
    queue home, q;
    home.in = home.out = make(CAPACITY);
    fill(&home, depth);
    CHECK_INT(netchan_export(p.l, "in", home.in, NETCHAN_SENDER), NETCHAN_OK);
    CHECK_INT(netchan_export(p.l, "out", home.in, NETCHAN_RECEIVER), NETCHAN_OK);
    q.in = import(p.d, "in", NETCHAN_SENDER);
    q.out = import(p.d, "out", NETCHAN_RECEIVER);
    ns[0] = cost_of_one(in_and_out, &q, END_VALUES);
    netchan_free(q.in);
    netchan_free(q.out);
    hang_up(p.d);
    hang_up(p.l);
    netchan_free(home.in);
    CHECK_INT(alloc_blocks(), 0);
}

static void test_queued_in_an_exported_channel(void) {
    static const char *const columns[] = {"ns per value, in and out by two ends", NULL};
    check_growth("queued", 1000, MOST_QUEUED, columns, exported_queue);
}

/* --- large values ------------------------------------------------------------------------------------------------- */

enum { MOST_KIB = 10000 / LESS / FEWER, INTS_PER_KIB = 1024 / 4 };

typedef struct parcel {
    pair p;
    netchan_value v;
} parcel;

static void send_parcel(void *arg, size_t count) {
    const parcel *p = (const parcel *)arg;
    for (size_t i = 0; i < count; i++) {
        task t;
        netchan_value v;
        start_send(&t, p->p.d->send, p->v, LONG);
        CHECK_INT(netchan_recv(p->p.l->recv, &v, LONG), NETCHAN_OK);
        CHECK_INT(netchan_count(&v), netchan_count(&p->v));
        netchan_clear(&v);
        CHECK_INT(end_task(&t), NETCHAN_OK);
    }
}

static double parcel_cost(parcel *p, netchan_value v, size_t kib) {
    p->v = v;
    return cost_of_one(send_parcel, p, at_least(1000 / kib, 1)) / (double)kib;
}

static void large_values(size_t kib, double *ns) {
    parcel p;
    size_t count = kib * INTS_PER_KIB;
    uint8_t *bytes = noise(kib * 1024);
    netchan_value *items = (netchan_value *)malloc(count * sizeof *items);
    CHECK(items);
    for (size_t i = 0; i < count; i++) items[i] = netchan_int(1000000); /* 4 bytes each */
    p.p = join(0, 0);
    ns[0] = parcel_cost(&p, netchan_bytes(bytes, kib * 1024), kib);
    ns[1] = parcel_cost(&p, netchan_array(items, count), kib);
    free(items);
    free(bytes);
    part(&p.p);
}

static void test_kib_of_a_value(void) {
    static const char *const columns[] = {"ns per KiB, bytes", "ints in an array", NULL};
    check_growth("KiB", 100, MOST_KIB, columns, large_values);
}

/* --- peers -------------------------------------------------------------------------------------------------------- */

/* A listener and many diallers, all in this process. */
typedef struct crowd {
    netchan_options o;
    pair others; /* who have nothing to do with it; they were there before */
    netchan_link *l, **d;
    size_t count, busy;
    double made; /* what each of the last ones cost, in nanoseconds */
} crowd;

/* Both ends of a connection are here, so each takes two descriptors. Returns how many links there may be. */
static size_t allow_links(size_t wanted) {
    enum { OTHERS = 50 };
    struct rlimit limit;
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    size_t most = limit.rlim_cur > 2 * OTHERS ? ((size_t)limit.rlim_cur - OTHERS) / 2 : 1;
    return wanted < most ? wanted : most;
}

static void start_crowd(crowd *c, size_t most, int ping_ms) {
    memset(c, 0, sizeof *c);
    c->o = options();
    c->o.buffer = 16;
    c->o.no_redelivery = true; /* no values come early: a few peers are quicker then than many, whose turns are rare */
    c->o.ping_ms = ping_ms;
    c->others = join(0, 0);
    c->l = listen_with(&c->o);
    c->d = (netchan_link **)calloc(most, sizeof(netchan_link *));
    CHECK(c->d);
}

static void grow_crowd(crowd *c, size_t count) {
    double start = cpu_ns();
    size_t before = c->count;
    while (c->count < count) c->d[c->count++] = dial_with(c->l->address, &c->o);
    if (c->count > before) c->made = (cpu_ns() - start) / (double)(c->count - before);
}

static void end_crowd(crowd *c) {
    while (c->count) hang_up(c->d[--c->count]);
    hang_up(c->l);
    free(c->d);
    part(&c->others);
}

/* Values one by one from so many of them, in turn. */
static void hear_the_busy(void *arg, size_t count) {
    const crowd *c = (const crowd *)arg;
    for (size_t i = 0; i < count; i++) {
        send_int(c->d[i % c->busy]->send, (int64_t)i);
        recv_int(c->l->recv);
    }
}

/* Only they ask for values. */
static void serve_the_busy(void *arg, size_t count) {
    const crowd *c = (const crowd *)arg;
    for (size_t i = 0; i < count; i++) {
        send_int(c->l->send, (int64_t)i);
        recv_int(c->d[i % c->busy]->recv);
    }
}

/* As many values for each of them. */
static void broadcast(void *arg, size_t count) {
    const crowd *c = (const crowd *)arg;
    size_t reached;
    for (size_t i = 0; i < count / c->count; i++) {
        CHECK_INT(netchan_broadcast(c->l, netchan_int((int64_t)i), &reached, LONG), NETCHAN_OK);
        CHECK_INT(reached, c->count);
        for (size_t n = 0; n < c->count; n++) recv_int(c->d[n]->recv);
    }
}

static void *recv_until_nil(void *arg) {
    netchan_value v = netchan_int(0);
    while (!netchan_is_nil(&v)) CHECK_INT(netchan_recv((netchan *)arg, &v, NETCHAN_FOREVER), NETCHAN_OK);
    return NULL;
}

static void send_to_any(void *arg, size_t count) {
    const crowd *c = (const crowd *)arg;
    for (size_t i = 0; i < count; i++) send_int(c->l->send, (int64_t)i);
}

/* Each of them asks for a value, all the time. More threads there are not, though there may be more peers. */
static double all_wait(crowd *c, size_t values) {
    static pthread_t threads[MOST_THREADS];
    size_t count = c->count < MOST_THREADS ? c->count : MOST_THREADS;
    for (size_t i = 0; i < count; i++) threads[i] = test_start(recv_until_nil, c->d[i]->recv);
    send_to_any(c, 2 * count);
    double ns = cost_of_one(send_to_any, c, values);
    for (size_t i = 0; i < count; i++) CHECK_INT(netchan_send(c->l->send, netchan_nil(), LONG), NETCHAN_OK);
    for (size_t i = 0; i < count; i++) test_join(threads[i]);
    return ns;
}

static void exchange_elsewhere(void *arg, size_t count) {
    const crowd *c = (const crowd *)arg;
    for (size_t i = 0; i < count; i++) exchange(c->others.l->send, c->others.d->recv, (int64_t)i);
}

static crowd peers;

static void peer_costs(size_t count, double *ns) {
    enum { VALUES = 200 / LESS };
    crowd *c = &peers;
    grow_crowd(c, count);
    c->busy = 1;
    ns[0] = cost_of_one(hear_the_busy, c, VALUES);
    c->busy = count < 10 ? count : 10;
    ns[1] = cost_of_one(hear_the_busy, c, VALUES);
    ns[2] = cost_of_one(serve_the_busy, c, VALUES);
    ns[3] = cost_of_one(broadcast, c, at_least(VALUES / count, 1) * count);
    ns[4] = all_wait(c, VALUES);
    ns[5] = cost_of_one(exchange_elsewhere, c, VALUES);
    ns[6] = c->made;
}

/* NETCHAN_SCALE_PEERS is another number of them, for who has more time and descriptors. */
static size_t most_peers(void) {
    const char *text = getenv("NETCHAN_SCALE_PEERS");
    return allow_links(text ? (size_t)atol(text) : MOST_PEERS);
}

/* "To all in turn" is a round trip each to one that was idle: what others are idle costs it nothing (R4, R5). */
static void test_peers_that_are_idle(void) {
    static const char *const columns[] = {"ns per value, from one", "from ten",      "to ten",        "to all in turn",
                                          "to all that wait",       "to a stranger", "to make one", NULL};
    size_t most = most_peers();
    start_crowd(&peers, most, 600000);
    check_growth("peers", 10, most, columns, peer_costs);
    double start = cpu_ns(), made = peers.made;
    end_crowd(&peers);
    double hung_up = (cpu_ns() - start) / (double)most;
    printf("to hang one up: %.0f ns\n", hung_up);
    CHECK(hung_up < FACTOR * made);
}

/* --- channels on a link ------------------------------------------------------------------------------------------- */

enum { BUSY = 10, BUSY_VALUES = 300 / LESS };

/* Channels that were made at one side, and their ends at the other. */
typedef struct bundle {
    pair p;
    netchan **home, **ends;
    size_t count;
    bool receivers; /* what the ends are */
    way way;        /* in which they are sent */
} bundle;

static void start_bundle(bundle *b, size_t count, bool receivers, int direction) {
    b->p = join(16, 16);
    b->way = way_of(&b->p, direction);
    b->home = (netchan **)calloc(count, sizeof(netchan *));
    b->ends = (netchan **)calloc(count, sizeof(netchan *));
    CHECK(b->home && b->ends);
    b->count = count;
    b->receivers = receivers;
}

static void end_bundle(bundle *b) {
    part(&b->p);
    free(b->home);
    free(b->ends);
}

static void make_and_send(bundle *b) {
    for (size_t i = 0; i < b->count; i++) {
        netchan *ch = b->home[i] = make(1);
        netchan_value end = b->receivers ? netchan_receiver(ch) : netchan_sender(ch);
        CHECK_INT(netchan_send(b->way.send, end, LONG), NETCHAN_OK);
        b->ends[i] = recv_end(b->way.recv);
    }
}

static void release(bundle *b) {
    for (size_t i = 0; i < b->count; i++) {
        netchan_free(b->ends[i]);
        netchan_free(b->home[i]);
    }
}

static void use_a_few(void *arg, size_t count) {
    const bundle *b = (const bundle *)arg;
    size_t busy = b->count < BUSY ? b->count : BUSY;
    for (size_t i = 0; i < count; i++) {
        size_t n = i % busy * (b->count / busy);
        send_int(b->ends[n], (int64_t)i);
        recv_int(b->home[n]);
    }
}

static void channel_costs(size_t count, double *ns) {
    enum { TABLES = 20 }; /* blocks that both sides keep once they had channels; a channel and its end have several */
    bundle b;
    start_bundle(&b, count, false, 0);
    for (int run = 0; run < 2; run++) {
        long blocks = alloc_blocks();
        double start = cpu_ns();
        make_and_send(&b);
        double made = cpu_ns() - start;
        ns[1] = cost_of_one(use_a_few, &b, BUSY_VALUES);
        start = cpu_ns();
        release(&b);
        settle(blocks + TABLES);
        double cost = (made + cpu_ns() - start) / (double)count;
        if (run == 0 || cost < ns[0]) ns[0] = cost;
    }
    end_bundle(&b);
}

static void test_channels_on_a_link(void) {
    static const char *const columns[] = {"ns per channel, sent and freed", "ns per value, on ten", NULL};
    check_growth("channels", 100, MOST_CHANNELS, columns, channel_costs);
}

/* The listener passes the ends on to another dialler, and relays. */
static void pass_on(bundle *b, netchan_link *third) {
    for (size_t i = 0; i < b->count; i++) {
        netchan_value end = b->receivers ? netchan_receiver(b->ends[i]) : netchan_sender(b->ends[i]);
        CHECK_INT(netchan_send(b->p.l->send, end, LONG), NETCHAN_OK);
        netchan_free(b->ends[i]);
        b->ends[i] = recv_end(third->recv);
    }
}

static void relay_costs(size_t count, double *ns) {
    bundle b;
    netchan_options o = options();
    start_bundle(&b, count, false, 0);
    netchan_link *third = dial_with(b.p.l->address, &o);
    double start = cpu_ns();
    make_and_send(&b);
    pass_on(&b, third);
    ns[0] = cpu_ns() - start;
    ns[1] = cost_of_one(use_a_few, &b, BUSY_VALUES);
    start = cpu_ns();
    release(&b);
    hang_up(third);
    ns[0] = (ns[0] + cpu_ns() - start) / (double)count;
    end_bundle(&b);
}

static void test_relayed_channels(void) {
    static const char *const columns[] = {"ns per channel, passed on and freed", "ns per value, on ten", NULL};
    check_growth("channels", 100, MOST_CHANNELS, columns, relay_costs);
}

static void name_of(char name[32], size_t i) {
    snprintf(name, 32, "name %zu", i);
}

static void export_all(bundle *b) {
    char name[32];
    for (size_t i = 0; i < b->count; i++) {
        name_of(name, i);
        b->home[i] = make(1);
        CHECK_INT(netchan_export(b->p.d, name, b->home[i], NETCHAN_SENDER), NETCHAN_OK);
    }
}

static void import_all(bundle *b) {
    char name[32];
    for (size_t i = 0; i < b->count; i++) {
        name_of(name, i);
        b->ends[i] = import(b->p.l, name, NETCHAN_SENDER);
    }
}

static void unexport_all(bundle *b) {
    char name[32];
    for (size_t i = 0; i < b->count; i++) {
        name_of(name, i);
        CHECK_INT(netchan_unexport(b->p.d, name), NETCHAN_OK);
    }
}

static void name_costs(size_t count, double *ns) {
    bundle b;
    start_bundle(&b, count, false, 0);
    double start = cpu_ns();
    export_all(&b);
    ns[0] = cpu_ns() - start;
    start = cpu_ns();
    import_all(&b);
    ns[1] = (cpu_ns() - start) / (double)count;
    ns[2] = cost_of_one(use_a_few, &b, BUSY_VALUES);
    start = cpu_ns();
    unexport_all(&b);
    ns[0] = (ns[0] + cpu_ns() - start) / (double)count;
    release(&b);
    end_bundle(&b);
}

static void test_names_on_a_link(void) {
    static const char *const columns[] = {"ns to export and take back", "ns to import", "ns per value, on ten", NULL};
    check_growth("names", 100, MOST_CHANNELS, columns, name_costs);
}

/* A value with an end in it is counted, and looked after, for as long as nobody receives it. */
static void end_queue(size_t depth, double *ns) {
    pair p = join(0, MOST_CHANNELS + 1000);
    netchan *ch = make(0);
    double start = cpu_ns();
    for (size_t i = 0; i < depth; i++) CHECK_INT(netchan_send(p.d->send, netchan_sender(ch), LONG), NETCHAN_OK);
    for (size_t i = 0; i < depth; i++) netchan_free(recv_end(p.l->recv));
    ns[0] = (cpu_ns() - start) / (double)depth;
    netchan_free(ch);
    part(&p);
}

static void different_ends_queue(size_t depth, double *ns) {
    pair p = join(0, MOST_CHANNELS + 1000);
    double start = cpu_ns();
    for (size_t i = 0; i < depth; i++) {
        netchan *ch = make(0);
        CHECK_INT(netchan_send(p.d->send, netchan_sender(ch), LONG), NETCHAN_OK);
        netchan_free(ch);
    }
    for (size_t i = 0; i < depth; i++) netchan_free(recv_end(p.l->recv));
    ns[1] = (cpu_ns() - start) / (double)depth;
    part(&p);
}

static void queues_of_ends(size_t depth, double *ns) {
    end_queue(depth, ns);
    different_ends_queue(depth, ns);
}

static void test_queued_values_with_ends(void) {
    static const char *const columns[] = {"ns per value, one channel", "a channel in each", NULL};
    check_growth("queued", 100, MOST_CHANNELS, columns, queues_of_ends);
}

/* --- waiters ------------------------------------------------------------------------------------------------------ */

/* Threads that wait on one channel, again and again, until it is closed. */
typedef struct waiters {
    netchan *in, *out; /* what is sent into the one is received from the other */
    bool send;         /* they send, else they receive */
    size_t began;      /* atomic */
    pthread_t threads[MOST_THREADS];
} waiters;

static void *wait_again(void *arg) {
    waiters *w = (waiters *)arg;
    int result = NETCHAN_OK;
    __atomic_add_fetch(&w->began, 1, __ATOMIC_RELEASE);
    while (result == NETCHAN_OK) {
        if (w->send) result = netchan_send(w->in, netchan_int(1), NETCHAN_FOREVER);
        else result = netchan_recv(w->out, NULL, NETCHAN_FOREVER);
    }
    CHECK(result == NETCHAN_ECLOSED || result == NETCHAN_ELOST);
    return NULL;
}

static void serve_waiters(void *arg, size_t count) {
    const waiters *w = (const waiters *)arg;
    for (size_t i = 0; i < count; i++) {
        if (w->send) recv_int(w->out);
        else send_int(w->in, (int64_t)i);
    }
}

/* Before it is measured each of them was served twice, so that all wait. */
static double waiter_cost(waiters *w, size_t count) {
    enum { VALUES = 2000 / LESS };
    w->began = 0;
    for (size_t i = 0; i < count; i++) w->threads[i] = test_start(wait_again, w);
    while (__atomic_load_n(&w->began, __ATOMIC_ACQUIRE) < count) test_pause(1);
    serve_waiters(w, 2 * count);
    return cost_of_one(serve_waiters, w, VALUES);
}

static void join_waiters(waiters *w, size_t count) {
    for (size_t i = 0; i < count; i++) test_join(w->threads[i]);
}

static void local_waiters(size_t count, double *ns) {
    static waiters w;
    for (int send = 0; send < 2; send++) {
        w.in = w.out = make(0);
        w.send = send;
        ns[send] = waiter_cost(&w, count);
        netchan_close(w.in);
        join_waiters(&w, count);
        netchan_free(w.in);
    }
    CHECK_INT(alloc_blocks(), 0);
}

static void test_waiters_on_a_channel(void) {
    static const char *const columns[] = {"ns per value, to receivers", "from senders", NULL};
    check_growth("waiters", MOST_THREADS / 10, MOST_THREADS, columns, local_waiters);
}

/* Receivers wait on an end, or senders do, and the channel is at the other side of the link. */
static double end_waiters(size_t count, bool send) {
    static waiters w;
    pair p = join(0, 0);
    netchan *ch = make(0);
    enum netchan_type type = send ? NETCHAN_SENDER : NETCHAN_RECEIVER;
    CHECK_INT(netchan_export(p.l, "it", ch, type), NETCHAN_OK);
    netchan *end = import(p.d, "it", type);
    w.send = send;
    w.in = send ? end : ch;
    w.out = send ? ch : end;
    double ns = waiter_cost(&w, count);
    netchan_close(ch);
    join_waiters(&w, count);
    netchan_free(end);
    hang_up(p.d);
    hang_up(p.l);
    netchan_free(ch);
    CHECK_INT(alloc_blocks(), 0);
    return ns;
}

static void waiters_of_ends(size_t count, double *ns) {
    ns[0] = end_waiters(count, false);
    ns[1] = end_waiters(count, true);
}

static void test_waiters_on_an_end(void) {
    static const char *const columns[] = {"ns per value, to receivers", "from senders", NULL};
    check_growth("waiters", MOST_THREADS / 10, MOST_THREADS, columns, waiters_of_ends);
}

/* --- select ------------------------------------------------------------------------------------------------------- */

/* A select of many cases, of which the one that can happen is another one each time. */
typedef struct selection {
    netchan_case *cases;
    netchan **feeds; /* what is sent into one of them makes its case ready */
    netchan *turns;  /* tells the other thread which to feed */
    size_t count;
} selection;

static void start_selection(selection *s, size_t count) {
    s->count = count;
    s->cases = (netchan_case *)calloc(count, sizeof *s->cases);
    s->feeds = (netchan **)calloc(count, sizeof(netchan *));
    CHECK(s->cases && s->feeds);
}

static void free_selection(selection *s) {
    free(s->cases);
    free(s->feeds);
}

static void select_fed(const selection *s, size_t turn) {
    int chosen = netchan_select(s->cases, s->count, LONG);
    CHECK(chosen >= 0);
    CHECK_INT(s->cases[chosen].result, NETCHAN_OK);
    CHECK(s->cases[chosen].ch == s->cases[turn].ch);
}

static void select_ready(void *arg, size_t count) {
    const selection *s = (const selection *)arg;
    for (size_t i = 0; i < count; i++) {
        size_t turn = i * 7919 % s->count;
        send_int(s->feeds[turn], 1);
        select_fed(s, turn);
    }
}

static void *feed(void *arg) {
    const selection *s = (const selection *)arg;
    netchan_value v;
    while (netchan_recv(s->turns, &v, NETCHAN_FOREVER) == NETCHAN_OK)
        send_int(s->feeds[netchan_as_int(&v, 0)], 1);
    return NULL;
}

/* The other thread feeds it, mostly after it has begun to wait. */
static void select_waiting(void *arg, size_t count) {
    const selection *s = (const selection *)arg;
    for (size_t i = 0; i < count; i++) {
        size_t turn = i * 7919 % s->count;
        send_int(s->turns, (int64_t)turn);
        select_fed(s, turn);
    }
}

enum { SELECTED_CASES = 20000 / LESS }; /* in all selects of a run together */

/* For one case. */
static double selection_cost(selection *s, void (*run)(void *arg, size_t count), size_t cases) {
    return cost_of_one(run, s, at_least(cases / s->count, 10)) / (double)s->count;
}

static void local_selects(size_t count, double *ns) {
    selection s;
    start_selection(&s, count);
    for (size_t i = 0; i < count; i++) s.cases[i] = netchan_case_recv(s.feeds[i] = make(1), NULL);
    ns[0] = selection_cost(&s, select_ready, SELECTED_CASES);
    s.turns = make(0);
    pthread_t feeder = test_start(feed, &s);
    ns[1] = selection_cost(&s, select_waiting, SELECTED_CASES);
    netchan_close(s.turns);
    test_join(feeder);
    netchan_free(s.turns);
    for (size_t i = 0; i < count; i++) netchan_free(s.feeds[i]);

    netchan *one = make(1);
    for (size_t i = 0; i < count; i++) s.cases[i] = netchan_case_recv(s.feeds[i] = one, NULL);
    ns[2] = selection_cost(&s, select_ready, SELECTED_CASES);
    netchan_free(one);
    free_selection(&s);
    CHECK_INT(alloc_blocks(), 0);
}

static void test_cases_of_a_select(void) {
    static const char *const columns[] = {"ns per case, one is ready", "it waits", "the same channel", NULL};
    check_growth("cases", MOST_CASES / 10, MOST_CASES, columns, local_selects);
}

static void end_selects(size_t count, double *ns) {
    bundle b;
    selection s;
    start_bundle(&b, count, true, 0);
    start_selection(&s, count);
    make_and_send(&b);
    for (size_t i = 0; i < count; i++) {
        s.cases[i] = netchan_case_recv(b.ends[i], NULL);
        s.feeds[i] = b.home[i];
    }
    ns[0] = selection_cost(&s, select_ready, SELECTED_CASES / 4);
    release(&b);
    free_selection(&s);
    end_bundle(&b);
}

static void test_cases_on_ends(void) {
    static const char *const columns[] = {"ns per case, one is ready", NULL};
    check_growth("cases", 100 / LESS, 1000 / LESS, columns, end_selects);
}

/* --- what else waits ---------------------------------------------------------------------------------------------- */

/* A thread that waits on all ends of a bundle, but for the last, until something comes from the first. */
static void *wait_on_all(void *arg) {
    const bundle *b = (const bundle *)arg;
    selection s;
    start_selection(&s, b->count);
    for (size_t i = 0; i + 1 < b->count; i++) s.cases[i] = netchan_case_recv(b->ends[i], NULL);
    CHECK_INT(netchan_select(s.cases, b->count - 1, NETCHAN_FOREVER), 0);
    free_selection(&s);
    return NULL;
}

static pthread_t start_waiting(bundle *b) {
    pthread_t thread = test_start(wait_on_all, b);
    for (size_t i = 0; i + 1 < b->count; i++) wait_for_waiters(b->home[i], 1);
    return thread;
}

static void end_waiting(bundle *b, pthread_t thread) {
    send_int(b->home[0], 1);
    test_join(thread);
}

/* What the link and the last of the ends cost while the dialler waits on the others. */
static void beside_ends(size_t count, double *ns) {
    bundle b;
    start_bundle(&b, count + 1, true, 1);
    queue there = {b.p.d->send, b.p.l->recv, 0}, back = {b.p.l->send, b.p.d->recv, 0};
    directed one = {back, b.p.l, {wait_peer(b.p.l, "up")}};
    make_and_send(&b);
    queue last = {b.home[count], b.ends[count], 0};
    pthread_t thread = start_waiting(&b);
    ns[0] = cost_of_one(in_and_out, &there, BUSY_VALUES);
    ns[1] = cost_of_one(in_and_out, &back, BUSY_VALUES);
    ns[2] = cost_of_one(send_to_and_empty, &one, BUSY_VALUES);
    ns[3] = cost_of_one(in_and_out, &last, BUSY_VALUES);
    end_waiting(&b, thread);
    release(&b);
    end_bundle(&b);
}

static void test_waits_on_other_ends(void) {
    static const char *const columns[] = {"ns per value, there", "and back", "to one peer", "from an end", NULL};
    check_growth("waited on", 10, 1000 / LESS, columns, beside_ends);
}

/* The same where the ends, and the one that is in use, were passed on. */
static void beside_relays(size_t count, double *ns) {
    bundle b;
    netchan_options o = options();
    start_bundle(&b, count + 1, true, 0);
    netchan_link *third = dial_with(b.p.l->address, &o);
    make_and_send(&b);
    pass_on(&b, third);
    queue last = {b.home[count], b.ends[count], 0};
    pthread_t thread = start_waiting(&b);
    ns[0] = cost_of_one(in_and_out, &last, BUSY_VALUES);
    end_waiting(&b, thread);
    release(&b);
    hang_up(third);
    end_bundle(&b);
}

static void test_waits_on_other_relays(void) {
    static const char *const columns[] = {"ns per value, from an end", NULL};
    check_growth("waited on", 10, 1000 / LESS, columns, beside_relays);
}

/* --- links that are idle ------------------------------------------------------------------------------------------ */

/* How often this thread was put on a processor, as /proc tells; 0 when it does not. */
static long switches_of(const char *thread) {
    char path[64], line[256];
    long count, sum = 0;
    snprintf(path, sizeof path, "/proc/self/task/%.20s/status", thread);
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "voluntary_ctxt_switches: %ld", &count) == 1 ||
            sscanf(line, "nonvoluntary_ctxt_switches: %ld", &count) == 1)
            sum += count;
    if (f) fclose(f);
    return sum;
}

/* Of all threads. Negative: the system has no such count. */
static long context_switches(void) {
    long sum = 0;
    DIR *dir = opendir("/proc/self/task");
    if (!dir) return -1;
    for (struct dirent *e; (e = readdir(dir));)
        if (e->d_name[0] != '.') sum += switches_of(e->d_name);
    closedir(dir);
    return sum > 0 ? sum : -1;
}

#ifdef __SANITIZE_THREAD__
enum { WAKES = 20 + 30 }; /* ThreadSanitizer has a thread of its own, which wakes every 50 ms */
#else
enum { WAKES = 20 };
#endif

/* Wakes no more than so many times a second, and does nothing much then. */
static void check_idle(const crowd *c) {
    enum { SECONDS = 2, PERCENT = 10 };
    long before = context_switches();
    double start = cpu_ns();
    test_pause(SECONDS * 1000);
    double percent = (cpu_ns() - start) / (SECONDS * 1e9) * 100;
    long after = context_switches();
    printf("\n| idle links | wakes a second | %% of a processor |\n| %10zu | %14.1f | %16.2f |\n", c->count,
           (double)(after - before) / SECONDS, percent);
    if (before < 0) return;
    CHECK(after - before <= WAKES * SECONDS);
    CHECK(percent < PERCENT);
}

static void test_idle_links(void) {
    size_t count = allow_links(IDLE_LINKS);
    crowd c;
    start_crowd(&c, count, 600000);
    grow_crowd(&c, count);
    check_idle(&c);
    end_crowd(&c);
}

/* With the heartbeats that there are when nothing else is asked for. The first of them are due when it is measured. */
static void test_idle_links_with_heartbeats(void) {
    enum { DEFAULT_PING_MS = 5000 };
    size_t count = allow_links(IDLE_LINKS);
    crowd c;
    start_crowd(&c, count, 0);
    long long due = test_ms() + DEFAULT_PING_MS;
    grow_crowd(&c, count);
    long long left = due - test_ms();
    if (left > 0) test_pause((int)left);
    check_idle(&c);
    end_crowd(&c);
}

int main(int argc, char **argv) {
    static const test_entry tests[] = {
        TEST(queued_in_a_channel),
        TEST(queued_over_a_link),
        TEST(queued_for_peers),
        TEST(handed_back_at_the_end),
        TEST(queued_in_an_exported_channel),
        TEST(queued_values_with_ends),
        TEST(kib_of_a_value),
        TEST(peers_that_are_idle),
        TEST(channels_on_a_link),
        TEST(relayed_channels),
        TEST(names_on_a_link),
        TEST(waiters_on_a_channel),
        TEST(waiters_on_an_end),
        TEST(cases_of_a_select),
        TEST(cases_on_ends),
        TEST(waits_on_other_ends),
        TEST(waits_on_other_relays),
        TEST(idle_links),
        TEST(idle_links_with_heartbeats),
        TEST_END,
    };
    return test_main(argc, argv, tests);
}
