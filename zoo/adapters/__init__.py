"""Parameter-efficient methods: what they add to a model, where, and how it is taken away or merged again."""
