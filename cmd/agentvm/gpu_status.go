package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/ssh"
)

// What a guest may say of its cards, and how long it may think about it. It
// is root there, and may say anything.
const (
	guestCardsTime  = 15 * time.Second // emulated guests log in slowly
	guestCardsBytes = 4 << 10
	guestCardsLines = 16
	guestCardsWidth = 160
)

// guestCards asks the guest's driver how the cards are: what nvidia-smi, or
// the like of it that the driver's layer names, prints. It has no lines for an
// image without a driver, and for a machine that cannot be asked.
func (a *app) guestCards(ctx context.Context, inst *instance.Instance, v view) []string {
	if !v.State.Usable() || v.ImageID == "" {
		return nil
	}
	cache, err := a.readImages()
	if err != nil {
		return nil
	}
	img, err := cache.Get(v.ImageID)
	if err != nil || img.Manifest.Spec.Driver == "" {
		return nil
	}
	driver, err := images.DriverByName(img.Manifest.Spec.Driver)
	if err != nil {
		return nil // of a newer agentvm
	}
	ctx, cancel := context.WithTimeout(ctx, guestCardsTime)
	defer cancel()
	client, _, _, err := a.connect(ctx, inst)
	if err != nil {
		return []string{"the guest cannot be asked: " + printable(err.Error())}
	}
	defer client.Close()
	return askCards(ctx, driver.Status, client.Run)
}

// readImages opens the cache of images.
func (a *app) readImages() (*images.Cache, error) {
	dirs, err := a.dirs()
	if err != nil {
		return nil, err
	}
	return images.Open(dirs.Images())
}

// askCards runs the command and keeps what it says in bounds. A script is told of
// by its name, the last of its arguments.
func askCards(ctx context.Context, argv []string, run func(context.Context, ssh.Command) (ssh.ExitStatus, error)) []string {
	var out firstBytes
	name := argv[0]
	if name == "sh" {
		name = argv[len(argv)-1]
	}
	status, err := run(ctx, ssh.Command{Argv: argv, Stdout: &out, Stderr: &out})
	lines := cardLines(out.Bytes())
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return append(lines, fmt.Sprintf("%s did not end within %v", name, guestCardsTime))
	case err != nil:
		return append(lines, name+": "+printable(err.Error()))
	case status.ExitCode() != 0:
		return append(lines, fmt.Sprintf("%s ended with %d", name, status.ExitCode()))
	case len(lines) == 0:
		return []string{name + " names no card"}
	}
	return lines
}

// cardLines are the first lines of a text that have something printable.
func cardLines(text []byte) (lines []string) {
	for line := range strings.Lines(string(text)) {
		if line = printable(line); line != "" && len(lines) < guestCardsLines {
			lines = append(lines, line)
		}
	}
	return lines
}

// colours are what programs colour their words with.
var colours = vm.Pattern("\x1b\\[[0-9;]*m")

// printable is a text without what could drive a terminal, cut to a line's width.
func printable(text string) string {
	text = strings.Map(func(r rune) rune {
		if r == '\t' {
			return ' '
		}
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, colours().ReplaceAllString(text, ""))
	runes := []rune(strings.TrimSpace(text))
	return string(runes[:min(len(runes), guestCardsWidth)])
}

// firstBytes keeps the beginning of what is written.
type firstBytes struct{ kept bytes.Buffer }

func (f *firstBytes) Bytes() []byte { return f.kept.Bytes() }

func (f *firstBytes) Write(p []byte) (int, error) {
	f.kept.Write(p[:min(len(p), guestCardsBytes-f.kept.Len())])
	return len(p), nil
}
