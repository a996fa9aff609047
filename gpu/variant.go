package gpu

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Some devices have a VFIO driver of their own, a variant of vfio-pci that
// knows them: mlx5_vfio_pci can move virtual functions, nvgrace_gpu_vfio_pci
// hands over the memory that a Grace Hopper shares with its host. The kernel
// lists them in modules.alias with the prefix vfio_pci:
// (https://docs.kernel.org/driver-api/vfio-pci-device-specific-driver-acceptance.html).

// aliases is that list: patterns and modules.
type aliases [][2]string

// vfioAliases reads the list of the running kernel; none where there is none.
func (h Host) vfioAliases() (list aliases) {
	text := h.text("/lib/modules", h.text("/proc/sys/kernel/osrelease"), "modules.alias")
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == "alias" && strings.HasPrefix(f[1], "vfio_pci:") && plainName(f[2]) {
			list = append(list, [2]string{f[1], f[2]})
		}
	}
	return list
}

// best returns the module whose pattern says the most about a device, or ""
// where that is vfio-pci, whose pattern says nothing.
func (list aliases) best(modalias string) (module string) {
	id, ok := strings.CutPrefix(modalias, "pci:")
	if !ok {
		return ""
	}
	least := -1
	for _, a := range list {
		ok, err := path.Match(a[0], "vfio_pci:"+id)
		if stars := strings.Count(a[0], "*"); err == nil && ok && (least < 0 || stars < least) {
			least, module = stars, a[1]
		}
	}
	if sameModule(module, vfioDriver) {
		return ""
	}
	return module
}

// sameModule compares names as the kernel does, to which - and _ are one. A
// driver of the module hisi_acc_vfio_pci is called hisi-acc-vfio-pci.
func sameModule(a, b string) bool { return module(a) == module(b) }

func module(name string) string { return strings.ReplaceAll(name, "-", "_") }

// isVFIO reports whether a driver is vfio-pci or a variant, by the name that
// all of them have.
func isVFIO(driver string) bool {
	m := module(driver)
	return m == "vfio_pci" || strings.HasSuffix(m, "_vfio_pci")
}

// vfioFor decides which driver a device is given to: its variant, which is
// loaded for that, or vfio-pci where that cannot be.
func (m *Manager) vfioFor(ctx context.Context, d *Device) string {
	if d.Variant == "" || !isVFIO(d.Variant) {
		return vfioDriver
	}
	if driver := m.Host.driverOf(d.Variant); driver != "" {
		return driver
	}
	load := m.Host.Load
	if load == nil {
		load = modprobe
	}
	if err := load(ctx, d.Variant); err != nil {
		return vfioDriver // Check has told of it
	}
	if driver := m.Host.driverOf(d.Variant); driver != "" {
		return driver
	}
	return vfioDriver
}

// driverOf is the name under which a module has registered its driver, or "".
func (h Host) driverOf(module string) string {
	for _, driver := range h.names(pciDrivers) {
		if sameModule(driver, module) {
			return driver
		}
	}
	return ""
}

// modprobe loads a module, whatever PATH is.
func modprobe(ctx context.Context, module string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	err := errors.New("there is no modprobe")
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin"} {
		exe := filepath.Join(dir, "modprobe")
		if unix.Access(exe, unix.X_OK) != nil {
			continue
		}
		cmd := exec.CommandContext(ctx, exe, "--", module)
		cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
		out, runErr := cmd.CombinedOutput()
		if runErr != nil {
			return fmt.Errorf("load %s: %s: %w", module, strings.TrimSpace(string(out)), runErr)
		}
		return nil
	}
	return err
}
