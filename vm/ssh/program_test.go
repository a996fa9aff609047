package ssh

import (
	"net"
	"slices"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/agentvm/agentvm/vm/ssh/wire"
	"github.com/agentvm/agentvm/vm/testenv"
)

// TestProgramIsAskedFor: a command with arguments is asked for as a program,
// and as a line of shell only of a server that does not know programs.
func TestProgramIsAskedFor(t *testing.T) {
	for name, tt := range map[string]struct {
		knows bool
		cmd   Command
		want  []string
	}{
		"a program":                    {true, Command{Argv: []string{"a", "b c"}, Dir: "/d"}, []string{wire.ProgramRequest}},
		"a server that knows no other": {false, Command{Argv: []string{"a", "b c"}, Dir: "/d"}, []string{wire.ProgramRequest, "exec cd -- /d && exec a 'b c'"}},
		"a line of shell":              {true, Command{Shell: "a | b"}, []string{"exec a | b"}},
		"a login shell":                {true, Command{}, []string{"shell"}},
	} {
		t.Run(name, func(t *testing.T) {
			hostKey, _ := testenv.NewKey(t)
			near, far, err := socketPair()
			if err != nil {
				t.Fatal(err)
			}
			asked := make(chan []string, 1)
			go func() {
				defer far.Close()
				asked <- answer(t, far, hostKey, tt.knows)
			}()
			c, err := handshake(timeout(t, time.Minute), near, Config{User: "agent", HostKey: hostKey.PublicKey(), KeepAlive: -1})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if status, err := c.Run(timeout(t, time.Minute), tt.cmd); err != nil || status.Code != 7 {
				t.Errorf("%+v, %v", status, err)
			}
			c.Close()
			if got := <-asked; !slices.Equal(got, tt.want) {
				t.Errorf("asked for %q, want %q", got, tt.want)
			}
		})
	}
}

// answer serves one connection, whose every program ends with 7, and returns
// what its sessions were asked for.
func answer(t *testing.T, conn net.Conn, hostKey gossh.Signer, knows bool) (asked []string) {
	config := &gossh.ServerConfig{NoClientAuth: true}
	config.AddHostKey(hostKey)
	_, opens, reqs, err := gossh.NewServerConn(conn, config)
	if err != nil {
		t.Error(err)
		return nil
	}
	go gossh.DiscardRequests(reqs)
	for open := range opens {
		ch, reqs, err := open.Accept()
		if err != nil {
			t.Error(err)
			continue
		}
		for r := range reqs {
			if !wire.Starts(r.Type) {
				r.Reply(false, nil)
				continue
			}
			what := r.Type
			switch r.Type {
			case "exec":
				var m execMsg
				if err := gossh.Unmarshal(r.Payload, &m); err != nil {
					t.Error(err)
				}
				what += " " + m.Command
			case wire.ProgramRequest:
				p, err := wire.ParseProgram(r.Payload)
				if err != nil || !slices.Equal(p.Argv, []string{"a", "b c"}) || p.Dir != "/d" {
					t.Errorf("%+v, %v", p, err)
				}
			}
			asked = append(asked, what)
			takes := knows || r.Type != wire.ProgramRequest
			r.Reply(takes, nil)
			if takes {
				ch.SendRequest("exit-status", false, gossh.Marshal(&struct{ Code uint32 }{7}))
				ch.Close()
			}
		}
	}
	return asked
}
