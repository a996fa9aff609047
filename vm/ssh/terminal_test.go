package ssh

import (
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// openPTY returns both sides of a new terminal; see pts(4).
func openPTY(t *testing.T) (master, tty *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tty.Close() })
	return master, tty
}

func TestTerminal(t *testing.T) {
	checkLeaks(t)
	master, tty := openPTY(t)
	before, err := term.GetState(int(tty.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	terminal, err := OpenTerminal(tty)
	if err != nil {
		t.Fatal(err)
	}
	if raw, _ := term.GetState(int(tty.Fd())); *raw == *before {
		t.Error("not in raw mode")
	}
	unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: 90, Row: 30})
	syscall.Kill(os.Getpid(), syscall.SIGWINCH)
	select {
	case size := <-terminal.Resize:
		if size != (WindowSize{90, 30}) || terminal.Size() != size {
			t.Errorf("got %v, %v", size, terminal.Size())
		}
	case <-time.After(time.Minute):
		t.Error("no new size")
	}
	if err := terminal.Restore(); err != nil {
		t.Error(err)
	}
	if err := terminal.Restore(); err != nil {
		t.Error(err)
	}
	if after, _ := term.GetState(int(tty.Fd())); *after != *before {
		t.Error("not restored")
	}
	file, _ := os.Open(os.DevNull)
	defer file.Close()
	if _, err := OpenTerminal(file); err == nil || IsTerminal(file) || !IsTerminal(tty) {
		t.Errorf("a file is no terminal: %v", err)
	}
}
