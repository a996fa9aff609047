package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/instance"
)

const rehearsalTarget = "/run/rehearsal"

// rehearsal is the share of a rehearsal: an empty directory, where the guest
// finds its own first one later.
var rehearsal = instance.Share{Tag: "rehearsal", Target: rehearsalTarget, ReadOnly: true}

// Programs of the guest's end of the line, for both ends of a rehearsal.
const (
	rehearseMount = `mount_shares({"home": "", "shares": [{"tag": "rehearsal", "target": "` + rehearsalTarget + `", "readonly": True}]})`
	rehearseEnd   = `
for attempt in range(100):  # what looks at all mounts may be in it
    if libc.umount2(b"` + rehearsalTarget + `", 0) == 0:
        break
    time.sleep(0.05)
else:
    raise OSError(ctypes.get_errno(), "unmount")
os.rmdir("` + rehearsalTarget + `")
`
)

// rehearse has a guest that is nobody's do what it will be asked for when it is
// claimed: find a share that is plugged in, mount it, and run a command in it. The
// first time is slow, since what is needed is read, and emulated code translated. So it
// comes while nobody waits. What the guest has logged of it is all that is left.
func (s *Supervisor) rehearse(ctx context.Context, l Line) (err error) {
	defer s.trace("rehearsal", time.Now())
	defer func() {
		if err != nil {
			err = fmt.Errorf("rehearse a claim: %w", err)
		}
	}()
	sh := rehearsal
	sh.Source = s.inst.Path(sh.Tag)
	if err := os.Mkdir(sh.Source, 0o700); err != nil {
		return err
	}
	defer os.Remove(sh.Source)
	if o := s.spec.Machine.RunAs; o != nil { // its server needs no other's rights then
		if err := os.Lchown(sh.Source, o.UID, o.GID); err != nil {
			return err
		}
	}
	socket := s.socket(sh.Tag + ".sock")
	defer os.Remove(socket)
	served, err := s.parts.Share(ctx, s.spec, sh, socket, s.inst.Path("virtiofsd-"+sh.Tag+".log"))
	if err != nil {
		return err
	}
	process := "virtiofsd-" + sh.Tag
	s.child(process, served.Process())
	defer func() {
		err = errors.Join(err, served.Stop())
		s.change(func(st *instance.Status) { delete(st.Children, process) })
	}()
	if err := s.meetShare(ctx, l, served, vm.Share{Tag: sh.Tag, Socket: socket}); err != nil {
		return err
	}
	return s.machine.Unplug(ctx, 0)
}

// meetShare has the guest use the rehearsal's share and let go of it, for as long
// as it is served: a guest that has a dead one mounted would wait for ever.
func (s *Supervisor) meetShare(ctx context.Context, l Line, served Share, sh vm.Share) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-served.Done():
			cancel(fmt.Errorf("the share's server has ended: %w", served.Err()))
		case <-ctx.Done():
		}
	}()
	defer func() {
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx) // err is its symptom
		}
	}()
	if err := s.machine.Plug(ctx, 0, sh); err != nil {
		return err
	}
	var missed []string
	if err := l.Run(ctx, rehearseMount, func(text string) { missed = append(missed, text) }); err != nil {
		return err
	}
	if len(missed) > 0 {
		return errors.New(strings.Join(missed, "; "))
	}
	if err := s.rehearseCommand(ctx, rehearsal.Target); err != nil {
		return err
	}
	return l.Run(ctx, rehearseEnd, nil)
}

func (s *Supervisor) rehearseCommand(ctx context.Context, dir string) error {
	var out head
	code, err := s.guest.Run(ctx, "cd "+dir+" && exec env true", &out)
	if err == nil && code != 0 {
		err = fmt.Errorf("a command in it ended with exit code %d: %s", code, plain(lastLine(out.String())))
	}
	return err
}
