"""A decode step that is captured once and replayed: no Python between its layers."""
