"""A model of what warming many nodes costs the registry, the remote content cache, and the wires between."""
