"""Run the three graphs with a backend, and build engines for it. No backend library is imported here."""
