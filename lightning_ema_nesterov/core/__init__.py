"""The method itself, on torch alone: equations, schedule, placement, and what a rule must do."""
