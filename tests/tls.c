/* What tls.sh looks at from outside: a listener, a dialler, and who they are.
 *
 *     tls certs DIRECTORY                 makes ca.pem there, and NAME.pem, NAME.key and NAME.pin of some people
 *     tls listen TRUST DIRECTORY          says `listening on ADDRESS`, then what happens, until its input ends
 *     tls dial TRUST DIRECTORY ADDRESS    says `up`, or why not
 *     tls psk, tls identity               what the shared key is for TLS
 *
 * TRUST is ca, pin, insecure or shared_key. */
#include "alloc.h"

#define NETCHAN_IMPLEMENTATION
#include "netchan.h"
#include "test.h"
#include "task.h"
#include "net.h"
#include "pki.h"

static pki authority;

static void write_text(const char *directory, const char *name, const char *ending, const char *text) {
    char path[512];
    snprintf(path, sizeof path, "%s/%s.%s", directory, name, ending);
    FILE *f = fopen(path, "w");
    CHECK(f && fputs(text, f) >= 0 && fclose(f) == 0);
}

/* So many days from now on. Scanners do not like certificates that are good for long. */
static void print_day(char *out, size_t size, int days) {
    time_t t = time(NULL) + (time_t)days * 86400;
    struct tm day;
    CHECK(gmtime_r(&t, &day) && strftime(out, size, "%Y%m%d000000", &day) > 0);
}

/* Somebody of this name, whom the authority vouches for as localhost and 127.0.0.1. */
static void make_person(const char *directory, const char *name, const char *use) {
    static pki who;
    char subject[64], from[32], to[32];
    pki_wish wish;
    memset(&wish, 0, sizeof wish);
    snprintf(subject, sizeof subject, "CN=%s", name);
    print_day(from, sizeof from, -1);
    print_day(to, sizeof to, 89);
    wish.subject = subject;
    wish.issuer = &authority;
    wish.dns[0] = "localhost";
    wish.ip[0] = "127.0.0.1";
    wish.from = from;
    wish.to = to;
    wish.use = use;
    pki_make(&who, &wish);
    write_text(directory, name, "pem", who.cert);
    write_text(directory, name, "key", who.key);
    write_text(directory, name, "pin", who.pin);
}

static int make_certs(const char *directory) {
    pki_make_ca(&authority, "CN=authority");
    write_text(directory, "ca", "pem", authority.cert);
    make_person(directory, "server", MBEDTLS_OID_SERVER_AUTH);
    make_person(directory, "client", MBEDTLS_OID_CLIENT_AUTH);
    pki_make_ca(&authority, "CN=other authority");
    make_person(directory, "other", NULL);
    return 0;
}

/* Each side trusts the other. The texts live as long as the program. */
static netchan_options trust_in(const char *trust, const char *directory, bool dials) {
    static char cert[512], key[512], ca[512], pin[512];
    const char *me = dials ? "client" : "server", *other = dials ? "server" : "client";
    netchan_options o = options();
    bool with_ca = strcmp(trust, "ca") == 0, with_pin = strcmp(trust, "pin") == 0;
    if (strcmp(trust, "shared_key") == 0) return o;
    snprintf(cert, sizeof cert, "%s/%s.pem", directory, me);
    snprintf(key, sizeof key, "%s/%s.key", directory, me);
    snprintf(ca, sizeof ca, "%s/ca.pem", directory);
    snprintf(pin, sizeof pin, "file:%s/%s.pin", directory, other);
    o.shared_key = NULL;
    o.cert = cert;
    o.cert_key = key;
    if (with_ca) o.ca = ca;
    else if (with_pin) o.pin = pin;
    else o.insecure = true;
    return o;
}

/* The next event, if there is one in so many milliseconds, is a line of output. */
static bool tell_event(netchan_link *link, int timeout_ms) {
    netchan_value v;
    if (netchan_recv(link->events, &v, timeout_ms) != NETCHAN_OK) return false;
    printf("%s %s%s\n", text_of(&v, "event"), text_of(&v, "reason"), text_of(&v, "identity"));
    fflush(stdout);
    netchan_clear(&v);
    return true;
}

static int run_listener(const char *trust, const char *directory) {
    netchan_options o = trust_in(trust, directory, false);
    netchan_link *l = netchan_listen("127.0.0.1:0", &o);
    if (!l) return puts(netchan_errmsg()), 1;
    printf("listening on %s\n", l->address);
    fflush(stdout);
    struct pollfd input = {0, POLLIN, 0};
    while (poll(&input, 1, 0) == 0) tell_event(l, 50);
    while (tell_event(l, NETCHAN_NOWAIT)) {}
    netchan_hangup(l, NULL);
    CHECK_INT(alloc_blocks(), 0);
    return 0;
}

static int run_dialler(const char *trust, const char *directory, const char *address) {
    netchan_options o = trust_in(trust, directory, true);
    o.connect_ms = 3000;
    netchan_link *d = netchan_dial(address, &o);
    puts(d ? "up" : netchan_errmsg());
    netchan_hangup(d, NULL);
    CHECK_INT(alloc_blocks(), 0);
    return d ? 0 : 1;
}

/* The first bytes of SHA-256 of a label with its NUL and of the key, in hexadecimal. */
static int print_hash(const char *prefix, const char *label, int size) {
    uint8_t text[64 + sizeof KEY], hash[32];
    size_t length = strlen(label) + 1;
    memcpy(text, label, length);
    memcpy(text + length, KEY, strlen(KEY));
    CHECK_INT(mbedtls_sha256(text, length + strlen(KEY), hash, 0), 0);
    printf("%s", prefix);
    for (int i = 0; i < size; i++) printf("%02x", hash[i]);
    puts("");
    return 0;
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    test_name = "tls";
    if (argc == 2 && strcmp(what, "psk") == 0) return print_hash("", "netchan/1 shared key", 32);
    if (argc == 2 && strcmp(what, "identity") == 0) return print_hash("shared_key:", "netchan/1 key id", 8);
    if (argc == 3 && strcmp(what, "certs") == 0) return make_certs(argv[2]);
    if (argc == 4 && strcmp(what, "listen") == 0) return run_listener(argv[2], argv[3]);
    if (argc == 5 && strcmp(what, "dial") == 0) return run_dialler(argv[2], argv[3], argv[4]);
    fprintf(stderr, "usage: tls certs|listen|dial|psk|identity ...\n");
    return 2;
}
