package remote

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/agentvm/agentvm/vm"
)

// Request is a command that is to be run there. It goes over the connection's
// standard input, because arguments of programs are everybody's to see.
type Request struct {
	Copy   Copy              `json:"copy"`
	Config []byte            `json:"config"` // agentvm.yaml, for that host
	Args   []string          `json:"args"`
	Dir    string            `json:"dir"` // in the workspace
	Env    map[string]string `json:"env"` // what of its user's environment it may have
}

// ConfigFile is where the configuration of a copy's machine lies, beside it.
const ConfigFile = "agentvm.yaml"

// staleRequest is how long a request waits to be run.
const staleRequest = time.Minute

var tokenRE = vm.Pattern(`^[A-Z2-7]{26}$`)

// file is where a request, or what became of it, lies.
func (s Side) file(token, kind string) (string, error) {
	if !tokenRE().MatchString(token) {
		return "", vm.Classify(vm.ErrUsage, fmt.Errorf("%q is no request", token))
	}
	return filepath.Join(s.Dirs.Run, "remote-"+token+"."+kind), nil
}

// prepare keeps a request until Run takes it.
func (s Side) prepare(r Request) (string, error) {
	dir, err := s.dir(r.Copy)
	if err != nil {
		return "", err
	}
	if !filepath.IsLocal(r.Dir) {
		return "", vm.Classify(vm.ErrUsage, fmt.Errorf("%q is not in the workspace", r.Dir))
	}
	for name := range r.Env {
		if !vm.ValidVariable(name) {
			return "", vm.Classify(vm.ErrUsage, fmt.Errorf("%q is not a variable's name", name))
		}
	}
	s.sweep()
	if len(r.Config) > 0 {
		if err := os.MkdirAll(dir, 0o700); err != nil { // nothing has been copied yet
			return "", fmt.Errorf("keep the machine's configuration: %w", err)
		}
		if err := vm.WriteFile(filepath.Join(dir, ConfigFile), r.Config, 0o600); err != nil {
			return "", fmt.Errorf("keep the machine's configuration: %w", err)
		}
	}
	token := rand.Text()
	path, err := s.file(token, "request")
	if err != nil {
		return "", err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return "", err
	}
	return token, vm.WriteFile(path, data, 0o600)
}

// sweep removes what nobody came for.
func (s Side) sweep() {
	found, _ := filepath.Glob(filepath.Join(s.Dirs.Run, "remote-*.*"))
	begun, _ := filepath.Glob(filepath.Join(s.Dirs.Run, ".remote-*.*")) // by vm.WriteFile
	found = append(found, begun...)
	for _, path := range found {
		fi, err := os.Lstat(path)
		running := strings.HasSuffix(path, ".running") && s.lives(path)
		if err == nil && time.Since(fi.ModTime()) > staleRequest && !running {
			_ = os.Remove(path)
		}
	}
}

// take reads a request, once.
func (s Side) take(token string) (Request, error) {
	var r Request
	path, err := s.file(token, "request")
	if err != nil {
		return r, err
	}
	data, err := os.ReadFile(path)
	if err == nil {
		err = errors.Join(os.Remove(path), json.Unmarshal(data, &r))
	}
	if err != nil {
		return r, fmt.Errorf("take the request: %w", err)
	}
	return r, nil
}

// Workspace is where the copy lies that the request is about.
func (s Side) Workspace(c Copy) (workspace, configFile string, err error) {
	dir, err := s.dir(c)
	return filepath.Join(dir, c.Name), filepath.Join(dir, ConfigFile), err
}

// Run has do run a request, and returns its exit code. It notes that this
// process does it, so that it can be signalled, and afterwards an exit code
// that a lost connection has too.
func (s Side) Run(token string, do func(Request) int) (int, error) {
	running, err := s.file(token, "running")
	if err != nil {
		return 0, err
	}
	result, err := s.file(token, "result")
	if err != nil {
		return 0, err
	}
	self, err := vm.ProcessID(os.Getpid())
	if err != nil {
		return 0, err
	}
	data, err := json.Marshal(self)
	if err == nil {
		err = vm.WriteFile(running, data, 0o600)
	}
	if err != nil {
		return 0, fmt.Errorf("note the request: %w", err)
	}
	r, err := s.take(token)
	code := 0
	if err == nil {
		code = do(r)
	}
	if code == lost { // others need no second word
		err = vm.WriteFile(result, fmt.Append(nil, code), 0o600)
	}
	return code, errors.Join(err, os.Remove(running))
}

func (s Side) process(path string) (p vm.ProcID, err error) {
	data, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(data, &p)
	}
	return p, err
}

func (s Side) lives(path string) bool {
	p, err := s.process(path)
	return err == nil && p.Alive()
}

// signalRequest is a signal for whoever runs a request.
type signalRequest struct {
	Token  string         `json:"token"`
	Signal syscall.Signal `json:"signal"`
}

// passed are the signals that a command may get.
var passed = map[syscall.Signal]bool{
	syscall.SIGINT: true, syscall.SIGTERM: true, syscall.SIGHUP: true, syscall.SIGQUIT: true, syscall.SIGUSR1: true, syscall.SIGUSR2: true,
}

func (s Side) signal(r signalRequest) error {
	path, err := s.file(r.Token, "running")
	if err != nil {
		return err
	}
	if !passed[r.Signal] {
		return vm.Classify(vm.ErrUsage, fmt.Errorf("signal %d is not passed on", int(r.Signal)))
	}
	p, err := s.process(path)
	for range 100 { // it may be on its way
		waiting, _ := s.file(r.Token, "request")
		if _, missing := os.Lstat(waiting); err == nil || missing != nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
		p, err = s.process(path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it has ended
	}
	if err != nil || !p.Alive() {
		return err
	}
	return syscall.Kill(p.PID, r.Signal)
}

// result tells the exit code of a request that ended with that of a lost
// connection; nil: it did not.
func (s Side) result(token string) (*int, error) {
	path, err := s.file(token, "result")
	if err != nil {
		return nil, err
	}
	err = os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	code := lost
	return &code, err
}
