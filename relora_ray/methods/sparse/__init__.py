"""Low-rank factors and a sparse matrix beside them, from the start: SLTrain."""
