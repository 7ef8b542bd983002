"""The sweeps inside torch's differentiation: Functions, custom operators, and the modes torch is in."""
