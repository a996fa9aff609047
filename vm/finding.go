package vm

// Finding is one thing that a check of the host saw. Checks only look; the
// doctor command prints what they found and the command that fixes it.
type Finding struct {
	Name   string        `json:"name"`             // what was looked at, a few words
	Status FindingStatus `json:"status"`           //
	Detail string        `json:"detail,omitempty"` // what was seen
	Fix    string        `json:"fix,omitempty"`    // a command or a setting that mends it
}

// FindingStatus grades a Finding.
type FindingStatus string

const (
	FindingOK   FindingStatus = "ok"
	FindingWarn FindingStatus = "warn" // works, with something lost
	FindingFail FindingStatus = "fail" // agentvm up cannot work
)
