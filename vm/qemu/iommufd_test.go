package qemu

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/testenv"
)

func TestCanIOMMUFD(t *testing.T) {
	const (
		groups  = "Character devices:\n 10 misc\n240 vfio\n"
		devices = groups + "511 vfio-dev\n\nBlock devices:\n  8 sd\n"
	)
	const infinity = unix.RLIM_INFINITY
	able := Caps{Objects: []string{"rng-random", "iommufd"}}
	stranger := &vm.Owner{UID: 1878982656, GID: 1878982656}
	for _, tt := range []struct {
		name  string
		list  string      // /proc/devices
		mode  os.FileMode // of /dev/iommu; 0: there is none
		caps  Caps
		runAs *vm.Owner
		slots int
		lock  uint64 // what the caller may lock
		want  bool
	}{
		{"the caller's", devices, 0o600, able, nil, 1, infinity, true},
		{"the caller's, for another user", devices, 0o600, able, stranger, 1, infinity, false},
		{"everybody's", devices, 0o666, able, stranger, 1, infinity, true},
		{"the caller's, whose machines share a limit", devices, 0o600, able, nil, 1, 8 << 30, false},
		{"everybody's, of devices that reach each other", devices, 0o666, able, stranger, 2, infinity, false},
		{"everybody's, and the caller has a limit", devices, 0o666, able, stranger, 1, 8 << 30, true},
		{"an older QEMU", devices, 0o666, testCaps(), nil, 1, infinity, false},
		{"a kernel of groups", groups, 0o666, able, nil, 1, infinity, false},
		{"an older kernel", devices, 0, able, nil, 1, infinity, false},
		{"an older kernel, another user", devices, 0, able, stranger, 1, infinity, false},
	} {
		root := t.TempDir()
		put := func(name, text string, mode os.FileMode) {
			t.Helper()
			path := filepath.Join(root, name)
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644), os.Chmod(path, mode)); err != nil {
				t.Fatal(err)
			}
		}
		put("proc/devices", tt.list, 0o444)
		put("dev/vfio/vfio", "", 0o666)
		if tt.mode != 0 {
			put(iommuDevice, "", tt.mode)
		}
		if got := canIOMMUFD(root, tt.caps, tt.slots, tt.runAs, tt.lock); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

// A kernel without groups leaves no choice.
func TestCanIOMMUFDAlone(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{"proc/devices": "511 vfio-dev\n", "dev/iommu": ""} {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if !canIOMMUFD(root, Caps{Objects: []string{"iommufd"}}, 2, nil, 8<<30) {
		t.Error("it cannot open a device at all")
	}
}

// TestLockLimit lets machines of one user lock what all of them need by
// /dev/iommu, and one of a user of its own what it needs.
func TestLockLimit(t *testing.T) {
	m := vm.Machine{Memory: 1 << 30, Slots: []vm.Slot{testenv.Card("0000:01:00.0")}}
	need := LockedMemory(m)
	for _, may := range []uint64{1 << 30, 64 << 30, unix.RLIM_INFINITY} {
		m.IOMMUFD, m.RunAs = false, nil
		if got := lockLimit(m, may); got != need {
			t.Errorf("by a group, of %d: %d, want %d", may, got, need)
		}
		m.IOMMUFD = true
		if got, want := lockLimit(m, may), max(2<<30, may); got != want {
			t.Errorf("by /dev/iommu, of %d: %d, want %d", may, got, want)
		}
		m.RunAs = &vm.Owner{UID: 7, GID: 7}
		if got := lockLimit(m, may); got != need {
			t.Errorf("by /dev/iommu under another user, of %d: %d, want %d", may, got, need)
		}
	}
}

func TestOpens(t *testing.T) {
	user := vm.Owner{UID: 7, GID: 8}
	for _, tt := range []struct {
		name string
		node unix.Stat_t
		want bool
	}{
		{"root's", unix.Stat_t{Mode: 0o660}, false},
		{"everybody's", unix.Stat_t{Mode: 0o666}, true},
		{"of a group that is lent", unix.Stat_t{Mode: 0o660, Gid: 104}, true},
		{"to be read by its group", unix.Stat_t{Mode: 0o640, Gid: 104}, false},
		{"of the user's group", unix.Stat_t{Mode: 0o660, Gid: 8}, true},
		{"kept from the user's group", unix.Stat_t{Mode: 0o606, Gid: 8}, false},
		{"the user's", unix.Stat_t{Mode: 0o600, Uid: 7}, true},
		{"kept from the user", unix.Stat_t{Mode: 0o066, Uid: 7}, false},
	} {
		if got := opens(tt.node, user); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}
