package scripted

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const testScript = `
model: m
turns:
  - expect: {role: user, contains: [fix]}
    text: "Looking at it now — ääääääääääääääää."
    calls:
      - {name: bash, arguments: {command: "make test"}}
      - {name: read, arguments: {path: a.txt}}
  - expect: {role: tool, contains: [ok, lines]}
    text: Done.
`

func newServer(t *testing.T) *httptest.Server {
	t.Helper()
	s, err := Parse([]byte(testScript))
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(Handler(s, slog.New(slog.DiscardHandler)))
	t.Cleanup(server.Close)
	return server
}

const (
	tools      = `"tools":[{"type":"function","function":{"name":"bash"}},{"type":"function","function":{"name":"read"}}]`
	firstTurn  = `{"role":"system","content":"s"},{"role":"user","content":[{"type":"text","text":"please fix"}]}`
	secondTurn = firstTurn + `,{"role":"assistant","content":null,"tool_calls":[]},
		{"role":"tool","content":"ok","tool_call_id":"call_1_1"},{"role":"tool","content":"two lines"}`
)

// post sends a request with the given messages and extra fields.
func post(t *testing.T, server *httptest.Server, messages string, extra ...string) (int, string) {
	t.Helper()
	fields := append([]string{`"model":"m"`, `"messages":[` + messages + `]`}, extra...)
	resp, err := http.Post(server.URL+"/v1/chat/completions", "application/json", strings.NewReader("{"+strings.Join(fields, ",")+"}"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestWhole(t *testing.T) {
	server := newServer(t)
	status, body := post(t, server, firstTurn, tools)
	var got reply
	if err := json.Unmarshal([]byte(body), &got); err != nil || status != 200 {
		t.Fatalf("status %d, %v: %s", status, err, body)
	}
	want := []toolCall{
		{ID: "call_1_1", Type: "function", Function: function{"bash", `{"command":"make test"}`}},
		{ID: "call_1_2", Type: "function", Function: function{"read", `{"path":"a.txt"}`}},
	}
	if diff := cmp.Diff(want, got.Choices[0].Message.ToolCalls); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	if *got.Choices[0].FinishReason != "tool_calls" {
		t.Errorf("finish reason is %s", *got.Choices[0].FinishReason)
	}
	if _, again := post(t, server, firstTurn, tools); again != body {
		t.Error("the same request got another answer")
	}
}

// TestStream puts the deltas together as a client does.
func TestStream(t *testing.T) {
	server := newServer(t)
	status, body := post(t, server, firstTurn, tools, `"stream":true`, `"stream_options":{"include_usage":true}`)
	if status != 200 {
		t.Fatalf("status %d: %s", status, body)
	}
	var text, finish string
	calls := map[int]*function{}
	var events, usages int
	var done bool
	scanner := bufio.NewScanner(strings.NewReader(body))
	for scanner.Scan() {
		data, ok := strings.CutPrefix(scanner.Text(), "data: ")
		if !ok {
			continue
		}
		if data == "[DONE]" {
			done = true
			continue
		}
		events++
		var chunk reply
		if err := json.Unmarshal([]byte(data), &chunk); err != nil {
			t.Fatalf("%v: %s", err, data)
		}
		if chunk.Usage != nil {
			usages++
		}
		for _, c := range chunk.Choices {
			if c.FinishReason != nil {
				finish = *c.FinishReason
			}
			if c.Delta.Content != nil {
				text += *c.Delta.Content
			}
			for _, call := range c.Delta.ToolCalls {
				if call.ID != "" {
					calls[*call.Index] = &function{Name: call.Function.Name}
				}
				calls[*call.Index].Arguments += call.Function.Arguments
			}
		}
	}
	if text != "Looking at it now — ääääääääääääääää." || finish != "tool_calls" || !done || usages != 1 || events < 8 {
		t.Errorf("text %q, finish %q, done %v, usages %d, events %d", text, finish, done, usages, events)
	}
	want := map[int]*function{0: {"bash", `{"command":"make test"}`}, 1: {"read", `{"path":"a.txt"}`}}
	if diff := cmp.Diff(want, calls); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
}

func TestSecondTurn(t *testing.T) {
	status, body := post(t, newServer(t), secondTurn)
	if status != 200 || !strings.Contains(body, `"Done."`) || !strings.Contains(body, `"finish_reason":"stop"`) {
		t.Errorf("status %d: %s", status, body)
	}
}

func TestRefusals(t *testing.T) {
	server := newServer(t)
	tests := []struct {
		name, messages, want string
		extra                []string
	}{
		{"wrong text", `{"role":"user","content":"hello"}`, "script turn 1: expected \\\"fix\\\", got", []string{tools}},
		{"wrong role", strings.ReplaceAll(secondTurn, `"tool"`, `"user"`), "expected a message of role tool, got user", nil},
		{"tool not offered", firstTurn, "tool bash is not among the 0", nil},
		{"past the end", secondTurn + `,{"role":"assistant","content":"x"},{"role":"user","content":"more"}`, "script has 2 turns", nil},
		{"other model", firstTurn, "model \\\"other\\\" does not exist", []string{`"model":"other"`}},
		{"nonsense", `{"role":"user","content":7}`, "read request", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			status, body := post(t, server, tt.messages, tt.extra...)
			if status != 400 || !strings.Contains(body, tt.want) || !strings.Contains(body, "script_mismatch") {
				t.Errorf("status %d: %s", status, body)
			}
		})
	}
}

func TestModels(t *testing.T) {
	resp, err := http.Get(newServer(t).URL + "/v1/models")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if !bytes.Contains(body, []byte(`"id":"m"`)) {
		t.Errorf("models: %s", body)
	}
}

func TestParseRefuses(t *testing.T) {
	for _, script := range []string{
		"turns: [{text: a}]",
		"model: m",
		"model: m\nturns: [{}]",
		"model: m\nturns: [{text: a, typo: b}]",
		"model: m\nturns: [{calls: [{arguments: {}}]}]",
		"model: m\nturns: [{text: a, expect: {role: system}}]",
	} {
		if _, err := Parse([]byte(script)); err == nil {
			t.Errorf("accepted:\n%s", script)
		}
	}
}

// TestDemoScript keeps the demo's script readable.
func TestDemoScript(t *testing.T) {
	if _, err := Load("../../../examples/demo/model.yaml"); err != nil {
		t.Error(err)
	}
}
