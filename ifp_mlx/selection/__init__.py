"""What is asked for and what is chosen; no model is needed here."""
