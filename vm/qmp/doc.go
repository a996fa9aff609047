// Package qmp talks to QEMU's machine protocol.
//
// It builds on github.com/digitalocean/go-qemu/qmp: a Client is a
// qmp.Monitor, and every verb here (Status, Powerdown, DeviceAdd, ...) is
// written once against that interface, so it serves a QEMU process of ours and
// a libvirt domain reached through qmp.LibvirtRPCMonitor alike.
//
// Client replaces go-qemu's SocketMonitor. It promises:
//
//   - every command ends: at its reply, at its context's deadline (or
//     DefaultTimeout where there is none), or when the connection ends;
//   - a reply may have any size up to MaxMessage and belongs to its caller;
//   - a reply that comes after its caller gave up is dropped, never given to
//     the next command;
//   - events never delay a command: each subscription is bounded, loses its
//     oldest event when full, and counts what it lost;
//   - when the connection ends, every waiter learns of it: ErrClosed, with
//     the reason.
//
// Protocol: https://www.qemu.org/docs/master/interop/qmp-spec.html
package qmp
