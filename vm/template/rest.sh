# Waits for the end of a boot, and takes out what belongs to the template's own
# life: its seed, what cloud-init remembers of it, and the page cache, into which
# the first login's files are then read back. The last pause lets the balloon
# driver report freed pages to the host, which it does every two seconds
# (https://docs.kernel.org/mm/free_page_reporting.html).
#
# No TCP connection is ever opened in a template: the kernel chooses the secret
# of its sequence numbers at the first one, so that each clone chooses its own.
#
# The arguments are who logs in, and the file that says by which keys.
set -eu
user=$1 keys=$2
until [ -e /run/cloud-init/result.json ]; do sleep 0.2; done
grep -q '"errors": \[\]' /run/cloud-init/result.json || { cat /run/cloud-init/result.json; exit 1; }
until ip -4 -o address show scope global | grep -q . && [ -s /run/sshd.pid ]; do sleep 0.2; done
until [ -z "$(systemctl list-jobs --no-legend)" ]; do sleep 0.2; done
udevadm settle
for module in virtio_balloon virtiofs; do modprobe -q $module || :; done
umount /var/lib/cloud/seed/nocloud
rm -rf /var/lib/cloud/instance /var/lib/cloud/instances/* /var/lib/cloud/data/* /run/cloud-init/instance-data*.json \
	/run/cloud-init/combined-cloud-config.json /run/cloud-init/.instance-id
# Whoever logs in again waits for it, and it was a link to what is gone now.
rm -f /run/cloud-init/result.json
echo '{"v1": {"datasource": null, "errors": []}}' >/run/cloud-init/result.json
install -d -m 700 -o "$user" -g "$user" "$(dirname "$keys")"
install -m 600 -o "$user" -g "$user" /dev/null "$keys"
# sshd starts, and waits in opening its host key, which each clone has its own
# of. The pipe is in memory: a disk that loses the key boots all the same.
key=/etc/ssh/ssh_host_ed25519_key
systemctl stop ssh.service
mkfifo -m 600 /run/ssh_host_key
ln -sf /run/ssh_host_key $key
rm $key.pub
touch $key.pub
systemctl start --no-block ssh.service
until cat "/proc/$(systemctl show -P MainPID ssh.service)"/task/*/wchan | grep -q wait_for_partner; do sleep 0.1; done
sync
echo 3 >/proc/sys/vm/drop_caches
for program in /usr/lib/guest/sshd /bin/bash /bin/sh; do
	echo "$program"
	ldd "$program" | grep -o '/[^ ]*' || : # the first has none
done | sort -u | xargs cat >/dev/null
# Events of what is plugged in wait until the machine is in use (package line).
# The kernel has it working without; the rules of udev are programs to translate.
udevadm control --stop-exec-queue
echo 1 >/proc/sys/vm/compact_memory
sleep 5
# It reports large pieces alone. The small ones are what the kernel gives away
# first, so zeros are put into them, which take no room in a template: half as
# many as there is room for where that is little.
zeros=$(awk '/^MemAvailable:/ { half = int($2 / 2); print (half < 49152 ? half : 49152) }' /proc/meminfo)
head -c "${zeros}K" /dev/zero >/dev/shm/zeros || :
rm -f /dev/shm/zeros
# The journal waits, too: what is logged from here on lies in its sockets.
journal=$(systemctl show -P MainPID systemd-journald)
if [ "$journal" -gt 1 ]; then kill -STOP "$journal"; fi
