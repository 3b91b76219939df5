/* pool: the words of files, counted by whoever comes to help. The boss hands out blocks of lines, workers answer how often each
 * word is in them. Workers may come and go at any time, also by kill -9: what one had not answered goes to another.
 *
 *     cc -O2 examples/pool.c -o pool -I. -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 *
 *     export NETCHAN_KEY=$(./pool key)     # the same on all machines
 *     ./pool boss :7000 FILE...            # on one
 *     ./pool work boss:7000                # on as many as there are
 */
#define NETCHAN_IMPLEMENTATION
#include "netchan.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { LINES_PER_TASK = 64, TOP = 10, PATIENCE_MS = 10000 };

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

/* Lets the case happen and returns its result. The library dials a lost boss again, we end when that was in vain for too long. */
static int wait_for(netchan_link *link, netchan_case what) {
    static int timeout_ms = NETCHAN_FOREVER;
    for (;;) {
        netchan_value event;
        netchan_case c[] = {what, netchan_case_recv(link->events, &event)};
        int i = netchan_select(c, 2, timeout_ms);
        if (i < 0) fail(i == NETCHAN_ETIMEDOUT ? "the boss is gone" : netchan_errmsg());
        if (i == 0) return c[0].result;
        const char *name = netchan_as_str(netchan_get(&event, "event"), "");
        if (strcmp(name, "up") == 0 || strcmp(name, "resumed") == 0) timeout_ms = NETCHAN_FOREVER;
        if (strcmp(name, "down") == 0) timeout_ms = PATIENCE_MS;
        netchan_clear(&event);
    }
}

/* Does a task, {id, text}, and sends {id, words, counts: {word: count, ...}}. If that is lost, the boss asks somebody else. */
static void answer(netchan_link *link, const netchan_value *task) {
    size_t size;
    const void *data = netchan_as_block(netchan_get(task, "text"), NETCHAN_BYTES, &size);
    if (!data) fail("the boss sent something that is not a task");
    char *text = memcpy(resize(NULL, size, 1), data, size);
    text[size] = '\0';
    table t = {NULL, 0, 0};
    uint64_t words = count_words(&t, text, size);
    table_pack(&t);

    netchan_entry reply[] = {{"id", netchan_uint(netchan_as_uint(netchan_get(task, "id"), 0))},
                             {"words", netchan_uint(words)},
                             {"counts", netchan_map(t.entries, t.used)}};
    wait_for(link, netchan_case_send(link->send, netchan_map(reply, 3)));
    free(t.entries);
    free(text);
}

static int work(netchan_link *link) {
    for (int result = NETCHAN_OK; result != NETCHAN_ECLOSED;) { /* closed: the boss has no more tasks */
        netchan_value task;
        result = wait_for(link, netchan_case_recv(link->recv, &task));
        if (result == NETCHAN_OK) answer(link, &task), netchan_clear(&task);
    }
    netchan_hangup(link, NULL);
    return 0;
}

/* ---- The boss: one thread, one select ---- */

typedef struct {
    char *text;
    size_t size;
    uint64_t peer; /* who has it; 0: it waits in the queue */
    bool answered;
} task;

static task *tasks;
static size_t count, next, answered, again, lines, workers; /* no task before tasks[next] waits */
static uint64_t first_id, words;
static table merged;

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

/* Each task counts once, whoever answers it first. */
static void merge(const netchan_value *reply) {
    uint64_t i = netchan_as_uint(netchan_get(reply, "id"), 0) - first_id;
    const netchan_value *counts = netchan_get(reply, "counts");
    if (i >= count || tasks[i].answered || counts->type != NETCHAN_MAP) return;
    tasks[i].answered = true;
    answered++;
    free(tasks[i].text);
    words += netchan_as_uint(netchan_get(reply, "words"), 0);
    const netchan_entry *in = counts->as.block.data, *end = in + netchan_count(counts);
    for (; in < end; in++) {
        netchan_entry *e = table_add(&merged, in->key, netchan_as_uint(&in->value, 0));
        if (e->key == in->key) e->key = strcpy(resize(NULL, strlen(in->key), 1), in->key);
    }
}

static void happened(const netchan_value *event) {
    const char *name = netchan_as_str(netchan_get(event, "event"), "");
    bool up = strcmp(name, "up") == 0, gone = strcmp(name, "lost") == 0 || strcmp(name, "drained") == 0;
    bool dropped = netchan_as_uint(netchan_get(event, "dropped"), 0) > 0; /* then anybody may be gone */
    uint64_t peer = netchan_as_uint(netchan_get(event, "peer"), 0);
    workers += up;
    workers -= gone && workers > 0;
    for (size_t i = 0; (gone || dropped) && i < count; i++)
        if (tasks[i].peer && !tasks[i].answered && (dropped || tasks[i].peer == peer)) {
            tasks[i].peer = 0;
            if (i < next) next = i;
            again++;
        }
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
    while (show_progress(), answered < count) {
        while (next < count && (tasks[next].peer || tasks[next].answered)) next++;
        task t = {NULL, 0, 0, false};
        if (next < count) t = tasks[next];
        netchan_entry message[] = {{"id", netchan_uint(first_id + next)}, {"text", netchan_bytes(t.text, t.size)}};
        netchan_value reply, event;
        netchan_case c[] = {netchan_case_send(t.text ? link->send : NULL, netchan_map(message, 2)), /* NULL: never ready */
                            netchan_case_recv(link->recv, &reply), netchan_case_recv(link->events, &event)};
        switch (netchan_select(c, 3, NETCHAN_FOREVER)) {
        case 0:
            if (c[0].result == NETCHAN_OK) tasks[next].peer = c[0].peer.id;
            else if (c[0].result == NETCHAN_ETOOBIG) fail("a line is too long");
            else again++; /* lost on the way, and still the next */
            break;
        case 1: merge(&reply), netchan_clear(&reply); break;
        case 2: happened(&event), netchan_clear(&event); break;
        default: fail(netchan_errmsg());
        }
    }
}

/* Sends the workers home. One that is still busy with what another has answered is heard out. */
static void dismiss_all(netchan_link *link) {
    netchan_close(link->send);
    for (int i = 0; workers > 0 && i >= 0;) {
        netchan_value event;
        netchan_case c[] = {netchan_case_recv(link->recv, NULL), netchan_case_recv(link->events, &event)};
        if ((i = netchan_select(c, 2, 2000)) == 1) happened(&event), netchan_clear(&event);
    }
    netchan_hangup(link, NULL);
}

static int by_count(const void *a, const void *b) {
    const netchan_entry *x = a, *y = b;
    if (x->value.as.u64 != y->value.as.u64) return x->value.as.u64 < y->value.as.u64 ? 1 : -1;
    return strcmp(x->key, y->key);
}

static int boss(netchan_link *link, int files) {
    printf("listening on %s\n", link->address);
    fflush(stdout);
    hand_out_all(link);
    dismiss_all(link);
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
    if (!leads && !(strcmp(role, "work") == 0 && argc == 3))
        return fprintf(stderr, "usage: pool key | pool boss ADDRESS FILE... | pool work ADDRESS\n"), 2;

    first_id = (uint64_t)time(NULL) << 32; /* so that a late answer to an earlier boss is none to this one */
    for (int i = 3; i < argc; i++) read_file(argv[i]);

    netchan_options o = {0};
    o.shared_key = getenv("NETCHAN_KEY");
    o.connect_ms = PATIENCE_MS;
    o.resume_ms = 1000; /* a link may break, but what a dead worker has not answered must not wait long for it */
    netchan_link *link = leads ? netchan_listen(argv[2], &o) : netchan_dial(argv[2], &o);
    if (!link) fail(netchan_errmsg());
    return leads ? boss(link, argc - 3) : work(link);
}
