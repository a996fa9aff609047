package libvirt

import (
	"context"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"
)

// subscribe asks for lifecycle events until watch ends. ctx bounds the asking.
func (d *Domain) subscribe(ctx, watch context.Context) (<-chan golibvirt.DomainEventLifecycleMsg, error) {
	return call(ctx, d.conn, "watch libvirt's machines", func(l *golibvirt.Libvirt) (<-chan golibvirt.DomainEventLifecycleMsg, error) {
		return l.LifecycleEvents(watch)
	})
}

// follow listens for libvirt's word about the domain, and subscribes again
// when the connection has been lost.
func (d *Domain) follow(ctx context.Context, events <-chan golibvirt.DomainEventLifecycleMsg) {
	for {
		for e := range events { // to its end, or go-libvirt's side would wait for ever
			if e.Dom.UUID == d.dom.UUID && golibvirt.DomainEventType(e.Event) == golibvirt.DomainEventStopped {
				d.tell(golibvirt.DomainEventStoppedDetailType(e.Detail))
			}
		}
		if ctx.Err() != nil {
			return
		}
		d.log.Warn("the connection to libvirt was lost; connecting again")
		for events = nil; events == nil; {
			select {
			case <-ctx.Done():
				return
			case <-d.done:
				return
			case <-time.After(retryInterval):
			}
			var err error
			if events, err = d.subscribe(ctx, ctx); err != nil {
				events = nil
				d.log.Debug("connect to libvirt", "error", err)
			}
		}
		d.log.Info("connected to libvirt again")
	}
}

func drain(events <-chan golibvirt.DomainEventLifecycleMsg) {
	for range events {
	}
}

// tell records libvirt's word about the end.
func (d *Domain) tell(how golibvirt.DomainEventStoppedDetailType) {
	d.mu.Lock()
	defer d.mu.Unlock()
	select {
	case <-d.told:
		return // the first word counts
	default:
	}
	d.how = how
	d.good, d.last = ending(how)
	close(d.told)
}

// ending says what libvirt means. good is a shutdown of the guest's own.
func ending(how golibvirt.DomainEventStoppedDetailType) (good bool, reason string) {
	switch how {
	case golibvirt.DomainEventStoppedShutdown:
		return true, ""
	case golibvirt.DomainEventStoppedDestroyed:
		return false, "the machine was ended in libvirt (virsh destroy, or another program)"
	case golibvirt.DomainEventStoppedCrashed:
		return false, "QEMU crashed or was killed, says libvirt"
	case golibvirt.DomainEventStoppedSaved:
		return false, "the machine was saved in libvirt (virsh save, or another program), which agentvm cannot follow"
	case golibvirt.DomainEventStoppedMigrated:
		return false, "the machine was moved to another host in libvirt"
	default:
		return false, "libvirt ended the machine: QEMU failed"
	}
}
