"""The mathematics in tiles of rows × classes, on any device: the first backend."""
