"""What a model is without its weights: configuration, files, tokenizer, chat template. Never imports torch."""
