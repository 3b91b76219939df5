#!/bin/sh
# Usage: demo.sh FILE..., from `make demo`. examples/pool.c at work over TLS: a boss and three workers count the words of the files;
# after a third of them one worker is killed with kill -9 in the middle of a task: the boss must see ELOST on the task's reply and send
# it again; the total must be that of wc. POOL is the program.
POOL=${POOL:-build/pool}
dir=$(mktemp -d) || exit 1
pids=

stop() {
	for pid in $pids; do kill "$pid" 2>/dev/null; done
	rm -rf "$dir"
}
trap stop EXIT
trap 'exit 130' INT TERM
fail() {
	echo "demo: failed: $*" >&2
	exit 1
}
# expect STATUS NAME PID: waits for the process, which must end with that exit status.
expect() {
	wait "$3" 2>/dev/null
	status=$?
	[ "$status" -eq "$1" ] || fail "$2 ended with $status instead of $1. $(cat "$dir/$2" 2>/dev/null)"
}
# too_late FILE...: they were done before the kill, or the worker was between two tasks. Once more, with all of them twice.
too_late() {
	run=${DEMO_RUN:-1}
	[ "$run" -lt 4 ] || fail "no worker was killed in the middle"
	echo "demo: that was too fast to kill a worker in the middle; again with all files twice"
	wait
	stop
	DEMO_RUN=$((run + 1)) exec "$0" "$@" "$@"
}
field() { sed -n "\$s/.*$1=\\([0-9]*\\).*/\\1/p" "$dir/result"; }

[ $# -gt 0 ] || fail "no files"
words=$(LC_ALL=C wc -w "$@" | awk 'END { print $1 }')
lines=$(LC_ALL=C wc -l "$@" | awk 'END { print $1 }')
NETCHAN_KEY=$("$POOL" key) || fail "$POOL key"
export NETCHAN_KEY
if command -v timeout >/dev/null; then limit="timeout -k 1 300"; else limit=; fi
start=$(date +%s)

# What the boss says comes through two pipes: reading them waits until it says it.
mkfifo "$dir/out" "$dir/err" || fail "mkfifo"
$limit "$POOL" boss 127.0.0.1:0 "$@" >"$dir/out" 2>"$dir/err" &
boss=$! pids=$!
exec 3<"$dir/out" 4<"$dir/err"
read -r line <&3 || fail "the boss did not start: $(cat <&4)"
work() {
	"$POOL" work "${line#listening on }" $2 2>"$dir/$1" &
	pids="$pids $!"
}
work worker1
worker1=$!
work worker2 1000 # slow, so that it has a task in hand
worker2=$!
work worker3
worker3=$!

# Each line is like `pool: 12% (tasks 25/208), 3 workers`, or says that a task is sent again.
killed=0 again=0
while read -r line <&4; do
	percent=${line#pool: } percent=${percent%%%*} workers=${line##*, } workers=${workers% workers}
	case $line in
	"pool: task "*" is sent again: its reply ended with ELOST") percent=0 again=1 ;;
	*) case $percent$workers in *[!0-9]* | '') fail "$line" ;; esac ;;
	esac
	if [ -t 1 ] && [ "$percent" -gt 0 ]; then printf '\r%s  ' "$line"; elif [ $((percent % 10)) -eq 0 ]; then echo "$line"; fi
	if [ "$killed" -eq 0 ] && [ "$percent" -ge 34 ] && [ "$workers" -eq 3 ]; then
		kill -9 "$worker2" && killed=1
	fi
done
if [ -t 1 ]; then echo; fi
cat <&3 >"$dir/result"

expect 0 boss "$boss"
[ "$again" -eq 1 ] || too_late "$@"
expect 0 worker1 "$worker1"
expect 137 worker2 "$worker2"
expect 0 worker3 "$worker3"
pids=
cat "$dir/result"
[ "$(field lines)" = "$lines" ] || fail "wc counts $lines lines"
[ "$(field words)" = "$words" ] || fail "wc counts $words words"
echo "demo: files=$# lines=$lines words=$words workers=3 killed=$killed again=$(field again) lost=$((words - $(field words)))" \
	"seconds=$(($(date +%s) - start)): ok"
