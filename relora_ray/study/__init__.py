"""What was tried, and what came of it: tables of runs over grids and seeds, spectra of updates, pictures."""
