"""What a fit is judged by, and the figures."""
