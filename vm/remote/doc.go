// Package remote does on another host, over SSH, what has to be done there:
// it puts this very program there, moves an image and keeps a workspace in
// step, and has that program run commands. What decides about a machine stays
// beside the machine.
//
// The connection is the system's own ssh program's, with the user's
// configuration, keys, agent and known hosts. One handshake serves all: the
// others go through its control socket.
package remote
