"""Where weights come from: each source fetches an address into a directory; a MODEL argument becomes a path."""
