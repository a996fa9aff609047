package share

import "golang.org/x/sys/unix"

const auditArch = unix.AUDIT_ARCH_X86_64

// noOps succeed and do nothing.
var noOps = []uint32{
	unix.SYS_SETUID, unix.SYS_SETREUID, unix.SYS_SETRESUID, unix.SYS_SETFSUID,
	unix.SYS_SETGID, unix.SYS_SETREGID, unix.SYS_SETRESGID, unix.SYS_SETFSGID,
	unix.SYS_GETGROUPS, unix.SYS_SETGROUPS, unix.SYS_GETEUID,
	unix.SYS_CHOWN, unix.SYS_LCHOWN, unix.SYS_FCHOWN, unix.SYS_FCHOWNAT,
}

var modeCalls = []modeCall{
	{nr: unix.SYS_OPEN, mode: 2, creates: true},
	{nr: unix.SYS_OPENAT, mode: 3, creates: true},
	{nr: unix.SYS_CREAT, mode: 1},
	{nr: unix.SYS_CHMOD, mode: 1},
	{nr: unix.SYS_FCHMOD, mode: 1},
	{nr: unix.SYS_FCHMODAT, mode: 2},
	{nr: unix.SYS_FCHMODAT2, mode: 2},
	{nr: unix.SYS_MKNOD, mode: 1},
	{nr: unix.SYS_MKNODAT, mode: 2},
}
