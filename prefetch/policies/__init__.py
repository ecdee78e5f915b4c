"""Cache policies: which expert gives way to which."""
