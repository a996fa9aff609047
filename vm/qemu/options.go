package qemu

import (
	"fmt"
	"strconv"
	"strings"
)

// args collects a command line.
type args struct {
	argv []string
}

func (a *args) add(words ...string) { a.argv = append(a.argv, words...) }

// option adds flag with a value of the form "head,key=value,...". Pairs are
// key, value; a pair whose value is nil is left out.
func (a *args) option(flag, head string, pairs ...any) {
	var b strings.Builder
	b.WriteString(escape(head))
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] == nil {
			continue
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "%s=%s", pairs[i], escape(render(pairs[i+1])))
	}
	a.add(flag, b.String())
}

func render(v any) string {
	switch v := v.(type) {
	case bool:
		if v {
			return "on"
		}
		return "off"
	case int:
		return strconv.Itoa(v)
	case int64:
		return strconv.FormatInt(v, 10)
	default:
		return fmt.Sprint(v)
	}
}

// escape doubles commas, the one character that QEMU's option syntax gives a
// meaning inside a value. Every other byte stands for itself, so unlike the
// JSON form this also carries paths that are not UTF-8.
// https://www.qemu.org/docs/master/system/invocation.html ("Sometimes, it is
// necessary to...": "use two commas").
func escape(value string) string { return strings.ReplaceAll(value, ",", ",,") }
