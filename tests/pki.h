/* Certificates for tests, made with mbedTLS alone: authorities, and who they vouch for, rightly or not. Include it
 * after netchan.h with its implementation, and test.h. Make them before there is a link: mbedTLS belongs to one
 * thread. */
#ifndef NETCHAN_TEST_PKI_H
#define NETCHAN_TEST_PKI_H

#include <mbedtls/asn1.h>
#include <mbedtls/oid.h>
#include <mbedtls/x509_crt.h>

enum { PKI_PEM = 4096, PKI_NAMES = 4 };

/* Somebody: a certificate and its key as PEM text, and the fingerprint of the key. */
typedef struct pki {
    char cert[PKI_PEM], key[PKI_PEM], pin[NETCHAN_FINGERPRINT_SIZE];
} pki;

/* What a certificate says. All zero: CN=netchan, valid now, without names, for any use, signed with its own key. */
typedef struct pki_wish {
    const char *subject; /* as "CN=alice,O=example" */
    const pki *issuer;
    bool ca;
    const char *from, *to;      /* as "20200101000000" */
    const char *dns[PKI_NAMES]; /* in the extension subjectAltName */
    const char *ip[PKI_NAMES];
    size_t dns_size;     /* of dns[0], which may hold a NUL; 0: up to its first */
    const char *use;     /* one of the extended key usages, as MBEDTLS_OID_SERVER_AUTH */
    unsigned key_usage;  /* MBEDTLS_X509_KU_...; 0: all */
    bool sha1;           /* signed with what nobody trusts any more */
} pki_wish;

/* What belongs to one certificate while it is written. */
typedef struct pki_pen {
    mbedtls_x509write_cert w;
    mbedtls_pk_context key, issuer_key;
    mbedtls_x509_crt issuer;
    char issuer_name[256];
    mbedtls_x509_san_list names[2 * PKI_NAMES];
    uint8_t addresses[PKI_NAMES][16];
} pki_pen;

static inline void pki_parse_key(const char *pem, mbedtls_pk_context *key) {
    int e = mbedtls_pk_parse_key(key, (const unsigned char *)pem, strlen(pem) + 1, NULL, 0, mbedtls_psa_get_random,
                                 MBEDTLS_PSA_RANDOM_STATE);
    CHECK_INT(e, 0);
}

static inline void pki_make_key(mbedtls_pk_context *key) {
    CHECK_INT(mbedtls_pk_setup(key, mbedtls_pk_info_from_type(MBEDTLS_PK_ECKEY)), 0);
    CHECK_INT(mbedtls_ecp_gen_key(MBEDTLS_ECP_DP_SECP256R1, mbedtls_pk_ec(*key), mbedtls_psa_get_random,
                                  MBEDTLS_PSA_RANDOM_STATE),
              0);
}

/* Who signs: the issuer, or who it is for. */
static inline void pki_set_issuer(pki_pen *p, const pki_wish *wish, const char *subject) {
    snprintf(p->issuer_name, sizeof p->issuer_name, "%s", subject);
    if (wish->issuer) {
        const char *pem = wish->issuer->cert;
        CHECK_INT(mbedtls_x509_crt_parse(&p->issuer, (const unsigned char *)pem, strlen(pem) + 1), 0);
        CHECK(mbedtls_x509_dn_gets(p->issuer_name, sizeof p->issuer_name, &p->issuer.subject) > 0);
        pki_parse_key(wish->issuer->key, &p->issuer_key);
    }
    mbedtls_x509write_crt_set_issuer_key(&p->w, wish->issuer ? &p->issuer_key : &p->key);
    CHECK_INT(mbedtls_x509write_crt_set_issuer_name(&p->w, p->issuer_name), 0);
}

static inline void pki_set_names(pki_pen *p, const pki_wish *wish) {
    size_t count = 0;
    for (int i = 0; i < PKI_NAMES && wish->dns[i]; i++) {
        mbedtls_x509_subject_alternative_name *n = &p->names[count++].node;
        n->type = MBEDTLS_X509_SAN_DNS_NAME;
        n->san.unstructured_name.p = (unsigned char *)(uintptr_t)wish->dns[i]; /* it is only read */
        n->san.unstructured_name.len = i == 0 && wish->dns_size ? wish->dns_size : strlen(wish->dns[i]);
    }
    for (int i = 0; i < PKI_NAMES && wish->ip[i]; i++) {
        mbedtls_x509_subject_alternative_name *n = &p->names[count++].node;
        bool v6 = strchr(wish->ip[i], ':') != NULL;
        CHECK_INT(inet_pton(v6 ? AF_INET6 : AF_INET, wish->ip[i], p->addresses[i]), 1);
        n->type = MBEDTLS_X509_SAN_IP_ADDRESS;
        n->san.unstructured_name.p = p->addresses[i];
        n->san.unstructured_name.len = v6 ? 16 : 4;
    }
    for (size_t i = 0; i + 1 < count; i++) p->names[i].next = &p->names[i + 1];
    if (count) CHECK_INT(mbedtls_x509write_crt_set_subject_alternative_name(&p->w, p->names), 0);
}

static inline void pki_set_uses(pki_pen *p, const pki_wish *wish) {
    CHECK_INT(mbedtls_x509write_crt_set_basic_constraints(&p->w, wish->ca, -1), 0);
    if (wish->key_usage) CHECK_INT(mbedtls_x509write_crt_set_key_usage(&p->w, wish->key_usage), 0);
    if (!wish->use) return;
    mbedtls_asn1_sequence use;
    memset(&use, 0, sizeof use);
    use.buf.tag = MBEDTLS_ASN1_OID;
    use.buf.p = (unsigned char *)(uintptr_t)wish->use;
    use.buf.len = strlen(wish->use);
    CHECK_INT(mbedtls_x509write_crt_set_ext_key_usage(&p->w, &use), 0);
}

/* Writes what the pen holds. */
static inline void pki_write(pki_pen *p, pki *who) {
    uint8_t serial[16];
    CHECK_INT(mbedtls_psa_get_random(MBEDTLS_PSA_RANDOM_STATE, serial, sizeof serial), 0);
    serial[0] = (uint8_t)((serial[0] & 0x7f) | 1);
    CHECK_INT(mbedtls_x509write_crt_set_serial_raw(&p->w, serial, sizeof serial), 0);
    CHECK_INT(mbedtls_x509write_crt_pem(&p->w, (unsigned char *)who->cert, sizeof who->cert, mbedtls_psa_get_random,
                                        MBEDTLS_PSA_RANDOM_STATE),
              0);
    CHECK_INT(mbedtls_pk_write_key_pem(&p->key, (unsigned char *)who->key, sizeof who->key), 0);
    CHECK_INT(netchan_fingerprint(who->cert, who->pin, sizeof who->pin), NETCHAN_OK);
}

static inline void pki_make(pki *who, const pki_wish *wish) {
    pki_pen p;
    const char *subject = wish->subject ? wish->subject : "CN=netchan";
    memset(&p, 0, sizeof p);
    CHECK_INT(psa_crypto_init(), PSA_SUCCESS);
    mbedtls_x509write_crt_init(&p.w);
    mbedtls_pk_init(&p.key);
    mbedtls_pk_init(&p.issuer_key);
    mbedtls_x509_crt_init(&p.issuer);
    pki_make_key(&p.key);
    mbedtls_x509write_crt_set_version(&p.w, MBEDTLS_X509_CRT_VERSION_3);
    mbedtls_x509write_crt_set_md_alg(&p.w, wish->sha1 ? MBEDTLS_MD_SHA1 : MBEDTLS_MD_SHA256);
    mbedtls_x509write_crt_set_subject_key(&p.w, &p.key);
    CHECK_INT(mbedtls_x509write_crt_set_subject_name(&p.w, subject), 0);
    CHECK_INT(mbedtls_x509write_crt_set_validity(&p.w, wish->from ? wish->from : "20200101000000",
                                                 wish->to ? wish->to : "99991231235959"),
              0);
    pki_set_issuer(&p, wish, subject);
    pki_set_names(&p, wish);
    pki_set_uses(&p, wish);
    pki_write(&p, who);
    mbedtls_x509write_crt_free(&p.w);
    mbedtls_pk_free(&p.key);
    mbedtls_pk_free(&p.issuer_key);
    mbedtls_x509_crt_free(&p.issuer);
}

static inline void pki_make_ca(pki *who, const char *subject) {
    pki_wish wish;
    memset(&wish, 0, sizeof wish);
    wish.subject = subject;
    wish.ca = true;
    pki_make(who, &wish);
}

#endif
