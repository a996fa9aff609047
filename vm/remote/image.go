package remote

import (
	"context"
	"fmt"

	"github.com/agentvm/agentvm/images"
)

// HasImage reports whether the image is in the cache there.
func (c *Conn) HasImage(ctx context.Context, id string) (bool, error) {
	return Do[bool](ctx, c, id, opHas)
}

// SendImage puts an image into the cache there. It goes on where an earlier
// transfer was cut off, and it is one of the cache's only when it is whole.
// progress is told the part that is done, 0 to 1.
func (c *Conn) SendImage(ctx context.Context, img *images.Image, progress func(part float64)) error {
	call, err := c.Start(ctx, opImage)
	if err != nil {
		return err
	}
	if err := call.End(c.sendImage(ctx, call, img, progress)); err != nil {
		return fmt.Errorf("send image %s to %s: %w", img.ID, c.host.Address(), err)
	}
	return nil
}

func (c *Conn) sendImage(ctx context.Context, call *Call, img *images.Image, progress func(float64)) error {
	if err := WriteFrame(call.In, img.Manifest); err != nil {
		return err
	}
	var wanted Reply[images.Offsets]
	if err := ReadFrame(call.Out, &wanted); err != nil {
		return err
	}
	if err := wanted.Problem.Err(); err != nil || wanted.Value == nil {
		return err // nil: it is there
	}
	total, err := img.Size(wanted.Value)
	if err != nil {
		return err
	}
	sent := int64(0)
	sendErr := img.Send(ctx, wanted.Value, call.In, func(n int64) {
		sent += n
		progress(min(1, float64(sent)/float64(max(1, total))))
	})
	var reply Reply[struct{}]
	if err := ReadFrame(call.Out, &reply); err != nil {
		if sendErr != nil {
			return sendErr
		}
		return err
	}
	return reply.Problem.Err()
}
