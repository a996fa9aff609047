package helper

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/gpu"
	"github.com/agentvm/agentvm/vm"
)

func TestParseAllowList(t *testing.T) {
	list, err := parseAllowList([]byte("version: 1\nallow:\n  - {users: [alice, \"1001\"], devices: [any]}\n  - {users: [bob], devices: [\"0000:01:00.0\", \"10de:2330\"]}\n  - {users: [alice], devices: [\"10de:1af1\", " + vgpu + "]}\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		c    caller
		want []string
	}{
		{caller{UID: 1000, Name: "alice"}, []string{"any", "10de:1af1", vgpu}},
		{caller{UID: 1001}, []string{"any"}},
		{caller{UID: 1002, Name: "bob"}, []string{"0000:01:00.0", "10de:2330"}},
		{caller{UID: 1003, Name: "eve"}, nil},
		{caller{UID: 1004}, nil},
		{caller{UID: 100}, nil},
	} {
		if diff := cmp.Diff(tt.want, list.of(tt.c)); diff != "" {
			t.Error(tt.c, diff)
		}
	}
	for bad, says := range map[string]string{
		"":                                      "",
		"version: 2\n":                          "version 2 is not known",
		"allow: []\n":                           "version 0 is not known",
		"version: 1\nallows: []\n":              "unknown field",
		"version: 1\nallow: [{users: [a]}]":     "no user or no device",
		"version: 1\nallow: [{devices: [any]}]": "no user or no device",
		"version: 1\nallow: [{users: [\"\"], devices: [any]}]":                               "name is empty",
		"version: 1\nallow: [{users: [a], devices: [\"*\"]}]":                                "neither an address",
		"version: 1\nallow: [{users: [a], devices: [\"01:00.0\"]}]":                          "neither an address",
		"version: 1\nallow: [{users: [a], devices: [GPU]}]":                                  "neither an address",
		"version: 1\nallow: [{users: [a], devices: [C2177883-F1BB-47F0-914D-32A22E3A8804]}]": "neither an address",
	} {
		if l, err := parseAllowList([]byte(bad)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %+v, %v", bad, l, err)
		}
	}
}

func FuzzAllowList(f *testing.F) {
	f.Add([]byte("version: 1\nallow: [{users: [a], devices: [any]}]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := parseAllowList(data)
		if err != nil {
			return
		}
		for _, r := range list.Allow {
			if len(r.Users) == 0 || len(r.Devices) == 0 {
				t.Errorf("%+v", list)
			}
		}
		if got := list.of(caller{UID: 4242}); len(got) > 0 && !strings.Contains(string(data), "4242") {
			t.Errorf("a stranger may take %q", got)
		}
	})
}

func TestPermit(t *testing.T) {
	card := &gpu.Device{Address: "0000:01:00.0", Vendor: 0x10de, Device: 0x20f1, Class: 0x030000}
	sound := &gpu.Device{Address: "0000:01:00.1", Vendor: 0x10de, Device: 0x1aef, Class: 0x040300}
	usb := &gpu.Device{Address: "0000:01:00.2", Vendor: 0x10de, Device: 0x1ad6, Class: 0x0c0330}
	disk := &gpu.Device{Address: "0000:01:00.3", Vendor: 0x144d, Device: 0xa808, Class: 0x010802}
	second := &gpu.Device{Address: "0000:01:00.4", Vendor: 0x10de, Device: 0x2330, Class: 0x030200}
	otherSound := &gpu.Device{Address: "0000:02:00.1", Vendor: 0x10de, Device: 0x1aef, Class: 0x040300}
	part := func(of *gpu.Device) []*gpu.Mdev { return []*gpu.Mdev{{UUID: vgpu, Card: of}} }
	for _, tt := range []struct {
		name      string
		allowed   []string
		functions []*gpu.Device
		parts     []*gpu.Mdev
		refused   string // address, or UUID
	}{
		{"a part by its UUID", []string{vgpu}, nil, part(card), ""},
		{"a part by its card", []string{card.Address}, nil, part(card), ""},
		{"a part by its card's id", []string{"10de:20f1"}, nil, part(card), ""},
		{"a part of any card", []string{anyCard}, nil, part(card), ""},
		{"a part of another card", []string{second.Address}, nil, part(card), vgpu},
		{"a part of what is no card", []string{anyCard}, nil, part(disk), vgpu},
		{"a part of nothing known", []string{anyCard, card.Address}, nil, part(nil), vgpu},
		{"such a part that is named", []string{vgpu}, nil, part(nil), ""},
		{"a part, and a card that is not", []string{vgpu}, []*gpu.Device{card}, part(second), card.Address},
		{"another part", []string{"c2177883-f1bb-47f0-914d-32a22e3a8805"}, nil, part(card), vgpu},
		{"a card with what it brings", []string{anyCard}, []*gpu.Device{card, sound, usb}, nil, ""},
		{"by address", []string{card.Address}, []*gpu.Device{card, sound, usb}, nil, ""},
		{"by id", []string{"10de:20f1"}, []*gpu.Device{card, sound}, nil, ""},
		{"another card", []string{"10de:2330"}, []*gpu.Device{card, sound}, nil, card.Address},
		{"nothing", nil, []*gpu.Device{card}, nil, card.Address},
		{"a disk in the slot", []string{anyCard}, []*gpu.Device{card, sound, disk}, nil, disk.Address},
		{"a disk that is named", []string{anyCard, disk.Address}, []*gpu.Device{card, disk}, nil, ""},
		{"a second card in the slot", []string{card.Address}, []*gpu.Device{card, second}, nil, second.Address},
		{"sound without its card", []string{anyCard}, []*gpu.Device{sound}, nil, sound.Address},
		{"sound of another slot", []string{anyCard}, []*gpu.Device{card, otherSound}, nil, otherSound.Address},
		{"a disk alone", []string{anyCard}, []*gpu.Device{disk}, nil, disk.Address},
	} {
		err := permit(tt.allowed, tt.functions, tt.parts)
		if tt.refused == "" && err != nil || tt.refused != "" && (!errors.Is(err, vm.ErrPolicy) || !strings.Contains(err.Error(), tt.refused) || vm.Hint(err) == "") {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// TestTrusted: who could have put the file there.
func TestTrusted(t *testing.T) {
	me := os.Geteuid()
	write := func(t *testing.T) string {
		root := t.TempDir()
		if err := errors.Join(os.Chmod(root, 0o755), os.MkdirAll(filepath.Join(root, "etc/agentvm"), 0o755),
			os.WriteFile(filepath.Join(root, AllowFile), []byte("version: 1\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
		return root
	}
	if err := trusted(write(t), AllowFile, me); err != nil {
		t.Error(err)
	}
	if err := trusted(write(t), AllowFile, me+1); err == nil || !strings.Contains(err.Error(), "belongs to user") {
		t.Error(err)
	}
	for _, path := range []string{"/", "/etc", "/etc/agentvm", AllowFile} {
		for _, mode := range []os.FileMode{0o775, 0o757, 0o777 | os.ModeSticky} {
			root := write(t)
			if err := os.Chmod(filepath.Join(root, path), mode); err != nil {
				t.Fatal(err)
			}
			if err := trusted(root, AllowFile, me); err == nil || !strings.Contains(err.Error(), "can be written by others") || vm.Hint(err) != "sudo chmod go-w "+path {
				t.Error(path, mode, err, vm.Hint(err))
			}
		}
	}
	for _, path := range []string{"/etc", "/etc/agentvm", AllowFile} {
		root := write(t)
		at := filepath.Join(root, path)
		if err := errors.Join(os.Rename(at, at+".real"), os.Symlink(at+".real", at)); err != nil {
			t.Fatal(err)
		}
		if err := trusted(root, AllowFile, me); err == nil || !strings.Contains(err.Error(), "is a link") {
			t.Error(path, err)
		}
	}
	if _, err := readAllowList(t.TempDir(), me); !errors.Is(err, vm.ErrPolicy) || vm.Hint(err) != "agentvm gpu helper-setup prints an example" {
		t.Error(err)
	}
}

func TestLookup(t *testing.T) {
	env := func(pairs ...string) func(string) string {
		return func(name string) string {
			for i := 0; i < len(pairs); i += 2 {
				if pairs[i] == name {
					return pairs[i+1]
				}
			}
			return ""
		}
	}
	if c, err := lookup(env("SUDO_UID", "4242", "USER", "root")); err != nil || c != (caller{UID: 4242, Via: "sudo"}) {
		t.Error(c, err)
	}
	if c, err := lookup(env("PKEXEC_UID", "0")); err != nil || c != (caller{UID: 0, Name: "root", Via: "pkexec"}) {
		t.Error(c, err)
	}
	if c, err := lookup(env()); err != nil || c.UID != 0 || c.Via != "" {
		t.Error(c, err)
	}
	for _, bad := range []func(string) string{env("SUDO_UID", "1", "PKEXEC_UID", "1"), env("SUDO_UID", "-1"), env("SUDO_UID", "root"), env("PKEXEC_UID", "4294967295"), env("SUDO_UID", " 0")} {
		if c, err := lookup(bad); err == nil {
			t.Error(c)
		}
	}
}
