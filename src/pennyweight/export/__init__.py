"""Models as other programs read them."""
