"""How any stock model is masked, read and sliced."""
