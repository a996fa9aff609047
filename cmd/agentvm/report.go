package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/agentvm/agentvm/vm/instance"
	"github.com/agentvm/agentvm/vm/lifecycle"
)

// newReport shows long work: as one live line on a terminal, as plain lines in
// a pipe, as JSON events with --json. close must be called at the end.
func (a *app) newReport() (r lifecycle.Report, close func()) {
	switch _, tty := terminal(a.stderr); {
	case a.json:
		r := &jsonReport{out: json.NewEncoder(a.stderr)}
		return r, func() {}
	case tty:
		r := &liveReport{verbose: a.verbose, bars: mpb.New(mpb.WithOutput(a.stderr), mpb.WithWidth(30), mpb.WithRefreshRate(150*time.Millisecond))}
		return r, r.close
	}
	return &lineReport{out: a.stderr, verbose: a.verbose}, func() {}
}

// startPhases are the states and phases of a start, in a reader's words.
var startPhases = map[string]string{
	"network":    "network",
	"share":      "shares",
	"devices":    "devices of the host",
	"qemu":       "QEMU",
	"ssh":        "guest answers over SSH",
	"cloud-init": "cloud-init done",
	"provision":  "provision.run done",
	"boot":       "template booted",
	"rest":       "template at rest",
	"save":       "saved",
	"return":     "there again, paused",
	"unplug":     "shares taken out",
	"plug":       "devices of the host plugged in",
	"meet":       "guest has met its devices",
	"memory":     "memory loaded",
	"state":      "devices restored",
	"resume":     "running again",
	"login":      "guest is awake",
	"clone":      "guest is its own machine",
	"rehearsal":  "claim rehearsed",
}

// phaseLog tells each new phase of a Status once.
type phaseLog struct {
	shown int
	state instance.State
}

func (l *phaseLog) fresh(s instance.Status) []instance.Phase {
	if len(s.Phases) < l.shown {
		l.shown = 0
	}
	news := s.Phases[l.shown:]
	l.shown = len(s.Phases)
	return news
}

func phaseName(name string) string {
	if words, ok := startPhases[name]; ok {
		return words
	}
	return name
}

func describe(p instance.Phase) string {
	return fmt.Sprintf("%s (%s)", phaseName(p.Name), p.Took.Round(time.Millisecond*10))
}

// lineReport writes plain lines.
type lineReport struct {
	mu      sync.Mutex
	out     io.Writer
	verbose bool
	phases  phaseLog
}

func (r *lineReport) say(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(r.out, "agentvm: "+format+"\n", args...)
}

func (r *lineReport) Phase(name string)               { r.say("%s", name) }
func (r *lineReport) Fraction(float64)                {}
func (r *lineReport) Note(format string, args ...any) { r.say(format, args...) }
func (r *lineReport) Line(text string) {
	if r.verbose {
		r.say("  %s", text)
	}
}
func (r *lineReport) State(s instance.Status) {
	for _, p := range r.phases.fresh(s) {
		r.say("%s", describe(p))
	}
}

// liveReport keeps one line moving.
type liveReport struct {
	mu      sync.Mutex
	verbose bool
	bars    *mpb.Progress
	bar     *mpb.Bar
	text    string
	phases  phaseLog
}

// line replaces the live line. It starts a new bar only for a new text.
func (r *liveReport) line(text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.bar != nil {
		if r.text == text {
			return
		}
		r.bar.Abort(true)
	}
	r.text = text
	r.bar = r.bars.New(1000, mpb.SpinnerStyle(), mpb.BarRemoveOnComplete(),
		mpb.PrependDecorators(decor.Name("agentvm: "+text+" ")),
		mpb.AppendDecorators(decor.OnComplete(decor.Elapsed(decor.ET_STYLE_GO), ""), decor.Any(func(s decor.Statistics) string {
			if s.Current == 0 {
				return ""
			}
			return fmt.Sprintf(" %d%%", s.Current*100/s.Total)
		})))
}

func (r *liveReport) print(text string) {
	_, _ = io.WriteString(r.bars, text+"\n")
}

func (r *liveReport) Phase(name string) { r.line(name) }
func (r *liveReport) Fraction(f float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.bar != nil {
		r.bar.SetCurrent(min(int64(f*1000), 999))
	}
}
func (r *liveReport) Line(text string) {
	if r.verbose {
		r.print("  " + text)
	}
}
func (r *liveReport) Note(format string, args ...any) {
	r.print("agentvm: " + fmt.Sprintf(format, args...))
}
func (r *liveReport) State(s instance.Status) {
	for _, p := range r.phases.fresh(s) {
		r.print("agentvm: " + describe(p))
	}
	if s.State == instance.Starting || s.State == instance.Booting {
		r.line(strings.TrimSpace(string(s.State) + " " + s.Reason))
	}
}

func (r *liveReport) close() {
	r.mu.Lock()
	if r.bar != nil {
		r.bar.Abort(true)
	}
	r.mu.Unlock()
	r.bars.Wait()
}

// jsonReport writes one event a line.
type jsonReport struct {
	mu     sync.Mutex
	out    *json.Encoder
	phases phaseLog
}

func (r *jsonReport) event(kind string, v any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = r.out.Encode(map[string]any{"event": kind, "time": time.Now().UTC().Format(time.RFC3339Nano), kind: v})
}

func (r *jsonReport) Phase(name string)               { r.event("build", name) }
func (r *jsonReport) Line(text string)                { r.event("output", text) }
func (r *jsonReport) Fraction(f float64)              { r.event("fraction", f) }
func (r *jsonReport) Note(format string, args ...any) { r.event("note", fmt.Sprintf(format, args...)) }
func (r *jsonReport) State(s instance.Status) {
	for _, p := range r.phases.fresh(s) {
		r.event("phase", map[string]any{"name": p.Name, "seconds": p.Took.Seconds()})
	}
	if s.State != r.phases.state {
		r.phases.state = s.State
		r.event("state", map[string]any{"state": s.State, "reason": s.Reason})
	}
}
