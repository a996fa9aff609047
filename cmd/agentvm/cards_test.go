package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/gpu"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/lifecycle"
)

// twoNodes is a host with two NUMA nodes, of which the second has little memory
// free, and some huge pages.
func twoNodes(t *testing.T) gpu.Host {
	t.Helper()
	root := t.TempDir()
	for path, text := range map[string]string{
		"node0/cpulist": "0-3", "node0/meminfo": "Node 0 MemFree: 8388608 kB\n",
		"node1/cpulist": "4-7", "node1/meminfo": "Node 1 MemFree: 1024 kB\n",
		"node0/hugepages/hugepages-2048kB/free_hugepages": "4", "node0/hugepages/hugepages-2048kB/nr_hugepages": "6",
	} {
		file := filepath.Join(root, "sys/devices/system/node", path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	return gpu.Host{Root: root}
}

func TestNearNode(t *testing.T) {
	host := twoNodes(t)
	inv := &gpu.Inventory{Devices: []*gpu.Device{{Address: "0000:01:00.0"}, {Address: "0000:02:00.0", NUMANode: 1}, {Address: "0000:03:00.0", NUMANode: gpu.NoNode}}}
	zero, one := &vm.Node{CPUs: []int{0, 1, 2, 3}}, &vm.Node{ID: 1, CPUs: []int{4, 5, 6, 7}}
	for _, tt := range []struct {
		name, numa string
		pages      config.Size
		devices    []string
		want       *vm.Node
		note       string
	}{
		{"the device's", "", 0, []string{"0000:01:00.0"}, zero, ""},
		{"auto", config.NUMAAuto, 0, []string{"0000:01:00.0"}, zero, ""},
		{"off", config.NUMAOff, 0, []string{"0000:01:00.0"}, nil, ""},
		{"too little memory", "", 0, []string{"0000:02:00.0"}, nil, "too little memory"},
		{"huge pages are counted by themselves", "", 2 << 20, []string{"0000:02:00.0"}, one, ""},
		{"named", "1", 0, []string{"0000:01:00.0"}, one, ""},
		{"of two nodes", "", 0, []string{"0000:01:00.0", "0000:02:00.0"}, nil, "do not lie at one"},
		{"of none", "", 0, []string{"0000:03:00.0"}, nil, "do not lie at one"},
	} {
		var d lifecycle.Devices
		for _, a := range tt.devices {
			d.Slots = append(d.Slots, vm.Slot{Functions: []vm.Function{{Address: a}}})
		}
		nearNode(&d, host, inv, config.GPU{NUMA: tt.numa, HugePages: tt.pages}, 4<<30)
		if diff := cmp.Diff(tt.want, d.Near); diff != "" || tt.note == "" != (len(d.Notes) == 0) || !strings.Contains(strings.Join(d.Notes, ""), tt.note) {
			t.Errorf("%s: %q %s", tt.name, d.Notes, diff)
		}
	}
	var d lifecycle.Devices
	if nearNode(&d, gpu.Host{Root: t.TempDir()}, inv, config.GPU{}, 4<<30); d.Near != nil || d.Notes != nil {
		t.Errorf("a host of one node: %+v", d)
	}
}

func TestEnoughPages(t *testing.T) {
	host, near := twoNodes(t), &vm.Node{}
	if err := enoughPages(host, near, 2<<20, 8<<20); err != nil {
		t.Error(err)
	}
	if err := enoughPages(host, nil, 0, 1<<40); err != nil {
		t.Error("without huge pages:", err)
	}
	err := enoughPages(host, near, 2<<20, 16<<20)
	if want := "echo 10 | sudo tee /sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages"; !errors.Is(err, vm.ErrHost) || vm.Hint(err) != want {
		t.Errorf("%v, %q", err, vm.Hint(err))
	}
	err = enoughPages(host, nil, 1<<30, 4<<30)
	if want := "echo 4 | sudo tee /sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"; !errors.Is(err, vm.ErrHost) || vm.Hint(err) != want {
		t.Errorf("%v, %q", err, vm.Hint(err))
	}
}

// TestStatusShowsDevices as people and as programs read it.
func TestStatusShowsDevices(t *testing.T) {
	a, stdout, _ := cardHost(t)
	store, err := a.store()
	if err != nil {
		t.Fatal(err)
	}
	inst, err := store.Create("web")
	if err != nil {
		t.Fatal(err)
	}
	if err := inst.WriteSpec(instance.Spec{Name: "web", ID: "01234567-89ab-cdef-0123-456789abcdef", Workspace: "/w", Machine: vm.Machine{Slots: []vm.Slot{
		{Functions: []vm.Function{{Address: "0000:01:00.0", Name: "NVIDIA H100", ID: "10de:2330"}, {Address: "0000:01:00.1", ID: "10de:228b"}}},
		{Functions: []vm.Function{{Mediated: "c2177883-f1bb-47f0-914d-32a22e3a8804", Name: "GRID T4-2Q"}}},
	}}}); err != nil {
		t.Fatal(err)
	}
	if err := a.run("status", "web"); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"device     0000:01:00.0 NVIDIA H100\n", "device     0000:01:00.1 10de:228b\n", "device     c2177883-f1bb-47f0-914d-32a22e3a8804 GRID T4-2Q\n"} {
		if !strings.Contains(stdout.String(), want) {
			t.Errorf("no %q in\n%s", want, stdout)
		}
	}
	stdout.Reset()
	if err := a.run("status", "web", "--json"); err != nil {
		t.Fatal(err)
	}
	if want := `"devices":[{"address":"0000:01:00.0","name":"NVIDIA H100"},{"address":"0000:01:00.1","name":"10de:228b"},{"mediated":"c2177883-f1bb-47f0-914d-32a22e3a8804","name":"GRID T4-2Q"}]`; !strings.Contains(stdout.String(), want) {
		t.Errorf("no %s in\n%s", want, stdout)
	}
}

// TestTakenBy: what a process that has ended had is not taken any more.
func TestTakenBy(t *testing.T) {
	a, _, _ := cardHost(t)
	dir := filepath.Join(a.gpuRoot, gpu.JournalDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := vm.ProcessID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for address, process := range map[string]vm.ProcID{"0000:3b:00.0": self, "0000:3c:00.0": {PID: self.PID, Start: self.Start + 1}} {
		text := fmt.Sprintf(`{"version":2,"bootID":"x","bind":"b","owner":{"name":"web","process":{"pid":%d,"start":%d},"keep":false},"user":0,"address":%q,"unit":%[3]q,"id":"10de:2330","group":"7","driver":"","override":"","vfio":"vfio-pci","prebound":false,"step":"bound","time":"2026-01-01T00:00:00Z"}`,
			process.PID, process.Start, address)
		if err := os.WriteFile(filepath.Join(dir, address+".json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	taken, err := takenBy(a.gpuHost())
	if diff := cmp.Diff(map[string]gpu.Claim{"0000:3b:00.0": {Owner: "web"}}, taken); diff != "" || err != nil {
		t.Error(diff, err)
	}
}

// TestCardRequest: a machine's devices are asked for by one function of each slot,
// for the user that it runs as, and for libvirt on vfio-pci itself.
func TestCardRequest(t *testing.T) {
	const part = "c73f1fa6-489e-4834-9476-d70dabd98c40"
	self, user := vm.ProcID{PID: 7, Start: 8}, vm.Owner{UID: 1, GID: 2}
	spec := instance.Spec{Name: "web", Machine: vm.Machine{RunAs: &user, Slots: []vm.Slot{
		{Functions: []vm.Function{{Address: "0000:3b:00.0"}, {Address: "0000:3b:00.1"}}}, {Functions: []vm.Function{{Mediated: part}}},
	}}}
	for backend, plain := range map[string]bool{"": false, config.BackendQEMU: false, config.BackendLibvirt: true} {
		spec.Backend = backend
		want := gpu.Request{Devices: []string{"0000:3b:00.0", part}, Owner: gpu.Owner{Name: "web", Process: self}, User: user, Plain: plain}
		if diff := cmp.Diff(want, cardRequest(spec, self)); diff != "" {
			t.Error(backend, diff)
		}
	}
}
