"""The compact model drafts, the whole model checks."""
