package libvirt

import (
	"fmt"
	"os"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// checkConfined makes sure of what a host's libvirt may be configured to leave
// out: that QEMU has no privileges, is owner's (nil: any ordinary user's), and
// has a seccomp filter. root is where /proc is.
func checkConfined(root string, p vm.ProcID, owner *vm.Owner) error {
	data, err := os.ReadFile(fmt.Sprintf("%s/proc/%d/status", root, p.PID))
	if err != nil {
		return fmt.Errorf("look at QEMU's confinement: %w", err)
	}
	field := map[string]string{}
	for line := range strings.Lines(string(data)) {
		name, value, _ := strings.Cut(line, ":")
		field[name] = strings.TrimSpace(value)
	}
	refuse := func(hint, format string, args ...any) error {
		return vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf(format, args...)), hint)
	}
	uids := strings.Fields(field["Uid"])
	for _, uid := range uids { // real, effective, saved, file system
		if uid == "0" || owner != nil && uid != fmt.Sprint(owner.UID) {
			return refuse("see user and security_driver in libvirt's qemu.conf: its driver dac must be on", "libvirt runs QEMU as user %s, which is not the machine's own", uid)
		}
	}
	if len(uids) != 4 {
		return fmt.Errorf("look at QEMU's confinement: no users in /proc/%d/status", p.PID)
	}
	if caps := strings.Trim(field["CapEff"], "0"); caps != "" {
		return refuse("see clear_emulator_capabilities in libvirt's qemu.conf", "libvirt runs QEMU with capabilities (%s)", field["CapEff"])
	}
	if field["Seccomp"] != "2" { // SECCOMP_MODE_FILTER
		return refuse("see seccomp_sandbox in libvirt's qemu.conf", "libvirt runs QEMU without a seccomp filter")
	}
	return nil
}
