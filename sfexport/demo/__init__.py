"""The demo: its world of clips, the shipped model, and going the whole way once. A random checkpoint for tests, too."""
