"""The evaluation of a fit, and the figures."""
