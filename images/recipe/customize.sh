#!/bin/sh
# customize.sh ROOT SUITE: turns a freshly bootstrapped Debian tree into the
# guest. An mmdebstrap customize hook: runs outside the tree, as root or as
# root of a user namespace, and writes only below ROOT. What each choice is
# worth, in seconds and megabytes, is in docs/guest-image.md.
set -eu
root=$1 suite=$2
here=$(cd "$(dirname "$0")" && pwd)
units=$root/etc/systemd/system

mask() { # mask UNIT...
	for unit; do ln -sf /dev/null "$units/$unit"; done
}

wants() { # wants TARGET UNIT...: TARGET starts each UNIT of ours
	mkdir -p "$units/$1.wants"
	target=$1
	shift
	for unit; do ln -sf "../$unit" "$units/$target.wants/$unit"; done
}

# The host may have kept no file modes of the recipe.
rm -f "$root/etc/resolv.conf"
(cd "$here/rootfs" && find . -type f) | while read -r file; do
	mkdir -p "$root/${file%/*}"
	rm -f "$root/$file"
	cp "$here/rootfs/$file" "$root/$file"
	chmod 644 "$root/$file"
done
chmod 755 "$root/etc/acpi/PWRF/00000080" "$root/usr/lib/guest/cloud-init-boot"
# Whoever may not read a program may not look into its process.
chmod 711 "$root/usr/lib/guest/sshd"

# No identity is baked in: cloud-init brings names, users and keys.
rm -f "$root"/etc/ssh/ssh_host_* "$root/etc/hostname"
: >"$root/etc/machine-id"
chroot "$root" passwd -q -l root

# Units of a machine with a console login, a TPM, EFI, swap, a battery, local
# disks to check, logs to keep, or a state to carry from one boot to the next.
mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer man-db.timer \
	e2scrub_all.timer e2scrub_reap.service fstrim.timer \
	getty.target systemd-ask-password-console.path systemd-ask-password-wall.path \
	systemd-logind.service systemd-user-sessions.service systemd-hostnamed.socket \
	systemd-binfmt.service proc-sys-fs-binfmt_misc.automount \
	systemd-firstboot.service systemd-machine-id-commit.service \
	systemd-hwdb-update.service systemd-update-done.service ldconfig.service \
	systemd-journal-catalog-update.service systemd-journal-flush.service systemd-sysusers.service \
	systemd-pcrmachine.service systemd-pcrphase.service systemd-pcrphase-sysinit.service \
	systemd-pcrextend.socket systemd-pcrlock.socket \
	systemd-tpm2-setup.service systemd-tpm2-setup-early.service \
	systemd-pstore.service systemd-random-seed.service systemd-hibernate-clear.service \
	systemd-repart.service systemd-update-utmp.service systemd-remount-fs.service \
	systemd-sysext.socket systemd-creds.socket systemd-initctl.socket \
	systemd-network-generator.service systemd-networkd-wait-online.service \
	systemd-networkd-persistent-storage.service systemd-modules-load.service \
	systemd-udev-load-credentials.service systemd-tmpfiles-setup-dev-early.service \
	dev-hugepages.mount dev-mqueue.mount run-lock.mount sys-fs-fuse-connections.mount \
	sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
	cryptsetup.target integritysetup.target veritysetup.target
ln -sf /usr/lib/systemd/system/multi-user.target "$units/default.target"

# D-Bus starts with its first user, by its socket.
rm -f "$root/usr/lib/systemd/system/multi-user.target.wants/dbus.service" \
	"$root/lib/systemd/system/multi-user.target.wants/dbus.service"

# Generators run before anything else; only these have something to generate.
mkdir -p "$root/etc/systemd/system-generators"
for generator in "$root"/usr/lib/systemd/system-generators/* "$root"/lib/systemd/system-generators/*; do
	case ${generator##*/} in
	systemd-fstab-generator | systemd-run-generator | \*) ;;
	*) ln -sf /dev/null "$root/etc/systemd/system-generators/${generator##*/}" ;;
	esac
done

# Logins are welcome during boot.
ln -sf /dev/null "$root/etc/tmpfiles.d/systemd-nologin.conf"

# /tmp is memory, as Debian 13 has it.
if [ "$suite" = bookworm ]; then
	cp "$root/usr/share/systemd/tmp.mount" "$units/tmp.mount"
	wants local-fs.target tmp.mount
fi

# cloud-init without its generator, which looks for clouds, and without its
# units, which cloud-init-main.service of this recipe replaces.
rm -rf "$root"/etc/cloud/cloud.cfg.d "$units"/cloud-init.target.wants "$units"/cloud-config.target.wants
mask cloud-init-local.service cloud-init-network.service cloud-init.service cloud-config.service \
	cloud-final.service cloud-init-hotplugd.socket cloud-init-hotplugd.service
mkdir -p "$root/var/lib/cloud/seed/nocloud" "$units/multi-user.target.wants"
ln -sf /usr/lib/systemd/system/cloud-init.target "$units/multi-user.target.wants/cloud-init.target"
wants cloud-init.target cloud-init-main.service systemd-networkd.path coldplug.path

wants multi-user.target ssh.service power-button.service

# Compiled from what dpkg.cfg leaves out.
rm -f "$root/usr/lib/udev/hwdb.bin" "$root/lib/udev/hwdb.bin"

# systemd skips what it would do for a changed /usr.
touch "$root/etc/.updated" "$root/var/.updated"
