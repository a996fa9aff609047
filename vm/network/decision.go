package network

import (
	"fmt"
	"net/netip"
	"sync"
	"time"
)

// Verdicts of a Decision.
const (
	VerdictAllow = "allow"
	VerdictDeny  = "deny"  // also of a flow whose first bytes contradict its name
	VerdictClose = "close" // an allowed flow has ended; Sent and Received are final
)

// A Decision is one line of the network log. A flow that the host dials has
// two, the first written before it does; everything else has one.
type Decision struct {
	Time     time.Time     `json:"time"`
	Flow     uint64        `json:"flow,omitempty"` // ties a flow's two lines together
	Protocol string        `json:"protocol"`       // tcp, udp, icmp, dns, ethernet
	Verdict  string        `json:"verdict"`        // allow, deny, close
	Name     string        `json:"name,omitempty"`
	Addr     string        `json:"addr,omitempty"` // real address dialled, or the one the guest asked for
	Port     uint16        `json:"port,omitempty"`
	Rule     string        `json:"rule,omitempty"`     // the rule that allowed it
	Reason   string        `json:"reason,omitempty"`   // why it was denied or how it ended
	Sent     int64         `json:"sent,omitempty"`     // bytes from the guest
	Received int64         `json:"received,omitempty"` // bytes to the guest
	Duration time.Duration `json:"duration_ns,omitempty"`
	Repeated int           `json:"repeated,omitempty"` // equal or surplus denials left out before this line
}

// Denials are what a guest can produce without end, so equal ones are logged
// once a minute and all of them at most so many a minute.
const (
	denialWindow        = time.Minute
	maxDenialsPerWindow = 300
)

// recorder hands decisions to the log one at a time.
type recorder struct {
	log func(Decision)
	now func() time.Time

	mu       sync.Mutex
	start    time.Time      // of the current window
	seen     map[string]int // denials of this window
	leftOut  int
	lastFlow uint64
}

func newRecorder(log func(Decision)) *recorder {
	if log == nil {
		log = func(Decision) {}
	}
	return &recorder{log: log, now: time.Now, seen: make(map[string]int)}
}

// nextFlow returns a number for a flow.
func (r *recorder) nextFlow() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lastFlow++
	return r.lastFlow
}

func (r *recorder) record(d Decision) {
	r.mu.Lock()
	defer r.mu.Unlock()
	d.Time = r.now()
	if d.Verdict == VerdictDeny && d.Flow == 0 && !r.admit(&d) {
		return
	}
	r.log(d)
}

func (r *recorder) admit(d *Decision) bool {
	if d.Time.Sub(r.start) >= denialWindow {
		r.start = d.Time
		clear(r.seen)
	}
	key := fmt.Sprint(d.Protocol, " ", d.Name, " ", d.Addr, " ", d.Port, " ", d.Reason)
	if r.seen[key] > 0 || len(r.seen) >= maxDenialsPerWindow {
		r.leftOut++
		return false
	}
	r.seen[key]++
	d.Repeated, r.leftOut = r.leftOut, 0
	return true
}

func addrString(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}
