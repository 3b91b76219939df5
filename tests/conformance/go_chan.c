/* What Go's test/chan/ and test/closedchan.go check. Part of conformance.c. */

/* fifo.go. One of a row of threads: it has its turn when the one before has had its own. */
static void *wait_and_take(void *arg) {
    job *j = (job *)arg;
    take(j->in);
    CHECK_INT(take(j->more[0]), j->n);
    put(j->out, 1);
    return NULL;
}

static void test_fifo(void) {
    enum { N = 10 };
    for (int turn = 0; turn < turns(); turn++) {
        wire buffered = wire_make(N), plain = wire_make(0), gates[N + 1];
        job jobs[N];
        for (int i = 0; i < N; i++) put(buffered.tx, i);
        for (int i = 0; i < N; i++) CHECK_INT(take(buffered.rx), i);
        for (int i = 0; i <= N; i++) gates[i] = wire_make(0);
        for (int i = 0; i < N; i++) {
            jobs[i] = (job){.in = gates[i].rx, .out = gates[i + 1].tx, .more = {plain.rx}, .n = i};
            go(&jobs[i], wait_and_take);
        }
        put(gates[0].tx, 0);
        for (int i = 0; i < N; i++) put(plain.tx, i);
        take(gates[N].rx);
        finish(jobs, N);
        wires_free();
    }
}

/* nonblock.go, and zerosize.go below. */
static void check_same(const netchan_value *got, const netchan_value *right) {
    uint8_t a[64], b[64];
    size_t size, right_size;
    CHECK_INT(netchan_encode(got, a, sizeof a, &size), NETCHAN_OK);
    CHECK_INT(netchan_encode(right, b, sizeof b, &right_size), NETCHAN_OK);
    CHECK(got->type == right->type && size == right_size && memcmp(a, b, size) == 0);
}

/* In a thread: the value is received, or sent; then word of it. */
static void *pass_value(void *arg) {
    job *j = (job *)arg;
    netchan_value v = netchan_nil();
    if (j->out) CHECK_INT(netchan_send(j->out, j->value, patience()), NETCHAN_OK);
    else CHECK_INT(netchan_recv(j->in, &v, patience()), NETCHAN_OK);
    if (j->in) check_same(&v, &j->value);
    netchan_clear(&v);
    put(j->sync, 1);
    return NULL;
}

/* Who does not wait finds nothing; then a receiver, then a sender. */
static void meet_without_waiting(size_t capacity, netchan_value there, netchan_value back) {
    wire w = wire_make(capacity), sync = wire_make(0);
    netchan_value v;
    netchan_case send = netchan_case_send(w.tx, there), recv = netchan_case_recv(w.rx, &v);
    job jobs[] = {{.in = w.rx, .sync = sync.tx, .value = there}, {.out = w.tx, .sync = sync.tx, .value = back}};
    must_not(&recv, 1);
    go(&jobs[0], pass_value);
    CHECK_INT(eventually(&send, 1), 0);
    CHECK_INT(send.result, NETCHAN_OK);
    take(sync.rx);
    go(&jobs[1], pass_value);
    if (capacity) take(sync.rx);
    CHECK_INT(capacity ? must(&recv, 1) : eventually(&recv, 1), 0);
    CHECK_INT(recv.result, NETCHAN_OK);
    check_same(&v, &back);
    netchan_clear(&v);
    if (!capacity) take(sync.rx);
    must_not(&recv, 1);
    finish(jobs, 2);
    wires_free();
}

static void test_nonblock(void) {
    for (int turn = 0; turn < turns(); turn++) {
        for (size_t capacity = 0; capacity < 2; capacity++) {
            meet_without_waiting(capacity, netchan_int(123), netchan_int(234));
            meet_without_waiting(capacity, netchan_int(INT64_MIN), netchan_uint(UINT64_MAX));
            meet_without_waiting(capacity, netchan_bool(true), netchan_bool(false));
            meet_without_waiting(capacity, netchan_str("hello"), netchan_str("hello again"));
        }
    }
}

/* select.go. A bit to each of the two as long as one of them has room; returns how many. Made, atomic in no way: how
 * often values were made for both. */
static int send_bits(netchan *a, netchan *b, int room, int *shift, int *made) {
    netchan *channels[2] = {a, b};
    for (int sent = 0;; sent++, ++*shift) {
        netchan_case cases[2];
        for (int i = 0; i < 2; i++) cases[i] = netchan_case_send(channels[i], netchan_int((int64_t)1 << *shift));
        ++*made;
        int i = sent < room ? must(cases, 2) : netchan_select(cases, 2, NETCHAN_NOWAIT);
        if (i < 0) return sent;
        CHECK_INT(cases[i].result, NETCHAN_OK);
        channels[i] = NULL;
    }
}

static void test_select(void) {
    for (int turn = 0; turn < turns(); turn++) {
        wire a = wire_make(1), b = wire_make(1);
        int shift = 0, made = 0;
        CHECK_INT(send_bits(a.tx, b.tx, 2, &shift, &made), 2);
        CHECK_INT(must_take(a.rx) | must_take(b.rx), 3);
        CHECK_INT(send_bits(a.tx, NULL, 1, &shift, &made), 1);
        CHECK_INT(must_take(a.rx), 4);
        CHECK_INT(made, 5);
        wires_free();
    }
}

/* select2.go */
static void select_many(const wire *w, const wire *dummy, int64_t count) {
    job sender = {.out = w->tx, .n = count};
    go(&sender, put_numbers);
    for (int64_t i = 0; i < count; i++) {
        netchan_value v;
        netchan_case cases[] = {netchan_case_recv(w->rx, &v), netchan_case_recv(dummy->rx, NULL)};
        CHECK_INT(choose(cases, 2), 0);
        CHECK_INT(netchan_as_int(&v, -1), i);
    }
    finish(&sender, 1);
}

static void test_select2(void) {
    static const int sizes[MEDIA] = {20000, 400, 40, 80};
    enum { SLACK = 16 };
    for (int turn = 0; turn < turns(); turn++) {
        wire w = wire_make(0), dummy = wire_make(0);
        select_many(&w, &dummy, pick(sizes));
        long before = blocks_in_use();
        select_many(&w, &dummy, pick(sizes));
        for (long long end = test_ms() + LONG; blocks_in_use() > before + SLACK; sched_yield())
            CHECK(test_ms() < end); /* what is withdrawn goes when the other side hears of it */
        wires_free();
    }
}

/* select3.go: none of these ever happens. */
static void check_blocks(void) {
    wire w[3] = {wire_make(0), wire_make(0), wire_make(0)};
    netchan_case send = netchan_case_send(NULL, netchan_int(7)), recv = netchan_case_recv(NULL, NULL),
                 both[] = {send, recv}, idle = netchan_case_recv(w[1].rx, NULL),
                 itself[] = {netchan_case_send(w[2].tx, netchan_int(1)), netchan_case_recv(w[2].rx, NULL)};
    task tasks[9];
    start_send(&tasks[0], NULL, netchan_int(7), SHORT);
    start_recv(&tasks[1], NULL, SHORT);
    start_recv(&tasks[2], w[0].rx, SHORT);
    start_select(&tasks[3], both, 0, SHORT);
    start_select(&tasks[4], &send, 1, SHORT);
    start_select(&tasks[5], &recv, 1, SHORT);
    start_select(&tasks[6], both, 2, SHORT);
    start_select(&tasks[7], &idle, 1, SHORT);
    start_select(&tasks[8], itself, 2, SHORT);
    for (int i = 0; i < 9; i++) CHECK_INT(end_task(&tasks[i]), NETCHAN_ETIMEDOUT);
    must_not(&send, 1);
    must_not(&recv, 1);
    must_not(both, 2);
    must_not(both, 0);
    wires_free();
}

/* By a select without waiting, or by operations that may wait and need not. */
static void check_does_not_block(bool by_select) {
    wire w = wire_make(1), closed = wire_make(0);
    int timeout_ms = by_select ? NETCHAN_NOWAIT : LONG;
    if (by_select) must_put(w.tx, 7);
    else put(w.tx, 7);
    CHECK_INT(by_select ? must_take(w.rx) : take(w.rx), 7);
    CHECK_INT(netchan_close(closed.tx), NETCHAN_OK);
    check_closed(closed.rx);
    for (int i = 0; i < 20; i++) {
        netchan_value v = netchan_int(1);
        netchan_case c = i % 2 ? netchan_case_recv(closed.rx, &v) : netchan_case_send(closed.tx, v);
        CHECK_INT(netchan_select(&c, 1, timeout_ms), 0);
        CHECK_INT(c.result, NETCHAN_ECLOSED);
        if (i % 2) CHECK(netchan_is_nil(&v));
    }
    wires_free();
}

static void test_select3(void) {
    for (int turn = 0; turn < turns(); turn++) {
        check_blocks();
        check_does_not_block(false);
        check_does_not_block(true);
    }
}

/* select6.go. It waits for two channels, gets a value of the second, and then waits for the first alone. */
static void *take_either(void *arg) {
    job *j = (job *)arg;
    netchan_case cases[] = {netchan_case_recv(j->in, NULL), netchan_case_recv(j->more[0], NULL)};
    CHECK_INT(choose(cases, 2), 1);
    put(j->out, 1);
    take(j->in);
    return NULL;
}

static void test_select6(void) {
    for (int turn = 0; turn < turns(); turn++) {
        wire c1 = wire_make(0), c2 = wire_make(0), c3 = wire_make(0);
        job jobs[3] = {{.in = c1.rx, .n = 1}, {.in = c1.rx, .more = {c2.rx}, .out = c3.tx}, {.out = c2.tx, .n = 1}};
        go(&jobs[0], take_numbers);
        wait_until_waiting(c1.home, 1);
        go(&jobs[1], take_either); /* the last in the queue, and the one that leaves it */
        wait_until_waiting(c1.home, 2);
        go(&jobs[2], put_numbers);
        take(c3.rx);
        put(c1.tx, 1);
        put(c1.tx, 1);
        finish(jobs, 3);
        wires_free();
    }
}

/* One operation: by itself, by a select, or by a select with a case that never happens. */
static int operate(int64_t how, netchan_case c, netchan_value *v, int timeout_ms) {
    netchan *never = netchan_make(0);
    netchan_case cases[2] = {c, c.is_send ? netchan_case_send(never, netchan_nil()) : netchan_case_recv(never, NULL)};
    int result;
    if (!c.is_send) cases[0].into = v;
    if (how == 0) result = c.is_send ? netchan_send(c.ch, c.value, timeout_ms) : netchan_recv(c.ch, v, timeout_ms);
    else result = netchan_select(cases, (size_t)how, timeout_ms);
    if (how && result >= 0) result = cases[0].result;
    netchan_free(never);
    return result;
}

/* select7.go */
static void *drop_one(void *arg) {
    job *j = (job *)arg;
    CHECK_INT(operate(j->n, netchan_case_recv(j->in, NULL), NULL, patience()), NETCHAN_OK);
    return NULL;
}

static void test_select7(void) {
    for (int turn = 0; turn < turns(); turn++) {
        for (int how = 0; how < 9; how++) {
            wire w = wire_make(0);
            job receiver = {.in = w.rx, .n = how / 3};
            go(&receiver, drop_one);
            wait_until_waiting(w.home, 1);
            CHECK_INT(operate(how % 3, netchan_case_send(w.tx, netchan_int(1)), NULL, patience()), NETCHAN_OK);
            finish(&receiver, 1);
            wires_free();
        }
    }
}

/* doubleselect.go */
static void *send_to_any(void *arg) {
    job *j = (job *)arg;
    for (int64_t i = 0; i < j->n; i++) {
        netchan_case cases[4];
        for (int k = 0; k < 4; k++) cases[k] = netchan_case_send(j->more[k], netchan_int(i));
        choose(cases, 4);
    }
    for (int k = 0; k < 4; k++) CHECK_INT(netchan_close(j->more[k]), NETCHAN_OK);
    return NULL;
}

static void *forward(void *arg) {
    job *j = (job *)arg;
    for (int64_t n; take_next(j->in, &n);) put(j->out, n);
    put(j->sync, 1);
    return NULL;
}

static void *close_after_four(void *arg) {
    job *j = (job *)arg;
    for (int i = 0; i < 4; i++) take(j->in);
    CHECK_INT(netchan_close(j->out), NETCHAN_OK);
    return NULL;
}

static void test_doubleselect(void) {
    static const int sizes[MEDIA] = {20000, 2000, 250, 500};
    static uint8_t seen[20000];
    wire mux = wire_make(0), done = wire_make(0);
    job jobs[6] = {{.n = pick(sizes)}, {.in = done.rx, .out = mux.tx}};
    int64_t count = 0;
    for (int i = 0; i < 4; i++) {
        wire w = wire_make(0);
        jobs[0].more[i] = w.tx;
        jobs[2 + i] = (job){.in = w.rx, .out = mux.tx, .sync = done.tx};
    }
    for (int i = 0; i < 6; i++) go(&jobs[i], i == 0 ? send_to_any : i == 1 ? close_after_four : forward);
    for (int64_t n; take_next(mux.rx, &n); count++) {
        CHECK(n >= 0 && n < jobs[0].n);
        CHECK_INT(seen[n]++, 0);
    }
    CHECK_INT(count, jobs[0].n);
    finish(jobs, 6);
    wires_free();
}

/* sieve1.go */
enum { PRIMES = 25 };

static void *generate(void *arg) {
    job *j = (job *)arg;
    int result = NETCHAN_OK;
    for (int64_t i = 2; result == NETCHAN_OK; i++) result = netchan_send(j->out, netchan_int(i), patience());
    CHECK_INT(result, NETCHAN_ECLOSED);
    return NULL;
}

static void *filter(void *arg) {
    job *j = (job *)arg;
    for (int64_t i; take_next(j->in, &i);)
        if (i % j->n) put(j->out, i);
    CHECK_INT(netchan_close(j->out), NETCHAN_OK);
    return NULL;
}

/* Each prime makes a channel and a filter behind the last one. After the last prime, what is in the row flows off. */
static void *sieve(void *arg) {
    job *j = (job *)arg, jobs[1 + PRIMES];
    wire first = wire_make(0), last = first;
    jobs[0] = (job){.out = first.tx};
    go(&jobs[0], generate);
    for (int i = 1; i <= PRIMES; i++) {
        wire next = wire_make(0);
        jobs[i] = (job){.in = last.rx, .out = next.tx, .n = take(last.rx)};
        put(j->out, jobs[i].n);
        go(&jobs[i], filter);
        last = next;
    }
    CHECK_INT(netchan_close(first.home), NETCHAN_OK);
    for (int64_t n; take_next(last.rx, &n);) continue;
    finish(jobs, 1 + PRIMES);
    return NULL;
}

static void test_sieve1(void) {
    static const int primes[PRIMES] = {2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73,
        79, 83, 89, 97};
    wire w = wire_make(0);
    job j = {.out = w.tx};
    go(&j, sieve);
    for (int i = 0; i < PRIMES; i++) CHECK_INT(take(w.rx), primes[i]);
    finish(&j, 1);
    wires_free();
}

/* goroutines.go */
static void *pass_on(void *arg) {
    job *j = (job *)arg;
    put(j->out, take(j->in));
    return NULL;
}

static void test_goroutines(void) {
    enum { STAGES = 1000 / LESS };
    static job jobs[STAGES];
    wire first = wire_make(0), last = first;
    for (int i = 0; i < STAGES; i++) {
        wire next = wire_make(0);
        jobs[i] = (job){.in = next.rx, .out = last.tx};
        go(&jobs[i], pass_on);
        last = next;
    }
    put(last.tx, 1);
    CHECK_INT(take(first.rx), 1);
    finish(jobs, STAGES);
    wires_free();
}

/* zerosize.go */
static void test_zerosize(void) {
    const netchan_value nothing[] = {netchan_nil(), netchan_str(""), netchan_bytes(NULL, 0), netchan_array(NULL, 0),
        netchan_map(NULL, 0), netchan_i32s(NULL, 0)};
    enum { KINDS = sizeof nothing / sizeof *nothing };
    for (int turn = 0; turn < turns(); turn++) {
        for (size_t i = 0; i < 2 * KINDS; i++) {
            wire w = wire_make(i % 2), sync = wire_make(1);
            job sender = {.out = w.tx, .sync = sync.tx, .value = nothing[i / 2]};
            netchan_value v;
            go(&sender, pass_value);
            CHECK_INT(netchan_recv(w.rx, &v, patience()), NETCHAN_OK);
            check_same(&v, &sender.value);
            netchan_clear(&v);
            finish(&sender, 1);
            wires_free();
        }
    }
}

/* closedchan.go */
static void check_is_closed(const wire *w, int how) {
    netchan_case recv = netchan_case_recv(w->rx, NULL);
    for (int i = 0; i < 6; i++) { /* when the first receive has waited, its side knows */
        netchan_value v = netchan_int(9);
        CHECK_INT(operate(how, recv, &v, i % 2 ? NETCHAN_NOWAIT : patience()), NETCHAN_ECLOSED);
        CHECK(netchan_is_nil(&v));
    }
    for (int i = 0; i < 2; i++) {
        netchan_case send = netchan_case_send(w->tx, netchan_int(1));
        CHECK_INT(operate(how, send, NULL, i ? NETCHAN_NOWAIT : patience()), NETCHAN_ECLOSED);
        CHECK_INT(operate(how, recv, NULL, patience()), NETCHAN_ECLOSED); /* nothing came of it */
    }
    CHECK_INT(netchan_close(w->tx), NETCHAN_ECLOSED);
}

static void test_closedchan(void) {
    CHECK_INT(netchan_close(NULL), NETCHAN_EINVAL);
    for (int i = 0; i < 3 * turns(); i++) {
        for (int values = 0; values < 3; values++) { /* none; one, for which a receive waits; one, by a try */
            wire w = wire_make(values ? 2 : 0);
            netchan_value v = netchan_int(1);
            if (values) put(w.tx, 1);
            CHECK_INT(netchan_close(w.tx), NETCHAN_OK);
            if (values == 1) CHECK_INT(operate(i % 3, netchan_case_recv(w.rx, NULL), &v, patience()), NETCHAN_OK);
            if (values == 2) v = netchan_int(must_take(w.rx));
            CHECK_INT(netchan_as_int(&v, 0), 1);
            check_is_closed(&w, i % 3);
            wires_free();
        }
    }
}
