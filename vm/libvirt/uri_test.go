package libvirt

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentvm/agentvm/vm"
)

func TestParseURI(t *testing.T) {
	for text, want := range map[string]URI{
		"qemu:///system":                 {},
		"qemu:///session":                {Session: true},
		"qemu+unix:///system":            {},
		"qemu:///system?socket=/a%20b/s": {Socket: "/a b/s"},
		"qemu+unix:///session?socket=/s": {Session: true, Socket: "/s"},
	} {
		want.Text = text
		got, err := ParseURI(text)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for text, says := range map[string]string{
		"":                              "QEMU machines only",
		"xen:///system":                 "QEMU machines only",
		"lxc:///":                       "QEMU machines only",
		"qemu+ssh://ada@host/system":    "other hosts are not supported",
		"qemu+tls://host/system":        "other hosts are not supported",
		"qemu://host/system":            "other hosts are not supported",
		"qemu+tcp:///system":            "other hosts are not supported",
		"qemu:///embed?root=/tmp":       "no such QEMU libvirt",
		"qemu:///":                      "no such QEMU libvirt",
		"qemu:///system?socket=run":     "not an absolute path",
		"qemu:///system?socket=":        "not an absolute path",
		"qemu:///system?no_verify=1":    "unknown parameter",
		"qemu:///system#x":              "neither user nor fragment",
		"qemu:///%zz":                   "invalid URL escape",
		"qemu+ssh://host/system?x=\x00": "invalid control character",
	} {
		_, err := ParseURI(text)
		if err == nil || !strings.Contains(err.Error(), says) || !errors.Is(err, vm.ErrUsage) || vm.Hint(err) == "" {
			t.Errorf("%s: %v, want %q with a hint", text, err, says)
		}
	}
}

func TestSockets(t *testing.T) {
	env := func(vars map[string]string) func(string) string {
		return func(name string) string { return vars[name] }
	}
	for _, tt := range []struct {
		uri  string
		env  map[string]string
		want []string
	}{
		{SystemURI, nil, []string{"/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"}},
		{SessionURI, map[string]string{"XDG_RUNTIME_DIR": "/run/user/7"}, []string{"/run/user/7/libvirt/virtqemud-sock", "/run/user/7/libvirt/libvirt-sock"}},
		{SessionURI, map[string]string{"HOME": "/h"}, []string{"/h/.cache/libvirt/virtqemud-sock", "/h/.cache/libvirt/libvirt-sock"}},
		{SessionURI, map[string]string{"HOME": "/h", "XDG_CACHE_HOME": "/c"}, []string{"/c/libvirt/virtqemud-sock", "/c/libvirt/libvirt-sock"}},
		{SystemURI + "?socket=/s", nil, []string{"/s"}},
	} {
		u, err := ParseURI(tt.uri)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tt.want, u.sockets(env(tt.env))); diff != "" {
			t.Errorf("%s: %s", tt.uri, diff)
		}
	}
}

func TestDefaultURI(t *testing.T) {
	none := func(string) string { return "" }
	if got := DefaultURI(none, 0); got != SystemURI {
		t.Errorf("root's is %s", got)
	}
	if got := DefaultURI(none, 1000); got != SessionURI {
		t.Errorf("a user's is %s", got)
	}
	if got := DefaultURI(func(string) string { return SystemURI }, 1000); got != SystemURI {
		t.Errorf("the environment's is %s", got)
	}
}
