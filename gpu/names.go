package gpu

import (
	"fmt"
	"os"
	"strings"

	"github.com/jaypipes/pcidb"
)

// nameFiles are where distributions keep the database of PCI ids.
var nameFiles = []string{"/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids"}

// nameDevices gives devices the names of the distribution's database. Names
// are a courtesy: without a database, or a readable one, there are none.
func (h Host) nameDevices(devices []*Device) {
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
