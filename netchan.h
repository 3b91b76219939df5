/* netchan.h - Go channels between machines, for C, in one header. MIT licence (at the end of the file).
 *
 * A netchan is a channel as in Go: make, send, recv, close, select, with capacity 0 (a rendezvous) or n. Its other end
 * may be in this thread, in this process, or on another machine behind TLS 1.3: the meaning is the same. A send on a
 * channel of capacity 0 returns when a receiver on the other machine has taken the value.
 *
 * HELLO, WORLD
 *
 *     // server.c                                             // client.c
 *     #define NETCHAN_IMPLEMENTATION                          #define NETCHAN_IMPLEMENTATION
 *     #include "netchan.h"                                    #include "netchan.h"
 *     int main(void) {                                        int main(void) {
 *         netchan_options o = {0};                                netchan_options o = {0};
 *         o.shared_key = getenv("NETCHAN_KEY");                   o.shared_key = getenv("NETCHAN_KEY");
 *         netchan_link *l = netchan_listen(":7000", &o);          netchan_link *l = netchan_dial("server:7000", &o);
 *         if (!l) return puts(netchan_errmsg()), 1;               if (!l) return puts(netchan_errmsg()), 1;
 *         netchan_value v;                                        netchan_send(l->send, netchan_str("hello"), 1000);
 *         netchan_recv(l->recv, &v, NETCHAN_FOREVER);             netchan_hangup(l, NULL);
 *         puts(netchan_as_str(&v, "?"));                      }
 *         netchan_clear(&v);
 *         netchan_hangup(l, NULL);
 *     }
 *
 * BUILD
 *
 *     cc server.c -o server -lmbedtls -lmbedx509 -lmbedcrypto -lpthread
 *
 * needs mbedTLS 3.6 with TLS 1.3 (its default configuration) and a POSIX system: Linux, the BSDs, macOS. In exactly one
 * C or C++ file NETCHAN_IMPLEMENTATION is defined before netchan.h is included; include it there before any system
 * header, or give it a file of its own, whose two lines are the define and the include.
 *
 * CONTENTS (grep -n '^ \* \[' netchan.h)
 *
 *   [A] results   [B] values   [C] struct tables   [D] channels and select   [E] links   [F] configuration
 *   [1] platform   [2] bytes and maps   [3] errors   [4] values   [5] struct tables   [6] channels
 *   [7] ends   [8] pairs   [9] the commit protocol   [10] relays   [11] homes   [12] operations   [13] sessions
 *   [14] hubs   [15] trust   [16] TLS   [17] sockets   [18] the I/O loop   [19] links
 *
 * GO BESIDE NETCHAN.H
 *
 *     ch := make(chan T, n)                      netchan *ch = netchan_make(n);
 *     ch <- v                                    netchan_send(ch, v, NETCHAN_FOREVER);
 *     v, ok := <-ch                              ok = netchan_recv(ch, &v, NETCHAN_FOREVER) == NETCHAN_OK;
 *     close(ch)                                  netchan_close(ch);
 *     len(ch), cap(ch)                           netchan_len(ch), netchan_cap(ch)
 *     for v := range ch { ... }                  while (netchan_recv(ch, &v, NETCHAN_FOREVER) == NETCHAN_OK) { ... }
 *     select { case a <- v: case w := <-b: }     netchan_case c[] = {netchan_case_send(a, v), netchan_case_recv(b, &w)};
 *                                                i = netchan_select(c, 2, NETCHAN_FOREVER);
 *     select { ... default: }                    netchan_select(c, 2, NETCHAN_NOWAIT)
 *     case <-time.After(d):                      netchan_select(c, 2, d_in_milliseconds)
 *     ch <- reply (a channel in a message)       netchan_send(ch, netchan_sender(reply), NETCHAN_FOREVER);
 *     a nil channel                              NULL
 *     panic on a second close or a late send     NETCHAN_ECLOSED
 *
 * RULES
 *
 *   Ownership   Value constructors borrow what they are given. A send copies the value before it returns. A receive
 *               gives the value to the caller, who calls netchan_clear(). What the accessors return is borrowed from
 *               their value. Channels are counted: netchan_make() counts one, netchan_retain() one more,
 *               netchan_free() one less. The channels in a netchan_link belong to the link: do not free them; retain
 *               one to keep it past netchan_hangup().
 *   Threads     Any thread may call anything at any time, except that a value and an array of cases belong to one
 *               thread at a time, and that after netchan_hangup() began no call on the link or its channels may
 *               begin, unless these are retained. The first listen or dial starts the one thread of the library, the
 *               last hangup ends it. A call that would sleep may do that thread's work meanwhile, but for options.log
 *               and options.allow, which only it calls. mbedTLS is called from one thread at a time, under a lock of
 *               ours; a program that also calls mbedTLS itself, from another thread, needs one that was built with
 *               MBEDTLS_THREADING_C.
 *   Forks       In the child of a fork() everything that the parent has made gives NETCHAN_EFORK (a length of 0;
 *               retain and free do nothing); the child makes channels and links of its own. The parent's go on.
 *               netchan_hangup() in the child closes the child's copy of a listening socket; those of connections are
 *               closed in fork() itself.
 *   Time        timeout_ms is NETCHAN_FOREVER (-1), NETCHAN_NOWAIT (0) or milliseconds on the monotonic clock.
 *               Between machines, a call that has begun to commit when its time is up returns late: by one round trip,
 *               or, when the link is down, when the session goes on or is lost (options.resume_ms). NETCHAN_NOWAIT
 *               asks the other side once and takes one round trip, unless this side knows: it does for a buffer, and
 *               when the link is down (ETIMEDOUT).
 *   Errors      A function that can fail returns NETCHAN_OK or a negative code, or NULL; netchan_errmsg() is then a
 *               sentence.
 *   Results     OK: it happened. ETIMEDOUT, ECLOSED, ELOST: it did not and never will. EUNKNOWN: the peer is gone and
 *               only it knew. A value whose send timed out is never received later.
 *
 * CHANNELS IN MESSAGES
 *
 *   netchan_sender(ch) and netchan_receiver(ch) may stand anywhere in a value: who receives it may send into ch, or
 *   receive from it, wherever that is. A reply is a channel in the request; closing a channel whose receiver end went
 *   with it cancels the request. The channel stays where it was made; what arrives is an end, counted like any channel:
 *   netchan_as_chan() borrows it from the value, netchan_retain() keeps it. The same channel sent twice is the same
 *   end; an end that comes back over the link it came by is the channel again. When the last holder of an end lets go
 *   of it, or nobody ever receives the value it is in, the other side forgets it as well; cycles of ends (a channel
 *   that lies in a channel of the other side, and the other way round) live until the session ends, and a channel that
 *   lies in its own buffer until somebody receives it: empty what strangers may fill. An end that is passed on to a
 *   third process is relayed by the second, and works as long as that lives and both links' sessions last. A send
 *   through an end takes one round trip, also into a buffer.
 *
 *   When a session is lost, or said farewell, its ends lead nowhere: what waits on them ends with ELOST (EUNKNOWN,
 *   where only the other side knew), and so does all that comes later. Where the channel was made, receives end with
 *   ELOST once it is empty and all its sender ends are gone, of which at least one was lost; sends likewise, when the
 *   receiver ends are. Giving away another end, or a name (netchan_export()), ends that. Who closes or frees an end
 *   in good order loses nobody.
 *
 * GUARANTEES
 *
 *   Every value sent with OK through capacity 0 was taken by exactly one receiver. Values from one thread through one
 *   channel to one receiver arrive in the order in which they were sent. Capacity is exact. A link that breaks is
 *   dialled again, and the session goes on where it was: nothing is lost, doubled or reordered, and calls that were
 *   under way return later. Only when no link comes within options.resume_ms, or the other process was started anew or
 *   broke the protocol, is the session lost: what was being committed ends with ELOST or EUNKNOWN; what never left goes
 *   to the next session; values that had left a dialler's `send` and are not known to be taken are counted in the event
 *   "lost"; and a value on the listener's work queue that was shipped and not confirmed goes to another peer, marked
 *   `redelivered` (or is counted, with options.no_redelivery).
 *
 *   A peer of a listener that receives quickly gets values before it receives them: up to 16, of at most 1 KiB each,
 *   out of the listener's buffer (both sides' options.buffer must have room for them), and only when no receive of
 *   another peer waits; none with options.no_redelivery. They count as in the buffer, and as not taken, until they are
 *   received. A peer that receives none of them for 5 ms gives them back; another may then get them after later ones.
 *
 *   A select happens in exactly one of its cases, and so does each one that it meets, in whatever processes they are:
 *   no value is taken from a select that chose another case. While a link is down, an operation that is not being
 *   committed over it goes on elsewhere: its other cases can happen, and its time ends it as usual. One that is being
 *   committed with the process behind the broken link is decided when the link is back, or when its session is lost:
 *   then a receive ends with ELOST and did not happen; a send ends with ELOST if its value certainly did not arrive,
 *   and with EUNKNOWN if it may have. So under partition nothing is ever taken twice and no OK is ever taken back;
 *   what is given up is that the two sides of one commit learn of it at the same time. Not promised: durability (a
 *   channel lives in memory), order across different senders or receivers, and anything once a process dies beyond
 *   the truthful result.
 *
 * SECURITY
 *
 *   TLS 1.3 only, with forward secrecy. Exactly one of options.shared_key, .pin, .ca and .insecure says whom to trust;
 *   with the first three both sides prove themselves before the first value, and options.allow may still refuse. Keys
 *   are never logged and are wiped after use. Strangers have few places and little time, and delay peers for moments.
 *   What a peer can make this process hold is bounded by max_memory, max_message, max_ops and max_ends, and as much
 *   again for what it is sent and does not read; what it must answer and does not has a deadline (see WIRE). A session
 *   goes on only over a link whose other side has the same key as before and knows a secret of that session. README.md
 *   has the threat model, and how to make and rotate keys.
 *
 * WIRE
 *
 *   Enough to write another implementation; all of it travels inside TLS 1.3 with ALPN "netchan/1". A varint is
 *   unsigned LEB128 of at most 10 bytes, the shortest form not required.
 *
 *   With a shared key the external PSK is SHA-256("netchan/1 shared key" NUL key), its mode psk_dhe_ke only, and its
 *   identity "shared_key:" and, in hexadecimal, the first 8 bytes of SHA-256("netchan/1 key id" NUL key). Its hash is
 *   SHA-256, so the cipher suite is TLS_CHACHA20_POLY1305_SHA256 or TLS_AES_128_GCM_SHA256.
 *
 *   Values: one tag byte, then its payload. LEN is a varint that counts the payload bytes after it.
 *     00..3f int 0..63            82 true                   87 bytes: LEN, bytes           8c i64 array: LEN, items
 *     40..7f str of 0..63 bytes   83 int: zig-zag varint    88 array: LEN, count, values   8d f32 array: LEN, items
 *     80 nil                      84 uint: varint           89 map: LEN, count, entries    8e f64 array: LEN, items
 *     81 false                    85 float: 8 bytes         8a channel end: LEN (17), name 8f.. LEN, payload: skipped,
 *                                 86 str: LEN, bytes        8b i32 array: LEN, items            read as nil
 *   Numbers in floats and packed arrays are little-endian, floats IEEE 754. An entry of a map is the key (varint
 *   length, bytes without NUL) and a value. A decoder refuses nesting deeper than 64 and counts larger than the bytes
 *   left. In frames a value has its shortest form, in which others pass it on: 00..7f where they will do, varints of
 *   no more bytes than needed, nothing of 8f... netchan_decode() is more patient.
 *
 *   The name of a channel end is a byte of flags, a number and a capacity (8 bytes each, little-endian). Flags: 1 it
 *   may receive, else send; 2 the channel, or the end of it that was passed on, is the reader's, who named it so;
 *   else the writer's, and then: 4 the writer's is an end, too, so the writer relays; 8 it is closing; 16 closed; 32
 *   gone. The side whose channel it is numbers what it gives away, from 2 on, both directions of a channel apart; the
 *   same number is the same end.
 *
 *   Frames: LENGTH (varint, of what follows), TYPE (one byte), fields (varints unless said otherwise). Frames longer
 *   than 16,384 bytes, with LENGTH, are refused. D is the dialling side, L the listening side. Channel 0 goes from D
 *   to L, channel 1 from L to D; both have their home at L. Each side is the home of the channels whose ends it gives
 *   away, or relays: H below; E is the side that has the end. A session outlives its TLS connections. Its frames, but
 *   those of types 01 to 03 and 05 to 08, have numbers, from 1 on in each direction, by counting; they are kept until
 *   acknowledged.
 *     01 HELLO  "netchan" (7 bytes), version 1, process id (16 bytes), max_message, max_memory, max_ops, max_ends,
 *               ping_ms, capacity, and from L only: session id (16 bytes), secret (32 bytes). First frame each way of a
 *               new session; L waits for D's. D's capacity is its wish for channel 0, L's answer what it gets. Fields
 *               after these are skipped.
 *     02 PING n, 03 PONG n       any byte received is a sign of life; a PING is answered at once
 *     04 BYE n                   its sender begins nothing new; n is 1 if it hands back what is in its buffers. The
 *               other side lets what is being negotiated end and answers BYE; what was not accepted by then never
 *               happened. The session ends when all frames have arrived, and with n = 1 when CREDIT or RETURN has
 *               accounted for each value
 *     05 ACK n                   the frames up to n were received; never more than were sent
 *     06 RESUME id (16 bytes), generation, n, proof (32 bytes)    D, first frame: go on with this session over this
 *               connection. n: the number of the last frame received; after this, D reads no older connection. The
 *               generation grows with each RESUME. Who resumes has the same key or certificate as before. proof:
 *               HMAC-SHA256 with the secret of: role (the byte "D"; in the answer "L"), binding (32 bytes), generation
 *               and n (8 bytes each, little-endian). binding: SHA-256 of "netchan/1 link" and the
 *               client_application_traffic_secret_0 of the connection
 *     07 RESUMED n, proof        L: it goes on; L closes the older connection, and both sides go on after the other's n
 *     08 REFUSED n, text         L: no to HELLO or RESUME (D may say HELLO then); later, from either: the session is
 *               over; as the first frame: who we are is not trusted or not allowed. n is 1 where it is no use to come
 *               again
 *     10 OFFER channel, entry, op, flags, [process (16 bytes)], size, [value]    E: a send waits. On channel 0 with
 *               capacity it costs a credit, and is for large values only. flags: 1 op has several cases, 2 try (answer
 *               WITHDRAWN at once if nobody takes it), 4 firm (never declined without 32), 8 the value is here and the
 *               home's to match (not to who relays), 16 relayed: process tells whose operation it is, else it is E's;
 *               32 ahead: see below
 *     11 DEMAND channel, entry, op, flags, [process], size    E: a receive waits. Flags as above. size: the largest
 *               value that it takes; 0: max_message
 *     12 WITHDRAW entry          E: this entry no longer waits (a DECLINE may follow it). For a firm one that is known
 *               to H, which does not relay it, WITHDRAWN is the answer: no claim of it comes after that
 *     13 GRANT match, size, [value]    E: the claim is accepted; a sender's carries the value
 *     14 DECLINE match, n        E: the claim is refused, its entry is gone. n is 1 from who relayed a value to a
 *               process that was lost and may have taken it; then, and with 0 when it has not got it, also in answer
 *               to COMMIT
 *     15 TAKEN match             E: the value of a COMMIT is taken
 *     16 DATA channel, value     D: a value within credit, channel 0
 *     17 CLOSE channel           E: no more values
 *     18 FRAGMENT match, bytes   E: more of the value whose GRANT had none
 *     19 DROP channel, n, lost   E has no use of the end any more, whose name it has read n times; the number may come
 *               again in names that are on the way. lost is 1 if others had it from E and were lost
 *     1a IMPORT n, flags, name   either side asks for what the other exports by this name (1 to 255 bytes). flags: 1 to
 *               receive from it, 2 try (answer at once). n is not 0
 *     1b FORGET n                this question needs no answer any more
 *     20 CLAIM entry, match, flags, size, [value]     H: flags: 1 final (granting commits), 2 redelivered, 4 nobody
 *               waits for the answer, which may wait a moment for company. size: of the value that a receive would get
 *     21 COMMIT entry, match, flags, size, [value]    H: the engaged receive gets this value
 *     22 RELEASE entry, match    H: the grant is not used, the entry waits again
 *     23 ACCEPT entry, result    H: a send is over; or, with a result that is not 0, any entry. result: 0 OK, else the
 *               negated result code
 *     24 WITHDRAWN entry         H: the answer to a try that found nobody, and to WITHDRAW
 *     25 CREDIT channel, n, left    L: n more values may be sent; `left` of those sent before have left the buffer
 *     26 CLOSED channel          H, to receiver ends: after the last value
 *     27 RETURN channel, size, bytes    L hangs up: a value that nobody received; in parts if it is large, one after
 *               the other. The newest of those on the way and in the buffer, in their order, after a last CREDIT, in
 *               no more bytes than they came in
 *     28 FRAGMENT entry, bytes   H: more of the value whose COMMIT had none
 *     29 CLOSING channel         H, to sender ends: the channel is closed; what is being negotiated is finished
 *     2a GONE channel            H: the end leads nowhere any more, as its name was taken back, or as H relayed to a
 *               process that was lost. Entries that are not in negotiation were ended before
 *     2b IMPORTED n, flags, [end (17 bytes)]    the answer to IMPORT. flags: 0 here is the end, 1 no such name, 2 it is
 *               exported in the other direction
 *     Who gives ends away keeps to the other side's max_ends as it knows it when it matches a value; more than twice as
 *     many are a breach. Entry and match numbers are not 0; OFFER and DEMAND share one space of entries. A final CLAIM
 *     to a receive carries its value, if that is no large one, and its GRANT ends the match; else COMMIT brings it, and
 *     TAKEN follows. A GRANT for a receive has size 0. A DEMAND on channel 1 with flags 4 and 32 is no receive, but
 *     room for one value out of L's buffer before there is a receive; there may be 16, beside max_ops. L serves them
 *     when no receive waits. D grants the claim when the value is received, with size 1 if the entry is to wait for
 *     another; or declines it, and then may have withdrawn others: it demands nothing new until the last of these is
 *     answered, or values would be received out of their order. The values of all OFFERs with flag 8 may count
 *     max_memory / 96 bytes. A CLAIM that is not answered for six times ping_ms and twice resume_ms of H is a breach;
 *     for a relayed entry, four times that. So is an entry that H has engaged, and neither ends nor releases, a try
 *     that it does not answer, and a WITHDRAW with flags 4 and 32 before CLOSED or BYE, for four times those of E. Time
 *     without a link counts a quarter. Unknown types are skipped. size is the encoded size of the value; a value over
 *     16,256 bytes is never in the frame that names its size: it is shipped in FRAGMENTs after GRANT or COMMIT, and
 *     what answers it comes after the last.
 *     The commit protocol is described at [9], relays at [10].
 */

#ifndef NETCHAN_H
#define NETCHAN_H

#if defined(NETCHAN_IMPLEMENTATION) && defined(__STRICT_ANSI__) && !defined(__cplusplus)
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE 1 /* with -std=c99 the C library hides POSIX otherwise; must come before its first header */
#endif
#ifndef _DARWIN_C_SOURCE
#define _DARWIN_C_SOURCE 1
#endif
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NETCHAN_VERSION "0.1.0"

#ifdef __cplusplus
extern "C" {
#endif

#ifndef NETCHANDEF
#ifdef NETCHAN_STATIC
#define NETCHANDEF static
#else
#define NETCHANDEF extern
#endif
#endif

/* ====================================================================================================================
 * [A] Results: 0 or negative.
 * ================================================================================================================== */

#define NETCHAN_RESULTS(X)                                                                                             \
    X(OK, 0, "it happened")                                                                                            \
    X(ECLOSED, -1, "the channel is closed")                                                                            \
    X(ETIMEDOUT, -2, "the time is up; it did not happen and never will")                                               \
    X(EINVAL, -3, "an argument is not valid")                                                                          \
    X(ENOMEM, -4, "out of memory, or a limit on memory was reached")                                                   \
    X(EADDR, -5, "the address cannot be used")                                                                         \
    X(ENET, -6, "the network failed")                                                                                  \
    X(EAUTH, -7, "one side does not trust the other")                                                                  \
    X(EPROTO, -8, "the other side broke the protocol")                                                                 \
    X(ETYPE, -9, "the value has another type")                                                                         \
    X(ETOOBIG, -10, "the value is larger than a limit")                                                                \
    X(ENOPEER, -11, "there is no such peer")                                                                           \
    X(ELOST, -12, "the peer is gone; it certainly did not happen")                                                     \
    X(EUNKNOWN, -13, "the peer is gone and only it knew whether it happened")                                          \
    X(EFORK, -14, "this process is a fork of the one that made the object")

#define NETCHAN_RESULT_ENUM(name, number, text) NETCHAN_##name = (number),
enum netchan_result { NETCHAN_RESULTS(NETCHAN_RESULT_ENUM) NETCHAN_RESULT_END = 1 };
#undef NETCHAN_RESULT_ENUM

/* A few words on a result code. Returns a constant string for any number, never NULL. */
NETCHANDEF const char *netchan_strerror(int result);

/* This thread's last failure as a sentence: what was attempted, on what, why, what to do. Returns "" before the first.
 * The text is valid until this thread's next failing call. */
NETCHANDEF const char *netchan_errmsg(void);

/* ====================================================================================================================
 * [B] Values: what travels. A plain tagged struct, 24 bytes where pointers have 64 bits.
 * ================================================================================================================== */

typedef struct netchan netchan;             /* a channel, or one end of it: opaque, counted, safe in any thread */
typedef struct netchan_value netchan_value; /* one of the types below */
typedef struct netchan_entry netchan_entry; /* one key and value of a map */
typedef struct netchan_field netchan_field; /* one row of a struct table, see [C] */

enum netchan_type {
    NETCHAN_NIL,      /* nothing; what an all-zero netchan_value is */
    NETCHAN_BOOL,     /* as.boolean */
    NETCHAN_INT,      /* as.i64 */
    NETCHAN_UINT,     /* as.u64 */
    NETCHAN_FLOAT,    /* as.f64 */
    NETCHAN_STR,      /* as.block: data is `const char *`, NUL-terminated when received; count excludes that NUL */
    NETCHAN_BYTES,    /* as.block: data and count in bytes */
    NETCHAN_ARRAY,    /* as.block: data is `const netchan_value *` */
    NETCHAN_MAP,      /* as.block: data is `const netchan_entry *`; order and repeated keys are kept */
    NETCHAN_SENDER,   /* as.chan: who receives this may send into it */
    NETCHAN_RECEIVER, /* as.chan: who receives this may receive from it */
    NETCHAN_I32S,     /* as.block: data is `const int32_t *`, packed; count in items, as for the next three */
    NETCHAN_I64S,     /* `const int64_t *` */
    NETCHAN_F32S,     /* `const float *` */
    NETCHAN_F64S,     /* `const double *` */
    NETCHAN_STRUCT    /* as.record: sent as a map of field names; a receiver sees NETCHAN_MAP */
};

struct netchan_value {
    uint8_t type;  /* enum netchan_type */
    uint8_t flags; /* private: whether netchan_clear() has something to free */
    union {
        bool boolean;
        int64_t i64;
        uint64_t u64;
        double f64;
        netchan *chan;
        struct {
            const void *data;
            size_t count;
        } block;
        struct {
            const void *data;
            const netchan_field *fields;
        } record;
    } as;
};

struct netchan_entry {
    const char *key;
    netchan_value value;
};

/* Constructors. They allocate nothing and borrow: what the arguments point to must stay until the value was sent or
 * copied. A NULL string is nil. */
NETCHANDEF netchan_value netchan_nil(void);
NETCHANDEF netchan_value netchan_bool(bool b);
NETCHANDEF netchan_value netchan_int(int64_t i);
NETCHANDEF netchan_value netchan_uint(uint64_t u);
NETCHANDEF netchan_value netchan_float(double f);
NETCHANDEF netchan_value netchan_str(const char *s);
NETCHANDEF netchan_value netchan_strn(const char *s, size_t size); /* may hold NULs; size in bytes */
NETCHANDEF netchan_value netchan_bytes(const void *data, size_t size);
NETCHANDEF netchan_value netchan_array(const netchan_value *items, size_t count);
NETCHANDEF netchan_value netchan_map(const netchan_entry *entries, size_t count); /* no key may be NULL */
NETCHANDEF netchan_value netchan_struct(const netchan_field *fields, const void *data);
NETCHANDEF netchan_value netchan_sender(netchan *ch);
NETCHANDEF netchan_value netchan_receiver(netchan *ch);
NETCHANDEF netchan_value netchan_i32s(const int32_t *items, size_t count);
NETCHANDEF netchan_value netchan_i64s(const int64_t *items, size_t count);
NETCHANDEF netchan_value netchan_f32s(const float *items, size_t count);
NETCHANDEF netchan_value netchan_f64s(const double *items, size_t count);

/* Frees what a received or copied value holds and makes it nil. Does nothing to a constructed value but make it nil, so
 * it is always safe; of a received value only the value itself is cleared, never one that was looked up inside it. */
NETCHANDEF void netchan_clear(netchan_value *v);

/* Makes *to an independent deep copy in one allocation; clear it later. Whatever *to held is not freed. Returns OK,
 * ENOMEM, or EINVAL when `from` cannot be a value (nested deeper than NETCHAN_MAX_DEPTH, a NULL key, a type that does
 * not exist); *to is nil then. */
NETCHANDEF int netchan_copy(netchan_value *to, const netchan_value *from);

/* Looking into a value never fails: what is not there is nil, what has another type is the fallback. Results are
 * borrowed from v. */
NETCHANDEF const netchan_value *netchan_at(const netchan_value *v, size_t index);     /* item of an array, or nil */
NETCHANDEF const netchan_value *netchan_get(const netchan_value *v, const char *key); /* first entry of a map, or nil */
NETCHANDEF bool netchan_as_bool(const netchan_value *v, bool fallback);
NETCHANDEF int64_t netchan_as_int(const netchan_value *v, int64_t fallback);     /* int, or uint that fits */
NETCHANDEF uint64_t netchan_as_uint(const netchan_value *v, uint64_t fallback);  /* uint, or int that fits */
NETCHANDEF double netchan_as_float(const netchan_value *v, double fallback);     /* float, int or uint */
NETCHANDEF const char *netchan_as_str(const netchan_value *v, const char *fallback);
/* Retain it to keep it. NULL, on which operations wait for ever, unless v is a sender or receiver: check what strangers
 * send. */
NETCHANDEF netchan *netchan_as_chan(const netchan_value *v);
NETCHANDEF bool netchan_is_nil(const netchan_value *v);
/* Items of an array or packed array, entries of a map, bytes of a string (without its NUL) or of bytes; 0 for all other
 * types. */
NETCHANDEF size_t netchan_count(const netchan_value *v);
/* The block of a str, bytes or packed array (say which) and its item count (may be NULL). NULL: v has another type. */
NETCHANDEF const void *netchan_as_block(const netchan_value *v, enum netchan_type type, size_t *count);

/* The serializer alone, for files or for other carriers. netchan_encode() writes at most `size` bytes to `out` and sets
 * *used to the bytes the value needs, also when they do not fit (out may be NULL when size is 0). Returns OK, ETOOBIG
 * when it does not fit, EINVAL as netchan_copy(), or ETYPE when the value holds a channel. */
NETCHANDEF int netchan_encode(const netchan_value *v, void *out, size_t size, size_t *used);
/* Decodes exactly `size` bytes into one new allocation of at most max_block bytes (0: no limit); clear *v later.
 * Returns OK, EPROTO when the bytes are not one whole value, ETOOBIG when it would need more than max_block, or ENOMEM;
 * *v is nil then. */
NETCHANDEF int netchan_decode(netchan_value *v, const void *data, size_t size, size_t max_block);

/* ====================================================================================================================
 * [C] Struct tables: C structs as values, by field name.
 *
 *     typedef struct { int64_t when; const char *note; } reading;
 *     static const netchan_field reading_fields[] = {
 *         NETCHAN_FIELD(reading, when, I64), NETCHAN_FIELD(reading, note, STR), NETCHAN_FIELDS_END };
 *     netchan_send(ch, netchan_struct(reading_fields, &r), NETCHAN_FOREVER);
 *     ...
 *     if (netchan_unpack(&v, reading_fields, &r) == NETCHAN_OK) ...
 *
 * A member whose C type is not that of its row does not compile. As in Go's gob, names the reader does not know are
 * skipped and members the writer did not send stay as they are (zero, if the struct was).
 * ================================================================================================================== */

typedef enum netchan_kind {
    NETCHAN_KIND_END,
    NETCHAN_KIND_BOOL,
    NETCHAN_KIND_I32,
    NETCHAN_KIND_I64,
    NETCHAN_KIND_U32,
    NETCHAN_KIND_U64,
    NETCHAN_KIND_F32,
    NETCHAN_KIND_F64,
    NETCHAN_KIND_STR,   /* const char *; nil when NULL; unpacked, it points into the value */
    NETCHAN_KIND_VALUE, /* netchan_value, anything; unpacked, it is borrowed from the value: never clear it */
    NETCHAN_KIND_STRUCT
} netchan_kind;

struct netchan_field {
    const char *name;
    size_t offset;
    netchan_kind kind;
    const netchan_field *fields; /* of a nested struct */
};

typedef bool netchan_c_BOOL;
typedef int32_t netchan_c_I32;
typedef int64_t netchan_c_I64;
typedef uint32_t netchan_c_U32;
typedef uint64_t netchan_c_U64;
typedef float netchan_c_F32;
typedef double netchan_c_F64;
typedef const char *netchan_c_STR;

/* A size that does not compile unless the member's type is ctype: C makes `void` of two pointers without a common type,
 * which no function takes; C++ converts no pointer to a pointer to another type. */
#ifdef __cplusplus
#define NETCHAN_PROOF(T, member, ctype) sizeof(((char (*)(ctype *))0)(&((T *)0)->member))
#else
#define NETCHAN_PROOF(T, member, ctype) sizeof(((char (*)(ctype))0)(*(1 ? &((T *)0)->member : (ctype *)0)))
#endif
#define NETCHAN_ROW(T, member, ctype, kind, table)                                                                     \
    { #member, offsetof(T, member) + 0 * NETCHAN_PROOF(T, member, ctype), kind, table }

/* kind: BOOL, I32, I64, U32, U64, F32, F64 or STR. */
#define NETCHAN_FIELD(T, member, kind) NETCHAN_ROW(T, member, netchan_c_##kind, NETCHAN_KIND_##kind, NULL)
/* A member that is a netchan_value. */
#define NETCHAN_FIELD_VALUE(T, member) NETCHAN_ROW(T, member, netchan_value, NETCHAN_KIND_VALUE, NULL)
/* A member that is a struct of type `inner` with a table of its own. */
#define NETCHAN_FIELD_STRUCT(T, member, inner, table) NETCHAN_ROW(T, member, inner, NETCHAN_KIND_STRUCT, table)
#define NETCHAN_FIELDS_END { NULL, 0, NETCHAN_KIND_END, NULL }

/* Fills *out from a map, by the table. All fields are checked before the first is written. Returns OK, or ETYPE when v
 * is not a map or a field has another type or is out of range: netchan_errmsg() names it. Strings and values in *out
 * are borrowed from v. */
NETCHANDEF int netchan_unpack(const netchan_value *v, const netchan_field *fields, void *out);

/* ====================================================================================================================
 * [D] Channels and select.
 * ================================================================================================================== */

#define NETCHAN_FOREVER (-1) /* as timeout_ms: wait as long as it takes */
#define NETCHAN_NOWAIT 0     /* as timeout_ms: do not wait */

/* Which process took or sent a value. 0 is this process. A number is given to each session and never used again. */
typedef struct netchan_peer {
    uint64_t id;
} netchan_peer;

/* Makes a channel. capacity counts values; 0 makes each send a rendezvous. Returns NULL when out of memory. */
NETCHANDEF netchan *netchan_make(size_t capacity);
NETCHANDEF netchan *netchan_retain(netchan *ch); /* Counts one more holder and returns ch. NULL is returned as it is. */
/* Counts one holder less; the last frees the channel and the values in it. NULL is allowed. Nobody may be waiting on it
 * then, but who has just taken its last value, or seen its send return, may free it at once. */
NETCHANDEF void netchan_free(netchan *ch);

/* Sends a copy of v. Returns OK when a receiver took it (capacity 0) or the buffer did; ETIMEDOUT, ECLOSED; ENOMEM;
 * EINVAL for a receiver end, for what cannot be a value, or when v holds an end in the wrong direction; ETOOBIG when v
 * is larger than the peer takes, or holds more ends than it has room for (max_ends); ELOST when the other side of the
 * channel was lost, EUNKNOWN. With ch NULL it waits for timeout_ms, as in Go. */
NETCHANDEF int netchan_send(netchan *ch, netchan_value v, int timeout_ms);
/* Receives into *v; the caller clears it. v may be NULL to drop the value. On any result but OK *v is nil. Returns OK;
 * ECLOSED when the channel is closed and empty; ETIMEDOUT; EINVAL for a sender end; ENOMEM; ELOST. */
NETCHANDEF int netchan_recv(netchan *ch, netchan_value *v, int timeout_ms);
/* The same, and tells in *from (may be NULL) which peer sent the value; id 0: this process. At an end it is the peer
 * that the end came from. */
NETCHANDEF int netchan_recvfrom(netchan *ch, netchan_value *v, netchan_peer *from, int timeout_ms);
/* No more values will be sent. Those already in the channel can still be received; then receives return ECLOSED. Sends
 * that wait return ECLOSED. Does not wait and does not free. Returns OK, ECLOSED when it was closed before, or EINVAL
 * on a receiver end. */
NETCHANDEF int netchan_close(netchan *ch);
/* Values in the buffer; at the dialling end of a link what this process knows of it, at an end that came in a value
 * 0. */
NETCHANDEF size_t netchan_len(netchan *ch);
/* The capacity; of a listener's recv, the sum over its peers. */
NETCHANDEF size_t netchan_cap(netchan *ch);

/* One case of a select. Make it with the two functions below; read the last three members after netchan_select(). */
typedef struct netchan_case {
    netchan *ch;         /* NULL: never ready */
    bool is_send;
    netchan_value value; /* what to send; borrowed */
    netchan_value *into; /* where to receive; NULL drops the value */
    int result;          /* of the case that happened: OK, ECLOSED, ELOST, EUNKNOWN, ETOOBIG; of the others ETIMEDOUT */
    netchan_peer peer;   /* who took or sent the value */
    bool redelivered;    /* this value was shipped to a peer before, which was lost and may have taken it */
} netchan_case;

NETCHANDEF netchan_case netchan_case_send(netchan *ch, netchan_value v);
NETCHANDEF netchan_case netchan_case_recv(netchan *ch, netchan_value *v);

/* Waits until exactly one of the cases happens; if several can, one of them by chance. A case on a closed channel can
 * always happen, with result ECLOSED. One channel may be in several cases; two cases of one select never serve each
 * other. A remote case that waits while a local one is ready again and again has its turn every 16th time. Returns the
 * index of the case (look at its result), or ETIMEDOUT, EINVAL, ENOMEM; with no case that has a channel it waits for
 * timeout_ms. */
NETCHANDEF int netchan_select(netchan_case *cases, size_t count, int timeout_ms);

/* ====================================================================================================================
 * [E] Links: channels to other processes.
 * ================================================================================================================== */

/* Who is at the other end of a connection. */
typedef struct netchan_identity {
    const char *identity; /* "sha256:..." of its key, or "shared_key:...": netchan_fingerprint(), netchan_key_id() */
    const char *name;     /* the subject of its certificate, as "CN=alice, O=example"; only a CA vouches for it. "" when
                             there is none, or when it is longer than 255 bytes */
    const char *address;  /* "host:port": where it comes from, or was dialled */
    bool listening;       /* it listens, and we dialled */
} netchan_identity;

typedef struct netchan_options {
    /* Whom to trust: exactly one. Each text may be "file:PATH", to use what is in that file, or "callback:NAME", to use
     * what load below gives for NAME. Keys and pins may be several: one of them must be the peer's. A dialler tries its
     * keys in turn. */
    const char *shared_key; /* a secret both sides know, at least 32 characters; netchan_keygen(); one a line */
    const char *pin;        /* the peer's public key, as netchan_fingerprint() tells it: "sha256:<64 hex digits>" */
    const char *ca;         /* certificates of who vouches for the peer: a path, or PEM text */
    bool insecure;          /* encrypt, but trust anybody */
    const char *peer_name;  /* with ca: the DNS name or IP address in the peer's certificate [dialling: the host that is
                               dialled; listening: any] */

    /* Who we are, but for shared_key (default: a fresh self-signed P-256 certificate). */
    const char *cert;     /* and certificates between it and the CA's: a path, or PEM text */
    const char *cert_key; /* its private key, not encrypted: a path, or PEM text */

    /* May refuse a peer that has proved who it is, on each link with it, before its first value. Called from the
     * library's thread without locks; must not block. */
    bool (*allow)(void *arg, const netchan_identity *who);
    void *allow_arg;
    /* Writes the text NAME of "callback:NAME" into out, with its NUL; out is wiped after use. Returns NETCHAN_OK, or
     * anything else when there is none. Called by netchan_listen() and netchan_dial(). */
    int (*load)(void *arg, const char *name, char *out, size_t size);
    void *load_arg;

    /* Limits. 0 means the default, in brackets. */
    size_t buffer;      /* values that may be sent on link->send and not yet taken [0: each send is a rendezvous]; at
                           both ends it lets quick receivers have values of a listener early, see GUARANTEES */
    size_t max_message; /* bytes of one encoded value that may come in [128 MiB] */
    size_t max_memory;  /* bytes that one peer's values may occupy here [and at least: twice max_message] */
    size_t max_ops;     /* operations of one peer that may wait here [8192] */
    size_t max_ends;    /* channel ends that one peer may have given to this process, or got from it [65536] */
    size_t max_peers;   /* listening: peers, also those whose link is down [10000] */
    int connect_ms;     /* dialling: how long the first connection may take, negative: for ever [10000] */
    int resume_ms;      /* how long a session waits for a new link, negative: for ever, even for the dead [30000] */
    int linger_ms;      /* how long netchan_hangup() waits at most, a quarter for farewells; < 0: for ever [5000] */
    int ping_ms;        /* a heartbeat after this much silence; after three times as much the link is given up [5000] */
    bool no_redelivery; /* listening: values of unknown fate are counted instead of sent to another peer */

    /* Listening: a socket that listens already, in place of an address: inherited, or of systemd (its first is 3, see
     * LISTEN_FDS). The link owns it once netchan_listen() has succeeded, makes it non-blocking and close-on-exec, and
     * closes it at last. 0: none. Who shares it with a successor hangs up at once: a peer whose link breaks just then
     * may reach the successor, which does not know its session. */
    int listen_fd;

    /* Told what happens: level 0 error, 1 warning, 2 information. Called without locks from the library's thread, and
     * from the one that opens the link; must not block. */
    void (*log)(void *arg, int level, const char *text);
    void *log_arg;
} netchan_options;

typedef struct netchan_link {
    /* To the peer. On a listening link: to the first peer that is ready to receive; no two get the same value. Only for
     * sends. */
    netchan *send;
    /* From the peer; on a listening link from all peers, each in its turn. A peer that closes its channel leaves this
     * open to the others. Only for receives. */
    netchan *recv;
    /* What happened, as maps: {"event": ..., "peer": uint, "address": str, ...}. Receive from it, or do not: it holds
     * the newest 64.
     * "up"       a session with a peer began. "listening": bool; "identity", "name": str, as in netchan_identity
     * "down"     its link broke; the session waits for another, and nothing is lost. "reason": str
     * "resumed"  the session goes on over a new link. "replayed": uint, frames that had to be sent again
     * "drained"  the session ended with a farewell of both sides. "reason", and counts as in "lost"
     * "lost"     the session ended without. "reason": str; of the values sent to this peer, "taken": uint, known to be
     *            taken; "returned": uint, known not to be, and sent again to whoever comes; "unknown": uint, values
     *            whose fate only the peer knew; "undelivered": uint, values that were for this peer alone
     * "rejected" a stranger was turned away. "reason": str
     * "closed"   the peer closed its sending channel, and all its values were received
     * "dropped": uint stands in the next event after older ones were dropped. */
    netchan *events;
    /* Listening: one value per new peer, as a map: {"peer": uint, "identity": str, "name": str, "address": str, "send":
     * sender end, "recv": receiver end}. Who receives it takes that peer out of send and recv above: its values that
     * nobody has received yet come from "recv", in their order, and what is sent into "send" is for it alone. Both end
     * with ECLOSED when the peer has hung up, with ELOST when it was lost. Dialling: NULL. */
    netchan *accept;
    const char *address; /* the address bound or dialled, with the real port */
    int listen_fd;       /* listening: the socket, to be passed on to a successor; else -1 */
} netchan_link;

typedef struct netchan_report {
    size_t undelivered; /* values that were sent with OK and were certainly not taken, also those for peers now gone */
    size_t unknown;     /* values of which only the peer knew, since the link was opened; also when calls said so */
    size_t unreceived;  /* values that came from peers which are gone, and that nobody received here */
} netchan_report;

/* Counted since the link was opened, over all its peers. */
typedef struct netchan_stats {
    uint64_t values_sent, values_received;   /* that reached a peer, or are on their way into its buffer; that came */
    uint64_t bytes_sent, bytes_received;     /* of frames, before encryption */
    uint64_t frames_sent, frames_received;   /* sent: replays count again */
    uint64_t records_sent, records_received; /* of TLS */
    uint64_t resumes;       /* sessions that went on after their link had broken */
    uint64_t rollovers;     /* links that were replaced before they broke, as far as this side noticed */
    uint64_t replays;       /* frames that were sent again */
    uint64_t lost;          /* sessions that were lost */
    size_t peers;           /* sessions now, also those whose link is down */
    size_t queued;          /* values that were sent with OK and were not given to a peer yet */
    size_t in_flight;       /* values that a peer was given and is not known to have taken */
    uint64_t round_trip_us; /* of the newest heartbeat; listening: the longest over its peers. 0: not measured yet */
} netchan_stats;

/* Listens on "host:port", "[ipv6]:port" or ":port" (all addresses); port 0 picks a free one, see link->address. options
 * is copied. Returns NULL with netchan_errmsg(): the address, the options, the key or the system's limits were not
 * good. */
NETCHANDEF netchan_link *netchan_listen(const char *address, const netchan_options *options);
/* Connects to a listener and proves both sides; waits up to connect_ms, also for a listener that is not there yet.
 * address may be a list, "a:1,b:2", which is tried in turn: several ways to one process, or processes that stand in
 * for each other. Names are looked up once, and 16 addresses are used at most. Later a broken link is dialled again
 * for ever: the session goes on over the first address whose process knows it, and when all were tried and at least
 * one does not know it, or after resume_ms, a new one begins. Returns NULL with netchan_errmsg() when nobody could be
 * reached in time, or at once when either side does not trust the other. */
NETCHANDEF netchan_link *netchan_dial(const char *address, const netchan_options *options);
/* Waits up to linger_ms until all that was sent has arrived (a dialler's values in the listener's buffer, a listener's
 * at its peers), says farewell, and frees the link. At a dialler nothing new begins on its channels from now on, at a
 * listener from then on; operations that still wait end with ECLOSED (ELOST or EUNKNOWN if they were being committed).
 * What diallers have sent and nobody received at a listener goes back to them: they send it to whoever listens there
 * next. *report (may be NULL) tells what was not delivered. Returns OK, or ETIMEDOUT when values were left; the link is
 * gone all the same; or when values of a session that was lost before are unknown. NULL is allowed. */
NETCHANDEF int netchan_hangup(netchan_link *link, netchan_report *report);

/* Sends a copy of v to one peer of a listening link, before what link->send, or its own "send", has for it;
 * options.buffer values may wait for each. Returns as netchan_send(); ENOPEER at once when there is no such peer (any
 * more), ELOST when it is lost while the call waits. At a dialling link the one peer is the listener. */
NETCHANDEF int netchan_sendto(netchan_link *link, netchan_peer peer, netchan_value v, int timeout_ms);
/* Sends a copy of v to each peer that is there now, as netchan_sendto() would, to all at the same time: a slow one
 * delays the call, but no other peer. *reached (may be NULL) tells how many took it, or have room for it in their
 * buffer. Returns OK when all did that did not leave meanwhile, also when there is none; else the result of one that
 * did not: ETIMEDOUT, ELOST, ...; those will never get it. EINVAL, ENOMEM: nobody got it. */
NETCHANDEF int netchan_broadcast(netchan_link *link, netchan_value v, size_t *reached, int timeout_ms);

/* Lets the other side of the link (of a listening link: each peer, also those to come) import ch by this name, of 1 to
 * 255 bytes. end is what they get: NETCHAN_SENDER to send into ch, NETCHAN_RECEIVER to receive from it; several who
 * import a receiver compete for its values. The name holds ch until netchan_unexport() or netchan_hangup(). Returns OK,
 * EINVAL (the name is taken, or an argument is not good) or ENOMEM. */
NETCHANDEF int netchan_export(netchan_link *link, const char *name, netchan *ch, enum netchan_type end);
/* Takes the name back. Ends that were imported by it lead nowhere from now on: operations on them end with ELOST. Other
 * names, and ends in values, stay. Returns OK, or EINVAL when there is no such name. */
NETCHANDEF int netchan_unexport(netchan_link *link, const char *name);
/* Imports what the other side of the link (of a listening link: whichever peer has it first) exports by this name,
 * waiting until it does. *ch is then an end, and the caller's: netchan_free() it. Returns OK; ETIMEDOUT when nobody
 * exported it in time, with NETCHAN_NOWAIT when there is no such name now; ETYPE when it is exported in the other
 * direction; ECLOSED when the link is being hung up; EINVAL; ENOMEM. *ch is NULL then. */
NETCHANDEF int netchan_import(netchan_link *link, const char *name, enum netchan_type end, netchan **ch,
                              int timeout_ms);

/* Fills in *stats. Returns OK, or EINVAL when one of the two is NULL. */
NETCHANDEF int netchan_get_stats(netchan_link *link, netchan_stats *stats);

#define NETCHAN_KEY_SIZE 65         /* bytes of a generated key, with its NUL */
#define NETCHAN_KEY_ID_SIZE 28      /* bytes of a key's id, with its NUL */
#define NETCHAN_FINGERPRINT_SIZE 72 /* bytes of a fingerprint, with its NUL */

/* Makes a fresh shared key of 64 hexadecimal digits (256 bits). size must be at least NETCHAN_KEY_SIZE. Returns OK,
 * EINVAL, or ENET when the system gives no randomness. */
NETCHANDEF int netchan_keygen(char *out, size_t size);
/* The id of a shared key (as text, or "file:PATH"; the first if there are several): "shared_key:<16 hex digits>", the
 * `identity` of a peer with that key. It is no secret. size must be at least NETCHAN_KEY_ID_SIZE. Returns OK, EINVAL
 * when it cannot be read, EAUTH when the key can be guessed, or ENOMEM. */
NETCHANDEF int netchan_key_id(const char *shared_key, char *out, size_t size);
/* The fingerprint of a certificate (a path, or PEM text), to be given to the other side as its pin. size must be at
 * least NETCHAN_FINGERPRINT_SIZE. Returns OK, EINVAL when it cannot be read, or ENOMEM. */
NETCHANDEF int netchan_fingerprint(const char *cert, char *out, size_t size);

/* ====================================================================================================================
 * [F] Configuration: define these before the implementation to change them.
 *
 *   NETCHAN_MALLOC, NETCHAN_REALLOC, NETCHAN_FREE   the allocator, all three or none [malloc, realloc, free]
 *   NETCHAN_ASSERT(x)                               checks of our own bugs, never of input [assert]
 *   NETCHAN_MAX_DEPTH                               how deep values may be nested [64]
 *   NETCHAN_WINDOW                                  bytes sent to a peer and not acknowledged, at most [4 MiB]
 *   NETCHAN_EARLY_MS                                milliseconds that a value which came ahead of the receives of a
 *                                                   quick receiver waits for the next, before others may have it [5]
 *   NETCHAN_KEY_RECORDS                             records each way after which a link is replaced by one with fresh
 *                                                   keys; AES-GCM is good for 2^24.5 (RFC 8446 section 5.5) [2^23]
 *   NETCHAN_STATIC                                  all functions static: the library private to one file
 *   NETCHANDEF                                      how functions are declared [extern]
 * ================================================================================================================== */

#ifdef __cplusplus
}
#endif
#endif /* NETCHAN_H */

#if defined(NETCHAN_IMPLEMENTATION) && !defined(NETCHAN_IMPLEMENTED)
#define NETCHAN_IMPLEMENTED

/* ====================================================================================================================
 * [1] Platform: headers, configuration, the checks that give one sentence instead of a hundred errors.
 * ================================================================================================================== */

#include <arpa/inet.h>
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/epoll.h>
#endif
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#include <mbedtls/version.h>
#if !defined(CLOCK_MONOTONIC)
#error netchan.h: POSIX is hidden here (as with -std=c99). Include netchan.h before any system header, or compile with -D_DEFAULT_SOURCE.
#elif MBEDTLS_VERSION_NUMBER < 0x03060000 || MBEDTLS_VERSION_NUMBER >= 0x04000000
#error netchan.h needs mbedTLS 3.6. Install it, or run "make deps" in the netchan repository and compile with -Ibuild/mbedtls/include.
#elif !defined(MBEDTLS_SSL_PROTO_TLS1_3) || !defined(MBEDTLS_SSL_TLS1_3_KEY_EXCHANGE_MODE_PSK_EPHEMERAL_ENABLED)
#error netchan.h needs TLS 1.3, and this mbedTLS was built without it. Build mbedTLS in its default configuration.
#else /* all the rest, so that the sentence is the only error */

#include <mbedtls/constant_time.h>
#include <mbedtls/ecp.h>
#include <mbedtls/error.h>
#include <mbedtls/md.h>
#include <mbedtls/oid.h>
#include <mbedtls/pk.h>
#include <mbedtls/platform_util.h>
#include <mbedtls/sha256.h>
#include <mbedtls/ssl.h>
#include <mbedtls/x509_crt.h>
#include <psa/crypto.h>
#include <mbedtls/psa_util.h>

#ifndef NETCHAN_MALLOC
#define NETCHAN_MALLOC(size) malloc(size)
#define NETCHAN_REALLOC(ptr, size) realloc(ptr, size)
#define NETCHAN_FREE(ptr) free(ptr)
#endif
#ifndef NETCHAN_ASSERT
#define NETCHAN_ASSERT(x) assert(x)
#endif
#ifndef NETCHAN_MAX_DEPTH
#define NETCHAN_MAX_DEPTH 64
#endif

#ifndef NETCHAN_WINDOW
#define NETCHAN_WINDOW (4u << 20)
#endif
#ifndef NETCHAN_EARLY_MS
#define NETCHAN_EARLY_MS 5
#endif
#ifndef NETCHAN_KEY_RECORDS
#define NETCHAN_KEY_RECORDS (1u << 23)
#endif

#ifdef __cplusplus
#define NETCHAN__THREAD_LOCAL thread_local
extern "C" {
#else
#define NETCHAN__THREAD_LOCAL __thread
#endif

#if defined(__GNUC__)
#define NETCHAN__PRINTF(text, first) __attribute__((format(printf, text, first)))
#define NETCHAN__OUT_OF_LINE __attribute__((noinline)) /* small, called from many places, and no matter for speed */
#else
#define NETCHAN__PRINTF(text, first)
#define NETCHAN__OUT_OF_LINE
#endif

/* gcc compiles all this in half the time, and to something as fast, when it leaves out most of what -O2 adds; and what
 * runs seldom, or beside what costs far more, it compiles for size. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__) && !defined(__OPTIMIZE_SIZE__)
#define NETCHAN__SMALL_BEGIN _Pragma("GCC push_options") _Pragma("GCC optimize(\"Os\")")
#define NETCHAN__SMALL_END _Pragma("GCC pop_options")
#define NETCHAN__TUNED
#pragma GCC push_options
#pragma GCC optimize("O1", "inline-small-functions", "no-tree-dominator-opts", "no-tree-pta", "ira-region=one")
#else
#define NETCHAN__SMALL_BEGIN
#define NETCHAN__SMALL_END
#endif

/* ====================================================================================================================
 * [2] Bytes and maps: memory, growing buffers, varints, a hash map from numbers to pointers. No locks; pure.
 * ================================================================================================================== */

static void *netchan__alloc(size_t size) {
    if (!size) size = 1; /* malloc(0) may be NULL */
    void *p = NETCHAN_MALLOC(size);
    if (p) memset(p, 0, size);
    return p;
}

/* Doubly linked lists through two members of their items; head points to the first. */
#define NETCHAN__LINK(head, item, prev, next)                                                                          \
    do {                                                                                                               \
        (item)->prev = NULL;                                                                                           \
        (item)->next = (head);                                                                                         \
        if (head) (head)->prev = (item);                                                                               \
        (head) = (item);                                                                                               \
    } while (0)
#define NETCHAN__UNLINK(head, item, prev, next)                                                                        \
    do {                                                                                                               \
        if ((item)->prev) (item)->prev->next = (item)->next;                                                           \
        else (head) = (item)->next;                                                                                    \
        if ((item)->next) (item)->next->prev = (item)->prev;                                                           \
    } while (0)

/* Bytes [start, end) of data are in use. */
typedef struct netchan__buf {
    uint8_t *data;
    size_t start, end, cap;
} netchan__buf;

static size_t netchan__buf_size(const netchan__buf *b) { return b->end - b->start; }

static void netchan__buf_free(netchan__buf *b) {
    NETCHAN_FREE(b->data);
    memset(b, 0, sizeof *b);
}

/* Makes room for `size` more bytes at the end. Returns where they go, or NULL when out of memory (nothing changed). */
static uint8_t *netchan__buf_reserve(netchan__buf *b, size_t size) {
    if (b->cap - b->end >= size && b->data) return b->data + b->end;
    size_t used = netchan__buf_size(b);
    if (b->start >= used && b->cap - used >= size && b->data) { /* moving down at most what was consumed is amortised */
        memcpy(b->data, b->data + b->start, used);
    } else {
        size_t cap = b->cap ? b->cap : 256;
        while (cap - used < size) {
            if (cap > SIZE_MAX / 2) return NULL;
            cap *= 2;
        }
        uint8_t *data = (uint8_t *)NETCHAN_MALLOC(cap);
        if (!data) return NULL;
        if (b->data) memcpy(data, b->data + b->start, used);
        NETCHAN_FREE(b->data);
        b->data = data;
        b->cap = cap;
    }
    b->start = 0;
    b->end = used;
    return b->data + used;
}

static bool netchan__buf_append(netchan__buf *b, const void *data, size_t size) {
    uint8_t *to = netchan__buf_reserve(b, size);
    if (!to) return false;
    if (size) memcpy(to, data, size);
    b->end += size;
    return true;
}

/* Drops bytes from the front. An emptied large buffer gives its memory back, so that idle peers cost little, unless it
 * keeps it, as it will be filled again soon. */
static void netchan__buf_pass(netchan__buf *b, size_t size, bool keeps) {
    NETCHAN_ASSERT(size <= netchan__buf_size(b));
    b->start += size;
    if (b->start < b->end) return;
    if (!keeps && b->cap > 4096) netchan__buf_free(b);
    b->start = b->end = 0;
}

static void netchan__buf_consume(netchan__buf *b, size_t size) { netchan__buf_pass(b, size, false); }

static size_t netchan__varint_size(uint64_t n) {
    size_t size = 1;
    while (n >= 0x80) n >>= 7, size++;
    return size;
}

static uint8_t *netchan__varint_put(uint8_t *p, uint64_t n) {
    while (n >= 0x80) {
        *p++ = (uint8_t)(n | 0x80);
        n >>= 7;
    }
    *p++ = (uint8_t)n;
    return p;
}

/* Reads from [p, end). Once something was missing or malformed `bad` stays set and all further reads give 0. */
typedef struct netchan__reader {
    const uint8_t *p, *end;
    bool bad;
} netchan__reader;

static size_t netchan__left(const netchan__reader *r) { return (size_t)(r->end - r->p); }

static const uint8_t *netchan__read_bytes(netchan__reader *r, uint64_t size) {
    if (r->bad || size > netchan__left(r)) {
        r->bad = true;
        return NULL;
    }
    const uint8_t *p = r->p;
    r->p += size;
    return p;
}

static uint64_t netchan__read_varint(netchan__reader *r) {
    uint64_t n = 0;
    if (!r->bad && r->p != r->end && *r->p < 0x80) return *r->p++; /* as most are */
    for (unsigned shift = 0; shift < 64; shift += 7) {
        const uint8_t *p = netchan__read_bytes(r, 1);
        if (!p) return 0;
        if (shift == 63 && *p > 1) break;
        n |= (uint64_t)(*p & 0x7f) << shift;
        if (*p < 0x80) return n;
    }
    r->bad = true;
    return 0;
}

/* Little-endian numbers, whatever the machine's order. memcpy and a byte loop compile to one load on the usual ones. */
static uint64_t netchan__load(const uint8_t *p, size_t size) {
    uint64_t n = 0;
    for (size_t i = 0; i < size; i++) n |= (uint64_t)p[i] << (8 * i);
    return n;
}

static void netchan__store(uint8_t *p, uint64_t n, size_t size) {
    for (size_t i = 0; i < size; i++) p[i] = (uint8_t)(n >> (8 * i));
}

/* Open addressing with linear probing and deletion by shifting back (Knuth, TAOCP 6.4, algorithm R). Key 0 marks a free
 * slot. */
typedef struct netchan__map_slot {
    uint64_t key;
    void *item;
} netchan__map_slot;

typedef struct netchan__map {
    netchan__map_slot *slots;
    size_t count, cap; /* cap is a power of two */
} netchan__map;

static uint64_t netchan__map_seed; /* random, set before the first link: a peer chooses keys, but not who collides */

/* The finaliser of splitmix64 (Steele, Lea, Flood 2014). */
static uint64_t netchan__hash(uint64_t key) {
    key ^= netchan__map_seed;
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9u;
    key = (key ^ (key >> 27)) * 0x94D049BB133111EBu;
    return key ^ (key >> 31);
}

/* Of a text: FNV-1a (Fowler, Noll, Vo), and never 0. */
static uint64_t netchan__hash_text(const char *text, size_t size) {
    uint64_t n = 0xCBF29CE484222325u;
    for (size_t i = 0; i < size; i++) n = (n ^ (uint8_t)text[i]) * 0x100000001B3u;
    return netchan__hash(n) | 1;
}

static size_t netchan__map_home(const netchan__map *m, uint64_t key) {
    return (size_t)netchan__hash(key) & (m->cap - 1);
}

static void *netchan__map_get(const netchan__map *m, uint64_t key) {
    if (!m->count) return NULL;
    for (size_t i = netchan__map_home(m, key); m->slots[i].key; i = (i + 1) & (m->cap - 1))
        if (m->slots[i].key == key) return m->slots[i].item;
    return NULL;
}

/* What is in a slot, or NULL: for (size_t i = 0; i < m->cap; i++) meets each item. */
static void *netchan__map_at(const netchan__map *m, size_t i) { return m->slots[i].key ? m->slots[i].item : NULL; }

static bool netchan__map_grow(netchan__map *m) {
    netchan__map bigger = {NULL, m->count, m->cap ? m->cap * 2 : 16};
    bigger.slots = (netchan__map_slot *)netchan__alloc(bigger.cap * sizeof *bigger.slots);
    if (!bigger.slots) return false;
    for (size_t j = 0; j < m->cap; j++) {
        if (!m->slots[j].key) continue;
        size_t i = netchan__map_home(&bigger, m->slots[j].key);
        while (bigger.slots[i].key) i = (i + 1) & (bigger.cap - 1);
        bigger.slots[i] = m->slots[j];
    }
    NETCHAN_FREE(m->slots);
    *m = bigger;
    return true;
}

/* The key must be new. Returns false when out of memory. */
static bool netchan__map_put(netchan__map *m, uint64_t key, void *item) {
    NETCHAN_ASSERT(key != 0);
    if (m->count * 4 >= m->cap * 3 && !netchan__map_grow(m)) return false;
    size_t i = netchan__map_home(m, key);
    while (m->slots[i].key) i = (i + 1) & (m->cap - 1);
    m->slots[i].key = key;
    m->slots[i].item = item;
    m->count++;
    return true;
}

static void netchan__map_remove(netchan__map *m, uint64_t key) {
    if (!m->count) return;
    size_t mask = m->cap - 1, i = netchan__map_home(m, key);
    while (m->slots[i].key != key) {
        if (!m->slots[i].key) return;
        i = (i + 1) & mask;
    }
    for (size_t j = (i + 1) & mask; m->slots[j].key; j = (j + 1) & mask) {
        size_t home = netchan__map_home(m, m->slots[j].key);
        if (((j - home) & mask) < ((j - i) & mask)) continue; /* it would move before its home */
        m->slots[i] = m->slots[j];
        i = j;
    }
    m->slots[i].key = 0;
    m->count--;
}

static void netchan__map_free(netchan__map *m) {
    NETCHAN_FREE(m->slots);
    memset(m, 0, sizeof *m);
}

/* ====================================================================================================================
 * [3] Errors: sentences built where the failure happens, one per thread; and forks, see there.
 * ================================================================================================================== */

static NETCHAN__THREAD_LOCAL char netchan__sentence[512];
static NETCHAN__THREAD_LOCAL const char *netchan__message = "";

NETCHANDEF const char *netchan_strerror(int result) {
    switch (result) {
#define NETCHAN__RESULT_TEXT(name, number, text)                                                                       \
    case number:                                                                                                       \
        return text;
        NETCHAN_RESULTS(NETCHAN__RESULT_TEXT)
#undef NETCHAN__RESULT_TEXT
    default:
        return result > 0 ? "an index, not a result" : "an unknown result";
    }
}

NETCHANDEF const char *netchan_errmsg(void) { return netchan__message; }

/* Sets this thread's sentence and returns the code. */
static int netchan__fail(int code, const char *format, ...) NETCHAN__PRINTF(2, 3);
static int netchan__fail(int code, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(netchan__sentence, sizeof netchan__sentence, format, args);
    va_end(args);
    netchan__message = netchan__sentence;
    return code;
}

/* The same for results that are part of normal life and must cost nothing. */
static int netchan__note(int code, const char *sentence) {
    if (code != NETCHAN_OK) netchan__message = sentence;
    return code;
}

/* strerror() for any thread. */
static const char *netchan__os_error(int error) {
    static NETCHAN__THREAD_LOCAL char text[128];
#if defined(_GNU_SOURCE) && (defined(__GLIBC__) || defined(__BIONIC__))
    return strerror_r(error, text, sizeof text); /* this one returns the text, as in every C++ program on Linux */
#else
    return strerror_r(error, text, sizeof text) == 0 ? text : "unknown error";
#endif
}

static int netchan__fail_memory(const char *function) {
    return netchan__fail(NETCHAN_ENOMEM, "%s: out of memory; nothing was done", function);
}

/* ---- Forks. A child has a copy of the memory, but not the threads, and locks stay as these had them. So what the
 * parent made is left alone in the child: each object knows how many forks there were before it. ---- */

static unsigned netchan__forks; /* constant but for a child before it has threads */

static void netchan__count_fork(void) { netchan__forks++; }

static void netchan__watch_forks(void) { pthread_atfork(NULL, NULL, netchan__count_fork); }

static int netchan__fail_fork(const char *what) {
    return netchan__fail(NETCHAN_EFORK,
                         "%s was made before fork() and belongs to the parent process; make another one in the child",
                         what);
}

/* ====================================================================================================================
 * [4] Values: TLV encode and decode as pure functions; no locks. A value that owns memory owns one block, which begins
 * at its as.block.data; everything inside it points into that block. Encoding is written from the back, so that every
 * LEN is known when it is written and each value is visited once to measure and once to write.
 * Invariant: decoding what encoding made gives an equal value; decoding anything else gives a value or an error, reads
 * no byte outside and allocates at most once, after everything was checked.
 * ================================================================================================================== */

enum {
    NETCHAN__OWNED = 1,
    NETCHAN__HAS_CHANNELS = 2, /* and counts them */
    NETCHAN__CARRIES = 4       /* channels are in it, borrowed as all the rest */
};

enum netchan__tag {
    NETCHAN__TAG_STR0 = 0x40,
    NETCHAN__TAG_NIL = 0x80,
    NETCHAN__TAG_FALSE,
    NETCHAN__TAG_TRUE,
    NETCHAN__TAG_INT,
    NETCHAN__TAG_UINT,
    NETCHAN__TAG_FLOAT,
    NETCHAN__TAG_STR,
    NETCHAN__TAG_BYTES,
    NETCHAN__TAG_ARRAY,
    NETCHAN__TAG_MAP,
    NETCHAN__TAG_END,
    NETCHAN__TAG_I32S,
    NETCHAN__TAG_I64S,
    NETCHAN__TAG_F32S,
    NETCHAN__TAG_F64S
};

enum { NETCHAN__RAW = 255 }; /* the type of a value that is not decoded yet, see [7] */

static const netchan_value netchan__nil_value = {NETCHAN_NIL, 0, {false}};

/* How a session names the channels in values. A name has NETCHAN__END_SIZE bytes; the first bit tells a receiver end
 * from a sender end. */
enum { NETCHAN__END_SIZE = 17, NETCHAN__END_RECEIVER = 1 };

typedef struct netchan__ends netchan__ends;
struct netchan__ends {
    void (*name)(netchan__ends *e, const netchan_value *v, uint8_t *out);
    netchan *(*find)(netchan__ends *e, const uint8_t *name); /* counted for the caller; NULL: it cannot be had */
    bool failed;                                             /* one could not be had */
};

/* Member by member: a copy of what was cleared as a whole and then written in part waits for these writes. */
static netchan_value netchan__make_value(enum netchan_type type) {
    netchan_value v;
    v.type = (uint8_t)type;
    v.flags = 0;
    v.as.block.data = NULL;
    v.as.block.count = 0;
    return v;
}

static netchan_value netchan__make_block(enum netchan_type type, const void *data, size_t count) {
    netchan_value v = netchan__make_value(type);
    v.as.block.data = data;
    v.as.block.count = count;
    return v;
}

NETCHANDEF netchan_value netchan_nil(void) { return netchan__nil_value; }

NETCHANDEF netchan_value netchan_bool(bool b) {
    netchan_value v = netchan__make_value(NETCHAN_BOOL);
    v.as.boolean = b;
    return v;
}

NETCHANDEF netchan_value netchan_int(int64_t i) {
    netchan_value v = netchan__make_value(NETCHAN_INT);
    v.as.i64 = i;
    return v;
}

NETCHANDEF netchan_value netchan_uint(uint64_t u) {
    netchan_value v = netchan__make_value(NETCHAN_UINT);
    v.as.u64 = u;
    return v;
}

NETCHANDEF netchan_value netchan_float(double f) {
    netchan_value v = netchan__make_value(NETCHAN_FLOAT);
    v.as.f64 = f;
    return v;
}

NETCHANDEF netchan_value netchan_strn(const char *s, size_t size) {
    return s ? netchan__make_block(NETCHAN_STR, s, size) : netchan__nil_value;
}

NETCHANDEF netchan_value netchan_str(const char *s) { return netchan_strn(s, s ? strlen(s) : 0); }

NETCHANDEF netchan_value netchan_bytes(const void *data, size_t size) {
    return netchan__make_block(NETCHAN_BYTES, data, size);
}

NETCHANDEF netchan_value netchan_array(const netchan_value *items, size_t count) {
    return netchan__make_block(NETCHAN_ARRAY, items, count);
}

NETCHANDEF netchan_value netchan_map(const netchan_entry *entries, size_t count) {
    return netchan__make_block(NETCHAN_MAP, entries, count);
}

NETCHANDEF netchan_value netchan_struct(const netchan_field *fields, const void *data) {
    netchan_value v = netchan__make_value(NETCHAN_STRUCT);
    v.as.record.data = data;
    v.as.record.fields = fields;
    return v;
}

static netchan_value netchan__make_end(enum netchan_type type, netchan *ch) {
    netchan_value v = netchan__make_value(ch ? type : NETCHAN_NIL);
    v.as.chan = ch;
    return v;
}

NETCHANDEF netchan_value netchan_sender(netchan *ch) { return netchan__make_end(NETCHAN_SENDER, ch); }

NETCHANDEF netchan_value netchan_receiver(netchan *ch) { return netchan__make_end(NETCHAN_RECEIVER, ch); }

NETCHANDEF netchan_value netchan_i32s(const int32_t *items, size_t count) {
    return netchan__make_block(NETCHAN_I32S, items, count);
}

NETCHANDEF netchan_value netchan_i64s(const int64_t *items, size_t count) {
    return netchan__make_block(NETCHAN_I64S, items, count);
}

NETCHANDEF netchan_value netchan_f32s(const float *items, size_t count) {
    return netchan__make_block(NETCHAN_F32S, items, count);
}

NETCHANDEF netchan_value netchan_f64s(const double *items, size_t count) {
    return netchan__make_block(NETCHAN_F64S, items, count);
}

static bool netchan__is_block(const netchan_value *v) {
    return (v->type >= NETCHAN_STR && v->type <= NETCHAN_MAP) || (v->type >= NETCHAN_I32S && v->type <= NETCHAN_F64S);
}

static bool netchan__is_chan(const netchan_value *v) {
    return v->type == NETCHAN_SENDER || v->type == NETCHAN_RECEIVER;
}

/* Bytes of one item of a block type in memory. */
static size_t netchan__item_size(uint8_t type) {
    switch (type) {
    case NETCHAN_ARRAY: return sizeof(netchan_value);
    case NETCHAN_MAP: return sizeof(netchan_entry);
    case NETCHAN_I32S: case NETCHAN_F32S: return 4;
    case NETCHAN_I64S: case NETCHAN_F64S: return 8;
    default: return 1;
    }
}

/* The i-th row of a struct as an entry of a map; false after the last. */
static bool netchan__row(const netchan_value *v, size_t i, netchan_entry *e) {
    const netchan_field *f = &v->as.record.fields[i];
    if (f->kind == NETCHAN_KIND_END) return false;
    const char *at = (const char *)v->as.record.data + f->offset;
    e->key = f->name;
    switch (f->kind) {
    case NETCHAN_KIND_BOOL: e->value = netchan_bool(*(const bool *)at); break;
    case NETCHAN_KIND_I32: e->value = netchan_int(*(const int32_t *)(const void *)at); break;
    case NETCHAN_KIND_I64: e->value = netchan_int(*(const int64_t *)(const void *)at); break;
    case NETCHAN_KIND_U32: e->value = netchan_uint(*(const uint32_t *)(const void *)at); break;
    case NETCHAN_KIND_U64: e->value = netchan_uint(*(const uint64_t *)(const void *)at); break;
    case NETCHAN_KIND_F32: e->value = netchan_float((double)*(const float *)(const void *)at); break;
    case NETCHAN_KIND_F64: e->value = netchan_float(*(const double *)(const void *)at); break;
    case NETCHAN_KIND_STR: e->value = netchan_str(*(const char *const *)(const void *)at); break;
    case NETCHAN_KIND_VALUE: e->value = *(const netchan_value *)(const void *)at; break;
    case NETCHAN_KIND_STRUCT: e->value = netchan_struct(f->fields, at); break;
    case NETCHAN_KIND_END: return false;
    }
    return true;
}

static size_t netchan__row_count(const netchan_value *v) {
    size_t n = 0;
    while (v->as.record.fields[n].kind != NETCHAN_KIND_END) n++;
    return n;
}

/* The i-th entry of a map or struct, or item of an array (key is "" then); false after the last. */
static bool netchan__child(const netchan_value *v, size_t i, netchan_entry *e) {
    if (v->type == NETCHAN_STRUCT) return netchan__row(v, i, e);
    if (i >= v->as.block.count) return false;
    if (v->type == NETCHAN_MAP) {
        *e = ((const netchan_entry *)v->as.block.data)[i];
    } else {
        e->key = "";
        e->value = ((const netchan_value *)v->as.block.data)[i];
    }
    return true;
}

static bool netchan__has_children(const netchan_value *v) {
    return v->type == NETCHAN_ARRAY || v->type == NETCHAN_MAP || v->type == NETCHAN_STRUCT;
}

static size_t netchan__child_count(const netchan_value *v) {
    return v->type == NETCHAN_STRUCT ? netchan__row_count(v) : v->as.block.count;
}

static size_t netchan__align(size_t size) { return (size + 7) & ~(size_t)7; }

/* What a value needs: bytes on the wire, bytes of its block in memory, whether channels are in it. */
typedef struct netchan__measure {
    size_t wire, block;
    bool channels;
} netchan__measure;

static uint64_t netchan__zigzag(int64_t i) { return ((uint64_t)i << 1) ^ (i < 0 ? UINT64_MAX : 0); }

static size_t netchan__length_prefixed(size_t payload) { return 1 + netchan__varint_size(payload) + payload; }

static int netchan__measure_value(const netchan_value *v, unsigned depth, netchan__measure *m);

static int netchan__measure_children(const netchan_value *v, unsigned depth, netchan__measure *m) {
    size_t count = netchan__child_count(v);
    if (count && v->type != NETCHAN_STRUCT && !v->as.block.data)
        return netchan__fail(NETCHAN_EINVAL, "this value is an array or map of %zu items with a NULL pointer", count);
    netchan__measure inner = {0, 0, false};
    netchan_entry e;
    for (size_t i = 0; netchan__child(v, i, &e); i++) {
        if (!e.key) return netchan__fail(NETCHAN_EINVAL, "entry %zu of a map has a NULL key; give it a name", i);
        if (v->type != NETCHAN_ARRAY) {
            size_t length = strlen(e.key);
            inner.wire += netchan__varint_size(length) + length;
            inner.block += netchan__align(length + 1);
        }
        int result = netchan__measure_value(&e.value, depth + 1, &inner);
        if (result != NETCHAN_OK) return result;
    }
    m->wire += netchan__length_prefixed(netchan__varint_size(count) + inner.wire);
    m->block += netchan__align(count * netchan__item_size(v->type == NETCHAN_ARRAY ? NETCHAN_ARRAY : NETCHAN_MAP)) +
                inner.block;
    m->channels |= inner.channels;
    return NETCHAN_OK;
}

/* Adds what v needs to *m. EINVAL when v cannot be a value. */
static int netchan__measure_value(const netchan_value *v, unsigned depth, netchan__measure *m) {
    if (depth > NETCHAN_MAX_DEPTH)
        return netchan__fail(NETCHAN_EINVAL, "this value is nested deeper than %d; flatten it", NETCHAN_MAX_DEPTH);
    switch ((enum netchan_type)v->type) {
    case NETCHAN_NIL: case NETCHAN_BOOL: m->wire += 1; return NETCHAN_OK;
    case NETCHAN_INT:
        m->wire += v->as.i64 >= 0 && v->as.i64 < 64 ? 1 : 1 + netchan__varint_size(netchan__zigzag(v->as.i64));
        return NETCHAN_OK;
    case NETCHAN_UINT: m->wire += 1 + netchan__varint_size(v->as.u64); return NETCHAN_OK;
    case NETCHAN_FLOAT: m->wire += 9; return NETCHAN_OK;
    case NETCHAN_SENDER: case NETCHAN_RECEIVER:
        m->channels = true;
        m->wire += 2 + NETCHAN__END_SIZE;
        return v->as.chan ? NETCHAN_OK : netchan__fail(NETCHAN_EINVAL, "this value is a channel that is NULL");
    case NETCHAN_STR: case NETCHAN_BYTES:
    case NETCHAN_I32S: case NETCHAN_I64S: case NETCHAN_F32S: case NETCHAN_F64S: {
        size_t size = v->as.block.count * netchan__item_size(v->type);
        if ((v->as.block.count && !v->as.block.data) || size / netchan__item_size(v->type) != v->as.block.count)
            return netchan__fail(NETCHAN_EINVAL,
                                 "this value is a block of %zu items with a NULL pointer, or of impossible size",
                                 v->as.block.count);
        m->wire += v->type == NETCHAN_STR && size < 64 ? 1 + size : netchan__length_prefixed(size);
        m->block += size ? netchan__align(size + (v->type == NETCHAN_STR)) : 0;
        return NETCHAN_OK;
    }
    case NETCHAN_ARRAY: case NETCHAN_MAP: case NETCHAN_STRUCT: return netchan__measure_children(v, depth, m);
    }
    return netchan__fail(NETCHAN_EINVAL, "this is no value: type %d does not exist (was it initialised?)", v->type);
}

static uint8_t *netchan__write_varint(uint8_t *p, uint64_t n) {
    p -= netchan__varint_size(n);
    netchan__varint_put(p, n);
    return p;
}

static uint8_t *netchan__write_tag(uint8_t *p, unsigned tag) {
    *--p = (uint8_t)tag;
    return p;
}

static uint8_t *netchan__write_bytes(uint8_t *p, const void *data, size_t size) {
    p -= size;
    if (size) memcpy(p, data, size);
    return p;
}

static bool netchan__little_endian(void) {
    const uint16_t one = 1;
    uint8_t first;
    memcpy(&first, &one, 1);
    return first == 1;
}

/* Packed numbers between memory and wire, either way; the same copy on a little-endian machine. */
static void netchan__copy_packed(uint8_t *to, const uint8_t *from, size_t count, size_t item) {
    if (count && (item == 1 || netchan__little_endian())) memcpy(to, from, count * item);
    else
        for (size_t i = 0; i < count * item; i++) to[i] = from[i / item * item + (item - 1 - i % item)];
}

static unsigned netchan__block_tag(uint8_t type) {
    switch (type) {
    case NETCHAN_STR: return NETCHAN__TAG_STR;
    case NETCHAN_BYTES: return NETCHAN__TAG_BYTES;
    case NETCHAN_I32S: return NETCHAN__TAG_I32S;
    case NETCHAN_I64S: return NETCHAN__TAG_I64S;
    case NETCHAN_F32S: return NETCHAN__TAG_F32S;
    default: return NETCHAN__TAG_F64S;
    }
}

static uint8_t *netchan__write_value(uint8_t *p, const netchan_value *v, netchan__ends *ends);

static uint8_t *netchan__write_children(uint8_t *p, const netchan_value *v, netchan__ends *ends) {
    uint8_t *end = p;
    size_t count = netchan__child_count(v);
    for (size_t i = count; i-- > 0;) {
        netchan_entry e;
        if (!netchan__child(v, i, &e)) break; /* never: it was counted */
        p = netchan__write_value(p, &e.value, ends);
        if (v->type == NETCHAN_ARRAY) continue;
        size_t length = strlen(e.key);
        p = netchan__write_bytes(p, e.key, length);
        p = netchan__write_varint(p, length);
    }
    p = netchan__write_varint(p, count);
    p = netchan__write_varint(p, (uint64_t)(end - p));
    return netchan__write_tag(p, v->type == NETCHAN_ARRAY ? NETCHAN__TAG_ARRAY : NETCHAN__TAG_MAP);
}

/* Writes the measured value v so that it ends before p; returns where it begins. ends may be NULL when no channel is in
 * it. */
static uint8_t *netchan__write_value(uint8_t *p, const netchan_value *v, netchan__ends *ends) {
    switch ((enum netchan_type)v->type) {
    case NETCHAN_NIL: return netchan__write_tag(p, NETCHAN__TAG_NIL);
    case NETCHAN_BOOL: return netchan__write_tag(p, v->as.boolean ? NETCHAN__TAG_TRUE : NETCHAN__TAG_FALSE);
    case NETCHAN_INT:
        if (v->as.i64 >= 0 && v->as.i64 < 64) return netchan__write_tag(p, (unsigned)v->as.i64);
        return netchan__write_tag(netchan__write_varint(p, netchan__zigzag(v->as.i64)), NETCHAN__TAG_INT);
    case NETCHAN_UINT: return netchan__write_tag(netchan__write_varint(p, v->as.u64), NETCHAN__TAG_UINT);
    case NETCHAN_FLOAT: {
        uint64_t bits;
        memcpy(&bits, &v->as.f64, 8);
        netchan__store(p -= 8, bits, 8);
        return netchan__write_tag(p, NETCHAN__TAG_FLOAT);
    }
    case NETCHAN_STR: case NETCHAN_BYTES:
    case NETCHAN_I32S: case NETCHAN_I64S: case NETCHAN_F32S: case NETCHAN_F64S: {
        size_t size = v->as.block.count * netchan__item_size(v->type);
        p -= size;
        netchan__copy_packed(p, (const uint8_t *)v->as.block.data, v->as.block.count, netchan__item_size(v->type));
        if (v->type == NETCHAN_STR && size < 64) return netchan__write_tag(p, NETCHAN__TAG_STR0 + (unsigned)size);
        return netchan__write_tag(netchan__write_varint(p, size), netchan__block_tag(v->type));
    }
    case NETCHAN_ARRAY: case NETCHAN_MAP: case NETCHAN_STRUCT: return netchan__write_children(p, v, ends);
    case NETCHAN_SENDER: case NETCHAN_RECEIVER:
        ends->name(ends, v, p -= NETCHAN__END_SIZE);
        return netchan__write_tag(netchan__write_varint(p, NETCHAN__END_SIZE), NETCHAN__TAG_END);
    }
    NETCHAN_ASSERT(false && "a value that was not measured");
    return p;
}

NETCHANDEF int netchan_encode(const netchan_value *v, void *out, size_t size, size_t *used) {
    netchan__measure m = {0, 0, false};
    int result = netchan__measure_value(v, 0, &m);
    if (result != NETCHAN_OK) return result;
    if (used) *used = m.wire;
    if (m.channels)
        return netchan__fail(NETCHAN_ETYPE, "netchan_encode: the value holds a channel, which has no bytes");
    if (size < m.wire)
        return netchan__fail(NETCHAN_ETOOBIG, "netchan_encode: %zu bytes needed, %zu given", m.wire, size);
    netchan__write_value((uint8_t *)out + m.wire, v, NULL);
    return NETCHAN_OK;
}

/* Bump allocation inside the one block of a value. */
static void *netchan__bump(uint8_t **at, size_t size) {
    void *p = *at;
    if (size) *at += netchan__align(size); /* adding 0 to NULL is undefined */
    return p;
}

static char *netchan__bump_text(uint8_t **at, const void *text, size_t length) {
    char *p = (char *)netchan__bump(at, length + 1);
    if (length) memcpy(p, text, length);
    p[length] = '\0';
    return p;
}

/* A deep copy of v into the measured block at *at. */
static netchan_value netchan__copy_value(const netchan_value *v, uint8_t **at) {
    netchan_value copy = *v;
    copy.flags = 0;
    if (netchan__is_chan(v)) netchan_retain(v->as.chan);
    if (netchan__has_children(v)) {
        size_t count = netchan__child_count(v);
        bool is_map = v->type != NETCHAN_ARRAY;
        void *items = netchan__bump(at, count * (is_map ? sizeof(netchan_entry) : sizeof(netchan_value)));
        copy = netchan__make_block(is_map ? NETCHAN_MAP : NETCHAN_ARRAY, count ? items : NULL, count);
        netchan_entry e;
        for (size_t i = 0; netchan__child(v, i, &e); i++) {
            if (is_map) {
                netchan_entry *to = (netchan_entry *)items + i;
                to->key = netchan__bump_text(at, e.key, strlen(e.key));
                to->value = netchan__copy_value(&e.value, at);
            } else ((netchan_value *)items)[i] = netchan__copy_value(&e.value, at);
        }
    } else if (netchan__is_block(v)) {
        size_t size = v->as.block.count * netchan__item_size(v->type);
        if (!size) copy.as.block.data = "";
        else if (v->type == NETCHAN_STR) copy.as.block.data = netchan__bump_text(at, v->as.block.data, size);
        else copy.as.block.data = memcpy(netchan__bump(at, size), v->as.block.data, size);
    }
    return copy;
}

/* The same as netchan_copy() for a value that was measured. */
static int netchan__copy_measured(netchan_value *to, const netchan_value *from, const netchan__measure *m) {
    uint8_t *block = NULL;
    *to = netchan__nil_value;
    if (!netchan__is_block(from) && !netchan__has_children(from) && !m->channels) { /* a number, most often */
        *to = *from;
        to->flags = 0;
        return NETCHAN_OK;
    }
    if (m->block && !(block = (uint8_t *)NETCHAN_MALLOC(m->block))) return netchan__fail_memory("copying a value");
    uint8_t *at = block;
    netchan_value copy = netchan__copy_value(from, &at);
    NETCHAN_ASSERT(!block || at == block + m->block);
    copy.flags = (uint8_t)((block ? NETCHAN__OWNED : 0) | (m->channels ? NETCHAN__HAS_CHANNELS : 0));
    *to = copy;
    return NETCHAN_OK;
}

NETCHANDEF int netchan_copy(netchan_value *to, const netchan_value *from) {
    netchan__measure m = {0, 0, false};
    netchan_value source = *from;
    *to = netchan__nil_value;
    int result = netchan__measure_value(&source, 0, &m);
    return result != NETCHAN_OK ? result : netchan__copy_measured(to, &source, &m);
}

static void netchan__free_raw_ends(const netchan_value *v);

static void netchan__free_channels(const netchan_value *v) {
    if (v->type == NETCHAN__RAW) netchan__free_raw_ends(v);
    if (netchan__is_chan(v)) netchan_free(v->as.chan);
    if (!netchan__has_children(v)) return;
    netchan_entry e;
    for (size_t i = 0; netchan__child(v, i, &e); i++) netchan__free_channels(&e.value);
}

NETCHANDEF void netchan_clear(netchan_value *v) {
    if (!v) return;
    if (v->flags & NETCHAN__HAS_CHANNELS) netchan__free_channels(v);
    if (v->flags & NETCHAN__OWNED) NETCHAN_FREE((void *)(uintptr_t)v->as.block.data);
    *v = netchan__nil_value;
}

/* Which block type a tag is, or NETCHAN_NIL. */
static enum netchan_type netchan__tag_type(unsigned tag) {
    switch (tag) {
    case NETCHAN__TAG_STR: return NETCHAN_STR;
    case NETCHAN__TAG_BYTES: return NETCHAN_BYTES;
    case NETCHAN__TAG_ARRAY: return NETCHAN_ARRAY;
    case NETCHAN__TAG_MAP: return NETCHAN_MAP;
    case NETCHAN__TAG_I32S: return NETCHAN_I32S;
    case NETCHAN__TAG_I64S: return NETCHAN_I64S;
    case NETCHAN__TAG_F32S: return NETCHAN_F32S;
    case NETCHAN__TAG_F64S: return NETCHAN_F64S;
    default: return NETCHAN_NIL;
    }
}

/* How a value in bytes begins. */
typedef struct netchan__head {
    netchan_value v;      /* a scalar, whole; of a block its type and its count (bytes, items or entries) */
    netchan__reader body; /* of a block: what comes after that count; of an end: its name */
} netchan__head;

static void netchan__read_head(netchan__reader *r, netchan__head *h) {
    netchan_value *v = &h->v;
    netchan__reader *body = &h->body;
    const uint8_t *p = netchan__read_bytes(r, 1);
    unsigned tag = p ? (unsigned)*p : (unsigned)NETCHAN__TAG_NIL;
    *v = netchan__nil_value;
    uint64_t size = 0;
    if (tag < NETCHAN__TAG_STR0) {
        *v = netchan_int((int64_t)tag);
    } else if (tag < NETCHAN__TAG_NIL) {
        size = tag - NETCHAN__TAG_STR0;
        v->type = NETCHAN_STR;
    } else if (tag == NETCHAN__TAG_FALSE || tag == NETCHAN__TAG_TRUE) {
        *v = netchan_bool(tag == NETCHAN__TAG_TRUE);
    } else if (tag == NETCHAN__TAG_INT) {
        uint64_t n = netchan__read_varint(r);
        *v = netchan_int((int64_t)((n >> 1) ^ (0 - (n & 1))));
    } else if (tag == NETCHAN__TAG_UINT) {
        *v = netchan_uint(netchan__read_varint(r));
    } else if (tag == NETCHAN__TAG_FLOAT) {
        const uint8_t *bits = netchan__read_bytes(r, 8);
        uint64_t n = bits ? netchan__load(bits, 8) : 0;
        v->type = NETCHAN_FLOAT;
        memcpy(&v->as.f64, &n, 8);
    } else if (tag != NETCHAN__TAG_NIL) {
        size = netchan__read_varint(r);
        v->type = (uint8_t)netchan__tag_type(tag);
    }
    body->p = netchan__read_bytes(r, size);
    body->bad = !body->p;
    body->end = body->p ? body->p + size : NULL;
    if (tag == NETCHAN__TAG_END && size == NETCHAN__END_SIZE && body->p)
        v->type = *body->p & NETCHAN__END_RECEIVER ? NETCHAN_RECEIVER : NETCHAN_SENDER;
    else if (tag == NETCHAN__TAG_END) r->bad = true;
    if (r->bad || !netchan__is_block(v)) return;
    size_t item = netchan__item_size(v->type);
    if (netchan__has_children(v)) {
        uint64_t count = netchan__read_varint(body); /* every item takes a byte at least, every entry two */
        if (body->bad || count > netchan__left(body) / (v->type == NETCHAN_MAP ? 2 : 1)) r->bad = true;
        else v->as.block.count = (size_t)count;
    } else if (size % item) r->bad = true;
    else v->as.block.count = (size_t)(size / item);
}

static void netchan__scan_value(netchan__reader *r, netchan__head *h, unsigned depth, netchan__measure *m);

static void netchan__scan_children(netchan__reader *body, const netchan_value *v, unsigned depth, netchan__measure *m) {
    netchan__head child;
    size_t before = m->wire;
    m->wire = netchan__varint_size(v->as.block.count);
    for (size_t i = 0; i < v->as.block.count && !body->bad; i++) {
        if (v->type == NETCHAN_MAP) {
            uint64_t length = netchan__read_varint(body);
            const uint8_t *key = netchan__read_bytes(body, length);
            if (!key || memchr(key, 0, (size_t)length)) {
                body->bad = true;
                break;
            }
            m->block += netchan__align((size_t)length + 1);
            m->wire += netchan__varint_size(length) + (size_t)length;
        }
        netchan__scan_value(body, &child, depth + 1, m);
    }
    m->wire = before + netchan__length_prefixed(m->wire);
}

/* Reads the next value and adds what it needs to *m: in memory, and on the wire in its shortest form. *h: how it
 * begins. Sets r->bad when it is malformed. */
static void netchan__scan_value(netchan__reader *r, netchan__head *h, unsigned depth, netchan__measure *m) {
    netchan__read_head(r, h);
    if (depth > NETCHAN_MAX_DEPTH) r->bad = true;
    if (r->bad) return;
    const netchan_value *v = &h->v;
    if (netchan__is_chan(v)) {
        m->channels = true;
        m->wire += 2 + NETCHAN__END_SIZE;
    } else if (!netchan__is_block(v)) netchan__measure_value(v, depth, m);
    if (!netchan__is_block(v)) return;
    if (v->as.block.count > SIZE_MAX / 64 || m->block > SIZE_MAX / 2) { /* where pointers have 32 bits */
        r->bad = true;
        return;
    }
    size_t size = v->as.block.count * netchan__item_size(v->type);
    m->block += size ? netchan__align(size + (v->type == NETCHAN_STR)) : 0;
    if (!netchan__has_children(v)) {
        m->wire += v->type == NETCHAN_STR && size < 64 ? 1 + size : netchan__length_prefixed(size);
        return;
    }
    netchan__reader body = h->body;
    netchan__scan_children(&body, v, depth, m);
    if (body.bad || netchan__left(&body)) r->bad = true;
}

/* The end that has this name, or nil. */
static netchan_value netchan__build_end(enum netchan_type type, const uint8_t *name, netchan__ends *ends) {
    netchan *ch = ends ? ends->find(ends, name) : NULL;
    if (ends && !ch) ends->failed = true;
    return netchan__make_end(type, ch);
}

/* Builds a value that netchan__scan_value() found good in the block at *at. Without ends channels are nil. */
static netchan_value netchan__build_value(const netchan__head *h, uint8_t **at, netchan__ends *ends) {
    netchan_value v = h->v;
    netchan__reader body = h->body;
    if (netchan__is_chan(&v)) return netchan__build_end((enum netchan_type)v.type, body.p, ends);
    if (!netchan__is_block(&v)) return v;
    size_t count = v.as.block.count, size = count * netchan__item_size(v.type);
    if (!size) {
        v.as.block.data = netchan__has_children(&v) ? NULL : "";
        return v;
    }
    if (v.type == NETCHAN_STR) {
        v.as.block.data = netchan__bump_text(at, body.p, size);
        return v;
    }
    void *data = netchan__bump(at, size);
    v.as.block.data = data;
    if (!netchan__has_children(&v)) {
        netchan__copy_packed((uint8_t *)data, body.p, count, netchan__item_size(v.type));
        return v;
    }
    for (size_t i = 0; i < count; i++) {
        netchan_value *item = (netchan_value *)data + i;
        netchan__head child;
        if (v.type == NETCHAN_MAP) {
            netchan_entry *e = (netchan_entry *)data + i;
            size_t length = (size_t)netchan__read_varint(&body);
            e->key = netchan__bump_text(at, netchan__read_bytes(&body, length), length);
            item = &e->value;
        }
        netchan__read_head(&body, &child);
        *item = netchan__build_value(&child, at, ends);
    }
    return v;
}

/* The first half of netchan_decode(): checks the bytes, and tells how their value begins and what it needs. */
static int netchan__scan(const void *data, size_t size, netchan__head *h, netchan__measure *m) {
    const uint8_t *begin = (const uint8_t *)data;
    netchan__reader r = {begin, begin + size, false};
    m->wire = m->block = 0;
    m->channels = false;
    netchan__scan_value(&r, h, 0, m);
    if (!r.bad && !netchan__left(&r)) return NETCHAN_OK;
    return netchan__fail(NETCHAN_EPROTO, "these %zu bytes are not one whole value", size);
}

/* The second half. */
static int netchan__build(netchan_value *v, const netchan__head *h, const netchan__measure *m, netchan__ends *ends) {
    uint8_t *block = NULL;
    if (m->block && !(block = (uint8_t *)NETCHAN_MALLOC(m->block))) return netchan__fail_memory("decoding a value");
    uint8_t *at = block;
    *v = netchan__build_value(h, &at, ends);
    NETCHAN_ASSERT(!block || at == block + m->block);
    v->flags = (uint8_t)((block ? NETCHAN__OWNED : 0) | (ends && m->channels ? NETCHAN__HAS_CHANNELS : 0));
    if (!ends || !ends->failed) return NETCHAN_OK;
    netchan_clear(v);
    return netchan__fail(NETCHAN_EPROTO, "these %zu bytes name a channel that cannot be had", m->wire);
}

static int netchan__check_block(size_t size, size_t block, size_t max_block) {
    if (!max_block || block <= max_block) return NETCHAN_OK;
    return netchan__fail(NETCHAN_ETOOBIG, "a value of %zu bytes would need %zu in memory, more than the limit of %zu",
                         size, block, max_block);
}

NETCHANDEF int netchan_decode(netchan_value *v, const void *data, size_t size, size_t max_block) {
    netchan__head h;
    netchan__measure m;
    *v = netchan__nil_value;
    int result = netchan__scan(data ? data : "", data ? size : 0, &h, &m);
    if (result == NETCHAN_OK) result = netchan__check_block(size, m.block, max_block);
    return result == NETCHAN_OK ? netchan__build(v, &h, &m, NULL) : result;
}

NETCHANDEF const netchan_value *netchan_at(const netchan_value *v, size_t index) {
    if (!v || v->type != NETCHAN_ARRAY || index >= v->as.block.count) return &netchan__nil_value;
    return (const netchan_value *)v->as.block.data + index;
}

NETCHANDEF const netchan_value *netchan_get(const netchan_value *v, const char *key) {
    if (!v || !key || v->type != NETCHAN_MAP) return &netchan__nil_value;
    const netchan_entry *e = (const netchan_entry *)v->as.block.data;
    for (size_t i = 0; i < v->as.block.count; i++)
        if (strcmp(e[i].key, key) == 0) return &e[i].value;
    return &netchan__nil_value;
}

NETCHANDEF bool netchan_as_bool(const netchan_value *v, bool fallback) {
    return v && v->type == NETCHAN_BOOL ? v->as.boolean : fallback;
}

NETCHANDEF int64_t netchan_as_int(const netchan_value *v, int64_t fallback) {
    if (v && v->type == NETCHAN_INT) return v->as.i64;
    if (v && v->type == NETCHAN_UINT && v->as.u64 <= INT64_MAX) return (int64_t)v->as.u64;
    return fallback;
}

NETCHANDEF uint64_t netchan_as_uint(const netchan_value *v, uint64_t fallback) {
    if (v && v->type == NETCHAN_UINT) return v->as.u64;
    if (v && v->type == NETCHAN_INT && v->as.i64 >= 0) return (uint64_t)v->as.i64;
    return fallback;
}

NETCHANDEF double netchan_as_float(const netchan_value *v, double fallback) {
    if (v && v->type == NETCHAN_FLOAT) return v->as.f64;
    if (v && v->type == NETCHAN_INT) return (double)v->as.i64;
    if (v && v->type == NETCHAN_UINT) return (double)v->as.u64;
    return fallback;
}

NETCHANDEF const char *netchan_as_str(const netchan_value *v, const char *fallback) {
    return v && v->type == NETCHAN_STR ? (const char *)v->as.block.data : fallback;
}

NETCHANDEF netchan *netchan_as_chan(const netchan_value *v) { return v && netchan__is_chan(v) ? v->as.chan : NULL; }

NETCHANDEF bool netchan_is_nil(const netchan_value *v) { return !v || v->type == NETCHAN_NIL; }

NETCHANDEF size_t netchan_count(const netchan_value *v) { return v && netchan__is_block(v) ? v->as.block.count : 0; }

NETCHANDEF const void *netchan_as_block(const netchan_value *v, enum netchan_type type, size_t *count) {
    bool found = v && v->type == type && netchan__is_block(v) && !netchan__has_children(v);
    if (count) *count = found ? v->as.block.count : 0;
    return found ? v->as.block.data : NULL;
}

NETCHAN__SMALL_BEGIN
/* ====================================================================================================================
 * [5] Struct tables: from a map back into a struct. All is checked before the first byte is written.
 * ================================================================================================================== */

static bool netchan__fits(const netchan_value *v, const netchan_field *f) {
    switch (f->kind) {
    case NETCHAN_KIND_BOOL: return v->type == NETCHAN_BOOL;
    case NETCHAN_KIND_I32:
        return netchan_as_int(v, INT64_MAX) >= INT32_MIN && netchan_as_int(v, INT64_MAX) <= INT32_MAX;
    case NETCHAN_KIND_I64: return netchan_as_int(v, 0) == netchan_as_int(v, 1);
    case NETCHAN_KIND_U32: return netchan_as_uint(v, UINT64_MAX) <= UINT32_MAX;
    case NETCHAN_KIND_U64: return netchan_as_uint(v, 0) == netchan_as_uint(v, 1);
    case NETCHAN_KIND_F32: case NETCHAN_KIND_F64:
        return v->type == NETCHAN_FLOAT || v->type == NETCHAN_INT || v->type == NETCHAN_UINT;
    case NETCHAN_KIND_STR: return v->type == NETCHAN_STR || v->type == NETCHAN_NIL;
    case NETCHAN_KIND_VALUE: return true;
    case NETCHAN_KIND_STRUCT: return v->type == NETCHAN_MAP;
    case NETCHAN_KIND_END: break;
    }
    return false;
}

static int netchan__check_fields(const netchan_value *v, const netchan_field *fields) {
    static const char *const kinds[] = {"",
                                        "a bool",
                                        "an int of 32 bits",
                                        "an int of 64 bits",
                                        "a uint of 32 bits",
                                        "a uint of 64 bits",
                                        "a float",
                                        "a float",
                                        "a string",
                                        "a value",
                                        "a map"};
    static const char *const types[] = {
        "nil",   "a bool",    "an int",    "a uint",       "a float",      "a string",     "bytes",        "an array",
        "a map", "a channel", "a channel", "an i32 array", "an i64 array", "an f32 array", "an f64 array", "a struct"};
    if (v->type != NETCHAN_MAP)
        return netchan__fail(NETCHAN_ETYPE, "netchan_unpack: the value is %s, not a map",
                             types[v->type <= NETCHAN_STRUCT ? v->type : 0]);
    for (const netchan_field *f = fields; f->kind != NETCHAN_KIND_END; f++) {
        const netchan_value *item = netchan_get(v, f->name);
        if (item == &netchan__nil_value) continue;
        if (!netchan__fits(item, f))
            return netchan__fail(
                NETCHAN_ETYPE, "netchan_unpack: field \"%s\" is %s%s, not %s", f->name, types[item->type],
                item->type == NETCHAN_INT || item->type == NETCHAN_UINT ? " (perhaps out of range)" : "",
                kinds[f->kind]);
        int result = f->kind == NETCHAN_KIND_STRUCT ? netchan__check_fields(item, f->fields) : NETCHAN_OK;
        if (result != NETCHAN_OK) return result;
    }
    return NETCHAN_OK;
}

static void netchan__store_fields(const netchan_value *v, const netchan_field *fields, char *out) {
    for (const netchan_field *f = fields; f->kind != NETCHAN_KIND_END; f++) {
        const netchan_value *item = netchan_get(v, f->name);
        void *at = out + f->offset;
        if (item == &netchan__nil_value) continue;
        switch (f->kind) {
        case NETCHAN_KIND_BOOL: *(bool *)at = item->as.boolean; break;
        case NETCHAN_KIND_I32: *(int32_t *)at = (int32_t)netchan_as_int(item, 0); break;
        case NETCHAN_KIND_I64: *(int64_t *)at = netchan_as_int(item, 0); break;
        case NETCHAN_KIND_U32: *(uint32_t *)at = (uint32_t)netchan_as_uint(item, 0); break;
        case NETCHAN_KIND_U64: *(uint64_t *)at = netchan_as_uint(item, 0); break;
        case NETCHAN_KIND_F32: *(float *)at = (float)netchan_as_float(item, 0); break;
        case NETCHAN_KIND_F64: *(double *)at = netchan_as_float(item, 0); break;
        case NETCHAN_KIND_STR: *(const char **)at = netchan_as_str(item, NULL); break;
        case NETCHAN_KIND_VALUE:
            *(netchan_value *)at = *item;
            ((netchan_value *)at)->flags = 0; /* borrowed */
            break;
        case NETCHAN_KIND_STRUCT: netchan__store_fields(item, f->fields, (char *)at); break;
        case NETCHAN_KIND_END: break;
        }
    }
}

NETCHANDEF int netchan_unpack(const netchan_value *v, const netchan_field *fields, void *out) {
    int result = netchan__check_fields(v ? v : &netchan__nil_value, fields);
    if (result == NETCHAN_OK) netchan__store_fields(v, fields, (char *)out);
    return result;
}

NETCHAN__SMALL_END

/* ====================================================================================================================
 * [6] Channels: what they are made of: operations and their waiters, queues, lanes, buffers, messages.
 *
 * An operation is one blocked send, receive or select. It waits with one waiter per case, each in the queue of its
 * channel. Operations of this process live on the stack of the blocked call; those of other processes are heap waiters
 * without an op. A channel has its home in the process that made it; elsewhere it is an end, which only forwards. A
 * home has one lane, or, when it merges what many peers send, one lane per peer. A lane is a buffer with its waiting
 * senders.
 *
 * Locks. A channel starts with a lock of its own, of two mutexes: who puts a value into its buffer, or takes one out,
 * with nobody waiting, has one of them and does not meet the other side; a rendezvous may need none (I6); all else is
 * done with both. From the first time that it meets another process, or a select that does, its lock is
 * netchan__net_lock, for good, together with all channels of all operations that wait on it. So an operation is either
 * wholly under netchan__net_lock ("net") or not at all. Order: netchan__net_lock, then own locks by address, of each
 * the receivers' first, then an operation's mutex.
 *
 * Invariants.
 *   I1  An operation leaves OPEN once: by compare-and-swap, as several own mutexes may reach it. Outside net it goes to
 *       DONE only (ENGAGED is seen there only of an operation that is about to be DONE).
 *   I2  Whoever holds a channel's lock leaves no idle sender and idle receiver that could be paired. Who waits in a
 *       process whose link is down is not idle, unless its value is here.
 *   I3  count + out + reserved + lent <= cap in every lane: values in the buffer, values being claimed, slots being
 *       filled, credit.
 *   I4  Values of one lane leave in the order in which they entered: while a value is out on a claim that can be
 *       declined, no other goes; and what comes back takes its old place. (Not so values that come early, see [9].)
 *   I5  Of a channel with a lock of its own, senders alone change lane.last, entered and came, and receivers alone
 *       lane.first and went (Lamport 1983); is_ready is right while both mutexes are had.
 *   I6  A channel with a lock of its own and no buffer has a place where one receive may wait for some microseconds,
 *       outside the queue, so that a send needs no lock. Whoever gives the lock back notes in the place whether
 *       somebody waits in a queue, or the channel is closing or net: nobody who can know of that uses the place then,
 *       and who waits there leaves. Who gave a value there touches the channel no more; who gets it says when it has.
 * ================================================================================================================== */

typedef struct netchan__op netchan__op;
typedef struct netchan__waiter netchan__waiter;
typedef struct netchan__match netchan__match;
typedef struct netchan__lane netchan__lane;
typedef struct netchan__peer netchan__peer;
typedef struct netchan__export netchan__export;

/* A frame fits into one TLS record. A value of more encoded bytes than a fragment is never in the frame that announces
 * it. */
enum { NETCHAN__FRAME_MAX = 16384, NETCHAN__FRAGMENT = NETCHAN__FRAME_MAX - 128 };
/* How much larger a value may be in memory than on the wire: a nil in an array is one byte there and a netchan_value
 * here. */
enum { NETCHAN__SWELL = 24 };

/* Values of a work queue that one peer may have before it receives them, and the bytes of one of them, at most. How
 * long may pass between two receives for which it is worth while. */
enum { NETCHAN__EARLY_MOST = 16, NETCHAN__EARLY_SIZE = 1024, NETCHAN__EARLY_PACE_MS = 1 };

/* Of x86 and most ARM; where they are longer, only time is lost. */
enum { NETCHAN__CACHE_LINE = 64 };

enum netchan__op_state {
    NETCHAN__OPEN,      /* any case may happen */
    NETCHAN__ENGAGED,   /* promised to one match, which may still fall through */
    NETCHAN__COMMITTED, /* one case happens; its last message is on the way */
    NETCHAN__DONE
};

typedef struct netchan__queue {
    netchan__waiter *head, *tail;
} netchan__queue;

/* A large value that comes in fragments. One that is a single block of bytes or numbers is put together where it stays;
 * head: then the bytes before it on the wire. */
typedef struct netchan__incoming {
    netchan__buf bytes;
    size_t head;
    enum netchan_type type; /* with head */
} netchan__incoming;

/* One case of one operation. All fields belong to the lock of ch. */
struct netchan__waiter {
    netchan__waiter *prev, *next;
    netchan__queue *queue; /* NULL: in none */
    netchan *ch;
    netchan__lane *lane;   /* a sender at home: where its value goes */
    netchan__op *op;       /* NULL: an operation of another process, and this a netchan__remote */
    netchan__peer *peer;   /* op NULL: whose, NULL when lost; at an end: the home it is registered with, or NULL */
    uint64_t peer_number;
    netchan__match *match; /* at home: being negotiated */
    size_t index;          /* which case of op */
    size_t turn;           /* op->waiters[i].turn is the index of the waiter that is tried as the i-th */
    uint64_t id;           /* registered: unique among the waiters of its process */
    uint64_t op_id;        /* unique among the operations of its process, in the order they began */
    uint64_t position;     /* at an end: where in the stream its value ended; 0: it was not sent */
    uint64_t to;           /* the peer that it is for; 0: whoever comes */
    netchan_value value;   /* a sender's. At home owned; at an end borrowed from the blocked call */
    size_t size, memory;   /* its encoded bytes, and what it occupies at home */
    bool is_send, multi;   /* multi: the operation has several cases */
    bool is_try;           /* answer at once */
    bool firm;             /* one case, no timeout: it has nothing else to do; or ahead */
    bool ahead;            /* no receive, but room for a value that comes before there is one: see [9] */
    bool here;             /* the value is at home, and so the home's to match */
    bool withdrawn;        /* goes when its match falls through */
    bool lost;             /* its process is gone; at an end: its home, or that has ended it with `refused` */
    int refused;
    bool starved;          /* there was no memory for it while its operation was engaged */
    bool held;             /* the call, or the remote operation, holds the channel */
    bool waits;            /* at an end: a receive that will be registered; one that is a try counts already */
    bool lends;            /* at an end: its large value may be read by its peer until that is told to keep it */
    /* A claim on this waiter by a match at its home. */
    netchan__waiter *next_claim; /* in the queue of its operation */
    uint64_t claim;              /* the match; 0: none */
    bool claim_final, claim_redelivered, claim_unhurried;
    netchan_value claim_value;
    netchan__incoming incoming; /* a large value that is being received */
    size_t announced;      /* how many bytes they will be */
    uint64_t waited;       /* nanoseconds for which it was seen waiting for its peer; 0: not seen yet */
};

enum netchan__relay_step {
    NETCHAN__IDLE,    /* it waits */
    NETCHAN__CLAIMED, /* a claim was passed on to its process */
    NETCHAN__GRANTED, /* and the answer to the home */
    NETCHAN__SHIPPED  /* a value was committed to its process */
};

/* The waiter of a remote operation: at the channel's home, or at an end of it, which relays it to the home. */
typedef struct netchan__remote {
    netchan__waiter waiter; /* first */
    uint8_t process[16];    /* whose operation it is; several hops away it is not the peer */
    bool relayed;           /* it comes from a process that relays it */
    uint64_t channel;       /* the number by which its process knows the channel */
    size_t most;            /* a receiver: the largest value that it takes */
    bool again;             /* ahead: it waits for another value when its match is over */
    /* At an end, see [10]. waiter.claim is the match of the home. */
    netchan__peer *up;      /* the home, or the next on the way; NULL: it is not registered there */
    uint64_t up_id;         /* as what */
    uint64_t down;          /* the match that waiter.peer knows; 0: none */
    enum netchan__relay_step step;
    bool carried;           /* the claim carried the value on */
    size_t size;            /* of that value */
    size_t declined;        /* a receiver: the size of a value for which there was no room */
} netchan__remote;

struct netchan__op {
    int state; /* atomic */
    bool net;
    bool expired;  /* net: its time is up, but it is engaged */
    bool detached; /* net: nobody waits for it; it owns its value, and is freed when it is over */
    bool runs;     /* net: its thread runs the loop meanwhile */
    bool sleeps;   /* net: it counts among netchan__net.sleepers */
    size_t count;
    netchan__waiter *waiters;
    netchan__waiter *engaged;                /* net: the waiter that is engaged or committed */
    netchan__waiter *claims, *last_claim;    /* net: claims that wait until it is open */
    netchan__op *prev_released, *next_released; /* net: in netchan__net.released */
    bool is_released;
    size_t tries; /* net: of a call that does not wait: cases that were not answered yet */
    uint64_t id;
    /* The outcome, written by who finishes it. */
    int index, result;
    netchan_value value;
    uint64_t peer;
    bool redelivered;
    netchan__op *next_to_wake;
    int wake;              /* atomic, see netchan__wake */
    pthread_mutex_t mutex; /* from here on: made when its thread sleeps; guards told */
    pthread_cond_t cond;
    bool told;
};

/* Who finishes an operation whose thread sleeps tells it; of one that does not it only marks that, and touches it no
 * more: it is on the stack of its thread. */
enum netchan__wake { NETCHAN__AWAKE, NETCHAN__ASLEEP, NETCHAN__FINISHED };

typedef struct netchan__slot {
    netchan_value value;
    size_t size;   /* its encoded bytes */
    size_t memory; /* what it occupies here */
    uint64_t order; /* grows with each value that enters the lane */
    uint64_t from;  /* the peer that sent it */
    bool redelivered;
} netchan__slot;

struct netchan__lane {
    netchan *ch;
    netchan__lane *prev, *next; /* all lanes of ch */
    netchan__lane *prev_ready, *next_ready;
    bool is_ready;
    netchan__queue senders;
    netchan__slot *slots; /* a ring that grows up to cap */
    size_t room, cap;     /* room: a power of two */
    size_t out;      /* values of the buffer that are out on claims */
    size_t pinned;   /* of those, on claims of waiters that are not firm */
    size_t reserved; /* slots promised to senders being claimed */
    size_t lent;     /* credit at the peer */
    bool closing;    /* no more values will enter */
    size_t matching; /* matches of this lane */
    netchan__peer *peer; /* the process that sends into this lane, if it is one of several */
    netchan__peer *only; /* direct: the process whose receivers alone are served from this lane; NULL when it is gone */
    bool is_direct;
    uint64_t peer_number;
    void *hub;        /* for netchan__net.on_drained */
    bool closed_by_peer, orphaned; /* its peer said that no more will come; is gone */
    bool returning;  /* this side hangs up: what is in the buffer goes back to the peer */
    netchan__lane *next_changed;
    bool is_changed;
    char apart[NETCHAN__CACHE_LINE]; /* what senders write is in other cache lines than what receivers write */
    size_t last;      /* atomic in senders' hands. The next value that enters has slot last % room */
    size_t seen_first; /* a sender's: first was at least that */
    uint64_t entered; /* values, ever */
    size_t came;      /* how much values occupied that entered the buffer, in bytes, modulo */
    char further[NETCHAN__CACHE_LINE];
    size_t first;     /* atomic in receivers' hands. The next value that leaves has slot first % room */
    size_t seen_last; /* a receiver's: last was at least that; or it is behind first */
    size_t went;      /* likewise of those that left */
    size_t left;      /* values that left since the peer was told */
};

/* Of a place: nobody waits there; a receive does; a send is about to give it a value; and has given it. To each of them
 * may be added that the place is not to be used. */
enum { NETCHAN__VACANT, NETCHAN__AWAITED, NETCHAN__GIVING, NETCHAN__FILLED, NETCHAN__BUSY };

/* See I6. */
typedef struct netchan__place {
    int state;        /* atomic */
    unsigned seekers; /* atomic: selects that look for somebody in the queue, for a moment */
    netchan_value value;
} netchan__place;

/* Of one channel. */
typedef struct netchan__own_lock {
    pthread_mutex_t receiving; /* first: it stands for both */
    char apart[NETCHAN__CACHE_LINE];
    pthread_mutex_t sending;
    char further[NETCHAN__CACHE_LINE];
    netchan__place place;
} netchan__own_lock;

struct netchan {
    pthread_mutex_t *lock; /* atomic; own.receiving, later netchan__net_lock */
    size_t refs; /* atomic */
    unsigned forks; /* before it was made; constant */
    bool may_send, may_receive;
    bool closing; /* close was called */
    bool closed;  /* and all values are gone */
    bool is_end, is_merge, is_dirty;
    bool shared; /* atomic: other processes use it, or did */
    bool plain; /* what is sent leaves this process: a channel of a link */
    netchan__queue receivers;
    netchan__queue ahead; /* what waits for values that come early: at home that of peers, at an end ours */
    netchan__lane lane; /* the only one, unless is_merge; at an end: its senders, and cap */
    netchan__lane *lanes;
    netchan__lane *ready, *last_ready; /* lanes from which a receiver could take something, in turn */
    netchan__match *matches;
    netchan *next_dirty;
    netchan *next_dead;    /* under netchan__dead_lock, as is_dead */
    bool is_dead;
    bool gone;             /* its other side is lost for good */
    netchan__export *exports;            /* ends of it that other processes hold */
    size_t sender_ends, receiver_ends;   /* how many of them; a name under which it can be imported counts as one */
    bool senders_lost, receivers_lost;   /* some were lost with their session, and none was given away since */
    void (*on_taken)(netchan *ch, const netchan_value *v); /* a value leaves for a receiver */
    void *hub;                           /* for on_taken */
    /* An end. */
    bool credited;         /* it lives as long as its link, and what is sent into the buffer costs credit */
    bool far;              /* its home is not the next process: that one relays */
    uint64_t named;        /* how often it came in a value */
    netchan__queue relayed; /* waiters of other processes */
    netchan__peer *home;   /* NULL while there is no session */
    uint64_t channel;      /* its number there */
    size_t credit;         /* values that may be sent at once */
    size_t in_flight; /* values that were sent in this session and, as far as this process knows, are in the buffer */
    size_t detached;  /* values that came back from earlier sessions: first in lane.senders, and in returned */
    netchan__queue returned; /* those that the home of this session has handed back, until it ends */
    netchan__buf returning;  /* the beginning of one */
    netchan__queue early;    /* values that came before a receive wanted them */
    size_t early_count;      /* atomic: how many */
    uint64_t early_taken;    /* how many were, ever */
    size_t rooms, stand_ins; /* waiters in ahead and early; of these, those that home knows as receives */
    size_t wanted;           /* atomic: how many there should be */
    uint64_t given_up;       /* the entry of the room that was given up last, until home says that it knows; or 0 */
    uint64_t given_up_waited; /* see netchan__check_answer() */
    uint64_t received_at;    /* atomic: when the last receive returned, in nanoseconds */
    size_t undelivered;      /* values that were sent with OK and could not be */
    size_t largest, largest_memory; /* of the values sent with OK: bytes on the wire, and here */
    size_t in_flight_bytes;         /* on the wire, of those in flight, at most */
    bool close_sent;
    netchan__own_lock own;
};

/* Two parties of one channel that are being brought together. At home, net. */
struct netchan__match {
    netchan__match *prev, *next; /* matches of ch */
    netchan__match *next_declined;
    netchan *ch;
    netchan__lane *lane;
    netchan__waiter *sender;   /* NULL: the value came from the buffer */
    netchan__waiter *receiver; /* NULL: it goes to a slot of the buffer */
    uint64_t id;
    bool from_buffer, to_buffer, receiver_first, pinned, redelivered;
    bool lends; /* the value may be read by the receiver's peer until that is told to keep it */
    bool carried;           /* the final claim carried the value to the receiver */
    bool granted;           /* a remote sender has said yes, and its fragments come */
    bool sender_gone, receiver_gone; /* a local party that is over; its pointer is NULL then */
    int step;               /* 0, 1: that party's lock is asked for; 2: both are locked; 3: waiting for TAKEN */
    uint64_t position;      /* where in the stream the value ended that was sent to the receiver */
    netchan_value value;    /* from the buffer, or granted by a remote sender */
    size_t size, memory;    /* its encoded bytes, and what it occupies here */
    uint64_t order;         /* its place in the buffer */
    uint64_t from;          /* the peer that sent it */
    netchan__incoming incoming;
    size_t announced;
    size_t shipping;        /* what it counts in its receiver's peer->shipping */
    size_t charge;          /* what it counts in its sender's peer->charged */
    uint64_t waited;        /* nanoseconds for which it was seen waiting for a remote party; 0: not seen yet */
};

enum netchan__frame_type {
    NETCHAN__HELLO = 0x01,
    NETCHAN__PING,
    NETCHAN__PONG,
    NETCHAN__BYE,
    NETCHAN__ACK,
    NETCHAN__RESUME,
    NETCHAN__RESUMED,
    NETCHAN__REFUSED,
    NETCHAN__OFFER = 0x10,
    NETCHAN__DEMAND,
    NETCHAN__WITHDRAW,
    NETCHAN__GRANT,
    NETCHAN__DECLINE,
    NETCHAN__TAKEN,
    NETCHAN__DATA,
    NETCHAN__CLOSE,
    NETCHAN__FRAGMENT_UP,
    NETCHAN__DROP,
    NETCHAN__IMPORT,
    NETCHAN__FORGET,
    NETCHAN__CLAIM = 0x20,
    NETCHAN__COMMIT,
    NETCHAN__RELEASE,
    NETCHAN__ACCEPT,
    NETCHAN__WITHDRAWN,
    NETCHAN__CREDIT,
    NETCHAN__CLOSED,
    NETCHAN__RETURN,
    NETCHAN__FRAGMENT_DOWN,
    NETCHAN__CLOSING,
    NETCHAN__GONE,
    NETCHAN__IMPORTED
};

/* OFFER and DEMAND */
enum {
    NETCHAN__MULTI = 1,
    NETCHAN__TRY = 2,
    NETCHAN__FIRM = 4,
    NETCHAN__HERE = 8,
    NETCHAN__RELAYED = 16,
    NETCHAN__AHEAD = 32
};
enum { NETCHAN__FINAL = 1, NETCHAN__REDELIVERED = 2, NETCHAN__UNHURRIED = 4 };     /* CLAIM and COMMIT */

/* One message of the commit protocol, as the wire section at the top describes it. */
typedef struct netchan__frame {
    unsigned type;
    uint64_t channel, entry, op, match, flags, number, size;
    size_t memory;          /* what an incoming value occupies */
    netchan_value value;    /* outgoing: borrowed; incoming: owned, the handler may take it */
    bool has_value;
    bool lends;             /* outgoing: the value stays until netchan__peer.keep */
    bool lazy;              /* outgoing: see netchan__mark_pending() */
    const uint8_t *bytes;   /* FRAGMENT */
    size_t count;
    uint8_t process[16];    /* with RELAYED */
} netchan__frame;

/* Another process, as channels see it: something that takes frames. Net. */
struct netchan__peer {
    /* Queues a frame and returns the position in the stream at which it ends (never 0). */
    uint64_t (*emit)(netchan__peer *p, const netchan__frame *f);
    /* The same for DATA, of which there are most; or NULL. */
    uint64_t (*emit_data)(netchan__peer *p, uint64_t channel, const netchan_value *v, size_t size);
    /* The value of this waiter, or for this one if it is shipped, goes: what is still to be sent of it is kept. */
    void (*keep)(netchan__peer *p, bool shipped, uint64_t entry);
    void (*owe)(netchan__peer *p); /* NULL, or: there is credit for it, to go with what else is sent */
    bool owes;
    uint64_t number;     /* netchan_peer.id */
    uint8_t process[16]; /* breaks ties between operations */
    uint64_t sent;       /* the position up to which the stream was given to a link: what is after it never left */
    bool down;           /* the link is broken; the session waits for the next */
    netchan__map waiters; /* at home: the waiters of this process, by id */
    size_t ahead, given_up; /* of these, those that are for values that come early; that were, and wait for an answer */
    size_t max_ops;       /* how many there may be */
    size_t max_message, max_memory; /* our limits */
    size_t their_message, their_memory; /* theirs */
    size_t shipping;      /* at home: bytes of large values that are on their way to it */
    size_t offered;       /* at home: bytes of values in its OFFERs that are not over */
    size_t offering;      /* at an end: in ours */
    size_t reserved;      /* bytes announced by fragments and not over */
    size_t charged;       /* what values may occupy that were asked for, until they are with a receiver */
    netchan__lane *lane;  /* at home: channel 0 */
    netchan *work;        /* at home: channel 1 */
    netchan__lane *direct; /* at home: values for this process and no other; NULL until there was one */
    netchan *send, *recv; /* at the dialling side: channels 0 and 1 */
    netchan__map exports;  /* our channels, or ends, of which it holds ends, by their numbers */
    netchan__map exported; /* the same by what they are ends of */
    netchan__map imports;  /* ends that it has given us, by its numbers */
    uint64_t last_export;
    size_t max_ends, their_ends; /* how many imports there may be; exports */
    size_t stored;        /* bytes of values that it sent and that are in buffers */
    bool waits;           /* one of its waiters waits for room: in a buffer, for a large value, for ends */
    bool no_redelivery;
    netchan__peer *next_peer, *prev_peer; /* in netchan__net.peers */
    bool leaving;         /* one side said farewell: nothing new begins with it */
    bool farewell;        /* it said farewell: what it has not accepted by then it never took */
    uint64_t taken, returned; /* values known to be taken by it; handed back, to be sent again */
    size_t handed_back;   /* at home: values that were in its lane and go back to it */
    size_t undelivered;   /* values for it alone that nobody took */
    uint64_t unknown;     /* values whose fate only the peer knew, counted when it is lost */
    netchan_stats *stats; /* of its link */
    uint64_t patience;    /* nanoseconds that it may take to answer a claim */
    const char *breach;   /* set: it broke the protocol, in these words, or cannot go on for lack of memory */
};

static pthread_mutex_t netchan__net_lock = PTHREAD_MUTEX_INITIALIZER;

/* Who runs the loop of [18]. */
enum netchan__runner { NETCHAN__NOBODY, NETCHAN__THREAD, NETCHAN__CALLER };

/* All fields belong to netchan__net_lock. */
static struct netchan__net_state {
    netchan__map waiters;  /* waiters of this process that are registered at ends, by id */
    netchan__map matches;  /* by id */
    uint64_t last_id;      /* of waiters and matches */
    netchan__op *released; /* operations that have just become open again */
    netchan__match *declined; /* matches that have just fallen through */
    netchan *dirty;        /* channels that may have something to pair */
    netchan__lane *changed; /* lanes of merges that may have something to pair */
    netchan__lane *urgent;  /* lanes for one peer only, likewise */
    netchan__map relays;    /* netchan__remote that wait at ends, by the match that their peer knows */
    netchan__map by_number; /* peers */
    netchan__peer *peers;
    uint64_t last_peer;
    uint64_t checked;      /* when claims were looked at last */
    struct netchan__session *pending; /* sessions that have something new to send */
    uint8_t process[16];   /* random: who we are */
    void (*on_drained)(netchan__lane *lane); /* a lane of a merge is closed and empty */
    bool at_once;          /* a select looks for what can be paired here and now */
    bool breached;         /* a session or a link is to be ended or replaced, or may be */
    /* Who does the I/O, see [18]. */
    int wake_fd;           /* a byte written here ends poll() */
    bool wake;             /* the loop is to go round, before the lock is given back */
    bool hurry;            /* among what is pending is more than values and credit */
    bool polling;          /* the loop is in poll(), and was not woken yet */
    bool pushing, held_up; /* a thread sends beside the loop; which waits for that */
    bool deferred;         /* what is pending was left to the loop */
    bool lent;             /* the I/O thread leaves the loop to callers */
    bool stands_by;        /* until it is told */
    bool finished;         /* the loop has ended an operation that slept */
    bool alive;            /* the I/O thread is there */
    enum netchan__runner runner;
    size_t sleepers;       /* operations and calls that wait for somebody else to run the loop */
    size_t watchers;       /* of these, calls that wait for a link to change */
    uint64_t runs;         /* of callers */
    pthread_cond_t turn;   /* for who waits to run the loop, or go on with it */
} netchan__net;

static uint64_t netchan__op_count; /* atomic */

static int netchan__state(const netchan__op *op) { return __atomic_load_n(&op->state, __ATOMIC_ACQUIRE); }

static bool netchan__change_state(netchan__op *op, int from, int to) {
    return __atomic_compare_exchange_n(&op->state, &from, to, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

static void netchan__set_state(netchan__op *op, int to) { __atomic_store_n(&op->state, to, __ATOMIC_RELEASE); }

static void netchan__enqueue(netchan__queue *q, netchan__waiter *w, bool at_front) {
    NETCHAN_ASSERT(!w->queue);
    w->queue = q;
    w->prev = at_front ? NULL : q->tail;
    w->next = at_front ? q->head : NULL;
    if (w->prev) w->prev->next = w;
    else q->head = w;
    if (w->next) w->next->prev = w;
    else q->tail = w;
}

static NETCHAN__OUT_OF_LINE void netchan__dequeue(netchan__waiter *w) {
    netchan__queue *q = w->queue;
    if (!q) return;
    if (w->prev) w->prev->next = w->next;
    else q->head = w->next;
    if (w->next) w->next->prev = w->prev;
    else q->tail = w->prev;
    w->prev = w->next = NULL;
    w->queue = NULL;
}

static netchan__queue *netchan__queue_of(netchan__waiter *w) {
    if (!w->is_send) return w->ahead ? &w->ch->ahead : &w->ch->receivers;
    return w->lane ? &w->lane->senders : &w->ch->lane.senders;
}

static void netchan__mark_dirty(netchan *ch) {
    if (ch->is_dirty) return;
    ch->is_dirty = true;
    ch->next_dirty = netchan__net.dirty;
    netchan__net.dirty = ch;
}

/* The loop looks at all links and sessions: one is to be ended or replaced, or may be. */
static void netchan__look(void) { netchan__net.breached = netchan__net.wake = true; }

/* The peer did what it may not, or memory for it is short: the I/O thread will end its session. what: the end of a
 * sentence about it. */
static NETCHAN__OUT_OF_LINE void netchan__breach(netchan__peer *p, const char *what) {
    if (!p->breach) p->breach = what;
    netchan__look();
}

static bool netchan__is_net(netchan *ch) { return __atomic_load_n(&ch->lock, __ATOMIC_ACQUIRE) == &netchan__net_lock; }

/* How many values are in the buffer. */
static size_t netchan__held(const netchan__lane *lane) { return lane->last - lane->first; }

static netchan__slot *netchan__slot_at(const netchan__lane *lane, size_t number) {
    return &lane->slots[number & (lane->room - 1)];
}

/* The slot of the value that leaves next. */
static netchan__slot *netchan__front(const netchan__lane *lane) { return netchan__slot_at(lane, lane->first); }

/* What the values in the buffer occupy, in bytes. */
static size_t netchan__lane_memory(const netchan__lane *lane) { return lane->came - lane->went; }

/* Grows the ring so that one more value fits. Returns false when out of memory. */
static bool netchan__lane_room(netchan__lane *lane) {
    size_t count = netchan__held(lane), room = lane->room ? lane->room * 2 : 8;
    if (count + lane->out + lane->reserved < lane->room) return true; /* a value that is out may come back */
    netchan__slot *slots = (netchan__slot *)netchan__alloc(room * sizeof *slots);
    if (!slots) return false;
    for (size_t i = 0; i < count; i++) slots[i] = *netchan__slot_at(lane, lane->first + i);
    NETCHAN_FREE(lane->slots);
    lane->slots = slots;
    lane->room = room;
    lane->seen_first = lane->seen_last = 0;
    __atomic_store_n(&lane->first, 0, __ATOMIC_RELAXED); /* netchan__about_held() may look */
    __atomic_store_n(&lane->last, count, __ATOMIC_RELAXED);
    return true;
}

static void netchan__lane_has_room(netchan__lane *lane);
static void netchan__lane_changed(netchan__lane *lane);

/* There is room for something of this peer again, or there. */
static void netchan__has_room(netchan__peer *p) {
    if (!p->waits) return;
    p->waits = false;
    for (size_t i = 0; i < p->waiters.cap; i++)
        if (p->waiters.slots[i].key) netchan__mark_dirty(((netchan__waiter *)p->waiters.slots[i].item)->ch);
    if (p->lane) netchan__lane_has_room(p->lane); /* nothing is handed back before it is accepted */
    if (p->direct) netchan__lane_has_room(p->direct);
}

/* Counts what a slot occupies, for the lane and for the peer that sent the value; a peer with a lane of its own is
 * bounded by that. */
static void netchan__occupy(netchan__lane *lane, const netchan__slot *slot, bool on) {
    if (on) lane->came += slot->memory;
    else lane->went += slot->memory;
    netchan__peer *p = NULL;
    if (slot->from && !lane->peer_number) p = (netchan__peer *)netchan__map_get(&netchan__net.by_number, slot->from);
    if (!p) return;
    p->stored += on ? slot->memory : 0 - slot->memory;
    if (!on) netchan__has_room(p);
}

/* There is room, see netchan__lane_room(). The value is moved. memory: the bytes it occupies. */
static void netchan__lane_push(netchan__lane *lane, netchan_value *v, size_t size, size_t memory, uint64_t from) {
    netchan__slot *slot = netchan__slot_at(lane, lane->last);
    slot->value = *v;
    slot->size = size;
    slot->memory = memory + sizeof *slot;
    slot->order = ++lane->entered;
    slot->from = from;
    slot->redelivered = false;
    netchan__occupy(lane, slot, true);
    __atomic_store_n(&lane->last, lane->last + 1, __ATOMIC_RELEASE);
    *v = netchan__nil_value;
}

static netchan__slot netchan__lane_pop(netchan__lane *lane) {
    netchan__slot slot = *netchan__front(lane);
    netchan__occupy(lane, &slot, false);
    __atomic_store_n(&lane->first, lane->first + 1, __ATOMIC_RELEASE);
    return slot;
}

/* A value that was out comes back to where it was; others that were out before it may be back already. */
static void netchan__lane_unpop(netchan__lane *lane, netchan__slot slot) {
    size_t at = lane->first - 1;
    __atomic_store_n(&lane->first, at, __ATOMIC_RELAXED);
    netchan__occupy(lane, &slot, true);
    for (; at + 1 != lane->last && netchan__slot_at(lane, at + 1)->order < slot.order; at++)
        *netchan__slot_at(lane, at) = *netchan__slot_at(lane, at + 1);
    *netchan__slot_at(lane, at) = slot;
}

static bool netchan__slot_free(const netchan__lane *lane) {
    return netchan__held(lane) + lane->out + lane->reserved + lane->lent < lane->cap;
}

/* Keeps the lane in the list of lanes that a receiver could take from; last in turn when it is added. */
static void netchan__update_ready(netchan__lane *lane) {
    netchan *ch = lane->ch;
    if (lane->is_direct) return;
    bool ready = lane->cap ? netchan__held(lane) > 0 && !lane->pinned : lane->senders.head != NULL && !lane->closing;
    if (ready == lane->is_ready) return;
    lane->is_ready = ready;
    if (ready) {
        lane->next_ready = NULL;
        lane->prev_ready = ch->last_ready;
        if (ch->last_ready) ch->last_ready->next_ready = lane;
        else ch->ready = lane;
        ch->last_ready = lane;
    } else {
        if (lane->prev_ready) lane->prev_ready->next_ready = lane->next_ready;
        else ch->ready = lane->next_ready;
        if (lane->next_ready) lane->next_ready->prev_ready = lane->prev_ready;
        else ch->last_ready = lane->prev_ready;
    }
}

static void netchan__next_turn(netchan__lane *lane) {
    if (!lane->is_ready || lane->ch->last_ready == lane) return;
    size_t pinned = lane->pinned, cap = lane->cap;
    lane->pinned = 1, lane->cap = 1; /* leave the list ... */
    netchan__update_ready(lane);
    lane->pinned = pinned, lane->cap = cap;
    netchan__update_ready(lane); /* ... and join it at its end */
}

static void netchan__withdraw_others(netchan__op *op, const netchan__waiter *w);
static void netchan__unregister(netchan__waiter *w);

static NETCHAN__THREAD_LOCAL netchan__op *netchan__to_wake;

/* The operation is over: case w happened, or none. Its outcome besides index and result was written before. Its thread
 * is woken by netchan__wake_finished(). */
static void netchan__finish(netchan__op *op, netchan__waiter *w, int result) {
    op->index = w ? (int)w->index : -1;
    op->result = result;
    netchan__set_state(op, NETCHAN__DONE);
    if (op->detached) {
        NETCHAN_ASSERT(w); /* its only case; its time is never up */
        w->ch->detached--;
        w->ch->undelivered += result != NETCHAN_OK && result != NETCHAN_EUNKNOWN;
    }
    if (op->net) {
        netchan__net.wake |= op->runs;
        netchan__net.finished |= op->sleeps;
        netchan__net.sleepers -= op->sleeps;
        op->sleeps = false;
        netchan__withdraw_others(op, w);
        if (w) netchan__dequeue(w);
        if (w && w->lane) netchan__update_ready(w->lane);
        if (w) w->lane = NULL; /* it may go before the call has left */
        if (w) netchan__unregister(w);
    }
    op->next_to_wake = netchan__to_wake;
    netchan__to_wake = op;
}

/* Wakes the threads of the operations that this thread has finished. Caller has given back all locks: who wakes may
 * free the channel. */
static void netchan__wake_finished(void) {
    while (netchan__to_wake) {
        netchan__op *op = netchan__to_wake;
        netchan__to_wake = op->next_to_wake;
        if (op->detached) {
            netchan_clear(&op->waiters->value);
            NETCHAN_FREE(op);
            continue;
        }
        if (__atomic_exchange_n(&op->wake, NETCHAN__FINISHED, __ATOMIC_ACQ_REL) != NETCHAN__ASLEEP) continue;
        pthread_mutex_lock(&op->mutex);
        op->told = true;
        pthread_cond_signal(&op->cond);
        pthread_mutex_unlock(&op->mutex); /* it is gone now */
    }
}

/* A local receive gets the value. */
static void netchan__finish_receive(netchan__waiter *r, netchan_value *v, uint64_t peer, bool redelivered) {
    r->op->value = *v;
    r->op->peer = peer;
    r->op->redelivered = redelivered;
    *v = netchan__nil_value;
    if (r->ch->on_taken) r->ch->on_taken(r->ch, &r->op->value);
    netchan__finish(r->op, r, NETCHAN_OK);
}

/* Frees the waiter of a remote operation. */
static void netchan__forget(netchan__waiter *w) {
    netchan__dequeue(w);
    if (w->lane) netchan__update_ready(w->lane);
    if (w->peer) {
        netchan__map_remove(&w->peer->waiters, w->id);
        *(w->withdrawn ? &w->peer->given_up : &w->peer->ahead) -= w->ahead;
        if (w->here) w->peer->offered -= w->size;
    }
    netchan_clear(&w->value);
    if (w->held) netchan_free(w->ch);
    NETCHAN_FREE(w);
}

static netchan__frame netchan__new_frame(unsigned type) {
    netchan__frame f;
    memset(&f, 0, sizeof f);
    f.type = type;
    return f;
}

/* A frame of numbers only. Those that its type does not have are 0. */
static void netchan__emit_ids(netchan__peer *p, unsigned type, uint64_t channel, uint64_t entry, uint64_t match,
                              uint64_t number, uint64_t size) {
    netchan__frame f = netchan__new_frame(type);
    f.channel = channel;
    f.entry = entry;
    f.match = match;
    f.number = number;
    f.size = size;
    p->emit(p, &f);
}

static void netchan__emit_entry(netchan__waiter *w, unsigned type, uint64_t match, uint64_t number) {
    NETCHAN_ASSERT(w->peer);
    netchan__emit_ids(w->peer, type, 0, w->id, match, number, 0);
}

/* ====================================================================================================================
 * [7] Ends: channels that other processes use. Net.
 *
 * Whoever puts a channel into a value for another process exports it to that peer: one direction of it, under a number.
 * The other side imports an end, or has it already.
 *
 * Invariants.
 *   E1  An export holds its channel as long as the peer may have an end, or a value with one on its way: it counts how
 *       often it was named, and the DROP of an end says how often that was named.
 *   E2  An end is found by its number until it is buried, so a peer has one of each at most.
 * ================================================================================================================== */

struct netchan__export {
    netchan__export *prev, *next; /* of ch */
    netchan__peer *peer;
    netchan *ch;                  /* counted */
    uint64_t id, key;             /* in peer->exports and exported */
    uint64_t named;               /* how often, less what was dropped */
    bool receives;                /* its ends may receive; else send */
    bool by_name;                 /* it was imported by name: whoever imports next is as good */
    bool revoked;                 /* that name is gone */
};

/* The first byte of an end's name; NETCHAN__END_RECEIVER is 1. Then its number and its capacity, 8 bytes each. */
enum { NETCHAN__YOURS = 2, NETCHAN__FAR = 4, NETCHAN__IS_CLOSING = 8, NETCHAN__IS_CLOSED = 16, NETCHAN__IS_GONE = 32 };
enum { NETCHAN__FIRST_EXPORT = 2 }; /* 0 and 1 are the channels of the link */

static void netchan__lock_own(netchan *ch) {
    pthread_mutex_lock(&ch->own.receiving);
    pthread_mutex_lock(&ch->own.sending);
    netchan__update_ready(&ch->lane); /* I5 */
}

static void netchan__unlock_own(netchan *ch) {
    if (!ch->lane.cap) { /* I6 */
        bool busy = netchan__is_net(ch) || ch->closing || ch->receivers.head || ch->lane.senders.head;
        int *state = &ch->own.place.state, had = __atomic_load_n(state, __ATOMIC_RELAXED) & NETCHAN__BUSY;
        if (had != busy * NETCHAN__BUSY) __atomic_xor_fetch(state, NETCHAN__BUSY, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&ch->own.sending);
    pthread_mutex_unlock(&ch->own.receiving);
}

/* Puts a channel under netchan__net_lock, with all channels of all operations that wait on it. Caller holds
 * netchan__net_lock. */
static void netchan__adopt(netchan *ch) {
    if (netchan__is_net(ch)) return;
    netchan__lock_own(ch); /* who is inside leaves first */
    __atomic_store_n(&ch->lock, &netchan__net_lock, __ATOMIC_RELEASE);
    netchan__unlock_own(ch);
    netchan__queue *queues[2] = {&ch->lane.senders, &ch->receivers};
    for (int q = 0; q < 2; q++) {
        for (netchan__waiter *w = queues[q]->head; w; w = w->next) {
            for (size_t i = 0; i < w->op->count; i++)
                if (w->op->waiters[i].ch) netchan__adopt(w->op->waiters[i].ch);
            w->op->net = true;
        }
    }
}

static void netchan__share(netchan *ch) { __atomic_store_n(&ch->shared, true, __ATOMIC_RELAXED); }

/* The export of this direction of ch, which is made if there is none. name: the name it is imported by, or NULL.
 * Returns NULL when out of memory. */
static netchan__export *netchan__export_to(netchan__peer *p, netchan *ch, bool receives, const void *name) {
    uint64_t key = (uint64_t)(uintptr_t)(name ? name : ch) | receives; /* what malloc gives is even */
    netchan__export *x = (netchan__export *)netchan__map_get(&p->exported, key);
    if (x) return x;
    x = (netchan__export *)netchan__alloc(sizeof *x);
    uint64_t id = NETCHAN__FIRST_EXPORT + p->last_export++;
    if (!x || !netchan__map_put(&p->exports, id, x) || !netchan__map_put(&p->exported, key, x)) {
        netchan__map_remove(&p->exports, id);
        NETCHAN_FREE(x);
        return NULL;
    }
    netchan__adopt(ch);
    netchan__share(ch);
    x->peer = p;
    x->ch = netchan_retain(ch);
    x->id = id;
    x->key = key;
    x->receives = receives;
    x->by_name = name != NULL;
    NETCHAN__LINK(ch->exports, x, prev, next);
    if (name) return x;
    *(receives ? &ch->receiver_ends : &ch->sender_ends) += 1;
    *(receives ? &ch->receivers_lost : &ch->senders_lost) = false;
    return x;
}

/* Who had it was lost. Nobody waits for the peers of a link, or for who imports a name, in particular. */
static void netchan__note_loss(netchan__export *x) {
    if (!x->by_name && !x->ch->plain) *(x->receives ? &x->ch->receivers_lost : &x->ch->senders_lost) = true;
}

/* The peer has no end of it any more. lost: it did not let go of it. */
static void netchan__drop_export(netchan__export *x, bool lost) {
    netchan *ch = x->ch;
    netchan__map_remove(&x->peer->exports, x->id);
    if (!x->revoked) netchan__map_remove(&x->peer->exported, x->key);
    NETCHAN__UNLINK(ch->exports, x, prev, next);
    if (!x->by_name) *(x->receives ? &ch->receiver_ends : &ch->sender_ends) -= 1;
    if (lost) netchan__note_loss(x);
    netchan__mark_dirty(ch);
    netchan__has_room(x->peer);
    netchan_free(ch);
    NETCHAN_FREE(x);
}

static void netchan__mark_exports(netchan__peer *p) {
    for (size_t i = 0; i < p->exports.cap; i++)
        if (p->exports.slots[i].key) netchan__mark_dirty(((netchan__export *)p->exports.slots[i].item)->ch);
}

/* Tells all processes that hold an end of the channel, senders or receivers. */
static void netchan__tell_ends(const netchan *ch, bool senders, unsigned type) {
    for (netchan__export *x = ch->exports; x; x = x->next)
        if (x->receives != senders) netchan__emit_ids(x->peer, type, x->id, 0, 0, 0, 0);
}

static void netchan__write_end(uint8_t *out, unsigned kind, uint64_t id, uint64_t cap) {
    out[0] = (uint8_t)kind;
    netchan__store(out + 1, id, 8);
    netchan__store(out + 9, cap, 8);
}

static unsigned netchan__flag(bool on, unsigned flag) { return on ? flag : 0; }

/* Names an export once more. */
static void netchan__name_export(netchan__export *x, uint8_t *out) {
    const netchan *ch = x->ch;
    x->named++;
    netchan__write_end(out,
                       netchan__flag(x->receives, NETCHAN__END_RECEIVER) | netchan__flag(ch->is_end, NETCHAN__FAR) |
                           netchan__flag(ch->closing, NETCHAN__IS_CLOSING) |
                           netchan__flag(ch->closed, NETCHAN__IS_CLOSED) | netchan__flag(ch->gone, NETCHAN__IS_GONE),
                       x->id, ch->lane.cap);
}

/* How one peer names ends. */
typedef struct netchan__names {
    netchan__ends ends; /* first */
    netchan__peer *peer;
} netchan__names;

/* Did this peer give us this end? */
static bool netchan__is_theirs(const netchan__peer *p, const netchan *ch) {
    return ch->is_end && ch->home == p && ch->channel >= NETCHAN__FIRST_EXPORT;
}

/* netchan__ends.name; netchan__export_all() came before. */
static void netchan__name_end(netchan__ends *e, const netchan_value *v, uint8_t *out) {
    netchan__peer *p = ((netchan__names *)(void *)e)->peer;
    bool receives = v->type == NETCHAN_RECEIVER;
    if (netchan__is_theirs(p, v->as.chan))
        netchan__write_end(out, NETCHAN__YOURS | receives, v->as.chan->channel, 0);
    else netchan__name_export(netchan__export_to(p, v->as.chan, receives, NULL), out);
}

static netchan *netchan__make_import(netchan__peer *p, unsigned kind, uint64_t id, uint64_t cap) {
    bool known = id >= NETCHAN__FIRST_EXPORT && p->imports.count / 2 < p->max_ends && cap <= SIZE_MAX / 4;
    netchan *ch = known ? netchan_make((size_t)cap) : NULL;
    if (!known || !ch || !netchan__map_put(&p->imports, id, ch)) {
        netchan__breach(p, known ? "out of memory for a channel it sent"
                                 : "it sent far more channel ends than max_ends");
        NETCHAN_FREE(ch);
        return NULL;
    }
    ch->lock = &netchan__net_lock;
    ch->is_end = ch->shared = true;
    ch->may_receive = kind & NETCHAN__END_RECEIVER;
    ch->may_send = !ch->may_receive;
    ch->home = p;
    ch->channel = id;
    ch->far = kind & NETCHAN__FAR;
    ch->closing = ch->lane.closing = ch->close_sent = kind & NETCHAN__IS_CLOSING;
    ch->closed = kind & NETCHAN__IS_CLOSED;
    ch->gone = kind & NETCHAN__IS_GONE;
    return ch;
}

static void netchan__retain_end(netchan *ch);

/* netchan__ends.find */
static netchan *netchan__find_end(netchan__ends *e, const uint8_t *name) {
    netchan__peer *p = ((netchan__names *)(void *)e)->peer;
    uint64_t id = netchan__load(name + 1, 8), cap = netchan__load(name + 9, 8);
    bool receives = name[0] & NETCHAN__END_RECEIVER;
    if (name[0] & NETCHAN__YOURS) {
        netchan__export *x = (netchan__export *)netchan__map_get(&p->exports, id);
        if (x && x->receives == receives) return netchan_retain(x->ch);
        netchan__breach(p, "it sent a channel end that it does not have");
        return NULL;
    }
    netchan *ch = (netchan *)netchan__map_get(&p->imports, id);
    if (ch && ch->may_receive != receives) {
        netchan__breach(p, "it turned a channel end round");
        return NULL;
    }
    if (ch) netchan__retain_end(ch);
    else ch = netchan__make_import(p, name[0], id, cap);
    if (ch) ch->named++;
    return ch;
}

static netchan__names netchan__names_of(netchan__peer *p) {
    netchan__names n = {{netchan__name_end, netchan__find_end, false}, p};
    return n;
}

static bool netchan__has_ends(const netchan_value *v) {
    return (v->flags & (NETCHAN__HAS_CHANNELS | NETCHAN__CARRIES)) != 0;
}

/* Exports all channels in the value. Returns false when out of memory. */
static bool netchan__export_all(netchan__peer *p, const netchan_value *v) {
    netchan_entry e;
    if (netchan__is_chan(v))
        return netchan__is_theirs(p, v->as.chan) ||
               netchan__export_to(p, v->as.chan, v->type == NETCHAN_RECEIVER, NULL);
    for (size_t i = 0; netchan__has_children(v) && netchan__child(v, i, &e); i++)
        if (!netchan__export_all(p, &e.value)) return false;
    return true;
}

/* Writes a value for this peer so that it ends before `end`. Returns false when out of memory. */
static bool netchan__write_for(netchan__peer *p, uint8_t *end, const netchan_value *v) {
    netchan__names n = netchan__names_of(p);
    if (netchan__has_ends(v) && !netchan__export_all(p, v)) return false;
    netchan__write_value(end, v, &n.ends);
    return true;
}

/* The value must have the size with which it is passed on. */
static int netchan__scan_shortest(const void *data, size_t size, netchan__head *h, netchan__measure *m) {
    int result = netchan__scan(data, size, h, m);
    if (result != NETCHAN_OK || m->wire == size) return result;
    return netchan__fail(NETCHAN_EPROTO, "the value is not encoded in the shortest form");
}

/* Decodes a value of this peer. Returns as netchan_decode(); a breach may have been found. */
static int netchan__decode_from(netchan__peer *p, netchan_value *v, const void *data, size_t size, size_t max_block,
                                size_t *memory) {
    netchan__names n = netchan__names_of(p);
    netchan__head h;
    netchan__measure m;
    int result = netchan__scan_shortest(data, size, &h, &m);
    *memory = m.block;
    if (result == NETCHAN_OK) result = netchan__check_block(size, m.block, max_block);
    return result == NETCHAN_OK ? netchan__build(v, &h, &m, &n.ends) : result;
}

/* A value that may become much larger in memory than on the wire stays in its bytes while it lies in a buffer: what is
 * lent to a peer can then be filled by it without more memory than it has bytes. Its ends are there already. It is a
 * value of type NETCHAN__RAW that owns a block, which begins so; the ends and the bytes follow. */
enum { NETCHAN__RAW_GAIN = 64 };

typedef struct netchan__raw {
    netchan__ends ends; /* first: hands out the ends one by one */
    netchan__measure measure;
    size_t size, count, next;
    netchan **list;
} netchan__raw;

/* netchan__ends.find */
static netchan *netchan__next_raw_end(netchan__ends *e, const uint8_t *name) {
    netchan__raw *raw = (netchan__raw *)(void *)e;
    (void)name;
    return raw->list[raw->next++];
}

static void netchan__find_raw_ends(netchan__raw *raw, netchan__reader *r, netchan__ends *ends) {
    netchan__head h;
    netchan__read_head(r, &h);
    if (netchan__is_chan(&h.v) && !ends->failed) {
        netchan *ch = ends->find(ends, h.body.p);
        ends->failed = !ch;
        if (ch) raw->list[raw->count++] = ch;
    }
    for (size_t i = 0; netchan__has_children(&h.v) && i < h.v.as.block.count; i++) {
        if (h.v.type == NETCHAN_MAP) netchan__read_bytes(&h.body, netchan__read_varint(&h.body));
        netchan__find_raw_ends(raw, &h.body, ends);
    }
}

/* As netchan__decode_from(), for a value that goes into a buffer. */
static int netchan__receive_into_buffer(netchan__peer *p, netchan_value *v, const void *data, size_t size,
                                        size_t *memory) {
    netchan__names n = netchan__names_of(p);
    netchan__head h;
    netchan__measure m;
    int result = netchan__scan_shortest(data, size, &h, &m);
    *memory = m.block;
    if (result != NETCHAN_OK) return result;
    if (m.block <= size + NETCHAN__RAW_GAIN) return netchan__build(v, &h, &m, &n.ends);
    size_t most = m.channels ? size / (2 + NETCHAN__END_SIZE) : 0;
    size_t head = sizeof(netchan__raw) + most * sizeof(netchan *);
    netchan__raw *raw = (netchan__raw *)NETCHAN_MALLOC(head + size);
    if (!raw) return netchan__fail_memory("receiving a value");
    memset(raw, 0, sizeof *raw);
    raw->ends.find = netchan__next_raw_end;
    raw->measure = m;
    raw->size = size;
    raw->list = (netchan **)(void *)(raw + 1);
    memcpy((uint8_t *)raw + head, data, size);
    *v = netchan__make_block(NETCHAN_BYTES, raw, head);
    v->type = NETCHAN__RAW;
    v->flags = NETCHAN__OWNED | (m.channels ? NETCHAN__HAS_CHANNELS : 0);
    *memory = head + size;
    netchan__reader r = {(const uint8_t *)data, (const uint8_t *)data + size, false};
    if (m.channels) netchan__find_raw_ends(raw, &r, &n.ends);
    if (!n.ends.failed) return NETCHAN_OK;
    netchan_clear(v);
    return netchan__fail(NETCHAN_EPROTO, "these %zu bytes name a channel that cannot be had", size);
}

static void netchan__free_raw_ends(const netchan_value *v) {
    const netchan__raw *raw = (const netchan__raw *)v->as.block.data;
    for (size_t i = 0; i < raw->count; i++) netchan_free(raw->list[i]);
}

/* Decodes the value of a slot, if that was not done yet. Returns OK or ENOMEM; nothing has changed then. */
static int netchan__ripen(netchan__lane *lane, netchan__slot *slot) {
    if (slot->value.type != NETCHAN__RAW) return NETCHAN_OK;
    netchan__raw *raw = (netchan__raw *)(uintptr_t)slot->value.as.block.data;
    const uint8_t *data = (const uint8_t *)raw + slot->value.as.block.count;
    netchan__reader r = {data, data + raw->size, false};
    netchan__head h;
    netchan_value v;
    netchan__read_head(&r, &h);
    int result = netchan__build(&v, &h, &raw->measure, raw->measure.channels ? &raw->ends : NULL);
    if (result != NETCHAN_OK) return result;
    netchan__occupy(lane, slot, false);
    slot->value = v;
    slot->memory = raw->measure.block + sizeof *slot;
    netchan__occupy(lane, slot, true);
    NETCHAN_FREE(raw);
    return NETCHAN_OK;
}

static size_t netchan__count_ends(const netchan_value *v) {
    if (v->type == NETCHAN__RAW) return ((const netchan__raw *)v->as.block.data)->count;
    size_t count = netchan__is_chan(v);
    netchan_entry e;
    for (size_t i = 0; netchan__has_children(v) && netchan__child(v, i, &e); i++)
        count += netchan__count_ends(&e.value);
    return count;
}

/* Does the value hold more ends than the peer takes now? */
static bool netchan__too_many_ends(netchan__peer *p, const netchan_value *v) {
    if (!netchan__has_ends(v) || netchan__count_ends(v) + p->exports.count <= p->their_ends) return false;
    p->waits = true;
    return true;
}

/* ====================================================================================================================
 * [8] Pairs: who waits is brought together with who waits, or with a buffer (I2); channels close, and peers are lost.
 * ================================================================================================================== */

/* Tells a sender how its send ended, and forgets it if it is remote. taker: who has the value. */
static void netchan__finish_sender(netchan__waiter *s, int result, uint64_t taker) {
    if (s->op) {
        s->op->peer = taker;
        netchan__finish(s->op, s, result);
        return;
    }
    if (!s->lost) {
        s->peer->stats->values_received += result == NETCHAN_OK;
        netchan__emit_entry(s, NETCHAN__ACCEPT, 0, (uint64_t)-result);
    }
    netchan__forget(s);
}

/* The process that a waiting sender belongs to. */
static uint64_t netchan__sender_number(const netchan__waiter *s) { return s->op ? 0 : s->peer_number; }

/* How many slots the peer of the lane should have on loan: what is lent and what came must fit into half of max_memory.
 */
static size_t netchan__lendable(const netchan__lane *lane) {
    const netchan__peer *p = lane->peer;
    size_t used = netchan__held(lane) + lane->out + lane->reserved, memory = netchan__lane_memory(lane);
    size_t free_slots = used < lane->cap ? lane->cap - used : 0;
    size_t worst = (size_t)2 * NETCHAN__FRAGMENT; /* see netchan__raw */
    size_t room = memory < p->max_memory / 2 ? (p->max_memory / 2 - memory) / worst : 0;
    size_t target = room ? room : used == 0; /* one at least, or nothing would ever come */
    if (target > free_slots) target = free_slots;
    return target > lane->lent ? target : lane->lent;
}

static bool netchan__lends(const netchan__lane *lane) {
    return lane->peer && !lane->peer->leaving && !lane->closing && lane->cap && !lane->senders.head;
}

static void netchan__lend_now(netchan__lane *lane) {
    lane->peer->owes = false;
    if (!netchan__lends(lane)) return;
    size_t target = netchan__lendable(lane);
    if (target == lane->lent && !lane->left) return;
    netchan__emit_ids(lane->peer, NETCHAN__CREDIT, 0, 0, 0, target - lane->lent, lane->left);
    lane->lent = target;
    lane->left = 0;
}

/* Lends free slots to the peer of the lane, in batches; when it has none left less is enough, but that may wait a
 * little for more. */
static void netchan__lend(netchan__lane *lane) {
    netchan__peer *p = lane->peer;
    if (!netchan__lends(lane)) return;
    size_t most = p->max_memory / 4 / NETCHAN__FRAGMENT + 1, batch = (lane->cap < most ? lane->cap : most) / 4;
    if (lane->lent && lane->left < batch) return;
    size_t more = netchan__lendable(lane) - lane->lent;
    if ((more && more >= batch) || lane->left > batch || (more && !lane->lent && !p->owe)) netchan__lend_now(lane);
    else if (more && !lane->lent && !p->owes) {
        p->owes = true;
        p->owe(p);
    }
}

/* Tells the peer of the lane how many of its values have left the buffer. */
static void netchan__tell_left(netchan__lane *lane) {
    if (lane->peer && lane->left) netchan__emit_ids(lane->peer, NETCHAN__CREDIT, 0, 0, 0, 0, lane->left);
    lane->left = 0;
}

/* Gives the values in the buffer back to the process that sent them, after it was told how many have left it. Who has
 * said farewell takes nothing; and what is out may come back, and goes first. */
static void netchan__hand_back(netchan__lane *lane) {
    netchan__peer *p = lane->peer;
    if (!p || p->farewell || lane->out) return;
    netchan__tell_left(lane);
    while (netchan__held(lane)) {
        bool ripe = netchan__ripen(lane, netchan__front(lane)) == NETCHAN_OK;
        netchan__slot slot = netchan__lane_pop(lane);
        uint8_t *bytes = ripe ? (uint8_t *)NETCHAN_MALLOC(slot.size) : NULL;
        bool written = bytes && netchan__write_for(p, bytes + slot.size, &slot.value);
        if (!written) netchan__breach(p, "out of memory for a value that goes back to it");
        for (size_t done = 0; written && done < slot.size;) {
            netchan__frame f = netchan__new_frame(NETCHAN__RETURN);
            f.size = slot.size;
            f.count = slot.size - done < NETCHAN__FRAGMENT ? slot.size - done : (size_t)NETCHAN__FRAGMENT;
            f.bytes = bytes + done;
            p->emit(p, &f);
            done += f.count;
        }
        NETCHAN_FREE(bytes);
        netchan_clear(&slot.value);
        p->handed_back++;
    }
}

/* There may be room: who waits may come in, the peer may send more. */
static void netchan__lane_has_room(netchan__lane *lane) {
    netchan__lend(lane);
    netchan__update_ready(lane);
    if (!netchan__is_net(lane->ch)) return;
    netchan__mark_dirty(lane->ch);
    if ((!lane->ch->is_merge && !lane->is_direct) || lane->is_changed) return;
    netchan__lane **list = lane->is_direct ? &netchan__net.urgent : &netchan__net.changed;
    lane->is_changed = true;
    lane->next_changed = *list;
    *list = lane;
}

/* Something entered or left the lane's buffer or its queue. */
static void netchan__lane_changed(netchan__lane *lane) {
    if (lane->returning) netchan__hand_back(lane);
    netchan__lane_has_room(lane);
}

/* Can this party be locked here and now? NULL stands for the buffer. */
static bool netchan__lockable(const netchan__waiter *w) {
    return !w || (w->op ? netchan__state(w->op) == NETCHAN__OPEN : w->is_send && w->here);
}

/* Both parties can be locked here and now: the value passes at once. Outside net the other operation may go elsewhere
 * meanwhile: then its waiter leaves the queue and all else stays. At most one of the two is not that of the calling
 * thread. */
static void netchan__pass(netchan__lane *lane, netchan__waiter *s, netchan__waiter *r) {
    if (s && s->op && !netchan__change_state(s->op, NETCHAN__OPEN, NETCHAN__ENGAGED)) {
        netchan__dequeue(s);
        netchan__update_ready(lane);
        return;
    }
    if (r && !netchan__change_state(r->op, NETCHAN__OPEN, NETCHAN__ENGAGED)) {
        if (s && s->op) netchan__set_state(s->op, NETCHAN__OPEN);
        netchan__dequeue(r);
        return;
    }
    netchan__slot slot = {netchan__nil_value, 0, 0, 0, 0, false};
    if (s) {
        netchan__dequeue(s);
        slot.value = s->value;
        slot.size = s->size;
        slot.memory = s->memory;
        slot.from = netchan__sender_number(s);
        s->value = netchan__nil_value;
    } else {
        slot = netchan__lane_pop(lane);
        lane->left++;
    }
    if (r) {
        netchan__dequeue(r);
        netchan__finish_receive(r, &slot.value, slot.from, slot.redelivered);
    } else netchan__lane_push(lane, &slot.value, slot.size, slot.memory, slot.from);
    if (s) netchan__finish_sender(s, NETCHAN_OK, 0);
    netchan__lane_changed(lane);
}

static const uint8_t *netchan__process_of(const netchan__waiter *w) {
    return w->op ? netchan__net.process : ((const netchan__remote *)(const void *)w)->process;
}

/* Also when one of them came back to its own process over a link. */
static bool netchan__same_op(const netchan__waiter *a, const netchan__waiter *b) {
    if (a->op && b->op) return a->op == b->op;
    return a->op_id == b->op_id &&
           memcmp(netchan__process_of(a), netchan__process_of(b), sizeof netchan__net.process) == 0;
}

/* Operations that were finished outside net are met in the queues until their thread has left these. */
static bool netchan__is_stale(const netchan__waiter *w) {
    if (!w->op) return false;
    int state = netchan__state(w->op);
    return state >= NETCHAN__COMMITTED || (state == NETCHAN__ENGAGED && !w->op->net);
}

static void netchan__begin_match(netchan__lane *lane, netchan__waiter *s, netchan__waiter *r);

/* Locks here, or by negotiation. */
static void netchan__bring_together(netchan__lane *lane, netchan__waiter *s, netchan__waiter *r) {
    bool at_once = !netchan__is_net(lane->ch) || (netchan__lockable(s) && netchan__lockable(r));
    if (at_once) netchan__pass(lane, s, r);
    else netchan__begin_match(lane, s, r);
}

/* What an encoded value of this size may occupy, at most. */
static size_t netchan__swollen(const netchan__peer *p, size_t size) {
    return size < p->max_memory / NETCHAN__SWELL ? size * NETCHAN__SWELL : p->max_memory;
}

/* May this sender be asked for its value? Not while its link is down; and its peer's other large values may have to be
 * taken first. */
static bool netchan__can_ask(const netchan__waiter *s) {
    if (s->op || s->here) return true;
    if (s->peer->down) return false;
    size_t most = s->peer->max_memory / 2, charged = s->peer->charged, stored = netchan__lane_memory(s->lane);
    bool fits = charged ? charged + stored + netchan__swollen(s->peer, s->size) <= most
                        : !stored || stored + s->size <= most; /* one at a time may swell beyond */
    s->peer->waits |= !fits;
    return fits;
}

/* May this sender's value enter the buffer? What a peer has in buffers is bounded. */
static bool netchan__may_store(netchan__waiter *s) {
    netchan__peer *p = s->op || s->lane->peer_number ? NULL : s->peer;
    size_t size = s->size > NETCHAN__FRAGMENT ? s->size : s->size * NETCHAN__SWELL; /* as netchan__can_ask() does */
    if (!p || !p->stored || p->stored + size <= p->max_memory / 2) return true;
    p->waits = true;
    return false;
}

/* Does whoever looks for pairs now want this one? */
static bool netchan__may_pair(netchan *ch, const netchan__waiter *s, const netchan__waiter *r) {
    return !netchan__is_net(ch) || !netchan__net.at_once || (netchan__lockable(s) && netchan__lockable(r));
}

/* Moves waiting senders into free slots. Each step may take any waiter out of the queue, so each begins anew. Returns
 * whether it did. */
static bool netchan__fill(netchan__lane *lane) {
    bool moved = false;
    for (; netchan__slot_free(lane) && !lane->closing; moved = true) {
        netchan__waiter *s = lane->senders.head;
        while (s && !(netchan__can_ask(s) && netchan__may_store(s) && netchan__may_pair(lane->ch, s, NULL)))
            s = s->next;
        if (!s) break;
        if (netchan__is_stale(s)) netchan__dequeue(s);
        else if (netchan__lane_room(lane)) netchan__bring_together(lane, s, NULL);
        else {
            netchan__dequeue(s);
            if (!s->op && !s->here) netchan__breach(s->peer, "out of memory for one of its operations");
            else if (!s->op || netchan__change_state(s->op, NETCHAN__OPEN, NETCHAN__ENGAGED))
                netchan__finish_sender(s, NETCHAN_ENOMEM, 0);
        }
    }
    netchan__update_ready(lane);
    return moved;
}

/* How many bytes of large values may be on their way to a peer: half of what it wants to hold, and of what we do. */
static size_t netchan__ship_limit(const netchan__peer *p) {
    return (p->their_memory < p->max_memory ? p->their_memory : p->max_memory) / 2;
}

/* Does this receiver's process not take this value, of this size, or not now? */
static bool netchan__is_too_big(const netchan__waiter *r, const netchan_value *v, size_t size) {
    if (r->op) return false;
    netchan__peer *p = r->peer;
    if (netchan__too_many_ends(p, v)) return true;
    if (size > p->their_message || size > ((const netchan__remote *)(const void *)r)->most) return true;
    bool full = size > NETCHAN__FRAGMENT && p->shipping && p->shipping + size > netchan__ship_limit(p);
    p->waits |= full;
    return full;
}

/* Is this value too big for every process that could receive it from the lane? While there is none, nobody knows. */
static bool netchan__fits_nobody(const netchan *ch, const netchan__lane *lane, const netchan_value *v, size_t size) {
    bool nobody = false;
    for (const netchan__peer *p = ch->plain ? netchan__net.peers : NULL; p; p = p->next_peer) {
        if (lane && lane->is_direct ? p != lane->only : p->work != ch) continue;
        if (size <= p->their_message && (!netchan__has_ends(v) || netchan__count_ends(v) <= p->their_ends))
            return false;
        nobody = true;
    }
    return nobody;
}

/* There is no memory for what a receiver would get. Returns whether it is over. */
static bool netchan__starve(netchan__waiter *r) {
    if (!r->op) netchan__breach(r->peer, "out of memory for a value that it waits for");
    if (!r->op || !netchan__change_state(r->op, NETCHAN__OPEN, NETCHAN__ENGAGED)) return false;
    netchan__dequeue(r);
    netchan__finish(r->op, r, NETCHAN_ENOMEM);
    return true;
}

/* May the next value go to a peer before that receives it? One with ends has to be named anew when it comes back. */
static bool netchan__goes_early(const netchan__lane *lane) {
    if (!lane->cap || !netchan__held(lane)) return false;
    const netchan__slot *slot = netchan__front(lane);
    return slot->size <= NETCHAN__EARLY_SIZE && !netchan__has_ends(&slot->value);
}

/* Brings a receiver that waits together with what the lane has. Returns whether something happened. */
static bool netchan__serve_one(netchan__lane *lane, netchan__waiter *r) {
    netchan *ch = lane->ch;
    if (r->ahead && !netchan__goes_early(lane)) return false;
    if (netchan__is_stale(r)) netchan__dequeue(r);
    if (!r->queue || (!r->op && r->peer->down)) return false; /* others may wait, or come */
    netchan__waiter *s = lane->cap ? NULL : lane->senders.head;
    for (; s; s = s->next) {
        if (netchan__is_stale(s) || netchan__same_op(s, r) || !netchan__can_ask(s)) continue;
        if (!netchan__is_too_big(r, &s->value, s->size)) break;
        if (!netchan__fits_nobody(ch, s->lane, &s->value, s->size) ||
            (s->op && !netchan__change_state(s->op, NETCHAN__OPEN, NETCHAN__ENGAGED)))
            continue;
        netchan__dequeue(s);
        netchan__finish_sender(s, NETCHAN_ETOOBIG, 0);
        netchan__update_ready(lane);
        return true;
    }
    netchan__slot *slot = lane->cap ? netchan__front(lane) : NULL;
    if (slot ? netchan__is_too_big(r, &slot->value, slot->size) : !s) return false;
    if (!netchan__may_pair(lane->ch, s, r)) return false;
    if (slot && netchan__ripen(lane, slot) != NETCHAN_OK) return netchan__starve(r);
    netchan__next_turn(lane);
    netchan__bring_together(lane, s, r);
    return true;
}

/* Brings one of those in the queue together with what a lane has. Returns false when there is no such pair. */
static bool netchan__serve_queue(const netchan__queue *q, netchan__lane *lane) {
    netchan__waiter *next;
    for (netchan__waiter *r = q->head; r; r = next) {
        next = r->next;
        if (netchan__serve_one(lane, r)) return true;
    }
    return false;
}

/* Brings one receiver together with what a lane has; if there is none, a value goes where one may come. Returns false
 * when there is no such pair. */
static bool netchan__serve(netchan *ch) {
    netchan__lane *next;
    for (netchan__lane *lane = ch->ready; lane && (ch->receivers.head || ch->ahead.head); lane = next) {
        next = lane->next_ready;
        if (netchan__serve_queue(&ch->receivers, lane)) return true;
        if (netchan__goes_early(lane) && netchan__serve_queue(&ch->ahead, lane)) return true;
    }
    return false;
}

/* A receive that waits on the channel, of the peer that the lane is for, or, if there is none, its room for a value
 * that comes early, or NULL. */
static netchan__waiter *netchan__receiver_for(const netchan__lane *lane) {
    const netchan__map *waiters = &lane->only->waiters;
    netchan__waiter *room = NULL;
    for (size_t i = 0; i < waiters->cap; i++) {
        netchan__waiter *w = (netchan__waiter *)netchan__map_at(waiters, i);
        if (w && w->queue == &lane->ch->receivers) return w;
        if (w && w->queue == &lane->ch->ahead) room = w;
    }
    return room;
}

/* Gives its values to the one process that a lane is for. */
static void netchan__serve_only(netchan__lane *lane) {
    netchan__waiter *r;
    do {
        netchan__fill(lane);
        bool ready = lane->cap ? netchan__held(lane) && !lane->pinned : lane->senders.head != NULL;
        r = ready ? netchan__receiver_for(lane) : NULL;
    } while (r && netchan__serve_one(lane, r));
}

/* A closing lane or channel that has nothing left: receivers learn it. */
static void netchan__finish_close(netchan *ch);
static void netchan__finish_lost(netchan *ch);

/* Pairs all that can be paired (I2). Caller holds the channel's lock, and outside net the locks of all channels of its
 * operation. */
static void netchan__pair(netchan *ch) {
    if (ch->is_end || ch->closed) return;
    do {
        while (netchan__serve(ch)) continue;
    } while (!ch->is_merge && netchan__fill(&ch->lane));
    if (ch->closing && !ch->closed) netchan__finish_close(ch);
    else netchan__finish_lost(ch);
}

/* The same when all that is new is this receiver: who waited before it had its chance (I2), and may be many. */
static void netchan__pair_receiver(netchan *ch, netchan__waiter *r) {
    netchan__lane *next;
    for (netchan__lane *lane = ch->ready; lane; lane = next) {
        next = lane->next_ready;
        if (!netchan__serve_one(lane, r)) continue;
        netchan__pair(ch);
        return;
    }
    if (ch->closing && !ch->closed) netchan__finish_close(ch);
    else netchan__finish_lost(ch);
}

/* The first waiter whose operation could be ended here: now that of nobody else. */
static netchan__waiter *netchan__seize(netchan__queue *q) {
    netchan__waiter *w = q->head;
    while (w && w->op && !netchan__change_state(w->op, NETCHAN__OPEN, NETCHAN__ENGAGED)) w = w->next;
    if (w) netchan__dequeue(w);
    return w;
}

/* No value is in the channel, and none is on its way into it or out of it. */
static bool netchan__is_empty(const netchan *ch) {
    const netchan__lane *lane = ch->lanes;
    while (lane && !netchan__held(lane) && !lane->out && !lane->reserved) lane = lane->next;
    return !lane && !ch->matches;
}

/* Ends the receives that wait and are not engaged. */
static void netchan__end_receivers(netchan *ch, int result) {
    for (netchan__waiter *r; (r = netchan__seize(&ch->receivers));) {
        if (r->op) netchan__finish(r->op, r, result);
        else {
            if (result != NETCHAN_ECLOSED) netchan__emit_entry(r, NETCHAN__ACCEPT, 0, (uint64_t)-result);
            netchan__forget(r); /* its process learns from CLOSED what is closed */
        }
    } /* who is engaged looks at its cases when it is released */
    while (ch->ahead.head) netchan__forget(ch->ahead.head); /* likewise */
}

static void netchan__finish_close(netchan *ch) {
    if (!netchan__is_empty(ch)) return;
    ch->closed = true;
    for (netchan__peer *p = netchan__is_net(ch) ? netchan__net.peers : NULL; p; p = p->next_peer)
        if (p->work == ch) netchan__emit_ids(p, NETCHAN__CLOSED, 1, 0, 0, 0, 0);
    netchan__tell_ends(ch, false, NETCHAN__CLOSED);
    netchan__end_receivers(ch, NETCHAN_ECLOSED);
}

/* Senders that wait and are not being matched end. */
static void netchan__end_senders(netchan__lane *lane, int result) {
    for (netchan__waiter *s; (s = netchan__seize(&lane->senders));) {
        if (s->op || s->here || result != NETCHAN_ECLOSED) netchan__finish_sender(s, result, 0);
        else netchan__forget(s); /* its own process closed the channel, or learns from CLOSING that it is */
    }
    netchan__update_ready(lane);
}

/* All processes that could send into the channel, or receive from it, were lost: who waits for them learns it. */
static void netchan__finish_lost(netchan *ch) {
    if (!(ch->senders_lost && !ch->sender_ends) && !(ch->receivers_lost && !ch->receiver_ends)) return;
    if (ch->senders_lost && !ch->sender_ends && netchan__is_empty(ch) && !(ch->lanes && ch->lane.senders.head))
        netchan__end_receivers(ch, NETCHAN_ELOST);
    if (ch->receivers_lost && !ch->receiver_ends && !ch->matches && !ch->receivers.head)
        netchan__end_senders(&ch->lane, NETCHAN_ELOST);
}

static void netchan__lane_init(netchan__lane *lane, netchan *ch, size_t cap) {
    memset(lane, 0, sizeof *lane);
    lane->ch = ch;
    lane->cap = cap;
}

/* Frees the values, but not the room: one that is out may come back. */
static void netchan__lane_empty(netchan__lane *lane) {
    while (netchan__held(lane)) {
        netchan__slot slot = netchan__lane_pop(lane);
        netchan_clear(&slot.value);
    }
}

static void netchan__lane_clear(netchan__lane *lane) {
    netchan__lane_empty(lane);
    NETCHAN_FREE(lane->slots);
    lane->slots = NULL;
    lane->room = 0;
}

/* ====================================================================================================================
 * [9] The commit protocol: pairs whose parties are in different processes, or are selects engaged elsewhere. All net.
 *
 * A home brings two parties together in a match. It locks both operations in order: the sender's first, then the
 * receiver's; but when both have several cases, the operation with the smaller id first. Who cannot refuse (a slot, a
 * buffered value, an offered value, a local operation with one case) is locked before all. A local operation is locked
 * by its state, a remote one by a CLAIM, which it answers with GRANT or, when it is over, DECLINE. The last lock is the
 * commit, and only its claim is final.
 *
 * Invariants (checked on a model with cycles of selects, timeouts and lost sessions):
 *   P1  An engaged operation queues further claims and answers them when it is released or over; it never refuses for
 *       being busy.
 *   P2  A match with a claim outstanding to a living party is never abandoned; a withdrawal or loss is remembered
 *       until the answer.
 *   P3  A value that left on a claim stays at home until the answer: a DECLINE carries none.
 *   P4  A sender's OK follows a receiver's commit: a final GRANT, or TAKEN.
 *   P5  On release an operation looks first at its time, its closed, lost and starved cases, then at its queued claims.
 *
 * What falls through or is released is queued in netchan__net and worked off by netchan__settle(), so that nothing here
 * recurses. A broken link changes nothing of this: answers come over the next. Only tries, and pairs that others could
 * make, do not begin.
 * ================================================================================================================== */

enum netchan__lock_answer { NETCHAN__LOCKED, NETCHAN__ASKED, NETCHAN__OVER };

static void netchan__progress(netchan__match *m);

static bool netchan__claimable(const netchan__waiter *w) { return w && (w->op ? w->multi : !(w->is_send && w->here)); }

static bool netchan__precedes(const netchan__waiter *a, const netchan__waiter *b) {
    int order = memcmp(netchan__process_of(a), netchan__process_of(b), sizeof netchan__net.process);
    return order < 0 || (order == 0 && a->op_id < b->op_id);
}

static netchan__waiter *netchan__party(const netchan__match *m, int step) {
    return m->receiver_first == (step == 0) ? m->receiver : m->sender;
}

static netchan_value *netchan__match_value(netchan__match *m) {
    bool at_sender = m->sender && (m->sender->op || m->sender->here);
    return at_sender ? &m->sender->value : &m->value;
}

static void netchan__unlink_match(netchan__match *m) {
    const netchan__peer *taker = m->receiver && !m->receiver->op ? m->receiver->peer : NULL;
    if ((m->lane->peer && m->lane->peer->farewell) || (taker && taker->farewell))
        netchan__look(); /* its farewell may be answered now */
    if (m->lends && taker) taker->keep(m->receiver->peer, true, m->receiver->id);
    NETCHAN__UNLINK(m->ch->matches, m, prev, next);
    netchan__map_remove(&netchan__net.matches, m->id);
    m->lane->matching--;
    if (m->sender) m->sender->match = NULL;
    if (m->receiver) m->receiver->match = NULL;
    if (m->receiver && m->receiver->peer && !m->receiver->op) {
        m->receiver->peer->shipping -= m->shipping;
        if (m->shipping) netchan__has_room(m->receiver->peer);
    }
    if (m->sender && !m->sender->op && !m->sender->here && !m->sender->lost && m->charge) {
        m->sender->peer->charged -= m->charge;
        netchan__has_room(m->sender->peer);
    }
}

static void netchan__free_match(netchan__match *m) {
    netchan_clear(&m->value);
    netchan__buf_free(&m->incoming.bytes);
    netchan__lane_changed(m->lane);
    netchan__mark_dirty(m->ch);
    NETCHAN_FREE(m);
}

/* Out of memory for what the waiter waits for. */
static void netchan__give_up(netchan__waiter *w) {
    netchan__dequeue(w);
    if (!w->op) {
        netchan__breach(w->peer, "out of memory for one of its operations");
        netchan__forget(w);
    } else if (netchan__change_state(w->op, NETCHAN__OPEN, NETCHAN__ENGAGED)) netchan__finish(w->op, w, NETCHAN_ENOMEM);
    else w->starved = true; /* see P5 */
}

static netchan__match *netchan__make_match(netchan__lane *lane, netchan__waiter *s, netchan__waiter *r) {
    netchan__match *m = (netchan__match *)netchan__alloc(sizeof *m);
    if (m) m->id = ++netchan__net.last_id;
    if (!m || !netchan__map_put(&netchan__net.matches, m->id, m)) {
        NETCHAN_FREE(m);
        return NULL;
    }
    m->ch = lane->ch;
    m->lane = lane;
    m->sender = s;
    m->receiver = r;
    NETCHAN__LINK(m->ch->matches, m, prev, next);
    lane->matching++;
    return m;
}

static void netchan__begin_match(netchan__lane *lane, netchan__waiter *s, netchan__waiter *r) {
    netchan__match *m = netchan__make_match(lane, s, r);
    if (!m) {
        netchan__give_up(r ? r : s);
        return;
    }
    if (s) {
        netchan__dequeue(s);
        s->match = m;
        m->size = s->size;
        m->memory = s->memory;
        m->from = netchan__sender_number(s);
    } else {
        netchan__slot slot = netchan__lane_pop(lane);
        m->from_buffer = true;
        m->value = slot.value;
        m->size = slot.size;
        m->memory = slot.memory;
        m->order = slot.order;
        m->from = slot.from;
        m->redelivered = slot.redelivered;
        lane->out++;
        m->pinned = !r->firm;
        lane->pinned += m->pinned;
        if (lane->peer && lane->senders.head) netchan__lane_has_room(lane); /* there is more memory for large values */
    }
    if (r) {
        netchan__dequeue(r);
        r->match = m;
    } else {
        m->to_buffer = true;
        lane->reserved++;
    }
    bool cs = netchan__claimable(s), cr = netchan__claimable(r);
    m->receiver_first = cs && cr ? s->multi && r->multi && netchan__precedes(r, s) : cs;
    netchan__update_ready(lane);
    netchan__progress(m);
}

/* The claim on w waits until its operation is open. */
static void netchan__queue_claim(netchan__waiter *w) {
    netchan__op *op = w->op;
    w->next_claim = NULL;
    if (op->last_claim) op->last_claim->next_claim = w;
    else op->claims = w;
    op->last_claim = w;
}

static void netchan__unqueue_claim(netchan__waiter *w) {
    netchan__waiter **at = &w->op->claims;
    w->op->last_claim = NULL;
    while (*at) {
        if (*at == w) *at = w->next_claim;
        else {
            w->op->last_claim = *at;
            at = &(*at)->next_claim;
        }
    }
}

/* A lock on a local operation: at once, or when it is its turn (P1). */
static enum netchan__lock_answer netchan__lock_local(netchan__match *m, netchan__waiter *w) {
    netchan__op *op = w->op;
    if (netchan__change_state(op, NETCHAN__OPEN, NETCHAN__ENGAGED)) {
        op->engaged = w;
        return NETCHAN__LOCKED;
    }
    NETCHAN_ASSERT(netchan__state(op) == NETCHAN__ENGAGED);
    w->claim = m->id;
    netchan__queue_claim(w);
    return NETCHAN__ASKED;
}

static void netchan__claim_remote(netchan__match *m, netchan__waiter *w, bool final) {
    netchan__frame f = netchan__new_frame(NETCHAN__CLAIM);
    f.entry = w->id;
    f.match = m->id;
    f.flags = netchan__flag(final, NETCHAN__FINAL) | netchan__flag(m->redelivered, NETCHAN__REDELIVERED) |
              netchan__flag(!m->sender && !m->lane->senders.head, NETCHAN__UNHURRIED);
    m->carried = final && !w->is_send && m->size <= NETCHAN__FRAGMENT;
    if (!w->is_send) f.size = m->size;
    if (m->carried) {
        f.has_value = true;
        f.value = *netchan__match_value(m);
    }
    f.lazy = w->ahead;
    if (w->is_send && !m->charge) {
        m->announced = w->size > NETCHAN__FRAGMENT ? w->size : 0;
        m->charge = netchan__swollen(w->peer, w->size);
        w->peer->charged += m->charge;
    }
    if (!w->is_send && m->size > NETCHAN__FRAGMENT && !m->shipping) {
        m->shipping = m->size;
        w->peer->shipping += m->size;
    }
    uint64_t position = w->peer->emit(w->peer, &f);
    if (m->carried) m->position = position;
}

static enum netchan__lock_answer netchan__lock_party(netchan__match *m, int step) {
    netchan__waiter *w = netchan__party(m, step);
    bool is_receiver = m->receiver_first == (step == 0);
    if (is_receiver ? m->receiver_gone : m->sender_gone) return NETCHAN__OVER;
    if (!w) return NETCHAN__LOCKED;
    if (w->op) return netchan__lock_local(m, w);
    if (w->lost) return NETCHAN__OVER;
    if (w->is_send && w->here) return NETCHAN__LOCKED;
    netchan__claim_remote(m, w, step == 1);
    return NETCHAN__ASKED;
}

static void netchan__end_waiters(netchan__queue *q, int result);
static void netchan__try_failed(netchan__waiter *w);

/* Puts a waiter that was in a match back where it waited, unless it has a reason to go. */
static void netchan__wait_again(netchan__waiter *w) {
    w->match = NULL;
    if (w->op && w->is_try) netchan__try_failed(w);
    else if (w->lost || (w->peer && !w->op && w->peer->leaving)) {
        netchan__forget(w);
    } else if (w->withdrawn) {
        if (w->is_try) netchan__emit_entry(w, NETCHAN__WITHDRAWN, 0, 0);
        else if (w->here) netchan__emit_entry(w, NETCHAN__ACCEPT, 0, (uint64_t)-NETCHAN_ELOST); /* its name is gone */
        netchan__forget(w);
    } else {
        netchan__enqueue(netchan__queue_of(w), w, true);
        netchan__mark_dirty(w->ch);
        if (w->lane) netchan__update_ready(w->lane);
        else if (w->peer && !w->op && w->peer->direct) netchan__lane_changed(w->peer->direct);
        if (w->lane && (w->lane->closing || w->ch->gone)) /* a sender */
            netchan__end_senders(w->lane, w->lane->closing && !w->lane->is_direct ? NETCHAN_ECLOSED : NETCHAN_ELOST);
        else if (!w->is_send && w->ch->closed) /* its link was hung up */
            netchan__end_waiters(&w->ch->receivers, NETCHAN_ECLOSED);
    }
}

/* The operation will be open again, once netchan__settle() has looked at P5. */
static void netchan__release(netchan__op *op) {
    op->is_released = true;
    NETCHAN__LINK(netchan__net.released, op, prev_released, next_released);
}

static void netchan__unlist_released(netchan__op *op) {
    op->is_released = false;
    NETCHAN__UNLINK(netchan__net.released, op, prev_released, next_released);
}

/* Undoes a lock, or a wish for one. */
static void netchan__unlock_party(netchan__match *m, netchan__waiter *w, bool locked) {
    netchan__lane *lane = m->lane;
    if (!w) return;
    if (!w->op && locked && w->is_send && !w->here && m->receiver_first) {
        netchan__finish_sender(w, NETCHAN_ELOST, 0); /* its claim was final: it has committed, and cannot wait again */
        return;
    }
    if (!w->op) {
        if (locked && !w->lost && !(w->is_send && w->here)) netchan__emit_entry(w, NETCHAN__RELEASE, m->id, 0);
        netchan__wait_again(w);
        return;
    }
    if (locked) netchan__release(w->op);
    netchan__wait_again(w);
    netchan__update_ready(lane);
}

/* The buffer's side of a match that is over: the value is gone, or comes back; the slot is free again. */
static void netchan__settle_buffer(netchan__match *m, bool value_back, bool redelivered) {
    netchan__lane *lane = m->lane;
    if (m->to_buffer) lane->reserved--;
    if (!m->from_buffer) return;
    lane->out--;
    lane->pinned -= m->pinned;
    if (!value_back) {
        lane->left++;
        return;
    }
    netchan__slot slot = {m->value, m->size, m->memory, m->order, m->from, m->redelivered || redelivered};
    m->value = netchan__nil_value;
    netchan__lane_unpop(lane, slot);
}

/* The party of this step is over or gone: the other one, which may be locked, waits again. The match ends. */
static void netchan__fall_through(netchan__match *m, bool locked) {
    netchan__waiter *other = netchan__party(m, m->step == 0 ? 1 : 0), *asked = netchan__party(m, m->step == 0 ? 0 : 1);
    netchan__unlink_match(m);
    if (asked) netchan__forget(asked); /* remote: a local one is gone, and NULL */
    netchan__settle_buffer(m, true, false);
    netchan__unlock_party(m, other, locked);
    netchan__free_match(m);
}

/* A remote receive is over; room for values that come early may be there for another one. */
static void netchan__end_receiver(netchan__waiter *r) {
    const netchan__remote *remote = (const netchan__remote *)(const void *)r;
    if (!remote->again || r->lost || r->withdrawn || r->peer->leaving || r->ch->closed) {
        netchan__forget(r);
        return;
    }
    netchan__enqueue(netchan__queue_of(r), r, false);
    netchan__mark_dirty(r->ch);
    if (r->peer->direct) netchan__lane_changed(r->peer->direct);
}

/* Everything is decided and the sender is to learn it. taker: who has the value. */
static void netchan__end_match(netchan__match *m, int result, uint64_t taker) {
    netchan__waiter *s = m->sender, *r = m->receiver;
    netchan__unlink_match(m);
    netchan__settle_buffer(m, false, false);
    if (r && !r->op && result == NETCHAN_OK) {
        r->peer->taken++;
        r->peer->stats->values_sent++;
        if (r->ch->on_taken) r->ch->on_taken(r->ch, netchan__match_value(m));
    }
    if (r && !r->op) netchan__end_receiver(r);
    if (s) netchan__finish_sender(s, result, taker);
    netchan__free_match(m);
}

/* Sends the value to a remote receiver that is locked. */
static void netchan__ship(netchan__match *m) {
    netchan__waiter *r = m->receiver;
    netchan__frame f = netchan__new_frame(NETCHAN__COMMIT);
    f.entry = r->id;
    f.match = m->id;
    f.flags = netchan__flag(m->redelivered, NETCHAN__REDELIVERED);
    f.has_value = true;
    f.value = *netchan__match_value(m);
    f.size = m->size;
    f.lends = m->lends = m->size > NETCHAN__FRAGMENT && r->peer->keep;
    m->step = 3;
    m->position = r->peer->emit(r->peer, &f);
}

/* Both parties are locked. */
static void netchan__commit(netchan__match *m) {
    netchan__waiter *r = m->receiver;
    netchan_value *v = netchan__match_value(m);
    if (!r && m->ch->gone) { /* it would lie there for ever */
        netchan__end_match(m, NETCHAN_ELOST, 0);
    } else if (!r) {
        netchan__lane_push(m->lane, v, m->size, m->memory, m->from);
        netchan__end_match(m, NETCHAN_OK, 0);
    } else if (r->op) {
        r->match = NULL;
        m->receiver = NULL;
        netchan__finish_receive(r, v, m->from, m->redelivered);
        netchan__end_match(m, NETCHAN_OK, 0);
    } else if (m->carried) netchan__end_match(m, NETCHAN_OK, r->peer->number);
    else if (r->lost) {
        m->step = m->receiver_first ? 0 : 1; /* as if it had declined */
        netchan__fall_through(m, true);
    } else netchan__ship(m);
}

/* Asks for the locks that are missing, as far as it goes now. */
static void netchan__progress(netchan__match *m) {
    for (; m->step < 2; m->step++) {
        enum netchan__lock_answer answer = netchan__lock_party(m, m->step);
        if (answer == NETCHAN__ASKED) return;
        if (answer == NETCHAN__OVER) {
            netchan__fall_through(m, m->step == 1);
            return;
        }
    }
    netchan__commit(m);
}

/* ---- The owner of a remote operation: claims on the waiters of this process. ---- */

static void netchan__unregister(netchan__waiter *w) {
    netchan_clear(&w->claim_value);
    if (w->announced && w->peer) {
        w->peer->reserved -= w->announced;
        netchan__has_room(w->peer);
    }
    w->announced = 0;
    netchan__buf_free(&w->incoming.bytes);
    w->claim = 0;
    if (!w->id) return;
    if (w->lends && w->peer) w->peer->keep(w->peer, false, w->id);
    w->lends = false;
    netchan__map_remove(&netchan__net.waiters, w->id);
    if (w->here && w->peer) w->peer->offering -= w->size;
    w->here = false;
    w->id = 0;
    w->peer = NULL;
}

/* The operation is done with all its cases but w (may be NULL). */
static void netchan__withdraw_others(netchan__op *op, const netchan__waiter *w) {
    for (size_t i = 0; i < op->count; i++) {
        netchan__waiter *other = &op->waiters[i];
        if (other == w || !other->ch) continue;
        netchan__dequeue(other);
        if (other->is_send && other->ch->is_end) netchan__mark_dirty(other->ch); /* for who waited behind it */
        if (other->lane) netchan__update_ready(other->lane);
        other->lane = NULL;
        netchan__match *m = other->match;
        if (m) { /* it waits for this lock, or will be asked for it */
            bool asked = netchan__party(m, m->step) == other;
            if (m->sender == other) m->sender = NULL, m->sender_gone = true;
            else m->receiver = NULL, m->receiver_gone = true;
            other->match = NULL;
            if (asked) { /* else a claim is outstanding to the other party (P2) */
                m->next_declined = netchan__net.declined;
                netchan__net.declined = m;
            }
        } else if (other->peer && other->claim)
            netchan__emit_ids(other->peer, NETCHAN__DECLINE, 0, 0, other->claim, 0, 0);
        else if (other->peer) netchan__emit_entry(other, NETCHAN__WITHDRAW, 0, 0);
        netchan__unregister(other);
    }
    op->claims = op->last_claim = NULL;
    if (op->is_released) netchan__unlist_released(op);
}

/* A receive at an end gets a value of its home. */
static void netchan__receive_from(netchan__peer *p, netchan__waiter *w, netchan_value *v) {
    p->stats->values_received++;
    netchan__finish_receive(w, v, p->number, w->claim_redelivered);
}

/* The operation of w is open: it grants the remote claim on w. */
static void netchan__grant(netchan__waiter *w) {
    netchan__op *op = w->op;
    netchan__peer *p = w->peer;
    netchan__frame f = netchan__new_frame(NETCHAN__GRANT);
    f.match = w->claim;
    f.entry = w->id;
    f.lazy = w->claim_unhurried;
    if (w->is_send) {
        f.has_value = true;
        f.value = w->value;
        f.size = w->size;
        f.lends = w->lends = w->size > NETCHAN__FRAGMENT && p->keep;
    }
    bool takes = w->claim_final && !w->is_send && w->announced == 0;
    op->engaged = w;
    netchan__set_state(op, w->claim_final ? NETCHAN__COMMITTED : NETCHAN__ENGAGED);
    w->position = p->emit(p, &f);
    if (w->claim_final) netchan__withdraw_others(op, w);
    if (takes) netchan__receive_from(p, w, &w->claim_value);
}

static netchan__waiter *netchan__waiter_of(netchan__peer *p, uint64_t id) {
    netchan__waiter *w = (netchan__waiter *)netchan__map_get(&netchan__net.waiters, id);
    return w && w->op && w->peer == p ? w : NULL;
}

/* A large value is announced: its memory is reserved before the first fragment. */
static bool netchan__announce(netchan__peer *p, uint64_t size, size_t *announced) {
    if (size > p->max_message || p->reserved + size > p->max_memory) {
        netchan__breach(p, "it announced a value over max_message, or more of them than max_memory");
        return false;
    }
    *announced = (size_t)size;
    p->reserved += (size_t)size;
    return true;
}

/* ---- Values that come early. ----
 *
 * A receive at an end costs a round trip. While receives of a dialler follow each other quickly and its listener has a
 * buffer, the end therefore asks for values ahead of them, with a DEMAND for each, which waits in a room here until a
 * receive takes its value: only then is the claim granted. Until then the value is at home as well, out on the claim,
 * and has the fate of any claimed value. Home serves those who receive first.
 *
 * Invariants.
 *   A1  No value lies here beside a receive that could take it, unless the link is down: others may have it then.
 *   A2  A value lies here for NETCHAN_EARLY_MS at most while nothing is taken; then all go back, for others. Each
 *       takes its old place there; a process that has received later ones gets it out of turn. This one does not: its
 *       next receive is registered when home has all that it had sent here (it answers the WITHDRAW of what is firm).
 *   A3  If an early value serves a receive that home knows, and which has no other case, the value's room stands in for
 *       it, or home would have a value out for nothing, and others come before it. Should that be a large one, only the
 *       claim waits here, for a receive that takes it over. When nobody receives, a stand-in goes back as values do. */

typedef struct netchan__room {
    netchan__op op; /* always open: nobody waits for it */
    netchan__waiter waiter;
    bool stands_in; /* for a receive, see A3 */
} netchan__room;

/* An operation without a caller, of one case, which is not registered yet. All else of both is 0. */
static void netchan__set_up_alone(netchan__op *op, netchan__waiter *w, netchan *ch) {
    op->net = true;
    op->count = 1;
    op->waiters = w;
    op->id = __atomic_add_fetch(&netchan__op_count, 1, __ATOMIC_RELAXED);
    w->op = op;
    w->op_id = op->id;
    w->ch = ch;
    w->firm = true;
}

static netchan__room *netchan__room_of(netchan__waiter *w) { return (netchan__room *)(void *)w->op; }

/* How many values may come early. */
static size_t netchan__early_most(const netchan *ch) {
    const netchan__peer *p = ch->home;
    if (!p || p->recv != ch || p->leaving || ch->closed || ch->exports || ch->relayed.head) return 0;
    size_t cap = p->send->lane.cap;
    return cap < NETCHAN__EARLY_MOST ? cap : (size_t)NETCHAN__EARLY_MOST;
}

NETCHAN__SMALL_BEGIN
static void netchan__free_room(netchan__waiter *w) {
    w->ch->rooms--;
    w->ch->stand_ins -= netchan__room_of(w)->stands_in;
    netchan__dequeue(w);
    netchan__unregister(w);
    NETCHAN_FREE(netchan__room_of(w));
}

/* Asks for another value. Returns false when out of memory. */
static bool netchan__make_room(netchan *ch) {
    netchan__room *room = (netchan__room *)netchan__alloc(sizeof *room);
    uint64_t id = ++netchan__net.last_id;
    if (!room || !netchan__map_put(&netchan__net.waiters, id, &room->waiter)) {
        NETCHAN_FREE(room);
        return false;
    }
    netchan__waiter *w = &room->waiter;
    netchan__set_up_alone(&room->op, w, ch);
    w->peer = ch->home;
    w->id = id;
    w->ahead = true;
    ch->rooms++;
    netchan__enqueue(&ch->ahead, w, false);
    netchan__frame f = netchan__new_frame(NETCHAN__DEMAND);
    f.channel = ch->channel;
    f.entry = id;
    f.op = w->op_id;
    f.flags = NETCHAN__FIRM | NETCHAN__AHEAD;
    f.lazy = true;
    w->peer->emit(w->peer, &f);
    return true;
}

static void netchan__free_rooms(netchan__queue *q) {
    while (q->head) netchan__free_room(q->head);
}

/* A receive that is engaged elsewhere is not to get later values than those that lie here. It is registered anew when
 * it is open, and gets those first; a try has failed. */
static void netchan__put_off(netchan__waiter *r) {
    if (r->is_try) netchan__try_failed(r);
    else netchan__unregister(r);
}

/* Home may give all values that came early to others; the rooms go first, or they would come again at once. What home
 * has claimed meanwhile is declined when it comes. */
static void netchan__give_early_back(netchan *ch) {
    netchan__waiter *w;
    netchan__peer *p = ch->home;
    NETCHAN_ASSERT(p);
    __atomic_store_n(&ch->wanted, 0, __ATOMIC_RELAXED);
    while ((w = ch->ahead.head)) {
        if (w->firm) ch->given_up = w->id, ch->given_up_waited = 0;
        netchan__emit_entry(w, NETCHAN__WITHDRAW, 0, 0);
        netchan__free_room(w);
    }
    for (netchan__waiter *r = ch->early.head ? ch->receivers.head : NULL, *next; r; r = next) {
        next = r->next;
        if (!r->id || r->claim || netchan__state(r->op) >= NETCHAN__COMMITTED) continue;
        netchan__emit_entry(r, NETCHAN__WITHDRAW, 0, 0);
        netchan__put_off(r);
    }
    while ((w = ch->early.head)) {
        netchan__emit_ids(p, NETCHAN__DECLINE, 0, 0, w->claim, 0, 0);
        netchan__free_room(w);
    }
    __atomic_store_n(&ch->early_count, 0, __ATOMIC_RELAXED);
}

/* Home is gone. */
static void netchan__drop_early(netchan *ch) {
    netchan__free_rooms(&ch->early);
    netchan__free_rooms(&ch->ahead);
    ch->given_up = 0;
    __atomic_store_n(&ch->early_count, 0, __ATOMIC_RELAXED);
}

static size_t netchan__wanted_rooms(const netchan *ch) {
    size_t wanted = __atomic_load_n(&ch->wanted, __ATOMIC_RELAXED), most = netchan__early_most(ch);
    return wanted < most ? wanted : most;
}

/* As many rooms as are wanted. Too many become fewer when values are taken. */
static void netchan__make_rooms(netchan *ch) {
    size_t wanted = netchan__wanted_rooms(ch);
    while (ch->rooms < wanted && !ch->given_up && !ch->home->down && netchan__make_room(ch)) continue;
}

/* May one be taken now? */
static bool netchan__has_early(const netchan *ch) { return ch->early.head && !ch->closed && !ch->home->down; }

/* The same for one that is here: a claim for a large value announces it. */
static bool netchan__is_early_here(const netchan *ch) { return netchan__has_early(ch) && !ch->early.head->announced; }

/* Each is registered at home as the other was. */
static void netchan__swap_entries(netchan__waiter *a, netchan__waiter *b) {
    netchan__waiter old = *a;
    netchan__map *m = &netchan__net.waiters;
    netchan__map_remove(m, a->id);
    if (b->id) netchan__map_remove(m, b->id);
    a->id = b->id, a->peer = b->peer;
    b->id = old.id, b->peer = old.peer;
    if (a->id) netchan__map_put(m, a->id, a); /* there is room now */
    netchan__map_put(m, b->id, b);
}

/* The receive r, which may be registered, is served by a room. Returns whether that is to stand in for it then. */
static bool netchan__needs_stand_in(netchan__waiter *r) {
    if (r->id && r->multi) netchan__emit_entry(r, NETCHAN__WITHDRAW, 0, 0);
    return r->id && !r->multi;
}

/* What lay in the room was taken. It stands in for r from now on; if that is NULL it waits again, or goes. */
static void netchan__vacate(netchan__waiter *w, const netchan__waiter *r, bool again) {
    netchan *ch = w->ch;
    netchan__room *room = netchan__room_of(w);
    w->claim = 0;
    ch->early_taken++;
    __atomic_store_n(&ch->early_count, ch->early_count - 1, __ATOMIC_RELAXED);
    netchan__dequeue(w);
    if (!r && !again) {
        netchan__free_room(w);
        return;
    }
    netchan__enqueue(&ch->ahead, w, false);
    if (!r) return;
    ch->stand_ins += !room->stands_in;
    room->stands_in = true;
    w->firm = r->firm;
}

/* Takes the first, which is here. Its room stands in for r from now on, unless that is NULL. */
static netchan_value netchan__take_early(netchan *ch, const netchan__waiter *r, bool *redelivered) {
    netchan__waiter *w = ch->early.head;
    netchan_value v = w->claim_value;
    bool again = !r && !netchan__room_of(w)->stands_in && ch->rooms <= netchan__wanted_rooms(ch);
    netchan__frame f = netchan__new_frame(NETCHAN__GRANT);
    f.match = w->claim;
    f.size = again;
    f.lazy = true;
    w->peer->emit(w->peer, &f);
    w->peer->stats->values_received++;
    *redelivered = w->claim_redelivered;
    w->claim_value = netchan__nil_value;
    netchan__vacate(w, r, again);
    return v;
}

/* A receive takes over the first claim, which is for a large value (A3). */
static void netchan__take_claim(netchan *ch, netchan__waiter *r) {
    netchan__waiter *w = ch->early.head;
    bool stands_in = netchan__needs_stand_in(r);
    if (!stands_in) netchan__unregister(r);
    netchan__swap_entries(w, r);
    r->claim = w->claim;
    r->claim_final = true;
    r->claim_redelivered = w->claim_redelivered;
    r->announced = w->announced;
    w->announced = 0;
    netchan__vacate(w, stands_in ? r : NULL, false);
    netchan__grant(r);
}

/* Gives early values to the receives that wait (A1). */
static void netchan__hand_out(netchan *ch) {
    netchan__waiter *next;
    for (netchan__waiter *r = ch->receivers.head; r && netchan__has_early(ch); r = next) {
        next = r->next;
        if (netchan__state(r->op) != NETCHAN__OPEN) continue;
        if (!netchan__is_early_here(ch)) {
            netchan__take_claim(ch, r);
            next = ch->receivers.head;
            continue;
        }
        bool redelivered, stands_in = netchan__needs_stand_in(r);
        if (stands_in) netchan__swap_entries(ch->early.head, r);
        uint64_t number = ch->home->number;
        netchan_value v = netchan__take_early(ch, stands_in ? r : NULL, &redelivered);
        netchan__dequeue(r);
        netchan__change_state(r->op, NETCHAN__OPEN, NETCHAN__ENGAGED);
        netchan__finish_receive(r, &v, number, redelivered);
        next = ch->receivers.head; /* the operation may have had another case here */
    }
}
NETCHAN__SMALL_END

static void netchan__on_claim(netchan__peer *p, netchan__frame *f) {
    netchan__waiter *w = netchan__waiter_of(p, f->entry);
    if (!w || netchan__state(w->op) >= NETCHAN__COMMITTED) {
        netchan__emit_ids(p, NETCHAN__DECLINE, 0, 0, f->match, 0, 0);
        return;
    }
    if (w->claim || !f->match) {
        netchan__breach(p, "it claimed what it had claimed already");
        return;
    }
    if (!w->is_send && !w->ahead && w->ch->early.head) {
        netchan__emit_ids(p, NETCHAN__DECLINE, 0, 0, f->match, 0, 0);
        netchan__put_off(w);
        return;
    }
    bool final = f->flags & NETCHAN__FINAL;
    if (f->has_value && (w->is_send || !final)) {
        netchan__breach(p, "it sent a value with a claim that takes none");
        return;
    }
    if (w->ahead && !final) {
        netchan__breach(p, "it claimed room for a value, and did not mean it");
        return;
    }
    if (final && !w->is_send && !f->has_value && !netchan__announce(p, f->size, &w->announced)) return;
    w->claim = f->match;
    w->claim_final = final;
    w->claim_redelivered = f->flags & NETCHAN__REDELIVERED;
    w->claim_unhurried = final && !w->is_send && f->has_value && f->flags & NETCHAN__UNHURRIED;
    w->claim_value = f->value;
    f->value = netchan__nil_value;
    if (w->ahead) {
        netchan__dequeue(w);
        netchan__enqueue(&w->ch->early, w, false);
        __atomic_store_n(&w->ch->early_count, w->ch->early_count + 1, __ATOMIC_RELAXED);
        netchan__hand_out(w->ch);
        return;
    }
    if (netchan__state(w->op) == NETCHAN__OPEN) {
        netchan__grant(w);
        return;
    }
    netchan__queue_claim(w);
}

/* The waiter that is engaged or committed to this match, or NULL. */
static netchan__waiter *netchan__engaged_waiter(netchan__peer *p, uint64_t entry, uint64_t match) {
    netchan__waiter *w = netchan__waiter_of(p, entry);
    return w && w->op->engaged == w && w->claim == match && netchan__state(w->op) >= NETCHAN__ENGAGED ? w : NULL;
}

static void netchan__on_commit(netchan__peer *p, netchan__frame *f) {
    netchan__waiter *w = netchan__engaged_waiter(p, f->entry, f->match);
    if (!w || w->is_send || w->incoming.bytes.data) {
        netchan__breach(p, "it committed a match that was not granted");
        return;
    }
    netchan__set_state(w->op, NETCHAN__COMMITTED);
    netchan__withdraw_others(w->op, w);
    w->claim_redelivered = f->flags & NETCHAN__REDELIVERED;
    if (f->has_value) {
        netchan__emit_ids(p, NETCHAN__TAKEN, 0, 0, f->match, 0, 0);
        netchan__receive_from(p, w, &f->value);
    } else if (!w->announced) netchan__announce(p, f->size, &w->announced);
    else if (w->announced != f->size) netchan__breach(p, "it changed the size of a value");
}

NETCHAN__SMALL_BEGIN
/* Makes room for a value, see netchan__incoming. Returns false when out of memory. */
static bool netchan__begin_gathering(netchan__incoming *in, size_t announced, const netchan__frame *f) {
    netchan__reader r = {f->bytes, f->bytes + f->count, false};
    unsigned tag = f->count ? (unsigned)*f->bytes : (unsigned)NETCHAN__TAG_NIL;
    netchan__read_bytes(&r, 1);
    uint64_t payload = netchan__read_varint(&r);
    size_t head = (size_t)(r.p - f->bytes);
    in->type = netchan__tag_type(tag);
    netchan_value v = netchan__make_value(in->type);
    bool numbers = in->type > NETCHAN_MAP && payload % netchan__item_size(v.type) == 0;
    bool whole = !r.bad && head + payload == announced && head == netchan__length_prefixed((size_t)payload) - payload;
    in->head = whole && netchan__little_endian() && (in->type == NETCHAN_BYTES || numbers) ? head : 0;
    in->bytes.data = (uint8_t *)NETCHAN_MALLOC(netchan__align(announced - in->head));
    return in->bytes.data != NULL;
}

/* Adds a fragment. Returns true when the value is whole, which is then in *v. */
static bool netchan__gather(netchan__peer *p, netchan__incoming *in, size_t announced, const netchan__frame *f,
                            netchan_value *v, size_t *memory) {
    size_t have = in->bytes.end;
    if (!announced || f->count > announced - have) {
        netchan__breach(p, "it sent more fragments than it had announced");
        return false;
    }
    if (!in->bytes.data && !netchan__begin_gathering(in, announced, f)) {
        netchan__breach(p, "out of memory for a value it sent");
        return false;
    }
    size_t skip = have ? 0 : in->head;
    if (f->count) memcpy(in->bytes.data + have + skip - in->head, f->bytes + skip, f->count - skip);
    in->bytes.end += f->count;
    if (in->bytes.end < announced) return false;
    int result = NETCHAN_OK;
    if (in->head) {
        size_t size = announced - in->head;
        *v = netchan__make_value(in->type);
        v->as.block.data = in->bytes.data;
        v->as.block.count = size / netchan__item_size(v->type);
        v->flags = NETCHAN__OWNED;
        *memory = netchan__align(size);
        memset(&in->bytes, 0, sizeof in->bytes);
    } else result = netchan__decode_from(p, v, in->bytes.data, announced, p->max_memory, memory);
    netchan__buf_free(&in->bytes);
    if (result == NETCHAN_OK) return true;
    netchan__breach(p, "it sent a value that cannot be decoded, or not within max_memory");
    return false;
}
NETCHAN__SMALL_END

static void netchan__on_fragment_for_receiver(netchan__peer *p, netchan__frame *f) {
    netchan__waiter *w = netchan__waiter_of(p, f->entry);
    if (!w || w->op->engaged != w || netchan__state(w->op) != NETCHAN__COMMITTED || w->is_send) {
        netchan__breach(p, "it sent a fragment of nothing");
        return;
    }
    netchan_value v = netchan__nil_value;
    size_t memory;
    if (f->count == NETCHAN__FRAGMENT) w->waited = 0; /* it goes on */
    if (!netchan__gather(p, &w->incoming, w->announced, f, &v, &memory)) return;
    netchan__emit_ids(p, NETCHAN__TAKEN, 0, 0, w->claim, 0, 0);
    netchan__receive_from(p, w, &v);
}

static void netchan__on_release(netchan__peer *p, netchan__frame *f) {
    netchan__waiter *w = netchan__engaged_waiter(p, f->entry, f->match);
    if (!w || netchan__state(w->op) != NETCHAN__ENGAGED || w->op->is_released || w->position > p->sent) {
        netchan__breach(p, "it released a match that was not granted");
        return;
    }
    w->claim = 0;
    netchan__release(w->op);
}

static void netchan__register_all(netchan *ch);

/* A value is in the home's buffer, or on its way. */
static void netchan__entered(netchan *ch, size_t size, size_t memory) {
    ch->in_flight++;
    ch->in_flight_bytes += size;
    if (size > ch->largest) ch->largest = size;
    if (memory > ch->largest_memory) ch->largest_memory = memory;
}

/* The send is over; or, with a result that is not OK, any operation. */
static void netchan__on_accept(netchan__peer *p, netchan__frame *f) {
    netchan__waiter *w = netchan__waiter_of(p, f->entry);
    if (!w) return; /* it was given up here */
    int state = netchan__state(w->op);
    bool engaged = w->op->engaged == w && state != NETCHAN__OPEN, refused = f->number != 0;
    if (w->ahead && refused && !w->claim) { /* it stood in for a receive */
        netchan__free_room(w);
        return;
    }
    bool expected = refused ? engaged || !w->claim : w->is_send && (state == NETCHAN__OPEN ? w->here : engaged);
    if (!expected || w->ahead || f->number > 15 || (engaged && w->position > p->sent)) {
        netchan__breach(p, "it accepted what was not offered");
        return;
    }
    if (!engaged && state != NETCHAN__OPEN) { /* it is engaged elsewhere, see P5 */
        netchan__unregister(w);
        w->lost = true;
        w->refused = -(int)f->number;
        return;
    }
    netchan__dequeue(w);
    netchan__set_state(w->op, NETCHAN__COMMITTED);
    w->op->peer = p->number;
    if (!refused) {
        p->stats->values_sent++;
        if (w->ch->credited && w->ch->lane.cap) netchan__entered(w->ch, w->size, w->memory);
        else p->taken++;
    }
    netchan *ch = w->ch;
    bool detached = w->op->detached;
    netchan__finish(w->op, w, -(int)f->number);
    if (detached) netchan__register_all(ch); /* who waited for it */
}

/* One of the tries of an operation is over without success. */
static void netchan__try_failed(netchan__waiter *w) {
    netchan__op *op = w->op;
    netchan__dequeue(w);
    netchan__unregister(w);
    if (op->tries && --op->tries == 0 && netchan__change_state(op, NETCHAN__OPEN, NETCHAN__ENGAGED))
        netchan__finish(op, NULL, NETCHAN_ETIMEDOUT);
}

static void netchan__on_withdrawn(netchan__peer *p, netchan__frame *f) {
    netchan__waiter *w = netchan__waiter_of(p, f->entry);
    if (w && w->ahead && !w->firm && !w->claim) netchan__free_room(w); /* it stood in for a try */
    else if (w && w->is_try && !w->claim) netchan__try_failed(w);
    if (!p->recv || !f->entry || p->recv->given_up != f->entry) return;
    p->recv->given_up = 0;
    netchan__register_all(p->recv);
}

/* ---- Ends: where this process waits for what has its home elsewhere. ---- */

static void netchan__register(netchan__waiter *w);
static void netchan__relay_all(netchan *ch);
static void netchan__relay_ended(netchan *ch);

/* The first sender that waits for credit. None passes a value that came back and is being negotiated: it was sent
 * before. */
static netchan__waiter *netchan__next_sender(const netchan *ch) {
    netchan__waiter *s = ch->lane.senders.head;
    while (s && (netchan__state(s->op) != NETCHAN__OPEN || s->id)) s = s->op->detached ? NULL : s->next;
    return s;
}

/* Sends a value within credit. Returns false when the session is broken; the value waits for the next. */
static bool netchan__emit_data(netchan *ch, const netchan_value *v, size_t size, size_t memory) {
    netchan__peer *p = ch->home;
    if (!p->emit_data || netchan__has_ends(v)) {
        netchan__frame f = netchan__new_frame(NETCHAN__DATA);
        f.channel = ch->channel;
        f.has_value = true;
        f.value = *v;
        f.size = size;
        if (p->emit(p, &f) == UINT64_MAX) return false;
    } else if (p->emit_data(p, ch->channel, v, size) == UINT64_MAX) return false;
    ch->credit--;
    netchan__entered(ch, size, memory);
    p->stats->values_sent++;
    return true;
}

/* Sends within credit, of which an offer of a large value costs as much; then the close, once all before it is on its
 * way. */
static void netchan__pair_end(netchan *ch) {
    netchan__peer *p = ch->home;
    if (p) netchan__hand_out(ch);
    if (!p || p->leaving) return;
    for (netchan__waiter *s; ch->credit && (s = netchan__next_sender(ch));) {
        if (s->size > NETCHAN__FRAGMENT || s->size > p->their_message || netchan__too_many_ends(p, &s->value)) {
            netchan__register(s);
            if (s->queue && !s->id) break; /* not now */
            continue;
        }
        if (!netchan__emit_data(ch, &s->value, s->size, s->memory)) return;
        netchan__dequeue(s);
        netchan__change_state(s->op, NETCHAN__OPEN, NETCHAN__ENGAGED);
        s->op->peer = p->number;
        netchan__finish(s->op, s, NETCHAN_OK);
    }
    netchan__relay_all(ch);
    if (!ch->may_send || !ch->closing || ch->close_sent || ch->detached) return;
    netchan__emit_ids(p, NETCHAN__CLOSE, ch->channel, 0, 0, 0, 0);
    ch->close_sent = true;
}

/* How many bytes of values a peer may have in offers, even if they swell. */
static size_t netchan__offer_limit(size_t max_memory) { return max_memory / 4 / NETCHAN__SWELL; }

/* Tells the home that w waits. What is sent into a buffer waits here for credit. */
static void netchan__register(netchan__waiter *w) {
    netchan__peer *p = w->ch->home;
    bool detached = w->op->detached;
    if (!p || p->down || p->leaving || w->id) return;
    if (w->is_send ? w->ch->closing && !detached : w->ch->closed) return; /* see P5 */
    bool large = w->size > NETCHAN__FRAGMENT;
    if (w->is_send && (w->size > p->their_message || netchan__too_many_ends(p, &w->value))) {
        if (!netchan__change_state(w->op, NETCHAN__OPEN, NETCHAN__ENGAGED)) return;
        netchan__dequeue(w);
        netchan__finish(w->op, w, NETCHAN_ETOOBIG);
        return;
    }
    bool costs = w->is_send && w->ch->credited && w->ch->lane.cap;
    if (costs && (!large || !w->ch->credit)) return;
    if (w->is_send && w->ch->detached && (!detached || netchan__next_sender(w->ch) != w)) return; /* those first */
    if (!w->is_send && w->ch->given_up) { /* see A2 */
        w->op->tries += w->is_try && !w->waits;
        w->waits = true;
        return;
    }
    uint64_t id = ++netchan__net.last_id;
    if (!netchan__map_put(&netchan__net.waiters, id, w)) {
        netchan__give_up(w);
        return;
    }
    w->id = id;
    w->peer = p;
    if (costs) w->ch->credit--;
    netchan__frame f = netchan__new_frame(w->is_send ? NETCHAN__OFFER : NETCHAN__DEMAND);
    f.channel = w->ch->channel;
    f.entry = id;
    f.op = w->op_id;
    f.size = w->size;
    if (w->is_send && !w->multi && (w->firm || w->is_try) && !large && !w->ch->far &&
        p->offering + w->size <= netchan__offer_limit(p->their_memory)) {
        w->here = true;
        f.has_value = true;
        f.value = w->value;
        p->offering += w->size;
    }
    f.flags = netchan__flag(w->multi, NETCHAN__MULTI) | netchan__flag(w->is_try, NETCHAN__TRY) |
              netchan__flag(w->firm, NETCHAN__FIRM) | netchan__flag(w->here, NETCHAN__HERE);
    uint64_t position = p->emit(p, &f);
    w->position = w->here ? position : 0;
    if (w->is_try && !w->waits) w->op->tries++;
    w->waits = false;
}

static void netchan__on_credit(netchan__peer *p, netchan__frame *f) {
    netchan *ch = p->send;
    if (!ch || f->channel != ch->channel || f->size > ch->in_flight || f->number > ch->lane.cap - ch->credit) {
        netchan__breach(p, "it lent more than the capacity");
        return;
    }
    ch->credit += (size_t)f->number;
    ch->in_flight -= (size_t)f->size;
    p->taken += f->size;
    if (ch->largest && ch->in_flight_bytes / ch->largest > ch->in_flight)
        ch->in_flight_bytes = ch->in_flight * ch->largest;
    netchan__mark_dirty(ch);
}

NETCHAN__SMALL_BEGIN
/* Local operations that wait in the queue end, unless they are engaged, or their value is at home: they learn its fate
 * from there. */
static void netchan__end_waiters(netchan__queue *q, int result) {
    for (netchan__waiter *w = q->head; w;) {
        if (!w->op || w->here || w->op->detached || !netchan__change_state(w->op, NETCHAN__OPEN, NETCHAN__ENGAGED)) {
            w = w->next;
            continue;
        }
        if (w->id) netchan__emit_entry(w, NETCHAN__WITHDRAW, 0, 0);
        netchan__finish(w->op, w, result);
        w = q->head;
    }
}

/* An end that this peer has given us, by the number of its channel, or NULL. */
static netchan *netchan__end_of(const netchan__peer *p, uint64_t channel, bool sends) {
    if (channel < NETCHAN__FIRST_EXPORT) return sends ? NULL : channel == 1 ? p->recv : NULL;
    netchan *ch = (netchan *)netchan__map_get(&p->imports, channel);
    return ch && ch->may_send == sends ? ch : NULL;
}

static void netchan__on_closed(netchan__peer *p, netchan__frame *f) {
    netchan *ch = netchan__end_of(p, f->channel, false);
    if (!ch && f->channel < NETCHAN__FIRST_EXPORT) netchan__breach(p, "it closed a channel that does not exist");
    if (!ch) return; /* it was dropped meanwhile */
    ch->closing = ch->closed = true;
    if (ch->rooms) netchan__give_early_back(ch); /* of values that were for whoever comes, before we were accepted */
    ch->given_up = 0; /* home has ended these entries, and answers nothing */
    netchan__end_waiters(&ch->receivers, NETCHAN_ECLOSED);
    netchan__tell_ends(ch, false, NETCHAN__CLOSED);
    netchan__relay_ended(ch);
}

/* Somebody has closed the channel of a sender end. */
static void netchan__on_closing(netchan__peer *p, netchan__frame *f) {
    netchan *ch = netchan__end_of(p, f->channel, true);
    if (!ch) return;
    ch->closing = ch->lane.closing = ch->close_sent = true;
    netchan__end_waiters(&ch->lane.senders, NETCHAN_ECLOSED);
    netchan__tell_ends(ch, true, NETCHAN__CLOSING);
    netchan__relay_ended(ch);
}

/* The end leads nowhere any more. What is being negotiated is finished; see P5. */
static void netchan__end_gone(netchan *ch) {
    ch->gone = true;
    netchan__end_waiters(&ch->lane.senders, NETCHAN_ELOST);
    netchan__end_waiters(&ch->receivers, NETCHAN_ELOST);
    netchan__relay_ended(ch);
    ch->senders_lost = ch->receivers_lost = true; /* who drops it tells that */
    netchan__tell_ends(ch, true, NETCHAN__GONE);
    netchan__tell_ends(ch, false, NETCHAN__GONE);
}

static void netchan__on_gone(netchan__peer *p, netchan__frame *f) {
    netchan *ch = f->channel < NETCHAN__FIRST_EXPORT ? NULL : (netchan *)netchan__map_get(&p->imports, f->channel);
    if (ch) netchan__end_gone(ch);
}

/* A send without a caller, of a value that was sent with OK and comes back. */
typedef struct netchan__detached {
    netchan__op op; /* first */
    netchan__waiter waiter;
} netchan__detached;

/* Makes one; the value is moved. Returns NULL when out of memory: the value is lost. */
static netchan__waiter *netchan__detach(netchan *ch, netchan_value *v, size_t size, size_t memory) {
    netchan__detached *d = (netchan__detached *)netchan__alloc(sizeof *d);
    if (!d) {
        ch->undelivered++;
        netchan_clear(v);
        return NULL;
    }
    netchan__set_up_alone(&d->op, &d->waiter, ch);
    d->op.detached = true;
    d->waiter.is_send = true;
    d->waiter.value = *v;
    d->waiter.size = size;
    d->waiter.memory = memory;
    *v = netchan__nil_value;
    ch->detached++;
    return &d->waiter;
}

/* Those in q become the first senders, in their order. */
static void netchan__requeue(netchan *ch, netchan__queue *q) {
    for (netchan__waiter *w; (w = q->tail);) {
        netchan__dequeue(w);
        netchan__enqueue(&ch->lane.senders, w, true);
    }
}

/* The home hangs up: a value that was in its buffer comes back, in one or several frames. */
static void netchan__on_return(netchan__peer *p, netchan__frame *f) {
    netchan *ch = p->send;
    size_t have = ch ? netchan__buf_size(&ch->returning) : 0, memory;
    bool fits = ch && f->size <= ch->in_flight_bytes && f->count <= f->size && have <= f->size - f->count;
    netchan_value v = netchan__nil_value;
    if (!fits || f->channel != ch->channel || !ch->in_flight) {
        netchan__breach(p, "it returned what was not sent");
        return;
    }
    if (!netchan__buf_append(&ch->returning, f->bytes, f->count)) {
        netchan__breach(p, "out of memory for a value that comes back");
        return;
    }
    if (have + f->count < f->size) return;
    const uint8_t *bytes = ch->returning.data + ch->returning.start;
    int result = netchan__decode_from(p, &v, bytes, (size_t)f->size, 2 * ch->largest_memory + 256, &memory);
    netchan__buf_free(&ch->returning);
    if (result != NETCHAN_OK) {
        netchan__breach(p, result == NETCHAN_ENOMEM ? "out of memory for a value that comes back"
                                                    : "it returned a value that cannot be decoded");
        return;
    }
    ch->in_flight--;
    ch->in_flight_bytes -= (size_t)f->size;
    p->returned++;
    p->stats->values_sent--;
    netchan__waiter *w = netchan__detach(ch, &v, (size_t)f->size, memory);
    if (w) netchan__enqueue(&ch->returned, w, false);
}

/* ====================================================================================================================
 * [10] Relays: ends that were passed on. Net.
 *
 * Whoever passes on an end of a channel that has its home elsewhere stands between. The waiters of others wait at the
 * end as netchan__remote, outside its queues, and under numbers of their own at the next process on the way to the
 * home, which they tell whose operations they are: the order of locks is the same everywhere. What comes for them from
 * either side is passed on, values whole.
 *
 * Invariants.
 *   R1  A claim that was passed on is answered to the home exactly once: by who was asked, or, when that process is
 *       lost, with a DECLINE that says whether it may have the value.
 *   R2  A waiter that was granted stays until the home has ended it, also when its process is lost; one that was asked
 *       stays until it answers, also when the home is lost.
 * ================================================================================================================== */

static netchan__remote *netchan__remote_of(netchan__waiter *w) { return (netchan__remote *)(void *)w; }

/* Gives back what the claim on it has reserved. */
static void netchan__relay_unclaim(netchan__remote *r) {
    netchan__waiter *w = &r->waiter;
    netchan__peer *giver = w->is_send ? w->peer : r->up;
    if (giver) giver->reserved -= w->announced;
    if (w->peer) w->peer->shipping -= r->size;
    if (giver && w->announced) netchan__has_room(giver);
    if (w->peer && r->size) netchan__has_room(w->peer);
    w->announced = r->size = 0;
    netchan__buf_free(&w->incoming.bytes);
    if (r->down) netchan__map_remove(&netchan__net.relays, r->down);
    r->down = w->claim = w->waited = 0;
    r->carried = false;
    r->step = NETCHAN__IDLE;
}

/* The process on the way to the home does not know it any more. */
static void netchan__relay_leave(netchan__remote *r) {
    if (r->up) netchan__map_remove(&netchan__net.waiters, r->up_id);
    r->up = NULL;
}

static void netchan__relay_forget(netchan__remote *r) {
    netchan__relay_unclaim(r);
    netchan__relay_leave(r);
    netchan__forget(&r->waiter);
}

/* Ends the operation of its process, as far as this case goes. */
static void netchan__relay_end(netchan__remote *r, int result) {
    if (r->waiter.peer) netchan__emit_entry(&r->waiter, NETCHAN__ACCEPT, 0, (uint64_t)-result);
    netchan__relay_forget(r);
}

static void netchan__relay_decline(netchan__remote *r, bool unknown) {
    if (r->up) netchan__emit_ids(r->up, NETCHAN__DECLINE, 0, 0, r->waiter.claim, unknown, 0);
}

/* It waits no longer, and is not being negotiated. */
static void netchan__relay_withdraw(netchan__remote *r) {
    if (r->up) netchan__emit_ids(r->up, NETCHAN__WITHDRAW, 0, r->up_id, 0, 0, 0);
    netchan__relay_forget(r);
}

/* What ends a waiter at this end before it is registered; OK: nothing. */
static int netchan__relay_result(const netchan__waiter *w) {
    const netchan *ch = w->ch;
    if (w->is_send ? ch->closing : ch->closed) return NETCHAN_ECLOSED;
    if (ch->gone) return NETCHAN_ELOST;
    return w->is_send && ch->home && w->size > ch->home->their_message ? NETCHAN_ETOOBIG : NETCHAN_OK;
}

/* Has this process, or that of the waiter, no room for the large value now? */
static bool netchan__relay_full(const netchan__remote *r, size_t size) {
    netchan__peer *p = r->waiter.peer;
    size_t held = r->waiter.is_send ? p->reserved : p->shipping;
    bool full = held && held + size > (r->waiter.is_send ? p->max_memory / 2 : netchan__ship_limit(p));
    p->waits |= full;
    return full;
}

/* Tells the process on the way to the home, if it can be done now. The waiter may be gone afterwards. */
static void netchan__relay_register(netchan__remote *r) {
    netchan__waiter *w = &r->waiter;
    netchan *ch = w->ch;
    netchan__peer *p = ch->home;
    int result = netchan__relay_result(w);
    if (r->up || !w->peer || r->step != NETCHAN__IDLE) return;
    if (result != NETCHAN_OK) {
        netchan__relay_end(r, result);
        return;
    }
    bool costs = w->is_send && ch->credited && ch->lane.cap;
    size_t large = w->is_send ? w->size : r->declined;
    bool full = large > NETCHAN__FRAGMENT && netchan__relay_full(r, large);
    if (!p || p->leaving || (costs && !ch->credit) || (w->is_try && p->down) || full) {
        if (!w->is_try) return;
        netchan__emit_entry(w, NETCHAN__WITHDRAWN, 0, 0);
        netchan__relay_forget(r);
        return;
    }
    if (!w->is_send && ch->given_up) return; /* see A2 */
    r->up_id = ++netchan__net.last_id;
    if (!netchan__map_put(&netchan__net.waiters, r->up_id, w)) {
        netchan__breach(w->peer, "out of memory for one of its operations");
        return;
    }
    r->up = p;
    if (costs) ch->credit--;
    netchan__frame f = netchan__new_frame(w->is_send ? NETCHAN__OFFER : NETCHAN__DEMAND);
    f.channel = ch->channel;
    f.entry = r->up_id;
    f.op = w->op_id;
    f.flags = NETCHAN__RELAYED | netchan__flag(w->multi, NETCHAN__MULTI) | netchan__flag(w->is_try, NETCHAN__TRY);
    memcpy(f.process, r->process, sizeof f.process);
    size_t most = r->most < w->peer->their_message ? r->most : w->peer->their_message;
    f.size = w->is_send ? w->size : most;
    p->emit(p, &f);
}

/* A waiter of another process has come to this end. */
static void netchan__relay(netchan__remote *r) {
    netchan *ch = r->waiter.ch;
    netchan__enqueue(&ch->relayed, &r->waiter, false);
    if (ch->rooms && !ch->receivers.head) netchan__give_early_back(ch); /* else they go to who waits here, in order */
    netchan__relay_register(r);
}

/* Registers those that had to wait for it. */
static void netchan__relay_all(netchan *ch) {
    netchan__waiter *next;
    for (netchan__waiter *w = ch->relayed.head; w; w = next) {
        next = w->next;
        netchan__relay_register(netchan__remote_of(w));
    }
}

/* The end is closed or gone: who waits at it and is not being negotiated learns it. */
static void netchan__relay_ended(netchan *ch) {
    netchan__waiter *next;
    for (netchan__waiter *w = ch->relayed.head; w; w = next) {
        next = w->next;
        netchan__remote *r = netchan__remote_of(w);
        int result = netchan__relay_result(w);
        if (result == NETCHAN_OK || r->step != NETCHAN__IDLE) continue;
        if (r->up) netchan__emit_ids(r->up, NETCHAN__WITHDRAW, 0, r->up_id, 0, 0, 0);
        netchan__relay_end(r, result);
    }
}

/* ---- From the home. ---- */

/* Does its operation hold room itself? Then it came here on a way round, through the same process twice. */
static bool netchan__relay_meets_itself(const netchan__remote *r) {
    const netchan__peer *p = r->waiter.peer;
    for (size_t i = 0; i < p->waiters.cap; i++) {
        netchan__waiter *w = (netchan__waiter *)netchan__map_at(&p->waiters, i);
        if (!w || w == &r->waiter || !netchan__same_op(w, &r->waiter)) continue;
        if (w->announced || w->match || netchan__remote_of(w)->size) return true;
    }
    return false;
}

static void netchan__relay_claim(netchan__peer *p, netchan__remote *r, netchan__frame *f) {
    netchan__waiter *w = &r->waiter;
    bool final = f->flags & NETCHAN__FINAL;
    size_t size = w->is_send ? w->size : f->size > SIZE_MAX / 4 ? SIZE_MAX / 4 : (size_t)f->size;
    if (r->step != NETCHAN__IDLE || !f->match || (f->has_value && (w->is_send || !final))) {
        netchan__breach(p, "it claimed what it had claimed already");
        return;
    }
    if (!w->is_send && (size > r->most || size > w->peer->their_message)) {
        netchan__breach(p, "it sent a value that is larger than was asked for");
        return;
    }
    w->claim = f->match;
    w->claim_final = final;
    r->down = ++netchan__net.last_id;
    bool large = size > NETCHAN__FRAGMENT, kept = !(large && netchan__relay_full(r, size));
    bool too_many = f->has_value && netchan__too_many_ends(w->peer, &f->value);
    if (too_many || (!kept && netchan__relay_meets_itself(r))) { /* it waits for the room that it holds itself */
        r->down = 0;
        netchan__relay_decline(r, false);
        netchan__relay_end(r, NETCHAN_ETOOBIG);
        return;
    }
    if (kept && !netchan__map_put(&netchan__net.relays, r->down, r)) {
        kept = false;
        netchan__breach(w->peer, "out of memory for one of its operations");
    }
    if (!kept) { /* it is registered again when there is room */
        r->declined = size;
        r->down = 0;
        netchan__relay_decline(r, false);
        netchan__relay_unclaim(r);
        netchan__relay_leave(r);
        if (!w->is_try) return;
        netchan__emit_entry(w, NETCHAN__WITHDRAWN, 0, 0);
        netchan__relay_forget(r);
        return;
    }
    if (large) {
        *(w->is_send ? &w->announced : &r->size) = size;
        *(w->is_send ? &w->peer->reserved : &w->peer->shipping) += size;
    }
    r->step = NETCHAN__CLAIMED;
    r->carried = f->has_value;
    netchan__frame g = *f;
    g.entry = w->id;
    g.match = r->down;
    w->position = w->peer->emit(w->peer, &g);
}

/* The value for an engaged receive is here, whole. */
static void netchan__relay_ship(netchan__remote *r, netchan_value value, size_t size) {
    netchan__waiter *w = &r->waiter;
    if (!w->peer || netchan__too_many_ends(w->peer, &value)) {
        netchan__relay_decline(r, false);
        netchan__relay_end(r, NETCHAN_ETOOBIG);
        return;
    }
    netchan__frame f = netchan__new_frame(NETCHAN__COMMIT);
    f.entry = w->id;
    f.match = r->down;
    f.flags = netchan__flag(w->claim_redelivered, NETCHAN__REDELIVERED);
    f.has_value = true;
    f.value = value;
    f.size = size;
    r->step = NETCHAN__SHIPPED;
    w->position = w->peer->emit(w->peer, &f);
}

static void netchan__relay_commit(netchan__peer *p, netchan__remote *r, netchan__frame *f) {
    netchan__waiter *w = &r->waiter;
    if (w->is_send || r->step != NETCHAN__GRANTED || f->match != w->claim || w->announced) {
        netchan__breach(p, "it committed a match that was not granted");
        return;
    }
    w->claim_redelivered = f->flags & NETCHAN__REDELIVERED;
    if (f->has_value) netchan__relay_ship(r, f->value, (size_t)f->size);
    else netchan__announce(p, f->size, &w->announced);
}

static void netchan__relay_fragment_down(netchan__peer *p, netchan__remote *r, netchan__frame *f) {
    netchan__waiter *w = &r->waiter;
    size_t size = w->announced, memory;
    netchan_value v = netchan__nil_value;
    if (w->is_send || r->step != NETCHAN__GRANTED) {
        netchan__breach(p, "it sent a fragment of nothing");
        return;
    }
    if (!netchan__gather(p, &w->incoming, size, f, &v, &memory)) return;
    p->reserved -= size;
    netchan__has_room(p);
    w->announced = 0;
    netchan__relay_ship(r, v, size);
    netchan_clear(&v);
}

static void netchan__relay_release(netchan__peer *p, netchan__remote *r, netchan__frame *f) {
    netchan__waiter *w = &r->waiter;
    bool granted = r->step == NETCHAN__GRANTED && f->match == w->claim && w->position <= p->sent;
    if (!granted || (!w->is_send && w->announced)) {
        netchan__breach(p, "it released a match that was not granted");
        return;
    }
    if (!w->peer) {
        netchan__relay_withdraw(r);
        return;
    }
    netchan__emit_entry(w, NETCHAN__RELEASE, r->down, 0);
    netchan__relay_unclaim(r);
}

/* A frame of the process on the way to the home, for a waiter that waits here. */
static void netchan__relay_down(netchan__peer *p, netchan__remote *r, netchan__frame *f) {
    netchan__waiter *w = &r->waiter;
    bool granted = r->step == NETCHAN__GRANTED && w->position <= p->sent;
    switch (f->type) {
    case NETCHAN__CLAIM: netchan__relay_claim(p, r, f); break;
    case NETCHAN__COMMIT: netchan__relay_commit(p, r, f); break;
    case NETCHAN__FRAGMENT_DOWN: netchan__relay_fragment_down(p, r, f); break;
    case NETCHAN__RELEASE: netchan__relay_release(p, r, f); break;
    case NETCHAN__ACCEPT:
        if (f->number > 15 || (!granted && (f->number == 0 || r->step != NETCHAN__IDLE)))
            netchan__breach(p, "it accepted what was not offered");
        else {
            if (!f->number) {
                p->stats->values_sent++;
                if (w->ch->credited && w->ch->lane.cap) netchan__entered(w->ch, w->size, w->memory);
                else p->taken++;
            }
            netchan__relay_end(r, -(int)f->number);
        }
        break;
    default: /* WITHDRAWN */
        if (r->step != NETCHAN__IDLE || !w->is_try) break;
        if (w->peer) netchan__emit_entry(w, NETCHAN__WITHDRAWN, 0, 0);
        netchan__relay_forget(r);
        break;
    }
}

/* ---- To the home. ---- */

/* It was granted; a sender's value is here, whole. */
static void netchan__relay_granted(netchan__remote *r, const netchan_value *value, size_t size) {
    netchan__waiter *w = &r->waiter;
    bool over = r->carried;
    if (r->up && w->is_send && netchan__too_many_ends(r->up, value)) {
        netchan__relay_decline(r, false);
        netchan__relay_end(r, NETCHAN_ETOOBIG);
        return;
    }
    if (!r->up) { /* the home was lost, and nobody else knows */
        if (over) netchan__relay_forget(r);
        else netchan__relay_end(r, NETCHAN_ELOST);
        return;
    }
    netchan__frame f = netchan__new_frame(NETCHAN__GRANT);
    f.match = w->claim;
    f.entry = r->up_id;
    f.has_value = w->is_send;
    f.value = *value;
    f.size = w->is_send ? size : 0;
    r->step = NETCHAN__GRANTED;
    w->waited = 0;
    w->position = r->up->emit(r->up, &f);
    if (over) netchan__relay_forget(r);
}

static void netchan__relay_grant(netchan__peer *p, netchan__remote *r, netchan__frame *f) {
    netchan__waiter *w = &r->waiter;
    bool whole = f->has_value || !w->is_send;
    if (r->step != NETCHAN__CLAIMED || (f->has_value && !w->is_send) || (w->is_send && f->size != w->size)) {
        netchan__breach(p, "it granted what was not claimed");
        return;
    }
    if (w->is_send) w->memory = f->memory;
    if (whole) netchan__relay_granted(r, &f->value, (size_t)f->size);
}

static void netchan__relay_fragment_up(netchan__peer *p, netchan__remote *r, netchan__frame *f) {
    netchan__waiter *w = &r->waiter;
    size_t size = w->announced, memory;
    netchan_value v = netchan__nil_value;
    if (!w->is_send || r->step != NETCHAN__CLAIMED) {
        netchan__breach(p, "it sent a fragment of nothing");
        return;
    }
    if (f->count == NETCHAN__FRAGMENT) w->waited = 0; /* it goes on */
    if (!netchan__gather(p, &w->incoming, size, f, &v, &memory)) return;
    w->memory = memory;
    netchan__relay_granted(r, &v, size);
    netchan_clear(&v);
}

/* A frame of the process whose waiter it is. */
static void netchan__relay_up(netchan__peer *p, netchan__remote *r, netchan__frame *f) {
    bool shipped = r->step == NETCHAN__SHIPPED && r->waiter.position <= p->sent;
    switch (f->type) {
    case NETCHAN__GRANT: netchan__relay_grant(p, r, f); break;
    case NETCHAN__FRAGMENT_UP: netchan__relay_fragment_up(p, r, f); break;
    case NETCHAN__DECLINE:
        if (r->step != NETCHAN__CLAIMED && !shipped) {
            netchan__breach(p, "it declined what was not claimed");
            break;
        }
        netchan__relay_decline(r, f->number != 0);
        netchan__relay_forget(r);
        break;
    default: /* TAKEN */
        if (!shipped) {
            netchan__breach(p, "it took what was not committed");
            break;
        }
        if (r->up) netchan__emit_ids(r->up, NETCHAN__TAKEN, 0, 0, r->waiter.claim, 0, 0);
        netchan__relay_forget(r);
        break;
    }
}

/* Its process is gone. */
static void netchan__relay_lost(netchan__remote *r, const netchan__peer *p) {
    netchan__waiter *w = &r->waiter;
    bool left = w->position <= p->sent;
    switch (r->step) {
    case NETCHAN__IDLE: netchan__relay_withdraw(r); return;
    case NETCHAN__CLAIMED: netchan__relay_decline(r, r->carried && left); break;
    case NETCHAN__SHIPPED: netchan__relay_decline(r, left); break;
    case NETCHAN__GRANTED:
        if (!r->up) break;
        if (w->is_send) w->announced = 0; /* that was the account of the peer */
        r->size = 0;
        netchan__map_remove(&w->peer->waiters, w->id);
        w->peer = NULL; /* R2 */
        return;
    }
    netchan__relay_forget(r);
}

/* The process on the way to the home is gone, and what waits at the end with it. */
static void netchan__relay_home_lost(netchan *ch, const netchan__peer *p) {
    netchan__waiter *next;
    for (netchan__waiter *w = ch->relayed.head; w; w = next) {
        next = w->next;
        netchan__remote *r = netchan__remote_of(w);
        if (r->up != p) continue;
        if (!w->is_send) w->announced = 0; /* that was the account of the home */
        bool unknown = w->is_send && r->step == NETCHAN__GRANTED && w->position <= p->sent && !p->farewell;
        netchan__relay_leave(r);
        if (r->step == NETCHAN__IDLE || r->step == NETCHAN__GRANTED)
            netchan__relay_end(r, unknown ? NETCHAN_EUNKNOWN : NETCHAN_ELOST);
    }
}

/* ====================================================================================================================
 * [11] Homes: entries of remote operations, and what these answer; the messages of a peer, one by one; what becomes of
 * all that when a session begins, when its link breaks, and when it ends. Net.
 * ================================================================================================================== */

/* Our channel, or end, that this peer means, or NULL. *x: the export, unless it is a channel of the link. */
static netchan *netchan__channel_of(const netchan__peer *p, uint64_t channel, bool sends, netchan__export **x) {
    *x = NULL;
    if (channel == 0) return sends && p->lane ? p->lane->ch : NULL;
    if (channel == 1) return sends ? NULL : p->work;
    *x = (netchan__export *)netchan__map_get(&p->exports, channel);
    return *x && (*x)->receives != sends ? (*x)->ch : NULL;
}

/* What is wrong with an OFFER or DEMAND for this channel; NULL: nothing. */
static const char *netchan__waiter_breach(const netchan__peer *p, const netchan__frame *f, const netchan *ch) {
    bool is_send = f->type == NETCHAN__OFFER, here = (f->flags & NETCHAN__HERE) != 0;
    bool ahead = (f->flags & NETCHAN__AHEAD) != 0;
    if (!ch || !f->entry || netchan__map_get(&p->waiters, f->entry) || here != f->has_value || (here && ch->is_end))
        return "it offered or demanded on a channel that does not exist, or twice";
    uint64_t kind = f->flags & (NETCHAN__MULTI | NETCHAN__TRY | NETCHAN__FIRM | NETCHAN__RELAYED);
    if (ahead && (f->channel != 1 || kind != NETCHAN__FIRM || is_send || p->ahead >= NETCHAN__EARLY_MOST))
        return "it asked for more values ahead of receives than it may";
    size_t others = p->ahead + (p->given_up < NETCHAN__EARLY_MOST ? p->given_up : (size_t)NETCHAN__EARLY_MOST);
    if ((!ahead && p->waiters.count - others >= p->max_ops) || (is_send && f->size > p->max_message) ||
        (here && p->offered + f->size > netchan__offer_limit(p->max_memory)))
        return "it has more operations than max_ops, or larger ones than max_message and max_memory";
    if (f->channel == 0 && p->lane->cap && !p->lane->closing && !p->lane->lent) return "it offered without credit";
    return NULL;
}

/* Makes the waiter of a remote operation, which is in no queue yet. Returns NULL after a breach. */
static netchan__remote *netchan__make_remote(netchan__peer *p, netchan__frame *f, netchan *ch) {
    const char *breach = netchan__waiter_breach(p, f, ch);
    netchan__remote *r = breach ? NULL : (netchan__remote *)netchan__alloc(sizeof *r);
    if (!r || !netchan__map_put(&p->waiters, f->entry, r)) {
        NETCHAN_FREE(r);
        netchan__breach(p, breach ? breach : "out of memory for one of its operations");
        return NULL;
    }
    netchan__waiter *w = &r->waiter;
    w->ch = ch;
    w->held = f->channel >= NETCHAN__FIRST_EXPORT;
    if (w->held) netchan_retain(ch);
    w->peer = p;
    w->peer_number = p->number;
    w->id = f->entry;
    w->op_id = f->op;
    w->value = f->value;
    f->value = netchan__nil_value;
    w->memory = f->memory;
    w->is_send = f->type == NETCHAN__OFFER;
    w->size = w->is_send ? (size_t)f->size : 0;
    r->most = !w->is_send && f->size && f->size < SIZE_MAX ? (size_t)f->size : SIZE_MAX;
    r->channel = f->channel;
    r->relayed = f->flags & NETCHAN__RELAYED;
    memcpy(r->process, r->relayed ? f->process : p->process, sizeof r->process);
    w->lane = !w->is_send || ch->is_end ? NULL : f->channel == 0 ? p->lane : &ch->lane;
    w->multi = f->flags & NETCHAN__MULTI;
    w->is_try = f->flags & NETCHAN__TRY;
    w->firm = (f->flags & NETCHAN__FIRM) && !w->multi && !w->is_try;
    w->ahead = f->flags & NETCHAN__AHEAD;
    p->ahead += w->ahead;
    w->here = f->flags & NETCHAN__HERE;
    if (w->here) p->offered += w->size;
    if (f->channel == 0 && p->lane->cap && !p->lane->closing) p->lane->lent--;
    return r;
}

/* A new waiter of a peer may find a partner. Who waited before it is not looked at where that can change nothing (I2):
 * there may be thousands. */
static void netchan__pair_waiter(netchan *ch, netchan__waiter *w) {
    netchan__peer *p = w->peer;
    uint64_t id = w->id;
    bool is_send = w->is_send;
    if (is_send && !(netchan__can_ask(w) && (!w->lane->cap || netchan__may_store(w)))) { /* until there is room */
        netchan__update_ready(w->lane);
        return;
    }
    if (is_send) netchan__fill(w->lane);
    else if (p->direct && p->direct->ch == ch) netchan__serve_only(p->direct);
    w = (netchan__waiter *)netchan__map_get(&p->waiters, id);
    if (w && w->queue && !is_send) netchan__pair_receiver(ch, w);
    else netchan__pair(ch);
}

/* A value on a claim that can be declined holds up those behind it. So before there is one more, those that became free
 * with this record go to rooms. */
static void netchan__serve_rooms(netchan__peer *p, netchan *ch) {
    if (!ch->is_dirty || !ch->ready || !ch->ahead.head) return;
    if (p->direct && p->direct->ch == ch) netchan__serve_only(p->direct);
    netchan__pair(ch);
}

static void netchan__on_waiter(netchan__peer *p, netchan__frame *f) {
    if (p->leaving) return; /* it learns that from our farewell */
    netchan__export *x;
    netchan *ch = netchan__channel_of(p, f->channel, f->type == NETCHAN__OFFER, &x);
    if (x && x->revoked) { /* it learns that from GONE, but for one whose value is here */
        if (f->has_value) netchan__emit_ids(p, NETCHAN__ACCEPT, 0, f->entry, 0, (uint64_t)-NETCHAN_ELOST, 0);
        return;
    }
    netchan__remote *r = netchan__make_remote(p, f, ch);
    if (!r) return;
    netchan__waiter *w = &r->waiter;
    if (ch->is_end) {
        netchan__relay(r);
        return;
    }
    if (w->is_send ? w->lane->closing : ch->closed) {
        if (w->here) netchan__finish_sender(w, NETCHAN_ECLOSED, 0);
        else {
            if (w->held) netchan__emit_entry(w, NETCHAN__ACCEPT, 0, (uint64_t)-NETCHAN_ECLOSED);
            netchan__forget(w);
        }
        return;
    }
    if (ch->gone) {
        netchan__finish_sender(w, NETCHAN_ELOST, 0);
        return;
    }
    if (!w->is_send && !w->firm) netchan__serve_rooms(p, ch);
    bool serves = !w->ahead || !p->no_redelivery; /* see netchan__queue_rooms() */
    if (serves) netchan__enqueue(netchan__queue_of(w), w, false);
    netchan__pair_waiter(ch, w);
    w = (netchan__waiter *)netchan__map_get(&p->waiters, f->entry); /* it may be gone now */
    if (!w || !w->is_try) return;
    w->withdrawn = true; /* if it is in a match: when that falls through */
    if (w->match) return;
    netchan__dequeue(w);
    netchan__wait_again(w);
}

/* Ends those waiters of this peer that are in no match. x: those of this export only, or NULL. */
static void netchan__leave_waiters(netchan__peer *p, const netchan__export *x) {
    for (size_t i = 0; i < p->waiters.cap;) { /* forgetting may move another waiter to this slot */
        netchan__waiter *w = (netchan__waiter *)netchan__map_at(&p->waiters, i);
        bool idle = w && !w->match && (!w->ch->is_end || netchan__remote_of(w)->step == NETCHAN__IDLE);
        bool meant = w && (!x || netchan__remote_of(w)->channel == x->id);
        if (!idle || !meant) {
            if (meant && x) w->withdrawn = true; /* when its match falls through */
            i++;
        } else {
            if (x) netchan__emit_entry(w, NETCHAN__ACCEPT, 0, (uint64_t)-NETCHAN_ELOST);
            if (w->ch->is_end) netchan__relay_withdraw(netchan__remote_of(w));
            else netchan__forget(w);
        }
    }
}

/* No new match with this peer: those of its waiters that are in none go. What is being negotiated is finished. */
static void netchan__leave(netchan__peer *p) {
    p->leaving = true;
    netchan__leave_waiters(p, NULL);
}

/* Who imported the end by name has no use of it any more; it drops it when it has heard that. */
static void netchan__revoke(netchan__export *x) {
    netchan__peer *p = x->peer;
    x->revoked = true;
    netchan__map_remove(&p->exported, x->key);
    netchan__leave_waiters(p, x);
    netchan__emit_ids(p, NETCHAN__GONE, x->id, 0, 0, 0, 0);
}

/* The peer lets go of an end. */
static void netchan__on_drop(netchan__peer *p, netchan__frame *f) {
    netchan__export *x = (netchan__export *)netchan__map_get(&p->exports, f->channel);
    if (!x || f->size > x->named || !f->size) {
        netchan__breach(p, "it dropped a channel end that it does not have");
        return;
    }
    x->named -= f->size;
    if (f->number) netchan__note_loss(x);
    if (!x->named) netchan__drop_export(x, false);
}

static void netchan__on_withdraw(netchan__peer *p, netchan__frame *f) {
    netchan__waiter *w = (netchan__waiter *)netchan__map_get(&p->waiters, f->entry);
    if (!w) return;
    if (w->firm && !w->ch->is_end) netchan__emit_entry(w, NETCHAN__WITHDRAWN, 0, 0); /* see A2 */
    netchan__lane *lane = w->lane;
    if (w->ch->is_end) { /* one that was claimed answers the claim */
        if (netchan__remote_of(w)->step == NETCHAN__IDLE) netchan__relay_withdraw(netchan__remote_of(w));
        return;
    }
    if (w->match) {
        p->ahead -= w->ahead && !w->withdrawn;
        p->given_up += w->ahead && !w->withdrawn;
        w->withdrawn = true;
    } else netchan__forget(w);
    if (lane) netchan__lane_changed(lane);
}

/* The match whose claim this peer answers, or NULL. step: which step it must be in; -1: either claim. */
static netchan__match *netchan__answered(netchan__peer *p, uint64_t id, int step) {
    netchan__match *m = (netchan__match *)netchan__map_get(&netchan__net.matches, id);
    if (!m || (step < 0 ? m->step > 1 : m->step != step)) return NULL;
    netchan__waiter *w = step == 3 ? m->receiver : netchan__party(m, m->step);
    return w && !w->op && !w->lost && w->peer == p ? m : NULL;
}

static void netchan__locked(netchan__match *m) {
    m->waited = 0;
    m->step++;
    netchan__progress(m);
}

static void netchan__on_grant(netchan__peer *p, netchan__frame *f) {
    netchan__match *m = netchan__answered(p, f->match, -1);
    netchan__waiter *w = m ? netchan__party(m, m->step) : NULL;
    bool again = w && !w->is_send && f->size;
    if (!w || m->granted || (w->is_send && f->size != w->size) || (!w->is_send && f->has_value) ||
        (again && !w->ahead)) {
        netchan__breach(p, "it granted what was not claimed");
        return;
    }
    if (!w->is_send) netchan__remote_of(w)->again = again;
    if (w->is_send && f->has_value) {
        m->value = f->value;
        m->memory = f->memory;
        f->value = netchan__nil_value;
    }
    m->granted = w->is_send && !f->has_value; /* the fragments follow */
    if (!m->granted) netchan__locked(m);
}

static void netchan__on_fragment_of_sender(netchan__peer *p, netchan__frame *f) {
    netchan__match *m = netchan__answered(p, f->match, -1);
    if (!m || !m->granted || netchan__party(m, m->step) != m->sender) {
        netchan__breach(p, "it sent a fragment of nothing");
        return;
    }
    if (f->count == NETCHAN__FRAGMENT) m->waited = 0; /* it goes on */
    if (!netchan__gather(p, &m->incoming, m->announced, f, &m->value, &m->memory)) return;
    m->granted = false;
    netchan__locked(m);
}

static void netchan__receiver_lost(netchan__match *m, netchan__peer *p, bool shipped);

/* Also of a value that was shipped to who relays it, and could not. */
static void netchan__on_decline(netchan__peer *p, netchan__frame *f) {
    netchan__match *m = netchan__answered(p, f->match, -1);
    if (!m) m = netchan__answered(p, f->match, 3);
    if (!m || (m->step == 3 && m->position > p->sent)) netchan__breach(p, "it declined what was not claimed");
    else netchan__receiver_lost(m, p, f->number && (m->step == 3 || m->carried));
}

static void netchan__on_taken(netchan__peer *p, netchan__frame *f) {
    netchan__match *m = netchan__answered(p, f->match, 3);
    if (m && m->position <= p->sent) netchan__end_match(m, NETCHAN_OK, p->number);
    else netchan__breach(p, "it took what was not committed");
}

/* The value is moved. */
static void netchan__on_data(netchan__peer *p, uint64_t channel, netchan_value *v, size_t size, size_t memory) {
    netchan__lane *lane = p->lane;
    if (!lane || channel != 0 || !lane->lent || lane->closing || !size) {
        netchan__breach(p, "it sent without credit, or after its close");
        return;
    }
    if (!netchan__lane_room(lane)) {
        netchan__breach(p, "out of memory for a value it sent");
        return;
    }
    lane->lent--;
    p->stats->values_received++;
    netchan__lane_push(lane, v, size, memory, p->number);
    bool waited_for = lane->ch->receivers.head || lane->senders.head || lane->returning;
    if (waited_for || !lane->lent) netchan__lane_changed(lane);
    else netchan__update_ready(lane); /* nobody has anything of it yet */
}

static void netchan__free_lane(netchan__lane *lane) {
    NETCHAN__UNLINK(lane->ch->lanes, lane, prev, next);
    netchan__lane_clear(lane);
    NETCHAN_FREE(lane);
}

/* A lane of a merge that is closed and empty goes. */
static void netchan__retire_lane(netchan__lane *lane) {
    netchan *ch = lane->ch;
    if (netchan__held(lane) || lane->matching || lane->senders.head) return;
    netchan__tell_left(lane);
    if (lane->peer) lane->peer->lane = NULL;
    if (netchan__net.on_drained) netchan__net.on_drained(lane);
    if (lane->is_ready) netchan__update_ready(lane);
    netchan__free_lane(lane);
    netchan__mark_dirty(ch);
}

static void netchan__close(netchan *ch);

static void netchan__on_close(netchan__peer *p, netchan__frame *f) {
    netchan__export *x;
    netchan *ch = netchan__channel_of(p, f->channel, true, &x);
    if (ch && x) {
        if (!ch->closing && !x->revoked) netchan__close(ch);
        return;
    }
    if (!p->lane || f->channel != 0 || p->lane->closing) {
        netchan__breach(p, "it closed a channel that does not exist, or twice");
        return;
    }
    p->lane->closing = p->lane->closed_by_peer = true;
    p->lane->lent = 0;
    netchan__end_senders(p->lane, NETCHAN_ECLOSED);
    netchan__lane_changed(p->lane);
}

/* Works off one message of a peer, which may be any bytes: what it may not say is a breach. Call netchan__settle()
 * after the last. */
static void netchan__handle(netchan__peer *p, netchan__frame *f) {
    bool from_home = f->type >= NETCHAN__CLAIM;
    netchan__waiter *w = from_home ? (netchan__waiter *)netchan__map_get(&netchan__net.waiters, f->entry) : NULL;
    netchan__remote *r = from_home ? NULL : (netchan__remote *)netchan__map_get(&netchan__net.relays, f->match);
    if (w && !w->op && netchan__remote_of(w)->up == p) {
        netchan__relay_down(p, netchan__remote_of(w), f);
        return;
    }
    if (r && r->waiter.peer == p) {
        netchan__relay_up(p, r, f);
        return;
    }
    switch (f->type) {
    case NETCHAN__OFFER: case NETCHAN__DEMAND: netchan__on_waiter(p, f); break;
    case NETCHAN__WITHDRAW: netchan__on_withdraw(p, f); break;
    case NETCHAN__GRANT: netchan__on_grant(p, f); break;
    case NETCHAN__DECLINE: netchan__on_decline(p, f); break;
    case NETCHAN__TAKEN: netchan__on_taken(p, f); break;
    case NETCHAN__DATA: netchan__on_data(p, f->channel, &f->value, (size_t)f->size, f->memory); break;
    case NETCHAN__CLOSE: netchan__on_close(p, f); break;
    case NETCHAN__FRAGMENT_UP: netchan__on_fragment_of_sender(p, f); break;
    case NETCHAN__DROP: netchan__on_drop(p, f); break;
    case NETCHAN__CLAIM: netchan__on_claim(p, f); break;
    case NETCHAN__COMMIT: netchan__on_commit(p, f); break;
    case NETCHAN__RELEASE: netchan__on_release(p, f); break;
    case NETCHAN__ACCEPT: netchan__on_accept(p, f); break;
    case NETCHAN__WITHDRAWN: netchan__on_withdrawn(p, f); break;
    case NETCHAN__CREDIT: netchan__on_credit(p, f); break;
    case NETCHAN__CLOSED: netchan__on_closed(p, f); break;
    case NETCHAN__RETURN: netchan__on_return(p, f); break;
    case NETCHAN__FRAGMENT_DOWN: netchan__on_fragment_for_receiver(p, f); break;
    case NETCHAN__CLOSING: netchan__on_closing(p, f); break;
    case NETCHAN__GONE: netchan__on_gone(p, f); break;
    default: break;
    }
}

/* The last fragment of a large value stands in the stream and ends at this position. from_home: it was committed, else
 * granted. */
static void netchan__shipped(netchan__peer *p, bool from_home, uint64_t entry, uint64_t match, uint64_t position) {
    netchan__match *m = from_home ? (netchan__match *)netchan__map_get(&netchan__net.matches, match) : NULL;
    netchan__remote *r = from_home ? (netchan__remote *)netchan__map_get(&netchan__net.relays, match) : NULL;
    netchan__waiter *w = from_home ? NULL : (netchan__waiter *)netchan__map_get(&netchan__net.waiters, entry);
    if (m) m->position = position;
    if (r && r->waiter.peer == p) r->waiter.position = position;
    if (w && (w->op ? w->peer : netchan__remote_of(w)->up) == p) w->position = position;
}

/* May nothing more be sent here? What is for one peer alone may go to a channel of its own. */
static bool netchan__is_closing(const netchan__waiter *s) {
    return s->ch->closing || (s->lane && (s->lane->closing || s->lane->ch->closing));
}

/* P5: an operation that was engaged is open again. */
static void netchan__reopen(netchan__op *op) {
    op->engaged = NULL;
    if (op->expired || (op->tries == 0 && op->waiters[0].is_try)) {
        netchan__finish(op, NULL, NETCHAN_ETIMEDOUT);
        return;
    }
    for (size_t i = 0; i < op->count; i++) {
        netchan__waiter *w = &op->waiters[i];
        if (!w->ch || w->match || w->claim) continue; /* what is being negotiated is finished first */
        bool closed = w->is_send ? netchan__is_closing(w) && !op->detached : w->ch->closed;
        bool lost = w->lost || w->ch->gone;
        if (!closed && !lost && !w->starved) continue;
        if (w->peer) netchan__emit_entry(w, NETCHAN__WITHDRAW, 0, 0); /* it may be registered with the next home */
        netchan__finish(op, w, closed       ? NETCHAN_ECLOSED
                               : w->refused ? w->refused
                               : lost       ? NETCHAN_ELOST
                                            : NETCHAN_ENOMEM);
        return;
    }
    netchan__set_state(op, NETCHAN__OPEN);
    netchan__waiter *w = op->claims;
    if (!w) {
        for (size_t i = 0; i < op->count; i++)
            if (op->waiters[i].ch) netchan__mark_dirty(op->waiters[i].ch);
        for (size_t i = 0; i < op->count && netchan__state(op) == NETCHAN__OPEN;
             i++) /* what was too big meanwhile learns it */
            if (op->waiters[i].queue && op->waiters[i].ch->is_end) netchan__register(&op->waiters[i]);
        return;
    }
    op->claims = w->next_claim;
    if (!op->claims) op->last_claim = NULL;
    if (!w->match) {
        netchan__grant(w);
        return;
    }
    netchan__set_state(op, NETCHAN__ENGAGED);
    op->engaged = w;
    w->claim = 0;
    netchan__locked(w->match);
}

/* Who does not answer a claim holds up whoever waits on the other side of the match: after its patience that is a
 * breach. What is relayed may have to wait for several processes. *waited: for how long it was seen waiting. */
static void netchan__check_answer(netchan__peer *p, uint64_t *waited, uint64_t gap, unsigned hops) {
    uint64_t patience = p->patience > UINT64_MAX / hops ? UINT64_MAX : p->patience * hops;
    if (p->down) gap /= 4; /* who breaks its link again and again shall not wait for ever */
    if (!*waited) *waited = 1;
    else *waited += gap < patience / 4 ? gap : patience / 4; /* this process may have been stopped */
    if (*waited > patience) netchan__breach(p, "it does not answer");
}

static void netchan__check_claims(uint64_t now) {
    enum { HOPS = 4 };
    uint64_t gap = now - netchan__net.checked;
    netchan__net.checked = now;
    for (size_t i = 0; i < netchan__net.matches.cap; i++) {
        netchan__match *m = (netchan__match *)netchan__map_at(&netchan__net.matches, i);
        netchan__waiter *asked = !m ? NULL : m->step == 3 ? m->receiver : netchan__party(m, m->step);
        if (!asked || asked->op || !asked->peer || asked->lost) continue;
        netchan__check_answer(asked->peer, &m->waited, gap, netchan__remote_of(asked)->relayed ? HOPS : 1);
    }
    for (size_t i = 0; i < netchan__net.relays.cap; i++) {
        netchan__remote *r = (netchan__remote *)netchan__map_at(&netchan__net.relays, i);
        if (!r) continue;
        netchan__waiter *w = &r->waiter;
        if (w->peer && (r->step == NETCHAN__CLAIMED || r->step == NETCHAN__SHIPPED))
            netchan__check_answer(w->peer, &w->waited, gap, r->relayed ? HOPS : 1);
        else if (r->up && r->step == NETCHAN__GRANTED) netchan__check_answer(r->up, &w->waited, gap, HOPS);
    }
    for (size_t i = 0; i < netchan__net.waiters.cap; i++) { /* a home may have to wait for others itself */
        netchan__waiter *w = (netchan__waiter *)netchan__map_at(&netchan__net.waiters, i);
        if (!w || !w->op || !w->peer) continue;
        bool engaged = netchan__state(w->op) >= NETCHAN__ENGAGED && w->op->engaged == w;
        if (engaged || w->is_try) netchan__check_answer(w->peer, &w->waited, gap, HOPS);
        else w->waited = 0;
    }
    for (netchan__peer *p = netchan__net.peers; p; p = p->next_peer)
        if (p->recv && p->recv->given_up && !p->leaving) netchan__check_answer(p, &p->recv->given_up_waited, gap, HOPS);
}

static bool netchan__is_dead(void);
static bool netchan__bury(void);

/* Works off what the last steps set free, until nothing more can happen (I2). Caller holds netchan__net_lock. */
static void netchan__settle(void) {
    for (;;) {
        if (netchan__net.declined) {
            netchan__match *m = netchan__net.declined;
            netchan__net.declined = m->next_declined;
            netchan__fall_through(m, m->step == 1);
        } else if (netchan__net.released) {
            netchan__op *op = netchan__net.released;
            netchan__unlist_released(op);
            netchan__reopen(op);
        } else if (netchan__net.urgent) {
            netchan__lane *lane = netchan__net.urgent;
            netchan__net.urgent = lane->next_changed;
            lane->is_changed = false;
            if (lane->only) netchan__serve_only(lane);
            else if (!lane->matching) netchan__free_lane(lane);
        } else if (netchan__net.dirty) {
            netchan *ch = netchan__net.dirty;
            netchan__net.dirty = ch->next_dirty;
            ch->is_dirty = false;
            if (ch->is_end) netchan__pair_end(ch);
            else netchan__pair(ch);
        } else if (netchan__net.changed) { /* after its channel: it may be empty now */
            netchan__lane *lane = netchan__net.changed;
            netchan__net.changed = lane->next_changed;
            lane->is_changed = false;
            netchan__fill(lane);
            if (lane->is_ready) netchan__mark_dirty(lane->ch);
            if (lane->closing && !lane->is_changed) netchan__retire_lane(lane);
        } else if (!netchan__is_dead() || !netchan__bury()) return;
    }
}

/* ---- A session begins and ends. ---- */

/* Tells the home of everything that waits at an end and that it does not know. */
static void netchan__register_all(netchan *ch) {
    netchan__queue *queues[2] = {&ch->lane.senders, &ch->receivers};
    netchan__pair_end(ch);
    for (int i = 0; i < 2; i++) {
        netchan__waiter *next;
        for (netchan__waiter *w = queues[i]->head; w; w = next) {
            next = w->next;
            netchan__register(w);
            if (!w->queue) next = queues[i]->head; /* its operation is over, and perhaps that was of the next as well */
        }
    }
}

/* The dialling side has a session. */
static void netchan__end_up(netchan__peer *p, netchan *ch) {
    ch->home = p;
    ch->credit = ch->in_flight = ch->in_flight_bytes = 0;
    ch->close_sent = false;
    netchan__register_all(ch);
}

/* The first try that this peer has not answered, and whose value it has not got: a home can take nothing from it
 * without a claim. */
static netchan__waiter *netchan__open_try(netchan__queue *q, netchan__peer *p) {
    netchan__waiter *w = q->head;
    while (w && !(w->is_try && (w->peer == p || w->waits) && !w->here && !w->claim)) w = w->next;
    return w;
}

/* The link is broken. Tries do not wait for the next. */
static void netchan__end_down(netchan__peer *p, netchan *ch) {
    netchan__queue *queues[2] = {&ch->lane.senders, &ch->receivers};
    for (int i = 0; i < 2; i++)
        for (netchan__waiter *w; (w = netchan__open_try(queues[i], p));) {
            if (w->id) netchan__emit_entry(w, NETCHAN__WITHDRAW, 0, 0);
            netchan__try_failed(w);
        }
    for (netchan__waiter *w = ch->relayed.head, *next; w; w = next) {
        next = w->next;
        if (!w->is_try || netchan__remote_of(w)->step != NETCHAN__IDLE || !w->peer) continue;
        netchan__emit_entry(w, NETCHAN__WITHDRAWN, 0, 0);
        netchan__relay_withdraw(netchan__remote_of(w));
    }
}

/* Calls f for each end that this peer has given us, in values. */
static void netchan__each_import(netchan__peer *p, void (*f)(netchan__peer *p, netchan *ch)) {
    for (size_t i = 0; i < p->imports.cap; i++)
        if (p->imports.slots[i].key) f(p, (netchan *)p->imports.slots[i].item);
}

/* Those that can be served are in the queue: nobody is to look at thousands of others. Without redelivery that is none:
 * if the peer died, nobody would know whether it had taken what came early. */
static void netchan__queue_rooms(netchan__peer *p) {
    for (size_t i = 0; i < p->waiters.cap && p->ahead; i++) {
        netchan__waiter *w = (netchan__waiter *)netchan__map_at(&p->waiters, i);
        if (!w || !w->ahead || w->match) continue;
        netchan__dequeue(w);
        if (!p->down && !p->no_redelivery) netchan__enqueue(netchan__queue_of(w), w, false);
    }
}

static void netchan__peer_down(netchan__peer *p) {
    p->down = true;
    netchan__queue_rooms(p);
    if (p->send) netchan__end_down(p, p->send);
    if (p->recv) netchan__end_down(p, p->recv);
    netchan__each_import(p, netchan__end_down);
}

static void netchan__end_back(netchan__peer *p, netchan *ch) {
    (void)p;
    netchan__register_all(ch);
}

/* A new link carries on: what had to wait for it goes on. */
static void netchan__peer_up(netchan__peer *p) {
    p->down = false;
    if (p->send) netchan__register_all(p->send);
    if (p->recv) netchan__register_all(p->recv);
    netchan__queue_rooms(p);
    netchan__each_import(p, netchan__end_back);
    netchan__mark_exports(p);
    if (p->work) netchan__mark_dirty(p->work);
    if (p->lane) netchan__lane_changed(p->lane);
    if (p->direct) netchan__lane_changed(p->direct);
}

/* One local waiter at an end whose home is gone. Truthful: what never left may go again, what may have been taken is
 * unknown. */
static void netchan__waiter_lost(netchan__waiter *w, uint64_t sent) {
    netchan__op *op = w->op;
    bool engaged = op->engaged == w && netchan__state(op) >= NETCHAN__ENGAGED;
    bool is_try = w->is_try, registered = w->id != 0 || w->waits;
    netchan__peer *p = w->peer;
    w->waits = false;
    bool left = w->is_send && w->position && w->position <= sent && (engaged || w->here) && !p->farewell;
    if (w->claim && !engaged) netchan__unqueue_claim(w); /* of the home that is gone */
    netchan__unregister(w);
    w->position = 0;
    if (left) p->unknown++;
    if (engaged) netchan__finish(op, w, left ? NETCHAN_EUNKNOWN : NETCHAN_ELOST);
    else if (left) {
        if (netchan__change_state(op, NETCHAN__OPEN, NETCHAN__ENGAGED)) {
            netchan__dequeue(w);
            netchan__finish(op, w, NETCHAN_EUNKNOWN);
        }
    } else if (is_try && registered) netchan__try_failed(w);
    else if (!w->is_send && registered) {
        if (netchan__change_state(op, NETCHAN__OPEN, NETCHAN__ENGAGED)) {
            netchan__dequeue(w);
            netchan__finish(op, w, NETCHAN_ELOST);
        } else w->lost = true; /* it is engaged with another home; see P5 */
    } else if (w->is_send && w->ch->closing && !op->detached &&
               netchan__change_state(op, NETCHAN__OPEN, NETCHAN__ENGAGED)) {
        netchan__dequeue(w); /* its value was at home when the channel was closed, and did not leave */
        netchan__finish(op, w, NETCHAN_ECLOSED);
    } /* else it waits for the next session */
}

/* The dialling side has lost its session. unsent: values that were sent within credit and never left, in their order.
 * They and those that the home has handed back are to be sent again, before all others. */
static void netchan__end_lost(netchan *ch, netchan__peer *p, netchan__queue *unsent) {
    p->unknown += ch->in_flight;
    ch->home = NULL;
    ch->credit = ch->in_flight = ch->in_flight_bytes = 0;
    netchan__buf_free(&ch->returning);
    netchan__queue *queues[2] = {&ch->lane.senders, &ch->receivers};
    netchan__drop_early(ch);
    for (int i = 0; i < 2; i++) {
        for (bool again = true; again;) {
            again = false;
            for (netchan__waiter *w = queues[i]->head; w && !again; w = w->next)
                if (w->peer == p || (w->waits && w->is_try)) {
                    netchan__waiter_lost(w, p->sent);
                    again = true;
                }
        }
    }
    netchan__requeue(ch, unsent);
    netchan__requeue(ch, &ch->returned);
    netchan__relay_home_lost(ch, p);
}

/* An end that came in a value has lost its home, for good. */
static void netchan__import_lost(netchan__peer *p, netchan *ch) {
    netchan__queue none = {NULL, NULL};
    netchan__end_lost(ch, p, &none);
    for (netchan__waiter *w = ch->relayed.head, *next; w; w = next) { /* what was not registered */
        next = w->next;
        if (netchan__remote_of(w)->step == NETCHAN__IDLE) netchan__relay_end(netchan__remote_of(w), NETCHAN_ELOST);
    }
    netchan__end_gone(ch);
}

/* The party of the match that was asked declines, or is gone. shipped: it is the receiver, and may have the value; else
 * it certainly has not. */
static void netchan__receiver_lost(netchan__match *m, netchan__peer *p, bool shipped) {
    if (!shipped) {
        bool both = m->step == 3;
        if (both) m->step = m->receiver_first ? 0 : 1;
        netchan__fall_through(m, both || m->step == 1);
    } else if (!m->from_buffer || p->no_redelivery) {
        p->unknown++;
        netchan__end_match(m, NETCHAN_EUNKNOWN, 0);
    } else {
        netchan__unlink_match(m);
        netchan__forget(m->receiver);
        netchan__settle_buffer(m, true, true);
        netchan__free_match(m);
    }
}

/* The fate of a match one of whose parties is gone (P2). Returns whether it ended. */
static bool netchan__match_lost(netchan__match *m, netchan__peer *p) {
    netchan__waiter *asked = m->step == 3 ? m->receiver : netchan__party(m, m->step);
    if (!asked || asked->op || asked->peer != p) return false; /* the one that is asked lives, and will answer */
    bool shipped = asked == m->receiver && (m->step == 3 || m->carried) && m->position <= p->sent;
    p->returned += !shipped && m->from_buffer && (m->step == 3 || m->carried);
    netchan__receiver_lost(m, p, shipped);
    return true;
}

/* Ends what is being negotiated with the waiters of a peer that is gone. Returns whether something was: that may have
 * moved others in the map. */
static bool netchan__end_negotiations(netchan__peer *p) {
    bool ended = false;
    for (size_t i = 0; i < p->waiters.cap; i++) {
        netchan__waiter *w = (netchan__waiter *)netchan__map_at(&p->waiters, i);
        if (w && w->match) ended |= netchan__match_lost(w->match, p);
        else if (w && w->ch->is_end) {
            netchan__relay_lost(netchan__remote_of(w), p);
            ended = true;
        }
    }
    return ended;
}

/* The values in this buffer have nobody to go to. Returns how many were certainly not taken; *unknown: of how many
 * others nobody knows. */
static size_t netchan__lose_values(netchan__lane *lane, uint64_t *unknown) {
    size_t count = 0;
    for (size_t i = lane->first; i != lane->last; i++) {
        if (netchan__slot_at(lane, i)->redelivered) ++*unknown;
        else count++;
    }
    netchan__lane_empty(lane);
    return count;
}

/* Those for this process alone. Returns likewise. */
static size_t netchan__end_direct(netchan__peer *p) {
    netchan__lane *lane = p->direct;
    if (!lane) return 0;
    p->direct = NULL;
    lane->only = NULL;
    lane->closing = true;
    size_t count = netchan__lose_values(lane, &p->unknown);
    netchan__end_senders(lane, NETCHAN_ELOST);
    netchan__lane_changed(lane); /* it is freed when no match needs it */
    return count;
}

/* Values that wait for receivers here which are engaged elsewhere do not wait any more: they come back to their lanes.
 * The channel was shut. */
static void netchan__call_off(netchan *ch) {
    netchan__match *next;
    for (netchan__match *m = ch->matches; m; m = next) {
        netchan__waiter *r = m->receiver;
        next = m->next;
        if (!m->from_buffer || !r || !r->op || r->claim != m->id) continue;
        netchan__unqueue_claim(r);
        r->claim = 0;
        r->match = NULL; /* its operation looks at closed cases when it is released */
        m->receiver = NULL;
        m->receiver_gone = true;
        netchan__fall_through(m, m->step == 1);
    }
    netchan__settle();
}

/* The session with p is over, at home: its waiters go, its matches end or wait for the other party, its values stay. */
static void netchan__home_lost(netchan__peer *p) {
    for (size_t i = 0; i < p->waiters.cap; i++)
        if (p->waiters.slots[i].key) ((netchan__waiter *)p->waiters.slots[i].item)->lost = true;
    while (netchan__end_negotiations(p)) continue;
    p->undelivered = netchan__end_direct(p); /* with what came back */
    netchan__leave(p);
    for (size_t i = 0; i < p->waiters.cap; i++)
        if (p->waiters.slots[i].key) ((netchan__waiter *)p->waiters.slots[i].item)->peer = NULL;
    netchan__map_free(&p->waiters);
    if (p->lane) {
        p->lane->closing = p->lane->orphaned = true;
        p->lane->lent = 0;
        p->lane->peer = NULL;
        netchan__lane_changed(p->lane);
        p->lane = NULL;
    }
    p->work = NULL;
}

/* All ends that it had from us, and we from it, are lost. */
static void netchan__ends_lost(netchan__peer *p) {
    netchan__each_import(p, netchan__import_lost);
    netchan__map_free(&p->imports);
    for (size_t i = 0; i < p->exports.cap;) {
        if (p->exports.slots[i].key) netchan__drop_export((netchan__export *)p->exports.slots[i].item, true);
        else i++;
    }
    netchan__map_free(&p->exports);
    netchan__map_free(&p->exported);
}

NETCHAN__SMALL_END

/* ====================================================================================================================
 * [12] Operations: what a blocked call does. It registers one waiter per case under the locks of all its channels,
 * pairs, and, if nothing could happen at once, sleeps on its own condition until somebody finishes it or its time is
 * up.
 * ================================================================================================================== */

static pthread_mutex_t *netchan__lock_of(netchan *ch) { return __atomic_load_n(&ch->lock, __ATOMIC_ACQUIRE); }

/* Channels under netchan__net_lock whose last holder has let go. They are buried by whoever settles next: what is freed
 * while the lock is held may still be in use there; and an end may come back until then. Taken after all other locks;
 * netchan__dead is also read without it. */
static pthread_mutex_t netchan__dead_lock = PTHREAD_MUTEX_INITIALIZER;
static netchan *netchan__dead;

/* Is there one? */
static bool netchan__is_dead(void) { return __atomic_load_n(&netchan__dead, __ATOMIC_SEQ_CST) != NULL; }

/* The loop is to go round once more, whoever runs it. A caller that is at it looks before it leaves. */
static void netchan__wake_loop(void) {
    if (netchan__net.runner == NETCHAN__CALLER && !netchan__net.polling) return;
    netchan__net.wake = false;
    if (netchan__net.polling) {
        netchan__net.polling = false;
        while (write(netchan__net.wake_fd, "", 1) < 0 && errno == EINTR) continue; /* a full pipe wakes as well */
    } else if (netchan__net.runner == NETCHAN__NOBODY && netchan__net.alive) {
        netchan__net.lent = false;
        pthread_cond_broadcast(&netchan__net.turn);
    }
}

static bool netchan__push_out(void);
static void netchan__run_loop(netchan__op *op, uint64_t deadline);

/* The channel whose own lock it is. */
static netchan *netchan__owner_of(pthread_mutex_t *lock) {
    return (netchan *)(void *)((char *)lock - offsetof(netchan, own.receiving));
}

static void netchan__give_back(pthread_mutex_t *lock) {
    if (lock != &netchan__net_lock) {
        netchan__unlock_own(netchan__owner_of(lock));
        return;
    }
    netchan__settle();
    if (netchan__net.pending) netchan__push_out();
    if (netchan__net.wake) netchan__wake_loop();
    pthread_mutex_unlock(lock);
}

/* Who lets go of a channel while another thread has the lock leaves it to that thread: it looks after it has given the
 * lock back. */
static void netchan__bury_rest(void) {
    while (netchan__is_dead() && pthread_mutex_trylock(&netchan__net_lock) == 0) {
        netchan__give_back(&netchan__net_lock);
        netchan__wake_finished();
    }
}

static NETCHAN__OUT_OF_LINE void netchan__unlock_one(pthread_mutex_t *lock) {
    netchan__give_back(lock);
    netchan__wake_finished();
    netchan__bury_rest();
}

static void netchan__pause(int count) {
    for (int i = 0; i < count; i++) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
        __asm__ volatile("isb");
#else
        __asm__ volatile("" ::: "memory");
#endif
    }
}

/* Waits for another thread that is about to be done; round counts up from 0. It may need this one's core, and may not
 * get it from one of a higher priority that only yields. */
static void netchan__let_others(int round) {
    enum { PAUSES = 256, YIELDS = 64 };
    struct timespec moment = {0, 50000};
    if (round < PAUSES) netchan__pause(1);
    else if (round < PAUSES + YIELDS) sched_yield();
    else nanosleep(&moment, NULL);
}

/* Pauses twice as long as the last time; *pauses begins as 0, or as netchan__first_pauses. Returns false when it is
 * time to sleep. */
static bool netchan__back_off(int *pauses) {
    enum { FIRST = 16, LAST = 512 };
    *pauses = *pauses ? 2 * *pauses : (int)FIRST;
    if (*pauses > LAST) return false;
    netchan__pause(*pauses);
    return true;
}

/* Waiting without sleep is of no use, and not done for a while, when it was not several times in a row. */
static NETCHAN__THREAD_LOCAL unsigned netchan__spun_in_vain;

static bool netchan__spins_well(void) {
    enum { MOST = 4 };
    return netchan__spun_in_vain < MOST;
}

/* Also now and then when it was in vain. */
static bool netchan__may_spin(void) {
    enum { EVERY = 16 };
    return netchan__spins_well() || netchan__spun_in_vain++ % EVERY == 0;
}

static bool netchan__note_spin(bool hit) {
    netchan__spun_in_vain = hit ? 0 : netchan__spun_in_vain + 1;
    return hit;
}

/* Tries for some microseconds before it sleeps, less and less often: who has the lock then gets several things done in
 * a row. */
static void netchan__take_lock(pthread_mutex_t *lock) {
    int pauses = 0;
    do
        if (pthread_mutex_trylock(lock) == 0) return;
    while (netchan__back_off(&pauses));
    pthread_mutex_lock(lock);
}

/* All of a channel's lock. */
static void netchan__take_whole(pthread_mutex_t *lock) {
    netchan__take_lock(lock);
    if (lock != &netchan__net_lock) netchan__take_lock(&netchan__owner_of(lock)->own.sending);
}

static pthread_mutex_t *netchan__lock_channel(netchan *ch) {
    for (;;) {
        pthread_mutex_t *lock = netchan__lock_of(ch);
        netchan__take_whole(lock);
        if (lock == netchan__lock_of(ch)) {
            if (lock != &netchan__net_lock) netchan__update_ready(&ch->lane); /* I5 */
            return lock;
        }
        netchan__give_back(lock);
    }
}

/* Takes one mutex of a channel's own lock. Returns false when it has no lock of its own. */
static bool netchan__lock_side(netchan *ch, pthread_mutex_t *side) {
    if (netchan__is_net(ch)) return false;
    netchan__take_lock(side);
    if (!netchan__is_net(ch)) return true;
    pthread_mutex_unlock(side);
    return false;
}

/* The mutexes of all channels of an operation, sorted, each once. */
typedef struct netchan__locks {
    pthread_mutex_t **items;
    size_t count;
} netchan__locks;

static int netchan__compare_locks(const void *a, const void *b) {
    uintptr_t x = (uintptr_t)*(pthread_mutex_t *const *)a, y = (uintptr_t)*(pthread_mutex_t *const *)b;
    return x < y ? -1 : x > y;
}

/* Collects them as they are now. Returns whether one is netchan__net_lock, which then stands for all. */
static bool netchan__collect_locks(const netchan__op *op, netchan__locks *locks) {
    locks->count = 0;
    for (size_t i = 0; i < op->count; i++) {
        if (!op->waiters[i].ch) continue;
        pthread_mutex_t *lock = netchan__lock_of(op->waiters[i].ch);
        if (lock == &netchan__net_lock) {
            locks->items[0] = lock;
            locks->count = 1;
            return true;
        }
        locks->items[locks->count++] = lock;
    }
    if (locks->count < 2) return false;
    qsort(locks->items, locks->count, sizeof(pthread_mutex_t *), netchan__compare_locks);
    size_t kept = 1;
    for (size_t i = 1; i < locks->count; i++)
        if (locks->items[i] != locks->items[kept - 1]) locks->items[kept++] = locks->items[i];
    locks->count = kept;
    return false;
}

static void netchan__unlock_all(netchan__locks *locks) {
    while (locks->count) netchan__give_back(locks->items[--locks->count]);
    netchan__wake_finished();
    netchan__bury_rest();
}

static void netchan__lock_all(netchan__op *op, netchan__locks *locks) {
    for (;;) {
        bool net = netchan__collect_locks(op, locks), same = true;
        for (size_t i = 0; i < locks->count; i++) netchan__take_whole(locks->items[i]);
        if (net) {
            for (size_t i = 0; i < op->count; i++)
                if (op->waiters[i].ch) netchan__adopt(op->waiters[i].ch);
            op->net = true;
            return;
        }
        for (size_t i = 0; i < op->count; i++) {
            if (!op->waiters[i].ch) continue;
            if (netchan__is_net(op->waiters[i].ch)) same = false;
            else netchan__update_ready(&op->waiters[i].ch->lane); /* I5 */
        }
        if (same) return;
        netchan__unlock_all(locks);
    }
}

static NETCHAN__OUT_OF_LINE uint64_t netchan__now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* xorshift64* (Vigna 2016): only fairness depends on it. */
static uint64_t netchan__random(void) {
    static NETCHAN__THREAD_LOCAL uint64_t state;
    if (!state) state = netchan__now_ns() ^ (uint64_t)(uintptr_t)&state ^ 0x9E3779B97F4A7C15u;
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545F4914F6CDD1Du;
}

static void netchan__cond_init(pthread_cond_t *cond) {
#if defined(__APPLE__)
    pthread_cond_init(cond, NULL);
#else
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &attr);
    pthread_condattr_destroy(&attr);
#endif
}

/* Waits until the condition is signalled or the monotonic clock shows the deadline. Returns false when it does. May
 * wake for nothing. */
static bool netchan__cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex, uint64_t deadline) {
    if (deadline == UINT64_MAX) return pthread_cond_wait(cond, mutex) == 0;
    struct timespec t;
#if defined(__APPLE__)
    uint64_t now = netchan__now_ns(), left = deadline > now ? deadline - now : 0;
    t.tv_sec = (time_t)(left / 1000000000u);
    t.tv_nsec = (long)(left % 1000000000u);
    return pthread_cond_timedwait_relative_np(cond, mutex, &t) != ETIMEDOUT;
#else
    t.tv_sec = (time_t)(deadline / 1000000000u);
    t.tv_nsec = (long)(deadline % 1000000000u);
    return pthread_cond_timedwait(cond, mutex, &t) != ETIMEDOUT;
#endif
}

/* The same with netchan__net_lock, when nothing is left to be done or sent. */
static bool netchan__wait_net(pthread_cond_t *cond, uint64_t deadline) {
    bool in_time = true;
    netchan__net.sleepers++;
    netchan__net.watchers++;
    if (netchan__net.lent) netchan__net.wake = true;
    netchan__settle();
    bool waits = !(netchan__net.pending && netchan__push_out()); /* else it gave the lock back */
    if (netchan__net.wake) netchan__wake_loop();
    if (netchan__to_wake) {
        netchan__unlock_one(&netchan__net_lock);
        pthread_mutex_lock(&netchan__net_lock);
    } else if (waits) in_time = netchan__cond_wait(cond, &netchan__net_lock, deadline);
    netchan__net.sleepers--;
    netchan__net.watchers--;
    return in_time;
}

static uint64_t netchan__deadline(int timeout_ms) {
    return timeout_ms < 0 ? UINT64_MAX : netchan__now_ns() + (uint64_t)timeout_ms * 1000000u;
}

static bool netchan__is_inherited(const netchan *ch) { return ch && ch->forks != netchan__forks; }

static int netchan__fail_inherited(void) { return netchan__fail_fork("this channel"); }

/* May this process give away this end? */
static int netchan__check_end(const netchan_value *v) {
    const netchan *ch = v->as.chan;
    if (netchan__is_inherited(ch)) return netchan__fail_inherited();
    if (v->type == NETCHAN_SENDER ? ch->may_send : ch->may_receive) return NETCHAN_OK;
    return netchan__fail(NETCHAN_EINVAL,
                         "the value holds an end in the wrong direction: a sender end of a channel that is only for "
                         "receives here, or a receiver end of one that is only for sends");
}

/* May it give away all ends in the value? */
static int netchan__check_ends(const netchan_value *v) {
    netchan_entry e;
    int result = netchan__is_chan(v) ? netchan__check_end(v) : NETCHAN_OK;
    for (size_t i = 0; result == NETCHAN_OK && netchan__has_children(v) && netchan__child(v, i, &e); i++)
        result = netchan__check_ends(&e.value);
    return result;
}

/* Checks one case and copies or measures what it sends. */
static int netchan__prepare(netchan__waiter *w, netchan_case *c) {
    w->ch = c->ch;
    w->is_send = c->is_send;
    if (!c->is_send && c->into) *c->into = netchan__nil_value;
    if (netchan__is_inherited(w->ch)) return netchan__fail_inherited();
    if (!c->is_send) {
        if (w->ch && !w->ch->may_receive)
            return netchan__fail(NETCHAN_EINVAL, "this channel is only for sends; receive from the other one");
        return NETCHAN_OK;
    }
    if (w->ch && !w->ch->may_send)
        return netchan__fail(NETCHAN_EINVAL, "this channel is only for receives; send to the other one");
    netchan__measure m = {0, 0, false};
    int result = netchan__measure_value(&c->value, 0, &m);
    if (result != NETCHAN_OK || !w->ch) return result;
    if (m.channels && (result = netchan__check_ends(&c->value)) != NETCHAN_OK) return result;
    w->size = m.wire;
    w->memory = m.block;
    if (!w->ch->is_end) return netchan__copy_measured(&w->value, &c->value, &m);
    w->value = c->value; /* which outlives the call */
    w->value.flags = m.channels ? NETCHAN__CARRIES : 0;
    return NETCHAN_OK;
}

/* Lets case w happen at once if it can. */
static void netchan__attempt(netchan__waiter *w) {
    netchan *ch = w->ch;
    if (w->is_send ? netchan__is_closing(w) : ch->closed) {
        netchan__change_state(w->op, NETCHAN__OPEN, NETCHAN__ENGAGED);
        netchan__finish(w->op, w, NETCHAN_ECLOSED);
    } else if (ch->gone || (w->to && !w->lane)) {
        netchan__change_state(w->op, NETCHAN__OPEN, NETCHAN__ENGAGED);
        netchan__finish(w->op, w, ch->gone ? NETCHAN_ELOST : w->starved ? NETCHAN_ENOMEM : NETCHAN_ENOPEER);
    } else if (ch->is_end) {
        netchan__pair_end(ch);
    } else if (w->is_send && netchan__fits_nobody(ch, w->lane, &w->value, w->size)) {
        netchan__change_state(w->op, NETCHAN__OPEN, NETCHAN__ENGAGED);
        netchan__finish(w->op, w, NETCHAN_ETOOBIG);
    } else {
        netchan__lane *lane = w->lane;
        if (lane) netchan__fill(lane); /* before a receive on the same channel has its turn */
        if (lane && lane->is_direct) netchan__serve_only(lane);
        else netchan__pair(ch);
    }
}

static void netchan__leave_queues(netchan__op *op) {
    for (size_t i = 0; i < op->count; i++) {
        netchan__waiter *w = &op->waiters[i];
        netchan__dequeue(w);
        if (w->lane) netchan__update_ready(w->lane);
    }
}

/* The lane of values for the peer that w is for; it may be made. NULL: there is no such peer, or no memory. */
static netchan__lane *netchan__direct_lane(netchan__waiter *w) {
    netchan__peer *p = (netchan__peer *)netchan__map_get(&netchan__net.by_number, w->to);
    if (!p || !p->work || p->leaving) return NULL;
    if (!p->direct) {
        netchan__lane *lane = (netchan__lane *)netchan__alloc(sizeof *lane);
        w->starved = !lane;
        if (!lane) return NULL;
        netchan__lane_init(lane, p->work, w->ch->lane.cap);
        lane->is_direct = true;
        lane->only = p;
        NETCHAN__LINK(p->work->lanes, lane, prev, next);
        p->direct = lane;
    }
    return p->direct;
}

/* Registers all cases, in random order, and pairs. Caller holds all locks. */
static void netchan__begin(netchan__op *op) {
    size_t count = op->count;
    for (size_t i = 0; i < count; i++) op->waiters[i].turn = i;
    for (size_t i = count; i > 1; i--) { /* Fisher-Yates, Knuth, TAOCP 3.4.2, algorithm P */
        size_t j = (size_t)(netchan__random() % i), turn = op->waiters[i - 1].turn;
        op->waiters[i - 1].turn = op->waiters[j].turn;
        op->waiters[j].turn = turn;
    }
    for (size_t i = 0; i < count; i++) { /* in that order: two cases may wait in one queue */
        netchan__waiter *w = &op->waiters[op->waiters[i].turn];
        if (!w->ch) continue;
        w->lane = w->is_send && !w->ch->is_end ? w->to ? netchan__direct_lane(w) : &w->ch->lane : NULL;
        netchan__enqueue(netchan__queue_of(w), w, false);
        if (w->lane) netchan__update_ready(w->lane);
    }
    for (int pass = op->net && count > 1 ? 0 : 1; pass < 2; pass++) { /* first what needs no negotiation */
        if (pass == 0) netchan__net.at_once = true;
        for (size_t i = 0; i < count && netchan__state(op) == NETCHAN__OPEN; i++) {
            netchan__waiter *w = &op->waiters[op->waiters[i].turn];
            if (w->ch) netchan__attempt(w);
        }
        if (pass == 0) netchan__net.at_once = false;
    }
    for (size_t i = 0; i < count && op->net && netchan__state(op) < NETCHAN__COMMITTED; i++) { /* engaged is not over */
        netchan__waiter *w = &op->waiters[op->waiters[i].turn];
        if (!w->ch || !w->ch->is_end) continue;
        netchan__register(w);
        if (!w->is_send) netchan__make_rooms(w->ch);
    }
    if (op->net) netchan__settle();
}

/* The time is up: the operation is over now, or, as it is engaged, when that falls through. Caller holds all locks. */
static void netchan__expire(netchan__op *op) {
    if (netchan__change_state(op, NETCHAN__OPEN, NETCHAN__ENGAGED)) netchan__finish(op, NULL, NETCHAN_ETIMEDOUT);
    else op->expired = true;
}

static bool netchan__is_finished(const netchan__op *op) {
    return __atomic_load_n(&op->wake, __ATOMIC_ACQUIRE) == NETCHAN__FINISHED;
}

/* For a moment its thread looks whether it is over, which is cheaper than to sleep when the other side is at work.
 * Returns whether it is. */
static bool netchan__spin(const netchan__op *op) {
    enum { ROUNDS = 64, PAUSES = 16 };
    if (netchan__is_finished(op) || !netchan__may_spin()) return netchan__is_finished(op);
    for (int i = 0; i < ROUNDS && !netchan__is_finished(op); i++) netchan__pause(PAUSES);
    return netchan__note_spin(netchan__is_finished(op));
}

/* Falls asleep, the first time. Returns false when the operation was over before. */
static bool netchan__fall_asleep(netchan__op *op) {
    int awake = NETCHAN__AWAKE;
    pthread_mutex_init(&op->mutex, NULL);
    netchan__cond_init(&op->cond);
    return __atomic_compare_exchange_n(&op->wake, &awake, NETCHAN__ASLEEP, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

/* Returns whether the operation is finished; false only past the deadline. slept: whether this was called before, and
 * whether netchan__end_sleep() is to be called. */
static bool netchan__sleep(netchan__op *op, bool net, bool *slept, uint64_t deadline) {
    if (net) netchan__run_loop(op, deadline);
    if (!*slept && (net ? netchan__is_finished(op) : netchan__spin(op))) return true;
    bool over = !*slept && !netchan__fall_asleep(op);
    *slept = true;
    pthread_mutex_lock(&op->mutex);
    while (!over && !op->told && netchan__cond_wait(&op->cond, &op->mutex, deadline)) continue;
    over |= op->told;
    pthread_mutex_unlock(&op->mutex);
    return over;
}

static void netchan__end_sleep(netchan__op *op) {
    pthread_cond_destroy(&op->cond);
    pthread_mutex_destroy(&op->mutex);
}

/* Selects of this thread with other processes in a row that did not have to wait, and the channel of the last. */
static NETCHAN__THREAD_LOCAL struct netchan__streak {
    unsigned length;
    const netchan *winner;
} netchan__streak;

/* The operation was over at once: nobody sleeps. */
static void netchan__stay_awake(netchan__op *op) {
    netchan__op **at = &netchan__to_wake;
    while (*at != op) at = &(*at)->next_to_wake;
    *at = op->next_to_wake;
}

/* Sleeps until the operation is finished, and leaves the queues. */
static void netchan__wait(netchan__op *op, netchan__locks *locks, bool net, uint64_t deadline) {
    bool slept = false, in_time = netchan__sleep(op, net, &slept, deadline);
    if (!in_time) {
        netchan__lock_all(op, locks);
        netchan__expire(op);
        net = op->net;
        netchan__unlock_all(locks);
        netchan__sleep(op, net, &slept, UINT64_MAX);
    }
    if (slept) netchan__end_sleep(op);
    if (in_time && op->count == 1) return; /* who finished it took its waiter out, and may have freed the channel */
    netchan__lock_all(op, locks);
    netchan__leave_queues(op);
    netchan__unlock_all(locks);
}

/* Runs the prepared operation to its end. */
static void netchan__run(netchan__op *op, netchan__locks *locks, int timeout_ms) {
    uint64_t deadline = timeout_ms > 0 ? netchan__deadline(timeout_ms) : UINT64_MAX;
    netchan__lock_all(op, locks);
    netchan__begin(op);
    for (size_t i = 0; i < op->count && timeout_ms == 0 && op->net; i++) op->tries += op->waiters[i].match != NULL;
    if (timeout_ms == 0 && netchan__state(op) == NETCHAN__OPEN && !op->tries) netchan__expire(op);
    bool over = netchan__state(op) == NETCHAN__DONE; /* by this thread: it has had the locks all the time */
    if (over && op->index >= 0 && op->count > 1) netchan__streak.length++;
    if (over) netchan__leave_queues(op);
    if (over) netchan__stay_awake(op);
    bool net = op->net;
    netchan__unlock_all(locks);
    if (over) return;
    netchan__wait(op, locks, net, deadline);
}

/* A receive begins. Quick ones want values to come early. */
static void netchan__note_call(netchan *ch, uint64_t now) {
    uint64_t gap = now - __atomic_load_n(&ch->received_at, __ATOMIC_RELAXED);
    size_t wanted = 2 * __atomic_load_n(&ch->wanted, __ATOMIC_RELAXED) + 1;
    if (wanted > NETCHAN__EARLY_MOST) wanted = NETCHAN__EARLY_MOST;
    if (gap > NETCHAN__EARLY_PACE_MS * (uint64_t)1000000) wanted = 0;
    __atomic_store_n(&ch->wanted, wanted, __ATOMIC_RELAXED);
}

/* It ends, with a value. */
static void netchan__note_return(netchan *ch, uint64_t now) {
    __atomic_store_n(&ch->received_at, now, __ATOMIC_RELAXED);
}

static bool netchan__may_come_early(const netchan *ch) { return ch && ch->is_end && ch->credited && ch->may_receive; }

/* ---- The place where a rendezvous needs no lock (I6). ---- */

/* Has the channel a place to meet in (I6)? */
static bool netchan__can_meet(netchan *ch) { return !netchan__is_net(ch) && !ch->is_end && !ch->lane.cap; }

static int netchan__place_state(const netchan__place *p) { return __atomic_load_n(&p->state, __ATOMIC_ACQUIRE); }

static bool netchan__change_place(netchan__place *p, int from, int to) {
    return __atomic_compare_exchange_n(&p->state, &from, to, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

/* To who waits in the place. The value is moved. */
static bool netchan__give_there(netchan__place *p, netchan_value *v) {
    if (!netchan__change_place(p, NETCHAN__AWAITED, NETCHAN__GIVING)) return false;
    p->value = *v;
    *v = netchan__nil_value;
    __atomic_add_fetch(&p->state, NETCHAN__FILLED - NETCHAN__GIVING, __ATOMIC_RELEASE);
    return true;
}

/* The same for the only case of an operation. */
static bool netchan__send_there(netchan__waiter *w) {
    return w->is_send && w->ch && netchan__can_meet(w->ch) && netchan__give_there(&w->ch->own.place, &w->value);
}

/* For how many pauses one waits for the other, and between two looks, each of which takes the cache line from who
 * writes: 4 were a little quicker than 1, 2 and 8 on two cores. */
enum { NETCHAN__PATIENCE = 256, NETCHAN__LOOK_PAUSES = 4 };

/* For a moment, until somebody waits in the place or in a queue; less when there is who would find the sender in one.
 * Returns whether somebody does. */
static bool netchan__await_receiver(const netchan__place *p) {
    for (int i = 0; i < NETCHAN__PATIENCE; i += NETCHAN__LOOK_PAUSES) {
        if (__atomic_load_n(&p->seekers, __ATOMIC_RELAXED)) return false;
        netchan__pause(NETCHAN__LOOK_PAUSES);
        int state = netchan__place_state(p);
        if (state == NETCHAN__AWAITED || state >= NETCHAN__BUSY) return netchan__note_spin(true);
    }
    return netchan__note_spin(false);
}

/* Waits in the place, for a moment. */
static bool netchan__receive_there(netchan__place *p, netchan_value *v) {
    int state = NETCHAN__AWAITED;
    if (!netchan__change_place(p, NETCHAN__VACANT, NETCHAN__AWAITED)) return false;
    for (int i = 0; i < NETCHAN__PATIENCE && state == NETCHAN__AWAITED; i += NETCHAN__LOOK_PAUSES) {
        netchan__pause(NETCHAN__LOOK_PAUSES);
        state = netchan__place_state(p);
    }
    for (int i = 0; state % NETCHAN__BUSY != NETCHAN__FILLED; i++, state = netchan__place_state(p)) {
        if (state % NETCHAN__BUSY == NETCHAN__AWAITED && netchan__change_place(p, state, state - NETCHAN__AWAITED))
            return netchan__note_spin(false);
        netchan__let_others(i); /* it is being given */
    }
    *v = p->value;
    __atomic_sub_fetch(&p->state, NETCHAN__FILLED, __ATOMIC_RELEASE); /* the channel may be freed now */
    return netchan__note_spin(true);
}

/* One send, receive or select. The caller provides zeroed room for the waiters and for the locks. */
static int netchan__operate(netchan_case *cases, size_t count, int timeout_ms, netchan__waiter *waiters,
                            pthread_mutex_t **room) {
    netchan__op op;
    netchan__locks locks = {room, 0};
    memset(&op, 0, sizeof op);
    op.count = count;
    op.waiters = waiters;
    op.id = __atomic_add_fetch(&netchan__op_count, 1, __ATOMIC_RELAXED);
    op.index = NETCHAN_OK;
    for (size_t i = 0; i < count && op.index == NETCHAN_OK; i++) {
        netchan__waiter *w = &waiters[i];
        w->op = &op;
        w->op_id = op.id;
        w->index = i;
        w->multi = count > 1;
        w->firm = count == 1 && timeout_ms < 0;
        w->is_try = timeout_ms == 0;
        cases[i].result = NETCHAN_ETIMEDOUT;
        op.index = netchan__prepare(w, &cases[i]);
        if (op.index == NETCHAN_OK && !w->is_send && netchan__may_come_early(w->ch))
            netchan__note_call(w->ch, netchan__now_ns());
    }
    for (size_t i = 0; i < count;
         i++) { /* who serves one case may free its channel then, or hang up its link, before this call has left */
        waiters[i].held = waiters[i].ch && (count > 1 || timeout_ms > 0 || waiters[i].ch->plain);
        if (waiters[i].held) netchan_retain(waiters[i].ch);
    }
    int result = op.index;
    bool there = result == NETCHAN_OK && count == 1 && netchan__send_there(&waiters[0]);
    if (there) {
        result = op.index = 0;
    } else if (result == NETCHAN_OK) {
        netchan__run(&op, &locks, timeout_ms);
        result = op.index < 0 || op.result == NETCHAN_ENOMEM ? op.result : op.index;
        netchan__note(op.result, netchan_strerror(op.result));
        const netchan__waiter *won = op.index >= 0 ? &waiters[op.index] : NULL;
        if (won && won->held && !won->is_send && netchan__may_come_early(won->ch))
            netchan__note_return(won->ch, netchan__now_ns());
    }
    for (size_t i = 0; i < count; i++) {
        netchan_clear(&waiters[i].value);
        if (waiters[i].held) netchan_free(waiters[i].ch);
        waiters[i].op = NULL; /* it ends here */
    }
    if (result < 0 || op.index < 0) return result;
    netchan_case *c = &cases[op.index];
    c->result = op.result;
    c->peer.id = op.peer;
    c->redelivered = op.redelivered;
    if (c->into && !c->is_send) *c->into = op.value;
    else netchan_clear(&op.value);
    return result;
}

NETCHANDEF netchan_case netchan_case_send(netchan *ch, netchan_value v) {
    netchan_case c;
    memset(&c, 0, sizeof c);
    c.ch = ch;
    c.is_send = true;
    c.value = v;
    return c;
}

NETCHANDEF netchan_case netchan_case_recv(netchan *ch, netchan_value *v) {
    netchan_case c; /* as in netchan__make_value() */
    c.ch = ch;
    c.is_send = false;
    c.value = netchan__nil_value;
    c.into = v;
    c.result = NETCHAN_OK;
    c.peer.id = 0;
    c.redelivered = false;
    return c;
}

/* to: see netchan__waiter. */
static int netchan__operate_one(netchan_case *c, uint64_t to, int timeout_ms) {
    netchan__waiter waiter;
    pthread_mutex_t *lock;
    memset(&waiter, 0, sizeof waiter);
    waiter.to = to;
    int result = netchan__operate(c, 1, timeout_ms, &waiter, &lock);
    return result < 0 ? result : c->result;
}

/* ---- Short cuts: what most sends and receives come to, in a few steps. Each does just what netchan__operate() would
 * do with nobody waiting and nothing closing; else it does nothing and returns false. ---- */

/* Into a buffer at home. The value is moved. */
static bool netchan__put_quickly(netchan *ch, netchan_value *v, const netchan__measure *m) {
    netchan__lane *lane = &ch->lane;
    bool waited_for = ch->receivers.head || ch->ahead.head;
    if (ch->is_end || ch->closing || ch->gone || (waited_for && !ch->plain) || lane->senders.head) return false;
    if (!lane->cap || ch->receivers_lost || !netchan__slot_free(lane)) return false;
    if ((ch->plain && netchan__fits_nobody(ch, lane, v, m->wire)) || !netchan__lane_room(lane)) return false;
    netchan__lane_push(lane, v, m->wire, m->block, 0);
    netchan__update_ready(lane);
    if (waited_for) netchan__mark_dirty(ch);
    return true;
}

/* Over a link, within credit. */
static bool netchan__emit_quickly(netchan *ch, const netchan_value *v, const netchan__measure *m) {
    const netchan__peer *p = ch->home;
    if (!ch->credited || !ch->credit || !p || p->leaving || ch->closing || ch->gone) return false;
    if (ch->lane.senders.head || ch->detached || ch->relayed.head) return false;
    if (m->wire > NETCHAN__FRAGMENT || m->wire > p->their_message) return false;
    return netchan__emit_data(ch, v, m->wire, m->block);
}

/* What a short cut of one side came to, with its mutex alone. MEETS: it takes both, as somebody waits, there is no
 * buffer, or it has to grow. */
enum netchan__quick { NETCHAN__FAILS, NETCHAN__DOES, NETCHAN__MEETS };

/* Into the buffer of a channel with a lock of its own, of which senders' is had. The value is moved. */
static enum netchan__quick netchan__put_alone(netchan *ch, netchan_value *v, const netchan__measure *m) {
    netchan__lane *lane = &ch->lane;
    size_t most = lane->cap < lane->room ? lane->cap : lane->room;
    if (ch->closing || lane->senders.head) return NETCHAN__FAILS;
    if (ch->receivers.head) return NETCHAN__MEETS;
    if (lane->last - lane->seen_first >= most) lane->seen_first = __atomic_load_n(&lane->first, __ATOMIC_ACQUIRE);
    if (lane->last - lane->seen_first >= most) return lane->room < lane->cap ? NETCHAN__MEETS : NETCHAN__FAILS;
    netchan__lane_push(lane, v, m->wire, m->block, 0);
    return NETCHAN__DOES;
}

/* To who waits for it first, in such a channel, of which all is had. The value is moved. */
static bool netchan__give_quickly(netchan *ch, netchan_value *v) {
    netchan__waiter *r = ch->receivers.head;
    if (!r || ch->closing || ch->lane.senders.head || netchan__held(&ch->lane)) return false;
    if (!netchan__change_state(r->op, NETCHAN__OPEN, NETCHAN__ENGAGED)) return false;
    netchan__dequeue(r);
    netchan__finish_receive(r, v, 0, false);
    return true;
}

/* At home. The value is moved. */
static bool netchan__put(netchan *ch, netchan_value *v, const netchan__measure *m) {
    enum netchan__quick way = NETCHAN__MEETS;
    if (netchan__can_meet(ch)) {
        if (netchan__give_there(&ch->own.place, v)) return true;
        if (netchan__place_state(&ch->own.place) < NETCHAN__BUSY) return false; /* nobody waits in a queue */
    }
    if (ch->lane.cap && netchan__lock_side(ch, &ch->own.sending)) {
        way = netchan__put_alone(ch, v, m);
        pthread_mutex_unlock(&ch->own.sending); /* who has received the value may free the channel now */
    }
    if (way != NETCHAN__MEETS) return way == NETCHAN__DOES;
    pthread_mutex_t *lock = netchan__lock_channel(ch);
    bool done = (lock != &netchan__net_lock && netchan__give_quickly(ch, v)) || netchan__put_quickly(ch, v, m);
    netchan__unlock_one(lock);
    return done;
}

/* Measures the value. Returns whether a short cut may be tried. */
static bool netchan__is_simple(netchan *ch, const netchan_value *v, netchan__measure *m) {
    enum { MOST = 4096 }; /* bytes that may be copied in vain */
    memset(m, 0, sizeof *m);
    if (!ch || netchan__is_inherited(ch) || !ch->may_send) return false;
    if (netchan__measure_value(v, 0, m) != NETCHAN_OK || m->channels) return false;
    return ch->is_end || m->block <= MOST;
}

/* Sends such a value. */
static bool netchan__send_simple(netchan *ch, const netchan_value *v, const netchan__measure *m) {
    netchan_value copy = *v;
    if (!ch->is_end) {
        bool done = netchan__copy_measured(&copy, v, m) == NETCHAN_OK && netchan__put(ch, &copy, m);
        netchan_clear(&copy); /* but ch may be gone: who received the value may free it at once */
        return done;
    }
    pthread_mutex_t *lock = netchan__lock_channel(ch);
    bool done = netchan__emit_quickly(ch, v, m);
    netchan__unlock_one(lock);
    return done;
}

static bool netchan__send_quickly(netchan *ch, const netchan_value *v) {
    netchan__measure m;
    return netchan__is_simple(ch, v, &m) && netchan__send_simple(ch, v, &m);
}

/* Takes the next value out of a buffer. */
static bool netchan__take_quickly(netchan *ch, netchan__slot *slot) {
    netchan__lane *lane = ch->ready;
    if (!lane || !lane->cap || lane->closing || lane->returning || lane->senders.head) return false;
    if (ch->receivers.head || ch->closing || ch->gone || ch->senders_lost) return false;
    if (netchan__ripen(lane, netchan__front(lane)) != NETCHAN_OK) return false;
    netchan__next_turn(lane);
    *slot = netchan__lane_pop(lane);
    lane->left++;
    netchan__lend(lane);
    netchan__update_ready(lane);
    if (ch->on_taken) ch->on_taken(ch, &slot->value);
    return true;
}

/* May it try again before it waits? Without a buffer it spins again when it does. */
static bool netchan__may_retry(netchan *ch, int timeout_ms) {
    if (!ch || !timeout_ms || netchan__is_inherited(ch) || ch->is_end || netchan__is_net(ch)) return false;
    return ch->lane.cap ? netchan__may_spin() : netchan__spins_well();
}

/* Out of the buffer of a channel with a lock of its own, of which receivers' is had. */
static enum netchan__quick netchan__take_alone(netchan *ch, netchan__slot *slot) {
    netchan__lane *lane = &ch->lane;
    if (ch->closing || ch->receivers.head) return NETCHAN__FAILS;
    if (lane->senders.head) return NETCHAN__MEETS;
    if (lane->seen_last - lane->first - 1 >= lane->room) { /* none, or first has gone by */
        lane->seen_last = __atomic_load_n(&lane->last, __ATOMIC_ACQUIRE);
        if (lane->first == lane->seen_last) return NETCHAN__FAILS;
    }
    *slot = netchan__lane_pop(lane);
    return NETCHAN__DOES;
}

/* From who waits first in such a channel, of which all is had; or from its buffer, where that one's value enters. */
static bool netchan__take_from_sender(netchan *ch, netchan__slot *slot) {
    netchan__lane *lane = &ch->lane;
    netchan__waiter *s = lane->senders.head;
    if (!s || ch->closing || ch->receivers.head) return false;
    if (!netchan__change_state(s->op, NETCHAN__OPEN, NETCHAN__ENGAGED)) return false;
    if (netchan__held(lane)) {
        *slot = netchan__lane_pop(lane);
        netchan__lane_push(lane, &s->value, s->size, s->memory, 0);
    } else {
        slot->value = s->value;
        slot->from = 0;
        s->value = netchan__nil_value;
    }
    netchan__dequeue(s);
    netchan__update_ready(lane);
    netchan__finish_sender(s, NETCHAN_OK, 0);
    return true;
}

/* At home. */
static bool netchan__take(netchan *ch, netchan__slot *slot) {
    enum netchan__quick way = NETCHAN__MEETS;
    if (netchan__can_meet(ch) && netchan__place_state(&ch->own.place) < NETCHAN__BUSY) return false; /* nobody waits */
    if (ch->lane.cap && netchan__lock_side(ch, &ch->own.receiving)) {
        way = netchan__take_alone(ch, slot);
        pthread_mutex_unlock(&ch->own.receiving);
    }
    if (way != NETCHAN__MEETS) return way == NETCHAN__DOES;
    pthread_mutex_t *lock = netchan__lock_channel(ch);
    bool done = lock == &netchan__net_lock ? netchan__take_quickly(ch, slot) : netchan__take_from_sender(ch, slot);
    netchan__unlock_one(lock);
    return done;
}

/* To where the receive wants its value. */
static void netchan__pass_on(const netchan_case *c, netchan_value *v) {
    if (c->into) *c->into = *v;
    else netchan_clear(v);
}

/* A value that came early. */
static bool netchan__receive_early(netchan_case *c) {
    netchan *ch = c->ch;
    if (!__atomic_load_n(&ch->early_count, __ATOMIC_RELAXED)) return false;
    pthread_mutex_t *lock = netchan__lock_channel(ch);
    bool done = netchan__is_early_here(ch) && !ch->receivers.head;
    netchan_value v = netchan__nil_value;
    if (done) {
        uint64_t now = netchan__now_ns();
        netchan__note_call(ch, now);
        c->peer.id = ch->home->number;
        v = netchan__take_early(ch, NULL, &c->redelivered);
        netchan__make_rooms(ch);
        netchan__note_return(ch, now);
    }
    netchan__unlock_one(lock);
    netchan__pass_on(c, &v);
    return done;
}

static bool netchan__receive_quickly(netchan_case *c) {
    netchan *ch = c->ch;
    netchan__slot slot;
    if (!ch || netchan__is_inherited(ch) || !ch->may_receive) return false;
    if (ch->is_end) return netchan__receive_early(c);
    if (!netchan__take(ch, &slot)) return false;
    c->peer.id = slot.from;
    netchan__pass_on(c, &slot.value);
    return true;
}

/* How many values are, or were a moment ago, in a buffer that is not locked. */
static size_t netchan__about_held(const netchan__lane *lane) {
    size_t first = __atomic_load_n(&lane->first, __ATOMIC_RELAXED);
    return __atomic_load_n(&lane->last, __ATOMIC_RELAXED) - first;
}

/* How long this thread pauses before it looks at a buffer again for the first time, as what netchan__back_off() begins
 * with. A value's way from one core to the other takes longer than all else that is done with it; of several that go
 * together only the first pays for it. So it waits longer as long as it finds several things to do afterwards: twice
 * as long each time, and a quarter once it finds one. */
static NETCHAN__THREAD_LOCAL int netchan__first_pauses;

static void netchan__note_work(bool several) {
    enum { LEAST = 16, MOST = 128 };
    if (!several) netchan__first_pauses /= 4;
    else if (netchan__first_pauses < MOST)
        netchan__first_pauses = netchan__first_pauses ? 2 * netchan__first_pauses : (int)LEAST;
}

/* Lets the other side get several things done, before this call waits in the queue of a channel of this process. */
static bool netchan__send_soon(netchan *ch, const netchan_value *v, const netchan__measure *m) {
    bool sent = false, first = true;
    if (!ch->lane.cap) return netchan__await_receiver(&ch->own.place) && netchan__send_simple(ch, v, m);
    for (int pauses = netchan__first_pauses; !sent && netchan__back_off(&pauses); first = false) {
        if (first) netchan__note_work(netchan__about_held(&ch->lane) + 1 < ch->lane.cap);
        sent = netchan__send_simple(ch, v, m);
    }
    return netchan__note_spin(sent);
}

/* The same for a receive. Where there is no buffer it is quicker to wait at once than to look first who does. */
static bool netchan__receive_soon(netchan_case *c) {
    bool done = false, first = true;
    if (!c->ch->lane.cap) {
        netchan_value v;
        done = netchan__receive_there(&c->ch->own.place, &v);
        if (done) netchan__pass_on(c, &v);
        return done || netchan__receive_quickly(c);
    }
    for (int pauses = netchan__first_pauses; !done && netchan__back_off(&pauses); first = false) {
        if (first) netchan__note_work(netchan__about_held(&c->ch->lane) > 1);
        done = netchan__receive_quickly(c);
    }
    return netchan__note_spin(done);
}

NETCHANDEF int netchan_send(netchan *ch, netchan_value v, int timeout_ms) {
    netchan__measure m;
    bool simple = netchan__is_simple(ch, &v, &m);
    if (simple && netchan__send_simple(ch, &v, &m)) return NETCHAN_OK;
    if (simple && netchan__may_retry(ch, timeout_ms) && netchan__send_soon(ch, &v, &m)) return NETCHAN_OK;
    netchan_case c = netchan_case_send(ch, v);
    return netchan__operate_one(&c, 0, timeout_ms);
}

NETCHANDEF int netchan_recv(netchan *ch, netchan_value *v, int timeout_ms) {
    return netchan_recvfrom(ch, v, NULL, timeout_ms);
}

NETCHANDEF int netchan_recvfrom(netchan *ch, netchan_value *v, netchan_peer *from, int timeout_ms) {
    netchan_case c = netchan_case_recv(ch, v);
    bool meets = ch && netchan__can_meet(ch) && netchan__may_retry(ch, timeout_ms);
    bool done = meets ? netchan__receive_soon(&c) : netchan__receive_quickly(&c);
    if (!done && !meets && netchan__may_retry(ch, timeout_ms)) done = netchan__receive_soon(&c);
    int result = done ? NETCHAN_OK : netchan__operate_one(&c, 0, timeout_ms);
    if (from) *from = c.peer;
    return result;
}

static int netchan__select(netchan_case *cases, size_t count, int timeout_ms) {
    enum { FEW = 8 };
    netchan__waiter few[FEW], *waiters = few;
    pthread_mutex_t *few_locks[FEW], **locks = few_locks;
    if (count > FEW) {
        waiters = (netchan__waiter *)netchan__alloc(count * sizeof *waiters);
        locks = (pthread_mutex_t **)netchan__alloc(count * sizeof(pthread_mutex_t *));
    }
    int result = NETCHAN_ENOMEM;
    if (waiters && locks) {
        memset(waiters, 0, count * sizeof *waiters);
        result = netchan__operate(cases, count, timeout_ms, waiters, locks);
    } else netchan__fail_memory("netchan_select");
    if (waiters != few) NETCHAN_FREE(waiters);
    if (locks != few_locks) NETCHAN_FREE(locks);
    return result;
}

/* Are these few cases, and all on channels of this process alone? */
static bool netchan__is_plain_select(const netchan_case *cases, size_t count) {
    enum { FEW = 8 };
    bool plain = count > 1 && count <= FEW;
    for (size_t i = 0; i < count && plain; i++) {
        netchan *ch = cases[i].ch;
        netchan__measure m = {0, 0, false};
        if (!ch) continue;
        plain = !netchan__is_inherited(ch) && !netchan__is_net(ch) && !ch->is_end &&
                (cases[i].is_send ? ch->may_send : ch->may_receive) &&
                (!cases[i].is_send || netchan__measure_value(&cases[i].value, 0, &m) == NETCHAN_OK);
    }
    return plain;
}

/* The short cut of a plain select. Returns which case happened, or -1. */
static int netchan__select_quickly(netchan_case *cases, size_t count) {
    size_t order[8];
    for (size_t i = 0; i < count; i++) {
        order[i] = i;
        if (!cases[i].is_send && cases[i].into) *cases[i].into = netchan__nil_value;
    }
    for (size_t left = count; left; left--) { /* in random order: Fisher and Yates, as in netchan__begin() */
        size_t j = (size_t)(netchan__random() % left), i = order[j];
        netchan_case *c = &cases[i];
        order[j] = order[left - 1];
        if (!c->ch || !(c->is_send ? netchan__send_quickly(c->ch, &c->value) : netchan__receive_quickly(c))) continue;
        for (size_t k = 0; k < count; k++) cases[k].result = k == i ? NETCHAN_OK : NETCHAN_ETIMEDOUT;
        return (int)i;
    }
    return -1;
}

/* Counts the select among the seekers of those channels that have a place, and holds them. Returns a bit for each. */
static unsigned netchan__begin_to_seek(const netchan_case *cases, size_t count) {
    unsigned places = 0;
    NETCHAN_ASSERT(count <= 8 * sizeof places);
    for (size_t i = 0; i < count; i++) {
        netchan *ch = cases[i].ch;
        if (!ch || cases[i].is_send || !netchan__can_meet(ch)) continue;
        __atomic_add_fetch(&netchan_retain(ch)->own.place.seekers, 1u, __ATOMIC_RELAXED);
        places |= 1u << i;
    }
    return places;
}

static void netchan__end_seeking(const netchan_case *cases, unsigned places) {
    for (size_t i = 0; places; i++, places >>= 1) {
        if (!(places & 1)) continue;
        __atomic_sub_fetch(&cases[i].ch->own.place.seekers, 1u, __ATOMIC_RELAXED);
        netchan_free(cases[i].ch);
    }
}

/* The same, which lets other threads get something done first. */
static int netchan__select_plain(netchan_case *cases, size_t count, int timeout_ms) {
    int won = netchan__select_quickly(cases, count);
    if (won >= 0 || !timeout_ms || !netchan__may_spin()) return won;
    unsigned places = netchan__begin_to_seek(cases, count);
    for (int pauses = 0; won < 0 && netchan__back_off(&pauses);) won = netchan__select_quickly(cases, count);
    netchan__end_seeking(cases, places);
    netchan__note_spin(won >= 0);
    return won;
}

static bool netchan__is_shared(const netchan_case *c) {
    return c->ch && __atomic_load_n(&c->ch->shared, __ATOMIC_RELAXED);
}

/* Tries the cases in which other processes may wait, but for the winner's. Returns as netchan_select(). */
static int netchan__try_others(netchan_case *cases, size_t count, const netchan *winner) {
    enum { MOST = 16 };
    netchan_case others[MOST];
    size_t index[MOST], n = 0, first = (size_t)(netchan__random() % count);
    for (size_t k = 0; k < count && n < MOST; k++) {
        size_t i = (first + k) % count;
        if (!netchan__is_shared(&cases[i]) || cases[i].ch == winner) continue;
        index[n] = i;
        others[n++] = cases[i];
    }
    int result = n ? netchan__select(others, n, NETCHAN_NOWAIT) : NETCHAN_ETIMEDOUT;
    if (result < 0) return result;
    for (size_t i = 0; i < count; i++) cases[i].result = NETCHAN_ETIMEDOUT;
    cases[index[result]] = others[result];
    return (int)index[result];
}

NETCHANDEF int netchan_select(netchan_case *cases, size_t count, int timeout_ms) {
    enum { TURN = 15 };
    struct netchan__streak *streak = &netchan__streak;
    if (count && !cases)
        return netchan__fail(NETCHAN_EINVAL, "netchan_select: %zu cases, but the array is NULL", count);
    if (count > INT32_MAX) return netchan__fail(NETCHAN_EINVAL, "netchan_select: more cases than an int can number");
    bool shared = false;
    for (size_t i = 0; i < count && count > 1; i++) shared |= netchan__is_shared(&cases[i]);
    int won = !shared && netchan__is_plain_select(cases, count) ? netchan__select_plain(cases, count, timeout_ms) : -1;
    if (won >= 0) return won;
    if (shared && streak->length >= TURN) {
        streak->length = 0;
        int other = netchan__try_others(cases, count, streak->winner);
        if (other >= 0) return other;
    }
    unsigned length = streak->length;
    int result = netchan__select(cases, count, timeout_ms);
    bool waited = streak->length == length;
    if (!shared) streak->length = length;
    else if (waited) streak->length = 0;
    if (shared && result >= 0) streak->winner = cases[result].ch;
    return result;
}

NETCHAN__SMALL_BEGIN
NETCHANDEF netchan *netchan_make(size_t capacity) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, netchan__watch_forks);
    netchan *ch = (netchan *)netchan__alloc(sizeof *ch);
    if (!ch) {
        netchan__fail_memory("netchan_make");
        return NULL;
    }
    pthread_mutex_init(&ch->own.receiving, NULL);
    pthread_mutex_init(&ch->own.sending, NULL);
    ch->lock = &ch->own.receiving;
    ch->refs = 1;
    ch->forks = netchan__forks;
    ch->may_send = ch->may_receive = true;
    netchan__lane_init(&ch->lane, ch, capacity);
    ch->lanes = &ch->lane;
    return ch;
}

NETCHANDEF netchan *netchan_retain(netchan *ch) {
    if (ch && !netchan__is_inherited(ch)) __atomic_add_fetch(&ch->refs, 1, __ATOMIC_RELAXED);
    return ch;
}

/* An end that was found by its number, perhaps just before it is buried. */
static void netchan__retain_end(netchan *ch) {
    pthread_mutex_lock(&netchan__dead_lock);
    netchan_retain(ch);
    pthread_mutex_unlock(&netchan__dead_lock);
}

static void netchan__destroy(netchan *ch) {
    NETCHAN_ASSERT(!ch->receivers.head && !ch->lane.senders.head && !ch->matches && !ch->exports && !ch->is_dirty);
    NETCHAN_ASSERT(!ch->ahead.head && !ch->early.head);
    netchan__lane_clear(&ch->lane);
    while (ch->lanes && ch->lanes != &ch->lane) netchan__free_lane(ch->lanes);
    netchan__buf_free(&ch->returning);
    netchan__lock_own(ch); /* whoever gave away its last value, or took it, leaves first */
    netchan__unlock_own(ch);
    for (int i = 0; netchan__place_state(&ch->own.place) % NETCHAN__BUSY; i++) netchan__let_others(i); /* likewise */
    pthread_mutex_destroy(&ch->own.receiving);
    pthread_mutex_destroy(&ch->own.sending);
    NETCHAN_FREE(ch);
}

/* Frees one channel of those. Returns whether there was one. Caller holds netchan__net_lock, and nothing is dirty. */
static bool netchan__bury(void) {
    pthread_mutex_lock(&netchan__dead_lock);
    netchan *ch = netchan__dead;
    bool alive = ch && __atomic_load_n(&ch->refs, __ATOMIC_ACQUIRE);
    netchan__peer *p = ch && !alive && ch->is_end && ch->channel >= NETCHAN__FIRST_EXPORT ? ch->home : NULL;
    if (ch) __atomic_store_n(&netchan__dead, ch->next_dead, __ATOMIC_SEQ_CST);
    if (ch) ch->is_dead = false;
    if (p) netchan__map_remove(&p->imports, ch->channel);
    pthread_mutex_unlock(&netchan__dead_lock);
    if (!ch || alive) return ch != NULL;
    bool lost = ch->may_send ? ch->senders_lost : ch->receivers_lost;
    if (p) netchan__emit_ids(p, NETCHAN__DROP, ch->channel, 0, 0, lost, (size_t)ch->named);
    netchan__destroy(ch);
    return true;
}

/* One holder less of a channel under netchan__net_lock, which the caller may have or not. */
static void netchan__free_net(netchan *ch) {
    pthread_mutex_lock(&netchan__dead_lock);
    bool last = __atomic_sub_fetch(&ch->refs, 1, __ATOMIC_ACQ_REL) == 0;
    if (last && !ch->is_dead) {
        ch->next_dead = netchan__dead;
        ch->is_dead = true;
        __atomic_store_n(&netchan__dead, ch, __ATOMIC_SEQ_CST);
    }
    pthread_mutex_unlock(&netchan__dead_lock);
    if (last) netchan__bury_rest();
}

NETCHANDEF void netchan_free(netchan *ch) {
    if (!ch || netchan__is_inherited(ch)) return;
    if (netchan__is_net(ch)) {
        netchan__free_net(ch);
        return;
    }
    if (__atomic_sub_fetch(&ch->refs, 1, __ATOMIC_ACQ_REL)) return;
    static NETCHAN__THREAD_LOCAL netchan
        *to_free; /* channels that lie in channels are freed one by one, however deep */
    static NETCHAN__THREAD_LOCAL bool freeing;
    ch->next_dead = to_free;
    to_free = ch;
    if (freeing) return;
    freeing = true;
    while ((ch = to_free)) {
        to_free = ch->next_dead;
        netchan__destroy(ch);
    }
    freeing = false;
}

/* Caller holds the channel's lock. */
static void netchan__close(netchan *ch) {
    ch->closing = ch->lane.closing = true;
    if (ch->is_end) {
        netchan__end_waiters(&ch->lane.senders, NETCHAN_ECLOSED);
        netchan__tell_ends(ch, true, NETCHAN__CLOSING);
        netchan__relay_ended(ch);
        netchan__pair_end(ch);
        return;
    }
    for (netchan__lane *lane = ch->is_merge ? NULL : ch->lanes; lane; lane = lane->next)
        netchan__end_senders(lane, NETCHAN_ECLOSED);
    netchan__tell_ends(ch, true, NETCHAN__CLOSING);
    netchan__pair(ch);
}

NETCHANDEF int netchan_close(netchan *ch) {
    if (!ch) return netchan__fail(NETCHAN_EINVAL, "netchan_close: the channel is NULL");
    if (netchan__is_inherited(ch)) return netchan__fail_inherited();
    if (!ch->may_send) return netchan__fail(NETCHAN_EINVAL, "netchan_close: only the sending side closes a channel");
    pthread_mutex_t *lock = netchan__lock_channel(ch);
    int result = ch->closing ? NETCHAN_ECLOSED : NETCHAN_OK;
    if (result == NETCHAN_OK) netchan__close(ch);
    netchan__unlock_one(lock);
    return netchan__note(result, "netchan_close: the channel was closed before");
}

NETCHANDEF size_t netchan_len(netchan *ch) {
    if (!ch || netchan__is_inherited(ch)) return 0;
    pthread_mutex_t *lock = netchan__lock_channel(ch);
    size_t n = 0;
    if (ch->is_end) n = ch->in_flight + ch->detached;
    for (netchan__lane *lane = ch->is_end ? NULL : ch->lanes; lane; lane = lane->next)
        n += netchan__held(lane) + lane->out;
    netchan__unlock_one(lock);
    return n;
}

NETCHANDEF size_t netchan_cap(netchan *ch) {
    if (!ch || netchan__is_inherited(ch)) return 0;
    pthread_mutex_t *lock = netchan__lock_channel(ch);
    size_t n = ch->is_end ? ch->lane.cap : 0;
    for (netchan__lane *lane = ch->is_end ? NULL : ch->lanes; lane; lane = lane->next)
        n += lane->is_direct ? 0 : lane->cap;
    netchan__unlock_one(lock);
    return n;
}

NETCHAN__SMALL_END

/* ====================================================================================================================
 * [13] Sessions: an ordered stream of frames between two processes, each taken once, over one link after another. A
 * state machine without I/O: bytes of the link go in, bytes for the link come out, time is an argument. No sockets, no
 * TLS, no clock, no threads. Net.
 *
 * Invariants.
 *   S1  The frames of a direction are numbered from 1. `out` holds those from acked + 1 to queued, whole; of them the
 *       link was given those up to peer.sent. A frame leaves `out` when the other side said that it has it.
 *   S2  `received` frames were worked off, in their order. A link is no longer read when its successor was asked for or
 *       found, and what it brought in part of a frame is dropped. So the position told to the successor is final, and
 *       each side goes on with the first frame that the other has not got.
 *   S3  HELLO, PING, PONG, ACK and what greets are not numbered, not kept, and go before all frames, also when the
 *       window is full: window and credit do not block each other. ACK says that frames were worked off, which takes
 *       no more memory than was reserved for them.
 *   S4  Input is refused, not trusted: a frame is whole, known or skipped, and not longer than NETCHAN__FRAME_MAX.
 *       After a breach nothing more is read.
 *   S5  A large value delays other frames by one fragment: fragments are put into the stream one at a time, in turn,
 *       when it runs low.
 *
 * Copies of a value's bytes, beside those that mbedTLS makes within itself. On this side a value is written into the
 * stream once, and encrypted where it stands there, unless an acknowledgement goes with it. One larger than a fragment
 * goes there piece by piece: from where it is, if it is one block; an array or a map is written whole before. On the
 * other side ciphertext is read 64 KiB at a time and copied to where mbedTLS wants it, and the value is decoded out of
 * the record, or, if it is large and one block, put together where it stays; other large values are decoded from where
 * they were put together.
 * ================================================================================================================== */

enum {
    NETCHAN__WIRE_VERSION = 1,
    NETCHAN__STREAM_LOW = 2 * NETCHAN__FRAME_MAX, /* bytes */
    NETCHAN__ACK_BYTES = 65536, /* an acknowledgement waits for so many bytes, or frames to go with, ... */
    NETCHAN__ACK_MS = 20,       /* ... or so long, at most */
    NETCHAN__RECORD_FIRST = 1024, /* until a link was of use: it may break again before more is through */
    NETCHAN__CONTROL_MAX = 1024,
    NETCHAN__KEPT = 2 << 20     /* bytes of memory that is kept for more, at most */
};

typedef struct netchan__session netchan__session;
typedef struct netchan__hub netchan__hub;
typedef struct netchan__name netchan__name;
typedef struct netchan__asked netchan__asked;
typedef struct netchan__wanted netchan__wanted;

/* A large value on its way, in fragments. One that is a single block of bytes or numbers is cut where it is, if it
 * stays there. */
typedef struct netchan__parcel netchan__parcel;
struct netchan__parcel {
    netchan__parcel *next;
    bool from_home;
    uint64_t entry, match, id; /* id: what stands in the fragments */
    netchan__buf bytes;
    const uint8_t *lent;       /* what follows them, in the value of a waiter of ours; its size: */
    size_t lent_size;
    netchan_value ends;        /* an array of the channel ends in it: none is dropped before it was named */
};

static void netchan__collect_ends(const netchan_value *v, netchan_value *out, size_t *count) {
    netchan_entry e;
    if (netchan__is_chan(v)) out[(*count)++] = *v;
    for (size_t i = 0; netchan__has_children(v) && netchan__child(v, i, &e); i++)
        netchan__collect_ends(&e.value, out, count);
}

/* Returns false when out of memory. */
static bool netchan__hold_ends(netchan__parcel *parcel, const netchan_value *v) {
    if (!netchan__has_ends(v)) return true;
    size_t count = netchan__count_ends(v), n = 0;
    netchan_value *ends = (netchan_value *)netchan__alloc(count * sizeof *ends), array;
    if (!ends) return false;
    netchan__collect_ends(v, ends, &n);
    array = netchan_array(ends, n);
    int result = netchan_copy(&parcel->ends, &array);
    NETCHAN_FREE(ends);
    return result == NETCHAN_OK;
}

/* One link, as sessions see it. Whoever has its bytes sets binding, identity, fresh and address, and closes it when
 * failure is set and, with flush, all output is gone. */
typedef struct netchan__wire netchan__wire;
struct netchan__wire {
    netchan__hub *hub;
    netchan__session *session; /* from the end of the greeting; NULL again when the session is over or goes elsewhere */
    void *owner;
    bool up;                   /* it was greeted */
    bool resumes;              /* dialling: it asked to go on with the session */
    bool paused;               /* its successor is being greeted */
    bool moved;                /* the session went on over it */
    bool ack_now, flush;
    uint8_t binding[32];       /* a secret of this link alone, known to both sides */
    uint8_t identity[32];      /* whom the other side has proved to be */
    char identity_text[NETCHAN_FINGERPRINT_SIZE], name[256];
    uint8_t fresh[48];         /* listening: random bytes for a new session */
    netchan__buf in;           /* the beginning of a frame */
    netchan__buf control;      /* frames that are not numbered */
    netchan__session *pins;    /* whose frames are being encrypted without lock: they stay where they are */
    uint8_t *unpinned;         /* where they were until more came; freed when that is over */
    uint64_t generation;
    uint64_t last_input, last_ping, last_tick, ack_at; /* nanoseconds; ack_at 0: nothing to acknowledge */
    uint64_t records_in, records_out;
    const char *failure; /* set: why it is to be closed */
    bool final;          /* and to dial again is no use */
    char failure_text[320];
    char address[80];
};

struct netchan__session {
    netchan__peer peer; /* first: a session is a peer */
    netchan__hub *hub;
    netchan__session *prev, *next; /* of hub */
    netchan__session *next_pending; /* in netchan__net.pending */
    bool is_pending;
    netchan__wire *wire;   /* NULL: it waits for a link */
    bool refused;          /* since it is down somebody at one of its addresses did not know it */
    bool bye_sent, bye_received;
    bool returns;          /* the other side hangs up, and hands back what it has in its buffer */
    uint8_t id[16], secret[32], identity[32];
    uint64_t generation;   /* of its newest link */
    netchan__buf out;      /* whole frames that the other side may not have */
    netchan__wire *pinned_by; /* see there */
    size_t given;          /* bytes of them that the link was given */
    uint64_t queued, acked, received, told; /* frames; told: of received, to the other side */
    size_t untold;         /* bytes of the frames that it was not told of */
    uint64_t ticked;       /* queued at the last tick of its link */
    netchan__parcel *parcels, *last_parcel;
    netchan__buf spare;    /* room for the bytes of another one */
    uint64_t down_since, checked; /* nanoseconds */
    uint64_t early_until, early_taken; /* see netchan__check_early() */
    uint64_t round_trip;   /* nanoseconds, newest; 0: not measured yet */
    char address[80], identity_text[NETCHAN_FINGERPRINT_SIZE], name[256];
    /* Listening: its own pair of channels, NULL until it was shown in link->accept; and the queue for that. */
    netchan *own_send, *own_recv;
    netchan__session *prev_new, *next_new;
    bool is_new, is_shown;
    netchan__map asked, questions; /* names that it waits for, and that we wait for, by number */
};

/* One listen or dial without its sockets, see [14]. */
struct netchan__hub {
    netchan_link link; /* first: what the user has is a hub */
    bool dials;
    netchan_options options; /* constant, defaults filled in; the texts are not kept */
    netchan_stats stats;
    netchan__session *sessions;
    netchan__session *session; /* dialling: the one there is */
    netchan__map by_id;        /* listening: sessions by the first bytes of their id */
    size_t addresses;          /* dialling: how many are tried in turn */
    size_t peers;              /* sessions */
    size_t orphans;            /* lanes of lost peers, whose values nobody has received yet */
    bool was_up, hanging_up, shut;
    size_t events_dropped;
    uint64_t unknown;
    size_t unreceived; /* values that were handed back to a peer and may not have reached it */
    size_t undelivered; /* values for one peer alone, which is gone */
    netchan__session *first_new, *last_new; /* listening: those that wait to be accepted */
    netchan__map names; /* netchan__name by their hashes */
    netchan__asked *asked;
    netchan__wanted *wanted;
    uint64_t last_wanted;
};

/* There is something to send. urgent: somebody waits for it. */
static void netchan__mark_pending(netchan__session *s, bool urgent) {
    netchan__net.hurry |= urgent;
    if (s->is_pending) return;
    s->is_pending = true;
    s->next_pending = netchan__net.pending;
    netchan__net.pending = s;
}

static size_t netchan__unsent(const netchan__session *s) { return netchan__buf_size(&s->out) - s->given; }

/* The link is of no use any more. */
static void netchan__wire_fail(netchan__wire *w, const char *reason) {
    if (w->failure) return;
    snprintf(w->failure_text, sizeof w->failure_text, "%s", reason);
    w->failure = w->failure_text;
    netchan__look();
}

/* Appends a frame that is not numbered. */
static void netchan__append_control(netchan__wire *w, unsigned type, const uint8_t *body, size_t size) {
    uint8_t head[12], *end = netchan__varint_put(head, size + 1);
    *end++ = (uint8_t)type;
    if (!netchan__buf_append(&w->control, head, (size_t)(end - head)) || !netchan__buf_append(&w->control, body, size))
        netchan__wire_fail(w, "out of memory for what is to be sent to it");
}

static void netchan__emit_control(netchan__wire *w, unsigned type, const uint8_t *body, size_t size) {
    netchan__append_control(w, type, body, size);
    if (w->session) netchan__mark_pending(w->session, true);
}

static void netchan__emit_number(netchan__wire *w, unsigned type, uint64_t n) {
    uint8_t body[10];
    if (netchan__buf_size(&w->control) < NETCHAN__CONTROL_MAX) /* who does not read gets no answers */
        netchan__emit_control(w, type, body, (size_t)(netchan__varint_put(body, n) - body));
}

static void netchan__append_ack(netchan__wire *w, const netchan__session *s) {
    uint8_t body[10];
    netchan__append_control(w, NETCHAN__ACK, body, (size_t)(netchan__varint_put(body, s->received) - body));
}

static void netchan__emit_ack(netchan__wire *w, const netchan__session *s) {
    netchan__append_ack(w, s);
    if (w->session) netchan__mark_pending(w->session, true);
}

/* The fields of each numbered frame type: c channel, e entry, o op, m match, f flags, p process, if a flag says so,
 * s size, n number; v a value, b bytes. */
static const char *netchan__frame_fields(unsigned type) {
    switch (type) {
    case NETCHAN__BYE: return "n";
    case NETCHAN__OFFER: return "ceofpsv";
    case NETCHAN__DEMAND: return "ceofps";
    case NETCHAN__WITHDRAW: case NETCHAN__WITHDRAWN: return "e";
    case NETCHAN__GRANT: return "msv";
    case NETCHAN__DECLINE: return "mn";
    case NETCHAN__TAKEN: return "m";
    case NETCHAN__DATA: return "cv";
    case NETCHAN__CLOSE: case NETCHAN__CLOSED: case NETCHAN__CLOSING: case NETCHAN__GONE: return "c";
    case NETCHAN__FRAGMENT_UP: return "mb";
    case NETCHAN__FRAGMENT_DOWN: return "eb";
    case NETCHAN__DROP: return "csn";
    case NETCHAN__IMPORT: case NETCHAN__IMPORTED: return "nfb";
    case NETCHAN__FORGET: return "n";
    case NETCHAN__CLAIM: case NETCHAN__COMMIT: return "emfsv";
    case NETCHAN__RELEASE: return "em";
    case NETCHAN__ACCEPT: return "en";
    case NETCHAN__CREDIT: return "cns";
    case NETCHAN__RETURN: return "csb";
    default: return NULL; /* what this version does not know */
    }
}

static uint64_t *netchan__frame_field(netchan__frame *f, char field) {
    switch (field) {
    case 'c': return &f->channel;
    case 'e': return &f->entry;
    case 'o': return &f->op;
    case 'm': return &f->match;
    case 'f': return &f->flags;
    case 's': return &f->size;
    case 'n': return &f->number;
    default: return NULL;
    }
}

static netchan__session *netchan__session_of(netchan__peer *p) { return (netchan__session *)(void *)p; }

/* How many bytes may wait for the link: with the window, which may be sent again, and with what credit allows. */
static size_t netchan__stream_limit(const netchan__session *s) {
    const netchan__peer *p = &s->peer;
    size_t lent = p->send ? p->their_memory / 2 : 0;
    if (p->send && p->send->lane.cap < lent / NETCHAN__FRAME_MAX) lent = p->send->lane.cap * NETCHAN__FRAME_MAX;
    return p->max_memory + NETCHAN_WINDOW + lent;
}

/* netchan__buf_reserve() for the stream. */
static uint8_t *netchan__reserve_out(netchan__session *s, size_t size) {
    netchan__buf *out = &s->out, more = {NULL, 0, 0, 0};
    netchan__wire *by = s->pinned_by;
    if (!by || out->cap - out->end >= size) return netchan__buf_reserve(out, size);
    if (!netchan__buf_reserve(&more, netchan__buf_size(out) + size)) return NULL;
    netchan__buf_append(&more, out->data + out->start, netchan__buf_size(out));
    if (by->unpinned) NETCHAN_FREE(out->data);
    else by->unpinned = out->data;
    *out = more;
    return out->data + out->end;
}

/* Appends a frame: its head, which is its type and fields, and room for `extra` bytes at its end, which are returned.
 * NULL when out of memory. lazy: see netchan__mark_pending(). */
static uint8_t *netchan__append_bytes(netchan__session *s, const uint8_t *head, size_t size, size_t extra, bool lazy) {
    size_t length = size + extra, total = netchan__varint_size(length) + length;
    NETCHAN_ASSERT(total <= NETCHAN__FRAME_MAX);
    if (netchan__unsent(s) + total > netchan__stream_limit(s)) {
        netchan__breach(&s->peer, "it does not read what it is sent");
        return NULL;
    }
    uint8_t *to = netchan__reserve_out(s, total);
    if (!to) {
        netchan__breach(&s->peer, "out of memory for what is to be sent to it");
        return NULL;
    }
    to = netchan__varint_put(to, length);
    memcpy(to, head, size);
    s->out.end += total;
    s->queued++;
    netchan__mark_pending(s, !lazy || netchan__unsent(s) >= NETCHAN__FRAME_MAX);
    return to + size;
}

/* The same for any frame. */
static uint8_t *netchan__append_frame(netchan__session *s, const netchan__frame *frame, size_t extra) {
    uint8_t head[80], *p = head;
    *p++ = (uint8_t)frame->type;
    for (const char *field = netchan__frame_fields(frame->type); *field; field++) {
        const uint64_t *number = netchan__frame_field((netchan__frame *)(uintptr_t)frame, *field);
        if (number) p = netchan__varint_put(p, *number);
        else if (*field == 'p' && frame->flags & NETCHAN__RELAYED) {
            memcpy(p, frame->process, sizeof frame->process);
            p += sizeof frame->process;
        }
    }
    return netchan__append_bytes(s, head, (size_t)(p - head), extra, frame->lazy || frame->type == NETCHAN__CREDIT);
}

static void netchan__append_parcel(netchan__session *s, netchan__parcel *parcel) {
    parcel->next = NULL;
    if (s->last_parcel) s->last_parcel->next = parcel;
    else s->parcels = parcel;
    s->last_parcel = parcel;
}

/* Memory that was used a moment ago costs less than new memory, which the system has to map and clear. Returns NULL
 * when out of memory. */
static uint8_t *netchan__parcel_room(netchan__session *s, netchan__buf *bytes, size_t size) {
    if (s->spare.cap >= size) {
        *bytes = s->spare;
        memset(&s->spare, 0, sizeof s->spare);
        return bytes->data;
    }
    bytes->data = (uint8_t *)NETCHAN_MALLOC(size);
    if (bytes->data) bytes->cap = size;
    return bytes->data;
}

/* Keeps the larger one, in bounds. */
static void netchan__keep_room(netchan__session *s, netchan__buf *bytes) {
    netchan__buf other = s->spare;
    if (bytes->cap <= other.cap || bytes->cap > NETCHAN__KEPT) return;
    s->spare = *bytes;
    s->spare.start = s->spare.end = 0;
    *bytes = other;
}

/* When nothing was said for a while, what is kept for more goes. */
static void netchan__spare_nothing(netchan__session *s) {
    netchan__buf_free(&s->spare);
    if (!netchan__buf_size(&s->out) && !s->pinned_by) netchan__buf_free(&s->out);
}

/* Can it be sent as it lies in memory, but for what comes before it? */
static bool netchan__lies_as_sent(const netchan_value *v) {
    return netchan__is_block(v) && !netchan__has_children(v) &&
           (netchan__item_size(v->type) == 1 || netchan__little_endian());
}

/* Returns false when out of memory. */
static bool netchan__fill_parcel(netchan__session *s, netchan__parcel *parcel, const netchan__frame *f) {
    bool lent = f->lends && netchan__lies_as_sent(&f->value);
    size_t size = (size_t)f->size;
    if (lent) {
        parcel->lent = (const uint8_t *)f->value.as.block.data;
        parcel->lent_size = f->value.as.block.count * netchan__item_size(f->value.type);
        size -= parcel->lent_size;
    }
    uint8_t *to = netchan__parcel_room(s, &parcel->bytes, size);
    if (!to) return false;
    parcel->bytes.end += size;
    if (lent) {
        uint8_t *length = netchan__write_varint(to + size, parcel->lent_size);
        netchan__write_tag(length, netchan__block_tag(f->value.type));
    }
    return lent || (netchan__hold_ends(parcel, &f->value) && netchan__write_for(&s->peer, to + size, &f->value));
}

static void netchan__free_parcel(netchan__parcel *parcel) {
    netchan_clear(&parcel->ends);
    netchan__buf_free(&parcel->bytes);
    NETCHAN_FREE(parcel);
}

/* Queues a large value to be cut into fragments. */
static uint64_t netchan__queue_parcel(netchan__session *s, const netchan__frame *f) {
    netchan__parcel *parcel = (netchan__parcel *)netchan__alloc(sizeof *parcel);
    if (!parcel || !netchan__fill_parcel(s, parcel, f)) {
        if (parcel) netchan__free_parcel(parcel);
        netchan__breach(&s->peer, "out of memory for what is to be sent to it");
        return UINT64_MAX;
    }
    parcel->from_home = f->type == NETCHAN__COMMIT;
    parcel->entry = f->entry;
    parcel->match = f->match;
    parcel->id = parcel->from_home ? f->entry : f->match;
    netchan__append_parcel(s, parcel);
    return UINT64_MAX; /* netchan__shipped() will tell */
}

/* netchan__peer.keep. Who ends a value has received it all, or breaks the protocol; a session that is over has no
 * parcels any more. So there is nothing to keep, and should there be after all, it is not read where it was freed. */
static void netchan__session_keep(netchan__peer *p, bool shipped, uint64_t entry) {
    for (netchan__parcel *parcel = netchan__session_of(p)->parcels; parcel; parcel = parcel->next) {
        if (parcel->entry != entry || parcel->from_home != shipped || !parcel->lent_size) continue;
        if (!netchan__buf_append(&parcel->bytes, parcel->lent, parcel->lent_size))
            netchan__breach(p, "out of memory for what is to be sent to it");
        parcel->lent_size = 0;
    }
}

/* netchan__peer.emit. After both farewells only what accounts for values is still of use: what else comes may find the
 * other side gone, which would look like a link that broke. */
static uint64_t netchan__session_emit(netchan__peer *p, const netchan__frame *f) {
    netchan__session *s = netchan__session_of(p);
    if (s->bye_sent && s->bye_received && f->type != NETCHAN__CREDIT && f->type != NETCHAN__RETURN) return s->queued;
    bool large = f->has_value && f->size > NETCHAN__FRAGMENT;
    size_t extra = f->bytes ? f->count : f->has_value && !large ? (size_t)f->size : 0;
    netchan__names names = netchan__names_of(p);
    bool named = !f->has_value || !netchan__has_ends(&f->value) || netchan__export_all(p, &f->value);
    if (!named) netchan__breach(p, "out of memory for what is to be sent to it");
    uint8_t *to = named ? netchan__append_frame(s, f, extra) : NULL;
    if (!to) return UINT64_MAX;
    if (f->bytes && extra) memcpy(to, f->bytes, extra);
    else if (extra) netchan__write_value(to + extra, &f->value, &names.ends);
    return large ? netchan__queue_parcel(s, f) : s->queued;
}

/* netchan__peer.emit_data: a value without ends that fits into a fragment. */
static uint64_t netchan__session_emit_data(netchan__peer *p, uint64_t channel, const netchan_value *v, size_t size) {
    netchan__session *s = netchan__session_of(p);
    uint8_t head[12] = {NETCHAN__DATA}, *end = netchan__varint_put(head + 1, channel);
    if (s->bye_sent && s->bye_received) return s->queued;
    uint8_t *to = netchan__append_bytes(s, head, (size_t)(end - head), size, true);
    if (!to) return UINT64_MAX;
    netchan__names names = netchan__names_of(p);
    netchan__write_value(to + size, v, &names.ends);
    return s->queued;
}

/* netchan__peer.owe */
static void netchan__session_owe(netchan__peer *p) { netchan__mark_pending(netchan__session_of(p), false); }

/* Takes so many bytes of a parcel. */
static void netchan__take_bytes(netchan__parcel *parcel, uint8_t *to, size_t count) {
    size_t own = netchan__buf_size(&parcel->bytes);
    if (own > count) own = count;
    if (own) memcpy(to, parcel->bytes.data + parcel->bytes.start, own);
    netchan__buf_pass(&parcel->bytes, own, true);
    if (count == own) return;
    memcpy(to + own, parcel->lent, count - own);
    parcel->lent += count - own;
    parcel->lent_size -= count - own;
}

/* Puts the next fragment of the first parcel into the stream; the parcels take turns. */
static void netchan__cut_fragment(netchan__session *s) {
    netchan__parcel *parcel = s->parcels;
    size_t size = netchan__buf_size(&parcel->bytes) + parcel->lent_size;
    size_t count = size < NETCHAN__FRAGMENT ? size : (size_t)NETCHAN__FRAGMENT;
    netchan__frame f = netchan__new_frame(parcel->from_home ? NETCHAN__FRAGMENT_DOWN : NETCHAN__FRAGMENT_UP);
    f.entry = f.match = parcel->id;
    uint8_t *to = s->bye_sent && s->bye_received ? NULL : netchan__append_frame(s, &f, count);
    if (s->peer.breach) return; /* it was not sent, and never will be */
    if (to) netchan__take_bytes(parcel, to, count);
    s->parcels = parcel->next;
    if (!s->parcels) s->last_parcel = NULL;
    if (to && size > count) {
        netchan__append_parcel(s, parcel);
        return;
    }
    netchan__shipped(&s->peer, parcel->from_home, parcel->entry, parcel->match, s->queued);
    netchan__keep_room(s, &parcel->bytes);
    netchan__free_parcel(parcel);
}

/* The bytes of the frame of `out` that begins there. */
static size_t netchan__frame_size(const netchan__session *s, size_t offset) {
    const uint8_t *begin = s->out.data + s->out.start + offset;
    netchan__reader r = {begin, s->out.data + s->out.end, false};
    uint64_t length = netchan__read_varint(&r);
    return (size_t)(r.p - begin) + (size_t)length;
}

/* The other side has all frames up to this one. */
static void netchan__trim(netchan__session *s, uint64_t acked) {
    size_t size = 0;
    for (; s->acked < acked; s->acked++) size += netchan__frame_size(s, size);
    netchan__buf_pass(&s->out, size, s->out.cap <= NETCHAN__KEPT); /* until netchan__spare_nothing() */
    s->given -= size < s->given ? size : s->given;
}

static void netchan__on_ack(netchan__session *s, uint64_t n) {
    if (n > s->peer.sent) {
        netchan__breach(&s->peer, "it acknowledged what was never sent");
        return;
    }
    if (n <= s->acked) return;
    netchan__trim(s, n);
    s->wire->moved = true;
    if (netchan__unsent(s) || s->parcels) netchan__mark_pending(s, true); /* the window is open again */
}

/* At the limit the I/O thread looks whether a new link is wanted. */
static void netchan__count_record(uint64_t *count) {
    if (++*count == NETCHAN_KEY_RECORDS) netchan__look();
}

/* The next frames for the link, at most one record of NETCHAN__FRAME_MAX bytes, which count as sent. Returns how many
 * bytes; 0: there is nothing to send. They are in record; or, with in_place, they may stay in the stream, where they
 * are until netchan__wire_encrypted(). */
static size_t netchan__wire_output(netchan__wire *w, uint8_t *record, const uint8_t **in_place) {
    netchan__session *s = w->up && !w->failure ? w->session : NULL;
    if (w->up && !w->failure && (w->paused || w->records_out >= 2 * (uint64_t)NETCHAN_KEY_RECORDS)) return 0;
    while (s && s->parcels && netchan__unsent(s) < NETCHAN__STREAM_LOW && !s->peer.breach) netchan__cut_fragment(s);
    if (s && s->peer.owes && s->peer.lane) netchan__lend_now(s->peer.lane);
    bool frames = s && netchan__unsent(s) && s->given < NETCHAN_WINDOW;
    if (s && s->told != s->received && (frames || w->ack_now || s->untold >= NETCHAN__ACK_BYTES)) {
        netchan__append_ack(w, s);
        s->told = s->received;
        s->untold = 0;
        w->ack_now = false;
        w->ack_at = 0;
    }
    size_t size = netchan__buf_size(&w->control), begin = s ? s->given : 0, count = 0;
    if (size) {
        memcpy(record, w->control.data + w->control.start, size);
        mbedtls_platform_zeroize(w->control.data + w->control.start, size); /* a HELLO carries a secret */
        netchan__buf_consume(&w->control, size);
    }
    size_t most = w->moved ? (size_t)NETCHAN__FRAME_MAX : (size_t)NETCHAN__RECORD_FIRST;
    while (frames && netchan__unsent(s) && s->given < NETCHAN_WINDOW) {
        size_t total = netchan__frame_size(s, s->given), filled = size + (s->given - begin);
        if (filled + total > NETCHAN__FRAME_MAX || (count && filled + total > most)) break;
        s->given += total;
        count++;
    }
    if (count) {
        const uint8_t *frames_at = s->out.data + s->out.start + begin;
        if (in_place && !size) {
            *in_place = frames_at;
            s->pinned_by = w;
            w->pins = s;
        } else memcpy(record + size, frames_at, s->given - begin);
        size += s->given - begin;
        s->peer.sent += count;
        s->peer.stats->frames_sent += count;
    }
    if (!size) return 0;
    netchan__count_record(&w->records_out);
    w->hub->stats.records_sent++;
    w->hub->stats.bytes_sent += size;
    return size;
}

/* What netchan__wire_output() left in its place was encrypted. */
static void netchan__wire_encrypted(netchan__wire *w) {
    NETCHAN_FREE(w->unpinned);
    w->unpinned = NULL;
    if (w->pins) w->pins->pinned_by = NULL;
    w->pins = NULL;
}

/* The link has all that there is for it. */
static bool netchan__wire_idle(const netchan__wire *w) {
    const netchan__session *s = w->failure ? NULL : w->session;
    return !netchan__buf_size(&w->control) && (!s || (!netchan__unsent(s) && !s->parcels));
}

/* Nothing new begins from here. returns: what the peer has sent into the buffer here goes back. */
static void netchan__emit_bye(netchan__session *s, bool returns) {
    if (s->bye_sent) return;
    netchan__emit_ids(&s->peer, NETCHAN__BYE, 0, 0, 0, returns, 0);
    s->bye_sent = s->peer.leaving = true;
}

static void netchan__on_bye(netchan__session *s, uint64_t returns) {
    s->bye_received = s->peer.farewell = true;
    s->returns = returns != 0;
    netchan__leave(&s->peer);
}

static bool netchan__check_received(netchan__session *s, int result) {
    if (result == NETCHAN_ENOMEM) netchan__breach(&s->peer, "out of memory for a value it sent");
    else if (result != NETCHAN_OK) netchan__breach(&s->peer, "it sent a malformed value");
    return result == NETCHAN_OK;
}

/* A value within credit, of which there are most. */
static void netchan__receive_data(netchan__session *s, netchan__reader *r) {
    netchan_value v = netchan__nil_value;
    uint64_t channel = netchan__read_varint(r);
    size_t size = netchan__left(r), memory = 0;
    int result = NETCHAN_OK;
    if (r->bad) netchan__breach(&s->peer, "it sent a frame that is cut off");
    else if (size > s->peer.max_message) netchan__breach(&s->peer, "it sent a value over max_message");
    else if (size) result = netchan__receive_into_buffer(&s->peer, &v, r->p, size, &memory);
    if (netchan__check_received(s, result) && !s->peer.breach)
        netchan__on_data(&s->peer, channel, &v, size, memory);
    netchan_clear(&v);
}

/* Reads the fields of a frame. Returns false after a breach. */
static bool netchan__read_frame(netchan__session *s, netchan__frame *f, netchan__reader *r) {
    const char *field = netchan__frame_fields(f->type);
    for (; *field && *field != 'b' && *field != 'v'; field++) {
        uint64_t *number = netchan__frame_field(f, *field);
        if (number) *number = netchan__read_varint(r);
        else if (f->flags & NETCHAN__RELAYED) {
            const uint8_t *process = netchan__read_bytes(r, sizeof f->process);
            if (process) memcpy(f->process, process, sizeof f->process);
        }
    }
    size_t left = netchan__left(r);
    if (r->bad) {
        netchan__breach(&s->peer, "it sent a frame that is cut off");
        return false;
    }
    if (*field == 'b') {
        f->count = left;
        f->bytes = r->p;
    } else if (*field == 'v' && left) {
        if (f->type == NETCHAN__DATA) f->size = left;
        if (f->size > s->peer.max_message) {
            netchan__breach(&s->peer, "it sent a value over max_message");
            return false;
        }
        int result = f->size != left ? NETCHAN_EPROTO
                                     : netchan__decode_from(&s->peer, &f->value, r->p, left, 0, &f->memory);
        if (!netchan__check_received(s, result)) return false;
        f->has_value = true;
    }
    return true;
}

static void netchan__on_naming(netchan__session *s, netchan__frame *f);

/* A numbered frame. size: its bytes, with its length. */
static void netchan__on_frame(netchan__session *s, uint64_t now, unsigned type, netchan__reader *r, size_t size) {
    s->received++;
    s->untold += size;
    s->wire->moved = true;
    s->peer.stats->frames_received++;
    uint64_t period = NETCHAN__ACK_MS * (uint64_t)1000000; /* the timers of all links coincide */
    if (!s->wire->ack_at) s->wire->ack_at = (now / period + 1) * period;
    if (type == NETCHAN__DATA) {
        netchan__receive_data(s, r);
        return;
    }
    netchan__frame f = netchan__new_frame(type);
    if (!netchan__frame_fields(type) || !netchan__read_frame(s, &f, r)) return;
    if (type == NETCHAN__BYE) netchan__on_bye(s, f.number);
    else if (type == NETCHAN__IMPORT || type == NETCHAN__IMPORTED || type == NETCHAN__FORGET) netchan__on_naming(s, &f);
    else netchan__handle(&s->peer, &f);
    netchan_clear(&f.value);
}

/* A frame that is not numbered, of a link that was greeted. */
static void netchan__on_control(netchan__wire *w, uint64_t now, unsigned type, netchan__reader *r) {
    netchan__session *s = w->session;
    uint64_t n = netchan__read_varint(r);
    if (r->bad) netchan__breach(&s->peer, "it sent a frame that is cut off");
    else if (type == NETCHAN__PING) netchan__emit_number(w, NETCHAN__PONG, n);
    else if (type == NETCHAN__PONG && n <= now) s->round_trip = now - n;
    else if (type == NETCHAN__ACK) netchan__on_ack(s, n);
}

static void netchan__on_greeting(netchan__wire *w, uint64_t now, unsigned type, netchan__reader *r);

/* Any frame of a link. */
static void netchan__dispatch(netchan__wire *w, uint64_t now, unsigned type, netchan__reader *r, size_t size) {
    bool greets = type == NETCHAN__HELLO || (type >= NETCHAN__RESUME && type <= NETCHAN__REFUSED);
    bool controls = type == NETCHAN__PING || type == NETCHAN__PONG || type == NETCHAN__ACK;
    if (greets || !w->up) netchan__on_greeting(w, now, type, r);
    else if (!w->session) netchan__wire_fail(w, "its session is over");
    else if (controls) netchan__on_control(w, now, type, r);
    else netchan__on_frame(w->session, now, type, r, size);
}

/* Works off whole frames from [p, end). Returns how many bytes they were. */
static size_t netchan__parse(netchan__wire *w, uint64_t now, const uint8_t *data, size_t size) {
    size_t done = 0;
    while (!w->failure && !w->paused && !(w->session && w->session->peer.breach)) {
        netchan__reader r = {data + done, data + size, false};
        uint64_t length = netchan__read_varint(&r);
        if (r.bad && size - done >= 10) length = UINT64_MAX; /* no varint is longer */
        else if (r.bad) break;
        size_t head = r.bad ? 0 : (size_t)(r.p - (data + done));
        if (length == 0 || length > NETCHAN__FRAME_MAX - head) {
            const char *what = "it announced a frame that is empty or too long";
            if (w->session) netchan__breach(&w->session->peer, what);
            else netchan__wire_fail(w, what);
            break;
        }
        if (length > netchan__left(&r)) break;
        netchan__reader body = {r.p + 1, r.p + length, false};
        done += head + (size_t)length;
        netchan__dispatch(w, now, *r.p, &body, head + (size_t)length);
    }
    return done;
}

/* Bytes from the link: one record. Look at netchan__wire_over() afterwards. */
static void netchan__wire_input(netchan__wire *w, uint64_t now, const uint8_t *data, size_t size) {
    w->last_input = now;
    netchan__count_record(&w->records_in);
    w->hub->stats.records_received++;
    w->hub->stats.bytes_received += size;
    bool whole = true;
    netchan__buf *in = &w->in;
    if (netchan__buf_size(in)) {
        whole = netchan__buf_append(in, data, size);
        if (whole) netchan__buf_consume(in, netchan__parse(w, now, in->data + in->start, netchan__buf_size(in)));
    } else {
        size_t done = netchan__parse(w, now, data, size);
        if (done < size && !w->failure) whole = netchan__buf_append(in, data + done, size - done);
    }
    if (!whole && w->session) netchan__breach(&w->session->peer, "out of memory for what it sent");
    else if (!whole) netchan__wire_fail(w, "out of memory for what it sent");
}

/* Why the link is to be closed, or NULL. */
static const char *netchan__wire_over(const netchan__wire *w) {
    return w->failure ? w->failure : w->session ? w->session->peer.breach : NULL;
}

/* Its keys have served for as long as they should. */
static bool netchan__wire_worn(const netchan__wire *w) {
    return w->records_in >= NETCHAN_KEY_RECORDS || w->records_out >= NETCHAN_KEY_RECORDS;
}

/* Gives back the values that came early and have waited for long enough (A2), and what home knows as a receive while
 * there is none (A3). Returns when to look again. */
static uint64_t netchan__check_early(netchan__session *s, uint64_t now) {
    netchan *ch = s->peer.recv;
    bool idle = !ch || (!ch->early.head && (!ch->stand_ins || ch->receivers.head));
    if (idle) s->early_until = 0;
    if (idle) return UINT64_MAX;
    if (!s->early_until || s->early_taken != ch->early_taken)
        s->early_until = now + NETCHAN_EARLY_MS * (uint64_t)1000000;
    s->early_taken = ch->early_taken;
    if (now < s->early_until) return s->early_until;
    netchan__give_early_back(ch);
    netchan__settle();
    return UINT64_MAX;
}

/* Heartbeats and acknowledgements of a link that was greeted. Returns when to call again, in nanoseconds; the link of a
 * silent peer has failed. */
static uint64_t netchan__wire_tick(netchan__wire *w, uint64_t now) {
    int ping_ms = w->hub->options.ping_ms;
    uint64_t interval = (uint64_t)ping_ms * 1000000u;
    if (now > w->last_tick + 2 * interval) w->last_input = now; /* this process was stopped: first read what came */
    if (w->paused) w->last_input += now - (w->last_tick > w->last_input ? w->last_tick : w->last_input);
    w->last_tick = now;
    if (now >= w->last_input + 3 * interval) {
        char text[64];
        snprintf(text, sizeof text, "nothing was heard from it for %lld ms", 3LL * ping_ms);
        netchan__wire_fail(w, text);
        return now + interval;
    }
    if (w->session && w->session->ticked == w->session->queued) netchan__spare_nothing(w->session);
    if (w->session) w->session->ticked = w->session->queued;
    uint64_t early = w->session ? netchan__check_early(w->session, now) : UINT64_MAX;
    if (w->ack_at && now >= w->ack_at && w->session) {
        w->ack_now = true;
        w->ack_at = 0;
        netchan__mark_pending(w->session, true);
    }
    /* A listener is a little earlier than its peers, which then need not ask it; and the heartbeats of all links
     * coincide, as each costs a wake-up of this process. */
    uint64_t pause = w->hub->dials ? interval : interval - interval / 8, grid = interval / 16 ? interval / 16 : 1;
    if (!w->last_ping || (now >= w->last_input + pause && now >= w->last_ping + pause)) {
        netchan__emit_number(w, NETCHAN__PING, now);
        w->last_ping = now;
    }
    uint64_t next = (w->last_input > w->last_ping ? w->last_input : w->last_ping) + pause;
    if (next <= now) next = now + pause;
    if (next > w->last_input + 3 * interval) next = w->last_input + 3 * interval;
    next = (next + grid - 1) / grid * grid;
    if (w->ack_at && w->ack_at < next) next = w->ack_at;
    return early < next ? early : next;
}

/* netchan__ends.find for values that did not leave: they were named from the other point of view. */
static netchan *netchan__find_own(netchan__ends *e, const uint8_t *name) {
    netchan__peer *p = ((netchan__names *)(void *)e)->peer;
    uint64_t id = netchan__load(name + 1, 8);
    netchan__export *x = name[0] & NETCHAN__YOURS ? NULL : (netchan__export *)netchan__map_get(&p->exports, id);
    netchan *ch = x ? x->ch : (netchan *)netchan__map_get(&p->imports, id);
    if (ch && ch->is_end) netchan__retain_end(ch);
    else netchan_retain(ch);
    return ch;
}

/* The values that were sent within credit and never left, in their order; each is a send again. */
static void netchan__take_back(netchan__session *s, netchan__queue *unsent) {
    netchan *ch = s->peer.send;
    netchan__reader r = {NULL, NULL, false};
    if (netchan__unsent(s)) {
        r.p = s->out.data + s->out.start + s->given;
        r.end = s->out.data + s->out.end;
    }
    while (netchan__left(&r)) {
        size_t length = (size_t)netchan__read_varint(&r);
        netchan__reader body = {r.p + 1, r.p + length, false};
        bool is_data = *r.p == NETCHAN__DATA && netchan__read_varint(&body) == ch->channel;
        r.p += length;
        if (!is_data) continue;
        netchan_value v = netchan__nil_value;
        size_t size = netchan__left(&body);
        ch->in_flight--;
        s->peer.returned++;
        s->peer.stats->values_sent--;
        netchan__names names = {{NULL, netchan__find_own, false}, &s->peer};
        netchan__head h;
        netchan__measure m;
        if (netchan__scan(body.p, size, &h, &m) != NETCHAN_OK || netchan__build(&v, &h, &m, &names.ends)) {
            ch->undelivered++; /* out of memory */
            continue;
        }
        netchan__waiter *w = netchan__detach(ch, &v, size, m.block);
        if (w) netchan__enqueue(unsent, w, false);
    }
}

static void netchan__drop_parcels(netchan__session *s) {
    while (s->parcels) {
        netchan__parcel *parcel = s->parcels;
        s->parcels = parcel->next;
        netchan__free_parcel(parcel);
    }
    s->last_parcel = NULL;
}

/* The session is over for channels: they learn what became of what was pending. peer.taken, returned and unknown count
 * it. */
static void netchan__session_lost(netchan__session *s) {
    netchan__peer *p = &s->peer;
    netchan__queue unsent = {NULL, NULL}, none = {NULL, NULL};
    p->down = true;
    netchan__drop_parcels(s); /* the values that they read may go */
    if (p->send) {
        netchan__take_back(s, &unsent);
        if (s->bye_sent && s->bye_received && !s->returns) p->send->in_flight = 0; /* it arrived */
        netchan__end_lost(p->send, p, &unsent);
        netchan__end_lost(p->recv, p, &none);
        netchan__relay_all(p->recv); /* what waited for `given_up` */
    } /* before its ends are lost: they may be in those values */
    netchan__home_lost(p);
    netchan__ends_lost(p);
    p->send = p->recv = NULL;
    netchan__map_remove(&netchan__net.by_number, p->number);
    NETCHAN__UNLINK(netchan__net.peers, p, prev_peer, next_peer);
    netchan__settle();
}

static void netchan__session_free(netchan__session *s) {
    for (netchan__session **at = &netchan__net.pending; *at; at = &(*at)->next_pending)
        if (*at == s) {
            *at = s->next_pending;
            break;
        }
    netchan__drop_parcels(s);
    if (s->pinned_by) {
        s->pinned_by->pins = NULL;
        if (!s->pinned_by->unpinned) { /* it is being read */
            s->pinned_by->unpinned = s->out.data;
            s->out.data = NULL;
        }
    }
    netchan__buf_free(&s->out);
    netchan__buf_free(&s->spare);
    mbedtls_platform_zeroize(s->secret, sizeof s->secret);
    NETCHAN_FREE(s);
}

NETCHAN__SMALL_BEGIN
/* ====================================================================================================================
 * [14] Hubs: one listen or dial without its sockets. A hub greets what comes over its links, knows which session goes
 * on over which, and says what happened. Net.
 *
 * Each link begins with one of two questions of the dialling side: HELLO for a new session, RESUME for the one that it
 * has. Who resumes proves that it knows the secret which the listener gave to the session in its first HELLO, in a
 * proof that is bound to this one link; and the other side must have the key that it had then. A session that was
 * lost, and one of a listener that was started anew, are refused.
 *
 * Invariants.
 *   H1  A session has at most one link. Generations grow: a link that was asked for earlier never takes the place of
 *       one that was asked for later.
 *   H2  A session ends once: when both sides said farewell and all their frames arrived, or as lost. Only then are its
 *       values given to others.
 * ================================================================================================================== */

enum { NETCHAN__EVENTS_MAX = 64 };

typedef struct netchan__log_line netchan__log_line;
struct netchan__log_line {
    netchan__log_line *next;
    void (*log)(void *arg, int level, const char *text);
    void *arg;
    int level;
    char text[480];
};

static netchan__log_line *netchan__logs, *netchan__last_log; /* to be written without locks. Net. */

/* ---- Events and the log. ---- */

static void netchan__log(netchan__hub *h, int level, const char *format, ...) NETCHAN__PRINTF(3, 4);
static void netchan__log(netchan__hub *h, int level, const char *format, ...) {
    netchan__log_line *line = h->options.log ? (netchan__log_line *)netchan__alloc(sizeof *line) : NULL;
    if (!line) return;
    va_list args;
    va_start(args, format);
    vsnprintf(line->text, sizeof line->text, format, args);
    va_end(args);
    line->log = h->options.log;
    line->arg = h->options.log_arg;
    line->level = level;
    if (netchan__last_log) netchan__last_log->next = line;
    else netchan__logs = line;
    netchan__last_log = line;
}

/* An event while it is put together. */
typedef struct netchan__news {
    netchan_entry entries[10];
    size_t count;
} netchan__news;

static void netchan__add(netchan__news *n, const char *key, netchan_value value) {
    n->entries[n->count].key = key;
    n->entries[n->count++].value = value;
}

static netchan__news netchan__begin_event(const char *name, uint64_t peer, const char *address, const char *reason) {
    netchan__news n;
    n.count = 0;
    netchan__add(&n, "event", netchan_str(name));
    if (peer) netchan__add(&n, "peer", netchan_uint(peer));
    if (address) netchan__add(&n, "address", netchan_str(address));
    if (reason) netchan__add(&n, "reason", netchan_str(reason));
    return n;
}

/* Puts the event into the channel of events, in place of the oldest if that is full. */
static void netchan__event(netchan__hub *h, netchan__news n) {
    netchan__lane *lane = &h->link.events->lane;
    netchan_value event;
    if (lane->closing) return;
    if (h->events_dropped) netchan__add(&n, "dropped", netchan_uint(h->events_dropped));
    netchan_value map = netchan_map(n.entries, n.count);
    if (!netchan__lane_room(lane) || netchan_copy(&event, &map) != NETCHAN_OK) {
        h->events_dropped++;
        return;
    }
    h->events_dropped = 0;
    if (netchan__held(lane) >= lane->cap) {
        netchan__slot oldest = netchan__lane_pop(lane);
        h->events_dropped = 1 + (size_t)netchan_as_uint(netchan_get(&oldest.value, "dropped"), 0);
        netchan_clear(&oldest.value);
    }
    netchan__lane_push(lane, &event, 0, 0, 0);
    netchan__lane_changed(lane);
}

/* netchan__net.on_drained */
static void netchan__lane_drained(netchan__lane *lane) {
    netchan__hub *h = (netchan__hub *)lane->hub;
    if (!h) return;
    h->orphans -= lane->orphaned;
    if (lane->ch != h->link.recv) lane->ch->closing = true; /* there will be no other */
    if (lane->closed_by_peer) netchan__event(h, netchan__begin_event("closed", lane->peer_number, NULL, NULL));
}

/* ---- Statistics. ---- */

/* Fills in what is looked at and not counted. */
static netchan_stats netchan__hub_stats(const netchan__hub *h) {
    netchan_stats stats = h->stats;
    const netchan *send = h->link.send;
    stats.peers = h->peers;
    stats.queued = netchan__held(&send->lane) + send->detached;
    for (const netchan__session *s = h->sessions; s; s = s->next) {
        stats.queued += s->peer.direct ? netchan__held(s->peer.direct) : 0;
        stats.queued += s->own_send ? netchan__held(&s->own_send->lane) : 0;
    }
    stats.in_flight = send->in_flight;
    for (const netchan__match *m = send->matches; m; m = m->next)
        stats.in_flight += m->receiver && !m->receiver->op && (m->step == 3 || m->carried);
    for (const netchan__session *s = h->sessions; s; s = s->next)
        if (s->round_trip / 1000 > stats.round_trip_us) stats.round_trip_us = s->round_trip / 1000;
    return stats;
}

/* ---- Peers with a pair of channels of their own. ----
 *
 * Each session of a listener can be received from link->accept, in the order in which they began. One at a time stands
 * in that channel; who takes it takes the peer out of link->send and link->recv. */

static void netchan__dequeue_session(netchan__session *s) {
    netchan__hub *h = s->hub;
    if (!s->is_new) return;
    if (s->prev_new) s->prev_new->next_new = s->next_new;
    else h->first_new = s->next_new;
    if (s->next_new) s->next_new->prev_new = s->prev_new;
    else h->last_new = s->prev_new;
    s->is_new = false;
}

static void netchan__enqueue_session(netchan__session *s) {
    netchan__hub *h = s->hub;
    s->is_new = true;
    s->prev_new = h->last_new;
    if (h->last_new) h->last_new->next_new = s;
    else h->first_new = s;
    h->last_new = s;
}

static netchan *netchan__make_link_channel(size_t capacity, bool sends);

static bool netchan__make_own_channels(netchan__session *s) {
    if (s->own_send) return true;
    s->own_send = netchan__make_link_channel(s->hub->options.buffer, true);
    s->own_recv = netchan__make_link_channel(0, false);
    if (s->own_send && s->own_recv) {
        s->own_recv->is_merge = true; /* of one lane, or none */
        s->own_recv->lanes = NULL;
        return true;
    }
    netchan_free(s->own_send);
    netchan_free(s->own_recv);
    s->own_send = s->own_recv = NULL;
    return false;
}

/* Puts the next peer into link->accept when the last was taken. */
static void netchan__show_next(netchan__hub *h) {
    netchan__session *s = h->first_new;
    netchan__lane *lane = s ? &h->link.accept->lane : NULL;
    if (!s || h->shut || netchan__held(lane) || lane->out) return;
    if (!netchan__lane_room(lane) || !netchan__make_own_channels(s)) return;
    netchan_entry entries[6] = {{"peer", netchan_uint(s->peer.number)},
                                {"identity", netchan_str(s->identity_text)},
                                {"name", netchan_str(s->name)},
                                {"address", netchan_str(s->address)},
                                {"send", netchan_sender(s->own_send)},
                                {"recv", netchan_receiver(s->own_recv)}};
    netchan_value map = netchan_map(entries, 6), shown;
    if (netchan_copy(&shown, &map) != NETCHAN_OK) return;
    netchan__dequeue_session(s);
    s->is_shown = true;
    netchan__lane_push(lane, &shown, 0, 0, 0);
    netchan__lane_changed(lane);
}

/* What is being negotiated for this lane goes with it to another channel. */
static void netchan__move_lane(netchan__lane *lane, netchan *to) {
    netchan *from = lane->ch;
    size_t cap = lane->cap, pinned = lane->pinned;
    lane->cap = lane->pinned = 1; /* out of the list of those that are ready */
    netchan__update_ready(lane);
    NETCHAN__UNLINK(from->lanes, lane, prev, next);
    NETCHAN__LINK(to->lanes, lane, prev, next);
    netchan__match *next;
    for (netchan__match *m = from->matches; m; m = next) {
        next = m->next;
        if (m->lane != lane) continue;
        NETCHAN__UNLINK(from->matches, m, prev, next);
        NETCHAN__LINK(to->matches, m, prev, next);
        m->ch = to;
    }
    netchan__mark_dirty(from);
    lane->ch = to;
    lane->cap = cap;
    lane->pinned = pinned;
    netchan__update_ready(lane);
    netchan__lane_changed(lane);
}

/* The peer gets its own pair of channels: what it sends, and what waits for it, from now on and from before. */
static void netchan__take_aside(netchan__session *s) {
    netchan__peer *p = &s->peer;
    netchan__hub *h = s->hub;
    if (!p->work || p->work != h->link.send) return;
    for (size_t i = 0; i < p->waiters.cap; i++) {
        netchan__waiter *w = (netchan__waiter *)netchan__map_at(&p->waiters, i);
        if (!w || (w->is_send ? w->lane != p->lane || !w->lane : w->ch != h->link.send)) continue;
        w->ch = w->is_send ? s->own_recv : s->own_send;
        if (w->is_send || !w->queue) continue;
        netchan__dequeue(w);
        netchan__enqueue(netchan__queue_of(w), w, false);
    }
    p->work = s->own_send;
    if (p->direct) netchan__move_lane(p->direct, s->own_send);
    if (p->lane) netchan__move_lane(p->lane, s->own_recv);
    else s->own_recv->closing = true;
    if (h->link.send->closing) netchan__close(s->own_send);
    netchan__mark_dirty(s->own_send);
    netchan__mark_dirty(s->own_recv);
}

/* netchan.on_taken of link->accept */
static void netchan__on_accepted(netchan *ch, const netchan_value *v) {
    uint64_t number = netchan_as_uint(netchan_get(v, "peer"), 0);
    netchan__peer *p = (netchan__peer *)netchan__map_get(&netchan__net.by_number, number);
    (void)ch;
    if (p) netchan__take_aside(netchan__session_of(p));
    netchan__look(); /* the next is shown */
}

/* The session is over: its own channels lead nowhere. Returns as netchan__lose_values(), for what was in them. */
static size_t netchan__end_own_channels(netchan__session *s, bool drained) {
    netchan *send = s->own_send, *recv = s->own_recv;
    netchan__lane *shown = s->is_shown ? &s->hub->link.accept->lane : NULL;
    netchan__dequeue_session(s);
    if (!send) return 0;
    if (shown && netchan__held(shown) &&
        netchan_as_uint(netchan_get(&netchan__front(shown)->value, "peer"), 0) == s->peer.number) {
        netchan__slot slot = netchan__lane_pop(shown); /* nobody has taken it */
        netchan_clear(&slot.value);
        netchan__lane_changed(shown);
        netchan__look();
    }
    size_t count = netchan__lose_values(&send->lane, &s->peer.unknown);
    send->gone = true;
    if (drained) send->closing = send->lane.closing = recv->closing = true;
    else recv->senders_lost = true;
    if (drained) netchan__tell_ends(send, true, NETCHAN__CLOSING);
    netchan__tell_ends(send, true, NETCHAN__GONE);
    netchan__end_senders(&send->lane, drained ? NETCHAN_ECLOSED : NETCHAN_ELOST);
    netchan__mark_dirty(recv);
    netchan_free(send);
    netchan_free(recv);
    return count;
}

/* ---- Names: channels that the other side of a link can ask for. ---- */

/* A name that stands. It counts as an end: whoever waits on the channel waits for those who will come. */
struct netchan__name {
    netchan__name *next; /* of the same hash */
    uint64_t hash;
    netchan *ch; /* counted */
    bool receives;
    char *text;
};

/* A peer waits for a name. */
struct netchan__asked {
    netchan__asked *prev, *next; /* of the hub */
    netchan__session *session;
    uint64_t number;
    bool receives;
    char *text;
};

/* This process waits for a name: one call of netchan_import(). */
struct netchan__wanted {
    netchan__wanted *next;
    const char *text;
    bool receives, is_try, over;
    uint64_t number;
    size_t unanswered;
    int result;
    netchan *end;
};

enum { NETCHAN__FOUND, NETCHAN__NO_SUCH_NAME, NETCHAN__OTHER_DIRECTION }; /* IMPORTED */
enum { NETCHAN__NAME_MAX = 255 };

static netchan__name *netchan__find_name(const netchan__hub *h, const char *text, size_t size) {
    netchan__name *n = (netchan__name *)netchan__map_get(&h->names, netchan__hash_text(text, size));
    while (n && (strlen(n->text) != size || memcmp(n->text, text, size) != 0)) n = n->next;
    return n;
}

/* Answers IMPORT. */
static void netchan__answer_import(netchan__session *s, uint64_t number, netchan__name *n, bool receives) {
    uint8_t end[NETCHAN__END_SIZE];
    netchan__frame f = netchan__new_frame(NETCHAN__IMPORTED);
    bool full = s->peer.exports.count >= s->peer.their_ends;
    bool fits = n && n->receives == receives && !full;
    netchan__export *x = fits ? netchan__export_to(&s->peer, n->ch, receives, n) : NULL;
    if (fits && !x) {
        netchan__breach(&s->peer, "out of memory for what it imports");
        return;
    }
    f.number = number;
    f.flags = x ? NETCHAN__FOUND : n && n->receives != receives ? NETCHAN__OTHER_DIRECTION : NETCHAN__NO_SUCH_NAME;
    if (x) netchan__name_export(x, end);
    f.bytes = end;
    f.count = x ? sizeof end : 0;
    s->peer.emit(&s->peer, &f);
}

static char *netchan__copy_text(const void *text, size_t size) {
    char *copy = (char *)netchan__alloc(size + 1);
    if (copy) memcpy(copy, text, size);
    return copy;
}

static void netchan__on_import(netchan__session *s, netchan__frame *f) {
    netchan__hub *h = s->hub;
    bool receives = f->flags & NETCHAN__END_RECEIVER;
    if (!f->count || f->count > NETCHAN__NAME_MAX || memchr(f->bytes, 0, f->count)) {
        netchan__breach(&s->peer, "it asked for a name that is none");
        return;
    }
    if (!f->number || netchan__map_get(&s->asked, f->number)) {
        netchan__breach(&s->peer, "it asked twice with one number, or with none");
        return;
    }
    if (s->peer.leaving) return;
    netchan__name *n = netchan__find_name(h, (const char *)f->bytes, f->count);
    if (n || f->flags & NETCHAN__TRY) {
        netchan__answer_import(s, f->number, n, receives);
        return;
    }
    netchan__asked *a = s->asked.count < s->peer.max_ops ? (netchan__asked *)netchan__alloc(sizeof *a) : NULL;
    if (a) a->text = netchan__copy_text(f->bytes, f->count);
    if (!a || !a->text || !netchan__map_put(&s->asked, f->number, a)) {
        if (a) NETCHAN_FREE(a->text);
        NETCHAN_FREE(a);
        netchan__breach(&s->peer, "it asked for more names than max_ops, or memory is short");
        return;
    }
    a->session = s;
    a->number = f->number;
    a->receives = receives;
    NETCHAN__LINK(h->asked, a, prev, next);
}

/* Forgets the questions of a session, or, if number is not 0, that one. */
static void netchan__forget_asked(netchan__asked *a) {
    if (!a) return;
    NETCHAN__UNLINK(a->session->hub->asked, a, prev, next);
    netchan__map_remove(&a->session->asked, a->number);
    NETCHAN_FREE(a->text);
    NETCHAN_FREE(a);
}

static void netchan__ask(netchan__session *s, netchan__wanted *w) {
    netchan__frame f = netchan__new_frame(NETCHAN__IMPORT);
    f.number = w->number;
    f.flags = netchan__flag(w->receives, NETCHAN__END_RECEIVER) | netchan__flag(w->is_try, NETCHAN__TRY);
    f.bytes = (const uint8_t *)w->text;
    f.count = strlen(w->text);
    if (!netchan__map_put(&s->questions, w->number, w)) {
        w->result = NETCHAN_ENOMEM;
        w->over = true;
        return;
    }
    w->unanswered++;
    s->peer.emit(&s->peer, &f);
}

/* The session has answered, or will not any more. Returns whether it was still to answer. */
static bool netchan__forget_question(netchan__session *s, netchan__wanted *w) {
    if (!w || !netchan__map_get(&s->questions, w->number)) return false;
    netchan__map_remove(&s->questions, w->number);
    w->unanswered--;
    w->over |= w->is_try && !w->unanswered;
    return true;
}

static void netchan__on_imported(netchan__session *s, netchan__frame *f) {
    netchan__names names = netchan__names_of(&s->peer);
    netchan__wanted *w = (netchan__wanted *)netchan__map_get(&s->questions, f->number);
    bool found = f->flags == NETCHAN__FOUND;
    if (found != (f->count == NETCHAN__END_SIZE) || f->flags > NETCHAN__OTHER_DIRECTION ||
        (found && f->bytes[0] & NETCHAN__YOURS)) {
        netchan__breach(&s->peer, "it answered for a name with no end");
        return;
    }
    netchan *end = found ? netchan__find_end(&names.ends, f->bytes) : NULL;
    netchan__forget_question(s, w);
    if (w && end && !w->end && end->may_receive == w->receives) {
        w->end = end;
        w->over = true;
        return;
    }
    netchan_free(end); /* it is not wanted any more */
    if (!w || f->flags != NETCHAN__OTHER_DIRECTION) return;
    w->result = NETCHAN_ETYPE;
    w->over |= !w->unanswered;
}

static void netchan__on_naming(netchan__session *s, netchan__frame *f) {
    if (f->type == NETCHAN__IMPORT) netchan__on_import(s, f);
    else if (f->type == NETCHAN__IMPORTED) netchan__on_imported(s, f);
    else netchan__forget_asked((netchan__asked *)netchan__map_get(&s->asked, f->number));
}

/* A session has begun, or its link is broken: who waits for a name asks, or does not wait for that. */
static void netchan__ask_all(netchan__session *s) {
    for (netchan__wanted *w = s->hub->wanted; w; w = w->next)
        if (!w->is_try && !w->over) netchan__ask(s, w);
}

/* Nobody waits for the name any more. */
static void netchan__end_wanted(netchan__hub *h, netchan__wanted *w) {
    netchan__wanted **at = &h->wanted;
    while (*at != w) at = &(*at)->next;
    *at = w->next;
    for (netchan__session *s = h->sessions; s; s = s->next)
        if (netchan__forget_question(s, w) && !w->is_try)
            netchan__emit_ids(&s->peer, NETCHAN__FORGET, 0, 0, 0, w->number, 0);
}

/* The session is over: those of both sides. */
static void netchan__end_questions(netchan__session *s) {
    netchan__asked *next;
    for (netchan__asked *a = s->hub->asked; a; a = next) {
        next = a->next;
        if (a->session == s) netchan__forget_asked(a);
    }
    for (netchan__wanted *w = s->hub->wanted; w; w = w->next) netchan__forget_question(s, w);
    netchan__map_free(&s->asked);
    netchan__map_free(&s->questions);
}

/* The link broke: who asks only once does not wait for another. */
static void netchan__end_tries(netchan__session *s) {
    for (netchan__wanted *w = s->hub->wanted; w; w = w->next)
        if (w->is_try) netchan__forget_question(s, w);
}

/* text: a name that does not stand yet. Returns OK or ENOMEM. */
static int netchan__add_name(netchan__hub *h, const char *text, netchan *ch, bool receives) {
    netchan__name *n = (netchan__name *)netchan__alloc(sizeof *n);
    uint64_t hash = netchan__hash_text(text, strlen(text));
    netchan__name *first = (netchan__name *)netchan__map_get(&h->names, hash);
    if (n) n->text = netchan__copy_text(text, strlen(text));
    if (!n || !n->text || (!first && !netchan__map_put(&h->names, hash, n))) {
        if (n) NETCHAN_FREE(n->text);
        NETCHAN_FREE(n);
        return netchan__fail_memory("netchan_export");
    }
    netchan__adopt(ch);
    netchan__share(ch);
    n->ch = netchan_retain(ch);
    n->receives = receives;
    n->hash = hash;
    if (first) {
        n->next = first->next;
        first->next = n;
    }
    *(receives ? &ch->receiver_ends : &ch->sender_ends) += 1;
    *(receives ? &ch->receivers_lost : &ch->senders_lost) = false;
    netchan__asked *next;
    for (netchan__asked *a = h->asked; a; a = next) {
        next = a->next;
        if (strcmp(a->text, text) != 0) continue;
        netchan__answer_import(a->session, a->number, n, a->receives);
        netchan__forget_asked(a);
    }
    return NETCHAN_OK;
}

static void netchan__remove_name(netchan__hub *h, netchan__name *n) {
    netchan__name *first = (netchan__name *)netchan__map_get(&h->names, n->hash), **at = &first;
    while (*at != n) at = &(*at)->next;
    *at = n->next;
    netchan__map_remove(&h->names, n->hash);
    if (first) netchan__map_put(&h->names, n->hash, first); /* there is room now */
    for (netchan__session *s = h->sessions; s; s = s->next) {
        uint64_t key = (uint64_t)(uintptr_t)n | n->receives;
        netchan__export *x = (netchan__export *)netchan__map_get(&s->peer.exported, key);
        if (x) netchan__revoke(x);
    }
    *(n->receives ? &n->ch->receiver_ends : &n->ch->sender_ends) -= 1;
    netchan__mark_dirty(n->ch);
    netchan_free(n->ch);
    NETCHAN_FREE(n->text);
    NETCHAN_FREE(n);
}

/* ---- Sessions begin and end. ---- */

/* How long a peer may take to answer: it may be engaged with another home, whose link is down. Negative: for ever. */
static int netchan__patience_ms(const netchan_options *o) {
    if (o->resume_ms < 0) return NETCHAN_FOREVER;
    uint64_t ms = 6 * (uint64_t)o->ping_ms + 2 * (uint64_t)o->resume_ms;
    return ms < INT32_MAX ? (int)ms : INT32_MAX;
}

/* fresh: its id and its secret. */
static netchan__session *netchan__make_session(netchan__wire *w, const uint8_t *fresh) {
    netchan__hub *h = w->hub;
    netchan__session *s = (netchan__session *)netchan__alloc(sizeof *s);
    if (!s) return NULL;
    netchan__peer *p = &s->peer;
    p->emit = netchan__session_emit;
    p->emit_data = netchan__session_emit_data;
    p->keep = netchan__session_keep;
    p->owe = netchan__session_owe;
    p->number = ++netchan__net.last_peer;
    if (!netchan__map_put(&netchan__net.by_number, p->number, p)) {
        NETCHAN_FREE(s);
        return NULL;
    }
    p->max_ops = h->options.max_ops;
    p->max_ends = h->options.max_ends;
    p->max_message = h->options.max_message;
    p->max_memory = h->options.max_memory;
    p->no_redelivery = h->options.no_redelivery;
    int patience_ms = netchan__patience_ms(&h->options);
    p->patience = patience_ms < 0 ? UINT64_MAX : (uint64_t)patience_ms * 1000000u;
    p->stats = &h->stats;
    s->hub = h;
    memcpy(s->id, fresh, sizeof s->id);
    memcpy(s->secret, fresh + sizeof s->id, sizeof s->secret);
    memcpy(s->identity, w->identity, sizeof s->identity);
    memcpy(s->identity_text, w->identity_text, sizeof s->identity_text);
    memcpy(s->name, w->name, sizeof s->name);
    NETCHAN__LINK(h->sessions, s, prev, next);
    h->peers++;
    NETCHAN__LINK(netchan__net.peers, p, prev_peer, next_peer);
    return s;
}

static void netchan__unlink_session(netchan__session *s) {
    netchan__hub *h = s->hub;
    NETCHAN__UNLINK(h->sessions, s, prev, next);
    netchan__map_remove(&h->by_id, netchan__load(s->id, 8));
    if (h->session == s) h->session = NULL;
    h->peers--;
}

/* final: to come again is no use. */
static void netchan__emit_refused(netchan__wire *w, bool final, const char *reason) {
    uint8_t body[320];
    int size = snprintf((char *)body + 1, sizeof body - 1, "%s", reason);
    body[0] = final;
    netchan__emit_control(w, NETCHAN__REFUSED, body, 1 + (size_t)(size < 318 ? size : 318));
}

/* The session is over, drained or lost; reason is the end of a sentence about the other side, which is told, if that is
 * possible. */
static void netchan__end_session(netchan__session *s, const char *reason) {
    netchan__hub *h = s->hub;
    netchan__peer *p = &s->peer;
    netchan__wire *w = s->wire;
    bool drained = s->bye_sent && s->bye_received && !p->breach;
    char why[200];
    snprintf(why, sizeof why, "%s", reason);
    if (w) {
        s->wire = NULL;
        if (drained) netchan__emit_ack(w, s);
        else netchan__emit_refused(w, false, why);
        w->session = NULL;
        w->flush = true;
        netchan__wire_fail(w, why);
    }
    bool merged = p->lane && p->lane->ch == h->link.recv;
    h->orphans += merged;
    if (p->lane && !merged) p->lane->hub = NULL; /* it stays with its channel */
    netchan__unlink_session(s);
    netchan__end_questions(s);
    netchan__session_lost(s);
    size_t undelivered = p->undelivered + netchan__end_own_channels(s, drained);
    h->undelivered += undelivered;
    h->unknown += p->unknown;
    h->unreceived += drained ? 0 : p->handed_back;
    h->stats.lost += !drained;
    netchan__news n = netchan__begin_event(drained ? "drained" : "lost", p->number, s->address, why);
    netchan__add(&n, "taken", netchan_uint(p->taken));
    netchan__add(&n, "returned", netchan_uint(p->returned));
    netchan__add(&n, "unknown", netchan_uint(p->unknown));
    netchan__add(&n, "undelivered", netchan_uint(undelivered));
    netchan__event(h, n);
    netchan__log(h, drained ? 2 : 1, "%s: %s %s: %s", h->link.address, drained ? "done with" : "lost", s->address, why);
    netchan__session_free(s);
}

/* Nothing is being negotiated with this peer. */
static bool netchan__is_quiet(const netchan__peer *p) { return !p->waiters.count && !(p->lane && p->lane->matching); }

/* Answers the farewell of the other side when nothing is being negotiated with it any more; ends the session when both
 * were said and everything has arrived. Returns whether it did. */
static bool netchan__check_farewell(netchan__session *s) {
    if (!s->bye_received) return false;
    if (netchan__is_quiet(&s->peer)) netchan__emit_bye(s, false);
    if (!s->bye_sent || netchan__buf_size(&s->out) || s->parcels) return false;
    if (s->returns && s->peer.send && s->peer.send->in_flight) return false; /* it comes back */
    if (s->wire && s->told != s->received) { /* the other side need not wait for more */
        netchan__emit_ack(s->wire, s);
        s->wire->flush = true;
    }
    netchan__end_session(s, s->hub->hanging_up ? "this side hung up" : "it hung up");
    return true;
}

/* The session goes on over this link; the other side has got `received` of our frames. */
static void netchan__attach(netchan__session *s, netchan__wire *w, uint64_t received) {
    netchan__wire *old = s->wire;
    if (old) {
        old->session = NULL;
        netchan__wire_fail(old, "a newer link took its place");
    }
    netchan__trim(s, received);
    s->hub->stats.replays += s->peer.sent - received;
    s->peer.sent = received; /* what else was sent did not arrive, and never will */
    s->given = 0;
    s->told = s->received;
    s->untold = 0;
    s->wire = w;
    s->generation = w->generation;
    s->refused = false;
    w->session = s;
    w->up = true;
    snprintf(s->address, sizeof s->address, "%s", w->address);
    netchan__mark_pending(s, true);
}

static void netchan__resumed(netchan__session *s, netchan__wire *w, uint64_t received) {
    netchan__hub *h = s->hub;
    uint64_t replays = h->stats.replays;
    netchan__attach(s, w, received);
    if (!s->peer.down) {
        h->stats.rollovers++;
        return;
    }
    h->stats.resumes++;
    netchan__news n = netchan__begin_event("resumed", s->peer.number, s->address, NULL);
    netchan__add(&n, "replayed", netchan_uint(h->stats.replays - replays));
    netchan__event(h, n);
    netchan__log(h, 2, "%s: resumed with %s", h->link.address, s->address);
    netchan__peer_up(&s->peer);
}

/* The link is gone. Its session waits for the next. */
static void netchan__wire_down(netchan__wire *w, uint64_t now, const char *reason) {
    netchan__hub *h = w->hub;
    netchan__session *s = w->session;
    netchan__buf_free(&w->in);
    netchan__buf_free(&w->control);
    mbedtls_platform_zeroize(w->fresh, sizeof w->fresh);
    netchan__wire *paused = w->resumes && !w->up && h->session ? h->session->wire : NULL;
    if (paused && paused->paused) netchan__wire_fail(paused, "its successor broke"); /* S2: it may be taken already */
    if (!s) return;
    w->session = NULL;
    s->wire = NULL;
    s->refused = false;
    s->down_since = s->checked = now;
    netchan__spare_nothing(s);
    netchan__peer_down(&s->peer);
    netchan__end_tries(s);
    netchan__event(h, netchan__begin_event("down", s->peer.number, s->address, reason));
    netchan__log(h, 1, "%s: the link with %s broke: %s", h->link.address, s->address, reason);
}

/* ---- Greetings. ---- */

static size_t netchan__clamp(uint64_t n) { return n > SIZE_MAX / 4 ? SIZE_MAX / 4 : (size_t)n; }

/* HMAC-SHA256 (RFC 2104) over who speaks, on which link, and how far it is. Returns false when out of memory. It needs
 * no lock: mbedTLS keeps nothing of a hash outside its context. */
static bool netchan__prove(const netchan__session *s, const netchan__wire *w, char role, uint64_t received,
                           uint8_t *proof) {
    uint8_t text[1 + 32 + 8 + 8];
    text[0] = (uint8_t)role;
    memcpy(text + 1, w->binding, 32);
    netchan__store(text + 33, w->generation, 8);
    netchan__store(text + 41, received, 8);
    const mbedtls_md_info_t *sha256 = mbedtls_md_info_from_type(MBEDTLS_MD_SHA256);
    return mbedtls_md_hmac(sha256, s->secret, sizeof s->secret, text, sizeof text, proof) == 0;
}

static bool netchan__proved(const netchan__session *s, const netchan__wire *w, char role, uint64_t received,
                            const uint8_t *proof) {
    uint8_t expected[32];
    return netchan__prove(s, w, role, received, expected) && mbedtls_ct_memcmp(expected, proof, sizeof expected) == 0;
}

/* capacity: the one we wish for (dialling) or grant. fresh: listening: what the session is known by. */
static void netchan__emit_hello(netchan__wire *w, uint64_t capacity) {
    const netchan_options *o = &w->hub->options;
    uint8_t body[160], *at = body;
    memcpy(at, "netchan", 7);
    at = netchan__varint_put(at + 7, NETCHAN__WIRE_VERSION);
    memcpy(at, netchan__net.process, sizeof netchan__net.process);
    at = netchan__varint_put(at + sizeof netchan__net.process, o->max_message);
    at = netchan__varint_put(at, o->max_memory);
    at = netchan__varint_put(at, o->max_ops);
    at = netchan__varint_put(at, o->max_ends);
    at = netchan__varint_put(at, (uint64_t)o->ping_ms);
    at = netchan__varint_put(at, capacity);
    if (!w->hub->dials) {
        memcpy(at, w->fresh, sizeof w->fresh);
        at += sizeof w->fresh;
    }
    netchan__emit_control(w, NETCHAN__HELLO, body, (size_t)(at - body));
    mbedtls_platform_zeroize(body, sizeof body);
}

/* RESUME, or the answer to it. */
static void netchan__emit_resume(netchan__wire *w, const netchan__session *s) {
    uint8_t body[16 + 10 + 10 + 32], *at = body;
    if (w->hub->dials) {
        memcpy(at, s->id, sizeof s->id);
        at = netchan__varint_put(at + sizeof s->id, w->generation);
    }
    at = netchan__varint_put(at, s->received);
    bool proved = netchan__prove(s, w, w->hub->dials ? 'D' : 'L', s->received, at);
    unsigned type = w->hub->dials ? NETCHAN__RESUME : NETCHAN__RESUMED;
    if (proved) netchan__emit_control(w, type, body, (size_t)(at + 32 - body));
    else netchan__wire_fail(w, "out of memory for its greeting");
}

/* A new link. The dialling side asks. */
static void netchan__wire_start(netchan__wire *w, netchan__hub *h, uint64_t now) {
    netchan__session *s = h->session;
    w->hub = h;
    w->last_input = w->last_tick = now;
    if (!h->dials) return;
    w->resumes = s != NULL;
    if (!s) {
        netchan__emit_hello(w, h->options.buffer);
        return;
    }
    w->generation = ++s->generation;
    if (s->wire) {
        s->wire->paused = true;
        netchan__look();
    }
    netchan__emit_resume(w, s);
}

static void netchan__refuse(netchan__wire *w, const char *reason) {
    netchan__emit_refused(w, false, reason);
    w->flush = true;
    netchan__wire_fail(w, reason);
}

/* In place of netchan__wire_start(): the other side is not trusted, or not allowed. told: the reason as it is told. */
static void netchan__turn_away(netchan__wire *w, netchan__hub *h, const char *reason, const char *told) {
    w->hub = h;
    netchan__emit_refused(w, true, told);
    w->flush = w->final = true;
    netchan__wire_fail(w, reason);
}

/* The listening side knows who came: a lane for what it sends, a share in the work queue. */
static void netchan__bind_listener(netchan__session *s, netchan__lane *lane, size_t capacity) {
    netchan__hub *h = s->hub;
    netchan__lane_init(lane, h->link.recv, capacity);
    lane->peer = &s->peer;
    lane->peer_number = s->peer.number;
    lane->hub = h;
    NETCHAN__LINK(h->link.recv->lanes, lane, prev, next);
    s->peer.lane = lane;
    s->peer.work = h->link.send;
    netchan__lend(lane);
    if (s->peer.work->closed) netchan__emit_ids(&s->peer, NETCHAN__CLOSED, 1, 0, 0, 0, 0);
}

static void netchan__bind_dialler(netchan__session *s, size_t capacity) {
    netchan__hub *h = s->hub;
    s->peer.send = h->link.send;
    s->peer.recv = h->link.recv;
    h->link.send->lane.cap = capacity < h->options.buffer ? capacity : h->options.buffer;
    h->session = s;
    netchan__end_up(&s->peer, h->link.send);
    netchan__end_up(&s->peer, h->link.recv);
}

/* The listening side takes a new peer. Returns its session, or NULL. */
static netchan__session *netchan__welcome(netchan__wire *w) {
    netchan__hub *h = w->hub;
    if (h->hanging_up) {
        netchan__refuse(w, "it is hanging up");
        return NULL;
    }
    if (h->peers + h->orphans >= h->options.max_peers) {
        netchan__refuse(w, "there are max_peers already");
        return NULL;
    }
    w->fresh[0] |= 1; /* no key of a map is 0 */
    netchan__session *s = netchan__make_session(w, w->fresh);
    if (s && netchan__map_put(&h->by_id, netchan__load(s->id, 8), s)) return s;
    netchan__refuse(w, "out of memory for a new peer");
    if (!s) return NULL;
    netchan__unlink_session(s);
    netchan__session_lost(s);
    netchan__session_free(s);
    return NULL;
}

static void netchan__on_hello(netchan__wire *w, netchan__reader *r) {
    netchan__hub *h = w->hub;
    const uint8_t *magic = netchan__read_bytes(r, 7);
    uint64_t version = netchan__read_varint(r);
    if (!magic || memcmp(magic, "netchan", 7) != 0 || version != NETCHAN__WIRE_VERSION || w->resumes) {
        netchan__wire_fail(w, "it does not speak version 1 of the netchan protocol");
        return;
    }
    const uint8_t *process = netchan__read_bytes(r, 16);
    uint64_t max_message = netchan__read_varint(r), max_memory = netchan__read_varint(r);
    netchan__read_varint(r); /* max_ops: a caller that exceeds it is told by the breach */
    uint64_t max_ends = netchan__read_varint(r);
    netchan__read_varint(r); /* ping_ms: each side looks after itself */
    size_t capacity = netchan__clamp(netchan__read_varint(r));
    const uint8_t *fresh = h->dials ? netchan__read_bytes(r, sizeof w->fresh) : NULL;
    if (r->bad) {
        netchan__wire_fail(w, "its greeting is not whole");
        return;
    }
    bool room = !h->dials && netchan__buf_reserve(&w->control, 256); /* for the answer, or nobody would know of it */
    netchan__lane *lane = room ? (netchan__lane *)netchan__alloc(sizeof *lane) : NULL;
    netchan__session *s = h->dials ? netchan__make_session(w, fresh) : lane ? netchan__welcome(w) : NULL;
    if (!s) {
        netchan__wire_fail(w, "out of memory for a new peer"); /* unless it was refused */
        NETCHAN_FREE(lane);
        return;
    }
    memcpy(s->peer.process, process, sizeof s->peer.process);
    s->peer.their_message = netchan__clamp(max_message);
    s->peer.their_memory = netchan__clamp(max_memory);
    s->peer.their_ends = netchan__clamp(max_ends < h->options.max_ends ? max_ends : h->options.max_ends);
    if (!h->dials) netchan__emit_hello(w, capacity);
    w->generation = 0; /* it may have asked for another session before */
    netchan__attach(s, w, 0);
    if (lane) netchan__bind_listener(s, lane, capacity);
    else netchan__bind_dialler(s, capacity);
    h->was_up = true;
    netchan__news n = netchan__begin_event("up", s->peer.number, w->address, NULL);
    netchan__add(&n, "listening", netchan_bool(!h->dials));
    netchan__add(&n, "identity", netchan_str(s->identity_text));
    netchan__add(&n, "name", netchan_str(s->name));
    netchan__event(h, n);
    netchan__ask_all(s);
    if (!h->dials) netchan__enqueue_session(s);
    netchan__show_next(h);
    netchan__log(h, 2, "%s: connected with %s", h->link.address, w->address);
}

/* Is this how far the other side can have got? */
static bool netchan__plausible(const netchan__session *s, uint64_t received) {
    return received >= s->acked && received <= s->peer.sent;
}

/* Listening: somebody wants to go on with a session. */
static void netchan__on_resume(netchan__wire *w, netchan__reader *r) {
    const uint8_t *id = netchan__read_bytes(r, 16);
    uint64_t generation = netchan__read_varint(r), received = netchan__read_varint(r);
    const uint8_t *proof = netchan__read_bytes(r, 32);
    netchan__session *s = r->bad ? NULL : (netchan__session *)netchan__map_get(&w->hub->by_id, netchan__load(id, 8));
    if (!s && w->hub->hanging_up) { /* a successor may know it: no answer, it dials again */
        netchan__wire_fail(w, "this side is hanging up");
        return;
    }
    if (!s || memcmp(s->id, id, sizeof s->id) != 0 || s->peer.breach || w->generation) {
        const char *reason = "the session is not known; it was lost, or the listener was started anew";
        if (w->generation) netchan__refuse(w, reason);
        else netchan__emit_refused(w, false, reason);
        w->generation = UINT64_MAX; /* one question; a HELLO may follow */
        return;
    }
    w->generation = generation;
    if (memcmp(s->identity, w->identity, sizeof s->identity) != 0 || !netchan__proved(s, w, 'D', received, proof)) {
        netchan__refuse(w, "the session belongs to somebody else");
        return;
    }
    if (generation <= s->generation || !netchan__plausible(s, received)) {
        netchan__refuse(w, "the session went on elsewhere");
        return;
    }
    netchan__emit_resume(w, s);
    if (!w->failure) netchan__resumed(s, w, received);
}

/* Dialling: the listener goes on with the session. */
static void netchan__on_resumed(netchan__wire *w, netchan__reader *r) {
    netchan__session *s = w->hub->session;
    uint64_t received = netchan__read_varint(r);
    const uint8_t *proof = netchan__read_bytes(r, 32);
    if (!w->resumes || w->up || r->bad || !s || w->generation != s->generation ||
        memcmp(s->identity, w->identity, sizeof s->identity) != 0 || !netchan__proved(s, w, 'L', received, proof) ||
        !netchan__plausible(s, received)) {
        netchan__wire_fail(w, "it does not go on with our session");
        return;
    }
    netchan__resumed(s, w, received);
}

/* The listener does not know the session, or does not want us; or the other side has ended the session. */
static void netchan__on_refused(netchan__wire *w, uint64_t now, netchan__reader *r) {
    netchan__hub *h = w->hub;
    netchan__session *s = w->up ? w->session : w->resumes ? h->session : NULL; /* a listener's stranger: NULL */
    char reason[300], text[sizeof w->failure_text];
    w->final = netchan__read_varint(r) == 1 && !w->up;
    size_t size = netchan__left(r) < sizeof reason - 1 ? netchan__left(r) : sizeof reason - 1;
    for (size_t i = 0; i < size; i++) reason[i] = (char)(r->p[i] >= ' ' && r->p[i] < 127 ? r->p[i] : '?');
    reason[size] = '\0';
    snprintf(text, sizeof text, "it said: %s", reason);
    if (s && !w->up && (h->addresses > 1 || s->wire)) {
        s->refused = true; /* perhaps another address leads to where it is known */
        w->resumes = false;
        if (s->wire) s->wire->paused = false; /* the listener did not take it */
        netchan__look();
        netchan__mark_pending(s, true);
    } else if (s) {
        netchan__end_session(s, text);
        if (!w->up) {
            w->resumes = false;
            netchan__wire_start(w, h, now);
            return;
        }
    }
    netchan__wire_fail(w, text);
}

/* Greetings, and what comes in place of one. */
static void netchan__on_greeting(netchan__wire *w, uint64_t now, unsigned type, netchan__reader *r) {
    bool dials = w->hub->dials;
    if (type == NETCHAN__REFUSED) netchan__on_refused(w, now, r);
    else if (w->up) netchan__breach(&w->session->peer, "it greeted twice");
    else if (type == NETCHAN__HELLO) netchan__on_hello(w, r);
    else if (type == NETCHAN__RESUME && !dials) netchan__on_resume(w, r);
    else if (type == NETCHAN__RESUMED && dials) netchan__on_resumed(w, r);
    else netchan__wire_fail(w, "its first frame was no greeting");
}

/* ---- Hubs. ---- */

static size_t netchan__or(size_t value, size_t fallback) { return value ? value : fallback; }

static int netchan__or_int(int value, int fallback) { return value ? value : fallback; }

static int netchan__fill_options(netchan_options *o) {
    o->max_message = netchan__or(o->max_message, (size_t)128 << 20);
    o->max_memory = netchan__or(o->max_memory, 2 * o->max_message);
    o->max_ops = netchan__or(o->max_ops, 8192);
    o->max_ends = netchan__or(o->max_ends, 65536);
    o->max_peers = netchan__or(o->max_peers, 10000);
    o->connect_ms = netchan__or_int(o->connect_ms, 10000);
    o->resume_ms = netchan__or_int(o->resume_ms, 30000);
    o->linger_ms = netchan__or_int(o->linger_ms, 5000);
    o->ping_ms = netchan__or_int(o->ping_ms, 5000);
    if (o->max_memory / 2 < o->max_message || o->max_message > SIZE_MAX / 4)
        return netchan__fail(NETCHAN_EINVAL, "options.max_memory must be at least twice options.max_message");
    if (o->ping_ms < 0) return netchan__fail(NETCHAN_EINVAL, "options.ping_ms must not be negative");
    if (o->buffer > SIZE_MAX / 4) return netchan__fail(NETCHAN_EINVAL, "options.buffer is too large");
    return NETCHAN_OK;
}

/* A channel of a link: one direction only, under netchan__net_lock from its first day. */
static netchan *netchan__make_link_channel(size_t capacity, bool sends) {
    netchan *ch = netchan_make(capacity);
    if (!ch) return NULL;
    ch->lock = &netchan__net_lock;
    ch->may_send = sends;
    ch->may_receive = !sends;
    ch->plain = ch->shared = true;
    return ch;
}

/* Fills in the options and makes the channels. options may be NULL. Returns OK, EINVAL or ENOMEM; netchan__hub_free()
 * follows in each case. */
static int netchan__hub_make(netchan__hub *h, const netchan_options *options, bool dials) {
    netchan_link *link = &h->link;
    if (options) h->options = *options;
    h->dials = dials;
    h->addresses = 1;
    int result = netchan__fill_options(&h->options);
    if (result != NETCHAN_OK) return result;
    link->send = netchan__make_link_channel(h->options.buffer, true);
    link->recv = netchan__make_link_channel(0, false);
    link->events = netchan__make_link_channel(NETCHAN__EVENTS_MAX, false);
    link->accept = dials ? NULL : netchan__make_link_channel(1, false);
    if (!link->send || !link->recv || !link->events || (!dials && !link->accept)) return NETCHAN_ENOMEM;
    if (dials) {
        link->send->is_end = link->recv->is_end = true;
        link->send->credited = link->recv->credited = true;
        link->recv->channel = 1;
    } else {
        link->accept->on_taken = netchan__on_accepted;
        link->recv->is_merge = true;
        link->recv->lanes = NULL;
    }
    return NETCHAN_OK;
}

static void netchan__hub_free(netchan__hub *h) {
    netchan_free(h->link.send);
    netchan_free(h->link.recv);
    netchan_free(h->link.events);
    netchan_free(h->link.accept);
    netchan__map_free(&h->by_id);
}

/* Dialling: does it want a link now? */
static bool netchan__hub_wants_wire(const netchan__hub *h) {
    const netchan__session *s = h->session;
    if (h->shut && !s && !h->link.send->detached) return false; /* it hangs up, and has nothing to bring */
    return h->dials && (!s || !s->wire || netchan__wire_worn(s->wire));
}

/* Ends the session if its time without a link is up. Returns when to look again. */
static uint64_t netchan__check_resume(netchan__session *s, uint64_t now) {
    int ms = s->hub->options.resume_ms;
    uint64_t limit = (uint64_t)ms * 1000000u;
    if (s->wire || ms < 0) return UINT64_MAX;
    if (now > s->checked + limit / 2) s->down_since += now - s->checked - limit / 4; /* this process was stopped */
    s->checked = now;
    uint64_t end = s->down_since + limit, next = now + limit / 4;
    if (now < end) return next < end ? next : end;
    char reason[80];
    snprintf(reason, sizeof reason, "its link did not come back within %d ms", ms);
    netchan__end_session(s, reason);
    return UINT64_MAX;
}

/* Ends the sessions whose time is up or whose peer broke the protocol. Returns when to look again, in nanoseconds. */
static uint64_t netchan__hub_tick(netchan__hub *h, uint64_t now) {
    netchan__session *following;
    netchan__show_next(h);
    bool starves = h->first_new && !h->shut && netchan__is_empty(h->link.accept); /* it is tried again */
    uint64_t next = starves ? now + (uint64_t)h->options.ping_ms * 1000000u : UINT64_MAX;
    for (netchan__session *s = h->sessions; s; s = following) {
        following = s->next;
        uint64_t at = UINT64_MAX;
        if (s->peer.breach) netchan__end_session(s, s->peer.breach);
        else if (!netchan__check_farewell(s)) at = netchan__check_resume(s, now);
        if (at < next) next = at;
    }
    return next;
}

/* Ends the operations that wait on the channel, now and from now on; those that are being committed go on. */
static void netchan__shut(netchan *ch) {
    if (!ch->closing) ch->close_sent = true; /* the farewell says it */
    ch->closing = ch->closed = ch->lane.closing = true;
    if (ch->rooms) netchan__give_early_back(ch);
    netchan__end_waiters(&ch->lane.senders, NETCHAN_ECLOSED);
    netchan__end_waiters(&ch->receivers, NETCHAN_ECLOSED);
    netchan__tell_ends(ch, true, NETCHAN__CLOSING);
    netchan__tell_ends(ch, false, NETCHAN__CLOSED);
    if (ch->is_end) netchan__relay_ended(ch);
    else if (ch->exports) {
        netchan__end_senders(&ch->lane, NETCHAN_ECLOSED);
        netchan__end_receivers(ch, NETCHAN_ECLOSED);
    }
}

/* Nothing new begins on the link's channels; what its peers have in our buffers goes back to them. */
static void netchan__shut_link(netchan__hub *h) {
    h->shut = true;
    netchan__shut(h->link.send);
    netchan__shut(h->link.recv);
    if (h->link.accept) netchan__shut(h->link.accept);
    for (netchan__session *s = h->sessions; s; s = s->next) {
        netchan__leave(&s->peer);
        if (s->own_send) netchan__shut(s->own_send);
        if (s->peer.direct) netchan__end_waiters(&s->peer.direct->senders, NETCHAN_ECLOSED);
        if (!s->peer.lane) continue;
        s->peer.lane->returning = true;
        netchan__lane_changed(s->peer.lane);
    }
}

/* Listening: are there values in our buffers for peers that can still come for them? */
static bool netchan__has_values(const netchan__hub *h) {
    if (netchan__held(&h->link.send->lane) || h->link.send->matches) return true;
    for (const netchan__session *s = h->sessions; s; s = s->next) {
        if (s->peer.direct && netchan__held(s->peer.direct)) return true;
        if (s->own_send && !netchan__is_empty(s->own_send)) return true;
    }
    return false;
}

/* Whether all that was sent on the link is known to have arrived; says farewell to the other sides on the way. */
static bool netchan__drained(netchan__hub *h) {
    netchan *send = h->link.send;
    netchan__session *s = h->session;
    if (h->dials && !s) return send->detached == 0;
    if (h->dials) {
        if (!send->detached && !s->parcels && netchan__is_quiet(&s->peer)) netchan__emit_bye(s, false);
        return false; /* the session ends with the answer */
    }
    if (!h->shut && netchan__has_values(h)) return false;
    if (!h->shut) netchan__shut_link(h);
    for (s = h->sessions; s; s = s->next)
        if (netchan__is_quiet(&s->peer)) netchan__emit_bye(s, !s->bye_received);
    return h->peers == 0;
}

/* Ends all sessions, now. */
static void netchan__hub_stop(netchan__hub *h) {
    while (h->sessions) netchan__end_session(h->sessions, "this side hung up");
}

/* After netchan__hub_stop(): empties the channels and counts what was not delivered. */
static netchan_report netchan__hub_close(netchan__hub *h) {
    netchan_report r = {h->undelivered, 0, h->unreceived};
    netchan *send = h->link.send;
    for (size_t i = 0; i < h->names.cap; i++)
        for (netchan__name *n; (n = (netchan__name *)netchan__map_at(&h->names, i));) netchan__remove_name(h, n);
    netchan__map_free(&h->names);
    netchan__shut(send); /* what waited for the fate of a value */
    h->link.events->closing = h->link.events->lane.closing = true; /* who retained it reads what is in it */
    netchan__finish_close(h->link.events);
    netchan__lane *next;
    netchan__call_off(h->link.recv);
    for (netchan__lane *lane = h->dials ? NULL : h->link.recv->lanes; lane; lane = next) {
        next = lane->next;
        lane->hub = NULL;
        r.unreceived += netchan__held(lane);
        netchan__lane_empty(lane);
        netchan__retire_lane(lane); /* one that is still being matched goes when that is over */
    }
    for (netchan__waiter *w = send->lane.senders.head, *after; w; w = after) {
        after = w->next;
        if (!w->op || !w->op->detached) continue;
        netchan__change_state(w->op, NETCHAN__OPEN, NETCHAN__ENGAGED);
        netchan__finish(w->op, w, NETCHAN_ECLOSED);
    }
    if (!h->dials) r.undelivered += netchan__lose_values(&send->lane, &h->unknown); /* at an end it is empty */
    r.undelivered += send->undelivered;
    r.unknown += (size_t)h->unknown;
    return r;
}

/* ====================================================================================================================
 * [15] Trust: what options say about whom to trust and who we are, as mbedTLS wants it; certificates; and sentences on
 * why a peer is not trusted. Here and in [16] mbedTLS is called under netchan__tls_lock only, as PSA keeps its keys in
 * one table for the process. No other lock is taken inside.
 *
 * Invariants.
 *   T1  No frame of a peer is looked at, and none is sent to it but REFUSED, before it has proved what options ask for:
 *       a shared key, a key that is pinned, or a certificate of the CA with the right name.
 *   T2  Secrets are wiped before their memory is given back, and no sentence, event or log line has one.
 * ================================================================================================================== */

static pthread_mutex_t netchan__tls_lock = PTHREAD_MUTEX_INITIALIZER;

enum {
    NETCHAN__KEY_MIN = 32,        /* characters: 128 bits even if each carries only 4, as RFC 9257 section 6 asks */
    NETCHAN__KEYS_MAX = 8,        /* of options.shared_key: a dialler needs a handshake for each */
    NETCHAN__PINS_MAX = 1024,
    NETCHAN__TEXT_MAX = 1 << 20,  /* bytes of a file that an option names */
    NETCHAN__CALLBACK_MAX = 65536 /* bytes of a text that options.load may give */
};

static int netchan__tls_fail(int code, int error, const char *what) {
    char text[128];
    if (error > 0) error = MBEDTLS_ERR_X509_INVALID_FORMAT; /* so many of several certificates cannot be read */
    mbedtls_strerror(error, text, sizeof text);
    return netchan__fail(code, "%s: %s (mbedTLS -0x%04x)", what, text, (unsigned)-error);
}

static int netchan__crypto_init(void) {
    psa_status_t status = psa_crypto_init();
    return status == PSA_SUCCESS
               ? NETCHAN_OK
               : netchan__fail(NETCHAN_ENET, "psa_crypto_init failed (%d); is there a source of randomness?",
                               (int)status);
}

static void netchan__hex(const uint8_t *data, size_t size, char *out) {
    for (size_t i = 0; i < size; i++) snprintf(out + 2 * i, 3, "%02x", data[i]);
}

/* ---- Texts: what an option says, or what the file or callback that it names says. ---- */

typedef struct netchan__text {
    char *data; /* size bytes and a NUL; NULL: the option is not set */
    size_t size;
} netchan__text;

/* Those of one listen or dial, while it is opened. */
typedef struct netchan__texts {
    netchan__text shared_key, pin, ca, cert, cert_key;
} netchan__texts;

static void netchan__text_free(netchan__text *t) {
    if (t->data) mbedtls_platform_zeroize(t->data, t->size);
    NETCHAN_FREE(t->data);
    t->data = NULL;
}

static void netchan__texts_free(netchan__texts *t) {
    netchan__text_free(&t->shared_key);
    netchan__text_free(&t->pin);
    netchan__text_free(&t->ca);
    netchan__text_free(&t->cert);
    netchan__text_free(&t->cert_key);
}

static bool netchan__text_make(netchan__text *t, size_t size) {
    t->data = (char *)netchan__alloc(size + 1);
    t->size = t->data ? size : 0;
    return t->data != NULL;
}

static bool netchan__begins(const char *text, const char *with) { return !strncmp(text, with, strlen(with)); }

static bool netchan__is_pem(const char *text) { return strstr(text, "-----BEGIN") != NULL; }

/* Reads what is left of the file. Returns OK, EINVAL with errno, or ENOMEM. */
static int netchan__read_fd(int fd, size_t size, netchan__text *t) {
    if (!netchan__text_make(t, size)) return NETCHAN_ENOMEM;
    size_t done = 0;
    while (done < size) {
        ssize_t n = read(fd, t->data + done, size - done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return NETCHAN_EINVAL;
        if (n == 0) break;
        done += (size_t)n;
    }
    t->size = done;
    return NETCHAN_OK;
}

/* field: of the options, for sentences. */
static int netchan__read_file(const netchan_options *o, const char *field, const char *path, bool secret,
                              netchan__text *t) {
    struct stat s;
    int fd = open(path, O_RDONLY | O_CLOEXEC), result = NETCHAN_EINVAL;
    const char *why = NULL;
    if (fd >= 0 && fstat(fd, &s) == 0) {
        if (S_ISDIR(s.st_mode)) why = "it is a directory";
        else if (s.st_size > NETCHAN__TEXT_MAX) why = "it is larger than 1 MiB";
        else result = netchan__read_fd(fd, S_ISREG(s.st_mode) ? (size_t)s.st_size : (size_t)NETCHAN__CALLBACK_MAX, t);
        if (result == NETCHAN_OK && !S_ISREG(s.st_mode) && t->size == NETCHAN__CALLBACK_MAX) {
            result = NETCHAN_EINVAL;
            why = "it is no file, and gives 64 KiB or more";
        }
    }
    if (result == NETCHAN_ENOMEM) netchan__fail_memory("reading a file of the options");
    else if (result != NETCHAN_OK)
        netchan__fail(result, "options.%s: the file \"%.200s\" cannot be read: %s", field, path,
                      why ? why : netchan__os_error(errno));
    else if (secret && o && o->log && (s.st_mode & S_IROTH)) {
        char text[300];
        snprintf(text, sizeof text, "options.%s: everybody on this machine can read \"%.200s\"", field, path);
        o->log(o->log_arg, 1, text);
    }
    if (fd >= 0) close(fd);
    return result;
}

static int netchan__read_callback(const netchan_options *o, const char *field, const char *name, netchan__text *t) {
    if (!o || !o->load)
        return netchan__fail(NETCHAN_EINVAL, "options.%s asks for \"callback:%.80s\", and options.load is not set",
                             field, name);
    if (!netchan__text_make(t, NETCHAN__CALLBACK_MAX)) return netchan__fail_memory("options.load");
    int result = o->load(o->load_arg, name, t->data, NETCHAN__CALLBACK_MAX);
    size_t size = strlen(t->data);
    if (result != NETCHAN_OK)
        return netchan__fail(NETCHAN_EINVAL, "options.%s: options.load has no \"%.80s\", it returned %d", field, name,
                             result);
    if (size >= NETCHAN__CALLBACK_MAX)
        return netchan__fail(NETCHAN_EINVAL, "options.%s: options.load gave \"%.80s\" without its NUL", field, name);
    return NETCHAN_OK;
}

/* Of ca, cert and cert_key: PEM, or in a file DER. */
static bool netchan__is_cert_option(const char *field) { return field[0] == 'c'; }

/* What came from elsewhere has something in it, and what is no certificate has no NUL. */
static int netchan__check_text(const char *field, const char *value, const char *text, size_t size) {
    if (strspn(text, " \t\r\n") == size)
        return netchan__fail(NETCHAN_EINVAL, "options.%s: \"%.200s\" is empty", field, value);
    if (!netchan__is_cert_option(field) && strlen(text) != size)
        return netchan__fail(NETCHAN_EINVAL, "options.%s: \"%.200s\" has a NUL in it; it must be text", field, value);
    return NETCHAN_OK;
}

/* Without "file:" or "callback:" an option is its text, or for certificates, unless it is PEM text, a path. Called
 * without locks. Returns OK, EINVAL or ENOMEM; what is in *t is to be freed in each case. */
static int netchan__read_text(const netchan_options *o, const char *field, const char *value, netchan__text *t) {
    bool pem = netchan__is_cert_option(field), secret = strstr(field, "key") != NULL;
    if (!value) return NETCHAN_OK;
    bool calls = netchan__begins(value, "callback:"), file = netchan__begins(value, "file:");
    if (calls || file || (pem && !netchan__is_pem(value))) {
        int result = calls ? netchan__read_callback(o, field, value + 9, t)
                           : netchan__read_file(o, field, value + (file ? 5 : 0), secret, t);
        if (result != NETCHAN_OK) return result;
        return netchan__check_text(field, value, t->data, calls ? strlen(t->data) : t->size);
    }
    if (secret && !pem && access(value, F_OK) == 0)
        return netchan__fail(NETCHAN_EINVAL, "options.%s is the name of a file; write \"file:\" before it to use what "
                                             "is in the file", field);
    if (!netchan__text_make(t, strlen(value))) return netchan__fail_memory("reading the options");
    memcpy(t->data, value, t->size);
    return NETCHAN_OK;
}

static int netchan__read_texts(const netchan_options *o, netchan__texts *t) {
    int result = netchan__read_text(o, "shared_key", o->shared_key, &t->shared_key);
    if (result == NETCHAN_OK) result = netchan__read_text(o, "pin", o->pin, &t->pin);
    if (result == NETCHAN_OK) result = netchan__read_text(o, "ca", o->ca, &t->ca);
    if (result == NETCHAN_OK) result = netchan__read_text(o, "cert", o->cert, &t->cert);
    if (result == NETCHAN_OK) result = netchan__read_text(o, "cert_key", o->cert_key, &t->cert_key);
    return result;
}

/* The next of several words. Returns NULL after the last. */
static const char *netchan__next_word(const char **at, const char *separators, size_t *size) {
    const char *word = *at + strspn(*at, separators);
    *size = strcspn(word, separators);
    *at = word + *size;
    return *size ? word : NULL;
}

static size_t netchan__count_words(const char *text, const char *separators) {
    size_t count = 0, size;
    while (netchan__next_word(&text, separators, &size)) count++;
    return count;
}

/* ---- What is trusted. ---- */

typedef struct netchan__key {
    uint8_t psk[32], id[8];
} netchan__key;

/* Under netchan__tls_lock; constant after make. */
typedef struct netchan__tls {
    mbedtls_ssl_config *confs; /* one, but a dialler has one for each of its shared keys */
    size_t conf_count;
    mbedtls_x509_crt cert, ca;
    mbedtls_pk_context key;
    netchan__key *keys;
    size_t key_count;
    uint8_t *pins; /* 32 bytes each */
    size_t pin_count;
    uint8_t own[32]; /* the fingerprint of our key */
    bool has_ca, dials, made;
} netchan__tls;

static void netchan__print_fingerprint(const uint8_t *hash, char *out) {
    memcpy(out, "sha256:", sizeof "sha256:");
    netchan__hex(hash, 32, out + 7);
}

static void netchan__print_key_id(const uint8_t *id, char *out) {
    memcpy(out, "shared_key:", sizeof "shared_key:");
    netchan__hex(id, 8, out + 11);
}

/* Reads "sha256:<64 hex digits>". */
static bool netchan__parse_pin(const char *text, size_t size, uint8_t *hash) {
    if (size != 7 + 64 || !netchan__begins(text, "sha256:")) return false;
    for (size_t i = 0; i < 64; i++) {
        char c = text[7 + i];
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0) return false;
        hash[i / 2] = (uint8_t)(i % 2 ? hash[i / 2] << 4 | digit : digit);
    }
    return true;
}

static int netchan__set_pins(netchan__tls *t, const char *text) {
    static const char separators[] = " \t\r\n,";
    size_t count = netchan__count_words(text, separators), size;
    if (count > NETCHAN__PINS_MAX)
        return netchan__fail(NETCHAN_EINVAL, "options.pin has %zu pins, and may have at most %d", count,
                             NETCHAN__PINS_MAX);
    t->pins = (uint8_t *)netchan__alloc(count * 32);
    if (!t->pins) return netchan__fail_memory("options.pin");
    for (const char *word; (word = netchan__next_word(&text, separators, &size)) != NULL; t->pin_count++)
        if (!netchan__parse_pin(word, size, t->pins + 32 * t->pin_count)) {
            count = 0;
            text = word;
            break;
        }
    if (count) return NETCHAN_OK;
    return netchan__fail(NETCHAN_EINVAL, "options.pin must be \"sha256:\" and 64 hexadecimal digits, as "
                                         "netchan_fingerprint() tells, or several of them; it has \"%.80s\"", text);
}

static bool netchan__is_pinned(const netchan__tls *t, const uint8_t *hash) {
    for (size_t i = 0; i < t->pin_count; i++)
        if (memcmp(t->pins + 32 * i, hash, 32) == 0) return true;
    return false;
}

/* SHA-256 of a label, which keeps this use of the key apart from others, with its NUL, and the key. */
static int netchan__hash_labelled(const char *label, const char *key, size_t size, uint8_t *hash) {
    mbedtls_sha256_context sha;
    mbedtls_sha256_init(&sha);
    int e = mbedtls_sha256_starts(&sha, 0);
    if (!e) e = mbedtls_sha256_update(&sha, (const unsigned char *)label, strlen(label) + 1);
    if (!e) e = mbedtls_sha256_update(&sha, (const unsigned char *)key, size);
    if (!e) e = mbedtls_sha256_finish(&sha, hash);
    mbedtls_sha256_free(&sha);
    return e;
}

static int netchan__set_shared_key(netchan__key *key, const char *text, size_t length) {
    size_t distinct = 0;
    bool seen[256] = {false};
    for (size_t i = 0; i < length; i++) {
        distinct += !seen[(unsigned char)text[i]];
        seen[(unsigned char)text[i]] = true;
    }
    if (length < NETCHAN__KEY_MIN || distinct < 8)
        return netchan__fail(
            NETCHAN_EAUTH,
            "options.shared_key can be guessed: it has %zu characters, %zu of them different; at least %d and 8 are "
            "needed. It must be random, not a password: make one with netchan_keygen(), or: openssl rand -hex 32",
            length, distinct, NETCHAN__KEY_MIN);
    uint8_t id[32] = {0};
    int e = netchan__hash_labelled("netchan/1 shared key", text, length, key->psk);
    if (!e) e = netchan__hash_labelled("netchan/1 key id", text, length, id);
    memcpy(key->id, id, sizeof key->id);
    return e ? netchan__tls_fail(NETCHAN_ENOMEM, e, "the shared key could not be set") : NETCHAN_OK;
}

/* The next of several keys: a line, without blanks at its ends. Returns NULL after the last. */
static const char *netchan__next_key(const char **at, size_t *size) {
    const char *line;
    while ((line = netchan__next_word(at, "\r\n", size)) != NULL) {
        for (; *size && (*line == ' ' || *line == '\t'); line++) --*size;
        while (*size && (line[*size - 1] == ' ' || line[*size - 1] == '\t')) --*size;
        if (*size) break;
    }
    return line;
}

static int netchan__set_shared_keys(netchan__tls *t, const char *text) {
    size_t count = 0, size;
    for (const char *at = text; netchan__next_key(&at, &size);) count++;
    if (!count) return netchan__set_shared_key(NULL, "", 0); /* says that it can be guessed */
    if (count > NETCHAN__KEYS_MAX)
        return netchan__fail(NETCHAN_EINVAL, "options.shared_key has %zu keys, and may have at most %d", count,
                             NETCHAN__KEYS_MAX);
    t->keys = (netchan__key *)netchan__alloc(count * sizeof *t->keys);
    if (!t->keys) return netchan__fail_memory("options.shared_key");
    int result = NETCHAN_OK;
    t->key_count = count;
    for (size_t i = 0; i < count && result == NETCHAN_OK; i++) {
        const char *word = netchan__next_key(&text, &size);
        result = netchan__set_shared_key(&t->keys[i], word, size);
    }
    return result;
}

/* Reads PEM text with one certificate or several, or one in DER. Returns 0 or mbedTLS's error. */
static int netchan__load_cert(mbedtls_x509_crt *cert, const netchan__text *t) {
    return mbedtls_x509_crt_parse(cert, (const unsigned char *)t->data, t->size + netchan__is_pem(t->data));
}

static int netchan__load_key(mbedtls_pk_context *key, const netchan__text *t) {
    return mbedtls_pk_parse_key(key, (const unsigned char *)t->data, t->size + netchan__is_pem(t->data), NULL, 0,
                                mbedtls_psa_get_random, MBEDTLS_PSA_RANDOM_STATE);
}

static int netchan__hash_key(const mbedtls_x509_crt *cert, uint8_t *hash) {
    return mbedtls_sha256(cert->pk_raw.p, cert->pk_raw.len, hash, 0);
}

/* A fresh P-256 key and a certificate that it signs itself. */
static int netchan__make_cert(mbedtls_pk_context *key, mbedtls_x509_crt *cert) {
    uint8_t der[1024], serial[16] = {0};
    mbedtls_x509write_cert w;
    mbedtls_x509write_crt_init(&w);
    mbedtls_x509write_crt_set_version(&w, MBEDTLS_X509_CRT_VERSION_3);
    mbedtls_x509write_crt_set_md_alg(&w, MBEDTLS_MD_SHA256);
    mbedtls_x509write_crt_set_subject_key(&w, key);
    mbedtls_x509write_crt_set_issuer_key(&w, key);
    int e = mbedtls_pk_setup(key, mbedtls_pk_info_from_type(MBEDTLS_PK_ECKEY));
    if (!e)
        e = mbedtls_ecp_gen_key(MBEDTLS_ECP_DP_SECP256R1, mbedtls_pk_ec(*key), mbedtls_psa_get_random,
                                MBEDTLS_PSA_RANDOM_STATE);
    if (!e) e = mbedtls_psa_get_random(MBEDTLS_PSA_RANDOM_STATE, serial, sizeof serial);
    serial[0] = (uint8_t)((serial[0] & 0x7f) | 1); /* positive and not zero */
    if (!e) e = mbedtls_x509write_crt_set_serial_raw(&w, serial, sizeof serial);
    if (!e) e = mbedtls_x509write_crt_set_subject_name(&w, "CN=netchan");
    if (!e) e = mbedtls_x509write_crt_set_issuer_name(&w, "CN=netchan");
    if (!e)
        e = mbedtls_x509write_crt_set_validity(&w, "20200101000000", "99991231235959"); /* RFC 5280 4.1.2.5: no end */
    int size = e ? e : mbedtls_x509write_crt_der(&w, der, sizeof der, mbedtls_psa_get_random, MBEDTLS_PSA_RANDOM_STATE);
    mbedtls_x509write_crt_free(&w);
    if (size < 0) return size;
    return mbedtls_x509_crt_parse_der(cert, der + sizeof der - size, (size_t)size);
}

static int netchan__set_cert(netchan__tls *t, const netchan__texts *texts) {
    bool given = texts->cert.data != NULL;
    if (given != (texts->cert_key.data != NULL))
        return netchan__fail(NETCHAN_EINVAL, "options.cert and options.cert_key go together, and only one is set");
    int e = given ? netchan__load_cert(&t->cert, &texts->cert) : netchan__make_cert(&t->key, &t->cert);
    if (e)
        return netchan__tls_fail(NETCHAN_EINVAL, e,
                                 given ? "options.cert is no certificate" : "no certificate could be made");
    if (given && (e = netchan__load_key(&t->key, &texts->cert_key)) != 0)
        return netchan__tls_fail(NETCHAN_EINVAL, e, "options.cert_key is no private key that can be read");
    if (mbedtls_pk_check_pair(&t->cert.pk, &t->key, mbedtls_psa_get_random, MBEDTLS_PSA_RANDOM_STATE))
        return netchan__fail(NETCHAN_EINVAL, "options.cert_key is not the key of options.cert");
    const char *use = t->dials ? MBEDTLS_OID_CLIENT_AUTH : MBEDTLS_OID_SERVER_AUTH;
    if (mbedtls_x509_crt_check_key_usage(&t->cert, MBEDTLS_X509_KU_DIGITAL_SIGNATURE) ||
        mbedtls_x509_crt_check_extended_key_usage(&t->cert, use, strlen(use)))
        return netchan__fail(NETCHAN_EINVAL, "options.cert is not for TLS %s (key usage)",
                             t->dials ? "clients" : "servers");
    e = netchan__hash_key(&t->cert, t->own);
    return e ? netchan__tls_fail(NETCHAN_ENOMEM, e, "the certificate could not be set") : NETCHAN_OK;
}

static int netchan__set_ca(netchan__tls *t, const netchan__text *ca) {
    t->has_ca = true;
    int e = netchan__load_cert(&t->ca, ca);
    return e ? netchan__tls_fail(NETCHAN_EINVAL, e, "options.ca has a certificate that cannot be read, or none")
             : NETCHAN_OK;
}

/* Whom to trust must be said, once. */
static int netchan__check_trust(const netchan_options *o) {
    int ways = (o->shared_key != NULL) + (o->pin != NULL) + (o->ca != NULL) + o->insecure;
    if (ways == 0)
        return netchan__fail(NETCHAN_EAUTH,
                             "nothing says whom to trust. Set options.shared_key to the same secret on both sides "
                             "(netchan_keygen() makes one), or options.pin to the other side's fingerprint, or "
                             "options.ca to certificates of who vouches for it, or options.insecure to trust anybody");
    if (ways > 1)
        return netchan__fail(NETCHAN_EINVAL,
                             "more than one of options.shared_key, .pin, .ca and .insecure is set; choose one");
    if (o->ca && !o->cert)
        return netchan__fail(NETCHAN_EINVAL,
                             "options.ca needs options.cert and options.cert_key: the other side asks for a "
                             "certificate, too");
    if (o->shared_key && (o->cert || o->cert_key))
        return netchan__fail(NETCHAN_EINVAL, "options.cert and options.cert_key are of no use with options.shared_key");
    if (o->peer_name && !o->ca)
        return netchan__fail(NETCHAN_EINVAL, "options.peer_name needs options.ca, which vouches for names");
    if (o->peer_name && (!*o->peer_name || strlen(o->peer_name) > MBEDTLS_SSL_MAX_HOST_NAME_LEN))
        return netchan__fail(NETCHAN_EINVAL, "options.peer_name must have 1 to %d bytes",
                             MBEDTLS_SSL_MAX_HOST_NAME_LEN);
    return NETCHAN_OK;
}

static int netchan__set_trust(netchan__tls *t, const netchan__texts *texts) {
    if (texts->shared_key.data) return netchan__set_shared_keys(t, texts->shared_key.data);
    int result = NETCHAN_OK;
    if (texts->pin.data) result = netchan__set_pins(t, texts->pin.data);
    if (texts->ca.data) result = netchan__set_ca(t, &texts->ca);
    return result == NETCHAN_OK ? netchan__set_cert(t, texts) : result;
}

/* ---- Whom a handshake shows. ---- */

/* One connection, see [16]. */
typedef struct netchan__stream {
    const netchan__tls *tls;
    mbedtls_ssl_context ssl;
    const uint8_t *in; /* ciphertext that was received and not used yet */
    size_t in_left;
    netchan__buf out; /* ciphertext to be sent */
    int fd;           /* where it is sent to at once, as far as that goes; 0: nowhere */
    const netchan__key *key; /* the shared key in use */
    uint8_t seen[32]; /* fingerprint of the peer's key */
    bool has_seen;
    bool has_read;    /* the peer has accepted us: it sent something after the handshake */
    bool untrusted;   /* listening: the handshake ended well, but reason tells why the peer is to be turned away */
    uint8_t binding[32]; /* a secret of this connection, known to both sides and to nobody else */
    char name[256];   /* the subject of the peer's certificate; "" when that is longer */
    char reason[320]; /* why the connection is over, as the end of a sentence about the other side */
} netchan__stream;

/* Names for which a certificate is good, as "a, b". */
static void netchan__print_names(const mbedtls_x509_crt *cert, char *out, size_t size) {
    size_t used = 0;
    for (const mbedtls_x509_sequence *n = &cert->subject_alt_names; n && n->buf.p; n = n->next) {
        char name[64] = "";
        unsigned tag = (unsigned)n->buf.tag & 0x1f;
        size_t length = n->buf.len < sizeof name - 1 ? n->buf.len : sizeof name - 1;
        if (tag == MBEDTLS_X509_SAN_DNS_NAME)
            for (size_t i = 0; i < length; i++)
                name[i] = (char)(n->buf.p[i] > ' ' && n->buf.p[i] < 127 ? n->buf.p[i] : '?');
        else if (tag == MBEDTLS_X509_SAN_IP_ADDRESS && (n->buf.len == 4 || n->buf.len == 16))
            inet_ntop(n->buf.len == 4 ? AF_INET : AF_INET6, n->buf.p, name, sizeof name);
        if (!name[0] || used + strlen(name) + 3 > size) continue;
        used += (size_t)snprintf(out + used, size - used, "%s%s", used ? ", " : "", name);
    }
    if (!used) mbedtls_x509_dn_gets(out, size, &cert->subject);
}

/* Why mbedTLS does not trust the certificate. */
static void netchan__explain_cert(netchan__stream *s, const mbedtls_x509_crt *cert, uint32_t flags) {
    char subject[96] = "", issuer[96] = "", *out = s->reason;
    const mbedtls_x509_time *from = &cert->valid_from, *to = &cert->valid_to;
    size_t size = sizeof s->reason;
    mbedtls_x509_dn_gets(subject, sizeof subject, &cert->subject);
    mbedtls_x509_dn_gets(issuer, sizeof issuer, &cert->issuer);
    if (flags & MBEDTLS_X509_BADCERT_EXPIRED)
        snprintf(out, size, "its certificate \"%s\" expired at %04d-%02d-%02d %02d:%02d UTC, which is before now",
                 subject, to->year, to->mon, to->day, to->hour, to->min);
    else if (flags & MBEDTLS_X509_BADCERT_FUTURE)
        snprintf(out, size, "its certificate \"%s\" is good from %04d-%02d-%02d %02d:%02d UTC on, which is after now",
                 subject, from->year, from->mon, from->day, from->hour, from->min);
    else if (flags & MBEDTLS_X509_BADCERT_NOT_TRUSTED && cert->issuer_raw.len == cert->subject_raw.len &&
             !memcmp(cert->issuer_raw.p, cert->subject_raw.p, cert->issuer_raw.len))
        snprintf(out, size, "its certificate \"%s\" is self-signed, and not in options.ca", subject);
    else if (flags & MBEDTLS_X509_BADCERT_NOT_TRUSTED)
        snprintf(out, size, "its certificate \"%s\" was issued by \"%s\", whose key is not in options.ca", subject,
                 issuer);
    else if (flags & MBEDTLS_X509_BADCERT_CN_MISMATCH) {
        netchan__print_names(cert, subject, sizeof subject);
        snprintf(out, size, "its certificate is for \"%s\", and the name expected is \"%.120s\" (options.peer_name%s)",
                 subject, mbedtls_ssl_get_hostname(&s->ssl), s->tls->dials ? ", or else the host dialled" : "");
    } else if (flags & (MBEDTLS_X509_BADCERT_BAD_MD | MBEDTLS_X509_BADCERT_BAD_PK | MBEDTLS_X509_BADCERT_BAD_KEY))
        snprintf(out, size, "its certificate \"%s\" uses a key or a hash that is too weak", subject);
    else snprintf(out, size, "its certificate \"%s\" is not valid (mbedTLS flags 0x%x)", subject, (unsigned)flags);
}

/* Called for each certificate of the peer, its own last. A pin trusts a key, whatever certificate it stands in. */
static int netchan__verify(void *arg, mbedtls_x509_crt *cert, int depth, uint32_t *flags) {
    netchan__stream *s = (netchan__stream *)arg;
    char seen[NETCHAN_FINGERPRINT_SIZE], pin[NETCHAN_FINGERPRINT_SIZE];
    if (!s->tls->has_ca) *flags = 0;
    if (*flags) netchan__explain_cert(s, cert, *flags);
    if (depth > 0) return 0;
    s->has_seen = netchan__hash_key(cert, s->seen) == 0;
    if (mbedtls_x509_dn_gets(s->name, sizeof s->name, &cert->subject) < 0) s->name[0] = '\0';
    if (s->has_seen && (!s->tls->pin_count || netchan__is_pinned(s->tls, s->seen))) return 0;
    *flags = MBEDTLS_X509_BADCERT_OTHER;
    netchan__print_fingerprint(s->seen, seen);
    netchan__print_fingerprint(s->tls->pins, pin);
    snprintf(s->reason, sizeof s->reason, "its key is %s, and options.pin is %s%s", seen, pin,
             s->tls->pin_count > 1 ? " or one more" : "");
    return 0;
}

/* Listening: which of our keys the peer uses. Returns 0 when there is one. */
static int netchan__choose_key(void *arg, mbedtls_ssl_context *ssl, const unsigned char *name, size_t size) {
    const netchan__tls *t = (const netchan__tls *)arg;
    netchan__stream *s = (netchan__stream *)mbedtls_ssl_get_user_data_p(ssl);
    char text[32] = "", own[32];
    for (size_t i = 0; i < t->key_count; i++) {
        netchan__print_key_id(t->keys[i].id, own);
        if (size != strlen(own) || memcmp(name, own, size) != 0) continue;
        s->key = &t->keys[i];
        return mbedtls_ssl_set_hs_psk(ssl, s->key->psk, sizeof s->key->psk);
    }
    for (size_t i = 0; i < size && i < sizeof text - 1; i++)
        text[i] = (char)(name[i] > ' ' && name[i] < 127 ? name[i] : '?');
    netchan__print_key_id(t->keys[0].id, own);
    snprintf(s->reason, sizeof s->reason, "its key is \"%s\", and options.shared_key is \"%s\"%s", text, own,
             t->key_count > 1 ? " or one more" : "");
    return -1;
}

/* What the peer has proved to be, for `identity`. */
static void netchan__print_identity(const netchan__stream *s, char *out) {
    out[0] = '\0';
    if (s->has_seen) netchan__print_fingerprint(s->seen, out);
    else if (s->key) netchan__print_key_id(s->key->id, out);
}

/* After the handshake: has the peer proved what options ask for (T1)? Only a listener finds somebody here who has not:
 * a dialler's handshake would have failed. */
static bool netchan__is_trusted(netchan__stream *s) {
    const netchan__tls *t = s->tls;
    if (t->key_count) return true; /* no handshake ends without */
    uint32_t flags = mbedtls_ssl_get_verify_result(&s->ssl);
    if (!t->has_ca && !t->pin_count) return true;
    if (s->has_seen && !flags) return true;
    if (!s->has_seen)
        snprintf(s->reason, sizeof s->reason, "it showed no certificate, and options.%s asks for one",
                 t->has_ca ? "ca" : "pin");
    else if (!s->reason[0])
        snprintf(s->reason, sizeof s->reason, "its certificate \"%.200s\" is not for TLS %s (key usage)", s->name,
                 t->dials ? "servers" : "clients");
    return false;
}

/* What who is turned away is told: the reason, less what it need not know, said to it. */
static void netchan__tell_reason(const netchan__stream *s, char *out, size_t size) {
    static const char *const from[] = {"its ", "it "}, *const to[] = {"your ", "you "};
    const char *reason = s->reason, *who = "";
    for (int i = 0; i < 2 && !*who; i++)
        if (netchan__begins(reason, from[i])) who = to[i], reason += strlen(from[i]);
    bool pinned = s->tls->pin_count && netchan__begins(s->reason, "its key is ");
    const char *end = pinned ? strstr(reason, ", and options.pin") : NULL;
    int length = end ? (int)(end - reason) : (int)strlen(reason);
    snprintf(out, size, "%s%.*s%s", who, length, reason, end ? ", which is not pinned here" : "");
}

/* ====================================================================================================================
 * [16] TLS: mbedTLS as a stream between two buffers. It never blocks: ciphertext is put in, ciphertext is taken out, or
 * given to a socket that takes it at once. Under netchan__tls_lock, see [15].
 * ================================================================================================================== */

static const char *const netchan__alpn[] = {"netchan/1", NULL};
/* ChaCha20-Poly1305 first: it has no practical limit on records under one key (RFC 8446 section 5.5), there is no key
 * update here, and mbedTLS 3.6 encrypts with it at least as fast as with AES-GCM. */
static const int netchan__ciphersuites[] = {MBEDTLS_TLS1_3_CHACHA20_POLY1305_SHA256, MBEDTLS_TLS1_3_AES_128_GCM_SHA256,
                                            MBEDTLS_TLS1_3_AES_256_GCM_SHA384, 0};

/* Fast ones only: with ffdhe8192 a stranger could make each handshake cost most of a second. */
static const uint16_t netchan__groups[] = {MBEDTLS_SSL_IANA_TLS_GROUP_X25519, MBEDTLS_SSL_IANA_TLS_GROUP_SECP256R1,
                                           MBEDTLS_SSL_IANA_TLS_GROUP_SECP384R1, MBEDTLS_SSL_IANA_TLS_GROUP_NONE};

/* A peer's certificate is asked for also where anybody is trusted, so that options.allow and link->accept have an
 * identity. A listener looks at it after the handshake, so that it can say what is wrong with it; a dialler within, as
 * it would otherwise show its own certificate to anybody. */
static void netchan__conf_cert(netchan__tls *t, mbedtls_ssl_config *conf) {
    bool required = t->dials && (t->has_ca || t->pin_count);
    mbedtls_ssl_conf_tls13_key_exchange_modes(conf, MBEDTLS_SSL_TLS1_3_KEY_EXCHANGE_MODE_EPHEMERAL);
    mbedtls_ssl_conf_authmode(conf, required ? MBEDTLS_SSL_VERIFY_REQUIRED : MBEDTLS_SSL_VERIFY_OPTIONAL);
    mbedtls_ssl_conf_ca_chain(conf, t->has_ca ? &t->ca : &t->cert, NULL); /* without a CA netchan__verify() decides */
}

/* key: with a shared key. Returns 0 or mbedTLS's error. */
static int netchan__conf_make(netchan__tls *t, mbedtls_ssl_config *conf, const netchan__key *key) {
    const char **alpn = (const char **)(uintptr_t)netchan__alpn; /* mbedTLS does not write to it */
    char id[32];
    int e = mbedtls_ssl_config_defaults(conf, t->dials ? MBEDTLS_SSL_IS_CLIENT : MBEDTLS_SSL_IS_SERVER,
                                        MBEDTLS_SSL_TRANSPORT_STREAM, MBEDTLS_SSL_PRESET_DEFAULT);
    if (e) return e;
    mbedtls_ssl_conf_min_tls_version(conf, MBEDTLS_SSL_VERSION_TLS1_3);
    mbedtls_ssl_conf_max_tls_version(conf, MBEDTLS_SSL_VERSION_TLS1_3);
    mbedtls_ssl_conf_ciphersuites(conf, netchan__ciphersuites);
    mbedtls_ssl_conf_groups(conf, netchan__groups);
    mbedtls_ssl_conf_rng(conf, mbedtls_psa_get_random, MBEDTLS_PSA_RANDOM_STATE);
#if defined(MBEDTLS_SSL_SESSION_TICKETS) && defined(MBEDTLS_SSL_CLI_C)
    mbedtls_ssl_conf_session_tickets(conf, MBEDTLS_SSL_SESSION_TICKETS_DISABLED);
#endif
    e = mbedtls_ssl_conf_alpn_protocols(conf, alpn);
    if (e) return e;
    if (!key) {
        netchan__conf_cert(t, conf);
        return mbedtls_ssl_conf_own_cert(conf, &t->cert, &t->key);
    }
    mbedtls_ssl_conf_tls13_key_exchange_modes(conf, MBEDTLS_SSL_TLS1_3_KEY_EXCHANGE_MODE_PSK_EPHEMERAL);
    mbedtls_ssl_conf_psk_cb(conf, netchan__choose_key, t);
    netchan__print_key_id(key->id, id);
    return t->dials ? mbedtls_ssl_conf_psk(conf, key->psk, sizeof key->psk, (const unsigned char *)id, strlen(id)) : 0;
}

static void netchan__tls_free(netchan__tls *t) {
    if (!t->made) return;
    for (size_t i = 0; i < t->conf_count; i++) mbedtls_ssl_config_free(&t->confs[i]);
    NETCHAN_FREE(t->confs);
    mbedtls_x509_crt_free(&t->cert);
    mbedtls_x509_crt_free(&t->ca);
    mbedtls_pk_free(&t->key);
    if (t->keys) mbedtls_platform_zeroize(t->keys, t->key_count * sizeof *t->keys);
    NETCHAN_FREE(t->keys);
    NETCHAN_FREE(t->pins);
    t->made = false;
}

/* t is all zeros and stays where it is. netchan__tls_free() follows in each case. Returns OK, EAUTH, EINVAL, ENOMEM or
 * ENET. */
static int netchan__tls_make(netchan__tls *t, const netchan__texts *texts, bool dials) {
    mbedtls_x509_crt_init(&t->cert);
    mbedtls_x509_crt_init(&t->ca);
    mbedtls_pk_init(&t->key);
    t->dials = dials;
    t->made = true;
    int result = netchan__crypto_init(), e = 0;
    if (result == NETCHAN_OK) result = netchan__set_trust(t, texts);
    if (result != NETCHAN_OK) return result;
    size_t count = dials && t->key_count ? t->key_count : 1;
    t->confs = (mbedtls_ssl_config *)netchan__alloc(count * sizeof *t->confs);
    if (!t->confs) return netchan__fail_memory("configuring TLS");
    for (; t->conf_count < count && !e; t->conf_count++) {
        mbedtls_ssl_config_init(&t->confs[t->conf_count]);
        e = netchan__conf_make(t, &t->confs[t->conf_count], t->keys ? &t->keys[t->conf_count] : NULL);
    }
    return e ? netchan__tls_fail(NETCHAN_ENOMEM, e, "TLS could not be configured") : NETCHAN_OK;
}

/* A hash of a traffic secret stands in for the exporter of RFC 8446 section 7.5, which mbedTLS 3.6 does not offer in
 * all its versions. */
static void netchan__export_key(void *arg, mbedtls_ssl_key_export_type type, const unsigned char *secret, size_t size,
                                const unsigned char *client_random, const unsigned char *server_random,
                                mbedtls_tls_prf_types prf) {
    netchan__stream *s = (netchan__stream *)arg;
    mbedtls_sha256_context hash;
    (void)client_random, (void)server_random, (void)prf;
    if (type != MBEDTLS_SSL_KEY_EXPORT_TLS1_3_CLIENT_APPLICATION_TRAFFIC_SECRET) return;
    mbedtls_sha256_init(&hash);
    mbedtls_sha256_starts(&hash, 0);
    mbedtls_sha256_update(&hash, (const unsigned char *)"netchan/1 link", 14);
    mbedtls_sha256_update(&hash, secret, size);
    mbedtls_sha256_finish(&hash, s->binding);
    mbedtls_sha256_free(&hash);
}

static size_t netchan__send_some(int fd, const uint8_t *data, size_t size);

static int netchan__stream_send(void *arg, const unsigned char *data, size_t size) {
    netchan__stream *s = (netchan__stream *)arg;
    size_t sent = s->fd && !netchan__buf_size(&s->out) ? netchan__send_some(s->fd, data, size) : 0;
    return netchan__buf_append(&s->out, data + sent, size - sent) ? (int)size : MBEDTLS_ERR_SSL_ALLOC_FAILED;
}

static int netchan__stream_recv(void *arg, unsigned char *data, size_t size) {
    netchan__stream *s = (netchan__stream *)arg;
    if (!s->in_left) return MBEDTLS_ERR_SSL_WANT_READ;
    if (size > s->in_left) size = s->in_left;
    memcpy(data, s->in, size);
    s->in += size;
    s->in_left -= size;
    return (int)size;
}

/* which: of several shared keys. name: with a CA, what the peer's certificate must carry; NULL: any. Returns 0 or
 * mbedTLS's error. */
static int netchan__stream_start(netchan__stream *s, const netchan__tls *tls, size_t which, const char *name) {
    memset(s, 0, sizeof *s);
    s->tls = tls;
    s->key = tls->dials && tls->keys ? &tls->keys[which] : NULL;
    mbedtls_ssl_init(&s->ssl);
    int e = mbedtls_ssl_setup(&s->ssl, &tls->confs[s->key ? which : 0]);
    if (!e) e = mbedtls_ssl_set_hostname(&s->ssl, tls->has_ca ? name : NULL);
    mbedtls_ssl_set_user_data_p(&s->ssl, s);
    mbedtls_ssl_set_verify(&s->ssl, netchan__verify, s);
    mbedtls_ssl_set_export_keys_cb(&s->ssl, netchan__export_key, s);
    mbedtls_ssl_set_bio(&s->ssl, s, netchan__stream_send, netchan__stream_recv, NULL);
    return e;
}

static void netchan__stream_free(netchan__stream *s) {
    mbedtls_ssl_free(&s->ssl);
    mbedtls_platform_zeroize(s->binding, sizeof s->binding);
    netchan__buf_free(&s->out);
}

/* Returns 0 when done, MBEDTLS_ERR_SSL_WANT_READ, or an error. */
static int netchan__stream_handshake(netchan__stream *s) {
    int e = mbedtls_ssl_handshake(&s->ssl);
    if (e == MBEDTLS_ERR_SSL_WANT_WRITE) return MBEDTLS_ERR_SSL_WANT_READ;
    if (e) return e;
    if (!mbedtls_ssl_get_alpn_protocol(&s->ssl)) {
        mbedtls_ssl_send_alert_message(&s->ssl, MBEDTLS_SSL_ALERT_LEVEL_FATAL,
                                       MBEDTLS_SSL_ALERT_MSG_NO_APPLICATION_PROTOCOL);
        return MBEDTLS_ERR_SSL_NO_APPLICATION_PROTOCOL;
    }
    s->untrusted = !netchan__is_trusted(s);
    return s->untrusted && s->tls->dials ? MBEDTLS_ERR_X509_CERT_VERIFY_FAILED : 0;
}

/* Returns the number of plaintext bytes, MBEDTLS_ERR_SSL_WANT_READ when the ciphertext is used up, or an error. */
static int netchan__stream_read(netchan__stream *s, uint8_t *data, size_t size) {
    for (;;) {
        int n = mbedtls_ssl_read(&s->ssl, data, size);
        if (n == 0) return MBEDTLS_ERR_SSL_PEER_CLOSE_NOTIFY;
        bool again = n == MBEDTLS_ERR_SSL_RECEIVED_NEW_SESSION_TICKET || n == MBEDTLS_ERR_SSL_WANT_WRITE;
        if (n > 0) s->has_read = true;
        if (!again && !(n == MBEDTLS_ERR_SSL_WANT_READ && s->in_left)) return n;
    }
}

static int netchan__stream_write(netchan__stream *s, const uint8_t *data, size_t size) {
    for (size_t done = 0; done < size;) {
        int n = mbedtls_ssl_write(&s->ssl, data + done, size - done);
        if (n < 0) return n;
        done += (size_t)n;
    }
    return 0;
}

/* The other side does not want us, or shows that it knows other keys. alert: what it says, or 0. */
static void netchan__explain_refusal(netchan__stream *s, unsigned alert) {
    const netchan__tls *t = s->tls;
    const char *kind = t->has_ca ? "ca" : t->pin_count ? "pin" : "insecure";
    char own[NETCHAN_FINGERPRINT_SIZE], *out = s->reason;
    size_t size = sizeof s->reason;
    if (t->key_count && !t->dials)
        snprintf(out, size, "it does not prove our shared_key: it offered none, and may use pin, ca or insecure");
    else if (t->key_count) {
        netchan__print_key_id(s->key->id, own);
        snprintf(out, size, "it does not accept our shared_key, \"%s\"%s: the keys differ, or it expects none", own,
                 t->key_count > 1 ? " or another of ours" : "");
    } else if (alert && alert != MBEDTLS_SSL_ALERT_MSG_HANDSHAKE_FAILURE) {
        netchan__print_fingerprint(t->own, own);
        snprintf(out, size, "it does not accept our certificate, whose key is %s: it expects another key, name or CA, "
                            "or another kind of trust (shared_key)", own);
    } else
        snprintf(out, size, "it has no certificate for us, or cannot agree on a cipher, or expects another kind of "
                            "trust (shared_key) than options.%s", kind);
}

/* Sets the reason why TLS failed, unless it is known. Returns whether trust was it, so that trying again is no use. */
static bool netchan__explain(netchan__stream *s, int error) {
    const char *reason = NULL;
    char text[128];
    bool final = true, known = s->reason[0] != '\0';
    unsigned alert = error == MBEDTLS_ERR_SSL_FATAL_ALERT_MESSAGE ? s->ssl.MBEDTLS_PRIVATE(in_msg)[1] : 0;
    if (alert == MBEDTLS_SSL_ALERT_MSG_PROTOCOL_VERSION) error = MBEDTLS_ERR_SSL_BAD_PROTOCOL_VERSION;
    if (alert == MBEDTLS_SSL_ALERT_MSG_NO_APPLICATION_PROTOCOL) error = MBEDTLS_ERR_SSL_NO_APPLICATION_PROTOCOL;
    switch (error) {
    case MBEDTLS_ERR_X509_CERT_VERIFY_FAILED: case MBEDTLS_ERR_SSL_BAD_CERTIFICATE:
        if (!known) netchan__is_trusted(s); /* says why not */
        return true;
    case MBEDTLS_ERR_SSL_INVALID_MAC: case MBEDTLS_ERR_SSL_FATAL_ALERT_MESSAGE:
        if (s->has_read) break;
        if (!known) netchan__explain_refusal(s, alert ? alert : MBEDTLS_SSL_ALERT_MSG_BAD_CERT);
        return true;
    case MBEDTLS_ERR_SSL_HANDSHAKE_FAILURE: case MBEDTLS_ERR_SSL_ILLEGAL_PARAMETER:
    case MBEDTLS_ERR_SSL_UNKNOWN_IDENTITY: case MBEDTLS_ERR_SSL_PRIVATE_KEY_REQUIRED:
        if (!known) netchan__explain_refusal(s, 0);
        return true;
    case MBEDTLS_ERR_SSL_BAD_PROTOCOL_VERSION:
        reason = "it does not speak TLS 1.3, which is the only version here";
        break;
    case MBEDTLS_ERR_SSL_NO_APPLICATION_PROTOCOL:
        reason = "it speaks TLS 1.3, but not the protocol netchan/1";
        break;
    case MBEDTLS_ERR_SSL_INVALID_RECORD: case MBEDTLS_ERR_SSL_UNEXPECTED_MESSAGE:
    case MBEDTLS_ERR_SSL_UNEXPECTED_RECORD:
        reason = !mbedtls_ssl_is_handshake_over(&s->ssl) ? "it does not speak TLS"
                                                         : "it broke TLS, or wants new keys, which a new link has";
        break;
    case MBEDTLS_ERR_SSL_CONN_EOF: case MBEDTLS_ERR_SSL_PEER_CLOSE_NOTIFY:
        reason = "it closed the connection";
        final = false;
        break;
    default: break;
    }
    if (reason) snprintf(s->reason, sizeof s->reason, "%s", reason);
    if (reason) return final;
    mbedtls_strerror(error, text, sizeof text);
    snprintf(s->reason, sizeof s->reason, "%s (mbedTLS -0x%04x)", text, (unsigned)-error);
    return false;
}

NETCHANDEF int netchan_keygen(char *out, size_t size) {
    uint8_t key[32];
    if (!out || size < NETCHAN_KEY_SIZE)
        return netchan__fail(NETCHAN_EINVAL, "netchan_keygen: %d bytes are needed, %zu are given", NETCHAN_KEY_SIZE,
                             size);
    pthread_mutex_lock(&netchan__tls_lock);
    int result = netchan__crypto_init();
    if (result == NETCHAN_OK && psa_generate_random(key, sizeof key) != PSA_SUCCESS)
        result = netchan__fail(NETCHAN_ENET, "netchan_keygen: the system gives no randomness");
    pthread_mutex_unlock(&netchan__tls_lock);
    if (result != NETCHAN_OK) return result;
    netchan__hex(key, sizeof key, out);
    mbedtls_platform_zeroize(key, sizeof key);
    return NETCHAN_OK;
}

NETCHANDEF int netchan_key_id(const char *shared_key, char *out, size_t size) {
    netchan__text text = {NULL, 0};
    netchan__key key;
    size_t length;
    if (!shared_key || !out || size < NETCHAN_KEY_ID_SIZE)
        return netchan__fail(NETCHAN_EINVAL, "netchan_key_id: a key and %d bytes are needed, %zu are given",
                             NETCHAN_KEY_ID_SIZE, size);
    int result = netchan__read_text(NULL, "shared_key", shared_key, &text);
    if (result == NETCHAN_OK) {
        const char *at = text.data, *word = netchan__next_key(&at, &length);
        result = netchan__set_shared_key(&key, word ? word : "", length);
    }
    netchan__text_free(&text);
    if (result == NETCHAN_OK) netchan__print_key_id(key.id, out);
    mbedtls_platform_zeroize(&key, sizeof key);
    return result;
}

NETCHANDEF int netchan_fingerprint(const char *cert, char *out, size_t size) {
    uint8_t hash[32] = {0};
    netchan__text text = {NULL, 0};
    if (!cert || !out || size < NETCHAN_FINGERPRINT_SIZE)
        return netchan__fail(NETCHAN_EINVAL,
                             "netchan_fingerprint: a certificate and %d bytes are needed, %zu are given",
                             NETCHAN_FINGERPRINT_SIZE, size);
    int result = netchan__read_text(NULL, "cert", cert, &text), e = 0;
    mbedtls_x509_crt parsed;
    mbedtls_x509_crt_init(&parsed);
    pthread_mutex_lock(&netchan__tls_lock);
    if (result == NETCHAN_OK) result = netchan__crypto_init();
    if (result == NETCHAN_OK) e = netchan__load_cert(&parsed, &text);
    if (!e && result == NETCHAN_OK) e = netchan__hash_key(&parsed, hash);
    mbedtls_x509_crt_free(&parsed);
    pthread_mutex_unlock(&netchan__tls_lock);
    netchan__text_free(&text);
    if (e) result = netchan__tls_fail(NETCHAN_EINVAL, e, "netchan_fingerprint: the certificate cannot be read");
    if (result == NETCHAN_OK) netchan__print_fingerprint(hash, out);
    return result;
}

/* ====================================================================================================================
 * [17] Sockets: addresses, and sockets that never block, never raise SIGPIPE, do not outlive an exec in any thread, and
 * are never descriptors 0, 1 or 2, to which programs write though they have closed them.
 * ================================================================================================================== */

typedef struct netchan__address {
    struct sockaddr_storage storage;
    socklen_t size;
    char host[256]; /* as it was written */
} netchan__address;

static int netchan__fail_address(const char *text) {
    return netchan__fail(NETCHAN_EINVAL, "\"%.200s\" is no address; write host:port, [ipv6]:port or :port",
                         text ? text : "(NULL)");
}

/* "host:port", "[ipv6]:port", ":port" -> host, of at least 256 bytes, and *port, the end of text. Returns OK or
 * EINVAL. */
static int netchan__split_address(const char *text, char *host, const char **port) {
    const char *colon = text ? strrchr(text, ':') : NULL, *begin = text;
    size_t length = colon ? (size_t)(colon - text) : 0;
    if (colon && length >= 2 && text[0] == '[' && text[length - 1] == ']') begin = text + 1, length -= 2;
    else if (colon && memchr(text, ':', length)) colon = NULL; /* an IPv6 address without brackets */
    if (!colon || !colon[1] || strspn(colon + 1, "0123456789") != strlen(colon + 1) || strlen(colon + 1) > 5 ||
        strtol(colon + 1, NULL, 10) > 65535 || length >= 256)
        return netchan__fail_address(text);
    memcpy(host, begin, length);
    host[length] = '\0';
    *port = colon + 1;
    return NETCHAN_OK;
}

/* Up to max addresses of a host and port. Returns how many, EINVAL or EADDR. Blocks while names are looked up. */
static int netchan__resolve(const char *text, bool passive, netchan__address *out, size_t max) {
    char host[256] = "";
    const char *port = NULL;
    memset(out, 0, max * sizeof *out);
    int result = netchan__split_address(text, host, &port);
    if (result != NETCHAN_OK) return result;
    struct addrinfo hints, *list = NULL;
    memset(&hints, 0, sizeof hints);
    hints.ai_family = AF_UNSPEC;
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0);
    int e = getaddrinfo(host[0] ? host : NULL, port, &hints, &list);
    if (e) return netchan__fail(NETCHAN_EADDR, "\"%.200s\" cannot be looked up: %s", text, gai_strerror(e));
    size_t count = 0;
    for (struct addrinfo *a = list; a && count < max; a = a->ai_next) {
        if (a->ai_addrlen > sizeof out->storage) continue;
        memcpy(&out[count].storage, a->ai_addr, a->ai_addrlen);
        snprintf(out[count].host, sizeof host, "%s", host[0] ? host : "localhost");
        out[count++].size = a->ai_addrlen;
    }
    freeaddrinfo(list);
    if (!count) return netchan__fail(NETCHAN_EADDR, "\"%.200s\" has no address that can be used", text);
    return (int)count;
}

/* "a:1,b:2": their addresses, in this order; names that cannot be looked up are left out, if that is not true of all.
 * Returns as netchan__resolve(). */
static int netchan__resolve_list(const char *text, netchan__address *out, size_t max) {
    char one[300];
    size_t count = 0;
    int failure = NETCHAN_EINVAL;
    if (!text) return netchan__fail_address(text);
    for (const char *begin = text; begin && count < max;) {
        const char *comma = strchr(begin, ',');
        size_t length = comma ? (size_t)(comma - begin) : strlen(begin);
        if (length >= sizeof one) return netchan__fail_address(begin);
        memcpy(one, begin, length);
        one[length] = '\0';
        int n = netchan__resolve(one, false, out + count, max - count);
        if (n == NETCHAN_EINVAL) return n;
        if (n < 0) failure = n;
        else count += (size_t)n;
        begin = comma ? comma + 1 : NULL;
    }
    return count ? (int)count : failure;
}

static void netchan__print_address(const netchan__address *a, char *out, size_t size) {
    char host[64] = "?", port[8] = "?";
    getnameinfo((const struct sockaddr *)(const void *)&a->storage, a->size, host, sizeof host, port, sizeof port,
                NI_NUMERICHOST | NI_NUMERICSERV);
    snprintf(out, size, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
}

/* Moves a new descriptor away from those of the standard streams. errno stays. */
static int netchan__own_fd(int fd) {
    if (fd < 0 || fd > 2) return fd;
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 3), saved = errno;
    close(fd);
    errno = saved;
    return own;
}

#if defined(SOCK_CLOEXEC) && !defined(__APPLE__)
#define NETCHAN__CLOEXEC SOCK_CLOEXEC
#if defined(__GLIBC__) && !defined(_GNU_SOURCE) /* it has these, but does not tell */
extern int (accept4)(int fd, struct sockaddr *address, socklen_t *size, int flags);
extern int (pipe2)(int *fds, int flags);
#endif
#else /* no other thread should fork just now */
#define NETCHAN__CLOEXEC 0
#define accept4(fd, address, size, flags) accept(fd, address, size)
#define pipe2(fds, flags) pipe(fds)
#endif

/* The ends of a pipe, that for reading first. Returns false with errno. */
static bool netchan__open_pipe(int *fds) {
    if (pipe2(fds, O_CLOEXEC)) return false;
    for (int i = 0; i < 2; i++) fds[i] = netchan__own_fd(fds[i]);
    return fds[0] >= 0 && fds[1] >= 0;
}

static bool netchan__prepare_fd(int fd) {
    int flags = fcntl(fd, F_GETFL, 0);
    return flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0 && fcntl(fd, F_SETFD, FD_CLOEXEC) == 0;
}

static void netchan__prepare_socket(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
#ifdef SO_NOSIGPIPE
    setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
#ifdef TCP_NOTSENT_LOWAT
    int unsent = 128 * 1024; /* what waits in the kernel delays everything behind it */
    setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof unsent);
#endif
}

static int netchan__open_socket(const netchan__address *a) {
    int fd = netchan__own_fd(socket(a->storage.ss_family, SOCK_STREAM | NETCHAN__CLOEXEC, 0));
    if (fd >= 0 && netchan__prepare_fd(fd)) return fd;
    int saved = errno;
    if (fd >= 0) close(fd);
    errno = saved;
    return -1;
}

/* Binds and listens on the first address that works. Returns the socket or a negative result. *bound: where. */
static int netchan__listen_socket(const char *text, netchan__address *bound) {
    enum { MAX = 16 };
    netchan__address list[MAX];
    int count = netchan__resolve(text, true, list, MAX), saved = 0;
    if (count < 0) return count;
    bound->size = sizeof bound->storage;
    for (int pass = 0; pass < 2; pass++) { /* ":port": IPv6 first, whose socket also takes IPv4 */
        for (int i = 0; i < count; i++) {
            if ((list[i].storage.ss_family == AF_INET6) != (pass == 0)) continue;
            int fd = netchan__open_socket(&list[i]), on = 1, off = 0;
            if (fd < 0) {
                saved = errno;
                continue;
            }
            setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
            if (list[i].storage.ss_family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
            if (bind(fd, (struct sockaddr *)(void *)&list[i].storage, list[i].size) == 0 &&
                listen(fd, SOMAXCONN) == 0 &&
                getsockname(fd, (struct sockaddr *)(void *)&bound->storage, &bound->size) == 0)
                return fd;
            saved = errno;
            close(fd);
        }
    }
    return netchan__fail(NETCHAN_EADDR, "cannot listen on \"%.200s\": %s", text, netchan__os_error(saved));
}

/* Takes over a socket that listens. Returns it or a negative result. *bound: where. */
static int netchan__adopt_socket(int fd, netchan__address *bound) {
    int listens = 0;
    socklen_t size = sizeof listens;
    bound->size = sizeof bound->storage;
    if (fd < 0 || getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) || !listens)
        return netchan__fail(NETCHAN_EINVAL, "options.listen_fd is %d, which is no socket that listens", fd);
    if (getsockname(fd, (struct sockaddr *)(void *)&bound->storage, &bound->size) ||
        (bound->storage.ss_family != AF_INET && bound->storage.ss_family != AF_INET6) || !netchan__prepare_fd(fd))
        return netchan__fail(NETCHAN_EADDR, "options.listen_fd is %d, which is no TCP socket", fd);
    return fd;
}

#ifdef MSG_NOSIGNAL
enum { NETCHAN__SEND_FLAGS = MSG_NOSIGNAL };
#else
enum { NETCHAN__SEND_FLAGS = 0 };
#endif

/* Sends what goes at once, and returns how much that was. What is wrong shows when the rest is sent. */
static size_t netchan__send_some(int fd, const uint8_t *data, size_t size) {
    ssize_t n = send(fd, data, size, NETCHAN__SEND_FLAGS);
    return n > 0 ? (size_t)n : 0;
}

/* Sends what it can. Returns false when the connection is broken. */
static bool netchan__flush_fd(int fd, netchan__buf *out) {
    while (netchan__buf_size(out)) {
        ssize_t n = send(fd, out->data + out->start, netchan__buf_size(out), NETCHAN__SEND_FLAGS);
        if (n > 0) netchan__buf_consume(out, (size_t)n);
        else if (n < 0 && errno == EINTR) continue;
        else return n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == ENOBUFS);
    }
    return true;
}

NETCHAN__SMALL_END

/* ====================================================================================================================
 * [18] The I/O loop, which calls poll(). Whoever runs it owns all connections: sockets, TLS streams, and the links
 * that sessions see. What it shares with callers (endpoints, links, sessions) belongs to netchan__net_lock, which it
 * holds except while it waits, encrypts, decrypts, logs and asks options.allow.
 *
 * The I/O thread runs the loop, but as each hop between threads costs a wake-up, a caller that would sleep may run it
 * until its operation is over; what calls the program (logs, options.allow, all that strangers do) it leaves to the
 * I/O thread. And who has something to send while the loop is in poll() sends it. Invariants.
 *   R1  One thread runs the loop (netchan__net.runner) and one at most sends beside it, while it is in poll()
 *       (netchan__net.pushing): a connection is touched by one thread at a time. Connections come and go, and change
 *       what they are polled for, in the loop only.
 *   R2  While somebody sleeps who needs the loop (sleepers), or there is something for the I/O thread, the loop is run.
 *       Otherwise it may be left alone for NETCHAN__LEND_US (lent), for a caller that comes back: no value waits for
 *       longer than that.
 *   R3  Nothing is pending when the loop begins to wait in poll(), or who made it so wakes it. It looks again and again
 *       for NETCHAN__SPIN_US after there was something, if that is of use, and then sleeps.
 *   R4  polls[i] and watched[i] stand for what has slot i: the wake-up pipe, listeners, the first few connections. The
 *       others have slot 0 and are in a set of the kernel's (epoll, where there is that), whose descriptor is polled
 *       for all of them: it costs the loop nothing that they are there. Where there is none, all have slots.
 *   R5  Each connection and each endpoint has an alarm, which rings when it is to be looked at: nobody looks at those
 *       whose time has not come, unless something may be wrong with any of them (netchan__look()).
 *
 * A stranger is a connection that was not greeted yet. Invariants.
 *   L1  A listener has about NETCHAN__HANDSHAKES_MAX strangers at most, each of them for NETCHAN__HANDSHAKE_MS at most.
 *       Half of the places are for those whose ClientHello was answered, half for those who have not said one, and
 *       among each the oldest gives way: who has the key speaks at once, and is among the latter for a moment only,
 *       however many are silent. Whoever has spoken is heard before it gives way, and has NETCHAN__GRACE_MS for the
 *       rest, so that of a thousand peers who come back at once none comes in vain.
 *   L2  Peers are served first, then strangers who were answered, then the others, the newest first, and these for
 *       NETCHAN__SLICE_US at a time. Under pressure, which is many strangers, many failures or much work for them,
 *       strangers get a quarter of this thread's time, and what those who succeed earn; and an address whose
 *       handshakes fail has a burst of tries and then a few a second. Who succeeds costs nobody a try, so that a
 *       thousand peers may come back at once.
 *   L3  Strangers are told of as events so many a second, and never in place of other events.
 * ================================================================================================================== */

enum {
    NETCHAN__CHUNK = 65536,            /* bytes read from a socket at a time */
    NETCHAN__CIPHER_HIGH = 4 * 16384,  /* encrypted bytes that may wait for a socket */
    NETCHAN__HANDSHAKES_MAX = 256,
    NETCHAN__ACCEPTS = 16,             /* at a time */
    NETCHAN__HANDSHAKE_MS = 10000,
    NETCHAN__PRESSURE = 64,            /* strangers, or failures in a burst; then as many as NETCHAN__FAIL_MS tells */
    NETCHAN__FAIL_MS = 20,
    NETCHAN__TRIES = 16,               /* of one address in a burst; then one in NETCHAN__TRY_MS */
    NETCHAN__TRY_MS = 250,
    NETCHAN__TELL = 32,                /* events about strangers in a burst; then one in NETCHAN__TELL_MS */
    NETCHAN__TELL_MS = 250,
    NETCHAN__ORIGINS = 256,            /* addresses whose failures are remembered */
    NETCHAN__SLICE_US = 2000,          /* of strangers at a time, then the others have their turn */
    NETCHAN__PRESSED_US = 500,         /* likewise, under pressure; then strangers wait for three times as long, */
    NETCHAN__REST_US = 1000,           /* and at least so long, unless somebody succeeds: */
    NETCHAN__WORK_MS = 100,            /* in a burst; more of it, and more than a quarter of the time, is pressure */
    NETCHAN__EARN_MS = 8,              /* then they have so much more, ... */
    NETCHAN__EARN_MOST_MS = 1000,      /* ... and so much at most */
    NETCHAN__GRACE_MS = 250,           /* who was answered keeps its place for so long */
    NETCHAN__FLUSH_MS = 1000,          /* for the last words to who is turned away */
    NETCHAN__ACCEPT_PAUSE_MS = 100,    /* when there are no descriptors left, or the like */
    NETCHAN__CHECK_MS = 500,
    NETCHAN__LEND_US = 200,            /* the loop is left to callers for so long after the last that ran it */
    NETCHAN__SPIN_US = 30,             /* about what it costs to sleep and be woken by another core */
    NETCHAN__BURST_US = 20,            /* values that follow each other so quickly are sent together */
    NETCHAN__POLL_FEW = 8,             /* so many are polled themselves: that costs less than to ask the set */
    NETCHAN__NEWS = 64,                /* that are taken from the set at a time */
    NETCHAN__RECORDS = 64,             /* that come in are worked off together, */
    NETCHAN__RECORDS_OUT = 4,          /* and so many go out in a row */
    NETCHAN__BACKOFF_MIN_MS = 50,
    NETCHAN__BACKOFF_MAX_MS = 5000,
    NETCHAN__ADDRESSES_MAX = 16
};

enum netchan__conn_state { NETCHAN__CONNECTING, NETCHAN__HANDSHAKING, NETCHAN__SPEAKING };

typedef struct netchan__endpoint netchan__endpoint;
typedef struct netchan__conn netchan__conn;

/* When to look at something (R5): a place in a heap. Net. */
typedef struct netchan__alarm {
    uint64_t at;  /* nanoseconds; UINT64_MAX: never */
    size_t place; /* from 1; 0: in none */
    netchan__conn *conn;         /* one of both */
    netchan__endpoint *endpoint;
} netchan__alarm;

/* One connection. I/O thread, but for the wire and the alarm, which are net. */
struct netchan__conn {
    netchan__conn *next, *prev;
    netchan__endpoint *endpoint;
    netchan__wire wire; /* from the end of the handshake */
    netchan__stream stream;
    enum netchan__conn_state state;
    int fd;
    uint64_t origin;
    netchan__conn *newer, *older;  /* of the endpoint's strangers */
    bool stranger;     /* it was not greeted yet */
    bool answered;     /* a stranger whose ClientHello was answered: only who can go on will say more */
    bool closing;      /* it has failed, and its last words are on the way */
    bool more;         /* there may be more to send */
    size_t slot;       /* see R4 */
    short awaited;     /* slot 0: for what events it is in the set; 0: it is not */
    short news;        /* events that there were */
    netchan__alarm alarm;
    uint64_t deadline; /* nanoseconds; until it was greeted, or for the last words */
    uint64_t answered_at; /* likewise */
};

/* One listen or dial. Net, unless said otherwise. */
struct netchan__endpoint {
    netchan__hub hub; /* first */
    netchan__endpoint *prev, *next;
    netchan__tls tls; /* under netchan__tls_lock */
    int fd;           /* listening; constant */
    netchan__address addresses[NETCHAN__ADDRESSES_MAX]; /* dialling; constant */
    size_t which, tried;    /* tried: since the last link */
    size_t key, keys_tried; /* dialling: likewise of the shared keys */
    char peer_name[256];    /* of the options; constant */
    netchan__conn *trial;   /* dialling: the connection that was not greeted yet. I/O thread */
    uint64_t next_dial;     /* nanoseconds */
    uint64_t next_accept;   /* likewise; 0: at any time */
    unsigned failures;      /* in a row */
    int failure;            /* dialling: why the first connection is given up */
    char failure_text[320]; /* the last reason why there was no connection */
    size_t conns, strangers, answered; /* answered: of the strangers */
    netchan__conn *newest, *oldest; /* of strangers. I/O thread */
    uint64_t failed, told;  /* listening: buckets of handshakes that failed, and of events about them */
    size_t untold;          /* strangers that were turned away and not told of */
    char stranger[80];      /* the last one's address; why is in failure_text */
    bool stopping, gone, is_soon;
    netchan__endpoint *next_soon;  /* in netchan__io.soon */
    netchan__endpoint *next_listener;
    size_t slot;                   /* listening: see R4; 0: not polled yet. I/O thread */
    netchan__alarm alarm;
    pthread_cond_t changed; /* with netchan__net_lock */
    char address[300];
};

/* What is polled: a connection, a listener, or, with neither, the wake-up pipe or the set. */
typedef struct netchan__watched {
    netchan__conn *conn;
    netchan__endpoint *listener;
} netchan__watched;

/* Net, but for what says otherwise. */
static struct netchan__io_state {
    netchan__endpoint *endpoints, *listeners; /* listeners: those that are polled */
    netchan__endpoint *soon; /* those to look at in the next round */
    netchan__conn *conns; /* who runs the loop, as next_check */
    uint64_t next_check;  /* when to look at all claims again */
    netchan__alarm **alarms; /* from 1: no one's is before that at half its place */
    size_t alarm_count, alarm_room;
    int wake_read;
    bool stop;
    size_t links;     /* under netchan__control_lock */
    pthread_t thread; /* likewise */
    /* Who runs the loop: */
    struct pollfd *polls;
    netchan__watched *watched; /* what polls[i] stands for */
    size_t poll_count, poll_room;
    int set;                 /* see R4; it has slot 1. -1: none */
    size_t in_set;           /* connections with slot 0 */
    uint64_t spin_until;     /* nanoseconds */
    unsigned misses;         /* times in a row that it was no use */
    bool resting;            /* strangers are not polled, see strangers_from */
    struct {
        uint64_t origin, failed; /* the bucket of its handshakes that failed */
    } origins[NETCHAN__ORIGINS];
    uint64_t strangers_from; /* nanoseconds; strangers wait until then */
    uint64_t earned;         /* nanoseconds of work for strangers that those who succeeded have paid for */
    uint64_t worked;         /* a bucket of the other work, of which a nanosecond takes four to leak */
    uint64_t pushed;         /* nanoseconds: when something was last sent outside the loop. Net */
    uint8_t cipher[NETCHAN__CHUNK], plain[NETCHAN__CHUNK];
} netchan__io;

/* Serialises the start and the end of the thread. Taken before netchan__net_lock. */
static pthread_mutex_t netchan__control_lock = PTHREAD_MUTEX_INITIALIZER;

static uint64_t netchan__after(uint64_t now, uint64_t ms) { return now + ms * 1000000u; }

/* The endpoint is looked at in the next round. */
static void netchan__soon(netchan__endpoint *e) {
    if (e->is_soon) return;
    e->is_soon = true;
    e->next_soon = netchan__io.soon;
    netchan__io.soon = e;
}

static void netchan__io_release(void) {
    netchan__settle();
    if (netchan__net.runner == NETCHAN__THREAD && !netchan__net.polling && !netchan__net.pushing)
        netchan__net.wake = false; /* this is the thread that would be woken */
    pthread_mutex_unlock(&netchan__net_lock);
}

/* Wakes who was waited for: late, as who is woken may want to run the loop next. Caller holds no lock. */
static void netchan__io_wake(void) {
    netchan__wake_finished();
    netchan__bury_rest();
}

static void netchan__io_unlock(void) {
    netchan__io_release();
    netchan__io_wake();
}

/* Writes the log without locks. Caller holds netchan__net_lock, which is given back and taken again. */
static void netchan__write_logs(void) {
    netchan__log_line *line = netchan__logs, *next;
    if (!line) return;
    netchan__logs = netchan__last_log = NULL;
    netchan__io_unlock();
    for (; line; line = next) {
        next = line->next;
        line->log(line->arg, line->level, line->text);
        NETCHAN_FREE(line);
    }
    pthread_mutex_lock(&netchan__net_lock);
}

/* ---- Alarms (R5): a binary heap (Williams 1964). ---- */

static void netchan__alarm_put(size_t place, netchan__alarm *a) {
    netchan__io.alarms[place] = a;
    a->place = place;
}

/* Lets it ring then. */
static void netchan__alarm_set(netchan__alarm *a, uint64_t at) {
    netchan__alarm **heap = netchan__io.alarms;
    size_t i = a->place, count = netchan__io.alarm_count;
    a->at = at;
    for (; i > 1 && heap[i / 2]->at > at; i /= 2) netchan__alarm_put(i, heap[i / 2]);
    for (size_t next; (next = 2 * i) <= count; i = next) {
        if (next < count && heap[next + 1]->at < heap[next]->at) next++;
        if (heap[next]->at >= at) break;
        netchan__alarm_put(i, heap[next]);
    }
    netchan__alarm_put(i, a);
}

/* Lets it ring then at the latest. */
static void netchan__alarm_by(netchan__alarm *a, uint64_t at) { if (at < a->at) netchan__alarm_set(a, at); }

/* Returns false when out of memory. */
static bool netchan__alarm_add(netchan__alarm *a, netchan__conn *c, netchan__endpoint *e) {
    size_t count = netchan__io.alarm_count + 1;
    if (count >= netchan__io.alarm_room) {
        size_t room = 2 * count;
        netchan__alarm **heap = (netchan__alarm **)netchan__alloc(room * sizeof(netchan__alarm *));
        if (!heap) return false;
        if (netchan__io.alarms) memcpy(heap, netchan__io.alarms, count * sizeof(netchan__alarm *));
        NETCHAN_FREE(netchan__io.alarms);
        netchan__io.alarms = heap;
        netchan__io.alarm_room = room;
    }
    a->conn = c;
    a->endpoint = e;
    netchan__io.alarm_count = a->place = count;
    netchan__alarm_set(a, UINT64_MAX);
    return true;
}

static void netchan__alarm_remove(netchan__alarm *a) {
    netchan__alarm *last = netchan__io.alarms[netchan__io.alarm_count--];
    if (last != a) {
        netchan__alarm_put(a->place, last);
        netchan__alarm_set(last, last->at);
    }
    a->place = 0;
}

/* When the next one rings. */
static uint64_t netchan__next_alarm(void) {
    return netchan__io.alarm_count ? netchan__io.alarms[1]->at : UINT64_MAX;
}

/* ---- What is polled (R4). Caller runs the loop. ---- */

/* A set for what is not polled itself, or -1. */
static int netchan__make_set(void) {
#if defined(__linux__)
    return netchan__own_fd(epoll_create1(EPOLL_CLOEXEC));
#else
    return -1;
#endif
}

/* Which events poll() has news of, and epoll, which are the same numbers. Returns false if it cannot be done: then it
 * is in the set no more. */
static bool netchan__await(netchan__conn *c, short events) {
    bool done = true;
#if defined(__linux__)
    struct epoll_event e;
    int what = !events ? EPOLL_CTL_DEL : c->awaited ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    if (events == c->awaited) return true;
    memset(&e, 0, sizeof e);
    e.events = (uint32_t)events;
    e.data.ptr = c;
    done = epoll_ctl(netchan__io.set, what, c->fd, &e) == 0;
    if (!done && what == EPOLL_CTL_MOD) epoll_ctl(netchan__io.set, EPOLL_CTL_DEL, c->fd, &e);
#endif
    c->awaited = events;
    return done;
}

/* Room for one more, and for those in the set. */
static bool netchan__poll_room(void) {
    if (netchan__io.poll_count + netchan__io.in_set < netchan__io.poll_room) return true;
    size_t room = netchan__io.poll_room ? 2 * netchan__io.poll_room : 16;
    struct pollfd *polls = (struct pollfd *)netchan__alloc(room * sizeof *polls);
    netchan__watched *watched = (netchan__watched *)netchan__alloc(room * sizeof *watched);
    bool made = polls && watched;
    if (made && netchan__io.poll_count) {
        memcpy(polls, netchan__io.polls, netchan__io.poll_count * sizeof *polls);
        memcpy(watched, netchan__io.watched, netchan__io.poll_count * sizeof *watched);
    }
    NETCHAN_FREE(made ? netchan__io.polls : polls);
    NETCHAN_FREE(made ? netchan__io.watched : watched);
    if (!made) return false;
    netchan__io.polls = polls;
    netchan__io.watched = watched;
    netchan__io.poll_room = room;
    return true;
}

static void netchan__poll_put(size_t i, struct pollfd poll, netchan__watched watched) {
    netchan__io.polls[i] = poll;
    netchan__io.watched[i] = watched;
    if (watched.conn) watched.conn->slot = i;
    if (watched.listener) watched.listener->slot = i;
}

/* There is room, see netchan__poll_room(). */
static void netchan__poll_add(int fd, netchan__conn *c, netchan__endpoint *e) {
    struct pollfd poll = {fd, POLLIN, 0};
    netchan__watched watched = {c, e};
    netchan__poll_put(netchan__io.poll_count++, poll, watched);
}

static void netchan__poll_remove(size_t i) {
    size_t last = --netchan__io.poll_count;
    netchan__poll_put(i, netchan__io.polls[last], netchan__io.watched[last]);
}

/* The same for a connection. */
static void netchan__poll_add_conn(netchan__conn *c) {
    c->slot = 0;
    if (netchan__io.set < 0 || netchan__io.poll_count < NETCHAN__POLL_FEW) netchan__poll_add(c->fd, c, NULL);
    else netchan__io.in_set++;
}

static void netchan__poll_remove_conn(netchan__conn *c) {
    if (c->slot) {
        netchan__poll_remove(c->slot);
        return;
    }
    netchan__await(c, 0); /* to close it would not do, if a child that forks now still has it */
    netchan__io.in_set--;
}

/* What the connection is to be polled for now. */
static void netchan__poll_conn(netchan__conn *c) {
    bool writes = c->state == NETCHAN__CONNECTING || netchan__buf_size(&c->stream.out) || c->more;
    bool reads = c->state != NETCHAN__CONNECTING && !c->closing;
    bool rests = c->wire.paused || (c->stranger && !c->endpoint->hub.dials && netchan__io.resting);
    short events = (short)((reads ? POLLIN : 0) | (writes ? POLLOUT : 0));
    if (rests) c->news = 0;
    if (!c->slot && !netchan__await(c, (short)(rests ? 0 : events))) {
        netchan__io.in_set--;
        netchan__poll_add(c->fd, c, NULL);
    }
    if (!c->slot) return;
    struct pollfd *p = &netchan__io.polls[c->slot];
    p->fd = rests ? -1 : c->fd; /* not even its end is news then */
    p->events = events;
}

NETCHAN__SMALL_BEGIN

/* ---- Connections. Caller runs the loop and holds netchan__net_lock. ---- */

/* A bucket (the generic cell rate algorithm of ITU-T I.371) is the time at which it will be empty, if each drop takes
 * each_ms to leak. */
static bool netchan__bucket_full(uint64_t bucket, uint64_t now, unsigned drops, unsigned each_ms) {
    return bucket > netchan__after(now, (uint64_t)drops * each_ms);
}

static void netchan__bucket_add(uint64_t *bucket, uint64_t now, unsigned drops, unsigned each_ms) {
    if (*bucket < now) *bucket = now;
    if (!netchan__bucket_full(*bucket, now, drops, each_ms)) *bucket = netchan__after(*bucket, each_ms);
}

/* A number for who has the address: of IPv6 the first half, which is what one customer has. */
static uint64_t netchan__origin_of(const netchan__address *a) {
    static const uint8_t mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255}; /* IPv4 on an IPv6 socket */
    const struct sockaddr_in *v4 = (const struct sockaddr_in *)(const void *)&a->storage;
    const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)(const void *)&a->storage;
    uint8_t half[8] = {0};
    if (a->storage.ss_family == AF_INET) memcpy(half, &v4->sin_addr, 4);
    else if (!memcmp(&v6->sin6_addr, mapped, 12)) memcpy(half, (const uint8_t *)&v6->sin6_addr + 12, 4);
    else memcpy(half, &v6->sin6_addr, 8);
    return netchan__hash(netchan__load(half, 8));
}

static uint64_t *netchan__failures_of(uint64_t origin) {
    size_t i = (size_t)(origin % NETCHAN__ORIGINS);
    if (netchan__io.origins[i].origin != origin) { /* another one's are forgotten */
        netchan__io.origins[i].origin = origin;
        netchan__io.origins[i].failed = 0;
    }
    return &netchan__io.origins[i].failed;
}

static bool netchan__under_pressure(const netchan__endpoint *e, uint64_t now) {
    return e->strangers >= NETCHAN__PRESSURE || netchan__bucket_full(netchan__io.worked, now, NETCHAN__WORK_MS, 4) ||
           netchan__bucket_full(e->failed, now, NETCHAN__PRESSURE, NETCHAN__FAIL_MS);
}

static void netchan__note_failure(netchan__endpoint *e, uint64_t origin, uint64_t now) {
    netchan__bucket_add(&e->failed, now, NETCHAN__PRESSURE, NETCHAN__FAIL_MS);
    netchan__bucket_add(netchan__failures_of(origin), now, NETCHAN__TRIES, NETCHAN__TRY_MS);
}

/* Tells of strangers that were turned away (L3); of those that came too quickly later, together. */
static void netchan__tell_rejected(netchan__endpoint *e, uint64_t now) {
    netchan__hub *h = &e->hub;
    if (!e->untold) return;
    if (netchan__held(&h->link.events->lane) >= NETCHAN__EVENTS_MAX / 2) { /* who reads them makes room */
        netchan__alarm_by(&e->alarm, netchan__after(now, (uint64_t)h->options.ping_ms));
        return;
    }
    if (netchan__bucket_full(e->told, now, NETCHAN__TELL, NETCHAN__TELL_MS)) {
        netchan__alarm_by(&e->alarm, netchan__after(now, NETCHAN__TELL_MS));
        return;
    }
    netchan__news n = netchan__begin_event("rejected", 0, e->stranger, e->failure_text);
    if (e->untold > 1) netchan__add(&n, "count", netchan_uint(e->untold));
    netchan__event(h, n);
    netchan__log(h, 0, "%s: no connection with %s: %s", e->address, e->stranger, e->failure_text);
    netchan__bucket_add(&e->told, now, NETCHAN__TELL, NETCHAN__TELL_MS);
    e->untold = 0;
}

static void netchan__reject(netchan__endpoint *e, const char *address, const char *reason, uint64_t now) {
    if (e->stopping) return;
    snprintf(e->stranger, sizeof e->stranger, "%s", address);
    snprintf(e->failure_text, sizeof e->failure_text, "%s", reason);
    e->untold++;
    netchan__tell_rejected(e, now);
}

static void netchan__add_stranger(netchan__conn *c) {
    netchan__endpoint *e = c->endpoint;
    c->stranger = true;
    c->older = e->newest;
    if (e->newest) e->newest->newer = c;
    else e->oldest = c;
    e->newest = c;
    e->strangers++;
}

static void netchan__remove_stranger(netchan__conn *c) {
    netchan__endpoint *e = c->endpoint;
    if (c->newer) c->newer->older = c->older;
    else e->newest = c->older;
    if (c->older) c->older->newer = c->newer;
    else e->oldest = c->newer;
    c->stranger = false;
    e->strangers--;
    e->answered -= c->answered;
}

/* Dialling: when to try next, and where: the next address at once, after the last one a pause. */
static void netchan__schedule_dial(netchan__endpoint *e, uint64_t now) {
    netchan__hub *h = &e->hub;
    netchan__soon(e);
    if (++e->tried >= h->addresses && h->session && h->session->refused && !h->session->wire)
        netchan__end_session(h->session, "no address leads to who knows the session");
    if (++e->which < h->addresses) return;
    e->which = 0;
    uint64_t wait = (uint64_t)NETCHAN__BACKOFF_MIN_MS << (e->failures < 7 ? e->failures : 7);
    uint64_t most = h->session && h->options.resume_ms > 0 ? (uint64_t)h->options.resume_ms / 16 : UINT64_MAX;
    if (most > NETCHAN__BACKOFF_MAX_MS) most = NETCHAN__BACKOFF_MAX_MS;
    if (wait > most) wait = most; /* who waits for a link has several tries */
    e->failures++;
    wait *= 1000000u;
    e->next_dial = now + wait / 2 + netchan__random() % (wait + 1); /* jitter keeps many diallers from coming at once */
}

/* Dialling: a link that served breaks; the same address is tried again, at once if it was of use. */
static void netchan__redial(netchan__endpoint *e, const netchan__conn *c, uint64_t now) {
    e->tried = 0;
    e->next_dial = c->wire.moved ? now : now + netchan__random() % (NETCHAN__BACKOFF_MIN_MS * (uint64_t)1000000);
}

/* Dialling: another one of several shared keys may be the right one. */
static bool netchan__try_next_key(netchan__endpoint *e) {
    size_t count = e->tls.key_count;
    if (count < 2) return false;
    e->key = (e->key + 1) % count;
    return ++e->keys_tried % count != 0;
}

/* Who was not greeted goes: why is told. */
static void netchan__turn_off(netchan__conn *c, const char *reason, bool fatal) {
    netchan__endpoint *e = c->endpoint;
    netchan__hub *h = &e->hub;
    uint64_t now = netchan__now_ns();
    netchan__remove_stranger(c);
    if (!h->dials) {
        if (c->state != NETCHAN__SPEAKING || c->stream.untrusted) netchan__note_failure(e, c->origin, now);
        netchan__reject(e, c->wire.address, reason, now);
        return;
    }
    netchan__log(h, 1, "%s: no connection with %s: %s", e->address, c->wire.address, reason);
    snprintf(e->failure_text, sizeof e->failure_text, "%s", reason);
    e->trial = NULL;
    if (fatal && netchan__try_next_key(e)) {
        e->next_dial = 0;
        netchan__soon(e);
        return;
    }
    if (fatal && !h->was_up) e->failure = NETCHAN_EAUTH;
    netchan__schedule_dial(e, now);
}

/* The connection is over; reason is the end of a sentence about the other side. fatal: trying again is no use. */
static void netchan__close_conn(netchan__conn *c, const char *reason, bool fatal) {
    netchan__endpoint *e = c->endpoint;
    uint64_t now = netchan__now_ns();
    bool serves = c->wire.session != NULL, lost = c->wire.up && !serves && e->hub.dials && !e->hub.session;
    if (c->state == NETCHAN__SPEAKING) netchan__wire_down(&c->wire, now, reason);
    if (c->stranger) netchan__turn_off(c, reason, fatal);
    else if (lost) netchan__schedule_dial(e, now);
    else if (serves && e->hub.dials) netchan__redial(e, c, now);
    e->conns--;
    netchan__soon(e); /* its session waits from now on */
    NETCHAN__UNLINK(netchan__io.conns, c, prev, next);
    netchan__alarm_remove(&c->alarm);
    netchan__poll_remove_conn(c);
    close(c->fd);
    pthread_mutex_lock(&netchan__tls_lock);
    netchan__stream_free(&c->stream);
    pthread_mutex_unlock(&netchan__tls_lock);
    NETCHAN_FREE(c);
}

/* A new connection over fd, which is closed on failure. */
static netchan__conn *netchan__open_conn(netchan__endpoint *e, int fd, const netchan__address *a,
                                         enum netchan__conn_state state) {
    netchan__conn *c = netchan__poll_room() ? (netchan__conn *)netchan__alloc(sizeof *c) : NULL;
    pthread_mutex_lock(&netchan__tls_lock);
    const char *name = e->peer_name[0] ? e->peer_name : e->hub.dials ? a->host : NULL;
    int error = c ? netchan__stream_start(&c->stream, &e->tls, e->key, name) : MBEDTLS_ERR_SSL_ALLOC_FAILED;
    if (!error && !netchan__alarm_add(&c->alarm, c, NULL)) error = MBEDTLS_ERR_SSL_ALLOC_FAILED;
    if (error && c) netchan__stream_free(&c->stream);
    pthread_mutex_unlock(&netchan__tls_lock);
    if (error) {
        netchan__log(&e->hub, 0, "%s: out of memory for a connection", e->address);
        NETCHAN_FREE(c);
        close(fd);
        return NULL;
    }
    netchan__prepare_socket(fd);
    netchan__print_address(a, c->wire.address, sizeof c->wire.address);
    c->wire.owner = c;
    c->endpoint = e;
    c->fd = c->stream.fd = fd;
    c->state = state;
    c->deadline = netchan__after(netchan__now_ns(), NETCHAN__HANDSHAKE_MS);
    c->origin = netchan__origin_of(a);
    NETCHAN__LINK(netchan__io.conns, c, prev, next);
    netchan__add_stranger(c);
    e->conns++;
    netchan__poll_add_conn(c);
    netchan__poll_conn(c);
    netchan__alarm_set(&c->alarm, c->deadline);
    return c;
}

static void netchan__dial_now(netchan__endpoint *e, uint64_t now) {
    netchan__address *a = &e->addresses[e->which];
    int fd = netchan__open_socket(a);
    int connected = fd < 0 ? -1 : connect(fd, (struct sockaddr *)(void *)&a->storage, a->size);
    if (fd < 0 || (connected < 0 && errno != EINPROGRESS && errno != EINTR)) {
        snprintf(e->failure_text, sizeof e->failure_text, "%s", netchan__os_error(errno));
        if (fd >= 0) close(fd);
        netchan__schedule_dial(e, now);
        return;
    }
    e->trial = netchan__open_conn(e, fd, a, NETCHAN__CONNECTING);
    if (!e->trial) netchan__schedule_dial(e, now);
}

/* When one kind of strangers has more than half of the places, its oldest give way at the next tick (L1). */
static void netchan__give_way(netchan__endpoint *e, bool answered, uint64_t now) {
    size_t count = answered ? e->answered : e->strangers - e->answered;
    netchan__conn *c = count > NETCHAN__HANDSHAKES_MAX / 2 ? e->oldest : NULL;
    for (size_t over = c ? count - NETCHAN__HANDSHAKES_MAX / 2 : 0; c && over; c = c->newer) {
        if (c->answered != answered) continue;
        over--;
        if (c->closing || c->deadline <= now) continue;
        c->deadline = now;
        netchan__alarm_by(&c->alarm, now);
    }
}

/* Ends a connection of which nothing was read, without a trace in the kernel. */
static void netchan__slam(int fd) {
    struct linger now = {1, 0};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(fd);
}

/* Who came is let in, or turned away at the door. */
static void netchan__admit(netchan__endpoint *e, int fd, const netchan__address *a, uint64_t now) {
    const char *why = NULL;
    char address[80];
    if (netchan__under_pressure(e, now) &&
        netchan__bucket_full(*netchan__failures_of(netchan__origin_of(a)), now, NETCHAN__TRIES - 1, NETCHAN__TRY_MS))
        why = "too many handshakes from its address have failed";
    else if (!netchan__prepare_fd(fd)) why = "its socket cannot be used";
    if (!why) {
        netchan__open_conn(e, fd, a, NETCHAN__HANDSHAKING);
        return;
    }
    netchan__print_address(a, address, sizeof address);
    netchan__slam(fd);
    netchan__reject(e, address, why, now);
}

/* The stranger of one kind that gives way first, or NULL. */
static const netchan__conn *netchan__first_to_go(const netchan__endpoint *e, bool answered) {
    const netchan__conn *c = e->oldest;
    while (c && (c->answered != answered || c->closing)) c = c->newer;
    return c;
}

/* May another one come? Not when it would take the place of who has spoken and was not heard yet. */
static bool netchan__has_place(const netchan__endpoint *e) {
    char byte;
    const netchan__conn *c = netchan__first_to_go(e, false);
    if (!c || e->strangers - e->answered < NETCHAN__HANDSHAKES_MAX / 2) return true;
    return recv(c->fd, &byte, 1, MSG_PEEK) <= 0;
}

/* May another one be answered? */
static bool netchan__may_answer(const netchan__endpoint *e, uint64_t now) {
    const netchan__conn *c = netchan__first_to_go(e, true);
    return !c || e->answered < NETCHAN__HANDSHAKES_MAX / 2 ||
           now >= netchan__after(c->answered_at, NETCHAN__GRACE_MS);
}

static void netchan__accept_all(netchan__endpoint *e) {
    uint64_t now = netchan__now_ns();
    for (int i = 0; i < NETCHAN__ACCEPTS && netchan__has_place(e); i++) { /* then the others have their turn */
        netchan__address a;
        a.size = sizeof a.storage;
        int fd = netchan__own_fd(accept4(e->fd, (struct sockaddr *)(void *)&a.storage, &a.size, NETCHAN__CLOEXEC));
        if (fd >= 0) {
            netchan__admit(e, fd, &a, now);
            netchan__give_way(e, false, now);
            continue;
        }
        if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR || errno == ECONNABORTED) return;
        netchan__log(&e->hub, 0, "%s: cannot accept: %s", e->address, netchan__os_error(errno));
        e->next_accept = netchan__after(now, NETCHAN__ACCEPT_PAUSE_MS);
        netchan__alarm_by(&e->alarm, e->next_accept);
        return;
    }
}

/* TLS is done: who is it, and is it welcome? Caller holds no lock. */
static void netchan__identify(netchan__conn *c) {
    netchan__stream *s = &c->stream;
    netchan__wire *w = &c->wire;
    const netchan_options *o = &c->endpoint->hub.options;
    memcpy(w->binding, s->binding, sizeof w->binding);
    memcpy(w->identity, s->seen, sizeof w->identity);
    if (s->key) memcpy(w->identity, s->key->id, sizeof s->key->id);
    netchan__print_identity(s, w->identity_text);
    memcpy(w->name, s->name, sizeof w->name);
    netchan_identity who = {w->identity_text, w->name, w->address, c->endpoint->hub.dials};
    if (s->untrusted || !o->allow || o->allow(o->allow_arg, &who)) return;
    s->untrusted = true;
    snprintf(s->reason, sizeof s->reason, "its identity \"%s\" is refused by options.allow", w->identity_text);
}

/* The greeting begins. */
static void netchan__start_wire(netchan__conn *c, uint64_t now) {
    char told[sizeof c->stream.reason];
    c->state = NETCHAN__SPEAKING;
    if (!c->stream.untrusted) {
        netchan__wire_start(&c->wire, &c->endpoint->hub, now);
        return;
    }
    netchan__tell_reason(&c->stream, told, sizeof told);
    netchan__turn_away(&c->wire, &c->endpoint->hub, c->stream.reason, told);
}

/* The greeting may be over. */
static void netchan__note_up(netchan__conn *c, uint64_t now) {
    netchan__endpoint *e = c->endpoint;
    if (!c->stranger || !c->wire.up) return;
    netchan__remove_stranger(c);
    if (!e->hub.dials) netchan__io.earned += NETCHAN__EARN_MS * (uint64_t)1000000;
    if (netchan__io.earned > NETCHAN__EARN_MOST_MS * (uint64_t)1000000)
        netchan__io.earned = NETCHAN__EARN_MOST_MS * (uint64_t)1000000;
    e->trial = NULL;
    e->failures = 0;
    e->tried = e->keys_tried = 0;
    netchan__soon(e); /* it may wait for that */
    netchan__alarm_set(&c->alarm, netchan__wire_tick(&c->wire, now)); /* its heartbeat begins */
}

NETCHAN__SMALL_END

/* ---- Bytes. Caller runs the loop, or sends beside it, and does not hold netchan__net_lock. ---- */

/* Encrypts some of what there is to send and gives it to the socket, as far as that goes; then the others have their
 * turn. Returns false when the connection is broken. */
static bool netchan__conn_write(netchan__conn *c) {
    c->more = false;
    for (int i = 0; i < NETCHAN__RECORDS_OUT; i++) {
        if (!netchan__flush_fd(c->fd, &c->stream.out)) return false;
        if (c->state != NETCHAN__SPEAKING || netchan__buf_size(&c->stream.out) >= NETCHAN__CIPHER_HIGH) return true;
        const uint8_t *record = netchan__io.plain;
        pthread_mutex_lock(&netchan__net_lock);
        size_t size = netchan__wire_output(&c->wire, netchan__io.plain, &record);
        netchan__io_release();
        if (!size) return true;
        pthread_mutex_lock(&netchan__tls_lock);
        int error = netchan__stream_write(&c->stream, record, size);
        pthread_mutex_unlock(&netchan__tls_lock);
        if (record != netchan__io.plain) {
            pthread_mutex_lock(&netchan__net_lock);
            netchan__wire_encrypted(&c->wire);
            pthread_mutex_unlock(&netchan__net_lock);
        }
        if (error) return false;
    }
    c->more = true;
    return true;
}

/* Takes a step of the handshake. Returns 0 when it is done, or an error of mbedTLS. */
static int netchan__conn_shake(netchan__conn *c) {
    pthread_mutex_lock(&netchan__tls_lock);
    int e = netchan__stream_handshake(&c->stream);
    if (e == 0 && psa_generate_random(c->wire.fresh, sizeof c->wire.fresh) != PSA_SUCCESS)
        e = MBEDTLS_ERR_SSL_INTERNAL_ERROR;
    pthread_mutex_unlock(&netchan__tls_lock);
    if (e) return e;
    netchan__identify(c);
    uint64_t now = netchan__now_ns();
    pthread_mutex_lock(&netchan__net_lock);
    netchan__start_wire(c, now);
    netchan__io_release();
    return 0;
}

/* Decrypts records into netchan__io.plain, as many as it has room for. Returns as netchan__stream_read() at last. */
static int netchan__decrypt_records(netchan__conn *c, size_t sizes[NETCHAN__RECORDS], size_t *count) {
    size_t used = 0;
    int n = 0;
    *count = 0;
    pthread_mutex_lock(&netchan__tls_lock);
    while (*count < NETCHAN__RECORDS && sizeof netchan__io.plain - used >= NETCHAN__FRAME_MAX) {
        n = netchan__stream_read(&c->stream, netchan__io.plain + used, NETCHAN__FRAME_MAX);
        if (n <= 0) break;
        sizes[(*count)++] = (size_t)n;
        used += (size_t)n;
        if (c->stranger) break; /* whether to go on is found in the greeting */
    }
    pthread_mutex_unlock(&netchan__tls_lock);
    return n;
}

/* Works off what was decrypted. Returns whether the link is over. */
static bool netchan__conn_input(netchan__conn *c, const size_t *sizes, size_t count) {
    const uint8_t *at = netchan__io.plain;
    uint64_t now = netchan__now_ns();
    pthread_mutex_lock(&netchan__net_lock);
    for (size_t i = 0; i < count && !netchan__wire_over(&c->wire); i++) {
        netchan__wire_input(&c->wire, now, at, sizes[i]);
        netchan__note_up(c, now);
        at += sizes[i];
    }
    if (c->wire.ack_at) netchan__alarm_by(&c->alarm, c->wire.ack_at);
    if (c->wire.session) netchan__alarm_by(&c->alarm, netchan__check_early(c->wire.session, now));
    bool over = netchan__wire_over(&c->wire) != NULL;
    netchan__io_release();
    return over;
}

/* Decrypts what was received. Returns 0, or mbedTLS's error; for a failure of the link look at the wire. */
static int netchan__conn_decrypt(netchan__conn *c) {
    size_t sizes[NETCHAN__RECORDS], count;
    if (c->state == NETCHAN__HANDSHAKING) {
        int e = netchan__conn_shake(c);
        if (e) return e == MBEDTLS_ERR_SSL_WANT_READ ? 0 : e;
        if (c->stream.untrusted) return 0;
    }
    for (;;) {
        int n = netchan__decrypt_records(c, sizes, &count);
        if (count && netchan__conn_input(c, sizes, count)) return 0;
        if (c->stream.in_left) netchan__io_wake();
        if (n == MBEDTLS_ERR_SSL_WANT_READ) return 0;
        if (n < 0) return n;
    }
}

/* What is to be sent to a stranger is the answer to a whole ClientHello. */
static void netchan__note_answer(netchan__conn *c) {
    if (c->answered || !c->stranger || c->endpoint->hub.dials || !netchan__buf_size(&c->stream.out)) return;
    pthread_mutex_lock(&netchan__net_lock);
    c->answered = true;
    c->answered_at = netchan__now_ns();
    c->endpoint->answered++;
    netchan__give_way(c->endpoint, true, netchan__now_ns());
    pthread_mutex_unlock(&netchan__net_lock);
}

/* The socket is readable. Returns false when the connection is over; reason and fatal tell why. */
static bool netchan__conn_read(netchan__conn *c, bool *fatal) {
    for (int i = 0; i < 4; i++) { /* then the others have their turn */
        ssize_t n = recv(c->fd, netchan__io.cipher, sizeof netchan__io.cipher, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return true;
        if (n <= 0) {
            snprintf(c->stream.reason, sizeof c->stream.reason, "%s",
                     n == 0 ? "it closed the connection" : netchan__os_error(errno));
            return false;
        }
        c->stream.in = netchan__io.cipher;
        c->stream.in_left = (size_t)n;
        int error = netchan__conn_decrypt(c);
        netchan__note_answer(c);
        if (error) {
            *fatal = netchan__explain(&c->stream, error);
            netchan__flush_fd(c->fd, &c->stream.out); /* the alert, so that the other side learns why */
            return false;
        }
        pthread_mutex_lock(&netchan__net_lock);
        bool over = netchan__wire_over(&c->wire) != NULL;
        pthread_mutex_unlock(&netchan__net_lock);
        if (over || (size_t)n < sizeof netchan__io.cipher) return true;
        netchan__io_wake(); /* there is more to come first */
    }
    return true;
}

static bool netchan__conn_connected(netchan__conn *c) {
    int error = 0;
    socklen_t size = sizeof error;
    if (getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size) || error) {
        snprintf(c->stream.reason, sizeof c->stream.reason, "%s", netchan__os_error(error ? error : errno));
        return false;
    }
    c->state = NETCHAN__HANDSHAKING;
    return true;
}

/* A link that has failed is closed; with last words, when they have left. Caller holds netchan__net_lock. Returns
 * whether it was. */
static bool netchan__close_failed(netchan__conn *c, uint64_t now) {
    netchan__wire *w = &c->wire;
    if (!w->failure) return false;
    if (!c->closing) {
        c->closing = true;
        c->deadline = netchan__after(now, NETCHAN__FLUSH_MS);
        snprintf(c->stream.reason, sizeof c->stream.reason, "%s", w->failure);
    }
    bool flushed = !w->flush || (netchan__wire_idle(w) && !netchan__buf_size(&c->stream.out));
    if (!flushed && now < c->deadline) {
        netchan__alarm_by(&c->alarm, c->deadline);
        return false;
    }
    netchan__close_conn(c, c->stream.reason, w->final);
    return true;
}

/* Is what is pending values, credit and answers that may wait for others? */
static bool netchan__is_burst(void) { return !netchan__net.hurry; }

/* poll() has news of a connection, or there is something to send. Caller holds no lock. */
static void netchan__conn_ready(netchan__conn *c, short events) {
    bool fatal = false, alive = true;
    if (c->state == NETCHAN__CONNECTING) {
        if (!(events & (POLLOUT | POLLERR | POLLHUP))) return;
        alive = netchan__conn_connected(c);
        if (alive && netchan__conn_decrypt(c)) alive = false; /* begins the handshake */
    } else if (!c->closing && !c->wire.paused && events & (POLLIN | POLLERR | POLLHUP))
        alive = netchan__conn_read(c, &fatal);
    pthread_mutex_lock(&netchan__net_lock);
    netchan__session *s = c->wire.session;
    if (s && s->peer.breach) netchan__end_session(s, s->peer.breach);
    else if (s) netchan__check_farewell(s);
    s = c->wire.session; /* it may have ended */
    bool waits = alive && events == POLLIN && s && s->is_pending && netchan__is_burst(); /* for what goes with it */
    netchan__io_release();
    if (alive && !waits && !netchan__conn_write(c)) {
        alive = false;
        snprintf(c->stream.reason, sizeof c->stream.reason, "the connection broke");
    }
    pthread_mutex_lock(&netchan__net_lock);
    if (netchan__close_failed(c, netchan__now_ns())) { /* it is gone */
    } else if (!alive) netchan__close_conn(c, c->stream.reason, fatal);
    else netchan__poll_conn(c);
    netchan__io_release();
}

/* ---- Time. Caller holds netchan__net_lock. ---- */

static void netchan__tick_conn(netchan__conn *c, uint64_t now) {
    if (c->wire.failure && c->wire.flush && !netchan__wire_idle(&c->wire)) { /* last words */
        netchan__io_release();
        netchan__conn_ready(c, 0);
        pthread_mutex_lock(&netchan__net_lock);
        return;
    }
    if (netchan__close_failed(c, now) || c->closing) return;
    if (!c->stranger) {
        netchan__alarm_set(&c->alarm, netchan__wire_tick(&c->wire, now));
        netchan__close_failed(c, now);
    } else if (c->endpoint->stopping) netchan__close_conn(c, "this side hung up", false);
    else if (now >= c->deadline)
        netchan__close_conn(c,
                            c->state == NETCHAN__CONNECTING ? "it did not answer in time"
                                                            : "it did not finish the handshake in time",
                            false);
    else netchan__alarm_by(&c->alarm, c->deadline);
}

static void netchan__tick_endpoint(netchan__endpoint *e, uint64_t now) {
    bool unseen = !e->hub.dials && !e->slot;
    if (unseen && netchan__poll_room()) {
        netchan__poll_add(e->fd, NULL, e);
        e->next_listener = netchan__io.listeners;
        netchan__io.listeners = e;
    } else if (unseen) netchan__alarm_by(&e->alarm, now + (uint64_t)e->hub.options.ping_ms * 1000000u);
    if (e->stopping) netchan__hub_stop(&e->hub); /* a greeting may have ended meanwhile */
    netchan__alarm_by(&e->alarm, netchan__hub_tick(&e->hub, now));
    netchan__tell_rejected(e, now);
    if (e->next_accept && now >= e->next_accept) e->next_accept = 0;
    if (e->next_accept) netchan__alarm_by(&e->alarm, e->next_accept);
    if (!netchan__hub_wants_wire(&e->hub) || e->stopping || e->trial || e->failure) return;
    if (now >= e->next_dial) netchan__dial_now(e, now);
    else netchan__alarm_by(&e->alarm, e->next_dial);
}

static void netchan__remove_listener(netchan__endpoint *e) {
    netchan__endpoint **at = &netchan__io.listeners;
    if (!e->slot) return;
    while (*at != e) at = &(*at)->next_listener;
    *at = e->next_listener;
    netchan__poll_remove(e->slot);
    e->slot = 0;
}

/* The endpoint has stopped and its connections are closed. */
static void netchan__remove_endpoint(netchan__endpoint *e) {
    netchan__endpoint **at = &netchan__io.soon; /* closing its last connection may have put it there again */
    while (*at && *at != e) at = &(*at)->next_soon;
    if (*at) *at = e->next_soon;
    netchan__remove_listener(e);
    netchan__alarm_remove(&e->alarm);
    NETCHAN__UNLINK(netchan__io.endpoints, e, prev, next);
    e->gone = true;
    pthread_cond_broadcast(&e->changed);
}

/* Looks at one endpoint that has changed, begins or ends. */
static void netchan__look_at(netchan__endpoint *e, uint64_t now) {
    netchan__conn *older;
    for (netchan__conn *c = e->stopping ? e->newest : NULL; c; c = older) {
        older = c->older;
        netchan__tick_conn(c, now);
    }
    if (e->stopping && !e->conns && netchan__logs) netchan__soon(e); /* its log is written first */
    else if (e->stopping && !e->conns) netchan__remove_endpoint(e);
    else netchan__tick_endpoint(e, now);
    if (netchan__net.watchers && !e->gone) pthread_cond_broadcast(&e->changed);
}

static void netchan__look_at_some(uint64_t now) {
    netchan__endpoint *e = netchan__io.soon, *next;
    netchan__io.soon = NULL;
    for (; e; e = next) {
        next = e->next_soon;
        e->is_soon = false;
        netchan__look_at(e, now);
    }
}

/* Looks at all, as something may be wrong with any of them. */
static void netchan__tick_all(uint64_t now) {
    netchan__net.breached = false;
    for (netchan__endpoint *e = netchan__io.endpoints; e; e = e->next) netchan__tick_endpoint(e, now);
    netchan__conn *next_conn;
    for (netchan__conn *c = netchan__io.conns; c; c = next_conn) {
        next_conn = c->next;
        netchan__poll_conn(c);
        netchan__tick_conn(c, now);
    }
}

/* Looks at what is due. */
static void netchan__tick(uint64_t now) {
    if (now >= netchan__io.next_check) {
        netchan__check_claims(now);
        netchan__io.next_check = netchan__after(now, NETCHAN__CHECK_MS);
    }
    if (netchan__net.breached) netchan__tick_all(now);
    for (size_t most = netchan__io.alarm_count; most && netchan__next_alarm() <= now; most--) {
        netchan__alarm *a = netchan__io.alarms[1];
        netchan__alarm_set(a, UINT64_MAX);
        if (a->endpoint) netchan__tick_endpoint(a->endpoint, now);
        else netchan__tick_conn(a->conn, now);
    }
}

/* ---- Who sends, and who runs the loop. Caller holds netchan__net_lock. ---- */

/* Is there something for the connection to do? It may have been done since it was noted. */
static bool netchan__has_output(const netchan__session *s) {
    const netchan__wire *w = s->wire;
    if (!w || w->paused) return false;
    bool speaks = (netchan__unsent(s) || s->parcels) && s->given < NETCHAN_WINDOW;
    return speaks || s->peer.owes || w->ack_now || netchan__buf_size(&w->control);
}

/* Takes the first session off the list. */
static netchan__session *netchan__drop_pending(void) {
    netchan__session *s = netchan__net.pending;
    netchan__net.pending = s->next_pending;
    s->is_pending = false;
    return s;
}

/* Whether something is pending. */
static bool netchan__is_pending(void) {
    netchan__session *s;
    while ((s = netchan__net.pending) && !netchan__has_output(s)) netchan__drop_pending();
    if (!s) netchan__net.hurry = netchan__net.deferred = false;
    return s != NULL;
}

/* Takes the connection of a session that has something to send. NULL: none is left. */
static netchan__conn *netchan__next_pending(void) {
    if (!netchan__is_pending()) return NULL;
    return (netchan__conn *)netchan__drop_pending()->wire->owner;
}

/* Gives the sessions that have something new to send to their connections. */
static void netchan__send_pending(uint64_t now) {
    for (netchan__conn *c; (c = netchan__next_pending());) {
        netchan__io.pushed = now;
        netchan__io_release();
        netchan__conn_ready(c, 0);
        pthread_mutex_lock(&netchan__net_lock);
    }
}

/* Has something been sent just now? */
static bool netchan__sent_lately(uint64_t now) {
    return now < netchan__io.pushed + NETCHAN__BURST_US * (uint64_t)1000;
}

/* Sends what is pending beside the loop (R1), or leaves it to that. Returns whether it gave the lock back meanwhile. */
static bool netchan__push_out(void) {
    if (!netchan__net.alive || netchan__net.pushing || (netchan__net.runner && !netchan__net.polling)) return false;
    if (!netchan__is_pending()) return false;
    if (netchan__is_burst() && (netchan__net.deferred || netchan__net.lent || !netchan__unsent(netchan__net.pending) ||
                                netchan__sent_lately(netchan__now_ns()))) {
        netchan__net.wake |= netchan__net.polling;
        netchan__net.deferred = true;
        netchan__net.runs++;
        return false;
    }
    netchan__net.runs++;
    netchan__net.pushing = true;
    for (netchan__conn *c; (c = netchan__next_pending());) {
        pthread_mutex_unlock(&netchan__net_lock);
        bool alive = netchan__conn_write(c), rest = c->more || netchan__buf_size(&c->stream.out);
        pthread_mutex_lock(&netchan__net_lock);
        if (!alive) netchan__wire_fail(&c->wire, "the connection broke");
        if (!rest || !c->wire.session) continue;
        netchan__mark_pending(c->wire.session, true); /* the loop waits until the socket takes more */
        break;
    }
    netchan__net.wake |= netchan__is_pending();
    netchan__net.pushing = false;
    netchan__io.pushed = netchan__now_ns();
    if (netchan__net.held_up) pthread_cond_broadcast(&netchan__net.turn);
    return true;
}

/* ---- The loop. ---- */

/* Who hangs up leaves strangers to its successor, unless one of them may be a peer that comes back. */
static bool netchan__accepts(netchan__endpoint *e, uint64_t now) {
    const netchan__hub *h = &e->hub;
    bool open = !e->stopping && !e->next_accept && (!h->hanging_up || h->peers);
    return open && !(netchan__io.resting && netchan__under_pressure(e, now));
}

/* Strangers may have to wait, and who listens changes its mind. *until: the latest time to look again. */
static void netchan__poll_strangers(uint64_t now, uint64_t *until) {
    bool rests = now < netchan__io.strangers_from, changes = rests != netchan__io.resting;
    netchan__io.resting = rests;
    if (rests && netchan__io.strangers_from < *until) *until = netchan__io.strangers_from;
    for (netchan__endpoint *e = netchan__io.listeners; e; e = e->next_listener) {
        netchan__io.polls[e->slot].fd = netchan__accepts(e, now) ? e->fd : -1;
        for (netchan__conn *c = changes ? e->newest : NULL; c; c = c->older) netchan__poll_conn(c);
    }
}

static void netchan__drain_wake(void) {
    uint8_t bytes[64];
    while (read(netchan__io.wake_read, bytes, sizeof bytes) == sizeof bytes) continue;
}

/* What this thread has used of a processor: on a busy machine that is less than the time that has gone by. */
static uint64_t netchan__cpu_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* A peer, or somebody whom this side dialled. */
static bool netchan__is_known(const netchan__conn *c) { return c && (!c->stranger || c->endpoint->hub.dials); }

/* There may be news of a connection. */
static void netchan__serve_conn(netchan__conn *c) {
    short events = c->news;
    c->news = 0;
    if (!events) return;
    netchan__io_release();
    netchan__conn_ready(c, events);
    pthread_mutex_lock(&netchan__net_lock);
}

/* The strangers of one listener, see L2: those that were answered, or else the others and who comes. */
static void netchan__serve_strangers(netchan__endpoint *e, bool answered, uint64_t until) {
    netchan__conn *older;
    if (!answered && netchan__io.polls[e->slot].revents && netchan__now_ns() < until) netchan__accept_all(e);
    for (netchan__conn *c = e->newest; c; c = older) {
        older = c->older; /* closing a connection removes no other */
        if (!answered && !netchan__may_answer(e, netchan__now_ns())) {
            netchan__io.strangers_from = netchan__now_ns() + NETCHAN__REST_US * (uint64_t)1000;
            break;
        }
        if (c->answered == answered && c->news && netchan__now_ns() < until)
            netchan__serve_conn(c);
    }
}

/* Then, after peers. */
static void netchan__serve_listeners(void) {
    bool pressed = false;
    uint64_t now = netchan__now_ns(), used;
    for (netchan__endpoint *e = netchan__io.listeners; e; e = e->next_listener)
        pressed |= netchan__under_pressure(e, now);
    used = netchan__cpu_ns();
    for (int pass = 0; pass < 2; pass++) {
        uint64_t until = now + (pressed ? NETCHAN__PRESSED_US : NETCHAN__SLICE_US) * (uint64_t)1000;
        for (netchan__endpoint *e = netchan__io.listeners; e; e = e->next_listener)
            netchan__serve_strangers(e, pass == 0, until);
        now = netchan__now_ns();
    }
    for (netchan__endpoint *e = netchan__io.listeners; e; e = e->next_listener) netchan__io.polls[e->slot].revents = 0;
    used = netchan__cpu_ns() - used;
    uint64_t paid = used < netchan__io.earned ? used : netchan__io.earned, rest = 3 * (used - paid);
    netchan__io.earned -= paid;
    if (netchan__io.worked < now) netchan__io.worked = now;
    netchan__io.worked += 4 * (used - paid);
    if (!pressed || !rest) return;
    if (rest < NETCHAN__REST_US * (uint64_t)1000) rest = NETCHAN__REST_US * (uint64_t)1000;
    netchan__io.strangers_from = now + rest;
}

/* There is more to do before those are woken who were waited for so far. */
static void netchan__wake_between(void) {
    if (!netchan__to_wake) return;
    netchan__io_unlock();
    pthread_mutex_lock(&netchan__net_lock);
}

/* There is news of a connection. A caller serves peers only. Returns whether it waits for the I/O thread. */
static bool netchan__serve_news(netchan__conn *c, short events, bool caller) {
    bool serves = netchan__is_known(c) && !(caller && c->stranger);
    c->news = events;
    if (serves) netchan__serve_conn(c);
    return !serves;
}

/* The same of some of those in the set. */
static bool netchan__serve_set(bool caller) {
    bool others = false;
#if defined(__linux__)
    struct epoll_event news[NETCHAN__NEWS];
    int count = epoll_wait(netchan__io.set, news, NETCHAN__NEWS, 0);
    for (int i = 0; i < count; i++) {
        if (i) netchan__wake_between();
        others |= netchan__serve_news((netchan__conn *)news[i].data.ptr, (short)news[i].events, caller);
    }
#else
    (void)caller;
#endif
    return others;
}

/* poll() has news of `ready` of those that it looks at. Returns whether there are others than a caller serves. */
static bool netchan__serve_polls(int ready, bool caller) {
    bool others = false, of_set = netchan__io.set >= 0 && netchan__io.polls[1].revents;
    if (netchan__io.polls[0].revents) netchan__drain_wake();
    ready -= (netchan__io.polls[0].revents != 0) + of_set;
    for (size_t i = 1 + (netchan__io.set >= 0); i < netchan__io.poll_count && ready > 0; i++) {
        short events = netchan__io.polls[i].revents;
        if (!events) continue;
        if (--ready) netchan__wake_between();
        netchan__conn *c = netchan__io.watched[i].conn;
        others |= !c || netchan__serve_news(c, events, caller);
    }
    if (of_set) netchan__wake_between();
    if (of_set) others |= netchan__serve_set(caller);
    if (others && !caller) netchan__serve_listeners();
    return others;
}

/* How long poll() may wait. */
static int netchan__poll_ms(uint64_t now, uint64_t until) {
    if (until == UINT64_MAX) return -1;
    if (until <= now) return 0;
    return until - now > 60000000000u ? 60000 : (int)((until - now) / 1000000u) + 1;
}

/* Somebody may be sending beside the loop (R1). */
static void netchan__await_push(void) {
    while (netchan__net.pushing) {
        netchan__net.held_up = true;
        pthread_cond_wait(&netchan__net.turn, &netchan__net_lock);
    }
    netchan__net.held_up = false;
}

/* Waits for news in poll() and works them off. Returns false when something is for the I/O thread. */
static bool netchan__poll(uint64_t now, uint64_t until, bool caller) {
    bool sleeps = now >= netchan__io.spin_until;
    if (netchan__io.listeners) netchan__poll_strangers(now, &until);
    if (netchan__next_alarm() < until) until = netchan__next_alarm();
    netchan__io.misses += sleeps;
    netchan__net.polling = sleeps;
    pthread_mutex_unlock(&netchan__net_lock);
    netchan__io_wake();
    if (!sleeps) sched_yield(); /* for who sends, or is to send, on the same core */
    int ready = poll(netchan__io.polls, (nfds_t)netchan__io.poll_count, sleeps ? netchan__poll_ms(now, until) : 0);
    pthread_mutex_lock(&netchan__net_lock);
    netchan__net.polling = false;
    netchan__await_push();
    if (ready <= 0) return true;
    bool others = netchan__serve_polls(ready, caller);
    if (!sleeps) netchan__io.misses = 0;
    if (netchan__io.misses < 4 || netchan__io.misses % 16 == 0)
        netchan__io.spin_until = netchan__now_ns() + NETCHAN__SPIN_US * (uint64_t)1000;
    return !(others && caller);
}

/* Is there something to look at? */
static bool netchan__is_busy(void) { return netchan__net.breached || netchan__io.soon; }

/* One round of the loop, until news or this time. Returns false when a caller is to leave what there is to the I/O
 * thread. */
static bool netchan__round(uint64_t until, bool caller) {
    netchan__await_push();
    uint64_t now = netchan__now_ns();
    if (caller && (netchan__logs || netchan__io.stop || now >= until)) return false;
    if (now >= netchan__next_alarm() || netchan__net.breached) netchan__tick(now);
    netchan__look_at_some(now);
    netchan__settle();
    bool burst = netchan__is_pending() && netchan__is_burst() && netchan__sent_lately(now);
    if (!burst) netchan__send_pending(now);
    netchan__net.deferred = burst;
    for (netchan__endpoint *e = netchan__net.watchers ? netchan__io.endpoints : NULL; e; e = e->next)
        pthread_cond_broadcast(&e->changed);
    if (!caller) netchan__write_logs();
    bool more = (!burst && netchan__is_pending()) || netchan__is_busy(); /* it gave the lock back */
    if (more || netchan__io.stop || netchan__net.wake) {
        netchan__net.wake = false;
        return true;
    }
    if (burst && !caller && !netchan__net.lent && !netchan__net.sleepers) return true; /* its senders go on */
    if (burst && netchan__io.spin_until <= now) netchan__io.spin_until = now + NETCHAN__BURST_US * (uint64_t)1000;
    return netchan__poll(now, until, caller);
}

/* Is there something that may not be left alone (R2)? */
static bool netchan__is_wanted(void) {
    return (!netchan__net.deferred && netchan__is_pending()) || netchan__is_busy() || netchan__logs;
}

/* Until it is the I/O thread's turn (R2). While callers come again and again it has a look from time to time. */
static void netchan__await_turn(void) {
    bool looks = false;
    while (netchan__net.runner || (netchan__net.lent && !looks && !netchan__io.stop)) {
        uint64_t runs = netchan__net.runs, until = netchan__now_ns() + NETCHAN__LEND_US * (uint64_t)1000;
        netchan__cond_wait(&netchan__net.turn, &netchan__net_lock, netchan__net.stands_by ? UINT64_MAX : until);
        bool used = runs != netchan__net.runs;
        netchan__net.stands_by = !used && netchan__net.runner;
        if (!used && !netchan__net.runner) netchan__net.lent = false;
        looks = used;
    }
    netchan__net.stands_by = false;
}

static void *netchan__io_main(void *arg) {
    pthread_mutex_lock(&netchan__net_lock);
    for (;;) {
        netchan__await_turn();
        if (netchan__io.stop) break;
        netchan__net.runner = NETCHAN__THREAD;
        netchan__net.finished = false;
        if (netchan__net.lent) netchan__io.spin_until = UINT64_MAX; /* it does not wait */
        netchan__round(UINT64_MAX, false);
        if (netchan__net.lent) netchan__io.spin_until = 0;
        netchan__net.runner = NETCHAN__NOBODY;
        netchan__net.lent |= netchan__net.finished || netchan__net.deferred;
        netchan__net.lent &= !netchan__net.sleepers && !netchan__is_wanted();
        netchan__wake_between();
    }
    netchan__io_unlock();
    return arg;
}

/* A caller that would sleep runs the loop, if nobody does, until the operation is over, the time is up or something is
 * for the I/O thread. */
static void netchan__run_loop(netchan__op *op, uint64_t deadline) {
    pthread_mutex_lock(&netchan__net_lock);
    bool over = netchan__state(op) == NETCHAN__DONE;
    if (!over && netchan__net.alive && !netchan__net.runner && !netchan__net.pushing && !netchan__net.sleepers) {
        netchan__net.runner = NETCHAN__CALLER;
        netchan__net.runs++;
        op->runs = true;
        while (!over && netchan__round(deadline, true)) over = netchan__state(op) == NETCHAN__DONE;
        op->runs = false;
        netchan__net.runner = NETCHAN__NOBODY;
        netchan__net.deferred = netchan__is_pending() && netchan__is_burst(); /* who waited for credit has more */
        netchan__net.wake = !over || netchan__is_wanted() || netchan__net.sleepers || netchan__net.stands_by ||
                            netchan__io.stop;
    }
    if (!over) {
        op->sleeps = true;
        netchan__net.sleepers++;
        netchan__net.wake |= netchan__net.lent;
    }
    netchan__unlock_one(&netchan__net_lock);
}

NETCHAN__SMALL_BEGIN

/* ---- Forks. The locks are held across fork(), so that the child has whole data; it forgets the parent's links, and
 * closes its copies of their connections, which would keep them alive. Listening sockets stay, for who hands them on.
 * ---- */

static void netchan__before_fork(void) {
    pthread_mutex_lock(&netchan__control_lock);
    pthread_mutex_lock(&netchan__net_lock);
    pthread_mutex_lock(&netchan__tls_lock);
    pthread_mutex_lock(&netchan__dead_lock);
}

static void netchan__after_fork(void) {
    pthread_mutex_unlock(&netchan__dead_lock);
    pthread_mutex_unlock(&netchan__tls_lock);
    pthread_mutex_unlock(&netchan__net_lock);
    pthread_mutex_unlock(&netchan__control_lock);
}

static void netchan__after_fork_in_child(void) {
    for (netchan__conn *c = netchan__io.conns; c; c = c->next) close(c->fd);
    if (netchan__io.links) {
        close(netchan__io.wake_read);
        close(netchan__net.wake_fd);
        if (netchan__io.set >= 0) close(netchan__io.set);
    }
    memset(&netchan__io, 0, sizeof netchan__io);
    memset(&netchan__net, 0, sizeof netchan__net);
    netchan__dead = NULL;
    netchan__logs = netchan__last_log = NULL;
#if MBEDTLS_VERSION_NUMBER < 0x03060600
    mbedtls_psa_crypto_free(); /* its random generator does not notice the fork */
#endif
    netchan__after_fork();
}

static void netchan__hold_over_forks(void) {
    pthread_atfork(netchan__before_fork, netchan__after_fork, netchan__after_fork_in_child);
}

static void netchan__io_free(void) {
    NETCHAN_FREE(netchan__io.polls);
    NETCHAN_FREE(netchan__io.watched);
    NETCHAN_FREE(netchan__io.alarms);
    if (netchan__io.set >= 0) close(netchan__io.set);
    netchan__io.polls = NULL;
    netchan__io.watched = NULL;
    netchan__io.alarms = NULL;
    netchan__io.poll_count = netchan__io.poll_room = netchan__io.alarm_room = 0;
    pthread_cond_destroy(&netchan__net.turn);
}

/* Starts the thread for the first link. Caller holds netchan__control_lock. */
static int netchan__io_start(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    int fds[2];
    sigset_t all, before;
    pthread_once(&once, netchan__hold_over_forks);
    if (netchan__io.links++) return NETCHAN_OK;
    if (!netchan__open_pipe(fds)) {
        netchan__io.links--;
        return netchan__fail(NETCHAN_ENET, "no pipe could be made: %s", netchan__os_error(errno));
    }
    netchan__net.wake_fd = fds[1];
    netchan__net.on_drained = netchan__lane_drained;
    netchan__io.wake_read = fds[0];
    netchan__io.stop = false;
    netchan__io.set = netchan__make_set();
    bool ready = netchan__prepare_fd(fds[0]) && netchan__prepare_fd(fds[1]) && netchan__poll_room();
    if (ready) netchan__poll_add(fds[0], NULL, NULL);
    if (ready && netchan__io.set >= 0) netchan__poll_add(netchan__io.set, NULL, NULL); /* the first room is for 16 */
    netchan__cond_init(&netchan__net.turn);
    sigfillset(&all); /* signals are the program's, not this thread's; but for those that a fault of its own raises */
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGBUS);
    sigdelset(&all, SIGFPE);
    sigdelset(&all, SIGILL);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int e = ready ? pthread_create(&netchan__io.thread, NULL, netchan__io_main, NULL) : ENOMEM;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    netchan__net.alive = !e;
    if (!e) return NETCHAN_OK;
    netchan__io.links--;
    netchan__io_free();
    close(fds[0]);
    close(fds[1]);
    return netchan__fail(NETCHAN_ENOMEM, "the thread could not be started: %s", netchan__os_error(e));
}

/* The endpoint begins, ends, or hangs up. */
static void netchan__wake_io(netchan__endpoint *e) {
    netchan__soon(e);
    netchan__net.wake = true;
}

/* Ends the thread after the last link. Caller holds netchan__control_lock. */
static void netchan__io_stop(void) {
    if (--netchan__io.links) return;
    pthread_mutex_lock(&netchan__net_lock);
    netchan__io.stop = netchan__net.wake = true;
    netchan__unlock_one(&netchan__net_lock);
    pthread_join(netchan__io.thread, NULL);
    pthread_mutex_lock(&netchan__net_lock);
    netchan__net.alive = false;
    netchan__unlock_one(&netchan__net_lock); /* buries what was left */
    close(netchan__io.wake_read);
    close(netchan__net.wake_fd);
    netchan__io_free();
    netchan__map_free(&netchan__net.waiters);
    netchan__map_free(&netchan__net.matches);
    netchan__map_free(&netchan__net.relays);
    netchan__map_free(&netchan__net.by_number);
}

/* ====================================================================================================================
 * [19] Links: listen, dial, hang up. Net.
 * ================================================================================================================== */

/* A fork is another process. Caller holds netchan__tls_lock; the first link waits for this, so that nobody reads while
 * it is written. */
static int netchan__name_process(void) {
    static unsigned named_after; /* so many forks, and one more */
    if (named_after == netchan__forks + 1) return NETCHAN_OK;
    if (psa_generate_random(netchan__net.process, sizeof netchan__net.process) != PSA_SUCCESS ||
        psa_generate_random((uint8_t *)&netchan__map_seed, sizeof netchan__map_seed) != PSA_SUCCESS)
        return netchan__fail(NETCHAN_ENET, "the system gives no randomness");
    named_after = netchan__forks + 1;
    return NETCHAN_OK;
}

static void netchan__free_endpoint(netchan__endpoint *e) {
    netchan__hub_free(&e->hub);
    if (e->fd >= 0) close(e->fd);
    pthread_mutex_lock(&netchan__tls_lock);
    netchan__tls_free(&e->tls);
    pthread_mutex_unlock(&netchan__tls_lock);
    pthread_cond_destroy(&e->changed);
    NETCHAN_FREE(e);
}

/* What options say about trust; nothing is kept of their texts. */
static int netchan__set_up_tls(netchan__endpoint *e) {
    netchan_options *o = &e->hub.options;
    netchan__texts texts;
    memset(&texts, 0, sizeof texts);
    int result = netchan__check_trust(o);
    if (result == NETCHAN_OK) result = netchan__read_texts(o, &texts);
    if (result == NETCHAN_OK) {
        pthread_mutex_lock(&netchan__tls_lock);
        result = netchan__tls_make(&e->tls, &texts, e->hub.dials);
        if (result == NETCHAN_OK) result = netchan__name_process();
        pthread_mutex_unlock(&netchan__tls_lock);
    }
    netchan__texts_free(&texts);
    if (o->peer_name) snprintf(e->peer_name, sizeof e->peer_name, "%s", o->peer_name);
    o->shared_key = o->pin = o->ca = o->cert = o->cert_key = o->peer_name = NULL;
    return result;
}

/* What listen and dial have in common: everything but the sockets. */
static netchan__endpoint *netchan__make_endpoint(const netchan_options *options, bool dials) {
    netchan__endpoint *e = (netchan__endpoint *)netchan__alloc(sizeof *e);
    if (!e) {
        netchan__fail_memory("opening a link");
        return NULL;
    }
    e->fd = e->hub.link.listen_fd = -1;
    e->hub.link.address = e->address;
    netchan__cond_init(&e->changed);
    int result = netchan__hub_make(&e->hub, options, dials);
    if (result == NETCHAN_OK) result = netchan__set_up_tls(e);
    if (result == NETCHAN_OK) return e;
    netchan__free_endpoint(e);
    return NULL;
}

/* Hands the endpoint to the I/O thread. */
static int netchan__start_endpoint(netchan__endpoint *e) {
    pthread_mutex_lock(&netchan__control_lock);
    int result = netchan__io_start();
    if (result == NETCHAN_OK) {
        pthread_mutex_lock(&netchan__net_lock);
        bool added = netchan__alarm_add(&e->alarm, NULL, e);
        if (added) {
            NETCHAN__LINK(netchan__io.endpoints, e, prev, next);
            netchan__wake_io(e);
        }
        netchan__unlock_one(&netchan__net_lock);
        if (!added) {
            netchan__io_stop();
            result = netchan__fail_memory("opening a link");
        }
    }
    pthread_mutex_unlock(&netchan__control_lock);
    return result;
}

/* Takes the endpoint back from the I/O thread, which closes its connections, and from who waits for a name. */
static void netchan__stop_endpoint(netchan__endpoint *e) {
    pthread_mutex_lock(&netchan__net_lock);
    e->stopping = true;
    netchan__hub_stop(&e->hub);
    netchan__wake_io(e);
    netchan__unlock_one(&netchan__net_lock);
    pthread_mutex_lock(&netchan__net_lock);
    while (!e->gone || e->hub.wanted) netchan__wait_net(&e->changed, UINT64_MAX);
    netchan__unlock_one(&netchan__net_lock);
    pthread_mutex_lock(&netchan__control_lock);
    netchan__io_stop();
    pthread_mutex_unlock(&netchan__control_lock);
}

NETCHANDEF netchan_link *netchan_listen(const char *address, const netchan_options *options) {
    netchan__address bound;
    netchan__endpoint *e = netchan__make_endpoint(options, false);
    if (!e) return NULL;
    bool inherits = e->hub.options.listen_fd != 0;
    int fd = inherits ? netchan__adopt_socket(e->hub.options.listen_fd, &bound)
                      : netchan__listen_socket(address, &bound);
    if (fd >= 0) netchan__print_address(&bound, e->address, sizeof e->address);
    e->fd = e->hub.link.listen_fd = fd;
    if (fd >= 0 && netchan__start_endpoint(e) == NETCHAN_OK) return &e->hub.link;
    if (inherits) e->fd = -1; /* it stays the caller's */
    netchan__free_endpoint(e);
    return NULL;
}

/* Waits for the first connection. */
static int netchan__wait_up(netchan__endpoint *e) {
    uint64_t deadline = netchan__deadline(e->hub.options.connect_ms);
    bool in_time = true;
    pthread_mutex_lock(&netchan__net_lock);
    while (!e->hub.was_up && !e->failure && in_time)
        in_time = netchan__wait_net(&e->changed, deadline);
    int result = e->hub.was_up ? NETCHAN_OK : e->failure ? e->failure : NETCHAN_ETIMEDOUT;
    if (e->failure && !e->hub.was_up)
        netchan__fail(result, "netchan_dial(\"%.200s\"): %.290s", e->address, e->failure_text);
    else if (result == NETCHAN_ETIMEDOUT)
        netchan__fail(result,
                      "netchan_dial(\"%.200s\"): no connection within %d ms; is a listener there? Last failure: %.250s",
                      e->address, e->hub.options.connect_ms, e->failure_text[0] ? e->failure_text : "no answer");
    netchan__unlock_one(&netchan__net_lock);
    return result;
}

NETCHANDEF netchan_link *netchan_dial(const char *address, const netchan_options *options) {
    netchan__endpoint *e = netchan__make_endpoint(options, true);
    if (!e) return NULL;
    int count = netchan__resolve_list(address, e->addresses, NETCHAN__ADDRESSES_MAX);
    if (count > 0) {
        snprintf(e->address, sizeof e->address, "%s", address);
        e->hub.addresses = (size_t)count;
        if (netchan__start_endpoint(e) == NETCHAN_OK) {
            if (netchan__wait_up(e) == NETCHAN_OK) return &e->hub.link;
            netchan__stop_endpoint(e);
        }
    }
    netchan__free_endpoint(e);
    return NULL;
}

/* Waits until everything is delivered or the time is up. */
static void netchan__drain(netchan__endpoint *e, uint64_t deadline) {
    bool in_time = true;
    while (!netchan__drained(&e->hub) && in_time) in_time = netchan__wait_net(&e->changed, deadline);
}

/* In the child of a fork. */
static int netchan__hang_up_inherited(netchan__endpoint *e, netchan_report *report) {
    if (report) memset(report, 0, sizeof *report);
    if (e->fd >= 0) close(e->fd);
    e->fd = -1;
    return netchan__fail_fork("this link");
}

NETCHANDEF int netchan_hangup(netchan_link *link, netchan_report *report) {
    netchan__endpoint *e = (netchan__endpoint *)(void *)link;
    if (!e) return NETCHAN_OK;
    if (netchan__is_inherited(link->send)) return netchan__hang_up_inherited(e, report);
    pthread_mutex_lock(&netchan__net_lock);
    e->hub.hanging_up = true;
    netchan__wake_io(e); /* no new peers */
    int ms = e->hub.options.linger_ms;
    uint64_t deadline = netchan__deadline(ms);
    if (e->hub.dials) netchan__shut_link(&e->hub);
    netchan__drain(e, netchan__deadline(ms < 0 ? ms : ms - ms / 4));
    if (!e->hub.shut) netchan__shut_link(&e->hub);
    netchan__drain(e, deadline); /* for a listener's farewells, and what goes back */
    netchan__unlock_one(&netchan__net_lock);
    netchan__stop_endpoint(e);
    pthread_mutex_lock(&netchan__net_lock);
    netchan_report r = netchan__hub_close(&e->hub);
    netchan__unlock_one(&netchan__net_lock);
    if (report) *report = r;
    netchan__free_endpoint(e);
    return r.undelivered || r.unknown
               ? netchan__fail(NETCHAN_ETIMEDOUT,
                               "netchan_hangup: %zu values were not delivered, of %zu only the peer knew",
                               r.undelivered, r.unknown)
               : NETCHAN_OK;
}

/* ---- One peer, all peers. ---- */

static netchan__hub *netchan__hub_of(netchan_link *link) { return (netchan__hub *)(void *)link; }

static int netchan__check_link(const char *function, const netchan_link *link) {
    if (!link) return netchan__fail(NETCHAN_EINVAL, "%s: the link is NULL", function);
    return netchan__is_inherited(link->send) ? netchan__fail_fork("this link") : NETCHAN_OK;
}

/* The session of this link with the peer, or NULL. Caller holds netchan__net_lock. */
static netchan__session *netchan__find_peer(netchan__hub *h, uint64_t number) {
    netchan__peer *p = (netchan__peer *)netchan__map_get(&netchan__net.by_number, number);
    return p && netchan__session_of(p)->hub == h ? netchan__session_of(p) : NULL;
}

NETCHANDEF int netchan_sendto(netchan_link *link, netchan_peer peer, netchan_value v, int timeout_ms) {
    netchan__hub *h = netchan__hub_of(link);
    int result = netchan__check_link("netchan_sendto", link);
    if (result != NETCHAN_OK) return result;
    pthread_mutex_lock(&netchan__net_lock);
    bool found = netchan__find_peer(h, peer.id) != NULL;
    pthread_mutex_unlock(&netchan__net_lock);
    if (!found)
        return netchan__fail(NETCHAN_ENOPEER, "netchan_sendto: %s has no peer %llu; it is gone, or of another link",
                             link->address, (unsigned long long)peer.id);
    netchan_case c = netchan_case_send(link->send, v);
    return netchan__operate_one(&c, h->dials ? 0 : peer.id, timeout_ms);
}

/* One send of a broadcast. */
typedef struct netchan__cast {
    netchan__op op;
    netchan__waiter waiter;
} netchan__cast;

static int netchan__prepare_cast(netchan__cast *cast, netchan *ch, uint64_t to, netchan_value v, int timeout_ms) {
    netchan_case c = netchan_case_send(ch, v);
    netchan__op *op = &cast->op;
    netchan__waiter *w = &cast->waiter;
    int result = netchan__prepare(w, &c);
    if (result != NETCHAN_OK) return result;
    op->net = true;
    op->count = 1;
    op->waiters = w;
    op->id = w->op_id = __atomic_add_fetch(&netchan__op_count, 1, __ATOMIC_RELAXED);
    w->op = op;
    w->to = to;
    w->firm = timeout_ms < 0;
    w->is_try = timeout_ms == 0;
    return NETCHAN_OK;
}

/* Waits for the end of one send. */
static int netchan__finish_cast(netchan__cast *cast, uint64_t deadline) {
    netchan__op *op = &cast->op;
    bool slept = false;
    if (!netchan__sleep(op, true, &slept, deadline)) {
        pthread_mutex_lock(&netchan__net_lock);
        netchan__expire(op);
        netchan__unlock_one(&netchan__net_lock);
        netchan__sleep(op, true, &slept, UINT64_MAX);
    }
    if (slept) netchan__end_sleep(op);
    netchan_clear(&cast->waiter.value);
    return op->result;
}

/* The numbers of all peers. Returns NULL when out of memory. */
static uint64_t *netchan__all_peers(const netchan__hub *h, size_t *count) {
    uint64_t *numbers;
    pthread_mutex_lock(&netchan__net_lock);
    numbers = (uint64_t *)netchan__alloc(h->peers * sizeof *numbers);
    *count = 0;
    for (const netchan__session *s = numbers ? h->sessions : NULL; s; s = s->next)
        numbers[(*count)++] = s->peer.number;
    pthread_mutex_unlock(&netchan__net_lock);
    return numbers;
}

/* Begins all sends under one lock. Returns how many were made; fewer than count when one cannot be: see *result. */
static size_t netchan__begin_casts(netchan__hub *h, netchan__cast *casts, const uint64_t *numbers, size_t count,
                                   netchan_case *c, int timeout_ms, int *result) {
    size_t made = 0;
    for (*result = NETCHAN_OK; made < count && *result == NETCHAN_OK; made += *result == NETCHAN_OK)
        *result = netchan__prepare_cast(&casts[made], h->link.send, numbers[made], c->value, timeout_ms);
    pthread_mutex_lock(&netchan__net_lock);
    for (size_t i = 0; i < made; i++) {
        netchan__op *op = &casts[i].op;
        if (*result != NETCHAN_OK) netchan__finish(op, NULL, *result);
        else netchan__begin(op);
        if (timeout_ms == 0 && netchan__state(op) == NETCHAN__OPEN) netchan__expire(op);
    }
    netchan__unlock_one(&netchan__net_lock);
    return made;
}

NETCHANDEF int netchan_broadcast(netchan_link *link, netchan_value v, size_t *reached, int timeout_ms) {
    netchan__hub *h = netchan__hub_of(link);
    size_t count, took = 0;
    if (reached) *reached = 0;
    int result = netchan__check_link("netchan_broadcast", link);
    if (result != NETCHAN_OK) return result;
    if (h->dials) {
        int sent = netchan_send(link->send, v, timeout_ms);
        if (reached) *reached = sent == NETCHAN_OK;
        return sent;
    }
    uint64_t deadline = netchan__deadline(timeout_ms > 0 ? timeout_ms : NETCHAN_FOREVER);
    uint64_t *numbers = netchan__all_peers(h, &count);
    netchan__cast *casts = (netchan__cast *)netchan__alloc(count * sizeof *casts);
    netchan_case c = netchan_case_send(link->send, v);
    result = NETCHAN_ENOMEM;
    size_t made = 0;
    if (numbers && casts) made = netchan__begin_casts(h, casts, numbers, count, &c, timeout_ms, &result);
    else netchan__fail_memory("netchan_broadcast");
    for (size_t i = 0; i < made; i++) {
        int one = netchan__finish_cast(&casts[i], deadline);
        took += one == NETCHAN_OK;
        if (one == NETCHAN_OK || one == NETCHAN_ENOPEER || result != NETCHAN_OK) continue;
        result = netchan__note(one, netchan_strerror(one));
    }
    NETCHAN_FREE(numbers);
    NETCHAN_FREE(casts);
    if (reached) *reached = took;
    return result;
}

/* ---- Names. ---- */

/* Checks what the three functions below have in common. */
static int netchan__check_name(const char *function, netchan_link *link, const char *name, int end) {
    int result = netchan__check_link(function, link);
    if (result != NETCHAN_OK) return result;
    if (!name || !*name || strlen(name) > NETCHAN__NAME_MAX)
        return netchan__fail(NETCHAN_EINVAL, "%s: a name has 1 to %d bytes", function, NETCHAN__NAME_MAX);
    if (end != NETCHAN_SENDER && end != NETCHAN_RECEIVER)
        return netchan__fail(NETCHAN_EINVAL, "%s(\"%s\"): say NETCHAN_SENDER or NETCHAN_RECEIVER", function, name);
    return NETCHAN_OK;
}

NETCHANDEF int netchan_export(netchan_link *link, const char *name, netchan *ch, enum netchan_type end) {
    int result = netchan__check_name("netchan_export", link, name, (int)end);
    if (result != NETCHAN_OK) return result;
    bool receives = end == NETCHAN_RECEIVER;
    if (!ch || !(receives ? ch->may_receive : ch->may_send))
        return netchan__fail(NETCHAN_EINVAL, "netchan_export(\"%s\"): %s", name,
                             !ch        ? "the channel is NULL"
                             : receives ? "nobody may receive from this channel here"
                                        : "nobody may send into this channel here");
    if (netchan__is_inherited(ch)) return netchan__fail_inherited();
    netchan__hub *h = netchan__hub_of(link);
    pthread_mutex_lock(&netchan__net_lock);
    if (netchan__find_name(h, name, strlen(name)))
        result = netchan__fail(NETCHAN_EINVAL, "netchan_export(\"%s\"): the name is taken; unexport it first", name);
    else result = netchan__add_name(h, name, ch, receives);
    netchan__unlock_one(&netchan__net_lock);
    return result;
}

NETCHANDEF int netchan_unexport(netchan_link *link, const char *name) {
    int result = netchan__check_name("netchan_unexport", link, name, NETCHAN_SENDER);
    if (result != NETCHAN_OK) return result;
    netchan__hub *h = netchan__hub_of(link);
    pthread_mutex_lock(&netchan__net_lock);
    netchan__name *n = netchan__find_name(h, name, strlen(name));
    if (n) netchan__remove_name(h, n);
    else result = netchan__fail(NETCHAN_EINVAL, "netchan_unexport(\"%s\"): there is no such name", name);
    netchan__unlock_one(&netchan__net_lock);
    return result;
}

/* Asks and waits. Caller holds netchan__net_lock. */
static void netchan__await_import(netchan__endpoint *e, netchan__wanted *w, uint64_t deadline) {
    netchan__hub *h = &e->hub;
    w->number = ++h->last_wanted;
    w->next = h->wanted;
    h->wanted = w;
    for (netchan__session *s = h->sessions; s; s = s->next)
        if (!(w->is_try && s->peer.down) && !s->peer.leaving) netchan__ask(s, w);
    bool in_time = !w->is_try || w->unanswered;
    while (!w->over && in_time && !h->hanging_up) in_time = netchan__wait_net(&e->changed, deadline);
    netchan__end_wanted(h, w);
    if (h->hanging_up) pthread_cond_broadcast(&e->changed); /* see netchan__stop_endpoint() */
}

NETCHANDEF int netchan_import(netchan_link *link, const char *name, enum netchan_type end, netchan **ch,
                              int timeout_ms) {
    netchan__wanted w;
    if (ch) *ch = NULL;
    int result = netchan__check_name("netchan_import", link, name, (int)end);
    if (result != NETCHAN_OK) return result;
    if (!ch) return netchan__fail(NETCHAN_EINVAL, "netchan_import(\"%s\"): the place for the channel is NULL", name);
    memset(&w, 0, sizeof w);
    w.text = name;
    w.receives = end == NETCHAN_RECEIVER;
    w.is_try = timeout_ms == 0;
    w.result = NETCHAN_ETIMEDOUT;
    netchan__endpoint *e = (netchan__endpoint *)(void *)link;
    pthread_mutex_lock(&netchan__net_lock);
    netchan__await_import(e, &w, netchan__deadline(w.is_try ? netchan__patience_ms(&e->hub.options) : timeout_ms));
    bool hung_up = e->hub.hanging_up;
    netchan__unlock_one(&netchan__net_lock);
    *ch = w.end;
    if (w.end) return NETCHAN_OK;
    if (w.result == NETCHAN_ENOMEM) return netchan__fail_memory("netchan_import");
    if (w.result == NETCHAN_ETYPE)
        return netchan__fail(NETCHAN_ETYPE, "netchan_import(\"%s\"): it is exported, but not as a %s", name,
                             w.receives ? "receiver" : "sender");
    if (hung_up)
        return netchan__fail(NETCHAN_ECLOSED, "netchan_import(\"%s\"): the link is being hung up", name);
    return netchan__fail(NETCHAN_ETIMEDOUT, "netchan_import(\"%s\"): %s", name,
                         w.is_try ? "the other side of the link exports no such name now"
                                  : "the other side of the link did not export it in time");
}

NETCHANDEF int netchan_get_stats(netchan_link *link, netchan_stats *stats) {
    int result = netchan__check_link("netchan_get_stats", link);
    if (result != NETCHAN_OK) return result;
    if (!stats) return netchan__fail(NETCHAN_EINVAL, "netchan_get_stats: the place for them is NULL");
    pthread_mutex_lock(&netchan__net_lock);
    *stats = netchan__hub_stats(netchan__hub_of(link));
    pthread_mutex_unlock(&netchan__net_lock);
    return NETCHAN_OK;
}

NETCHAN__SMALL_END
#ifdef NETCHAN__TUNED
#pragma GCC pop_options
#endif
#ifdef __cplusplus
}
#endif
#endif /* mbedTLS */
#endif /* NETCHAN_IMPLEMENTATION */

/*
 * REVISION HISTORY
 *
 *   0.1.0  Values, local channels, select; links over TLS 1.3 with shared_key, pin, ca or insecure; work queue and
 *          merge; sessions that survive their links; channels in messages, names, peers with channels of their own.
 *
 * LICENCE
 *
 * MIT License. Copyright (c) 2026 the netchan.h authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
 * documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
 * rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
 * permit persons to whom the Software is furnished to do so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
 * Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
 * WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
 * COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
 * OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
 */
