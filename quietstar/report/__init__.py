"""The report: a single HTML file that shows the effect of a model's thoughts on a text, token by token."""
