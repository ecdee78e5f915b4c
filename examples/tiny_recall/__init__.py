"""A small model that recalls: told which value belongs to which key, it answers for any of them, far back."""
