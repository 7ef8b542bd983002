"""Where the sweeps meet torch's differentiation: Functions, custom operators, and the modes torch is in."""
