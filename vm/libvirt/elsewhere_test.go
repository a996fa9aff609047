package libvirt

import (
	"errors"
	"strings"
	"testing"

	"github.com/agentvm/agentvm/vm"
)

func TestParseElsewhere(t *testing.T) {
	for text, want := range map[string]Elsewhere{
		"qemu+ssh://host/system":                   {Host: "host", Local: "qemu:///system"},
		"qemu+ssh://ada@host.example:2222/session": {User: "ada", Host: "host.example", Port: 2222, Local: "qemu:///session"},
		"qemu+ssh://[::1]:22/system":               {Host: "::1", Port: 22, Local: "qemu:///system"},
		"qemu+ssh://10.0.0.1/system":               {Host: "10.0.0.1", Local: "qemu:///system"},
		"qemu+ssh://host/system?socket=/run/a%20b": {Host: "host", Local: "qemu:///system?socket=/run/a%20b"},
		"qemu+ssh://ada%40corp@my_box/system":      {User: "ada@corp", Host: "my_box", Local: "qemu:///system"},
	} {
		want.Text = text
		got, there, err := ParseElsewhere(text)
		if err != nil || !there || got != want {
			t.Errorf("%s: %+v, %v, %v", text, got, there, err)
		}
	}
	for text, says := range map[string]string{
		"qemu+ssh:///system":                                 "not a host's name",
		"qemu+ssh://-oProxyCommand=x/system":                 "not a host's name",
		"qemu+ssh://a%20b/system":                            "not a URI",
		"qemu+ssh://a;b/system":                              "not a host's name",
		"qemu+ssh://$(x)/system":                             "not a host's name",
		"qemu+ssh://[fe80::1%25;x]/system":                   "not a host's name",
		"qemu+ssh://a..-/system":                             "not a host's name",
		"qemu+ssh://-x@host/system":                          "not a user's name",
		"qemu+ssh://a b@host/system":                         "not a URI",
		"qemu+ssh://%24(x)@host/system":                      "not a user's name",
		"qemu+ssh://@host/system":                            "not a user's name",
		"qemu+ssh://ada:secret@host/system":                  "does not belong into a URI",
		"qemu+ssh://host:0/system":                           "not 1 to 65535",
		"qemu+ssh://host:70000/system":                       "not 1 to 65535",
		"qemu+ssh://host/embed":                              "no such QEMU libvirt",
		"qemu+ssh://host/system#x":                           "it has a fragment",
		"qemu+ssh://host/system?keyfile=/x":                  "unknown parameter",
		"qemu+ssh://host/system?socket=x":                    "not an absolute path",
		"qemu+ssh:host":                                      "not a host's name",
		"qemu+tls://host/system":                             "gives no way to put it there",
		"qemu+ssh://host/system\x00":                         "not a URI",
		"qemu+ssh://" + strings.Repeat("a", 300) + "/system": "not a host's name",
	} {
		_, there, err := ParseElsewhere(text)
		if err == nil || !there || !strings.Contains(err.Error(), says) || !errors.Is(err, vm.ErrUsage) || vm.Hint(err) == "" {
			t.Errorf("%s: %v, want %q with a hint", text, err, says)
		}
	}
	for _, text := range []string{"", "qemu:///system", "qemu+unix:///session", "xen:///", "qemu+tcp://host/system"} {
		if _, there, err := ParseElsewhere(text); there || err != nil {
			t.Errorf("%s is elsewhere: %v", text, err)
		}
	}
}

// FuzzParseElsewhere wants nothing that ssh or a shell could take for more
// than a name.
func FuzzParseElsewhere(f *testing.F) {
	for _, text := range []string{"qemu+ssh://ada@host:22/system", "qemu+ssh://[::1]/session?socket=/x", "qemu+ssh://-x/system", "qemu+ssh://a%0ab/system"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		e, there, err := ParseElsewhere(text)
		if err != nil || !there {
			return
		}
		for _, word := range []string{e.Host, e.User} {
			if strings.HasPrefix(word, "-") || strings.ContainsAny(word, " \t\n\"'`$;&|<>()\\*?[]{}!#~%/\x00") {
				t.Errorf("%q: %+v", text, e)
			}
		}
		if _, err := ParseURI(e.Local); err != nil || e.Host == "" || e.Port < 0 || e.Port > 65535 {
			t.Errorf("%q: %+v, %v", text, e, err)
		}
	})
}
