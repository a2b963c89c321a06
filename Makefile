PYTHON ?= python

.PHONY: check test mutants bench results hooks

check:                                  # lint and the quick tests: the pre-commit hook
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pytest -q -m "not slow"

test:                                   # everything that .ci/run tests, but for the mutants
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pytest -q

mutants:                                # plants each error of tests/mutants.txt in a copy
	$(PYTHON) tests/mutants.py

bench:                                  # seconds per step beside PyTorch's, and what limits them
	$(PYTHON) benchmarks/step.py
	$(PYTHON) benchmarks/roofline_cpu.py

results:                                # the table of the embedded digits, resumable
	$(PYTHON) benchmarks/accuracy.py

hooks:                                  # `make check` before every commit
	printf '#!/bin/sh\nexec make check\n' > .git/hooks/pre-commit && chmod +x .git/hooks/pre-commit
