"""The demo's assets, made on the spot: a tiny random checkpoint in the released layout and a short clip."""
