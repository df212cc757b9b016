"""Components with one thing wrong each: what the contracts have to catch."""
