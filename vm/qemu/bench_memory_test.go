package qemu

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/agentvm/agentvm/vm/qmp"
	"github.com/agentvm/agentvm/vm/saved"
)

// memoryWays are ways to save a machine's memory and to have it back, by the
// capabilities of QEMU's migration that each takes.
var memoryWays = []struct {
	name string
	caps []string
	save func(context.Context, *qmp.Client, *os.File, string) error
	load func(context.Context, *benchMachine, string) error
}{
	{"ours", nil, saveOurs, loadOurs},
	{"stream", nil, saveStream, loadStream},
	{"mapped-ram", []string{"mapped-ram"}, saveFile, loadFile},
	{"mapped-ram+multifd", []string{"mapped-ram", "multifd"}, saveFile, loadFile},
}

// memoryByQEMU is where QEMU's ways have memory and devices.
const memoryByQEMU = "migrated"

// BenchmarkRestoreMemory takes each of them from QEMU's start until the machine
// could run: 128 MiB of content in a guest of 1 GiB, in the page cache.
func BenchmarkRestoreMemory(b *testing.B) {
	caps := realCaps(b)
	for _, way := range memoryWays {
		b.Run(way.name, func(b *testing.B) {
			dir := shortDir(b)
			m := newBenchMachine(b, dir, caps)
			if !migrates(b, m.mon, way.caps) {
				b.Skip("this QEMU cannot")
			}
			chunk := bytes.Repeat([]byte{1, 2, 3, 4}, 64<<10)
			chunks := int64(128 << 20 / len(chunk))
			for i := range chunks {
				if _, err := m.memory.WriteAt(chunk, 16<<20+i*2*int64(len(chunk))); err != nil {
					b.Fatal(err)
				}
			}
			began := time.Now()
			if err := way.save(b.Context(), m.mon, m.memory, dir); err != nil {
				b.Fatal(err)
			}
			took := time.Since(began)
			m.end()
			for b.Loop() {
				m := newBenchMachine(b, dir, caps, way.caps...)
				if err := way.load(b.Context(), m, dir); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				got := make([]byte, len(chunk))
				for _, i := range []int64{0, 1, chunks - 1} {
					if _, err := m.memory.ReadAt(got, 16<<20+i*2*int64(len(chunk))); err != nil || !bytes.Equal(got, chunk) {
						b.Fatal("the memory is another", err)
					}
				}
				m.end()
				b.StartTimer()
			}
			b.ReportMetric(float64(took.Milliseconds()), "save-ms")
		})
	}
}

type benchMachine struct {
	*Process
	memory *os.File
	load   errgroup.Group
	mon    *qmp.Client
}

// newBenchMachine starts a machine, or where dir has a saved one, one that waits for it.
func newBenchMachine(b *testing.B, dir string, caps Caps, capabilities ...string) *benchMachine {
	b.Helper()
	m := emptyMachine(dir)
	m.Memory, m.MemoryFile, m.Line, m.Ports = 1<<30, "/proc/self/fd/3", filepath.Join(dir, "line.sock"), 2
	if _, err := os.Stat(filepath.Join(dir, memoryByQEMU)); err == nil || saved.Exists(dir) {
		m.Saved = dir
	}
	argv, err := Argv(m, caps)
	if err != nil {
		b.Fatal(err)
	}
	r := &benchMachine{}
	if r.memory, err = saved.NewMemory(m.Memory); err != nil {
		b.Fatal(err)
	}
	if r.Process, err = Start(b.Context(), argv, Options{ExtraFiles: []*os.File{r.memory}}); err != nil {
		b.Fatal(err)
	}
	if saved.Exists(dir) { // QEMU gets ready meanwhile
		r.load.Go(func() error {
			s, err := saved.Open(dir)
			if err != nil {
				return err
			}
			return s.LoadMemory(r.memory)
		})
	}
	if r.mon, err = r.Connect(b.Context(), m.QMP); err != nil {
		b.Fatal(err)
	}
	if len(capabilities) > 0 && !migrates(b, r.mon, capabilities) {
		b.Fatal("it cannot any more")
	}
	return r
}

func (m *benchMachine) end() {
	m.mon.Close()
	m.Kill()
	m.memory.Close()
}

type capability struct {
	Capability string `json:"capability"`
	State      bool   `json:"state"`
}

// migrates turns capabilities on, if QEMU has them.
func migrates(b *testing.B, mon *qmp.Client, want []string) bool {
	b.Helper()
	var has []capability
	if err := qmp.Execute(b.Context(), mon, "query-migrate-capabilities", nil, &has); err != nil {
		b.Fatal(err)
	}
	on := []capability{}
	for _, name := range want {
		if !slices.ContainsFunc(has, func(c capability) bool { return c.Capability == name }) {
			return false
		}
		on = append(on, capability{name, true})
	}
	if err := qmp.Execute(b.Context(), mon, "migrate-set-capabilities", map[string]any{"capabilities": on}, nil); err != nil {
		b.Fatal(err)
	}
	parameters := map[string]any{"max-bandwidth": int64(1) << 40}
	if slices.Contains(want, "multifd") {
		parameters["multifd-channels"] = 2
	}
	if err := qmp.Execute(b.Context(), mon, "migrate-set-parameters", parameters, nil); err != nil {
		b.Fatal(err)
	}
	return true
}

func migrate(ctx context.Context, mon *qmp.Client, command, uri string) error {
	if err := qmp.Execute(ctx, mon, command, map[string]any{"uri": uri}, nil); err != nil {
		return err
	}
	return qmp.Migrated(ctx, mon)
}

func saveOurs(ctx context.Context, mon *qmp.Client, memory *os.File, dir string) error {
	state, err := Save(ctx, mon, filepath.Join(dir, "state.sock"), nil)
	if err != nil {
		return err
	}
	return saved.Write(dir, memory, bytes.NewReader(state))
}

func loadOurs(ctx context.Context, m *benchMachine, dir string) error {
	if err := m.load.Wait(); err != nil {
		return err
	}
	s, err := saved.Open(dir)
	if err != nil {
		return err
	}
	state, err := s.State()
	if err != nil {
		return err
	}
	return Restore(ctx, m.mon, filepath.Join(dir, "state.sock"), state)
}

func saveFile(ctx context.Context, mon *qmp.Client, _ *os.File, dir string) error {
	if err := qmp.Stop(ctx, mon); err != nil {
		return err
	}
	return migrate(ctx, mon, "migrate", "file:"+filepath.Join(dir, memoryByQEMU))
}

func loadFile(ctx context.Context, m *benchMachine, dir string) error {
	return migrate(ctx, m.mon, "migrate-incoming", "file:"+filepath.Join(dir, memoryByQEMU))
}

// saveStream is for a QEMU without file:, too.
func saveStream(ctx context.Context, mon *qmp.Client, _ *os.File, dir string) error {
	if err := qmp.Stop(ctx, mon); err != nil {
		return err
	}
	l, err := net.Listen("unix", filepath.Join(dir, "stream"))
	if err != nil {
		return err
	}
	defer l.Close()
	var receive errgroup.Group
	receive.Go(func() error {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		defer conn.Close()
		f, err := os.Create(filepath.Join(dir, memoryByQEMU))
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(f, conn)
		return err
	})
	if err := migrate(ctx, mon, "migrate", "unix:"+filepath.Join(dir, "stream")); err != nil {
		return err
	}
	return receive.Wait()
}

func loadStream(ctx context.Context, m *benchMachine, dir string) error {
	uri := filepath.Join(dir, "stream")
	if err := qmp.Execute(ctx, m.mon, "migrate-incoming", map[string]any{"uri": "unix:" + uri}, nil); err != nil {
		return err
	}
	var send errgroup.Group
	send.Go(func() error {
		conn, err := net.Dial("unix", uri)
		if err != nil {
			return err
		}
		defer conn.Close()
		f, err := os.Open(filepath.Join(dir, memoryByQEMU))
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(conn, f)
		return err
	})
	if err := send.Wait(); err != nil {
		return err
	}
	return qmp.Migrated(ctx, m.mon)
}
