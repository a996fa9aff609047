package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm/qmp/qmptest"
	"github.com/digitalocean/go-qemu/qemu"
	goqemu "github.com/digitalocean/go-qemu/qmp"
)

func dial(t *testing.T, s *qmptest.Server) *Client {
	t.Helper()
	s.Start(t)
	c, err := Dial(t.Context(), s.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// go-qemu #226: a reply lay in the scanner's buffer and changed under its
// reader. Run with -race.
func TestReplyBelongsToItsCaller(t *testing.T) {
	c := dial(t, &qmptest.Server{Handle: func(s *qmptest.Conn, cmd qmptest.Command) {
		s.Event("RTC_CHANGE", `{"offset": 78}`)
		s.Return(cmd, cmd.Arguments)
	}})
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			want := strings.Repeat(fmt.Sprint(i), 100)
			var got string
			if err := Execute(t.Context(), c, "echo", want, &got); err != nil || got != want {
				t.Errorf("reply %d: got %.20q, error %v", i, got, err)
			}
		})
	}
	wg.Wait()
}

// go-qemu #159: a reply over 64 KiB ended the monitor.
func TestReplyOfAnySize(t *testing.T) {
	big := strings.Repeat("x", 3<<20)
	c := dial(t, &qmptest.Server{Handle: func(s *qmptest.Conn, cmd qmptest.Command) { s.Return(cmd, big) }})
	for range 2 {
		var got string
		if err := Execute(t.Context(), c, "query-qmp-schema", nil, &got); err != nil || got != big {
			t.Fatalf("got %d bytes, error %v", len(got), err)
		}
	}
}

func TestMessageTooLong(t *testing.T) {
	_, err := readMessage(bufio.NewReader(strings.NewReader(strings.Repeat("x", 10_000)+"\n")), 9_000)
	if !errors.Is(err, errMessageTooLong) {
		t.Fatalf("got %v", err)
	}
}

// go-qemu PR 210: an event during the negotiation was taken for its reply.
func TestEventInNegotiation(t *testing.T) {
	c := dial(t, &qmptest.Server{Negotiating: func(s *qmptest.Conn) {
		s.Event("NIC_RX_FILTER_CHANGED", `{}`)
	}})
	if _, err := Status(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if v := c.Version(); v.String() != "7.2.22" {
		t.Errorf("version %v", v)
	}
}

// go-qemu PR 206: no deadlines.
func TestDeadline(t *testing.T) {
	var late []qmptest.Command
	c := dial(t, &qmptest.Server{Handle: func(s *qmptest.Conn, cmd qmptest.Command) {
		if cmd.Execute == "hang" {
			late = append(late, cmd)
			return
		}
		for _, l := range late { // a late reply must not be the next one's
			s.Return(l, "late")
		}
		s.Return(cmd, "prompt")
	}})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := Execute(ctx, c, "hang", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	var got string
	if err := Execute(t.Context(), c, "query", nil, &got); err != nil || got != "prompt" {
		t.Fatalf("after a deadline: got %q, error %v", got, err)
	}
	if len(c.waiting) != 0 {
		t.Errorf("%d commands still waited for", len(c.waiting))
	}
}

func TestDialDeadline(t *testing.T) {
	s := (&qmptest.Server{Silent: true}).Start(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, s.Socket); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
}

// A QEMU that reads nothing fills the socket; writers must not hang either.
func TestDeadlineWhileWriting(t *testing.T) {
	block := make(chan struct{})
	defer close(block)
	c := dial(t, &qmptest.Server{Handle: func(*qmptest.Conn, qmptest.Command) { <-block }})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			err := Execute(ctx, c, "fill", strings.Repeat("x", 1<<20), nil)
			if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, ErrClosed) {
				t.Errorf("got %v", err)
			}
		})
	}
	wg.Wait()
}

// An unread event channel blocked every command.
func TestFloodOfUnreadEvents(t *testing.T) {
	const flood = 20_000
	c := dial(t, &qmptest.Server{Handle: func(s *qmptest.Conn, cmd qmptest.Command) {
		if cmd.Execute == "flood" {
			s.Event(EventGuestPanicked, `{"action": "poweroff"}`)
			for range flood {
				s.Event("ACPI_DEVICE_OST", `{"info": {}}`)
			}
		}
		s.Return(cmd, struct{}{})
	}})
	all, err := c.Subscribe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	named, err := c.Subscribe(t.Context(), LifecycleEvents...)
	if err != nil {
		t.Fatal(err)
	}
	if err := Execute(t.Context(), c, "flood", nil, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := Status(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if want := uint64(flood + 1 - eventBacklog); all.Lost() != want {
		t.Errorf("lost %d events, want %d", all.Lost(), want)
	}
	if ev := <-named.C; ev.Event != EventGuestPanicked || named.Lost() != 0 {
		t.Errorf("the named event was crowded out: %v", ev)
	}
}

func TestSubscriptionEnds(t *testing.T) {
	c := dial(t, &qmptest.Server{})
	ctx, cancel := context.WithCancel(t.Context())
	events, err := c.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if ev, open := <-events; open {
		t.Errorf("got %v after the end", ev)
	}
}

func TestDeathWakesEveryone(t *testing.T) {
	got := make(chan struct{}, 3)
	c := dial(t, &qmptest.Server{Handle: func(s *qmptest.Conn, _ qmptest.Command) {
		if got <- struct{}{}; len(got) == cap(got) {
			s.Event(EventShutdown, `{"guest": true, "reason": "guest-shutdown"}`)
			s.Hangup()
		}
	}})
	events, err := c.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range cap(got) {
		wg.Go(func() {
			if _, err := Status(t.Context(), c); !errors.Is(err, ErrClosed) {
				t.Errorf("got %v", err)
			}
		})
	}
	wg.Wait()
	<-c.Done()
	if !errors.Is(c.Err(), ErrClosed) || !strings.Contains(c.Err().Error(), "EOF") {
		t.Errorf("reason: %v", c.Err())
	}
	last, open := <-events
	if s, ok := ShutdownOf(last); !open || !ok || !s.Guest || s.Reason != "guest-shutdown" {
		t.Errorf("the last event is %v", last)
	}
	if _, open := <-events; open {
		t.Error("events go on after death")
	}
	if _, err := c.Events(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("subscribe after death: %v", err)
	}
	if err := Powerdown(t.Context(), c); !errors.Is(err, ErrClosed) {
		t.Errorf("command after death: %v", err)
	}
}

func TestGarbageEndsTheConnection(t *testing.T) {
	for _, line := range []string{"not json", `{"id": "1"}`, `{"error": {"class": "GenericError", "desc": "JSON parse error"}}`, `[]`, `{"event": 3}`} {
		t.Run(line, func(t *testing.T) {
			c := dial(t, &qmptest.Server{Handle: func(s *qmptest.Conn, _ qmptest.Command) { s.Write(line + "\n") }})
			if _, err := Status(t.Context(), c); !errors.Is(err, ErrClosed) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestTypedError(t *testing.T) {
	c := dial(t, &qmptest.Server{Handle: func(s *qmptest.Conn, cmd qmptest.Command) {
		s.Refuse(cmd, ClassDeviceNotFound, "Device 'fs0' not found")
	}})
	err := DeviceDel(t.Context(), c, "fs0")
	var e *Error
	if !errors.As(err, &e) || e.Command != "device_del" || !HasClass(err, ClassDeviceNotFound) {
		t.Errorf("got %v", err)
	}
}

func TestBadCommand(t *testing.T) {
	c := dial(t, &qmptest.Server{})
	for _, cmd := range []string{``, `[]`, `{}`, `{"execute": 3}`, `{"execute": "x"`} {
		if _, err := c.Run([]byte(cmd)); err == nil {
			t.Errorf("%q was sent", cmd)
		}
	}
	if err := c.Connect(); err != nil {
		t.Errorf("the connection suffered: %v", err)
	}
}

func TestDeviceDelWaits(t *testing.T) {
	c := dial(t, &qmptest.Server{Handle: func(s *qmptest.Conn, cmd qmptest.Command) {
		s.Return(cmd, struct{}{})
		s.Event(EventDeviceDeleted, `{"path": "/machine/other"}`)
		s.Event(EventDeviceDeleted, `{"device": "fs0", "path": "/machine/peripheral/fs0"}`)
	}})
	if err := DeviceDel(t.Context(), c, "fs0"); err != nil {
		t.Fatal(err)
	}
}

func TestHotplugArguments(t *testing.T) {
	got := make(chan string, 2)
	c := dial(t, &qmptest.Server{Handle: func(s *qmptest.Conn, cmd qmptest.Command) {
		got <- string(cmd.Arguments)
		s.Return(cmd, struct{}{})
	}})
	if err := ChardevAddSocket(t.Context(), c, "fs0", "/run/a,b"); err != nil {
		t.Fatal(err)
	}
	if want, is := `{"id":"fs0","backend":{"data":{"addr":{"data":{"path":"/run/a,b"},"type":"unix"},"server":false},"type":"socket"}}`, <-got; is != want {
		t.Errorf("chardev-add\n got %s\nwant %s", is, want)
	}
	if err := DeviceAdd(t.Context(), c, "vhost-user-fs-pci", "fs0", map[string]any{"queue-size": 1024, "bus": "rp0"}); err != nil {
		t.Fatal(err)
	}
	if want, is := `{"bus":"rp0","driver":"vhost-user-fs-pci","id":"fs0","queue-size":1024}`, <-got; is != want {
		t.Errorf("device_add\n got %s\nwant %s", is, want)
	}
}

// plain is a monitor without contexts, as libvirt's is.
type plain struct{ release chan struct{} }

func (plain) Connect() error    { return nil }
func (plain) Disconnect() error { return nil }
func (plain) Events(context.Context) (<-chan goqemu.Event, error) {
	return nil, goqemu.ErrEventsNotSupported
}
func (p plain) Run([]byte) ([]byte, error) { <-p.release; return []byte(`{"return": {}}`), nil }

func TestDeadlineOnAnyMonitor(t *testing.T) {
	m := plain{make(chan struct{})}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := Powerdown(ctx, m); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	close(m.release)
	if err := Powerdown(t.Context(), m); err != nil {
		t.Error(err)
	}
	if _, err := WaitEvent(t.Context(), m, EventShutdown); !errors.Is(err, goqemu.ErrEventsNotSupported) {
		t.Errorf("got %v", err)
	}
}

// go-qemu's own Domain works over a Client.
func TestGoQEMUDomain(t *testing.T) {
	c := dial(t, &qmptest.Server{Handle: func(s *qmptest.Conn, cmd qmptest.Command) {
		switch cmd.Execute {
		case "query-status":
			s.Return(cmd, map[string]any{"running": true, "status": "running", "singlestep": false})
		default:
			s.Refuse(cmd, ClassCommandNotFound, "no such command")
		}
	}})
	d, err := qemu.NewDomain(c, "vm")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if s, err := d.Status(); err != nil || s != qemu.StatusRunning {
		t.Errorf("status %v, %v", s, err)
	}
	if _, err := d.PCIDevices(); !HasClass(err, ClassCommandNotFound) {
		t.Errorf("got %v", err)
	}
}

func FuzzReadMessage(f *testing.F) {
	f.Add([]byte(qmptest.Greeting + "\r\n"))
	f.Add([]byte(`{"return": {"a": [1]}, "id": "7"}` + "\n"))
	f.Add([]byte(`{"event": "STOP", "data": {"x": null}, "timestamp": {"seconds": 1}}` + "\n"))
	f.Add([]byte("\n\n{\"error\": {}}\n"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		r := bufio.NewReaderSize(strings.NewReader(string(stream)), 16)
		for {
			m, err := readMessage(r, 1<<16)
			if err != nil {
				return
			}
			if !json.Valid(m.line) {
				t.Fatalf("took %q for a message", m.line)
			}
			if m.Event != "" {
				_, _ = decodeEvent(m)
			}
		}
	})
}

func FuzzEncodeCommand(f *testing.F) {
	f.Add([]byte(`{"execute": "stop", "id": {"x": 1}, "arguments": {"a": "\n"}}`))
	f.Fuzz(func(t *testing.T, command []byte) {
		line, _, err := encodeCommand(command, "1")
		if err == nil && (strings.Count(string(line), "\n") != 1 || !json.Valid(line)) {
			t.Fatalf("%q became %q", command, line)
		}
	})
}
