package qemu

import (
	"context"
	"fmt"

	"github.com/agentvm/agentvm/vm"
)

// Check looks at everything that running a QEMU machine needs of the host.
// p.Caps need not be set. With
// p.Recheck, hardware virtualization is tried anew, which may take some
// seconds.
func Check(ctx context.Context, binary string, p AccelProbe) []vm.Finding {
	caps, err := Probe(ctx, binary, p.Probes)
	if err != nil {
		return []vm.Finding{{Name: "QEMU", Status: vm.FindingFail, Detail: err.Error(), Fix: vm.Hint(err)}}
	}
	p.Caps = caps
	findings := []vm.Finding{checkQEMU(caps)}
	findings = append(findings, checkAccel(ctx, p))
	return append(findings, checkUEFI(caps))
}

// checkQEMU compares the binary with the fullest machine there can be.
func checkQEMU(caps Caps) vm.Finding {
	f := vm.Finding{Name: "QEMU", Status: vm.FindingOK, Detail: fmt.Sprintf("%v at %s", caps.Version, caps.Binary)}
	full := vm.Machine{Accel: vm.AccelTCG, NICs: []vm.NIC{{}}, Shares: []vm.Share{{}}}
	if err := checkCaps(full, caps); err != nil {
		f.Status, f.Detail, f.Fix = vm.FindingFail, err.Error(), vm.Hint(err)
	}
	return f
}

func checkAccel(ctx context.Context, p AccelProbe) vm.Finding {
	f := vm.Finding{Name: "hardware virtualization", Status: vm.FindingOK}
	v, err := ProbeAccel(ctx, p)
	switch {
	case err != nil:
		f.Status, f.Detail = vm.FindingWarn, err.Error()
	case v.Accel != vm.AccelKVM:
		f.Status, f.Detail, f.Fix = vm.FindingWarn, v.Reason+", which is slow and isolates less"+races(p.Caps), v.Fix
	default:
		f.Detail = v.Reason
	}
	return f
}

// races says what is wrong with a QEMU's emulation of several processors. It is
// for people: no capability tells of it, and nothing else goes by the version.
// docs/decisions/0034-emulated-processors.md has the sources.
func races(caps Caps) string {
	if v := caps.Version.QEMU; v.Major > 8 || v.Major == 8 && v.Minor >= 1 {
		return ""
	}
	return "; before QEMU 8.1 a guest with several processors may panic, though rarely (resources.cpus: 1 avoids it)"
}

func checkUEFI(caps Caps) vm.Finding {
	f := vm.Finding{Name: "UEFI firmware", Status: vm.FindingOK}
	if caps.UEFI == nil {
		f.Status, f.Detail, f.Fix = vm.FindingWarn, "none is installed: images that boot by UEFI cannot run", installOVMF
	} else {
		f.Detail = caps.UEFI.Code
	}
	return f
}
