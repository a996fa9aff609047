package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
)

func TestParseFillsDefaults(t *testing.T) {
	c, err := Parse("agentvm.yaml", []byte("version: 1\nresources: {memory: 4GiB}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Image != DefaultImage || c.Resources.CPUs != DefaultCPUs || c.Resources.Memory != 4<<30 || c.Workspace.Mount != "/workspace" {
		t.Errorf("got %+v", c)
	}
}

func TestCards(t *testing.T) {
	c, err := Parse("agentvm.yaml", []byte("version: 1\ngpu:\n  devices: [{use: 01:00.0, rom: a.rom}, {use: 10de:2330, count: 2}]\n  numa: 1\n  hugepages: 1GiB\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := GPU{Devices: []GPUDevice{{Use: "01:00.0", ROM: "a.rom"}, {Use: "10de:2330", Count: 2}}, NUMA: "1", HugePages: 1 << 30}
	if diff := cmp.Diff(want, c.GPU); diff != "" {
		t.Error(diff)
	}
}

func TestMistakesHaveAPlace(t *testing.T) {
	for _, tt := range []struct{ name, text, want, hint string }{
		{"unknown key", "version: 1\nresources:\n  memmory: 4GiB\n", `agentvm.yaml:3:3: unknown key "memmory"`, `did you mean "memory"?`},
		{"unknown top-level key", "version: 1\nflavour: {}\n", `agentvm.yaml:2:1: unknown key "flavour"`, "docs/configuration.md lists every key"},
		{"wrong type", "version: 1\nmounts: yes please\n", "agentvm.yaml:2:9: expected a list, found a text", ""},
		{"broken syntax", "version: 1\nmounts: [\n", "agentvm.yaml:2:9: ", ""},
		{"twice", "version: 1\nversion: 1\n", "agentvm.yaml:2:1: ", ""},
		{"bad size", "version: 1\nresources:\n  memory: lots\n", `agentvm.yaml:3:11: "lots" is not a size`, ""},
		{"fraction", "version: 1\nresources: {cpus: 1.5}\n", `agentvm.yaml:2:19: "1.5" is not a whole number`, ""},
		{"too little memory", "version: 1\nresources:\n  memory: 1MiB\n", "agentvm.yaml:3:11: memory must be at least 256MiB", ""},
		{"too many cpus", "version: 1\nresources: {cpus: 1000}\n", "agentvm.yaml:2:19: cpus must be 1 to 256", ""},
		{"version", "version: 7\n", "agentvm.yaml:1:10: version 7 is not known", "this agentvm reads version: 1"},
		{"no version", "image: debian-13\n", "agentvm.yaml: version 0 is not known", "this agentvm reads version: 1"},
		{"name", "version: 1\nname: Not_A_Name\n", `agentvm.yaml:2:7: name "Not_A_Name" must be`, ""},
		{"mount point", "version: 1\nworkspace: {mount: relative}\n", "agentvm.yaml:2:20: mount", "for example /workspace"},
		{"target twice", "version: 1\nmounts:\n  - {source: a, target: /x}\n  - {source: b, target: /x}\n", `agentvm.yaml:4:25: target "/x" is used twice`, ""},
		{"target is the workspace", "version: 1\nmounts:\n  - {source: a, target: /workspace}\n", `agentvm.yaml:3:25: target "/workspace" is used twice`, ""},
		{"protect leaves", "version: 1\nworkspace: {protect: [../x]}\n", `agentvm.yaml:2:23: "../x" leaves the workspace`, ""},
		{"target twice, spelled otherwise", "version: 1\nmounts:\n  - {source: a, target: ~/x}\n  - {source: b, target: /home/agent/x/}\n", `agentvm.yaml:4:25: target "/home/agent/x/" is used twice`, ""},
		{"backend", "version: 1\nbackend: xen\n", `agentvm.yaml:2:10: backend "xen" is not known`, "use qemu or libvirt"},
		{"uri without libvirt", "version: 1\nuri: qemu:///system\n", "agentvm.yaml:2:6: uri says which libvirt", "backend: libvirt"},
		{"on_disconnect of another kind", "version: 1\nbackend: libvirt\non_disconnect: stop\n", `agentvm.yaml:3:16: on_disconnect "stop" is not known`, "use continue or pause"},
		{"on_disconnect here", "version: 1\nbackend: libvirt\nuri: qemu:///system\non_disconnect: pause\n", `agentvm.yaml:4:16: on_disconnect is about a machine on another host`, "uri: qemu+ssh://USER@HOST/system"},
		{"uri elsewhere", "version: 1\nbackend: libvirt\nuri: qemu+tcp://host/system\n", `agentvm.yaml:3:6: libvirt URI "qemu+tcp://host/system": machines on other hosts`, "use qemu:///system or qemu:///session, or qemu+ssh:// for a machine on another host"},
		{"uri by TLS", "version: 1\nbackend: libvirt\nuri: qemu+tls://host/system\n", `agentvm.yaml:3:6: libvirt URI "qemu+tls://host/system": agentvm needs its own program`, "use qemu+ssh://USER@HOST:PORT/system, or /session"},
		{"uri that is an option", "version: 1\nbackend: libvirt\nuri: qemu+ssh://-x/system\n", `agentvm.yaml:3:6: libvirt URI "qemu+ssh://-x/system": "-x" is not a host's name`, ""},
		{"space in a target", "version: 1\nworkspace: {mount: /my work}\n", "agentvm.yaml:2:20: mount", ""},
		{"no cpus", "version: 1\nresources: {cpus: 0}\n", "agentvm.yaml:2:19: cpus must be", ""},
		{"no memory", "version: 1\nresources: {memory: 0}\n", "agentvm.yaml:2:21: memory must be", ""},
		{"service to nowhere", "version: 1\nnetwork:\n  services:\n    - {name: a, port: 80, target: \":1\"}\n", `agentvm.yaml:4:35: ":1" is not a host and a port`, ""},
		{"service twice", "version: 1\nnetwork:\n  services:\n    - {name: a, port: 80, target: \"x:1\"}\n    - {name: a, port: 80, target: \"x:2\"}\n", "agentvm.yaml:5:23: a:80 is named twice", ""},
		{"rule", "version: 1\nnetwork:\n  allow:\n    - https://example.org/\n", "agentvm.yaml:4:7: network rule", ""},
		{"npm range", "version: 1\nprovision: {npm: [left-pad@^1]}\n", `agentvm.yaml:2:19: "left-pad@^1" does not name an exact version`, ""},
		{"package", "version: 1\nprovision: {packages: [\"rm -rf\"]}\n", `agentvm.yaml:2:24: "rm -rf" is not a package name`, ""},
		{"service port", "version: 1\nnetwork:\n  services:\n    - {name: a, port: 70000, target: \"x:1\"}\n", "agentvm.yaml:4:23: port must be", ""},
		{"env name", "version: 1\nagent: {env: [\"A=B\"]}\n", `agentvm.yaml:2:15: "A=B" is not a variable's name`, ""},
		{"variable's name", "version: 1\nenv: {OK: a, A-B: b, A-C: c}\n", `agentvm.yaml:2:6: "A-B" is not a variable's name`, ""},
		{"driver", "version: 1\nprovision: {driver: \"a b\"}\n", `agentvm.yaml:2:21: "a b" is not a driver's name`, "nvidia"},
		{"licence", "version: 1\nprovision: {accept: [nvidia, \"\"]}\n", `agentvm.yaml:2:30: "" is not a driver's name`, ""},
		{"gpu without devices", "version: 1\ngpu: {numa: auto}\n", "agentvm.yaml:2:", "devices: [{use: auto}]"},
		{"gpu device without a name", "version: 1\ngpu: {devices: [{count: 2}]}\n", "agentvm.yaml:2:17: a device needs a name", "auto"},
		{"gpu count", "version: 1\ngpu: {devices: [{use: auto, count: 0}]}\n", "agentvm.yaml:2:36: count must be 1 to 16", ""},
		{"gpu count of an address", "version: 1\ngpu: {devices: [{use: \"01:00.0\", count: 2}]}\n", `agentvm.yaml:2:41: "01:00.0" is one device`, ""},
		{"gpu twice", "version: 1\ngpu: {devices: [{use: \"01:00.0\"}, {use: \"01:00.0\"}]}\n", `agentvm.yaml:2:41: device "01:00.0" is named twice`, ""},
		{"gpu too many", "version: 1\ngpu: {devices: [{use: auto, count: 9}, {use: h100, count: 8}]}\n", "agentvm.yaml:2:16: a machine has at most 16 cards", ""},
		{"gpu numa", "version: 1\ngpu: {numa: near, devices: [{use: auto}]}\n", `agentvm.yaml:2:13: numa "near" is not known`, "auto, off"},
		{"gpu pages", "version: 1\ngpu: {hugepages: 4MiB, devices: [{use: auto}]}\n", "agentvm.yaml:2:18: there are no pages of 4MiB", "2MiB or 1GiB"},
		{"gpu pages and memory", "version: 1\nresources: {memory: 1536MiB}\ngpu: {hugepages: 1GiB, devices: [{use: auto}]}\n", "agentvm.yaml:3:18: memory of 1.5GiB is not a whole number", ""},
		{"gpu as a list", "version: 1\ngpu: [auto]\n", "agentvm.yaml:2:6: expected a mapping, found a list", ""},
		{"two documents", "version: 1\n---\nversion: 1\n", "agentvm.yaml: the file has more than one document", ""},
		{"empty", "", "agentvm.yaml: the file is empty", "run agentvm init"},
		{"only a comment", "# nothing\n", "agentvm.yaml: the file is empty", "run agentvm init"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse("agentvm.yaml", []byte(tt.text))
			if err == nil {
				t.Fatal("no error")
			}
			if !strings.HasPrefix(err.Error(), tt.want) {
				t.Errorf("error %q\nwant   %q", err, tt.want)
			}
			if !strings.Contains(vm.Hint(err), tt.hint) {
				t.Errorf("hint %q, want %q", vm.Hint(err), tt.hint)
			}
			if !errors.Is(err, vm.ErrUsage) {
				t.Error("not classified as wrong use")
			}
		})
	}
}

func TestMistakeShowsTheLine(t *testing.T) {
	_, err := Parse("agentvm.yaml", []byte("version: 1\nresources: {cpu: 1}\n"))
	if err == nil || !strings.Contains(err.Error(), "    2 | resources: {cpu: 1}\n      |             ^") {
		t.Errorf("got %v", err)
	}
}

func TestLoadNamesTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), FileName)
	if err := os.WriteFile(path, []byte("version: one\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path); err == nil || !strings.HasPrefix(err.Error(), "agentvm.yaml:1:10") {
		t.Errorf("got %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("version: 1\nmounts: [{source: a, target: /b}]\n"))
	f.Add([]byte("version: 1\nnetwork: {allow: ['*.example.org:443']}\n"))
	f.Add([]byte("? [a]\n: {"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("f", data)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("not an *Error: %v", err)
			}
			return
		}
		if c.Version != 1 || c.Resources.CPUs < 1 || c.Resources.Memory < minMemory {
			t.Fatalf("accepted %+v", c)
		}
	})
}
