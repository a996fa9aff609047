package helper

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/agentvm/agentvm/gpu"
	"github.com/agentvm/agentvm/vm"
)

const (
	bind           = "bind"
	release        = "release"
	recoverStale   = "recover"
	requestVersion = 1
	maxRequest     = 16 << 10 // bytes
	maxResponse    = 1 << 20
	maxDevices     = 64
)

// request is what a user asks for.
type request struct {
	Version int       `json:"version"`
	Do      string    `json:"do"`
	Devices []string  `json:"devices,omitempty"` // full addresses, or UUIDs of mediated devices
	Name    string    `json:"name,omitempty"`    // of the owner, for people
	Process vm.ProcID `json:"process,omitzero"`  // the owner; none: what is bound is kept
	Plain   bool      `json:"plain,omitempty"`   // of [gpu.Request]
}

// response is what became of it.
type response struct {
	Journals []*gpu.Journal `json:"journals,omitempty"`
	Outcomes []gpu.Outcome  `json:"outcomes,omitempty"`
	Error    string         `json:"error,omitempty"`
	Hint     string         `json:"hint,omitempty"`
	Class    string         `json:"class,omitempty"` // of the error
}

var (
	addressPattern = vm.Pattern(`^[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$`)
	namePattern    = vm.Pattern(`^[a-zA-Z0-9][a-zA-Z0-9 ._-]{0,79}$`)
)

// of is what the manager is asked for, on behalf of c.
func (r request) of(owner gpu.Owner, c caller) gpu.Request {
	return gpu.Request{Devices: r.Devices, Owner: owner, User: vm.Owner{UID: c.UID}, Plain: r.Plain}
}

// decode reads one request and refuses everything that is not exactly one.
func decode(r io.Reader) (req request, err error) {
	data, err := io.ReadAll(io.LimitReader(r, maxRequest+1))
	if err != nil {
		return req, fmt.Errorf("read the request: %w", err)
	}
	if len(data) > maxRequest {
		return req, fmt.Errorf("the request is longer than %d bytes", maxRequest)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&req); err != nil {
		return request{}, fmt.Errorf("read the request: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return request{}, errors.New("something follows the request")
	}
	if err := req.validate(); err != nil {
		return request{}, err
	}
	return req, nil
}

func (r request) validate() error {
	if r.Version != requestVersion {
		return fmt.Errorf("the request is of version %d, this program knows %d", r.Version, requestVersion)
	}
	switch r.Do {
	case bind, release:
		if len(r.Devices) == 0 || len(r.Devices) > maxDevices {
			return fmt.Errorf("a request to %s names 1 to %d devices", r.Do, maxDevices)
		}
	case recoverStale:
		if len(r.Devices) > 0 {
			return errors.New("a request to recover names no device")
		}
	default:
		return errors.New("the request is none that is known")
	}
	for _, d := range r.Devices {
		if !addressPattern().MatchString(d) && !gpu.IsUUID(d) {
			return fmt.Errorf("%.40q is not the address of a device, nor a mediated one's UUID", d)
		}
	}
	if r.Do != bind && (r.Name != "" || r.Process != vm.ProcID{}) {
		return fmt.Errorf("a request to %s names no owner", r.Do)
	}
	if r.Do != bind && r.Plain {
		return fmt.Errorf("a request to %s names no driver", r.Do)
	}
	if r.Do == bind && !namePattern().MatchString(r.Name) {
		return fmt.Errorf("%.40q is not the name of an owner", r.Name)
	}
	if r.Process.PID < 0 {
		return errors.New("the owner is no process")
	}
	return nil
}
