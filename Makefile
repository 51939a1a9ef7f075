.PHONY: test lint bench

test:
	pytest

lint:
	pre-commit run --all-files

bench:
	pytest benchmarks/ --benchmark-only
