// Package console keeps the log of a guest's serial console: a file that the
// guest fills as it likes, and that people read on a terminal.
package console

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode"

	"github.com/agentvm/agentvm/vm"
)

// tailBytes is as much of a console as its last lines are looked for in.
const tailBytes = 16 << 10

// panicBytes is as much of a console as a panic is looked for in: a kernel that
// starts over has written some by then.
const panicBytes = 1 << 20

// Tail returns at most so many last lines of a console log, fit to be
// shown: a guest writes what it likes there, so terminal control sequences
// are taken out. It returns nil where there is nothing.
func Tail(file string, lines int) []string {
	f, err := os.Open(file)
	if err != nil {
		return nil
	}
	defer f.Close()
	text, err := readTail(f, tailBytes)
	if err != nil {
		return nil
	}
	var out []string
	for line := range bytes.Lines(text) {
		if s := Printable(line); s != "" {
			out = append(out, s)
		}
	}
	return out[max(0, len(out)-lines):]
}

func readTail(f *os.File, size int64) ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, max(0, info.Size()-size), size))
}

// Size is the length of a console log in bytes, 0 where there is none.
func Size(file string) int64 {
	info, err := os.Stat(file)
	if err != nil {
		return 0
	}
	return info.Size()
}

// Panic returns the last words of a kernel that failed (kernel/panic.c in Linux)
// from a console log, of what it has got since it was so many bytes long, or "".
// They are the guest's own, which writes there what it likes.
func Panic(file string, since int64) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	size := Size(file)
	if size < since {
		since = 0 // it was cut
	}
	text, err := readTail(f, min(size-since, panicBytes))
	if err != nil {
		return ""
	}
	i := bytes.LastIndex(text, []byte("Kernel panic - not syncing"))
	if i < 0 {
		return ""
	}
	line, _, _ := bytes.Cut(text[i:], []byte("\n"))
	return Printable(line[:min(len(line), 200)])
}

// controlSequence is what terminals obey: ECMA-48 control sequences, operating
// system commands up to their terminator, and short escapes.
var controlSequence = vm.Pattern("\x1b\\[[0-?]*[ -/]*[@-~]|\x1b\\][^\x07\x1b]*(\x07|\x1b\\\\)?|\x1b[ -/]*[0-~]")

// Printable drops control sequences and whatever else is not to be seen.
func Printable(line []byte) string {
	text := controlSequence().ReplaceAllString(strings.ToValidUTF8(string(line), ""), "")
	text = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) || r == '\t' {
			return r
		}
		return -1
	}, text)
	return strings.TrimRight(text, " \t")
}

// Bound keeps a console log that QEMU writes within about limit bytes,
// by cutting away its older half, until ctx ends. Else a guest could fill the
// host's disk through its serial port.
func Bound(ctx context.Context, file string, limit int64) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if err := cut(file, limit); err != nil {
				return err
			}
		}
	}
}

// cut can cut while QEMU writes since QEMU appends.
func cut(file string, limit int64) error {
	info, err := os.Stat(file)
	if errors.Is(err, os.ErrNotExist) || err == nil && info.Size() <= limit {
		return nil
	}
	if err != nil {
		return fmt.Errorf("bound the console log: %w", err)
	}
	f, err := os.OpenFile(file, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return fmt.Errorf("bound the console log: %w", err)
	}
	defer f.Close()
	tail, err := readTail(f, limit/2)
	if err == nil {
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = f.Write(tail)
	}
	if err != nil {
		return fmt.Errorf("bound the console log: %w", err)
	}
	return nil
}
