# make            examples into build/, tests into build/tests/
# make test       the tests, one line for each; JOBS of the programs at a time
# make check      test, sanitize, matrix, symbols and lint, one after the other
# make sanitize   the tests again under AddressSanitizer with UBSan (asan), and under ThreadSanitizer (tsan)
# make matrix     the header in every C and C++ standard, with gcc and clang, without a warning
# make symbols    what reaches the linker and the user's preprocessor
# make lint       stray blanks; cppcheck, gcc's analyser and clang-tidy, if they are installed
# make fuzz       libFuzzer (clang), FUZZ_SECONDS for each target, from the inputs kept in tests/fuzz/corpus/
# make sim        the simulator, SEEDS seeds from SEED0 on; with SEED=42 it replays that one and tells each step
# make bench      the figures of tests/bench, ROUNDS of each, or only BENCH="stream64 ...", beside mbedTLS alone and
#                 others; the bars go to PLOT. Takes 20 minutes, in which nothing else should run
# make bench-deps ZeroMQ and nng, which are measured too if they are installed; from apt-get, as root
# make demo       examples/pool.c at work: one server, several workers, over TLS
# make deps       mbedTLS into build/mbedtls; done without being asked when there is no other
# make clean      removes what was built, but for mbedTLS
#
# mbedTLS 3.6 comes from `make MBEDTLS=/its/prefix`, else from pkg-config, else from `make deps`.

CFLAGS ?= -O2 -g -Wall -Wextra
BUILD = build
FUZZ_SECONDS = 30
SEEDS = 10000
SEED0 = 1
JOBS = 1
RUN = tests/run
PLOT = $(BUILD)/bench/figures.svg

# mbedTLS 4 keeps ecp.h and sha256.h, which netchan.h includes, to itself.
PKG_MBEDTLS = mbedtls mbedx509 mbedcrypto
ifndef MBEDTLS
ifeq ($(shell pkg-config --exists 'mbedtls >= 3.6' 'mbedtls < 4' $(PKG_MBEDTLS) 2>/dev/null && echo found),found)
MBEDTLS_CFLAGS := $(shell pkg-config --cflags $(PKG_MBEDTLS))
MBEDTLS_LIBS := $(shell pkg-config --libs $(PKG_MBEDTLS))
MBEDTLS_INCLUDE := $(shell pkg-config --variable=includedir mbedtls)
else
MBEDTLS := build/mbedtls
endif
endif
ifdef MBEDTLS
DEPS := $(if $(filter build/mbedtls,$(MBEDTLS)),build/mbedtls/lib/libmbedtls.a)
MBEDTLS_CFLAGS := -I$(MBEDTLS)/include
MBEDTLS_LIBS := -L$(MBEDTLS)/lib $(if $(DEPS),,-Wl,-rpath,$(abspath $(MBEDTLS)/lib) )-lmbedtls -lmbedx509 -lmbedcrypto
MBEDTLS_INCLUDE := $(MBEDTLS)/include
endif
MBEDTLS_FLAGS = $(MBEDTLS_CFLAGS) $(MBEDTLS_LIBS)
export BUILD CC CFLAGS JOBS MBEDTLS_CFLAGS MBEDTLS_LIBS MBEDTLS_FLAGS

# A tests/x.sh is a test of its own, and a tests/x.c beside it is its material.
SCRIPTS := $(filter-out tests/demo.sh,$(wildcard tests/*.sh))
PROGRAMS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(filter-out $(SCRIPTS:.sh=.c),$(wildcard tests/*.c)))
CONFORMANCE := $(BUILD)/tests/conformance
TESTS := $(PROGRAMS) $(CONFORMANCE) $(SCRIPTS)
EXAMPLES := $(patsubst examples/%.c,$(BUILD)/%,$(wildcard examples/*.c))
FUZZERS := $(patsubst tests/fuzz/%.c,$(BUILD)/fuzz/%,$(wildcard tests/fuzz/*.c))
BENCHES := $(patsubst %,$(BUILD)/bench/%,netchan raw local)
OTHERS := $(patsubst %,$(BUILD)/bench/%,zmq nng)

.PHONY: all deps test check sanitize asan tsan matrix symbols lint fuzz sim bench bench-build bench-deps demo clean
all: $(EXAMPLES) $(PROGRAMS) $(CONFORMANCE)

# One command each, as the examples say. With ONCE set the implementation is compiled once for all of them.
IMPLEMENTATION = define NETCHAN_IMPLEMENTATION
ifndef ONCE
$(EXAMPLES): $(BUILD)/%: examples/%.c netchan.h | $(DEPS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) $< -o $@ -I. $(MBEDTLS_FLAGS) -lpthread
else
$(BUILD)/netchan.o: netchan.h | $(DEPS)
	@mkdir -p $(@D)
	printf '#$(IMPLEMENTATION)\n#include "netchan.h"\n' | $(CC) $(CFLAGS) -x c -c - -o $@ -I. $(MBEDTLS_CFLAGS)
$(EXAMPLES): $(BUILD)/%: examples/%.c $(BUILD)/netchan.o
	sed '/$(IMPLEMENTATION)/d' $< | $(CC) $(CFLAGS) -x c - -x none $(BUILD)/netchan.o -o $@ -I. $(MBEDTLS_FLAGS) -lpthread
endif

$(PROGRAMS): $(BUILD)/tests/%: tests/%.c netchan.h $(wildcard tests/*.h) | $(DEPS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) $< -o $@ -I. $(MBEDTLS_FLAGS) -lpthread

$(CONFORMANCE): $(wildcard tests/conformance/*.[ch]) netchan.h $(wildcard tests/*.h) | $(DEPS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) tests/conformance/conformance.c -o $@ -I. -Itests $(MBEDTLS_FLAGS) -lpthread

$(FUZZERS): $(BUILD)/fuzz/%: tests/fuzz/%.c netchan.h $(wildcard tests/*.h tests/fuzz/*.h) | $(DEPS)
	@mkdir -p $(@D)
	clang -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all $< -o $@ -I. $(MBEDTLS_FLAGS) -lpthread

$(BENCHES) $(OTHERS): $(BUILD)/bench/%: tests/bench/%.c netchan.h $(wildcard tests/bench/*.h) | $(DEPS)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) $< -o $@ -I. $(if $(filter zmq nng,$*),-l$*,$(MBEDTLS_FLAGS)) -lpthread

deps: build/mbedtls/lib/libmbedtls.a
build/mbedtls/lib/libmbedtls.a:
	MAKEFLAGS= .ci/get-mbedtls build/mbedtls

test: all
	@$(RUN) $(filter-out $(LEAVE_OUT),$(TESTS))

check:
	+@failed=; for step in test sanitize matrix symbols lint; do \
		echo "== make $$step"; $(MAKE) --no-print-directory $$step || failed="$$failed $$step"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

# Under a sanitizer all takes longer, and may; compiling takes a third with -O0. ThreadSanitizer needs the old layout of the
# address space, which setarch -R gives where it is allowed.
SANITIZER = -g -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize
# Nothing of netchan.h runs in the model, nor in what must not compile; valgrind and the sanitizers exclude each other;
# failures.sh is for who has time; scale measures what things cost, which a sanitizer changes, and takes a minute there.
SANITIZED_TEST = NETCHAN_TEST_ALARM=300 TEST_SECONDS=600 ONCE=1 $(MAKE) --no-print-directory test LEAVE_OUT='%/model %/badfield.sh %/valgrind.sh %/failures.sh %/scale'
NO_ASLR = $(shell setarch -R true 2>/dev/null && echo setarch -R)
sanitize:
	+@$(MAKE) --no-print-directory asan; asan=$$?; $(MAKE) --no-print-directory tsan && exit $$asan
asan:
	+@ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 \
	$(SANITIZED_TEST) BUILD=build/asan CFLAGS='-O0 $(SANITIZER)=address,undefined'
tsan:
	+@$(SANITIZED_TEST) BUILD=build/tsan CFLAGS='-O1 $(SANITIZER)=thread' RUN='$(NO_ASLR) tests/run'

matrix: | $(DEPS)
	@tests/matrix
symbols: | $(DEPS)
	@tests/symbols
lint:
	@tests/lint
fuzz: $(FUZZERS)
	@tests/fuzz/run $(FUZZ_SECONDS) $(FUZZERS)

sim: $(BUILD)/tests/simulator
	@$< $(if $(SEED),trace $(SEED),sim $(SEEDS) $(SEED0))

# Other libraries are looked for only when benchmarks are asked for.
ifneq ($(filter bench bench-build,$(MAKECMDGOALS)),)
has = $(shell $(CC) -fsyntax-only -include $1 -x c /dev/null 2>/dev/null && echo yes)
FOUND := $(if $(call has,zmq.h),$(BUILD)/bench/zmq) $(if $(call has,nng/nng.h),$(BUILD)/bench/nng)
endif
bench-build: $(BENCHES) $(FOUND)
bench: bench-build
	@tests/bench/run $(BENCH) && tests/bench/plot <$(BUILD)/bench/figures.txt >$(PLOT)
bench-deps:
	@[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || \
	{ echo 'This installs ZeroMQ and nng with apt-get, as root. Elsewhere install them by hand.' >&2; exit 1; }
	apt-get update && apt-get install -y --no-install-recommends libzmq3-dev libnng-dev

# The demo's files: ours, and the sources of mbedTLS, or its headers where it came without them.
demo: $(BUILD)/pool
	@POOL=$(BUILD)/pool tests/demo.sh netchan.h README.md \
	$(shell ls build/mbedtls/src/library/*.c 2>/dev/null || ls $(MBEDTLS_INCLUDE)/mbedtls/*.h)

clean:
	rm -rf $(filter-out build/mbedtls,$(wildcard build/*))
