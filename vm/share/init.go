package share

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// InitArg is the first argument of a program that must call InitMain.
const InitArg = "share-init"

// Descriptors that the stage finds, besides listenFD.
const (
	planFD   = 4 // the plan, as JSON
	reportFD = 5 // takes the report, as JSON
	treeFD   = 6 // the idmapped tree, if the plan says so
)

// plan is all that the stage needs to know. It travels by descriptor: an
// argument could be read by every user of the host.
type plan struct {
	Source   string
	Dev, Ino uint64 // identity of the directory that the parent resolved
	Idmapped bool   // the tree comes by descriptor
	ReadOnly bool
	Protect  []string
	Hide     []string

	Caps  Caps
	Cache CacheMode
}

// report is what the stage tells its parent before it becomes virtiofsd.
type report struct {
	Error       string
	Errno       int // 0: not an error of the system's
	Unprotected []Unprotected
}

// What InitMain does instead of being the stage, by its second argument.
const (
	holdArg   = "hold"   // wait for the end of standard input: keeps a user namespace alive
	filterArg = "filter" // execute the rest of the arguments under the filter
)

// initEnv marks copies of the program that Start and Probe run. A program
// that forgot to call InitMain would otherwise run itself without end.
const initEnv = "AGENTVM_SHARE_INIT"

// selfCommand runs InitMain in a copy of this program.
func selfCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{InitArg}, args...)...)
	cmd.Env = []string{initEnv + "=1", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	return cmd
}

// notWired reports a copy of the program that did not get to InitMain.
func notWired() error {
	if os.Getenv(initEnv) != "" {
		return errors.New("the program does not call share.InitMain first thing")
	}
	return nil
}

// InitMain is the stage between Start and virtiofsd: in fresh namespaces, it
// mounts what the daemon shall see, then becomes the daemon. It returns only
// on failure, with an exit status.
func InitMain() int {
	// The seccomp filter is the thread's, and so is what it executes.
	runtime.LockOSThread()
	// Whoever started us may have a strict one, and virtiofsd inherits it; the
	// modes of the guest's files are the guest's business.
	unix.Umask(0)
	if len(os.Args) > 2 {
		return initHelper(os.Args[2], os.Args[3:])
	}
	out := os.NewFile(reportFD, "report")
	for _, fd := range []int{planFD, reportFD, treeFD} {
		unix.CloseOnExec(fd)
	}
	rep := &report{}
	err := stage(out, rep)
	rep.Error = err.Error()
	var errno unix.Errno
	if errors.As(err, &errno) {
		rep.Errno = int(errno)
	}
	if json.NewEncoder(out).Encode(rep) != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	return 1
}

func initHelper(what string, args []string) int {
	switch {
	case what == holdArg:
		_, _ = io.Copy(io.Discard, os.Stdin)
		return 0
	case what == filterArg && len(args) > 0:
		err := installFilter()
		if err == nil {
			err = unix.Exec(args[0], args, []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"})
		}
		fmt.Fprintln(os.Stderr, err)
	}
	return 1
}

// stage does the work and does not return if it succeeds.
func stage(out io.Writer, rep *report) error {
	var p plan
	if err := json.NewDecoder(os.NewFile(planFD, "plan")).Decode(&p); err != nil {
		return fmt.Errorf("read the plan: %w", err)
	}
	// The parent may have died before this process could ask to die with it.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("ask to die with the parent: %w", err)
	}
	var err error
	if rep.Unprotected, err = mountShare(p); err != nil {
		return err
	}
	sandbox := sandboxNamespace
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		sandbox = sandboxChroot // virtiofsd's own attempt would fail as well
	}
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil {
		limit.Cur = limit.Max // one descriptor for each inode that the guest remembers
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	}
	argv := append([]string{p.Caps.Path}, args(p.Caps, sharePoint, p.Cache, p.ReadOnly, sandbox)...)
	if err := installFilter(); err != nil {
		return err
	}
	if err := json.NewEncoder(out).Encode(rep); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	// Close-on-exec ends the report; more follows only if this fails.
	if err := unix.Exec(p.Caps.Path, argv, []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}); err != nil {
		return fmt.Errorf("execute %s: %w", p.Caps.Path, err)
	}
	return nil
}
