/* Channels and select within one process: section [D] of netchan.h. */
#include "alloc.h"
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"
#include "test.h"
#include "task.h"

#include <sys/resource.h>

#ifdef __SANITIZE_THREAD__
enum { MANY_CASES = 30 }; /* ThreadSanitizer follows 64 locks of one thread, and a channel has two */
#else
enum { MANY_CASES = 100 };
#endif

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { CLOSES = 50 }; /* so often traffic is closed in the middle */
#else
enum { CLOSES = 150 };
#endif

enum {
    LONG = 20000, /* ms: a wait that a right implementation ends much sooner; its end fails the test */
    SHORT = 20,   /* ms: time for something wrong to happen */
    EARLY = 2     /* ms: how much too soon a time may seem to be up, with two clocks rounded down */
};

/* --- helpers --- */

static netchan *make(size_t capacity) {
    netchan *ch = netchan_make(capacity);
    CHECK(ch != NULL);
    return ch;
}

static void send_int(netchan *ch, int64_t n) {
    CHECK_INT(netchan_send(ch, netchan_int(n), LONG), NETCHAN_OK);
}

static int64_t recv_int(netchan *ch) {
    netchan_value v;
    CHECK_INT(netchan_recv(ch, &v, LONG), NETCHAN_OK);
    CHECK_INT(v.type, NETCHAN_INT);
    return netchan_as_int(&v, 0);
}

static void *run_task(void *arg) {
    task *t = (task *)arg;
    if (t->cases) t->result = netchan_select(t->cases, t->count, t->timeout_ms);
    else if (t->is_send) t->result = netchan_send(t->ch, t->value, t->timeout_ms);
    else t->result = netchan_recv(t->ch, &t->value, t->timeout_ms);
    __atomic_store_n(&t->done, true, __ATOMIC_RELEASE);
    return NULL;
}

/* Waits until `count` cases wait on the channel. The one place that looks inside: nothing public tells that a thread is
 * blocked. */
static void wait_for_waiters(netchan *ch, size_t count) {
    for (size_t found = count + 1; found != count; sched_yield()) {
        found = 0;
        pthread_mutex_lock(&ch->own.receiving);
        for (netchan__waiter *w = ch->receivers.head; w; w = w->next) found++;
        for (netchan__waiter *w = ch->lane.senders.head; w; w = w->next) found++;
        pthread_mutex_unlock(&ch->own.receiving);
    }
}

/* The call must have waited for its whole timeout, and not for ever. */
static void check_waited(long long start, int timeout_ms) {
    long long took = test_ms() - start;
    CHECK(took >= timeout_ms - EARLY);
    CHECK(took < timeout_ms + LONG / 2);
}

static void check_nothing_left(void) {
    CHECK_INT(alloc_blocks(), 0);
}

/* A value of several blocks' worth: a map with strings and a list. */
static netchan_value rich_value(netchan_entry *entries, netchan_value *list) {
    list[0] = netchan_str("a string that is too long to be anywhere but in memory of its own");
    list[1] = netchan_int(5);
    entries[0].key = "name";
    entries[0].value = netchan_str("rich");
    entries[1].key = "list";
    entries[1].value = netchan_array(list, 2);
    return netchan_map(entries, 2);
}

static void send_rich(netchan *ch, int timeout_ms, int right) {
    netchan_entry entries[2];
    netchan_value list[2];
    CHECK_INT(netchan_send(ch, rich_value(entries, list), timeout_ms), right);
    memset(entries, 0xaa, sizeof entries); /* the send must have copied all it keeps */
    memset(list, 0xaa, sizeof list);
}

static void check_rich(const netchan_value *v) {
    CHECK_STR(netchan_as_str(netchan_get(v, "name"), "?"), "rich");
    CHECK_INT(netchan_as_int(netchan_at(netchan_get(v, "list"), 1), 0), 5);
}

/* --- one thread --- */

static void test_len_and_cap(void) {
    static const size_t caps[] = {0, 1, 2, 7, 8, 100};
    for (size_t i = 0; i < sizeof caps / sizeof *caps; i++) {
        netchan *ch = make(caps[i]);
        CHECK_INT(netchan_cap(ch), caps[i]);
        for (size_t n = 0; n < caps[i]; n++) {
            CHECK_INT(netchan_len(ch), n);
            CHECK_INT(netchan_send(ch, netchan_int((int64_t)n), NETCHAN_NOWAIT), NETCHAN_OK);
        }
        CHECK_INT(netchan_len(ch), caps[i]);
        CHECK_INT(netchan_send(ch, netchan_nil(), NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
        CHECK_INT(netchan_len(ch), caps[i]);
        netchan_close(ch);
        CHECK_INT(netchan_len(ch), caps[i]);
        CHECK_INT(netchan_cap(ch), caps[i]);
        netchan_free(ch);
    }
    CHECK_INT(netchan_len(NULL), 0);
    CHECK_INT(netchan_cap(NULL), 0);
    check_nothing_left();
}

static void test_fifo_at_every_fill(void) {
    for (size_t cap = 1; cap <= 20; cap += cap < 4 ? 1 : 5) {
        netchan *ch = make(cap);
        int64_t in = 0, out = 0;
        uint64_t seed = 5;
        for (int round = 0; round < 500; round++) {
            for (uint64_t n = test_random(&seed) % (cap + 2); n > 0; n--) {
                int right = in - out < (int64_t)cap ? NETCHAN_OK : NETCHAN_ETIMEDOUT;
                CHECK_INT(netchan_send(ch, netchan_int(in), NETCHAN_NOWAIT), right);
                in += right == NETCHAN_OK;
            }
            for (uint64_t n = test_random(&seed) % (cap + 2); n > 0; n--) {
                netchan_value v;
                memset(&v, 0xaa, sizeof v);
                CHECK_INT(netchan_recv(ch, &v, NETCHAN_NOWAIT), out < in ? NETCHAN_OK : NETCHAN_ETIMEDOUT);
                if (out < in) CHECK_INT(netchan_as_int(&v, -1), out++);
                else CHECK(v.type == NETCHAN_NIL && v.flags == 0);
            }
            CHECK_INT(netchan_len(ch), in - out);
        }
        netchan_free(ch);
    }
    check_nothing_left();
}

static void test_huge_capacity(void) {
    netchan *ch = netchan_make(SIZE_MAX);
    if (ch) {
        CHECK(netchan_cap(ch) == SIZE_MAX);
        for (int i = 0; i < 1000; i++) CHECK_INT(netchan_send(ch, netchan_int(i), NETCHAN_NOWAIT), NETCHAN_OK);
        for (int i = 0; i < 1000; i++) CHECK_INT(recv_int(ch), i);
    } else CHECK(strlen(netchan_errmsg()) > 0);
    netchan_free(ch);
}

static void test_nobody_there(void) {
    netchan *ch = make(0);
    netchan_value v;
    memset(&v, 0xaa, sizeof v);
    CHECK_INT(netchan_send(ch, netchan_int(1), NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    CHECK_INT(netchan_recv(ch, &v, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    CHECK(v.type == NETCHAN_NIL && v.flags == 0);
    long long start = test_ms();
    CHECK_INT(netchan_send(ch, netchan_int(1), 30), NETCHAN_ETIMEDOUT);
    check_waited(start, 30);
    start = test_ms();
    CHECK_INT(netchan_recv(ch, &v, 30), NETCHAN_ETIMEDOUT);
    check_waited(start, 30);
    CHECK_INT(netchan_len(ch), 0);
    CHECK_INT(netchan_recv(ch, &v, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT); /* what timed out is gone */
    netchan_free(ch);
    ch = make(1);
    send_int(ch, 1);
    start = test_ms();
    CHECK_INT(netchan_send(ch, netchan_int(2), 30), NETCHAN_ETIMEDOUT);
    check_waited(start, 30);
    CHECK_INT(recv_int(ch), 1);
    CHECK_INT(netchan_recv(ch, &v, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    netchan_free(ch);
    check_nothing_left();
}

static void test_null_channels_wait(void) {
    netchan_value v;
    memset(&v, 0xaa, sizeof v);
    CHECK_INT(netchan_send(NULL, netchan_int(1), NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    CHECK_INT(netchan_recv(NULL, &v, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    CHECK(v.type == NETCHAN_NIL && v.flags == 0);
    long long start = test_ms();
    CHECK_INT(netchan_send(NULL, netchan_int(1), 30), NETCHAN_ETIMEDOUT);
    check_waited(start, 30);
    start = test_ms();
    CHECK_INT(netchan_recv(NULL, NULL, 30), NETCHAN_ETIMEDOUT);
    check_waited(start, 30);
    CHECK(netchan_retain(NULL) == NULL);
    netchan_free(NULL);
    check_nothing_left();
}

static void test_close_and_drain(void) {
    netchan *ch = make(3);
    netchan_value v;
    send_int(ch, 1);
    send_int(ch, 2);
    CHECK_INT(netchan_close(ch), NETCHAN_OK);
    CHECK_INT(netchan_send(ch, netchan_int(3), NETCHAN_NOWAIT), NETCHAN_ECLOSED);
    CHECK_INT(netchan_send(ch, netchan_int(3), NETCHAN_FOREVER), NETCHAN_ECLOSED);
    CHECK_INT(netchan_close(ch), NETCHAN_ECLOSED);
    CHECK_INT(netchan_len(ch), 2);
    CHECK_INT(recv_int(ch), 1);
    CHECK_INT(recv_int(ch), 2);
    for (int i = 0; i < 3; i++) {
        memset(&v, 0xaa, sizeof v);
        CHECK_INT(netchan_recv(ch, &v, i == 0 ? NETCHAN_NOWAIT : NETCHAN_FOREVER), NETCHAN_ECLOSED);
        CHECK(v.type == NETCHAN_NIL && v.flags == 0);
        CHECK_INT(netchan_recv(ch, NULL, NETCHAN_FOREVER), NETCHAN_ECLOSED);
    }
    CHECK_INT(netchan_close(ch), NETCHAN_ECLOSED);
    CHECK_INT(netchan_len(ch), 0);
    netchan_free(ch);
    ch = make(0);
    CHECK_INT(netchan_close(ch), NETCHAN_OK);
    CHECK_INT(netchan_send(ch, netchan_int(3), NETCHAN_FOREVER), NETCHAN_ECLOSED);
    CHECK_INT(netchan_recv(ch, &v, NETCHAN_FOREVER), NETCHAN_ECLOSED);
    CHECK_INT(netchan_close(ch), NETCHAN_ECLOSED);
    netchan_free(ch);
    check_nothing_left();
}

static void test_closed_while_full(void) {
    netchan *ch = make(1);
    send_int(ch, 1);
    CHECK_INT(netchan_close(ch), NETCHAN_OK);
    CHECK_INT(netchan_send(ch, netchan_int(2), NETCHAN_FOREVER), NETCHAN_ECLOSED);
    CHECK_INT(recv_int(ch), 1);
    CHECK_INT(netchan_recv(ch, NULL, NETCHAN_FOREVER), NETCHAN_ECLOSED);
    netchan_free(ch);
    check_nothing_left();
}

/* --- blocking and waking --- */

static void test_rendezvous_waits_for_the_receiver(void) {
    netchan *ch = make(0);
    for (int i = 0; i < 3; i++) {
        task t;
        start_send(&t, ch, netchan_int(i), i == 0 ? NETCHAN_FOREVER : LONG);
        test_pause(SHORT);
        CHECK(!is_done(&t));
        CHECK_INT(netchan_len(ch), 0); /* a value that waits is not in the channel */
        CHECK_INT(recv_int(ch), i);
        CHECK_INT(end_task(&t), NETCHAN_OK);
    }
    netchan_free(ch);
    check_nothing_left();
}

static void test_receiver_waits_for_the_sender(void) {
    for (size_t cap = 0; cap < 3; cap++) {
        netchan *ch = make(cap);
        task t;
        start_recv(&t, ch, NETCHAN_FOREVER);
        test_pause(SHORT);
        CHECK(!is_done(&t));
        send_int(ch, 7);
        CHECK_INT(end_task(&t), NETCHAN_OK);
        CHECK_INT(netchan_as_int(&t.value, 0), 7);
        netchan_free(ch);
    }
    check_nothing_left();
}

static void test_full_channel_waits_for_room(void) {
    netchan *ch = make(2);
    task t;
    send_int(ch, 1);
    send_int(ch, 2);
    start_send(&t, ch, netchan_int(3), NETCHAN_FOREVER);
    test_pause(SHORT);
    CHECK(!is_done(&t));
    CHECK_INT(netchan_len(ch), 2);
    CHECK_INT(recv_int(ch), 1);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    CHECK_INT(netchan_len(ch), 2);
    CHECK_INT(recv_int(ch), 2);
    CHECK_INT(recv_int(ch), 3);
    netchan_free(ch);
    check_nothing_left();
}

/* NOWAIT succeeds exactly when the other side waits already, which it does sooner or later. */
static void test_nowait_meets_who_waits(void) {
    netchan *ch = make(0);
    netchan_value v;
    task t;
    int result;
    start_recv(&t, ch, NETCHAN_FOREVER);
    while ((result = netchan_send(ch, netchan_int(5), NETCHAN_NOWAIT)) == NETCHAN_ETIMEDOUT) sched_yield();
    CHECK_INT(result, NETCHAN_OK);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    CHECK_INT(netchan_as_int(&t.value, 0), 5);
    start_send(&t, ch, netchan_int(6), NETCHAN_FOREVER);
    while ((result = netchan_recv(ch, &v, NETCHAN_NOWAIT)) == NETCHAN_ETIMEDOUT) sched_yield();
    CHECK_INT(result, NETCHAN_OK);
    CHECK_INT(netchan_as_int(&v, 0), 6);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    netchan_free(ch);
    check_nothing_left();
}

static void test_waiting_senders_are_served_in_turn(void) {
    for (size_t cap = 0; cap < 2; cap++) {
        netchan *ch = make(cap);
        task t[5];
        for (size_t i = 0; i < cap; i++) send_int(ch, -1);
        for (int i = 0; i < 5; i++) {
            start_send(&t[i], ch, netchan_int(i), NETCHAN_FOREVER);
            wait_for_waiters(ch, (size_t)i + 1);
        }
        for (size_t i = 0; i < cap; i++) CHECK_INT(recv_int(ch), -1);
        for (int i = 0; i < 5; i++) CHECK_INT(recv_int(ch), i);
        for (int i = 0; i < 5; i++) CHECK_INT(end_task(&t[i]), NETCHAN_OK);
        netchan_free(ch);
    }
    check_nothing_left();
}

static void test_waiting_receivers_are_served_in_turn(void) {
    for (size_t cap = 0; cap < 2; cap++) {
        netchan *ch = make(cap);
        task t[5];
        for (int i = 0; i < 5; i++) {
            start_recv(&t[i], ch, NETCHAN_FOREVER);
            wait_for_waiters(ch, (size_t)i + 1);
        }
        for (int i = 0; i < 5; i++) send_int(ch, i);
        for (int i = 0; i < 5; i++) {
            CHECK_INT(end_task(&t[i]), NETCHAN_OK);
            CHECK_INT(netchan_as_int(&t[i].value, -1), i);
        }
        netchan_free(ch);
    }
    check_nothing_left();
}

/* Who gave up does not stand in the way of who still waits. */
static void test_those_who_gave_up_are_out_of_the_queue(void) {
    netchan *ch = make(0);
    task t[4];
    for (int i = 0; i < 4; i++) {
        start_send(&t[i], ch, netchan_int(i), i % 2 ? NETCHAN_FOREVER : 1);
        if (i % 2) wait_for_waiters(ch, (size_t)i / 2 + 1);
        else CHECK_INT(end_task(&t[i]), NETCHAN_ETIMEDOUT);
    }
    CHECK_INT(recv_int(ch), 1);
    CHECK_INT(recv_int(ch), 3);
    CHECK_INT(end_task(&t[1]), NETCHAN_OK);
    CHECK_INT(end_task(&t[3]), NETCHAN_OK);
    wait_for_waiters(ch, 0);
    netchan_free(ch);
    check_nothing_left();
}

static void test_close_wakes_receivers(void) {
    for (int early = 0; early < 2; early++) {
        for (size_t cap = 0; cap < 2; cap++) {
            netchan *ch = make(cap);
            task t[8];
            for (int i = 0; i < 8; i++) start_recv(&t[i], ch, NETCHAN_FOREVER);
            if (!early) wait_for_waiters(ch, 8); /* both when they wait and when they only come */
            CHECK_INT(netchan_close(ch), NETCHAN_OK);
            for (int i = 0; i < 8; i++) {
                CHECK_INT(end_task(&t[i]), NETCHAN_ECLOSED);
                CHECK(netchan_is_nil(&t[i].value));
            }
            netchan_free(ch);
        }
    }
    check_nothing_left();
}

static void test_close_wakes_senders(void) {
    for (int early = 0; early < 2; early++) {
        for (size_t cap = 0; cap < 3; cap++) {
            netchan *ch = make(cap);
            task t[8];
            for (size_t i = 0; i < cap; i++) send_int(ch, 100);
            for (int i = 0; i < 8; i++) start_send(&t[i], ch, netchan_str("never received"), NETCHAN_FOREVER);
            if (!early) wait_for_waiters(ch, 8);
            CHECK_INT(netchan_close(ch), NETCHAN_OK);
            for (int i = 0; i < 8; i++) CHECK_INT(end_task(&t[i]), NETCHAN_ECLOSED);
            for (size_t i = 0; i < cap; i++) CHECK_INT(recv_int(ch), 100);
            CHECK_INT(netchan_recv(ch, NULL, NETCHAN_NOWAIT), NETCHAN_ECLOSED);
            netchan_free(ch);
        }
    }
    check_nothing_left();
}

static void test_each_waiting_receiver_gets_one(void) {
    enum { COUNT = 32 };
    for (size_t cap = 0; cap < 2; cap++) {
        netchan *ch = make(cap);
        task t[COUNT];
        int64_t sum = 0;
        for (int i = 0; i < COUNT; i++) start_recv(&t[i], ch, LONG);
        for (int i = 0; i < COUNT; i++) send_int(ch, i);
        for (int i = 0; i < COUNT; i++) {
            CHECK_INT(end_task(&t[i]), NETCHAN_OK);
            sum += netchan_as_int(&t[i].value, -1000);
        }
        CHECK_INT(sum, COUNT * (COUNT - 1) / 2);
        netchan_free(ch);
    }
    check_nothing_left();
}

static long long cpu_ms(const struct rusage *r) {
    long long us = r->ru_utime.tv_usec + r->ru_stime.tv_usec;
    return (long long)(r->ru_utime.tv_sec + r->ru_stime.tv_sec) * 1000 + us / 1000;
}

static void test_waiting_costs_no_time(void) {
    netchan *a = make(0), *b = make(1);
    struct rusage before, after;
    getrusage(RUSAGE_SELF, &before);
    netchan_case c[2];
    c[0] = netchan_case_send(a, netchan_int(1));
    c[1] = netchan_case_recv(b, NULL);
    CHECK_INT(netchan_select(c, 2, 200), NETCHAN_ETIMEDOUT);
    CHECK_INT(netchan_recv(b, NULL, 200), NETCHAN_ETIMEDOUT);
    CHECK_INT(netchan_send(NULL, netchan_int(1), 200), NETCHAN_ETIMEDOUT);
    getrusage(RUSAGE_SELF, &after);
    CHECK(cpu_ms(&after) - cpu_ms(&before) < 100);
    netchan_free(a);
    netchan_free(b);
}

/* --- what one thread wrote before, the other sees: ThreadSanitizer watches the plain variables --- */

typedef struct shared {
    netchan *ch, *done;
    int data[64];
} shared;

static void *write_then_send(void *arg) {
    shared *s = (shared *)arg;
    for (int i = 0; i < 64; i++) {
        s->data[i] = i + 1;
        send_int(s->ch, i);
    }
    return NULL;
}

static void test_a_send_happens_before_its_receive(void) {
    for (size_t cap = 0; cap < 3; cap++) {
        shared s = {make(cap), NULL, {0}};
        pthread_t thread = test_start(write_then_send, &s);
        for (int i = 0; i < 64; i++) {
            int64_t n = recv_int(s.ch);
            CHECK_INT(s.data[n], n + 1);
        }
        test_join(thread);
        netchan_free(s.ch);
    }
}

static void *write_then_recv(void *arg) {
    shared *s = (shared *)arg;
    for (int i = 0; i < 64; i++) {
        s->data[i] = i + 1;
        recv_int(s->ch);
    }
    return NULL;
}

/* In a rendezvous the receiver's past is the sender's too. */
static void test_a_receive_happens_before_its_send_returns(void) {
    shared s = {make(0), NULL, {0}};
    pthread_t thread = test_start(write_then_recv, &s);
    for (int i = 0; i < 64; i++) {
        send_int(s.ch, i);
        CHECK_INT(s.data[i], i + 1);
    }
    test_join(thread);
    netchan_free(s.ch);
}

static void *count_under_semaphore(void *arg) {
    shared *s = (shared *)arg;
    for (int i = 0; i < 500; i++) {
        send_int(s->ch, 0);
        s->data[0]++;
        recv_int(s->ch);
    }
    return NULL;
}

static void test_a_channel_is_a_mutex(void) {
    shared s = {make(1), NULL, {0}};
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) threads[i] = test_start(count_under_semaphore, &s);
    for (int i = 0; i < 4; i++) test_join(threads[i]);
    CHECK_INT(s.data[0], 2000);
    netchan_free(s.ch);
}

static void *write_then_close(void *arg) {
    shared *s = (shared *)arg;
    s->data[0] = 1;
    netchan_close(s->ch);
    return NULL;
}

static void test_a_close_happens_before_its_receive(void) {
    for (int select = 0; select < 2; select++) {
        shared s = {make(0), NULL, {0}};
        pthread_t thread = test_start(write_then_close, &s);
        netchan_case c = netchan_case_recv(s.ch, NULL);
        if (select) CHECK_INT(netchan_select(&c, 1, LONG), 0);
        CHECK_INT(select ? c.result : netchan_recv(s.ch, NULL, LONG), NETCHAN_ECLOSED);
        CHECK_INT(s.data[0], 1);
        test_join(thread);
        netchan_free(s.ch);
    }
}

/* --- select --- */

static void test_select_takes_the_ready_case(void) {
    netchan *empty = make(1), *full = make(1), *ready = make(1);
    send_int(full, 1);
    for (int i = 0; i < 50; i++) {
        netchan_value v[2];
        memset(v, 0xaa, sizeof v);
        netchan_case c[4];
        c[0] = netchan_case_recv(empty, &v[0]);
        c[1] = netchan_case_send(full, netchan_int(2));
        c[2] = netchan_case_recv(NULL, &v[1]);
        c[3] = i % 2 ? netchan_case_recv(ready, &v[1]) : netchan_case_send(ready, netchan_int(i));
        CHECK_INT(netchan_select(c, 4, i % 4 < 2 ? NETCHAN_NOWAIT : NETCHAN_FOREVER), 3);
        CHECK_INT(c[3].result, NETCHAN_OK);
        CHECK_INT(c[3].peer.id, 0);
        CHECK(!c[3].redelivered);
        for (int j = 0; j < 3; j++) CHECK_INT(c[j].result, NETCHAN_ETIMEDOUT);
        if (i % 2) CHECK_INT(netchan_as_int(&v[1], -1), i - 1);
        CHECK_INT(netchan_len(ready), i % 2 ? 0 : 1);
        CHECK_INT(netchan_len(full), 1);
        CHECK_INT(netchan_len(empty), 0);
    }
    netchan_free(empty);
    netchan_free(full);
    netchan_free(ready);
    check_nothing_left();
}

static void test_select_times_out(void) {
    netchan *a = make(0), *b = make(1);
    netchan_value v;
    netchan_case c[3];
    memset(&v, 0xaa, sizeof v);
    c[0] = netchan_case_recv(b, &v);
    c[1] = netchan_case_send(a, netchan_str("nobody"));
    c[2] = netchan_case_send(NULL, netchan_int(1));
    CHECK_INT(netchan_select(c, 3, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    long long start = test_ms();
    CHECK_INT(netchan_select(c, 3, 30), NETCHAN_ETIMEDOUT);
    check_waited(start, 30);
    for (int i = 0; i < 3; i++) CHECK_INT(c[i].result, NETCHAN_ETIMEDOUT);
    CHECK_INT(netchan_recv(a, NULL, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT); /* what was not sent is gone */
    CHECK_INT(netchan_send(a, netchan_int(1), NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    netchan_free(a);
    netchan_free(b);
    check_nothing_left();
}

static void test_select_of_nothing(void) {
    netchan_case c[2];
    c[0] = netchan_case_recv(NULL, NULL);
    c[1] = netchan_case_send(NULL, netchan_int(1));
    CHECK_INT(netchan_select(NULL, 0, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    CHECK_INT(netchan_select(c, 2, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    for (size_t count = 0; count < 3; count++) {
        long long start = test_ms();
        CHECK_INT(netchan_select(count ? c : NULL, count, 30), NETCHAN_ETIMEDOUT);
        check_waited(start, 30);
    }
    check_nothing_left();
}

static void test_select_on_closed_channels(void) {
    netchan *closed = make(1), *idle = make(0);
    netchan_value v;
    send_int(closed, 9);
    netchan_close(closed);
    netchan_case c[2];
    c[0] = netchan_case_recv(idle, NULL);
    c[1] = netchan_case_recv(closed, &v);
    CHECK_INT(netchan_select(c, 2, NETCHAN_FOREVER), 1);
    CHECK_INT(c[1].result, NETCHAN_OK); /* first what is left */
    CHECK_INT(netchan_as_int(&v, 0), 9);
    memset(&v, 0xaa, sizeof v);
    CHECK_INT(netchan_select(c, 2, NETCHAN_NOWAIT), 1);
    CHECK_INT(c[1].result, NETCHAN_ECLOSED);
    CHECK_INT(c[0].result, NETCHAN_ETIMEDOUT);
    CHECK(v.type == NETCHAN_NIL && v.flags == 0);
    c[1] = netchan_case_send(closed, netchan_int(1));
    CHECK_INT(netchan_select(c, 2, NETCHAN_FOREVER), 1);
    CHECK_INT(c[1].result, NETCHAN_ECLOSED);
    netchan_free(closed);
    netchan_free(idle);
    check_nothing_left();
}

static void test_select_drops_into_null(void) {
    netchan *ch = make(2);
    send_rich(ch, NETCHAN_NOWAIT, NETCHAN_OK);
    netchan_case c = netchan_case_recv(ch, NULL);
    CHECK_INT(netchan_select(&c, 1, NETCHAN_NOWAIT), 0);
    CHECK_INT(netchan_len(ch), 0);
    netchan_free(ch);
    check_nothing_left();
}

/* A select that waits is woken by whichever of its cases becomes possible, and only that one happens. */
static void test_select_is_woken_by_each_case(void) {
    enum { COUNT = 6 };
    for (size_t cap = 0; cap < 2; cap++) {
        for (int which = 0; which < COUNT; which++) {
            for (int close = 0; close < 2; close++) {
                netchan *ch[COUNT];
                netchan_case c[COUNT];
                netchan_value v[COUNT];
                task t;
                for (int i = 0; i < COUNT; i++) {
                    ch[i] = make(cap);
                    if (i % 2 && cap) send_int(ch[i], 50);
                    c[i] = i % 2 ? netchan_case_send(ch[i], netchan_int(i)) : netchan_case_recv(ch[i], &v[i]);
                }
                start_select(&t, c, COUNT, LONG);
                if (which % 3) wait_for_waiters(ch[COUNT - 1], 1); /* else it may come upon a case that is ready */
                if (close) netchan_close(ch[which]);
                else if (which % 2 == 0) send_int(ch[which], which);
                else CHECK_INT(recv_int(ch[which]), cap ? 50 : which);
                CHECK_INT(end_task(&t), which);
                CHECK_INT(c[which].result, close ? NETCHAN_ECLOSED : NETCHAN_OK);
                if (which % 2 == 0 && !close) CHECK_INT(netchan_as_int(&v[which], -1), which);
                for (int i = 0; i < COUNT; i++) {
                    if (i != which) CHECK_INT(c[i].result, NETCHAN_ETIMEDOUT);
                    CHECK_INT(netchan_len(ch[i]), cap && i % 2);
                    wait_for_waiters(ch[i], 0); /* the select waits nowhere any more */
                    netchan_free(ch[i]);
                }
            }
        }
    }
    check_nothing_left();
}

static void test_select_of_many_cases(void) {
    enum { COUNT = MANY_CASES };
    netchan *ch[COUNT];
    netchan_case c[COUNT];
    netchan_value v;
    for (int i = 0; i < COUNT; i++) ch[i] = make(i % 2 ? 0 : 1);
    for (int round = 0; round < 300; round++) {
        int which = round * 37 % COUNT;
        bool send = round % 3 == 0; /* the select's direction in this round */
        task t;
        for (int i = 0; i < COUNT; i++) c[i] = netchan_case_recv(ch[i], &v);
        if (send) c[which] = netchan_case_send(ch[which], netchan_int(round));
        start_select(&t, c, COUNT, LONG);
        if (send) CHECK_INT(recv_int(ch[which]), round);
        else send_int(ch[which], round);
        CHECK_INT(end_task(&t), which);
        CHECK_INT(c[which].result, NETCHAN_OK);
        if (!send) CHECK_INT(netchan_as_int(&v, -1), round);
    }
    for (int i = 0; i < COUNT; i++) c[i] = netchan_case_recv(ch[0], &v);
    CHECK_INT(netchan_select(c, COUNT, 1), NETCHAN_ETIMEDOUT);
    send_int(ch[0], 3);
    CHECK(netchan_select(c, COUNT, NETCHAN_NOWAIT) >= 0);
    CHECK_INT(netchan_as_int(&v, -1), 3);
    for (int i = 0; i < COUNT; i++) netchan_free(ch[i]);
    check_nothing_left();
}

static void test_one_channel_in_several_cases(void) {
    for (size_t cap = 0; cap < 2; cap++) {
        netchan *ch = make(cap);
        netchan_value v[3];
        netchan_case c[3];
        for (int round = 0; round < 200; round++) {
            task t;
            for (int i = 0; i < 3; i++) c[i] = netchan_case_recv(ch, &v[i]);
            start_select(&t, c, 3, LONG);
            send_int(ch, round);
            int i = end_task(&t);
            CHECK(i >= 0 && i < 3);
            CHECK_INT(netchan_as_int(&v[i], -1), round);
            for (int j = 0; j < 3; j++) CHECK_INT(c[j].result, j == i ? NETCHAN_OK : NETCHAN_ETIMEDOUT);
            for (int j = 0; j < 3; j++) c[j] = netchan_case_send(ch, netchan_int(j));
            start_select(&t, c, 3, LONG);
            int64_t got = recv_int(ch);
            CHECK_INT(end_task(&t), got);
            CHECK_INT(netchan_recv(ch, NULL, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
        }
        netchan_free(ch);
    }
    check_nothing_left();
}

static void test_a_select_never_meets_itself(void) {
    netchan *ch = make(0);
    netchan_value v;
    netchan_case c[4];
    for (int i = 0; i < 4; i++) c[i] = i % 2 ? netchan_case_recv(ch, &v) : netchan_case_send(ch, netchan_int(i));
    CHECK_INT(netchan_select(c, 4, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    CHECK_INT(netchan_select(c, 4, SHORT), NETCHAN_ETIMEDOUT);
    CHECK_INT(netchan_select(c + 1, 3, SHORT), NETCHAN_ETIMEDOUT);
    task t;
    for (int i = 0; i < 4; i++) { /* but whoever comes, to send or to receive */
        start_select(&t, c + i % 2, 2, LONG);
        wait_for_waiters(ch, 2);
        if (i < 2) send_int(ch, 7);
        else CHECK_INT(recv_int(ch) % 2, 0);
        int met = end_task(&t);
        CHECK(met >= 0);
        CHECK_INT(c[i % 2 + met].is_send, i >= 2);
        if (i < 2) CHECK_INT(netchan_as_int(&v, -1), 7);
    }
    netchan_free(ch);
    ch = make(1); /* through a buffer it does not meet itself either: it sends, and receives the next time */
    for (int i = 0; i < 20; i++) {
        c[0] = netchan_case_recv(ch, &v);
        c[1] = netchan_case_send(ch, netchan_int(i));
        CHECK_INT(netchan_select(c, 2, NETCHAN_NOWAIT), i % 2 == 0);
        if (i % 2) CHECK_INT(netchan_as_int(&v, -1), i - 1);
    }
    netchan_free(ch);
    check_nothing_left();
}

/* --- selects that meet selects --- */

enum { MEETINGS = 3000 };

typedef struct mate {
    netchan *out, *in;
    int64_t sent, received, sum_sent, sum_received;
    int rounds, timeout_ms; /* rounds: how many times something has to happen */
    uint64_t seed;
} mate;

static void *meet(void *arg) {
    mate *m = (mate *)arg;
    for (int i = 0; i < m->rounds;) {
        netchan_value v;
        netchan_case c[2];
        int64_t n = (int64_t)(test_random(&m->seed) % 1000);
        bool swap = test_random(&m->seed) % 2;
        c[swap] = netchan_case_send(m->out, netchan_int(n));
        c[!swap] = netchan_case_recv(m->in, &v);
        int result = netchan_select(c, 2, m->timeout_ms);
        if (result == NETCHAN_ETIMEDOUT && m->timeout_ms < LONG) continue;
        CHECK(result == 0 || result == 1);
        if (c[result].result == NETCHAN_ECLOSED) return NULL;
        CHECK_INT(c[result].result, NETCHAN_OK);
        CHECK_INT(c[!result].result, NETCHAN_ETIMEDOUT);
        if (c[result].is_send) m->sent++, m->sum_sent += n;
        else m->received++, m->sum_received += netchan_as_int(&v, -100000);
        i++;
    }
    return NULL;
}

static mate make_mate(netchan *out, netchan *in, int timeout_ms, uint64_t seed) {
    mate m;
    memset(&m, 0, sizeof m);
    m.out = out;
    m.in = in;
    m.rounds = MEETINGS;
    m.timeout_ms = timeout_ms;
    m.seed = seed;
    return m;
}

/* Two threads, each ready to send and to receive on one channel: in each round one sends and the other receives. */
static void test_two_selects_meet(void) {
    netchan *a = make(0), *b = make(0);
    for (int two = 0; two < 2; two++) { /* on one channel, or on two with the directions crossed */
        mate m[2];
        m[0] = make_mate(a, two ? b : a, LONG, 1);
        m[1] = make_mate(two ? b : a, a, LONG, 2);
        pthread_t threads[2];
        for (int i = 0; i < 2; i++) threads[i] = test_start(meet, &m[i]);
        for (int i = 0; i < 2; i++) test_join(threads[i]);
        CHECK_INT(m[0].sent, m[1].received);
        CHECK_INT(m[1].sent, m[0].received);
        CHECK_INT(m[0].sum_sent, m[1].sum_received);
        CHECK_INT(m[1].sum_sent, m[0].sum_received);
        CHECK(m[0].sent > 0 && m[1].sent > 0);
    }
    netchan_free(a);
    netchan_free(b);
    check_nothing_left();
}

/* A ring of selects, each of which can commit with either neighbour, until one has had enough and closes. */
static void ring_of_selects(size_t cap, int timeout_ms, int other_timeout_ms) {
    enum { COUNT = 5 };
    netchan *ch[COUNT];
    mate m[COUNT];
    pthread_t threads[COUNT];
    int64_t sent = 0, received = 0, sum_sent = 0, sum_received = 0;
    for (int i = 0; i < COUNT; i++) ch[i] = make(cap);
    for (int i = 0; i < COUNT; i++) {
        m[i] = make_mate(ch[i], ch[(i + 1) % COUNT], i % 2 ? other_timeout_ms : timeout_ms, (uint64_t)i + 1);
        if (i) m[i].rounds = INT32_MAX;
        threads[i] = test_start(meet, &m[i]);
    }
    test_join(threads[0]);
    for (int i = 0; i < COUNT; i++) CHECK_INT(netchan_close(ch[i]), NETCHAN_OK);
    for (int i = 0; i < COUNT; i++) {
        if (i) test_join(threads[i]);
        sent += m[i].sent;
        received += m[i].received;
        sum_sent += m[i].sum_sent;
        sum_received += m[i].sum_received;
    }
    for (int i = 0; i < COUNT; i++) {
        for (; netchan_len(ch[i]); received++) sum_received += recv_int(ch[i]);
        netchan_free(ch[i]);
    }
    CHECK_INT(sent, received);
    CHECK_INT(sum_sent, sum_received);
    check_nothing_left();
}

static void test_ring_of_selects(void) {
    ring_of_selects(0, LONG, LONG);
    ring_of_selects(1, LONG, LONG);
}

static void test_ring_of_selects_with_timeouts(void) {
    ring_of_selects(0, LONG, NETCHAN_NOWAIT); /* with NOWAIT on both sides nobody would ever meet */
    ring_of_selects(0, 1, 1);
    ring_of_selects(2, 1, NETCHAN_NOWAIT);
}

/* One value is offered on four channels at once and must arrive on one of them, as in Go's doubleselect.go. */
typedef struct offer {
    netchan *ch[4];
    uint8_t *seen;
} offer;

static void *offer_everywhere(void *arg) {
    offer *o = (offer *)arg;
    for (int n = 0; n < 4000; n++) {
        netchan_case c[4];
        for (int i = 0; i < 4; i++) c[i] = netchan_case_send(o->ch[i], netchan_int(n));
        CHECK(netchan_select(c, 4, LONG) >= 0);
    }
    for (int i = 0; i < 4; i++) netchan_close(o->ch[i]);
    return NULL;
}

typedef struct taker {
    netchan *ch;
    uint8_t *seen;
} taker;

static void *take_until_closed(void *arg) {
    taker *t = (taker *)arg;
    netchan_value v;
    int64_t last = -1;
    int result;
    while ((result = netchan_recv(t->ch, &v, LONG)) == NETCHAN_OK) {
        int64_t n = netchan_as_int(&v, -1);
        CHECK(n > last);
        CHECK_INT(__atomic_add_fetch(&t->seen[n], 1, __ATOMIC_SEQ_CST), 1);
        last = n;
    }
    CHECK_INT(result, NETCHAN_ECLOSED);
    return NULL;
}

static void test_exactly_one_case_happens(void) {
    static uint8_t seen[4000];
    for (size_t cap = 0; cap < 2; cap++) {
        offer o = {{make(cap), make(cap), make(cap), make(cap)}, seen};
        taker takers[4];
        pthread_t threads[5];
        memset(seen, 0, sizeof seen);
        for (int i = 0; i < 4; i++) {
            takers[i].ch = o.ch[i];
            takers[i].seen = seen;
            threads[i] = test_start(take_until_closed, &takers[i]);
        }
        threads[4] = test_start(offer_everywhere, &o);
        for (int i = 0; i < 5; i++) test_join(threads[i]);
        for (int n = 0; n < 4000; n++) CHECK_INT(seen[n], 1);
        for (int i = 0; i < 4; i++) netchan_free(o.ch[i]);
    }
    check_nothing_left();
}

/* --- fairness --- */

static void test_ready_cases_are_chosen_fairly(void) {
    enum { CASES = 5, ROUNDS = 10000 };
    netchan *ch[CASES];
    int chosen[CASES] = {0};
    for (int i = 0; i < CASES; i++) {
        ch[i] = make(2);
        send_int(ch[i], i);
    }
    for (int round = 0; round < ROUNDS; round++) {
        netchan_case c[CASES];
        for (int i = 0; i < CASES; i++)
            c[i] = i % 2 ? netchan_case_send(ch[i], netchan_int(i)) : netchan_case_recv(ch[i], NULL);
        int i = netchan_select(c, CASES, NETCHAN_NOWAIT);
        CHECK(i >= 0);
        chosen[i]++;
        if (i % 2) recv_int(ch[i]);
        else send_int(ch[i], i);
    }
    for (int i = 0; i < CASES; i++) {
        CHECK(chosen[i] > ROUNDS / CASES / 2); /* twenty standard deviations away */
        netchan_free(ch[i]);
    }
}

/* Also the first case after some that are never ready must not get their share. */
static void test_idle_cases_do_not_favour_a_neighbour(void) {
    enum { CASES = 8, ROUNDS = 8000 };
    netchan *ready[2] = {make(1), make(1)}, *idle = make(0);
    int chosen[2] = {0, 0};
    send_int(ready[0], 0);
    send_int(ready[1], 0);
    for (int round = 0; round < ROUNDS; round++) {
        netchan_case c[CASES];
        for (int i = 0; i < CASES; i++) c[i] = netchan_case_recv(i == 6 ? ready[0] : i == 7 ? ready[1] : idle, NULL);
        int i = netchan_select(c, CASES, NETCHAN_NOWAIT);
        CHECK(i >= 6);
        chosen[i - 6]++;
        send_int(ready[i - 6], 0);
    }
    CHECK(chosen[0] > ROUNDS / 4 && chosen[1] > ROUNDS / 4);
    netchan_free(ready[0]);
    netchan_free(ready[1]);
    netchan_free(idle);
}

/* Several cases on one channel are cases as all others. */
static void test_cases_of_one_channel_are_chosen_fairly(void) {
    enum { ROUNDS = 4000 };
    netchan *ch = make(2);
    int chosen[4] = {0};
    send_int(ch, 0);
    for (int round = 0; round < ROUNDS; round++) {
        netchan_case c[4]; /* the channel is half full: all can happen */
        for (int i = 0; i < 4; i++) c[i] = i % 2 ? netchan_case_send(ch, netchan_int(0)) : netchan_case_recv(ch, NULL);
        int i = netchan_select(c, 4, NETCHAN_NOWAIT);
        CHECK(i >= 0);
        chosen[i]++;
        if (i % 2) recv_int(ch);
        else send_int(ch, 0);
    }
    for (int i = 0; i < 4; i++) CHECK(chosen[i] > ROUNDS / 4 / 2);
    netchan_free(ch);
}

static void *send_until_closed(void *arg) {
    netchan *ch = (netchan *)arg;
    while (netchan_send(ch, netchan_int(1), LONG) == NETCHAN_OK) {}
    return NULL;
}

/* A receiver of three channels with busy senders hears all of them. */
static void test_busy_senders_are_all_heard(void) {
    netchan *ch[3];
    pthread_t threads[3];
    int heard[3] = {0, 0, 0};
    for (int i = 0; i < 3; i++) {
        ch[i] = make((size_t)i);
        threads[i] = test_start(send_until_closed, ch[i]);
    }
    for (long long start = test_ms(); heard[0] < 50 || heard[1] < 50 || heard[2] < 50;) {
        netchan_case c[3];
        for (int i = 0; i < 3; i++) c[i] = netchan_case_recv(ch[i], NULL);
        int i = netchan_select(c, 3, LONG);
        CHECK(i >= 0);
        heard[i]++;
        CHECK(test_ms() - start < LONG);
    }
    for (int i = 0; i < 3; i++) netchan_close(ch[i]);
    for (int i = 0; i < 3; i++) {
        test_join(threads[i]);
        netchan_free(ch[i]);
    }
    check_nothing_left();
}

/* --- traffic: whatever was sent with OK is received once, in its sender's order; nothing else is received --- */

enum { PRODUCERS = 4, CONSUMERS = 4, ROADS = 3, MOST = 6000 };

typedef struct traffic {
    netchan *road[ROADS];
    netchan *nobody_sends, *nobody_receives;
    int each;      /* values of one producer */
    bool patient;  /* producers stop only when all their values are sent; else at ECLOSED */
    uint8_t sent[PRODUCERS][MOST], received[PRODUCERS][MOST];
} traffic;

typedef struct driver {
    traffic *t;
    int number;
    uint64_t seed;
    int64_t count, sum;
    pthread_t thread;
} driver;

static int random_timeout(uint64_t *seed) {
    static const int timeouts[] = {NETCHAN_NOWAIT, 1, 2, NETCHAN_FOREVER};
    return timeouts[test_random(seed) % 4];
}

/* A third of the values own memory. */
static int64_t number_of(const netchan_value *v) {
    return v->type == NETCHAN_STR ? strtoll(netchan_as_str(v, ""), NULL, 10) : netchan_as_int(v, -1);
}

/* Tries once to send v somewhere. Returns the result. */
static int produce_one(driver *d, netchan_value v) {
    traffic *t = d->t;
    netchan_case c[ROADS + 2];
    size_t n = 0, how = test_random(&d->seed) % 3;
    size_t first = test_random(&d->seed) % ROADS;
    if (how == 0) return netchan_send(t->road[first], v, random_timeout(&d->seed));
    if (how == 2) c[n++] = netchan_case_recv(t->nobody_sends, NULL);
    for (size_t i = 0; i < ROADS; i++) c[n++] = netchan_case_send(t->road[(first + i) % ROADS], v);
    if (how == 2) c[n++] = netchan_case_send(t->nobody_receives, v);
    int i = netchan_select(c, how == 1 ? 1 + test_random(&d->seed) % n : n, random_timeout(&d->seed));
    return i < 0 ? i : c[i].result;
}

static void *produce(void *arg) {
    driver *d = (driver *)arg;
    for (int i = 0; i < d->t->each;) {
        char text[80];
        int64_t number = (int64_t)d->number * MOST + i;
        snprintf(text, sizeof text, "%lld and some more text, so that it has a block of its own", (long long)number);
        int result = produce_one(d, number % 3 == 0 ? netchan_str(text) : netchan_int(number));
        if (result == NETCHAN_ETIMEDOUT) continue;
        if (result == NETCHAN_ECLOSED && !d->t->patient) break;
        CHECK_INT(result, NETCHAN_OK);
        d->t->sent[d->number][i++] = 1;
        d->sum += number;
        d->count++;
    }
    return NULL;
}

/* Receives once. Returns the result, and on which road. */
static int consume_one(driver *d, netchan_value *v, const bool *closed, size_t *road) {
    netchan_case c[ROADS + 1];
    size_t roads[ROADS + 1], n = 0;
    for (size_t i = 0; i < ROADS; i++) {
        if (closed[i]) continue;
        roads[n] = i;
        c[n++] = netchan_case_recv(d->t->road[i], v);
    }
    if (test_random(&d->seed) % 2) { /* not for ever: all could wait on the road where no producer is */
        *road = roads[test_random(&d->seed) % n];
        return netchan_recv(d->t->road[*road], v, (int)(test_random(&d->seed) % 3));
    }
    if (test_random(&d->seed) % 2) c[n++] = netchan_case_send(d->t->nobody_receives, netchan_str("never"));
    int i = netchan_select(c, n, random_timeout(&d->seed));
    if (i < 0) return i;
    *road = roads[i];
    return c[i].result;
}

static void *consume(void *arg) {
    driver *d = (driver *)arg;
    bool closed[ROADS] = {false};
    int64_t last[PRODUCERS][ROADS];
    memset(last, -1, sizeof last);
    for (int open = ROADS; open > 0;) {
        netchan_value v;
        size_t road = 0;
        int result = consume_one(d, &v, closed, &road);
        if (result == NETCHAN_ETIMEDOUT) continue;
        if (result == NETCHAN_ECLOSED) {
            closed[road] = true;
            open--;
            continue;
        }
        CHECK_INT(result, NETCHAN_OK);
        int64_t number = number_of(&v);
        netchan_clear(&v);
        CHECK(number >= 0 && number < PRODUCERS * MOST);
        CHECK(number > last[number / MOST][road]);
        last[number / MOST][road] = number;
        CHECK_INT(__atomic_add_fetch(&d->t->received[number / MOST][number % MOST], 1, __ATOMIC_SEQ_CST), 1);
        d->sum += number;
        d->count++;
    }
    return NULL;
}

typedef struct watcher {
    traffic *t;
    size_t cap[ROADS];
    bool stop;
} watcher;

/* Capacity is exact at every moment. */
static void *watch(void *arg) {
    watcher *w = (watcher *)arg;
    while (!__atomic_load_n(&w->stop, __ATOMIC_ACQUIRE)) {
        for (int i = 0; i < ROADS; i++) {
            CHECK(netchan_len(w->t->road[i]) <= w->cap[i]);
            CHECK_INT(netchan_cap(w->t->road[i]), w->cap[i]);
        }
        sched_yield();
    }
    return NULL;
}

/* close_after: somebody closes all roads in the middle, the later the greater this is; 0: when all is sent. */
static void drive(traffic *t, size_t cap, int each, int close_after, uint64_t seed) {
    driver d[PRODUCERS + CONSUMERS];
    watcher w = {t, {0}, false};
    int64_t counts[2] = {0, 0}, sums[2] = {0, 0};
    memset(t, 0, sizeof *t);
    memset(d, 0, sizeof d);
    for (size_t i = 0; i < ROADS; i++) t->road[i] = make(w.cap[i] = cap * i);
    t->nobody_sends = make(0);
    t->nobody_receives = make(0);
    t->each = each;
    t->patient = !close_after;
    for (int i = 0; i < PRODUCERS + CONSUMERS; i++) {
        d[i].t = t;
        d[i].number = i;
        d[i].seed = seed * 100 + (uint64_t)i + 1;
        d[i].thread = test_start(i < PRODUCERS ? produce : consume, &d[i]);
    }
    pthread_t watching = test_start(watch, &w);
    for (int i = 0; i < close_after; i++) sched_yield();
    for (int i = 0; i < PRODUCERS && t->patient; i++) test_join(d[i].thread);
    for (int i = 0; i < ROADS; i++) CHECK_INT(netchan_close(t->road[i]), NETCHAN_OK);
    for (int i = 0; i < PRODUCERS + CONSUMERS; i++) {
        if (i >= PRODUCERS || !t->patient) test_join(d[i].thread);
        counts[i >= PRODUCERS] += d[i].count;
        sums[i >= PRODUCERS] += d[i].sum;
    }
    __atomic_store_n(&w.stop, true, __ATOMIC_RELEASE);
    test_join(watching);
    CHECK_INT(counts[1], counts[0]);
    CHECK_INT(sums[1], sums[0]);
    CHECK(memcmp(t->sent, t->received, sizeof t->sent) == 0);
    for (int i = 0; i < ROADS; i++) {
        CHECK_INT(netchan_len(t->road[i]), 0);
        netchan_free(t->road[i]);
    }
    netchan_free(t->nobody_sends);
    netchan_free(t->nobody_receives);
    check_nothing_left();
}

static traffic the_traffic;

static void test_traffic_rendezvous(void) {
    drive(&the_traffic, 0, MOST, 0, 1);
}

static void test_traffic_buffered(void) {
    drive(&the_traffic, 1, MOST, 0, 2);
    drive(&the_traffic, 50, MOST, 0, 3);
}

static void test_close_in_the_middle_of_traffic(void) {
    for (int i = 0; i < CLOSES; i++)
        drive(&the_traffic, (size_t)i % 4, MOST, 1 + i * (450 / CLOSES), (uint64_t)i + 1);
}

/* --- values with memory --- */

static void test_values_are_copied_and_handed_over(void) {
    netchan *ch = make(2);
    netchan_value v;
    send_rich(ch, NETCHAN_NOWAIT, NETCHAN_OK);
    CHECK_INT(netchan_recv(ch, &v, NETCHAN_NOWAIT), NETCHAN_OK);
    netchan_free(ch);
    check_rich(&v); /* it belongs to the receiver now and outlives the channel */
    netchan_clear(&v);
    check_nothing_left();
}

static void *send_rich_thread(void *arg) {
    send_rich((netchan *)arg, LONG, NETCHAN_OK);
    return NULL;
}

static void test_values_through_a_rendezvous(void) {
    netchan *ch = make(0);
    for (int i = 0; i < 200; i++) {
        netchan_value v;
        pthread_t thread = test_start(send_rich_thread, ch);
        if (i % 2) wait_for_waiters(ch, 1);
        CHECK_INT(netchan_recv(ch, &v, LONG), NETCHAN_OK);
        test_join(thread);
        check_rich(&v);
        netchan_clear(&v);
    }
    netchan_free(ch);
    check_nothing_left();
}

static void test_values_that_nobody_takes_are_freed(void) {
    netchan *buffered = make(3), *none = make(0), *closed = make(1);
    send_rich(buffered, NETCHAN_NOWAIT, NETCHAN_OK);
    CHECK_INT(netchan_recv(buffered, NULL, NETCHAN_NOWAIT), NETCHAN_OK); /* dropped */
    for (int i = 0; i < 3; i++) send_rich(buffered, NETCHAN_NOWAIT, NETCHAN_OK); /* left in the channel */
    send_rich(buffered, NETCHAN_NOWAIT, NETCHAN_ETIMEDOUT);
    send_rich(buffered, 5, NETCHAN_ETIMEDOUT);
    send_rich(none, NETCHAN_NOWAIT, NETCHAN_ETIMEDOUT);
    send_rich(none, 5, NETCHAN_ETIMEDOUT);
    send_rich(NULL, 5, NETCHAN_ETIMEDOUT);
    send_rich(closed, NETCHAN_NOWAIT, NETCHAN_OK);
    netchan_close(closed);
    send_rich(closed, LONG, NETCHAN_ECLOSED);
    netchan_entry entries[2];
    netchan_value list[2], rich = rich_value(entries, list);
    netchan_case c[3];
    c[0] = netchan_case_send(none, rich);
    c[1] = netchan_case_send(buffered, rich);
    c[2] = netchan_case_send(NULL, rich);
    CHECK_INT(netchan_select(c, 3, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    CHECK_INT(netchan_select(c, 3, 5), NETCHAN_ETIMEDOUT);
    check_rich(&c[0].value); /* what a case borrows stays the caller's */
    CHECK_INT(netchan_recv(buffered, NULL, NETCHAN_NOWAIT), NETCHAN_OK);
    CHECK_INT(netchan_select(c, 3, 5), 1); /* one of three is sent, the others are nobody's */
    netchan_free(buffered);
    netchan_free(none);
    netchan_free(closed);
    check_nothing_left();
}

static void test_structs_go_through(void) {
    typedef struct {
        int64_t when;
        const char *note;
    } reading;
    static const netchan_field fields[] = {NETCHAN_FIELD(reading, when, I64), NETCHAN_FIELD(reading, note, STR),
                                           NETCHAN_FIELDS_END};
    netchan *ch = make(1);
    reading in = {7, "warm"}, out = {0, NULL};
    netchan_value v;
    CHECK_INT(netchan_send(ch, netchan_struct(fields, &in), LONG), NETCHAN_OK);
    CHECK_INT(netchan_recv(ch, &v, LONG), NETCHAN_OK);
    CHECK_INT(netchan_unpack(&v, fields, &out), NETCHAN_OK);
    CHECK_INT(out.when, 7);
    CHECK_STR(out.note, "warm");
    netchan_clear(&v);
    netchan_free(ch);
    check_nothing_left();
}

/* --- channels inside values --- */

static void *serve_requests(void *arg) {
    netchan *requests = (netchan *)arg;
    netchan_value v;
    while (netchan_recv(requests, &v, LONG) == NETCHAN_OK) {
        netchan *reply = netchan_as_chan(netchan_get(&v, "reply"));
        CHECK(reply != NULL);
        send_int(reply, netchan_as_int(netchan_get(&v, "n"), 0) * 2);
        netchan_clear(&v);
    }
    return NULL;
}

static void test_reply_channels(void) {
    for (size_t cap = 0; cap < 2; cap++) {
        netchan *requests = make(cap);
        pthread_t thread = test_start(serve_requests, requests);
        for (int i = 0; i < 100; i++) {
            netchan *reply = make((size_t)i % 2);
            netchan_entry e[2];
            e[0].key = "reply";
            e[0].value = netchan_sender(reply);
            e[1].key = "n";
            e[1].value = netchan_int(i);
            CHECK_INT(netchan_send(requests, netchan_map(e, 2), LONG), NETCHAN_OK);
            CHECK_INT(recv_int(reply), i * 2);
            netchan_free(reply);
        }
        netchan_close(requests);
        test_join(thread);
        netchan_free(requests);
        check_nothing_left();
    }
}

static void test_a_received_channel_is_counted(void) {
    netchan *outer = make(1), *inner = make(1);
    netchan_value v;
    send_int(inner, 42);
    CHECK_INT(netchan_send(outer, netchan_receiver(inner), LONG), NETCHAN_OK);
    netchan_free(inner); /* the value in the buffer holds it */
    CHECK_INT(netchan_recv(outer, &v, LONG), NETCHAN_OK);
    CHECK_INT(v.type, NETCHAN_RECEIVER);
    CHECK(netchan_as_chan(&v) == inner);
    netchan *kept = netchan_retain(netchan_as_chan(&v));
    CHECK(kept == inner);
    netchan_clear(&v);
    CHECK_INT(recv_int(kept), 42);
    netchan_free(kept);
    netchan_free(outer);
    check_nothing_left();
}

static void test_channels_in_values_that_nobody_takes(void) {
    netchan *outer = make(2), *none = make(0), *inner = make(0);
    netchan_value list[3], v;
    list[0] = netchan_sender(inner);
    list[1] = netchan_receiver(inner);
    list[2] = netchan_sender(none);
    v = netchan_array(list, 3);
    CHECK_INT(netchan_send(outer, v, LONG), NETCHAN_OK);
    CHECK_INT(netchan_recv(outer, NULL, LONG), NETCHAN_OK);
    CHECK_INT(netchan_send(outer, v, LONG), NETCHAN_OK);
    CHECK_INT(netchan_send(none, v, 2), NETCHAN_ETIMEDOUT);
    netchan_close(none);
    CHECK_INT(netchan_send(none, v, 2), NETCHAN_ECLOSED);
    netchan_free(inner);
    netchan_free(none);
    netchan_free(outer);
    check_nothing_left();
}

/* Freeing the first of many channels that lie in each other frees all: without a lock held, and without much stack. */
static void test_a_chain_of_channels_is_freed(void) {
    netchan *chain = make(1);
    for (int i = 0; i < 50000; i++) {
        netchan *next = make(1);
        CHECK_INT(netchan_send(next, netchan_receiver(chain), LONG), NETCHAN_OK);
        netchan_free(chain);
        chain = next;
    }
    netchan_free(chain);
    check_nothing_left();
}

static void test_a_channel_through_itself(void) {
    netchan *ch = make(1);
    netchan_value v;
    CHECK_INT(netchan_send(ch, netchan_receiver(ch), LONG), NETCHAN_OK);
    CHECK_INT(netchan_recv(ch, &v, LONG), NETCHAN_OK);
    netchan_free(ch);
    CHECK_INT(netchan_cap(netchan_as_chan(&v)), 1);
    netchan_clear(&v);
    check_nothing_left();
}

typedef struct holder {
    netchan *ch;
    int number;
} holder;

static void *send_and_let_go(void *arg) {
    holder *h = (holder *)arg;
    int result = netchan_send(h->ch, netchan_int(h->number), LONG);
    CHECK(result == NETCHAN_OK || result == NETCHAN_ECLOSED);
    netchan_free(h->ch);
    return NULL;
}

/* Each thread counts itself as a holder; whoever is last frees. The receiver lets go as soon as it has its values,
 * while the senders are still on their way out of the call. */
static void test_the_last_holder_frees(void) {
    for (int round = 0; round < 300; round++) {
        netchan *ch = make((size_t)round % 3);
        holder h[2];
        pthread_t threads[2];
        for (int i = 0; i < 2; i++) {
            h[i].ch = netchan_retain(ch);
            h[i].number = i;
            threads[i] = test_start(send_and_let_go, &h[i]);
        }
        CHECK_INT(recv_int(ch) + recv_int(ch), 1);
        if (round % 2) netchan_close(ch);
        netchan_free(ch);
        for (int i = 0; i < 2; i++) test_join(threads[i]);
    }
    check_nothing_left();
}

static void *say_done(void *arg) {
    send_int((netchan *)arg, 1);
    return NULL;
}

static void *hear_done(void *arg) {
    recv_int((netchan *)arg);
    return NULL;
}

/* Who has received a thread's last value, or has handed it its last, may free the channel, although that thread may not
 * have returned from its call yet. */
static void test_a_channel_is_freed_after_the_last_value(void) {
    for (int round = 0; round < 2000; round++) {
        bool sends = round % 2;
        netchan *ch = make(sends && round % 4 == 1 ? 1 : 0);
        pthread_t thread = test_start(sends ? say_done : hear_done, ch);
        if (round % 8 < 4) sched_yield();
        if (sends) recv_int(ch);
        else send_int(ch, 1);
        netchan_free(ch);
        test_join(thread);
    }
    check_nothing_left();
}

/* A thread that takes turns with another one: each has seen what the other did before. */
typedef struct turns {
    netchan *ch;
    int count, turn; /* atomic: turn */
    int64_t sum;
    pthread_t thread;
} turns;

/* Waits for turn n, without sleep; and so will the calls of this thread, for a moment. */
static void wait_for_turn(turns *t, int n) {
    while (__atomic_load_n(&t->turn, __ATOMIC_ACQUIRE) != n) sched_yield();
    netchan__spun_in_vain = 0;
}

static void *receive_in_turns(void *arg) {
    turns *t = (turns *)arg;
    for (int n = 1; n <= t->count; n++) {
        wait_for_turn(t, n);
        t->sum += recv_int(t->ch);
        __atomic_store_n(&t->turn, -n, __ATOMIC_RELEASE);
    }
    return NULL;
}

/* The receiver may be waiting, or on its way into the call, and is on its way out when the channel is freed. */
static void test_a_channel_is_freed_when_its_send_returns(void) {
    turns t = {NULL, 5000, 0, 0, 0};
    t.thread = test_start(receive_in_turns, &t);
    for (int n = 1; n <= t.count; n++) {
        t.ch = make(0);
        __atomic_store_n(&t.turn, n, __ATOMIC_RELEASE);
        for (int i = n % 64; i; i--) netchan__pause(1);
        send_int(t.ch, n);
        netchan_free(t.ch);
        wait_for_turn(&t, -n);
    }
    test_join(t.thread);
    CHECK_INT(t.sum, (int64_t)t.count * (t.count + 1) / 2);
    check_nothing_left();
}

static void *send_in_turns(void *arg) {
    turns *t = (turns *)arg;
    for (int n = 1; n <= t->count; n++) {
        wait_for_turn(t, n);
        send_int(t->ch, 2);
        __atomic_store_n(&t->turn, -n, __ATOMIC_RELEASE);
    }
    return NULL;
}

/* Waits until the first sender in the queue sleeps: it needs no core any more. */
static void wait_for_a_sleeper(netchan *ch) {
    for (bool sleeps = false; !sleeps; sched_yield()) {
        pthread_mutex_lock(&ch->own.receiving);
        sleeps = __atomic_load_n(&ch->lane.senders.head->op->wake, __ATOMIC_ACQUIRE) == NETCHAN__ASLEEP;
        pthread_mutex_unlock(&ch->own.receiving);
    }
}

/* Who waits in the queue was there before who has just come, also when a receive comes at the same moment. */
static void test_nobody_overtakes_who_waits(void) {
    turns t = {make(0), 500, 0, 0, 0};
    t.thread = test_start(send_in_turns, &t);
    for (int n = 1; n <= t.count; n++) {
        task first;
        start_send(&first, t.ch, netchan_int(1), LONG);
        wait_for_waiters(t.ch, 1);
        wait_for_a_sleeper(t.ch);
        __atomic_store_n(&t.turn, n, __ATOMIC_RELEASE);
        for (int i = n % 64; i; i--) netchan__pause(4);
        CHECK_INT(recv_int(t.ch), 1);
        CHECK_INT(recv_int(t.ch), 2);
        CHECK_INT(end_task(&first), NETCHAN_OK);
        wait_for_turn(&t, -n);
    }
    test_join(t.thread);
    netchan_free(t.ch);
    check_nothing_left();
}

enum { BURDEN = 50 }; /* channels in a value, so that it takes a moment to drop it */

static void *send_the_channel_itself(void *arg) {
    turns *t = (turns *)arg;
    for (int n = 1; n <= t->count; n++) {
        netchan_value items[BURDEN + 1];
        wait_for_turn(t, n);
        netchan *ch = t->ch;
        for (int i = 0; i < BURDEN; i++) items[i] = netchan_sender(make(0));
        items[BURDEN] = netchan_sender(ch);
        __atomic_store_n(&t->turn, -n, __ATOMIC_RELEASE);
        for (int i = n % 64; i; i--) netchan__pause(4);
        CHECK_INT(netchan_send(ch, netchan_array(items, BURDEN + 1), LONG), NETCHAN_OK);
        netchan_free(ch);
        for (int i = 0; i < BURDEN; i++) netchan_free(netchan_as_chan(&items[i]));
        __atomic_store_n(&t->turn, 0, __ATOMIC_RELEASE);
    }
    return NULL;
}

/* What a select drops may hold the last end of the channel that it came from. */
static void test_a_select_frees_its_own_channel(void) {
    turns t = {NULL, 2000, 0, 0, 0};
    netchan *other = make(0);
    t.thread = test_start(send_the_channel_itself, &t);
    for (int n = 1; n <= t.count; n++) {
        t.ch = make(0);
        __atomic_store_n(&t.turn, n, __ATOMIC_RELEASE);
        wait_for_turn(&t, -n);
        netchan_case c[2] = {netchan_case_recv(t.ch, NULL), netchan_case_recv(other, NULL)};
        CHECK_INT(netchan_select(c, 2, LONG), 0);
        CHECK_INT(c[0].result, NETCHAN_OK);
        wait_for_turn(&t, 0);
    }
    test_join(t.thread);
    netchan_free(other);
    check_nothing_left();
}

static void *receive_until_closed(void *arg) {
    netchan_value v;
    int64_t next = 0;
    for (int result; (result = netchan_recv((netchan *)arg, &v, NETCHAN_FOREVER)) != NETCHAN_ECLOSED;) {
        CHECK_INT(result, NETCHAN_OK);
        CHECK_INT(netchan_as_int(&v, -1), next++);
    }
    return (void *)(intptr_t)next;
}

/* What a send gave with OK is received, however soon the channel is closed, by whoever it is. */
static void test_close_right_after_a_rendezvous(void) {
    for (int round = 0; round < 500; round++) {
        netchan *ch = make(0);
        void *count;
        pthread_t thread = test_start(receive_until_closed, ch);
        for (int i = 0; i < round % 50; i++) send_int(ch, i);
        CHECK_INT(netchan_close(ch), NETCHAN_OK);
        CHECK_INT(netchan_send(ch, netchan_int(0), LONG), NETCHAN_ECLOSED);
        CHECK_INT(pthread_join(thread, &count), 0);
        CHECK_INT((intptr_t)count, round % 50);
        netchan_free(ch);
    }
    check_nothing_left();
}

/* --- failures --- */

static netchan_value value_of_no_type(void) {
    netchan_value v = netchan_nil();
    v.type = 99;
    return v;
}

static void test_invalid_values_are_refused(void) {
    netchan *ch = make(1), *full = make(0);
    netchan_entry no_key = {NULL, netchan_nil()};
    netchan_value bad[3], list[70];
    list[0] = netchan_int(1);
    for (int i = 1; i < 70; i++) list[i] = netchan_array(&list[i - 1], 1);
    bad[0] = value_of_no_type();
    bad[1] = netchan_map(&no_key, 1);
    bad[2] = list[69];
    for (int i = 0; i < 3; i++) {
        CHECK_INT(netchan_send(ch, bad[i], NETCHAN_FOREVER), NETCHAN_EINVAL);
        CHECK(strlen(netchan_errmsg()) > 10);
        CHECK_INT(netchan_send(full, bad[i], NETCHAN_NOWAIT), NETCHAN_EINVAL);
        netchan_case c[2];
        c[0] = netchan_case_send(full, netchan_int(1));
        c[1] = netchan_case_send(ch, bad[i]);
        CHECK_INT(netchan_select(c, 2, LONG), NETCHAN_EINVAL);
        CHECK_INT(netchan_len(ch), 0);
    }
    send_int(ch, 1); /* the channel is as it was */
    CHECK_INT(recv_int(ch), 1);
    netchan_free(ch);
    netchan_free(full);
    check_nothing_left();
}

static void test_misuse(void) {
    CHECK_INT(netchan_close(NULL), NETCHAN_EINVAL);
    CHECK(strlen(netchan_errmsg()) > 10);
    CHECK_INT(netchan_select(NULL, 1, NETCHAN_NOWAIT), NETCHAN_EINVAL);
    CHECK(strlen(netchan_errmsg()) > 10);
}

static void *expect_no_message(void *arg) {
    (void)arg;
    CHECK_STR(netchan_errmsg(), "");
    CHECK_INT(netchan_send(NULL, netchan_nil(), NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    CHECK(strlen(netchan_errmsg()) > 10);
    return NULL;
}

static void check_message(int result, int right, const char *word) {
    CHECK_INT(result, right);
    if (!strstr(netchan_errmsg(), word)) test_fail(__FILE__, __LINE__, "no \"%s\" in \"%s\"", word, netchan_errmsg());
    netchan_value v;
    CHECK_INT(netchan_decode(&v, "", 0, 0), NETCHAN_EPROTO); /* so that the next sentence is seen to be new */
}

static void test_errmsg_tells_why(void) {
    netchan *ch = make(0), *closed = make(0);
    netchan_case c = netchan_case_recv(ch, NULL);
    CHECK_STR(netchan_errmsg(), "");
    CHECK_INT(netchan_close(closed), NETCHAN_OK);
    CHECK_STR(netchan_errmsg(), "");
    check_message(netchan_send(ch, netchan_int(1), NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT, "");
    CHECK(strlen(netchan_errmsg()) > 10);
    check_message(netchan_send(closed, netchan_int(1), LONG), NETCHAN_ECLOSED, "closed");
    check_message(netchan_recv(closed, NULL, LONG), NETCHAN_ECLOSED, "closed");
    check_message(netchan_close(closed), NETCHAN_ECLOSED, "closed");
    netchan_recv(ch, NULL, NETCHAN_NOWAIT);
    CHECK(!strstr(netchan_errmsg(), "not one whole value"));
    check_message(netchan_send(closed, value_of_no_type(), LONG), NETCHAN_EINVAL, "99");
    netchan_select(&c, 1, 1);
    CHECK(!strstr(netchan_errmsg(), "not one whole value"));
    test_join(test_start(expect_no_message, NULL));
    netchan_free(ch);
    netchan_free(closed);
}

/* A little of everything, each step of which may run out of memory and is tried again then. */
static void scenario(void) {
    netchan *ch = NULL, *other = NULL, *fresh = NULL;
    netchan_entry entries[2];
    netchan_value list[2], v, rich = rich_value(entries, list);
    netchan_case c[10];
    int result, received = 0;
    while (!ch) ch = netchan_make(20);
    while (!other) other = netchan_make(0);
    while (!fresh) fresh = netchan_make(1);
    for (int i = 0; i < 12; i++) {
        while ((result = netchan_send(ch, rich, NETCHAN_NOWAIT)) == NETCHAN_ENOMEM)
            CHECK(strstr(netchan_errmsg(), "memory"));
        CHECK_INT(result, NETCHAN_OK);
    }
    for (int i = 0; i < 10; i++) c[i] = netchan_case_send(i % 2 ? ch : other, rich);
    while ((result = netchan_select(c, 10, NETCHAN_NOWAIT)) == NETCHAN_ENOMEM) {}
    CHECK(result % 2 == 1 && c[result].result == NETCHAN_OK);
    c[0] = netchan_case_send(fresh, rich);
    while ((result = netchan_select(c, 1, NETCHAN_NOWAIT)) == NETCHAN_ENOMEM) {}
    CHECK_INT(result, 0);
    CHECK_INT(c[0].result, NETCHAN_OK);
    for (int i = 0; i < 10; i++) c[i] = netchan_case_send(other, rich);
    while ((result = netchan_select(c, 10, 1)) == NETCHAN_ENOMEM) {}
    CHECK_INT(result, NETCHAN_ETIMEDOUT);
    while ((result = netchan_send(other, netchan_sender(ch), 1)) == NETCHAN_ENOMEM) {}
    CHECK_INT(result, NETCHAN_ETIMEDOUT);
    for (; received < 10; received++) {
        while ((result = netchan_recv(ch, &v, NETCHAN_NOWAIT)) == NETCHAN_ENOMEM) {}
        CHECK_INT(result, NETCHAN_OK);
        check_rich(&v);
        netchan_clear(&v);
    }
    CHECK_INT(netchan_len(ch), 3); /* nothing was sent twice or lost */
    CHECK_INT(netchan_close(ch), NETCHAN_OK);
    netchan_free(ch);
    netchan_free(other);
    netchan_free(fresh);
}

static void test_out_of_memory(void) {
    long n = 1;
    do {
        alloc_fail(n++);
        scenario();
        check_nothing_left();
    } while (alloc_failed());
    CHECK(n > 20);
}

static void *patient_sender(void *arg) {
    int result;
    for (int i = 0; i < 20; i++) {
        netchan_entry entries[2];
        netchan_value list[2], rich = rich_value(entries, list);
        while ((result = netchan_send((netchan *)arg, rich, LONG)) == NETCHAN_ENOMEM) {}
        CHECK_INT(result, NETCHAN_OK);
    }
    return NULL;
}

/* The same with a thread on the other side, so that calls also fail that wait or are matched. */
static void test_out_of_memory_while_waiting(void) {
    for (size_t cap = 0; cap < 2; cap++) {
        long n = 1;
        do {
            netchan *ch = make(cap);
            alloc_fail(n++);
            pthread_t thread = test_start(patient_sender, ch);
            for (int i = 0; i < 20;) {
                netchan_value v;
                int result = netchan_recv(ch, &v, LONG);
                if (result == NETCHAN_ENOMEM) continue;
                CHECK_INT(result, NETCHAN_OK);
                check_rich(&v);
                netchan_clear(&v);
                i++;
            }
            test_join(thread);
            bool failed = alloc_failed();
            alloc_fail(0);
            netchan_free(ch);
            check_nothing_left();
            if (!failed) break;
        } while (true);
        CHECK(n > 20);
    }
}

int main(int argc, char **argv) {
    static const test_entry tests[] = {
        TEST(len_and_cap),
        TEST(fifo_at_every_fill),
        TEST(huge_capacity),
        TEST(nobody_there),
        TEST(null_channels_wait),
        TEST(close_and_drain),
        TEST(closed_while_full),
        TEST(rendezvous_waits_for_the_receiver),
        TEST(receiver_waits_for_the_sender),
        TEST(full_channel_waits_for_room),
        TEST(nowait_meets_who_waits),
        TEST(waiting_senders_are_served_in_turn),
        TEST(waiting_receivers_are_served_in_turn),
        TEST(those_who_gave_up_are_out_of_the_queue),
        TEST(close_wakes_receivers),
        TEST(close_wakes_senders),
        TEST(each_waiting_receiver_gets_one),
        TEST(waiting_costs_no_time),
        TEST(a_send_happens_before_its_receive),
        TEST(a_receive_happens_before_its_send_returns),
        TEST(a_channel_is_a_mutex),
        TEST(a_close_happens_before_its_receive),
        TEST(select_takes_the_ready_case),
        TEST(select_times_out),
        TEST(select_of_nothing),
        TEST(select_on_closed_channels),
        TEST(select_drops_into_null),
        TEST(select_is_woken_by_each_case),
        TEST(select_of_many_cases),
        TEST(one_channel_in_several_cases),
        TEST(a_select_never_meets_itself),
        TEST(two_selects_meet),
        TEST(ring_of_selects),
        TEST(ring_of_selects_with_timeouts),
        TEST(exactly_one_case_happens),
        TEST(ready_cases_are_chosen_fairly),
        TEST(idle_cases_do_not_favour_a_neighbour),
        TEST(cases_of_one_channel_are_chosen_fairly),
        TEST(busy_senders_are_all_heard),
        TEST(traffic_rendezvous),
        TEST(traffic_buffered),
        TEST(close_in_the_middle_of_traffic),
        TEST(values_are_copied_and_handed_over),
        TEST(values_through_a_rendezvous),
        TEST(values_that_nobody_takes_are_freed),
        TEST(structs_go_through),
        TEST(reply_channels),
        TEST(a_received_channel_is_counted),
        TEST(channels_in_values_that_nobody_takes),
        TEST(a_chain_of_channels_is_freed),
        TEST(a_channel_through_itself),
        TEST(the_last_holder_frees),
        TEST(a_channel_is_freed_after_the_last_value),
        TEST(a_channel_is_freed_when_its_send_returns),
        TEST(nobody_overtakes_who_waits),
        TEST(a_select_frees_its_own_channel),
        TEST(close_right_after_a_rendezvous),
        TEST(invalid_values_are_refused),
        TEST(misuse),
        TEST(errmsg_tells_why),
        TEST(out_of_memory),
        TEST(out_of_memory_while_waiting),
        TEST_END,
    };
    return test_main(argc, argv, tests);
}
