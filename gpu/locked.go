package gpu

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ReadArg is the first argument of the process that reads what may be locked.
const ReadArg = "gpu-read"

// glance is how long one look at a function may take before it counts as blocked.
// A driver that starts or ends may take longer, and whoever is to have the
// function waits for that.
const glance = 5 * time.Second

// lockedFiles is what the kernel tells of a function only while it can have the
// function's lock: driver_override (drivers/pci/pci-sysfs.c, in Linux 6.1) and
// sriov_numvfs (drivers/pci/iov.c). A driver that does not let go holds that lock
// for as long, and who reads meanwhile cannot be killed.
type lockedFiles struct {
	Override string `json:"override"` // (null) when unset
	NumVFs   string `json:"numVFs"`
}

// ReadMain writes a line about each directory of a function that is an argument
// after the queue, and returns the exit code.
func ReadMain(args []string) int {
	if len(args) < 3 {
		return 2
	}
	to := json.NewEncoder(os.Stdout)
	for _, dir := range args[3:] {
		leave, err := enqueue(args[2], dir)
		if err != nil { // where /run cannot be written nobody takes a card, and anybody can look
			leave = func() {}
		}
		err = to.Encode(Host{Root: "/"}.lockedFiles(dir))
		leave()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return 0
}

func (h Host) lockedFiles(dir string) lockedFiles {
	return lockedFiles{h.text(dir, "driver_override"), h.text(dir, "sriov_numvfs")}
}

// locked reads that of functions. Those that are blocked for longer than patience
// are not in what it returns.
func (h Host) locked(patience time.Duration, addresses ...string) (map[string]lockedFiles, error) {
	read := map[string]lockedFiles{}
	if h.Root != "/" { // a stand-in
		for _, a := range addresses {
			if h.Blocked == nil || !h.Blocked(a) {
				read[a] = h.lockedFiles(filepath.Join(pciDevices, a))
			}
		}
		return read, nil
	}
	for len(addresses) > 0 {
		var dirs []string
		for _, a := range addresses {
			dirs = append(dirs, filepath.Join(pciDevices, a))
		}
		came, err := readByChild(h.queue(), patience, dirs)
		if err != nil {
			return nil, fmt.Errorf("read the drivers of PCI devices: %w", err)
		}
		for i, files := range came {
			read[addresses[i]] = files
		}
		addresses = addresses[min(len(came)+1, len(addresses)):] // without the one that it got stuck at
	}
	return read, nil
}

// readByChild reads directories until one is blocked, and returns what came. As
// with a write, only a child can be given up.
func readByChild(queue string, patience time.Duration, dirs []string) (came []lockedFiles, err error) {
	cmd := exec.Command(self, append([]string{ReadArg, queue}, dirs...)...)
	var said strings.Builder
	cmd.Stderr, cmd.Env = &said, []string{}
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true} // Ctrl-C is for us
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	type answer struct {
		files lockedFiles
		err   error
	}
	answers := make(chan answer)
	done := make(chan struct{})
	defer close(done)
	go func() { // ends with the child, or when nobody listens any more
		from := json.NewDecoder(out)
		for {
			var a answer
			a.err = from.Decode(&a.files)
			select {
			case answers <- a:
			case <-done:
				return
			}
			if a.err != nil {
				return
			}
		}
	}()
	for len(came) < len(dirs) {
		select {
		case a := <-answers:
			if a.err != nil {
				_ = cmd.Wait()
				return came, fmt.Errorf("%w: %s", a.err, strings.TrimSpace(said.String()))
			}
			came = append(came, a.files)
		case <-time.After(patience):
			_ = cmd.Process.Kill() // takes effect when the kernel lets it
			go func() { _ = cmd.Wait() }()
			return came, nil
		}
	}
	return came, cmd.Wait()
}

// override is a function's driver_override, "" when unset. It waits for who holds
// the function's lock; the error of one that is blocked wraps [ErrBlocked].
func (h Host) override(ctx context.Context, address string) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	read, err := h.locked(h.patience(), address)
	if err != nil {
		return "", err
	}
	files, ok := read[address]
	if !ok {
		return "", fmt.Errorf("read driver_override of %s: %w", address, ErrBlocked)
	}
	return files.override(), nil
}

func (f lockedFiles) override() string {
	if f.Override == "(null)" {
		return ""
	}
	return f.Override
}
