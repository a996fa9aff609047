package helper

import (
	"encoding/json"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/agentvm/agentvm/vm"
)

const goodBind = `{"version":1,"do":"bind","devices":["0000:01:00.0"],"name":"machine x","process":{"pid":7,"start":9}}`

func TestDecode(t *testing.T) {
	for _, good := range []string{goodBind,
		`{"version":1,"do":"release","devices":["10000:01:00.0","0000:02:00.7"]}`,
		`{"version":1,"do":"bind","devices":["` + vgpu + `","0000:01:00.0"],"name":"machine x","process":{"pid":7,"start":9}}`,
		`{"version":1,"do":"release","devices":["` + vgpu + `"]}`,
		`{"version":1,"do":"recover"}` + "\n",
	} {
		if _, err := decode(strings.NewReader(good)); err != nil {
			t.Error(good, err)
		}
	}
	for bad, says := range map[string]string{
		``: "EOF", `[]`: "read the request", `{}`: "version 0", `{"version":1}`: "none that is known",
		`{"version":1,"do":"write"}`:                                                                                   "none that is known",
		goodBind + `{}`:                                                                                                "something follows",
		`{"version":1,"do":"recover","path":"/etc/shadow"}`:                                                            "unknown field",
		`{"version":1,"do":"recover","devices":["0000:01:00.0"]}`:                                                      "names no device",
		`{"version":1,"do":"recover","name":"x"}`:                                                                      "names no owner",
		`{"version":1,"do":"recover","plain":true}`:                                                                    "names no driver",
		`{"version":1,"do":"bind","name":"x"}`:                                                                         "names 1 to",
		`{"version":1,"do":"bind","name":"x","devices":["auto"]}`:                                                      "not the address",
		`{"version":1,"do":"bind","name":"x","devices":["0000:01:00.0/../../x"]}`:                                      "not the address",
		`{"version":1,"do":"bind","name":"x","devices":["0000:01:00.0\n"]}`:                                            "not the address",
		`{"version":1,"do":"bind","name":"x","devices":["` + strings.ToUpper(vgpu) + `"]}`:                             "not the address",
		`{"version":1,"do":"bind","name":"x","devices":["` + vgpu + `/../x"]}`:                                         "not the address",
		`{"version":1,"do":"bind","name":"x","devices":["` + vgpu + `\n"]}`:                                            "not the address",
		`{"version":1,"do":"bind","name":"x","devices":["` + vgpu[1:] + `"]}`:                                          "not the address",
		`{"version":1,"do":"bind","devices":["0000:01:00.0"]}`:                                                         "not the name",
		`{"version":1,"do":"bind","name":"a\nb","devices":["0000:01:00.0"]}`:                                           "not the name",
		`{"version":1,"do":"bind","name":"x","devices":["0000:01:00.0"],"force":1}`:                                    "unknown field",
		`{"version":1,"do":"bind","name":"x","devices":["0000:01:00.0"],"process":{"pid":-1,"start":0}}`:               "no process",
		strings.Repeat(" ", maxRequest) + goodBind:                                                                     "longer than",
		`{"version":1,"do":"release","devices":[` + strings.Repeat(`"0000:01:00.0",`, maxDevices) + `"0000:01:00.0"]}`: "names 1 to",
	} {
		if req, err := decode(strings.NewReader(bad)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%.80s: %+v, %v; want %q", bad, req, err, says)
		}
	}
}

// TestSilentCaller: a request that never ends is given up.
func TestSilentCaller(t *testing.T) {
	r, w := io.Pipe()
	defer w.Close()
	if _, err := decodeWithin(r, 20*time.Millisecond); err == nil || !strings.Contains(err.Error(), "no request came") {
		t.Error(err)
	}
}

// FuzzDecode: what is accepted holds nothing but what a request may.
func FuzzDecode(f *testing.F) {
	f.Add([]byte(goodBind))
	f.Add([]byte(`{"version":1,"do":"recover"}`))
	f.Add([]byte(`{"version":1,"do":"bind","devices":["` + vgpu + `"],"name":"x"}`))
	f.Add([]byte(`{"version":1,"do":"release","devices":["0000:01:00.0"],"devices":["x"]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		req, err := decode(strings.NewReader(string(data)))
		if err != nil {
			return
		}
		if strings.ContainsAny(strings.Join(req.Devices, "")+req.Name+req.Do, "/\\\n\x00\x1b\"'`$") || len(req.Devices) > maxDevices || req.Do == recoverStale && len(req.Devices) > 0 {
			t.Errorf("%+v", req)
		}
		again, err := json.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decode(strings.NewReader(string(again))); err != nil {
			t.Errorf("%s: %v", again, err)
		}
	})
}

// FuzzAnswer: whatever the helper is said to have answered, reading it ends in
// an answer or an error.
func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"outcomes":[{"address":"a","action":"restored","detail":"d"}]}`))
	f.Add([]byte(`{"error":"no","hint":"yes","class":"policy"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if a, err := read(data); err == nil && a.Error != "" {
			t.Errorf("%+v", a)
		} else if err != nil && vm.Hint(err) != a.Hint {
			t.Errorf("%+v, %v", a, err)
		}
	})
}
