package main

import (
	"os"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm/testenv"
)

// TestDriverLayer boots a machine with a driver's layer, where there is no
// card and no network: it runs the kernel that the driver is for, every module
// loads or says that there is no device, and status tells what the driver's own
// program says. Baking NVIDIA's and AMD's layers takes long; they are tested when
// AGENTVM_TEST_DRIVERS names them.
func TestDriverLayer(t *testing.T) {
	t.Parallel()
	testenv.RequireRoot(t) // baking and the general kernel's boot take minutes under emulation
	h := newHost(t)
	names := strings.Fields(os.Getenv("AGENTVM_TEST_DRIVERS"))
	if len(names) == 0 {
		names = []string{"intel"}
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) { testDriverLayer(t, h, name) })
	}
}

func testDriverLayer(t *testing.T, h *host, name string) {
	driver, err := images.DriverByName(name)
	if err != nil {
		t.Fatal(err)
	}
	dir := h.project(name, "version: 1\nagent: {use: shell}\nresources: {memory: 1GiB}\nprovision: {driver: "+name+", accept: [nvidia]}\n")
	h.must(dir, "up", "--cold")
	release := strings.TrimSpace(h.guest(dir, "uname -r"))
	if want := driver.Kernel == ""; strings.HasSuffix(release, "-cloud-amd64") != want {
		t.Errorf("it runs Linux %s", release)
	}
	for _, module := range driver.Modules {
		// What modprobe would insert is there, and was built for this kernel.
		got := h.guest(dir, `set -e; modprobe=/usr/sbin/modprobe
sudo $modprobe --show-depends `+module+` | while read -r insert file rest; do [ "$insert" != insmod ] || [ -e "$file" ]; done
/usr/sbin/modinfo -F vermagic `+module+` | cut -d ' ' -f 1
sudo $modprobe `+module+` 2>&1 | grep -v 'No such device' || :`)
		if strings.TrimSpace(got) != release {
			t.Errorf("%s: %q, and it runs Linux %s", module, got, release)
		}
	}
	if got := h.guest(dir, "systemctl --failed --no-legend | grep -v nvidia-persistenced || :"); got != "" {
		t.Errorf("failed: %s", got)
	}
	for _, service := range driver.Services {
		if got := h.guest(dir, "systemctl is-enabled "+service); got != "enabled\n" {
			t.Errorf("%s is %s", service, got)
		}
	}
	said := h.runIn(dir, "", append([]string{"exec", "--"}, driver.Status...)...)
	shown := h.must(dir, "status").stdout
	for _, line := range cardLines([]byte(said.stdout + said.stderr)) {
		if !strings.HasPrefix(line, "agentvm:") && !strings.Contains(shown, "guest's cards  "+line+"\n") {
			t.Errorf("status does not tell that %s says %q:\n%s", driver.Status[0], line, shown)
		}
	}
	if !strings.Contains(shown, "guest's cards") {
		t.Errorf("status does not tell of the guest's cards:\n%s", shown)
	}
	h.must(dir, "down")
}
