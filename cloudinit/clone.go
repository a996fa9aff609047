package cloudinit

import (
	"cmp"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

// The parts of programs for the serial line that are always the same: what
// mounts shares, what names a machine, what makes a clone its own machine, and
// what does no more than name or mount.
var (
	//go:embed shares.py
	sharesProgram string
	//go:embed name.py
	nameProgram string
	//go:embed clone.py
	cloneProgram string
)

const claimProgram = `
name_it()
mount_shares()
tell_lost()
`

const resumeProgram = `
say("login")  # its sshd has been its own all along
mount_shares()
tell_lost()
`

// Template returns the part of cfg that a template may hold: what makes the
// environment and nothing that makes one machine of it.
func (cfg Config) Template() Config {
	cfg.InstanceName, cfg.Hostname = "template", ""
	cfg.AuthorizedKeys, cfg.HostKey = nil, nil
	cfg.Git, cfg.Mounts = Git{}, nil
	return cfg
}

// clone is what a clone's program is told.
type clone struct {
	MachineID          string       `json:"machine_id"`
	Hostname           string       `json:"hostname"`
	HostKey            string       `json:"host_key"`
	HostKeyPublic      string       `json:"host_key_public"`
	AuthorizedKeysFile string       `json:"authorized_keys_file"`
	AuthorizedKeys     string       `json:"authorized_keys"`
	GitConfig          string       `json:"gitconfig"`
	Home               string       `json:"home"` // shell words that make directories in the home directory
	Shares             []cloneShare `json:"shares"`
}

type cloneShare struct {
	Tag      string `json:"tag"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"readonly"`
}

// CloneProgram returns a program for the serial line (package line) of a guest
// that was booted from cfg.Template(). It makes the guest what a boot from cfg
// would have made it. machineID becomes its machine-id(5): 32 hexadecimal
// digits.
//
// The program says "login" when the guest's own sshd listens, which is before
// the shares are mounted, and after "warning: " what could not be had. The
// guest's next boot, from cfg's own seed, does the same work once more.
func CloneProgram(cfg Config, machineID string) (string, error) {
	c, err := named(cfg)
	if err != nil {
		return "", err
	}
	keys, err := hostKeys(cfg.HostKey)
	if err != nil {
		return "", err
	}
	if keys == nil {
		return "", fmt.Errorf("%w: a clone needs a host key of its own", ErrInvalid)
	}
	c.MachineID = machineID
	c.HostKey, c.HostKeyPublic = keys.ED25519Private, keys.ED25519Public
	c.AuthorizedKeysFile = path.Join(cfg.User.Home(), ".ssh/authorized_keys")
	c.AuthorizedKeys = strings.Join(append(slices.Clone(cfg.AuthorizedKeys), ""), "\n")
	return program(c, sharesProgram+"\n\n"+nameProgram+"\n\n"+cloneProgram)
}

// ClaimProgram returns a program for the serial line (package line) of a guest
// that CloneProgram has made a machine of its own, without a name and shares:
// it gives it those of cfg, and says what CloneProgram's says.
func ClaimProgram(cfg Config) (string, error) {
	c, err := named(cfg)
	if err != nil {
		return "", err
	}
	return program(c, sharesProgram+"\n\n"+nameProgram+claimProgram)
}

// named is what gives a clone its name and its shares.
func named(cfg Config) (clone, error) {
	if cfg.Partitioned || len(cfg.Files) > 0 || len(cfg.RunCmd) > 0 {
		return clone{}, errors.New("only a guest of this project's own making, without files and commands, can be cloned")
	}
	if _, err := NewSeed(cfg); err != nil { // the same values pass the same checks
		return clone{}, err
	}
	git, err := cfg.Git.file()
	if err != nil {
		return clone{}, err
	}
	c := clone{Hostname: cmp.Or(cfg.Hostname, cfg.InstanceName), Shares: []cloneShare{}}
	for _, f := range git {
		c.GitConfig = f.Content
	}
	for _, words := range cfg.prepareHome() {
		c.Home = shellWords(words[slices.Index(words, "sh"):])
	}
	for _, m := range cfg.Mounts {
		c.Shares = append(c.Shares, cloneShare(m))
	}
	return c, nil
}

// ResumeProgram returns a program for the serial line (package line) of a
// machine that goes on from what it was itself: it mounts the shares again, and
// says what CloneProgram's says.
func ResumeProgram(mounts []ShareMount) (string, error) {
	c := clone{Shares: []cloneShare{}}
	for _, m := range mounts {
		c.Shares = append(c.Shares, cloneShare(m))
	}
	return program(c, sharesProgram+resumeProgram)
}

// program gives a program what it is told.
func program(c clone, text string) (string, error) {
	data, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	// A JSON text of ASCII alone is a Python string literal when quoted once more.
	return "import json\nguest = json.loads(" + strconv.QuoteToASCII(string(data)) + ")\n" + text, nil
}

func shellWords(words Command) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
	}
	return strings.Join(quoted, " ")
}
