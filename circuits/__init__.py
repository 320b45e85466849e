"""How mediators connect: attribution graphs over dictionary latents."""
