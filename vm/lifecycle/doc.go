// Package lifecycle takes a project from its configuration to a running
// machine and back: find what is asked for, decide what to run, make the
// files that it needs, start its supervisor, and end it all again.
//
// Finding (project.go, host.go) reads, deciding (resolve.go) is pure, acting
// (prepare.go, up.go, down.go) changes the host. An instance whose creation
// fails leaves nothing behind.
package lifecycle
