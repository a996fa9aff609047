package console

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTail(t *testing.T) {
	file := filepath.Join(t.TempDir(), "console")
	if got := Tail(file, 3); got != nil {
		t.Errorf("of no file: %q", got)
	}
	text := strings.Repeat("old\n", 10_000) + "[\x1b[0;32m  OK  \x1b[0m] Started \x1b]0;title\x07x\r\n\n\x1bcgrüße \xff\x00\x9b2J\nlogin: "
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	want := []string{"[  OK  ] Started x", "grüße 2J", "login:"}
	if diff := cmp.Diff(want, Tail(file, 3)); diff != "" {
		t.Error(diff)
	}
}

func TestPanic(t *testing.T) {
	file := filepath.Join(t.TempDir(), "console")
	if got := Panic(file, 0); got != "" || Size(file) != 0 {
		t.Errorf("of no file: %q", got)
	}
	before := "[    1.0] Kernel panic - not syncing: of another boot\n"
	text := before + "login: \n[   99.0] Kernel panic - not syncing: \x1b[31mFatal exception\r\n[   99.1] Rebooting\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	const fatal = "Kernel panic - not syncing: Fatal exception"
	for since, want := range map[int]string{0: fatal, len(before): fatal, len(text): "", len(text) - 5: "", 1 << 30: fatal} { // the last: it was cut since
		if got := Panic(file, int64(since)); got != want {
			t.Errorf("since byte %d: %q, want %q", since, got, want)
		}
	}
}

func TestCutConsoleWhileItGrows(t *testing.T) {
	file := filepath.Join(t.TempDir(), "console")
	if err := cut(file, 1000); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600) // as QEMU has it
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 100 {
		f.WriteString(strings.Repeat("x", 99) + "\n")
		if err := cut(file, 1000); err != nil {
			t.Fatal(err)
		}
	}
	f.WriteString("end\n")
	b, err := os.ReadFile(file)
	if err != nil || len(b) > 1100 || len(b) < 400 || !strings.HasSuffix(string(b), "x\nend\n") {
		t.Errorf("%d bytes: %.20q, %v", len(b), b, err)
	}
}
