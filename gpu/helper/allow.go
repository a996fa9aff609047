package helper

import (
	"bytes"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/agentvm/agentvm/gpu"
	"github.com/agentvm/agentvm/vm"
)

// AllowFile says which user may take which devices. Without it nobody may.
const AllowFile = "/etc/agentvm/gpu.yaml"

const maxAllow = 64 << 10 // bytes

// allowList is that file.
type allowList struct {
	Version int         `yaml:"version"`
	Allow   []allowRule `yaml:"allow"`
}

type allowRule struct {
	Users   []string `yaml:"users"`   // names, or numbers of users
	Devices []string `yaml:"devices"` // addresses, vendor:device, UUIDs of mediated devices, or any: every card and accelerator
}

// anyCard stands for all that [gpu.Device.Endpoint] is true of.
const anyCard = "any"

var idPattern = vm.Pattern(`^[0-9a-f]{4}:[0-9a-f]{4}$`)

// readAllowList reads the file below root, which must be owner's.
func readAllowList(root string, owner int) (list allowList, err error) {
	fail := func(err error, hint string) (allowList, error) {
		return allowList{}, vm.WithHint(vm.Classify(vm.ErrPolicy, fmt.Errorf("no user may take a device: %w", err)), hint)
	}
	const setup = "agentvm gpu helper-setup prints an example"
	if err := trusted(root, AllowFile, owner); err != nil {
		hint := vm.Hint(err)
		if hint == "" {
			hint = setup
		}
		return fail(err, hint)
	}
	data, err := os.ReadFile(filepath.Join(root, AllowFile))
	if err != nil {
		return fail(err, setup)
	}
	if len(data) > maxAllow {
		return fail(fmt.Errorf("%s is longer than %d bytes", AllowFile, maxAllow), "shorten it")
	}
	if list, err = parseAllowList(data); err != nil {
		return fail(fmt.Errorf("%s: %w", AllowFile, err), setup)
	}
	return list, nil
}

func parseAllowList(data []byte) (list allowList, err error) {
	if err := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict()).Decode(&list); err != nil {
		return allowList{}, err
	}
	if list.Version != 1 {
		return allowList{}, fmt.Errorf("version %d is not known; this program reads version: 1", list.Version)
	}
	for i, r := range list.Allow {
		if len(r.Users) == 0 || len(r.Devices) == 0 {
			return allowList{}, fmt.Errorf("rule %d names no user or no device", i+1)
		}
		if slices.Contains(r.Users, "") {
			return allowList{}, fmt.Errorf("rule %d: a user's name is empty", i+1)
		}
		for _, d := range r.Devices {
			if d != anyCard && !addressPattern().MatchString(d) && !idPattern().MatchString(d) && !gpu.IsUUID(d) {
				return allowList{}, fmt.Errorf("rule %d: %q is neither an address (0000:01:00.0) nor vendor:device (10de:2330) nor the UUID of a mediated device nor %s", i+1, d, anyCard)
			}
		}
	}
	return list, nil
}

// caller is who asks.
type caller struct {
	UID  int
	Name string // "" where the system has none for the number
	Via  string // sudo or pkexec
}

// of returns the devices that a user may take; none: the user may nothing.
func (l allowList) of(c caller) (devices []string) {
	for _, r := range l.Allow {
		if slices.Contains(r.Users, strconv.Itoa(c.UID)) || c.Name != "" && slices.Contains(r.Users, c.Name) {
			devices = append(devices, r.Devices...)
		}
	}
	return devices
}

// permit decides whether these devices may go together, each with the rest of
// its slot: what is a card of its own must be allowed itself; sound, USB and
// the like of a slot in which a card is go along with it; and nothing else does.
// Who may take a card may take a part of it.
func permit(allowed []string, functions []*gpu.Device, parts []*gpu.Mdev) error {
	named := func(d *gpu.Device) bool {
		return slices.Contains(allowed, d.Address) || slices.Contains(allowed, d.ID()) || d.Endpoint() && slices.Contains(allowed, anyCard)
	}
	slot := func(d *gpu.Device) string { s, _, _ := strings.Cut(d.Address, "."); return s }
	var cards []string // slots with a card that is allowed
	for _, d := range functions {
		if d.Endpoint() && named(d) {
			cards = append(cards, slot(d))
		}
	}
	for _, d := range functions {
		if named(d) || !d.Endpoint() && companion(d) && slices.Contains(cards, slot(d)) {
			continue
		}
		return vm.WithHint(vm.Classify(vm.ErrPolicy, fmt.Errorf("you may not take %s (%s)", d.Address, d.ID())), "root names it in "+AllowFile)
	}
	for _, m := range parts {
		if slices.Contains(allowed, m.UUID) || m.Card != nil && named(m.Card) {
			continue
		}
		return vm.WithHint(vm.Classify(vm.ErrPolicy, fmt.Errorf("you may not take %s", m.UUID)), "root names it, or its card, in "+AllowFile)
	}
	return nil
}

// companion reports whether a function is of a kind that cards bring along:
// sound, USB, and the controller of a USB-C socket.
func companion(d *gpu.Device) bool {
	return slices.Contains([]uint32{0x0403, 0x0c03, 0x0c80}, d.Class>>8)
}

// callerVariables are what sudo and pkexec set.
var callerVariables = []string{"SUDO_UID", "PKEXEC_UID"}

// lookup finds the caller by what sudo or pkexec, which both set their
// variable themselves, says. Neither: root called by itself.
func lookup(getenv func(string) string) (caller, error) {
	sudo, pkexec := getenv("SUDO_UID"), getenv("PKEXEC_UID")
	var c caller
	text := "0"
	switch {
	case sudo != "" && pkexec != "":
		return c, fmt.Errorf("both sudo and pkexec are said to have called")
	case sudo != "":
		c.Via, text = "sudo", sudo
	case pkexec != "":
		c.Via, text = "pkexec", pkexec
	}
	uid, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		return c, fmt.Errorf("%q is not a user", text)
	}
	c.UID = int(uid)
	if u, err := user.LookupId(text); err == nil {
		c.Name = u.Username
	}
	return c, nil
}
