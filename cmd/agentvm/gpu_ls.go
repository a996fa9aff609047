package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/agentvm/agentvm/gpu"
)

// gpuView is a card as gpu ls shows it.
type gpuView struct {
	*gpu.Device
	Taken *gpu.Journal `json:"taken,omitempty"` // by agentvm
}

// mdevView is a mediated device as gpu ls shows it.
type mdevView struct {
	*gpu.Mdev
	Card  string       `json:"card,omitempty"` // the address of the card that it is a part of
	Taken *gpu.Journal `json:"taken,omitempty"`
}

const noGPU = "this host has no graphics card or accelerator on its PCI bus"

func (a *app) gpuLsCommand() *cobra.Command {
	var wide bool
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List the cards, and which driver and who has each", Args: usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			m, inv, err := a.gpus()
			if err != nil {
				return err
			}
			views, parts := a.viewGPUs(m, inv)
			if a.json {
				rows := []any{}
				for _, v := range views {
					rows = append(rows, v)
				}
				for _, p := range parts {
					rows = append(rows, p)
				}
				return json.NewEncoder(a.stdout).Encode(rows)
			}
			if len(views)+len(parts) == 0 {
				a.noteLine(noGPU)
				return nil
			}
			return a.showGPUs(views, parts, wide)
		},
	}
	cmd.Flags().BoolVar(&a.json, "json", false, "print JSON")
	cmd.Flags().BoolVar(&wide, "wide", false, "show class, NUMA node, link, ways to reset and virtual functions too")
	return cmd
}

// viewGPUs finds who has each card and each mediated device. One whose journal
// cannot be read is there all the same.
func (a *app) viewGPUs(m *gpu.Manager, inv *gpu.Inventory) (views []gpuView, parts []mdevView) {
	taken := func(name string) *gpu.Journal {
		j, err := m.Journal(name)
		if err != nil && !errors.Is(err, os.ErrPermission) {
			a.noteLine("%v", err)
		}
		return j
	}
	for _, d := range inv.GPUs() {
		views = append(views, gpuView{d, taken(d.Address)})
	}
	for _, p := range inv.Mediated {
		v := mdevView{Mdev: p, Taken: taken(p.UUID)}
		if p.Card != nil {
			v.Card = p.Card.Address
		}
		parts = append(parts, v)
	}
	return views, parts
}

// showGPUs prints a line for each card, and for each mediated device.
func (a *app) showGPUs(views []gpuView, parts []mdevView, wide bool) error {
	w := tabwriter.NewWriter(a.stdout, 0, 8, 2, ' ', 0)
	line := func(more []string, columns ...string) {
		if !wide {
			more = nil
		}
		for i, c := range columns {
			columns[i] = orDash(c)
		}
		last := len(columns) - 1
		fmt.Fprintln(w, strings.Join(slices.Concat(columns[:last], more, columns[last:]), "\t"))
	}
	line([]string{"CLASS", "NUMA", "LINK", "RESET", "VFS"}, "DEVICE", "ID", "NAME", "DRIVER", "GROUP", "BAR", "USED BY")
	unknown := false
	usedBy := func(taken *gpu.Journal, holders []gpu.Holder, hidden bool) string {
		who := cardUsedBy(taken, holders)
		if who == "" && hidden {
			unknown, who = true, "?"
		}
		return who
	}
	for _, v := range views {
		line(v.more(), v.Address, v.ID(), v.Title(), v.Driver, v.Group, units.BytesSize(float64(v.Memory())), usedBy(v.Taken, v.Holders, v.Hidden))
	}
	for _, p := range parts {
		id := ""
		if p.Mdev.Card != nil {
			id = p.Mdev.Card.ID()
		}
		line([]string{"-", "-", "-", "-", "-"}, p.UUID, id, p.Type, p.Driver, p.Group, "", usedBy(p.Taken, p.Holders, p.Hidden))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if unknown {
		a.noteLine("?: only your own processes were looked at; sudo agentvm gpu ls looks at all")
	}
	return nil
}

// more are the columns that only a wide list has.
func (v gpuView) more() []string {
	numa, vfs, link := "-", "-", "-"
	if v.NUMANode >= 0 {
		numa = strconv.Itoa(v.NUMANode)
	}
	if v.TotalVFs > 0 {
		vfs = fmt.Sprintf("%d of %d", v.NumVFs, v.TotalVFs)
	}
	if v.LinkSpeed != "" {
		link = strings.TrimSuffix(v.LinkSpeed, " PCIe") + " x" + v.LinkWidth
	}
	return []string{fmt.Sprintf("%06x", v.Class), numa, link, orDash(strings.ReplaceAll(v.ResetMethod, " ", ",")), vfs}
}

func cardUsedBy(taken *gpu.Journal, holders []gpu.Holder) string {
	var who []string
	if taken != nil {
		who = append(who, taken.Owner.Name)
	}
	for _, h := range holders {
		if s := fmt.Sprintf("%s (%d)", h.Command, h.PID); !slices.Contains(who, s) {
			who = append(who, s)
		}
	}
	return strings.Join(who, ", ")
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
