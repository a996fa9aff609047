package scripted

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// request is the part of a chat completion request that the script looks at.
type request struct {
	Model         string         `json:"model"`
	Messages      []message      `json:"messages"`
	Tools         []tool         `json:"tools"`
	Stream        bool           `json:"stream"`
	StreamOptions *streamOptions `json:"stream_options"`
}

type streamOptions struct {
	IncludeUsage bool `json:"include_usage"`
}

type message struct {
	Role    string  `json:"role"`
	Content content `json:"content"`
}

// content is a string or a list of typed parts.
type content string

func (c *content) UnmarshalJSON(data []byte) error {
	var s string
	if json.Unmarshal(data, &s) == nil {
		*c = content(s)
		return nil
	}
	var parts []struct {
		Text string `json:"text"`
	}
	if err := json.Unmarshal(data, &parts); err != nil {
		return fmt.Errorf("message content is neither text nor parts: %w", err)
	}
	var b strings.Builder
	for _, p := range parts {
		b.WriteString(p.Text)
	}
	*c = content(b.String())
	return nil
}

type tool struct {
	Function struct {
		Name string `json:"name"`
	} `json:"function"`
}

// answer picks the turn that replies to r.
func (s *Script) answer(r *request) (number int, turn Turn, err error) {
	if r.Model != s.Model {
		return 0, Turn{}, fmt.Errorf("model %q does not exist, only %q does", r.Model, s.Model)
	}
	number = 1
	var since []message // what came after the model's last answer
	for _, m := range r.Messages {
		switch m.Role {
		case "system", "developer": // the agent's own words
		case "assistant":
			number++
			since = nil
		default:
			since = append(since, m)
		}
	}
	if number > len(s.Turns) {
		return number, Turn{}, fmt.Errorf("script has %d turns, turn %d was asked for", len(s.Turns), number)
	}
	turn = s.Turns[number-1]
	if err := turn.check(since, r.Tools); err != nil {
		return number, Turn{}, fmt.Errorf("script turn %d: %w", number, err)
	}
	return number, turn, nil
}

func (t Turn) check(since []message, tools []tool) error {
	if len(since) == 0 {
		return fmt.Errorf("expected a message after the last answer, got none")
	}
	if last := since[len(since)-1]; t.Expect.Role != "" && last.Role != t.Expect.Role {
		return fmt.Errorf("expected a message of role %s, got %s: %.500q", t.Expect.Role, last.Role, last.Content)
	}
	var all strings.Builder
	for _, m := range since {
		all.WriteString(string(m.Content) + "\n")
	}
	for _, want := range t.Expect.Contains {
		if !strings.Contains(all.String(), want) {
			return fmt.Errorf("expected %q, got: %.2000q", want, all.String())
		}
	}
	for _, c := range t.Calls {
		if !slices.ContainsFunc(tools, func(o tool) bool { return o.Function.Name == c.Name }) {
			return fmt.Errorf("tool %s is not among the %d that were offered", c.Name, len(tools))
		}
	}
	return nil
}

// reply is a completion or one chunk of it.
type reply struct {
	ID      string   `json:"id"`
	Object  string   `json:"object"`
	Created int64    `json:"created"`
	Model   string   `json:"model"`
	Choices []choice `json:"choices"`
	Usage   *usage   `json:"usage,omitempty"`
}

type choice struct {
	Index        int     `json:"index"`
	Message      *delta  `json:"message,omitempty"`
	Delta        *delta  `json:"delta,omitempty"`
	FinishReason *string `json:"finish_reason"`
}

type delta struct {
	Role      string     `json:"role,omitempty"`
	Content   *string    `json:"content,omitempty"`
	ToolCalls []toolCall `json:"tool_calls,omitempty"`
}

type toolCall struct {
	Index    *int     `json:"index,omitempty"` // in streams only
	ID       string   `json:"id,omitempty"`
	Type     string   `json:"type,omitempty"`
	Function function `json:"function"`
}

type function struct {
	Name      string `json:"name,omitempty"`
	Arguments string `json:"arguments"`
}

type usage struct {
	PromptTokens     int `json:"prompt_tokens"`
	CompletionTokens int `json:"completion_tokens"`
	TotalTokens      int `json:"total_tokens"`
}

// newUsage estimates four bytes per token: clients want a number, and the
// same one each time.
func newUsage(r *request, t Turn) *usage {
	var u usage
	for _, m := range r.Messages {
		u.PromptTokens += len(m.Content)/4 + 1
	}
	u.CompletionTokens = len(t.Text)/4 + 1
	u.TotalTokens = u.PromptTokens + u.CompletionTokens
	return &u
}

func (t Turn) finishReason() *string {
	reason := "stop"
	if len(t.Calls) > 0 {
		reason = "tool_calls"
	}
	return &reason
}

// toolCalls numbers the turn's calls with ids that are unique in a
// conversation.
func (t Turn) toolCalls(turn int) []toolCall {
	var calls []toolCall
	for i, c := range t.Calls {
		args, _ := json.Marshal(c.Arguments) // checked when the script was read
		if c.Arguments == nil {
			args = []byte("{}")
		}
		calls = append(calls, toolCall{
			ID:       fmt.Sprintf("call_%d_%d", turn, i+1),
			Type:     "function",
			Function: function{Name: c.Name, Arguments: string(args)},
		})
	}
	return calls
}
