package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/agent"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/control"
	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/lifecycle"
	"github.com/agentvm/agentvm/vm/ssh"
)

// execFlags say how a program runs in the guest.
type execFlags struct {
	env     map[string]string
	dir     string
	tty     bool
	noTTY   bool
	noStdin bool
}

func (f *execFlags) register(cmd *cobra.Command, a *app) {
	cmd.Flags().FuncP("env", "e", "give the program `NAME=VALUE`, or this host's NAME (may be repeated)", func(word string) error { return f.setEnv(a, word) })
	cmd.Flags().StringVarP(&f.dir, "workdir", "w", "", "start in this directory of the guest (default: where you are in the workspace)")
	cmd.Flags().BoolVarP(&f.tty, "tty", "t", false, "give the program a terminal (default: when this is one)")
	cmd.Flags().BoolVarP(&f.noTTY, "no-tty", "T", false, "give the program no terminal")
	cmd.Flags().BoolVar(&f.noStdin, "no-stdin", false, "give the program an empty input")
	cmd.MarkFlagsMutuallyExclusive("tty", "no-tty")
}

// setEnv adds one NAME=VALUE, or NAME with this host's value.
func (f *execFlags) setEnv(a *app, word string) error {
	name, value, given := strings.Cut(word, "=")
	if !vm.ValidVariable(name) {
		return fmt.Errorf("%q is not a variable's name", name)
	}
	if !given {
		if value, given = a.lookupEnv(name); !given {
			return fmt.Errorf("%s is not set here", name)
		}
		a.named = append(a.named, name)
	}
	if f.env == nil {
		f.env = map[string]string{}
	}
	f.env[name] = value
	return nil
}

func (a *app) execCommand() *cobra.Command {
	var f execFlags
	cmd := &cobra.Command{
		Use:   "exec [flags] -- COMMAND [ARGUMENT...]",
		Short: "Run a command in the machine",
		Long: `Run a command in the machine, as the agent's user, and end with its exit code.

The arguments reach the command as they are; for a shell line use
  agentvm exec -- sh -c '...'
Inside the workspace on this host, it starts in the same place there.`,
		Args: usageArgs(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			inst, err := a.target(nil)
			if err != nil {
				return err
			}
			return a.remote(cmd.Context(), inst, f, ssh.Command{Argv: args})
		},
	}
	cmd.Flags().SetInterspersed(false)
	f.register(cmd, a)
	return cmd
}

func (a *app) shellCommand() *cobra.Command {
	var f execFlags
	cmd := &cobra.Command{
		Use:               "shell [NAME]",
		Short:             "Open a login shell in the machine",
		Args:              usageArgs(cobra.MaximumNArgs(1)),
		ValidArgsFunction: a.completeOneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			inst, err := a.target(args)
			if err != nil {
				return err
			}
			return a.remote(cmd.Context(), inst, f, ssh.Command{})
		},
	}
	f.register(cmd, a)
	return cmd
}

func (a *app) runCommand() *cobra.Command {
	var f execFlags
	var up upFlags
	cmd := &cobra.Command{
		Use:   "run [flags] [-- ARGUMENT...]",
		Short: "Run the agent in the workspace",
		Long: `Run the configured agent in the workspace, and end with its exit code.

The machine is made and started first when it is not running. The agent gets the
environment variables that its profile and agent.env name, and no others.`,
		Example: `  agentvm run                        # the agent's own interface
  agentvm run -- -p "fix the tests"  # arguments are the agent's own`,
		RunE: func(cmd *cobra.Command, args []string) error {
			inst, spec, err := a.usable(cmd, &up)
			if err != nil {
				return err
			}
			agents, err := a.agents()
			if err != nil {
				return err
			}
			profile, err := agents.Get(spec.Agent)
			if err != nil {
				return err
			}
			p, err := up.project(a)
			if err != nil {
				return err
			}
			f.env = joined(agentEnv(profile, p.Config, a.lookupEnv), f.env)
			argv := append(append(append([]string{}, profile.Command...), p.Config.Agent.Args...), args...)
			err = a.remote(cmd.Context(), inst, f, ssh.Command{Argv: argv})
			var code remoteExit
			if errors.As(err, &code) && code == 127 {
				a.noteLine("%s was not found in the machine; agentvm stop && agentvm up --recreate builds one with it", argv[0])
			}
			return err
		},
	}
	up.register(cmd)
	f.register(cmd, a)
	return cmd
}

// agentEnv returns the host's variables that an agent may have, if they are set.
func agentEnv(profile agent.Profile, c config.Config, lookup func(string) (string, bool)) map[string]string {
	env := map[string]string{}
	for _, name := range append(append([]string{}, profile.Env...), c.Agent.Env...) {
		if value, ok := lookup(name); ok {
			env[name] = value
		}
	}
	return env
}

// connect reaches a usable machine's SSH proxy.
func (a *app) connect(ctx context.Context, inst *instance.Instance) (*ssh.Client, instance.Spec, instance.Status, error) {
	fail := func(err error) (*ssh.Client, instance.Spec, instance.Status, error) {
		return nil, instance.Spec{}, instance.Status{}, err
	}
	spec, status, err := usableNow(ctx, inst)
	if err != nil {
		return fail(err)
	}
	key, err := readKey(inst, lifecycle.HostKeyFile)
	if err != nil {
		return fail(err)
	}
	c, err := ssh.DialProxy(ctx, filepath.Join(inst.RunDir(spec.ID), control.SSHSocket), key.PublicKey())
	if err != nil {
		return fail(connectionError{fmt.Errorf("reach %q: %w", inst.Name, err)})
	}
	return c, spec, status, nil
}

// usableNow describes a machine that commands can run in. One that is paused
// goes on for that.
func usableNow(ctx context.Context, inst *instance.Instance) (spec instance.Spec, status instance.Status, err error) {
	if spec, err = inst.Spec(); err != nil {
		return spec, status, err
	}
	if status, err = inst.Status(); err != nil {
		return spec, status, err
	}
	if status.State == instance.Paused {
		if err = control.NewClient(filepath.Join(inst.RunDir(spec.ID), control.Socket)).Wake(ctx); err != nil {
			return spec, status, fmt.Errorf("let %q go on: %w", inst.Name, err)
		}
		if status, err = inst.Status(); err != nil {
			return spec, status, err
		}
	}
	if !status.State.Usable() {
		err = notUsable(inst, status)
	}
	return spec, status, err
}

// notUsable says why nothing can run in the machine now.
func notUsable(inst *instance.Instance, s instance.Status) error {
	err := fmt.Errorf("%q is %s", inst.Name, s.State)
	if s.Reason != "" {
		err = fmt.Errorf("%w: %s", err, s.Reason)
	}
	hint := "agentvm up starts it"
	if s.State.Live() {
		hint = "agentvm up waits until it is ready"
	}
	return vm.WithHint(connectionError{err}, hint)
}

// remote runs a command in the guest with this program's input and output.
func (a *app) remote(ctx context.Context, inst *instance.Instance, f execFlags, c ssh.Command) (err error) {
	client, spec, status, err := a.connect(ctx, inst)
	if err != nil {
		return err
	}
	defer client.Close()
	c.Dir = f.dir
	if c.Dir == "" {
		c.Dir = a.guestDirectory(spec)
	}
	if lost := status.LostShare(c.Dir); lost != "" {
		return vm.WithHint(connectionError{fmt.Errorf("%q is degraded: %s", inst.Name, lost)}, "agentvm restart brings the share back; -w / runs a command elsewhere")
	}
	c.Env = joined(spec.Guest.Env, f.env)
	c.Stdout, c.Stderr = a.stdout, a.stderr
	if !f.noStdin {
		c.Stdin = a.stdin
	}
	_, inTTY := terminal(a.stdin)
	_, outTTY := terminal(a.stdout)
	c.TTY = f.tty || !f.noTTY && inTTY && outTTY
	if c.TTY && inTTY {
		t, err := ssh.OpenTerminal(a.stdin.(*os.File))
		if err != nil {
			return err
		}
		defer t.Restore()
		c.Term, c.Size, c.Resize = a.getenv("TERM"), t.Size(), t.Resize
	}
	// From here on the signals are the remote program's.
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)
	running, leave := context.WithCancelCause(context.WithoutCancel(ctx))
	defer leave(nil)
	c.Signals = passSignals(running, signals, func() { leave(errInterrupted) })
	exit, err := client.Run(running, c)
	if err != nil {
		if errors.Is(err, ssh.ErrConnection) {
			return connectionError{a.why(inst, err)}
		}
		return err
	}
	if code := exit.ExitCode(); code != 0 {
		return remoteExit(code)
	}
	return nil
}

// Signals that the program does not end by end the command all the same, once
// this many came within this time: the program may ignore them, or have ended
// and left its output to a child that goes on.
const (
	leaveSignals = 3
	leaveWithin  = 3 * time.Second
)

// passSignals hands signals on, and calls leave when the user insists.
func passSignals(ctx context.Context, in <-chan os.Signal, leave func()) <-chan os.Signal {
	out := make(chan os.Signal, cap(in))
	go func() {
		var came []time.Time
		for {
			var sig os.Signal
			select {
			case <-ctx.Done():
				return
			case sig = <-in:
			}
			select {
			case out <- sig:
			default: // a guest that takes none gets no more
			}
			if sig == syscall.SIGUSR1 || sig == syscall.SIGUSR2 {
				continue
			}
			came = append(came, time.Now())
			came = came[max(0, len(came)-leaveSignals):]
			if len(came) == leaveSignals && time.Since(came[0]) <= leaveWithin {
				leave()
				return
			}
		}
	}()
	return out
}

// why adds what became of the machine to a lost connection.
func (a *app) why(inst *instance.Instance, err error) error {
	if s, statusErr := inst.Status(); statusErr == nil && s.Reason != "" {
		return fmt.Errorf("%w; %q is %s: %s", err, inst.Name, s.State, s.Reason)
	}
	return vm.WithHint(err, "agentvm status "+inst.Name+" says how it is, and whether its kernel failed")
}

// joined returns the variables of both; those of over win.
func joined(env, over map[string]string) map[string]string {
	all := map[string]string{}
	maps.Copy(all, env)
	maps.Copy(all, over)
	return all
}

// guestDirectory is where a command starts: the same place of the workspace
// that the user is in, else the workspace.
func (a *app) guestDirectory(spec instance.Spec) string {
	wd, err := a.workingDirectory()
	if err != nil {
		return spec.Guest.Directory
	}
	if real, err := filepath.EvalSymlinks(wd); err == nil {
		wd = real
	}
	rel, err := filepath.Rel(spec.Workspace, wd)
	if err != nil || !filepath.IsLocal(rel) {
		return spec.Guest.Directory
	}
	return path.Join(spec.Guest.Directory, filepath.ToSlash(rel))
}
