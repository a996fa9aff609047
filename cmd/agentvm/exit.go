package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/agentvm/agentvm/vm"
)

// Exit codes, all of them. A command that runs a program in the guest returns
// that program's own code instead.
const (
	exitOK         = 0
	exitFailure    = 1
	exitUsage      = 2
	exitHost       = 3 // the host cannot do what was asked
	exitNotFound   = 4 // no such machine or image
	exitPolicy     = 5
	exitTimeout    = 124
	exitInterrupt  = 130
	exitConnection = 255 // the connection to the guest failed
)

// remoteExit is the exit code of a program in the guest.
type remoteExit int

func (e remoteExit) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// connectionError is a guest that could not be reached, or was lost.
type connectionError struct{ err error }

func (e connectionError) Error() string { return e.err.Error() }
func (e connectionError) Unwrap() error { return e.err }

// exitCode maps an error to the program's exit code.
func exitCode(err error) int {
	var remote remoteExit
	var connection connectionError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &remote):
		return int(remote)
	case errors.As(err, &connection):
		return exitConnection
	case errors.Is(err, vm.ErrTimeout), errors.Is(err, context.DeadlineExceeded):
		return exitTimeout
	case errors.Is(err, context.Canceled), errors.Is(err, errInterrupted):
		return exitInterrupt
	case errors.Is(err, vm.ErrUsage), strings.HasPrefix(err.Error(), "unknown command"):
		return exitUsage
	case errors.Is(err, vm.ErrNotFound):
		return exitNotFound
	case errors.Is(err, vm.ErrPolicy):
		return exitPolicy
	case errors.Is(err, vm.ErrHost), errors.Is(err, syscall.ENOSPC):
		return exitHost
	}
	return exitFailure
}

// finish shows an error and returns the exit code.
func (a *app) finish(err error) int {
	code := exitCode(err)
	var remote remoteExit
	switch {
	case err == nil, errors.As(err, &remote), errors.Is(err, syscall.EPIPE):
		return code
	case code == exitInterrupt:
		err = errInterrupted
	}
	hint := vm.Hint(err)
	if strings.HasPrefix(err.Error(), "unknown command") {
		hint = "agentvm --help lists the commands"
	}
	if a.json {
		_ = json.NewEncoder(a.stderr).Encode(map[string]any{"error": err.Error(), "hint": hint, "code": code})
		return code
	}
	fmt.Fprintf(a.stderr, "agentvm: %s\n", strings.TrimSpace(err.Error()))
	if hint != "" {
		fmt.Fprintf(a.stderr, "hint: %s\n", hint)
	}
	return code
}
