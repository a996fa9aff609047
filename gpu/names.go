package gpu

import (
	"cmp"
	"fmt"
	"os"
	"strings"

	"github.com/jaypipes/pcidb"
)

// nameFiles are where distributions keep the database of PCI ids.
var nameFiles = []string{"/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids"}

// nameDevices gives devices the names of the distribution's database, and those
// that it does not know what their driver calls them. Names are a courtesy:
// there may be none.
func (h Host) nameDevices(devices []*Device) {
	h.nameByDatabase(devices)
	for _, d := range devices {
		if d.Name == "" && d.Driver == "nvidia" {
			h.nameByNVIDIA(d)
		}
	}
}

func (h Host) nameByDatabase(devices []*Device) {
	for _, path := range nameFiles {
		path = h.at(path)
		// The library looks elsewhere, even in the network, for a file that is not there.
		if fi, err := os.Stat(path); err != nil || !fi.Mode().IsRegular() {
			continue
		}
		db, err := pcidb.New(pcidb.WithPath(path))
		if err != nil {
			continue
		}
		for _, d := range devices {
			if v := db.Vendors[fmt.Sprintf("%04x", d.Vendor)]; v != nil {
				d.VendorName = v.Name
			}
			if p := db.Products[fmt.Sprintf("%04x%04x", d.Vendor, d.Device)]; p != nil {
				d.Name = strings.TrimSpace(p.Name)
			}
		}
		return
	}
}

// nameByNVIDIA gives a card the name that NVIDIA's driver has for it, which newer
// drivers begin with the vendor's.
func (h Host) nameByNVIDIA(d *Device) {
	model := strings.TrimSpace(printable(h.nvidiaSays(d.Address, "Model")))
	if model == "" || model == "Unknown" { // as the driver calls what it does not know
		return
	}
	d.VendorName = cmp.Or(d.VendorName, "NVIDIA")
	d.Name = strings.TrimPrefix(model, "NVIDIA ")
}
