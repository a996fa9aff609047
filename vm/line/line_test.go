package line

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/testenv"
)

// guest answers on a socket with f and returns the host's end.
func guest(t *testing.T, f func(c net.Conn)) *Line {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		c, err := l.Accept()
		if err == nil {
			defer c.Close()
			f(c)
		}
	}()
	line, err := Dial(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { line.Close() })
	return line
}

// namesProgram fails where a function uses a name that there is not.
const namesProgram = `
import builtins, dis, types
for name, f in list(globals().items()):
    if isinstance(f, types.FunctionType):
        for i in dis.get_instructions(f):
            if i.opname == "LOAD_GLOBAL" and i.argval not in globals() and not hasattr(builtins, i.argval):
                raise NameError(f"{name} uses {i.argval}")
`

// listener runs the real listener, on a socket instead of a port, and without
// the rights to set the clock. The channel has its process, then its end.
func listener(t *testing.T) (*Line, <-chan *os.Process) {
	t.Helper()
	const python = "/usr/bin/python3"
	testenv.Require(t, python)
	program := strings.NewReplacer("def port():", "def port():\n    return '/dev/null'\n", "os.open(port(), os.O_RDWR)", "3",
		"def awake(now, entropy):", "def awake(now, entropy):\n    global heard\n    heard = now, len(entropy)\n    return\n").Replace(Listener)
	processes := make(chan *os.Process, 1)
	return guest(t, func(c net.Conn) {
		defer close(processes)
		f, err := c.(*net.UnixConn).File()
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		c.Close() // f is another descriptor
		cmd := exec.Command(python, "-c", program)
		cmd.ExtraFiles, cmd.Stderr = []*os.File{f}, os.Stderr
		if err := cmd.Start(); err != nil {
			t.Error(err)
			return
		}
		processes <- cmd.Process
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}), processes
}

func TestListener(t *testing.T) {
	if !strings.Contains(Listener, `"`+Port+`"`) {
		t.Errorf("the listener looks for another port than %s", Port)
	}
	l, _ := listener(t)
	if err := l.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	var got []string
	keep := func(s string) { got = append(got, s) }
	script := "echo one; cat; echo \"two 'ü' \\\\\" >&2\nprintf '\\033[1mthree\\n'"
	if err := l.Run(t.Context(), Shell(script), keep); err != nil {
		t.Fatal(err)
	}
	if want := []string{"one", `two 'ü' \`, "[1mthree"}; !slices.Equal(got, want) {
		t.Errorf("output %q, want %q", got, want)
	}
	got = nil
	if err := l.Run(t.Context(), Shell(`echo "$# $1 $2"`, "it's", "a \"b\" ü"), keep); err != nil || !slices.Equal(got, []string{`2 it's a "b" ü`}) {
		t.Errorf("arguments: %v, %q", err, got)
	}
	var failed *ProgramError
	for program, why := range map[string]string{Shell("echo why; exit 7"): "exit code 7", "1/0": "ZeroDivisionError", "not really python": "SyntaxError"} {
		if err := l.Run(t.Context(), program, nil); !errors.As(err, &failed) || !strings.Contains(failed.Output, why) {
			t.Errorf("%s: %v", program, err)
		}
	}
	if err := l.Run(t.Context(), strings.Repeat("pass # a long program\n", 10000), nil); err != nil {
		t.Errorf("long program: %v", err)
	}
	got = nil
	if err := l.Run(t.Context(), "def hello(told, *texts): say('hello ' + json.loads(told)['name'] + repr(texts))", nil); err != nil {
		t.Fatal(err)
	}
	if err := l.Call(t.Context(), Call{"hello", []string{"one\n", "zwei ü"}, json.RawMessage(`{"name": "it's \"ü\""}`)}, keep); err != nil || !slices.Equal(got, []string{`hello it's "ü"('one\n', 'zwei ü')`}) {
		t.Errorf("%v, %q", err, got)
	}
	for _, c := range []Call{{"nothing", nil, []byte("{}")}, {Clone, nil, []byte("{}")}, {Claim, nil, []byte("{")}} {
		if err := l.Call(t.Context(), c, nil); !errors.As(err, &failed) {
			t.Errorf("%v: %v", c, err)
		}
	}
	if err := l.Run(t.Context(), namesProgram, nil); err != nil {
		t.Error(err)
	}
	for _, function := range []string{Clone, Claim, Resume} {
		if err := l.Run(t.Context(), "callable("+function+") or 1/0", nil); err != nil {
			t.Errorf("%s: %v", function, err)
		}
	}
	got = nil
	if err := l.Run(t.Context(), "say(f'{heard[0]} {heard[1]}')", keep); err != nil || len(got) != 1 {
		t.Fatalf("%v, %q", err, got)
	}
	var now float64
	var entropy int
	if _, err := fmt.Sscan(got[0], &now, &entropy); err != nil || entropy != 32 || math.Abs(now-float64(time.Now().Unix())) > 60 {
		t.Errorf("the guest was told %q: %v", got[0], err)
	}
}

// A server that waits for its host key finds who may log in when it gets it.
func TestListenerBeginsServer(t *testing.T) {
	t.Parallel()
	l, _ := listener(t)
	dir := t.TempDir()
	who, pipe := filepath.Join(dir, "it's who"), filepath.Join(dir, "pipe")
	if err := errors.Join(os.WriteFile(who, nil, 0o600), syscall.Mkfifo(pipe, 0o600)); err != nil {
		t.Fatal(err)
	}
	found := make(chan [2]string, 1)
	go func() {
		key, _ := os.ReadFile(pipe) // up to its end
		file, _ := os.ReadFile(who)
		found <- [2]string{string(file), string(key)}
	}()
	meet := fmt.Sprintf("host_key = %q\n%s", pipe, MeetServer(who))
	deadline := time.Now().Add(10 * time.Second)
	for err := l.Run(t.Context(), meet, nil); err != nil; err = l.Run(t.Context(), meet, nil) {
		if time.Now().After(deadline) {
			t.Fatal(err) // nobody reads
		}
	}
	select {
	case got := <-found:
		t.Fatalf("it begins with %q before it is told", got)
	case <-time.After(100 * time.Millisecond):
	}
	if err := l.Run(t.Context(), `begin_sshd("who\n", "key\n")`, nil); err != nil {
		t.Fatal(err)
	}
	if got, want := <-found, [2]string{"who\n", "key\n"}; got != want {
		t.Errorf("it found %q, want %q", got, want)
	}
}

// What a clone leaves for later is done when the host has hung up and the first
// commands are over, or when the listener is told to end.
func TestListenerSettles(t *testing.T) {
	t.Parallel()
	for name, stop := range map[string]bool{"left alone": false, "stopped": true} {
		t.Run(name, func(t *testing.T) {
			l, processes := listener(t)
			done := filepath.Join(t.TempDir(), "done")
			program := fmt.Sprintf(`
def log(*words, **options):
    with open(%q, "a") as f:
        print(*words[0], file=f)
subprocess.run = log
shutil.rmtree = lambda path, ignore_errors: log(["rm", path])
settle_later()
`, done)
			if err := l.Run(t.Context(), program, nil); err != nil {
				t.Fatal(err)
			}
			process := <-processes
			began := time.Now()
			l.Close()
			if stop {
				time.Sleep(500 * time.Millisecond) // it comes to wait
				if text, _ := os.ReadFile(done); len(text) > 0 {
					t.Errorf("done at once:\n%s", text)
				}
				if err := process.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
			}
			<-processes
			if took := time.Since(began); !stop && took < 1900*time.Millisecond {
				t.Errorf("ended after %v", took)
			}
			const want = "rm /run/log/journal\nsystemctl kill --signal=KILL systemd-journald\nudevadm control --start-exec-queue\n"
			if text, err := os.ReadFile(done); err != nil || string(text) != want {
				t.Errorf("done:\n%s(%v), want:\n%s", text, err, want)
			}
		})
	}
}

func TestHostileGuest(t *testing.T) {
	for name, words := range map[string]string{
		"endless line":    strings.Repeat("x", 2*maxLine),
		"endless output":  strings.Repeat("x\n", maxOutput),
		"odd exit code":   done + "many\n",
		"hangs up":        "",
		"hangs up midway": "some",
	} {
		t.Run(name, func(t *testing.T) {
			l := guest(t, func(c net.Conn) { _, _ = c.Write([]byte(words)) })
			if err := l.Run(t.Context(), "true", nil); err == nil {
				t.Error("taken for a success")
			}
		})
	}
}

func TestSilentGuest(t *testing.T) {
	wait := make(chan struct{})
	defer close(wait)
	l := guest(t, func(net.Conn) { <-wait })
	cause := errors.New("too slow")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, cause)
	defer cancel()
	if err := l.Ready(ctx); !errors.Is(err, cause) {
		t.Errorf("error %v", err)
	}
}
