"""The expert store: a directory of bundles that a tier can read in one aligned read each."""
