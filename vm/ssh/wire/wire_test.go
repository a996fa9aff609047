package wire

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	gossh "golang.org/x/crypto/ssh"
)

func TestProgram(t *testing.T) {
	for _, want := range []Program{
		{Argv: []string{"true"}},
		{Argv: []string{"/bin/printf", "", "a b", "", "ü\xff", ""}, Dir: "/a dir"},
	} {
		if got, err := ParseProgram(want.Marshal()); err != nil || !cmp.Equal(got, want) {
			t.Errorf("%+v, %v, want %+v", got, err, want)
		}
	}
	for _, bad := range []programMsg{{}, {Argv: "\x00"}, {Argv: "\x00true\x00"}, {Argv: "true"}, {Argv: "true\x00\x00more"}, {Argv: "true\x00", Dir: "/a\x00b"}} {
		if got, err := ParseProgram(gossh.Marshal(&bad)); err == nil {
			t.Errorf("%+v is taken for %+v", bad, got)
		}
	}
}

func FuzzParseProgram(f *testing.F) {
	f.Add(Program{Argv: []string{"a", ""}, Dir: "/"}.Marshal())
	f.Fuzz(func(t *testing.T, payload []byte) {
		p, err := ParseProgram(payload)
		if err != nil {
			return
		}
		if again, err := ParseProgram(p.Marshal()); err != nil || !cmp.Equal(again, p) {
			t.Errorf("%+v becomes %+v, %v", p, again, err)
		}
	})
}
