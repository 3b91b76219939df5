/* Fuzzes what a peer may say. Node 0 listens and dials; its peers, at the other end of each connection, are the input,
 * which begins and ends operations of node 0 as well, so that frames meet something. Whatever comes: there is no crash
 * and no leak, a breach ends the session of who did it and no other, what is sent in answer is whole frames, what is
 * received is well formed, and what peers make the node hold is bounded by the limits it has set. */
#include "nodes.h"

FUZZ_PLAIN_BEGIN

enum {
    PEERS = 3,    /* two diallers, and a listener */
    HEARD = 8
};

/* How node 0 is set up. */
static struct setup {
    netchan_options options;
    unsigned pieces; /* bytes that arrive at a time; 0: all */
    bool reads;      /* peers acknowledge what they get */
} setup;

static conn *peers[PEERS]; /* NULL: not connected */
static text message;

/* The newest frames that a peer was sent, without their values. */
static struct ear {
    netchan__frame frames[HEARD];
    size_t count;
} ears[PEERS];

static void make_setup(input *in) {
    static const size_t messages[] = {200, 2000, 20000, 100000}, windows[] = {20000, 60000, 4 << 20};
    netchan_options *o = &setup.options;
    unsigned how = next_byte(in), limits = next_byte(in);
    memset(&setup, 0, sizeof setup);
    o->buffer = next_byte(in) % 8;
    o->max_message = messages[limits % 4];
    o->max_memory = o->max_message * (2u + limits / 4 % 4 * 8);
    o->max_ops = limits & 64 ? 1000 : 4;
    o->max_ends = limits & 128 ? 1000 : 3;
    o->max_peers = how & 1 ? 100 : 2;
    o->no_redelivery = how & 2;
    window = windows[how / 4 % 3];
    key_records = how & 64 ? 8 : 1 << 23;
    setup.reads = how & 128;
    setup.pieces = next_byte(in) % 4 ? 0 : 1 + next_byte(in) % 16;
}

/* Bytes arrive from a peer. */
static void say(conn *c, const text *t) {
    size_t piece = setup.pieces ? setup.pieces : NETCHAN__FRAME_MAX;
    if (!c || !c->open[0]) return;
    put_bytes(&c->to[0], t->data, t->size);
    while (arrive(c, 0, piece) > 0) continue;
}

static void add_hello(text *t, const conn *c, input *in) {
    text body;
    body.size = 0;
    add_byte(&body, NETCHAN__HELLO);
    add_bytes(&body, "netchan\1", 8);
    unsigned process = next_byte(in), memory = next_byte(in), ends = next_byte(in), capacity = next_byte(in);
    for (int i = 0; i < 16; i++) add_byte(&body, process ? process : 100 + (unsigned)(c - world.conns));
    add_number(&body, memory ? 100 + memory : 1 << 20);
    add_number(&body, memory ? 1000 + memory * 16u : 4 << 20);
    add_number(&body, 100);
    add_number(&body, ends ? ends : 100);
    add_number(&body, 1000);
    add_number(&body, capacity % 8);
    for (int i = 0; c->port[0]->hub.dials && i < 48; i++) add_byte(&body, next_byte(in) + (unsigned)i);
    add_number(t, body.size);
    add_bytes(t, body.data, body.size);
}

/* RESUME of a session of the listener, or the answer to the dialler, right but for what `how` says. */
static void add_resume(text *t, conn *c, netchan__session *s, unsigned how) {
    netchan__wire *w = &c->wire[0], forged = *w;
    bool dials = c->port[0]->hub.dials;
    uint64_t received = how == 1 ? s->acked : how == 2 ? s->peer.sent + 1 : s->peer.sent;
    text body;
    body.size = 0;
    if (!dials) forged.generation = how == 3 ? s->generation : s->generation + 1;
    add_byte(&body, dials ? NETCHAN__RESUMED : NETCHAN__RESUME);
    if (!dials) {
        add_bytes(&body, s->id, 16);
        add_number(&body, forged.generation);
    }
    add_number(&body, received);
    CHECK(netchan__prove(s, &forged, dials ? 'L' : 'D', received, body.data + body.size));
    body.data[body.size] ^= how == 4;
    body.size += 32;
    add_number(t, body.size);
    add_bytes(t, body.data, body.size);
}

/* A connection, with or without a greeting. */
static void connect_peer(unsigned who, input *in) {
    port *p = &world.ports[who == 2];
    unsigned how = next_byte(in);
    if (!p->open || (peers[who] && peers[who]->open[0]) || (p->hub.dials && !netchan__hub_wants_wire(&p->hub))) return;
    conn *c = peers[who] = open_conn(p, NULL);
    ears[who].count = 0;
    if (!c) return;
    be(0);
    netchan__session *s = p->hub.dials ? p->hub.session : p->hub.sessions;
    message.size = 0;
    if (s && how >= 128) add_resume(&message, c, s, how % 8);
    else if (how != 127) add_hello(&message, c, in);
    say(c, &message);
}

/* What the node says must be whole frames of known types, whose values are values. */
static void check_frame(netchan__reader r, unsigned type, struct ear *ear) {
    const char *fields = netchan__frame_fields(type);
    netchan__frame f = netchan__new_frame(type);
    if (!fields) {
        CHECK(type >= NETCHAN__HELLO && type <= NETCHAN__REFUSED && type != NETCHAN__BYE);
        return;
    }
    for (; *fields && *fields != 'v' && *fields != 'b'; fields++) {
        uint64_t *number = netchan__frame_field(&f, *fields);
        if (number) *number = netchan__read_varint(&r);
        else if (f.flags & NETCHAN__RELAYED) netchan__read_bytes(&r, 16);
    }
    CHECK(!r.bad);
    ear->frames[ear->count++ % HEARD] = f;
    if (*fields != 'v' || !netchan__left(&r)) return;
    netchan_value v;
    bool has_ends = memchr(r.p, 0x8a, netchan__left(&r)) != NULL;
    if (type != NETCHAN__DATA) CHECK(f.size == netchan__left(&r));
    int result = netchan_decode(&v, r.p, netchan__left(&r), (size_t)1 << 24);
    CHECK(result == NETCHAN_OK || has_ends);
    netchan_clear(&v);
}

static void hear(unsigned who) {
    conn *c = peers[who];
    if (!c) return;
    while (ship(c, 0) > 0) continue;
    pipeline *p = &c->to[1];
    if (!p->data) return;
    netchan__reader r = {p->data + p->start, p->data + p->end, false};
    while (netchan__left(&r)) {
        size_t length = (size_t)netchan__read_varint(&r);
        const uint8_t *begin = netchan__read_bytes(&r, length);
        CHECK(begin && length);
        netchan__reader body = {begin + 1, r.p, false};
        check_frame(body, *begin, &ears[who]);
    }
    drop_bytes(p);
    netchan__session *s = c->open[0] ? c->wire[0].session : NULL;
    if (!setup.reads || !s || !s->peer.sent) return;
    text ack;
    ack.size = 0;
    add_number(&ack, 1 + netchan__varint_size(s->peer.sent));
    add_byte(&ack, NETCHAN__ACK);
    add_number(&ack, s->peer.sent);
    say(c, &ack);
}

/* What may be held: what limits allow each peer, as much for what it does not read, and what the input itself sends. */
static size_t most_memory(void) {
    const netchan_options *o = &setup.options;
    size_t tasks = 0;
    for (size_t i = 0; i < TASKS; i++) tasks += world.tasks[i] != NULL;
    size_t ops = o->max_ops * 2 * sizeof(netchan__remote), ends = 2 * (o->max_ends + 2) * (sizeof(netchan) + 64);
    size_t peer = 3 * o->max_memory + 2 * o->max_message * NETCHAN__SWELL + 2 * window + ops + ends + 100000;
    return 300000 + (PEERS + 2) * (peer + o->buffer * 40000) + tasks * CASES * 40000;
}

/* Sessions of which one says something that it must not take the others with it, but for what is sent to them. */
static void check_breaches(const netchan__session *from) {
    for (size_t i = 0; i < PORTS; i++)
        for (const netchan__session *s = world.ports[i].open ? world.ports[i].hub.sessions : NULL; s; s = s->next)
            CHECK(s == from || !s->peer.breach || strstr(s->peer.breach, "memory") ||
                  strstr(s->peer.breach, "does not") || strstr(s->peer.breach, "max_ops"));
}

static void speak(unsigned who, input *in, unsigned times) {
    conn *c = peers[who];
    netchan__session *s = c && c->open[0] ? c->wire[0].session : NULL;
    input start = *in;
    be(0);
    for (world.repeated = 0; world.repeated < times; world.repeated++) {
        message.size = 0;
        *in = start;
        add_frame(&message, in);
        say(c, &message);
    }
    world.repeated = 0;
    if (!world.ports[0].open && !world.ports[1].open) return;
    if (!c || !c->open[0] || c->wire[0].session == s) check_breaches(s);
}

/* The answers to what a node says, as a peer would give them that keeps to the protocol; they differ in `how`. A match
 * is numbered after its entry. Returns the type, or 0, and the fields. */
static unsigned choose_answer(const netchan__frame *f, unsigned how, uint64_t *numbers) {
    bool even = how % 2 == 0;
    switch (f->type) {
    case NETCHAN__OFFER: case NETCHAN__DEMAND: /* CLAIM, ACCEPT or WITHDRAWN */
        numbers[0] = f->entry;
        numbers[1] = how % 8 == 7 ? how / 8 % 14 : 2 * f->entry + how / 64 % 2;
        numbers[2] = how / 8 % 4;
        return how % 8 < 7 ? NETCHAN__CLAIM : how < 128 ? NETCHAN__ACCEPT : NETCHAN__WITHDRAWN;
    case NETCHAN__GRANT: /* COMMIT, ACCEPT or RELEASE */
        numbers[0] = f->match / 2;
        numbers[1] = how % 8 >= 3 && how % 8 < 6 ? 0 : f->match;
        numbers[2] = how / 8 % 4;
        return how % 8 < 3 ? NETCHAN__COMMIT : how % 8 < 6 ? NETCHAN__ACCEPT : NETCHAN__RELEASE;
    case NETCHAN__CLAIM: /* GRANT or DECLINE */
        numbers[0] = f->match;
        return how % 8 < 7 ? NETCHAN__GRANT : NETCHAN__DECLINE;
    case NETCHAN__COMMIT: /* TAKEN or DECLINE */
        numbers[0] = f->match;
        numbers[1] = even;
        return how % 8 < 7 ? NETCHAN__TAKEN : NETCHAN__DECLINE;
    case NETCHAN__IMPORT:
        numbers[0] = f->number;
        numbers[1] = how % 8 < 5 ? NETCHAN__FOUND : how % 4;
        return NETCHAN__IMPORTED;
    default: return 0;
    }
}

/* A frame whose numbers are given; the rest of its fields come from the input. */
static void add_answer(text *t, unsigned type, const uint64_t *numbers, size_t count, input *in) {
    const char *fields = netchan__frame_fields(type);
    static text rest, body;
    rest.size = body.size = 0;
    add_byte(&body, type);
    for (size_t i = 0; i < count; i++) add_number(&body, numbers[i]);
    add_fields(&rest, fields + count, in);
    add_bytes(&body, rest.data, rest.size);
    if (body.size > NETCHAN__FRAME_MAX - 3) body.size = NETCHAN__FRAME_MAX - 3;
    add_number(t, body.size);
    add_bytes(t, body.data, body.size);
}

/* The peer answers one of the frames that it was sent. */
static void answer(unsigned who, input *in) {
    static const uint8_t counts[256] = {[NETCHAN__CLAIM] = 3, [NETCHAN__ACCEPT] = 2, [NETCHAN__WITHDRAWN] = 1,
        [NETCHAN__COMMIT] = 3, [NETCHAN__RELEASE] = 2, [NETCHAN__GRANT] = 1, [NETCHAN__DECLINE] = 2,
        [NETCHAN__TAKEN] = 1, [NETCHAN__IMPORTED] = 2};
    const struct ear *ear = &ears[who];
    size_t back = next_byte(in) % HEARD, had = ear->count < HEARD ? ear->count : HEARD;
    unsigned how = next_byte(in);
    uint64_t numbers[3] = {0, 0, 0};
    if (!had) return;
    unsigned type = choose_answer(&ear->frames[(ear->count - 1 - back % had) % HEARD], how, numbers);
    message.size = 0;
    if (type) add_answer(&message, type, numbers, counts[type], in);
    say(peers[who], &message);
}

static void speak_raw(unsigned who, input *in) {
    message.size = 0;
    add_rest(&message, in);
    say(peers[who], &message);
}

/* What the I/O thread does beside moving bytes. */
static void look_after(void) {
    be(0);
    for (unsigned i = 0; i < PEERS; i++) hear(i);
    for (int i = 0; netchan__net.breached && i < 8; i++) { /* an answer may be the next breach */
        netchan__net.breached = false;
        tick_ports();
        for (unsigned j = 0; j < PEERS; j++) hear(j);
    }
    close_failed();
    be(0);
    while (netchan__net.pending) {
        netchan__session *s = netchan__net.pending;
        netchan__net.pending = s->next_pending;
        s->is_pending = false;
    }
}

static void run_step(input *in) {
    unsigned what = next_byte(in), who = what / 16 % 4 % PEERS;
    be(0);
    if (what >= 192) fuzz_fail_in = 1 + next_byte(in) % 16;
    switch (what % 16) {
    case 0: case 1: case 2: speak(who, in, 1); break;
    case 3: case 4: answer(who, in); break;
    case 5: speak(who, in, 1 + next_byte(in) % 64); break;
    case 6: speak_raw(who, in); break;
    case 7: connect_peer(who, in); break;
    case 8:
        if (peers[who]) cut_conn(peers[who]);
        break;
    case 9: pass_time((uint64_t)next_byte(in) * next_byte(in)); break;
    default: {
        port *p = &world.ports[(what & 64) != 0];
        if (p->open) act(p, next_byte(in), in);
        break;
    }
    }
    fuzz_fail_in = 0;
    look_after();
    reap_tasks();
    end_imports(false);
    check_nodes();
    CHECK(world.nodes[0].memory.bytes <= most_memory());
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input first = fuzz_input(data, size < STEP ? size : STEP);
    (void)fuzz_random_by_clock; /* compiled, and not wanted */
    make_world();
    memset(peers, 0, sizeof peers);
    memset(ears, 0, sizeof ears);
    make_setup(&first);
    unsigned ports = next_byte(&first) % 4;
    if (ports != 1) open_port(0, &setup.options, false);
    if (ports != 2) open_port(1, &setup.options, true);
    for (unsigned i = 0; i < PEERS; i++) {
        input none = {NULL, NULL};
        if (!(next_byte(&first) & 1)) connect_peer(i, &none);
    }
    look_after();
    for (size_t i = STEP, n = 0; i < size && n < STEPS; i += STEP, n++) {
        input step = fuzz_input(data + i, size - i < STEP ? size - i : STEP);
        run_step(&step);
    }
    free_world();
    return 0;
}

FUZZ_PLAIN_END
