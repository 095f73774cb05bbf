# For GNU make. All targets need Go. Targets that need PostgreSQL find or create a server: see scripts/with-postgres.
SHELL := /bin/sh
.DEFAULT_GOAL := help
GO ?= go
WITH_POSTGRES := scripts/with-postgres
WITH_PEERS := scripts/with-peers

.PHONY: help test test-matrix demo demo-postgres lint fuzz bench bench-peers size model chaos compose-check release-check ci clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' Makefile

test: ## all tests of all modules, with the race detector and a real PostgreSQL
	$(WITH_POSTGRES) scripts/test

test-matrix: ## the tests against every PostgreSQL version that is at hand (VERSIONS="15 17" picks)
	scripts/test-matrix

demo: ## the webhook demo on the fake provider
	$(GO) run ./examples/webhook/demo

demo-postgres: ## the webhook demo on PostgreSQL
	$(WITH_POSTGRES) $(GO) run ./examples/webhook/demo -postgres

lint: ## gofmt, go vet and staticcheck over all modules
	scripts/lint

fuzz: ## every fuzz target for a few seconds (FUZZTIME=1m for longer)
	scripts/fuzz

bench: ## the benchmark against PostgreSQL
	$(WITH_POSTGRES) $(GO) run ./internal/bench

bench-peers: ## the same work on Redis, etcd and advisory locks (ARGS=-quick for a look)
	cd peers && LOCKER_POSTGRES_VIA="$${LOCKER_POSTGRES_VIA:-programs packages}" ../$(WITH_PEERS) ../$(WITH_POSTGRES) $(GO) run . $(ARGS)

size: ## what a ten-line program costs with Datadog and without it
	$(WITH_POSTGRES) $(GO) run ./internal/size

model: ## check the model of the protocol
	scripts/model

chaos: ## crash and cut things at random (SEED=n repeats a run)
	cd chaos && ../$(WITH_POSTGRES) env SEED="$(SEED)" $(GO) run ./cmd/driver

compose-check: ## validate docker-compose.yml, without Docker
	cd tools && $(GO) run ./composecheck ../docker-compose.yml

release-check: ## build a program outside the repository against the last commit, as a module proxy serves it
	scripts/release-check

ci: ## what continuous integration runs
	.ci/run

clean: ## remove what the targets leave behind
	rm -rf .cache
	find . -name '*.test' -type f -delete
	find . -name '*.out' -type f -delete
