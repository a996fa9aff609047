package qemu

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/qmp"
)

// guestDisk is a whole guest in one sector: it writes "hello" to the first
// serial port and then a word to an I/O port. Real mode, loaded at 0x7c00.
func guestDisk(t *testing.T, port, word uint16) string {
	t.Helper()
	code := []byte{
		0x31, 0xc0, // xor ax, ax
		0x8e, 0xd8, // mov ds, ax
		0xfc,             // cld
		0xbe, 0x1d, 0x7c, // mov si, message
		0xac,       // next: lodsb
		0x84, 0xc0, // test al, al
		0x74, 0x06, // jz end
		0xba, 0xf8, 0x03, // mov dx, 0x3f8
		0xee,       // out dx, al
		0xeb, 0xf5, // jmp next
		0xba, byte(port), byte(port >> 8), // end: mov dx, port
		0xb8, byte(word), byte(word >> 8), // mov ax, word
		0xef,       // out dx, ax
		0xf4,       // halt: hlt
		0xeb, 0xfd, // jmp halt
	}
	sector := make([]byte, 1<<20)
	copy(sector, append(code, "hello\n\x00"...))
	sector[510], sector[511] = 0x55, 0xaa
	file := filepath.Join(t.TempDir(), "guest,disk")
	if err := os.WriteFile(file, sector, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// What a q35 guest writes to power off (ACPI PM1a control: SLP_EN with the S5
// type, at the address that SeaBIOS chooses) and to reset.
const (
	acpiPM1a, acpiPowerOff = 0x604, 0x2000
	resetPort, resetHard   = 0xcf9, 0x06
)

func guest(t *testing.T, port, word uint16) vm.Machine {
	m := emptyMachine(shortDir(t))
	m.Boot.Firmware = vm.FirmwareBIOS
	m.Disks = []vm.Disk{{ID: "root", Path: guestDisk(t, port, word), Format: "raw", Serial: "root"}}
	return m
}

func TestGuestPowersOff(t *testing.T) {
	caps := realCaps(t)
	m := guest(t, acpiPM1a, acpiPowerOff)
	p := start(t, m, caps, "-S")
	mon := connect(t, p, m)
	sub, err := mon.Subscribe(t.Context(), qmp.EventShutdown)
	if err != nil {
		t.Fatal(err)
	}
	if err := qmp.Cont(t.Context(), mon); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := p.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	if s, _ := qmp.ShutdownOf(<-sub.C); !s.Guest || s.Reason != "guest-shutdown" {
		t.Errorf("shutdown: %+v", s)
	}
	if text, _ := os.ReadFile(m.Console); !strings.Contains(string(text), "hello") {
		t.Errorf("console: %q", text)
	}
}

func TestGuestResets(t *testing.T) {
	caps := realCaps(t)
	m := guest(t, resetPort, resetHard)
	mon := connect(t, start(t, m, caps), m)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if ev, err := qmp.WaitEvent(ctx, mon, qmp.EventReset); err != nil || ev.Data["reason"] != "guest-reset" {
		t.Fatalf("%v, %v", ev, err)
	}
	waitFor(t, "the guest to speak again", func() bool {
		text, _ := os.ReadFile(m.Console)
		return strings.Count(string(text), "hello") > 1
	})
}
