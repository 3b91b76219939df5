#!/bin/sh
# Usage: valgrind.sh, from `make test`. Runs a few examples and quick parts of the tests under valgrind, which also sees
# what mbedTLS does with memory: reads of what was never written, writes beside it, and blocks that nobody can free any
# more. Where it is not installed, or a sanitizer is built in, nothing is run.
bin=${BUILD:-build}
dir=$(mktemp -d) || exit 1
pids=
stop() {
	for pid in $pids; do kill "$pid" 2>/dev/null; done
	rm -rf "$dir"
}
trap stop EXIT
trap 'exit 130' INT TERM

skip() {
	echo "valgrind: nothing is run: $*"
	echo "0 passed, 0 failed"
	exit 0
}
command -v valgrind >/dev/null || skip "it is not installed"
if grep -q -e __asan_init -e __tsan_init "$bin/select"; then skip "a sanitizer is built in"; fi
memcheck="timeout -k 1 120 valgrind -q --leak-check=full --errors-for-leak-kinds=definite --error-exitcode=9"
NETCHAN_TEST_ALARM=100
export NETCHAN_TEST_ALARM
$memcheck true >"$dir/log" 2>&1 || skip "it does not work here"

passed=0 failed=0
# check NAME COMMAND...: it must succeed; what it says is shown only when it does not.
check() {
	name=$1
	shift
	if "$@" >"$dir/log" 2>&1; then
		passed=$((passed + 1))
	else
		failed=$((failed + 1))
		echo "FAIL $name"
		{ grep FAIL "$dir/log"; tail -n 30 "$dir/log"; } | sed 's/^/     | /'
	fi
}
# part PROGRAM FILTER: tests of a program, of which at least one must bear such a name.
part() { check "$1 $2" run_part "$bin/tests/$1" "$2"; }
run_part() {
	$memcheck "$@" >"$dir/part" 2>&1
	status=$?
	cat "$dir/part"
	[ "$status" -eq 0 ] && ! grep -qx "0 passed, 0 failed" "$dir/part"
}

# hello, whose two sides are two processes.
hello() {
	mkfifo "$dir/says" || return 1
	$memcheck "$bin/hello" listen 127.0.0.1:0 >"$dir/says" &
	listener=$! pids=$!
	exec 3<"$dir/says"
	read -r line <&3
	$memcheck "$bin/hello" dial "${line#listening on }" || return 1
	read -r line <&3
	wait "$listener" || return 1
	pids=
	[ "$line" = hello ]
}

NETCHAN_KEY=$("$bin/pool" key)
export NETCHAN_KEY
check hello hello
for example in select struct; do check "$example" $memcheck "$bin/$example"; done
part values struct
part values wire_
part values out_of
part channels select_
part channels value
part session greeting
part session lies
part links pins
part links key
part links values_of_all_types
part links hangup_drains
part peers accept_in
part peers export_and
part ends the_last_holder
part session golden_resume
part wire offers
part hygiene sentences
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
