"""latent-mediation: which facts a language model actually used."""
