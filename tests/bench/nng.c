/* nng with TLS 1.2 over mbedTLS 2.28, as Debian 12 has it, measured beside netchan.h. Links with -lnng. */
#include "sockets.h"

#include <nng/nng.h>
#include <nng/protocol/pair0/pair.h>
#include <nng/protocol/pipeline0/pull.h>
#include <nng/protocol/pipeline0/push.h>
#include <nng/protocol/reqrep0/rep.h>
#include <nng/protocol/reqrep0/req.h>
#include <nng/supplemental/tls/tls.h>

enum { BUFFER = 1000 }; /* messages that may wait, as with ZeroMQ */

/* Who both sides are and whom both trust. It protects nothing but benchmarks on one machine, so it is no secret. */
static const char key_pem[] =
    "-----BEGIN PRIVATE KEY-----\n"
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgkdgwZY7Sh/B2+niV\n"
    "4y6bwgH09avLGqberwWWU8y5FwGhRANCAAR33V3+Aw5JD5VbiaZcrdzkxOHBaIU5\n"
    "PxTeGyaseJYniCV26S/hr9HYbKAtcnAfNewq1KGNdPiTkRhhI8iVgSZV\n"
    "-----END PRIVATE KEY-----\n";
static const char cert_pem[] =
    "-----BEGIN CERTIFICATE-----\n"
    "MIIBYDCCAQegAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv\n"
    "c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM\n"
    "CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABHfdXf4DDkkPlVuJ\n"
    "plyt3OTE4cFohTk/FN4bJqx4lieIJXbpL+Gv0dhsoC1ycB817CrUoY10+JORGGEj\n"
    "yJWBJlWjSDBGMA8GA1UdEwEB/wQFMAMBAf8wFAYDVR0RBA0wC4IJbG9jYWxob3N0\n"
    "MB0GA1UdDgQWBBSxKIa1ftPUcNeFQdNoeQBrr2MshTAKBggqhkjOPQQDAgNHADBE\n"
    "AiAJ8UtntJbPlKxRkHs+07p8/S7ZUIjeADbcBdWtBOYE4AIgIMy8s4woU3QdT2QJ\n"
    "LdKawRU3fr/QupR8VwmHm+Rlxl4=\n"
    "-----END CERTIFICATE-----\n";

struct endpoint {
    nng_socket socket;
};

static void check(int error, const char *what) {
    if (error) bench_fail("%s: %s", what, nng_strerror(error));
}

/* Nothing: the key is fixed, and no function of nng may be called before the fork. */
static void make_keys(void) {}

/* Both sides prove who they are. The sockets of a process share one. */
static nng_tls_config *tls_config(nng_tls_mode mode) {
    static nng_tls_config *config;
    if (config) return config;
    check(nng_tls_config_alloc(&config, mode), "nng_tls_config_alloc");
    check(nng_tls_config_own_cert(config, cert_pem, key_pem, NULL), "nng_tls_config_own_cert");
    check(nng_tls_config_ca_chain(config, cert_pem, NULL), "nng_tls_config_ca_chain");
    check(nng_tls_config_auth_mode(config, NNG_TLS_AUTH_MODE_REQUIRED), "nng_tls_config_auth_mode");
    if (mode == NNG_TLS_MODE_SERVER) return config;
    check(nng_tls_config_server_name(config, "localhost"), "nng_tls_config_server_name");
    return config;
}

static endpoint *open_socket(int (*open)(nng_socket *)) {
    endpoint *e = (endpoint *)malloc(sizeof *e);
    if (!e) bench_fail("no memory for a socket");
    check(open(&e->socket), "nng_open");
    check(nng_socket_set_ms(e->socket, NNG_OPT_SENDTIMEO, PATIENCE_MS), "nng_socket_set_ms");
    check(nng_socket_set_ms(e->socket, NNG_OPT_RECVTIMEO, PATIENCE_MS), "nng_socket_set_ms");
    return e;
}

static endpoint *listen_anywhere(pattern p, int *port) {
    static int (*const opens[])(nng_socket *) = {nng_pull0_open, nng_pair0_open, nng_rep0_open};
    endpoint *e = open_socket(opens[p]);
    nng_listener listener;
    check(nng_listener_create(&listener, e->socket, "tls+tcp://127.0.0.1:0"), "nng_listener_create");
    check(nng_listener_set_ptr(listener, NNG_OPT_TLS_CONFIG, tls_config(NNG_TLS_MODE_SERVER)), "nng_listener_set_ptr");
    check(nng_listener_start(listener, 0), "nng_listener_start");
    check(nng_listener_get_int(listener, NNG_OPT_TCP_BOUND_PORT, port), "nng_listener_get_int");
    return e;
}

static endpoint *dial(pattern p, int port) {
    static int (*const opens[])(nng_socket *) = {nng_push0_open, nng_pair0_open, nng_req0_open};
    endpoint *e = open_socket(opens[p]);
    nng_dialer dialer;
    char address[64];
    snprintf(address, sizeof address, "tls+tcp://127.0.0.1:%d", port);
    if (p == ONE_WAY) check(nng_socket_set_int(e->socket, NNG_OPT_SENDBUF, BUFFER), "nng_socket_set_int");
    check(nng_dialer_create(&dialer, e->socket, address), "nng_dialer_create");
    check(nng_dialer_set_ptr(dialer, NNG_OPT_TLS_CONFIG, tls_config(NNG_TLS_MODE_CLIENT)), "nng_dialer_set_ptr");
    check(nng_dialer_start(dialer, NNG_FLAG_NONBLOCK), "nng_dialer_start");
    return e;
}

static void send_bytes(endpoint *e, const void *bytes, size_t size) {
    check(nng_send(e->socket, (void *)bytes, size, 0), "nng_send"); /* without a flag it only reads them */
}

/* The message is read where it lies. */
static size_t recv_bytes(endpoint *e) {
    nng_msg *message;
    check(nng_recvmsg(e->socket, &message, 0), "nng_recvmsg");
    size_t size = nng_msg_len(message);
    nng_msg_free(message);
    return size;
}

static void answer_one(endpoint *e) {
    recv_bytes(e);
    send_bytes(e, "!", 1);
}
