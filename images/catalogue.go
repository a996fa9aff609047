package images

import (
	"fmt"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// Entry is one image that the package knows how to build.
type Entry struct {
	Name  string `json:"name"`
	Suite string `json:"suite"` // the Debian archive's code name
	Title string `json:"title"`
}

// Catalogue lists the images that can be built, the preferred one first.
func Catalogue() []Entry {
	return []Entry{
		{Name: "debian-13", Suite: "trixie", Title: "Debian 13 (trixie)"},
		{Name: "debian-12", Suite: "bookworm", Title: "Debian 12 (bookworm)"},
	}
}

// Known returns the catalogue entry of that name. The error for another name
// wraps [vm.ErrNotFound], lists the known ones and hints at the nearest.
func Known(name string) (Entry, error) {
	var names []string
	for _, e := range Catalogue() {
		if e.Name == name {
			return e, nil
		}
		names = append(names, e.Name)
	}
	err := fmt.Errorf("unknown image %q: known images are %s: %w",
		name, strings.Join(names, ", "), vm.ErrNotFound)
	if near := nearest(name); near != "" {
		return Entry{}, vm.WithHint(err, "did you mean "+near+"?")
	}
	return Entry{}, vm.WithHint(err, "name one of these, or the path of a disk image file")
}

// nearest returns the catalogue name that a misspelt one most likely means,
// or "". Suites and bare release numbers count as names.
func nearest(name string) string {
	meant := map[string]string{}
	var aliases []string
	for _, e := range Catalogue() {
		number := strings.TrimPrefix(e.Name, "debian-")
		for _, alias := range []string{e.Name, e.Suite, number, "debian" + number, "debian:" + number} {
			meant[alias] = e.Name
			aliases = append(aliases, alias)
		}
	}
	return meant[vm.Nearest(name, aliases)]
}
