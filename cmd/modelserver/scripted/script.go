// Package scripted is a model server that follows a script, for tests and
// the demo: it speaks OpenAI's chat completions protocol and says, turn by
// turn, what the script says, so that a real coding agent can be driven
// through real work without a model.
//
// It promises:
//
//   - It keeps no state between requests. The turn to answer is the number of
//     assistant messages in the request, so that a repeated request gets the
//     same answer and two conversations at once do not disturb each other.
//   - A conversation that leaves the script is answered with status 400 and
//     a message that says what was expected and what came: never with a guess.
//   - Streams are real ones: one server-sent event per delta, flushed at once,
//     tool calls in fragments, as https://platform.openai.com/docs/api-reference/chat-streaming
//     describes them.
package scripted

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/goccy/go-yaml"
)

// Script is a whole conversation from the model's side.
type Script struct {
	Model string `yaml:"model"`
	Turns []Turn `yaml:"turns"`
}

// Turn is one answer of the model.
type Turn struct {
	Expect Expect `yaml:"expect"`
	Text   string `yaml:"text"`
	Calls  []Call `yaml:"calls"`
}

// Expect says what must have come since the model's last answer.
type Expect struct {
	Role     string   `yaml:"role"`     // of the last message: user or tool
	Contains []string `yaml:"contains"` // in the text of the messages since then
}

// Call is one tool call.
type Call struct {
	Name      string         `yaml:"name"`
	Arguments map[string]any `yaml:"arguments"`
}

// Load reads a script from a YAML or JSON file.
func Load(path string) (*Script, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read script: %w", err)
	}
	s, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("read script %s: %w", path, err)
	}
	return s, nil
}

// Parse reads a script strictly: an unknown key is an error.
func Parse(data []byte) (*Script, error) {
	var s Script
	if err := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict()).Decode(&s); err != nil {
		return nil, err
	}
	return &s, s.validate()
}

func (s *Script) validate() error {
	if s.Model == "" {
		return errors.New("model has no name")
	}
	if len(s.Turns) == 0 {
		return errors.New("script has no turns")
	}
	for i, t := range s.Turns {
		if t.Text == "" && len(t.Calls) == 0 {
			return fmt.Errorf("turn %d says and calls nothing", i+1)
		}
		if r := t.Expect.Role; r != "" && r != "user" && r != "tool" {
			return fmt.Errorf("turn %d expects role %q, not user or tool", i+1, r)
		}
		for _, c := range t.Calls {
			if c.Name == "" {
				return fmt.Errorf("turn %d has a call without a name", i+1)
			}
			if _, err := json.Marshal(c.Arguments); err != nil {
				return fmt.Errorf("turn %d: arguments of %s: %w", i+1, c.Name, err)
			}
		}
	}
	return nil
}
