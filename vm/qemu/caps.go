package qemu

import (
	"slices"

	"github.com/digitalocean/go-qemu/qmp"
)

// Binary is the emulator's usual name on PATH.
const Binary = "qemu-system-x86_64"

// Caps is what one QEMU binary can do, by its own account.
type Caps struct {
	Binary  string      `json:"binary"`  // absolute path
	Build   string      `json:"build"`   // identifies this very file
	Version qmp.Version `json:"version"` // for people only

	Machine      string   `json:"machine"`       // what the alias q35 stands for, pc-q35-7.2 say
	MachineProps []string `json:"machine_props"` // of Machine
	Devices      []string `json:"devices"`       // -device drivers
	Objects      []string `json:"objects"`       // -object types
	Netdevs      []string `json:"netdevs"`       // -netdev types
	Accels       []Accel  `json:"accels"`        // compiled in, which says nothing about the host
	TCGProps     []string `json:"tcg_props"`     // -accel tcg properties
	Sandbox      bool     `json:"sandbox"`       // seccomp filter compiled in

	// UEFI is the firmware that the host has for this binary, nil for none.
	// It belongs to the host, not the binary, so it is not cached.
	UEFI *UEFI `json:"-"`
}

// HasDevice reports whether -device knows the driver.
func (c Caps) HasDevice(name string) bool { return slices.Contains(c.Devices, name) }

// HasObject reports whether -object knows the type.
func (c Caps) HasObject(name string) bool { return slices.Contains(c.Objects, name) }

// HasNetdev reports whether -netdev knows the type.
func (c Caps) HasNetdev(name string) bool { return slices.Contains(c.Netdevs, name) }

func (c Caps) hasAccel(a Accel) bool { return slices.Contains(c.Accels, a) }

// ifMachine returns value where the machine type has the property, and nil,
// which leaves the option out, where it has not.
func (c Caps) ifMachine(prop string, value any) any {
	if slices.Contains(c.MachineProps, prop) {
		return value
	}
	return nil
}

// ifTCG is ifMachine for the properties of emulation.
func (c Caps) ifTCG(prop string, value any) any {
	if slices.Contains(c.TCGProps, prop) {
		return value
	}
	return nil
}
