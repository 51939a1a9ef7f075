.PHONY: test lint bench docs gpu-check

test:
	pytest -n auto --dist loadfile

lint:
	pre-commit run --all-files

bench:
	pytest benchmarks/ --benchmark-only

# The site, in site/: pip install ".[docs]" first. Notebooks are run and shown with what they print. Zensical, the
# successor of MkDocs-Material, builds it too: make docs SITE=zensical
SITE ?= mkdocs
docs:
	jupyter nbconvert --execute --to markdown --output-dir docs/notebooks examples/notebooks/*.ipynb
	$(SITE) build --strict

# On a CUDA machine, without a network: build, tests, sanitizer, benchmarks, tuning, training, promises;
# see benchmarks/gpu_check.py.
gpu-check:
	python benchmarks/gpu_check.py
