"""Training: one loop for pretraining and finetuning; the only package that imports Lightning."""
