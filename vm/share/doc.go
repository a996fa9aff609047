// Package share serves host directories to a guest over virtiofs.
//
// It drives virtiofsd in both flavours that users have, the C one that came
// with QEMU up to 7.2 and the Rust one that replaced it, and promises the same
// for each, whatever root in the guest does:
//
//   - The daemon holds neither the host's root user nor a capability over the
//     host. It runs in user, mount, PID, network and IPC namespaces of its own.
//     Run by root, it acts as an unprivileged uid through an idmapped mount.
//   - Every file made from the guest, by its root too, belongs to the owner of
//     the shared directory. The guest's agent sees the owner's files as its own.
//   - Device nodes and set-user-id and set-group-id bits cannot be made.
//   - Read-only shares, protected and hidden paths are mounts in the daemon's
//     own mount namespace; remounting in the guest changes nothing.
//   - What is mounted below the shared directory on the host is not shared.
//   - The daemon dies with the process that started it, however that one dies,
//     and leaves no process, mount or socket.
//
// Linux has no way to start a process inside mounts that it has yet to make,
// so a program that uses this package calls InitMain first thing in main, for
// the copies of itself that Start runs:
//
//	if len(os.Args) > 1 && os.Args[1] == share.InitArg {
//		os.Exit(share.InitMain())
//	}
package share
