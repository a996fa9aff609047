package cloudinit

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/line"
)

// Template returns the part of cfg that a template may hold: what makes the
// environment and nothing that makes one machine of it.
func (cfg Config) Template() Config {
	cfg.InstanceName, cfg.Hostname = "template", ""
	cfg.AuthorizedKeys, cfg.HostKey = nil, nil
	cfg.Git, cfg.Mounts = Git{}, nil
	return cfg
}

// clone is what the guest's end of the line is told (package line, programs.py).
type clone struct {
	MachineID          string       `json:"machine_id,omitempty"`
	Hostname           string       `json:"hostname"`
	HostKeyPublic      string       `json:"host_key_public,omitempty"`
	AuthorizedKeysFile string       `json:"authorized_keys_file,omitempty"`
	GitConfig          string       `json:"gitconfig"`
	Home               string       `json:"home"` // shell words that make directories in the home directory
	Shares             []cloneShare `json:"shares"`
}

type cloneShare struct {
	Tag      string `json:"tag"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"readonly"`
}

// Clone is what makes a guest that was booted from cfg.Template() what a boot
// from cfg would have made it. machineID becomes its machine-id(5): 32
// hexadecimal digits.
//
// The guest says "login" when connections to its own sshd, which may still wait
// for its key, are answered in time, and after "warning: " what could not be had. Its next boot, from
// cfg's own seed, does the same work once more.
func Clone(cfg Config, machineID string) (line.Call, error) {
	c, err := named(cfg)
	if err != nil {
		return line.Call{}, err
	}
	keys, err := hostKeys(cfg.HostKey)
	if err != nil {
		return line.Call{}, err
	}
	if keys == nil {
		return line.Call{}, fmt.Errorf("%w: a clone needs a host key of its own", ErrInvalid)
	}
	if len(cfg.AuthorizedKeys) == 0 {
		return line.Call{}, fmt.Errorf("%w: a clone needs a key to log in with", ErrInvalid)
	}
	c.MachineID, c.HostKeyPublic = machineID, keys.ED25519Public
	c.AuthorizedKeysFile = line.AuthorizedKeys(cfg.User.Home())
	authorized := strings.Join(append(slices.Clone(cfg.AuthorizedKeys), ""), "\n")
	return call(line.Clone, c, authorized, keys.ED25519Private)
}

// Claim is what gives a guest that was cloned without a name and shares those
// of cfg. It says what it could not have as Clone does.
func Claim(cfg Config) (line.Call, error) {
	c, err := named(cfg)
	if err != nil {
		return line.Call{}, err
	}
	return call(line.Claim, c)
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
		c.Home = vm.ShellCommand(words[slices.Index(words, "sh"):]...)
	}
	for _, m := range cfg.Mounts {
		c.Shares = append(c.Shares, cloneShare(m))
	}
	return c, nil
}

// Resume is what gives a machine that goes on from what it was itself its shares
// again. It says what Clone does.
func Resume(mounts []ShareMount) (line.Call, error) {
	c := clone{Shares: []cloneShare{}}
	for _, m := range mounts {
		c.Shares = append(c.Shares, cloneShare(m))
	}
	return call(line.Resume, c)
}

func call(function string, c clone, texts ...string) (line.Call, error) {
	data, err := json.Marshal(c)
	return line.Call{Function: function, Texts: texts, Data: data}, err
}
