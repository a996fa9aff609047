package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/console"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/lifecycle"
)

// logFiles are an instance's logs by the name that --source takes.
var logFiles = map[string]string{
	"supervisor": lifecycle.SupervisorLog,
	"console":    lifecycle.ConsoleFile,
	"network":    "network.jsonl",
	"qemu":       "qemu.log",
	"share":      "virtiofsd-workspace.log",
}

func logSources() []string {
	var names []string
	for name := range logFiles {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (a *app) logsCommand() *cobra.Command {
	var follow bool
	var source string
	var lines int
	cmd := &cobra.Command{
		Use: "logs [NAME]", Short: "Show what happened in and around a machine",
		Long: `Show one of a machine's logs:
  supervisor  what the machine's supervisor did (the default)
  console     the guest's serial console
  network     every decision about the guest's network traffic, as JSON lines
  qemu        what QEMU printed
  share       what the workspace's file server printed`,
		Args: usageArgs(cobra.MaximumNArgs(1)), ValidArgsFunction: a.completeOneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			file, ok := logFiles[source]
			if !ok {
				return vm.WithHint(vm.Classify(vm.ErrUsage, fmt.Errorf("there is no log %q", source)), "--source takes "+strings.Join(logSources(), ", "))
			}
			inst, err := a.target(args)
			if err != nil {
				return err
			}
			if spec, err := inst.Spec(); err == nil && spec.Backend == config.BackendLibvirt && source == "qemu" {
				return libvirtLog(spec)
			}
			return a.showLog(cmd.Context(), inst, inst.Path(file), lines, follow)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until the machine stops")
	cmd.Flags().StringVarP(&source, "source", "s", "supervisor", "which log: "+strings.Join(logSources(), ", "))
	cmd.Flags().IntVar(&lines, "tail", 0, "only the last lines (0: all)")
	if err := cmd.RegisterFlagCompletionFunc("source", cobra.FixedCompletions(logSources(), cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // the flag was defined above
	}
	return cmd
}

// showLog prints a file, and what is added to it while the machine lives.
func (a *app) showLog(ctx context.Context, inst *instance.Instance, path string, lines int, follow bool) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return vm.Classify(vm.ErrNotFound, fmt.Errorf("%q has no %s yet", inst.Name, filepath.Base(path)))
	}
	if err != nil {
		return fmt.Errorf("show the log: %w", err)
	}
	defer f.Close()
	if lines > 0 {
		if err := skipTo(f, lines); err != nil {
			return err
		}
	}
	rest := bufio.NewReader(f)
	for {
		if err := a.showLines(rest); err != nil {
			return err
		}
		if !follow {
			return nil
		}
		if s, err := inst.Status(); err != nil || !s.State.Live() {
			return a.showLines(rest)
		}
		// A console log that grew too long has been cut.
		if fi, err := f.Stat(); err == nil {
			if at, err := f.Seek(0, io.SeekCurrent); err == nil && at > fi.Size() {
				if _, err := f.Seek(0, io.SeekStart); err != nil {
					return err
				}
				rest.Reset(f)
			}
		}
		select {
		case <-ctx.Done():
			return nil // the user has seen enough
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// skipTo leaves f before its last lines.
func skipTo(f *os.File, lines int) error {
	starts := make([]int64, lines) // of the last lines seen, as a ring
	r, at, n := bufio.NewReader(f), int64(0), 0
	for {
		line, err := r.ReadBytes('\n')
		if len(line) > 0 {
			starts[n%lines] = at
			n++
			at += int64(len(line))
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	_, err := f.Seek(starts[max(0, n-lines)%lines], io.SeekStart)
	return err
}

// showLines prints what is there of a log. A guest wrote parts of it: what
// could drive the terminal is dropped.
func (a *app) showLines(r *bufio.Reader) error {
	for {
		line, err := r.ReadBytes('\n')
		if len(line) > 0 {
			if err := a.printf("%s\n", console.Printable(line)); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
