#!/bin/sh
# Usage: failures.sh. Tests of the other programs, in which one allocation of netchan.h fails, somewhere: the test may
# fail then, by one of its own checks, or wait in vain until its time is up, but it must not crash, nor trip a sanitizer.
# There are more of such runs than anybody has time for, so it does some, for half a minute. For longer, and others:
# FAILURE_SECONDS=1000 SEED=7. TRACE=1 tells of each run.
: "${BUILD:=build}" "${SEED:=1}" "${TRACE:=}"
limit=$(($(date +%s) + ${FAILURE_SECONDS:-30}))
seconds=2 # for one run; tests that wait for what cannot come do so for 20
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
trap 'exit 130' INT TERM
passed=0 failed=0

# "PROGRAM TEST N" again and again: any test, and small numbers more often than large ones, as most allocate little.
draw() {
	for source in tests/*.c; do
		program=$BUILD/tests/$(basename "$source" .c)
		if grep -q '"alloc.h"' "$source" && [ -x "$program" ]; then
			grep -o '\<TEST([a-z_0-9]*)' "$source" | sed "s|TEST(\(.*\))|$program \1|"
		fi
	done | awk -v seed="$SEED" '{ row[NR] = $0 } END {
		srand(seed)
		if (NR) for (i = 0; i < 1000000; i++) print row[1 + int(rand() * NR)], int(exp(rand() * log(2000)))
	}'
}

# What is wrong in the log; nothing, if the test passed or one of its checks failed.
wrong() {
	grep -E 'ERROR: |WARNING: ThreadSanitizer|runtime error: |Assertion .* failed' "$log"
	grep -E "^FAIL [^:]*: (Aborted|Bus error|Floating|Illegal|Segmentation|Trace|exit code|fork failed)" "$log"
}

draw >"$log.rows"
trap 'rm -f "$log" "$log.rows"' EXIT
while read -r program name n && [ "$(date +%s)" -lt "$limit" ]; do
	if [ -n "$TRACE" ]; then echo "NETCHAN_TEST_FAIL_ALLOC=$n $program $name"; fi
	NETCHAN_TEST_FAIL_ALLOC=$n NETCHAN_TEST_ALARM=$seconds "$program" "$name" >"$log" 2>&1 </dev/null
	if wrong >/dev/null; then
		failed=$((failed + 1))
		echo "FAIL NETCHAN_TEST_FAIL_ALLOC=$n $program $name"
		tail -n 30 "$log" | sed 's/^/     | /'
	else
		passed=$((passed + 1))
		if [ -n "$TRACE" ]; then grep '^FAIL ' "$log" | cut -c 1-200; fi
	fi
done <"$log.rows"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
