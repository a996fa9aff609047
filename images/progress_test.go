package images

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

type recorder struct{ events []string }

func (r *recorder) Phase(name string)  { r.events = append(r.events, "phase "+name) }
func (r *recorder) Line(string)        {}
func (r *recorder) Fraction(f float64) { r.events = append(r.events, fmt.Sprintf("%.2f", f)) }

// The lines are mmdebstrap 1.3.5's with --verbose, and apt's.
func TestBuildOutput(t *testing.T) {
	var r recorder
	o := buildOutput{to: &r}
	for line := range strings.Lines(`I: running apt-get update...
Get:1 http://deb.debian.org/debian trixie InRelease [140 kB]
I: installing remaining packages inside the chroot...
0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.
Get:1 http://deb.debian.org/debian trixie/main amd64 jq amd64 1.7.1-6 [79.3 kB]
Get:2 http://deb.debian.org/debian trixie/main amd64 tree amd64 2.2.1-1 [60 kB]
Unpacking jq (1.7.1-6) ...
Unpacking tree (2.2.1-1) ...
Setting up jq (1.7.1-6) ...
Setting up tree (2.2.1-1) ...
Setting up one more (1) ...
PHASE: configure the guest
`) {
		o.line(strings.TrimSuffix(line, "\n"))
	}
	want := []string{
		"phase read package lists", "phase install packages",
		"0.17", "0.33", "0.50", "0.67", "0.83", "1.00", "1.00",
		"phase configure the guest",
	}
	if d := cmp.Diff(want, r.events); d != "" {
		t.Error(d)
	}
}
