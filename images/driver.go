package images

import (
	"bytes"
	"embed"
	"fmt"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"

	"github.com/agentvm/agentvm/vm"
)

// driverFS holds the drivers for cards, one a file, and the script that a layer
// with one needs.
//
//go:embed drivers/*
var driverFS embed.FS

// Driver is what a guest needs for a kind of card, as data: a layer with it
// needs no network to use the card.
type Driver struct {
	Name        string   `yaml:"name" json:"name"`
	Description string   `yaml:"description" json:"description"`
	Images      []string `yaml:"images" json:"images"`            // of the catalogue, that it can be baked into
	Licence     Licence  `yaml:"licence" json:"licence,omitzero"` // that must be accepted

	Sources  []Source `yaml:"sources" json:"sources,omitempty"`   // of the archive, beside the image's own
	Kernel   string   `yaml:"kernel" json:"kernel,omitempty"`     // package of a kernel to replace the image's
	Packages []string `yaml:"packages" json:"packages,omitempty"` // as [Spec.Packages]
	Prepare  []string `yaml:"prepare" json:"prepare,omitempty"`   // shell commands before modules are built
	DKMS     string   `yaml:"dkms" json:"dkms,omitempty"`         // whose modules are built for the image's kernel
	Modules  []string `yaml:"modules" json:"modules"`             // that must be there in the end
	Services []string `yaml:"services" json:"services,omitempty"` // to start at boot
	Status   []string `yaml:"status" json:"status"`               // command that tells in the guest how the cards are
}

// Licence is what somebody must have read and agreed to.
type Licence struct {
	Name string `yaml:"name" json:"name"`
	URL  string `yaml:"url" json:"url"`
}

// Source is a part of the distribution's archive.
type Source struct {
	Suite      string   `yaml:"suite" json:"suite"`
	Components []string `yaml:"components" json:"components"`
}

// Drivers lists what can be asked for as [Spec.Driver].
func Drivers() ([]Driver, error) {
	entries, err := driverFS.ReadDir("drivers")
	if err != nil {
		return nil, err
	}
	var list []Driver
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".yaml")
		if !ok {
			continue
		}
		data, err := driverFS.ReadFile("drivers/" + e.Name())
		if err != nil {
			return nil, err
		}
		d, err := parseDriver(data)
		if err == nil && d.Name != name {
			err = fmt.Errorf("it is of %q", d.Name)
		}
		if err != nil {
			return nil, fmt.Errorf("driver %s: %w", e.Name(), err)
		}
		list = append(list, d)
	}
	return list, nil
}

var (
	plainWord  = vm.Pattern(`^[a-z0-9][a-z0-9.-]*$`)
	moduleName = vm.Pattern(`^[a-z0-9][a-z0-9_-]*$`)
	unitName   = vm.Pattern(`^[a-z0-9][a-z0-9@.-]*\.service$`)
)

func parseDriver(data []byte) (d Driver, err error) {
	if err := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict()).Decode(&d); err != nil {
		return d, err
	}
	words := append([]string{d.Name}, d.Images...)
	for _, s := range d.Sources {
		words = append(append(words, s.Suite), s.Components...)
	}
	if d.DKMS != "" {
		words = append(words, d.DKMS)
	}
	for _, w := range words {
		if !plainWord().MatchString(w) {
			return d, fmt.Errorf("%q is not a plain word", w)
		}
	}
	for _, p := range d.packages() {
		if !debianPackage().MatchString(p) {
			return d, fmt.Errorf("%q is not the name of a Debian package", p)
		}
	}
	for _, m := range d.Modules {
		if !moduleName().MatchString(m) {
			return d, fmt.Errorf("%q is not the name of a module", m)
		}
	}
	for _, s := range d.Services {
		if !unitName().MatchString(s) {
			return d, fmt.Errorf("%q is not the name of a service", s)
		}
	}
	if len(d.Images) == 0 || len(d.Packages) == 0 || len(d.Modules) == 0 || len(d.Status) == 0 || d.Description == "" {
		return d, fmt.Errorf("it says too little")
	}
	return d, nil
}

// packages lists what is installed.
func (d Driver) packages() []string {
	list := slices.Clone(d.Packages)
	if d.Kernel != "" {
		list = append(list, d.Kernel)
	}
	if d.DKMS != "" {
		list = append(list, "dkms")
	}
	return list
}

// sources are the lines for apt, of an archive whose address the script knows.
func (d Driver) sources() string {
	var b strings.Builder
	for _, s := range d.Sources {
		fmt.Fprintf(&b, "%s %s\n", s.Suite, strings.Join(s.Components, " "))
	}
	return b.String()
}

// commands finish the layer, inside it, as root: they build the modules for
// its kernel, see that they are there, and enable its services.
func (d Driver) commands() []string {
	var list []string
	if d.Kernel != "" {
		list = append(list, replaceKernel)
	}
	list = append(list, d.Prepare...)
	if d.DKMS != "" {
		list = append(list, strings.ReplaceAll(buildModules, "NAME", d.DKMS))
	}
	check := "rm -f /etc/dkms/no-autoinstall\nrelease=$(ls /lib/modules)"
	for _, m := range d.Modules {
		check += "\nmodinfo -k \"$release\" " + m + " >/dev/null || { echo \"E: the module " + m + " is not there\"; exit 1; }"
	}
	list = append(list, check)
	if len(d.Services) > 0 {
		list = append(list, "systemctl enable "+strings.Join(d.Services, " "))
	}
	return list
}

// replaceKernel removes the kernel that the base came with, so that there is
// one and no doubt about which.
const replaceKernel = `set -eu
dpkg --purge $(dpkg-query --show --showformat '${Package}\n' 'linux-image-*cloud-amd64')
rm -rf /lib/modules/*cloud-amd64
[ "$(ls /lib/modules | wc -l)" = 1 ] || { echo "E: there is not one kernel: $(ls /lib/modules)"; exit 1; }
depmod "$(ls /lib/modules)"`

// buildModules builds them for the image's kernel, not for the host's, which
// is what DKMS would look at.
const buildModules = `set -eu
release=$(ls /lib/modules)
source=$(echo /usr/src/NAME-[0-9]*)
dkms install NAME/"${source##*/NAME-}" -k "$release" || {
	cat /var/lib/dkms/NAME/*/build/make.log 2>/dev/null | grep -m 5 -A 3 'error:' || :
	echo "E: the modules of NAME cannot be built for Linux $release"
	exit 1
}
rm -rf /var/lib/dkms/mok.* /var/lib/dkms/NAME/*/build
depmod "$release"`

// DriverByName returns one of [Drivers].
func DriverByName(name string) (Driver, error) {
	drivers, err := Drivers()
	if err != nil {
		return Driver{}, err
	}
	var names []string
	for _, d := range drivers {
		if d.Name == name {
			return d, nil
		}
		names = append(names, d.Name)
	}
	return Driver{}, vm.WithHint(vm.Classify(vm.ErrNotFound, fmt.Errorf("there is no driver %q", name)), "known drivers: "+strings.Join(names, ", "))
}

// driverOf returns the driver that a spec asks for, or nil. The error of one
// whose licence was not accepted wraps [vm.ErrPolicy] and says what to read.
func driverOf(spec Spec) (*Driver, error) {
	if spec.Driver == "" {
		return nil, nil
	}
	d, err := DriverByName(spec.Driver)
	if err != nil {
		return nil, err
	}
	if !slices.Contains(d.Images, spec.Image) {
		return nil, invalid("the driver %s is not for the image %s, but for %s", d.Name, spec.Image, strings.Join(d.Images, ", "))
	}
	if d.Licence.Name != "" && !slices.Contains(spec.Accept, d.Name) {
		return nil, vm.WithHint(vm.Classify(vm.ErrPolicy, fmt.Errorf("the driver %s comes under the %s, which nobody has accepted: %s", d.Name, d.Licence.Name, d.Licence.URL)),
			"read it; who agrees writes accept: ["+d.Name+"] below provision: in agentvm.yaml, or --accept "+d.Name)
	}
	return &d, nil
}
