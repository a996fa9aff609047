package supervisor

import (
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/vm/instance"
)

func TestOutputIsBounded(t *testing.T) {
	var h head
	var e tail
	both := io.MultiWriter(&h, &e)
	fmt.Fprint(both, "first,")
	for range 100 {
		if n, err := fmt.Fprint(both, strings.Repeat("x", 10_000)); n != 10_000 || err != nil {
			t.Fatal(n, err)
		}
	}
	fmt.Fprint(both, strings.Repeat("y", 2*outputBytes), ",last")
	for _, s := range []string{h.String(), e.String()} {
		if len(s) != outputBytes {
			t.Errorf("%d bytes kept, want %d", len(s), outputBytes)
		}
	}
	if !strings.HasPrefix(h.String(), "first,x") || !strings.HasSuffix(e.String(), "y,last") {
		t.Errorf("head %.10q, tail %q", h.String(), e.String()[outputBytes-10:])
	}
}

// Root in the guest decides what these checks print.
func TestHostileGuestOutput(t *testing.T) {
	w := newWorld()
	<-w.guests
	w.guests <- fakeGuest{mortal: newMortal(), run: func(_ string, out io.Writer) (int, error) {
		fmt.Fprint(out, "\x1b]0;owned\x07\x1b[2Jevil\n")
		for range 100_000 {
			fmt.Fprintln(out, "not mounted: x")
		}
		return 0, nil
	}}
	s := begin(t, w, nil).until(instance.Degraded)
	if s.Reason != "evil" {
		t.Errorf("reason %q", s.Reason)
	}
	if len(s.Warnings) > maxWarnings {
		t.Errorf("%d warnings", len(s.Warnings))
	}
}
