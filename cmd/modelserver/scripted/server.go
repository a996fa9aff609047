package scripted

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"unicode/utf8"
)

// created is every answer's time stamp: the same answer has the same bytes.
const created = 1_700_000_000

// maxRequest bounds the body of a request; agents send the whole
// conversation each time.
const maxRequest = 64 << 20

// Handler serves s under /v1. It logs one line per request.
func Handler(s *Script, log *slog.Logger) http.Handler {
	h := &handler{script: s, log: log}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/models", h.models)
	mux.HandleFunc("POST /v1/chat/completions", h.complete)
	return mux
}

type handler struct {
	script *Script
	log    *slog.Logger
}

func (h *handler) models(w http.ResponseWriter, _ *http.Request) {
	h.writeJSON(w, http.StatusOK, map[string]any{
		"object": "list",
		"data": []map[string]any{
			{"id": h.script.Model, "object": "model", "created": created, "owned_by": "script"},
		},
	})
}

func (h *handler) complete(w http.ResponseWriter, r *http.Request) {
	var req request
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(&req); err != nil {
		h.refuse(w, fmt.Errorf("read request: %w", err))
		return
	}
	number, turn, err := h.script.answer(&req)
	if err != nil {
		h.refuse(w, err)
		return
	}
	h.log.Info("answer", "turn", number, "of", len(h.script.Turns), "messages", len(req.Messages),
		"calls", len(turn.Calls), "stream", req.Stream)
	out := reply{ID: fmt.Sprintf("chatcmpl-%d", number), Created: created, Model: h.script.Model}
	if req.Stream {
		err = stream(w, &req, out, number, turn)
	} else {
		h.writeWhole(w, &req, out, number, turn)
	}
	if err != nil {
		h.log.Warn("stream", "turn", number, "error", err)
	}
}

func (h *handler) writeWhole(w http.ResponseWriter, req *request, out reply, number int, turn Turn) {
	out.Object = "chat.completion"
	out.Usage = newUsage(req, turn)
	out.Choices = []choice{{
		Message:      &delta{Role: "assistant", Content: &turn.Text, ToolCalls: turn.toolCalls(number)},
		FinishReason: turn.finishReason(),
	}}
	h.writeJSON(w, http.StatusOK, out)
}

// refuse answers with 400, which clients show and do not try again.
func (h *handler) refuse(w http.ResponseWriter, err error) {
	h.log.Error("refused", "error", err)
	h.writeJSON(w, http.StatusBadRequest, map[string]any{
		"error": map[string]any{"message": err.Error(), "type": "invalid_request_error", "code": "script_mismatch"},
	})
}

func (h *handler) writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		h.log.Warn("write answer", "error", err)
	}
}

// stream sends the turn as server-sent events, a few characters at a time.
func stream(w http.ResponseWriter, req *request, out reply, number int, turn Turn) error {
	flusher, ok := w.(http.Flusher)
	if !ok {
		return errors.New("connection cannot be flushed")
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-cache")
	out.Object = "chat.completion.chunk"
	send := func(choices []choice, u *usage) error {
		out.Choices, out.Usage = choices, u
		data, err := json.Marshal(out)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(w, "data: %s\n\n", data); err != nil {
			return err
		}
		flusher.Flush()
		return nil
	}
	for _, d := range turn.deltas(number) {
		if err := send([]choice{{Delta: &d}}, nil); err != nil {
			return err
		}
	}
	if err := send([]choice{{Delta: &delta{}, FinishReason: turn.finishReason()}}, nil); err != nil {
		return err
	}
	if req.StreamOptions != nil && req.StreamOptions.IncludeUsage {
		if err := send([]choice{}, newUsage(req, turn)); err != nil {
			return err
		}
	}
	_, err := io.WriteString(w, "data: [DONE]\n\n")
	return err
}

// deltas cuts the turn into the pieces that a stream sends. The first names
// the role; a tool call's first piece has its id and name and its later ones
// only more of the arguments.
func (t Turn) deltas(number int) []delta {
	empty := ""
	out := []delta{{Role: "assistant", Content: &empty}}
	for _, piece := range pieces(t.Text) {
		out = append(out, delta{Content: &piece})
	}
	for i, call := range t.toolCalls(number) {
		head := call
		head.Index, head.Function.Arguments = &i, ""
		out = append(out, delta{ToolCalls: []toolCall{head}})
		for _, piece := range pieces(call.Function.Arguments) {
			out = append(out, delta{ToolCalls: []toolCall{{Index: &i, Function: function{Arguments: piece}}}})
		}
	}
	return out
}

// pieces cuts s into parts of about sixteen bytes, never inside a character.
func pieces(s string) []string {
	const size = 16
	var out []string
	for len(s) > size {
		n := size
		for n < len(s) && !utf8.RuneStart(s[n]) {
			n++
		}
		out = append(out, s[:n])
		s = s[n:]
	}
	if s != "" {
		out = append(out, s)
	}
	return out
}
