"""The report: one HTML file that shows what a model's thoughts do to a text, token by token."""
