// Package libvirt runs a vm.Machine as a domain of the host's libvirt, in
// three separate steps as package qemu does:
//
//   - Open connects to a libvirt and refuses one that cannot keep the promises;
//   - XML turns a vm.Machine into a domain: a pure function, whose result
//     libvirt checks against its own schema before it does anything;
//   - Start creates the domain, which lives no longer than whoever started it.
//
// It promises that every call ends: with libvirt's answer, at its context's
// deadline (or DefaultTimeout where there is none), or when the connection
// ends, after which the next call connects again. libvirt may restart without
// the machine noticing. A domain is touched only when its metadata says that it
// is this machine's. QEMU runs as the same unprivileged user as without
// libvirt, under a seccomp filter, or it does not run; what else libvirt puts
// around it (sVirt labels, control groups) stays.
//
// The network stays ours: the domain has no <interface>, and its one card is
// QEMU's stream netdev, which libvirt has no element for.
//
// Format: https://libvirt.org/formatdomain.html
package libvirt
