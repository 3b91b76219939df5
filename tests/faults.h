/* netchan.h, whose calls of the system can be told to fail: the n-th call of a function, once, in one of the ways in
 * which the system may fail it. Include it in place of netchan.h with its implementation, and of alloc.h. */
#ifndef NETCHAN_TEST_FAULTS_H
#define NETCHAN_TEST_FAULTS_H

#include "alloc.h"

/* All that netchan.h includes, so that it declares nothing more under the names that are macros below. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#ifdef __linux__
#include <sys/epoll.h>
#endif
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <mbedtls/asn1.h>
#include <mbedtls/ctr_drbg.h>
#include <mbedtls/entropy.h>
#include <mbedtls/ssl.h>
#include <mbedtls/x509_crt.h>
#include <psa/crypto.h>

enum fault_call {
    FAULT_NONE, /* no call fails */
    FAULT_ACCEPT,
    FAULT_BIND,
    FAULT_CLOSE,
    FAULT_CONNECT,
    FAULT_EPOLL_CREATE,
    FAULT_EPOLL_CTL,
    FAULT_EPOLL_WAIT,
    FAULT_FCNTL,
    FAULT_GETADDRINFO,
    FAULT_GETSOCKNAME,
    FAULT_GETSOCKOPT,
    FAULT_LISTEN,
    FAULT_OPEN,
    FAULT_PIPE,
    FAULT_POLL,
    FAULT_PTHREAD_CREATE,
    FAULT_RANDOM, /* psa_generate_random() */
    FAULT_READ,
    FAULT_RECV,
    FAULT_SEND,
    FAULT_SETSOCKOPT,
    FAULT_SOCKET,
    FAULT_WRITE,
    FAULT_CALLS
};

/* In place of an errno: */
enum {
    FAULT_SHORT = -1000, /* one byte of what was asked for */
    FAULT_END            /* nothing: the end of the stream */
};

static int fault_which;   /* atomic: enum fault_call */
static int fault_error;   /* atomic: an errno, one of those above, or what the function returns */
static long fault_at;     /* atomic: at which call */
static long fault_calls;  /* atomic: how many there were */

/* Lets the n-th call from now fail. No other fault may be under way; n = 0 counts the calls only. */
static inline void fault_set(enum fault_call which, int error, long n) {
    __atomic_store_n(&fault_which, FAULT_NONE, __ATOMIC_SEQ_CST);
    __atomic_store_n(&fault_calls, 0L, __ATOMIC_SEQ_CST);
    __atomic_store_n(&fault_error, error, __ATOMIC_SEQ_CST);
    __atomic_store_n(&fault_at, n, __ATOMIC_SEQ_CST);
    __atomic_store_n(&fault_which, (int)which, __ATOMIC_SEQ_CST);
}

/* How many calls there were since fault_set(). */
static inline long fault_count(void) {
    return __atomic_load_n(&fault_calls, __ATOMIC_SEQ_CST);
}

/* Whether the call that was told to fail was made. */
static inline bool fault_hit(void) {
    long at = __atomic_load_n(&fault_at, __ATOMIC_SEQ_CST);
    return at && fault_count() >= at;
}

/* Whether this call fails; errno is set then. */
static bool fault_now(enum fault_call call) {
    if (__atomic_load_n(&fault_which, __ATOMIC_SEQ_CST) != (int)call) return false;
    long n = __atomic_add_fetch(&fault_calls, 1, __ATOMIC_SEQ_CST);
    if (n != __atomic_load_n(&fault_at, __ATOMIC_SEQ_CST)) return false;
    errno = __atomic_load_n(&fault_error, __ATOMIC_SEQ_CST);
    return true;
}

/* Who made the connection has left meanwhile; otherwise it still waits. */
static inline int fault_accept(int fd, struct sockaddr *a, socklen_t *size) {
    if (!fault_now(FAULT_ACCEPT)) return accept(fd, a, size);
    if (errno == ECONNABORTED) {
        int gone = accept(fd, a, size);
        if (gone >= 0) close(gone);
        errno = ECONNABORTED;
    }
    return -1;
}

#ifdef SOCK_CLOEXEC
#ifndef _GNU_SOURCE /* netchan.h declares it likewise */
extern int accept4(int fd, struct sockaddr *a, socklen_t *size, int flags);
extern int pipe2(int *fds, int flags);
#endif
static inline int fault_accept4(int fd, struct sockaddr *a, socklen_t *size, int flags) {
    if (!fault_now(FAULT_ACCEPT)) return accept4(fd, a, size, flags);
    if (errno == ECONNABORTED) {
        int gone = accept(fd, a, size);
        if (gone >= 0) close(gone);
        errno = ECONNABORTED;
    }
    return -1;
}

static inline int fault_pipe2(int *fds, int flags) {
    return fault_now(FAULT_PIPE) ? -1 : pipe2(fds, flags);
}

#define accept4(fd, a, size, flags) fault_accept4(fd, a, size, flags)
#define pipe2(fds, flags) fault_pipe2(fds, flags)
#endif

#ifdef __linux__
static inline int fault_epoll_create1(int flags) {
    return fault_now(FAULT_EPOLL_CREATE) ? -1 : epoll_create1(flags);
}

/* Something can always be taken away. */
static inline int fault_epoll_ctl(int set, int what, int fd, struct epoll_event *e) {
    return what != EPOLL_CTL_DEL && fault_now(FAULT_EPOLL_CTL) ? -1 : epoll_ctl(set, what, fd, e);
}

static inline int fault_epoll_wait(int set, struct epoll_event *news, int most, int timeout_ms) {
    return fault_now(FAULT_EPOLL_WAIT) ? -1 : epoll_wait(set, news, most, timeout_ms);
}

#define epoll_create1(flags) fault_epoll_create1(flags)
#define epoll_ctl(set, what, fd, e) fault_epoll_ctl(set, what, fd, e)
#define epoll_wait(set, news, most, timeout_ms) fault_epoll_wait(set, news, most, timeout_ms)
#endif

static inline int fault_bind(int fd, const struct sockaddr *a, socklen_t size) {
    return fault_now(FAULT_BIND) ? -1 : bind(fd, a, size);
}

/* The descriptor is closed all the same, as on Linux. */
static inline int fault_close(int fd) {
    int result = close(fd);
    return fault_now(FAULT_CLOSE) ? -1 : result;
}

/* What a signal interrupts goes on by itself. */
static inline int fault_connect(int fd, const struct sockaddr *a, socklen_t size) {
    if (!fault_now(FAULT_CONNECT)) return connect(fd, a, size);
    int error = errno;
    if (error == EINTR) connect(fd, a, size);
    errno = error;
    return -1;
}

static inline int fault_fcntl(int fd, int command, int arg) {
    return fault_now(FAULT_FCNTL) ? -1 : fcntl(fd, command, arg);
}

static inline int fault_getaddrinfo(const char *host, const char *port, const struct addrinfo *hints,
                                    struct addrinfo **list) {
    return fault_now(FAULT_GETADDRINFO) ? errno : getaddrinfo(host, port, hints, list);
}

static inline int fault_getsockname(int fd, struct sockaddr *a, socklen_t *size) {
    return fault_now(FAULT_GETSOCKNAME) ? -1 : getsockname(fd, a, size);
}

/* SO_ERROR: a connect that has failed. */
static inline int fault_getsockopt(int fd, int level, int name, void *value, socklen_t *size) {
    bool fails = fault_now(FAULT_GETSOCKOPT);
    int error = errno, result = getsockopt(fd, level, name, value, size);
    if (!fails) return result;
    if (error == ECONNREFUSED && name == SO_ERROR) {
        memcpy(value, &error, sizeof error);
        return 0;
    }
    errno = error;
    return -1;
}

static inline int fault_listen(int fd, int backlog) {
    return fault_now(FAULT_LISTEN) ? -1 : listen(fd, backlog);
}

static inline int fault_open(const char *path, int flags) {
    return fault_now(FAULT_OPEN) ? -1 : open(path, flags);
}

static inline int fault_pipe(int *fds) {
    return fault_now(FAULT_PIPE) ? -1 : pipe(fds);
}

static inline int fault_poll(struct pollfd *polls, nfds_t count, int timeout_ms) {
    return fault_now(FAULT_POLL) ? -1 : poll(polls, count, timeout_ms);
}

static inline int fault_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *),
                                       void *arg) {
    return fault_now(FAULT_PTHREAD_CREATE) ? errno : pthread_create(thread, attributes, run, arg);
}

static inline psa_status_t fault_random(uint8_t *out, size_t size) {
    return fault_now(FAULT_RANDOM) ? PSA_ERROR_INSUFFICIENT_ENTROPY : psa_generate_random(out, size);
}

/* How many bytes may be moved; negative: the call fails, and with errno FAULT_END it is at the end. */
static inline ssize_t fault_size(enum fault_call call, size_t size) {
    if (!fault_now(call)) return (ssize_t)size;
    return errno == FAULT_SHORT && size > 0 ? 1 : -1;
}

static inline ssize_t fault_read(int fd, void *out, size_t size) {
    ssize_t most = fault_size(FAULT_READ, size);
    if (most < 0) return errno == FAULT_END ? 0 : -1;
    return read(fd, out, (size_t)most);
}

static inline ssize_t fault_recv(int fd, void *out, size_t size, int flags) {
    ssize_t most = fault_size(FAULT_RECV, size);
    if (most < 0) return errno == FAULT_END ? 0 : -1;
    return recv(fd, out, (size_t)most, flags);
}

static inline ssize_t fault_send(int fd, const void *data, size_t size, int flags) {
    ssize_t most = fault_size(FAULT_SEND, size);
    return most < 0 ? -1 : send(fd, data, (size_t)most, flags);
}

static inline int fault_setsockopt(int fd, int level, int name, const void *value, socklen_t size) {
    return fault_now(FAULT_SETSOCKOPT) ? -1 : setsockopt(fd, level, name, value, size);
}

static inline int fault_socket(int domain, int type, int protocol) {
    return fault_now(FAULT_SOCKET) ? -1 : socket(domain, type, protocol);
}

static inline ssize_t fault_write(int fd, const void *data, size_t size) {
    return fault_now(FAULT_WRITE) ? -1 : write(fd, data, size);
}

#define accept(fd, a, size) fault_accept(fd, a, size)
#define bind(fd, a, size) fault_bind(fd, a, size)
#define close(fd) fault_close(fd)
#define connect(fd, a, size) fault_connect(fd, a, size)
#define fcntl(fd, command, arg) fault_fcntl(fd, command, arg)
#define getaddrinfo(host, port, hints, list) fault_getaddrinfo(host, port, hints, list)
#define getsockname(fd, a, size) fault_getsockname(fd, a, size)
#define getsockopt(fd, level, name, value, size) fault_getsockopt(fd, level, name, value, size)
#define listen(fd, backlog) fault_listen(fd, backlog)
#define open(path, flags) fault_open(path, flags)
#define pipe(fds) fault_pipe(fds)
#define poll(polls, count, timeout_ms) fault_poll(polls, count, timeout_ms)
#define psa_generate_random(out, size) fault_random(out, size)
#define pthread_create(thread, attributes, run, arg) fault_pthread_create(thread, attributes, run, arg)
#define read(fd, out, size) fault_read(fd, out, size)
#define recv(fd, out, size, flags) fault_recv(fd, out, size, flags)
#define send(fd, data, size, flags) fault_send(fd, data, size, flags)
#define setsockopt(fd, level, name, value, size) fault_setsockopt(fd, level, name, value, size)
#define socket(domain, type, protocol) fault_socket(domain, type, protocol)
#define write(fd, data, size) fault_write(fd, data, size)

#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#undef accept
#undef accept4
#undef bind
#undef close
#undef connect
#undef fcntl
#undef getaddrinfo
#undef getsockname
#undef getsockopt
#undef listen
#undef open
#undef pipe
#undef pipe2
#undef poll
#undef psa_generate_random
#undef pthread_create
#undef read
#undef recv
#undef send
#undef setsockopt
#undef socket
#undef write

#endif
