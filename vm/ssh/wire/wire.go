// Package wire has what the client of a guest and the server of images of our
// own making say to each other beside SSH's own words.
package wire

import (
	"errors"
	"slices"
	"strings"

	gossh "golang.org/x/crypto/ssh"
)

// ProgramRequest is the channel request that runs a program in a session, as
// "exec" (RFC 4254 section 6.5) runs a line of the user's shell. Names with an
// at sign are everybody's to choose (RFC 4251 section 6). A server that
// refuses it has done nothing.
const ProgramRequest = "program@agentvm"

// Starts says whether a channel request starts a session's program.
func Starts(request string) bool {
	return slices.Contains([]string{"exec", "shell", "subsystem", ProgramRequest}, request)
}

// Program is what a ProgramRequest runs.
type Program struct {
	Argv []string
	Dir  string // where; relative to the home directory, which it is if empty
}

// programMsg is a Program: a NUL byte, which no argument can hold, ends each.
type programMsg struct{ Dir, Argv string }

// Marshal returns the payload of a ProgramRequest.
func (p Program) Marshal() []byte {
	return gossh.Marshal(&programMsg{Dir: p.Dir, Argv: strings.Join(append(slices.Clone(p.Argv), ""), "\x00")})
}

var errProgram = errors.New("not a program to run")

// ParseProgram reads the payload of a ProgramRequest. There is a name at least.
func ParseProgram(payload []byte) (Program, error) {
	var m programMsg
	if err := gossh.Unmarshal(payload, &m); err != nil {
		return Program{}, err
	}
	argv := strings.Split(m.Argv, "\x00")
	last := len(argv) - 1
	if last < 1 || argv[last] != "" || argv[0] == "" || strings.Contains(m.Dir, "\x00") {
		return Program{}, errProgram
	}
	return Program{Argv: argv[:last], Dir: m.Dir}, nil
}
