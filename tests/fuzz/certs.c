/* Fuzzes what section [15] of netchan.h makes of certificates and private keys, as text or DER, from a file's bytes or
 * from options.load, and what it says about a peer's certificate. The first byte of the input chooses, the rest is the
 * certificate. What can be read has the same fingerprint each time, is trusted by its own pin and by no other, and is
 * trusted by the CA only if mbedTLS says so; each sentence is one, and fits. No file is opened. */
#include "fuzz.h"

/* A CA whose certificates are in the corpus. */
static const char ca_text[] =
    "-----BEGIN CERTIFICATE-----\n"
    "MIIBZTCCAQugAwIBAgIBATAKBggqhkjOPQQDAjAhMRAwDgYDVQQDDAd0ZXN0IENB\n"
    "MQ0wCwYDVQQKDARmdXp6MCAXDTIwMDEwMTAwMDAwMFoYDzk5OTkxMjMxMjM1OTU5\n"
    "WjAhMRAwDgYDVQQDDAd0ZXN0IENBMQ0wCwYDVQQKDARmdXp6MFkwEwYHKoZIzj0C\n"
    "AQYIKoZIzj0DAQcDQgAEdClDXe9ZSS5YghaDKGHHKiLPXvdOEwjonklXPDoUGVE4\n"
    "TnLn7amkTNAMqU2PKBGJ1t8A4MgfDNFLw4Q7tTbdA6MyMDAwDwYDVR0TAQH/BAUw\n"
    "AwEB/zAdBgNVHQ4EFgQUMWIwauG8kOKMhqGENeWos+LC7Q8wCgYIKoZIzj0EAwID\n"
    "SAAwRQIgHnoMlaCdOmsBVzvN2sQouI2um+uiPKo1Gqo4NWshf9YCIQCOyu/+nGPR\n"
    "uT6KwPmAyfIl2z8Be0dYhKhoG7os6ux/Mg==\n"
    "-----END CERTIFICATE-----\n";

static netchan__tls ca_trust, pin_trust, any_trust;

static netchan__text text_of(const void *data, size_t size) {
    netchan__text t = {NULL, 0};
    CHECK(netchan__text_make(&t, size));
    if (size) memcpy(t.data, data, size);
    return t;
}

static void make_trust(void) {
    static uint8_t pins[64];
    netchan__text ca = text_of(ca_text, strlen(ca_text));
    CHECK(netchan__crypto_init() == NETCHAN_OK);
    mbedtls_x509_crt_init(&ca_trust.ca);
    CHECK(netchan__set_ca(&ca_trust, &ca) == NETCHAN_OK);
    netchan__text_free(&ca);
    ca_trust.dials = true;
    pin_trust.pins = pins;
    pin_trust.pin_count = 2;
}

static void check_sentence(const char *text, size_t size) {
    CHECK(strlen(text) < size);
    for (; *text; text++) CHECK((unsigned char)*text >= ' ');
}

/* As at the end of a handshake in which the peer showed this certificate. */
static void show(const netchan__tls *trust, mbedtls_x509_crt *cert, uint32_t flags, const uint8_t *hash) {
    static netchan__stream s;
    char told[400], identity[NETCHAN_FINGERPRINT_SIZE + 8];
    memset(&s, 0, sizeof s);
    s.tls = trust;
    mbedtls_ssl_init(&s.ssl);
    CHECK(mbedtls_ssl_set_hostname(&s.ssl, "server") == 0);
    uint32_t before = flags;
    CHECK(netchan__verify(&s, cert, 0, &flags) == 0);
    CHECK(s.has_seen && memcmp(s.seen, hash, 32) == 0);
    check_sentence(s.reason, sizeof s.reason);
    CHECK(strlen(s.name) < sizeof s.name);
    if (trust->has_ca) CHECK(flags == before && !flags == !s.reason[0]);
    if (trust->pin_count) CHECK(!flags == netchan__is_pinned(trust, hash) && !flags == !s.reason[0]);
    netchan__tell_reason(&s, told, sizeof told);
    CHECK(strncmp(told, "its ", 4) && !(trust->pin_count && strstr(told, "options.pin")));
    netchan__print_identity(&s, identity);
    CHECK(strlen(identity) == NETCHAN_FINGERPRINT_SIZE - 1);
    mbedtls_ssl_free(&s.ssl);
}

/* What the CA says of it; each flag has its sentence. */
static void judge(mbedtls_x509_crt *cert, unsigned how, const uint8_t *hash) {
    static const uint32_t reasons[] = {MBEDTLS_X509_BADCERT_EXPIRED, MBEDTLS_X509_BADCERT_FUTURE,
        MBEDTLS_X509_BADCERT_NOT_TRUSTED, MBEDTLS_X509_BADCERT_CN_MISMATCH, MBEDTLS_X509_BADCERT_BAD_PK, 0x40000};
    for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++) show(&ca_trust, cert, reasons[i], hash);
    show(&any_trust, cert, MBEDTLS_X509_BADCERT_NOT_TRUSTED, hash);
    memset(pin_trust.pins, 1, 64);
    show(&pin_trust, cert, 0, hash);
    memcpy(pin_trust.pins + 32, hash, 32);
    show(&pin_trust, cert, 0, hash);
    uint32_t flags = 0;
    if (how % 4) return; /* a signature is slow */
    int e = mbedtls_x509_crt_verify(cert, &ca_trust.ca, NULL, how & 4 ? "server" : NULL, &flags, NULL, NULL);
    CHECK(!e == !flags);
    show(&ca_trust, cert, flags, hash);
}

static void read_cert(const netchan__text *t, unsigned how) {
    mbedtls_x509_crt cert;
    uint8_t hash[32];
    char text[NETCHAN_FINGERPRINT_SIZE], again[NETCHAN_FINGERPRINT_SIZE] = "";
    mbedtls_x509_crt_init(&cert);
    bool good = netchan__load_cert(&cert, t) == 0;
    if (good) {
        CHECK(netchan__hash_key(&cert, hash) == 0);
        netchan__print_fingerprint(hash, text);
        judge(&cert, how, hash);
    }
    mbedtls_x509_crt_free(&cert);
    if (!netchan__is_pem(t->data) || netchan__begins(t->data, "file:") || netchan__begins(t->data, "callback:")) return;
    CHECK((netchan_fingerprint(t->data, again, sizeof again) == NETCHAN_OK) == good || strlen(t->data) != t->size);
    if (good && again[0]) CHECK(strcmp(text, again) == 0);
}

static void read_key(const netchan__text *t) {
    mbedtls_pk_context key;
    mbedtls_pk_init(&key);
    netchan__load_key(&key, t);
    mbedtls_pk_free(&key);
}

/* options.load gives the input. */
static input given;
static int load(void *arg, const char *name, char *out, size_t size) {
    size_t left = (size_t)(given.end - given.at);
    (void)arg;
    CHECK(strcmp(name, "name") == 0);
    if (left == 3) return NETCHAN_EINVAL;
    memcpy(out, given.at, left < size ? left : size);
    return NETCHAN_OK;
}

static void read_callback(void) {
    netchan__text t = {NULL, 0};
    netchan_options o;
    memset(&o, 0, sizeof o);
    o.load = load;
    int result = netchan__read_text(&o, "cert", "callback:name", &t);
    if (result == NETCHAN_OK) read_cert(&t, 1);
    else check_sentence(netchan_errmsg(), 512);
    netchan__text_free(&t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    (void)fuzz_random_by_clock; /* compiled, and not wanted */
    if (!ca_trust.has_ca) make_trust();
    long blocks = fuzz_memory->blocks;
    given = fuzz_input(data, size);
    unsigned how = next_byte(&given);
    netchan__text t = text_of(given.at, (size_t)(given.end - given.at));
    if (how >= 0xf0) read_callback();
    else if (how >= 0xe0) read_key(&t);
    else read_cert(&t, how);
    netchan__text_free(&t);
    CHECK(fuzz_memory->blocks == blocks);
    return 0;
}
