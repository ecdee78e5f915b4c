"""The MoE step: route, schedule, execute, combine, observe."""
