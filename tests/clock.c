/* Clocks that jump. netchan.h is given a clock of ours: sections [12], [13], [14] and [17]. */
#include "alloc.h"

#include <pthread.h>
#include <stdint.h>
#include <sys/time.h>
#include <time.h>

static int64_t jumped; /* seconds that the monotonic clock is ahead; atomic */
static unsigned asked; /* atomic: how often a clock was read that people set */

static int clock_that_jumps(clockid_t id, struct timespec *t) {
    int result = clock_gettime(id, t);
    if (id == CLOCK_THREAD_CPUTIME_ID) return result; /* what a thread has used: nobody sets that */
    if (id != CLOCK_MONOTONIC) __atomic_add_fetch(&asked, 1u, __ATOMIC_RELAXED);
    t->tv_sec += (time_t)__atomic_load_n(&jumped, __ATOMIC_ACQUIRE);
    return result;
}

/* Who waits until a time of that clock waits on the system's. One who waits while it jumps is not woken by that. */
static inline int wait_by_it(pthread_cond_t *cond, pthread_mutex_t *mutex, const struct timespec *time) {
    struct timespec t = *time;
    t.tv_sec -= (time_t)__atomic_load_n(&jumped, __ATOMIC_ACQUIRE);
    return pthread_cond_timedwait(cond, mutex, &t);
}

static inline int time_of_day(void) {
    __atomic_add_fetch(&asked, 1u, __ATOMIC_RELAXED);
    return -1;
}

#define clock_gettime(id, t) clock_that_jumps(id, t)
#define pthread_cond_timedwait(cond, mutex, time) wait_by_it(cond, mutex, time)
#define gettimeofday(t, zone) time_of_day()
#define time(t) time_of_day()
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"
#undef clock_gettime
#undef pthread_cond_timedwait
#undef gettimeofday
#undef time
#include "test.h"
#include "task.h"
#include "net.h"

enum { HOUR = 3600, YEARS = 40 * 365 * 24 * HOUR };

/* The hearts of both links beat at the new time. */
static void jump(int64_t seconds) {
    __atomic_add_fetch(&jumped, seconds, __ATOMIC_RELEASE);
    pthread_mutex_lock(&netchan__net_lock);
    netchan__look();
    netchan__unlock_one(&netchan__net_lock);
}

static void check_one_session(const shaky *s) {
    for (int i = 0; i < 2; i++) {
        netchan_stats stats;
        CHECK_INT(netchan_get_stats(i ? s->l : s->d, &stats), NETCHAN_OK);
        CHECK_INT(stats.lost, 0);
        CHECK_INT(stats.peers, 1);
    }
}

/* Clocks that people and time servers set are never asked. */
static void test_only_the_monotonic_clock_is_read(void) {
    netchan_options o = options();
    shaky s;
    o.ping_ms = 20;
    o.buffer = 4;
    shaky_join(&s, &o, &o);
    check_works(s.l, s.d);
    CHECK_INT(netchan_recv(s.l->recv, NULL, SHORT), NETCHAN_ETIMEDOUT);
    proxy_cut(&s.p);
    wait_peer(s.d, "resumed");
    check_works(s.l, s.d);
    shaky_part(&s);
    CHECK_INT(__atomic_load_n(&asked, __ATOMIC_RELAXED), 0);
}

/* As after a machine was asleep: nothing was heard for an hour, and yet nobody is gone. */
static void test_an_idle_link_survives_a_jump(void) {
    netchan_options o = options();
    shaky s;
    o.ping_ms = 50;
    shaky_join(&s, &o, &o);
    for (int i = 0; i < 5; i++) {
        jump(i < 4 ? HOUR : YEARS);
        test_pause(20);
        check_works(s.l, s.d);
    }
    check_no_event(s.l, "down");
    check_no_event(s.d, "down");
    check_one_session(&s);
    shaky_part(&s);
}

static void *send_forever(void *arg) {
    stream *s = (stream *)arg;
    for (int i = 0; i < s->count; i++)
        CHECK_INT(netchan_send(s->ch, netchan_int(i), NETCHAN_FOREVER), NETCHAN_OK);
    return NULL;
}

static void test_a_busy_link_survives_jumps(void) {
    netchan_options o = options();
    shaky s;
    stream out[2];
    pthread_t threads[2];
    o.ping_ms = 100;
    o.buffer = 16;
    shaky_join(&s, &o, &o);
    pair q = {s.l, s.d};
    for (int i = 0; i < 2; i++) {
        out[i].ch = way_of(&q, i).send;
        out[i].count = 2000 / LESS;
        threads[i] = test_start(send_forever, &out[i]);
    }
    for (int n = 0; n < 2000 / LESS; n++) {
        if (n % 20 == 0) jump(HOUR);
        for (int i = 0; i < 2; i++) {
            netchan_value v;
            CHECK_INT(netchan_recv(way_of(&q, i).recv, &v, NETCHAN_FOREVER), NETCHAN_OK);
            CHECK_INT(netchan_as_int(&v, -1), n);
        }
    }
    for (int i = 0; i < 2; i++) test_join(threads[i]);
    check_no_event(s.l, "lost");
    check_one_session(&s);
    shaky_part(&s);
}

/* The time that a machine was asleep is not the time that a link did not come back. */
static void test_a_session_without_a_link_survives_a_jump(void) {
    netchan_options o = options();
    shaky s;
    task t;
    o.resume_ms = 10000;
    shaky_join(&s, &o, &o);
    start_send(&t, s.d->send, netchan_int(1), NETCHAN_FOREVER);
    wait_for_waiters(s.l->recv, 1);
    proxy_break(&s.p);
    wait_peer(s.l, "down");
    wait_peer(s.d, "down");
    jump(HOUR);
    test_pause(SHORT);
    check_one_session(&s);
    proxy_mend(&s.p);
    wait_peer(s.d, "resumed");
    CHECK_INT(recv_int(s.l->recv), 1);
    CHECK_INT(end_task(&t), NETCHAN_OK);
    check_one_session(&s);
    shaky_part(&s);
}

/* What is to end in time does, also after a jump. */
static void test_timeouts_end_after_a_jump(void) {
    netchan_options o = options();
    shaky s;
    shaky_join(&s, &o, &o);
    jump(HOUR);
    long long start = test_ms();
    CHECK_INT(netchan_recv(s.l->recv, NULL, SHORT), NETCHAN_ETIMEDOUT);
    CHECK_INT(netchan_send(s.d->send, netchan_int(1), SHORT), NETCHAN_ETIMEDOUT);
    CHECK(test_ms() - start >= 2 * SHORT - 2);
    check_works(s.l, s.d);
    shaky_part(&s);
}

int main(int argc, char **argv) {
    static const test_entry tests[] = {
        TEST(only_the_monotonic_clock_is_read),
        TEST(an_idle_link_survives_a_jump),
        TEST(a_busy_link_survives_jumps),
        TEST(a_session_without_a_link_survives_a_jump),
        TEST(timeouts_end_after_a_jump),
        TEST_END,
    };
    return test_main(argc, argv, tests);
}
