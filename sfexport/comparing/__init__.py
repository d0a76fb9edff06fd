"""Compare engines with PyTorch: graph by graph, then answer by answer."""
