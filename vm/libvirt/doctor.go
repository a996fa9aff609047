package libvirt

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	golibvirt "github.com/digitalocean/go-libvirt"
	"libvirt.org/go/libvirtxml"

	"github.com/agentvm/agentvm/vm"
)

// Host is what Check needs to know of agentvm's own.
type Host struct {
	Run  string // below it are the machines' sockets
	User int    // uid of whose machines these are
	// Lives reports whether the machine with an instance's id has a supervisor.
	Lives func(id string) bool
}

// Check looks at everything that running machines in the libvirt needs.
func Check(ctx context.Context, uri URI, h Host) []vm.Finding {
	conn, err := Open(ctx, uri)
	if err != nil {
		return []vm.Finding{{Name: "libvirt", Status: vm.FindingFail, Detail: err.Error(), Fix: vm.Hint(err)}}
	}
	defer conn.Close()
	version, err := conn.Version(ctx)
	if err != nil {
		return []vm.Finding{{Name: "libvirt", Status: vm.FindingFail, Detail: err.Error()}}
	}
	text, err := call(ctx, conn, "ask libvirt what it can do", (*golibvirt.Libvirt).ConnectGetCapabilities)
	var caps libvirtxml.Caps
	if err == nil {
		err = caps.Unmarshal(text)
	}
	if err != nil {
		return []vm.Finding{{Name: "libvirt", Status: vm.FindingFail, Detail: err.Error()}}
	}
	findings := []vm.Finding{
		{Name: "libvirt", Status: vm.FindingOK, Detail: fmt.Sprintf("%s at %s", version, uri.Text)},
		checkGuests(caps),
		checkConfinement(os.DirFS("/"), caps, uri, h.Run),
	}
	return append(findings, leftovers(ctx, conn, uri, h)...)
}

// checkGuests wants a QEMU of the guests' architecture.
func checkGuests(caps libvirtxml.Caps) vm.Finding {
	f := vm.Finding{Name: "libvirt's QEMU", Status: vm.FindingOK}
	for _, g := range caps.Guests {
		if g.OSType == "hvm" && g.Arch.Name == "x86_64" {
			f.Detail = g.Arch.Emulator
			return f
		}
	}
	f.Status, f.Detail, f.Fix = vm.FindingFail, "libvirt knows no QEMU for x86-64 guests", "sudo apt-get install libvirt-daemon-driver-qemu qemu-system-x86, then restart libvirtd"
	return f
}

// apparmorRules is where a host's administrator adds to what libvirt's QEMUs may do
// (https://gitlab.com/libvirt/libvirt/-/blob/master/src/security/apparmor/libvirt-qemu.in).
const apparmorRules = "etc/apparmor.d/local/abstractions/libvirt-qemu"

// checkConfinement looks at the security drivers. root is the host's file system,
// run where the machines' sockets are.
func checkConfinement(root fs.FS, caps libvirtxml.Caps, uri URI, run string) vm.Finding {
	var models []string
	for _, m := range caps.Host.SecModel {
		models = append(models, m.Name)
	}
	f := vm.Finding{Name: "libvirt's confinement", Status: vm.FindingOK, Detail: strings.Join(models, ", ")}
	switch {
	case !uri.Session && !slices.Contains(models, "dac"):
		f.Status, f.Detail = vm.FindingFail, "without its driver dac, libvirt cannot run QEMU as the machine's own user"
		f.Fix = "remove security_driver and security_default_confined from /etc/libvirt/qemu.conf, then restart libvirtd"
	case slices.Contains(models, "apparmor"):
		rule := fmt.Sprintf("owner %s/*/vm/*.sock rw,", run)
		rules, err := fs.ReadFile(root, apparmorRules)
		if err != nil || !strings.Contains(string(rules), rule) {
			f.Status, f.Detail = vm.FindingWarn, "AppArmor keeps libvirt's QEMUs from sockets that libvirt does not know, such as the network's"
			f.Fix = fmt.Sprintf("echo '%s' | sudo tee -a /%s", rule, apparmorRules)
		}
	case slices.Contains(models, "selinux"):
		f.Status, f.Detail = vm.FindingWarn, "agentvm has not been tried with libvirt under SELinux, which has to let QEMU (svirt_t) connect to sockets below "+run
	}
	return f
}

// leftovers are domains of this user's machines that nobody stands behind.
func leftovers(ctx context.Context, conn *Conn, uri URI, h Host) (findings []vm.Finding) {
	domains, err := call(ctx, conn, "list libvirt's machines", func(l *golibvirt.Libvirt) ([]golibvirt.Domain, error) {
		list, _, err := l.ConnectListAllDomains(1, golibvirt.ConnectListDomainsActive)
		return list, err
	})
	if err != nil {
		return []vm.Finding{{Name: "libvirt's machines", Status: vm.FindingFail, Detail: err.Error()}}
	}
	for _, dom := range domains {
		meta, err := metadataOf(ctx, conn, dom)
		if err != nil || meta.User != h.User || h.Lives(meta.ID) {
			continue // somebody else's, gone this moment, or as it should be
		}
		findings = append(findings, vm.Finding{
			Name: "domain " + dom.Name, Status: vm.FindingWarn,
			Detail: fmt.Sprintf("it is left of machine %q of %s, which nobody runs", meta.Name, meta.Workspace),
			Fix:    fmt.Sprintf("virsh -c '%s' destroy %s", uri.Text, dom.Name),
		})
	}
	return findings
}
