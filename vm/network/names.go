package network

import (
	"container/list"
	"net/netip"
	"sync"
)

// namePool is where names get their addresses in the guest: the range kept
// for benchmarks (RFC 2544), which nothing on the Internet uses.
var namePool = netip.MustParsePrefix("198.18.0.0/15")

// maxNames bounds the table; the name used longest ago goes first.
const maxNames = 4096

// nameTable gives every name an address of its own and back. Addresses are
// used again only after the whole pool has been, so a guest that kept one
// from before reaches nothing, not another name.
type nameTable struct {
	mu     sync.Mutex
	next   netip.Addr
	byName map[string]*list.Element
	byAddr map[netip.Addr]*list.Element
	recent *list.List // of namedAddr, most recently used first
}

type namedAddr struct {
	name string
	addr netip.Addr
}

func newNameTable() *nameTable {
	return &nameTable{
		next:   namePool.Addr().Next(),
		byName: make(map[string]*list.Element),
		byAddr: make(map[netip.Addr]*list.Element),
		recent: list.New(),
	}
}

// addr returns the address of a name, and whether it is new.
func (t *nameTable) addr(name string) (addr netip.Addr, isNew bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e, ok := t.byName[name]; ok {
		t.recent.MoveToFront(e)
		return e.Value.(namedAddr).addr, false
	}
	if t.recent.Len() >= maxNames {
		e := t.recent.Back()
		old := t.recent.Remove(e).(namedAddr)
		delete(t.byName, old.name)
		delete(t.byAddr, old.addr)
	}
	addr = t.free()
	e := t.recent.PushFront(namedAddr{name, addr})
	t.byName[name], t.byAddr[addr] = e, e
	return addr, true
}

// name returns the name whose address this is.
func (t *nameTable) name(addr netip.Addr) (string, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.byAddr[addr]
	if !ok {
		return "", false
	}
	t.recent.MoveToFront(e)
	return e.Value.(namedAddr).name, true
}

// free returns the next address that no name has.
func (t *nameTable) free() netip.Addr {
	for {
		a := t.next
		t.next = a.Next()
		if !namePool.Contains(t.next) {
			t.next = namePool.Addr().Next()
		}
		if _, used := t.byAddr[a]; !used {
			return a
		}
	}
}
