"""How the packages above compile with Numba: what is compiled when, what into what, and where it is kept."""
