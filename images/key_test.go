package images

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/agentvm/agentvm/vm/probes"
)

// TestGuestProgramIsNew builds what images are about to get, and compares it
// with what is embedded: go test alone does not build it.
func TestGuestProgramIsNew(t *testing.T) {
	if testing.Short() {
		t.Skip("builds a program")
	}
	// Reading the source has go test look again when it changes.
	for _, dir := range []string{"../cmd/sshd", "../vm/sshd"} {
		if _, err := hashFS(os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(t.TempDir(), "sshd")
	if out, err := exec.Command("make", "-C", "..", "guest", "GUEST="+file).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := recipeFS.ReadFile(guestProgram); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the guest's program is not what its source makes (%v): make guest", err)
	}
}

// TestRecipeIsRemembered for this executable, as what it is.
func TestRecipeIsRemembered(t *testing.T) {
	want, err := hashFS(recipeFS)
	if err != nil {
		t.Fatal(err)
	}
	known := probes.Store(t.TempDir())
	for range 2 {
		if got, err := recipe(known); err != nil || got != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	build, err := probes.Build(self)
	if err != nil {
		t.Fatal(err)
	}
	known.Write("recipe", build, "another")
	if got, err := recipe(known); err != nil || got != "another" {
		t.Errorf("what is remembered is not used: %q, %v", got, err)
	}
}
