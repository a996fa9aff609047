package cloudinit

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/agentvm/agentvm/vm/probes"
)

// Facts are what a guest takes over from its host.
type Facts struct {
	Timezone string   // tz database name; UTC when the host does not say
	Locale   string   // C.UTF-8 when the host does not say
	CAs      []string // PEM, one certificate each
	Git      Git
	Warnings []error // what could not be read; none of it is fatal
}

// Probe reads Facts. It changes nothing.
type Probe struct {
	Root   string // prefix of every path read; "/" for the real host
	Getenv func(string) string
	// Git begins to ask for the user's own Git configuration, and returns what
	// waits for the answer: values by key.
	Git   func(ctx context.Context) func() map[string]string
	Known probes.Store // of the host's CAs
}

// HostProbe looks at the machine and the user that this process belongs to.
func HostProbe(known probes.Store) Probe {
	return Probe{Root: "/", Getenv: os.Getenv, Git: globalGit, Known: known}
}

// Facts gathers everything.
func (p Probe) Facts(ctx context.Context) Facts {
	git := p.Git(ctx)
	cas, warnings := p.extraCAs(time.Now())
	return Facts{
		Timezone: p.timezone(),
		Locale:   p.locale(),
		CAs:      cas,
		Git:      identity(git()),
		Warnings: warnings,
	}
}

func (p Probe) path(name string) string { return filepath.Join(p.Root, name) }

// timezone follows TZ, then /etc/localtime, then Debian's /etc/timezone.
func (p Probe) timezone() string {
	var candidates []string
	if tz := strings.TrimPrefix(p.Getenv("TZ"), ":"); strings.Contains(tz, "/") {
		candidates = append(candidates, tz) // without a slash it may be a rule, such as CET-1CEST
	}
	if target, err := os.Readlink(p.path("/etc/localtime")); err == nil {
		_, zone, _ := strings.Cut(target, "/zoneinfo/")
		candidates = append(candidates, zone)
	}
	if data, err := os.ReadFile(p.path("/etc/timezone")); err == nil {
		candidates = append(candidates, strings.TrimSpace(string(data)))
	}
	for _, zone := range candidates {
		if timezoneRE().MatchString(zone) {
			return zone
		}
	}
	return "UTC"
}

// locale follows the environment as setlocale(3) does, then the system's
// files.
func (p Probe) locale() string {
	candidates := []string{p.Getenv("LC_ALL"), p.Getenv("LANG")}
	for _, file := range []string{"/etc/locale.conf", "/etc/default/locale"} {
		if data, err := os.ReadFile(p.path(file)); err == nil {
			candidates = append(candidates, assignment(string(data), "LANG"))
		}
	}
	for _, l := range candidates {
		if l == "C" || l == "POSIX" {
			break // plain ASCII serves no one today
		}
		if localeRE().MatchString(l) {
			return l
		}
	}
	return "C.UTF-8"
}

// assignment finds NAME=value among shell-like lines.
func assignment(lines, name string) string {
	for line := range strings.Lines(lines) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), name+"="); ok {
			return strings.Trim(value, `"'`)
		}
	}
	return ""
}

// identity drops a value that no seed could carry: a broken host setting
// must not keep a machine from starting.
func identity(values map[string]string) Git {
	for key, value := range values {
		if noControl(value) != nil {
			delete(values, key)
		}
	}
	return Git{Name: values["user.name"], Email: values["user.email"]}
}

// globalGit asks Git itself, which knows about includes and XDG paths. It
// asks from the root directory, away from any repository: a workspace's own
// configuration is the guest's to write.
func globalGit(ctx context.Context) func() map[string]string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	cmd := exec.CommandContext(ctx, "git", "config", "--global", "--includes", "--null", "--get-regexp", `^user\.(name|email)$`)
	cmd.Dir = "/"
	var out bytes.Buffer
	cmd.Stdout = &out
	err := cmd.Start()
	return func() map[string]string {
		defer cancel()
		if err != nil || cmd.Wait() != nil {
			return nil // no Git, no file, no such key
		}
		values := map[string]string{}
		for entry := range strings.SplitSeq(out.String(), "\x00") {
			key, value, _ := strings.Cut(entry, "\n")
			values[key] = strings.TrimSpace(value) // of two the last counts, as for Git
		}
		return values
	}
}
