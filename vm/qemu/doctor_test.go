package qemu

import (
	"strings"
	"testing"
)

func TestCheckAccelNamesRaces(t *testing.T) {
	for version, want := range map[[2]int]bool{{7, 2}: true, {8, 0}: true, {8, 1}: false, {9, 0}: false, {10, 0}: false} {
		caps := Caps{Binary: "/usr/bin/q"} // without KVM
		caps.Version.QEMU.Major, caps.Version.QEMU.Minor = version[0], version[1]
		f := checkAccel(t.Context(), AccelProbe{Caps: caps})
		if got := strings.Contains(f.Detail, "resources.cpus: 1"); got != want {
			t.Errorf("QEMU %v: %s", version, f.Detail)
		}
	}
}
