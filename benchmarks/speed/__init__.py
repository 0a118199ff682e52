"""Speed: the same steps here and elsewhere, side by side."""
