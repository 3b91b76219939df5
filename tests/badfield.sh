#!/bin/sh
# A row of a struct table whose kind is not that of the C member must not compile, in C11 and in C++17; the right one
# must, without a warning. Every wrong program differs from a right one in the type of its member alone.
# CC is the compiler, CFLAGS its flags.
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
root=$(cd "$(dirname "$0")/.." && pwd)
passed=0 failed=0

# compile LANGUAGE FLAGS: does $dir/program compile as it?
compile() {
	# shellcheck disable=SC2086 # the flags are lists of words
	${CC:-cc} ${CFLAGS-} $2 -x "${1%%-*}" -std="${1#*-}" -I"$root" -c "$dir/program" -o "$dir/object" 2>"$dir/log"
}

# row TYPE ROW: a program with a struct whose member has this type, and a table with this row.
row() {
	cat >"$dir/program" <<-END
		#include "netchan.h"
		typedef struct { char tiny; } tiny;
		typedef struct { char tiny; } other_tiny;
		typedef struct { int64_t id; double x; } point;
		typedef struct { int64_t id; double x; } other_point;
		typedef struct { char before; $1; char after; } record;
		extern const netchan_field table[2];
		const netchan_field table[2] = {$2, NETCHAN_FIELDS_END};
	END
}

# expect right|wrong TYPE ROW
expect() {
	row "$2" "$3"
	for language in c-c11 c++-c++17; do
		if [ "$1" = right ]; then
			compile "$language" "-Wall -Wextra -Wpedantic -Werror"
			good=$?
		else
			compile "$language" -w
			good=$((! $?))
		fi
		if [ "$good" -eq 0 ]; then
			passed=$((passed + 1))
		else
			failed=$((failed + 1))
			echo "FAIL ${language#*-}: the $1 member \`$2\` in $3"
			if [ "$1" = right ]; then sed 's/^/     | /' "$dir/log" | head -n 3; fi
		fi
	done
}

# kind KIND C-TYPE: its own type is right; all others, and what is close to it, are wrong.
kind() {
	expect right "$2 m" "NETCHAN_FIELD(record, m, $1)"
	for type in bool char int8_t uint8_t int16_t uint16_t int32_t uint32_t int64_t uint64_t float double "long double" \
		"const char *" "char *" "const void *" "const unsigned char *" netchan_value point tiny; do
		if [ "$type" != "$2" ]; then expect wrong "$type m" "NETCHAN_FIELD(record, m, $1)"; fi
	done
	expect wrong "$2 *m" "NETCHAN_FIELD(record, m, $1)"
	expect wrong "$2 m[2]" "NETCHAN_FIELD(record, m, $1)"
	expect wrong "$2 other" "NETCHAN_FIELD(record, m, $1)"
}

kind BOOL bool
kind I32 int32_t
kind I64 int64_t
kind U32 uint32_t
kind U64 uint64_t
kind F32 float
kind F64 double
kind STR "const char *"
expect wrong "char m[16]" "NETCHAN_FIELD(record, m, STR)"
expect wrong "int m : 8" "NETCHAN_FIELD(record, m, I32)"
expect wrong "int32_t m" "NETCHAN_FIELD(record, m, NO_SUCH_KIND)"

expect right "netchan_value m" "NETCHAN_FIELD_VALUE(record, m)"
for type in bool int32_t int64_t double "const char *" "netchan_value *" "const netchan_value *" netchan_entry \
	netchan_case point; do
	expect wrong "$type m" "NETCHAN_FIELD_VALUE(record, m)"
done
expect wrong "netchan_value m[2]" "NETCHAN_FIELD_VALUE(record, m)"

expect right "point m" "NETCHAN_FIELD_STRUCT(record, m, point, table)"
expect right "tiny m" "NETCHAN_FIELD_STRUCT(record, m, tiny, table)"
for type in bool int32_t int64_t double "const char *" netchan_value "point *" "const point *" other_point tiny; do
	expect wrong "$type m" "NETCHAN_FIELD_STRUCT(record, m, point, table)"
done
for type in bool char int64_t "tiny *" other_tiny point; do
	expect wrong "$type m" "NETCHAN_FIELD_STRUCT(record, m, tiny, table)"
done
expect wrong "point m[2]" "NETCHAN_FIELD_STRUCT(record, m, point, table)"
expect wrong "tiny m[1]" "NETCHAN_FIELD_STRUCT(record, m, tiny, table)"

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
