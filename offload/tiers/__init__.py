"""Memory tiers: arenas of slots, the table of what lies where, and the engine that fills them."""
