/* ZeroMQ with CURVE (X25519, XSalsa20-Poly1305) measured beside netchan.h. The listener takes a dialler with any key,
 * which is less than netchan.h asks for, and makes no difference once they are connected. Links with -lzmq. */
#include "sockets.h"

#include <zmq.h>

typedef struct keys {
    char public_key[41], secret_key[41]; /* Z85 */
} keys;

static keys server_keys, client_keys;

static void check(bool good, const char *what) {
    if (!good) bench_fail("%s: %s", what, zmq_strerror(zmq_errno()));
}

static void make_keys(void) {
    check(zmq_curve_keypair(server_keys.public_key, server_keys.secret_key) == 0, "zmq_curve_keypair");
    check(zmq_curve_keypair(client_keys.public_key, client_keys.secret_key) == 0, "zmq_curve_keypair");
}

static void set_int(void *socket, int option, int value) {
    check(zmq_setsockopt(socket, option, &value, sizeof value) == 0, "zmq_setsockopt");
}

static void set_key(void *socket, int option, const char *key) {
    check(zmq_setsockopt(socket, option, key, strlen(key) + 1) == 0, "zmq_setsockopt");
}

/* All sockets of a process share a context, and its one thread that does the work. */
static void *open_socket(int type) {
    static void *context;
    if (!context) {
        context = zmq_ctx_new();
        check(context && zmq_ctx_set(context, ZMQ_MAX_SOCKETS, 65535) == 0, "zmq_ctx_new");
    }
    void *socket = zmq_socket(context, type);
    check(socket != NULL, "zmq_socket");
    set_int(socket, ZMQ_SNDTIMEO, PATIENCE_MS);
    set_int(socket, ZMQ_RCVTIMEO, PATIENCE_MS);
    return socket;
}

static endpoint *listen_anywhere(pattern p, int *port) {
    static const int types[] = {ZMQ_PULL, ZMQ_PAIR, ZMQ_ROUTER};
    void *socket = open_socket(types[p]);
    char address[64];
    size_t size = sizeof address;
    set_int(socket, ZMQ_CURVE_SERVER, 1);
    set_key(socket, ZMQ_CURVE_SECRETKEY, server_keys.secret_key);
    set_int(socket, ZMQ_BACKLOG, PEERS);
    check(zmq_bind(socket, "tcp://127.0.0.1:*") == 0, "zmq_bind");
    check(zmq_getsockopt(socket, ZMQ_LAST_ENDPOINT, address, &size) == 0, "zmq_getsockopt");
    *port = atoi(strrchr(address, ':') + 1);
    return (endpoint *)socket;
}

static endpoint *dial(pattern p, int port) {
    static const int types[] = {ZMQ_PUSH, ZMQ_PAIR, ZMQ_DEALER};
    void *socket = open_socket(types[p]);
    char address[64];
    snprintf(address, sizeof address, "tcp://127.0.0.1:%d", port);
    set_key(socket, ZMQ_CURVE_SERVERKEY, server_keys.public_key);
    set_key(socket, ZMQ_CURVE_PUBLICKEY, client_keys.public_key);
    set_key(socket, ZMQ_CURVE_SECRETKEY, client_keys.secret_key);
    check(zmq_connect(socket, address) == 0, "zmq_connect");
    return (endpoint *)socket;
}

static void send_bytes(endpoint *e, const void *bytes, size_t size) {
    check(zmq_send(e, bytes, size, 0) == (int)size, "zmq_send");
}

/* The message is read where it lies. */
static size_t recv_bytes(endpoint *e) {
    zmq_msg_t message;
    zmq_msg_init(&message);
    check(zmq_msg_recv(&message, e, 0) >= 0, "zmq_msg_recv");
    size_t size = zmq_msg_size(&message);
    zmq_msg_close(&message);
    return size;
}

/* A router puts before each message who sent it. */
static void answer_one(endpoint *e) {
    char who[255];
    int size = zmq_recv(e, who, sizeof who, 0);
    check(size >= 0, "zmq_recv");
    recv_bytes(e);
    check(zmq_send(e, who, (size_t)size, ZMQ_SNDMORE) == size, "zmq_send");
    send_bytes(e, "!", 1);
}
