"""Several processes on one job: their group, who leads, the signals they get."""
