// Package qemu runs a vm.Machine as a QEMU process, in three separate steps:
//
//   - Probe asks a QEMU binary what it can do, and ProbeAccel whether hardware
//     virtualization works here, by booting a kernel with it;
//   - Argv turns a vm.Machine and those Caps into a command line: a pure
//     function;
//   - Start runs it, and a Process cannot outlive whoever started it.
//
// It promises that QEMU gets nothing to work with beyond what the Machine
// names: no default devices, no configuration files, no display, no network
// port, QEMU's seccomp filter always on, none of our environment, no guest
// memory in core files. Paths may hold any byte but NUL.
//
// What a binary supports is asked for, never derived from its version.
package qemu
