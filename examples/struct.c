/* struct: C structs as values. A table names the members that travel; the other side finds them by name.
 *
 *     cc examples/struct.c -o struct -I. -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#include <stdio.h>

typedef struct {
    double lat, lon;
} position;

typedef struct {
    int64_t when;
    const char *station;
    float celsius;
    position at;
} reading;

static const netchan_field position_fields[] = {
    NETCHAN_FIELD(position, lat, F64),
    NETCHAN_FIELD(position, lon, F64),
    NETCHAN_FIELDS_END,
};

static const netchan_field reading_fields[] = {
    NETCHAN_FIELD(reading, when, I64),
    NETCHAN_FIELD(reading, station, STR),
    NETCHAN_FIELD(reading, celsius, F32),
    NETCHAN_FIELD_STRUCT(reading, at, position, position_fields),
    NETCHAN_FIELDS_END,
};

/* Receives one value, shows it if it is a reading, and says why if it is not. */
static void show(netchan *ch) {
    netchan_value v;
    reading r = {0};
    if (netchan_recv(ch, &v, NETCHAN_FOREVER) != NETCHAN_OK || netchan_unpack(&v, reading_fields, &r) != NETCHAN_OK)
        printf("not a reading: %s\n", netchan_errmsg());
    else
        printf("%s: %.1f degrees at %.2f, %.2f, time %lld\n", r.station ? r.station : "(no name)", r.celsius,
               r.at.lat, r.at.lon, (long long)r.when);
    netchan_clear(&v); /* r.station pointed into v */
}

int main(void) {
    netchan *ch = netchan_make(3);
    if (!ch) return 1;

    reading r = {1700000000, "Jungfraujoch", -11.5F, {46.55, 7.98}};
    netchan_send(ch, netchan_struct(reading_fields, &r), NETCHAN_FOREVER);

    /* On the wire a struct is a map. A member that was not sent stays as it was, a name that is not in the table is skipped. */
    netchan_entry newer[] = {{"celsius", netchan_float(3)}, {"humidity", netchan_int(80)}};
    netchan_send(ch, netchan_map(newer, 2), NETCHAN_FOREVER);

    /* A wrong type is refused as a whole. */
    netchan_entry wrong[] = {{"station", netchan_str("Davos")}, {"when", netchan_str("yesterday")}};
    netchan_send(ch, netchan_map(wrong, 2), NETCHAN_FOREVER);

    for (int i = 0; i < 3; i++) show(ch);
    netchan_free(ch);
    return 0;
}
