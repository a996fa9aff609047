// Package testenv says what a test needs from the world. A test that lacks
// it is skipped on a developer's machine and fails in CI, so that a missing
// tool can never make a run green.
package testenv

import (
	"os"
	"os/exec"
	"testing"
)

// Require needs every named program, by name on PATH or by absolute path.
func Require(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			Unavailable(t, "needs %s: %v", p, err)
		}
	}
}

// RequireRoot needs the test to run as uid 0.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("runs only as root; the run as root covers it")
	}
}

// RequireQEMU needs the x86-64 system emulator and its disk tool.
func RequireQEMU(t testing.TB) {
	t.Helper()
	Require(t, "qemu-system-x86_64", "qemu-img")
}

// RequireMmdebstrap needs everything that builds a root file system.
func RequireMmdebstrap(t testing.TB) {
	t.Helper()
	Require(t, "mmdebstrap", "mke2fs")
}

// Unavailable skips the test, or fails it when CI is set.
func Unavailable(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}
