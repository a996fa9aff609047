package gpu

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/agentvm/agentvm/vm"
)

// nodeDir is the kernel's list of NUMA nodes (Documentation/ABI/stable/sysfs-devices-node).
const nodeDir = "/sys/devices/system/node"

// Node describes a NUMA node of the host; nil when there is none of that number.
func (h Host) Node(id int) *vm.Node {
	dir := filepath.Join(nodeDir, fmt.Sprintf("node%d", id))
	if id < 0 || !h.exists(dir) {
		return nil
	}
	return &vm.Node{ID: id, CPUs: parseList(h.text(dir, "cpulist"))}
}

// Nodes is the number of NUMA nodes.
func (h Host) Nodes() (n int) {
	for _, name := range h.names(nodeDir) {
		if rest, ok := strings.CutPrefix(name, "node"); ok {
			if _, err := strconv.Atoi(rest); err == nil {
				n++
			}
		}
	}
	return n
}

// FreeMemory is what a node has to spare, in bytes.
func (h Host) FreeMemory(node int) int64 {
	for line := range strings.Lines(h.text(nodeDir, fmt.Sprintf("node%d", node), "meminfo")) {
		if f := strings.Fields(line); len(f) >= 4 && f[2] == "MemFree:" {
			kib, _ := strconv.ParseInt(f[3], 10, 64)
			return kib << 10
		}
	}
	return 0
}

// FreePages is the number of huge pages of a size in bytes that are set aside
// and not in use, on a node or, with NoNode, anywhere; Pages counts those in use too.
func (h Host) FreePages(size int64, node int) int64 { return h.pages(size, node, "free_hugepages") }

// Pages is of FreePages.
func (h Host) Pages(size int64, node int) int64 { return h.pages(size, node, "nr_hugepages") }

func (h Host) pages(size int64, node int, file string) int64 {
	dir := "/sys/kernel/mm"
	if node != NoNode {
		dir = filepath.Join(nodeDir, fmt.Sprintf("node%d", node))
	}
	return max(0, h.number(dir, "hugepages", fmt.Sprintf("hugepages-%dkB", size>>10), file))
}

// parseList reads the kernel's form of a set of numbers, 0-3,8.
func parseList(text string) (list []int) {
	for part := range strings.SplitSeq(text, ",") {
		first, last, ranged := strings.Cut(part, "-")
		a, err := strconv.Atoi(first)
		if err != nil {
			continue
		}
		b := a
		if ranged {
			if b, err = strconv.Atoi(last); err != nil {
				continue
			}
		}
		for ; a <= b; a++ {
			list = append(list, a)
		}
	}
	return list
}
