"""What the runtime costs and gains, measured beside its peers in the same run: `python -m benchmarks --help`."""
