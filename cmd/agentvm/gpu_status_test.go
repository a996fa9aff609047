package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm/ssh"
)

func TestGuestCards(t *testing.T) {
	argv := []string{"nvidia-smi", "-x"}
	for name, tt := range map[string]struct {
		says string
		code int
		err  error
		want []string
	}{
		"two cards":  {"NVIDIA H100, 550.163.01, 81559 MiB\nNVIDIA H100, 550.163.01, 81559 MiB\n", 0, nil, []string{"NVIDIA H100, 550.163.01, 81559 MiB", "NVIDIA H100, 550.163.01, 81559 MiB"}},
		"no card":    {"", 0, nil, []string{"nvidia-smi names no card"}},
		"no driver":  {"NVIDIA-SMI has failed\n", 9, nil, []string{"NVIDIA-SMI has failed", "nvidia-smi ended with 9"}},
		"not there":  {"", 0, errors.New("exec: \x1b[31mno"), []string{"nvidia-smi: exec: [31mno"}},
		"a terminal": {"\x1b]0;owned\a\x1b[2J\u202edrac\r\n\xff\xfe\tx\n", 0, nil, []string{"]0;owned[2Jdrac", "x"}},
	} {
		got := askCards(t.Context(), argv, func(_ context.Context, c ssh.Command) (ssh.ExitStatus, error) {
			fmt.Fprint(c.Stdout, tt.says)
			return ssh.ExitStatus{Code: tt.code}, tt.err
		})
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

// TestGuestCardsAreBounded: a guest that says a lot, or nothing, costs little.
func TestGuestCardsAreBounded(t *testing.T) {
	got := askCards(t.Context(), []string{"x"}, func(_ context.Context, c ssh.Command) (ssh.ExitStatus, error) {
		for range 1000 {
			fmt.Fprintln(c.Stderr, strings.Repeat("a", 300))
			fmt.Fprintln(c.Stdout, "b")
		}
		return ssh.ExitStatus{}, nil
	})
	if n := len(strings.Join(got, "\n")); len(got) > guestCardsLines || n > guestCardsBytes {
		t.Errorf("%d lines, %d bytes", len(got), n)
	}
	ctx, cancel := context.WithDeadline(t.Context(), time.Now())
	defer cancel()
	got = askCards(ctx, []string{"x"}, func(ctx context.Context, _ ssh.Command) (ssh.ExitStatus, error) {
		<-ctx.Done()
		return ssh.ExitStatus{}, ctx.Err()
	})
	if diff := cmp.Diff([]string{"x did not end within 15s"}, got); diff != "" {
		t.Error(diff)
	}
}

func FuzzCardLines(f *testing.F) {
	f.Add([]byte("a\n\x1b[0mb\r\n\xff"))
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, line := range cardLines(text) {
			if line == "" || utf8.RuneCountInString(line) > guestCardsWidth || strings.ContainsFunc(line, func(r rune) bool { return r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 }) {
				t.Errorf("%q", line)
			}
		}
	})
}
