/* Fuzzes the short texts that a user or a file writes: addresses, lists of pins, lists of shared keys; and the name of
 * a key that a stranger sends. The first byte of the input chooses, the rest is the text, whose NULs end it. An address
 * that is one is host and port again when put together, and a list is what its words are. No name is looked up. */
#include "fuzz.h"

static void read_address(const char *text) {
    char host[256], again[600];
    const char *port = NULL;
    if (netchan__split_address(text, host, &port) != NETCHAN_OK) {
        CHECK(netchan_errmsg()[0]);
        return;
    }
    size_t digits = strlen(port);
    CHECK(port + digits == text + strlen(text) && digits >= 1 && digits <= 5 && atoi(port) <= 65535);
    snprintf(again, sizeof again, text[0] == '[' && port[-2] == ']' ? "[%s]:%s" : "%s:%s", host, port);
    CHECK(strcmp(again, text) == 0);
}

/* Each pin that was read is trusted, and is one of the words. */
static void read_pins(const char *text) {
    netchan__tls t;
    char pin[NETCHAN_FINGERPRINT_SIZE];
    uint8_t again[32];
    memset(&t, 0, sizeof t);
    if (netchan__set_pins(&t, text) == NETCHAN_OK) {
        size_t count = 0, size;
        for (const char *word = text; (word += strspn(word, " \t\r\n,"))[0]; word += size, count++)
            CHECK((size = strcspn(word, " \t\r\n,")) == sizeof pin - 1);
        CHECK(count > 0 && t.pin_count == count);
        for (size_t i = 0; i < t.pin_count; i++) {
            netchan__print_fingerprint(t.pins + 32 * i, pin);
            CHECK(netchan__parse_pin(pin, strlen(pin), again) && memcmp(again, t.pins + 32 * i, 32) == 0);
            CHECK(netchan__is_pinned(&t, again));
        }
        memset(again, 0xa5, sizeof again);
        t.pin_count = 0;
        CHECK(!netchan__is_pinned(&t, again));
    } else CHECK(netchan_errmsg()[0]);
    NETCHAN_FREE(t.pins);
}

/* No sentence may have a part of a key. */
static void check_secret(const char *text) {
    char part[9];
    for (size_t i = 0, size = strlen(text); i + 8 <= size; i += 8) {
        memcpy(part, text + i, 8);
        part[8] = '\0';
        CHECK(!strpbrk(part, "0123456789") || !strstr(netchan_errmsg(), part));
    }
}

/* A stranger names a key: it is not found, or it is the right one. */
static void choose_key(netchan__tls *t, const char *name) {
    static netchan__stream s;
    char own[NETCHAN_KEY_ID_SIZE];
    memset(&s, 0, sizeof s);
    s.tls = t;
    mbedtls_ssl_init(&s.ssl);
    mbedtls_ssl_set_user_data_p(&s.ssl, &s);
    netchan__choose_key(t, &s.ssl, (const unsigned char *)name, strlen(name));
    CHECK(!s.key == (s.reason[0] != '\0') && strlen(s.reason) < sizeof s.reason);
    if (s.key) netchan__print_key_id(s.key->id, own);
    if (s.key) CHECK(strcmp(own, name) == 0);
    mbedtls_ssl_free(&s.ssl);
}

static void read_keys(const char *text) {
    netchan__tls t;
    char id[NETCHAN_KEY_ID_SIZE], first[NETCHAN_KEY_ID_SIZE] = "";
    memset(&t, 0, sizeof t);
    int result = netchan__set_shared_keys(&t, text);
    if (result == NETCHAN_OK) {
        CHECK(t.key_count > 0);
        for (size_t i = t.key_count; i-- > 0;) {
            netchan__print_key_id(t.keys[i].id, id);
            choose_key(&t, id);
        }
        memcpy(first, id, sizeof first);
        choose_key(&t, text);
    } else {
        CHECK(result == NETCHAN_EAUTH || result == NETCHAN_EINVAL); /* there may be too many */
        check_secret(text);
    }
    NETCHAN_FREE(t.keys);
    if (netchan__begins(text, "file:") || netchan__begins(text, "callback:")) return;
    size_t size = strcspn(text + strspn(text, "\r\n"), "\r\n");
    if (size >= NETCHAN__KEY_MIN && netchan_key_id(text, id, sizeof id) == NETCHAN_OK && first[0])
        CHECK(strcmp(id, first) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    (void)fuzz_random_by_clock; /* compiled, and not wanted */
    input in = fuzz_input(data, size);
    unsigned how = next_byte(&in);
    size = (size_t)(in.end - in.at);
    char *text = (char *)malloc(size + 1); /* of exactly this size, so that AddressSanitizer sees a step beyond it */
    CHECK(text);
    if (size) memcpy(text, in.at, size);
    text[size] = '\0';
    if (how % 3 == 0) read_address(text);
    else if (how % 3 == 1) read_pins(text);
    else read_keys(text);
    free(text);
    CHECK(fuzz_memory->blocks == 0);
    return 0;
}
