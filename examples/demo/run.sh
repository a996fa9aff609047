#!/bin/sh
# The main job, for real: a virtual machine for a project, a coding agent (Pi)
# that mends the project from inside, a policy that lets it reach its model and
# nothing else, and nothing left behind. The model is a script on this host.
set -eu
cd "$(dirname "$0")/../.."
root=$PWD
PATH=$PATH:/usr/sbin:/sbin
name=demo-$$
work=$(mktemp -d "${TMPDIR:-/tmp}/agentvm-demo.XXXXXX")
project=$work/project
model=

step() { printf '\n==> [%3d s] %s\n' "$(($(date +%s) - started))" "$*"; }
show() { # show COMMAND...: as if typed in the project
	printf '    $ %s\n' "$*"
	(cd "$project" && "$@")
}
fail() {
	printf '\ndemo: FAILED: %s\n' "$*" >&2
	exit 1
}
agentvm() { "$root/bin/agentvm" "$@"; }

# Runs however the demo ends. The machine is ours by its name, and only ours.
clean_up() {
	status=$?
	trap - EXIT INT TERM HUP
	if [ -e "$project/agentvm.yaml" ] && [ -x "$root/bin/agentvm" ]; then
		if [ $status != 0 ]; then (cd "$project" && agentvm logs 2>/dev/null | tail -n 30) || true; fi
		(cd "$project" && agentvm down >/dev/null 2>&1) || true
	fi
	[ -z "$model" ] || kill "$model" 2>/dev/null || true
	if [ $status != 0 ] && [ -s "$work/model.log" ]; then
		echo 'demo: what the model server saw last:' >&2
		tail -n 5 "$work/model.log" >&2
	fi
	rm -rf "$work"
	exit $status
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# The processes of this demo's machine: those that name it or its workspace,
# and all their descendants.
processes() {
	ps -eo pid=,ppid=,args= | awk -v name="$name" -v work="$work" -v self="$$" '
		{ pid[NR] = $1; parent[$1] = $2; line[$1] = $0 }
		(index($0, name) || index($0, work)) && !/awk -v|modelserver/ { ours[$1] = 1 }
		END {
			delete ours[self]
			do {
				grown = 0
				for (p in parent) if (!(p in ours) && (parent[p] in ours)) grown = ours[p] = 1
			} while (grown)
			for (p in ours) print line[p]
		}'
}
mounts() { grep -F -e "$name" -e "$work" /proc/self/mountinfo || true; }
sockets() { # sockets DIR: those below it that somebody holds, and DIR itself
	awk -v dir="$1/" 'index($8, dir) == 1 { print "socket", $8 }' /proc/net/unix
	[ ! -e "$1" ] || echo "directory $1"
}
tcp_listeners() { awk '$4 == "0A" { print $2 }' /proc/net/tcp /proc/net/tcp6 2>/dev/null | sort; }

started=$(date +%s)
step 'building agentvm, and the model server that only tests and this demo use'
.ci/go build -trimpath -buildvcs=false -o "$work/modelserver" ./cmd/modelserver
make -s build

step 'starting a scripted model on this host: real protocol, no network, no key'
"$work/modelserver" -script examples/demo/model.yaml >"$work/model.url" 2>"$work/model.log" &
model=$!
tries=0
until [ -s "$work/model.url" ]; do
	tries=$((tries + 1))
	kill -0 "$model" 2>/dev/null && [ $tries -lt 100 ] || fail "the model server did not start: $(cat "$work/model.log")"
	sleep 0.1
done
url=$(cat "$work/model.url")
address=${url#http://}
address=${address%/v1}
echo "    $url"

step "copying the project to $project"
cp -R examples/demo/project "$project"
sed -i -e "s/^name: .*/name: $name/" -e "s/127\.0\.0\.1:8080/$address/" "$project/agentvm.yaml"
grep -q "$address" "$project/agentvm.yaml" || fail 'the project does not name the model server'
cp "$project/slug.py" "$work/slug.before"
tcp_listeners >"$work/tcp.before"

step 'a virtual machine for the project (its image is built the first time)'
show agentvm up

step 'Pi works in it: it reads, edits and runs the tests'
code=0
show agentvm run -- -p --no-session --model fake/scripted-1 \
	'The tests in test_slug.py fail. Mend slug.py and run them again.' || code=$?
echo "    exit code of Pi: $code"
[ $code = 0 ] || fail 'Pi did not succeed'

step 'what changed on this host, while the machine runs'
diff -u --label slug.py --label slug.py "$work/slug.before" "$project/slug.py" && fail 'slug.py is as it was'
[ -s "$project/CHANGES.md" ] || fail 'CHANGES.md is not there'
owner=$(stat -c %U "$project/CHANGES.md")
echo "    CHANGES.md belongs to $owner: $(cat "$project/CHANGES.md")"
[ "$owner" = "$(stat -c %U "$project")" ] || fail 'the new file belongs to somebody else'
show agentvm exec -- python3 -B test_slug.py || fail 'the tests fail in the machine'

step 'nothing but the model can be reached from inside'
show agentvm exec -- curl -sS -m 20 -o /dev/null -w '    model: HTTP %{http_code}\n' \
	http://model.internal:8080/v1/models || fail 'the model cannot be reached'
for target in https://deb.debian.org/ http://1.1.1.1/ http://169.254.169.254/ http://192.168.127.1:22/; do
	code=0
	show agentvm exec -- curl -sS -m 5 -o /dev/null "$target" || code=$?
	case $code in
	0) fail "$target was reached" ;;
	[6-7] | 28 | 35 | 52 | 56) echo "    refused (curl: $code)" ;;
	*) fail "curl ended with $code, which says nothing about the network" ;;
	esac
done

step 'taking it down, and looking for anything that is left'
processes >"$work/processes"
tcp_listeners >"$work/tcp.running"
run=$(sed -n 's|.*path=\([^,]*\)/vm/qmp\.sock.*|\1|p' "$work/processes" | head -n 1)
[ -n "$run" ] || fail 'QEMU is not among the processes, so looking for what is left proves nothing'
echo "    $(grep -c . "$work/processes") processes while it ran; TCP ports opened on the host: $(
	comm -13 "$work/tcp.before" "$work/tcp.running" | grep -c . || true)"
show agentvm down
agentvm ls >"$work/machines" || fail 'the machines cannot be listed, so looking for this one proves nothing'
left=$(
	processes
	while read -r pid _ _ command _; do
		[ ! -e "/proc/$pid" ] || [ "$(tr '\0' ' ' <"/proc/$pid/cmdline" | cut -d' ' -f1)" != "$command" ] ||
			echo "process $pid $command"
	done <"$work/processes"
	mounts
	sockets "$run"
	grep -F "$name" "$work/machines" || true
)
[ -z "$left" ] || fail "left behind:
$left"
echo '    no process, no mount, no socket, no machine'

step 'done: the agent changed the project, and only the project'
