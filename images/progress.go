package images

import (
	"strconv"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// Progress is told how a build goes. Its methods may be called from several
// goroutines, one at a time. They should return quickly.
type Progress interface {
	// Phase starts a step; name is a few words such as "install packages".
	Phase(name string)
	// Line is one line of a program's output.
	Line(text string)
	// Fraction says how much of the current phase is done, 0 to 1.
	Fraction(f float64)
}

// Discard ignores every report.
var Discard Progress = discard{}

type discard struct{}

func (discard) Phase(string)     {}
func (discard) Line(string)      {}
func (discard) Fraction(float64) {}

// buildOutput turns the output of mmdebstrap and apt into progress.
//
// mmdebstrap marks its steps with "I: " lines. apt says how many packages it is about
// to install, and then prints one line for each that it fetches ("Get:7 "), unpacks
// and sets up.
type buildOutput struct {
	to          Progress
	total, done int
}

var newlyInstalled = vm.Pattern(`^\d+ upgraded, (\d+) newly installed`)

// phases maps the starts of mmdebstrap's own messages to names of ours.
var phases = []struct{ prefix, name string }{
	{"I: running apt-get update", "read package lists"},
	{"I: downloading packages with apt", "download essential packages"},
	{"I: extracting archives", "extract essential packages"},
	{"I: installing essential packages", "install essential packages"},
	{"I: installing remaining packages", "install packages"},
	{"I: cleaning package lists", "clean up"},
	{"PHASE: ", ""}, // our own hooks name theirs
}

func (o *buildOutput) line(text string) {
	for _, p := range phases {
		rest, ok := strings.CutPrefix(text, p.prefix)
		if !ok {
			continue
		}
		o.total, o.done = 0, 0
		if p.name == "" {
			o.to.Phase(rest)
			return
		}
		o.to.Phase(p.name)
		break
	}
	o.to.Line(text)
	if m := newlyInstalled().FindStringSubmatch(text); m != nil {
		n, _ := strconv.Atoi(m[1]) // the pattern lets only digits pass
		o.total, o.done = 3*n, 0
		return
	}
	for _, step := range []string{"Get:", "Unpacking ", "Setting up "} {
		if o.total > 0 && strings.HasPrefix(text, step) {
			o.done = min(o.done+1, o.total)
			o.to.Fraction(float64(o.done) / float64(o.total))
		}
	}
}
