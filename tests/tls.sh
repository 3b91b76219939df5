#!/bin/sh
# Looks at listeners and diallers of tests/tls.c with the tools of others: openssl, sslscan and testssl. What is not
# installed is left out, with a line. Nothing but TLS 1.3 is found, with three cipher suites and fast groups, and no warning.
# CC, CFLAGS and MBEDTLS_FLAGS are for the compiler, BUILD is where the program goes.
bin=${BUILD:-build}/tests
tls=$bin/tls
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
finish() {
	echo "$passed passed, $failed failed"
	[ "$failed" -eq 0 ]
	exit
}
installed() { command -v "$1" >/dev/null || { echo "$1 is not installed"; return 1; }; }
is() { [ "$1" = "$2" ] || { echo "it is: $1"; return 1; }; }
# has FILE WORDS, lacks FILE WORDS: in one line of it.
has() { grep -aq -e "$2" "$1" || { tail -n 20 "$1" | sed 's/^/     | /'; return 1; }; }
lacks() { ! grep -a -e "$2" "$1"; }

mkdir -p "$bin" || exit 1
# shellcheck disable=SC2086 # the flags are lists of words
if ! ${CC:-cc} ${CFLAGS-} tests/tls.c -o "$tls" -I. ${MBEDTLS_FLAGS-} -lpthread || ! "$tls" certs "$dir"; then
	check "tests/tls.c" false
	finish
fi
mkfifo "$dir/input" || exit 1
exec 4<>"$dir/input" # nothing ever comes from there; its end is the end of the listeners

# begin PROGRAM ARGUMENTS...: in the background, as $begun. What it says is on descriptor 3.
begins=0
begin() {
	begins=$((begins + 1))
	says=$dir/says$begins
	mkfifo "$says" || exit 1
	"$@" <"$dir/input" >"$says" 2>"$dir/errors" 4>&- &
	begun=$!
	pids="$pids $begun"
	exec 3<"$says"
	line=
}
# listen TRUST [NAME]: in the background. What it says goes to a file of this name, its port is kept in $port_NAME.
listen() {
	begin timeout -k 1 280 "$tls" listen "$1" "$dir"
	listeners="$listeners $begun"
	[ $# -eq 1 ] || shift
	read -r line <&3
	eval "port_$1=${line##*:} guests_$1=0"
	cat <&3 >"$dir/$1" 4>&- &
	exec 3<&-
}
listeners=
for trust in ca pin insecure shared_key; do listen $trust; done
# eventually COMMAND...: it succeeds, sooner or later.
eventually() {
	tries=100
	until "$@"; do
		tries=$((tries - 1))
		[ "$tries" -gt 0 ] || return 1
		sleep 0.1
	done
}
# told TRUST WORDS: the listener says this.
told() { eventually grep -aq -e "$2" "$dir/$1" || has "$dir/$1" "$2"; }
# counts TRUST EVENT N: it says so N times.
counts() { [ "$(grep -c "^$2 " "$dir/$1")" -eq "$3" ]; }
# dials TRUST: a dialler who is right comes in and goes. Their number is kept in $guests_TRUST.
dials() {
	eval "guests_$1=\$((guests_$1 + 1))"
	is "$("$tls" dial "$1" "$dir" "127.0.0.1:$(port "$1")" 4>&-)" up
}
port() { eval "echo \$port_$1"; }

for trust in ca pin insecure shared_key; do check "a dialler with $trust" dials $trust; done

# ---- openssl s_client ----
key=$("$tls" psk) id=$("$tls" identity)
show_client="-cert $dir/client.pem -key $dir/client.key"
show_other="-cert $dir/other.pem -key $dir/other.key"
show_key="-psk_identity $id -psk $key"
# talk TRUST ARGUMENTS...: what openssl says is in $dir/said. It ends when its input does.
talk() {
	trust=$1
	shift
	timeout 20 openssl s_client -connect "127.0.0.1:$(port "$trust")" -CAfile "$dir/ca.pem" "$@" >"$dir/said" 2>&1 4>&-
}
# chooses WORDS TRUST ARGUMENTS...: the handshake ends well, and openssl says this. refuses WORDS...: it does not.
chooses() {
	words=$1
	shift
	talk "$@" </dev/null
	has "$dir/said" '^\(New\|Reused\), TLSv1.3, Cipher is TLS_' && has "$dir/said" "$words"
}
refuses() {
	words=$1
	shift
	talk "$@" </dev/null
	has "$dir/said" '^New, (NONE), Cipher is (NONE)' && has "$dir/said" "$words"
}

openssl_client() {
	good="-tls1_3 -alpn netchan/1"
	# shellcheck disable=SC2086 # the arguments are lists of words
	{
		check "certificate" chooses '^Verify return code: 0 (ok)' ca $good -verify_hostname localhost
		check "certificate of an address" chooses '^Verify return code: 0 (ok)' ca $good -verify_ip 127.0.0.1
		for trust in ca pin insecure; do
			check "$trust: protocol" chooses '^ALPN protocol: netchan/1' $trust $good
			check "$trust: a certificate is asked for" chooses '^Requested Signature Algorithms: ' $trust $good
		done
		check "among other protocols" chooses '^ALPN protocol: netchan/1' insecure -tls1_3 -alpn h2,netchan/1,http/1.1
		check "other protocol" refuses 'alert number 120' insecure -tls1_3 -alpn h2
		check "other protocol: told" told insecure 'but not the protocol netchan/1'
		talk insecure -tls1_3 -ign_eof </dev/null # it ends its handshake first, and learns it then
		check "no protocol" has "$dir/said" 'alert number 120'

		for version in tls1 tls1_1 tls1_2; do
			check "$version" refuses 'alert number 70' insecure -$version -cipher DEFAULT@SECLEVEL=0
		done
		check "tls1_2: told" told insecure 'does not speak TLS 1.3'
		for suite in TLS_CHACHA20_POLY1305_SHA256 TLS_AES_128_GCM_SHA256 TLS_AES_256_GCM_SHA384; do
			check $suite chooses "Cipher is $suite" insecure $good -ciphersuites $suite
		done
		for suite in TLS_AES_128_CCM_SHA256 TLS_AES_128_CCM_8_SHA256; do
			check $suite refuses 'alert number 40' insecure $good -ciphersuites $suite
		done
		check "X25519" chooses '^Server Temp Key: X25519' insecure $good -groups X25519
		check "P-256" chooses '^Server Temp Key: ECDH, prime256v1' insecure $good -groups P-256
		# Groups that are slow let a stranger keep the listener busy with a few bytes.
		for group in ffdhe2048 ffdhe8192; do
			check "$group" refuses 'alert number 40\|unexpected eof' insecure $good -groups $group
		done

		# Who shows no certificate, or another's, comes through the handshake, but no further.
		talk ca $good </dev/null
		check "no certificate: told" told ca '^rejected it showed no certificate, and options.ca'
		talk pin $good </dev/null
		check "no certificate: told" told pin '^rejected it showed no certificate, and options.pin'
		talk ca $good $show_other </dev/null
		check "other certificate: told" told ca '^rejected its certificate .* was issued by "CN=other authority"'
		talk pin $good $show_other </dev/null
		check "other certificate: told" told pin \
			"^rejected its key is $(cat "$dir/other.pin"), and options.pin is $(cat "$dir/client.pin")"
		talk ca $good $show_client </dev/null
		check "client's certificate: it goes" told ca '^rejected it closed the connection'

		check "key" chooses '^Server Temp Key: X25519' shared_key $good $show_key
		for suite in TLS_CHACHA20_POLY1305_SHA256 TLS_AES_128_GCM_SHA256; do
			check "key, $suite" chooses "Reused, TLSv1.3, Cipher is $suite" shared_key $good $show_key -ciphersuites $suite
		done
		check "key, protocol" chooses '^ALPN protocol: netchan/1' shared_key $good $show_key
		check "key, forward secrecy" chooses '^Server Temp Key: ' shared_key $good $show_key -allow_no_dhe_kex
		check "no key" refuses 'alert number' shared_key $good
		check "no key, but a certificate" refuses 'alert number' shared_key $good $show_client
		check "no key: told" told shared_key '^rejected it does not prove our shared_key'
		check "other id" refuses 'alert number' shared_key $good -psk_identity shared_key:0123456789abcdef -psk "$key"
		check "other id: told" told shared_key \
			'^rejected its key is "shared_key:0123456789abcdef", and options.shared_key is "'"$id"
		check "other key" refuses 'alert number' shared_key $good -psk_identity "$id" -psk "0${key#?}"

		openssl_sessions
	}
}

# An external key as a session, with which early data may be sent.
make_session() {
	cat >"$dir/session.conf" <<-END
		asn1=SEQUENCE:session
		[session]
		structure=INTEGER:1
		version=INTEGER:0x0304
		suite=FORMAT:HEX,OCTETSTRING:1303
		id=OCTETSTRING:
		secret=FORMAT:HEX,OCTETSTRING:$key
		time=EXPLICIT:1,INTEGER:$(date +%s)
		seconds=EXPLICIT:2,INTEGER:7200
		early_data=EXPLICIT:15,INTEGER:16384
		protocol=EXPLICIT:16,OCTETSTRING:netchan/1
	END
	openssl asn1parse -genconf "$dir/session.conf" -noout -out "$dir/session.der" &&
		openssl sess_id -inform DER -in "$dir/session.der" -out "$dir/session.pem"
}

# No tickets, no resumption by TLS, no early data, no new keys within a connection. The pauses let wrong things happen.
openssl_sessions() {
	# shellcheck disable=SC2086 # the arguments are lists of words
	for trust in insecure shared_key; do
		show=
		[ $trust = insecure ] || show=$show_key
		sleep 0.3 | talk $trust $good $show -sess_out "$dir/ticket"
		check "$trust: no ticket" test ! -e "$dir/ticket"
		check "$trust: no ticket" lacks "$dir/said" 'New Session Ticket'
		{ echo K && sleep 0.3; } | talk $trust $good $show # a command of openssl's: change the keys
		check "$trust: new keys are refused" has "$dir/said" 'KEYUPDATE'
		{ echo R && sleep 0.3; } | talk $trust $good $show # and another: negotiate again
		check "$trust: nothing is negotiated again" has "$dir/said" '^RENEGOTIATING\|wrong ssl version'
		check "$trust: all is well" dials $trust
	done
	check "a session for early data" make_session
	echo "this is early" >"$dir/early"
	check "other's session" chooses '^New, ' insecure $good -sess_in "$dir/session.pem"
	sleep 0.3 | talk shared_key $good -psk_identity "$id" -psk_session "$dir/session.pem" -early_data "$dir/early"
	check "early data" has "$dir/said" '^Early data was rejected'
	sleep 0.3 | talk insecure $good -sess_in "$dir/session.pem" -early_data "$dir/early"
	check "early data of nobody" lacks "$dir/said" '^Early data was accepted'
}

# ---- openssl s_server: what a dialler says of those who are no netchan, or who are somebody else. ----
# meets WORDS TRUST ARGUMENTS...: the dialler says this of such a server.
meets() {
	words=$1 trust=$2
	shift 2
	begin timeout 30 openssl s_server -accept 127.0.0.1:0 "$@"
	until [ "${line#ACCEPT }" != "$line" ]; do read -r line <&3 || break; done
	cat <&3 >"$dir/served" 4>&- &
	exec 3<&-
	"$tls" dial "$trust" "$dir" "${line#ACCEPT }" >"$dir/said" 4>&-
	kill "$begun"
	wait "$begun" 2>/dev/null
	has "$dir/said" "$words"
}
openssl_server() {
	good="-tls1_3 -alpn netchan/1" show_server="-cert $dir/server.pem -key $dir/server.key"
	# shellcheck disable=SC2086 # the arguments are lists of words
	{
		check "TLS 1.2 server" meets 'does not speak TLS 1.3' ca -tls1_2 $show_server
		check "server with another protocol" meets 'but not the protocol netchan/1' ca -tls1_3 -alpn h2 $show_server
		check "server without a protocol" meets 'but not the protocol netchan/1' pin -tls1_3 $show_server
		check "server with a client's certificate" meets 'not for TLS servers' ca $good $show_client
		check "server of another authority" meets 'was issued by "CN=other authority"' ca $good $show_other
		check "server with another key" meets "its key is $(cat "$dir/other.pin")" pin $good $show_other
		check "server without our key" meets 'does not accept our shared_key' shared_key $good $show_server
		check "server with another key" meets 'does not \(accept\|prove\) our shared_key' shared_key $good -nocert \
			-psk_identity "$id" -psk "0${key#?}"
		# Those who are right are still no netchan.
		check "server with our key" meets 'no connection within' shared_key $good -nocert $show_key
		check "our order" has "$dir/served" \
			'^Shared ciphers:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384$'
		check "our choice" has "$dir/served" '^CIPHER is TLS_CHACHA20_POLY1305_SHA256$'
		check "server of our authority" meets 'no connection within' ca $good $show_server -Verify 1 -CAfile "$dir/ca.pem"
		check "our certificate" has "$dir/served" '^subject=CN = client'
		check "our groups" lacks "$dir/served" '^Supported groups:.*ffdhe'
	}
}

if installed openssl; then
	openssl_client
	openssl_server
fi

# ---- sslscan ----
# sorted PATTERN: what it matches in what sslscan says, in one line.
sorted() { sed -n "s/^$1.*/\\1/p" "$dir/scan" | LC_ALL=C sort | paste -s -d ' ' -; }
if installed sslscan; then
	for trust in ca pin insecure; do
		sslscan --no-colour --no-check-certificate "127.0.0.1:$(port $trust)" >"$dir/scan" 2>&1 4>&-
		check "sslscan $trust: versions" is "$(sorted '\(\(SSL\|TLS\)v[0-9.]*  *[de][a-z]*abled\)' | tr -s ' ')" \
			"SSLv2 disabled SSLv3 disabled TLSv1.0 disabled TLSv1.1 disabled TLSv1.2 disabled TLSv1.3 enabled"
		check "sslscan $trust: suites" is "$(sorted '[AP][a-z]* *TLSv1.3 .* \(TLS_[A-Z0-9_]*\)')" \
			"TLS_AES_128_GCM_SHA256 TLS_AES_256_GCM_SHA384 TLS_CHACHA20_POLY1305_SHA256"
		check "sslscan $trust: groups" is "$(sorted 'TLSv1.3  *[0-9]* bits  *\([a-z0-9]*\)')" "secp256r1 secp384r1 x25519"
		check "sslscan $trust: no renegotiation" has "$dir/scan" '^Session renegotiation not supported'
		check "sslscan $trust: no heartbleed" lacks "$dir/scan" '[^t] vulnerable'
	done
	sslscan --no-colour "127.0.0.1:$(port shared_key)" >"$dir/scan" 2>&1 4>&-
	check "sslscan shared_key: nothing without the key" is "$(sorted '\(TLSv1.* *enabled\)')$(sorted '\(Accepted\|Preferred\)')" ""
fi

# ---- testssl. It stays on this machine. What it finds of severity LOW and worse is a failure, but for
#   engine_problem    openssl is not the one that testssl's authors build
#   cert_revocation   the certificate names neither a list of revoked ones nor who knows of them: those of this test have none
# It knows that this is no HTTP server, and leaves that out. ----
findings() {
	sed -n 's/^ *"\(id\|severity\|finding\)" *: "\(.*\)",*$/\1 \2/p' "$dir/found" |
		awk '{ word[$1] = substr($0, length($1) + 2) } $1 == "finding" { print word["severity"], word["id"], word["finding"] }'
}
scan() {
	rm -f "$dir/found"
	listen ca scanned # a new one, which does not know this address for its failures
	testssl --quiet --color 0 --warnings off --openssl="$(command -v openssl)" -n none --ip 127.0.0.1 --add-ca "$dir/ca.pem" \
		--jsonfile "$dir/found" -p -s -f -S -P -h -U "localhost:$(port scanned)" >"$dir/scan" 2>&1 </dev/null 4>&-
	findings >"$dir/findings"
}
case ${CFLAGS-} in
*-fsanitize*) slow=yes ;;
*) slow= ;;
esac
if [ -n "$slow" ]; then echo "testssl is left out: it would take minutes"
elif installed openssl && installed testssl; then
	scan
	# The machine is so busy that the tools gave up waiting for each other: once more.
	if grep '^WARN ' "$dir/findings" | grep -qv '^WARN engine_problem '; then scan; fi
	check "testssl: nobody came in" counts scanned up 0
	for id in SSLv2 SSLv3 TLS1 TLS1_1 TLS1_2; do check "testssl $id" has "$dir/findings" "^[A-Z]* $id not offered"; done
	check "testssl TLS1_3" has "$dir/findings" '^OK TLS1_3 offered'
	check "testssl: forward secrecy" has "$dir/findings" '^OK PFS offered\|^OK FS offered'
	check "testssl: name" has "$dir/findings" '^OK cert_trust Ok via SAN'
	check "testssl: authority" has "$dir/findings" '^OK cert_chain_of_trust passed'
	check "testssl: it looked at much" test "$(wc -l <"$dir/findings")" -gt 60
	grep '^\(LOW\|MEDIUM\|HIGH\|CRITICAL\|WARN\|FATAL\) ' "$dir/findings" |
		grep -v '^WARN engine_problem \|^HIGH cert_revocation ' >"$dir/bad"
	check "testssl: nothing is bad" lacks "$dir/bad" .
fi

# ---- After all of that they are well, and hold nothing; nobody has come in but those who should. ----
for trust in ca pin insecure shared_key; do
	check "a dialler with $trust, at last" dials $trust
	guests=$(eval "echo \$guests_$trust")
	check "$trust: all have gone" eventually counts $trust drained "$guests"
	check "$trust: nobody else came" counts $trust up "$guests"
done
exec 4>&-
for pid in $listeners; do check "a listener ends" wait "$pid"; done
pids=
finish
