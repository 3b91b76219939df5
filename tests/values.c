/* Values and struct tables: sections [4] and [5] of netchan.h. */
#include "alloc.h"
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"
#include "test.h"

#include <math.h>

enum { MANY = 1 << 16, DEPTH = NETCHAN_MAX_DEPTH };

/* --- comparing, and looking at every byte --- */

static uint64_t float_bits(double f) {
    uint64_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static size_t packed_item(uint8_t type) {
    return type == NETCHAN_I32S || type == NETCHAN_F32S ? 4 : type == NETCHAN_I64S || type == NETCHAN_F64S ? 8 : 1;
}

static bool same(const netchan_value *a, const netchan_value *b);

static bool same_items(const netchan_value *a, const netchan_value *b) {
    for (size_t i = 0; i < a->as.block.count; i++) {
        if (a->type == NETCHAN_ARRAY) {
            if (!same(netchan_at(a, i), netchan_at(b, i))) return false;
            continue;
        }
        const netchan_entry *x = (const netchan_entry *)a->as.block.data + i;
        const netchan_entry *y = (const netchan_entry *)b->as.block.data + i;
        if (strcmp(x->key, y->key) != 0 || !same(&x->value, &y->value)) return false;
    }
    return true;
}

/* Whether the copied or decoded value b is what a is; bit by bit, so that NaN equals itself and 0.0 is not -0.0. */
static bool same(const netchan_value *a, const netchan_value *b) {
    if (a->type != b->type) return false;
    switch ((enum netchan_type)a->type) {
    case NETCHAN_NIL: return true;
    case NETCHAN_BOOL: return a->as.boolean == b->as.boolean;
    case NETCHAN_INT: return a->as.i64 == b->as.i64;
    case NETCHAN_UINT: return a->as.u64 == b->as.u64;
    case NETCHAN_FLOAT: return float_bits(a->as.f64) == float_bits(b->as.f64);
    case NETCHAN_STR: case NETCHAN_BYTES:
    case NETCHAN_I32S: case NETCHAN_I64S: case NETCHAN_F32S: case NETCHAN_F64S: {
        size_t size = a->as.block.count * packed_item(a->type);
        if (a->as.block.count != b->as.block.count) return false;
        if (a->type == NETCHAN_STR && ((const char *)b->as.block.data)[size] != '\0') return false;
        return size == 0 || memcmp(a->as.block.data, b->as.block.data, size) == 0;
    }
    case NETCHAN_ARRAY: case NETCHAN_MAP: return a->as.block.count == b->as.block.count && same_items(a, b);
    case NETCHAN_SENDER: case NETCHAN_RECEIVER: return a->as.chan == b->as.chan;
    case NETCHAN_STRUCT: break;
    }
    return false;
}

/* A block of exactly the right size, so that AddressSanitizer sees any access outside. */
static uint8_t *exact(const void *data, size_t size) {
    uint8_t *p = (uint8_t *)malloc(size ? size : 1);
    CHECK(p != NULL);
    if (size) memcpy(p, data, size);
    return p;
}

static uint8_t *encode(const netchan_value *v, size_t *size) {
    CHECK_INT(netchan_encode(v, NULL, 0, size), NETCHAN_ETOOBIG);
    uint8_t *bytes = (uint8_t *)malloc(*size);
    CHECK(bytes != NULL);
    CHECK_INT(netchan_encode(v, bytes, *size, size), NETCHAN_OK);
    return bytes;
}

static int decode(netchan_value *v, const void *data, size_t size) {
    memset(v, 0xaa, sizeof *v);
    uint8_t *bytes = exact(data, size);
    int result = netchan_decode(v, bytes, size, 0);
    free(bytes);
    if (result != NETCHAN_OK) CHECK(v->type == NETCHAN_NIL && v->flags == 0);
    return result;
}

/* The bytes must decode to the value and, unless they are only one of several forms, the value encode to the bytes. */
static void check_wire(netchan_value v, const char *bytes, size_t size, bool only_form) {
    netchan_value got;
    CHECK_INT(decode(&got, bytes, size), NETCHAN_OK);
    CHECK(same(&v, &got));
    netchan_clear(&got);
    if (!only_form) return;
    size_t used;
    uint8_t *made = encode(&v, &used);
    CHECK_INT(used, size);
    CHECK(memcmp(made, bytes, size) == 0);
    free(made);
}

#define WIRE(v, literal) check_wire(v, literal, sizeof(literal) - 1, true)
#define WIRE_TOO(v, literal) check_wire(v, literal, sizeof(literal) - 1, false)
#define REFUSED(literal) check_refused(__LINE__, literal, sizeof(literal) - 1)

static void check_refused(int line, const char *bytes, size_t size) {
    netchan_value v;
    long calls = alloc_count();
    int result = decode(&v, bytes, size);
    if (result != NETCHAN_EPROTO || !netchan_errmsg()[0] || alloc_count() != calls)
        test_fail(__FILE__, line, "result %d, %ld allocations", result, alloc_count() - calls);
}

/* --- the corpus: every type at its boundaries --- */

static char text[MANY + 1];
static netchan_value items[MANY], nested[DEPTH + 2];
static netchan_entry entries[MANY];
static char keys[MANY][8];
static int32_t i32s[MANY];
static int64_t i64s[MANY];
static float f32s[MANY];
static double f64s[MANY];
static netchan_value corpus[128];
static size_t corpus_size;

static void add(netchan_value v) {
    CHECK(corpus_size < sizeof corpus / sizeof *corpus);
    corpus[corpus_size++] = v;
}

static void fill_storage(void) {
    static const double floats[] = {0.0, -0.0, 1.0, -1.5, 1e308, 5e-324};
    for (size_t i = 0; i < MANY; i++) {
        text[i] = (char)(i % 251);
        snprintf(keys[i], sizeof keys[i], "k%zu", i);
        i32s[i] = i % 3 == 0 ? INT32_MIN : i % 3 == 1 ? INT32_MAX : (int32_t)i;
        i64s[i] = i % 3 == 0 ? INT64_MIN : i % 3 == 1 ? INT64_MAX : (int64_t)i;
        f64s[i] = floats[i % 6];
        f32s[i] = (float)i / 7;
        items[i] = netchan_int((int64_t)i - 100);
        entries[i].key = keys[i];
        entries[i].value = i % 2 ? netchan_strn(text + i % 80, i % 70) : netchan_uint(i);
    }
}

/* `depth` arrays around v, each holding one item. Uses `nested`, so that only one such value exists at a time. */
static netchan_value nest(netchan_value v, size_t depth) {
    for (size_t i = 0; i < depth; i++) {
        nested[i] = v;
        v = netchan_array(&nested[i], 1);
    }
    return v;
}

static void add_scalars(void) {
    static const int64_t ints[] = {0,   1,    63,   64,        -1,        -64,       -65,      127,
                                   128, 8191, 8192, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN};
    static const uint64_t uints[] = {0, 63, 64, 127, 128, 16383, 16384, UINT32_MAX, INT64_MAX, UINT64_MAX};
    add(netchan_nil());
    add(netchan_bool(false));
    add(netchan_bool(true));
    for (size_t i = 0; i < sizeof ints / sizeof *ints; i++) add(netchan_int(ints[i]));
    for (size_t i = 0; i < sizeof uints / sizeof *uints; i++) add(netchan_uint(uints[i]));
    double odd_nan;
    uint64_t bits = 0xfff0123456789abcu;
    memcpy(&odd_nan, &bits, sizeof odd_nan);
    const double floats[] = {0.0,      -0.0,      1.0,         -1.5,   5e-324, 1.7976931348623157e308,
                             HUGE_VAL, -HUGE_VAL, (double)NAN, odd_nan};
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++) add(netchan_float(floats[i]));
}

static void add_blocks(void) {
    static const size_t sizes[] = {0, 1, 7, 8, 63, 64, 127, 128, 16383, MANY};
    add(netchan_str(NULL));
    add(netchan_str("hello"));
    add(netchan_strn("\0a\0", 3));
    add(netchan_bytes(NULL, 0));
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        add(netchan_strn(text, sizes[i]));
        add(netchan_bytes(text, sizes[i]));
    }
    for (size_t i = 0; i < 3; i++) {
        size_t count = i == 0 ? 0 : i == 1 ? 5 : MANY;
        add(netchan_i32s(count ? i32s : NULL, count));
        add(netchan_i64s(count ? i64s : NULL, count));
        add(netchan_f32s(count ? f32s : NULL, count));
        add(netchan_f64s(count ? f64s : NULL, count));
    }
}

static void add_trees(void) {
    static netchan_value mixed[12];
    static netchan_entry twice[4], outer[3];
    size_t n = 0;
    add(netchan_array(NULL, 0));
    add(netchan_map(NULL, 0));
    add(netchan_array(items, MANY));
    add(netchan_map(entries, MANY));
    add(netchan_array(items, 300));
    add(netchan_map(entries, 100));
    twice[0].key = "twice";
    twice[0].value = netchan_int(1);
    twice[1].key = "twice";
    twice[1].value = netchan_str("");
    twice[2].key = "";
    twice[3].key = "\xc3\xa9";
    twice[3].value = netchan_f64s(f64s, 6);
    add(netchan_map(twice, 4));
    mixed[n++] = netchan_nil();
    mixed[n++] = netchan_bool(true);
    mixed[n++] = netchan_int(INT64_MIN);
    mixed[n++] = netchan_uint(UINT64_MAX);
    mixed[n++] = netchan_float(-0.0);
    mixed[n++] = netchan_str("odd");
    mixed[n++] = netchan_i32s(i32s, 3);
    mixed[n++] = netchan_bytes(text, 13);
    mixed[n++] = netchan_i64s(i64s, 3);
    mixed[n++] = netchan_map(twice, 4);
    mixed[n++] = netchan_array(NULL, 0);
    mixed[n++] = netchan_strn(text, 64);
    add(netchan_array(mixed, n));
    outer[0].key = "a rather long key, for the sake of alignment";
    outer[0].value = netchan_array(mixed, n);
    outer[1].key = "seven77";
    outer[1].value = netchan_map(twice, 4);
    outer[2].key = "eight888";
    add(netchan_map(outer, 3));
    add(nest(netchan_str("deep"), DEPTH));
}

static void make_corpus(void) {
    fill_storage();
    add_scalars();
    add_blocks();
    add_trees();
}

/* --- round trips --- */

static void check_round_trip(const netchan_value *v) {
    size_t size, again;
    uint8_t *bytes = encode(v, &size);
    netchan_value got, copy;
    long calls = alloc_count();
    CHECK_INT(decode(&got, bytes, size), NETCHAN_OK);
    CHECK_INT(alloc_count() - calls, got.type >= NETCHAN_STR && netchan_count(&got) != 0);
    CHECK(same(v, &got));
    calls = alloc_count();
    memset(&copy, 0xaa, sizeof copy);
    CHECK_INT(netchan_copy(&copy, v), NETCHAN_OK);
    CHECK_INT(alloc_count() - calls, netchan_count(&got) != 0);
    netchan_value second = copy;
    CHECK_INT(netchan_copy(&second, &second), NETCHAN_OK); /* source and target may be the same variable */
    CHECK(same(v, &second));
    netchan_clear(&second);
    CHECK(same(v, &copy));
    netchan_clear(&copy);
    CHECK(netchan_is_nil(&copy));
    uint8_t *bytes_again = encode(&got, &again);
    CHECK_INT(again, size);
    CHECK(memcmp(bytes, bytes_again, size) == 0);
    netchan_clear(&got);
    CHECK(netchan_is_nil(&got));
    netchan_clear(&got); /* clearing twice is safe */
    CHECK_INT(alloc_blocks(), 0);
    free(bytes);
    free(bytes_again);
}

static void test_round_trips(void) {
    make_corpus();
    for (size_t i = 0; i < corpus_size; i++) check_round_trip(&corpus[i]);
}

static void test_encode_never_writes_more_than_size(void) {
    make_corpus();
    for (size_t i = 0; i < corpus_size; i++) {
        size_t size, used = 0;
        free(encode(&corpus[i], &size));
        for (size_t cut = 1; cut <= size && cut <= 3; cut++) {
            uint8_t *bytes = (uint8_t *)malloc(size - cut + 1);
            CHECK(bytes != NULL);
            bytes[size - cut] = 0x5a;
            CHECK_INT(netchan_encode(&corpus[i], bytes, size - cut, &used), NETCHAN_ETOOBIG);
            CHECK_INT(used, size);
            CHECK_INT(bytes[size - cut], 0x5a);
            free(bytes);
        }
        uint8_t *roomy = (uint8_t *)calloc(1, size + 16);
        CHECK(roomy != NULL);
        CHECK_INT(netchan_encode(&corpus[i], roomy, size + 16, NULL), NETCHAN_OK);
        for (size_t j = size; j < size + 16; j++) CHECK_INT(roomy[j], 0);
        free(roomy);
    }
}

static void test_received_blocks_are_aligned_and_terminated(void) {
    make_corpus();
    netchan_value list[9];
    for (size_t i = 0; i < 9; i++)
        list[i] = i % 3 == 0 ? netchan_f64s(f64s, i) : i % 3 == 1 ? netchan_strn("abcdefgh", i) : netchan_i32s(i32s, i);
    netchan_value v = netchan_array(list, 9), copy, got;
    size_t size, count;
    uint8_t *bytes = encode(&v, &size);
    CHECK_INT(decode(&got, bytes, size), NETCHAN_OK);
    CHECK_INT(netchan_copy(&copy, &v), NETCHAN_OK);
    for (size_t i = 0; i < 9; i++) {
        const netchan_value *both[2] = {netchan_at(&got, i), netchan_at(&copy, i)};
        for (int j = 0; j < 2; j++) {
            const void *data = netchan_as_block(both[j], (enum netchan_type)list[i].type, &count);
            CHECK_INT(count, i);
            CHECK(data != NULL);
            if (i % 3 == 0 && i) CHECK_INT((uintptr_t)data % sizeof(double), 0);
            if (i % 3 == 1) CHECK_INT(strlen(netchan_as_str(both[j], "?")), i);
            if (i % 3 == 2) CHECK_INT((uintptr_t)data % sizeof(int32_t), 0);
        }
    }
    netchan_clear(&got);
    netchan_clear(&copy);
    free(bytes);
}

/* --- the wire, byte by byte, as the top of netchan.h describes it --- */

static void test_wire_scalars(void) {
    WIRE(netchan_int(0), "\x00");
    WIRE(netchan_int(1), "\x01");
    WIRE(netchan_int(63), "\x3f");
    WIRE(netchan_int(64), "\x83\x80\x01");
    WIRE(netchan_int(-1), "\x83\x01");
    WIRE(netchan_int(-2), "\x83\x03");
    WIRE(netchan_int(INT64_MAX), "\x83\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01");
    WIRE(netchan_int(INT64_MIN), "\x83\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01");
    WIRE(netchan_nil(), "\x80");
    WIRE(netchan_bool(false), "\x81");
    WIRE(netchan_bool(true), "\x82");
    WIRE(netchan_uint(0), "\x84\x00");
    WIRE(netchan_uint(127), "\x84\x7f");
    WIRE(netchan_uint(300), "\x84\xac\x02");
    WIRE(netchan_uint(UINT64_MAX), "\x84\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01");
    WIRE(netchan_float(1.0), "\x85\x00\x00\x00\x00\x00\x00\xf0\x3f");
    WIRE(netchan_float(-0.0), "\x85\x00\x00\x00\x00\x00\x00\x00\x80");
    WIRE(netchan_float(HUGE_VAL), "\x85\x00\x00\x00\x00\x00\x00\xf0\x7f");
    WIRE_TOO(netchan_int(5), "\x83\x0a");
    WIRE_TOO(netchan_int(-1), "\x83\x81\x00");
    WIRE_TOO(netchan_uint(1), "\x84\x81\x80\x80\x80\x80\x80\x80\x80\x80\x00");
}

#define A63 "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

static void test_wire_blocks(void) {
    static const int32_t ints[] = {1, -2};
    static const int64_t longs[] = {INT64_MIN};
    static const float floats[] = {1.0f, -2.0f};
    static const double doubles[] = {1.0};
    WIRE(netchan_str(""), "\x40");
    WIRE(netchan_str("hello"), "\x45hello");
    WIRE(netchan_strn("\0", 1), "\x41\x00");
    WIRE(netchan_str(A63), "\x7f" A63);
    WIRE(netchan_str(A63 "a"), "\x86\x40" A63 "a");
    WIRE(netchan_str(A63 A63 "aa"), "\x86\x80\x01" A63 A63 "aa");
    WIRE_TOO(netchan_str("hi"), "\x86\x02hi");
    WIRE_TOO(netchan_str(""), "\x86\x00");
    WIRE_TOO(netchan_str("hi"), "\x86\x82\x00hi");
    WIRE(netchan_bytes("", 0), "\x87\x00");
    WIRE(netchan_bytes("\xff\x00", 2), "\x87\x02\xff\x00");
    WIRE(netchan_i32s(ints, 2), "\x8b\x08\x01\x00\x00\x00\xfe\xff\xff\xff");
    WIRE(netchan_i32s(ints, 0), "\x8b\x00");
    WIRE(netchan_i64s(longs, 1), "\x8c\x08\x00\x00\x00\x00\x00\x00\x00\x80");
    WIRE(netchan_i64s(longs, 0), "\x8c\x00");
    WIRE(netchan_f32s(floats, 2), "\x8d\x08\x00\x00\x80\x3f\x00\x00\x00\xc0");
    WIRE(netchan_f32s(floats, 0), "\x8d\x00");
    WIRE(netchan_f64s(doubles, 1), "\x8e\x08\x00\x00\x00\x00\x00\x00\xf0\x3f");
    WIRE(netchan_f64s(doubles, 0), "\x8e\x00");
}

static void test_wire_trees(void) {
    netchan_value list[3];
    list[0] = netchan_int(7);
    list[1] = netchan_str("ab");
    list[2] = netchan_array(NULL, 0);
    netchan_entry map[2];
    map[0].key = "a";
    map[0].value = netchan_bool(true);
    map[1].key = "";
    map[1].value = netchan_array(list, 3);
    WIRE(netchan_array(NULL, 0), "\x88\x01\x00");
    WIRE(netchan_array(list, 3), "\x88\x08\x03\x07\x42" "ab\x88\x01\x00");
    WIRE(netchan_map(NULL, 0), "\x89\x01\x00");
    WIRE(netchan_map(map, 2), "\x89\x0f\x02\x01" "a\x82\x00\x88\x08\x03\x07\x42" "ab\x88\x01\x00");
    WIRE_TOO(netchan_array(list, 1), "\x88\x83\x00\x81\x00\x07");
    WIRE_TOO(netchan_map(map, 1), "\x89\x05\x01\x81\x00" "a\x82");
}

static void test_wire_unknown_tags_are_nil(void) {
    char bytes[300];
    netchan_value v;
    for (int tag = 0x8f; tag <= 0xff; tag++) {
        for (size_t size = 0; size < 200; size += size < 4 ? 1 : 49) {
            uint8_t *p = (uint8_t *)bytes;
            size_t head = size < 128 ? 1 : 2;
            *p++ = 0x88; /* an array of three: 1, the unknown, 2 */
            size_t length = 4 + head + size;
            if (length >= 128) *p++ = (uint8_t)(length | 0x80);
            *p++ = (uint8_t)(length < 128 ? length : length >> 7);
            *p++ = 3;
            *p++ = 1;
            uint8_t *unknown = p;
            *p++ = (uint8_t)tag;
            if (size >= 128) *p++ = (uint8_t)(size | 0x80);
            *p++ = (uint8_t)(size < 128 ? size : size >> 7);
            memset(p, 0xff, size);
            p += size;
            size_t whole = (size_t)(p - unknown);
            *p++ = 2;
            CHECK_INT(decode(&v, bytes, (size_t)(p - (uint8_t *)bytes)), NETCHAN_OK);
            CHECK_INT(netchan_count(&v), 3);
            CHECK_INT(netchan_as_int(netchan_at(&v, 0), -1), 1);
            CHECK(netchan_is_nil(netchan_at(&v, 1)));
            CHECK_INT(netchan_as_int(netchan_at(&v, 2), -1), 2);
            netchan_clear(&v);
            CHECK_INT(decode(&v, unknown, whole), NETCHAN_OK);
            CHECK(netchan_is_nil(&v));
            for (size_t cut = 0; cut < whole; cut++) CHECK_INT(decode(&v, unknown, cut), NETCHAN_EPROTO);
        }
    }
    CHECK_INT(decode(&v, "\x89\x07\x02\x01" "a\xff\x00\x00\x05", 9), NETCHAN_OK);
    CHECK(netchan_is_nil(netchan_get(&v, "a")));
    CHECK_INT(netchan_as_int(netchan_get(&v, ""), -1), 5);
    netchan_clear(&v);
}

static void test_wire_refused(void) {
    REFUSED("");
    REFUSED("\x00\x00");                                             /* a byte too many */
    REFUSED("\x80\x80");
    REFUSED("\x83\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02");         /* more than 64 bits */
    REFUSED("\x84\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00");     /* a varint of eleven bytes */
    REFUSED("\x85\x00\x00\x00\x00\x00\x00\x00");                     /* a float of seven bytes */
    REFUSED("\x42" "a");
    REFUSED("\x86\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01" "a");     /* LEN 2^64 - 1 */
    REFUSED("\x87\x02" "a");
    REFUSED("\x8b\x03" "abc");                                       /* not whole items */
    REFUSED("\x8c\x04" "abcd");
    REFUSED("\x8d\x05" "abcde");
    REFUSED("\x8e\x0c" "abcdefghijkl");
    REFUSED("\x88\x00");                                             /* no count */
    REFUSED("\x88\x01\x01");                                         /* one item, no byte */
    REFUSED("\x88\x02\x02\x00");
    REFUSED("\x88\x02\x00\x00");                                     /* a byte behind the last item */
    REFUSED("\x88\x02\x01\x00\x00");
    REFUSED("\x88\x03\x01\x42" "a");                                 /* an item that ends behind its array */
    REFUSED("\x88\x0b\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x00"); /* 2^64 - 1 items */
    REFUSED("\x88\x06\xff\xff\xff\xff\x0f\x00");
    REFUSED("\x89\x00");
    REFUSED("\x89\x02\x01\x00");                                     /* a key and no value */
    REFUSED("\x89\x0c\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x00\x80");
    REFUSED("\x89\x04\x02\x00\x80\x00");
    REFUSED("\x89\x05\x01\x02" "a\x00\x80");                         /* a NUL in a key */
    REFUSED("\x89\x0c\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x80");
    REFUSED("\x89\x04\x01\x01" "a\x42");
}

static void test_decode_of_no_bytes(void) {
    netchan_value v;
    CHECK_INT(netchan_decode(&v, NULL, 0, 0), NETCHAN_EPROTO);
    CHECK(netchan_is_nil(&v));
}

/* --- damaged encodings --- */

/* Of a long encoding only its ends and some places between are tried. */
static size_t next_place(size_t at, size_t size, uint64_t *seed) {
    if (size <= 1024 || at < 24 || at + 24 >= size) return at + 1;
    return at + 1 + test_random(seed) % (size / (size < 65536 ? 100 : 10));
}

static void test_truncation_is_always_an_error(void) {
    make_corpus();
    uint64_t seed = 11;
    netchan_value v;
    for (size_t i = 0; i < corpus_size; i++) {
        size_t size;
        uint8_t *bytes = encode(&corpus[i], &size);
        for (size_t cut = 0; cut < size; cut = next_place(cut, size, &seed)) {
            long calls = alloc_count();
            CHECK_INT(decode(&v, bytes, cut), NETCHAN_EPROTO);
            CHECK_INT(alloc_count(), calls);
        }
        free(bytes);
    }
}

/* Damaged bytes give EPROTO, or a value that can be read to its last byte, encoded and decoded again. */
static bool check_damaged(const uint8_t *bytes, size_t size) {
    netchan_value v, copy, again;
    int result = decode(&v, bytes, size);
    if (result != NETCHAN_OK) {
        CHECK_INT(result, NETCHAN_EPROTO);
        return false;
    }
    size_t used;
    uint8_t *made = encode(&v, &used);
    CHECK(used <= size); /* the canonical form is never longer than another one */
    CHECK_INT(decode(&again, made, used), NETCHAN_OK);
    CHECK(same(&v, &again));
    CHECK_INT(netchan_copy(&copy, &v), NETCHAN_OK);
    CHECK(same(&v, &copy));
    netchan_clear(&copy);
    netchan_clear(&again);
    netchan_clear(&v);
    free(made);
    return true;
}

static void test_fuzz_one_byte(void) {
    make_corpus();
    uint64_t seed = 22;
    long good = 0, bad = 0;
    for (size_t i = 0; i < corpus_size; i++) {
        size_t size;
        uint8_t *bytes = encode(&corpus[i], &size);
        for (size_t at = 0; at < size; at = next_place(at, size, &seed)) {
            uint8_t was = bytes[at];
            for (int round = 0; round < (size < 512 ? 16 : 1); round++) {
                bytes[at] = (uint8_t)(was ^ (1 + test_random(&seed) % 255));
                *(check_damaged(bytes, size) ? &good : &bad) += 1;
            }
            bytes[at] = was;
        }
        free(bytes);
    }
    CHECK(good > 1000 && bad > 1000);
    CHECK_INT(alloc_blocks(), 0);
}

/* Random trees of tags, so that the decoder gets deeper than random bytes would lead it. */
static size_t random_bytes(uint8_t *p, size_t size, uint64_t *seed) {
    static const uint8_t tags[] = {0x00, 0x41, 0x80, 0x82, 0x83, 0x84, 0x86, 0x87, 0x88,
                                   0x88, 0x88, 0x89, 0x89, 0x8a, 0x8b, 0x8c, 0x90};
    for (size_t i = 0; i < size; i++) {
        uint64_t n = test_random(seed);
        uint64_t byte = n % 4 == 0 ? tags[n / 4 % sizeof tags] : n % 4 == 1 ? n / 4 : n / 4 % (size - i + 1);
        p[i] = (uint8_t)byte; /* a tag, anything, or a length that may fit */
    }
    return size;
}

static void test_fuzz_random_bytes(void) {
    uint64_t seed = 33;
    uint8_t bytes[48];
    long good = 0;
    for (int round = 0; round < 300000; round++)
        good += check_damaged(bytes, random_bytes(bytes, 1 + test_random(&seed) % sizeof bytes, &seed));
    CHECK(good > 1000);
    CHECK_INT(alloc_blocks(), 0);
}

/* --- depth and memory limits --- */

static void test_depth_limit(void) {
    netchan_value v = nest(netchan_int(1), DEPTH), got;
    check_round_trip(&v);
    v = nest(netchan_int(1), DEPTH + 1);
    size_t used = 7;
    char small[8];
    CHECK_INT(netchan_encode(&v, small, sizeof small, &used), NETCHAN_EINVAL);
    CHECK(strstr(netchan_errmsg(), "64"));
    CHECK_INT(netchan_copy(&got, &v), NETCHAN_EINVAL);
    CHECK(netchan_is_nil(&got));
    CHECK_INT(alloc_blocks(), 0);
}

/* The bytes of `depth` arrays, or maps with an empty key, around the integer 1. */
static size_t nested_bytes(uint8_t *bytes, size_t room, size_t depth, bool maps) {
    uint8_t *p = bytes + room;
    *--p = 1;
    for (size_t i = 0; i < depth; i++) {
        if (maps) *--p = 0;
        *--p = 1;
        size_t length = (size_t)(bytes + room - p);
        if (length >= 128) *--p = (uint8_t)(length >> 7);
        *--p = (uint8_t)(length < 128 ? length : length | 0x80);
        *--p = maps ? 0x89 : 0x88;
    }
    size_t size = (size_t)(bytes + room - p);
    memmove(bytes, p, size);
    return size;
}

static void test_depth_limit_of_bytes(void) {
    static uint8_t bytes[16384];
    netchan_value v;
    for (int maps = 0; maps < 2; maps++) {
        CHECK_INT(decode(&v, bytes, nested_bytes(bytes, sizeof bytes, DEPTH, maps)), NETCHAN_OK);
        const netchan_value *at = &v;
        for (int i = 0; i < DEPTH; i++) at = maps ? netchan_get(at, "") : netchan_at(at, 0);
        CHECK_INT(netchan_as_int(at, 0), 1);
        netchan_clear(&v);
        CHECK_INT(decode(&v, bytes, nested_bytes(bytes, sizeof bytes, DEPTH + 1, maps)), NETCHAN_EPROTO);
        CHECK_INT(decode(&v, bytes, nested_bytes(bytes, sizeof bytes, 2000, maps)), NETCHAN_EPROTO);
    }
}

static void test_max_block(void) {
    make_corpus();
    for (size_t i = 0; i < corpus_size; i++) {
        size_t size;
        uint8_t *bytes = encode(&corpus[i], &size);
        netchan_value v;
        alloc_fail(0);
        CHECK_INT(netchan_decode(&v, bytes, size, 0), NETCHAN_OK);
        size_t need = alloc_largest;
        netchan_clear(&v);
        CHECK_INT(netchan_decode(&v, bytes, size, need), NETCHAN_OK);
        CHECK(same(&corpus[i], &v));
        netchan_clear(&v);
        long calls = alloc_count();
        if (need > 1) {
            memset(&v, 0xaa, sizeof v);
            CHECK_INT(netchan_decode(&v, bytes, size, need - 1), NETCHAN_ETOOBIG);
            CHECK(v.type == NETCHAN_NIL && v.flags == 0);
            CHECK(strlen(netchan_errmsg()) > 0);
        }
        CHECK_INT(alloc_count(), calls);
        free(bytes);
    }
}

static void test_out_of_memory(void) {
    make_corpus();
    for (size_t i = 0; i < corpus_size; i++) {
        size_t size;
        uint8_t *bytes = encode(&corpus[i], &size);
        netchan_value v;
        long calls = alloc_count();
        for (int how = 0; how < 2; how++) {
            memset(&v, 0xaa, sizeof v);
            alloc_fail(1);
            int result = how ? netchan_decode(&v, bytes, size, 0) : netchan_copy(&v, &corpus[i]);
            CHECK_INT(result, alloc_failed() ? NETCHAN_ENOMEM : NETCHAN_OK);
            if (alloc_failed()) CHECK(v.type == NETCHAN_NIL && v.flags == 0 && strlen(netchan_errmsg()) > 0);
            netchan_clear(&v);
            CHECK_INT(alloc_blocks(), 0);
        }
        CHECK_INT(alloc_count() - calls, netchan_count(&corpus[i]) ? 2 : 0);
        free(bytes);
    }
}

/* --- values that are none --- */

static void check_invalid(netchan_value v) {
    netchan_value list[2], got;
    char bytes[64];
    size_t used;
    list[0] = netchan_str("before");
    list[1] = v;
    netchan_value both[2];
    both[0] = v;
    both[1] = netchan_array(list, 2);
    for (int i = 0; i < 2; i++) {
        long calls = alloc_count();
        memset(&got, 0xaa, sizeof got);
        CHECK_INT(netchan_copy(&got, &both[i]), NETCHAN_EINVAL);
        CHECK(got.type == NETCHAN_NIL && got.flags == 0);
        CHECK(strlen(netchan_errmsg()) > 0);
        CHECK_INT(netchan_encode(&both[i], bytes, sizeof bytes, &used), NETCHAN_EINVAL);
        CHECK_INT(alloc_count(), calls);
    }
}

static void test_invalid_values(void) {
    netchan_value v = netchan_nil();
    netchan_entry entry = {NULL, v};
    for (int type = NETCHAN_STRUCT + 1; type < 256; type++) {
        v.type = (uint8_t)type;
        check_invalid(v);
    }
    check_invalid(netchan_map(&entry, 1));
    check_invalid(netchan_array(NULL, 1));
    check_invalid(netchan_map(NULL, 1));
    check_invalid(netchan_bytes(NULL, 1));
    check_invalid(netchan_f64s(NULL, 1));
    check_invalid(netchan_i32s(i32s, SIZE_MAX / 2));
    check_invalid(netchan_i64s(i64s, SIZE_MAX / 8 + 2));
}

static void test_channels_have_no_bytes(void) {
    netchan *ch = netchan_make(1);
    CHECK(ch != NULL);
    netchan_value list[2];
    list[0] = netchan_sender(ch);
    list[1] = netchan_receiver(ch);
    netchan_value both[2];
    both[0] = list[0];
    both[1] = netchan_array(list, 2);
    char bytes[64];
    size_t used;
    for (int i = 0; i < 2; i++) {
        CHECK_INT(netchan_encode(&both[i], bytes, sizeof bytes, &used), NETCHAN_ETYPE);
        CHECK(strstr(netchan_errmsg(), "channel"));
    }
    netchan_value copy;
    CHECK_INT(netchan_copy(&copy, &both[1]), NETCHAN_OK);
    CHECK(netchan_as_chan(netchan_at(&copy, 0)) == ch && netchan_as_chan(netchan_at(&copy, 1)) == ch);
    CHECK_INT(netchan_at(&copy, 0)->type, NETCHAN_SENDER);
    CHECK_INT(netchan_at(&copy, 1)->type, NETCHAN_RECEIVER);
    netchan_clear(&list[0]); /* a constructed value counts nothing */
    netchan_free(ch);
    CHECK(alloc_blocks() > 0);
    CHECK_INT(netchan_cap(netchan_as_chan(netchan_at(&copy, 0))), 1);
    netchan_clear(&copy);
    CHECK_INT(alloc_blocks(), 0);
    CHECK(netchan_is_nil(&list[0]));
    list[0] = netchan_sender(NULL);
    list[1] = netchan_receiver(NULL);
    CHECK(netchan_is_nil(&list[0]) && netchan_is_nil(&list[1]));
}

static void test_clear_leaves_what_was_borrowed(void) {
    char hello[] = "hello";
    netchan_value v = netchan_str(hello), inner, list = netchan_array(&v, 1), copy;
    netchan_clear(&list);
    CHECK(netchan_is_nil(&list));
    CHECK_STR(netchan_as_str(&v, "?"), "hello");
    list = netchan_array(&v, 1);
    CHECK_INT(netchan_copy(&copy, &list), NETCHAN_OK);
    inner = *netchan_at(&copy, 0);
    netchan_clear(&inner); /* looked up in the copy, so it must not free what the copy holds */
    memset(hello, 'x', sizeof hello - 1);
    CHECK_STR(netchan_as_str(netchan_at(&copy, 0), "?"), "hello");
    netchan_clear(&copy);
    netchan_clear(NULL);
    CHECK_INT(alloc_blocks(), 0);
}

/* --- looking never fails --- */

static void check_look(const netchan_value *v) {
    uint8_t type = v ? v->type : NETCHAN_NIL;
    size_t count = 99;
    CHECK_INT(netchan_is_nil(v), type == NETCHAN_NIL);
    if (type != NETCHAN_BOOL) CHECK(netchan_as_bool(v, true) && !netchan_as_bool(v, false));
    if (type != NETCHAN_INT && type != NETCHAN_UINT) {
        CHECK_INT(netchan_as_int(v, -7), -7);
        CHECK_INT(netchan_as_uint(v, 7), 7);
        if (type != NETCHAN_FLOAT) CHECK_INT(float_bits(netchan_as_float(v, -0.0)), float_bits(-0.0));
    }
    if (type != NETCHAN_STR) {
        CHECK_STR(netchan_as_str(v, "fallback"), "fallback");
        CHECK(netchan_as_str(v, NULL) == NULL);
    }
    CHECK(netchan_as_chan(v) == NULL);
    for (int ask = -1; ask <= NETCHAN_STRUCT + 1; ask++) {
        bool block = ask == NETCHAN_STR || ask == NETCHAN_BYTES || (ask >= NETCHAN_I32S && ask <= NETCHAN_F64S);
        const void *data = netchan_as_block(v, (enum netchan_type)ask, &count);
        CHECK_INT(count, block && ask == type ? netchan_count(v) : 0);
        if (!block || ask != type) CHECK(data == NULL);
        CHECK(netchan_as_block(v, (enum netchan_type)ask, NULL) == data);
    }
    CHECK(netchan_is_nil(netchan_at(v, SIZE_MAX)) && netchan_is_nil(netchan_at(v, netchan_count(v))));
    if (type != NETCHAN_ARRAY) CHECK(netchan_is_nil(netchan_at(v, 0)));
    CHECK(netchan_get(v, NULL) && netchan_get(v, "no such key"));
    CHECK(netchan_is_nil(netchan_get(v, NULL)) && netchan_is_nil(netchan_get(v, "no such key")));
    bool counted = (type >= NETCHAN_STR && type <= NETCHAN_MAP) || (type >= NETCHAN_I32S && type <= NETCHAN_F64S);
    if (!counted) CHECK_INT(netchan_count(v), 0);
}

static void test_looking_never_fails(void) {
    make_corpus();
    check_look(NULL);
    for (size_t i = 0; i < corpus_size; i++) check_look(&corpus[i]);
    for (int type = NETCHAN_STRUCT; type < 256; type++) {
        netchan_value v = netchan_nil();
        v.type = (uint8_t)type;
        check_look(&v);
    }
}

static void test_numbers_convert_when_they_fit(void) {
    netchan_value v = netchan_uint(INT64_MAX);
    CHECK_INT(netchan_as_int(&v, -1), INT64_MAX);
    v = netchan_uint((uint64_t)INT64_MAX + 1);
    CHECK_INT(netchan_as_int(&v, -1), -1);
    CHECK(netchan_as_uint(&v, 0) == (uint64_t)INT64_MAX + 1);
    v = netchan_int(-1);
    CHECK_INT(netchan_as_uint(&v, 5), 5);
    CHECK(netchan_as_float(&v, 0) == -1.0);
    v = netchan_int(INT64_MAX);
    CHECK(netchan_as_uint(&v, 5) == INT64_MAX);
    v = netchan_uint(UINT64_MAX);
    CHECK(netchan_as_float(&v, 0) == 18446744073709551616.0);
    v = netchan_float(1.0);
    CHECK_INT(netchan_as_int(&v, 5), 5);
    CHECK_INT(netchan_as_uint(&v, 5), 5);
    v = netchan_bool(true);
    CHECK_INT(netchan_as_int(&v, 5), 5);
    CHECK(netchan_as_bool(&v, false));
}

static void test_maps_find_the_first(void) {
    netchan_entry e[3];
    e[0].key = "a";
    e[0].value = netchan_int(1);
    e[1].key = "b";
    e[1].value = netchan_int(2);
    e[2].key = "a";
    e[2].value = netchan_int(3);
    netchan_value v = netchan_map(e, 3), got;
    CHECK_INT(netchan_copy(&got, &v), NETCHAN_OK);
    CHECK_INT(netchan_as_int(netchan_get(&got, "a"), 0), 1);
    CHECK_INT(netchan_as_int(netchan_get(&got, "b"), 0), 2);
    CHECK_INT(netchan_count(&got), 3);
    netchan_clear(&got);
}

/* --- struct tables --- */

typedef struct {
    bool on;
    float ratio;
} part;

typedef struct {
    bool b;
    int32_t i32;
    int64_t i64;
    uint32_t u32;
    uint64_t u64;
    float f32;
    double f64;
    const char *str;
    netchan_value value;
    part inner;
    int untouched;
} record;

static const netchan_field part_fields[] = {NETCHAN_FIELD(part, on, BOOL), NETCHAN_FIELD(part, ratio, F32),
                                            NETCHAN_FIELDS_END};

static const netchan_field record_fields[] = {
    NETCHAN_FIELD(record, b, BOOL),      NETCHAN_FIELD(record, i32, I32),
    NETCHAN_FIELD(record, i64, I64),     NETCHAN_FIELD(record, u32, U32),
    NETCHAN_FIELD(record, u64, U64),     NETCHAN_FIELD(record, f32, F32),
    NETCHAN_FIELD(record, f64, F64),     NETCHAN_FIELD(record, str, STR),
    NETCHAN_FIELD_VALUE(record, value),  NETCHAN_FIELD_STRUCT(record, inner, part, part_fields),
    NETCHAN_FIELDS_END};

static netchan_value record_list[2];

static record make_record(void) {
    record r;
    memset(&r, 0, sizeof r);
    record_list[0] = netchan_str("in a list");
    record_list[1] = netchan_int(-5);
    r.b = true;
    r.i32 = INT32_MIN;
    r.i64 = INT64_MIN;
    r.u32 = UINT32_MAX;
    r.u64 = UINT64_MAX;
    r.f32 = -1.5f;
    r.f64 = 1e300;
    r.str = "text";
    r.value = netchan_array(record_list, 2);
    r.inner.on = true;
    r.inner.ratio = 0.25f;
    return r;
}

static void check_record(const record *r) {
    CHECK(r->b && r->i32 == INT32_MIN && r->i64 == INT64_MIN && r->u32 == UINT32_MAX && r->u64 == UINT64_MAX);
    CHECK(r->f32 == -1.5f && r->f64 == 1e300);
    CHECK_STR(r->str, "text");
    CHECK_INT(netchan_count(&r->value), 2);
    CHECK_STR(netchan_as_str(netchan_at(&r->value, 0), "?"), "in a list");
    CHECK_INT(netchan_as_int(netchan_at(&r->value, 1), 0), -5);
    CHECK(r->inner.on && r->inner.ratio == 0.25f);
    CHECK_INT(r->untouched, 42);
}

static void test_struct_round_trip(void) {
    record r = make_record(), out;
    netchan_value v = netchan_struct(record_fields, &r), got[2];
    size_t size;
    uint8_t *bytes = encode(&v, &size);
    long calls = alloc_count();
    CHECK_INT(decode(&got[0], bytes, size), NETCHAN_OK);
    CHECK_INT(netchan_copy(&got[1], &v), NETCHAN_OK);
    CHECK_INT(alloc_count() - calls, 2);
    CHECK(same(&got[0], &got[1]));
    for (int i = 0; i < 2; i++) {
        memset(&out, 0, sizeof out);
        out.untouched = 42;
        CHECK_INT(got[i].type, NETCHAN_MAP);
        CHECK_INT(netchan_count(&got[i]), 10);
        CHECK_INT(netchan_unpack(&got[i], record_fields, &out), NETCHAN_OK);
        check_record(&out);
        netchan_clear(&out.value); /* borrowed: nothing to free, and nothing freed twice below */
        netchan_clear(&got[i]);
    }
    CHECK_INT(alloc_blocks(), 0);
    free(bytes);
}

static void test_struct_wire(void) {
    part p = {true, 1.0f};
    netchan_value v = netchan_struct(part_fields, &p);
    static const char right[] = "\x89\x14\x02\x02" "on\x82\x05" "ratio\x85\x00\x00\x00\x00\x00\x00\xf0\x3f";
    size_t size;
    uint8_t *bytes = encode(&v, &size);
    CHECK_INT(size, sizeof right - 1);
    CHECK(memcmp(bytes, right, size) == 0);
    free(bytes);
}

static void test_struct_null_string_is_nil(void) {
    record r = make_record(), out = make_record();
    r.str = NULL;
    netchan_value v = netchan_struct(record_fields, &r), got;
    CHECK_INT(netchan_copy(&got, &v), NETCHAN_OK);
    CHECK(netchan_is_nil(netchan_get(&got, "str")));
    CHECK_INT(netchan_unpack(&got, record_fields, &out), NETCHAN_OK);
    CHECK(out.str == NULL);
    netchan_clear(&got);
}

/* A received value may stand in a map that was built here; what is unpacked from there is borrowed all the same. */
static void test_unpack_borrows(void) {
    record out = make_record();
    netchan_value source = netchan_str("owned by the copy"), owner;
    netchan_entry e;
    CHECK_INT(netchan_copy(&owner, &source), NETCHAN_OK);
    e.key = "value";
    e.value = owner;
    netchan_value v = netchan_map(&e, 1);
    CHECK_INT(netchan_unpack(&v, record_fields, &out), NETCHAN_OK);
    netchan_clear(&out.value);
    CHECK_STR(netchan_as_str(&owner, "?"), "owned by the copy");
    netchan_clear(&owner);
    CHECK_INT(alloc_blocks(), 0);
}

typedef struct {
    int64_t id;
    part parts;
    netchan_value any;
} envelope;

static const netchan_field envelope_fields[] = {NETCHAN_FIELD(envelope, id, I64),
                                                NETCHAN_FIELD_STRUCT(envelope, parts, part, part_fields),
                                                NETCHAN_FIELD_VALUE(envelope, any), NETCHAN_FIELDS_END};
static const netchan_field empty_fields[] = {NETCHAN_FIELDS_END};

static void test_structs_inside_everything(void) {
    record r = make_record(), out;
    envelope e, back;
    memset(&e, 0, sizeof e);
    memset(&back, 0, sizeof back);
    memset(&out, 0, sizeof out);
    out.untouched = 42;
    e.id = 9;
    e.parts.on = true;
    e.any = netchan_struct(record_fields, &r);
    netchan_value list[3], got;
    list[0] = netchan_struct(envelope_fields, &e);
    list[1] = netchan_struct(empty_fields, &e);
    list[2] = netchan_struct(part_fields, &e.parts);
    netchan_value v = netchan_array(list, 3);
    size_t size;
    uint8_t *bytes = encode(&v, &size);
    CHECK_INT(decode(&got, bytes, size), NETCHAN_OK);
    CHECK_INT(netchan_unpack(netchan_at(&got, 0), envelope_fields, &back), NETCHAN_OK);
    CHECK_INT(back.id, 9);
    CHECK(back.parts.on);
    CHECK_INT(netchan_unpack(&back.any, record_fields, &out), NETCHAN_OK);
    check_record(&out);
    CHECK_INT(netchan_at(&got, 1)->type, NETCHAN_MAP);
    CHECK_INT(netchan_count(netchan_at(&got, 1)), 0);
    CHECK(netchan_as_bool(netchan_get(netchan_at(&got, 2), "on"), false));
    netchan_clear(&got);
    free(bytes);
}

static void test_structs_count_as_depth(void) {
    envelope e;
    netchan_value got;
    memset(&e, 0, sizeof e);
    e.any = nest(netchan_int(1), DEPTH - 1);
    netchan_value v = netchan_struct(envelope_fields, &e);
    CHECK_INT(netchan_copy(&got, &v), NETCHAN_OK);
    netchan_clear(&got);
    e.any = nest(netchan_int(1), DEPTH);
    CHECK_INT(netchan_copy(&got, &v), NETCHAN_EINVAL);
    e.any.type = 200;
    CHECK_INT(netchan_copy(&got, &v), NETCHAN_EINVAL);
}

static void test_unpack_keeps_what_was_not_sent(void) {
    record out = make_record();
    out.untouched = 42;
    netchan_entry e[4];
    e[0].key = "unknown";
    e[0].value = netchan_str("skipped");
    e[1].key = "i32";
    e[1].value = netchan_int(17);
    e[2].key = "inner";
    e[2].value = netchan_map(NULL, 0);
    e[3].key = "i3";
    e[3].value = netchan_str("a prefix of a name is another name");
    netchan_value v = netchan_map(e, 4);
    CHECK_INT(netchan_unpack(&v, record_fields, &out), NETCHAN_OK);
    CHECK_INT(out.i32, 17);
    out.i32 = INT32_MIN;
    check_record(&out);
    v = netchan_map(NULL, 0);
    CHECK_INT(netchan_unpack(&v, record_fields, &out), NETCHAN_OK);
    check_record(&out);
}

/* A map whose one entry cannot be the field must be refused with the field's name, and nothing may be written. */
static void check_unfit(const char *name, netchan_value value) {
    record out = make_record();
    out.untouched = 42;
    netchan_entry e[2];
    e[0].key = "i32"; /* good and first in the table */
    e[0].value = netchan_int(1);
    e[1].key = name;
    e[1].value = value;
    netchan_value v = netchan_map(strcmp(name, "i32") == 0 ? e + 1 : e, strcmp(name, "i32") == 0 ? 1 : 2);
    CHECK_INT(netchan_unpack(&v, record_fields, &out), NETCHAN_ETYPE);
    char quoted[32];
    snprintf(quoted, sizeof quoted, "\"%s\"", name);
    if (!strstr(netchan_errmsg(), quoted))
        test_fail(__FILE__, __LINE__, "%s is not named in: %s", quoted, netchan_errmsg());
    check_record(&out);
}

static void test_unpack_names_the_field_of_another_type(void) {
    static const char *const names[] = {"b", "i32", "i64", "u32", "u64", "f32", "f64", "str", "inner"};
    netchan_value values[8];
    values[0] = netchan_nil();
    values[1] = netchan_bool(true);
    values[2] = netchan_int(1);
    values[3] = netchan_float(1);
    values[4] = netchan_str("1");
    values[5] = netchan_bytes("1", 1);
    values[6] = netchan_array(NULL, 0);
    values[7] = netchan_i32s(NULL, 0);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        for (size_t j = 0; j < sizeof values / sizeof *values; j++) {
            bool number = values[j].type == NETCHAN_INT || (values[j].type == NETCHAN_FLOAT && names[i][0] == 'f');
            bool fits = strcmp(names[i], "b") == 0     ? values[j].type == NETCHAN_BOOL
                        : strcmp(names[i], "str") == 0 ? values[j].type == NETCHAN_STR || values[j].type == NETCHAN_NIL
                                                       : strcmp(names[i], "inner") != 0 && number;
            if (!fits) check_unfit(names[i], values[j]);
        }
    }
    check_unfit("b", netchan_map(NULL, 0));
    check_unfit("str", netchan_map(NULL, 0));
}

static void test_unpack_refuses_numbers_out_of_range(void) {
    check_unfit("i32", netchan_int((int64_t)INT32_MAX + 1));
    check_unfit("i32", netchan_int((int64_t)INT32_MIN - 1));
    check_unfit("i32", netchan_int(INT64_MAX));
    check_unfit("i32", netchan_int(INT64_MIN));
    check_unfit("i32", netchan_uint((uint64_t)INT32_MAX + 1));
    check_unfit("i32", netchan_uint(UINT64_MAX));
    check_unfit("i64", netchan_uint((uint64_t)INT64_MAX + 1));
    check_unfit("i64", netchan_uint(UINT64_MAX));
    check_unfit("u32", netchan_int(-1));
    check_unfit("u32", netchan_uint((uint64_t)UINT32_MAX + 1));
    check_unfit("u32", netchan_uint(UINT64_MAX));
    check_unfit("u64", netchan_int(-1));
    check_unfit("u64", netchan_int(INT64_MIN));
}

static record unpack_number(const char *name, netchan_value value) {
    record out = make_record();
    netchan_entry e;
    e.key = name;
    e.value = value;
    netchan_value v = netchan_map(&e, 1);
    CHECK_INT(netchan_unpack(&v, record_fields, &out), NETCHAN_OK);
    return out;
}

static void test_unpack_accepts_numbers_in_range(void) {
    CHECK_INT(unpack_number("i32", netchan_int(INT32_MAX)).i32, INT32_MAX);
    CHECK_INT(unpack_number("i32", netchan_int(INT32_MIN)).i32, INT32_MIN);
    CHECK_INT(unpack_number("i32", netchan_uint(INT32_MAX)).i32, INT32_MAX);
    CHECK_INT(unpack_number("i64", netchan_int(0)).i64, 0);
    CHECK_INT(unpack_number("i64", netchan_int(1)).i64, 1);
    CHECK_INT(unpack_number("i64", netchan_int(INT64_MIN)).i64, INT64_MIN);
    CHECK_INT(unpack_number("i64", netchan_uint(INT64_MAX)).i64, INT64_MAX);
    CHECK_INT(unpack_number("u32", netchan_int(0)).u32, 0);
    CHECK_INT(unpack_number("u32", netchan_int(UINT32_MAX)).u32, UINT32_MAX);
    CHECK_INT(unpack_number("u32", netchan_uint(UINT32_MAX)).u32, UINT32_MAX);
    CHECK_INT(unpack_number("u64", netchan_int(1)).u64, 1);
    CHECK(unpack_number("u64", netchan_uint(UINT64_MAX)).u64 == UINT64_MAX);
    CHECK(unpack_number("u64", netchan_int(INT64_MAX)).u64 == INT64_MAX);
    CHECK(unpack_number("f32", netchan_int(-3)).f32 == -3.0f);
    CHECK(unpack_number("f64", netchan_uint(3)).f64 == 3.0);
    CHECK(unpack_number("f64", netchan_float(HUGE_VAL)).f64 == HUGE_VAL);
}

static void test_unpack_checks_nested_before_it_writes(void) {
    record out = make_record();
    out.untouched = 42;
    netchan_entry inner, e[2];
    inner.key = "ratio";
    inner.value = netchan_str("no number");
    e[0].key = "i32";
    e[0].value = netchan_int(1);
    e[1].key = "inner";
    e[1].value = netchan_map(&inner, 1);
    netchan_value v = netchan_map(e, 2);
    CHECK_INT(netchan_unpack(&v, record_fields, &out), NETCHAN_ETYPE);
    CHECK(strstr(netchan_errmsg(), "ratio"));
    check_record(&out);
}

static void test_unpack_takes_the_first_of_a_name(void) {
    record out = make_record();
    netchan_entry e[2];
    e[0].key = e[1].key = "i32";
    e[0].value = netchan_int(1);
    e[1].value = netchan_str("never looked at");
    netchan_value v = netchan_map(e, 2);
    CHECK_INT(netchan_unpack(&v, record_fields, &out), NETCHAN_OK);
    CHECK_INT(out.i32, 1);
}

static void test_unpack_wants_a_map(void) {
    make_corpus();
    record out = make_record();
    out.untouched = 42;
    CHECK_INT(netchan_unpack(NULL, record_fields, &out), NETCHAN_ETYPE);
    for (size_t i = 0; i < corpus_size; i++) {
        if (corpus[i].type == NETCHAN_MAP) continue;
        CHECK_INT(netchan_unpack(&corpus[i], record_fields, &out), NETCHAN_ETYPE);
        CHECK(strstr(netchan_errmsg(), "map"));
    }
    check_record(&out);
}

/* --- results --- */

static void test_strerror(void) {
    for (int i = -20; i < 3; i++) CHECK(netchan_strerror(i) && strlen(netchan_strerror(i)) > 0);
    CHECK(netchan_strerror(INT32_MIN) && netchan_strerror(INT32_MAX));
    CHECK(strstr(netchan_strerror(NETCHAN_ECLOSED), "closed"));
}

static void *look_at_errmsg(void *arg) {
    (void)arg;
    CHECK_STR(netchan_errmsg(), "");
    return NULL;
}

static void test_errmsg_is_per_thread(void) {
    netchan_value v;
    CHECK_STR(netchan_errmsg(), "");
    CHECK_INT(decode(&v, "", 0), NETCHAN_EPROTO);
    CHECK(strlen(netchan_errmsg()) > 0);
    test_join(test_start(look_at_errmsg, NULL));
}

int main(int argc, char **argv) {
    static const test_entry tests[] = {
        TEST(round_trips),
        TEST(encode_never_writes_more_than_size),
        TEST(received_blocks_are_aligned_and_terminated),
        TEST(wire_scalars),
        TEST(wire_blocks),
        TEST(wire_trees),
        TEST(wire_unknown_tags_are_nil),
        TEST(wire_refused),
        TEST(decode_of_no_bytes),
        TEST(truncation_is_always_an_error),
        TEST(fuzz_one_byte),
        TEST(fuzz_random_bytes),
        TEST(depth_limit),
        TEST(depth_limit_of_bytes),
        TEST(max_block),
        TEST(out_of_memory),
        TEST(invalid_values),
        TEST(channels_have_no_bytes),
        TEST(clear_leaves_what_was_borrowed),
        TEST(looking_never_fails),
        TEST(numbers_convert_when_they_fit),
        TEST(maps_find_the_first),
        TEST(struct_round_trip),
        TEST(struct_wire),
        TEST(struct_null_string_is_nil),
        TEST(unpack_borrows),
        TEST(structs_inside_everything),
        TEST(structs_count_as_depth),
        TEST(unpack_keeps_what_was_not_sent),
        TEST(unpack_names_the_field_of_another_type),
        TEST(unpack_refuses_numbers_out_of_range),
        TEST(unpack_accepts_numbers_in_range),
        TEST(unpack_checks_nested_before_it_writes),
        TEST(unpack_takes_the_first_of_a_name),
        TEST(unpack_wants_a_map),
        TEST(strerror),
        TEST(errmsg_is_per_thread),
        TEST_END,
    };
    return test_main(argc, argv, tests);
}
