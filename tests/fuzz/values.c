/* Fuzzes the value decoder. Whatever decodes must encode, and decode and copy to a value that encodes to the same
 * bytes. */
#include "fuzz.h"

enum { MAX_BLOCK = 1 << 20 };

/* The encoded value in a block of exactly its size, so that AddressSanitizer sees a step beyond it. */
static uint8_t *encode(const netchan_value *v, size_t *size) {
    size_t again;
    CHECK(netchan_encode(v, NULL, 0, size) == NETCHAN_ETOOBIG && *size > 0);
    uint8_t *bytes = (uint8_t *)malloc(*size);
    CHECK(bytes);
    CHECK(netchan_encode(v, bytes, *size - 1, &again) == NETCHAN_ETOOBIG && again == *size);
    CHECK(netchan_encode(v, bytes, *size, &again) == NETCHAN_OK && again == *size);
    return bytes;
}

static void check_same(const netchan_value *v, const uint8_t *bytes, size_t size) {
    size_t other_size;
    uint8_t *other = encode(v, &other_size);
    CHECK(other_size == size && memcmp(other, bytes, size) == 0);
    free(other);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    (void)fuzz_random_by_clock; /* compiled, and not wanted */
    netchan_value first, second, copy;
    size_t encoded;
    if (netchan_decode(&first, data, size, MAX_BLOCK) != NETCHAN_OK) {
        CHECK(netchan_is_nil(&first) && fuzz_memory->blocks == 0);
        return 0;
    }
    uint8_t *bytes = encode(&first, &encoded);
    CHECK(netchan_decode(&second, bytes, encoded, MAX_BLOCK) == NETCHAN_OK);
    check_same(&second, bytes, encoded);
    CHECK(netchan_copy(&copy, &first) == NETCHAN_OK);
    netchan_clear(&first);
    check_same(&copy, bytes, encoded);
    netchan_clear(&copy);
    netchan_clear(&second);
    free(bytes);
    CHECK(fuzz_memory->blocks == 0);
    return 0;
}
