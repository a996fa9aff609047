package share

import (
	"strconv"
	"strings"
)

// CacheMode says how long the guest may believe what it has seen.
type CacheMode string

const (
	// CacheAuto lets the guest cache metadata for a second and file content
	// until the file is opened again or changes: what the host edits shows within a second.
	CacheAuto CacheMode = "auto"
	// CacheNever asks the host each time.
	CacheNever CacheMode = "never"
	// CacheAlways believes for a day. Right only where the host changes nothing.
	CacheAlways CacheMode = "always"
)

// sandboxMode is how virtiofsd shuts itself into the shared directory.
type sandboxMode string

const (
	sandboxNamespace sandboxMode = "namespace" // pivot_root in yet another mount namespace
	sandboxChroot    sandboxMode = "chroot"    // where a fresh /proc may not be mounted, as in a container
)

// listenFD is the number under which virtiofsd finds its listening socket.
const listenFD = 3

// args is virtiofsd's command line, without the program. It is pure.
//
// Left at their defaults on purpose: writeback off, for with it the guest
// trusts its own idea of a file's size over the host's; extended attributes
// off, so that no file capability reaches the host; POSIX locks off, so that
// they work among the guest's processes and cannot block the daemon; seccomp
// on (the C flavour has no switch for it). The thread pool is off:
// see docs/decisions/0021-share-cache.md.
func args(caps Caps, source string, cache CacheMode, readOnly bool, sandbox sandboxMode) []string {
	if caps.Flavour == FlavourRust {
		return rustArgs(caps, source, cache, readOnly, sandbox)
	}
	return cArgs(source, cache, sandbox)
}

// spareCaps are the capabilities that virtiofsd keeps for a server of many
// owners. With one owner only DAC_OVERRIDE is of use, for root in the guest.
var spareCaps = []string{"chown", "fowner", "fsetid", "setgid", "setuid", "mknod", "setfcap"}

func withoutCaps() string { return "-" + strings.Join(spareCaps, ":-") }

func cArgs(source string, cache CacheMode, sandbox sandboxMode) []string {
	if cache == CacheNever {
		cache = "none"
	}
	return []string{
		"-f",
		"--fd=" + strconv.Itoa(listenFD),
		"-o", "source=" + source,
		"-o", "sandbox=" + string(sandbox),
		"-o", "cache=" + string(cache),
		"-o", "log_level=warn",
		"-o", "modcaps=" + withoutCaps(),
		"--thread-pool-size=0",
		"--rlimit-nofile=0", // raising it is for the parent, which may
	}
}

func rustArgs(caps Caps, source string, cache CacheMode, readOnly bool, sandbox sandboxMode) []string {
	a := []string{
		"--fd=" + strconv.Itoa(listenFD),
		"--shared-dir=" + source,
		"--sandbox=" + string(sandbox),
		"--seccomp=kill",
		"--cache=" + string(cache),
		"--log-level=warn",
		"--modcaps=" + withoutCaps(),
		"--thread-pool-size=0",
		"--rlimit-nofile=0",
	}
	// The mounts that pin and protect paths are all of one file system; to
	// the guest they are plain directories.
	if caps.Has("no-announce-submounts") {
		a = append(a, "--no-announce-submounts")
	}
	if readOnly && caps.Has("readonly") {
		a = append(a, "--readonly")
	}
	return a
}
