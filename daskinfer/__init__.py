"""daskinfer."""
