package gpu

import (
	"fmt"
	"strconv"
	"strings"
)

// BAR is a region of a PCI function: one of six, or the expansion ROM.
type BAR struct {
	Index        int    `json:"index"` // 0 to 5; 6 is the ROM
	Size         uint64 `json:"size"`  // bytes
	IO           bool   `json:"io,omitempty"`
	Bits64       bool   `json:"bits64,omitempty"`
	Prefetchable bool   `json:"prefetchable,omitempty"`
}

// romIndex is the expansion ROM's line of the resource file.
const romIndex = 6

// Flags of the third column, from the kernel's include/linux/ioport.h.
const (
	resourceIO       = 0x00000100
	resourceMem      = 0x00000200
	resourcePrefetch = 0x00002000
	resourceMem64    = 0x00100000
)

// parseBARs reads a function's resource file in sysfs: a line of start, end
// and flags for each of the six BARs and the ROM, then for bridges' windows
// and virtual functions, which are not BARs. Unused ones are zero.
func parseBARs(text string) ([]BAR, error) {
	var bars []BAR
	for i, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		if i > romIndex || line == "" {
			break
		}
		fields := strings.Fields(line)
		if len(fields) != 3 {
			return nil, fmt.Errorf("line %d: want start, end and flags: %q", i+1, line)
		}
		var v [3]uint64
		for j, f := range fields {
			n, err := strconv.ParseUint(strings.TrimPrefix(f, "0x"), 16, 64)
			if err != nil {
				return nil, fmt.Errorf("line %d: %w", i+1, err)
			}
			v[j] = n
		}
		start, end, flags := v[0], v[1], v[2]
		if flags&(resourceIO|resourceMem) == 0 {
			continue
		}
		if end < start || end-start == 1<<64-1 {
			return nil, fmt.Errorf("line %d: it ends before it starts: %q", i+1, line)
		}
		bars = append(bars, BAR{Index: i, Size: end - start + 1, IO: flags&resourceIO != 0,
			Bits64: flags&resourceMem64 != 0, Prefetchable: flags&resourcePrefetch != 0})
	}
	return bars, nil
}
