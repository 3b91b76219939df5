/* restart: a server whose program is replaced while it serves, and nobody notices. On SIGHUP it starts its successor,
 * which inherits the socket, and hangs up: what it had not received goes back to the diallers, who send it again.
 *
 *     cc examples/restart.c -o restart -I. -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 *
 *     export NETCHAN_KEY=$(openssl rand -hex 32)   # the same on both machines
 *     ./restart listen :7000 >>lines               # or as a service, whose socket systemd opens
 *     seq 1000000 | ./restart dial server:7000
 *     kill -HUP PROCESS                            # as often as you like, each time with a new program in its place
 */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BUFFER = 64, FIRST_FD = 3 }; /* the first socket of a service is 3, see sd_listen_fds(3) of systemd */
static sigset_t signals;

static void fail(const char *why) {
    fprintf(stderr, "restart: %s\n", why);
    exit(1);
}

/* Signals as a channel. SIGHUP is blocked, and stays so in the successor: none is missed. */
static void *wait_for_hup(void *hup) {
    for (int n; sigwait(&signals, &n) == 0;) netchan_send(hup, netchan_nil(), NETCHAN_FOREVER);
    return hup;
}

static void start_successor(int fd, char **argv) {
    static char pid[32] = "LISTEN_PID=", fds[] = "LISTEN_FDS=1";
    if (putenv(pid) || putenv(fds) || fork()) return;
    snprintf(pid + 11, sizeof pid - 11, "%d", (int)getpid());
    if (dup2(fd, FIRST_FD) == FIRST_FD && fcntl(FIRST_FD, F_SETFD, 0) == 0) execvp(argv[0], argv);
    _exit(127);
}

static void listening(netchan_link *link, char **argv) {
    pthread_t thread;
    netchan *hup = netchan_make(0);
    netchan_value v;
    sigemptyset(&signals), sigaddset(&signals, SIGHUP), pthread_sigmask(SIG_BLOCK, &signals, NULL);
    if (!hup || pthread_create(&thread, NULL, wait_for_hup, hup)) fail("no thread");
    netchan_case c[] = {netchan_case_recv(link->recv, &v), netchan_case_recv(hup, NULL)};
    fprintf(stderr, "process %d listening on %s\n", (int)getpid(), link->address);
    for (; netchan_select(c, 2, NETCHAN_FOREVER) == 0; netchan_clear(&v)) {
        if (c[0].result != NETCHAN_OK) fail(netchan_errmsg());
        if (!netchan_is_nil(&v)) fputs(netchan_as_str(&v, "(not a line)\n"), stdout);
        if (fflush(stdout) != 0) fail("cannot write");
    }
    start_successor(link->listen_fd, argv);
}

/* What is left in a buffer goes with who hangs up. When as many nils as fit were sent, all lines have left it. */
static void dialling(netchan_link *link) {
    char line[4096];
    for (int nils = 0; nils < BUFFER;) {
        netchan_value v = fgets(line, sizeof line, stdin) ? netchan_str(line) : netchan_nil();
        nils += netchan_is_nil(&v);
        if (netchan_send(link->send, v, NETCHAN_FOREVER) != NETCHAN_OK) fail(netchan_errmsg());
    }
}

int main(int argc, char **argv) {
    bool listens = argc == 3 && strcmp(argv[1], "listen") == 0;
    if (!listens && !(argc == 3 && strcmp(argv[1], "dial") == 0))
        return fprintf(stderr, "usage: restart listen ADDRESS | restart dial ADDRESS\n"), 2;
    const char *pid = getenv("LISTEN_PID");
    netchan_options o = {.shared_key = getenv("NETCHAN_KEY"), .buffer = BUFFER};
    if (listens && pid && atoi(pid) == (int)getpid()) o.listen_fd = FIRST_FD;
    netchan_link *link = listens ? netchan_listen(argv[2], &o) : netchan_dial(argv[2], &o);
    if (!link) fail(netchan_errmsg());
    listens ? listening(link, argv) : dialling(link);
    return netchan_hangup(link, NULL) == NETCHAN_OK ? 0 : 1;
}
