"""What eviction does to answers, measured: `python -m evals run | report | list`, from a checkout. docs/evals.md says
how to read it."""
