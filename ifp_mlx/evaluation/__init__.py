"""What ``evaluate`` is made of: rows, measures, rivals, answers, and their pages."""
