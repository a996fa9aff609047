package helper

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/gpu"
	"github.com/agentvm/agentvm/vm"
)

const (
	card  = "0000:01:00.0"
	other = "0000:02:00.0"
	alice = 4242 // has no name
	vgpu  = "c2177883-f1bb-47f0-914d-32a22e3a8804"
)

// testServer is a helper on a host whose two cards are on vfio-pci already,
// so that nothing has to behave. What is given to whom goes to owners.
type testServer struct {
	server
	t      *testing.T
	owners map[string]int
	uid    int
}

func newServer(t *testing.T, allow string) *testServer {
	t.Helper()
	root := t.TempDir()
	s := &testServer{t: t, owners: map[string]int{}, uid: alice}
	put := func(path, data string) {
		path = filepath.Join(root, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(data), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	link := func(target, path string) {
		path = filepath.Join(root, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.Symlink(target, path)); err != nil {
			t.Fatal(err)
		}
	}
	put("/proc/sys/kernel/random/boot_id", "x\n")
	put("/run/x", "")
	for i, address := range []string{card, other} {
		dir := "/sys/bus/pci/devices/" + address
		group := strconv.Itoa(i + 1)
		for name, data := range map[string]string{"vendor": "0x10de", "device": fmt.Sprintf("0x233%d", i), "class": "0x030200", "resource": "", "config": "\xde\x10\x30\x23", "driver_override": "vfio-pci"} {
			put(dir+"/"+name, data)
		}
		link("../../drivers/vfio-pci", dir+"/driver")
		link("../../../kernel/iommu_groups/"+group, dir+"/iommu_group")
		put("/sys/kernel/iommu_groups/"+group+"/devices/"+address, "")
		put("/dev/vfio/"+group, "")
	}
	put("/sys/bus/pci/drivers/vfio-pci/bind", "")
	// A third card, with its driver, that has a part to give away.
	const divided, part = "/sys/devices/pci0000:00/0000:03:00.0", "/sys/devices/pci0000:00/0000:03:00.0/" + vgpu
	for name, data := range map[string]string{"vendor": "0x10de", "device": "0x1eb8", "class": "0x030200", "resource": "", "config": "\xde\x10\xb8\x1e", "driver_override": "(null)"} {
		put(divided+"/"+name, data)
	}
	link("../../../devices/pci0000:00/0000:03:00.0", "/sys/bus/pci/devices/0000:03:00.0")
	link("../../../devices/pci0000:00/0000:03:00.0/"+vgpu, "/sys/bus/mdev/devices/"+vgpu)
	put(part+"/mdev_type/name", "GRID T4-2Q")
	link("../../../../bus/mdev/drivers/nvidia-vgpu-vfio", part+"/driver")
	link("../../../../kernel/iommu_groups/77", part+"/iommu_group")
	put("/dev/vfio/77", "")
	if allow != "" {
		put(AllowFile, allow)
	}
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	s.host = gpu.Host{Root: root, Viable: func(string) error { return nil }, Chown: func(path string, uid int) error { s.owners[path] = uid; return nil }}
	s.owner = os.Geteuid()
	s.getenv = func(name string) string { return map[string]string{"SUDO_UID": strconv.Itoa(s.uid)}[name] }
	return s
}

// ask serves one request, and returns the last line of the audit log too.
func (s *testServer) ask(req request) (response, entry) {
	s.t.Helper()
	req.Version = requestVersion
	data, err := json.Marshal(req)
	if err != nil {
		s.t.Fatal(err)
	}
	var out bytes.Buffer
	if err := s.serve(s.t.Context(), bytes.NewReader(data), &out); err != nil {
		s.t.Fatal(err)
	}
	var a response
	if err := json.Unmarshal(out.Bytes(), &a); err != nil {
		s.t.Fatal(err, out.String())
	}
	log := s.log()
	if len(log) < 2 || log[len(log)-2].Result != "asked" || log[len(log)-2].Request != log[len(log)-1].Request {
		s.t.Fatalf("%+v", log)
	}
	return a, log[len(log)-1]
}

func (s *testServer) log() (entries []entry) {
	s.t.Helper()
	data, err := os.ReadFile(filepath.Join(s.host.Root, AuditLog))
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		var e entry
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.Time.IsZero() || e.UID != s.uid || e.Via != "sudo" || e.PID == 0 {
			s.t.Fatal(line, err)
		}
		entries = append(entries, e)
	}
	return entries
}

func (s *testServer) journals() int {
	list, err := (&gpu.Manager{Host: s.host}).Journals()
	if err != nil {
		s.t.Fatal(err)
	}
	return len(list)
}

const allowFirst = "version: 1\nallow: [{users: [\"4242\"], devices: [\"10de:2330\"]}, {users: [\"4243\"], devices: [any]}]\n"

func TestServe(t *testing.T) {
	s := newServer(t, allowFirst)
	a, e := s.ask(request{Do: bind, Devices: []string{card}, Name: "gpu bind", Plain: true})
	if a.Error != "" || len(a.Journals) != 1 || a.Journals[0].User != alice || !a.Journals[0].Owner.Keep || e.Result != "done" || e.Do != bind || e.Owner != "gpu bind" || !e.Plain {
		t.Fatalf("%+v %+v", a, e)
	}
	if diff := cmp.Diff(map[string]int{"/dev/vfio/1": alice}, s.owners); diff != "" {
		t.Error(diff)
	}
	s.uid = alice + 1 // who may take all cards does not give back another's
	if err := os.Remove(filepath.Join(s.host.Root, AuditLog)); err != nil {
		t.Fatal(err)
	}
	a, e = s.ask(request{Do: release, Devices: []string{card}})
	if !strings.Contains(a.Error, "not yours to give back") || e.Result != "failed" || s.journals() != 1 {
		t.Errorf("%+v %+v", a, e)
	}
	if a, _ = s.ask(request{Do: recoverStale}); a.Error != "" || len(a.Outcomes) != 1 || a.Outcomes[0].Action != gpu.Left {
		t.Errorf("%+v", a)
	}
	s.uid = alice
	if err := os.Remove(filepath.Join(s.host.Root, AuditLog)); err != nil {
		t.Fatal(err)
	}
	a, e = s.ask(request{Do: release, Devices: []string{card}})
	if a.Error != "" || len(a.Outcomes) != 1 || a.Outcomes[0].Action != gpu.Restored || len(e.Outcomes) != 1 || e.Plain || s.owners["/dev/vfio/1"] != os.Geteuid() || s.journals() != 0 {
		t.Errorf("%+v %+v %v", a, e, s.owners)
	}
}

// TestServePart: a part of a card goes to who may take the card, by its UUID, and
// comes back when its owner has ended.
func TestServePart(t *testing.T) {
	user := os.Getuid()
	owner := exec.Command("sleep", "600")
	if user == 0 {
		user = alice
		owner.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: alice, Gid: alice}}
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	end := func() { _ = owner.Process.Kill(); _ = owner.Wait() }
	defer end()
	process, err := vm.ProcessID(owner.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(t, fmt.Sprintf("version: 1\nallow: [{users: [\"%d\"], devices: [\"10de:1eb8\"]}]\n", user))
	s.uid = user
	var given []int
	s.host.Chown = func(path string, uid int) error { given = append(given, uid); s.owners[path] = uid; return nil }
	a, e := s.ask(request{Do: bind, Devices: []string{vgpu}, Name: "machine x", Process: process})
	if a.Error != "" || len(a.Journals) != 1 || a.Journals[0].Address != vgpu || a.Journals[0].ID != "10de:1eb8" || a.Journals[0].Owner.Process != process || s.owners["/dev/vfio/77"] != user {
		t.Fatalf("%+v %v", a, s.owners)
	}
	if e.Result != "done" || len(e.Devices) != 1 || e.Devices[0] != vgpu {
		t.Errorf("%+v", e)
	}
	if a, _ = s.ask(request{Do: recoverStale}); len(a.Outcomes) != 1 || a.Outcomes[0].Action != gpu.Left {
		t.Errorf("%+v", a)
	}
	end()
	a, e = s.ask(request{Do: recoverStale})
	if a.Error != "" || len(a.Outcomes) != 1 || a.Outcomes[0].Action != gpu.Restored || len(e.Outcomes) != 1 || e.Outcomes[0].Address != vgpu || len(s.owners) != 1 || !slices.Equal(given, []int{user, os.Geteuid()}) || s.journals() != 0 {
		t.Errorf("%+v %+v %v", a, e, given)
	}
}

// TestRefused: each is refused, audited, and changes nothing.
func TestRefused(t *testing.T) {
	self, err := vm.ProcessID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	ask := request{Do: bind, Devices: []string{card}, Name: "x"}
	for name, tt := range map[string]struct {
		allow  string
		change func(*testServer, *request)
		says   string
	}{
		"no list": {"", nil, "no user may take a device"},
		"a list that others write": {allowFirst, func(s *testServer, _ *request) {
			if err := os.Chmod(filepath.Join(s.host.Root, AllowFile), 0o666); err != nil {
				t.Fatal(err)
			}
		}, "can be written by others"},
		"a list of somebody else's": {allowFirst, func(s *testServer, _ *request) { s.owner++ }, "belongs to user"},
		"a list with a mistake":     {"version: 1\nalow: []\n", nil, "unknown field"},
		"a stranger":                {allowFirst, func(s *testServer, _ *request) { s.uid = 1 }, "user 1 may not take devices"},
		"a stranger who recovers":   {allowFirst, func(s *testServer, r *request) { s.uid = 1; *r = request{Do: recoverStale} }, "user 1 may not"},
		"another card":              {allowFirst, func(_ *testServer, r *request) { r.Devices = []string{other} }, "you may not take " + other},
		"another card beside":       {allowFirst, func(_ *testServer, r *request) { r.Devices = []string{card, other} }, "you may not take " + other},
		"a part of another card":    {allowFirst, func(_ *testServer, r *request) { r.Devices = []string{vgpu} }, "you may not take " + vgpu},
		"a part beside a card":      {allowFirst, func(_ *testServer, r *request) { r.Devices = []string{card, vgpu} }, "you may not take " + vgpu},
		"no such part":              {allowFirst, func(_ *testServer, r *request) { r.Devices = []string{"00000000" + vgpu[8:]} }, "no mediated device"},
		"no such device":            {allowFirst, func(_ *testServer, r *request) { r.Devices = []string{"0000:09:00.0"} }, "no PCI device"},
		"a process of another's":    {allowFirst, func(_ *testServer, r *request) { r.Process = self }, "not a running one of yours"},
		"a process that has ended":  {allowFirst, func(_ *testServer, r *request) { r.Process = vm.ProcID{PID: self.PID, Start: self.Start + 1} }, "not a running one of yours"},
		"the display": {allowFirst, func(s *testServer, _ *request) {
			if err := os.WriteFile(filepath.Join(s.host.Root, "/sys/bus/pci/devices", card, "boot_vga"), []byte("1\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "as its display"},
	} {
		t.Run(name, func(t *testing.T) {
			s, req := newServer(t, tt.allow), ask
			if tt.change != nil {
				tt.change(s, &req)
			}
			a, e := s.ask(req)
			if !strings.Contains(a.Error, tt.says) || e.Error != a.Error || e.Result == "done" || a.Journals != nil {
				t.Errorf("%+v %+v", a, e)
			}
			if s.journals() != 0 || len(s.owners) > 0 {
				t.Error("something was done", s.owners)
			}
		})
	}
}

// TestOwnProcess: who stands behind the binding is a process of the caller's.
func TestOwnProcess(t *testing.T) {
	self, err := vm.ProcessID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	s := newServer(t, fmt.Sprintf("version: 1\nallow: [{users: [\"%d\"], devices: [any]}]\n", os.Getuid()))
	s.uid = os.Getuid()
	a, _ := s.ask(request{Do: bind, Devices: []string{card}, Name: "machine x", Process: self})
	if a.Error != "" || len(a.Journals) != 1 || a.Journals[0].Owner.Process != self || a.Journals[0].Owner.Keep {
		t.Errorf("%+v", a)
	}
}

// TestNoAuditNoDeed: where the log cannot be written, nothing is done.
func TestNoAuditNoDeed(t *testing.T) {
	for name, spoil := range map[string]func(dir string) error{
		"a link": func(dir string) error {
			return errors.Join(os.MkdirAll(dir, 0o755), os.Symlink("/dev/null", filepath.Join(dir, "gpu.jsonl")))
		},
		"a directory of others": func(dir string) error { return errors.Join(os.MkdirAll(dir, 0o755), os.Chmod(dir, 0o777)) },
		"a file in the way":     func(dir string) error { return os.WriteFile(filepath.Dir(dir), nil, 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t, allowFirst)
			dir := filepath.Join(s.host.Root, filepath.Dir(AuditLog))
			if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Dir(dir)), 0o755), spoil(dir)); err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			data := `{"version":1,"do":"bind","devices":["` + card + `"],"name":"x"}`
			if err := s.serve(t.Context(), strings.NewReader(data), &out); err == nil || !strings.Contains(err.Error(), "audit log") || out.Len() > 0 || s.journals() != 0 {
				t.Error(err, out.String())
			}
		})
	}
}

// TestAuditIsBounded: a user who asks for ever does not fill the disk.
func TestAuditIsBounded(t *testing.T) {
	root := t.TempDir()
	if err := errors.Join(os.Chmod(root, 0o755), os.MkdirAll(filepath.Join(root, filepath.Dir(AuditLog)), 0o755), os.WriteFile(filepath.Join(root, AuditLog), nil, 0o600), os.Truncate(filepath.Join(root, AuditLog), maxAudit+1)); err != nil {
		t.Fatal(err)
	}
	if err := audit(root, entry{Result: "asked"}); err != nil {
		t.Fatal(err)
	}
	old, err := os.Stat(filepath.Join(root, AuditLog+".1"))
	if now, err2 := os.Stat(filepath.Join(root, AuditLog)); err != nil || err2 != nil || old.Size() != maxAudit+1 || now.Size() > 1000 || now.Mode().Perm() != 0o600 {
		t.Error(old, now, err, err2)
	}
}

// TestNotByHand: the program itself refuses to be anything but root's helper.
func TestNotByHand(t *testing.T) {
	s := server{}
	if err := s.harden([]string{"agentvm", Arg, "--force"}); err == nil || !strings.Contains(err.Error(), "no arguments") {
		t.Error(err)
	}
	cmd := exec.Command(os.Args[0], Arg)
	cmd.Stdin = strings.NewReader(`{"version":1,"do":"recover"}`)
	out, err := cmd.CombinedOutput()
	// As root it is the test binary's directory that others can write.
	if err == nil || !strings.HasPrefix(string(out), complaint) {
		t.Errorf("%v %s", err, out)
	}
}

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == Arg {
		os.Exit(Main(os.Args))
	}
	os.Exit(m.Run())
}
