package main

import (
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A program that ended and left its output to a child cannot be ended by a
// signal: who insists must get away all the same.
func TestPassSignals(t *testing.T) {
	for _, tc := range []struct {
		name   string
		signal os.Signal
		pause  time.Duration
		leaves bool
	}{
		{"insisting", syscall.SIGINT, 500 * time.Millisecond, true},
		{"terminating", syscall.SIGTERM, time.Millisecond, true},
		{"now and then", syscall.SIGINT, 10 * time.Second, false},
		{"for the program alone", syscall.SIGUSR1, time.Millisecond, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				in := make(chan os.Signal)
				left := false
				out := passSignals(t.Context(), in, func() { left = true })
				for range leaveSignals {
					in <- tc.signal
					time.Sleep(tc.pause)
				}
				synctest.Wait()
				if left != tc.leaves {
					t.Errorf("left: %v, want %v", left, tc.leaves)
				}
				_ = out
			})
		})
	}
}
