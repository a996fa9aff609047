package control

import "testing"

// TestAttend tells who leaves from who is cut off.
func TestAttend(t *testing.T) {
	f := &fake{seen: make(chan string, 8)}
	c, _ := serve(t, f)
	expect := func(want string) {
		t.Helper()
		if got := within(t, want, f.seen); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	a, err := c.Attend(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	expect("came")
	if err := a.Leave(t.Context()); err != nil {
		t.Error(err)
	}
	expect("left")
	within(t, "the end of the request", a.Done)
	expect("lost") // of an id that has left, which says nothing
	if a, err = c.Attend(t.Context()); err != nil {
		t.Fatal(err)
	}
	expect("came")
	a.cancel() // as the end of the process would
	expect("lost")
}
