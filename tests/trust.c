/* Whom to trust, over TLS on loopback: section [15] of netchan.h, and what it tells both sides. For each way of being
 * wrong there is a test in which the other dials, and one in which the other listens. */
#include "alloc.h"

/* Every block is searched for secrets when it is let go of, so each is new when it grows. See "what is wiped" below. */
static void *guarded_malloc(size_t size);
static void *guarded_realloc(void *old, size_t size) __attribute__((unused)); /* netchan.h may do without */
static void guarded_free(void *block);
#undef NETCHAN_MALLOC
#undef NETCHAN_REALLOC
#undef NETCHAN_FREE
#define NETCHAN_MALLOC(size) guarded_malloc(size)
#define NETCHAN_REALLOC(ptr, size) guarded_realloc(ptr, size)
#define NETCHAN_FREE(ptr) guarded_free(ptr)

#define NETCHAN_IMPLEMENTATION
#include "netchan.h"
#include "test.h"
#include "task.h"
#include "net.h"
#include "pki.h"

#include <sys/stat.h>

enum {
    KEYS = 4,         /* of the array below */
    WINDOW = 12,      /* characters of a secret in a row that nothing may show */
    TEXT = 1024,      /* of a sentence */
    QUICK = LONG / 4, /* ms: what is told at once, and not when connect_ms are over */
    MANY = 5000       /* keys or pins: nobody has so many */
};

static const char *const keys[KEYS] = {
    "8f1c6d0b53a94e7720c1b7fd4a6e985f3d20e1b4c75a69887716253f4e0dac9b",
    "b14a7c6e9d03f25881e7d6c40a3f9b52670c8ed1943ab75f20e86d1c7b95f3a0",
    "5de0f7a2c49b813670e5a18f3bd2c964817a0f6e2d5c93b4f8602e7ad19c4b53",
    "c07e93b65f1d48a2e39b076cd84f15a27be61d308c954fa2d6b03e8f71a5c92d",
};

/* --- what nobody may read ----------------------------------------------------------------------------------------- */

static const char *secrets[16]; /* private keys as PEM text, and shared keys */
static size_t secret_count;

/* Before there is a link. */
static void keep_secret(const char *text) {
    CHECK(secret_count < sizeof secrets / sizeof *secrets);
    secrets[secret_count++] = text;
}

/* Whether a few characters in a row of the secret are in the text. The marks of PEM and their words are no secret. */
static bool tells(const char *text, const char *secret) {
    char window[WINDOW + 1];
    size_t size = strlen(secret);
    for (size_t i = 0; i + WINDOW <= size; i++) {
        memcpy(window, secret + i, WINDOW);
        window[WINDOW] = '\0';
        if (!strpbrk(window, "- \n") && strstr(text, window)) return true;
    }
    return false;
}

/* What is told is one line that can be printed, and holds no secret. */
static void check_discreet(const char *text) {
    for (size_t i = 0; i < KEYS; i++)
        if (tells(text, keys[i])) test_fail(__FILE__, __LINE__, "a shared key is in \"%s\"", text);
    for (size_t i = 0; i < secret_count; i++)
        if (tells(text, secrets[i])) test_fail(__FILE__, __LINE__, "a secret is in \"%s\"", text);
    for (const char *c = text; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127) test_fail(__FILE__, __LINE__, "byte %d in \"%s\"", *c, text);
}

static void check_log(void *arg, int level, const char *text) {
    (void)arg;
    CHECK(level >= 0 && level <= 2);
    check_discreet(text);
}

/* All strings of a map. */
static void check_map(const netchan_value *map) {
    CHECK_INT(map->type, NETCHAN_MAP);
    const netchan_entry *entries = (const netchan_entry *)map->as.block.data;
    for (size_t i = 0; i < map->as.block.count; i++) check_discreet(netchan_as_str(&entries[i].value, ""));
}

/* The next event of this name; the others before it are dropped. All that is told is looked at. */
static netchan_value next_event(netchan_link *link, const char *name) {
    for (;;) {
        netchan_value v;
        CHECK_INT(netchan_recv(link->events, &v, LONG), NETCHAN_OK);
        check_map(&v);
        if (is_event(&v, name)) return v;
        if (is_event(&v, "up") && strcmp(name, "rejected") == 0)
            test_fail(__FILE__, __LINE__, "%s came in", text_of(&v, "identity"));
        netchan_clear(&v);
    }
}

/* One of the words, between which there is a '|', is in the sentence. */
static void check_word(int line, const char *label, const char *sentence, const char *words) {
    char list[256], *rest = list;
    snprintf(list, sizeof list, "%s", words);
    for (char *end; rest; rest = end) {
        end = strchr(rest, '|');
        if (end) *end++ = '\0';
        if (strstr(sentence, rest)) return;
    }
    test_fail(__FILE__, line, "%s: no \"%s\" in \"%s\"", label, words, sentence);
}
#define SAYS(label, sentence, words) check_word(__LINE__, label, sentence, words)

/* The last failure of this thread, which has the words in it. */
static void check_error(int line, const char *label, const char *words) {
    check_discreet(netchan_errmsg());
    check_word(line, label, netchan_errmsg(), words);
}

/* Neither a listener nor a dialler is made with these options: nobody is asked. */
static void check_refused_at(int line, const netchan_options *o, const char *words) {
    long blocks = alloc_blocks();
    long long start = test_ms();
    for (int dials = 0; dials < 2; dials++) {
        netchan_link *link = dials ? netchan_dial("127.0.0.1:1", o) : netchan_listen("127.0.0.1:0", o);
        if (link) test_fail(__FILE__, line, "these options are good enough");
        check_error(line, dials ? "dial" : "listen", words);
    }
    CHECK(test_ms() - start < QUICK);
    CHECK_INT(alloc_blocks(), blocks);
}
#define REFUSED_WITH(o, words) check_refused_at(__LINE__, o, words)

/* --- people ------------------------------------------------------------------------------------------------------- */

enum {
    ALICE, /* right in every way, and all that the others are but for one thing */
    BOB,
    SERVER, /* for this use alone */
    CLIENT,
    EXPIRED,
    UNBORN,
    FOREIGN, /* of another authority */
    SELF,    /* signed by nobody else */
    USURPED, /* signed by Alice, who is no authority */
    WEAK,    /* signed with SHA-1 */
    SIGNER,  /* for signing code */
    SEALER,  /* may not sign */
    NAMED,   /* has another name and address */
    PEOPLE
};

static pki authority, foreign_authority, people[PEOPLE];
static bool made[PEOPLE];

static void wish_for(int who, pki_wish *wish) {
    static const char *const names[PEOPLE] = {
        "CN=alice",   "CN=bob",  "CN=server",  "CN=client", "CN=expired", "CN=unborn", "CN=foreign",
        "CN=oneself", "CN=peon", "CN=weakling", "CN=signer", "CN=sealer",  "CN=named"};
    memset(wish, 0, sizeof *wish);
    wish->subject = names[who];
    wish->issuer = who == SELF      ? NULL
                   : who == FOREIGN ? &foreign_authority
                   : who == USURPED ? &people[ALICE]
                                    : &authority;
    wish->dns[0] = who == NAMED ? "named.example" : "peer.example";
    wish->dns[1] = who == NAMED ? NULL : "localhost";
    wish->ip[0] = who == NAMED ? "192.0.2.1" : "127.0.0.1";
    wish->from = who == UNBORN ? "20970101000000" : "20200101000000";
    wish->to = who == EXPIRED ? "20210101000000" : "20990101000000";
    wish->use = who == SERVER   ? MBEDTLS_OID_SERVER_AUTH
                : who == CLIENT ? MBEDTLS_OID_CLIENT_AUTH
                : who == SIGNER ? MBEDTLS_OID_CODE_SIGNING
                                : NULL;
    wish->key_usage = who == SEALER ? MBEDTLS_X509_KU_KEY_ENCIPHERMENT : 0;
    wish->sha1 = who == WEAK;
}

/* Before there is a link. */
static const pki *person(int who) {
    pki_wish wish;
    if (!*authority.cert) {
        pki_make_ca(&authority, "CN=authority");
        pki_make_ca(&foreign_authority, "CN=foreign authority");
    }
    if (who == USURPED) person(ALICE);
    if (!made[who]) {
        wish_for(who, &wish);
        pki_make(&people[who], &wish);
        keep_secret(people[who].key);
        made[who] = true;
    }
    return &people[who];
}

/* --- options ------------------------------------------------------------------------------------------------------ */

static netchan_options plain_options(void) {
    netchan_options o = options();
    o.shared_key = NULL;
    o.log = check_log;
    return o;
}

static netchan_options key_options(const char *key) {
    netchan_options o = plain_options();
    o.shared_key = key;
    return o;
}

static netchan_options pin_options(const pki *me, const char *pin) {
    netchan_options o = plain_options();
    o.cert = me->cert;
    o.cert_key = me->key;
    o.pin = pin;
    return o;
}

static netchan_options ca_options(const pki *me, const char *ca) {
    netchan_options o = pin_options(me, NULL);
    o.ca = ca;
    return o;
}

static netchan_options insecure_options(void) {
    netchan_options o = plain_options();
    o.insecure = true;
    return o;
}

/* --- those who agree ---------------------------------------------------------------------------------------------- */

/* How one side is told of the other, whose identity and name are these, at its link. */
static void check_up(netchan_link *link, const char *identity, const char *name) {
    netchan_value v = next_event(link, "up");
    CHECK_STR(text_of(&v, "identity"), identity);
    CHECK_STR(text_of(&v, "name"), name);
    CHECK(strlen(text_of(&v, "address")) > 0);
    netchan_clear(&v);
}

static void check_accept(netchan_link *link, const char *identity, const char *name) {
    netchan_value v;
    CHECK_INT(netchan_recv(link->accept, &v, LONG), NETCHAN_OK);
    check_map(&v);
    CHECK_STR(text_of(&v, "identity"), identity);
    CHECK_STR(text_of(&v, "name"), name);
    netchan_clear(&v);
}

/* The two come together, and each is told who the other is. */
static void check_agree(const netchan_options *lo, const netchan_options *o, const char *listener,
                        const char *dialler) {
    pair p;
    p.l = listen_with(lo);
    p.d = dial_with(p.l->address, o);
    check_works(p.l, p.d);
    check_up(p.l, dialler, "");
    check_up(p.d, listener, "");
    check_accept(p.l, dialler, "");
    part(&p);
}

/* The two come together. */
static void check_join(const netchan_options *lo, const netchan_options *o) {
    pair p;
    p.l = listen_with(lo);
    p.d = dial_with(p.l->address, o);
    check_works(p.l, p.d);
    part(&p);
}

/* --- those who do not --------------------------------------------------------------------------------------------- */

/* What each side is told. */
typedef struct told {
    char dialler[TEXT], listener[TEXT];
} told;

/* A stranger was turned away: why. Nobody has come in. */
static void hear_rejected(netchan_link *l, char *reason) {
    netchan_value v = next_event(l, "rejected");
    CHECK_INT(strncmp(text_of(&v, "address"), "127.0.0.1:", 10), 0);
    snprintf(reason, TEXT, "%s", text_of(&v, "reason"));
    CHECK(strlen(reason) > 10);
    netchan_clear(&v);
    CHECK_INT(netchan_recv(l->accept, &v, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    CHECK_INT(netchan_recv(l->recv, &v, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    check_no_event(l, "up");
}

/* Dials where nobody is who is trusted, or who trusts this one. */
static void hear_failure(int line, const char *label, const char *address, const netchan_options *o, char *sentence) {
    long long start = test_ms();
    netchan_link *d = netchan_dial(address, o);
    if (d) test_fail(__FILE__, line, "%s: they agree", label);
    snprintf(sentence, TEXT, "%s", netchan_errmsg());
    if (test_ms() - start >= QUICK) test_fail(__FILE__, line, "%s: that took long: %s", label, sentence);
    check_discreet(sentence);
    check_word(line, label, sentence, strrchr(address, ':'));
}

static told fall_out(int line, const char *label, const netchan_options *lo, const netchan_options *o) {
    told t;
    netchan_link *l = listen_with(lo);
    hear_failure(line, label, l->address, o, t.dialler);
    hear_rejected(l, t.listener);
    if (getenv("TRUST_SHOW")) printf("%s\n    D: %s\n    L: %s\n", label, t.dialler, t.listener);
    hang_up(l);
    CHECK_INT(alloc_blocks(), 0);
    return t;
}
#define FALL_OUT(label, lo, o) fall_out(__LINE__, label, lo, o)

/* --- files -------------------------------------------------------------------------------------------------------- */

static char folder[] = "/tmp/netchan-trust-XXXXXX"; /* one for each test: it is a process of its own */
static char paths[16][128];
static size_t path_count;

/* The path of a new file in a folder of this test. */
static const char *new_path(const char *name) {
    if (path_count == 0) CHECK(mkdtemp(folder));
    CHECK(path_count < sizeof paths / sizeof *paths);
    snprintf(paths[path_count], sizeof paths[0], "%s/%s", folder, name);
    return paths[path_count++];
}

static const char *new_file(const char *name, const void *data, size_t size) {
    const char *path = new_path(name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0 && write(fd, data, size) == (ssize_t)size && close(fd) == 0);
    return path;
}

static void remove_files(void) {
    for (size_t i = 0; i < path_count; i++)
        if (unlink(paths[i]) != 0) rmdir(paths[i]);
    if (path_count) CHECK_INT(rmdir(folder), 0);
}

/* "file:PATH" of a new file with this text. */
static const char *text_file(char *out, const char *name, const char *text) {
    snprintf(out, 256, "file:%s", new_file(name, text, strlen(text)));
    return out;
}

/* --- shared keys -------------------------------------------------------------------------------------------------- */

static const char *id_of(const char *key) {
    static char ids[KEYS][NETCHAN_KEY_SIZE];
    for (int i = 0; i < KEYS; i++) {
        if (strcmp(keys[i], key) != 0) continue;
        CHECK_INT(netchan_key_id(key, ids[i], sizeof ids[i]), NETCHAN_OK);
        return ids[i];
    }
    return NULL;
}

/* The id tells which key it is, and nothing else about it. */
static void test_key_id(void) {
    static const char label[] = "netchan/1 key id"; /* with its NUL */
    uint8_t text[sizeof label + 64], hash[32];
    char id[64], right[64] = "shared_key:";
    memcpy(text, label, sizeof label);
    memcpy(text + sizeof label, keys[0], 64);
    CHECK_INT(mbedtls_sha256(text, sizeof text, hash, 0), 0);
    for (int i = 0; i < 8; i++) snprintf(right + 11 + 2 * i, 3, "%02x", hash[i]);
    CHECK_INT(netchan_key_id(keys[0], id, sizeof id), NETCHAN_OK);
    CHECK_STR(id, right);
    CHECK(strcmp(id_of(keys[0]), id_of(keys[1])) != 0);
    CHECK_INT(netchan_key_id(keys[0], id, strlen(right)), NETCHAN_EINVAL); /* its NUL does not fit */
    check_error(__LINE__, "size", "netchan_key_id");
    CHECK_INT(netchan_key_id(keys[0], id, strlen(right) + 1), NETCHAN_OK);
    CHECK_INT(netchan_key_id(NULL, id, sizeof id), NETCHAN_EINVAL);
    CHECK_INT(netchan_key_id(keys[0], NULL, sizeof id), NETCHAN_EINVAL);
    CHECK(netchan_key_id("password", id, sizeof id) != NETCHAN_OK);
    check_error(__LINE__, "weak", "netchan_keygen");
}

static void test_shared_key(void) {
    netchan_options o = key_options(keys[0]);
    check_agree(&o, &o, id_of(keys[0]), id_of(keys[0]));
}

static void test_other_shared_key(void) {
    netchan_options lo = key_options(keys[0]), o = key_options(keys[1]);
    told t = FALL_OUT("other key", &lo, &o);
    SAYS("what the dialler has", t.dialler, id_of(keys[1]));
    SAYS("what came", t.listener, id_of(keys[1]));
    SAYS("what the listener has", t.listener, id_of(keys[0]));
}

/* Any key in common will do; a side with several says which one it was. */
static void test_rotation_of_shared_keys(void) {
    static const char *const sets[] = {"0", "1", "01", "10", "20", "210", "3"};
    enum { SETS = sizeof sets / sizeof *sets };
    char texts[SETS][KEYS * 65 + 1];
    for (int s = 0; s < SETS; s++) {
        *texts[s] = '\0';
        for (const char *k = sets[s]; *k; k++) {
            strcat(texts[s], keys[*k - '0']);
            strcat(texts[s], k[1] ? "\n" : "");
        }
    }
    for (int i = 0; i < SETS; i++) {
        for (int j = 0; j < SETS; j++) {
            netchan_options lo = key_options(texts[i]), o = key_options(texts[j]);
            const char *common = strpbrk(sets[j], sets[i]); /* the first of the dialler's that the listener has */
            char label[64];
            snprintf(label, sizeof label, "keys %s dial %s", sets[j], sets[i]);
            if (common) {
                const char *id = id_of(keys[*common - '0']);
                check_agree(&lo, &o, id, id);
                continue;
            }
            told t = FALL_OUT(label, &lo, &o);
            char ids[KEYS * NETCHAN_KEY_SIZE] = "";
            for (const char *k = sets[j]; *k; k++) {
                strcat(ids, id_of(keys[*k - '0']));
                if (k[1]) strcat(ids, "|");
            }
            SAYS(label, t.dialler, ids); /* one of those that it has */
        }
    }
}

/* A dialler that has found the right one of its keys begins with it when its link breaks. */
static void test_rotated_key_is_remembered(void) {
    char both[2 * 65 + 1];
    shaky s;
    snprintf(both, sizeof both, "%s\n%s", keys[1], keys[0]);
    netchan_options lo = key_options(keys[0]), o = key_options(both);
    shaky_join(&s, &lo, &o);
    check_works(s.l, s.d);
    netchan_value v = next_event(s.l, "rejected"); /* the new key, which the listener has not got yet */
    netchan_clear(&v);
    for (int i = 0; i < 3; i++) {
        proxy_cut(&s.p);
        v = wait_event(s.d, "resumed");
        netchan_clear(&v);
        check_works(s.l, s.d);
    }
    check_no_event(s.l, "rejected");
    shaky_part(&s);
}

static void test_weak_shared_keys(void) {
    static const char *const weak[] = {"", " ", "\n\n", "secret", "0123456789abcdef0123456789abcde",
                                       "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
                                       "abababababababababababababababababababababababab",
                                       "correct horse battery stapl"};
    char list[256];
    for (size_t i = 0; i < sizeof weak / sizeof *weak; i++) {
        netchan_options o = key_options(weak[i]);
        REFUSED_WITH(&o, "shared_key");
        check_error(__LINE__, weak[i], "netchan_keygen");
        check_error(__LINE__, weak[i], "openssl rand");
        if (strlen(weak[i]) > 5) CHECK(!strstr(netchan_errmsg(), weak[i])); /* keys are secret, even bad ones */
        snprintf(list, sizeof list, "%s\n%s\n%s", keys[0], weak[i], keys[1]);
        o.shared_key = list; /* good ones do not make up for it */
        if (strspn(weak[i], " \n") < strlen(weak[i])) REFUSED_WITH(&o, "netchan_keygen");
    }
}

/* Blank lines, and how a line ends, do not matter. */
static void test_forms_of_shared_keys(void) {
    static const char *const forms[] = {"%s\n", "%s\r\n", "\n%s", "\r\n\r\n%s\r\n\r\n", " %s ", "\t%s\t\n", "%s\n \n"};
    netchan_options lo = key_options(keys[0]);
    char text[128], file[256], name[16];
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        snprintf(text, sizeof text, forms[i], keys[0]);
        netchan_options o = key_options(text);
        check_agree(&lo, &o, id_of(keys[0]), id_of(keys[0]));
        snprintf(name, sizeof name, "key%zu", i);
        o.shared_key = text_file(file, name, text);
        check_agree(&o, &lo, id_of(keys[0]), id_of(keys[0]));
    }
    remove_files();
}

static void test_too_many_shared_keys(void) {
    char *text = (char *)malloc(MANY * 65 + 1), *end = text;
    uint64_t seed = 7;
    CHECK(text);
    for (int i = 0; i < MANY; i++, *end++ = '\n')
        for (int j = 0; j < 64; j++) *end++ = "0123456789abcdef"[test_random(&seed) % 16];
    *end = '\0';
    netchan_options o = key_options(text);
    REFUSED_WITH(&o, "shared_key");
    check_error(__LINE__, "how many", "at most|too many|more than");
    free(text);
}

/* The text of a path is long and varied enough to be a key; whoever means the file forgot "file:". */
static void test_path_as_shared_key(void) {
    const char *path = new_file("shared-key-of-this-test-0123456789", keys[0], 64);
    netchan_options o = key_options(path);
    CHECK(strlen(path) >= 32);
    REFUSED_WITH(&o, "file:");
    CHECK(!strstr(netchan_errmsg(), path)); /* it may be a key after all */
    remove_files();
    o.shared_key = "/tmp/netchan-there-is-no-such-file-0123456789"; /* may be a key */
    check_join(&o, &o);
}

/* --- texts from elsewhere ----------------------------------------------------------------------------------------- */

enum load_fault { NO_FAULT, FAILS, UNTERMINATED, EMPTY };

/* What options.load gives. */
typedef struct library {
    const char *names[4], *texts[4];
    enum load_fault fault;
    int calls;
} library;

static int load(void *arg, const char *name, char *out, size_t size) {
    library *lib = (library *)arg;
    lib->calls++;
    CHECK(size >= 4096);
    switch (lib->fault) {
    case FAILS: return NETCHAN_ENET;
    case UNTERMINATED: memset(out, 'k', size); return NETCHAN_OK;
    case EMPTY: *out = '\0'; return NETCHAN_OK;
    case NO_FAULT: break;
    }
    for (int i = 0; i < 4 && lib->names[i]; i++) {
        if (strcmp(lib->names[i], name) != 0) continue;
        CHECK(strlen(lib->texts[i]) < size);
        strcpy(out, lib->texts[i]);
        return NETCHAN_OK;
    }
    return NETCHAN_EINVAL;
}

static netchan_options from_library(library *lib, netchan_options o) {
    o.load = load;
    o.load_arg = lib;
    return o;
}

static void test_shared_key_from_elsewhere(void) {
    library lib = {{"the key", NULL}, {keys[0], NULL}, NO_FAULT, 0};
    char file[256];
    netchan_options texts[3];
    texts[0] = key_options(keys[0]);
    texts[1] = key_options(text_file(file, "key", keys[0]));
    texts[2] = from_library(&lib, key_options("callback:the key"));
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++) check_agree(&texts[i], &texts[j], id_of(keys[0]), id_of(keys[0]));
    CHECK_INT(lib.calls, 6); /* once for each link, and then never again */
    remove_files();
}

/* Each text is given as it is, as a path, as "file:PATH" and by the callback. */
static void test_certificates_from_elsewhere(void) {
    const pki *alice = person(ALICE), *bob = person(BOB);
    library lib = {{"cert", "key", "ca", "pin"}, {alice->cert, alice->key, authority.cert, bob->pin}, NO_FAULT, 0};
    char cert[256], key[256], ca[256], pin[256];
    text_file(cert, "cert", alice->cert);
    text_file(key, "key", alice->key);
    text_file(ca, "ca", authority.cert);
    text_file(pin, "pin", bob->pin);
    for (int i = 0; i < 8; i++) {
        bool with_pin = i % 2;
        netchan_options lo = from_library(&lib, plain_options());
        const char *const certs[] = {alice->cert, cert + 5, cert, "callback:cert"};
        const char *const its_keys[] = {alice->key, key + 5, key, "callback:key"};
        const char *const cas[] = {authority.cert, ca + 5, ca, "callback:ca"};
        const char *const pins[] = {bob->pin, bob->pin, pin, "callback:pin"};
        lo.cert = certs[i / 2];
        lo.cert_key = its_keys[i / 2];
        *(with_pin ? &lo.pin : &lo.ca) = with_pin ? pins[i / 2] : cas[i / 2];
        netchan_options o = with_pin ? pin_options(bob, alice->pin) : ca_options(bob, authority.cert);
        check_join(&lo, &o);
        check_join(&o, &lo);
    }
    CHECK_INT(lib.calls, 12);
    remove_files();
}

/* A file may be a pipe, as that of a shell's <(command). */
static void test_key_from_a_pipe(void) {
    int ends[2];
    char name[64];
    CHECK_INT(pipe(ends), 0);
    CHECK_INT(write(ends[1], keys[0], 64), 64);
    close(ends[1]);
    snprintf(name, sizeof name, "file:/dev/fd/%d", ends[0]);
    netchan_options lo = key_options(name), o = key_options(keys[0]);
    struct stat there;
    if (stat(name + 5, &there) != 0) return;
    check_join(&lo, &o);
    close(ends[0]);
}

/* Which options hold texts: name, and where it is. */
static const char **text_option(netchan_options *o, int which) {
    const char **const all[] = {&o->shared_key, &o->pin, &o->ca, &o->cert, &o->cert_key};
    return all[which];
}

static const char *const text_options[] = {"shared_key", "pin", "ca", "cert", "cert_key"};
enum { TEXT_OPTIONS = sizeof text_options / sizeof *text_options };

/* Options that are good, but for what is put in the place of one of them. */
static netchan_options good_but_for(int which, const char *text) {
    netchan_options o = which == 0   ? key_options(NULL)
                        : which == 1 ? pin_options(person(ALICE), NULL)
                                     : ca_options(person(ALICE), authority.cert);
    *text_option(&o, which) = text;
    return o;
}

/* What a file can be that is no text. The sentence says which option and which file. */
static void test_bad_files(void) {
    enum { HUGE_SIZE = 4 << 20 };
    char *huge = (char *)calloc(HUGE_SIZE, 1), file[256];
    static const struct {
        const char *name, *says;
    } faults[] = {{"missing", "No such file"}, {"empty", "empty"}, {"folder", "directory"}, {"huge", "large|long|big"},
                  {"binary", "NUL|text|binary"}, {"blank", "empty|blank|no "}};
    CHECK(huge);
    memset(huge, 'k', HUGE_SIZE);
    new_path("missing");
    new_file("empty", "", 0);
    CHECK_INT(mkdir(new_path("folder"), 0700), 0);
    new_file("huge", huge, HUGE_SIZE);
    new_file("binary", "0123456789abcdef0123456789abcdef\0a0123456789abcdef0123456789abcdef", 66);
    new_file("blank", " \n\n\t\n", 5);
    free(huge);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        for (int which = 0; which < TEXT_OPTIONS; which++) {
            snprintf(file, sizeof file, "file:%s/%s", folder, faults[i].name);
            netchan_options o = good_but_for(which, file);
            REFUSED_WITH(&o, text_options[which]);
            if (i < 4) check_error(__LINE__, text_options[which], file + 5);
            if (i < 4 || which < 2) check_error(__LINE__, text_options[which], faults[i].says);
        }
    }
    if (geteuid() != 0) { /* root may read everything */
        CHECK_INT(chmod(new_file("private", keys[0], 64), 0), 0);
        snprintf(file, sizeof file, "file:%s/private", folder);
        netchan_options o = key_options(file);
        REFUSED_WITH(&o, "Permission denied");
    }
    netchan_options o = key_options("file:");
    REFUSED_WITH(&o, "shared_key");
    remove_files();
}

static void test_bad_callbacks(void) {
    static const char *const says[] = {"", "load|callback:", "terminate|NUL|end", "empty|nothing|no "};
    for (int which = 0; which < TEXT_OPTIONS; which++) {
        netchan_options o = good_but_for(which, "callback:some name");
        REFUSED_WITH(&o, "options.load"); /* it is not set */
        check_error(__LINE__, "no callback", text_options[which]);
        for (int fault = FAILS; fault <= EMPTY; fault++) {
            library lib = {{NULL}, {NULL}, (enum load_fault)fault, 0};
            o = from_library(&lib, good_but_for(which, "callback:some name"));
            REFUSED_WITH(&o, text_options[which]);
            check_error(__LINE__, text_options[which], says[fault]);
            if (fault == FAILS) check_error(__LINE__, "which", "some name");
            CHECK_INT(lib.calls, 2);
        }
    }
}

/* --- pins --------------------------------------------------------------------------------------------------------- */

static void test_pins(void) {
    const pki *alice = person(ALICE), *expired = person(EXPIRED);
    netchan_options lo = pin_options(alice, expired->pin), o = pin_options(expired, alice->pin);
    pair p;
    p.l = listen_with(&lo);
    p.d = dial_with(p.l->address, &o);
    check_works(p.l, p.d); /* a pin is for a key, whatever its certificate says */
    check_up(p.l, expired->pin, "CN=expired");
    check_up(p.d, alice->pin, "CN=alice");
    check_accept(p.l, expired->pin, "CN=expired");
    part(&p);
}

static void test_other_pins(void) {
    const pki *alice = person(ALICE), *bob = person(BOB), *self = person(SELF);
    netchan_options lo = pin_options(alice, bob->pin), o = pin_options(bob, self->pin);
    told t = FALL_OUT("the listener is another", &lo, &o);
    SAYS("what came", t.dialler, alice->pin);
    SAYS("what was expected", t.dialler, self->pin);
    SAYS("the listener hears", t.listener, "pin|certificate");
    o = pin_options(self, alice->pin);
    t = FALL_OUT("the dialler is another", &lo, &o);
    SAYS("what came", t.listener, self->pin);
    SAYS("what was expected", t.listener, bob->pin);
    SAYS("what came", t.dialler, self->pin);
    SAYS("the dialler hears", t.dialler, "pin");
    o = pin_options(self, bob->pin);
    t = FALL_OUT("both are", &lo, &o);
    SAYS("the dialler is the first to see", t.dialler, alice->pin);
    o = pin_options(bob, alice->pin);
    o.cert = o.cert_key = NULL;
    t = FALL_OUT("a certificate that is made for the moment", &lo, &o);
    SAYS("what was expected", t.listener, bob->pin);
    SAYS("the dialler hears", t.dialler, "pin");
}

/* Any of several will do. */
static void test_rotation_of_pins(void) {
    const pki *alice = person(ALICE), *bob = person(BOB), *self = person(SELF);
    char list[512];
    static const char *const forms[] = {"%s %s", "%s\n%s\n", "%s,%s", "\n%s\r\n%s", "%s, %s", " %s  ,\t%s ,"};
    for (size_t i = 0; i < 2 * sizeof forms / sizeof *forms; i++) {
        bool last = i % 2;
        snprintf(list, sizeof list, forms[i / 2], last ? self->pin : bob->pin, last ? bob->pin : self->pin);
        netchan_options lo = pin_options(alice, list), o = pin_options(bob, alice->pin);
        check_join(&lo, &o);
        check_join(&o, &lo);
    }
    snprintf(list, sizeof list, "%s %s", alice->pin, bob->pin);
    netchan_options lo = pin_options(alice, list), o = pin_options(self, alice->pin);
    told t = FALL_OUT("the dialler is none of them", &lo, &o);
    SAYS("what came", t.listener, self->pin);
    SAYS("what came", t.dialler, self->pin);
    lo = pin_options(self, self->pin);
    o = pin_options(self, list);
    t = FALL_OUT("the listener is none of them", &lo, &o);
    SAYS("what came", t.dialler, self->pin);
    SAYS("what was expected", t.dialler, "pin");
}

static void test_bad_pins(void) {
    static const char *const bad[] = {
        "", " ", ",", "\n,\n", "sha256:", "sha256:00", "b1946ac92492d2347c6235b4d2611184",
        "b1946ac92492d2347c6235b4d2611184b1946ac92492d2347c6235b4d2611184",
        "sha256:zz946ac92492d2347c6235b4d2611184b1946ac92492d2347c6235b4d2611184",
        "sha256:b1946ac92492d2347c6235b4d2611184b1946ac92492d2347c6235b4d261118",
        "sha256:b1946ac92492d2347c6235b4d2611184b1946ac92492d2347c6235b4d26111844",
        "sha1:b1946ac92492d2347c6235b4d2611184b1946ac92492d2347c6235b4d2611184",
        "sha256:b1946ac92492d2347c6235b4d2611184b1946ac92492d2347c6235b4d2611184;",
        "sha256: b1946ac92492d2347c6235b4d2611184b1946ac92492d2347c6235b4d2611184"};
    char list[512];
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        netchan_options o = pin_options(person(ALICE), bad[i]);
        REFUSED_WITH(&o, "netchan_fingerprint");
        check_error(__LINE__, bad[i], "pin");
        snprintf(list, sizeof list, "%s,%s", people[ALICE].pin, bad[i]);
        o.pin = list; /* a good one does not make up for it */
        if (strspn(bad[i], " ,\n") < strlen(bad[i])) REFUSED_WITH(&o, "netchan_fingerprint");
    }
    netchan_options o = pin_options(person(ALICE), "/no/such/file"); /* a path is none: "file:" is missing */
    REFUSED_WITH(&o, "netchan_fingerprint");
}

static void test_too_many_pins(void) {
    char *text = (char *)malloc(MANY * 72 + 1), *end = text;
    CHECK(text);
    for (int i = 0; i < MANY; i++) end += snprintf(end, 73, "sha256:%064d,", i);
    netchan_options o = pin_options(person(ALICE), text);
    REFUSED_WITH(&o, "pin");
    check_error(__LINE__, "how many", "at most|too many|more than");
    free(text);
}

/* People write it in capitals, too, and say it twice. */
static void test_forms_of_pins(void) {
    const pki *alice = person(ALICE), *bob = person(BOB);
    char text[512], capitals[NETCHAN_FINGERPRINT_SIZE];
    strcpy(capitals, alice->pin);
    for (char *c = capitals + 7; *c; c++) *c = (char)(*c >= 'a' ? *c - 'a' + 'A' : *c);
    snprintf(text, sizeof text, "%s,%s,%s", capitals, alice->pin, alice->pin);
    netchan_options lo = pin_options(alice, bob->pin), o = pin_options(bob, text);
    check_join(&lo, &o);
}

/* --- authorities -------------------------------------------------------------------------------------------------- */

static void test_ca(void) {
    const pki *server = person(SERVER), *client = person(CLIENT);
    netchan_options lo = ca_options(server, authority.cert), o = ca_options(client, authority.cert);
    pair p;
    p.l = listen_with(&lo);
    p.d = dial_with(p.l->address, &o);
    check_works(p.l, p.d);
    check_up(p.l, client->pin, "CN=client");
    check_up(p.d, server->pin, "CN=server");
    check_accept(p.l, client->pin, "CN=client");
    part(&p);
    lo.peer_name = "peer.example";
    check_join(&lo, &o);
}

/* Who is wrong with an authority, on both sides, and why. */
static const struct {
    int who;
    const char *says;
} wrongs[] = {
    {EXPIRED, "expired"}, {UNBORN, "is good from"}, {FOREIGN, "options.ca"},
    {SELF, "options.ca"}, {USURPED, "options.ca"},  {WEAK, "weak"},
};

static const char *subject_of(int who) {
    static pki_wish wish;
    wish_for(who, &wish);
    return wish.subject;
}

static void test_wrong_listeners(void) {
    for (size_t i = 0; i < sizeof wrongs / sizeof *wrongs; i++) {
        const char *name = subject_of(wrongs[i].who);
        netchan_options lo = ca_options(person(wrongs[i].who), authority.cert);
        netchan_options o = ca_options(person(ALICE), authority.cert);
        told t = FALL_OUT(name, &lo, &o);
        SAYS(name, t.dialler, wrongs[i].says);
        SAYS("who it is", t.dialler, name);
        SAYS(name, t.listener, "certificate");
    }
}

static void test_wrong_diallers(void) {
    for (size_t i = 0; i < sizeof wrongs / sizeof *wrongs; i++) {
        const char *name = subject_of(wrongs[i].who);
        netchan_options lo = ca_options(person(ALICE), authority.cert);
        netchan_options o = ca_options(person(wrongs[i].who), authority.cert);
        told t = FALL_OUT(name, &lo, &o);
        SAYS(name, t.listener, wrongs[i].says);
        SAYS("who it is", t.listener, name);
        SAYS(name, t.dialler, wrongs[i].says);
    }
}

/* Two authorities in one text: the old and the new. */
static void test_rotation_of_authorities(void) {
    char both[2 * PKI_PEM];
    const pki *alice = person(ALICE), *foreign = person(FOREIGN);
    for (int i = 0; i < 2; i++) {
        snprintf(both, sizeof both, "%s%s", i ? authority.cert : foreign_authority.cert,
                 i ? foreign_authority.cert : authority.cert);
        netchan_options lo = ca_options(alice, both), o = ca_options(foreign, authority.cert);
        check_join(&lo, &o);
        o = ca_options(foreign, both);
        check_join(&o, &lo);
        check_join(&o, &o);
    }
}

/* Between who is trusted and who shows up there may be others, who are authorities and come with the certificate. */
static void test_intermediate_authority(void) {
    static pki middle, end;
    static char chain[2 * PKI_PEM];
    pki_wish wish;
    const pki *alice = person(ALICE);
    memset(&wish, 0, sizeof wish);
    wish.subject = "CN=middle";
    wish.issuer = &authority;
    wish.ca = true;
    pki_make(&middle, &wish);
    wish.subject = "CN=end";
    wish.issuer = &middle;
    wish.ca = false;
    wish.ip[0] = "127.0.0.1";
    pki_make(&end, &wish);
    keep_secret(end.key);
    snprintf(chain, sizeof chain, "%s%s", end.cert, middle.cert);
    netchan_options lo = ca_options(&end, authority.cert), o = ca_options(alice, authority.cert);
    lo.cert = chain;
    check_join(&lo, &o);
    check_join(&o, &lo);
    lo.cert = end.cert;
    told t = FALL_OUT("without the one between", &lo, &o);
    SAYS("listener", t.dialler, "options.ca");
    t = FALL_OUT("without the one between", &o, &lo);
    SAYS("dialler", t.listener, "options.ca");
    SAYS("dialler", t.dialler, "options.ca");
    snprintf(chain, sizeof chain, "%s%s", person(USURPED)->cert, alice->cert);
    lo = ca_options(person(USURPED), authority.cert);
    lo.cert = chain;
    t = FALL_OUT("the one between is no authority", &lo, &o);
    SAYS("listener", t.dialler, "options.ca");
    t = FALL_OUT("the one between is no authority", &o, &lo);
    SAYS("dialler", t.listener, "options.ca");
}

static void test_bad_authorities(void) {
    static char text[3 * PKI_PEM];
    static const char half[] = "-----BEGIN CERTIFICATE-----\nMIIBAAAA\n-----END CERTIFICATE-----\n";
    const char *const bad[] = {"", " ", "nonsense", "/nowhere/ca.pem", half, "-----BEGIN CERTIFICATE-----\n",
                               person(ALICE)->key, text};
    snprintf(text, sizeof text, "%s%s%s", authority.cert, half, foreign_authority.cert); /* one cannot be read */
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        netchan_options o = ca_options(person(ALICE), bad[i]);
        REFUSED_WITH(&o, "options.ca");
    }
    netchan_options o = ca_options(person(ALICE), authority.cert);
    o.cert = o.cert_key = NULL; /* nobody could trust what is made for the moment */
    REFUSED_WITH(&o, "options.cert");
}

/* --- names -------------------------------------------------------------------------------------------------------- */

/* A certificate for these names and no address, by the authority. */
static pki *named(const char *dns, const char *ip, size_t dns_size) {
    static pki who[8];
    static size_t count;
    pki_wish wish;
    person(ALICE);
    memset(&wish, 0, sizeof wish);
    CHECK(count < sizeof who / sizeof *who);
    wish.subject = "CN=named";
    wish.issuer = &authority;
    wish.dns[0] = dns;
    wish.dns_size = dns_size;
    wish.ip[0] = ip;
    pki_make(&who[count], &wish);
    keep_secret(who[count].key);
    return &who[count++];
}

/* Who has this certificate is, or is not, taken for peer_name, as a listener and as a dialler. */
static void check_name(const pki *who, const char *peer_name, bool good) {
    netchan_options theirs = ca_options(who, authority.cert), ours = ca_options(person(ALICE), authority.cert);
    theirs.peer_name = "localhost"; /* whose certificate is Alice's, however it is dialled */
    ours.peer_name = peer_name;
    if (good) {
        check_join(&theirs, &ours);
        check_join(&ours, &theirs);
        return;
    }
    told t = FALL_OUT(peer_name, &theirs, &ours);
    SAYS("what was expected", t.dialler, peer_name);
    SAYS("what came", t.dialler, "CN=named|named.example|192.0.2.7");
    SAYS("the listener hears", t.listener, "certificate");
    t = FALL_OUT(peer_name, &ours, &theirs);
    SAYS("what was expected", t.listener, peer_name);
    SAYS("what came", t.listener, "CN=named|named.example|192.0.2.7");
    SAYS("the dialler hears", t.dialler, peer_name);
}

static void test_names(void) {
    const pki *who = named("named.example", "192.0.2.7", 0);
    check_name(who, "named.example", true);
    check_name(who, "NAMED.Example", true);
    check_name(who, "192.0.2.7", true);
    check_name(who, "192.0.2.8", false);
    check_name(who, "other.example", false);
    check_name(who, "example", false);
    check_name(who, "sub.named.example", false);
    check_name(who, "amed.example", false);
}

static void test_wildcards(void) {
    const pki *who = named("*.named.example", NULL, 0);
    check_name(who, "a.named.example", true);
    check_name(who, "named.example", false);
    check_name(who, "a.b.named.example", false);
    check_name(who, "anamed.example", false);
    check_name(who, "127.0.0.1", false);
}

/* What a certificate says after a NUL, or almost says, makes it nobody else. */
static void test_tricky_names(void) {
    static const char cut[] = "victim.example\0.named.example";
    check_name(named(cut, NULL, sizeof cut - 1), "victim.example", false);
    check_name(named("named.example", NULL, 0), "named.example.", false);
    check_name(named("named.example", "2001:db8::7", 0), "2001:db8::8", false);
    check_name(named("named.example", "2001:db8::7", 0), "2001:db8:0:0::7", true);
}

/* Without peer_name the name is that which is dialled, as it is written. */
static void test_name_is_that_dialled(void) {
    const pki *by_address = named("named.example", "127.0.0.1", 0), *by_name = named("localhost", "192.0.2.7", 0);
    netchan_options o = ca_options(person(ALICE), authority.cert);
    for (int i = 0; i < 2; i++) {
        netchan_options lo = ca_options(i ? by_name : by_address, authority.cert);
        netchan_link *l = listen_with(&lo);
        char address[2][64], text[TEXT];
        for (int j = 0; j < 2; j++)
            snprintf(address[j], sizeof address[j], "%s:%d", j ? "localhost" : "127.0.0.1", port_of(l->address));
        netchan_link *d = dial_with(address[i], &o);
        check_works(l, d);
        hang_up(d);
        hear_failure(__LINE__, "other name", address[1 - i], &o, text);
        SAYS("what was expected", text, i ? "127.0.0.1" : "localhost");
        SAYS("what came", text, "CN=named|named.example|localhost");
        hang_up(l);
    }
    CHECK_INT(alloc_blocks(), 0);
}

/* Each address of a list has its own name. */
static void test_name_in_a_list(void) {
    netchan_options lo = ca_options(named("named.example", "127.0.0.1", 0), authority.cert);
    netchan_options o = ca_options(person(ALICE), authority.cert);
    netchan_link *l = listen_with(&lo);
    uint16_t port;
    int held = hold_port(&port);
    char list[128];
    snprintf(list, sizeof list, "localhost:%d,%s", port, l->address);
    netchan_link *d = dial_with(list, &o);
    check_works(l, d);
    hang_up(d);
    hang_up(l);
    close(held);
    CHECK_INT(alloc_blocks(), 0);
}

static void test_name_over_ipv6(void) {
    netchan_options lo = ca_options(named("named.example", "::1", 0), authority.cert);
    netchan_options o = ca_options(person(ALICE), authority.cert);
    netchan_link *l = netchan_listen("[::1]:0", &lo);
    if (!l) return; /* no IPv6 here */
    netchan_link *d = dial_with(l->address, &o);
    check_works(l, d);
    hang_up(d);
    hang_up(l);
    CHECK_INT(alloc_blocks(), 0);
}

/* The name is asked for again when a link is dialled anew. */
static void test_name_after_a_break(void) {
    netchan_options lo = ca_options(person(ALICE), authority.cert), o = ca_options(person(BOB), authority.cert);
    shaky s;
    shaky_join(&s, &lo, &o);
    for (int i = 0; i < 3; i++) {
        check_works(s.l, s.d);
        proxy_cut(&s.p);
        netchan_value v = wait_event(s.d, "resumed");
        netchan_clear(&v);
    }
    check_works(s.l, s.d);
    shaky_part(&s);
}

static void test_peer_name_needs_a_ca(void) {
    netchan_options all[3];
    all[0] = key_options(keys[0]);
    all[1] = pin_options(person(ALICE), person(BOB)->pin);
    all[2] = insecure_options();
    for (int i = 0; i < 3; i++) {
        all[i].peer_name = "peer.example";
        REFUSED_WITH(&all[i], "peer_name");
    }
    netchan_options o = ca_options(person(ALICE), authority.cert);
    o.peer_name = ""; /* would be anybody's */
    REFUSED_WITH(&o, "peer_name");
}

/* --- kinds of trust ----------------------------------------------------------------------------------------------- */

enum { BY_KEY, BY_PIN, BY_CA, BY_NOTHING, KINDS };
static const char *const kind_names[KINDS] = {"shared_key", "pin", "ca", "insecure"};

/* Options of this kind, for who trusts only the one with this pin, or whom this authority vouches for. */
static netchan_options options_of(int kind, const pki *me, const char *pin) {
    netchan_options o = kind == BY_KEY   ? key_options(keys[0])
                        : kind == BY_PIN ? pin_options(me, pin)
                        : kind == BY_CA  ? ca_options(me, authority.cert)
                                         : insecure_options();
    return o;
}

static void test_nothing_says_whom_to_trust(void) {
    netchan_options o = plain_options();
    static const char *const advice[] = {"shared_key", "netchan_keygen", "pin", "ca", "insecure"};
    for (size_t i = 0; i < sizeof advice / sizeof *advice; i++) REFUSED_WITH(&o, advice[i]);
    CHECK(!netchan_listen("127.0.0.1:0", NULL));
    check_error(__LINE__, "no options", "netchan_keygen");
    CHECK(!netchan_dial("127.0.0.1:1", NULL));
    check_error(__LINE__, "no options", "netchan_keygen");
}

static void test_two_kinds_at_once(void) {
    const pki *alice = person(ALICE), *bob = person(BOB);
    for (int i = 0; i < KINDS; i++) {
        for (int j = 0; j < i; j++) {
            netchan_options o = options_of(i, alice, bob->pin), other = options_of(j, alice, bob->pin);
            if (other.shared_key) o.shared_key = other.shared_key;
            if (other.pin) o.pin = other.pin;
            if (other.ca) o.ca = other.ca;
            REFUSED_WITH(&o, "more than one");
            check_error(__LINE__, kind_names[i], kind_names[i]);
            check_error(__LINE__, kind_names[j], kind_names[j]);
        }
    }
}

/* Neither side is content with what the other shows, and neither waits for it to change its mind. */
static void test_kinds_that_do_not_agree(void) {
    const pki *me = person(FOREIGN), *nobody = person(BOB);
    for (int i = 0; i < KINDS; i++) {
        for (int j = 0; j < KINDS; j++) {
            char label[64], words[64];
            if (i == j) continue;
            netchan_options lo = options_of(i, me, nobody->pin), o = options_of(j, me, nobody->pin);
            snprintf(label, sizeof label, "%s dials %s", kind_names[j], kind_names[i]);
            told t = FALL_OUT(label, &lo, &o);
            bool first = j == BY_PIN || j == BY_CA; /* the dialler is the first to see a certificate */
            if (i == BY_KEY || j == BY_KEY) {
                snprintf(words, sizeof words, "%s|shared_key", kind_names[j]);
                SAYS(label, t.dialler, words);
                snprintf(words, sizeof words, "%s|shared_key", kind_names[i]);
                SAYS(label, t.listener, words);
            } else {
                SAYS(label, t.dialler, first ? kind_names[j] : kind_names[i]);
                SAYS(label, t.listener, first ? "certificate" : kind_names[i]);
            }
        }
    }
}

/* With certificates each side trusts in its own way, and both may be content. */
static void test_kinds_that_agree(void) {
    const pki *alice = person(ALICE), *bob = person(BOB);
    for (int i = BY_PIN; i < KINDS; i++) {
        for (int j = BY_PIN; j < KINDS; j++) {
            netchan_options lo = options_of(i, alice, bob->pin), o = options_of(j, bob, alice->pin);
            lo.cert = alice->cert, lo.cert_key = alice->key;
            o.cert = bob->cert, o.cert_key = bob->key;
            pair p;
            p.l = listen_with(&lo);
            p.d = dial_with(p.l->address, &o);
            check_works(p.l, p.d);
            check_up(p.l, bob->pin, "CN=bob");
            check_up(p.d, alice->pin, "CN=alice");
            part(&p);
        }
    }
}

/* --- certificates and keys that are no good ----------------------------------------------------------------------- */

static void test_bad_private_keys(void) {
    static const char *const locked[] = {
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIBAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
        "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,"
        "00112233445566778899AABBCCDDEEFF\n\nMIIBAAAA\n-----END EC PRIVATE KEY-----\n"};
    static const char *const bad[] = {"", "nonsense", "/nowhere/file.pem", "-----BEGIN EC PRIVATE KEY-----\n"};
    const pki *alice = person(ALICE), *bob = person(BOB);
    netchan_options o = pin_options(alice, bob->pin);
    o.cert_key = bob->key;
    REFUSED_WITH(&o, "not the key of options.cert");
    for (size_t i = 0; i < 2; i++) {
        o.cert_key = locked[i];
        REFUSED_WITH(&o, "encrypted|password");
        check_error(__LINE__, "which", "options.cert_key");
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        o.cert_key = bad[i];
        REFUSED_WITH(&o, "options.cert_key");
    }
    o.cert_key = alice->cert; /* the two are confused */
    REFUSED_WITH(&o, "options.cert_key");
    o.cert = alice->key;
    REFUSED_WITH(&o, "options.cert");
}

static void test_bad_certificates(void) {
    static const char *const bad[] = {"", "nonsense", "/nowhere/file.pem", "-----BEGIN CERTIFICATE-----\n",
                                      "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"};
    const pki *alice = person(ALICE), *bob = person(BOB);
    netchan_options o = pin_options(alice, bob->pin);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        o.cert = bad[i];
        REFUSED_WITH(&o, "options.cert");
    }
    o.cert = alice->cert;
    o.cert_key = NULL;
    REFUSED_WITH(&o, "cert_key");
    o.cert = NULL;
    o.cert_key = alice->key;
    REFUSED_WITH(&o, "cert");
    o = key_options(keys[0]);
    o.cert = alice->cert;
    o.cert_key = alice->key;
    REFUSED_WITH(&o, "cert"); /* who sets both means something else than happens */
}

/* --- the callback that may say no --------------------------------------------------------------------------------- */

/* Who stands at the door. */
typedef struct guard {
    netchan_link *link; /* whose statistics it reads: no lock is held; atomic */
    netchan *book;      /* where it writes who came */
    bool refuses;       /* atomic */
    int calls;          /* atomic */
    bool listening;
    char identity[128], name[TEXT], address[128];
} guard;

static bool ask_guard(void *arg, const netchan_identity *who) {
    guard *g = (guard *)arg;
    netchan_link *link = __atomic_load_n(&g->link, __ATOMIC_ACQUIRE);
    netchan_stats stats;
    snprintf(g->identity, sizeof g->identity, "%s", who->identity);
    snprintf(g->name, sizeof g->name, "%s", who->name);
    snprintf(g->address, sizeof g->address, "%s", who->address);
    g->listening = who->listening;
    if (link) CHECK_INT(netchan_get_stats(link, &stats), NETCHAN_OK);
    if (g->book) CHECK_INT(netchan_send(g->book, netchan_str(who->identity), NETCHAN_NOWAIT), NETCHAN_OK);
    __atomic_add_fetch(&g->calls, 1, __ATOMIC_RELEASE);
    return !__atomic_load_n(&g->refuses, __ATOMIC_ACQUIRE);
}

static int calls_of(guard *g) {
    return __atomic_load_n(&g->calls, __ATOMIC_ACQUIRE);
}

static void set_refuses(guard *g, bool refuses) {
    __atomic_store_n(&g->refuses, refuses, __ATOMIC_RELEASE);
}

static netchan_options guarded(netchan_options o, guard *g) {
    memset(g, 0, sizeof *g);
    o.allow = ask_guard;
    o.allow_arg = g;
    return o;
}

/* Each side's guard sees the other before the first value of it arrives. */
static void test_allow_sees_who_comes(void) {
    const pki *alice = person(ALICE), *bob = person(BOB);
    for (int kind = 0; kind < KINDS; kind++) {
        guard at_door, at_home;
        netchan_options lo = guarded(options_of(kind, alice, bob->pin), &at_door);
        netchan_options o = guarded(options_of(kind, bob, alice->pin), &at_home);
        bool known = kind == BY_PIN || kind == BY_CA;
        netchan *book = at_door.book = netchan_make(16);
        netchan_value v;
        pair p;
        p.l = listen_with(&lo);
        __atomic_store_n(&at_door.link, p.l, __ATOMIC_RELEASE);
        p.d = dial_with(p.l->address, &o);
        CHECK_INT(calls_of(&at_home), 1);
        CHECK_INT(calls_of(&at_door), 1);
        check_works(p.l, p.d);
        CHECK(at_home.listening && !at_door.listening);
        CHECK_STR(at_home.address, p.l->address);
        CHECK_INT(strncmp(at_door.address, "127.0.0.1:", 10), 0);
        if (known || kind == BY_KEY) CHECK_STR(at_door.identity, known ? bob->pin : id_of(keys[0]));
        if (known || kind == BY_KEY) CHECK_STR(at_home.identity, known ? alice->pin : id_of(keys[0]));
        if (kind != BY_NOTHING) CHECK_STR(at_door.name, known ? "CN=bob" : "");
        if (kind != BY_NOTHING) CHECK_STR(at_home.name, known ? "CN=alice" : "");
        CHECK_INT(netchan_recv(book, &v, NETCHAN_NOWAIT), NETCHAN_OK);
        CHECK_STR(netchan_as_str(&v, ""), at_door.identity);
        netchan_clear(&v);
        netchan_free(book);
        part(&p);
        CHECK_INT(calls_of(&at_home) + calls_of(&at_door), 2);
    }
}

static void test_allow_refuses(void) {
    const pki *alice = person(ALICE), *bob = person(BOB);
    for (int i = 0; i < 2 * KINDS; i++) {
        int kind = i / 2;
        bool at_listener = i % 2;
        guard g;
        netchan_options lo = options_of(kind, alice, bob->pin), o = options_of(kind, bob, alice->pin);
        if (at_listener) lo = guarded(lo, &g);
        else o = guarded(o, &g);
        set_refuses(&g, true);
        o.buffer = 10;
        told t = FALL_OUT(kind_names[kind], &lo, &o);
        CHECK_INT(calls_of(&g), 1);
        SAYS(kind_names[kind], at_listener ? t.listener : t.dialler, "options.allow");
        SAYS(kind_names[kind], at_listener ? t.dialler : t.listener, "refuse|allow");
    }
}

/* Who is refused is never asked when it has not proved itself. */
static void test_allow_is_not_asked_about_strangers(void) {
    const pki *alice = person(ALICE), *bob = person(BOB), *self = person(SELF);
    guard at_door, at_home;
    for (int kind = BY_KEY; kind <= BY_CA; kind++) {
        netchan_options lo = guarded(options_of(kind, alice, bob->pin), &at_door);
        netchan_options o = guarded(options_of(kind, self, alice->pin), &at_home);
        if (kind == BY_KEY) o.shared_key = keys[1];
        FALL_OUT(kind_names[kind], &lo, &o);
        CHECK_INT(calls_of(&at_door), 0);
    }
}

/* A link that is dialled anew passes the guards again, and one who is no longer welcome is not let in. */
static void test_allow_is_asked_again(void) {
    guard at_door, at_home;
    netchan_options lo = guarded(key_options(keys[0]), &at_door), o = guarded(key_options(keys[0]), &at_home);
    shaky s;
    lo.resume_ms = o.resume_ms = 1000;
    o.linger_ms = 100;
    o.buffer = 10;
    shaky_join(&s, &lo, &o);
    check_works(s.l, s.d);
    for (int i = 0; i < 3; i++) {
        proxy_cut(&s.p);
        netchan_value v = wait_event(s.d, "resumed");
        netchan_clear(&v);
        check_works(s.l, s.d);
        CHECK(calls_of(&at_door) >= 2 + i && calls_of(&at_home) >= 2 + i);
    }
    set_refuses(&at_door, true);
    proxy_cut(&s.p);
    netchan_value v;
    v = next_event(s.l, "down");
    netchan_clear(&v);
    v = next_event(s.l, "rejected");
    SAYS("on resumption", text_of(&v, "reason"), "options.allow");
    netchan_clear(&v);
    netchan_send(s.d->send, netchan_int(666), NETCHAN_NOWAIT); /* waits in the buffer, or fails */
    v = wait_event(s.l, "lost");
    netchan_clear(&v);
    test_pause(SHORT);
    CHECK_INT(netchan_recv(s.l->recv, &v, NETCHAN_NOWAIT), NETCHAN_ETIMEDOUT);
    hang_up(s.l);
    proxy_stop(&s.p);
    netchan_hangup(s.d, NULL);
    CHECK_INT(alloc_blocks(), 0);
}

/* The dialler's guard, likewise. */
static void test_allow_is_asked_again_at_the_dialler(void) {
    guard at_home;
    netchan_options lo = key_options(keys[0]), o = guarded(key_options(keys[0]), &at_home);
    shaky s;
    lo.resume_ms = o.resume_ms = 300;
    shaky_join(&s, &lo, &o);
    check_works(s.l, s.d);
    set_refuses(&at_home, true);
    proxy_cut(&s.p);
    netchan_value v = wait_event(s.d, "lost");
    netchan_clear(&v);
    CHECK(calls_of(&at_home) >= 2);
    CHECK(netchan_send(s.l->send, netchan_int(666), SHORT) != NETCHAN_OK);
    CHECK(netchan_recv(s.d->recv, &v, SHORT) != NETCHAN_OK);
    set_refuses(&at_home, false); /* and is let in again, in a new session */
    wait_peer(s.d, "up");
    check_works(s.l, s.d);
    shaky_part(&s);
}

/* --- names in certificates ---------------------------------------------------------------------------------------- */

/* The listener's guard sees the subject of who dials. */
static void check_subject(const char *subject, const char *name) {
    static pki who;
    guard g;
    pki_wish wish;
    memset(&wish, 0, sizeof wish);
    wish.subject = subject;
    pki_make(&who, &wish);
    secret_count = 0;
    keep_secret(who.key);
    netchan_options lo = guarded(pin_options(person(ALICE), who.pin), &g), o = pin_options(&who, people[ALICE].pin);
    check_join(&lo, &o);
    CHECK_STR(g.name, name);
}

/* What somebody puts into a name cannot be taken for something else: O=admin, a new line, colours of a terminal. */
static void test_subjects(void) {
    check_subject("CN=alice", "CN=alice");
    check_subject("CN=alice,O=example", "CN=alice, O=example");
    check_subject("CN=alice\\, O\\=admin", "CN=alice\\, O\\=admin");
    check_subject("CN=a\\0Ab\\1B[31m", "CN=a\\0Ab\\1B[31m");
}

/* A name that is too long is none: half of it may be another's. */
static void test_long_subject(void) {
    static const char *const parts[] = {"O", "OU", "L", "ST", "title"};
    static pki who;
    char subject[512] = "CN=alice", unit[80];
    guard g;
    pki_wish wish;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        snprintf(unit, sizeof unit, ",%s=%050d", parts[i], (int)i);
        strcat(subject, unit);
    }
    CHECK(strlen(subject) > 255);
    memset(&wish, 0, sizeof wish);
    wish.subject = subject;
    pki_make(&who, &wish);
    keep_secret(who.key);
    netchan_options lo = guarded(pin_options(person(ALICE), who.pin), &g), o = pin_options(&who, people[ALICE].pin);
    check_join(&lo, &o);
    CHECK_INT(calls_of(&g), 1);
    CHECK_STR(g.name, "");
}

/* --- strangers with a TLS of their own ---------------------------------------------------------------------------- */

/* With what somebody comes. All zero: TLS 1.3 with the right protocol, without a certificate or a key. */
typedef struct badge {
    const char *key, *id;  /* the key that is used, and the id that is shown for it */
    bool key_alone;        /* without a Diffie-Hellman exchange: psk_ke */
    const pki *who;
    const char *protocol;  /* "": none */
    bool old;              /* TLS 1.2 */
    const char *says;      /* instead of TLS, says_size bytes */
    size_t says_size;
} badge;

typedef struct raw {
    int fd;
    mbedtls_ssl_context ssl;
    mbedtls_ssl_config conf;
    mbedtls_x509_crt cert;
    mbedtls_pk_context key;
    const char *protocols[2];
} raw;

static bool wait_for_fd(int fd, short events) {
    struct pollfd p = {fd, events, 0};
    return poll(&p, 1, LONG) == 1;
}

static int raw_pull(void *arg, unsigned char *data, size_t size) {
    ssize_t n = recv(((raw *)arg)->fd, data, size, 0);
    if (n >= 0) return (int)n;
    return errno == EAGAIN || errno == EWOULDBLOCK ? MBEDTLS_ERR_SSL_WANT_READ : MBEDTLS_ERR_SSL_CONN_EOF;
}

static int raw_push(void *arg, const unsigned char *data, size_t size) {
    ssize_t n = send(((raw *)arg)->fd, data, size, MSG_NOSIGNAL);
    if (n >= 0) return (int)n;
    return errno == EAGAIN || errno == EWOULDBLOCK ? MBEDTLS_ERR_SSL_WANT_WRITE : MBEDTLS_ERR_SSL_CONN_EOF;
}

/* The shared key as TLS sees it: SHA-256 of a label with its NUL and of the key. */
static void hash_key(const char *key, uint8_t *psk) {
    static const char label[] = "netchan/1 shared key";
    uint8_t text[sizeof label + 64];
    CHECK_INT(strlen(key), 64);
    memcpy(text, label, sizeof label);
    memcpy(text + sizeof label, key, 64);
    CHECK_INT(mbedtls_sha256(text, sizeof text, psk, 0), 0);
    mbedtls_platform_zeroize(text, sizeof text);
}

static void raw_show(raw *r, const badge *b) {
    if (b->key) {
        uint8_t psk[32];
        const char *id = b->id ? b->id : id_of(b->key);
        hash_key(b->key, psk);
        CHECK_INT(mbedtls_ssl_conf_psk(&r->conf, psk, sizeof psk, (const unsigned char *)id, strlen(id)), 0);
        mbedtls_ssl_conf_tls13_key_exchange_modes(&r->conf, b->key_alone
                                                                ? MBEDTLS_SSL_TLS1_3_KEY_EXCHANGE_MODE_PSK
                                                                : MBEDTLS_SSL_TLS1_3_KEY_EXCHANGE_MODE_PSK_EPHEMERAL);
    } else
        mbedtls_ssl_conf_tls13_key_exchange_modes(&r->conf, MBEDTLS_SSL_TLS1_3_KEY_EXCHANGE_MODE_EPHEMERAL);
    if (!b->who) return;
    const char *pem = b->who->cert;
    CHECK_INT(mbedtls_x509_crt_parse(&r->cert, (const unsigned char *)pem, strlen(pem) + 1), 0);
    pki_parse_key(b->who->key, &r->key);
    /* mbedTLS would not show a certificate for another use. */
    r->cert.MBEDTLS_PRIVATE(ext_types) &= ~(MBEDTLS_X509_EXT_KEY_USAGE | MBEDTLS_X509_EXT_EXTENDED_KEY_USAGE);
    CHECK_INT(mbedtls_ssl_conf_own_cert(&r->conf, &r->cert, &r->key), 0);
}

static void raw_set_up(raw *r, const badge *b, bool server) {
    mbedtls_ssl_init(&r->ssl);
    mbedtls_ssl_config_init(&r->conf);
    mbedtls_x509_crt_init(&r->cert);
    mbedtls_pk_init(&r->key);
    int e = mbedtls_ssl_config_defaults(&r->conf, server ? MBEDTLS_SSL_IS_SERVER : MBEDTLS_SSL_IS_CLIENT,
                                        MBEDTLS_SSL_TRANSPORT_STREAM, MBEDTLS_SSL_PRESET_DEFAULT);
    CHECK_INT(e, 0);
    mbedtls_ssl_conf_rng(&r->conf, mbedtls_psa_get_random, MBEDTLS_PSA_RANDOM_STATE);
    mbedtls_ssl_conf_authmode(&r->conf, MBEDTLS_SSL_VERIFY_NONE);
    mbedtls_ssl_conf_max_tls_version(&r->conf, b->old ? MBEDTLS_SSL_VERSION_TLS1_2 : MBEDTLS_SSL_VERSION_TLS1_3);
    mbedtls_ssl_conf_min_tls_version(&r->conf, b->old ? MBEDTLS_SSL_VERSION_TLS1_2 : MBEDTLS_SSL_VERSION_TLS1_3);
    raw_show(r, b);
    r->protocols[0] = b->protocol ? b->protocol : "netchan/1";
    if (!b->protocol || *b->protocol) CHECK_INT(mbedtls_ssl_conf_alpn_protocols(&r->conf, r->protocols), 0);
    CHECK_INT(mbedtls_ssl_setup(&r->ssl, &r->conf), 0);
    CHECK_INT(mbedtls_ssl_set_hostname(&r->ssl, NULL), 0);
    mbedtls_ssl_set_bio(&r->ssl, r, raw_push, raw_pull, NULL);
}

/* Says what there is to say, or goes through the handshake; returns when the other side has closed, or closes itself
 * after an error. */
static void raw_meet(raw *r, const badge *b) {
    uint8_t data[4096];
    int e = 0;
    if (b->says) CHECK_INT(raw_push(r, (const uint8_t *)b->says, b->says_size), (int)b->says_size);
    for (bool shaken = false; e >= 0;) {
        if (b->says) e = raw_pull(r, data, sizeof data);
        else {
            pthread_mutex_lock(&netchan__tls_lock);
            e = shaken ? mbedtls_ssl_read(&r->ssl, data, sizeof data) : mbedtls_ssl_handshake(&r->ssl);
            pthread_mutex_unlock(&netchan__tls_lock);
        }
        if (e == 0 && (shaken || b->says)) return;
        if (e == 0) shaken = true;
        if (e != MBEDTLS_ERR_SSL_WANT_READ && e != MBEDTLS_ERR_SSL_WANT_WRITE) continue;
        CHECK(wait_for_fd(r->fd, e == MBEDTLS_ERR_SSL_WANT_READ ? POLLIN : POLLOUT));
        e = 0;
    }
}

/* One connection from its beginning to its end. */
static void raw_talk(int fd, const badge *b, bool server) {
    raw r;
    memset(&r, 0, sizeof r);
    r.fd = fd;
    CHECK_INT(fcntl(fd, F_SETFL, O_NONBLOCK), 0);
    pthread_mutex_lock(&netchan__tls_lock);
    raw_set_up(&r, b, server);
    pthread_mutex_unlock(&netchan__tls_lock);
    raw_meet(&r, b);
    pthread_mutex_lock(&netchan__tls_lock);
    mbedtls_ssl_free(&r.ssl);
    mbedtls_ssl_config_free(&r.conf);
    mbedtls_x509_crt_free(&r.cert);
    mbedtls_pk_free(&r.key);
    pthread_mutex_unlock(&netchan__tls_lock);
    close(fd);
}

static void raw_dial(const char *address, const badge *b) {
    struct sockaddr_in a = loopback(port_of(address));
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&a, sizeof a) == 0);
    raw_talk(fd, b, false);
}

/* A listener that is no netchan. */
typedef struct impostor {
    int fd, stop[2];
    char address[32];
    const badge *b;
    pthread_t thread;
} impostor;

static void *impostor_main(void *arg) {
    impostor *i = (impostor *)arg;
    for (;;) {
        struct pollfd p[2] = {{i->fd, POLLIN, 0}, {i->stop[0], POLLIN, 0}};
        poll(p, 2, -1);
        if (p[1].revents) return NULL;
        int fd = accept(i->fd, NULL, NULL);
        if (fd >= 0) raw_talk(fd, i->b, true);
    }
}

static void impostor_start(impostor *i, const badge *b) {
    uint16_t port;
    i->b = b;
    i->fd = hold_port(&port);
    CHECK(listen(i->fd, 16) == 0 && pipe(i->stop) == 0);
    snprintf(i->address, sizeof i->address, "127.0.0.1:%d", port);
    i->thread = test_start(impostor_main, i);
}

static void impostor_stop(impostor *i) {
    close(i->stop[1]);
    test_join(i->thread);
    close(i->stop[0]);
    close(i->fd);
}

/* One who dials a listener of this kind: why it is turned away. */
static void check_stranger(int line, const char *label, int kind, const badge *b, const char *words) {
    const pki *alice = person(ALICE), *bob = person(BOB);
    netchan_options lo = options_of(kind, alice, bob->pin);
    char text[128], reason[TEXT];
    netchan_link *l = listen_with(&lo);
    raw_dial(l->address, b);
    hear_rejected(l, reason);
    snprintf(text, sizeof text, "%s dials %s", label, kind_names[kind]);
    if (getenv("TRUST_SHOW")) printf("%s\n    L: %s\n", text, reason);
    check_word(line, text, reason, words);
    hang_up(l);
    CHECK_INT(alloc_blocks(), 0);
}

/* One who is dialled by this kind: what the dialler says. */
static void check_impostor(int line, const char *label, int kind, const badge *b, const char *words) {
    const pki *alice = person(ALICE), *bob = person(BOB);
    netchan_options o = options_of(kind, alice, bob->pin);
    char text[128], sentence[TEXT];
    impostor i;
    impostor_start(&i, b);
    snprintf(text, sizeof text, "%s is dialled by %s", label, kind_names[kind]);
    hear_failure(line, text, i.address, &o, sentence);
    if (getenv("TRUST_SHOW")) printf("%s\n    D: %s\n", text, sentence);
    check_word(line, text, sentence, words);
    impostor_stop(&i);
    CHECK_INT(alloc_blocks(), 0);
}

static void check_both(int line, const char *label, int kind, const badge *b, const char *words) {
    check_stranger(line, label, kind, b, words);
    check_impostor(line, label, kind, b, words);
}

/* What a stranger needs to get as far as the protocol, with a listener or dialler of this kind. */
static badge badge_for(int kind) {
    badge b;
    memset(&b, 0, sizeof b);
    if (kind == BY_KEY) b.key = keys[0];
    else b.who = person(BOB);
    return b;
}

static void test_old_tls(void) {
    for (int kind = 0; kind < KINDS; kind++) {
        badge b = badge_for(kind);
        char words[64];
        b.old = true;
        check_stranger(__LINE__, "TLS 1.2", kind, &b, "TLS 1.3");
        b.key = NULL; /* who has a key in TLS 1.2 shows a certificate as well */
        b.who = person(BOB);
        snprintf(words, sizeof words, "TLS 1.3|%s", kind_names[kind]); /* it says no more than that it cannot agree */
        check_impostor(__LINE__, "TLS 1.2", kind, &b, words);
    }
}

static void test_other_protocols(void) {
    for (int kind = 0; kind < KINDS; kind++) {
        badge b = badge_for(kind);
        b.protocol = "h2";
        check_both(__LINE__, "other protocol", kind, &b, "netchan/1");
        b.protocol = "netchan/2";
        check_both(__LINE__, "later protocol", kind, &b, "netchan/1");
        b.protocol = "";
        check_both(__LINE__, "no protocol", kind, &b, "netchan/1");
    }
}

static void test_plain_text(void) {
    static const char *const texts[] = {"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n", "SSH-2.0-OpenSSH_9.2\r\n",
                                        "220 mail.example ESMTP\r\n", "HTTP/1.1 400 Bad Request\r\n\r\n"};
    for (size_t i = 0; i < 4; i++) {
        badge b = badge_for(BY_KEY);
        b.says = texts[i];
        b.says_size = strlen(texts[i]);
        check_stranger(__LINE__, texts[i], i % KINDS, &b, "TLS");
        check_impostor(__LINE__, texts[i], i % KINDS, &b, "TLS");
    }
}

/* A record that is an alert, as one that ends a handshake which has not got to its keys. */
static void test_alerts(void) {
    static const struct {
        char number;
        const char *name, *by_key, *by_certificate;
    } alerts[] = {{40, "handshake_failure", "shared_key", "pin|ca|trust"},
                  {70, "protocol_version", "TLS 1.3", "TLS 1.3"},
                  {120, "no_application_protocol", "netchan/1", "netchan/1"},
                  {51, "decrypt_error", "shared_key", "certificate"},
                  {115, "unknown_psk_identity", "shared_key", "trust"}};
    for (size_t i = 0; i < sizeof alerts / sizeof *alerts; i++) {
        char record[] = "\x15\x03\x03\0\x02\x02?";
        badge b = badge_for(BY_KEY);
        record[6] = alerts[i].number;
        b.says = record;
        b.says_size = 7;
        check_impostor(__LINE__, alerts[i].name, BY_KEY, &b, alerts[i].by_key);
        check_impostor(__LINE__, alerts[i].name, BY_PIN, &b, alerts[i].by_certificate);
    }
}

/* The right id with another key behind it, ids that are none, and a key without a Diffie-Hellman exchange. */
static void test_forged_keys(void) {
    badge b = badge_for(BY_KEY);
    b.key = keys[1];
    check_stranger(__LINE__, "other key", BY_KEY, &b, id_of(keys[1]));
    b.id = id_of(keys[0]);
    check_both(__LINE__, "forged id", BY_KEY, &b, "shared_key");
    b.id = "n\033[31m\n\"";
    check_stranger(__LINE__, "strange id", BY_KEY, &b, "shared_key");
    b.id = "shared_key:0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000";
    check_stranger(__LINE__, "long id", BY_KEY, &b, "shared_key");
    b = badge_for(BY_KEY);
    b.key_alone = true;
    check_both(__LINE__, "psk_ke", BY_KEY, &b, "shared_key");
}

/* A certificate for another use, shown by somebody who does not care. Our own is refused before anybody sees it. */
static void test_certificates_for_another_use(void) {
    static const int wrong[] = {SIGNER, SEALER, SERVER, CLIENT};
    for (size_t i = 0; i < 4; i++) {
        badge b;
        memset(&b, 0, sizeof b);
        b.who = person(wrong[i]);
        const char *name = subject_of(wrong[i]);
        netchan_options o = ca_options(b.who, authority.cert);
        if (wrong[i] != CLIENT) {
            check_stranger(__LINE__, name, BY_CA, &b, "not for TLS clients");
            check_stranger(__LINE__, name, BY_CA, &b, name);
            CHECK(!netchan_dial("127.0.0.1:1", &o));
            check_error(__LINE__, name, "options.cert");
            check_error(__LINE__, name, "clients");
        }
        if (wrong[i] != SERVER) {
            check_impostor(__LINE__, name, BY_CA, &b, "not for TLS servers");
            check_impostor(__LINE__, name, BY_CA, &b, name);
            CHECK(!netchan_listen("127.0.0.1:0", &o));
            check_error(__LINE__, name, "options.cert");
            check_error(__LINE__, name, "servers");
        }
    }
}

/* No certificate where one is asked for. A dialler always gets one, or there is no TLS without a key. */
static void test_no_certificate(void) {
    badge b;
    memset(&b, 0, sizeof b);
    check_stranger(__LINE__, "no certificate", BY_PIN, &b, "no certificate");
    check_stranger(__LINE__, "no certificate", BY_PIN, &b, "pin");
    check_stranger(__LINE__, "no certificate", BY_CA, &b, "no certificate");
    check_stranger(__LINE__, "no certificate", BY_CA, &b, "options.ca");
    check_stranger(__LINE__, "no key", BY_KEY, &b, "shared_key");
    for (int kind = 0; kind < KINDS; kind++) check_impostor(__LINE__, "nothing", kind, &b, kind_names[kind]);
}

/* A stranger who is the right one, as far as TLS goes, but says nothing that this protocol has, is no peer. */
static void test_right_but_silent(void) {
    const pki *alice = person(ALICE), *bob = person(BOB);
    for (int kind = 0; kind < KINDS; kind++) {
        badge b = badge_for(kind);
        netchan_options o = options_of(kind, alice, bob->pin);
        impostor i;
        o.connect_ms = 300;
        impostor_start(&i, &b);
        CHECK(!netchan_dial(i.address, &o));
        check_error(__LINE__, kind_names[kind], "no connection within");
        impostor_stop(&i);
    }
    CHECK_INT(alloc_blocks(), 0);
}

/* --- what is wiped ------------------------------------------------------------------------------------------------ */

enum { NEEDLES = 8, NEEDLE = 32, MASK = 0x5a };

/* Bytes of secrets, masked, so that they are not what is looked for. */
static struct needle {
    const char *name;
    uint8_t bytes[NEEDLE];
    size_t size;
} needles[NEEDLES];
static size_t needle_count; /* atomic; complete before there is a link */

static void add_needle(const char *name, const void *bytes, size_t size) {
    struct needle *n = &needles[needle_count];
    CHECK(needle_count < NEEDLES && size <= NEEDLE);
    n->name = name;
    n->size = size;
    for (size_t i = 0; i < size; i++) n->bytes[i] = (uint8_t)(((const uint8_t *)bytes)[i] ^ MASK);
    __atomic_add_fetch(&needle_count, 1, __ATOMIC_RELEASE);
}

static bool has_needle(const uint8_t *data, size_t size, const struct needle *n) {
    for (size_t i = 0; i + n->size <= size; i++) {
        const uint8_t *found = (const uint8_t *)memchr(data + i, n->bytes[0] ^ MASK, size - i - n->size + 1);
        if (!found) return false;
        i = (size_t)(found - data);
        size_t k = 1;
        while (k < n->size && (found[k] ^ MASK) == n->bytes[k]) k++;
        if (k == n->size) return true;
    }
    return false;
}

/* Each block begins with its size. */
typedef union header {
    size_t size;
    max_align_t align;
} header;

static void *guarded_malloc(size_t size) {
    header *h = (header *)alloc_malloc(sizeof *h + size);
    if (h) h->size = size;
    return h ? h + 1 : NULL;
}

static void guarded_free(void *block) {
    header *h = block ? (header *)block - 1 : NULL;
    size_t count = __atomic_load_n(&needle_count, __ATOMIC_ACQUIRE);
    for (size_t i = 0; h && i < count; i++)
        if (has_needle((const uint8_t *)block, h->size, &needles[i]))
            test_fail(__FILE__, __LINE__, "the %s is in a block that is let go of", needles[i].name);
    alloc_free(h);
}

static void *guarded_realloc(void *old, size_t size) {
    size_t old_size = old ? ((header *)old - 1)->size : 0;
    void *block = guarded_malloc(size);
    if (block && old) memcpy(block, old, old_size < size ? old_size : size);
    if (block) guarded_free(old);
    return block;
}

/* The files that the child below writes, in this order. */
enum { KEY_FILE, CERT_FILE, CERT_KEY_FILE, SECRET_FILES };

/* What a child that makes the secrets leaves to us, who never had them in our memory. */
typedef struct legacy {
    struct needle needles[NEEDLES];
    size_t count;
    char pin[NETCHAN_FINGERPRINT_SIZE];
} legacy;

static void write_secret(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CREAT, 0600);
    CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text) && close(fd) == 0);
}

/* A shared key: its text and what TLS makes of it. */
static void make_secret_key(const char *path) {
    char key[NETCHAN_KEY_SIZE];
    uint8_t psk[32];
    CHECK_INT(netchan_keygen(key, sizeof key), NETCHAN_OK);
    write_secret(path, key);
    hash_key(key, psk);
    add_needle("shared key", key, NEEDLE);
    add_needle("shared key's end", key + NEEDLE, NEEDLE);
    add_needle("PSK", psk, sizeof psk);
}

/* A private key: some of its PEM text, after what all of them begin with, and the number, whose bytes may be in either
 * order. */
static void make_secret_pki(const char *cert_path, const char *key_path, char *pin) {
    pki who;
    pki_wish wish;
    uint8_t number[32], reversed[32];
    mbedtls_pk_context key;
    memset(&wish, 0, sizeof wish);
    pki_make(&who, &wish);
    write_secret(cert_path, who.cert);
    write_secret(key_path, who.key);
    strcpy(pin, who.pin);
    mbedtls_pk_init(&key);
    pki_parse_key(who.key, &key);
    CHECK_INT(mbedtls_ecp_write_key(mbedtls_pk_ec(key), number, sizeof number), 0);
    for (int i = 0; i < 32; i++) reversed[i] = number[31 - i];
    add_needle("private key's text", strchr(who.key, '\n') + 1 + 16, NEEDLE);
    add_needle("private key", number, sizeof number);
    add_needle("private key, reversed", reversed, sizeof reversed);
    mbedtls_pk_free(&key);
}

/* Before there is a link. "file:PATH" of each file. */
static void inherit_secrets(char files[SECRET_FILES][256], char *pin) {
    static const char *const names[SECRET_FILES] = {"key", "cert", "cert_key"};
    static legacy left;
    int ends[2], status;
    for (int i = 0; i < SECRET_FILES; i++) snprintf(files[i], 256, "file:%s", new_path(names[i]));
    CHECK_INT(pipe(ends), 0);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        make_secret_key(files[KEY_FILE] + 5);
        make_secret_pki(files[CERT_FILE] + 5, files[CERT_KEY_FILE] + 5, left.pin);
        memcpy(left.needles, needles, sizeof needles);
        left.count = needle_count;
        _exit(write(ends[1], &left, sizeof left) == sizeof left ? 0 : 1);
    }
    CHECK(read(ends[0], &left, sizeof left) == sizeof left && waitpid(child, &status, 0) == child && status == 0);
    close(ends[0]);
    close(ends[1]);
    memcpy(needles, left.needles, sizeof needles); /* their names are where they were: it is the same program */
    __atomic_store_n(&needle_count, left.count, __ATOMIC_RELEASE);
    memcpy(pin, left.pin, sizeof left.pin);
}

/* Looks for the needle in all memory of this process that can be written. Returns false where it cannot be known which
 * that is. */
static bool search_memory(const struct needle *n, bool *found) {
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[512], rights[8];
    unsigned long from, to;
    *found = false;
    if (!maps) return false;
    setvbuf(maps, NULL, _IONBF, 0);
    while (fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%lx-%lx %7s", &from, &to, rights) != 3 || strncmp(rights, "rw", 2) || strstr(line, "[v"))
            continue;
        if (has_needle((const uint8_t *)(uintptr_t)from, to - from, n)) *found = true;
    }
    fclose(maps);
    return true;
}

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
enum { SEARCHABLE = 0 }; /* shadows, and memory that is kept from being used again */
#else
enum { SEARCHABLE = 1 };
#endif

static void check_memory(void) {
    bool found;
    for (size_t i = 0; SEARCHABLE && i < needle_count; i++)
        if (search_memory(&needles[i], &found) && found)
            test_fail(__FILE__, __LINE__, "the %s is in memory still", needles[i].name);
}

/* The search finds what is there. */
static void test_search(void) {
    static char secret[] = "this text is in the memory of this process";
    bool found = true;
    add_needle("text", secret, NEEDLE);
    if (SEARCHABLE && search_memory(&needles[0], &found)) CHECK(found);
    memset(secret, 0, sizeof secret);
    if (SEARCHABLE && search_memory(&needles[0], &found)) CHECK(!found);
}

/* These are called so deep that the search does not write over what they leave on the stack. */
enum { DEPTH = 65536 };

static int deep_key_id(const char *key) {
    volatile uint8_t depth[DEPTH];
    char id[64];
    depth[0] = 0;
    return netchan_key_id(key, id, sizeof id) + depth[0];
}

static netchan_link *deep_open(const char *address, const netchan_options *o, bool dials) {
    volatile uint8_t depth[DEPTH];
    depth[0] = 0;
    netchan_link *link = dials ? netchan_dial(address, o) : netchan_listen(address, o);
    return depth[0] ? NULL : link;
}

/* While a link is open nobody has the text of its key; afterwards nobody has what was made of it, either. */
static void test_shared_key_is_wiped(void) {
    char files[SECRET_FILES][256], pin[NETCHAN_FINGERPRINT_SIZE];
    inherit_secrets(files, pin);
    netchan_options o = key_options(files[KEY_FILE]);
    shaky s;
    CHECK_INT(deep_key_id(files[KEY_FILE]), NETCHAN_OK);
    check_memory();
    s.l = deep_open("127.0.0.1:0", &o, false);
    CHECK(s.l);
    proxy_start(&s.p, s.l->address);
    s.d = deep_open(s.p.address, &o, true);
    CHECK(s.d);
    size_t all = needle_count;
    needle_count = 2;
    check_memory();
    needle_count = all;
    check_works(s.l, s.d);
    proxy_cut(&s.p);
    wait_peer(s.d, "resumed");
    check_works(s.l, s.d);
    shaky_part(&s);
    check_memory();
    remove_files();
}

static void test_private_key_is_wiped(void) {
    char files[SECRET_FILES][256], pin[NETCHAN_FINGERPRINT_SIZE];
    inherit_secrets(files, pin);
    netchan_options o = plain_options();
    o.cert = files[CERT_FILE];
    o.cert_key = files[CERT_KEY_FILE];
    o.pin = pin;
    pair p;
    p.l = deep_open("127.0.0.1:0", &o, false);
    CHECK(p.l);
    p.d = deep_open(p.l->address, &o, true);
    CHECK(p.d);
    check_works(p.l, p.d);
    part(&p);
    check_memory();
    remove_files();
}

/* Also when nothing comes of it. */
static void test_wiped_after_a_failure(void) {
    char files[SECRET_FILES][256], pin[NETCHAN_FINGERPRINT_SIZE];
    inherit_secrets(files, pin);
    netchan_options o = key_options(files[KEY_FILE]), other = key_options(keys[1]);
    FALL_OUT("wrong key", &other, &o);
    CHECK(!deep_open("no such address", &o, false));
    check_memory();
    o = plain_options();
    o.cert = files[CERT_FILE];
    o.cert_key = files[CERT_KEY_FILE];
    o.pin = "sha256:00";
    CHECK(!deep_open("127.0.0.1:0", &o, false));
    o.pin = person(BOB)->pin;
    o.cert = people[BOB].cert;
    CHECK(!deep_open("127.0.0.1:0", &o, false)); /* another's certificate */
    o.cert = files[CERT_KEY_FILE];               /* no certificate at all */
    CHECK(!deep_open("127.0.0.1:0", &o, false));
    check_memory();
    remove_files();
}

/* And when memory runs out in the middle. */
static void test_wiped_without_memory(void) {
    char files[SECRET_FILES][256], pin[NETCHAN_FINGERPRINT_SIZE];
    inherit_secrets(files, pin);
    for (int with_pin = 0; with_pin < 2; with_pin++) {
        netchan_options o = plain_options();
        if (!with_pin) o.shared_key = files[KEY_FILE];
        else o.cert = files[CERT_FILE], o.cert_key = files[CERT_KEY_FILE], o.pin = pin;
        o.connect_ms = 1;
        for (long n = 1;; n++) {
            alloc_fail(n);
            netchan_link *l = netchan_listen("127.0.0.1:0", &o);
            CHECK(!netchan_dial("127.0.0.1:1", &o));
            bool failed = alloc_failed();
            alloc_fail(0);
            netchan_hangup(l, NULL);
            CHECK_INT(alloc_blocks(), 0);
            if (!failed) break;
            CHECK(n < 10000);
        }
        check_memory();
    }
    remove_files();
}

/* Whoever lets others read a key is warned. */
static char warning[TEXT];

static void keep_warning(void *arg, int level, const char *text) {
    check_log(arg, level, text);
    if (level == 1 && strstr(text, "read")) snprintf(warning, sizeof warning, "%s", text);
}

static void test_readable_key_file(void) {
    char file[256];
    netchan_options o = key_options(text_file(file, "key", keys[0]));
    o.log = keep_warning;
    check_join(&o, &o);
    CHECK_STR(warning, "");
    CHECK_INT(chmod(file + 5, 0644), 0);
    check_join(&o, &o);
    SAYS("a key that anybody can read", warning, file + 5);
    SAYS("a key that anybody can read", warning, "shared_key");
    remove_files();
}

int main(int argc, char **argv) {
    static const test_entry tests[] = {
        TEST(key_id),
        TEST(shared_key),
        TEST(other_shared_key),
        TEST(rotation_of_shared_keys),
        TEST(rotated_key_is_remembered),
        TEST(weak_shared_keys),
        TEST(forms_of_shared_keys),
        TEST(too_many_shared_keys),
        TEST(path_as_shared_key),
        TEST(shared_key_from_elsewhere),
        TEST(certificates_from_elsewhere),
        TEST(key_from_a_pipe),
        TEST(bad_files),
        TEST(bad_callbacks),
        TEST(readable_key_file),
        TEST(pins),
        TEST(other_pins),
        TEST(rotation_of_pins),
        TEST(bad_pins),
        TEST(too_many_pins),
        TEST(forms_of_pins),
        TEST(ca),
        TEST(wrong_listeners),
        TEST(wrong_diallers),
        TEST(rotation_of_authorities),
        TEST(intermediate_authority),
        TEST(bad_authorities),
        TEST(names),
        TEST(wildcards),
        TEST(tricky_names),
        TEST(name_is_that_dialled),
        TEST(name_in_a_list),
        TEST(name_over_ipv6),
        TEST(name_after_a_break),
        TEST(peer_name_needs_a_ca),
        TEST(nothing_says_whom_to_trust),
        TEST(two_kinds_at_once),
        TEST(kinds_that_do_not_agree),
        TEST(kinds_that_agree),
        TEST(bad_private_keys),
        TEST(bad_certificates),
        TEST(allow_sees_who_comes),
        TEST(allow_refuses),
        TEST(allow_is_not_asked_about_strangers),
        TEST(allow_is_asked_again),
        TEST(allow_is_asked_again_at_the_dialler),
        TEST(subjects),
        TEST(long_subject),
        TEST(old_tls),
        TEST(other_protocols),
        TEST(plain_text),
        TEST(alerts),
        TEST(forged_keys),
        TEST(certificates_for_another_use),
        TEST(no_certificate),
        TEST(right_but_silent),
        TEST(search),
        TEST(shared_key_is_wiped),
        TEST(private_key_is_wiped),
        TEST(wiped_after_a_failure),
        TEST(wiped_without_memory),
        TEST_END,
    };
    return test_main(argc, argv, tests);
}
