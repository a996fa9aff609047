package cloudinit

import (
	"errors"
	"strings"
	"testing"
)

func TestNewSeedRefuses(t *testing.T) {
	tests := []struct {
		name   string
		change func(*Config)
		want   string // part of the error
	}{
		{"no name", func(c *Config) { c.InstanceName = "" }, "instance name"},
		{"underscore", func(c *Config) { c.InstanceName = "a_b" }, "hyphens"},
		{"leading hyphen", func(c *Config) { c.InstanceName = "-a" }, "hyphens"},
		{"newline in name", func(c *Config) { c.InstanceName = "a\nb" }, "hyphens"},
		{"long name", func(c *Config) { c.InstanceName = strings.Repeat("a", 64) }, "more than 63"},
		{"bad hostname", func(c *Config) { c.Hostname = "a..b" }, "hyphens"},
		{"user with a colon", func(c *Config) { c.User.Name = "a:b" }, "user name"},
		{"no user", func(c *Config) { c.User.Name = "" }, "user name"},
		{"root's uid", func(c *Config) { c.User.UID = 0 }, "uid 0"},
		{"broken authorized key", func(c *Config) { c.AuthorizedKeys = []string{"ssh-rsa nonsense"} }, "authorized key"},
		{"two keys in one", func(c *Config) { c.AuthorizedKeys[0] += "\nssh-rsa AAAA" }, "control character"},
		{"broken host key", func(c *Config) { c.HostKey = []byte("nonsense") }, "host key"},
		{"timezone path", func(c *Config) { c.Timezone = "../etc/passwd" }, "timezone"},
		{"locale", func(c *Config) { c.Locale, c.Locales = "de DE", []string{"de DE"} }, "locale"},
		{"CA", func(c *Config) { c.CAs = []string{"nonsense"} }, "CA certificate 1"},
		{"private key as CA", func(c *Config) { c.CAs = []string{string(c.HostKey)} }, "CA certificate 1"},
		{"git name", func(c *Config) { c.Git.Name = "a\n[core]" }, "control character"},
		{"relative mount", func(c *Config) { c.Mounts[0].Target = "workspace" }, "absolute"},
		{"root mount", func(c *Config) { c.Mounts[0].Target = "/" }, "below the root"},
		{"dotted mount", func(c *Config) { c.Mounts[0].Target = "/a/../b" }, "plain path"},
		{"mount with a space", func(c *Config) { c.Mounts[0].Target = "/a b" }, "space"},
		{"mount twice", func(c *Config) { c.Mounts[1].Target = c.Mounts[0].Target }, "used twice"},
		{"tag as device", func(c *Config) { c.Mounts[0].Tag = "vda1" }, "device name"},
		{"tag as network", func(c *Config) { c.Mounts[0].Tag = "a:b" }, "mount tag"},
		{"long tag", func(c *Config) { c.Mounts[0].Tag = strings.Repeat("a", 37) }, "mount tag"},
		{"relative file", func(c *Config) { c.Files[0].Path = "motd" }, "absolute"},
		{"newline in file", func(c *Config) { c.Files[0].Path = "/a\nb" }, "control character"},
		{"owner", func(c *Config) { c.Files[0].Owner = "a b" }, "owner"},
		{"mode", func(c *Config) { c.Files[0].Mode = 0o100644 }, "octal"},
		{"huge file", func(c *Config) { c.Files[0].Content = make([]byte, maxFiles) }, "bytes, more than"},
		{"zero byte in command", func(c *Config) { c.RunCmd = []string{"a\x00"} }, "zero byte"},
		{"MAC", func(c *Config) { c.Network.MAC = "5a:94" }, "six bytes"},
		{"address", func(c *Config) { c.Network.Address = "192.168.127.2" }, "address"},
		{"gateway", func(c *Config) { c.Network.Gateway = "gw" }, "address"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := fullConfig(t)
			tt.change(&cfg)
			seed, err := NewSeed(cfg)
			if err == nil {
				_, err = seed.Render()
			}
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want ErrInvalid with %q", err, tt.want)
			}
		})
	}
}

func TestAllProblemsAtOnce(t *testing.T) {
	cfg := fullConfig(t)
	cfg.Timezone, cfg.Locale, cfg.Partitioned = "a b", "c d", true
	_, err := NewSeed(cfg)
	if err == nil || !strings.Contains(err.Error(), "timezone") || !strings.Contains(err.Error(), "locale") {
		t.Errorf("error is %v", err)
	}
}
