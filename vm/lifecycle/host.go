package lifecycle

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

// Host is what was found out about the host and its user, before anything is
// decided.
type Host struct {
	UID, GID    int
	Home        string
	Accel       vm.Accel
	AgentConfig []string // of the profile's configuration paths, those that exist; ~/ is the home directory
}

// The unprivileged users that machines run as when agentvm is root: the last
// block of the range for containers, which no account database hands out
// (https://systemd.io/UIDS-GIDS/).
const (
	vmUserBase  = 1878982656
	vmUserCount = 1 << 16
)

// runAs gives each instance of root's an unprivileged user of its own, so
// that one machine's processes can do nothing to another's.
func (h Host) runAs(id string) *vm.Owner {
	if h.UID != 0 {
		return nil
	}
	u, err := uuid.Parse(id)
	if err != nil {
		return nil
	}
	n := vmUserBase + int(binary.BigEndian.Uint16(u[:2]))%vmUserCount
	return &vm.Owner{UID: n, GID: n}
}

// checkMemory refuses a machine that would drive the host out of memory.
func checkMemory(want int64) error {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return fmt.Errorf("look at the host's memory: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if rest, ok := strings.CutPrefix(lines.Text(), "MemAvailable:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 10, 64)
			if err != nil {
				return fmt.Errorf("look at the host's memory: %w", err)
			}
			if free := kib << 10; free < want {
				return vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("the machine wants %d MiB of memory and the host has %d MiB to spare", want/mib, free/mib)),
					"lower resources.memory in agentvm.yaml, or stop another machine")
			}
			return nil
		}
	}
	return lines.Err()
}

// minDiskFree is what an instance needs to begin with: its overlay and logs.
const minDiskFree = 512 * mib

// checkDisk refuses to begin on a full disk.
func checkDisk(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("look at the free space of %s: %w", dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < minDiskFree {
		return vm.WithHint(vm.Classify(vm.ErrHost, fmt.Errorf("%s has %d MiB free, a machine needs %d MiB to begin with", dir, free/mib, minDiskFree/mib)),
			"free some space (agentvm image ls and agentvm ls show what is there), or set AGENTVM_HOME")
	}
	return nil
}
