"""Tables from files, models to files."""
