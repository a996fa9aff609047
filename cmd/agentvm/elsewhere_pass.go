package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/docker/go-units"
	"github.com/gofrs/flock"
	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/lifecycle"
	"github.com/agentvm/agentvm/vm/mirror"
	"github.com/agentvm/agentvm/vm/remote"
)

// dial connects to the machine's host.
func (e *elsewhere) dial(ctx context.Context, ask bool) (*remote.Conn, error) {
	dirs, err := e.app.dirs()
	if err != nil {
		return nil, err
	}
	if err := dirs.Make(); err != nil {
		return nil, err
	}
	c, err := remote.Dial(ctx, e.host, dirs.Run, ask)
	return c, unreachable(err)
}

// unreachable gives a lost connection its exit code.
func unreachable(err error) error {
	if errors.Is(err, remote.ErrConnection) {
		return connectionError{err}
	}
	return err
}

func (a *app) mayAsk() bool {
	_, in := terminal(a.stdin)
	_, out := terminal(a.stderr)
	return in && out
}

// pass has the command run beside the machine.
func (e *elsewhere) pass(cmd *cobra.Command, w way) error {
	ctx := cmd.Context()
	conn, err := e.dial(ctx, e.app.mayAsk())
	if err != nil {
		return err
	}
	if w.makes {
		e.record.Guarded, e.record.OnDisconnect = e.guarded(), e.onDisconnect()
		if err := e.write(); err != nil {
			return err
		}
		if err := e.sendImage(ctx, cmd, conn); err != nil {
			return unreachable(err)
		}
	}
	if w.before {
		err := e.sync(ctx, conn, mirror.KeepBoth, w.makes)
		if err != nil && w.mends && !errors.Is(err, remote.ErrConnection) && ctx.Err() == nil {
			e.app.noteLine("%v", err)
		} else if err != nil {
			return unreachable(err)
		}
	}
	request, err := e.request(cmd)
	if err != nil {
		return err
	}
	leave, err := e.attend(ctx, conn)
	if err != nil {
		return unreachable(err)
	}
	code, err := conn.Run(ctx, request, e.app.streams(cmd))
	leave(errors.Is(err, remote.ErrConnection))
	if err != nil {
		return unreachable(e.whatNow(err))
	}
	if w.makes && code == exitOK && e.record.Machine == "" {
		e.learn(ctx, conn)
	}
	if w.after {
		// A Ctrl-C was that command's; another one is for this.
		rest, stop := again(ctx)
		err = e.sync(rest, conn, mirror.KeepBoth, false)
		stop()
	}
	if code != exitOK {
		if err != nil {
			e.app.finish(err)
		}
		return remoteExit(code)
	}
	return unreachable(err)
}

// again is a context for what follows a command that the signals were for.
func again(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(context.WithoutCancel(ctx), os.Interrupt, syscall.SIGTERM)
}

// request is this command line, for the other side.
func (e *elsewhere) request(cmd *cobra.Command) (remote.Request, error) {
	a := e.app
	r := remote.Request{Copy: e.record.Copy, Args: a.args, Dir: ".", Env: map[string]string{}}
	var err error
	if r.Config, err = e.config(cmd.Context()); err != nil {
		return r, err
	}
	if wd, err := a.workingDirectory(); err == nil {
		if real, err := filepath.EvalSymlinks(wd); err == nil {
			wd = real
		}
		if rel, err := filepath.Rel(e.record.Workspace, wd); err == nil && filepath.IsLocal(rel) {
			r.Dir = rel
		}
	}
	for _, name := range a.named {
		r.Env[name], _ = a.lookupEnv(name)
	}
	if cmd.Name() == "run" && e.project != nil {
		agents, err := a.agents()
		if err != nil {
			return r, err
		}
		profile, err := agents.Get(e.agent(cmd))
		if err != nil {
			return r, err
		}
		r.Env = joined(agentEnv(profile, e.project.Config, a.lookupEnv), r.Env)
	}
	return r, nil
}

// agent is the agent that the machine is to have.
func (e *elsewhere) agent(cmd *cobra.Command) string {
	if f := cmd.Flags().Lookup("agent"); f != nil && f.Value.String() != "" {
		return f.Value.String()
	}
	return e.project.Config.Agent.Use
}

// streams are this program's input and output, and whether the command gets a
// terminal there.
func (a *app) streams(cmd *cobra.Command) remote.Streams {
	s := remote.Streams{In: a.stdin, Out: a.stdout, Err: a.stderr}
	_, in := terminal(a.stdin)
	_, out := terminal(a.stdout)
	if none := cmd.Flags().Lookup("no-tty"); none != nil {
		s.Terminal = in && out && none.Value.String() == "false"
	}
	return s
}

// sendImage makes sure that the host has the image that the machine needs.
func (e *elsewhere) sendImage(ctx context.Context, cmd *cobra.Command, conn *remote.Conn) error {
	cache, m, err := e.app.imageCache()
	if err != nil {
		return err
	}
	profile, err := m.Agents.Get(e.agent(cmd))
	if err != nil {
		return err
	}
	spec := lifecycle.ImageSpec(*e.project, m.Home, profile)
	id, err := cache.Which(spec)
	if err != nil {
		return err
	}
	if there, err := conn.HasImage(ctx, id); err != nil || there {
		return err
	}
	report, done := e.app.newReport()
	defer done()
	img, err := cache.Ensure(ctx, spec, report)
	if err != nil {
		return err
	}
	report.Phase("send image " + id + " to " + e.host.Address())
	return conn.SendImage(ctx, img, report.Fraction)
}

// sync brings the workspace and its copy in step. full also tells what stays
// where it is.
func (e *elsewhere) sync(ctx context.Context, conn *remote.Conn, keep mirror.Keep, full bool) error {
	return e.locked(ctx, func() error {
		_, err := e.inStep(ctx, conn, keep, full)
		return err
	})
}

// locked runs do while no other command keeps the workspace in step.
func (e *elsewhere) locked(ctx context.Context, do func() error) error {
	lock := flock.New(filepath.Join(e.dir, "lock"), flock.SetPermissions(0o600))
	if _, err := lock.TryLockContext(ctx, 50*time.Millisecond); err != nil {
		return fmt.Errorf("wait for another command that keeps the workspace in step: %w", err)
	}
	defer lock.Close()
	return do()
}

// largePush is how much content may go there without a word, in bytes.
const largePush = 16 << 20

// inStep is sync under the lock.
func (e *elsewhere) inStep(ctx context.Context, conn *remote.Conn, keep mirror.Keep, full bool) (remote.InStep, error) {
	w := remote.Workspace{Dir: e.record.Workspace, State: e.dir, Copy: e.record.Copy, Guarded: e.guarded()}
	done := func() {}
	w.Sending = func(paths int, bytes int64) func(float64) {
		if !full && bytes < largePush {
			return func(float64) {}
		}
		var report lifecycle.Report
		report, done = e.app.newReport()
		report.Phase(fmt.Sprintf("send workspace to %s: %d paths, %s", e.host.Address(), paths, units.BytesSize(float64(bytes))))
		return report.Fraction
	}
	result, err := w.Sync(ctx, conn, keep)
	done()
	if result.Gone {
		e.app.noteLine("the copy of the workspace on %s was gone, and is made anew", e.host.Address())
	}
	if full && len(result.Left) > 0 {
		e.app.noteLine("neither files, directories nor links, or mounted, above 64 GiB, not to be read or with odd names, and stay here: %s", remote.List(result.Left))
	}
	if full && len(result.There) > 0 {
		e.app.noteLine("cannot be copied from %s either, and stay there: %s", e.host.Address(), remote.List(result.There))
	}
	if len(result.Changed) > 0 {
		e.app.noteLine("changed while they were copied, and are left for the next time: %s", remote.List(result.Changed))
	}
	if e.app.verbose && result.Pushed+result.Pulled > 0 {
		e.app.noteLine("workspace: %d paths to %s, %d from there", result.Pushed, e.host.Address(), result.Pulled)
	}
	return result, err
}

// look asks the host how the machine is.
func (e *elsewhere) look(ctx context.Context, conn *remote.Conn) (view, int, error) {
	var v view
	args := []string{"status", "--json"}
	if e.app.name != "" {
		args = append(args, "--name", e.app.name)
	}
	config, err := e.config(ctx)
	if err != nil {
		return v, 0, err
	}
	var out, said bytes.Buffer
	code, err := conn.Run(ctx, remote.Request{Copy: e.record.Copy, Config: config, Args: args, Dir: "."}, remote.Streams{In: strings.NewReader(""), Out: &out, Err: &said})
	if err == nil && code == exitOK {
		err = json.Unmarshal(out.Bytes(), &v)
		remote.Printable(&v)
	}
	if err == nil && code != exitOK {
		err = problemOf(said.Bytes(), code)
	}
	v.Host, v.Copy, v.Workspace = e.host.Address(), v.Workspace, e.record.Workspace
	return v, code, err
}

// problemOf reads an error that a command there printed as JSON.
func problemOf(said []byte, code int) error {
	var told struct{ Error, Hint string }
	if json.Unmarshal(said, &told) != nil || told.Error == "" {
		told.Error = fmt.Sprintf("exit code %d", code)
	}
	class := map[int]string{exitUsage: "usage", exitHost: "host", exitNotFound: "notFound", exitPolicy: "policy", exitTimeout: "timeout"}[code]
	return (&remote.Problem{Text: told.Error, Hint: told.Hint, Class: class}).Err()
}

// learn notes the machine's name, by which it is found from everywhere.
func (e *elsewhere) learn(ctx context.Context, conn *remote.Conn) {
	if v, _, err := e.look(ctx, conn); err == nil && vm.ValidName(v.Name) == nil {
		e.record.Machine = v.Name
		if err := e.write(); err != nil {
			e.app.noteLine("%v", err)
		}
	}
}

// everywhere adds the machines of other hosts, as far as those answer.
func (a *app) everywhere(ctx context.Context) ([]view, error) {
	list, err := a.allElsewhere()
	if err != nil {
		return nil, err
	}
	views := make([]view, len(list))
	var wait sync.WaitGroup
	for i, e := range list {
		wait.Go(func() {
			bounded, cancel := context.WithTimeout(ctx, lsTimeout)
			defer cancel()
			conn, err := e.dial(bounded, false)
			if err == nil {
				views[i], _, err = e.look(bounded, conn)
			}
			if err != nil {
				views[i] = view{Name: e.record.Machine, State: unknown, Reason: err.Error(), Workspace: e.record.Workspace, Host: e.host.Address()}
			}
		})
	}
	wait.Wait()
	return views, nil
}

// lsTimeout is how long ls waits for a host.
const lsTimeout = 10 * time.Second

// isLoopback reports whether a service's target is the dialling host's own.
func isLoopback(target string) bool {
	host, _, err := net.SplitHostPort(target)
	ip := net.ParseIP(host)
	return err == nil && (host == "localhost" || ip != nil && ip.IsLoopback()) || strings.HasPrefix(target, "unix:")
}

// forget removes what is kept of a machine that is no more, here and there.
func (e *elsewhere) forget(ctx context.Context, conn *remote.Conn) error {
	if err := conn.Forget(ctx, e.record.Copy); err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(e.dir), conn.Close(ctx))
}
