package helper

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/gpu"
	"github.com/agentvm/agentvm/vm"
)

// Arg is the first and only argument of the helper's process.
const Arg = "gpu-helper"

const (
	askWithin = 10 * time.Second // for a request to arrive
	doWithin  = 10 * time.Minute // for others' binding to end, and ours; a blocked write ends by itself
)

// Main serves one request on standard input, answers on standard output and
// returns the exit code: 0 where there is an answer.
func Main(args []string) int {
	said := map[string]string{}
	for _, name := range callerVariables {
		said[name] = os.Getenv(name)
	}
	os.Clearenv() // $TMPDIR and the like are the caller's
	s := server{host: gpu.Host{Root: "/"}, getenv: func(name string) string { return said[name] }, owner: 0}
	err := s.harden(args)
	if err == nil {
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
		defer stop()
		err = s.serve(ctx, os.Stdin, os.Stdout)
	}
	if err != nil {
		text := err.Error()
		if hint := vm.Hint(err); hint != "" {
			text += " (" + hint + ")"
		}
		fmt.Fprintln(os.Stderr, complaint+text)
		return 1
	}
	return 0
}

// server is the helper's surroundings.
type server struct {
	host   gpu.Host
	getenv func(string) string
	owner  int // of the files that it believes: root
}

// harden takes from the caller what they could interfere with: they chose our
// limits, working directory, umask and terminal.
func (s server) harden(args []string) error {
	if len(args) != 2 {
		return errors.New("it takes no arguments")
	}
	if os.Getuid() != 0 || os.Geteuid() != 0 {
		return vm.WithHint(errors.New("it is run by sudo or pkexec, as root"), "agentvm gpu helper-setup")
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	if err := trusted("/", exe, 0); err != nil {
		return fmt.Errorf("root does not run a program that others can replace: %w", err)
	}
	// A file size of 0 would end a journal, and with it the way back. That of
	// processes (RLIMIT_NPROC) does not bind root.
	for _, limit := range []int{unix.RLIMIT_FSIZE, unix.RLIMIT_CPU, unix.RLIMIT_AS, unix.RLIMIT_DATA, unix.RLIMIT_STACK} {
		if err := unix.Setrlimit(limit, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}); err != nil {
			return fmt.Errorf("reset limits: %w", err)
		}
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1024, Max: 4096}); err != nil {
		return fmt.Errorf("reset limits: %w", err)
	}
	// Ctrl-Z would hold the host's lock for as long as the caller likes; an
	// answer that nobody reads must not end us.
	signal.Ignore(unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU, unix.SIGPIPE, unix.SIGXFSZ)
	unix.Umask(0o022)
	// Users can freeze a control group of theirs, and us in it, with the host's
	// lock. Where there is only the old hierarchy there is nothing to leave.
	_ = os.WriteFile("/sys/fs/cgroup/cgroup.procs", []byte("0"), 0)
	return os.Chdir("/")
}

// serve answers one request. Its error is that there is no answer.
func (s server) serve(ctx context.Context, in io.Reader, out io.Writer) error {
	c, err := lookup(s.getenv)
	if err != nil {
		return err
	}
	e := entry{Request: rand.Text(), UID: c.UID, User: c.Name, Via: c.Via, PID: os.Getpid(), Result: "asked"}
	req, err := decodeWithin(in, askWithin)
	if err != nil {
		e.Result, e.Error = "refused", err.Error()
		return errors.Join(err, audit(s.host.Root, e))
	}
	e.Do, e.Devices, e.Plain, e.Owner, e.OwnerPID = req.Do, req.Devices, req.Plain, req.Name, req.Process.PID
	if err := audit(s.host.Root, e); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, doWithin)
	defer cancel()
	answer, err := s.do(ctx, c, req)
	e.Result, e.Outcomes = "done", answer.Outcomes
	if err != nil {
		e.Result, e.Error = "failed", err.Error()
		if errors.Is(err, vm.ErrPolicy) {
			e.Result = "refused"
		}
		answer.Error, answer.Hint, answer.Class = err.Error(), vm.Hint(err), classOf(err)
	}
	// What was done stays done, whether or not its line can be written.
	auditErr := audit(s.host.Root, e)
	data, err := json.Marshal(answer)
	if err == nil {
		_, err = out.Write(append(data, '\n'))
	}
	return errors.Join(err, auditErr)
}

// decodeWithin gives up on a caller who never finishes their request. The
// process ends soon after, and the reader with it.
func decodeWithin(in io.Reader, d time.Duration) (request, error) {
	type result struct {
		req request
		err error
	}
	done := make(chan result, 1)
	go func() {
		req, err := decode(in)
		done <- result{req, err}
	}()
	select {
	case r := <-done:
		return r.req, r.err
	case <-time.After(d):
		return request{}, fmt.Errorf("no request came within %v", d)
	}
}

// do carries a request out, after the list was asked whether it may be.
func (s server) do(ctx context.Context, c caller, req request) (answer response, err error) {
	list, err := readAllowList(s.host.Root, s.owner)
	if err != nil {
		return answer, err
	}
	allowed := list.of(c)
	if len(allowed) == 0 {
		return answer, vm.WithHint(vm.Classify(vm.ErrPolicy, fmt.Errorf("user %d may not take devices", c.UID)), "root names them in "+AllowFile)
	}
	m := &gpu.Manager{Host: s.host, User: c.UID, Permit: func(functions []*gpu.Device, parts []*gpu.Mdev) error { return permit(allowed, functions, parts) }}
	switch req.Do {
	case bind:
		owner, err := s.owned(c, req)
		if err != nil {
			return answer, err
		}
		answer.Journals, err = m.Bind(ctx, req.of(owner, c))
		return answer, err
	case release:
		answer.Outcomes, err = m.Release(ctx, req.Devices...)
	case recoverStale:
		answer.Outcomes, err = m.Recover(ctx)
	}
	return answer, err
}

// owned decides who stands behind what is bound: the process that was named,
// which must be the caller's, or nobody, and then it is kept.
func (s server) owned(c caller, req request) (gpu.Owner, error) {
	owner := gpu.Owner{Name: req.Name, Process: req.Process}
	if c.Name != "" {
		owner.Name += " of " + c.Name
	}
	if req.Process == (vm.ProcID{}) {
		self, err := vm.ProcessID(os.Getpid())
		owner.Process, owner.Keep = self, true
		return owner, err
	}
	var st unix.Stat_t
	err := unix.Stat(filepath.Join("/proc", fmt.Sprint(req.Process.PID)), &st)
	if err != nil || !req.Process.Alive() || int(st.Uid) != c.UID {
		return owner, vm.Classify(vm.ErrPolicy, fmt.Errorf("process %d is not a running one of yours", req.Process.PID))
	}
	return owner, nil
}

var classes = map[string]error{"host": vm.ErrHost, "not-found": vm.ErrNotFound, "policy": vm.ErrPolicy}

func classOf(err error) string {
	for name, class := range classes {
		if errors.Is(err, class) {
			return name
		}
	}
	return ""
}
