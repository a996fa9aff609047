// Package network is the only way out of a virtual machine: a network stack
// in user space, inside the supervisor, that answers the guest itself and
// decides on the host about everything that wants to leave.
//
// It promises:
//
//   - Nothing leaves unless a [Rule] or a [Service] of the [Policy] names it.
//     An empty policy lets nothing out, for every protocol.
//   - The guest never learns or chooses a real address of a name. Each allowed
//     name gets an address of its own from 198.18.0.0/15; a connection to that
//     address says which name is meant, and the host resolves and dials it.
//   - Addresses that are not public are refused even if an allowed name
//     resolves to them, unless a rule names them.
//   - What a hostile guest sends costs the host a bounded amount of memory,
//     sockets and log lines.
//   - No privilege, no interface and no port on the host.
//
// Frames travel over a stream socket, each behind its 32-bit big-endian
// length, as QEMU's "-netdev stream" does. The guest is root and hostile;
// nothing here believes what it sends.
package network
