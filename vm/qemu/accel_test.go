package qemu

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/probes"
	"github.com/agentvm/agentvm/vm/testenv"
)

func TestHasVirtFlag(t *testing.T) {
	for info, want := range map[string]bool{
		"processor\t: 0\nflags\t\t: fpu vmx sse\n": true,
		"processor\t: 0\nflags\t\t: fpu svm\n":     true,
		"flags\t\t: fpu sse\nvmx flags\t: ept\n":   false,
		"model name\t: vmx svm\nflags\t\t: fpu\n":  false,
		"": false,
	} {
		if got := hasVirtFlag([]byte(info)); got != want {
			t.Errorf("%q: %v", info, got)
		}
	}
}

func TestNoKVMInQEMU(t *testing.T) {
	v, err := ProbeAccel(t.Context(), AccelProbe{Caps: Caps{Binary: "/usr/bin/q", Accels: []Accel{vm.AccelTCG}}})
	if err != nil || v.Accel != vm.AccelTCG || v.Reason != "kvm: /usr/bin/q was built without it: using emulation" {
		t.Errorf("%+v, %v", v, err)
	}
}

func TestAccelVerdictIsCached(t *testing.T) {
	// Any file that opens will do: what the cache knows is not tried again.
	defer func(device string) { kvmDevice = device }(kvmDevice)
	kvmDevice = filepath.Join(t.TempDir(), "kvm")
	if err := os.WriteFile(kvmDevice, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p := AccelProbe{Caps: Caps{Build: "b", Accels: []Accel{vm.AccelKVM}}, Probes: probes.Store(t.TempDir())}
	p.Probes.Write("accel", p.key(), AccelVerdict{Accel: vm.AccelKVM, Reason: "r"})
	v, err := ProbeAccel(t.Context(), p)
	if err != nil || !v.Cached || v.Reason != "r" {
		t.Errorf("%+v, %v", v, err)
	}
	other := p
	other.Caps.Build = "c"
	if other.key() == p.key() {
		t.Error("another build shares the verdict")
	}
}

// A guest that never says anything is a bootError with a reason, not a hang.
func TestBootStallIsNoticed(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes as long as a stall")
	}
	caps := realCaps(t)
	err := tryBoot(t.Context(), emptyMachine(""), caps, nil, "-S")
	var failed *bootError
	if !errors.As(err, &failed) || !strings.Contains(err.Error(), "hangs before it says anything") {
		t.Errorf("got %v", err)
	}
}

func TestBootInterrupted(t *testing.T) {
	caps := realCaps(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := tryBoot(ctx, emptyMachine(""), caps, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// testKernel finds a Linux kernel that the tests may boot.
func testKernel(t *testing.T) string {
	t.Helper()
	if k := os.Getenv("AGENTVM_TEST_KERNEL"); k != "" {
		return k
	}
	return filepath.Join(testenv.Debian13(t), "boot", "vmlinuz")
}

func TestKernelBoots(t *testing.T) {
	caps := realCaps(t)
	m := emptyMachine("")
	m.CPUs, m.Memory = 2, 256<<20
	m.Boot = vm.Boot{Kernel: testKernel(t), Cmdline: "console=ttyS0 panic=-1"}
	if err := tryBoot(t.Context(), m, caps, nil); err != nil {
		t.Error(err)
	}
}

func TestProbeAccelForReal(t *testing.T) {
	caps := realCaps(t)
	p := AccelProbe{Caps: caps, Kernel: testKernel(t), Probes: probes.Store(t.TempDir())}
	v, err := ProbeAccel(t.Context(), p)
	if err != nil || v.Accel == "" || v.Reason == "" {
		t.Fatalf("%+v, %v", v, err)
	}
	t.Logf("%+v", v)
}

// TestVerdictHoldsForEveryMachine: root's machines run as users of their own,
// and must not each try a kernel anew.
func TestVerdictHoldsForEveryMachine(t *testing.T) {
	key := func(o *vm.Owner) string { return AccelProbe{Caps: Caps{Build: "b"}, RunAs: o}.key() }
	a, b := key(&vm.Owner{UID: 1000001, GID: 1000001}), key(&vm.Owner{UID: 1000002, GID: 1000002})
	if a != b {
		t.Errorf("%s and %s", a, b)
	}
	if os.Geteuid() == 0 && key(nil) == a {
		t.Error("root itself may be let in where others are not")
	}
}
