"""Peers: the tasks of `python -m benchmarks speed` as others compute them.

    scripts/numpyro_peer.py     NumPyro: SVI by svi.run and by a jitted svi.update
    scripts/jax_pc_peer.py      hand-written JAX: predictive coding as one compiled scan
    scripts/pcx_peer.py         PCX: its own MNIST decoder
    scripts/fabricpc_peer.py    FabricPC: its own MNIST classifier
    torch_peer                  hand-written eager torch, every task
    zoo_peer                    this project compiled, captured and eager; stock Pyro

Each has a process and, but for torch, an environment of its own, which is why the scripts are no
modules of this package: this project's interpreter cannot import them
(:mod:`~benchmarks.speed.peers.environments`), and answers requests line by line
(:mod:`~benchmarks.speed.peers.protocol`), so that a runner (:mod:`~benchmarks.speed.peers.client`)
can alternate between peers block by block. All start from the same arrays
(:mod:`~benchmarks.speed.peers.problems`): data, parameters, and the noise of one draw, at which
their losses must agree.

`protocol` and `problems` import the standard library and numpy only: they run in every peer's
environment, found beside the script.
"""
