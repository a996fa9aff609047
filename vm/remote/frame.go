package remote

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/agentvm/agentvm/vm"
)

// maxFrame bounds one message: the description of a workspace is the largest.
const maxFrame = 256 << 20

// WriteFrame writes one message: its length, and JSON.
func WriteFrame(w io.Writer, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(data) > maxFrame {
		return fmt.Errorf("a message of %d bytes", len(data))
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(data))), data...))
	return err
}

// ReadFrame reads one message into v.
func ReadFrame(r io.Reader, v any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxFrame {
		return fmt.Errorf("a message of %d bytes", n)
	}
	// As much as really comes, not as much as was announced.
	data, err := io.ReadAll(io.LimitReader(r, int64(n)))
	if err != nil {
		return err
	}
	if len(data) != int(n) {
		return io.ErrUnexpectedEOF
	}
	return json.Unmarshal(data, v)
}

// Problem is an error as one side tells the other.
type Problem struct {
	Text  string `json:"text"`
	Hint  string `json:"hint,omitempty"`
	Class string `json:"class,omitempty"`
}

var classes = map[string]error{
	"host": vm.ErrHost, "notFound": vm.ErrNotFound, "policy": vm.ErrPolicy, "timeout": vm.ErrTimeout, "usage": vm.ErrUsage,
}

// ProblemOf is what to tell of err; nil of none.
func ProblemOf(err error) *Problem {
	if err == nil {
		return nil
	}
	p := &Problem{Text: err.Error(), Hint: vm.Hint(err)}
	for name, class := range classes {
		if errors.Is(err, class) {
			p.Class = name
		}
	}
	return p
}

// Err is the error that was told by another host, fit for a terminal.
func (p *Problem) Err() error {
	if p == nil {
		return nil
	}
	err := errors.New(clean([]byte(p.Text)))
	if class, ok := classes[p.Class]; ok {
		err = vm.Classify(class, err)
	}
	if p.Hint != "" {
		err = vm.WithHint(err, clean([]byte(p.Hint)))
	}
	return err
}

// Reply is the answer to every operation: what it came to, or why not.
type Reply[T any] struct {
	Problem *Problem `json:"problem,omitempty"`
	Value   T        `json:"value"`
}
