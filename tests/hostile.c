/* Peers that have the right key, speak the frames, and mean harm: in each frame and in both directions, wrong lengths,
 * ids, order and sizes; and all that could take memory or time from this process. Each attack ends the session of who
 * makes it, in words that name the breach; an honest session that goes on all the while notices nothing; and the memory
 * stays within what the options promise. The attackers have an encoder of their own, see raw.h.
 *
 * With HOSTILE_TIMES set it tells how many bytes were held, and how long things took; SEED is where chance begins. */
#include "alloc.h"

#include <stddef.h>

/* The bytes that netchan.h holds, and the most since hold_from(). Each block has its size before it. */
static size_t held, held_most; /* atomic */

enum { HEAD = sizeof(max_align_t) };

static void note_held(size_t size, bool more) {
    size_t now = more ? __atomic_add_fetch(&held, size, __ATOMIC_RELAXED)
                      : __atomic_sub_fetch(&held, size, __ATOMIC_RELAXED);
    size_t most = __atomic_load_n(&held_most, __ATOMIC_RELAXED);
    while (now > most && more &&
           !__atomic_compare_exchange_n(&held_most, &most, now, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        continue;
}

static void *sized_malloc(size_t size) {
    size_t *block = (size_t *)alloc_malloc(HEAD + size);
    if (!block) return NULL;
    *block = size;
    note_held(size, true);
    return (char *)block + HEAD;
}

static void sized_free(void *p) {
    if (!p) return;
    size_t *block = (size_t *)(void *)((char *)p - HEAD);
    note_held(*block, false);
    alloc_free(block);
}

static inline void *sized_realloc(void *old, size_t size) __attribute__((unused));
static inline void *sized_realloc(void *old, size_t size) {
    void *p = sized_malloc(size);
    size_t before = old ? *(size_t *)(void *)((char *)old - HEAD) : 0;
    for (size_t i = 0; p && i < before && i < size; i++) ((char *)p)[i] = ((char *)old)[i];
    if (p) sized_free(old);
    return p;
}

#undef NETCHAN_MALLOC
#undef NETCHAN_REALLOC
#undef NETCHAN_FREE
#define NETCHAN_MALLOC(size) sized_malloc(size)
#define NETCHAN_REALLOC(ptr, size) sized_realloc(ptr, size)
#define NETCHAN_FREE(ptr) sized_free(ptr)

#define NETCHAN_WINDOW 100000
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"
#include "test.h"
#include "task.h"
#include "net.h"
#include "raw.h"

enum {
    SOON = 5000 * (FEWER > 1 ? 4 : 1), /* ms: a session that is to end has ended by then */
    LATE = 4000 * (FEWER > 1 ? 4 : 1), /* ms: an honest exchange never takes so long, whatever others do */
    RESUME_MS = 300,
    KIB = 1024,
    MIB = 1 << 20
};

/* --- what is allowed ---------------------------------------------------------------------------------------------- */

static netchan_options narrow(void) {
    netchan_options o = options();
    o.max_message = 64 * KIB;
    o.max_memory = 1 * MIB;
    o.max_ops = 60;
    o.max_ends = 20;
    o.resume_ms = RESUME_MS;
    o.linger_ms = 200;
    return o;
}

/* What one peer can make this process hold: max_memory, and as much again, with the window, for what it is sent and
 * does not read; that lies in a buffer which doubles, and has its old half beside it meanwhile. And a bit for each
 * operation, question and end, of which twice as many may be under way. */
static size_t budget(const netchan_options *o) {
    return o->max_memory + 3 * (o->max_memory + NETCHAN_WINDOW) + 2 * o->max_ops * KIB + 4 * o->max_ends * KIB +
           256 * KIB;
}

static size_t hold_from(void) {
    size_t now = __atomic_load_n(&held, __ATOMIC_RELAXED);
    __atomic_store_n(&held_most, now, __ATOMIC_RELAXED);
    return now;
}

static size_t held_since(size_t from) {
    size_t most = __atomic_load_n(&held_most, __ATOMIC_RELAXED);
    return most > from ? most - from : 0;
}

/* --- findings: a table is gone through to its end ----------------------------------------------------------------- */

static int failures;

static void note_failure(const char *row, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void note_failure(const char *row, const char *format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    printf("FAIL %s: \"%s\": %s\n", test_name, row, text);
    fflush(stdout);
    failures++;
}

static void check_failures(void) {
    if (failures) test_fail(__FILE__, __LINE__, "%d of these were not as they should be", failures);
}

/* Takes events until one of this name comes, in time. Returns whether it did and its reason has the word in it;
 * `got` is what there was instead. Those who did not come back are of attacks before. */
static bool await(netchan_link *link, const char *event, const char *word, char *got, size_t size) {
    static const char gone[] = "did not come back";
    for (long long end = test_ms() + SOON, left; (left = end - test_ms()) > 0;) {
        netchan_value v;
        if (netchan_recv(link->events, &v, (int)left) != NETCHAN_OK) break;
        const char *reason = text_of(&v, "reason");
        bool old = strstr(reason, gone) && !strstr(gone, word), found = is_event(&v, event) && !old;
        bool named = strstr(reason, word) && *text_of(&v, "address");
        if (found) snprintf(got, size, "%s", reason);
        netchan_clear(&v);
        if (found) return named;
    }
    snprintf(got, size, "nothing");
    return false;
}

static void expect(netchan_link *link, const char *event, const char *word) {
    char got[256];
    if (!await(link, event, word, got, sizeof got))
        test_fail(__FILE__, __LINE__, "%s for \"%s\" was expected; there was: %s", event, word, got);
}

/* --- a house: a listener with an honest peer ---------------------------------------------------------------------- */

typedef struct house {
    netchan_link *l, *good, *friend; /* good exchanges values all the time; friend when asked */
    netchan_link *home, *way;        /* an honest listener that l relays to; NULL unless open_home() was called */
    netchan *home_ch, *ends[2];      /* its channel, exported by l as "into" and "out of", and what l has of it */
    netchan_value shown;
    netchan *ch;                     /* exported as "in" and "out" */
    pthread_t threads[2];
    bool stop;                       /* atomic */
    uint64_t count;                  /* of exchanges; atomic */
    long long worst;                 /* ms; atomic */
} house;

static void *honest_listener(void *arg) {
    house *h = (house *)arg;
    netchan *in = netchan_as_chan(netchan_get(&h->shown, "recv")),
            *out = netchan_as_chan(netchan_get(&h->shown, "send"));
    for (int64_t n = 0, got;; n++) {
        netchan_value v;
        CHECK_INT(netchan_recv(in, &v, NETCHAN_FOREVER), NETCHAN_OK);
        if (netchan_is_nil(&v)) return NULL;
        got = netchan_as_int(&v, -1);
        CHECK_INT(got, n);
        CHECK_INT(netchan_send(out, netchan_int(n + 1), NETCHAN_FOREVER), NETCHAN_OK);
    }
}

static void *honest_dialler(void *arg) {
    house *h = (house *)arg;
    for (int64_t n = 0; !__atomic_load_n(&h->stop, __ATOMIC_ACQUIRE); n++) {
        netchan_value v;
        long long start = test_ms();
        CHECK_INT(netchan_send(h->good->send, netchan_int(n), NETCHAN_FOREVER), NETCHAN_OK);
        CHECK_INT(netchan_recv(h->good->recv, &v, NETCHAN_FOREVER), NETCHAN_OK);
        CHECK_INT(netchan_as_int(&v, -1), n + 1);
        long long took = test_ms() - start;
        if (took > __atomic_load_n(&h->worst, __ATOMIC_RELAXED)) __atomic_store_n(&h->worst, took, __ATOMIC_RELAXED);
        __atomic_store_n(&h->count, (uint64_t)n + 1, __ATOMIC_RELEASE);
        test_pause(1); /* others are to be measured, not this */
    }
    CHECK_INT(netchan_send(h->good->send, netchan_nil(), LONG), NETCHAN_OK);
    return NULL;
}

static void open_house(house *h, const netchan_options *o) {
    netchan_options mine = options();
    memset(h, 0, sizeof *h);
    h->l = listen_with(o);
    h->good = dial_with(h->l->address, &mine);
    CHECK_INT(netchan_recv(h->l->accept, &h->shown, LONG), NETCHAN_OK);
    h->friend = dial_with(h->l->address, &mine);
    h->ch = netchan_make(0);
    CHECK(h->ch);
    CHECK_INT(netchan_export(h->l, "in", h->ch, NETCHAN_SENDER), NETCHAN_OK);
    CHECK_INT(netchan_export(h->l, "out", h->ch, NETCHAN_RECEIVER), NETCHAN_OK);
    h->threads[0] = test_start(honest_listener, h);
    h->threads[1] = test_start(honest_dialler, h);
}

/* The listener relays to a channel of another, under two names. */
static void open_home(house *h) {
    static const char *const names[] = {"into", "out of"};
    netchan_options o = options();
    h->home = listen_with(&o);
    h->way = dial_with(h->home->address, &o);
    h->home_ch = netchan_make(0);
    CHECK(h->home_ch);
    for (int i = 0; i < 2; i++) {
        enum netchan_type end = i ? NETCHAN_RECEIVER : NETCHAN_SENDER;
        CHECK_INT(netchan_export(h->home, names[i], h->home_ch, end), NETCHAN_OK);
        CHECK_INT(netchan_import(h->way, names[i], end, &h->ends[i], LONG), NETCHAN_OK);
        CHECK_INT(netchan_export(h->l, names[i], h->ends[i], end), NETCHAN_OK);
    }
}

static void close_home(house *h) {
    check_no_event(h->home, "lost");
    check_no_event(h->way, "lost");
    for (int i = 0; i < 2; i++) netchan_free(h->ends[i]);
    netchan_free(h->home_ch);
    netchan_hangup(h->way, NULL);
    netchan_hangup(h->home, NULL);
}

/* The honest session goes on, and has never stood still. */
static void check_honest(house *h, const char *row) {
    uint64_t before = __atomic_load_n(&h->count, __ATOMIC_ACQUIRE);
    long long start = test_ms();
    while (__atomic_load_n(&h->count, __ATOMIC_ACQUIRE) < before + 2 && test_ms() < start + SOON) test_pause(1);
    if (__atomic_load_n(&h->count, __ATOMIC_ACQUIRE) < before + 2) note_failure(row, "the honest session stands still");
    long long worst = __atomic_exchange_n(&h->worst, 0, __ATOMIC_RELAXED);
    if (worst > LATE) note_failure(row, "an honest exchange took %lld ms", worst);
}

static void close_house(house *h) {
    check_honest(h, "the end");
    __atomic_store_n(&h->stop, true, __ATOMIC_RELEASE);
    for (int i = 0; i < 2; i++) test_join(h->threads[i]);
    for (netchan_value v; netchan_recv(h->good->events, &v, NETCHAN_NOWAIT) == NETCHAN_OK; netchan_clear(&v))
        CHECK_STR(text_of(&v, "event"), "up");
    netchan_clear(&h->shown);
    netchan_free(h->ch);
    hang_up(h->good);
    hang_up(h->friend);
    netchan_hangup(h->l, NULL); /* values that were sent to attackers may be unknown */
    if (h->home) close_home(h);
    CHECK_INT(alloc_blocks(), 0);
    CHECK_INT(__atomic_load_n(&held, __ATOMIC_RELAXED), 0);
    check_failures();
}

/* --- a stage: one attacker, and what its victim does meanwhile ---------------------------------------------------- */

enum { TASKS = 8 };

typedef struct stage {
    netchan_link *link;     /* the victim's */
    raw *r;                 /* the attacker */
    netchan *far;           /* an end that the attacker gave to the victim */
    house *house;
    netchan *through;       /* the same, as friend has it: the victim relays */
    uint64_t e, m, x;       /* entry and match, or the number of an end, of what came last */
    uint64_t counter;       /* of entries */
    bool over;              /* the victim has closed the connection */
    netchan *stop;          /* the second case of a select; closed at the end */
    task tasks[TASKS];
    netchan_case cases[TASKS][2];
    netchan_value values[TASKS];
    size_t count;
    bytes out;              /* frames that were not sent yet */
} stage;

static void flush_stage(stage *s) {
    if (s->out.size && !s->over && !raw_send(s->r, s->out.data, s->out.size)) s->over = true;
    s->out.size = 0;
}

/* Remembers what it names. */
static void learn(stage *s, frame *f) {
    unsigned type = f->type;
    if (type == OFFER || type == DEMAND || type == CREDIT) s->x = get_number(f);
    if (type == IMPORTED && f->size > 10) f->at = f->size - 17, s->x = get_name(f).id;
    if (type == OFFER || type == DEMAND || type == CLAIM || type == COMMIT) s->e = get_number(f);
    if (type == CLAIM || type == COMMIT || type == GRANT) s->m = get_number(f);
}

/* The next frame of this type; what comes before it is dropped. */
static void stage_frame(stage *s, unsigned type) {
    frame f;
    flush_stage(s);
    do {
        if (s->over || !raw_frame(s->r, &f)) {
            s->over = true;
            return;
        }
    } while (f.type != type);
    learn(s, &f);
}

/* Asks, and returns the number of the question. */
static uint64_t ask(stage *s) {
    static uint64_t question = 1000000;
    PUT(&s->out, PING, ++question);
    flush_stage(s);
    return question;
}

/* The victim has worked off all that was said, and answers. */
static bool is_alive(stage *s) {
    frame f;
    uint64_t question = ask(s), answer = 0;
    while (!s->over && answer != question) {
        if (!raw_frame(s->r, &f)) s->over = true;
        else if (f.type == PONG) answer = get_number(&f);
    }
    return !s->over;
}

/* Hears what there is, and remembers it. */
static void listen_to(stage *s) {
    frame f;
    uint64_t question = ask(s);
    for (bool more = true; more && !s->over;) {
        if (!raw_frame(s->r, &f)) s->over = true;
        else if (f.type == PONG) more = get_number(&f) != question;
        else learn(s, &f);
    }
}

/* ---- Scripts: statements with semicolons between them. ----
 *
 *     OFFER 0 # . 8 = : [ 05 end 0 9 0 ]   a frame: numbers, and after a colon bytes
 *     x1000 PING 5                         the same a thousand times
 *     <CLAIM                               waits for such a frame
 *     recv, recv2, send 5, send2 5         the victim receives, or sends so many bytes; 2: in a select of two cases
 *     frecv, frecv2, fsend 5, fsend2 5     the same at an end that it was given
 *     try, ftry                            it receives, and does not wait
 *     relay, osend 5, ...                  friend gets that end, too, by way of the victim; the same at that
 *     hsend 5, ...                         the same at the channel of the honest home to which the victim relays
 *     give 0 9 0                           gives it an end with these flags, number and capacity
 *     raw: 00, ack, quiet                  bytes without a frame; acknowledges all; waits until all was worked off
 *
 * Numbers: decimal, max and big (2^64 - 1, 2^63), # a new one, . the newest, = how many bytes follow the colon; e, m
 * and x are the entry, the match and the end in the frame that came last. Bytes: two hexadecimal digits, 9*ff is nine
 * of them, "text", [ ... ] an array, nest 64 so many arrays around what follows, end 0 9 0 the name of an end. */

static const struct word {
    const char *name;
    unsigned type;
} words[] = {
    {"HELLO", HELLO}, {"PING", PING}, {"PONG", PONG}, {"BYE", BYE}, {"ACK", ACK}, {"RESUME", RESUME},
    {"RESUMED", RESUMED}, {"REFUSED", REFUSED}, {"OFFER", OFFER}, {"DEMAND", DEMAND}, {"WITHDRAW", WITHDRAW},
    {"GRANT", GRANT}, {"DECLINE", DECLINE}, {"TAKEN", TAKEN}, {"DATA", DATA}, {"CLOSE", CLOSE},
    {"FRAGMENT_UP", FRAGMENT_UP}, {"DROP", DROP}, {"IMPORT", IMPORT}, {"FORGET", FORGET}, {"CLAIM", CLAIM},
    {"COMMIT", COMMIT}, {"RELEASE", RELEASE}, {"ACCEPT", ACCEPT}, {"WITHDRAWN", WITHDRAWN}, {"CREDIT", CREDIT},
    {"CLOSED", CLOSED}, {"RETURN", RETURN}, {"FRAGMENT_DOWN", FRAGMENT_DOWN}, {"CLOSING", CLOSING}, {"GONE", GONE},
    {"IMPORTED", IMPORTED},
};

static unsigned type_of(const char *name) {
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (strcmp(words[i].name, name) == 0) return words[i].type;
    test_fail(__FILE__, __LINE__, "no frame is called \"%s\"", name);
}

/* The next word of the statement; false at its end. */
static bool next_word(const char **at, char *word, size_t size) {
    size_t n = 0;
    while (**at == ' ') ++*at;
    if (!**at || **at == ';') return false;
    bool text = **at == '"';
    do {
        CHECK(n + 1 < size);
        word[n++] = *(*at)++;
    } while (**at && (text ? n < 2 || word[n - 1] != '"' : **at != ' ' && **at != ';'));
    word[n] = '\0';
    return true;
}

static uint64_t number_of(stage *s, const char *word, size_t tail) {
    if (strcmp(word, "max") == 0) return UINT64_MAX;
    if (strcmp(word, "big") == 0) return (uint64_t)1 << 63;
    switch (*word) {
    case 'e': return s->e;
    case 'm': return s->m;
    case 'x': return s->x;
    case '#': return ++s->counter;
    case '.': return s->counter;
    case '=': return tail;
    default: break;
    }
    char *end;
    uint64_t n = strtoull(word, &end, 10);
    if (*end) test_fail(__FILE__, __LINE__, "no number: \"%s\"", word);
    return n;
}

static void put_script_bytes(stage *s, const char **at, bytes *out);

/* One item. Returns false at the end of the statement, or of the array. */
static bool put_item(stage *s, const char **at, bytes *out) {
    char word[64];
    bytes inner;
    if (!next_word(at, word, sizeof word) || strcmp(word, "]") == 0) return false;
    if (*word == '[') {
        size_t count = 0;
        inner.size = 0;
        while (put_item(s, at, &inner)) count++;
        put_byte(out, 0x88);
        bytes head;
        head.size = 0;
        put_number(&head, count);
        put_number(out, head.size + inner.size);
        put_bytes(out, head.data, head.size);
        put_bytes(out, inner.data, inner.size);
    } else if (*word == '"') {
        put_bytes(out, word + 1, strlen(word) - 2);
    } else if (strcmp(word, "end") == 0) {
        uint64_t n[3];
        for (int i = 0; i < 3; i++) CHECK(next_word(at, word, sizeof word)), n[i] = number_of(s, word, 0);
        put_end(out, (unsigned)n[0], n[1], n[2]);
    } else if (strcmp(word, "nest") == 0) {
        CHECK(next_word(at, word, sizeof word));
        int depth = atoi(word);
        inner.size = 0;
        put_script_bytes(s, at, &inner);
        for (int i = 0; i < depth; i++) {
            bytes head;
            head.size = 0;
            put_byte(&head, 0x88);
            put_number(&head, inner.size + 1);
            put_byte(&head, 1);
            CHECK(head.size + inner.size <= sizeof inner.data);
            memmove(inner.data + head.size, inner.data, inner.size);
            memcpy(inner.data, head.data, head.size);
            inner.size += head.size;
        }
        put_bytes(out, inner.data, inner.size);
    } else {
        char *star = strchr(word, '*');
        unsigned long byte = strtoul(star ? star + 1 : word, NULL, 16);
        for (long n = star ? atol(word) : 1; n > 0; n--) put_byte(out, (unsigned)byte);
    }
    return true;
}

static void put_script_bytes(stage *s, const char **at, bytes *out) {
    while (put_item(s, at, out)) continue;
}

static void play_frame(stage *s, const char *name, const char **at) {
    char words_of[8][64], word[64];
    uint64_t numbers[8];
    size_t count = 0;
    static bytes tail;
    tail.size = 0;
    while (next_word(at, word, sizeof word)) {
        if (strcmp(word, ":") == 0) {
            put_script_bytes(s, at, &tail);
            break;
        }
        CHECK(count < 8);
        memcpy(words_of[count++], word, sizeof word);
    }
    for (size_t i = 0; i < count; i++) numbers[i] = number_of(s, words_of[i], tail.size);
    if (s->out.size + tail.size > sizeof s->out.data - 200) flush_stage(s);
    put_frame(&s->out, type_of(name), numbers, count, tail.data, tail.size);
}

/* The victim receives or sends, in a thread of its own. */
static void play_task(stage *s, const char *name, size_t size) {
    static const uint8_t zeros[200000];
    bool is_send = strstr(name, "send"), is_try = strstr(name, "try"), selects = strchr(name, '2');
    netchan *ch = is_send ? s->link->send : s->link->recv;
    if (*name == 'f') ch = s->far;
    if (*name == 'o') ch = s->through;
    if (*name == 'h') ch = s->house->home_ch;
    CHECK(ch && s->count < TASKS && size <= sizeof zeros);
    task *t = &s->tasks[s->count];
    netchan_case *c = s->cases[s->count];
    netchan_value *v = &s->values[s->count++];
    *v = is_send ? netchan_bytes(zeros, size) : netchan_nil();
    c[0] = is_send ? netchan_case_send(ch, *v) : netchan_case_recv(ch, v);
    c[1] = netchan_case_recv(s->stop, NULL);
    start_select(t, c, selects ? 2 : 1, is_try ? NETCHAN_NOWAIT : NETCHAN_FOREVER);
}

/* The victim receives an end. */
static void play_give(stage *s, const char **at) {
    uint64_t n[3], entry = ++s->counter;
    char word[64];
    bytes value;
    netchan_value v;
    for (int i = 0; i < 3; i++) CHECK(next_word(at, word, sizeof word)), n[i] = number_of(s, word, 0);
    value.size = 0;
    put_end(&value, (unsigned)n[0], n[1], n[2]);
    put_frame(&s->out, OFFER, (uint64_t[]){0, entry, entry, FIRM | HERE, value.size}, 5, value.data, value.size);
    flush_stage(s);
    netchan_free(s->far);
    for (s->far = NULL; !s->far; netchan_clear(&v)) { /* what others have left there goes before */
        CHECK_INT(netchan_recv(s->link->recv, &v, LONG), NETCHAN_OK);
        s->far = netchan_retain(netchan_as_chan(&v));
    }
}

/* Friend gets the end that the victim got. */
static void play_relay(stage *s) {
    task t;
    netchan_value v;
    pthread_mutex_lock(&netchan__net_lock);
    bool sends = s->far->may_send;
    pthread_mutex_unlock(&netchan__net_lock);
    start_recv(&t, s->house->friend->recv, LONG);
    v = sends ? netchan_sender(s->far) : netchan_receiver(s->far);
    CHECK_INT(netchan_send(s->link->send, v, LONG), NETCHAN_OK);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    s->through = netchan_retain(netchan_as_chan(&t.value));
    CHECK(s->through);
    netchan_clear(&t.value);
}

static void play_statement(stage *s, const char *name, const char **at) {
    char word[64];
    const char *task_name = name + (strchr("foh", *name) != NULL);
    if (*name == '<') stage_frame(s, type_of(name + 1));
    else if (strncmp(task_name, "recv", 4) == 0 || strncmp(task_name, "try", 3) == 0) play_task(s, name, 0);
    else if (strncmp(task_name, "send", 4) == 0) {
        CHECK(next_word(at, word, sizeof word));
        play_task(s, name, (size_t)number_of(s, word, 0));
    } else if (strcmp(name, "give") == 0) play_give(s, at);
    else if (strcmp(name, "relay") == 0) play_relay(s);
    else if (strcmp(name, "raw:") == 0) {
        if (s->out.size > sizeof s->out.data / 2) flush_stage(s);
        put_script_bytes(s, at, &s->out);
    } else if (strcmp(name, "ack") == 0) PUT(&s->out, ACK, s->r->received);
    else if (strcmp(name, "quiet") == 0) flush_stage(s), is_alive(s);
    else play_frame(s, name, at);
}

static void play(stage *s, const char *script) {
    char name[64];
    for (const char *at = script; *at && !s->over; at += *at == ';') {
        if (!next_word(&at, name, sizeof name)) continue;
        long times = *name == 'x' ? atol(name + 1) : 1;
        if (*name == 'x') CHECK(next_word(&at, name, sizeof name));
        const char *begin = at;
        for (long i = 0; i < times && !s->over; i++) at = begin, play_statement(s, name, &at);
        while (*at && *at != ';') at++; /* it was over before */
    }
    flush_stage(s);
}

static void begin_stage(stage *s, house *h, netchan_link *victim, raw *r) {
    memset(s, 0, offsetof(stage, out));
    s->house = h;
    s->out.size = 0;
    s->link = victim;
    s->r = r;
    s->counter = 100;
    s->stop = netchan_make(0);
    CHECK(s->stop);
}

/* Helps an operation that waits for nobody else. */
static void help(const stage *s, const task *t) {
    bool is_send = t->cases[0].is_send, at_home = t->cases[0].ch == s->house->home_ch;
    const house *h = s->house;
    if (is_send) netchan_recv(at_home ? h->home_ch : h->friend->recv, NULL, 5);
    else netchan_send(at_home ? h->home_ch : h->friend->send, netchan_nil(), 5);
}

/* What the victim did ends. */
static void end_stage(stage *s) {
    netchan_close(s->stop);
    for (size_t i = 0; i < s->count; i++) {
        task *t = &s->tasks[i];
        while (s->house && !is_done(t)) help(s, t);
        end_task(t);
        if (!t->cases[0].is_send) netchan_clear(&s->values[i]);
    }
    netchan_free(s->far);
    netchan_free(s->through);
    netchan_free(s->stop);
}

/* --- tables of attacks -------------------------------------------------------------------------------------------- */

typedef struct attack {
    const char *name;
    uint64_t capacity; /* of channel 0 */
    const char *script;
    const char *reason; /* has this in it; NULL: it is no breach, and the session lives */
} attack;

/* What every row is measured by, when the attacker has said all. */
static void judge(const attack *a, stage *s, netchan_link *victim) {
    char got[256];
    if (!a->reason) {
        if (!is_alive(s)) note_failure(a->name, "the session is over");
        return;
    }
    if (!await(victim, "lost", a->reason, got, sizeof got))
        note_failure(a->name, "\"%s\" was expected; there was: %s", a->reason, got);
    else raw_wait_closed(s->r);
}

/* The attacker has dialled. */
static void attack_listener(house *h, const netchan_options *o, const attack *a) {
    static stage s;
    size_t from = hold_from();
    begin_stage(&s, h, h->l, raw_join(h->l->address, a->capacity));
    play(&s, a->script);
    judge(a, &s, h->l);
    raw_close(s.r);
    end_stage(&s);
    size_t most = held_since(from);
    if (most > budget(o)) note_failure(a->name, "%zu bytes were held, more than %zu", most, budget(o));
    check_honest(h, a->name);
}

static void attack_listener_with(const netchan_options *o, const attack *rows, size_t count) {
    static house h;
    open_house(&h, o);
    for (size_t i = 0; i < count; i++) attack_listener(&h, o, &rows[i]);
    close_house(&h);
}

#define ATTACK_LISTENER(rows)                                                                                          \
    do {                                                                                                               \
        netchan_options o = narrow();                                                                                  \
        attack_listener_with(&o, rows, sizeof rows / sizeof *rows);                                                    \
    } while (0)

/* --- from a dialler ----------------------------------------------------------------------------------------------- */

static void test_lengths(void) {
    static const attack rows[] = {
        {"an empty frame", 0, "raw: 00", "empty or too long"},
        {"one byte too long", 0, "raw: fe 80 01 ff", "empty or too long"},
        {"as long as it gets", 0, "raw: 9*ff 01 ff", "empty or too long"},
        {"a length that is no number", 0, "raw: 10*80", "empty or too long"},
        {"a length that has no end", 0, "raw: 12*ff", "empty or too long"},
        {"the longest frame", 0, "raw: fd 7f 70 16380*00", NULL},
        {"a length in ten bytes", 0, "raw: 81 8*80 00 70", NULL},
        {"an empty frame behind a thousand good ones", 0, "x1000 PING 5; raw: 00", "empty or too long"},
        {"types that nobody knows", 0,
         "raw: 01 00; raw: 01 09; raw: 01 0f; raw: 01 1c; raw: 01 1f; raw: 01 2c; raw: 01 40; raw: 01 80; raw: 01 ff",
         NULL},
        {"types that nobody knows, with fields", 0, "raw: 04 0a ff ff ff; raw: 05 7f 01 02 03 04; raw: 02 ff 80", NULL},
    };
    ATTACK_LISTENER(rows);
}

/* Each frame with each number of fields that is too small, and with a last one that has no end or is too long. */
static void test_frames_that_are_cut_off(void) {
    static const struct {
        const char *name;
        int fields;
    } frames[] = {
        {"PING", 1}, {"PONG", 1}, {"BYE", 1}, {"ACK", 1}, {"OFFER", 5}, {"DEMAND", 5}, {"WITHDRAW", 1}, {"GRANT", 2},
        {"DECLINE", 2}, {"TAKEN", 1}, {"DATA", 1}, {"CLOSE", 1}, {"FRAGMENT_UP", 1}, {"DROP", 3}, {"IMPORT", 2},
        {"FORGET", 1}, {"CLAIM", 4}, {"COMMIT", 4}, {"RELEASE", 2}, {"ACCEPT", 2}, {"WITHDRAWN", 1}, {"CREDIT", 3},
        {"CLOSED", 1}, {"RETURN", 2}, {"FRAGMENT_DOWN", 1}, {"CLOSING", 1}, {"GONE", 1}, {"IMPORTED", 2},
    };
    static const char *const ends[] = {"", " : 80", " : 10*ff", " : 9*ff 02"};
    netchan_options o = narrow();
    static house h;
    open_house(&h, &o);
    for (size_t i = 0; i < sizeof frames / sizeof *frames; i++)
        for (int n = 0; n < frames[i].fields; n++)
            for (size_t k = 0; k < 4; k++) {
                char script[80];
                snprintf(script, sizeof script, "%s%.*s%s", frames[i].name, 2 * n, " 1 1 1 1", ends[k]);
                attack a = {script, 1, script, "cut off"};
                if (k == 0 || (n == frames[i].fields - 1 && k < 2 + 2 / LESS)) attack_listener(&h, &o, &a);
            }
    static const attack rows[] = {
        {"no process in a relayed OFFER", 0, "OFFER 0 1 1 16 1", "cut off"},
        {"no process in a relayed DEMAND", 0, "DEMAND 1 1 1 16 : 16*01", "cut off"},
        {"a process, and no size after it", 0, "DEMAND 1 1 1 16 : 16*ff", "cut off"},
        {"a process", 0, "DEMAND 1 1 1 16 : 16*01 00", NULL},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) attack_listener(&h, &o, &rows[i]);
    close_house(&h);
}

static void test_greetings_out_of_place(void) {
    static const attack rows[] = {
        {"HELLO twice", 0, "HELLO : \"netchan\" 01 16*ee 01 01 01 01 01 00", "greeted twice"},
        {"HELLO cut off", 0, "HELLO", "greeted twice"},
        {"RESUME in a session", 0, "RESUME : 16*01 01 00 32*00", "greeted twice"},
        {"RESUMED to who listens", 0, "RESUMED 0 : 32*00", "greeted twice"},
        {"REFUSED", 0, "REFUSED 0 : \"I do not like you\"", "it said: I do not like you"},
        {"REFUSED with rubbish", 0, "REFUSED 1 : 0a 1b 07 ff 41 00 25 73", "it said: ????A?%s"},
        {"REFUSED without a word", 0, "REFUSED 0", "it said: "},
        {"REFUSED with too many", 0, "REFUSED max : 16000*41", "it said: AAAA"},
        {"ACK of what was never sent", 0, "ACK 1", "never sent"},
        {"ACK of all that ever could be", 0, "ACK max", "never sent"},
        {"ACK of one too many", 1, "<CREDIT; ACK 1; ACK 2", "never sent"},
        {"ACK twice", 1, "<CREDIT; ACK 1; ACK 1; ACK 0", NULL},
        {"BYE, and then DATA beyond credit", 1, "BYE 0; x3 DATA 0 : 05", "credit"},
        {"PONG that nobody asked for", 0, "PONG 0; PONG max; PONG 7", NULL},
    };
    ATTACK_LISTENER(rows);
}

static void test_entries(void) {
    static const attack rows[] = {
        {"entry 0", 0, "OFFER 0 0 1 0 1", "does not exist"},
        {"entry 0 again", 0, "DEMAND 1 0 1 0 0", "does not exist"},
        {"OFFER on the wrong channel of the link", 0, "OFFER 1 1 1 0 1", "does not exist"},
        {"DEMAND on the wrong channel of the link", 0, "DEMAND 0 1 1 0 0", "does not exist"},
        {"OFFER on a channel that was never given", 0, "OFFER 2 1 1 0 1", "does not exist"},
        {"DEMAND on a channel that was never given", 0, "DEMAND max 1 1 0 0", "does not exist"},
        {"an entry twice", 0, "OFFER 0 1 1 0 1; OFFER 0 1 2 0 1", "twice"},
        {"an entry twice, both ways", 0, "OFFER 0 1 1 0 1; DEMAND 1 1 2 0 0", "twice"},
        {"an entry that was withdrawn before", 0, "x500 OFFER 0 1 1 0 1; WITHDRAW 1", "twice"},
        {"an entry again and again", 0, "OFFER 0 1 1 0 1; WITHDRAW 1; OFFER 0 1 1 0 1; WITHDRAW 1; DEMAND 1 1 1 0 0",
         NULL},
        {"WITHDRAW of nothing", 0, "WITHDRAW 0; WITHDRAW 1; WITHDRAW max", NULL},
        {"all flags that there are not", 0, "DEMAND 1 # . 18446744073709551552 0", NULL},
        {"values ahead of receives", 0, "x16 DEMAND 1 # . 36 0; x60 DEMAND 1 # . 0 0", NULL},
        {"too many values ahead of receives", 0, "x17 DEMAND 1 # . 36 0", "ahead of receives"},
        {"values ahead of receives that may be declined", 0, "DEMAND 1 # . 32 0", "ahead of receives"},
        {"values ahead of selects", 0, "DEMAND 1 # . 37 0", "ahead of receives"},
        {"values ahead of tries", 0, "DEMAND 1 # . 38 0", "ahead of receives"},
        {"values ahead of receives, again and again", 0,
         "DEMAND 1 max 1 36 0; WITHDRAW max; WITHDRAW max; x15 DEMAND 1 # . 36 0; DEMAND 1 max 1 36 0", NULL},
        {"values ahead of sends", 0, "OFFER 0 # . 36 1", "ahead of receives"},
        {"more than max_ops", 0, "x61 DEMAND 1 # . 0 0", "max_ops"},
        {"more than max_ops, both ways", 0, "x30 DEMAND 1 # . 1 0; x31 OFFER 0 # . 1 1", "max_ops"},
        {"the same operation many times", 0, "x30 DEMAND 1 # 7 1 0; x30 OFFER 0 # 7 1 1", NULL},
        {"a value that was not announced", 0, "OFFER 0 1 1 0 1 : 05", "does not exist"},
        {"a value that is not there", 0, "OFFER 0 1 1 8 1", "does not exist"},
        {"a size over max_message", 0, "OFFER 0 1 1 0 65537", "max_message"},
        {"a size over all", 0, "OFFER 0 1 1 0 max", "max_message"},
        {"a value over max_message", 0, "OFFER 0 1 1 8 max : 05", "max_message"},
        {"a value that is longer than its size", 0, "OFFER 0 1 1 8 1 : 05 05", "malformed"},
        {"a value that is shorter than its size", 0, "OFFER 0 1 1 8 2 : 05", "malformed"},
        {"values over what offers may bring", 0, "x20 OFFER 0 # . 12 = : 87 88 27 5000*00", "max_memory"},
        {"OFFER with capacity and no credit", 1, "OFFER 0 1 1 0 1; OFFER 0 2 2 0 1", "without credit"},
        {"OFFER after CLOSE", 0, "CLOSE 0; OFFER 0 1 1 0 1; OFFER 0 2 2 12 = : 05", NULL},
    };
    ATTACK_LISTENER(rows);
}

static void test_answers(void) {
    static const attack rows[] = {
        {"GRANT of nothing", 0, "GRANT 1 0", "granted"},
        {"GRANT of match 0", 0, "GRANT 0 0", "granted"},
        {"GRANT with a value of nothing", 0, "GRANT 1 1 : 05", "granted"},
        {"GRANT before CLAIM", 0, "DEMAND 1 # . 0 0; GRANT 1 0", "granted"},
        {"GRANT twice", 0, "recv; OFFER 0 # . 0 1; <CLAIM; GRANT m 1 : 05; GRANT m 1 : 05", "granted"},
        {"GRANT twice, in a select", 0, "recv2; OFFER 0 # . 1 1; <CLAIM; GRANT m 1 : 05; GRANT m 1 : 05", "granted"},
        {"GRANT of another match", 0, "recv; OFFER 0 # . 0 1; <CLAIM; GRANT 1 1 : 05", "granted"},
        {"GRANT of a receive with a value", 0, "DEMAND 1 # . 1 0; send 5; <CLAIM; GRANT m 1 : 05", "granted"},
        {"GRANT of a size that was not offered", 0, "recv; OFFER 0 # . 0 20000; <CLAIM; GRANT m 20001", "granted"},
        {"GRANT of a value that was not offered", 0, "recv; OFFER 0 # . 0 1; <CLAIM; GRANT m = : 43 61 62 63",
         "granted"},
        {"GRANT of a value over max_message", 0, "recv; OFFER 0 # . 0 1; <CLAIM; GRANT m 70000 : 05", "max_message"},
        {"GRANT of what is no value", 0, "recv; OFFER 0 # . 0 3; <CLAIM; GRANT m 3 : 87 05 00", "malformed"},
        {"GRANT after DECLINE", 0, "recv; OFFER 0 # . 0 1; <CLAIM; DECLINE m 0; GRANT m 1 : 05", "granted"},
        {"GRANT after WITHDRAW", 0, "recv; OFFER 0 # . 0 1; <CLAIM; WITHDRAW e; GRANT m 1 : 05", NULL},
        {"DECLINE of nothing", 0, "DECLINE 1 0", "declined"},
        {"DECLINE twice", 0, "recv; OFFER 0 # . 0 1; <CLAIM; DECLINE m 0; DECLINE m 0", "declined"},
        {"DECLINE after GRANT", 0, "recv; OFFER 0 # . 0 1; <CLAIM; GRANT m 1 : 05; DECLINE m 0", "declined"},
        {"DECLINE with a number", 0, "DEMAND 1 # . 1 0; send 5; <CLAIM; DECLINE m 77; quiet; DECLINE m 77", "declined"},
        {"TAKEN of nothing", 0, "TAKEN 1", "took"},
        {"TAKEN without COMMIT", 0, "DEMAND 1 # . 1 0; send 5; <CLAIM; TAKEN m", "took"},
        {"TAKEN before COMMIT", 0, "DEMAND 1 # . 1 0; send2 5; <CLAIM; TAKEN m", "took"},
        {"TAKEN twice", 0, "DEMAND 1 # . 1 0; send 20000; <CLAIM; GRANT m 0; <COMMIT; TAKEN m; TAKEN m", "took"},
        {"TAKEN of a send", 0, "recv; OFFER 0 # . 0 1; <CLAIM; TAKEN m", "took"},
        {"FRAGMENT of nothing", 0, "FRAGMENT_UP 1 : 05", "fragment"},
        {"FRAGMENT of a receive", 0, "DEMAND 1 # . 1 0; send 5; <CLAIM; FRAGMENT_UP m : 05", "fragment"},
        {"FRAGMENT of a small value", 0, "recv; OFFER 0 # . 0 5; <CLAIM; GRANT m 5; FRAGMENT_UP m : 44 4*61",
         "fragment"},
        {"FRAGMENT before GRANT", 0, "recv; OFFER 0 # . 0 20000; <CLAIM; FRAGMENT_UP m : 87 9*61", "fragment"},
        {"FRAGMENTs that are too many", 0,
         "recv; OFFER 0 # . 0 20000; <CLAIM; GRANT m 20000; FRAGMENT_UP m : 16000*80; FRAGMENT_UP m : 4001*80",
         "more fragments"},
        {"FRAGMENTs of no value", 0,
         "recv; OFFER 0 # . 0 20000; <CLAIM; GRANT m 20000; FRAGMENT_UP m : 16000*80; FRAGMENT_UP m : 4000*80",
         "cannot be decoded"},
        {"FRAGMENTs after the last", 0,
         "recv; OFFER 0 # . 0 20000; <CLAIM; GRANT m 20000; FRAGMENT_UP m : 87 9c 9c 01 15996*80; "
         "FRAGMENT_UP m : 4000*80; FRAGMENT_UP m",
         "fragment"},
        {"a value that swells over max_memory", 0,
         "recv; OFFER 0 # . 0 60004; <CLAIM; GRANT m 60004; FRAGMENT_UP m : 88 e0 d4 03 dd d4 03 15993*80; "
         "x2 FRAGMENT_UP m : 16000*80; FRAGMENT_UP m : 12004*80",
         "max_memory"},
    };
    ATTACK_LISTENER(rows);
}

static void test_credit_and_closing(void) {
    static const attack rows[] = {
        {"DATA without capacity", 0, "DATA 0 : 05", "credit"},
        {"DATA beyond credit", 2, "<CREDIT; x3 DATA 0 : 05", "credit"},
        {"thousands of DATA", 1000, "x9000 DATA 0 : 05", "credit"},
        {"DATA on the other channel of the link", 2, "<CREDIT; DATA 1 : 05", "credit"},
        {"DATA on a channel that was not given", 2, "<CREDIT; DATA 2 : 05", "credit"},
        {"DATA without a value", 2, "<CREDIT; DATA 0", "credit"},
        {"DATA that is no value", 2, "<CREDIT; DATA 0 : 86 05 00", "malformed"},
        {"DATA of two values", 2, "<CREDIT; DATA 0 : 05 05", "malformed"},
        {"DATA after CLOSE", 2, "<CREDIT; CLOSE 0; DATA 0 : 05", "after its close"},
        {"a capacity without end", UINT64_MAX / 4, "x9000 DATA 0 : 05", "credit"},
        {"CLOSE of the other channel", 0, "CLOSE 1", "closed"},
        {"CLOSE of what was not given", 0, "CLOSE 2", "closed"},
        {"CLOSE twice", 0, "CLOSE 0; CLOSE 0", "closed"},
        {"CREDIT from who dials", 0, "CREDIT 0 1 0", "capacity"},
        {"CREDIT on the other channel", 0, "CREDIT 1 0 0", "capacity"},
        {"CLOSED of a channel of the link", 0, "CLOSED 1", "closed"},
        {"CLOSED of what was not given", 0, "CLOSED 2; CLOSING 2; GONE 2; CLOSING 0; GONE 1; GONE 0", NULL},
        {"RETURN from who dials", 0, "RETURN 0 1 : 05", "returned"},
        {"RETURN of DATA", 1, "<CREDIT; DATA 0 : 05; RETURN 0 1 : 05", "returned"},
        {"COMMIT of nothing", 0, "COMMIT 1 1 0 1 : 05", "committed"},
        {"RELEASE of nothing", 0, "RELEASE 1 1", "released"},
        {"ACCEPT of nothing", 0, "ACCEPT 1 0; ACCEPT 0 0; ACCEPT max max; WITHDRAWN 1; WITHDRAWN 0", NULL},
        {"CLAIM of nothing", 0, "x100 CLAIM # . 1 5", NULL},
        {"CLAIM of nothing, with a value", 0, "CLAIM 5 5 1 1 : 05", NULL},
        {"CLAIM of nothing, with what is none", 0, "CLAIM 5 5 1 1 : 86", "malformed"},
        {"FRAGMENT of no receive", 0, "FRAGMENT_DOWN 1 : 05", "fragment"},
    };
    ATTACK_LISTENER(rows);
}

static void test_values(void) {
#define WITH(bytes) "OFFER 0 # . 12 = : " bytes
    static const attack rows[] = {
        {"a string that is too short", 0, WITH("86 09 61 62"), "malformed"},
        {"a string of all bytes there are", 0, WITH("86 9*ff 01"), "malformed"},
        {"bytes of nearly all there are", 0, WITH("87 fe 8*ff 01"), "malformed"},
        {"a huge count", 0, WITH("88 0a 9*ff 01"), "malformed"},
        {"a huge count of entries", 0, WITH("89 0a 9*ff 01"), "malformed"},
        {"a count that is one too many", 0, WITH("88 03 03 05 05"), "malformed"},
        {"a count that is one too few", 0, WITH("88 03 01 05 05"), "malformed"},
        {"no count", 0, WITH("88 00"), "malformed"},
        {"a key with a NUL", 0, WITH("89 06 01 03 61 00 62 05"), "malformed"},
        {"a key that is too long", 0, WITH("89 06 01 7f 61 61 62 05"), "malformed"},
        {"half an i32", 0, WITH("8b 03 61 62 63"), "malformed"},
        {"half an f64", 0, WITH("8e 0c 12*01"), "malformed"},
        {"half a float", 0, WITH("85 01 02 03"), "malformed"},
        {"a number that has no end", 0, WITH("84 10*ff"), "malformed"},
        {"two values", 0, WITH("05 05"), "malformed"},
        {"no value", 0, "OFFER 0 1 1 12 0", "does not exist"},
        {"nested as deep as it may be", 0, WITH("nest 64 05"), NULL},
        {"nested too deep", 0, WITH("nest 65 05"), "malformed"},
        {"nested much too deep", 0, WITH("nest 3900 05"), "malformed"},
        {"an end nested as deep as it may be", 0, WITH("nest 64 end 0 9 0"), NULL},
        {"an end nested too deep", 0, WITH("nest 65 end 0 9 0"), "malformed"},
        {"a kind that nobody knows", 0, WITH("88 08 02 8f 03 61 62 63 ff 00"), "malformed"},
    };
    ATTACK_LISTENER(rows);
}

static void test_ends(void) {
    static const attack rows[] = {
        {"end 0", 0, WITH("end 0 0 0"), "channel end"},
        {"end 1", 0, WITH("end 1 1 0"), "channel end"},
        {"a capacity of 2^63", 0, WITH("end 0 9 big"), "channel end"},
        {"a capacity of 2^64 - 1", 0, WITH("end 0 9 max"), "channel end"},
        {"the largest number", 0, WITH("end 0 max 0"), NULL},
        {"flags that there are not", 0, WITH("end 192 9 0"), NULL},
        {"all flags", 0, WITH("end 253 9 0"), NULL},
        {"an end turned round", 0, WITH("[ end 0 9 0 end 1 9 0 ]"), "turned"},
        {"an end of the other's that was never given", 0, WITH("end 2 2 0"), "does not have"},
        {"the other's channel 0", 0, WITH("end 2 0 0"), "does not have"},
        {"the other's channel 1", 0, WITH("end 3 1 0"), "does not have"},
        {"a name that is too short", 0, WITH("8a 10 16*09"), "malformed"},
        {"a name that is too long", 0, WITH("8a 12 18*09"), "malformed"},
        {"a name that is cut off", 0, WITH("8a 11 16*09"), "malformed"},
        {"more than twice max_ends", 0, "x5 OFFER 0 # . 13 = : [ end 0 # 0 end 1 # 0 end 0 # 0 end 1 # 0 end 0 # 0 "
         "end 1 # 0 end 0 # 0 end 1 # 0 end 0 # 0 ]", "max_ends"},
        {"an end used that was given away", 0, "IMPORT 1 0 : \"in\"; <IMPORTED; DROP x 1 0; OFFER x # . 0 1",
         "does not exist"},
        {"the wrong way", 0, "IMPORT 1 0 : \"in\"; <IMPORTED; DEMAND x # . 0 0", "does not exist"},
        {"the wrong way back", 0, "IMPORT 1 1 : \"out\"; <IMPORTED; OFFER x # . 0 1", "does not exist"},
        {"the wrong way, named", 0, "IMPORT 1 0 : \"in\"; <IMPORTED; OFFER 0 # . 12 = : end 3 x 0", "does not have"},
        {"DROP of nothing", 0, "DROP 2 1 0", "dropped"},
        {"DROP of the channels of the link", 0, "DROP 0 1 0", "dropped"},
        {"DROP of no names", 0, "IMPORT 1 0 : \"in\"; <IMPORTED; DROP x 0 0", "dropped"},
        {"DROP of too many names", 0, "IMPORT 1 0 : \"in\"; <IMPORTED; DROP x 2 0", "dropped"},
        {"DROP of all names there could be", 0, "IMPORT 1 0 : \"in\"; <IMPORTED; DROP x max 0", "dropped"},
        {"DROP twice", 0, "IMPORT 1 0 : \"in\"; <IMPORTED; DROP x 1 0; DROP x 1 0", "dropped"},
        {"an end named after its DROP", 0, "IMPORT 1 0 : \"in\"; <IMPORTED; DROP x 1 0; OFFER 0 # . 12 = : end 2 x 0",
         "does not have"},
        {"an end that comes home a hundred times", 0,
         "IMPORT 1 0 : \"in\"; <IMPORTED; x100 OFFER 0 # . 14 = : [ end 2 x 0 end 2 x 0 ]", NULL},
        {"the same end thousands of times", 0, "x1000 OFFER 0 # . 14 = : [ end 0 9 0 end 0 9 0 end 0 9 0 end 0 9 0 ]",
         NULL},
    };
    ATTACK_LISTENER(rows);
}

static void test_names(void) {
    static const attack rows[] = {
        {"no name", 0, "IMPORT 1 0", "a name that is none"},
        {"a name of 256 bytes", 0, "IMPORT 1 0 : 256*61", "a name that is none"},
        {"a name of 16,000 bytes", 0, "IMPORT 1 0 : 16000*61", "a name that is none"},
        {"a name with a NUL", 0, "IMPORT 1 0 : 61 00 62", "a name that is none"},
        {"a name of 255 bytes", 0, "IMPORT 1 0 : 255*ff", NULL},
        {"question 0", 0, "IMPORT 0 0 : \"nobody\"", "with one number, or with none"},
        {"a million questions", 0, "x61 IMPORT # 0 : 255*61", "max_ops"},
        {"the same question twice", 0, "x2 IMPORT 7 0 : \"nobody\"", "asked twice"},
        {"the same question after its answer", 0, "x50 IMPORT 7 2 : \"nobody\"; x50 IMPORT 7 0 : \"in\"", NULL},
        {"questions that are taken back", 0, "IMPORT 7 0 : \"nobody\"; FORGET 7; IMPORT 7 0 : \"nobody\"; FORGET 7; "
         "x60 IMPORT # 0 : \"nobody\"", NULL},
        {"questions to be answered at once", 0, "x500 IMPORT # 2 : \"nobody\"; x500 IMPORT # 2 : \"in\"", NULL},
        {"FORGET of nothing", 0, "FORGET 0; FORGET 5; FORGET max", NULL},
        {"an answer with no end", 0, "IMPORTED 1 0", "answered for a name"},
        {"an answer with half an end", 0, "IMPORTED 1 0 : 00 09 00", "answered for a name"},
        {"a no with an end", 0, "IMPORTED 1 1 : 00 09 15*00", "answered for a name"},
        {"an answer that there is not", 0, "IMPORTED 1 3", "answered for a name"},
        {"an answer that is ours", 0, "IMPORTED 1 0 : 02 02 15*00", "answered for a name"},
        {"an answer that nobody asked for", 0, "IMPORTED 1 1; IMPORTED 0 2; IMPORTED max 1", NULL},
        {"ends that nobody asked for", 0, "x1000 IMPORTED 1 0 : 00 09 15*00", NULL},
        {"an answer with end 0", 0, "IMPORTED 1 0 : 17*00", "channel end"},
    };
    ATTACK_LISTENER(rows);
}

/* The attacker is the home of a channel that the victim uses. */
static void test_a_lying_home(void) {
    static const attack rows[] = {
        {"CLAIM twice", 0, "give 0 9 0; fsend2 5; <OFFER; CLAIM e 7 0 0; <GRANT; CLAIM e 8 0 0", "claimed already"},
        {"match 0", 0, "give 0 9 0; fsend2 5; <OFFER; CLAIM e 0 0 0", "claimed already"},
        {"CLAIM of a send, with a value", 0, "give 0 9 0; fsend2 5; <OFFER; CLAIM e 7 1 1 : 05", "a claim that takes"},
        {"CLAIM that is not final, with a value", 0, "give 1 9 0; frecv2; <DEMAND; CLAIM e 7 0 1 : 05",
         "a claim that takes"},
        {"CLAIM with a size over max_message", 0, "give 1 9 0; frecv; <DEMAND; CLAIM e 7 1 65537", "max_message"},
        {"CLAIM with a size over all", 0, "give 1 9 0; frecv; <DEMAND; CLAIM e 7 1 max", "max_message"},
        {"CLAIM with a value that lies about its size", 0, "give 1 9 0; frecv; <DEMAND; CLAIM e 7 1 2 : 05",
         "malformed"},
        {"CLAIM of what is over", 0, "give 1 9 0; frecv; <DEMAND; CLAIM e 7 1 1 : 05; <GRANT; CLAIM e 8 1 1 : 05; "
         "<DECLINE", NULL},
        {"COMMIT without CLAIM", 0, "give 1 9 0; frecv; <DEMAND; COMMIT e 7 0 1 : 05", "committed"},
        {"COMMIT of another match", 0, "give 1 9 0; frecv2; <DEMAND; CLAIM e 7 0 0; <GRANT; COMMIT e 8 0 1 : 05",
         "committed"},
        {"COMMIT of a send", 0, "give 0 9 0; fsend2 5; <OFFER; CLAIM e 7 0 0; <GRANT; COMMIT e 7 0 1 : 05",
         "committed"},
        {"COMMIT twice", 0, "give 1 9 0; frecv2; <DEMAND; CLAIM e 7 0 0; <GRANT; COMMIT e 7 0 1 : 05; "
         "COMMIT e 7 0 1 : 05", "committed"},
        {"COMMIT twice, of a large value", 0, "give 1 9 0; frecv2; <DEMAND; CLAIM e 7 0 0; <GRANT; COMMIT e 7 0 20000; "
         "FRAGMENT_DOWN e : 87; COMMIT e 7 0 20000", "committed"},
        {"COMMIT of a size over max_message", 0, "give 1 9 0; frecv2; <DEMAND; CLAIM e 7 0 0; <GRANT; "
         "COMMIT e 7 0 65537", "max_message"},
        {"COMMIT of another size", 0, "give 1 9 0; frecv; <DEMAND; CLAIM e 7 1 20000; <GRANT; COMMIT e 7 0 20001",
         "size of a value"},
        {"COMMIT of size 0, and FRAGMENTs", 0, "give 1 9 0; frecv2; <DEMAND; CLAIM e 7 0 0; <GRANT; COMMIT e 7 0 0; "
         "FRAGMENT_DOWN e : 05", "more fragments"},
        {"FRAGMENT before COMMIT", 0, "give 1 9 0; frecv2; <DEMAND; CLAIM e 7 0 0; <GRANT; FRAGMENT_DOWN e : 05",
         "fragment"},
        {"FRAGMENTs that are too many", 0, "give 1 9 0; frecv2; <DEMAND; CLAIM e 7 0 0; <GRANT; COMMIT e 7 0 20000; "
         "x2 FRAGMENT_DOWN e : 16000*87", "more fragments"},
        {"FRAGMENTs of no value", 0, "give 1 9 0; frecv2; <DEMAND; CLAIM e 7 0 0; <GRANT; COMMIT e 7 0 20000; "
         "x2 FRAGMENT_DOWN e : 10000*87", "cannot be decoded"},
        {"FRAGMENT of a send", 0, "give 0 9 0; fsend2 5; <OFFER; CLAIM e 7 0 0; <GRANT; FRAGMENT_DOWN e : 05",
         "fragment"},
        {"RELEASE without CLAIM", 0, "give 0 9 0; fsend2 5; <OFFER; RELEASE e 7", "released"},
        {"RELEASE of another match", 0, "give 0 9 0; fsend2 5; <OFFER; CLAIM e 7 0 0; <GRANT; RELEASE e 8", "released"},
        {"RELEASE after a final CLAIM", 0, "give 0 9 0; fsend2 5; <OFFER; CLAIM e 7 1 0; <GRANT; RELEASE e 7",
         "released"},
        {"RELEASE twice", 0, "give 0 9 0; fsend2 5; <OFFER; CLAIM e 7 0 0; <GRANT; RELEASE e 7; RELEASE e 7",
         "released"},
        {"ACCEPT of what was not claimed", 0, "give 0 9 0; fsend2 5; <OFFER; ACCEPT e 0", "accepted"},
        {"ACCEPT of a receive", 0, "give 1 9 0; frecv2; <DEMAND; ACCEPT e 0", "accepted"},
        {"ACCEPT with a result that there is not", 0, "give 0 9 0; fsend2 5; <OFFER; ACCEPT e 16", "accepted"},
        {"ACCEPT with a result without end", 0, "give 0 9 0; fsend2 5; <OFFER; ACCEPT e max", "accepted"},
        {"WITHDRAWN of what waits", 0, "give 0 9 0; fsend2 5; <OFFER; WITHDRAWN e", NULL},
        {"a large value for who takes none", 0, "give 1 9 0; frecv; <DEMAND; CLAIM e 7 1 30000; <GRANT; "
         "FRAGMENT_DOWN e : 16257*87; FRAGMENT_DOWN e : 13744*87", "more fragments"},
        {"CLOSED with one that is claimed", 0, "give 1 9 0; frecv2; <DEMAND; CLAIM e 7 0 0; <GRANT; CLOSED 9; "
         "COMMIT e 8 0 1 : 05", "committed"},
        {"GONE, and all goes on", 0, "give 0 9 0; fsend2 5; <OFFER; GONE 9; GONE 9; CLOSING 9; CLAIM e 7 1 0", NULL},
    };
    ATTACK_LISTENER(rows);
}

/* The victim relays between the attacker, whose channel it is, and an honest peer. */
static void test_a_lying_home_behind_a_relay(void) {
    static const attack rows[] = {
        {"CLAIM twice", 0, "give 0 9 0; relay; osend2 5; <OFFER; CLAIM e 7 0 0; <GRANT; CLAIM e 8 0 0",
         "claimed already"},
        {"match 0", 0, "give 0 9 0; relay; osend2 5; <OFFER; CLAIM e 0 0 0", "claimed already"},
        {"CLAIM of a send, with a value", 0, "give 0 9 0; relay; osend2 5; <OFFER; CLAIM e 7 1 1 : 05",
         "claimed already"},
        {"CLAIM that is not final, with a value", 0, "give 1 9 0; relay; orecv2; <DEMAND; CLAIM e 7 0 1 : 05",
         "claimed already"},
        {"CLAIM with a size over all", 0, "give 1 9 0; relay; orecv; <DEMAND; CLAIM e 7 1 max", "larger"},
        {"CLAIM with a malformed value", 0, "give 1 9 0; relay; orecv; <DEMAND; CLAIM e 7 1 2 : 05", "malformed"},
        {"CLAIM of what is over", 0,
         "give 1 9 0; relay; orecv; <DEMAND; CLAIM e 7 1 1 : 05; <GRANT; CLAIM e 8 1 1 : 05; "
         "<DECLINE",
         NULL},
        {"COMMIT without CLAIM", 0, "give 1 9 0; relay; orecv; <DEMAND; COMMIT e 7 0 1 : 05", "committed"},
        {"COMMIT of another match", 0, "give 1 9 0; relay; orecv2; <DEMAND; CLAIM e 7 0 0; <GRANT; COMMIT e 8 0 1 : 05",
         "committed"},
        {"COMMIT of a send", 0, "give 0 9 0; relay; osend2 5; <OFFER; CLAIM e 7 0 0; <GRANT; COMMIT e 7 0 1 : 05",
         "committed"},
        {"COMMIT twice", 0,
         "give 1 9 0; relay; orecv2; <DEMAND; CLAIM e 7 0 0; <GRANT; COMMIT e 7 0 20000; "
         "COMMIT e 7 0 20000",
         "committed"},
        {"COMMIT of a size over max_message", 0,
         "give 1 9 0; relay; orecv2; <DEMAND; CLAIM e 7 0 0; <GRANT; "
         "COMMIT e 7 0 65537",
         "max_message"},
        {"FRAGMENT before COMMIT", 0, "give 1 9 0; relay; orecv2; <DEMAND; CLAIM e 7 0 0; <GRANT; FRAGMENT_DOWN e : 05",
         "fragment"},
        {"FRAGMENTs that are too many", 0,
         "give 1 9 0; relay; orecv2; <DEMAND; CLAIM e 7 0 0; <GRANT; COMMIT e 7 0 20000; "
         "x2 FRAGMENT_DOWN e : 16000*87",
         "more fragments"},
        {"FRAGMENTs of no value", 0,
         "give 1 9 0; relay; orecv2; <DEMAND; CLAIM e 7 0 0; <GRANT; COMMIT e 7 0 20000; "
         "x2 FRAGMENT_DOWN e : 10000*87",
         "cannot be decoded"},
        {"RELEASE without CLAIM", 0, "give 0 9 0; relay; osend2 5; <OFFER; RELEASE e 7", "released"},
        {"RELEASE of another match", 0, "give 0 9 0; relay; osend2 5; <OFFER; CLAIM e 7 0 0; <GRANT; RELEASE e 8",
         "released"},
        {"RELEASE twice", 0, "give 0 9 0; relay; osend2 5; <OFFER; CLAIM e 7 0 0; <GRANT; RELEASE e 7; RELEASE e 7",
         "released"},
        {"ACCEPT of what was not claimed", 0, "give 0 9 0; relay; osend2 5; <OFFER; ACCEPT e 0", "accepted"},
        {"ACCEPT with a result that there is not", 0, "give 0 9 0; relay; osend2 5; <OFFER; ACCEPT e 16", "accepted"},
        {"WITHDRAWN of what waits", 0, "give 0 9 0; relay; osend2 5; <OFFER; WITHDRAWN e", NULL},
        {"GONE, again and again", 0, "give 0 9 0; relay; osend2 5; <OFFER; x9 GONE 9; x9 CLOSING 9; CLAIM e 7 1 0",
         NULL},
    };
    ATTACK_LISTENER(rows);
}

/* The victim relays between the attacker, whose operations they are, and an honest home. */
static void test_a_lying_peer_of_a_relay(void) {
#define INTO "IMPORT 1 0 : \"into\"; <IMPORTED; OFFER x # . 0 "
#define OUT "IMPORT 1 1 : \"out of\"; <IMPORTED; DEMAND x # . 1 0; "
    static const attack rows[] = {
        {"an offer whose value is here", 0, "IMPORT 1 0 : \"into\"; <IMPORTED; OFFER x # . 12 = : 05",
         "does not exist"},
        {"an offer over max_message", 0, INTO "65537", "max_message"},
        {"GRANT twice", 0, INTO "20000; hrecv; <CLAIM; GRANT m 20000; FRAGMENT_UP m : 05; GRANT m 20001", "granted"},
        {"GRANT of another size", 0, INTO "20000; hrecv; <CLAIM; GRANT m 20001", "granted"},
        {"GRANT of a value of another size", 0, INTO "1; hrecv; <CLAIM; GRANT m = : 43 61 62 63", "granted"},
        {"GRANT of a receive with a value", 0, OUT "hsend 5; <CLAIM; GRANT m 1 : 05", "granted"},
        {"GRANT of what is over", 0, INTO "1; hrecv; <CLAIM; GRANT m 1 : 05; <ACCEPT; GRANT m 1 : 05", "granted"},
        {"GRANT of a malformed value", 0, INTO "2; hrecv; <CLAIM; GRANT m 2 : 86 05", "malformed"},
        {"DECLINE twice", 0, INTO "1; hrecv; <CLAIM; DECLINE m 0; DECLINE m 0", "declined"},
        {"DECLINE after GRANT", 0, OUT "hsend 20000; <CLAIM; GRANT m 0; DECLINE m 0", "declined"},
        {"TAKEN without COMMIT", 0, OUT "hsend 5; <CLAIM; TAKEN m", "took"},
        {"TAKEN twice", 0, OUT "hsend 20000; <CLAIM; GRANT m 0; <COMMIT; TAKEN m; TAKEN m", "took"},
        {"FRAGMENT of a receive", 0, OUT "hsend 5; <CLAIM; FRAGMENT_UP m : 05", "fragment"},
        {"FRAGMENTs that are too many", 0, INTO "20000; hrecv; <CLAIM; GRANT m 20000; x2 FRAGMENT_UP m : 16000*80",
         "more fragments"},
        {"FRAGMENTs of no value", 0, INTO "20000; hrecv; <CLAIM; GRANT m 20000; x2 FRAGMENT_UP m : 10000*80",
         "cannot be decoded"},
        {"an end of ours that was never given", 0, INTO "19; hrecv; <CLAIM; GRANT m = : end 2 99 0", "does not have"},
        {"more than max_ops", 0, "IMPORT 1 0 : \"into\"; <IMPORTED; x61 OFFER x # . 0 1", "max_ops"},
        {"as many as max_ops, withdrawn", 0,
         "IMPORT 1 0 : \"into\"; <IMPORTED; x60 OFFER x # . 0 1; DROP x 1 0; "
         "WITHDRAW 101; WITHDRAW 160",
         NULL},
        {"CLOSE again and again", 0, "IMPORT 1 0 : \"out of\"; <IMPORTED", NULL},
    };
    static house h;
    netchan_options o = narrow();
    open_house(&h, &o);
    open_home(&h);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) attack_listener(&h, &o, &rows[i]);
    close_house(&h);
}

/* --- from a listener ---------------------------------------------------------------------------------------------- */

typedef struct caller {
    const char *address;
    netchan_options o;
    netchan_link *link;
    pthread_t thread;
} caller;

static void *run_caller(void *arg) {
    caller *c = (caller *)arg;
    c->link = dial_with(c->address, &c->o);
    return NULL;
}

/* Somebody dials the door, and is let in. */
static raw *answer(caller *c, const door *d, const netchan_options *o, uint64_t capacity) {
    c->address = d->address;
    c->o = *o;
    c->o.buffer = (size_t)capacity;
    c->thread = test_start(run_caller, c);
    raw *r = raw_admit(d, capacity);
    test_join(c->thread);
    return r;
}

static void attack_dialler(house *h, const netchan_options *o, const attack *a) {
    static stage s;
    door d = open_door();
    caller c;
    size_t from = hold_from();
    raw *r = answer(&c, &d, o, a->capacity);
    begin_stage(&s, NULL, c.link, r);
    play(&s, a->script);
    judge(a, &s, c.link);
    raw_close(r);
    close(d.fd);
    netchan_hangup(c.link, NULL);
    end_stage(&s);
    size_t most = held_since(from);
    if (most > budget(o)) note_failure(a->name, "%zu bytes were held, more than %zu", most, budget(o));
    check_honest(h, a->name);
}

static void attack_dialler_with(const netchan_options *o, const attack *rows, size_t count) {
    static house h;
    netchan_options house_options = narrow();
    open_house(&h, &house_options);
    for (size_t i = 0; i < count; i++) attack_dialler(&h, o, &rows[i]);
    close_house(&h);
}

#define ATTACK_DIALLER(rows)                                                                                           \
    do {                                                                                                               \
        netchan_options o = narrow();                                                                                  \
        attack_dialler_with(&o, rows, sizeof rows / sizeof *rows);                                                     \
    } while (0)

static void test_a_lying_listener(void) {
    static const attack rows[] = {
        {"an empty frame", 0, "raw: 00", "empty or too long"},
        {"a frame that is too long", 0, "raw: ff ff 03", "empty or too long"},
        {"a type that nobody knows", 0, "raw: 03 7f ff ff", NULL},
        {"HELLO twice", 0, "HELLO : \"netchan\" 01 16*ee 01 01 01 01 01 00 48*00", "greeted twice"},
        {"RESUME to who dials", 0, "RESUME : 16*01 01 00 32*00", "greeted twice"},
        {"RESUMED in a session", 0, "RESUMED 0 : 32*00", "greeted twice"},
        {"RESUMED cut off", 0, "RESUMED", "greeted twice"},
        {"REFUSED", 0, "REFUSED 0 : \"go away\"", "it said: go away"},
        {"REFUSED for ever", 0, "REFUSED 1 : \"go away\"", "it said: go away"},
        {"ACK of what was never sent", 0, "ACK 1", "never sent"},
        {"OFFER on a channel of the link", 0, "OFFER 0 1 1 0 1", "does not exist"},
        {"OFFER on the other", 0, "OFFER 1 1 1 0 1", "does not exist"},
        {"DEMAND on a channel of the link", 0, "DEMAND 0 1 1 0 0", "does not exist"},
        {"DEMAND on the other", 0, "DEMAND 1 1 1 0 0", "does not exist"},
        {"DATA", 3, "DATA 0 : 05", "credit"},
        {"DATA on the other", 3, "DATA 1 : 05", "credit"},
        {"CLOSE", 0, "CLOSE 0", "closed"},
        {"CLOSE of the other", 0, "CLOSE 1", "closed"},
        {"CLOSED of what we send into", 0, "CLOSED 0", "closed"},
        {"CLOSED twice", 0, "CLOSED 1; CLOSED 1; CLOSING 0; GONE 0; GONE 1", NULL},
        {"CREDIT without capacity", 0, "CREDIT 0 1 0", "capacity"},
        {"CREDIT beyond capacity", 3, "CREDIT 0 4 0", "capacity"},
        {"CREDIT beyond capacity, twice", 3, "CREDIT 0 2 0; CREDIT 0 2 0", "capacity"},
        {"CREDIT without end", 3, "CREDIT 0 max 0", "capacity"},
        {"CREDIT for what was not sent", 3, "CREDIT 0 3 1", "capacity"},
        {"CREDIT for all there could be", 3, "CREDIT 0 0 max", "capacity"},
        {"CREDIT on the other channel", 3, "CREDIT 1 1 0", "capacity"},
        {"CREDIT on what was not given", 3, "CREDIT 2 1 0", "capacity"},
        {"RETURN of nothing", 3, "CREDIT 0 3 0; RETURN 0 1 : 05", "not sent"},
        {"RETURN of one too many", 3, "CREDIT 0 3 0; send 5; <DATA; RETURN 0 1 : 05; RETURN 0 1 : 05", "not sent"},
        {"RETURN of what was taken", 3, "CREDIT 0 3 0; send 5; <DATA; CREDIT 0 0 1; RETURN 0 1 : 05", "not sent"},
        {"RETURN of something larger", 3, "CREDIT 0 3 0; send 5; <DATA; RETURN 0 8 : 47 7*61", "not sent"},
        {"RETURN of all there could be", 3, "CREDIT 0 3 0; send 5; <DATA; RETURN 0 max : 05", "not sent"},
        {"RETURN that is longer than it says", 3, "CREDIT 0 3 0; send 5; <DATA; RETURN 0 1 : 05 05", "not sent"},
        {"RETURN on the other channel", 3, "CREDIT 0 3 0; send 5; <DATA; RETURN 1 1 : 05", "not sent"},
        {"RETURN of what is no value", 3, "CREDIT 0 3 0; send 5; <DATA; RETURN 0 2 : 86 05", "cannot be decoded"},
        {"RETURN of what swells", 3, "CREDIT 0 3 0; send 100; <DATA; RETURN 0 99 : 88 61 60 96*80",
         "cannot be decoded"},
        {"RETURN of nothing at all", 3, "CREDIT 0 3 0; send 5; <DATA; x5 RETURN 0 5; RETURN 0 0", "cannot be decoded"},
        {"CLAIM twice", 0, "recv2; <DEMAND; CLAIM e 7 0 0; <GRANT; CLAIM e 8 0 0", "claimed already"},
        {"CLAIM with a malformed value", 0, "recv; <DEMAND; CLAIM e 7 1 3 : 86 09 61", "malformed"},
        {"CLAIM with a size over max_message", 0, "recv; <DEMAND; CLAIM e 7 1 65537", "max_message"},
        {"CLAIM of what is over", 0, "recv; <DEMAND; CLAIM e 7 1 1 : 05; <GRANT; x1000 CLAIM e # 1 1 : 05; <DECLINE",
         NULL},
        {"COMMIT without CLAIM", 0, "recv; <DEMAND; COMMIT e 7 0 1 : 05", "committed"},
        {"COMMIT of nothing", 0, "COMMIT 5 5 0 1 : 05", "committed"},
        {"COMMIT twice", 0, "recv2; <DEMAND; CLAIM e 7 0 0; <GRANT; x2 COMMIT e 7 0 1 : 05", "committed"},
        {"RELEASE of nothing", 0, "RELEASE 5 5", "released"},
        {"RELEASE of what is committed", 0, "send 5; <OFFER; CLAIM e 7 1 0; <GRANT; RELEASE e 7", "released"},
        {"FRAGMENT of nothing", 0, "FRAGMENT_DOWN 5 : 05", "fragment"},
        {"FRAGMENT before COMMIT", 0, "recv2; <DEMAND; CLAIM e 7 0 0; <GRANT; FRAGMENT_DOWN e : 05", "fragment"},
        {"ACCEPT before CLAIM", 0, "send2 5; <OFFER; ACCEPT e 0", "accepted"},
        {"ACCEPT of a receive", 0, "recv2; <DEMAND; ACCEPT e 0", "accepted"},
        {"ACCEPT twice", 0, "send 5; <OFFER; CLAIM e 7 1 0; <GRANT; ACCEPT e 0; ACCEPT e 0", NULL},
        {"GRANT of nothing", 0, "GRANT 5 0", "granted"},
        {"DECLINE of nothing", 0, "DECLINE 5 0", "declined"},
        {"TAKEN of nothing", 0, "TAKEN 5", "took"},
        {"DROP of nothing", 0, "DROP 2 1 0", "dropped"},
        {"an end of ours that was never given", 0, "recv; <DEMAND; CLAIM e 7 1 = : end 2 2 0", "does not have"},
        {"an end with an impossible capacity", 0, "recv; <DEMAND; CLAIM e 7 1 = : end 0 9 big", "channel end"},
        {"an end turned round", 0, "recv; <DEMAND; CLAIM e 7 1 = : [ end 0 9 0 end 1 9 0 ]", "turned"},
        {"nested too deep", 0, "recv; <DEMAND; CLAIM e 7 1 = : nest 65 05", "malformed"},
        {"an end for a name, and another", 0, "IMPORTED 1 0 : 00 09 15*00; IMPORTED 1 0 : 01 09 15*00", "turned"},
        {"a million questions", 0, "x61 IMPORT # 0 : \"nobody\"", "max_ops"},
        {"BYE, and then CREDIT", 3, "BYE 1; CREDIT 0 4 0", "capacity"},
    };
    ATTACK_DIALLER(rows);
}

/* --- what a peer can make this process hold ----------------------------------------------------------------------- */

enum { CLAIMS = 300 };

/* Reads what there is. Returns how many claims were in it, without a value in them or any; their matches are in
 * `matches`, which has room for CLAIMS. */
static size_t take_claims(stage *s, uint64_t *matches, bool any) {
    size_t count = 0;
    frame f;
    for (int i = 0; i < 2; i++) { /* an answer may overtake what was said before */
        uint64_t question = ask(s);
        for (bool more = true; more && !s->over;) {
            if (!raw_frame(s->r, &f)) s->over = true;
            else if (f.type == PONG) more = get_number(&f) != question;
            else if (f.type == CLAIM && (any || f.size < 100)) {
                CHECK(count < CLAIMS);
                get_number(&f);
                matches[count++] = get_number(&f);
            }
        }
    }
    return count;
}

/* Says GRANT to all claims of receives, until no more come. */
static void grant_all(stage *s) {
    uint64_t matches[CLAIMS];
    for (size_t count; (count = take_claims(s, matches, true)); flush_stage(s))
        for (size_t i = 0; i < count; i++) PUT(&s->out, GRANT, matches[i], 0);
}

static void check_held(const char *row, size_t from, const netchan_options *o) {
    size_t most = held_since(from);
    if (getenv("HOSTILE_TIMES")) printf("%s: %zu bytes, budget %zu\n", row, most, budget(o));
    if (most > budget(o)) note_failure(row, "%zu bytes were held, more than %zu", most, budget(o));
}

/* Large values are committed to who says that it takes any number of them, and never reads: they are copied for the
 * link, as many as max_memory allows. */
static void test_large_values_for_who_never_reads(void) {
    enum { COUNT = 200, SIZE = 60000 };
    static uint8_t value[SIZE];
    static house h;
    static stage s;
    netchan_options o = narrow();
    o.max_ops = o.buffer = COUNT;
    open_house(&h, &o);
    for (int i = 0; i < COUNT; i++) CHECK_INT(netchan_send(h.l->send, netchan_bytes(value, SIZE), LONG), NETCHAN_OK);
    greeting g = good_greeting();
    g.max_message = g.max_memory = UINT64_MAX;
    begin_stage(&s, &h, h.l, raw_enter(h.l->address));
    raw_greet(s.r, &g);
    size_t from = hold_from();
    play(&s, "x200 DEMAND 1 # . 4 0");
    grant_all(&s);
    check_held("never reads", from, &o);
    raw_close(s.r);
    end_stage(&s);
    close_house(&h);
}

/* A channel of ours, with room for many values, into which the attacker sends large ones that swell in memory. */
static void test_large_values_that_swell(void) {
    enum { COUNT = 50, SIZE = 20000 };
    static house h;
    static stage s;
    netchan_options o = narrow();
    open_house(&h, &o);
    netchan *wide = netchan_make(COUNT);
    CHECK_INT(netchan_export(h.l, "wide", wide, NETCHAN_SENDER), NETCHAN_OK);
    begin_stage(&s, &h, h.l, raw_join(h.l->address, 0));
    size_t from = hold_from();
    play(&s, "IMPORT 1 0 : \"wide\"; <IMPORTED; x50 OFFER x # . 0 20000");
    uint64_t matches[CLAIMS];
    size_t all = 0;
    for (size_t count; (count = take_claims(&s, matches, false)); all += count)
        for (size_t i = 0; i < count; i++) { /* those that are claimed at the same time */
            s.m = matches[i];
            play(&s, "GRANT m 20000; FRAGMENT_UP m : 88 9c 9c 01 99 9c 01 15993*80; FRAGMENT_UP m : 4000*80");
        }
    CHECK(all > 0);
    is_alive(&s);
    check_held("swell", from, &o);
    raw_close(s.r);
    end_stage(&s);
    CHECK_INT(netchan_unexport(h.l, "wide"), NETCHAN_OK);
    netchan_free(wide);
    close_house(&h);
}

/* Small values swell, too, and lie in matches whose receivers do not answer: those of the attacker itself. */
static void test_values_that_wait_for_an_answer(void) {
    static house h;
    static stage s;
    netchan_options o = narrow();
    open_house(&h, &o);
    begin_stage(&s, &h, h.l, raw_join(h.l->address, 0));
    size_t from = hold_from();
    play(&s, "IMPORT 1 0 : \"in\"; <IMPORTED; x30 OFFER x # . 0 16000; IMPORT 2 1 : \"out\"; <IMPORTED; "
             "x30 DEMAND x # . 1 0");
    uint64_t matches[CLAIMS];
    for (size_t count; (count = take_claims(&s, matches, false));)
        for (size_t i = 0; i < count; i++) {
            s.m = matches[i];
            play(&s, "GRANT m 16000 : 88 fd 7c fb 7c 15995*80");
        }
    is_alive(&s);
    check_held("waits for an answer", from, &o);
    raw_close(s.r);
    end_stage(&s);
    close_house(&h);
}

static double cpu_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

/* Under pressure strangers wait. When their listener goes meanwhile, nobody looks again and again if that is over. */
static void test_a_listener_that_leaves_under_pressure(void) {
    enum { WAIT_MS = 300 };
    netchan_options o = narrow();
    door d = open_door();
    caller c;
    raw *r = answer(&c, &d, &o, 10);
    netchan_link *l = netchan_listen("127.0.0.1:0", &o);
    CHECK(l);
    pthread_mutex_lock(&netchan__net_lock);
    netchan__io.resting = netchan__net.wake = true;
    netchan__io.strangers_from = netchan__now_ns() + 50 * 1000000u;
    netchan__unlock_one(&netchan__net_lock);
    CHECK_INT(netchan_hangup(l, NULL), NETCHAN_OK);
    CHECK_INT(netchan_recv(c.link->recv, NULL, WAIT_MS), NETCHAN_ETIMEDOUT); /* then it is over */
    double start = cpu_ms();
    CHECK_INT(netchan_recv(c.link->recv, NULL, WAIT_MS), NETCHAN_ETIMEDOUT);
    CHECK(cpu_ms() - start < WAIT_MS / 2.0);
    raw_close(r);
    close(d.fd);
    netchan_hangup(c.link, NULL);
}

/* Who answers a value before all of it has left could have this side keep the rest of it, and then of the next. */
static void test_answers_before_the_value(void) {
    static const attack listened[] = {
        {"TAKEN", 0, "DEMAND 1 # . 1 0; send 200000; <CLAIM; GRANT m 0; <COMMIT; TAKEN m", "took what was not"},
        {"DECLINE", 0, "DEMAND 1 # . 1 0; send 200000; <CLAIM; GRANT m 0; <COMMIT; DECLINE m 0",
         "declined what was not"},
        {"TAKEN to a relay", 0, OUT "hsend 200000; <CLAIM; GRANT m 0; <COMMIT; TAKEN m", "took what was not"},
        {"DECLINE to a relay", 0, OUT "hsend 200000; <CLAIM; GRANT m 0; <COMMIT; DECLINE m 0", "declined what was not"},
        {"ACCEPT to a relay", 0, "give 0 9 0; relay; osend 200000; <OFFER; CLAIM e 7 1 0; <GRANT; ACCEPT e 0",
         "accepted what was not"},
        {"a refusal to a relay", 0, "give 0 9 0; relay; osend2 200000; <OFFER; CLAIM e 7 0 0; <GRANT; ACCEPT e 3",
         "accepted what was not"},
        {"RELEASE to a relay", 0, "give 0 9 0; relay; osend2 200000; <OFFER; CLAIM e 7 0 0; <GRANT; RELEASE e 7",
         "released a match"},
    };
    static const attack dialled[] = {
        {"ACCEPT", 0, "send 200000; <OFFER; CLAIM e 7 1 0; <GRANT; ACCEPT e 0", "accepted what was not"},
        {"a refusal", 0, "send2 200000; <OFFER; CLAIM e 7 0 0; <GRANT; ACCEPT e 3", "accepted what was not"},
        {"RELEASE", 0, "send2 200000; <OFFER; CLAIM e 7 0 0; <GRANT; RELEASE e 7", "released a match"},
    };
    static house h;
    netchan_options o = narrow();
    o.max_message = 256 * KIB;
    open_house(&h, &o);
    open_home(&h);
    for (size_t i = 0; i < sizeof listened / sizeof *listened; i++) attack_listener(&h, &o, &listened[i]);
    close_house(&h);
    attack_dialler_with(&o, dialled, sizeof dialled / sizeof *dialled);
}

/* What a listener hands back is bounded by what it was sent. */
static void test_values_that_come_back_larger(void) {
    enum { COUNT = 100 };
    static house h;
    static stage s;
    netchan_options o = narrow();
    open_house(&h, &o);
    door d = open_door();
    caller c;
    raw *r = answer(&c, &d, &o, COUNT);
    begin_stage(&s, NULL, c.link, r);
    play(&s, "CREDIT 0 100 0; send 59996; <OFFER; CLAIM e 7 1 0; <GRANT; x4 <FRAGMENT_UP; ACCEPT e 0; quiet");
    for (int i = 1; i < COUNT; i++) CHECK_INT(netchan_send(c.link->send, netchan_int(1), LONG), NETCHAN_OK);
    size_t from = hold_from();
    play(&s, "x99 <DATA; BYE 1");
    for (int i = 0; i < COUNT; i++)
        play(&s, "RETURN 0 60000 : 87 dc d4 03 15996*00; x2 RETURN 0 60000 : 16000*00; RETURN 0 60000 : 12000*00");
    is_alive(&s);
    check_held("comes back", from, &o);
    char got[256];
    if (!await(c.link, "lost", "returned", got, sizeof got)) note_failure("comes back", "there was: %s", got);
    raw_close(r);
    close(d.fd);
    netchan_hangup(c.link, NULL);
    end_stage(&s);
    close_house(&h);
}

/* Who gets channels in values says himself how many ends he takes; we hold no more of them than we would take. */
static void test_ends_that_are_never_dropped(void) {
    static house h;
    static stage s;
    netchan_options o = narrow();
    open_house(&h, &o);
    greeting g = good_greeting();
    g.max_ends = UINT64_MAX;
    begin_stage(&s, &h, h.l, raw_enter(h.l->address));
    raw_greet(s.r, &g);
    size_t given = 0;
    for (size_t i = 0; i < 3 * o.max_ends; i++) {
        netchan *reply = netchan_make(0);
        task t;
        CHECK(reply);
        play(&s, "DEMAND 1 # . 0 0; quiet");
        netchan_case c = netchan_case_send(h.l->send, netchan_sender(reply));
        start_select(&t, &c, 1, SHORT);
        while (!is_done(&t) && !s.over) grant_all(&s), test_pause(1);
        given += end_task(&t) == 0 && c.result == NETCHAN_OK;
        netchan_free(reply);
    }
    if (given > 2 * o.max_ends)
        note_failure("never dropped", "%zu ends are held, with max_ends %zu", given, o.max_ends);
    raw_close(s.r);
    end_stage(&s);
    close_house(&h);
}

/* --- what a peer can do to others --------------------------------------------------------------------------------- */

/* It offers a small value and grants a larger one, which is then for an honest peer that takes none so large. */
static void test_a_size_that_lies_hurts_nobody_else(void) {
    static house h;
    static stage s;
    netchan_options o = narrow(), small = options();
    small.max_message = 1000;
    open_house(&h, &o);
    netchan_link *honest = dial_with(h.l->address, &small);
    netchan *out;
    task t;
    CHECK_INT(netchan_import(honest, "out", NETCHAN_RECEIVER, &out, LONG), NETCHAN_OK);
    start_recv(&t, out, NETCHAN_FOREVER);
    begin_stage(&s, &h, h.l, raw_join(h.l->address, 0));
    play(&s, "IMPORT 1 0 : \"in\"; <IMPORTED; OFFER x # . 0 1; <CLAIM; GRANT m = : 87 d0 0f 2000*00");
    static const attack a = {"a size that lies", 0, NULL, "granted"};
    judge(&a, &s, h.l);
    send_int(h.ch, 5);
    end_task(&t);
    if (netchan_as_int(&t.value, 0) != 5) note_failure(a.name, "the honest receiver got something else");
    netchan_clear(&t.value);
    check_no_event(honest, "lost");
    netchan_free(out);
    raw_close(s.r);
    end_stage(&s);
    hang_up(honest);
    close_house(&h);
}

typedef struct question {
    netchan_link *link;
    netchan *end;
    int result;
    bool done; /* atomic */
} question;

static void *run_question(void *arg) {
    question *q = (question *)arg;
    q->result = netchan_import(q->link, "name", NETCHAN_RECEIVER, &q->end, NETCHAN_NOWAIT);
    __atomic_store_n(&q->done, true, __ATOMIC_RELEASE);
    return NULL;
}

/* A question to two peers: one says no twice, the other has the name. */
static void test_a_no_counts_once(void) {
    static stage evil, good;
    netchan_options o = narrow();
    netchan_link *l = listen_with(&o);
    begin_stage(&evil, NULL, l, raw_join(l->address, 0));
    begin_stage(&good, NULL, l, raw_join(l->address, 0));
    is_alive(&evil), is_alive(&good);
    question q = {l, NULL, NETCHAN_OK, false};
    pthread_t thread = test_start(run_question, &q);
    frame f, g;
    next_frame(evil.r, &f, IMPORT);
    next_frame(good.r, &g, IMPORT);
    CHECK_INT(g.type, IMPORT);
    uint64_t n = get_number(&f);
    PUT(&evil.out, IMPORTED, n, 1);
    PUT(&evil.out, IMPORTED, n, 1);
    flush_stage(&evil);
    is_alive(&evil);
    test_pause(SHORT);
    bytes b;
    b.size = 0;
    put_number(&b, n);
    put_number(&b, 0);
    put_name(&b, RECEIVES, 9, 0);
    put_frame(&good.out, IMPORTED, NULL, 0, b.data, b.size);
    flush_stage(&good);
    test_join(thread);
    CHECK_INT(q.result, NETCHAN_OK);
    netchan_free(q.end);
    raw_close(evil.r);
    raw_close(good.r);
    end_stage(&evil);
    end_stage(&good);
    netchan_hangup(l, NULL);
    CHECK_INT(alloc_blocks(), 0);
}

/* A question that is to be answered at once, and is not. */
static void test_a_question_without_an_answer(void) {
    enum { LIMIT = 10000 };
    static stage s;
    netchan_options o = narrow();
    o.ping_ms = 100;
    netchan_link *l = listen_with(&o);
    begin_stage(&s, NULL, l, raw_join(l->address, 0));
    is_alive(&s);
    question q = {l, NULL, NETCHAN_OK, false};
    pthread_t thread = test_start(run_question, &q);
    for (long long end = test_ms() + LIMIT; !__atomic_load_n(&q.done, __ATOMIC_ACQUIRE) && !s.over; test_pause(30)) {
        if (test_ms() > end) test_fail(__FILE__, __LINE__, "netchan_import() still waits after %d ms", LIMIT);
        is_alive(&s);
    }
    test_join(thread);
    CHECK_INT(q.result, NETCHAN_ETIMEDOUT);
    raw_close(s.r);
    end_stage(&s);
    netchan_hangup(l, NULL);
    CHECK_INT(alloc_blocks(), 0);
}

/* Work that grows with the square of what one peer may have open: others wait no longer for that. */
static void test_much_work(void) {
    enum { MOST = 8000 / FEWER };
    static const struct {
        const char *name, *prepare, *open, *work;
    } floods[] = {
        {"questions, and none of them forgotten", "", "IMPORT # 0 : \"nobody\"", "FORGET 1"},
        {"demands that nothing is small enough for", "IMPORT 1 1 : \"out\"; <IMPORTED", "DEMAND x # . 0 1",
         "DEMAND x # . 2 1"},
        {"offers for a buffer that is full", "IMPORT 1 0 : \"full\"; <IMPORTED", "OFFER x # . 0 1", "OFFER x # . 2 1"},
        {"large offers for which there is no room", "IMPORT 1 0 : \"wide\"; <IMPORTED", "OFFER x # . 0 60000",
         "OFFER x # . 2 60000"},
        {"large offers for who waits, one at a time", "IMPORT 1 0 : \"in\"; <IMPORTED", "OFFER x # . 0 60000",
         "OFFER x # . 2 60000"},
        {"demands, and then withdrawn", "", "DEMAND 1 # . 0 1", "WITHDRAW 1"},
    };
    static house h;
    netchan_options o = narrow();
    o.max_ops = 8192; /* the default */
    open_house(&h, &o);
    netchan *full = netchan_make(1), *wide = netchan_make(1000);
    task t;
    send_int(full, 1);
    CHECK_INT(netchan_export(h.l, "full", full, NETCHAN_SENDER), NETCHAN_OK);
    CHECK_INT(netchan_export(h.l, "wide", wide, NETCHAN_SENDER), NETCHAN_OK);
    start_send(&t, h.ch, netchan_str("hello"), NETCHAN_FOREVER);
    for (size_t i = 0; i < sizeof floods / sizeof *floods; i++) {
        static stage s;
        char script[100];
        long long start = test_ms();
        begin_stage(&s, &h, h.l, raw_join(h.l->address, 0));
        play(&s, floods[i].prepare);
        snprintf(script, sizeof script, "x%d %s; quiet", MOST, floods[i].open);
        play(&s, script);
        snprintf(script, sizeof script, "x%d %s; quiet", 3 * MOST, floods[i].work);
        play(&s, script);
        raw_close(s.r);
        end_stage(&s);
        if (getenv("HOSTILE_TIMES"))
            printf("%s: %lld ms, worst %lld ms\n", floods[i].name, test_ms() - start,
                   __atomic_load_n(&h.worst, __ATOMIC_RELAXED));
        check_honest(&h, floods[i].name);
    }
    CHECK_INT(netchan_recv(h.ch, NULL, LONG), NETCHAN_OK);
    end_task(&t);
    netchan_unexport(h.l, "full");
    netchan_unexport(h.l, "wide");
    netchan_free(full);
    netchan_free(wide);
    close_house(&h);
}

/* --- silence ------------------------------------------------------------------------------------------------------ */

/* A listener without patience: 6 times ping_ms and twice resume_ms. */
static netchan_options impatient(void) {
    netchan_options o = narrow();
    o.ping_ms = FEWER > 1 ? 500 : 100; /* who does answer heartbeats is to be in time */
    return o;
}

/* Peers that live, and leave what they have begun: what the victim waits for ends all the same. */
static void test_who_never_goes_on(void) {
    static const attack rows[] = {
        {"CLAIM, and no GRANT", 0, "recv; OFFER 0 # . 0 1; <CLAIM", "does not answer"},
        {"CLAIM of a receive, and no GRANT", 0, "DEMAND 1 # . 1 0; send 5; <CLAIM", "does not answer"},
        {"COMMIT, and no TAKEN", 0, "DEMAND 1 # . 1 0; send 20000; <CLAIM; GRANT m 0; <COMMIT", "does not answer"},
        {"GRANT, and no FRAGMENT", 0, "recv; OFFER 0 # . 0 20000; <CLAIM; GRANT m 20000", "does not answer"},
        {"a home that claims a send, and no more", 0, "give 0 9 0; fsend2 5; <OFFER; CLAIM e 7 0 0; <GRANT",
         "does not answer"},
        {"a home that claims a receive, and no more", 0, "give 1 9 0; frecv2; <DEMAND; CLAIM e 7 0 0; <GRANT",
         "does not answer"},
        {"a home that takes a value, and no ACCEPT", 0, "give 0 9 0; fsend 5; <OFFER; CLAIM e 7 1 0; <GRANT",
         "does not answer"},
        {"a home that commits, and no FRAGMENT", 0, "give 1 9 0; frecv; <DEMAND; CLAIM e 7 1 20000; <GRANT",
         "does not answer"},
        {"a home that does not answer a try", 0, "give 1 9 0; ftry; <DEMAND", "does not answer"},
    };
    enum { COUNT = sizeof rows / sizeof *rows, LIMIT = 10000 * (FEWER > 1 ? 4 : 1) };
    static house h;
    static stage stages[COUNT];
    netchan_options o = impatient(), usual = narrow();
    open_house(&h, &usual);
    netchan_link *l[COUNT];
    for (size_t i = 0; i < COUNT; i++) {
        l[i] = listen_with(&o);
        begin_stage(&stages[i], NULL, l[i], raw_join(l[i]->address, 0));
        play(&stages[i], rows[i].script);
    }
    size_t left = COUNT;
    for (long long end = test_ms() + LIMIT; left && test_ms() < end; test_pause(30))
        for (size_t i = left = 0; i < COUNT; i++) left += is_alive(&stages[i]);
    for (size_t i = 0; i < COUNT; i++) {
        if (stages[i].over) expect(l[i], "lost", rows[i].reason);
        else note_failure(rows[i].name, "it was not ended after %d ms", LIMIT);
        raw_close(stages[i].r);
    }
    for (size_t i = 0; i < COUNT; i++) {
        netchan_hangup(l[i], NULL);
        end_stage(&stages[i]);
    }
    check_honest(&h, "silence");
    close_house(&h);
}

/* Who breaks its link and resumes it, again and again, gains no time. */
static void test_who_breaks_and_resumes(void) {
    enum { LIMIT = 15000, DOWN = 150 };
    static stage s;
    netchan_options o = impatient();
    o.ping_ms = 50;
    o.resume_ms = 600;
    netchan_link *l = listen_with(&o);
    begin_stage(&s, NULL, l, raw_join(l->address, 0));
    play(&s, "recv; OFFER 0 # . 0 1; <CLAIM");
    bool lost = false;
    uint64_t generation = 0, arrived;
    for (long long end = test_ms() + LIMIT; !lost && test_ms() < end;) {
        raw_drop(s.r);
        test_pause(DOWN);
        raw *old = s.r, *r = raw_enter(l->address);
        claim c = claim_of(old, r, ++generation);
        bytes b;
        frame f;
        b.size = 0;
        put_resume(&b, &c);
        raw_say(r, &b);
        CHECK(raw_frame(r, &f));
        arrived = get_number(&f);
        lost = f.type == REFUSED;
        memcpy(r->id, old->id, sizeof r->id);
        memcpy(r->secret, old->secret, sizeof r->secret);
        r->received = old->received;
        r->acked = arrived;
        free(old);
        s.r = r;
    }
    if (lost) expect(l, "lost", "does not answer");
    else note_failure("breaks and resumes", "a CLAIM was not answered for %d ms, with a patience of %d", LIMIT,
                      6 * o.ping_ms + 2 * o.resume_ms);
    raw_close(s.r);
    netchan_hangup(l, NULL);
    end_stage(&s);
    CHECK_INT(alloc_blocks(), 0);
    check_failures();
}

/* A large value that never comes, in fragments without a byte, through a process that relays it: that ends the session
 * of who sends them, not that of who relays. */
static void test_empty_fragments_through_a_relay(void) {
    enum { LIMIT = 12000 * (FEWER > 1 ? 4 : 1) };
    static stage s;
    netchan_options o = impatient();
    netchan_link *home = listen_with(&o), *relay = listen_with(&o), *way = dial_with(home->address, &o);
    netchan *ch = netchan_make(0), *end;
    task t;
    CHECK_INT(netchan_export(home, "in", ch, NETCHAN_SENDER), NETCHAN_OK);
    CHECK_INT(netchan_import(way, "in", NETCHAN_SENDER, &end, LONG), NETCHAN_OK);
    CHECK_INT(netchan_export(relay, "in", end, NETCHAN_SENDER), NETCHAN_OK);
    begin_stage(&s, NULL, relay, raw_join(relay->address, 0));
    start_recv(&t, ch, NETCHAN_FOREVER);
    play(&s, "IMPORT 1 0 : \"in\"; <IMPORTED; OFFER x # . 0 20000; <CLAIM; GRANT m 20000");
    for (long long stop = test_ms() + LIMIT; !s.over && test_ms() < stop; test_pause(50)) {
        play(&s, "FRAGMENT_UP m");
        is_alive(&s);
    }
    if (s.over) expect(relay, "lost", "does not answer");
    else note_failure("empty fragments", "the session lives after %d ms", LIMIT);
    check_no_event(home, "lost");
    check_no_event(way, "lost");
    send_int(ch, 1);
    end_task(&t);
    netchan_clear(&t.value);
    raw_close(s.r);
    end_stage(&s);
    CHECK_INT(netchan_unexport(relay, "in"), NETCHAN_OK);
    netchan_free(end);
    CHECK_INT(netchan_unexport(home, "in"), NETCHAN_OK);
    netchan_free(ch);
    netchan_hangup(relay, NULL);
    netchan_hangup(way, NULL);
    netchan_hangup(home, NULL);
    CHECK_INT(alloc_blocks(), 0);
    check_failures();
}

/* --- floods ------------------------------------------------------------------------------------------------------- */

/* Says the same again and again, and reads nothing meanwhile: what waits for it is bounded. */
static void test_floods_of_who_never_reads(void) {
    static const attack rows[] = {
        {"PING", 0, "x200000 PING max", NULL},
        {"ACK", 0, "x200000 ACK 0", NULL},
        {"CLAIM of nothing", 0, "x200000 CLAIM 1 max 1 5", "does not read"},
        {"tries", 0, "x200000 OFFER 0 max 1 2 1", "does not read"},
        {"questions", 0, "x200000 IMPORT max 2 : \"nobody\"", "does not read"},
        {"ends by name", 0, "x200000 IMPORT max 2 : \"in\"", "does not read"},
        {"ends that nobody wants", 0, "x5000 OFFER 0 # 1 10 = : [ end 0 # 0 end 0 # 0 end 1 # 0 end 1 # 0 ]",
         "max_ends"},
        {"types that nobody knows", 0, "x200000 raw: 02 7f 00", NULL},
    };
    static house h;
    netchan_options o = narrow();
    open_house(&h, &o);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        static stage s;
        size_t from = hold_from();
        begin_stage(&s, &h, h.l, raw_join(h.l->address, 0));
        play(&s, rows[i].script);
        if (rows[i].reason) judge(&rows[i], &s, h.l);
        else if (s.over) note_failure(rows[i].name, "the session is over");
        check_held(rows[i].name, from, &o);
        raw_close(s.r);
        end_stage(&s);
        check_honest(&h, rows[i].name);
    }
    close_house(&h);
}

/* A million of each thing that can be opened, each closed before the next: nothing is left of them. */
static void test_a_million(void) {
    enum { MILLION = 1000000 / FEWER, BATCH = 1000 };
    static const struct {
        const char *name;
        unsigned open, close;
        uint64_t channel;
    } things[] = {
        {"OFFER and WITHDRAW", OFFER, WITHDRAW, 0},
        {"DEMAND and WITHDRAW", DEMAND, WITHDRAW, 1},
        {"IMPORT and FORGET", IMPORT, FORGET, 0},
    };
    static house h;
    netchan_options o = narrow();
    open_house(&h, &o);
    for (size_t i = 0; i < sizeof things / sizeof *things; i++) {
        static stage s;
        size_t from = hold_from();
        begin_stage(&s, &h, h.l, raw_join(h.l->address, 0));
        for (uint64_t n = 1; n <= MILLION / 3 && !s.over; n++) {
            if (things[i].open == IMPORT) PUT_VALUE(&s.out, IMPORT, "nobody", n, 0);
            else if (things[i].open == OFFER) PUT(&s.out, OFFER, 0, n, n, 0, 1);
            else PUT(&s.out, DEMAND, 1, n, n, 0, 0);
            PUT(&s.out, things[i].close, n);
            if (n % BATCH == 0) flush_stage(&s);
            if (n % (20 * BATCH) == 0) is_alive(&s);
        }
        if (!is_alive(&s)) note_failure(things[i].name, "the session is over");
        check_held(things[i].name, from, &o);
        raw_close(s.r);
        end_stage(&s);
        check_honest(&h, things[i].name);
    }
    close_house(&h);
}

/* A million names of channel ends: of one, of new ones that nobody wants, nested; each is dropped again. */
static void test_a_million_ends(void) {
    static const attack rows[] = {
        {"the same end", 0,
         "x250 OFFER 0 # . 10 = : [ end 0 9 0 end 0 9 0 end 0 9 0 end 0 9 0 end 0 9 0 end 0 9 0 end 0 9 0 end 0 9 0 ]; "
         "quiet",
         NULL},
        {"new ends", 0, "x5 OFFER 0 # . 10 = : nest 60 [ end 0 # 0 end 1 # 0 end 0 # 0 end 1 # 0 ]; quiet", NULL},
        {"one of ours", 0,
         "IMPORT 1 2 : \"in\"; <IMPORTED; x250 OFFER 0 # . 10 = : [ end 2 x 0 nest 50 end 2 x 0 ]; DROP x 1 0; quiet",
         NULL},
    };
    static house h;
    netchan_options o = narrow();
    open_house(&h, &o);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        static stage s;
        size_t from = hold_from();
        begin_stage(&s, &h, h.l, raw_join(h.l->address, 0));
        for (int n = 0; n < 500 / FEWER && !s.over; n++) {
            play(&s, rows[i].script);
            PUT(&s.out, ACK, s.r->received);
            flush_stage(&s);
        }
        if (!is_alive(&s)) note_failure(rows[i].name, "the session is over");
        check_held(rows[i].name, from, &o);
        raw_close(s.r);
        end_stage(&s);
        check_honest(&h, rows[i].name);
    }
    close_house(&h);
}

/* The attacker puts our own channel into itself: when nobody else has it, it is gone. */
static void test_a_channel_in_itself(void) {
    static house h;
    static stage s;
    netchan_options o = narrow();
    open_house(&h, &o);
    netchan *ch = netchan_make(4), *other = netchan_make(4);
    CHECK_INT(netchan_export(h.l, "a", ch, NETCHAN_SENDER), NETCHAN_OK);
    CHECK_INT(netchan_export(h.l, "b", other, NETCHAN_SENDER), NETCHAN_OK);
    begin_stage(&s, &h, h.l, raw_join(h.l->address, 0));
    play(&s, "IMPORT 1 0 : \"a\"; <IMPORTED; OFFER x # . 12 = : end 2 x 0; <ACCEPT");
    if (!is_alive(&s)) note_failure("a channel in itself", "the session is over");
    raw_close(s.r);
    expect(h.l, "lost", "did not come back");
    end_stage(&s);
    CHECK_INT(netchan_unexport(h.l, "a"), NETCHAN_OK);
    CHECK_INT(netchan_unexport(h.l, "b"), NETCHAN_OK);
    while (netchan_len(ch)) CHECK_INT(netchan_recv(ch, NULL, LONG), NETCHAN_OK); /* a channel in its own buffer stays */
    netchan_free(ch);
    netchan_free(other);
    close_house(&h);
}

/* --- sessions ----------------------------------------------------------------------------------------------------- */

/* Greetings that are cut off anywhere, or say what no greeting says. Who was not greeted yet is rejected. */
static void test_lying_greetings(void) {
    static const char *const scripts[] = {
        "HELLO : \"netchan\" 02 16*ee 01 01 01 01 01 00", "HELLO : \"netcham\" 01 16*ee 01 01 01 01 01 00",
        "HELLO : 10*ff", "PING 1", "ACK 1", "BYE 0", "RESUMED 0 : 32*00", "REFUSED 0 : \"no\"", "OFFER 0 1 1 0 1",
        "DATA 0 : 05", "IMPORT 1 0 : \"in\"", "raw: 00", "raw: ff ff ff 01", "raw: 01 7f", "CREDIT 0 1 0",
    };
    static const char hello[] = "netchan\1................\1\1\1\1\1";
    static house h;
    static stage s;
    netchan_options o = narrow();
    open_house(&h, &o);
    size_t count = sizeof scripts / sizeof *scripts;
    for (size_t i = 0; i < count + sizeof hello; i++) {
        const char *name = i < count ? scripts[i] : "HELLO cut off";
        char got[256];
        netchan_link *l = listen_with(&o); /* who fails again and again is made to wait */
        begin_stage(&s, NULL, l, raw_enter(l->address));
        if (i < count) play(&s, scripts[i]);
        else put_frame(&s.out, HELLO, NULL, 0, hello, i - count);
        flush_stage(&s);
        raw_wait_closed(s.r);
        raw_close(s.r);
        if (!await(l, "rejected", "", got, sizeof got) || !*got) note_failure(name, "there was: %s", got);
        end_stage(&s);
        netchan_hangup(l, NULL);
    }
    close_house(&h);
}

/* The numbers of a greeting are the peer's own affair. */
static void test_boasters(void) {
    static const uint64_t numbers[] = {0, 1, 127, 65535, (uint64_t)1 << 31, (uint64_t)1 << 63, UINT64_MAX};
    static house h;
    static stage s;
    netchan_options o = narrow();
    open_house(&h, &o);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        greeting g = good_greeting();
        size_t from = hold_from();
        g.max_message = g.max_memory = g.max_ops = g.max_ends = g.ping_ms = g.capacity = numbers[i];
        begin_stage(&s, &h, h.l, raw_enter(h.l->address));
        raw_greet(s.r, &g);
        play(&s, "DEMAND 1 # . 4 0; send 20000; quiet");
        if (s.over) note_failure("boaster", "the session is over");
        check_held("boaster", from, &o);
        raw_close(s.r);
        end_stage(&s);
        check_honest(&h, "boaster");
    }
    close_house(&h);
}

/* Who knows the key, but not the secret of the session, or what became of it. */
static void test_resumes_of_others(void) {
    static const struct {
        const char *name, *reason;
    } lies[] = {
        {"a forged proof", "somebody else"},
        {"a proof of zeros", "somebody else"},
        {"the listener's own proof", "somebody else"},
        {"a proof of another connection", "somebody else"},
        {"a proof of another generation", "somebody else"},
        {"a proof of another position", "somebody else"},
        {"a session that nobody has", "not known"},
        {"generation 0", "elsewhere"},
        {"what was never sent", "elsewhere"},
        {"all that ever could be", "elsewhere"},
    };
    static house h;
    static stage owner;
    netchan_options o = narrow();
    open_house(&h, &o);
    begin_stage(&owner, &h, h.l, raw_join(h.l->address, 3));
    play(&owner, "<CREDIT; DATA 0 : 05; quiet");
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        raw *thief = raw_enter(h.l->address);
        claim c = claim_of(owner.r, thief, 1), said = c;
        bytes body, b;
        char got[256];
        body.size = b.size = 0;
        if (i == 0) c.secret[31] ^= 1;
        if (i == 3) memcpy(c.binding, owner.r->binding, sizeof c.binding);
        if (i == 4) c.generation++;
        if (i == 5) c.received--;
        if (i == 6) c.id[7] ^= 1, said = c;
        if (i == 7) c.generation = said.generation = 0;
        if (i == 8) c.received = said.received = c.received + 100;
        if (i == 9) c.received = said.received = UINT64_MAX;
        put_bytes(&body, said.id, sizeof said.id);
        put_number(&body, said.generation);
        put_number(&body, said.received);
        put_proof(&body, &c, i == 2 ? 'L' : 'D');
        if (i == 1) memset(body.data + body.size - 32, 0, 32);
        put_frame(&b, RESUME, NULL, 0, body.data, body.size);
        if (i == 6) put_frame(&b, RESUME, NULL, 0, body.data, body.size); /* once may be a mistake */
        raw_send(thief, b.data, b.size);
        raw_wait_closed(thief);
        raw_close(thief);
        if (!await(h.l, "rejected", lies[i].reason, got, sizeof got)) note_failure(lies[i].name, "there was: %s", got);
        if (!is_alive(&owner)) note_failure(lies[i].name, "the owner is hurt");
        check_honest(&h, lies[i].name);
    }
    raw_close(owner.r);
    end_stage(&owner);
    close_house(&h);
}

/* Moves the session of s to a new connection. `down`: the old one is broken before. Returns false when it is
 * refused. */
static bool move_stage(stage *s, netchan_link *l, uint64_t generation, bool down) {
    raw *old = s->r;
    frame f;
    bytes b;
    if (down) raw_drop(old);
    raw *r = raw_enter(l->address);
    claim c = claim_of(old, r, generation);
    b.size = 0;
    put_resume(&b, &c);
    raw_say(r, &b);
    CHECK(raw_frame(r, &f));
    CHECK(f.type == RESUMED || f.type == REFUSED);
    memcpy(r->id, old->id, sizeof r->id);
    memcpy(r->secret, old->secret, sizeof r->secret);
    r->received = old->received;
    r->acked = get_number(&f);
    if (!down) raw_drop(old);
    free(old);
    s->r = r;
    return f.type == RESUMED;
}

/* What fits together by chance only, with numbers that were heard: mostly what may be said then, now and then
 * anything. */
static const char *any_statement(uint64_t *seed, bool claimed, bool asked) {
    static const char *const things[] = {
        "OFFER 0 # . 0 1", "OFFER 0 # . 1 20000", "OFFER 0 # . 2 1", "OFFER 0 # . 12 = : [ end 0 9 0 end 1 10 0 ]",
        "OFFER 0 # . 0 1; WITHDRAW .", "DEMAND 1 # . 1 0", "DEMAND 1 # . 4 0", "DEMAND 1 # . 2 0",
        "DEMAND 1 # . 0 0; WITHDRAW .", "WITHDRAW .", "WITHDRAW e", "CLOSED 9", "CLOSING 9", "GONE 10", "IMPORTED 1 1",
        "IMPORT # 0 : \"in\"; <IMPORTED; OFFER x # . 12 = : 05", "IMPORT # 2 : \"in\"; <IMPORTED; OFFER x # . 1 1",
        "IMPORT # 0 : \"in\"; <IMPORTED; OFFER 0 # . 12 = : end 2 x 0; DROP x 1 0", "IMPORT # 0 : \"nobody\"; FORGET .",
        "IMPORT # 1 : \"out\"; <IMPORTED; DEMAND x # . 0 0; DROP x 1 1", "PING 1", "ack",
    };
    static const char *const to_claims[] = {
        "GRANT m 0",
        "GRANT m 1 : 05",
        "GRANT m 20000; FRAGMENT_UP m : 88 9c 9c 01 99 9c 01 15993*80; FRAGMENT_UP m : 4000*80",
        "GRANT m 20000; FRAGMENT_UP m : 88 9c 9c 01 99 9c 01 15993*80",
        "DECLINE m 0",
        "DECLINE m 1",
        "GRANT m 0; TAKEN m",
    };
    static const char *const to_operations[] = {
        "CLAIM e # 0 0",
        "CLAIM e # 0 0; RELEASE e .",
        "CLAIM e # 0 0; COMMIT e . 0 1 : 05",
        "CLAIM e # 1 1 : 05",
        "CLAIM e # 1 0",
        "CLAIM e # 1 0; ACCEPT e 0",
        "CLAIM e # 0 0; COMMIT e . 0 20000; FRAGMENT_DOWN e : 05",
        "ACCEPT e 1",
        "CLAIM e # 1 20000; FRAGMENT_DOWN e : 05",
        "WITHDRAWN e",
        "GONE 9",
    };
    static const char *const bad[] = {
        "GRANT m 1 : 05", "TAKEN m", "DECLINE m 0", "COMMIT e . 0 1 : 05", "RELEASE e .", "ACCEPT e 0", "DATA 0 : 05",
        "CLOSE 0", "DROP x 1 0", "FRAGMENT_UP m : 05", "FRAGMENT_DOWN e : 05", "CLOSE x", "RETURN 0 0",
    };
#define ONE_OF(list) list[test_random(seed) % (sizeof list / sizeof *list)]
    if (test_random(seed) % 30 == 0) return ONE_OF(bad);
    if (claimed) return ONE_OF(to_claims);
    return asked && test_random(seed) % 2 ? ONE_OF(to_operations) : ONE_OF(things);
}

/* Says anything for a while. Returns how many statements. */
static int say_anything(stage *s, netchan_link *l, uint64_t *seed) {
    enum { STEPS = 200 };
    uint64_t generation = 0, e = 0, m = 0;
    int steps = 0;
    for (; steps < STEPS && !s->over; steps++) {
        play(s, any_statement(seed, s->m != m, s->e != e));
        m = s->m, e = s->e;
        listen_to(s);
        if (!s->over && test_random(seed) % 50 == 0) s->over = !move_stage(s, l, ++generation, steps % 2);
    }
    return steps;
}

static void test_anything(void) {
    enum { SESSIONS = 200 / LESS };
    static house h;
    netchan_options o = narrow();
    uint64_t seed = getenv("SEED") ? (uint64_t)atol(getenv("SEED")) : 7;
    int steps = 0;
    o.resume_ms = 50;
    open_house(&h, &o);
    for (int i = 0; i < SESSIONS; i++) {
        static stage s;
        char row[32];
        snprintf(row, sizeof row, "session %d", i);
        size_t from = hold_from();
        begin_stage(&s, &h, h.l, raw_join(h.l->address, 0));
        play(&s, i % 2 ? "give 0 9 0; fsend2 5; fsend 20000; recv2; send2 5; send 20000"
                       : "give 1 9 0; frecv2; frecv; recv; send2 20000; send 5");
        steps += say_anything(&s, h.l, &seed);
        raw_close(s.r);
        end_stage(&s);
        check_held(row, from, &o);
        if (i % 10 == 0) check_honest(&h, row);
    }
    if (getenv("HOSTILE_TIMES")) printf("%d steps\n", steps);
    close_house(&h);
}

/* Break and resume in a loop, also without a break, with frames that are never acknowledged: replayed each time. */
static void test_resumes_in_a_loop(void) {
    enum { COUNT = 100 / LESS };
    static house h;
    static stage s;
    netchan_options o = narrow();
    o.resume_ms = LONG;
    open_house(&h, &o);
    size_t from = hold_from();
    begin_stage(&s, &h, h.l, raw_join(h.l->address, 0));
    play(&s, "x4000 CLAIM 1 max 1 5; x30 DEMAND 1 # . 0 0; x30 OFFER 0 # . 0 1; <DECLINE");
    uint64_t received = s.r->received;
    for (uint64_t i = 1; i <= COUNT; i++) {
        s.r->received = 0; /* not one frame has come, it says */
        CHECK(move_stage(&s, h.l, i, i % 2));
        if (i % 10 == 0) check_honest(&h, "resumes in a loop");
    }
    CHECK(received > 0);
    check_held("resumes in a loop", from, &o);
    if (!is_alive(&s)) note_failure("resumes in a loop", "the session is over");
    raw_close(s.r);
    end_stage(&s);
    close_house(&h);
}

/* It resumes its session while that is up, and is silent then. */
static void test_silence_after_a_resume(void) {
    static stage s;
    netchan_options o = impatient();
    o.ping_ms = 50;
    netchan_link *l = listen_with(&o);
    begin_stage(&s, NULL, l, raw_join(l->address, 0));
    CHECK(move_stage(&s, l, 1, false));
    expect(l, "down", "nothing was heard");
    expect(l, "lost", "did not come back");
    raw_wait_closed(s.r);
    raw_close(s.r);
    end_stage(&s);
    netchan_hangup(l, NULL);
    CHECK_INT(alloc_blocks(), 0);
}

/* What a RESUME is answered with by who does not know the session, or lies about it. The session waits, and goes on
 * when it is answered right. */
static void test_a_lying_listener_resumes(void) {
    static stage s;
    static house h;
    netchan_options o = narrow();
    open_house(&h, &o);
    door d = open_door();
    caller c;
    o.resume_ms = LONG;
    raw *r = answer(&c, &d, &o, 3);
    begin_stage(&s, NULL, c.link, r);
    play(&s, "CREDIT 0 3 0; send 5; <DATA; quiet");
    uint64_t received = r->received;
    for (int i = 0; i < 6; i++) { /* it waits longer each time */
        bytes b;
        raw_close(r);
        r = raw_accept(&d);
        claim m = read_resume(r);
        b.size = 0;
        m.received = received;
        if (i == 0) m.secret[0] ^= 1;
        if (i == 1) m.received = UINT64_MAX;
        if (i < 2) put_resumed(&b, &m, 'L');
        if (i == 2) put_resumed(&b, &m, 'D'); /* what it said itself */
        if (i == 3) PUT(&b, RESUMED, received);
        if (i == 4) PUT(&b, CREDIT, 0, 3, 0);
        if (i == 5) put_resumed(&b, &m, 'L'), put_resumed(&b, &m, 'L'); /* right, and then once more */
        raw_say(r, &b);
        raw_wait_closed(r);
        check_honest(&h, "resumed");
    }
    expect(c.link, "lost", "greeted twice");
    raw_close(r);
    close(d.fd);
    netchan_hangup(c.link, NULL);
    end_stage(&s);
    close_house(&h);
}

/* Those who do not answer do not hold up who hangs up. */
static void test_hanging_up_on_the_silent(void) {
    static stage s[3];
    netchan_options o = narrow();
    netchan_link *l = listen_with(&o);
    for (int i = 0; i < 3; i++) {
        begin_stage(&s[i], NULL, l, raw_join(l->address, 3));
        if (i == 1) play(&s[i], "<CREDIT; DATA 0 : 05; recv2; OFFER 0 # . 0 1; quiet");
        if (i == 2) play(&s[i], "x30 DEMAND 1 # . 1 0; send 20000; <CLAIM; GRANT m 0; BYE 0");
    }
    long long start = test_ms();
    netchan_hangup(l, NULL);
    CHECK(test_ms() - start < o.linger_ms + LATE);
    for (int i = 0; i < 3; i++) {
        raw_wait_closed(s[i].r);
        raw_close(s[i].r);
        end_stage(&s[i]);
    }
    CHECK_INT(alloc_blocks(), 0);
}

/* The values of those who come, leave something and go count for max_peers until somebody receives them. */
static void test_who_comes_and_goes(void) {
    enum { PEERS = 6 };
    static house h;
    netchan_options o = narrow();
    o.max_peers = PEERS;
    o.resume_ms = 20;
    open_house(&h, &o);
    size_t from = hold_from();
    for (int i = 2; i <= PEERS; i++) { /* two are there already */
        static stage s;
        greeting g = good_greeting();
        bytes b;
        b.size = 0;
        g.capacity = 10;
        put_greeting(&b, &g);
        begin_stage(&s, &h, h.l, raw_enter(h.l->address));
        raw_say(s.r, &b);
        if (i < PEERS) {
            play(&s, "<HELLO; <CREDIT; DATA 0 : 88 fd 7c fb 7c 15995*80; quiet");
            raw_close(s.r);
            expect(h.l, "lost", "did not come back");
        } else {
            raw_wait_closed(s.r);
            raw_close(s.r);
            expect(h.l, "rejected", "max_peers");
        }
        end_stage(&s);
    }
    check_held("comes and goes", from, &o);
    close_house(&h);
}

/* Records of TLS without a byte in them are work for nothing: they are not for ever. */
static void test_empty_records(void) {
    enum { COUNT = 100000 / FEWER };
    static house h;
    netchan_options o = narrow();
    open_house(&h, &o);
    raw *r = raw_join(h.l->address, 0);
    int e = 0;
    for (int i = 0; i < COUNT && e >= 0; i++) {
        pthread_mutex_lock(&netchan__tls_lock);
        e = mbedtls_ssl_write(&r->ssl, (const unsigned char *)"", 0);
        pthread_mutex_unlock(&netchan__tls_lock);
        if (e == MBEDTLS_ERR_SSL_WANT_WRITE) e = 0, CHECK(wait_for_fd(r->fd, POLLOUT));
    }
    raw_close(r);
    expect(h.l, "down", "");
    check_honest(&h, "empty records");
    close_house(&h);
}

int main(int argc, char **argv) {
    static const test_entry tests[] = {
        TEST(lengths),
        TEST(frames_that_are_cut_off),
        TEST(greetings_out_of_place),
        TEST(entries),
        TEST(answers),
        TEST(credit_and_closing),
        TEST(values),
        TEST(ends),
        TEST(names),
        TEST(a_lying_home),
        TEST(a_lying_home_behind_a_relay),
        TEST(a_lying_peer_of_a_relay),
        TEST(a_lying_listener),
        TEST(large_values_for_who_never_reads),
        TEST(large_values_that_swell),
        TEST(values_that_wait_for_an_answer),
        TEST(a_listener_that_leaves_under_pressure),
        TEST(answers_before_the_value),
        TEST(values_that_come_back_larger),
        TEST(ends_that_are_never_dropped),
        TEST(a_size_that_lies_hurts_nobody_else),
        TEST(a_no_counts_once),
        TEST(a_question_without_an_answer),
        TEST(much_work),
        TEST(who_never_goes_on),
        TEST(who_breaks_and_resumes),
        TEST(empty_fragments_through_a_relay),
        TEST(floods_of_who_never_reads),
        TEST(a_million),
        TEST(a_million_ends),
        TEST(a_channel_in_itself),
        TEST(lying_greetings),
        TEST(boasters),
        TEST(resumes_of_others),
        TEST(anything),
        TEST(resumes_in_a_loop),
        TEST(silence_after_a_resume),
        TEST(a_lying_listener_resumes),
        TEST(hanging_up_on_the_silent),
        TEST(who_comes_and_goes),
        TEST(empty_records),
        TEST_END,
    };
    return test_main(argc, argv, tests);
}
