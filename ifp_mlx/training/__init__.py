"""What training is made of: settings, examples, masks, one step, and what watches it."""
