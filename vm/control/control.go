// Package control is the conversation between the command line and the
// supervisor of one virtual machine: HTTP and JSON over a unix socket that
// only the instance's owner can reach. Commands inside the guest do not come
// this way; they go through the SSH proxy beside it.
package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
)

// Socket names in an instance's run directory.
const (
	Socket    = "control.sock"
	SSHSocket = "ssh.sock"
)

// maxStatus bounds one line of a watch. A guest has a say in the length of
// reasons and console lines, which its supervisor cuts far shorter.
const maxStatus = 1 << 20

// ErrGone is returned when nobody answers on the socket.
var ErrGone = errors.New("the supervisor does not answer")

// Handler is what a supervisor offers.
type Handler interface {
	// Status returns the present status.
	Status() instance.Status
	// Watch sends every change from now on until ctx ends or the supervisor does.
	Watch(ctx context.Context) <-chan instance.Status
	// Stop ends the machine, in good order within the grace time, else by
	// force, and returns when it is down.
	Stop(ctx context.Context, grace time.Duration, reason string) error
	// Suspend saves the machine where its next start goes on from, and returns
	// when it is down. After an error it runs as before, unless its status says
	// otherwise. The end of ctx calls it off.
	Suspend(ctx context.Context) error
	// Snapshot saves what it is asked to of the machine, and lets it go on.
	Snapshot(ctx context.Context, req SnapshotRequest) error
	// Adopt makes a machine of the pool the instance in dir, whose spec has the
	// machine's id, and returns when everything of it lies there. Its status
	// then tells how it gets ready.
	Adopt(ctx context.Context, dir string) error
	// Attend notes that a command of another host is connected, under an id, and
	// returns when the machine runs. One that nobody attends any more, since a
	// connection was lost, pauses.
	Attend(ctx context.Context, id string) error
	// Leave notes that one who attends does no longer; lost: it was cut off.
	Leave(id string, lost bool)
}

// Serve answers on l until l is closed.
func Serve(l net.Listener, h Handler) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, h.Status())
	})
	mux.HandleFunc("GET /v1/watch", func(w http.ResponseWriter, r *http.Request) {
		changes := h.Watch(r.Context())
		for s := range changes {
			writeJSON(w, s)
			if f, ok := w.(http.Flusher); ok {
				f.Flush()
			}
		}
	})
	mux.HandleFunc("POST /v1/stop", func(w http.ResponseWriter, r *http.Request) {
		var req stopRequest
		if err := readJSON(r, &req); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		// The machine goes down even when the one who asked goes away.
		if err := h.Stop(context.WithoutCancel(r.Context()), req.Grace, req.Reason); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		writeJSON(w, h.Status())
	})
	save := func(act func(r *http.Request) error) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if err := act(r); err != nil {
				http.Error(w, err.Error(), http.StatusConflict)
				return
			}
			writeJSON(w, h.Status())
		}
	}
	mux.HandleFunc("POST /v1/suspend", save(func(r *http.Request) error { return h.Suspend(r.Context()) }))
	mux.HandleFunc("POST /v1/snapshot", save(func(r *http.Request) error {
		var req SnapshotRequest
		if err := readJSON(r, &req); err != nil {
			return err
		}
		return h.Snapshot(r.Context(), req)
	}))
	mux.HandleFunc("POST /v1/adopt", save(func(r *http.Request) error {
		var req adoptRequest
		if err := readJSON(r, &req); err != nil {
			return err
		}
		return h.Adopt(r.Context(), req.Dir)
	}))
	serveAttendance(mux, h)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	if err := srv.Serve(l); !errors.Is(err, net.ErrClosed) && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve control socket: %w", err)
	}
	return nil
}

type stopRequest struct {
	Grace  time.Duration `json:"grace"`
	Reason string        `json:"reason"`
}

// SnapshotRequest says what of a machine is saved beside its disk.
type SnapshotRequest struct {
	Dir    string `json:"dir"`    // where to
	Memory bool   `json:"memory"` // the guest has to let go of its shares for that
	// Workspace copies the workspace too, into WorkspaceDir of Dir; Like is an
	// earlier copy, or empty.
	Workspace bool   `json:"workspace"`
	Like      string `json:"like"`
}

type adoptRequest struct {
	Dir string `json:"dir"`
}

func readJSON(r *http.Request, v any) error {
	return json.NewDecoder(io.LimitReader(r.Body, 1<<16)).Decode(v)
}

func writeJSON(w io.Writer, v any) { _ = json.NewEncoder(w).Encode(v) }

// Client talks to a supervisor.
type Client struct{ http http.Client }

// NewClient talks over the socket at path. It connects with the first call.
func NewClient(path string) *Client {
	return &Client{http: http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
	}}}
}

// Status asks for the present status.
func (c *Client) Status(ctx context.Context) (instance.Status, error) {
	var s instance.Status
	body, err := c.call(ctx, http.MethodGet, "/v1/status", nil)
	if err != nil {
		return s, err
	}
	defer body.Close()
	return s, json.NewDecoder(body).Decode(&s)
}

// Watch calls each with the present status and then with every change, until
// it returns false or the supervisor ends (nil), or ctx does.
func (c *Client) Watch(ctx context.Context, each func(instance.Status) bool) error {
	body, err := c.call(ctx, http.MethodGet, "/v1/watch", nil)
	if err != nil {
		return err
	}
	defer body.Close()
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, maxStatus)
	for lines.Scan() {
		var s instance.Status
		if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
			if lines.Err() != nil {
				break // killed in the middle of a line
			}
			return fmt.Errorf("watch the supervisor: %w", err)
		}
		if !each(s) {
			return nil
		}
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(lines.Err(), bufio.ErrTooLong):
		return fmt.Errorf("watch the supervisor: %w", lines.Err())
	}
	return nil // the supervisor ended; its last word is on disk
}

// Stop asks the supervisor to end the machine and waits until it has.
func (c *Client) Stop(ctx context.Context, grace time.Duration, reason string) error {
	return c.post(ctx, "/v1/stop", stopRequest{Grace: grace, Reason: reason})
}

// Suspend asks the supervisor to save the machine and end, and waits for it.
func (c *Client) Suspend(ctx context.Context) error {
	return c.post(ctx, "/v1/suspend", nil)
}

// Snapshot asks the supervisor to save the machine, and waits until it runs
// again.
func (c *Client) Snapshot(ctx context.Context, req SnapshotRequest) error {
	return c.post(ctx, "/v1/snapshot", req)
}

// Adopt asks the supervisor of a machine of the pool to make it the instance
// in dir, and waits until it is.
func (c *Client) Adopt(ctx context.Context, dir string) error {
	return c.post(ctx, "/v1/adopt", adoptRequest{dir})
}

func (c *Client) post(ctx context.Context, path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	body, err := c.call(ctx, http.MethodPost, path, data)
	if err != nil {
		return err
	}
	return body.Close()
}

func (c *Client) call(ctx context.Context, method, path string, data []byte) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://supervisor"+path, bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("ask the supervisor: %w", ctx.Err())
			if errors.Is(err, context.DeadlineExceeded) {
				err = vm.Classify(vm.ErrTimeout, err)
			}
			return nil, err
		}
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return nil, fmt.Errorf("%w: %w", ErrGone, err)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		msg, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
		return nil, errors.New(string(bytes.TrimSpace(msg)))
	}
	return resp.Body, nil
}
