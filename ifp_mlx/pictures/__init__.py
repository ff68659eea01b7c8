"""What ``visualize`` is made of: counting, drawing, and the page."""
