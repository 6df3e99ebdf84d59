# The two commands a newcomer needs: `make demo` and `make test`.
.PHONY: demo test setup build lint clean

CARGO ?= cargo
# A program of tests that hangs is ended with its name, and the others still run; the longest takes 3 minutes.
TEST := $(CARGO) --config 'target."cfg(unix)".runner = "timeout --foreground --verbose --kill-after=30 900"' test --release

demo: build
	@scripts/demo.sh

build: setup
	@$(CARGO) build --release --quiet -p tsm-launch -p tsm-trainer -p tsm-data

setup:
	@scripts/setup.sh build

test:
	@scripts/setup.sh test
	benchmarks/peers/smoke_test.sh
	$(TEST) -p tsm-trainer --features mpi --lib --test mpi
	$(TEST) --workspace --no-fail-fast

lint:
	@scripts/setup.sh build
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	if command -v mpicc >/dev/null; then $(CARGO) clippy --release -p tsm-trainer --features mpi --all-targets -- -D warnings; fi

clean:
	rm -rf target runs data/demo
