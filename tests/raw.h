/* The raw side of a link: an encoder that was written from the WIRE section at the top of netchan.h alone, and TLS over
 * plain sockets, to say what netchan.h never would. mbedTLS is called from one thread at a time, so the raw side takes
 * the lock that netchan.h takes; it lives in one thread. Include it after netchan.h with its implementation and test.h,
 * and after KEY and LONG. */
#ifndef NETCHAN_TEST_RAW_H
#define NETCHAN_TEST_RAW_H

#include <poll.h>

/* --- bytes: an encoder of its own --------------------------------------------------------------------------------- */

enum {
    HELLO = 0x01, PING, PONG, BYE, ACK, RESUME, RESUMED, REFUSED,
    OFFER = 0x10, DEMAND, WITHDRAW, GRANT, DECLINE, TAKEN, DATA, CLOSE, FRAGMENT_UP, DROP, IMPORT, FORGET,
    CLAIM = 0x20, COMMIT, RELEASE, ACCEPT, WITHDRAWN, CREDIT, CLOSED, RETURN, FRAGMENT_DOWN, CLOSING, GONE, IMPORTED
};
enum { MULTI = 1, TRY = 2, FIRM = 4, HERE = 8, RELAYED_FLAG = 16, AHEAD = 32 };
enum { FINAL = 1, REDELIVERED = 2, UNHURRIED = 4 };
enum { PIECE = 16000 }; /* bytes of a value in one FRAGMENT */

typedef struct bytes {
    uint8_t data[100000];
    size_t size;
} bytes;

static inline void put_byte(bytes *b, unsigned byte) {
    CHECK(b->size < sizeof b->data);
    b->data[b->size++] = (uint8_t)byte;
}

static inline void put_number(bytes *b, uint64_t n) {
    for (; n > 127; n >>= 7) put_byte(b, (unsigned)(n & 127) | 128);
    put_byte(b, (unsigned)n);
}

static inline void put_bytes(bytes *b, const void *data, size_t size) {
    for (size_t i = 0; i < size; i++) put_byte(b, ((const uint8_t *)data)[i]);
}

static inline void put_frame(bytes *b, unsigned type, const uint64_t *numbers, size_t count, const void *tail,
                             size_t size) {
    static bytes body;
    body.size = 0;
    put_byte(&body, type);
    for (size_t i = 0; i < count; i++) put_number(&body, numbers[i]);
    if (size) put_bytes(&body, tail, size);
    put_number(b, body.size);
    put_bytes(b, body.data, body.size);
}

/* The bytes of a string constant, and a frame's numbers. */
#define PUT_TEXT(b, text) put_bytes(b, text, sizeof text - 1)
#define COUNT_OF(...) sizeof((uint64_t[]){__VA_ARGS__}) / sizeof(uint64_t)
/* A frame of numbers, and one that ends with the bytes of a string constant. */
#define PUT(b, type, ...) put_frame(b, type, (uint64_t[]){__VA_ARGS__}, COUNT_OF(__VA_ARGS__), NULL, 0)
#define PUT_VALUE(b, type, text, ...)                                                                                  \
    put_frame(b, type, (uint64_t[]){__VA_ARGS__}, COUNT_OF(__VA_ARGS__), text, sizeof text - 1)

typedef struct greeting {
    const char *magic;
    uint64_t version, max_message, max_memory, max_ops, max_ends, ping_ms, capacity;
    unsigned process;            /* each byte of the process id */
    const uint8_t *id, *secret; /* only a listener's */
} greeting;

static inline greeting good_greeting(void) {
    greeting g = {"netchan", 1, 1 << 20, 1 << 22, 100, 100, 5000, 0, 0xee, NULL, NULL};
    return g;
}

static inline void put_greeting(bytes *b, const greeting *g) {
    bytes body;
    body.size = 0;
    put_bytes(&body, g->magic, 7);
    put_number(&body, g->version);
    for (int i = 0; i < 16; i++) put_byte(&body, g->process);
    put_number(&body, g->max_message);
    put_number(&body, g->max_memory);
    put_number(&body, g->max_ops);
    put_number(&body, g->max_ends);
    put_number(&body, g->ping_ms);
    put_number(&body, g->capacity);
    if (g->id) put_bytes(&body, g->id, 16);
    if (g->id) put_bytes(&body, g->secret, 32);
    put_frame(b, HELLO, NULL, 0, body.data, body.size);
}

/* --- raw connections ---------------------------------------------------------------------------------------------- */

/* With what somebody comes. All zero is right. */
typedef struct badge {
    const char *key, *identity, *protocol; /* protocol "": none */
    bool old, certificate;                 /* TLS 1.2; a certificate instead of a key */
} badge;

typedef struct raw {
    int fd;
    bool tls;
    mbedtls_ssl_context ssl;
    mbedtls_ssl_config conf;
    const char *protocols[2];
    uint8_t in[65536];
    size_t in_size;
    uint64_t received, acked;       /* frames that are numbered: that came; that the other side has */
    uint8_t binding[32];            /* of this connection */
    uint8_t id[16], secret[32];     /* of the session that it greeted */
} raw;

static inline int connect_to(const char *address) {
    struct sockaddr_in a;
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    a.sin_port = htons((uint16_t)atoi(strrchr(address, ':') + 1));
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    CHECK(fd >= 0);
    CHECK_INT(connect(fd, (struct sockaddr *)&a, sizeof a), 0);
    CHECK_INT(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on), 0);
    CHECK_INT(fcntl(fd, F_SETFL, O_NONBLOCK), 0);
    return fd;
}

static inline bool wait_for_fd(int fd, short events) {
    struct pollfd p = {fd, events, 0};
    return poll(&p, 1, LONG) == 1;
}

static inline int pull(void *arg, unsigned char *data, size_t size) {
    ssize_t n = recv(((raw *)arg)->fd, data, size, 0);
    if (n >= 0) return (int)n;
    return errno == EAGAIN || errno == EWOULDBLOCK ? MBEDTLS_ERR_SSL_WANT_READ : MBEDTLS_ERR_SSL_CONN_EOF;
}

static inline int push(void *arg, const unsigned char *data, size_t size) {
    ssize_t n = send(((raw *)arg)->fd, data, size, MSG_NOSIGNAL);
    if (n >= 0) return (int)n;
    return errno == EAGAIN || errno == EWOULDBLOCK ? MBEDTLS_ERR_SSL_WANT_WRITE : MBEDTLS_ERR_SSL_CONN_EOF;
}

/* The binding of the WIRE section. */
static inline void export_key(void *arg, mbedtls_ssl_key_export_type type, const unsigned char *secret, size_t size,
                              const unsigned char *client_random, const unsigned char *server_random,
                              mbedtls_tls_prf_types prf) {
    bytes text;
    (void)client_random, (void)server_random, (void)prf;
    if (type != MBEDTLS_SSL_KEY_EXPORT_TLS1_3_CLIENT_APPLICATION_TRAFFIC_SECRET) return;
    text.size = 0;
    PUT_TEXT(&text, "netchan/1 link");
    put_bytes(&text, secret, size);
    CHECK_INT(mbedtls_sha256(text.data, text.size, ((raw *)arg)->binding, 0), 0);
}

/* SHA-256 of a label with its NUL and of the key. */
static inline void hash_key(const char *label, const char *key, uint8_t *hash) {
    bytes text;
    text.size = 0;
    put_bytes(&text, label, strlen(label) + 1);
    put_bytes(&text, key, strlen(key));
    CHECK_INT(mbedtls_sha256(text.data, text.size, hash, 0), 0);
}

/* The shared secret as TLS sees it, and the name that tells it from others. */
static inline void set_key(raw *r, const badge *b) {
    const char *key = b->key ? b->key : KEY;
    char identity[64] = "shared_key:";
    uint8_t psk[32], id[32];
    hash_key("netchan/1 shared key", key, psk);
    hash_key("netchan/1 key id", key, id);
    for (size_t i = 0; i < 8; i++) snprintf(identity + 11 + 2 * i, 3, "%02x", id[i]);
    if (b->identity) snprintf(identity, sizeof identity, "%s", b->identity);
    CHECK_INT(mbedtls_ssl_conf_psk(&r->conf, psk, sizeof psk, (const unsigned char *)identity, strlen(identity)), 0);
    mbedtls_ssl_conf_tls13_key_exchange_modes(&r->conf, MBEDTLS_SSL_TLS1_3_KEY_EXCHANGE_MODE_PSK_EPHEMERAL);
}

static inline void set_up_tls(raw *r, const badge *b, bool server) {
    pthread_mutex_lock(&netchan__tls_lock);
    CHECK_INT(psa_crypto_init(), PSA_SUCCESS);
    mbedtls_ssl_init(&r->ssl);
    mbedtls_ssl_config_init(&r->conf);
    int side = server ? MBEDTLS_SSL_IS_SERVER : MBEDTLS_SSL_IS_CLIENT;
    int e = mbedtls_ssl_config_defaults(&r->conf, side, MBEDTLS_SSL_TRANSPORT_STREAM, MBEDTLS_SSL_PRESET_DEFAULT);
    CHECK_INT(e, 0);
    mbedtls_ssl_conf_rng(&r->conf, mbedtls_psa_get_random, MBEDTLS_PSA_RANDOM_STATE);
    mbedtls_ssl_conf_authmode(&r->conf, MBEDTLS_SSL_VERIFY_NONE);
    mbedtls_ssl_conf_max_tls_version(&r->conf, b->old ? MBEDTLS_SSL_VERSION_TLS1_2 : MBEDTLS_SSL_VERSION_TLS1_3);
    mbedtls_ssl_conf_min_tls_version(&r->conf, b->old ? MBEDTLS_SSL_VERSION_TLS1_2 : MBEDTLS_SSL_VERSION_TLS1_3);
    if (!b->certificate) set_key(r, b);
    r->protocols[0] = b->protocol ? b->protocol : "netchan/1";
    if (!b->protocol || *b->protocol) CHECK_INT(mbedtls_ssl_conf_alpn_protocols(&r->conf, r->protocols), 0);
    CHECK_INT(mbedtls_ssl_setup(&r->ssl, &r->conf), 0);
    CHECK_INT(mbedtls_ssl_set_hostname(&r->ssl, NULL), 0);
    mbedtls_ssl_set_bio(&r->ssl, r, push, pull, NULL);
    mbedtls_ssl_set_export_keys_cb(&r->ssl, export_key, r);
    pthread_mutex_unlock(&netchan__tls_lock);
    r->tls = true;
}

/* Returns 0, or mbedTLS's error. */
static inline int shake_hands(raw *r) {
    for (;;) {
        pthread_mutex_lock(&netchan__tls_lock);
        int e = mbedtls_ssl_handshake(&r->ssl);
        pthread_mutex_unlock(&netchan__tls_lock);
        if (e != MBEDTLS_ERR_SSL_WANT_READ && e != MBEDTLS_ERR_SSL_WANT_WRITE) return e;
        CHECK(wait_for_fd(r->fd, e == MBEDTLS_ERR_SSL_WANT_READ ? POLLIN : POLLOUT));
    }
}

static inline raw *raw_connect(const char *address) {
    raw *r = (raw *)calloc(1, sizeof *r);
    CHECK(r);
    r->fd = connect_to(address);
    return r;
}

/* TLS is done when it returns. */
static inline raw *raw_enter(const char *address) {
    static const badge right;
    raw *r = raw_connect(address);
    set_up_tls(r, &right, false);
    CHECK_INT(shake_hands(r), 0);
    return r;
}

/* Returns false when the connection is over. */
static inline bool raw_send(raw *r, const void *data, size_t size) {
    for (size_t done = 0; done < size;) {
        int n;
        if (r->tls) {
            pthread_mutex_lock(&netchan__tls_lock);
            n = mbedtls_ssl_write(&r->ssl, (const unsigned char *)data + done, size - done);
            pthread_mutex_unlock(&netchan__tls_lock);
        } else n = push(r, (const unsigned char *)data + done, size - done);
        if (n > 0) done += (size_t)n;
        else if (n != MBEDTLS_ERR_SSL_WANT_WRITE && n != MBEDTLS_ERR_SSL_WANT_READ) return false;
        else CHECK(wait_for_fd(r->fd, n == MBEDTLS_ERR_SSL_WANT_READ ? POLLIN : POLLOUT));
    }
    return true;
}

/* Reads some more. Returns false when the connection is over. */
static inline bool raw_read(raw *r) {
    CHECK(r->in_size < sizeof r->in);
    for (;;) {
        int n;
        if (r->tls) {
            pthread_mutex_lock(&netchan__tls_lock);
            n = mbedtls_ssl_read(&r->ssl, r->in + r->in_size, sizeof r->in - r->in_size);
            pthread_mutex_unlock(&netchan__tls_lock);
        } else n = pull(r, r->in + r->in_size, sizeof r->in - r->in_size);
        if (n == MBEDTLS_ERR_SSL_WANT_READ || n == MBEDTLS_ERR_SSL_WANT_WRITE) {
            CHECK(wait_for_fd(r->fd, POLLIN));
            continue;
        }
        if (n <= 0) return false;
        r->in_size += (size_t)n;
        return true;
    }
}

/* Waits until the other side closes; what it says first is dropped. */
static inline void raw_wait_closed(raw *r) {
    while (raw_read(r)) r->in_size = 0;
}

static inline void raw_close(raw *r) {
    close(r->fd);
    pthread_mutex_lock(&netchan__tls_lock);
    if (r->tls) {
        mbedtls_ssl_free(&r->ssl);
        mbedtls_ssl_config_free(&r->conf);
    }
    pthread_mutex_unlock(&netchan__tls_lock);
    free(r);
}

/* --- frames that come in ------------------------------------------------------------------------------------------ */

typedef struct frame {
    unsigned type;
    uint8_t body[17000];
    size_t size, at;
} frame;

static inline bool get_number_from(const uint8_t *data, size_t size, size_t *at, uint64_t *n) {
    *n = 0;
    for (unsigned shift = 0; *at < size && shift < 64; shift += 7) {
        uint8_t byte = data[(*at)++];
        *n |= (uint64_t)(byte & 127) << shift;
        if (byte < 128) return true;
    }
    return false;
}

static inline uint64_t get_number(frame *f) {
    uint64_t n;
    CHECK(get_number_from(f->body, f->size, &f->at, &n));
    return n;
}

/* The next frame; false when the connection is over. */
static inline bool raw_frame(raw *r, frame *f) {
    uint64_t length = 0;
    size_t head = 0;
    while (!get_number_from(r->in, r->in_size, &head, &length) || r->in_size - head < length) {
        if (!raw_read(r)) return false;
        head = 0;
    }
    CHECK(length >= 1 && head + length <= 16384);
    f->type = r->in[head];
    f->size = (size_t)length - 1;
    f->at = 0;
    memcpy(f->body, r->in + head + 1, f->size);
    r->in_size -= head + (size_t)length;
    memmove(r->in, r->in + head + length, r->in_size);
    if (f->type >= BYE && (f->type < ACK || f->type > REFUSED)) r->received++;
    if (f->type == ACK) {
        uint64_t acked;
        CHECK(get_number_from(f->body, f->size, &f->at, &acked) && acked > r->acked);
        r->acked = acked;
        f->at = 0;
    }
    return true;
}

/* The next frame, but for heartbeats and acknowledgements, unless one is waited for. */
static inline void next_frame(raw *r, frame *f, unsigned type) {
    do CHECK(raw_frame(r, f));
    while ((f->type == PING && type != PING) || (f->type == ACK && type != ACK));
}

/* It is of this type, and begins with these numbers. */
static inline void check_frame(raw *r, frame *f, unsigned type, const uint64_t *numbers, size_t count) {
    next_frame(r, f, type);
    CHECK_INT(f->type, type);
    for (size_t i = 0; i < count; i++) CHECK_INT(get_number(f), numbers[i]);
}

#define EXPECT(r, f, type, ...) check_frame(r, f, type, (uint64_t[]){__VA_ARGS__}, COUNT_OF(__VA_ARGS__))

static inline void check_rest(const frame *f, const void *data, size_t size) {
    CHECK_INT(f->size - f->at, size);
    CHECK(memcmp(f->body + f->at, data, size) == 0);
}

static inline void raw_say(raw *r, bytes *b) {
    CHECK(raw_send(r, b->data, b->size));
    b->size = 0;
}

/* Asks, and returns the number of the question. */
static inline uint64_t raw_ask(raw *r) {
    static uint64_t question = 1000;
    bytes b;
    b.size = 0;
    PUT(&b, PING, ++question);
    raw_say(r, &b);
    return question;
}

/* Nothing more was said than what was read. An answer may go before frames, but not before those that waited when the
 * last answer went. */
static inline void check_quiet(raw *r) {
    frame f;
    for (int i = 0; i < 2; i++) {
        uint64_t question = raw_ask(r);
        EXPECT(r, &f, PONG, question);
    }
}

/* So many of our frames, and no more, are known to have arrived. */
static inline void wait_acked(raw *r, uint64_t count) {
    frame f;
    while (r->acked < count) CHECK(raw_frame(r, &f));
    CHECK_INT(r->acked, count);
}

/* Greets and is greeted. Returns the capacity that was granted. */
static inline uint64_t raw_greet(raw *r, const greeting *g) {
    bytes b;
    frame f;
    b.size = 0;
    put_greeting(&b, g);
    CHECK(raw_send(r, b.data, b.size));
    CHECK(raw_frame(r, &f));
    CHECK_INT(f.type, HELLO);
    CHECK(f.size > 7 + 1 + 16 && memcmp(f.body, "netchan", 7) == 0);
    f.at = 7;
    CHECK_INT(get_number(&f), 1);
    f.at += 16;
    for (int i = 0; i < 5; i++) CHECK(get_number(&f) > 0);
    uint64_t capacity = get_number(&f);
    CHECK(f.size - f.at >= 48);
    memcpy(r->id, f.body + f.at, 16);
    memcpy(r->secret, f.body + f.at + 16, 32);
    return capacity;
}

static inline raw *raw_join(const char *address, uint64_t capacity) {
    greeting g = good_greeting();
    g.capacity = capacity;
    raw *r = raw_enter(address);
    CHECK_INT(raw_greet(r, &g), capacity);
    return r;
}

/* All that came was received. */
static inline void raw_ack(raw *r) {
    bytes b;
    b.size = 0;
    PUT(&b, ACK, r->received);
    raw_say(r, &b);
}

/* --- sessions that outlive their connections ---------------------------------------------------------------------- */

/* What a RESUME says. */
typedef struct claim {
    uint8_t id[16], secret[32], binding[32];
    uint64_t generation, received;
} claim;

/* The session that r has had, over the connection of `over`. */
static inline claim claim_of(const raw *r, const raw *over, uint64_t generation) {
    claim m;
    memcpy(m.id, r->id, sizeof m.id);
    memcpy(m.secret, r->secret, sizeof m.secret);
    memcpy(m.binding, over->binding, sizeof m.binding);
    m.generation = generation;
    m.received = r->received;
    return m;
}

static inline void put_little(bytes *b, uint64_t n) {
    for (int i = 0; i < 8; i++) put_byte(b, (unsigned)(n >> 8 * i) & 255);
}

/* HMAC-SHA256 as RFC 2104 has it: neither the function of the library under test nor mbedTLS's. */
static inline void put_proof(bytes *b, const claim *m, char role) {
    bytes inner, outer;
    uint8_t hash[32];
    inner.size = outer.size = 0;
    for (size_t i = 0; i < 64; i++) {
        uint8_t key = i < sizeof m->secret ? m->secret[i] : 0;
        put_byte(&inner, key ^ 0x36u);
        put_byte(&outer, key ^ 0x5cu);
    }
    put_byte(&inner, (unsigned char)role);
    put_bytes(&inner, m->binding, 32);
    put_little(&inner, m->generation);
    put_little(&inner, m->received);
    CHECK_INT(mbedtls_sha256(inner.data, inner.size, hash, 0), 0);
    put_bytes(&outer, hash, sizeof hash);
    CHECK_INT(mbedtls_sha256(outer.data, outer.size, hash, 0), 0);
    put_bytes(b, hash, sizeof hash);
}

static inline void put_resume(bytes *b, const claim *m) {
    bytes body;
    body.size = 0;
    put_bytes(&body, m->id, 16);
    put_number(&body, m->generation);
    put_number(&body, m->received);
    put_proof(&body, m, 'D');
    put_frame(b, RESUME, NULL, 0, body.data, body.size);
}

/* Goes on with the session of `old` over a new connection. *arrived: how many of our frames did. */
static inline raw *raw_resume(const char *address, const raw *old, uint64_t generation, uint64_t *arrived) {
    raw *r = raw_enter(address);
    claim m = claim_of(old, r, generation);
    bytes b, proof;
    frame f;
    b.size = proof.size = 0;
    put_resume(&b, &m);
    raw_say(r, &b);
    CHECK(raw_frame(r, &f));
    CHECK_INT(f.type, RESUMED);
    *arrived = m.received = get_number(&f);
    put_proof(&proof, &m, 'L');
    check_rest(&f, proof.data, proof.size);
    memcpy(r->id, old->id, sizeof r->id);
    memcpy(r->secret, old->secret, sizeof r->secret);
    r->received = old->received;
    r->acked = *arrived;
    return r;
}

/* The connection goes, and with it what was not read. The rest of the struct is still of use. */
static inline void raw_drop(raw *r) {
    close(r->fd);
    pthread_mutex_lock(&netchan__tls_lock);
    mbedtls_ssl_free(&r->ssl);
    mbedtls_ssl_config_free(&r->conf);
    pthread_mutex_unlock(&netchan__tls_lock);
}

/* --- the other way round: a listener ------------------------------------------------------------------------------ */

typedef struct door {
    int fd;
    char address[32];
} door;

static inline door open_door(void) {
    struct sockaddr_in a;
    socklen_t size = sizeof a;
    door d;
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    d.fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(d.fd >= 0 && bind(d.fd, (struct sockaddr *)&a, sizeof a) == 0 && listen(d.fd, 16) == 0);
    CHECK_INT(getsockname(d.fd, (struct sockaddr *)&a, &size), 0);
    snprintf(d.address, sizeof d.address, "127.0.0.1:%d", ntohs(a.sin_port));
    return d;
}

/* Who comes next, before TLS. */
static inline raw *raw_accept(const door *d) {
    raw *r = (raw *)calloc(1, sizeof *r);
    int on = 1;
    CHECK(r && wait_for_fd(d->fd, POLLIN));
    r->fd = accept(d->fd, NULL, NULL);
    CHECK(r->fd >= 0 && fcntl(r->fd, F_SETFL, O_NONBLOCK) == 0);
    CHECK_INT(setsockopt(r->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on), 0);
    return r;
}

/* Who came and was not let in is gone. */
static inline void empty_door(const door *d) {
    struct pollfd p = {d->fd, POLLIN, 0};
    while (poll(&p, 1, 0) == 1) close(accept(d->fd, NULL, NULL));
}

/* Who comes next, greeted. */
static inline raw *raw_admit(const door *d, uint64_t capacity) {
    static const badge right;
    raw *r = raw_accept(d);
    greeting g = good_greeting();
    bytes b;
    frame f;
    set_up_tls(r, &right, true);
    CHECK_INT(shake_hands(r), 0);
    CHECK(raw_frame(r, &f)); /* the dialler speaks first */
    CHECK_INT(f.type, HELLO);
    b.size = 0;
    g.capacity = capacity;
    static uint8_t next_id;
    memset(r->id, ++next_id, sizeof r->id);
    memset(r->secret, 0x77, sizeof r->secret);
    g.id = r->id;
    g.secret = r->secret;
    put_greeting(&b, &g);
    raw_say(r, &b);
    return r;
}

/* A dialler comes to go on with the session that raw_admit() gave it, and proves it. */
static inline claim read_resume(raw *r) {
    static const badge right;
    claim m;
    frame f;
    bytes proof;
    proof.size = 0;
    set_up_tls(r, &right, true);
    CHECK_INT(shake_hands(r), 0);
    CHECK(raw_frame(r, &f));
    CHECK_INT(f.type, RESUME);
    CHECK_INT(f.size, 16 + 1 + 1 + 32);
    memcpy(m.id, f.body, 16);
    for (int i = 1; i < 16; i++) CHECK_INT(m.id[i], m.id[0]);
    memset(m.secret, 0x77, sizeof m.secret);
    memcpy(m.binding, r->binding, sizeof m.binding);
    f.at = 16;
    m.generation = get_number(&f);
    m.received = get_number(&f);
    put_proof(&proof, &m, 'D');
    check_rest(&f, proof.data, proof.size);
    return m;
}

static inline void put_resumed(bytes *b, const claim *m, char role) {
    bytes body;
    body.size = 0;
    put_number(&body, m->received);
    put_proof(&body, m, role);
    put_frame(b, RESUMED, NULL, 0, body.data, body.size);
}

/* --- channel ends in values --------------------------------------------------------------------------------------- */

enum { RECEIVES = 1, YOURS = 2, FAR = 4, IS_CLOSING = 8, IS_CLOSED = 16, IS_GONE = 32 }; /* the first byte of a name */
enum { NAME = 17 };

static inline void put_name(bytes *b, unsigned flags, uint64_t id, uint64_t capacity) {
    put_byte(b, flags);
    put_little(b, id);
    put_little(b, capacity);
}

/* A value that is an end. */
static inline void put_end(bytes *b, unsigned flags, uint64_t id, uint64_t capacity) {
    put_byte(b, 0x8a);
    put_number(b, NAME);
    put_name(b, flags, id, capacity);
}

typedef struct end {
    unsigned flags;
    uint64_t id, capacity;
} end;

static inline uint64_t get_little(const uint8_t *p) {
    uint64_t n = 0;
    for (int i = 8; i-- > 0;) n = n << 8 | p[i];
    return n;
}

static inline end get_name(frame *f) {
    CHECK(f->size - f->at >= NAME);
    const uint8_t *p = f->body + f->at;
    end e = {p[0], get_little(p + 1), get_little(p + 9)};
    f->at += NAME;
    return e;
}

static inline end get_end(frame *f) {
    CHECK_INT(f->body[f->at++], 0x8a);
    CHECK_INT(get_number(f), NAME);
    return get_name(f);
}

#endif
