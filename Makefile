.PHONY: test lint bench gpu-check

test:
	pytest -n auto --dist loadfile

lint:
	pre-commit run --all-files

bench:
	pytest benchmarks/ --benchmark-only

# On a CUDA machine, without a network: build, tests, sanitizer, benchmarks, tuning, training, promises; see benchmarks/gpu_check.py.
gpu-check:
	python benchmarks/gpu_check.py
