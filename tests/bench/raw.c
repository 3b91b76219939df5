/* The baseline: mbedTLS alone, with blocking sockets and mbedTLS's own callbacks, as its examples have it; and of what
 * a message protocol needs only what none can do without, a length before each value and a copy of the value for who
 * receives it. Trust, cipher and group are those of netchan.h: an external PSK of 32 bytes with X25519 (psk_dhe_ke),
 * and ChaCha20-Poly1305. */
#include "bench.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <mbedtls/error.h>
#include <mbedtls/net_sockets.h>
#include <mbedtls/psa_util.h>
#include <mbedtls/ssl.h>
#include <psa/crypto.h>

enum {
    RECORD = MBEDTLS_SSL_OUT_CONTENT_LEN, /* bytes of a full record */
    SMALL = 64,
    MIDDLE = 1024,
    LARGE = 1 << 20,
    PAIRS = 2,    /* of processes that have handshakes */
    STORM = 1000, /* handshakes after all links broke */
    IDLE = 1000,
    BUSY = 10, /* connections that send */
    BUSY_AMONG = 10000, /* connections that are idle */
    CLIENTS = 50,
    WINDOW = 4 /* records under way to a client and back: they fit into the sockets' buffers, so writing never blocks */
};

typedef struct conn {
    mbedtls_net_context net;
    mbedtls_ssl_context ssl;
} conn;

static uint8_t secret[BENCH_SECRET];
static const char identity[] = "shared_key:0123456789abcdef"; /* as long as netchan.h's */
static mbedtls_ssl_config conf;
static bool each; /* value has a record of its own */
static size_t value_size;
static int cpu_here = -1, cpu_there = -1; /* -1: any */

static void check(int e, const char *what) {
    char text[128];
    if (e >= 0) return;
    mbedtls_strerror(e, text, sizeof text);
    bench_fail("%s: %s", what, text);
}

/* ---- Connections. ---- */

/* role: MBEDTLS_SSL_IS_CLIENT or MBEDTLS_SSL_IS_SERVER. */
static void configure(int role) {
    static const int suites[] = {MBEDTLS_TLS1_3_CHACHA20_POLY1305_SHA256, 0};
    static const uint16_t groups[] = {MBEDTLS_SSL_IANA_TLS_GROUP_X25519, MBEDTLS_SSL_IANA_TLS_GROUP_NONE};
    if (psa_crypto_init() != PSA_SUCCESS) bench_fail("psa_crypto_init failed");
    mbedtls_ssl_config_init(&conf);
    check(mbedtls_ssl_config_defaults(&conf, role, MBEDTLS_SSL_TRANSPORT_STREAM, MBEDTLS_SSL_PRESET_DEFAULT),
          "mbedtls_ssl_config_defaults");
    mbedtls_ssl_conf_min_tls_version(&conf, MBEDTLS_SSL_VERSION_TLS1_3);
    mbedtls_ssl_conf_max_tls_version(&conf, MBEDTLS_SSL_VERSION_TLS1_3);
    mbedtls_ssl_conf_tls13_key_exchange_modes(&conf, MBEDTLS_SSL_TLS1_3_KEY_EXCHANGE_MODE_PSK_EPHEMERAL);
    mbedtls_ssl_conf_ciphersuites(&conf, suites);
    mbedtls_ssl_conf_groups(&conf, groups);
    mbedtls_ssl_conf_rng(&conf, mbedtls_psa_get_random, MBEDTLS_PSA_RANDOM_STATE);
#if defined(MBEDTLS_SSL_SESSION_TICKETS)
    if (role == MBEDTLS_SSL_IS_CLIENT)
        mbedtls_ssl_conf_session_tickets(&conf, MBEDTLS_SSL_SESSION_TICKETS_DISABLED);
#endif
    check(mbedtls_ssl_conf_psk(&conf, secret, sizeof secret, (const unsigned char *)identity, strlen(identity)),
          "mbedtls_ssl_conf_psk");
}

static struct sockaddr_in local_address(int port) {
    struct sockaddr_in a;
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    a.sin_port = htons((uint16_t)port);
    return a;
}

static int listen_fd(int *port) {
    struct sockaddr_in a = local_address(0);
    socklen_t size = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, SOMAXCONN) ||
        getsockname(fd, (struct sockaddr *)&a, &size))
        bench_fail("listening: %s", strerror(errno));
    *port = ntohs(a.sin_port);
    return fd;
}

static int accept_fd(int listening) {
    int fd = accept(listening, NULL, NULL);
    if (fd < 0) bench_fail("accept: %s", strerror(errno));
    return fd;
}

static int dial_fd(int port) {
    struct sockaddr_in a = local_address(port);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a)) bench_fail("connecting: %s", strerror(errno));
    return fd;
}

static void conn_start(conn *c, int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    c->net.fd = fd;
    mbedtls_ssl_init(&c->ssl);
    check(mbedtls_ssl_setup(&c->ssl, &conf), "mbedtls_ssl_setup");
    mbedtls_ssl_set_bio(&c->ssl, &c->net, mbedtls_net_send, mbedtls_net_recv, NULL);
    check(mbedtls_ssl_handshake(&c->ssl), "the handshake");
}

static void send_all(conn *c, const uint8_t *data, size_t size) {
    for (size_t done = 0; done < size;) {
        int n = mbedtls_ssl_write(&c->ssl, data + done, size - done);
        check(n, "mbedtls_ssl_write");
        done += (size_t)n;
    }
}

static size_t recv_some(conn *c, uint8_t *data, size_t size) {
    int n = mbedtls_ssl_read(&c->ssl, data, size);
    check(n, "mbedtls_ssl_read");
    if (n == 0) bench_fail("the connection was closed");
    return (size_t)n;
}

static void recv_all(conn *c, uint8_t *data, size_t size) {
    for (size_t done = 0; done < size;) done += recv_some(c, data + done, size - done);
}

/* The one connection of most figures. */
static void start_listening(conn *c, bench_line line) {
    int port, listening = listen_fd(&port);
    configure(MBEDTLS_SSL_IS_SERVER);
    bench_tell(line, port);
    conn_start(c, accept_fd(listening));
}

static void start_dialling(conn *c, bench_line line) {
    configure(MBEDTLS_SSL_IS_CLIENT);
    conn_start(c, dial_fd(bench_hear(line)));
}

/* ---- Streams of small values, each after its length in two bytes. ---- */

static size_t put_value(uint8_t *out, const uint8_t *value) {
    out[0] = (uint8_t)value_size, out[1] = (uint8_t)(value_size >> 8);
    memcpy(out + 2, value, value_size);
    return 2 + value_size;
}

static void stream_out(bench_line line) {
    static uint8_t record[RECORD], value[MIDDLE];
    conn c;
    start_dialling(&c, line);
    size_t count = each ? 1 : RECORD / (2 + value_size);
    for (uint64_t n = 0;;) {
        size_t used = 0;
        for (size_t i = 0; i < count; i++, n++) {
            memcpy(value, &n, sizeof n);
            used += put_value(record + used, value);
        }
        send_all(&c, record, used);
    }
}

/* Hands out the whole values that are in data. Returns the bytes they take. */
static size_t take_values(const uint8_t *data, size_t have, uint64_t *count) {
    static uint8_t value[MIDDLE];
    size_t used = 0;
    while (have - used >= 2) {
        size_t size = data[used] | (size_t)data[used + 1] << 8;
        if (size != value_size) bench_fail("a value has %zu bytes", size);
        if (have - used < 2 + size) break;
        memcpy(value, data + used + 2, size);
        __asm__ volatile("" : : "r"(value) : "memory"); /* somebody looks at it */
        used += 2 + size;
        ++*count;
    }
    return used;
}

static void stream(size_t size, bool one_in_a_record) {
    static uint8_t data[2 * RECORD];
    bench_line line = bench_pipe();
    conn c;
    size_t have = 0;
    value_size = size, each = one_in_a_record;
    bench_secret(secret);
    bench_fork(stream_out, line);
    start_listening(&c, line);
    bench_meter m = bench_meter_start(each ? 64 : 1);
    for (bool more = true; more;) {
        uint64_t count = 0;
        have += recv_some(&c, data + have, RECORD);
        size_t used = take_values(data, have, &count);
        have -= used;
        memmove(data, data + used, have);
        more = bench_meter_add(&m, count);
    }
    bench_finish(bench_meter_rate(&m));
}

static void stream64(void) { stream(SMALL, false); }
static void stream64_each(void) { stream(SMALL, true); }
static void stream1k(void) { stream(MIDDLE, false); }

/* ---- A stream of large values, each after its length in four bytes. ---- */

static void bulk_out(bench_line line) {
    static uint8_t message[4 + LARGE];
    const uint32_t size = LARGE;
    conn c;
    start_dialling(&c, line);
    memcpy(message, &size, sizeof size);
    for (;;) send_all(&c, message, sizeof message);
}

static void bulk1m(void) {
    bench_line line = bench_pipe();
    conn c;
    bench_secret(secret);
    bench_fork(bulk_out, line);
    start_listening(&c, line);
    bench_meter m = bench_meter_start(1);
    for (bool more = true; more;) {
        uint32_t size;
        recv_all(&c, (uint8_t *)&size, sizeof size);
        if (size != LARGE) bench_fail("a value has %u bytes", (unsigned)size);
        uint8_t *value = malloc(size);
        if (!value) bench_fail("out of memory");
        recv_all(&c, value, size);
        more = bench_meter_add(&m, size);
        free(value);
    }
    bench_finish(bench_meter_rate(&m) / 1e6);
}

/* ---- Round trips. ---- */

static void echo(bench_line line) {
    uint8_t value[SMALL];
    conn c;
    if (cpu_there >= 0) bench_pin(cpu_there);
    start_listening(&c, line);
    for (;;) {
        recv_all(&c, value, sizeof value);
        send_all(&c, value, sizeof value);
    }
}

static void one_round_trip(void *arg) {
    static uint8_t value[SMALL];
    conn *c = arg;
    send_all(c, value, sizeof value);
    recv_all(c, value, sizeof value);
}

static void rtt64(int here, int there) {
    bench_line line = bench_pipe();
    conn c;
    cpu_here = here, cpu_there = there;
    bench_secret(secret);
    bench_fork(echo, line);
    bench_pin(cpu_here);
    start_dialling(&c, line);
    bench_finish(bench_median(one_round_trip, &c));
}

static void rtt64_1core(void) { rtt64(0, 0); }
static void rtt64_2core(void) { rtt64(0, 1); }

/* ---- Handshakes: pairs of processes, each of which has one after the other, keep two processors busy. They are no
 * threads as this mbedTLS may be one without MBEDTLS_THREADING_C, which would have them wait for each other. ---- */

static int shared_listening, shared_port;
static uint64_t *handshakes_done; /* in memory that all processes share; atomic */

/* One connection from its handshake to its end; the client is the first to say farewell. */
static void greet_and_leave(int fd, bool client) {
    uint8_t byte;
    conn c;
    conn_start(&c, fd);
    if (client) check(mbedtls_ssl_close_notify(&c.ssl), "mbedtls_ssl_close_notify");
    int n = mbedtls_ssl_read(&c.ssl, &byte, 1);
    if (n > 0) bench_fail("something came in place of a farewell");
    if (n != MBEDTLS_ERR_SSL_PEER_CLOSE_NOTIFY) check(n, "waiting for the farewell");
    if (!client) check(mbedtls_ssl_close_notify(&c.ssl), "mbedtls_ssl_close_notify");
    mbedtls_ssl_free(&c.ssl);
    close(fd);
}

static void accept_for_ever(bench_line line) {
    (void)line;
    configure(MBEDTLS_SSL_IS_SERVER);
    for (;;) greet_and_leave(accept_fd(shared_listening), false);
}

static void dial_for_ever(bench_line line) {
    (void)line;
    configure(MBEDTLS_SSL_IS_CLIENT);
    for (;;) {
        greet_and_leave(dial_fd(shared_port), true);
        __atomic_add_fetch(handshakes_done, 1, __ATOMIC_RELAXED);
    }
}

static void start_handshakes(void) {
    bench_line line = bench_pipe();
    bench_secret(secret);
    shared_listening = listen_fd(&shared_port);
    handshakes_done = mmap(NULL, sizeof *handshakes_done, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (handshakes_done == MAP_FAILED) bench_fail("mmap: %s", strerror(errno));
    for (int i = 0; i < PAIRS; i++) {
        bench_fork(accept_for_ever, line);
        bench_fork(dial_for_ever, line);
    }
}

static void handshakes(void) {
    start_handshakes();
    bench_finish(bench_rate_of(handshakes_done));
}

static void reconnect_storm(void) {
    uint64_t count = (uint64_t)bench_env("BENCH_STORM", STORM), start = bench_now();
    start_handshakes();
    while (__atomic_load_n(handshakes_done, __ATOMIC_RELAXED) < count) usleep(200);
    bench_finish((double)(bench_now() - start) / 1e6);
}

/* ---- Idle connections. ---- */

static conn *make_conns(int count) {
    conn *all = calloc((size_t)count, sizeof *all);
    if (!all) bench_fail("out of memory");
    return all;
}

static int idle_count;

static void dial_idle(bench_line line) {
    conn *all = make_conns(idle_count);
    configure(MBEDTLS_SSL_IS_CLIENT);
    int port = bench_hear(line);
    for (int i = 0; i < idle_count; i++) conn_start(&all[i], dial_fd(port));
}

static void peers_idle_bytes(void) {
    bench_line line = bench_pipe();
    idle_count = bench_peers(IDLE);
    bench_secret(secret);
    bench_fork(dial_idle, line);
    int port, listening = listen_fd(&port);
    configure(MBEDTLS_SSL_IS_SERVER);
    double before = bench_resident();
    conn *all = make_conns(idle_count);
    bench_tell(line, port);
    for (int i = 0; i < idle_count; i++) conn_start(&all[i], accept_fd(listening));
    bench_finish((bench_resident_idle() - before) / idle_count);
}

/* ---- Ten connections that send small values in full records, among many that are idle. ---- */

static void dial_busy(bench_line line) {
    static conn all[BUSY];
    static uint8_t record[RECORD], value[MIDDLE];
    configure(MBEDTLS_SSL_IS_CLIENT);
    int port = bench_hear(line);
    for (int i = 0; i < BUSY; i++) conn_start(&all[i], dial_fd(port));
    for (uint64_t n = 0;; n++) {
        size_t used = 0;
        while (used + 2 + value_size <= sizeof record) used += put_value(record + used, value);
        send_all(&all[n % BUSY], record, used);
    }
}

/* Connections that dial here, and are watched from then on. */
static void accept_and_watch(int watcher, int listening, conn *all, int count) {
    for (int i = 0; i < count; i++) {
        struct epoll_event e;
        memset(&e, 0, sizeof e);
        e.events = EPOLLIN;
        e.data.ptr = &all[i];
        conn_start(&all[i], accept_fd(listening));
        if (epoll_ctl(watcher, EPOLL_CTL_ADD, all[i].net.fd, &e)) bench_fail("epoll_ctl: %s", strerror(errno));
    }
}

/* Returns how many values were in the records, one from each connection that has some. */
static uint64_t recv_records(int watcher) {
    static uint8_t record[RECORD];
    struct epoll_event ready[BUSY];
    uint64_t count = 0;
    int n = epoll_wait(watcher, ready, BUSY, -1);
    if (n < 0 && errno != EINTR) bench_fail("epoll_wait: %s", strerror(errno));
    for (int i = 0; i < n; i++) {
        size_t size = recv_some((conn *)ready[i].data.ptr, record, sizeof record);
        if (take_values(record, size, &count) != size) bench_fail("a record ends within a value");
    }
    return count;
}

static void peers_10k_stream64(void) {
    bench_line idle_line = bench_pipe(), busy_line = bench_pipe();
    int port, listening = listen_fd(&port), watcher = epoll_create1(0);
    idle_count = bench_peers(BUSY_AMONG);
    value_size = SMALL;
    bench_secret(secret);
    bench_fork(dial_idle, idle_line);
    bench_fork(dial_busy, busy_line);
    configure(MBEDTLS_SSL_IS_SERVER);
    conn *idle = make_conns(idle_count), *busy = make_conns(BUSY);
    bench_tell(idle_line, port);
    accept_and_watch(watcher, listening, idle, idle_count);
    bench_tell(busy_line, port);
    accept_and_watch(watcher, listening, busy, BUSY);
    bench_meter m = bench_meter_start(1);
    while (bench_meter_add(&m, recv_records(watcher))) {}
    bench_finish(bench_meter_rate(&m));
}

/* ---- A cluster: numbers of 8 bytes go to each client in full records, and come back. ---- */

enum { NUMBERS = RECORD / 8 };

/* Waits until some connections have something to read. */
static void wait_for_any(struct pollfd *polls) {
    if (poll(polls, CLIENTS, -1) < 0 && errno != EINTR) bench_fail("poll: %s", strerror(errno));
}

static void watch(struct pollfd *polls, const conn *all) {
    for (int i = 0; i < CLIENTS; i++) polls[i].fd = all[i].net.fd, polls[i].events = POLLIN;
}

/* A record of numbers that come back as they are, one by one. */
static void echo_numbers(conn *c) {
    uint8_t in[RECORD], out[RECORD];
    int64_t number;
    recv_all(c, in, sizeof in);
    for (size_t i = 0; i < NUMBERS; i++) {
        memcpy(&number, in + 8 * i, 8);
        memcpy(out + 8 * i, &number, 8);
    }
    send_all(c, out, sizeof out);
}

static void cluster_clients(bench_line line) {
    static conn all[CLIENTS];
    struct pollfd polls[CLIENTS];
    configure(MBEDTLS_SSL_IS_CLIENT);
    int port = bench_hear(line);
    for (int i = 0; i < CLIENTS; i++) conn_start(&all[i], dial_fd(port));
    watch(polls, all);
    for (;;) {
        wait_for_any(polls);
        for (int i = 0; i < CLIENTS; i++)
            if (polls[i].revents) echo_numbers(&all[i]);
    }
}

static void send_numbers(conn *c) {
    static int64_t next;
    uint8_t out[RECORD];
    for (size_t i = 0; i < NUMBERS; i++, next++) memcpy(out + 8 * i, &next, 8);
    send_all(c, out, sizeof out);
}

static void recv_numbers(conn *c) {
    uint8_t in[RECORD];
    int64_t number, last = -1;
    recv_all(c, in, sizeof in);
    for (size_t i = 0; i < NUMBERS; i++) {
        memcpy(&number, in + 8 * i, 8);
        if (i && number != last + 1) bench_fail("%lld came after %lld", (long long)number, (long long)last);
        last = number;
    }
}

static void cluster50(void) {
    static conn all[CLIENTS];
    struct pollfd polls[CLIENTS];
    bench_line line = bench_pipe();
    bench_secret(secret);
    bench_fork(cluster_clients, line);
    int port, listening = listen_fd(&port);
    configure(MBEDTLS_SSL_IS_SERVER);
    bench_tell(line, port);
    for (int i = 0; i < CLIENTS; i++) conn_start(&all[i], accept_fd(listening));
    for (int i = 0; i < CLIENTS * WINDOW; i++) send_numbers(&all[i % CLIENTS]);
    watch(polls, all);
    bench_meter m = bench_meter_start(1);
    for (uint64_t count = 0; bench_meter_add(&m, count);) {
        wait_for_any(polls);
        count = 0;
        for (int i = 0; i < CLIENTS; i++) {
            if (!polls[i].revents) continue;
            recv_numbers(&all[i]);
            send_numbers(&all[i]);
            count += NUMBERS;
        }
    }
    bench_finish(bench_meter_rate(&m));
}

int main(int argc, char **argv) {
    static const bench_entry table[] = {
        {"stream64", stream64}, {"stream64_each", stream64_each}, {"stream1k", stream1k}, {"bulk1m", bulk1m},
        {"rtt64_1core", rtt64_1core}, {"rtt64_2core", rtt64_2core}, {"handshakes", handshakes},
        {"reconnect_storm", reconnect_storm}, {"peers_idle_bytes", peers_idle_bytes},
        {"peers_10k_stream64", peers_10k_stream64}, {"cluster50", cluster50}, {NULL, NULL}};
    return bench_main(argc, argv, table);
}
