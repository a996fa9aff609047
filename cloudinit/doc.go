// Package cloudinit makes the NoCloud seed of a virtual machine: the small
// ISO image, labelled cidata, from which cloud-init in the guest learns who
// may log in, which files to write and what to mount.
//
// It promises:
//
//   - The seed is a pure function of its [Config]. The same input gives the
//     same bytes, on any day and on any machine.
//   - The instance-id is a digest of everything else in the seed. A guest
//     repeats its first-boot work exactly when the content has changed.
//   - Every value reaches cloud-init as the string it was. Strings are always
//     written in YAML's double-quoted style, so that no value can be taken for
//     a number, a boolean or more YAML.
//   - What cloud-init, or the system below it, would misunderstand is refused
//     with an error wrapping [ErrInvalid] that names the field.
//   - The ISO is readable by its owner alone and appears whole or not at all.
//   - Looking at the host ([HostProbe]) changes nothing and is kept apart from
//     building the seed.
//
// It speaks the dialect that cloud-init 22.4 (Debian 12) and 25.1 (Debian 13)
// share. References: https://docs.cloud-init.io/en/latest/reference/modules.html
// and https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html.
package cloudinit
