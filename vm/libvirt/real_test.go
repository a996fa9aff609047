package libvirt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"github.com/google/uuid"

	"github.com/agentvm/agentvm/vm/qmp"
	"github.com/agentvm/agentvm/vm/testenv"
)

// TestRealLibvirt asks a real libvirt, with domains that have nothing to boot.
func TestRealLibvirt(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a libvirtd")
	}
	lv := testenv.StartLibvirtd(t)
	u, err := ParseURI(lv.URI())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := Open(t.Context(), u)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	mine := Metadata{ID: uuid.NewString(), Name: "web", Workspace: "/home/ada/a & b"}

	t.Run("monitor", func(t *testing.T) {
		create(t, lv, mine.ID, "")
		monitor := Monitor{conn, lookup(t, conn, mine.ID)}
		if s, err := qmp.Status(t.Context(), monitor); err != nil || s.Running {
			t.Errorf("status %+v, %v", s, err)
		}
		if err := qmp.Execute(t.Context(), monitor, "no-such-command", nil, nil); !qmp.HasClass(err, qmp.ClassCommandNotFound) {
			t.Errorf("an unknown command: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		events, err := monitor.Events(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(qmp.Cont(ctx, monitor), qmp.Reset(ctx, monitor)); err != nil {
			t.Fatal(err)
		}
		for e := range events {
			if e.Event == qmp.EventReset && e.Data["reason"] == "host-qmp-system-reset" {
				break
			}
		}
		if ctx.Err() != nil {
			t.Error("no event of its reset")
		}
		cancel()
		for range events { // is closed
		}
		if s, err := qmp.Status(t.Context(), monitor); err != nil || !s.Running {
			t.Errorf("afterwards %+v, %v", s, err)
		}
	})

	t.Run("devices", func(t *testing.T) {
		// What libvirt makes of golden files is what package qemu makes of the same cards.
		for name, want := range map[string][]string{
			"card-emulated": {
				"q35-pcihost.pci-hole64-size=268959744K",
				`"chassis":1,"id":"ua-dp0"`, `"pref64-reserve":536870912`, `"chassis":2,"id":"ua-dp1"`, `"pref64-reserve":137438953472`,
				`"host":"0000:65:00.0","id":"hostdev0","bus":"ua-dp0","multifunction":true,"addr":"0x0"}`,
				`"host":"0000:65:00.1","id":"hostdev1","bus":"ua-dp0","addr":"0x0.0x1","rombar":0}`,
				`"host":"0000:d8:00.0","id":"hostdev4","bus":"ua-dp1","addr":"0x0","rombar":0}`,
			},
			"mdev-emulated": {`"sysfsdev":"/sys/bus/mdev/devices/c2177883-f1bb-47f0-914d-32a22e3a8804"`, `"bus":"ua-dp0","addr":"0x0","rombar":0}`},
		} {
			line := lv.Virsh("domxml-to-native", "qemu-argv", "--xml", filepath.Join("testdata", name+".xml"))
			for _, w := range want {
				if !strings.Contains(line, w) {
					t.Errorf("%s: no %s in\n%s", name, w, line)
				}
			}
			if strings.Contains(line, "balloon") {
				t.Errorf("%s: it has a balloon\n%s", name, line)
			}
		}
	})

	t.Run("somebody else's", func(t *testing.T) {
		if err := RemoveLeftover(t.Context(), conn, mine); !errors.Is(err, ErrForeign) {
			t.Errorf("without metadata: %v", err)
		}
		lv.Virsh("destroy", "small")
		other := mine
		other.ID = uuid.NewString()
		create(t, lv, mine.ID, element(t, other))
		if err := RemoveLeftover(t.Context(), conn, mine); !errors.Is(err, ErrForeign) {
			t.Errorf("with another's metadata: %v", err)
		}
		if got := lv.Domains(); len(got) != 1 {
			t.Errorf("domains %q", got)
		}
		lv.Virsh("destroy", "small")
	})

	t.Run("leftover", func(t *testing.T) {
		create(t, lv, mine.ID, element(t, mine))
		lives := false
		host := Host{Run: "/run/agentvm", Lives: func(id string) bool { return lives && id == mine.ID }}
		if found := leftovers(t.Context(), conn, u, host); len(found) != 1 || found[0].Name != "domain small" {
			t.Errorf("nobody runs it: %+v", found)
		}
		if lives = true; len(leftovers(t.Context(), conn, u, host)) != 0 {
			t.Error("one that lives is called a leftover")
		}
		for range 2 { // the second time there is none
			if err := RemoveLeftover(t.Context(), conn, mine); err != nil {
				t.Error(err)
			}
		}
		if got := lv.Domains(); len(got) != 0 {
			t.Errorf("domains %q", got)
		}
	})
}

// create makes a paused domain with a machine's UUID.
func create(t *testing.T, lv *testenv.Libvirtd, id, metadata string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "small.xml")
	text := fmt.Sprintf("<domain type='qemu'><name>small</name><uuid>%s</uuid><metadata>%s</metadata><memory>65536</memory><os><type>hvm</type></os></domain>", id, metadata)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	lv.Virsh("create", "--paused", file)
}

func element(t *testing.T, m Metadata) string {
	t.Helper()
	text, err := m.element()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func lookup(t *testing.T, conn *Conn, id string) golibvirt.Domain {
	t.Helper()
	dom, err := call(t.Context(), conn, "look", func(l *golibvirt.Libvirt) (golibvirt.Domain, error) {
		return l.DomainLookupByUUID(golibvirt.UUID(uuid.MustParse(id)))
	})
	if err != nil {
		t.Fatal(err)
	}
	return dom
}
