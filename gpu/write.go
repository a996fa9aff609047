package gpu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// WriteArg is the first argument of the process that writes one file.
const WriteArg = "gpu-write"

// self is this very program, also where a newer one has taken its place on disk
// since, as happens under machines that run for weeks.
const self = "/proc/self/exe"

// ErrBlocked is a write, or a look, that did not come back: somebody has the
// device open. A write may still happen later.
var ErrBlocked = errors.New("the driver does not let go of the device")

const unblock = "end what has the device open, then: agentvm gpu recover"

// WriteMain writes standard input to the file that is its argument after the
// queue, with one write, and returns the exit code.
func WriteMain(args []string) int {
	if len(args) != 4 {
		return 2
	}
	data := make([]byte, 4096)
	n, _ := os.Stdin.Read(data)
	leave, err := enqueue(args[2], args[3]+" "+string(data[:n]))
	if err == nil {
		defer leave()
		var f *os.File
		if f, err = os.OpenFile(args[3], os.O_WRONLY, 0); err == nil {
			_, err = f.Write(data[:n])
			err = errors.Join(err, f.Close())
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// write writes a file below /sys. A blocked write cannot be cancelled, not
// even by SIGKILL, so it is a child's: who waits for it gives up in time.
func (h Host) write(ctx context.Context, path, data string) error {
	if h.Write != nil {
		return h.Write(ctx, path, data)
	}
	var said strings.Builder
	cmd := exec.Command(self, WriteArg, h.queue(), h.at(path))
	cmd.Stdin, cmd.Stderr = strings.NewReader(data), &said
	cmd.Env = []string{}
	// Ctrl-C is for us, who can put things back; the write is let finish.
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }() // ends with the child
	timer := time.NewTimer(h.patience())
	defer timer.Stop()
	select {
	case err := <-done:
		if err != nil {
			return fmt.Errorf("write %q to %s: %s: %w", strings.TrimSpace(data), path, strings.TrimSpace(said.String()), err)
		}
		return nil
	case <-timer.C:
	}
	_ = cmd.Process.Kill() // takes effect when the kernel lets it
	return fmt.Errorf("write %q to %s: %w", strings.TrimSpace(data), path, ErrBlocked)
}
