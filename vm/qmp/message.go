package qmp

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/digitalocean/go-qemu/qmp"
)

// MaxMessage bounds one message from QEMU, in bytes. The largest known reply,
// query-qmp-schema's, has about 200 KiB; a stream that never ends its line is
// an attack or a bug.
const MaxMessage = 64 << 20

var errMessageTooLong = errors.New("message longer than the limit")

// message is anything QEMU sends: its greeting, an event or a reply.
type message struct {
	Greeting *greeting       `json:"QMP"`
	Event    string          `json:"event"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	ID json.RawMessage `json:"id"`

	line []byte // the message as it came
}

type greeting struct {
	Version qmp.Version `json:"version"`
}

// readMessage reads one line of at most limit bytes. Every message has its
// own memory.
func readMessage(r *bufio.Reader, limit int) (message, error) {
	for {
		line, err := readLine(r, limit)
		if err != nil {
			return message{}, err
		}
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		return decode(line)
	}
}

func readLine(r *bufio.Reader, limit int) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > limit {
			return nil, fmt.Errorf("%w of %d bytes", errMessageTooLong, limit)
		}
		line = append(line, part...)
		switch {
		case err == nil:
			return line, nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

func decode(line []byte) (message, error) {
	m := message{line: line}
	if err := json.Unmarshal(line, &m); err != nil {
		return message{}, fmt.Errorf("malformed message %.80q: %w", line, err)
	}
	if m.Greeting == nil && m.Event == "" && m.Return == nil && m.Error == nil {
		return message{}, fmt.Errorf("message %.80q is neither greeting, event nor reply", line)
	}
	return m, nil
}

// decodeEvent reads the event a message holds.
func decodeEvent(m message) (qmp.Event, error) {
	var ev qmp.Event
	if err := json.Unmarshal(m.line, &ev); err != nil {
		return ev, fmt.Errorf("malformed event %.80q: %w", m.line, err)
	}
	return ev, nil
}

// encodeCommand gives a command our id and returns it as one line, with the
// command's name.
func encodeCommand(command []byte, id string) (line []byte, name string, err error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(command, &fields); err != nil {
		return nil, "", fmt.Errorf("command %.80q: %w", command, err)
	}
	if err := json.Unmarshal(fields["execute"], &name); err != nil || name == "" {
		return nil, "", fmt.Errorf("command %.80q names nothing to execute", command)
	}
	if fields["id"], err = json.Marshal(id); err != nil {
		return nil, "", err
	}
	line, err = json.Marshal(fields)
	if err != nil {
		return nil, "", fmt.Errorf("command %s: %w", name, err)
	}
	return append(line, '\n'), name, nil
}
