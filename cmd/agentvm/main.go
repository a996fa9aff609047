// Command agentvm runs coding agents in virtual machines of their own.
package main

import "os"

func main() {
	os.Exit(Main(os.Args))
}
