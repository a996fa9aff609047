package main

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"path/filepath"

	"github.com/agentvm/agentvm/images"
	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/config"
	"github.com/agentvm/agentvm/vm/lifecycle"
	"github.com/agentvm/agentvm/vm/remote"
)

// side is what a program on a machine's host knows of its user elsewhere.
type side struct {
	env        map[string]string // variables of theirs that were passed on
	configFile string
	config     *config.Config // instead of the file's
}

func (s *side) project() (lifecycle.Project, error) {
	if s.config != nil {
		return lifecycle.Project{Dir: "/", Config: *s.config}, nil
	}
	return lifecycle.LoadProject(s.configFile)
}

// lingering is where systemd notes whose sessions do not matter.
const lingering = "/var/lib/systemd/linger"

// outlivesSession reports whether a user's runtime directory is there for
// longer than their last session. The machines' sockets have to be.
func outlivesSession(uid int, name, dir string) bool {
	if uid == 0 {
		return true // it is not used
	}
	_, err := os.Stat(filepath.Join(dir, name))
	return err == nil && name != ""
}

// serveRemote does what the agentvm of another host asks for.
func (a *app) serveRemote(ctx context.Context, words []string) int {
	name := ""
	if me, err := user.Current(); err == nil {
		name = me.Username
	}
	if !outlivesSession(os.Getuid(), name, lingering) {
		// systemd removes it when nobody is logged in any more; libvirt's own
		// session has another place without it too.
		_ = os.Unsetenv("XDG_RUNTIME_DIR") // it does not fail
	}
	dirs, err := a.dirs()
	if err != nil {
		return a.finish(err)
	}
	s := remote.Side{Dirs: dirs, Images: func() (*images.Cache, error) { return images.Open(dirs.Images()) }}
	if token, ok := remote.IsRun(words); ok {
		code, err := s.Run(token, func(r remote.Request) int { return a.runRequest(ctx, s, r) })
		if err != nil {
			return a.finish(err)
		}
		return code
	}
	switch {
	case len(words) != 1:
		err = vm.Classify(vm.ErrUsage, fmt.Errorf("%s is for agentvm on other hosts", remote.Arg))
	case words[0] == guestOp:
		err = a.guestThere(ctx, s)
	case words[0] == doctorOp:
		err = remote.Answer(a.stdin, a.stdout, func(text []byte) ([]vm.Finding, error) { return a.doctorThere(ctx, text) })
	default:
		err = s.Serve(ctx, words[0], a.stdin, a.stdout)
	}
	return a.finish(err)
}

// runRequest runs a command line of another host.
func (a *app) runRequest(ctx context.Context, s remote.Side, r remote.Request) int {
	workspace, configFile, err := s.Workspace(r.Copy)
	if err != nil {
		return a.finish(err)
	}
	if err := os.Chdir(filepath.Join(workspace, r.Dir)); err != nil {
		if err := os.Chdir(workspace); err != nil {
			return a.finish(vm.Classify(vm.ErrNotFound, fmt.Errorf("the copy of the workspace: %w", err)))
		}
	}
	a.side, a.args = &side{env: r.Env, configFile: configFile}, r.Args
	return a.execute(ctx)
}

// doctorOp asks for findings; the message is a configuration.
const doctorOp = "doctor"

func (a *app) doctorThere(ctx context.Context, text []byte) ([]vm.Finding, error) {
	c, err := config.Parse(config.FileName, text)
	if err != nil {
		return nil, err
	}
	a.side = &side{config: &c}
	return a.examine(ctx)
}

// checkElsewhere is what doctor says of the host of the project's machine.
func (a *app) checkElsewhere(ctx context.Context, p lifecycle.Project, e *elsewhere) []vm.Finding {
	f := vm.Finding{Name: "host " + e.host.Address(), Status: vm.FindingOK, Detail: "ssh reaches it, and agentvm is there"}
	conn, err := e.dial(ctx, a.mayAsk())
	var text []byte
	if err == nil {
		text, err = configThere(p.Config, e.host, "workspace")
	}
	var there []vm.Finding
	if err == nil {
		there, err = remote.Do[[]vm.Finding](ctx, conn, text, doctorOp)
	}
	if err != nil {
		f.Status, f.Detail, f.Fix = vm.FindingFail, err.Error(), vm.Hint(err)
	}
	remote.Printable(&there)
	for i := range there {
		there[i].Name = e.host.Address() + ": " + there[i].Name
	}
	return append([]vm.Finding{f}, there...)
}
