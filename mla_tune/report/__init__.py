"""What a kernel engineer shows to others: one policy and its measurements as a page, and as a picture."""
