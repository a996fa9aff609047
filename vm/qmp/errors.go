package qmp

import (
	"errors"
	"fmt"
)

// ErrClosed means that the connection to QEMU has ended, most often because
// QEMU has. The error that wraps it says why.
var ErrClosed = errors.New("monitor connection closed")

// Error is QEMU's own refusal of a command.
type Error struct {
	Class   string // GenericError, CommandNotFound, DeviceNotFound, ...
	Desc    string // for people; not stable between versions
	Command string // the command that was refused
}

func (e *Error) Error() string {
	return fmt.Sprintf("qemu refused %s: %s", e.Command, e.Desc)
}

// Error classes that callers branch on.
const (
	ClassCommandNotFound = "CommandNotFound"
	ClassDeviceNotFound  = "DeviceNotFound"
)

// HasClass reports whether err is QEMU's refusal with that class.
func HasClass(err error, class string) bool {
	var e *Error
	return errors.As(err, &e) && e.Class == class
}

// closedError carries the reason for the end of a connection.
type closedError struct{ reason error }

func (e *closedError) Error() string {
	return fmt.Sprintf("%v: %v", ErrClosed, e.reason)
}

func (e *closedError) Unwrap() []error { return []error{ErrClosed, e.reason} }
