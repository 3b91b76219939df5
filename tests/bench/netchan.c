/* The figures of netchan.h, by its public functions alone. What each one measures stands at its section; the names that
 * raw.c, local.c and others have too mean the same work there. */
#include "bench.h"

#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

enum {
    BUFFER = 1024,
    STREAM_BUFFER = 4096, /* of small values: 256 KiB of them, which is what a socket's buffers hold */
    LARGE_BUFFER = 16, /* values of 1 MiB under way: as many as small ones would be memory measured, not a link */
    SMALL = 64,
    MIDDLE = 1024,
    LARGE = 1 << 20,
    DIALS = 64,    /* threads that open links; see NETCHAN__PRESSURE for what a listener thinks of many more */
    BUSY = 10,     /* peers that send */
    IDLE = 10000,
    STORM = 1000,  /* links that break at once */
    CLIENTS = 50
};

static char key[2 * BENCH_SECRET + 1];
static size_t value_size, buffer;
static int cpu_there;

static void check(int result, const char *what) {
    if (result != NETCHAN_OK) bench_fail("%s: %s: %s", what, netchan_strerror(result), netchan_errmsg());
}

/* ---- Links. ---- */

static void make_key(void) {
    uint8_t secret[BENCH_SECRET];
    bench_secret(secret);
    for (size_t i = 0; i < sizeof secret; i++) snprintf(key + 2 * i, 3, "%02x", secret[i]);
}

/* connect_ms: here a dial that takes long is a bad figure, and not a failure. */
static netchan_options options(void) {
    netchan_options o = {.shared_key = key, .buffer = buffer, .max_peers = 20000, .connect_ms = 60000};
    return o;
}

static int port_of(const char *address) { return atoi(strrchr(address, ':') + 1); }

static netchan_link *start_listening(void) {
    netchan_options o = options();
    netchan_link *link = netchan_listen("127.0.0.1:0", &o);
    if (!link) bench_fail("%s", netchan_errmsg());
    return link;
}

static netchan_link *listen_and_tell(bench_line line) {
    netchan_link *link = start_listening();
    bench_tell(line, port_of(link->address));
    return link;
}

static netchan_link *dial(int port) {
    char address[32];
    netchan_options o = options();
    snprintf(address, sizeof address, "127.0.0.1:%d", port);
    netchan_link *link = netchan_dial(address, &o);
    if (!link) bench_fail("%s", netchan_errmsg());
    return link;
}

static size_t peers_of(netchan_link *link) {
    netchan_stats stats;
    check(netchan_get_stats(link, &stats), "netchan_get_stats");
    return stats.peers;
}

static void wait_for_peers(netchan_link *link, size_t count) {
    while (peers_of(link) < count) usleep(1000);
}

/* Threads that run for ever. */
static void start_threads(int count, void *(*run)(void *), void *arg) {
    pthread_t thread;
    for (int i = 0; i < count; i++)
        if (pthread_create(&thread, NULL, run, arg)) bench_fail("cannot start a thread");
}

/* ---- Streams: a dialler sends byte strings, the listener receives and counts them. ---- */

static void send_for_ever(netchan_link *link) {
    uint8_t *value = calloc(1, value_size);
    if (!value) bench_fail("out of memory");
    for (uint64_t n = 0;; n++) {
        memcpy(value, &n, sizeof n);
        check(netchan_send(link->send, netchan_bytes(value, value_size), NETCHAN_FOREVER), "sending");
    }
}

static void recv_one(netchan_link *link) {
    netchan_value v;
    size_t size;
    check(netchan_recv(link->recv, &v, NETCHAN_FOREVER), "receiving");
    if (!netchan_as_block(&v, NETCHAN_BYTES, &size) || size != value_size) bench_fail("another value has arrived");
    netchan_clear(&v);
}

/* Values a second. every: see bench_meter_start(). */
static double recv_rate(netchan_link *link, unsigned every) {
    bench_meter m = bench_meter_start(every);
    for (bool more = true; more; more = bench_meter_add(&m, 1)) recv_one(link);
    return bench_meter_rate(&m);
}

static void stream_out(bench_line line) { send_for_ever(dial(bench_hear(line))); }

static double stream(size_t size, size_t capacity, unsigned every) {
    bench_line line = bench_pipe();
    value_size = size, buffer = capacity;
    make_key();
    bench_fork(stream_out, line);
    return recv_rate(listen_and_tell(line), every);
}

static void stream64(void) { bench_finish(stream(SMALL, STREAM_BUFFER, 64)); }
static void stream1k(void) { bench_finish(stream(MIDDLE, BUFFER, 64)); }
static void bulk1m(void) { bench_finish(stream(LARGE, LARGE_BUFFER, 1) * LARGE / 1e6); }

/* ---- Round trips, and rendezvous: the dialler measures. ---- */

static void echo(bench_line line) {
    netchan_value v;
    bench_pin(cpu_there);
    netchan_link *link = listen_and_tell(line);
    for (;;) {
        check(netchan_recv(link->recv, &v, NETCHAN_FOREVER), "receiving");
        check(netchan_send(link->send, v, NETCHAN_FOREVER), "sending");
        netchan_clear(&v);
    }
}

static void sink(bench_line line) {
    bench_pin(cpu_there);
    netchan_link *link = listen_and_tell(line);
    for (;;) recv_one(link);
}

static void send_one(void *arg) {
    static const uint8_t value[SMALL];
    netchan_link *link = arg;
    check(netchan_send(link->send, netchan_bytes(value, sizeof value), NETCHAN_FOREVER), "sending");
}

static void one_round_trip(void *arg) {
    send_one(arg);
    recv_one(arg);
}

/* This process on the first processor, the other side on the processor `there`. */
static void measure_trips(void (*side)(bench_line), void (*operation)(void *), int there) {
    bench_line line = bench_pipe();
    value_size = SMALL, cpu_there = there;
    make_key();
    bench_fork(side, line);
    bench_pin(0);
    bench_finish(bench_median(operation, dial(bench_hear(line))));
}

static void rtt64(int there) {
    buffer = BUFFER;
    measure_trips(echo, one_round_trip, there);
}

static void rtt64_1core(void) { rtt64(0); }
static void rtt64_2core(void) { rtt64(1); }
static void rendezvous64_1core(void) { measure_trips(sink, send_one, 0); }
static void rendezvous64_2core(void) { measure_trips(sink, send_one, 1); }

/* ---- Channels within the process. ---- */

static netchan *channels[2];

static void make_channels(size_t count, size_t capacity) {
    for (size_t i = 0; i < count; i++)
        if (!(channels[i] = netchan_make(capacity))) bench_fail("%s", netchan_errmsg());
}

static void *send_numbers(void *channel) {
    for (int64_t n = 0;; n++) check(netchan_send(channel, netchan_int(n), NETCHAN_FOREVER), "sending");
    return NULL;
}

static void local_channel(size_t capacity) {
    netchan_value v;
    make_channels(1, capacity);
    start_threads(1, send_numbers, channels[0]);
    bench_meter m = bench_meter_start(64);
    for (bool more = true; more; more = bench_meter_add(&m, 1)) {
        check(netchan_recv(channels[0], &v, NETCHAN_FOREVER), "receiving");
        netchan_clear(&v);
    }
    bench_finish(bench_meter_rate(&m));
}

static void local_buffered(void) { local_channel(BUFFER); }
static void local_rendezvous(void) { local_channel(0); }

/* Two threads send, each into a channel of its own; one selects between receiving from either. */
static void local_select(void) {
    netchan_value v;
    make_channels(2, BUFFER);
    for (int i = 0; i < 2; i++) start_threads(1, send_numbers, channels[i]);
    bench_meter m = bench_meter_start(64);
    for (bool more = true; more; more = bench_meter_add(&m, 1)) {
        netchan_case c[] = {netchan_case_recv(channels[0], &v), netchan_case_recv(channels[1], &v)};
        int i = netchan_select(c, 2, NETCHAN_FOREVER);
        check(i < 0 ? i : c[i].result, "selecting");
        netchan_clear(&v);
    }
    bench_finish(bench_meter_rate(&m));
}

/* ---- Many links of one process. ---- */

static int links_port, links_wanted, links_begun, links_made;
static netchan_link **links;

/* One of DIALS threads that share this work. */
static void *dial_some(void *arg) {
    for (int i; (i = __atomic_fetch_add(&links_begun, 1, __ATOMIC_RELAXED)) < links_wanted;) {
        links[i] = dial(links_port);
        __atomic_add_fetch(&links_made, 1, __ATOMIC_RELEASE);
    }
    return arg;
}

static void dial_all(int port) {
    links = calloc((size_t)links_wanted, sizeof *links);
    if (!links) bench_fail("out of memory");
    links_port = port;
    start_threads(DIALS, dial_some, NULL);
    while (__atomic_load_n(&links_made, __ATOMIC_ACQUIRE) < links_wanted) usleep(1000);
}

static void dial_idle(bench_line line) { dial_all(bench_hear(line)); }

static void peers_idle_bytes(void) {
    bench_line line = bench_pipe();
    buffer = BUFFER;
    links_wanted = bench_peers(IDLE);
    make_key();
    bench_fork(dial_idle, line);
    netchan_link *link = start_listening();
    double before = bench_resident();
    bench_tell(line, port_of(link->address));
    wait_for_peers(link, (size_t)links_wanted);
    bench_finish((bench_resident_idle() - before) / links_wanted);
}

/* ---- Ten peers that send, among many that are idle: these are in a process of their own, so that the ten are served
 * by the same dialling process with them as without. ---- */

static void *dial_and_send(void *port) {
    send_for_ever(dial(*(int *)port));
    return NULL;
}

static void dial_busy(bench_line line) {
    int port = bench_hear(line);
    start_threads(BUSY, dial_and_send, &port);
    for (;;) pause();
}

static void busy_among(int idle) {
    bench_line idle_line = bench_pipe(), busy_line = bench_pipe();
    value_size = SMALL, buffer = BUFFER;
    links_wanted = idle;
    make_key();
    if (idle) bench_fork(dial_idle, idle_line);
    bench_fork(dial_busy, busy_line);
    netchan_link *link = start_listening();
    bench_tell(idle_line, port_of(link->address));
    wait_for_peers(link, (size_t)idle);
    bench_tell(busy_line, port_of(link->address));
    wait_for_peers(link, (size_t)idle + BUSY);
    bench_finish(recv_rate(link, 64));
}

static void peers_10k_stream64(void) { busy_among(bench_peers(IDLE)); }
static void peers_10_stream64(void) { busy_among(0); }

/* ---- New links: from the dial, which returns when both sides have proved who they are, to the hangup's end. ---- */

static void listen_for_ever(bench_line line) { listen_and_tell(line); }

static uint64_t handshakes_done;

static void *dial_and_hang_up(void *port) {
    for (;;) {
        netchan_hangup(dial(*(int *)port), NULL);
        __atomic_add_fetch(&handshakes_done, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void handshakes(void) {
    bench_line line = bench_pipe();
    make_key();
    bench_fork(listen_for_ever, line);
    int port = bench_hear(line);
    start_threads((int)bench_env("BENCH_DIALS", DIALS), dial_and_hang_up, &port);
    bench_finish(bench_rate_of(&handshakes_done));
}

/* ---- All links break at once, and come back. ---- */

static void wait_for_event(netchan_link *link, const char *name) {
    for (bool found = false; !found;) {
        netchan_value event;
        check(netchan_recv(link->events, &event, NETCHAN_FOREVER), "waiting for an event");
        const char *what = netchan_as_str(netchan_get(&event, "event"), "");
        if (strcmp(what, "lost") == 0)
            bench_fail("a session was lost: %s", netchan_as_str(netchan_get(&event, "reason"), ""));
        found = strcmp(what, name) == 0;
        netchan_clear(&event);
    }
}

static bool leads_to(int fd, int port) {
    struct sockaddr_in a;
    socklen_t size = sizeof a;
    return getpeername(fd, (struct sockaddr *)&a, &size) == 0 && a.sin_family == AF_INET && ntohs(a.sin_port) == port;
}

/* Shuts all connections to the port down. Returns how many. */
static int cut_all(int port) {
    int most = (int)sysconf(_SC_OPEN_MAX), count = 0;
    for (int fd = 3; fd < most; fd++)
        if (leads_to(fd, port) && shutdown(fd, SHUT_RDWR) == 0) count++;
    return count;
}

static void reconnect_storm(void) {
    bench_line line = bench_pipe();
    buffer = BUFFER;
    links_wanted = bench_connections((int)bench_env("BENCH_STORM", STORM));
    make_key();
    bench_fork(listen_for_ever, line);
    dial_all(bench_hear(line));
    for (int i = 0; i < links_wanted; i++) wait_for_event(links[i], "up");
    uint64_t start = bench_now();
    int count = cut_all(links_port);
    if (count != links_wanted) bench_fail("%d of %d links were cut", count, links_wanted);
    for (int i = 0; i < links_wanted; i++) wait_for_event(links[i], "resumed");
    bench_finish((double)(bench_now() - start) / 1e6);
}

/* ---- A cluster: a listener's work queue goes to fifty clients, each of which sends back what it gets. ---- */

static void *client(void *port) {
    netchan_link *link = dial(*(int *)port);
    for (;;) {
        netchan_value v;
        check(netchan_recv(link->recv, &v, NETCHAN_FOREVER), "a client's receiving");
        check(netchan_send(link->send, v, NETCHAN_FOREVER), "a client's sending");
        netchan_clear(&v);
    }
    return NULL;
}

static void cluster_clients(bench_line line) {
    int port = bench_hear(line);
    start_threads(CLIENTS, client, &port);
    for (;;) pause();
}

static void cluster50(void) {
    bench_line line = bench_pipe();
    buffer = BUFFER;
    make_key();
    bench_fork(cluster_clients, line);
    netchan_link *link = listen_and_tell(line);
    wait_for_peers(link, CLIENTS);
    start_threads(1, send_numbers, link->send);
    bench_meter m = bench_meter_start(64);
    for (bool more = true; more; more = bench_meter_add(&m, 1))
        check(netchan_recv(link->recv, NULL, NETCHAN_FOREVER), "receiving");
    bench_finish(bench_meter_rate(&m));
}

int main(int argc, char **argv) {
    static const bench_entry table[] = {
        {"stream64", stream64}, {"stream1k", stream1k}, {"bulk1m", bulk1m}, {"rtt64_1core", rtt64_1core},
        {"rtt64_2core", rtt64_2core}, {"rendezvous64_1core", rendezvous64_1core},
        {"rendezvous64_2core", rendezvous64_2core}, {"local_buffered", local_buffered},
        {"local_rendezvous", local_rendezvous}, {"local_select", local_select},
        {"peers_idle_bytes", peers_idle_bytes}, {"peers_10k_stream64", peers_10k_stream64},
        {"peers_10_stream64", peers_10_stream64}, {"handshakes", handshakes}, {"reconnect_storm", reconnect_storm},
        {"cluster50", cluster50}, {NULL, NULL}};
    return bench_main(argc, argv, table);
}
