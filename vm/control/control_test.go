package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
)

// patience is how long a test waits for what happens at once.
const patience = time.Minute

// fake is a supervisor that does as the test says.
type fake struct {
	watch func(ctx context.Context, out chan<- instance.Status)
	stop  func(ctx context.Context, grace time.Duration, reason string) error
	seen  chan string // who comes, leaves and is lost
}

func (f *fake) Status() instance.Status {
	return instance.Status{State: instance.Ready, Reason: "of the fake"}
}

func (f *fake) Watch(ctx context.Context) <-chan instance.Status {
	out := make(chan instance.Status)
	go func() {
		defer close(out)
		f.watch(ctx, out)
	}()
	return out
}

func (f *fake) Suspend(context.Context) error {
	return errors.New("/workspace is in use by process 7 (vi)")
}
func (f *fake) Snapshot(_ context.Context, req SnapshotRequest) error {
	if req != wantSnapshot {
		return fmt.Errorf("it was asked for %+v", req)
	}
	return nil
}

var wantSnapshot = SnapshotRequest{Dir: "/snapshots/.making", Memory: true, Workspace: true, Like: "/snapshots/one/workspace"}

func (f *fake) Adopt(_ context.Context, dir string) error {
	if dir != "/instances/mine" {
		return errors.New("it was asked for " + dir)
	}
	return nil
}

func (f *fake) Attend(_ context.Context, id string) error {
	f.seen <- "came"
	return nil
}

func (f *fake) Leave(_ string, lost bool) {
	f.seen <- map[bool]string{true: "lost", false: "left"}[lost]
}

func (f *fake) Stop(ctx context.Context, grace time.Duration, reason string) error {
	return f.stop(ctx, grace, reason)
}

// socketPath is short enough for a socket, which t.TempDir is not.
func socketPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, Socket)
}

func listen(t *testing.T) (net.Listener, string) {
	t.Helper()
	path := socketPath(t)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, path
}

// serve runs the server until the test ends.
func serve(t *testing.T, f *fake) (c *Client, path string) {
	t.Helper()
	l, path := listen(t)
	served := make(chan error, 1)
	go func() { served <- Serve(l, f) }()
	t.Cleanup(func() {
		l.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return NewClient(path), path
}

// within fails the test when what c stands for does not happen.
func within[T any](t *testing.T, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(patience):
		t.Fatalf("%s: not within %s", what, patience)
	}
	return v
}

func TestStatus(t *testing.T) {
	c, _ := serve(t, &fake{})
	s, err := c.Status(t.Context())
	if err != nil || s.State != instance.Ready || s.Reason != "of the fake" {
		t.Errorf("%+v, %v", s, err)
	}
}

func TestWatch(t *testing.T) {
	states := []instance.State{instance.Starting, instance.Booting, instance.Ready}
	f := &fake{watch: func(_ context.Context, out chan<- instance.Status) {
		for _, s := range states {
			out <- instance.Status{State: s}
		}
	}}
	c, _ := serve(t, f)
	var saw []instance.State
	if err := c.Watch(t.Context(), func(s instance.Status) bool { saw = append(saw, s.State); return true }); err != nil {
		t.Errorf("the supervisor ended in good order: %v", err)
	}
	if diff := cmp.Diff(states, saw); diff != "" {
		t.Error(diff)
	}
}

// TestWatchIsLive wants each change at once, not when a buffer is full.
func TestWatchIsLive(t *testing.T) {
	saw := make(chan instance.State)
	f := &fake{watch: func(ctx context.Context, out chan<- instance.Status) {
		out <- instance.Status{State: instance.Booting}
		<-ctx.Done()
	}}
	c, _ := serve(t, f)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- c.Watch(ctx, func(s instance.Status) bool { saw <- s.State; return true })
	}()
	if s := within(t, "the first change", saw); s != instance.Booting {
		t.Errorf("state %s", s)
	}
	cancel()
	if err := within(t, "the watcher's end", ended); !errors.Is(err, context.Canceled) || errors.Is(err, vm.ErrTimeout) {
		t.Errorf("an interrupted watch says %v", err)
	}
}

// TestSlowWatcher has a watcher that reads nothing while the supervisor fills
// its socket, and then goes away: neither is anybody else's concern.
func TestSlowWatcher(t *testing.T) {
	gone := make(chan struct{})
	f := &fake{watch: func(ctx context.Context, out chan<- instance.Status) {
		defer close(gone)
		for long := strings.Repeat("x", 1<<16); ; {
			select {
			case out <- instance.Status{State: instance.Booting, Reason: long}:
			case <-ctx.Done():
				return
			}
		}
	}}
	c, _ := serve(t, f)
	asleep, wake, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- c.Watch(t.Context(), func(instance.Status) bool {
			close(asleep)
			<-wake
			return false
		})
	}()
	within(t, "the first change", asleep)
	answered := make(chan error, 1)
	go func() { _, err := c.Status(t.Context()); answered <- err }()
	if err := within(t, "a status beside a slow watcher", answered); err != nil {
		t.Error(err)
	}
	close(wake)
	if err := within(t, "the watcher's end", ended); err != nil {
		t.Errorf("a watcher that has seen enough: %v", err)
	}
	within(t, "the end of what the watcher left", gone)
}

// TestWatchOfALongStatus once took a line that is too long for the end of the
// supervisor.
func TestWatchOfALongStatus(t *testing.T) {
	f := &fake{watch: func(ctx context.Context, out chan<- instance.Status) {
		select {
		case out <- instance.Status{Reason: strings.Repeat("x", maxStatus)}:
		case <-ctx.Done():
		}
	}}
	c, _ := serve(t, f)
	err := c.Watch(t.Context(), func(instance.Status) bool { t.Error("it was shown"); return true })
	if !errors.Is(err, bufio.ErrTooLong) {
		t.Errorf("got %v", err)
	}
}

// answerWith accepts one connection, answers its request with raw bytes and
// hangs up.
func answerWith(t *testing.T, raw string) *Client {
	t.Helper()
	l, path := listen(t)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
			_, _ = io.WriteString(conn, raw) // the client may be gone
		}
	}()
	return NewClient(path)
}

// TestSupervisorDiesInALine kills the supervisor in the middle of a word.
func TestSupervisorDiesInALine(t *testing.T) {
	c := answerWith(t, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"+
		"1a\r\n{\"state\":\"ready\"}\n{\"state\"\r\n")
	var saw []instance.State
	err := c.Watch(t.Context(), func(s instance.Status) bool { saw = append(saw, s.State); return true })
	if err != nil || len(saw) != 1 {
		t.Errorf("saw %v, %v", saw, err)
	}
}

func TestWatchOfNonsense(t *testing.T) {
	c := answerWith(t, "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nnonsense\n")
	if err := c.Watch(t.Context(), func(instance.Status) bool { return true }); err == nil {
		t.Error("no error")
	}
}

func TestStop(t *testing.T) {
	refused := errors.New("it does not want to")
	var got []any
	f := &fake{stop: func(_ context.Context, grace time.Duration, reason string) error {
		if got = []any{grace, reason}; grace == 0 {
			return refused
		}
		return nil
	}}
	c, _ := serve(t, f)
	if err := c.Stop(t.Context(), 3*time.Second, "enough"); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]any{3 * time.Second, "enough"}, got); diff != "" {
		t.Error(diff)
	}
	if err := c.Stop(t.Context(), 0, ""); err == nil || err.Error() != refused.Error() {
		t.Errorf("got %v, want %v", err, refused)
	}
}

// TestStopOutlivesItsCaller goes away while the machine shuts down.
func TestStopOutlivesItsCaller(t *testing.T) {
	begun, goOn, result := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	f := &fake{stop: func(ctx context.Context, _ time.Duration, _ string) error {
		close(begun)
		<-goOn
		result <- ctx.Err()
		return nil
	}}
	for _, tt := range []struct {
		name  string
		leave error
	}{{"interrupted", context.Canceled}, {"out of time", context.DeadlineExceeded}} {
		t.Run(tt.name, func(t *testing.T) {
			begun, goOn = make(chan struct{}), make(chan struct{})
			c, _ := serve(t, f)
			ctx, cancel := context.WithCancel(t.Context())
			if tt.leave == context.DeadlineExceeded {
				ctx, cancel = context.WithTimeout(t.Context(), 500*time.Millisecond)
			}
			defer cancel()
			ended := make(chan error, 1)
			go func() { ended <- c.Stop(ctx, time.Minute, "enough") }()
			within(t, "the request", begun)
			if tt.leave == context.Canceled {
				cancel()
			}
			err := within(t, "the caller's end", ended)
			if !errors.Is(err, tt.leave) || errors.Is(err, vm.ErrTimeout) != (tt.leave == context.DeadlineExceeded) || errors.Is(err, ErrGone) {
				t.Errorf("the caller is told %v", err)
			}
			// The server sees the closed connection a moment later.
			time.Sleep(100 * time.Millisecond)
			close(goOn)
			if err := within(t, "the stop's end", result); err != nil {
				t.Errorf("the stop went with its caller: %v", err)
			}
		})
	}
}

func TestMalformedRequests(t *testing.T) {
	f := &fake{stop: func(context.Context, time.Duration, string) error {
		t.Error("the machine was stopped")
		return nil
	}}
	c, path := serve(t, f)
	for _, tt := range []struct {
		name, method, path, body string
		want                     int
	}{
		{"not JSON", "POST", "/v1/stop", "now!", http.StatusBadRequest},
		{"nothing", "POST", "/v1/stop", "", http.StatusBadRequest},
		{"wrong type", "POST", "/v1/stop", `{"grace": "soon"}`, http.StatusBadRequest},
		{"oversized", "POST", "/v1/stop", `{"reason": "` + strings.Repeat("x", 1<<17) + `"}`, http.StatusBadRequest},
		{"wrong method", "GET", "/v1/stop", "", http.StatusMethodNotAllowed},
		{"unknown", "GET", "/v2/status", "", http.StatusNotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), tt.method, "http://supervisor"+tt.path, strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := c.http.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != tt.want {
				t.Errorf("status %d, want %d", resp.StatusCode, tt.want)
			}
		})
	}
	t.Run("not HTTP", func(t *testing.T) {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, "hello?\n\n"); err != nil {
			t.Fatal(err)
		}
		if answer, err := bufio.NewReader(conn).ReadString('\n'); !strings.Contains(answer, "400") {
			t.Errorf("%q, %v", answer, err)
		}
	})
	if _, err := c.Status(t.Context()); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

func TestNobodyListens(t *testing.T) {
	left, path := listen(t) // as a killed supervisor leaves it
	left.(*net.UnixListener).SetUnlinkOnClose(false)
	left.Close()
	deaf, deafPath := listen(t)
	go func() {
		for {
			conn, err := deaf.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	for name, c := range map[string]*Client{
		"no socket":         NewClient(socketPath(t)),
		"a socket left":     NewClient(path),
		"one that hangs up": NewClient(deafPath),
	} {
		_, err := c.Status(t.Context())
		if !errors.Is(err, ErrGone) {
			t.Errorf("%s: status: %v", name, err)
		}
		if err := c.Watch(t.Context(), func(instance.Status) bool { return true }); !errors.Is(err, ErrGone) {
			t.Errorf("%s: watch: %v", name, err)
		}
		if err := c.Stop(t.Context(), 0, ""); !errors.Is(err, ErrGone) {
			t.Errorf("%s: stop: %v", name, err)
		}
	}
}

// TestSave: what keeps a machine from being saved reaches the one who asked, as it is.
func TestSave(t *testing.T) {
	client, _ := serve(t, &fake{})
	if err := client.Suspend(t.Context()); err == nil || err.Error() != "/workspace is in use by process 7 (vi)" {
		t.Errorf("suspend: %v", err)
	}
	if err := client.Adopt(t.Context(), "/instances/mine"); err != nil {
		t.Error(err)
	}
	if err := client.Snapshot(t.Context(), wantSnapshot); err != nil {
		t.Errorf("snapshot: %v", err)
	}
}
