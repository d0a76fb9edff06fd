"""What is written and read back: bundles, engine directories, their manifests."""
