package control

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"time"
)

// attendTimeout bounds the wait for a paused machine to go on.
const attendTimeout = 30 * time.Second

// serveAttendance lets commands attend a machine for as long as a request
// lasts. One that ends without a word was lost, whatever ended it.
func serveAttendance(mux *http.ServeMux, h Handler) {
	mux.HandleFunc("GET /v1/attend/{id}", func(w http.ResponseWriter, r *http.Request) {
		id := r.PathValue("id")
		defer h.Leave(id, true) // it may have left before
		if err := h.Attend(r.Context(), id); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
			return
		}
		w.WriteHeader(http.StatusOK)
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
		<-r.Context().Done()
	})
	mux.HandleFunc("DELETE /v1/attend/{id}", func(_ http.ResponseWriter, r *http.Request) {
		h.Leave(r.PathValue("id"), false)
	})
}

// Attendance is a command's presence with a supervisor. It ends with Leave, or,
// as one that was lost, with this process.
type Attendance struct {
	// Done is closed when the supervisor has ended.
	Done <-chan struct{}

	client *Client
	path   string
	cancel context.CancelFunc
}

// Attend tells the supervisor that a command is connected, and waits until the
// machine runs, if it was paused. The end of ctx is that of a lost connection.
func (c *Client) Attend(ctx context.Context) (*Attendance, error) {
	ctx, cancel := context.WithCancel(ctx)
	a := &Attendance{client: c, path: "/v1/attend/" + rand.Text(), cancel: cancel}
	late := time.AfterFunc(attendTimeout, cancel)
	body, err := c.call(ctx, http.MethodGet, a.path, nil)
	if !late.Stop() && err == nil {
		body.Close()
		err = fmt.Errorf("ask the supervisor: %w", context.Cause(ctx))
	}
	if err != nil {
		cancel()
		return nil, err
	}
	done := make(chan struct{})
	a.Done = done
	go func() {
		_, _ = io.Copy(io.Discard, body) // nothing comes but its end
		body.Close()
		close(done)
	}()
	return a, nil
}

// Leave ends it in good order.
func (a *Attendance) Leave(ctx context.Context) error {
	defer a.cancel()
	body, err := a.client.call(ctx, http.MethodDelete, a.path, nil)
	if err != nil {
		return err
	}
	return body.Close()
}

// Wake lets a paused machine go on.
func (c *Client) Wake(ctx context.Context) error {
	a, err := c.Attend(ctx)
	if err != nil {
		return err
	}
	return a.Leave(ctx)
}
