"""Training sparse autoencoders, on SAELens."""
