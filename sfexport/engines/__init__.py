"""Backends that run the three graphs behind one interface, and building them. No backend library is imported here."""
