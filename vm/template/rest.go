package template

import (
	_ "embed"

	"github.com/agentvm/agentvm/vm/line"
)

//go:embed rest.sh
var rest string

// Rest returns a program for the guest's end of the line that brings a freshly
// booted guest to the state that a template is saved in. user logs in to it.
func Rest(user, home string) string {
	keys := line.AuthorizedKeys(home)
	return line.Shell(rest, user, keys) + "\n" + line.MeetServer(keys)
}
