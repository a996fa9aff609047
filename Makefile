# agentvm. `make` alone tells what can be made.
#
# On a fresh Debian machine two commands are enough, each from a clean clone
# and in any order: `make demo` and `make test`. They install what is missing.

GO      := .ci/go
CACHE   := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)
ROOT    := $(filter 0,$(shell id -u))
PREFIX  ?= $(if $(ROOT),/usr/local,$(HOME)/.local)
PKG     ?= ./...
RUN     ?= .
BENCH   ?= .
TIMEOUT ?= 60m
GUEST   ?= images/recipe/rootfs/usr/lib/guest/sshd

# Programs that deps unpacks for the tests, and sbin, which Debian leaves out
# of an ordinary user's PATH.
export PATH := $(PATH):/usr/sbin:/sbin:$(CACHE)/agentvm-build/tools/bin

# Images that tests build are kept between runs, for root where the ordinary
# users that root's VMs run as can reach them.
export AGENTVM_TEST_CACHE ?= $(if $(ROOT),/var/cache,$(CACHE))/agentvm-test

# A clone that git refuses to read (another owner's) builds without a revision.
BUILDVCS := $(if $(shell git rev-parse HEAD 2>/dev/null),auto,false)
VERSION  := $(patsubst v%,%,$(shell git describe --tags --dirty --match 'v[0-9]*' 2>/dev/null))
LDFLAGS  := $(if $(VERSION),-ldflags '-X main.version=$(VERSION)')

.DEFAULT_GOAL := help
.NOTPARALLEL: # what a target needs is installed first
.PHONY: help deps deps-demo deps-test guest build install demo test test-unit test-user test-gpu test-gpu-kernel lint bench completion clean

help: ## say what can be made
	@echo 'usage: make TARGET'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo 'make test PKG=./vm/qemu RUN=TestBoot   only these tests'
	@echo 'make install PREFIX=DIR                default: $(PREFIX)'

deps: ## install what running and building agentvm needs and this machine lacks
	@.ci/deps run build

deps-demo:
	@.ci/deps run build demo

deps-test:
	@.ci/deps run build test

# Part of the image recipe, and so of agentvm. The same source and Go make the
# same file wherever: images are named by what is in them.
guest: ## build the program that guests run, which agentvm carries
	CGO_ENABLED=0 GOAMD64=v1 GOARM64=v8.0 GOFLAGS=-mod=readonly $(GO) build -trimpath -buildvcs=false -ldflags='-s -w' -o $(GUEST) ./cmd/sshd

build: guest ## build bin/agentvm
	CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=$(BUILDVCS) $(LDFLAGS) -o bin/ ./cmd/agentvm

install: build ## install agentvm and its shell completions below PREFIX
	install -D -m 755 bin/agentvm '$(DESTDIR)$(PREFIX)/bin/agentvm'
	install -d '$(DESTDIR)$(PREFIX)/share/bash-completion/completions' \
		'$(DESTDIR)$(PREFIX)/share/zsh/site-functions' '$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d'
	bin/agentvm completion bash >'$(DESTDIR)$(PREFIX)/share/bash-completion/completions/agentvm'
	bin/agentvm completion zsh >'$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_agentvm'
	bin/agentvm completion fish >'$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/agentvm.fish'

demo: deps-demo ## a real agent changes a real file from inside a real VM
	@examples/demo/run.sh

# Packages that boot VMs are slow and heavy: -p 2 keeps a small machine usable.
test: deps-test guest ## run all tests, with the race detector, VMs included
	$(GO) test -race -p 2 -timeout $(TIMEOUT) -run '$(RUN)' -skip '$(SKIP)' $(PKG)

test-unit: guest ## run the tests that take seconds: no VM, no image
	$(GO) test -short -timeout 5m -run '$(RUN)' $(PKG)

test-user: deps-test ## run all tests as an ordinary user (as root: a throwaway one)
	@.ci/test-user

test-gpu: deps-test guest ## give a machine a card of a host that is a machine with an IOMMU: no GPU needed
	$(GO) test -race -timeout $(TIMEOUT) ./gpu/...
	$(GO) test -race -timeout $(TIMEOUT) -v -run 'Rig' ./cmd/agentvm
	$(GO) test -race -timeout $(TIMEOUT) -run 'Devices|Room|Lock|LargeRegions|NearMemory|HugePages' ./vm/...

test-gpu-kernel: ## the same with IOMMUFD, mediated devices and a graphics driver: builds a kernel first, some minutes
	@.ci/deps run build test kernel
	@$(MAKE) --no-print-directory guest
	CI=true $(GO) test -race -tags rigkernel -timeout $(TIMEOUT) -v -run TestGPUKernelRig ./cmd/agentvm

lint: ## vet, staticcheck, formatting, tidiness, known vulnerabilities
	@.ci/lint

bench: deps-test build ## measure: cold and warm starts, exec, idle cost, file sharing, network
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchmem -p 1 -timeout 60m $(PKG)

completion: build ## print bash completion (zsh and fish: agentvm completion)
	@bin/agentvm completion bash

clean: ## remove what make built here; images and VMs are agentvm's to remove
	rm -rf bin $(GUEST)
