/* Operations that block, each in a thread of its own; include it after test.h. */
#ifndef NETCHAN_TEST_TASK_H
#define NETCHAN_TEST_TASK_H

/* One operation in a thread of its own. */
typedef struct task {
    netchan *ch;
    netchan_value value;
    netchan_case *cases; /* a select when not NULL */
    size_t count;
    int timeout_ms, result;
    bool is_send, done;
    netchan_case one; /* what run_task() may make of a send or receive */
    pthread_t thread;
} task;

/* Does what the task says, and sets done (atomic) at last. Each test program has its own. */
static void *run_task(void *arg);

static inline void start_send(task *t, netchan *ch, netchan_value v, int timeout_ms) {
    memset(t, 0, sizeof *t);
    t->ch = ch;
    t->value = v;
    t->is_send = true;
    t->timeout_ms = timeout_ms;
    t->thread = test_start(run_task, t);
}

static inline void start_recv(task *t, netchan *ch, int timeout_ms) {
    memset(t, 0, sizeof *t);
    t->ch = ch;
    t->timeout_ms = timeout_ms;
    t->thread = test_start(run_task, t);
}

static inline void start_select(task *t, netchan_case *cases, size_t count, int timeout_ms) {
    memset(t, 0, sizeof *t);
    t->cases = cases;
    t->count = count;
    t->timeout_ms = timeout_ms;
    t->thread = test_start(run_task, t);
}

static inline bool is_done(task *t) {
    return __atomic_load_n(&t->done, __ATOMIC_ACQUIRE);
}

static inline int end_task(task *t) {
    test_join(t->thread);
    return t->result;
}

#endif
