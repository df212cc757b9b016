"""Text in and out: tokenizers and chat templates, one object for training, chat and export."""
