# The two commands a newcomer needs: `make demo` and `make test`.
.PHONY: demo test setup build lint clean

CARGO ?= cargo

demo: build
	@scripts/demo.sh

build: setup
	@$(CARGO) build --release --quiet -p tsm-launch -p tsm-trainer -p tsm-data

setup:
	@scripts/setup.sh build

test:
	@scripts/setup.sh test
	benchmarks/peers/smoke_test.sh
	$(CARGO) test --release -p tsm-trainer --features mpi --lib --test mpi
	$(CARGO) test --release --workspace --no-fail-fast

lint:
	@scripts/setup.sh build
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	if command -v mpicc >/dev/null; then $(CARGO) clippy --release -p tsm-trainer --features mpi --all-targets -- -D warnings; fi

clean:
	rm -rf target runs data/demo
