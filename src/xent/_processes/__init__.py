"""Several processes on one job: their group, its leader and followers, signals."""
