"""Text from a model: sampling, cached decoding, chat."""
