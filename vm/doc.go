// Package vm holds the words that every other package shares: the neutral
// description of a machine, the classes of errors, the findings of host
// checks, instance names and process identities. It imports nothing of ours.
package vm
