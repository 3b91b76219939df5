/* The baseline of channels within a process: what one writes in C with a mutex and condition variables, and nothing
 * else. Numbers of 64 bits pass from thread to thread; nobody is signalled who does not wait. */
#include "bench.h"

#include <pthread.h>

enum { CAPACITY = 1024, RINGS = 2 };

static void start_thread(void *(*run)(void *), void *arg) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, run, arg)) bench_fail("cannot start a thread");
}

/* ---- A ring. Several may share one lock, and one receiver that takes from whichever has something. ---- */

typedef struct door {
    pthread_mutex_t lock;
    pthread_cond_t filled;
    size_t receivers; /* that wait */
} door;

typedef struct ring {
    door *door;
    pthread_cond_t emptied;
    size_t senders;      /* that wait */
    size_t first, count; /* of the items */
    int64_t items[CAPACITY];
} ring;

static door the_door = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, 0};
static ring rings[RINGS];

static void make_rings(void) {
    for (int i = 0; i < RINGS; i++) {
        rings[i].door = &the_door;
        pthread_cond_init(&rings[i].emptied, NULL);
    }
}

static void ring_send(ring *r, int64_t item) {
    door *d = r->door;
    pthread_mutex_lock(&d->lock);
    while (r->count == CAPACITY) {
        r->senders++;
        pthread_cond_wait(&r->emptied, &d->lock);
        r->senders--;
    }
    r->items[(r->first + r->count++) % CAPACITY] = item;
    bool awaited = d->receivers > 0;
    pthread_mutex_unlock(&d->lock);
    if (awaited) pthread_cond_signal(&d->filled);
}

/* Returns the first ring with items from `from` on, in a circle, or NULL. Caller holds the lock. */
static ring *ring_filled(size_t count, size_t from) {
    for (size_t i = 0; i < count; i++)
        if (rings[(from + i) % count].count) return &rings[(from + i) % count];
    return NULL;
}

/* Receives from one of the first count rings. */
static int64_t ring_recv(size_t count, size_t from) {
    door *d = &the_door;
    ring *r;
    pthread_mutex_lock(&d->lock);
    while (!(r = ring_filled(count, from))) {
        d->receivers++;
        pthread_cond_wait(&d->filled, &d->lock);
        d->receivers--;
    }
    int64_t item = r->items[r->first];
    r->first = (r->first + 1) % CAPACITY;
    r->count--;
    bool awaited = r->senders > 0;
    pthread_mutex_unlock(&d->lock);
    if (awaited) pthread_cond_signal(&r->emptied);
    return item;
}

static void *send_numbers(void *r) {
    for (int64_t n = 0;; n++) ring_send(r, n);
    return NULL;
}

/* Each ring has a thread that sends; this one receives, from each in its turn if there is something. */
static void measure_rings(size_t count) {
    make_rings();
    for (size_t i = 0; i < count; i++) start_thread(send_numbers, &rings[i]);
    bench_meter m = bench_meter_start(64);
    int64_t sum = 0;
    for (size_t turn = 0; bench_meter_add(&m, 1); turn++) sum += ring_recv(count, turn % count);
    if (sum < 0) bench_fail("other numbers have arrived");
    bench_finish(bench_meter_rate(&m));
}

static void local_buffered(void) { measure_rings(1); }
static void local_select(void) { measure_rings(RINGS); }

/* ---- A rendezvous: who comes second takes from, or gives to, who came first and waits. ---- */

typedef struct party {
    int64_t *item;
    bool done;
    pthread_cond_t met;
} party;

static struct {
    pthread_mutex_t lock;
    party *sender, *receiver; /* who waits; each on its own stack */
} meeting = {PTHREAD_MUTEX_INITIALIZER, NULL, NULL};

/* Waits in *place until the other one has come. Caller holds the lock. */
static void wait_at(party **place, int64_t *item) {
    party me = {item, false, PTHREAD_COND_INITIALIZER};
    *place = &me;
    while (!me.done) pthread_cond_wait(&me.met, &meeting.lock);
    pthread_cond_destroy(&me.met);
}

/* Lets who waits in *place go. Caller holds the lock, without which the other's stack might be gone. */
static void meet(party **place) {
    (*place)->done = true;
    pthread_cond_signal(&(*place)->met);
    *place = NULL;
}

static void meeting_send(int64_t item) {
    pthread_mutex_lock(&meeting.lock);
    if (meeting.receiver) {
        *meeting.receiver->item = item;
        meet(&meeting.receiver);
    } else wait_at(&meeting.sender, &item);
    pthread_mutex_unlock(&meeting.lock);
}

static int64_t meeting_recv(void) {
    int64_t item;
    pthread_mutex_lock(&meeting.lock);
    if (meeting.sender) {
        item = *meeting.sender->item;
        meet(&meeting.sender);
    } else wait_at(&meeting.receiver, &item);
    pthread_mutex_unlock(&meeting.lock);
    return item;
}

static void *meet_for_ever(void *arg) {
    for (int64_t n = 0;; n++) meeting_send(n);
    return arg;
}

static void local_rendezvous(void) {
    start_thread(meet_for_ever, NULL);
    bench_meter m = bench_meter_start(64);
    for (int64_t next = 0; bench_meter_add(&m, 1); next++)
        if (meeting_recv() != next) bench_fail("another number has arrived");
    bench_finish(bench_meter_rate(&m));
}

int main(int argc, char **argv) {
    static const bench_entry table[] = {{"local_buffered", local_buffered}, {"local_rendezvous", local_rendezvous},
                                        {"local_select", local_select}, {NULL, NULL}};
    return bench_main(argc, argv, table);
}
