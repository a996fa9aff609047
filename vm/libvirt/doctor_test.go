package libvirt

import (
	"strings"
	"testing"
	"testing/fstest"

	"libvirt.org/go/libvirtxml"

	"github.com/agentvm/agentvm/vm"
)

func TestConfinementIsChecked(t *testing.T) {
	const rule = "owner /run/agentvm/*/vm/*.sock rw,"
	for name, tt := range map[string]struct {
		models  string
		session bool
		rules   string
		status  vm.FindingStatus
		says    string
	}{
		"dac":               {"none dac", false, "", vm.FindingOK, "none, dac"},
		"no dac":            {"none", false, "", vm.FindingFail, "its driver dac"},
		"session":           {"none", true, "", vm.FindingOK, "none"},
		"apparmor":          {"apparmor dac", false, "", vm.FindingWarn, rule},
		"apparmor, allowed": {"apparmor dac", false, "# ours\n" + rule + "\n", vm.FindingOK, "apparmor, dac"},
		"selinux":           {"selinux dac", false, "", vm.FindingWarn, "svirt_t"},
	} {
		t.Run(name, func(t *testing.T) {
			var caps libvirtxml.Caps
			for _, m := range strings.Fields(tt.models) {
				caps.Host.SecModel = append(caps.Host.SecModel, libvirtxml.CapsHostSecModel{Name: m})
			}
			root := fstest.MapFS{}
			if tt.rules != "" {
				root[apparmorRules] = &fstest.MapFile{Data: []byte(tt.rules)}
			}
			f := checkConfinement(root, caps, URI{Session: tt.session}, "/run/agentvm")
			if f.Status != tt.status || !strings.Contains(f.Detail+f.Fix, tt.says) {
				t.Errorf("%+v", f)
			}
		})
	}
}

func TestGuestsAreChecked(t *testing.T) {
	var caps libvirtxml.Caps
	caps.Guests = []libvirtxml.CapsGuest{{OSType: "hvm", Arch: libvirtxml.CapsGuestArch{Name: "i686", Emulator: "/q32"}}}
	if f := checkGuests(caps); f.Status != vm.FindingFail || f.Fix == "" {
		t.Errorf("%+v", f)
	}
	caps.Guests = append(caps.Guests, libvirtxml.CapsGuest{OSType: "hvm", Arch: libvirtxml.CapsGuestArch{Name: "x86_64", Emulator: "/q64"}})
	if f := checkGuests(caps); f.Status != vm.FindingOK || f.Detail != "/q64" {
		t.Errorf("%+v", f)
	}
}
