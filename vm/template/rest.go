package template

import _ "embed"

// RestScript brings a freshly booted guest to the state that a template is
// saved in. Root runs it in the guest, with the variables user and home set.
//
//go:embed rest.sh
var RestScript string
