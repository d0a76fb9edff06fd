"""Write and open bundles and engine directories, and check their manifests."""
