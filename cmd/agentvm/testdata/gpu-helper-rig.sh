#!/bin/busybox sh
# The init of a machine with an IOMMU of QEMU's, in which ordinary users take
# a card by the real sudo and the real program. What starts with "rig " is for
# the test.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
export PATH=/bin:/usr/bin HOME=/root
exec </dev/null
for module in irqbypass vfio vfio_iommu_type1 vfio-pci-core vfio-pci; do insmod /$module.ko; done
chmod 666 /dev/vfio/vfio # as udev has it
ln -s /proc/self/fd/0 /dev/stdin
hostname rig

umask 022
mkdir -p /etc/pam.d /etc/sudoers.d /var/log /tmp
chmod 755 / /etc /usr /usr/bin /var /var/log
printf 'root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/:/bin/sh\nbob:x:1001:1001::/:/bin/sh\neve:x:1002:1002::/:/bin/sh\n' >/etc/passwd
printf 'root:x:0:\nalice:x:1000:\nbob:x:1001:\neve:x:1002:\n' >/etc/group
printf 'root:!::::::::\nalice:!:::::::\nbob:!:::::::\neve:!:::::::\n' >/etc/shadow
printf '127.0.0.1 localhost rig\n' >/etc/hosts
for kind in auth account session; do echo "$kind sufficient pam_permit.so"; done >/etc/pam.d/sudo
cp /etc/pam.d/sudo /etc/pam.d/other
printf 'root ALL=(ALL) ALL\n@includedir /etc/sudoers.d\n' >/etc/sudoers
chmod 440 /etc/sudoers

card=0000:01:00.0
at=/sys/bus/pci/devices/$card
group=$(readlink $at/iommu_group)
node=/dev/vfio/${group##*/}
is() { # is WHAT: how the card is, and whose
	driver=$(readlink $at/driver)
	echo "rig $1: driver ${driver##*/}, override $(cat $at/driver_override), node of $(stat -c %u $node 2>/dev/null), journals $(ls /var/lib/agentvm/gpu 2>/dev/null | wc -l)"
}
as() { # as USER NAME COMMAND...: the exit code of what USER does
	user=$1 name=$2
	shift 2
	su $user -c "$*"
	echo "rig $name: exit $?"
}
helper='sudo -n -- /usr/bin/agentvm gpu-helper'

as alice "not let by sudo" agentvm gpu bind $card
su alice -c "agentvm gpu helper-setup $card" >/setup.sh
sh -eu /setup.sh
echo "rig setup: exit $?"
as alice "own arguments" sudo -n -- /usr/bin/agentvm gpu-helper --force
as alice "another command" sudo -n -- /usr/bin/agentvm gpu bind $card
as alice bind agentvm gpu bind $card
is bound
as alice open "exec 3<>$node"
as bob "bob opens" "exec 3<>$node"

# Others who may run the helper.
printf 'bob ALL=(root) NOPASSWD: /usr/bin/agentvm gpu-helper\neve ALL=(root) NOPASSWD: /usr/bin/agentvm gpu-helper\n' >/etc/sudoers.d/others
sed -i 's/^allow:/allow:\n  - {users: [bob], devices: [any]}/' /etc/agentvm/gpu.yaml
as bob "bob releases" agentvm gpu release $card
as eve "eve releases" agentvm gpu release $card
as eve "eve recovers" agentvm gpu recover
as bob "bob pretends" "SUDO_UID=1000 PKEXEC_UID=1000 agentvm gpu release $card"
is "still bound"

su alice -c "exec 3<>$node; sleep 1000" &
sleep 1
as alice "release while open" agentvm gpu release $card
kill $(pidof sleep)
sleep 1
as alice release agentvm gpu release $card
is released

# With limits under which no file can grow.
as alice "bind under limits" "ulimit -f 0; agentvm gpu bind $card"
is "bound under limits"
as alice "release under limits" "ulimit -f 0; agentvm gpu release $card"
is "released under limits"

# For a process, which then is killed.
su alice -c 'sleep 1000' &
sleep 1
owner=$(pidof sleep)
request="{\"version\":1,\"do\":\"bind\",\"devices\":[\"$card\"],\"name\":\"machine x\",\"process\":{\"pid\":$owner,\"start\":$(cut -d ' ' -f 22 /proc/$owner/stat)}}"
echo "$request" >/tmp/request
chmod 644 /tmp/request
as bob "for another's process" "$helper </tmp/request | grep -o 'not a running one of yours'"
as alice "for a process" "$helper </tmp/request | cut -c 1-13"
is "bound for a process"
as alice "recover while it lives" agentvm gpu recover
kill -9 $owner
sleep 1
as bob "recover after it" agentvm gpu recover
is recovered

chmod 666 /etc/agentvm/gpu.yaml
as alice "list that all write" agentvm gpu bind $card
chmod 644 /etc/agentvm/gpu.yaml
chmod 777 /usr/bin
as alice "program that all replace" agentvm gpu bind $card
chmod 755 /usr/bin
is end
echo "rig log: $(stat -c '%a %u' /var/log/agentvm/gpu.jsonl), $(grep -c '"result":"asked"' /var/log/agentvm/gpu.jsonl) asked, $(grep -c '"result":"done"' /var/log/agentvm/gpu.jsonl) done, $(grep -c '"result":"refused"' /var/log/agentvm/gpu.jsonl) refused, $(grep -c '"result":"failed"' /var/log/agentvm/gpu.jsonl) failed"

# The caller's control group and terminal have no power over the helper.
mount -t cgroup2 cgroup /sys/fs/cgroup
mkdir /sys/fs/cgroup/alice
mkfifo -m 666 /tmp/ask
sh -c 'echo 0 >/sys/fs/cgroup/alice/cgroup.procs; exec su alice -c "$1"' sh "$helper </tmp/ask >/dev/null 2>&1" &
exec 9>/tmp/ask
sleep 1
pid=$(pidof agentvm)
kill -TSTP "$pid"
sleep 0.2
echo "rig helper: group $(cut -d : -f 3 /proc/$pid/cgroup), caller's $(wc -l </sys/fs/cgroup/alice/cgroup.procs), state $(sed -n 's/^State:[^A-Z]*\(.\).*/\1/p' /proc/$pid/status)"
exec 9>&-
wait

# Killed while it binds.
for wait in 0 0.05 0.1 0.2; do
	su alice -c "agentvm gpu bind $card" &
	until [ -e /var/lib/agentvm/gpu/$card.json ]; do usleep 5000; done
	sleep $wait
	kill -9 $(pidof agentvm)
	wait
	su alice -c 'agentvm gpu recover'
	su alice -c "agentvm gpu release $card" # where it had just finished
	is killed
done
echo rig done
poweroff -f
