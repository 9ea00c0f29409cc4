"""What daskinfer promises where things break, proved by breaking them: ``python -m tests.faults``."""
