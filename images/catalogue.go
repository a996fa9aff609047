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
	name = strings.ToLower(name)
	best, distance := "", len(name)/3+2
	for _, e := range Catalogue() {
		number := strings.TrimPrefix(e.Name, "debian-")
		for _, alias := range []string{e.Name, e.Suite, number, "debian" + number, "debian:" + number} {
			if d := editDistance(name, alias); d < distance {
				best, distance = e.Name, d
			}
		}
	}
	return best
}

// editDistance is Levenshtein's: the fewest insertions, deletions and
// replacements of a byte that make b of a.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
