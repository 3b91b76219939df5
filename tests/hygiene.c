/* What a library owes to the process in which it lives: forks, signals, descriptors, threads, memory, and whatever else
 * the process has only one of. Looks at /proc, and leaves out what needs it where there is none. */
#include "alloc.h"

#include <fcntl.h>
#include <stdint.h>
#include <sys/socket.h>
#include <unistd.h>

/* What gives netchan.h a descriptor takes its time when it is told to, so that another thread may fork just then. */
static bool dawdles; /* atomic */

static int dawdle(int fd) {
    if (__atomic_load_n(&dawdles, __ATOMIC_RELAXED)) usleep(300);
    return fd;
}

#define accept(fd, a, size) dawdle(accept(fd, a, size))
#define accept4(fd, a, size, flags) dawdle(accept4(fd, a, size, flags))
#define socket(domain, type, protocol) dawdle(socket(domain, type, protocol))
#define pipe(fds) dawdle(pipe(fds))
#define pipe2(fds, flags) dawdle(pipe2(fds, flags))
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"
#undef accept
#undef accept4
#undef socket
#undef pipe
#undef pipe2
#include "test.h"
#include "task.h"
#include "net.h"

#include <dirent.h>
#include <locale.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

/* ThreadSanitizer has threads of its own, and its children cannot start any when their parent had several. */
#ifdef __SANITIZE_THREAD__
enum { NO_THREADS_IN_CHILDREN = 1 };
#else
enum { NO_THREADS_IN_CHILDREN = 0 };
#endif

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { SANITIZED = 1 };
#else
enum { SANITIZED = 0 };
#endif

enum {
    PROMPT = 5000,  /* ms: what does not wait is done by then, however busy the machine */
    FIRST_FD = 3,   /* what is below is not for sockets: programs write there without looking */
    FD_LIMIT = 4096 /* descriptors that are looked at */
};

static const char *program; /* this one */

/* --- what a process has ------------------------------------------------------------------------------------------- */

/* How many names there are in a directory of /proc; 0 where there is none. */
static int count_names(const char *path) {
    DIR *d = opendir(path);
    int count = 0;
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) count += e->d_name[0] != '.';
    if (d) closedir(d);
    return count;
}

static int threads_now(void) {
    return NO_THREADS_IN_CHILDREN ? 0 : count_names("/proc/self/task");
}

static bool is_open(int fd) {
    return fcntl(fd, F_GETFD) >= 0;
}

static int fds_now(void) {
    int count = 0;
    for (int fd = 0; fd < FD_LIMIT; fd++) count += is_open(fd);
    return count;
}

/* A thread that was joined is still listed for a moment. */
static void wait_for_threads(int count) {
    for (long long end = test_ms() + LONG; threads_now() != count; sched_yield()) CHECK(test_ms() < end);
}

static void wait_for_fds(int count) {
    for (long long end = test_ms() + LONG; fds_now() != count; sched_yield())
        if (test_ms() > end) test_fail(__FILE__, __LINE__, "%d descriptors are open, not %d", fds_now(), count);
}

/* Bytes of memory in use; 0 where that is not told, or where a sanitizer keeps what was freed. */
static long resident(void) {
    long pages = 0;
    FILE *f = SANITIZED ? NULL : fopen("/proc/self/statm", "r");
    if (f && fscanf(f, "%*d %ld", &pages) != 1) pages = 0;
    if (f) fclose(f);
    return pages * sysconf(_SC_PAGESIZE);
}

static netchan_link *listen_quietly(void) {
    netchan_options o = options();
    return netchan_listen("127.0.0.1:0", &o);
}

static netchan_link *dial_quietly(const char *address) {
    netchan_options o = options();
    return netchan_dial(address, &o);
}

/* --- children ----------------------------------------------------------------------------------------------------- */

/* Forks; the child does this, and must not need long. */
static pid_t start_fork(void (*run)(void *arg), void *arg) {
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid > 0) return pid;
    alarm(LONG / 1000 * (SANITIZED ? 3 : 1));
    run(arg);
    fflush(stdout);
    _exit(0);
}

static void end_fork(pid_t pid) {
    int status = -1;
    while (waitpid(pid, &status, 0) < 0) CHECK_INT(errno, EINTR);
    if (WIFSIGNALED(status)) test_fail(__FILE__, __LINE__, "the child: %s", strsignal(WTERMSIG(status)));
    CHECK_INT(WEXITSTATUS(status), 0);
}

static void in_child(void (*run)(void *arg), void *arg) {
    end_fork(start_fork(run, arg));
}

/* One of each object there is. */
typedef struct world {
    netchan *local[2];    /* a rendezvous, and one with a buffer, which holds a value */
    netchan_link *l, *d;  /* a listener, one of its peers, */
    netchan_link *other;  /* and one that was accepted */
    netchan *accepted[2]; /* to it, and from it */
    netchan *ends[2];     /* of channels of the other side: a sender of local[0], a receiver of local[1] */
    netchan *imported;    /* a sender of local[1] */
    netchan_value held;   /* has an end in it */
} world;

enum { CHANNELS = 12, LINKS = 3 };

static void list_channels(const world *w, netchan **list) {
    netchan *all[CHANNELS] = {w->local[0], w->local[1], w->l->send,     w->l->recv, w->l->events, w->l->accept,
                              w->d->send,  w->d->recv,  w->accepted[0], w->ends[0], w->ends[1],   w->imported};
    memcpy(list, all, sizeof all);
}

static void accept_other(world *w) {
    netchan_value v;
    netchan_options o = options();
    w->other = dial_with(w->l->address, &o);
    CHECK_INT(netchan_recv(w->l->accept, &v, LONG), NETCHAN_OK);
    w->accepted[0] = netchan_retain(netchan_as_chan(netchan_get(&v, "send")));
    w->accepted[1] = netchan_retain(netchan_as_chan(netchan_get(&v, "recv")));
    CHECK(w->accepted[0] && w->accepted[1]);
    netchan_clear(&v);
}

static void make_world(world *w) {
    netchan_options o = options();
    task t;
    memset(w, 0, sizeof *w);
    w->l = listen_with(&o);
    accept_other(w);
    w->d = dial_with(w->l->address, &o);
    CHECK((w->local[0] = netchan_make(0)) && (w->local[1] = netchan_make(4)));
    send_int(w->local[1], 7);
    pair p = {w->l, w->d};
    w->ends[0] = pass_end(way_of(&p, 0), netchan_sender(w->local[0]));
    w->ends[1] = pass_end(way_of(&p, 0), netchan_receiver(w->local[1]));
    CHECK_INT(netchan_export(w->l, "name", w->local[1], NETCHAN_SENDER), NETCHAN_OK);
    CHECK_INT(netchan_import(w->d, "name", NETCHAN_SENDER, &w->imported, LONG), NETCHAN_OK);
    start_send(&t, w->d->send, netchan_sender(w->local[1]), LONG);
    CHECK_INT(netchan_recv(w->l->recv, &w->held, LONG), NETCHAN_OK);
    CHECK_INT(end_task(&t), NETCHAN_OK);
}

/* All of it works. */
static void check_world(const world *w) {
    exchange(w->local[0], w->local[0], 1);
    exchange(w->d->send, w->l->recv, 2);
    exchange(w->l->send, w->d->recv, 3);
    exchange(w->accepted[0], w->other->recv, 4);
    exchange(w->other->send, w->accepted[1], 5);
    exchange(w->ends[0], w->local[0], 6);
    CHECK_INT(recv_int(w->ends[1]), 7);
    send_int(w->imported, 7);
    CHECK_INT(netchan_len(w->local[1]), 1);
}

static void drop_world(world *w) {
    check_world(w);
    netchan_clear(&w->held);
    netchan_free(w->imported);
    for (int i = 0; i < 2; i++) {
        netchan_free(w->ends[i]);
        netchan_free(w->accepted[i]);
    }
    hang_up(w->other);
    hang_up(w->d);
    hang_up(w->l);
    for (int i = 0; i < 2; i++) netchan_free(w->local[i]);
    CHECK_INT(alloc_blocks(), 0);
}

/* --- forks -------------------------------------------------------------------------------------------------------- */

/* What a select of this one case ends with. */
static int select_one(netchan_case c) {
    int i = netchan_select(&c, 1, NETCHAN_FOREVER);
    return i < 0 ? i : c.result;
}

/* A channel that the parent made: each call fails at once, and says why. */
static void check_foreign_channel(netchan *ch) {
    netchan_value v = netchan_int(1);
    netchan_peer from = {9};
    long long start = test_ms();
    CHECK_INT(netchan_send(ch, netchan_int(1), NETCHAN_FOREVER), NETCHAN_EFORK);
    check_says(netchan_errmsg(), "fork");
    CHECK_INT(netchan_send(ch, netchan_int(1), NETCHAN_NOWAIT), NETCHAN_EFORK);
    CHECK_INT(netchan_recv(ch, &v, NETCHAN_FOREVER), NETCHAN_EFORK);
    CHECK(netchan_is_nil(&v));
    CHECK_INT(netchan_recv(ch, NULL, LONG), NETCHAN_EFORK);
    CHECK_INT(netchan_recvfrom(ch, &v, &from, NETCHAN_FOREVER), NETCHAN_EFORK);
    CHECK_INT(netchan_close(ch), NETCHAN_EFORK);
    CHECK_INT(netchan_len(ch), 0);
    CHECK_INT(netchan_cap(ch), 0);
    CHECK_INT(select_one(netchan_case_send(ch, netchan_int(1))), NETCHAN_EFORK);
    CHECK_INT(select_one(netchan_case_recv(ch, &v)), NETCHAN_EFORK);
    CHECK(netchan_retain(ch) == ch);
    for (int i = 0; i < 3; i++) netchan_free(ch);
    CHECK_INT(netchan_recv(ch, NULL, NETCHAN_NOWAIT), NETCHAN_EFORK); /* it is there still */
    CHECK(test_ms() - start < PROMPT);
}

/* Among channels of its own, in a case or in a value, the parent's are refused as well. */
static void check_mixed(netchan *foreign) {
    netchan *own = netchan_make(1);
    netchan_value v, item = netchan_sender(foreign);
    netchan_case c[2];
    CHECK(own);
    c[0] = netchan_case_send(own, netchan_int(1));
    c[1] = netchan_case_recv(foreign, &v);
    int i = netchan_select(c, 2, NETCHAN_FOREVER);
    CHECK(i == NETCHAN_EFORK || i == 0 || (i == 1 && c[1].result == NETCHAN_EFORK));
    if (i == 0) CHECK_INT(netchan_recv(own, NULL, NETCHAN_NOWAIT), NETCHAN_OK);
    CHECK_INT(netchan_len(own), 0);
    CHECK_INT(netchan_send(own, netchan_sender(foreign), NETCHAN_NOWAIT), NETCHAN_EFORK);
    CHECK_INT(netchan_send(own, netchan_array(&item, 1), NETCHAN_NOWAIT), NETCHAN_EFORK);
    CHECK_INT(netchan_len(own), 0);
    netchan_free(own);
}

static void check_foreign_link(netchan_link *l) {
    netchan_peer peer = {1};
    netchan_stats stats;
    size_t reached = 9;
    netchan *own = netchan_make(0), *got = own;
    long long start = test_ms();
    CHECK_INT(netchan_sendto(l, peer, netchan_int(1), NETCHAN_FOREVER), NETCHAN_EFORK);
    check_says(netchan_errmsg(), "fork");
    CHECK_INT(netchan_broadcast(l, netchan_int(1), &reached, NETCHAN_FOREVER), NETCHAN_EFORK);
    CHECK_INT(reached, 0);
    CHECK_INT(netchan_export(l, "other name", own, NETCHAN_SENDER), NETCHAN_EFORK);
    CHECK_INT(netchan_unexport(l, "name"), NETCHAN_EFORK);
    CHECK_INT(netchan_import(l, "name", NETCHAN_SENDER, &got, NETCHAN_FOREVER), NETCHAN_EFORK);
    CHECK(!got);
    CHECK_INT(netchan_get_stats(l, &stats), NETCHAN_EFORK);
    CHECK(strchr(l->address, ':'));
    netchan_free(own);
    CHECK(test_ms() - start < PROMPT);
}

/* The child lets go of its copy of a listening socket, once; whoever gets the number then keeps it. */
static void check_foreign_hangup(netchan_link *l) {
    netchan_report report;
    int fd = l->listen_fd;
    CHECK_INT(netchan_hangup(l, &report), NETCHAN_EFORK);
    check_says(netchan_errmsg(), "fork");
    if (fd < 0) return;
    CHECK(!is_open(fd));
    int null = open("/dev/null", O_RDONLY);
    CHECK(null >= 0 && dup2(null, fd) == fd);
    CHECK_INT(netchan_hangup(l, NULL), NETCHAN_EFORK);
    CHECK(is_open(fd));
    close(fd);
    if (null != fd) close(null);
}

static void check_foreign(const world *w) {
    netchan *channels[CHANNELS];
    netchan_link *links[LINKS] = {w->l, w->d, w->other};
    netchan_value v = w->held;
    list_channels(w, channels);
    for (int i = 0; i < CHANNELS; i++) {
        check_foreign_channel(channels[i]);
        check_mixed(channels[i]);
    }
    check_foreign_channel(netchan_as_chan(&v));
    netchan_clear(&v);
    for (int i = 0; i < LINKS; i++) check_foreign_link(links[i]);
    for (int i = 0; i < LINKS; i++) check_foreign_hangup(links[i]);
    for (int i = 0; i < CHANNELS; i++) check_foreign_channel(channels[i]);
}

/* Channels and links of this process work, also between threads. */
static void check_own(void) {
    netchan *ch = netchan_make(1);
    CHECK(ch);
    send_int(ch, 0);
    CHECK_INT(recv_int(ch), 0);
    netchan_free(ch);
    if (NO_THREADS_IN_CHILDREN) return;
    CHECK((ch = netchan_make(0)) != NULL);
    exchange(ch, ch, 1);
    netchan_options o = options();
    pair p;
    p.l = listen_with(&o);
    p.d = dial_with(p.l->address, &o);
    check_works(p.l, p.d);
    netchan *end = pass_end(way_of(&p, 0), netchan_sender(ch));
    exchange(end, ch, 2);
    netchan_free(end);
    hang_up(p.d);
    hang_up(p.l);
    netchan_free(ch);
}

/* The other side of a link to the parent: it gets a value and gives one. */
static void greet(const char *address) {
    netchan_options o = options();
    netchan_link *d = dial_with(address, &o);
    CHECK_INT(netchan_send(d->send, netchan_int((int)getpid()), LONG), NETCHAN_OK);
    CHECK_INT(recv_int(d->recv), (int)getpid());
    hang_up(d);
}

/* Answers each who greets with what it said, until somebody says 0. */
static void *answer(void *arg) {
    netchan_link *l = (netchan_link *)arg;
    for (int64_t n = 1; n;) {
        netchan_value v;
        netchan_peer from;
        CHECK_INT(netchan_recvfrom(l->recv, &v, &from, NETCHAN_FOREVER), NETCHAN_OK);
        n = netchan_as_int(&v, 0);
        if (n) CHECK_INT(netchan_sendto(l, from, v, LONG), NETCHAN_OK);
        netchan_clear(&v);
    }
    return NULL;
}

/* A link at which somebody answers. */
typedef struct desk {
    netchan_link *l;
    pthread_t thread;
} desk;

static void open_desk(desk *k) {
    netchan_options o = options();
    k->l = listen_with(&o);
    k->thread = test_start(answer, k->l);
}

static void close_desk(desk *k) {
    netchan_options o = options();
    netchan_link *d = dial_with(k->l->address, &o);
    send_int(d->send, 0);
    test_join(k->thread);
    hang_up(d);
    hang_up(k->l);
}

static void only_foreign(void *arg) {
    check_foreign((const world *)arg);
}

static void test_a_child_has_nothing_of_the_parent(void) {
    world w;
    make_world(&w);
    for (int i = 0; i < 3; i++) in_child(only_foreign, &w);
    drop_world(&w);
}

static void foreign_and_own(void *arg) {
    check_own();
    check_foreign((const world *)arg);
    check_own();
    check_foreign_channel(((const world *)arg)->local[0]);
}

static void test_a_child_has_its_own(void) {
    world w;
    make_world(&w);
    for (int i = 0; i < 3; i++) in_child(foreign_and_own, &w);
    drop_world(&w);
}

static void greet_parent(const desk *k) {
    if (!NO_THREADS_IN_CHILDREN) greet(k->l->address);
}

static void dial_parent(void *arg) {
    greet_parent((const desk *)arg);
    check_own();
    greet_parent((const desk *)arg);
}

static void test_a_child_dials_its_parent(void) {
    desk k;
    open_desk(&k);
    pid_t pids[4];
    in_child(dial_parent, &k);
    for (int i = 0; i < 4 && !SANITIZED; i++) pids[i] = start_fork(dial_parent, &k);
    for (int i = 0; i < 4 && !SANITIZED; i++) end_fork(pids[i]);
    close_desk(&k);
    CHECK_INT(alloc_blocks(), 0);
}

/* Which objects a process finds: its parent's, and those of the parent's parent. */
typedef struct family {
    const world *worlds[3];
    const desk *k;
    int generations;
} family;

static void descend(void *arg) {
    family f = *(const family *)arg;
    world w;
    for (int i = 0; i < f.generations; i++) {
        check_foreign_channel(f.worlds[i]->local[0]);
        check_foreign_link(f.worlds[i]->d);
    }
    greet_parent(f.k);
    if (f.generations == 3 || NO_THREADS_IN_CHILDREN) return;
    make_world(&w);
    f.worlds[f.generations++] = &w;
    in_child(descend, &f);
    check_world(&w);
    f.generations--;
    for (int i = 0; i < f.generations; i++) check_foreign(f.worlds[i]);
    check_world(&w);
}

static void test_children_of_children(void) {
    world w;
    desk k;
    family f;
    memset(&f, 0, sizeof f);
    make_world(&w);
    open_desk(&k);
    f.worlds[f.generations++] = &w;
    f.k = &k;
    in_child(descend, &f);
    close_desk(&k);
    drop_world(&w);
}

/* What a child does that is one of hundreds. */
typedef struct quick {
    const world *w;
    const desk *k;
    int number;
} quick;

static void be_quick(void *arg) {
    const quick *q = (const quick *)arg;
    CHECK_INT(netchan_send(q->w->d->send, netchan_int(1), NETCHAN_FOREVER), NETCHAN_EFORK);
    CHECK_INT(netchan_recv(q->w->local[0], NULL, NETCHAN_FOREVER), NETCHAN_EFORK);
    if (SANITIZED) return; /* a fork leaves their allocators locked when another thread is just there */
    if (q->number % 4 == 0) greet(q->k->l->address);
    if (q->number % 8 == 1) check_own();
    if (q->number % 8 == 2) check_foreign(q->w);
}

typedef struct forker {
    const world *w;
    const desk *k;
    int first, count;
} forker;

static void *fork_often(void *arg) {
    const forker *f = (const forker *)arg;
    for (int i = 0; i < f->count; i++) {
        quick q = {f->w, f->k, f->first + i};
        in_child(be_quick, &q);
    }
    return NULL;
}

/* Numbers one after the other, from one side to the other, until it is told to stop. */
typedef struct run {
    netchan *send, *recv;
    bool stop; /* atomic */
    int64_t sent;
    pthread_t threads[2];
} run;

static void *run_sender(void *arg) {
    run *r = (run *)arg;
    while (!__atomic_load_n(&r->stop, __ATOMIC_ACQUIRE)) send_int(r->send, r->sent++);
    send_int(r->send, -1);
    return NULL;
}

static void *run_receiver(void *arg) {
    run *r = (run *)arg;
    for (int64_t n = 0, got; (got = recv_int(r->recv)) >= 0; n++) CHECK_INT(got, n);
    return NULL;
}

static void run_begin(run *r, netchan *send, netchan *recv) {
    memset(r, 0, sizeof *r);
    r->send = send;
    r->recv = recv;
    r->threads[0] = test_start(run_sender, r);
    r->threads[1] = test_start(run_receiver, r);
}

static void run_end(run *r) {
    __atomic_store_n(&r->stop, true, __ATOMIC_RELEASE);
    for (int i = 0; i < 2; i++) test_join(r->threads[i]);
    CHECK(r->sent > 0);
}

/* Another process, which sends back what it gets, until it gets -1. */
static void echo(int in, int out) {
    char address[64];
    netchan_options o = options();
    o.buffer = 20;
    if (!read_line(in, address, sizeof address)) return;
    netchan_link *d = dial_with(address, &o);
    write_line(out, "up");
    for (int64_t n = 0; n >= 0; send_int(d->send, n)) n = recv_int(d->recv);
    hang_up(d);
}

static netchan_link *listen_for(child *c) {
    char line[16];
    netchan_options o = options();
    o.buffer = 20;
    netchan_link *l = listen_with(&o);
    write_line(c->to, l->address);
    CHECK(read_line(c->from, line, sizeof line));
    return l;
}

/* Calls that wait all the time. */
typedef struct idlers {
    netchan *idle[3];
    netchan_case c[2];
    task t[4];
} idlers;

static void start_idlers(idlers *i, const world *w) {
    for (int k = 0; k < 3; k++) CHECK((i->idle[k] = netchan_make(k == 1)) != NULL);
    i->c[0] = netchan_case_recv(i->idle[2], NULL);
    i->c[1] = netchan_case_recv(w->other->recv, NULL);
    send_int(i->idle[1], 1);
    start_recv(&i->t[0], i->idle[0], NETCHAN_FOREVER);
    start_send(&i->t[1], i->idle[1], netchan_int(2), NETCHAN_FOREVER);
    start_recv(&i->t[2], w->d->recv, NETCHAN_FOREVER);
    start_select(&i->t[3], i->c, 2, NETCHAN_FOREVER);
}

static void end_idlers(idlers *i, const world *w) {
    for (int k = 0; k < 4; k++) CHECK(!is_done(&i->t[k]));
    send_int(i->idle[0], 1);
    CHECK_INT(recv_int(i->idle[1]), 1);
    send_int(w->l->send, 2);
    send_int(w->accepted[0], 3);
    for (int k = 0; k < 4; k++) CHECK_INT(end_task(&i->t[k]), k == 3);
    CHECK_INT(i->c[1].result, NETCHAN_OK);
    CHECK_INT(recv_int(i->idle[1]), 2);
    for (int k = 0; k < 3; k++) netchan_free(i->idle[k]);
}

/* Two threads fork; others wait, and others are busy; a peer is in another process. */
static void test_two_hundred_forks_under_load(void) {
    enum { FORKS = 200 / (SANITIZED ? 5 : 1) };
    child far = start_child(echo);
    netchan_link *l = listen_for(&far);
    world w;
    desk k;
    idlers waiting;
    run runs[4];
    make_world(&w);
    open_desk(&k);
    start_idlers(&waiting, &w);
    pair p = join(50, 0);
    netchan *local = netchan_make(3);
    run_begin(&runs[0], p.l->send, p.d->recv);
    run_begin(&runs[1], p.d->send, p.l->recv);
    run_begin(&runs[2], l->send, l->recv);
    run_begin(&runs[3], local, local);
    forker forkers[2] = {{&w, &k, 0, FORKS / 2}, {&w, &k, FORKS / 2, FORKS / 2}};
    pthread_t thread = test_start(fork_often, &forkers[1]);
    fork_often(&forkers[0]);
    test_join(thread);
    for (int i = 0; i < 4; i++) run_end(&runs[i]);
    end_idlers(&waiting, &w);
    end_child(&far);
    netchan_free(local);
    close_desk(&k);
    hang_up(p.d);
    hang_up(p.l);
    hang_up(l);
    drop_world(&w);
}

/* Writes keys into the pipe. */
static void write_keys(void *arg) {
    char keys[2][NETCHAN_KEY_SIZE];
    for (int i = 0; i < 2; i++) CHECK_INT(netchan_keygen(keys[i], sizeof keys[i]), NETCHAN_OK);
    CHECK_INT(write(*(const int *)arg, keys, sizeof keys), (int)sizeof keys);
}

static void write_keys_twice(void *arg) {
    write_keys(arg);
    in_child(write_keys, arg);
    write_keys(arg);
}

/* All that parents and children make differ, whether the parent had made any before it forked or not. */
static void test_no_two_keys_are_the_same(void) {
    enum { MOST = 64 };
    static char keys[MOST][NETCHAN_KEY_SIZE];
    size_t count = 0, room = sizeof keys;
    int fds[2];
    CHECK(pipe(fds) == 0);
    for (int i = 0; i < 3; i++) {
        in_child(write_keys_twice, &fds[1]);
        in_child(write_keys, &fds[1]);
        write_keys(&fds[1]);
    }
    close(fds[1]);
    for (ssize_t n; (n = read(fds[0], (char *)keys + count, room - count)) > 0;) count += (size_t)n;
    close(fds[0]);
    CHECK_INT(count, 3 * (6 + 2 + 2) * NETCHAN_KEY_SIZE);
    count /= NETCHAN_KEY_SIZE;
    for (size_t i = 0; i < count; i++)
        for (size_t k = 0; k < i; k++)
            if (strcmp(keys[i], keys[k]) == 0) test_fail(__FILE__, __LINE__, "keys %zu and %zu are the same", k, i);
}

/* A process with a link, whose child lives on: it listens or dials, and ends as it is told. */
static void be_survived(int in, int out) {
    char line[64];
    netchan_options o = options();
    if (!read_line(in, line, sizeof line)) return;
    netchan_link *link = strcmp(line, "listen") == 0 ? listen_with(&o) : dial_with(line, &o);
    write_line(out, link->address);
    CHECK(read_line(in, line, sizeof line)); /* the other side is there */
    pid_t pid = fork();
    if (pid == 0) alarm(120);
    if (pid == 0) pause();
    char number[32];
    snprintf(number, sizeof number, "%d", (int)pid);
    write_line(out, number);
    if (strcmp(line, "hang up") == 0) {
        hang_up(link);
        write_line(out, "done");
    }
    pause();
}

/* The other side learns of a hangup, and of a death, although a child has copies of all descriptors. */
static void test_a_child_does_not_keep_links_alive(void) {
    for (int i = 0; i < 4; i++) {
        bool listens = i % 2, dies = i / 2;
        char line[64];
        child c = start_child(be_survived);
        netchan_options o = options();
        o.ping_ms = LONG; /* heartbeats would tell, too, and later */
        o.resume_ms = o.linger_ms = 1;
        netchan_link *link = listens ? NULL : listen_with(&o);
        write_line(c.to, listens ? "listen" : link->address);
        CHECK(read_line(c.from, line, sizeof line));
        if (listens) link = dial_with(line, &o);
        wait_peer(link, "up");
        write_line(c.to, dies ? "die" : "hang up");
        CHECK(read_line(c.from, line, sizeof line));
        pid_t heir = (pid_t)atoi(line);
        long long start = test_ms();
        if (dies) CHECK_INT(kill(c.pid, SIGKILL), 0);
        wait_peer(link, dies ? "down" : "drained");
        printf("%s %s: its peer noticed after %lld ms\n", listens ? "listener" : "dialler", dies ? "killed" : "hung up",
               test_ms() - start);
        if (!dies) CHECK(read_line(c.from, line, sizeof line)); /* its hangup has returned */
        if (!dies) CHECK_INT(kill(c.pid, SIGKILL), 0);
        CHECK_INT(waitpid(c.pid, NULL, 0), c.pid);
        CHECK_INT(kill(heir, SIGKILL), 0); /* it was there all the time */
        close_child(&c);
        netchan_hangup(link, NULL);
        CHECK_INT(alloc_blocks(), 0);
    }
}

/* A child that has hung up, too, and lives on. */
typedef struct lodger {
    netchan_link *l;
    int fd;
} lodger;

static void lodge(void *arg) {
    const lodger *g = (const lodger *)arg;
    char byte;
    CHECK_INT(netchan_hangup(g->l, NULL), NETCHAN_EFORK);
    write_line(g->fd, "hung up");
    CHECK_INT(recv(g->fd, &byte, 1, 0), 1);
}

static int connect_to(const char *address) {
    struct sockaddr_in a = loopback(port_of(address));
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(fd >= 0);
    if (connect(fd, (struct sockaddr *)&a, sizeof a) == 0) return fd;
    close(fd);
    return -1;
}

/* A port is free when both have hung up, whoever lives on. */
static void test_a_child_lets_go_of_the_port(void) {
    netchan_options o = options();
    char line[16], address[32];
    int fds[2];
    lodger g;
    pair p;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    p.l = listen_with(&o);
    p.d = dial_with(p.l->address, &o);
    snprintf(address, sizeof address, "%s", p.l->address);
    g.l = p.l;
    g.fd = fds[1];
    pid_t pid = start_fork(lodge, &g);
    CHECK(read_line(fds[0], line, sizeof line));
    check_works(p.l, p.d);
    hang_up(p.d);
    hang_up(p.l);
    CHECK_INT(connect_to(address), -1);
    p.l = netchan_listen(address, &o);
    CHECK(p.l);
    p.d = dial_with(address, &o);
    check_works(p.l, p.d);
    part(&p);
    CHECK_INT(send(fds[0], "", 1, 0), 1);
    end_fork(pid);
    close(fds[0]);
    close(fds[1]);
}

/* --- descriptors -------------------------------------------------------------------------------------------------- */

/* In the place of this program: how many descriptors it has got, as its exit status. */
static int count_fds(void) {
    int count = 0;
    for (int fd = FIRST_FD; fd < FD_LIMIT; fd++) count += is_open(fd);
    return count < 200 ? count : 200;
}

static int fds_after_exec(void) {
    int status = -1;
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        execl(program, program, "count-fds", (char *)NULL);
        _exit(255);
    }
    CHECK_INT(waitpid(pid, &status, 0), pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) != 255);
    return WEXITSTATUS(status);
}

static void test_descriptors_end_with_exec(void) {
    int before = fds_after_exec(), fds = fds_now();
    netchan_options o = options();
    netchan_link *l[2], *d[2];
    for (int i = 0; i < 2; i++) {
        l[i] = listen_with(&o);
        d[i] = dial_with(l[i]->address, &o);
    }
    int stranger = connect_to(l[0]->address);
    CHECK(fcntl(stranger, F_SETFD, FD_CLOEXEC) == 0);
    exchange(d[0]->send, l[0]->recv, 1);
    CHECK(fds_now() >= fds + 8);
    CHECK_INT(fds_after_exec(), before);
    close(stranger);
    for (int i = 0; i < 2; i++) {
        check_works(l[i], d[i]);
        hang_up(d[i]);
        hang_up(l[i]);
    }
    CHECK_INT(fds_now(), fds);
    CHECK_INT(alloc_blocks(), 0);
}

/* Looks at each descriptor as exec would: those that are new must end there. */
static void check_all_end(void *arg) {
    const bool *old = (const bool *)arg;
    for (int fd = FIRST_FD; fd < FD_LIMIT; fd++) {
        int flags = fcntl(fd, F_GETFD);
        if (flags >= 0 && !old[fd] && !(flags & FD_CLOEXEC))
            test_fail(__FILE__, __LINE__, "a fork just now would take descriptor %d through exec", fd);
    }
}

static void *open_and_close(void *arg) {
    netchan_link *l;
    for (int i = 0; i < 150 / LESS; i++) { /* each is the first link */
        CHECK((l = listen_quietly()) != NULL);
        hang_up(l);
    }
    CHECK((l = listen_quietly()) != NULL);
    for (int i = 0; i < 150 / LESS; i++) {
        netchan_link *other = listen_quietly(), *d = dial_quietly(l->address);
        CHECK(other && d);
        hang_up(d);
        hang_up(other);
    }
    hang_up(l);
    return arg;
}

/* At no moment is there a descriptor that another thread's exec would take along. Every second time there is no fork()
 * in between that the library could have noticed: system() and posix_spawn() are not forks either. */
static void test_descriptors_end_with_exec_from_the_first_moment(void) {
#if defined(SOCK_CLOEXEC) && defined(__linux__)
    static bool old[FD_LIMIT];
    for (int fd = 0; fd < FD_LIMIT; fd++) old[fd] = is_open(fd);
    __atomic_store_n(&dawdles, true, __ATOMIC_RELAXED);
    pthread_t thread = test_start(open_and_close, NULL);
    for (int i = 0; i < 500 / LESS; i++) {
        fflush(stdout);
        pid_t pid = i % 2 || NO_THREADS_IN_CHILDREN ? fork() : (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
        CHECK(pid >= 0);
        if (pid == 0) check_all_end(old);
        if (pid == 0) _exit(0);
        end_fork(pid);
    }
    test_join(thread);
    CHECK_INT(alloc_blocks(), 0);
#endif
}

/* In the place of this program: serves on a socket that was handed over. */
static int serve(const char *number) {
    netchan_options o = options();
    o.listen_fd = atoi(number);
    netchan_link *l = netchan_listen(NULL, &o);
    if (!l) test_fail(__FILE__, __LINE__, "%s", netchan_errmsg());
    CHECK_INT(recv_int(l->recv), 1);
    send_int(l->send, 2);
    hang_up(l);
    return 0;
}

/* A child clears the flag of the listening socket and becomes the successor; the parent hangs up. */
static void test_a_socket_is_handed_over(void) {
    char address[32], number[16];
    netchan_options o = options();
    pair p;
    p.l = listen_with(&o);
    p.d = dial_with(p.l->address, &o);
    check_works(p.l, p.d);
    hang_up(p.d);
    snprintf(address, sizeof address, "%s", p.l->address);
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        snprintf(number, sizeof number, "%d", p.l->listen_fd);
        if (fcntl(p.l->listen_fd, F_SETFD, 0) != 0) _exit(3);
        execl(program, program, "serve", number, (char *)NULL);
        _exit(4);
    }
    hang_up(p.l);
    p.d = dial_with(address, &o);
    send_int(p.d->send, 1);
    CHECK_INT(recv_int(p.d->recv), 2);
    hang_up(p.d);
    end_fork(pid);
    CHECK_INT(alloc_blocks(), 0);
}

/* The flags of descriptors that are the program's own. */
static void test_flags_of_other_descriptors(void) {
    enum { OURS = 7 };
    int fds[OURS] = {0, 1, 2}, flags[OURS][2];
    CHECK(pipe(fds + 3) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, fds + 5) == 0);
    for (int i = 0; i < OURS; i++) flags[i][0] = fcntl(fds[i], F_GETFL), flags[i][1] = fcntl(fds[i], F_GETFD);
    netchan_options o = options();
    pair p = join(2, 2);
    o.listen_fd = fds[3];
    CHECK(!netchan_listen(NULL, &o));
    o.listen_fd = fds[5];
    CHECK(!netchan_listen(NULL, &o));
    check_works(p.l, p.d);
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < OURS; i++) CHECK_INT(fcntl(fds[i], F_GETFL), flags[i][0]);
        for (int i = 0; i < OURS; i++) CHECK_INT(fcntl(fds[i], F_GETFD), flags[i][1]);
        if (round == 0) part(&p);
    }
    for (int i = 3; i < OURS; i++) close(fds[i]);
}

/* Both ways, without a CHECK: where it would write is closed. */
static bool works_quietly(netchan_link *l, netchan_link *d) {
    bool works = true;
    for (int i = 0; i < 20 && works; i++) {
        netchan_value v;
        netchan *to = i % 2 ? l->send : d->send, *from = i % 2 ? d->recv : l->recv;
        works = netchan_send(to, netchan_int(i), LONG) == NETCHAN_OK && netchan_recv(from, &v, LONG) == NETCHAN_OK &&
                netchan_as_int(&v, -1) == i;
    }
    return works;
}

/* What was found while standard descriptors were closed. */
typedef struct finding {
    bool listens, dials, works, stays_closed, hangs_up;
} finding;

static finding live_without(int closed) {
    finding f = {false, false, false, true, false};
    netchan_options o = options();
    o.buffer = 1;
    for (int fd = 0; fd < FIRST_FD; fd++)
        if (closed & 1 << fd) close(fd);
    netchan_link *l = netchan_listen("127.0.0.1:0", &o);
    netchan_link *d = l ? netchan_dial(l->address, &o) : NULL;
    f.listens = l != NULL;
    f.dials = d != NULL;
    for (int fd = 0; fd < FIRST_FD; fd++)
        if (closed & 1 << fd) f.stays_closed &= !is_open(fd) && write(fd, "text for people\n", 16) < 0;
    f.works = d && works_quietly(l, d);
    f.hangs_up = d && netchan_hangup(d, NULL) == NETCHAN_OK && netchan_hangup(l, NULL) == NETCHAN_OK;
    return f;
}

/* The descriptors 0, 1 and 2 are never sockets of ours, as programs write to them whether they are open or not. */
static void test_standard_descriptors_that_are_closed(void) {
    for (int closed = 1; closed < 8; closed++) {
        int kept[FIRST_FD];
        fflush(stdout);
        for (int fd = 0; fd < FIRST_FD; fd++) CHECK((kept[fd] = fcntl(fd, F_DUPFD_CLOEXEC, 100)) >= 0);
        int before = fds_now();
        finding f = live_without(closed);
        for (int fd = 0; fd < FIRST_FD; fd++) dup2(kept[fd], fd);
        CHECK(f.listens);
        CHECK(f.dials);
        CHECK(f.stays_closed);
        CHECK(f.works);
        CHECK(f.hangs_up);
        CHECK_INT(fds_now(), before);
        for (int fd = 0; fd < FIRST_FD; fd++) close(kept[fd]);
        CHECK_INT(alloc_blocks(), 0);
    }
}

/* Numbers that select() could not take. */
static void test_large_descriptors(void) {
    enum { MANY = 1100 };
    static int fds[MANY];
    int count = 0;
    CHECK((fds[count++] = open("/dev/null", O_RDONLY)) >= 0);
    while (count < MANY && (fds[count] = dup(fds[0])) >= 0) count++;
    if (count < MANY) printf("large descriptors: only %d are allowed\n", count);
    pair p = join(0, 0);
    CHECK(count < MANY || p.l->listen_fd > 1024);
    check_works(p.l, p.d);
    part(&p);
    while (count) close(fds[--count]);
}

/* So many descriptors may be opened from now on. */
static struct rlimit allow_fds(int more) {
    struct rlimit before, now;
    int fd, left = more;
    CHECK_INT(getrlimit(RLIMIT_NOFILE, &before), 0);
    now = before;
    for (fd = 0; left > 0; fd++) left -= !is_open(fd);
    for (; is_open(fd);) fd++; /* what is open beyond is in the way of nobody */
    now.rlim_cur = (rlim_t)fd;
    CHECK_INT(setrlimit(RLIMIT_NOFILE, &now), 0);
    return before;
}

/* With so few descriptors that something fails somewhere: it is told in a sentence, and nothing is left behind. */
static void test_few_descriptors(void) {
    netchan_options o = options();
    int before = fds_now(), good = 0;
    netchan_link *l = listen_with(&o);
    int with_one = fds_now();
    o.connect_ms = 100;
    for (int more = 0; more <= 12; more++) {
        struct rlimit limit = allow_fds(more);
        netchan_link *other = netchan_listen("127.0.0.1:0", &o);
        if (!other) check_says(netchan_errmsg(), "Too many open files");
        netchan_link *d = netchan_dial(other ? other->address : l->address, &o);
        if (!d) check_says(netchan_errmsg(), "dial");
        good += other && d;
        CHECK_INT(netchan_hangup(d, NULL), NETCHAN_OK);
        CHECK_INT(netchan_hangup(other, NULL), NETCHAN_OK);
        CHECK_INT(setrlimit(RLIMIT_NOFILE, &limit), 0);
        wait_for_fds(with_one);
    }
    CHECK(good >= 5 && good < 12);
    hang_up(l);
    for (int more = 0; more < 3; more++) { /* the first link, whose thread needs two */
        struct rlimit limit = allow_fds(more);
        check_fails(netchan_listen("127.0.0.1:0", &o), more == 0 ? "Too many open files" : "");
        CHECK(strlen(netchan_errmsg()) > 20);
        CHECK_INT(setrlimit(RLIMIT_NOFILE, &limit), 0);
    }
    CHECK_INT(fds_now(), before);
    CHECK_INT(alloc_blocks(), 0);
}

/* Microseconds of processor time that this process has used. */
static long long cpu_us(void) {
    struct rusage r;
    getrusage(RUSAGE_SELF, &r);
    return (r.ru_utime.tv_sec + r.ru_stime.tv_sec) * 1000000LL + r.ru_utime.tv_usec + r.ru_stime.tv_usec;
}

static void dial_and_greet(int in, int out) {
    char address[64];
    if (!read_line(in, address, sizeof address)) return;
    write_line(out, "dialling");
    greet(address);
}

/* Who comes while the listener has no descriptor for it waits at the door, which costs no time, and gets in later. */
static void test_no_descriptor_for_who_comes(void) {
    char line[16];
    child c = start_child(dial_and_greet);
    desk k;
    open_desk(&k);
    netchan_link *d = dial_quietly(k.l->address);
    CHECK(d);
    wait_peer(k.l, "up");
    struct rlimit limit = allow_fds(0);
    write_line(c.to, k.l->address);
    CHECK(read_line(c.from, line, sizeof line));
    long long before = cpu_us();
    for (int i = 1; i <= 5; i++) {
        send_int(d->send, i);
        CHECK_INT(recv_int(d->recv), i);
        test_pause(100);
    }
    CHECK(cpu_us() - before < 100000); /* 500 ms have passed */
    check_no_event(k.l, "up");
    CHECK_INT(setrlimit(RLIMIT_NOFILE, &limit), 0);
    end_child(&c);
    wait_peer(k.l, "up");
    hang_up(d);
    close_desk(&k);
    CHECK_INT(alloc_blocks(), 0);
}

/* --- signals ------------------------------------------------------------------------------------------------------ */

enum { SIGNALS = 65 };

/* What the process does on each signal, and which this thread holds back. */
typedef struct signal_state {
    void (*handler[SIGNALS])(int);
    int flags[SIGNALS];
    bool blocked[SIGNALS];
} signal_state;

static void read_signals(signal_state *s) {
    sigset_t mask;
    memset(s, 0, sizeof *s);
    CHECK_INT(pthread_sigmask(SIG_BLOCK, NULL, &mask), 0);
    for (int n = 1; n < SIGNALS; n++) {
        struct sigaction a;
        if (sigaction(n, NULL, &a) != 0) continue;
        s->handler[n] = a.sa_handler;
        s->flags[n] = a.sa_flags;
        s->blocked[n] = sigismember(&mask, n) == 1;
    }
}

static void check_signals(const signal_state *before) {
    signal_state now;
    read_signals(&now);
    for (int n = 1; n < SIGNALS; n++) {
        CHECK(now.handler[n] == before->handler[n]);
        CHECK_INT(now.flags[n], before->flags[n]);
        CHECK_INT(now.blocked[n], before->blocked[n]);
    }
}

/* A peer that sends nothing, receives nothing, and is killed. */
static void be_killed(int in, int out) {
    char address[64];
    netchan_options o = options();
    if (!read_line(in, address, sizeof address) || !netchan_dial(address, &o)) return;
    write_line(out, "up");
    read_line(in, address, sizeof address);
}

/* The other way round: a listener. */
static void listen_and_be_killed(int in, int out) {
    char line[64];
    netchan_link *l = listen_quietly();
    if (!l) return;
    write_line(out, l->address);
    read_line(in, line, sizeof line);
}

/* Whether a write to a broken pipe ends this process: so it is no use if the signal is ignored here by chance. */
static void write_to_nobody(void *arg) {
    int fds[2];
    (void)arg;
    if (pipe(fds) == 0 && close(fds[0]) == 0 && write(fds[1], "", 1) < 0) _exit(1);
}

static void check_sigpipe_kills(void) {
    int status = -1;
    pid_t pid = start_fork(write_to_nobody, NULL);
    CHECK_INT(waitpid(pid, &status, 0), pid);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGPIPE);
}

/* A stranger that is gone, with a reset, when it is answered. */
static void reset_after(const char *address, const void *text, size_t size) {
    struct linger now = {1, 0};
    int fd = connect_to(address);
    CHECK(fd >= 0);
    if (send(fd, text, size, MSG_NOSIGNAL) < 0) CHECK(errno == EPIPE || errno == ECONNRESET); /* it was turned away */
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(fd);
}

/* Sends until the socket is full, while the other side is killed. */
static void write_to_who_is_killed(bool listens, const uint8_t *noise) {
    enum { SIZE = 200000 };
    netchan_options o = options();
    char line[64];
    child c = start_child(listens ? be_killed : listen_and_be_killed);
    o.buffer = 100;
    o.resume_ms = 50;
    o.linger_ms = 1;
    netchan_link *l = listens ? listen_with(&o) : NULL;
    if (listens) write_line(c.to, l->address);
    CHECK(read_line(c.from, line, sizeof line));
    if (!listens) l = dial_with(line, &o);
    for (int i = 0; i < 60; i++) CHECK_INT(netchan_send(l->send, netchan_bytes(noise, SIZE), LONG), NETCHAN_OK);
    kill_child(&c);
    for (int i = 0; i < 20; i++) netchan_send(l->send, netchan_bytes(noise, SIZE), NETCHAN_NOWAIT);
    wait_peer(l, "lost");
    netchan_hangup(l, NULL);
}

/* The signal is as the program left it, and yet none is raised when others vanish while we write. */
static void test_no_sigpipe(void) {
    enum { SIZE = 200000 };
    signal_state before;
    uint8_t *bytes = noise(SIZE);
    static const char record[] = "\26\3\1\0\4\1\0\0\0\0";
    signal(SIGPIPE, SIG_DFL);
    check_sigpipe_kills();
    read_signals(&before);
    for (int i = 0; i < 10 / (SANITIZED ? 5 : 1); i++) write_to_who_is_killed(i % 2, bytes);
    pair p = join(0, 0);
    for (int i = 0; i < 200; i++) reset_after(p.l->address, record, sizeof record - 1);
    check_signals(&before);
    check_works(p.l, p.d);
    netchan_hangup(p.d, NULL);
    hang_up(p.l);
    check_signals(&before);
    free(bytes);
    CHECK_INT(alloc_blocks(), 0);
}

static pthread_t target;      /* the thread for which signals are; constant while there are any */
static long handled, astray;  /* signals in that thread, and in others; atomic */

static void count_signal(int number) {
    (void)number;
    __atomic_add_fetch(pthread_equal(pthread_self(), target) ? &handled : &astray, 1, __ATOMIC_RELAXED);
}

/* A handler that interrupts what it can. */
static void handle(int number) {
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_handler = count_signal;
    sigemptyset(&a.sa_mask);
    target = pthread_self();
    CHECK_INT(sigaction(number, &a, NULL), 0);
}

/* A signal every 100 us for the thread that started it. */
typedef struct storm {
    bool stop; /* atomic */
    pthread_t thread;
} storm;

static void *storm_main(void *arg) {
    storm *s = (storm *)arg;
    struct timespec pause = {0, SANITIZED ? 1000000 : 100000};
    while (!__atomic_load_n(&s->stop, __ATOMIC_ACQUIRE)) {
        pthread_kill(target, SIGUSR1);
        nanosleep(&pause, NULL);
    }
    return NULL;
}

static void storm_begin(storm *s) {
    handle(SIGUSR1);
    s->stop = false;
    s->thread = test_start(storm_main, s);
}

static void storm_end(storm *s) {
    __atomic_store_n(&s->stop, true, __ATOMIC_RELEASE);
    test_join(s->thread);
    CHECK(__atomic_load_n(&handled, __ATOMIC_RELAXED) > 0);
    CHECK_INT(__atomic_load_n(&astray, __ATOMIC_RELAXED), 0);
}

/* What a blocked call waits for, after a while in which something wrong may happen. */
typedef struct helper {
    netchan *send, *recv, *close;
    netchan_link *exports;
    pthread_t thread;
} helper;

static void *help(void *arg) {
    helper *h = (helper *)arg;
    test_pause(SHORT);
    if (h->send) send_int(h->send, 1);
    if (h->recv) CHECK_INT(recv_int(h->recv), 1);
    if (h->exports) CHECK_INT(netchan_export(h->exports, "late", h->close, NETCHAN_SENDER), NETCHAN_OK);
    else if (h->close) CHECK_INT(netchan_close(h->close), NETCHAN_OK);
    return NULL;
}

static helper *get_help(helper *h, netchan *send, netchan *recv) {
    memset(h, 0, sizeof *h);
    h->send = send;
    h->recv = recv;
    h->thread = test_start(help, h);
    return h;
}

/* It took as long as it was told. */
static void check_timed_out(int result, long long start, int ms) {
    long long took = test_ms() - start;
    CHECK_INT(result, NETCHAN_ETIMEDOUT);
    if (took < ms - 1 || took > ms + PROMPT) test_fail(__FILE__, __LINE__, "it took %lld ms, not %d", took, ms);
}

static void storm_on_a_way(netchan *send, netchan *recv) {
    helper h;
    netchan_value v;
    long long start = test_ms();
    check_timed_out(netchan_send(send, netchan_int(9), 50), start, 50);
    start = test_ms();
    check_timed_out(netchan_recv(recv, NULL, 50), start, 50);
    netchan_case c[2] = {netchan_case_recv(recv, &v), netchan_case_recv(NULL, NULL)};
    start = test_ms();
    check_timed_out(netchan_select(c, 2, 50), start, 50);
    get_help(&h, NULL, recv);
    CHECK_INT(netchan_send(send, netchan_int(1), NETCHAN_FOREVER), NETCHAN_OK);
    test_join(h.thread);
    get_help(&h, send, NULL);
    CHECK_INT(netchan_recvfrom(recv, &v, NULL, LONG), NETCHAN_OK);
    test_join(h.thread);
    get_help(&h, send, NULL);
    CHECK_INT(netchan_select(c, 2, NETCHAN_FOREVER), 0);
    CHECK_INT(c[0].result, NETCHAN_OK);
    test_join(h.thread);
}

static void test_a_storm_of_signals_on_calls(void) {
    netchan *local = netchan_make(0);
    netchan_peer peer;
    storm s;
    helper h;
    size_t reached;
    netchan *end;
    pair p = join(0, 0);
    peer.id = wait_peer(p.l, "up");
    storm_begin(&s);
    storm_on_a_way(local, local);
    storm_on_a_way(p.d->send, p.l->recv);
    storm_on_a_way(p.l->send, p.d->recv);
    get_help(&h, NULL, p.d->recv);
    CHECK_INT(netchan_sendto(p.l, peer, netchan_int(1), NETCHAN_FOREVER), NETCHAN_OK);
    test_join(h.thread);
    get_help(&h, NULL, p.d->recv);
    CHECK_INT(netchan_broadcast(p.l, netchan_int(1), &reached, LONG), NETCHAN_OK);
    CHECK_INT(reached, 1);
    test_join(h.thread);
    long long start = test_ms();
    check_timed_out(netchan_sendto(p.l, peer, netchan_int(1), 50), start, 50);
    start = test_ms();
    check_timed_out(netchan_broadcast(p.l, netchan_int(1), NULL, 50), start, 50);
    start = test_ms();
    check_timed_out(netchan_import(p.d, "late", NETCHAN_SENDER, &end, 50), start, 50);
    memset(&h, 0, sizeof h);
    h.exports = p.l;
    h.close = local;
    h.thread = test_start(help, &h);
    CHECK_INT(netchan_import(p.d, "late", NETCHAN_SENDER, &end, NETCHAN_FOREVER), NETCHAN_OK);
    test_join(h.thread);
    netchan_free(end);
    storm_end(&s);
    netchan_hangup(p.d, NULL);
    hang_up(p.l);
    netchan_free(local);
    CHECK_INT(alloc_blocks(), 0);
}

/* A listener that comes late. */
static void *listen_late(void *arg) {
    netchan_options o = options();
    test_pause(4 * SHORT);
    netchan_link *l = netchan_listen((const char *)arg, &o);
    CHECK(l);
    CHECK_INT(recv_int(l->recv), 1);
    hang_up(l);
    return NULL;
}

static void test_a_storm_of_signals_on_links(void) {
    netchan_options o = options();
    netchan_report report;
    storm s;
    char address[32];
    snprintf(address, sizeof address, "localhost:%d", free_port());
    storm_begin(&s);
    o.connect_ms = 200;
    long long start = test_ms();
    CHECK(!netchan_dial(address, &o));
    CHECK(test_ms() - start >= 199 && test_ms() - start < PROMPT);
    o.connect_ms = LONG;
    for (int i = 0; i < 3; i++) {
        pthread_t thread = test_start(listen_late, address);
        netchan_link *d = dial_with(address, &o); /* waits until it comes */
        send_int(d->send, 1);
        hang_up(d);
        test_join(thread);
    }
    for (int i = 0; i < 20; i++) {
        pair p;
        o.buffer = 5;
        o.linger_ms = i % 2 ? LONG : 100;
        p.l = listen_with(&o);
        p.d = dial_with(p.l->address, &o);
        send_int(p.l->send, 1); /* nobody takes it */
        start = test_ms();
        if (i % 2 == 0) check_timed_out(netchan_hangup(p.l, &report), start, 75);
        if (i % 2 == 0) CHECK_INT(report.undelivered + report.unknown, 1);
        if (i % 2) CHECK_INT(recv_int(p.d->recv), 1);
        netchan_hangup(p.d, NULL);
        if (i % 2) hang_up(p.l);
    }
    storm_end(&s);
    CHECK_INT(alloc_blocks(), 0);
}

/* Signals for the process as a whole are handled by its own threads, never by one of the library's. */
static void test_signals_are_not_for_our_thread(void) {
    static const int numbers[] = {SIGUSR1, SIGUSR2, SIGTERM, SIGINT, SIGHUP, SIGCHLD, SIGWINCH, SIGPIPE, SIGQUIT};
    enum { COUNT = sizeof numbers / sizeof *numbers };
    sigset_t held, pending;
    signal_state before;
    sigemptyset(&held);
    for (int i = 0; i < COUNT; i++) {
        handle(numbers[i]);
        sigaddset(&held, numbers[i]);
    }
    pair p = join(1, 1); /* while this thread blocks none of them */
    CHECK_INT(pthread_sigmask(SIG_BLOCK, &held, NULL), 0);
    read_signals(&before);
    pair q = join(1, 1);
    for (int i = 0; i < COUNT; i++) CHECK_INT(kill(getpid(), numbers[i]), 0);
    for (int i = 0; i < 50; i++) { /* there is nobody but the library's thread that could be interrupted */
        send_int(i % 2 ? p.d->send : q.l->send, i);
        CHECK_INT(recv_int(i % 2 ? p.l->recv : q.d->recv), i);
    }
    CHECK_INT(handled + astray, 0);
    sigpending(&pending);
    for (int i = 0; i < COUNT; i++) CHECK_INT(sigismember(&pending, numbers[i]), 1);
    hang_up(q.d);
    hang_up(q.l);
    hang_up(p.d);
    hang_up(p.l);
    check_signals(&before);
    CHECK_INT(pthread_sigmask(SIG_UNBLOCK, &held, NULL), 0);
    CHECK_INT(handled, COUNT);
    CHECK_INT(astray, 0);
    CHECK_INT(alloc_blocks(), 0);
}

/* --- threads, and all else ---------------------------------------------------------------------------------------- */

/* One thread, from the first link to the last. */
static void test_one_thread(void) {
    enum { LINKS_HERE = 10 };
    netchan_link *l[LINKS_HERE], *d[LINKS_HERE];
    char key[NETCHAN_KEY_SIZE];
    int before = threads_now(), one = before + !!before;
    netchan *ch = netchan_make(1);
    send_int(ch, 1);
    CHECK_INT(recv_int(ch), 1);
    CHECK_INT(netchan_recv(ch, NULL, SHORT), NETCHAN_ETIMEDOUT);
    netchan_free(ch);
    CHECK_INT(netchan_keygen(key, sizeof key), NETCHAN_OK);
    CHECK(!netchan_listen("nonsense", NULL) && !netchan_dial("nonsense", NULL));
    CHECK_INT(threads_now(), before);
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < LINKS_HERE; i++) {
            CHECK((l[i] = listen_quietly()) && (d[i] = dial_quietly(l[i]->address)));
            CHECK_INT(threads_now(), one);
        }
        for (int i = 0; i < LINKS_HERE; i++) hang_up(d[i]);
        for (int i = 0; i < LINKS_HERE; i++) {
            CHECK_INT(threads_now(), one);
            hang_up(l[i]);
        }
        wait_for_threads(before);
    }
    netchan_options o = options();
    o.connect_ms = SHORT;
    char address[32];
    snprintf(address, sizeof address, "127.0.0.1:%d", free_port());
    CHECK(!netchan_dial(address, &o));
    wait_for_threads(before);
    CHECK_INT(alloc_blocks(), 0);
}

/* What a process has only one of. */
typedef struct surroundings {
    char locale[256], directory[1024];
    mode_t umask;
    char **environment, *first;
    size_t size; /* of the environment */
    struct rlimit limits[16];
    struct itimerval timers[3];
    int priority;
    signal_state signals;
} surroundings;

extern char **environ;

static void look_around(surroundings *s) {
    static const int limits[] = {RLIMIT_CORE,   RLIMIT_CPU,   RLIMIT_DATA, RLIMIT_FSIZE,
                                 RLIMIT_NOFILE, RLIMIT_STACK, RLIMIT_AS};
    static const int timers[] = {ITIMER_VIRTUAL, ITIMER_PROF};
    memset(s, 0, sizeof *s);
    snprintf(s->locale, sizeof s->locale, "%s", setlocale(LC_ALL, NULL));
    CHECK(getcwd(s->directory, sizeof s->directory));
    umask(s->umask = umask(0));
    s->environment = environ;
    s->first = environ[0];
    for (char **e = environ; *e; e++) s->size += strlen(*e) + 1;
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) getrlimit(limits[i], &s->limits[i]);
    for (size_t i = 0; i < sizeof timers / sizeof *timers; i++) getitimer(timers[i], &s->timers[i]);
    s->priority = getpriority(PRIO_PROCESS, 0);
    read_signals(&s->signals);
}

static void check_surroundings(const surroundings *before) {
    surroundings now;
    look_around(&now);
    CHECK_STR(now.locale, before->locale);
    CHECK_STR(now.directory, before->directory);
    CHECK_INT(now.umask, before->umask);
    CHECK(now.environment == before->environment && now.first == before->first && now.size == before->size);
    CHECK(memcmp(now.limits, before->limits, sizeof now.limits) == 0);
    CHECK(memcmp(now.timers, before->timers, sizeof now.timers) == 0);
    CHECK_INT(now.priority, before->priority);
    check_signals(&before->signals);
}

static void test_the_surroundings_stay(void) {
    surroundings before;
    sigset_t some;
    setlocale(LC_ALL, "C.UTF-8");
    umask(027);
    sigemptyset(&some);
    sigaddset(&some, SIGWINCH);
    CHECK_INT(pthread_sigmask(SIG_BLOCK, &some, NULL), 0);
    look_around(&before);
    netchan_options o = options();
    for (int i = 0; i < 3; i++) {
        pair p;
        char wrong[] = "0123456789abcdef0123456789abcdef";
        p.l = listen_with(&o);
        check_surroundings(&before);
        p.d = dial_with(p.l->address, &o);
        check_surroundings(&before);
        check_works(p.l, p.d);
        netchan_options other = o;
        other.shared_key = wrong;
        CHECK(!netchan_dial(p.l->address, &other));
        check_surroundings(&before);
        hang_up(p.d);
        hang_up(p.l);
        check_surroundings(&before);
    }
    CHECK_INT(alloc_blocks(), 0);
}

static void *fail_here(void *arg) {
    CHECK_STR(netchan_errmsg(), "");
    for (int i = 0; i < 1000; i++) {
        CHECK(!netchan_listen(arg ? "no port" : "127.0.0.1:99999", NULL));
        check_says(netchan_errmsg(), "trust");
        CHECK_INT(netchan_close(NULL), NETCHAN_EINVAL);
        check_says(netchan_errmsg(), "NULL");
    }
    return NULL;
}

/* The sentence of one thread is not that of another; errno says nothing, and is not asked. */
static void test_sentences_belong_to_threads(void) {
    pthread_t threads[4];
    CHECK_STR(netchan_errmsg(), "");
    CHECK_INT(netchan_unpack(NULL, NULL, NULL), NETCHAN_ETYPE);
    char mine[512];
    snprintf(mine, sizeof mine, "%s", netchan_errmsg());
    CHECK(strlen(mine) > 10);
    for (int i = 0; i < 4; i++) threads[i] = test_start(fail_here, i % 2 ? mine : NULL);
    for (int i = 0; i < 4; i++) test_join(threads[i]);
    CHECK_STR(netchan_errmsg(), mine);
    errno = EINTR; /* a value from before means nothing */
    pair p = join(0, 0);
    errno = EAGAIN;
    check_works(p.l, p.d);
    errno = EINTR;
    part(&p);
}

/* --- again and again ---------------------------------------------------------------------------------------------- */

/* What there is before a round that is done many times. */
typedef struct holdings {
    long blocks, memory;
    int fds, threads;
} holdings;

static holdings take_stock(void) {
    holdings h = {alloc_blocks(), resident(), fds_now(), threads_now()};
    return h;
}

/* Memory may grow by a little, as the allocator of the system likes. */
static void check_stock(const char *what, const holdings *before, int rounds) {
    wait_for_threads(before->threads);
    long grown = resident() - before->memory;
    CHECK_INT(alloc_blocks(), before->blocks);
    CHECK_INT(fds_now(), before->fds);
    printf("%s: %d rounds, %ld KiB more\n", what, rounds, grown / 1024);
    CHECK(grown < 1 << 20);
}

/* Does it often, a fifth of it before the stock is taken. */
static void repeat(const char *what, void (*round)(int i, void *arg), void *arg, int rounds) {
    int threads = threads_now();
    for (int i = 0; i < rounds / 5; i++) round(i, arg);
    wait_for_threads(threads);
    holdings before = take_stock();
    for (int i = 0; i < rounds; i++) round(i, arg);
    check_stock(what, &before, rounds);
}

static void listen_once(int i, void *arg) {
    netchan_options o = options();
    (void)arg;
    o.buffer = (size_t)i % 3;
    hang_up(listen_with(&o));
}

static void test_ten_thousand_listeners(void) {
    repeat("listen and hang up", listen_once, NULL, 10000 / FEWER);
}

static void listen_with_certificate(int i, void *arg) {
    netchan_options o = options();
    char pin[NETCHAN_FINGERPRINT_SIZE] = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    (void)arg;
    o.shared_key = NULL;
    if (i % 2) o.pin = pin;
    else o.insecure = true;
    hang_up(listen_with(&o));
}

static void test_listeners_with_certificates(void) {
    repeat("listen with a new certificate and hang up", listen_with_certificate, NULL, 300 / (SANITIZED ? 10 : 1));
}

/* What came to the listener's own channels goes. */
static void empty_out(netchan_link *l) {
    netchan_value v;
    for (; netchan_recv(l->accept, &v, NETCHAN_NOWAIT) == NETCHAN_OK; netchan_clear(&v)) continue;
    for (; netchan_recv(l->events, &v, NETCHAN_NOWAIT) == NETCHAN_OK; netchan_clear(&v)) continue;
}

static void dial_once(int i, void *arg) {
    netchan_options o = options();
    netchan_link *l = (netchan_link *)arg, *d = dial_with(l->address, &o);
    if (i % 4 == 0) exchange(d->send, l->recv, i);
    hang_up(d);
    wait_peer(l, "drained");
    empty_out(l);
}

static void test_a_thousand_dials(void) {
    netchan_link *l = listen_quietly();
    CHECK(l);
    repeat("dial and hang up", dial_once, l, 1000 / (SANITIZED ? 20 : 1));
    hang_up(l);
    CHECK_INT(alloc_blocks(), 0);
}

/* A port that is taken, a dialler whom nobody answers, and now and then one with another key: more of those would have
 * to wait, as strangers who fail again and again do. */
static void fail_once(int i, void *arg) {
    netchan_link *l = (netchan_link *)arg;
    netchan_options o = options();
    char address[32];
    uint16_t port;
    int holder = hold_port(&port);
    snprintf(address, sizeof address, "127.0.0.1:%d", port);
    o.connect_ms = 1;
    CHECK(!netchan_dial(address, &o));
    CHECK(strlen(netchan_errmsg()) > 20);
    CHECK(!netchan_listen(l->address, &o));
    CHECK(strlen(netchan_errmsg()) > 20);
    close(holder);
    if (i % 15) return;
    o.connect_ms = LONG;
    o.shared_key = "another key, as long as it has to be";
    CHECK(!netchan_dial(l->address, &o));
    CHECK(strlen(netchan_errmsg()) > 20);
    netchan_value v = wait_event(l, "rejected");
    netchan_clear(&v);
}

static void test_failures_leave_nothing(void) {
    netchan_link *l = listen_quietly();
    CHECK(l);
    repeat("fail", fail_once, l, 300 / (SANITIZED ? 4 : 1));
    hang_up(l);
    CHECK_INT(alloc_blocks(), 0);
}

static void test_two_hundred_listeners(void) {
    enum { COUNT = 200 / LESS };
    static pair pairs[COUNT];
    int fds = fds_now(), threads = threads_now();
    for (int i = 0; i < COUNT; i++) pairs[i] = join(1, 1);
    CHECK_INT(threads_now(), threads + !!threads);
    for (int i = 0; i < COUNT; i++) {
        send_int(pairs[i].d->send, i);
        send_int(pairs[COUNT - 1 - i].l->send, i);
    }
    for (int i = 0; i < COUNT; i++) {
        CHECK_INT(recv_int(pairs[i].l->recv), i);
        CHECK_INT(recv_int(pairs[i].d->recv), COUNT - 1 - i);
    }
    for (int i = 0; i < COUNT; i++) { /* in another order than they came */
        pair *p = &pairs[i * 77 % COUNT];
        hang_up(p->d);
        hang_up(p->l);
    }
    wait_for_threads(threads);
    CHECK_INT(fds_now(), fds);
    CHECK_INT(alloc_blocks(), 0);
}

int main(int argc, char **argv) {
    static const test_entry tests[] = {
        TEST(a_child_has_nothing_of_the_parent),
        TEST(a_child_has_its_own),
        TEST(a_child_dials_its_parent),
        TEST(children_of_children),
        TEST(two_hundred_forks_under_load),
        TEST(no_two_keys_are_the_same),
        TEST(a_child_does_not_keep_links_alive),
        TEST(a_child_lets_go_of_the_port),
        TEST(descriptors_end_with_exec),
        TEST(descriptors_end_with_exec_from_the_first_moment),
        TEST(a_socket_is_handed_over),
        TEST(flags_of_other_descriptors),
        TEST(standard_descriptors_that_are_closed),
        TEST(large_descriptors),
        TEST(few_descriptors),
        TEST(no_descriptor_for_who_comes),
        TEST(no_sigpipe),
        TEST(a_storm_of_signals_on_calls),
        TEST(a_storm_of_signals_on_links),
        TEST(signals_are_not_for_our_thread),
        TEST(one_thread),
        TEST(the_surroundings_stay),
        TEST(sentences_belong_to_threads),
        TEST(ten_thousand_listeners),
        TEST(listeners_with_certificates),
        TEST(a_thousand_dials),
        TEST(failures_leave_nothing),
        TEST(two_hundred_listeners),
        TEST_END,
    };
    program = argv[0];
    if (argc == 2 && strcmp(argv[1], "count-fds") == 0) return count_fds();
    if (argc == 3 && strcmp(argv[1], "serve") == 0) return serve(argv[2]);
    return test_main(argc, argv, tests);
}
