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
limit="timeout -k 1 30"
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

NETCHAN_KEY=$(run pool key)
export NETCHAN_KEY

# ---- Wrong usage is 2, a failure is 1 with a sentence. ----
check "hello: usage" exits 2 run hello
check "netcat: usage" exits 2 run netcat send 127.0.0.1:0
check "pool: usage" exits 2 run pool boss 127.0.0.1:0
check "workers: usage" exits 2 run workers many
check "restart: usage" exits 2 run restart listen
check "cluster_bench: usage" exits 2 run cluster_bench 0
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
