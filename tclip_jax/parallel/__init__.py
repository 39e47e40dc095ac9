"""Device mesh, parameter sharding, and the processes of a run."""
