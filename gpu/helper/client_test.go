package helper

import (
	"context"
	"encoding/xml"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/gpu"
	"github.com/agentvm/agentvm/vm"
)

// TestClient asks sudo first, then pkexec, and says what root has to do when
// neither will.
func TestClient(t *testing.T) {
	const yes = `{"outcomes":[{"address":"0000:01:00.0","action":"restored","detail":"d"}]}`
	notAllowed := errors.New("exit status 1")
	type reply struct {
		out, said string
		err       error
	}
	for _, tt := range []struct {
		name         string
		sudo, pkexec reply
		asked, says  string
		hint         string
		class        error
	}{
		{"sudo does it", reply{out: yes}, reply{}, "sudo", "", "", nil},
		{"sudo wants a password", reply{said: "sudo: a password is required\n", err: notAllowed}, reply{out: yes}, "sudo pkexec", "", "", nil},
		{"no sudo", reply{err: exec.ErrNotFound}, reply{out: yes}, "sudo pkexec", "", "", nil},
		{"neither", reply{said: "sudo: a password is required\n", err: notAllowed}, reply{said: "a warning\nNot authorized\n", err: notAllowed}, "sudo pkexec",
			"sudo: a password is required; pkexec: Not authorized", "ALL=(root) NOPASSWD: /usr/local/bin/agentvm gpu-helper' >/etc/sudoers.d/agentvm-gpu", vm.ErrHost},
		{"no sudo, and not let by polkit", reply{err: exec.ErrNotFound}, reply{said: "Not authorized\n", err: notAllowed}, "sudo pkexec", "(pkexec: Not authorized)", "let root run once what this prints: agentvm gpu helper-setup", vm.ErrHost},
		{"nothing there", reply{err: exec.ErrNotFound}, reply{err: exec.ErrNotFound}, "sudo pkexec", "neither sudo nor pkexec is there", "gpu helper-setup", vm.ErrHost},
		{"the helper refuses", reply{out: `{"error":"you may not take it","hint":"ask","class":"policy"}`}, reply{}, "sudo", "you may not take it", "ask", vm.ErrPolicy},
		{"the helper cannot run", reply{said: complaint + "root does not run a program that others can replace\n", err: notAllowed}, reply{}, "sudo", "that others can replace", "", vm.ErrHost},
		{"rubbish", reply{out: "hello"}, reply{}, "sudo", "read the helper's answer", "", nil},
	} {
		var asked []string
		c := &client{exe: "/usr/local/bin/agentvm", run: func(_ context.Context, argv []string, in []byte) ([]byte, string, error) {
			asked = append(asked, argv[0])
			if req, err := decode(strings.NewReader(string(in))); err != nil || req.Do != release || argv[len(argv)-1] != Arg || argv[len(argv)-2] != "/usr/local/bin/agentvm" {
				t.Errorf("%q %s %v", argv, in, err)
			}
			r := tt.sudo
			if argv[0] == "pkexec" {
				r = tt.pkexec
			}
			return []byte(r.out), r.said, r.err
		}}
		outcomes, err := c.Release(t.Context(), "0000:01:00.0")
		if strings.Join(asked, " ") != tt.asked || (tt.says == "") != (err == nil) || tt.class != nil && !errors.Is(err, tt.class) ||
			err != nil && (!strings.Contains(err.Error(), tt.says) || !strings.Contains(vm.Hint(err), tt.hint)) || err == nil && len(outcomes) != 1 {
			t.Errorf("%s: %q %v %v %q", tt.name, asked, outcomes, err, vm.Hint(err))
		}
	}
	// What is asked for comes to the other side.
	want := gpu.Request{Devices: []string{"0000:01:00.0"}, Owner: gpu.Owner{Name: "web", Process: vm.ProcID{PID: 7, Start: 8}}, User: vm.Owner{UID: 1000}, Plain: true}
	c := &client{run: func(_ context.Context, _ []string, in []byte) ([]byte, string, error) {
		req, err := decode(strings.NewReader(string(in)))
		if diff := cmp.Diff(want, req.of(want.Owner, caller{UID: 1000})); diff != "" || err != nil || req.Name != "web" || req.Process != want.Owner.Process {
			t.Errorf("%+v %v %s", req, err, diff)
		}
		return []byte("{}"), "", nil
	}}
	if _, err := c.Bind(t.Context(), want); err != nil {
		t.Error(err)
	}
	if _, err := c.Bind(t.Context(), gpu.Request{Force: true, Devices: []string{"0000:01:00.0"}}); !errors.Is(err, vm.ErrPolicy) {
		t.Error(err)
	}
}

func TestRunWith(t *testing.T) {
	out, said, err := runWith(t.Context(), []string{"sh", "-c", "cat; head -c 100000 /dev/zero >&2; exit 3"}, []byte("x"))
	if string(out) != "x" || len(said) != 4<<10 || err == nil {
		t.Errorf("%q %d %v", out, len(said), err)
	}
}

func TestSetup(t *testing.T) {
	script, err := Setup("/usr/local/bin/agentvm", "alice", []string{"0000:01:00.0"})
	if err != nil {
		t.Fatal(err)
	}
	check := exec.Command("sh", "-n")
	check.Stdin = strings.NewReader(script)
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	_, list, _ := strings.Cut(script, "gpu.yaml <<'END'\n")
	list, _, _ = strings.Cut(list, "END\n")
	l, err := parseAllowList([]byte(list))
	if err != nil || len(l.of(caller{UID: 1, Name: "alice"})) != 1 {
		t.Error(l, err)
	}
	_, policy, _ := strings.Cut(script, ".policy <<'END'\n")
	policy, _, _ = strings.Cut(policy, "END\n")
	var p struct {
		Action struct {
			Annotate []struct {
				Key   string `xml:"key,attr"`
				Value string `xml:",chardata"`
			} `xml:"annotate"`
		} `xml:"action"`
	}
	if err := xml.Unmarshal([]byte(policy), &p); err != nil || len(p.Action.Annotate) != 2 || p.Action.Annotate[0].Value != "/usr/local/bin/agentvm" || p.Action.Annotate[1].Value != Arg {
		t.Errorf("%+v %v", p, err)
	}
	for _, bad := range [][2]string{{"/tmp/a b", "alice"}, {"agentvm", "alice"}, {"/usr/bin/a,b", "alice"}, {"/usr/bin/agentvm", "ALL ALL"}, {"/usr/bin/agentvm", "a\nb"}, {"/usr/bin/agentvm", "#0"}} {
		if s, err := Setup(bad[0], bad[1], nil); err == nil {
			t.Error(bad, s)
		}
	}
}
