package vm

// Machine is the hardware of one virtual machine, described without a word of
// any backend: the direct QEMU backend renders it as arguments, another may
// render it as XML. Every path is absolute. Whoever builds a Machine has
// already decided everything; rendering it is a pure function.
type Machine struct {
	Name   string // instance name, for humans (process title, logs)
	UUID   string // SMBIOS UUID, RFC 4122 text form
	CPUs   int    // number of virtual CPUs, at least 1
	Memory int64  // guest RAM in bytes, a multiple of 1 MiB

	Accel    Accel  // how the guest's instructions are executed
	CPUModel string // backend's CPU model name; empty: the best for Accel

	Boot   Boot
	Disks  []Disk
	Shares []Share
	NICs   []NIC

	Console string // file that receives the guest's serial console
	QMP     string // unix socket on which the backend's control protocol listens
	Line    string // unix socket of a serial line into the guest; empty: none
	PIDFile string // empty: none
	RunAs   *Owner // nil: the calling user

	// Ports is the number of PCIe root ports. Share i sits in port i; a port
	// without a share takes one while the machine runs.
	Ports int

	// MemoryFile backs guest RAM with this file instead of an anonymous
	// memfd. Both are shared mappings, which vhost-user devices need.
	MemoryFile string

	// Saved is a directory of package saved, to go on from instead of booting:
	// the machine starts paused, and without its shares, which are plugged in
	// before it resumes. Empty: boot.
	Saved string
}

// Accel names how guest code runs.
type Accel string

const (
	AccelKVM Accel = "kvm" // hardware virtualization
	AccelTCG Accel = "tcg" // emulation; QEMU makes no isolation promise for it
)

// Boot says where the guest's first code comes from. With Kernel set, it is
// loaded directly and Firmware is ignored.
type Boot struct {
	Kernel  string // bzImage
	Initrd  string // may be empty
	Cmdline string

	Firmware Firmware // for disks that bring their own boot loader
	VarsFile string   // UEFI only: this instance's private copy of the variables
}

// Firmware names the guest's platform firmware.
type Firmware string

const (
	FirmwareBIOS Firmware = "bios"
	FirmwareUEFI Firmware = "uefi"
)

// Disk is one virtio block device.
type Disk struct {
	ID       string // unique within the machine: [a-z][a-z0-9-]*
	Path     string
	Format   string // raw or qcow2; never probed, so that a guest cannot choose
	ReadOnly bool
	Serial   string // shown to the guest, at most 20 bytes
}

// Share is one virtiofs device whose server already listens.
type Share struct {
	Tag    string // virtiofs tag, at most 36 bytes
	Socket string // vhost-user unix socket
	Queues int    // request queues; 0: the backend's default
}

// NIC is one virtio network card whose frames go to a unix stream socket,
// each with a 32-bit big-endian length before it.
type NIC struct {
	MAC    string
	Socket string
	MTU    int // told to the guest's driver; 0: the guest's default
}

// Owner is a numeric user and group on the host.
type Owner struct {
	UID, GID int
}
