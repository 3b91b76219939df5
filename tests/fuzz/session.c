/* Fuzzes sessions whose sides are all ours: node 0 listens, nodes 1 and 2 dial it, and in some inputs node 2 dials node
 * 1 as well. The input is a program: what each node does with its channels, when bytes travel, when links break and are
 * dialled again, and which bytes of a link are changed, lost, doubled or made up. A link on which nothing was tampered
 * with is never in breach, whatever is said on others. As long as nothing was tampered with at all, no value is taken
 * twice, or after its send said that it would not be. At the end all hang up, and nothing is left. */
#include "nodes.h"

FUZZ_PLAIN_BEGIN

enum { LISTENS, DIALS_1, DIALS_2, LISTENS_1 }; /* ports */

static bool chain; /* node 2 dials node 1, and not node 0 */
static bool spoilt[PORTS]; /* what this dialler and its listener say to each other was tampered with */

static void make_ports(input *in) {
    static const size_t messages[] = {300, 20000, 40000, 100000}, windows[] = {20000, 60000, 4 << 20};
    unsigned how = next_byte(in), limits = next_byte(in);
    chain = how & 1;
    window = windows[how / 2 % 3];
    key_records = how & 64 ? 12 : 1 << 23;
    netchan_options o;
    memset(&o, 0, sizeof o);
    for (size_t i = 0; i < PORTS; i++) {
        if (i == LISTENS_1 && !chain) break;
        o.buffer = next_byte(in) % 6;
        o.max_message = messages[limits % 4];
        o.max_memory = 6 * o.max_message;
        o.max_ends = limits & 128 ? 1000 : 4;
        o.no_redelivery = limits & 64;
        be(i == LISTENS_1 ? 1 : i);
        open_port(i, &o, i == DIALS_1 || i == DIALS_2);
    }
}

/* As the I/O thread does when a dialler wants a link. */
static bool dial(port *p) {
    port *to = &world.ports[chain && p == &world.ports[DIALS_2] ? LISTENS_1 : LISTENS];
    if (!netchan__hub_wants_wire(&p->hub) || p->hub.shut || to->hub.shut) return false;
    for (conn *c = world.conns; c < world.conns + CONNS; c++)
        if (c->open[0] && c->port[0] == p && !c->wire[0].up) return false;
    conn *c = open_conn(p, to);
    if (!c) return false;
    memset(c->wire[0].identity, 50 + (int)(to - world.ports), 32); /* who the other side is */
    memset(c->wire[1].identity, 60 + (int)(p - world.ports), 32);
    memset(c->wire[0].binding, (int)(c - world.conns) + 1, 32);
    memset(c->wire[1].binding, (int)(c - world.conns) + 1, 32);
    return true;
}

/* The dialler of a session that has a link. */
static const port *dialler_of(const netchan__session *s) {
    return ((const conn *)s->wire->owner)->port[0];
}

/* Who was not tampered with is never in breach, but for memory, or for an answer that it owes because others do not
 * answer. */
static void check_breaches(void) {
    for (size_t i = 0; i < PORTS; i++)
        for (const netchan__session *s = world.ports[i].open ? world.ports[i].hub.sessions : NULL; s; s = s->next)
            if (s->peer.breach && s->wire && !spoilt[dialler_of(s) - world.ports] && !fuzz_failed &&
                !strstr(s->peer.breach, "does not"))
                fuzz_broken(__FILE__, __LINE__, s->peer.breach);
}

/* What the I/O threads do beside moving bytes. Returns whether anything came of it. */
static bool look_after(void) {
    check_breaches();
    tick_ports();
    bool more = close_failed();
    more |= dial(&world.ports[DIALS_1]);
    more |= dial(&world.ports[DIALS_2]);
    for (size_t i = 0; i < NODES; i++) {
        be(i);
        for (netchan__session *s; (s = netchan__net.pending) != NULL; s->is_pending = false)
            netchan__net.pending = s->next_pending;
    }
    reap_tasks();
    end_imports(false);
    return more;
}

/* Lets all arrive that is said, and what is said in answer, for a while. */
static void flow(unsigned rounds) {
    for (bool more = true; more && rounds; rounds--) {
        more = false;
        for (conn *c = world.conns; c < world.conns + CONNS; c++)
            for (int who = 0; who < 2; who++) {
                while (ship(c, who)) more = true;
                while (arrive(c, who, NETCHAN__FRAME_MAX)) more = true;
            }
        more |= look_after();
    }
}

/* The ends of this connection learn what was never said. */
static void tamper(const conn *c) {
    world.knows = false;
    spoilt[c->port[0] - world.ports] = true;
}

/* Bytes of a link change on their way. */
static void spoil(conn *c, int who, input *in) {
    pipeline *p = &c->to[who];
    unsigned how = next_byte(in), byte = next_byte(in);
    size_t size = pipe_size(p), at = size ? p->start + (next_byte(in) * 256u + next_byte(in)) % size : 0;
    if (!size) return;
    tamper(c);
    if (how % 4 < 2) p->data[at] = (uint8_t)byte;
    else if (how % 4 == 2) p->end = at;
    else {
        uint8_t copy[64];
        size_t count = p->end - at < sizeof copy ? p->end - at : sizeof copy;
        memcpy(copy, p->data + at, count);
        put_bytes(p, copy, count);
    }
}

/* A frame that the other side never sent. */
static void make_up(conn *c, int who, input *in) {
    static text t;
    if (!c->open[who]) return;
    be(c->port[who]->node);
    t.size = 0;
    add_frame(&t, in);
    tamper(c);
    put_bytes(&c->to[who], t.data, t.size);
}

static void break_link(conn *c, unsigned how) {
    if (how % 4 == 0) cut_conn(c);
    else close_end(c, (int)(how % 2), "the connection broke");
    c->cut = how % 8 >= 4;
}

static void run_step(input *in) {
    unsigned what = next_byte(in), which = next_byte(in);
    conn *c = &world.conns[which % CONNS];
    int who = which / 8 % 2;
    if (what >= 224) fuzz_fail_in = 1 + next_byte(in) % 24;
    switch (what % 16) {
    default: {
        port *p = &world.ports[which % PORTS];
        if (!p->open) p = &world.ports[LISTENS];
        be(p->node);
        act(p, next_byte(in), in);
        break;
    }
    case 9: ship(c, who); break;
    case 10: arrive(c, who, 1 + next_byte(in)); break;
    case 11: arrive(c, who, NETCHAN__FRAME_MAX); break;
    case 12: pass_time((uint64_t)next_byte(in) * next_byte(in)); break;
    case 13: break_link(c, next_byte(in)); break;
    case 14: spoil(c, who, in); break;
    case 15: make_up(c, who, in); break;
    }
    fuzz_fail_in = 0;
    look_after();
    if (what & 16) flow(20);
    check_nodes();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input first = fuzz_input(data, size < STEP ? size : STEP);
    (void)fuzz_random_by_clock; /* compiled, and not wanted */
    make_world();
    memset(spoilt, 0, sizeof spoilt);
    world.knows = true;
    make_ports(&first);
    look_after();
    flow(10);
    for (size_t i = STEP, n = 0; i < size && n < STEPS; i += STEP, n++) {
        input step = fuzz_input(data + i, size - i < STEP ? size - i : STEP);
        run_step(&step);
    }
    flow(50);
    free_world();
    return 0;
}

FUZZ_PLAIN_END
