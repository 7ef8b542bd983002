"""What has nothing to do with cross-entropy: files written whole or not at all, and text."""
