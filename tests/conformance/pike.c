/* What the tests of Go's first netchan check (it was netchan, then exp/netchan and old/netchan): channels that one side
 * of a link exports by name and the other side imports. Part of conformance.c. */

enum { COUNT = 10, CLOSE_COUNT = 5, BASE = 23, FLOW_COUNT = 60, FLOW_ROOM = 20 };
enum { MOMENT = 5 };                        /* ms: time for something wrong to happen, again and again */
enum { FROM_EXPORTER = 1, TO_THE_END = 2 }; /* forms of a test */

/* Each test is done with an exporter that dialled, and with one that listens, and again where links break. */
static int rounds(void) {
    static const int counts_of[MEDIA] = {1, 2, 8, 12};
    return counts_of[medium];
}

/* A channel that one side made and has exported, and what the other side got by its name. In one process there are no
 * names: both have the channel. */
typedef struct named {
    bond *b;
    int exporter;
    const char *name;
    netchan *ch, *end;
    enum netchan_type kind; /* of the end */
} named;

static named export_over(size_t link, int exporter, const char *name, bool from_exporter, size_t capacity) {
    named x = {NULL, exporter, name, netchan_make(capacity), NULL, from_exporter ? NETCHAN_RECEIVER : NETCHAN_SENDER};
    CHECK(x.ch);
    if (medium == LOCAL) return x;
    x.b = bond_at(link);
    CHECK_INT(netchan_export(x.b->side[exporter], name, x.ch, x.kind), NETCHAN_OK);
    return x;
}

static int import_in(const named *x, const char *name, enum netchan_type kind, int timeout_ms, netchan **end) {
    return netchan_import(x->b->side[!x->exporter], name, kind, end, timeout_ms);
}

/* Returns the end. */
static netchan *import_named(named *x) {
    if (!x->b) return x->end = netchan_retain(x->ch);
    CHECK_INT(import_in(x, x->name, x->kind, LONG, &x->end), NETCHAN_OK);
    CHECK(x->end && x->end != x->ch);
    return x->end;
}

static int unexport(const named *x) {
    return x->b ? netchan_unexport(x->b->side[x->exporter], x->name) : NETCHAN_OK;
}

static netchan *tx_of(const named *x) {
    return x->kind == NETCHAN_SENDER ? x->end : x->ch;
}

static netchan *rx_of(const named *x) {
    return x->kind == NETCHAN_SENDER ? x->ch : x->end;
}

static void forget(named *x) {
    CHECK_INT(unexport(x), NETCHAN_OK);
    netchan_free(x->ch);
    netchan_free(x->end);
}

static void take_in_order(netchan *rx, int count) {
    for (int i = 0; i < count; i++) CHECK_INT(take(rx), BASE + i);
}

/* The exporter may have begun before there is an importer. */
static void test_pass_values(void) {
    bool ends = form() & TO_THE_END, from_exporter = form() & FROM_EXPORTER;
    int count = ends ? CLOSE_COUNT : COUNT;
    for (int round = 0; round < rounds(); round++) {
        for (int early = 0; early <= from_exporter; early++) {
            named x = export_over(0, round % 2, "exported", from_exporter, 0);
            job sender = {.out = x.ch, .n = count, .first = BASE, .closes = true};
            if (early) go(&sender, put_numbers);
            if (early) wait_until_waiting(x.ch, 1);
            import_named(&x);
            sender.out = tx_of(&x);
            if (!early) go(&sender, put_numbers);
            take_in_order(rx_of(&x), count);
            if (ends) check_closed(rx_of(&x));
            finish(&sender, 1);
            forget(&x);
        }
    }
}

static void test_error_for_illegal_channel(void) {
    for (int round = 0; round < rounds(); round++) {
        named x = export_over(0, round % 2, "aChannel", true, 1);
        netchan *other = NULL;
        put(x.ch, 1234);
        CHECK_INT(netchan_close(x.ch), NETCHAN_OK);
        CHECK_INT(netchan_export(x.b->side[round % 2], "aChannel", x.ch, NETCHAN_RECEIVER), NETCHAN_EINVAL);
        CHECK_INT(import_in(&x, "notAChannel", NETCHAN_RECEIVER, NETCHAN_NOWAIT, &other), NETCHAN_ETIMEDOUT);
        CHECK_INT(import_in(&x, "notAChannel", NETCHAN_RECEIVER, MOMENT, &other), NETCHAN_ETIMEDOUT);
        CHECK_INT(import_in(&x, "aChannel", NETCHAN_SENDER, LONG, &other), NETCHAN_ETYPE);
        CHECK_INT(netchan_unexport(x.b->side[round % 2], "notAChannel"), NETCHAN_EINVAL);
        CHECK(!other);
        import_named(&x);
        CHECK_INT(take(x.end), 1234);
        check_closed(x.end);
        forget(&x);
    }
}

static void test_export_drain(void) {
    for (int round = 0; round < rounds(); round++) {
        named x = export_over(0, round % 2, "exportedSend", true, CLOSE_COUNT);
        job sender = {.out = x.ch, .n = CLOSE_COUNT, .first = BASE, .closes = true};
        go(&sender, put_numbers);
        finish(&sender, 1); /* nobody was needed to take them */
        job receiver = {.in = import_named(&x), .n = CLOSE_COUNT};
        go(&receiver, take_numbers);
        wait_for_len(x.ch, 0);
        finish(&receiver, 1); /* all of them were under way to it */
        check_closed(x.end);
        forget(&x);
    }
}

/* Over a link of its own: the importer hangs up. */
static void test_import_drain(void) {
    for (int round = 0; round < rounds() && round < BONDS; round++) {
        named x = export_over((size_t)round, round % 2, "exportedRecv", false, CLOSE_COUNT);
        job sender = {.out = import_named(&x), .n = CLOSE_COUNT, .first = BASE, .closes = true};
        go(&sender, put_numbers);
        finish(&sender, 1);
        netchan_free(x.end);
        x.end = NULL;
        if (x.b) disturb(x.b);
        if (x.b) bond_hang_up(x.b, !x.exporter);
        take_in_order(x.ch, CLOSE_COUNT);
        check_closed(x.ch);
        forget(&x);
    }
}

static void test_export_sync(void) {
    for (int round = 0; round < rounds(); round++) {
        named x = export_over(0, round % 2, "exportedSend", true, 0);
        netchan *sync = netchan_make(0);
        job receiver = {.in = import_named(&x), .sync = sync, .n = CLOSE_COUNT};
        job teller = {.out = sync, .n = CLOSE_COUNT};
        go(&receiver, take_numbers);
        CHECK_INT(netchan_send(x.ch, netchan_int(BASE), MOMENT), NETCHAN_ETIMEDOUT);
        go(&teller, put_numbers);
        for (int i = 0; i < CLOSE_COUNT; i++) {
            put(x.ch, BASE + i);
            CHECK(done_by(&receiver) > i);
        }
        finish(&receiver, 1);
        finish(&teller, 1);
        netchan_free(sync);
        forget(&x);
    }
}

static void pass_one(const named *x) {
    job sender = {.out = tx_of(x), .n = 1, .first = 1234};
    go(&sender, put_numbers);
    CHECK_INT(take(rx_of(x)), 1234);
    finish(&sender, 1);
}

/* Who imported the name learns it, whether he waits just then or comes later. */
static void test_export_hangup(void) {
    for (int turn = 0; turn < 2 * rounds(); turn++) {
        named x = export_over(0, turn / 2 % 2, "exported", turn % 2, 0);
        netchan *other = NULL;
        task t;
        import_named(&x);
        pass_one(&x);
        if (turn % 2) start_recv(&t, x.end, patience());
        else start_send(&t, x.end, netchan_int(1), patience());
        wait_until_waiting(x.ch, 1);
        CHECK_INT(unexport(&x), NETCHAN_OK);
        CHECK_INT(end_task(&t), NETCHAN_ELOST);
        if (turn % 2) CHECK_INT(netchan_recv(x.end, NULL, patience()), NETCHAN_ELOST);
        else CHECK_INT(netchan_send(x.end, netchan_int(2), patience()), NETCHAN_ELOST);
        CHECK_INT(import_in(&x, "exported", x.kind, MOMENT, &other), NETCHAN_ETIMEDOUT);
        CHECK_INT(unexport(&x), NETCHAN_EINVAL);
        netchan_free(x.ch);
        netchan_free(x.end);
    }
}

static void test_import_hangup(void) {
    for (int round = 0; round < rounds(); round++) {
        named x = export_over(0, round % 2, "exportedRecv", false, 0);
        import_named(&x);
        pass_one(&x);
        CHECK_INT(netchan_close(x.end), NETCHAN_OK);
        netchan_free(x.end);
        x.end = NULL;
        check_closed(x.ch);
        forget(&x);
    }
}

static void *loop_back(void *arg) {
    job *j = (job *)arg;
    take(j->sync);
    for (int i = 0; i < COUNT; i++) {
        CHECK_INT(take(j->in), BASE + i);
        put(j->out, BASE + i);
    }
    return NULL;
}

static void test_independent_sends(void) {
    for (int round = 0; round < rounds(); round++) {
        named in = export_over(0, round % 2, "in", false, 0), out = export_over(0, round % 2, "out", true, 0),
              control = export_over(0, round % 2, "control", false, 0);
        job loop = {.in = in.ch, .out = out.ch, .sync = control.ch};
        job sender = {.out = import_named(&in), .n = COUNT, .first = BASE};
        job receiver = {.in = import_named(&out), .n = COUNT};
        go(&loop, loop_back);
        go(&sender, put_numbers);
        go(&receiver, take_numbers);
        wait_until_waiting(in.ch, 1);
        wait_until_waiting(out.ch, 1);
        put(import_named(&control), 0);
        finish(&receiver, 1);
        finish(&sender, 1);
        finish(&loop, 1);
        forget(&in);
        forget(&out);
        forget(&control);
    }
}

typedef struct crossing {
    int64_t number;
    const char *source;
} crossing;

static const netchan_field crossing_fields[] = {
    NETCHAN_FIELD(crossing, number, I64), NETCHAN_FIELD(crossing, source, STR), NETCHAN_FIELDS_END};

/* Sends and receives, whichever can be, until one of the two was done often enough. n and result: how often each. */
static void *cross(void *arg) {
    job *j = (job *)arg;
    const char *name = netchan_as_str(&j->value, "");
    while (j->n < COUNT && j->result < COUNT) {
        crossing c = {j->n, name};
        netchan_value v;
        netchan_case cases[] = {netchan_case_send(j->out, netchan_struct(crossing_fields, &c)),
            netchan_case_recv(j->in, &v)};
        if (choose(cases, 2) == 0) {
            j->n++;
            continue;
        }
        CHECK_INT(netchan_unpack(&v, crossing_fields, &c), NETCHAN_OK);
        CHECK_INT(c.number, j->result++);
        CHECK(strcmp(c.source, name) != 0);
        netchan_clear(&v);
    }
    return NULL;
}

static void test_cross_connect(void) {
    for (int round = 0; round < rounds(); round++) {
        named s = export_over(0, round % 2, "exportedSend", true, 0);
        named r = export_over(1, round % 2, "exportedRecv", false, 0);
        job jobs[2] = {{.in = r.ch, .out = s.ch, .value = netchan_str("export")},
            {.in = import_named(&s), .out = import_named(&r), .value = netchan_str("import")}};
        for (int i = 0; i < 2; i++) go(&jobs[i], cross);
        finish(jobs, 2);
        CHECK_INT(jobs[0].n, jobs[1].result);
        CHECK_INT(jobs[1].n, jobs[0].result);
        forget(&s);
        forget(&r);
    }
}

static void test_flow_control(void) {
    for (int round = 0; round < rounds(); round++) {
        for (int room = 0; room <= FLOW_ROOM; room += FLOW_ROOM) {
            named x = export_over(0, round % 2, "exported", form() & FROM_EXPORTER, (size_t)room);
            import_named(&x);
            job sender = {.out = tx_of(&x), .n = FLOW_COUNT, .first = BASE, .closes = true};
            go(&sender, put_numbers);
            while (done_by(&sender) < room) sched_yield();
            test_pause(MOMENT);
            for (int i = 0; i < FLOW_COUNT; i++) {
                CHECK(done_by(&sender) <= i + room);
                CHECK_INT(take(rx_of(&x)), BASE + i);
            }
            check_closed(rx_of(&x));
            finish(&sender, 1);
            forget(&x);
        }
    }
}
