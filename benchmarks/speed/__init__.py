"""Speed: this project beside Pyro, torch, NumPyro, JAX, PCX and FabricPC, in one run."""
