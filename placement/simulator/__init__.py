"""A discrete-event simulation of a plan: the cache policies and the scheduler that the runtime runs, on a trace."""
