/* What Go's src/runtime/chan_test.go checks. Part of conformance.c. */

/* TestChan */
static void fill(const wire *w, size_t capacity) {
    for (size_t i = 0; i < capacity; i++) put(w->tx, (int64_t)i);
}

static void check_empty_blocks(size_t capacity) {
    wire w = wire_make(capacity);
    netchan_case recv = netchan_case_recv(w.rx, NULL);
    task tasks[2];
    for (int i = 0; i < 2; i++) start_recv(&tasks[i], w.rx, patience());
    wait_until_waiting(w.home, 2);
    for (int i = 0; i < 2; i++) must_not(&recv, 1);
    CHECK(!is_done(&tasks[0]) && !is_done(&tasks[1]));
    for (int i = 0; i < 2; i++) put(w.tx, 0);
    for (int i = 0; i < 2; i++) CHECK_INT(end_task(&tasks[i]), NETCHAN_OK);
}

static void check_full_blocks(size_t capacity) {
    wire w = wire_make(capacity);
    netchan_case send = netchan_case_send(w.tx, netchan_int(0));
    task t;
    fill(&w, capacity);
    start_send(&t, w.tx, netchan_int(0), patience());
    test_pause(1);
    must_not(&send, 1);
    CHECK(!is_done(&t));
    take(w.rx);
    CHECK_INT(end_task(&t), NETCHAN_OK);
}

static void check_close_is_last(size_t capacity) {
    wire w = wire_make(capacity);
    fill(&w, capacity);
    CHECK_INT(netchan_close(w.tx), NETCHAN_OK);
    for (size_t i = 0; i < capacity; i++) CHECK_INT(take(w.rx), i);
    for (int i = 0; i < 2; i++) check_closed(w.rx);
}

static void check_close_wakes(size_t capacity) {
    wire w = wire_make(capacity);
    task t;
    start_recv(&t, w.rx, patience());
    wait_until_waiting(w.home, 1);
    CHECK_INT(netchan_close(w.tx), NETCHAN_OK);
    CHECK_INT(end_task(&t), NETCHAN_ECLOSED);
    CHECK(netchan_is_nil(&t.value));
}

static void check_len_and_cap(size_t capacity) {
    wire w = wire_make(capacity);
    CHECK_INT(netchan_len(w.home), 0);
    fill(&w, capacity);
    CHECK_INT(netchan_len(w.home), capacity);
    CHECK_INT(netchan_cap(w.home), capacity);
    CHECK_INT(netchan_cap(w.tx), capacity);
    CHECK_INT(netchan_cap(w.rx), capacity);
}

static void check_order(size_t capacity) {
    job sender = {.n = 100};
    wire w = wire_make(capacity);
    sender.out = w.tx;
    go(&sender, put_numbers);
    for (int i = 0; i < 100; i++) CHECK_INT(take(w.rx), i);
    finish(&sender, 1);
}

enum { SIDES = 4, MOST = 1000 }; /* threads that send, and as many that receive; numbers of each */
static int counts[MOST];         /* atomic */

static void *count_taken(void *arg) {
    job *j = (job *)arg;
    for (int64_t i = 0; i < j->n; i++) {
        int64_t n = take(j->in);
        CHECK(n >= 0 && n < j->n);
        __atomic_add_fetch(&counts[n], 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void check_each_once(size_t capacity, int64_t numbers) {
    wire w = wire_make(capacity);
    job jobs[2 * SIDES];
    memset(counts, 0, sizeof counts);
    for (int i = 0; i < 2 * SIDES; i++) {
        jobs[i] = (job){.in = w.rx, .out = w.tx, .n = numbers};
        go(&jobs[i], i < SIDES ? put_numbers : count_taken);
    }
    finish(jobs, 2 * SIDES);
    for (int64_t n = 0; n < numbers; n++) CHECK_INT(counts[n], SIDES);
}

static void test_chan(void) {
    static const int sizes[MEDIA] = {MOST, 60, 20, 40}, caps[MEDIA] = {20, 5, 3, 3};
    for (size_t capacity = 0; capacity < (size_t)caps[medium]; capacity++) {
        for (int turn = 0; turn < turns(); turn++) {
            check_empty_blocks(capacity);
            check_full_blocks(capacity);
            check_close_is_last(capacity);
            check_close_wakes(capacity);
            check_len_and_cap(capacity);
            wires_free();
        }
        check_order(capacity);
        check_each_once(capacity, pick(sizes));
        wires_free();
    }
}

/* One look at one or two channels, without waiting. */
static void *look_once(void *arg) {
    job *j = (job *)arg;
    netchan_case cases[] = {netchan_case_recv(j->in, NULL), netchan_case_recv(j->more[0], NULL)};
    int i = netchan_select(cases, j->more[0] ? 2 : 1, NETCHAN_NOWAIT);
    j->result = i < 0 ? i : cases[i].result;
    return NULL;
}

/* TestNonblockRecvRace. A value is there from before the look began; meanwhile the channel is closed and the value may
 * be taken. Either way it is ready. */
static void test_nonblock_recv_race(void) {
    static const int sizes[MEDIA] = {2000, 150, 60, 100};
    for (int64_t i = 0; i < pick(sizes); i++) {
        wire w = wire_make(1);
        job looker = {.in = w.rx};
        put(w.tx, 1);
        go(&looker, look_once);
        CHECK_INT(netchan_close(w.tx), NETCHAN_OK);
        int result = netchan_recv(w.rx, NULL, patience());
        finish(&looker, 1);
        if (medium == LOCAL) CHECK(looker.result != NETCHAN_ETIMEDOUT);
        CHECK(result == NETCHAN_OK || result == NETCHAN_ECLOSED);
        CHECK_INT((result == NETCHAN_OK) + (looker.result == NETCHAN_OK), 1);
        check_closed(w.rx);
        wires_free();
    }
}

/* TestNonblockSelectRace and 2. At each moment of the look one of two channels is ready: c1 is until c2 is. */
static void test_nonblock_select_race(void) {
    static const int sizes[MEDIA] = {5000, 150, 60, 100};
    bool closes = form();
    for (int64_t i = 0; i < pick(sizes); i++) {
        wire c1 = wire_make(1), c2 = wire_make(closes ? 0 : 1);
        job looker = {.in = c1.rx, .more = {c2.rx}};
        bool here = c1.rx == c1.home && c2.rx == c2.home; /* nobody else need be asked */
        put(c1.tx, 1);
        go(&looker, look_once);
        if (closes) CHECK_INT(netchan_close(c2.tx), NETCHAN_OK);
        else put(c2.tx, 1);
        int taken = netchan_recv(c1.rx, NULL, NETCHAN_NOWAIT) == NETCHAN_OK;
        finish(&looker, 1);
        if (medium == LOCAL || (here && !closes)) CHECK(looker.result != NETCHAN_ETIMEDOUT);
        if (looker.result == NETCHAN_OK) taken++;
        netchan_case rest[] = {netchan_case_recv(c1.rx, NULL), netchan_case_recv(closes ? NULL : c2.rx, NULL)};
        for (; taken < (closes ? 1 : 2); taken++) choose(rest, 2); /* all that was sent is somewhere, once */
        must_not(rest, 2);
        if (closes) check_closed(c2.rx);
        wires_free();
    }
}

/* TestSelfSelect. Sends its number, which is in result, or receives, over one channel; in each order of the cases. */
static void *send_or_receive(void *arg) {
    job *j = (job *)arg;
    bool rendezvous = netchan_cap(j->in) == 0;
    for (int64_t i = 0; i < j->n; i++) {
        netchan_value v = netchan_nil();
        netchan_case send = netchan_case_send(j->out, netchan_int(j->result)), recv = netchan_case_recv(j->in, &v);
        bool send_first = j->result == 0 || i % 2 == 0;
        netchan_case cases[] = {send_first ? send : recv, send_first ? recv : send};
        int happened = choose(cases, 2);
        if (rendezvous && !cases[happened].is_send) CHECK_INT(netchan_as_int(&v, -1), 1 - j->result);
    }
    return NULL;
}

static void test_self_select(void) {
    static const int sizes[MEDIA] = {5000, 150, 25, 50};
    for (int i = 0; i < 2 * turns(); i++) {
        wire w = wire_make(i % 2 ? 10 : 0);
        job jobs[2];
        for (int p = 0; p < 2; p++) {
            jobs[p] = (job){.in = w.rx, .out = w.tx, .n = pick(sizes), .result = p};
            go(&jobs[p], send_or_receive);
        }
        finish(jobs, 2);
        wires_free();
    }
}

/* TestSelectStress. So many values over each of four channels, in the order that comes. */
static void *select_four(void *arg) {
    job *j = (job *)arg;
    bool sends = j->out != NULL;
    int64_t done[4] = {0, 0, 0, 0};
    for (int64_t i = 0; i < 4 * j->n; i++) {
        netchan_case cases[4];
        for (int k = 0; k < 4; k++) {
            int at = sends ? 3 - k : k;
            netchan *ch = done[at] < j->n ? j->more[at] : NULL;
            cases[k] = sends ? netchan_case_send(ch, netchan_int(0)) : netchan_case_recv(ch, NULL);
        }
        int happened = choose(cases, 4);
        done[sends ? 3 - happened : happened]++;
    }
    return NULL;
}

static void test_select_stress(void) {
    static const int sizes[MEDIA] = {10000, 400, 80, 200};
    static const size_t caps[4] = {0, 0, 2, 3};
    wire w[4];
    job jobs[10] = {{.n = 0}};
    for (int k = 0; k < 4; k++) {
        w[k] = wire_make(caps[k]);
        jobs[k].out = jobs[8].out = jobs[8].more[k] = w[k].tx;
        jobs[4 + k].in = jobs[9].in = jobs[9].more[k] = w[k].rx;
    }
    for (int i = 0; i < 10; i++) {
        jobs[i].n = pick(sizes);
        go(&jobs[i], i < 4 ? put_numbers : i < 8 ? take_numbers : select_four);
    }
    finish(jobs, 10);
    for (int k = 0; k < 4; k++) wait_for_len(w[k].home, 0); /* its home may hear of the last value later */
    wires_free();
}

/* TestSelectFairness. Hands on what comes from the first two of four channels, the others are never ready. */
static void *select_and_hand_on(void *arg) {
    job *j = (job *)arg;
    for (;;) {
        netchan_value v = netchan_nil();
        netchan_case cases[4];
        for (int k = 0; k < 4; k++) cases[k] = netchan_case_recv(j->more[3 - k], &v);
        CHECK(choose(cases, 4) >= 2);
        netchan_case on[] = {netchan_case_send(j->out, v), netchan_case_recv(j->in, NULL)};
        if (choose(on, 2) == 1) return NULL;
    }
}

/* Returns how many of the trials gave a value of the first channel. */
static int64_t count_first(wire *w, int64_t trials) {
    netchan *out = netchan_make(0), *done = netchan_make(0);
    job selector = {.in = done, .out = out, .more = {w[0].rx, w[1].rx, w[2].rx, w[3].rx}};
    int64_t first = 0;
    for (int64_t i = 0; i <= trials; i++) {
        put(w[0].tx, 1);
        put(w[1].tx, 0);
    }
    go(&selector, select_and_hand_on);
    for (int64_t i = 0; i < trials; i++) first += take(out);
    put(done, 0);
    finish(&selector, 1);
    netchan_free(out);
    netchan_free(done);
    return first;
}

static void test_select_fairness(void) {
    static const int sizes[MEDIA] = {10000, 800, 200, 400};
    int64_t trials = pick(sizes);
    for (int i = 0; i < (medium == LOCAL ? 1 : 6); i++) {
        int ends = i / 2; /* of the two that are ready */
        wire w[4];
        for (int k = 0; k < 4; k++) w[k] = wire_make_as(k < 2 ? (size_t)trials + 1 : 0, i % 2, k % 2 < ends ? RX : TX);
        int64_t first = count_first(w, trials), off = 2 * first - trials;
        bool even = off * off <= 25 * trials; /* five standard deviations */
        bool served = medium != TLS || first > trials / 40; /* an end whose link is down misses its turn */
        if (!(ends == 1 ? served : even))
            test_fail(__FILE__, __LINE__, "%lld of %lld, %d ends", (long long)first, (long long)trials, ends);
        wires_free();
    }
}

/* TestPseudoRandomSend */
static void *send_one_or_zero(void *arg) {
    job *j = (job *)arg;
    for (int64_t i = 0; i < j->n; i++) {
        netchan_case cases[] = {netchan_case_send(j->out, netchan_int(1)), netchan_case_send(j->out, netchan_int(0))};
        choose(cases, 2);
    }
    return NULL;
}

static void test_pseudo_random_send(void) {
    static const int sizes[MEDIA] = {100, 100, 50, 50};
    for (int i = 0; i < 2 * turns(); i++) {
        int64_t n = sizes[medium], ones = 0;
        wire w = wire_make(i % 2 ? (size_t)n : 0);
        job sender = {.out = w.tx, .n = n};
        go(&sender, send_one_or_zero);
        for (int64_t k = 0; k < n; k++) ones += take(w.rx);
        finish(&sender, 1);
        if (ones <= n / 10 || n - ones <= n / 10)
            test_fail(__FILE__, __LINE__, "%lld ones of %lld", (long long)ones, (long long)n);
        wires_free();
    }
}

/* TestMultiConsumer */
enum { WORKERS = 23 };
static const int sizes_of_work[10] = {2, 3, 7, 11, 13, 17, 19, 23, 27, 31};

static void *work(void *arg) {
    job *j = (job *)arg;
    for (int64_t v; take_next(j->in, &v); put(j->out, v))
        if (v == j->n) sched_yield(); /* they do not stay in step */
    return NULL;
}

/* The first of an array of jobs; the others work. */
static void *feed(void *arg) {
    job *j = (job *)arg;
    for (int64_t i = 0; i < j->n; i++) put(j->out, sizes_of_work[i % 10]);
    CHECK_INT(netchan_close(j->out), NETCHAN_OK);
    finish(j + 1, WORKERS);
    CHECK_INT(netchan_close(j->sync), NETCHAN_OK);
    return NULL;
}

static void test_multi_consumer(void) {
    static const int sizes[MEDIA] = {20000, 3000, 300, 600};
    for (int turn = 0; turn < (medium == LOCAL ? 1 : 2); turn++) {
        wire q = wire_make(WORKERS * 3), r = wire_make(WORKERS * 3);
        job jobs[1 + WORKERS] = {{.out = q.tx, .sync = r.tx, .n = pick(sizes)}};
        int64_t n, count = 0, sum = 0;
        for (int i = 1; i <= WORKERS; i++) {
            jobs[i] = (job){.in = q.rx, .out = r.tx, .n = sizes_of_work[i % 10]};
            go(&jobs[i], work);
        }
        go(&jobs[0], feed);
        for (; take_next(r.rx, &n); count++) sum += n;
        for (int64_t i = 0; i < jobs[0].n; i++) sum -= sizes_of_work[i % 10];
        CHECK_INT(count, jobs[0].n);
        CHECK_INT(sum, 0);
        finish(jobs, 1);
        wires_free();
    }
}

/* TestSelectDuplicateChannel */
static void *select_same_twice(void *arg) {
    job *j = (job *)arg;
    netchan_case same = netchan_case_recv(j->in, NULL), cases[] = {same, same, netchan_case_recv(j->more[0], NULL)};
    CHECK_INT(choose(cases, 3), 2);
    put(j->out, 9);
    return NULL;
}

static void test_select_duplicate_channel(void) {
    for (int turn = 0; turn < turns(); turn++) {
        wire c = wire_make(0), d = wire_make(0), e = wire_make(0);
        job jobs[2] = {{.in = c.rx, .more = {d.rx}, .out = e.tx}, {.in = c.rx, .n = 1}};
        go(&jobs[0], select_same_twice);
        wait_until_waiting(c.home, 2);
        go(&jobs[1], take_numbers);
        wait_until_waiting(c.home, 3);
        put(d.tx, 7); /* the select leaves the queue of c, twice; the receive stays */
        CHECK_INT(take(e.rx), 9);
        put(c.tx, 8);
        finish(jobs, 2);
        CHECK_INT(jobs[1].result, 8);
        wires_free();
    }
}
