"""The functions behind the commands: choosing a threshold, explaining decisions, measuring answers, diagnosis."""
