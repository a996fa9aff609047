package libvirt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
	"golang.org/x/sys/unix"

	"github.com/agentvm/agentvm/vm"
	"github.com/agentvm/agentvm/vm/saved"
)

// abortTimeout bounds giving up a save, which may be over by then.
const abortTimeout = 30 * time.Second

// pollInterval is how often libvirt is asked whether a share is out; it has no
// answer that waits.
const pollInterval = 200 * time.Millisecond

// shareAlias is what libvirt calls share i.
func shareAlias(i int) string { return fmt.Sprintf("ua-share%d", i) }

// Plug gives the machine, which runs or is paused, share i.
func (d *Domain) Plug(ctx context.Context, i int, s vm.Share) error {
	fs := filesystem(i, s)
	text, err := fs.Marshal()
	if err != nil {
		return err
	}
	_, err = call(ctx, d.conn, "plug share "+s.Tag, func(l *golibvirt.Libvirt) (struct{}, error) {
		return struct{}{}, l.DomainAttachDeviceFlags(d.dom, text, uint32(golibvirt.DomainAffectLive))
	})
	return err
}

// Unplug takes share i out, which the guest must not have mounted, and waits
// until the guest has let go.
func (d *Domain) Unplug(ctx context.Context, i int) error {
	what := fmt.Sprintf("unplug share %d", i)
	_, err := call(ctx, d.conn, what, func(l *golibvirt.Libvirt) (struct{}, error) {
		return struct{}{}, l.DomainDetachDeviceAlias(d.dom, shareAlias(i), uint32(golibvirt.DomainAffectLive))
	})
	if err != nil {
		return err
	}
	for {
		text, err := call(ctx, d.conn, what, func(l *golibvirt.Libvirt) (string, error) { return l.DomainGetXMLDesc(d.dom, 0) })
		if err != nil {
			return err
		}
		if !strings.Contains(text, "'"+shareAlias(i)+"'") {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, context.Cause(ctx))
		case <-time.After(pollInterval):
		}
	}
}

// Save has libvirt write the machine, which must have no shares, to dir, and end
// it. [Domain.Done] does not tell of that end before [Domain.Kill]. After an
// error the machine goes on, unless it has ended: it was too late to give up, or
// what is in dir could not be sealed.
func (d *Domain) Save(ctx context.Context, dir string) (ended bool, err error) {
	d.saving.Lock()
	defer d.saving.Unlock()
	_, err = call(ctx, d.conn, "save the machine", func(l *golibvirt.Libvirt) (struct{}, error) {
		return struct{}{}, l.DomainSaveFlags(d.dom, filepath.Join(dir, saved.ImageFile), nil, uint32(golibvirt.DomainSavePaused))
	})
	switch {
	case err == nil:
	case ctx.Err() == nil && !errors.Is(err, ErrLost):
		return false, err
	case !d.endedSaving(ctx): // libvirt may still have been at it
		return false, err
	}
	d.saved = true
	return true, errors.Join(err, saved.SealImage(dir))
}

// endedSaving gives up a save, and reports whether it was too late for that:
// libvirt ends a machine as the last part of the job.
func (d *Domain) endedSaving(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortTimeout)
	defer cancel()
	_, err := call(ctx, d.conn, "give up saving the machine", func(l *golibvirt.Libvirt) (struct{}, error) {
		return struct{}{}, l.DomainAbortJob(d.dom)
	})
	if err != nil {
		d.log.Warn("give up saving", "error", err)
	}
	for d.id.Alive() {
		job, err := call(ctx, d.conn, "look at the save", func(l *golibvirt.Libvirt) (golibvirt.DomainJobType, error) {
			job, _, _, _, _, _, _, _, _, _, _, _, err := l.DomainGetJobInfo(d.dom)
			return golibvirt.DomainJobType(job), err
		})
		if err == nil && job == golibvirt.DomainJobNone {
			break
		}
		select {
		case <-ctx.Done():
			d.log.Warn("it is not known what becomes of a save", "error", err)
			return !d.id.Alive() && d.wasSaved()
		case <-time.After(pollInterval):
		}
	}
	return !d.id.Alive() && d.wasSaved()
}

// wasSaved waits for libvirt's word about the end, and reports whether it is that
// the machine is saved. A QEMU that has crashed has left half of itself.
func (d *Domain) wasSaved() bool {
	select {
	case <-d.told:
	case <-time.After(wordTimeout):
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.how == golibvirt.DomainEventStoppedSaved
}

// goOn has libvirt restore the machine from what [Domain.Save] left in dir. It is
// paused then.
func (d *Domain) goOn(ctx context.Context, dir string) (golibvirt.Domain, error) {
	file, err := saved.CheckImage(dir)
	if err != nil {
		return golibvirt.Domain{}, err
	}
	_, err = call(ctx, d.conn, "restore the machine", func(l *golibvirt.Libvirt) (struct{}, error) {
		return struct{}{}, l.DomainRestoreFlags(file, nil, uint32(golibvirt.DomainSavePaused))
	})
	if err != nil {
		return golibvirt.Domain{}, err
	}
	return find(ctx, d.conn, d.meta.ID)
}

// tighten takes a socket of QEMU's, which libvirt starts with a lax umask, from
// everybody but its owner. QEMU may put whatever it likes in its place: nothing
// but a socket is changed, and no link is followed.
func tighten(path string) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("restrict %s: %w", path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("restrict %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fmt.Errorf("restrict %s: it is no socket", path)
	}
	return os.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), 0o600)
}
