"""Proof that engines say what PyTorch says: graph by graph, then answer by answer."""
