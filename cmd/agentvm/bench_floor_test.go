package main

import (
	"fmt"
	"testing"
	"time"

	"github.com/docker/go-units"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/qemu"
)

// floorRounds is how often each part of the floor is measured.
const floorRounds = 5

// median measures act, and not its end.
func median(b *testing.B, act func() (end func())) time.Duration {
	b.Helper()
	var took []time.Duration
	for range floorRounds {
		begun := time.Now()
		end := act()
		took = append(took, time.Since(begun))
		end()
	}
	return percentile(took, 50)
}

// idleStart is the start of a QEMU that waits for a machine's state, until its
// monitor answers.
func idleStart(b *testing.B, m vm.Machine, caps qemu.Caps) time.Duration {
	b.Helper()
	m.Saved = b.TempDir()
	argv, err := qemu.Argv(m, caps)
	if err != nil {
		b.Fatal(err)
	}
	return median(b, func() (end func()) {
		process, err := qemu.Start(b.Context(), argv, qemu.Options{})
		if err != nil {
			b.Fatal(err)
		}
		monitor, err := process.Connect(b.Context(), m.QMP)
		if err != nil {
			b.Fatal(err)
		}
		return func() { monitor.Close(); process.Kill() }
	})
}

// memoryCopy copies so many bytes in memory that has been touched before.
func memoryCopy(b *testing.B, bytes int64) time.Duration {
	b.Helper()
	from, to := make([]byte, bytes), make([]byte, bytes)
	for i := range from {
		from[i], to[i] = 1, 2
	}
	return median(b, func() func() { copy(to, from); return func() {} })
}

// floor puts a warm start beside its parts, each measured by itself with what comes
// with a distribution: QEMU's start, a copy of as much as the template takes beside it,
// and a handshake with OpenSSH in a guest whose boot is long over. A warm start has
// another server, and a guest that translates its code anew.
func (u usable) floor(template int64, alone time.Duration, qemu, handshake time.Duration) *table {
	t := newTable("A warm start, and its parts measured by themselves", "part", "by itself", "in the warm start")
	t.add("QEMU until its monitor answers", qemu, u.up.phase("qemu").Took)
	t.add("the template's "+units.BytesSize(float64(template))+", copied in memory", alone, u.up.phase("memory").Took)
	t.add("SSH handshake and login", handshake, u.up.phase("ssh").Took)
	sum := max(qemu, alone) + handshake
	t.add("all, the copy beside QEMU's start", sum, u.total)
	t.add("the warm start beyond that", fmt.Sprintf("%.0f %% of it", 100*ratio(u.total-sum, u.total)), "")
	return t
}
