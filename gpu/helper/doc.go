// Package helper lets an ordinary user take the cards that root has allowed
// them, and nothing else: a program that sudo or pkexec runs as root for one
// request.
//
// The attacker is the user who calls it. It promises:
//
//   - It does what a request of this form can ask for: bind, release, recover.
//     A request is JSON of a bounded size, read strictly and within a deadline.
//   - Who asks is what sudo or pkexec says, never the request.
//   - /etc/agentvm/gpu.yaml says which user may take which device. Where it is
//     missing, is not root's, can be written by others or cannot be read,
//     nobody may. Functions of a slot that are neither named nor part of a card
//     are refused with it.
//   - All of package gpu's checks are made here again, and none can be overruled.
//   - A mediated device goes to who may take it or its card. It is never made or
//     removed here.
//   - A device goes to the user who asked. Another's is not given back.
//   - Each request is in the audit log before anything is done, and its result
//     after it. Where the log cannot be written, nothing is done.
//   - Nothing of the caller's surroundings counts: environment, limits, control
//     group, working directory, umask, or signals of their terminal that stop
//     a process.
package helper
