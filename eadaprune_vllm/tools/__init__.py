"""What stands behind the commands: choosing a threshold, looking at decisions, measuring answers."""
