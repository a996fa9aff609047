package gpu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// fake is a host in a directory, whose /sys behaves: what is written to
// bind, unbind, drivers_probe and driver_override has the kernel's effects.
type fake struct {
	t       *testing.T
	root    string
	refuses map[string]bool // drivers that do not take devices
	blocks  map[string]bool // addresses whose unbind waits
	pending map[string]bool // such an unbind has begun
	fails   int             // which write fails, counted from now; -1: none
	owners  map[string]int  // of nodes that were given to somebody
	writes  []string
}

// fakeDevice is a function to be. Files are more files of its directory.
type fakeDevice struct {
	address, id, class, driver, override, group, physfn string
	native                                              []string // drivers that would take it
	files                                               map[string]string
}

const thisBoot = "7d2f3a3e-0f0d-4a6c-9f57-2b1d2d5b1c11"

func newFake(t *testing.T, devices ...fakeDevice) *fake {
	t.Helper()
	f := &fake{t: t, root: memoryDir(t), fails: -1, refuses: map[string]bool{}, blocks: map[string]bool{}, pending: map[string]bool{}, owners: map[string]int{}}
	f.put("/proc/sys/kernel/random/boot_id", thisBoot+"\n")
	f.put("/proc/sys/kernel/osrelease", "6.12.0\n")
	f.put("/proc/cpuinfo", "processor\t: 0\nvendor_id\t: GenuineIntel\n")
	f.put("/run/x", "")
	f.dir(pciDrivers, vfioDriver)
	f.dir(pciDevices)
	for _, d := range devices {
		f.add(d)
		f.node(d.address)
	}
	return f
}

// memoryDir is a directory in memory where there is one: each step is synced,
// and tests take thousands.
func memoryDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "gpu-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func (f *fake) at(path ...string) string { return filepath.Join(append([]string{f.root}, path...)...) }

func (f *fake) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

func (f *fake) dir(path ...string) { f.must(os.MkdirAll(f.at(path...), 0o755)) }

func (f *fake) put(path, data string) {
	f.dir(filepath.Dir(path))
	f.must(os.WriteFile(f.at(path), []byte(data), 0o644))
}

func (f *fake) symlink(target, path string) {
	f.dir(filepath.Dir(path))
	f.must(os.Symlink(target, f.at(path)))
}

func (f *fake) add(d fakeDevice) {
	f.t.Helper()
	dir := filepath.Join(pciDevices, d.address)
	vendor, device, _ := strings.Cut(d.id, ":")
	header := make([]byte, 64)
	if strings.HasPrefix(d.class, "0x0604") {
		header[0x0e] = 1
	}
	override := d.override
	if override == "" {
		override = "(null)"
	}
	for name, data := range map[string]string{
		"vendor": "0x" + vendor, "device": "0x" + device, "class": d.class, "resource": resourceLines(), "config": string(header),
		"driver_override": override, "numa_node": "-1", "reset_method": "flr bus", "subsystem_vendor": "0x10de", "subsystem_device": "0x16c1", "revision": "0xa1",
	} {
		f.put(filepath.Join(dir, name), data+"\n")
	}
	for name, data := range d.files {
		f.put(filepath.Join(dir, name), data)
	}
	if d.group != "" {
		f.symlink("../../../kernel/iommu_groups/"+d.group, filepath.Join(dir, "iommu_group"))
		f.put(filepath.Join(iommuDir, d.group, "devices", d.address), "")
	}
	if d.physfn != "" {
		f.symlink("../"+d.physfn, filepath.Join(dir, "physfn"))
	}
	native := d.native
	if d.driver != "" {
		f.dir(pciDrivers, d.driver)
		f.symlink("../../drivers/"+d.driver, filepath.Join(dir, "driver"))
		if !isVFIO(d.driver) { // which takes only what an override names
			native = append(slices.Clone(native), d.driver)
		}
	}
	for _, n := range native {
		f.dir(pciDrivers, n)
	}
	f.put(filepath.Join("/native", d.address), strings.Join(native, " "))
}

// resourceLines is a resource file with lines of these BARs, the rest unused.
func resourceLines(bars ...string) string {
	for len(bars) < 7 {
		bars = append(bars, "0x0000000000000000 0x0000000000000000 0x0000000000000000")
	}
	return strings.Join(bars, "\n")
}

// mediate makes a mediated device, a part of a card, with nodes of both kinds.
func (f *fake) mediate(uuid, card, group string) {
	f.t.Helper()
	at := filepath.Join("/sys/devices/pci0000:00", card, uuid)
	f.put(at+"/mdev_type/name", "GRID T4-2Q\n")
	f.symlink("../../../../kernel/iommu_groups/"+group, at+"/iommu_group")
	f.symlink("../../../../bus/mdev/drivers/nvidia-vgpu-vfio", at+"/driver")
	f.put(at+"/vfio-dev/vfio"+group+"/dev", "")
	f.put("/dev/vfio/"+group, "")
	f.put("/dev/vfio/devices/vfio"+group, "")
	f.symlink("../../../devices/pci0000:00/"+card+"/"+uuid, filepath.Join(mdevDevices, uuid))
}

// unmediate removes one, as writing to its file remove does.
func (f *fake) unmediate(uuid, group string) {
	f.must(os.Remove(f.at(mdevDevices, uuid)))
	for _, node := range []string{"/dev/vfio/" + group, "/dev/vfio/devices/vfio" + group} {
		f.must(os.Remove(f.at(node)))
		delete(f.owners, node)
	}
}

func (f *fake) host() Host {
	return Host{Root: f.root, Write: f.write, Viable: f.viable, Chown: f.chown, Blocked: func(address string) bool { return f.pending[address] }}
}

func (f *fake) override(address string) string {
	return Host{Root: f.root}.lockedFiles(filepath.Join(pciDevices, address)).override()
}

func (f *fake) driver(address string) string {
	return Host{Root: f.root}.link(pciDevices, address, "driver")
}

// write is the kernel's side of a write to sysfs.
func (f *fake) write(_ context.Context, path, data string) error {
	f.writes = append(f.writes, path+"="+strings.TrimSpace(data))
	if f.fails--; f.fails == -1 {
		return errors.New("input/output error")
	}
	name := filepath.Base(path)
	if name == "driver_override" {
		address := filepath.Base(filepath.Dir(path))
		if f.pending[address] {
			return ErrBlocked // the device's lock is held
		}
		if data == "\n" {
			data = "(null)"
		}
		f.put(path, data+"\n")
		return nil
	}
	address := strings.TrimSpace(data)
	if _, err := os.Stat(f.at(pciDevices, address)); err != nil {
		return errors.New("no such device")
	}
	if f.pending[address] {
		return ErrBlocked
	}
	switch name {
	case "unbind":
		if f.driver(address) != filepath.Base(filepath.Dir(path)) {
			return errors.New("no such device")
		}
		if f.blocks[address] {
			f.pending[address] = true
			return ErrBlocked
		}
		f.must(os.Remove(f.at(pciDevices, address, "driver")))
		f.node(address)
		return nil
	case "bind":
		return f.bind(address, filepath.Base(filepath.Dir(path)))
	case "drivers_probe":
		if f.driver(address) != "" {
			return nil
		}
		override := f.override(address)
		for _, d := range f.natives(address) {
			if (override == "" || override == d) && f.bind(address, d) == nil {
				return nil
			}
		}
		if override != "" {
			_ = f.bind(address, override)
		}
		return nil
	}
	return fmt.Errorf("nothing writes to %s", path)
}

func (f *fake) natives(address string) []string {
	return strings.Fields(Host{Root: f.root}.text("/native", address))
}

func (f *fake) bind(address, driver string) error {
	override := f.override(address)
	matches := override == driver || override == "" && slices.Contains(f.natives(address), driver)
	if _, err := os.Stat(f.at(pciDrivers, driver)); err != nil || !matches || f.refuses[driver] || f.driver(address) != "" {
		return errors.New("no such device")
	}
	f.symlink("../../drivers/"+driver, filepath.Join(pciDevices, address, "driver"))
	f.node(address)
	return nil
}

// node makes or removes the node of a function's group, as the last of the
// group to come to VFIO or to leave it does.
func (f *fake) node(address string) {
	group := Host{Root: f.root}.link(pciDevices, address, "iommu_group")
	if group == "" {
		return
	}
	path := "/dev/vfio/" + group
	if slices.ContainsFunc((Host{Root: f.root}).names(iommuDir, group, "devices"), func(m string) bool { return isVFIO(f.driver(m)) }) {
		f.put(path, "")
		return
	}
	_ = os.Remove(f.at(path)) // it may not be there
	delete(f.owners, path)
}

func (f *fake) chown(path string, uid int) error {
	if _, err := os.Lstat(f.at(path)); err != nil {
		return err
	}
	f.owners[path] = uid
	if uid == os.Geteuid() {
		delete(f.owners, path) // as it was
	}
	return nil
}

// letGo ends what blocked an unbind.
func (f *fake) letGo(address string) {
	delete(f.blocks, address)
	if f.pending[address] {
		delete(f.pending, address)
		f.must(os.Remove(f.at(pciDevices, address, "driver")))
	}
}

// viable is the kernel's rule: no member is bound to a host's driver.
func (f *fake) viable(group string) error {
	for _, m := range (Host{Root: f.root}).names(iommuDir, group, "devices") {
		if d := f.driver(m); d != "" && !isVFIO(d) && d != "pcieport" {
			return fmt.Errorf("%s is on %s", m, d)
		}
	}
	return nil
}

// state is what must be the same again in the end.
func (f *fake) state() map[string]string {
	s := map[string]string{}
	for _, a := range (Host{Root: f.root}).names(pciDevices) {
		s[a] = f.driver(a) + " override=" + f.override(a)
	}
	for path, uid := range f.owners {
		s[path] = fmt.Sprintf("uid %d", uid)
	}
	return s
}
