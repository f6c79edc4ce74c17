# make demo and make test set everything up in $(VENV) first, and again only when something changed.
#   PYTHON   makes the virtual environment
#   TORCH    requirement that chooses PyTorch, such as torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
TORCH_STAMP := $(STAMPS)/$(subst =,_,$(subst >,_,$(subst <,_,$(TORCH))))
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)
CPP_SOURCES := $(filter %.h %.cpp %.cu %.cuh,$(SOURCES)) $(shell find benchmarks tests -name "*.cpp" -o -name "*.h")

.PHONY: demo test test-all mutants bench bench-cuda first-contact sanitize sanitize-cuda test-aarch64 lint format clean
.DEFAULT_GOAL := demo

demo: $(STAMPS)/built $(STAMPS)/extra-demo
	$(BIN)/python -m shufflenet_ext demo

# The tests, in two halves side by side, as a test works on one core mostly: what the one says comes behind the other's.
# test-all adds what is marked long: every value of each test's matrix beside every other, and what takes a minute.
TESTS := $(wildcard tests/test_*.py)
HALF := $(filter $(patsubst %,tests/test_%.py,cuda% fuse match compile% norms onnx transforms chain),$(TESTS))
test-all: MARKS := -m "" --durations=15
test test-all: $(STAMPS)/built $(STAMPS)/extra-test $(STAMPS)/extra-demo
	@$(BIN)/python -m pytest $(MARKS) $(HALF) > $(STAMPS)/half.log 2>&1 & half=$$!; \
	$(BIN)/python -m pytest $(MARKS) -p no:cacheprovider $(filter-out $(HALF),$(TESTS)); rest=$$?; \
	wait $$half; half=$$?; cat $(STAMPS)/half.log; exit $$((half | rest))

# Plants faults, one at a time, and expects the tests to fail on each; see docs/mutants.md.
mutants: $(STAMPS)/extra-test $(STAMPS)/extra-demo
	$(BIN)/python tests/mutants.py

bench: $(STAMPS)/built $(STAMPS)/extra-bench
	$(BIN)/python -m benchmarks

bench-cuda: $(STAMPS)/built $(STAMPS)/extra-bench
	$(BIN)/python -m benchmarks.cuda

# What a card shows within eight minutes, with the torch of $(PYTHON); see docs/first-contact.md. OUT: the results' folder.
first-contact:
	$(PYTHON) -m benchmarks.first_contact $(if $(OUT),--output "$(OUT)")

# AddressSanitizer and UndefinedBehaviorSanitizer over the torch-free kernels, ThreadSanitizer over the threads' phases.
sanitize:
	sh tests/native/run_sanitized.sh
	sh tests/native/run_races.sh

# The same for AArch64 under qemu.
test-aarch64:
	sh tests/native/run_aarch64.sh

# compute-sanitizer over the CUDA kernels.
sanitize-cuda: $(STAMPS)/built $(STAMPS)/extra-test
	sh tests/cuda/run_sanitized.sh $(BIN)/python

lint: $(STAMPS)/extra-lint $(STAMPS)/extra-test $(STAMPS)/extra-demo
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

format: $(STAMPS)/extra-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

clean:
	rm -rf build dist *.egg-info shufflenet_ext/*.so $(STAMPS)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The build's own requirements, as in pyproject.toml: without build isolation, the library is built against this torch.
$(TORCH_STAMP): | $(VENV)/bin/python
	$(PIP) install --quiet "$(TORCH)" "setuptools>=77" ninja "pybind11>=2.13"
	rm -rf $(STAMPS) && mkdir -p $(STAMPS) && touch $@

# Installed editable, which needs no compiler: the library is built in place next, where ninja compiles only what changed.
$(STAMPS)/installed: $(TORCH_STAMP) pyproject.toml
	SHUFFLENET_EXT_REFERENCE_ONLY=1 $(PIP) install --quiet --no-build-isolation --editable .
	touch $@

$(STAMPS)/built: $(STAMPS)/installed $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# $(STAMPS)/extra-X: the requirements of the package's extra X.
$(STAMPS)/extra-%: $(STAMPS)/installed
	$(BIN)/python -c "import importlib.metadata as m; \
	  print(*(r.split(';')[0] for r in m.requires('shufflenet_ext') if 'extra == \"$*\"' in r), sep='\n')" > $@.txt
	$(PIP) install --quiet --requirement $@.txt
	touch $@
