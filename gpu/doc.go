// Package gpu takes graphics cards and accelerators from the host's drivers,
// so that a virtual machine can have them, and always gives them back.
//
// It promises:
//
//   - Looking changes no device and needs no privilege. A host without a card,
//     without an IOMMU or without a database of names is not an error.
//   - All checks of all devices come before the first write. A device is
//     taken with every function of its slot, or not at all.
//   - What a device was like is on disk, synced, before each step that changes
//     it. Whenever the process is killed, Recover gives the device back, and
//     however often Recover is stopped itself.
//   - A step that fails puts back everything done before it, last step first.
//   - A device that was bound to vfio-pci already is left so when it is
//     released. Bridges are never touched.
//   - A device that cannot be given back keeps its journal, and the error
//     says what is in the way. Nothing waits without a bound: writes that can
//     block, as to a driver's unbind file, are another process's, and so is
//     reading what the kernel keeps to itself meanwhile.
//
// Everything is read and written below Host.Root, so that tests can stand in
// for /sys, /proc and /dev. A program that looks at a real host calls ReadMain
// first thing in main when its first argument is ReadArg, and one that binds
// WriteMain for WriteArg.
package gpu
