package qemu

import "testing"

func TestRaces(t *testing.T) {
	for version, want := range map[[2]int]bool{{7, 2}: true, {8, 0}: true, {8, 1}: false, {9, 0}: false, {10, 0}: false} {
		var caps Caps
		caps.Version.QEMU.Major, caps.Version.QEMU.Minor = version[0], version[1]
		if got := races(caps) != ""; got != want {
			t.Errorf("QEMU %v: %v, want %v", version, got, want)
		}
	}
}
