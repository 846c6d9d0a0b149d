"""What a sweep varies, what became of its trials, and which of them are best. Knows neither Ray nor YAML."""
