"""What the algorithms share around their updates."""
