"""Which tensor goes into which shard."""
