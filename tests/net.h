/* Links over TLS on loopback, and what can happen to them: processes that die, a proxy that cuts. Include it after
 * netchan.h with its implementation, alloc.h, test.h and task.h. */
#ifndef NETCHAN_TEST_NET_H
#define NETCHAN_TEST_NET_H

#include <mbedtls/pem.h>
#include <poll.h>
#include <sched.h>

#if defined(__SANITIZE_THREAD__)
enum { LESS = 10 }; /* so many times less of what a test does thousands of times */
#elif defined(__SANITIZE_ADDRESS__)
enum { LESS = 5 };
#else
enum { LESS = 1 };
#endif

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { FEWER = 20 }; /* likewise, of what a test does a million times */
#else
enum { FEWER = 1 };
#endif

enum {
    LONG = 20000, /* ms: a wait that a right implementation ends much sooner; it fails the test instead of hanging it */
    SHORT = 30    /* ms: time for something wrong to happen */
};

static const char KEY[] = "8f1c6d0b53a94e7720c1b7fd4a6e985f3d20e1b4c75a69887716253f4e0dac9b";

/* --- helpers ------------------------------------------------------------------------------------------------------ */

static inline netchan_options options(void) {
    netchan_options o;
    memset(&o, 0, sizeof o);
    o.shared_key = KEY;
    o.connect_ms = o.linger_ms = LONG;
    return o;
}

static inline netchan_link *listen_with(const netchan_options *o) {
    netchan_link *l = netchan_listen("127.0.0.1:0", o);
    if (!l) test_fail(__FILE__, __LINE__, "%s", netchan_errmsg());
    return l;
}

static inline netchan_link *dial_with(const char *address, const netchan_options *o) {
    netchan_link *d = netchan_dial(address, o);
    if (!d) test_fail(__FILE__, __LINE__, "%s", netchan_errmsg());
    return d;
}

static inline void hang_up(netchan_link *link) {
    netchan_report report = {99, 99, 99};
    CHECK_INT(netchan_hangup(link, &report), NETCHAN_OK);
    CHECK_INT(report.undelivered, 0);
    CHECK_INT(report.unknown, 0);
}

/* Who somebody is: a certificate and its key as PEM text, and the fingerprint. */
typedef struct identity {
    char cert[2048], key[2048], pin[NETCHAN_FINGERPRINT_SIZE];
} identity;

static inline void make_identity(identity *id) {
    mbedtls_x509_crt cert;
    mbedtls_pk_context key;
    size_t size;
    mbedtls_x509_crt_init(&cert);
    mbedtls_pk_init(&key);
    CHECK_INT(psa_crypto_init(), PSA_SUCCESS);
    CHECK_INT(netchan__make_cert(&key, &cert), 0);
    int e = mbedtls_pem_write_buffer("-----BEGIN CERTIFICATE-----\n", "-----END CERTIFICATE-----\n", cert.raw.p,
                                     cert.raw.len, (unsigned char *)id->cert, sizeof id->cert, &size);
    CHECK_INT(e, 0);
    CHECK_INT(mbedtls_pk_write_key_pem(&key, (unsigned char *)id->key, sizeof id->key), 0);
    CHECK_INT(netchan_fingerprint(id->cert, id->pin, sizeof id->pin), NETCHAN_OK);
    mbedtls_x509_crt_free(&cert);
    mbedtls_pk_free(&key);
}

/* One listener and one dialler. */
typedef struct pair {
    netchan_link *l, *d;
} pair;

static inline pair join(size_t listen_buffer, size_t dial_buffer) {
    netchan_options o = options();
    pair p;
    o.buffer = listen_buffer;
    p.l = listen_with(&o);
    o.buffer = dial_buffer;
    p.d = dial_with(p.l->address, &o);
    return p;
}

static inline void part(pair *p) {
    hang_up(p->d);
    hang_up(p->l);
    CHECK_INT(alloc_blocks(), 0);
}

/* The sentence has the word in it. */
static inline void check_says(const char *sentence, const char *word) {
    if (!strstr(sentence, word)) test_fail(__FILE__, __LINE__, "no \"%s\" in \"%s\"", word, sentence);
}

static inline void check_fails(const netchan_link *link, const char *word) {
    CHECK(!link);
    check_says(netchan_errmsg(), word);
}

static inline void send_int(netchan *ch, int64_t n) {
    CHECK_INT(netchan_send(ch, netchan_int(n), LONG), NETCHAN_OK);
}

static inline int64_t recv_int(netchan *ch) {
    netchan_value v;
    CHECK_INT(netchan_recv(ch, &v, LONG), NETCHAN_OK);
    CHECK_INT(v.type, NETCHAN_INT);
    return netchan_as_int(&v, 0);
}

static void *run_task(void *arg) {
    task *t = (task *)arg;
    netchan_case *c = t->cases ? t->cases : &t->one;
    t->one = t->is_send ? netchan_case_send(t->ch, t->value) : netchan_case_recv(t->ch, &t->value);
    t->result = netchan_select(c, t->cases ? t->count : 1, t->timeout_ms);
    if (!t->cases && t->result >= 0) t->result = t->one.result;
    __atomic_store_n(&t->done, true, __ATOMIC_RELEASE);
    return NULL;
}

/* How many operations wait on a channel of a link. With wait_for_waiters() and wait_until_shipped() the only places
 * that look inside: nothing public tells that another thread or process is blocked. */
static inline size_t waiters_of(netchan *ch) {
    size_t found = 0;
    pthread_mutex_lock(&netchan__net_lock);
    for (netchan__waiter *w = ch->receivers.head; w; w = w->next) found++;
    for (netchan__waiter *w = ch->lane.senders.head; w; w = w->next) found++;
    for (netchan__lane *lane = ch->is_merge ? ch->lanes : NULL; lane; lane = lane->next)
        for (netchan__waiter *w = lane->senders.head; w; w = w->next) found++;
    pthread_mutex_unlock(&netchan__net_lock);
    return found;
}

static inline void wait_for_waiters(netchan *ch, size_t count) {
    for (long long end = test_ms() + LONG; waiters_of(ch) != count; sched_yield()) CHECK(test_ms() < end);
}

/* Waits until everything that this process has to say was given to the sockets. */
static inline void wait_until_shipped(void) {
    for (bool idle = false; !idle; sched_yield()) {
        idle = true;
        pthread_mutex_lock(&netchan__net_lock);
        for (netchan__peer *p = netchan__net.peers; p; p = p->next_peer) {
            const netchan__session *s = netchan__session_of(p);
            idle = idle && s->wire && netchan__wire_idle(s->wire);
        }
        pthread_mutex_unlock(&netchan__net_lock);
    }
}

static inline void wait_for_len(netchan *ch, size_t count) {
    for (long long end = test_ms() + LONG; netchan_len(ch) != count; sched_yield()) CHECK(test_ms() < end);
}

/* --- events ------------------------------------------------------------------------------------------------------- */

static const char *text_of(const netchan_value *event, const char *key) {
    return netchan_as_str(netchan_get(event, key), "");
}

static inline bool is_event(const netchan_value *event, const char *name) {
    return strcmp(text_of(event, "event"), name) == 0;
}

/* The next event of this name; those before it are dropped. */
static inline netchan_value wait_event(netchan_link *link, const char *name) {
    for (;;) {
        netchan_value v;
        CHECK_INT(netchan_recv(link->events, &v, LONG), NETCHAN_OK);
        if (is_event(&v, name)) return v;
        netchan_clear(&v);
    }
}

static inline uint64_t wait_peer(netchan_link *link, const char *name) {
    netchan_value v = wait_event(link, name);
    uint64_t peer = netchan_as_uint(netchan_get(&v, "peer"), 0);
    CHECK(peer > 0);
    netchan_clear(&v);
    return peer;
}

static inline void wait_reason(netchan_link *link, const char *name, const char *word) {
    netchan_value v = wait_event(link, name);
    check_says(text_of(&v, "reason"), word);
    CHECK(strlen(text_of(&v, "address")) > 0);
    netchan_clear(&v);
}

/* Takes what there is, and none of it may be an event of this name. */
static inline void check_no_event(netchan_link *link, const char *name) {
    for (netchan_value v; netchan_recv(link->events, &v, NETCHAN_NOWAIT) == NETCHAN_OK; netchan_clear(&v))
        CHECK(!is_event(&v, name));
}

/* --- child processes ---------------------------------------------------------------------------------------------- */

/* A process that was forked before this one had a link. Lines go to it and come from it. */
typedef struct child {
    pid_t pid;
    int to, from;
} child;

static inline child start_child(void (*run)(int in, int out)) {
    int to[2], from[2];
    child c;
    CHECK(pipe(to) == 0 && pipe(from) == 0);
    fflush(stdout);
    c.pid = fork();
    CHECK(c.pid >= 0);
    if (c.pid == 0) {
        alarm(120); /* it must not outlive a test that failed */
        run(to[0], from[1]);
        _exit(0);
    }
    close(to[0]);
    close(from[1]);
    c.to = to[1];
    c.from = from[0];
    return c;
}

static inline void write_line(int fd, const char *text) {
    char line[128];
    int size = snprintf(line, sizeof line, "%s\n", text);
    CHECK_INT(write(fd, line, (size_t)size), size);
}

/* Returns false at the end of the pipe. */
static inline bool read_line(int fd, char *text, size_t size) {
    size_t n = 0;
    while (n + 1 < size && read(fd, &text[n], 1) == 1) {
        if (text[n] == '\n') {
            text[n] = '\0';
            return true;
        }
        n++;
    }
    return false;
}

static inline void close_child(child *c) {
    close(c->to);
    close(c->from);
}

static inline void kill_child(child *c) {
    CHECK_INT(kill(c->pid, SIGKILL), 0);
    CHECK_INT(waitpid(c->pid, NULL, 0), c->pid);
    close_child(c);
}

static inline void end_child(child *c) {
    int status = -1;
    CHECK_INT(waitpid(c->pid, &status, 0), c->pid);
    CHECK_INT(status, 0);
    close_child(c);
}

/* --- addresses ---------------------------------------------------------------------------------------------------- */

static inline struct sockaddr_in loopback(uint16_t port) {
    struct sockaddr_in a;
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    a.sin_port = htons(port);
    return a;
}

/* A port on which nobody listens, nor can as long as the socket is open. */
static inline int hold_port(uint16_t *port) {
    struct sockaddr_in a = loopback(0);
    socklen_t size = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&a, sizeof a) == 0 &&
          getsockname(fd, (struct sockaddr *)&a, &size) == 0);
    *port = ntohs(a.sin_port);
    return fd;
}

/* A port on which nobody listens now. */
static inline uint16_t free_port(void) {
    uint16_t port;
    close(hold_port(&port));
    return port;
}

/* --- a proxy that can do what networks do ------------------------------------------------------------------------- */

enum { PROXY_CONNS = 64, PROXY_ROOM = 8192, FROM_DIALLER = 1, FROM_LISTENER = 2 };

typedef struct proxy {
    int listener, wake[2];
    uint16_t target;
    char address[32];
    uint32_t source; /* atomic: the address from which it connects; 0: any */
    bool silent;     /* atomic: keep the connections, forward nothing, accept nobody */
    bool obeys;      /* atomic: silent as its thread last saw it */
    int freeze;      /* atomic: the connections that there are never forward these directions again; then it is 0 */
    bool cut;        /* atomic: all connections are cut; then it is false */
    bool stop;       /* atomic */
    long budget;     /* atomic: bytes that are forwarded until all connections are cut; negative: no end */
    long every;      /* atomic: then the next budget is random, this on an average; 0: there is none */
    uint64_t seed;   /* the thread's own */
    unsigned cuts;   /* atomic: how often that happened */
    pthread_t thread;
    struct proxy_conn { /* the thread's own */
        int fd[2];      /* to the dialler, to the listener */
        int frozen;     /* directions */
        uint8_t data[2][PROXY_ROOM]; /* read from fd[i] */
        size_t begin[2], end[2];
    } conns[PROXY_CONNS];
    size_t count;
} proxy;

static inline uint16_t port_of(const char *address) {
    return (uint16_t)atoi(strrchr(address, ':') + 1);
}

static inline void proxy_close(proxy *p, size_t i) {
    close(p->conns[i].fd[0]);
    close(p->conns[i].fd[1]);
    p->conns[i] = p->conns[--p->count];
}

/* Anywhere, but seldom in the first half, where the handshake is: after that who dials takes its time. */
static inline long proxy_next_budget(proxy *p) {
    long every = __atomic_load_n(&p->every, __ATOMIC_ACQUIRE);
    if (!every) return -1;
    bool early = test_random(&p->seed) % 32 == 0;
    return (early ? 0 : every / 2) + (long)(test_random(&p->seed) % (uint64_t)every);
}

static inline void proxy_cut_all(proxy *p) {
    __atomic_store_n(&p->budget, proxy_next_budget(p), __ATOMIC_RELEASE);
    while (p->count) proxy_close(p, p->count - 1);
    __atomic_add_fetch(&p->cuts, 1u, __ATOMIC_RELEASE);
}

/* Connects to the target. Returns the socket, or -1. */
static inline int proxy_connect(proxy *p) {
    struct sockaddr_in a = loopback(p->target), from = loopback(0);
    uint32_t source = __atomic_load_n(&p->source, __ATOMIC_ACQUIRE);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    from.sin_addr.s_addr = htonl(source);
    if (fd >= 0 && source) CHECK_INT(bind(fd, (struct sockaddr *)&from, sizeof from), 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&a, sizeof a) == 0) return fd;
    if (fd >= 0) close(fd);
    return -1;
}

static inline void proxy_accept(proxy *p) {
    int fd = accept(p->listener, NULL, NULL), on = 1;
    if (fd < 0) return;
    int other = p->count < PROXY_CONNS ? proxy_connect(p) : -1;
    if (other < 0) {
        close(fd);
        return;
    }
    struct proxy_conn *c = &p->conns[p->count++];
    memset(c, 0, sizeof *c);
    c->fd[0] = fd;
    c->fd[1] = other;
    for (int i = 0; i < 2; i++) {
        setsockopt(c->fd[i], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        CHECK(netchan__prepare_fd(c->fd[i]));
    }
}

/* Moves bytes that came from fd[from]. Returns false when the connection is over. */
static inline bool proxy_move(proxy *p, struct proxy_conn *c, int from, short events) {
    if (c->begin[from] == c->end[from] && events) {
        ssize_t n = recv(c->fd[from], c->data[from], PROXY_ROOM, 0);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK)) return false;
        c->begin[from] = 0;
        c->end[from] = n > 0 ? (size_t)n : 0;
    }
    size_t size = c->end[from] - c->begin[from];
    long budget = __atomic_load_n(&p->budget, __ATOMIC_ACQUIRE);
    bool cut = budget >= 0 && size > 0 && (size_t)budget <= size;
    if (cut) size = (size_t)budget;
    ssize_t n = size ? send(c->fd[1 - from], c->data[from] + c->begin[from], size, MSG_NOSIGNAL) : 0;
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK) return false;
    if (n > 0) c->begin[from] += (size_t)n;
    if (cut) proxy_cut_all(p);
    else if (budget >= 0 && n > 0) /* unless there is a new one */
        __atomic_compare_exchange_n(&p->budget, &budget, budget - n, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
    return true;
}

/* Does what it was told. Returns whether it is silent. */
static inline bool proxy_obey(proxy *p) {
    bool silent = __atomic_load_n(&p->silent, __ATOMIC_ACQUIRE);
    int freeze = __atomic_load_n(&p->freeze, __ATOMIC_ACQUIRE);
    __atomic_store_n(&p->obeys, silent, __ATOMIC_RELEASE);
    for (size_t i = 0; i < p->count; i++) p->conns[i].frozen |= freeze;
    if (freeze) __atomic_store_n(&p->freeze, 0, __ATOMIC_RELEASE);
    if (__atomic_load_n(&p->cut, __ATOMIC_ACQUIRE)) {
        proxy_cut_all(p);
        __atomic_store_n(&p->cut, false, __ATOMIC_RELEASE);
    }
    return silent;
}

static inline void proxy_poll(proxy *p, struct pollfd *polls, size_t count) {
    for (size_t i = 0; i < 2 * count; i++) {
        struct proxy_conn *c = &p->conns[i / 2];
        int from = (int)(i % 2);
        bool frozen = c->frozen & 1 << from, other = c->frozen & 1 << (1 - from);
        if (!frozen && c->begin[from] == c->end[from]) polls[i].events |= POLLIN;
        if (!other && c->begin[1 - from] != c->end[1 - from]) polls[i].events |= POLLOUT;
        polls[i].fd = polls[i].events ? c->fd[from] : -1; /* not even its end is news of who is frozen */
    }
}

static inline void proxy_move_all(proxy *p, const struct pollfd *polls, size_t count) {
    const short in = POLLIN | POLLERR | POLLHUP;
    for (size_t i = count; i-- > 0;) { /* the last takes the place of one that is closed */
        if (i >= p->count) continue;   /* all were cut */
        struct proxy_conn *c = &p->conns[i];
        bool alive = true;
        if (!(c->frozen & FROM_DIALLER)) alive = proxy_move(p, c, 0, (short)(polls[2 * i].revents & in));
        if (p->count <= i) continue;
        if (alive && !(c->frozen & FROM_LISTENER)) alive = proxy_move(p, c, 1, (short)(polls[2 * i + 1].revents & in));
        if (!alive && p->count > i) proxy_close(p, i);
    }
}

static inline void *proxy_main(void *arg) {
    proxy *p = (proxy *)arg;
    while (!__atomic_load_n(&p->stop, __ATOMIC_ACQUIRE)) {
        struct pollfd polls[2 + 2 * PROXY_CONNS];
        bool silent = proxy_obey(p);
        size_t count = silent ? 0 : p->count;
        memset(polls, 0, sizeof polls);
        polls[0].fd = p->wake[0];
        polls[1].fd = silent ? -1 : p->listener;
        polls[0].events = polls[1].events = POLLIN;
        proxy_poll(p, polls + 2, count);
        poll(polls, (nfds_t)(2 + 2 * count), -1);
        char bytes[64];
        if (polls[0].revents && read(p->wake[0], bytes, sizeof bytes) < 0) break;
        if (polls[1].revents) proxy_accept(p);
        proxy_move_all(p, polls + 2, count);
    }
    while (p->count) proxy_close(p, p->count - 1);
    return NULL;
}

static inline void proxy_start_at(proxy *p, const char *target, uint16_t port) {
    struct sockaddr_in a = loopback(port);
    socklen_t size = sizeof a;
    int on = 1;
    memset(p, 0, sizeof *p);
    p->budget = -1;
    p->seed = 1;
    p->target = port_of(target);
    p->listener = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(p->listener >= 0);
    setsockopt(p->listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    CHECK(bind(p->listener, (struct sockaddr *)&a, sizeof a) == 0 && listen(p->listener, 16) == 0);
    CHECK(getsockname(p->listener, (struct sockaddr *)&a, &size) == 0 && netchan__prepare_fd(p->listener) &&
          pipe(p->wake) == 0);
    snprintf(p->address, sizeof p->address, "127.0.0.1:%d", ntohs(a.sin_port));
    p->thread = test_start(proxy_main, p);
}

static inline void proxy_start(proxy *p, const char *target) {
    proxy_start_at(p, target, 0);
}

static inline void proxy_wake(proxy *p) {
    CHECK_INT(write(p->wake[1], "", 1), 1);
}

static inline void proxy_set_silent(proxy *p, bool silent) {
    __atomic_store_n(&p->silent, silent, __ATOMIC_RELEASE);
    proxy_wake(p);
    while (__atomic_load_n(&p->obeys, __ATOMIC_ACQUIRE) != silent) sched_yield();
}

/* The connections that there are hang from now on, in one direction or both. */
static inline void proxy_freeze(proxy *p, int directions) {
    __atomic_store_n(&p->freeze, directions, __ATOMIC_RELEASE);
    proxy_wake(p);
    while (__atomic_load_n(&p->freeze, __ATOMIC_ACQUIRE)) sched_yield();
}

static inline void proxy_cut(proxy *p) {
    __atomic_store_n(&p->cut, true, __ATOMIC_RELEASE);
    proxy_wake(p);
    while (__atomic_load_n(&p->cut, __ATOMIC_ACQUIRE)) sched_yield();
}

static inline void proxy_cut_after(proxy *p, long bytes) {
    __atomic_store_n(&p->budget, bytes, __ATOMIC_RELEASE);
}

static inline unsigned proxy_cuts(proxy *p) {
    return __atomic_load_n(&p->cuts, __ATOMIC_ACQUIRE);
}

/* Again and again, after as many bytes as chance will have it. 0: no more. */
static inline void proxy_cut_every(proxy *p, long bytes) {
    __atomic_store_n(&p->every, bytes, __ATOMIC_RELEASE);
    __atomic_store_n(&p->budget, bytes ? bytes : -1, __ATOMIC_RELEASE);
}

/* No connection is left, and none can be made. */
static inline void proxy_break(proxy *p) {
    proxy_set_silent(p, true);
    proxy_cut(p);
}

static inline void proxy_mend(proxy *p) {
    proxy_set_silent(p, false);
}

static inline void proxy_stop(proxy *p) {
    __atomic_store_n(&p->stop, true, __ATOMIC_RELEASE);
    proxy_wake(p);
    test_join(p->thread);
    close(p->listener);
    close(p->wake[0]);
    close(p->wake[1]);
}

/* A listener and a dialler with a proxy between them. */
typedef struct shaky {
    netchan_link *l, *d;
    proxy p;
} shaky;

static inline void shaky_join(shaky *s, const netchan_options *listen, const netchan_options *dial) {
    s->l = listen_with(listen);
    proxy_start(&s->p, s->l->address);
    s->d = dial_with(s->p.address, dial);
}

/* Waits until no session is left. */
static inline void wait_for_no_peers(netchan_link *link) {
    netchan_stats stats;
    for (long long end = test_ms() + LONG; netchan_get_stats(link, &stats) == NETCHAN_OK && stats.peers; sched_yield())
        CHECK(test_ms() < end);
}

static inline void shaky_part(shaky *s) {
    proxy_cut_after(&s->p, -1);
    hang_up(s->d);
    wait_for_no_peers(s->l); /* the last acknowledgement is under way still */
    proxy_stop(&s->p);
    hang_up(s->l);
    CHECK_INT(alloc_blocks(), 0);
}

/* --- values that travel ------------------------------------------------------------------------------------------- */

static inline void exchange(netchan *send, netchan *recv, int64_t n) {
    task t;
    start_send(&t, send, netchan_int(n), LONG);
    CHECK_INT(recv_int(recv), n);
    CHECK_INT(end_task(&t), NETCHAN_OK);
}

/* A value each way. */
static inline void check_works(netchan_link *l, netchan_link *d) {
    exchange(d->send, l->recv, 1);
    exchange(l->send, d->recv, 2);
}

/* Bytes that look random, to be freed. */
static inline uint8_t *noise(size_t size) {
    uint8_t *bytes = (uint8_t *)malloc(size ? size : 1);
    uint64_t seed = size + 1;
    CHECK(bytes);
    for (size_t i = 0; i < size; i++) bytes[i] = (uint8_t)test_random(&seed);
    return bytes;
}

/* The channels of one direction. */
typedef struct way {
    netchan *send, *recv;
} way;

static inline way way_of(const pair *p, int direction) {
    way w;
    w.send = direction ? p->l->send : p->d->send;
    w.recv = direction ? p->d->recv : p->l->recv;
    return w;
}

typedef struct stream {
    netchan *ch;
    int count, result;
} stream;

static inline void *send_stream(void *arg) {
    stream *s = (stream *)arg;
    for (int i = 0; i < s->count; i++) send_int(s->ch, i);
    return NULL;
}

/* One direction: numbers in their order, at least `count` of them, and until there were so many cuts. */
typedef struct flow {
    netchan *send, *recv;
    proxy *p; /* NULL: there are no cuts */
    int64_t count, sent;
    unsigned cuts;
    uint8_t *received; /* how often each number came; atomic */
    pthread_t threads[1 + 16];
} flow;

enum { FLOW_RECEIVERS = 16, FLOW_MOST = 20000000 };

static inline void *flow_sender(void *arg) {
    flow *f = (flow *)arg;
    for (; f->sent < f->count || (f->p && proxy_cuts(f->p) < f->cuts); f->sent++) {
        CHECK(f->sent < FLOW_MOST);
        CHECK_INT(netchan_send(f->send, netchan_int(f->sent), NETCHAN_FOREVER), NETCHAN_OK);
    }
    for (int i = 0; i < FLOW_RECEIVERS; i++)
        CHECK_INT(netchan_send(f->send, netchan_nil(), NETCHAN_FOREVER), NETCHAN_OK);
    return NULL;
}

static inline void *flow_receiver(void *arg) {
    flow *f = (flow *)arg;
    netchan_value v;
    for (int64_t last = -1;;) {
        netchan_case c = netchan_case_recv(f->recv, &v);
        CHECK_INT(netchan_select(&c, 1, NETCHAN_FOREVER), 0);
        CHECK_INT(c.result, NETCHAN_OK);
        CHECK(!c.redelivered);
        if (netchan_is_nil(&v)) return NULL;
        int64_t n = netchan_as_int(&v, -1);
        if (n <= last || n >= FLOW_MOST)
            test_fail(__FILE__, __LINE__, "%lld after %lld", (long long)n, (long long)last);
        if (__atomic_add_fetch(&f->received[n], 1, __ATOMIC_RELAXED) != 1)
            test_fail(__FILE__, __LINE__, "%lld came twice", (long long)n);
        last = n;
    }
}

static inline void flow_begin(flow *f, way w, proxy *p, int64_t count, unsigned cuts) {
    memset(f, 0, sizeof *f);
    f->send = w.send;
    f->recv = w.recv;
    f->p = p;
    f->count = count;
    f->cuts = cuts;
    f->received = (uint8_t *)calloc(FLOW_MOST, 1);
    CHECK(f->received);
    for (int i = 0; i <= FLOW_RECEIVERS; i++) f->threads[i] = test_start(i ? flow_receiver : flow_sender, f);
}

static inline void flow_end(flow *f) {
    for (int i = 0; i <= FLOW_RECEIVERS; i++) test_join(f->threads[i]);
    for (int64_t n = 0; n < f->sent; n++) CHECK_INT(f->received[n], 1);
    free(f->received);
}

/* --- channels in values ------------------------------------------------------------------------------------------- */

/* Receives a value that is an end, which is to be freed. */
static inline netchan *recv_end(netchan *ch) {
    netchan_value v;
    CHECK_INT(netchan_recv(ch, &v, LONG), NETCHAN_OK);
    netchan *end = netchan_retain(netchan_as_chan(&v));
    CHECK(end);
    netchan_clear(&v);
    return end;
}

/* Sends an end this way. Returns what the other side has then, to be freed. */
static inline netchan *pass_end(way w, netchan_value end) {
    task t;
    start_send(&t, w.send, end, LONG);
    netchan *got = recv_end(w.recv);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    return got;
}

/* Waits until no more than so many blocks are held: what was let go of here is freed by the library's thread, and after
 * the other side was told. */
static inline void wait_for_blocks(long most) {
    long long end = test_ms() + LONG;
    for (; alloc_blocks() > most; sched_yield())
        if (test_ms() > end) test_fail(__FILE__, __LINE__, "%ld blocks are held, not %ld", alloc_blocks(), most);
}

#endif
