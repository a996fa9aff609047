package main

import (
	"cmp"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// The benchmarks of the whole program: real machines, real shares. What they
// compare, they measure in one run, because on a busy or an emulating host only
// ratios mean anything. They judge nothing; docs/performance.md does.
//
//	make bench PKG=./cmd/agentvm
//	make bench PKG=./cmd/agentvm BENCH='Exec|Idle'

// machine starts a project's machine for a benchmark and returns its directory.
func (h *host) machine(name, config string) string {
	h.t.Helper()
	dir := h.project(name, "version: 1\nname: "+name+"\n"+config)
	h.must(dir, "image", "build")
	h.must(dir, "up")
	return dir
}

// table is a Markdown table, to be read here or put into a document.
type table struct {
	title string
	rows  [][]string
}

func newTable(title string, head ...string) *table {
	return &table{title: title, rows: [][]string{head, slices.Repeat([]string{"---"}, len(head))}}
}

// add appends a row; numbers and durations are rounded to what they can tell.
func (t *table) add(cells ...any) {
	row := make([]string, len(cells))
	for i, c := range cells {
		switch c := c.(type) {
		case time.Duration:
			row[i] = short(c)
		case float64:
			row[i] = digits(c)
		default:
			row[i] = fmt.Sprint(c)
		}
	}
	t.rows = append(t.rows, row)
}

// print goes around the framework, which cuts a benchmark's log after ten lines.
func (t *table) print() {
	var s strings.Builder
	fmt.Fprintf(&s, "\n%s\n\n", t.title)
	for _, row := range t.rows {
		fmt.Fprintf(&s, "| %s |\n", strings.Join(row, " | "))
	}
	fmt.Fprintln(os.Stdout, s.String())
}

// short writes a duration with three significant digits.
func short(d time.Duration) string {
	if d >= time.Second {
		return digits(d.Seconds()) + " s"
	}
	return digits(float64(d)/float64(time.Millisecond)) + " ms"
}

func digits(f float64) string {
	places := 2
	if f > 0 {
		places = max(0, 2-int(math.Floor(math.Log10(f))))
	}
	return fmt.Sprintf("%.*f", min(places, 3), f)
}

// ratio compares two durations; it is 0 when there is nothing to compare with.
func ratio(a, b time.Duration) float64 {
	if b == 0 {
		return 0
	}
	return float64(a) / float64(b)
}

// percentile is the smallest sample that p percent of all do not exceed.
func percentile[T cmp.Ordered](samples []T, p int) T {
	sorted := slices.Sorted(slices.Values(samples))
	return sorted[max(0, (len(sorted)*p+99)/100-1)]
}

func TestPercentile(t *testing.T) {
	samples := []int{5, 1, 4, 2, 3}
	for p, want := range map[int]int{0: 1, 20: 1, 50: 3, 95: 5, 100: 5} {
		if got := percentile(samples, p); got != want {
			t.Errorf("percentile %d is %d, want %d", p, got, want)
		}
	}
}

func TestDigits(t *testing.T) {
	for f, want := range map[float64]string{0: "0.00", 0.0123: "0.012", 0.5: "0.500", 1.234: "1.23", 12.34: "12.3", 123.4: "123", 12345: "12345"} {
		if got := digits(f); got != want {
			t.Errorf("digits(%v) = %s, want %s", f, got, want)
		}
	}
}
