"""What a run will take: counted on no memory, computed by pure functions, before anything is spent."""
