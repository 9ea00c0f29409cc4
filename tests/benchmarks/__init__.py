"""How fast daskinfer is beside what a person would use instead: ``python -m tests.benchmarks``."""
