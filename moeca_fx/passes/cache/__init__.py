"""The parts of `insert_cache`: what a full step stores and what a cached step does, one site kind a file."""
