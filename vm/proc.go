package vm

import (
	"bytes"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// ProcID names one process for good: process numbers are reused, a number
// together with its start time is not.
type ProcID struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks after boot, field 22 of /proc/PID/stat
}

// ProcessID identifies the running process pid.
func ProcessID(pid int) (ProcID, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ProcID{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	// The second field is the command in parentheses and may hold anything.
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return ProcID{}, fmt.Errorf("identify process %d: short stat", pid)
	}
	if fields[0][0] == 'Z' {
		return ProcID{}, fmt.Errorf("identify process %d: it has ended", pid)
	}
	start, err := strconv.ParseUint(string(fields[19]), 10, 64)
	if err != nil {
		return ProcID{}, fmt.Errorf("identify process %d: %w", pid, err)
	}
	return ProcID{PID: pid, Start: start}, nil
}

// Alive reports whether this very process still runs.
func (p ProcID) Alive() bool {
	if p.PID <= 0 {
		return false
	}
	now, err := ProcessID(p.PID)
	return err == nil && now == p
}

// Kill ends the process with SIGKILL if it is still the same one.
func (p ProcID) Kill() error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return nil // gone
	}
	defer unix.Close(fd)
	if !p.Alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	return nil
}
