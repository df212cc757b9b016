"""As TransformerEngine's package."""
