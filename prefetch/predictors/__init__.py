"""Predictors: which experts layers that are still to come will need."""
