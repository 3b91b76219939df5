/* What fails: the n-th allocation of netchan.h, the n-th of mbedTLS, the n-th call of the system, for n = 1, 2, 3 ...
 * until nothing fails any more. A scenario is what a program does with the library; it may be told of one failure, and
 * what it then tries again must work. Whatever fails, no value whose send said OK is lost or doubled, no block and no
 * descriptor is left, and nothing waits for ever.
 *
 * All values of n take an hour, so there are some of them: NETCHAN_TEST_RUNS=1000 in the environment asks for about so
 * many for each scenario and kind of failure. With NETCHAN_TEST_N=17 only that one is tried; NETCHAN_TEST_TRACE=1 tells
 * of each. */
#include "faults.h"
#include "test.h"
#include "task.h"
static bool prepare(int fd);
#define netchan__prepare_fd(fd) prepare(fd) /* what the proxy calls must not fail */
#include "net.h"
#undef netchan__prepare_fd
#include "pki.h"

#include <dirent.h>

static bool prepare(int fd) {
    return fcntl(fd, F_SETFL, O_NONBLOCK) == 0;
}

/* --- the n-th allocation of mbedTLS, and of the C library --------------------------------------------------------- */

#ifdef __SANITIZE_ADDRESS__
#define REAL_CALLOC __interceptor_calloc
extern const char __executable_start, etext;
/* A sanitizer does not outlive a C library without memory for it: only this program's calls fail, and mbedTLS's. */
#define MAY_FAIL(caller) ((const char *)(caller) >= &__executable_start && (const char *)(caller) < &etext)
#elif defined(__GLIBC__) && !defined(__SANITIZE_THREAD__)
#define REAL_CALLOC __libc_calloc
#define MAY_FAIL(caller) true
#endif

static long calloc_at;    /* atomic: the value of calloc_calls at which one fails; 0: never */
static long calloc_calls; /* atomic */

#ifdef REAL_CALLOC
void *REAL_CALLOC(size_t count, size_t size);

/* This one is called by everybody in this program, and mbedTLS calls no other. */
void *calloc(size_t count, size_t size) {
    if (!MAY_FAIL(__builtin_return_address(0))) return REAL_CALLOC(count, size);
    long n = __atomic_add_fetch(&calloc_calls, 1, __ATOMIC_SEQ_CST);
    if (n != __atomic_load_n(&calloc_at, __ATOMIC_SEQ_CST)) return REAL_CALLOC(count, size);
    errno = ENOMEM;
    return NULL;
}
#endif

static long calloc_count(void) {
    return __atomic_load_n(&calloc_calls, __ATOMIC_SEQ_CST);
}

static void calloc_fail(long n) {
    __atomic_store_n(&calloc_at, n ? calloc_count() + n : 0, __ATOMIC_SEQ_CST);
}

static bool calloc_failed(void) {
    long at = __atomic_load_n(&calloc_at, __ATOMIC_SEQ_CST);
    return at && calloc_count() >= at;
}

/* --- what may be forgiven ----------------------------------------------------------------------------------------- */

/* What a failure may lead to. */
enum mercy {
    NOTHING,    /* to nothing but delay */
    A_REFUSAL,  /* a listen or a dial may say no */
    A_FAILURE   /* any call may, with ENOMEM; and a session may be lost */
};

static enum mercy mercy;
static int forgiven;          /* atomic: how often in this run */
static size_t missing, told; /* values that were sent with OK and did not come; that links have reported */

static bool hit(void) {
    return alloc_failed() || calloc_failed() || fault_hit();
}

/* Something said no, with this result; it must have had a reason, and have told it. */
static void forgive(int line, enum mercy needed, int result, const char *sentence) {
    if (mercy < needed || !hit())
        test_fail(__FILE__, line, "%s (%s), and nothing failed that allows it", netchan_strerror(result), sentence);
    if (!*sentence) test_fail(__FILE__, line, "%s, without a sentence", netchan_strerror(result));
    if (__atomic_add_fetch(&forgiven, 1, __ATOMIC_SEQ_CST) > 16)
        test_fail(__FILE__, line, "one failure, and everything goes on failing: %s", sentence);
}

/* Whether the call has to be made again. */
static bool again_at(int line, int result) {
    if (result >= 0) return false;
    switch (result) {
    case NETCHAN_ENOMEM: case NETCHAN_ELOST: case NETCHAN_EUNKNOWN: case NETCHAN_ENET: case NETCHAN_EINVAL: break;
    default: test_fail(__FILE__, line, "%s is no answer to a failure: %s", netchan_strerror(result), netchan_errmsg());
    }
    forgive(line, A_FAILURE, result, netchan_errmsg());
    return true;
}
#define again(result) again_at(__LINE__, result)

static bool is_lost(int result) {
    return result == NETCHAN_ELOST || result == NETCHAN_EUNKNOWN;
}

/* --- what scenarios are made of ----------------------------------------------------------------------------------- */

static netchan *make(size_t capacity) {
    netchan *ch;
    while (!(ch = netchan_make(capacity))) forgive(__LINE__, A_FAILURE, NETCHAN_ENOMEM, netchan_errmsg());
    return ch;
}

static netchan_link *open_listener(const char *address, const netchan_options *o) {
    netchan_link *l;
    while (!(l = netchan_listen(address, o))) forgive(__LINE__, A_REFUSAL, NETCHAN_ENET, netchan_errmsg());
    return l;
}

static netchan_link *open_dialler(const char *address, const netchan_options *o) {
    netchan_link *d;
    while (!(d = netchan_dial(address, o))) forgive(__LINE__, A_REFUSAL, NETCHAN_ENET, netchan_errmsg());
    return d;
}

static netchan_report hang(netchan_link *link) {
    netchan_report r;
    int result = netchan_hangup(link, &r);
    if (result != NETCHAN_OK) forgive(__LINE__, A_FAILURE, result, netchan_errmsg());
    told += r.undelivered + r.unknown + r.unreceived;
    return r;
}

/* All that was sent has been received. */
static void hang_clean(netchan_link *link) {
    netchan_report r = hang(link);
    if (r.undelivered || r.unreceived || r.unknown) forgive(__LINE__, A_FAILURE, NETCHAN_ELOST, "values were lost");
}

static pair open_pair(const netchan_options *listen, const netchan_options *dial) {
    pair p;
    p.l = open_listener("127.0.0.1:0", listen);
    p.d = open_dialler(p.l->address, dial);
    return p;
}

static void close_pair(pair *p) {
    hang_clean(p->d);
    hang_clean(p->l);
}

/* With the next session these go on, where all other channels end with the one that was lost. */
static bool of_link(const netchan *ch) {
    return ch->plain;
}

/* Sends until it is said to have arrived, or can no more. */
typedef struct carrier {
    netchan *ch;
    netchan_value value;
    int result;
    bool unknown;    /* one of the tries may have arrived, too */
    bool done, stop; /* atomic; stop: nobody receives any more */
    pthread_t thread;
} carrier;

static void *carry(void *arg) {
    carrier *c = (carrier *)arg;
    do {
        c->result = netchan_send(c->ch, c->value, 1000);
        c->unknown |= c->result == NETCHAN_EUNKNOWN;
        if (is_lost(c->result) && !of_link(c->ch)) again(c->result); /* it must be forgiven */
        if (__atomic_load_n(&c->stop, __ATOMIC_ACQUIRE) || (is_lost(c->result) && !of_link(c->ch))) break;
    } while (c->result == NETCHAN_ETIMEDOUT || again(c->result));
    __atomic_store_n(&c->done, true, __ATOMIC_RELEASE);
    return NULL;
}

static void start_carrier(carrier *c, netchan *ch, netchan_value v) {
    memset(c, 0, sizeof *c);
    c->ch = ch;
    c->value = v;
    c->thread = test_start(carry, c);
}

/* Receives what the carrier sends. Returns OK, or ELOST when that is in vain. */
static int meet(carrier *c, netchan *ch, netchan_value *got) {
    int result;
    for (long long end = test_ms() + LONG;;) {
        bool done = __atomic_load_n(&c->done, __ATOMIC_ACQUIRE);
        result = netchan_recv(ch, got, 200);
        if (result == NETCHAN_OK) break;
        if (result != NETCHAN_ETIMEDOUT) {
            if (again(result) && is_lost(result) && !of_link(ch)) break;
        } else if (done && c->result != NETCHAN_OK) break;
        else if (done && mercy == A_FAILURE && hit() && netchan_cap(c->ch) > 0 && test_ms() > end - LONG + 1000) {
            result = NETCHAN_ELOST; /* it was in a buffer, and the session was lost: the reports must say so */
            __atomic_add_fetch(&missing, 1, __ATOMIC_SEQ_CST);
            break;
        }
        CHECK(test_ms() < end);
    }
    __atomic_store_n(&c->stop, true, __ATOMIC_RELEASE);
    test_join(c->thread);
    if (c->result == NETCHAN_OK && result != NETCHAN_OK && !is_lost(result))
        test_fail(__FILE__, __LINE__, "a value is lost");
    if (c->result != NETCHAN_OK && result == NETCHAN_OK && !c->unknown)
        test_fail(__FILE__, __LINE__, "a value came whose send said %s", netchan_strerror(c->result));
    if (c->unknown && result == NETCHAN_OK) { /* it may come twice: its sender was told that nobody knows */
        netchan_value twice;
        if (netchan_recv(ch, &twice, SHORT) == NETCHAN_OK) netchan_clear(&twice);
    }
    return result == NETCHAN_OK ? NETCHAN_OK : NETCHAN_ELOST;
}

/* One value from here to there. */
static int pass(netchan *send, netchan *recv, netchan_value v, netchan_value *got) {
    carrier c;
    start_carrier(&c, send, v);
    return meet(&c, recv, got);
}

static int pass_int(netchan *send, netchan *recv, int64_t n) {
    netchan_value got;
    int result = pass(send, recv, netchan_int(n), &got);
    if (result == NETCHAN_OK) CHECK_INT(netchan_as_int(&got, -1), n);
    return result;
}

/* Over the channels of a link nothing is in vain for ever: with the next session it goes on. */
static void pass_over(netchan *send, netchan *recv, int64_t n) {
    while (pass_int(send, recv, n) != NETCHAN_OK) continue;
}

static void both_ways(const pair *p, int64_t n) {
    pass_over(p->d->send, p->l->recv, n);
    pass_over(p->l->send, p->d->recv, n + 1);
}

/* --- scenarios in one process ------------------------------------------------------------------------------------- */

typedef struct point {
    int64_t x;
    const char *name;
} point;

static const netchan_field point_fields[] = {NETCHAN_FIELD(point, x, I64), NETCHAN_FIELD(point, name, STR),
                                             NETCHAN_FIELDS_END};

/* A value with everything in it but channels. It lasts as long as the process. */
static netchan_value rich(void) {
    static const point at = {7, "seven"};
    static const double numbers[] = {1.5, 2.5};
    static netchan_value items[3];
    static netchan_entry entries[3];
    items[0] = netchan_str("a string that needs room of its own");
    items[1] = netchan_struct(point_fields, &at);
    items[2] = netchan_f64s(numbers, 2);
    entries[0].key = "array";
    entries[0].value = netchan_array(items, 3);
    entries[1].key = "bytes";
    entries[1].value = netchan_bytes("\0\1\2", 3);
    entries[2].key = "int";
    entries[2].value = netchan_int(-1);
    return netchan_map(entries, 3);
}

static void check_rich(netchan_value *v) {
    const netchan_value *array = netchan_get(v, "array");
    point p = {0, NULL};
    CHECK_INT(netchan_count(array), 3);
    CHECK_INT(netchan_unpack(netchan_at(array, 1), point_fields, &p), NETCHAN_OK);
    CHECK_INT(p.x, 7);
    CHECK_STR(p.name, "seven");
    CHECK_INT(netchan_as_int(netchan_get(v, "int"), 0), -1);
    netchan_clear(v);
}

static void scenario_values(void) {
    uint8_t bytes[512];
    size_t size;
    netchan_value v = rich(), copy, back;
    while (again(netchan_copy(&copy, &v))) CHECK(netchan_is_nil(&copy));
    CHECK_INT(netchan_encode(&copy, bytes, sizeof bytes, &size), NETCHAN_OK);
    while (again(netchan_decode(&back, bytes, size, 0))) CHECK(netchan_is_nil(&back));
    check_rich(&copy);
    check_rich(&back);
}

/* A select in which the last of many cases is served by another select. */
static void select_last(netchan **channels, size_t count) {
    netchan_case sends[12], recvs[12];
    netchan_value got[12];
    task t;
    int result;
    for (size_t i = 0; i < count; i++) {
        sends[i] = netchan_case_send(channels[i], netchan_int((int64_t)i));
        recvs[i] = netchan_case_recv(channels[i], &got[i]);
    }
    start_select(&t, sends, count, LONG);
    do result = netchan_select(recvs, count, 500);
    while (result == NETCHAN_ETIMEDOUT ? !is_done(&t) : again(result));
    int sent = end_task(&t);
    if (sent < 0 && again(sent)) {
        CHECK_INT(result, NETCHAN_ETIMEDOUT);
        return;
    }
    CHECK_INT(result, sent);
    CHECK_INT(recvs[result].result, NETCHAN_OK);
    CHECK_INT(netchan_as_int(&got[result], -1), result);
}

static void scenario_local(void) {
    netchan *channels[12], *buffered = make(2);
    netchan_value got;
    for (int i = 0; i < 12; i++) channels[i] = make(0);
    while (pass(channels[0], channels[0], rich(), &got) != NETCHAN_OK) continue;
    check_rich(&got);
    for (int i = 0; i < 2; i++)
        while (again(netchan_send(buffered, rich(), LONG))) CHECK_INT(netchan_len(buffered), i);
    CHECK_INT(netchan_send(buffered, netchan_nil(), NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    while (again(netchan_recv(buffered, &got, LONG))) continue;
    check_rich(&got);
    CHECK_INT(netchan_close(buffered), NETCHAN_OK);
    netchan_free(buffered); /* with what is in it */
    select_last(channels, 12);
    netchan *in_value = make(1);
    while (again(netchan_send(in_value, netchan_sender(channels[1]), LONG))) continue;
    while (again(netchan_recv(in_value, &got, LONG))) continue;
    pass_over(netchan_as_chan(&got), channels[1], 5);
    netchan_clear(&got);
    netchan_free(in_value);
    for (int i = 0; i < 12; i++) netchan_free(channels[i]);
}

/* --- scenarios of trust ------------------------------------------------------------------------------------------- */

static pki authority, alice, bob; /* made before anything fails */
static char pins[2 * NETCHAN_FINGERPRINT_SIZE], folder[32], key_path[48], key_file[64];

static void make_people(void) {
    pki_wish wish;
    memset(&wish, 0, sizeof wish);
    pki_make_ca(&authority, "CN=authority");
    wish.issuer = &authority;
    wish.ip[0] = "127.0.0.1";
    wish.subject = "CN=alice";
    pki_make(&alice, &wish);
    wish.subject = "CN=bob";
    pki_make(&bob, &wish);
    snprintf(pins, sizeof pins, "%s,%s", alice.pin, bob.pin);
    mbedtls_psa_crypto_free();
}

static void make_key_file(void) {
    snprintf(folder, sizeof folder, "/tmp/netchan-faults-XXXXXX");
    CHECK(mkdtemp(folder) != NULL);
    snprintf(key_path, sizeof key_path, "%s/key", folder);
    snprintf(key_file, sizeof key_file, "file:%s", key_path);
    FILE *file = fopen(key_path, "w");
    CHECK(file && fprintf(file, "%s\n", KEY) > 0 && fclose(file) == 0);
}

static void remove_key_file(void) {
    CHECK(unlink(key_path) == 0 && rmdir(folder) == 0);
}

static int load_key(void *arg, const char *name, char *out, size_t size) {
    (void)arg;
    CHECK_STR(name, "key");
    snprintf(out, size, "%s", KEY);
    return NETCHAN_OK;
}

static bool allow(void *arg, const netchan_identity *who) {
    (void)arg;
    return strlen(who->identity) > 0;
}

static void ignore_log(void *arg, int level, const char *text) {
    (void)arg;
    CHECK(level >= 0 && strlen(text) > 0);
}

/* A value each way, and the news that nothing but memory can hold back. */
static void meet_and_part(const netchan_options *listen, const netchan_options *dial) {
    netchan_stats stats;
    netchan_value v;
    pair p = open_pair(listen, dial);
    both_ways(&p, 10);
    while (pass(p.d->send, p.l->recv, rich(), &v) != NETCHAN_OK) continue;
    check_rich(&v);
    CHECK_INT(netchan_get_stats(p.l, &stats), NETCHAN_OK);
    if (mercy != A_FAILURE) CHECK_INT(stats.lost, 0);
    int result = netchan_recv(p.d->events, &v, NETCHAN_NOWAIT);
    if (result == NETCHAN_OK) {
        CHECK(strlen(text_of(&v, "event")) > 0);
        netchan_clear(&v);
    } else forgive(__LINE__, A_FAILURE, result, netchan_strerror(result));
    close_pair(&p);
}

/* A listener may have heard of a peer that never heard of it, as their link broke just then: it waits in vain for that
 * one when it hangs up. */
static netchan_options fault_options(void) {
    netchan_options o = options();
    o.log = ignore_log;
    o.resume_ms = 5000;
    o.linger_ms = 500;
    return o;
}

static void scenario_shared_key(void) {
    netchan_options o = fault_options();
    meet_and_part(&o, &o);
}

/* All that options can do to get a key. */
static void scenario_keys(void) {
    netchan_options listen = fault_options(), dial = listen;
    static const char two[] = "8f1c6d0b53a94e7720c1b7fd4a6e985f3d20e1b4c75a69887716253f4e0dac9b\n"
                              "b14a7c6e9d03f25881e7d6c40a3f9b52670c8ed1943ab75f20e86d1c7b95f3a0";
    make_key_file();
    listen.shared_key = key_file;
    listen.allow = dial.allow = allow;
    dial.shared_key = two;
    meet_and_part(&listen, &dial);
    dial.shared_key = "callback:key";
    dial.load = load_key;
    meet_and_part(&listen, &dial);
    remove_key_file();
}

static void scenario_pins(void) {
    netchan_options listen = fault_options(), dial;
    listen.shared_key = NULL;
    listen.pin = pins;
    dial = listen;
    listen.cert = alice.cert;
    listen.cert_key = alice.key;
    dial.cert = bob.cert;
    dial.cert_key = bob.key;
    meet_and_part(&listen, &dial);
}

static void scenario_ca(void) {
    netchan_options listen = fault_options(), dial;
    listen.shared_key = NULL;
    listen.ca = authority.cert;
    dial = listen;
    listen.cert = alice.cert;
    listen.cert_key = alice.key;
    dial.cert = bob.cert;
    dial.cert_key = bob.key;
    meet_and_part(&listen, &dial);
}

static void scenario_insecure(void) {
    netchan_options o = fault_options();
    o.shared_key = NULL;
    o.insecure = true;
    meet_and_part(&o, &o);
}

static void scenario_tools(void) {
    char key[NETCHAN_KEY_SIZE], id[NETCHAN_KEY_ID_SIZE], pin[NETCHAN_FINGERPRINT_SIZE];
    while (again(netchan_keygen(key, sizeof key))) continue;
    while (again(netchan_key_id(key, id, sizeof id))) continue;
    while (again(netchan_fingerprint(alice.cert, pin, sizeof pin))) continue;
    CHECK_STR(pin, alice.pin);
}

/* --- scenarios over links ----------------------------------------------------------------------------------------- */

/* Two values wait in a buffer when their listener hangs up: the next one at its address gets them. */
static void scenario_buffers(void) {
    netchan_options o = fault_options();
    o.buffer = 4;
    o.linger_ms = 3000;
    pair p = open_pair(&o, &o);
    netchan_value v;
    char address[64];
    int sent = 0, came = 0;
    both_ways(&p, 1);
    snprintf(address, sizeof address, "%s", p.l->address);
    for (int i = 0; i < 4; i++)
        while (again(netchan_send(p.d->send, netchan_int(i), LONG))) continue;
    sent = 4;
    for (int i = 0; i < 2; i++) {
        while (again(netchan_recv(p.l->recv, &v, LONG))) continue;
        came += netchan_as_int(&v, -1) == came;
    }
    netchan_report r = hang(p.l);
    netchan_stats stats;
    p.l = open_listener(address, &o);
    while (came < sent) { /* in their order */
        CHECK_INT(netchan_get_stats(p.d, &stats), NETCHAN_OK);
        int result = netchan_recv(p.l->recv, &v, stats.lost || r.unreceived ? 1500 : LONG);
        if (result == NETCHAN_ETIMEDOUT) break;
        if (again(result)) continue;
        int64_t n = netchan_as_int(&v, -1);
        if (n != came) forgive(__LINE__, A_FAILURE, NETCHAN_ELOST, "a value is missing");
        CHECK(n >= came);
        missing += (size_t)(n - came);
        came = (int)n + 1;
    }
    if (came < sent) forgive(__LINE__, A_FAILURE, NETCHAN_ELOST, "values are missing");
    missing += (size_t)(sent - came);
    both_ways(&p, 100);
    close_pair(&p);
}

/* Values that need many frames. */
static void scenario_large(void) {
    enum { SIZE = 200000 };
    uint8_t *data = noise(SIZE);
    for (size_t buffer = 0; buffer <= 2; buffer += 2) {
        netchan_options o = fault_options();
        o.buffer = buffer;
        pair p = open_pair(&o, &o);
        for (int i = 0; i < 2; i++) {
            way w = way_of(&p, i);
            netchan_value got;
            size_t size;
            while (pass(w.send, w.recv, netchan_bytes(data, SIZE), &got) != NETCHAN_OK) continue;
            const void *bytes = netchan_as_block(&got, NETCHAN_BYTES, &size);
            CHECK(size == SIZE && memcmp(bytes, data, SIZE) == 0);
            netchan_clear(&got);
        }
        close_pair(&p);
    }
    free(data);
}

/* A channel, or an end of it, goes over the link. Returns what the other side has then, to be freed, or NULL. */
static netchan *pass_chan(way w, netchan *ch, bool receives) {
    netchan_value got;
    if (pass(w.send, w.recv, receives ? netchan_receiver(ch) : netchan_sender(ch), &got) != NETCHAN_OK) return NULL;
    netchan *end = netchan_retain(netchan_as_chan(&got));
    netchan_clear(&got);
    if (!end) forgive(__LINE__, A_FAILURE, NETCHAN_ENOMEM, "an end came as nil");
    return end;
}

/* Values go over an end of the channel: one small, one large. Returns whether it worked. */
static bool over(netchan *end, netchan *ch, bool receives) {
    static uint8_t large[40000];
    netchan_value got;
    netchan *send = receives ? ch : end, *recv = receives ? end : ch;
    if (!end) return false;
    if (pass_int(send, recv, 42) != NETCHAN_OK) return false;
    if (pass(send, recv, netchan_bytes(large, sizeof large), &got) != NETCHAN_OK) return false;
    CHECK_INT(netchan_count(&got), sizeof large);
    netchan_clear(&got);
    return true;
}

static void scenario_ends(void) {
    netchan_options o = fault_options();
    pair p = open_pair(&o, &o);
    for (int i = 0; i < 4; i++) {
        bool worked = false;
        while (!worked) {
            netchan *ch = make(i & 2 ? 2 : 0), *end = pass_chan(way_of(&p, i & 1), ch, i & 2);
            worked = over(end, ch, i & 2);
            netchan_free(end);
            netchan_free(ch);
        }
    }
    both_ways(&p, 1);
    close_pair(&p);
}

/* An end goes over one link and then over another: the process between them relays. */
static void scenario_relays(void) {
    netchan_options o = fault_options();
    pair near = open_pair(&o, &o), far = open_pair(&o, &o);
    for (int i = 0; i < 2; i++) {
        bool worked = false;
        while (!worked) {
            netchan *ch = make(0), *middle = pass_chan(way_of(&near, i), ch, i);
            netchan *end = middle ? pass_chan(way_of(&far, !i), middle, i) : NULL;
            worked = over(end, ch, i);
            netchan_free(end);
            netchan_free(middle);
            netchan_free(ch);
        }
    }
    both_ways(&near, 1);
    both_ways(&far, 1);
    close_pair(&far);
    close_pair(&near);
}

static void scenario_names(void) {
    netchan_options o = fault_options();
    pair p = open_pair(&o, &o);
    netchan *ch = make(0), *end;
    int result;
    while (again(netchan_export(p.l, "name", ch, NETCHAN_SENDER))) continue;
    for (bool worked = false; !worked;) {
        while (again(result = netchan_import(p.d, "name", NETCHAN_SENDER, &end, LONG))) CHECK(!end);
        CHECK_INT(result, NETCHAN_OK);
        worked = pass_int(end, ch, 1) == NETCHAN_OK;
        netchan_free(end);
    }
    do result = netchan_import(p.d, "nobody", NETCHAN_SENDER, &end, NETCHAN_NOWAIT);
    while (result != NETCHAN_ETIMEDOUT && again(result));
    CHECK_INT(netchan_unexport(p.l, "name"), NETCHAN_OK);
    netchan_free(ch);
    both_ways(&p, 1);
    close_pair(&p);
}

/* Receives n at each of the diallers, once, or what comes instead of it when a session was lost. */
static void hear(netchan_link **d, int count, int64_t n, bool certain) {
    for (int i = 0; i < count; i++) {
        netchan_value v;
        int result;
        do result = netchan_recv(d[i]->recv, &v, certain ? LONG : 1000);
        while (result != NETCHAN_ETIMEDOUT && again(result));
        if (result != NETCHAN_OK) forgive(__LINE__, A_FAILURE, result, "it was not reached");
        else CHECK_INT(netchan_as_int(&v, -1), n);
    }
}

static void *broadcast(void *arg) {
    task *t = (task *)arg;
    size_t reached = 99;
    t->result = netchan_broadcast((netchan_link *)(void *)t->ch, netchan_int(5), &reached, 2000);
    t->count = reached;
    return NULL;
}

/* Two peers, who are spoken to alone, together, and through what accept gives for them. */
static void scenario_peers(void) {
    netchan_options o = fault_options();
    netchan_link *l = open_listener("127.0.0.1:0", &o), *d[2];
    uint64_t numbers[2] = {0, 0};
    netchan_value v;
    for (int i = 0; i < 2; i++) d[i] = open_dialler(l->address, &o);
    for (int i = 0; i < 2; i++) {
        pass_over(d[i]->send, l->recv, i);
        carrier c;
        netchan_peer from = {0};
        start_carrier(&c, d[i]->send, netchan_int(i));
        while (again(netchan_recvfrom(l->recv, &v, &from, LONG))) continue;
        test_join(c.thread);
        numbers[i] = from.id;
    }
    task t;
    memset(&t, 0, sizeof t);
    t.ch = (netchan *)(void *)l;
    t.thread = test_start(broadcast, &t);
    hear(d, 2, 5, mercy != A_FAILURE);
    test_join(t.thread);
    if (t.result != NETCHAN_OK) forgive(__LINE__, A_FAILURE, t.result, netchan_strerror(t.result));
    for (int i = 0; i < 2; i++) {
        netchan_peer to = {numbers[i]};
        task r;
        start_recv(&r, d[i]->recv, 1000);
        int result = netchan_sendto(l, to, netchan_int(7), 1000);
        int received = end_task(&r);
        if (result == NETCHAN_OK) CHECK_INT(received, NETCHAN_OK);
        else forgive(__LINE__, A_FAILURE, result, netchan_errmsg());
        netchan_clear(&r.value);
    }
    int result = netchan_recv(l->accept, &v, NETCHAN_NOWAIT);
    if (result == NETCHAN_OK) {
        netchan *send = netchan_retain(netchan_as_chan(netchan_get(&v, "send")));
        netchan_clear(&v);
        CHECK(send);
        netchan_free(send);
    } else forgive(__LINE__, A_FAILURE, result, netchan_strerror(result));
    for (int i = 0; i < 2; i++) hang_clean(d[i]);
    hang_clean(l);
}

/* Links that are cut, again and again. */
static void scenario_cuts(void) {
    netchan_options o = fault_options();
    pair p;
    proxy cable;
    netchan *ch = make(0), *end = NULL;
    p.l = open_listener("127.0.0.1:0", &o);
    proxy_start(&cable, p.l->address);
    p.d = open_dialler(cable.address, &o);
    for (int i = 0; i < 3; i++) {
        both_ways(&p, 10 * i);
        proxy_cut(&cable);
    }
    while (!over(end = pass_chan(way_of(&p, 0), ch, false), ch, false)) netchan_free(end);
    proxy_cut(&cable);
    if (pass_int(end, ch, 9) != NETCHAN_OK) CHECK(mercy == A_FAILURE);
    netchan_free(end);
    netchan_free(ch);
    both_ways(&p, 100);
    hang_clean(p.d);
    wait_for_no_peers(p.l);
    proxy_stop(&cable);
    hang_clean(p.l);
}

/* Selects on both sides of a link, over ends. */
static void scenario_selects(void) {
    netchan_options o = fault_options();
    pair p = open_pair(&o, &o);
    netchan *ch[2], *ends[2] = {NULL, NULL};
    for (int i = 0; i < 2; i++) {
        ch[i] = make(0);
        while (!over(ends[i] = pass_chan(way_of(&p, 0), ch[i], false), ch[i], false)) netchan_free(ends[i]);
    }
    for (int i = 0; i < 4; i++) {
        netchan_value got[2];
        netchan_case sends[2], recvs[2];
        task t;
        for (int k = 0; k < 2; k++) {
            sends[k] = netchan_case_send(ends[k], rich());
            recvs[k] = netchan_case_recv(ch[k], &got[k]);
        }
        start_select(&t, sends, 2, 2000);
        int came;
        while (again(came = netchan_select(recvs, 2, 2500))) continue;
        int sent = end_task(&t);
        int result = sent < 0 ? sent : sends[sent].result;
        if (came >= 0 && recvs[came].result == NETCHAN_OK) {
            check_rich(&got[came]);
            if (result == NETCHAN_OK) CHECK_INT(came, sent);
            else CHECK_INT(result, NETCHAN_EUNKNOWN);
        } else if (result == NETCHAN_OK) test_fail(__FILE__, __LINE__, "a value is lost");
        if (result != NETCHAN_OK) forgive(__LINE__, A_FAILURE, result, netchan_strerror(result));
    }
    for (int i = 0; i < 2; i++) {
        netchan_free(ends[i]);
        netchan_free(ch[i]);
    }
    both_ways(&p, 1);
    close_pair(&p);
}

/* More links than any array has room for at first. */
static void scenario_many(void) {
    enum { MANY = 18 };
    netchan_options o = fault_options();
    netchan_link *l = open_listener("127.0.0.1:0", &o), *d[MANY];
    for (int i = 0; i < MANY; i++) {
        d[i] = open_dialler(l->address, &o);
        pass_over(d[i]->send, l->recv, i);
    }
    for (int i = 0; i < MANY; i++) pass_over(d[i]->send, l->recv, i);
    for (int i = 0; i < MANY; i++) hang_clean(d[i]);
    hang_clean(l);
}

/* A socket that somebody else has opened. When there is no link, it stays theirs. */
static void scenario_inherited(void) {
    netchan_options o = fault_options();
    uint16_t port;
    int fd = hold_port(&port);
    pair p;
    CHECK_INT(listen(fd, 8), 0);
    o.listen_fd = fd;
    p.l = open_listener(NULL, &o);
    o.listen_fd = 0;
    p.d = open_dialler(p.l->address, &o);
    both_ways(&p, 1);
    close_pair(&p);
}

/* --- the sweep ---------------------------------------------------------------------------------------------------- */

static int open_descriptors(void) {
    DIR *list = opendir("/proc/self/fd");
    int count = 0;
    if (!list) return 0; /* not Linux */
    while (readdir(list)) count++;
    closedir(list);
    return count;
}

static long setting(const char *name) {
    const char *text = getenv(name);
    return text ? atol(text) : 0;
}

/* What fails in a sweep: netchan.h's allocations, those of mbedTLS, or calls of the system. */
typedef struct kind {
    const char *name;
    enum fault_call call; /* FAULT_NONE: allocations */
    int error;
    enum mercy mercy;
} kind;

static const kind of_netchan = {"netchan's allocation", FAULT_NONE, 0, A_FAILURE};
static const kind of_mbedtls = {"mbedTLS's allocation", FAULT_NONE, 1, A_FAILURE};

static void arm(const kind *k, long n) {
    mercy = n ? k->mercy : NOTHING;
    __atomic_store_n(&forgiven, 0, __ATOMIC_SEQ_CST);
    missing = told = 0;
    if (k->call) fault_set(k->call, k->error, n);
    else if (k == &of_netchan) alloc_fail(n);
    else calloc_fail(n);
}

static long counted(const kind *k) {
    return k->call ? fault_count() : k == &of_netchan ? alloc_count() : calloc_count();
}

static void disarm(void) {
    alloc_fail(0);
    calloc_fail(0);
    fault_set(FAULT_NONE, 0, 0);
}

/* Runs the scenario with the n-th failing, or none. Returns how many there were. */
static long run_once(void (*scenario)(void), const char *name, const kind *k, long n, bool *failed) {
    static char label[160];
    int descriptors = open_descriptors();
    if (!k->call || !n) disarm();
    snprintf(label, sizeof label, "%s, %s, n = %ld", name, k->name, n);
    if (setting("NETCHAN_TEST_TRACE")) fprintf(stderr, "%s\n", label);
    test_name = label;
    arm(k, n);
    long before = k->call ? 0 : counted(k);
    long long start = test_ms();
    scenario();
    long count = counted(k) - before;
    *failed = hit();
    disarm();
    mbedtls_psa_crypto_free(); /* the next one begins from nothing, too */
    CHECK_INT(alloc_blocks(), 0);
    CHECK_INT(open_descriptors(), descriptors);
    if (missing > told) test_fail(__FILE__, __LINE__, "%zu values are lost, and %zu were reported", missing, told);
    if (setting("NETCHAN_TEST_TRACE") && test_ms() - start > 1000)
        fprintf(stderr, "  took %lld ms\n", test_ms() - start);
    return count;
}

/* Lets the n-th fail, for every n, or for some: half of them the first, the others here and there among the rest. */
static void sweep(void (*scenario)(void), const char *name, const kind *k, long runs) {
    bool failed;
    long only = setting("NETCHAN_TEST_N"), count = run_once(scenario, name, k, 0, &failed), n = 1;
    if (setting("NETCHAN_TEST_RUNS")) runs = setting("NETCHAN_TEST_RUNS");
    long stride = count <= runs ? 1 : (count - runs / 2) / (runs - runs / 2) + 1;
    unsigned seconds = FEWER > 1 ? 300 : 60;
    if (only) {
        run_once(scenario, name, k, only, &failed);
        return;
    }
    do {
        alarm(seconds);
        run_once(scenario, name, k, n, &failed);
        n += n < runs / 2 ? 1 : stride;
    } while (failed);
    mercy = NOTHING;
    run_once(scenario, name, k, 0, &failed); /* nothing that failed has a consequence for ever */
}

/* --- tests -------------------------------------------------------------------------------------------------------- */

enum { RUNS = FEWER > 1 ? 6 : 20, FEW_RUNS = RUNS / 2, CALL_RUNS = FEWER > 1 ? 2 : 4, FEW_CALL_RUNS = 2 };

/* One scenario without enough memory, of netchan.h and of mbedTLS. */
#ifdef REAL_CALLOC
#define MEMORY(scenario, runs)                                                                                         \
    static void test_memory_##scenario(void) {                                                                         \
        make_people();                                                                                                 \
        sweep(scenario_##scenario, #scenario, &of_netchan, runs);                                                      \
        sweep(scenario_##scenario, #scenario, &of_mbedtls, runs);                                                      \
    }
#else
#define MEMORY(scenario, runs)                                                                                         \
    static void test_memory_##scenario(void) {                                                                         \
        make_people();                                                                                                 \
        sweep(scenario_##scenario, #scenario, &of_netchan, runs);                                                      \
    }
#endif

MEMORY(values, RUNS)
MEMORY(local, RUNS)
MEMORY(shared_key, RUNS)
MEMORY(keys, RUNS)
MEMORY(pins, RUNS)
MEMORY(ca, RUNS)
MEMORY(insecure, RUNS)
MEMORY(tools, RUNS)
MEMORY(buffers, FEW_RUNS)
MEMORY(large, RUNS)
MEMORY(ends, RUNS)
MEMORY(relays, RUNS)
MEMORY(names, RUNS)
MEMORY(peers, RUNS)
MEMORY(cuts, RUNS)
MEMORY(selects, RUNS)
MEMORY(many, FEW_RUNS)
MEMORY(inherited, RUNS)

/* How the system may fail: a row for each function and way. */
#define WAY(call, error, mercy) {#call " " #error, FAULT_##call, error, mercy}
static const kind ways[] = {
    WAY(ACCEPT, EINTR, NOTHING),        WAY(ACCEPT, EAGAIN, NOTHING),        WAY(ACCEPT, ECONNABORTED, NOTHING),
    WAY(ACCEPT, EMFILE, NOTHING),       WAY(ACCEPT, ENFILE, NOTHING),        WAY(ACCEPT, ENOBUFS, NOTHING),
    WAY(BIND, EADDRINUSE, A_REFUSAL),   WAY(BIND, EACCES, A_REFUSAL),        WAY(CLOSE, EINTR, NOTHING),
    WAY(CONNECT, EINTR, NOTHING),       WAY(CONNECT, ECONNREFUSED, NOTHING), WAY(CONNECT, ENETUNREACH, NOTHING),
    WAY(CONNECT, EAGAIN, NOTHING),      WAY(FCNTL, EINVAL, A_REFUSAL),       WAY(GETADDRINFO, EAI_AGAIN, A_REFUSAL),
    WAY(GETADDRINFO, EAI_MEMORY, A_REFUSAL), WAY(GETADDRINFO, EAI_FAIL, A_REFUSAL),
    WAY(GETSOCKNAME, ENOBUFS, A_REFUSAL),    WAY(GETSOCKOPT, ECONNREFUSED, A_REFUSAL),
    WAY(GETSOCKOPT, ENOBUFS, A_REFUSAL), WAY(LISTEN, EADDRINUSE, A_REFUSAL), WAY(OPEN, EMFILE, A_REFUSAL),
    WAY(OPEN, EINTR, A_REFUSAL),        WAY(PIPE, EMFILE, A_REFUSAL),        WAY(PIPE, ENFILE, A_REFUSAL),
    WAY(POLL, EINTR, NOTHING),          WAY(POLL, EAGAIN, NOTHING),          WAY(POLL, ENOMEM, NOTHING),
    WAY(PTHREAD_CREATE, EAGAIN, A_REFUSAL), WAY(RANDOM, 0, A_FAILURE),       WAY(READ, EINTR, NOTHING),
    WAY(READ, FAULT_SHORT, NOTHING),    WAY(READ, EIO, A_REFUSAL),           WAY(RECV, EINTR, NOTHING),
    WAY(RECV, EAGAIN, NOTHING),         WAY(RECV, ENOBUFS, NOTHING),         WAY(RECV, ECONNRESET, NOTHING),
    WAY(RECV, FAULT_SHORT, NOTHING),    WAY(RECV, FAULT_END, NOTHING),       WAY(SEND, EINTR, NOTHING),
    WAY(SEND, EAGAIN, NOTHING),         WAY(SEND, ENOBUFS, NOTHING),         WAY(SEND, FAULT_SHORT, NOTHING),
    WAY(SEND, EPIPE, NOTHING),          WAY(SEND, ECONNRESET, NOTHING),      WAY(SETSOCKOPT, EINVAL, NOTHING),
    WAY(SOCKET, EMFILE, A_REFUSAL),     WAY(SOCKET, ENOBUFS, A_REFUSAL),     WAY(WRITE, EINTR, NOTHING),
};

/* What it does about many connections at once, where it has that. */
static const kind ways_of_sets[] = {
    WAY(EPOLL_CREATE, EMFILE, NOTHING), WAY(EPOLL_CREATE, ENOSYS, NOTHING), WAY(EPOLL_CTL, ENOMEM, NOTHING),
    WAY(EPOLL_CTL, ENOSPC, NOTHING),    WAY(EPOLL_WAIT, EINTR, NOTHING),
};

static void sweep_ways(void (*scenario)(void), const char *name, const kind *kinds, size_t count, long runs) {
    make_people();
    for (size_t i = 0; i < count; i++) {
        alarm(FEWER > 1 ? 300 : 60);
        sweep(scenario, name, &kinds[i], runs);
    }
}

static void sweep_calls(void (*scenario)(void), const char *name, long runs) {
    sweep_ways(scenario, name, ways, sizeof ways / sizeof *ways, runs);
}

#define CALLS(scenario, runs)                                                                                          \
    static void test_calls_##scenario(void) {                                                                          \
        sweep_calls(scenario_##scenario, #scenario, runs);                                                             \
    }

CALLS(keys, FEW_CALL_RUNS)
CALLS(ends, CALL_RUNS)
CALLS(cuts, FEW_CALL_RUNS)
CALLS(inherited, FEW_CALL_RUNS)

static void test_calls_many(void) {
    sweep_ways(scenario_many, "many", ways_of_sets, sizeof ways_of_sets / sizeof *ways_of_sets, CALL_RUNS);
}

int main(int argc, char **argv) {
    static const test_entry tests[] = {
        TEST(memory_values), TEST(memory_local),    TEST(memory_shared_key), TEST(memory_keys),   TEST(memory_pins),
        TEST(memory_ca),     TEST(memory_insecure), TEST(memory_tools),      TEST(memory_buffers), TEST(memory_large),
        TEST(memory_ends),   TEST(memory_relays),   TEST(memory_names),      TEST(memory_peers),  TEST(memory_cuts),
        TEST(memory_selects), TEST(memory_many),    TEST(memory_inherited),  TEST(calls_keys),    TEST(calls_ends),
        TEST(calls_cuts),    TEST(calls_inherited), TEST(calls_many),    TEST_END};
    return test_main(argc, argv, tests);
}
