"""The engine of stage one: plan shards, decode, run the teachers, commit."""
