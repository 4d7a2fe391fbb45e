"""A user's own text, of any size, made into shards by several processes."""
