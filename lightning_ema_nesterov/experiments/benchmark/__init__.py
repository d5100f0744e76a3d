"""What the method costs, in time and memory."""
