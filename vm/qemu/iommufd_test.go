package qemu

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

func TestCanIOMMUFD(t *testing.T) {
	const (
		groups  = "Character devices:\n 10 misc\n240 vfio\n"
		devices = groups + "511 vfio-dev\n\nBlock devices:\n  8 sd\n"
	)
	able := Caps{Objects: []string{"rng-random", "iommufd"}}
	stranger := &vm.Owner{UID: 1878982656, GID: 1878982656}
	for _, tt := range []struct {
		name  string
		list  string      // /proc/devices
		mode  os.FileMode // of /dev/iommu; 0: there is none
		caps  Caps
		runAs *vm.Owner
		want  bool
	}{
		{"the caller's", devices, 0o600, able, nil, true},
		{"the caller's, for another user", devices, 0o600, able, stranger, false},
		{"everybody's", devices, 0o666, able, stranger, true},
		{"an older QEMU", devices, 0o666, testCaps(), nil, false},
		{"a kernel of groups", groups, 0o666, able, nil, false},
		{"an older kernel", devices, 0, able, nil, false},
		{"an older kernel, another user", devices, 0, able, stranger, false},
	} {
		root := t.TempDir()
		put := func(name, text string, mode os.FileMode) {
			t.Helper()
			path := filepath.Join(root, name)
			if err := errors.Join(os.Mkdir(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644), os.Chmod(path, mode)); err != nil {
				t.Fatal(err)
			}
		}
		put("proc/devices", tt.list, 0o444)
		if tt.mode != 0 {
			put(iommuDevice, "", tt.mode)
		}
		if got := canIOMMUFD(root, tt.caps, tt.runAs); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
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
