package share

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// BenchmarkShare times work on small and large files in an emulated guest,
// for the settings that docs/decisions/0021-share-cache.md chooses among, and
// on the guest's memory for comparison:
//
//	go test -run '^$' -bench Share -benchtime 1x ./vm/share
func BenchmarkShare(b *testing.B) {
	for name, caps := range flavours(b) {
		for _, cache := range []CacheMode{CacheAuto, CacheNever, CacheAlways} {
			b.Run(fmt.Sprintf("%s/%s", name, cache), func(b *testing.B) {
				s := startShare(b, caps, Spec{Source: shareDir(b, ownerUser), Cache: cache})
				measure(b, boot(b, s.spec.Socket), "/workspace")
			})
		}
	}
	b.Run("memory", func(b *testing.B) {
		for _, caps := range flavours(b) {
			s := startShare(b, caps, Spec{Source: shareDir(b, ownerUser)})
			measure(b, boot(b, s.spec.Socket), "/tmp")
			return
		}
	})
}

const (
	smallFiles = 1000
	largeMiB   = 64
)

func measure(b *testing.B, g *guest, at string) {
	const drop = "sync; echo 3 >/proc/sys/vm/drop_caches"
	loop := fmt.Sprintf("i=0; while [ $i -lt %d ]; do %%s; i=$((i+1)); done", smallFiles)
	steps := []struct{ name, before, run string }{
		{"create", "mkdir %s/bench", "cd %s/bench; " + fmt.Sprintf(loop, "echo x >f$i")},
		{"stat", drop, "cd %s/bench; " + fmt.Sprintf(loop, "[ -f f$i ]")},
		{"stat-again", "true", "cd %s/bench; " + fmt.Sprintf(loop, "[ -f f$i ]")},
		{"list", drop, "ls -l %s/bench >/dev/null"},
		{"read", drop, "cat %s/bench/* >/dev/null"},
		{"delete", drop, "rm -r %s/bench"},
		{"write-large", drop, fmt.Sprintf("dd if=/dev/zero of=%%s/large bs=1M count=%d conv=fsync 2>/dev/null", largeMiB)},
		{"read-large", drop, "dd if=%s/large of=/dev/null bs=1M 2>/dev/null"},
	}
	total := map[string]time.Duration{}
	for b.Loop() {
		for _, s := range steps {
			g.do("%s", inDir(s.before, at))
			start := time.Now()
			g.do("%s", inDir(s.run, at))
			total[s.name] += time.Since(start)
		}
	}
	for _, s := range steps {
		b.ReportMetric(float64(total[s.name].Milliseconds())/float64(b.N), s.name+"-ms")
	}
	b.ReportMetric(0, "ns/op")
}

// inDir puts the directory where the line has a verb for it.
func inDir(line, dir string) string { return strings.ReplaceAll(line, "%s", dir) }
