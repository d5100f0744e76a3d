"""What the callbacks of the Lightning Trainer share."""
