#!/bin/sh
# Usage: examples.sh [DIRECTORY], from `make test`. Really runs the examples, which were compiled into the directory.
bin=${1:-${BUILD:-build}}
dir=$(mktemp -d) || exit 1
pids=
stop() {
	for pid in $pids; do kill "$pid" 2>/dev/null; done
	rm -rf "$dir"
}
trap stop EXIT
trap 'exit 130' INT TERM

passed=0 failed=0
# check NAME COMMAND...: the command must succeed.
check() {
	name=$1
	shift
	if "$@"; then
		passed=$((passed + 1))
	else
		failed=$((failed + 1))
		echo "FAIL $name"
	fi
}
# run PROGRAM ARGUMENTS...: an example, but not for ever. In the background it must be `$limit "$bin/PROGRAM"`, or $! is a shell.
limit="timeout -k 1 60"
run() {
	program=$1
	shift
	$limit "$bin/$program" "$@"
}
# exits STATUS COMMAND...: runs it. ended STATUS PID: waits for it.
exits() {
	expected=$1
	shift
	"$@" >/dev/null 2>"$dir/stderr"
	status=$?
	[ "$status" -eq "$expected" ] || { echo "exit status $status: $(tail -n 1 "$dir/stderr")"; return 1; }
}
ended() { exits "$1" wait "$2"; }
# prints TEXT COMMAND...: its standard output must be that.
prints() {
	expected=$1
	shift
	"$@" >"$dir/stdout"
	[ "$(cat "$dir/stdout")" = "$expected" ] || { cat "$dir/stdout"; return 1; }
}
# pipe NAME: a new one, with nothing in it.
pipe() {
	rm -f "$dir/$1"
	mkfifo "$dir/$1" || exit 1
}
# address: reads `listening on ADDRESS` from descriptor 3.
address() {
	read -r line <&3
	address=${line#listening on }
}

# serve PROGRAM ARGUMENTS...: in the background, as $server; 3 is its standard output, 4 its input. Who lives on must close 4.
serve() {
	program=$1
	shift
	pipe says
	pipe input
	$limit "$bin/$program" "$@" <"$dir/input" >"$dir/says" 2>"$dir/server" &
	server=$! pids=$!
	exec 4>"$dir/input" 3<"$dir/says"
	address
}
# hears DESCRIPTOR TEXT: the next line from there must be that.
hears() {
	read -r heard <&"$1"
	[ "$heard" = "$2" ] || { echo "$heard"; return 1; }
}

NETCHAN_KEY=$(run pool key)
export NETCHAN_KEY

# ---- Wrong usage is 2, a failure is 1 with a sentence. ----
check "hello: usage" exits 2 run hello
check "netcat: usage" exits 2 run netcat send 127.0.0.1:0
check "pool: usage" exits 2 run pool boss 127.0.0.1:0
check "workers: usage" exits 2 run workers many
check "restart: usage" exits 2 run restart listen
check "cluster_bench: usage" exits 2 run cluster_bench 0
check "request: usage" exits 2 run request ask 127.0.0.1:0
check "cancel: usage" exits 2 run cancel ask 127.0.0.1:0 1
check "chat: usage" exits 2 run chat join 127.0.0.1:0
check "publish: usage" exits 2 run publish 127.0.0.1:0
check "pipeline: usage" exits 2 run pipeline filter 127.0.0.1:0
check "names: usage" exits 2 run names export 127.0.0.1:0 none
check "hello: no key" exits 1 env -u NETCHAN_KEY "$bin/hello" listen 127.0.0.1:0
check "hello: no key, no silence" test -s "$dir/stderr"
check "pool: no file" exits 1 run pool boss 127.0.0.1:0 "$dir/nothing"

# ---- In one process. ----
check "select" prints "0
1
1
2
3
5
8
13
21
34
quit
default: nobody is ready
timeout: nobody came for 100 ms" run select
check "struct" prints "Jungfraujoch: -11.5 degrees at 46.55, 7.98, time 1700000000
(no name): 3.0 degrees at 0.00, 0.00, time 0
not a reading" eval 'run struct | sed "s/^\(not a reading\): .*when.*/\1/"'
for threads in 1 4 50; do
	check "workers $threads" prints "$threads threads, 1000 results, sum of squares 333833500" run workers "$threads"
done
check "cluster_bench" exits 0 eval "run cluster_bench 3 1 >$dir/bench"
check "cluster_bench: all are there, nothing is lost" \
	grep -q '^Sent: [1-9].* Not received: 0, Clients connected: 3$' "$dir/bench"

# ---- hello ----
pipe says
$limit "$bin/hello" listen 127.0.0.1:0 >"$dir/says" &
pids=$!
exec 3<"$dir/says"
address
check "hello dial" exits 0 run hello dial "$address"
check "hello listen prints hello" prints hello cat <&3
check "hello listen" ended 0 "$pids"

# ---- netcat: listen says where on standard error, standard output is the data. ----
netcat_copies() {
	pipe says
	$limit "$bin/netcat" listen 127.0.0.1:0 2>"$dir/says" >"$dir/copy" &
	pids=$!
	exec 3<"$dir/says"
	address
	run netcat dial "$address" <"$1" || return 1
	wait "$pids" && cmp "$1" "$dir/copy"
}
: >"$dir/empty"
seq 1 100000 >"$dir/seq"
seq 1 1000 >"$dir/seq1000"
head -c 3000001 /dev/urandom >"$dir/random"
check "netcat: nothing" netcat_copies "$dir/empty"
check "netcat: text" netcat_copies "$dir/seq"
check "netcat: bytes" netcat_copies "$dir/random"

# A netcat without end, of which one side is killed in the middle: something has arrived already.
netcat_endless() {
	pipe says
	pipe data
	$limit "$bin/netcat" listen 127.0.0.1:0 2>"$dir/says" >"$dir/data" &
	listener=$!
	exec 3<"$dir/says" 4<"$dir/data"
	address
	yes | $limit "$bin/netcat" dial "$address" 2>/dev/null &
	dialler=$!
	pids="$listener $dialler"
	read -r line <&4
}
netcat_endless
kill "$dialler"
cat <&4 >/dev/null
check "netcat listen: the dialler was killed" ended 1 "$listener"
netcat_endless
kill "$listener"
exec 4<&-
check "netcat dial: the listener was killed" ended 1 "$dialler"

# ---- request: each question has its answer, whoever else asks; and when the server dies, the reply says so. ----
serve request serve 127.0.0.1:0
askers=
for k in 1 2 3 4; do
	$limit "$bin/request" ask "$address" "${k}0" "${k}00" "${k}000" "${k}0000" >"$dir/answers$k" 2>/dev/null 4>&- &
	askers="$askers $!" pids="$pids $!"
done
for pid in $askers; do check "request ask" ended 0 "$pid"; done
check "request: all answers" prints "4 8 10 12 25 46 62 78 168 303 430 550 1229 2262 3245 4203" \
	eval 'sort -n "$dir"/answers? | sed "s/.*: //" | paste -s -d " " -'
exec 4>&-
check "request serve" ended 0 "$server"
serve request serve 127.0.0.1:0
pipe asked
$limit "$bin/request" ask "$address" 1000000000000 >"$dir/answers" 2>"$dir/asked" 4>&- &
asker=$! pids="$server $!"
exec 5<"$dir/asked"
check "request: a question is asked" hears 5 "1000000000000: asked"
kill "$server"
check "request ask: the server is gone" ended 1 "$asker"
check "request: ELOST" grep -q '^1000000000000: no answer: the peer is gone' "$dir/answers"

# ---- cancel ----
serve cancel serve 127.0.0.1:0
check "cancel: finished work" prints 9592 run cancel ask "$address" 100000 30000
check "cancel: the server answered" hears 3 "100000: answered"
check "cancel: cancelled work" exits 1 run cancel ask "$address" 1000000000000 100
check "cancel: the server stopped" hears 3 "1000000000000: stopped"
check "cancel: and works on" prints 4 run cancel ask "$address" 10 30000
exec 4>&-
check "cancel serve" ended 0 "$server"

# ---- chat: two who stay, and others who come and go. ----
serve chat host 127.0.0.1:0
exec 4>&-
for name in Ann Bob; do
	pipe "says$name"
	pipe "hears$name"
	$limit "$bin/chat" join "$address" $name <"$dir/says$name" >"$dir/hears$name" 2>/dev/null 5>&- &
	pids="$pids $!"
	case $name in
	Ann) ann=$!; exec 5>"$dir/saysAnn" 6<"$dir/hearsAnn" ;;
	Bob) bob=$!; exec 7>"$dir/saysBob" 8<"$dir/hearsBob" ;;
	esac
	check "chat: Ann hears who comes" hears 6 "$name is here"
done
check "chat: Bob does" hears 8 "Bob is here"
for k in 1 2 3; do
	check "chat: a guest" exits 0 eval "echo I am $k | run chat join $address Guest$k"
	for line in " is here" ": I am $k" " has left"; do
		check "chat: Ann hears a guest" hears 6 "Guest$k$line"
		check "chat: Bob hears a guest" hears 8 "Guest$k$line"
	done
done
echo "Hello Bob" >&5
check "chat: Bob hears Ann" hears 8 "Ann: Hello Bob"
echo "Hello Ann" >&7
check "chat: Ann hears Bob, and not herself" hears 6 "Bob: Hello Ann"
kill "$bob"
check "chat: Ann hears that Bob is lost" hears 6 "Bob has left"
kill "$server"
check "chat join: the host was killed" ended 1 "$ann"
exec 5>&- 7>&-

# ---- publish: a subscriber who sleeps misses what does not fit into the buffer, and no other does. ----
news() { echo "$1" >&4 && read -r reached <&3; }
until_all_hear() { until news "$1" && [ "${reached#*: }" = "reached 2" ]; do :; done; }
serve publish news 127.0.0.1:0
pipe fast
$limit "$bin/publish" read "$address" sport >"$dir/fast" 4>&- &
fast=$!
"$bin/publish" read "$address" >"$dir/slow" 4>&- &
slow=$!
pids="$server $fast $slow"
exec 5<"$dir/fast"
until_all_hear "weather fine"
kill -STOP "$slow"
for k in 1 2 3 4 5 6 7 8 9 10 11 12; do
	news "sport $k"
	check "publish: who is fast hears all" hears 5 "sport $k"
done
check "publish: who is slow does not" test "${reached#*: }" = "reached 1, but not all"
kill -CONT "$slow"
until_all_hear "sport end"
exec 4>&-
check "publish news" ended 0 "$server"
check "publish read, fast" ended 0 "$fast"
check "publish read, slow" ended 0 "$slow"
check "publish: something was missed" grep -q '^([0-9]* missed)$' "$dir/slow"
check "publish: and then the end came" test "$(tail -n 1 "$dir/slow")" = "sport end"

# ---- pipeline: as grep, with a line that goes past the filter. ----
serve pipeline filter 127.0.0.1:0 9
$limit "$bin/pipeline" sink "$address" >"$dir/sink" &
sink=$!
pids="$server $sink"
check "pipeline source" exits 0 run pipeline source "$address" <"$dir/seq1000"
check "pipeline filter" ended 0 "$server"
check "pipeline sink" ended 0 "$sink"
{ echo "(begin)" && grep 9 "$dir/seq1000"; } >"$dir/expected"
check "pipeline: what passed the filter" cmp "$dir/expected" "$dir/sink"

# ---- names ----
serve names export 127.0.0.1:0 1000
importers=
for k in 1 2 3; do
	$limit "$bin/names" import "$address" >"$dir/done$k" 4>&- &
	importers="$importers $!" pids="$pids $!"
done
check "names: the results" hears 3 "1000 results, sum 333833500"
for pid in $server $importers; do check "names" ended 0 "$pid"; done
check "names: each job once" test "$(awk '{ n += $1 } END { print n }' "$dir"/done?)" -eq 1000

# ---- pool: no newline at the end, no word, no byte, and bytes that are no text. ----
printf 'one two\nthree' >"$dir/open"
printf ' \n\t\v\f\r\n' >"$dir/blank"
printf 'a\000b \377c\r\n\177d\001 e\000 f' >"$dir/bytes"
cat "${0%/*}"/../netchan.h "${0%/*}"/../examples/*.c >"$dir/source"
set -- "$dir/seq" "$dir/open" "$dir/blank" "$dir/bytes" "$dir/empty" "$dir/source"
pipe says
$limit "$bin/pool" boss 127.0.0.1:0 "$@" >"$dir/says" 2>"$dir/stderr" &
boss=$!
exec 3<"$dir/says"
address
$limit "$bin/pool" work "$address" &
first=$!
$limit "$bin/pool" work "$address" &
second=$!
pids="$boss $first $second"
cat <&3 >"$dir/result"
check "pool boss" ended 0 "$boss"
check "pool work, first" ended 0 "$first"
check "pool work, second" ended 0 "$second"
words=$(LC_ALL=C wc -w "$@" | awk 'END { print $1 }')
lines=$(LC_ALL=C wc -l "$@" | awk 'END { print $1 }')
check "pool: as wc counts" grep -q "^files=6 lines=$lines words=$words tasks=[0-9]* again=0 distinct=[0-9]*$" "$dir/result"
check "pool: ten words and the sums" test "$(wc -l <"$dir/result")" -eq 11

# One task goes to a worker that pauses for ever, and is killed when only this task is left.
pipe says
pipe progress
$limit "$bin/pool" boss 127.0.0.1:0 "$dir/seq1000" >"$dir/says" 2>"$dir/progress" &
boss=$!
exec 3<"$dir/says" 5<"$dir/progress"
address
$limit "$bin/pool" work "$address" 100000000 &
slow=$!
pids="$boss $slow"
until [ "${line##*, }" = "1 workers" ]; do read -r line <&5 || break; done
$limit "$bin/pool" work "$address" &
pids="$pids $!"
until [ "${line%, *}" = "pool: 93% (tasks 15/16)" ]; do read -r line <&5 || break; done
kill "$slow"
until [ "$line" != "${line#pool: task}" ]; do read -r line <&5 || break; done
check "pool: ELOST" test "${line#pool: task * }" = "is sent again: its reply ended with ELOST"
check "pool: the other worker" ended 0 "${pids##* }"
check "pool boss, who lost a worker" ended 0 "$boss"
check "pool: counted once" grep -q "words=1000 tasks=16 again=1 " <&3

# ---- restart: a server that is replaced eight times under load. Each line is printed once, and those of a dialler in order. ----
pipe says
pipe data
pipe marks
$limit "$bin/restart" listen 127.0.0.1:0 2>"$dir/says" >"$dir/data" &
first=$!
exec 3<"$dir/says" 4<"$dir/data"
awk -v copy="$dir/lines" '{ print >copy } NR % 5000 == 0 { print NR; fflush() }' <&4 3<&- >"$dir/marks" &
copier=$!
exec 5<"$dir/marks" 4<&-
read -r _ server _ _ address <&3
diallers=
for k in 1 2 3 4; do
	seq "${k}00001" "${k}15000" | $limit "$bin/restart" dial "$address" 3<&- 5<&- &
	diallers="$diallers $!"
done
pids="$server $diallers"
for generation in 1 2 3 4 5 6 7 8; do
	read -r mark <&5
	old=$server
	kill -HUP "$old"
	read -r _ server _ _ address <&3
	pids="$server $diallers"
	check "restart: a successor" test "$server" -ne "$old"
done
check "restart listen" ended 0 "$first"
for pid in $diallers; do check "restart dial" ended 0 "$pid"; done
kill "$server"
cat <&5 >/dev/null
check "restart: all lines are copied" ended 0 "$copier"
for k in 1 2 3 4; do
	seq "${k}00001" "${k}15000" >"$dir/sent"
	grep "^$k" "$dir/lines" >"$dir/got"
	check "restart: each line once, in order" cmp "$dir/sent" "$dir/got"
done

pids=
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
