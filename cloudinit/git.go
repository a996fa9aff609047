package cloudinit

import (
	"fmt"
	"strings"
)

// Git is the identity that commits made in the guest carry.
type Git struct {
	Name  string
	Email string
	// SafeDirectories are worktrees that Git may use although another user
	// owns them, as root does when it looks at the agent's workspace.
	SafeDirectories []string
	// SharedWorktrees says that worktrees are shared with a host on which their
	// files belong to other ids. What the index remembers of those must then not
	// make Git read every file again, at each turn from one side to the other.
	SharedWorktrees bool
}

// file renders the identity as the guest's /etc/gitconfig, so that every
// user in the guest has it and the agent's own ~/.gitconfig stays free.
// Syntax: https://git-scm.com/docs/git-config#_syntax
func (g Git) file() ([]File, error) {
	for _, v := range append([]string{g.Name, g.Email}, g.SafeDirectories...) {
		if err := noControl(v); err != nil {
			return nil, fmt.Errorf("%w: git: %q: %w", ErrInvalid, v, err)
		}
	}
	var b strings.Builder
	if g.Name != "" || g.Email != "" {
		b.WriteString("[user]\n")
	}
	if g.Name != "" {
		fmt.Fprintf(&b, "\tname = %s\n", gitQuote(g.Name))
	}
	if g.Email != "" {
		fmt.Fprintf(&b, "\temail = %s\n", gitQuote(g.Email))
	}
	if len(g.SafeDirectories) > 0 {
		b.WriteString("[safe]\n")
	}
	for _, d := range g.SafeDirectories {
		fmt.Fprintf(&b, "\tdirectory = %s\n", gitQuote(d))
	}
	if g.SharedWorktrees {
		b.WriteString("[core]\n\tcheckStat = minimal\n\ttrustctime = false\n")
	}
	if b.Len() == 0 {
		return nil, nil
	}
	f := newFile("/etc/gitconfig", []byte(b.String()), 0o644)
	f.Owner = "root:root"
	return []File{f}, nil
}

func gitQuote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}
