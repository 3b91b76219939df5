/* What the libraries of message sockets have in common: the measurements, over functions that each of them defines. Who
 * measures listens; the other side dials. Include this before any other header. */
#ifndef NETCHAN_BENCH_SOCKETS_H
#define NETCHAN_BENCH_SOCKETS_H

#include "bench.h"

enum { PEERS = 1000, PATIENCE_MS = 60000 /* nothing takes so long unless all is lost */ };

/* What a pair of sockets is for. */
typedef enum pattern {
    ONE_WAY, /* the dialler sends, the listener receives */
    DUPLEX,  /* each way between two */
    QUESTION /* many diallers ask, the one listener answers who asked */
} pattern;

/* ---- What each library defines. Any failure ends the process with a sentence. ---- */

typedef struct endpoint endpoint; /* a socket */

/* Makes the keys, before the fork. */
static void make_keys(void);
/* Listens on a free port of 127.0.0.1. */
static endpoint *listen_anywhere(pattern p, int *port);
static endpoint *dial(pattern p, int port);
static void send_bytes(endpoint *e, const void *bytes, size_t size);
/* Waits for a message and drops it. Returns its size. */
static size_t recv_bytes(endpoint *e);
/* Of who listens for questions: waits for one, and answers it. */
static void answer_one(endpoint *e);

/* ---- One way. ---- */

static size_t stream_size; /* of each message; set before the fork */

static void send_stream(bench_line line) {
    endpoint *e = dial(ONE_WAY, bench_hear(line));
    char *bytes = (char *)calloc(stream_size, 1);
    while (bytes) send_bytes(e, bytes, stream_size);
    bench_fail("no memory for a message");
}

static endpoint *start_and_listen(void (*side)(bench_line line), bench_line line, pattern p) {
    int port;
    bench_fork(side, line);
    endpoint *e = listen_anywhere(p, &port);
    bench_tell(line, port);
    return e;
}

/* Messages a second. */
static double stream_rate(size_t size) {
    stream_size = size;
    endpoint *e = start_and_listen(send_stream, bench_pipe(), ONE_WAY);
    bench_meter m = bench_meter_start(size > 65536 ? 1 : 64);
    do {
        if (recv_bytes(e) != size) bench_fail("a message came with another size");
    } while (bench_meter_add(&m, 1));
    return bench_meter_rate(&m);
}

static void stream64(void) { bench_finish(stream_rate(64)); }
static void stream1k(void) { bench_finish(stream_rate(1024)); }
static void bulk1m(void) { bench_finish(stream_rate(1 << 20) * (1 << 20) / 1e6); }

/* ---- There and back. ---- */

enum { RTT_SIZE = 64 };

static int echo_processor;

static void echo(bench_line line) {
    char bytes[RTT_SIZE] = {0};
    bench_pin(echo_processor);
    for (endpoint *e = dial(DUPLEX, bench_hear(line));; recv_bytes(e)) send_bytes(e, bytes, sizeof bytes);
}

static void there_and_back(void *arg) {
    endpoint *e = (endpoint *)arg;
    char bytes[RTT_SIZE] = {0};
    send_bytes(e, bytes, sizeof bytes);
    if (recv_bytes(e) != sizeof bytes) bench_fail("a message came back with another size");
}

static void round_trip(int other_processor) {
    bench_line line = bench_pipe();
    int port;
    echo_processor = other_processor;
    bench_fork(echo, line);
    bench_pin(0);
    endpoint *e = listen_anywhere(DUPLEX, &port);
    bench_tell(line, port);
    recv_bytes(e); /* the other side is there */
    bench_finish(bench_median(there_and_back, e));
}

static void rtt64_1core(void) { round_trip(0); }
static void rtt64_2core(void) { round_trip(1); }

/* ---- Peers that are idle. ---- */

static int peer_count;

static endpoint *dial_and_ask(int port) {
    endpoint *e = dial(QUESTION, port);
    send_bytes(e, "?", 1);
    return e;
}

/* Each asks once, which shows that it is there, and is idle then. The first is alone until it has its answer. */
static void dial_peers(bench_line line) {
    int port = bench_hear(line);
    endpoint **peers = (endpoint **)calloc((size_t)peer_count, sizeof *peers);
    if (!peers) bench_fail("no memory for %d peers", peer_count);
    recv_bytes(dial_and_ask(port));
    bench_hear(line);
    for (int i = 0; i < peer_count; i++) peers[i] = dial_and_ask(port);
    for (int i = 0; i < peer_count; i++) recv_bytes(peers[i]);
}

/* KiB of the listening side for each. The first is not counted: much is made with it that the others share. */
static void peers_idle_bytes(void) {
    peer_count = bench_peers(PEERS);
    bench_line line = bench_pipe();
    endpoint *e = start_and_listen(dial_peers, line, QUESTION);
    answer_one(e);
    double before = bench_resident();
    bench_tell(line, 0);
    for (int i = 0; i < peer_count; i++) answer_one(e);
    bench_finish((bench_resident_idle() - before) / peer_count);
}

static const bench_entry entries[] = {
    {"stream64", stream64},       {"stream1k", stream1k},       {"bulk1m", bulk1m},
    {"rtt64_1core", rtt64_1core}, {"rtt64_2core", rtt64_2core}, {"peers_idle_bytes", peers_idle_bytes},
    {NULL, NULL},
};

int main(int argc, char **argv) {
    make_keys();
    return bench_main(argc, argv, entries);
}

#endif
