package gpu

import (
	"os"
	"path/filepath"
	"slices"
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
		got, err := readByChild("", 5*time.Second, tt.dirs)
		if diff := cmp.Diff(tt.want, got); err != nil || diff != "" {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, diff)
		}
	}
}

// TestQueue: of root's children one is at a function, and others wait where they
// can be killed.
func TestQueue(t *testing.T) {
	queue := filepath.Join(t.TempDir(), "queue")
	card, other := filepath.Join(t.TempDir(), "0000:01:00.0"), filepath.Join(t.TempDir(), "0000:01:00.1")
	for _, dir := range []string{card, other} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	leave, err := enqueue(queue, "/sys/bus/pci/drivers/vfio-pci/unbind 0000:01:00.0")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := readByChild(queue, 5*time.Second, []string{other, card}); err != nil || len(got) != 1 {
		t.Errorf("while it is taken: %v, %v", got, err)
	}
	leave()
	if got, err := readByChild(filepath.Join(queue, "not a directory"), 20*time.Second, []string{card}); err != nil || len(got) != 1 {
		t.Errorf("where there can be no queue: %v, %v", got, err)
	}
	if got, err := readByChild(queue, 20*time.Second, []string{other, card}); err != nil || len(got) != 2 {
		t.Errorf("afterwards: %v, %v", got, err)
	}
	for address, want := range map[string]int64{"0000:00:00.0": 0, "0000:01:00.1": 0x101, "0001:00:1f.7": 0x100ff, "10000:e1:1f.0": 0x10000e1f8} {
		if got := placeOf(anyAddress().FindStringSubmatch("/sys/bus/pci/devices/" + address)); got != want {
			t.Errorf("%s: %x, want %x", address, got, want)
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
	if !slices.ContainsFunc(findings, func(f Finding) bool { return f.Code == Blocked && f.Severity == Problem && !f.Forcible }) {
		t.Errorf("%+v", findings)
	}
	if _, err := m.Bind(t.Context(), ask(gone, "0000:01:00.0")); err == nil || len(f.writes) > 0 {
		t.Error(err, f.writes)
	}
}

// TestDriverThatStarts has the lock for a while, and Bind waits for it.
func TestDriverThatStarts(t *testing.T) {
	f, m := manager(t, cards()...)
	looks := 0
	m.Host.Blocked = func(address string) bool {
		if address != "0000:02:00.0" {
			return false
		}
		looks++
		return looks == 1
	}
	if _, err := m.Bind(t.Context(), ask(gone, "0000:02:00.0")); err != nil || f.driver("0000:02:00.0") != vfioDriver {
		t.Error(err, f.writes)
	}
}
