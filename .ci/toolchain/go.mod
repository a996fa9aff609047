// Only pins, in go.sum, the toolchain that .ci/go fetches where the
// distribution's Go is older than the project's. Nothing is built here.
module agentvm.invalid/toolchain

go 1.19
