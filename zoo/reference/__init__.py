"""Small statistical posteriors with a known answer, one a file."""
