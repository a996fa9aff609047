package share

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
)

// Spec is one share.
type Spec struct {
	Tag    string // virtiofs tag, for messages
	Source string // directory to share; symbolic links are resolved once
	Socket string // vhost-user socket to listen on, mode 0600; must not exist

	ReadOnly bool
	// Protect and Hide are paths below Source, with slashes: those are
	// read-only, these look empty. A path that does not exist, or is behind a
	// symbolic link, is left alone and listed in Server.Unprotected.
	Protect, Hide []string

	Guest vm.Owner  // ids that own all in the guest; zero: 1000 and 1000
	RunAs *vm.Owner // what the daemon and the socket belong to, when run by root

	Cache CacheMode // empty: CacheAuto

	Log io.Writer // receives what the daemon says; nil: only Err has its end
}

// Server is one running virtiofsd. It serves one connection and ends with it.
type Server struct {
	spec        Spec
	cmd         *exec.Cmd
	mu          sync.Mutex
	unprotected []Unprotected // guarded by mu
	tail        tail
	stopped     atomic.Bool
	done        chan struct{}
	err         error // valid once done is closed
}

// ErrDisconnected is how a server ends whose virtual machine went away.
var ErrDisconnected = errors.New("the virtual machine disconnected")

// Start shares a directory. It returns when the socket accepts connections.
// The server outlives ctx, which bounds only the start.
func Start(ctx context.Context, caps Caps, spec Spec) (*Server, error) {
	s, err := start(ctx, caps, spec)
	if err != nil {
		return nil, fmt.Errorf("share %s as %q: %w", spec.Source, spec.Tag, err)
	}
	return s, nil
}

func start(ctx context.Context, caps Caps, spec Spec) (*Server, error) {
	if err := notWired(); err != nil {
		return nil, err
	}
	spec, err := normalize(spec)
	if err != nil {
		return nil, err
	}
	dir, p, owner, err := resolve(caps, spec)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	id, err := decideIdentity(vm.Owner{UID: os.Geteuid(), GID: os.Getegid()}, owner, spec.Guest, spec.RunAs)
	if err != nil {
		return nil, err
	}
	var tree *os.File
	if id.idmapped() {
		if tree, err = idmappedTree(dir, id); err == nil {
			defer tree.Close()
		} else if id, err = id.withoutIdmap(err); err != nil {
			return nil, err
		}
	}
	p.Idmapped = tree != nil
	listener, err := listen(spec.Socket, spec.RunAs)
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	s := &Server{spec: spec, done: make(chan struct{})}
	if err := s.launch(ctx, id, p, listener, tree); err != nil {
		_ = os.Remove(spec.Socket)
		return nil, err
	}
	if restricted, err := restrictedPaths(s.PID(), spec); err == nil && len(restricted) > 0 {
		go s.watch(restricted) // until done
	}
	return s, nil
}

// normalize fills in defaults and refuses paths that leave the share.
func normalize(spec Spec) (Spec, error) {
	if spec.Guest == (vm.Owner{}) {
		spec.Guest = vm.Owner{UID: 1000, GID: 1000}
	}
	if spec.Cache == "" {
		spec.Cache = CacheAuto
	}
	if spec.Log == nil {
		spec.Log = io.Discard
	}
	clean := func(paths []string) ([]string, error) {
		var out []string
		for _, p := range paths {
			c := filepath.Clean(p)
			if !filepath.IsLocal(p) || c == "." {
				return nil, fmt.Errorf("protect or hide %q: not a path below the shared directory: %w", p, vm.ErrUsage)
			}
			out = append(out, c)
		}
		return out, nil
	}
	var err error
	if spec.Protect, err = clean(spec.Protect); err != nil {
		return spec, err
	}
	spec.Hide, err = clean(spec.Hide)
	return spec, err
}

// resolve opens the shared directory and learns who owns it.
func resolve(caps Caps, spec Spec) (*os.File, plan, vm.Owner, error) {
	fail := func(err error) (*os.File, plan, vm.Owner, error) { return nil, plan{}, vm.Owner{}, err }
	source, err := filepath.EvalSymlinks(spec.Source)
	if err != nil {
		return fail(err)
	}
	if source, err = filepath.Abs(source); err != nil {
		return fail(err)
	}
	fd, err := unix.Open(source, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail(fmt.Errorf("open the directory: %w", err))
	}
	dir := os.NewFile(uintptr(fd), source)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		dir.Close()
		return fail(fmt.Errorf("stat the directory: %w", err))
	}
	p := plan{
		Source: source, Dev: uint64(st.Dev), Ino: st.Ino,
		ReadOnly: spec.ReadOnly, Protect: spec.Protect, Hide: spec.Hide,
		Caps: caps, Cache: spec.Cache,
	}
	return dir, p, vm.Owner{UID: int(st.Uid), GID: int(st.Gid)}, nil
}

// listen makes the vhost-user socket. Its mode is set before it has a name.
func listen(path string, owner *vm.Owner) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), path)
	if err := unix.Fchmod(fd, 0o600); err != nil {
		f.Close()
		return nil, fmt.Errorf("restrict the socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		f.Close()
		return nil, fmt.Errorf("listen on %s (%d bytes, of at most 107): %w", path, len(path), err)
	}
	err = unix.Listen(fd, 1)
	if err == nil && owner != nil {
		err = os.Lchown(path, owner.UID, owner.GID)
	}
	if err != nil {
		f.Close()
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), os.Remove(path))
	}
	return f, nil
}

// namespaces of the daemon's own. The network one is empty.
const namespaces = syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID |
	syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS

// attributes makes the child all-powerful in a user namespace that knows only
// id, and thus powerless outside. Ambient capabilities let it keep that power
// through exec without being uid 0 even there.
func attributes(id identity) *syscall.SysProcAttr {
	root := os.Geteuid() == 0
	attr := &syscall.SysProcAttr{
		Cloneflags:                 namespaces,
		UidMappings:                []syscall.SysProcIDMap{{ContainerID: id.Guest.UID, HostID: id.Host.UID, Size: 1}},
		GidMappings:                []syscall.SysProcIDMap{{ContainerID: id.Guest.GID, HostID: id.Host.GID, Size: 1}},
		GidMappingsEnableSetgroups: root,
		Pdeathsig:                  syscall.SIGKILL,
		Setpgid:                    true, // a Ctrl-C is for agentvm to handle
	}
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		if have, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0); err == nil && have == 1 {
			attr.AmbientCaps = append(attr.AmbientCaps, c)
		}
	}
	if root {
		attr.Credential = &syscall.Credential{Uid: uint32(id.Guest.UID), Gid: uint32(id.Guest.GID)}
	}
	return attr
}

// launch runs the stage and waits until it has become virtiofsd.
func (s *Server) launch(ctx context.Context, id identity, p plan, listener, tree *os.File) error {
	planR, planW, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make a pipe: %w", err)
	}
	defer planR.Close()
	defer planW.Close()
	reportR, reportW, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make a pipe: %w", err)
	}
	defer reportR.Close()
	defer reportW.Close()

	s.cmd = selfCommand(context.Background()) // it outlives ctx
	s.cmd.Stderr = io.MultiWriter(&s.tail, s.spec.Log)
	s.cmd.Stdout = s.cmd.Stderr
	s.cmd.ExtraFiles = []*os.File{listener, planR, reportW} // listenFD, planFD, reportFD
	if tree != nil {
		s.cmd.ExtraFiles = append(s.cmd.ExtraFiles, tree) // treeFD
	}
	s.cmd.SysProcAttr = attributes(id)

	started := make(chan error)
	go s.run(started)
	if err := <-started; err != nil {
		return explainStart(err)
	}
	planR.Close()
	reportW.Close()
	if os.Geteuid() == 0 {
		raiseFileLimit(s.cmd.Process.Pid)
	}
	stop := context.AfterFunc(ctx, func() { _ = s.cmd.Process.Kill() })
	err = handshake(p, planW, reportR, s)
	if !stop() {
		err = errors.Join(context.Cause(ctx), err)
	}
	if err != nil {
		s.Stop()
		return err
	}
	return nil
}

// handshake sends the plan and reads reports until virtiofsd has taken over,
// which closes the pipe.
func handshake(p plan, planW, reportR *os.File, s *Server) error {
	if err := json.NewEncoder(planW).Encode(p); err != nil {
		return fmt.Errorf("send the plan: %w", err)
	}
	planW.Close()
	reported := false
	for dec := json.NewDecoder(reportR); ; reported = true {
		var rep report
		err := dec.Decode(&rep)
		switch {
		case errors.Is(err, io.EOF) && reported:
			return nil
		case errors.Is(err, io.EOF):
			return fmt.Errorf("prepare its mounts: the stage died: %s", s.tail.String())
		case err != nil:
			return fmt.Errorf("read the report: %w", err)
		case rep.Error != "":
			return explainStage(rep)
		}
		s.unprotected = rep.Unprotected
	}
}

// run starts the daemon and waits for it, on one thread: the kernel sends the
// parent-death signal when the thread that forked ends (prctl(2)).
func (s *Server) run(started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := s.cmd.Start()
	started <- err
	if err != nil {
		return
	}
	err = s.cmd.Wait()
	_ = os.Remove(s.spec.Socket)
	switch {
	case s.stopped.Load():
	case err == nil:
		s.err = fmt.Errorf("share %q: %w", s.spec.Tag, ErrDisconnected)
	case s.tail.String() != "":
		s.err = fmt.Errorf("share %q: virtiofsd ended: %w: %s", s.spec.Tag, err, s.tail.String())
	default:
		s.err = fmt.Errorf("share %q: virtiofsd ended: %w", s.spec.Tag, err)
	}
	close(s.done)
}

// raiseFileLimit lets the guest remember as many files as the kernel allows
// one process to open. What stays is the caller's own limit.
func raiseFileLimit(pid int) {
	const many = 1 << 20 // fs.nr_open's default
	_ = unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: many, Max: many}, nil)
}

// Unprotected lists what Start could not protect or hide, and what has lost
// its protection since, because the host replaced it.
func (s *Server) Unprotected() []Unprotected {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.unprotected)
}

// PID is virtiofsd's process id.
func (s *Server) PID() int { return s.cmd.Process.Pid }

// Done is closed when virtiofsd has ended.
func (s *Server) Done() <-chan struct{} { return s.done }

// Err says why virtiofsd ended, with the last that it said. It is nil while
// it runs and after Stop.
func (s *Server) Err() error {
	select {
	case <-s.done:
		return s.err
	default:
		return nil
	}
}

// Stop kills the daemon and waits for its end. What the guest has written is
// already the host kernel's, so nothing is lost.
func (s *Server) Stop() {
	s.stopped.Store(true)
	_ = s.cmd.Process.Kill() // it may be gone already
	<-s.done
}
