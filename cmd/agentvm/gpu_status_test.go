package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/images"
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
		"not there":  {"", 0, errors.New("exec: \x1b[31mno"), []string{"nvidia-smi: exec: no"}},
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

// TestAMDStatus: of all that rocminfo says, status tells a line for each card, and
// without one what is wrong. Its words are those of Debian 13's, 6.1.2.
func TestAMDStatus(t *testing.T) {
	driver, err := images.DriverByName("amd")
	if err != nil {
		t.Fatal(err)
	}
	agent := func(name, title, kind string) string {
		return fmt.Sprintf("*******                  \nAgent                    \n*******                  \n  Name:                    %-35s\n  Uuid:                    X\n  Marketing Name:          %-35s\n"+
			"  Vendor Name:             AMD                                \n  Device Type:             %-35s\n%s  ISA Info:                \n      Name:                    amdgcn-amd-amdhsa--x\n", name, title, kind, strings.Repeat("  Cache:  x\n", 200))
	}
	processor := "ROCk module is loaded\nHSA Agents               \n" + agent("AMD EPYC 7452 32-Core Processor", "AMD EPYC 7452 32-Core Processor", "CPU")
	for name, tt := range map[string]struct {
		says string
		code int
		want []string
	}{
		"two cards":  {processor + agent("gfx942", "AMD Instinct MI300X", "GPU") + agent("gfx1100", "AMD Radeon RX 7900 XTX", "GPU"), 0, []string{"AMD Instinct MI300X, gfx942", "AMD Radeon RX 7900 XTX, gfx1100"}},
		"no card":    {processor, 0, []string{"rocminfo names no card"}},
		"no driver":  {"\x1b[31mROCk module is NOT loaded, possibly no GPU devices\x1b[0m\n", 1, []string{"ROCk module is NOT loaded, possibly no GPU devices", "rocminfo ended with 1"}},
		"no library": {"hsa api call failure at: x\nCall returned HSA_STATUS_ERROR_OUT_OF_RESOURCES\n", 8, []string{"hsa api call failure at: x", "Call returned HSA_STATUS_ERROR_OUT_OF_RESOURCES", "rocminfo ended with 8"}},
	} {
		dir := t.TempDir()
		program := fmt.Sprintf("#!/bin/sh\ncat <<'END'\n%sEND\nexit %d\n", tt.says, tt.code)
		if err := os.WriteFile(filepath.Join(dir, "rocminfo"), []byte(program), 0o700); err != nil {
			t.Fatal(err)
		}
		got := askCards(t.Context(), driver.Status, func(ctx context.Context, c ssh.Command) (ssh.ExitStatus, error) {
			cmd := exec.CommandContext(ctx, c.Argv[0], c.Argv[1:]...)
			cmd.Env = []string{"PATH=" + dir + ":/usr/bin:/bin"}
			cmd.Stdout, cmd.Stderr = c.Stdout, c.Stderr
			if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
				return ssh.ExitStatus{}, err
			}
			return ssh.ExitStatus{Code: cmd.ProcessState.ExitCode()}, nil
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
