package libvirt

import (
	"context"
	"encoding/json"
	"fmt"

	golibvirt "github.com/digitalocean/go-libvirt"
	goqemu "github.com/digitalocean/go-qemu/qmp"

	"github.com/agentvm/agentvm/vm/qmp"
)

// Monitor is a domain's QMP monitor, which libvirt passes on. The verbs of
// package qmp work on it as they do on a QEMU process. It is
// goqemu.LibvirtRPCMonitor with deadlines, and one connection for all.
type Monitor struct {
	conn   *Conn
	domain golibvirt.Domain
}

var (
	_ goqemu.Monitor    = Monitor{}
	_ qmp.ContextRunner = Monitor{}
)

// Connect implements goqemu.Monitor; the connection is libvirt's.
func (Monitor) Connect() error { return nil }

// Disconnect implements goqemu.Monitor; the connection is libvirt's.
func (Monitor) Disconnect() error { return nil }

// Run implements goqemu.Monitor: RunContext bounded by DefaultTimeout.
func (m Monitor) Run(command []byte) ([]byte, error) {
	return m.RunContext(context.Background(), command)
}

// RunContext sends a command and returns QEMU's reply. QEMU's refusal is a *qmp.Error.
func (m Monitor) RunContext(ctx context.Context, command []byte) ([]byte, error) {
	var asked struct {
		Execute string `json:"execute"`
	}
	if err := json.Unmarshal(command, &asked); err != nil {
		return nil, fmt.Errorf("qmp command: %w", err)
	}
	reply, err := call(ctx, m.conn, "qmp "+asked.Execute, func(l *golibvirt.Libvirt) (string, error) {
		return l.QEMUDomainMonitorCommand(m.domain, string(command), 0)
	})
	if err != nil {
		return nil, err
	}
	var refusal struct {
		Error *struct{ Class, Desc string } `json:"error"`
	}
	if err := json.Unmarshal([]byte(reply), &refusal); err != nil {
		return nil, fmt.Errorf("qmp %s: decode the reply: %w", asked.Execute, err)
	}
	if e := refusal.Error; e != nil {
		return nil, &qmp.Error{Class: e.Class, Desc: e.Desc, Command: asked.Execute}
	}
	return []byte(reply), nil
}

// eventBacklog is how many events nobody has read yet are kept.
const eventBacklog = 256

// Events implements goqemu.Monitor. The channel is closed when ctx or the
// connection ends. Events without data, such as RESUME, do not arrive: go-libvirt
// cannot read them.
func (m Monitor) Events(ctx context.Context) (<-chan goqemu.Event, error) {
	// The subscription outlives this call: what bounds the call may not end it.
	in, err := call(ctx, m.conn, "watch the machine's events", func(l *golibvirt.Libvirt) (<-chan golibvirt.DomainEvent, error) {
		return l.SubscribeQEMUEvents(ctx, m.domain.Name)
	})
	if err != nil {
		return nil, err
	}
	out := make(chan goqemu.Event, eventBacklog)
	go func() {
		defer close(out)
		for e := range in { // to its end, or go-libvirt's side would wait for ever
			ev := goqemu.Event{Event: e.Event}
			ev.Timestamp.Seconds, ev.Timestamp.Microseconds = int64(e.Seconds), int64(e.Microseconds)
			if len(e.Details) > 0 && json.Unmarshal(e.Details, &ev.Data) != nil {
				continue
			}
			select {
			case out <- ev:
			default: // a reader that sleeps
			}
		}
	}()
	return out, nil
}
