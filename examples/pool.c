/* pool: the words of files, counted by whoever comes to help. The boss hands out blocks of lines, workers answer how often each
 * word is in them, by the channel that came with the task. Workers may come and go at any time, also by kill -9: then that
 * channel ends with ELOST, and the task goes to another.
 *
 *     cc -O2 examples/pool.c -o pool -I. -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 *
 *     export NETCHAN_KEY=$(./pool key)     # the same on all machines
 *     ./pool boss :7000 FILE...            # on one
 *     ./pool work boss:7000 [PAUSE_MS]     # on as many as there are; one that pauses before each task helps less
 */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#include <ctype.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LINES_PER_TASK = 64, HANDS = 64, TOP = 10, PATIENCE_MS = 10000 };

static void fail(const char *why) {
    fprintf(stderr, "pool: %s\n", why);
    exit(1);
}

/* Room for count items and one byte. */
static void *resize(void *p, size_t count, size_t size) {
    p = count < SIZE_MAX / size ? realloc(p, count * size + 1) : NULL;
    if (!p) fail("out of memory");
    return p;
}

/* How often each word came: a hash table with open addressing, at most half full. */
typedef struct {
    netchan_entry *entries; /* a word and a uint; where it is empty the key is NULL */
    size_t size, used;
} table;

/* Counts the word n times more and returns its entry. A new entry has the pointer `word` as its key. */
static netchan_entry *table_add(table *t, const char *word, uint64_t n) {
    if (2 * t->used >= t->size) {
        table old = *t;
        t->used = 0;
        t->size = old.size ? 2 * old.size : 256;
        t->entries = memset(resize(NULL, t->size, sizeof *t->entries), 0, t->size * sizeof *t->entries);
        for (size_t i = 0; i < old.size; i++)
            if (old.entries[i].key) table_add(t, old.entries[i].key, old.entries[i].value.as.u64);
        free(old.entries);
    }
    uint64_t hash = 14695981039346656037u; /* FNV-1a */
    for (const char *c = word; *c; c++) hash = (hash ^ (unsigned char)*c) * 1099511628211u;
    size_t i = (size_t)(hash ^ hash >> 32) & (t->size - 1);
    while (t->entries[i].key && strcmp(t->entries[i].key, word) != 0) i = (i + 1) & (t->size - 1);

    netchan_entry *e = &t->entries[i];
    if (!e->key) e->key = word, e->value = netchan_uint(0), t->used++;
    e->value.as.u64 += n;
    return e;
}

/* Makes an array of the used entries; then nothing can be added. */
static void table_pack(table *t) {
    size_t n = 0;
    for (size_t i = 0; i < t->size; i++)
        if (t->entries[i].key) t->entries[n++] = t->entries[i];
}

/* ---- The worker ---- */

/* Counts the words of a text with a NUL behind it, and cuts it up. A word is what `wc -w` takes for one in the C locale: bytes none
 * of which is blank and one of which can be printed. A NUL, which no key of a map can hold, becomes a DEL, which is neither. */
static uint64_t count_words(table *t, char *text, size_t size) {
    uint64_t words = 0;
    for (size_t i = 0; i < size; i++)
        if (text[i] == '\0') text[i] = '\177';
    for (char *c = text, *end = text + size; c < end; c++) {
        const char *word = c;
        bool printable = false;
        for (; *c && !isspace((unsigned char)*c); c++) printable |= isprint((unsigned char)*c) != 0;
        *c = '\0';
        if (printable) table_add(t, word, 1), words++;
    }
    return words;
}

/* Does a task, {text, reply}, and answers {words, counts: {word: count, ...}} by the channel that came with it. */
static int answer(const netchan_value *task) {
    size_t size;
    const void *data = netchan_as_block(netchan_get(task, "text"), NETCHAN_BYTES, &size);
    netchan *reply = netchan_as_chan(netchan_get(task, "reply"));
    if (!data || !reply) fail("the boss sent something that is not a task");
    char *text = memcpy(resize(NULL, size, 1), data, size);
    text[size] = '\0';
    table t = {NULL, 0, 0};
    uint64_t words = count_words(&t, text, size);
    table_pack(&t);

    netchan_entry counted[] = {{"words", netchan_uint(words)}, {"counts", netchan_map(t.entries, t.used)}};
    int result = netchan_send(reply, netchan_map(counted, 2), NETCHAN_FOREVER);
    free(t.entries);
    free(text);
    return result;
}

/* The library dials a boss that is gone again; the worker ends when that was in vain for too long. */
static int work(netchan_link *link, int pause_ms) {
    int result, timeout_ms = NETCHAN_FOREVER;
    netchan_value task;
    while ((result = netchan_recv(link->recv, &task, timeout_ms)) != NETCHAN_ECLOSED) { /* closed: no more tasks */
        if (result != NETCHAN_OK && result != NETCHAN_ELOST) fail("the boss is gone");
        if (result == NETCHAN_OK) netchan_select(NULL, 0, pause_ms), result = answer(&task);
        timeout_ms = result == NETCHAN_OK ? NETCHAN_FOREVER : PATIENCE_MS;
        netchan_clear(&task);
    }
    netchan_hangup(link, NULL);
    return 0;
}

/* ---- The boss: threads, its hands, that give a task away and wait for the answer; and one that merges the answers ---- */

typedef struct {
    char *text;
    size_t size;
} task;

static task *tasks;
static size_t count, next, answered, again, lines, workers;
static uint64_t words;
static table merged;
static netchan *to_workers, *todo, *answers; /* todo: numbers of tasks, for the hands */

/* Cuts a file into tasks. */
static void read_file(const char *path) {
    FILE *file = fopen(path, "rb");
    char *line = NULL;
    size_t room = 0;
    ssize_t size = 0;
    for (int n = 0; file && (size = getline(&line, &room, file)) > 0; n = (n + 1) % LINES_PER_TASK) {
        if (n == 0) {
            if ((count & (count - 1)) == 0) tasks = resize(tasks, 2 * count + 1, sizeof *tasks);
            memset(&tasks[count++], 0, sizeof *tasks);
        }
        task *t = &tasks[count - 1];
        t->text = resize(t->text, t->size + (size_t)size, 1);
        memcpy(t->text + t->size, line, (size_t)size);
        t->size += (size_t)size;
        lines += line[size - 1] == '\n';
    }
    if (!file || ferror(file)) perror(path), exit(1);
    free(line);
    fclose(file);
}

/* Gives a task away and waits for the answer; false: who had it is gone. Each try has a channel of its own for the reply: what
 * comes late to an earlier one comes to nobody, and each task counts once. */
static bool try_task(size_t number, netchan_value *answer) {
    netchan *reply = netchan_make(1);
    if (!reply) fail(netchan_errmsg());
    netchan_entry message[] = {{"text", netchan_bytes(tasks[number].text, tasks[number].size)},
                               {"reply", netchan_sender(reply)}};
    int sent = netchan_send(to_workers, netchan_map(message, 2), NETCHAN_FOREVER); /* OK: a worker has it; EUNKNOWN: perhaps */
    int result = sent == NETCHAN_OK ? netchan_recv(reply, answer, NETCHAN_FOREVER) : sent;
    netchan_free(reply);
    if (result == NETCHAN_OK) return true;
    if (result != NETCHAN_ELOST && result != NETCHAN_EUNKNOWN)
        fail(result == NETCHAN_ETOOBIG ? "a line is too long" : netchan_strerror(result));
    __atomic_add_fetch(&again, 1, __ATOMIC_RELAXED);
    fprintf(stderr, "%spool: task %zu is sent again: its %s ended with %s\n", isatty(STDERR_FILENO) ? "\r" : "", number,
            sent == NETCHAN_OK ? "reply" : "send", result == NETCHAN_ELOST ? "ELOST" : "EUNKNOWN");
    return false;
}

static void *hand(void *arg) {
    for (netchan_value number, answer; netchan_recv(todo, &number, NETCHAN_FOREVER) == NETCHAN_OK; netchan_clear(&number)) {
        size_t n = (size_t)netchan_as_uint(&number, 0);
        while (!try_task(n, &answer)) continue;
        netchan_send(answers, answer, NETCHAN_FOREVER);
        netchan_clear(&answer);
        free(tasks[n].text);
    }
    return arg;
}

static void merge(const netchan_value *answer) {
    const netchan_value *counts = netchan_get(answer, "counts");
    if (counts->type != NETCHAN_MAP) fail("a worker sent something that is not an answer");
    answered++;
    words += netchan_as_uint(netchan_get(answer, "words"), 0);
    const netchan_entry *in = counts->as.block.data, *end = in + netchan_count(counts);
    for (; in < end; in++) {
        netchan_entry *e = table_add(&merged, in->key, netchan_as_uint(&in->value, 0));
        if (e->key == in->key) e->key = strcpy(resize(NULL, strlen(in->key), 1), in->key);
    }
}

static void happened(const netchan_value *event) {
    const char *name = netchan_as_str(netchan_get(event, "event"), "");
    workers += strcmp(name, "up") == 0;
    workers -= workers > 0 && (strcmp(name, "lost") == 0 || strcmp(name, "drained") == 0);
}

static void show_progress(void) {
    static size_t shown_percent = SIZE_MAX, shown_workers;
    size_t percent = count ? answered * 100 / count : 100;
    if (percent == shown_percent && workers == shown_workers) return;
    bool terminal = isatty(STDERR_FILENO);
    fprintf(stderr, "%spool: %zu%% (tasks %zu/%zu), %zu workers%s", terminal ? "\r" : "", percent, answered, count, workers,
            terminal && answered < count ? "  " : "\n");
    shown_percent = percent;
    shown_workers = workers;
}

static void hand_out_all(netchan_link *link) {
    for (netchan_value v = netchan_nil(); show_progress(), answered < count; netchan_clear(&v)) {
        netchan_case c[] = {netchan_case_send(next < count ? todo : NULL, netchan_uint(next)), /* NULL: never ready */
                            netchan_case_recv(answers, &v), netchan_case_recv(link->events, &v)};
        switch (netchan_select(c, 3, NETCHAN_FOREVER)) {
        case 0: next++; break;
        case 1: merge(&v); break;
        case 2: happened(&v); break;
        default: fail(netchan_errmsg());
        }
    }
    netchan_close(todo);
    netchan_close(link->send); /* sends the workers home */
}

static int by_count(const void *a, const void *b) {
    const netchan_entry *x = a, *y = b;
    if (x->value.as.u64 != y->value.as.u64) return x->value.as.u64 < y->value.as.u64 ? 1 : -1;
    return strcmp(x->key, y->key);
}

static int boss(netchan_link *link, int files) {
    pthread_t hands[HANDS];
    printf("listening on %s\n", link->address);
    fflush(stdout);
    to_workers = link->send, todo = netchan_make(0), answers = netchan_make(0);
    if (!todo || !answers) fail(netchan_errmsg());
    for (int i = 0; i < HANDS; i++)
        if (pthread_create(&hands[i], NULL, hand, NULL) != 0) fail("cannot start a thread");
    hand_out_all(link);
    for (int i = 0; i < HANDS; i++) pthread_join(hands[i], NULL);
    netchan_hangup(link, NULL);
    table_pack(&merged);
    if (merged.used > 0) qsort(merged.entries, merged.used, sizeof *merged.entries, by_count);
    for (size_t i = 0; i < merged.used && i < TOP; i++)
        printf("%10llu %s\n", (unsigned long long)merged.entries[i].value.as.u64, merged.entries[i].key);
    printf("files=%d lines=%zu words=%llu tasks=%zu again=%zu distinct=%zu\n", files, lines, (unsigned long long)words,
           count, again, merged.used);
    return 0;
}

int main(int argc, char **argv) {
    const char *role = argc > 1 ? argv[1] : "";
    bool leads = strcmp(role, "boss") == 0 && argc > 3;
    if (strcmp(role, "key") == 0 && argc == 2) {
        char key[NETCHAN_KEY_SIZE];
        if (netchan_keygen(key, sizeof key) != NETCHAN_OK) fail(netchan_errmsg());
        return puts(key), 0;
    }
    if (!leads && !(strcmp(role, "work") == 0 && (argc == 3 || argc == 4)))
        return fprintf(stderr, "usage: pool key | pool boss ADDRESS FILE... | pool work ADDRESS [PAUSE_MS]\n"), 2;
    for (int i = 3; leads && i < argc; i++) read_file(argv[i]);

    netchan_options o = {0};
    o.shared_key = getenv("NETCHAN_KEY");
    o.connect_ms = PATIENCE_MS;
    o.resume_ms = 1000; /* a link may break, but what a dead worker has not answered must not wait long for it */
    netchan_link *link = leads ? netchan_listen(argv[2], &o) : netchan_dial(argv[2], &o);
    if (!link) fail(netchan_errmsg());
    return leads ? boss(link, argc - 3) : work(link, argc == 4 ? atoi(argv[3]) : 0);
}
