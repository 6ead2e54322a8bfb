"""Cases as tasks of a Dask cluster: started for the run on this machine, or running elsewhere. ../README.md has the map."""
