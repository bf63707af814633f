# The two commands: make demo, make test. Each makes .venv and installs the pinned packages by itself.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test check bench evidence mutants faults chaos clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -e '.[cpu,dev]'
	touch $@

# Seven simulated days, a local Ray with two workers, one night over all of them.
demo: $(VENV)/installed
	test -d $(DEMO)/truth || $(BIN)/daybreak simulate $(DEMO) --days 7
	$(BIN)/daybreak nightly configs/demo.yaml --truth $(DEMO)

test: $(VENV)/installed
	$(BIN)/python -m pytest

# Format, lint, types, architecture, fast tests.
check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not slow and not ray"

# Ours and its peers: real data (DATA=folder with day=.../), which rewrites docs/results.md; then the embedding store, and snapshots.
bench: $(VENV)/installed
	$(BIN)/pip install --quiet lightgbm
	$(BIN)/python -m benchmarks.globo_peers --data $(DATA) --json $(VENV)/peers.json
	$(BIN)/python -m benchmarks.globo --data $(DATA) --peers $(VENV)/peers.json
	$(BIN)/pip install --quiet --no-deps -r benchmarks/torchrec.txt
	$(BIN)/python -m benchmarks.embeddings
	$(BIN)/python -m benchmarks.saving

# Claims of the literature, measured again: rewrites docs/evidence.md. Goes on where it was stopped.
evidence: $(VENV)/installed
	$(BIN)/pip install --quiet lightgbm
	$(BIN)/python -m benchmarks.evidence

# Wrong versions of the techniques, most of them shipped by somebody: do the tests see each?
mutants: $(VENV)/installed
	$(BIN)/python tests/mutants.py

# A night killed at each of a hundred points, then the same command again: is all as if nothing had happened?
faults: $(VENV)/installed
	$(BIN)/python -m pytest -q tests/faults/test_kill_points.py --faults

# Fifteen days on a small Ray cluster while workers, nodes, drivers, disks and storage fail: about 20 minutes.
chaos: $(VENV)/installed
	PYTHONPATH=.:tests $(BIN)/python -m faults.chaos

clean:
	rm -rf $(VENV) $(DEMO)
