package config

import (
	"fmt"
	"strconv"

	"github.com/agentvm/agentvm/vm"
)

// GPU says which of the host's cards the machine has to itself.
type GPU struct {
	Devices   []GPUDevice `yaml:"devices,omitempty"`
	NUMA      string      `yaml:"numa,omitempty"`      // auto (default), off, or a node's number
	HugePages Size        `yaml:"hugepages,omitempty"` // 0: none
}

// GPUDevice is one card, or some of a kind.
type GPUDevice struct {
	Use   string `yaml:"use"`             // an address, vendor:device, a name or pattern, auto, or a mediated device's UUID
	Count Count  `yaml:"count,omitempty"` // how many; default 1
	ROM   string `yaml:"rom,omitempty"`   // file with the option ROM that the guest sees
}

// Values of gpu.numa besides a node's number.
const (
	NUMAAuto = "auto"
	NUMAOff  = "off"
)

const (
	maxCards = 16
	pageSize = Size(2 << 20)
	bigPage  = Size(1 << 30)
)

// oneDevice matches what can mean but one device: an address or a UUID.
var oneDevice = vm.Pattern(`(?i)^([0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$|^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// Names reports whether d.Use can mean but one device.
func (d GPUDevice) Names() bool { return oneDevice().MatchString(d.Use) }

// checkGPU finds impossible wishes for cards.
func (d *document) checkGPU(c Config) []rule {
	g := c.GPU
	memory := c.Resources.Memory
	if memory == 0 {
		memory = DefaultMemory
	}
	_, err := strconv.ParseUint(g.NUMA, 10, 16)
	rules := []rule{
		{len(g.Devices) > 0 || !d.has("$.gpu"), "$.gpu", "gpu names no devices", "devices: [{use: auto}]"},
		{g.NUMA == "" || g.NUMA == NUMAAuto || g.NUMA == NUMAOff || err == nil, "$.gpu.numa", fmt.Sprintf("numa %q is not known", g.NUMA), "use auto, off or the number of a node"},
		{g.HugePages == pageSize || g.HugePages == bigPage || !d.has("$.gpu.hugepages"), "$.gpu.hugepages", fmt.Sprintf("there are no pages of %v", g.HugePages), "use 2MiB or 1GiB"},
		{g.HugePages == 0 || memory%g.HugePages == 0, "$.gpu.hugepages", fmt.Sprintf("memory of %v is not a whole number of pages of %v", memory, g.HugePages), "change resources.memory or gpu.hugepages"},
	}
	total := 0
	seen := map[string]bool{}
	for i, dev := range g.Devices {
		at := fmt.Sprintf("$.gpu.devices[%d]", i)
		total += max(1, int(dev.Count))
		rules = append(rules,
			rule{dev.Use != "", at, "a device needs a name", "use: an address, vendor:device, a part of its name, or auto"},
			rule{dev.Count >= 1 && dev.Count <= maxCards || !d.has(at+".count"), at + ".count", fmt.Sprintf("count must be 1 to %d", maxCards), ""},
			rule{!dev.Names() || dev.Count <= 1, at + ".count", fmt.Sprintf("%q is one device", dev.Use), "remove count, or name more devices"},
			rule{!dev.Names() || !seen[dev.Use], at + ".use", fmt.Sprintf("device %q is named twice", dev.Use), ""})
		seen[dev.Use] = true
	}
	return append(rules, rule{total <= maxCards, "$.gpu.devices", fmt.Sprintf("a machine has at most %d cards", maxCards), ""})
}
