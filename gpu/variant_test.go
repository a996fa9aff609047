package gpu

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// modulesAlias is what depmod writes for these drivers' tables in the kernel
// (drivers/vfio/pci: mlx5/main.c, nvgrace-gpu/main.c, hisilicon/
// hisi_acc_vfio_pci.c, pds/pci_drv.c), among other lines, and with one that is
// less particular than another.
const modulesAlias = `# Aliases extracted from modules themselves.
alias pci:v000010DEd00002342sv*sd*bc*sc*i* nouveau
alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci
alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci
alias vfio_pci:v000010DEd00002342sv*sd*bc*sc*i* nvgrace_gpu_vfio_pci
alias vfio_pci:v000010DEd00002345sv*sd*bc*sc*i* nvgrace_gpu_vfio_pci
alias vfio_pci:v000019E5d0000A256sv*sd*bc*sc*i* hisi_acc_vfio_pci
alias vfio_pci:v00001DD8d00001003sv*sd*bc*sc*i* pds_vfio_pci
alias vfio_pci:v00001AF4d00001041sv*sd*bc02sc*i* virtio_vfio_pci
alias vfio_pci:v00001AF4d*sv*sd*bc*sc*i* wide_vfio_pci
alias vfio_pci:v00001234d00005678sv*sd*bc*sc*i* ../../tmp/evil
`

func TestVariants(t *testing.T) {
	f := newFake(t)
	f.put("/lib/modules/6.12.0/modules.alias", modulesAlias)
	list := f.host().vfioAliases()
	for modalias, want := range map[string]string{
		"pci:v000010DEd00002342sv000010DEsd000016EBbc03sc02i00": "nvgrace_gpu_vfio_pci",
		"pci:v000010DEd00002330sv000010DEsd000016C1bc03sc02i00": "", // an H100: vfio-pci
		"pci:v000015B3d0000101Esv000015B3sd00000000bc02sc00i00": "mlx5_vfio_pci",
		"pci:v000019E5d0000A256sv00000000sd00000000bc10sc00i00": "hisi_acc_vfio_pci",
		"pci:v00001DD8d00001003sv00001DD8sd00004003bc02sc00i00": "pds_vfio_pci",
		"pci:v00001AF4d00001041sv00001AF4sd00001100bc02sc00i00": "virtio_vfio_pci",
		"pci:v00001AF4d00001041sv00001AF4sd00001100bc01sc00i00": "wide_vfio_pci",
		"pci:v00001234d00005678sv00000000sd00000000bc03sc00i00": "",
		"usb:v000010DEd00002342":                                "", "": "",
	} {
		if got := list.best(modalias); got != want {
			t.Errorf("%s: %q, want %q", modalias, got, want)
		}
	}
	if got := (Host{Root: t.TempDir()}).vfioAliases(); got != nil {
		t.Error(got)
	}
}

func TestIsVFIO(t *testing.T) {
	for driver, want := range map[string]bool{"vfio-pci": true, "vfio_pci": true, "hisi-acc-vfio-pci": true, "nvgrace_gpu_vfio_pci": true, "": false, "nvidia": false, "vfio-pci-x": false, "novfio_pci": false} {
		if isVFIO(driver) != want {
			t.Error(driver)
		}
	}
}

// TestBindToVariant: the variant takes the card where it can be loaded, else
// vfio-pci; either is released as ever.
func TestBindToVariant(t *testing.T) {
	const registered = "nvgrace-gpu-vfio-pci" // - for _, as some do
	for name, tt := range map[string]struct {
		load func(*fake) error
		want string
	}{
		"loaded":         {func(f *fake) error { f.dir(pciDrivers, registered); return nil }, registered},
		"cannot be":      {func(*fake) error { return errors.New("no such module") }, vfioDriver},
		"loaded, no use": {func(*fake) error { return nil }, vfioDriver},
	} {
		t.Run(name, func(t *testing.T) {
			devices := cards()
			devices[3].id = "10de:2342"
			devices[3].files = map[string]string{"modalias": "pci:v000010DEd00002342sv000010DEsd000016EBbc03sc02i00\n"}
			f, m := manager(t, devices...)
			f.put("/lib/modules/6.12.0/modules.alias", modulesAlias)
			loaded := []string{}
			m.Host.Load = func(_ context.Context, module string) error { loaded = append(loaded, module); return tt.load(f) }
			before := f.state()
			inv, err := m.Host.Inventory()
			if err != nil || !slices.Contains(codes(Check(inv, inv.Get("0000:02:00.0"), nil), Warning), VariantDriver) {
				t.Error(err, Check(inv, inv.Get("0000:02:00.0"), nil))
			}
			taken, err := m.Bind(t.Context(), ask(gone, "0000:02:00.0", "0000:01:00.0"))
			if err != nil || len(taken) != 3 || taken[0].VFIO != tt.want || taken[1].VFIO != vfioDriver || f.driver("0000:02:00.0") != tt.want || !slices.Equal(loaded, []string{"nvgrace_gpu_vfio_pci"}) {
				t.Error(taken, err, f.driver("0000:02:00.0"), loaded)
			}
			if _, err := m.Recover(t.Context()); err != nil {
				t.Error(err)
			}
			if diff := cmp.Diff(before, f.state()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestPlain: who asks for vfio-pci itself gets it, and nothing is loaded.
func TestPlain(t *testing.T) {
	devices := cards()
	devices[3].id = "10de:2342"
	devices[3].files = map[string]string{"modalias": "pci:v000010DEd00002342sv000010DEsd000016EBbc03sc02i00\n"}
	f, m := manager(t, devices...)
	f.put("/lib/modules/6.12.0/modules.alias", modulesAlias)
	m.Host.Load = func(_ context.Context, module string) error { t.Errorf("%s is loaded", module); return nil }
	req := ask(gone, "0000:02:00.0")
	req.Plain = true
	if _, err := m.Bind(t.Context(), req); err != nil || f.driver("0000:02:00.0") != vfioDriver {
		t.Error(err, f.driver("0000:02:00.0"))
	}
}

// TestOtherVFIO: a card that somebody has put on another VFIO driver meanwhile is
// still ours to give back.
func TestOtherVFIO(t *testing.T) {
	const variant = "nvgrace_gpu_vfio_pci"
	for _, was := range []string{vfioDriver, variant} {
		devices := cards()
		devices[3].id = "10de:2342"
		devices[3].files = map[string]string{"modalias": "pci:v000010DEd00002342sv000010DEsd000016EBbc03sc02i00\n"}
		f, m := manager(t, devices...)
		f.put("/lib/modules/6.12.0/modules.alias", modulesAlias)
		f.dir(pciDrivers, variant)
		before := f.state()
		req := ask(gone, "0000:02:00.0")
		req.Plain = was == vfioDriver
		if _, err := m.Bind(t.Context(), req); err != nil || f.driver("0000:02:00.0") != was {
			t.Fatal(err, f.driver("0000:02:00.0"))
		}
		other := map[string]string{vfioDriver: variant, variant: vfioDriver}[was]
		for _, w := range [][2]string{ // as libvirt does it
			{pciDrivers + "/" + was + "/unbind", "0000:02:00.0"},
			{pciDevices + "/0000:02:00.0/driver_override", other},
			{pciDrivers + "_probe", "0000:02:00.0"},
		} {
			f.must(f.write(t.Context(), w[0], w[1]))
		}
		if got := f.driver("0000:02:00.0"); got != other {
			t.Fatal(got)
		}
		if _, err := m.Recover(t.Context()); err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(before, f.state()); diff != "" {
			t.Error(diff)
		}
	}
}

// TestModprobe runs the real one, as far as its complaint.
func TestModprobe(t *testing.T) {
	if err := modprobe(t.Context(), "agentvm_has_no_such_module"); err == nil {
		t.Error("it was loaded")
	}
}
