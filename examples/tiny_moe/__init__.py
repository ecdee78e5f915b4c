"""A small Mixture-of-Experts language model, trained from scratch on text that every Python installation has."""
