package share

import (
	"fmt"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Offsets into struct seccomp_data, see seccomp(2). Arguments are 64 bits
// wide, little-endian here; flags and modes live in the lower half.
const (
	offNr   = 0
	offArch = 4
	offArgs = 16
)

const setIDBits = unix.S_ISUID | unix.S_ISGID

// filter is the seccomp program that virtiofsd runs under besides its own.
//
// virtiofsd takes on the caller's uid and gid for each file that it creates.
// In a user namespace that knows one uid that would fail for every other user
// of the guest; here the call succeeds and does nothing, and so do chown and
// the calls that ask for groups, so that all that the guest makes belongs to
// the one owner. geteuid answers 0, which is what the Rust flavour asks
// before it drops capabilities and to learn that it needs no user
// namespace of its own.
//
// Set-user-id and set-group-id bits are refused wherever a mode is given.
// openat2, whose mode a filter cannot read, does not exist: virtiofsd falls
// back to openat.
func filter() ([]bpf.RawInstruction, error) {
	ret := func(v uint32) bpf.Instruction { return bpf.RetConstant{Val: v} }
	prog := []bpf.Instruction{
		bpf.LoadAbsolute{Off: offArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: auditArch, SkipTrue: 1},
		ret(unix.SECCOMP_RET_KILL_PROCESS),
		bpf.LoadAbsolute{Off: offNr, Size: 4},
		// The x32 calls of x86-64 have numbers of their own.
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: 0x40000000, SkipTrue: 1},
		ret(unix.SECCOMP_RET_KILL_PROCESS),
	}
	answer := func(nr uint32, v uint32) {
		prog = append(prog,
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: nr, SkipTrue: 1},
			ret(v))
	}
	for _, nr := range noOps {
		answer(nr, unix.SECCOMP_RET_ERRNO)
	}
	answer(unix.SYS_OPENAT2, unix.SECCOMP_RET_ERRNO|uint32(unix.ENOSYS))
	for _, m := range modeCalls {
		check := []bpf.Instruction{
			bpf.LoadAbsolute{Off: offArgs + 8*m.mode, Size: 4},
			bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: setIDBits, SkipTrue: 1},
			ret(unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)),
			ret(unix.SECCOMP_RET_ALLOW),
		}
		if m.creates {
			// Without O_CREAT or O_TMPFILE the mode is whatever was in the register.
			const tmpfile = unix.O_TMPFILE &^ unix.O_DIRECTORY
			check = append([]bpf.Instruction{
				bpf.LoadAbsolute{Off: offArgs + 8*(m.mode-1), Size: 4},
				bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: unix.O_CREAT | tmpfile, SkipTrue: 1},
				ret(unix.SECCOMP_RET_ALLOW),
			}, check...)
		}
		prog = append(prog, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: m.nr, SkipTrue: uint8(len(check))})
		prog = append(prog, check...)
	}
	prog = append(prog, ret(unix.SECCOMP_RET_ALLOW))
	return bpf.Assemble(prog)
}

// modeCall is a system call that takes a file mode in argument number mode,
// after open flags if it creates.
type modeCall struct {
	nr, mode uint32
	creates  bool
}

// installFilter binds the calling thread, and all that it executes, to the filter.
func installFilter() error {
	raw, err := filter()
	if err != nil {
		return fmt.Errorf("assemble the seccomp filter: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	insns := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		insns[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	prog := unix.SockFprog{Len: uint16(len(insns)), Filter: &insns[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return fmt.Errorf("install the seccomp filter: %w", errno)
	}
	return nil
}
