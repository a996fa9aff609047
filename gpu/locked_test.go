package gpu

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// TestReadByChild reads as for a real host. A FIFO without a writer stands for a
// function whose lock is held.
func TestReadByChild(t *testing.T) {
	function := func(override, numVFs string) string {
		dir := t.TempDir()
		for name, text := range map[string]string{"driver_override": override, "sriov_numvfs": numVFs} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	blocked := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(blocked, "sriov_numvfs"), 0o600); err != nil {
		t.Fatal(err)
	}
	plain, taken := function("(null)", "0"), function("vfio-pci", "4")
	want := []lockedFiles{{"(null)", "0"}, {"vfio-pci", "4"}, {}}
	for name, tt := range map[string]struct {
		dirs []string
		want []lockedFiles
	}{
		"all come":         {[]string{plain, taken, t.TempDir()}, want},
		"the last is kept": {[]string{plain, taken, blocked}, want[:2]},
		"a first is kept":  {[]string{blocked, plain}, nil},
	} {
		patience := 10 * time.Second
		if len(tt.want) < len(tt.dirs) {
			patience = time.Second
		}
		got, err := readByChild(patience, tt.dirs)
		if diff := cmp.Diff(tt.want, got); err != nil || diff != "" {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, diff)
		}
	}
}

// TestBlockedIsSeen looks at functions of which one has its lock held.
func TestBlockedIsSeen(t *testing.T) {
	f, m := manager(t, cards()...)
	f.pending["0000:01:00.0"] = true
	inv, err := m.Host.Inventory()
	if err != nil {
		t.Fatal(err)
	}
	d := inv.Get("0000:01:00.0")
	findings := Check(inv, d, nil)
	if other := inv.Get("0000:01:00.1"); !d.Blocked || other.Blocked || other.Override != "snd_hda_intel" {
		t.Errorf("%+v", inv.Devices)
	}
	if len(findings) == 0 || findings[0].Code != Blocked || findings[0].Severity != Problem || findings[0].Forcible {
		t.Errorf("%+v", findings)
	}
	if _, err := m.Bind(t.Context(), ask(gone, "0000:01:00.0")); err == nil || len(f.writes) > 0 {
		t.Error(err, f.writes)
	}
}
