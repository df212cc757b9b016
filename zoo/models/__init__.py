"""The mathematics of one decoder. Start with `gpt`, then `block`. Torch and the spec only."""
